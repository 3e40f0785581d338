#include "workspace.h"

#include <atomic>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace flex {
namespace {

constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kMostKept = int64_t{64} << 20;  // larger ones cost little beside their call

// The block that waits for the next call; its first bytes hold its size.
std::atomic<char*> kept{nullptr};

}  // namespace

MemoryBlock take_block(int64_t bytes) {
  if (char* data = bytes <= kMostKept ? kept.exchange(nullptr) : nullptr) {
    const int64_t size = *reinterpret_cast<int64_t*>(data);
    if (size >= bytes) return {data, size};
    std::free(data);
  }
  const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  const int64_t size = (bytes / alignment + 1) * alignment;
  char* const data = static_cast<char*>(std::aligned_alloc(alignment, size));
  if (data == nullptr) throw std::bad_alloc();
  expect_writes(data, size);
  return {data, size};
}

void give_block(MemoryBlock block) {
  if (block.data == nullptr) return;
  if (block.bytes > kMostKept) return std::free(block.data);
  *reinterpret_cast<int64_t*>(block.data) = block.bytes;
  std::free(kept.exchange(block.data));
}

void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < 2 * kHugePage) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data), page = 65536;  // of whatever page size
  const uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: no matter if refused
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace flex
