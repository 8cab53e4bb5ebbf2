// What sample_tokens must give, in double and written apart from the kernel's mathematics: of the definition in
// diffusion_runtime/ops/_sample_tokens.py, one row at a time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Philox4x32-10 as Salmon et al. define it: any counter, any key.
struct Philox {
  uint32_t word[4];
  Philox(const uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
    std::memcpy(word, counter, sizeof word);
    for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
      const uint64_t left = 0xD2511F53ull * word[0], right = 0xCD9E8D57ull * word[2];
      const uint32_t next[4] = {uint32_t(right >> 32) ^ word[1] ^ key0, uint32_t(right),
                                uint32_t(left >> 32) ^ word[3] ^ key1, uint32_t(left)};
      std::memcpy(word, next, sizeof word);
    }
  }
  double uniform(int i) const {
    return double((uint64_t(word[2 * i + 1]) << 32 | word[2 * i]) >> 11) / 9007199254740992.0;
  }
};

struct Setting {
  double temperature, statistics_temperature;
  uint64_t seed;
  uint32_t position, step;
};

struct Expected {
  bool valid = false;  // the row has a distribution
  int64_t argmax = -1;
  double confidence = NAN, margin = NAN, entropy = NAN, logsumexp = NAN;
  std::vector<double> y;  // softcap(logits)
  double statistics_temperature = 1;

  double logprob(int64_t token) const { return y[token] / statistics_temperature - logsumexp; }
};

inline Expected expected_row(const std::vector<double>& logits, const Setting& setting, double softcap) {
  Expected e;
  double top = -INFINITY, second = -INFINITY;
  for (size_t i = 0; i < logits.size(); i++) {
    const double x = logits[i];
    if (x != x || x == INFINITY) return e;
    if (x > top)
      second = top, top = x, e.argmax = int64_t(i);
    else if (x > second)
      second = x;
    e.y.push_back(softcap > 0 && x != -INFINITY ? softcap * std::tanh(x / softcap) : x);
  }
  if (top == -INFINITY) return e.argmax = -1, e;
  e.valid = true;
  e.statistics_temperature = setting.statistics_temperature;
  const double best = e.y[e.argmax] / setting.statistics_temperature;
  double mass = 0, moment = 0;
  for (double y : e.y) {
    const double z = y / setting.statistics_temperature - best, weight = std::exp(z);
    mass += weight;
    if (weight > 0) moment += z * weight;
  }
  if (softcap > 0 && second != -INFINITY) second = softcap * std::tanh(second / softcap);
  e.logsumexp = best + std::log(mass);
  e.entropy = std::log(mass) - moment / mass;
  e.confidence = 1 / mass;
  e.margin = (1 - std::exp(second / setting.statistics_temperature - best)) / mass;
  return e;
}

enum class Draw { exact, at_a_boundary, wrong };

// Whether target points into part `got`; a miss by 1e-5 of the whole is forgiven where rounding could have done it.
inline Draw judge_part(const std::vector<double>& mass, double uniform, size_t got) {
  double total = 0, before = 0;
  for (double m : mass) total += m;
  for (size_t i = 0; i < got; i++) before += mass[i];
  const double target = uniform * total, slack = 1e-5 * total;
  if (mass[got] <= 0) return Draw::wrong;
  if (before <= target && target < before + mass[got]) return Draw::exact;
  return before - slack <= target && target < before + mass[got] + slack ? Draw::at_a_boundary : Draw::wrong;
}

// Whether the uniforms of the row point at `token`: the tile of 128 first, then the token in it.
inline Draw judge_draw(const Expected& e, const Setting& setting, int64_t token) {
  constexpr int64_t kTileOfTokens = 128;
  const int64_t vocab = int64_t(e.y.size());
  if (token < 0 || token >= vocab) return Draw::wrong;
  const uint32_t counter[4] = {setting.position, setting.step, 0, 0};
  const Philox random(counter, uint32_t(setting.seed), uint32_t(setting.seed >> 32));
  std::vector<double> tiles((vocab + kTileOfTokens - 1) / kTileOfTokens), tokens;
  for (int64_t i = 0; i < vocab; i++) {
    const double weight = std::exp((e.y[i] - e.y[e.argmax]) / setting.temperature);
    tiles[i / kTileOfTokens] += weight;
    if (i / kTileOfTokens == token / kTileOfTokens) tokens.push_back(weight);
  }
  const Draw tile = judge_part(tiles, random.uniform(0), token / kTileOfTokens);
  const Draw in_tile = judge_part(tokens, random.uniform(1), token % kTileOfTokens);
  if (tile == Draw::wrong || in_tile == Draw::wrong) return Draw::wrong;
  return tile == Draw::exact && in_tile == Draw::exact ? Draw::exact : Draw::at_a_boundary;
}
