// The functions of one instruction set for one type of elements, as plan.cc and compute.h see them.
#ifndef GROUPED_CONV_ENGINE_H_
#define GROUPED_CONV_ENGINE_H_

#include "correlate.h"
#include "job.h"
#include "sum_products.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

template <class Policy>
constexpr Engine MakeEngine(const char* name) {
  constexpr int64_t lanes = kLanes<Policy>;
  Engine engine{};
  engine.name = name;
  engine.lanes = lanes;
  engine.element_bytes = sizeof(typename Policy::Element);
  engine.pair = Policy::pair;
  engine.vectors_at_once = kVectorsTogether<Policy>;
  engine.pack_weights = PackWeights<Policy>;
  engine.correlate = Correlate<Policy>;
  if constexpr (Policy::is_tiled) {
    engine.tile_rows = kTileRows;
  } else {
    engine.largest_rotation = lanes / 2 < 8 ? lanes / 2 : 8;
    engine.sums_at_once = kMostSums;
    engine.sum_products = SumProducts<Policy>;
    engine.unpack_weights = UnpackWeights<Policy>;
  }
  return engine;
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_ENGINE_H_
