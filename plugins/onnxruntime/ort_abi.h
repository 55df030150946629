// The part of ONNX Runtime's binary interface for custom ops that the op libraries use, declared anew: its wheels ship no
// headers. Slots of the function table and the layout of OrtCustomOp are stable; they are the same at API versions 20
// and 29. tests/plugins/test_onnxruntime_library.py loads the library into the installed runtime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace umv2::ort {

// The newest version whose layout is used; ONNX Runtime 1.20 and later know it.
constexpr uint32_t kApiVersion = 20;

struct Status;
struct Value;
struct TensorInfo;
struct KernelContext;
struct KernelInfo;
struct SessionOptions;
struct CustomOpDomain;
struct Allocator;
struct MemoryInfo;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kInt8 = 3, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum MemoryType : int { kDefaultMemory = 0 };

// Places of the functions in the table, named as the methods of Api are. A test reads them from here.
enum Slot : size_t {
  kCreateStatus = 0,
  kErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kAddCustomOp = 27,
  kAddCustomOpDomain = 28,
  kTensorData = 51,
  kElementType = 60,
  kRank = 61,
  kDimensions = 62,
  kTensorInfo = 65,
  kAllocate = 75,
  kFree = 76,
  kAllocatorInfo = 77,
  kAttributeFloat = 85,
  kAttributeInt = 86,
  kAttributeString = 87,
  kInputCount = 88,
  kInput = 90,
  kOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorInfo = 99,
  kReleaseAllocator = 132,
  kAttributeInts = 163,
  kGpuStream = 193,
  kConstantInputCount = 230,
  kConstantInput = 249,
  kParallelFor = 274,
  kScratchBuffer = 277,
  kKernelAllocator = 278,
};

// The function table: an array of pointers, of which these are called.
class Api {
 public:
  explicit Api(const void* table) : slots_(static_cast<void* const*>(table)) {}

