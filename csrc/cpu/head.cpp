#include "head.h"

#include "allowed_words.h"
#include "head_row.h"
#include "instruction_set.h"

namespace diffusion_runtime {
namespace {

bool draws(const RowArgument<float>& temperature) {
  if (const float* value = std::get_if<float>(&temperature)) return *value > 0;
  const TensorView& values = std::get<TensorView>(temperature);
  for (std::int64_t r = 0; r < values.numel(); ++r)
    if (values.data<const float>()[r] > 0) return true;
  return false;
}

// HeadPart[rows][chunks], then float[rows][tiles] if a row draws.
struct Workspace {
  HeadPart* parts;
  float* tile_masses;
  std::int64_t num_chunks, num_tiles;

  Workspace(const TensorView& memory, std::int64_t rows, std::int64_t vocab, const RowArgument<float>& temperature)
      : parts(reinterpret_cast<HeadPart*>(memory.data<std::uint8_t>())),
        tile_masses(nullptr),
        num_chunks(parts_of(vocab, kChunk)),
        num_tiles(parts_of(vocab, kTile)) {
    const std::int64_t bytes = head_workspace(rows, vocab, temperature);
    check(memory.is_cpu() && memory.is_contiguous() && memory.numel() == bytes, "the workspace must have ", bytes,
          " bytes, got ", memory.shape());
    if (draws(temperature)) tile_masses = reinterpret_cast<float*>(parts + rows * num_chunks);
  }
};

float draw_scale(float temperature) { return temperature > 0 ? scale_of_temperature(temperature) : 0; }

}  // namespace

std::int64_t head_workspace(std::int64_t rows, std::int64_t vocab, const RowArgument<float>& temperature) {
  const auto part_bytes = static_cast<std::int64_t>(sizeof(HeadPart)), mass_bytes = std::int64_t{sizeof(float)};
  return rows * (parts_of(vocab, kChunk) * part_bytes + (draws(temperature) ? parts_of(vocab, kTile) * mass_bytes : 0));
}

void read_head_tile(const TensorView& logits, std::int64_t first, std::int64_t vocab,
                    const RowArgument<float>& temperature, const RowArgument<float>& statistics_temperature,
                    float softcap, const std::optional<TensorView>& allowed, const TensorView& workspace,
                    const std::string& instruction_set) {
  const auto read_head_chunk = OF_INSTRUCTION_SET(find_instruction_set(instruction_set), read_head_chunk);
  check(logits.is_cpu() && logits.ndim() == 2 && logits.is_contiguous(),
        "the logits of a tile must be contiguous [rows, n] on the CPU, got ", logits.shape());
  const std::int64_t rows = logits.size(0), n = logits.size(1);
  check(first >= 0 && first % kChunk == 0 && first + n <= vocab && (n % kChunk == 0 || first + n == vocab),
        "a tile must begin and end at a multiple of ", kChunk, " or the end of the vocabulary, got ", n,
        " tokens from ", first, " of ", vocab);
  const LogitType type = logit_type(logits.dtype());
  const std::int64_t bytes = type == LogitType::Float32 ? 4 : 2;
  const auto temperatures = row_setting("temperature", temperature, logits, rows);
  const auto statistics_temperatures = row_setting("statistics_temperature", statistics_temperature, logits, rows);
  const AllowedWords words = words_of(allowed, rows, vocab);
  const Workspace kept(workspace, rows, vocab, temperature);
  const char* const source = static_cast<const char*>(logits.raw_data());
  const std::int64_t num_chunks = parts_of(n, kChunk);

#pragma omp parallel for collapse(2) if (rows * n > (1 << 15))
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < num_chunks; ++c) {
      const std::int64_t at = c * kChunk, token = first + at;
      const RowScales scales{scale_of_temperature(statistics_temperatures[r]), draw_scale(temperatures[r]), softcap};
      read_head_chunk({source + (r * n + at) * bytes, type, static_cast<int>(n - at < kChunk ? n - at : kChunk), token,
                       words(r), scales, kept.parts + r * kept.num_chunks + token / kChunk,
                       scales.draw > 0 ? kept.tile_masses + r * kept.num_tiles + token / kTile : nullptr});
    }
  }
}

