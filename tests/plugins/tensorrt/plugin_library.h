// The plugin library, loaded and asked for its plugins as TensorRT does it.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace umv2::test {

using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

// Keeps what is logged.
class Log final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  void log(Severity severity, const char* message) noexcept override;
  nvinfer1::ILogger* findLogger() override { return this; }

  // What was logged as an error since the last call, one message a line.
  std::string take();

 private:
  std::string text_;
};

// Attributes as the ONNX parser passes them.
class Attributes {
 public:
  Attributes() = default;
  Attributes(const Attributes&) = delete;
  Attributes& operator=(const Attributes&) = delete;

  Attributes& int32(const char* name, int32_t value);
  Attributes& int64(const char* name, int64_t value);
  // `terminated`: its length counts a zero, as the parser of TensorRT-RTX 1.7 passes it.
  Attributes& text(const char* name, const std::string& value, bool terminated = true);

  const nvinfer1::PluginFieldCollection* collection();

 private:
  std::deque<int32_t> small_;
  std::deque<int64_t> large_;
  std::deque<std::string> texts_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

class PluginLibrary {
 public:
  // Throws where it cannot be loaded. Messages go to `log`; without one, the library has no logger.
  PluginLibrary(const std::string& path, Log* log);

  const std::vector<nvinfer1::IPluginCreatorV3One*>& creators() const { return creators_; }
  nvinfer1::IPluginCreatorV3One& creator(const std::string& name) const;

  // nullptr where the plugin refuses the attributes.
  Plugin build(const std::string& name, Attributes& attributes) const;

 private:
  std::vector<nvinfer1::IPluginCreatorV3One*> creators_;
};

nvinfer1::IPluginV3OneCore& core(const Plugin& plugin);
nvinfer1::IPluginV3OneBuild& builder(const Plugin& plugin);
nvinfer1::IPluginV3OneRuntime& runtime(const Plugin& plugin);

nvinfer1::PluginTensorDesc tensor(nvinfer1::DataType type, std::initializer_list<int64_t> sizes);
nvinfer1::PluginTensorDesc tensor(nvinfer1::DataType type, const std::vector<int64_t>& sizes);

}  // namespace umv2::test
