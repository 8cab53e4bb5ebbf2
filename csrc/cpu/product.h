#pragma once

#include <optional>
#include <string>

#include "tensor_view.h"

namespace diffusion_runtime {

// out = rows @ weight^T + bias, all float32 and contiguous on the CPU: rows [n, depth], weight [columns, depth],
// bias [columns] or none, out [n, columns].
void product_cpu(const TensorView& rows, const TensorView& weight, const std::optional<TensorView>& bias,
                 const TensorView& out, const std::string& instruction_set);

}  // namespace diffusion_runtime
