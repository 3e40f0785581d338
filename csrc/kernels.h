// The inner loops of the layer on a CPU, one table of them per instruction set.
//
// A matrix product is C [rows, columns] = A [rows, depth] B [depth, columns] on packed operands. Depth is counted in
// 32-bit words: one fp32, or, where the machine multiplies bf16 pairs (AVX512-BF16, AMX), two neighbouring bf16.
//
//   A panel: kPanelRows rows,        [depth / 16][row][16 words]: a row keeps its 64-byte pieces, so that gathering a
//                                    row is copying, and the loop reads memory in one direction
//   B panel: kPanelColumns columns,  [depth][column]
//
// Every element of C is summed over a slice of the depth in order, then over the slices: an order that depends on the depth
// and, but for AMX, on whether the product has at most `few_rows` rows. The result is bit-identical however tiles, tasks
// and threads are divided.
#pragma once
#include <cstdint>

#define FLEX_INLINE inline __attribute__((always_inline))

namespace flex {

// Of values in memory. The last two are frozen weights, codes with scales: flex_kernels/reference.py says what they mean.
enum class Scalar : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kNf4 = 3 };
constexpr int kWeightScalars = 4;
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

struct Bfloat16 {
  uint16_t bits;
};
struct Int8 {};
struct Nf4 {};

constexpr int64_t kLineBytes = 64;               // of a cache
constexpr int64_t kChunkWords = kLineBytes / 4;  // of one row in an A panel

constexpr int64_t kNf4Group = 64;  // neighbours along a row that share a scale; rows are padded to whole groups
constexpr bool is_dense(Scalar scalar) { return scalar == Scalar::kFloat32 || scalar == Scalar::kBfloat16; }
// Of a dense scalar.
constexpr int64_t scalar_bytes(Scalar scalar) { return scalar == Scalar::kFloat32 ? 4 : 2; }
constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Rows of a matrix in memory. `gather`: row i lies at memory row gather[i]; null: at row i.
struct Rows {
  const void* data;
  int64_t stride;  // elements from one memory row to the next
  const int32_t* gather;
  const void* scales = nullptr;  // of codes: a float per row (int8), a bf16 per kNf4Group elements of the stride (nf4)
};

// Rows from `row` on of a frozen matrix with rows of `columns`.
inline Rows weight_rows(const void* data, const void* scales, int64_t row, int64_t columns, Scalar scalar) {
  const int64_t stride = scalar == Scalar::kNf4 ? round_up(columns, kNf4Group) : columns;
  const int64_t bytes = scalar == Scalar::kNf4 ? stride / 2 : scalar == Scalar::kInt8 ? stride : stride * scalar_bytes(scalar);
  const int64_t scale_bytes = scalar == Scalar::kNf4 ? stride / kNf4Group * int64_t{sizeof(Bfloat16)} : sizeof(float);
  return {static_cast<const char*>(data) + row * bytes, stride, nullptr,
          scales ? static_cast<const char*>(scales) + row * scale_bytes : nullptr};
}

// The words of a row that pack_few made are at most its depth's, rounded up to a multiple of so many.
constexpr int64_t kFewDepth = 128;

// Memory that is wanted next: pieces of `bytes`, `stride` bytes apart. A product fetches it into the second cache on its way,
// some lines at a time: while it computes, nothing else asks the memory.
struct Fetch {
  const char* piece = nullptr;
  int64_t stride = 0, bytes = 0, pieces = 0;
  int64_t twin = 0;   // not 0: as much again so many bytes further on
  int64_t lines = 0;  // at a time (of a twin: as many again)
  int64_t done = 0;   // bytes of the piece

  FLEX_INLINE void some() {
    for (int64_t line = 0; line < lines && pieces > 0; ++line) {
      __builtin_prefetch(piece + done, 0, 2);
      if (twin != 0) __builtin_prefetch(piece + twin + done, 0, 2);
      done += kLineBytes;
      if (done < bytes) continue;
      done = 0;
      piece += stride;
      --pieces;
    }
  }
};

struct Kernels {
  const char* name;
  int panel_rows, panel_columns;
  int word_elements;  // 1: fp32 words, 2: pairs of bf16; then both operands are bf16 in memory

