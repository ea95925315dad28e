// One task: a tile of the image, packed, and the kernels that run over it.
#ifndef GROUPED_CONV_ENGINE_H_
#define GROUPED_CONV_ENGINE_H_

#include "job.h"
#include "kernels.h"
#include "packing.h"
#include "tiles.h"
#include "vectors.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

// Which results of a phase are in a tile.
INLINE Span SpanOf(const Axis& axis, const Phase& phase, int64_t tile) {
  int64_t begin = tile * axis.tile;
  return {begin, Smaller(begin + axis.tile, phase.count)};
}

// Whole groups, or a part of one.
INLINE Span Chunk(const Job& job, int64_t chunk) {
  int64_t begin = 0, end = job.vectors;
  if (job.chunk < job.vectors_in_group) {
    int64_t parts = Blocks(job.vectors_in_group, job.chunk);
    begin = chunk / parts * job.vectors_in_group;
    end = begin + job.vectors_in_group;
    chunk %= parts;
  }
  begin += chunk * job.chunk;
  return {begin, Smaller(begin + job.chunk, end)};
}

// Each phase with the place of its weights in a vector.
template <class Visit>
INLINE void EachPhase(const Job& job, const Visit& visit) {
  int64_t offset = 0;
  for (int64_t a = 0; a < job.axes[0].phase_count; a++) {
    for (int64_t b = 0; b < job.axes[1].phase_count; b++) {
      const Phase &p = job.axes[0].phases[a], &q = job.axes[1].phases[b];
      visit(p, q, offset);
      offset += p.taps * q.taps * job.terms * job.lanes;
    }
  }
}

// How many vectors of one group the kernels take together, and how many sums or pixels then: what
// the registers hold beside some weights and inputs.
constexpr int kMostVectors = kRegisters == 32 ? 3 : 2;
constexpr int kMostSums = kRegisters == 32 ? 28 : 12;
// Results of a row that are read where they are, not packed, at the least; and those beside them,
// of which a few would take as long.
constexpr int kShortest = kMostSums / 2, kEdge = kMostSums / 4;
constexpr int64_t kMostUses = 40;  // Of an element that is read in place.
constexpr int MostPixels(int64_t vectors) {
  return vectors == 1 ? kMostSums / 2 : kMostSums / static_cast<int>(vectors);
}
template <class Policy>
constexpr int kVectorsTogether = Policy::is_tiled ? 2 : kMostVectors;
template <int most>
using UpTo = std::make_integer_sequence<int, most>;

// The vectors from `v` on that are computed together: equal parts of a group.
template <class Policy>
INLINE int64_t Together(const Job& job, Span vectors, int64_t v) {
  int64_t in_group = job.vectors_in_group - v % job.vectors_in_group;
  int64_t left = Smaller(vectors.end - v, in_group);
  return Blocks(left, Blocks(left, kVectorsTogether<Policy>));
}

template <class Policy>
using RowKernel = void (*)(const Row<Policy>&);
template <class Policy>
using ProductsKernel = void (*)(const Products<Policy>&);

