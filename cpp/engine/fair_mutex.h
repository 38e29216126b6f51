// A mutex that serves its waiters in order of arrival. The step loop takes and gives back its lock without a pause; with std::mutex
// a thread that wants to add an adapter could wait for ever.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace loquetier {

class FairMutex {
 public:
  void lock() {
    std::unique_lock guard(mutex_);
    const uint64_t ticket = next_++;
    turn_.wait(guard, [&] { return ticket == serving_; });
  }
  void unlock() {
    {
      std::lock_guard guard(mutex_);
      ++serving_;
    }
    turn_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  uint64_t next_ = 0;
  uint64_t serving_ = 0;
};

}  // namespace loquetier
