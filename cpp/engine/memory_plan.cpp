#include "engine/memory_plan.h"

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <vector>

#include "adapter/adapter_pool.h"
#include "adapter/train_state.h"
#include "engine/step_batch.h"
#include "engine/timing.h"
#include "io/peft_folder.h"
#include "model/model.h"
#include "ops/workspace.h"

namespace loquetier {

namespace {

constexpr size_t kPoolShare = 8;      // adapter pool: this fraction of what a step leaves
constexpr size_t kTrainingShare = 8;  // training state: at least this fraction, when training is on
constexpr size_t kLazyKvShare = 2;    // on the CPU: KV pages, this fraction of the budget
constexpr size_t kLeastPages = 1;

int64_t pages_for(int64_t tokens, int64_t page_size) { return (tokens + page_size - 1) / page_size; }

std::string bytes_text(int64_t bytes) {
  char text[64];
  if (bytes >= int64_t{1} << 30) std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (int64_t{1} << 30));
  else std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / (int64_t{1} << 20));
  return text;
}

AdapterLayout layout_of_rank(const ModelConfig& config, int rank) {
  std::vector<LoraTarget> targets;
  for (const ModuleInfo& module : modules_of(config)) {
    if (module.layer >= 0) targets.push_back({.module = module, .rank = rank, .scale = 1});
  }
  return AdapterLayout::make(std::move(targets), config);
}

// Tables and results, on the device (and pinned beside it).
size_t tables_bytes(const ModelConfig& config, const EngineOptions& options, int64_t kv_pages) {
  return table_bytes(config, options, kv_pages).total() +
         AdapterPool::tables_bytes(table_slots(options), static_cast<size_t>(site_count(config)) * sizeof(LoraSite));
}

// Rows beside a chunk of training that Saved has room for.
int64_t slack_of(const EngineOptions& options) { return slack_rows_for(options.max_batch_tokens, options.max_sequences); }

// Scratch of steps with training rows, whatever the ranks: of those saved, and of those beside.
size_t train_scratch_bytes(const ModelConfig& config, const EngineOptions& options, const MemoryFacts& facts) {
  const DType dtype = facts.dtype;
  const int64_t train = train_tokens(options), columns = stacked_rank(options);
  const int64_t heads = head_chunk(options, facts.host_addressable);
  const Recompute recompute = recompute_of(options);
  if (train == 0) return 0;
  if (!trains_in_pieces(options))
    return Model::scratch_bytes(config, dtype, train, train, std::min(train, heads), columns, recompute);
  const int64_t rows = std::min(train + slack_of(options), options.max_batch_tokens);
  size_t bytes = 0;
  for (const int64_t saved_rank : {int64_t{0}, columns}) {
    const SliceShape shape = {.chunked = true, .block_rows = train, .saved_rank = saved_rank};
    bytes = std::max(bytes, Model::scratch_bytes(config, dtype, rows, train, std::min(rows, heads), columns, recompute, shape));
  }
  return bytes;
}

size_t train_saved_bytes(const ModelConfig& config, const EngineOptions& options, DType dtype) {
  const int64_t train = train_tokens(options);
  const bool pieces = trains_in_pieces(options);
  return Model::saved_bytes(config, dtype, train + (pieces ? slack_of(options) : 0), train, stacked_rank(options),
                            recompute_of(options), pieces);
}

}  // namespace

TableBytes table_bytes(const ModelConfig& config, const EngineOptions& options, int64_t kv_pages) {
  const int64_t width = std::min(kv_pages, pages_for(config.max_positions, options.page_size)), train = train_tokens(options);
  const BatchCounts counts = most_counts(options.max_batch_tokens, options.max_sequences, width, train);
  TableBytes bytes;
  bytes.metadata = metadata_bytes(counts);
  bytes.results = results_bytes(counts);
  if (train == 0) return bytes;
  size_t slices = 1;
  if (trains_in_pieces(options)) {
    const int64_t asked = options.slice_rows, smallest = std::min(asked > 0 ? asked : kSmallestSlice, options.max_batch_tokens);
    // Two parts of a layer are cut by rows. Two are cut between sequences, where a cut and the next are more than a slice apart.
    slices = static_cast<size_t>(2 * pages_for(train, smallest) + 2 * (2 * train / smallest + 1));
    // A chunk that stopped, or the rows beside one that left its pass.
    const BatchCounts chunk = most_counts(train, 0, 0, 0), rest = most_counts(slack_of(options), options.max_sequences, width, 0);
    bytes.chunk = std::max(metadata_bytes(chunk), metadata_bytes(rest));
    bytes.chunk_results = std::max(results_bytes(chunk), results_bytes(rest));
  }
  const auto rows = static_cast<size_t>(train);
  bytes.micro = micro_metadata_bytes(rows, rows, rows, slices);
  return bytes;
}

