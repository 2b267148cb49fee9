//! The kernels under a sanitizer, with nothing else in the process: every type, compression and instruction
//! set, with widths that are hard to vectorise, on heap blocks of exact size. Eight threads work on disjoint
//! rows of one problem.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "ibnorm/kernels.h"
#include "variants.h"

namespace {

using ibnorm::Compression;
using ibnorm::DType;
using ibnorm::cpu::InstructionSet;

constexpr int kThreads = 8;

std::size_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

//! A block of exactly `bytes`, `offset` bytes after an address that the allocator returned.
struct Block {
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* data;
  Block(std::size_t bytes, std::size_t offset, unsigned seed) : memory(new unsigned char[bytes + offset]) {
    data = memory.get() + offset;
    for (std::size_t i = 0; i < bytes; ++i)
      data[i] = static_cast<unsigned char>((seed = seed * 1664525U + 1013904223U) >> 25);
  }
};

int check(InstructionSet set, DType type, DType affine, Compression kind, bool skip, bool with_sum,
          bool in_place, std::int64_t rows, std::int64_t cols, std::size_t offset) {
  const std::size_t bytes = static_cast<std::size_t>(rows * cols) * size_of(type);
  const std::size_t affine_bytes = static_cast<std::size_t>(cols) * size_of(affine);
  Block x(bytes, offset * size_of(type), 1), other(bytes, offset * size_of(type), 2),
      scale(affine_bytes, 0, 3), bias(affine_bytes, offset * size_of(affine), 4), y(bytes, 0, 5),
      sum(bytes, offset * size_of(type), 6);
  ibnorm::Problem p;
  p.x = x.data;
  p.skip = skip ? other.data : nullptr;
  p.scale = scale.data;
  p.bias = bias.data;
  p.y = in_place ? x.data : y.data;
  p.sum = skip && with_sum ? (in_place ? other.data : sum.data) : nullptr;
  p.rows = rows;
  p.cols = cols;
  p.type = type;
  p.affine_type = affine;
  p.compression = kind;
  std::vector<std::thread> pool;
  std::vector<ibnorm::Status> status(kThreads, ibnorm::Status::kOk);
  for (int t = 0; t < kThreads; ++t)
    pool.emplace_back([&, t] {
      status[static_cast<std::size_t>(t)] =
          ibnorm::cpu::run(set, p, rows * t / kThreads, rows * (t + 1) / kThreads);
    });
  for (std::thread& thread : pool) thread.join();
  for (const ibnorm::Status s : status)
    if (s != ibnorm::Status::kOk) return 1;
  return 0;
}

}  // namespace

int main() {
  struct Pair {
    DType type, affine;
  };
  constexpr Pair pairs[] = {{DType::kFloat32, DType::kFloat32},
                            {DType::kFloat16, DType::kFloat16},
                            {DType::kFloat16, DType::kFloat32},
                            {DType::kBFloat16, DType::kBFloat16},
                            {DType::kBFloat16, DType::kFloat32}};
  struct Size {
    std::int64_t rows, cols;
  };
  constexpr Size sizes[] = {{0, 5},  {1, 0},  {9, 1},    {9, 2},    {9, 15},
                            {9, 16}, {9, 17}, {11, 111}, {8, 1023}, {8, 16387}};
  int cases = 0;
  int failures = 0;
  for (const InstructionSet set : ibnorm::cpu::kInstructionSets) {
    if (!ibnorm::cpu::has(set)) continue;
    for (const Pair& pair : pairs)
      for (const Compression kind : {Compression::kLinear, Compression::kLogarithmic, Compression::kTanh})
        for (const Size& size : sizes)
          for (int form = 0; form < 6; ++form) {  // plain, skip, skip without sum; each beside and in place
            failures += check(set, pair.type, pair.affine, kind, form >= 2, form < 4, form % 2 == 1,
                              size.rows, size.cols, static_cast<std::size_t>(cases % 3));
            ++cases;
          }
  }
  // Streaming stores: the output is large enough, and each thread has one block of rows.
  failures += check(InstructionSet::kAvx512, DType::kFloat32, DType::kFloat32, Compression::kLogarithmic,
                    true, true, false, 8192, 1024, 0) != 0 &&
              ibnorm::cpu::has(InstructionSet::kAvx512);
  std::printf("%d cases on %d threads, %d failures\n", cases + 1, kThreads, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
