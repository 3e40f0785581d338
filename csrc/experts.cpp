#include "experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_features.h"
#include "grouped_gemm.h"
#include "parallel.h"
#include "row_plan.h"
#include "workspace.h"

namespace flex {
namespace {

constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kGraft = -1;  // Product::index of the graft; of an expert: its first row

struct Forward {
  const Layer& layer;
  const Kernels& kernels;
  int threads;
  Workspace memory;
  Workspace::Piece<int32_t> token_of_row, row_of_pair;
  Workspace::Piece<char> activations, graft_activations;
  Workspace::Piece<float> expert_out, graft_out, openings, slot_weights, scratch;
  Workspace::Piece<const float*> slot_rows;

  Forward(const Layer& layer, int threads)
      : layer(layer), kernels(kernels_for(layer.scalar, layer.weight_scalar)), threads(usable_threads(threads)) {
    const int64_t num_pairs = checked_product(layer.num_tokens, layer.top_k);
    const int64_t slots = layer.top_k + 1, graft_rows = layer.has_graft() ? layer.num_tokens : 0;
    const int64_t bytes = scalar_bytes(layer.scalar);
    token_of_row = memory.reserve<int32_t>(num_pairs);
    row_of_pair = memory.reserve<int32_t>(num_pairs);
    activations = memory.reserve<char>(checked_product(num_pairs, checked_product(layer.intermediate_size, bytes)));
    graft_activations = memory.reserve<char>(checked_product(graft_rows, checked_product(std::max<int64_t>(layer.graft_width, 0), bytes)));
    expert_out = memory.reserve<float>(checked_product(num_pairs, layer.hidden_size));
    graft_out = memory.reserve<float>(checked_product(graft_rows, layer.hidden_size));
    openings = memory.reserve<float>(graft_rows);
    slot_weights = memory.reserve<float>(checked_product(this->threads, slots));
    slot_rows = memory.reserve<const float*>(checked_product(this->threads, slots));
    scratch = memory.reserve<float>(checked_product(this->threads, most_scratch()));
  }

  // Every expert may get every pair; only the shapes matter.
  int64_t most_scratch() const {
    const int64_t num_pairs = layer.num_tokens * layer.top_k;
    std::vector<Product> products{up_product(0, num_pairs, 0), down_product(0, num_pairs, 0)};
    if (layer.has_graft()) products.insert(products.end(), {graft_up_product(), graft_down_product()});
    return scratch_floats(kernels, products);
  }

  Product up_product(int64_t expert, int64_t rows, int64_t first) const {
    const int32_t* gather = memory[token_of_row];
    const void* weights = row_of(layer.gate_up_proj, expert * 2 * layer.intermediate_size, layer.hidden_size,
                                 layer.weight_scalar);
    const Operand a{{layer.hidden_states, layer.hidden_size, gather + first}, layer.scalar, true};
    const Operand b{{weights, layer.hidden_size, nullptr}, layer.weight_scalar, true};
    return {a, b, rows, layer.intermediate_size, layer.hidden_size, layer.intermediate_size, first};
  }
  Product graft_up_product() const {
    const Operand a{{layer.hidden_states, layer.hidden_size, nullptr}, layer.scalar, true};
    const Operand b{{layer.graft_gate_up_proj, layer.hidden_size, nullptr}, layer.scalar, true};
    return {a, b, layer.num_tokens, layer.graft_width, layer.hidden_size, layer.graft_width, kGraft};
  }
  Product down_product(int64_t expert, int64_t rows, int64_t first) const {
    const int64_t width = layer.intermediate_size;
    const void* weights = row_of(layer.down_proj, expert * layer.hidden_size, width, layer.weight_scalar);
    const Operand a{{row_of(memory[activations], first, width, layer.scalar), width, nullptr}, layer.scalar, true};
    const Operand b{{weights, width, nullptr}, layer.weight_scalar, true};
    return {a, b, rows, layer.hidden_size, width, 0, first};
  }
  Product graft_down_product() const {
    const Operand a{{memory[graft_activations], layer.graft_width, nullptr}, layer.scalar, true};
    const Operand b{{layer.graft_down_proj, layer.graft_width, nullptr}, layer.scalar, true};
    return {a, b, layer.num_tokens, layer.hidden_size, layer.graft_width, 0, kGraft};
  }

  template <class OfExpert>
  std::vector<Product> products(const OfExpert& of_expert, const Product& of_graft) const {
    std::vector<Product> list;
    if (layer.has_graft()) list.push_back(of_graft);
    for (int64_t expert = 0; expert < layer.num_experts; ++expert) {
      const int64_t first = layer.expert_offsets[expert], rows = layer.expert_offsets[expert + 1] - first;
      if (rows > 0) list.push_back(of_expert(expert, rows, first));
    }
    return list;
  }

