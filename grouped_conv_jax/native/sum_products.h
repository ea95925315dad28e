// The kernel's gradient: one task sums products over a slice of the tiles, for a chunk of vectors.
#ifndef GROUPED_CONV_SUM_PRODUCTS_H_
#define GROUPED_CONV_SUM_PRODUCTS_H_

#include "job.h"
#include "register_blocks.h"
#include "register_kernels.h"
#include "window.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

template <class Policy>
using ProductsKernel = void (*)(const ProductArguments<Policy>&);

// How many inputs of a run one kernel sums. 16 float32 inputs are a whole panel of kRotate.
constexpr int MostInputs(int64_t vectors) {
  return vectors == 1 ? (kRegisters == 32 ? 16 : 12) : kMostSums / static_cast<int>(vectors);
}

// Short runs leave registers free, so one kernel sums three rows of taps at once.
constexpr int kTapRows = 3, kInputsOfRows = kMostSums / 2 / kTapRows;

// The functions below pick the register kernel for a number of rows or columns of taps, of inputs
// and of vectors (see register_kernels.h).

template <class Policy, bool is_scalar, int tap_rows, int vectors, int... inputs>
ProductsKernel<Policy> PickSums(int64_t count, std::integer_sequence<int, inputs...>) {
  static constexpr ProductsKernel<Policy> kernels[] = {
      SumRuns<Policy, is_scalar, tap_rows, inputs + 1, vectors>...};
  return kernels[count - 1];
}

template <class Policy, bool is_scalar>
ProductsKernel<Policy> PickSums(int64_t tap_rows, int64_t inputs) {
  if (tap_rows == 1) return PickSums<Policy, is_scalar, 1, 1>(inputs, UpTo<MostInputs(1)>{});
  return PickSums<Policy, is_scalar, kTapRows, 1>(inputs, UpTo<kInputsOfRows>{});
}

template <class Policy, int width>
ProductsKernel<Policy> PickRotatedSums(int64_t taps) {
  if constexpr (width * 2 <= kLanes<Policy>) {
    if (taps == 3 && width * 4 <= kRegisters) return SumRotations<Policy, width, 3>;
    return SumRotations<Policy, width, 1>;
  }
  return nullptr;
}

template <class Policy>
ProductsKernel<Policy> PickProducts(const Job& job, int64_t tap_rows, int64_t taps, int64_t inputs,
                                    int64_t vectors) {
  if (job.layout == Layout::kBroadcast) {
    constexpr int most = kMostVectors;
    if (vectors == 1) return PickSums<Policy, true>(tap_rows, inputs);
    if (vectors == 2) return PickSums<Policy, true, 1, 2>(inputs, UpTo<MostInputs(2)>{});
    return PickSums<Policy, true, 1, most>(inputs, UpTo<MostInputs(most)>{});
  }
  if (job.layout == Layout::kSpread || job.outputs == 1) {
    return PickSums<Policy, false>(tap_rows, inputs);
  }
  if (job.outputs == 2) return PickRotatedSums<Policy, 2>(taps);
  if (job.outputs == 4) return PickRotatedSums<Policy, 4>(taps);
  return PickRotatedSums<Policy, 8>(taps);
}

// Returns whether both operands are read in place. Each kernel call reads them again for its few
// sums, so that pays for depthwise kernels of few taps only.
template <class Policy>
bool SumsInPlace(const Job& job) {
  return IsCopy<Policy>(job) && job.outputs == 1 && job.taps <= kMostSums / 2;
}

// Some rows of the output's gradient, packed as [rows, columns, vectors, lanes] or read in place.
template <class Policy>
class OutputGradient {
 public:
  using Stored = typename Policy::Stored;
  using Element = typename Policy::Element;

  OutputGradient(const Job& job, int64_t image, Span vectors, char* scratch)
      : job_(job),
        vectors_(vectors),
        packed_(reinterpret_cast<Element*>(scratch)),
        all_outputs_(job.groups * job.outputs),
        image_(static_cast<const Stored*>(job.other) +
               image * job.axes[0].results * job.axes[1].results * all_outputs_) {}

  // Moves to the results of a phase in some rows and columns.
  void MoveTo(const Phase2d& phase, Span rows, Span columns) {
    const Phase &p = phase.rows, &q = phase.columns;
    const int64_t row = job_.axes[1].results * all_outputs_;
    const Stored* first = image_ + (p.residue + rows.begin * p.period) * row;
    columns_ = CeilDiv(columns.size(), Policy::pair);
    if constexpr (std::is_same_v<Element, Stored>) {
      if (SumsInPlace<Policy>(job_)) {
        base_ = first + (q.residue + columns.begin * q.period) * all_outputs_ +
                job_.first_output(vectors_.begin);
        pixel_size_ = q.period * all_outputs_;
        row_size_ = p.period * row;
        return;
      }
    }
    base_ = packed_;
    pixel_size_ = vectors_.size() * kLanes<Policy>;
    row_size_ = columns_ * pixel_size_;
    for (int64_t r = 0; r < rows.size(); r++) {
      Pack(first + r * p.period * row, q, columns.begin, packed_ + r * row_size_);
    }
  }

