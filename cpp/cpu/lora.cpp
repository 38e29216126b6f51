// Grouped LoRA: every group at its true rank, no padding. Each operation lists items (a group's part, a range of rows, a range of
// columns) so that one large group and many groups of one row both occupy all threads, then runs the items over the pool.
//
// A dropout mask is regenerated from its counter wherever x or dx of a group with dropout is touched; such rows go through scratch.
#include <algorithm>

#include "core/random.h"
#include "cpu/cpu_ops.h"
#include "cpu/gemm.h"

namespace loquetier::cpu {

namespace {

constexpr int64_t kShrinkRows = 64;   // rows of one item of a product with few columns (the ranks)
constexpr int64_t kShrinkRanks = 16;  // ranks of one item when the group has few rows: A is streamed once, by several threads
constexpr int64_t kFewRows = 8;
constexpr int64_t kExpandCols = 256;   // output columns of one item of a product with few terms
constexpr int64_t kWeightDepth = 128;  // rows of x or dy per pass: their pages stay in the first-level TLB
constexpr int64_t kWeightCols = 128;   // columns of dA of one item
constexpr int64_t kWeightRows = 192;   // rows of dB of one item

// m[i] = keep(column + i) / (1 - p) or 0
void dropout_mask(uint64_t key, uint32_t stream, int64_t column, int64_t n, float p, float* m) {
  const float kept = 1.0f / (1.0f - p);
  for (int64_t i = 0; i < n;) {
    const Philox4 bits = philox(key, static_cast<uint64_t>(column + i) >> 2, stream);  // as dropout_keep(), four columns at once
    do {
      m[i] = uniform01(bits.v[(column + i) & 3]) >= p ? kept : 0.0f;
      ++i;
    } while (i < n && ((column + i) & 3) != 0);
  }
}

struct Part {
  const LoraGroup* group;
  const LoraPart* lora;
  const LoraGradPart* grad;  // null when the group is not trained
  int32_t index;
  int32_t rank_begin;
  int64_t out_begin;
};

}  // namespace

void CpuOps::check_lora(const char* op, const LoraLinear& linear, const LoraGroups& groups, int64_t rows) const {
  require(linear.parts >= 1 && linear.parts <= kMaxParts, "[", op, "] linear: expected 1 to ", kMaxParts, " parts, got ",
          linear.parts);
  int64_t end = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    require(group.rows >= 0 && group.row_begin >= end && int64_t{group.row_begin} + group.rows <= rows, "[", op, "] groups[", g,
            "]: expected rows between ", end, " and ", rows, ", got ", group.row_begin, " + ", group.rows);
    require(group.dropout == 0 || (group.dropout > 0 && group.dropout < 1 && groups.row_keys), "[", op, "] groups[", g,
            "]: expected dropout in [0, 1) with row keys, got ", group.dropout);
    end = int64_t{group.row_begin} + group.rows;
    if (!group.host_sites) continue;
    int64_t ranks = 0;
    for (int32_t p = 0; p < linear.parts; ++p) {
      const LoraPart& part = group.host_sites[linear.site].part[p];
      require(part.rank >= 0 && (part.rank == 0 || (part.a && part.b)), "[", op, "] groups[", g, "] part ", p,
              ": expected a rank with A and B, got rank ", part.rank);
      ranks += part.rank;
    }
    require(ranks <= groups.max_rank, "[", op, "] groups[", g, "]: expected ranks of at most ", groups.max_rank, " together, got ",
            ranks);
  }
}

template <class Each>
void CpuOps::for_each_part(const LoraLinear& linear, const LoraGroups& groups, Each each) const {
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (!group.host_sites || group.rows == 0) continue;
    const LoraSite& site = group.host_sites[linear.site];
    int32_t rank_begin = 0;
    int64_t out_begin = 0;
    for (int32_t p = 0; p < linear.parts; ++p) {
      if (site.part[p].rank > 0)
        each(Part{&group, &site.part[p], group.host_grads ? &group.host_grads[linear.site].part[p] : nullptr, p, rank_begin,
                  out_begin});
      rank_begin += site.part[p].rank;
      out_begin += linear.out[p];
    }
  }
}

