// diffusion_runtime._C: one m.def per op, nothing else.
#include "attention.h"
#include "commit.h"
#include "decoder_layers.h"
#include "head.h"
#include "instruction_set.h"
#include "norm.h"
#include "product.h"
#include "sample_tokens.h"
#include "weigh.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "C++ kernels for CPU tensors. Call them through diffusion_runtime.ops.";
  m.def("instruction_sets", &diffusion_runtime::instruction_sets, "Those that can run here, the fastest first.");
  m.def("attention", &diffusion_runtime::attention_cpu, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("prefix_key"), py::arg("prefix_value"), py::arg("prefix_lengths"), py::arg("page_table"),
        py::arg("mask"), py::arg("key_starts"), py::arg("key_ends"), py::arg("cu_seqlens"), py::arg("cu_seqlens_k"),
        py::arg("chosen"), py::arg("left"), py::arg("right"), py::arg("block"), py::arg("prefix_window"),
        py::arg("offset"), py::arg("max_length"), py::arg("scale"), py::arg("softcap"), py::arg("out"),
        py::arg("logsumexp"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def("sample_tokens", &diffusion_runtime::sample_tokens_cpu, py::arg("logits"), py::arg("masked"),
        py::arg("temperature"), py::arg("seed"), py::arg("position"), py::arg("step"),
        py::arg("statistics_temperature"), py::arg("softcap"), py::arg("allowed"), py::arg("top_k"), py::arg("top_p"),
        py::arg("min_p"), py::arg("restricted"), py::arg("ids"), py::arg("statistics"), py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());
  m.def("head_workspace", &diffusion_runtime::head_workspace, py::arg("rows"), py::arg("vocab"),
        py::arg("temperature"));
  m.def("read_head_tile", &diffusion_runtime::read_head_tile, py::arg("logits"), py::arg("first"), py::arg("vocab"),
        py::arg("temperature"), py::arg("statistics_temperature"), py::arg("softcap"), py::arg("allowed"),
        py::arg("workspace"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def("sample_head", &diffusion_runtime::sample_head, py::arg("hidden"), py::arg("weight"), py::arg("bias"),
        py::arg("temperature"), py::arg("seed"), py::arg("position"), py::arg("step"),
        py::arg("statistics_temperature"), py::arg("softcap"), py::arg("allowed"), py::arg("workspace"), py::arg("ids"),
        py::arg("statistics"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def("weigh", &diffusion_runtime::weigh_cpu, py::arg("logits"), py::arg("temperature"), py::arg("softcap"),
        py::arg("masked"), py::arg("logsumexp"), py::arg("out"), py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());
  m.def("commit_step", &diffusion_runtime::commit_step_cpu, py::arg("masked"), py::arg("score"), py::arg("rule"),
        py::arg("bound"), py::arg("bound_value"), py::arg("tokens"), py::arg("candidates"), py::arg("vocab"),
        py::arg("seed"), py::arg("seed_value"), py::arg("position"), py::arg("step"), py::arg("step_value"),
        py::arg("commit_mask"), py::arg("after"), py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm", &diffusion_runtime::rms_norm_cpu, py::arg("x"), py::arg("weight"), py::arg("eps"),
        py::arg("weight_offset"), py::arg("round_before_weight"), py::arg("out"), py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());
  m.def("qk_norm_rope", &diffusion_runtime::qk_norm_rope_cpu, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("cos"), py::arg("sin"), py::arg("query_weight"), py::arg("key_weight"), py::arg("positions"),
        py::arg("cache_key"), py::arg("cache_value"), py::arg("cache_positions"), py::arg("normalized"), py::arg("eps"),
        py::arg("weight_offset"), py::arg("round_before_weight"), py::arg("style"), py::arg("query_out"),
        py::arg("key_out"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def("decoder_layers", &diffusion_runtime::decoder_layers_cpu, py::arg("x"), py::arg("layers"), py::arg("norm"),
        py::arg("eps"), py::arg("head_dim"), py::arg("cos"), py::arg("sin"), py::arg("pool"), py::arg("places"),
        py::arg("prefix_lengths"), py::arg("page_table"), py::arg("own_keys"), py::arg("key_ends"), py::arg("chosen"),
        py::arg("left"), py::arg("right"), py::arg("block"), py::arg("prefix_window"), py::arg("offset"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def("product", &diffusion_runtime::product_cpu, py::arg("rows"), py::arg("weight"), py::arg("bias"), py::arg("out"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
}
