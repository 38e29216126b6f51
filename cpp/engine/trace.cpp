#include "engine/trace.h"

#include <cmath>
#include <cstdio>

#include "core/check.h"

namespace loquetier {

namespace {

std::string number(const char* format, double value) {
  char text[40];
  std::snprintf(text, sizeof(text), format, std::isfinite(value) ? value : 0.0);
  return text;
}

}  // namespace

Trace::Trace(const std::string& path) : out_(path, std::ios::trunc) {
  require(out_.good(), "[trace] path: expected a file that can be written, got \"", path, "\"");
  out_ << "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n";
}

Trace::~Trace() { out_ << "\n]}\n"; }

void Trace::open(const char* name, char phase, double when) {
  out_ << (first_ ? "" : ",\n") << "{\"name\":\"" << name << "\",\"ph\":\"" << phase
       << "\",\"pid\":1,\"tid\":1,\"ts\":" << number("%.3f", when * 1e6);
  first_ = false;
}

void Trace::close(Numbers arguments) {
  out_ << ",\"args\":{";
  bool first = true;
  for (const auto& [name, value] : arguments) {
    out_ << (first ? "" : ",") << "\"" << name << "\":" << number("%.9g", value);
    first = false;
  }
  out_ << "}}";
}

void Trace::event(const char* name, double begin, double end, Numbers arguments) {
  open(name, 'X', begin);
  out_ << ",\"dur\":" << number("%.3f", (end - begin) * 1e6);
  close(arguments);
}

void Trace::counter(const char* name, double when, Numbers values) {
  open(name, 'C', when);
  close(values);
}

void Trace::instant(const char* name, double when, Numbers arguments) {
  open(name, 'i', when);
  out_ << ",\"s\":\"t\"";
  close(arguments);
}

}  // namespace loquetier
