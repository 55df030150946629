// Nodes that the harness runs, with their tensors, and what they should give by a plain computation in double
// precision.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "plugin_library.h"

namespace umv2::test {

struct Tensor {
  nvinfer1::DataType type;
  std::vector<int64_t> sizes;
  std::vector<double> values;  // exactly as `bytes` mean them
  std::vector<uint8_t> bytes;
};

// A node of either op.
class Case {
 public:
  virtual ~Case() = default;

  std::string name;

  virtual const char* op() const = 0;
  virtual void add_attributes(Attributes& attributes) const = 0;
  virtual std::vector<Tensor> inputs() const = 0;
  // What is fixed in the kernel that serves it, as a JSON object.
  virtual std::string json() const = 0;
  // What is wrong with the outputs of these inputs, or nothing; `error` becomes the largest error, in units of what is
  // allowed.
  virtual std::string difference(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                                 double& error) const = 0;
};

const std::vector<std::unique_ptr<const Case>>& all_cases();

// `bytes` as `values`.
void decode(Tensor& tensor);

}  // namespace umv2::test
