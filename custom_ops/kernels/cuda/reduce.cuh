//! Sums over a warp or a block; every thread gets the same bits.
#pragma once

#include <cuda_runtime.h>

#include "plan.h"

namespace ibnorm::cuda {

//! A butterfly: at each step both partners add the same two numbers, so all lanes end equal.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    v += __shfl_xor_sync(0xffffffffU, v, offset);
  }
  return v;
}

//! `partial` holds one float per warp and is used for one sum only, so one barrier is enough.
__device__ __forceinline__ float block_sum(float v, float* partial) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  v = warp_sum(v);
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0F);
}

}  // namespace ibnorm::cuda