template <class Policy, bool is_scalar, int results, int vectors, int... pixels>
RowKernel<Policy> PickRuns(int64_t count, std::integer_sequence<int, pixels...>) {
  RowKernel<Policy> kernel = nullptr;
  ((kernel = count == pixels + 1 ? RowOfRuns<Policy, is_scalar, results, pixels + 1, vectors>
                                 : kernel),
   ...);
  return kernel;
}
template <class Policy, int width, int taps, int... pixels>
RowKernel<Policy> PickRotations(int64_t count, std::integer_sequence<int, pixels...>) {
  RowKernel<Policy> kernel = nullptr;
  ((kernel = count == pixels + 1 ? RowOfRotations<Policy, width, taps, pixels + 1> : kernel),
   ...);
  return kernel;
}
template <class Policy, int width>
RowKernel<Policy> PickRotation(int64_t slide, int64_t count) {
  using Pixels = UpTo<MostPixels(1)>;
  if constexpr (width * 2 <= kLanes<Policy>) {
    if (slide == 3) return PickRotations<Policy, width, 3>(count, Pixels{});
    if constexpr (width == 1) {
      if (slide == 5) return PickRotations<Policy, width, 5>(count, Pixels{});
      if (slide == 7) return PickRotations<Policy, width, 7>(count, Pixels{});
    }
    return PickRotations<Policy, width, 0>(count, Pixels{});
  }
  return nullptr;
}
constexpr bool Slides(int64_t width, int64_t taps) {
  return taps == 3 || (width == 1 && (taps == 5 || taps == 7));
}
template <class Policy>
RowKernel<Policy> PickRow(const Job& job, int64_t results, int64_t vectors, int64_t slide,
                          int64_t count) {
  if (job.mode == Mode::kSpread) {
    return PickRuns<Policy, false, 1, 1>(count, UpTo<MostPixels(1)>{});
  }
  if (job.mode == Mode::kBroadcast) {
    if (results == 2) {
      if (vectors == 1) return PickRuns<Policy, true, 2, 1>(count, UpTo<kMostSums / 2>{});
      return PickRuns<Policy, true, 2, 2>(count, UpTo<kMostSums / 4>{});
    }
    if (vectors == 1) return PickRuns<Policy, true, 1, 1>(count, UpTo<MostPixels(1)>{});
    if (vectors == 2) return PickRuns<Policy, true, 1, 2>(count, UpTo<MostPixels(2)>{});
    if constexpr (kMostVectors == 3) {
      return PickRuns<Policy, true, 1, 3>(count, UpTo<MostPixels(3)>{});
    }
  }
  switch (job.outputs) {
    case 1: return PickRotation<Policy, 1>(slide, count);
    case 2: return PickRotation<Policy, 2>(slide, count);
    case 4: return PickRotation<Policy, 4>(slide, count);
    default: return PickRotation<Policy, 8>(slide, count);
  }
}

template <class Policy>
void (*PickTiles(int64_t blocks, int64_t vectors))(const TileRow<Policy>&) {
  if (blocks == 2) return vectors == 2 ? RowOfTiles<Policy, 2, 2> : RowOfTiles<Policy, 2, 1>;
  return vectors == 2 ? RowOfTiles<Policy, 1, 2> : RowOfTiles<Policy, 1, 1>;
}

// Rows of one image, packed as [rows, columns, sources, unit] for the vectors of a chunk. Each has
// a place of its own until the window has moved beyond it; where they are is in `lines`, in order.
// Or, if `is_direct`, they are where they are in the image, and nothing is packed: of columns that
// are all inside, where a packed row would be a copy (see `IsCopy`).
template <class Policy>
class Window {
 public:
  using Element = typename Policy::Element;

  // `columns` is a tile, or a part of it; pairs are of features if `pair_step` is 0. Memory is taken
  // from `scratch`.
  Window(const Job& job, int64_t image, Span vectors, Span columns, bool is_direct,
         int64_t pair_step, char** scratch)
      : job_(job), is_direct_(is_direct), pair_step_(pair_step), rows_(job.window_rows()) {
    const Axis& axis = job.axes[1];
    first_source_ = job.source_of(vectors.begin);
    int64_t features = job.groups_in_vector * job.inputs, all = job.groups * job.inputs;
    sources_ = {first_source_ * features, features,
                job.source_of(vectors.end - 1) - first_source_ + 1, all};
    columns_ = {axis.low + columns.begin * axis.step * axis.grain, axis.grain,
                columns.size() > 0 ? axis.positions(columns.size()) : 0, axis.operand};
    image_ = static_cast<const typename Policy::Stored*>(job.operand) +
             image * job.axes[0].operand * axis.operand * all;
    lines = reinterpret_cast<int64_t*>(*scratch);
    *scratch += Blocks(rows_ * sizeof(int64_t), kAlignment) * kAlignment;
    base_ = reinterpret_cast<Element*>(*scratch);
    if (!is_direct) *scratch += Blocks(rows_ * row() * sizeof(Element), kAlignment) * kAlignment;
  }

  // Elements from column to column.
  int64_t pixel() const {
    if (is_direct_) return columns_.step * sources_.all_features;
    return job_.pixel_size(sources_.count, sizeof(Element));
  }
  const Element* of(int64_t vector) const {
    int64_t source = job_.source_of(vector);
    if constexpr (std::is_same_v<Element, typename Policy::Stored>) {
      if (is_direct_) {
        return image_ + columns_.first * sources_.all_features + source * job_.unit;
      }
    }
    return base_ + (source - first_source_) * job_.unit;
  }

