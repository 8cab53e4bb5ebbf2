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

void commit_row(const CommitStep& s, std::int64_t row, std::vector<Position>& order, std::vector<char>& committed) {
  order.clear();
  for (std::int64_t i = 0; i < s.length; ++i) {
    committed[static_cast<std::size_t>(i)] = 0;
    if (s.score.values != nullptr && s.masked.at(row, i)) order.push_back({i, s.score.at(row, i)});
  }
  std::sort(order.begin(), order.end(), [&](const Position& a, const Position& b) {
    return comes_before(s.rule, a.score, a.place, b.score, b.place);
  });
  const double bound = s.bound(row);
  std::int64_t last = s.rule == CommitRule::Quota ? 0 : 1, number = 0;
  double sum = 0;
  for (const Position& position : order) {
    if (commit_holds(s.rule, bound, ++number, position.score, sum)) last = std::max(last, number);
    sum += position.score;
  }
  last = std::min(last, number);
  for (std::int64_t i = 0; i < last; ++i)
    committed[static_cast<std::size_t>(order[static_cast<std::size_t>(i)].place)] = 1;
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
