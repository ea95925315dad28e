// The part of the work that one task computes, and the windows of packed rows that it reads.
#ifndef GROUPED_CONV_WINDOW_H_
#define GROUPED_CONV_WINDOW_H_

#include "job.h"
#include "packed_kernel.h"
#include "packing.h"
#include "register_blocks.h"
#include "vectors.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

// A tile of the results of one image. The spans are those of the largest phase; the last tile of a
// smaller phase may have fewer results.
struct Tile {
  int64_t image;
  Span rows, columns;
};

INLINE Span TileSpan(const Axis& axis, int64_t tile) {
  int64_t begin = tile * axis.tile;
  return {begin, Smaller(begin + axis.tile, axis.phases[0].count)};
}

// Returns tile `number` of the batch: columns are counted first, then rows, then images.
INLINE Tile TileAt(const Job& job, int64_t number) {
  const Axis &rows = job.axes[0], &columns = job.axes[1];
  int64_t in_image = number % (rows.tiles * columns.tiles);
  return {number / (rows.tiles * columns.tiles), TileSpan(rows, in_image / columns.tiles),
          TileSpan(columns, in_image % columns.tiles)};
}

// Returns the vectors of a chunk, which are whole groups or a part of one group.
INLINE Span ChunkSpan(const Job& job, int64_t chunk) {
  int64_t begin = 0, end = job.vectors;
  if (job.chunk < job.vectors_in_group) {
    int64_t parts = CeilDiv(job.vectors_in_group, job.chunk);
    begin = chunk / parts * job.vectors_in_group;
    end = begin + job.vectors_in_group;
    chunk %= parts;
  }
  begin += chunk * job.chunk;
  return {begin, Smaller(begin + job.chunk, end)};
}

// Returns whether packed pixels equal the pixels of the image: whole vectors of narrow groups.
template <class Policy>
bool IsCopy(const Job& job) {
  return std::is_same_v<typename Policy::Stored, typename Policy::Element> &&
         job.layout == Layout::kRotate && job.groups * job.inputs % kLanes<Policy> == 0;
}

// The rows of one image that some results read, for the vectors of a chunk.
//
// They are packed as [rows, columns, panels, panel_size] in a ring buffer: row number i is in slot
// i % window_rows, so that moving down packs only the new rows. With 3 taps and stride 1, the
// window of result 4 holds the rows 4, 5, 6 in the slots 1, 2, 0; result 5 needs row 7 in place of
// row 4. A window that reads `in_place` packs nothing: its columns are all inside the image, where
// packed rows would be copies (see `IsCopy`).
template <class Policy>
class Window {
 public:
  using Stored = typename Policy::Stored;
  using Element = typename Policy::Element;

  // `results` are columns of a tile. Pairs are pairs of features if `pair_step` is 0, else pairs of
  // pixels. The window takes its memory from the beginning of `*scratch`.
  Window(const Job& job, int64_t image, Span vectors, Span results, bool in_place,
         int64_t pair_step, char** scratch)
      : job_(job),
        results_(results),
        in_place_(in_place),
        pair_step_(pair_step),
        rows_(job.window_rows()),
        first_panel_(job.panel_of(vectors.begin)) {
    const Axis& axis = job.axes[1];
    int64_t features = job.groups_in_vector * job.inputs, all = job.groups * job.inputs;
    panels_ = {first_panel_ * features, features, job.panel_of(vectors.end - 1) - first_panel_ + 1,
               all};
    columns_ = {axis.low + results.begin * axis.step * axis.grain, axis.grain,
                results.size() > 0 ? axis.positions(results.size()) : 0, axis.operand};
    image_ =
        static_cast<const Stored*>(job.operand) + image * job.axes[0].operand * axis.operand * all;
    lines_ = reinterpret_cast<int64_t*>(*scratch);
    *scratch += Aligned(rows_ * sizeof(int64_t));
    packed_ = reinterpret_cast<Element*>(*scratch);
    if (!in_place) *scratch += Aligned(rows_ * row_size() * sizeof(Element));
  }

  Span results() const { return results_; }

  // Returns the elements from column to column.
  int64_t pixel_size() const {
    if (in_place_) return columns_.step * panels_.all_features;
    return job_.pixel_size(panels_.count, sizeof(Element));
  }

  // Returns where the panel of a vector begins in each row. Row i of the window, counted from the
  // first row that the current results read, begins lines()[i] elements further.
  const Element* panel(int64_t vector) const {
    int64_t panel = job_.panel_of(vector);
    if constexpr (std::is_same_v<Element, Stored>) {
      if (in_place_) {
        return image_ + columns_.first * panels_.all_features + panel * job_.panel_size;
      }
    }
    return packed_ + (panel - first_panel_) * job_.panel_size;
  }
  const int64_t* lines() const { return lines_; }

  // Moves down to the rows that row `result` of the results, and those after it, read.
  void MoveTo(int64_t result) {
    const Axis& axis = job_.axes[0];
    int64_t first = result * axis.step;
    if (in_place_) {
      int64_t size = columns_.size * panels_.all_features;
      for (int64_t i = 0; i < rows_; i++) lines_[i] = (axis.low + (first + i) * axis.grain) * size;
      return;
    }
    for (int64_t i = 0; i < rows_; i++) lines_[i] = (first + i) % rows_ * row_size();
    for (int64_t i = Larger(first, packed_rows_); i < first + rows_; i++) Pack(i);
    packed_rows_ = first + rows_;
  }

