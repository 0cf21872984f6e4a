// Attention with products of 8-bit integers: softmax(q·kᵀ·scale)·v of every head.
//
// q and k have a scale for each row, v one for each column of a head; of k its mean over the keys is taken off, which the
// softmax does not see. Weights have 16 bits, as two bytes, so that many small ones are not lost beside a large one.
// Sums of products are exact, whatever the processor; the softmax between them is in floating point.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "attention.h"

namespace {

constexpr float TOP = 65535.0f;  // of a weight's integers
constexpr int OFFSET = 128;      // that makes bytes of q unsigned

// sums + Σ of four products, u8 from every fourth of `codes` (repeated in each lane) with s8 from `weights`.
inline Integers dot(Integers sums, int32_t codes, const int8_t* weights) {
#if defined(__AVX512VNNI__) && LANES == 16
  return (Integers)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(codes), _mm512_loadu_si512(weights));
#elif defined(__AVXVNNI__) && LANES == 8
  return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sums, _mm256_set1_epi32(codes),
                                           _mm256_loadu_si256((const __m256i*)weights));
#elif defined(__AVX2__) && LANES == 8
  // Widened to 16 bits, the even and the odd bytes apart: products of bytes as they are would be added in 16, and saturate.
  const __m256i w = _mm256_loadu_si256((const __m256i*)weights), c = _mm256_set1_epi32(codes);
  const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8),
                                         _mm256_and_si256(c, _mm256_set1_epi16(255)));
  const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(w, 8), _mm256_srli_epi16(c, 8));
  return (Integers)_mm256_add_epi32(_mm256_add_epi32(even, odd), (__m256i)sums);
#else
  uint8_t code[4];
  std::memcpy(code, &codes, 4);
  for (int lane = 0; lane < LANES; ++lane)
    for (int i = 0; i < 4; ++i) sums[lane] += int32_t(code[i]) * int32_t(weights[4 * lane + i]);
  return sums;
#endif
}

inline Floats as_floats(Integers v) { return __builtin_convertvector(v, Floats); }

inline Integers nearest(Floats v) { return (Integers)(v + MAGIC) - MAGIC_BITS; }

// Of sizes: as integers these are in the same order, and Inf and NaN above all others.
inline Floats larger(Floats a, Floats b) { return (Integers)a > (Integers)b ? a : b; }

// The largest lane, if all are finite numbers; else what is none.
inline float top_of(Floats sizes) {
  const float found = over_lanes(sizes, larger)[0];
  return found < INFINITY ? found : NAN;
}

// The high and the low bytes of two vectors of weights of 16 bits.
inline void split(const Integers (&weights)[2], uint8_t* high, uint8_t* low) {
#if defined(__AVX512BW__) && LANES == 16
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                        22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i words = _mm512_permutex2var_epi16((__m512i)weights[0], even, (__m512i)weights[1]);
  _mm256_storeu_si256((__m256i*)low, _mm512_cvtepi16_epi8(words));
  _mm256_storeu_si256((__m256i*)high, _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8)));
#else
  for (int i = 0; i < 2; ++i) {
    const Bytes of_high = low_bytes(weights[i] >> 8), of_low = low_bytes(weights[i]);
    std::memcpy(high + i * LANES, &of_high, LANES);
    std::memcpy(low + i * LANES, &of_low, LANES);
  }
#endif
}

constexpr int MOST = 1024;  // of a head's width

// A row of a head, filled up with zeros to whole vectors.
struct Row {
  float values[MOST];

  Row(const float* from, int64_t width, int64_t padded_width) {
    std::memcpy(values, from, width * sizeof(float));
    std::memset(values + width, 0, (padded_width - width) * sizeof(float));
  }
};

struct Head {  // k, v of one head as the products take them
  std::vector<int8_t> keys;     // (padded keys / KEYS, width / 4, KEYS, 4)
  std::vector<int32_t> sums;    // of each key's bytes, times OFFSET
  std::vector<float> scale;     // of each key
  std::vector<int8_t> values;   // (padded keys / 4, padded width, 4)
  std::vector<float> by_column; // scales of v
  bool finite = true;           // whether all that was given is
};

// Where four values of a key's head lie, those from `d` on: what a pass takes is in one piece.
inline int64_t place_of(int64_t key, int64_t d, int64_t wide) {
  return key / KEYS * KEYS * wide + (d / 4 * KEYS + key % KEYS) * 4;
}

