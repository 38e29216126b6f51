// Memory and ordering of one GPU, and the checking functions. One non-blocking stream per device object: every copy and every op of
// its Ops is ordered on it.
#include <cstdlib>

#include "core/check.h"
#include "cuda_check.h"
#include "cuda_ops.h"

namespace loquetier::cuda {

namespace {

std::string place(const std::source_location& where) {
  const std::string path = where.file_name();
  return concat(path.substr(path.find_last_of('/') + 1), ":", where.line());
}

// Makes a device current for the calling thread and gives the former one back.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    cudaGetDevice(&before_);
    if (before_ != index) check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~CurrentDevice() { cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace

void check(cudaError_t status, const char* call, std::source_location where) {
  if (status == cudaSuccess) [[likely]]
    return;
  (void)cudaGetLastError();  // so that a later, unrelated call does not report this one again
  const std::string text =
      concat("[cuda] ", call, " at ", place(where), ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
  if (status == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  throw DeviceError(text);
}

void check(cublasStatus_t status, const char* call, std::source_location where) {
  if (status == CUBLAS_STATUS_SUCCESS) [[likely]]
    return;
  throw DeviceError(concat("[cuda] ", call, " at ", place(where), ": ", cublasLtGetStatusName(status)));
}

bool launches_are_synchronized() {
  static const bool synchronize = std::getenv("LOQUETIER_CUDA_SYNC") != nullptr;
  return synchronize;
}

void check_launch(cudaStream_t stream, std::source_location where) {
  if (launches_are_synchronized()) check(cudaStreamSynchronize(stream), "kernel", where);
}

void expect(const char* op, const char* tensor, const TensorView& view, DType dtype, int64_t rows, int64_t cols) {
  const auto size = [](int64_t n) { return n < 0 ? std::string("any") : std::to_string(n); };
  require(view.dtype == dtype, "[", op, "] ", tensor, ": expected ", name_of(dtype), ", got ", name_of(view.dtype));
  require((rows < 0 || view.rows == rows) && (cols < 0 || view.cols == cols), "[", op, "] ", tensor, ": expected [", size(rows),
          ", ", size(cols), "], got [", view.rows, ", ", view.cols, "]");
  require(view.ld >= view.cols || view.rows <= 1, "[", op, "] ", tensor, ": expected a leading dimension of at least ", view.cols,
          ", got ", view.ld);
  require(view.data != nullptr || view.size() == 0, "[", op, "] ", tensor, ": expected data, got a null pointer");
}

void expect_vector(const char* op, const char* tensor, const TensorView& view, DType dtype, int64_t n, bool optional) {
  if (optional && view.data == nullptr) return;
  require(view.dtype == dtype, "[", op, "] ", tensor, ": expected ", name_of(dtype), ", got ", name_of(view.dtype));
  require(view.rows == 1 && view.cols == n, "[", op, "] ", tensor, ": expected [", n, "], got [", view.rows, ", ", view.cols, "]");
  require(view.data != nullptr || n == 0, "[", op, "] ", tensor, ": expected data, got a null pointer");
}

CudaDevice::CudaDevice(int index) : index_(index) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  require<DeviceError>(index >= 0 && index < count, "[cuda] device: expected 0 .. ", count - 1, ", got ", index);
  check(cudaSetDevice(index), "cudaSetDevice");
  cudaDeviceProp properties = {};
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  require<DeviceError>(properties.major == 9, "[cuda] device ", index, " (", properties.name,
                       "): expected compute capability 9.0 (Hopper), got ", properties.major, ".", properties.minor);
  processors_ = properties.multiProcessorCount;
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  check(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  for (cudaEvent_t& event : marks_) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  for (cudaEvent_t& event : side_marks_)
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
}

CudaDevice::~CudaDevice() {
  cudaSetDevice(index_);
  cudaStreamSynchronize(side_);
  cudaStreamSynchronize(stream_);
  for (const cudaEvent_t event : marks_) cudaEventDestroy(event);
  for (const cudaEvent_t event : side_marks_) cudaEventDestroy(event);
  cudaStreamDestroy(side_);
  cudaStreamDestroy(stream_);
}

void CudaDevice::use() const { check(cudaSetDevice(index_), "cudaSetDevice"); }

void* CudaDevice::allocate(size_t bytes) {
  const CurrentDevice current(index_);
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw OutOfMemory(concat("[cuda] ", name(), ": expected room for ", bytes, " bytes, ", free_bytes(), " are free"));
  }
  check(status, "cudaMalloc");
  return data;
}

void CudaDevice::release(void* data) noexcept {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(index_);
  cudaFree(data);
  cudaSetDevice(before);
}

void* CudaDevice::allocate_host(size_t bytes) {
  const CurrentDevice current(index_);
  void* data = nullptr;
  const cudaError_t status = cudaMallocHost(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw OutOfMemory(concat("[cuda] expected ", bytes, " bytes of pinned host memory, the system has too little"));
  }
  check(status, "cudaMallocHost");
  return data;
}

void CudaDevice::release_host(void* data) noexcept { cudaFreeHost(data); }

void CudaDevice::copy_to_device(void* dst, const void* host, size_t bytes) {
  if (bytes > 0) check(cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync(to device)");
}

void CudaDevice::copy_to_host(void* host, const void* src, size_t bytes) {
  start_copy_to_host(host, src, bytes);
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

void CudaDevice::start_copy_to_host(void* host, const void* src, size_t bytes) {
  if (bytes > 0) check(cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync(to host)");
}

void CudaDevice::copy_on_device(void* dst, const void* src, size_t bytes) {
  if (bytes > 0) check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream_), "cudaMemcpyAsync(on device)");
}

void CudaDevice::zero(void* dst, size_t bytes) {
  if (bytes > 0) check(cudaMemsetAsync(dst, 0, bytes, stream_), "cudaMemsetAsync");
}

void CudaDevice::synchronize() { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

uint64_t CudaDevice::record() {
  check(cudaEventRecord(marks_[next_mark_ % kMarks], stream_), "cudaEventRecord");
  return next_mark_++;
}

void CudaDevice::wait(uint64_t mark) { check(cudaEventSynchronize(marks_[mark % kMarks]), "cudaEventSynchronize"); }

bool CudaDevice::reached(uint64_t mark) {
  const cudaError_t status = cudaEventQuery(marks_[mark % kMarks]);
  if (status != cudaErrorNotReady) check(status, "cudaEventQuery");
  return status == cudaSuccess;
}

void CudaDevice::side_copy_to_device(void* dst, const void* host, size_t bytes) {
  if (bytes > 0) check(cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, side_), "cudaMemcpyAsync(to device, beside)");
}

void CudaDevice::side_follow(uint64_t mark) { check(cudaStreamWaitEvent(side_, marks_[mark % kMarks]), "cudaStreamWaitEvent"); }

uint64_t CudaDevice::side_mark() {
  use();
  ++last_side_mark_;
  check(cudaEventRecord(side_marks_[last_side_mark_ % kSideMarks], side_), "cudaEventRecord");
  return last_side_mark_;
}

void CudaDevice::wait_for_side(uint64_t mark) {
  if (mark > 0) check(cudaStreamWaitEvent(stream_, side_marks_[mark % kSideMarks]), "cudaStreamWaitEvent");
}

void CudaDevice::side_synchronize() { check(cudaStreamSynchronize(side_), "cudaStreamSynchronize"); }

size_t CudaDevice::free_bytes() const {
  const CurrentDevice current(index_);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return free;
}

void* Scratch::get(size_t bytes) {
  if (bytes > buffer_.bytes()) reserve(bytes + bytes / 4);
  return buffer_.data();
}

void Scratch::reserve(size_t bytes) {
  if (bytes <= buffer_.bytes()) return;
  device_.synchronize();  // work under way may still use the old block
  buffer_ = Buffer();
  buffer_ = Buffer(device_, bytes);
}

}  // namespace loquetier::cuda
