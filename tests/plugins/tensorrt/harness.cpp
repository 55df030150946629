// Runs the plugins on a GPU, without TensorRT, and compares with a plain computation.
//
//   tensorrt_harness --list                 the cases, one line of JSON each: for compiling their kernels
//   tensorrt_harness LIBRARY [CASE]...      all cases, or those that are named
//
// Kernels come from the library, or from UMV2_GPU_KERNELS. Exit codes: 0, 1 a case differs or fails, 2 usage, 4 no GPU.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "cases.h"
#include "device.h"
#include "dimensions.h"

namespace umv2::test {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

// Beyond an output; a kernel must leave it as it is.
constexpr size_t kGuard = 256;

// An output holds it until it is written: a NaN, or an address far outside.
constexpr uint8_t kUnwritten = 0xff;

size_t byte_count(const Tensor& tensor) {
  const auto elements = std::accumulate(tensor.sizes.begin(), tensor.sizes.end(), int64_t{1}, std::multiplies<>());
  const int size = tensor.type == DataType::kINT64 ? 8 : tensor.type == DataType::kFLOAT ? 4 : 2;
  return static_cast<size_t>(elements * size);
}

void require(bool holds, Log& log, const char* what) {
  if (!holds) throw std::runtime_error(std::string(what) + ": " + log.take());
}

// As the builder asks for them.
std::vector<Tensor> outputs_of(const Plugin& plugin, const std::vector<Tensor>& inputs, Log& log) {
  auto& build = builder(plugin);
  const auto count = static_cast<int32_t>(inputs.size());
  const int32_t output_count = build.getNbOutputs();
  Expressions expressions;
  std::vector<DataType> types, output_types(static_cast<size_t>(output_count));
  std::vector<nvinfer1::DimsExprs> shapes, output_shapes(static_cast<size_t>(output_count));
  for (const Tensor& input : inputs) {
    types.push_back(input.type);
    shapes.push_back(expressions.shape(input.sizes));
  }
  require(build.getOutputDataTypes(output_types.data(), output_count, types.data(), count) == 0, log, "output types");
  require(build.getOutputShapes(shapes.data(), count, nullptr, 0, output_shapes.data(), output_count, expressions) == 0,
          log, "output shapes");
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < output_types.size(); ++i)
    outputs.push_back({output_types[i], sizes(output_shapes[i]), {}, {}});
  return outputs;
}

// The plugin of an engine that was saved and loaded, in an execution context.
Plugin loaded(const PluginLibrary& library, const Case& node, const Plugin& plugin, Log& log) {
  const auto* const fields = runtime(plugin).getFieldsToSerialize();
  require(fields != nullptr, log, "serialise");
  const Plugin restored(library.creator(node.op()).createPlugin("node", fields, nvinfer1::TensorRTPhase::kRUNTIME));
  require(restored != nullptr, log, "restore");
  return Plugin(runtime(restored).attachToContext(nullptr));
}

// What is wrong, or nothing.
std::string run(const PluginLibrary& library, const Case& node, Log& log, double& error) {
  Device device;
  Attributes attributes;
  node.add_attributes(attributes);
  const Plugin built = library.build(node.op(), attributes);
  require(built != nullptr, log, "attributes");
  const std::vector<Tensor> inputs = node.inputs();
  std::vector<Tensor> outputs = outputs_of(built, inputs, log);
  const Plugin plugin = loaded(library, node, built, log);

  std::vector<PluginTensorDesc> input_descs, output_descs;
  std::vector<const void*> input_addresses;
  std::vector<void*> output_addresses;
  for (const Tensor& input : inputs) {
    input_descs.push_back(tensor(input.type, input.sizes));
    input_addresses.push_back(device.upload(input.bytes));
  }
  for (const Tensor& output : outputs) {
    output_descs.push_back(tensor(output.type, output.sizes));
    output_addresses.push_back(device.upload(std::vector<uint8_t>(byte_count(output) + kGuard, kUnwritten)));
  }
  // TensorRT asks with the largest shapes, and these are the only ones.
  std::vector<nvinfer1::DynamicPluginTensorDesc> largest(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    largest[i].desc = input_descs[i];
    largest[i].min = largest[i].opt = largest[i].max = input_descs[i].dims;
  }
  const size_t workspace_bytes =
      builder(built).getWorkspaceSize(largest.data(), static_cast<int32_t>(largest.size()), nullptr, 0);
  void* const workspace =
      workspace_bytes == 0 ? nullptr : device.upload(std::vector<uint8_t>(workspace_bytes, kUnwritten));
  const auto input_count = static_cast<int32_t>(inputs.size()), output_count = static_cast<int32_t>(outputs.size());
  require(runtime(plugin).onShapeChange(input_descs.data(), input_count, output_descs.data(), output_count) == 0, log,
          "onShapeChange");
  require(runtime(plugin).enqueue(input_descs.data(), output_descs.data(), input_addresses.data(),
                                  output_addresses.data(), workspace, static_cast<cudaStream_t>(device.stream())) == 0,
          log, "enqueue");
  for (size_t i = 0; i < outputs.size(); ++i) {
    const size_t size = byte_count(outputs[i]);
    outputs[i].bytes = device.download(output_addresses[i], size + kGuard);
    for (size_t byte = size; byte < size + kGuard; ++byte) {
      if (outputs[i].bytes[byte] != kUnwritten) return "memory beyond output " + std::to_string(i) + " was written";
    }
    outputs[i].bytes.resize(size);
    decode(outputs[i]);
  }
  return node.difference(inputs, outputs, error);
}

bool passes(const PluginLibrary& library, const Case& node, Log& log) {
  double error = 0;
  std::string wrong;
  try {
    wrong = run(library, node, log, error);
  } catch (const std::exception& failure) {
    wrong = failure.what();
  }
  if (wrong.empty()) {
    std::printf("ok      %-28s largest error %.3f of what is allowed\n", node.name.c_str(), error);
  } else {
    std::printf("FAILED  %-28s %s\n", node.name.c_str(), wrong.c_str());
  }
  return wrong.empty();
}

int list() {
  for (const auto& node : all_cases()) {
    std::printf("{\"name\": \"%s\", \"op\": \"%s\", %s}\n", node->name.c_str(), node->op(), node->json().c_str());
  }
  return 0;
}

// The cases of these names; all, if there are none.
std::vector<const Case*> chosen(const std::vector<std::string>& names) {
  std::vector<const Case*> found;
  for (const auto& node : all_cases()) {
    if (names.empty() || std::count(names.begin(), names.end(), node->name) > 0) found.push_back(node.get());
  }
  return found;
}

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "--list") return list();
  const std::vector<std::string> names(arguments + std::min(count, 2), arguments + count);
  const auto nodes = chosen(names);
  if (count < 2 || (!names.empty() && nodes.size() != names.size())) {
    std::fprintf(stderr, "usage: tensorrt_harness --list | LIBRARY [CASE]...\n");
    return 2;
  }
  try {
    std::printf("%s\n", Device().name().c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 4;
  }
  Log log;
  const PluginLibrary library(arguments[1], &log);
  int failures = 0;
  for (const Case* node : nodes) failures += passes(library, *node, log) ? 0 : 1;
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace umv2::test

int main(int count, char** arguments) { return umv2::test::main(count, arguments); }
