//! The kernels. They take raw pointers and return a Status. They throw and allocate nothing, and need no
//! framework.
#pragma once

#include <cstdint>

#include "ibnorm/problem.h"

namespace ibnorm {

namespace cpu {

//! Normalises rows [row_begin, row_end) of `problem` on the calling thread.
//! The caller distributes rows over its threads.
Status run(const Problem& problem, std::int64_t row_begin, std::int64_t row_end) noexcept;

//! Instruction set that `run` uses on this machine: "avx512", "avx2" or "generic".
const char* instruction_set() noexcept;

}  // namespace cpu

namespace cuda {

//! Enqueues the whole problem on `stream` (a cudaStream_t) and returns without waiting. May be captured in a
//! CUDA graph. Pointers are device pointers.
Status run(const Problem& problem, void* stream) noexcept;

}  // namespace cuda
}  // namespace ibnorm
