// ops.attention on Hopper: tiles by the copy engine, products by warpgroups.
#pragma once

#include <stddef.h>

#include "attention_arguments.h"

struct CUstream_st;

namespace diffusion_runtime {

// Whether this kernel takes the call. It asks for 16-bit inputs, head_dim = value_dim in {64, 128, 256}, no dense mask,
// a GPU of compute capability 9.0, and addresses and strides that are multiples of 16 bytes: nothing that depends on
// the number of sequences or on their lengths, so that a query's bits do not depend on what else is in the call.
bool hopper_takes(const AttentionArguments& arguments);

// For a call that is taken, on the current device. 0: it needs none.
size_t attention_hopper_workspace(const AttentionArguments& arguments);

// Enqueues one kernel, for a call that is taken; throws std::runtime_error if it cannot be launched. The workspace has
// attention_hopper_workspace() bytes, 16-byte aligned, zeroed before its first launch; a launch leaves it such that the
// next one, of any call that needs no more, can use it as it is.
void launch_attention_hopper(const AttentionArguments& arguments, void* workspace, CUstream_st* stream);

}  // namespace diffusion_runtime
