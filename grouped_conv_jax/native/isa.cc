// Compiled once for each instruction set, with INSTRUCTION_SET as its name.
#include "engine.h"

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

namespace grouped_conv {
namespace INSTRUCTION_SET {

// By `Type`. What computes with pairs or tiles has nothing else: the rest is that of AVX-512.
extern const Engine* const engines[];
#if defined(GROUPED_CONV_TILES)
static constexpr Engine tiles = MakeEngine<Bfloat16Tile>(NAME(INSTRUCTION_SET));
const Engine* const engines[] = {nullptr, nullptr, nullptr, nullptr, &tiles};
#elif defined(GROUPED_CONV_PAIRS)
static constexpr Engine pairs = MakeEngine<Bfloat16Pair>(NAME(INSTRUCTION_SET));
const Engine* const engines[] = {nullptr, nullptr, nullptr, &pairs, nullptr};
#else
static constexpr Engine float32 = MakeEngine<Float32>(NAME(INSTRUCTION_SET));
static constexpr Engine float64 = MakeEngine<Float64>(NAME(INSTRUCTION_SET));
static constexpr Engine bfloat16 = MakeEngine<Bfloat16>(NAME(INSTRUCTION_SET));
const Engine* const engines[] = {&float32, &float64, &bfloat16, nullptr, nullptr};
#endif

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv
