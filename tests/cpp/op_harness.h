// How the operation tests drive a backend: host matrices of double go up in a dtype (and are rounded in place, so that the
// reference sees what the backend sees), an operation runs, results come down and are compared with cpp/cpu/reference.h. Written
// over Ops&, so the same table serves every backend; option --backend names it.
//
// Outputs are filled with NaN before, lie between guard words, and have a leading dimension larger than their columns; every
// operation runs twice and must give the same bytes. A measured error is max|got - want| / max|want|; `--errors yes` prints the
// largest per label.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/cpu_ops.h"
#include "cpu/reference.h"
#include "ops/ops.h"

namespace loquetier::test {

using Host = reference::Matrix<double>;

inline float round_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}
inline float f16_value(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31)
    return fraction == 0 ? sign * std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25));
}
// The nearest f16, ties to even, by arithmetic instead of bits.
inline uint16_t f16_bits(float x) {
  if (std::isnan(x)) return 0x7E00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(static_cast<double>(x));
  if (a >= 65520) return static_cast<uint16_t>(sign | 0x7C00);
  const int exponent = a < 0x1p-14 ? -14 : std::ilogb(a);
  const double steps = std::nearbyint(std::ldexp(a, 10 - exponent));  // 1024 to 2048, or below 1024 when subnormal
  return static_cast<uint16_t>(sign + static_cast<uint16_t>(steps) + (exponent + 14) * 1024);
}

// One backend under test.
class Rig {
 public:
  Rig(std::unique_ptr<Ops> backend, std::string name, bool deterministic, uint64_t seed)
      : ops_(std::move(backend)), name_(std::move(name)), deterministic_(deterministic), generator_(seed) {}

  Ops& ops() { return *ops_; }
  Device& device() { return ops_->device(); }
  DType dtype() const { return ops_->compute_dtype(); }
  const std::string& name() const { return name_; }
  bool deterministic() const { return deterministic_; }
  bool exact() const { return dtype() == DType::f32; }
  // The bound of an f32 backend, or what rounding to a 16-bit compute dtype allows: `wide` where a case says so.
  double bound(double f32, double wide = 1e-2) const { return exact() ? f32 : wide; }
  int64_t pad() const { return exact() ? 3 : 8; }  // columns between rows; 16-bit backends load 16 bytes at a time

  Host random(int64_t rows, int64_t cols, double spread = 1) {
    Host m(rows, cols);
    std::normal_distribution<double> normal(0, spread);
    for (double& x : m.values) x = normal(generator_);
    return m;
  }
  int64_t random_int(int64_t n) { return static_cast<int64_t>(generator_() % static_cast<uint64_t>(n)); }
  uint64_t random_word() { return generator_(); }

 private:
  std::unique_ptr<Ops> ops_;
  std::string name_;
  bool deterministic_;
  std::mt19937_64 generator_;
};

// Calls body with every variant of the backend that --backend names (default cpu): its instruction sets, and the deterministic
// mode.
inline void for_each_rig(const std::function<void(Rig&)>& body) {
  const std::string backend = option("--backend", "cpu");
  const uint64_t seed = std::strtoull(option("--seed", "20252").c_str(), nullptr, 10);
  static bool printed = false;
  if (!printed) std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  printed = true;
  const auto run = [&](std::unique_ptr<Ops> ops, const std::string& name, bool deterministic) {
    const long before = state().failures;
    Rig rig(std::move(ops), name, deterministic, seed);
    body(rig);
    if (state().failures != before) std::printf("  (on %s%s)\n", name.c_str(), deterministic ? ", deterministic" : "");
  };
  if (backend == "cuda") {
    const std::string dtype = option("--dtype", "bf16");
    const DType compute = dtype == "f16" ? DType::f16 : dtype == "f32" ? DType::f32 : DType::bf16;
    for (const bool deterministic : {false, true}) run(make_cuda_ops(0, compute, deterministic), "cuda " + dtype, deterministic);
    return;
  }
  require(backend == "cpu", "[op tests] --backend: expected cpu or cuda, got ", backend);
  for (const cpu::Kernels* kernels : {cpu::kernels_avx512(), cpu::kernels_avx2(), cpu::kernels_baseline()}) {
    if (!kernels) continue;
    for (const bool deterministic : {false, true})
      run(std::make_unique<cpu::CpuOps>(2, deterministic, *kernels), std::string("cpu ") + kernels->name, deterministic);
  }
}

