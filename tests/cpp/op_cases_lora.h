// A mix of LoRA groups as a batch has them, on the host for the reference and on the device for the backend. Used by op_tests.cpp.
#pragma once

#include <utility>

#include "op_harness.h"

namespace loquetier::test {

struct GroupSpec {
  int64_t row_begin = 0, rows = 0;
  std::vector<int32_t> ranks;  // one per part; empty: no adapter
  double dropout = 0;
  bool trained = true;
};

class LoraRig {
 public:
  LoraRig(Rig& rig, int64_t rows, int64_t in, std::vector<int64_t> out, const std::vector<GroupSpec>& specs) {
    host.site = 1;  // the table has another entry before it
    host.in = in;
    host.out = out;
    linear = {1, static_cast<int32_t>(out.size()), in, {0, 0, 0}};
    std::copy(out.begin(), out.end(), linear.out);
    for (int64_t n : out) columns += n;
    for (int64_t t = 0; t < rows; ++t) host.row_keys.push_back(rig.random_word());
    bool dropout = false;
    for (const GroupSpec& spec : specs) {
      reference::LoraGroupOf<double> group{spec.row_begin, spec.rows, {}, static_cast<double>(static_cast<float>(spec.dropout))};
      dropout |= spec.dropout > 0;
      int32_t ranks = 0;
      for (size_t p = 0; p < spec.ranks.size(); ++p) {
        ranks += spec.ranks[p];
        group.parts.push_back(
            {rig.random(spec.ranks[p], in, 0.3), rig.random(out[p], spec.ranks[p], 0.3), 0.5 + 0.25 * static_cast<double>(p)});
      }
      max_rank = std::max(max_rank, ranks);
      add_tables(rig, group);
      host.groups.push_back(std::move(group));
    }
    for (size_t g = 0; g < specs.size(); ++g) {
      LoraGroup group;
      group.row_begin = static_cast<int32_t>(specs[g].row_begin);
      group.rows = static_cast<int32_t>(specs[g].rows);
      group.dropout = static_cast<float>(specs[g].dropout);
      if (!specs[g].ranks.empty()) {
        group.sites = sites_device_[g]->data();
        group.host_sites = sites_[g].data();
        if (specs[g].trained) {
          group.grads = grads_device_[g]->data();
          group.host_grads = grads_[g].data();
        }
      }
      table_.push_back(group);
    }
    table_device_ = std::make_unique<ArrayOnDevice<LoraGroup>>(rig, table_);
    keys_ = std::make_unique<ArrayOnDevice<uint64_t>>(rig, host.row_keys);
    groups = {table_device_->data(), table_.data(), static_cast<int32_t>(table_.size()), max_rank,
              dropout ? keys_->data() : nullptr};
  }
  LoraRig(const LoraRig&) = delete;

  // Gradients on the device, [group][part]; zeros or what was accumulated.
  std::vector<std::vector<reference::LoraGradOf<double>>> gradients(Rig& rig) const {
    std::vector<std::vector<reference::LoraGradOf<double>>> all;
    for (size_t g = 0; g < host.groups.size(); ++g) {
      all.emplace_back();
      for (size_t p = 0; p < host.groups[g].parts.size(); ++p) {
        const auto& part = host.groups[g].parts[p];
        reference::LoraGradOf<double> grad{Host(part.a.rows, part.a.cols), Host(part.b.rows, part.b.cols)};
        for (auto [matrix, from] : {std::pair{&grad.da, grads_[g][1].part[p].da}, std::pair{&grad.db, grads_[g][1].part[p].db}}) {
          std::vector<float> values(matrix->values.size());
          if (!values.empty()) rig.device().copy_to_host(values.data(), from, values.size() * sizeof(float));
          std::copy(values.begin(), values.end(), matrix->values.begin());
        }
        all.back().push_back(std::move(grad));
      }
    }
    return all;
  }

  // Fills the gradients on the device with what they are to add to, rounding it in place.
  void set_gradients(Rig& rig, std::vector<std::vector<reference::LoraGradOf<double>>>& start) {
    for (size_t g = 0; g < start.size(); ++g)
      for (size_t p = 0; p < start[g].size(); ++p)
        for (auto [matrix, to] :
             {std::pair{&start[g][p].da, grads_[g][1].part[p].da}, std::pair{&start[g][p].db, grads_[g][1].part[p].db}}) {
          std::vector<float> values(matrix->values.begin(), matrix->values.end());
          std::copy(values.begin(), values.end(), matrix->values.begin());
          if (!values.empty()) rig.device().copy_to_device(to, values.data(), values.size() * sizeof(float));
          rig.device().synchronize();
        }
  }

  reference::LoraCase<double> host;
  LoraLinear linear;
  LoraGroups groups;
  int32_t max_rank = 0;
  int64_t columns = 0;  // of y

