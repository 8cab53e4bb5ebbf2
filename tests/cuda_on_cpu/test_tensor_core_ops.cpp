// What asynchronous copies, matrix loads and matrix products mean under the emulation, and what it says of their
// misuse.
#include "tensor_core_ops.h"
#include "test_support.h"

using namespace diffusion_runtime;

// left [16, 16] and right [8, 16] in rows of `stride` elements; product [16, 8]
template <class T>
struct Operands {
  alignas(16) T left[16 * 64], right[16 * 64];
};

template <class T>
__global__ void multiply(const T* left, const T* right, float* product, int stride) {
  SHARED(Operands<T>, shared);
  const int lane = threadIdx.x;
  for (int i = lane; i < 32; i += 32) {
    const int row = i / 2, chunk = i % 2 * 8;
    async_copy_16(shared.left + row * stride + chunk, left + row * 16 + chunk, true);
    async_copy_16(shared.right + row * stride + chunk, right + row % 8 * 16 + chunk, row < 8);
  }
  async_copy_commit();
  async_copy_wait<0>();
  __syncwarp();
  uint32_t a[4], b[4];
  load_matrices(a, shared.left + lane % 16 * stride + lane / 16 * 8);
  load_matrices(b, shared.right + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
  float sums[4] = {1, 1, 1, 1}, zeros[4] = {};
  multiply_add<T>(sums, a, b[0], b[1]);
  multiply_add<T>(zeros, a, b[2], b[3]);
  for (int i = 0; i < 4; i++) product[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i] + zeros[i];
}

// product[16 x 8] = left[16 x 16] right[16 x 8], the rows of right 16 elements apart.
template <class T>
__global__ void multiply_turned(const T* left, const T* right, float* product) {
  SHARED(Operands<T>, shared);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared.left[i] = left[i], shared.right[i] = right[i];
  __syncwarp();
  uint32_t a[4], b[4];
  load_matrices(a, shared.left + lane % 16 * 16 + lane / 16 * 8);
  load_matrices_turned(b, shared.right + lane % 16 * 16 + lane / 16 * 8);
  float sums[4] = {};
  multiply_add<T>(sums, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) product[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

struct Halves {
  alignas(16) BFloat16 at[2][8];
};

// What is in shared memory after each of two waits, and before.
__global__ void copy_twice(const BFloat16* from, float* seen) {
  SHARED(Halves, shared);
  for (int i = 0; i < 2; i++) {
    async_copy_16(shared.at[i], from + i * 8, true);
    async_copy_commit();
  }
  const auto look = [&](float* to) { to[0] = to_float(shared.at[0][3]), to[1] = to_float(shared.at[1][3]); };
  look(seen);
  async_copy_wait<1>();
  look(seen + 2);
  async_copy_wait<0>();
  look(seen + 4);
}

__global__ void copy_unaligned(const BFloat16* from) {
  SHARED(Halves, shared);
  async_copy_16(shared.at[0], from + 1, true);
}
__global__ void copy_to_global(BFloat16* to) { async_copy_16(to, to, true); }
__global__ void load_unaligned() {
  SHARED(Halves, shared);
  uint32_t to[4];
  load_matrices(to, &shared.at[0][1]);
}

template <class T>
void test_products(const char* what) {
  Buffer<T> left(16 * 16), right(8 * 16);
  for (int i = 0; i < 256; i++) left[i] = from_float<T>(float(i * 37 % 64 - 32) / 8);
  for (int i = 0; i < 128; i++) right[i] = from_float<T>(float(i * 29 % 64 - 31) / 4);
  for (int stride : {24, 64})  // rows 48 bytes apart lie in different banks, rows 128 bytes apart in one
    under_schedules(2, what, [&](const std::string& schedule) {
      Buffer<float> product(16 * 8);
      cuda_on_cpu::counters = {};
      launch(multiply<T>, dim3(1), dim3(32), sizeof(Operands<T>), nullptr, left.data, right.data, product.data, stride);
      for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
          double wanted = 1;
          for (int k = 0; k < 16; k++) wanted += double(to_float(left[m * 16 + k])) * to_float(right[n * 16 + k]);
          expect(product[m * 8 + n] == wanted, what, [&] { return schedule + compare(product[m * 8 + n], wanted); });
        }
      const auto& c = cuda_on_cpu::counters;
      const uint64_t conflicts = stride == 64 ? 2 * 4 * 7 : 0;
      expect(c.async_copies == 48 && c.matrix_loads == 2 && c.matrix_products == 2, "counters", [] { return ""; });
      expect(c.matrix_load_conflicts == conflicts, "conflicts",
             [&] { return std::to_string(c.matrix_load_conflicts); });
    });
}

template <class T>
void test_turned(const char* what) {
  Buffer<T> left(16 * 16), right(16 * 16);
  for (int i = 0; i < 256; i++) {
    left[i] = from_float<T>(float(i * 37 % 64 - 32) / 8);
    right[i] = from_float<T>(float(i * 29 % 64 - 31) / 4);
  }
  Buffer<float> product(16 * 8);
  launch(multiply_turned<T>, dim3(1), dim3(32), sizeof(Operands<T>), nullptr, left.data, right.data, product.data);
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 8; n++) {
      double wanted = 0;
      for (int k = 0; k < 16; k++) wanted += double(to_float(left[m * 16 + k])) * to_float(right[k * 16 + n]);
      expect(product[m * 8 + n] == wanted, what, [&] { return compare(product[m * 8 + n], wanted); });
    }
}

void test_waits() {
  Buffer<BFloat16> from(16);
  for (int i = 0; i < 16; i++) from[i] = from_float<BFloat16>(float(i));
  Buffer<float> seen(6);
  launch(copy_twice, dim3(1), dim3(1), sizeof(Halves), nullptr, from.data, seen.data);
  const float wanted[] = {NAN, NAN, 3, NAN, 3, 11};
  for (int i = 0; i < 6; i++)
    expect(seen[i] == wanted[i] || (seen[i] != seen[i] && wanted[i] != wanted[i]), "waits",
           [&] { return std::to_string(i) + ": " + compare(seen[i], wanted[i]); });
}

template <class F>
void reports(const char* part, F launch_it) {
  try {
    launch_it();
    expect(false, "not reported", [&] { return part; });
  } catch (const cuda_on_cpu::Error& e) {
    expect(std::string(e.what()).find(part) != std::string::npos, "reported otherwise", [&] { return e.what(); });
  }
}

void test_reports() {
  Buffer<BFloat16> buffer(32);
  BFloat16* const p = buffer.data;
  reports("no multiple of 16", [&] { launch(copy_unaligned, dim3(1), dim3(1), sizeof(Halves), nullptr, p); });
  reports("not in the block's shared", [&] { launch(copy_to_global, dim3(1), dim3(1), sizeof(Halves), nullptr, p); });
  reports("no multiple of 16", [&] { launch(load_unaligned, dim3(1), dim3(32), sizeof(Halves), nullptr); });
}

int main() {
  test_products<BFloat16>("bf16 [16, 16] x [8, 16]");
  test_products<Float16>("fp16 [16, 16] x [8, 16]");
  test_turned<BFloat16>("bf16, turned");
  test_turned<Float16>("fp16, turned");
  test_waits();
  test_reports();
  return finish("tensor_core_ops");
}
