// What both attentions are made of.

#pragma once

#include "lanes.h"

namespace {

constexpr int KEYS = 2 * LANES;            // keys that a pass over a head's width takes
constexpr int ROWS = LANES == 16 ? 8 : 4;  // queries at a time: twice as many sums as these fit into registers
constexpr int64_t BLOCK = 64;              // queries that a thread takes at a time

inline int64_t padded(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// exp(x) for x ≤ 0, to about two units in the last place: 2^n·p(r) with |r| ≤ ln 2 / 2.
inline Floats exponential(Floats x) {
  const Floats least = Floats{} - 87.0f;
  x = x < least ? least : x;
  const Floats shifted = x * 1.44269504f + MAGIC;
  const Floats n = shifted - MAGIC;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = ((Integers)shifted - MAGIC_BITS) << 23;
  return (Floats)((Integers)p + power);
}

inline float largest_lane(Floats v) {
  float found = v[0];
  for (int i = 1; i < LANES; ++i) found = v[i] > found ? v[i] : found;
  return found;
}

// The largest of `count` values, a multiple of LANES.
inline float largest_of(const float* values, int64_t count) {
  Floats high = load(values);
  for (int64_t at = LANES; at < count; at += LANES) {
    const Floats now = load(values + at);
    high = now > high ? now : high;
  }
  return largest_lane(high);
}

}  // namespace
