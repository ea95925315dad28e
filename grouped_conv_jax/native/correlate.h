// Output or gradient of the input: one task, and the kernels that it picks.
#ifndef GROUPED_CONV_CORRELATE_H_
#define GROUPED_CONV_CORRELATE_H_

#include "blocks.h"
#include "job.h"
#include "kernels.h"
#include "tiles.h"
#include "window.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

template <class Policy>
using RowKernel = void (*)(const Row<Policy>&);
template <class Policy, bool is_scalar, int results, int vectors, int... pixels>
RowKernel<Policy> PickRuns(int64_t count, std::integer_sequence<int, pixels...>) {
  RowKernel<Policy> kernel = nullptr;
  ((kernel =
        count == pixels + 1 ? RowOfRuns<Policy, is_scalar, results, pixels + 1, vectors> : kernel),
   ...);
  return kernel;
}
template <class Policy, int width, int taps, int... pixels>
RowKernel<Policy> PickRotations(int64_t count, std::integer_sequence<int, pixels...>) {
  RowKernel<Policy> kernel = nullptr;
  ((kernel = count == pixels + 1 ? RowOfRotations<Policy, width, taps, pixels + 1> : kernel), ...);
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
    case 1:
      return PickRotation<Policy, 1>(slide, count);
    case 2:
      return PickRotation<Policy, 2>(slide, count);
    case 4:
      return PickRotation<Policy, 4>(slide, count);
    default:
      return PickRotation<Policy, 8>(slide, count);
  }
}

template <class Policy>
void (*PickTiles(int64_t blocks, int64_t vectors))(const TileRow<Policy>&) {
  if (blocks == 2) return vectors == 2 ? RowOfTiles<Policy, 2, 2> : RowOfTiles<Policy, 2, 1>;
  return vectors == 2 ? RowOfTiles<Policy, 1, 2> : RowOfTiles<Policy, 1, 1>;
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
  // The taps that row `j` of the results of a phase sees: rows of zeros need no multiplications.
  auto taps_of = [&](const Phase& p, const Phase& q, int64_t j) {
    return Inside(row_axis.low + (p.first + j * p.step) * row_axis.grain, p.gap * row_axis.grain,
                  q.taps ? p.taps : 0, row_axis.operand);
  };
  // That row, or two from there on that see the same taps, as far as they are in `columns`;
  // the window begins with what row `window_at` reads.
  auto correlate = [&](const Window<Policy>& window, Span columns, int64_t j, int64_t window_at,
                       int64_t results, const Phase& p, const Phase& q, int64_t offset) {
    Row<Policy> row;
    Span taps = taps_of(p, q, j);
    row.next_line = p.step;
    row.next_result = p.period * column_axis.results * all_outputs;
    row.lines = window.lines + (j - window_at) * p.step + p.first + taps.begin * p.gap;
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
      row.result =
          line + (q.residue + (columns.begin + c) * q.period) * all_outputs + job.first_output(v);
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
        Span rows{j, Smaller(Smaller(j + job.rows_at_once, all_rows.end), p.count)};
        if (rows.size() <= 0 || columns.size() <= 0) return;
        bool are_alike = true;
        if (rows.size() == 2) {
          Span first = taps_of(p, q, j), second = taps_of(p, q, j + 1);
          are_alike = first.begin == second.begin && first.end == second.end;
        }
        int64_t together = are_alike ? rows.size() : 1;
        for (int64_t r = rows.begin; r < rows.end; r += together) {
          correlate(windows[i], columns, r, j, together, p, q, offset);
        }
      });
    }
  }
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_CORRELATE_H_
