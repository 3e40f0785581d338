// The backward of experts.h. With A = act(Z_gate) * Z_up and c_t = 1 or 1 - s_t:
//   row r = (t, k):  dA'_r = D_e^T dY_t   dw_r = c_t <dA'_r, A_r>   dZ_r = glu'(Z_r; w_r c_t dA'_r)   dX_t += [G;U]^T dZ_r
//   graft row t:     the same with s_t    ds_t = <dA'_t, A_t> (convex: - sum_k w_tk <dA'_r, A_r>)
//   dlogit_t = s_t (1 - s_t) ds_t   d[G_g; U_g] = dZ^T X   dD_g = (s dY)^T A
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_features.h"
#include "experts.h"
#include "grouped_gemm.h"
#include "parallel.h"
#include "row_plan.h"
#include "workspace.h"

namespace flex {
namespace {

constexpr int64_t kTokensPerTask = 64;
// Product::index: of an expert its first row, else
constexpr int64_t kGraft = -1, kGraftGateUp = -2, kGraftDown = -3;

struct Backward {
  const Layer& layer;
  const Kernels& kernels;
  const void* const d_out;
  const Gradients gradients;
  const int threads;
  const bool routed, grafted;        // whose rows are needed
  const bool d_graft_weights;
  const int64_t dot_blocks, graft_dot_blocks;  // partial sums of <dA', A> per row
  Workspace memory;
  Workspace::Piece<int32_t> token_of_row, row_of_pair;
  Workspace::Piece<char> d_z, graft_d_z, graft_activations;
  Workspace::Piece<float> dots, graft_dots, d_rows, graft_d_rows, openings, slot_weights, scratch;
  Workspace::Piece<const float*> slot_rows;

  Backward(const Layer& layer, const void* d_out, const Gradients& gradients, int threads)
      : layer(layer),
        kernels(kernels_for(layer.scalar, layer.weight_scalar)),
        d_out(d_out),
        gradients(gradients),
        threads(usable_threads(threads)),
        routed(gradients.hidden_states || gradients.routing_weights || (gradients.graft_logits && layer.convex)),
        grafted(layer.has_graft() &&
                (gradients.hidden_states || gradients.graft_gate_up_proj || gradients.graft_logits)),
        d_graft_weights(grafted && gradients.graft_gate_up_proj),
        dot_blocks(column_blocks(layer.intermediate_size, false)),
        graft_dot_blocks(column_blocks(std::max<int64_t>(layer.graft_width, 0), false)) {
    const int64_t num_pairs = checked_product(layer.num_tokens, layer.top_k), slots = layer.top_k + 1;
    const int64_t rows = routed ? num_pairs : 0, graft_rows = grafted ? layer.num_tokens : 0;
    const int64_t graft_width = std::max<int64_t>(layer.graft_width, 0), bytes = scalar_bytes(layer.scalar);
    const bool hidden = gradients.hidden_states != nullptr;
    token_of_row = memory.reserve<int32_t>(num_pairs);
    row_of_pair = memory.reserve<int32_t>(num_pairs);
    openings = memory.reserve<float>(layer.has_graft() ? layer.num_tokens : 0);
    dots = memory.reserve<float>(checked_product(rows, dot_blocks));
    graft_dots = memory.reserve<float>(checked_product(graft_rows, graft_dot_blocks));
    d_z = memory.reserve<char>(hidden ? checked_product(rows, checked_product(layer.intermediate_size, 2 * bytes)) : 0);
    graft_d_z = memory.reserve<char>(checked_product(graft_rows, checked_product(graft_width, 2 * bytes)));
    graft_activations =
        memory.reserve<char>(d_graft_weights ? checked_product(graft_rows, checked_product(graft_width, bytes)) : 0);
    d_rows = memory.reserve<float>(hidden ? checked_product(rows, layer.hidden_size) : 0);
    graft_d_rows = memory.reserve<float>(hidden ? checked_product(graft_rows, layer.hidden_size) : 0);
    slot_weights = memory.reserve<float>(slots);
    slot_rows = memory.reserve<const float*>(checked_product(this->threads, slots));
    scratch = memory.reserve<float>(checked_product(this->threads, most_scratch()));
  }

  // Every expert may get every pair; only the shapes matter.
  int64_t most_scratch() const {
    const int64_t num_pairs = layer.num_tokens * layer.top_k;
    std::vector<Product> products{down_product(0, num_pairs, 0), up_product(0, num_pairs, 0)};
    if (grafted) products.insert(products.end(), {graft_down_product(), graft_up_product()});
    if (d_graft_weights) add_graft_weight_products(products);
    return scratch_floats(kernels, products);
  }

