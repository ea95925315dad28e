// What one call computes, and how it is cut up: plain numbers, made by plan.cc, checked there, and
// read by the engines of all instruction sets.
//
// Two spatial dimensions; one is one row. Arrays are (batch, rows, columns, features), kernels
// (rows, columns, features of a group that are summed, features of the result).
#ifndef GROUPED_CONV_JOB_H_
#define GROUPED_CONV_JOB_H_

#include <cstdint>

// In each instruction set by itself: a function of one is not taken for that of another.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace grouped_conv {

// Packed arrays begin with a cache line.
constexpr int64_t kAlignment = 64;

// Along one dimension: the results residue, residue + period, ... (`count` of them), which see the
// same taps of the kernel: tap, tap + tap_step, ... (`taps` of them).
//
// The operand is read, and packed, at the positions low, low + grain, ... only (see `Axis`); in
// these, the j-th result reads through the i-th tap number first + i * gap + j * step. All are
// positive or zero; positions outside of the operand count as zeros.
struct Phase {
  int64_t residue, period, count;
  int64_t taps, tap, tap_step;
  int64_t first, gap, step;
};

// How groups lie in vectors.
enum class Mode {
  // Several groups in a vector, as many inputs as outputs, a power of two. A vector of inputs is
  // turned within each group, once for each input:
  //   inputs  a0 a1 a2 a3 | b0 b1 b2 b3      turned by 1  a1 a2 a3 a0 | b1 b2 b3 b0
  //   sums    A0 A1 A2 A3 | B0 B1 B2 B3  +=  that times the weights (a1 -> A0) (a2 -> A1) ...
  kRotate,
  // Several groups in a vector, any number of inputs: packed as one vector for each input,
  //   inputs  a0 a0 a0 | b0 b0 b0,  a1 a1 a1 | b1 b1 b1      sums  A0 A1 A2 | B0 B1 B2
  kSpread,
  // One group in one or more vectors; each input is broadcast to all lanes.
  kBroadcast,
};

struct Axis {
  int64_t operand, results;
  const Phase* phases;  // The largest first.
  int64_t phase_count;
  int64_t low, grain;   // What is read of the operand.
  int64_t span;         // Positions that one result of each phase reads together.
  int64_t step;         // From result to result: that of all phases.
  int64_t tile, tiles;  // Results of the largest phase in a tile, and tiles.

  // How many positions the results of a tile read.
  ALWAYS_INLINE int64_t positions(int64_t results) const { return (results - 1) * step + span; }
};

struct Job {
  int64_t batch, groups, inputs, outputs;  // The features are those of one group.
  Axis axes[2];

  // Distances in the kernel of the caller: from tap to tap along both axes, and from feature to
  // feature. What is summed over are the inputs, also in the gradient of the input.
  int64_t tap_strides[2], input_stride, group_stride, output_stride;

  // Blocks.
  Mode mode;
  int64_t lanes;             // Sums in a vector.
  int64_t vectors;           // Of outputs, in all.
  int64_t groups_in_vector;  // kRotate, kSpread; 1 otherwise.
  int64_t vectors_in_group;  // kBroadcast; 1 otherwise.
  int64_t terms;             // Vectors of weights for a tap: the inputs, or pairs of them.
  int64_t unit;              // Packed elements of a pixel, for a source (see `sources`).
  int64_t taps;              // That any phase sees.
  int64_t chunk, chunks;     // Vectors that are computed together, and how many times that is.
  bool chunks_first;         // Chunks in the outermost loop, since the weights of all are large.

  // Rows of results that are computed together from a window of rows of the operand, packed, which
  // then moves on: a row is packed once for all that reads it.
  int64_t rows_at_once;

  // Kernel's gradient only: independent sums of parts of the batch.
  int64_t slices;

  const void* operand;  // What is read at shifted positions.
  const void* other;    // The kernel, or the gradient of the output.
  void* result;
  void* packed;           // [vectors, taps, terms, lanes] weights; of sums one for each slice.
  int64_t scratch_bytes;  // For one worker.

  ALWAYS_INLINE int64_t window_rows() const { return axes[0].positions(rows_at_once); }

  // A source is what is packed together of the operand: a vector's groups, or a group.
  ALWAYS_INLINE int64_t source_of(int64_t vector) const { return vector / vectors_in_group; }
  // Elements from pixel to pixel of a window. Not a multiple of 1 KiB: neighbouring pixels would
  // all fall into the same few lines of a cache.
  ALWAYS_INLINE int64_t pixel_size(int64_t sources, int64_t element_bytes) const {
    int64_t size = sources * unit;
    return size * element_bytes % 1024 == 0 ? size + kAlignment / element_bytes : size;
  }
  ALWAYS_INLINE int64_t vector_size() const { return taps * terms * lanes; }
  ALWAYS_INLINE int64_t first_output(int64_t vector) const {
    return mode == Mode::kBroadcast
               ? vector / vectors_in_group * outputs + vector % vectors_in_group * lanes
               : vector * groups_in_vector * outputs;
  }
  // Lanes of a vector that are outputs.
  ALWAYS_INLINE int64_t valid_lanes(int64_t vector) const {
    if (mode == Mode::kBroadcast) {
      int64_t left = outputs - vector % vectors_in_group * lanes;
      return left < lanes ? left : lanes;
    }
    int64_t left = groups - vector * groups_in_vector;
    return (left < groups_in_vector ? left : groups_in_vector) * outputs;
  }
};

// The functions of one instruction set for one type of elements.
struct Engine {
  const char* name;
  int64_t lanes, element_bytes;
  int64_t pair;              // Stored elements in a packed one.
  int64_t largest_rotation;  // Width of the groups that kRotate takes.
  int64_t vectors_at_once;   // Of one group, that a kernel computes together.
  int64_t sums_at_once;      // Vectors of sums that a kernel keeps in registers.
  int64_t tile_rows;         // Pixels of a tile, if it multiplies tiles; else 0.
  void (*pack_weights)(const Job&, int64_t vector);
  void (*correlate)(const Job&, int64_t task, void* scratch);
  void (*sum_products)(const Job&, int64_t task, void* scratch);
  void (*unpack_weights)(const Job&, int64_t vector);
};

enum class Type { kFloat32, kFloat64, kBfloat16, kBfloat16Pair, kBfloat16Tile };

}  // namespace grouped_conv

#endif  // GROUPED_CONV_JOB_H_
