// Work on the session's own threads, and fp16 on its way in and out of it.
#pragma once

#include <exception>
#include <memory>
#include <mutex>

#include "kernel_io.h"
#include "kernels.h"

namespace umv2::ort {

// Memory that is written before it is read: filling it with zeros first would cost a pass.
inline std::unique_ptr<float[]> unfilled(int64_t count) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(count)]);
}

// Runs body(i) for i in [0, total): on the session's threads, or, where the whole is too little for another thread to wake
// up for, on this one. The first exception is thrown again once all of them are done: thrown through the runtime it would
// leave the others with what this frame has destroyed.
template <typename Body>
void parallel_for(const Api& api, const KernelContext* context, bool worth_threads, int64_t total, const Body& body) {
  if (!worth_threads || total <= 1) {
    for (int64_t i = 0; i < total; ++i) body(i);
    return;
  }
  struct Tasks {
    const Body& body;
    std::mutex mutex;
    std::exception_ptr error;
  } tasks{body, {}, nullptr};
  const auto call = [](void* data, size_t i) {
    Tasks& all = *static_cast<Tasks*>(data);
    try {
      all.body(static_cast<int64_t>(i));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(all.mutex);
      if (!all.error) all.error = std::current_exception();
    }
  };
  check(api, api.parallel_for(context, call, static_cast<size_t>(total), &tasks), "parallel for");
  if (tasks.error) std::rethrow_exception(tasks.error);
}

// A piece of an fp32 or fp16 tensor as floats: in place, or converted into memory of the thread that asks. `Slot` tells
// the pieces apart that a task uses at the same time.
template <int Slot>
const float* floats(const Kernels& kernels, const Tensor& tensor, int64_t first, int64_t count) {
  if (tensor.type == kFloat) return tensor.as<float>() + first;
  thread_local std::vector<float> converted;
  if (converted.size() < static_cast<size_t>(count)) converted.resize(static_cast<size_t>(count));
  kernels.widen(tensor.as<uint16_t>() + first, count, converted.data());
  return converted.data();
}

// An output of fp32 or fp16, filled a piece at a time: piece() is where a task puts its floats, done() puts them away.
class FloatOutput {
 public:
  FloatOutput(const Api& api, KernelContext* context, size_t index, ElementType type, std::initializer_list<int64_t> sizes)
      : data_(output<void>(api, context, index, sizes)), half_(type == kFloat16) {}

  float* piece(int64_t first, int64_t count) const {
    if (!half_) return static_cast<float*>(data_) + first;
    std::vector<float>& unconverted = unconverted_piece();
    if (unconverted.size() < static_cast<size_t>(count)) unconverted.resize(static_cast<size_t>(count));
    return unconverted.data();
  }
  void done(const Kernels& kernels, const float* piece, int64_t first, int64_t count) const {
    if (half_) kernels.narrow(piece, count, static_cast<uint16_t*>(data_) + first);
  }

 private:
  static std::vector<float>& unconverted_piece() {
    thread_local std::vector<float> piece;
    return piece;
  }

  void* data_;
  bool half_;
};

}  // namespace umv2::ort
