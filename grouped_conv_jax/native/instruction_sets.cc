// The list of compiled instruction sets and the questions to the processor (see
// instruction_sets.h).
#include "instruction_sets.h"

#include <atomic>

#ifdef GROUPED_CONV_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace grouped_conv {

#define DECLARE_TABLES(set)                 \
  namespace set {                           \
  extern const KernelTable* const tables[]; \
  }
DECLARE_TABLES(portable)
#ifdef GROUPED_CONV_X86
DECLARE_TABLES(avx2)
DECLARE_TABLES(avx512)
DECLARE_TABLES(avx512_bf16)
DECLARE_TABLES(amx_bf16)
#endif

namespace {

struct InstructionSet {
  const char* name;
  const KernelTable* const* tables;
  bool (*is_supported)();
};

#ifdef GROUPED_CONV_X86
// `__builtin_cpu_supports` also asks whether the operating system saves the registers.
bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Linux lets a process use the AMX registers only after the process has requested them.
bool HasAmx() {
#ifdef __linux__
  static const bool has = [] {
    constexpr unsigned kTiles = 1u << 24, kBfloat16 = 1u << 22;  // Bits of edx.
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

// The best instruction set comes first.
const InstructionSet kInstructionSets[] = {
#ifdef GROUPED_CONV_X86
    {"amx_bf16", amx_bf16::tables, HasAmx},
    {"avx512_bf16", avx512_bf16::tables,
     [] { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }},
    {"avx512", avx512::tables, HasAvx512},
    {"avx2", avx2::tables, HasAvx2},
#endif
    {"portable", portable::tables, [] { return true; }},
};
constexpr int kCount = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);

// The index of the best instruction set that may be used.
std::atomic<int> best{0};

}  // namespace

const KernelTable* KernelsFor(ElementType type) {
#ifdef GROUPED_CONV_X86
  // Processors with AMX multiply pairs in vectors at half the speed of float32.
  if (type == ElementType::kBfloat16Pair && best.load() == 0 && HasAmx()) return nullptr;
#endif
  for (int i = best.load(); i < kCount; i++) {
    const InstructionSet& set = kInstructionSets[i];
    const KernelTable* table = set.tables[static_cast<int>(type)];
    if (table != nullptr && set.is_supported()) return table;
  }
  return nullptr;
}

const char* NameOfInstructionSet(int i) {
  if (i < 0 || i >= kCount) return nullptr;
  return kInstructionSets[i].is_supported() ? kInstructionSets[i].name : "";
}

void UseInstructionSet(int i) {
  if (0 <= i && i < kCount) best = i;
}

}  // namespace grouped_conv
