#include "model/base_weights.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "io/safetensors.h"

namespace loquetier {

namespace {

constexpr std::align_val_t kWeightAlignment{64};
constexpr size_t kStagingBytes = size_t{32} << 20;  // bounds the pinned memory of an upload that converts

bool aligned(const void* data, DType dtype) { return reinterpret_cast<uintptr_t>(data) % size_of(dtype) == 0; }

// Puts tensors where the backend reads them, one after another.
class Placer {
 public:
  Placer(ModelWeights& out, Device& device, DType dtype) : out_(out), device_(device), dtype_(dtype) {}

  TensorView tensor(TensorView src) { return src.empty() ? src : join({src}); }

  // A device gets one matrix; the host keeps the blocks, so that what is f32 already stays where it is.
  LinearWeights linear(const LinearWeights& src) {
    if (device_.host_addressable()) {
      LinearWeights placed;
      for (const LinearBlock& block : src) placed.push_back({tensor(block.w), tensor(block.bias)});
      return placed;
    }
    std::vector<TensorView> w, bias;
    for (const LinearBlock& block : src) {
      w.push_back(block.w);
      if (!block.bias.empty()) bias.push_back(block.bias);
    }
    return {{join(w), bias.empty() ? TensorView{} : join(bias)}};
  }

  TensorView upload(const void* host, DType dtype, int64_t n) {
    const TensorView dst = allocate(dtype, 1, n);
    copy(host, dtype, dst.data, dtype, n);
    return dst;
  }

 private:
  // Parts below each other (matrices), or one behind the other (biases).
  TensorView join(const std::vector<TensorView>& parts) {
    if (device_.host_addressable() && parts.size() == 1 && parts[0].dtype == dtype_ && aligned(parts[0].data, dtype_))
      return parts[0];
    int64_t rows = 0, size = 0;
    for (const TensorView& part : parts) {
      rows += part.rows;
      size += part.size();
    }
    const bool vectors = parts[0].rows == 1;
    const TensorView dst = allocate(dtype_, vectors ? 1 : rows, vectors ? size : parts[0].cols);
    std::byte* to = static_cast<std::byte*>(dst.data);
    for (const TensorView& part : parts) {
      copy(part.data, part.dtype, to, dtype_, part.size());
      to += static_cast<size_t>(part.size()) * size_of(dtype_);
    }
    return dst;
  }

  TensorView allocate(DType dtype, int64_t rows, int64_t cols) {
    const size_t bytes = size_of(dtype) * static_cast<size_t>(rows * cols);
    out_.allocated += bytes;
    if (device_.host_addressable()) {
      out_.host_storage.push_back(allocate_weights(bytes));
      return matrix(out_.host_storage.back().get(), dtype, rows, cols);
    }
    out_.storage.emplace_back(device_, bytes);
    return matrix(out_.storage.back().data(), dtype, rows, cols);
  }

  void copy(const void* src, DType src_dtype, void* dst, DType dtype, int64_t n) {
    if (device_.host_addressable()) {
      convert_elements(src, src_dtype, dst, dtype, n);
    } else if (src_dtype == dtype) {
      device_.copy_to_device(dst, src, static_cast<size_t>(n) * size_of(dtype));
    } else {
      if (!staging_.data()) staging_ = Buffer(device_, kStagingBytes, Buffer::Where::host);
      const int64_t piece = static_cast<int64_t>(kStagingBytes / size_of(dtype));
      for (int64_t begin = 0; begin < n; begin += piece) {
        const int64_t count = std::min(piece, n - begin);
        device_.synchronize();  // the piece before has left the staging buffer
        convert_elements(static_cast<const std::byte*>(src) + static_cast<size_t>(begin) * size_of(src_dtype), src_dtype,
                         staging_.data(), dtype, count);
        device_.copy_to_device(static_cast<std::byte*>(dst) + static_cast<size_t>(begin) * size_of(dtype), staging_.data(),
                               static_cast<size_t>(count) * size_of(dtype));
      }
      device_.synchronize();
    }
  }

  ModelWeights& out_;
  Device& device_;
  DType dtype_;
  Buffer staging_;
};

}  // namespace

std::shared_ptr<void> allocate_weights(size_t bytes) {
  void* data = ::operator new(std::max(bytes, size_t{1}), kWeightAlignment, std::nothrow);
  require<OutOfMemory>(data != nullptr, "[weights] expected room for ", bytes, " bytes of host memory");
  return std::shared_ptr<void>(data, [](void* p) { ::operator delete(p, kWeightAlignment); });
}

std::shared_ptr<ModelWeights> place_weights_on(const std::shared_ptr<const BaseModel>& base, Device& device, DType dtype) {
  const BaseWeights& source = base->weights();
  const WeightTable& host = source.host;
  auto placed = std::make_shared<ModelWeights>();
  placed->config = source.config;
  placed->base = base;
  Placer placer(*placed, device, dtype);

  WeightTable& table = placed->table;
  table.embedding = placer.tensor(host.embedding);
  for (const LayerWeights& layer : host.layers) {
    table.layers.push_back({.input_norm = placer.tensor(layer.input_norm),
                            .qkv = placer.linear(layer.qkv),
                            .q_norm = placer.tensor(layer.q_norm),
                            .k_norm = placer.tensor(layer.k_norm),
                            .o = placer.linear(layer.o),
                            .post_norm = placer.tensor(layer.post_norm),
                            .gate_up = placer.linear(layer.gate_up),
                            .down = placer.linear(layer.down)});
  }
  table.final_norm = placer.tensor(host.final_norm);
  table.lm_head = source.config.tie_word_embeddings ? LinearWeights{{table.embedding, {}}} : placer.linear(host.lm_head);
  const std::vector<float> inv_freq = rope_inv_freq(source.config);
  placed->inv_freq = placer.upload(inv_freq.data(), DType::f32, std::ssize(inv_freq));
  device.synchronize();
  return placed;
}

namespace {
std::string placement_key(Ops& ops) { return concat(ops.device().name(), " ", name_of(ops.compute_dtype())); }
}  // namespace

bool weights_placed(const BaseModel& base, Ops& ops) {
  const std::lock_guard lock(base.weights().mutex);
  const auto& placed = base.weights().placed;
  const auto found = placed.find(placement_key(ops));
  return found != placed.end() && !found->second.expired();
}

std::shared_ptr<const ModelWeights> place_weights(const std::shared_ptr<const BaseModel>& base, Ops& ops,
                                                  std::shared_ptr<const void> backend) {
  require(base != nullptr, "[place_weights] base: expected a model, got none");
  Device& device = ops.device();
  if (!device.host_addressable() && !backend) return place_weights_on(base, device, ops.compute_dtype());

  const BaseWeights& source = base->weights();
  const std::string key = placement_key(ops);
  const std::lock_guard lock(source.mutex);
  std::weak_ptr<const ModelWeights>& shared = source.placed[key];
  if (auto placed = shared.lock()) return placed;
  std::shared_ptr<ModelWeights> placed = place_weights_on(base, device, ops.compute_dtype());
  placed->backend = std::move(backend);
  shared = placed;
  return placed;
}

}  // namespace loquetier
