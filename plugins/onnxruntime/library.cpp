// A library of ops: RegisterCustomOps is what SessionOptions.register_custom_ops_library calls.
#include "library.h"

#include <exception>
#include <map>
#include <mutex>
#include <string>

#if defined(__GNUC__)
#define UMV2_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

using namespace umv2::ort;

Status* refuse(const ApiBase* base, const std::string& message) {
  // Version 1 of the table exists in every runtime, and creating a status is its first slot.
  return Api(base->get_api(1)).create_status(kFail, message.c_str());
}

// What one runtime of the process calls: its function table, and the domain that it made of the ops. A process may hold
// several runtimes, the wheel of one version and the library of an application, each with a table of its own.
struct Runtime {
  explicit Runtime(const void* table) : api(table) {}

  const Api api;
  CustomOpDomain* domain = nullptr;
};

// Makes the domain of a runtime once; ops keep a reference to its `api`.
Status* make_domain(Runtime& runtime, const ApiBase* base) {
  std::vector<const CustomOp*> ops;
  try {
    ops = custom_ops(runtime.api);
  } catch (const std::exception& error) {
    return refuse(base, error.what());
  }
  CustomOpDomain* domain = nullptr;
  if (Status* status = runtime.api.create_custom_op_domain("umv2", &domain)) return status;
  for (const CustomOp* op : ops) {
    if (Status* status = runtime.api.add_custom_op(domain, op)) return status;
  }
  runtime.domain = domain;
  return nullptr;
}

}  // namespace

UMV2_EXPORT Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  const void* table = base->get_api(kApiVersion);
  if (table == nullptr) {
    return refuse(base, std::string("the umv2 op library needs ONNX Runtime 1.20 or later, this is ") +
                            base->version_string());
  }
  // Never destroyed: sessions may outlive any handle a caller keeps, and the destructors of this library.
  static std::map<const void*, Runtime>& runtimes = *new std::map<const void*, Runtime>;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  Runtime& runtime = runtimes.try_emplace(table, table).first->second;
  if (runtime.domain == nullptr) {
    if (Status* status = make_domain(runtime, base)) return status;
  }
  return runtime.api.add_custom_op_domain(options, runtime.domain);
}
