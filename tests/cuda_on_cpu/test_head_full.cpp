// sample_from_hidden with the threads that finish a row on a GPU.
#include "head_checks.h"

int main() {
  Shape shape{4, 66000, 16};  // more tiles than threads
  shape.gap = 8;
  check_fused<BFloat16>("bf16 [4, 16] x [66000, 16]", shape, 1);
  shape.vocab = 1000, shape.dim = 520, shape.bias = true, shape.softcap = 8;
  check_fused<Float16>("fp16 [4, 520] x [1000, 520], softcap, bias", shape, 1);
  check_from_logits<float, float>("fp32 [4, 520] x [1000, 520]", shape, 512, 3, 0, 1);
  return finish("head_full");
}
