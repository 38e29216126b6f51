// The pool's state is a map of resident blocks by offset; free space is what lies between them, so freeing needs no merging. Blocks
// are placed first-fit and slid together when no gap is large enough. Site tables lie in slabs beside the pool's storage and are
// never moved.
#include "adapter/adapter_pool.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_set>

#include "io/safetensors.h"

namespace loquetier {

namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kTablesPerSlab = 16;
size_t align(size_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

struct AdapterPool::State {
  Device& device;
  const DType dtype;
  const size_t capacity;
  Buffer storage;             // blocks
  std::vector<Buffer> slabs;  // tables
  std::vector<LoraSite*> free_tables;
  size_t table_bytes = 0;                    // of one table: the same for every adapter of a model
  std::map<size_t, AdapterWeights*> blocks;  // resident, by offset
  std::unordered_set<AdapterWeights*> live;  // every AdapterWeights there is
  size_t used = 0;
  uint64_t clock = 0;
  int64_t evictions = 0;
  int64_t fetches = 0;
  int64_t prefetches = 0;
  bool closed = false;  // the pool and its device are gone
  std::mutex mutex;

  State(Ops& ops, size_t bytes) : device(ops.device()), dtype(ops.compute_dtype()), capacity(bytes), storage(device, bytes) {}

  size_t pool_bytes(const AdapterWeights& w) const { return w.layout_->pool_bytes(dtype); }
  size_t block_bytes(const AdapterWeights& w) const { return w.layout_->block_bytes(dtype); }
  std::byte* base() const { return static_cast<std::byte*>(storage.data()); }

  // ---- lifetime

  // `self` is the shared_ptr to this state; the deleter holds it. Called without the lock, which the deleter takes.
  static std::shared_ptr<AdapterWeights> make(const std::shared_ptr<State>& self, std::shared_ptr<const AdapterLayout> layout,
                                              int64_t version) {
    auto weights = std::make_unique<AdapterWeights>();
    weights->layout_ = std::move(layout);
    weights->version_ = version;
    weights->host_sites_.resize(static_cast<size_t>(weights->layout_->sites));
    {
      const std::lock_guard lock(self->mutex);
      const size_t bytes = weights->layout_->table_bytes();
      if (self->table_bytes == 0) self->table_bytes = bytes;
      require(bytes == self->table_bytes, "[adapter pool] layout: expected a table of ", self->table_bytes, " bytes, got ", bytes,
              "; one pool holds adapters of one model");
      self->live.insert(weights.get());
    }
    return std::shared_ptr<AdapterWeights>(weights.release(), [self](AdapterWeights* w) { self->destroy(w); });
  }

  void destroy(AdapterWeights* w) {
    {
      const std::lock_guard lock(mutex);
      if (!closed && w->arrives_ > 0) {  // its host block is being read
        device.side_synchronize();
        w->arrives_ = 0;
      }
      if (!closed && w->resident()) detach(*w);
      live.erase(w);
    }
    delete w;
  }

  void close() {
    const std::lock_guard lock(mutex);
    closed = true;
    device.side_synchronize();
    for (AdapterWeights* w : live) {
      w->host_block_ = Buffer();
      w->device_block_ = nullptr;
      w->device_sites_ = nullptr;
    }
    blocks.clear();
    slabs.clear();
    storage = Buffer();
  }

  void check_alive(const AdapterWeights* w) const {
    require(w != nullptr && live.contains(const_cast<AdapterWeights*>(w)),
            "[adapter pool] weights: expected weights of this pool, got ", w ? "others" : "none");
  }

  // ---- the host tier

  void ensure_host(AdapterWeights& w) {
    if (!w.host_block_.data()) w.host_block_ = Buffer(device, block_bytes(w), Buffer::Where::host);
  }

  void write_back(AdapterWeights& w) {
    if (w.host_current_) return;  // so it is while a copy to the device is under way
    ensure_host(w);
    device.copy_to_host(w.host_block_.data(), w.device_block_, block_bytes(w));
    w.host_current_ = true;
  }

  // ---- the side queue

  // Starts the copy of a block that was just attached; the stream does not wait for it yet.
  void fetch(AdapterWeights& w) {
    device.side_copy_to_device(w.device_block_, w.host_block_.data(), block_bytes(w));
    w.arrives_ = device.side_mark();
    ++fetches;
  }
  // From here on the stream may use, move or overwrite the block.
  void await(AdapterWeights& w) {
    device.wait_for_side(w.arrives_);
    w.arrives_ = 0;
  }

  // ---- residency

  void add_slab(size_t tables) {
    const size_t stride = align(table_bytes);
    slabs.emplace_back(device, stride * tables);
    for (size_t i = tables; i-- > 0;) {
      free_tables.push_back(reinterpret_cast<LoraSite*>(static_cast<std::byte*>(slabs.back().data()) + i * stride));
    }
  }

  LoraSite* take_table() {
    if (free_tables.empty()) add_slab(kTablesPerSlab);
    LoraSite* table = free_tables.back();
    free_tables.pop_back();
    return table;
  }

  // Makes `w` resident at `offset`, its block still to be filled; the tables say so in place.
  void attach(AdapterWeights& w, size_t offset) {
    blocks[offset] = &w;
    w.offset_ = offset;
    w.device_block_ = base() + offset;
    const std::vector<LoraSite> table = w.layout_->site_table(w.device_block_, dtype);
    std::copy(table.begin(), table.end(), w.host_sites_.begin());
    device.copy_to_device(w.device_sites_, w.host_sites_.data(), w.layout_->table_bytes());
  }

  void detach(AdapterWeights& w) {
    await(w);  // whoever gets the space next may write to it on the stream
    blocks.erase(w.offset_);
    used -= pool_bytes(w);
    free_tables.push_back(w.device_sites_);
    w.device_block_ = nullptr;
    w.device_sites_ = nullptr;
  }

  // Counts pins up for a scope, or for good with keep(): an exception on the way leaves nothing pinned.
  class Pin {
   public:
    explicit Pin(std::vector<AdapterWeights*> set) : set_(std::move(set)) {
      for (AdapterWeights* w : set_) ++w->pins_;
    }
    ~Pin() {
      for (AdapterWeights* w : set_) --w->pins_;
    }
    Pin(const Pin&) = delete;
    Pin& operator=(const Pin&) = delete;
    void keep() { set_.clear(); }

   private:
    std::vector<AdapterWeights*> set_;
  };

  static constexpr size_t kNowhere = ~size_t{0};

  size_t first_fit(size_t bytes) const {
    size_t begin = 0;
    for (const auto& [offset, w] : blocks) {
      if (offset - begin >= bytes) return begin;
      begin = offset + align(block_bytes(*w));
    }
    return capacity - begin >= bytes ? begin : kNowhere;
  }

  // Slides every block down to the end of the one before it. A block that would overlap its old place goes through the host tier.
  void compact() {
    std::vector<AdapterWeights*> order;
    for (const auto& [offset, w] : blocks) order.push_back(w);
    size_t end = 0;
    for (AdapterWeights* w : order) {
      const size_t bytes = block_bytes(*w), from = w->offset_;
      if (from != end) {
        await(*w);
        if (from - end >= bytes) {
          device.copy_on_device(base() + end, base() + from, bytes);
        } else {
          write_back(*w);
          device.copy_to_device(base() + end, w->host_block_.data(), bytes);
        }
        blocks.erase(from);
        attach(*w, end);
      }
      end += align(bytes);
    }
  }

  // Resident with undefined content. There is room: make_room() was called.
  void allocate(AdapterWeights& w) {
    const size_t bytes = align(block_bytes(w));
    size_t offset = first_fit(bytes);
    if (offset == kNowhere) {
      compact();
      offset = first_fit(bytes);
      require<OutOfMemory>(offset != kNowhere, "[adapter pool] expected room for ", bytes, " bytes, ", capacity - used, " of ",
                           capacity, " are free");
    }
    w.device_sites_ = take_table();
    used += pool_bytes(w);
    attach(w, offset);
  }

  // Evicts idle blocks, least recently used first, until `bytes` more fit. False, with nothing evicted, when they cannot.
  // `current_only`: leaves those alone whose newest values would have to be copied to the host first.
  bool make_room(size_t bytes, bool current_only = false) {
    if (used + bytes <= capacity) return true;
    std::vector<AdapterWeights*> idle;
    size_t idle_bytes = 0;
    for (const auto& [offset, w] : blocks) {
      if (w->pins_ > 0 || (current_only && !w->host_current_)) continue;
      idle.push_back(w);
      idle_bytes += pool_bytes(*w);
    }
    if (used - idle_bytes + bytes > capacity) return false;
    std::sort(idle.begin(), idle.end(), [](const auto* a, const auto* b) { return a->last_used_ < b->last_used_; });
    for (size_t i = 0; used + bytes > capacity; ++i) {
      write_back(*idle[i]);
      detach(*idle[i]);
      ++evictions;
    }
    return true;
  }
};

AdapterPool::AdapterPool(Ops& ops, size_t bytes) : state_(std::make_shared<State>(ops, bytes)) {}
AdapterPool::~AdapterPool() { state_->close(); }

void AdapterPool::reserve_tables(size_t count, size_t table_bytes) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  if (s.table_bytes == 0) s.table_bytes = table_bytes;
  if (s.free_tables.size() < count) s.add_slab(count - s.free_tables.size());
}

std::shared_ptr<AdapterWeights> AdapterPool::add(std::shared_ptr<const AdapterLayout> layout, const float* flat, int64_t version) {
  State& s = *state_;
  require(layout != nullptr && flat != nullptr, "[adapter pool] add: expected a layout and values, got none");
  const size_t bytes = layout->pool_bytes(s.dtype);
  require<OutOfMemory>(bytes <= s.capacity, "[adapter pool] expected an adapter of at most ", s.capacity, " bytes (the pool), got ",
                       bytes, "; raise adapter_pool_bytes or lower the rank");
  std::shared_ptr<AdapterWeights> weights = State::make(state_, std::move(layout), version);
  const std::lock_guard lock(s.mutex);
  s.ensure_host(*weights);
  convert_elements(flat, DType::f32, weights->host_block_.data(), s.dtype, weights->layout_->elements);
  weights->host_current_ = true;
  return weights;
}

std::shared_ptr<AdapterWeights> AdapterPool::copy(const std::shared_ptr<AdapterWeights>& source, int64_t version) {
  State& s = *state_;
  {
    const std::lock_guard lock(s.mutex);
    s.check_alive(source.get());
  }
  std::shared_ptr<AdapterWeights> weights = State::make(state_, source->layout_, version);
  const std::lock_guard lock(s.mutex);
  const size_t bytes = s.block_bytes(*source);
  if (source->resident()) {
    const State::Pin pin({source.get()});
    if (s.make_room(s.pool_bytes(*weights)) && s.first_fit(align(bytes)) != State::kNowhere) {
      s.allocate(*weights);
      s.await(*source);
      s.device.copy_on_device(weights->device_block_, source->device_block_, bytes);
      weights->last_used_ = ++s.clock;
      return weights;
    }
  }
  s.ensure_host(*weights);
  if (source->host_current_) std::memcpy(weights->host_block_.data(), source->host_block_.data(), bytes);
  else s.device.copy_to_host(weights->host_block_.data(), source->device_block_, bytes);
  weights->host_current_ = true;
  return weights;
}

void AdapterPool::pin(std::span<const std::shared_ptr<AdapterWeights>> set) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  std::vector<AdapterWeights*> pointers;
  for (const auto& w : set) {
    s.check_alive(w.get());
    pointers.push_back(w.get());
  }
  State::Pin pin(pointers);
  std::vector<AdapterWeights*> missing;
  size_t bytes = 0;
  for (AdapterWeights* w : pointers) {
    if (w->resident() || std::find(missing.begin(), missing.end(), w) != missing.end()) continue;
    missing.push_back(w);
    bytes += s.pool_bytes(*w);
  }
  const bool fits = s.make_room(bytes);
  if (!fits) {
    size_t pinned = 0;
    for (const auto& [offset, w] : s.blocks) pinned += w->pins_ > 0 ? s.pool_bytes(*w) : 0;
    throw OutOfMemory(concat("[adapter pool] expected adapters in use of at most ", s.capacity, " bytes (the pool), got ",
                             bytes + pinned, " (", pinned, " resident, ", bytes,
                             " to fetch); raise adapter_pool_bytes or use fewer adapters at once"));
  }
  for (AdapterWeights* w : missing) s.allocate(*w);               // all of them: compaction moves what lies in the way
  if (!missing.empty()) s.device.side_follow(s.device.record());  // what is to be overwritten is out of use
  for (AdapterWeights* w : missing) s.fetch(*w);
  for (AdapterWeights* w : pointers) {
    s.await(*w);
    w->last_used_ = ++s.clock;
  }
  pin.keep();
}

