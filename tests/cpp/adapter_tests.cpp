// Adapters: the flat layout, training state, and the pool's promises under random use: bytes are accounted for, pinned weights stay
// resident, the least recently used idle ones go first, content survives eviction, fetching and moving, and what fits by its bytes
// always fits.
#include <algorithm>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "adapter/adapter_pool.h"
#include "adapter/train_state.h"
#include "check.h"
#include "fake_device.h"
#include "io/safetensors.h"

namespace loquetier::test {
namespace {

uint64_t seed() { return std::stoull(option("--seed", "1")); }

ModelConfig tiny_config() {
  ModelConfig config;
  config.family = "llama";
  config.vocab_size = 40;
  config.hidden_size = 24;
  config.intermediate_size = 56;
  config.num_layers = 3;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_size = 4;
  config.max_positions = 64;
  return config;
}

LoraTarget target(const ModuleInfo& module, int rank) { return {module, rank, 2.0 * rank, 0.5f * static_cast<float>(rank)}; }

// Every module with probability 1/2 (at least one), each with a rank of its own.
std::vector<LoraTarget> random_targets(std::mt19937_64& random, int max_rank) {
  const std::vector<ModuleInfo> modules = modules_of(tiny_config());
  std::vector<LoraTarget> targets;
  while (targets.empty()) {
    for (const ModuleInfo& module : modules) {
      if (random() % 2) targets.push_back(target(module, static_cast<int>(1 + random() % static_cast<uint64_t>(max_rank))));
    }
  }
  return targets;
}

std::shared_ptr<const AdapterLayout> random_layout(std::mt19937_64& random, int max_rank) {
  return std::make_shared<const AdapterLayout>(AdapterLayout::make(random_targets(random, max_rank), tiny_config()));
}

// Values that bf16 holds exactly, so that what comes back is what went in. Padding zero.
std::vector<float> random_flat(const AdapterLayout& layout, std::mt19937_64& random) {
  LoraWeights weights;
  for (const LoraTarget& t : layout.targets) {
    const auto draw = [&](int64_t n) {
      std::vector<float> v(static_cast<size_t>(n));
      for (float& x : v) x = static_cast<float>(static_cast<int64_t>(random() % 255) - 127) / 64.0f;
      return v;
    };
    weights.a.push_back(draw(t.rank * t.module.in));
    weights.b.push_back(draw(t.rank * t.module.out));
  }
  return layout.flatten(weights);
}

TEST(layout_places_every_tensor) {
  std::mt19937_64 random(seed());
  for (int trial = 0; trial < 200; ++trial) {
    const auto layout = random_layout(random, 9);
    int64_t end = 0, parameters = 0, lowest = 3;
    int32_t site = -1, site_rank = 0, max_rank = 0;
    bool lm_head = false;
    for (size_t i = 0; i < layout->targets.size(); ++i) {
      const LoraTarget& t = layout->targets[i];
      const bool same = t.module.site == site;
      if (same) CHECK_EQ(layout->a_offset[i], end);  // adjacent to the part before it
      else CHECK(layout->a_offset[i] >= end && layout->a_offset[i] - end < 64 && layout->a_offset[i] % 64 == 0);
      end = layout->a_offset[i] + t.rank * t.module.in;
      site_rank = same ? site_rank + t.rank : t.rank;
      max_rank = std::max(max_rank, site_rank);
      site = t.module.site;
      parameters += t.rank * (t.module.in + t.module.out);
      if (t.module.layer < 0) lm_head = true;
      else lowest = std::min(lowest, t.module.layer);
    }
    CHECK(layout->a_elements >= end && layout->a_elements - end < 64 && layout->a_elements % 64 == 0);
    end = layout->a_elements;
    for (size_t i = 0; i < layout->targets.size(); ++i) {
      CHECK(layout->b_offset[i] >= end && layout->b_offset[i] - end < 64 && layout->b_offset[i] % 64 == 0);
      end = layout->b_offset[i] + layout->targets[i].rank * layout->targets[i].module.out;
    }
    CHECK(layout->elements >= end && layout->elements - end < 64 && layout->elements % 64 == 0);
    CHECK_EQ(layout->parameters(), parameters);
    CHECK_EQ(layout->max_rank, max_rank);
    CHECK_EQ(layout->lowest_layer, lowest);
    CHECK_EQ(layout->lm_head, lm_head);
    CHECK_EQ(layout->sites, 13);

    const std::vector<float> flat = random_flat(*layout, random);
    CHECK(layout->flatten(layout->unflatten(flat.data())) == flat);
    const std::vector<LoraSite> sites = layout->site_table(flat.data(), DType::f32);
    std::vector<float> gradients(flat.size());
    const std::vector<LoraGradSite> grads = layout->grad_table(gradients.data());
    int64_t adapted = 0;
    for (size_t s = 0; s < sites.size(); ++s) {
      for (int p = 0; p < kMaxParts; ++p) {
        CHECK_EQ(sites[s].part[p].rank > 0, grads[s].part[p].da != nullptr);
        if (sites[s].part[p].rank == 0) {
          CHECK(sites[s].part[p].a == nullptr && grads[s].part[p].db == nullptr);
          continue;
        }
        const size_t i = static_cast<size_t>(adapted++);
        CHECK(sites[s].part[p].a == flat.data() + layout->a_offset[i] && sites[s].part[p].b == flat.data() + layout->b_offset[i]);
        CHECK(grads[s].part[p].da == gradients.data() + layout->a_offset[i] &&
              grads[s].part[p].db == gradients.data() + layout->b_offset[i]);
        CHECK_EQ(sites[s].part[p].rank, layout->targets[i].rank);
        CHECK_EQ(sites[s].part[p].scale, layout->targets[i].scale);
      }
    }
    CHECK_EQ(adapted, std::ssize(layout->targets));
  }
}

TEST(layout_refuses_bad_input) {
  const std::vector<ModuleInfo> modules = modules_of(tiny_config());
  CHECK_THROWS(InvalidArgument, "at least one", AdapterLayout::make({}, tiny_config()));
  CHECK_THROWS(InvalidArgument, "order", AdapterLayout::make({target(modules[1], 2), target(modules[0], 2)}, tiny_config()));
  CHECK_THROWS(InvalidArgument, "order", AdapterLayout::make({target(modules[0], 2), target(modules[0], 2)}, tiny_config()));
  CHECK_THROWS(InvalidArgument, "rank 0", AdapterLayout::make({target(modules[0], 0)}, tiny_config()));
  const AdapterLayout layout = AdapterLayout::make({target(modules[0], 2)}, tiny_config());
  CHECK_THROWS(InvalidArgument, "expected 1 pairs", layout.flatten({}));
  CHECK_THROWS(InvalidArgument, "lora_A", layout.flatten({{std::vector<float>(47)}, {std::vector<float>(48)}}));
  CHECK_THROWS(InvalidArgument, "lora_B", layout.flatten({{std::vector<float>(48)}, {std::vector<float>(49)}}));
}

TEST(train_state_reads_back_and_restores) {
  std::mt19937_64 random(seed());
  FakeDevice device;
  FakeOps ops(device, DType::bf16);
  const auto layout = random_layout(random, 5);
  const std::vector<float> master = random_flat(*layout, random), zeros(master.size(), 0.0f);
  TrainState state(ops, layout, master.data());
  CHECK(state.read("master") == master && state.read("gradients") == zeros && state.read("exp_avg") == zeros &&
        state.read("exp_avg_sq") == zeros);
  CHECK(state.bytes() >= 4 * master.size() * sizeof(float));
  CHECK(!state.has_gradients);
  CHECK_THROWS(InvalidArgument, "exp_avg_sq", state.read("momentum"));

  std::vector<std::byte> table(static_cast<size_t>(layout->sites) * sizeof(LoraGradSite));
  device.copy_to_host(table.data(), state.device_grads(), table.size());
  CHECK(std::memcmp(table.data(), state.host_grads(), table.size()) == 0);

  std::vector<AdamTensor> tensors;
  std::vector<AdamJob> jobs(2);
  AdamW options{.lr = 0.5, .betas = {0.5, 0.75}, .weight_decay = 0.1, .max_grad_norm = 2.0, .loraplus_lr_ratio = 4};
  std::vector<uint16_t> block(master.size());
  state.append_update(options, block.data(), tensors, jobs);
  CHECK_EQ(jobs.size(), size_t{3});
  CHECK_EQ(jobs[2].bias_correction1, 0.5f);
  CHECK_EQ(jobs[2].bias_correction2, 0.25f);
  CHECK_EQ(jobs[2].max_grad_norm, 2.0f);
  CHECK_EQ(tensors.size(), size_t{2});
  CHECK_EQ(tensors[0].lr, 0.5f);
  CHECK_EQ(tensors[1].lr, 2.0f);
  CHECK_EQ(tensors[0].job, 2);
  CHECK_EQ(tensors[0].n + tensors[1].n, layout->elements);
  CHECK(tensors[1].master == tensors[0].master + layout->a_elements && tensors[1].grad == tensors[0].grad + layout->a_elements);
  CHECK(tensors[0].weight == block.data() && tensors[1].weight == block.data() + layout->a_elements);
  CHECK(tensors[0].grad + layout->a_offset[0] ==
        state.host_grads()[layout->targets[0].module.site].part[layout->targets[0].module.part].da);
  state.applied();
  CHECK_EQ(state.optimizer_steps(), 1);
  jobs.clear();
  state.append_update(options, block.data(), tensors, jobs);
  CHECK_EQ(jobs[0].bias_correction1, 0.75f);
  CHECK_THROWS(InvalidArgument, "weight_block", state.append_update(options, nullptr, tensors, jobs));

  const std::vector<float> m = random_flat(*layout, random), v = random_flat(*layout, random), g = random_flat(*layout, random);
  state.restore(master.data(), m.data(), v.data(), g.data(), 7);
  CHECK(state.read("exp_avg") == m && state.read("exp_avg_sq") == v && state.read("gradients") == g && state.has_gradients);
  CHECK_EQ(state.optimizer_steps(), 7);
  state.drop_gradients();
  CHECK(state.read("gradients") == zeros && !state.has_gradients && state.read("exp_avg") == m);
}

// What the pool should hold, kept beside it.
struct Tracked {
  std::shared_ptr<AdapterWeights> weights;
  std::vector<float> values;
  int pins = 0;
  uint64_t last_used = 0;
};

class PoolCheck {
 public:
  PoolCheck(DType dtype, size_t capacity, uint64_t seed)
      : random(seed), dtype_(dtype), ops_(device_, dtype), pool(std::make_unique<AdapterPool>(ops_, capacity)) {}

