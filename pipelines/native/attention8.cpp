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

inline Floats size_of(Floats v) { return (Floats)((Integers)v & 0x7FFFFFFF); }

// Of sizes: as integers these are in the same order, and Inf and NaN above all others.
inline Floats larger(Floats a, Floats b) { return (Integers)a > (Integers)b ? a : b; }

// The largest lane, if all are finite numbers; else what is none.
inline float top_of(Floats sizes) {
  float found = 0;
  for (int i = 0; i < LANES; ++i) {
    if (!(sizes[i] < INFINITY)) return NAN;
    found = sizes[i] > found ? sizes[i] : found;
  }
  return found;
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
    for (int i = 0; i < LANES; ++i) head.sums[key] += total[i] * OFFSET;
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

template <int COUNT>
void rows_of(const float* q, float* out, const Head& head, int64_t keys, int64_t stride, int64_t width, float scale,
             Room& room) {
  const int64_t wide = padded(width, 4), columns = padded(width, LANES), all = padded(keys, KEYS);
  int32_t codes[COUNT][MOST / 4];
  float factor[COUNT];
  for (int r = 0; r < COUNT; ++r) {
    const Row row(q + r * stride, width, columns);
    Floats largest = {};
    for (int64_t d = 0; d < columns; d += LANES) largest = larger(largest, size_of(load(row.values + d)));
    const float top = top_of(largest), inverse = top > 0 ? 127.0f / top : 0.0f;
    room.finite &= top == top;
    factor[r] = top / 127.0f * scale;
    for (int64_t d = 0; d < columns; d += LANES) {
      const Bytes bytes = low_bytes(nearest(load(row.values + d) * inverse) + OFFSET);
      std::memcpy((char*)codes[r] + d, &bytes, LANES);
    }
  }
  for (int64_t key = 0; key < all; key += KEYS) {
    Integers sums[COUNT][2] = {};
    for (int64_t d = 0; d < wide / 4; ++d)
      for (int r = 0; r < COUNT; ++r)
        for (int i = 0; i < 2; ++i)
          sums[r][i] = dot(sums[r][i], codes[r][d], head.keys.data() + place_of(key + i * LANES, d * 4, wide));
    for (int i = 0; i < 2; ++i) {
      Integers offset;
      std::memcpy(&offset, head.sums.data() + key + i * LANES, sizeof offset);
      const Floats by_key = load(head.scale.data() + key + i * LANES);
      for (int r = 0; r < COUNT; ++r) {
        const Floats score = as_floats(sums[r][i] - offset) * (by_key * factor[r]);
        std::memcpy(room.scores.data() + r * all + key + i * LANES, &score, sizeof score);
      }
    }
  }
  float inverse[COUNT];
  for (int r = 0; r < COUNT; ++r) {
    float* row = room.scores.data() + r * all;
    for (int64_t key = keys; key < all; ++key) row[key] = -1e30f;
    const float top = largest_of(row, all);
    Integers total = {};
    for (int64_t key = 0; key < all; key += LANES) {
      // Rounded by the addition, whose low bits then hold the integer.
      const Integers weight = (Integers)(exponential(load(row + key) - top) * TOP + MAGIC) - MAGIC_BITS;
      total += weight;
      const Bytes high = low_bytes(weight >> 8), low = low_bytes(weight);
      std::memcpy(room.high.data() + r * all + key, &high, LANES);
      std::memcpy(room.low.data() + r * all + key, &low, LANES);
    }
    float whole = 0;
    for (int i = 0; i < LANES; ++i) whole += float(total[i]);
    inverse[r] = 1.0f / whole;
  }
  for (int64_t d = 0; d < columns; d += LANES) {
    Integers high[COUNT] = {}, low[COUNT] = {};
    for (int64_t key = 0; key < padded(keys, 4); key += 4) {
      const int8_t* values = head.values.data() + (key / 4 * columns + d) * 4;
      for (int r = 0; r < COUNT; ++r) {
        int32_t four;
        std::memcpy(&four, room.high.data() + r * all + key, 4);
        high[r] = dot(high[r], four, values);
        std::memcpy(&four, room.low.data() + r * all + key, 4);
        low[r] = dot(low[r], four, values);
      }
    }
    const int64_t left = width - d < LANES ? width - d : LANES;
    const Floats by_column = load(head.by_column.data() + d);
    for (int r = 0; r < COUNT; ++r) {
      const Floats result = (as_floats(high[r]) * 256.0f + as_floats(low[r])) * (by_column * inverse[r]);
      std::memcpy(out + r * stride + d, &result, left * sizeof(float));
    }
  }
}

}  // namespace

extern "C" {

// As hqdm_attention, with products of 8-bit integers. 1: a head wider than 1,024, or more than 65,536 keys. 2: NaN or
// Inf among q, k or v, which integers would not show.
int hqdm_attention8(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t queries,
                    int64_t keys, int64_t heads, int64_t width, float scale, int threads) {
  if (width > MOST || keys > 65536) return 1;
  const int64_t stride = heads * width, all = padded(keys, KEYS);
  std::vector<Head> prepared(batch * heads);
  std::vector<Room> rooms(threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t each = 0; each < batch * heads; ++each) {
    const int64_t from = (each / heads) * keys * stride + (each % heads) * width;
    prepare(k + from, v + from, keys, stride, width, prepared[each]);
  }
  const int64_t blocks = (queries + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    Room& room = rooms[part];
    room.scores.resize(ROWS * all);
    room.high.resize(ROWS * all);
    room.low.resize(ROWS * all);
    for (int64_t item = part; item < batch * heads * blocks; item += threads) {
      const int64_t each = item / blocks, first = item % blocks * BLOCK;
      const int64_t last = first + BLOCK < queries ? first + BLOCK : queries;
      const int64_t from = (each / heads) * queries * stride + (each % heads) * width;
      int64_t row = first;
      for (; row + ROWS <= last; row += ROWS)
        rows_of<ROWS>(q + from + row * stride, out + from + row * stride, prepared[each], keys, stride, width, scale,
                      room);
      for (; row < last; ++row)
        rows_of<1>(q + from + row * stride, out + from + row * stride, prepared[each], keys, stride, width, scale,
                   room);
    }
  }
  for (const Head& head : prepared)
    if (!head.finite) return 2;
  for (const Room& room : rooms)
    if (!room.finite) return 2;
  return 0;
}

}
