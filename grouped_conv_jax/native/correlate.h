// The output and the input's gradient: one task computes the results of all phases in one tile, for
// the vectors of one chunk.
#ifndef GROUPED_CONV_CORRELATE_H_
#define GROUPED_CONV_CORRELATE_H_

#include "amx.h"
#include "job.h"
#include "register_blocks.h"
#include "register_kernels.h"
#include "window.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

template <class Policy>
using RowKernel = void (*)(const RowArguments<Policy>&);

// The functions below pick the register kernel for a number of results (rows), vectors and pixels.
// `slide` is the number of columns of taps if neighboring columns see neighboring pixels, or 0.

template <class Policy, bool is_scalar, int results, int vectors, int... pixels>
RowKernel<Policy> PickRuns(int64_t count, std::integer_sequence<int, pixels...>) {
  static constexpr RowKernel<Policy> kernels[] = {
      CorrelateRuns<Policy, is_scalar, results, pixels + 1, vectors>...};
  return kernels[count - 1];
}

template <class Policy, int width, int taps, int... pixels>
RowKernel<Policy> PickRotations(int64_t count, std::integer_sequence<int, pixels...>) {
  static constexpr RowKernel<Policy> kernels[] = {
      CorrelateRotations<Policy, width, taps, pixels + 1>...};
  return kernels[count - 1];
}