  // Z = X [G; U]^T, A = act(Z_gate) * Z_up
  void activate(void* preactivations, void* graft_preactivations) {
    const auto of_expert = [this](int64_t expert, int64_t rows, int64_t first) {
      return up_product(expert, rows, first);
    };
    const auto glu = kernels.glu[static_cast<int>(layer.scalar)];
    const auto epilogue = [&](const Block& block) {
      const bool graft = block.product.index == kGraft;
      const int64_t width = block.product.columns, first = graft ? 0 : block.product.index;
      void* const kept = graft ? graft_preactivations : preactivations;
      void* const target = graft ? memory[graft_activations] : memory[activations];
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = first + block.row + i, bytes = scalar_bytes(layer.scalar);
        char* const gate = kept ? row_of(kept, row, 2 * width, layer.scalar) + block.column * bytes : nullptr;
        char* const activation = row_of(target, row, width, layer.scalar) + block.column * bytes;
        glu(layer.activation, block.columns, block.c + i * block.stride, block.twin + i * block.stride, gate,
            kept ? gate + width * bytes : nullptr, activation);
      }
    };
    grouped_gemm(kernels, products(of_expert, layer.has_graft() ? graft_up_product() : Product{}), threads,
                 memory[scratch], epilogue);
  }

  // Y = A D^T, in fp32 rows
  void project() {
    const auto of_expert = [this](int64_t expert, int64_t rows, int64_t first) {
      return down_product(expert, rows, first);
    };
    const auto epilogue = [&](const Block& block) {
      const bool graft = block.product.index == kGraft;
      float* const target = graft ? memory[graft_out] : memory[expert_out];
      const int64_t first = block.row + (graft ? 0 : block.product.index);
      for (int64_t i = 0; i < block.rows; ++i)
        std::memcpy(target + (first + i) * layer.hidden_size + block.column, block.c + i * block.stride,
                    block.columns * sizeof(float));
    };
    grouped_gemm(kernels, products(of_expert, layer.has_graft() ? graft_down_product() : Product{}), threads,
                 memory[scratch], epilogue);
  }

  // out_t = c_t sum_k w_tk Y_tk + s_t Y_gt
  void combine(void* out) {
    const int64_t tasks = (layer.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      const float** const rows = memory[slot_rows] + thread * (layer.top_k + 1);
      float* const weights = memory[slot_weights] + thread * (layer.top_k + 1);
      const int64_t end = std::min((task + 1) * kTokensPerTask, layer.num_tokens);
      for (int64_t token = task * kTokensPerTask; token < end; ++token) {
        const float opening = layer.has_graft() ? memory[openings][token] : 0.f;
        const float closing = layer.convex ? 1.f - opening : 1.f;
        int64_t count = 0;
        for (int64_t pair = token * layer.top_k; pair < (token + 1) * layer.top_k; ++pair) {
          if (memory[row_of_pair][pair] < 0) continue;
          weights[count] = layer.routing_weights[pair] * closing;
          rows[count++] = memory[expert_out] + memory[row_of_pair][pair] * layer.hidden_size;
        }
        if (layer.has_graft()) {
          weights[count] = opening;
          rows[count++] = memory[graft_out] + token * layer.hidden_size;
        }
        kernels.sum_rows[static_cast<int>(layer.scalar)](layer.hidden_size, count, rows, weights,
                                                         row_of(out, token, layer.hidden_size, layer.scalar));
      }
    });
  }
};

}  // namespace

void experts_forward(const Layer& layer, void* out, void* preactivations, void* graft_preactivations, int threads) {
  Forward forward(layer, threads);
  forward.memory.allocate();
  fill_row_plan(layer, {forward.memory[forward.token_of_row], forward.memory[forward.row_of_pair]});
  if (layer.has_graft()) fill_openings(layer, forward.memory[forward.openings]);
  if (preactivations != nullptr) {  // rows of nobody here: defined, so that the outputs can be compared
    const int64_t num_pairs = layer.num_tokens * layer.top_k, num_rows = layer.expert_offsets[layer.num_experts];
    const int64_t width = 2 * layer.intermediate_size;
    std::memset(row_of(preactivations, num_rows, width, layer.scalar), 0,
                (num_pairs - num_rows) * width * scalar_bytes(layer.scalar));
  }
  forward.activate(preactivations, graft_preactivations);
  forward.project();
  forward.combine(out);
}

int64_t forward_workspace_bytes(const Layer& layer, int threads) { return Forward(layer, threads).memory.bytes(); }

}  // namespace flex
