// Which tokens of a row a draw may take, in double: of the definition in diffusion_runtime/ops/_sample_tokens.py.
#pragma once
#include <algorithm>
#include <numeric>

#include "sample_tokens_reference.h"

struct Limit {
  std::vector<bool> allowed;  // [vocab]
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;
};

// logits without those that may not be drawn, which become -inf. The row has a distribution.
inline std::vector<double> kept_logits(const std::vector<double>& logits, const Limit& limit, double temperature,
                                       double softcap) {
  const double nothing = -INFINITY;
  std::vector<double> x = logits;
  std::vector<size_t> order;
  for (size_t i = 0; i < x.size(); i++) {
    if (!limit.allowed[i]) x[i] = nothing;
    if (x[i] != nothing) order.push_back(i);
  }
  if (temperature == 0 || order.empty()) return x;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
  const auto capped = [&](double v) { return softcap > 0 ? softcap * std::tanh(v / softcap) : v; };
  const auto weight = [&](size_t i) { return std::exp((capped(x[i]) - capped(x[order[0]])) / temperature); };
  const auto cut_behind = [&](size_t count) {  // and behind those that equal the last of them
    while (count < order.size() && x[order[count]] == x[order[count - 1]]) count++;
    order.resize(count);
  };
  if (limit.top_k > 0 && size_t(limit.top_k) < order.size()) cut_behind(size_t(limit.top_k));
  if (limit.top_p < 1) {
    double total = 0, mass = 0;
    for (size_t i : order) total += weight(i);
    size_t count = 0;
    while (count < order.size() && (count == 0 || mass < limit.top_p * total)) mass += weight(order[count++]);
    cut_behind(count);
  }
  std::vector<double> kept(x.size(), nothing);
  for (size_t i : order)
    if (weight(i) >= limit.min_p) kept[i] = x[i];
  return kept;
}

// What may come out of one row: where rounding can move a cut, one of several.
struct Outcome {
  Expected statistics, draw;
};

inline std::vector<Outcome> outcomes_of(const std::vector<double>& logits, const Limit& limit, const Setting& setting,
                                        double softcap, bool restricted) {
  std::vector<double> measured = logits;
  for (size_t i = 0; i < logits.size() && restricted; i++)
    if (!limit.allowed[i]) measured[i] = -INFINITY;
  const Expected all = expected_row(measured, setting, softcap);
  if (!all.valid) return {{all, all}};
  std::vector<Outcome> outcomes;
  std::vector<std::vector<double>> seen;
  for (double slack : {0.0, 3e-6, -3e-6}) {
    Limit moved = limit;
    if (limit.top_p > 0 && limit.top_p < 1) moved.top_p = limit.top_p + slack;
    moved.min_p = std::min(1.0, limit.min_p * (1 + slack));
    const std::vector<double> kept = kept_logits(measured, moved, setting.temperature, softcap);
    if (std::find(seen.begin(), seen.end(), kept) != seen.end()) continue;
    seen.push_back(kept);
    const Expected draw = expected_row(kept, setting, softcap);
    outcomes.push_back({restricted ? draw : all, draw});
  }
  return outcomes;
}
