//! Fibres with real rendezvous points under an adversarial scheduler, and models of the approximate
//! instructions whose error a test can choose.
//!
//! A fibre runs until it reaches a shuffle, a barrier or its end. The scheduler then picks a warp at
//! random, or stays with the same one so that it runs ahead of the others as far as the next barrier,
//! and runs its lanes in random order. A missing barrier therefore shows as a result that depends on
//! the seed, and misuse (a shuffle some of whose lanes wait elsewhere or have ended, a barrier that some
//! threads never reach) as an error.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "ibnorm/compress.h"
#include "ibnorm/kernels.h"
#include "plan.h"

emulator::Index threadIdx;
emulator::Index blockIdx;
emulator::Index blockDim;
emulator::Index gridDim;

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = std::size_t{64} << 10;

enum class State { kReady, kShuffle, kBarrier, kEnded };

struct Fibre {
  std::unique_ptr<char[]> stack;
  ucontext_t start{};
  jmp_buf resume{};
  bool started = false;
  State state = State::kReady;
  unsigned mask = 0;
  int offset = 0;
  float value = 0.0F;
};

enum class Injection : int { kNone = 0, kRandom = 1, kWorst = 2 };

struct Machine {
  std::vector<Fibre> fibres;
  ucontext_t scheduler_start{};
  jmp_buf scheduler{};
  const std::function<void()>* kernel = nullptr;
  int current = 0;
  std::uint64_t random = 1;
  Injection injection = Injection::kNone;
  std::string failure;
};

Machine machine;

std::uint32_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return static_cast<std::uint32_t>(machine.random >> 32);
}

void fail(const std::string& what) {
  if (machine.failure.empty()) machine.failure = what + " (block " + std::to_string(blockIdx.x) + ")";
}

//! Gives control back to the scheduler until it resumes this fibre.
void wait_in(State state) {
  Fibre& fibre = machine.fibres[static_cast<std::size_t>(machine.current)];
  fibre.state = state;
  if (_setjmp(fibre.resume) == 0) _longjmp(machine.scheduler, 1);
}

void fibre_main() {
  for (;;) {  // one turn a block
    (*machine.kernel)();
    wait_in(State::kEnded);
  }
}

void resume(int thread) {
  Fibre& fibre = machine.fibres[static_cast<std::size_t>(thread)];
  machine.current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  fibre.state = State::kReady;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  getcontext(&fibre.start);
  if (!fibre.stack) fibre.stack = std::make_unique<char[]>(kStackBytes);
  fibre.start.uc_stack.ss_sp = fibre.stack.get();
  fibre.start.uc_stack.ss_size = kStackBytes;
  fibre.start.uc_link = nullptr;
  makecontext(&fibre.start, fibre_main, 0);
  setcontext(&fibre.start);
}

//! Completes the shuffle that every lane of the warp waits in.
bool exchange(int low, int high) {
  float before[kWarp];
  const Fibre& leader = machine.fibres[static_cast<std::size_t>(low)];
  for (int t = low; t < high; ++t) {
    const Fibre& fibre = machine.fibres[static_cast<std::size_t>(t)];
    before[t - low] = fibre.value;
    if (fibre.mask != leader.mask || fibre.offset != leader.offset) {
      fail("lanes of a warp disagree on the mask or offset of a shuffle");
      return false;
    }
  }
  const unsigned present = high - low == kWarp ? 0xffffffffU : (1U << (high - low)) - 1U;
  if (leader.mask != present) {
    fail("the mask of a shuffle is not the set of lanes that take part");
    return false;
  }
  for (int t = low; t < high; ++t) {
    const int partner = (t - low) ^ leader.offset;
    if (partner >= high - low) {
      fail("a shuffle reads a lane that does not exist");
      return false;
    }
    machine.fibres[static_cast<std::size_t>(t)].value = before[partner];
  }
  return true;
}

