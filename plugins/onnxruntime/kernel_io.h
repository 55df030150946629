// What the ops share: errors as exceptions inside, as statuses outside; tensors with their shapes; attributes.
#pragma once

#include <array>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "checked.h"
#include "ort_abi.h"
#include "require.h"

namespace umv2::ort {

inline void check(const Api& api, Status* status, const char* what) {
  if (status == nullptr) return;
  const std::string message = std::string("ONNX Runtime failed: ") + what + ": " + api.error_message(status);
  api.release_status(status);
  throw Error(message);
}

// Runs `body`; no exception may cross the C interface.
template <typename Body>
Status* guarded(const Api& api, const char* op, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return api.create_status(kInvalidArgument, (std::string("umv2::") + op + ": " + error.what()).c_str());
  }
}

// The sizes of a tensor, in place: a vector for each input would be an allocation for each.
class Shape {
 public:
  static constexpr size_t kMostAxes = 4;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) : rank_(sizes.size()) {
    size_t axis = 0;
    for (const int64_t size : sizes) sizes_[axis++] = size;
  }

  size_t size() const { return rank_; }
  int64_t operator[](size_t axis) const { return sizes_[axis]; }
  // For the runtime to fill in; no tensor of the contract has more axes.
  int64_t* resize(size_t rank) {
    require(rank <= kMostAxes, "a tensor of ", rank, " axes is given, at most ", kMostAxes, " are expected");
    rank_ = rank;
    return sizes_.data();
  }
  int64_t count() const { return product_of({at(0), at(1), at(2), at(3)}, "the number of elements"); }
  bool operator==(const Shape& other) const { return rank_ == other.rank_ && sizes_ == other.sizes_; }

 private:
  int64_t at(size_t axis) const { return axis < rank_ ? sizes_[axis] : 1; }

  std::array<int64_t, kMostAxes> sizes_{};
  size_t rank_ = 0;
};

struct Tensor {
  ElementType type = kUndefined;
  Shape sizes{};
  const void* data = nullptr;

  int64_t count() const { return sizes.count(); }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// Its shape, for messages.
inline std::ostream& operator<<(std::ostream& out, const Tensor& tensor) {
  out << "[";
  for (size_t i = 0; i < tensor.sizes.size(); ++i) out << (i ? ", " : "") << tensor.sizes[i];
  return out << "]";
}

inline Tensor tensor_of(const Api& api, const Value* value) {
  TensorInfo* info = nullptr;
  check(api, api.tensor_info(value, &info), "tensor info");
  int type = 0;
  size_t rank = 0;
  Tensor tensor;
  Status* status = api.element_type(info, &type);
  if (!status) status = api.rank(info, &rank);
  if (!status && rank <= Shape::kMostAxes) status = api.dimensions(info, tensor.sizes.resize(rank), rank);
  api.release_tensor_info(info);
  check(api, status, "shape");
  tensor.sizes.resize(rank);
  tensor.type = static_cast<ElementType>(type);
  void* data = nullptr;
  check(api, api.tensor_data(const_cast<Value*>(value), &data), "tensor data");
  tensor.data = data;
  return tensor;
}

inline Tensor input(const Api& api, const KernelContext* context, size_t index) {
  const Value* value = nullptr;
  check(api, api.input(context, index, &value), "input");
  require(value != nullptr, "input ", index, " is missing");
  return tensor_of(api, value);
}

// Input `index` of a node where it is a constant of the model; it lives as long as the session.
inline std::optional<Tensor> constant_input(const Api& api, const KernelInfo* info, size_t index) {
  int is_constant = 0;
  const Value* value = nullptr;
  check(api, api.constant_input(info, index, &is_constant, &value), "constant input");
  if (!is_constant || value == nullptr) return std::nullopt;
  return tensor_of(api, value);
}

template <typename T>
T* output(const Api& api, KernelContext* context, size_t index, std::initializer_list<int64_t> sizes) {
  product_of(sizes, "the number of elements of an output");
  Value* value = nullptr;
  check(api, api.output(context, index, sizes.begin(), sizes.size(), &value), "output");
  void* data = nullptr;
  check(api, api.tensor_data(value, &data), "output data");
  return static_cast<T*>(data);
}

inline int64_t attribute(const Api& api, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(api, api.attribute_int(info, name, &value), name);
  return value;
}

// The same, with the default of the contract for a node that leaves it out; one of another type stays an error.
inline int64_t attribute(const Api& api, const KernelInfo* info, const char* name, int64_t fallback) {
  int64_t value = 0;
  Status* status = api.attribute_int(info, name, &value);
  if (status == nullptr) return value;
  // The runtime has one error code for all that can go wrong; its message tells them apart.
  const bool missing = std::strstr(api.error_message(status), "No attribute with name") != nullptr;
  if (!missing) check(api, status, name);
  api.release_status(status);
  return fallback;
}

inline float float_attribute(const Api& api, const KernelInfo* info, const char* name) {
  float value = 0.0f;
  check(api, api.attribute_float(info, name, &value), name);
  return value;
}

inline std::vector<int64_t> list_attribute(const Api& api, const KernelInfo* info, const char* name) {
  size_t count = 0;
  check(api, api.attribute_ints(info, name, nullptr, &count), name);
  std::vector<int64_t> values(count);
  check(api, api.attribute_ints(info, name, values.data(), &count), name);
  return values;
}

inline std::string text_attribute(const Api& api, const KernelInfo* info, const char* name) {
  size_t size = 0;
  check(api, api.attribute_string(info, name, nullptr, &size), name);
  std::string value(size, '\0');
  check(api, api.attribute_string(info, name, value.data(), &size), name);
  value.resize(std::strlen(value.c_str()));
  return value;
}

}  // namespace umv2::ort