void prepare(const float* k, const float* v, int64_t keys, int64_t stride, int64_t width, Head& head) {
  const int64_t wide = padded(width, 4), columns = padded(width, LANES), all = padded(keys, KEYS);
  head.keys.assign(wide * all, 0);
  head.values.assign(all * columns, 0);
  head.sums.assign(all, 0);
  head.scale.assign(all, 0);
  head.by_column.assign(columns, 0);
  float mean[MOST] = {}, most[MOST] = {}, inverse[MOST] = {};
  for (int64_t key = 0; key < keys; ++key) {
    const Row of_k(k + key * stride, width, columns), of_v(v + key * stride, width, columns);
    for (int64_t d = 0; d < columns; d += LANES) {
      store(mean + d, load(mean + d) + load(of_k.values + d));
      store(most + d, larger(load(most + d), size_of(load(of_v.values + d))));
    }
  }
  for (int64_t d = 0; d < columns; ++d) {
    mean[d] /= float(keys);
    head.finite &= most[d] < INFINITY;
    head.by_column[d] = most[d] / 127.0f;
    inverse[d] = most[d] > 0 ? 127.0f / most[d] : 0.0f;
  }
  for (int64_t key = 0; key < keys; ++key) {
    Row row(k + key * stride, width, columns);
    Floats largest = {};
    for (int64_t d = 0; d < columns; d += LANES) {
      const Floats value = load(row.values + d) - load(mean + d);
      store(row.values + d, value);
      largest = larger(largest, size_of(value));
    }
    const float top = top_of(largest), factor = top > 0 ? 127.0f / top : 0.0f;
    head.finite &= top == top;
    head.scale[key] = top / 127.0f;
    Integers total = {};
    for (int64_t d = 0; d < columns; d += LANES) {
      const Integers codes = nearest(load(row.values + d) * factor);
      const Bytes bytes = low_bytes(codes);
      total += codes;
      for (int64_t i = 0; i < LANES && d + i < width; i += 4)
        std::memcpy(head.keys.data() + place_of(key, d + i, wide), (const char*)&bytes + i, 4);
    }
    head.sums[key] = over_lanes(total, [](Integers a, Integers b) { return a + b; })[0] * OFFSET;
  }
  for (int64_t key = 0; key < keys; key += 4)
    for (int64_t d = 0; d < columns; d += LANES) {
      Integers four = {};
      for (int64_t i = 0; i < 4 && key + i < keys; ++i) {
        const Row row(v + (key + i) * stride + d, width - d < LANES ? width - d : LANES, LANES);
        four |= (nearest(load(row.values) * load(inverse + d)) & 255) << int(8 * i);
      }
      std::memcpy(head.values.data() + (key / 4 * columns + d) * 4, &four, sizeof four);
    }
}

struct Room {  // of one thread
  std::vector<float> scores;
  std::vector<uint8_t> high, low;
  bool finite = true;
};

struct Shape {
  int64_t keys, stride, width;  // stride: from a row to the next; width: of a head
  int64_t wide, columns, all;   // the width in fours and in vectors, the keys in KEYS

  Shape(int64_t keys, int64_t stride, int64_t width)
      : keys(keys), stride(stride), width(width), wide(padded(width, 4)), columns(padded(width, LANES)),
        all(padded(keys, KEYS)) {}

  int64_t score_stride() const { return score_stride_of(all); }
};

// Bytes of a query, unsigned; returns its scale.
inline float coded(const float* q, const Shape& shape, int32_t* codes) {
  const Row row(q, shape.width, shape.columns);
  Floats largest = {};
  for (int64_t d = 0; d < shape.columns; d += LANES) largest = larger(largest, size_of(load(row.values + d)));
  const float top = top_of(largest), inverse = top > 0 ? 127.0f / top : 0.0f;
  for (int64_t d = 0; d < shape.columns; d += LANES) {
    const Bytes bytes = low_bytes(nearest(load(row.values + d) * inverse) + OFFSET);
    std::memcpy((char*)codes + d, &bytes, LANES);
  }
  return top / 127.0f;
}

// Scores of COUNT queries and all keys, as powers of two: (COUNT, score stride).
template <int COUNT>
inline void scored(const int32_t (&codes)[COUNT][MOST / 4], const float* factor, const Head& head, const Shape& shape,
                   float* scores) {
  for (int64_t key = 0; key < shape.all; key += KEYS) {
    Integers sums[COUNT][2] = {};
    const int8_t* keys = head.keys.data() + key * shape.wide;
    for (int64_t d = 0; d < shape.wide / 4; ++d)
      UNROLLED for (int r = 0; r < COUNT; ++r)
        UNROLLED for (int i = 0; i < 2; ++i)
          sums[r][i] = dot(sums[r][i], codes[r][d], keys + (d * KEYS + i * LANES) * 4);
    UNROLLED for (int i = 0; i < 2; ++i) {
      Integers offset;
      std::memcpy(&offset, head.sums.data() + key + i * LANES, sizeof offset);
      const Floats by_key = load(head.scale.data() + key + i * LANES);
      UNROLLED for (int r = 0; r < COUNT; ++r)
        store(scores + r * shape.score_stride() + key + i * LANES, as_floats(sums[r][i] - offset) * (by_key * factor[r]));
    }
  }
}

