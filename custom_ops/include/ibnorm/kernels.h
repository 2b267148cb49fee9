//! The kernels. They take raw pointers and return a Status. They do not throw, do not allocate, and need
//! no framework.
#pragma once

#include <cstdint>

#include "ibnorm/problem.h"

namespace ibnorm {

namespace cpu {

//! Instructions that the CPU kernels are compiled for, narrowest first. `kGeneric` runs on every machine that
//! the library is built for: it uses SSE2 on x86-64 and NEON on arm64.
enum class InstructionSet : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };
inline constexpr InstructionSet kInstructionSets[] = {InstructionSet::kGeneric, InstructionSet::kAvx2,
                                                      InstructionSet::kAvx512};

//! "generic", "avx2" or "avx512".
const char* name(InstructionSet set) noexcept;

//! Whether this build has kernels for the instruction set and this machine supports it.
bool has(InstructionSet set) noexcept;

//! The widest instruction set that `has` is true for.
InstructionSet widest() noexcept;

//! Normalises rows [row_begin, row_end) of `problem` on the calling thread; kUnsupported where `has` is
//! false. The caller distributes rows over its threads.
Status run(InstructionSet set, const Problem& problem, std::int64_t row_begin, std::int64_t row_end) noexcept;

}  // namespace cpu

namespace cuda {

//! Enqueues the whole problem on `stream` (a cudaStream_t) and returns without waiting. May be captured in a
//! CUDA graph. Pointers are device pointers.
Status run(const Problem& problem, void* stream) noexcept;

}  // namespace cuda
}  // namespace ibnorm
