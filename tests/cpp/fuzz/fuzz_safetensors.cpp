// Any bytes: refused with a loquetier::Error, or every tensor lies inside them, the data is covered exactly, and writing gives back
// what was read.
#include <cstdlib>
#include <cstring>

#include "io/safetensors.h"

using namespace loquetier;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    const SafetensorsFile file = SafetensorsFile::parse(bytes, "fuzz");
    std::vector<TensorToWrite> tensors;
    size_t sum = 0;
    for (const auto& [name, tensor] : file.tensors()) {
      const char* begin = static_cast<const char*>(tensor.data);
      if (begin < bytes.data() || begin + tensor.bytes > bytes.data() + size || &file.at(name) != &tensor) std::abort();
      unsigned char last = 0;
      if (tensor.bytes > 0) std::memcpy(&last, begin + tensor.bytes - 1, 1);
      sum += tensor.bytes;
      tensors.push_back({name, tensor.dtype, tensor.shape, tensor.data});
    }
    if (sum > size) std::abort();
    const std::string written = safetensors_bytes(tensors, file.metadata());
    const SafetensorsFile again = SafetensorsFile::parse(written, "written");
    if (again.tensors().size() != file.tensors().size() || again.metadata() != file.metadata()) std::abort();
    for (const auto& [name, tensor] : file.tensors()) {
      const TensorEntry& other = again.at(name);
      if (other.shape != tensor.shape || other.dtype != tensor.dtype || other.bytes != tensor.bytes) std::abort();
      if (tensor.bytes > 0 && std::memcmp(other.data, tensor.data, tensor.bytes) != 0) std::abort();
    }
    for (const auto& [name, dtype] : file.unsupported()) {
      try {
        file.at(name);
        std::abort();
      } catch (const FormatError&) {
      }
    }
  } catch (const Error&) {
  }
  return 0;
}