int64_t AdapterPool::prefetch(std::span<const std::shared_ptr<AdapterWeights>> next, uint64_t behind) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  std::vector<AdapterWeights*> pointers;
  for (const auto& w : next) {
    s.check_alive(w.get());
    pointers.push_back(w.get());
  }
  const State::Pin pin(pointers);  // none makes room for another
  int64_t started = 0;
  for (AdapterWeights* w : pointers) {
    if (w->resident()) continue;
    if (s.free_tables.empty() || !s.make_room(s.pool_bytes(*w), true)) break;
    if (s.first_fit(align(s.block_bytes(*w))) == State::kNowhere) break;  // moving blocks about is for when there is no other way
    s.allocate(*w);
    if (started == 0) s.device.side_follow(behind);
    s.fetch(*w);
    w->last_used_ = ++s.clock;
    ++started;
  }
  s.prefetches += started;
  return started;
}

void AdapterPool::unpin(std::span<const std::shared_ptr<AdapterWeights>> set) {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  for (const auto& w : set) s.check_alive(w.get());
  for (const auto& w : set) {
    require(w->pins_ > 0, "[adapter pool] unpin: expected weights that are pinned, got an idle version ", w->version_);
    --w->pins_;
  }
}

void AdapterPool::mark_updated(AdapterWeights& weights, int64_t version) {
  const std::lock_guard lock(state_->mutex);
  state_->check_alive(&weights);
  require(weights.resident(), "[adapter pool] mark_updated: expected resident weights, got version ", weights.version_,
          " in the host tier");
  weights.host_current_ = false;
  weights.version_ = version;
}