  size_t bytes(const Tracked& t) const { return t.weights->layout().pool_bytes(dtype_); }

  void add(int max_rank) {
    const auto layout = random_layout(random, max_rank);
    std::vector<float> flat = random_flat(*layout, random);
    if (layout->pool_bytes(dtype_) > pool->capacity()) {
      CHECK_THROWS(OutOfMemory, "adapter_pool_bytes", pool->add(layout, flat.data(), 0));
      return;
    }
    all.push_back({pool->add(layout, flat.data(), 0), flat});
  }

  // Pins a random set; all of it is resident afterwards exactly when its bytes and those already pinned fit.
  void pin() {
    std::vector<size_t> chosen;
    for (size_t i = 0; i < all.size(); ++i) {
      if (random() % 4 == 0) chosen.push_back(i);
    }
    std::shuffle(chosen.begin(), chosen.end(), random);
    std::vector<std::shared_ptr<AdapterWeights>> set;
    size_t needed = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const bool wanted = std::find(chosen.begin(), chosen.end(), i) != chosen.end();
      if (wanted || all[i].pins > 0) needed += bytes(all[i]);
    }
    for (size_t i : chosen) set.push_back(all[i].weights);
    if (!set.empty() && random() % 4 == 0) {  // the same weights twice in one set count twice
      set.push_back(set[0]);
      chosen.push_back(chosen[0]);
    }
    std::vector<bool> before;
    for (const Tracked& t : all) before.push_back(t.weights->resident());
    if (needed > pool->capacity()) {
      CHECK_THROWS(OutOfMemory, "at most", pool->pin(set));
      for (size_t i = 0; i < all.size(); ++i) CHECK_EQ(all[i].weights->resident(), before[i]);
      return;
    }
    pool->pin(set);
    uint64_t newest_evicted = 0, oldest_kept = ~uint64_t{0};
    for (size_t i = 0; i < all.size(); ++i) {
      const bool wanted = std::find(chosen.begin(), chosen.end(), i) != chosen.end();
      if (wanted || all[i].pins > 0) CHECK(all[i].weights->resident());
      else if (before[i] && !all[i].weights->resident()) newest_evicted = std::max(newest_evicted, all[i].last_used);
      else if (before[i]) oldest_kept = std::min(oldest_kept, all[i].last_used);
    }
    CHECK(newest_evicted < oldest_kept);
    for (size_t i : chosen) {
      ++all[i].pins;
      all[i].last_used = ++clock_;
    }
    if (!set.empty()) held_.push_back({set, chosen});
    for (size_t i : chosen) {  // the stream finds the values there, however late the side queue is
      std::vector<std::byte> got(all[i].weights->layout().block_bytes(dtype_)), want(got.size());
      device_.copy_to_host(got.data(), all[i].weights->device_block(), got.size());
      convert_elements(all[i].values.data(), DType::f32, want.data(), dtype_, std::ssize(all[i].values));
      CHECK(got == want);
    }
  }

