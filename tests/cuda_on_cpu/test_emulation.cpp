// The emulation itself: what its operations mean, and that it reports what it promises to report.
#include "test_support.h"

struct Words {
  int values[64];
};

__global__ void collectives(int* out) {
  const int lane = threadIdx.x % 32;
  int* my = out + threadIdx.x * 8;
  my[0] = __shfl_sync(~0u, lane * 10, 5);
  my[1] = __shfl_sync(~0u, lane * 10, 1, 8);
  my[2] = __shfl_xor_sync(~0u, lane, 3);
  my[3] = __shfl_up_sync(~0u, lane, 2);
  my[4] = __shfl_down_sync(~0u, lane, 2, 16);
  my[5] = int(__ballot_sync(~0u, lane % 2));
  my[6] = lane < 16 ? __reduce_add_sync(0xFFFFu, lane) : __reduce_max_sync(0xFFFF0000u, lane);
  my[7] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane < 31);
}

__global__ void reversal(int* out) {
  SHARED(Words, shared);
  for (int round = 0; round < 3; round++) {
    shared.values[threadIdx.x] = threadIdx.x + round;
    __syncthreads();
    out[threadIdx.x] = shared.values[63 - threadIdx.x];
    __syncthreads();
  }
}

__global__ void half_waits() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_places() {
  if (threadIdx.x % 32 < 16)
    __syncwarp();
  else
    __shfl_sync(~0u, 1, 0);
}
__global__ void two_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void outside_the_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xFFFFu << threadIdx.x / 16 * 16, 1, 20); }
__global__ void unaligned(const float* p) { __ldg(reinterpret_cast<const uint4*>(p + 1)); }
__global__ void too_much_shared() {
  SHARED(Words, shared);
  shared.values[0] = 1;
}
__global__ void take_tickets(unsigned* count, unsigned* taken) { taken[atomicAdd(count, 1u)] = 1; }

template <class F>
void reports(const char* part, F launch_it) {
  try {
    launch_it();
    expect(false, "not reported", [&] { return part; });
  } catch (const cuda_on_cpu::Error& e) {
    expect(std::string(e.what()).find(part) != std::string::npos, "reported otherwise", [&] { return e.what(); });
  }
}

void test_operations() {
  under_schedules(6, "operations", [](const std::string& schedule) {
    Buffer<int> out(64 * 8);
    launch(collectives, dim3(1), dim3(64), 0, nullptr, out.data);
    for (int i = 0; i < 64; i++) {
      const int l = i % 32;
      const int expected[] = {50,
                              (l / 8 * 8 + 1) * 10,
                              l ^ 3,
                              l < 2 ? l : l - 2,
                              l % 16 < 14 ? l + 2 : l,
                              int(0xAAAAAAAAu),
                              l < 16 ? 120 : 31,
                              1};
      for (int j = 0; j < 8; j++)
        expect(out[i * 8 + j] == expected[j], "collectives", [&] { return schedule + " " + std::to_string(j); });
    }
    cuda_on_cpu::counters = {};
    launch(reversal, dim3(1), dim3(64), sizeof(Words), nullptr, out.data);
    for (int i = 0; i < 64; i++) expect(out[i] == 65 - i, "__syncthreads", [&] { return schedule; });
    expect(cuda_on_cpu::counters.barriers == 6, "counted barriers", [&] { return schedule; });
    Buffer<unsigned> count(1), taken(96);
    count[0] = 0;
    launch(take_tickets, dim3(3), dim3(32), 0, nullptr, count.data, taken.data);
    for (int i = 0; i < 96; i++) expect(taken[i] == 1, "atomicAdd", [&] { return schedule; });
  });
}

void test_reports() {
  Buffer<float> floats(8);
  Buffer<int> ints(32);
  const float* p = floats.data;
  reports("32 threads returned", [] { launch(half_waits, dim3(1), dim3(64), 0, nullptr); });
  reports("of the mask is at", [] { launch(two_places, dim3(1), dim3(32), 0, nullptr); });
  reports("another thread of the block is at", [] { launch(two_barriers, dim3(1), dim3(64), 0, nullptr); });
  reports("outside the mask", [&] { launch(outside_the_mask, dim3(1), dim3(32), 0, nullptr, ints.data); });
  reports("no multiple of 16", [&] { launch(unaligned, dim3(1), dim3(1), 0, nullptr, p); });
  reports("more shared memory", [] { launch(too_much_shared, dim3(1), dim3(1), 64, nullptr); });
}

// Every number comes back; halfway cases go to the even neighbour.
void test_numbers() {
  for (unsigned i = 0; i < 0x10000; i++) {
    const Float16 h{uint16_t(i)}, next{uint16_t(i + 1)};
    const BFloat16 b{uint16_t(i)};
    const float x = to_float(h), y = to_float(next);
    const auto number = [&] { return std::to_string(i); };
    if (x == x) expect(__float2half(x).bits == i, "fp16", number);
    if (to_float(b) == to_float(b)) expect(__float2bfloat16(to_float(b)).bits == i, "bf16", number);
    if (i % 0x8000 < 0x7BFF) expect(__float2half((x + y) / 2).bits == (i & 1 ? i + 1 : i), "fp16 tie", number);
  }
}

int main() {
  test_operations();
  test_reports();
  test_numbers();
  return finish("emulation");
}
