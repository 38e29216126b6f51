// cuDNN's attention plans. cudnn-frontend is included here only: it takes a minute to compile.
//
// Facts the code rests on (measured on an H200 with cuDNN 9.19):
// * Lengths, offsets and page tables are device tensors, so one plan serves every batch up to its bucket of sequences; empty
//   sequences are fine.
// * Decode rows that the kernel for them (attention_decode.cu) does not take have plans of their own with one query a sequence. A
//   dense one writes every row of its bucket, so it runs only when the bucket is full; otherwise a ragged one (8 % slower) leaves
//   the rows past the last alone.
// * A plan compiles at its first use: 0.1 - 1.4 s for the first of a kind in a process, 50 - 100 ms for the next. So there are few:
//   all maxima are the limits of a step. At 8B shape a plan of 16 sequences, 8192 rows and 8192 keys is up to 2 us slower than an
//   exact one forward (of 14 to 290 us) and up to 5 us backward (of 42 to 943 us); one of 64 sequences up to 9 and 28 us.
// * Backward's workspace grows with the greatest number of rows and with the distance between rows: see ops/workspace.h.
// * One-row sequences alone (max 1) are refused by the packed graphs; the plain kernels take them.
// * Masked keys are multiplied by a probability of zero, so all it reads must be numbers (see RaggedTables).
// * Offsets count elements in 32 bits, so rows * ld must stay below 2^31.
// cuDNN below 9.19 is refused: its ragged paged path is correct but many times slower.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <filesystem>
#include <functional>
#include <map>
#include <unordered_map>
#include <vector>

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <cudnn_frontend.h>

#include "attention_plain.h"
#include "attention_plans.h"
#include "core/check.h"
#include "cuda_check.h"
#include "cuda_ops.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // the name the frontend looks functions up in
}

namespace loquetier::cuda {

namespace {

namespace fe = cudnn_frontend;

constexpr size_t kMinCudnn = 91900;

// The copy that the process already uses, then the one of the Python wheel beside this library, then the system's.
void load_cudnn() {
  if (fe::cudnn_dlhandle != nullptr) return;
  void* handle = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_NOLOAD);
  Dl_info here = {};
  if (handle == nullptr && dladdr(reinterpret_cast<const void*>(&load_cudnn), &here) != 0 && here.dli_fname != nullptr) {
    // site-packages/loquetier_core/lib/this.so and site-packages/nvidia/cudnn/lib/libcudnn.so.9
    const std::filesystem::path folder = std::filesystem::absolute(here.dli_fname).parent_path();
    handle = dlopen((folder / "../../nvidia/cudnn/lib/libcudnn.so.9").lexically_normal().c_str(), RTLD_NOW);
  }
  if (handle == nullptr) handle = dlopen("libcudnn.so.9", RTLD_NOW);
  if (handle == nullptr) {
    const char* reason = dlerror();
    throw DeviceError(concat("[cuda] cuDNN 9.19 or newer is needed: ", reason != nullptr ? reason : "libcudnn.so.9 not found",
                             "; pip install \"loquetier-core[cuda]\""));
  }
  fe::cudnn_dlhandle = handle;
  const size_t version = fe::detail::get_backend_version();
  if (version < kMinCudnn) {
    fe::cudnn_dlhandle = nullptr;
    throw DeviceError(concat("[cuda] cuDNN: expected version 9.19 or newer, got ", version / 10000, ".", version / 100 % 100, ".",
                             version % 100, "; pip install \"loquetier-core[cuda]\""));
  }
}

void check(fe::error_t error, const char* what) {
  require<DeviceError>(error.is_good(), "[attention] cuDNN, ", what, ": ", error.get_message());
}

int power_at_least(int64_t n) { return static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(n, 1)))); }

int decode_bucket(int sequences) {
  const int power = power_at_least(sequences), between = power / 4 * 3;  // picky about their batch: 12, 24, 48, 96, … as well
  return power >= 16 && sequences <= between ? between : power;
}

int sequence_bucket(int64_t sequences) {
  int bucket = 16;
  while (bucket < sequences) bucket *= 4;
  return bucket;
}

constexpr int64_t kMostLimit = 8192;  // rows of a sequence; more empty places than measured might cost more
constexpr double kWarmUpSeconds = 6;  // bounds warm_up(): its plans take about 3 s in a new process, 0.5 s later

