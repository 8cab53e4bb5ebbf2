// Calls of sample_tokens whose draws are limited, held to the reference.
#pragma once
#include "restricted_draw_reference.h"
#include "sample_tokens_checks.h"

struct Limits {
  enum Allowed { all, same, per_row } allowed = all;
  bool top_k = false, top_p = false, min_p = false, restricted = false;
  int64_t one_top_k = 0;  // for every row, as a number
  float one_top_p = 1, one_min_p = 0;
};

// Which tokens row r allows: not the best of them, one, few, none; whole words and parts of words.
inline std::vector<bool> allowed_of_row(int r, const std::vector<double>& logits) {
  const int vocab = int(logits.size());
  const int best = int(std::max_element(logits.begin(), logits.end()) - logits.begin());
  std::vector<bool> allowed(vocab);
  for (int i = 0; i < vocab; i++) switch (r % 8) {
      case 0: allowed[i] = i != best; break;
      case 1: allowed[i] = i % 3 == 1; break;
      case 2: allowed[i] = i == vocab / 2; break;
      case 3: allowed[i] = i / 32 % 2 == 0; break;
      case 4: allowed[i] = i >= vocab - 1 - vocab / 4; break;
      case 5: allowed[i] = i < vocab / 2 + 3; break;
      case 6: allowed[i] = (i * 7919 + i / 64) % 11 < 4; break;
      case 7: allowed[i] = r % 16 == 7 || logits[i] - logits[i] == 0; break;  // hides NaN and inf
    }
  if (r % 17 == 16) allowed.assign(vocab, false);
  return allowed;
}

template <class T>
struct LimitedProblem : Problem<T> {
  Limits limits;
  int words, stride_of_words;
  Buffer<int32_t> allowed;
  Buffer<int64_t> top_k;
  Buffer<float> top_p, min_p;
  std::vector<std::vector<Outcome>> outcomes;
  using Problem<T>::shape;

  LimitedProblem(const Shape& s, const Limits& l)
      : Problem<T>(s),
        limits(l),
        words((s.vocab + 31) / 32),
        stride_of_words(l.allowed == Limits::per_row ? words + 1 : 0),
        allowed((s.rows() - 1) * stride_of_words + words),
        top_k(s.rows()),
        top_p(s.rows()),
        min_p(s.rows()) {
    // lengths that share no factor with the kinds of rows or their temperatures
    const int64_t ks[] = {1, 7, 0, 40, s.vocab, 2, s.vocab - 1, 3 * s.vocab / 4, 100, 1000, int64_t{1} << 31};
    const float ps[] = {0.9f, 1, 0.5f, 0, 0.999f, 1e-6f, 0.3f}, ms[] = {0.05f, 0, 0.2f, 1, 0.7f, 0.01f, 0, 1e-5f};
    for (int r = 0; r < s.rows(); r++) {
      top_k[r] = l.top_k ? ks[r % 11] : l.one_top_k;
      top_p[r] = l.top_p ? ps[r % 7] : l.one_top_p;
      min_p[r] = l.min_p ? ms[r % 8] : l.one_min_p;
      outcomes.push_back(this->masked[r] ? outcomes_of_row(r) : std::vector<Outcome>(1));
    }
  }

  std::vector<Outcome> outcomes_of_row(int r) {
    std::vector<double> logits(shape.vocab);
    for (int i = 0; i < shape.vocab; i++) logits[i] = to_float(this->row(r)[i]);
    Limit limit{std::vector<bool>(shape.vocab, true), top_k[r], top_p[r], min_p[r]};
    if (limits.allowed != Limits::all) {
      limit.allowed = allowed_of_row(limits.allowed == Limits::same ? 6 : r, logits);
      for (int i = 0; i < words * 32; i++) {  // the bits behind the vocabulary are set
        int32_t& word = allowed[r * stride_of_words + i / 32];
        if (i % 32 == 0) word = 0;
        if (i >= shape.vocab || limit.allowed[i]) word |= int32_t(1u << i % 32);
      }
    }
    return outcomes_of(logits, limit, this->settings[r], shape.softcap, limits.restricted);
  }

