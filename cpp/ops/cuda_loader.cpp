// Finds and loads the CUDA library (libloquetier_cuda.so) the first time a CUDA device is asked for, so that one build runs on
// machines with and without a GPU. The library stands beside this one and exports one C function; once loaded it is never unloaded,
// since ops, buffers and exception types made by it may live until the process ends.
#include "ops/cuda_loader.h"

#include <dlfcn.h>

#include <filesystem>
#include <string>

#include "core/check.h"
#include "ops/ops.h"

namespace loquetier {

namespace {

constexpr const char* kLibrary = "libloquetier_cuda.so";
constexpr const char* kFactory = "loquetier_make_cuda_ops";

std::string last_dl_error() {
  const char* text = dlerror();
  return text != nullptr ? text : "unknown error";
}

std::filesystem::path library_path() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&probe_cuda), &info) == 0 || info.dli_fname == nullptr) return kLibrary;
  return std::filesystem::absolute(info.dli_fname).parent_path() / kLibrary;
}

// The loader counts references, so asking again costs a look-up and gives the same handle.
void* load_library() {
  const std::filesystem::path path = library_path();
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle == nullptr) {
    throw DeviceError(concat("CUDA backend: cannot load ", path.string(), ": ", last_dl_error(),
                             "; it needs cuBLAS and the CUDA runtime: pip install \"loquetier-core[cuda]\", or put the toolkit's "
                             "libraries on the loader's path"));
  }
  return handle;
}

// Devices the driver reports; -1 with a reason when there is no driver or it cannot start.
int driver_devices(std::string& reason) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) {
    reason = "no NVIDIA driver (libcuda.so.1)";
    return -1;
  }
  const auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  const auto count = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  int devices = 0;
  int status = -1;
  if (init != nullptr && count != nullptr) {
    status = init(0);
    if (status == 0) status = count(&devices);
  }
  if (status != 0) {
    reason = concat("the NVIDIA driver does not start (CUDA error ", status, ")");
    return -1;
  }
  return devices;
}

}  // namespace

CudaProbe probe_cuda() {
  CudaProbe probe{true, 0, ""};
  const int devices = driver_devices(probe.detail);
  if (devices < 0) return probe;
  if (devices == 0) {
    probe.detail = "the NVIDIA driver reports no device";
    return probe;
  }
  try {
    load_library();
  } catch (const DeviceError& error) {
    probe.detail = error.what();
    return probe;
  }
  probe.devices = devices;
  probe.detail = concat(devices, devices == 1 ? " device" : " devices", ", library ", library_path().string());
  return probe;
}

std::unique_ptr<Ops> make_cuda_ops(int device, DType compute_dtype, bool deterministic) {
  std::string reason;
  const int devices = driver_devices(reason);
  require<DeviceError>(devices >= 0, "CUDA backend: ", reason);
  require<DeviceError>(device >= 0 && device < devices, "CUDA backend: device ", device, " does not exist, the driver reports ",
                       devices);
  void* handle = load_library();
  using Factory = Ops* (*)(int device, int compute_dtype, int deterministic);
  const auto factory = reinterpret_cast<Factory>(dlsym(handle, kFactory));
  require<DeviceError>(factory != nullptr, "CUDA backend: ", library_path().string(), " has no ", kFactory,
                       ", it belongs to another version");
  return std::unique_ptr<Ops>(factory(device, static_cast<int>(compute_dtype), deterministic ? 1 : 0));
}

}  // namespace loquetier
