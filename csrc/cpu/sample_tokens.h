#pragma once

#include <optional>
#include <string>

#include "row_setting.h"

namespace diffusion_runtime {

// The op of diffusion_runtime/ops/_sample_tokens.py, which documents it.
//
// * logits: [outer, inner, vocab] float32, float16 or bfloat16, stride 1 along vocab; row r = outer index * inner + i
// * masked: [rows] bool, or none: every row
// * position: [rows] int64, or none: i
// * softcap: 0: none
// * allowed: [rows, ceil(vocab / 32)] int32, stride 1 along the words, any along the rows; or none: every token
// * top_k, top_p, min_p: 0, 1, 0: no cut
// * ids: [2, rows] int64: token, argmax; -1 in a row that is not masked or has no distribution
// * statistics: [5, rows] float32: logprob, confidence, margin, entropy, logsumexp; 0 in a row that is not masked
void sample_tokens_cpu(const TensorView& logits, const std::optional<TensorView>& masked,
                       const RowArgument<float>& temperature, const RowArgument<std::int64_t>& seed,
                       const std::optional<TensorView>& position, const RowArgument<std::int64_t>& step,
                       const RowArgument<float>& statistics_temperature, float softcap,
                       const std::optional<TensorView>& allowed, const RowArgument<std::int64_t>& top_k,
                       const RowArgument<float>& top_p, const RowArgument<float>& min_p, bool restricted,
                       const TensorView& ids, const TensorView& statistics, const std::string& instruction_set);

}  // namespace diffusion_runtime
