//! Loads and stores of elements: one, or a vector of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ibnorm/problem.h"
#include "plan.h"

namespace ibnorm::cuda {

template <DType kType>
struct Storage;
template <>
struct Storage<DType::kFloat32> {
  using Type = float;
};
template <>
struct Storage<DType::kFloat16> {
  using Type = __half;
};
template <>
struct Storage<DType::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <DType kType>
using StorageOf = typename Storage<kType>::Type;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

//! Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

//! The 4 floats or 8 half values of a 16-byte vector.
__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[4], float) {
  out[0] = __uint_as_float(raw.x);
  out[1] = __uint_as_float(raw.y);
  out[2] = __uint_as_float(raw.z);
  out[3] = __uint_as_float(raw.w);
}

__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[8], __half) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 pair;
    memcpy(&pair, &words[i], sizeof pair);
    const float2 two = __half22float2(pair);
    out[2 * i] = two.x;
    out[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ void unpack(const uint4& raw, float (&out)[8], __nv_bfloat16) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // A bfloat16 is the upper half of a float.
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
  }
}

__device__ __forceinline__ uint4 pack(const float (&in)[4], float) {
  return uint4{__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]),
               __float_as_uint(in[3])};
}

__device__ __forceinline__ unsigned pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

__device__ __forceinline__ unsigned pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&in)[8], T type) {
  return uint4{pack_pair(in[0], in[1], type), pack_pair(in[2], in[3], type), pack_pair(in[4], in[5], type),
               pack_pair(in[6], in[7], type)};
}

//! Loads elements [index * kElements, ...) of scale or bias, which no kernel writes. A vector is 4 floats or
//! 8 half values; a half row with float parameters takes two loads.
template <typename A, int kElements>
__device__ __forceinline__ void load_parameters(const A* from, int index, float (&out)[kElements]) {
  constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(A));
  constexpr int kVectors = kElements / kPerVector;
  const uint4* const vectors = reinterpret_cast<const uint4*>(from) + index * kVectors;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float part[kPerVector];
    unpack(__ldg(vectors + v), part, A{});
#pragma unroll
    for (int e = 0; e < kPerVector; ++e) out[v * kPerVector + e] = part[e];
  }
}

}  // namespace ibnorm::cuda
