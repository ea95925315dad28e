// The compiled code of one instruction set. build.py compiles this file once for each of them, with
// the flags of that instruction set and its name as the macro INSTRUCTION_SET.
#include "kernel_table.h"

#include "correlate.h"
#include "sum_products.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {
namespace {

template <class Policy>
constexpr KernelTable MakeTable() {
  constexpr int64_t lanes = kLanes<Policy>;
  KernelTable table{};
  table.lanes = lanes;
  table.element_bytes = sizeof(typename Policy::Element);
  table.pair = Policy::pair;
  table.vectors_at_once = kVectorsTogether<Policy>;
  table.pack_weights = PackWeights<Policy>;
  table.correlate = Correlate<Policy>;
  if constexpr (Policy::uses_amx) {
    table.amx_rows = kAmxRows;
  } else {
    table.largest_rotation = lanes / 2 < 8 ? lanes / 2 : 8;
    table.sums_at_once = kMostSums;
    table.sum_products = SumProducts<Policy>;
    table.unpack_weights = UnpackWeights<Policy>;
  }
  return table;
}

}  // namespace

// The tables by `ElementType`. The instruction sets that multiply pairs or tiles of bfloat16 have
// no other tables: their processors use those of AVX-512 for everything else.
extern const KernelTable* const tables[];
#if defined(GROUPED_CONV_AMX)
static constexpr KernelTable amx = MakeTable<Bfloat16Amx>();
const KernelTable* const tables[] = {nullptr, nullptr, nullptr, nullptr, &amx};
#elif defined(GROUPED_CONV_PAIRS)
static constexpr KernelTable pairs = MakeTable<Bfloat16Pair>();
const KernelTable* const tables[] = {nullptr, nullptr, nullptr, &pairs, nullptr};
#else
static constexpr KernelTable float32 = MakeTable<Float32>();
static constexpr KernelTable float64 = MakeTable<Float64>();
static constexpr KernelTable bfloat16 = MakeTable<Bfloat16>();
const KernelTable* const tables[] = {&float32, &float64, &bfloat16, nullptr, nullptr};
#endif

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv
