// The model on the CPU backend against an independent one in double precision (reference_model.h): values, and the gradient of
// every adapter tensor, in batches that mix training, evaluation, prompt chunks and decodes of several adapters and of the base.
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "adapter/adapter_pool.h"
#include "batch_builder.h"
#include "check.h"
#include "io/hf_config.h"
#include "reference_model.h"

namespace loquetier::test {
namespace {

constexpr int32_t kPageSize = 4;
// Error: max |got - want| / max |want|, f32 against double.
constexpr double kValueBound = 2e-6;
constexpr double kGradientBound = 1e-5;  // per adapter tensor
// A gradient that is small because large terms cancel (q and k of a short example) carries the rounding of those terms, so a
// tensor's error is taken relative to at least this share of the adapter's largest gradient, and to at least kOrderOne (then the
// bound is 1e-7: half a unit in the last place of the terms, which are of order one).
constexpr double kSmallGradient = 0.1;
constexpr double kOrderOne = 0.01;

uint64_t seed() { return std::stoull(option("--seed", "1")); }

struct Family {
  const char* name;
  const char* config;
};
// L = 2, grouped queries; between them: tied and untied heads, biases, q/k norm with a head size that is not H / Q, rope scaling.
const std::vector<Family>& families() {
  static const std::vector<Family> list = {
      {"llama",
       R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 28,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
           "rope_theta": 100.0, "hidden_act": "silu", "tie_word_embeddings": false,
           "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}})"},
      {"qwen2",
       R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 28,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
           "rope_theta": 1000.0, "hidden_act": "silu", "tie_word_embeddings": true})"},
      {"qwen3",
       R"({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 37, "hidden_size": 12, "intermediate_size": 28,
           "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 64,
           "rms_norm_eps": 1e-6, "rope_theta": 1000.0, "hidden_act": "silu", "tie_word_embeddings": true})"},
  };
  return list;
}

using Tensors = std::map<std::string, HostTensor>;

HostTensor random_tensor(std::mt19937_64& random, std::vector<int64_t> shape, double mean, double deviation) {
  std::normal_distribution<double> normal(mean, deviation);
  const int64_t n = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  auto data = std::make_shared<std::vector<float>>();
  for (int64_t i = 0; i < n; ++i) data->push_back(static_cast<float>(normal(random)));
  return {data->data(), "f32", std::move(shape), data};
}

// Weights of a size that makes every path matter: activations of order one, norms and biases away from one and zero.
Tensors random_tensors(const ModelConfig& c, std::mt19937_64& random) {
  Tensors t;
  const auto matrix = [&](const std::string& name, int64_t out, int64_t in, bool bias = false) {
    t[name + ".weight"] = random_tensor(random, {out, in}, 0, 1.2 / std::sqrt(static_cast<double>(in)));
    if (bias) t[name + ".bias"] = random_tensor(random, {out}, 0, 0.3);
  };
  const auto norm = [&](const std::string& name, int64_t n) { t[name + ".weight"] = random_tensor(random, {n}, 1, 0.2); };
  const int64_t h = c.hidden_size, f = c.intermediate_size, q = int64_t{c.num_heads} * c.head_size,
                k = int64_t{c.num_kv_heads} * c.head_size;
  matrix("model.embed_tokens", c.vocab_size, h);
  for (int64_t l = 0; l < c.num_layers; ++l) {
    const std::string layer = "model.layers." + std::to_string(l);
    norm(layer + ".input_layernorm", h);
    norm(layer + ".post_attention_layernorm", h);
    matrix(layer + ".self_attn.q_proj", q, h, c.qkv_bias);
    matrix(layer + ".self_attn.k_proj", k, h, c.qkv_bias);
    matrix(layer + ".self_attn.v_proj", k, h, c.qkv_bias);
    matrix(layer + ".self_attn.o_proj", h, q, c.o_bias);
    if (c.qk_norm) {
      norm(layer + ".self_attn.q_norm", c.head_size);
      norm(layer + ".self_attn.k_norm", c.head_size);
    }
    matrix(layer + ".mlp.gate_proj", f, h);
    matrix(layer + ".mlp.up_proj", f, h);
    matrix(layer + ".mlp.down_proj", h, f);
  }
  norm("model.norm", h);
  if (!c.tie_word_embeddings) matrix("lm_head", c.vocab_size, h);
  return t;
}

