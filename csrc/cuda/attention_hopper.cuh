// ops.attention on Hopper: tiles by the copy engine, products by warpgroups.
#pragma once

#include "attention_arguments.h"

struct CUstream_st;

namespace diffusion_runtime {

// Whether this kernel takes the call. It asks for 16-bit inputs, head_dim = value_dim in {64, 128, 256}, no dense mask,
// a GPU of compute capability 9.0, and addresses and strides that are multiples of 16 bytes: nothing that depends on
// the number of sequences or on their lengths, so that a query's bits do not depend on what else is in the call.
bool hopper_takes(const AttentionArguments& arguments);

// Enqueues one kernel, for a call that is taken; throws std::runtime_error if it cannot be launched.
void launch_attention_hopper(const AttentionArguments& arguments, CUstream_st* stream);

}  // namespace diffusion_runtime
