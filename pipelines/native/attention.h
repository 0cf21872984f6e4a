// What both attentions are made of.

#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "exponential.h"

namespace {

// Blocks of queries are handed out as threads get done with theirs: two cores are seldom equally fast, and which thread
// takes a block changes no bit.
inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

constexpr int KEYS = 2 * LANES;              // keys that a pass over a head's width takes
constexpr int ROWS = LANES == 16 ? 8 : 6;    // queries at a time: twice as many sums as these fit into registers
constexpr int64_t BLOCK = 64 / ROWS * ROWS;  // queries that a thread takes at a time

inline int64_t padded(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Floats from one query's scores to the next's. With a power of two between them, those of all queries that are taken at
// a time would meet in the same few lines of the first cache.
inline int64_t score_stride_of(int64_t padded_keys) { return padded_keys + LANES; }

inline Floats higher(Floats a, Floats b) { return a > b ? a : b; }

// The largest of `count` values, a multiple of 2·LANES. Two chains: one would wait for itself.
inline float largest_of(const float* values, int64_t count) {
  Floats high = load(values), other = load(values + LANES);
  for (int64_t at = 2 * LANES; at < count; at += 2 * LANES) {
    high = higher(load(values + at), high);
    other = higher(load(values + at + LANES), other);
  }
  return over_lanes(higher(other, high), higher)[0];
}

}  // namespace
