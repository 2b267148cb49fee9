//! One float vector of the width this translation unit is compiled for, and its loads and stores.
//!
//! GCC vector extensions carry the arithmetic; intrinsics appear only where the extensions have no
//! word for it (masked and streaming accesses, half conversion, fused multiply-add). Everything is
//! in an unnamed namespace and forced inline: were a helper shared between the three builds, the
//! linker could hand the AVX-512 body to a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define IBNORM_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t Half __attribute__((vector_size(2 * kWidth)));

IBNORM_INLINE Vec splat(float value) { return Vec{} + value; }

//! a * b + c, in one rounding where the machine has it.
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

//! min(a, limit), and NaN where a is NaN.
IBNORM_INLINE Vec clamp_above(Vec a, float limit) {
#if defined(__AVX512F__)
  return _mm512_min_ps(splat(limit), a);  // the second operand is returned when either is NaN
#elif defined(__AVX2__)
  return _mm256_min_ps(splat(limit), a);
#else
  return a > splat(limit) ? splat(limit) : a;
#endif
}

IBNORM_INLINE Vec magnitude(Vec a) { return (Vec)((Bits)a & 0x7FFFFFFFU); }

//! |a| given, with the sign of `sign`.
IBNORM_INLINE Vec with_sign(Vec a, Vec sign) { return (Vec)((Bits)a | ((Bits)sign & 0x80000000U)); }

//! The first n lanes of a, 0 in the others.
IBNORM_INLINE Vec keep(Vec a, int n) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>((1U << n) - 1U), a);
#else
  Int lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return (Vec)((Int)a & (lane < n));
#endif
}

IBNORM_INLINE float horizontal_sum(Vec a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(a);
#else
  float lanes[kWidth];
  std::memcpy(lanes, &a, sizeof a);
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

//! Makes streaming stores visible to other threads in program order.
IBNORM_INLINE void fence_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// 16-bit lanes, n <= kWidth of them.

IBNORM_INLINE Half load_bits(const void* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  return h;
}

IBNORM_INLINE Half load_bits(const void* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (Half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1U << n) - 1U), p);
#else
  Half h = {};
  std::uint16_t one;
  for (int i = 0; i < n; ++i) {
    std::memcpy(&one, static_cast<const char*>(p) + 2 * i, sizeof one);
    h[i] = one;
  }
  return h;
#endif
}

IBNORM_INLINE void store_bits(void* p, Half h) { std::memcpy(p, &h, sizeof h); }

IBNORM_INLINE void store_bits(void* p, Half h, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1U << n) - 1U), (__m256i)h);
#else
  for (int i = 0; i < n; ++i) {
    const std::uint16_t one = h[i];
    std::memcpy(static_cast<char*>(p) + 2 * i, &one, sizeof one);
  }
#endif
}

IBNORM_INLINE void stream_bits(void* p, Half h) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)h);
#else
  store_bits(p, h);
#endif
}

//! How a type lies in memory. `load` and `store` take any alignment; `stream` needs kStreamAlign.
struct Float32 {
  static constexpr int kSize = 4;
  static constexpr int kStreamAlign = 4 * kWidth;
  static IBNORM_INLINE Vec load(const char* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static IBNORM_INLINE Vec load(const char* p, int n) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << n) - 1U), p);
#else
    Vec v = {};
    float one;
    for (int i = 0; i < n; ++i) {
      std::memcpy(&one, p + 4 * i, sizeof one);
      v[i] = one;
    }
    return v;
#endif
  }
  static IBNORM_INLINE void store(char* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  static IBNORM_INLINE void store(char* p, Vec v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1U << n) - 1U), v);
#else
    for (int i = 0; i < n; ++i) {
      const float one = v[i];
      std::memcpy(p + 4 * i, &one, sizeof one);
    }
