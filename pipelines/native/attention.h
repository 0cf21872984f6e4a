// What both attentions are made of.

#pragma once

#include "exponential.h"

namespace {

constexpr int KEYS = 2 * LANES;               // keys that a pass over a head's width takes
constexpr int ROWS = LANES == 16 ? 8 : 6;     // queries at a time: twice as many sums as these fit into registers
constexpr int64_t BLOCK = 64 / ROWS * ROWS;  // queries that a thread takes at a time

inline int64_t padded(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

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
