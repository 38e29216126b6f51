// Tensor maps of the bulk copy engine (TMA) for row-major matrices. A map is a function of pointer, shape and box alone, so they
// are kept: a decode step asks for the same hundred again and again.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <unordered_map>

#include "core/tensor.h"

namespace loquetier::cuda {

class TensorMaps {
 public:
  TensorMaps();  // throws DeviceError when the driver has no cuTensorMapEncodeTiled
  // t [rows, cols] 16-bit, 16-byte aligned rows; a box is [box_rows, box_cols] with 128-byte swizzle (box_cols * 2 <= 128), or
  // where it is 64 bytes wide with 64-byte swizzle. What a box holds outside of t reads as zero.
  CUtensorMap get(const TensorView& t, int64_t box_cols, int64_t box_rows);

 private:
  struct Key {
    const void* data;
    int64_t rows, cols, ld;
    int64_t box_cols, box_rows;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& key) const;
  };
  static constexpr size_t kMost = 1 << 16;
  decltype(&cuTensorMapEncodeTiled) encode_ = nullptr;
  std::unordered_map<Key, CUtensorMap, Hash> maps_;
};

}  // namespace loquetier::cuda
