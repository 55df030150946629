// What the ops share: errors as exceptions inside, as statuses outside; tensors with their shapes; fp16 in and out.
#pragma once

#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace umv2::ort {

// A failed call of the runtime, or an input that an op refuses; becomes the status that the op returns.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check(const Api& api, Status* status, const char* what) {
  if (status == nullptr) return;
  api.release_status(status);
  throw Error(std::string("ONNX Runtime failed: ") + what);
}

// Refuses what does not hold. The message is put together from its parts, tensors by their shapes, only then: in a call of
// 20 us the strings of a dozen checks that pass would show.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (void)(message << ... << parts);
  throw Error(message.str());
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

struct Tensor {
  ElementType type;
  std::vector<int64_t> sizes;
  const void* data;

  int64_t count() const {
    int64_t product = 1;
    for (int64_t size : sizes) product *= size;
    return product;
  }
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
  Status* status = api.element_type(info, &type);
  if (!status) status = api.rank(info, &rank);
  Tensor tensor{kUndefined, std::vector<int64_t>(rank), nullptr};
  if (!status) status = api.dimensions(info, tensor.sizes.data(), rank);
  api.release_tensor_info(info);
  check(api, status, "shape");
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

template <typename T>
T* output(const Api& api, KernelContext* context, size_t index, const std::vector<int64_t>& sizes) {
  Value* value = nullptr;
  check(api, api.output(context, index, sizes.data(), sizes.size(), &value), "output");
  void* data = nullptr;
  check(api, api.tensor_data(value, &data), "output data");
  return static_cast<T*>(data);
}

inline int64_t attribute(const Api& api, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(api, api.attribute_int(info, name, &value), name);
  return value;
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

// IEEE half precision, rounded to nearest even.
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

// The elements of an fp32 or fp16 tensor as floats: the tensor itself, or a converted copy that lives in `buffer`.
inline const float* floats(const Tensor& tensor, std::vector<float>& buffer, const char* name) {
  if (tensor.type == kFloat) return tensor.as<float>();
  require(tensor.type == kFloat16, name, " must be float or float16");
  const uint16_t* halves = tensor.as<uint16_t>();
  buffer.resize(static_cast<size_t>(tensor.count()));
  for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = half_to_float(halves[i]);
  return buffer.data();
}

// NaN compares false with everything: which rows win would depend on their order.
inline void require_no_nan(const float* values, int64_t count, const char* name) {
  // No early exit and no sum: the compiler makes vectors of it. A sum, whose order it must keep, took 110 us for 64 tokens.
  unsigned found = 0;
  for (int64_t i = 0; i < count; ++i) found |= values[i] != values[i] ? 1u : 0u;
  if (found == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    require(!std::isnan(values[i]), name, " holds NaN at element ", i);
  }
}

// Runs body(i) for i in [0, total) on the session's own threads. The first exception is thrown again once all of them are
// done: thrown through the runtime it would leave the others with what this frame has destroyed.
template <typename Body>
void parallel_for(const Api& api, const KernelContext* context, int64_t total, const Body& body) {
  if (total == 0) return;
  if (total == 1) return body(0);
  struct Tasks {
    const Body& body;
    std::mutex mutex;
    std::exception_ptr error;
  } tasks{body, {}, nullptr};
  const auto call = [](void* data, size_t i) {
    Tasks& all = *static_cast<Tasks*>(data);
    try {
      all.body(static_cast<int64_t>(i));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(all.mutex);
      if (!all.error) all.error = std::current_exception();
    }
  };
  check(api, api.parallel_for(context, call, static_cast<size_t>(total), &tasks), "parallel for");
  if (tasks.error) std::rethrow_exception(tasks.error);
}

}  // namespace umv2::ort