// Tables of ragged tensors: two of lengths, and of offsets.
constexpr int kTables = 2 + RaggedTables::kOffsets;
constexpr size_t table_bytes(int sequences) { return (static_cast<size_t>(sequences) + 1 + 63) / 64 * 64 * sizeof(int32_t); }
constexpr int kMostKept = 64;  // sequences of a plan whose tables are kept
constexpr size_t kKeptBytes = 2 * kTables * table_bytes(kMostKept);

enum Uid : int64_t {
  kQ = 1,
  kK,
  kV,
  kO,
  kStats,
  kDo,
  kDq,
  kDk,
  kDv,
  kSeqQ,
  kSeqKv,
  kTable,
  kTableV,
  kOffQ,
  kOffK,
  kOffV,
  kOffO,
  kOffStats,
  kOffDo,
  kOffDq,
  kOffDk,
  kOffDv
};

struct PlanKey {
  enum Kind : int64_t { decode_dense, decode_ragged, chunk, packed, backward };
  std::array<int64_t, 18> v;
  bool operator<(const PlanKey& other) const { return v < other.v; }
};

struct AttentionPlan {
  fe::graph::Graph graph;
  int64_t workspace = 0;
};

using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

class CudnnPlans final : public AttentionPlans {
 public:
  CudnnPlans(CudaDevice& device, DType dtype, bool deterministic)
      : dtype_(dtype == DType::bf16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF), deterministic_(deterministic) {
    load_cudnn();
    require<DeviceError>(fe::detail::create_handle(&handle_) == CUDNN_STATUS_SUCCESS, "[cuda] cuDNN does not start");
    set_stream_ = reinterpret_cast<decltype(set_stream_)>(dlsym(fe::cudnn_dlhandle, "cudnnSetStream"));
    require<DeviceError>(set_stream_ != nullptr, "[cuda] cuDNN has no cudnnSetStream");
    use_stream(device.stream());
  }
  ~CudnnPlans() override {
    plans_.clear();
    if (handle_ != nullptr) fe::detail::destroy_handle(handle_);
  }

  void limit(const OpsLimits& limits) override { limits_ = limits; }

  void warm_up(Scratch& scratch, const AttentionShape& shape, const KvShape& kv_shape) override {
    if (deterministic_) return;  // its forward has no plans, its backward exact ones
    const auto begin = std::chrono::steady_clock::now();
    const auto build = [&](int b, int64_t extra, const std::function<AttentionPlan&()>& plan) {
      if (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() > kWarmUpSeconds) return;
      scratch.reserve(layout_of(plan(), b, extra).bytes);
    };
    // As the model has it: q, k and v side by side, gradients too.
    const int64_t out = int64_t{shape.q_heads} * shape.head_size, qkv = out + 2 * int64_t{shape.kv_heads} * shape.head_size;
    const int pages = page_bucket(0, kv_shape), chunk = chunk_bucket(0), rows = packed_bucket(0);
    for (const int b : {16, 64}) {
      if (b <= sequence_bucket(limits_.sequences))
        build(b, int64_t{b} * pages,
              [&]() -> AttentionPlan& { return paged_plan(PlanKey::chunk, b, chunk, pages, shape, kv_shape, qkv, out); });
      if (limits_.train_rows == 0) continue;
      build(b, 0, [&]() -> AttentionPlan& {
        return packed_plan(b, rows, true, shape, {.q = qkv, .k = qkv, .v = qkv, .out = out, .lse = shape.q_heads});
      });
      build(b, 0, [&]() -> AttentionPlan& {
        return backward_plan(b, rows, total_bucket(0), shape, {qkv, qkv, qkv, out, shape.q_heads, out, qkv, qkv, qkv});
      });
    }
  }

  bool takes_paged(TensorView q, const KvLayer& kv, const KvShape& kv_shape, const AttentionShape& shape,
                   TensorView out) const override {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return takes(shape, {q, out}) && aligned(kv.k) && aligned(kv.v) &&
           std::has_single_bit(static_cast<unsigned>(kv_shape.page_size));
  }
  bool takes_packed(TensorView q, TensorView k, TensorView v, const AttentionShape& shape, TensorView out) const override {
    return takes(shape, {q, k, v, out});
  }

