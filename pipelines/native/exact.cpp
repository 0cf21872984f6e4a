// What torch has no operator for: block-wise Hadamard transforms, alone and together with quantisation.
//
// Every function computes the very bits of its counterpart in torch (pipelines/quant): the same additions in the same
// order, true division, rounding to the nearest even. Hence -ffp-contract=off, and nothing of -ffast-math.
// Plain C interface, addresses and numbers only; pipelines/native/__init__.py calls it.

#include <cstdint>
#include <cstring>

#include "butterflies.h"

namespace {

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
  return __builtin_convertvector(n, Bytes);
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
              const float* gain, const Codes& codes, const uint8_t* carried, int64_t extra, int threads) {
  constexpr int WIDTH = width<ORDER>(), COUNT = WIDTH / LANES;
  Floats sign[COUNT];
  diagonal<ORDER>(signs, sign);
  int found = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : found)
  for (int64_t row = 0; row < rows; ++row) {
    Integers bad = {};
    uint8_t* to = out + row * (channels + extra);
    for (int64_t c = 0; c < channels; c += WIDTH) {
      Floats v[COUNT];
      for (int k = 0; k < COUNT; ++k) {
        const int64_t at = c + k * LANES;
        v[k] = load(x + row * channels + at);
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

}  // namespace

extern "C" {

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
// after each row the `extra` bytes `carried`.
// 1: no such order or channels are no multiple of max(order, lanes). 2: NaN among what was to be quantised.
int hqdm_codes(const float* x, uint8_t* out, int64_t rows, int64_t channels, int order, const float* signs,
               const float* centre, const float* gain, float scale, float low, float high, int32_t offset,
               const uint8_t* carried, int64_t extra, int threads) {
  const Codes codes{scale, Floats{} + low, Floats{} + high, offset};
  switch (order) {
#define CASE(N) \
  case N:       \
    if (channels % width<N>()) return 1; \
    return quantise<N>(x, out, rows, channels, signs, centre, gain, codes, carried, extra, threads) ? 2 : 0;
    ORDERS(CASE)
#undef CASE
  }
  return 1;
}

}
