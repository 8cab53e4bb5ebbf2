// Probabilities of some tokens of a row, as each instruction set implements it (weigh_row.inc).
#pragma once

#include "sample_row.h"

namespace diffusion_runtime {

struct WeighRow {
  const void* logits;  // [count]
  LogitType type;
  int64_t count;
  float temperature, softcap;  // softcap 0: none
  float logsumexp;             // of y / temperature, over the whole row
  void* out;                   // [count]
  LogitType out_type;
};

namespace avx512 {
void weigh_row(const WeighRow& row);
}
namespace avx2 {
void weigh_row(const WeighRow& row);
}
namespace portable {
void weigh_row(const WeighRow& row);
}

}  // namespace diffusion_runtime
