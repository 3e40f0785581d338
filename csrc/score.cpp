// Both scores walk the tokens in chunks and the experts in groups, so that the activations of one step stay small. A
// step is two grouped products: X -> A, then A -> E_i(X) (experts) or F -> F D (neurons); sums over tokens are taken
// over blocks of rows that do not depend on the threads, then in order.
#include "score.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "grouped_gemm.h"
#include "parallel.h"
#include "row_plan.h"
#include "workspace.h"

namespace flex {
namespace {

constexpr int64_t kChunkTokens = 20 * kBlockRows;
constexpr int64_t kGroupBytes = int64_t{32} << 20;  // of activations: the size of a last-level cache

struct Step {
  const Scoring& scoring;
  const Kernels& kernels;
  const int threads;
  const int64_t chunk, group;  // tokens, experts
  Workspace memory;
  Workspace::Piece<char> activations;  // [group, chunk, I]
  Workspace::Piece<float> partial, scratch;
  int64_t first_token = 0, tokens = 0, first_expert = 0, experts = 0;

  // `row_partials`, `block_partials`: floats of partial sums per token and per block of rows, of one expert.
  Step(const Scoring& scoring, int threads, int64_t row_partials, int64_t block_partials)
      : scoring(scoring),
        kernels(kernels_for(scoring.scalar, scoring.weight_scalar)),
        threads(usable_threads(threads)),
        chunk(std::min(scoring.num_tokens, kChunkTokens)),
        group(std::clamp<int64_t>(kGroupBytes / std::max<int64_t>(1, checked_product(chunk, scoring.intermediate_size) *
                                                                         scalar_bytes(scoring.scalar)),
                                  1, std::max<int64_t>(scoring.num_experts, 1))) {
    const int64_t blocks = (chunk + kBlockRows - 1) / kBlockRows;
    const int64_t row_bytes = checked_product(scoring.intermediate_size, scalar_bytes(scoring.scalar));
    activations = memory.reserve<char>(checked_product(checked_product(group, chunk), row_bytes));
    partial = memory.reserve<float>(checked_product(group, chunk * row_partials + blocks * block_partials));
    tokens = chunk;
    const std::vector<Product> products{up_product(0), down_product(0), target_product(0)};
    scratch = memory.reserve<float>(checked_product(this->threads, scratch_floats(kernels, products)));
    memory.allocate();
  }

  Operand token_rows(const void* data) const {
    return {{row_of(data, first_token, scoring.hidden_size, scoring.scalar), scoring.hidden_size, nullptr},
            scoring.scalar, true};
  }
  Operand gate_up(int64_t expert) const {
    const int64_t row = (first_expert + expert) * 2 * scoring.intermediate_size;
    return {weight_rows(scoring.gate_up_proj, scoring.gate_up_scales, row, scoring.hidden_size, scoring.weight_scalar),
            scoring.weight_scalar, true};
  }
  Operand down(int64_t expert, bool along_depth) const {
    const int64_t row = (first_expert + expert) * scoring.hidden_size;
    return {weight_rows(scoring.down_proj, scoring.down_scales, row, scoring.intermediate_size, scoring.weight_scalar),
            scoring.weight_scalar, along_depth};
  }
  char* activation_row(int64_t expert, int64_t token) const {
    return row_of(memory[activations], expert * chunk + token, scoring.intermediate_size, scoring.scalar);
  }
  Product up_product(int64_t expert) const {
    const int64_t width = scoring.intermediate_size, hidden = scoring.hidden_size;
    return {token_rows(scoring.hidden_states), gate_up(expert), tokens, width, hidden, width, expert};
  }
  Product down_product(int64_t expert) const {
    const int64_t width = scoring.intermediate_size, hidden = scoring.hidden_size;
    const Operand a{{activation_row(expert, 0), width, nullptr}, scoring.scalar, true};
    return {a, down(expert, true), tokens, hidden, width, 0, expert};
  }
  Product target_product(int64_t expert) const {
    const int64_t width = scoring.intermediate_size, hidden = scoring.hidden_size;
    return {token_rows(scoring.target), down(expert, false), tokens, width, hidden, 0, expert};
  }

  void multiply(Product (Step::*of_expert)(int64_t) const, const Epilogue& epilogue) const {
    std::vector<Product> products;
    for (int64_t expert = 0; expert < experts; ++expert) products.push_back((this->*of_expert)(expert));
    grouped_gemm(kernels, products, threads, memory[scratch], epilogue);
  }

  void activate() const {
    const auto glu = kernels.glu[static_cast<int>(scoring.scalar)];
    multiply(&Step::up_product, [&](const Block& block) {
      for (int64_t i = 0; i < block.rows; ++i)
        glu(scoring.activation, block.columns, block.c + i * block.stride, block.twin + i * block.stride, nullptr,
            nullptr,
            activation_row(block.product.index, block.row + i) + block.column * scalar_bytes(scoring.scalar));
    });
  }

