//! g on a pack: t, sign(t) ln(1 + |t|) or tanh(t). It is odd and free of branches.
//!
//! NaN may become a number here: the caller detects NaN from the mean, and then writes NaN.
//! Rows in half precision (kHalf) use shorter polynomials, with an error of 2^-19.
//! custom_ops/tools/fit_compressions.py has the derivation, the fits and the errors (float32: at most 1.7
//! and 2.3 ulp, 0.2 to 0.3 ulp rms).
#pragma once

#include "ibnorm/spec.h"
#include "simd.h"

namespace {

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

//! The factor that turns x - mean into the argument of `compress`.
template <ibnorm::Compression kCompression>
IBNORM_INLINE float argument_factor(float lambd) {
  return (kCompression == ibnorm::Compression::kTanh ? 2.0F : 1.0F) / lambd;
}

//! g(t) of the argument `t` = (x - mean) * argument_factor(lambd).
template <ibnorm::Compression kCompression, bool kHalf>
IBNORM_INLINE Pack compress(const Pack& t) {
  if constexpr (kCompression == ibnorm::Compression::kLinear) {
    return t;
  } else {
    constexpr bool kLog = kCompression == ibnorm::Compression::kLogarithmic;
    const Pack a = each([](Vec v) IBNORM_FLAT { return magnitude_at_most(v, kLog ? 1.1e38F : 18.04F); }, t);
    const Pack g = [&]() IBNORM_FLAT {
      if constexpr (kLog) return log1p_positive<kHalf>(a);
      return tanh_half_positive<kHalf>(a);
    }();
    return each([](Vec v, Vec s) IBNORM_FLAT { return with_sign(v, s); }, g, t);
  }
}

}  // namespace
