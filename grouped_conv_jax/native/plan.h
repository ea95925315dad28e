// From shapes to a `Job`: everything that is checked, and how the work is cut up.
#ifndef GROUPED_CONV_PLAN_H_
#define GROUPED_CONV_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "job.h"

namespace grouped_conv {

enum class Contraction { kFprop, kDgrad, kWgrad };

// One spatial dimension of a correlation: result q reads through tap i the element
// (q * stride + i * dilation - low) / gaps of the operand, if that is a whole number.
struct Dimension {
  int64_t operand, results, taps, stride, dilation, gaps, low;
};

// The features of a group are those of the operand, and of the other end of the convolution.
struct Request {
  Contraction contraction;
  int64_t batch, groups, inputs, outputs;
  Dimension dimensions[2];
  int64_t threads;
};

struct Plan {
  Job job{};
  std::vector<Phase> phases[2];
  int64_t tasks = 0;
  int64_t workers = 0;
  int64_t packed_bytes = 0;
  bool leaves_out_taps = false;  // Some see no result: their gradient is zero.
};

// An empty string, or what is wrong with the request.
std::string Check(const Request& request);

// Of a request that has been checked; false if it would take more memory than there can be. The
// arrays are left to the caller.
bool MakePlan(const Request& request, const Engine& engine, Plan* plan);

}  // namespace grouped_conv

#endif  // GROUPED_CONV_PLAN_H_
