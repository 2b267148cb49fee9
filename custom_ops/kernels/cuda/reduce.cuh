//! Sums over a warp or a block. Every thread gets the same bits.
#pragma once

#include <cuda_runtime.h>

#include "plan.h"

namespace ibnorm::cuda {

//! A butterfly: in each step both partners add the same two numbers, so all lanes have the same result.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    v += __shfl_xor_sync(0xffffffffU, v, offset);
  }
  return v;
}

//! Lane l gets the sum of warp l of the block, or 0 if there is no such warp. `partial` holds a float for
//! each warp and is used for one sum only, so one barrier is enough.
__device__ __forceinline__ float sum_of_warp(float v, float* partial) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  v = warp_sum(v);
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  return lane < warps ? partial[lane] : 0.0F;
}

__device__ __forceinline__ float block_sum(float v, float* partial) {
  return warp_sum(sum_of_warp(v, partial));
}

//! A sum as two floats, for more digits than one has.
struct Parts {
  float value;
  float rest;
};

//! As `block_sum`, but adds the warps without rounding. A warp's sum of some thousand values of a half type
//! is exact, as they are multiples of one unit; the sum of all warps would not be.
__device__ __forceinline__ Parts block_sum_in_parts(float v, float* partial) {
  Parts sum{sum_of_warp(v, partial), 0.0F};
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffU, sum.value, offset);
    const float other_rest = __shfl_xor_sync(0xffffffffU, sum.rest, offset);
    const float both = sum.value + other;
    const float of_other = both - sum.value;
    const float lost = (sum.value - (both - of_other)) + (other - of_other);  // exact, whichever is larger
    sum = {both, (sum.rest + other_rest) + lost};
  }
  return sum;
}

}  // namespace ibnorm::cuda