struct TestAdapter {
  std::shared_ptr<const AdapterLayout> layout;
  std::vector<float> flat;
  std::shared_ptr<AdapterWeights> weights;  // pinned
  std::unique_ptr<TrainState> train;
};

// A model on the CPU backend with what a test needs to run it.
class Setup {
 public:
  explicit Setup(const Family& family, bool deterministic = false, uint64_t offset = 0) : random(seed() * 1000 + offset) {
    ops = make_cpu_ops(2, deterministic);
    const ModelConfig parsed = parse_hf_config(family.config, family.name);
    base = BaseModel::from_tensors(family.config, random_tensors(parsed, random));
    model = std::make_unique<Model>(place_weights(base, *ops), *ops);
    pool = std::make_unique<AdapterPool>(*ops, size_t{4} << 20);
    kv = KvCache::make(*ops, model->config(), 64, kPageSize);
  }
  const ModelConfig& config() const { return model->config(); }

  // Adapts modules whose full name contains one of `names` ("" is all). Every tensor is away from zero, B too.
  TestAdapter& adapter(const std::vector<std::string>& names, int rank, int rank_step = 0) {
    std::vector<LoraTarget> targets;
    for (const ModuleInfo& module : modules_of(config())) {
      for (const std::string& name : names) {
        if (module.name.find(name) == std::string::npos) continue;
        targets.push_back({module, rank, 1.0 * rank, 0.7f});
        rank += rank_step;
        break;
      }
    }
    TestAdapter a;
    a.layout = std::make_shared<const AdapterLayout>(AdapterLayout::make(targets, config()));
    LoraWeights weights;
    const auto draw = [&](int64_t n, double deviation) {
      std::normal_distribution<double> normal(0, deviation);
      std::vector<float> v;
      for (int64_t i = 0; i < n; ++i) v.push_back(static_cast<float>(normal(random)));
      return v;
    };
    for (const LoraTarget& t : targets) {
      weights.a.push_back(draw(t.rank * t.module.in, 1 / std::sqrt(static_cast<double>(t.module.in))));
      weights.b.push_back(draw(t.rank * t.module.out, 0.5 / std::sqrt(static_cast<double>(t.rank))));
    }
    a.flat = a.layout->flatten(weights);
    a.weights = pool->add(a.layout, a.flat.data(), 0);
    pool->pin(std::vector{a.weights});
    a.train = std::make_unique<TrainState>(*ops, a.layout, a.flat.data());
    adapters.push_back(std::move(a));
    return adapters.back();
  }

