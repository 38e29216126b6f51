// Errors of the public API. Every error thrown by the library derives from loquetier::Error; Python maps each class to one
// that also derives from the natural built-in exception. A message says what was wrong, where, what was expected, what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace loquetier {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class InvalidArgument : public Error {
  using Error::Error;
};  // ValueError
class NotFound : public Error {
  using Error::Error;
};  // KeyError
class OutOfMemory : public Error {
  using Error::Error;
};  // MemoryError
class FormatError : public Error {
  using Error::Error;
};  // ValueError: a file's content is not what its format says
class DeviceError : public Error {
  using Error::Error;
};  // RuntimeError: the engine refuses further work after one
class QueueFull : public Error {
  using Error::Error;
};  // RuntimeError: back-pressure; submit again later

}  // namespace loquetier
