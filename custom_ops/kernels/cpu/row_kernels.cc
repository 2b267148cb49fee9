//! IBNorm by rows on one thread. Compiled once per instruction set (IBNORM_ISA names the namespace).
//!
//! A row is read from memory once and then worked on in the L1 cache, in exact passes:
//!   1. mean of x                          (skip form: add, round, write the sum)
//!   2. c = g((x - mean) / lambd), and its mean m
//!   3. e = c - m: sum of e and of e^2     (the sum of e is what rounding left of the mean)
//!   4. y = scale * (e - mean(e)) / sqrt(var + epsilon) + bias
//! Pass 3 corrects the mean by the mean of the residuals, so a row of equal values gives `bias`
//! whatever the first two means were rounded to, and takes var(c) around the corrected mean. The
//! linear form needs no pass 2: x - mean is already centred up to rounding.
//!
//! Sums run in four vectors by blocks of 64, so no lane adds more than a few dozen terms before its
//! block is folded into the total: at 65536 columns that is 3 digits more than one running sum.
#include <cstdint>

#include "compress_simd.h"
#include "ibnorm/problem.h"
#include "simd.h"
#include "variants.h"

namespace {

using ibnorm::Compression;
using ibnorm::DType;
using ibnorm::Problem;

constexpr int kUnroll = 4;
constexpr std::int64_t kBlock = 64 * kWidth;  // floats per partial sum

//! Columns whose float values are kept between the passes (64 KiB of stack); wider rows compute them again.
constexpr std::int64_t kScratch = 16384;

//! An output this large leaves a core's own caches before anyone reads it: written past them, it saves
//! reading its lines first.
constexpr std::int64_t kStreamBytes = std::int64_t{1} << 23;

//! Sum over the columns of body(first column, lanes): lanes is kWidth but for the last, partial vector.
//! The body returns `kSums` vectors to add up; lanes past the row must be 0.
template <int kSums>
struct Sums {
  Vec v[kSums];
};

template <int kSums, class Body>
IBNORM_INLINE void sum_columns(std::int64_t cols, float (&result)[kSums], const Body& body) {
  Sums<kSums> total = {};
  for (std::int64_t block = 0; block < cols; block += kBlock) {
    const std::int64_t end = cols - block < kBlock ? cols : block + kBlock;
    Sums<kSums> part[kUnroll] = {};
    std::int64_t i = block;
    for (; i + kUnroll * kWidth <= end; i += kUnroll * kWidth) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        const Sums<kSums> s = body(i + u * kWidth, kWidth);
        for (int k = 0; k < kSums; ++k) part[u].v[k] += s.v[k];
      }
    }
    for (; i + kWidth <= end; i += kWidth) {
      const Sums<kSums> s = body(i, kWidth);
      for (int k = 0; k < kSums; ++k) part[0].v[k] += s.v[k];
    }
    if (i < end) {
      const Sums<kSums> s = body(i, static_cast<int>(end - i));
      for (int k = 0; k < kSums; ++k) part[1].v[k] += s.v[k];
    }
    for (int k = 0; k < kSums; ++k) total.v[k] += (part[0].v[k] + part[1].v[k]) + (part[2].v[k] + part[3].v[k]);
  }
  for (int k = 0; k < kSums; ++k) result[k] = horizontal_sum(total.v[k]);
}

template <class T>
IBNORM_INLINE Vec load(const char* base, std::int64_t i, int lanes) {
  const char* p = base + i * T::kSize;
  return lanes == kWidth ? T::load(p) : T::load(p, lanes);
}

template <class T>
IBNORM_INLINE void store(char* base, std::int64_t i, Vec v, int lanes, bool stream) {
  char* p = base + i * T::kSize;
  if (lanes != kWidth) {
    T::store(p, v, lanes);
  } else if (stream) {
    T::stream(p, v);
  } else {
    T::store(p, v);
  }
}

//! Where one row lies.
struct Place {
  const char* x;
  const char* skip;
  char* y;
  char* sum;
  float* scratch;  // [kScratch + kWidth]
};

//! The rows of one problem. Where a row fits the scratch, its pass 1 runs inside the previous row's
//! compression: the loads hide behind the arithmetic, and one of the four waits for a sum is gone.
template <class T, class A, Compression kCompression, bool kSkip, bool kFits>
struct Rows {
  static constexpr bool kLinear = kCompression == Compression::kLinear;
  static constexpr bool kIsFloat = T::kSize == 4;
  static constexpr bool kStaged = kFits && (kSkip || !kIsFloat);  // scratch holds x as float after pass 1
  static constexpr bool kKeeps = kFits && !kLinear;               // scratch holds c after pass 2
  static constexpr int kAhead = 2048;                             // bytes between a load and its prefetch

  const char* scale;
  const char* bias;
  std::int64_t cols;
  bool stream;
  float inverse_lambd;
  float epsilon;

