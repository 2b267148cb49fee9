//! The three storage types: how a pack of floats is stored. Only `stream` needs an alignment.
//!
//! A partial pack holds `n` < kPack elements; its other lanes are 0 after a load. `lanes(u, n)` is the number
//! of lanes of vector u that hold elements. `order` arranges floats (the scale and bias of a half-precision
//! row) in the order of lanes that the packs of the type have.
#pragma once

#include "simd.h"

namespace {

IBNORM_INLINE constexpr int clamp_lanes(int n) { return n < 0 ? 0 : n > kWidth ? kWidth : n; }

//! What the types share. Partial packs go through a buffer.
template <class Type, int kElementSize>
struct Storage {
  static constexpr int kSize = kElementSize;
  static constexpr int kStreamAlign = kElementSize * kWidth;

  static IBNORM_INLINE Pack load(const char* p, int n) {
    if (n == kPack) return Type::load(p);
#if defined(__AVX512BW__)
    __m512i parts[kVectors * kSize / 4];
    for (int q = 0; q < kVectors * kSize / 4; ++q)
      parts[q] = _mm512_maskz_loadu_epi8(bytes(n, q), p + 64 * q);
    return Type::load(reinterpret_cast<const char*>(parts));
#else
    char buffer[kPack * kSize] = {};
    std::memcpy(buffer, p, static_cast<unsigned>(n) * kSize);
    return Type::load(buffer);
#endif
  }

  static IBNORM_INLINE void store(char* p, const Pack& a, int n) {
    if (n == kPack) return Type::store(p, a);
    alignas(64) char buffer[kPack * kSize];
    Type::store(buffer, a);
#if defined(__AVX512BW__)
    for (int q = 0; q < kVectors * kSize / 4; ++q)
      _mm512_mask_storeu_epi8(p + 64 * q, bytes(n, q), _mm512_load_si512(buffer + 64 * q));
#else
    std::memcpy(p, buffer, static_cast<unsigned>(n) * kSize);
#endif
  }

#if defined(__AVX512BW__)
  //! The bytes of the q-th group of 64 that belong to n elements.
  static IBNORM_INLINE __mmask64 bytes(int n, int q) {
    const int count = n * kSize - 64 * q;
    return count <= 0 ? 0 : count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
  }
#endif

  static IBNORM_INLINE int lanes(int u, int n) { return clamp_lanes(n - u * kWidth); }
  static IBNORM_INLINE Pack order(const Pack& a) { return a; }
};

struct Float32 : Storage<Float32, 4> {
  using Storage::load;
  using Storage::store;

  static IBNORM_INLINE Pack load(const char* p) {
    Pack a;
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) std::memcpy(&a.v[u], p + u * kWidth * kSize, sizeof a.v[u]);
    return a;
  }

  static IBNORM_INLINE void store(char* p, const Pack& a) {
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) std::memcpy(p + u * kWidth * kSize, &a.v[u], sizeof a.v[u]);
  }

  static IBNORM_INLINE void stream(char* p, const Pack& a) {
    for (int u = 0; u < kVectors; ++u) {
      [[maybe_unused]] float* to = reinterpret_cast<float*>(p) + u * kWidth;
#if defined(__AVX512F__)
      _mm512_stream_ps(to, a.v[u]);
#elif defined(__AVX2__)
      _mm256_stream_ps(to, a.v[u]);
#elif defined(__SSE2__)
      _mm_stream_ps(to, a.v[u]);
#else
      std::memcpy(to, &a.v[u], sizeof a.v[u]);
#endif
    }
  }

  static IBNORM_INLINE Pack round(const Pack& a) { return a; }
};

IBNORM_INLINE void stream_bits(char* p, Half h) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)h);
#else
  std::memcpy(p, &h, sizeof h);
#endif
}

//! IEEE binary16.
struct Float16 : Storage<Float16, 2> {
  using Storage::load;
  using Storage::store;

  static IBNORM_INLINE Pack load(const char* p) {
    Pack a;
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) {
      Half h;
      std::memcpy(&h, p + u * sizeof h, sizeof h);
      a.v[u] = widen(h);
    }
    return a;
  }

  static IBNORM_INLINE void store(char* p, const Pack& a) {
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) {
      const Half h = narrow(a.v[u]);
      std::memcpy(p + u * sizeof h, &h, sizeof h);
    }
  }

  static IBNORM_INLINE void stream(char* p, const Pack& a) {
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) stream_bits(p + u * sizeof(Half), narrow(a.v[u]));
  }

  static IBNORM_INLINE Pack round(const Pack& a) {
    return each([](Vec v) IBNORM_FLAT { return widen(narrow(v)); }, a);
  }

 private:
  static IBNORM_INLINE Vec widen(Half h) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return _mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (Vec)vcvt_f32_f16((float16x4_t)h);
#else
    const Bits wide = __builtin_convertvector(h, Bits);
    const Bits rest = (wide & 0x7FFFU) << 13;
    Vec v = (Vec)rest * 0x1p112F;                                 // subnormals included: the product is exact
    v = (Int)rest >= 0x0F800000 ? (Vec)(rest | 0x7F800000U) : v;  // infinity and NaN
    return (Vec)((Bits)v | ((wide & 0x8000U) << 16));
