// A call of sample_tokens: its rows, one of each kind in turn, its settings, and what must come out.
#pragma once
#include <random>

#include "restricted_draw.cu"
#include "sample_tokens.cu"
#include "sample_tokens_reference.h"
#include "test_support.h"

namespace ops = diffusion_runtime;

struct Shape {
  int outer, inner, vocab;
  int gap = 0;     // elements between rows, NaN
  int offset = 0;  // elements before the first row
  float softcap = 0;
  bool masked = false;     // every fifth row is not
  bool per_row = true;     // settings as arrays; otherwise one value each, and the default position
  bool large = false;      // logits around 1e4, where a product with the scale would lose their differences
  bool flat_only = false;  // no other kind of row
  int rows() const { return outer * inner; }
};

template <class T>
struct type_of;
template <>
struct type_of<float> {
  static constexpr ops::LogitType value = ops::LogitType::Float32;
};
template <>
struct type_of<Float16> {
  static constexpr ops::LogitType value = ops::LogitType::Float16;
};
template <>
struct type_of<BFloat16> {
  static constexpr ops::LogitType value = ops::LogitType::BFloat16;
};

constexpr int kKinds = 15;

// One row of the given kind.
inline std::vector<float> make_row(int kind, int vocab, std::mt19937& random) {
  const float deviation = kind % 3 == 0 ? 0.5f : 3.0f;
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> x(vocab);
  for (float& value : x) value = normal(random);
  const auto set = [&](int first, int last, float value) {
    for (int i = std::max(first, 0); i < std::min(last, vocab); i++) x[i] = value;
  };
  const int chunk = ops::kChunk, near = std::min(vocab, chunk);
  switch (kind) {
    case 1:  // the largest three times: in one vector, in two threads, in two chunks
      for (int i : {vocab / 3, vocab / 3 + 1, vocab / 2, vocab - 1}) x[i] = 12;
      break;
    case 2:  // in two warps, the later token in the warp that comes first
      for (int i : {near / 4 + 5, near - near / 4}) x[std::min(i, vocab - 1)] = 12;
      break;
    case 3:  // the largest at the very end, the second in the same thread's reach
      x[vocab - 1] = 9, x[std::max(0, vocab - 2)] = 8.5f;
      break;
    case 4:  // no first tokens, no tile, no chunk
      set(0, 140, -INFINITY), set(3 * ops::kTile, 4 * ops::kTile, -INFINITY), set(chunk, 2 * chunk, -INFINITY);
      x[vocab / 2] = 1;
      break;
    case 5:  // one token
      set(0, vocab, -INFINITY), x[vocab * 2 / 3] = -3;
      break;
    case 7: set(0, vocab, -INFINITY); break;
    case 8: x[vocab - 1] = NAN; break;
    case 9:  // a tie of the two largest in one thread
      x[vocab / 5] = 7, x[std::min(vocab - 1, vocab / 5 + 2)] = 7;
      break;
    case 10: x[vocab / 2] = INFINITY; break;
    case 11:  // a NaN in a chunk of nothing else
      set(0, vocab, -INFINITY), x[0] = NAN, x[vocab / 2] = NAN, x[vocab - 1] = vocab > 2 ? 1 : NAN;
      break;
    case 12:  // 0 everywhere, of the other sign in every other tile
      for (int i = 0; i < vocab; i++) x[i] = i / ops::kTile % 2 ? -0.0f : 0.0f;
      break;
    case 13:  // few values, 0 with either sign
      for (float& value : x) value = std::copysign(std::floor(std::fabs(value)) / 2, value);
      break;
    case 14:  // values that differ in their last bits only
      for (float& value : x) value = 4 + value / 4194304;
      break;
  }
  return x;
}

struct Output {
  int64_t token, argmax;
  float statistics[5];  // logprob, confidence, margin, entropy, logsumexp
  bool operator==(const Output& other) const {
    return token == other.token && argmax == other.argmax && !std::memcmp(statistics, other.statistics, 20);
  }
};

