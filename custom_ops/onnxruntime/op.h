//! An op of the library, and what ONNX Runtime calls for each node that uses it.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstddef>

#include "ibnorm/kernels.h"
#include "ibnorm/spec.h"
#include "tensors.h"

namespace ibnorm::ort {

enum class Provider { kCpu, kCuda };

struct TypePair {
  DType data;
  DType affine;
};

struct Op : OrtCustomOp {
  const OrtApi* api;
  bool skip;
  Provider provider;
  Compression compression;
  TypePair types;
  cpu::InstructionSet instructions;
  ReadShape read_shape;

  const char* type_name() const {
    static constexpr const char* kNames[2][3] = {{"IBNormS", "IBNormL", "IBNormT"},
                                                 {"SkipIBNormS", "SkipIBNormL", "SkipIBNormT"}};
    return kNames[skip ? 1 : 0][static_cast<int>(compression)];
  }
  std::size_t scale_index() const { return skip ? 2 : 1; }
};

inline const Op& as_op(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

//! Returns from the function with the status of a call that fails.
#define IBNORM_TRY(call)                           \
  do {                                             \
    if (OrtStatus* status = (call)) return status; \
  } while (false)

//! Reads and checks a node's attributes; `kernel` is what `compute` and `destroy` take.
OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                  void** kernel) noexcept;

//! Checks the inputs of a node, describes them as a Problem and calls the kernels.
OrtStatus* compute(void* kernel, OrtKernelContext* context) noexcept;

void destroy(void* kernel) noexcept;

}  // namespace ibnorm::ort