int64_t train_tokens(const EngineOptions& options) {
  return std::min(options.max_train_tokens.value_or(options.max_batch_tokens), options.max_batch_tokens);
}

bool trains_in_pieces(const EngineOptions& options) { return options.slice_rows > 0 || options.latency.has_value(); }

int64_t head_chunk(const EngineOptions& options, bool host_addressable) {
  return host_addressable || trains_in_pieces(options) ? kHeadSlice : kHeadChunk;
}

// One more than the largest rank: what graph_rank() may add.
int64_t stacked_rank(const EngineOptions& options) { return int64_t{kMaxParts} * (options.max_lora_rank + 1); }

size_t table_slots(const EngineOptions& options) {
  constexpr size_t kLeast = 64;
  return kLeast + 2 * static_cast<size_t>(options.max_sequences);
}

Recompute recompute_of(const EngineOptions& options) { return options.recompute == "layer" ? Recompute::layer : Recompute::none; }

OpsLimits ops_limits(const ModelConfig& config, const EngineOptions& options) {
  return {.rows = options.max_batch_tokens,
          .train_rows = train_tokens(options),
          .sequences = options.max_sequences,
          .vocabulary = config.vocab_size,
          .max_positions = config.max_positions,
          .q_heads = config.num_heads,
          .kv_heads = config.num_kv_heads,
          .head_size = config.head_size,
          .rank = options.max_lora_rank};
}

size_t weight_bytes(const ModelConfig& config, DType dtype) {
  const int64_t h = config.hidden_size, f = config.intermediate_size, q = int64_t{config.num_heads} * config.head_size,
                qkv = config.qkv_columns();
  int64_t layer = qkv * h + h * q + 2 * f * h + h * f + 2 * h;
  if (config.qkv_bias) layer += qkv;
  if (config.o_bias) layer += h;
  if (config.mlp_bias) layer += 2 * f + h;
  if (config.qk_norm) layer += 2 * config.head_size;
  const int64_t elements = config.num_layers * layer + config.vocab_size * h * (config.tie_word_embeddings ? 1 : 2) + h;
  return static_cast<size_t>(elements) * size_of(dtype) + static_cast<size_t>(config.head_size / 2) * sizeof(float);
}

