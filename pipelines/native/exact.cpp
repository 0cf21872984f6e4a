// What torch has no operator for: block-wise Hadamard transforms, alone and together with quantisation and with what is
// before it, a group norm and SiLU or a gate.
//
// Rotations and quantisers compute the very bits of their counterparts in torch (pipelines/quant): the same additions in
// the same order, true division, rounding to the nearest even. Hence -ffp-contract=off, and nothing of -ffast-math.
// Norms and gates are floating point and not torch's to the bit; alone and before a quantiser they have the same bits.
// Plain C interface, addresses and numbers only; pipelines/native/__init__.py calls it.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "butterflies.h"
#include "exponential.h"

namespace {

template <int COUNT>
inline void silu(Floats (&v)[COUNT]) {
  Floats e[COUNT];
  EACH e[k] = size_of(v[k]) * -LOG2_E;
  powers_of_two(e);  // e^-|v|
  EACH v[k] = v[k] * (v[k] < 0 ? e[k] : Floats{} + 1.0f);
  EACH v[k] = v[k] / (1.0f + e[k]);
}

// v·Φ(v), by the error function of Abramowitz and Stegun's 7.1.26: to 3e-7 of |v|.
template <int COUNT>
inline void gelu(Floats (&v)[COUNT]) {
  Floats t[COUNT], p[COUNT], e[COUNT];
  EACH t[k] = 1.0f / (1.0f + size_of(v[k]) * 0.23164190f);  // 0.3275911 / √2
  EACH e[k] = v[k] * v[k] * (-0.5f * LOG2_E);
  powers_of_two(e);                                   // e^(-v²/2)
  EACH p[k] = t[k] * 0.5307027145f - 0.7265760135f;   // of ½·erfc
  EACH p[k] = p[k] * t[k] + 0.7107068705f;
  EACH p[k] = p[k] * t[k] - 0.142248368f;
  EACH p[k] = p[k] * t[k] + 0.127414796f;
  EACH p[k] = p[k] * t[k] * e[k];                     // Φ(-|v|)
  EACH v[k] = v[k] * (v[k] < 0 ? p[k] : 1.0f - p[k]);
}

// What is made of a value before anything else.
struct Before {
  const float *factors, *terms;  // of a norm, (images, channels): x·factor + term; nullptr: there is none
  int64_t rows;                  // of an image
  bool silu;                     // after the norm
  bool gated;                    // a row's gates lie after its values: x·gelu(gate)

  int64_t stride(int64_t channels) const { return gated ? 2 * channels : channels; }
  int64_t of(int64_t row, int64_t channels) const { return factors ? row / rows * channels : 0; }
};

// COUNT vectors of values, those from `at` of a row; `place` is that of the image's factors for them.
template <int COUNT>
inline void make(const float* at, const Before& before, int64_t channels, int64_t place, Floats (&v)[COUNT]) {
  EACH v[k] = load(at + k * LANES);
  if (before.factors) {
    EACH v[k] = v[k] * load(before.factors + place + k * LANES) + load(before.terms + place + k * LANES);
    if (before.silu) silu(v);
  }
  if (before.gated) {
    Floats gate[COUNT];
    EACH gate[k] = load(at + channels + k * LANES);
    gelu(gate);
    EACH v[k] *= gate[k];
  }
}

struct Codes {  // how values become bytes; the bounds in every lane
  float scale;
  Floats low, high;
  int32_t offset;

  // Clamping first is the same where the bounds are integers. NaN passes the comparisons, and `bad` remembers it.
  template <int COUNT>
  void write(Floats (&v)[COUNT], Integers& bad, uint8_t* to) const {
    EACH v[k] = v[k] / scale;
    EACH bad |= v[k] != v[k];
    EACH v[k] = v[k] < low ? low : v[k];
    EACH v[k] = v[k] > high ? high : v[k];
    EACH {
      const Bytes b = low_bytes((Integers)(v[k] + MAGIC) + (offset - MAGIC_BITS));
      std::memcpy(to + k * LANES, &b, LANES);
    }
  }
};

template <int ORDER>
void rotate(const float* x, float* y, int64_t values, const float* signs, bool inverse, int threads) {
  constexpr int WIDTH = width<ORDER>(), COUNT = WIDTH / LANES;
  Floats sign[COUNT];
  diagonal<ORDER>(signs, sign);
  const int64_t chunks = values / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Floats v[COUNT];
    for (int k = 0; k < COUNT; ++k) v[k] = load(x + chunk * WIDTH + k * LANES);
    turn<ORDER>(v, sign, signs, inverse);
    std::memcpy(y + chunk * WIDTH, v, sizeof v);
  }
}