bool run_block(int threads) {
  const auto count = static_cast<std::size_t>(threads);
  const int warps = (threads + kWarp - 1) / kWarp;
  std::vector<char> ready(count, 1);
  std::vector<int> ready_in(static_cast<std::size_t>(warps));
  for (int w = 0; w < warps; ++w)
    ready_in[static_cast<std::size_t>(w)] = std::min(threads - w * kWarp, kWarp);
  int ended = 0;
  int warp = 0;
  const unsigned loyalty = next_random() % 4;  // in quarters: how often the scheduler stays with a warp
  while (ended < threads) {
    if (ready_in[static_cast<std::size_t>(warp)] == 0 || next_random() % 4 >= loyalty) {
      int tried = 0;
      warp = static_cast<int>(next_random() % static_cast<unsigned>(warps));
      while (tried < warps && ready_in[static_cast<std::size_t>(warp)] == 0) {
        warp = (warp + 1) % warps;
        ++tried;
      }
      if (tried == warps) {
        int waiting = 0;
        for (const Fibre& fibre : machine.fibres) waiting += fibre.state == State::kBarrier ? 1 : 0;
        if (waiting != threads) {
          fail("a barrier that some threads have not reached and never will");
          return false;
        }
        std::fill(ready.begin(), ready.end(), 1);
        for (int w = 0; w < warps; ++w) {
          ready_in[static_cast<std::size_t>(w)] = std::min(threads - w * kWarp, kWarp);
        }
        continue;
      }
    }
    const int low = warp * kWarp;
    const int high = std::min(threads, low + kWarp);
    int order[kWarp];
    int lanes = 0;
    for (int t = low; t < high; ++t) {
      if (ready[static_cast<std::size_t>(t)] != 0) order[lanes++] = t;
    }
    for (int i = lanes - 1; i > 0; --i) {
      std::swap(order[i], order[next_random() % static_cast<unsigned>(i + 1)]);
    }
    for (int i = 0; i < lanes; ++i) {
      ready[static_cast<std::size_t>(order[i])] = 0;
      resume(order[i]);
      if (!machine.failure.empty()) return false;
      ended += machine.fibres[static_cast<std::size_t>(order[i])].state == State::kEnded ? 1 : 0;
    }
    ready_in[static_cast<std::size_t>(warp)] = 0;
    int shuffling = 0;
    for (int t = low; t < high; ++t) {
      shuffling += machine.fibres[static_cast<std::size_t>(t)].state == State::kShuffle ? 1 : 0;
    }
    if (shuffling == 0) continue;
    if (shuffling != high - low) {
      fail("a shuffle while other lanes of the warp wait elsewhere or have ended");
      return false;
    }
    if (!exchange(low, high)) return false;
    std::fill(ready.begin() + low, ready.begin() + high, 1);
    ready_in[static_cast<std::size_t>(warp)] = high - low;
  }
  return true;
}

//! A repeatable error in [-1, 1]: equal inputs get equal errors, as on a device.
double error_of(float v) {
  if (machine.injection == Injection::kNone) return 0.0;
  std::uint32_t bits = __float_as_uint(v);
  bits ^= bits >> 16;
  bits *= 0x7feb352dU;
  bits ^= bits >> 15;
  bits *= 0x846ca68bU;
  bits ^= bits >> 16;
  if (machine.injection == Injection::kWorst) return (bits & 1U) != 0 ? 1.0 : -1.0;
  return static_cast<double>(bits) / 2147483648.0 - 1.0;
}

}  // namespace

bool run(Index grid, Index block, const std::function<void()>& kernel) {
  const int threads = static_cast<int>(block.x);
  if (grid.y * grid.z * block.y * block.z != 1 || threads < 1 || threads > 1024) {
    fail("a launch must be one-dimensional with 1 to 1024 threads");
    return false;
  }
  machine.kernel = &kernel;
  machine.fibres.resize(static_cast<std::size_t>(threads));
  blockDim = block;
  gridDim = grid;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = {b, 0, 0};
    if (!run_block(threads)) {
      machine.fibres.clear();  // they hang in the middle of the kernel
      return false;
    }
  }
  return true;
}

float shuffle_xor(unsigned mask, float value, int offset) {
  {
    Fibre& fibre = machine.fibres[static_cast<std::size_t>(machine.current)];
    fibre.value = value;
    fibre.mask = mask;
    fibre.offset = offset;
  }
  wait_in(State::kShuffle);
  return machine.fibres[static_cast<std::size_t>(machine.current)].value;
}

void barrier() { wait_in(State::kBarrier); }

}  // namespace emulator

// The bounds of the PTX ISA.
namespace ibnorm::approx {

float log2(float v) {
  const double exact = std::log2(static_cast<double>(v));
  const double error = emulator::error_of(v) * 0x1p-22;
  return static_cast<float>(v > 0.5F && v < 2.0F ? exact + error : exact * (1.0 + error));
}
float exp2(float v) {
  const auto result =
      static_cast<float>(std::exp2(static_cast<double>(v)) * (1.0 + emulator::error_of(v) * 0x1p-22));
  return result < 0x1p-126F ? 0.0F : result;
}
float reciprocal(float v) {
  return static_cast<float>(1.0 / static_cast<double>(v) * (1.0 + emulator::error_of(v) * 0x1p-23));
}
float rsqrt(float v) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(v)) *
                            (1.0 + emulator::error_of(v) * 0x1p-22));
}

}  // namespace ibnorm::approx

