// Everything csrc computes on a CPU, on small awkward shapes, for a run under sanitizers (tests/test_sanitizers.py).
// It checks what needs no oracle: the same bits for any number of threads, also from several threads at once; finite
// numbers; bad plans refused. Prints "ok" at the end.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu_features.h"
#include "experts.h"
#include "grafted_route.h"
#include "routing_plan.h"
#include "score.h"

using namespace flex;

namespace {

struct Shape {
  int64_t tokens, hidden, experts, width, top_k, graft_width;  // graft_width -1: no graft
};
// Tails of every kind; no tokens; one row; a graft of no neuron; more rows and columns than a block; several slices; with
// several blocks of rows, so few that AMX reads the weights in place, and more.
const Shape kShapes[] = {{37, 33, 5, 17, 2, 9},   {0, 16, 4, 8, 2, 8},  {1, 7, 3, 5, 3, 1},  {20, 16, 2, 8, 1, -1},
                         {9, 12, 3, 4, 2, 0},     {210, 40, 2, 70, 1, 150}, {23, 530, 2, 300, 2, 20},
                         {150, 1090, 1, 150, 1, 140}, {200, 1090, 1, 150, 1, 140}};

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(1);
}

// Exactly as many bytes as the operation may touch: the sanitizer sees the first one beyond.
struct Array {
  std::vector<char> bytes;
  Array(int64_t count, Scalar scalar) : bytes(count * scalar_bytes(scalar)) {}
  void* data() { return bytes.data(); }
  float* floats() { return reinterpret_cast<float*>(bytes.data()); }
};

Array random_array(int64_t count, Scalar scalar, std::mt19937& random) {
  std::normal_distribution<float> normal(0.f, 0.3f);
  Array array(count, scalar);
  for (int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits >>= 16;
    if (scalar == Scalar::kFloat32)
      std::memcpy(array.bytes.data() + 4 * i, &value, 4);
    else
      std::memcpy(array.bytes.data() + 2 * i, &bits, 2);
  }
  return array;
}

// A frozen matrix of any scalar type; codes are any bytes, and their scales any small numbers.
struct Matrix {
  Array values, scales;
};

Matrix random_matrix(int64_t rows, int64_t columns, Scalar scalar, std::mt19937& random) {
  if (is_dense(scalar)) return {random_array(rows * columns, scalar, random), Array(0, scalar)};
  const bool nf4 = scalar == Scalar::kNf4;
  const int64_t stride = nf4 ? round_up(columns, kNf4Group) : columns;
  Matrix matrix{Array(0, Scalar::kFloat32),
                nf4 ? random_array(rows * stride / kNf4Group, Scalar::kBfloat16, random)
                    : Array(rows, Scalar::kFloat32)};
  for (int64_t row = 0; !nf4 && row < rows; ++row) matrix.scales.floats()[row] = 0.003f;
  matrix.values.bytes.resize(nf4 ? rows * stride / 2 : rows * stride);
  for (char& byte : matrix.values.bytes) byte = static_cast<char>(random());
  return matrix;
}

