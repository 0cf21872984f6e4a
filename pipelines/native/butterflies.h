// Block-wise Hadamard transforms within registers. Their sums have a fixed order: -ffp-contract=off is not needed for
// them, but for what is done with the results.

#pragma once

#include "lanes.h"

namespace {

// Lanes a, b that lie HALF apart become a + b and a - b; a - b as a + (-b), which has the same bits.
template <int HALF>
inline Floats in_lanes(Floats v) {
  Integers sign;
  for (int i = 0; i < LANES; ++i) sign[i] = (i & HALF) ? INT32_MIN : 0;
  return exchanged<HALF>(v) + (Floats)((Integers)v ^ sign);
}

// Butterflies of blocks of ORDER over COUNT vectors, halves 1, 2, 4, … apart in this order.
template <int ORDER, int COUNT>
inline void butterflies(Floats (&v)[COUNT]) {
  for (int k = 0; k < COUNT; ++k) {
    if constexpr (ORDER >= 2) v[k] = in_lanes<1>(v[k]);
    if constexpr (ORDER >= 4) v[k] = in_lanes<2>(v[k]);
    if constexpr (ORDER >= 8 && LANES >= 8) v[k] = in_lanes<4>(v[k]);
    if constexpr (ORDER >= 16 && LANES >= 16) v[k] = in_lanes<8>(v[k]);
  }
  for (int half = 1; half < ORDER / LANES; half *= 2)
    for (int i = 0; i < COUNT; i += 2 * half)
      for (int j = i; j < i + half; ++j) {
        const Floats a = v[j], b = v[j + half];
        v[j] = a + b;
        v[j + half] = a - b;
      }
}

template <int ORDER>
constexpr int width() { return ORDER > LANES ? ORDER : LANES; }

// The diagonal D of a block in lanes; ones where there are no signs.
template <int ORDER, int COUNT>
inline void diagonal(const float* signs, Floats (&sign)[COUNT]) {
  for (int i = 0; i < COUNT * LANES; ++i) sign[i / LANES][i % LANES] = signs ? signs[i % ORDER] : 1.0f;
}

// v·M = the diagonal, then the butterflies; v·Mᵀ = the butterflies, then the diagonal.
template <int ORDER, int COUNT>
inline void turn(Floats (&v)[COUNT], const Floats (&sign)[COUNT], const float* signs, bool inverse) {
  if (signs && !inverse)
    for (int k = 0; k < COUNT; ++k) v[k] *= sign[k];
  butterflies<ORDER>(v);
  if (signs && inverse)
    for (int k = 0; k < COUNT; ++k) v[k] *= sign[k];
}

}  // namespace

#define ORDERS(CASE) CASE(1) CASE(2) CASE(4) CASE(8) CASE(16) CASE(32) CASE(64) CASE(128) CASE(256)
