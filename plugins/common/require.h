// Refusals: exceptions within our code, which each interface turns into what it has for them, for none may cross it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace umv2 {

// What an op, a plugin or a launch refuses: an attribute, an input, a file of kernels, a machine without a driver; or a
// failed call of a runtime.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Refuses what does not hold. The message is put together from its parts, tensors by their shapes, only then: in a call of
// 20 us the strings of a dozen checks that pass would show.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (void)(message << ... << parts);
  throw Error(message.str());
}

}  // namespace umv2
