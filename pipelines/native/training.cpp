// The passes of a layer's training that torch would make over tensors of the weight's or the activation's size, one
// after the other: values to codes, and the codes' gradient back to the values.
//
// Integers have the bits of pipelines/quant/passes.py, which defines them in torch; so have the gradients of single
// entries. Sums are added up in double precision, row by row, and leave as such: their order hardly matters then.
// Hence -ffp-contract=off. Plain C interface; pipelines/native/__init__.py calls it.

#include "butterflies.h"

typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
typedef double HalfDoubles __attribute__((vector_size(4 * LANES)));
typedef int8_t Small __attribute__((vector_size(LANES)));
typedef int16_t Wide __attribute__((vector_size(2 * LANES)));

// Rows of a weight, and how they are quantised. What may be null says so.
struct Weight {
  const float* base;        // (rows, columns), or null where `codes` has it
  const uint8_t* codes;     // (rows, columns): base = (codes + low - base_zero)·base_scale
  const float* base_scale;  // (rows)
  const float* base_zero;   // (rows)
  const float* gain;        // (channels) or null
  const float* scale;       // (rows)
  const float* zero;        // (rows), or null for 0
  const float* lows;        // (rows), or null for `low`
  const float* highs;
  const float* signs;       // (order) or null
  int64_t rows, columns, channels;
  float low, high;
  int32_t order;
  int32_t turned;           // whether rows are rotated before they are quantised
  int32_t folded;           // whether codes are rotated afterwards
};

namespace {

struct Sum {  // of floats, in double precision, lane by lane
  HalfDoubles first = {}, second = {};
  void add(Floats v) {
    HalfFloats half[2];
    std::memcpy(half, &v, sizeof v);
    first += __builtin_convertvector(half[0], HalfDoubles);
    second += __builtin_convertvector(half[1], HalfDoubles);
  }
  double total() const {
    double result = 0;
    for (int i = 0; i < LANES / 2; ++i) result += first[i] + second[i];
    return result;
  }
};

inline Floats bounded(Floats v, float low, float high) {  // NaN passes
  const Floats least = Floats{} + low, most = Floats{} + high;
  v = v < least ? least : v;
  return v > most ? most : v;
}

inline Floats nearest(Floats v) { return (v + MAGIC) - MAGIC; }  // of what was bounded

inline Floats where(Integers chosen, Floats v) { return v * (Floats)(chosen & (Integers)(Floats{} + 1.0f)); }

template <int ORDER>
struct Rows {
  static constexpr int WIDTH = width<ORDER>(), COUNT = WIDTH / LANES;
  const Weight& w;
  Floats sign[COUNT];
  int64_t row = 0;
  float low = 0, high = 0, zero = 0;

  explicit Rows(const Weight& weight) : w(weight) { diagonal<ORDER>(w.signs, sign); }

  void at(int64_t now) {
    row = now;
    low = w.lows ? w.lows[row] : w.low;
    high = w.highs ? w.highs[row] : w.high;
    zero = w.zero ? w.zero[row] : 0.0f;
  }

  void base(int64_t column, Floats (&v)[COUNT]) const {
    const int64_t from = row * w.columns + column;
    if (!w.codes) {
      for (int k = 0; k < COUNT; ++k) v[k] = load(w.base + from + k * LANES);
      return;
    }
    for (int k = 0; k < COUNT; ++k) {
      Bytes bytes;
      std::memcpy(&bytes, w.codes + from + k * LANES, LANES);
      v[k] = __builtin_convertvector(__builtin_convertvector(bytes, Integers), Floats);
      v[k] = ((v[k] + low) - w.base_zero[row]) * w.base_scale[row];
    }
    if (w.turned) {
      turn<ORDER>(v, sign, w.signs, true);
      for (int k = 0; k < COUNT; ++k) v[k] *= 1.0f / ORDER;
    }
    if (w.gain)
      for (int k = 0; k < COUNT; ++k) v[k] *= load(w.gain + column % w.channels + k * LANES);
  }

