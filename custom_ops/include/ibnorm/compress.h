//! g, the odd compression, in float arithmetic on host and device. It is free of branches and computes every
//! element in the same way, so a row of equal values stays a row of equal values.
//!
//! custom_ops/tools/derive_compress.py derives the polynomials (Remez, relative error), and a test repeats
//! it. docs/development/cuda-kernels.md explains the derivations.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ibnorm/problem.h"

#if defined(__CUDACC__)
#define IBNORM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define IBNORM_HOST_DEVICE inline
#endif

namespace ibnorm {

//! The device's approximate instructions, with the error bounds of the PTX ISA.
namespace approx {

#if defined(IBNORM_EMULATED_INSTRUCTIONS)
// The emulator of tests/custom_ops/cuda supplies models whose error it controls.
float log2(float v);
float exp2(float v);
float reciprocal(float v);
float rsqrt(float v);
#else
//! |error| <= 2^-22 in (1/2, 2), relative error 2^-22 elsewhere. v is never subnormal here.
IBNORM_HOST_DEVICE float log2(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return std::log2(v);
#endif
}

//! Relative error 2^-22; subnormal results become 0.
IBNORM_HOST_DEVICE float exp2(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return std::exp2(v);
#endif
}

//! Relative error 2^-23.
IBNORM_HOST_DEVICE float reciprocal(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return 1.0F / v;
#endif
}

//! Relative error 2^-22.9.
IBNORM_HOST_DEVICE float rsqrt(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return 1.0F / std::sqrt(v);
#endif
}
#endif

}  // namespace approx

namespace detail {

IBNORM_HOST_DEVICE std::int32_t bits_of(float v) {
  std::int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

IBNORM_HOST_DEVICE float float_of(std::int32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

//! k0 + k1 v + k2 v^2 + ...
IBNORM_HOST_DEVICE float polynomial(float, float k0) { return k0; }
template <typename... Rest>
IBNORM_HOST_DEVICE float polynomial(float v, float k0, Rest... rest) {
  return fmaf(polynomial(v, rest...), v, k0);
}

}  // namespace detail

//! ln(1 + a) for 0 <= a < 2^126, to 1.2 ulp; infinity and NaN do not become finite.
//!
//! 1 + a = 2^e (1 + f) with 1 + f in [3/4, 3/2). e is computed from the rounded 1 + a, but f from a itself in
//! one fused step, f = a 2^-e + (2^-e - 1), so a small a keeps all its digits.
IBNORM_HOST_DEVICE float log1p_of_nonnegative(float a) {
  const std::int32_t exponent = (detail::bits_of(1.0F + a) - 0x3f400000) & ~0x7fffff;
  const float scale = detail::float_of(0x3f800000 - exponent);  // 2^-e
  const float f = fmaf(a, scale, scale - 1.0F);
  // kLog1p: relative error 3.6e-08
  const float k = detail::polynomial(f, -0.500000596F, 0.333335489F, -0.24993442F, 0.199770764F,
                                     -0.168228149F, 0.149839252F, -0.120673411F, 0.0541319512F);
  constexpr float kLn2 = 0.693147180559945309F / 8388608.0F;  // per unit of the exponent's bits
  return fmaf(static_cast<float>(exponent), kLn2, fmaf(f * f, k, f));
}

//! tanh(t) to 2 ulp.
//!
//! Below 0.55 it is a polynomial in t^2. Above it is 1 - 2 / (exp(2 |t|) + 1), where the difference no longer
//! cancels.
IBNORM_HOST_DEVICE float tanh_accurate(float t) {
  const float square = t * t;
  // kTanh: relative error 3.8e-08
  const float near = fmaf(
      t * square, detail::polynomial(square, -0.333329469F, 0.133207247F, -0.0526718162F, 0.0164375827F), t);
  constexpr float kTwoLog2E = 2.88539008177792681F;
  const float e = approx::exp2(fabsf(t) * kTwoLog2E);
  const float far = copysignf(fmaf(-2.0F, approx::reciprocal(e + 1.0F), 1.0F), t);
  return fabsf(t) < 0.55F ? near : far;
}

//! g for one data type: `of(t * argument_scale, rest * argument_scale)` is `unit * g(t + rest)`.
//!
//! Standardisation cancels `unit` if epsilon is multiplied by its square, so a half type can use the
//! logarithm or exponential of the hardware. `rest` is the part of t that rounding removed, which matters
//! where the mean is large compared with lambda. It is the same for a whole row, and below 2^-22 of mean /
//! lambda.
template <Compression kCompression, DType kType>
struct Compressor;

template <DType kType>
struct Compressor<Compression::kLinear, kType> {
  static constexpr double kArgumentScale = 1.0;
  static constexpr double kUnit = 1.0;
  //! `rest` is ignored: it is the same for the whole row, so subtracting the mean of c removes it.
  static IBNORM_HOST_DEVICE float of(float t, float /*rest*/) { return t; }
};

template <>
struct Compressor<Compression::kLogarithmic, DType::kFloat32> {
  static constexpr double kArgumentScale = 1.0;
  static constexpr double kUnit = 1.0;
  static IBNORM_HOST_DEVICE float of(float t, float rest) {
    t += rest;
    return copysignf(log1p_of_nonnegative(fabsf(t)), t);
  }
};

//! float16 and bfloat16: log2(1 + |t|). Below 1/16 it is a polynomial, because the absolute error of the
//! instruction matters there: without it a row of values near 1e-6 would be 1200 ulp wrong.
template <DType kType>
struct Compressor<Compression::kLogarithmic, kType> {
  static constexpr double kArgumentScale = 1.0;
  static constexpr double kUnit = 1.44269504088896341;  // log2(e)
  static IBNORM_HOST_DEVICE float of(float t, float rest) {
    t += rest;
    const float a = fabsf(t);
    // kLog2Small: relative error 1.8e-06
    const float near = a * detail::polynomial(a, 1.44269252F, -0.720611989F, 0.448937446F);
    const float far = approx::log2(a + 1.0F);
    return copysignf(a < 0.0625F ? near : far, t);
  }
};

template <>
struct Compressor<Compression::kTanh, DType::kFloat32> {
  static constexpr double kArgumentScale = 1.0;
  static constexpr double kUnit = 1.0;
  static IBNORM_HOST_DEVICE float of(float t, float rest) { return tanh_accurate(t + rest); }
};

//! float16 and bfloat16: with z = 2 log2(e) t, tanh(t) = 1 - 2 / (2^z + 1); a polynomial where |t| < 0.1.
//!
//! tanh.approx is not accurate enough. Its relative error of 2^-11 is 2.5 ulp in float16, and in bfloat16 up
//! to 15 ulp of the result where a bias cancels most of the normalised value.
template <DType kType>
struct Compressor<Compression::kTanh, kType> {
  static constexpr double kArgumentScale = 2.88539008177792681;  // 2 log2(e)
  static constexpr double kUnit = 1.0;
  //! `rest` costs nothing here: 2^rest and its part of `near` are computed once in a row and join fused
  //! steps.
  static IBNORM_HOST_DEVICE float of(float z, float rest) {
    constexpr float kSlope = 0.346573025F;  // of the polynomial at 0
    // From a mean of 2^17 lambda on, `rest` is below the spacing of x, and 2^z 2^rest might be 0 times
    // infinity.
    const float small = fabsf(rest) < 0.0078125F ? rest : 0.0F;
    // kTanhSmall: relative error 1.7e-06
    const float near = fmaf(z, detail::polynomial(z * z, 0.346573025F, -0.0138207236F), small * kSlope);
    const float far = fmaf(-2.0F, approx::reciprocal(fmaf(approx::exp2(z), approx::exp2(small), 1.0F)), 1.0F);
    return fabsf(z) < 0.288539F ? near : far;
  }
};

}  // namespace ibnorm
