// commit_step with 32 threads, so that few positions are several tiles, against the rules written apart from the
// kernel.
#define COMMIT_THREADS 32
#include "../../csrc/cuda/commit.cu"
#include "test_support.h"
// after the two above
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "sample_tokens_reference.h"

namespace ops = diffusion_runtime;
using ops::CommitRule;

struct Case {
  int batch, length;
  CommitRule rule;
  double bound;
  bool per_row = false, noise = false, writes = true, scores = true, flat = false;
};

// The n best positions, n the largest number for which the rule holds.
std::vector<bool> expected_row(const Case& c, double bound, const float* score, const bool* masked) {
  std::vector<int> order;
  for (int i = 0; i < c.length; i++)
    if (masked[i]) order.push_back(i);
  const double sign = c.rule == CommitRule::EntropyBound ? 1 : -1;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const bool a_is_nan = score[a] != score[a], b_is_nan = score[b] != score[b];
    if (a_is_nan || b_is_nan) return !a_is_nan && b_is_nan;
    return sign * score[a] < sign * score[b];
  });
  int last = c.rule == CommitRule::Quota ? 0 : 1;
  double sum = 0;
  for (int n = 1; n <= int(order.size()); n++) {
    const double x = score[order[n - 1]];
    const bool good = c.rule == CommitRule::Quota       ? n <= bound
                      : c.rule == CommitRule::Threshold ? x >= bound
                      : c.rule == CommitRule::Factor    ? (n + 1) * (1 - x) < bound
                                                        : sum <= bound;
    if (good) last = n;
    sum += x;
  }
  std::vector<bool> chosen(c.length);
  for (int n = 0; n < std::min(last, int(order.size())); n++) chosen[order[n]] = true;
  return chosen;
}

void check_case(const char* what, const Case& c, int num_random) {
  const int count = c.batch * c.length, gap = 3;
  Buffer<bool> masked(c.batch * (c.length + gap));
  Buffer<float> score(c.batch * (c.length + gap)), bounds(c.batch);
  Buffer<int64_t> tokens(count), candidates(count), seed(c.batch), position(c.length), quotas(c.batch);
  std::mt19937 random(c.length * 7 + int(c.rule));
  for (int r = 0; r < c.batch; r++) {
    seed[r] = int64_t(random()) << 32 | random();
    bounds[r] = float(c.bound * (1 + r)), quotas[r] = int64_t(c.bound) + r;
    for (int i = 0; i < c.length; i++) {
      masked[r * (c.length + gap) + i] = random() % 4 != 0;
      // eighths, with ties, so that sums are exact and bounds are met exactly
      const bool nan = random() % 29 == 0;
      score[r * (c.length + gap) + i] = c.flat ? 2 : nan ? NAN : float(random() % 9) / 8;
      tokens[r * c.length + i] = 1000 + i, candidates[r * c.length + i] = 5000 + r * c.length + i;
    }
  }
  for (int i = 0; i < c.length; i++) position[i] = 4000000000 + i;
  constexpr int64_t kVocab = 262144;

  under_schedules(num_random, what, [&](const std::string& schedule) {
    Buffer<bool> commit_mask(count);
    Buffer<int64_t> after(count);
    ops::CommitStep s{};
    s.batch = c.batch, s.length = c.length, s.rule = c.rule;
    s.masked = {masked.data, c.length + gap, 1, false};
    if (c.scores) s.score = {score.data, c.length + gap, 1, 0}, s.commit_mask = commit_mask.data;
    s.bound_value = c.bound;
    if (c.per_row && c.rule == CommitRule::Quota) s.quotas = quotas.data, s.bound_stride = 1;
    if (c.per_row && c.rule != CommitRule::Quota) s.bounds = bounds.data, s.bound_stride = 1;
    if (c.writes) {
      s.tokens = {tokens.data, c.length, 1, 0}, s.after = after.data;
      if (c.scores) s.candidates = {candidates.data, c.length, 1, 0};
      if (c.noise) {
        s.vocab = kVocab, s.seed = {seed.data, 1, 0, 0}, s.step = {nullptr, 0, 0, 9};
        if (c.per_row) s.position = {position.data, 0, 1, 0};
      }
    }
    ops::commit_step(s, nullptr);
    for (int r = 0; r < c.batch; r++) {
      const double bound = !c.per_row ? c.bound : c.rule == CommitRule::Quota ? double(quotas[r]) : bounds[r];
      const bool* is_masked = masked.data + r * (c.length + gap);
      std::vector<bool> chosen(c.length);
      if (c.scores) chosen = expected_row(c, bound, score.data + r * (c.length + gap), is_masked);
      for (int i = 0; i < c.length; i++) {
        const int at = r * c.length + i;
        const auto where = [&] { return schedule + ", row " + std::to_string(r) + ", place " + std::to_string(i); };
        if (c.scores) expect(commit_mask[at] == chosen[i], what, where);
        if (!c.writes) continue;
        int64_t token = chosen[i] ? candidates[at] : tokens[at];
        if (c.noise && is_masked[i] && !chosen[i]) {
          const uint32_t counter[4] = {uint32_t(c.per_row ? position[i] : i), 9, 2, 0};
          const Philox words(counter, uint32_t(seed[r]), uint32_t(uint64_t(seed[r]) >> 32));
          token = int64_t(std::floor(words.uniform(0) * kVocab));
        }
        expect(after[at] == token, what, where);
      }
    }
  });
}

