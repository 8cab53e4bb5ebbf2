// The second half of a call of sample_tokens whose draws are limited.
#pragma once

#include "sample_tokens.cuh"

namespace diffusion_runtime {

// Enqueues one kernel. Stores the candidate of each row and its logprob; with `restricted`, all of the row's results.
// The workspace holds what the kernel of sample_tokens left there.
void restricted_draw(const SampleTokens& arguments, CUstream_st* stream);

}  // namespace diffusion_runtime
