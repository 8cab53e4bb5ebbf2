#pragma once

#include <optional>
#include <string>

#include "row_setting.h"

namespace diffusion_runtime {

// sample_from_hidden (diffusion_runtime/ops/_sample_from_hidden.py documents it) in two steps, between which a
// workspace keeps a few numbers of each chunk of 2048 tokens, and one of each tile of 128 where anything is drawn.
//   temperature, statistics_temperature, softcap, allowed  the same in every call
//   allowed    [rows, words of the vocabulary] int32, stride 1 along the words, or none; other tokens read as -inf
//   workspace  head_workspace(...) bytes, written by the calls of read_head_tile

// Bytes of workspace.
std::int64_t head_workspace(std::int64_t rows, std::int64_t vocab, const RowArgument<float>& temperature);

// Takes what is needed of the logits of some tokens: [rows, n], float32, float16 or bfloat16, contiguous, those of the
// tokens from `first`, a multiple of 2048. A tile that is not the vocabulary's last has a multiple of 2048 tokens.
void read_head_tile(const TensorView& logits, std::int64_t first, std::int64_t vocab,
                    const RowArgument<float>& temperature, const RowArgument<float>& statistics_temperature,
                    float softcap, const std::optional<TensorView>& allowed, const TensorView& workspace,
                    const std::string& instruction_set);

// The results, once every tile has been read. The tile of 128 tokens that a draw falls into is computed once more.
//   hidden          [rows, dim], contiguous
//   weight          [vocab, dim] in the dtype of hidden, any strides
//   bias            [vocab] in the dtype of hidden, contiguous, or none
//   position        [rows] int64, or none where nothing is drawn
//   ids, statistics as in sample_tokens_cpu
void sample_head(const TensorView& hidden, const TensorView& weight, const std::optional<TensorView>& bias,
                 const RowArgument<float>& temperature, const RowArgument<std::int64_t>& seed,
                 const std::optional<TensorView>& position, const RowArgument<std::int64_t>& step,
                 const RowArgument<float>& statistics_temperature, float softcap,
                 const std::optional<TensorView>& allowed, const TensorView& workspace, const TensorView& ids,
                 const TensorView& statistics, const std::string& instruction_set);

}  // namespace diffusion_runtime
