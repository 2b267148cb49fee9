//! Hides newer instruction sets from a program that runs at full speed: a library for LD_PRELOAD on Linux
//! x86-64.
//!
//! MASKED_CPUID names the newest instruction set that stays visible: "avx2" or "sse4.2". Every CPUID
//! instruction then faults (arch_prctl(2), ARCH_SET_CPUID; the processor needs the flag cpuid_fault), and the
//! handler of the fault answers with the bits of newer instruction sets cleared. PyTorch, ONNX Runtime, NumPy
//! and this project's kernels choose their code by these bits. The instructions themselves still work, so
//! code that uses them without asking goes unnoticed: that needs an emulator. Processes that are started
//! inherit the variables, and so the mask.
//!
//! Source of leaves and bits: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
//! "CPUID".
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kArchSetCpuid = 0x1012;  // ARCH_SET_CPUID of <asm/prctl.h>

// Leaves.
constexpr std::uint32_t kFeatures = 0x1;
constexpr std::uint32_t kExtendedFeatures = 0x7;
constexpr std::uint32_t kStates = 0xd;     // what XSAVE saves
constexpr std::uint32_t kTiles = 0x1d;     // AMX
constexpr std::uint32_t kMatrices = 0x1e;  // AMX
constexpr std::uint32_t kAvx10 = 0x24;
constexpr std::uint32_t kMoreFeatures = 0x80000001;

constexpr std::uint32_t bit(int position) { return std::uint32_t{1} << position; }

// Leaf 1, ECX.
constexpr std::uint32_t kFma = bit(12), kMovbe = bit(22), kXsave = bit(26), kOsXsave = bit(27),
                        kAvx = bit(28), kF16c = bit(29);
// Leaf 7, sub-leaf 0, EBX.
constexpr std::uint32_t kBmi1 = bit(3), kAvx2 = bit(5), kBmi2 = bit(8), kAvx512F = bit(16),
                        kAvx512Dq = bit(17), kAvx512Ifma = bit(21), kAvx512Pf = bit(26), kAvx512Er = bit(27),
                        kAvx512Cd = bit(28), kAvx512Bw = bit(30), kAvx512Vl = bit(31);
// Leaf 7, sub-leaf 0, ECX.
constexpr std::uint32_t kAvx512Vbmi = bit(1), kAvx512Vbmi2 = bit(6), kGfni = bit(8), kVaes = bit(9),
                        kVpclmulqdq = bit(10), kAvx512Vnni = bit(11), kAvx512Bitalg = bit(12),
                        kAvx512Vpopcntdq = bit(14);
// Leaf 7, sub-leaf 0, EDX.
constexpr std::uint32_t kAvx512Vnniw4 = bit(2), kAvx512Fmaps4 = bit(3), kAvx512Vp2intersect = bit(8),
                        kAmxBf16 = bit(22), kAvx512Fp16 = bit(23), kAmxTile = bit(24), kAmxInt8 = bit(25);
// Leaf 0x80000001, ECX.
constexpr std::uint32_t kLzcnt = bit(5);
// States of XSAVE: leaf 0xd, sub-leaf 0, EAX.
constexpr std::uint32_t kX87State = bit(0), kSseState = bit(1), kAvxState = bit(2);

enum class Visible { kEverything, kAvx2, kSse42 };

struct Registers {
  std::uint32_t a, b, c, d;
};

using Handler = void (*)(int);
using SetAction = int (*)(int, const struct sigaction*, struct sigaction*);

// A signal handler and the functions that replace the C library's have no other place for what they share.
Visible visible = Visible::kEverything;
struct sigaction of_program;  // what the program asked for at SIGSEGV, to which other faults go

SetAction real_sigaction() { return reinterpret_cast<SetAction>(dlsym(RTLD_NEXT, "sigaction")); }

bool let_cpuid_work(bool works) { return syscall(SYS_arch_prctl, kArchSetCpuid, works ? 1UL : 0UL) == 0; }

