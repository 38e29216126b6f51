// One step's metadata: built in host memory fit for asynchronous copies, sent to the device in one copy. Where the host can address
// the device's memory (CPU) there is no second block and no copy.
#pragma once

#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "core/memory.h"

namespace loquetier {

// An array that lies at the same offset in both blocks.
template <class T>
struct Both {
  T* host = nullptr;
  T* device = nullptr;
};

class Blob {
 public:
  explicit Blob(Device& device) : device_(&device) {}

  // Room for `bytes` from now on; pointers given out before are dead when it grows.
  void reserve(size_t bytes) {
    if (host_.bytes() >= bytes) return;
    host_ = Buffer();
    host_ = Buffer(*device_, bytes, Buffer::Where::host);
    if (device_->host_addressable()) return;
    remote_ = Buffer();
    remote_ = Buffer(*device_, bytes);
  }

  // Empties it and makes room for `bytes`; pointers given out before are dead.
  void begin(size_t bytes) {
    used_ = 0;
    ++filling_;
    if (host_.bytes() >= bytes) return;
    device_->synchronize();  // a step under way may still use what it outgrows
    reserve(bytes + bytes / 2);
  }
  uint64_t filling() const { return filling_; }  // which it is
  size_t device_bytes() const { return device_->host_addressable() ? host_.bytes() : remote_.bytes(); }

  template <class T>
  Both<T> take(size_t n) {
    constexpr size_t kAlign = 64;
    const size_t begin = (used_ + kAlign - 1) / kAlign * kAlign;
    used_ = begin + n * sizeof(T);
    if (used_ > host_.bytes()) throw std::logic_error("blob: reserved too little");
    std::byte* device = static_cast<std::byte*>(device_->host_addressable() ? host_.data() : remote_.data());
    return {reinterpret_cast<T*>(static_cast<std::byte*>(host_.data()) + begin), reinterpret_cast<T*>(device + begin)};
  }
  template <class T>
  Both<T> put(const T* values, size_t n) {
    Both<T> both = take<T>(n);
    if (n > 0) std::memcpy(static_cast<void*>(both.host), values, n * sizeof(T));
    return both;
  }

  void upload() {
    if (!device_->host_addressable() && used_ > 0) device_->copy_to_device(remote_.data(), host_.data(), used_);
  }
  const void* host() const { return host_.data(); }
  void start_download() {  // there when a mark behind it is reached
    if (!device_->host_addressable() && used_ > 0) device_->start_copy_to_host(host_.data(), remote_.data(), used_);
  }

 private:
  Device* device_;
  Buffer host_;
  Buffer remote_;
  size_t used_ = 0;
  uint64_t filling_ = 0;
};

}  // namespace loquetier
