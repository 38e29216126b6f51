// One LoRA adapter: where its tensors lie in a flat block, and one version of its weights.
//
// Layout, the same for weights (compute dtype), master, gradients and moments (f32): first every A in site and part order (the A of
// a site's parts adjacent, so that one stacked shrink reads them), then every B. Each tensor starts at a multiple of kAlign
// elements except the A of a site's later parts; padding holds zeros. So the optimizer sees two tensors per adapter, all A and all
// B.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/memory.h"
#include "io/peft_folder.h"
#include "ops/ops.h"

namespace loquetier {

using AdapterId = int64_t;  // unique per add, never used again; kBaseAdapter: no adapter
constexpr AdapterId kBaseAdapter = -1;

struct AdapterLayout {
  std::vector<LoraTarget> targets;  // modules_of() order
  std::vector<int64_t> a_offset;    // elements, per target
  std::vector<int64_t> b_offset;
  int64_t a_elements = 0;  // [0, a_elements) is all A, [a_elements, elements) all B
  int64_t elements = 0;
  int32_t sites = 0;     // entries of a site table
  int32_t max_rank = 0;  // largest sum of part ranks of a site
  // Over the layers, without lm_head:
  int32_t part_rank = 0;     // largest rank of one target
  bool vector_ranks = true;  // all ranks are multiples of 8
  uint32_t parts = 0;        // which projections: bit (site % 4) * kMaxParts + part
  int64_t lowest_layer = 0;  // of any target; L when only lm_head is adapted
  bool lm_head = false;
  int64_t parameters() const;

  static AdapterLayout make(std::vector<LoraTarget> targets, const ModelConfig& model);
  std::vector<float> flatten(const LoraWeights& weights) const;  // [elements]
  LoraWeights unflatten(const float* flat) const;
  std::vector<LoraSite> site_table(const void* block, DType dtype) const;  // [sites], pointers into `block`
  std::vector<LoraGradSite> grad_table(float* block) const;
  size_t block_bytes(DType dtype) const { return static_cast<size_t>(elements) * size_of(dtype); }
  size_t table_bytes() const { return static_cast<size_t>(sites) * sizeof(LoraSite); }
  size_t pool_bytes(DType dtype) const;  // what one version takes in the pool: block and table, each rounded to 256
};

class AdapterPool;

// One version's weights. The pool decides where they are: on the device, or only in the host tier. Shared by the requests that use
// them; the optimizer may write a version in place only when nobody else holds it (use_count), else a new one is made from it.
class AdapterWeights {
 public:
  const AdapterLayout& layout() const { return *layout_; }
  int64_t version() const { return version_; }
  bool resident() const { return device_block_ != nullptr; }
  void* device_block() const { return device_block_; }  // compute dtype, [elements]; a later pin() may move it
  // Both tables stay where they are while resident: when the block is moved their content follows it, so a batch that is kept over
  // several steps (a backward pass in slices) goes on reading the right place.
  const LoraSite* device_sites() const { return device_sites_; }
  const LoraSite* host_sites() const { return host_sites_.data(); }

 private:
  friend class AdapterPool;
  std::shared_ptr<const AdapterLayout> layout_;
  int64_t version_ = 0;
  void* device_block_ = nullptr;
  LoraSite* device_sites_ = nullptr;
  std::vector<LoraSite> host_sites_;
  Buffer host_block_;          // host tier, compute dtype; allocated when first needed
  bool host_current_ = false;  // host_block_ holds the newest values
  uint64_t arrives_ = 0;       // mark of the side queue behind the copy that fills device_block_; 0: the stream has waited for it
  size_t offset_ = 0;          // in the pool, while resident
  int pins_ = 0;               // in use: never evicted
  uint64_t last_used_ = 0;
};

}  // namespace loquetier