// An older processor's answer, from this processor's.
Registers masked(std::uint32_t leaf, std::uint32_t subleaf, Registers answer) {
  const bool without_avx = visible == Visible::kSse42;
  switch (leaf) {
    case kFeatures:
      if (without_avx) answer.c &= ~(kFma | kMovbe | kXsave | kOsXsave | kAvx | kF16c);
      return answer;
    case kMoreFeatures:
      if (without_avx) answer.c &= ~kLzcnt;
      return answer;
    case kExtendedFeatures:
      if (subleaf > 0) return {};  // AVX-VNNI, AVX512-BF16, AMX-FP16 and other additions since AVX-512
      answer.a = 0;                // the last sub-leaf
      answer.b &=
          ~(kAvx512F | kAvx512Dq | kAvx512Ifma | kAvx512Pf | kAvx512Er | kAvx512Cd | kAvx512Bw | kAvx512Vl);
      answer.c &= ~(kAvx512Vbmi | kAvx512Vbmi2 | kGfni | kVaes | kVpclmulqdq | kAvx512Vnni | kAvx512Bitalg |
                    kAvx512Vpopcntdq);
      answer.d &= ~(kAvx512Vnniw4 | kAvx512Fmaps4 | kAvx512Vp2intersect | kAmxBf16 | kAvx512Fp16 | kAmxTile |
                    kAmxInt8);
      if (without_avx) answer.b &= ~(kBmi1 | kAvx2 | kBmi2);
      return answer;
    case kStates:
      if (without_avx) return {};
      if (subleaf == 0) answer.a &= kX87State | kSseState | kAvxState;
      return answer;
    case kTiles:
    case kMatrices:
    case kAvx10:
      return {};
    default:
      return answer;
  }
}

// Gives a fault that is not of CPUID to the program, or ends the program as without this library.
void pass_on(int number, siginfo_t* info, void* context) {
  const bool was_sent = info->si_code <= 0;  // by kill(2) or raise(3)
  if ((of_program.sa_flags & SA_SIGINFO) != 0) {
    of_program.sa_sigaction(number, info, context);
  } else if (of_program.sa_handler != SIG_DFL && of_program.sa_handler != SIG_IGN) {
    of_program.sa_handler(number);
  } else if (of_program.sa_handler == SIG_DFL || !was_sent) {
    struct sigaction standard = {};
    standard.sa_handler = SIG_DFL;
    real_sigaction()(number, &standard, nullptr);
    if (was_sent) raise(number);  // what faulted does so again when this handler returns
  }
}

void on_fault(int number, siginfo_t* info, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* instruction = reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]);
  // The kernel sends SI_KERNEL for a general protection fault, whose instruction can be read. CPUID is 0f a2.
  if (info->si_code != SI_KERNEL || instruction[0] != 0x0f || instruction[1] != 0xa2) {
    pass_on(number, info, context);
    return;
  }
  const auto leaf = static_cast<std::uint32_t>(registers[REG_RAX]);
  const auto subleaf = static_cast<std::uint32_t>(registers[REG_RCX]);
  Registers answer{leaf, 0, subleaf, 0};
  let_cpuid_work(true);
  __asm__ volatile("cpuid" : "+a"(answer.a), "=b"(answer.b), "+c"(answer.c), "=d"(answer.d));
  let_cpuid_work(false);
  answer = masked(leaf, subleaf, answer);
  registers[REG_RAX] = answer.a;
  registers[REG_RBX] = answer.b;
  registers[REG_RCX] = answer.c;
  registers[REG_RDX] = answer.d;
  registers[REG_RIP] += 2;
}

// A program must not run unmasked by mistake.
[[noreturn]] void refuse(const char* message) {
  if (write(STDERR_FILENO, message, std::strlen(message)) < 0) _exit(2);
  _exit(1);
}

__attribute__((constructor)) void start() {
  const char* name = std::getenv("MASKED_CPUID");
  if (name == nullptr) return;
  if (std::strcmp(name, "avx2") == 0) {
    visible = Visible::kAvx2;
  } else if (std::strcmp(name, "sse4.2") == 0) {
    visible = Visible::kSse42;
  } else {
    refuse("masked_cpuid: MASKED_CPUID must be avx2 or sse4.2\n");
  }
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  real_sigaction()(SIGSEGV, &action, &of_program);
  if (!let_cpuid_work(false)) refuse("masked_cpuid: this processor or kernel cannot make CPUID fault\n");
}

}  // namespace

// The program's handler of SIGSEGV, for example Python's faulthandler, is kept beside this one instead of
// replacing it.
extern "C" {
__attribute__((visibility("default"))) int sigaction(int number, const struct sigaction* wanted,
                                                     struct sigaction* previous) noexcept {
  if (number != SIGSEGV || visible == Visible::kEverything) return real_sigaction()(number, wanted, previous);
  if (previous != nullptr) *previous = of_program;
  if (wanted != nullptr) of_program = *wanted;
  return 0;
}

__attribute__((visibility("default"))) Handler signal(int number, Handler handler) noexcept {
  struct sigaction wanted = {};
  struct sigaction previous = {};
  wanted.sa_handler = handler;
  wanted.sa_flags = SA_RESTART;
  return sigaction(number, &wanted, &previous) == 0 ? previous.sa_handler : SIG_ERR;
}
}
