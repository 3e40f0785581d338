#include "grouped_gemm.h"

#include <algorithm>

#include "parallel.h"

namespace flex {
namespace {

// A slice of the depth: of a B panel (16 columns of AVX2) 16 KiB, of 96 rows of A 96 KiB, of 512 columns of B 512 KiB.
constexpr int64_t kSliceWords = 256;
// A task packs its rows of A and columns of B once; longer spans amortise the packing better. Packing a row costs about
// as much as multiplying it with 6 columns. Few tasks, however, do not go round evenly.
constexpr int64_t kSpanRows = 10 * kBlockRows, kMostColumns = 4 * kColumnUnit;
constexpr int64_t kTasksPerThread = 6;

struct Task {
  int64_t product, row, rows, column, columns;
};

struct Scratch {
  int64_t a, b, c;  // floats
};

int64_t total_columns(const Product& product) { return product.twin ? 2 * product.columns : product.columns; }

int64_t padded(const Kernels& kernels, const Product& product, int64_t columns) {
  return round_up(columns, kernels.panel_columns) * (product.twin ? 2 : 1);
}

// Few rows do not pay for packing B, as long as all of their depth stays in a second cache (one panel: anyhow).
constexpr int64_t kFewWords = (int64_t{1} << 20) / 4;
constexpr int64_t kMostWholeRows = 2 * kBlockRows;
// In place, every sum is a vector that is turned upright at last: along a shorter depth that takes longer than the products.
constexpr int64_t kShortWords = 8 * kChunkWords, kMostShortRows = 4;

int64_t depth_words(const Kernels& kernels, const Product& product) {
  return (product.depth + kernels.word_elements - 1) / kernels.word_elements;
}

int64_t most_rows_in_place(const Kernels& kernels, const Product& product) {
  if (!product.a.along_depth || !product.b.along_depth || product.depth == 0) return 0;
  const int64_t panel_words = kernels.panel_rows * round_up(depth_words(kernels, product), kChunkWords);
  const int64_t fitting = std::max<int64_t>(kFewWords / panel_words, 1) * kernels.panel_rows;
  const int64_t most = std::min<int64_t>(fitting, kernels.few_rows[static_cast<int>(product.b.scalar)]);
  return depth_words(kernels, product) < kShortWords ? std::min(most, kMostShortRows) : most;
}

// So many rows are packed once for all of a long depth, since they then stay in a second cache. B is read panel by panel, each
// along all of its depth: in the direction in which its memory rows lie, and a panel's slice never leaves the first cache.
int64_t rows_of_whole_depth(const Kernels& kernels, const Product& product) {
  const int64_t words = depth_words(kernels, product);
  if (!product.a.along_depth || !product.b.along_depth || words <= kSliceWords) return 0;
  return std::min(kFewWords / round_up(words, kChunkWords), kMostWholeRows);
}

Scratch scratch_for(const Kernels& kernels, const std::vector<Product>& products) {
  Scratch most{0, 0, 0};
  for (const Product& product : products) {
    const int64_t all_words = depth_words(kernels, product), words = std::min(round_up(all_words, kChunkWords), kSliceWords);
    const int64_t columns = padded(kernels, product, std::min(product.columns, kMostColumns / (product.twin ? 2 : 1)));
    const int64_t few_rows = round_up(std::min(product.rows, most_rows_in_place(kernels, product)), kernels.panel_rows);
    const int64_t few = few_rows * round_up(product.depth, kFewDepth);  // a word an element, where codes are widened
    const int64_t block_rows = std::min(product.rows, all_words <= kSliceWords ? kBlockRows : kSpanRows);
    const int64_t rows = std::max(round_up(block_rows, kernels.panel_rows), few_rows);
    const int64_t whole = round_up(std::min(product.rows, rows_of_whole_depth(kernels, product)), kernels.panel_rows);
    most.a = std::max({most.a, round_up(std::min(product.rows, kBlockRows), kernels.panel_rows) * words, few,
                       whole * round_up(all_words, kChunkWords)});
    most.b = std::max(most.b, columns * words);
    most.c = std::max(most.c, round_up(rows * columns, kChunkWords));
  }
  return most;
}

// Cuts every product into columns of at most `most_columns`, and rows so that there are tasks enough.
std::vector<Task> cut(const std::vector<Product>& products, int threads, int64_t most_columns) {
  double work = 0;
  for (const Product& p : products) work += double(p.rows) * total_columns(p) * p.depth;
  const double share = work / (threads == 1 ? 1 : threads * kTasksPerThread);
  std::vector<Task> tasks;
  for (size_t index = 0; index < products.size(); ++index) {
    const Product& p = products[index];
    if (p.rows == 0) continue;
    const int64_t width = most_columns / (p.twin ? 2 : 1);
    const double block_work = double(kBlockRows) * std::min(total_columns(p), most_columns) * p.depth;
    const int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(share / std::max(block_work, 1.)));
    const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows, most = std::min(wanted, kSpanRows / kBlockRows);
    const int64_t spans = (blocks + most - 1) / most, span = (blocks + spans - 1) / spans * kBlockRows;
    for (int64_t row = 0; row < p.rows; row += span)
      for (int64_t column = 0; column < p.columns; column += width)
        tasks.push_back({static_cast<int64_t>(index), row, std::min(span, p.rows - row), column,
                         std::min(width, p.columns - column)});
  }
  return tasks;
}

std::vector<Task> tasks_of(const std::vector<Product>& products, int threads) {
  int64_t columns = kMostColumns;
  std::vector<Task> tasks = cut(products, threads, columns);
  while (threads > 1 && static_cast<int64_t>(tasks.size()) < threads * kTasksPerThread && columns > kColumnUnit)
    tasks = cut(products, threads, columns /= 2);
  const auto cost = [&](const Task& task) { return task.rows * task.columns * products[task.product].depth; };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
  return tasks;
}

Rows rows_from(const Operand& a, int64_t row) {
  Rows rows = a.rows;
  if (rows.gather != nullptr)
    rows.gather += row;
  else
    rows.data = static_cast<const char*>(rows.data) + row * rows.stride * scalar_bytes(a.scalar);
  return rows;
}

void pack_a(const Kernels& kernels, const Operand& a, int64_t row, int64_t rows, int64_t begin, int64_t depth,
            float* panels) {
  const int scalar = static_cast<int>(a.scalar);
  if (!a.along_depth)
    return kernels.pack_a_depth[scalar](a.rows, row, rows, begin, depth, a.depth_scale, panels);
  kernels.pack_a_rows[scalar](rows_from(a, row), rows, begin, depth, panels);
}

void pack_b(const Kernels& kernels, const Operand& b, int64_t column, int64_t columns, int64_t begin, int64_t depth,
            float* panels) {
  const auto pack = b.along_depth ? kernels.pack_b_rows : kernels.pack_b_depth;
  pack[static_cast<int>(b.scalar)](b.rows, column, columns, begin, depth, panels);
}

// What pack_b reads of a slice of the depth, to be fetched in so many turns.
Fetch slice_of(const Operand& b, int64_t column, int64_t columns, int64_t begin, int64_t depth, int64_t turns) {
  const auto bytes = [&](int64_t elements) {
    return b.scalar == Scalar::kNf4 ? elements / 2 : b.scalar == Scalar::kInt8 ? elements : elements * scalar_bytes(b.scalar);
  };
  const int64_t stride = bytes(b.rows.stride), first = b.along_depth ? column : begin;
  Fetch fetch{static_cast<const char*>(b.rows.data) + first * stride + bytes(b.along_depth ? begin : column), stride};
  fetch.bytes = bytes(b.along_depth ? depth : columns);
  fetch.pieces = b.along_depth ? columns : depth;
  const int64_t lines = fetch.pieces * ((fetch.bytes + kLineBytes - 1) / kLineBytes);
  fetch.lines = (lines + turns - 1) / turns;
  return fetch;
}

// C of a task whose rows of A are packed once, panel by panel of B.
void multiply_whole_rows(const Kernels& kernels, const Product& product, const Task& task, float* a, float* b, float* c,
                         int64_t stride) {
  const int64_t slice = kSliceWords * kernels.word_elements, width = kernels.panel_columns;
  const int64_t panels = (task.rows + kernels.panel_rows - 1) / kernels.panel_rows;
  const auto a_slice = [&](int64_t begin) { return a + panels * kernels.panel_rows * (begin / kernels.word_elements); };
  const auto slice_depth = [&](int64_t begin) { return std::min(slice, product.depth - begin); };
  for (int64_t begin = 0; begin < product.depth; begin += slice)
    pack_a(kernels, product.a, task.row, task.rows, begin, slice_depth(begin), a_slice(begin));
  for (const int64_t half : {int64_t{0}, product.twin}) {
    if (half != 0) c += stride / 2;
    for (int64_t done = 0; done < task.columns; done += width) {
      const int64_t column = half + task.column + done, columns = std::min(width, task.columns - done);
      for (int64_t begin = 0; begin < product.depth; begin += slice) {
        const int64_t words = (slice_depth(begin) + kernels.word_elements - 1) / kernels.word_elements, next = begin + slice;
        pack_b(kernels, product.b, column, columns, begin, slice_depth(begin), b);
        const int64_t turns = panels * ((words + kChunkWords - 1) / kChunkWords);
        Fetch fetch;
        if (next < product.depth)
          fetch = slice_of(product.b, column, columns, next, slice_depth(next), turns);
        else if (done + width < task.columns)
          fetch = slice_of(product.b, column + width, std::min(width, task.columns - done - width), 0, slice_depth(0), turns);
        kernels.multiply(task.rows, width, words, a_slice(begin), b, c + done, stride, begin > 0, fetch);
      }
    }
    if (product.twin == 0) return;
  }
}

void run(const Kernels& kernels, const Product& product, const Task& task, const Scratch& sizes, float* scratch,
         const Epilogue& epilogue) {
  float* const a = scratch;
  float* const b = a + sizes.a;
  float* const c = b + sizes.b;
  const int64_t stride = padded(kernels, product, task.columns), half = product.twin ? stride / 2 : stride;
  const auto finish = [&](int64_t row, int64_t rows, const float* block) {
    epilogue({product, task.row + row, rows, task.column, task.columns, block, product.twin ? block + half : nullptr,
              stride});
  };
  if (product.rows <= most_rows_in_place(kernels, product)) {
    const auto multiply = kernels.multiply_in_place[static_cast<int>(product.b.scalar)];
    const auto pack = kernels.pack_few[static_cast<int>(product.b.scalar)][static_cast<int>(product.a.scalar)];
    pack(rows_from(product.a, task.row), task.rows, 0, product.depth, a);
    multiply(task.rows, task.columns, product.depth, a, product.b.rows, task.column, c, stride);
    if (product.twin)
      multiply(task.rows, task.columns, product.depth, a, product.b.rows, product.twin + task.column, c + half, stride);
    for (int64_t row = 0; row < task.rows; row += kBlockRows)
      finish(row, std::min(kBlockRows, task.rows - row), c + row * stride);
    return;
  }
  const int64_t slice = kSliceWords * kernels.word_elements;
  if (product.rows <= rows_of_whole_depth(kernels, product)) {
    multiply_whole_rows(kernels, product, task, a, b, c, stride);
    for (int64_t row = 0; row < task.rows; row += kBlockRows)
      finish(row, std::min(kBlockRows, task.rows - row), c + row * stride);
    return;
  }
  for (int64_t begin = 0; begin < product.depth || begin == 0; begin += slice) {
    const int64_t depth = std::min(slice, product.depth - begin);
    const int64_t words = (depth + kernels.word_elements - 1) / kernels.word_elements;
    pack_b(kernels, product.b, task.column, task.columns, begin, depth, b);
    if (product.twin) pack_b(kernels, product.b, product.twin + task.column, task.columns, begin, depth, b + half * words);
    const int64_t next = begin + depth, panels = (task.rows + kernels.panel_rows - 1) / kernels.panel_rows;
    const int64_t turns = panels * (stride / kernels.panel_columns) * ((words + kChunkWords - 1) / kChunkWords);
    Fetch fetch;
    if (next < product.depth) {
      fetch = slice_of(product.b, task.column, task.columns, next, std::min(slice, product.depth - next), turns);
      fetch.twin = product.twin * fetch.stride;
    }
    for (int64_t row = 0; row < task.rows; row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, task.rows - row);
      float* const block = product.depth <= slice ? c : c + row * stride;  // a single slice is done with its block
      pack_a(kernels, product.a, task.row + row, rows, begin, depth, a);
      kernels.multiply(rows, stride, words, a, b, block, stride, begin > 0, fetch);
      if (begin + depth >= product.depth) finish(row, rows, block);
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