  void over_gain(int64_t column, Floats (&v)[COUNT]) const {
    if (w.gain)
      for (int k = 0; k < COUNT; ++k) v[k] /= load(w.gain + column % w.channels + k * LANES);
  }
};

template <int ORDER, class Whole>
void codes(const Weight& w, const float* added, const float* factor, void* rounded, float* out, int threads) {
  constexpr int COUNT = Rows<ORDER>::COUNT, WIDTH = Rows<ORDER>::WIDTH;
#pragma omp parallel num_threads(threads)
  {
    Rows<ORDER> rows(w);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < w.rows; ++row) {
      rows.at(row);
      const float scale = w.scale[row], by = factor ? factor[row] : 1.0f;
      for (int64_t c = 0; c < w.columns; c += WIDTH) {
        const int64_t here = row * w.columns + c;
        Floats v[COUNT];
        rows.base(c, v);
        if (added)
          for (int k = 0; k < COUNT; ++k) v[k] = load(added + here + k * LANES) + v[k];
        rows.over_gain(c, v);
        if (w.turned) turn<ORDER>(v, rows.sign, w.signs, false);
        for (int k = 0; k < COUNT; ++k) {
          const Floats found = bounded(v[k] / scale, rows.low - 1 - rows.zero, rows.high + 1 - rows.zero);
          v[k] = nearest(found);
          if (rounded) {
            const Whole whole = __builtin_convertvector(__builtin_convertvector(v[k] + rows.zero, Integers), Whole);
            std::memcpy((char*)rounded + (here + k * LANES) * sizeof(whole[0]), &whole, sizeof whole);
          }
          v[k] = bounded(v[k], rows.low - rows.zero, rows.high - rows.zero);
        }
        if (!out) continue;
        if (w.folded) turn<ORDER>(v, rows.sign, w.signs, false);
        for (int k = 0; k < COUNT; ++k) store(out + here + k * LANES, factor ? v[k] * by : v[k]);
      }
    }
  }
}

template <int ORDER, class Whole>
void gradients(const Weight& w, const void* rounded, float* grad, double* code_sums, double* base_sums, int threads) {
  constexpr int COUNT = Rows<ORDER>::COUNT, WIDTH = Rows<ORDER>::WIDTH;
#pragma omp parallel num_threads(threads)
  {
    Rows<ORDER> rows(w);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < w.rows; ++row) {
      rows.at(row);
      Sum by_code, by_base;
      for (int64_t c = 0; c < w.columns; c += WIDTH) {
        const int64_t here = row * w.columns + c;
        Floats g[COUNT], base[COUNT];
        for (int k = 0; k < COUNT; ++k) g[k] = load(grad + here + k * LANES);
        if (w.folded) turn<ORDER>(g, rows.sign, w.signs, true);
        for (int k = 0; k < COUNT; ++k) {
          Whole whole;
          std::memcpy(&whole, (const char*)rounded + (here + k * LANES) * sizeof(whole[0]), sizeof whole);
          const Floats found = __builtin_convertvector(__builtin_convertvector(whole, Integers), Floats);
          const Floats code = bounded(found, rows.low, rows.high);
          by_code.add(g[k] * (code - rows.zero));
          g[k] = where(found == code, g[k]);
        }
        if (w.turned) turn<ORDER>(g, rows.sign, w.signs, true);
        rows.over_gain(c, g);
        rows.base(c, base);
        for (int k = 0; k < COUNT; ++k) {
          by_base.add(g[k] * base[k]);
          store(grad + here + k * LANES, g[k]);
        }
      }
      code_sums[row] = by_code.total();
      base_sums[row] = by_base.total();
    }
  }
}

template <int ORDER>
void activation(const float* x, float* out, int64_t rows, int64_t channels, const float* signs, float scale, float low,
                float high, bool undone, int threads) {
  constexpr int COUNT = width<ORDER>() / LANES;
  Floats sign[COUNT];
  diagonal<ORDER>(signs, sign);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t at = row * channels; at < (row + 1) * channels; at += width<ORDER>()) {
      Floats v[COUNT];
      for (int k = 0; k < COUNT; ++k) v[k] = load(x + at + k * LANES);
      turn<ORDER>(v, sign, signs, false);
      for (int k = 0; k < COUNT; ++k) v[k] = nearest(bounded(v[k] / scale, low, high));
      if (undone) turn<ORDER>(v, sign, signs, true);
      for (int k = 0; k < COUNT; ++k) store(out + at + k * LANES, v[k]);
    }
}