  std::vector<int32_t> tokens(int n) {
    std::vector<int32_t> ids;
    for (int i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(config().vocab_size)));
    return ids;
  }

  // A training or evaluation example with a target at most rows.
  TestSequence example(Kind kind, int rows, const TestAdapter* a, float dropout = 0, LossKind loss = LossKind::cross_entropy) {
    TestSequence s{.kind = kind, .ids = tokens(rows)};
    if (a) s.weights = a->weights.get();
    if (a && kind == Kind::train) s.train = a->train.get();
    if (kind == Kind::train) s.dropout = dropout;
    s.key = random();
    for (int r = 0; r < rows; ++r) {
      if (r > 0 && random() % 4 == 0) continue;
      LossRow row{.target = tokens(1)[0], .kind = loss, .weight = 0.25f + 0.125f * static_cast<float>(random() % 4)};
      if (loss == LossKind::weighted_logprob && random() % 2) row.weight = -row.weight;
      if (loss == LossKind::importance_sampling || loss == LossKind::ppo) {
        row.old_logprob = -3.6f + 0.1f * static_cast<float>(random() % 8);
        row.advantage = static_cast<float>(random() % 9) / 4.0f - 1.0f;
      }
      s.targets.push_back({r, row});
    }
    return s;
  }

  // Rows of a request that goes through the pages.
  TestSequence request(Kind kind, std::vector<int32_t> ids, int position, std::vector<int32_t> pages, const TestAdapter* a) {
    TestSequence s{.kind = kind, .ids = std::move(ids), .position = position, .pages = std::move(pages)};
    if (a) s.weights = a->weights.get();
    s.sample = true;
    return s;
  }

  // Forward, heads and every layer of backward, in arenas of exactly the announced sizes filled with NaN.
  void run(BatchBuilder& batch, Recompute recompute = Recompute::none) {
    const BatchView& v = batch.view;
    const int64_t rank = std::max(v.groups.max_rank, head_rank(v));
    std::vector<std::byte> saved_memory(model->saved_bytes(v.rows, v.train_rows, rank, recompute) + 64);
    std::vector<std::byte> scratch_memory(model->scratch_bytes(v.rows, v.train_rows, v.head_count, rank, recompute) + 64);
    std::memset(saved_memory.data(), 0xFF, saved_memory.size());
    std::memset(scratch_memory.data(), 0xFF, scratch_memory.size());
    Arena saved_arena = arena_of(saved_memory), scratch = arena_of(scratch_memory);
    Saved saved;
    model->forward(v, kv, v.train_rows > 0 ? &saved : nullptr, saved_arena, scratch, recompute);
    for (int64_t l = config().num_layers - 1; v.train_rows > 0 && l >= v.lowest_layer; --l)
      model->backward_layer(v, saved, l, scratch);
    CHECK_EQ(scratch.used(), size_t{0});
  }

  std::vector<float> gradients(const TestAdapter& a) const { return a.train->read("gradients"); }
  std::vector<std::vector<float>> take_gradients() {
    std::vector<std::vector<float>> all;
    for (TestAdapter& a : adapters) {
      all.push_back(gradients(a));
      a.train->drop_gradients();
    }
    return all;
  }

  std::mt19937_64 random;
  std::unique_ptr<Ops> ops;
  std::shared_ptr<const BaseModel> base;
  std::unique_ptr<Model> model;
  std::unique_ptr<AdapterPool> pool;
  KvCache kv;
  std::deque<TestAdapter> adapters;

 private:
  static int32_t head_rank(const BatchView& v) {
    int32_t rank = 0;
    for (const HeadChunk& chunk : v.chunks) rank = std::max(rank, chunk.groups.max_rank);
    return rank;
  }
  static Arena arena_of(std::vector<std::byte>& memory) {
    const size_t offset = (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    return Arena(memory.data() + offset, memory.size() - 64);
  }
};

template <class S>
ReferenceLora<S> reference_lora(const TestSequence& s, const AdapterLayout* layout, const S* flat) {
  ReferenceLora<S> lora{layout, flat, double{s.dropout}, {}};
  for (size_t i = 0; i < s.ids.size(); ++i) lora.row_keys.push_back(mix_key(s.key, static_cast<uint64_t>(s.position) + i));
  return lora;
}

std::vector<double> widen(const std::vector<float>& v) { return {v.begin(), v.end()}; }

double largest_of(const std::vector<double>& v) {
  double largest = 0;
  for (double x : v) largest = std::max(largest, std::abs(x));
  return largest;
}

double relative_error(const std::vector<double>& got, const std::vector<double>& want, double floor = 1e-30) {
  double error = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (!std::isfinite(got[i])) return INFINITY;
    error = std::max(error, std::abs(got[i] - want[i]));
  }
  return error / std::max(largest_of(want), floor);
}

const TestAdapter* adapter_of(const Setup& t, const TestSequence& s) {
  for (const TestAdapter& a : t.adapters) {
    if (a.weights.get() == s.weights) return &a;
  }
  return nullptr;
}

// Log-probability and loss of every target of training and evaluation rows, in head order, against the reference.
void check_values(const Setup& t, const std::vector<TestSequence>& sequences, const BatchBuilder& batch) {
  const ReferenceModel<double> reference(t.base->weights());
  std::vector<double> want[2], got[2];
  size_t head = 0;
  for (Kind kind : {Kind::train, Kind::eval}) {
    for (const TestSequence& s : sequences) {
      if (s.kind != kind) continue;
      const TestAdapter* a = adapter_of(t, s);
      const std::vector<double> flat = a ? widen(a->flat) : std::vector<double>{};
      const Matrix<double> logits = reference.logits(s.ids, reference_lora(s, a ? a->layout.get() : nullptr, flat.data()));
      for (const auto& [row, loss] : s.targets) {
        const double p = ReferenceModel<double>::logprob(logits[static_cast<size_t>(row)], loss.target);
        want[0].push_back(p);
        want[1].push_back(ReferenceModel<double>::loss(p, loss));
        got[0].push_back(double{batch.logprob[head]});
        got[1].push_back(double{batch.loss[head]});
        ++head;
      }
    }
  }
  for (int i = 0; i < 2; ++i) CHECK(relative_error(got[i], want[i]) < kValueBound);
}

