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
enum Kind { kRows, kGraftGateUp, kGraftDown };  // Product::kind

struct Backward {
  const Layer& layer;
  const Kernels& kernels;
  const void* const d_out;
  const Gradients gradients;
  const int threads;
  const int64_t bytes;         // of an activation
  const bool routed, grafted;  // whose rows are needed
  const bool d_graft_weights;
  const int64_t graft_width;
  const int64_t dot_units, graft_dot_units;  // partial sums of <dA', A> per row
  Workspace memory;
  Workspace::Piece<int32_t> token_of_row, row_of_pair;
  Workspace::Piece<char> d_z, activations;  // of a wave; activations of its graft rows
  Workspace::Piece<float> dots, graft_dots, d_rows, graft_d_rows, openings, ones, scratch;
  Workspace::Piece<float> d_gate_up, d_down;  // of the graft, summed over the waves
  Workspace::Piece<const float*> slot_rows;

  Backward(const Layer& layer, const void* d_out, const Gradients& gradients, int threads)
      : layer(layer),
        kernels(kernels_for(layer.scalar, layer.weight_scalar)),
        d_out(d_out),
        gradients(gradients),
        threads(usable_threads(threads, operations_of(layer))),
        bytes(scalar_bytes(layer.scalar)),
        routed(gradients.hidden_states || gradients.routing_weights || (gradients.graft_logits && layer.convex)),
        grafted(layer.has_graft() &&
                (gradients.hidden_states || gradients.graft_gate_up_proj || gradients.graft_logits)),
        d_graft_weights(grafted && gradients.graft_gate_up_proj),
        graft_width(std::max<int64_t>(layer.graft_width, 0)),
        dot_units(column_units(layer.intermediate_size)),
        graft_dot_units(column_units(graft_width)) {
    const int64_t num_pairs = checked_product(layer.num_tokens, layer.top_k), hidden = layer.hidden_size;
    const int64_t rows = routed ? num_pairs : 0, graft_rows = grafted ? layer.num_tokens : 0;
    const bool d_hidden = gradients.hidden_states != nullptr;
    token_of_row = memory.reserve<int32_t>(num_pairs);
    row_of_pair = memory.reserve<int32_t>(num_pairs);
    openings = memory.reserve<float>(layer.has_graft() ? layer.num_tokens : 0);
    dots = memory.reserve<float>(checked_product(rows, dot_units));
    graft_dots = memory.reserve<float>(checked_product(graft_rows, graft_dot_units));
    const int64_t wave = most_wave_elements(layer, routed, grafted);
    const int64_t graft_wave = d_graft_weights ? most_wave_elements(layer, false, true) : 0;
    d_z = memory.reserve<char>(d_hidden || d_graft_weights ? checked_product(wave, 2 * bytes) : 0);
    activations = memory.reserve<char>(checked_product(graft_wave, bytes));
    d_gate_up = memory.reserve<float>(d_graft_weights ? checked_product(2 * graft_width, hidden) : 0);
    d_down = memory.reserve<float>(d_graft_weights ? checked_product(graft_width, hidden) : 0);
    d_rows = memory.reserve<float>(d_hidden ? checked_product(rows, hidden) : 0);
    graft_d_rows = memory.reserve<float>(d_hidden ? checked_product(graft_rows, hidden) : 0);
    ones = memory.reserve<float>(std::max<int64_t>(layer.top_k + 1, 2));
    slot_rows = memory.reserve<const float*>(checked_product(this->threads, layer.top_k + 1));
    // Any expert may get all the rows.
    std::vector<Product> products{down_product({0, 0, num_pairs, 0}), up_product({0, 0, num_pairs, 0})};
    if (grafted) {
      const Segment whole{kGraft, 0, graft_rows, 0};
      products.insert(products.end(), {down_product(whole), up_product(whole)});
      if (d_graft_weights) add_weight_products(whole, products);
    }
    scratch = memory.reserve<float>(checked_product(this->threads, scratch_floats(kernels, products)));
  }

  int64_t width_of(const Segment& segment) const {
    return segment.expert == kGraft ? graft_width : layer.intermediate_size;
  }
  char* d_z_rows(const Segment& segment) const { return row_of(memory[d_z], 2 * segment.place, 1, layer.scalar); }
  // The graft's segment comes first in its wave.
  char* activation_rows(const Segment& segment) const {
    return row_of(memory[activations], segment.place, 1, layer.scalar);
  }

