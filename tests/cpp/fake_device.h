// A device that is not the host's memory, for tests of everything that only moves bytes: it checks that each copy stays inside one
// live allocation and does not overlap itself, poisons what it hands out and takes back, and refuses allocations on demand. When it
// is lazy it is as slow as a device may be: work is done when somebody waits for it, with what host memory then holds. FakeOps is a
// backend of such a device whose computations throw.
#pragma once

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops/ops.h"

namespace loquetier::test {

class FakeDevice : public Device {
 public:
  explicit FakeDevice(size_t capacity = ~size_t{0} >> 1) : capacity_(capacity) {}
  ~FakeDevice() override {
    for (auto& [data, block] : blocks_) std::free(data);
  }

  std::string name() const override { return "fake:0"; }
  void* allocate(size_t bytes) override { return take(bytes, true); }
  void release(void* data) noexcept override {
    synchronize();
    give(data);
  }
  void* allocate_host(size_t bytes) override { return take(bytes, false); }
  void release_host(void* data) noexcept override {
    synchronize();
    give(data);
  }
  void copy_to_device(void* dst, const void* host, size_t bytes) override {
    inside(dst, bytes, true);
    ++uploads;
    in_order([=] { std::memcpy(dst, host, bytes); });
  }
  void copy_to_host(void* host, const void* src, size_t bytes) override {
    start_copy_to_host(host, src, bytes);
    synchronize();
  }
  void start_copy_to_host(void* host, const void* src, size_t bytes) override {
    inside(src, bytes, true);
    ++downloads;
    in_order([=] { std::memcpy(host, src, bytes); });
  }
  void copy_on_device(void* dst, const void* src, size_t bytes) override {
    inside(dst, bytes, true);
    inside(src, bytes, true);
    const auto d = reinterpret_cast<uintptr_t>(dst), s = reinterpret_cast<uintptr_t>(src);
    if (d < s + bytes && s < d + bytes) throw std::logic_error("copy_on_device: source and destination overlap");
    ++moves;
    in_order([=] { std::memcpy(dst, src, bytes); });
  }

  // Work on the stream. Lazy: done at the wait for a mark behind it.
  bool lazy = false;
  std::vector<std::function<void()>>* recording = nullptr;  // where work goes instead of being done
  void in_order(std::function<void()> work) {
    if (recording) recording->push_back(std::move(work));
    else if (!lazy) work();
    else queue_.push_back(std::move(work));
  }
  uint64_t record() override {
    if (lazy) queue_.push_back([this, mark = last_recorded_ + 1] { reached_ = mark; });
    else reached_ = last_recorded_ + 1;
    return ++last_recorded_;
  }
  void wait(uint64_t mark) override {
    while (reached_ < mark && !queue_.empty()) run_next();
  }
  bool reached(uint64_t mark) override { return reached_ >= mark; }
  void synchronize() override {
    while (!queue_.empty()) run_next();
  }
  size_t queued() const { return queue_.size(); }

  // The side queue is as slow as it may be: a copy happens when somebody waits for it. Until then nothing else may touch its place.
  void side_copy_to_device(void* dst, const void* host, size_t bytes) override {
    inside(dst, bytes, true);
    inside(host, bytes, false);
    ++side_copies;
    pending_.push_back({dst, host, bytes, 0});
  }
  void side_follow(uint64_t mark) override {
    if (mark > last_recorded_) throw std::logic_error("side_follow: a mark that was not recorded");
    ++follows;
  }
  uint64_t side_mark() override {
    ++last_mark_;
    for (Pending& copy : pending_) copy.mark = copy.mark == 0 ? last_mark_ : copy.mark;
    return last_mark_;
  }
  void wait_for_side(uint64_t mark) override {
    synchronize();  // side_follow() was behind it
    size_t done = 0;
    for (; done < pending_.size() && pending_[done].mark != 0 && pending_[done].mark <= mark; ++done) run(pending_[done]);
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<long>(done));
  }
  void side_synchronize() override {
    synchronize();
    for (const Pending& copy : pending_) run(copy);
    pending_.clear();
  }
  size_t pending_side_copies() const { return pending_.size(); }

  void zero(void* dst, size_t bytes) override {
    inside(dst, bytes, true);
    in_order([=] { std::memset(dst, 0, bytes); });
  }
  size_t free_bytes() const override {
    const std::lock_guard lock(mutex_);
    return capacity_ - used_;
  }
  bool host_addressable() const override { return false; }

  size_t allocations() const {
    const std::lock_guard lock(mutex_);
    return blocks_.size();
  }
  size_t used() const {  // of device memory
    const std::lock_guard lock(mutex_);
    return used_;
  }
  int64_t allocated = 0;    // device and host allocations so far
  size_t largest_host = 0;  // largest host allocation so far
  int64_t uploads = 0, downloads = 0, moves = 0, side_copies = 0, follows = 0;