  // body() for every chunk of tokens and group of experts, activations computed
  template <class Body>
  void walk(const Body& body) {
    for (first_token = 0; first_token < scoring.num_tokens; first_token += chunk)
      for (first_expert = 0; first_expert < scoring.num_experts; first_expert += group) {
        tokens = std::min(chunk, scoring.num_tokens - first_token);
        experts = std::min(group, scoring.num_experts - first_expert);
        activate();
        body();
      }
  }
};

void check_offsets(const int64_t* offsets, int64_t num_batches, int64_t num_tokens) {
  for (int64_t batch = 0; batch <= num_batches; ++batch) {
    const int64_t least = batch == 0 ? 0 : offsets[batch - 1], most = batch == 0 ? 0 : num_tokens;
    if (offsets[batch] < least || offsets[batch] > most || (batch == num_batches && offsets[batch] != num_tokens))
      throw std::invalid_argument("batch_offsets[" + std::to_string(batch) + "] is " + std::to_string(offsets[batch]) +
                                  ", expected them to ascend from 0 to " + std::to_string(num_tokens));
  }
}

}  // namespace

void score_experts(const Scoring& scoring, const int64_t* batch_offsets, int64_t num_batches, float* scores,
                   int threads) {
  check_offsets(batch_offsets, num_batches, scoring.num_tokens);
  const int64_t units = column_units(scoring.hidden_size);
  std::vector<double> sums(checked_product(num_batches, checked_product(scoring.num_experts, 3)), 0.);
  Step step(scoring, threads, 3 * units, 0);
  float* const partial = step.memory[step.partial];  // [group, chunk, units, 3]
  const auto residual_sums = step.kernels.residual_sums[static_cast<int>(scoring.scalar)];
  step.walk([&] {
    step.multiply(&Step::down_product, [&](const Block& block) {
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t token = block.row + i;
        const char* const target = row_of(scoring.target, step.first_token + token, scoring.hidden_size, scoring.scalar);
        float* const own = partial + (block.product.index * step.chunk + token) * units * 3;
        for (int64_t j = 0; j < block.columns; j += kColumnUnit) {
          const int64_t column = block.column + j, unit = column / kColumnUnit;
          std::fill_n(own + unit * 3, 3, 0.f);
          residual_sums(std::min(kColumnUnit, block.columns - j), block.c + i * block.stride + j,
                        target + column * scalar_bytes(scoring.scalar), own + unit * 3);
        }
      }
    });
    parallel_for(step.experts, step.threads, [&](int64_t expert, int) {
      int64_t batch = 0;
      for (int64_t token = 0; token < step.tokens; ++token) {
        while (batch_offsets[batch + 1] <= step.first_token + token) ++batch;
        double* const own = sums.data() + (batch * scoring.num_experts + step.first_expert + expert) * 3;
        const float* const row = partial + (expert * step.chunk + token) * units * 3;
        for (int64_t i = 0; i < units * 3; ++i) own[i % 3] += row[i];
      }
    });
  });
  std::copy(sums.begin(), sums.end(), scores);
}

void score_neurons(const Scoring& scoring, float* energy, float* correlation, int threads) {
  const int64_t width = scoring.intermediate_size;
  std::vector<double> sums(checked_product(checked_product(scoring.num_experts, width), 2), 0.);  // [E, 2, I]
  Step step(scoring, threads, 0, 2 * width);
  float* const partial = step.memory[step.partial];  // [group, blocks of rows, 2, I]
  const auto neuron_sums = step.kernels.neuron_sums[static_cast<int>(scoring.scalar)];
  const int64_t chunk_blocks = (step.chunk + kBlockRows - 1) / kBlockRows;
  step.walk([&] {
    step.multiply(&Step::target_product, [&](const Block& block) {
      float* const own =
          partial + (block.product.index * chunk_blocks + block.row / kBlockRows) * 2 * width + block.column;
      std::fill_n(own, block.columns, 0.f);
      std::fill_n(own + width, block.columns, 0.f);
      for (int64_t i = 0; i < block.rows; ++i)
        neuron_sums(block.columns,
                    step.activation_row(block.product.index, block.row + i) +
                        block.column * scalar_bytes(scoring.scalar),
                    block.c + i * block.stride, own, own + width);
    });
    parallel_for(step.experts, step.threads, [&](int64_t expert, int) {
      double* const own = sums.data() + (step.first_expert + expert) * 2 * width;
      for (int64_t block = 0; block < (step.tokens + kBlockRows - 1) / kBlockRows; ++block)
        for (int64_t j = 0; j < 2 * width; ++j) own[j] += partial[(expert * chunk_blocks + block) * 2 * width + j];
    });
  });
  parallel_for(scoring.num_experts, step.threads, [&](int64_t expert, int) {
    std::vector<float> squares(width, 0.f);  // ||d_j||^2
    for (int64_t row = 0; row < scoring.hidden_size; ++row)
      step.kernels.add_squares[static_cast<int>(scoring.weight_scalar)](
          width,
          weight_rows(scoring.down_proj, scoring.down_scales, expert * scoring.hidden_size + row, width,
                      scoring.weight_scalar),
          squares.data());
    const double* const own = sums.data() + expert * 2 * width;
    for (int64_t j = 0; j < width; ++j) {
      energy[expert * width + j] = static_cast<float>(own[j] * squares[j]);
      correlation[expert * width + j] = static_cast<float>(own[width + j]);
    }
  });
}

}  // namespace flex
