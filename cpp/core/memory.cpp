#include "core/memory.h"

namespace loquetier {

namespace {
constexpr size_t kAlignment = 256;
constexpr size_t round_up(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }
}  // namespace

Buffer::Buffer(Device& device, size_t bytes, Where where) : device_(&device), bytes_(bytes), where_(where) {
  if (bytes > 0) data_ = where == Where::device ? device.allocate(bytes) : device.allocate_host(bytes);
}

Buffer::~Buffer() {
  if (!data_) return;
  if (where_ == Where::device) device_->release(data_);
  else device_->release_host(data_);
}

TensorView Buffer::view(DType dtype, int64_t rows, int64_t cols, size_t offset_bytes) const {
  require(offset_bytes + size_of(dtype) * static_cast<size_t>(rows * cols) <= bytes_, "[buffer] view: expected at most ", bytes_,
          " bytes, got offset ", offset_bytes, " and [", rows, ", ", cols, "] ", name_of(dtype));
  return matrix(static_cast<std::byte*>(data_) + offset_bytes, dtype, rows, cols);
}

void* Arena::take_bytes(size_t bytes) {
  const size_t begin = used_, end = begin + round_up(bytes);
  require<OutOfMemory>(counting() || end <= capacity_, "[arena] expected room for ", bytes, " bytes, ", capacity_ - begin, " of ",
                       capacity_, " are left");
  used_ = end;
  if (used_ > peak_) peak_ = used_;
  return counting() ? nullptr : data_ + begin;
}

TensorView Arena::take(DType dtype, int64_t rows, int64_t cols) {
  return matrix(take_bytes(size_of(dtype) * static_cast<size_t>(rows * cols)), dtype, rows, cols);
}

}  // namespace loquetier