  Place at;
  Place next;
  bool has_next;
  float mean;
  float mean_low;
  float mean_c;

  static IBNORM_INLINE Vec input(const Place& p, std::int64_t i, int lanes) {
    if constexpr (!kSkip) {
      return load<T>(p.x, i, lanes);
    } else {
      return T::round(load<T>(p.x, i, lanes) + load<T>(p.skip, i, lanes));
    }
  }

  //! Pass 1 on one vector.
  IBNORM_INLINE Vec read(const Place& p, std::int64_t i, int lanes) const {
    const Vec v = input(p, i, lanes);
    if constexpr (kSkip) {
      if (p.sum != nullptr) store<T>(p.sum, i, v, lanes, stream);
    }
    if constexpr (kStaged) Float32::store(reinterpret_cast<char*>(p.scratch + i), v);
    return v;
  }

  IBNORM_INLINE Vec read_next(std::int64_t i, int lanes) const {
    if (!kFits || !has_next) return Vec{};
    __builtin_prefetch(next.x + i * T::kSize + kAhead);
    if constexpr (kSkip) __builtin_prefetch(next.skip + i * T::kSize + kAhead);
    return read(next, i, lanes);
  }

  //! Pass 1 of a row that no other row read ahead.
  IBNORM_INLINE float read_all(const Place& p) const {
    float one[1];
    sum_columns<1>(cols, one, [&](std::int64_t i, int lanes) __attribute__((always_inline)) {
      return Sums<1>{{read(p, i, lanes)}};
    });
    return one[0];
  }

  IBNORM_INLINE Vec source(std::int64_t i, int lanes) const {
    if constexpr (kStaged) return Float32::load(reinterpret_cast<const char*>(at.scratch + i));
    if constexpr (kSkip) {
      if (at.sum != nullptr) return load<T>(at.sum, i, lanes);  // x or skip may already be overwritten by it
    }
    return input(at, i, lanes);
  }

  IBNORM_INLINE Vec compressed(std::int64_t i, int lanes) const {
    return compress<kCompression>(((source(i, lanes) - mean) - mean_low) * inverse_lambd);
  }

  IBNORM_INLINE Vec centred(std::int64_t i, int lanes) const {
    if constexpr (kKeeps) return Float32::load(reinterpret_cast<const char*>(at.scratch + i)) - mean_c;
    return compressed(i, lanes) - mean_c;
  }

  //! Finishes the row at `at`, whose values add up to `total`; returns the total of the next one.
  IBNORM_INLINE float finish(float total) {
    const float count = static_cast<float>(cols);
    mean = total / count;
    // What the quotient's rounding left: without it a mean of 10 deviations costs a tanh in half precision 2 ulp.
    mean_low = static_cast<float>((total - static_cast<double>(mean) * count) / count);

    float next_total;
    float residual_sum;
    float square_sum;
    if constexpr (kLinear) {
      // A first value this near the mean lies there by rounding: in a row of equal values it is the
      // residual of all of them, and subtracting it leaves exactly 0.
      mean_c = 0.0F;
      const float first = compressed(0, cols < kWidth ? static_cast<int>(cols) : kWidth)[0];
      mean_c = __builtin_fabsf(first) <= 1e-4F * __builtin_fabsf(mean * inverse_lambd) ? first : 0.0F;
      float sums[3];
      sum_columns<3>(cols, sums, [&](std::int64_t i, int lanes) __attribute__((always_inline)) {
        const Vec e = lanes == kWidth ? centred(i, lanes) : keep(centred(i, lanes), lanes);
        return Sums<3>{{e, e * e, read_next(i, lanes)}};
      });
      residual_sum = sums[0];
      square_sum = sums[1];
      next_total = sums[2];
    } else {
      float sums[2];
      sum_columns<2>(cols, sums, [&](std::int64_t i, int lanes) __attribute__((always_inline)) {
        const Vec c = compressed(i, lanes);
        if constexpr (kKeeps) Float32::store(reinterpret_cast<char*>(at.scratch + i), c);
        return Sums<2>{{lanes == kWidth ? c : keep(c, lanes), read_next(i, lanes)}};
      });
      mean_c = sums[0] / count;
      next_total = sums[1];
      sum_columns<2>(cols, sums, [&](std::int64_t i, int lanes) __attribute__((always_inline)) {
        const Vec e = lanes == kWidth ? centred(i, lanes) : keep(centred(i, lanes), lanes);
        return Sums<2>{{e, e * e}};
      });
      residual_sum = sums[0];
      square_sum = sums[1];
    }
    const float residual = residual_sum / count;
    // Rounding may leave a constant row's difference a hair below 0.
    const float spread = square_sum / count - residual * residual;
    const float variance = spread < 0.0F ? 0.0F : spread;  // NaN stays NaN
    const float inverse = 1.0F / __builtin_sqrtf(variance + epsilon);
    const float offset = -residual * inverse;

    std::int64_t i = 0;
#pragma GCC unroll 2
    for (; i + kWidth <= cols; i += kWidth) write(i, kWidth, inverse, offset);
    if (i < cols) write(i, static_cast<int>(cols - i), inverse, offset);
    return next_total;
  }

