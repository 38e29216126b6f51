// Counter-based random numbers, the same on the host and on every device: Philox4x32-10 (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011). A value depends on its key and counter only, so a dropout mask is regenerated instead of stored
// and a request's samples do not depend on who else is in the batch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LOQUETIER_HOST_DEVICE __host__ __device__
#else
#define LOQUETIER_HOST_DEVICE
#endif

namespace loquetier {

struct Philox4 {
  uint32_t v[4];
};

LOQUETIER_HOST_DEVICE inline Philox4 philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in (0, 1), never 0 or 1: 23 bits, so that adding one half is exact (with 24 the largest value would round up to 1).
LOQUETIER_HOST_DEVICE inline float uniform01(uint32_t bits) { return (static_cast<float>(bits >> 9) + 0.5f) * 0x1p-23f; }

// What a token of a vocabulary is drawn with. Four neighbouring tokens share one Philox call.
LOQUETIER_HOST_DEVICE inline Philox4 philox_of_tokens(uint64_t seed, int64_t index, int64_t token) {
  return philox(seed, static_cast<uint64_t>(index), static_cast<uint64_t>(token) / 4);
}

// Mixes one more word into a key (the finalizer of SplitMix64).
LOQUETIER_HOST_DEVICE inline uint64_t mix_key(uint64_t key, uint64_t word) {
  uint64_t z = key + 0x9E3779B97F4A7C15u * (word + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// True when element `column` of a dropout mask is kept. `row_key` identifies (job seed, example, position); `stream` the module and
// part. Kept values are divided by (1 - p) by the caller. Four neighbouring columns share one Philox call.
LOQUETIER_HOST_DEVICE inline bool dropout_keep(uint64_t row_key, uint32_t stream, int64_t column, float p) {
  const Philox4 bits = philox(row_key, static_cast<uint64_t>(column) >> 2, stream);
  return uniform01(bits.v[column & 3]) >= p;
}

}  // namespace loquetier
