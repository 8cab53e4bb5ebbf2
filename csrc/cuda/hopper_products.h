// Products of matrices by a warpgroup of sm_90a (wgmma): what they are on a GPU and, beside it, what they mean on the
// CPU. A warpgroup is 4 warps, 128 threads, the first of which is a multiple of 128; all of them issue each product.
#pragma once

#include "hopper_ops.h"

namespace diffusion_runtime {

// A matrix of 16-bit elements in shared memory, in panels of rows of 64 elements (128 bytes) as load_tile leaves them:
// at a multiple of 1024 bytes, 8 rows each 1024 bytes.
//
// Of the operand's rows, whose elements are along the depth of the product: at an element whose index in its row is a
// multiple of 16, for the next 16.
__device__ __forceinline__ uint64_t rows_operand(const void* p) {
  const uint64_t start = (shared_address(p) & 0x3FFFF) >> 4, stride = 1024 >> 4, swizzle128 = 1;
  return start | uint64_t{1} << 16 | stride << 32 | swizzle128 << 62;
}
// Of its columns, whose rows are along the depth: at row 16 k of the first panel; the next 64 columns begin `panel`
// bytes behind.
__device__ __forceinline__ uint64_t columns_operand(const void* p, unsigned panel) {
  const uint64_t start = (shared_address(p) & 0x3FFFF) >> 4, stride = 1024 >> 4, swizzle128 = 1;
  return start | uint64_t{panel >> 4} << 16 | stride << 32 | swizzle128 << 62;
}
// The same, `bytes` further on.
__device__ __forceinline__ uint64_t operand_behind(uint64_t operand, unsigned bytes) { return operand + (bytes >> 4); }

// Sums of [64, 2 kSums], float32, are spread over a warpgroup: thread t has in sums[i] the one of row 16 (t / 32) +
// t % 32 / 4 + i / 2 % 2 * 8 and column i / 4 * 8 + t % 4 * 2 + i % 2.
//
// multiply_rows: sums = (kAdd ? sums : 0) + a[64, 16] b[2 kSums, 16]^T, both by rows_operand.
// multiply_columns: sums += a[64, 16] b[16, 2 kSums], b by columns_operand; a, in registers, is spread as sums of 16
// columns are, two elements each: a[j] is {sums[2 j], sums[2 j + 1]}.
// They begin when the warpgroup has passed a products_fence since it wrote to sums or a, and are done at the wait for
// their group: until then neither sums nor a may be touched, and shared memory is read.

#ifdef __CUDACC__  // ------------------------------------------------------------------------------------- on the GPU

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All groups but the last kPending are done.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The numbers of the operands of a product, and the operands.
#define NUMBERS_32                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_64                                                                               \
  NUMBERS_32                                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_128                                                                                  \
  NUMBERS_64                                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "     \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, " \
  "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_32 SUMS_16(0), SUMS_16(16)
#define SUMS_64 SUMS_32, SUMS_16(32), SUMS_16(48)
#define SUMS_128 SUMS_64, SUMS_16(64), SUMS_16(80), SUMS_16(96), SUMS_16(112)

template <class T, int kSums>
struct WarpgroupProduct;

// n0 to n4: the numbers of the operands behind the sums
#define WARPGROUP_PRODUCT(T, kSums, instruction, numbers, operands, n0, n1, n2, n3, n4)                        \
  template <>                                                                                                  \
  struct WarpgroupProduct<T, kSums> {                                                                          \
    static __device__ __forceinline__ void rows(float (&sums)[kSums], uint64_t a, uint64_t b, int add) {       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " n2 ", 0;\n" instruction " {" numbers "}, " n0 ", " n1   \
                   ", p, 1, 1, 0, 0;\n}\n"                                                                     \
                   : operands                                                                                  \
                   : "l"(a), "l"(b), "r"(add));                                                                \
    }                                                                                                          \
    static __device__ __forceinline__ void columns(float (&sums)[kSums], const uint32_t (&a)[4], uint64_t b) { \
      asm volatile(instruction " {" numbers "}, {" n0 ", " n1 ", " n2 ", " n3 "}, " n4 ", 1, 1, 1, 1;"         \
                   : operands                                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                      \
    }                                                                                                          \
  };
#define WARPGROUP_PRODUCTS(T, type)                                                                                \
  WARPGROUP_PRODUCT(T, 32, "wgmma.mma_async.sync.aligned.m64n64k16.f32." type, NUMBERS_32, SUMS_32, "%32", "%33",  \
                    "%34", "%35", "%36")                                                                           \
  WARPGROUP_PRODUCT(T, 64, "wgmma.mma_async.sync.aligned.m64n128k16.f32." type, NUMBERS_64, SUMS_64, "%64", "%65", \
                    "%66", "%67", "%68")                                                                           \
  WARPGROUP_PRODUCT(T, 128, "wgmma.mma_async.sync.aligned.m64n256k16.f32." type, NUMBERS_128, SUMS_128, "%128",    \
                    "%129", "%130", "%131", "%132")
WARPGROUP_PRODUCTS(BFloat16, "bf16.bf16")
WARPGROUP_PRODUCTS(Float16, "f16.f16")

template <bool kAdd, class T, int kSums>
__device__ __forceinline__ void multiply_rows(float (&sums)[kSums], uint64_t a, uint64_t b) {
  WarpgroupProduct<T, kSums>::rows(sums, a, b, kAdd);
}
template <class T, int kSums>
__device__ __forceinline__ void multiply_columns(float (&sums)[kSums], const uint32_t (&a)[4], uint64_t b) {
  WarpgroupProduct<T, kSums>::columns(sums, a, b);
}
#undef WARPGROUP_PRODUCTS
#undef WARPGROUP_PRODUCT
#undef SUMS_128
#undef SUMS_64
#undef SUMS_32
#undef SUMS_16
#undef SUMS_4
#undef NUMBERS_128
#undef NUMBERS_64
#undef NUMBERS_32

#else  // ---------------------------------------------------------------------------------------------- on the CPU

}  // namespace diffusion_runtime

namespace cuda_on_cpu {

struct Product {
  float* sums;
  int count;
  bool add, columns;          // of multiply_rows, of multiply_columns
  uint64_t a, b;              // operands in shared memory
  const uint32_t* registers;  // of multiply_columns, what they held, and the two rows of a that the thread needs
  uint32_t held[4];
  float row[2][16];
  float (*number)(uint16_t);
  Place here;
};

struct Products {  // of one thread: issued and not yet performed
  bool fenced = false;
  std::vector<Product> all;
  std::vector<size_t> groups;
  std::map<float*, std::vector<float> > sums;  // the sums themselves; the thread's registers hold NaN meanwhile
};
inline Products& products() {
  Quiet quiet;
  std::shared_ptr<void>& object = current->block->objects[current];
  if (!object) object = std::make_shared<Products>();
  return *static_cast<Products*>(object.get());
}

// Two elements beside each other in the memory of an operand: of a row (rows_operand) or of two columns.
inline uint32_t operand_pair(uint64_t descriptor, unsigned offset, Place here) {
  uint64_t address = (descriptor & 0x3FFF) * 16 + offset;
  address ^= (address >> 7 & 7) << 4;
  if (address + 4 > launch_state->shared_bytes) fail(here, "an operand lies outside of shared memory");
  {
    Quiet quiet;
    if (unfenced().count(uint32_t(address) / 16)) fail(here, "no async_proxy_fence since a store to an operand");
  }
  struct __attribute__((may_alias)) Pair {
    uint32_t bits;
  };
  return reinterpret_cast<const Pair*>(current->block->shared + address)->bits;
}
inline unsigned stride_of(uint64_t descriptor) { return unsigned(descriptor >> 32 & 0x3FFF) * 16; }

inline void read_row(const Product& p, uint64_t descriptor, int row, float (&to)[16]) {
  for (int k = 0; k < 16; k += 2) {
    const uint32_t pair = operand_pair(descriptor, row / 8 * stride_of(descriptor) + row % 8 * 128 + k * 2, p.here);
    to[k] = p.number(uint16_t(pair)), to[k + 1] = p.number(uint16_t(pair >> 16));
  }
}
// Of b by its columns: `column`, which is even, and the next.
inline void read_columns(const Product& p, int column, float (&to)[2][16]) {
  const unsigned panel = unsigned(p.b >> 16 & 0x3FFF) * 16;
  for (int k = 0; k < 16; k++) {
    const unsigned offset = column / 64 * panel + k / 8 * stride_of(p.b) + k % 8 * 128 + column % 64 * 2;
    const uint32_t pair = operand_pair(p.b, offset, p.here);
    to[0][k] = p.number(uint16_t(pair)), to[1][k] = p.number(uint16_t(pair >> 16));
  }
}

inline void perform(Product& p, float* sums) {
  const int lane = int(current->lane), warp = int(current->index.x) / 32 % 4;
  if (p.columns) {
    if (std::memcmp(p.held, p.registers, sizeof p.held)) fail(p.here, "an operand was changed before the wait");
  } else {
    // which of a's rows a warp reads, nobody promises: the thread sanitizer sees all
    for (int other = 0; watches_threads && other < 4; other++) read_row(p, p.a, other * 16 + lane % 16, p.row[0]);
    for (int r = 0; r < 2; r++) read_row(p, p.a, warp * 16 + lane / 4 + r * 8, p.row[r]);
  }
  for (int i = 0; i < p.count; i += 4) {
    float b[2][16];
    const int column = i / 4 * 8 + lane % 4 * 2;
    if (p.columns)
      read_columns(p, column, b);
    else
      read_row(p, p.b, column, b[0]), read_row(p, p.b, column + 1, b[1]);
    for (int j = 0; j < 4; j++) {
      float sum = p.add ? sums[i + j] : 0;
      for (int k = 0; k < 16; k++) sum += p.row[j / 2][k] * b[j % 2][k];
      sums[i + j] = sum;
    }
  }
}

inline void issue(const Product& product) {
  Products& p = products();
  if (!p.fenced) fail(product.here, "no products_fence since the last wait");
  if (product.b >> 62 != 1) fail(product.here, "only the 128-byte swizzle is emulated");
  struct In {
    uint64_t a, b;
    uint32_t held[4];
  } const mine = {product.a, product.b, {product.held[0], product.held[1], product.held[2], product.held[3]}};
  struct Out {
    uint32_t quad[4][4];
  };
  const Out all = collective<Out>("a warpgroup product", ~0u, mine, product.here, [&](const In* const* in, Out** out) {
    for (int l = 0; l < 32; l++) {
      if (in[l]->a != in[0]->a || in[l]->b != in[0]->b) fail(product.here, "lanes disagree on the operands");
      for (int t = 0; t < 4; t++) std::memcpy(out[l]->quad[t], in[l / 4 * 4 + t]->held, sizeof in[l]->held);
    }
    counters.warpgroup_products++;
  });
  Quiet quiet;
  if (!p.sums.count(product.sums)) {
    p.sums[product.sums].assign(product.sums, product.sums + product.count);
    std::fill_n(product.sums, product.count, NAN);
  }
  p.all.push_back(product);
  for (int t = 0; t < 4; t++)
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 2; i++)
        p.all.back().row[r % 2][t * 2 + i + r / 2 * 8] = product.number(uint16_t(all.quad[t][r] >> 16 * i));
}

template <class T>
float number_of(uint16_t bits) {
  return diffusion_runtime::to_float(T{bits});
}

}  // namespace cuda_on_cpu

