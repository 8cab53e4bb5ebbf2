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

// Which tokens of a row may be drawn.
struct Restriction {
  const uint32_t* allowed;  // [ceil(vocab / 32)]: token t may be if bit t % 32 of word t / 32 is set; null: all may be
  int64_t top_k;            // the next three count if scales.draw > 0; 0: none
  float top_p, min_p;       // 1, 0: none
  bool restricted;          // the statistics are those of the tokens that may be drawn
  bool cuts() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

struct Row {
  const void* logits;  // [vocab]
  LogitType type;
  int64_t vocab;
  RowScales scales;
  Uniforms uniforms;  // read only if scales.draw > 0
  Restriction restriction;
  RowPart* parts;      // scratch, one for each chunk of the row
  float* tile_maxima;  // scratch, one for each tile; used if the restriction cuts
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
