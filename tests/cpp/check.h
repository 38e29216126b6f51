// A test harness in one header: every file under tests/cpp/ is one executable made of TEST blocks.
//   TEST(name) { CHECK(x > 0); CHECK_EQ(a, b); CHECK_NEAR(a, b, 1e-6); CHECK_THROWS(InvalidArgument, "rank", f()); }
// A failed check is printed with file, line and values and the test goes on, so one run shows all of them; an exception ends its
// own test only. `main` comes with the header: include it in one file per executable. Arguments: an optional substring of the test
// names to run,
// `--list`, and options of the executable's own, `--seed 7`, which a test reads with option("--seed", "1"). The last line is
// "N passed, N failed"; the exit status is 0 only when nothing failed, something ran, and every test made at least one check.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace loquetier::test {

struct Case {
  const char* name;
  void (*body)();
};

struct State {
  std::vector<Case> cases;
  std::map<std::string, std::string> options;  // "--name" -> value, from the command line
  long checks = 0;                             // made by the running test
  long failures = 0;                           // of the running test
};

inline State& state() {
  static State instance;
  return instance;
}

// The value after `--name` on the command line, or the fallback. Options nobody reads are accepted.
inline std::string option(const std::string& name, const std::string& fallback) {
  const auto found = state().options.find(name);
  return found == state().options.end() ? fallback : found->second;
}

struct Registration {
  Registration(const char* name, void (*body)()) { state().cases.push_back({name, body}); }
};

template <class T>
std::string show(const T& value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value ? "true" : "false";
  } else if constexpr (std::is_enum_v<T>) {
    return std::to_string(static_cast<long long>(value));
  } else if constexpr (std::is_same_v<T, signed char> || std::is_same_v<T, unsigned char>) {
    return std::to_string(static_cast<int>(value));
  } else if constexpr (requires(std::ostringstream& out) { out << value; }) {
    std::ostringstream out;
    out.precision(17);
    out << value;
    return out.str();
  } else if constexpr (requires {
                         value.begin();
                         value.end();
                       }) {
    std::string text = "{";
    for (const auto& item : value) text += (text.size() > 1 ? ", " : "") + show(item);
    return text + "}";
  } else {
    return "(" + std::to_string(sizeof(T)) + "-byte value)";
  }
}

inline void failed(const char* file, int line, const std::string& what) {
  ++state().failures;
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

inline void check_true(bool ok, const char* text, const char* file, int line) {
  ++state().checks;
  if (!ok) failed(file, line, std::string("CHECK(") + text + ") is false");
}

template <class A, class B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  ++state().checks;
  bool equal;
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B> && !std::is_same_v<A, bool> && !std::is_same_v<B, bool>) {
    equal = std::cmp_equal(a, b);  // 3 == 3u, -1 != 0xffffffffu
  } else {
    equal = (a == b);
  }
  if (!equal) failed(file, line, std::string("CHECK_EQ(") + text + "): got " + show(a) + ", expected " + show(b));
}

// |a - b| <= tolerance; NaN is never near anything.
inline void check_near(double a, double b, double tolerance, const char* text, const char* file, int line) {
  ++state().checks;
  if (a == b || std::fabs(a - b) <= tolerance) return;
  failed(
      file, line,
      std::string("CHECK_NEAR(") + text + "): got " + show(a) + ", expected " + show(b) + ", difference " + show(std::fabs(a - b)));
}

template <class Error>
void check_throws(const std::function<void()>& call, const std::string& substring, const char* text, const char* file, int line) {
  ++state().checks;
  try {
    call();
  } catch (const std::exception& error) {
    const std::string message = error.what();
    if (dynamic_cast<const Error*>(&error) == nullptr) {
      failed(file, line, std::string("CHECK_THROWS(") + text + "): another exception: " + message);
    } else if (message.find(substring) == std::string::npos) {
      failed(file, line,
             std::string("CHECK_THROWS(") + text + "): message \"" + message + "\" does not contain \"" + substring + "\"");
    }
    return;
  }
  failed(file, line, std::string("CHECK_THROWS(") + text + "): nothing was thrown");
}

inline int run(int argc, char** argv) {
  State& s = state();
  std::string filter;
  bool list = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      list = true;
    } else if (argument.rfind("--", 0) == 0) {
      if (i + 1 == argc) {
        std::printf("option %s needs a value\n", argv[i]);
        return 2;
      }
      s.options[argument] = argv[++i];
    } else {
      filter = argument;
    }
  }
  if (list) {
    for (const Case& c : s.cases) std::printf("%s\n", c.name);
    return 0;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash must not swallow what was printed before it
  int passed = 0, failed_cases = 0;
  for (const Case& c : s.cases) {
    if (!filter.empty() && std::string(c.name).find(filter) == std::string::npos) continue;
    s.checks = s.failures = 0;
    try {
      c.body();
      if (s.checks == 0) failed(c.name, 0, "the test checked nothing");
    } catch (const std::exception& error) {
      failed(c.name, 0, std::string("unexpected exception: ") + error.what());
    } catch (...) {
      failed(c.name, 0, "unexpected exception of unknown type");
    }
    if (s.failures == 0) {
      ++passed;
    } else {
      ++failed_cases;
      std::printf("FAILED %s (%ld of %ld checks)\n", c.name, s.failures, s.checks);
    }
  }
  if (passed + failed_cases == 0) std::printf("no test matches \"%s\"\n", filter.c_str());
  std::printf("%d passed, %d failed\n", passed, failed_cases);
  return failed_cases == 0 && passed > 0 ? 0 : 1;
}

}  // namespace loquetier::test

#define TEST(name)                                                                                      \
  static void loquetier_test_##name();                                                                  \
  static const ::loquetier::test::Registration loquetier_register_##name(#name, loquetier_test_##name); \
  static void loquetier_test_##name()

#define CHECK(...) ::loquetier::test::check_true(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define CHECK_EQ(a, b) ::loquetier::test::check_equal((a), (b), #a ", " #b, __FILE__, __LINE__)
#define CHECK_NEAR(a, b, tolerance)                                                                             \
  ::loquetier::test::check_near(static_cast<double>(a), static_cast<double>(b), static_cast<double>(tolerance), \
                                #a ", " #b ", " #tolerance, __FILE__, __LINE__)
// CHECK_THROWS(Type, substring of what(), expression or statements)
#define CHECK_THROWS(Type, substring, ...)                                                    \
  ::loquetier::test::check_throws<Type>([&] { static_cast<void>(__VA_ARGS__); }, (substring), \
                                        #Type ", " #substring ", " #__VA_ARGS__, __FILE__, __LINE__)

int main(int argc, char** argv) { return ::loquetier::test::run(argc, argv); }