namespace {

int64_t out_columns(const LoraLinear& linear) {
  int64_t n = 0;
  for (int32_t p = 0; p < linear.parts; ++p) n += linear.out[p];
  return n;
}

void check_ranks(const char* op, const char* name, const TensorView& s, int64_t rows, int32_t max_rank) {
  check_matrix(op, name, s, rows, -1);
  require(s.cols >= max_rank, "[", op, "] ", name, ": expected at least ", max_rank, " columns, got ", s.cols);
}

}  // namespace

void CpuOps::lora_shrink(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s) {
  check_matrix("lora_shrink", "x", x, -1, linear.in);
  check_ranks("lora_shrink", "s", s, x.rows, groups.max_rank);
  check_lora("lora_shrink", linear, groups, x.rows);
  lora_items_.clear();
  bool dropout = false;
  for_each_part(linear, groups, [&](const Part& part) {
    const bool few = part.group->rows <= kFewRows && part.group->dropout == 0;
    const int64_t ranks = few ? kShrinkRanks : part.lora->rank;
    dropout |= part.group->dropout > 0;
    for (int64_t t = 0; t < part.group->rows; t += kShrinkRows)
      for (int64_t r = 0; r < part.lora->rank; r += ranks)
        lora_items_.push_back({part.group, part.index, part.rank_begin, part.out_begin, part.group->row_begin + t,
                               std::min(kShrinkRows, part.group->rows - t), r, std::min(ranks, part.lora->rank - r)});
  });
  const size_t scratch = dropout ? Workspaces::size_for<float>(kShrinkRows * linear.in) : 0;
  parallel(static_cast<int64_t>(lora_items_.size()), 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, scratch);
    float* masked = dropout ? workspace.take<float>(kShrinkRows * linear.in) : nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const LoraItem& item = lora_items_[static_cast<size_t>(i)];
      const LoraPart& part = item.group->host_sites[linear.site].part[item.part];
      const float* from = static_cast<const float*>(x.at(item.row));
      int64_t ld = x.ld;
      if (item.group->dropout > 0) {
        for (int64_t t = 0; t < item.rows; ++t) {
          float* row = masked + t * linear.in;
          dropout_mask(groups.row_keys[item.row + t], dropout_stream(linear.site, item.part), 0, linear.in, item.group->dropout,
                       row);
          kernels_.scale_by(1.0f, from + t * x.ld, row, row, linear.in);
        }
        from = masked;
        ld = linear.in;
      }
      run(kernels_, {item.rows, item.cols, linear.in, from, ld, static_cast<const float*>(part.a) + item.col * linear.in, linear.in,
                     static_cast<float*>(s.at(item.row, item.rank_begin + item.col)), s.ld});
    }
  });
}

void CpuOps::lora_expand(const LoraLinear& linear, const LoraGroups& groups, TensorView s, TensorView y) {
  check_matrix("lora_expand", "y", y, -1, out_columns(linear));
  check_ranks("lora_expand", "s", s, y.rows, groups.max_rank);
  check_lora("lora_expand", linear, groups, y.rows);
  lora_items_.clear();
  for_each_part(linear, groups, [&](const Part& part) {
    for (int64_t t = 0; t < part.group->rows; t += kItemRows)
      for (int64_t n = 0; n < linear.out[part.index]; n += kExpandCols)
        lora_items_.push_back({part.group, part.index, part.rank_begin, part.out_begin, part.group->row_begin + t,
                               std::min(kItemRows, part.group->rows - t), n, std::min(kExpandCols, linear.out[part.index] - n)});
  });
  parallel(static_cast<int64_t>(lora_items_.size()), 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, product_bytes());
    for (int64_t i = begin; i < end; ++i) {
      const LoraItem& item = lora_items_[static_cast<size_t>(i)];
      const LoraPart& part = item.group->host_sites[linear.site].part[item.part];
      workspace.rewind();
      run(kernels_, workspace,
          {item.rows, item.cols, part.rank, static_cast<const float*>(s.at(item.row, item.rank_begin)), s.ld, 1,
           static_cast<const float*>(part.b) + item.col * part.rank, part.rank, true, part.scale,
           static_cast<float*>(y.at(item.row, item.out_begin + item.col)), y.ld, true});
    }
  });
}

