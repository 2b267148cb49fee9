//! The CUDA kernels: y = scale * (c - mean(c)) / sqrt(var(c) + epsilon) + bias, c = g((x - mean(x)) / lambd).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "elements.cuh"
#include "ibnorm/compress.h"
#include "plan.h"
#include "reduce.cuh"

namespace ibnorm::cuda {

//! Arguments of every kernel. Pointers are those of `Problem`, advanced to the first row of the launch.
struct Arguments {
  const void* x;      //!< [rows, cols]
  const void* skip;   //!< [rows, cols], only in skip kernels
  const void* scale;  //!< [cols]
  const void* bias;   //!< [cols]
  void* y;            //!< [rows, cols]
  void* sum;          //!< [rows, cols] or null, only in skip kernels
  std::int64_t rows;
  std::int64_t cols;
  int warp_vectors;       //!< 16-byte vectors of a row for each warp of a block kernel
  float argument_factor;  //!< Compressor::kArgumentScale / lambd
  float epsilon;          //!< in the compressor's unit
  float inverse_cols;     //!< 1 / cols
};

//! 1 / sqrt(variance + epsilon), to one ulp; 0 / 0 = NaN for a row of equal values with epsilon 0.
//!
//! In a row of equal values rounding can give every c the same small value instead of 0. The centred values
//! are then the rounding error of the mean, below 2^-20 of it, and the result must be `bias` exactly. In any
//! other row some element differs from the others by at least an ulp of x, and the mean of c is at most a few
//! of those, because c of a centred row has both signs. So the deviation is above mean / (8 sqrt(cols)).
__device__ __forceinline__ float inverse_deviation(float variance, float mean, float epsilon) {
  const float v = variance + epsilon;
  const float first = approx::rsqrt(v);
  const float refined = fmaf(0.5F * first, fmaf(-v * first, first, 1.0F), first);
  const bool constant = variance < mean * mean * 0x1p-40F;
  const float of_constant = epsilon > 0.0F ? 0.0F : __uint_as_float(0x7fffffffU);
  return constant ? of_constant : refined;
}

//! The negated mean of x in the unit of the compressor's argument, in two parts.
struct Offset {
  float rounded;
  float rest;  //!< what the division and the product with the factor rounded away
};

__device__ __forceinline__ Offset offset_of(Parts sum, const Arguments& arguments) {
  const float factor = arguments.argument_factor;
  const float mean = sum.value * arguments.inverse_cols;
  const float left = fmaf(-mean, static_cast<float>(arguments.cols), sum.value) + sum.rest;
  const float mean_rest = left * arguments.inverse_cols;
  const float rounded = -mean * factor;
  return {rounded, fmaf(-mean, factor, -rounded) - mean_rest * factor};
}

//! A sum by pairs: more independent additions and less rounding than a chain.
template <int kElements>
__device__ __forceinline__ float sum_of(const float* values) {
  if constexpr (kElements == 1) {
    return values[0];
  } else {
    return sum_of<kElements / 2>(values) + sum_of<kElements / 2>(values + kElements / 2);
  }
}

//! Normalises a row in registers, with a warp or (kBlock) a whole block for each row.
//!
//! A warp holds consecutive vectors of the row; its lane l holds vectors l, l + 32, ... of these. The plan
//! ensures that only the last kGuarded of a lane's kVectors can lie beyond the warp's part.
template <DType kType, DType kAffineType, Compression kCompression, bool kSkip, int kVectors, int kGuarded,
          bool kBlock>
__global__ void __launch_bounds__(kBlock ? kMaxBlockThreads<kType> : kWarpSize * kWarpsPerBlock)
    row_kernel(const Arguments arguments) {
  using T = StorageOf<kType>;
  using A = StorageOf<kAffineType>;
  using Compress = Compressor<kCompression, kType>;
  constexpr int kElements = kElementsOf<kType>;

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x);
  const std::int64_t row = kBlock ? block : block * kWarpsPerBlock + warp;
  if (!kBlock && row >= arguments.rows) return;  // the whole warp
  const int row_vectors = static_cast<int>(arguments.cols) / kElements;
  // The part of the row that this warp holds.
  const int begin = kBlock ? warp * arguments.warp_vectors : 0;
  const int vectors = kBlock ? min(arguments.warp_vectors, row_vectors - begin) : row_vectors;
  const int index = begin + lane;
  const std::int64_t first = row * row_vectors + index;
  const auto inside = [&](int v) { return v < kVectors - kGuarded || lane + v * kWarpSize < vectors; };

  // All loads come before the first use, and before the first store, which may alias them.
  uint4 raw[kVectors];
  const uint4* const x = static_cast<const uint4*>(arguments.x) + first;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) raw[v] = inside(v) ? x[v * kWarpSize] : uint4{0U, 0U, 0U, 0U};
  if constexpr (kSkip) {
    uint4 raw_skip[kVectors];
    const uint4* const skip = static_cast<const uint4*>(arguments.skip) + first;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) raw_skip[v] = inside(v) ? skip[v * kWarpSize] : uint4{0U, 0U, 0U, 0U};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float left[kElements];
      float right[kElements];
      unpack(raw[v], left, T{});
      unpack(raw_skip[v], right, T{});
