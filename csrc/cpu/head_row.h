// One row of sample_from_hidden, as each instruction set implements it (head_row.inc, in a namespace of its own).
#pragma once

#include "sample_row.h"

namespace diffusion_runtime {

// What is kept of a chunk of kChunk tokens of a row.
struct HeadPart {
  RowPart part;
  int32_t argmax;  // token of the largest logit, the lowest id at a tie; -1 if there is none
};

struct HeadChunk {
  const void* logits;  // [count]
  LogitType type;
  int count;                // at most kChunk
  int64_t first;            // token of logits[0], a multiple of kChunk
  const uint32_t* allowed;  // the words of the row, or null: every token
  RowScales scales;
  HeadPart* part;
  float* tile_masses;  // for each tile of the chunk, at the scale of the draw; null if the row draws nothing
};

struct HeadRow {
  const HeadPart* parts;     // one for each chunk
  const float* tile_masses;  // one for each tile
  int64_t vocab;
  RowScales scales;
  Uniforms uniforms;  // read only if scales.draw > 0, as is all that follows
  LogitType type;     // of hidden, weight and bias
  int64_t dim;
  const void* hidden;  // [dim]
  const void* weight;  // [vocab, dim] with these strides, in elements
  int64_t weight_strides[2];
  const void* bias;  // [vocab] or null
  const uint32_t* allowed;
};

namespace avx512 {
void read_head_chunk(const HeadChunk& chunk);
RowSample sample_head_row(const HeadRow& row);
}  // namespace avx512
namespace avx2 {
void read_head_chunk(const HeadChunk& chunk);
RowSample sample_head_row(const HeadRow& row);
}  // namespace avx2
namespace portable {
void read_head_chunk(const HeadChunk& chunk);
RowSample sample_head_row(const HeadRow& row);
}  // namespace portable

}  // namespace diffusion_runtime
