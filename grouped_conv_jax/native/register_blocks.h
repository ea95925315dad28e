// How many pixels and vectors of features the register kernels compute at once.
#ifndef GROUPED_CONV_REGISTER_BLOCKS_H_
#define GROUPED_CONV_REGISTER_BLOCKS_H_

#include "job.h"
#include "packing.h"
#include "vectors.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

// A kernel keeps up to kMostSums vectors of sums in registers, for up to kMostVectors vectors of
// one group. The other registers hold weights and inputs: with 16 registers, 6 pixels x 2 vectors
// of sums, two vectors of weights and one input take 15.
constexpr int kMostVectors = kRegisters == 32 ? 3 : 2;
constexpr int kMostSums = kRegisters == 32 ? 28 : 12;

constexpr int MostPixels(int64_t vectors) {
  return vectors == 1 ? kMostSums / 2 : kMostSums / static_cast<int>(vectors);
}

template <class Policy>
constexpr int kVectorsTogether = Policy::uses_amx ? 2 : kMostVectors;

// Returns how many of the vectors from `v` on one kernel computes: equal parts of a group.
template <class Policy>
INLINE int64_t Together(const Job& job, Span vectors, int64_t v) {
  int64_t in_group = job.vectors_in_group - v % job.vectors_in_group;
  int64_t left = Smaller(vectors.end - v, in_group);
  return Balanced(left, kVectorsTogether<Policy>);
}

// The numbers 0 to most - 1, to instantiate register kernels for 1 to `most` pixels or inputs.
template <int most>
using UpTo = std::make_integer_sequence<int, most>;

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_REGISTER_BLOCKS_H_
