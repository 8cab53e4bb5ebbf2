// The dtypes that logits may have, for kernels: without a framework, or pybind11, in sight.
#pragma once

namespace diffusion_runtime {

enum class LogitType { Float32, Float16, BFloat16 };

}  // namespace diffusion_runtime
