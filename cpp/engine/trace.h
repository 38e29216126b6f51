// A trace of steps, phases and slices in the Chrome trace event format (JSON), which chrome://tracing and Perfetto open. Times are
// the host's: on a device that works asynchronously a piece ends when it was launched, a step when its results are there.
#pragma once

#include <fstream>
#include <initializer_list>
#include <string>
#include <utility>

namespace loquetier {

class Trace {
 public:
  explicit Trace(const std::string& path);  // InvalidArgument when the file cannot be written
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  using Numbers = std::initializer_list<std::pair<const char*, double>>;
  void event(const char* name, double begin, double end, Numbers arguments);  // seconds
  void counter(const char* name, double when, Numbers values);
  void instant(const char* name, double when, Numbers arguments);

 private:
  void open(const char* name, char phase, double when);
  void close(Numbers arguments);

  std::ofstream out_;
  bool first_ = true;
};

}  // namespace loquetier