constexpr int SIDE_BY_SIDE = LANES == 16 ? 4 : 2;  // vectors, with what is made of them in registers

// What lies around a rotation, a value for each channel or nullptr; the diagonal that `signs` repeats, in lanes.
template <int ORDER>
struct Around {
  const float *signs, *centre, *gain;
  Floats sign[width<ORDER>() / LANES];
};

// COUNT vectors of a row to their bytes, those from channel c on.
template <int ORDER, int COUNT>
inline void quantise(const float* from, uint8_t* to, int64_t c, int64_t channels, int64_t image, const Before& before,
                     const Around<ORDER>& around, const Codes& codes, Integers& bad) {
  Floats v[COUNT];
  make(from + c, before, channels, image + c, v);
  if (around.centre) EACH v[k] -= load(around.centre + c + k * LANES);
  if (around.gain) EACH v[k] *= load(around.gain + c + k * LANES);
  if (around.signs) EACH v[k] *= around.sign[k % (width<ORDER>() / LANES)];
  butterflies<ORDER>(v);
  codes.write(v, bad, to + c);
}

template <int ORDER>
bool quantise_rows(const float* x, uint8_t* out, int64_t rows, int64_t channels, const float* signs,
                   const float* centre, const float* gain, const Codes& given_codes, const uint8_t* carried,
                   int64_t extra, const Before& given_before, int threads) {
  constexpr int LEAST = width<ORDER>() / LANES, MOST = LEAST < SIDE_BY_SIDE ? SIDE_BY_SIDE : LEAST;
  Around<ORDER> given_around{signs, centre, gain, {}};
  diagonal<ORDER>(signs, given_around.sign);
  int found = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : found)
  for (int64_t row = 0; row < rows; ++row) {
    const Codes codes = given_codes;  // bytes that are written might be these, as far as a compiler knows
    const Before before = given_before;
    const Around<ORDER> around = given_around;
    Integers bad = {};
    uint8_t* to = out + row * (channels + extra);
    const float* from = x + row * before.stride(channels);
    const int64_t image = before.of(row, channels);
    int64_t c = 0;
    for (; c + MOST * LANES <= channels; c += MOST * LANES)
      quantise<ORDER, MOST>(from, to, c, channels, image, before, around, codes, bad);
    for (; c < channels; c += LEAST * LANES)
      quantise<ORDER, LEAST>(from, to, c, channels, image, before, around, codes, bad);
    std::memcpy(to + channels, carried, extra);
    found |= any(bad);
  }
  return found;
}

constexpr int64_t CHUNK = 64;  // rows whose sums are in fp32; fixed, so that threads change no bit
constexpr int SPAN = 4;        // vectors of channels at a time, where there are so many

// Sums of x − x₀ and of their squares over some rows, for COUNT vectors of channels.
template <int COUNT>
inline void sums_of(const float* x, int64_t rows, int64_t stride, const float* first, float* sums, float* squares) {
  Floats base[COUNT], sum[COUNT] = {}, square[COUNT] = {};
  for (int k = 0; k < COUNT; ++k) base[k] = load(first + k * LANES);
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < COUNT; ++k) {
      const Floats d = load(x + row * stride + k * LANES) - base[k];
      sum[k] += d;
      square[k] += d * d;
    }
  for (int k = 0; k < COUNT; ++k) {
    store(sums + k * LANES, sum[k]);
    store(squares + k * LANES, square[k]);
  }
}

}  // namespace

