// Memory of one device: the Device interface, the only owner (Buffer), and the Arena that lends views out of a buffer.
//
// An Arena without storage is in counting mode: take() hands out views without data and only adds up sizes. Sizing a step and
// running it go through the same carving code, so admission and execution cannot disagree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "core/tensor.h"

namespace loquetier {

// Memory and ordering of one device. Copies and zero() are ordered on the device's stream; only synchronize() and
// copy_to_host() wait. Thread-safe for allocate/release; everything else is called by the thread that runs the step.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;      // "cpu", "cuda:0"
  virtual void* allocate(size_t bytes) = 0;  // 64-byte aligned or better; throws OutOfMemory naming the bytes
  virtual void release(void* data) noexcept = 0;
  virtual void* allocate_host(size_t bytes) = 0;  // host memory fit for asynchronous copies (pinned)
  virtual void release_host(void* data) noexcept = 0;
  virtual void copy_to_device(void* dst, const void* host, size_t bytes) = 0;  // asynchronous from pinned memory
  virtual void copy_to_host(void* host, const void* src, size_t bytes) = 0;    // returns when the bytes are there
  // In the order of the stream, to pinned memory; the bytes are there when a mark behind it is reached.
  virtual void start_copy_to_host(void* host, const void* src, size_t bytes) { copy_to_host(host, src, bytes); }
  virtual void copy_on_device(void* dst, const void* src, size_t bytes) = 0;
  virtual void zero(void* dst, size_t bytes) = 0;
  virtual void synchronize() = 0;
  // A mark in the order of work, and waiting until all before it is done. On a device that works in step with the host: nothing. At
  // most kMarks marks are remembered; waiting for an older one waits for a younger.
  static constexpr uint64_t kMarks = 16;
  virtual uint64_t record() { return 0; }
  virtual void wait(uint64_t mark) { static_cast<void>(mark); }
  virtual bool reached(uint64_t mark) {  // whether wait() would return at once
    static_cast<void>(mark);
    return true;
  }

  // A second queue, for copies beside the step's work (adapters fetched ahead). Its copies are ordered among themselves; between
  // the queues there is only the order asked for here. The host memory must stay as it is until the copy is done. Where there is no
  // second queue all of it is the stream.
  virtual void side_copy_to_device(void* dst, const void* host, size_t bytes) { copy_to_device(dst, host, bytes); }
  virtual void side_follow(uint64_t) {}       // the side queue goes on when that mark is reached
  virtual uint64_t side_mark() { return 0; }  // the point behind what the side queue was given so far; 0: reached
  virtual void wait_for_side(uint64_t) {}     // the stream goes on when the side queue has reached that point
  virtual void side_synchronize() {}          // waits; any thread

  virtual size_t free_bytes() const = 0;      // what could be allocated now
  virtual bool host_addressable() const = 0;  // true: device pointers may be read and written by the host (CPU)
};

// Owns one allocation of a device (or its pinned host memory). Move-only.
class Buffer {
 public:
  enum class Where { device, host };
  Buffer() = default;
  Buffer(Device& device, size_t bytes, Where where = Where::device);
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  TensorView view(DType dtype, int64_t rows, int64_t cols, size_t offset_bytes = 0) const;

 private:
  void swap(Buffer& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(where_, other.where_);
  }
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Where where_ = Where::device;
};

// Lends 256-byte aligned views out of one block, first in, all out: rewind() gives back everything taken since mark().
class Arena {
 public:
  Arena() = default;  // counting mode
  Arena(void* data, size_t capacity) : data_(static_cast<std::byte*>(data)), capacity_(capacity) {}

  TensorView take(DType dtype, int64_t rows, int64_t cols);  // throws OutOfMemory with needed and available bytes
  TensorView take_vector(DType dtype, int64_t n) { return take(dtype, 1, n); }
  void* take_bytes(size_t bytes);
  size_t mark() const { return used_; }
  void rewind(size_t mark) { used_ = mark; }
  size_t used() const { return used_; }
  size_t peak() const { return peak_; }
  bool counting() const { return data_ == nullptr; }
  const void* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
  size_t peak_ = 0;
};

}  // namespace loquetier
