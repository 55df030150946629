#include "plugin_io.h"

#include <cstring>
#include <limits>

namespace umv2::tensorrt {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const PluginField* Fields::find(const char* name) const {
  require(collection_ != nullptr, "no attributes are given");
  for (int32_t i = 0; i < collection_->nbFields; ++i) {
    const PluginField& field = collection_->fields[i];
    if (std::strcmp(field.name, name) == 0) {
      require(field.data != nullptr, "attribute ", name, " has no value");
      return &field;
    }
  }
  return nullptr;
}

const PluginField& Fields::get(const char* name) const {
  const PluginField* const field = find(name);
  require(field != nullptr, "attribute ", name, " is missing");
  return *field;
}

int32_t Fields::integer(const char* name, int32_t otherwise) const {
  return find(name) == nullptr ? otherwise : integer(name);
}

int32_t Fields::integer(const char* name) const {
  const PluginField& field = get(name);
  require(field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64, "attribute ", name,
          " must be an integer");
  require(field.length == 1, "attribute ", name, " must be one integer, got ", field.length);
  if (field.type == PluginFieldType::kINT32) {
    int32_t value = 0;
    std::memcpy(&value, field.data, sizeof value);
    return value;
  }
  int64_t value = 0;
  std::memcpy(&value, field.data, sizeof value);
  require(value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(), "attribute ",
          name, " is ", value, ", kernels take up to ", std::numeric_limits<int32_t>::max());
  return static_cast<int32_t>(value);
}

std::string Fields::text(const char* name) const {
  const PluginField& field = get(name);
  require(field.type == PluginFieldType::kCHAR && field.length >= 0, "attribute ", name, " must be a string");
  std::string value(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
  // At the end only: what stands behind a zero within is not left out unseen.
  value.erase(value.find_last_not_of('\0') + 1);
  return value;
}

bool is_floating(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

const char* name(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "fp32";
    case DataType::kHALF:
      return "fp16";
    case DataType::kBF16:
      return "bf16";
    case DataType::kINT8:
      return "int8";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    default:
      return "another type";
  }
}

cuda::ElementType element_type(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return cuda::ElementType::kFloat32;
    case DataType::kHALF:
      return cuda::ElementType::kFloat16;
    case DataType::kBF16:
      return cuda::ElementType::kBFloat16;
    case DataType::kINT8:
      return cuda::ElementType::kInt8;
    default:
      throw Error(std::string("kernels read no tensor of ") + name(type));
  }
}

}  // namespace umv2::tensorrt