// Kernels of 3 columns slide along the row (see `SlideRotation`); depthwise ones also of 5 and 7.
template <class Policy, int width>
RowKernel<Policy> PickRotations(int64_t slide, int64_t count) {
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

template <class Policy>
RowKernel<Policy> PickRow(const Job& job, int64_t results, int64_t vectors, int64_t slide,
                          int64_t count) {
  if (job.layout == Layout::kSpread) {
    return PickRuns<Policy, false, 1, 1>(count, UpTo<MostPixels(1)>{});
  }
  if (job.layout == Layout::kBroadcast) {
    constexpr int most = kMostVectors;
    if (results == 2) {
      if (vectors == 1) return PickRuns<Policy, true, 2, 1>(count, UpTo<kMostSums / 2>{});
      return PickRuns<Policy, true, 2, 2>(count, UpTo<kMostSums / 4>{});
    }
    if (vectors == 1) return PickRuns<Policy, true, 1, 1>(count, UpTo<MostPixels(1)>{});
    if (vectors == 2) return PickRuns<Policy, true, 1, 2>(count, UpTo<MostPixels(2)>{});
    return PickRuns<Policy, true, 1, most>(count, UpTo<MostPixels(most)>{});
  }
  if (job.outputs == 1) return PickRotations<Policy, 1>(slide, count);
  if (job.outputs == 2) return PickRotations<Policy, 2>(slide, count);
  if (job.outputs == 4) return PickRotations<Policy, 4>(slide, count);
  return PickRotations<Policy, 8>(slide, count);
}

template <class Policy>
void (*PickAmx(int64_t blocks, int64_t vectors))(const AmxArguments<Policy>&) {
  if (blocks == 2) return vectors == 2 ? CorrelateAmx<Policy, 2, 2> : CorrelateAmx<Policy, 2, 1>;
  return vectors == 2 ? CorrelateAmx<Policy, 1, 2> : CorrelateAmx<Policy, 1, 1>;
}

// Computes rows of results of one image.
template <class Policy>
class Correlator {
 public:
  using Stored = typename Policy::Stored;
  using Element = typename Policy::Element;

  Correlator(const Job& job, int64_t image, Span vectors)
      : job_(job), vectors_(vectors), pixel_(job.groups * job.outputs) {
    row_ = job.axes[1].results * pixel_;
    image_ = static_cast<Stored*>(job.result) + image * job.axes[0].results * row_;
  }

  // Computes one row of results of a phase, or two. The window begins with the rows that the first
  // one reads. Two rows share the kernel calls if they see the same taps.
  INLINE void ComputeRows(const Window<Policy>& window, const Phase2d& phase, Span rows,
                          Span columns) {
    for (int64_t j = rows.begin, size; j < rows.end; j += size) {
      size = rows.end - j;
      Span taps = TapsInside(phase, j);
      if (size == 2) {
        Span next = TapsInside(phase, j + 1);
        if (taps.begin != next.begin || taps.end != next.end) size = 1;
      }
      const int64_t* lines = window.lines() + (j - rows.begin) * phase.rows.step;
      ComputeRow(window, lines, phase, {j, j + size}, taps, columns);
    }
  }

 private:
  // One or two rows of results of a phase, which kernel calls compute block by block.
  struct RowOfBlocks {
    RowArguments<Policy> arguments;  // `MoveTo` sets what differs from block to block.
    const Window<Policy>& window;
    const Element* weights;
    Stored* result;
    int64_t first_column;  // The first column that the first result reads, in elements.
    int64_t results, columns, slide;
  };

  // Returns the rows of taps that row `j` of the results sees inside the image. The others see
  // zeros and need no multiplications.
  INLINE Span TapsInside(const Phase2d& phase, int64_t j) const {
    const Axis& axis = job_.axes[0];
    const Phase& p = phase.rows;
    return Inside(axis.low + (p.first + j * p.step) * axis.grain, p.gap * axis.grain,
                  phase.columns.taps ? p.taps : 0, axis.operand);
  }

  // `lines` are those of the window from the rows on that the first row of results reads.
  void ComputeRow(const Window<Policy>& window, const int64_t* lines, const Phase2d& phase,
                  Span rows, Span taps, Span columns) {
    const Phase &p = phase.rows, &q = phase.columns;
    RowArguments<Policy> row;
    row.next_line = rows.size() == 2 ? p.step : 0;
    row.next_result = p.period * row_;
    row.lines = lines + p.first + taps.begin * p.gap;
    row.line_gap = p.gap;
    row.rows = taps.size();
    row.columns = q.taps;
    row.run = job_.terms;
    row.column_gap = q.gap * window.pixel_size();
    row.step = q.step * window.pixel_size();
    row.weights_column = job_.terms * kLanes<Policy>;
    row.weights_row = q.taps * row.weights_column;
    row.weights_vector = job_.vector_size();
    row.result_step = q.period * pixel_;
    if (job_.layout != Layout::kRotate && row.column_gap == job_.panel_size) {
      // The window's pixels follow each other without gaps, and so do the inputs of all columns of
      // taps: a 3x3 kernel of 4 inputs has runs of 12.
      row.run *= row.columns;
      row.columns = 1;
    }
    RowOfBlocks blocks{
        row,
        window,
        static_cast<const Element*>(job_.packed) + phase.offset + taps.begin * row.weights_row,
        image_ + (p.residue + rows.begin * p.period) * row_ +
            (q.residue + columns.begin * q.period) * pixel_,
        q.first * window.pixel_size(),
        rows.size(),
        columns.size(),
        q.step == 1 && q.gap == 1 ? q.taps : 0};
    if constexpr (Policy::uses_amx) {
      ComputeByAmx(blocks);
    } else if (job_.layout == Layout::kBroadcast) {
      ComputeByVectors(blocks);
    } else {
      ComputeByColumns(blocks);
    }
  }

  // Moves to the block of the vectors v to v + together - 1 that begins at column `c`.
  INLINE void MoveTo(RowOfBlocks& blocks, int64_t v, int64_t together, int64_t c) const {
    RowArguments<Policy>& row = blocks.arguments;
    row.weights = blocks.weights + v * job_.vector_size();
    row.lanes = static_cast<int32_t>(job_.valid_lanes(v + together - 1));
    row.operand = blocks.window.panel(v) + blocks.first_column + c * row.step;
    row.result = blocks.result + c * row.result_step + job_.first_output(v);
  }

  INLINE void ComputeBlock(RowOfBlocks& blocks, int64_t v, int64_t together, int64_t c,
                           int64_t size) const {
    MoveTo(blocks, v, together, c);
    PickRow<Policy>(job_, blocks.results, together, blocks.slide, size)(blocks.arguments);
  }

  // The weights of wide groups are more than the pixels, so each vector of weights is used for the
  // whole row before the next one.
  INLINE void ComputeByVectors(RowOfBlocks& blocks) const {
    for (int64_t v = vectors_.begin, together; v < vectors_.end; v += together) {
      together = Together<Policy>(job_, vectors_, v);
      for (int64_t c = 0, size; c < blocks.columns; c += size) {
        size = Balanced(blocks.columns - c, MostPixels(together));
        ComputeBlock(blocks, v, together, c, size);
      }
    }
  }

  // Narrow groups have few weights, so the loops follow the order of the pixels in memory.
  INLINE void ComputeByColumns(RowOfBlocks& blocks) const {
    for (int64_t c = 0, size; c < blocks.columns; c += size) {
      size = Balanced(blocks.columns - c, MostPixels(1));
      for (int64_t v = vectors_.begin; v < vectors_.end; v++) ComputeBlock(blocks, v, 1, c, size);
    }
  }

  // A kernel call computes two blocks of up to 16 pixels, both of one row or one of each row.
  INLINE void ComputeByAmx(RowOfBlocks& blocks) {
    const RowArguments<Policy>& row = blocks.arguments;
    for (int64_t v = vectors_.begin, together; v < vectors_.end; v += together) {
      together = Together<Policy>(job_, vectors_, v);
      AmxArguments<Policy> amx{};
      amx.depth = AmxDepth(row.run);
      for (int64_t c = 0, size; c < blocks.columns; c += size) {
        int64_t left = blocks.columns - c;
        size = amx.first = Balanced(left, kAmxRows);
        if (blocks.results == 2) {
          amx.second = amx.first;
          amx.next_result = row.next_result;
        } else {
          amx.second = Smaller(left - amx.first, amx.first);
          amx.next_pixel = amx.first * row.step;
          amx.next_result = amx.first * row.result_step;
          size += amx.second;
        }
        MoveTo(blocks, v, together, c);
        amx.row = row;
        shapes_.Set(amx.first, amx.second > 0 ? amx.second : 1, amx.depth);
        PickAmx<Policy>(amx.second > 0 ? 2 : 1, together)(amx);
      }
    }
  }

  const Job& job_;
  Span vectors_;
  int64_t pixel_, row_;  // Elements from pixel to pixel and from row to row of the result.
  Stored* image_;
  AmxShapes shapes_;
};

// Returns whether the operand is read in place. If each element is used more often than this, the
// time for a packed copy pays off, because the copy lies closer together.
template <class Policy>
bool ReadsInPlace(const Job& job) {
  constexpr int64_t kMostUses = 40;
  return IsCopy<Policy>(job) &&
         job.taps * job.terms <= kMostUses * job.axes[0].step * job.axes[1].step;
}

// Computes task `number`: the results of one tile, for the vectors of one chunk.
template <class Policy>
void Correlate(const Job& job, int64_t number, void* scratch) {
  int64_t tiles = job.batch * job.axes[0].tiles * job.axes[1].tiles;
  int64_t chunk = job.chunks_first ? number / tiles : number % job.chunks;
  Tile tile = TileAt(job, job.chunks_first ? number % tiles : number / job.chunks);
  Span vectors = ChunkSpan(job, chunk);
  char* memory = static_cast<char*>(scratch);
  ColumnParts parts =
      SplitColumns(job.axes[1], tile.columns, ReadsInPlace<Policy>(job), kMostSums / 4);
  Windows<Policy> windows(job, tile, vectors, parts, 0, &memory);
  Correlator<Policy> correlator(job, tile.image, vectors);
  windows.MoveDown([&](const Window<Policy>& window, const Phase2d& phase, Span rows, Span columns)
                       INLINE_LAMBDA { correlator.ComputeRows(window, phase, rows, columns); });
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_CORRELATE_H_