// What the tests call.
extern "C" {

int emulator_run(const void* x, const void* skip, const void* scale, const void* bias, void* y, void* sum,
                 std::int64_t rows, std::int64_t cols, int type, int affine_type, int compression,
                 float lambd, float epsilon, std::uint64_t seed, int injection) {
  ibnorm::Problem problem;
  problem.x = x;
  problem.skip = skip;
  problem.scale = scale;
  problem.bias = bias;
  problem.y = y;
  problem.sum = sum;
  problem.rows = rows;
  problem.cols = cols;
  problem.type = static_cast<ibnorm::DType>(type);
  problem.affine_type = static_cast<ibnorm::DType>(affine_type);
  problem.compression = static_cast<ibnorm::Compression>(compression);
  problem.lambd = lambd;
  problem.epsilon = epsilon;
  emulator::machine.random = seed * 0x9e3779b97f4a7c15ULL + 1U;
  emulator::machine.injection = static_cast<emulator::Injection>(injection);
  emulator::machine.failure.clear();
  const ibnorm::Status status = ibnorm::cuda::run(problem, nullptr);
  return emulator::machine.failure.empty() ? static_cast<int>(status) : -1;
}

const char* emulator_failure() { return emulator::machine.failure.c_str(); }

//! g of `count` values as the float32 (else half) kernels compute it, in their unit.
void emulator_compress(const float* t, float* g, std::int64_t count, int compression, int half,
                       int injection) {
  using ibnorm::Compression;
  using ibnorm::Compressor;
  using ibnorm::DType;
  emulator::machine.injection = static_cast<emulator::Injection>(injection);
  const bool is_log = static_cast<Compression>(compression) == Compression::kLogarithmic;
  for (std::int64_t i = 0; i < count; ++i) {
    if (half == 0) {
      g[i] = is_log ? Compressor<Compression::kLogarithmic, DType::kFloat32>::of(t[i], 0.0F)
                    : Compressor<Compression::kTanh, DType::kFloat32>::of(t[i], 0.0F);
    } else {
      g[i] = is_log ? Compressor<Compression::kLogarithmic, DType::kFloat16>::of(t[i], 0.0F)
                    : Compressor<Compression::kTanh, DType::kFloat16>::of(t[i], 0.0F);
    }
  }
}

//! method, vectors, threads, rows per block.
void emulator_plan(std::int64_t cols, int type, int aligned, int* out) {
  ibnorm::cuda::Plan plan;
  switch (static_cast<ibnorm::DType>(type)) {
    case ibnorm::DType::kFloat32:
      plan = ibnorm::cuda::plan_of<ibnorm::DType::kFloat32>(cols, aligned != 0);
      break;
    case ibnorm::DType::kFloat16:
      plan = ibnorm::cuda::plan_of<ibnorm::DType::kFloat16>(cols, aligned != 0);
      break;
    case ibnorm::DType::kBFloat16:
      plan = ibnorm::cuda::plan_of<ibnorm::DType::kBFloat16>(cols, aligned != 0);
      break;
  }
  out[0] = static_cast<int>(plan.method);
  out[1] = plan.vectors;
  out[2] = plan.threads;
  out[3] = plan.rows_per_block;
}

//! `bytes` between two inaccessible pages; the last byte touches the second one when `at_end`, else the
//! first byte touches the first.
void* guarded_allocate(std::size_t bytes, std::size_t offset, int at_end) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t inner = (bytes + offset + page) / page * page;
  void* const map =
      mmap(nullptr, inner + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(map) + page;
  mprotect(map, page, PROT_NONE);
  mprotect(begin + inner, page, PROT_NONE);
  std::memset(begin, 0xff, inner);  // NaN in every type
  return at_end != 0 ? begin + inner - bytes : begin + offset;
}

void guarded_free(void* data, std::size_t bytes, std::size_t offset, int at_end) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t inner = (bytes + offset + page) / page * page;
  char* const begin =
      at_end != 0 ? static_cast<char*>(data) - (inner - bytes) : static_cast<char*>(data) - offset;
  munmap(begin - page, inner + 2 * page);
}
}
