// Holds the results of sample_tokens to the reference.
#pragma once
#include "sample_tokens_problem.h"

inline int draws = 0, draws_at_a_boundary = 0;

// 2e-5 nats, and two roundings of a large value.
inline bool is_close(float got, double expected) {
  return std::fabs(got - expected) <= 2e-5 + 2.5e-7 * std::fabs(expected);
}

inline void check_row(const Output& got, const Expected& e, const Setting& setting, bool masked, const char* what,
                      const std::string& where) {
  const auto say = [&](const char* name, double value, double wanted) {
    return [=] { return where + ": " + name + " " + compare(value, wanted); };
  };
  if (!masked || !e.valid) {
    expect(got.token == -1 && got.argmax == -1, what, say("token of no row", double(got.token), -1));
    for (float value : got.statistics)
      expect(masked ? value != value : value == 0, what, say("statistic of no row", value, masked ? NAN : 0));
    return;
  }
  expect(got.argmax == e.argmax, what, say("argmax", double(got.argmax), double(e.argmax)));
  if (setting.temperature == 0) {
    expect(got.token == e.argmax, what, say("greedy token", double(got.token), double(e.argmax)));
  } else {
    const Draw draw = judge_draw(e, setting, got.token);
    draws++, draws_at_a_boundary += draw == Draw::at_a_boundary;
    expect(draw != Draw::wrong, what, say("drawn token", double(got.token), NAN));
  }
  if (got.token < 0 || got.token >= int64_t(e.y.size())) return;
  const double wanted[] = {e.logprob(got.token), e.confidence, e.margin, e.entropy, e.logsumexp};
  static const char* const names[] = {"logprob", "confidence", "margin", "entropy", "logsumexp"};
  for (int i = 0; i < 5; i++)
    expect(is_close(got.statistics[i], wanted[i]), what, say(names[i], got.statistics[i], wanted[i]));
  if (e.margin == 0) expect(got.statistics[2] == 0, what, say("margin of a tie", got.statistics[2], 0));
}

template <class T>
void check(const char* what, const Shape& shape, int num_random) {
  Problem<T> problem(shape);
  under_schedules(num_random, what, [&](const std::string& schedule) {
    const std::vector<Output> got = run(problem.call(), what);
    for (int r = 0; r < shape.rows(); r++)
      check_row(got[r], problem.expected[r], problem.settings[r], problem.masked[r], what,
                schedule + ", row " + std::to_string(r));
  });
}

// Each row alone, at another address, must give the bits that it gave in the batch.
template <class T>
void check_invariance(const char* what, const Shape& shape) {
  Problem<T> problem(shape);
  under_schedules(2, what, [&](const std::string& schedule) {
    const std::vector<Output> batch = run(problem.call(), what);
    for (int r = 0; r < shape.rows(); r++) {
      Buffer<T> alone(shape.vocab + 3);
      const int offset = r % 4;
      std::memcpy(alone.data + offset, problem.row(r), shape.vocab * sizeof(T));
      ops::SampleTokens c = problem.call();
      c.logits = alone.data + offset, c.rows = 1, c.inner = 1;
      c.temperature = {nullptr, problem.temperature[r]}, c.seed = {nullptr, problem.seed[r]};
      c.statistics_temperature = {&problem.statistics_temperature[r], 0}, c.step = {nullptr, problem.step[r]};
      c.position = &problem.position[r];
      expect(run(c, what)[0] == batch[r], what, [&] { return schedule + ", row " + std::to_string(r) + " differs"; });
    }
  });
}
