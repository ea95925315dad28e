// The register kernels, which are the inner loops: they compute one block of a row of results, or
// the sums of products of one tile.
//
// All sums stay in registers. A row of results takes `pixels` x `vectors` registers, and each
// vector of weights is loaded once for all pixels:
//
//                    outputs 0..15   16..31
//     pixel 0        sum             sum         += input of pixel 0 x weights
//     pixel 1        sum             sum         += input of pixel 1 x weights
//     ...                                           (up to 14 pixels with 32 registers)
//
// The kernel's gradient holds (taps x inputs) x vectors, and each vector of the output's gradient
// is loaded once for all taps and inputs.
#ifndef GROUPED_CONV_REGISTER_KERNELS_H_
#define GROUPED_CONV_REGISTER_KERNELS_H_

#include "job.h"
#include "vectors.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

// The arguments of a kernel for one row of results, or for two rows that see the same taps.
//
// Tap (i, j) of result p begins at operand[lines[i * line_gap] + j * column_gap + p * step]. From
// there on `run` packed elements are multiplied: the inputs of one tap, or those of several taps
// that follow each other in the window. A second row of results reads `next_line` lines further.
template <class Policy>
struct RowArguments {
  const typename Policy::Element *operand, *weights;
  const int64_t* lines;      // Where the window's rows begin in `operand`.
  int64_t line_gap;          // In rows of the window.
  int64_t rows, columns;     // Taps.
  int64_t run;               // In packed elements (kBroadcast) or vectors (kSpread).
  int64_t column_gap, step;  // In packed elements.
  int64_t weights_row, weights_column, weights_vector;  // In packed elements.
  typename Policy::Stored* result;
  int64_t result_step;
  int64_t next_line, next_result;  // From the first row of results to the second one.
  int32_t lanes;                   // Outputs in the last vector.
};

// Stores the sums of `pixels` pixels from number `first` on.
template <class Policy, int first, int pixels, int all, int vectors>
INLINE void StoreRow(const RowArguments<Policy>& row, typename Policy::Stored* result,
                     typename Policy::Sum (&sums)[all][vectors]) {
  constexpr int lanes = kLanes<Policy>;
  UNROLL for (int p = 0; p < pixels; p++) {
    UNROLL for (int v = 0; v < vectors; v++) {
      StoreSums<Policy>(result + p * row.result_step + v * lanes, sums[first + p][v],
                        v == vectors - 1 ? row.lanes : lanes);
    }
  }
}

// The addresses of pixels that are a constant distance apart. A register for each pixel would be
// too many, so every fifth pixel has one. An x86 address can add another register times 1, 2 or 4:
//   pixels 5b + 0, 1, 2, 4 = base b + (0, 1, 2, 4) * step        pixel 5b + 3 = base b + three_
// The empty `asm` statements hide these relations, because the compiler would undo them.
template <class T, int pixels>
class SpacedPixels {
 public:
  INLINE SpacedPixels(const T* first, int64_t step) : step_(step * sizeof(T)), three_(3 * step_) {
    UNROLL for (int b = 0; b < kBases; b++) {
      bases_[b] = reinterpret_cast<const char*>(first) + 5 * b * step_;
      asm("" : "+r"(bases_[b]));
    }
    asm("" : "+r"(three_));
  }
  INLINE const T* operator[](int p) const {
    const char* base = bases_[p / 5];
    return reinterpret_cast<const T*>(p % 5 == 3 ? base + three_ : base + p % 5 * step_);
  }
  INLINE void Advance(int64_t elements) {
    UNROLL for (int b = 0; b < kBases; b++) bases_[b] += elements * sizeof(T);
  }

 private:
  static constexpr int kBases = (pixels + 4) / 5;
  const char* bases_[kBases];
  int64_t step_, three_;
};

// Reads an input: one element for all lanes (kBroadcast), or a vector (kSpread).
template <class Policy, bool is_scalar>
struct Input {
  static constexpr int size = is_scalar ? 1 : kLanes<Policy>;
  static INLINE Vector<typename Policy::Element> Read(const typename Policy::Element* from) {
    using V = Vector<typename Policy::Element>;
    if constexpr (is_scalar) {
      return Broadcast<V>(*from);
    } else {
      return Load<V>(from);
    }
  }
};

