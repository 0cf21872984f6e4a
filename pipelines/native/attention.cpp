// Attention in floating point: softmax(q·kᵀ·scale)·v of every head, rows of queries at a time.
//
// Here sums may be contracted into fused multiply-adds: no integers are at stake. Every row is computed by itself in a
// fixed order, so that neither the batch nor the number of threads changes a bit.

#include <cstdint>
#include <cstring>

#include "attention.h"

namespace {


inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

struct Shape {
  int64_t queries, keys, heads, width;  // width: of a head
  int64_t padded_keys, padded_width;    // to KEYS and LANES
};

// COUNT rows of scores times some columns of v, of which `left` are to be written.
template <int COUNT, int VECTORS>
void weighted(const float* scores, const float* v, float* out, const Shape& shape, const float* inverse,
              int64_t left) {
  Floats sums[COUNT][VECTORS] = {};
  for (int64_t key = 0; key < shape.keys; ++key) {
    Floats value[VECTORS];
    for (int i = 0; i < VECTORS; ++i) value[i] = load(v + key * shape.padded_width + i * LANES);
    for (int r = 0; r < COUNT; ++r) {
      const float weight = scores[r * shape.padded_keys + key];
      for (int i = 0; i < VECTORS; ++i) sums[r][i] += value[i] * weight;
    }
  }
  const int64_t written = left < VECTORS * LANES ? left : VECTORS * LANES;
  for (int r = 0; r < COUNT; ++r) {
    for (int i = 0; i < VECTORS; ++i) sums[r][i] *= inverse[r];
    std::memcpy(out + r * shape.heads * shape.width, sums[r], written * sizeof(float));
  }
}

// COUNT queries of one head. k: (padded_keys / KEYS, width, KEYS), v: (padded_keys, padded_width), scores: COUNT ×
// padded_keys.
template <int COUNT>
void rows_of(const float* q, const float* k, const float* v, float* out, const Shape& shape, float scale,
             float* scores) {
  const int64_t stride = shape.heads * shape.width;
  for (int64_t key = 0; key < shape.padded_keys; key += KEYS) {
    Floats s[COUNT][2] = {};
    for (int64_t d = 0; d < shape.width; ++d) {
      const float* of_k = k + key * shape.width + d * KEYS;
      const Floats a = load(of_k), b = load(of_k + LANES);
      for (int r = 0; r < COUNT; ++r) {
        const float factor = q[r * stride + d];
        s[r][0] += a * factor;
        s[r][1] += b * factor;
      }
    }
    for (int r = 0; r < COUNT; ++r) {
      s[r][0] *= scale;
      s[r][1] *= scale;
      std::memcpy(scores + r * shape.padded_keys + key, s[r], sizeof s[r]);
    }
  }
  float inverse[COUNT];
  for (int r = 0; r < COUNT; ++r) {
    float* row = scores + r * shape.padded_keys;
    for (int64_t key = shape.keys; key < shape.padded_keys; ++key) row[key] = -1e30f;  // adds e^-87, less than a bit
    const float top = largest_of(row, shape.padded_keys);
    Floats total = {};
    for (int64_t key = 0; key < shape.padded_keys; key += LANES) {
      const Floats e = exponential(load(row + key) - top);
      total += e;
      std::memcpy(row + key, &e, sizeof e);
    }
    inverse[r] = 1.0f / sum(total);
  }
  for (int64_t d = 0; d < shape.padded_width; d += 2 * LANES)
    if (d + LANES < shape.padded_width)
      weighted<COUNT, 2>(scores, v + d, out + d, shape, inverse, shape.width - d);
    else
      weighted<COUNT, 1>(scores, v + d, out + d, shape, inverse, shape.width - d);
}

}  // namespace

extern "C" {

// Floats of scratch memory that hqdm_attention wants.
int64_t hqdm_attention_scratch(int64_t batch, int64_t keys, int64_t heads, int64_t width, int threads) {
  const int64_t padded_keys = padded(keys, KEYS);
  return batch * heads * padded_keys * (width + padded(width, LANES)) + threads * ROWS * padded_keys;
}

// out (batch, queries, heads·width) = attention of q (…queries…), k and v (…keys…), contiguous fp32.
void hqdm_attention(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t queries,
                   int64_t keys, int64_t heads, int64_t width, float scale, float* scratch, int threads) {
  const Shape shape{queries, keys, heads, width, padded(keys, KEYS), padded(width, LANES)};
  const int64_t stride = heads * width, of_keys = width * shape.padded_keys,
                of_values = shape.padded_keys * shape.padded_width;
  float* turned = scratch;
  float* values = turned + batch * heads * of_keys;
  float* scores = values + batch * heads * of_values;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t each = 0; each < batch * heads; ++each) {
    const int64_t from = (each / heads) * keys * stride + (each % heads) * width;
    float *kt = turned + each * of_keys, *vp = values + each * of_values;
    std::memset(kt, 0, of_keys * sizeof(float));
    std::memset(vp, 0, of_values * sizeof(float));
    for (int64_t key = 0; key < keys; ++key) {
      float* of_key = kt + key / KEYS * KEYS * width + key % KEYS;  // keys side by side, a pass's in one piece
      for (int64_t d = 0; d < width; ++d) of_key[d * KEYS] = k[from + key * stride + d];
      std::memcpy(vp + key * shape.padded_width, v + from + key * stride, width * sizeof(float));
    }
  }
  const int64_t blocks = (queries + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; ++part)
    for (int64_t item = part; item < batch * heads * blocks; item += threads) {
      const int64_t each = item / blocks, first = item % blocks * BLOCK;
      const int64_t last = first + BLOCK < queries ? first + BLOCK : queries;
      const int64_t from = (each / heads) * queries * stride + (each % heads) * width;
      const float *kt = turned + each * of_keys, *vp = values + each * of_values;
      float* mine = scores + part * ROWS * shape.padded_keys;
      int64_t row = first;  // which rows are computed together depends on the number of queries alone
      for (; row + ROWS <= last; row += ROWS)
        rows_of<ROWS>(q + from + row * stride, kt, vp, out + from + row * stride, shape, scale, mine);
      for (; row < last; ++row)
        rows_of<1>(q + from + row * stride, kt, vp, out + from + row * stride, shape, scale, mine);
    }
}

}
