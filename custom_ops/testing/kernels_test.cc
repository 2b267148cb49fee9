//! C interface for tests: the CPU kernels with a chosen instruction set, and the memory bandwidth of the
//! machine.
#include "ibnorm/kernels.h"

#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "variants.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define IBNORM_EXPORT extern "C" __attribute__((visibility("default")))

IBNORM_EXPORT int ibnorm_test_has(int set) {
  return ibnorm::cpu::has(static_cast<ibnorm::cpu::InstructionSet>(set));
}

IBNORM_EXPORT const char* ibnorm_test_instruction_set() { return ibnorm::cpu::name(ibnorm::cpu::widest()); }

//! set: 0 is generic, 1 avx2, 2 avx512, and -1 what the dispatcher chooses.
IBNORM_EXPORT int ibnorm_test_run(int set, const void* x, const void* skip, const void* scale,
                                  const void* bias, void* y, void* sum, std::int64_t rows, std::int64_t cols,
                                  int type, int affine_type, int compression, float lambd, float epsilon,
                                  std::int64_t row_begin, std::int64_t row_end) {
  ibnorm::Problem p;
  p.x = x;
  p.skip = skip;
  p.scale = scale;
  p.bias = bias;
  p.y = y;
  p.sum = sum;
  p.rows = rows;
  p.cols = cols;
  p.type = static_cast<ibnorm::DType>(type);
  p.affine_type = static_cast<ibnorm::DType>(affine_type);
  p.compression = static_cast<ibnorm::Compression>(compression);
  p.lambd = lambd;
  p.epsilon = epsilon;
  const ibnorm::Status status = ibnorm::cpu::run(
      set < 0 ? ibnorm::cpu::widest() : static_cast<ibnorm::cpu::InstructionSet>(set), p, row_begin, row_end);
  return static_cast<int>(status);
}

namespace {

#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void stream_copy(float* to, const float* from, std::int64_t count) {
#if defined(__SSE2__)
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m128 a = _mm_load_ps(from + i), b = _mm_load_ps(from + i + 4);
    const __m128 c = _mm_load_ps(from + i + 8), d = _mm_load_ps(from + i + 12);
    _mm_stream_ps(to + i, a);
    _mm_stream_ps(to + i + 4, b);
    _mm_stream_ps(to + i + 8, c);
    _mm_stream_ps(to + i + 12, d);
  }
  _mm_sfence();
#else
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
#endif
}

}  // namespace

//! Seconds that `threads` threads take to copy `count` floats (a multiple of 16 * threads) with streaming
//! stores. Both arrays must be aligned to 64 bytes. The threads start together, and their start does not
//! count.
IBNORM_EXPORT double ibnorm_test_copy(float* to, const float* from, std::int64_t count, int threads) {
  using clock = std::chrono::steady_clock;
  const std::int64_t part = count / threads / 16 * 16;
  std::vector<std::thread> pool;
  std::vector<clock::time_point> begin(static_cast<std::size_t>(threads)),
      end(static_cast<std::size_t>(threads));
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      const auto slot = static_cast<std::size_t>(t);
      begin[slot] = clock::now();
      stream_copy(to + t * part, from + t * part, part);
      end[slot] = clock::now();
    });
  for (std::thread& thread : pool) thread.join();
  clock::time_point first = begin[0], last = end[0];
  for (int t = 1; t < threads; ++t) {
    const auto slot = static_cast<std::size_t>(t);
    if (begin[slot] < first) first = begin[slot];
    if (end[slot] > last) last = end[slot];
  }
  return std::chrono::duration<double>(last - first).count();
}
