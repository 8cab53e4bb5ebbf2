// commit_step on a GPU, for whoever has pointers and a stream. diffusion_runtime/ops/_commit.py says what it means.
#pragma once

#include "commit_step.h"

struct CUstream_st;  // a cudaStream_t points at one: so this header needs nothing of CUDA

namespace diffusion_runtime {

// Enqueues one kernel; throws std::runtime_error if it cannot be launched. All pointers are to memory of the device.
void commit_step(const CommitStep& arguments, CUstream_st* stream);

}  // namespace diffusion_runtime
