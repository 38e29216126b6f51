// Host conversion between f32, f16 and bf16: one pass, branch-free per element so that the compiler vectorises it, no alignment
// needed. Rounding is to nearest, ties to even; infinities, signed zeros and subnormals are exact; a NaN stays a (quiet) NaN with
// its sign and leading payload bits.
#include <bit>
#include <cstring>

#include "io/safetensors.h"

namespace loquetier {

namespace {

// yes or no by a mask, as the compiler makes a branch, and no vector code, of some conditional expressions.
uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

float widen_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity, NaN
  const uint32_t subnormal = std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t bits = select(magnitude < 0x400u, subnormal, select(magnitude < 0x7c00u, normal, special));
  return std::bit_cast<float>(sign | bits);
}

float widen_bf16(uint16_t brain) { return std::bit_cast<float>(static_cast<uint32_t>(brain) << 16); }

uint16_t narrow_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Adding half a unit in the last kept place, less one for ties to an even result, carries into the exponent where it must.
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  // Next to 0.5 floats are 2^-24 apart, which is the unit of half subnormals: the addition itself rounds.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t finite = select(magnitude < 0x38800000u, subnormal, normal);  // below 2^-14
  const uint32_t result =
      select(magnitude > 0x7f800000u, nan, select(magnitude >= 0x47800000u, 0x7c00u, finite));  // from 2^16: infinity
  return static_cast<uint16_t>(sign | result);
}

uint16_t narrow_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>(select((bits & 0x7fffffffu) > 0x7f800000u, nan, rounded));
}

template <class From, class To, class Convert>
void convert_each(const void* src, void* dst, int64_t n, Convert convert) {
  const auto* in = static_cast<const std::byte*>(src);
  auto* out = static_cast<std::byte*>(dst);
  for (int64_t i = 0; i < n; ++i) {
    From from;
    std::memcpy(&from, in + i * static_cast<int64_t>(sizeof(From)), sizeof(From));
    const To to = convert(from);
    std::memcpy(out + i * static_cast<int64_t>(sizeof(To)), &to, sizeof(To));
  }
}

bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

}  // namespace

void convert_elements(const void* src, DType from, void* dst, DType to, int64_t n) {
  require(is_float(from), "[convert] source dtype: expected f32, f16 or bf16, got ", name_of(from));
  require(is_float(to), "[convert] target dtype: expected f32, f16 or bf16, got ", name_of(to));
  require(n >= 0, "[convert] n: expected at least 0 elements, got ", n);
  if (n == 0) return;
  if (from == to) {
    std::memcpy(dst, src, static_cast<size_t>(n) * size_of(from));
  } else if (from == DType::f16 && to == DType::f32) {
    convert_each<uint16_t, float>(src, dst, n, widen_f16);
  } else if (from == DType::bf16 && to == DType::f32) {
    convert_each<uint16_t, float>(src, dst, n, widen_bf16);
  } else if (from == DType::f32 && to == DType::f16) {
    convert_each<float, uint16_t>(src, dst, n, narrow_f16);
  } else if (from == DType::f32 && to == DType::bf16) {
    convert_each<float, uint16_t>(src, dst, n, narrow_bf16);
  } else if (from == DType::f16) {
    convert_each<uint16_t, uint16_t>(src, dst, n, [](uint16_t half) { return narrow_bf16(widen_f16(half)); });
  } else {
    convert_each<uint16_t, uint16_t>(src, dst, n, [](uint16_t brain) { return narrow_f16(widen_bf16(brain)); });
  }
}

}  // namespace loquetier
