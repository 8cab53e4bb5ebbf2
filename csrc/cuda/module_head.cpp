// The bindings of sample_from_hidden and soft_embedding: tensors are checked here, kernels take pointers and a stream.
#include <optional>

#include "bindings.h"
#include "sample_from_hidden.cuh"
#include "weigh.cuh"

namespace py = pybind11;

namespace diffusion_runtime {
namespace {

constexpr std::int64_t kLimit = std::int64_t{1} << 31;

// All tensors are on one GPU, which must be the current one.
//   hidden     [rows, dim], weight [vocab, dim], bias [vocab] or none: of one dtype
//   position   [rows] int64, or none where nothing is drawn
//   allowed    [rows, vocab / 32 rounded up] int32, or none
//   workspace  [at least sample_from_hidden_workspace(rows, vocab)] uint8
SampleFromHidden sample_from_hidden_of(const TensorView& hidden, const TensorView& weight,
                                       const std::optional<TensorView>& bias, const std::optional<TensorView>& masked,
                                       const RowArgument<float>& temperature, const RowArgument<std::int64_t>& seed,
                                       const std::optional<TensorView>& position, const RowArgument<std::int64_t>& step,
                                       const RowArgument<float>& statistics_temperature, float softcap,
                                       const std::optional<TensorView>& allowed, const TensorView& ids,
                                       const TensorView& statistics, const TensorView& workspace) {
  check(hidden.is_cuda() && hidden.ndim() == 2 && weight.ndim() == 2,
        "sample_from_hidden: hidden must be [rows, dim] on a CUDA device and weight [vocab, dim], got ", hidden.shape(),
        " and ", weight.shape());
  const std::int64_t rows = hidden.size(0), dim = hidden.size(1), vocab = weight.size(0);
  check(rows < kLimit && 0 < vocab && vocab < kLimit && 0 < dim && dim < kLimit,
        "sample_from_hidden: rows, vocab and dim must be below 2^31, got ", rows, ", ", vocab, " and ", dim);
  check_matrix("hidden", hidden, hidden, rows, dim);
  check_matrix("weight", weight, hidden, vocab, dim);
  check(weight.dtype() == hidden.dtype() && (!bias || bias->dtype() == hidden.dtype()),
        "weight and bias must be of the dtype of hidden, ", hidden.dtype());
  if (bias) check_rows("bias", *bias, hidden, vocab);
  if (masked) check_rows("masked", *masked, hidden, rows);
  const float* const one_temperature = std::get_if<float>(&temperature);
  check(position || (one_temperature && *one_temperature == 0), "position is needed to draw");
  if (position) check_rows("position", *position, hidden, rows);
  if (allowed) check_matrix("allowed", *allowed, hidden, rows, (vocab + 31) / 32);
  check_rows("ids", ids, hidden, 2 * rows);
  check_rows("statistics", statistics, hidden, 5 * rows);
  const std::int64_t bytes = static_cast<std::int64_t>(sample_from_hidden_workspace(rows, vocab));
  check_rows("workspace", workspace, hidden, workspace.numel());
  check(workspace.dtype() == DType::UInt8 && workspace.numel() >= bytes, "workspace must be uint8 with at least ",
        bytes, " elements, got ", workspace.dtype(), " of shape ", workspace.shape());
  check(reinterpret_cast<std::uintptr_t>(workspace.raw_data()) % 16 == 0, "workspace must be 16-byte aligned");

  SampleFromHidden op{};
  op.hidden = hidden.raw_data();
  op.weight = weight.raw_data();
  op.bias = bias ? bias->raw_data() : nullptr;
  op.type = logit_type(hidden.dtype());
  op.hidden_stride = hidden.stride(0);
  op.weight_stride = weight.stride(0);
  op.rows = rows;
  op.vocab = vocab;
  op.dim = dim;
  op.masked = masked ? masked->data<const bool>() : nullptr;
  op.temperature = per_row("temperature", temperature, hidden, rows);
  op.seed = per_row("seed", seed, hidden, rows);
  op.position = position ? position->data<const std::int64_t>() : nullptr;
  op.step = per_row("step", step, hidden, rows);
  op.statistics_temperature = per_row("statistics_temperature", statistics_temperature, hidden, rows);
  op.softcap = softcap;
  op.allowed = allowed ? allowed->data<const std::int32_t>() : nullptr;
  op.allowed_stride = allowed ? allowed->stride(0) : 0;
  op.ids = ids.data<std::int64_t>();
  op.statistics = statistics.data<float>();
  op.workspace = workspace.raw_data();
  return op;
}

CUstream_st* stream_of(std::uintptr_t stream) { return reinterpret_cast<CUstream_st*>(stream); }

void head_parts_cuda(const SampleFromHidden& op, std::uintptr_t stream) {
  check(head_parts_takes(op), "head_parts takes float16 or bfloat16, in rows that begin at multiples of 16 bytes");
  head_parts(op, stream_of(stream));
}

void logit_parts_cuda(const SampleFromHidden& op, const TensorView& logits, std::int64_t first, std::uintptr_t stream) {
  check(logits.is_cuda() && logits.ndim() == 2, "logits must be [rows, tokens] on a CUDA device");
  const std::int64_t count = logits.size(1);
  check_matrix("logits", logits, logits, op.rows, count);
  check(first >= 0 && first % 128 == 0 && first + count <= op.vocab && (count % 128 == 0 || first + count == op.vocab),
        "logits must be whole tiles of 128 tokens, got tokens ", first, " to ", first + count, " of ", op.vocab);
  logit_parts(op, {logits.raw_data(), logit_type(logits.dtype()), logits.stride(0), first, count}, stream_of(stream));
}

void head_finish_cuda(const SampleFromHidden& op, std::uintptr_t stream) { head_finish(op, stream_of(stream)); }

// logits [outer, inner, count], probabilities [outer * inner, count], logsumexp [outer * inner] float32
void weigh_cuda(const TensorView& logits, const std::optional<TensorView>& masked,
                const RowArgument<float>& temperature, float softcap, const TensorView& logsumexp,
                const TensorView& probabilities, std::uintptr_t stream) {
  check(logits.is_cuda(), "weigh: logits must be on a CUDA device");
  check(logits.ndim() == 3 && (logits.size(2) <= 1 || logits.stride(2) == 1),
        "weigh: logits must be [outer, inner, tokens] with stride 1 along the tokens, got ", logits.shape());
  const std::int64_t inner = logits.size(1), rows = logits.size(0) * inner, count = logits.size(2);
  check(rows < kLimit && count < kLimit, "weigh: rows and tokens must be below 2^31, got ", logits.shape());
  if (masked) check_rows("masked", *masked, logits, rows);
  check_rows("logsumexp", logsumexp, logits, rows);
  check_matrix("probabilities", probabilities, logits, rows, count);

  Weigh op{};
  op.logits = logits.raw_data();
  op.logit_type = logit_type(logits.dtype());
  op.outer_stride = logits.stride(0);
  op.inner_stride = logits.stride(1);
  op.rows = rows;
  op.inner = inner;
  op.count = count;
  op.masked = masked ? masked->data<const bool>() : nullptr;
  op.temperature = per_row("temperature", temperature, logits, rows);
  op.softcap = softcap;
  op.logsumexp = logsumexp.data<const float>();
  op.probabilities = probabilities.raw_data();
  op.probability_type = logit_type(probabilities.dtype());
  op.probability_stride = probabilities.stride(0);
  weigh(op, stream_of(stream));
}

// The object borrows the memory of its tensors, and so keeps them all: arguments 2 to 15, self being the first.
template <int... kArguments>
void bind_sample_from_hidden(py::module_& m, std::integer_sequence<int, kArguments...>) {
  const py::call_guard<py::gil_scoped_release> released;
  py::class_<SampleFromHidden>(m, "SampleFromHidden")
      .def(py::init(&sample_from_hidden_of), py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("masked"),
           py::arg("temperature"), py::arg("seed"), py::arg("position"), py::arg("step"),
           py::arg("statistics_temperature"), py::arg("softcap"), py::arg("allowed"), py::arg("ids"),
           py::arg("statistics"), py::arg("workspace"), py::keep_alive<1, kArguments + 2>()...)
      .def("head_parts_takes", &head_parts_takes, "Whether head_parts can take these tensors.")
      .def("head_parts", &head_parts_cuda, py::arg("stream"), released, "The parts of all tiles, by the fused head.")
      .def("logit_parts", &logit_parts_cuda, py::arg("logits"), py::arg("first"), py::arg("stream"), released,
           "The parts of tiles whose logits are there: of the tokens from first on.")
      .def("finish", &head_finish_cuda, py::arg("stream"), released, "The results, from the parts of all tiles.");
}

}  // namespace

void bind_head(py::module_& m) {
  m.def("sample_from_hidden_workspace", &sample_from_hidden_workspace, py::arg("rows"), py::arg("vocab"),
        "The bytes of the workspace that sample_from_hidden needs.");
  bind_sample_from_hidden(m, std::make_integer_sequence<int, 14>{});
  m.def("weigh", &weigh_cuda, py::arg("logits"), py::arg("masked"), py::arg("temperature"), py::arg("softcap"),
        py::arg("logsumexp"), py::arg("probabilities"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace diffusion_runtime