  // Starts what fits beside the pinned, in order, and evicts only what is idle and needs no copy back.
  void prefetch() {
    std::vector<std::shared_ptr<AdapterWeights>> next;
    std::vector<size_t> chosen;
    for (size_t i = 0; i < all.size(); ++i) {
      if (random() % 5 == 0) chosen.push_back(i);
    }
    std::shuffle(chosen.begin(), chosen.end(), random);
    for (size_t i : chosen) next.push_back(all[i].weights);
    std::vector<bool> before;
    for (const Tracked& t : all) before.push_back(t.weights->resident());
    const int64_t downloads = device_.downloads, copies = device_.side_copies, moves = device_.moves;
    const int64_t started = pool->prefetch(next, device_.record());
    CHECK_EQ(device_.downloads, downloads);
    CHECK_EQ(device_.moves, moves);
    CHECK_EQ(device_.side_copies, copies + started);
    int64_t fetched = 0;
    bool stopped = false;
    for (size_t i : chosen) {
      CHECK(!before[i] || all[i].weights->resident());
      if (before[i]) continue;
      if (all[i].weights->resident()) {
        CHECK(!stopped);
        ++fetched;
        all[i].last_used = ++clock_;
      } else {
        stopped = true;
      }
    }
    CHECK_EQ(fetched, started);
    prefetched += started;
  }

