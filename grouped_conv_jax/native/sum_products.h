// Gradient of the kernel: one task, and the kernels that it picks.
#ifndef GROUPED_CONV_SUM_PRODUCTS_H_
#define GROUPED_CONV_SUM_PRODUCTS_H_

#include "blocks.h"
#include "job.h"
#include "kernels.h"
#include "window.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

template <class Policy>
using ProductsKernel = void (*)(const Products<Policy>&);

template <class Policy, bool is_scalar, int tap_rows, int vectors, int... inputs>
ProductsKernel<Policy> PickSums(int64_t count, std::integer_sequence<int, inputs...>) {
  ProductsKernel<Policy> kernel = nullptr;
  ((kernel =
        count == inputs + 1 ? SumRuns<Policy, is_scalar, tap_rows, inputs + 1, vectors> : kernel),
   ...);
  return kernel;
}
constexpr int MostInputs(int64_t vectors) {
  // Of one vector, as many as a full vector of inputs has.
  return vectors == 1 ? (kRegisters == 32 ? 16 : 12) : kMostSums / static_cast<int>(vectors);
}
constexpr int kTapRows = 3, kInputsOfRows = kMostSums / 2 / kTapRows;

template <class Policy, bool is_scalar>
ProductsKernel<Policy> PickSums(int64_t tap_rows, int64_t vectors, int64_t inputs) {
  if (tap_rows == kTapRows) {
    return PickSums<Policy, is_scalar, kTapRows, 1>(inputs, UpTo<kInputsOfRows>{});
  }
  if (vectors == 1) return PickSums<Policy, is_scalar, 1, 1>(inputs, UpTo<MostInputs(1)>{});
  if constexpr (is_scalar) {
    if (vectors == 2) return PickSums<Policy, true, 1, 2>(inputs, UpTo<MostInputs(2)>{});
    if constexpr (kMostVectors == 3) {
      return PickSums<Policy, true, 1, 3>(inputs, UpTo<MostInputs(3)>{});
    }
  }
  return nullptr;
}

template <class Policy, int width>
ProductsKernel<Policy> PickTurnedSums(int64_t taps) {
  if constexpr (width * 2 <= kLanes<Policy>) {
    if (taps == 3 && width * 4 <= kRegisters) return SumRotations<Policy, width, 3>;
    return SumRotations<Policy, width, 1>;
  }
  return nullptr;
}

template <class Policy>
ProductsKernel<Policy> PickProducts(const Job& job, int64_t tap_rows, int64_t taps, int64_t inputs,
                                    int64_t vectors) {
  if (job.mode == Mode::kBroadcast) return PickSums<Policy, true>(tap_rows, vectors, inputs);
  if (job.mode == Mode::kSpread || job.outputs == 1) {
    return PickSums<Policy, false>(tap_rows, vectors, inputs);
  }
  switch (job.outputs) {
    case 2:
      return PickTurnedSums<Policy, 2>(taps);
    case 4:
      return PickTurnedSums<Policy, 4>(taps);
    default:
      return PickTurnedSums<Policy, 8>(taps);
  }
}

// The same of both operands of the kernel's gradient, which are read again for each few sums.
template <class Policy>
bool SumsInPlace(const Job& job) {
  return IsCopy<Policy>(job) && job.outputs == 1 && job.taps <= kMostSums / 2;
}

// The output's gradient in some rows, packed as [rows, columns, vectors, lanes], or where it is.
template <class Policy>
class Gradient {
 public:
  using Element = typename Policy::Element;

  Gradient(const Job& job, int64_t image, Span vectors, char* scratch)
      : job_(job), vectors_(vectors), packed_(reinterpret_cast<Element*>(scratch)) {
    all_ = job.groups * job.outputs;
    image_ = static_cast<const typename Policy::Stored*>(job.other) +
             image * job.axes[0].results * job.axes[1].results * all_;
  }