void sample_head(const TensorView& hidden, const TensorView& weight, const std::optional<TensorView>& bias,
                 const RowArgument<float>& temperature, const RowArgument<std::int64_t>& seed,
                 const std::optional<TensorView>& position, const RowArgument<std::int64_t>& step,
                 const RowArgument<float>& statistics_temperature, float softcap,
                 const std::optional<TensorView>& allowed, const TensorView& workspace, const TensorView& ids,
                 const TensorView& statistics, const std::string& instruction_set) {
  const auto sample_head_row = OF_INSTRUCTION_SET(find_instruction_set(instruction_set), sample_head_row);
  check(hidden.is_cpu() && hidden.ndim() == 2 && hidden.is_contiguous(),
        "hidden must be contiguous [rows, dim] on the CPU, got ", hidden.shape());
  const std::int64_t rows = hidden.size(0), dim = hidden.size(1), vocab = weight.size(0);
  check(weight.is_cpu() && weight.ndim() == 2 && weight.size(1) == dim && weight.dtype() == hidden.dtype(),
        "weight must be [vocab, ", dim, "] ", hidden.dtype(), " on the CPU, got ", weight.dtype(), " ", weight.shape());
  if (bias) check_rows("bias", *bias, hidden, vocab);
  check(!bias || bias->dtype() == hidden.dtype(), "bias must be ", hidden.dtype());
  const auto temperatures = row_setting("temperature", temperature, hidden, rows);
  const auto seeds = row_setting("seed", seed, hidden, rows);
  const auto steps = row_setting("step", step, hidden, rows);
  const auto statistics_temperatures = row_setting("statistics_temperature", statistics_temperature, hidden, rows);
  check(position || !draws(temperature), "a draw needs a position");
  if (position) check_rows("position", *position, hidden, rows);
  check_rows("ids", ids, hidden, 2 * rows);
  check_rows("statistics", statistics, hidden, 5 * rows);
  const AllowedWords words = words_of(allowed, rows, vocab);
  const Workspace kept(workspace, rows, vocab, temperature);
  const LogitType type = logit_type(hidden.dtype());
  const std::int64_t row_bytes = dim * (type == LogitType::Float32 ? 4 : 2);
  const auto* const positions = position ? position->data<const std::int64_t>() : nullptr;
  auto* const token = ids.data<std::int64_t>();
  auto* const result = statistics.data<float>();

#pragma omp parallel for schedule(dynamic) if (rows > 1)
  for (std::int64_t r = 0; r < rows; ++r) {
    HeadRow row{kept.parts + r * kept.num_chunks,
                kept.tile_masses == nullptr ? nullptr : kept.tile_masses + r * kept.num_tiles,
                vocab,
                {scale_of_temperature(statistics_temperatures[r]), draw_scale(temperatures[r]), softcap},
                {0, 0},
                type,
                dim,
                static_cast<const char*>(hidden.raw_data()) + r * row_bytes,
                weight.raw_data(),
                {weight.stride(0), weight.stride(1)},
                bias ? bias->raw_data() : nullptr,
                words(r)};
    if (row.scales.draw > 0)
      row.uniforms = philox_uniforms(static_cast<std::uint64_t>(seeds[r]), static_cast<std::uint32_t>(positions[r]),
                                     static_cast<std::uint32_t>(steps[r]), kDrawToken);
    const RowSample sample = sample_head_row(row);
    token[r] = sample.token;
    token[rows + r] = sample.argmax;
    const RowResult& s = sample.statistics;
    const float values[] = {s.logprob, s.confidence, s.margin, s.entropy, s.logsumexp};
    for (int i = 0; i < 5; ++i) result[i * rows + r] = values[i];
  }
}

}  // namespace diffusion_runtime
