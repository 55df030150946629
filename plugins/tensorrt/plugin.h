// What both plugins and their creators answer alike.
//
// An op has: a constructor (const Fields&), kName, kOutputs, field_names(), fields(), output_types(), output_shapes(),
// supports(), workspace_bytes(), call() and bind(), which may throw.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "plugin_io.h"

namespace umv2::tensorrt {

constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "umv2";

template <typename Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(const Op& op) : op_(op), identity_(op.identity()) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override {
    nvinfer1::IPluginV3* copy = nullptr;
    guarded(Op::kName, [&] { copy = new Plugin(*this); });
    return copy;
  }

  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return Op::kOutputs; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t, const nvinfer1::DataType* inputs,
                             int32_t count) const noexcept override {
    return guarded(Op::kName, [&] { op_.output_types(inputs, count, outputs); });
  }
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder& build) noexcept override {
    return guarded(Op::kName, [&] { op_.output_shapes(inputs, count, outputs, build); });
  }
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t) noexcept override {
    return tensors[position].desc.format == nvinfer1::TensorFormat::kLINEAR && op_.supports(position, tensors, inputs);
  }
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    return 0;
  }
  // Asked for with the largest shapes.
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override {
    int64_t bytes = 0;
    guarded(Op::kName, [&] { bytes = op_.workspace_bytes(inputs, count); });
    return static_cast<size_t>(bytes);
  }
  // The same attributes make the same plugin, so that one timing serves all layers.
  const char* getTimingCacheID() noexcept override { return identity_.c_str(); }
  const char* getMetadataString() noexcept override { return identity_.c_str(); }

  // Loads the kernel: while a CUDA graph is captured, enqueue could not.
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t count, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return guarded(Op::kName, [&] {
      const auto call = op_.call(inputs, count);
      input_count_ = count;
      archive_ = &cuda::kernel_archive();
      cuda::prepare(*archive_, call);
    });
  }
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded(Op::kName, [&] {
      auto call = op_.call(input_descs, input_count_);
      op_.bind(call, inputs, outputs, workspace);
      cuda::launch(*archive_, call, stream);
    });
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    const int32_t failed = guarded(Op::kName, [&] {
      fields_ = op_.fields();
      collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    });
    return failed ? nullptr : &collection_;
  }

 private:
  Op op_;
  std::string identity_;
  // Of the last change of shapes, which comes before any enqueue.
  int32_t input_count_ = 0;
  const cuda::KernelArchive* archive_ = nullptr;
  // Point into op_, so they are filled in when they are asked for: a copy has its own.
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

template <typename Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() : fields_(Op::field_names()), collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    nvinfer1::IPluginV3* plugin = nullptr;
    guarded(Op::kName, [&] { plugin = new Plugin<Op>(Op(Fields(fields))); });
    return plugin;
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace umv2::tensorrt