// Launches on poisoned outputs and a poisoned workspace, of which only the tickets are zero.
inline std::vector<Output> run(ops::SampleTokens call, const char* what) {
  Buffer<int64_t> ids(2 * call.rows);
  Buffer<float> statistics(5 * call.rows);
  Buffer<char> workspace(ops::sample_tokens_workspace(call.rows, call.vocab, ops::is_limited(call)));
  const size_t tickets = ops::ticket_bytes(call.rows);
  std::memset(workspace.data, 0, tickets);
  call.ids = ids.data, call.statistics = statistics.data, call.workspace = workspace.data;
  ops::sample_tokens(call, nullptr);
  for (size_t i = 0; i < tickets; i++)
    expect(workspace[i] == 0, what, [] { return std::string("a ticket was not handed back"); });
  std::vector<Output> outputs(call.rows);
  for (int64_t r = 0; r < call.rows; r++) {
    outputs[r].token = ids[r], outputs[r].argmax = ids[call.rows + r];
    for (int i = 0; i < 5; i++) outputs[r].statistics[i] = statistics[i * call.rows + r];
  }
  return outputs;
}

template <class T>
struct Problem {
  Shape shape;
  int64_t stride;
  Buffer<T> logits;
  Buffer<bool> masked;
  Buffer<float> temperature, statistics_temperature;
  Buffer<int64_t> seed, position, step;
  std::vector<Setting> settings;
  std::vector<Expected> expected;

  explicit Problem(const Shape& s)
      : shape(s),
        stride(s.vocab + s.gap),
        logits(s.offset + s.rows() * stride - s.gap),
        masked(s.rows()),
        temperature(s.rows()),
        statistics_temperature(s.rows()),
        seed(s.rows()),
        position(s.rows()),
        step(s.rows()) {
    static const float temperatures[] = {1, 0, 0.5f, 1.5f, 0.8f}, statistics_temperatures[] = {1, 1, 0.5f, 1, 1.3f};
    std::mt19937 random(s.rows() * 31 + s.vocab);
    std::mt19937_64 random_64(s.vocab);
    for (int r = 0; r < s.rows(); r++) {
      const int like = s.per_row ? r % 5 : 3;
      temperature[r] = temperatures[like], statistics_temperature[r] = statistics_temperatures[like];
      seed[r] = s.per_row ? int64_t(random_64()) : 0x123456789ABCDEF;
      position[r] = s.per_row ? int64_t(uint32_t(random_64())) : r % s.inner;
      step[r] = s.per_row ? r * 7 : 3;
      masked[r] = !s.masked || r % 5 != 3;
      settings.push_back(
          {temperature[r], statistics_temperature[r], uint64_t(seed[r]), uint32_t(position[r]), uint32_t(step[r])});
      fill(r, random);
    }
  }

  T* row(int r) { return logits.data + shape.offset + r * stride; }

  void fill(int r, std::mt19937& random) {
    std::vector<float> x = make_row(shape.flat_only ? 0 : r % kKinds, shape.vocab, random);
    std::vector<double> exact(shape.vocab);
    for (int i = 0; i < shape.vocab; i++) {
      const T value = from_float<T>(shape.large ? x[i] + 1e4f : x[i]);
      exact[i] = to_float(value);
      if (masked[r]) row(r)[i] = value;
    }
    if (!masked[r]) forbid(row(r), shape.vocab);
    expected.push_back(expected_row(exact, settings[r], shape.softcap));
  }

  ops::SampleTokens call() {
    ops::SampleTokens c{};
    c.logits = logits.data + shape.offset, c.type = type_of<T>::value;
    c.inner_stride = stride, c.outer_stride = stride * shape.inner;
    c.rows = shape.rows(), c.inner = shape.inner, c.vocab = shape.vocab, c.softcap = shape.softcap;
    c.top_p.value = 1;
    c.masked = shape.masked ? masked.data : nullptr;
    c.temperature = {temperature.data, 0}, c.statistics_temperature = {statistics_temperature.data, 0};
    c.seed = {seed.data, 0}, c.step = {step.data, 0}, c.position = position.data;
    if (!shape.per_row) {
      c.temperature = {nullptr, temperature[0]}, c.statistics_temperature = {nullptr, statistics_temperature[0]};
      c.seed = {nullptr, seed[0]}, c.step = {nullptr, step[0]}, c.position = nullptr;
    }
    return c;
  }
};