  void unpin() {
    if (held_.empty()) return;
    const size_t i = random() % held_.size();
    pool->unpin(held_[i].first);
    for (const auto& w : held_[i].first) {
      for (Tracked& t : all) t.pins -= t.weights == w;
    }
    held_.erase(held_.begin() + static_cast<int64_t>(i));
  }

  // As the optimizer does: new values in the device block of a pinned version.
  void update() {
    for (Tracked& t : all) {
      if (t.pins == 0 || random() % 4) continue;
      t.values = random_flat(t.weights->layout(), random);
      std::vector<std::byte> block(t.weights->layout().block_bytes(dtype_));
      convert_elements(t.values.data(), DType::f32, block.data(), dtype_, std::ssize(t.values));
      device_.copy_to_device(t.weights->device_block(), block.data(), block.size());
      const int64_t version = t.weights->version() + 1;
      pool->mark_updated(*t.weights, version);
      CHECK_EQ(t.weights->version(), version);
    }
  }

  void copy() {
    if (all.empty()) return;
    const Tracked& source = all[random() % all.size()];
    const bool was_resident = source.weights->resident();
    std::vector<const void*> places;
    for (const Tracked& other : all) places.push_back(other.pins > 0 ? other.weights->device_block() : nullptr);
    Tracked t{pool->copy(source.weights, 77), source.values, 0, 0};
    for (size_t i = 0; i < all.size(); ++i) CHECK(places[i] == nullptr || places[i] == all[i].weights->device_block());
    CHECK_EQ(t.weights->version(), 77);
    CHECK_EQ(source.weights->resident(), was_resident);
    if (!was_resident) CHECK(!t.weights->resident());
    if (t.weights->resident()) t.last_used = ++clock_;
    all.push_back(std::move(t));
  }

