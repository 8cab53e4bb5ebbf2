// Which of the objects that were compiled for one instruction set is to run.
#pragma once

#include <string>
#include <vector>

namespace diffusion_runtime {

enum class InstructionSet { Avx512, Avx2, Portable };

// The names of those that can run here, the fastest first.
std::vector<std::string> instruction_sets();

// By name; std::invalid_argument if it cannot run here.
InstructionSet find_instruction_set(const std::string& name);

}  // namespace diffusion_runtime

// The function of that name in the namespace of an instruction set.
#ifdef DIFFUSION_RUNTIME_PORTABLE_ONLY
#define OF_INSTRUCTION_SET(set, function) (static_cast<void>(set), &portable::function)
#else
#define OF_INSTRUCTION_SET(set, function)              \
  ((set) == InstructionSet::Avx512 ? &avx512::function \
   : (set) == InstructionSet::Avx2 ? &avx2::function   \
                                   : &portable::function)
#endif
