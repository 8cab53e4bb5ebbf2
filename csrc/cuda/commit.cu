// One block for each row of the canvas. Nothing is sorted: a position's number in the order of the scores is how many
// come before it, counted, as is the sum of their scores, over tiles of positions in shared memory. For a canvas of a
// few hundred positions that is less than a launch takes.
#include "commit.cuh"
#include "gpu_ops.h"

namespace diffusion_runtime {
namespace {

#ifndef COMMIT_THREADS
#define COMMIT_THREADS 256
#endif
constexpr int kThreads = COMMIT_THREADS;

struct Shared {
  float score[kThreads];
  bool masked[kThreads];
  int last;
};

// Where a position stands among the masked ones of its row.
struct Standing {
  int before;
  double sum_before;
};

// Called by the whole block; `score` counts only if `counts`.
__device__ __forceinline__ Standing standing(const CommitStep& s, int64_t row, int place, bool counts, float score,
                                             Shared& shared) {
  Standing found = {0, 0};
  for (int first = 0; first < s.length; first += kThreads) {
    const int mine = first + threadIdx.x;
    __syncthreads();  // the tile before has been read
    if (mine < s.length) {
      shared.masked[threadIdx.x] = s.masked.at(row, mine);
      shared.score[threadIdx.x] = s.score.at(row, mine);
    }
    __syncthreads();
    const int count = min(kThreads, int(s.length) - first);
    for (int i = 0; counts && i < count; ++i) {
      if (!shared.masked[i] || !comes_before(s.rule, shared.score[i], first + i, score, place)) continue;
      ++found.before;
      found.sum_before += shared.score[i];
    }
  }
  return found;
}

__global__ void __launch_bounds__(kThreads) commit_step_kernel(const __grid_constant__ CommitStep s) {
  SHARED(Shared, shared);
  const int64_t row = blockIdx.x;
  const double bound = s.bound(row);
  if (threadIdx.x == 0) shared.last = s.rule == CommitRule::Quota ? 0 : 1;  // seen after the barriers of standing()
  if (s.score.values != nullptr) {
    for (int first = 0; first < s.length; first += kThreads) {
      const int place = first + threadIdx.x;
      const bool counts = place < s.length && s.masked.at(row, place);
      const float score = counts ? s.score.at(row, place) : 0;
      const Standing found = standing(s, row, place, counts, score, shared);
      if (counts && commit_holds(s.rule, bound, found.before + 1, score, found.sum_before))
        atomicMax(&shared.last, found.before + 1);
    }
  }
  __syncthreads();
  const int last = shared.last;
  for (int first = 0; first < s.length; first += kThreads) {
    const int place = first + threadIdx.x;
    const bool masked = place < s.length && s.masked.at(row, place);
    bool committed = false;
    if (s.score.values != nullptr) {
      const float score = masked ? s.score.at(row, place) : 0;
      const Standing found = standing(s, row, place, masked, score, shared);  // by every thread: it has barriers
      committed = masked && found.before < last;
    }
    if (place >= s.length) continue;
    if (s.commit_mask != nullptr) s.commit_mask[row * s.length + place] = committed;
    if (s.after != nullptr) s.after[row * s.length + place] = s.token_after(row, place, masked, committed);
  }
}

}  // namespace

void commit_step(const CommitStep& arguments, cudaStream_t stream) {
  if (arguments.batch == 0 || arguments.length == 0) return;
  launch(commit_step_kernel, dim3(unsigned(arguments.batch)), dim3(kThreads), sizeof(Shared), stream, arguments);
}

}  // namespace diffusion_runtime
