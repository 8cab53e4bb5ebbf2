// What the files that bind CUDA kernels share.
#pragma once

#include "row_setting.h"
#include "sample_tokens.cuh"

namespace diffusion_runtime {

template <class T>
PerRow<T> per_row(const char* name, const RowArgument<T>& argument, const TensorView& beside, std::int64_t rows) {
  const RowSetting<T> setting = row_setting(name, argument, beside, rows);
  return {setting.values, setting.value};
}

// A matrix [rows, columns] beside another tensor, with stride 1 along its rows.
inline void check_matrix(const char* name, const TensorView& tensor, const TensorView& beside, std::int64_t rows,
                         std::int64_t columns) {
  check(tensor.device_type() == beside.device_type() && tensor.device_id() == beside.device_id(), name,
        " must be on the device of the other tensors");
  check(tensor.ndim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
            (columns == 1 || tensor.stride(1) == 1),
        name, " must be [", rows, ", ", columns, "] with stride 1 along the last dimension, got ", tensor.shape());
}

void bind_attention(pybind11::module_& module);  // module_attention.cpp
void bind_head(pybind11::module_& module);       // module_head.cpp
void bind_norm(pybind11::module_& module);       // module_norm.cpp

}  // namespace diffusion_runtime
