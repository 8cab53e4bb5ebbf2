// Limited draws, with chunks of 1024 tokens, two warps, 256 bins: few tokens are many chunks, tiles and narrowings.
#define SAMPLE_TOKENS_CHUNK 1024
#define SAMPLE_TOKENS_THREADS 64
#define SAMPLE_TOKENS_ROW_BLOCKS 3
#define RESTRICTED_DRAW_THREADS 64
#include "restricted_draw_checks.h"

constexpr int kChunk = SAMPLE_TOKENS_CHUNK;

Shape shape_of(int outer, int inner, int vocab, int gap = 0, int offset = 0) {
  Shape s{outer, inner, vocab};
  s.gap = gap, s.offset = offset;
  return s;
}

Limits limits_of(Limits::Allowed allowed, const char* cuts, bool restricted) {
  const std::string of = cuts;
  const auto has = [&](char c) { return of.find(c) != std::string::npos; };
  return {allowed, has('k'), has('p'), has('m'), restricted, 0, 1, 0};
}

std::string name_of(const Limits& l) {
  static const char* const allowed[] = {"", "same", "allowed"};
  return std::string(", ") + allowed[l.allowed] + (l.top_k ? "k" : "") + (l.top_p ? "p" : "") + (l.min_p ? "m" : "") +
         (l.restricted ? ", restricted" : "");
}

const Limits kAllowed = limits_of(Limits::per_row, "", false);
const Limits kAllowedOnly = limits_of(Limits::per_row, "", true);
const Limits kCuts = limits_of(Limits::all, "kpm", false);
const Limits kCutsOnly = limits_of(Limits::all, "kpm", true);
const Limits kEverything = limits_of(Limits::per_row, "kpm", false);
const Limits kEverythingOnly = limits_of(Limits::per_row, "kpm", true);

// The small cases: every kernel, in every mode.
void test_modes() {
  for (const Limits& l : {kAllowed, kAllowedOnly, kCutsOnly, kEverything, kEverythingOnly})
    check_limited<BFloat16>("bf16 [3, 11, 330]" + name_of(l), shape_of(3, 11, 330, 6), l, 2);
  check_limited<float>("fp32 [1, 17, 1100], unaligned" + name_of(kCuts), shape_of(1, 17, kChunk + 76, 0, 1), kCuts, 2);
#ifndef QUICK
  for (bool restricted : {false, true}) {
    for (const char* cuts : {"k", "p", "m", "kp", "pm"}) {
      const Limits l = limits_of(Limits::all, cuts, restricted), a = limits_of(Limits::same, cuts, restricted);
      check_limited<float>("fp32 [1, 45, 2077]" + name_of(l), shape_of(1, 45, 2 * kChunk + 29, 3), l, 2);
      check_limited<Float16>("fp16 [1, 45, 1153]" + name_of(a), shape_of(1, 45, kChunk + 129), a, 2);
    }
  }
#endif
}

// Around the sizes of vectors, words, tiles, spans and chunks; more tiles than threads, than bins.
void test_sizes() {
#ifndef QUICK
  for (int vocab : {1, 2, 7, 8, 9, 31, 32, 33, 127, 128, 129, 255, 256, 257, kChunk - 1, kChunk, kChunk + 1, 3149}) {
    const std::string of = std::to_string(vocab) + "]";
    const Limits& l = vocab % 2 ? kEverythingOnly : kEverything;
    check_limited<float>("fp32 [1, 34, " + of + name_of(l), shape_of(1, 34, vocab, 0, 1), l, 2);
    check_limited<Float16>("fp16 [34, 1, " + of + name_of(kCuts), shape_of(34, 1, vocab, 3), kCuts, 2);
    check_limited<BFloat16>("bf16 [2, 17, " + of + name_of(kAllowedOnly), shape_of(2, 17, vocab), kAllowedOnly, 2);
    check_limited<BFloat16>("bf16 [2, 17, " + of + name_of(l), shape_of(2, 17, vocab, 16 - vocab % 8, 8), l, 2);
  }
  check_limited<float>("fp32 [1, 15, 20557]" + name_of(kCutsOnly), shape_of(1, 15, 20 * kChunk + 77), kCutsOnly, 1);
  check_limited<BFloat16>("bf16 [1, 15, 66637]" + name_of(kEverything), shape_of(1, 15, 65 * kChunk + 77), kEverything,
                          0);
#endif
}

void test_settings() {
  Shape masked = shape_of(3, 4, kChunk + 130, 2);
  masked.masked = true, masked.softcap = 5;
  check_limited<Float16>("fp16 [3, 4, 1154], masked, softcap", masked, kEverything, 2);
  Limits one;
  one.one_top_k = 20, one.one_top_p = 0.8f, one.one_min_p = 0.01f;
  Shape flat = shape_of(3, 5, 700);
  flat.per_row = false, flat.flat_only = true;
  check_limited<BFloat16>("bf16 [3, 5, 700], one setting for all rows", flat, one, 2);
#ifndef QUICK
  masked.inner = 15;
  for (const Limits& l : {kCuts, kCutsOnly, kAllowed, kAllowedOnly, kEverythingOnly}) {
    check_limited<float>("fp32 [3, 15, 1154], masked, softcap" + name_of(l), masked, l, 2);
    check_limited<BFloat16>("bf16 [3, 15, 1154], masked, softcap" + name_of(l), masked, l, 2);
  }
  Shape large = shape_of(1, 45, kChunk + 9);
  large.large = true;
  check_limited<float>("fp32 [1, 45, 1033], logits around 1e4", large, kCutsOnly, 1);
  Shape many = shape_of(10, 100, 2 * kChunk + 500);
  many.flat_only = true;
  for (const Limits& l : {kCuts, kEverythingOnly})
    check_limited<BFloat16>("bf16 [10, 100, 2548], draws" + name_of(l), many, l, 0);
  for (float temperature : {1e-6f, 1e-38f, 1e30f}) {
    LimitedProblem<float> problem(shape_of(1, 1, 1500), kCuts);
    ops::SampleTokens c = problem.call();
    c.temperature = {nullptr, temperature};
    c.top_k = {nullptr, 3}, c.top_p = {nullptr, 0.999f}, c.min_p = {nullptr, 0};
    const Output got = run(c, "temperature")[0];
    std::vector<float> x(problem.row(0), problem.row(0) + 1500);
    std::sort(x.begin(), x.end(), std::greater<float>());
    const bool good = got.token >= 0 && problem.row(0)[got.token] >= x[temperature < 1 ? 0 : 2];
    expect(good, "an extreme temperature", [&] { return std::to_string(temperature); });
  }
#endif
}

void test_invariance() {
  check_limited_invariance<BFloat16>("bf16 [1, 6, 600], alone as in the batch", shape_of(1, 6, 600), kEverythingOnly);
#ifndef QUICK
  for (const Limits& l : {kAllowedOnly, kCutsOnly, kEverything}) {
    check_limited_invariance<Float16>("fp16 [3, 13, 2201], alone as in the batch", shape_of(3, 13, 2201, 5), l);
    check_limited_invariance<float>("fp32 [3, 13, 1500], alone as in the batch", shape_of(3, 13, 1500, 0, 2), l);
  }
#endif
}

int main() {
  test_modes();
  test_sizes();
  test_settings();
  test_invariance();
  std::printf("%d draws, %d of them within 1e-5 of a boundary; %d cuts where rounding can move them\n", draws,
              draws_at_a_boundary, cuts_at_a_boundary);
  return finish("restricted_draw");
}
