// Which calls of attention the kernel for every GPU takes, and how they are launched.
#include "attention.cuh"
#include "attention_grid.cuh"
#include "attention_kernel.cuh"

namespace diffusion_runtime {
namespace {

template <class T, int kDim>
AttentionGrid grid_of(const AttentionArguments& a) {
  using Sizes = AttentionSizes<T, kDim>;
  return attention_grid(a, kWarpgroupRows, Sizes::kKeys, Sizes::kChunk, kPartFloats<Sizes::kSums>);
}

// Whether every row begins at a multiple of 16 bytes and is a whole number of them.
template <class T>
bool in_whole_vectors(const AttentionArguments& a) {
  const auto fits = [](const AttentionTensor& t, int dim) {
    constexpr int64_t kSize = Vector16<T>::kSize;
    return dim % kSize == 0 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch % kSize == 0 &&
           t.head % kSize == 0 && t.row % kSize == 0;
  };
  const bool prefix =
      a.prefix_key.data == nullptr || (fits(a.prefix_key, a.head_dim) && fits(a.prefix_value, a.value_dim));
  return prefix && fits(a.query, a.head_dim) && fits(a.key, a.head_dim) && fits(a.value, a.value_dim);
}

template <class T, int kDim>
void launch_for(const AttentionArguments& a, void* workspace, cudaStream_t stream) {
  using Shared = AttentionShared<T, kDim>;
  static_assert(sizeof(Shared) <= 163 << 10, "more than a block can have");
  const AttentionGrid grid = grid_of<T, kDim>(a);
  if (grid.all == 0) return;
  TileProblem p = {};
  set_launch(p, a, grid, workspace);
  p.whole_vectors = in_whole_vectors<T>(a);
  const auto kernel =
      a.mask_type == MaskType::None ? attention_kernel<T, kDim, NoMask> : attention_kernel<T, kDim, DenseMask<T>>;
  launch(kernel, dim3(unsigned(grid.all), unsigned(max(grid.chunks, int64_t{1}))),
         dim3(AttentionSizes<T, kDim>::kThreads), sizeof(Shared), stream, p);
}

// Calls what it is given with a T and the size of the tile that holds the heads.
template <class T, class Call>
auto of_size(const AttentionArguments& a, const Call& call) {
  const int widest = max(a.head_dim, a.value_dim);
  if (widest <= 64) return call(T{}, std::integral_constant<int, 64>{});
  if (widest <= 128) return call(T{}, std::integral_constant<int, 128>{});
  if constexpr (sizeof(T) == 2)
    if (widest > 256) return call(T{}, std::integral_constant<int, 512>{});
  return call(T{}, std::integral_constant<int, 256>{});
}

template <class Call>
auto of_type(const AttentionArguments& a, const Call& call) {
  if (a.type == LogitType::Float32) return of_size<float>(a, call);
  if (a.type == LogitType::Float16) return of_size<Float16>(a, call);
  return of_size<BFloat16>(a, call);
}

}  // namespace

bool attention_takes(const AttentionArguments& a) {
  return max(a.head_dim, a.value_dim) <= (a.type == LogitType::Float32 ? 256 : 512);
}

size_t attention_workspace(const AttentionArguments& a) {
  return of_type(a, [&](auto t, auto dim) { return size_t(grid_of<decltype(t), dim>(a).workspace); });
}

void launch_attention(const AttentionArguments& a, void* workspace, cudaStream_t stream) {
  of_type(a, [&](auto t, auto dim) { launch_for<decltype(t), dim>(a, workspace, stream); });
}

}  // namespace diffusion_runtime