  void drop() {
    if (all.empty()) return;
    const size_t i = random() % all.size();
    if (all[i].pins > 0) return;
    Tracked gone = std::move(all[i]);
    all.erase(all.begin() + static_cast<int64_t>(i));
    if (random() % 2) std::thread([w = std::move(gone.weights)]() mutable { w.reset(); }).join();
  }

  void check() {
    size_t used = 0;
    int64_t resident = 0;
    std::vector<std::pair<const std::byte*, size_t>> blocks;
    for (const Tracked& t : all) {
      if (t.pins > 0) CHECK(t.weights->resident());
      if (!t.weights->resident()) continue;
      ++resident;
      used += bytes(t);
      const AdapterLayout& layout = t.weights->layout();
      const std::vector<LoraSite> expected = layout.site_table(t.weights->device_block(), dtype_);
      std::vector<LoraSite> on_device(expected.size());
      device_.copy_to_host(on_device.data(), t.weights->device_sites(), layout.table_bytes());
      bool same = true;
      for (size_t s = 0; s < expected.size(); ++s) {
        for (int p = 0; p < kMaxParts; ++p) {
          for (const LoraPart& got : {on_device[s].part[p], t.weights->host_sites()[s].part[p]}) {
            const LoraPart& want = expected[s].part[p];
            same &= got.a == want.a && got.b == want.b && got.rank == want.rank && got.scale == want.scale;
          }
        }
      }
      CHECK(same);
      blocks.push_back({static_cast<const std::byte*>(t.weights->device_block()), layout.block_bytes(dtype_)});
    }
    CHECK_EQ(pool->used(), used);
    CHECK(used <= pool->capacity());
    CHECK_EQ(pool->resident_count(), resident);
    std::sort(blocks.begin(), blocks.end());
    for (size_t i = 1; i < blocks.size(); ++i) CHECK(blocks[i - 1].first + blocks[i - 1].second <= blocks[i].first);
    for (const Tracked& t : all) {
      if (random() % 8 == 0) CHECK(pool->read(*t.weights) == t.values);
    }
  }

  void check_all_values() {
    for (const Tracked& t : all) CHECK(pool->read(*t.weights) == t.values);
  }
  FakeDevice& device() { return device_; }

  int64_t prefetched = 0;
  std::mt19937_64 random;

 private:
  DType dtype_;
  FakeDevice device_;
  FakeOps ops_;
  uint64_t clock_ = 0;
  std::vector<std::pair<std::vector<std::shared_ptr<AdapterWeights>>, std::vector<size_t>>> held_;

 public:
  std::unique_ptr<AdapterPool> pool;
  std::vector<Tracked> all;
};

void random_use(DType dtype, size_t capacity, uint64_t seed, int steps) {
  PoolCheck t(dtype, capacity, seed);
  for (int step = 0; step < steps; ++step) {
    switch (t.random() % 14) {
      case 0:
      case 1:
        if (t.all.size() < 40) t.add(12);
        break;
      case 2:
        t.drop();
        break;
      case 3:
        if (t.all.size() < 40) t.copy();
        break;
      case 4:
      case 5:
      case 6:
        t.pin();
        break;
      case 7:
      case 8:
      case 9:
        t.unpin();
        break;
      case 10:
      case 11:
        t.prefetch();
        break;
      default:
        t.update();
        break;
    }
    t.check();
  }
  t.check_all_values();
  CHECK(t.pool->evictions() > 0);
  CHECK(t.pool->fetches() > t.pool->evictions() / 2);
  CHECK(t.device().moves > 0);
  CHECK(t.prefetched > 20);
  CHECK_EQ(t.pool->prefetches(), t.prefetched);
  t.all.clear();
}

TEST(pool_keeps_its_promises_bf16) {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed()));
  for (uint64_t i = 0; i < 6; ++i) random_use(DType::bf16, 60000 + 17 * i, seed() + i, 1500);
}
TEST(pool_keeps_its_promises_f32) {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed()));
  for (uint64_t i = 0; i < 6; ++i) random_use(DType::f32, 100000 + 100 * i, seed() + 100 + i, 1500);
}

