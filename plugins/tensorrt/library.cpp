// The plugin library: what IPluginRegistry::loadLibrary, hence `trtexec --dynamicPlugins`, looks for.
#include <atomic>
#include <cstdio>

#include "creators.h"
#include "plugin_io.h"

#define UMV2_EXPORT extern "C" __attribute__((visibility("default")))

namespace umv2::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};

}  // namespace

void log_error(const std::string& message) noexcept {
  nvinfer1::ILoggerFinder* const found = finder.load();
  nvinfer1::ILogger* const logger = found == nullptr ? nullptr : found->findLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  } else {
    std::fprintf(stderr, "%s\n", message.c_str());
  }
}

const std::array<nvinfer1::IPluginCreatorInterface*, 2>& creators() {
  static const std::array<nvinfer1::IPluginCreatorInterface*, 2> all{memory_lookup_creator(), tucker_topk_creator()};
  return all;
}

}  // namespace umv2::tensorrt

UMV2_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  const auto& all = umv2::tensorrt::creators();
  count = static_cast<int32_t>(all.size());
  return all.data();
}

UMV2_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { umv2::tensorrt::finder = finder; }
