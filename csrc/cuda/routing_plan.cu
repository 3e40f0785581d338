#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "routing_plan_cuda.h"

// The pairs are cut into runs, one for each warp of the grid, in order. Two walks over a run:
//
//   count   how many of my pairs go to each bin                     (a bin for each expert, a last one for all others)
//   -- the whole grid waits --
//   place   the next free place of each bin is  start of the bin + pairs of it in the runs before mine; in the walk a
//           pair's place is that, plus its rank among the lanes of its own warp that go to the same bin
//
// Integers only, every number has one writer, no atomics: the order is that of the pairs, on every run.
namespace flex {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxWarps = 8;
// A warp with fewer pairs waits longer for the grid than it works. Not measured.
constexpr int64_t kMinPairsPerWarp = 128;
// What a block may have on every chip without asking.
constexpr int64_t kSharedBytes = 48 << 10;
constexpr int kNoBin = -1;  // of lanes past the end

struct Walk {
  int64_t first, end;  // this warp's run of pairs
  int lane;
};

template <typename Id>
__device__ int bin_of(const Id* ids, int64_t pair, const Walk& walk, int num_experts) {
  if (pair >= walk.end) return kNoBin;
  const Id id = ids[pair];
  return id < 0 || id >= num_experts ? num_experts : static_cast<int>(id);
}

// Walks the run 32 pairs at a time; `next` [bins] belongs to this warp alone and grows by the pairs of each bin.
// `place(pair, position)` is called for every pair with what `next` was when its turn came.
template <typename Id, typename Place>
__device__ void walk_pairs(const Id* ids, const Walk& walk, int num_experts, int32_t* next, Place place) {
  for (int64_t start = walk.first; start < walk.end; start += kWarp) {
    const int64_t pair = start + walk.lane;
    const int bin = bin_of(ids, pair, walk, num_experts);
    const unsigned same = __match_any_sync(kAllLanes, bin);
    const int rank = __popc(same & ((1u << walk.lane) - 1));
    const int32_t position = bin == kNoBin ? 0 : next[bin];
    __syncwarp();
    if (bin != kNoBin) {
      if (rank == 0) next[bin] = position + __popc(same);
      place(pair, position + rank);
    }
    __syncwarp();
  }
}

// counts [bins, num_blocks]. Of one bin, over all lanes of a warp: pairs in the blocks before `block`, and in all.
__device__ void sum_blocks(const int32_t* counts, int num_blocks, int block, int lane, int32_t& before, int32_t& total) {
  before = total = 0;
  for (int other = lane; other < num_blocks; other += kWarp) {
    const int32_t count = counts[other];
    total += count;
    if (other < block) before += count;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, distance);
    before += __shfl_xor_sync(kAllLanes, before, distance);
  }
}

