//! Choosing the kernel for a problem, on the host, from sizes and addresses.
#pragma once

#include <cstdint>

#include "ibnorm/problem.h"

namespace ibnorm::cuda {

enum class Method : int {
  kWarp = 0,    //!< a warp per row, the row in registers, 16-byte accesses
  kBlock = 1,   //!< a block per row, the row in registers, 16-byte accesses
  kStream = 2,  //!< a block per row, the row read again in each pass: any width, any alignment
};

struct Plan {
  Method method = Method::kStream;
  int vectors = 0;  //!< 16-byte vectors per thread (registers)
  int threads = 0;  //!< per block
  int rows_per_block = 0;
};

//! Bytes of one access.
inline constexpr int kVectorBytes = 16;
inline constexpr int kWarpSize = 32;
inline constexpr int kWarpsPerBlock = 4;  //!< rows in a block of the warp kernels
inline constexpr int kMaxThreads = 1024;  //!< most threads of a stream block
inline constexpr int kBlockVectors = 8;   //!< vectors per thread of the block kernels

constexpr int size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

//! Elements in one 16-byte vector.
template <DType kType>
inline constexpr int kElementsOf = kVectorBytes / size_of(kType);

//! Vectors per lane of the warp kernels, up to 64 elements a lane: 2048 columns in every type.
template <DType kType>
struct WarpVectors {
  static constexpr int kCount = 6;
  static constexpr int kChoices[kCount] = {1, 2, 3, 4, 6, 8};
};
template <>
struct WarpVectors<DType::kFloat32> {
  static constexpr int kCount = 7;
  static constexpr int kChoices[kCount] = {1, 2, 4, 6, 8, 12, 16};
};

//! Most threads of a block kernel, limited by the registers for 8 vectors of floats.
template <DType kType>
inline constexpr int kMaxBlockThreads = kType == DType::kFloat32 ? 1024 : 512;

template <DType kType>
constexpr Plan plan_of(std::int64_t cols, bool aligned) {
  constexpr int kElements = kElementsOf<kType>;
  if (aligned && cols % kElements == 0) {
    const std::int64_t vectors = cols / kElements;
    for (const int choice : WarpVectors<kType>::kChoices) {
      if (vectors <= std::int64_t{choice} * kWarpSize) {
        return Plan{Method::kWarp, choice, kWarpSize * kWarpsPerBlock, kWarpsPerBlock};
      }
    }
    if (vectors <= std::int64_t{kBlockVectors} * kMaxBlockThreads<kType>) {
      const int warps =
          static_cast<int>((vectors + kBlockVectors * kWarpSize - 1) / (kBlockVectors * kWarpSize));
      return Plan{Method::kBlock, kBlockVectors, warps * kWarpSize, 1};
    }
  }
  // Sixteen elements for each thread, but at least one warp.
  const std::int64_t warps = (cols + 16 * kWarpSize - 1) / (16 * kWarpSize);
  const std::int64_t most = kMaxThreads / kWarpSize;
  return Plan{Method::kStream, 0,
              static_cast<int>(warps < 1      ? 1
                               : warps > most ? most
                                              : warps) *
                  kWarpSize,
              1};
}

//! Whether every array of the problem starts at a multiple of 16 bytes.
inline bool is_aligned(const Problem& problem) {
  const void* const arrays[] = {problem.x, problem.skip, problem.scale, problem.bias, problem.y, problem.sum};
  std::uintptr_t bits = 0;
  for (const void* array : arrays) bits |= reinterpret_cast<std::uintptr_t>(array);
  return bits % kVectorBytes == 0;
}

}  // namespace ibnorm::cuda
