//! IBNorm by rows on one thread. Compiled once per instruction set (IBNORM_ISA names the namespace).
//!
//! A row is read from memory once and then stays in the L1 cache for three passes:
//!   1. mean of x                      (skip form: add, round, write the sum)
//!   2. c = g((x - mean) / lambd), with its mean and mean square
//!   3. y = scale * (c - mean(c)) / sqrt(var(c) + epsilon) + bias
//! mean(c^2) - mean(c)^2 is accurate to a bit as long as it is at least mean(c)^2. That is nearly always
//! true, because g is odd and x - mean has mean 0. Then y is one multiply-add of c before scale and bias.
//! Where it is not (one value far outside), another pass subtracts the mean of c from every c first.
//!
//! The sum of x adds a few vectors in float and continues in double. This makes the mean of equal values
//! exact, so that such a row becomes exactly `bias`. It also matters for tanh, which turns the sign of a
//! value near the mean into a step: at deviations far above lambda a mean with the accuracy of one float
//! would cost 1e-6. The mean of c is close to 0, so its sums stay in float for rows of up to kScratch
//! columns. NaN and infinity make the mean NaN or infinite, and then the last factor is set to NaN.
//!
//! Three rows are in progress at a time: while one is compressed, the next is read and the previous one is
//! written. So memory and arithmetic work at the same time and do not wait for each other.
#include <cstdint>
#include <type_traits>

#include "compress_simd.h"
#include "ibnorm/problem.h"
#include "simd.h"
#include "storage.h"
#include "variants.h"

namespace {

using ibnorm::Compression;
using ibnorm::DType;
using ibnorm::Problem;

//! Most columns whose float values are kept between passes (64 KiB of stack). Wider rows compute them again.
constexpr std::int64_t kScratch = 8192;

//! Most columns whose scale and bias are converted once for all rows of a half type. A multiple of kPack.
constexpr std::int64_t kConverted = 2048;

//! An output of this size, in bytes, leaves the caches of a core before it is read. Streaming stores write it
//! without reading its cache lines first.
constexpr std::int64_t kStreamBytes = std::int64_t{1} << 23;

//! Calls body(first column, columns) for each pack of a row: the full ones, then the partial one.
template <class Body>
IBNORM_INLINE void for_packs(std::int64_t cols, const Body& body) {
  std::int64_t i = 0;
  for (; i + kPack <= cols; i += kPack) body(i, kPack);
  const int left = static_cast<int>(cols - i);
  if (left > 0 && left < kPack) body(i, left);
}

template <class T>
IBNORM_INLINE void prefetch(const char* p) {
#pragma GCC unroll 4
  for (int byte = 0; byte < kPack * T::kSize; byte += 64) __builtin_prefetch(p + byte);
}

//! A row in progress.
struct Row {
  const char* x;  // null: no row
  const char* skip;
  char* y;
  char* sum;
  char* c;       // floats: in y, or in a buffer that rows use in turn
  double total;  // sum of the values that are normalised
  float mean;
  float mean_rest;  // t = (x - mean) * factor - mean_rest
  float c_mean;     // subtracted from c where c is computed again; mostly 0
  float inverse;
  float offset;  // y = scale * (c * inverse + offset) + bias
};

template <class T, Compression kCompression, bool kSkip, bool kFits>
struct Kernel {
  static constexpr bool kHalf = T::kSize == 2;
  using Sum = std::conditional_t<kFits, FloatSum, DoubleSum>;
  static constexpr bool kStaged =
      kFits && (kSkip || kHalf);  // the values that are normalised are kept as floats in kept_x

  const char* scale;
  const char* bias;
  bool own_affine;  // scale and bias are of type T, not float
  bool in_packs;    // scale and bias are floats in whole packs, in the order of their lanes
  std::int64_t cols;
  bool stream;
  std::int64_t ahead;  // bytes from a load from memory to its prefetch
  float factor;
  double epsilon;
  char* kept_x;  // values of the row that is compressed; each pack is then replaced by one of the next row

  //! The values that are normalised, from the inputs.
  static IBNORM_INLINE Pack input(const Row& row, std::int64_t i, int n) {
    const Pack x = T::load(row.x + i * T::kSize, n);
    if constexpr (!kSkip) return x;
    return T::round(add(x, T::load(row.skip + i * T::kSize, n)));
  }

  //! The same values after pass 1, when `sum` may have overwritten x or skip.
  IBNORM_INLINE Pack source(const Row& row, std::int64_t i, int n) const {
    if constexpr (kStaged) return Float32::load(kept_x + i * 4);
    if constexpr (kSkip) {
      if (row.sum != nullptr) return T::load(row.sum + i * T::kSize, n);
    }
    return input(row, i, n);
  }

  IBNORM_INLINE Pack compressed(const Row& row, const Pack& x) const {
    return compress<kCompression, kHalf>(fma(subtract(x, row.mean), factor, -row.mean_rest));
  }

