// ops.attention on every GPU since sm_80: asynchronous copies, products by warps.
#pragma once

#include <stddef.h>

#include "attention_arguments.h"

struct CUstream_st;

namespace diffusion_runtime {

// Whether this kernel takes the call: heads of up to 512, in float32 of up to 256.
bool attention_takes(const AttentionArguments& arguments);

// For a call that is taken, on the current device. 0: it needs none.
size_t attention_workspace(const AttentionArguments& arguments);

// Enqueues one kernel, for a call that is taken; throws std::runtime_error if it cannot be launched. The workspace is
// as that of launch_attention_hopper.
void launch_attention(const AttentionArguments& arguments, void* workspace, CUstream_st* stream);

}  // namespace diffusion_runtime
