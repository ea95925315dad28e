// Computes one call: plans it and shares its tasks with the threads of a pool.
#ifndef GROUPED_CONV_COMPUTE_H_
#define GROUPED_CONV_COMPUTE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "instruction_sets.h"
#include "parallel.h"
#include "plan.h"

namespace grouped_conv {

struct Free {
  void operator()(char* data) const { ::operator delete(data, std::align_val_t{kAlignment}); }
};

// Returns memory that begins at a cache line. XLA offers no allocator to calls on a CPU.
inline std::unique_ptr<char, Free> Allocate(int64_t bytes) {
  return {static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment})), Free{}};
}

// Asks for huge pages for memory that is about to be written, perhaps for the first time. They need
// 512 times fewer page faults, which otherwise take longer than a depthwise convolution. Systems
// without huge pages ignore it.
inline void AskForHugePages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Returns the fastest kernels for a request: for bfloat16 those that use AMX or pairs, if possible.
inline const KernelTable* BestKernels(const Request& r, ElementType type) {
  if (type == ElementType::kBfloat16) {
    bool is_sum = r.contraction == Contraction::kWgrad;
    // Groups must fill more than half of the 16 outputs and a quarter of the 32 inputs of AMX.
    bool fits_amx = !is_sum && r.outputs > 8 && r.inputs % 8 == 0;
    const KernelTable* amx = KernelsFor(ElementType::kBfloat16Amx);
    if (amx && fits_amx) return amx;
    // Pairs of inputs, or of pixels for the kernel's gradient, must be complete: a zero in place of
    // a missing number would be multiplied with a number that may be infinite. Depthwise
    // convolutions do not use pairs.
    const Dimension& columns = r.dimensions[1];
    bool has_pairs = r.inputs % 2 == 0;
    if (is_sum) {
      has_pairs = r.inputs * r.outputs > 1 && columns.gaps == 1 && columns.results % 2 == 0;
    }
    const KernelTable* pairs = KernelsFor(ElementType::kBfloat16Pair);
    if (pairs && has_pairs) return pairs;
  }
  return KernelsFor(type);
}

// Computes a request that `Check` has passed. The operands are in the order of the contraction:
// input and kernel, output's gradient and kernel, or input and output's gradient. `pool` is what
// `ParallelFor` takes. Throws std::bad_alloc.
template <class Pool>
void Compute(const Request& request, ElementType type, Pool& pool, const void* first,
             const void* second, void* result, int64_t result_bytes) {
  const KernelTable* kernels = BestKernels(request, type);
  if (kernels == nullptr) throw std::runtime_error("no kernels for this type");
  Plan plan;
  if (!MakePlan(request, *kernels, &plan)) throw std::bad_alloc();
  Job& job = plan.job;
  auto packed = Allocate(plan.packed_bytes);
  auto scratch = Allocate(plan.workers * job.scratch_bytes);
  job.operand = first;
  job.other = second;
  job.result = result;
  job.packed = packed.get();
  AskForHugePages(result, result_bytes);
  auto run_tasks = [&](auto function) {
    ParallelFor(pool, plan.tasks, plan.workers, [&](int64_t task, int64_t worker) {
      function(job, task, scratch.get() + worker * job.scratch_bytes);
    });
  };
  // Waking a thread takes longer than packing this many bytes of weights.
  constexpr int64_t kBytes = 64 << 10;
  int64_t workers = std::clamp<int64_t>(plan.packed_bytes / kBytes, 1, plan.workers);
  auto each_vector = [&](auto function) {
    ParallelFor(pool, job.vectors, workers,
                [&](int64_t vector, int64_t) { function(job, vector); });
  };
  if (request.contraction == Contraction::kWgrad) {
    run_tasks(kernels->sum_products);
    if (plan.has_unseen_taps) memset(result, 0, result_bytes);
    each_vector(kernels->unpack_weights);
  } else {
    each_vector(kernels->pack_weights);
    run_tasks(kernels->correlate);
  }
}

}  // namespace grouped_conv

#endif  // GROUPED_CONV_COMPUTE_H_