  int64_t columns() const { return columns_; }
  // Returns the elements from column to column, and from row to row.
  int64_t pixel_size() const { return pixel_size_; }
  int64_t row_size() const { return row_size_; }
  const Element* of(int64_t vector) const {
    return base_ + (vector - vectors_.begin) * kLanes<Policy>;
  }

 private:
  // Packs a row from result `begin` of the phase on. A pixel has one panel for each vector.
  void Pack(const Stored* line, const Phase& q, int64_t begin, Element* to) const {
    constexpr int64_t lanes = kLanes<Policy>, pair = Policy::pair;
    Positions positions{q.residue + begin * q.period, q.period * pair, columns_,
                        job_.axes[1].results};
    // All vectors are packed at once if their outputs are evenly spaced. If groups have 12 outputs
    // in two vectors of 8 lanes, the vectors begin at outputs 0, 8, 12, 20: one by one.
    bool is_wide = job_.layout == Layout::kBroadcast;
    bool is_even = job_.outputs % lanes == 0 || !is_wide;
    int64_t step = is_even ? vectors_.size() : 1;
    for (int64_t v = vectors_.begin; v < vectors_.end; v += step) {
      int64_t features = job_.groups_in_vector * job_.outputs;
      if (is_wide) features = is_even ? lanes : job_.valid_lanes(v);
      Panels panels{job_.first_output(v), features, step, all_outputs_};
      PackedRow<Policy> row{to + (v - vectors_.begin) * lanes, lanes, pixel_size_};
      PackRow<Policy>(line, positions, panels, pair == 2 ? q.period : 0, row, PackLanes<Policy>());
    }
  }

  const Job& job_;
  Span vectors_;
  Element* packed_;
  int64_t all_outputs_;
  const Stored* image_;
  const Element* base_ = nullptr;
  int64_t columns_ = 0, pixel_size_ = 0, row_size_ = 0;
};

// Adds products to the sums of one slice.
template <class Policy>
class ProductSummer {
 public:
  using Kernels = typename Policy::Kernels;

  ProductSummer(const Job& job, int64_t slice, Span vectors)
      : job_(job),
        vectors_(vectors),
        rotates_(job.layout == Layout::kRotate && job.outputs > 1),
        sums_(static_cast<Number<Policy>*>(job.packed) + slice * job.vectors * job.vector_size()) {
    memset(sums_ + vectors.begin * job.vector_size(), 0,
           vectors.size() * job.vector_size() * sizeof(*sums_));
  }

  // Adds the products of all taps of a phase with some rows of the output's gradient.
  INLINE void Add(const Window<Policy>& window, const Phase2d& phase, Span rows,
                  const OutputGradient<Policy>& gradient) {
    const Phase &p = phase.rows, &q = phase.columns;
    constexpr int64_t lanes = kLanes<Policy>;
    arguments_.columns = gradient.columns();
    arguments_.line_step = p.step;
    arguments_.line_gap = p.gap;
    arguments_.column_step = Policy::pair * q.step * window.pixel_size();
    arguments_.column_gap = q.gap * window.pixel_size();
    arguments_.other_row = gradient.row_size();
    arguments_.other_column = gradient.pixel_size();
    arguments_.sums_column = job_.terms * lanes;
    arguments_.sums_row = q.taps * arguments_.sums_column;
    arguments_.sums_vector = job_.vector_size();
    // The inputs of a run are evenly spaced. If there is one input, or if pixels follow each other
    // without gaps, all columns of taps are one run.
    bool is_scalar = job_.layout == Layout::kBroadcast;
    bool has_one_input = !is_scalar && job_.terms == 1;
    bool joins_columns = !rotates_ && (has_one_input || arguments_.column_gap == job_.panel_size);
    arguments_.input_step = is_scalar ? 1 : has_one_input ? arguments_.column_gap : lanes;
    int64_t run = joins_columns ? q.taps * job_.terms : job_.terms;
    int64_t tap_columns = joins_columns ? 1 : q.taps;
    for (int64_t v = vectors_.begin, together; v < vectors_.end; v += together) {
      together = Together<Policy>(job_, vectors_, v);
      for (int64_t i = 0, tap_rows; i < p.taps; i += tap_rows) {
        bool is_short = !rotates_ && together == 1 && run <= kInputsOfRows;
        tap_rows = is_short && p.taps - i >= kTapRows ? kTapRows : 1;
        // Rows of zeros need no sums, if no other row of taps is summed with them.
        Span inside = tap_rows == 1 ? RowsInside(p, rows, i) : Span{0, rows.size()};
        if (inside.size() == 0) continue;
        arguments_.rows = inside.size();
        arguments_.lines = window.lines() + p.first + i * p.gap + inside.begin * p.step;
        arguments_.other = gradient.of(v) + inside.begin * gradient.row_size();
        const auto* operand = window.panel(v) + q.first * window.pixel_size();
        Number<Policy>* sums =
            sums_ + v * job_.vector_size() + phase.offset + i * arguments_.sums_row;
        AddTapRows(operand, sums, tap_rows, tap_columns, run, together);
      }
    }
  }

