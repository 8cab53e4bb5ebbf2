// Attention on Hopper in the sizes that a GPU runs.
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

int main() {
  Rules rules;
  rules.heads = 2, rules.visible = {-1, 0, 1, -1};
  check<BFloat16>("head_dim 64", {{50, 200}, {100, 0}}, rules, 1, {Layout::Right, Layout::Paged});
  rules.dim = 128;
  check<Float16>("head_dim 128", {{200, 30}, {3, 128}}, rules, 0, {Layout::Right, Layout::Packed});
  rules.dim = 256, rules.scale = 0.0625f;
  check<BFloat16>("head_dim 256", {{40, 129}}, rules, 0, {Layout::Right, Layout::Paged});
  rules.dim = 128, rules.visible = {-1, -1, 1, -1};
  check<BFloat16>("chunks", {{7, 2100}}, rules, 0, {Layout::Right, Layout::Paged});
  return finish("attention_hopper_full");
}