TEST(pool_moves_pinned_weights_when_it_must) {
  // Three adapters fill the pool; the middle one stays pinned, the others leave; one as large as both of them must fit beside it.
  const std::vector<ModuleInfo> modules = modules_of(tiny_config());
  FakeDevice device;
  FakeOps ops(device, DType::f32);
  const auto small = std::make_shared<const AdapterLayout>(AdapterLayout::make({target(modules[0], 16)}, tiny_config()));
  const auto large = std::make_shared<const AdapterLayout>(AdapterLayout::make({target(modules[0], 32)}, tiny_config()));
  std::mt19937_64 random(seed());
  AdapterPool pool(ops, 3 * small->pool_bytes(DType::f32));
  std::vector<std::shared_ptr<AdapterWeights>> three;
  std::vector<std::vector<float>> values;
  for (int i = 0; i < 3; ++i) {
    values.push_back(random_flat(*small, random));
    three.push_back(pool.add(small, values.back().data(), 0));
  }
  pool.pin(three);
  const LoraSite *device_sites = three[1]->device_sites(), *host_sites = three[1]->host_sites();
  pool.unpin(std::vector{three[0], three[2]});
  const std::vector<float> value = random_flat(*large, random);
  const std::vector<std::shared_ptr<AdapterWeights>> one = {pool.add(large, value.data(), 0)};
  CHECK(large->pool_bytes(DType::f32) <= 2 * small->pool_bytes(DType::f32));
  pool.pin(one);
  CHECK(one[0]->resident() && three[1]->resident() && !three[0]->resident() && !three[2]->resident());
  CHECK(three[1]->device_sites() == device_sites && three[1]->host_sites() == host_sites);
  CHECK(host_sites[0].part[0].a == three[1]->device_block());
  CHECK(pool.read(*three[1]) == values[1] && pool.read(*three[0]) == values[0] && pool.read(*one[0]) == value);
}

TEST(pool_refuses_misuse) {
  std::mt19937_64 random(seed());
  FakeDevice device;
  FakeOps ops(device, DType::f32);
  AdapterPool pool(ops, 1 << 20), other(ops, 1 << 20);
  const auto layout = random_layout(random, 2);
  const std::vector<float> flat = random_flat(*layout, random);
  const std::vector<std::shared_ptr<AdapterWeights>> mine = {pool.add(layout, flat.data(), 3)}, nothing = {nullptr};
  CHECK_EQ(mine[0]->version(), 3);
  CHECK_THROWS(InvalidArgument, "of this pool", other.pin(mine));
  CHECK_THROWS(InvalidArgument, "got none", pool.pin(nothing));
  CHECK_THROWS(InvalidArgument, "pinned", pool.unpin(mine));
  CHECK_THROWS(InvalidArgument, "resident", pool.mark_updated(*mine[0], 4));
  CHECK_EQ(pool.used(), size_t{0});
  pool.pin(mine);
  pool.unpin(mine);
  CHECK_EQ(pool.used(), layout->pool_bytes(DType::f32));
}

TEST(weights_may_outlive_the_pool) {
  std::mt19937_64 random(seed());
  std::shared_ptr<AdapterWeights> resident, idle;
  {
    FakeDevice device;
    FakeOps ops(device, DType::f32);
    {
      AdapterPool pool(ops, 1 << 20);
      const auto layout = random_layout(random, 2);
      const std::vector<float> flat = random_flat(*layout, random);
      resident = pool.add(layout, flat.data(), 0);
      idle = pool.add(layout, flat.data(), 0);
      pool.pin(std::vector{resident});
    }
    CHECK_EQ(device.allocations(), size_t{0});
  }
  CHECK(!resident->resident());
  resident.reset();
  idle.reset();
}

}  // namespace
}  // namespace loquetier::test
