#pragma once

#include <string>

#include "attention_binding.h"

namespace diffusion_runtime {

// attention (diffusion_runtime/ops/_attention.py documents it): the tensors and numbers of
// AttentionProblem.to_operator, which attention_arguments() checks, on the CPU.
//   out        [batch, heads, length, value_dim] in the dtype of query, stride 1 along the last dimension
//   logsumexp  [batch, heads, length] float32, contiguous
void attention_cpu(const TensorView& query, const TensorView& key, const TensorView& value,
                   const MaybeTensor& prefix_key, const MaybeTensor& prefix_value, const MaybeTensor& prefix_lengths,
                   const MaybeTensor& page_table, const MaybeTensor& mask, const MaybeTensor& key_starts,
                   const MaybeTensor& key_ends, const MaybeTensor& cu_seqlens, const MaybeTensor& cu_seqlens_k,
                   const MaybeTensor& chosen, int left, int right, int block, int prefix_window, int offset,
                   int max_length, double scale, double softcap, const TensorView& out, const TensorView& logsumexp,
                   const std::string& instruction_set);

}  // namespace diffusion_runtime
