#include "tensor_maps.h"

#include <cuda_runtime.h>

#include "core/check.h"
#include "cuda_check.h"

namespace loquetier::cuda {

size_t TensorMaps::Hash::operator()(const Key& key) const {
  size_t hash = reinterpret_cast<size_t>(key.data);
  for (const int64_t value : {key.rows, key.cols, key.ld, key.box_cols, key.box_rows})
    hash = (hash ^ static_cast<size_t>(value)) * 0x9E3779B97F4A7C15u + (hash >> 29);
  return hash;
}

TensorMaps::TensorMaps() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = {};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion");
  require<DeviceError>(result == cudaDriverEntryPointSuccess && function != nullptr,
                       "[cuda] the driver has no cuTensorMapEncodeTiled: expected a driver for CUDA 12 or newer");
  encode_ = reinterpret_cast<decltype(encode_)>(function);
}

CUtensorMap TensorMaps::get(const TensorView& t, int64_t box_cols, int64_t box_rows) {
  const Key key = {t.data, t.rows, t.cols, t.ld, box_cols, box_rows};
  const auto found = maps_.find(key);
  if (found != maps_.end()) return found->second;
  if (maps_.size() >= kMost) maps_.clear();
  CUtensorMap map = {};
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(t.cols), static_cast<cuuint64_t>(t.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(t.ld) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  const CUtensorMapDataType type = t.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle = box_cols * 2 == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUresult status = encode_(&map, type, 2, t.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require<DeviceError>(status == CUDA_SUCCESS, "[cuda] cuTensorMapEncodeTiled failed with ", static_cast<int>(status),
                       " for a matrix [", t.rows, ", ", t.cols, "] of rows ", t.ld, " apart");
  return maps_.emplace(key, map).first->second;
}

}  // namespace loquetier::cuda