MemoryPlan plan_memory(const ModelConfig& config, const EngineOptions& options, const MemoryFacts& facts, int rank) {
  require(rank >= 1 && rank <= options.max_lora_rank, "[plan_memory] rank: expected 1 .. ", options.max_lora_rank,
          " (max_lora_rank), got ", rank);
  const Recompute recompute = recompute_of(options);
  const int64_t rows = options.max_batch_tokens, train = train_tokens(options), columns = stacked_rank(options);
  const auto size = [](size_t bytes) { return static_cast<int64_t>(bytes); };
  MemoryPlan plan;
  plan.device = facts.device;
  plan.at_start = !facts.host_addressable;
  plan.device_bytes = size(facts.free_bytes);
  plan.budget_bytes = static_cast<int64_t>(options.memory_fraction * static_cast<double>(facts.free_bytes));
  plan.max_train_tokens = train;
  plan.weight_bytes = facts.weights_placed ? 0 : size(weight_bytes(config, facts.dtype));
  const int64_t heads = std::min(rows, head_chunk(options, facts.host_addressable));
  plan.scratch_bytes = size(std::max(Model::scratch_bytes(config, facts.dtype, rows, 0, heads, columns, recompute),
                                     train_scratch_bytes(config, options, facts)));
  plan.saved_bytes = size(train_saved_bytes(config, options, facts.dtype));
  plan.workspace_bytes = size(facts.workspace_bytes);
  const AdapterLayout adapter = layout_of_rank(config, rank);
  plan.rank = rank;
  plan.adapter_bytes = size(adapter.pool_bytes(facts.dtype));
  plan.adapter_training_bytes = size(TrainState::bytes_for(adapter));

  const int64_t page = size(KvCache::page_bytes(config, facts.dtype, options.page_size));
  const int64_t useful = options.max_sequences * pages_for(config.max_positions, options.page_size);
  const std::optional<int64_t> asked =
      options.kv_cache_tokens ? std::optional(pages_for(*options.kv_cache_tokens, options.page_size)) : std::nullopt;
  int64_t pages = 0;
  if (facts.host_addressable) {
    pages = asked.value_or(std::clamp<int64_t>(plan.budget_bytes / static_cast<int64_t>(kLazyKvShare) / page, 1, useful));
    plan.adapter_pool_bytes = options.adapter_pool_bytes.value_or(plan.budget_bytes / static_cast<int64_t>(kPoolShare));
    plan.metadata_bytes = size(tables_bytes(config, options, pages));
    plan.training_state_bytes =
        std::max<int64_t>(0, plan.budget_bytes - plan.weight_bytes - pages * page - plan.adapter_pool_bytes);
  } else {
    const int64_t fixed = plan.weight_bytes + plan.scratch_bytes + plan.saved_bytes + plan.workspace_bytes;
    // The tables depend on the pages, which depend on what the tables leave: from above, once.
    const int64_t most_pages = asked.value_or(std::clamp<int64_t>((plan.budget_bytes - fixed) / page, 1, useful));
    plan.metadata_bytes = size(tables_bytes(config, options, most_pages));
    const int64_t rest = plan.budget_bytes - fixed - plan.metadata_bytes;
    plan.adapter_pool_bytes = options.adapter_pool_bytes.value_or(std::max<int64_t>(0, rest / static_cast<int64_t>(kPoolShare)));
    const int64_t training = train > 0 ? std::max<int64_t>(0, rest / static_cast<int64_t>(kTrainingShare)) : 0;
    pages = asked.value_or(std::min((rest - plan.adapter_pool_bytes - training) / page, useful));
    plan.training_state_bytes = rest - plan.adapter_pool_bytes - pages * page;
  }
  plan.kv_bytes = pages * page;
  plan.kv_tokens = pages * options.page_size;
  plan.adapters = plan.adapter_pool_bytes / plan.adapter_bytes;
  plan.trained_adapters = train > 0 ? std::max<int64_t>(0, plan.training_state_bytes) / plan.adapter_training_bytes : 0;
  plan.pinned_bytes = plan.metadata_bytes;
  if (plan.at_start) {
    require<OutOfMemory>(pages >= static_cast<int64_t>(kLeastPages) && plan.training_state_bytes >= 0,
                         "[engine] expected the shares below to fit ", plan.budget_bytes, " bytes (memory_fraction ",
                         options.memory_fraction, " of ", plan.device_bytes, " free on ", plan.device, ", with at least ",
                         kLeastPages, " KV page of ", page,
                         " bytes); lower max_batch_tokens, max_train_tokens (0: no training), kv_cache_tokens, "
                         "adapter_pool_bytes or max_lora_rank, or set recompute=\"layer\"\n",
                         plan.table());
  }
  return plan;
}

std::string MemoryPlan::table() const {
  std::ostringstream out;
  const auto line = [&](const char* name, int64_t bytes, const std::string& what) {
    char text[256];
    std::snprintf(text, sizeof text, "%-15s %16lld  %12s  %s\n", name, static_cast<long long>(bytes), bytes_text(bytes).c_str(),
                  what.c_str());
    out << text;
  };
  line("device", device_bytes, concat("free on ", device));
  line("budget", budget_bytes, at_start ? "of it, taken at start" : "of it, taken as steps need it");
  line("weights", weight_bytes, "");
  line("kv", kv_bytes, concat(kv_tokens, " tokens"));
  line("adapter pool", adapter_pool_bytes,
       concat(adapters, " adapters of rank ", rank, " on all linears, ", adapter_bytes, " bytes each"));
  line("saved", saved_bytes,
       max_train_tokens > 0 ? concat("activations of ", max_train_tokens, " training rows") : "training is off");
  line("scratch", scratch_bytes, "activations of one step");
  line("metadata", metadata_bytes, "a step's tables and results, the same again in pinned host memory");
  line("workspace", workspace_bytes, "libraries and kernels");
  line("training state", training_state_bytes,
       concat(trained_adapters, " adapters of rank ", rank, " in training, ", adapter_training_bytes, " bytes each"));
  return out.str();
}

}  // namespace loquetier
