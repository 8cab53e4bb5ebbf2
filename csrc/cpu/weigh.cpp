#include "weigh.h"

#include <cstring>

#include "instruction_set.h"
#include "weigh_row.h"

namespace diffusion_runtime {

void weigh_cpu(const TensorView& logits, const RowArgument<float>& temperature, float softcap,
               const std::optional<TensorView>& masked, const TensorView& logsumexp, const TensorView& out,
               const std::string& instruction_set) {
  const auto weigh_row = OF_INSTRUCTION_SET(find_instruction_set(instruction_set), weigh_row);
  check(logits.is_cpu() && out.is_cpu(), "weigh: logits and out must be on the CPU");
  check(logits.ndim() == 3 && (logits.size(2) <= 1 || logits.stride(2) == 1),
        "weigh: logits must be [outer, inner, n] with stride 1 along n, got ", logits.shape());
  const std::int64_t inner = logits.size(1), rows = logits.size(0) * inner, n = logits.size(2);
  check(out.ndim() == 2 && out.size(0) == rows && out.size(1) == n && (n <= 1 || out.stride(1) == 1),
        "weigh: out must be [", rows, ", ", n, "] with stride 1 along the second, got ", out.shape());
  const LogitType type = logit_type(logits.dtype()), out_type = logit_type(out.dtype());
  const std::int64_t bytes = type == LogitType::Float32 ? 4 : 2, out_bytes = out_type == LogitType::Float32 ? 4 : 2;
  const auto temperatures = row_setting("temperature", temperature, logits, rows);
  if (masked) check_rows("masked", *masked, logits, rows);
  check_rows("logsumexp", logsumexp, logits, rows);
  const bool* is_masked = masked ? masked->data<const bool>() : nullptr;
  const auto* lse = logsumexp.data<const float>();
  const char* const source = static_cast<const char*>(logits.raw_data());
  char* const target = static_cast<char*>(out.raw_data());

  constexpr std::int64_t kPiece = 1 << 13;  // tokens, so that threads share a long row
  const std::int64_t pieces = (n + kPiece - 1) / kPiece;
#pragma omp parallel for collapse(2) if (rows * n > (1 << 15))
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t p = 0; p < pieces; ++p) {
      const std::int64_t first = p * kPiece, count = n - first < kPiece ? n - first : kPiece;
      char* const to = target + (r * out.stride(0) + first) * out_bytes;
      if (is_masked != nullptr && !is_masked[r]) {
        std::memset(to, 0, static_cast<std::size_t>(count * out_bytes));
        continue;
      }
      const std::int64_t at = r / inner * logits.stride(0) + r % inner * logits.stride(1) + first;
      weigh_row({source + at * bytes, type, count, temperatures[r], softcap, lse[r], to, out_type});
    }
  }
}

}  // namespace diffusion_runtime
