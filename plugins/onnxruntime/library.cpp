// A library of ops: RegisterCustomOps is what SessionOptions.register_custom_ops_library calls.
#include "library.h"

#include <exception>
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

}  // namespace

UMV2_EXPORT Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  const void* table = base->get_api(kApiVersion);
  if (table == nullptr) {
    return refuse(base, std::string("the umv2 op library needs ONNX Runtime 1.20 or later, this is ") +
                            base->version_string());
  }
  static const Api api(table);
  // The domain and its ops live as long as the process: sessions may outlive any handle a caller keeps.
  static CustomOpDomain* domain = nullptr;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    std::vector<const CustomOp*> ops;
    try {
      ops = custom_ops(api);
    } catch (const std::exception& error) {
      return refuse(base, error.what());
    }
    CustomOpDomain* created = nullptr;
    if (Status* status = api.create_custom_op_domain("umv2", &created)) return status;
    for (const CustomOp* op : ops) {
      if (Status* status = api.add_custom_op(created, op)) return status;
    }
    domain = created;
  }
  return api.add_custom_op_domain(options, domain);
}
