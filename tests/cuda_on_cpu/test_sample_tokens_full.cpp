// sample_tokens with the sizes that run on a GPU.
#include "sample_tokens_checks.h"

int main() {
  Shape aligned{1, 12, 2 * ops::kChunk + 1000};
  check<BFloat16>("bf16 [1, 12, 17384]", aligned, 2);
  Shape unaligned{2, 3, ops::kChunk + 129};
  unaligned.softcap = 20, unaligned.gap = 1, unaligned.masked = true;
  check<Float16>("fp16 [2, 3, 8321], softcap, masked", unaligned, 2);
  check<float>("fp32 [1, 2, 151936]", {1, 2, 151936}, 1);
  check_invariance<BFloat16>("bf16 [1, 6, 17001], alone as in the batch", {1, 6, 17001});
  std::printf("%d draws, %d of them within 1e-5 of a boundary\n", draws, draws_at_a_boundary);
  return finish("sample_tokens_full");
}
