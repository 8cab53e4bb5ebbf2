// sample_from_hidden with 64 threads that finish a row: few tokens are many tiles for a thread.
#define HEAD_FINISH_THREADS 64
#include "head_checks.h"

Shape shape_of(int rows, int vocab, int dim) { return {rows, vocab, dim}; }

void test_choose_rows() {
  for (int rows : {1, 31, 33, 1024, 1025, 2500}) {
    if (cuda_on_cpu::watches_threads && rows > 1025) continue;
    Buffer<bool> masked(rows);
    Buffer<int> chosen(rows + 1);
    std::vector<int> expected;
    for (int r = 0; r < rows; r++)
      if ((masked[r] = r * 7919 % 5 < 2)) expected.push_back(r);
    under_schedules(2, "choose_rows", [&](const std::string& schedule) {
      std::memset(chosen.data, 0xFF, chosen.size * sizeof(int));
      launch(ops::choose_rows_kernel, dim3(1), dim3(1024), sizeof(ops::ChoosingShared), nullptr, masked.data, rows,
             chosen.data);
      expect(chosen[0] == int(expected.size()), "number of rows", [&] { return schedule; });
      for (size_t i = 0; i < expected.size(); i++)
        expect(chosen[1 + i] == expected[i], "chosen row", [&] { return schedule + " " + std::to_string(i); });
    });
  }
}

// Around the sizes of tiles and blocks of tokens, of blocks, warps and fragments of rows, and of steps of dim.
void test_sizes() {
  Shape small = shape_of(5, 140, 72);
  small.gap = 8, small.offset = 8;
  check_fused<BFloat16>("bf16 [5, 72] x [140, 72], gaps", small, 2);
#ifndef QUICK
  for (int rows : {1, 8, 17, 33, 63, 64, 65, 96, 128, 129}) {
    const std::string of = "bf16 [" + std::to_string(rows) + ", 136] x [300, 136]";
    Shape shape = shape_of(rows, 300, 136);
    shape.bias = rows % 2;
    check_fused<BFloat16>(of.c_str(), shape, rows % 32 == 0 ? 2 : 1);
  }
  for (int vocab : {1, 3, 31, 127, 128, 129, 255, 256, 257, 1100}) {
    const std::string of = "fp16 [13, 64] x [" + std::to_string(vocab) + ", 64]";
    check_fused<Float16>(of.c_str(), shape_of(13, vocab, 64), 2);
  }
  for (int dim : {8, 16, 56, 64, 120, 128, 200, 328}) {
    const std::string of = "bf16 [7, " + std::to_string(dim) + "] x [270, ..]";
    check_fused<BFloat16>(of.c_str(), shape_of(7, 270, dim), 4);
  }
  check_fused<BFloat16>("bf16 [12, 8] x [17000, 8], many tiles", shape_of(12, 17000, 8), 0);
#endif
}

void test_settings() {
  Shape masked = shape_of(20, 150, 64);
  masked.chosen = Chosen::some, masked.allowed = Allowed::by_row, masked.bias = true;
  check_fused<Float16>("fp16 [20, 64] x [150, 64], masked, allowed, bias", masked, 4);
  Shape none = masked;
  none.chosen = Chosen::none;
  check_fused<BFloat16>("bf16 [20, 64] x [150, 64], no row", none, 1);
#ifndef QUICK
  Shape many = shape_of(140, 400, 80);
  many.chosen = Chosen::some, many.allowed = Allowed::one_for_all, many.softcap = 5;
  check_fused<BFloat16>("bf16 [140, 80] x [400, 80], masked, softcap", many, 2);
  many.rows = 300;
  check_fused<BFloat16>("bf16 [300, 80] x [400, 80], two blocks of rows", many, 1);
  Shape one = shape_of(9, 520, 72);
  one.per_row = false, one.allowed = Allowed::one_for_all;
  check_fused<BFloat16>("bf16 [9, 72] x [520, 72], one setting for all", one, 2);
  Shape ties = shape_of(30, 600, 32);
  ties.exact = true, ties.bias = true;
  check_fused<BFloat16>("bf16 [30, 32] x [600, 32], ties", ties, 2);
  Shape flat = shape_of(120, 2000, 16);
  flat.spread = 0.3f;
  check_fused<BFloat16>("bf16 [120, 16] x [2000, 16], flat", flat, 0);
#endif
  ops::SampleFromHidden nothing{};
  ops::head_parts(nothing, nullptr), ops::head_finish(nothing, nullptr);  // no rows: no launch
  ops::logit_parts(nothing, {}, nullptr);
}

