// Attention on every GPU in the sizes that one runs.
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

int main() {
  Rules rules;
  rules.heads = 2, rules.visible = {-1, 0, 1, -1};
  check<BFloat16>("head_dim 64", {{50, 200}, {100, 0}}, rules, 1, {Layout::Right, Layout::Paged});
  check<float>("float32", {{20, 90}}, rules, 0, {Layout::Right, Layout::Paged});
  rules.dim = 128;
  check<Float16>("head_dim 128", {{100, 30}, {3, 128}}, rules, 0, {Layout::Right, Layout::Packed});
  rules.visible = {-1, -1, 1, -1};
  check<BFloat16>("chunks", {{7, 2100}}, rules, 0, {Layout::Right, Layout::Paged});
  rules.dim = 256, rules.scale = 0.0625f;
  check<BFloat16>("head_dim 256", {{40, 70}}, rules, 0, {Layout::Right, Layout::Paged});
  rules.dim = 512;
  check<BFloat16>("head_dim 512", {{20, 40}}, rules, 0, {Layout::Right, Layout::Paged});
  return finish("attention_full");
}