  // The results of a phase.
  void MoveTo(const Phase& p, const Phase& q, Span rows, Span columns) {
    constexpr int64_t lanes = kLanes<Policy>, pair = Policy::pair;
    const Axis& axis = job_.axes[1];
    this->columns = Blocks(columns.size(), pair);
    if constexpr (std::is_same_v<Element, typename Policy::Stored>) {
      if (SumsInPlace<Policy>(job_)) {
        int64_t row = p.residue + rows.begin * p.period;
        int64_t column = q.residue + columns.begin * q.period;
        base_ = image_ + (row * axis.results + column) * all_ + job_.first_output(vectors_.begin);
        pixel_ = q.period * all_;
        row_ = p.period * axis.results * all_;
        return;
      }
    }
    base_ = packed_;
    pixel_ = vectors_.size() * lanes;
    row_ = this->columns * pixel_;
    Positions positions{q.residue + columns.begin * q.period, q.period * pair, this->columns,
                        axis.results};
    for (int64_t r = 0; r < rows.size(); r++) {
      const auto* line = image_ + (p.residue + (rows.begin + r) * p.period) * axis.results * all_;
      Element* to = packed_ + r * row_;
      // The vectors of a group that does not fill its last one overlap if they are seen as evenly
      // spaced.
      bool are_even = job_.outputs % lanes == 0 || job_.mode != Mode::kBroadcast;
      int64_t step = are_even ? vectors_.size() : 1;
      for (int64_t v = vectors_.begin; v < vectors_.end; v += step) {
        int64_t first = job_.first_output(v);
        int64_t width = are_even && job_.mode == Mode::kBroadcast
                            ? lanes
                            : job_.groups_in_vector * job_.outputs;
        Sources sources{first, width, step, all_};
        if (!are_even) sources.features = job_.valid_lanes(v);
        PackRow<Policy>(line, positions, sources, pair == 2 ? q.period : 0,
                        to + (v - vectors_.begin) * lanes, lanes, pixel_, PackLanes<Policy>());
      }
    }
  }

  // Elements from column to column, and from row to row.
  int64_t pixel() const { return pixel_; }
  int64_t row() const { return row_; }
  const Element* of(int64_t vector) const {
    return base_ + (vector - vectors_.begin) * kLanes<Policy>;
  }

  int64_t columns;

 private:
  const Job& job_;
  Span vectors_;
  Element* packed_;
  const Element* base_ = nullptr;
  int64_t all_, pixel_ = 0, row_ = 0;
  const typename Policy::Stored* image_;
};

