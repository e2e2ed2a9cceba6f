// Threads that share the items of one loop at a time.
//
// Not OpenMP and not torch's pool: several workers share few cores, so a helper spins only briefly and then sleeps, and
// the caller never waits for a helper that has not woken up: it waits for items, not for threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace baton {

static inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
    for (int i = 1; i < num_threads_; ++i) helpers_.emplace_back([this, i] { help(i); });
  }

  ~Pool() {
    stopping_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& helper : helpers_) helper.join();
  }

  int num_threads() const { return num_threads_; }

  // One caller at a time: kernels keep scratch memory per thread of the pool.
  std::mutex& exclusive() { return exclusive_; }

  // Calls body(item, thread) for every item once, in no order; returns when all are done.
  template <typename Body>
  void run(int64_t num_items, Body& body) {
    if (num_threads_ == 1 || num_items <= 1) {
      for (int64_t item = 0; item < num_items; ++item) body(item, 0);
      return;
    }
    function_ = [](void* context, int64_t item, int thread) { (*static_cast<Body*>(context))(item, thread); };
    context_ = &body;
    done_.store(0, std::memory_order_relaxed);
    uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    uint64_t tag = uint64_t(epoch) << 40;
    total_ = uint32_t(num_items);
    ticket_.store(tag | uint64_t(num_items) << 20);
    epoch_.store(epoch);
    epoch_.notify_all();
    while (take_one(0)) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != total_; ++spins) {
      if (spins < kSpins) {
        relax();
        continue;
      }
      uint32_t seen = done_.load(std::memory_order_acquire);
      if (seen != total_) done_.wait(seen);
    }
  }

 private:
  static constexpr int kSpins = 3000;            // some 50 us, longer than the serial gaps inside a step
  static constexpr uint64_t kField = (1u << 20) - 1;

  // A ticket is epoch (24 bits), number of items, next item. Winning the exchange proves that the item belongs to the
  // current loop, whose function cannot change before this item is counted as done.
  bool take_one(int thread) {
    uint64_t ticket = ticket_.load();
    do {
      if ((ticket & kField) >= (ticket >> 20 & kField)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1));
    uint32_t total = uint32_t(ticket >> 20 & kField);
    function_(context_, int64_t(ticket & kField), thread);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == total) done_.notify_one();
    return true;
  }

  void help(int thread) {
    int spins = 0;
    while (!stopping_.load(std::memory_order_relaxed)) {
      uint32_t epoch = epoch_.load();
      if (take_one(thread)) {
        spins = 0;
      } else if (++spins < kSpins) {
        relax();
      } else {
        spins = 0;
        if (!stopping_.load()) epoch_.wait(epoch);
      }
    }
  }

  int num_threads_;
  std::vector<std::thread> helpers_;
  std::mutex exclusive_;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stopping_{false};
  uint32_t total_ = 0;
  void (*function_)(void*, int64_t, int) = nullptr;
  void* context_ = nullptr;
};

// Splits [0, count) into pieces of at least `grain` for the pool; small loops run on the caller alone.
template <typename Body>
static inline void run_ranges(Pool& pool, int64_t count, int64_t grain, Body&& body) {
  int64_t pieces = (count + grain - 1) / grain;
  int64_t most = 4 * pool.num_threads();
  if (pieces > most) pieces = most;
  if (pieces <= 1) {
    body(int64_t(0), count, 0);
    return;
  }
  auto piece = [&](int64_t i, int thread) { body(count * i / pieces, count * (i + 1) / pieces, thread); };
  pool.run(pieces, piece);
}

}  // namespace baton
