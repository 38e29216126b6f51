#include "adapter/adapter.h"

#include <algorithm>

namespace loquetier {

namespace {

constexpr int64_t kAlign = 64;          // elements
constexpr size_t kPoolAlignment = 256;  // bytes
int64_t align(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
size_t align_bytes(size_t n) { return (n + kPoolAlignment - 1) / kPoolAlignment * kPoolAlignment; }

int64_t a_size(const LoraTarget& target) { return target.rank * target.module.in; }
int64_t b_size(const LoraTarget& target) { return target.rank * target.module.out; }

void check_size(const LoraTarget& target, char which, size_t got, int64_t expected) {
  require(static_cast<int64_t>(got) == expected, "[adapter] ", peft_key(target.module, which), ": expected ", expected,
          " values, got ", got);
}

}  // namespace

AdapterLayout AdapterLayout::make(std::vector<LoraTarget> targets, const ModelConfig& model) {
  require(!targets.empty(), "[adapter] targets: expected at least one adapted module, got none");
  AdapterLayout layout;
  layout.sites = site_count(model);
  layout.lowest_layer = model.num_layers;
  int64_t end = 0;
  int32_t site = -1, part = -1, site_rank = 0;
  for (const LoraTarget& target : targets) {
    const ModuleInfo& module = target.module;
    require(target.rank > 0 && module.in > 0 && module.out > 0, "[adapter] ", module.name,
            ": expected rank and sizes > 0, got rank ", target.rank, ", [", module.out, ", ", module.in, "]");
    require(0 <= module.site && module.site < layout.sites && 0 <= module.part && module.part < kMaxParts, "[adapter] ",
            module.name, ": expected a site below ", layout.sites, " and a part below ", kMaxParts, ", got ", module.site, ", ",
            module.part);
    require(module.site > site || (module.site == site && module.part > part), "[adapter] ", module.name,
            ": expected targets in the order of the model's modules");
    if (module.site != site) {
      end = align(end);
      site_rank = 0;
    }
    site = module.site;
    part = module.part;
    layout.a_offset.push_back(end);
    end += a_size(target);
    site_rank += target.rank;
    layout.max_rank = std::max(layout.max_rank, site_rank);
    if (module.layer < 0) {
      layout.lm_head = true;
      continue;
    }
    layout.lowest_layer = std::min(layout.lowest_layer, module.layer);
    layout.part_rank = std::max(layout.part_rank, target.rank);
    layout.vector_ranks = layout.vector_ranks && target.rank % 8 == 0;
    layout.parts |= 1u << (module.site % 4 * kMaxParts + module.part);
  }
  layout.a_elements = end = align(end);
  for (const LoraTarget& target : targets) {
    layout.b_offset.push_back(end);
    end = align(end + b_size(target));
  }
  layout.elements = end;
  layout.targets = std::move(targets);
  return layout;
}

int64_t AdapterLayout::parameters() const {
  int64_t total = 0;
  for (const LoraTarget& target : targets) total += a_size(target) + b_size(target);
  return total;
}

std::vector<float> AdapterLayout::flatten(const LoraWeights& weights) const {
  require(weights.a.size() == targets.size() && weights.b.size() == targets.size(), "[adapter] weights: expected ", targets.size(),
          " pairs of A and B, got ", weights.a.size(), " A and ", weights.b.size(), " B");
  std::vector<float> flat(static_cast<size_t>(elements), 0.0f);
  for (size_t i = 0; i < targets.size(); ++i) {
    check_size(targets[i], 'A', weights.a[i].size(), a_size(targets[i]));
    check_size(targets[i], 'B', weights.b[i].size(), b_size(targets[i]));
    std::copy(weights.a[i].begin(), weights.a[i].end(), flat.begin() + a_offset[i]);
    std::copy(weights.b[i].begin(), weights.b[i].end(), flat.begin() + b_offset[i]);
  }
  return flat;
}

LoraWeights AdapterLayout::unflatten(const float* flat) const {
  LoraWeights weights;
  for (size_t i = 0; i < targets.size(); ++i) {
    weights.a.emplace_back(flat + a_offset[i], flat + a_offset[i] + a_size(targets[i]));
    weights.b.emplace_back(flat + b_offset[i], flat + b_offset[i] + b_size(targets[i]));
  }
  return weights;
}

std::vector<LoraSite> AdapterLayout::site_table(const void* block, DType dtype) const {
  const std::byte* base = static_cast<const std::byte*>(block);
  const auto at = [&](int64_t element) { return base + static_cast<size_t>(element) * size_of(dtype); };
  std::vector<LoraSite> table(static_cast<size_t>(sites));
  for (size_t i = 0; i < targets.size(); ++i) {
    const LoraTarget& target = targets[i];
    table[static_cast<size_t>(target.module.site)].part[target.module.part] = {at(a_offset[i]), at(b_offset[i]), target.rank,
                                                                               target.scale};
  }
  return table;
}

std::vector<LoraGradSite> AdapterLayout::grad_table(float* block) const {
  std::vector<LoraGradSite> table(static_cast<size_t>(sites));
  for (size_t i = 0; i < targets.size(); ++i) {
    const ModuleInfo& module = targets[i].module;
    table[static_cast<size_t>(module.site)].part[module.part] = {block + a_offset[i], block + b_offset[i]};
  }
  return table;
}

size_t AdapterLayout::pool_bytes(DType dtype) const { return align_bytes(block_bytes(dtype)) + align_bytes(table_bytes()); }

}  // namespace loquetier