// Gradient of the kernel: the sums of one slice of the tiles, for the vectors of a chunk.
template <class Policy>
void SumProducts(const Job& job, int64_t number, void* scratch) {
  using Number = std::remove_reference_t<decltype(typename Policy::Sum{}[0])>;
  constexpr int64_t lanes = kLanes<Policy>, pair = Policy::pair;
  const Axis &row_axis = job.axes[0], &column_axis = job.axes[1];
  int64_t tiles = row_axis.tiles * column_axis.tiles, all = job.batch * tiles;
  int64_t slice = number / job.chunks;
  Span vectors = Chunk(job, number % job.chunks);
  Number* sums = static_cast<Number*>(job.packed) + slice * job.vectors * job.vector_size();
  memset(sums + vectors.begin * job.vector_size(), 0,
         vectors.size() * job.vector_size() * sizeof(Number));
  bool turns = job.mode == Mode::kRotate && job.outputs > 1;
  bool is_scalar = job.mode == Mode::kBroadcast;

  using Kernels = typename Policy::Kernels;
  Products<Kernels> products;
  // The sums of all taps of a phase, for the results of `rows`, a window.
  auto sum = [&](const Phase& p, const Phase& q, int64_t offset, Span rows,
                 const Window<Policy>& window, const Gradient<Policy>& gradient) {
    products.columns = gradient.columns;
    products.line_step = p.step;
    products.line_gap = p.gap;
    products.column_step = pair * q.step * window.pixel();
    products.column_gap = q.gap * window.pixel();
    products.other_row = gradient.row();
    products.other_column = gradient.pixel();
    products.sums_column = job.terms * lanes;
    products.sums_row = q.taps * products.sums_column;
    products.sums_vector = job.vector_size();
    // Inputs, or neighbouring taps as well, one after the other.
    bool steps = !is_scalar && job.terms == 1;  // From pixel to pixel.
    bool neighbours = !turns && (steps || products.column_gap == job.unit);
    products.input_step = is_scalar ? 1 : steps ? products.column_gap : lanes;
    int64_t run = neighbours ? q.taps * job.terms : job.terms;
    int64_t columns_apart = neighbours ? 1 : q.taps;
    for (int64_t v = vectors.begin, together; v < vectors.end; v += together) {
      together = Together<Policy>(job, vectors, v);
      for (int64_t i = 0, tap_rows; i < p.taps; i += tap_rows) {
        bool has_few = !turns && together == 1 && run <= kInputsOfRows;
        tap_rows = has_few && p.taps - i >= kTapRows ? kTapRows : 1;
        // Rows of zeros need no sums, if one tap can do without them.
        Span inside{0, rows.size()};
        if (tap_rows == 1) {
          int64_t first = p.first + i * p.gap + rows.begin * p.step;
          inside = Inside(row_axis.low + first * row_axis.grain, p.step * row_axis.grain,
                          rows.size(), row_axis.operand);
        }
        if (inside.size() == 0) continue;
        products.rows = inside.size();
        products.lines = window.lines + p.first + i * p.gap + inside.begin * p.step;
        products.other = gradient.of(v) + inside.begin * gradient.row();
        for (int64_t j = 0, taps; j < columns_apart; j += taps) {
          taps = turns && columns_apart - j >= 3 && job.outputs * 4 <= kRegisters ? 3 : 1;
          for (int64_t k = 0, inputs; k < run; k += inputs) {
            int64_t left = run - k;
            inputs = turns ? left : Blocks(left, Blocks(left, MostInputs(together)));
            products.operand = window.of(v) + q.first * window.pixel() + j * products.column_gap +
                               k * products.input_step;
            products.sums = sums + v * job.vector_size() + offset + i * products.sums_row +
                            j * products.sums_column + k * lanes;
            PickProducts<Kernels>(job, tap_rows, taps, inputs, together)(products);
          }
        }
      }
    }
  };

  for (int64_t place = slice * all / job.slices; place < (slice + 1) * all / job.slices; place++) {
    int64_t image = place / tiles;
    int64_t row_tile = place % tiles / column_axis.tiles, column_tile = place % column_axis.tiles;
    Span all_rows = SpanOf(row_axis, row_axis.phases[0], row_tile);
    Span all_columns = SpanOf(column_axis, column_axis.phases[0], column_tile);
    int64_t pair_step = pair == 2 ? column_axis.step * column_axis.grain : 0;
    // Some rows that are all inside, or are not, of the operand.
    auto sum_rows = [&](Span all_rows, bool are_inside) {
      char* memory = static_cast<char*>(scratch);
      Span parts[3];
      SplitColumns(column_axis, all_columns, are_inside && SumsInPlace<Policy>(job), 1, parts);
      Window<Policy> windows[3] = {{job, image, vectors, parts[0], false, pair_step, &memory},
                                   {job, image, vectors, parts[1], true, pair_step, &memory},
                                   {job, image, vectors, parts[2], false, pair_step, &memory}};
      Gradient<Policy> gradient(job, image, vectors, memory);
      for (int64_t j = all_rows.begin; j < all_rows.end; j += job.rows_at_once) {
        for (int i = 0; i < 3; i++) {
          if (parts[i].size() <= 0) continue;
          windows[i].MoveTo(j);
          EachPhase(job, [&](const Phase& p, const Phase& q, int64_t offset) {
            Span rows{j, Smaller(Smaller(j + job.rows_at_once, all_rows.end), p.count)};
            Span columns{parts[i].begin, Smaller(parts[i].end, q.count)};
            if (rows.size() <= 0 || columns.size() <= 0 || p.taps * q.taps == 0) return;
            gradient.MoveTo(p, q, rows, columns);
            sum(p, q, offset, rows, windows[i], gradient);
          });
        }
      }
    };
    auto are_inside = [&](int64_t j) {
      int64_t first = row_axis.low + j * row_axis.step * row_axis.grain;
      return 0 <= first && first + (job.window_rows() - 1) * row_axis.grain < row_axis.operand;
    };
    for (int64_t j = all_rows.begin, next; j < all_rows.end; j = next) {
      bool inside = are_inside(j);
      for (next = j; next < all_rows.end && are_inside(next) == inside;) next += job.rows_at_once;
      sum_rows({j, Smaller(next, all_rows.end)}, inside);
    }
  }
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_SUM_PRODUCTS_H_
