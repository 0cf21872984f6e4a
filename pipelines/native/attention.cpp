// Attention in floating point: softmax(q·kᵀ·scale)·v of every head, rows of queries at a time.
//
// Here sums may be contracted into fused multiply-adds: no integers are at stake. Every row is computed by itself in a
// fixed order, so that neither the batch nor the number of threads changes a bit.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention.h"

namespace {

struct Shape {
  int64_t queries, keys, heads, width;  // width: of a head
  int64_t padded_keys, padded_width;    // to KEYS and COLUMNS

  int64_t stride() const { return heads * width; }
  int64_t score_stride() const { return score_stride_of(padded_keys); }
};

constexpr int64_t COLUMNS = 2 * LANES;  // of v that are taken together: they lie side by side, key after key
constexpr int64_t CHUNK = 256;          // keys whose COLUMNS stay in the first cache

// Calls what(first row, count as a constant) for `rows` rows, as many at a time as registers hold.
template <typename What>
inline void by_rows(int64_t rows, const What& what) {
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) what(row, std::integral_constant<int, ROWS>());
  for (; row + ROWS / 2 <= rows; row += ROWS / 2) what(row, std::integral_constant<int, ROWS / 2>());
  for (; row < rows; ++row) what(row, std::integral_constant<int, 1>());
}

// Scores of COUNT queries and KEYS keys, as powers of two. k: (width, KEYS).
template <int COUNT>
inline void scored(const float* q, const float* k, const Shape& shape, float scale, float* scores) {
  Floats s[COUNT][2];
  UNROLLED for (int r = 0; r < COUNT; ++r) s[r][0] = s[r][1] = Floats{};
  const int64_t width = shape.width, stride = shape.stride();
  for (int64_t d = 0; d < width; ++d) {
    const Floats a = load(k + d * KEYS), b = load(k + d * KEYS + LANES);
    UNROLLED for (int r = 0; r < COUNT; ++r) {
      const float factor = q[r * stride + d];
      s[r][0] += a * factor;
      s[r][1] += b * factor;
    }
  }
  UNROLLED for (int r = 0; r < COUNT; ++r) {
    store(scores + r * shape.score_stride(), s[r][0] * scale);
    store(scores + r * shape.score_stride() + LANES, s[r][1] * scale);
  }
}

// COUNT rows of weights times COLUMNS columns of v, (count, COLUMNS), onto `sums` of as many columns.
template <int COUNT>
inline void weighted(const float* weights, const float* v, int64_t count, const Shape& shape, float* sums) {
  Floats s[COUNT][2];
  UNROLLED for (int r = 0; r < COUNT; ++r) {
    s[r][0] = load(sums + r * COLUMNS);
    s[r][1] = load(sums + r * COLUMNS + LANES);
  }
  const int64_t stride = shape.score_stride();
  for (int64_t key = 0; key < count; ++key) {
    const Floats a = load(v + key * COLUMNS), b = load(v + key * COLUMNS + LANES);
    UNROLLED for (int r = 0; r < COUNT; ++r) {
      const float weight = weights[r * stride + key];
      s[r][0] += a * weight;
      s[r][1] += b * weight;
    }
  }
  UNROLLED for (int r = 0; r < COUNT; ++r) {
    store(sums + r * COLUMNS, s[r][0]);
    store(sums + r * COLUMNS + LANES, s[r][1]);
  }
}

// Scores to weights, in place; returns one over their sum.
inline float softened(float* row, const Shape& shape) {
  for (int64_t key = shape.keys; key < shape.padded_keys; ++key) row[key] = -1e30f;  // adds 2^-126, less than a bit
  const float top = largest_of(row, shape.padded_keys);
  Floats total = {};
  for (int64_t key = 0; key < shape.padded_keys; key += LANES) {
    const Floats e = power_of_two(load(row + key) - top);
    total += e;
    store(row + key, e);
  }
  return 1.0f / sum_of(total);
}

