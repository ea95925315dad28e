// The register kernel for processors with AMX: a register holds 16 pixels x 16 outputs, and one
// instruction adds the products of up to 32 inputs to all of them.
//
//                     outputs 0..15    16..31
//     pixels 0..15    register 0       register 1       += register 4  x  registers 6, 7
//     pixels 16..31   register 2       register 3       += register 5  x  registers 6, 7
//
// Registers 4 and 5 hold packed pixels, loaded from a window as they are; 6 and 7 hold weights.
#ifndef GROUPED_CONV_AMX_H_
#define GROUPED_CONV_AMX_H_

#include "register_kernels.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

constexpr int kAmxRows = 16;

// Returns how many pairs of inputs one instruction takes from a run: the largest divisor of the run
// up to 16. With any other depth, the last instruction would read pairs behind the run.
INLINE int64_t AmxDepth(int64_t run) {
  int64_t depth = run < kAmxRows ? run : kAmxRows;
  while (depth > 1 && run % depth != 0) depth--;
  return depth > 1 ? depth : 1;
}

// Configures the shapes of this thread's AMX registers, and releases them when it is destroyed.
class AmxShapes {
 public:
  AmxShapes() = default;
  AmxShapes(const AmxShapes&) = delete;
  ~AmxShapes() {
#ifdef GROUPED_CONV_AMX
    if (is_set_) _tile_release();
#endif
  }

  // `first` and `second` are the pixels of the two blocks. Loading a configuration takes longer
  // than many multiplications, so it is left out if the shapes are already loaded.
  INLINE void Set(int64_t first, int64_t second, int64_t depth) {
    if (is_set_ && rows_[0] == first && rows_[2] == second && rows_[6] == depth) return;
    is_set_ = true;
    for (int i = 0; i < 8; i++) {
      int64_t rows = i >= 6 ? depth : i == 2 || i == 3 || i == 5 ? second : first;
      rows_[i] = static_cast<uint8_t>(rows);
      row_bytes_[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 4 * depth : 64);
    }
#ifdef GROUPED_CONV_AMX
    // The compiler does not know that the next line reads this object.
    asm volatile("" ::: "memory");
    _tile_loadconfig(this);
#endif
  }

 private:
  // The instruction reads these 64 bytes.
  uint8_t palette_ = 1, start_ = 0, unused_[14] = {};
  uint16_t row_bytes_[16] = {};
  uint8_t rows_[16] = {};
  bool is_set_ = false;
};

// The arguments of the kernel below: two blocks of pixels, of one row of results or of two rows.
// The second block is `next_pixel` elements and `row.next_line` lines further in the operand, and
// `next_result` elements further in the result.
template <class Policy>
struct AmxArguments {
  RowArguments<Policy> row;
  int64_t first, second;  // Pixels.
  int64_t next_pixel, next_result;
  int64_t depth;
};

template <class Policy, int blocks, int vectors>
void CorrelateAmx(const AmxArguments<Policy>& amx) {
#ifdef GROUPED_CONV_AMX
  // The compiler does not know what the registers are loaded from.
  asm volatile("" ::: "memory");
  const RowArguments<Policy>& row = amx.row;
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
      const auto* second = row.operand + j * row.column_gap + line[row.next_line] + amx.next_pixel;
      const auto* weights = row.weights + i * row.weights_row + j * row.weights_column;
      for (int64_t k = 0; k < row.run; k += amx.depth) {
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
  alignas(64) float sums[4][kAmxRows][kLanes<Policy>];
  _tile_stored(0, sums[0], 64);
  if constexpr (vectors == 2) _tile_stored(1, sums[1], 64);
  if constexpr (blocks == 2) _tile_stored(2, sums[2], 64);
  if constexpr (blocks == 2 && vectors == 2) _tile_stored(3, sums[3], 64);
  for (int b = 0; b < blocks; b++) {
    for (int64_t p = 0; p < (b == 0 ? amx.first : amx.second); p++) {
      auto* result = row.result + b * amx.next_result + p * row.result_step;
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

#endif  // GROUPED_CONV_AMX_H_
