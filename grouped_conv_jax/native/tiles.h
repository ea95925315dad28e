// Inner loops for processors that multiply whole tiles of bfloat16 (AMX): a block of results is a
// tile, 16 pixels x 16 outputs, and one instruction adds the products of up to 32 inputs to it.
//
//                     outputs 0..15   16..31
//     pixels 0..15    tile 0          tile 1       += tile 4  x  tiles 6, 7
//     pixels 16..31   tile 2          tile 3       += tile 5  x  tiles 6, 7
//
// Tiles 4 and 5 are rows of packed pixels as they lie in a window, tiles 6 and 7 packed weights.
#ifndef GROUPED_CONV_TILES_H_
#define GROUPED_CONV_TILES_H_

#include "kernels.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

constexpr int kTileRows = 16;

// Pairs of inputs that one instruction takes of a run: a divisor of it, since none may be made up.
INLINE int64_t TileDepth(int64_t terms) {
  int64_t depth = terms < kTileRows ? terms : kTileRows;
  while (depth > 1 && terms % depth != 0) depth--;
  return depth > 1 ? depth : 1;
}

// The shapes of the tiles of this thread, while it is there.
class TileShapes {
 public:
  TileShapes() = default;
  TileShapes(const TileShapes&) = delete;
  ~TileShapes() {
#ifdef GROUPED_CONV_TILES
    if (is_set_) _tile_release();
#endif
  }

  // Pixels of the first and the second block, and the depth.
  INLINE void Set(int64_t first, int64_t second, int64_t depth) {
    if (is_set_ && rows_[0] == first && rows_[2] == second && rows_[6] == depth) return;
    is_set_ = true;
    for (int i = 0; i < 8; i++) {
      int64_t rows = i >= 6 ? depth : i == 2 || i == 3 || i == 5 ? second : first;
      rows_[i] = static_cast<uint8_t>(rows);
      row_bytes_[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 4 * depth : 64);
    }
#ifdef GROUPED_CONV_TILES
    asm volatile("" ::: "memory");  // The compiler does not know that it reads all of this.
    _tile_loadconfig(this);
#endif
  }

 private:
  // As the instruction reads it.
  uint8_t palette_ = 1, start_ = 0, unused_[14] = {};
  uint16_t row_bytes_[16] = {};
  uint8_t rows_[16] = {};
  bool is_set_ = false;
};

// Two blocks of pixels, of one row of results or of two. The second one is so many elements further
// in the operand and in the result, and its lines are `row.next_line` further.
template <class Policy>
struct TileRow {
  Row<Policy> row;
  int64_t first, second;  // Pixels.
  int64_t next_pixel, next_result;
  int64_t depth;
};

template <class Policy, int blocks, int vectors>
void RowOfTiles(const TileRow<Policy>& tiles) {
#ifdef GROUPED_CONV_TILES
  asm volatile("" ::: "memory");  // Nor what the tiles are loaded from.
  const Row<Policy>& row = tiles.row;
  const int64_t step = row.step * sizeof(uint32_t);
  constexpr int kWeights = kLanes<Policy> * sizeof(uint32_t);
  _tile_zero(0);
  if constexpr (vectors == 2) _tile_zero(1);
  if constexpr (blocks == 2) _tile_zero(2);
  if constexpr (blocks == 2 && vectors == 2) _tile_zero(3);
  for (int64_t i = 0; i < row.rows; i++) {
    for (int64_t j = 0; j < row.columns; j++) {
      const int64_t* line = row.lines + i * row.line_gap;
      const auto* first = row.operand + j * row.column_gap + line[0];
      const auto* second =
          row.operand + j * row.column_gap + line[row.next_line] + tiles.next_pixel;
      const auto* weights = row.weights + i * row.weights_row + j * row.weights_column;
      for (int64_t k = 0; k < row.run; k += tiles.depth) {
        _tile_loadd(4, first + k, step);
        _tile_loadd(6, weights + k * kLanes<Policy>, kWeights);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (vectors == 2) {
          _tile_loadd(7, weights + row.weights_vector + k * kLanes<Policy>, kWeights);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (blocks == 2) {
          _tile_loadd(5, second + k, step);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (vectors == 2) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  alignas(64) float sums[4][kTileRows][kLanes<Policy>];
  _tile_stored(0, sums[0], 64);
  if constexpr (vectors == 2) _tile_stored(1, sums[1], 64);
  if constexpr (blocks == 2) _tile_stored(2, sums[2], 64);
  if constexpr (blocks == 2 && vectors == 2) _tile_stored(3, sums[3], 64);
  for (int b = 0; b < blocks; b++) {
    for (int64_t p = 0; p < (b == 0 ? tiles.first : tiles.second); p++) {
      auto* result = row.result + b * tiles.next_result + p * row.result_step;
      for (int v = 0; v < vectors; v++) {
        StoreSums<Policy>(result + v * kLanes<Policy>,
                          Load<typename Policy::Sum>(sums[2 * b + v][p]),
                          v == vectors - 1 ? row.lanes : kLanes<Policy>);
      }
    }
  }
#endif
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_TILES_H_