 private:
  struct Block {
    size_t bytes;
    bool device;
  };
  struct Pending {
    void* dst;
    const void* host;
    size_t bytes;
    uint64_t mark;  // 0: none behind it yet
  };
  void run_next() {
    const std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    work();
  }
  void run(const Pending& copy) {
    inside(copy.dst, copy.bytes, true, true);
    inside(copy.host, copy.bytes, false);
    std::memcpy(copy.dst, copy.host, copy.bytes);
  }
  void* take(size_t bytes, bool device) {
    const std::lock_guard lock(mutex_);
    if (device && used_ + bytes > capacity_) throw OutOfMemory("[fake] no room for " + std::to_string(bytes) + " bytes");
    void* data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(data, 0xFF, bytes);
    blocks_[data] = {bytes, device};
    ++allocated;
    if (device) used_ += bytes;
    else largest_host = std::max(largest_host, bytes);
    return data;
  }
  void give(void* data) noexcept {
    const std::lock_guard lock(mutex_);
    const auto found = blocks_.find(data);
    if (found == blocks_.end()) std::abort();
    std::memset(data, 0xFE, found->second.bytes);
    if (found->second.device) used_ -= found->second.bytes;
    blocks_.erase(found);
    std::free(data);
  }
  void inside(const void* data, size_t bytes, bool device, bool side = false) const {
    const auto at = reinterpret_cast<uintptr_t>(data);
    for (const Pending& copy : pending_) {
      const auto dst = reinterpret_cast<uintptr_t>(copy.dst);
      if (!side && device && at < dst + copy.bytes && dst < at + bytes) throw std::logic_error("a side copy is under way there");
    }
    const std::lock_guard lock(mutex_);
    auto next = blocks_.upper_bound(const_cast<void*>(data));
    if (next == blocks_.begin()) throw std::logic_error("copy outside every allocation");
    const auto& [begin, block] = *--next;
    const size_t offset = static_cast<size_t>(static_cast<const std::byte*>(data) - static_cast<const std::byte*>(begin));
    if (block.device != device || offset + bytes > block.bytes) throw std::logic_error("copy outside every allocation");
  }

  mutable std::mutex mutex_;
  std::map<void*, Block> blocks_;
  std::vector<Pending> pending_;
  std::deque<std::function<void()>> queue_;
  uint64_t last_recorded_ = 0, reached_ = 0;
  uint64_t last_mark_ = 0;
  size_t capacity_;
  size_t used_ = 0;
};

class FakeOps : public Ops {
 public:
  FakeOps(FakeDevice& device, DType dtype) : device_(device), dtype_(dtype) {}
  Device& device() override { return device_; }
  DType compute_dtype() const override { return dtype_; }

  void embedding(const int32_t*, TensorView, TensorView) override { none(); }
  void take_tokens(const int32_t* const*, int32_t*, int64_t) override { none(); }
  void gather_rows(TensorView, const int32_t*, TensorView) override { none(); }
  void scatter_add_rows(TensorView, const int32_t*, TensorView) override { none(); }
  void convert(TensorView, TensorView) override { none(); }
  void linear(TensorView, TensorView, TensorView, TensorView) override { none(); }
  void linear_backward(TensorView, TensorView, TensorView, bool) override { none(); }
  void lora_shrink(const LoraLinear&, const LoraGroups&, TensorView, TensorView) override { none(); }
  void lora_expand(const LoraLinear&, const LoraGroups&, TensorView, TensorView) override { none(); }
  void lora_backward_s(const LoraLinear&, const LoraGroups&, TensorView, TensorView) override { none(); }
  void lora_backward_x(const LoraLinear&, const LoraGroups&, TensorView, TensorView) override { none(); }
  void lora_backward_weights(const LoraLinear&, const LoraGroups&, TensorView, TensorView, TensorView, TensorView) override {
    none();
  }
  void rms_norm(TensorView, TensorView, float, TensorView) override { none(); }
  void add_rms_norm(TensorView, TensorView, TensorView, float, TensorView, TensorView) override { none(); }
  void rms_norm_backward(TensorView, TensorView, float, TensorView, TensorView) override { none(); }
  void rms_norm_and_backward(TensorView, TensorView, float, TensorView, TensorView, TensorView) override { none(); }
  void rope_table(const int32_t*, const float*, float, TensorView) override { none(); }
  void rope(TensorView, const Rope&) override { none(); }
  void rope_backward(TensorView, const AttentionShape&, TensorView, TensorView, TensorView, float, TensorView) override { none(); }
  void attention_paged(TensorView, KvLayer, const KvShape&, const PagedBatch&, const AttentionShape&, TensorView) override {
    none();
  }
  void attention_packed(TensorView, TensorView, TensorView, const PackedBatch&, const AttentionShape&, TensorView,
                        TensorView) override {
    none();
  }
  void attention_backward(TensorView, TensorView, TensorView, TensorView, TensorView, TensorView, const PackedBatch&,
                          const AttentionShape&, TensorView, TensorView, TensorView) override {
    none();
  }
  void swiglu(TensorView, TensorView) override { none(); }
  void swiglu_backward(TensorView, TensorView, TensorView) override { none(); }
  void swiglu_and_backward(TensorView, TensorView, TensorView, TensorView) override { none(); }
  void token_loss(TensorView, const LossRow*, TensorView, float*, float*) override { none(); }
  void sample(TensorView, const SampleBatch&, int32_t*, float*, TensorView, TensorView) override { none(); }
  void grad_norm(const AdamBatch&, float*) override { none(); }
  void adamw(const AdamBatch&, const float*) override { none(); }

 private:
  [[noreturn]] static void none() { throw std::logic_error("FakeOps computes nothing"); }
  FakeDevice& device_;
  DType dtype_;
};

}  // namespace loquetier::test