// The exact gradient of the summed losses of `a`'s training sequences, flat.
std::vector<double> reference_gradient(const Setup& t, const std::vector<TestSequence>& sequences, const TestAdapter& a) {
  const ReferenceModel<Dual> reference(t.base->weights());
  std::vector<Dual> flat(a.flat.begin(), a.flat.end());
  std::vector<double> gradient(flat.size(), 0.0);
  std::vector<size_t> places;
  for (size_t m = 0; m < a.layout->targets.size(); ++m) {
    const LoraTarget& target = a.layout->targets[m];
    for (int64_t i = 0; i < target.rank * target.module.in; ++i) places.push_back(static_cast<size_t>(a.layout->a_offset[m] + i));
    for (int64_t i = 0; i < target.rank * target.module.out; ++i) places.push_back(static_cast<size_t>(a.layout->b_offset[m] + i));
  }
  for (size_t first = 0; first < places.size(); first += kLanes) {
    const size_t lanes = std::min<size_t>(kLanes, places.size() - first);
    for (size_t i = 0; i < lanes; ++i) flat[places[first + i]].d[i] = 1;
    for (const TestSequence& s : sequences) {
      if (s.kind != Kind::train || s.weights != a.weights.get()) continue;
      const Matrix<Dual> logits = reference.logits(s.ids, reference_lora(s, a.layout.get(), flat.data()));
      for (const auto& [row, loss] : s.targets) {
        const Dual l =
            ReferenceModel<Dual>::loss(ReferenceModel<Dual>::logprob(logits[static_cast<size_t>(row)], loss.target), loss);
        for (size_t i = 0; i < lanes; ++i) gradient[places[first + i]] += l.d[i];
      }
    }
    for (size_t i = 0; i < lanes; ++i) flat[places[first + i]].d[i] = 0;
  }
  return gradient;
}

// The worst tensor, each on its own scale, so that a small one cannot hide behind a large one.
double gradient_error(const AdapterLayout& layout, const std::vector<float>& got, const std::vector<double>& want) {
  const double floor = std::max(kSmallGradient * largest_of(want), kOrderOne);
  double worst = 0;
  for (size_t m = 0; m < layout.targets.size(); ++m) {
    const LoraTarget& t = layout.targets[m];
    const auto compare = [&](int64_t begin, int64_t n) {
      worst = std::max(worst, relative_error({got.begin() + begin, got.begin() + begin + n},
                                             {want.begin() + begin, want.begin() + begin + n}, floor));
    };
    compare(layout.a_offset[m], t.rank * t.module.in);
    compare(layout.b_offset[m], t.rank * t.module.out);
  }
  return worst;
}

void check_gradients(const Setup& t, const std::vector<TestSequence>& sequences) {
  for (const TestAdapter& a : t.adapters) {
    const std::vector<float> got = t.gradients(a);
    const std::vector<double> want = reference_gradient(t, sequences, a);
    CHECK(gradient_error(*a.layout, got, want) < kGradientBound);
    const bool trained = std::any_of(sequences.begin(), sequences.end(),
                                     [&](const TestSequence& s) { return s.kind == Kind::train && s.weights == a.weights.get(); });
    if (!trained) CHECK(got == std::vector<float>(got.size(), 0.0f));
  }
}

