#include "engines.h"

#include <atomic>

#ifdef GROUPED_CONV_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace grouped_conv {

#define ENGINES(set)                    \
  namespace set {                       \
  extern const Engine* const engines[]; \
  }
ENGINES(portable)
#ifdef GROUPED_CONV_X86
ENGINES(avx2)
ENGINES(avx512)
ENGINES(avx512_bf16)
ENGINES(amx_bf16)
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Engine* const* engines;
  bool (*is_there)();
};

#ifdef GROUPED_CONV_X86
// Of the processor, and of a system that keeps their registers.
bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Linux lets a process use tiles that has asked.
bool HasAmx() {
#ifdef __linux__
  static const bool has = [] {
    constexpr unsigned kTiles = 1u << 24, kBfloat16 = 1u << 22;  // Of edx.
    unsigned a, b, c, d;
    if (!HasAvx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & kTiles) == 0 || (d & kBfloat16) == 0) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}
#endif

// The best first.
const InstructionSet kInstructionSets[] = {
#ifdef GROUPED_CONV_X86
    {"amx_bf16", amx_bf16::engines, HasAmx},
    {"avx512_bf16", avx512_bf16::engines,
     [] { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }},
    {"avx512", avx512::engines, HasAvx512},
    {"avx2", avx2::engines, HasAvx2},
#endif
    {"portable", portable::engines, [] { return true; }},
};
constexpr int kCount = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);

// Instruction sets from this one on are used.
std::atomic<int> best{0};

}  // namespace

const Engine* EngineFor(Type type) {
#ifdef GROUPED_CONV_X86
  // Processors with tiles multiply pairs at half the speed of 32 bits.
  if (type == Type::kBfloat16Pair && best.load() == 0 && HasAmx()) return nullptr;
#endif
  for (int i = best.load(); i < kCount; i++) {
    const InstructionSet& set = kInstructionSets[i];
    const Engine* engine = set.engines[static_cast<int>(type)];
    if (engine != nullptr && set.is_there()) return engine;
  }
  return nullptr;
}
const char* NameOfInstructionSet(int i) {
  if (i < 0 || i >= kCount) return nullptr;
  return kInstructionSets[i].is_there() ? kInstructionSets[i].name : "";
}

void UseInstructionSet(int i) {
  if (0 <= i && i < kCount) best = i;
}

}  // namespace grouped_conv