extern "C" {

// Whether loops are shared out to threads.
int hqdm_threaded() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// y = x·blockdiag(M, …) over `values` contiguous floats, M = D·H of `order`, or Mᵀ. y may be x. 1: no such order, or
// `values` is no multiple of max(order, lanes).
int hqdm_rotate(const float* x, float* y, int64_t values, int order, const float* signs, int inverse, int threads) {
  switch (order) {
#define CASE(N) \
  case N:       \
    if (values % width<N>()) return 1; \
    rotate<N>(x, y, values, signs, inverse, threads); \
    return 0;
    ORDERS(CASE)
#undef CASE
  }
  return 1;
}

// Bytes of rows × channels: clamp(⌊((x − centre)·gain)·blockdiag(M, …)/scale⌉, low, high) + offset, modulo 256, and
// after each row the `extra` bytes `carried`. What x is comes of what is given, as hqdm_made makes it.
// 1: no such order or channels are no multiple of max(order, lanes). 2: NaN among what was to be quantised.
int hqdm_codes(const float* x, uint8_t* out, int64_t rows, int64_t channels, int order, const float* signs,
               const float* centre, const float* gain, float scale, float low, float high, int32_t offset,
               const uint8_t* carried, int64_t extra, const float* factors, const float* terms, int64_t rows_of_image,
               int silu, int gated, int threads) {
  const Codes codes{scale, Floats{} + low, Floats{} + high, offset};
  const Before before{factors, terms, rows_of_image, silu != 0, gated != 0};
  switch (order) {
#define CASE(N) \
  case N:       \
    if (channels % width<N>()) return 1; \
    return quantise_rows<N>(x, out, rows, channels, signs, centre, gain, codes, carried, extra, before, threads) ? 2 : 0;
    ORDERS(CASE)
#undef CASE
  }
  return 1;
}

// y (rows, channels) = x·factor + term of every image and channel, then SiLU if asked for, where there are factors; x is
// as many values, or with `gated` (rows, 2·channels), of which the second half are gates: x·gelu(gate). 1: channels are
// no multiple of LANES.
int hqdm_made(const float* x, float* y, int64_t rows, int64_t channels, const float* factors, const float* terms,
              int64_t rows_of_image, int silu, int gated, int threads) {
  if (channels % LANES) return 1;
  const Before before{factors, terms, rows_of_image, silu != 0, gated != 0};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t image = before.of(row, channels);
    const float* from = x + row * before.stride(channels);
    for (int64_t c = 0; c < channels; c += LANES) {
      Floats v[1];
      make(from + c, before, channels, image + c, v);
      store(y + row * channels + c, v[0]);
    }
  }
  return 0;
}

// Floats of scratch memory that hqdm_group_norm wants.
int64_t hqdm_group_norm_scratch(int64_t images, int64_t rows, int64_t channels) {
  return images * ((rows + CHUNK - 1) / CHUNK) * channels * 2;
}

// factors, terms (images, channels) with which x·factor + term is the group norm of x + shift: x (images, rows,
// channels), shift (images, channels) or nullptr, weight and bias (channels,). Sums are of differences to an image's
// first row, in fp32 over CHUNK rows and in fp64 beyond. 1: channels are no multiple of LANES or of groups.
int hqdm_group_norm(const float* x, float* factors, float* terms, int64_t images, int64_t rows, int64_t channels,
                    int64_t groups, const float* weight, const float* bias, const float* shift, double eps,
                    float* scratch, int threads) {
  if (channels % LANES || channels % groups) return 1;
  const int64_t chunks = (rows + CHUNK - 1) / CHUNK, each = channels / groups;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < images * chunks; ++item) {
    const int64_t from = item % chunks * CHUNK, count = rows - from < CHUNK ? rows - from : CHUNK;
    const float* first = x + item / chunks * rows * channels;
    float *sums = scratch + item * 2 * channels, *squares = sums + channels;
    int64_t c = 0;
    for (; c + SPAN * LANES <= channels; c += SPAN * LANES)
      sums_of<SPAN>(first + from * channels + c, count, channels, first + c, sums + c, squares + c);
    for (; c < channels; c += LANES)
      sums_of<1>(first + from * channels + c, count, channels, first + c, sums + c, squares + c);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < images * groups; ++item) {
    const int64_t image = item / groups, begin = item % groups * each, end = begin + each;
    const float* of_image = scratch + image * chunks * 2 * channels;
    double total = 0, spread = 0;
    for (int pass = 0; pass < 2; ++pass)  // the group's mean, then squares about it
      for (int64_t c = begin; c < end; ++c) {
        double sum = 0, square = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          sum += of_image[chunk * 2 * channels + c];
          square += of_image[chunk * 2 * channels + channels + c];
        }
        const double mean = sum / rows + x[image * rows * channels + c] + (shift ? shift[image * channels + c] : 0.0f);
        if (pass == 0) {
          total += mean / each;
        } else {
          spread += (square - sum * (sum / rows)) / rows + (mean - total) * (mean - total);
        }
      }
    const double inverse = 1.0 / std::sqrt(spread / each + eps);
    for (int64_t c = begin; c < end; ++c) {
      const double factor = inverse * weight[c], moved = shift ? shift[image * channels + c] : 0.0f;
      factors[image * channels + c] = float(factor);
      terms[image * channels + c] = float(bias[c] + (moved - total) * factor);
    }
  }
  return 0;
}

}
