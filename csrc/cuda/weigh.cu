// exp(softcap(logits) / temperature - logsumexp), one pass, 16 bytes at a time where addresses allow it.
#include "row_ops.cuh"
#include "weigh.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kWeighThreads = 256;
constexpr int kTokensAtOnce = 8;  // of a thread: 16 bytes of 16-bit elements
constexpr int kRounds = 4;        // of the block, whose loads are independent
constexpr int kTokensOfBlock = kWeighThreads * kTokensAtOnce * kRounds;

template <class T>
struct alignas(16) Tokens {
  T element[kTokensAtOnce];
};

__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
__device__ __forceinline__ Tokens<T> load(const T* from, int64_t count) {
  if (count >= kTokensAtOnce && is_aligned(from)) return load_aligned<Tokens<T>>(from);
  Tokens<T> tokens;
#pragma unroll
  for (int i = 0; i < kTokensAtOnce; ++i) tokens.element[i] = i < count ? from[i] : minus_infinity<T>();
  return tokens;
}

template <class T>
__device__ __forceinline__ void save(T* to, const Tokens<T>& tokens, int64_t count) {
  if (count >= kTokensAtOnce && is_aligned(to)) return store_aligned(to, tokens);
#pragma unroll
  for (int i = 0; i < kTokensAtOnce; ++i) {
    if (i < count) to[i] = tokens.element[i];
  }
}

// Grid (rows, blocks of tokens).
template <class Logit, class Probability>
__global__ void __launch_bounds__(kWeighThreads) weigh_kernel(const __grid_constant__ Weigh op) {
  const int64_t r = blockIdx.x;
  const unsigned inner = unsigned(op.inner), outer_index = blockIdx.x / inner, inner_index = blockIdx.x % inner;
  const Logit* const logits =
      static_cast<const Logit*>(op.logits) + outer_index * op.outer_stride + inner_index * op.inner_stride;
  Probability* const probabilities = static_cast<Probability*>(op.probabilities) + r * op.probability_stride;
  const bool masked = op.masked == nullptr || op.masked[r];
  const float inverse_temperature = finite_inverse(at(op.temperature, r)), logsumexp = masked ? op.logsumexp[r] : 0;
  const float inverse_softcap = finite_inverse(op.softcap);
  const auto first_of = [](int round) {
    return int64_t{blockIdx.y} * kTokensOfBlock + (round * kWeighThreads + int(threadIdx.x)) * kTokensAtOnce;
  };
  Tokens<Logit> loaded[kRounds] = {};
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    if (masked) loaded[round] = load(logits + first_of(round), op.count - first_of(round));
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    Tokens<Probability> result = {};
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) {
      const float y = softcapped(to_float(loaded[round].element[i]), op.softcap, inverse_softcap);
      const float probability = fast_exp2((y * inverse_temperature - logsumexp) * kLog2e);
      if (masked) result.element[i] = narrowed<Probability>(probability);
    }
    save(probabilities + first_of(round), result, op.count - first_of(round));
  }
}

// Calls launch_for(an element of this type).
template <class Launch>
void for_type(LogitType type, const Launch& launch_for) {
  switch (type) {
    case LogitType::Float32: return launch_for(float{});
    case LogitType::Float16: return launch_for(Float16{});
    case LogitType::BFloat16: return launch_for(BFloat16{});
  }
}

}  // namespace

void weigh(const Weigh& arguments, cudaStream_t stream) {
  if (arguments.rows == 0 || arguments.count == 0) return;
  const unsigned blocks = unsigned((arguments.count + kTokensOfBlock - 1) / kTokensOfBlock);
  const dim3 grid(unsigned(arguments.rows), blocks);
  for_type(arguments.logit_type, [&](auto logit) {
    for_type(arguments.probability_type, [&](auto probability) {
      launch(weigh_kernel<decltype(logit), decltype(probability)>, grid, dim3(kWeighThreads), 0, stream, arguments);
    });
  });
}

}  // namespace diffusion_runtime
