// rms_norm and qk_norm_rope on a GPU, for whoever has pointers and a stream. diffusion_runtime/ops/_rms_norm.py and
// _qk_norm_rope.py say what they mean.
#pragma once

#include "norm_arguments.h"

struct CUstream_st;  // a cudaStream_t points at one: so this header needs nothing of CUDA

namespace diffusion_runtime {

// Each enqueues one kernel; std::runtime_error if it cannot be launched. All pointers are to memory of the device, rows
// below 2^31 and their sizes, too. Rows at positions outside of the tables are NaN, those for slots outside of the
// caches are not written.
void rms_norm(const RmsNorm& arguments, CUstream_st* stream);
void qk_norm_rope(const QKNormRope& arguments, CUstream_st* stream);

}  // namespace diffusion_runtime
