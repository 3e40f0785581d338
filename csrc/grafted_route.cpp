#include "grafted_route.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "parallel.h"
#include "workspace.h"

namespace flex {
namespace {

// A task is a block of tokens, whose states stay in a second cache while the experts pass by, and a part of the experts;
// parts are cut only where the tokens alone do not keep the threads busy.
constexpr int64_t kMostTokens = 36, kTokenUnit = 4, kExpertUnit = 16;
// Tokens of one product, whose states stay in a first cache: at most the rows of a tile, and two of 4 rather than 6 and 2.
constexpr int64_t kMostRows = 6;
constexpr int64_t rows_of(int64_t left) { return left > kMostRows && left <= 8 ? 4 : std::min(left, kMostRows); }
// Of few tokens most of the time goes into reading the weights: a byte takes as long as half a multiply-add from the
// second cache (100 GB/s a thread; avx512_bf16), as three from memory (17 GB/s).
constexpr double kOperationsPerByte = 2.;

// The K largest of a row, the lower index first at a tie: an insertion sort, in which a later one must be larger to pass.
// In a row of NaN nothing is larger, and the first K stay.
void keep_largest(const float* row, int64_t num_experts, int64_t top_k, float* values, int64_t* indices) {
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    int64_t place = std::min(expert, top_k);
    if (place == top_k && !(row[expert] > values[--place])) continue;
    for (; place > 0 && row[expert] > values[place - 1]; --place) {
      values[place] = values[place - 1];
      indices[place] = indices[place - 1];
    }
    values[place] = row[expert];
    indices[place] = expert;
  }
}

// The logits are already rounded to bf16: the upper half is all of them.
void copy_logits(const float* logits, int64_t count, Scalar scalar, void* target) {
  if (scalar == Scalar::kFloat32) {
    std::memcpy(target, logits, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, logits + i, sizeof(bits));
    static_cast<Bfloat16*>(target)[i].bits = static_cast<uint16_t>(bits >> 16);
  }
}

struct Call {
  const Router& router;
  const Routes& routes;
  const Kernels& kernels;
  float* logits;    // [T, E]
  int32_t* counts;  // [threads, E]

  const char* states(int64_t token) const {
    return static_cast<const char*>(router.hidden_states) + token * router.hidden_size * scalar_bytes(router.scalar);
  }

  void multiply(int64_t token, int64_t tokens, int64_t expert, int64_t experts) const {
    const int64_t hidden = router.hidden_size, scalar = static_cast<int>(router.scalar);
    const char* const weight =
        static_cast<const char*>(router.router_weight) + expert * hidden * scalar_bytes(router.scalar);
    for (int64_t unit = token, count; unit < token + tokens; unit += count) {
      count = rows_of(token + tokens - unit);
      kernels.row_products[scalar](count, experts, hidden, states(unit), hidden, weight, hidden,
                                   logits + unit * router.num_experts + expert, router.num_experts);
      if (expert > 0 || router.graft_logit_weight == nullptr) continue;
      kernels.row_dots[scalar](count, hidden, states(unit), hidden, router.graft_logit_weight,
                               routes.graft_logits + unit);
      for (int64_t i = unit; i < unit + count; ++i) routes.graft_logits[i] += *router.graft_logit_bias;
    }
  }

  void choose(int64_t token, int64_t tokens, int thread) const {
    const int64_t num_experts = router.num_experts, top_k = router.top_k;
    float* const row = logits + token * num_experts;
    if (routes.router_logits != nullptr)
      copy_logits(row, tokens * num_experts, router.scalar,
                  static_cast<char*>(routes.router_logits) + token * num_experts * scalar_bytes(router.scalar));
    for (int64_t i = 0; i < tokens; ++i) {
      float* const weights = routes.routing_weights + (token + i) * top_k;
      int64_t* const indices = routes.expert_indices + (token + i) * top_k;
      kernels.softmax(num_experts, row + i * num_experts);
      keep_largest(row + i * num_experts, num_experts, top_k, weights, indices);
      float total = 0.f;
      for (int64_t slot = 0; slot < top_k; ++slot) {
        total += weights[slot];
        ++counts[thread * num_experts + indices[slot]];
      }
      for (int64_t slot = 0; router.renormalize && slot < top_k; ++slot) weights[slot] /= total;
    }
  }
};

}  // namespace

void grafted_route(const Router& router, const Routes& routes, int threads) {
  const int64_t num_tokens = router.num_tokens, num_experts = router.num_experts;
  if (router.top_k < 1 || router.top_k > num_experts)
    throw std::invalid_argument("top_k is " + std::to_string(router.top_k) + ", expected 1 to " +
                                std::to_string(num_experts) + ", the number of experts");
  const double weights = double(num_experts) * router.hidden_size;
  threads = usable_threads(threads, num_tokens * weights + kOperationsPerByte * weights * scalar_bytes(router.scalar));
  const int64_t share = round_up((num_tokens + threads - 1) / threads, kTokenUnit);
  const int64_t block = std::clamp(share, kTokenUnit, kMostTokens), blocks = (num_tokens + block - 1) / block;
  const int64_t wanted_parts = blocks > 0 && blocks < threads ? (threads + blocks - 1) / blocks : 1;
  const int64_t part = round_up((num_experts + wanted_parts - 1) / wanted_parts, kExpertUnit);
  const int64_t parts = (num_experts + part - 1) / part;

  Workspace memory;
  const auto logits = memory.reserve<float>(checked_product(num_tokens, num_experts));
  const auto counts = memory.reserve<int32_t>(checked_product(threads, num_experts));
  memory.allocate();
  const Call call{router, routes, kernels_for(router.scalar, router.scalar), memory[logits], memory[counts]};
  std::fill_n(call.counts, threads * num_experts, 0);
  const auto tokens_of = [&](int64_t index) { return std::min(block, num_tokens - index * block); };
  parallel_for(blocks * parts, threads, [&](int64_t task, int thread) {
    const int64_t index = task / parts, expert = task % parts * part;
    call.multiply(index * block, tokens_of(index), expert, std::min(part, num_experts - expert));
    if (parts == 1) call.choose(index * block, tokens_of(index), thread);
  });
  for (int64_t index = 0; parts > 1 && index < blocks; ++index) call.choose(index * block, tokens_of(index), 0);
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    int32_t sum = 0;
    for (int thread = 0; thread < threads; ++thread) sum += call.counts[thread * num_experts + expert];
    routes.tokens_per_expert[expert] = sum;
  }
}

}  // namespace flex
