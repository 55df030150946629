// What both plugins share: errors as exceptions inside, as entries of the log and codes outside; attributes; shapes.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <ostream>
#include <string>

#include "kernel_archive.h"
#include "require.h"

// Where a template of another namespace finds it.
namespace nvinfer1 {

// Its shape, for messages.
inline std::ostream& operator<<(std::ostream& out, const Dims& dims) {
  out << "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) out << (i ? ", " : "") << dims.d[i];
  return out << "]";
}

}  // namespace nvinfer1

namespace umv2::tensorrt {

// To the log of TensorRT, or to stderr where it gave none.
void log_error(const std::string& message) noexcept;

// Runs `body`; no exception may cross TensorRT's interface. 0 for success.
template <typename Body>
int32_t guarded(const char* op, const Body& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    log_error(std::string("umv2::") + op + ": " + error.what());
    return 1;
  }
}

// Attributes of a plugin: of the ONNX node when an engine is built, those that it serialised when one is loaded.
class Fields {
 public:
  explicit Fields(const nvinfer1::PluginFieldCollection* collection) : collection_(collection) {}

  // The ONNX parser writes integers in the type that the creator names, others write 64 bits.
  int32_t integer(const char* name) const;
  // The same, of an attribute that may be left out.
  int32_t integer(const char* name, int32_t otherwise) const;
  // Without the zero that the ONNX parser counts as part of it; what is serialised has none.
  std::string text(const char* name) const;

 private:
  // nullptr where there is none.
  const nvinfer1::PluginField* find(const char* name) const;
  const nvinfer1::PluginField& get(const char* name) const;

  const nvinfer1::PluginFieldCollection* collection_;
};

// As TensorRT calls fp32, fp16 and bf16.
bool is_floating(nvinfer1::DataType type);
const char* name(nvinfer1::DataType type);

// As the kernels call it; throws for one that they do not read.
cuda::ElementType element_type(nvinfer1::DataType type);

inline bool has_sizes(const nvinfer1::Dims& dims, std::initializer_list<int64_t> sizes) {
  if (dims.nbDims != static_cast<int32_t>(sizes.size())) return false;
  const int64_t* found = dims.d;
  for (const int64_t size : sizes) {
    if (*found++ != size) return false;
  }
  return true;
}

inline bool same_sizes(const nvinfer1::Dims& one, const nvinfer1::Dims& other) {
  if (one.nbDims != other.nbDims) return false;
  for (int32_t i = 0; i < one.nbDims; ++i) {
    if (one.d[i] != other.d[i]) return false;
  }
  return true;
}

}  // namespace umv2::tensorrt
