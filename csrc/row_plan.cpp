#include "row_plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "grouped_gemm.h"
#include "workspace.h"

namespace flex {

// 8 MiB of fp32, 16 with its gradient: within a common last-level cache. Of wide experts more, since each wave reads an
// expert's weights anew.
constexpr int64_t kWaveElements = int64_t{2} << 20, kLeastRows = 5 * kBlockRows;

void fill_row_plan(const Layer& layer, const RowPlan& plan) {
  const int64_t num_pairs = layer.num_tokens * layer.top_k;
  const int32_t* offsets = layer.expert_offsets;
  for (int64_t expert = 0; expert <= layer.num_experts; ++expert) {
    const int64_t least = expert == 0 ? 0 : offsets[expert - 1], most = expert == 0 ? 0 : num_pairs;
    if (offsets[expert] < least || offsets[expert] > most)
      throw std::invalid_argument("expert_offsets[" + std::to_string(expert) + "] is " +
                                  std::to_string(offsets[expert]) + ", expected it to ascend from 0 to at most " +
                                  std::to_string(num_pairs));
  }
  const int64_t num_rows = offsets[layer.num_experts];
  const uint32_t top_k = static_cast<uint32_t>(layer.top_k);
  std::fill(plan.row_of_pair, plan.row_of_pair + num_pairs, -1);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t pair = layer.sorted_pairs[row];
    if (pair < 0 || pair >= num_pairs || plan.row_of_pair[pair] >= 0)
      throw std::invalid_argument("sorted_pairs[" + std::to_string(row) + "] is " + std::to_string(pair) +
                                  ", expected every pair from 0 to " + std::to_string(num_pairs) + " - 1 once");
    plan.row_of_pair[pair] = static_cast<int32_t>(row);
    plan.token_of_row[row] = static_cast<int32_t>(static_cast<uint32_t>(pair) / top_k);
  }
}

void fill_openings(const Layer& layer, float* openings) {
  for (int64_t token = 0; token < layer.num_tokens; ++token)
    openings[token] = 1.f / (1.f + std::exp(-layer.graft_logits[token]));
}

static int64_t wave_elements(const Layer& layer) {
  const int64_t width = std::max(layer.intermediate_size, layer.graft_width);
  return std::max(kWaveElements, checked_product(kLeastRows, width));
}

int64_t most_wave_elements(const Layer& layer, bool routed, bool grafted) {
  const int64_t width = std::max(layer.intermediate_size, layer.graft_width);
  int64_t all = routed ? checked_product(checked_product(layer.num_tokens, layer.top_k), layer.intermediate_size) : 0;
  if (grafted) all = checked_sum(all, checked_product(layer.num_tokens, layer.graft_width));
  return std::min(all, checked_sum(wave_elements(layer), checked_product(kBlockRows, width)));
}

std::vector<Wave> waves_of(const Layer& layer, bool routed, bool grafted) {
  std::vector<Wave> waves(1);
  const int64_t most = wave_elements(layer);
  int64_t place = 0;
  const auto add = [&](int64_t expert, int64_t first, int64_t rows, int64_t width) {
    while (rows > 0) {
      if (place >= most) {
        waves.emplace_back();
        place = 0;
      }
      const int64_t room = round_up((most - place) / std::max<int64_t>(width, 1) + 1, kBlockRows);
      const int64_t taken = std::min(rows, room);
      waves.back().push_back({expert, first, taken, place});
      place += taken * width;
      first += taken;
      rows -= taken;
    }
  };
  if (grafted) add(kGraft, 0, layer.num_tokens, layer.graft_width);
  for (int64_t expert = 0; routed && expert < layer.num_experts; ++expert) {
    const int64_t first = layer.expert_offsets[expert];
    add(expert, first, layer.expert_offsets[expert + 1] - first, layer.intermediate_size);
  }
  return waves;
}

}  // namespace flex
