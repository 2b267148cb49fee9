//! The CPU kernels for each instruction set: row_kernels.cc is compiled three times, and dispatch.cc chooses.
#pragma once

#include <cstdint>

#include "ibnorm/problem.h"

namespace ibnorm::cpu {

enum class InstructionSet : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

//! Normalises rows [row_begin, row_end) of a problem that dispatch.cc has checked.
using RowKernel = void (*)(const Problem& problem, std::int64_t row_begin, std::int64_t row_end) noexcept;

namespace generic {
void run(const Problem& problem, std::int64_t row_begin, std::int64_t row_end) noexcept;
}
#ifdef IBNORM_X86
namespace avx2 {
void run(const Problem& problem, std::int64_t row_begin, std::int64_t row_end) noexcept;
}
namespace avx512 {
void run(const Problem& problem, std::int64_t row_begin, std::int64_t row_end) noexcept;
}
#endif

//! Whether this build has kernels for the instruction set and this machine supports it.
bool has(InstructionSet set) noexcept;

//! As cpu::run, with a given instruction set; kUnsupported where `has` is false.
Status run_on(InstructionSet set, const Problem& problem, std::int64_t row_begin,
              std::int64_t row_end) noexcept;

}  // namespace ibnorm::cpu
