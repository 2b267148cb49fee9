//! Launching the kernel of a checked problem. There is one source file for each data type, so that they
//! compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ibnorm/dispatch.h"
#include "plan.h"
#include "row_kernels.cuh"

namespace ibnorm::cuda {

using Kernel = void (*)(Arguments);

//! The row kernel of a plan: a warp kernel whose vectors are one of WarpVectors::kChoices, or the block
//! kernel.
template <DType kType, DType kAffineType, Compression kCompression, bool kSkip, int kChoice = 0>
Kernel kernel_of(const Plan& plan) {
  using Choices = WarpVectors<kType>;
  if (plan.method == Method::kStream) return stream_kernel<kType, kAffineType, kCompression, kSkip>;
  if (plan.method == Method::kBlock) {
    // Every warp has between 128 and 256 vectors, so the first four of each lane exist.
    return row_kernel<kType, kAffineType, kCompression, kSkip, kBlockVectors, kBlockVectors / 2, true>;
  }
  constexpr int kVectors = Choices::kChoices[kChoice];
  // The next smaller choice was too small, so its vectors are all inside the row.
  constexpr int kGuarded =
      kChoice == 0 ? kVectors : kVectors - Choices::kChoices[kChoice == 0 ? 0 : kChoice - 1];
  if (plan.vectors == kVectors) {
    return row_kernel<kType, kAffineType, kCompression, kSkip, kVectors, kGuarded, false>;
  }
  if constexpr (kChoice + 1 < Choices::kCount) {
    return kernel_of<kType, kAffineType, kCompression, kSkip, kChoice + 1>(plan);
  } else {
    return nullptr;
  }
}

//! The pointer advanced by `bytes`; null stays null.
template <typename Pointer>
Pointer moved(Pointer pointer, std::int64_t bytes) {
  if (pointer == nullptr) return nullptr;
  if constexpr (std::is_same_v<Pointer, const void*>) {
    return static_cast<const char*>(pointer) + bytes;
  } else {
    return static_cast<char*>(pointer) + bytes;
  }
}

template <DType kType, DType kAffineType, Compression kCompression, bool kSkip>
Status launch(const Problem& problem, cudaStream_t stream) {
  using Compress = Compressor<kCompression, kType>;
  const Plan plan = plan_of<kType>(problem.cols, is_aligned(problem));
  const Kernel kernel = kernel_of<kType, kAffineType, kCompression, kSkip>(plan);
  if (kernel == nullptr) return Status::kUnsupported;

  Arguments arguments{};
  arguments.scale = problem.scale;
  arguments.bias = problem.bias;
  arguments.cols = problem.cols;
  const std::int64_t warps = plan.threads / kWarpSize;
  arguments.warp_vectors = plan.method == Method::kBlock
                               ? static_cast<int>((problem.cols / kElementsOf<kType> + warps - 1) / warps)
                               : 0;
  arguments.argument_factor = static_cast<float>(Compress::kArgumentScale / problem.lambd);
  arguments.epsilon = static_cast<float>(problem.epsilon * Compress::kUnit * Compress::kUnit);
  arguments.inverse_cols = static_cast<float>(1.0 / static_cast<double>(problem.cols));

  constexpr std::int64_t kMostRows = std::int64_t{1} << 30;  // a grid has less than 2^31 blocks
  for (std::int64_t done = 0; done < problem.rows; done += kMostRows) {
    const std::int64_t left = problem.rows - done;
    const std::int64_t offset = done * problem.cols * size_of(kType);
    arguments.rows = left < kMostRows ? left : kMostRows;
    arguments.x = moved(problem.x, offset);
    arguments.skip = moved(problem.skip, offset);
    arguments.y = moved(problem.y, offset);
    arguments.sum = moved(problem.sum, offset);
    cudaLaunchConfig_t config{};
    config.gridDim =
        dim3(static_cast<unsigned>((arguments.rows + plan.rows_per_block - 1) / plan.rows_per_block));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.stream = stream;
    if (cudaLaunchKernelEx(&config, kernel, arguments) != cudaSuccess) {
      (void)cudaGetLastError();  // reported here, so it must not show in the caller's next check
      return Status::kLaunchFailed;
    }
  }
  return Status::kOk;
}

//! Runs a problem whose x has type kType.
template <DType kType>
Status run_type(const Problem& problem, cudaStream_t stream) {
  return dispatch_compression(
      problem.compression,
      [&](auto compression) {
        return dispatch_flag(problem.skip != nullptr, [&](auto skip) {
          if constexpr (kType != DType::kFloat32) {
            if (problem.affine_type == DType::kFloat32) {
              return launch<kType, DType::kFloat32, compression.value, skip.value>(problem, stream);
            }
          }
          return launch<kType, kType, compression.value, skip.value>(problem, stream);
        });
      },
      [](const char*, int) { return Status::kInvalidArgument; });
}

// Each is in a source file of its type.
extern template Status run_type<DType::kFloat32>(const Problem&, cudaStream_t);
extern template Status run_type<DType::kFloat16>(const Problem&, cudaStream_t);
extern template Status run_type<DType::kBFloat16>(const Problem&, cudaStream_t);

}  // namespace ibnorm::cuda
