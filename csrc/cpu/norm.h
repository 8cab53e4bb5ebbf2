#pragma once

#include <optional>
#include <string>

#include "norm_binding.h"

namespace diffusion_runtime {

// See norm_binding.h for the tensors.
void rms_norm_cpu(const TensorView& x, const std::optional<TensorView>& weight, float eps, float weight_offset,
                  bool round_before_weight, const TensorView& out, const std::string& instruction_set);

// Positions behind the tables and slots outside of the caches are std::invalid_argument; nothing is written then.
void qk_norm_rope_cpu(const TensorView& query, const TensorView& key, const std::optional<TensorView>& value,
                      const TensorView& cos, const TensorView& sin, const std::optional<TensorView>& query_weight,
                      const std::optional<TensorView>& key_weight, const std::optional<TensorView>& positions,
                      const std::optional<TensorView>& cache_key, const std::optional<TensorView>& cache_value,
                      const std::optional<TensorView>& cache_positions, bool normalized, float eps, float weight_offset,
                      bool round_before_weight, int style, const TensorView& query_out,
                      const std::optional<TensorView>& key_out, const std::string& instruction_set);

}  // namespace diffusion_runtime
