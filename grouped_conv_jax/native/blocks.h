// How many results and vectors the kernels take together: what the registers hold.
#ifndef GROUPED_CONV_BLOCKS_H_
#define GROUPED_CONV_BLOCKS_H_

#include "job.h"
#include "packing.h"
#include "vectors.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

// Vectors of one group, and sums beside some weights and inputs.
constexpr int kMostVectors = kRegisters == 32 ? 3 : 2;
constexpr int kMostSums = kRegisters == 32 ? 28 : 12;
constexpr int MostPixels(int64_t vectors) {
  return vectors == 1 ? kMostSums / 2 : kMostSums / static_cast<int>(vectors);
}
template <class Policy>
constexpr int kVectorsTogether = Policy::is_tiled ? 2 : kMostVectors;

// The vectors from `v` on that are computed together: equal parts of a group.
template <class Policy>
INLINE int64_t Together(const Job& job, Span vectors, int64_t v) {
  int64_t in_group = job.vectors_in_group - v % job.vectors_in_group;
  int64_t left = Smaller(vectors.end - v, in_group);
  return Blocks(left, Blocks(left, kVectorsTogether<Policy>));
}

// For kernels of 1 to `most` pixels or inputs.
template <int most>
using UpTo = std::make_integer_sequence<int, most>;

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_BLOCKS_H_
