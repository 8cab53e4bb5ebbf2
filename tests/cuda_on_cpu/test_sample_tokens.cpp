// sample_tokens with chunks of 1024 tokens and two warps, at most three blocks for a row: few tokens are many chunks.
#define SAMPLE_TOKENS_CHUNK 1024
#define SAMPLE_TOKENS_THREADS 64
#define SAMPLE_TOKENS_ROW_BLOCKS 3
#include "sample_tokens_checks.h"

constexpr int kChunk = SAMPLE_TOKENS_CHUNK;

Shape shape_of(int outer, int inner, int vocab, int gap = 0, int offset = 0) {
  Shape s{outer, inner, vocab};
  s.gap = gap, s.offset = offset;
  return s;
}

// The vectors of Salmon et al. hold the reference; the reference holds the kernel's generator.
void test_uniforms() {
  const Philox zeros({0, 0, 0, 0}, 0, 0);
  const Philox pi({0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, 0xA4093822, 0x299F31D0);
  const uint32_t expected_zeros[] = {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8};
  const uint32_t expected_pi[] = {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1};
  for (int i = 0; i < 4; i++) {
    expect(zeros.word[i] == expected_zeros[i], "philox, zeros", [] { return ""; });
    expect(pi.word[i] == expected_pi[i], "philox, pi", [] { return ""; });
  }
  for (uint32_t i = 0; i < 100; i++) {
    const uint64_t seed = i * 0x9E3779B97F4A7C15;
    const ops::Uniforms got = ops::philox_uniforms(seed, ~i, i * i, ops::kDrawToken);
    const Philox wanted({~i, i * i, 0, 0}, uint32_t(seed), uint32_t(seed >> 32));
    expect(got.first == wanted.uniform(0) && got.second == wanted.uniform(1), "philox", [] { return ""; });
  }
}

// What a draw does at the ends of [0, 1), where no seed leads.
void test_pick() {
  const double mass[] = {0, 0, 0.25, 0, 0.5, 0};
  const auto pick = [&](double& target) { return ops::pick_by_mass(6, target, [&](int i) { return mass[i]; }); };
  for (auto [target, expected, left] : {std::tuple{0.0, 2, 0.0}, {0.125, 2, 0.125}, {0.25, 4, 0.0}, {0.5, 4, 0.25}}) {
    double t = target;
    expect(pick(t) == expected && t == left, "pick_by_mass", [&, at = target] { return std::to_string(at); });
  }
  double t = 0.75;
  expect(pick(t) == 4 && t == INFINITY, "pick_by_mass, past the end", [&] { return std::to_string(t); });
}

// Every kind of row, around the sizes of chunks, tiles and vectors.
void test_sizes() {
  check<float>("fp32 [2, 7, 1025], gaps", shape_of(2, 7, kChunk + 1, 5), 2);
  check<BFloat16>("bf16 [1, 12, 2100], aligned", shape_of(1, 12, 2100, 4), 2);
#ifndef QUICK
  for (int vocab : {1, 2, 5, 7, 8, 9, 127, 128, 129, kChunk - 1, kChunk, kChunk + 1, 2 * kChunk, 3 * kChunk + 77}) {
    const std::string of = std::to_string(vocab) + "], ";
    check<float>(("fp32 [1, 13, " + of + "unaligned").c_str(), shape_of(1, 13, vocab, 0, 1), 4);
    check<Float16>(("fp16 [13, 1, " + of + "gaps").c_str(), shape_of(13, 1, vocab, 3), 4);
    check<BFloat16>(("bf16 [2, 13, " + of + "aligned").c_str(), shape_of(2, 13, vocab, 16 - vocab % 8, 8), 4);
  }
  check<BFloat16>("bf16 [3, 9, 7245], more chunks than blocks", shape_of(3, 9, 7 * kChunk + 77, 1), 8);
  check<float>("fp32 [1, 12, 66637], more chunks than threads", shape_of(1, 12, 65 * kChunk + 77), 1);
#endif
}

void test_settings() {
  Shape masked = shape_of(3, 4, kChunk + 130, 2);
  masked.masked = true;
  check<Float16>("fp16 [3, 4, 1154], masked", masked, 4);
  Shape softcap = shape_of(1, 12, kChunk + 200);
  softcap.softcap = 5;
  check<float>("fp32 [1, 12, 1224], softcap", softcap, 2);
  Shape one = shape_of(3, 3, 2 * kChunk - 5);
  one.per_row = false, one.flat_only = true;
  check<BFloat16>("bf16 [3, 3, 2043], one setting for all rows", one, 2);
  Shape large = shape_of(1, 3, kChunk + 9);
  large.large = true, large.flat_only = true;
  check<float>("fp32 [1, 3, 1033], logits around 1e4", large, 1);
#ifndef QUICK
  softcap.vocab = 3 * kChunk + 11, softcap.offset = 3, softcap.inner = 24;
  check<BFloat16>("bf16 [1, 24, 3083], softcap", softcap, 4);
  check<Float16>("fp16 [1, 24, 3083], softcap", softcap, 4);
  Shape many = shape_of(10, 100, 2 * kChunk + 500);
  many.flat_only = true;
  check<BFloat16>("bf16 [10, 100, 2548], draws", many, 0);
#endif
  ops::SampleTokens nothing{};
  ops::sample_tokens(nothing, nullptr);  // no rows: no launch
}

void test_invariance() {
  check_invariance<BFloat16>("bf16 [2, 4, 1103], alone as in the batch", shape_of(2, 4, kChunk + 79));
#ifndef QUICK
  check_invariance<BFloat16>("bf16 [3, 13, 3333], alone as in the batch", shape_of(3, 13, 3333, 5));
  check_invariance<Float16>("fp16 [3, 13, 2048], alone as in the batch", shape_of(3, 13, 2 * kChunk));
  check_invariance<float>("fp32 [3, 13, 2201], alone as in the batch", shape_of(3, 13, 2201, 0, 2));
#endif
}

// Rows more than 2^32 elements apart, in memory that is reserved but never touched in between.
void test_far_apart() {
#ifndef QUICK
  const char* what = "bf16 [2, 2, 1500], far apart";
  Shape shape = shape_of(2, 2, kChunk + 476);
  shape.flat_only = true;
  Problem<BFloat16> near(shape);
  const int64_t inner_stride = (int64_t{1} << 32) + 8, outer_stride = 2 * inner_stride + 1;
  const size_t bytes = 2 * (outer_stride + inner_stride + shape.vocab);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return void(std::printf("%s: no room for 26 GB of addresses\n", what));
  ops::SampleTokens call = near.call();
  call.logits = memory, call.inner_stride = inner_stride, call.outer_stride = outer_stride;
  for (int r = 0; r < 4; r++) {
    BFloat16* to = static_cast<BFloat16*>(memory) + r / 2 * outer_stride + r % 2 * inner_stride;
    std::memcpy(to, near.row(r), shape.vocab * sizeof(BFloat16));
  }
  const std::vector<Output> expected = run(near.call(), what), got = run(call, what);
  for (int r = 0; r < 4; r++) expect(got[r] == expected[r], what, [&] { return "row " + std::to_string(r); });
  munmap(memory, bytes);
#endif
}

int main() {
  test_uniforms();
  test_pick();
  test_sizes();
  test_settings();
  test_invariance();
  test_far_apart();
  std::printf("%d draws, %d of them within 1e-5 of a boundary\n", draws, draws_at_a_boundary);
  return finish("sample_tokens");
}
