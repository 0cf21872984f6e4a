// Vectors as wide as the processor's.

#pragma once

#include <cstdint>
#include <cstring>

#ifndef LANES  // given to try on one processor what another computes
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

#if (LANES == 8 && defined(__AVX2__)) || (LANES == 16 && defined(__AVX512F__))
#include <immintrin.h>
#endif

// Before a loop of few rounds over vectors that are to stay in registers.
#define UNROLLED _Pragma("GCC unroll 16")

namespace {

constexpr float MAGIC = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer, which the low bits then hold
constexpr int32_t MAGIC_BITS = 0x4B400000;

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats size_of(Floats v) { return (Floats)((Integers)v & INT32_MAX); }

template <int HALF, typename Vector>
inline Vector exchanged(Vector v) {  // lane i gets lane i ^ HALF
#if defined(__clang__)
  Vector result;
  for (int i = 0; i < LANES; ++i) result[i] = v[i ^ HALF];
  return result;
#else
  Integers index;
  for (int i = 0; i < LANES; ++i) index[i] = i ^ HALF;
  return __builtin_shuffle(v, index);
#endif
}

// what(…) of all lanes, in every lane: of halves, of quarters, and so on.
template <typename Vector, typename What>
inline Vector over_lanes(Vector v, const What& what) {
  if constexpr (LANES >= 16) v = what(v, exchanged<8>(v));
  if constexpr (LANES >= 8) v = what(v, exchanged<4>(v));
  v = what(v, exchanged<2>(v));
  return what(v, exchanged<1>(v));
}

inline float sum_of(Floats v) {
  return over_lanes(v, [](Floats a, Floats b) { return a + b; })[0];
}

// Whether any bit of any lane is set.
inline bool any(Integers v) {
#if LANES == 16 && defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif LANES == 8 && defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  int32_t found = 0;
  for (int i = 0; i < LANES; ++i) found |= v[i];
  return found != 0;
#endif
}

// The lowest byte of every lane.
inline Bytes low_bytes(Integers v) {
#if LANES == 8 && defined(__AVX2__)  // which compilers do lane by lane
  const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8((__m256i)v, first);
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  Bytes result;
  std::memcpy(&result, &both, sizeof result);
  return result;
#else
  return __builtin_convertvector(v, Bytes);
#endif
}

}  // namespace