// A NaN in the bias of one token: rows that may not take it do not notice.
void test_nan_of_one_token() {
  const char* what = "bf16 [11, 64] x [260, 64], NaN in the bias";
  Shape shape = shape_of(11, 260, 64);
  shape.bias = true, shape.allowed = Allowed::by_row;
  Problem<BFloat16> problem(shape);
  const int token = 150;
  problem.bias[token] = from_float<BFloat16>(NAN);
  int invalid = 0;
  for (int r = 0; r < shape.rows; r++) {
    problem.logits[r] = problem.exact_logits(r);
    problem.expected[r] = expected_row(problem.logits[r], problem.settings[r], 0);
    invalid += !problem.expected[r].valid;
  }
  expect(3 < invalid && invalid < 10, what, [&] { return std::to_string(invalid) + " rows are invalid"; });
  under_schedules(1, what,
                  [&](const std::string& schedule) { check_all(problem, run_fused(problem.call()), what, schedule); });
}

// What the fused head refuses, and what it would be given more than it can hold.
void test_from_logits() {
  Shape odd = shape_of(6, 300, 37);
  odd.bias = true, odd.chosen = Chosen::some, odd.allowed = Allowed::by_row;
  check_from_logits<float, float>("fp32 [6, 37] x [300, 37], logits unaligned", odd, 256, 1, 3, 2);
#ifndef QUICK
  for (int vocab : {1, 2, 127, 128, 129, 2048, 2049, 4200}) {
    const std::string of = "fp32 [12, 12] x [" + std::to_string(vocab) + ", 12]";
    check_from_logits<float, float>(of.c_str(), shape_of(12, vocab, 12), 1 << 12, 4 - vocab % 4, 0, 2);
  }
  Shape exact = shape_of(24, 700, 32);
  exact.exact = true, exact.softcap = 3;
  check_from_logits<BFloat16, BFloat16>("bf16 [24, 32] x [700, 32], bf16 logits", exact, 384, 4, 0, 2);
  exact.bias = true, exact.gap = 5, exact.offset = 3;  // the head is read by elements
  check_from_logits<Float16, Float16>("fp16 [24, 32] x [700, 32], unaligned head", exact, 128, 2, 1, 2);
  Shape uneven = shape_of(6, 300, 10);
  uneven.gap = 2;  // rows of the head begin at multiples of 16 bytes, but end elsewhere
  check_from_logits<float, float>("fp32 [6, 10] x [300, 10], gaps", uneven, 512, 0, 0, 2);
  uneven.dim = 32, uneven.gap = 1;  // only the first row begins there
  check_from_logits<float, Float16>("fp16 [6, 32] x [300, 32], gaps", uneven, 512, 0, 0, 2);
  Shape masked = shape_of(70, 500, 8);
  masked.chosen = Chosen::some, masked.allowed = Allowed::one_for_all;
  check_from_logits<float, Float16>("fp16 [70, 8] x [500, 8], fp32 logits, masked", masked, 512, 0, 0, 1);
#endif
}

// Which heads the fused one takes.
void test_takes() {
  Shape shape = shape_of(2, 5, 40);
  shape.gap = 8;
  Problem<BFloat16> problem(shape);
  const ops::SampleFromHidden good = problem.call();
  const auto takes = [&](auto change) {
    ops::SampleFromHidden call = good;
    change(call);
    return ops::head_parts_takes(call);
  };
  const auto two_bytes_on = [](const void* p) { return static_cast<const char*>(p) + 2; };
  expect(ops::head_parts_takes(good), "takes", [] { return "a good head"; });
  expect(!takes([](auto& c) { c.type = ops::LogitType::Float32; }), "takes", [] { return "float32"; });
  expect(!takes([&](auto& c) { c.hidden = two_bytes_on(c.hidden); }), "takes", [] { return "hidden"; });
  expect(!takes([&](auto& c) { c.weight = two_bytes_on(c.weight); }), "takes", [] { return "weight"; });
  expect(!takes([](auto& c) { c.dim = 36; }), "takes", [] { return "dim"; });
  expect(!takes([](auto& c) { c.hidden_stride = 44; }), "takes", [] { return "hidden_stride"; });
  expect(!takes([](auto& c) { c.weight_stride = 44; }), "takes", [] { return "weight_stride"; });
}

void test_invariance() {
  Shape shape = shape_of(12, 260, 136);
  shape.bias = true, shape.chosen = Chosen::some, shape.allowed = Allowed::by_row;
  check_invariance<BFloat16>("bf16 [12, 136] x [260, 136], alone as in the batch", shape);
#ifndef QUICK
  shape.rows = 132, shape.allowed = Allowed::one_for_all;
  check_invariance<Float16>("fp16 [132, 136] x [260, 136], alone as in the batch", shape);
#endif
}

int main() {
  test_choose_rows();
  test_sizes();
  test_settings();
  test_nan_of_one_token();
  test_from_logits();
  test_takes();
  test_invariance();
  std::printf("%d draws, %d of them within 1e-5 of a boundary\n", draws, draws_at_a_boundary);
  return finish("head");
}
