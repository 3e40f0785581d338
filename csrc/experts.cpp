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

struct Forward {
  const Layer& layer;
  const Kernels& kernels;
  const int threads;
  const int64_t bytes;  // of an activation
  Workspace memory;
  Workspace::Piece<int32_t> token_of_row, row_of_pair;
  Workspace::Piece<char> activations;  // of a wave
  Workspace::Piece<float> expert_out, graft_out, openings, slot_weights, scratch;
  Workspace::Piece<const float*> slot_rows;

  Forward(const Layer& layer, int threads)
      : layer(layer),
        kernels(kernels_for(layer.scalar, layer.weight_scalar)),
        threads(usable_threads(threads, operations_of(layer))),
        bytes(scalar_bytes(layer.scalar)) {
    const int64_t num_pairs = checked_product(layer.num_tokens, layer.top_k), slots = layer.top_k + 1;
    const int64_t graft_rows = layer.has_graft() ? layer.num_tokens : 0;
    token_of_row = memory.reserve<int32_t>(num_pairs);
    row_of_pair = memory.reserve<int32_t>(num_pairs);
    activations = memory.reserve<char>(checked_product(most_wave_elements(layer, true, layer.has_graft()), bytes));
    expert_out = memory.reserve<float>(checked_product(num_pairs, layer.hidden_size));
    graft_out = memory.reserve<float>(checked_product(graft_rows, layer.hidden_size));
    openings = memory.reserve<float>(graft_rows);
    slot_weights = memory.reserve<float>(checked_product(this->threads, slots));
    slot_rows = memory.reserve<const float*>(checked_product(this->threads, slots));
    // Any expert may get all the rows.
    std::vector<Product> products{up_product({0, 0, num_pairs, 0}), down_product({0, 0, num_pairs, 0})};
    if (layer.has_graft()) {
      const Segment whole{kGraft, 0, graft_rows, 0};
      products.insert(products.end(), {up_product(whole), down_product(whole)});
    }
    scratch = memory.reserve<float>(checked_product(this->threads, scratch_floats(kernels, products)));
  }

  int64_t width_of(const Segment& segment) const {
    return segment.expert == kGraft ? layer.graft_width : layer.intermediate_size;
  }
  char* activation_rows(const Segment& segment) const {
    return row_of(memory[activations], segment.place, 1, layer.scalar);
  }

  Product up_product(const Segment& segment) const {
    const bool graft = segment.expert == kGraft;
    const int64_t width = width_of(segment), hidden = layer.hidden_size;
    const int32_t* const gather = memory[token_of_row];
    const Scalar scalar = graft ? layer.scalar : layer.weight_scalar;
    const void* const x = graft ? row_of(layer.hidden_states, segment.first, hidden, layer.scalar) : layer.hidden_states;
    const Rows weights =
        graft ? Rows{layer.graft_gate_up_proj, hidden, nullptr}
              : weight_rows(layer.gate_up_proj, layer.gate_up_scales, segment.expert * 2 * width, hidden, scalar);
    const Operand a{{x, hidden, graft || !gather ? nullptr : gather + segment.first}, layer.scalar, true};
    return {a, {weights, scalar, true}, segment.rows, width, hidden, width};
  }
  Product down_product(const Segment& segment) const {
    const bool graft = segment.expert == kGraft;
    const int64_t width = width_of(segment), hidden = layer.hidden_size;
    const Scalar scalar = graft ? layer.scalar : layer.weight_scalar;
    const Rows weights = graft ? Rows{layer.graft_down_proj, width, nullptr}
                               : weight_rows(layer.down_proj, layer.down_scales, segment.expert * hidden, width, scalar);
    const Operand a{{activation_rows(segment), width, nullptr}, layer.scalar, true};
    return {a, {weights, scalar, true}, segment.rows, hidden, width};
  }

  void multiply(const Wave& wave, Product (Forward::*of_segment)(const Segment&) const, const Epilogue& epilogue) {
    std::vector<Product> products;
    for (const Segment& segment : wave) {
      products.push_back((this->*of_segment)(segment));
      products.back().index = static_cast<int64_t>(products.size()) - 1;
    }
    grouped_gemm(kernels, products, threads, memory[scratch], epilogue);
  }

  // Z = X [G; U]^T, A = act(Z_gate) * Z_up
  void activate(const Wave& wave, void* preactivations, void* graft_preactivations) {
    const auto glu = kernels.glu[static_cast<int>(layer.scalar)];
    multiply(wave, &Forward::up_product, [&](const Block& block) {
      const Segment& segment = wave[block.product.index];
      const int64_t width = block.product.columns;
      void* const kept = segment.expert == kGraft ? graft_preactivations : preactivations;
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = block.row + i;
        char* const gate =
            kept ? row_of(kept, segment.first + row, 2 * width, layer.scalar) + block.column * bytes : nullptr;
        glu(layer.activation, block.columns, block.c + i * block.stride, block.twin + i * block.stride, gate,
            kept ? gate + width * bytes : nullptr,
            row_of(activation_rows(segment), row, width, layer.scalar) + block.column * bytes);
      }
    });
  }

  // Y = A D^T, in fp32 rows
  void project(const Wave& wave) {
    multiply(wave, &Forward::down_product, [&](const Block& block) {
      const Segment& segment = wave[block.product.index];
      float* const target = segment.expert == kGraft ? memory[graft_out] : memory[expert_out];
      for (int64_t i = 0; i < block.rows; ++i)
        std::memcpy(target + (segment.first + block.row + i) * layer.hidden_size + block.column,
                    block.c + i * block.stride, block.columns * sizeof(float));
    });
  }

  // out_t = c_t sum_k w_tk Y_tk + s_t Y_gt
  void combine(int64_t token, const float** rows, float* weights, void* out) {
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

  void run(void* out, void* preactivations, void* graft_preactivations) {
    memory.allocate();
    if (preactivations) expect_writes(preactivations, layer.num_tokens * layer.top_k * 2 * layer.intermediate_size * bytes);
    fill_row_plan(layer, {memory[token_of_row], memory[row_of_pair]});
    if (layer.has_graft()) fill_openings(layer, memory[openings]);
    for (const Wave& wave : waves_of(layer, true, layer.has_graft())) {
      activate(wave, preactivations, graft_preactivations);
      if (out) project(wave);
    }
    if (!out) return;
    const int64_t tasks = (layer.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      const int64_t slots = thread * (layer.top_k + 1);
      const int64_t end = std::min((task + 1) * kTokensPerTask, layer.num_tokens);
      for (int64_t token = task * kTokensPerTask; token < end; ++token)
        combine(token, memory[slot_rows] + slots, memory[slot_weights] + slots, out);
    });
  }
};

}  // namespace

void experts_forward(const Layer& layer, void* out, void* preactivations, void* graft_preactivations, int threads) {
  Forward(layer, threads).run(out, preactivations, graft_preactivations);
  if (preactivations == nullptr) return;
  // Rows of nobody here: defined, so that outputs can be compared.
  const int64_t num_pairs = layer.num_tokens * layer.top_k, num_rows = layer.expert_offsets[layer.num_experts];
  const int64_t width = 2 * layer.intermediate_size;
  std::memset(row_of(preactivations, num_rows, width, layer.scalar), 0,
              (num_pairs - num_rows) * width * scalar_bytes(layer.scalar));
}

int64_t forward_workspace_bytes(const Layer& layer, int threads) { return Forward(layer, threads).memory.bytes(); }

}  // namespace flex
