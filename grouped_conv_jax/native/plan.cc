// The checks and the plan of a call (see plan.h).
#include "plan.h"

#include <algorithm>
#include <initializer_list>

namespace grouped_conv {
namespace {

// Sizes, strides and offsets are smaller than this: sums of four products of two do not overflow.
constexpr int64_t kLargest = int64_t{1} << 30;

// The bytes of a window, and of a chunk's weights, that leave room in a core's own cache.
constexpr int64_t kWindowBytes = 256 << 10;
constexpr int64_t kWeightBytes = 256 << 10;

// A call that needs this much for a worker or for packed weights is refused.
constexpr int64_t kMostBytes = int64_t{1} << 33;

// The slices of the kernel's gradient take together no more than this, and no more than the packed
// operands would. XLA's own convolution copies its operands once, too.
constexpr int64_t kSumBytes = 32 << 20;

// A chunk is not divided below so many vectors, and a row not below so many columns.
constexpr int64_t kFewestVectors = 4;
constexpr int64_t kFewestColumns = 32;

// Rows of this length use each weight so often that the weights need not stay in a core's cache.
constexpr int64_t kManyColumns = 28;

// Pixels of the output's gradient that are summed before the sums are stored.
constexpr int64_t kPixels = 196;

// Tasks for each thread, so that no thread waits long for the others.
constexpr int64_t kTasksPerThread = 4;

// Returns the product, or kMostBytes if it is larger.
int64_t Product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product) || product > kMostBytes) {
      return kMostBytes;
    }
  }
  return product;
}

// Returns the request with all pixels in one long row, if its single tap reads each pixel once.
Request Flattened(Request r) {
  int64_t pixels = r.batch;
  for (const Dimension& d : r.dimensions) {
    bool reads_each = d.operand == d.results && d.taps == 1 && d.stride == 1 && d.gaps == 1;
    if (!reads_each || d.low != 0 || pixels > kLargest / d.operand) return r;
    pixels *= d.operand;
  }
  r.batch = 1;
  r.dimensions[0].operand = r.dimensions[0].results = 1;
  r.dimensions[1].operand = r.dimensions[1].results = pixels;
  return r;
}

// Fills in a plan step by step. Each step uses what the steps before it have decided.
class Planner {
 public:
  Planner(const Request& request, const KernelTable& kernels, Plan* plan)
      : r_(Flattened(request)),
        is_sum_(request.contraction == Contraction::kWgrad),
        kernels_(kernels),
        plan_(*plan),
        job_(plan->job) {
    job_.batch = r_.batch;
    job_.groups = r_.groups;
    job_.inputs = r_.inputs;
    job_.outputs = r_.outputs;
  }

  bool Make() {
    SetAxes();
    SetKernelStrides();
    SetLayout();
    all_rows_ = job_.axes[0].phases[0].count;
    all_columns_ = job_.axes[1].phases[0].count;
    vector_bytes_ = std::max<int64_t>(job_.vector_size() * kernels_.element_bytes, 1);
    FitWindow();
    SetRowsAtOnce();
    DivideAmongThreads();
    SetTasks();
    job_.scratch_bytes = WindowBytes(job_.chunk, job_.rows_at_once, job_.axes[1].tile);
    plan_.packed_bytes = Aligned(Product({job_.slices, job_.vectors, vector_bytes_}));
    return job_.scratch_bytes < kMostBytes && plan_.packed_bytes < kMostBytes;
  }

 private:
  void SetAxes() {
    job_.taps = 1;
    for (int i = 0; i < 2; i++) {
      job_.axes[i] = AxisOf(r_.dimensions[i], &plan_.phases[i]);
      int64_t taps = 0;
      for (const Phase& phase : plan_.phases[i]) taps += phase.taps;
      job_.taps *= taps;
      plan_.has_unseen_taps |= taps < r_.dimensions[i].taps;
    }
  }

  // The kernel is (rows, columns, features, groups x features); the last are the forward outputs.
  void SetKernelStrides() {
    bool is_forward = r_.contraction != Contraction::kDgrad;
    int64_t last = r_.groups * (is_forward ? r_.outputs : r_.inputs);
    int64_t tap = last * (is_forward ? r_.inputs : r_.outputs);
    job_.tap_strides[0] = tap * r_.dimensions[1].taps;
    job_.tap_strides[1] = tap;
    job_.input_stride = is_forward ? last : 1;
    job_.output_stride = is_forward ? 1 : last;
    job_.group_stride = is_forward ? r_.outputs : r_.inputs;
  }

