// A fixed pool of worker threads for the CPU backend. One parallel_for at a time per pool; the calling thread takes part.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace loquetier {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // total threads that work, the caller included; 0 = the processors this process may use
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;
  // Calls fn(begin, end) over disjoint ranges that cover [0, n), none smaller than `grain` but the last. Ranges are handed out
  // dynamically. Returns when all are done; rethrows the first exception of any of them. Nested calls run inline.
  void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& fn);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace loquetier
