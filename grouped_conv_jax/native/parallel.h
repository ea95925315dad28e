// Shares a loop with the threads of XLA's pool. No thread ever waits for another one to start.
#ifndef GROUPED_CONV_PARALLEL_H_
#define GROUPED_CONV_PARALLEL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

namespace grouped_conv {

// Calls body(task, worker) for each task. The calling thread is worker 0; threads of the pool that
// have time are the others.
//
// The caller may do all tasks alone, and waits only for tasks that have begun. So nothing deadlocks
// if all threads of the pool are busy, perhaps with calls like this one. A thread that comes too
// late finds no task and touches only the counters, which it keeps alive.
template <class Pool, class Body>
void ParallelFor(Pool& pool, int64_t tasks, int64_t workers, const Body& body) {
  struct Counters {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; task++) body(task, 0);
    return;
  }
  auto counters = std::make_shared<Counters>();
  auto work = [counters, tasks, &body](int64_t worker) {
    int64_t mine = 0;
    for (int64_t task; (task = counters->next.fetch_add(1)) < tasks; mine++) body(task, worker);
    if (mine > 0 && counters->done.fetch_add(mine) + mine == tasks) {
      std::lock_guard<std::mutex> lock(counters->mutex);
      counters->all_done.notify_one();
    }
  };
  try {
    for (int64_t worker = 1; worker < workers; worker++) {
      pool.Schedule([work, worker] { work(worker); });
    }
  } catch (...) {
    // Threads that are scheduled may have begun, so the caller goes on with them.
  }
  work(0);
  for (int spins = 0; spins < 1000 && counters->done.load() < tasks; spins++) {
    std::this_thread::yield();
  }
  std::unique_lock<std::mutex> lock(counters->mutex);
  counters->all_done.wait(lock, [&] { return counters->done.load() == tasks; });
}

}  // namespace grouped_conv

#endif  // GROUPED_CONV_PARALLEL_H_