#endif
  }
  static IBNORM_INLINE void stream(char* p, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(reinterpret_cast<float*>(p), v);
#elif defined(__AVX2__)
    _mm256_stream_ps(reinterpret_cast<float*>(p), v);
#elif defined(__SSE2__)
    _mm_stream_ps(reinterpret_cast<float*>(p), v);
#else
    store(p, v);
#endif
  }
  static IBNORM_INLINE Vec round(Vec v) { return v; }
};

//! The 16-bit types share everything but the conversion.
template <class Convert>
struct Packed16 {
  static constexpr int kSize = 2;
  static constexpr int kStreamAlign = 2 * kWidth;
  static IBNORM_INLINE Vec load(const char* p) { return Convert::widen(load_bits(p)); }
  static IBNORM_INLINE Vec load(const char* p, int n) { return Convert::widen(load_bits(p, n)); }
  static IBNORM_INLINE void store(char* p, Vec v) { store_bits(p, Convert::narrow(v)); }
  static IBNORM_INLINE void store(char* p, Vec v, int n) { store_bits(p, Convert::narrow(v), n); }
  static IBNORM_INLINE void stream(char* p, Vec v) { stream_bits(p, Convert::narrow(v)); }
  static IBNORM_INLINE Vec round(Vec v) { return Convert::widen(Convert::narrow(v)); }
};

struct Convert16 {  // IEEE binary16
  static IBNORM_INLINE Vec widen(Half h) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return _mm256_cvtph_ps((__m128i)h);
#else
    const Bits wide = __builtin_convertvector(h, Bits);
    const Bits rest = (wide & 0x7FFFU) << 13;
    Vec v = (Vec)rest * 0x1p112F;  // subnormals included: the product is exact
    v = (Int)rest >= 0x0F800000 ? (Vec)(rest | 0x7F800000U) : v;  // infinity and NaN
    return (Vec)((Bits)v | ((wide & 0x8000U) << 16));
#endif
  }
  static IBNORM_INLINE Half narrow(Vec v) {
#if defined(__AVX512F__)
    return (Half)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Half)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Bits all = (Bits)v;
    const Int rest = (Int)(all & 0x7FFFFFFFU);
    const Int odd = (rest >> 13) & 1;
    Int h = (rest - 0x38000000 + 0xFFF + odd) >> 13;                                 // normal, nearest even
    const Int small = (Int)((Vec)rest + splat(0.5F)) - 0x3F000000;                  // below 2^-14: the adder rounds
    h = rest < 0x38800000 ? small : h;
    h = rest >= 0x477FF000 ? (Int)(Bits{} + 0x7C00U) : h;                            // rounds to infinity
    h = rest > 0x7F800000 ? (Int)(Bits{} + 0x7E00U) : h;                             // NaN
    return __builtin_convertvector((Bits)h | ((all >> 16) & 0x8000U), Half);
#endif
  }
};

struct ConvertB16 {  // bfloat16
  // The casts between lane widths are spelled out: GCC 12 splits its own conversion into four moves.
  static IBNORM_INLINE Vec widen(Half h) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return (Vec)(__builtin_convertvector(h, Bits) << 16);
#endif
  }
  static IBNORM_INLINE Half narrow(Vec v) {
    const Bits all = (Bits)v;
    const Bits rounded = (all + 0x7FFFU + ((all >> 16) & 1U)) >> 16;  // nearest even
    const Bits quiet = (all >> 16) | 0x40U;                           // a NaN must not round to infinity
#if defined(__AVX512F__)
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return (Half)_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32((__m512i)rounded, nan, (__m512i)quiet));
#elif defined(__AVX2__)
    const __m256i chosen =
        _mm256_blendv_epi8((__m256i)rounded, (__m256i)quiet, (__m256i)_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i packed = _mm256_packus_epi32(chosen, chosen);  // by 128-bit half: low, low, high, high
    return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    const Int number = (Int)(all & 0x7FFFFFFFU) <= 0x7F800000;
    return __builtin_convertvector(number ? rounded : quiet, Half);
#endif
  }
};

using Float16 = Packed16<Convert16>;
using BFloat16 = Packed16<ConvertB16>;

}  // namespace