std::vector<float> AdapterPool::read(const AdapterWeights& weights) const {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  s.check_alive(&weights);
  std::vector<float> values(static_cast<size_t>(weights.layout_->elements));
  std::vector<std::byte> bytes;
  const void* source = weights.host_block_.data();
  if (!weights.host_current_) {
    bytes.resize(s.block_bytes(weights));
    s.device.copy_to_host(bytes.data(), weights.device_block_, bytes.size());
    source = bytes.data();
  }
  convert_elements(source, s.dtype, values.data(), DType::f32, weights.layout_->elements);
  return values;
}

size_t AdapterPool::tables_bytes(size_t count, size_t table_bytes) { return count * align(table_bytes); }
size_t AdapterPool::tables_bytes() const {
  const std::lock_guard lock(state_->mutex);
  size_t bytes = 0;
  for (const Buffer& slab : state_->slabs) bytes += slab.bytes();
  return bytes;
}

size_t AdapterPool::capacity() const { return state_->capacity; }
size_t AdapterPool::used() const {
  const std::lock_guard lock(state_->mutex);
  return state_->used;
}
int64_t AdapterPool::resident_count() const {
  const std::lock_guard lock(state_->mutex);
  return std::ssize(state_->blocks);
}
int64_t AdapterPool::evictions() const {
  const std::lock_guard lock(state_->mutex);
  return state_->evictions;
}
int64_t AdapterPool::fetches() const {
  const std::lock_guard lock(state_->mutex);
  return state_->fetches;
}
int64_t AdapterPool::prefetches() const {
  const std::lock_guard lock(state_->mutex);
  return state_->prefetches;
}

}  // namespace loquetier
