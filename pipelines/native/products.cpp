// Products of bytes with int8 weights for x86-64 processors with AVX2 and no VNNI: convolutions and linears.
//
// Their instruction for bytes (vpmaddubsw) adds pairs of products in 16 bits and saturates. Codes of few bits leave room:
// sums stay in 16 bits over as many steps as the weights themselves prove safe, then go on in 32. That makes 4 bits
// faster than 8 here. Where they would end after less than two steps on average, as beside codes of 8 bits, operands are
// widened to 16 bits first (vpmaddwd), half as fast. Both are exact.
//
// Every output is float(Σ u·V − zero·ΣV)·scale + bias, each operation rounded: hence -ffp-contract=off.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

struct Product {  // one layer; pipelines/native/__init__.py has the same fields
  int64_t groups, outputs, inputs;  // the latter two of a group
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
  int64_t words;                    // whether operands are widened to 16 bits
  int64_t segments;
  const int8_t* packed;             // (groups, blocks, taps, steps, STEP) of hqdm_product_pack
  const int32_t* sums;              // (groups, blocks, BLOCK): ΣV of every output
  const int32_t* plan;              // (segments, 4): tap, first step, steps, whether sums are widened after it

  int64_t taps() const { return kernel_y * kernel_x; }
};

constexpr int64_t BLOCK = 32;     // outputs that are computed together: four vectors of 8 sums
constexpr int64_t HALF = BLOCK / 2;
constexpr int64_t DEPTH = 4;      // inputs of a step
constexpr int64_t STEP = BLOCK * DEPTH;
constexpr int64_t LONGEST = 128;  // steps between two widenings: 16 KB of weights, which stay in the first cache
constexpr int64_t PIXELS = 96;    // whose sums are held at once: 12 KB

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

struct Padded {  // the input with its border, inputs of a group in whole steps
  int64_t height, width, pixel;
  Padded(const Product& p, int64_t rows, int64_t columns)
      : height(rows + 2 * p.pad_y), width(columns + 2 * p.pad_x), pixel(p.groups * up(p.inputs, DEPTH) * DEPTH) {}
};

bool as_they_are(const Product& p) { return !p.words && !p.pad_y && !p.pad_x && p.inputs % DEPTH == 0; }

}  // namespace

#if defined(__AVX2__)
#include <immintrin.h>