// Computes one or two rows of results (kBroadcast and kSpread).
template <class Policy, bool is_scalar, int results, int pixels, int vectors>
void CorrelateRuns(const RowArguments<Policy>& row) {
  using V = Vector<typename Policy::Element>;
  using In = Input<Policy, is_scalar>;
  using Pixels = SpacedPixels<typename Policy::Element, pixels>;
  constexpr int all = results * pixels;
  typename Policy::Sum sums[all][vectors];
  UNROLL for (int p = 0; p < all; p++) {
    UNROLL for (int v = 0; v < vectors; v++) sums[p][v] = typename Policy::Sum{};
  }
  for (int64_t i = 0; i < row.rows; i++) {
    for (int64_t j = 0; j < row.columns; j++) {
      const auto* column = row.operand + j * row.column_gap;
      const int64_t* line = row.lines + i * row.line_gap;
      Pixels first(column + line[0], row.step);
      Pixels second(column + line[results == 2 ? row.next_line : 0], row.step);
      const auto* weights = row.weights + i * row.weights_row + j * row.weights_column;
      for (int64_t k = 0; k < row.run; k++, weights += kLanes<Policy>) {
        V w[vectors];
        UNROLL for (int v = 0; v < vectors; v++) w[v] = Load<V>(weights + v * row.weights_vector);
        UNROLL for (int p = 0; p < all; p++) {
          V x = In::Read(p < pixels ? first[p] : second[p - pixels]);
          UNROLL for (int v = 0; v < vectors; v++) Policy::MultiplyAdd(sums[p][v], x, w[v]);
        }
        first.Advance(In::size);
        if (results == 2) second.Advance(In::size);
      }
    }
  }
  StoreRow<Policy, 0, pixels>(row, row.result, sums);
  if constexpr (results == 2) {
    StoreRow<Policy, pixels, pixels>(row, row.result + row.next_result, sums);
  }
}

// Adds the products of one input of each group to all pixels: the one `rotation` lanes further.
template <class Policy, int width, int rotation, int pixels>
INLINE void AddRotation(typename Policy::Sum (&sums)[pixels][1],
                        const typename Policy::Element* operand, int64_t step,
                        const typename Policy::Element* weights) {
  using V = Vector<typename Policy::Element>;
  V w = Load<V>(weights + rotation * kLanes<Policy>);
  UNROLL for (int p = 0; p < pixels; p++) {
    V x = Rotated<width, rotation>(Load<V>(operand + p * step));
    Policy::MultiplyAdd(sums[p][0], x, w);
  }
}

// Does the same for `taps` neighboring columns of the kernel. The kernel slides along the row: each
// pixel is loaded and rotated once, for all results that see it. Pixel i of the operand is seen by
// result i - t through tap t.
template <class Policy, int width, int rotation, int pixels, int taps>
INLINE void SlideRotation(typename Policy::Sum (&sums)[pixels][1],
                          const typename Policy::Element* operand, int64_t step,
                          const typename Policy::Element* weights, int64_t weights_column) {
  using V = Vector<typename Policy::Element>;
  constexpr int lanes = kLanes<Policy>;
  V w[taps];
  UNROLL for (int t = 0; t < taps; t++) {
    w[t] = Load<V>(weights + t * weights_column + rotation * lanes);
  }
  UNROLL for (int i = 0; i < pixels + taps - 1; i++) {
    V x = Rotated<width, rotation>(Load<V>(operand + i * step));
    UNROLL for (int t = 0; t < taps; t++) {
      if (0 <= i - t && i - t < pixels) Policy::MultiplyAdd(sums[i - t][0], x, w[t]);
    }
  }
}

// Computes a row of results (kRotate). If the kernel slides, it has `taps` columns; else taps is 0.
template <class Policy, int width, int taps, int pixels, int... rotation>
INLINE void CorrelateAllRotations(const RowArguments<Policy>& row,
                                  std::integer_sequence<int, rotation...>) {
  typename Policy::Sum sums[pixels][1];
  UNROLL for (int p = 0; p < pixels; p++) sums[p][0] = typename Policy::Sum{};
  for (int64_t i = 0; i < row.rows; i++) {
    const auto* operand = row.operand + row.lines[i * row.line_gap];
    const auto* weights = row.weights + i * row.weights_row;
    if constexpr (taps > 0) {
      (SlideRotation<Policy, width, rotation, pixels, taps>(sums, operand, row.step, weights,
                                                            row.weights_column),
       ...);
    } else {
      for (int64_t j = 0; j < row.columns; j++) {
        (AddRotation<Policy, width, rotation, pixels>(sums, operand + j * row.column_gap, row.step,
                                                      weights + j * row.weights_column),
         ...);
      }
    }
  }
  StoreRow<Policy, 0, pixels>(row, row.result, sums);
}
template <class Policy, int width, int taps, int pixels>
void CorrelateRotations(const RowArguments<Policy>& row) {
  constexpr int rotations = width / (width > 1 ? Policy::pair : 1);
  CorrelateAllRotations<Policy, width, taps, pixels>(row,
                                                     std::make_integer_sequence<int, rotations>{});
}

