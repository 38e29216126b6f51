// Any text as a config.json: refused with a loquetier::Error, or a configuration whose sizes are sound and whose rotary frequencies
// are finite.
#include <cmath>
#include <cstdlib>

#include "io/hf_config.h"

using namespace loquetier;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const ModelConfig config = parse_hf_config({reinterpret_cast<const char*>(data), size}, "fuzz");
    if (config.vocab_size < 1 || config.hidden_size < 1 || config.intermediate_size < 1 || config.num_layers < 1 ||
        config.num_heads < 1 || config.num_kv_heads < 1 || config.num_heads % config.num_kv_heads != 0 || config.head_size < 2 ||
        config.head_size % 2 != 0 || config.qkv_columns() < 1 || !(config.rms_norm_eps > 0) ||
        !std::isfinite(config.attention().scale)) {
      std::abort();
    }
    for (int32_t id : config.eos_token_ids)
      if (id < 0 || id >= config.vocab_size) std::abort();
    if (config.head_size <= 256) {  // a large one is sound too, but slow
      for (float frequency : rope_inv_freq(config))
        if (!std::isfinite(frequency) || frequency < 0) std::abort();
    }
    if (config.num_layers <= 16 && modules_of(config).size() != static_cast<size_t>(config.num_layers) * 7 + 1) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
