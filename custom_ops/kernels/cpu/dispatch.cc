//! Checks a problem and runs it with the instructions that the caller chose.
#include <cstdint>

#include "ibnorm/kernels.h"
#include "variants.h"

namespace ibnorm::cpu {
namespace {

constexpr float kLargest = 3.402823466e+38F;

bool legal(const Problem& p, std::int64_t row_begin, std::int64_t row_end) {
  if (p.rows < 0 || p.cols < 0 || row_begin < 0 || row_begin > row_end || row_end > p.rows) return false;
  switch (p.type) {
    case DType::kFloat32:
    case DType::kFloat16:
    case DType::kBFloat16:
      break;
    default:
      return false;
  }
  if (p.affine_type != p.type && p.affine_type != DType::kFloat32) return false;
  switch (p.compression) {
    case Compression::kLinear:
    case Compression::kLogarithmic:
    case Compression::kTanh:
      break;
    default:
      return false;
  }
  // Written so that NaN fails.
  if (!(p.lambd > 0.0F && p.lambd <= kLargest) || !(p.epsilon >= 0.0F && p.epsilon <= kLargest)) return false;
  if (row_begin == row_end || p.cols == 0) return true;  // nothing is read, so pointers may be null
  if (p.x == nullptr || p.y == nullptr || p.scale == nullptr || p.bias == nullptr) return false;
  return p.skip != nullptr || p.sum == nullptr;
}

}  // namespace

bool has(InstructionSet set) noexcept {
  switch (set) {
    case InstructionSet::kGeneric:
      return true;
#ifdef IBNORM_X86
    case InstructionSet::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case InstructionSet::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

InstructionSet widest() noexcept {
  InstructionSet found = InstructionSet::kGeneric;
  for (const InstructionSet set : kInstructionSets)
    if (has(set)) found = set;
  return found;
}

const char* name(InstructionSet set) noexcept {
  switch (set) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

Status run(InstructionSet set, const Problem& problem, std::int64_t row_begin,
           std::int64_t row_end) noexcept {
  if (!has(set)) return Status::kUnsupported;
  if (!legal(problem, row_begin, row_end)) return Status::kInvalidArgument;
  if (row_begin == row_end || problem.cols == 0) return Status::kOk;
  RowKernel kernel = generic::run;
#ifdef IBNORM_X86
  if (set == InstructionSet::kAvx2) kernel = avx2::run;
  if (set == InstructionSet::kAvx512) kernel = avx512::run;
#endif
  kernel(problem, row_begin, row_end);
  return Status::kOk;
}

}  // namespace ibnorm::cpu
