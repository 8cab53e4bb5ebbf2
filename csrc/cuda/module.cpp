// diffusion_runtime._C_cuda: tensors are checked here, kernels take pointers and a stream.
#include <optional>

#include "bindings.h"
#include "commit.cuh"
#include "grid_setting.h"

namespace py = pybind11;

namespace diffusion_runtime {
namespace {

// The arguments of sample_tokens_cpu (csrc/cpu/sample_tokens.h), all on one GPU, which must be the current one, and
//   workspace  [at least sample_tokens_workspace(rows, vocab, limited)] uint8, zeroed before its first use
//   stream     a cudaStream_t as an integer
void sample_tokens_cuda(const TensorView& logits, const std::optional<TensorView>& masked,
                        const RowArgument<float>& temperature, const RowArgument<std::int64_t>& seed,
                        const std::optional<TensorView>& position, const RowArgument<std::int64_t>& step,
                        const RowArgument<float>& statistics_temperature, float softcap,
                        const std::optional<TensorView>& allowed, const RowArgument<std::int64_t>& top_k,
                        const RowArgument<float>& top_p, const RowArgument<float>& min_p, bool restricted,
                        const TensorView& ids, const TensorView& statistics, const TensorView& workspace,
                        std::uintptr_t stream) {
  check(logits.is_cuda(), "sample_tokens: logits must be on a CUDA device");
  check(logits.ndim() == 3 && logits.size(2) > 0 && (logits.size(2) == 1 || logits.stride(2) == 1),
        "sample_tokens: logits must be [outer, inner, vocab] with stride 1 along vocab, got ", logits.shape());
  const std::int64_t inner = logits.size(1), rows = logits.size(0) * inner, vocab = logits.size(2);
  constexpr std::int64_t kLimit = std::int64_t{1} << 31;
  check(rows < kLimit && vocab < kLimit, "sample_tokens: rows and vocab must be below 2^31, got ", logits.shape());
  if (masked) check_rows("masked", *masked, logits, rows);
  if (position) check_rows("position", *position, logits, rows);
  if (allowed) check_matrix("allowed", *allowed, logits, rows, (vocab + 31) / 32);
  check_rows("ids", ids, logits, 2 * rows);
  check_rows("statistics", statistics, logits, 5 * rows);

  SampleTokens arguments{};
  arguments.logits = logits.raw_data();
  arguments.type = logit_type(logits.dtype());
  arguments.outer_stride = logits.stride(0);
  arguments.inner_stride = logits.stride(1);
  arguments.rows = rows;
  arguments.inner = inner;
  arguments.vocab = vocab;
  arguments.masked = masked ? masked->data<const bool>() : nullptr;
  arguments.temperature = per_row("temperature", temperature, logits, rows);
  arguments.seed = per_row("seed", seed, logits, rows);
  arguments.position = position ? position->data<const std::int64_t>() : nullptr;
  arguments.step = per_row("step", step, logits, rows);
  arguments.statistics_temperature = per_row("statistics_temperature", statistics_temperature, logits, rows);
  arguments.softcap = softcap;
  arguments.allowed = allowed ? allowed->data<const std::int32_t>() : nullptr;
  arguments.allowed_stride = allowed ? allowed->stride(0) : 0;
  arguments.top_k = per_row("top_k", top_k, logits, rows);
  arguments.top_p = per_row("top_p", top_p, logits, rows);
  arguments.min_p = per_row("min_p", min_p, logits, rows);
  arguments.restricted = restricted;
  arguments.ids = ids.data<std::int64_t>();
  arguments.statistics = statistics.data<float>();
  arguments.workspace = workspace.raw_data();

  const std::int64_t bytes = static_cast<std::int64_t>(sample_tokens_workspace(rows, vocab, is_limited(arguments)));
  check_rows("workspace", workspace, logits, workspace.numel());
  check(workspace.dtype() == DType::UInt8 && workspace.numel() >= bytes, "workspace must be uint8 with at least ",
        bytes, " elements, got ", workspace.dtype(), " of shape ", workspace.shape());
  check(reinterpret_cast<std::uintptr_t>(workspace.raw_data()) % 16 == 0, "workspace must be 16-byte aligned");
  sample_tokens(arguments, reinterpret_cast<CUstream_st*>(stream));
}

void commit_step_cuda(const TensorView& masked, const std::optional<TensorView>& score, int rule,
                      const std::optional<TensorView>& bound, double bound_value,
                      const std::optional<TensorView>& tokens, const std::optional<TensorView>& candidates,
                      std::int64_t vocab, const std::optional<TensorView>& seed, std::int64_t seed_value,
                      const std::optional<TensorView>& position, const std::optional<TensorView>& step,
                      std::int64_t step_value, const TensorView& commit_mask, const TensorView& after,
                      std::uintptr_t stream) {
  check(masked.is_cuda(), "commit_step: masked must be on a CUDA device");
  commit_step(commit_step_of(masked, score, rule, bound, bound_value, tokens, candidates, vocab, seed, seed_value,
                             position, step, step_value, commit_mask, after),
              reinterpret_cast<CUstream_st*>(stream));
}

}  // namespace
}  // namespace diffusion_runtime

PYBIND11_MODULE(_C_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels for tensors on a GPU. Call them through diffusion_runtime.ops.";
  m.def("sample_tokens_workspace", &diffusion_runtime::sample_tokens_workspace, py::arg("rows"), py::arg("vocab"),
        py::arg("limited"), "The bytes of the zeroed workspace that sample_tokens needs.");
  m.def("sample_tokens", &diffusion_runtime::sample_tokens_cuda, py::arg("logits"), py::arg("masked"),
        py::arg("temperature"), py::arg("seed"), py::arg("position"), py::arg("step"),
        py::arg("statistics_temperature"), py::arg("softcap"), py::arg("allowed"), py::arg("top_k"), py::arg("top_p"),
        py::arg("min_p"), py::arg("restricted"), py::arg("ids"), py::arg("statistics"), py::arg("workspace"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("commit_step", &diffusion_runtime::commit_step_cuda, py::arg("masked"), py::arg("score"), py::arg("rule"),
        py::arg("bound"), py::arg("bound_value"), py::arg("tokens"), py::arg("candidates"), py::arg("vocab"),
        py::arg("seed"), py::arg("seed_value"), py::arg("position"), py::arg("step"), py::arg("step_value"),
        py::arg("commit_mask"), py::arg("after"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  diffusion_runtime::bind_head(m);
  diffusion_runtime::bind_attention(m);
  diffusion_runtime::bind_norm(m);
}
