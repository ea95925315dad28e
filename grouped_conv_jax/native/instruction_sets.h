// The choice of the instruction set at run time: which ones were compiled, which ones this
// processor has, and which kernels a call uses.
#ifndef GROUPED_CONV_INSTRUCTION_SETS_H_
#define GROUPED_CONV_INSTRUCTION_SETS_H_

#include "kernel_table.h"

namespace grouped_conv {

// Returns the kernels of the best instruction set that this processor has and that is not better
// than the one named by `UseInstructionSet`. Returns null if none has this type, which can happen
// for kBfloat16Pair and kBfloat16Amx only.
const KernelTable* KernelsFor(ElementType type);

// Returns the name of instruction set `i`, where 0 is the best one. The name is empty if this
// processor does not have it, and null after the last one.
const char* NameOfInstructionSet(int i);

// Makes instruction set `i` the best one that later calls of this process use.
void UseInstructionSet(int i);

}  // namespace grouped_conv

#endif  // GROUPED_CONV_INSTRUCTION_SETS_H_
