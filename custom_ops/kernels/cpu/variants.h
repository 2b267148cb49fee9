//! The CPU kernels for each instruction set: row_kernels.cc is compiled three times, and dispatch.cc chooses.
#pragma once

#include <cstdint>

#include "ibnorm/problem.h"

namespace ibnorm::cpu {

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

}  // namespace ibnorm::cpu
