// Sequences for the attention tests: packed, and the same laid out in pages. Used by op_tests.cpp and op_invariance_tests.h.
#pragma once

#include <algorithm>
#include <utility>

#include "op_harness.h"

namespace loquetier::test {

struct AttentionSpec {
  int32_t q_heads, kv_heads, head_size;
  std::vector<std::pair<int32_t, int32_t>> lengths;  // (query rows, key rows) of each sequence
};

inline std::vector<AttentionSpec> attention_specs(bool ugly) {
  std::vector<AttentionSpec> specs = {
      {4, 2, 64, {}},
      {2, 2, 64, {{1, 1}}},
      {8, 2, 64, {{31, 31}, {0, 0}, {33, 97}, {1, 64}, {1, 65}}},
      {3, 1, 128, {{63, 63}, {64, 64}, {65, 130}, {1, 200}}},
  };
  if (ugly) {
    specs.push_back({4, 1, 6, {{5, 5}, {1, 9}, {70, 70}}});
    specs.push_back({2, 1, 34, {{129, 129}, {2, 3}}});
    specs.push_back({70, 1, 8, {{3, 4}, {1, 66}}});  // more heads to a group than a tile has rows
  }
  return specs;
}

// Decodes alone: ends inside pages and on their edges, one key, lengths far apart, groups of query heads of every kind of tile,
// sequences without a row in front, between and at the end, and more sequences than a warp has lanes.
inline std::vector<AttentionSpec> decode_specs() {
  std::vector<AttentionSpec> specs = {
      {8, 2, 128, {{1, 1}, {1, 15}, {1, 16}, {1, 17}, {1, 63}, {1, 64}, {1, 65}, {1, 127}, {1, 128}, {1, 129}, {1, 512}}},
      {2, 2, 64, {{0, 0}, {1, 2}, {0, 0}, {1, 300}, {1, 77}, {0, 0}}},
      {14, 2, 64, {{1, 33}, {1, 2001}, {1, 8}}},
      {4, 1, 64, {{1, 5000}}},
      {7, 1, 128, {{1, 2100}, {0, 0}, {1, 1}, {1, 700}}},
      {16, 1, 128, {{1, 31}, {1, 1200}}},
      {24, 2, 64, {{1, 1000}, {1, 49}}},
      {3, 3, 128, {{0, 0}, {0, 0}, {1, 411}}},
      {17, 1, 64, {{1, 40}, {1, 3}}},  // more heads to a group than the kernel for decodes takes
      {1, 1, 64, {}},
  };
  for (int32_t i = 0; i < 150; ++i) specs.back().lengths.push_back({i % 7 == 3 ? 0 : 1, i % 7 == 3 ? 0 : 1 + i * i % 301});
  return specs;
}

inline AttentionShape shape_of(const AttentionSpec& spec) {
  return {spec.q_heads, spec.kv_heads, spec.head_size, 1.0f / std::sqrt(static_cast<float>(spec.head_size))};
}

// Sequences packed one after the other. `whole`: as many queries as keys.
class PackedRig {
 public:
  PackedRig(Rig& rig, const AttentionSpec& spec, bool whole) : shape(shape_of(spec)) {
    for (const auto& [queries, keys] : spec.lengths) {
      const int32_t n = whole ? keys : queries;
      sequences.push_back({q_rows, n, kv_rows, keys});
      tables_[0].push_back(static_cast<int32_t>(q_rows));
      tables_[1].push_back(n);
      tables_[2].push_back(static_cast<int32_t>(kv_rows));
      tables_[3].push_back(keys);
      q_rows += n;
      kv_rows += keys;
      batch.max_rows = std::max(batch.max_rows, keys);
    }
    batch.sequences = static_cast<int32_t>(sequences.size());
    for (const auto& table : tables_) device_.push_back(std::make_unique<ArrayOnDevice<int32_t>>(rig, table));
    batch.q_begin = device_[0]->data(), batch.q_rows = device_[1]->data();
    batch.kv_begin = device_[2]->data(), batch.kv_rows = device_[3]->data();
    batch.host_q_begin = tables_[0].data(), batch.host_q_rows = tables_[1].data();
    batch.host_kv_begin = tables_[2].data(), batch.host_kv_rows = tables_[3].data();
  }
  PackedRig(const PackedRig&) = delete;

  AttentionShape shape;
  std::vector<reference::Sequence> sequences;
  int64_t q_rows = 0, kv_rows = 0;
  PackedBatch batch;

