// The plan of one call in plain numbers: what is computed, and how the work is divided into tiles,
// chunks and vectors. plan.cc fills it in, and the code of every instruction set reads it.
//
// Every call has two spatial dimensions, "rows" and "columns"; a 1-D convolution has one row.
// Arrays are (batch, rows, columns, features). Kernels are (rows, columns, features, features): the
// inputs of a group and the outputs of all groups of the forward convolution.
#ifndef GROUPED_CONV_JOB_H_
#define GROUPED_CONV_JOB_H_

#include <cstdint>

// The code of several instruction sets shares the functions of this file. They are always inlined:
// if the linker had to pick one of several copies, it might pick AVX-512 code for an older CPU.
#define INLINE inline __attribute__((always_inline))

namespace grouped_conv {

// Packed arrays begin at a cache line.
constexpr int64_t kAlignment = 64;

// The number of blocks of size `block` that cover `size` elements.
INLINE int64_t CeilDiv(int64_t size, int64_t block) { return (size + block - 1) / block; }

// The size of equal blocks of at most `most` elements. 10 elements in blocks of at most 4 are three
// blocks, so each has 4, 4 and 2; in blocks of at most 6 they are two blocks of 5.
INLINE int64_t Balanced(int64_t size, int64_t most) { return CeilDiv(size, CeilDiv(size, most)); }

INLINE int64_t Aligned(int64_t bytes) { return CeilDiv(bytes, kAlignment) * kAlignment; }

// The results residue, residue + period, ... (`count` of them) along one dimension. All of them see
// the same taps of the kernel: tap, tap + tap_step, ... (`taps` of them).
//
// Example: the input's gradient for stride 2, three taps and padding 1 has two phases. The even
// results q = 2j see tap 1 at element j of the output's gradient. The odd results q = 2j + 1 see
// tap 2 at element j and tap 0 at element j + 1.
//
// The fields first, gap and step count packed positions (see `Axis`): result j reads through its
// tap number i the position first + i * gap + j * step. All three are zero or positive.
struct Phase {
  int64_t residue, period, count;
  int64_t taps, tap, tap_step;
  int64_t first, gap, step;
};

// One spatial dimension. Only the positions low, low + grain, low + 2 * grain, ... of the operand
// are read and packed; positions outside the operand count as zeros.
//
// Example: stride 4, three taps with dilation 2 and padding 1 read the elements 4q - 1, 4q + 1 and
// 4q + 3. So low is -1 and grain is 2; in packed positions step is 2, gap is 1 and span is 3.
struct Axis {
  int64_t operand, results;  // Sizes.
  const Phase* phases;       // The phase with the most results comes first.
  int64_t phase_count;
  int64_t low, grain;
  int64_t span;         // Positions that result j of all phases together reads.
  int64_t step;         // Positions from result j to j + 1, in every phase.
  int64_t tile, tiles;  // Results of the largest phase in a tile, and the number of tiles.

  // Returns how many positions `results` neighboring results of each phase read.
  INLINE int64_t positions(int64_t results) const { return (results - 1) * step + span; }
};

// How the features of groups lie in the lanes of vectors.
enum class Layout {
  // A vector holds several groups with as many inputs as outputs, a power of two. The vector of
  // inputs is rotated within each group, once for each input:
  //   inputs  a0 a1 a2 a3 | b0 b1 b2 b3      rotated by 1  a1 a2 a3 a0 | b1 b2 b3 b0
  //   sums    A0 A1 A2 A3 | B0 B1 B2 B3  +=  rotated inputs * weights (a1 -> A0) (a2 -> A1) ...
  kRotate,
  // A vector holds several groups with any number of inputs. Each input is packed once per output:
  //   inputs  a0 a0 a0 | b0 b0 b0,  a1 a1 a1 | b1 b1 b1      sums  A0 A1 A2 | B0 B1 B2
  kSpread,
  // One group has one or more vectors; each input is broadcast to all lanes.
  kBroadcast,
};

struct Job {
  // `inputs` and `outputs` are features per group: those of the operand, which are summed over, and
  // those of the other end of the convolution. The input's gradient exchanges the two.
  int64_t batch, groups, inputs, outputs;
  Axis axes[2];

  // Strides in the caller's kernel: from tap to tap along both axes, and from feature to feature.
  int64_t tap_strides[2], input_stride, group_stride, output_stride;

  Layout layout;
  int64_t lanes;             // Sums in a vector.
  int64_t vectors;           // Vectors of outputs of all groups.
  int64_t groups_in_vector;  // 1 for kBroadcast.
  int64_t vectors_in_group;  // 1 for kRotate and kSpread.
  int64_t terms;          // Vectors of weights for one tap: one for each input or pair of inputs.
  int64_t panel_size;     // Packed elements of a panel in one pixel (see `panel_of`).
  int64_t taps;           // Taps that any phase sees.
  int64_t chunk, chunks;  // Vectors that one task computes, and the number of such chunks.
  bool chunks_first;      // Whether the task number counts chunks in its outermost digit.

  // Rows of results that are computed together. Their window of packed rows then moves down, so
  // that each row of the operand is packed once for all results that read it.
  int64_t rows_at_once;

  int64_t slices;  // For the kernel's gradient: separate sums, each over a part of the tiles.

  const void* operand;  // Read at shifted positions.
  const void* other;    // The kernel, or the output's gradient.
  void* result;
  void* packed;           // Weights [vectors, taps, terms, lanes], or `slices` such arrays of sums.
  int64_t scratch_bytes;  // For one worker.

  INLINE int64_t window_rows() const { return axes[0].positions(rows_at_once); }

  // A panel holds the packed inputs of one pixel for one vector: those of the vector's groups. The
  // vectors of one wide group share a panel.
  INLINE int64_t panel_of(int64_t vector) const { return vector / vectors_in_group; }

  // Returns the elements from pixel to pixel of a window. Pixels 1 KiB apart would compete for the
  // same few sets of the cache, so such a pixel gets one more cache line.
  INLINE int64_t pixel_size(int64_t panels, int64_t element_bytes) const {
    int64_t size = panels * panel_size;
    return size * element_bytes % 1024 == 0 ? size + kAlignment / element_bytes : size;
  }

  // Returns the packed weights of one vector of outputs.
  INLINE int64_t vector_size() const { return taps * terms * lanes; }

  INLINE int64_t first_output(int64_t vector) const {
    return layout == Layout::kBroadcast
               ? vector / vectors_in_group * outputs + vector % vectors_in_group * lanes
               : vector * groups_in_vector * outputs;
  }

  // Returns how many lanes of a vector are outputs; the last vector may be partly empty.
  INLINE int64_t valid_lanes(int64_t vector) const {
    if (layout == Layout::kBroadcast) {
      int64_t left = outputs - vector % vectors_in_group * lanes;
      return left < lanes ? left : lanes;
    }
    int64_t left = groups - vector * groups_in_vector;
    return (left < groups_in_vector ? left : groups_in_vector) * outputs;
  }
};

}  // namespace grouped_conv

#endif  // GROUPED_CONV_JOB_H_