  void paged(cudaStream_t stream, Scratch& scratch, TensorView q, KvLayer kv, const KvShape& kv_shape, const PagedBatch& batch,
             int32_t first, int32_t count, const AttentionShape& shape, TensorView out) override {
    int max_rows = 0;
    bool adjacent = true;
    for (int i = first; i < first + count; ++i) {
      max_rows = std::max(max_rows, batch.host_rows[i]);
      adjacent = adjacent && batch.host_row_begin[i] == batch.host_row_begin[first] + (i - first);
    }
    const bool decode = max_rows == 1;
    const int b = decode ? decode_bucket(count) : sequence_bucket(count), pages = page_bucket(batch.max_pages, kv_shape);
    const bool dense = decode && adjacent && b == count;
    AttentionPlan& plan = paged_plan(!decode ? PlanKey::chunk
                                     : dense ? PlanKey::decode_dense
                                             : PlanKey::decode_ragged,
                                     b, decode ? 1 : chunk_bucket(max_rows), pages, shape, kv_shape, q.ld, out.ld);

    std::unordered_map<int64_t, void*> pack = {{kQ, q.data}, {kK, kv.k}, {kV, kv.v}, {kO, out.data}};
    RaggedTables tables = base_tables(count, b, batch.row_begin + first, batch.rows + first, nullptr, batch.kv_len + first);
    tables.page_table = batch.page_table + int64_t{first} * batch.max_pages;
    tables.kv = kv;
    tables.page_size = kv_shape.page_size;
    tables.slot_elements = int64_t{shape.kv_heads} * shape.head_size;
    tables.max_pages = batch.max_pages;
    tables.plan_pages = pages;
    std::byte* at = carve(tables, scratch, plan, int64_t{b} * pages, nullptr);
    tables.plan_table = reinterpret_cast<int32_t*>(at);
    if (dense) {
      pack[kQ] = q.at(batch.host_row_begin[first]);
      pack[kO] = out.at(batch.host_row_begin[first]);
    } else {
      add_offset(tables, pack, kOffQ, q.ld, false);
      add_offset(tables, pack, kOffO, out.ld, false);
    }
    pack[kSeqQ] = tables.q_len;
    pack[kSeqKv] = tables.kv_len;
    pack[kTable] = pack[kTableV] = tables.plan_table;
    fill_ragged_tables(stream, tables);
    execute(stream, plan, pack, scratch);
  }

  void packed(cudaStream_t stream, Scratch& scratch, TensorView q, TensorView k, TensorView v, const PackedBatch& batch,
              const AttentionShape& shape, TensorView out, TensorView lse) override {
    const int b = sequence_bucket(batch.sequences);
    const bool stats = lse.data != nullptr;
    AttentionPlan& plan = packed_plan(b, packed_bucket(batch.max_rows), stats, shape,
                                      {.q = q.ld, .k = k.ld, .v = v.ld, .out = out.ld, .lse = lse.ld});
    std::unordered_map<int64_t, void*> pack = {{kQ, q.data}, {kK, k.data}, {kV, v.data}, {kO, out.data}};
    RaggedTables tables = base_tables(batch.sequences, b, batch.q_begin, batch.q_rows, batch.kv_begin, batch.kv_rows);
    Kept* const kept = keeps(stream, b) ? &kept_[0] : nullptr;
    carve(tables, scratch, plan, 0, kept);
    add_offset(tables, pack, kOffQ, q.ld, false);
    add_offset(tables, pack, kOffK, k.ld, true);
    add_offset(tables, pack, kOffV, v.ld, true);
    add_offset(tables, pack, kOffO, out.ld, false);
    if (stats) {
      pack[kStats] = lse.data;
      add_offset(tables, pack, kOffStats, lse.ld, false);
    }
    pack[kSeqQ] = tables.q_len;
    pack[kSeqKv] = tables.kv_len;
    fill(stream, scratch, tables, batch, kept);
    execute(stream, plan, pack, scratch);
  }

