// Tensors as the bindings see them: one check of dtype, shape, device and contiguity per argument, and how outputs are
// made.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace sg::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t ANY = -1;

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

template <typename Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + (size == ANY ? "*" : std::to_string(size));
  return text + "]";
}

inline void check(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool good = tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t dim = 0; good && dim < shape.size(); ++dim) {
    good = shape.begin()[dim] == ANY || tensor.size(static_cast<int64_t>(dim)) == shape.begin()[dim];
  }
  if (good) return;
  throw std::invalid_argument(std::string(name) + " must be a contiguous " + dtype_name(dtype) +
                              " CPU tensor of shape " + shape_name(shape) + "; got " +
                              (tensor.is_contiguous() ? "" : "a strided ") + dtype_name(tensor.scalar_type()) + " " +
                              shape_name(tensor.sizes()));
}

inline const float* f32(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, ScalarType::Float, shape);
  return static_cast<const float*>(tensor.data_ptr());
}

inline const int32_t* i32(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, ScalarType::Int, shape);
  return static_cast<const int32_t*>(tensor.data_ptr());
}

inline const int64_t* i64(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, ScalarType::Long, shape);
  return static_cast<const int64_t*>(tensor.data_ptr());
}

// 0 for fp32, 1 for bf16; ValueError for any other.
inline int weight_dtype(ScalarType dtype, const char* name) {
  if (dtype == ScalarType::Float) return 0;
  if (dtype == ScalarType::BFloat16) return 1;
  throw std::invalid_argument(std::string(name) + " must be float32 or bfloat16; got " + dtype_name(dtype));
}

inline int64_t size_of(const Tensor& tensor, int64_t dim) { return dim < tensor.dim() ? tensor.size(dim) : 0; }

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape.begin()[i];
  }
  int32_t code = 0;
  switch (dtype) {
    case ScalarType::Float:
      code = aoti_torch_dtype_float32();
      break;
    case ScalarType::BFloat16:
      code = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Int:
      code = aoti_torch_dtype_int32();
      break;
    case ScalarType::Long:
      code = aoti_torch_dtype_int64();
      break;
    default:
      code = aoti_torch_dtype_uint8();
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides.data(),
                                                  code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline int64_t tiles(int64_t num_out) { return (num_out + 15) / 16; }

}  // namespace sg::bindings
