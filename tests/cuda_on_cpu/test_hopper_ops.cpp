// What barriers, tile copies and warpgroup products mean under the emulation, and what it says of their misuse.
#include "hopper_products.h"
#include "test_support.h"

using namespace diffusion_runtime;

// left [64, 128], right [32, 128] by rows; right [64, 128] by columns
struct alignas(1024) Operands {
  BFloat16 left[2][64 * 64], right[2][64 * 64];
  uint64_t full;
};

__device__ void begin(Operands& shared) {
  if (threadIdx.x == 0) barrier_init(&shared.full, 1);
  __syncthreads();
}

// rows: [64, 32] = left right[:32]^T; columns: [64, 128] = left[:, :64] right
__global__ void multiply(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right, float* rows,
                         float* columns) {
  SHARED(Operands, shared);
  begin(shared);
  if (threadIdx.x == 0) {
    barrier_arrive_expect(&shared.full, sizeof shared.left + sizeof shared.right);
    for (int panel = 0; panel < 2; ++panel) {
      load_tile(shared.left[panel], left, &shared.full, panel * 64, 3, 1, 0);
      load_tile(shared.right[panel], right, &shared.full, panel * 64, -2, 0, 1);
    }
  }
  barrier_wait(&shared.full, 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, column = lane % 4 * 2;
  float by_rows[16], by_columns[64];
  uint32_t a[4][4];
  for (int i = 0; i < 64; ++i) by_columns[i] = 1;
  for (int k = 0; k < 4; ++k)
    for (int j = 0; j < 4; ++j) {
      const int r = row + j % 2 * 8, c = k * 16 + column + j / 2 * 8;
      std::memcpy(&a[k][j], &shared.left[0][r * 64 + (c / 8 ^ r % 8) * 8 + c % 8], 4);
    }
  products_fence();
  multiply_rows<false, BFloat16>(by_rows, rows_operand(shared.left[0]), rows_operand(shared.right[0]));
  for (int k = 16; k < 128; k += 16)
    multiply_rows<true, BFloat16>(by_rows, rows_operand(shared.left[k / 64] + k % 64),
                                  rows_operand(shared.right[k / 64] + k % 64));
  products_commit();
  for (int k = 0; k < 4; ++k)
    multiply_columns<BFloat16>(by_columns, a[k],
                               columns_operand(shared.right[0] + k * 16 * 64, sizeof shared.right[0]));
  products_commit();
  expect(by_rows[0] != by_rows[0] && by_columns[0] != by_columns[0], "sums before the wait", [] { return ""; });
  products_wait<1>();
  expect(by_rows[0] == by_rows[0] && by_columns[0] != by_columns[0], "sums of one group", [] { return ""; });
  products_wait<0>();
  for (int i = 0; i < 64; ++i) {
    const int r = row + i / 2 % 2 * 8, c = i / 4 * 8 + column + i % 2;
    if (i < 16) rows[r * 32 + c] = by_rows[i];
    columns[r * 128 + c] = by_columns[i];
  }
}

TensorMap map_of(const Buffer<BFloat16>& x, int64_t rows) {  // of [2, 2, rows, 128]
  return tensor_map({x.data, LogitType::BFloat16, 128, rows, 2, 2, 256, rows * 256, rows * 512, 64});
}

void test_products() {
  Buffer<BFloat16> left(4 * 50 * 128), right(4 * 70 * 128);
  for (size_t i = 0; i < left.size; i++) left[i] = from_float<BFloat16>(float(i * 37 % 61) - 30);
  for (size_t i = 0; i < right.size; i++) right[i] = from_float<BFloat16>(float(i * 29 % 67) - 33);
  // rows 3 and on of head 1 of batch 0, rows -2 and on of head 0 of batch 1, zeros outside
  const auto a = [&](int r, int c) { return r + 3 < 50 ? double(to_float(left[(50 + r + 3) * 128 + c])) : 0; };
  const auto b = [&](int r, int c) {
    return r >= 2 && r - 2 < 70 ? double(to_float(right[(2 * 70 + r - 2) * 128 + c])) : 0;
  };
  under_schedules(4, "products [64, 128] x [32, 128], [64, 64] x [64, 128]", [&](const std::string& schedule) {
    Buffer<float> rows(64 * 32), columns(64 * 128);
    cuda_on_cpu::counters = {};
    launch(multiply, dim3(1), dim3(128), sizeof(Operands), nullptr, map_of(left, 50), map_of(right, 70), rows.data,
           columns.data);
    for (int m = 0; m < 64; m++)
      for (int n = 0; n < 128; n++) {
        double by_rows = 0, by_columns = 1;
        for (int k = 0; k < 128; k++) by_rows += a(m, k) * b(n % 32, k);
        for (int k = 0; k < 64; k++) by_columns += a(m, k) * b(k, n);
        expect(n >= 32 || rows[m * 32 + n] == by_rows, "rows", [&] { return schedule; });
        expect(columns[m * 128 + n] == by_columns, "columns", [&] { return schedule; });
      }
    const auto& c = cuda_on_cpu::counters;
    expect(c.tile_copies == 4 && c.warpgroup_products == 4 * (8 + 4), "counters", [&] { return schedule; });
  });
}

// ------------------------------------------------------------------------------------------------------ misuse
struct alignas(1024) Little {
  BFloat16 at[64 * 64];
  uint64_t barrier;
};

enum Misuse {
  kNoInit,
  kMoreArrivals,
  kMisaligned,
  kEndsTooEarly,
  kBytesMissing,
  kNoFence,
  kSwizzle,
  kOutside,
  kStoreNotFenced,
  kCopyNotFenced,
  kChanged
};

template <int kMisuse>
__global__ void misuse(const __grid_constant__ TensorMap map) {
  SHARED(Little, shared);
  float sums[16] = {};
  uint32_t a[4] = {};
  const bool first = threadIdx.x == 0;
  if (kMisuse == kNoInit) barrier_wait(&shared.barrier, 0);
  if (first) barrier_init(&shared.barrier, 1);
  __syncthreads();
  if (kMisuse == kMoreArrivals && first) barrier_arrive_expect(&shared.barrier, 8), barrier_arrive(&shared.barrier);
  if (kMisuse == kMisaligned && first) load_tile(shared.at + 8, map, &shared.barrier, 0, 0, 0, 0);
  if (kMisuse == kEndsTooEarly && first) load_tile(shared.at, map, &shared.barrier, 0, 0, 0, 0);
  if (kMisuse == kBytesMissing) {
    if (first) barrier_arrive_expect(&shared.barrier, 64), load_tile(shared.at, map, &shared.barrier, 0, 0, 0, 0);
    barrier_wait(&shared.barrier, 0);
  }
  if (kMisuse == kNoFence) multiply_rows<true, BFloat16>(sums, rows_operand(shared.at), rows_operand(shared.at));
  products_fence();
  if (kMisuse == kSwizzle) multiply_rows<true, BFloat16>(sums, 0, rows_operand(shared.at));
  if (kMisuse == kOutside)
    multiply_columns<BFloat16>(sums, a, columns_operand(shared.at + 63 * 64, 0)), products_commit();
  if (kMisuse == kStoreNotFenced || kMisuse == kCopyNotFenced) {
    if (threadIdx.x == 5) store_operand(shared.at, uint4{});
    __syncthreads();
    if (kMisuse == kCopyNotFenced && first) load_tile(shared.at, map, &shared.barrier, 0, 0, 0, 0);
    multiply_rows<true, BFloat16>(sums, rows_operand(shared.at), rows_operand(shared.at)), products_commit();
  }
  if (kMisuse == kChanged)
    multiply_columns<BFloat16>(sums, a, columns_operand(shared.at, 0)), products_commit(), a[0] = 1;
  products_wait<0>();
}

template <int kMisuse>
void reports(const char* part) {
  static BFloat16 memory[64 * 64];
  const TensorMap map = tensor_map({memory, LogitType::BFloat16, 64, 64, 1, 1, 128, 16, 16, 64});
  try {
    launch(misuse<kMisuse>, dim3(1), dim3(128), sizeof(Little), nullptr, map);
    expect(false, "not reported", [&] { return part; });
  } catch (const cuda_on_cpu::Error& e) {
    expect(std::string(e.what()).find(part) != std::string::npos, "reported otherwise", [&] { return e.what(); });
  }
}

int main() {
  test_products();
  reports<kNoInit>("the barrier has no init");
  reports<kMoreArrivals>("more arrivals than the barrier expects");
  reports<kMisaligned>("a multiple of 128 bytes");
  reports<kEndsTooEarly>("the block ended before this copy arrived");
  reports<kBytesMissing>("deadlock");
  reports<kNoFence>("no products_fence");
  reports<kSwizzle>("only the 128-byte swizzle");
  reports<kOutside>("outside of shared memory");
  reports<kStoreNotFenced>("since a store to an operand");
  reports<kCopyNotFenced>("since a store where this box goes");
  reports<kChanged>("was changed before the wait");
  return finish("hopper_ops");
}
