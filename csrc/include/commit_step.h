// The arguments of commit_step for a kernel, on a CPU or a GPU: pointers, strides and values.
#pragma once

#include <stddef.h>

#include "commit_rules.h"

namespace diffusion_runtime {

// [batch, length] with strides in elements, or one value for every position where `values` is null.
template <class T>
struct Grid {
  const T* values;
  int64_t batch_stride, length_stride;
  T value;
  HOST_DEVICE_MEMBER T at(int64_t row, int64_t place) const {
    return values != nullptr ? values[row * batch_stride + place * length_stride] : value;
  }
};

struct CommitStep {
  int64_t batch, length;
  Grid<bool> masked;
  Grid<float> score;  // null: nothing is committed, and no commit_mask is written
  CommitRule rule;
  const int64_t* quotas;  // [batch], or null: `bound_value`
  const float* bounds;    // the same for the other rules
  int64_t bound_stride;
  double bound_value;
  Grid<int64_t> tokens;                // null: no tokens are written
  Grid<int64_t> candidates;            // null: the tokens stay
  int64_t vocab;                       // 0: positions that are not committed keep their token
  Grid<int64_t> seed, position, step;  // position null: the place along the length
  bool* commit_mask;                   // [batch, length]
  int64_t* after;                      // [batch, length]

  HOST_DEVICE_MEMBER double bound(int64_t row) const {
    if (quotas != nullptr) return static_cast<double>(quotas[row * bound_stride]);
    return bounds != nullptr ? static_cast<double>(bounds[row * bound_stride]) : bound_value;
  }
  // What a position holds after the step.
  HOST_DEVICE_MEMBER int64_t token_after(int64_t row, int64_t place, bool masked_here, bool committed) const {
    if (committed && candidates.values != nullptr) return candidates.at(row, place);
    if (vocab == 0 || !masked_here) return tokens.at(row, place);
    const int64_t where = position.values != nullptr ? position.at(row, place) : place;
    return noise_token(static_cast<uint64_t>(seed.at(row, place)), static_cast<uint32_t>(where),
                       static_cast<uint32_t>(step.at(row, place)), vocab);
  }
};

}  // namespace diffusion_runtime