// All results of one shape, end to end.
std::vector<Array> compute(const Shape& s, Scalar scalar, Scalar weight_scalar, bool convex, Activation activation,
                           int threads) {
  std::mt19937 random(7);
  const int64_t pairs = s.tokens * s.top_k, graft = std::max<int64_t>(s.graft_width, 0);
  std::vector<int64_t> ids(pairs);
  for (int64_t& id : ids) id = random() % (s.experts + 1);  // experts: a slot of another rank
  std::vector<int32_t> sorted(pairs), counts(s.experts), offsets(s.experts + 1);
  routing_plan(ids.data(), pairs, s.experts, sorted.data(), counts.data(), offsets.data());

  Array x = random_array(s.tokens * s.hidden, scalar, random), d_out = random_array(s.tokens * s.hidden, scalar, random);
  Array weights = random_array(pairs, Scalar::kFloat32, random), logits = random_array(s.tokens, Scalar::kFloat32, random);
  Matrix gate_up = random_matrix(s.experts * 2 * s.width, s.hidden, weight_scalar, random);
  Matrix down = random_matrix(s.experts * s.hidden, s.width, weight_scalar, random);
  Array graft_gate_up = random_array(2 * graft * s.hidden, scalar, random), graft_down = random_array(s.hidden * graft, scalar, random);
  const Layer layer{s.tokens,      s.hidden,         s.experts,         s.width,       s.top_k,
                    s.graft_width, scalar,           weight_scalar,     convex,        activation,
                    x.data(),      sorted.data(),    offsets.data(),    weights.floats(), gate_up.values.data(),
                    down.values.data(), graft_gate_up.data(), graft_down.data(), logits.floats(),
                    gate_up.scales.data(), down.scales.data()};

  const int64_t graft_rows = s.graft_width >= 0 ? s.tokens : 0;
  std::vector<Array> results;
  results.emplace_back(s.tokens * s.hidden, scalar);                                       // 0 out
  results.emplace_back(pairs * 2 * s.width, scalar);                                       // 1 Z
  results.emplace_back(graft_rows * 2 * graft, scalar);                                    // 2 graft Z
  results.emplace_back(s.tokens * s.hidden, scalar);                                       // 3 dX
  results.emplace_back(pairs, Scalar::kFloat32);                                           // 4 dw
  results.emplace_back(s.graft_width >= 0 ? 2 * graft * s.hidden : 0, scalar);             // 5
  results.emplace_back(s.graft_width >= 0 ? graft * s.hidden : 0, scalar);                 // 6
  results.emplace_back(graft_rows, Scalar::kFloat32);                                      // 7
  results.emplace_back(2 * s.experts * 3, Scalar::kFloat32);                               // 8 scores
  results.emplace_back(s.experts * s.width, Scalar::kFloat32);                             // 9 energy
  results.emplace_back(s.experts * s.width, Scalar::kFloat32);                             // 10 correlation
  experts_forward(layer, results[0].data(), results[1].data(), results[2].data(), threads);
  const Gradients gradients{results[3].data(), results[4].floats(), results[5].data(), results[6].data(),
                            results[7].floats()};
  experts_backward(layer, d_out.data(), results[1].data(), results[2].data(), gradients, threads);
  const Scoring scoring{s.tokens, s.hidden,   s.experts,    s.width,        scalar,     weight_scalar,
                        activation, x.data(), d_out.data(), gate_up.values.data(), down.values.data(),
                        gate_up.scales.data(), down.scales.data()};
  const int64_t batches[] = {0, s.tokens / 3, s.tokens};
  score_experts(scoring, batches, 2, results[8].floats(), threads);
  score_neurons(scoring, results[9].floats(), results[10].floats(), threads);
  // The router's weights are those of the experts' first rows.
  if (scalar == weight_scalar) {
    results.emplace_back(pairs, Scalar::kFloat32);             // 11 routing weights
    results.emplace_back(2 * pairs, Scalar::kFloat32);         // 12 expert indices, of 8 bytes each
    results.emplace_back(s.tokens, Scalar::kFloat32);          // 13 the gate's logits
    results.emplace_back(s.experts, Scalar::kFloat32);         // 14 tokens per expert
    results.emplace_back(s.tokens * s.experts, scalar);        // 15 the router's logits
    Array gate = random_array(s.hidden, Scalar::kFloat32, random);
    const float bias = 0.5f;
    const Router router{s.tokens, s.hidden, s.experts, s.top_k, scalar, convex, x.data(), gate_up.values.data(), gate.floats(), &bias};
    const Routes routes{results[11].floats(), static_cast<int64_t*>(results[12].data()), results[13].floats(),
                        static_cast<int32_t*>(results[14].data()), results[15].data()};
    grafted_route(router, routes, threads);
    const int32_t* const counts = static_cast<const int32_t*>(results[14].data());
    require(std::accumulate(counts, counts + s.experts, int64_t{0}) == pairs, "the counts do not add up");
  }
  for (float value : std::vector<float>(results[8].floats(), results[8].floats() + 2 * s.experts * 3))
    require(std::isfinite(value), "a score is not finite");
  return results;
}

