// The creators that the library offers, one an op.
#pragma once

#include <NvInferRuntime.h>

#include <array>

namespace umv2::tensorrt {

// They live as long as the process.
nvinfer1::IPluginCreatorInterface* memory_lookup_creator();
nvinfer1::IPluginCreatorInterface* tucker_topk_creator();

const std::array<nvinfer1::IPluginCreatorInterface*, 2>& creators();

}  // namespace umv2::tensorrt
