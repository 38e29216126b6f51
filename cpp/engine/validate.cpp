#include "engine/validate.h"

#include <cmath>

#include "core/check.h"

namespace loquetier {

namespace {

constexpr int32_t kIgnoreLabel = -100;
constexpr int kMaxTopLogprobs = 20;

// `where`, the message's beginning, comes in parts: one string a token would take longer than everything else here.
template <class... Where>
void check_token(int32_t id, int64_t vocab_size, const Where&... where) {
  require(id >= 0 && id < vocab_size, where..., ": expected a token id in 0..", vocab_size - 1, ", got ", id);
}

void check_finite_at_least(const char* field, double value, double low, const char* what) {
  require(std::isfinite(value) && value >= low, "[", what, "] ", field, ": expected a finite number >= ", low, ", got ", value);
}

template <class T>
const std::vector<T>* aligned(const std::optional<std::vector<T>>& values, const Example& example, const char* field,
                              const std::string& where) {
  if (!values) return nullptr;
  require(values->size() == example.input_ids.size(), where, " ", field, ": expected ", example.input_ids.size(),
          " entries like input_ids, got ", values->size());
  return &*values;
}

LossKind loss_kind(const std::string& name) {
  if (name == "cross_entropy") return LossKind::cross_entropy;
  if (name == "importance_sampling") return LossKind::importance_sampling;
  if (name == "ppo") return LossKind::ppo;
  if (name == "weighted_logprob") return LossKind::weighted_logprob;
  throw InvalidArgument(
      concat("[submit_train] loss: expected \"cross_entropy\", \"importance_sampling\", \"ppo\" or \"weighted_logprob\", got \"",
             name, "\""));
}

// Ids, targets and the cut after the last target; weights are left at the example's own values.
PreparedExample prepare(const Example& example, const std::string& where, const Limits& limits, bool train) {
  const auto length = static_cast<int64_t>(example.input_ids.size());
  require(length >= 2, where, " input_ids: expected at least 2 tokens (one to see, one to predict), got ", length);
  require(length <= limits.max_positions, where, " input_ids: expected at most ", limits.max_positions,
          " tokens (the model's context), got ", length);
  const auto* labels = aligned(example.labels, example, "labels", where);
  const auto* weights = aligned(example.weights, example, "weights", where);
  const auto* logprobs = aligned(example.logprobs, example, "logprobs", where);
  const auto* advantages = aligned(example.advantages, example, "advantages", where);

  PreparedExample prepared;
  prepared.length = static_cast<int32_t>(length);
  for (int64_t t = 0; t < length; ++t) {
    const auto i = static_cast<size_t>(t);
    check_token(example.input_ids[i], limits.vocab_size, where, " input_ids[", t, "]");
    const int32_t label = labels ? (*labels)[i] : example.input_ids[i];
    if (label == kIgnoreLabel) continue;
    check_token(label, limits.vocab_size, where, " labels[", t, "] (or ", kIgnoreLabel, " for no loss)");
    if (t == 0) continue;
    LossRow row;
    row.target = label;
    row.weight = weights ? (*weights)[i] : 1.0f;
    row.old_logprob = logprobs ? (*logprobs)[i] : 0.0f;
    row.advantage = advantages ? (*advantages)[i] : 0.0f;
    require(!std::isnan(row.weight) && !std::isnan(row.old_logprob) && !std::isnan(row.advantage), where, " entry ", t,
            ": expected weights, logprobs and advantages that are numbers, got NaN");
    prepared.target_rows.push_back(static_cast<int32_t>(t - 1));
    prepared.targets.push_back(row);
  }
  require(!prepared.targets.empty(), where, " labels: expected at least one target after the first token, got none (all are ",
          kIgnoreLabel, ")");
  const int64_t rows = prepared.target_rows.back() + 1;
  const int64_t most = train ? limits.max_train_tokens : limits.max_batch_tokens;
  require(rows <= most, where, " input_ids: expected at most ", most, " rows up to the last target (",
          most < limits.max_batch_tokens ? "max_train_tokens" : "max_batch_tokens", " of the engine), got ", rows);
  prepared.ids.assign(example.input_ids.begin(), example.input_ids.begin() + rows);
  return prepared;
}

std::vector<PreparedExample> prepare_all(const std::vector<Example>& examples, const char* call, const Limits& limits, bool train,
                                         int64_t& targets) {
  require(!examples.empty(), "[", call, "] examples: expected at least one, got none");
  std::vector<PreparedExample> prepared;
  prepared.reserve(examples.size());
  targets = 0;
  for (size_t i = 0; i < examples.size(); ++i) {
    prepared.push_back(prepare(examples[i], concat("[", call, "] examples[", i, "]"), limits, train));
    targets += static_cast<int64_t>(prepared.back().targets.size());
  }
  return prepared;
}

}  // namespace

void validate(const EngineOptions& o) {
  require(o.max_batch_tokens >= 1, "[engine] max_batch_tokens: expected >= 1, got ", o.max_batch_tokens);
  require(o.max_sequences >= 1, "[engine] max_sequences: expected >= 1, got ", o.max_sequences);
  require(!o.kv_cache_tokens || *o.kv_cache_tokens >= 1, "[engine] kv_cache_tokens: expected >= 1, got ",
          o.kv_cache_tokens.value_or(0));
  require(!o.adapter_pool_bytes || *o.adapter_pool_bytes >= 1, "[engine] adapter_pool_bytes: expected >= 1, got ",
          o.adapter_pool_bytes.value_or(0));
  require(!o.max_train_tokens || (*o.max_train_tokens >= 0 && *o.max_train_tokens <= o.max_batch_tokens),
          "[engine] max_train_tokens: expected 0 (no training) .. max_batch_tokens = ", o.max_batch_tokens, ", got ",
          o.max_train_tokens.value_or(0));
  require(o.memory_fraction > 0 && o.memory_fraction <= 1, "[engine] memory_fraction: expected in (0, 1], got ", o.memory_fraction);
  require(o.max_lora_rank >= 1 && o.max_lora_rank <= 4096, "[engine] max_lora_rank: expected 1..4096, got ", o.max_lora_rank);
  require(o.max_queue >= 1, "[engine] max_queue: expected >= 1, got ", o.max_queue);
  require(o.num_threads >= 0 && o.num_threads <= 1024, "[engine] num_threads: expected 0..1024, got ", o.num_threads);
  require(o.page_size >= 1 && o.page_size <= 256 && (o.page_size & (o.page_size - 1)) == 0,
          "[engine] page_size: expected a power of two up to 256, got ", o.page_size);
  require(o.recompute == "none" || o.recompute == "layer", "[engine] recompute: expected \"none\" or \"layer\", got \"",
          o.recompute, "\"");
  require(o.dtype == "auto" || o.dtype == "f32" || o.dtype == "bf16" || o.dtype == "f16",
          "[engine] dtype: expected \"auto\", \"f32\", \"bf16\" or \"f16\", got \"", o.dtype, "\"");
  require(o.slice_rows >= 0, "[engine] slice_rows: expected >= 0, got ", o.slice_rows);
  if (!o.latency) return;
  for (const auto& [field, ms] : {std::pair("ttft_ms", o.latency->ttft_ms), std::pair("tpot_ms", o.latency->tpot_ms)}) {
    require(std::isfinite(ms) && ms > 0, "[engine] latency ", field, ": expected a finite number of milliseconds > 0, got ", ms);
  }
}

void validate(const InferOptions& i, const EngineOptions& options) {
  const double deadline = i.deadline_ms.value_or(1);
  require(std::isfinite(deadline) && deadline > 0, "[submit_infer] deadline_ms: expected a finite number of milliseconds > 0, got ",
          deadline);
  require(!i.reject_late || i.deadline_ms || options.latency,
          "[submit_infer] reject_late: expected deadline_ms beside it, or an engine with a latency target");
}

void validate(const SamplingParams& s, int64_t vocab_size) {
  check_finite_at_least("temperature", s.temperature, 0, "sampling");
  require(s.top_p > 0 && s.top_p <= 1, "[sampling] top_p: expected in (0, 1], got ", s.top_p);
  require(s.top_k >= -1, "[sampling] top_k: expected >= 1, or 0 or -1 for off, got ", s.top_k);
  require(s.min_p >= 0 && s.min_p <= 1, "[sampling] min_p: expected in [0, 1], got ", s.min_p);
  require(s.max_tokens >= 1, "[sampling] max_tokens: expected >= 1, got ", s.max_tokens);
  require(s.min_tokens >= 0 && s.min_tokens <= s.max_tokens, "[sampling] min_tokens: expected 0..max_tokens = ", s.max_tokens,
          ", got ", s.min_tokens);
  require(s.presence_penalty >= -2 && s.presence_penalty <= 2, "[sampling] presence_penalty: expected in [-2, 2], got ",
          s.presence_penalty);
  require(s.frequency_penalty >= -2 && s.frequency_penalty <= 2, "[sampling] frequency_penalty: expected in [-2, 2], got ",
          s.frequency_penalty);
  require(std::isfinite(s.repetition_penalty) && s.repetition_penalty > 0, "[sampling] repetition_penalty: expected > 0, got ",
          s.repetition_penalty);
  require(s.logprobs >= 0 && s.logprobs <= kMaxTopLogprobs, "[sampling] logprobs: expected 0..", kMaxTopLogprobs, ", got ",
          s.logprobs);
  require(s.logprobs <= vocab_size, "[sampling] logprobs: expected at most the vocabulary (", vocab_size, "), got ", s.logprobs);
  for (int32_t id : s.stop_token_ids) check_token(id, vocab_size, "[sampling] stop_token_ids");
  for (const auto& [id, bias] : s.logit_bias) {
    check_token(id, vocab_size, "[sampling] logit_bias");
    require(!std::isnan(bias) && bias < std::numeric_limits<double>::infinity(), "[sampling] logit_bias[", id,
            "]: expected a number below infinity, got ", bias);
  }
}

void validate(const AdamW& o) {
  check_finite_at_least("lr", o.lr, 0, "adamw");
  for (double beta : o.betas) require(beta >= 0 && beta < 1, "[adamw] betas: expected in [0, 1), got ", beta);
  check_finite_at_least("eps", o.eps, 0, "adamw");
  check_finite_at_least("weight_decay", o.weight_decay, 0, "adamw");
  require(!o.max_grad_norm || (std::isfinite(*o.max_grad_norm) && *o.max_grad_norm > 0),
          "[adamw] max_grad_norm: expected > 0, or none for no clipping, got ", o.max_grad_norm.value_or(0));
  require(std::isfinite(o.loraplus_lr_ratio) && o.loraplus_lr_ratio > 0, "[adamw] loraplus_lr_ratio: expected > 0, got ",
          o.loraplus_lr_ratio);
}

void validate_prompt(const std::vector<int32_t>& prompt, const Limits& limits) {
  const auto length = static_cast<int64_t>(prompt.size());
  require(length >= 1, "[submit_infer] prompt_ids: expected at least one token, got none");
  require(length < limits.max_positions, "[submit_infer] prompt_ids: expected fewer than ", limits.max_positions,
          " tokens (the model's context, which also holds the answer), got ", length);
  require(length < limits.kv_tokens, "[submit_infer] prompt_ids: expected fewer than ", limits.kv_tokens,
          " tokens (kv_cache_tokens of the engine), got ", length);
  for (size_t i = 0; i < prompt.size(); ++i) check_token(prompt[i], limits.vocab_size, "[submit_infer] prompt_ids[", i, "]");
}

std::vector<PreparedExample> prepare_training(const std::vector<Example>& examples, const TrainOptions& options,
                                              const Limits& limits, int64_t& targets) {
  const LossKind kind = loss_kind(options.loss);
  require(options.reduction == "mean" || options.reduction == "sum",
          "[submit_train] reduction: expected \"mean\" or \"sum\", got \"", options.reduction, "\"");
  require(options.clip_low >= 0 && options.clip_low <= 1, "[submit_train] clip_low: expected in [0, 1], got ", options.clip_low);
  require(std::isfinite(options.clip_high) && options.clip_high >= 0, "[submit_train] clip_high: expected >= 0, got ",
          options.clip_high);
  require(std::isfinite(options.weight) && options.weight > 0, "[submit_train] weight: expected a finite number > 0, got ",
          options.weight);
  if (options.optimizer) validate(*options.optimizer);
  const bool policy = kind == LossKind::importance_sampling || kind == LossKind::ppo;
  for (size_t i = 0; policy && i < examples.size(); ++i) {
    require(examples[i].logprobs && examples[i].advantages, "[submit_train] examples[", i, "]: loss \"", options.loss,
            "\" needs logprobs and advantages");
  }
  std::vector<PreparedExample> prepared = prepare_all(examples, "submit_train", limits, true, targets);
  const float scale = options.reduction == "mean" ? 1.0f / static_cast<float>(targets) : 1.0f;
  for (PreparedExample& example : prepared) {
    for (LossRow& row : example.targets) {
      row.kind = kind;
      row.weight *= scale;
      row.clip_low = static_cast<float>(options.clip_low);
      row.clip_high = static_cast<float>(options.clip_high);
    }
  }
  return prepared;
}

std::vector<PreparedExample> prepare_evaluation(const std::vector<Example>& examples, const Limits& limits, int64_t& targets) {
  std::vector<PreparedExample> prepared = prepare_all(examples, "submit_eval", limits, false, targets);
  for (PreparedExample& example : prepared) {
    for (LossRow& row : example.targets) row = {.target = row.target, .weight = row.weight / static_cast<float>(targets)};
  }
  return prepared;
}

}  // namespace loquetier
