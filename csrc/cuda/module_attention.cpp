// The binding of attention. All tensors are on one GPU, which must be the current one; attention_binding.h says what
// they are.
#include "attention.cuh"
#include "attention_binding.h"
#include "attention_hopper.cuh"
#include "bindings.h"

namespace py = pybind11;

namespace diffusion_runtime {
namespace {

// A checked call, and which of the two kernels takes it: that depends on the call, not on what else is in its batch.
struct AttentionCall {
  AttentionArguments arguments;
  bool on_hopper;

  AttentionCall(const TensorView& query, const TensorView& key, const TensorView& value, const MaybeTensor& prefix_key,
                const MaybeTensor& prefix_value, const MaybeTensor& prefix_lengths, const MaybeTensor& page_table,
                const MaybeTensor& mask, const MaybeTensor& key_starts, const MaybeTensor& key_ends,
                const MaybeTensor& cu_seqlens, const MaybeTensor& cu_seqlens_k, const MaybeTensor& chosen, int left,
                int right, int block, int prefix_window, int offset, int max_length, double scale, double softcap,
                const TensorView& out, const TensorView& logsumexp)
      : arguments(attention_arguments(query, key, value, prefix_key, prefix_value, prefix_lengths, page_table, mask,
                                      key_starts, key_ends, cu_seqlens, cu_seqlens_k, chosen, left, right, block,
                                      prefix_window, offset, max_length, scale, softcap, out, logsumexp)) {
    check(query.is_cuda(), "attention: the tensors must be on a CUDA device");
    on_hopper = hopper_takes(arguments);
  }

  std::size_t workspace() const {
    return on_hopper ? attention_hopper_workspace(arguments) : attention_workspace(arguments);
  }

  void run(const TensorView& memory, std::uintptr_t stream) const {
    const std::size_t bytes = workspace();
    check(memory.is_cuda() && memory.dtype() == DType::UInt8 && memory.is_contiguous() &&
              static_cast<std::size_t>(memory.numel()) >= bytes,
          "workspace must be contiguous uint8 with at least ", bytes, " elements, got ", memory.shape());
    check(reinterpret_cast<std::uintptr_t>(memory.raw_data()) % 16 == 0, "workspace must be 16-byte aligned");
    CUstream_st* const on = reinterpret_cast<CUstream_st*>(stream);
    if (on_hopper)
      launch_attention_hopper(arguments, memory.raw_data(), on);
    else
      launch_attention(arguments, memory.raw_data(), on);
  }
};

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<AttentionCall>(m, "Attention")
      .def(py::init<const TensorView&, const TensorView&, const TensorView&, const MaybeTensor&, const MaybeTensor&,
                    const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                    const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, int, int, int, int, int, int, double,
                    double, const TensorView&, const TensorView&>(),
           py::arg("query"), py::arg("key"), py::arg("value"), py::arg("prefix_key"), py::arg("prefix_value"),
           py::arg("prefix_lengths"), py::arg("page_table"), py::arg("mask"), py::arg("key_starts"),
           py::arg("key_ends"), py::arg("cu_seqlens"), py::arg("cu_seqlens_k"), py::arg("chosen"), py::arg("left"),
           py::arg("right"), py::arg("block"), py::arg("prefix_window"), py::arg("offset"), py::arg("max_length"),
           py::arg("scale"), py::arg("softcap"), py::arg("out"), py::arg("logsumexp"))
      .def_readonly("on_hopper", &AttentionCall::on_hopper)
      .def("workspace", &AttentionCall::workspace)
      .def("run", &AttentionCall::run, py::arg("workspace"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace diffusion_runtime
