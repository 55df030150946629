// Stand-ins for TensorRT's expressions of dimensions: each carries the value that it has in the test.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <limits>
#include <vector>

namespace umv2::test {

class Dimension final : public nvinfer1::IDimensionExpr {
 public:
  Dimension(int64_t value, bool constant) : value_(value, constant) { mImpl = &value_; }

  int64_t value() const { return value_.value; }

 private:
  struct Value final : nvinfer1::apiv::VDimensionExpr {
    Value(int64_t number, bool is_constant) : value(number), constant(is_constant) {}
    bool isConstant() const override { return constant; }
    int64_t getConstantValue() const override { return constant ? value : std::numeric_limits<int64_t>::min(); }
    bool isSizeTensor() const override { return false; }

    int64_t value;
    bool constant;
  } value_;
};

inline int64_t value(const nvinfer1::IDimensionExpr* dimension) {
  return static_cast<const Dimension*>(dimension)->value();
}

class Expressions final : public nvinfer1::IExprBuilder {
 public:
  Expressions() { mImpl = &builder_; }

  // A dimension that is known when the engine is built, or only when it runs.
  const nvinfer1::IDimensionExpr* dimension(int64_t value, bool constant) { return builder_.add(value, constant); }

  nvinfer1::DimsExprs shape(const std::vector<int64_t>& sizes, bool constant = true) {
    nvinfer1::DimsExprs shape{static_cast<int32_t>(sizes.size()), {}};
    for (size_t i = 0; i < sizes.size(); ++i) shape.d[i] = dimension(sizes[i], constant);
    return shape;
  }

 private:
  struct Builder final : nvinfer1::apiv::VExprBuilder {
    const nvinfer1::IDimensionExpr* add(int64_t value, bool constant) { return &all.emplace_back(value, constant); }
    const nvinfer1::IDimensionExpr* constant(int64_t value) override { return add(value, true); }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation op, const nvinfer1::IDimensionExpr& first,
                                              const nvinfer1::IDimensionExpr& second) override {
      const int64_t a = value(&first), b = value(&second);
      const bool constant = first.isConstant() && second.isConstant();
      switch (op) {
        case nvinfer1::DimensionOperation::kSUB:
          return add(a - b, constant);
        case nvinfer1::DimensionOperation::kPROD:
          return add(a * b, constant);
        default:
          return nullptr;
      }
    }
    const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
      return nullptr;
    }

    std::deque<Dimension> all;
  } builder_;
};

inline std::vector<int64_t> sizes(const nvinfer1::DimsExprs& shape) {
  std::vector<int64_t> found;
  for (int32_t i = 0; i < shape.nbDims; ++i) found.push_back(value(shape.d[i]));
  return found;
}

}  // namespace umv2::test
