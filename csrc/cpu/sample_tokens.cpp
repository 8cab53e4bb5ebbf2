#include "sample_tokens.h"

#include "allowed_words.h"
#include "instruction_set.h"
#include "sample_row.h"

namespace diffusion_runtime {
namespace {

struct Scratch {
  std::vector<RowPart> parts;
  std::vector<float> tile_maxima;
};

}  // namespace

void sample_tokens_cpu(const TensorView& logits, const std::optional<TensorView>& masked,
                       const RowArgument<float>& temperature, const RowArgument<std::int64_t>& seed,
                       const std::optional<TensorView>& position, const RowArgument<std::int64_t>& step,
                       const RowArgument<float>& statistics_temperature, float softcap,
                       const std::optional<TensorView>& allowed, const RowArgument<std::int64_t>& top_k,
                       const RowArgument<float>& top_p, const RowArgument<float>& min_p, bool restricted,
                       const TensorView& ids, const TensorView& statistics, const std::string& instruction_set) {
  const auto sample_row = OF_INSTRUCTION_SET(find_instruction_set(instruction_set), sample_row);
  check(logits.is_cpu(), "sample_tokens: logits must be on the CPU");
  check(logits.ndim() == 3 && logits.size(2) > 0 && (logits.size(2) == 1 || logits.stride(2) == 1),
        "sample_tokens: logits must be [outer, inner, vocab] with stride 1 along vocab, got ", logits.shape());
  const std::int64_t inner = logits.size(1), rows = logits.size(0) * inner, vocab = logits.size(2);
  check(vocab < (std::int64_t{1} << 31), "sample_tokens: vocab must be below 2^31, got ", vocab);
  const std::int64_t element_bytes = logits.dtype() == DType::Float32 ? 4 : 2;
  const LogitType type = logit_type(logits.dtype());

  const auto temperatures = row_setting("temperature", temperature, logits, rows);
  const auto seeds = row_setting("seed", seed, logits, rows);
  const auto steps = row_setting("step", step, logits, rows);
  const auto statistics_temperatures = row_setting("statistics_temperature", statistics_temperature, logits, rows);
  const auto top_ks = row_setting("top_k", top_k, logits, rows);
  const auto top_ps = row_setting("top_p", top_p, logits, rows);
  const auto min_ps = row_setting("min_p", min_p, logits, rows);
  const auto allowed_words = words_of(allowed, rows, vocab);
  if (masked) check_rows("masked", *masked, logits, rows);
  if (position) check_rows("position", *position, logits, rows);
  check_rows("ids", ids, logits, 2 * rows);
  check_rows("statistics", statistics, logits, 5 * rows);
  const bool* is_masked = masked ? masked->data<const bool>() : nullptr;
  const auto* positions = position ? position->data<const std::int64_t>() : nullptr;
  auto* const token = ids.data<std::int64_t>();
  auto* const result = statistics.data<float>();
  const char* const first = static_cast<const char*>(logits.raw_data());
  const std::int64_t outer_bytes = logits.stride(0) * element_bytes, inner_bytes = logits.stride(1) * element_bytes;

  const auto run_row = [&](std::int64_t r, Scratch& scratch) {
    RowSample sample{-1, -1, {0, 0, 0, 0, 0}};
    if (is_masked == nullptr || is_masked[r]) {
      const float t = temperatures[r];
      Row row{first + r / inner * outer_bytes + r % inner * inner_bytes,
              type,
              vocab,
              {scale_of_temperature(statistics_temperatures[r]), t > 0 ? scale_of_temperature(t) : 0, softcap},
              {0, 0},
              {allowed_words(r), top_ks[r], top_ps[r], min_ps[r], restricted},
              scratch.parts.data(),
              scratch.tile_maxima.data()};
      if (t > 0) {
        const std::int64_t at = positions != nullptr ? positions[r] : r % inner;
        row.uniforms = philox_uniforms(static_cast<std::uint64_t>(seeds[r]), static_cast<std::uint32_t>(at),
                                       static_cast<std::uint32_t>(steps[r]), kDrawToken);
      }
      sample = sample_row(row);
    }
    token[r] = sample.token;
    token[rows + r] = sample.argmax;
    const RowResult& s = sample.statistics;
    const float values[] = {s.logprob, s.confidence, s.margin, s.entropy, s.logsumexp};
    for (int i = 0; i < 5; ++i) result[i * rows + r] = values[i];
  };

  constexpr std::int64_t kWorthThreads = 1 << 15;  // logits; below, starting threads costs more than the work
#pragma omp parallel if (rows > 1 && rows * vocab > kWorthThreads)
  {
    Scratch scratch{std::vector<RowPart>(parts_of(vocab, kChunk)), std::vector<float>(parts_of(vocab, kTile))};
#pragma omp for schedule(dynamic)
    for (std::int64_t r = 0; r < rows; ++r) run_row(r, scratch);
  }
}

}  // namespace diffusion_runtime
