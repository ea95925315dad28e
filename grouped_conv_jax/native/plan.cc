#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <numeric>

namespace grouped_conv {
namespace {

// Of sizes, strides and offsets: products of two of them and sums of four such do not overflow.
constexpr int64_t kLargest = int64_t{1} << 30;

// Bytes that should stay in a core's own cache, with room for what passes through.
constexpr int64_t kWindowBytes = 256 << 10;
constexpr int64_t kWeightBytes = 256 << 10;

// What a worker can need is less, or the request is refused.
constexpr int64_t kMostBytes = int64_t{1} << 33;

// Of all slices of the kernel's gradient, if there are several: no more than this, and no more than
// the operands have as packed elements. XLA's own convolution copies its operands once, too.
constexpr int64_t kSumBytes = 32 << 20;

// A pixel is read in pieces of at least so many vectors, a row of so many columns.
constexpr int64_t kFewestVectors = 4;
constexpr int64_t kFewestColumns = 32, kManyColumns = 28;

// Of the gradient of the output, to be summed before sums are stored.
constexpr int64_t kPixels = 196;

// Tasks for each thread, so that none waits long for the others.
constexpr int64_t kTasksPerThread = 4;

int64_t Blocks(int64_t size, int64_t largest) { return (size + largest - 1) / largest; }

// The size of equal blocks, as large as `largest` at most.
int64_t Balanced(int64_t size, int64_t largest) {
  return Blocks(size, Blocks(size, std::max<int64_t>(largest, 1)));
}

// No more than kMostBytes, however much it is.
int64_t Product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product) || product > kMostBytes) {
      return kMostBytes;
    }
  }
  return product;
}

int64_t Aligned(int64_t bytes) { return Blocks(bytes, kAlignment) * kAlignment; }

bool IsPowerOfTwo(int64_t n) { return (n & (n - 1)) == 0; }

// The results' phases along a dimension; positions are those of the operand, not yet packed.
std::vector<Phase> PhasesOf(const Dimension& d) {
  int64_t period = d.gaps / std::gcd(d.stride, d.gaps);
  int64_t tap_step = d.gaps / std::gcd(std::abs(d.dilation), d.gaps);
  std::vector<Phase> phases;
  for (int64_t residue = 0; residue < std::min(period, d.results); residue++) {
    Phase phase{};
    phase.residue = residue;
    phase.period = period;
    phase.count = Blocks(d.results - residue, period);
    phase.step = period * d.stride / d.gaps;
    phase.gap = 1;
    auto start = [&](int64_t tap) { return residue * d.stride + tap * d.dilation - d.low; };
    while (phase.tap < std::min(tap_step, d.taps) && start(phase.tap) % d.gaps != 0) phase.tap++;
    if (phase.tap < std::min(tap_step, d.taps)) {
      phase.taps = (d.taps - 1 - phase.tap) / tap_step + 1;
      phase.tap_step = tap_step;
      phase.first = start(phase.tap) / d.gaps;
      phase.gap = tap_step * d.dilation / d.gaps;
      if (phase.gap < 0) {  // The kernel is turned round.
        phase.tap += (phase.taps - 1) * tap_step;
        phase.first += (phase.taps - 1) * phase.gap;
        phase.tap_step = -tap_step;
        phase.gap = -phase.gap;
      }
    }
    phases.push_back(phase);
  }
  return phases;
}

// With a kernel of one tap that reads each pixel once, all pixels are one long row.
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

Axis AxisOf(const Dimension& dimension, std::vector<Phase>* phases) {
  *phases = PhasesOf(dimension);
  Axis axis{};
  axis.operand = dimension.operand;
  axis.results = dimension.results;
  axis.phases = phases->data();
  axis.phase_count = static_cast<int64_t>(phases->size());
  // As few positions as all phases read between them.
  bool reads = false;
  for (const Phase& phase : *phases) {
    if (phase.taps == 0) continue;
    axis.low = reads ? std::min(axis.low, phase.first) : phase.first;
    reads = true;
  }
  axis.grain = (*phases)[0].step;
  for (const Phase& phase : *phases) {
    if (phase.taps == 0) continue;
    axis.grain = std::gcd(axis.grain, phase.first - axis.low);
    if (phase.taps > 1) axis.grain = std::gcd(axis.grain, phase.gap);
  }
  axis.step = (*phases)[0].step / axis.grain;
  axis.span = 1;
  for (Phase& phase : *phases) {
    phase.step = axis.step;
    phase.first = phase.taps > 0 ? (phase.first - axis.low) / axis.grain : 0;
    phase.gap = phase.taps > 1 ? phase.gap / axis.grain : 1;
    if (phase.taps > 0) {
      axis.span = std::max(axis.span, phase.first + (phase.taps - 1) * phase.gap + 1);
    }
  }
  return axis;
}

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

