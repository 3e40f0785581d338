#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace flex {
namespace {

std::atomic<bool> in_forked_child{false};

#if defined(__unix__) || defined(__APPLE__)
const int watches_forks = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

}  // namespace

int usable_threads(int requested) { return in_forked_child ? 1 : std::max(requested, 1); }

int usable_threads(int requested, double operations) {
  constexpr double kOperationsPerThread = 5e5;  // some 10 us; waking a thread and waiting for it costs 5
  return static_cast<int>(std::clamp(operations / kOperationsPerThread, 1., double(usable_threads(requested))));
}

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int)>& body) {
  threads = static_cast<int>(std::min<int64_t>(usable_threads(threads), count));
  if (threads <= 1) {
    for (int64_t task = 0; task < count; ++task) body(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  const auto work = [&](int thread) {
    try {
      for (int64_t task = next++; task < count && !failed; task = next++) body(task, thread);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
#endif
  if (failure) std::rethrow_exception(failure);
}

}  // namespace flex
