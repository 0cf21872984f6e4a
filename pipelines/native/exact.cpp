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

inline Floats size_of(Floats v) { return (Floats)((Integers)v & INT32_MAX); }

inline Floats silu(Floats v) {
  const Floats e = exponential(-size_of(v));
  return v * (v < 0 ? e : Floats{} + 1.0f) / (1.0f + e);
}

// v·Φ(v), by the error function of Abramowitz and Stegun's 7.1.26: to 8e-8 of |v|.
inline Floats gelu(Floats v) {
  const Floats t = 1.0f / (1.0f + size_of(v) * 0.23164190f);  // 0.3275911 / √2
  Floats p = Floats{} + 0.5307027145f;  // halves of the polynomial's: of ½·erfc
  p = p * t - 0.7265760135f;
  p = p * t + 0.7107068705f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  const Floats beyond = p * t * exponential(v * v * -0.5f);  // Φ(-|v|)
  return v * (v < 0 ? beyond : 1.0f - beyond);
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

// LANES values at `at` of a row; `place` is that of the image's factors for them.
inline Floats made_of(const float* at, const Before& before, int64_t channels, int64_t place) {
  Floats v = load(at);
  if (before.factors) {
    v = v * load(before.factors + place) + load(before.terms + place);
    if (before.silu) v = silu(v);
  }
  if (before.gated) v *= gelu(load(at + channels));
  return v;
}

struct Codes {  // how values become bytes; the bounds in every lane
  float scale;
  Floats low, high;
  int32_t offset;
};

// Clamping first is the same where the bounds are integers. NaN passes the comparisons, and `bad` remembers it.
inline Bytes bytes_of(Floats v, const Codes& codes, Integers& bad) {
  v = v / codes.scale;
  bad |= v != v;
  v = v < codes.low ? codes.low : v;
  v = v > codes.high ? codes.high : v;
  const Integers n = (Integers)(v + MAGIC) + (codes.offset - MAGIC_BITS);
  return low_bytes(n);
}

bool any(Integers v) {
  int32_t found = 0;
  for (int i = 0; i < LANES; ++i) found |= v[i];
  return found != 0;
}

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

template <int ORDER>
bool quantise(const float* x, uint8_t* out, int64_t rows, int64_t channels, const float* signs, const float* centre,
              const float* gain, const Codes& given_codes, const uint8_t* carried, int64_t extra,
              const Before& given_before, int threads) {
  constexpr int WIDTH = width<ORDER>(), COUNT = WIDTH / LANES;
  Floats sign[COUNT];
  diagonal<ORDER>(signs, sign);
  int found = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : found)
  for (int64_t row = 0; row < rows; ++row) {
    const Codes codes = given_codes;  // bytes that are written might be these, as far as a compiler knows
    const Before before = given_before;
    Integers bad = {};
    uint8_t* to = out + row * (channels + extra);
    const int64_t image = before.of(row, channels);
    const float* from = x + row * before.stride(channels);
    for (int64_t c = 0; c < channels; c += WIDTH) {
      Floats v[COUNT];
      for (int k = 0; k < COUNT; ++k) {
        const int64_t at = c + k * LANES;
        v[k] = made_of(from + at, before, channels, image + at);
        if (centre) v[k] -= load(centre + at);
        if (gain) v[k] *= load(gain + at);
        if (signs) v[k] *= sign[k];
      }
      butterflies<ORDER>(v);
      for (int k = 0; k < COUNT; ++k) {
        const Bytes b = bytes_of(v[k], codes, bad);
        std::memcpy(to + c + k * LANES, &b, LANES);
      }
    }
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
    return quantise<N>(x, out, rows, channels, signs, centre, gain, codes, carried, extra, before, threads) ? 2 : 0;
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
    for (int64_t c = 0; c < channels; c += LANES)
      store(y + row * channels + c, made_of(from + c, before, channels, image + c));
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