bool MakePlan(const Request& request, const Engine& engine, Plan* plan) {
  Request r = Flattened(request);
  Job& job = plan->job;
  bool is_sum = r.contraction == Contraction::kWgrad;
  job.batch = r.batch;
  job.groups = r.groups;
  job.inputs = r.inputs;
  job.outputs = r.outputs;
  job.taps = 1;
  for (int i = 0; i < 2; i++) {
    job.axes[i] = AxisOf(r.dimensions[i], &plan->phases[i]);
    int64_t taps = 0;
    for (const Phase& phase : plan->phases[i]) taps += phase.taps;
    job.taps *= taps;
    plan->leaves_out_taps |= taps < r.dimensions[i].taps;
  }

  // The kernel is (rows, columns, features, groups x features), its last the forward outputs.
  bool is_forward = r.contraction != Contraction::kDgrad;
  int64_t last = r.groups * (is_forward ? r.outputs : r.inputs);
  int64_t tap = last * (is_forward ? r.inputs : r.outputs);
  job.tap_strides[0] = tap * r.dimensions[1].taps;
  job.tap_strides[1] = tap;
  job.input_stride = is_forward ? last : 1;
  job.output_stride = is_forward ? 1 : last;
  job.group_stride = is_forward ? r.outputs : r.inputs;

  // Vectors.
  job.lanes = engine.lanes;
  int64_t pair = is_sum ? 1 : engine.pair;
  job.groups_in_vector = std::clamp<int64_t>(job.lanes / job.outputs, 1, job.groups);
  job.vectors_in_group = 1;
  job.terms = job.inputs / pair;
  if (job.groups_in_vector == 1) {
    job.mode = Mode::kBroadcast;
    job.vectors_in_group = Blocks(job.outputs, job.lanes);
    job.unit = job.terms;
  } else if (job.inputs == job.outputs && IsPowerOfTwo(job.outputs) &&
             job.outputs <= engine.largest_rotation) {
    job.mode = Mode::kRotate;
    job.unit = job.lanes;
  } else {
    job.mode = Mode::kSpread;
    job.unit = job.terms * job.lanes;
  }
  job.vectors = job.mode == Mode::kBroadcast ? job.groups * job.vectors_in_group
                                             : Blocks(job.groups, job.groups_in_vector);

  // Packed bytes of the window (and of the output's gradient) for `rows` x `columns` results.
  int64_t rows = 1;
  auto packed = [&](int64_t vectors, int64_t rows, int64_t columns) {
    int64_t sources = Blocks(vectors, job.vectors_in_group);
    int64_t lines = job.axes[0].positions(rows);
    // Of a chunk that has fewer sources a pixel may be larger: see `pixel_size`.
    int64_t pixel = sources * job.unit + kAlignment / engine.element_bytes;
    int64_t bytes = Product({lines, job.axes[1].positions(columns), pixel, engine.element_bytes});
    if (is_sum) {
      bytes +=
          Product({vectors, rows, Blocks(columns, engine.pair), job.lanes, engine.element_bytes});
    }
    // Of up to three windows.
    bytes += Product({3, lines, static_cast<int64_t>(sizeof(int64_t))});
    return std::min(Aligned(bytes + 8 * kAlignment), kMostBytes);
  };
  int64_t vector_bytes = std::max<int64_t>(job.vector_size() * engine.element_bytes, 1);
  int64_t all_rows = job.axes[0].phases[0].count, all_columns = job.axes[1].phases[0].count;
  auto whole = [&](int64_t vectors) {  // Groups, or equal parts of one.
    if (vectors >= job.vectors_in_group) {
      return vectors / job.vectors_in_group * job.vectors_in_group;
    }
    int64_t blocks = Blocks(job.vectors_in_group, engine.vectors_at_once);
    int64_t together = std::max<int64_t>(vectors / engine.vectors_at_once, 1);
    return std::min(Balanced(blocks, together) * engine.vectors_at_once, job.vectors_in_group);
  };
  // Long rows use each weight so often that it may come from afar.
  int64_t columns = all_columns;
  bool stays = !is_sum && columns >= kManyColumns;
  job.chunk = whole(std::clamp<int64_t>(kWeightBytes / vector_bytes, 1, job.vectors));
  if (stays) job.chunk = job.vectors;
  // All features of a pixel if possible: they are one after the other in memory.
  while (packed(job.chunk, 1, columns) > kWindowBytes) {
    bool has_groups = job.chunk > std::max(job.vectors_in_group, kFewestVectors);
    if (has_groups && whole(job.chunk / 2) < job.chunk) {
      job.chunk = whole(job.chunk / 2);
    } else if (columns > kFewestColumns) {
      columns = Blocks(columns, 2);
    } else {
      break;
    }
  }
  // Sums stay longer in registers if several rows are summed together.
  if (is_sum) {
    rows = std::clamp<int64_t>(kPixels / columns, 1, all_rows);
    while (rows > 1 && packed(job.chunk, rows, columns) > kWindowBytes) rows = Blocks(rows, 2);
  }
  // Two short rows use each weight twice as often, if all rows between them are read as well.
  int64_t in_row = all_columns * job.vectors_in_group;
  bool is_short = engine.tile_rows > 0
                      ? all_columns <= engine.tile_rows
                      : job.vectors_in_group <= 2 && 2 * in_row <= engine.sums_at_once;
  bool touch = job.axes[0].step <= job.axes[0].span;
  if (!is_sum && job.mode == Mode::kBroadcast && is_short && touch)
    rows = std::min<int64_t>(2, all_rows);
  job.rows_at_once = rows;
  auto chunks = [&] {
    return job.chunk < job.vectors_in_group ? job.groups * Blocks(job.vectors_in_group, job.chunk)
                                            : Blocks(job.vectors, job.chunk);
  };
  auto count = [&](int64_t tile) {
    return job.batch * Blocks(all_rows, tile) * Blocks(all_columns, columns) * chunks();
  };
  int64_t wanted = r.threads > 1 ? kTasksPerThread * r.threads : 1;
  // Tiles begin with rows that the one before has packed as well.
  int64_t tile = all_rows, least = std::max<int64_t>(rows, 4);
  while (tile > least && count(tile) < wanted) tile = Blocks(tile, 2);
  while (columns > 64 && count(tile) < wanted) columns = Blocks(columns, 2);
  while (job.chunk > kFewestVectors && count(tile) < wanted) {
    int64_t smaller = whole(job.chunk / 2);
    if (smaller == job.chunk) break;
    job.chunk = smaller;
  }
  job.axes[0].tile = Balanced(all_rows, tile);
  job.axes[0].tiles = Blocks(all_rows, job.axes[0].tile);
  job.axes[1].tile = Balanced(all_columns, columns);
  // Pairs of pixels do not go from one tile to the next.
  if (job.axes[1].tile < all_columns && job.axes[1].tile % 2) job.axes[1].tile++;
  job.axes[1].tiles = Blocks(all_columns, job.axes[1].tile);
  job.chunks = chunks();
  job.chunks_first = job.vectors * vector_bytes > 2 * kWeightBytes;
  int64_t tiles = job.batch * job.axes[0].tiles * job.axes[1].tiles;
  const Dimension &first = r.dimensions[0], &second = r.dimensions[1];
  int64_t operands =
      Product({r.batch, r.groups, r.inputs, first.operand, second.operand, engine.element_bytes}) +
      Product({r.batch, r.groups, r.outputs, first.results, second.results, engine.element_bytes});
  int64_t most = std::max<int64_t>(std::min(kSumBytes, operands) / (job.vectors * vector_bytes), 1);
  job.slices =
      is_sum ? std::clamp<int64_t>(Blocks(wanted, job.chunks), 1, std::min(tiles, most)) : 1;
  plan->tasks = job.chunks * (is_sum ? job.slices : tiles);
  plan->workers = std::min(r.threads, plan->tasks);
  job.scratch_bytes = packed(job.chunk, job.rows_at_once, job.axes[1].tile);
  plan->packed_bytes = Aligned(Product({job.slices, job.vectors, vector_bytes}));
  return job.scratch_bytes < kMostBytes && plan->packed_bytes < kMostBytes;
}

}  // namespace grouped_conv