// Three adapters in training (all modules with dropout, a few with another rank each, lm_head with the top layer), with evaluation,
// prompt and decode rows of the same ones, of one that only serves, and of the base. The pages are filled by a first step.
std::vector<TestSequence> mixed_batch(Setup& t) {
  TestAdapter& all = t.adapter({""}, 3);
  TestAdapter& few = t.adapter({"q_proj", "v_proj", "down_proj"}, 1, 1);
  TestAdapter& top = t.adapter({"layers.1", "lm_head"}, 5);
  TestAdapter& serves = t.adapter({"k_proj", "gate_proj"}, 9);

  const std::vector<int32_t> prompt = t.tokens(6), other = t.tokens(5);
  BatchBuilder fill(t.config(),
                    {t.request(Kind::prefill, prompt, 0, {3, 1}, &serves), t.request(Kind::prefill, other, 0, {0, 5}, nullptr)},
                    kPageSize);
  t.run(fill);

  std::vector<TestSequence> s;
  s.push_back(t.example(Kind::train, 7, &all, 0.3f));
  s.push_back(t.example(Kind::train, 1, &all, 0.3f, LossKind::weighted_logprob));
  s.push_back(t.example(Kind::train, 5, &few, 0, LossKind::ppo));
  s.push_back(t.example(Kind::train, 6, &top, 0.5f, LossKind::importance_sampling));
  s.push_back(t.example(Kind::train, 3, &top, 0.5f));
  s.push_back(t.example(Kind::eval, 4, &all));
  s.push_back(t.example(Kind::eval, 5, nullptr));
  s.push_back(t.example(Kind::eval, 3, &serves));
  s.push_back(t.request(Kind::prefill, t.tokens(3), 6, {3, 1, 7}, &serves));
  s.push_back(t.request(Kind::prefill, t.tokens(5), 0, {8, 9}, &top));
  s.push_back(t.request(Kind::decode, t.tokens(1), 5, {0, 5}, nullptr));
  return s;
}

TEST(gradients_in_a_mixed_batch) {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed()));
  for (const Family& family : families()) {
    for (Recompute recompute : {Recompute::none, Recompute::layer}) {
      for (int32_t chunk_rows : {static_cast<int32_t>(kHeadChunk), 4}) {
        Setup t(family);
        const std::vector<TestSequence> sequences = mixed_batch(t);
        BatchBuilder batch(t.config(), sequences, kPageSize, chunk_rows);
        t.run(batch, recompute);
        check_values(t, sequences, batch);
        if (chunk_rows != 4 || recompute == Recompute::none) check_gradients(t, sequences);
      }
    }
  }
}

TEST(gradients_of_every_module_alone) {
  // Backward stops at the lowest adapted module: each one alone, so every stop is tried.
  for (const Family& family : families()) {
    Setup names(family);
    for (const ModuleInfo& module : modules_of(names.config())) {
      for (Recompute recompute : {Recompute::none, Recompute::layer}) {
        Setup t(family, false, static_cast<uint64_t>(module.site * 3 + module.part));
        TestAdapter &a = t.adapter({module.name}, 2), &b = t.adapter({module.name}, 3);
        const std::vector<TestSequence> sequences = {t.example(Kind::train, 5, &a, 0.25f), t.example(Kind::train, 4, &b)};
        BatchBuilder batch(t.config(), sequences, kPageSize);
        CHECK_EQ(batch.view.lowest_layer, module.layer < 0 ? t.config().num_layers : module.layer);
        t.run(batch, recompute);
        check_values(t, sequences, batch);
        check_gradients(t, sequences);
      }
    }
  }
}

TEST(gradients_add) {
  Setup t(families()[0]);
  const std::vector<TestSequence> sequences = mixed_batch(t);
  BatchBuilder batch(t.config(), sequences, kPageSize);
  t.run(batch);
  const auto once = t.take_gradients();
  t.run(batch);
  t.run(batch);
  const auto twice = t.take_gradients();
  for (size_t a = 0; a < once.size(); ++a) {
    const std::vector<double> want = widen(once[a]), got = widen(twice[a]);
    std::vector<double> half;
    for (double g : got) half.push_back(g / 2);
    CHECK(relative_error(half, want) < 1e-6 || t.adapters[a].train->read("gradients") == once[a]);
  }
}

// Bit for bit where the same products run over the same rows: training rows alone, or any batch in deterministic mode.
TEST(recompute_gives_the_same_bits) {
  for (const Family& family : families()) {
    for (bool deterministic : {false, true}) {
      Setup t(family, deterministic);
      std::vector<TestSequence> sequences = mixed_batch(t);
      if (!deterministic) std::erase_if(sequences, [](const TestSequence& s) { return s.kind != Kind::train; });
      BatchBuilder batch(t.config(), sequences, kPageSize);
      t.run(batch, Recompute::none);
      const auto none = t.take_gradients();
      const std::vector<float> logprob = batch.logprob;
      t.run(batch, Recompute::layer);
      CHECK(t.take_gradients() == none);
      CHECK(batch.logprob == logprob);
    }
  }
}

