// The pool: workers claim items from one counter; idle ones spin for a few microseconds, then sleep on a condition
// variable.
#include "kernels/thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "common/error.h"
#include "common/flush.h"
#include "kernels/ops.h"

namespace sg {

namespace {

constexpr int SPINS = 500;  // some ten microseconds
constexpr int64_t THREADS_MAX = 256;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class ThreadPool {
 public:
  void resize(int64_t num_threads) {
    std::lock_guard<std::mutex> owner(owner_);
    stop();
    size_.store(num_threads, std::memory_order_relaxed);
    for (int64_t i = 1; i < num_threads; ++i) {
      workers_.emplace_back([this, seen = round_.load()] { work(seen); });
    }
  }

  int64_t size() const { return size_.load(std::memory_order_relaxed); }

  bool try_run(int64_t num_items, void (*run)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    run_ = run;
    context_ = context;
    num_items_ = num_items;
    next_.store(0, std::memory_order_relaxed);
    running_.store(static_cast<int64_t>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    claim();
    for (int spin = 0; running_.load(std::memory_order_acquire) > 0; ++spin) {
      if (spin < SPINS) {
        pause();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_.load(std::memory_order_acquire) == 0; });
      }
    }
    return true;
  }

 private:
  void claim() {
    for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < num_items_;) run_(context_, item);
  }

  void work(uint64_t seen) {
    const FlushDenormals flush;
    for (;;) {
      for (int spin = 0; spin < SPINS && round_.load(std::memory_order_acquire) == seen; ++spin) pause();
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
      }
      ++seen;  // the owner waits for every worker, so no round is ever missed
      if (stopping_.load(std::memory_order_acquire)) return;
      claim();
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_all();
      }
    }
  }

  void stop() {
    stopping_.store(true, std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false, std::memory_order_release);
  }

  std::mutex owner_;  // held by who runs or resizes
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> size_{1};
  std::atomic<uint64_t> round_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> next_{0}, running_{0};
  void (*run_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t num_items_ = 0;
};

std::atomic<ThreadPool*> current{nullptr};

// Never destroyed: a worker may still sleep in it while the process exits.
ThreadPool& pool() {
  static const bool made = [] {
    current = new ThreadPool;
    // In a forked child the workers do not exist and a lock may be held for ever: start afresh, with one thread.
    pthread_atfork(nullptr, nullptr, [] { current = new ThreadPool; });
    return true;
  }();
  (void)made;
  return *current.load(std::memory_order_relaxed);
}

}  // namespace

int64_t num_threads() { return pool().size(); }

void run_items(int64_t num_items, void (*run)(void* context, int64_t item), void* context) {
  if (pool().try_run(num_items, run, context)) return;
  for (int64_t item = 0; item < num_items; ++item) run(context, item);
}

}  // namespace sg

int sg_set_num_threads(int64_t num_threads) {
  if (num_threads < 1 || num_threads > sg::THREADS_MAX) {
    return sg::fail("num_threads=%lld must be 1 to %lld", static_cast<long long>(num_threads),
                    static_cast<long long>(sg::THREADS_MAX));
  }
  sg::pool().resize(num_threads);
  return SG_OK;
}

int64_t sg_num_threads() { return sg::num_threads(); }
