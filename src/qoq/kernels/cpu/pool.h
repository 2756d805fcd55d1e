// Pool: the one set of threads that all kernels share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace qoq {

// Runs numbered tasks on `threads` threads, the caller among them. Tasks are handed out one by one,
// so a thread that the system delays holds up only its own task. Idle workers spin for some
// microseconds (the next op of a decoding step comes that soon) and then sleep.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const;

  // One op at a time owns the pool: hold this for as long as the op takes.
  std::unique_lock<std::mutex> hold();

  // task(context, i, thread) for every i in 0..count-1; returns when all are done. `thread` in
  // 0..threads-1 names the scratch memory a task may use.
  using Task = void (*)(void* context, int64_t i, int thread);
  void run(int64_t count, Task task, void* context);

  // Memory that belongs to a thread until its task ends: `bytes` of it, aligned to cache lines, with
  // whatever was there before.
  void* scratch(int thread, int64_t bytes);

  // Memory that belongs to the op that owns the pool, likewise.
  void* shared(int64_t bytes);

  // As run, for a lambda. (Kernels use no other templates of this or any library: code that several
  // instruction sets instantiate would be merged, and run where it must not.)
  template <class F>
  void each(int64_t count, F&& body) {
    run(count, [](void* f, int64_t i, int thread) { (*static_cast<F*>(f))(i, thread); }, &body);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  struct Memory {
    void* start = nullptr;
    int64_t bytes = 0;
  };

  static void* grow(Memory& memory, int64_t bytes);
  void stop();
  void work(int thread);
  void take(int thread);

  std::mutex owner_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  Counter next_;   // the next task to hand out
  Counter left_;   // workers that have not finished this run
  Counter round_;  // goes up by 2 with each run; the low bit says "stop"
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> failed_{false};  // a task of this run found no memory
  std::vector<std::thread> workers_;
  std::vector<Memory> scratch_;
  Memory shared_;
};

}  // namespace qoq
