// Plain data of the public API: what goes in (options) and what comes out (events). Names are those of the field: LoraConfig has
// PEFT's field names, SamplingParams has vLLM's, Example follows transformers. Python mirrors this file name by name.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace loquetier {

// ---------------------------------------------------------------- adapters

// A LoRA configuration, PEFT's field names (Hu et al., arXiv 2106.09685; rsLoRA: Kalajdzievski, arXiv 2312.03732).
struct LoraConfig {
  int r = 8;              // rank, 1 .. max_lora_rank of the engine
  double lora_alpha = 8;  // scale = lora_alpha / r, or / sqrt(r) with use_rslora
  // Which linears: a list of module names or name suffixes ("q_proj"), or one regex over full module names
  // (target_modules_is_regex), or {"all-linear"}: every linear but lm_head. Empty: {"q_proj", "v_proj"}, PEFT's default for these
  // families.
  std::vector<std::string> target_modules = {};
  bool target_modules_is_regex = false;
  std::vector<std::string> exclude_modules = {};  // as target_modules; wins over it
  bool exclude_modules_is_regex = false;
  std::optional<std::vector<int>> layers_to_transform = {};  // only these layer indices
  double lora_dropout = 0;                                   // in [0, 1): on the input of A, training rows only
  bool use_rslora = false;
  std::vector<std::pair<std::string, int>> rank_pattern =
      {};  // module name suffix or regex -> rank; the first match wins, as in PEFT
  std::vector<std::pair<std::string, double>> alpha_pattern = {};  // likewise -> lora_alpha
  std::string init_lora_weights =
      "true";  // "true": A Kaiming-uniform(a = sqrt 5), B zero; "gaussian": A normal / r, B zero; "false": both Kaiming / normal
  uint64_t seed = 0;  // of the initial values and of the dropout masks
};

// ---------------------------------------------------------------- serving

// Sampling of one request, vLLM's field names.
struct SamplingParams {
  double temperature = 1.0;                  // >= 0; greedy below 1e-5
  double top_p = 1.0;                        // (0, 1]
  int top_k = 0;                             // 0 or -1: off
  double min_p = 0.0;                        // [0, 1]
  std::optional<uint64_t> seed = {};         // none: drawn from the engine's seed and the request id
  int max_tokens = 16;                       // >= 1
  int min_tokens = 0;                        // stop tokens are forbidden before
  std::vector<int32_t> stop_token_ids = {};  // beside the model's own end-of-sequence ids
  bool ignore_eos = false;                   // the model's end-of-sequence ids do not stop; stop_token_ids still do
  double presence_penalty = 0;               // [-2, 2]
  double frequency_penalty = 0;              // [-2, 2]
  double repetition_penalty = 1;             // > 0
  std::map<int32_t, double> logit_bias = {};
  int logprobs = 0;              // how many of the most probable tokens to report per position, 0 .. 20
  bool prompt_logprobs = false;  // log-probability of every prompt token but the first
};

enum class FinishReason : uint8_t { none, stop, length, cancelled, error, rejected };  // rejected: late, and asked not to be served

struct TokenLogprob {
  int32_t token_id = 0;
  float logprob = 0;
};

// One generated token. The event that carries a finish_reason other than `none` is the request's last; a request that ends without
// a token (cancelled, error) has only its InferResult.
struct TokenEvent {
  int64_t request_id = 0;
  int64_t index = 0;  // 0 for the first generated token
  int32_t token_id = 0;
  float logprob = 0;  // natural log, of the model's own distribution
  std::vector<TokenLogprob> top_logprobs = {};
  FinishReason finish_reason = FinishReason::none;
  std::string adapter = {};  // empty: base model
  int64_t version = 0;       // of the adapter that made this token
};

struct InferResult {
  int64_t request_id = 0;
  std::vector<int32_t> token_ids = {};
  std::vector<float> logprobs = {};         // one per token
  std::vector<float> prompt_logprobs = {};  // one per prompt token when asked for, the first is NaN
  FinishReason finish_reason = FinishReason::none;
  std::string adapter = {};
  std::string error = {};    // when finish_reason is error or rejected
  double queue_seconds = 0;  // from submission to the step that computed its first row
  double ttft_seconds = 0;   // from submission to the first token; 0 without one
  double tpot_seconds = 0;   // mean time per token after the first; 0 with fewer than two
  int64_t preemptions = 0;   // times its pages were taken and its rows computed again
  bool deadline_met = true;  // false: it had a deadline and its first token came later
};

// ---------------------------------------------------------------- training

// One training or evaluation example. Arrays that are given have as many entries as input_ids and are aligned with it, as in
// transformers: entry t belongs to token t as a target, predicted from the tokens before it; entry 0 is never a target.
struct Example {
  std::vector<int32_t> input_ids = {};
  std::optional<std::vector<int32_t>> labels = {};    // -100: no loss; default: input_ids
  std::optional<std::vector<float>> weights = {};     // per target; default 1
  std::optional<std::vector<float>> logprobs = {};    // of the sampling policy (importance_sampling, ppo)
  std::optional<std::vector<float>> advantages = {};  // (importance_sampling, ppo)
};

