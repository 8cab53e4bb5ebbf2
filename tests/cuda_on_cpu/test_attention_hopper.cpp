// Attention on Hopper with short blocks of keys: every mask, layout and setting.
#define ATTENTION_HOPPER_KEYS(dim) 32
#define ATTENTION_HOPPER_CHUNK 2
#include "attention_hopper.cu"

namespace attention_test {
using diffusion_runtime::AttentionArguments;
bool takes(const AttentionArguments& a) { return diffusion_runtime::hopper_takes(a); }
size_t workspace_of(const AttentionArguments& a) { return diffusion_runtime::attention_hopper_workspace(a); }
void launch_kernel(const AttentionArguments& a, void* workspace) {
  diffusion_runtime::launch_attention_hopper(a, workspace, nullptr);
}
}  // namespace attention_test

#include "attention_checks.h"

using namespace attention_test;

constexpr VisibleKeys kAll = {-1, -1, 1, -1}, kCausal = {-1, 0, 1, -1};
const std::vector<Request> kRequests = {{41, 40}, {9, 0}, {0, 5}, {33, 70}};

Rules heads(int heads, int kv_heads, VisibleKeys visible = kAll, int offset = 0) {
  Rules rules;
  rules.heads = heads, rules.kv_heads = kv_heads, rules.visible = visible, rules.offset = offset;
  return rules;
}

// Blocks of keys that no query of a tile sees are not asked for: a copy each for keys and for values.
void check_skipping(const char* what, VisibleKeys visible, int prefix, uint64_t blocks) {
  under_schedules(0, what, [&](const std::string& schedule) {
    cuda_on_cpu::counters = {};
    run<BFloat16>({{250, prefix}}, {0}, heads(1, 1, visible), Layout::Packed, false);
    expect(cuda_on_cpu::counters.tile_copies == 2 * blocks, what,
           [&] { return schedule + ": " + std::to_string(cuda_on_cpu::counters.tile_copies); });
  });
}

// Each of these is one step away from a call that is taken.
void check_refusals() {
  alignas(16) static BFloat16 memory[64];
  AttentionArguments good = {};
  good.query = good.key = good.value = {memory, 512, 64, 128};
  good.out = memory, good.out_batch = 512, good.out_head = 64, good.out_row = 128;
  good.type = LogitType::BFloat16, good.head_dim = good.value_dim = 64;
  good.sequences = good.heads = good.kv_heads = 2, good.length = good.num_keys = 4;
  const auto takes = [&](auto change) {
    AttentionArguments changed = good;
    change(changed);
    return hopper_takes(changed);
  };
  using A = AttentionArguments;
  const bool taken[] = {takes([](A&) {}), takes([](A& a) { a.key.batch = 3, a.sequences = 1; }),
                        takes([](A& a) { a.key.head = 0; }), takes([](A& a) { a.num_keys = 0, a.key = a.value = {}; })};
  for (const bool t : taken) expect(t, "taken", [] { return "a call that the kernel can do"; });
  const bool refused[] = {takes([](A& a) { a.type = LogitType::Float32; }),
                          takes([](A& a) { a.head_dim = a.value_dim = 96; }),
                          takes([](A& a) { a.value_dim = 128; }),
                          takes([](A& a) { a.mask_type = MaskType::Bool; }),
                          takes([](A& a) { a.query.row = 132; }),
                          takes([](A& a) { a.key.batch = 516; }),
                          takes([](A& a) { a.value.head = 68; }),
                          takes([](A& a) { a.key.row = 0; }),
                          takes([](A& a) { a.value.data = memory + 1; }),
                          takes([](A& a) { a.out_row = 132; }),
                          takes([](A& a) { a.prefix_key = {memory + 4, 512, 64, 128}, a.capacity = 4; })};
  int number = 0;
  for (const bool r : refused) {
    expect(!r, "refused", [&] { return "call " + std::to_string(number); });
    number++;
  }
}

template <class T>
void check_settings(const char* what, Rules rules, int schedules) {
  check<T>(what, {{21, 33}, {30, 6}}, rules, schedules, {Layout::Right});
}

int main() {
  check_refusals();
#ifdef QUICK
  check<BFloat16>("causal, packed and paged", {{41, 100}, {5, 0}}, heads(2, 1, kCausal), 1,
                  {Layout::Packed, Layout::Paged});
  check<BFloat16>("bidirectional, padded", {{70, 5}}, heads(1, 1), 1, {Layout::Right});
#else
  check<BFloat16>("bidirectional, every schedule", {{41, 40}, {9, 0}}, heads(1, 1), 8, {Layout::Right});
  check<BFloat16>("bidirectional", kRequests, heads(1, 1), 1, kLayouts, true);
  check<BFloat16>("causal, 6 heads on 2", kRequests, heads(6, 2, kCausal), 1, kLayouts, true);
  check<BFloat16>("causal, one key in the last block", {{33, 0}, {65, 0}}, heads(1, 1, kCausal), 0, kLayouts, true);
  check<BFloat16>("causal, 9 positions back", kRequests, heads(2, 2, kCausal, -9), 0);
  check<BFloat16>("blocks of 7, 3 positions on", kRequests, heads(2, 1, {-1, 0, 7, -1}, 3), 0);
  check<BFloat16>("window", {{150, 40}, {80, 0}}, heads(1, 1, {25, 9, 1, -1}), 1);
  check<BFloat16>("window of the prefix", kRequests, heads(2, 1, {-1, -1, 1, 6}), 0);
  Rules rules = heads(2, 1, {20, 0, 1, 9});
  rules.by_sequence = true;
  check<BFloat16>("masks by sequence", {{41, 40, false}, {30, 7, true}, {33, 64, true}}, rules, 0);
  rules = heads(2, 1);
  for (const int more : {23, -9}) {
    rules.more_keys = more;
    check<BFloat16>(more > 0 ? "more keys than queries" : "fewer keys than queries", kRequests, rules, 0);
  }
  for (const int page : {7, 64}) {
    rules.page_size = page;
    check<BFloat16>(("pages of " + std::to_string(page)).c_str(), kRequests, rules, 0, {Layout::Right, Layout::Paged});
  }
  rules = heads(2, 1, kCausal);
  rules.softcap = 2;
  check_settings<BFloat16>("softcap", rules, 0);
  rules.scale = -0.125f;
  check_settings<BFloat16>("softcap, negative scale", rules, 0);
  rules.softcap = 0;
  check_settings<Float16>("negative scale", rules, 0);
  rules.scale = 0;
  check_settings<BFloat16>("scale 0", rules, 0);
  rules.scale = 0.125f, rules.size = 100;
  check_settings<Float16>("large scores", rules, 0);
  rules = heads(2, 1, kCausal);
  check<Float16>("fp16", kRequests, rules, 1, {Layout::Right, Layout::Packed});
  rules.dim = 128;
  check<BFloat16>("head_dim 128", {{21, 33}, {30, 6}}, rules, 1, {Layout::Right, Layout::Paged});
  rules.dim = 256;
  check<Float16>("head_dim 256", {{21, 33}, {30, 6}}, rules, 1, {Layout::Right, Layout::Paged});
  check_skipping("blocks before the diagonal", kCausal, 0, 4 + 8);
  check_skipping("blocks of a window", {31, 0, 1, -1}, 0, 4 + 5);
  check_skipping("blocks of a window on a prefix", {70, 0, 1, -1}, 250, 3 + 4 + 7);
  check_skipping("all blocks", kAll, 0, 8 + 8);
#endif
  return finish("attention_hopper");
}
