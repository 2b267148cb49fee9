//! Vectors of floats in the width that this file is compiled for, and packs of them.
//!
//! The arithmetic uses GCC's vector extensions; intrinsics are only used for what these lack. Everything is
//! in an unnamed namespace and forced inline. If the three builds shared a function, the linker could keep
//! the AVX-512 version, and a machine without AVX-512 would run it.
//!
//! Formulas work on a Pack, which is a few vectors: each operation is issued for all of them before the next
//! one. A core only looks about 100 operations ahead, and a compression is a chain of 20 operations that
//! depend on each other. One vector after the other would leave half of the multipliers idle.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define IBNORM_INLINE inline __attribute__((always_inline))
#define IBNORM_FLAT __attribute__((always_inline))  // for a lambda

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;   // floats per vector
constexpr int kVectors = 4;  // vectors per pack: even, and few enough for the registers
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kVectors = 4;  // 16 registers: constants come from memory, once for four vectors
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kVectors = 4;
#else
constexpr int kWidth = 4;
constexpr int kVectors = 2;
#endif
constexpr int kPack = kVectors * kWidth;  // floats per pack

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef double Doubles __attribute__((vector_size(4 * kWidth)));  // kWidth / 2 lanes
typedef std::uint16_t Half __attribute__((vector_size(2 * kWidth)));

IBNORM_INLINE Vec splat(float value) { return value - Vec{}; }  // + would turn -0 into 0

// -- one vector ----------------------------------------------------------------------------------

//! a * b + c, with a single rounding where the machine supports it.
IBNORM_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

//! |a|.
IBNORM_INLINE Vec magnitude(Vec a) { return (Vec)((Bits)a & 0x7FFFFFFFU); }

//! |a|, at most limit. NaN becomes a number; callers detect NaN by other means.
IBNORM_INLINE Vec magnitude_at_most(Vec a, float limit) {
#if defined(__AVX512DQ__)
  return _mm512_range_ps(a, splat(limit), 2 /* the lesser magnitude */ | 8 /* sign cleared */);
#else
  const Vec size = magnitude(a);
#if defined(__AVX2__)
  return _mm256_min_ps(size, splat(limit));
#elif defined(__aarch64__)
  return (Vec)vminq_f32((float32x4_t)size, (float32x4_t)splat(limit));
#else
  return size < splat(limit) ? size : splat(limit);
#endif
#endif
}

//! a, which is not negative, with the sign of `sign`.
IBNORM_INLINE Vec with_sign(Vec a, Vec sign) {
#if defined(__AVX512F__)
  return (Vec)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)sign, (__m512i)splat(-0.0F),
                                        0xF8);  // a | (b & c)
#elif defined(__aarch64__)
  return (Vec)vbslq_u32(vdupq_n_u32(0x80000000U), (uint32x4_t)sign, (uint32x4_t)a);
#else
  return (Vec)((Bits)a | ((Bits)sign & 0x80000000U));
#endif
}

//! The larger of two numbers; NaN may be lost.
IBNORM_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#elif defined(__aarch64__)
  return (Vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a > b ? a : b;
#endif
}

//! Whether a lane is above the limit.
IBNORM_INLINE bool any_above(Vec a, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, splat(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, splat(limit), _CMP_GT_OQ)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpgt_ps(a, splat(limit))) != 0;
#elif defined(__aarch64__)
  return vmaxvq_f32((float32x4_t)a) > limit;
#else
  bool found = false;
  for (int i = 0; i < kWidth; ++i) found |= a[i] > limit;
  return found;
#endif
}

//! 2^n for a whole number n, -126 <= n <= 127.
IBNORM_INLINE Vec power_of_two(Vec n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(splat(1.0F), n);
#else
  return (Vec)(((Int)(n + 0x1.8p23F) << 23) + 0x3F800000);  // the sum has n in its low bits
#endif
}

//! The exponent of a normal number a: n, where 2^n <= a < 2^(n + 1).
IBNORM_INLINE Vec whole_log2(Vec a) {
#if defined(__AVX512F__)
  return _mm512_getexp_ps(a);
#else
  return __builtin_convertvector(((Int)a >> 23) - 127, Vec);
#endif
}

//! a / b, to 1 ulp.
IBNORM_INLINE Vec divide(Vec a, Vec b) {
#if defined(__AVX512F__)
  // A division of 16 floats takes 10 cycles. This is a rough quotient, corrected by its remainder.
  const Vec reciprocal = _mm512_rcp14_ps(b);
  const Vec quotient = a * reciprocal;
  return fma(fma(-quotient, b, a), reciprocal, quotient);
#else
  return a / b;
#endif
}

//! The first n lanes of a, and 0 in the others; n may be any number.
IBNORM_INLINE Vec keep(Vec a, int n) {
  Int lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return (Vec)((Int)a & (lane < n));
}

// -- a pack --------------------------------------------------------------------------------------

struct Pack {
  Vec v[kVectors];
};

IBNORM_INLINE Vec vector_of(const Pack& p, int u) { return p.v[u]; }
IBNORM_INLINE Vec vector_of(float value, int) { return splat(value); }

