// Many matrix products in one go, each on its own rows: the experts of a layer, and its graft.
//
// The tasks of all products (a span of rows times a block of columns) are shared out over the threads. A task packs its
// operands slice by slice of the depth and hands finished blocks of C, still in cache, to the epilogue.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace flex {

struct Operand {
  Rows rows;
  Scalar scalar;
  bool along_depth;                    // memory rows run along the depth (false: a memory row is one depth step)
  const float* depth_scale = nullptr;  // of A, with along_depth false: a factor per depth step
};

// C [rows, columns] = A [rows, depth] B [depth, columns]
struct Product {
  Operand a, b;
  int64_t rows, columns, depth;
  int64_t twin = 0;  // not 0: columns j and twin + j of B are computed side by side (gate and up)
  int64_t index = 0;  // the caller's, as is kind
  int kind = 0;
};

// A finished block of C: `rows` x `columns` from (`row`, `column`); `twin` are the columns twin + j, or null.
struct Block {
  const Product& product;
  int64_t row, rows, column, columns;
  const float* c;
  const float* twin;
  int64_t stride;
};
using Epilogue = std::function<void(const Block&)>;

// `row` is a multiple of kBlockRows, `rows` at most that many. `column` is a multiple of kColumnUnit (with a twin: of half
// of it): a sum over columns that is kept per unit does not depend on how the columns were cut.
constexpr int64_t kBlockRows = 96, kColumnUnit = 128;
inline int64_t column_units(int64_t columns) { return (columns + kColumnUnit - 1) / kColumnUnit; }

// Floats of scratch memory that each thread needs for these products, whatever their number of rows.
int64_t scratch_floats(const Kernels& kernels, const std::vector<Product>& products);

void grouped_gemm(const Kernels& kernels, const std::vector<Product>& products, int threads, float* scratch,
                  const Epilogue& epilogue);

}  // namespace flex