 private:
  std::vector<int32_t> tables_[4];
  std::vector<std::unique_ptr<ArrayOnDevice<int32_t>>> device_;
};

// The same sequences with keys and values scattered over shuffled pages; slots that hold no key are NaN. Prompt chunks first,
// decodes last, as is what has no rows (a recorded step's padding). The first `shared` keys, whole pages, are those of the first
// sequence, in its pages. `first_row` rows of q stand in front, of others.
class PagedRig {
 public:
  PagedRig(Rig& rig, const AttentionSpec& spec, int32_t page_size, int32_t shared = 0, int64_t first_row = 0)
      : shape(shape_of(spec)) {
    auto lengths = spec.lengths;
    std::stable_partition(lengths.begin(), lengths.end(), [](const auto& length) { return length.first > 1; });
    int64_t q_rows = first_row, kv_rows = 0;
    int32_t pages = 0;
    for (const auto& [queries, keys] : lengths) {
      sequences.push_back({q_rows, queries, kv_rows, keys});
      row_begin_.push_back(static_cast<int32_t>(q_rows));
      rows_.push_back(queries);
      kv_len_.push_back(keys);
      q_rows += queries;
      kv_rows += keys;
      batch.decodes += queries <= 1;
      const int32_t used = (keys + page_size - 1) / page_size;
      batch.max_pages = std::max(batch.max_pages, used);
      pages += used;
    }
    batch.sequences = static_cast<int32_t>(lengths.size());
    const int64_t width = int64_t{spec.kv_heads} * spec.head_size;
    q = rig.random(q_rows, int64_t{spec.q_heads} * spec.head_size);
    k = rig.random(kv_rows, width);
    v = rig.random(kv_rows, width);

    for (size_t s = 1; s < sequences.size(); ++s)
      for (int64_t key = 0; key < std::min<int64_t>(shared, sequences[s].kv_rows); ++key)
        for (int64_t i = 0; i < width; ++i) {
          k(sequences[s].kv_begin + key, i) = k(key, i);
          v(sequences[s].kv_begin + key, i) = v(key, i);
        }

    kv_shape = {pages + 1, page_size, spec.kv_heads, spec.head_size};
    std::vector<int32_t> order;
    for (int32_t p = 0; p <= pages; ++p) order.push_back(p);
    for (size_t i = order.size() - 1; i > 0; --i)
      std::swap(order[i], order[static_cast<size_t>(rig.random_int(static_cast<int64_t>(i) + 1))]);
    page_table_.assign(static_cast<size_t>(batch.sequences * batch.max_pages), -1);
    Host slots_k(1, kv_shape.pages * page_size * width, kUntouched), slots_v = slots_k;
    size_t next = 0;
    for (size_t s = 0; s < sequences.size(); ++s)
      for (int64_t key = 0; key < sequences[s].kv_rows; ++key) {
        int32_t& page = page_table_[s * static_cast<size_t>(batch.max_pages) + static_cast<size_t>(key / page_size)];
        if (key % page_size == 0) page = s > 0 && key < shared ? page_table_[static_cast<size_t>(key / page_size)] : order[next++];
        const int64_t at = (int64_t{page} * page_size + key % page_size) * width;
        for (int64_t i = 0; i < width; ++i) {
          slots_k(0, at + i) = k(sequences[s].kv_begin + key, i);
          slots_v(0, at + i) = v(sequences[s].kv_begin + key, i);
        }
      }
    storage_.push_back(std::make_unique<OnDevice>(rig, slots_k));
    storage_.push_back(std::make_unique<OnDevice>(rig, slots_v));
    layer = {storage_[0]->view().data, storage_[1]->view().data};
    // The reference sees the rounded values.
    for (Host* m : {&k, &v}) OnDevice rounded(rig, *m);
    for (const auto* table : {&row_begin_, &rows_, &kv_len_, &page_table_})
      device_.push_back(std::make_unique<ArrayOnDevice<int32_t>>(rig, *table));
    batch.row_begin = device_[0]->data(), batch.rows = device_[1]->data(), batch.kv_len = device_[2]->data();
    batch.page_table = device_[3]->data();
    batch.host_row_begin = row_begin_.data(), batch.host_rows = rows_.data(), batch.host_kv_len = kv_len_.data();
  }
  PagedRig(const PagedRig&) = delete;

  // Where a key of a sequence is: page * P + offset.
  int32_t slot(size_t sequence, int32_t key) const {
    const int32_t page =
        page_table_[sequence * static_cast<size_t>(batch.max_pages) + static_cast<size_t>(key / kv_shape.page_size)];
    return page * kv_shape.page_size + key % kv_shape.page_size;
  }

  AttentionShape shape;
  std::vector<reference::Sequence> sequences;  // rows of k and v below
  Host q, k, v;
  KvLayer layer;
  KvShape kv_shape;
  PagedBatch batch;

 private:
  std::vector<int32_t> row_begin_, rows_, kv_len_, page_table_;
  std::vector<std::unique_ptr<ArrayOnDevice<int32_t>>> device_;
  std::vector<std::unique_ptr<OnDevice>> storage_;
};

}  // namespace loquetier::test