// AdamW as torch.optim.AdamW; the caller owns schedules by passing lr per call.
struct AdamW {
  double lr = 1e-4;
  std::array<double, 2> betas = {0.9, 0.999};
  double eps = 1e-8;
  double weight_decay = 0.0;
  std::optional<double> max_grad_norm = {};  // global L2 norm over all gradients of the adapter
  double loraplus_lr_ratio = 1.0;            // lr of B = ratio * lr (Hayou et al., arXiv 2402.12354)
};

struct TrainOptions {
  std::string loss = "cross_entropy";      // "importance_sampling", "ppo", "weighted_logprob"
  std::string reduction = "mean";          // over the mini-batch's unmasked targets; or "sum"
  std::optional<AdamW> optimizer = {};     // none: gradients accumulate until a later call has one
  double clip_low = 0.2, clip_high = 0.2;  // ppo
  double weight = 1;                       // > 0: share of training rows beside other adapters in training
};

struct TrainResult {
  int64_t job_id = 0;
  std::string adapter = {};
  int64_t version = 0;  // of the adapter after this job
  double loss = 0;      // reduced as asked
  int64_t num_targets = 0;
  double grad_norm = 0;      // before clipping; NaN when the job had no optimizer
  bool applied = false;      // an optimizer step happened
  std::string reason = {};   // why not: "accumulated", "non-finite gradient", "cancelled", "error: …"
  double queue_seconds = 0;  // from submission to the step that computed its first row
  double seconds = 0;        // from submission to the end
  int64_t steps = 0;         // that computed rows or backward slices of it
};

struct EvalResult {
  int64_t job_id = 0;
  std::string adapter = {};
  int64_t version = 0;
  double loss = 0;  // mean over unmasked targets
  int64_t num_targets = 0;
  std::vector<std::vector<float>> logprobs = {};  // per example, aligned with input_ids; NaN where there is no target
  std::string reason = {};                        // empty, or why there is no result: "cancelled", "error: …"
};

struct StepResult {
  std::vector<TokenEvent> tokens = {};
  std::vector<InferResult> finished = {};
  std::vector<TrainResult> trained = {};
  std::vector<EvalResult> evaluated = {};
};

// ---------------------------------------------------------------- engine

struct InferOptions {
  std::string adapter = {};  // empty: base model
  SamplingParams sampling = {};
  int priority = 0;                        // higher is served first
  bool pin_version = false;                // keep the adapter version the request began with
  std::optional<double> deadline_ms = {};  // of the first token, from submission; default: the engine's ttft_ms
  bool reject_late = false;  // end with reason "rejected" once the deadline cannot be met; default: serve late, counted as missed
};

// What serving is to keep while training takes the rest.
struct LatencyTarget {
  double ttft_ms = 1000;  // from submission to the first token, > 0
  // Mean time per output token after the first, > 0. One gap may be planned a quarter longer, with time that gaps before it left.
  double tpot_ms = 50;
};

struct EngineOptions {
  std::string device = "auto";      // "cpu", "cuda", "cuda:1"; auto: cuda when usable, else cpu
  std::string dtype = "auto";       // compute dtype: "f32" (CPU), "bf16", "f16" (CUDA); auto: f32 on CPU, the checkpoint's on CUDA
  int64_t max_batch_tokens = 8192;  // rows of one step; also the longest training example
  int64_t max_sequences = 256;      // running requests
  std::optional<int64_t> kv_cache_tokens = {};     // default: from memory_fraction
  std::optional<int64_t> adapter_pool_bytes = {};  // default: from memory_fraction
  double memory_fraction = 0.9;                    // of the device's free memory, for everything
  std::optional<int64_t> max_train_tokens = {};    // rows of a step with training rows, or in pieces of a micro-batch;
                                                   // 0: no training; default: max_batch_tokens
  int max_lora_rank = 256;
  int64_t max_queue = 100000;      // waiting requests + examples waiting in jobs; beyond: QueueFull
  std::string recompute = "none";  // "layer": keep only each layer's input for backward
  bool deterministic = false;      // results do not depend on who else is in the batch, bit for bit
  uint64_t seed = 0;
  int num_threads = 0;  // CPU backend; 0: the processors this process may use
  bool prefix_caching = true;
  bool cuda_graphs = true;                    // steps of decodes alone replay recorded launches (CUDA)
  int page_size = 16;                         // tokens per KV page, a power of two
  std::optional<LatencyTarget> latency = {};  // none: throughput, whole micro-batches
  int slice_rows = 0;  // rows of a piece of training work; 0: whole micro-batches, or from the device's speed with a target
  std::string trace_path = {};  // a Chrome / Perfetto trace (JSON) of every step is written there; empty: none
};

}  // namespace loquetier
