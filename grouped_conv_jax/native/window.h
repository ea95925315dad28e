// What a task reads: its part of the results, and the rows of the operand that those see.
#ifndef GROUPED_CONV_WINDOW_H_
#define GROUPED_CONV_WINDOW_H_

#include "blocks.h"
#include "job.h"
#include "packing.h"
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
// Results of a row that are read where they are, not packed, at the least; and those beside them,
// of which a few would take as long.
constexpr int kShortest = kMostSums / 2, kEdge = kMostSums / 4;
constexpr int64_t kMostUses = 40;  // Of an element that is read in place.

// Rows of one image, packed as [rows, columns, sources, unit] for the vectors of a chunk. Each has
// a place of its own until the window has moved beyond it; where they are is in `lines`, in order.
// Or, if `is_direct`, they are where they are in the image, and nothing is packed: of columns that
// are all inside, where a packed row would be a copy (see `IsCopy`).
template <class Policy>
class Window {
 public:
  using Element = typename Policy::Element;

  // `columns` is a tile, or a part of it; pairs are of features if `pair_step` is 0. Memory is
  // taken from `scratch`.
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

// Whether the operand is read in place. If each element is used often, a copy of it pays, since
// that lies closer together.
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

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_WINDOW_H_