  // dA' = dY D
  Product down_product(const Segment& segment) const {
    const bool graft = segment.expert == kGraft;
    const int64_t width = width_of(segment), hidden = layer.hidden_size;
    const int32_t* const gather = memory[token_of_row];
    const Scalar scalar = graft ? layer.scalar : layer.weight_scalar;
    const void* const d_y = graft ? row_of(d_out, segment.first, hidden, layer.scalar) : d_out;
    const Rows weights = graft ? Rows{layer.graft_down_proj, width, nullptr}
                               : weight_rows(layer.down_proj, layer.down_scales, segment.expert * hidden, width, scalar);
    const Operand a{{d_y, hidden, graft || !gather ? nullptr : gather + segment.first}, layer.scalar, true};
    return {a, {weights, scalar, false}, segment.rows, width, hidden};
  }
  // dX = dZ [G; U]
  Product up_product(const Segment& segment) const {
    const bool graft = segment.expert == kGraft;
    const int64_t width = 2 * width_of(segment), hidden = layer.hidden_size;
    const Scalar scalar = graft ? layer.scalar : layer.weight_scalar;
    const Rows weights =
        graft ? Rows{layer.graft_gate_up_proj, hidden, nullptr}
              : weight_rows(layer.gate_up_proj, layer.gate_up_scales, segment.expert * width, hidden, scalar);
    const Operand a{{d_z_rows(segment), width, nullptr}, layer.scalar, true};
    return {a, {weights, scalar, false}, segment.rows, hidden, width};
  }
  // d[G_g; U_g] = dZ^T X,  dD_g = (s dY)^T A: the tokens are the depth
  void add_weight_products(const Segment& segment, std::vector<Product>& products) const {
    const int64_t hidden = layer.hidden_size;
    const float* const scale = memory[openings];
    const Operand d_z_t{{d_z_rows(segment), 2 * graft_width, nullptr}, layer.scalar, false};
    const Operand x{{row_of(layer.hidden_states, segment.first, hidden, layer.scalar), hidden, nullptr}, layer.scalar, false};
    products.push_back({d_z_t, x, 2 * graft_width, hidden, segment.rows, 0, 0, kGraftGateUp});
    const Operand d_out_t{{row_of(d_out, segment.first, hidden, layer.scalar), hidden, nullptr},
                          layer.scalar,
                          false,
                          scale ? scale + segment.first : nullptr};
    const Operand a{{activation_rows(segment), graft_width, nullptr}, layer.scalar, false};
    products.push_back({d_out_t, a, hidden, graft_width, segment.rows, 0, 0, kGraftDown});
  }

  float closing(int64_t token) const {
    return layer.convex && layer.has_graft() ? 1.f - memory[openings][token] : 1.f;
  }