// `rows` queries of one head, up to BLOCK. k: (padded_keys / KEYS, width, KEYS), v: (padded_width / COLUMNS,
// padded_keys, COLUMNS), scores: (rows, score_stride).
void block_of(const float* q, const float* k, const float* v, float* out, int64_t rows, const Shape& shape, float scale,
              float* scores) {
  for (int64_t key = 0; key < shape.padded_keys; key += KEYS)
    by_rows(rows, [&](int64_t row, auto count) {
      scored<count>(q + row * shape.stride(), k + key * shape.width, shape, scale,
                    scores + row * shape.score_stride() + key);
    });
  float inverse[BLOCK];
  for (int64_t row = 0; row < rows; ++row) inverse[row] = softened(scores + row * shape.score_stride(), shape);
  for (int64_t d = 0; d < shape.width; d += COLUMNS) {
    float sums[BLOCK * COLUMNS] = {};
    for (int64_t key = 0; key < shape.keys; key += CHUNK) {
      const int64_t taken = std::min(CHUNK, shape.keys - key);
      by_rows(rows, [&](int64_t row, auto count) {
        weighted<count>(scores + row * shape.score_stride() + key, v + d * shape.padded_keys + key * COLUMNS, taken, shape,
                        sums + row * COLUMNS);
      });
    }
    const int64_t written = std::min(COLUMNS, shape.width - d);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < written; ++i)
        out[row * shape.stride() + d + i] = sums[row * COLUMNS + i] * inverse[row];
  }
}

int64_t blocks_of(int64_t queries) { return (queries + BLOCK - 1) / BLOCK; }

// Threads that have work.
int parts_of(int64_t heads, int64_t queries, int threads) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, heads * blocks_of(queries))));
}

}  // namespace

extern "C" {

// Floats of scratch memory that hqdm_attention wants.
int64_t hqdm_attention_scratch(int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t width,
                               int threads) {
  const int64_t padded_keys = padded(keys, KEYS);
  threads = parts_of(batch * heads, queries, threads);
  return batch * heads * padded_keys * (width + padded(width, COLUMNS)) + threads * BLOCK * score_stride_of(padded_keys);
}

// out (batch, queries, heads·width) = attention of q (…queries…), k and v (…keys…), contiguous fp32.
void hqdm_attention(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t queries,
                   int64_t keys, int64_t heads, int64_t width, float scale, float* scratch, int threads) {
  const Shape shape{queries, keys, heads, width, padded(keys, KEYS), padded(width, COLUMNS)};
  const int64_t stride = heads * width, of_keys = width * shape.padded_keys,
                of_values = shape.padded_keys * shape.padded_width;
  float* turned = scratch;
  float* values = turned + batch * heads * of_keys;
  float* scores = values + batch * heads * of_values;
  const int64_t of_head = shape.padded_keys / KEYS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < batch * heads * of_head; ++item) {
    const int64_t each = item / of_head, first = item % of_head * KEYS, count = std::min<int64_t>(KEYS, keys - first);
    const int64_t from = (each / heads * keys + first) * stride + each % heads * width;
    float *kt = turned + each * of_keys + first * width, *vp = values + each * of_values + first * COLUMNS;
    for (int64_t d = 0; d < width; ++d)  // keys side by side, a pass's in one piece
      for (int64_t key = 0; key < KEYS; ++key) kt[d * KEYS + key] = key < count ? k[from + key * stride + d] : 0.0f;
    for (int64_t d = 0; d < shape.padded_width; d += COLUMNS)
      for (int64_t key = 0; key < KEYS; ++key)
        for (int64_t i = 0; i < COLUMNS; ++i)
          vp[d * shape.padded_keys + key * COLUMNS + i] =
              key < count && d + i < width ? v[from + key * stride + d + i] : 0.0f;
  }
  const int64_t blocks = blocks_of(queries);
  threads = parts_of(batch * heads, queries, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < batch * heads * blocks; ++item) {
    const int64_t each = item / blocks, first = item % blocks * BLOCK;
    const int64_t from = (each / heads * queries + first) * stride + each % heads * width;
    block_of(q + from, turned + each * of_keys, values + each * of_values, out + from,
             std::min(BLOCK, queries - first), shape, scale * LOG2_E,
             scores + this_thread() * BLOCK * shape.score_stride());
  }
}

}