  // Moves to the rows that the results from row number `result` on read.
  void MoveTo(int64_t result) {
    const Axis& axis = job_.axes[0];
    int64_t first = result * axis.step;
    if (is_direct_) {
      int64_t row = columns_.size * sources_.all_features;
      for (int64_t i = 0; i < rows_; i++) lines[i] = (axis.low + (first + i) * axis.grain) * row;
      return;
    }
    for (int64_t i = 0; i < rows_; i++) lines[i] = (first + i) % rows_ * row();
    for (int64_t i = Larger(first, packed_); i < first + rows_; i++) Pack(i);
    packed_ = first + rows_;
  }

  int64_t* lines;

 private:
  int64_t row() const { return columns_.count * pixel(); }
  void Pack(int64_t number) {
    const Axis& axis = job_.axes[0];
    int64_t position = axis.low + number * axis.grain;
    bool is_inside = 0 <= position && position < axis.operand;
    const auto* line =
        is_inside ? image_ + position * columns_.size * sources_.all_features : nullptr;
    Element* to = base_ + number % rows_ * row();
    auto pack = [&](const auto& how) {
      PackRow<Policy>(line, columns_, sources_, pair_step_, to, job_.unit, pixel(), how);
    };
    // As many inputs as a vector holds, of which pairs take half the place.
    int64_t inputs = pair_step_ ? job_.inputs : job_.inputs / Policy::pair;
    if (job_.mode == Mode::kBroadcast) {
      pack(PackScalars<Policy>());
    } else if (job_.mode == Mode::kSpread) {
      pack(PackSpread<Policy>(job_.terms, inputs, job_.outputs, false));
    } else if (inputs == job_.outputs) {
      pack(PackLanes<Policy>());
    } else {
      pack(PackSpread<Policy>(1, inputs, job_.outputs, true));
    }
  }

  const Job& job_;
  bool is_direct_;
  int64_t pair_step_, rows_, first_source_;
  Sources sources_;
  Positions columns_;
  const typename Policy::Stored* image_;
  Element* base_;
  int64_t packed_ = 0;  // Rows before this one have been.
};

// Whether what is packed of pixels is what they are in the image: whole vectors of several groups.
template <class Policy>
bool IsCopy(const Job& job) {
  return std::is_same_v<typename Policy::Stored, typename Policy::Element> &&
         job.mode == Mode::kRotate && job.groups * job.inputs % kLanes<Policy> == 0;
}

// Whether the operand is read in place. If each element is used often, a copy of it pays, since that
// lies closer together.
template <class Policy>
bool ReadsInPlace(const Job& job) {
  return IsCopy<Policy>(job) &&
         job.taps * job.terms <= kMostUses * job.axes[0].step * job.axes[1].step;
}

// The results of a tile along the columns in up to three parts: the middle one, number 1, reads
// nothing but columns that are inside, and is empty if it would be short; the others have `edge`
// columns, or more if those read something outside.
INLINE void SplitColumns(const Axis& axis, Span columns, bool has_middle, int64_t edge,
                         Span (&parts)[3]) {
  Span middle{columns.begin, has_middle ? columns.end : columns.begin};
  for (int64_t i = 0; i < axis.phase_count; i++) {
    const Phase& q = axis.phases[i];
    if (q.taps == 0) continue;
    int64_t step = q.step * axis.grain;
    for (int64_t tap : {int64_t{0}, q.taps - 1}) {
      int64_t first = axis.low + (q.first + tap * q.gap) * axis.grain;
      Span inside = Inside(first, step, middle.end, axis.operand);
      middle = {Larger(middle.begin, inside.begin), inside.end};
    }
  }
  if (middle.begin > columns.begin) middle.begin = Larger(middle.begin, columns.begin + edge);
  if (middle.end < columns.end) middle.end = Smaller(middle.end, columns.end - edge);
  // The edges are packed, in the memory that all columns would take.
  bool is_long = middle.size() >= kShortest && middle.size() * axis.step >= axis.span;
  if (!is_long) middle = {columns.begin, columns.begin};
  parts[0] = {columns.begin, middle.begin};
  parts[1] = middle;
  parts[2] = {middle.end, columns.end};
}