  // dA', <dA', A>, dZ, and the graft's A
  void through_activations(const Wave& wave, const void* preactivations, const void* graft_preactivations) {
    std::vector<Product> products;
    for (const Segment& segment : wave) {
      products.push_back(down_product(segment));
      products.back().index = static_cast<int64_t>(products.size()) - 1;
    }
    const auto d_glu = kernels.d_glu[static_cast<int>(layer.scalar)];
    const bool d_z_wanted = gradients.hidden_states || d_graft_weights;
    grouped_gemm(kernels, products, threads, memory[scratch], [&](const Block& block) {
      const Segment& segment = wave[block.product.index];
      const bool graft = segment.expert == kGraft;
      const int64_t width = block.product.columns, up = width * bytes;
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = segment.first + block.row + i;
        const float weight = graft ? memory[openings][row]
                                   : layer.routing_weights[layer.sorted_pairs[row]] * closing(memory[token_of_row][row]);
        float* const row_dots = graft ? memory[graft_dots] + row * graft_dot_units : memory[dots] + row * dot_units;
        const char* const z = row_of(graft ? graft_preactivations : preactivations, row, 2 * width, layer.scalar);
        char* const d_z_row = row_of(d_z_rows(segment), block.row + i, 2 * width, layer.scalar);
        char* const a_row = row_of(activation_rows(segment), block.row + i, width, layer.scalar);
        for (int64_t j = 0; j < block.columns; j += kColumnUnit) {
          const int64_t column = block.column + j, at = column * bytes;
          row_dots[column / kColumnUnit] =
              d_glu(layer.activation, std::min(kColumnUnit, block.columns - j), block.c + i * block.stride + j, z + at,
                    z + at + up, weight, d_z_wanted ? d_z_row + at : nullptr, d_z_wanted ? d_z_row + at + up : nullptr,
                    graft && d_graft_weights ? a_row + at : nullptr);
        }
      }
    });
  }

  // dX by row, and the graft's weight gradients
  void through_projections(const Wave& wave) {
    std::vector<Product> products;
    for (const Segment& segment : wave) {
      if (d_graft_weights && segment.expert == kGraft) add_weight_products(segment, products);
      if (gradients.hidden_states) {
        products.push_back(up_product(segment));
        products.back().index = &segment - wave.data();
      }
    }
    grouped_gemm(kernels, products, threads, memory[scratch], [&](const Block& block) {
      if (block.product.kind != kRows) return add_weight_block(block, wave.front());
      const Segment& segment = wave[block.product.index];
      float* const target = segment.expert == kGraft ? memory[graft_d_rows] : memory[d_rows];
      for (int64_t i = 0; i < block.rows; ++i)
        std::memcpy(target + (segment.first + block.row + i) * layer.hidden_size + block.column,
                    block.c + i * block.stride, block.columns * sizeof(float));
    });
  }

  // Sums over the waves in fp32; the last one writes the gradient.
  void add_weight_block(const Block& block, const Segment& segment) {
    const bool gate_up = block.product.kind == kGraftGateUp, last = segment.first + segment.rows == layer.num_tokens;
    const int64_t width = block.product.columns, count = segment.first > 0 ? 2 : 1;
    void* const gradient = gate_up ? gradients.graft_gate_up_proj : gradients.graft_down_proj;
    float* const sums = gate_up ? memory[d_gate_up] : memory[d_down];
    const Scalar scalar = last ? layer.scalar : Scalar::kFloat32;
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = block.row + i;
      const float* const rows[] = {block.c + i * block.stride, sums + row * width + block.column};
      char* const target = row_of(last ? gradient : sums, row, width, scalar) + block.column * scalar_bytes(scalar);
      kernels.sum_rows[static_cast<int>(scalar)](block.columns, count, rows, memory[ones], target);
    }
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
      const float dot = row < 0 || !routed ? 0.f : sum(memory[dots] + row * dot_units, dot_units);
      if (layer.convex) d_opening -= layer.routing_weights[pair] * dot;
      if (gradients.routing_weights) gradients.routing_weights[pair] = dot * closing(token);
      if (row >= 0 && gradients.hidden_states) rows[count++] = memory[d_rows] + row * layer.hidden_size;
    }
    if (gradients.hidden_states) {
      if (grafted) rows[count++] = memory[graft_d_rows] + token * layer.hidden_size;
      kernels.sum_rows[static_cast<int>(layer.scalar)](
          layer.hidden_size, count, rows, memory[ones],
          row_of(gradients.hidden_states, token, layer.hidden_size, layer.scalar));
    }
    if (gradients.graft_logits) {
      const float opening = memory[openings][token];
      d_opening += sum(memory[graft_dots] + token * graft_dot_units, graft_dot_units);
      gradients.graft_logits[token] = opening * (1.f - opening) * d_opening;
    }
  }

  void run(const void* preactivations, const void* graft_preactivations) {
    memory.allocate();
    fill_row_plan(layer, {memory[token_of_row], memory[row_of_pair]});
    if (layer.has_graft()) fill_openings(layer, memory[openings]);
    std::fill_n(memory[ones], std::max<int64_t>(layer.top_k + 1, 2), 1.f);
    if (d_graft_weights && layer.num_tokens == 0) {  // nothing to sum, and no wave to write it
      std::memset(gradients.graft_gate_up_proj, 0, 2 * graft_width * layer.hidden_size * bytes);
      std::memset(gradients.graft_down_proj, 0, graft_width * layer.hidden_size * bytes);
    }
    for (const Wave& wave : waves_of(layer, routed, grafted)) {
      through_activations(wave, preactivations, graft_preactivations);
      through_projections(wave);
    }
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
  Backward(layer, d_out, gradients, threads).run(preactivations, graft_preactivations);
}

int64_t backward_workspace_bytes(const Layer& layer, const Gradients& gradients, int threads) {
  return Backward(layer, nullptr, gradients, threads).memory.bytes();
}

}  // namespace flex
