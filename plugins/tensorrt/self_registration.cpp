// Registers the plugins when the library is loaded, for those who load it and do no more: ONNX Runtime, and
// `trtexec --staticPlugins`. IPluginRegistry::loadLibrary refuses plugins that are registered already, so the library
// that it loads goes without this file.
#include <dlfcn.h>

#include <string>

#include "creators.h"
#include "plugin.h"

namespace umv2::tensorrt {
namespace {

// TensorRT is not linked but found in the process: a library that is loaded for itself alone, as ONNX Runtime's
// provider is, shows its dependencies to no other.
nvinfer1::IPluginRegistry& registry() {
  const std::string name = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
  void* const library = dlopen(name.c_str(), RTLD_LAZY);
  require(library != nullptr, "the plugins are built for TensorRT ", NV_TENSORRT_MAJOR, ", and ", name,
          " cannot be loaded");
  const auto get = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
  nvinfer1::IPluginRegistry* const found = get == nullptr ? nullptr : get();
  require(found != nullptr, name, " has no plugin registry");
  return *found;
}

__attribute__((constructor)) void register_plugins() {
  guarded("plugins", [] {
    for (nvinfer1::IPluginCreatorInterface* creator : creators()) {
      require(registry().registerCreator(*creator, kNamespace), "TensorRT did not register them: are they already?");
    }
  });
}

}  // namespace
}  // namespace umv2::tensorrt
