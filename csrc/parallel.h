// Threads: OpenMP, which is torch's own pool when torch was imported first; std::thread in a build without OpenMP.
#pragma once
#include <cstdint>
#include <functional>

namespace flex {

// How many threads a call that asks for `requested` may use: at least 1. In a process forked from one that had loaded
// this module it is 1, because the pool's threads did not survive the fork and waiting for them would never end.
int usable_threads(int requested);

// The same, but no more than `operations` (multiply-adds, roughly) keep busy long enough to be worth waking.
int usable_threads(int requested, double operations);

// body(task, thread) once for every task in [0, count), in any order, thread in [0, threads). The first exception of a
// body is thrown again here, after all threads are done; tasks not begun by then are left out.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t task, int thread)>& body);

}  // namespace flex