  // Chooses how groups lie in vectors.
  void SetLayout() {
    // The kernel's gradient sums over pixels, so its pairs are pairs of pixels, not of inputs.
    job_.terms = job_.inputs / (is_sum_ ? 1 : kernels_.pair);
    job_.lanes = kernels_.lanes;
    job_.groups_in_vector = std::clamp<int64_t>(job_.lanes / job_.outputs, 1, job_.groups);
    job_.vectors_in_group = 1;
    job_.vectors = CeilDiv(job_.groups, job_.groups_in_vector);
    if (job_.groups_in_vector == 1) {
      job_.layout = Layout::kBroadcast;
      job_.vectors_in_group = CeilDiv(job_.outputs, job_.lanes);
      job_.vectors = job_.groups * job_.vectors_in_group;
      job_.panel_size = job_.terms;
    } else if (job_.inputs == job_.outputs && __builtin_popcountll(job_.outputs) == 1 &&
               job_.outputs <= kernels_.largest_rotation) {
      job_.layout = Layout::kRotate;
      job_.panel_size = job_.lanes;
    } else {
      job_.layout = Layout::kSpread;
      job_.panel_size = job_.terms * job_.lanes;
    }
  }

  // Returns the bytes of the windows, and of the packed output's gradient, for a chunk of `vectors`
  // and `rows` x `columns` results.
  int64_t WindowBytes(int64_t vectors, int64_t rows, int64_t columns) const {
    int64_t panels = CeilDiv(vectors, job_.vectors_in_group);
    int64_t lines = job_.axes[0].positions(rows);
    // A smaller chunk may have a larger pixel (see `pixel_size`), so room for that is always added.
    int64_t pixel = panels * job_.panel_size + kAlignment / kernels_.element_bytes;
    int64_t bytes =
        Product({lines, job_.axes[1].positions(columns), pixel, kernels_.element_bytes});
    if (is_sum_) {
      bytes += Product(
          {vectors, rows, CeilDiv(columns, kernels_.pair), job_.lanes, kernels_.element_bytes});
    }
    // Three windows have a table of lines each. They and their arrays are aligned.
    bytes += Product({3, lines, static_cast<int64_t>(sizeof(int64_t))});
    return std::min(Aligned(bytes + 8 * kAlignment), kMostBytes);
  }

  // Returns about `vectors`, but whole groups, or one of the equal parts of a group. A part is a
  // multiple of the vectors that a register kernel computes together.
  int64_t WholeGroups(int64_t vectors) const {
    if (vectors >= job_.vectors_in_group) {
      return vectors / job_.vectors_in_group * job_.vectors_in_group;
    }
    int64_t blocks = CeilDiv(job_.vectors_in_group, kernels_.vectors_at_once);
    int64_t together = std::max<int64_t>(vectors / kernels_.vectors_at_once, 1);
    return std::min(Balanced(blocks, together) * kernels_.vectors_at_once, job_.vectors_in_group);
  }

  // Chooses the chunk and the columns of a tile so that a window of one row of results stays in the
  // cache. The features of a pixel follow each other in memory, so chunks keep kFewestVectors.
  void FitWindow() {
    columns_ = all_columns_;
    bool weights_may_leave_cache = !is_sum_ && columns_ >= kManyColumns;
    job_.chunk =
        weights_may_leave_cache
            ? job_.vectors
            : WholeGroups(std::clamp<int64_t>(kWeightBytes / vector_bytes_, 1, job_.vectors));
    while (WindowBytes(job_.chunk, 1, columns_) > kWindowBytes) {
      bool has_groups = job_.chunk > std::max(job_.vectors_in_group, kFewestVectors);
      if (has_groups && WholeGroups(job_.chunk / 2) < job_.chunk) {
        job_.chunk = WholeGroups(job_.chunk / 2);
      } else if (columns_ > kFewestColumns) {
        columns_ = CeilDiv(columns_, 2);
      } else {
        break;
      }
    }
  }

  // Chooses the rows of results that are computed together.
  void SetRowsAtOnce() {
    job_.rows_at_once = 1;
    if (is_sum_) {
      // Sums stay longer in registers if several rows are summed together.
      int64_t rows = std::clamp<int64_t>(kPixels / columns_, 1, all_rows_);
      while (rows > 1 && WindowBytes(job_.chunk, rows, columns_) > kWindowBytes) {
        rows = CeilDiv(rows, 2);
      }
      job_.rows_at_once = rows;
      return;
    }
    // Two short rows use each weight twice as often. Their windows must touch: rows between them
    // that no result reads would be packed for nothing.
    int64_t sums = 2 * all_columns_ * job_.vectors_in_group;
    bool is_short = kernels_.amx_rows > 0
                        ? all_columns_ <= kernels_.amx_rows
                        : job_.vectors_in_group <= 2 && sums <= kernels_.sums_at_once;
    bool windows_touch = job_.axes[0].step <= job_.axes[0].span;
    if (job_.layout == Layout::kBroadcast && is_short && windows_touch) {
      job_.rows_at_once = std::min<int64_t>(2, all_rows_);
    }
  }

