// What softmax and SiLU share.

#pragma once

#include "lanes.h"

namespace {

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

}  // namespace