 private:
  int64_t row_size() const { return columns_.count * pixel_size(); }

  void Pack(int64_t number) {
    const Axis& axis = job_.axes[0];
    int64_t position = axis.low + number * axis.grain;
    bool is_inside = 0 <= position && position < axis.operand;
    const Stored* line =
        is_inside ? image_ + position * columns_.size * panels_.all_features : nullptr;
    PackedRow<Policy> row{packed_ + number % rows_ * row_size(), job_.panel_size, pixel_size()};
    auto pack = [&](const auto& pack_panel) {
      PackRow<Policy>(line, columns_, panels_, pair_step_, row, pack_panel);
    };
    // The packed elements of a group in a pixel. Two features that form a pair are one element.
    int64_t inputs = pair_step_ ? job_.inputs : job_.inputs / Policy::pair;
    if (job_.layout == Layout::kBroadcast) {
      pack(PackScalars<Policy>());
    } else if (job_.layout == Layout::kSpread) {
      pack(PackSpread<Policy>(job_.terms, inputs, job_.outputs, false));
    } else if (inputs == job_.outputs) {
      pack(PackLanes<Policy>());
    } else {
      pack(PackSpread<Policy>(1, inputs, job_.outputs, true));
    }
  }

  const Job& job_;
  Span results_;
  bool in_place_;
  int64_t pair_step_, rows_, first_panel_;
  Panels panels_;
  Positions columns_;
  const Stored* image_;
  int64_t* lines_;
  Element* packed_;
  int64_t packed_rows_ = 0;  // Rows below this number have been packed.
};

// The columns of a tile in up to three parts. The `middle` reads only columns inside the image; the
// `left` and `right` edges are packed with their zeros. Each part may be empty.
struct ColumnParts {
  Span left, middle, right;
};

// Divides the columns of a tile; without `has_middle`, all of them are in the left part. An edge
// has at least `edge` columns, because a few columns take as long. A middle shorter than half of
// the sums that fit in registers is not worth its own calls.
//
// For example, 3 taps with padding 1 over 56 columns read outside the image in columns 0 and 55.
// With an edge of 3 the parts are 0..2, 3..52 and 53..55.
INLINE ColumnParts SplitColumns(const Axis& axis, Span columns, bool has_middle, int64_t edge) {
  Span middle{columns.begin, has_middle ? columns.end : columns.begin};
  for (int64_t i = 0; i < axis.phase_count; i++) {
    const Phase& q = axis.phases[i];
    if (q.taps == 0) continue;
    for (int64_t tap : {int64_t{0}, q.taps - 1}) {
      int64_t first = axis.low + (q.first + tap * q.gap) * axis.grain;
      Span inside = Inside(first, q.step * axis.grain, middle.end, axis.operand);
      middle = {Larger(middle.begin, inside.begin), inside.end};
    }
  }
  if (middle.begin > columns.begin) middle.begin = Larger(middle.begin, columns.begin + edge);
  if (middle.end < columns.end) middle.end = Smaller(middle.end, columns.end - edge);
  // There is memory for one window of all columns. The windows of edges of l and r columns take no
  // more if the middle has m columns with m * step >= span:
  //   (l - 1) * step + span + (r - 1) * step + span <= (l + m + r - 1) * step + span
  constexpr int kShortest = kMostSums / 2;
  bool is_long = middle.size() >= kShortest && middle.size() * axis.step >= axis.span;
  if (!is_long) middle = {columns.begin, columns.begin};
  return {{columns.begin, middle.begin}, middle, {middle.end, columns.end}};
}

// The windows of the parts of a tile.
template <class Policy>
class Windows {
 public:
  Windows(const Job& job, const Tile& tile, Span vectors, const ColumnParts& parts,
          int64_t pair_step, char** scratch)
      : job_(job),
        tile_rows_(tile.rows),
        windows_{{job, tile.image, vectors, parts.left, false, pair_step, scratch},
                 {job, tile.image, vectors, parts.middle, true, pair_step, scratch},
                 {job, tile.image, vectors, parts.right, false, pair_step, scratch}} {}

  // Moves the windows down the tile. At each place it calls visit(window, phase, rows, columns)
  // for the rows and columns of each phase's results whose taps the window holds.
  template <class Visit>
  INLINE void MoveDown(const Visit& visit) {
    for (int64_t j = tile_rows_.begin; j < tile_rows_.end; j += job_.rows_at_once) {
      int64_t end = Smaller(j + job_.rows_at_once, tile_rows_.end);
      for (Window<Policy>& window : windows_) {
        if (window.results().size() <= 0) continue;
        window.MoveTo(j);
        EachPhase(job_, [&](const Phase2d& phase) INLINE_LAMBDA {
          Span rows{j, Smaller(end, phase.rows.count)};
          Span columns{window.results().begin, Smaller(window.results().end, phase.columns.count)};
          if (rows.size() > 0 && columns.size() > 0) visit(window, phase, rows, columns);
        });
      }
    }
  }

 private:
  const Job& job_;
  Span tile_rows_;
  Window<Policy> windows_[3];
};

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_WINDOW_H_