// Output or gradient of the input: the results of all phases in a tile.
template <class Policy>
void Correlate(const Job& job, int64_t number, void* scratch) {
  using Element = typename Policy::Element;
  constexpr int64_t lanes = kLanes<Policy>;
  const Axis &row_axis = job.axes[0], &column_axis = job.axes[1];
  int64_t tiles = row_axis.tiles * column_axis.tiles;
  int64_t others = job.batch * tiles;
  int64_t chunk = job.chunks_first ? number / others : number % job.chunks;
  int64_t place = job.chunks_first ? number % others : number / job.chunks;
  int64_t image = place / tiles;
  int64_t row_tile = place % tiles / column_axis.tiles, column_tile = place % column_axis.tiles;
  Span vectors = Chunk(job, chunk);
  int64_t all_outputs = job.groups * job.outputs;
  auto* result = static_cast<typename Policy::Stored*>(job.result) +
                 image * row_axis.results * column_axis.results * all_outputs;
  const auto* weights = static_cast<const Element*>(job.packed);
  Span all_rows = SpanOf(row_axis, row_axis.phases[0], row_tile);
  Span all_columns = SpanOf(column_axis, column_axis.phases[0], column_tile);
  char* memory = static_cast<char*>(scratch);
  Span parts[3];
  SplitColumns(column_axis, all_columns, ReadsInPlace<Policy>(job), kEdge, parts);
  Window<Policy> windows[3] = {{job, image, vectors, parts[0], false, 0, &memory},
                               {job, image, vectors, parts[1], true, 0, &memory},
                               {job, image, vectors, parts[2], false, 0, &memory}};

  [[maybe_unused]] TileShapes shapes;
  // Row `j` of the results of one phase, or two rows from there on, as far as they are in `columns`.
  auto correlate = [&](const Window<Policy>& window, Span columns, int64_t j, int64_t results,
                       const Phase& p, const Phase& q, int64_t offset) {
    Row<Policy> row;
    // Rows of zeros need no multiplications, if they are that for all results.
    auto inside = [&](int64_t j) {
      return Inside(row_axis.low + (p.first + j * p.step) * row_axis.grain, p.gap * row_axis.grain,
                    q.taps ? p.taps : 0, row_axis.operand);
    };
    Span taps = inside(j);
    if (results == 2) {
      Span others = inside(j + 1);
      taps = {Smaller(taps.begin, others.begin), Larger(taps.end, others.end)};
    }
    row.next_line = p.step;
    row.next_result = p.period * column_axis.results * all_outputs;
    row.lines = window.lines + p.first + taps.begin * p.gap;
    row.line_gap = p.gap;
    row.rows = taps.size();
    row.columns = q.taps;
    row.run = job.terms;
    row.column_gap = q.gap * window.pixel();
    row.step = q.step * window.pixel();
    row.weights_row = q.taps * job.terms * lanes;
    row.weights_column = job.terms * lanes;
    row.weights_vector = job.vector_size();
    row.result_step = q.period * all_outputs;
    if (job.mode != Mode::kRotate && row.column_gap == job.unit) {
      row.run *= row.columns;  // Neighbours: one run.
      row.columns = 1;
    }
    bool slides = q.step == 1 && q.gap == 1;
    int64_t slide = slides && Slides(job.outputs, q.taps) ? q.taps : 0;
    auto* line = result + (p.residue + j * p.period) * column_axis.results * all_outputs;
    // From the results of some vectors from column `c` on.
    auto move_to = [&](int64_t v, int64_t together, int64_t c) {
      row.weights = weights + v * job.vector_size() + offset + taps.begin * row.weights_row;
      row.lanes = static_cast<int32_t>(job.valid_lanes(v + together - 1));
      row.operand = window.of(v) + q.first * window.pixel() + c * row.step;
      row.result = line + (q.residue + (columns.begin + c) * q.period) * all_outputs +
                   job.first_output(v);
    };
    if constexpr (Policy::is_tiled) {
      if (results == 1) row.next_line = 0;
      for (int64_t v = vectors.begin, together; v < vectors.end; v += together) {
        together = Together<Policy>(job, vectors, v);
        TileRow<Policy> tiles{};
        tiles.depth = TileDepth(row.run);
        // Two blocks of a row, or one of each of two rows.
        for (int64_t c = 0, size; c < columns.size(); c += size) {
          int64_t left = columns.size() - c;
          size = tiles.first = Blocks(left, Blocks(left, kTileRows));
          if (results == 2) {
            tiles.second = tiles.first;
            tiles.next_result = row.next_result;
          } else {
            tiles.second = Smaller(left - tiles.first, tiles.first);
            tiles.next_pixel = tiles.first * row.step;
            tiles.next_result = tiles.first * row.result_step;
            size += tiles.second;
          }
          move_to(v, together, c);
          tiles.row = row;
          shapes.Set(tiles.first, tiles.second > 0 ? tiles.second : 1, tiles.depth);
          PickTiles<Policy>(tiles.second > 0 ? 2 : 1, together)(tiles);
        }
      }
    } else {
      auto compute = [&](int64_t v, int64_t together, int64_t c, int64_t count) {
        move_to(v, together, c);
        PickRow<Policy>(job, results, together, slide, count)(row);
      };
      if (job.mode == Mode::kBroadcast) {
        // The weights are more than the pixels: each is used for the whole row.
        for (int64_t v = vectors.begin, together; v < vectors.end; v += together) {
          together = Together<Policy>(job, vectors, v);
          for (int64_t c = 0, size; c < columns.size(); c += size) {
            int64_t left = columns.size() - c;
            size = Blocks(left, Blocks(left, MostPixels(together)));
            compute(v, together, c, size);
          }
        }
      } else {
        // Pixels outside, features inside: that is the order in memory.
        for (int64_t c = 0, size; c < columns.size(); c += size) {
          int64_t left = columns.size() - c;
          size = Blocks(left, Blocks(left, MostPixels(1)));
          for (int64_t v = vectors.begin; v < vectors.end; v++) compute(v, 1, c, size);
        }
      }
    }
  };
  for (int64_t j = all_rows.begin; j < all_rows.end; j += job.rows_at_once) {
    for (int i = 0; i < 3; i++) {
      if (parts[i].size() <= 0) continue;
      windows[i].MoveTo(j);
      EachPhase(job, [&](const Phase& p, const Phase& q, int64_t offset) {
        Span columns{parts[i].begin, Smaller(parts[i].end, q.count)};
        int64_t rows = Smaller(Smaller(job.rows_at_once, all_rows.end - j), p.count - j);
        if (rows > 0 && columns.size() > 0) correlate(windows[i], columns, j, rows, p, q, offset);
      });
    }
  }
}