template <int ORDER>
void activation_gradient(const float* x, float* grad, double* sums, int64_t rows, int64_t channels, const float* signs,
                         float scale, float low, float high, bool undone, int threads) {
  constexpr int COUNT = width<ORDER>() / LANES;
  Floats sign[COUNT];
  diagonal<ORDER>(signs, sign);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    Sum outside, through;
    for (int64_t at = row * channels; at < (row + 1) * channels; at += width<ORDER>()) {
      Floats v[COUNT], values[COUNT], g[COUNT];
      for (int k = 0; k < COUNT; ++k) {
        v[k] = values[k] = load(x + at + k * LANES);
        g[k] = load(grad + at + k * LANES);
      }
      turn<ORDER>(v, sign, signs, false);
      if (undone) turn<ORDER>(g, sign, signs, false);
      for (int k = 0; k < COUNT; ++k) {
        const Floats found = nearest(bounded(v[k] / scale, low - 1, high + 1));
        const Integers beyond = (found < low) | (found > high);
        outside.add(where(beyond, g[k]));
        g[k] = where(~beyond, g[k]);
      }
      turn<ORDER>(g, sign, signs, true);
      for (int k = 0; k < COUNT; ++k) {
        g[k] /= scale;
        through.add(g[k] * values[k]);
        store(grad + at + k * LANES, g[k]);
      }
    }
    sums[2 * row] = outside.total();
    sums[2 * row + 1] = through.total();
  }
}

}  // namespace

extern "C" {

// Rows of base + added (null: 0) quantised. rounded (null: not wanted): ⌊W/s⌉ + z, cut off one beyond the codes, int8,
// or int16 where `wide`. out (null): codes − zeros, rotated where w.folded, times factor[row] where that is not null.
// 1: no such order, or columns or channels are no multiple of max(order, lanes).
int hqdm_weight_codes(const Weight* w, const float* added, const float* factor, void* rounded, int wide, float* out,
                      int threads) {
  switch (w->order) {
#define CASE(N) \
  case N:       \
    if (w->columns % width<N>() || w->channels % width<N>()) return 1; \
    (wide ? codes<N, Wide> : codes<N, Small>)(*w, added, factor, rounded, out, threads); \
    return 0;
    ORDERS(CASE)
#undef CASE
  }
  return 1;
}

// The gradient of the codes (rotated ones where w.folded) becomes that of base + added, in place. The rows' sums of the
// gradient times codes − zeros, and of the result times the base.
int hqdm_weight_gradient(const Weight* w, const void* rounded, int wide, float* grad, double* code_sums,
                         double* base_sums, int threads) {
  switch (w->order) {
#define CASE(N) \
  case N:       \
    if (w->columns % width<N>() || w->channels % width<N>()) return 1; \
    (wide ? gradients<N, Wide> : gradients<N, Small>)(*w, rounded, grad, code_sums, base_sums, threads); \
    return 0;
    ORDERS(CASE)
#undef CASE
  }
  return 1;
}

// clamp(⌊x·blockdiag(M, …)/scale⌉, low, high) of rows × channels, times blockdiag(Mᵀ, …) where `undone`.
int hqdm_activation(const float* x, float* out, int64_t rows, int64_t channels, int order, const float* signs,
                    float scale, float low, float high, int undone, int threads) {
  switch (order) {
#define CASE(N) \
  case N:       \
    if (channels % width<N>()) return 1; \
    activation<N>(x, out, rows, channels, signs, scale, low, high, undone, threads); \
    return 0;
    ORDERS(CASE)
#undef CASE
  }
  return 1;
}

// The gradient of that becomes x's, in place. sums (rows, 2): of the codes' gradient where x is clipped, and of the
// result times x.
int hqdm_activation_gradient(const float* x, float* grad, double* sums, int64_t rows, int64_t channels, int order,
                             const float* signs, float scale, float low, float high, int undone, int threads) {
  switch (order) {
#define CASE(N) \
  case N:       \
    if (channels % width<N>()) return 1; \
    activation_gradient<N>(x, grad, sums, rows, channels, signs, scale, low, high, undone, threads); \
    return 0;
    ORDERS(CASE)
#undef CASE
  }
  return 1;
}

}