// The arguments of a kernel that multiplies the operand with the output's gradient and adds the sum
// over some rows of a tile to `sums`.
//
// Pixel (r, c) of the output's gradient is at other[r * other_row + c * other_column]. Through tap
// (t, u) it sees operand[lines[r * line_step + t * line_gap] + c * column_step + u * column_gap].
template <class Policy>
struct ProductArguments {
  const typename Policy::Element *operand, *other;
  int64_t rows, columns;            // Pixels of `other`.
  const int64_t* lines;             // Where the window's rows begin in `operand`.
  int64_t line_step, line_gap;      // In rows of the window.
  int64_t column_step, column_gap;  // In packed elements.
  int64_t input_step;               // From input to input of a run; 1 for kBroadcast.
  int64_t other_row, other_column;  // In packed elements.
  Number<Policy>* sums;
  int64_t sums_row, sums_column, sums_vector;
};

// Sums the products of `inputs` neighboring inputs of a run, for `tap_rows` rows of taps.
template <class Policy, bool is_scalar, int tap_rows, int inputs, int vectors>
void SumRuns(const ProductArguments<Policy>& p) {
  using V = Vector<typename Policy::Element>;
  using In = Input<Policy, is_scalar>;
  using Sum = typename Policy::Sum;
  constexpr int lanes = kLanes<Policy>;
  Sum sums[tap_rows][inputs][vectors];
  auto each = [&](auto function) INLINE_LAMBDA {
    UNROLL for (int t = 0; t < tap_rows; t++) {
      UNROLL for (int i = 0; i < inputs; i++) {
        UNROLL for (int v = 0; v < vectors; v++) {
          function(sums[t][i][v], p.sums + t * p.sums_row + i * lanes + v * p.sums_vector);
        }
      }
    }
  };
  each([](Sum& sum, auto* at) INLINE_LAMBDA { sum = Load<Sum>(at); });
  for (int64_t r = 0; r < p.rows; r++) {
    const int64_t* lines = p.lines + r * p.line_step;
    const typename Policy::Element* operands[tap_rows];
    UNROLL for (int t = 0; t < tap_rows; t++) operands[t] = p.operand + lines[t * p.line_gap];
    const auto* other = p.other + r * p.other_row;
    for (int64_t c = 0; c < p.columns; c++, other += p.other_column) {
      V y[vectors];
      UNROLL for (int v = 0; v < vectors; v++) y[v] = Load<V>(other + v * lanes);
      UNROLL for (int t = 0; t < tap_rows; t++) {
        UNROLL for (int i = 0; i < inputs; i++) {
          V x = In::Read(operands[t] + c * p.column_step + i * (is_scalar ? 1 : p.input_step));
          UNROLL for (int v = 0; v < vectors; v++) Policy::MultiplyAdd(sums[t][i][v], x, y[v]);
        }
      }
    }
  }
  each([](Sum& sum, auto* at) INLINE_LAMBDA { Store(at, sum); });
}

// Adds the products with the output's gradient, rotated within each group, for `taps` columns of
// taps (kRotate). The output's gradient is rotated because all taps share it.
template <class Policy, int width, int rotation, int taps>
INLINE void SumRotation(typename Policy::Sum (&sums)[taps][width],
                        Vector<typename Policy::Element> (&x)[taps],
                        Vector<typename Policy::Element> y) {
  y = Rotated<width, rotation>(y);
  UNROLL for (int t = 0; t < taps; t++) Policy::MultiplyAdd(sums[t][rotation], x[t], y);
}
template <class Policy, int width, int taps, int... rotation>
INLINE void SumAllRotations(const ProductArguments<Policy>& p,
                            std::integer_sequence<int, rotation...>) {
  using V = Vector<typename Policy::Element>;
  using Sum = typename Policy::Sum;
  constexpr int lanes = kLanes<Policy>;
  Sum sums[taps][width];
  UNROLL for (int t = 0; t < taps; t++) {
    UNROLL for (int i = 0; i < width; i++) {
      sums[t][i] = Load<Sum>(p.sums + t * p.sums_column + i * lanes);
    }
  }
  for (int64_t r = 0; r < p.rows; r++) {
    const auto* operand = p.operand + p.lines[r * p.line_step];
    const auto* other = p.other + r * p.other_row;
    for (int64_t c = 0; c < p.columns; c++, operand += p.column_step, other += p.other_column) {
      V x[taps];
      UNROLL for (int t = 0; t < taps; t++) x[t] = Load<V>(operand + t * p.column_gap);
      V y = Load<V>(other);
      (SumRotation<Policy, width, rotation, taps>(sums, x, y), ...);
    }
  }
  UNROLL for (int t = 0; t < taps; t++) {
    UNROLL for (int i = 0; i < width; i++) {
      Store(p.sums + t * p.sums_column + i * lanes, sums[t][i]);
    }
  }
}
template <class Policy, int width, int taps>
void SumRotations(const ProductArguments<Policy>& p) {
  SumAllRotations<Policy, width, taps>(p, std::make_integer_sequence<int, width>{});
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_REGISTER_KERNELS_H_