void CpuOps::lora_backward_s(const LoraLinear& linear, const LoraGroups& groups, TensorView dy, TensorView ds) {
  check_matrix("lora_backward_s", "dy", dy, -1, out_columns(linear));
  check_ranks("lora_backward_s", "ds", ds, dy.rows, groups.max_rank);
  check_lora("lora_backward_s", linear, groups, dy.rows);
  lora_items_.clear();
  for_each_part(linear, groups, [&](const Part& part) {
    for (int64_t t = 0; t < part.group->rows; t += kShrinkRows)
      lora_items_.push_back({part.group, part.index, part.rank_begin, part.out_begin, part.group->row_begin + t,
                             std::min(kShrinkRows, part.group->rows - t), 0, part.lora->rank});
  });
  parallel(static_cast<int64_t>(lora_items_.size()), 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, product_bytes());
    for (int64_t i = begin; i < end; ++i) {
      const LoraItem& item = lora_items_[static_cast<size_t>(i)];
      const LoraPart& part = item.group->host_sites[linear.site].part[item.part];
      workspace.rewind();
      run(kernels_, workspace,
          {item.rows, part.rank, linear.out[item.part], static_cast<const float*>(dy.at(item.row, item.out_begin)), dy.ld, 1,
           static_cast<const float*>(part.b), part.rank, false, part.scale, static_cast<float*>(ds.at(item.row, item.rank_begin)),
           ds.ld, false});
    }
  });
}

// An item owns its rows and columns of dx and adds the parts in order.
void CpuOps::lora_backward_x(const LoraLinear& linear, const LoraGroups& groups, TensorView ds, TensorView dx) {
  check_matrix("lora_backward_x", "dx", dx, -1, linear.in);
  check_ranks("lora_backward_x", "ds", ds, dx.rows, groups.max_rank);
  check_lora("lora_backward_x", linear, groups, dx.rows);
  lora_items_.clear();
  bool dropout = false;
  for (int32_t g = 0; g < groups.count; ++g) {
    const LoraGroup& group = groups.host_groups[g];
    if (!group.host_sites) continue;
    dropout |= group.dropout > 0;
    const int64_t step = group.dropout > 0 ? kShrinkRows : kItemRows;
    for (int64_t t = 0; t < group.rows; t += step)
      for (int64_t n = 0; n < linear.in; n += kBlockN)
        lora_items_.push_back(
            {&group, 0, 0, 0, group.row_begin + t, std::min(step, group.rows - t), n, std::min(kBlockN, linear.in - n)});
  }
  const size_t scratch = dropout ? Workspaces::size_for<float>((kShrinkRows + 1) * kBlockN) : 0;
  parallel(static_cast<int64_t>(lora_items_.size()), 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, product_bytes() + scratch);
    for (int64_t i = begin; i < end; ++i) {
      const LoraItem& item = lora_items_[static_cast<size_t>(i)];
      const LoraSite& site = item.group->host_sites[linear.site];
      float* out = static_cast<float*>(dx.at(item.row, item.col));
      int64_t rank_begin = 0;
      for (int32_t p = 0; p < linear.parts; rank_begin += site.part[p].rank, ++p) {
        if (site.part[p].rank == 0) continue;
        workspace.rewind();
        Product product{item.rows,
                        item.cols,
                        site.part[p].rank,
                        static_cast<const float*>(ds.at(item.row, rank_begin)),
                        ds.ld,
                        1,
                        static_cast<const float*>(site.part[p].a) + item.col,
                        linear.in,
                        false,
                        1.0f,
                        out,
                        dx.ld,
                        true};
        if (item.group->dropout == 0) {
          run(kernels_, workspace, product);
          continue;
        }
        float* plain = workspace.take<float>((kShrinkRows + 1) * kBlockN);
        float* mask = plain + kShrinkRows * kBlockN;
        product.c = plain;
        product.ldc = kBlockN;
        product.accumulate = false;
        run(kernels_, workspace, product);
        for (int64_t t = 0; t < item.rows; ++t) {
          dropout_mask(groups.row_keys[item.row + t], dropout_stream(linear.site, p), item.col, item.cols, item.group->dropout,
                       mask);
          float* row = plain + t * kBlockN;
          kernels_.scale_by(1.0f, row, mask, row, item.cols);
          kernels_.axpy(1.0f, row, out + t * dx.ld, item.cols);
        }
      }
    }
  });
}

