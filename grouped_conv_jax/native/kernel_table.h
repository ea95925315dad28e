// The table of functions that one instruction set offers for one element type, and the sizes that
// plan.cc must know of them. kernel_table.cc fills the tables in.
#ifndef GROUPED_CONV_KERNEL_TABLE_H_
#define GROUPED_CONV_KERNEL_TABLE_H_

#include <cstdint>

#include "job.h"

namespace grouped_conv {

// kBfloat16 is widened to 32 bits when it is packed; kBfloat16Pair and kBfloat16Amx are multiplied
// as they are, by instructions that only some processors have.
enum class ElementType { kFloat32, kFloat64, kBfloat16, kBfloat16Pair, kBfloat16Amx };

struct KernelTable {
  int64_t lanes, element_bytes;
  int64_t pair;              // Stored elements in a packed one: 2 for kBfloat16Pair and -Amx.
  int64_t largest_rotation;  // The widest groups that Layout::kRotate takes.
  int64_t vectors_at_once;   // Vectors of one group that a register kernel computes together.
  int64_t sums_at_once;      // Vectors of sums that a register kernel keeps in registers.
  int64_t amx_rows;          // Pixels in an AMX register; 0 without AMX.
  void (*pack_weights)(const Job&, int64_t vector);
  void (*correlate)(const Job&, int64_t task, void* scratch);
  void (*sum_products)(const Job&, int64_t task, void* scratch);
  void (*unpack_weights)(const Job&, int64_t vector);
};

}  // namespace grouped_conv

#endif  // GROUPED_CONV_KERNEL_TABLE_H_
