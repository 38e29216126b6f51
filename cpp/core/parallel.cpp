// A job is published by opening a gate: one atomic word that counts the workers inside. Workers that come too late miss the job
// instead of holding it up, so a short job costs the caller no wake-up of a sleeping thread. Between jobs a worker spins briefly (a
// decode step makes hundreds of jobs back to back), then sleeps on `posted`.
#include "core/parallel.h"

#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace loquetier {

namespace {

constexpr uint32_t kOpen = 1u << 31;    // of the gate; the other bits count the workers inside
constexpr int kSpins = 4000;            // about 100 microseconds before a worker sleeps
constexpr int kSpinsBeforeYield = 200;  // of a caller that waits for the last ranges
constexpr int kRangesPerThread = 4;     // dynamic hand-out: a slow thread takes fewer

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? static_cast<int>(n) : 1;
}

}  // namespace

struct ThreadPool::State {
  std::atomic<bool> busy{false};  // a job runs: calls made meanwhile run inline
  std::atomic<uint32_t> gate{0};
  std::atomic<uint32_t> posted{0};  // jobs so far; what sleeping workers wait on
  std::atomic<bool> stop{false};

  // The job. Written by the caller while the gate is closed and nobody is inside.
  const std::function<void(int64_t, int64_t)>* fn = nullptr;
  int64_t n = 0;
  int64_t range = 0;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first range that threw

  std::vector<std::thread> workers;

  void shut_down() {
    stop.store(true, std::memory_order_release);
    posted.fetch_add(1, std::memory_order_release);
    posted.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  void run_ranges() {
    for (;;) {
      const int64_t begin = next.fetch_add(range, std::memory_order_relaxed);
      if (begin >= n) return;
      try {
        (*fn)(begin, begin + range < n ? begin + range : n);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(n, std::memory_order_relaxed);
      }
    }
  }

  bool enter() {
    uint32_t seen = gate.load(std::memory_order_relaxed);
    while (seen & kOpen)
      if (gate.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    return false;
  }

  void work() {
    uint32_t done = 0;  // value of `posted` when this worker last looked for a job
    for (;;) {
      int spins = 0;
      uint32_t now;
      while ((now = posted.load(std::memory_order_acquire)) == done) {
        if (++spins < kSpins) pause_briefly();
        else posted.wait(done, std::memory_order_acquire);
      }
      done = now;
      if (stop.load(std::memory_order_acquire)) return;
      if (enter()) {
        run_ranges();
        gate.fetch_sub(1, std::memory_order_release);
      }
    }
  }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
  require(threads >= 0, "[thread pool] threads: expected 0 (all processors) or more, got ", threads);
  if (threads == 0) threads = usable_processors();
  try {
    for (int i = 1; i < threads; ++i) state_->workers.emplace_back([state = state_.get()] { state->work(); });
  } catch (const std::system_error& error) {
    const size_t started = state_->workers.size();
    state_->shut_down();
    throw DeviceError(concat("[thread pool] expected to start ", threads - 1, " threads, got ", started, ": ", error.what()));
  }
}

ThreadPool::~ThreadPool() { state_->shut_down(); }

int ThreadPool::threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadPool::parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& fn) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  State& s = *state_;
  if (n <= grain || s.workers.empty() || s.busy.exchange(true, std::memory_order_acquire)) {
    fn(0, n);
    return;
  }
  const int64_t ranges = int64_t{threads()} * kRangesPerThread;
  s.fn = &fn;
  s.n = n;
  s.range = (n + ranges - 1) / ranges;
  if (s.range < grain) s.range = grain;
  s.next.store(0, std::memory_order_relaxed);
  s.gate.store(kOpen, std::memory_order_release);
  s.posted.fetch_add(1, std::memory_order_release);
  s.posted.notify_all();

  s.run_ranges();
  uint32_t inside = s.gate.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  for (int spins = 0; inside != 0; inside = s.gate.load(std::memory_order_acquire)) {
    if (++spins < kSpinsBeforeYield) pause_briefly();
    else std::this_thread::yield();
  }
  std::exception_ptr error;
  if (s.failed.load(std::memory_order_relaxed)) {
    error = std::exchange(s.error, nullptr);
    s.failed.store(false, std::memory_order_relaxed);
  }
  s.busy.store(false, std::memory_order_release);
  if (error) std::rethrow_exception(error);
}

}  // namespace loquetier
