// The bindings of rms_norm and qk_norm_rope. All tensors are on one GPU, which must be the current one; norm_binding.h
// says what they are.
#include "bindings.h"
#include "norm.cuh"
#include "norm_binding.h"

namespace py = pybind11;

namespace diffusion_runtime {
namespace {

void rms_norm_cuda(const TensorView& x, const std::optional<TensorView>& weight, float eps, float weight_offset,
                   bool round_before_weight, const TensorView& out, std::uintptr_t stream) {
  check(x.is_cuda(), "rms_norm: x must be on a CUDA device");
  const RmsNorm op = rms_norm_of(x, weight, eps, weight_offset, round_before_weight, out);
  constexpr std::int64_t kLimit = std::int64_t{1} << 31;
  check(op.rows < kLimit && op.size < kLimit, "rms_norm: rows and size must be below 2^31, got ", x.shape());
  rms_norm(op, reinterpret_cast<CUstream_st*>(stream));
}

void qk_norm_rope_cuda(const TensorView& query, const TensorView& key, const std::optional<TensorView>& value,
                       const TensorView& cos, const TensorView& sin, const std::optional<TensorView>& query_weight,
                       const std::optional<TensorView>& key_weight, const std::optional<TensorView>& positions,
                       const std::optional<TensorView>& cache_key, const std::optional<TensorView>& cache_value,
                       const std::optional<TensorView>& cache_positions, bool normalized, float eps,
                       float weight_offset, bool round_before_weight, int style, const TensorView& query_out,
                       const std::optional<TensorView>& key_out, std::uintptr_t stream) {
  check(query.is_cuda(), "qk_norm_rope: query must be on a CUDA device");
  check(!query_weight || !key_weight || query_weight->dtype() == key_weight->dtype(),
        "qk_norm_rope: query_weight and key_weight must be of one dtype");
  qk_norm_rope(
      qk_norm_rope_of(query, key, value, cos, sin, query_weight, key_weight, positions, cache_key, cache_value,
                      cache_positions, normalized, eps, weight_offset, round_before_weight, style, query_out, key_out),
      reinterpret_cast<CUstream_st*>(stream));
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("rms_norm", &rms_norm_cuda, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("weight_offset"),
        py::arg("round_before_weight"), py::arg("out"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("qk_norm_rope", &qk_norm_rope_cuda, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("cos"),
        py::arg("sin"), py::arg("query_weight"), py::arg("key_weight"), py::arg("positions"), py::arg("cache_key"),
        py::arg("cache_value"), py::arg("cache_positions"), py::arg("normalized"), py::arg("eps"),
        py::arg("weight_offset"), py::arg("round_before_weight"), py::arg("style"), py::arg("query_out"),
        py::arg("key_out"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace diffusion_runtime