// totals [bins] -> their exclusive prefix sums, in place, by one warp.
__device__ void prefix_sums(int32_t* totals, int bins, int lane) {
  int32_t placed = 0;
  for (int start = 0; start < bins; start += kWarp) {
    const int bin = start + lane;
    const int32_t own = bin < bins ? totals[bin] : 0;
    int32_t sum = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int32_t left = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += left;
    }
    if (bin < bins) totals[bin] = placed + sum - own;
    placed += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

template <typename Id>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) routing_plan_kernel(PlanArguments p, int64_t pairs_per_warp) {
  extern __shared__ int32_t shared[];
  const int num_experts = static_cast<int>(p.num_experts), bins = num_experts + 1;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int block = blockIdx.x, num_blocks = gridDim.x;
  int32_t* starts = shared;       // [bins]
  int32_t* next = shared + bins;  // [warps, bins]
  int32_t* own_next = next + warp * bins;
  const Id* ids = static_cast<const Id*>(p.expert_ids);
  const int64_t first = min((static_cast<int64_t>(block) * warps + warp) * pairs_per_warp, p.num_pairs);
  const Walk walk{first, min(first + pairs_per_warp, p.num_pairs), lane};

  for (int i = threadIdx.x; i < warps * bins; i += blockDim.x) next[i] = 0;
  __syncthreads();
  walk_pairs(ids, walk, num_experts, own_next, [](int64_t, int32_t) {});
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    int32_t count = 0;  // of the block; next[w] becomes the count of the warps before w
    for (int w = 0; w < warps; ++w) {
      const int32_t own = next[w * bins + bin];
      next[w * bins + bin] = count;
      count += own;
    }
    p.counts[static_cast<int64_t>(bin) * num_blocks + block] = count;
  }

  cooperative_groups::this_grid().sync();

  for (int bin = warp; bin < bins; bin += warps) {
    int32_t before, total;
    sum_blocks(p.counts + static_cast<int64_t>(bin) * num_blocks, num_blocks, block, lane, before, total);
    if (lane == 0) starts[bin] = total;
    for (int w = lane; w < warps; w += kWarp) next[w * bins + bin] += before;
    if (block == 0 && lane == 0 && bin < num_experts) p.tokens_per_expert[bin] = total;
  }
  __syncthreads();
  if (warp == 0) prefix_sums(starts, bins, lane);
  __syncthreads();
  for (int i = threadIdx.x; i < warps * bins; i += blockDim.x) next[i] += starts[i % bins];
  if (block == 0)
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) p.expert_offsets[bin] = starts[bin];
  __syncthreads();
  walk_pairs(ids, walk, num_experts, own_next,
             [&](int64_t pair, int32_t position) { p.sorted_pairs[position] = static_cast<int32_t>(pair); });
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call, somebody else's, would find it
  throw std::runtime_error(std::string("flex routing_plan: ") + what + ": " + cudaGetErrorString(error));
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PlanLaunch plan_launch(int64_t num_pairs, int64_t num_experts, int64_t num_processors) {
  if (num_pairs < 0 || num_pairs > INT32_MAX)
    throw std::invalid_argument("num_pairs is " + std::to_string(num_pairs) + ", expected 0 to 2^31 - 1");
  if (num_processors < 1)
    throw std::invalid_argument("num_processors is " + std::to_string(num_processors) + ", expected at least 1");
  const int64_t most_experts = kSharedBytes / (2 * sizeof(int32_t)) - 1;  // one warp, and `starts`
  if (num_experts < 1 || num_experts > most_experts)
    throw std::invalid_argument("num_experts is " + std::to_string(num_experts) + ", the CUDA routing plan takes 1 to " +
                                std::to_string(most_experts));
  const int64_t row_bytes = (num_experts + 1) * sizeof(int32_t);
  PlanLaunch launch;
  launch.warps_per_block = std::min(kMaxWarps, kSharedBytes / row_bytes - 1);
  const int64_t wanted = divide_up(num_pairs, launch.warps_per_block * kMinPairsPerWarp);
  launch.num_blocks = std::clamp<int64_t>(wanted, 1, num_processors);
  launch.pairs_per_warp = divide_up(divide_up(num_pairs, launch.num_blocks * launch.warps_per_block), kWarp) * kWarp;
  launch.shared_bytes = (launch.warps_per_block + 1) * row_bytes;
  launch.num_counts = launch.num_blocks * (num_experts + 1);
  return launch;
}

void routing_plan_cuda(const PlanArguments& arguments, const PlanLaunch& launch, bool wide_ids, int device,
                       void* stream) {
  const void* kernel = wide_ids ? reinterpret_cast<const void*>(&routing_plan_kernel<int64_t>)
                                : reinterpret_cast<const void*>(&routing_plan_kernel<int32_t>);
  PlanArguments values = arguments;
  int64_t pairs_per_warp = launch.pairs_per_warp;
  void* parameters[] = {&values, &pairs_per_warp};
  check(cudaSetDevice(device), "cudaSetDevice");
  // Cooperative: CUDA promises that all blocks run at once, or refuses.
  check(cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(launch.num_blocks)),
                                    dim3(static_cast<unsigned>(launch.warps_per_block * kWarp)), parameters,
                                    static_cast<size_t>(launch.shared_bytes), static_cast<cudaStream_t>(stream)),
        "launch");
}

}  // namespace flex
