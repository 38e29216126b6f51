// Scratch memory of the CPU operations: blocks lent to one range of a parallel loop at a time. A block only grows, so a steady
// state allocates nothing. Values in a fresh lease are undefined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace loquetier::cpu {

class Workspaces {
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(std::byte* data) const { ::operator delete(data, std::align_val_t{kAlign}); }
  };
  struct Block {
    std::unique_ptr<std::byte, Free> data;
    size_t bytes = 0;
  };

 public:
  // Borrows a block of at least `bytes` and carves it front to back.
  class Lease {
   public:
    Lease(Workspaces& owner, size_t bytes) : owner_(owner), block_(owner.borrow(bytes)) {}
    ~Lease() { owner_.give_back(std::move(block_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    template <class T>
    T* take(int64_t n) {
      T* result = reinterpret_cast<T*>(block_.data.get() + used_);
      used_ += size_for<T>(n);
      return result;
    }

    void rewind() { used_ = 0; }  // gives back everything taken

   private:
    Workspaces& owner_;
    Block block_;
    size_t used_ = 0;
  };

  // Bytes that take<T>(n) uses.
  template <class T>
  static constexpr size_t size_for(int64_t n) {
    return (static_cast<size_t>(n) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }

 private:
  Block borrow(size_t bytes) {
    Block block;
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        block = std::move(idle_.back());
        idle_.pop_back();
      } else {
        idle_.reserve(++blocks_);  // so that give_back() cannot throw
      }
    }
    if (block.bytes < bytes) {
      block.data.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlign})));
      block.bytes = bytes;
    }
    return block;
  }
  void give_back(Block block) noexcept {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(block));
  }

  std::mutex mutex_;
  std::vector<Block> idle_;
  size_t blocks_ = 0;
};

}  // namespace loquetier::cpu
