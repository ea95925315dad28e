// Which elements of the operand a result sees, without the gaps of strides and dilations.
//
// algorithms/phases.py has the same arithmetic for the implementations in JAX. The kernels compute
// phases themselves, because a call then passes seven numbers for each dimension, which can be
// checked one by one. Phases would be many for large strides, and would have to fit each other.
#ifndef GROUPED_CONV_PHASES_H_
#define GROUPED_CONV_PHASES_H_

#include <cstdint>
#include <vector>

#include "job.h"

namespace grouped_conv {

// One spatial dimension of a correlation: result q reads through tap i element number
// (q * stride + i * dilation - low) / gaps of the operand, if that is a whole number.
struct Dimension {
  int64_t operand, results, taps, stride, dilation, gaps, low;
};

// Fills in the phases of a dimension, and returns its axis without the tiles. The axis numbers the
// positions that any phase reads from 0 on.
Axis AxisOf(const Dimension& dimension, std::vector<Phase>* phases);

}  // namespace grouped_conv

#endif  // GROUPED_CONV_PHASES_H_
