// A request, computed: the plan is made, and its tasks shared with the threads of a pool.
#ifndef GROUPED_CONV_COMPUTE_H_
#define GROUPED_CONV_COMPUTE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "engines.h"
#include "parallel.h"
#include "plan.h"

namespace grouped_conv {

// Bytes, at the beginning of a cache line. (XLA offers calls on a CPU no allocator.)
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : data_(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment}))) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { ::operator delete(data_, std::align_val_t{kAlignment}); }
  char* data() const { return data_; }

 private:
  char* data_;
};

// A hint for memory that is going to be written, perhaps for the first time: with huge pages, where
// the system has some for who asks, it is there in a five hundredth of the page faults. These take
// longer than a depthwise convolution does. Only whole huge pages are asked for.
inline void AskForHugePages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Of bfloat16 not all convolutions can be computed in pairs or in tiles.
inline const Engine* BestEngine(const Request& r, Type type) {
  if (type == Type::kBfloat16) {
    bool is_sum = r.contraction == Contraction::kWgrad;
    // More than half of a tile, as wide as a vector, and a quarter of its depth or more are used.
    bool fits_tiles = !is_sum && r.outputs > 8 && r.inputs % 8 == 0;
    if (const Engine* tiles = EngineFor(Type::kBfloat16Tile); tiles && fits_tiles) return tiles;
    // Pairs of features must be whole; with one input, there is one product for each output.
    // Pairs of pixels must be, too: what stood in for the other one might be infinite.
    const Dimension& columns = r.dimensions[1];
    bool has_pairs = is_sum
                         ? r.inputs * r.outputs > 1 && columns.gaps == 1 && columns.results % 2 == 0
                         : r.inputs % 2 == 0;
    if (const Engine* pairs = EngineFor(Type::kBfloat16Pair); pairs && has_pairs) return pairs;
  }
  return EngineFor(type);
}

// The operands in the order of the contraction: input and kernel, gradient of the output and
// kernel, input and gradient of the output. Shapes are those of the request, which `Check` has
// passed. A pool is what `ParallelFor` takes. Throws std::bad_alloc.
template <class Pool>
void Compute(const Request& request, Type type, Pool& pool, const void* first, const void* second,
             void* result, int64_t result_bytes) {
  bool is_sum = request.contraction == Contraction::kWgrad;
  const Engine* engine = BestEngine(request, type);
  if (engine == nullptr) throw std::runtime_error("no kernels for this type");
  Plan plan;
  if (!MakePlan(request, *engine, &plan)) throw std::bad_alloc();
  Job& job = plan.job;
  Memory packed(plan.packed_bytes), scratch(plan.workers * job.scratch_bytes);
  job.operand = first;
  job.other = second;
  job.result = result;
  job.packed = packed.data();
  AskForHugePages(result, result_bytes);
  // A thread is not woken for less.
  constexpr int64_t kBytes = 64 << 10;
  int64_t workers = std::clamp<int64_t>(plan.packed_bytes / kBytes, 1, plan.workers);
  auto task = [&](auto function) {
    return [&, function](int64_t task, int64_t worker) {
      function(job, task, scratch.data() + worker * job.scratch_bytes);
    };
  };
  auto vector = [&](auto function) {
    return [&, function](int64_t vector, int64_t) { function(job, vector); };
  };
  if (is_sum) {
    ParallelFor(pool, plan.tasks, plan.workers, task(engine->sum_products));
    if (plan.leaves_out_taps) memset(result, 0, result_bytes);
    ParallelFor(pool, job.vectors, workers, vector(engine->unpack_weights));
  } else {
    ParallelFor(pool, job.vectors, workers, vector(engine->pack_weights));
    ParallelFor(pool, plan.tasks, plan.workers, task(engine->correlate));
  }
}

}  // namespace grouped_conv

#endif  // GROUPED_CONV_COMPUTE_H_