  // dA' = dY D
  Product down_product(int64_t expert, int64_t rows, int64_t first) const {
    const int32_t* gather = memory[token_of_row];
    const int64_t width = layer.intermediate_size;
    const void* weights = row_of(layer.down_proj, expert * layer.hidden_size, width, layer.weight_scalar);
    const Operand a{{d_out, layer.hidden_size, gather + first}, layer.scalar, true};
    const Operand b{{weights, width, nullptr}, layer.weight_scalar, false};
    return {a, b, rows, width, layer.hidden_size, 0, first};
  }
  Product graft_down_product() const {
    const Operand a{{d_out, layer.hidden_size, nullptr}, layer.scalar, true};
    const Operand b{{layer.graft_down_proj, layer.graft_width, nullptr}, layer.scalar, false};
    return {a, b, layer.num_tokens, layer.graft_width, layer.hidden_size, 0, kGraft};
  }
  // dX = dZ [G; U]
  Product up_product(int64_t expert, int64_t rows, int64_t first) const {
    const int64_t width = 2 * layer.intermediate_size, hidden = layer.hidden_size;
    const void* weights = row_of(layer.gate_up_proj, expert * width, hidden, layer.weight_scalar);
    const Operand a{{row_of(memory[d_z], first, width, layer.scalar), width, nullptr}, layer.scalar, true};
    const Operand b{{weights, hidden, nullptr}, layer.weight_scalar, false};
    return {a, b, rows, hidden, width, 0, first};
  }
  Product graft_up_product() const {
    const int64_t width = 2 * layer.graft_width, hidden = layer.hidden_size;
    const Operand a{{memory[graft_d_z], width, nullptr}, layer.scalar, true};
    const Operand b{{layer.graft_gate_up_proj, hidden, nullptr}, layer.scalar, false};
    return {a, b, layer.num_tokens, hidden, width, 0, kGraft};
  }
  // d[G_g; U_g] = dZ^T X,  dD_g = (s dY)^T A: the tokens are the depth
  void add_graft_weight_products(std::vector<Product>& products) const {
    const int64_t width = layer.graft_width, hidden = layer.hidden_size, tokens = layer.num_tokens;
    const Operand d_z_t{{memory[graft_d_z], 2 * width, nullptr}, layer.scalar, false};
    const Operand x{{layer.hidden_states, hidden, nullptr}, layer.scalar, false};
    products.push_back({d_z_t, x, 2 * width, hidden, tokens, 0, kGraftGateUp});
    const Operand d_out_t{{d_out, hidden, nullptr}, layer.scalar, false, memory[openings]};
    const Operand activations{{memory[graft_activations], width, nullptr}, layer.scalar, false};
    products.push_back({d_out_t, activations, hidden, width, tokens, 0, kGraftDown});
  }

  template <class OfExpert>
  void add_expert_products(std::vector<Product>& products, const OfExpert& of_expert) const {
    if (!routed) return;
    for (int64_t expert = 0; expert < layer.num_experts; ++expert) {
      const int64_t first = layer.expert_offsets[expert], rows = layer.expert_offsets[expert + 1] - first;
      if (rows > 0) products.push_back(of_expert(expert, rows, first));
    }
  }

  float closing(int64_t token) const {
    return layer.convex && layer.has_graft() ? 1.f - memory[openings][token] : 1.f;
  }

  // dA', <dA', A>, dZ, and the graft's A
  void through_activations(const void* preactivations, const void* graft_preactivations) {
    std::vector<Product> products;
    if (grafted) products.push_back(graft_down_product());
    add_expert_products(products, [this](int64_t expert, int64_t rows, int64_t first) {
      return down_product(expert, rows, first);
    });
    const auto d_glu = kernels.d_glu[static_cast<int>(layer.scalar)];
    grouped_gemm(kernels, products, threads, memory[scratch], [&](const Block& block) {
      const bool graft = block.product.index == kGraft;
      const int64_t width = block.product.columns, first = block.row + (graft ? 0 : block.product.index);
      const int64_t up = width * scalar_bytes(layer.scalar), begin = block.column * scalar_bytes(layer.scalar);
      const int64_t blocks = graft ? graft_dot_blocks : dot_blocks;
      for (int64_t row = first; row < first + block.rows; ++row) {
        const char* const gate = row_of(graft ? graft_preactivations : preactivations, row, 2 * width, layer.scalar);
        char* const d_z_rows = graft ? memory[graft_d_z] : memory[d_z];
        char* const d_gate = d_z_rows ? row_of(d_z_rows, row, 2 * width, layer.scalar) + begin : nullptr;
        char* const kept = graft && d_graft_weights
                               ? row_of(memory[graft_activations], row, width, layer.scalar) + begin
                               : nullptr;
        const float weight = graft ? memory[openings][row]
                                   : layer.routing_weights[layer.sorted_pairs[row]] * closing(memory[token_of_row][row]);
        const float dot = d_glu(layer.activation, block.columns, block.c + (row - first) * block.stride, gate + begin,
                                gate + begin + up, weight, d_gate, d_gate ? d_gate + up : nullptr, kept);
        (graft ? memory[graft_dots] : memory[dots])[row * blocks + block.column / column_block(block.product)] = dot;
      }
    });
  }

