// Limited draws with the sizes that run on a GPU.
#include "restricted_draw_checks.h"

int main() {
  const Limits cuts{Limits::all, true, true, false, false, 0, 1, 0};
  const Limits everything{Limits::per_row, true, true, true, true, 0, 1, 0};
  check_limited<BFloat16>("bf16 [1, 15, 17384], top_k, top_p", {1, 15, 2 * ops::kChunk + 1000}, cuts, 1);
  check_limited<float>("fp32 [1, 3, 151936], top_k, top_p", {1, 3, 151936}, cuts, 0);
  Shape unaligned{2, 8, ops::kChunk + 129};
  unaligned.softcap = 20, unaligned.gap = 1, unaligned.masked = true;
  check_limited<Float16>("fp16 [2, 8, 8321], everything, softcap, masked", unaligned, everything, 1);
  return finish("restricted_draw_full");
}