  //! Half types use whole packs, because their lanes have a different order; `c` has room for them.
  static IBNORM_INLINE Pack load_c(const Row& row, std::int64_t i, int n) {
    return Float32::load(row.c + i * 4, kHalf ? kPack : n);
  }
  static IBNORM_INLINE void store_c(const Row& row, const Pack& c, std::int64_t i, int n) {
    Float32::store(row.c + i * 4, c, kHalf ? kPack : n);
  }

  //! c after pass 2.
  IBNORM_INLINE Pack again(const Row& row, std::int64_t i, int n) const {
    if constexpr (kFits) return load_c(row, i, n);
    return subtract(compressed(row, source(row, i, n)), row.c_mean);
  }

  static IBNORM_INLINE Pack keep_columns(const Pack& a, int n) {
    if (n == kPack) return a;
    Pack result;
    for (int u = 0; u < kVectors; ++u) result.v[u] = keep(a.v[u], T::lanes(u, n));
    return result;
  }

  IBNORM_INLINE void write(char* p, const Pack& a, int n) const {
    if (stream && n == kPack) return T::stream(p, a);
    T::store(p, a, n);
  }

  IBNORM_INLINE Pack affine(const char* p, std::int64_t i, int n) const {
    if (kHalf && in_packs) return Float32::load(p + i * 4);
    if (own_affine) return T::load(p + i * T::kSize, n);
    return T::order(Float32::load(p + i * 4, n));
  }

  //! Pass 1 on one pack.
  IBNORM_INLINE Pack read(const Row& row, std::int64_t i, int n) const {
    prefetch<T>(row.x + i * T::kSize + ahead);
    if constexpr (kSkip) prefetch<T>(row.skip + i * T::kSize + ahead);
    const Pack a = input(row, i, n);
    if constexpr (kSkip) {
      if (row.sum != nullptr) write(row.sum + i * T::kSize, a, n);
    }
    if constexpr (kStaged) Float32::store(kept_x + i * 4, a);
    return a;
  }

  //! Pass 1.
  IBNORM_INLINE double read_all(const Row row) const {
    DoubleSum total;
    for_packs(cols, [&](std::int64_t i, int n) IBNORM_FLAT { total.add(read(row, i, n), n); });
    return total.total();
  }

  //! Pass 3 on one pack.
  IBNORM_INLINE void finish(const Row& row, const Pack& c, std::int64_t i, int n) const {
    const Pack unit = fma(c, row.inverse, row.offset);
    write(row.y + i * T::kSize, fma(unit, affine(scale, i, n), affine(bias, i, n)), n);
  }

  //! Pass 3.
  IBNORM_INLINE void finish_all(const Row row) const {
    for_packs(cols, [&](std::int64_t i, int n) IBNORM_FLAT { finish(row, again(row, i, n), i, n); });
  }

