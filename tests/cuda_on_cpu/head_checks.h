// Runs sample_from_hidden, and holds its results to the reference.
#pragma once
#include "head_problem.h"

inline int draws = 0, draws_at_a_boundary = 0;

// Launches on poisoned outputs and a poisoned workspace; make_parts does what comes before head_finish.
template <class F>
std::vector<Output> run(ops::SampleFromHidden call, F make_parts) {
  Buffer<int64_t> ids(2 * call.rows);
  Buffer<float> statistics(5 * call.rows);
  Buffer<char> workspace(ops::sample_from_hidden_workspace(call.rows, call.vocab));
  call.ids = ids.data, call.statistics = statistics.data, call.workspace = workspace.data;
  make_parts(call);
  ops::head_finish(call, nullptr);
  std::vector<Output> outputs(call.rows);
  for (int64_t r = 0; r < call.rows; r++) {
    outputs[r].token = ids[r], outputs[r].argmax = ids[call.rows + r];
    for (int i = 0; i < 5; i++) outputs[r].statistics[i] = statistics[i * call.rows + r];
  }
  return outputs;
}

inline std::vector<Output> run_fused(const ops::SampleFromHidden& call) {
  return run(call, [](const ops::SampleFromHidden& op) { ops::head_parts(op, nullptr); });
}

// The parts from logits of type L, `size` tokens at a time, in rows `gap` elements apart and `offset` from alignment.
template <class L, class T>
std::vector<Output> run_from_logits(Problem<T>& problem, int size, int gap, int offset) {
  const Shape& s = problem.shape;
  return run(problem.call(), [&](const ops::SampleFromHidden& op) {
    for (int first = 0; first < s.vocab; first += size) {
      const int count = std::min(size, s.vocab - first), stride = count + gap;
      Buffer<L> logits(offset + s.rows * stride - gap);
      for (int r = 0; r < s.rows; r++) {
        L* const row = logits.data + offset + r * stride;
        for (int i = 0; i < count && problem.masked[r]; i++)
          row[i] = from_float<L>(problem.is_allowed(r, first + i) ? float(problem.logits[r][first + i]) : NAN);
        if (!problem.masked[r]) forbid(row, count);
      }
      ops::logit_parts(op, {logits.data + offset, type_of<L>::value, stride, first, count}, nullptr);
    }
  });
}

// 2e-5 nats, and the rounding of logits that are sums in float32.
inline bool is_close(float got, double expected) {
  return std::fabs(got - expected) <= 2e-5 + 1e-6 * std::fabs(expected);
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
  if (got.token == got.argmax)
    expect(std::fabs(std::exp(double(got.statistics[0])) - got.statistics[1]) < 1e-6, what,
           say("logprob of the argmax", got.statistics[0], std::log(got.statistics[1])));
}

template <class T>
void check_all(Problem<T>& problem, const std::vector<Output>& got, const char* what, const std::string& schedule) {
  for (int r = 0; r < problem.shape.rows; r++)
    check_row(got[r], problem.expected[r], problem.settings[r], problem.masked[r], what,
              schedule + ", row " + std::to_string(r));
}

// How often the fused head copies 16 bytes and multiplies fragments: what is not there must cost nothing.
inline void check_work(const ops::SampleFromHidden& call, int count, const char* what) {
  const int block_rows = call.rows <= 64 ? 64 : 128, block_tokens = call.rows <= 64 ? 256 : 128;
  const uint64_t token_blocks = (call.vocab + block_tokens - 1) / block_tokens, steps = (call.dim + 63) / 64;
  const uint64_t row_blocks = (count + block_rows - 1) / block_rows, pairs = (count + 15) / 16;
  const uint64_t copies = (call.dim + 7) / 8 * (call.vocab * row_blocks + token_blocks * count);
  const uint64_t products = token_blocks * (block_tokens / 16) * steps * 4 * pairs * 2;
  const auto& counted = cuda_on_cpu::counters;
  expect(counted.matrix_load_conflicts == 0, what, [&] { return std::to_string(counted.matrix_load_conflicts); });
  expect(counted.async_copies == copies, what, [&] { return "copies " + std::to_string(counted.async_copies); });
  expect(counted.matrix_products == products, what, [&] { return std::to_string(counted.matrix_products); });
}

template <class T>
void check_fused(const char* what, const Shape& shape, int num_random) {
  Problem<T> problem(shape);
  int count = 0;
  for (int r = 0; r < shape.rows; r++) count += problem.masked[r];
  under_schedules(num_random, what, [&](const std::string& schedule) {
    expect(ops::head_parts_takes(problem.call()), what, [] { return "not taken"; });
    cuda_on_cpu::counters = {};
    check_all(problem, run_fused(problem.call()), what, schedule);
    check_work(problem.call(), count, what);
  });
}

template <class L, class T>
void check_from_logits(const char* what, const Shape& shape, int size, int gap, int offset, int num_random) {
  Problem<T> problem(shape);
  under_schedules(num_random, what, [&](const std::string& schedule) {
    check_all(problem, run_from_logits<L>(problem, size, gap, offset), what, schedule);
  });
}

// Each row alone must give the bits that it gave in the batch, on another block and in other company.
template <class T>
void check_invariance(const char* what, const Shape& shape) {
  Problem<T> problem(shape);
  under_schedules(1, what, [&](const std::string& schedule) {
    const std::vector<Output> batch = run_fused(problem.call());
    for (int r = 0; r < shape.rows; r++) {
      ops::SampleFromHidden c = problem.call();
      c.hidden = problem.hidden_row(r), c.rows = 1, c.masked = nullptr;
      c.temperature = {nullptr, problem.temperature[r]}, c.seed = {nullptr, problem.seed[r]};
      c.statistics_temperature = {&problem.statistics_temperature[r], 0}, c.step = {nullptr, problem.step[r]};
      c.position = &problem.position[r];
      if (c.allowed != nullptr) c.allowed += r * c.allowed_stride;
      if (!problem.masked[r]) continue;
      expect(run_fused(c)[0] == batch[r], what, [&] { return schedule + ", row " + std::to_string(r) + " differs"; });
    }
  });
}