 private:
  void add_tables(Rig& rig, reference::LoraGroupOf<double>& group) {
    std::vector<LoraSite> sites(2);
    std::vector<LoraGradSite> grads(2);
    // As in the pool: the A of all parts adjacent, without gaps.
    int64_t ranks = 0;
    for (const auto& part : group.parts) ranks += part.a.rows;
    Host stacked(ranks, host.in);
    int64_t r = 0;
    for (const auto& part : group.parts) {
      std::copy(part.a.values.begin(), part.a.values.end(), stacked.values.begin() + r * host.in);
      r += part.a.rows;
    }
    const auto place = [&](Host& m) {  // contiguous, rounded in place
      Host line(1, m.rows * m.cols);
      line.values = m.values;
      storage_.push_back(std::make_unique<OnDevice>(rig, line));
      m.values = line.values;
      return storage_.back()->view().data;
    };
    const std::byte* a = static_cast<const std::byte*>(place(stacked));
    r = 0;
    for (size_t p = 0; p < group.parts.size(); ++p) {
      auto& part = group.parts[p];
      const int64_t rank = part.a.rows;
      std::copy_n(stacked.values.begin() + r * host.in, rank * host.in, part.a.values.begin());
      if (rank > 0) {
        sites[1].part[p] = {a + r * host.in * static_cast<int64_t>(size_of(rig.dtype())), place(part.b), static_cast<int32_t>(rank),
                            static_cast<float>(part.scale)};
        for (float** to : {&grads[1].part[p].da, &grads[1].part[p].db}) {
          Host zeros(1, to == &grads[1].part[p].da ? rank * host.in : part.b.rows * rank);
          storage_.push_back(std::make_unique<OnDevice>(rig, zeros, DType::f32));
          *to = static_cast<float*>(storage_.back()->view().data);
        }
      }
      r += rank;
    }
    sites_.push_back(sites);
    grads_.push_back(grads);
    sites_device_.push_back(std::make_unique<ArrayOnDevice<LoraSite>>(rig, sites));
    grads_device_.push_back(std::make_unique<ArrayOnDevice<LoraGradSite>>(rig, grads));
  }

  std::vector<std::unique_ptr<OnDevice>> storage_;
  std::vector<std::vector<LoraSite>> sites_;
  std::vector<std::vector<LoraGradSite>> grads_;
  std::vector<std::unique_ptr<ArrayOnDevice<LoraSite>>> sites_device_;
  std::vector<std::unique_ptr<ArrayOnDevice<LoraGradSite>>> grads_device_;
  std::vector<LoraGroup> table_;
  std::unique_ptr<ArrayOnDevice<LoraGroup>> table_device_;
  std::unique_ptr<ArrayOnDevice<uint64_t>> keys_;
};

struct LoraShape {
  const char* name;
  int64_t rows, in;
  std::vector<int64_t> out;
  std::vector<GroupSpec> groups;
};

// One adapter for all rows; every row another; mixed ranks with 0 among them; empty groups and rows outside groups; ranks and
// columns at tile edges; dropout. `aligned`: multiples of 8 everywhere, for backends that load 16 bytes at a time.
inline std::vector<LoraShape> lora_shapes(bool aligned) {
  std::vector<LoraShape> shapes = {
      {"no rows", 0, 64, {64}, {}},
      {"no adapter", 5, 64, {64}, {{0, 5, {}, 0}}},
      {"one adapter", 130, 96, {128}, {{0, 130, {16}, 0}}},
      {"three parts, some of rank 0", 33, 64, {64, 32, 32}, {{0, 31, {8, 0, 16}, 0}, {31, 0, {8, 8, 8}, 0}, {31, 2, {0, 8, 0}, 0}}},
      {"rows outside groups", 40, 64, {64, 64}, {{3, 5, {8, 24}, 0}, {20, 11, {64, 8}, 0}}},
      {"dropout", 70, 72, {64, 40}, {{0, 33, {8, 16}, 0.25}, {33, 37, {16, 0}, 0.1}}},
      {"long rows", 3, 1600, {1040}, {{0, 1, {8}, 0}, {1, 2, {256}, 0}}},
  };
  LoraShape every_row{"every row another", 17, 64, {64, 64}, {}};
  for (int32_t t = 0; t < 17; ++t) every_row.groups.push_back({t, 1, {8 * (1 + t % 4), 8 * (t % 3)}, 0});
  shapes.push_back(every_row);
  if (!aligned) {
    shapes.push_back({"ugly", 35, 37, {1, 31, 33}, {{0, 1, {1, 3, 5}, 0}, {1, 2, {7, 0, 17}, 0.5}, {4, 31, {33, 15, 1}, 0}}});
    shapes.push_back({"ugly decode", 9, 61, {65, 7}, {{0, 1, {1, 9}, 0}, {1, 1, {0, 2}, 0}, {2, 7, {31, 33}, 0}}});
  }
  return shapes;
}

}  // namespace loquetier::test