namespace {

// Compilers hoist the products of a step above its sums and spill the sums; tied together they stay in registers.
#define ADD_PRODUCTS(MULTIPLY, ADD, sum, code, weight)                      \
  do {                                                                      \
    __m256i product;                                                        \
    asm(MULTIPLY " %[w], %[c], %[p]\n\t" ADD " %[p], %[s], %[s]"            \
        : [s] "+x"(sum), [p] "=x"(product) : [w] "x"(weight), [c] "x"(code)); \
  } while (0)

// In a function of its own, so that what it is called from takes no register away from it: that had cost half the speed.
#define ALONE __attribute__((noinline))

struct Segment {
  int64_t offset;  // of its first code from a pixel's
  int64_t steps;
};

inline __m256i broadcast(const void* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm256_set1_epi32(four);
}

inline __m256i at(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

template <int ROWS, int VECTORS>
using Sums = __m256i[ROWS][VECTORS];

template <int ROWS, int VECTORS>
inline void put(const Sums<ROWS, VECTORS>& sum, int32_t* to, bool onto) {
  UNROLLED for (int r = 0; r < ROWS; ++r) UNROLLED for (int v = 0; v < VECTORS; ++v) {
    __m256i* at_v = reinterpret_cast<__m256i*>(to + BLOCK * r + 8 * v);
    _mm256_storeu_si256(at_v, onto ? _mm256_add_epi32(sum[r][v], at(at_v)) : sum[r][v]);
  }
}

// Sums of ROWS pixels and a block's outputs over a run, into or onto (32-bit) `to`.
template <int ROWS>
ALONE void tile(const uint8_t* const* pixels, const Segment* segment, const Segment* end, const int8_t* weight,
                 int32_t* to, bool onto) {
  Sums<ROWS, 4> sum;
  UNROLLED for (int r = 0; r < ROWS; ++r) UNROLLED for (int v = 0; v < 4; ++v) sum[r][v] = _mm256_setzero_si256();
  for (; segment != end; ++segment) {
    const uint8_t* code[ROWS];
    UNROLLED for (int r = 0; r < ROWS; ++r) code[r] = pixels[r] + segment->offset;
    for (int64_t s = 0; s < segment->steps; ++s, weight += STEP) {
      __m256i w[4];
      UNROLLED for (int v = 0; v < 4; ++v) w[v] = at(weight + 32 * v);
      UNROLLED for (int r = 0; r < ROWS; ++r) {
        const __m256i c = broadcast(code[r] + s * DEPTH);
        UNROLLED for (int v = 0; v < 4; ++v) ADD_PRODUCTS("vpmaddubsw", "vpaddw", sum[r][v], c, w[v]);
      }
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  UNROLLED for (int r = 0; r < ROWS; ++r) UNROLLED for (int v = 0; v < 4; ++v)
    sum[r][v] = _mm256_madd_epi16(sum[r][v], ones);
  put<ROWS, 4>(sum, to, onto);
}

// The same of operands widened to 16 bits, for half a block's outputs.
template <int ROWS>
ALONE void tile(const uint16_t* const* pixels, const Segment* segment, const Segment* end, const int8_t* weight,
                 int32_t* to, bool onto) {
  Sums<ROWS, 2> sum;
  UNROLLED for (int r = 0; r < ROWS; ++r) UNROLLED for (int v = 0; v < 2; ++v) sum[r][v] = _mm256_setzero_si256();
  for (; segment != end; ++segment) {
    const uint16_t* code[ROWS];
    UNROLLED for (int r = 0; r < ROWS; ++r) code[r] = pixels[r] + segment->offset;
    for (int64_t s = 0; s < segment->steps; ++s, weight += STEP) {
      UNROLLED for (int pair = 0; pair < 2; ++pair) {
        __m256i w[2];
        UNROLLED for (int v = 0; v < 2; ++v) {
          const void* from = weight + 32 * pair + 16 * v;
          w[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from)));
        }
        UNROLLED for (int r = 0; r < ROWS; ++r) {
          const __m256i c = broadcast(code[r] + s * DEPTH + 2 * pair);
          UNROLLED for (int v = 0; v < 2; ++v) ADD_PRODUCTS("vpmaddwd", "vpaddd", sum[r][v], c, w[v]);
        }
      }
    }
  }
  put<ROWS, 2>(sum, to, onto);
}

// All pixels of a run, as many at a time as registers hold; the rest one by one.
inline void run_of(const uint8_t* const* pixels, int64_t count, const Segment* first, const Segment* end,
                   const int8_t* weight, int32_t* sums, bool onto) {
  int64_t i = 0;
  for (; i + 3 <= count; i += 3) tile<3>(pixels + i, first, end, weight, sums + i * BLOCK, onto);
  for (; i < count; ++i) tile<1>(pixels + i, first, end, weight, sums + i * BLOCK, onto);
}

inline void run_of(const uint16_t* const* pixels, int64_t count, const Segment* first, const Segment* end,
                   const int8_t* weight, int32_t* sums, bool onto) {
  for (int64_t half = 0; half < 2; ++half, weight += STEP / 2, sums += BLOCK / 2) {
    int64_t i = 0;
    for (; i + 6 <= count; i += 6) tile<6>(pixels + i, first, end, weight, sums + i * BLOCK, onto);
    for (; i < count; ++i) tile<1>(pixels + i, first, end, weight, sums + i * BLOCK, onto);
  }
}

template <typename Code>
void block_of(const Product& p, const Segment* segments, const Code* const* pixels, int64_t count,
              const int8_t* weight, int32_t* sums) {
  bool onto = false;
  for (int64_t s = 0; s < p.segments;) {
    int64_t end = s, steps = 0;
    for (bool last = false; !last; ++end) {
      steps += segments[end].steps;
      last = p.plan[4 * end + 3];
    }
    run_of(pixels, count, segments + s, segments + end, weight, sums, onto);
    weight += steps * STEP;
    onto = true;
    s = end;
  }
}

template <typename Code>
void pad(const Product& p, const Padded& padded, const uint8_t* codes, int64_t images, int64_t rows, int64_t columns,
         int zero, Code* to, int threads) {
  const int64_t own = p.groups * p.inputs, each = padded.pixel / p.groups;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < images * padded.height; ++row) {
    Code* out = to + row * padded.width * padded.pixel;
    const int64_t y = row % padded.height - p.pad_y;
    if (y < 0 || y >= rows) {
      std::fill(out, out + padded.width * padded.pixel, Code(zero));
      continue;
    }
    const uint8_t* from = codes + (row / padded.height * rows + y) * columns * own;
    out = std::fill_n(out, p.pad_x * padded.pixel, Code(zero));
    if (each == p.inputs) {
      out = std::copy(from, from + columns * own, out);
    } else {
      for (int64_t i = 0; i < columns * p.groups; ++i, from += p.inputs)
        out = std::fill_n(std::copy(from, from + p.inputs, out), each - p.inputs, Code(zero));
    }
    std::fill_n(out, p.pad_x * padded.pixel, Code(zero));
  }
}

template <typename Code>
void multiply(const Product& p, const Padded& padded, const Code* codes, int64_t images, int zero, const float* scale,
              const float* bias, float* out, int threads) {
  const int64_t height = (padded.height - p.dilation_y * (p.kernel_y - 1) - 1) / p.stride_y + 1;
  const int64_t width = (padded.width - p.dilation_x * (p.kernel_x - 1) - 1) / p.stride_x + 1;
  const int64_t total = images * height * width, blocks = up(p.outputs, BLOCK), each = padded.pixel / p.groups;
  const int64_t parts = up(total, PIXELS), weights = p.taps() * up(p.inputs, DEPTH) * STEP;
  std::vector<Segment> segments(p.segments);
  for (int64_t s = 0; s < p.segments; ++s) {
    const int64_t tap = p.plan[4 * s], y = tap / p.kernel_x * p.dilation_y, x = tap % p.kernel_x * p.dilation_x;
    segments[s] = {(y * padded.width + x) * padded.pixel + p.plan[4 * s + 1] * DEPTH, p.plan[4 * s + 2]};
  }
  // Blocks of outputs change fastest: the codes of a part are read from the second cache for all of them. Threads take
  // what comes next, for cores of a shared machine are not equally fast.
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < parts * p.groups * blocks; ++item) {
    const int64_t first = item / (p.groups * blocks) * PIXELS, place = item % (p.groups * blocks);
    const int64_t count = std::min(PIXELS, total - first), group = place / blocks, from = place % blocks * BLOCK;
    const Code* pixels[PIXELS];
    int64_t x = first % width, y = first / width % height, image = first / width / height;
    for (int64_t i = 0; i < count; ++i) {
      pixels[i] = codes + group * each +
                  ((image * padded.height + y * p.stride_y) * padded.width + x * p.stride_x) * padded.pixel;
      if (++x < width) continue;
      x = 0;
      if (++y < height) continue;
      y = 0;
      ++image;
    }
    alignas(32) int32_t sums[PIXELS * BLOCK];
    block_of(p, segments.data(), pixels, count, p.packed + place * weights, sums);
    const int64_t used = std::min(BLOCK, p.outputs - from), channel = group * p.outputs + from;
    float scales[BLOCK] = {}, biases[BLOCK] = {};
    uint32_t zeros[BLOCK];  // without a sign: either sum may leave 32 bits where their difference does not
    std::copy_n(scale + channel, used, scales);
    if (bias) std::copy_n(bias + channel, used, biases);
    for (int64_t o = 0; o < BLOCK; ++o) zeros[o] = uint32_t(zero) * uint32_t(p.sums[place * BLOCK + o]);
    for (int64_t i = 0; i < count; ++i) {
      float values[BLOCK], *to = out + (first + i) * p.groups * p.outputs + channel;
      float* into = used == BLOCK ? to : values;
      for (int64_t o = 0; o < BLOCK; ++o)
        into[o] = float(int32_t(uint32_t(sums[i * BLOCK + o]) - zeros[o])) * scales[o] + biases[o];
      if (into != to) std::copy_n(values, used, to);
    }
  }
}

}  // namespace
#endif

