// What softmax, SiLU and gates share.

#pragma once

#include "lanes.h"

namespace {

constexpr float LOG2_E = 1.44269504f;

// What is done to several vectors is done to all of them step by step: one alone would wait for its own last step.
#define EACH UNROLLED for (int k = 0; k < COUNT; ++k)

// 2^x for x ≤ 0, to about two units in the last place; below -126 it is 2^-126. 2^n·p(r) with |r| ≤ ½: of all
// polynomials of degree 5 with p(0) = 1, p has the least relative error, 9.1e-8.
template <int COUNT>
inline void powers_of_two(Floats (&x)[COUNT]) {
  const Floats least = Floats{} - 126.0f;
  Floats shifted[COUNT], p[COUNT];  // n, in its low bits
  EACH x[k] = x[k] < least ? least : x[k];
  EACH shifted[k] = x[k] + MAGIC;
  EACH x[k] = x[k] - (shifted[k] - MAGIC);
  EACH p[k] = x[k] * 1.3264700e-3f + 9.6715100e-3f;
  EACH p[k] = p[k] * x[k] + 5.5507340e-2f;
  EACH p[k] = p[k] * x[k] + 2.4022242e-1f;
  EACH p[k] = p[k] * x[k] + 6.9314698e-1f;
  EACH p[k] = p[k] * x[k] + 1.0f;
  EACH x[k] = (Floats)((Integers)p[k] + ((Integers)shifted[k] << 23));  // MAGIC's own bits are shifted out
}

inline Floats power_of_two(Floats x) {
  Floats one[1] = {x};
  powers_of_two(one);
  return one[0];
}

}  // namespace