  void backward(cudaStream_t stream, Scratch& scratch, TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse,
                TensorView dout, const PackedBatch& batch, const AttentionShape& shape, TensorView dq, TensorView dk,
                TensorView dv) override {
    // The deterministic algorithm's workspace grows with batch * max^2, so its plan is exact.
    const int b = deterministic_ ? batch.sequences : sequence_bucket(batch.sequences);
    const int max_rows = deterministic_ ? batch.max_rows : packed_bucket(batch.max_rows);
    AttentionPlan& plan =
        backward_plan(b, max_rows, total_bucket(q.rows), shape, {q.ld, k.ld, v.ld, out.ld, lse.ld, dout.ld, dq.ld, dk.ld, dv.ld});
    std::unordered_map<int64_t, void*> pack = {{kQ, q.data},     {kK, k.data},   {kV, v.data},   {kO, out.data}, {kStats, lse.data},
                                               {kDo, dout.data}, {kDq, dq.data}, {kDk, dk.data}, {kDv, dv.data}};
    RaggedTables tables = base_tables(batch.sequences, b, batch.q_begin, batch.q_rows, batch.kv_begin, batch.kv_rows);
    Kept* const kept = keeps(stream, b) ? &kept_[1] : nullptr;
    carve(tables, scratch, plan, 0, kept);
    // Tensors with the same distance between rows share a table of offsets.
    const struct {
      Uid uid;
      int64_t ld;
      bool of_kv;
    } all[] = {{kOffQ, q.ld, false},   {kOffK, k.ld, true},        {kOffV, v.ld, true},
               {kOffO, out.ld, false}, {kOffStats, lse.ld, false}, {kOffDo, dout.ld, false},
               {kOffDq, dq.ld, false}, {kOffDk, dk.ld, true},      {kOffDv, dv.ld, true}};
    for (const auto& item : all) add_offset(tables, pack, item.uid, item.ld, item.of_kv);
    pack[kSeqQ] = tables.q_len;
    pack[kSeqKv] = tables.kv_len;
    fill(stream, scratch, tables, batch, kept);
    execute(stream, plan, pack, scratch);
  }

