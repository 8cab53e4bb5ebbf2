// The mathematics of sample_tokens that does not depend on how a row is cut up: shared by the CPU and the CUDA kernel,
// so that the tests of the first are tests of the second.
//
// A row of logits x is cut into parts. With y = softcap(x) and z = (y - largest y of the part) * scale, where scale =
// log2(e) / temperature, a part is known by sums of 2^z and z 2^z. Parts are put together in double precision, in the
// order of their tokens. A logit of -inf stays -inf under the softcap: such a token cannot be drawn.
#pragma once

#include <math.h>

#include "philox.h"

namespace diffusion_runtime {

constexpr int kTile = 128;  // tokens: a draw picks a tile by its mass, then a token inside it
constexpr float kLog2e = 1.442695041f;
constexpr double kLn2 = 0.69314718055994531;

// How one row is to be read.
struct RowScales {
  float statistics;  // log2(e) / statistics_temperature
  float draw;        // log2(e) / temperature; 0: greedy, nothing is drawn
  float softcap;     // 0: none
};

// What is known of some tokens of a row.
struct RowPart {
  float max, second;   // the two largest logits x; equal at a tie
  float top;           // softcap(max), by the function that the sums use; 0 if max is -inf
  float mass, moment;  // sums of 2^z and of z 2^z for the statistics; NaN if a logit is
  float draw_mass;     // sum of 2^z at the temperature of the draw
};

struct RowTotals {
  double mass, moment, draw_mass;
};

struct RowResult {
  float logprob, confidence, margin, entropy, logsumexp;
};

// log2(e) / temperature, finite also where the division overflows: a tiny temperature is nearly greedy, not NaN.
HOST_DEVICE float scale_of_temperature(float temperature) { return fminf(kLog2e / temperature, 3.0e38f); }

// A row has a distribution if its largest logit is finite and no logit is NaN.
HOST_DEVICE bool has_distribution(float max, double mass) { return max - max == 0 && mass == mass; }

// The sums of a part as if they had been taken relative to `top`, that of the row.
HOST_DEVICE RowTotals rescaled(const RowPart& part, float top, const RowScales& scales) {
  if (part.max == -INFINITY) return {part.mass, 0, 0};  // no token; the mass is 0, or NaN
  const double below = static_cast<double>(part.top) - top, shift = below * scales.statistics, weight = exp2(shift);
  return {weight * part.mass, weight * (part.moment + part.mass * shift),
          scales.draw > 0 ? exp2(below * scales.draw) * part.draw_mass : 0};
}

// top, second, candidate: y of the best token, of the second best and of the one that was chosen.
HOST_DEVICE RowResult row_result(float top, float second, float candidate, const RowTotals& totals,
                                 const RowScales& scales) {
  const double to_nats = scales.statistics * kLn2, log_mass = log(totals.mass), confidence = 1 / totals.mass;
  const double entropy = log_mass - totals.moment / totals.mass * kLn2;
  return {static_cast<float>((static_cast<double>(candidate) - top) * to_nats - log_mass),
          static_cast<float>(confidence),
          static_cast<float>(-confidence * expm1((static_cast<double>(second) - top) * to_nats)),
          static_cast<float>(entropy > 0 ? entropy : 0), static_cast<float>(top * to_nats + log_mass)};
}

// Inverse CDF: the first i whose cumulative mass exceeds `target`; `target` becomes what is left of it before i. If
// rounding leaves none, the last i that has any mass, with a `target` that picks the last inside it as well.
template <class Mass>
HOST_DEVICE int pick_by_mass(int count, double& target, const Mass& mass) {
  int last = 0;
  for (int i = 0; i < count; ++i) {
    const double m = mass(i);
    if (m > target) return i;
    if (m > 0) last = i;
    target -= m;
  }
  target = INFINITY;
  return last;
}

}  // namespace diffusion_runtime
