// The packed masks of the tokens that each row may draw.
#pragma once

#include <optional>

#include "tensor_view.h"

namespace diffusion_runtime {

struct AllowedWords {
  const std::uint32_t* first;  // null: every token
  std::int64_t stride;         // from one row to the next, in words
  const std::uint32_t* operator()(std::int64_t row) const { return first != nullptr ? first + row * stride : nullptr; }
};

inline std::int64_t parts_of(std::int64_t vocab, std::int64_t size) { return (vocab + size - 1) / size; }

// Throws unless `allowed` is [rows, words of vocab] on the CPU, with stride 1 along the words.
inline AllowedWords words_of(const std::optional<TensorView>& allowed, std::int64_t rows, std::int64_t vocab) {
  if (!allowed) return {nullptr, 0};
  const std::int64_t words = parts_of(vocab, 32);
  check(allowed->is_cpu() && allowed->ndim() == 2 && allowed->size(0) == rows && allowed->size(1) == words &&
            (words == 1 || allowed->stride(1) == 1),
        "allowed must be [", rows, ", ", words, "] with stride 1 along the words, got ", allowed->shape());
  return {reinterpret_cast<const std::uint32_t*>(allowed->data<const std::int32_t>()), allowed->stride(0)};
}

}  // namespace diffusion_runtime
