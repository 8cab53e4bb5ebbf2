#pragma once

#include <optional>
#include <string>

#include "row_setting.h"

namespace diffusion_runtime {

// What soft_embedding needs of a tile of the vocabulary: out = exp(softcap(logits) / temperature - logsumexp).
//   logits     [outer, inner, n] float32, float16 or bfloat16, stride 1 along n
//   masked     [rows] bool, or none: every row; rows that are not masked are not read and give 0
//   softcap    0: none
//   logsumexp  [rows] float32
//   out        [rows, n] float32, float16 or bfloat16, stride 1 along n; may not overlap the logits
void weigh_cpu(const TensorView& logits, const RowArgument<float>& temperature, float softcap,
               const std::optional<TensorView>& masked, const TensorView& logsumexp, const TensorView& out,
               const std::string& instruction_set);

}  // namespace diffusion_runtime
