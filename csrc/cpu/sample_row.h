// One row of sample_tokens, as each instruction set implements it (sample_row.inc, in a namespace of its own).
#pragma once

#include <stdint.h>

#include "logit_type.h"
#include "row_statistics.h"

namespace diffusion_runtime {

constexpr int kChunk = 2048;  // tokens: a multiple of kTile that stays in the first-level cache

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct Row {
  const void* logits;  // [vocab]
  LogitType type;
  int64_t vocab;
  RowScales scales;
  Uniforms uniforms;  // read only if scales.draw > 0
  RowPart* parts;     // scratch, one for each chunk of the row
};

struct RowSample {
  int64_t token, argmax;  // -1, -1: the row has no distribution
  RowResult statistics;
};

namespace avx512 {
RowSample sample_row(const Row& row);
}
namespace avx2 {
RowSample sample_row(const Row& row);
}
namespace portable {
RowSample sample_row(const Row& row);
}

}  // namespace diffusion_runtime
