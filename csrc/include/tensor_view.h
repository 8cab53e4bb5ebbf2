// TensorView: a borrowed torch tensor, read through DLPack, so that no torch header is needed here.
//
// A bound function takes TensorView arguments, or std::optional<TensorView> where None is allowed. The caller's own
// reference keeps the tensor alive for the length of the call; what is not a tensor is a TypeError. A tensor that
// requires grad is viewed like any other: gradients are the op's business. No data are copied and nothing synchronises.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // std::optional

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace diffusion_runtime {

// The DLPack C ABI (dmlc/dlpack, unversioned capsule): layout only, no code.
struct DLDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null means compact row-major
  std::uint64_t byte_offset;
};

inline constexpr int kCPU = 1;   // kDLCPU
inline constexpr int kCUDA = 2;  // kDLCUDA

// check(logits.ndim() == 2, "sample_tokens: logits must be [rows, vocab], got ", logits.shape())
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());  // pybind11 turns this into ValueError
}

// DLPack's type code and bits as one number, so that a dtype can be switched over.
enum class DType : int {
  Int32 = 0x0020,
  Int64 = 0x0040,
  UInt8 = 0x0108,
  Float16 = 0x0210,
  Float32 = 0x0220,
  Float64 = 0x0240,
  BFloat16 = 0x0410,
  Bool = 0x0608,
};

inline std::string name_of(DType dtype) {
  switch (dtype) {
    case DType::Int32: return "int32";
    case DType::Int64: return "int64";
    case DType::UInt8: return "uint8";
    case DType::Float16: return "float16";
    case DType::Float32: return "float32";
    case DType::Float64: return "float64";
    case DType::BFloat16: return "bfloat16";
    case DType::Bool: return "bool";
  }
  const int value = static_cast<int>(dtype);
  return "dtype(DLPack code " + std::to_string(value >> 8) + ", " + std::to_string(value & 0xff) + " bits)";
}

inline std::ostream& operator<<(std::ostream& out, DType dtype) { return out << name_of(dtype); }

// Which dtypes a C++ element type may view. A kernel's own type joins by specialising it beside its definition:
//   template <> struct Views<__half> { static constexpr bool any(DType d) { return d == DType::Float16; } };
template <typename T>
struct Views;

template <DType... accepted>
struct ViewsOneOf {
  static constexpr bool any(DType dtype) { return ((dtype == accepted) || ...); }
};

template <>
struct Views<std::int32_t> : ViewsOneOf<DType::Int32> {};
template <>
struct Views<std::int64_t> : ViewsOneOf<DType::Int64> {};
template <>
struct Views<std::uint8_t> : ViewsOneOf<DType::UInt8, DType::Bool> {};
template <>
struct Views<bool> : ViewsOneOf<DType::Bool> {};
template <>
struct Views<std::uint16_t> : ViewsOneOf<DType::Float16, DType::BFloat16> {};  // the raw bits
template <>
struct Views<float> : ViewsOneOf<DType::Float32> {};
template <>
struct Views<double> : ViewsOneOf<DType::Float64> {};

class TensorView {
 public:
  static constexpr int kMaxDims = 8;

  TensorView() = default;
  // Copies what the capsule says, so that the view outlives it (inside a std::optional or std::variant it has to).
  explicit TensorView(const DLTensor& tensor)
      : data_(static_cast<char*>(tensor.data) + tensor.byte_offset),
        device_(tensor.device),
        dtype_(static_cast<DType>(tensor.dtype.code << 8 | tensor.dtype.bits)),
        ndim_(tensor.ndim) {
    check(ndim_ <= kMaxDims, "a tensor of at most ", kMaxDims, " dimensions is expected, got ", ndim_);
    std::int64_t compact = 1;
    for (int d = ndim_ - 1; d >= 0; --d) {
      shape_[d] = tensor.shape[d];
      strides_[d] = tensor.strides != nullptr ? tensor.strides[d] : compact;
      compact *= shape_[d];
    }
  }

  int ndim() const { return ndim_; }
  DType dtype() const { return dtype_; }
  int device_type() const { return device_.type; }
  int device_id() const { return device_.id; }
  bool is_cpu() const { return device_type() == kCPU; }
  bool is_cuda() const { return device_type() == kCUDA; }

  // A negative dim counts from the end, as in torch.
  std::int64_t size(int dim) const { return shape_[index(dim)]; }

  // In elements. The stride of a dimension of size 0 or 1 may be anything.
  std::int64_t stride(int dim) const { return strides_[index(dim)]; }

  std::int64_t numel() const {
    std::int64_t product = 1;
    for (int d = 0; d < ndim_; ++d) product *= shape_[d];
    return product;
  }

  bool is_contiguous() const {
    if (numel() == 0) return true;
    std::int64_t expected = 1;
    for (int d = ndim_ - 1; d >= 0; --d) {
      if (shape_[d] != 1 && strides_[d] != expected) return false;
      expected *= shape_[d];
    }
    return true;
  }

  // For messages: "[2, 64]". Made when it is read: size() is called far more often than it fails.
  struct Shape {
    const std::int64_t* sizes;
    int ndim;
    friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
      out << "[";
      for (int d = 0; d < shape.ndim; ++d) out << (d ? ", " : "") << shape.sizes[d];
      return out << "]";
    }
  };
  Shape shape() const { return {shape_, ndim_}; }

  void* raw_data() const { return data_; }

  template <typename T>
  T* data() const {
    check(Views<std::remove_cv_t<T>>::any(dtype()), "a kernel cannot view the ", dtype(), " tensor of shape ", shape(),
          " as the type it was written for");
    return static_cast<T*>(raw_data());
  }

 private:
  int index(int dim) const {
    const int wrapped = dim < 0 ? dim + ndim_ : dim;
    check(wrapped >= 0 && wrapped < ndim_, "dimension ", dim, " of a tensor of shape ", shape());
    return wrapped;
  }

  void* data_ = nullptr;
  DLDevice device_{};
  DType dtype_{};
  int ndim_ = 0;
  std::int64_t shape_[kMaxDims]{};
  std::int64_t strides_[kMaxDims]{};
};

}  // namespace diffusion_runtime

namespace pybind11::detail {

template <>
struct type_caster<diffusion_runtime::TensorView> {
  PYBIND11_TYPE_CASTER(diffusion_runtime::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    static gil_safe_call_once_and_store<object> tensor_type;
    static gil_safe_call_once_and_store<object> to_dlpack;
    const object& type = tensor_type.call_once_and_store_result(find_tensor_type).get_stored();
    if (!isinstance(source, type)) return false;  // pybind11 reports the signature
    object capsule;                               // never renamed, so its destructor frees what it holds
    try {
      capsule = to_dlpack.call_once_and_store_result(find_to_dlpack).get_stored()(source);
    } catch (error_already_set& error) {
      throw type_error(error.what());  // a dtype, layout or device that DLPack has no word for
    }
    const auto* tensor = static_cast<diffusion_runtime::DLTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (tensor == nullptr) throw error_already_set();
    value = diffusion_runtime::TensorView(*tensor);
    return true;
  }

 private:
  static object find_tensor_type() { return module_::import("torch").attr("Tensor"); }

  // The private function costs 0.5 us, Tensor.__dlpack__ nearly 3; where torch has dropped it, the public one serves.
  static object find_to_dlpack() {
    const module_ torch_c = module_::import("torch._C");
    if (hasattr(torch_c, "_to_dlpack")) return torch_c.attr("_to_dlpack");
    return module_::import("torch.utils.dlpack").attr("to_dlpack");
  }
};

}  // namespace pybind11::detail