// A matrix on the device with guards around it and between its rows.
class OnDevice {
 public:
  // Uploads `host`, rounding it in place to `dtype`.
  OnDevice(Rig& rig, Host& host, DType dtype) : OnDevice(rig, host.rows, host.cols, dtype) {
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < cols_; ++j) {
        write(i, j, host(i, j));
        host(i, j) = read(bytes_, i, j);
      }
    upload();
  }
  OnDevice(Rig& rig, Host& host) : OnDevice(rig, host, rig.dtype()) {}
  // An output: all NaN (all bits set).
  OnDevice(Rig& rig, int64_t rows, int64_t cols, DType dtype)
      : rig_(&rig),
        rows_(rows),
        cols_(cols),
        ld_(cols + rig.pad()),
        dtype_(dtype),
        bytes_(static_cast<size_t>(2 * kGuard + rows * ld_) * size_of(dtype), 0xFF),
        buffer_(rig.device(), bytes_.size()) {
    upload();
  }
  OnDevice(Rig& rig, int64_t rows, int64_t cols) : OnDevice(rig, rows, cols, rig.dtype()) {}

  TensorView view() const {
    return {static_cast<std::byte*>(buffer_.data()) + kGuard * static_cast<int64_t>(size_of(dtype_)), dtype_, rows_, cols_, ld_};
  }
  operator TensorView() const { return view(); }
  void upload() { rig_->device().copy_to_device(buffer_.data(), bytes_.data(), bytes_.size()); }
  std::vector<unsigned char> download() const {
    std::vector<unsigned char> now(bytes_.size());
    rig_->device().copy_to_host(now.data(), buffer_.data(), now.size());
    return now;
  }
  Host get() const {
    const auto now = download();
    Host host(rows_, cols_);
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < cols_; ++j) host(i, j) = read(now, i, j);
    return host;
  }
  // The elements outside [rows, cols] are as they were.
  bool guards_intact() const {
    const auto now = download();
    const int64_t size = static_cast<int64_t>(size_of(dtype_));
    for (int64_t i = 0; i < static_cast<int64_t>(now.size()) / size; ++i) {
      const int64_t at = i - kGuard;
      if (at >= 0 && at < rows_ * ld_ && at % ld_ < cols_) continue;
      for (int64_t b = i * size; b < (i + 1) * size; ++b)
        if (now[static_cast<size_t>(b)] != 0xFF) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kGuard = 64;
  size_t at(int64_t i, int64_t j) const { return static_cast<size_t>(kGuard + i * ld_ + j) * size_of(dtype_); }
  void write(int64_t i, int64_t j, double value) {
    unsigned char* to = &bytes_[at(i, j)];
    const float x = static_cast<float>(value);
    if (dtype_ == DType::f32) std::memcpy(to, &x, 4);
    else if (dtype_ == DType::i32) {
      const int32_t n = static_cast<int32_t>(value);
      std::memcpy(to, &n, 4);
    } else {
      const uint16_t h = dtype_ == DType::f16 ? f16_bits(x) : static_cast<uint16_t>(std::bit_cast<uint32_t>(round_bf16(x)) >> 16);
      std::memcpy(to, &h, 2);
    }
  }
  double read(const std::vector<unsigned char>& from, int64_t i, int64_t j) const {
    const unsigned char* p = &from[at(i, j)];
    if (dtype_ == DType::f32) {
      float x;
      std::memcpy(&x, p, 4);
      return static_cast<double>(x);
    }
    if (dtype_ == DType::i32) {
      int32_t n;
      std::memcpy(&n, p, 4);
      return n;
    }
    uint16_t h;
    std::memcpy(&h, p, 2);
    return static_cast<double>(dtype_ == DType::f16 ? f16_value(h) : std::bit_cast<float>(static_cast<uint32_t>(h) << 16));
  }

  Rig* rig_;
  int64_t rows_, cols_, ld_;
  DType dtype_;
  std::vector<unsigned char> bytes_;  // as uploaded
  Buffer buffer_;
};

// An array of plain data on the device, read-only there.
template <class T>
class ArrayOnDevice {
 public:
  ArrayOnDevice(Rig& rig, const std::vector<T>& host) : buffer_(rig.device(), std::max<size_t>(1, host.size() * sizeof(T))) {
    if (!host.empty()) rig.device().copy_to_device(buffer_.data(), host.data(), host.size() * sizeof(T));
    rig.device().synchronize();
  }
  const T* data() const { return static_cast<const T*>(buffer_.data()); }
  T* data() { return static_cast<T*>(buffer_.data()); }

 private:
  Buffer buffer_;
};

// Runs an operation twice from the same starting contents of its outputs: same bytes, guards whole.
inline void run_twice(std::initializer_list<OnDevice*> outputs, const std::function<void()>& operation) {
  operation();
  std::vector<std::vector<unsigned char>> first;
  for (OnDevice* out : outputs) first.push_back(out->download());
  for (OnDevice* out : outputs) out->upload();
  operation();
  size_t i = 0;
  for (OnDevice* out : outputs) {
    CHECK(out->download() == first[i++]);
    CHECK(out->guards_intact());
  }
}

// max|got - want| / max(max|want|, scale). NaN in `want` means: the operation leaves this element alone (it is still NaN).
inline double relative_error(const Host& got, const Host& want, double scale) {
  double error = 0, largest = scale;
  for (size_t i = 0; i < want.values.size(); ++i) {
    if (std::isnan(want.values[i])) {
      if (!std::isnan(got.values[i])) return std::numeric_limits<double>::infinity();
      continue;
    }
    const double difference = std::fabs(got.values[i] - want.values[i]);
    if (!(difference <= std::numeric_limits<double>::max())) return std::numeric_limits<double>::infinity();
    error = std::max(error, difference);
    largest = std::max(largest, std::fabs(want.values[i]));
  }
  return error == 0 ? 0 : error / largest;
}

inline std::map<std::string, double>& measured_errors() {
  static std::map<std::string, double> errors;
  return errors;
}

// `scale`: size of the terms of a sum that may cancel to nothing.
inline void expect(const std::string& label, const Host& got, const Host& want, double bound, double scale = 0) {
  CHECK_EQ(got.values.size(), want.values.size());
  const double error = relative_error(got, want, scale);
  double& worst = measured_errors()[label];
  worst = std::max(worst, error);
  if (!(error <= bound))
    std::printf("  %s [%lld, %lld]: error %g, bound %g\n", label.c_str(), static_cast<long long>(want.rows),
                static_cast<long long>(want.cols), error, bound);
  CHECK(error <= bound);
}

inline Host rows_of(const Host& m, int64_t begin, int64_t n) {
  Host part(n, m.cols);
  std::copy_n(m.values.begin() + begin * m.cols, n * m.cols, part.values.begin());
  return part;
}

constexpr double kUntouched = std::numeric_limits<double>::quiet_NaN();

}  // namespace loquetier::test