  //! Pass 2 of a row, together with pass 1 of the next row and pass 3 of the previous one, where these exist.
  //! It works on local copies: with references, the compiler would reload them after every store of a pack.
  IBNORM_INLINE void compress_row(const Row* last_row, Row* this_row, Row* next_row) const {
    const Row last = *last_row;
    const Row next = *next_row;
    Row row = *this_row;
    const double count = static_cast<double>(cols);
    const double mean = row.total / count;
    row.mean = static_cast<float>(mean);
    row.mean_rest = static_cast<float>(mean - static_cast<double>(row.mean)) * factor;

    DoubleSum total;
    Sum sum;
    Sum squares;
    for_packs(cols, [&](std::int64_t i, int n) IBNORM_FLAT {
      if (kFits && last.x != nullptr) finish(last, load_c(last, i, n), i, n);
      const Pack c = keep_columns(compressed(row, source(row, i, n)), n);
      if constexpr (kFits) store_c(row, c, i, n);
      if (kFits && next.x != nullptr) total.add(read(next, i, n), n);
      sum.add(c, n);
      squares.add_squares(c, n);
    });

    next_row->total = total.total();
    double c_mean = sum.total() / count;
    double variance = squares.total() / count - c_mean * c_mean;
    row.c_mean = 0.0F;
    if (c_mean * c_mean > variance) {
      const float near_mean = static_cast<float>(c_mean);
      DoubleSum rest;
      DoubleSum around;
      for_packs(cols, [&](std::int64_t i, int n) IBNORM_FLAT {
        const Pack e = keep_columns(subtract(again(row, i, n), near_mean), n);
        if constexpr (kFits) store_c(row, e, i, n);
        rest.add(e, n);
        around.add_squares(e, n);
      });
      c_mean = rest.total() / count;
      variance = around.total() / count - c_mean * c_mean;
      row.c_mean = near_mean;
    }
    const double inverse = 1.0 / __builtin_sqrt(variance + epsilon);
    row.inverse = mean - mean == 0.0 ? static_cast<float>(inverse) : __builtin_nanf("");
    row.offset = static_cast<float>(-c_mean * inverse);
    *this_row = row;
  }
};

template <class T, Compression kCompression, bool kSkip, bool kFits>
void run_rows(const Problem& p, std::int64_t row_begin, std::int64_t row_end, bool stream) noexcept {
  constexpr std::int64_t kRoom = kFits ? kScratch : 1;
  alignas(64) float kept_x[kRoom];
  alignas(64) float kept_c[kRoom];
  Kernel<T, kCompression, kSkip, kFits> kernel{
      static_cast<const char*>(p.scale),
      static_cast<const char*>(p.bias),
      p.affine_type == p.type,
      false,
      p.cols,
      stream,
      p.cols * T::kSize / 2,  // less is too late, and more is evicted from an L1 cache of 32 KiB
      1.0F / p.lambd,
      static_cast<double>(p.epsilon),
      reinterpret_cast<char*>(kept_x)};
  constexpr bool kConverts = kFits && T::kSize == 2;
  alignas(64) float converted[2][kConverts ? kConverted : 1];
  if (kConverts && p.cols <= kConverted && row_end - row_begin > 2) {
    const auto convert = [&](const char* from, float* floats) {
      char* const to = reinterpret_cast<char*>(floats);
      for_packs(p.cols, [&](std::int64_t i, int n)
                            IBNORM_FLAT { Float32::store(to + i * 4, kernel.affine(from, i, n)); });
      return to;
    };
    kernel.scale = convert(kernel.scale, converted[0]);
    kernel.bias = convert(kernel.bias, converted[1]);
    kernel.in_packs = true;
  }
  // c is written into y where y stays in the cache. Otherwise rows use the same buffer in turn.
  const bool c_in_y = T::kSize == 4 && !stream;
  const std::int64_t row_bytes = p.cols * T::kSize;
  const auto place = [&](std::int64_t r) {
    Row row = {};
    if (r >= row_end) return row;
    const std::int64_t from = r * row_bytes;
    row.x = static_cast<const char*>(p.x) + from;
    row.skip = kSkip ? static_cast<const char*>(p.skip) + from : nullptr;
    row.y = static_cast<char*>(p.y) + from;
    row.sum = kSkip && p.sum != nullptr ? static_cast<char*>(p.sum) + from : nullptr;
    row.c = c_in_y ? row.y : reinterpret_cast<char*>(kept_c);
    return row;
  };

  Row last = {};
  Row row = place(row_begin);
  if (kFits) row.total = kernel.read_all(row);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    Row next = place(r + 1);
    if (!kFits) row.total = kernel.read_all(row);
    kernel.compress_row(&last, &row, &next);
    if (!kFits || r + 1 == row_end) kernel.finish_all(row);
    last = row;
    row = next;
  }
  if (stream) fence_streams();
}

template <class T>
bool can_stream(const Problem& p) {
  if (p.rows * p.cols < kStreamBytes / T::kSize) return false;
  const std::uintptr_t places = reinterpret_cast<std::uintptr_t>(p.y) |
                                reinterpret_cast<std::uintptr_t>(p.sum) |
                                static_cast<std::uintptr_t>(p.cols * T::kSize);
  return places % static_cast<std::uintptr_t>(T::kStreamAlign) == 0;
}

template <class T, Compression kCompression, bool kSkip>
void choose_size(const Problem& p, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const bool stream = can_stream<T>(p);
  if (p.cols > kScratch) return run_rows<T, kCompression, kSkip, false>(p, row_begin, row_end, stream);
  run_rows<T, kCompression, kSkip, true>(p, row_begin, row_end, stream);
}

template <class T>
void choose_kind(const Problem& p, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const bool skip = p.skip != nullptr;
  switch (p.compression) {
    case Compression::kLinear:
      return skip ? choose_size<T, Compression::kLinear, true>(p, row_begin, row_end)
                  : choose_size<T, Compression::kLinear, false>(p, row_begin, row_end);
    case Compression::kLogarithmic:
      return skip ? choose_size<T, Compression::kLogarithmic, true>(p, row_begin, row_end)
                  : choose_size<T, Compression::kLogarithmic, false>(p, row_begin, row_end);
    case Compression::kTanh:
      return skip ? choose_size<T, Compression::kTanh, true>(p, row_begin, row_end)
                  : choose_size<T, Compression::kTanh, false>(p, row_begin, row_end);
  }
}

}  // namespace

namespace ibnorm::cpu::IBNORM_ISA {

void run(const Problem& problem, std::int64_t row_begin, std::int64_t row_end) noexcept {
  switch (problem.type) {
    case DType::kFloat32:
      return choose_kind<Float32>(problem, row_begin, row_end);
    case DType::kFloat16:
      return choose_kind<Float16>(problem, row_begin, row_end);
    case DType::kBFloat16:
      return choose_kind<BFloat16>(problem, row_begin, row_end);
  }
}

}  // namespace ibnorm::cpu::IBNORM_ISA