  // Packing, by the scalar type in memory. `depth` elements from `begin` on; what fills a word up is zero.
  // *_rows: memory rows run along the depth. *_depth: memory rows are depth steps, so the packing transposes A.
  void (*pack_a_rows[2])(Rows source, int64_t rows, int64_t begin, int64_t depth, float* panels);
  // depth_scale (or null): a factor per depth step. `begin` counts depth steps, `first` the matrix rows.
  void (*pack_a_depth[2])(Rows source, int64_t first, int64_t rows, int64_t begin, int64_t depth,
                          const float* depth_scale, float* panels);
  void (*pack_b_rows[kWeightScalars])(Rows source, int64_t first, int64_t columns, int64_t begin, int64_t depth, float* panels);
  void (*pack_b_depth[kWeightScalars])(Rows source, int64_t first, int64_t columns, int64_t begin, int64_t depth, float* panels);
  // C (+)= A B; columns is a multiple of panel_columns. C has room for whole panels of rows: what is beyond `rows` may be
  // overwritten. Some lines are fetched per chunk of a tile of panel_rows x panel_columns.
  void (*multiply)(int64_t rows, int64_t columns, int64_t words, const float* a, const float* b, float* c,
                   int64_t c_stride, bool accumulate, Fetch& fetch);
  // The same for at most `few_rows` rows and memory rows along the depth, by B's scalar type: B is read where it lies.
  // `a` is what pack_few made of them, by B's and A's type: whole panels of rows.
  int few_rows[kWeightScalars];
  void (*pack_few[kWeightScalars][2])(Rows source, int64_t rows, int64_t begin, int64_t depth, float* panels);
  void (*multiply_in_place[kWeightScalars])(int64_t rows, int64_t columns, int64_t depth, const float* a, Rows b, int64_t first,
                               float* c, int64_t c_stride);

  // Rows against rows, both read where they lie: out[i, j] = sum_k x[i, k] w[j, k], by the scalar type of x and w, to which
  // the sum is rounded. An element's bits depend on the depth alone.
  void (*row_products[2])(int64_t rows, int64_t columns, int64_t depth, const void* x, int64_t x_stride, const void* w,
                          int64_t w_stride, float* out, int64_t out_stride);
  // out[i] = sum_k x[i, k] w[k], by the scalar type of x; in fp32 throughout.
  void (*row_dots[2])(int64_t rows, int64_t depth, const void* x, int64_t x_stride, const float* w, float* out);
  // row = exp(row - max) / sum, in place.
  void (*softmax)(int64_t n, float* row);

  // One row of `n` elements each, by the scalar type of the untyped pointers.
  // activations = act(gate) * up; the pre-activations are kept where d_* are not null.
  void (*glu[2])(Activation activation, int64_t n, const float* gate, const float* up, void* kept_gate, void* kept_up,
                 void* activations);
  // d_gate, d_up = scale * d_activations through the gated unit; returns sum(d_activations * act(gate) * up).
  // activations (or null) receives act(gate) * up; d_gate and d_up may both be null.
  float (*d_glu[2])(Activation activation, int64_t n, const float* d_activations, const void* gate, const void* up,
                    float scale, void* d_gate, void* d_up, void* activations);
  // out = sum_i weights[i] * rows[i], in order.
  void (*sum_rows[2])(int64_t n, int64_t count, const float* const* rows, const float* weights, void* out);
  // sums += (sum (target - out)^2, sum target * out, sum out^2)
  void (*residual_sums[2])(int64_t n, const float* out, const void* target, float* sums);
  // energy += activations^2, correlation += activations * products
  void (*neuron_sums[2])(int64_t n, const void* activations, const float* products, float* energy, float* correlation);
  // sums += row^2, by the scalar type of the row, a frozen weight's
  void (*add_squares[kWeightScalars])(int64_t n, Rows row, float* sums);
};

// Null where this build or this machine has not got them. bf16_pairs: the table for products of bf16 in memory.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();
// Asks the operating system for the tile registers, once; false where it has none to give.
bool amx_permitted();

}  // namespace flex