  // dX by row, and the graft's weight gradients
  void through_projections() {
    std::vector<Product> products;
    if (gradients.hidden_states) {
      if (grafted) products.push_back(graft_up_product());
      add_expert_products(products, [this](int64_t expert, int64_t rows, int64_t first) {
        return up_product(expert, rows, first);
      });
    }
    if (d_graft_weights) add_graft_weight_products(products);
    const auto convert = kernels.sum_rows[static_cast<int>(layer.scalar)];
    grouped_gemm(kernels, products, threads, memory[scratch], [&](const Block& block) {
      const int64_t kind = block.product.index, width = block.product.columns;
      const int64_t first = block.row + std::max<int64_t>(kind, 0);
      for (int64_t i = 0; i < block.rows; ++i) {
        const float* const c = block.c + i * block.stride;
        if (kind >= kGraft) {
          float* const target = kind == kGraft ? memory[graft_d_rows] : memory[d_rows];
          std::memcpy(target + (first + i) * width + block.column, c, block.columns * sizeof(float));
        } else {
          void* const target = kind == kGraftGateUp ? gradients.graft_gate_up_proj : gradients.graft_down_proj;
          const float one = 1.f;
          convert(block.columns, 1, &c, &one,
                  row_of(target, first + i, width, layer.scalar) + block.column * scalar_bytes(layer.scalar));
        }
      }
    });
  }

  static float sum(const float* values, int64_t count) {
    float total = 0.f;
    for (int64_t i = 0; i < count; ++i) total += values[i];
    return total;
  }

  // dX_t over its rows, dw_tk, dlogit_t
  void gather(int64_t token, const float** rows) {
    int64_t count = 0;
    float d_opening = 0.f;
    for (int64_t pair = token * layer.top_k; pair < (token + 1) * layer.top_k; ++pair) {
      const int64_t row = memory[row_of_pair][pair];
      const float dot = row < 0 || !routed ? 0.f : sum(memory[dots] + row * dot_blocks, dot_blocks);
      if (layer.convex) d_opening -= layer.routing_weights[pair] * dot;
      if (gradients.routing_weights) gradients.routing_weights[pair] = dot * closing(token);
      if (row >= 0 && gradients.hidden_states) rows[count++] = memory[d_rows] + row * layer.hidden_size;
    }
    if (gradients.hidden_states) {
      if (grafted) rows[count++] = memory[graft_d_rows] + token * layer.hidden_size;
      kernels.sum_rows[static_cast<int>(layer.scalar)](
          layer.hidden_size, count, rows, memory[slot_weights],
          row_of(gradients.hidden_states, token, layer.hidden_size, layer.scalar));
    }
    if (gradients.graft_logits) {
      const float opening = memory[openings][token];
      d_opening += sum(memory[graft_dots] + token * graft_dot_blocks, graft_dot_blocks);
      gradients.graft_logits[token] = opening * (1.f - opening) * d_opening;
    }
  }

  void gather() {
    std::fill_n(memory[slot_weights], layer.top_k + 1, 1.f);
    const int64_t tasks = (layer.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      const int64_t end = std::min((task + 1) * kTokensPerTask, layer.num_tokens);
      for (int64_t token = task * kTokensPerTask; token < end; ++token)
        gather(token, memory[slot_rows] + thread * (layer.top_k + 1));
    });
  }
};

}  // namespace

void experts_backward(const Layer& layer, const void* d_out, const void* preactivations,
                      const void* graft_preactivations, const Gradients& gradients, int threads) {
  Backward backward(layer, d_out, gradients, threads);
  backward.memory.allocate();
  fill_row_plan(layer, {backward.memory[backward.token_of_row], backward.memory[backward.row_of_pair]});
  if (layer.has_graft()) fill_openings(layer, backward.memory[backward.openings]);
  backward.through_activations(preactivations, graft_preactivations);
  backward.through_projections();
  backward.gather();
}

int64_t backward_workspace_bytes(const Layer& layer, const Gradients& gradients, int threads) {
  return Backward(layer, nullptr, gradients, threads).memory.bytes();
}

}  // namespace flex
