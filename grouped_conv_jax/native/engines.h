// The instruction sets that the kernels are compiled for, and which of them is used.
#ifndef GROUPED_CONV_ENGINES_H_
#define GROUPED_CONV_ENGINES_H_

#include "job.h"

namespace grouped_conv {

// The best engine of this processor, or the best of those that are not forbidden (see
// `UseInstructionSet`); null if there is none, for pairs only.
const Engine* EngineFor(Type type);

// The name of the instruction set number `i`, the best one first; an empty one if this processor
// does not have it, null after the last.
const char* NameOfInstructionSet(int i);

// From now on this one is the best that is used.
void UseInstructionSet(int i);

}  // namespace grouped_conv

#endif  // GROUPED_CONV_ENGINES_H_
