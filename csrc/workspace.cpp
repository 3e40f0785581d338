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
  if (char* data = kept.exchange(nullptr)) {
    const int64_t size = *reinterpret_cast<int64_t*>(data);
    if (size >= bytes) return {data, size};
    std::free(data);
  }
  // A fresh page costs a quarter of a microsecond; a large block asks for large pages.
  const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  const int64_t size = (bytes / alignment + 1) * alignment;
  char* const data = static_cast<char*>(std::aligned_alloc(alignment, size));
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(data, size, MADV_HUGEPAGE);  // advice: no matter if refused
#endif
  return {data, size};
}

void give_block(MemoryBlock block) {
  if (block.data == nullptr) return;
  if (block.bytes > kMostKept) return std::free(block.data);
  *reinterpret_cast<int64_t*>(block.data) = block.bytes;
  std::free(kept.exchange(block.data));
}

}  // namespace flex
