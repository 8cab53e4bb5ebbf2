// A call of sample_from_hidden: hidden states, weights, settings, and what must come out.
#pragma once
#include <random>

#include "head_finish.cu"
#include "head_parts.cu"
#include "logit_parts.cu"
#include "sample_tokens_reference.h"
#include "test_support.h"

namespace ops = diffusion_runtime;

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

enum class Chosen { all, some, none };            // by masked; all: no mask at all
enum class Allowed { all, one_for_all, by_row };  // one_for_all: row stride 0

struct Shape {
  int rows, vocab, dim;
  int gap = 0;     // elements between rows of hidden states and of weights, NaN
  int offset = 0;  // elements before the first
  Chosen chosen = Chosen::all;
  Allowed allowed = Allowed::all;
  bool bias = false;
  float softcap = 0;
  bool per_row = true;  // settings as arrays; otherwise one value each
  bool exact = false;   // logits are multiples of 1/4 below 16, which every type holds: with ties everywhere
  float spread = 2;     // standard deviation of the logits
};

struct Output {
  int64_t token, argmax;
  float statistics[5];  // logprob, confidence, margin, entropy, logsumexp
  bool operator==(const Output& other) const {
    return token == other.token && argmax == other.argmax && !std::memcmp(statistics, other.statistics, 20);
  }
};

template <class T>
struct Problem {
  Shape shape;
  int64_t stride, words;
  Buffer<T> hidden, weight, bias;
  Buffer<bool> masked;
  Buffer<float> temperature, statistics_temperature;
  Buffer<int64_t> seed, position, step;
  Buffer<int32_t> allowed;
  std::vector<Setting> settings;
  std::vector<std::vector<double>> logits;  // -inf where not allowed
  std::vector<Expected> expected;

  explicit Problem(const Shape& s)
      : shape(s),
        stride(s.dim + s.gap),
        words((s.vocab + 31) / 32),
        hidden(s.offset + s.rows * stride - s.gap),
        weight(s.offset + s.vocab * stride - s.gap),
        bias(s.vocab),
        masked(s.rows),
        temperature(s.rows),
        statistics_temperature(s.rows),
        seed(s.rows),
        position(s.rows),
        step(s.rows),
        allowed(s.allowed == Allowed::one_for_all ? words : words * s.rows) {
    static const float temperatures[] = {1, 0, 0.5f, 1.5f, 0.8f}, statistics_temperatures[] = {1, 1, 0.5f, 1, 1.3f};
    std::mt19937 random(s.rows * 31 + s.vocab + s.dim);
    std::mt19937_64 random_64(s.vocab);
    for (int r = 0; r < s.rows; r++) {
      const int like = s.per_row ? r % 5 : 3;
      temperature[r] = temperatures[like], statistics_temperature[r] = statistics_temperatures[like];
      seed[r] = s.per_row ? int64_t(random_64()) : 0x123456789ABCDEF;
      position[r] = int64_t(uint32_t(random_64()));
      step[r] = s.per_row ? r * 7 : 3;
      masked[r] = s.chosen == Chosen::all || (s.chosen == Chosen::some && r % 5 != 3 && r % 7 != 0);
      settings.push_back(
          {temperature[r], statistics_temperature[r], uint64_t(seed[r]), uint32_t(position[r]), uint32_t(step[r])});
    }
    fill(random);
    for (int r = 0; r < s.rows; r++) {
      logits.push_back(exact_logits(r));
      expected.push_back(expected_row(logits[r], settings[r], s.softcap));
    }
    for (int r = 0; r < s.rows; r++)
      if (!masked[r]) std::memset(hidden_row(r), 0xFF, s.dim * sizeof(T)), forbid(hidden_row(r), s.dim);
  }