  ops::SampleTokens call() {
    ops::SampleTokens c = Problem<T>::call();
    c.allowed = limits.allowed == Limits::all ? nullptr : allowed.data, c.allowed_stride = stride_of_words;
    c.top_k = {limits.top_k ? top_k.data : nullptr, limits.one_top_k};
    c.top_p = {limits.top_p ? top_p.data : nullptr, limits.one_top_p};
    c.min_p = {limits.min_p ? min_p.data : nullptr, limits.one_min_p};
    c.restricted = limits.restricted;
    return c;
  }
};

inline int cuts_at_a_boundary = 0;

// What is wrong with a row, if this was to come out; nothing: "".
inline std::string complaint(const Output& got, const Outcome& o, const Setting& setting, bool masked) {
  const auto say = [](const char* name, double value, double wanted) {
    return std::string(name) + " " + compare(value, wanted);
  };
  if (!masked || !o.statistics.valid || !o.draw.valid) {
    if (got.token != -1 || got.argmax != -1) return say("token of no row", double(got.token), -1);
    for (float value : got.statistics)
      if (masked ? value == value : value != 0) return say("statistic of no row", value, masked ? NAN : 0);
    return "";
  }
  if (got.argmax != o.statistics.argmax) return say("argmax", double(got.argmax), double(o.statistics.argmax));
  if (setting.temperature == 0) {
    if (got.token != o.draw.argmax) return say("greedy token", double(got.token), double(o.draw.argmax));
  } else {
    const Draw draw = judge_draw(o.draw, setting, got.token);
    draws++, draws_at_a_boundary += draw == Draw::at_a_boundary;
    if (draw == Draw::wrong) return say("drawn token", double(got.token), NAN);
  }
  const Expected& e = o.statistics;
  const double wanted[] = {e.logprob(got.token), e.confidence, e.margin, e.entropy, e.logsumexp};
  static const char* const names[] = {"logprob", "confidence", "margin", "entropy", "logsumexp"};
  for (int i = 0; i < 5; i++)
    if (!is_close(got.statistics[i], wanted[i])) return say(names[i], got.statistics[i], wanted[i]);
  return "";
}

template <class T>
void check_limited(const std::string& name, const Shape& shape, const Limits& limits, int num_random) {
  const char* what = name.c_str();
  LimitedProblem<T> problem(shape, limits);
  under_schedules(num_random, what, [&](const std::string& schedule) {
    const std::vector<Output> got = run(problem.call(), what);
    for (int r = 0; r < shape.rows(); r++) {
      std::string first = "?";
      bool good = false;
      for (const Outcome& o : problem.outcomes[r]) {
        const std::string wrong = complaint(got[r], o, problem.settings[r], problem.masked[r]);
        if (first == "?") first = wrong;
        good = good || wrong.empty();
      }
      cuts_at_a_boundary += good && !first.empty();
      expect(good, what, [&] { return schedule + ", row " + std::to_string(r) + ": " + first; });
    }
  });
}

// Each row alone, at another address, must give the bits that it gave in the batch.
template <class T>
void check_limited_invariance(const char* what, const Shape& shape, const Limits& limits) {
  LimitedProblem<T> problem(shape, limits);
  under_schedules(1, what, [&](const std::string& schedule) {
    const std::vector<Output> batch = run(problem.call(), what);
    for (int r = 0; r < shape.rows(); r++) {
      Buffer<T> alone(shape.vocab + 3);
      std::memcpy(alone.data + r % 4, problem.row(r), shape.vocab * sizeof(T));
      ops::SampleTokens c = problem.call();
      c.logits = alone.data + r % 4, c.rows = 1, c.inner = 1;
      c.temperature = {nullptr, problem.temperature[r]}, c.seed = {nullptr, problem.seed[r]};
      c.statistics_temperature = {&problem.statistics_temperature[r], 0}, c.step = {nullptr, problem.step[r]};
      c.position = &problem.position[r];
      if (c.allowed != nullptr) c.allowed += r * c.allowed_stride;
      c.top_k.values = &problem.top_k[r], c.top_p.values = &problem.top_p[r], c.min_p.values = &problem.min_p[r];
      expect(run(c, what)[0] == batch[r], what, [&] { return schedule + ", row " + std::to_string(r) + " differs"; });
    }
  });
}
