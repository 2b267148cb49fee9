//! The CPU kernels behind standard input and output, for processors that only an emulator has. A request is
//! nine int32 (instruction set, type, type of scale and bias, compression, with skip, rows, columns, bits of
//! lambd, bits of epsilon), then the arrays x, skip (if any), scale and bias. The answer is an int32 (the
//! status), then y and, with skip, the sum. The program ends with its input.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ibnorm/kernels.h"

namespace {

using Bytes = std::vector<unsigned char>;

struct Request {
  std::int32_t set, type, affine_type, compression, with_skip, rows, cols;
  float lambd, epsilon;
};

std::size_t size_of(std::int32_t type) { return type == 0 ? 4 : 2; }

Bytes read(std::size_t size) {
  Bytes bytes(size);
  if (std::fread(bytes.data(), 1, size, stdin) != size) std::exit(EXIT_FAILURE);
  return bytes;
}

}  // namespace

int main() {
  Request request;
  while (std::fread(&request, sizeof request, 1, stdin) == 1) {
    const auto cols = static_cast<std::size_t>(request.cols);
    const std::size_t size = static_cast<std::size_t>(request.rows) * cols * size_of(request.type);
    const Bytes x = read(size);
    const Bytes skip = read(request.with_skip != 0 ? size : 0);
    const Bytes scale = read(cols * size_of(request.affine_type));
    const Bytes bias = read(cols * size_of(request.affine_type));
    Bytes y(size), sum(skip.size());
    ibnorm::Problem p;
    p.x = x.data();
    p.skip = request.with_skip != 0 ? skip.data() : nullptr;
    p.scale = scale.data();
    p.bias = bias.data();
    p.y = y.data();
    p.sum = request.with_skip != 0 ? sum.data() : nullptr;
    p.rows = request.rows;
    p.cols = request.cols;
    p.type = static_cast<ibnorm::DType>(request.type);
    p.affine_type = static_cast<ibnorm::DType>(request.affine_type);
    p.compression = static_cast<ibnorm::Compression>(request.compression);
    p.lambd = request.lambd;
    p.epsilon = request.epsilon;
    const auto set = static_cast<ibnorm::cpu::InstructionSet>(request.set);
    const auto status = static_cast<std::int32_t>(ibnorm::cpu::run(set, p, 0, p.rows));
    std::fwrite(&status, sizeof status, 1, stdout);
    std::fwrite(y.data(), 1, y.size(), stdout);
    std::fwrite(sum.data(), 1, sum.size(), stdout);
    std::fflush(stdout);
  }
  return EXIT_SUCCESS;
}
