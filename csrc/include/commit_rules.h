// When a step of the canvas commits, in one place for CPU and CUDA. diffusion_runtime/ops/_commit.py documents the
// rules.
#pragma once

#include "philox.h"

namespace diffusion_runtime {

enum class CommitRule : int { Quota, Threshold, Factor, EntropyBound };

// Whether a position of score `a` comes before one of score `b`: the better first, NaN last, then the lower place.
HOST_DEVICE bool comes_before(CommitRule rule, float a, int64_t place_a, float b, int64_t place_b) {
  if (a == b || (a != a && b != b)) return place_a < place_b;
  if (a != a || b != b) return b != b;
  return rule == CommitRule::EntropyBound ? a < b : a > b;
}

// Whether the rule holds of the position that is `number`-th in that order, from 1; `sum_before`: of the scores before.
HOST_DEVICE bool commit_holds(CommitRule rule, double bound, int64_t number, float score, double sum_before) {
  switch (rule) {
    case CommitRule::Quota: return static_cast<double>(number) <= bound;
    case CommitRule::Threshold: return score >= bound;
    case CommitRule::Factor: return static_cast<double>(number + 1) * (1 - static_cast<double>(score)) < bound;
    default: return sum_before <= bound;
  }
}

// A uniform token below `vocab`.
HOST_DEVICE int64_t noise_token(uint64_t seed, uint32_t position, uint32_t step, int64_t vocab) {
  return static_cast<int64_t>(philox_uniforms(seed, position, step, kDrawNoise).first * static_cast<double>(vocab));
}

}  // namespace diffusion_runtime