  T* hidden_row(int r) { return hidden.data + shape.offset + r * stride; }
  T* weight_row(int t) { return weight.data + shape.offset + t * stride; }
  bool is_allowed(int r, int t) {
    if (shape.allowed == Allowed::all) return true;
    return allowed[(shape.allowed == Allowed::by_row ? r * words : 0) + t / 32] >> t % 32 & 1;
  }

  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal(0, 1);
    const auto few = [&] { return float(int(random() % 3) - 1) / 2; };
    for (int r = 0; r < shape.rows; r++)
      for (int k = 0; k < shape.dim; k++)
        hidden_row(r)[k] = from_float<T>(shape.exact ? few() : normal(random) * shape.spread / std::sqrt(shape.dim));
    for (int t = 0; t < shape.vocab; t++) {
      for (int k = 0; k < shape.dim; k++) weight_row(t)[k] = from_float<T>(shape.exact ? few() : normal(random));
      bias[t] = from_float<T>(shape.exact ? few() : normal(random));
    }
    for (size_t i = 0; i < allowed.size; i++) allowed[i] = int32_t(random() | random());
    // ties: in a lane, in a tile, in two tiles, the same place of two tiles
    for (auto [to, from] : {std::pair{1, 0}, {70, 4}, {127, 128}, {5, 133}, {shape.vocab - 1, 2}, {200, 301}})
      if (to < shape.vocab && from < shape.vocab) {
        std::memcpy(weight_row(to), weight_row(from), shape.dim * sizeof(T));
        bias[to] = bias[from];
      }
    for (int r = 0; r < shape.rows; r++) special_row(r);
  }

  void special_row(int r) {
    const auto allow = [&](auto which) {
      for (int t = 0; t < words * 32 && shape.allowed == Allowed::by_row; t++) {
        int32_t& word = allowed[r * words + t / 32];
        word = int32_t((uint32_t(word) & ~(1u << t % 32)) | uint32_t(which(t)) << t % 32);
      }
    };
    switch (r % 11) {
      case 2:  // its largest are a tie
        for (int k = 0; k < shape.dim && !shape.exact; k++)
          hidden_row(r)[k] = from_float<T>(to_float(weight_row(shape.vocab > 4 ? 4 : 0)[k]) * 2 / std::sqrt(shape.dim));
        break;
      case 5:  // no distribution
        hidden_row(r)[shape.dim - 1] = from_float<T>(NAN);
        break;
      case 6: allow([&](int t) { return t == shape.vocab * 2 / 3; }); break;
      case 7: allow([&](int t) { return t >= shape.vocab; }); break;  // none
      case 8: allow([&](int t) { return t >= shape.vocab - 1 || t % 128 == 17; }); break;
      case 9: allow([&](int t) { return t / 128 % 2 == 1 || t == 3; }); break;
      case 10: hidden_row(r)[0] = from_float<T>(INFINITY); break;
    }
  }

  std::vector<double> exact_logits(int r) {
    std::vector<double> x(shape.vocab);
    for (int t = 0; t < shape.vocab; t++) {
      double sum = shape.bias ? to_float(bias[t]) : 0;
      for (int k = 0; k < shape.dim; k++) sum += double(to_float(hidden_row(r)[k])) * to_float(weight_row(t)[k]);
      x[t] = is_allowed(r, t) ? sum : -INFINITY;
    }
    return x;
  }

  ops::SampleFromHidden call() {
    ops::SampleFromHidden c{};
    c.hidden = hidden.data + shape.offset, c.weight = weight.data + shape.offset;
    c.bias = shape.bias ? bias.data : nullptr, c.type = type_of<T>::value;
    c.hidden_stride = c.weight_stride = stride;
    c.rows = shape.rows, c.vocab = shape.vocab, c.dim = shape.dim, c.softcap = shape.softcap;
    c.masked = shape.chosen == Chosen::all ? nullptr : masked.data;
    c.temperature = {temperature.data, 0}, c.statistics_temperature = {statistics_temperature.data, 0};
    c.seed = {seed.data, 0}, c.step = {step.data, 0}, c.position = position.data;
    if (!shape.per_row) {
      c.temperature = {nullptr, temperature[0]}, c.statistics_temperature = {nullptr, statistics_temperature[0]};
      c.seed = {nullptr, seed[0]}, c.step = {nullptr, step[0]};
    }
    c.allowed = shape.allowed == Allowed::all ? nullptr : allowed.data;
    c.allowed_stride = shape.allowed == Allowed::by_row ? words : 0;
    return c;
  }
};