#pragma unroll
      for (int e = 0; e < kElements; ++e) left[e] += right[e];
      raw[v] = pack(left, T{});  // the rest uses the rounded sum
    }
    if (arguments.sum != nullptr) {
      uint4* const sum = static_cast<uint4*>(arguments.sum) + first;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (inside(v)) sum[v * kWarpSize] = raw[v];
      }
    }
  }

  __shared__ float partial[kBlock ? 3 : 1][kWarpSize];
  const auto row_sum = [&](float v, int pass) {
    if constexpr (kBlock) {
      return block_sum(v, partial[pass]);
    } else {
      return warp_sum(v);
    }
  };

  float value[kVectors][kElements];
  float total = 0.0F;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    unpack(raw[v], value[v], T{});
    total += sum_of<kElements>(value[v]);  // 0 beyond the end
  }
  const float factor = arguments.argument_factor;
  const Parts sum_of_x = [&]() -> Parts {
    if constexpr (kBlock) return block_sum_in_parts(total, partial[0]);
    return {warp_sum(total), 0.0F};
  }();
  const Offset offset = offset_of(sum_of_x, arguments);

  total = 0.0F;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (inside(v)) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        value[v][e] = Compress::of(fmaf(value[v][e], factor, offset.rounded), offset.rest);
      }
      total += sum_of<kElements>(value[v]);
    }
  }
  const float mean = row_sum(total, 1) * arguments.inverse_cols;

  total = 0.0F;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (inside(v)) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        value[v][e] -= mean;
        total = fmaf(value[v][e], value[v][e], total);
      }
    }
  }
  const float variance = row_sum(total, 2) * arguments.inverse_cols;
  const float deviation = inverse_deviation(variance, mean, arguments.epsilon);

  uint4* const y = static_cast<uint4*>(arguments.y) + first;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (inside(v)) {
      float scale[kElements];
      float bias[kElements];
      load_parameters(static_cast<const A*>(arguments.scale), index + v * kWarpSize, scale);
      load_parameters(static_cast<const A*>(arguments.bias), index + v * kWarpSize, bias);
#pragma unroll
      for (int e = 0; e < kElements; ++e) value[v][e] = fmaf(value[v][e] * deviation, scale[e], bias[e]);
      y[v * kWarpSize] = pack(value[v], T{});
    }
  }
}

//! Normalises a row with a block, one element at a time, and reads it again from the cache in each pass.
//!
//! Each element is read and written by one thread only, so y and sum may alias the inputs.
template <DType kType, DType kAffineType, Compression kCompression, bool kSkip>
__global__ void __launch_bounds__(kMaxThreads, 1) stream_kernel(const Arguments arguments) {
  using T = StorageOf<kType>;
  using A = StorageOf<kAffineType>;
  using Compress = Compressor<kCompression, kType>;

  const std::int64_t cols = arguments.cols;
  const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * cols;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const T* x = static_cast<const T*>(arguments.x) + start;
  const T* const skip = kSkip ? static_cast<const T*>(arguments.skip) + start : nullptr;
  const bool stored = kSkip && arguments.sum != nullptr;
  T* const sum = stored ? static_cast<T*>(arguments.sum) + start : nullptr;

  __shared__ float partial[3][kWarpSize];
  const auto rounded = [&](std::int64_t i) {
    if constexpr (kSkip) return to_float(from_float<T>(to_float(x[i]) + to_float(skip[i])));
    return to_float(x[i]);
  };

  float total = 0.0F;
  for (std::int64_t i = thread; i < cols; i += threads) {
    const float v = rounded(i);
    if (stored) sum[i] = from_float<T>(v);
    total += v;
  }
  const float factor = arguments.argument_factor;
  const Offset offset = offset_of(block_sum_in_parts(total, partial[0]), arguments);
  // `sum` may be x or skip, so the row is read from `sum` once it is written.
  const auto compressed = [&](std::int64_t i) {
    return Compress::of(fmaf(stored ? to_float(sum[i]) : rounded(i), factor, offset.rounded), offset.rest);
  };

  total = 0.0F;
  for (std::int64_t i = thread; i < cols; i += threads) total += compressed(i);
  const float mean = block_sum(total, partial[1]) * arguments.inverse_cols;

  total = 0.0F;
  for (std::int64_t i = thread; i < cols; i += threads) {
    const float c = compressed(i) - mean;
    total = fmaf(c, c, total);
  }
  const float variance = block_sum(total, partial[2]) * arguments.inverse_cols;
  const float deviation = inverse_deviation(variance, mean, arguments.epsilon);

  const A* const scale = static_cast<const A*>(arguments.scale);
  const A* const bias = static_cast<const A*>(arguments.bias);
  T* const y = static_cast<T*>(arguments.y) + start;
  for (std::int64_t i = thread; i < cols; i += threads) {
    y[i] = from_float<T>(fmaf((compressed(i) - mean) * deviation, to_float(scale[i]), to_float(bias[i])));
  }
}

}  // namespace ibnorm::cuda
