// Checks the shapes of a call and turns them into a `Job`: how the work is divided into tiles,
// chunks of vectors and tasks.
#ifndef GROUPED_CONV_PLAN_H_
#define GROUPED_CONV_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "job.h"
#include "kernel_table.h"
#include "phases.h"

namespace grouped_conv {

enum class Contraction { kFprop, kDgrad, kWgrad };

// `inputs` and `outputs` are features per group, as in `Job`.
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
  bool has_unseen_taps = false;  // Taps that no result sees have a gradient of zero.
};

// Returns an empty string, or what is wrong with the request.
std::string Check(const Request& request);

// Plans a checked request, without the pointers to its arrays. Returns false if it needs too much
// memory.
bool MakePlan(const Request& request, const KernelTable& kernels, Plan* plan);

}  // namespace grouped_conv

#endif  // GROUPED_CONV_PLAN_H_