// A training step's values with and without everybody else in the batch.
TEST(co_tenants_change_nothing) {
  for (const Family& family : families()) {
    for (bool deterministic : {false, true}) {
      Setup t(family, deterministic);
      const std::vector<TestSequence> sequences = mixed_batch(t);
      BatchBuilder together(t.config(), sequences, kPageSize);
      t.run(together);
      const auto with = t.take_gradients();
      std::vector<std::vector<float>> alone(with.size());
      for (size_t a = 0; a < with.size(); ++a) {
        std::vector<TestSequence> own = sequences;
        std::erase_if(own,
                      [&](const TestSequence& s) { return s.kind != Kind::train || s.weights != t.adapters[a].weights.get(); });
        if (own.empty()) continue;
        BatchBuilder batch(t.config(), own, kPageSize);
        t.run(batch);
        alone[a] = t.take_gradients()[a];
        if (deterministic) {
          CHECK(alone[a] == with[a]);
        } else {
          CHECK(gradient_error(*t.adapters[a].layout, with[a], widen(alone[a])) < kGradientBound);
        }
      }
      // and evaluation rows
      std::vector<TestSequence> eval = sequences;
      std::erase_if(eval, [](const TestSequence& s) { return s.kind != Kind::eval; });
      BatchBuilder batch(t.config(), eval, kPageSize);
      t.run(batch);
      const size_t first = together.logprob.size() - batch.logprob.size() - 3;  // 3 rows are sampled
      for (size_t i = 0; i < batch.logprob.size(); ++i) {
        if (deterministic) CHECK_EQ(together.logprob[first + i], batch.logprob[i]);
        else CHECK_NEAR(together.logprob[first + i], batch.logprob[i], 1e-5);
      }
    }
  }
}

// One text through the pages, in chunks and then token by token, against packed evaluation of all of it.
TEST(pages_equal_packed_evaluation) {
  for (const Family& family : families()) {
    Setup t(family);
    TestAdapter& a = t.adapter({""}, 4);
    for (const TestAdapter* adapter : {static_cast<const TestAdapter*>(&a), static_cast<const TestAdapter*>(nullptr)}) {
      const std::vector<int32_t> text = t.tokens(14);
      const auto rows = [&](int begin, int n, Kind kind) {
        TestSequence s{
            .kind = kind, .ids = {text.begin() + begin, text.begin() + begin + n}, .position = begin, .pages = {11, 2, 30, 4}};
        if (adapter) s.weights = adapter->weights.get();
        for (int r = 0; r < n && begin + r + 1 < 14; ++r)
          s.targets.push_back({r, {.target = text[static_cast<size_t>(begin + r + 1)]}});
        return s;
      };
      BatchBuilder packed(t.config(), {rows(0, 14, Kind::eval)}, kPageSize);
      t.run(packed);
      std::vector<float> got;
      for (const auto& [begin, n] : std::vector<std::pair<int, int>>{{0, 3}, {3, 6}, {9, 1}, {10, 1}, {11, 1}, {12, 1}}) {
        BatchBuilder step(t.config(), {rows(begin, n, n > 1 ? Kind::prefill : Kind::decode)}, kPageSize);
        t.run(step);
        got.insert(got.end(), step.logprob.begin(), step.logprob.end());
      }
      CHECK_EQ(got.size(), packed.logprob.size());
      CHECK(relative_error(widen(got), widen(packed.logprob)) < kValueBound);
    }
  }
}