namespace diffusion_runtime {

inline void products_fence() { cuda_on_cpu::products().fenced = true; }
inline void products_commit() {
  cuda_on_cpu::Products& p = cuda_on_cpu::products();
  cuda_on_cpu::Quiet quiet;
  p.groups.push_back(p.all.size());
}
template <bool kAdd, class T, int kSums>
void multiply_rows(float (&sums)[kSums], uint64_t a, uint64_t b, CALLER) {
  if (a >> 62 != 1) cuda_on_cpu::fail(here, "only the 128-byte swizzle is emulated");
  cuda_on_cpu::issue({sums, kSums, kAdd, false, a, b, nullptr, {}, {}, cuda_on_cpu::number_of<T>, here});
}
template <class T, int kSums>
void multiply_columns(float (&sums)[kSums], const uint32_t (&a)[4], uint64_t b, CALLER) {
  cuda_on_cpu::issue({sums, kSums, true, true, 0, b, a, {a[0], a[1], a[2], a[3]}, {}, cuda_on_cpu::number_of<T>, here});
}
// Products are performed at the wait for their group; the sums hold NaN until then.
template <int kPending>
void products_wait() {
  cuda_on_cpu::Products& p = cuda_on_cpu::products();
  p.fenced = false;
  if (p.groups.size() <= kPending) return;
  const size_t groups = p.groups.size() - kPending, count = p.groups[groups - 1];
  for (size_t j = 0; j < count; j++) cuda_on_cpu::perform(p.all[j], p.sums[p.all[j].sums].data());
  cuda_on_cpu::Quiet quiet;
  p.all.erase(p.all.begin(), p.all.begin() + count);
  p.groups.erase(p.groups.begin(), p.groups.begin() + groups);
  for (size_t& end : p.groups) end -= count;
  for (auto s = p.sums.begin(); s != p.sums.end();) {
    const bool pending = std::any_of(p.all.begin(), p.all.end(), [&](auto& one) { return one.sums == s->first; });
    if (!pending) std::copy(s->second.begin(), s->second.end(), s->first);
    s = pending ? std::next(s) : p.sums.erase(s);
  }
}
#endif

}  // namespace diffusion_runtime
