// A setting of every position of a [batch, length] canvas: one value, or a tensor of any strides.
#pragma once

#include <optional>

#include "commit_step.h"
#include "tensor_view.h"

namespace diffusion_runtime {

template <class T>
Grid<T> grid_setting(const char* name, const std::optional<TensorView>& tensor, T value, const TensorView& like) {
  if (!tensor) return {nullptr, 0, 0, value};
  check(tensor->ndim() == 2 && tensor->size(0) == like.size(0) && tensor->size(1) == like.size(1) &&
            tensor->device_type() == like.device_type() && tensor->device_id() == like.device_id(),
        name, " must be ", like.shape(), " beside masked, got ", tensor->shape());
  return {tensor->data<const T>(), tensor->stride(0), tensor->stride(1), value};
}

// As a kernel takes it: CommitStep of commit_step.h, from the fields of ops/_commit_reference.py's Problem.
inline CommitStep commit_step_of(const TensorView& masked, const std::optional<TensorView>& score, int rule,
                                 const std::optional<TensorView>& bound, double bound_value,
                                 const std::optional<TensorView>& tokens, const std::optional<TensorView>& candidates,
                                 std::int64_t vocab, const std::optional<TensorView>& seed, std::int64_t seed_value,
                                 const std::optional<TensorView>& position, const std::optional<TensorView>& step,
                                 std::int64_t step_value, const TensorView& commit_mask, const TensorView& after) {
  check(masked.ndim() == 2, "masked must be [batch, length], got ", masked.shape());
  check(rule >= 0 && rule <= static_cast<int>(CommitRule::EntropyBound), "there is no rule ", rule);
  const std::int64_t batch = masked.size(0);
  CommitStep s{};
  s.batch = batch, s.length = masked.size(1);
  s.masked = grid_setting<bool>("masked", masked, false, masked);
  s.score = grid_setting<float>("score", score, 0, masked);
  s.tokens = grid_setting<std::int64_t>("tokens", tokens, 0, masked);
  s.candidates = grid_setting<std::int64_t>("candidates", candidates, 0, masked);
  s.seed = grid_setting<std::int64_t>("seed", seed, seed_value, masked);
  s.position = grid_setting<std::int64_t>("position", position, 0, masked);
  s.step = grid_setting<std::int64_t>("step", step, step_value, masked);
  s.rule = static_cast<CommitRule>(rule);
  s.vocab = vocab;
  s.bound_value = s.rule == CommitRule::Quota ? bound_value : static_cast<float>(bound_value);
  if (bound) {
    check(bound->ndim() == 1 && bound->size(0) == batch && bound->device_type() == masked.device_type() &&
              bound->device_id() == masked.device_id(),
          "bound must be [", batch, "] beside masked, got ", bound->shape());
    s.bound_stride = bound->stride(0);
    if (s.rule == CommitRule::Quota)
      s.quotas = bound->data<const std::int64_t>();
    else
      s.bounds = bound->data<const float>();
  }
  const std::int64_t count = batch * s.length;
  if (score) {
    check(commit_mask.numel() == count && commit_mask.is_contiguous(), "commit_mask must be contiguous ",
          masked.shape(), ", got ", commit_mask.shape());
    s.commit_mask = commit_mask.data<bool>();
  }
  if (tokens) {
    check(after.numel() == count && after.is_contiguous(), "the tokens after must be contiguous ", masked.shape(),
          ", got ", after.shape());
    s.after = after.data<std::int64_t>();
  }
  return s;
}

}  // namespace diffusion_runtime