//! f applied to corresponding vectors of packs; a float stands for a vector of equal lanes.
template <class F, class... P>
IBNORM_INLINE Pack each(F f, const P&... packs) {
  Pack result;
#pragma GCC unroll 4
  for (int u = 0; u < kVectors; ++u) result.v[u] = f(vector_of(packs, u)...);
  return result;
}

template <class A, class B>
IBNORM_INLINE Pack add(const A& a, const B& b) {
  return each([](Vec p, Vec q) IBNORM_FLAT { return p + q; }, a, b);
}
template <class A, class B>
IBNORM_INLINE Pack subtract(const A& a, const B& b) {
  return each([](Vec p, Vec q) IBNORM_FLAT { return p - q; }, a, b);
}
template <class A, class B>
IBNORM_INLINE Pack multiply(const A& a, const B& b) {
  return each([](Vec p, Vec q) IBNORM_FLAT { return p * q; }, a, b);
}
template <class A, class B, class C>
IBNORM_INLINE Pack fma(const A& a, const B& b, const C& c) {
  return each([](Vec p, Vec q, Vec r) IBNORM_FLAT { return fma(p, q, r); }, a, b, c);
}

//! c[0] + c[1] x + c[2] x^2 + ..., by Horner's rule.
template <int kCount>
IBNORM_INLINE Pack polynomial(const Pack& x, const float (&c)[kCount]) {
  Pack sum = fma(x, c[kCount - 1], c[kCount - 2]);
#pragma GCC unroll 8
  for (int power = kCount - 3; power >= 0; --power) sum = fma(sum, x, c[power]);
  return sum;
}

//! Whether a lane of a pack is above the limit.
IBNORM_INLINE bool any_above(Pack a, float limit) {
#pragma GCC unroll 4
  for (int half = kVectors / 2; half > 0; half /= 2)
    for (int u = 0; u < half; ++u) a.v[u] = larger(a.v[u], a.v[u + half]);
  return any_above(a.v[0], limit);
}

// -- sums ----------------------------------------------------------------------------------------

//! The lower or upper half of the lanes, in double.
template <int kHalf>
IBNORM_INLINE Doubles widen_half(Vec a) {
#if defined(__AVX512DQ__)
  return _mm512_cvtps_pd(kHalf == 0 ? _mm512_castps512_ps256(a) : _mm512_extractf32x8_ps(a, 1));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(kHalf == 0 ? _mm256_castps256_ps128(a) : _mm256_extractf128_ps(a, 1));
#elif defined(__aarch64__)
  const float32x4_t v = (float32x4_t)a;
  return (Doubles)(kHalf == 0 ? vcvt_f64_f32(vget_low_f32(v)) : vcvt_high_f64_f32(v));
#else
  return Doubles{a[2 * kHalf], a[2 * kHalf + 1]};
#endif
}

//! The sum of the lanes.
IBNORM_INLINE double sum_lanes(Doubles a) {
#if defined(__AVX512F__)
  __m256d halves[2];  // through memory: GCC 12 warns of its own intrinsic for this (its bug 105593)
  std::memcpy(halves, &a, sizeof halves);
  const __m256d four = halves[0] + halves[1];
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
  return two[0] + two[1];
#elif defined(__AVX2__)
  const __m128d two = _mm256_castpd256_pd128(a) + _mm256_extractf128_pd(a, 1);
  return two[0] + two[1];
#else
  return a[0] + a[1];
#endif
}

//! The sum of the vectors of a pack, in float. It is exact where all lanes are equal, because each partial
//! sum is a power of two times a lane.
IBNORM_INLINE Vec sum_vectors(Pack a) {
#pragma GCC unroll 4
  for (int half = kVectors / 2; half > 0; half /= 2)
    for (int u = 0; u < half; ++u) a.v[u] += a.v[u + half];
  return a.v[0];
}

//! The sum of the squares of the vectors of a pack.
IBNORM_INLINE Vec sum_squares(const Pack& a) {
  Vec sum = a.v[0] * a.v[0];
#pragma GCC unroll 4
  for (int u = 1; u < kVectors; ++u) sum = fma(a.v[u], a.v[u], sum);
  return sum;
}

//! A sum of packs of n columns, in double.
struct DoubleSum {
  Doubles low = {};
  Doubles high = {};

  IBNORM_INLINE void add(Vec a) {
    low += widen_half<0>(a);
    high += widen_half<1>(a);
  }

  //! A partial pack has lanes that are 0, so its vectors are not summed in float, which would not be exact.
  IBNORM_INLINE void add(const Pack& a, int n) {
    if (n == kPack) return add(sum_vectors(a));
    for (const Vec& v : a.v) add(v);
  }

  IBNORM_INLINE void add_squares(const Pack& a, int) { add(sum_squares(a)); }

  IBNORM_INLINE double total() const { return sum_lanes(low + high); }
};

//! A sum that is kept in float until the end: a third of the work, for rows of some thousand columns.
struct FloatSum {
  Vec lanes = {};

  IBNORM_INLINE void add(const Pack& a, int) { lanes += sum_vectors(a); }

  IBNORM_INLINE void add_squares(const Pack& a, int) { lanes += sum_squares(a); }

  IBNORM_INLINE double total() const {
    DoubleSum sum;
    sum.add(lanes);
    return sum.total();
  }
};

//! Makes streaming stores visible to other threads in program order.
IBNORM_INLINE void fence_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