// Scores of a query to weights of 16 bits in two bytes; returns one over their sum.
inline float softened(float* scores, const Shape& shape, uint8_t* high, uint8_t* low) {
  for (int64_t key = shape.keys; key < shape.all; ++key) scores[key] = -1e30f;
  const float top = largest_of(scores, shape.all);
  Integers total = {};
  for (int64_t key = 0; key < shape.all; key += 2 * LANES) {
    Integers weights[2];
    UNROLLED for (int i = 0; i < 2; ++i) {
      weights[i] = nearest(power_of_two(load(scores + key + i * LANES) - top) * TOP);
      total += weights[i];
    }
    split(weights, high + key, low + key);
  }
  return 1.0f / sum_of(as_floats(total));
}

// LANES columns of COUNT queries' results, those from `d` on.
template <int COUNT>
inline void weighted(const Room& room, const float* inverse, const Head& head, const Shape& shape, int64_t d,
                     float* out) {
  Integers high[COUNT] = {}, low[COUNT] = {};
  const uint8_t *highs = room.high.data(), *lows = room.low.data();
  const int8_t* values = head.values.data() + d * 4;
  for (int64_t key = 0; key < padded(shape.keys, 4); key += 4, values += shape.columns * 4)
    UNROLLED for (int r = 0; r < COUNT; ++r) {
      int32_t four;
      std::memcpy(&four, highs + r * shape.all + key, 4);
      high[r] = dot(high[r], four, values);
      std::memcpy(&four, lows + r * shape.all + key, 4);
      low[r] = dot(low[r], four, values);
    }
  const int64_t left = shape.width - d < LANES ? shape.width - d : LANES;
  const Floats by_column = load(head.by_column.data() + d);
  for (int r = 0; r < COUNT; ++r) {
    const Floats result = (as_floats(high[r]) * 256.0f + as_floats(low[r])) * (by_column * inverse[r]);
    std::memcpy(out + r * shape.stride + d, &result, left * sizeof(float));
  }
}

template <int COUNT>
void rows_of(const float* q, float* out, const Head& head, const Shape& shape, float scale, Room& room) {
  int32_t codes[COUNT][MOST / 4];
  float factor[COUNT], inverse[COUNT];
  for (int r = 0; r < COUNT; ++r) {
    const float by_row = coded(q + r * shape.stride, shape, codes[r]);
    room.finite &= by_row == by_row;
    factor[r] = by_row * scale * LOG2_E;
  }
  scored<COUNT>(codes, factor, head, shape, room.scores.data());
  for (int r = 0; r < COUNT; ++r)
    inverse[r] = softened(room.scores.data() + r * shape.score_stride(), shape, room.high.data() + r * shape.all,
                          room.low.data() + r * shape.all);
  for (int64_t d = 0; d < shape.columns; d += LANES) weighted<COUNT>(room, inverse, head, shape, d, out);
}

}  // namespace

extern "C" {

// As hqdm_attention, with products of 8-bit integers. 1: a head wider than 1,024, or more than 65,536 keys. 2: NaN or
// Inf among q, k or v, which integers would not show.
int hqdm_attention8(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t queries,
                    int64_t keys, int64_t heads, int64_t width, float scale, int threads) {
  if (width > MOST || keys > 65536) return 1;
  const Shape shape(keys, heads * width, width);
  const int64_t stride = shape.stride;
  std::vector<Head> prepared(batch * heads);
  std::vector<Room> rooms(threads);
  for (Room& room : rooms) {
    room.scores.resize(ROWS * shape.score_stride());
    room.high.resize(ROWS * shape.all);
    room.low.resize(ROWS * shape.all);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t each = 0; each < batch * heads; ++each) {
    const int64_t from = (each / heads) * keys * stride + (each % heads) * width;
    prepare(k + from, v + from, keys, stride, width, prepared[each]);
  }
  const int64_t blocks = (queries + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < batch * heads * blocks; ++item) {
    Room& room = rooms[this_thread()];
    const int64_t each = item / blocks, first = item % blocks * BLOCK;
    const int64_t last = first + BLOCK < queries ? first + BLOCK : queries;
    const int64_t from = (each / heads) * queries * stride + (each % heads) * width;
    int64_t row = first;
    for (; row + ROWS <= last; row += ROWS)
      rows_of<ROWS>(q + from + row * stride, out + from + row * stride, prepared[each], shape, scale, room);
    for (; row < last; ++row)
      rows_of<1>(q + from + row * stride, out + from + row * stride, prepared[each], shape, scale, room);
  }
  for (const Head& head : prepared)
    if (!head.finite) return 2;
  for (const Room& room : rooms)
    if (!room.finite) return 2;
  return 0;
}

}
