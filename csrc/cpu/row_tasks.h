// How threads share the rows and columns of a product.
#pragma once

#include <cstdint>

namespace diffusion_runtime {

constexpr std::int64_t kRowsOfTask = 36;  // a block of tokens is one part: one thread alone reads its share of a matrix
constexpr std::int64_t kColumnsOfTask = 32;
constexpr std::int64_t kManyProducts = 1 << 17;  // from which on threads pay

inline std::int64_t parts_of(std::int64_t whole, std::int64_t most) { return (whole + most - 1) / most; }

// One of `parts` that are as even as can be.
struct Part {
  std::int64_t first, count;
  Part(std::int64_t whole, std::int64_t parts, std::int64_t number)
      : first(whole * number / parts), count(whole * (number + 1) / parts - first) {}
};

// Calls run(rows, columns) for all of them, task by task; within a parallel region, whose threads wait for each other.
template <class Run>
void for_tasks(std::int64_t rows, std::int64_t columns, const Run& run) {
  const std::int64_t parts = parts_of(rows, kRowsOfTask), blocks = parts_of(columns, kColumnsOfTask);
#pragma omp for collapse(2) schedule(dynamic)
  for (std::int64_t block = 0; block < blocks; ++block)
    for (std::int64_t part = 0; part < parts; ++part) run(Part(rows, parts, part), Part(columns, blocks, block));
}

}  // namespace diffusion_runtime