TEST(greedy_samples_are_the_reference_argmax) {
  for (const Family& family : families()) {
    Setup t(family);
    TestAdapter& a = t.adapter({""}, 2);
    TestAdapter& head = t.adapter({"lm_head"}, 3);
    const ReferenceModel<double> reference(t.base->weights());
    std::vector<TestSequence> sequences;
    std::vector<const TestAdapter*> owners = {&a, &a, &head, nullptr, &head};
    for (size_t i = 0; i < owners.size(); ++i) {
      const int32_t page = static_cast<int32_t>(2 * i);
      sequences.push_back(t.request(Kind::prefill, t.tokens(3 + static_cast<int>(i)), 0, {page, page + 1}, owners[i]));
      sequences.back().sampling.top_logprobs = 3;
    }
    for (int32_t chunk_rows : {static_cast<int32_t>(kHeadChunk), 2}) {
      BatchBuilder batch(t.config(), sequences, kPageSize, chunk_rows, 3);
      t.run(batch);
      for (size_t i = 0; i < owners.size(); ++i) {
        const std::vector<double> flat = owners[i] ? widen(owners[i]->flat) : std::vector<double>{};
        const auto logits =
            reference
                .logits(sequences[i].ids, reference_lora(sequences[i], owners[i] ? owners[i]->layout.get() : nullptr, flat.data()))
                .back();
        std::vector<int32_t> order(logits.size());
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(),
                  [&](int32_t x, int32_t y) { return logits[static_cast<size_t>(x)] > logits[static_cast<size_t>(y)]; });
        CHECK_EQ(batch.sampled[i], order[0]);
        CHECK_NEAR(batch.logprob[i], ReferenceModel<double>::logprob(logits, order[0]), 2e-5);
        for (size_t n = 0; n < 3; ++n) {
          CHECK_EQ(batch.top_ids[3 * i + n], order[n]);
          CHECK_NEAR(batch.top_logprobs[3 * i + n], ReferenceModel<double>::logprob(logits, order[n]), 2e-5);
        }
      }
    }
  }
}

TEST(the_same_step_twice_gives_the_same_bits) {
  Setup t(families()[2]);
  const std::vector<TestSequence> sequences = mixed_batch(t);
  BatchBuilder first(t.config(), sequences, kPageSize), second(t.config(), sequences, kPageSize);
  t.run(first);
  const auto gradients = t.take_gradients();
  t.run(second);
  CHECK(t.take_gradients() == gradients);
  CHECK(first.logprob == second.logprob && first.loss == second.loss && first.sampled == second.sampled);
}

TEST(bad_batches_are_refused) {
  Setup t(families()[0]);
  TestAdapter& a = t.adapter({"q_proj"}, 2);
  BatchBuilder batch(t.config(), {t.example(Kind::train, 3, &a)}, kPageSize);
  Arena none, scratch;
  CHECK_THROWS(InvalidArgument, "saved", t.model->forward(batch.view, t.kv, nullptr, none, scratch, Recompute::none));
  BatchView wrong = batch.view;
  wrong.packed_rows = 2;
  Saved saved;
  CHECK_THROWS(InvalidArgument, "packed_rows", t.model->forward(wrong, t.kv, &saved, none, scratch, Recompute::none));
  KvCache empty;
  CHECK_THROWS(InvalidArgument, "kv", t.model->forward(batch.view, empty, &saved, none, scratch, Recompute::none));
  CHECK_THROWS(InvalidArgument, "training rows", t.model->backward_layer(batch.view, saved, 1, scratch));
  CHECK_THROWS(InvalidArgument, "layer", t.model->backward_layer(batch.view, saved, 2, scratch));
  std::vector<std::byte> small(1024);
  Arena little(small.data(), small.size());
  CHECK_THROWS(OutOfMemory, "arena", t.model->forward(batch.view, t.kv, &saved, little, scratch, Recompute::none));
}

TEST(kv_cache_sizes) {
  Setup t(families()[2]);
  const size_t page = KvCache::page_bytes(t.config(), DType::f32, kPageSize);
  CHECK_EQ(page, size_t{2 * 2 * 4 * 1 * 6 * 4});  // L, k and v, P, K, D, bytes
  CHECK_EQ(t.kv.storage.bytes(), 64 * page);
  CHECK_EQ(t.kv.layers.size(), size_t{2});
  CHECK_THROWS(InvalidArgument, "power of two", KvCache::make(*t.ops, t.config(), 4, 6));
  CHECK_THROWS(InvalidArgument, "pages", KvCache::make(*t.ops, t.config(), -1, 4));
  CHECK_THROWS(OutOfMemory, "bytes are free", KvCache::make(*t.ops, t.config(), int64_t{1} << 50, 4));
}

}  // namespace
}  // namespace loquetier::test
