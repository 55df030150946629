#include "plugin_library.h"

#include <dlfcn.h>

#include <stdexcept>

namespace umv2::test {

using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginFieldType;

void Log::log(Severity severity, const char* message) noexcept {
  if (severity == Severity::kERROR) text_ += std::string(message) + "\n";
}

std::string Log::take() {
  std::string taken;
  taken.swap(text_);
  return taken;
}

Attributes& Attributes::int32(const char* name, int32_t value) {
  fields_.emplace_back(name, &small_.emplace_back(value), PluginFieldType::kINT32, 1);
  return *this;
}

Attributes& Attributes::int64(const char* name, int64_t value) {
  fields_.emplace_back(name, &large_.emplace_back(value), PluginFieldType::kINT64, 1);
  return *this;
}

Attributes& Attributes::text(const char* name, const std::string& value, bool terminated) {
  // What follows an unterminated text belongs to others.
  const std::string& stored = texts_.emplace_back(value + (terminated ? std::string(1, '\0') : "?"));
  const size_t length = value.size() + (terminated ? 1 : 0);
  fields_.emplace_back(name, stored.data(), PluginFieldType::kCHAR, static_cast<int32_t>(length));
  return *this;
}

const nvinfer1::PluginFieldCollection* Attributes::collection() {
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  return &collection_;
}

PluginLibrary::PluginLibrary(const std::string& path, Log* log) {
  void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto get =
      reinterpret_cast<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  const auto set = reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  if (get == nullptr || set == nullptr) throw std::runtime_error(path + " has no getCreators or no setLoggerFinder");
  set(log);
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* const all = get(count);
  for (int32_t i = 0; i < count; ++i) {
    if (std::string(all[i]->getInterfaceInfo().kind) != "PLUGIN CREATOR_V3ONE") {
      throw std::runtime_error(std::string("a creator of another kind: ") + all[i]->getInterfaceInfo().kind);
    }
    creators_.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(all[i]));
  }
}

nvinfer1::IPluginCreatorV3One& PluginLibrary::creator(const std::string& name) const {
  for (nvinfer1::IPluginCreatorV3One* creator : creators_) {
    if (creator->getPluginName() == name) return *creator;
  }
  throw std::runtime_error("no creator of " + name);
}

Plugin PluginLibrary::build(const std::string& name, Attributes& attributes) const {
  return Plugin(creator(name).createPlugin("node", attributes.collection(), nvinfer1::TensorRTPhase::kBUILD));
}

nvinfer1::IPluginV3OneCore& core(const Plugin& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}

nvinfer1::IPluginV3OneBuild& builder(const Plugin& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

nvinfer1::IPluginV3OneRuntime& runtime(const Plugin& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

nvinfer1::PluginTensorDesc tensor(nvinfer1::DataType type, const std::vector<int64_t>& sizes) {
  nvinfer1::PluginTensorDesc desc{};
  desc.type = type;
  desc.format = nvinfer1::TensorFormat::kLINEAR;
  desc.dims.nbDims = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) desc.dims.d[i] = sizes[i];
  return desc;
}

nvinfer1::PluginTensorDesc tensor(nvinfer1::DataType type, std::initializer_list<int64_t> sizes) {
  return tensor(type, std::vector<int64_t>(sizes));
}

}  // namespace umv2::test
