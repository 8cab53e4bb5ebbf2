// Which keys a query of attention sees: VisibleKeys of ops/_attention_masks.py, for the CPU and the GPU.
#pragma once

#include "host_device.h"

namespace diffusion_runtime {

// A bound below 0 is no bound.
struct VisibleKeys {
  int left, right, block, prefix_window;
};

struct KeyRange {
  int low, high;  // positions, high not included; nothing where high <= low
};

// Of a query at `position` (which may be negative: padding) of a sequence whose prefix has `prefix` keys and which has
// `total` keys in all. `chosen` says whether the bounds around the position hold, or the prefix window: both do in a
// call that does not choose by sequence, because a mask sets only its own.
HOST_DEVICE KeyRange visible_keys(const VisibleKeys& rule, bool by_position, bool by_prefix, int position, int prefix,
                                  int total) {
  KeyRange range{0, total};
  if (by_position && rule.left >= 0 && position - rule.left > 0) range.low = position - rule.left;
  if (by_position && rule.right >= 0) {
    const int block = position >= 0 ? position / rule.block : -((rule.block - 1 - position) / rule.block);
    const long long high = (block + 1ll) * rule.block + rule.right;
    if (high < total) range.high = high < 0 ? 0 : int(high);
  }
  if (by_prefix && rule.prefix_window >= 0 && prefix - rule.prefix_window > range.low)
    range.low = prefix - rule.prefix_window;
  return range;
}

}  // namespace diffusion_runtime