bool same(const std::vector<Array>& a, const std::vector<Array>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i].bytes != b[i].bytes) return false;
  return true;
}

void refuse_bad_plans() {
  const Shape& s = kShapes[0];
  Array x(s.tokens * s.hidden, Scalar::kFloat32), weights(s.tokens * s.top_k, Scalar::kFloat32);
  Array gate_up(s.experts * 2 * s.width * s.hidden, Scalar::kFloat32), down(s.experts * s.hidden * s.width, Scalar::kFloat32);
  std::vector<int32_t> sorted(s.tokens * s.top_k), offsets(s.experts + 1, static_cast<int32_t>(sorted.size()));
  offsets[0] = 0;
  for (size_t i = 0; i < sorted.size(); ++i) sorted[i] = static_cast<int32_t>(i);
  const Layer layer{s.tokens, s.hidden, s.experts, s.width, s.top_k, -1, Scalar::kFloat32, Scalar::kFloat32, false,
                    Activation::kSilu, x.data(), sorted.data(), offsets.data(), weights.floats(), gate_up.data(),
                    down.data(), nullptr, nullptr, nullptr};
  const auto refused = [&] {
    try {
      experts_forward(layer, x.data(), nullptr, nullptr, 2);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  require(!refused(), "a good plan was refused");
  for (int32_t bad : {-1, static_cast<int32_t>(sorted.size()), sorted[4], 1 << 30}) {
    const int32_t good = std::exchange(sorted[3], bad);
    require(refused(), "a pair out of range or twice was taken");
    sorted[3] = good;
  }
  for (int32_t bad : {-1, static_cast<int32_t>(sorted.size()) + 1}) {
    const int32_t good = std::exchange(offsets[2], bad);
    require(refused(), "offsets out of range were taken");
    offsets[2] = good;
  }
  int64_t batches[] = {0, 5, 4};
  const Scoring scoring{s.tokens, s.hidden, s.experts, s.width, Scalar::kFloat32, Scalar::kFloat32, Activation::kSilu,
                        x.data(), x.data(), gate_up.data(), down.data()};
  bool score_refused = false;
  try {
    std::vector<float> scores(2 * s.experts * 3);
    score_experts(scoring, batches, 2, scores.data(), 2);
  } catch (const std::invalid_argument&) {
    score_refused = true;
  }
  require(score_refused, "batches out of order were taken");
}

}  // namespace

int main() {
  const Scalar kF = Scalar::kFloat32, kB = Scalar::kBfloat16;
  for (const std::string& isa : available_isas()) {
    setenv("FLEX_ISA", isa.c_str(), 1);
    for (const Shape& shape : kShapes) {
      const auto one = compute(shape, kF, kF, false, Activation::kSilu, 1);
      require(same(one, compute(shape, kF, kF, false, Activation::kSilu, 3)), "another number of threads, other bits");
      compute(shape, kF, kB, true, Activation::kGelu, 2);
      const auto half = compute(shape, kB, kB, true, Activation::kGeluTanh, 2);
      require(same(half, compute(shape, kB, kB, true, Activation::kGeluTanh, 5)), "another number of threads, other bits");
      compute(shape, kF, Scalar::kInt8, false, Activation::kSilu, 2);
      compute(shape, kB, Scalar::kInt8, false, Activation::kSilu, 2);
      compute(shape, kF, Scalar::kNf4, false, Activation::kSilu, 2);
      const auto codes = compute(shape, kB, Scalar::kNf4, true, Activation::kSilu, 1);
      require(same(codes, compute(shape, kB, Scalar::kNf4, true, Activation::kSilu, 3)), "another number of threads, other bits");
      // Two callers at once, each with threads of its own.
      std::vector<Array> others;
      std::thread other([&] { others = compute(shape, kF, kF, false, Activation::kSilu, 2); });
      const auto mine = compute(shape, kF, kF, false, Activation::kSilu, 2);
      other.join();
      require(same(one, mine) && same(one, others), "two callers at once, other bits");
    }
  }
  refuse_bad_plans();
  std::puts("ok");
}
