// Attention on every GPU with short blocks of keys: every mask, layout and setting.
#define ATTENTION_KEYS(dim, bytes) ((dim) > 64 ? 16 : 32)
#define ATTENTION_CHUNK 64
#include "attention.cu"

namespace attention_test {
using diffusion_runtime::AttentionArguments;
bool takes(const AttentionArguments& a) { return diffusion_runtime::attention_takes(a); }
size_t workspace_of(const AttentionArguments& a) { return diffusion_runtime::attention_workspace(a); }
void launch_kernel(const AttentionArguments& a, void* workspace) {
  diffusion_runtime::launch_attention(a, workspace, nullptr);
}
}  // namespace attention_test

#include "attention_checks.h"

using namespace attention_test;

constexpr VisibleKeys kAll = {-1, -1, 1, -1}, kCausal = {-1, 0, 1, -1};
const std::vector<Request> kRequests = {{21, 40}, {9, 0}, {0, 5}, {33, 70}};

Rules heads(int heads, int kv_heads, VisibleKeys visible = kAll, int offset = 0) {
  Rules rules;
  rules.heads = heads, rules.kv_heads = kv_heads, rules.visible = visible, rules.offset = offset;
  return rules;
}

// Blocks of keys that no query of a tile sees are not copied: rows of 8 vectors for keys and for values.
void check_skipping(const char* what, VisibleKeys visible, int prefix, uint64_t rows) {
  under_schedules(0, what, [&](const std::string& schedule) {
    cuda_on_cpu::counters = {};
    run<BFloat16>({{120, prefix}}, {0}, heads(1, 1, visible), Layout::Packed, false);
    expect(cuda_on_cpu::counters.async_copies == 2 * 8 * rows, what,
           [&] { return schedule + ": " + std::to_string(cuda_on_cpu::counters.async_copies); });
  });
}

template <class T>
void check_settings(const char* what, const Rules& rules) {
  check<T>(what, {{21, 33}, {30, 6}}, rules, 0, {Layout::Right, Layout::Packed});
}

template <class T>
void check_masks(const char* what, Rules rules) {
  for (const MaskType mask : {MaskType::Bool, MaskType::Float32, MaskType::AsQuery}) {
    rules.mask = mask;
    check<T>(what, {{21, 0}, {40, 0}, {1, 0}}, rules, 0, {Layout::Right, Layout::Left});
  }
}

int main() {
#ifdef QUICK
  check<BFloat16>("causal, packed and paged", {{21, 50}, {5, 0}}, heads(2, 1, kCausal), 1,
                  {Layout::Packed, Layout::Paged});
  Rules rules = heads(1, 1);
  rules.dim = 24, rules.value_dim = 13, rules.apart = 1, rules.mask = MaskType::Float32;
  check<float>("odd sizes and a mask", {{21, 0}}, rules, 0, {Layout::Right});
#else
  check<BFloat16>("bidirectional, every schedule", {{21, 40}, {9, 0}}, heads(1, 1), 8, {Layout::Right});
  check<BFloat16>("bidirectional", kRequests, heads(1, 1), 1, kLayouts, true);
  check<BFloat16>("causal, 6 heads on 2", kRequests, heads(6, 2, kCausal), 1, kLayouts, true);
  check<Float16>("causal, 9 positions back", kRequests, heads(2, 2, kCausal, -9), 0);
  check<BFloat16>("blocks of 7, 3 positions on", kRequests, heads(2, 1, {-1, 0, 7, -1}, 3), 0);
  check<BFloat16>("window", {{90, 40}, {80, 0}}, heads(1, 1, {25, 9, 1, -1}), 1, kLayouts, true);
  check<BFloat16>("window of the prefix", kRequests, heads(2, 1, {-1, -1, 1, 6}), 0);
  Rules rules = heads(2, 1, {20, 0, 1, 9});
  rules.by_sequence = true;
  check<BFloat16>("masks by sequence", {{21, 40, false}, {30, 7, true}, {33, 64, true}}, rules, 0);
  rules = heads(2, 1);
  for (const int more : {23, -9}) {
    rules.more_keys = more;
    check<Float16>(more > 0 ? "more keys than queries" : "fewer keys than queries", kRequests, rules, 0);
  }
  rules.more_keys = 0, rules.page_size = 7;
  check<BFloat16>("pages of 7", kRequests, rules, 0, {Layout::Right, Layout::Paged});
  rules = heads(2, 1, kCausal);
  check<float>("float32", kRequests, rules, 1, kLayouts, true);
  rules.softcap = 2;
  check_settings<BFloat16>("softcap", rules);
  check_masks<float>("softcap and a mask", rules);
  rules.scale = -0.125f;
  check_settings<float>("softcap, negative scale", rules);
  rules.softcap = 0;
  check_settings<Float16>("negative scale", rules);
  check_masks<Float16>("negative scale and a mask", rules);
  rules.scale = 0;
  check_settings<BFloat16>("scale 0", rules);
  rules.scale = 0.125f, rules.size = 100;
  check_settings<Float16>("large scores", rules);
  rules = heads(2, 1);
  check_masks<BFloat16>("a mask", rules);
  rules = heads(2, 1, kCausal), rules.apart = 1;
  for (const int dim : {5, 20, 64}) {
    rules.dim = dim, rules.value_dim = dim == 20 ? 72 : 0;
    check_settings<BFloat16>("rows that are not aligned", rules);
    check_settings<float>("rows that are not aligned, float32", rules);
  }
  rules.apart = 0;
  for (const int dim : {96, 128, 256, 512}) {
    rules.dim = dim, rules.value_dim = dim == 96 ? 32 : 0;
    check<BFloat16>(("head_dim " + std::to_string(dim)).c_str(), {{21, 33}, {30, 6}}, rules, 0,
                    {Layout::Right, Layout::Paged});
    if (dim <= 256) check<float>("float32", {{5, 33}}, rules, 0, {Layout::Right, Layout::Paged});
  }
  check_skipping("keys before the diagonal", kCausal, 0, 64 + 120);
  check_skipping("keys of a window", {31, 0, 1, -1}, 0, 64 + 120 - 33);
  check_skipping("all keys", kAll, 0, 120 + 120);
#endif
  return finish("attention");
}