  int64_t Chunks() const {
    return job_.chunk < job_.vectors_in_group
               ? job_.groups * CeilDiv(job_.vectors_in_group, job_.chunk)
               : CeilDiv(job_.vectors, job_.chunk);
  }

  // Makes tiles and chunks smaller until there are tasks for all threads. Every tile packs some
  // rows of the tile above it again (its halo), so it keeps at least four rows of results.
  void DivideAmongThreads() {
    wanted_ = r_.threads > 1 ? kTasksPerThread * r_.threads : 1;
    int64_t rows = all_rows_, fewest_rows = std::max<int64_t>(job_.rows_at_once, 4);
    auto too_few = [&] {
      return job_.batch * CeilDiv(all_rows_, rows) * CeilDiv(all_columns_, columns_) * Chunks() <
             wanted_;
    };
    while (rows > fewest_rows && too_few()) rows = CeilDiv(rows, 2);
    while (columns_ > 2 * kFewestColumns && too_few()) columns_ = CeilDiv(columns_, 2);
    while (job_.chunk > kFewestVectors && too_few()) {
      int64_t smaller = WholeGroups(job_.chunk / 2);
      if (smaller == job_.chunk) break;
      job_.chunk = smaller;
    }
    job_.axes[0].tile = Balanced(all_rows_, rows);
    job_.axes[1].tile = Balanced(all_columns_, columns_);
    // Both pixels of a pair are in the same tile.
    if (job_.axes[1].tile < all_columns_ && job_.axes[1].tile % 2) job_.axes[1].tile++;
  }

  void SetTasks() {
    job_.axes[0].tiles = CeilDiv(all_rows_, job_.axes[0].tile);
    job_.axes[1].tiles = CeilDiv(all_columns_, job_.axes[1].tile);
    job_.chunks = Chunks();
    // If the weights do not fit in the cache, tasks that follow each other share a chunk of them.
    job_.chunks_first = job_.vectors * vector_bytes_ > 2 * kWeightBytes;
    int64_t tiles = job_.batch * job_.axes[0].tiles * job_.axes[1].tiles;
    job_.slices = 1;
    if (is_sum_) {
      const Dimension &rows = r_.dimensions[0], &columns = r_.dimensions[1];
      int64_t operands = Product({r_.batch, r_.groups, r_.inputs, rows.operand, columns.operand,
                                  kernels_.element_bytes}) +
                         Product({r_.batch, r_.groups, r_.outputs, rows.results, columns.results,
                                  kernels_.element_bytes});
      int64_t slice_bytes = job_.vectors * vector_bytes_;
      int64_t most = std::max<int64_t>(std::min(kSumBytes, operands) / slice_bytes, 1);
      job_.slices = std::clamp<int64_t>(CeilDiv(wanted_, job_.chunks), 1, std::min(tiles, most));
    }
    plan_.tasks = job_.chunks * (is_sum_ ? job_.slices : tiles);
    plan_.workers = std::min(r_.threads, plan_.tasks);
  }

  const Request r_;
  const bool is_sum_;
  const KernelTable& kernels_;
  Plan& plan_;
  Job& job_;
  int64_t all_rows_ = 0, all_columns_ = 0;  // Results of the largest phase.
  int64_t vector_bytes_ = 0;                // Of the packed weights of a vector.
  int64_t columns_ = 0;                     // Results in a row of a tile, at most.
  int64_t wanted_ = 0;                      // Tasks.
};

}  // namespace

std::string Check(const Request& r) {
  auto within = [](int64_t n, int64_t least) { return least <= n && n < kLargest; };
  if (!within(r.batch, 1) || !within(r.groups, 1) || !within(r.inputs, 1) ||
      !within(r.outputs, 1) || !within(r.threads, 1)) {
    return "batch, groups and features must be from 1 to 2^30";
  }
  for (const Dimension& d : r.dimensions) {
    if (!within(d.operand, 1) || !within(d.results, 1) || !within(d.taps, 1) ||
        !within(d.stride, 1) || !within(d.gaps, 1) || !within(d.dilation, 1 - kLargest) ||
        d.dilation == 0 || !within(d.low, 1 - kLargest)) {
      return "spatial sizes, strides, dilations and padding must be from 1 to 2^30";
    }
  }
  return "";
}

bool MakePlan(const Request& request, const KernelTable& kernels, Plan* plan) {
  return Planner(request, kernels, plan).Make();
}

}  // namespace grouped_conv
