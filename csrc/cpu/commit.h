#pragma once

#include <optional>

#include "tensor_view.h"

namespace diffusion_runtime {

// The op of diffusion_runtime/ops/_commit.py, by the fields of _commit_reference.py's Problem, which documents them;
// commit_mask and after as its results() makes them.
void commit_step_cpu(const TensorView& masked, const std::optional<TensorView>& score, int rule,
                     const std::optional<TensorView>& bound, double bound_value,
                     const std::optional<TensorView>& tokens, const std::optional<TensorView>& candidates,
                     std::int64_t vocab, const std::optional<TensorView>& seed, std::int64_t seed_value,
                     const std::optional<TensorView>& position, const std::optional<TensorView>& step,
                     std::int64_t step_value, const TensorView& commit_mask, const TensorView& after);

}  // namespace diffusion_runtime