extern "C" {

// Whether hqdm_product works here.
int hqdm_products() {
#if defined(__AVX2__)
  return 1;
#else
  return 0;
#endif
}

// Bytes of a layer's packed weights.
int64_t hqdm_product_size(const Product* p) {
  return p->groups * up(p->outputs, BLOCK) * p->taps() * up(p->inputs, DEPTH) * STEP;
}

// Pack int8 weights (groups·outputs, inputs, taps) for codes up to `largest`: `packed` of hqdm_product_size bytes, `sums`
// of as many outputs in whole blocks, `plan` of taps·steps rows; sets words and segments.
void hqdm_product_pack(Product* p, const int8_t* weight, int64_t largest, int8_t* packed, int32_t* sums, int32_t* plan) {
  const int64_t taps = p->taps(), steps = up(p->inputs, DEPTH), blocks = up(p->outputs, BLOCK);
  const int64_t places = p->groups * blocks, each = taps * steps * STEP;
  std::memset(packed, 0, places * each);
  std::memset(sums, 0, places * BLOCK * sizeof *sums);
  for (int64_t o = 0; o < p->groups * p->outputs; ++o) {
    const int64_t within = o % p->outputs, place = o / p->outputs * blocks + within / BLOCK, lane = within % BLOCK;
    const int8_t* row = weight + o * p->inputs * taps;
    int32_t sum = 0;
    for (int64_t i = 0; i < p->inputs; ++i)
      for (int64_t tap = 0; tap < taps; ++tap, ++row) {
        packed[place * each + (tap * steps + i / DEPTH) * STEP + lane * DEPTH + i % DEPTH] = *row;
        sum += *row;
      }
    sums[place * BLOCK + lane] = sum;
  }
  // What 16 bits may hold of positive and of negative products, for each pair of inputs in a step and each output. Sums
  // on the way lie between the two.
  const int64_t pairs = places * BLOCK * DEPTH / 2, most = INT16_MAX / std::max<int64_t>(largest, 1);
  std::vector<int32_t> up_to(pairs), down_to(pairs), above(pairs), below(pairs);
  int64_t segments = 0, runs = 0, length = 0;
  p->words = 0;
  for (int64_t step = 0; step < taps * steps && !p->words; ++step) {
    int32_t farthest = 0, alone = 0;
    for (int64_t place = 0; place < places; ++place)
      for (int64_t pair = 0; pair < STEP / 2; ++pair) {
        const int8_t* of = packed + place * each + step * STEP + 2 * pair;
        const int64_t i = place * STEP / 2 + pair;
        above[i] = std::max<int32_t>(of[0], 0) + std::max<int32_t>(of[1], 0);
        below[i] = above[i] - of[0] - of[1];
        up_to[i] += above[i];
        down_to[i] += below[i];
        farthest = std::max({farthest, up_to[i], down_to[i]});
        alone = std::max({alone, above[i], below[i]});
      }
    p->words = alone > most;
    const bool widened = length && (farthest > most || length == LONGEST);
    if (widened) {
      plan[4 * segments - 1] = 1;
      up_to = above;
      down_to = below;
    }
    runs += !length || widened;
    length = widened ? 1 : length + 1;
    if (widened || step % steps == 0) {
      const int32_t started[] = {int32_t(step / steps), int32_t(step % steps), 0, 0};
      std::memcpy(plan + 4 * segments++, started, sizeof started);
    }
    plan[4 * segments - 2] += 1;
  }
  plan[4 * segments - 1] = 1;
  p->words |= taps * steps < 2 * runs;  // to widen the sums at every step costs more than to widen the operands
  if (p->words) {
    segments = 0;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t first = 0; first < steps; first += LONGEST) {
        const int32_t whole[] = {int32_t(tap), int32_t(first), int32_t(std::min(LONGEST, steps - first)), 1};
        std::memcpy(plan + 4 * segments++, whole, sizeof whole);
      }
    for (int64_t at = 0; at < places * each; at += STEP) {  // half the outputs, then their first pairs of inputs
      int8_t other[STEP];
      for (int64_t o = 0; o < BLOCK; ++o)
        for (int64_t i = 0; i < DEPTH; ++i)
          other[o / HALF * HALF * DEPTH + i / 2 * 2 * HALF + o % HALF * 2 + i % 2] = packed[at + o * DEPTH + i];
      std::memcpy(packed + at, other, STEP);
    }
  }
  p->segments = segments;
}