  Status* create_status(ErrorCode code, const char* message) const {
    return call<Status*(ErrorCode, const char*)>(kCreateStatus)(code, message);
  }
  const char* error_message(const Status* status) const { return call<const char*(const Status*)>(kErrorMessage)(status); }
  Status* create_custom_op_domain(const char* name, CustomOpDomain** domain) const {
    return call<Status*(const char*, CustomOpDomain**)>(kCreateCustomOpDomain)(name, domain);
  }
  Status* add_custom_op(CustomOpDomain* domain, const void* op) const {
    return call<Status*(CustomOpDomain*, const void*)>(kAddCustomOp)(domain, op);
  }
  Status* add_custom_op_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return call<Status*(SessionOptions*, CustomOpDomain*)>(kAddCustomOpDomain)(options, domain);
  }
  Status* tensor_data(Value* value, void** data) const { return call<Status*(Value*, void**)>(kTensorData)(value, data); }
  Status* element_type(const TensorInfo* info, int* type) const {
    return call<Status*(const TensorInfo*, int*)>(kElementType)(info, type);
  }
  Status* rank(const TensorInfo* info, size_t* rank) const {
    return call<Status*(const TensorInfo*, size_t*)>(kRank)(info, rank);
  }
  Status* dimensions(const TensorInfo* info, int64_t* sizes, size_t rank) const {
    return call<Status*(const TensorInfo*, int64_t*, size_t)>(kDimensions)(info, sizes, rank);
  }
  Status* tensor_info(const Value* value, TensorInfo** info) const {
    return call<Status*(const Value*, TensorInfo**)>(kTensorInfo)(value, info);
  }
  Status* allocate(Allocator* allocator, size_t size, void** memory) const {
    return call<Status*(Allocator*, size_t, void**)>(kAllocate)(allocator, size, memory);
  }
  Status* free(Allocator* allocator, void* memory) const { return call<Status*(Allocator*, void*)>(kFree)(allocator, memory); }
  Status* allocator_info(const Allocator* allocator, const MemoryInfo** info) const {
    return call<Status*(const Allocator*, const MemoryInfo**)>(kAllocatorInfo)(allocator, info);
  }
  Status* attribute_float(const KernelInfo* info, const char* name, float* value) const {
    return call<Status*(const KernelInfo*, const char*, float*)>(kAttributeFloat)(info, name, value);
  }
  Status* attribute_int(const KernelInfo* info, const char* name, int64_t* value) const {
    return call<Status*(const KernelInfo*, const char*, int64_t*)>(kAttributeInt)(info, name, value);
  }
  Status* attribute_string(const KernelInfo* info, const char* name, char* value, size_t* size) const {
    return call<Status*(const KernelInfo*, const char*, char*, size_t*)>(kAttributeString)(info, name, value, size);
  }
  Status* input_count(const KernelContext* context, size_t* count) const {
    return call<Status*(const KernelContext*, size_t*)>(kInputCount)(context, count);
  }
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return call<Status*(const KernelContext*, size_t, const Value**)>(kInput)(context, index, value);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** value) const {
    return call<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(kOutput)(context, index, sizes, rank,
                                                                                       value);
  }
  void release_status(Status* status) const { call<void(Status*)>(kReleaseStatus)(status); }
  void release_tensor_info(TensorInfo* info) const { call<void(TensorInfo*)>(kReleaseTensorInfo)(info); }
  void release_allocator(Allocator* allocator) const { call<void(Allocator*)>(kReleaseAllocator)(allocator); }
  Status* attribute_ints(const KernelInfo* info, const char* name, int64_t* values, size_t* count) const {
    return call<Status*(const KernelInfo*, const char*, int64_t*, size_t*)>(kAttributeInts)(info, name, values, count);
  }
  // The CUDA stream of the op's provider.
  Status* gpu_stream(const KernelContext* context, void** stream) const {
    return call<Status*(const KernelContext*, void**)>(kGpuStream)(context, stream);
  }
  Status* constant_input_count(const KernelInfo* info, size_t* count) const {
    return call<Status*(const KernelInfo*, size_t*)>(kConstantInputCount)(info, count);
  }
  Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** value) const {
    return call<Status*(const KernelInfo*, size_t, int*, const Value**)>(kConstantInput)(info, index, is_constant, value);
  }
  Status* parallel_for(const KernelContext* context, void (*body)(void*, size_t), size_t total, void* data) const {
    // 0 batches: the runtime cuts the range by its own number of threads.
    return call<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(kParallelFor)(context, body,
                                                                                                     total, 0, data);
  }
  // Of the stream of the call, which must have one. It is freed by the allocator that `info` is of.
  Status* scratch_buffer(const KernelContext* context, const MemoryInfo* info, size_t size, void** memory) const {
    return call<Status*(const KernelContext*, const MemoryInfo*, size_t, void**)>(kScratchBuffer)(context, info, size, memory);
  }
  // The allocator of the node's provider; whoever asks releases it.
  Status* kernel_allocator(const KernelInfo* info, MemoryType type, Allocator** allocator) const {
    return call<Status*(const KernelInfo*, int, Allocator**)>(kKernelAllocator)(info, type, allocator);
  }

 private:
  template <typename Signature>
  Signature* call(Slot slot) const {
    return reinterpret_cast<Signature*>(slots_[slot]);
  }

  void* const* slots_;
};

struct ApiBase {
  const void* (*get_api)(uint32_t version);
  const char* (*version_string)();
};

// Field for field as version 20 of the interface lays it out.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t);
  size_t (*input_type_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t);
  size_t (*output_type_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  Characteristic (*input_characteristic)(const CustomOp*, size_t);
  Characteristic (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory_type)(const CustomOp*, size_t);
  int (*variadic_input_min_arity)(const CustomOp*);
  int (*variadic_input_homogeneity)(const CustomOp*);
  int (*variadic_output_min_arity)(const CustomOp*);
  int (*variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias_map)(int**, int**);
  void (*release_alias_map)(int*, int*);
};

static_assert(offsetof(CustomOp, create_kernel) == 8);
static_assert(offsetof(CustomOp, input_memory_type) == 96);
static_assert(offsetof(CustomOp, create_kernel_v2) == 136);
static_assert(offsetof(CustomOp, start_version) == 160);
static_assert(sizeof(CustomOp) == 208);

}  // namespace umv2::ort