 private:
  static bool takes(const AttentionShape& shape, std::initializer_list<TensorView> views) {
    if (shape.head_size % 8 != 0 || shape.head_size > 128) return false;
    for (const TensorView& t : views) {
      if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0 || t.ld % 8 != 0 || t.rows * t.ld >= int64_t{1} << 31) return false;
    }
    return true;
  }

  // Buckets of maxima: the limits of a step, unless a call needs more (no limits: tests).
  int row_limit() const {
    return power_at_least(std::min({std::max(limits_.rows, limits_.train_rows), limits_.max_positions, kMostLimit}));
  }
  int chunk_bucket(int rows) const { return std::max({128, row_limit(), power_at_least(rows)}); }
  int packed_bucket(int rows) const { return std::max({64, row_limit(), power_at_least(rows)}); }
  int page_bucket(int pages, const KvShape& kv_shape) const {
    return std::max(power_at_least(limits_.max_positions / kv_shape.page_size), power_at_least(pages));
  }
  int64_t total_bucket(int64_t rows) const {
    return (std::max(rows, deterministic_ ? 0 : limits_.train_rows) + 1023) / 1024 * 1024;
  }

  AttentionPlan& paged_plan(PlanKey::Kind kind, int b, int max_q, int pages, const AttentionShape& shape, const KvShape& kv_shape,
                            int64_t q_ld, int64_t out_ld) {
    const PlanKey key = {{kind, b, max_q, pages, shape.q_heads, shape.kv_heads, shape.head_size,
                          std::bit_cast<int32_t>(shape.scale), q_ld, out_ld, kv_shape.pages, kv_shape.page_size}};
    const int64_t d = shape.head_size;
    return get(key, [&](fe::graph::Graph& graph) {
      const auto ragged = [&](Uid uid) { return kind == PlanKey::decode_dense ? nullptr : offset(graph, uid, b); };
      const Tensor tq = rows_tensor(graph, kQ, b, shape.q_heads, max_q, d, q_ld, ragged(kOffQ));
      const std::vector<int64_t> dims = {kv_shape.pages, shape.kv_heads, kv_shape.page_size, d};
      const std::vector<int64_t> strides = {kv_shape.page_size * shape.kv_heads * d, d, shape.kv_heads * d, 1};
      const Tensor tk = tensor(graph, kK, dims, strides), tv = tensor(graph, kV, dims, strides);
      auto options = fe::graph::SDPA_attributes()
                         .set_name("paged")
                         .set_generate_stats(false)
                         .set_attn_scale(shape.scale)
                         .set_padding_mask(true)
                         .set_seq_len_q(ints(graph, kSeqQ, {b, 1, 1, 1}))
                         .set_seq_len_kv(ints(graph, kSeqKv, {b, 1, 1, 1}))
                         .set_paged_attention_k_table(ints(graph, kTable, {b, 1, pages, 1}))
                         .set_paged_attention_v_table(ints(graph, kTableV, {b, 1, pages, 1}))
                         .set_paged_attention_max_seq_len_kv(pages * kv_shape.page_size);
      if (kind == PlanKey::chunk)
        options.set_diagonal_alignment(fe::DiagonalAlignment_t::BOTTOM_RIGHT).set_diagonal_band_right_bound(0);
      auto [to, stats] = graph.sdpa(tq, tk, tv, options);
      output(to, kO, b, shape.q_heads, max_q, d, out_ld, ragged(kOffO));
    });
  }

  struct Strides {  // elements from row to row
    int64_t q = 0, k = 0, v = 0, out = 0, lse = 0, dout = 0, dq = 0, dk = 0, dv = 0;
  };

  AttentionPlan& packed_plan(int b, int max_rows, bool stats, const AttentionShape& shape, const Strides& ld) {
    const PlanKey key = {{PlanKey::packed, b, max_rows, stats, shape.q_heads, shape.kv_heads, shape.head_size,
                          std::bit_cast<int32_t>(shape.scale), ld.q, ld.k, ld.v, ld.out, ld.lse}};
    return get(key, [&](fe::graph::Graph& graph) {
      const int64_t d = shape.head_size;
      const Tensor tq = rows_tensor(graph, kQ, b, shape.q_heads, max_rows, d, ld.q, offset(graph, kOffQ, b)),
                   tk = rows_tensor(graph, kK, b, shape.kv_heads, max_rows, d, ld.k, offset(graph, kOffK, b)),
                   tv = rows_tensor(graph, kV, b, shape.kv_heads, max_rows, d, ld.v, offset(graph, kOffV, b));
      auto [to, ts] = graph.sdpa(tq, tk, tv,
                                 fe::graph::SDPA_attributes()
                                     .set_name("packed")
                                     .set_generate_stats(stats)
                                     .set_attn_scale(shape.scale)
                                     .set_padding_mask(true)
                                     .set_seq_len_q(ints(graph, kSeqQ, {b, 1, 1, 1}))
                                     .set_seq_len_kv(ints(graph, kSeqKv, {b, 1, 1, 1}))
                                     .set_diagonal_alignment(fe::DiagonalAlignment_t::BOTTOM_RIGHT)
                                     .set_diagonal_band_right_bound(0));
      output(to, kO, b, shape.q_heads, max_rows, d, ld.out, offset(graph, kOffO, b));
      if (stats) output_stats(ts, b, shape.q_heads, max_rows, ld.lse, offset(graph, kOffStats, b));
    });
  }

  AttentionPlan& backward_plan(int b, int max_rows, int64_t total, const AttentionShape& shape, const Strides& ld) {
    const PlanKey key = {{PlanKey::backward, b, max_rows, total, shape.q_heads, shape.kv_heads, shape.head_size,
                          std::bit_cast<int32_t>(shape.scale), ld.q, ld.k, ld.v, ld.out, ld.lse, ld.dout, ld.dq, ld.dk, ld.dv}};
    return get(key, [&](fe::graph::Graph& graph) {
      const int64_t d = shape.head_size;
      const int hq = shape.q_heads, hk = shape.kv_heads;
      const auto rows = [&](Uid uid, Uid off, int heads, int64_t stride) {
        return rows_tensor(graph, uid, b, heads, max_rows, d, stride, offset(graph, off, b));
      };
      const Tensor ts = graph.tensor(stats_attributes(b, hq, max_rows, ld.lse, offset(graph, kOffStats, b)));
      auto options = fe::graph::SDPA_backward_attributes()
                         .set_name("backward")
                         .set_attn_scale(shape.scale)
                         .set_padding_mask(true)
                         .set_seq_len_q(ints(graph, kSeqQ, {b, 1, 1, 1}))
                         .set_seq_len_kv(ints(graph, kSeqKv, {b, 1, 1, 1}))
                         .set_max_total_seq_len_q(total)
                         .set_max_total_seq_len_kv(total)
                         .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                         .set_diagonal_band_right_bound(0)
                         .set_deterministic_algorithm(deterministic_);
      auto [tdq, tdk, tdv] = graph.sdpa_backward(rows(kQ, kOffQ, hq, ld.q), rows(kK, kOffK, hk, ld.k), rows(kV, kOffV, hk, ld.v),
                                                 rows(kO, kOffO, hq, ld.out), rows(kDo, kOffDo, hq, ld.dout), ts, options);
      output(tdq, kDq, b, hq, max_rows, d, ld.dq, offset(graph, kOffDq, b));
      output(tdk, kDk, b, hk, max_rows, d, ld.dk, offset(graph, kOffDk, b));
      output(tdv, kDv, b, hk, max_rows, d, ld.dv, offset(graph, kOffDv, b));
    });
  }

  template <class Build>
  AttentionPlan& get(const PlanKey& key, Build build) {
    const auto found = plans_.find(key);
    if (found != plans_.end()) return *found->second;
    auto plan = std::make_unique<AttentionPlan>();
    plan->graph.set_io_data_type(dtype_)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    build(plan->graph);
    check(plan->graph.build(handle_, {fe::HeurMode_t::A}), "building a plan");
    check(plan->graph.get_workspace_size(plan->workspace), "workspace size");
    return *plans_.emplace(key, std::move(plan)).first->second;
  }

  void use_stream(cudaStream_t stream) {
    if (stream_ == stream) return;
    require<DeviceError>(set_stream_(handle_, stream) == CUDNN_STATUS_SUCCESS, "[cuda] cudnnSetStream failed");
    stream_ = stream;
  }

  void execute(cudaStream_t stream, AttentionPlan& plan, std::unordered_map<int64_t, void*>& pack, Scratch& scratch) {
    use_stream(stream);
    check(plan.graph.execute(handle_, pack, static_cast<std::byte*>(scratch.get(0)) + kKeptBytes), "execution");
  }

  // Packed sequences of the same lengths and places have the same tables, and all layers of a step ask for them: those of the last
  // forward and of the last backward stay in front of the workspace.
  struct Kept {
    const void* place = nullptr;
    std::vector<int64_t> of;  // what they were made of
  };
  // Not in a recording: what its replay writes would not be noticed.
  static bool keeps(cudaStream_t stream, int b) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    return status == cudaStreamCaptureStatusNone && b <= kMostKept;
  }
  static void fill(cudaStream_t stream, const Scratch& scratch, const RaggedTables& tables, const PackedBatch& batch, Kept* kept) {
    if (kept) {
      std::vector<int64_t> of = {static_cast<int64_t>(scratch.bytes()), tables.batch};  // when it grew all is lost
      for (int o = 0; o < RaggedTables::kOffsets; ++o) of.insert(of.end(), {tables.ld[o], tables.of_kv[o]});
      for (const int32_t* values : {batch.host_q_begin, batch.host_q_rows, batch.host_kv_begin, batch.host_kv_rows})
        of.insert(of.end(), values, values + batch.sequences);
      if (kept->place == tables.q_len && kept->of == of) return;
      *kept = {tables.q_len, std::move(of)};
    }
    fill_ragged_tables(stream, tables);
  }

  Tensor tensor(fe::graph::Graph& graph, Uid uid, std::vector<int64_t> dims, std::vector<int64_t> strides) {
    return graph.tensor(fe::graph::Tensor_attributes().set_uid(uid).set_dim(dims).set_stride(strides).set_data_type(dtype_));
  }
  Tensor ints(fe::graph::Graph& graph, Uid uid, std::vector<int64_t> dims) {
    const std::vector<int64_t> strides = {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1};
    return graph.tensor(
        fe::graph::Tensor_attributes().set_uid(uid).set_dim(dims).set_stride(strides).set_data_type(fe::DataType_t::INT32));
  }
  Tensor offset(fe::graph::Graph& graph, Uid uid, int b) { return ints(graph, uid, {b + 1, 1, 1, 1}); }
  // [b, heads, rows, d] with `ld` elements from row to row.
  Tensor rows_tensor(fe::graph::Graph& graph, Uid uid, int b, int heads, int rows, int64_t d, int64_t ld, Tensor ragged) {
    auto attributes = fe::graph::Tensor_attributes()
                          .set_uid(uid)
                          .set_dim({b, heads, rows, d})
                          .set_stride({rows * ld, d, ld, 1})
                          .set_data_type(dtype_);
    if (ragged) attributes.set_ragged_offset(ragged);
    return graph.tensor(attributes);
  }
  void output(const Tensor& t, Uid uid, int b, int heads, int rows, int64_t d, int64_t ld, Tensor ragged) {
    t->set_output(true).set_uid(uid).set_dim({b, heads, rows, d}).set_stride({rows * ld, d, ld, 1}).set_data_type(dtype_);
    if (ragged) t->set_ragged_offset(ragged);
  }
  static fe::graph::Tensor_attributes stats_attributes(int b, int heads, int rows, int64_t ld, Tensor ragged) {
    return fe::graph::Tensor_attributes()
        .set_uid(kStats)
        .set_dim({b, heads, rows, 1})
        .set_stride({rows * ld, 1, ld, 1})
        .set_data_type(fe::DataType_t::FLOAT)
        .set_ragged_offset(ragged);
  }
  static void output_stats(const Tensor& t, int b, int heads, int rows, int64_t ld, Tensor ragged) {
    t->set_output(true)
        .set_uid(kStats)
        .set_dim({b, heads, rows, 1})
        .set_stride({rows * ld, 1, ld, 1})
        .set_data_type(fe::DataType_t::FLOAT);
    t->set_ragged_offset(ragged);
  }

  static RaggedTables base_tables(int count, int b, const int32_t* q_begin, const int32_t* q_rows, const int32_t* kv_begin,
                                  const int32_t* kv_rows) {
    RaggedTables tables;
    tables.count = count;
    tables.batch = b;
    tables.q_begin = q_begin;
    tables.q_rows = q_rows;
    tables.kv_begin = kv_begin;
    tables.kv_rows = kv_rows;
    return tables;
  }
  // Scratch: tables that are kept, the plan's workspace, the tables of other calls, then `extra` int32.
  struct Layout {
    size_t workspace, table, bytes;
  };
  static Layout layout_of(const AttentionPlan& plan, int b, int64_t extra) {
    const size_t workspace = (static_cast<size_t>(plan.workspace) + 255) / 256 * 256, table = table_bytes(b);
    return {workspace, table, kKeptBytes + workspace + table * kTables + static_cast<size_t>(extra) * sizeof(int32_t)};
  }
  // Returns where `extra` may go.
  std::byte* carve(RaggedTables& tables, Scratch& scratch, const AttentionPlan& plan, int64_t extra, const Kept* kept) const {
    const auto [workspace, table, bytes] = layout_of(plan, tables.batch, extra);
    std::byte* at = static_cast<std::byte*>(scratch.get(bytes));
    at += kept ? (kept - kept_) * (kKeptBytes / 2) : kKeptBytes + workspace;
    const auto take = [&, step = table] {
      int32_t* p = reinterpret_cast<int32_t*>(at);
      at += step;
      return p;
    };
    tables.q_len = take();
    tables.kv_len = take();
    for (int32_t*& place : tables.offsets) place = take();
    for (int64_t& ld : tables.ld) ld = -1;  // free
    return at;
  }
  static void add_offset(RaggedTables& tables, std::unordered_map<int64_t, void*>& pack, Uid uid, int64_t ld, bool of_kv) {
    for (int i = 0; i < RaggedTables::kOffsets; ++i) {
      if (tables.ld[i] >= 0 && (tables.ld[i] != ld || tables.of_kv[i] != of_kv)) continue;
      tables.ld[i] = ld;
      tables.of_kv[i] = of_kv;
      pack[uid] = tables.offsets[i];
      return;
    }
    throw std::logic_error("[attention] more kinds of offsets than tables");
  }

  fe::DataType_t dtype_;
  bool deterministic_;
  OpsLimits limits_;
  cudnnHandle_t handle_ = nullptr;
  cudnnStatus_t (*set_stream_)(cudnnHandle_t, cudaStream_t) = nullptr;
  cudaStream_t stream_ = nullptr;  // the handle's
  Kept kept_[2];                   // of forward, of backward
  std::map<PlanKey, std::unique_ptr<AttentionPlan>> plans_;
};

}  // namespace

std::unique_ptr<AttentionPlans> AttentionPlans::make(CudaDevice& device, DType dtype, bool deterministic) {
  return std::make_unique<CudnnPlans>(device, dtype, deterministic);
}

}  // namespace loquetier::cuda
