#include "pool.h"

#include <chrono>
#include <cstdlib>
#include <new>

namespace qoq {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spin until done() or the time is up; true if done.
template <class F>
bool spin(F done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

Pool::Pool(int threads) : scratch_(threads < 1 ? 1 : threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // the system grants no more threads
    stop();
    throw;
  }
}

Pool::~Pool() {
  stop();
  for (const Memory& memory : scratch_) std::free(memory.start);
  std::free(shared_.start);
}

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(sleep_);
    round_.value.fetch_or(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

int Pool::threads() const { return static_cast<int>(scratch_.size()); }

std::unique_lock<std::mutex> Pool::hold() { return std::unique_lock<std::mutex>(owner_); }

void* Pool::scratch(int thread, int64_t bytes) { return grow(scratch_[thread], bytes); }

void* Pool::shared(int64_t bytes) { return grow(shared_, bytes); }

void* Pool::grow(Memory& memory, int64_t bytes) {
  if (memory.bytes < bytes) {
    std::free(memory.start);
    memory = {};
    const int64_t lines = (bytes + 63) / 64 * 64;
    memory.start = std::aligned_alloc(64, lines);
    if (!memory.start) throw std::bad_alloc();
    memory.bytes = lines;
  }
  return memory.start;
}

void Pool::run(int64_t count, Task task, void* context) {
  if (count <= 0) return;
  if (count == 1 || workers_.empty()) {
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
    return;
  }
  failed_.store(false, std::memory_order_relaxed);
  task_ = task;
  context_ = context;
  count_ = count;
  next_.value.store(0, std::memory_order_relaxed);
  left_.value.store(static_cast<int64_t>(workers_.size()), std::memory_order_relaxed);
  round_.value.fetch_add(2);
  if (sleepers_.load() > 0) {
    std::lock_guard<std::mutex> wake(sleep_);
    wake_.notify_all();
  }
  take(0);
  auto done = [this] { return left_.value.load(std::memory_order_acquire) == 0; };
  while (!spin(done)) std::this_thread::yield();
  if (failed_.load()) throw std::bad_alloc();  // nothing else in a task throws
}

void Pool::take(int thread) {
  for (;;) {
    const int64_t i = next_.value.fetch_add(1, std::memory_order_relaxed);
    if (i >= count_) return;
    try {
      task_(context_, i, thread);
    } catch (const std::bad_alloc&) {
      failed_.store(true);
    }
  }
}

void Pool::work(int thread) {
  int64_t seen = 0;
  for (;;) {
    auto called = [&] { return round_.value.load() != seen; };
    if (!spin(called)) {
      std::unique_lock<std::mutex> lock(sleep_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, called);
      sleepers_.fetch_sub(1);
    }
    seen = round_.value.load(std::memory_order_acquire);
    if (seen & 1) return;
    take(thread);
    left_.value.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace qoq
