//! The entry point of the CUDA kernels: checks a problem and dispatches it by type.
#include <cmath>
#include <limits>

#include "ibnorm/dispatch.h"
#include "ibnorm/kernels.h"
#include "launch.cuh"

namespace ibnorm::cuda {
namespace {

bool is_valid(const Problem& problem) {
  if (problem.rows < 0 || problem.cols < 0) return false;
  if (!(problem.lambd > 0.0F) || !std::isfinite(problem.lambd)) return false;
  if (!(problem.epsilon >= 0.0F) || !std::isfinite(problem.epsilon)) return false;
  if (problem.affine_type != problem.type && problem.affine_type != DType::kFloat32) return false;
  if (problem.rows == 0 || problem.cols == 0) return true;  // pointers may be null
  if (problem.rows > std::numeric_limits<std::int64_t>::max() / 4 / problem.cols) return false;
  if (problem.x == nullptr || problem.y == nullptr) return false;
  if (problem.scale == nullptr || problem.bias == nullptr) return false;
  if (problem.sum != nullptr && (problem.skip == nullptr || problem.sum == problem.y)) return false;
  return true;
}

}  // namespace

Status run(const Problem& problem, void* stream) noexcept {
  if (!is_valid(problem)) return Status::kInvalidArgument;
  return dispatch_type(
      problem.type,
      [&](auto type) {
        if (problem.rows == 0 || problem.cols == 0) return Status::kOk;
        return run_type<type.value>(problem, static_cast<cudaStream_t>(stream));
      },
      [](const char*, int) { return Status::kInvalidArgument; });
}

}  // namespace ibnorm::cuda
