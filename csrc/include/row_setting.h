// A per-row setting of an op: one value for every row, or a tensor with one for each.
#pragma once

#include <pybind11/stl.h>  // std::variant

#include <variant>

#include "logit_type.h"
#include "tensor_view.h"

namespace diffusion_runtime {

inline LogitType logit_type(DType dtype) {
  switch (dtype) {
    case DType::Float32: return LogitType::Float32;
    case DType::Float16: return LogitType::Float16;
    case DType::BFloat16: return LogitType::BFloat16;
    default: check(false, "logits must be float32, float16 or bfloat16, got ", dtype);
  }
  return LogitType::Float32;
}

template <class T>
struct RowSetting {
  const T* values;  // null: `value` for every row
  T value;
  T operator[](std::int64_t row) const { return values != nullptr ? values[row] : value; }
};

template <class T>
using RowArgument = std::variant<TensorView, T>;

// Checks that a tensor is contiguous, on the device of `beside` and has one element for each row.
inline void check_rows(const char* name, const TensorView& tensor, const TensorView& beside, std::int64_t rows) {
  check(tensor.device_type() == beside.device_type() && tensor.device_id() == beside.device_id(), name,
        " must be on the device of the logits");
  check(tensor.numel() == rows && tensor.is_contiguous(), name, " must be contiguous with ", rows,
        " elements, got shape ", tensor.shape());
}

template <class T>
RowSetting<T> row_setting(const char* name, const RowArgument<T>& argument, const TensorView& beside,
                          std::int64_t rows) {
  if (const T* value = std::get_if<T>(&argument)) return {nullptr, *value};
  const TensorView& tensor = std::get<TensorView>(argument);
  check_rows(name, tensor, beside, rows);
  return {tensor.data<const T>(), T{}};
}

}  // namespace diffusion_runtime