 private:
  // Returns which of the rows see a row inside the image through row `tap` of the taps.
  INLINE Span RowsInside(const Phase& p, Span rows, int64_t tap) const {
    const Axis& axis = job_.axes[0];
    int64_t first = p.first + tap * p.gap + rows.begin * p.step;
    return Inside(axis.low + first * axis.grain, p.step * axis.grain, rows.size(), axis.operand);
  }

  // Adds the products of some rows of taps: all columns of taps and all inputs of a run.
  INLINE void AddTapRows(const typename Policy::Element* operand, Number<Policy>* sums,
                         int64_t tap_rows, int64_t tap_columns, int64_t run, int64_t vectors) {
    for (int64_t j = 0, taps; j < tap_columns; j += taps) {
      taps = rotates_ && tap_columns - j >= 3 && job_.outputs * 4 <= kRegisters ? 3 : 1;
      for (int64_t k = 0, inputs; k < run; k += inputs) {
        inputs = rotates_ ? run : Balanced(run - k, MostInputs(vectors));
        arguments_.operand = operand + j * arguments_.column_gap + k * arguments_.input_step;
        arguments_.sums = sums + j * arguments_.sums_column + k * kLanes<Policy>;
        PickProducts<Kernels>(job_, tap_rows, taps, inputs, vectors)(arguments_);
      }
    }
  }

  const Job& job_;
  Span vectors_;
  bool rotates_;
  Number<Policy>* sums_;
  ProductArguments<Kernels> arguments_;
};

// Adds the products of some rows of a tile.
template <class Policy>
void AddTile(const Job& job, const Tile& tile, Span vectors, bool in_place, char* scratch,
             ProductSummer<Policy>& summer) {
  const Axis& axis = job.axes[1];
  ColumnParts parts = SplitColumns(axis, tile.columns, in_place, 1);
  Windows<Policy> windows(job, tile, vectors, parts, Policy::pair == 2 ? axis.step * axis.grain : 0,
                          &scratch);
  OutputGradient<Policy> gradient(job, tile.image, vectors, scratch);
  windows.MoveDown(
      [&](const Window<Policy>& window, const Phase2d& phase, Span rows, Span columns) {
        if (phase.rows.taps * phase.columns.taps == 0) return;
        gradient.MoveTo(phase, rows, columns);
        summer.Add(window, phase, rows, gradient);
      });
}

// Computes task `number`: the sums of one slice of the tiles, for the vectors of one chunk.
template <class Policy>
void SumProducts(const Job& job, int64_t number, void* scratch) {
  const Axis& axis = job.axes[0];
  int64_t tiles = job.batch * axis.tiles * job.axes[1].tiles;
  int64_t slice = number / job.chunks;
  Span vectors = ChunkSpan(job, number % job.chunks);
  ProductSummer<Policy> summer(job, slice, vectors);
  // Whether the window of row j of the results is inside the image.
  auto is_inside = [&](int64_t j) {
    int64_t first = axis.low + j * axis.step * axis.grain;
    return 0 <= first && first + (job.window_rows() - 1) * axis.grain < axis.operand;
  };
  for (int64_t i = slice * tiles / job.slices; i < (slice + 1) * tiles / job.slices; i++) {
    Tile tile = TileAt(job, i);
    // Rows that read zeros above or below the image cannot be read in place.
    for (int64_t j = tile.rows.begin, next; j < tile.rows.end; j = next) {
      bool inside = is_inside(j);
      next = j;
      while (next < tile.rows.end && is_inside(next) == inside) next += job.rows_at_once;
      Tile part{tile.image, {j, Smaller(next, tile.rows.end)}, tile.columns};
      AddTile(job, part, vectors, inside && SumsInPlace<Policy>(job), static_cast<char*>(scratch),
              summer);
    }
  }
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_SUM_PRODUCTS_H_