template <class Policy, bool is_scalar, int tap_rows, int vectors, int... inputs>
ProductsKernel<Policy> PickSums(int64_t count, std::integer_sequence<int, inputs...>) {
  ProductsKernel<Policy> kernel = nullptr;
  ((kernel = count == inputs + 1
                 ? SumRuns<Policy, is_scalar, tap_rows, inputs + 1, vectors>
                 : kernel),
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
ProductsKernel<Policy> PickProducts(const Job& job, int64_t tap_rows, int64_t taps,
                                    int64_t inputs, int64_t vectors) {
  if (job.mode == Mode::kBroadcast) return PickSums<Policy, true>(tap_rows, vectors, inputs);
  if (job.mode == Mode::kSpread || job.outputs == 1) {
    return PickSums<Policy, false>(tap_rows, vectors, inputs);
  }
  switch (job.outputs) {
    case 2: return PickTurnedSums<Policy, 2>(taps);
    case 4: return PickTurnedSums<Policy, 4>(taps);
    default: return PickTurnedSums<Policy, 8>(taps);
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
      const auto* line =
          image_ + (p.residue + (rows.begin + r) * p.period) * axis.results * all_;
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
            products.operand = window.of(v) + q.first * window.pixel() +
                               j * products.column_gap + k * products.input_step;
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
      Window<Policy> windows[3] = {
          {job, image, vectors, parts[0], false, pair_step, &memory},
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

#ifdef GROUPED_CONV_TILES
constexpr Engine MakeTileEngine(const char* name) {
  using Policy = Bfloat16Tile;
  Engine engine{};
  engine.name = name;
  engine.lanes = kLanes<Policy>;
  engine.element_bytes = sizeof(typename Policy::Element);
  engine.pair = Policy::pair;
  engine.vectors_at_once = kVectorsTogether<Policy>;
  engine.rows_of_pixels = kTileRows;
  engine.pack_weights = PackWeights<Policy>;
  engine.correlate = Correlate<Policy>;
  return engine;
}
#endif

template <class Policy>
constexpr Engine MakeEngine(const char* name) {
  constexpr int64_t lanes = kLanes<Policy>;
  Engine engine{};
  engine.name = name;
  engine.lanes = lanes;
  engine.element_bytes = sizeof(typename Policy::Element);
  engine.pair = Policy::pair;
  engine.largest_rotation = lanes / 2 < 8 ? lanes / 2 : 8;
  engine.vectors_at_once = kMostVectors;
  engine.sums_at_once = kMostSums;
  engine.pack_weights = PackWeights<Policy>;
  engine.correlate = Correlate<Policy>;
  engine.sum_products = SumProducts<Policy>;
  engine.unpack_weights = UnpackWeights<Policy>;
  return engine;
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_ENGINE_H_
