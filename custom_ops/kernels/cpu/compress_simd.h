//! g of the definition on a vector: linear, sign(t) ln(1 + |t|), tanh(t). Branch-free, odd, NaN stays NaN.
//!
//! Derivation, fit and measured error (1.5 and 2.3 ulp at most over all magnitudes, 0.2 to 0.3 rms):
//! custom_ops/tools/fit_compressions.py.
#pragma once

#include "ibnorm/spec.h"
#include "simd.h"

namespace {

//! ln(1 + a), a >= 0.
IBNORM_INLINE Vec log1p_positive(Vec a) {
  a = clamp_above(a, 1.1e38F);  // keeps 2^-k normal
  // (1 + a) / 2^k in [2/3, 4/3); `exponent` is k, still in its place in a float's bits.
  const Int exponent = ((Int)(a + 1.0F) - 0x3F2AAAAB) & -0x800000;
  const Vec scale = (Vec)(0x3F800000 - exponent);  // 2^-k
  const Vec f = fma(a, scale, scale - 1.0F);
  const Vec f2 = f * f;
  const Vec f4 = f2 * f2;
  const Vec p01 = fma(f, splat(-0x1.fffef0p-3F), splat(0x1.555506p-2F));
  const Vec p23 = fma(f, splat(-0x1.559dcap-3F), splat(0x1.99d02ap-3F));
  const Vec p45 = fma(f, splat(-0x1.f31154p-4F), splat(0x1.1ed704p-3F));
  const Vec p67 = fma(f, splat(-0x1.080554p-3F), splat(0x1.1e671cp-3F));
  const Vec p03 = fma(f2, p23, p01);
  const Vec p47 = fma(f2, p67, p45);
  const Vec p = fma(f4, p47, p03);
  const Vec q = fma(f, p, splat(-0.5F));
  const Vec log_f = fma(f2, q, f);
  constexpr float kLn2 = 0x1.62e430p-24F;  // ln(2) * 2^-23: undoes the place of the exponent
  return fma(__builtin_convertvector(exponent, Vec), splat(kLn2), log_f);
}

//! tanh(a), a >= 0.
IBNORM_INLINE Vec tanh_positive(Vec a) {
  a = clamp_above(a, 9.02F);
  const Vec twice = a + a;
  constexpr float kShift = 0x1.8p23F;  // adding it rounds to an integer, left in the low bits
  const Vec shifted = fma(twice, splat(0x1.715476p+0F), splat(kShift));
  const Vec n = shifted - kShift;
  Vec r = fma(n, splat(-0x1.62E4p-1F), twice);
  r = fma(n, splat(-0x1.7f7d1cp-20F), r);
  const Vec r2 = r * r;
  const Vec q01 = fma(r, splat(0x1.5554b0p-3F), splat(0x1.fffffep-2F));
  const Vec q23 = fma(r, splat(0x1.12279ep-7F), splat(0x1.555674p-5F));
  const Vec q4 = fma(r2, splat(0x1.6bebfep-10F), q23);
  const Vec p = fma(r2, fma(r2, q4, q01), r);
  const Vec scale = (Vec)(((Int)shifted << 23) + 0x3F800000);  // 2^n
  const Vec e = fma(scale, p, scale - 1.0F);
  return e / (e + 2.0F);
}

template <ibnorm::Compression kCompression>
IBNORM_INLINE Vec compress(Vec t) {
  if constexpr (kCompression == ibnorm::Compression::kLinear) {
    return t;
  } else if constexpr (kCompression == ibnorm::Compression::kLogarithmic) {
    return with_sign(log1p_positive(magnitude(t)), t);
  } else {
    return with_sign(tanh_positive(magnitude(t)), t);
  }
}

}  // namespace
