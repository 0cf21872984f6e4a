// What softmax and SiLU share.

#pragma once

#include "lanes.h"

namespace {

constexpr float LOG2_E = 1.44269504f;

// 2^x for x ≤ 0, to about two units in the last place; below -126 it is 2^-126. 2^n·p(r) with |r| ≤ ½: p is the polynomial
// of degree 5 whose relative error is the least, 7.5e-8.
inline Floats power_of_two(Floats x) {
  const Floats least = Floats{} - 126.0f;
  x = x < least ? least : x;
  const Floats shifted = x + MAGIC;  // n, in its low bits
  const Floats r = x - (shifted - MAGIC);
  Floats p = Floats{} + 1.3276472e-3f;
  p = p * r + 9.6755413e-3f;
  p = p * r + 5.5507133e-2f;
  p = p * r + 2.4022120e-1f;
  p = p * r + 6.9314697e-1f;
  p = p * r + 1.0f;
  return (Floats)((Integers)p + ((Integers)shifted << 23));  // MAGIC's own bits are shifted out
}

// exp(x) for x ≤ 0. The product is rounded: at -10 to 1e-6 of the result, at 0 to nothing.
inline Floats exponential(Floats x) { return power_of_two(x * LOG2_E); }

}  // namespace
