//! g on a pack: t, sign(t) ln(1 + |t|) or tanh(t). It is odd.
//!
//! A pack whose |t| are all at most kNearLog or kNearTanh takes the near form: one quotient of short
//! polynomials, half the operations of the form that is right for every t. Nearly all packs do at the usual
//! lambda. The choice depends on the pack alone, so a pack gives the same bits in every row and every form.
//!
//! NaN may become a number here: the caller detects NaN from the mean, and then writes NaN.
//! Rows in half precision (kHalf) use shorter polynomials, with an error of 2^-18.
//! custom_ops/tools/fit_compressions.py has the derivation, the fits and the errors (float32: at most 2.8
//! ulp, 0.2 to 0.6 ulp rms).
#pragma once

#include "ibnorm/spec.h"
#include "simd.h"

namespace {

// The largest |t| of the near forms, and the same in half precision.
constexpr float kNearLog = 2.0F;
constexpr float kNearHalfLog = 3.0F;
constexpr float kNearTanh = 1.5F;
constexpr float kNearHalfTanh = 2.5F;

//! ln(1 + a), 0 <= a <= 1.1e38.
template <bool kHalf>
IBNORM_INLINE Pack log1p_positive(const Pack& a) {
  // 2^-k, where k brings 1 + a into [2/3, 4/3); computed from the bits of 1 + a.
  const Pack scale =
      each([](Vec v) IBNORM_FLAT { return (Vec)((0x7F2AAAAB - (Int)(v + 1.0F)) & -0x800000); }, a);
  const Pack f = fma(a, scale, subtract(scale, 1.0F));
  Pack p;
  if constexpr (kHalf) {
    constexpr float kP[] = {-0x1.0002cap-1F, 0x1.555ecep-2F,  -0x1.fcd262p-3F,
                            0x1.95c70cp-3F,  -0x1.8d0f1ep-3F, 0x1.5c81a8p-3F};
    p = polynomial(f, kP);
  } else {
    constexpr float kP[] = {-0x1.ffffd6p-2F, 0x1.5554fap-2F, -0x1.001480p-2F, 0x1.99d428p-3F,
                            -0x1.5032dap-3F, 0x1.1ea268p-3F, -0x1.3b289cp-3F, 0x1.1f422ep-3F};
    p = polynomial(f, kP);
  }
  const Pack log_f = fma(multiply(f, f), p, f);
  const Pack minus_k = each([](Vec v) IBNORM_FLAT { return whole_log2(v); }, scale);
  return fma(minus_k, -0x1.62e430p-1F, log_f);
}

//! tanh(z / 2), 0 <= z <= 18.04.
template <bool kHalf>
IBNORM_INLINE Pack tanh_half_positive(const Pack& z) {
  constexpr float kShift = 0x1.8p23F;  // adding it rounds to a whole number
  const Pack n = subtract(fma(z, 0x1.715476p+0F, kShift), kShift);
  const Pack r = fma(n, -0x1.62e430p-1F, z);
  Pack q;
  if constexpr (kHalf) {
    constexpr float kQ[] = {0x1.fffe6ep-2F, 0x1.555632p-3F, 0x1.570578p-5F, 0x1.1138d8p-7F};
    q = polynomial(r, kQ);
  } else {
    constexpr float kQ[] = {0x1.fffffep-2F, 0x1.5554b0p-3F, 0x1.555674p-5F, 0x1.12279ep-7F, 0x1.6bebfep-10F};
    q = polynomial(r, kQ);
  }
  const Pack p = fma(multiply(r, r), q, r);
  const Pack scale = each([](Vec v) IBNORM_FLAT { return power_of_two(v); }, n);
  const Pack e = fma(scale, p, subtract(scale, 1.0F));  // exp(z) - 1
  const Pack d = add(e, 2.0F);
  return each([](Vec p, Vec q) IBNORM_FLAT { return divide(p, q); }, e, d);
}

//! The quotient of two polynomials.
template <int kP, int kQ>
IBNORM_INLINE Pack quotient(const Pack& x, const float (&p)[kP], const float (&q)[kQ]) {
  const Pack above = polynomial(x, p);
  const Pack below = polynomial(x, q);
  return each([](Vec n, Vec d) IBNORM_FLAT { return divide(n, d); }, above, below);
}

//! sign(t) ln(1 + |t|), with a = |t| in the range of the near form.
template <bool kHalf>
IBNORM_INLINE Pack log1p_near(const Pack& t, const Pack& a) {
  const Pack rest = [&]() IBNORM_FLAT {
    if constexpr (kHalf) {
      constexpr float kP[] = {-0x1.fff53p-2F, -0x1.280a2ep-2F, -0x1.30e29ep-6F};
      constexpr float kQ[] = {1.0F, 0x1.3e7afp+0F, 0x1.7a4e8ep-2F, 0x1.30e29ep-6F};
      return quotient(a, kP, kQ);
    } else {
      constexpr float kP[] = {-0x1.ffffa2p-2F, -0x1.a2bfb4p-2F, -0x1.ca0184p-5F};
      constexpr float kQ[] = {1.0F, 0x1.7c0774p+0F, 0x1.3418ep-1F, 0x1.dbbdcap-5F};
      return quotient(a, kP, kQ);
    }
  }();
  return fma(multiply(t, a), rest, t);
}

//! tanh(t), with the square of t in the range of the near form.
template <bool kHalf>
IBNORM_INLINE Pack tanh_near(const Pack& t, const Pack& square) {
  const Pack rest = [&]() IBNORM_FLAT {
    if constexpr (kHalf) {
      constexpr float kP[] = {-0x1.55543ep-2F, -0x1.cc9ac4p-7F};
      constexpr float kQ[] = {1.0F, 0x1.c4bfd6p-2F, 0x1.eadc48p-7F};
      return quotient(square, kP, kQ);
    } else {
      constexpr float kP[] = {-0x1.55554ep-2F, -0x1.dc24b4p-7F};
      constexpr float kQ[] = {1.0F, 0x1.c63c88p-2F, 0x1.fd0b8ep-7F};
      return quotient(square, kP, kQ);
    }
  }();
  return fma(multiply(t, square), rest, t);
}

//! g(t).
template <ibnorm::Compression kCompression, bool kHalf>
IBNORM_INLINE Pack compress(const Pack& t) {
  if constexpr (kCompression == ibnorm::Compression::kLinear) {
    return t;
  } else if constexpr (kCompression == ibnorm::Compression::kLogarithmic) {
    const Pack a = each([](Vec v) IBNORM_FLAT { return magnitude(v); }, t);
    if (__builtin_expect(!any_above(a, kHalf ? kNearHalfLog : kNearLog), 1)) return log1p_near<kHalf>(t, a);
    const Pack g =
        log1p_positive<kHalf>(each([](Vec v) IBNORM_FLAT { return magnitude_at_most(v, 1.1e38F); }, t));
    return each([](Vec v, Vec s) IBNORM_FLAT { return with_sign(v, s); }, g, t);
  } else {
    const Pack square = multiply(t, t);
    constexpr float kNear = kHalf ? kNearHalfTanh : kNearTanh;
    if (__builtin_expect(!any_above(square, kNear * kNear), 1)) return tanh_near<kHalf>(t, square);
    const Pack a = each([](Vec v) IBNORM_FLAT { return magnitude_at_most(v, 9.02F); }, t);
    const Pack g = tanh_half_positive<kHalf>(multiply(a, 2.0F));
    return each([](Vec v, Vec s) IBNORM_FLAT { return with_sign(v, s); }, g, t);
  }
}

}  // namespace
