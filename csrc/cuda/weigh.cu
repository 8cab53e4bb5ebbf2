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
  if (count >= kTokensAtOnce && is_aligned(from)) return *reinterpret_cast<const Tokens<T>*>(from);
  Tokens<T> tokens;
#pragma unroll
  for (int i = 0; i < kTokensAtOnce; ++i) tokens.element[i] = i < count ? from[i] : minus_infinity<T>();
  return tokens;
}

template <class T>
__device__ __forceinline__ void save(T* to, const Tokens<T>& tokens, int64_t count) {
  if (count >= kTokensAtOnce && is_aligned(to)) {
    *reinterpret_cast<Tokens<T>*>(to) = tokens;
    return;
  }
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
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t first =
        int64_t{blockIdx.y} * kTokensOfBlock + (round * kWeighThreads + int(threadIdx.x)) * kTokensAtOnce;
    const int64_t count = op.count - first;
    if (count <= 0) break;
    Tokens<Probability> result = {};
    if (masked) {
      const Tokens<Logit> tokens = load(logits + first, count);
#pragma unroll
      for (int i = 0; i < kTokensAtOnce; ++i) {
        const float y = softcapped(to_float(tokens.element[i]), op.softcap, inverse_softcap);
        result.element[i] = narrowed<Probability>(fast_exp2((y * inverse_temperature - logsumexp) * kLog2e));
      }
    }
    save(probabilities + first, result, count);
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
