// Construction of the CPU backend, its device, and the checks that all of its operations share.
#include "cpu/cpu_ops.h"

#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace loquetier {

std::unique_ptr<Ops> make_cpu_ops(int threads, bool deterministic) {
  return std::make_unique<cpu::CpuOps>(threads, deterministic, cpu::select_kernels());
}

namespace cpu {

namespace {
constexpr std::align_val_t kAlignment{256};
}

CpuOps::CpuOps(int threads, bool deterministic, const Kernels& kernels)
    : kernels_(kernels), deterministic_(deterministic), pool_(threads) {}

void* CpuDevice::allocate(size_t bytes) {
  void* data = ::operator new(bytes > 0 ? bytes : 1, kAlignment, std::nothrow);
  require<OutOfMemory>(data != nullptr, "[cpu] allocate: expected ", bytes, " bytes of memory, got none");
  return data;
}
void CpuDevice::release(void* data) noexcept { ::operator delete(data, kAlignment); }

void CpuDevice::copy_to_device(void* dst, const void* host, size_t bytes) {
  if (bytes > 0) std::memcpy(dst, host, bytes);
}
void CpuDevice::copy_to_host(void* host, const void* src, size_t bytes) {
  if (bytes > 0) std::memcpy(host, src, bytes);
}
void CpuDevice::copy_on_device(void* dst, const void* src, size_t bytes) {
  if (bytes > 0) std::memmove(dst, src, bytes);
}
void CpuDevice::zero(void* dst, size_t bytes) {
  if (bytes > 0) std::memset(dst, 0, bytes);
}

size_t CpuDevice::free_bytes() const {
  size_t free = std::numeric_limits<size_t>::max();
#if defined(__linux__)
  const auto read_number = [](const char* path, const char* format, unsigned long long& value) {
    std::FILE* file = std::fopen(path, "r");
    if (!file) return false;
    bool found = false;
    char line[256];
    while (!found && std::fgets(line, sizeof line, file)) found = std::sscanf(line, format, &value) == 1;
    std::fclose(file);
    return found;
  };
  unsigned long long available = 0, limit = 0, used = 0;
  if (read_number("/proc/meminfo", "MemAvailable: %llu kB", available)) free = static_cast<size_t>(available) * 1024;
  else free = static_cast<size_t>(sysconf(_SC_AVPHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // Inside a container the control group's limit counts, not the machine's memory.
  if (read_number("/sys/fs/cgroup/memory.max", "%llu", limit) && read_number("/sys/fs/cgroup/memory.current", "%llu", used)) {
    const size_t left = limit > used ? static_cast<size_t>(limit - used) : 0;
    if (left < free) free = left;
  }
#endif
  return free;
}

void check_matrix(const char* op, const char* name, const TensorView& view, int64_t rows, int64_t cols, DType dtype) {
  require(view.dtype == dtype, "[", op, "] ", name, ": expected ", name_of(dtype), ", got ", name_of(view.dtype));
  const auto size = [](int64_t n) { return n < 0 ? std::string("any") : std::to_string(n); };
  require(view.rows >= 0 && view.cols >= 0 && (rows < 0 || view.rows == rows) && (cols < 0 || view.cols == cols), "[", op, "] ",
          name, ": expected [", size(rows), ", ", size(cols), "], got [", view.rows, ", ", view.cols, "]");
  require(view.ld >= view.cols || view.rows <= 1, "[", op, "] ", name, ": expected a leading dimension of at least ", view.cols,
          ", got ", view.ld);
  require(view.data != nullptr || view.size() == 0, "[", op, "] ", name, ": expected data, got a null pointer");
}

void check_vector(const char* op, const char* name, const TensorView& view, int64_t n, DType dtype) {
  require(view.dtype == dtype, "[", op, "] ", name, ": expected ", name_of(dtype), ", got ", name_of(view.dtype));
  require(view.rows == 1 && view.cols == n, "[", op, "] ", name, ": expected [", n, "], got [", view.rows, ", ", view.cols, "]");
  require(view.data != nullptr || n == 0, "[", op, "] ", name, ": expected data, got a null pointer");
}

}  // namespace cpu
}  // namespace loquetier
