#include "commit.h"

#include <algorithm>
#include <vector>

#include "grid_setting.h"

namespace diffusion_runtime {
namespace {

struct Position {
  std::int64_t place;
  float score;
};

// Moves the positions that are committed to the front of `order` and returns how many they are.
std::size_t choose(const CommitStep& s, std::int64_t row, std::vector<Position>& order) {
  const auto before = [&](const Position& a, const Position& b) {
    return comes_before(s.rule, a.score, a.place, b.score, b.place);
  };
  const double bound = s.bound(row);
  const auto begin = order.begin(), end = order.end();
  if (order.empty()) return 0;
  if (s.rule == CommitRule::Quota) {  // which ones, not in what order
    const auto count = static_cast<std::size_t>(std::min(bound, static_cast<double>(order.size())));
    if (count < order.size()) std::nth_element(begin, begin + static_cast<std::ptrdiff_t>(count), end, before);
    return count;
  }
  if (s.rule == CommitRule::Threshold) {
    const auto rest =
        std::partition(begin, end, [&](const Position& p) { return commit_holds(s.rule, bound, 0, p.score, 0); });
    if (rest == begin) std::iter_swap(begin, std::min_element(begin, end, before));
    return std::max<std::size_t>(1, static_cast<std::size_t>(rest - begin));
  }
  std::sort(begin, end, before);
  std::int64_t last = 1, number = 0;
  double sum = 0;
  for (const Position& position : order) {
    if (commit_holds(s.rule, bound, ++number, position.score, sum)) last = number;
    sum += position.score;
  }
  return static_cast<std::size_t>(last);
}

void commit_row(const CommitStep& s, std::int64_t row, std::vector<Position>& order, std::vector<char>& committed) {
  order.clear();
  for (std::int64_t i = 0; i < s.length; ++i) {
    committed[static_cast<std::size_t>(i)] = 0;
    if (s.score.values != nullptr && s.masked.at(row, i)) order.push_back({i, s.score.at(row, i)});
  }
  const std::size_t count = choose(s, row, order);
  for (std::size_t i = 0; i < count; ++i) committed[static_cast<std::size_t>(order[i].place)] = 1;
  for (std::int64_t i = 0; i < s.length; ++i) {
    const bool here = committed[static_cast<std::size_t>(i)] != 0;
    if (s.commit_mask != nullptr) s.commit_mask[row * s.length + i] = here;
    if (s.after != nullptr) s.after[row * s.length + i] = s.token_after(row, i, s.masked.at(row, i), here);
  }
}

}  // namespace

void commit_step_cpu(const TensorView& masked, const std::optional<TensorView>& score, int rule,
                     const std::optional<TensorView>& bound, double bound_value,
                     const std::optional<TensorView>& tokens, const std::optional<TensorView>& candidates,
                     std::int64_t vocab, const std::optional<TensorView>& seed, std::int64_t seed_value,
                     const std::optional<TensorView>& position, const std::optional<TensorView>& step,
                     std::int64_t step_value, const TensorView& commit_mask, const TensorView& after) {
  check(masked.is_cpu(), "commit_step: masked must be on the CPU");
  const CommitStep s = commit_step_of(masked, score, rule, bound, bound_value, tokens, candidates, vocab, seed,
                                      seed_value, position, step, step_value, commit_mask, after);
  constexpr std::int64_t kWorthThreads = 1 << 12;  // positions; below, starting threads costs more than the work
#pragma omp parallel if (s.batch > 1 && s.batch * s.length > kWorthThreads)
  {
    std::vector<Position> order;
    std::vector<char> committed(static_cast<std::size_t>(s.length));
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < s.batch; ++row) commit_row(s, row, order, committed);
  }
}

}  // namespace diffusion_runtime