// One row of given scores, all masked: which positions are committed.
void check_scores(const char* what, CommitRule rule, double bound, const std::vector<float>& scores,
                  const std::vector<bool>& wanted) {
  const int length = int(scores.size());
  Buffer<float> score(length);
  Buffer<bool> masked(length);
  for (int i = 0; i < length; i++) score[i] = scores[i], masked[i] = true;
  under_schedules(1, what, [&](const std::string& schedule) {
    Buffer<bool> commit_mask(length);
    ops::CommitStep s{};
    s.batch = 1, s.length = length, s.rule = rule, s.bound_value = bound;
    s.masked = {masked.data, length, 1, false}, s.score = {score.data, length, 1, 0};
    s.commit_mask = commit_mask.data;
    ops::commit_step(s, nullptr);
    for (int i = 0; i < length; i++)
      expect(commit_mask[i] == wanted[i], what, [&] { return schedule + ", place " + std::to_string(i); });
  });
}

// What is lost where a sum, a difference or an order is taken in another way.
void test_rounding() {
  check_scores("entropies are summed in float64", CommitRule::EntropyBound, 3, {0x1p-24f, 3, 4}, {true, true, false});
  // (1 + 1) * (1 - c) in float64 is just below 2, in float32 it is 2
  check_scores("a factor is taken in float64", CommitRule::Factor, 3, {0x1p-26f, 0x1p-26f}, {true, true});
  check_scores("-0 ties with 0", CommitRule::Quota, 3, {0, -0.0f, 0, -0.0f, 0}, {true, true, true, false, false});
  check_scores("-0 ties with 0, entropies", CommitRule::EntropyBound, -1, {0, -0.0f}, {true, false});
}

// Rows more than 2^31 elements apart, in memory that is reserved but never touched in between; a step per position.
void test_far_apart() {
  const char* what = "rows far apart, a step for each position";
  constexpr int kBatch = 2, kLength = 40;
  const int64_t stride = (int64_t{1} << 32) + 5;
  const size_t bytes = (stride + kLength) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return void(std::printf("%s: no room for 17 GB of addresses\n", what));
  float* const score = static_cast<float*>(memory);
  Buffer<bool> masked(kBatch * kLength);
  Buffer<int64_t> tokens(kBatch * kLength), step(kBatch * kLength);
  for (int i = 0; i < kBatch * kLength; i++) {
    masked[i] = true, tokens[i] = -5, step[i] = 3 * i;
    score[i / kLength * stride + i % kLength] = i < kLength ? float(i) : float(-i);
  }
  under_schedules(1, what, [&](const std::string& schedule) {
    Buffer<bool> commit_mask(kBatch * kLength);
    Buffer<int64_t> after(kBatch * kLength);
    ops::CommitStep s{};
    s.batch = kBatch, s.length = kLength, s.rule = CommitRule::Quota, s.bound_value = 4, s.vocab = 1000;
    s.masked = {masked.data, kLength, 1, false}, s.score = {score, stride, 1, 0};
    s.tokens = {tokens.data, kLength, 1, 0}, s.candidates = {tokens.data, kLength, 1, 0};
    s.step = {step.data, kLength, 1, 0}, s.seed = {nullptr, 0, 0, 7};
    s.commit_mask = commit_mask.data, s.after = after.data;
    ops::commit_step(s, nullptr);
    for (int i = 0; i < kBatch * kLength; i++) {
      const bool committed = i < kLength ? i >= kLength - 4 : i - kLength < 4;
      const auto where = [&] { return schedule + ", " + std::to_string(i); };
      const Philox words({uint32_t(i % kLength), uint32_t(step[i]), 2, 0}, 7, 0);
      expect(commit_mask[i] == committed, what, where);
      expect(after[i] == (committed ? -5 : int64_t(words.uniform(0) * 1000)), what, where);
    }
  });
  munmap(memory, bytes);
}

int main() {
  test_rounding();
#ifndef QUICK
  test_far_apart();
#endif
  const CommitRule rules[] = {CommitRule::Quota, CommitRule::Threshold, CommitRule::Factor, CommitRule::EntropyBound};
  const double bounds[] = {5, 0.75, 4, 1.5};
  const char* names[] = {"quota", "threshold", "factor", "entropy bound"};
  for (int i = 0; i < 4; i++) {
    for (int length : {1, 31, 33, 70}) {
#ifdef QUICK
      if (length != 33) continue;
#endif
      check_case((std::string(names[i]) + " [3, " + std::to_string(length) + "]").c_str(),
                 {3, length, rules[i], bounds[i], length == 70, length == 33}, 2);
    }
  }
  check_case("no quota [2, 40]", {2, 40, CommitRule::Quota, 0}, 1);
  check_case("a bound of nothing [2, 40]", {2, 40, CommitRule::EntropyBound, -1}, 1);
  check_case("the mask alone [2, 40]", {2, 40, CommitRule::Threshold, 0.5, false, false, false}, 1);
  Case flat{2, 40, CommitRule::Factor, -5.5};  // of scores above 1, which holds from a number on
  flat.flat = true;
  check_case("a factor of no probabilities [2, 40]", flat, 2);
  check_case("noise alone [2, 40]", {2, 40, CommitRule::Quota, 0, true, true, true, false}, 1);
  ops::CommitStep nothing{};
  ops::commit_step(nothing, nullptr);  // no rows: no launch
  return finish("commit");
}
