//! Stands in for CUDA's header of this name, so that g++ compiles the kernels as they are and runs each
//! CUDA thread as a fibre. Only what custom_ops/kernels/cuda uses is here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after another, so one array serves them all and keeps what the last block left in it.
#define __shared__ static

namespace emulator {

struct Index {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

//! Runs `kernel` for every thread of every block. False, with `failure()` set, when a barrier or a
//! shuffle is misused.
bool run(Index grid, Index block, const std::function<void()>& kernel);

//! A lane's part in a shuffle: returns the partner's value.
float shuffle_xor(unsigned mask, float value, int offset);

//! A thread's part in a block barrier.
void barrier();

}  // namespace emulator

// Set for each fibre when it is resumed.
extern emulator::Index threadIdx;
extern emulator::Index blockIdx;
extern emulator::Index blockDim;
extern emulator::Index gridDim;

inline void __syncthreads() { emulator::barrier(); }
inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  return emulator::shuffle_xor(mask, value, offset);
}

using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};

inline uint4 __ldg(const uint4* from) { return *from; }

inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

struct dim3 {
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
  const dim3& grid = config->gridDim;
  const dim3& block = config->blockDim;
  const bool ok =
      emulator::run({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, [&] { kernel(actual...); });
  return ok ? cudaSuccess : cudaErrorLaunchFailure;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
