//! The description of one normalisation, which every kernel takes.
#pragma once

#include <cstdint>

#include "ibnorm/spec.h"

namespace ibnorm {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

//! Result of a kernel call.
enum class Status : int {
  kOk = 0,
  kInvalidArgument = 1,  //!< a size, type or attribute outside the definition
  kLaunchFailed = 2,     //!< the device refused the launch
  kUnsupported = 3,      //!< built without this kernel set
};

//! y = scale * (c - mean(c)) / sqrt(var(c) + epsilon) + bias with c = g((x - mean(x)) / lambd), for each row.
//!
//! With `skip`, x stands for round_to_type(x + skip), which is also written to `sum`.
//! All arithmetic is float. Pointers only need the alignment of their element type.
//! `y` may be `x` (or `skip`); `sum` may be `x` or `skip`, but not `y`.
struct Problem {
  const void* x = nullptr;      //!< [rows, cols], type
  const void* skip = nullptr;   //!< [rows, cols], type, or null
  const void* scale = nullptr;  //!< [cols], affine_type
  const void* bias = nullptr;   //!< [cols], affine_type
  void* y = nullptr;            //!< [rows, cols], type
  void* sum = nullptr;          //!< [rows, cols], type; null unless `skip` is given (then optional)
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  DType type = DType::kFloat32;
  DType affine_type = DType::kFloat32;  //!< `type` or kFloat32
  Compression compression = Compression::kLogarithmic;
  float lambd = 4.0F;     //!< finite, > 0
  float epsilon = 1e-5F;  //!< finite, >= 0
};

}  // namespace ibnorm