  IBNORM_INLINE void write(std::int64_t i, int lanes, float inverse, float offset) const {
    const Vec unit = fma(centred(i, lanes), splat(inverse), splat(offset));
    store<T>(at.y, i, fma(unit, load<A>(scale, i, lanes), load<A>(bias, i, lanes)), lanes, stream);
  }
};

template <class T, class A, Compression kCompression, bool kSkip, bool kFits>
void run_rows(const Problem& p, std::int64_t row_begin, std::int64_t row_end, bool stream) noexcept {
  using Kernel = Rows<T, A, kCompression, kSkip, kFits>;
  constexpr std::int64_t kRoom = kScratch + kWidth;
  alignas(64) float scratch[kFits ? (Kernel::kStaged ? 2 * kRoom : kRoom) : 1];
  Kernel rows;
  rows.scale = static_cast<const char*>(p.scale);
  rows.bias = static_cast<const char*>(p.bias);
  rows.cols = p.cols;
  rows.stream = stream;
  rows.inverse_lambd = 1.0F / p.lambd;
  rows.epsilon = p.epsilon;
  const auto place = [&](std::int64_t r) {
    const std::int64_t from = r * p.cols * T::kSize;
    Place here;
    here.x = static_cast<const char*>(p.x) + from;
    here.skip = kSkip ? static_cast<const char*>(p.skip) + from : nullptr;
    here.y = static_cast<char*>(p.y) + from;
    here.sum = kSkip && p.sum != nullptr ? static_cast<char*>(p.sum) + from : nullptr;
    here.scratch = Kernel::kStaged && r % 2 != 0 ? scratch + kRoom : scratch;
    return here;
  };
  rows.next = place(row_begin);
  float total = 0.0F;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    rows.at = rows.next;
    if (!kFits || r == row_begin) total = rows.read_all(rows.at);
    rows.has_next = r + 1 < row_end;
    if (rows.has_next) rows.next = place(r + 1);
    total = rows.finish(total);
  }
  if (stream) fence_streams();
}

template <class T>
bool can_stream(const Problem& p) {
  if (p.rows * p.cols < kStreamBytes / T::kSize) return false;
  const std::uintptr_t places = reinterpret_cast<std::uintptr_t>(p.y) | reinterpret_cast<std::uintptr_t>(p.sum) |
                                static_cast<std::uintptr_t>(p.cols * T::kSize);
  return places % static_cast<std::uintptr_t>(T::kStreamAlign) == 0;
}

template <class T, class A, Compression kCompression, bool kSkip>
void choose_size(const Problem& p, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const bool stream = can_stream<T>(p);
  if (p.cols > kScratch) return run_rows<T, A, kCompression, kSkip, false>(p, row_begin, row_end, stream);
  run_rows<T, A, kCompression, kSkip, true>(p, row_begin, row_end, stream);
}

template <class T, class A>
void choose_kind(const Problem& p, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const bool skip = p.skip != nullptr;
  switch (p.compression) {
    case Compression::kLinear:
      return skip ? choose_size<T, A, Compression::kLinear, true>(p, row_begin, row_end)
                  : choose_size<T, A, Compression::kLinear, false>(p, row_begin, row_end);
    case Compression::kLogarithmic:
      return skip ? choose_size<T, A, Compression::kLogarithmic, true>(p, row_begin, row_end)
                  : choose_size<T, A, Compression::kLogarithmic, false>(p, row_begin, row_end);
    case Compression::kTanh:
      return skip ? choose_size<T, A, Compression::kTanh, true>(p, row_begin, row_end)
                  : choose_size<T, A, Compression::kTanh, false>(p, row_begin, row_end);
  }
}

template <class T>
void choose_affine(const Problem& p, std::int64_t row_begin, std::int64_t row_end) noexcept {
  if (p.affine_type == DType::kFloat32) return choose_kind<T, Float32>(p, row_begin, row_end);
  choose_kind<T, T>(p, row_begin, row_end);
}

}  // namespace

namespace ibnorm::cpu::IBNORM_ISA {

void run(const Problem& problem, std::int64_t row_begin, std::int64_t row_end) noexcept {
  switch (problem.type) {
    case DType::kFloat32:
      return choose_kind<Float32, Float32>(problem, row_begin, row_end);
    case DType::kFloat16:
      return choose_affine<Float16>(problem, row_begin, row_end);
    case DType::kBFloat16:
      return choose_affine<BFloat16>(problem, row_begin, row_end);
  }
}

}  // namespace ibnorm::cpu::IBNORM_ISA
