#include "instruction_set.h"

#include <stdexcept>

namespace diffusion_runtime {
namespace {

struct Candidate {
  const char* name;
  InstructionSet set;
  bool usable;
};

// Best first. Every feature that a unit was compiled with is asked for.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = {
#ifndef DIFFUSION_RUNTIME_PORTABLE_ONLY
      {"avx512", InstructionSet::Avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("avx2")},
      {"avx2", InstructionSet::Avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") != 0},
#endif
      {"portable", InstructionSet::Portable, true},
  };
  return all;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.usable) names.emplace_back(candidate.name);
  return names;
}

InstructionSet find_instruction_set(const std::string& name) {
  for (const Candidate& candidate : candidates())
    if (candidate.usable && name == candidate.name) return candidate.set;
  throw std::invalid_argument("the instruction set " + name + " cannot run here");
}

}  // namespace diffusion_runtime