#endif
  }
  static IBNORM_INLINE Half narrow(Vec v) {
#if defined(__AVX512F__)
    return (Half)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Half)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return (Half)vcvt_f16_f32((float32x4_t)v);
#else
    const Bits all = (Bits)v;
    const Int rest = (Int)(all & 0x7FFFFFFFU);
    const Int odd = (rest >> 13) & 1;
    Int h = (rest - 0x38000000 + 0xFFF + odd) >> 13;                // normal, nearest even
    const Int small = (Int)((Vec)rest + splat(0.5F)) - 0x3F000000;  // below 2^-14: the adder rounds
    h = rest < 0x38800000 ? small : h;
    h = rest >= 0x477FF000 ? (Int)(Bits{} + 0x7C00U) : h;  // rounds to infinity
    h = rest > 0x7F800000 ? (Int)(Bits{} + 0x7E00U) : h;   // NaN
    return __builtin_convertvector((Bits)h | ((all >> 16) & 0x8000U), Half);
#endif
  }
};

//! bfloat16. A vector of memory holds even and odd elements in turn. A pack has the even elements in one
//! vector and the odd ones in the next, which takes a shift and a mask, where the order of memory would take
//! shuffles.
//!
//! A NaN in a pack has zeros in its lower 16 bits, so that rounding leaves it a NaN: one that was loaded has
//! them, arithmetic keeps the bits of its operand or makes a NaN that has only its first bits set, and
//! `order` makes such a NaN of any.
struct BFloat16 : Storage<BFloat16, 2> {
  using Storage::load;
  using Storage::store;

  static IBNORM_INLINE Pack load(const char* p) {
    Pack a;
#pragma GCC unroll 2
    for (int u = 0; u < kVectors; u += 2) {
      Bits both;
      std::memcpy(&both, p + u * kWidth * kSize, sizeof both);
      a.v[u] = (Vec)(both << 16);
      a.v[u + 1] = (Vec)(both & 0xFFFF0000U);
    }
    return a;
  }

  static IBNORM_INLINE void store(char* p, const Pack& a) {
#pragma GCC unroll 2
    for (int u = 0; u < kVectors; u += 2) {
      const Bits both = join(a.v[u], a.v[u + 1]);
      std::memcpy(p + u * kWidth * kSize, &both, sizeof both);
    }
  }

  static IBNORM_INLINE void stream(char* p, const Pack& a) {
    typedef Half Halves[2];
#pragma GCC unroll 2
    for (int u = 0; u < kVectors; u += 2) {
      const Bits both = join(a.v[u], a.v[u + 1]);
      Halves halves;
      std::memcpy(halves, &both, sizeof both);
      stream_bits(p + u * kWidth * kSize, halves[0]);
      stream_bits(p + (u + 1) * kWidth * kSize, halves[1]);
    }
  }

  static IBNORM_INLINE Pack round(const Pack& a) {
    return each([](Vec v) IBNORM_FLAT { return (Vec)(rounded(v) & 0xFFFF0000U); }, a);
  }

  static IBNORM_INLINE int lanes(int u, int n) {
    const int of_pair = n - u / 2 * 2 * kWidth;
    return clamp_lanes((of_pair + 1 - u % 2) / 2);
  }

  static IBNORM_INLINE Pack order(const Pack& a) {
    constexpr std::make_integer_sequence<int, kWidth> lane;
    Pack result;
#pragma GCC unroll 2
    for (int u = 0; u < kVectors; u += 2) {
      result.v[u] = one_nan(every_second<0>(a.v[u], a.v[u + 1], lane));
      result.v[u + 1] = one_nan(every_second<1>(a.v[u], a.v[u + 1], lane));
    }
    return result;
  }

 private:
  template <int kFirst, int... kLane>
  static IBNORM_INLINE Vec every_second(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (kFirst + 2 * kLane)...);
#else
    return __builtin_shuffle(a, b, Int{(kFirst + 2 * kLane)...});  // GCC before 12 only has this
#endif
  }

  //! The same NaN for every NaN.
  static IBNORM_INLINE Vec one_nan(Vec v) { return v == v ? v : splat(__builtin_nanf("")); }

  //! The nearest bfloat16, ties to even, in the upper 16 bits; the lower bits are undefined.
  static IBNORM_INLINE Bits rounded(Vec v) {
    const Bits all = (Bits)v;
    return all + 0x7FFFU + ((all >> 16) & 1U);
  }

  static IBNORM_INLINE Bits join(Vec even, Vec odd) {
#if defined(__AVX512BW__)
    return (Bits)_mm512_mask_blend_epi16(0xAAAAAAAAU, (__m512i)(rounded(even) >> 16), (__m512i)rounded(odd));
#elif defined(__AVX2__)
    return (Bits)_mm256_blend_epi16((__m256i)(rounded(even) >> 16), (__m256i)rounded(odd), 0xAA);
#elif defined(__aarch64__)
    return (Bits)vsriq_n_u32((uint32x4_t)rounded(odd), (uint32x4_t)rounded(even), 16);
#else
    return (rounded(even) >> 16) | (rounded(odd) & 0xFFFF0000U);
#endif
  }
};

}  // namespace