// Of what lora_backward_weights or lora_backward was given; x, or dy and s, may be without data.
void CpuOps::check_gradients(const char* op, const LoraLinear& linear, const LoraGroups& groups, const TensorView& x,
                             const TensorView& s, const TensorView& dy, const TensorView& ds, bool with_ds) const {
  const int64_t rows = dy.data || with_ds ? dy.rows : x.rows;
  if (dy.data || with_ds) {
    check_matrix(op, "dy", dy, rows, out_columns(linear));
    check_ranks(op, "s", s, rows, groups.max_rank);
  }
  if (x.data) check_matrix(op, "x", x, rows, linear.in);
  if (x.data || with_ds) check_ranks(op, "ds", ds, rows, groups.max_rank);
  check_lora(op, linear, groups, rows);
}

void CpuOps::lora_backward(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                           TensorView ds) {
  check_gradients("lora_backward", linear, groups, x, s, dy, ds, true);
  lora_backward_s(linear, groups, dy, ds);
  lora_backward_weights(linear, groups, x, s, dy, ds);
}

// An item owns rows of dB or columns of dA of one part and sums over the group's rows in order.
void CpuOps::lora_backward_weights(const LoraLinear& linear, const LoraGroups& groups, TensorView x, TensorView s, TensorView dy,
                                   TensorView ds) {
  check_gradients("lora_backward_weights", linear, groups, x, s, dy, ds, false);
  lora_items_.clear();
  constexpr int32_t kForA = kMaxParts;  // added to the part of items that are columns of dA
  for_each_part(linear, groups, [&](const Part& part) {
    if (!part.grad || !part.grad->da || !part.grad->db) return;
    const LoraGroup& group = *part.group;
    for (int64_t n = 0; dy.data && n < linear.out[part.index]; n += kWeightRows)
      lora_items_.push_back({&group, part.index, part.rank_begin, part.out_begin, group.row_begin, group.rows, n,
                             std::min(kWeightRows, linear.out[part.index] - n)});
    for (int64_t n = 0; x.data && n < linear.in; n += kWeightCols)
      lora_items_.push_back({&group, part.index + kForA, part.rank_begin, part.out_begin, group.row_begin, group.rows, n,
                             std::min(kWeightCols, linear.in - n)});
  });
  const size_t scratch = Workspaces::size_for<float>(kWeightDepth * kWeightCols);
  parallel(static_cast<int64_t>(lora_items_.size()), 1, [&](int64_t begin, int64_t end) {
    Workspaces::Lease workspace(workspaces_, product_bytes() + scratch);
    for (int64_t i = begin; i < end; ++i) {
      const LoraItem& item = lora_items_[static_cast<size_t>(i)];
      const int32_t p = item.part % kForA;
      const LoraPart& part = item.group->host_sites[linear.site].part[p];
      const LoraGradPart& grad = item.group->host_grads[linear.site].part[p];
      // Deterministic: row by row, so that the sum does not depend on how a mini-batch was cut into micro-batches.
      const int64_t step = deterministic_ ? 1 : kWeightDepth;
      for (int64_t t = 0; t < item.rows; t += step) {
        const int64_t row = item.row + t, depth = std::min(step, item.rows - t);
        workspace.rewind();
        if (item.part < kForA) {
          run(kernels_, workspace,
              {item.cols, part.rank, depth, static_cast<const float*>(dy.at(row, item.out_begin + item.col)), 1, dy.ld,
               static_cast<const float*>(s.at(row, item.rank_begin)), s.ld, false, part.scale, grad.db + item.col * part.rank,
               part.rank, true});
          continue;
        }
        const float* from = static_cast<const float*>(x.at(row, item.col));
        int64_t ld = x.ld;
        if (item.group->dropout > 0) {
          float* masked = workspace.take<float>(kWeightDepth * kWeightCols);
          for (int64_t j = 0; j < depth; ++j) {
            float* to = masked + j * kWeightCols;
            dropout_mask(groups.row_keys[row + j], dropout_stream(linear.site, p), item.col, item.cols, item.group->dropout, to);
            kernels_.scale_by(1.0f, from + j * x.ld, to, to, item.cols);
          }
          from = masked;
          ld = kWeightCols;
        }
        run(kernels_, workspace,
            {part.rank, item.cols, depth, static_cast<const float*>(ds.at(row, item.rank_begin)), 1, ds.ld, from, ld, false, 1.0f,
             grad.da + item.col, linear.in, true});
      }
    }
  });
}

}  // namespace loquetier::cpu