// Bytes of scratch memory that hqdm_product wants.
int64_t hqdm_product_scratch(const Product* p, int64_t images, int64_t rows, int64_t columns) {
  const Padded padded(*p, rows, columns);
  return as_they_are(*p) ? 0 : images * padded.height * padded.width * padded.pixel * (p->words ? 2 : 1);
}

// y (images, rows', columns', groups·outputs) of bytes (images, rows, columns, groups·inputs), of which `zero` is 0;
// scale (groups·outputs,), bias as many or nullptr. Every output side is 1 or more.
// 1: compiled without AVX2.
int hqdm_product(const Product* p, const uint8_t* codes, int64_t images, int64_t rows, int64_t columns, int32_t zero,
                 const float* scale, const float* bias, float* out, void* scratch, int threads) {
#if defined(__AVX2__)
  const Padded padded(*p, rows, columns);
  if (p->words) {
    auto* wide = static_cast<uint16_t*>(scratch);
    pad(*p, padded, codes, images, rows, columns, zero, wide, threads);
    multiply(*p, padded, wide, images, zero, scale, bias, out, threads);
  } else if (as_they_are(*p)) {
    multiply(*p, padded, codes, images, zero, scale, bias, out, threads);
  } else {
    auto* bytes = static_cast<uint8_t*>(scratch);
    pad(*p, padded, codes, images, rows, columns, zero, bytes, threads);
    multiply(*p, padded, bytes, images, zero, scale, bias, out, threads);
  }
  return 0;
#else
  return 1;
#endif
}
}
