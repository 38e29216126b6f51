// Any bytes as an exported adapter: refused with a loquetier::Error, or a snapshot that is written back and read again to the same
// bytes.
#include <cstdlib>

#include "io/checkpoint.h"
#include "models.h"

using namespace loquetier;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ModelConfig model = fuzz_model(false);
  try {
    const AdapterSnapshot snapshot = parse_snapshot({reinterpret_cast<const char*>(data), size}, "fuzz", model, 64);
    const std::string bytes = snapshot_bytes(snapshot);
    if (snapshot_bytes(parse_snapshot(bytes, "written", model, 64)) != bytes) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
