// Element types and non-owning matrix views. No LLM word in core/. A view never owns and is passed by value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "core/check.h"

namespace loquetier {

enum class DType : uint8_t { f32, f16, bf16, i32, i64, u8 };

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::i64:
      return 8;
    case DType::u8:
      return 1;
  }
  return 0;
}

constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::i32:
      return "i32";
    case DType::i64:
      return "i64";
    case DType::u8:
      return "u8";
  }
  return "?";
}

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  else if constexpr (std::is_same_v<T, int32_t>) return DType::i32;
  else if constexpr (std::is_same_v<T, int64_t>) return DType::i64;
  else if constexpr (std::is_same_v<T, uint8_t>) return DType::u8;
  else static_assert(sizeof(T) == 0, "dtype_of: type without a DType");
}

// A row-major matrix of `rows` x `cols`, `ld` elements from one row to the next. A vector is one row.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;

  template <class T>
  T* as() const {
    require(dtype == dtype_of<T>(), "[tensor] dtype: expected ", name_of(dtype_of<T>()), ", got ", name_of(dtype));
    return static_cast<T*>(data);
  }
  void* at(int64_t row, int64_t col = 0) const {
    return static_cast<std::byte*>(data) + (row * ld + col) * static_cast<int64_t>(size_of(dtype));
  }
  TensorView slice_rows(int64_t begin, int64_t n) const { return {at(begin), dtype, n, cols, ld}; }
  TensorView slice_cols(int64_t begin, int64_t n) const { return {at(0, begin), dtype, rows, n, ld}; }
  int64_t size() const { return rows * cols; }
  bool empty() const { return data == nullptr || size() == 0; }
  bool contiguous() const { return ld == cols || rows <= 1; }
};

inline TensorView matrix(void* data, DType dtype, int64_t rows, int64_t cols) { return {data, dtype, rows, cols, cols}; }
inline TensorView vector(void* data, DType dtype, int64_t n) { return {data, dtype, 1, n, n}; }

}  // namespace loquetier
