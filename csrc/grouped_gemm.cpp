#include "grouped_gemm.h"

#include <algorithm>

#include "parallel.h"

namespace flex {
namespace {

// Words of the depth per slice: a slice of a B panel (32 columns) is 32 KiB, of 96 rows of A 96 KiB, of B 256 KiB.
constexpr int64_t kSliceWords = 256;
// Rows per task: packing B costs about as much as multiplying it with 6 rows, here it serves up to a thousand.
constexpr int64_t kSpanRows = 10 * kBlockRows;
// Enough tasks per thread that the last ones to finish do not matter.
constexpr int64_t kTasksPerThread = 6;

struct Task {
  int64_t product, row, rows, column;
};

struct Scratch {
  int64_t a, b, c;  // floats
};

Scratch scratch_for(const Kernels& kernels, const Product& product, int64_t span) {
  const int64_t depth_words = (product.depth + kernels.word_elements - 1) / kernels.word_elements;
  const int64_t words = std::min(round_up(depth_words, kChunkWords), kSliceWords);
  const int64_t half = round_up(std::min(product.columns, column_block(product)), kernels.panel_columns);
  const int64_t columns = product.twin ? 2 * half : half;
  const int64_t c_rows = depth_words <= kSliceWords ? std::min(span, kBlockRows) : span;
  const int64_t a_rows = round_up(std::min(product.rows, kBlockRows), kernels.panel_rows);
  const int64_t c_floats = std::min(c_rows, product.rows) * columns;
  return {a_rows * words, columns * words, round_up(c_floats, kChunkWords)};  // whole cache lines
}

Scratch scratch_for(const Kernels& kernels, const std::vector<Product>& products) {
  Scratch most{0, 0, 0};
  for (const Product& product : products) {
    const Scratch own = scratch_for(kernels, product, kSpanRows);
    most = {std::max(most.a, own.a), std::max(most.b, own.b), std::max(most.c, own.c)};
  }
  return most;
}

// Spans of rows as long as the work still goes round: B is packed once per span.
std::vector<Task> tasks_of(const std::vector<Product>& products, int threads) {
  double work = 0;
  for (const Product& p : products) work += double(p.rows) * p.columns * (p.twin ? 2 : 1) * p.depth;
  const double share = work / (threads == 1 ? 1 : threads * kTasksPerThread);
  std::vector<Task> tasks;
  for (size_t index = 0; index < products.size(); ++index) {
    const Product& p = products[index];
    if (p.rows == 0) continue;
    const double row_work = double(std::min(p.columns * (p.twin ? 2 : 1), kBlockColumns)) * p.depth;
    const int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(share / std::max(row_work * kBlockRows, 1.)));
    const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
    const int64_t spans = (blocks + std::min(wanted, kSpanRows / kBlockRows) - 1) / std::min(wanted, kSpanRows / kBlockRows);
    const int64_t span = (blocks + spans - 1) / spans * kBlockRows;
    for (int64_t row = 0; row < p.rows; row += span)
      for (int64_t column = 0; column < p.columns; column += column_block(p))
        tasks.push_back({static_cast<int64_t>(index), row, std::min(span, p.rows - row), column});
  }
  const auto cost = [&](const Task& task) {
    const Product& p = products[task.product];
    return task.rows * std::min(column_block(p), p.columns - task.column) * p.depth;
  };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
  return tasks;
}

void pack_a(const Kernels& kernels, const Operand& a, int64_t row, int64_t rows, int64_t begin, int64_t depth,
            float* panels) {
  const int scalar = static_cast<int>(a.scalar);
  if (!a.along_depth)
    return kernels.pack_a_depth[scalar](a.rows, row, rows, begin, depth, a.depth_scale, panels);
  Rows from = a.rows;
  if (from.gather != nullptr)
    from.gather += row;
  else
    from.data = static_cast<const char*>(from.data) + row * from.stride * scalar_bytes(a.scalar);
  kernels.pack_a_rows[scalar](from, rows, begin, depth, panels);
}

void pack_b(const Kernels& kernels, const Operand& b, int64_t column, int64_t columns, int64_t begin, int64_t depth,
            float* panels) {
  const auto pack = b.along_depth ? kernels.pack_b_rows : kernels.pack_b_depth;
  pack[static_cast<int>(b.scalar)](b.rows, column, columns, begin, depth, panels);
}

void run(const Kernels& kernels, const Product& product, const Task& task, const Scratch& sizes, float* scratch,
         const Epilogue& epilogue) {
  float* const a = scratch;
  float* const b = a + sizes.a;
  float* const c = b + sizes.b;
  const int64_t columns = std::min(column_block(product), product.columns - task.column);
  const int64_t half = round_up(columns, kernels.panel_columns), stride = product.twin ? 2 * half : half;
  const int64_t slice = kSliceWords * kernels.word_elements;
  const bool one_slice = product.depth <= slice;
  for (int64_t begin = 0; begin < product.depth || begin == 0; begin += slice) {
    const int64_t depth = std::min(slice, product.depth - begin);
    const int64_t words = (depth + kernels.word_elements - 1) / kernels.word_elements;
    pack_b(kernels, product.b, task.column, columns, begin, depth, b);
    if (product.twin) pack_b(kernels, product.b, product.twin + task.column, columns, begin, depth, b + half * words);
    for (int64_t row = 0; row < task.rows; row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, task.rows - row);
      float* const block = one_slice ? c : c + row * stride;
      pack_a(kernels, product.a, task.row + row, rows, begin, depth, a);
      kernels.multiply(rows, stride, words, a, b, block, stride, begin > 0);
      if (begin + depth >= product.depth)
        epilogue({product, task.row + row, rows, task.column, columns, block, product.twin ? block + half : nullptr, stride});
    }
  }
}

}  // namespace

int64_t scratch_floats(const Kernels& kernels, const std::vector<Product>& products) {
  const Scratch most = scratch_for(kernels, products);
  return most.a + most.b + most.c;
}

void grouped_gemm(const Kernels& kernels, const std::vector<Product>& products, int threads, float* scratch,
                  const Epilogue& epilogue) {
  const Scratch sizes = scratch_for(kernels, products);
  const int64_t per_thread = sizes.a + sizes.b + sizes.c;
  const std::vector<Task> tasks = tasks_of(products, threads);
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t index, int thread) {
    const Task& task = tasks[index];
    run(kernels, products[task.product], task, sizes, scratch + thread * per_thread, epilogue);
  });
}

}  // namespace flex
