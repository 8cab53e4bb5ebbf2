// One row of a call of sample_tokens, as every thread of its blocks sees it; its place in the workspace and its
// results.
#pragma once

#include "row_ops.cuh"

namespace diffusion_runtime {
namespace {

// The tests set smaller sizes, so that few tokens make many chunks.
#ifndef SAMPLE_TOKENS_CHUNK
#define SAMPLE_TOKENS_CHUNK 8192
#define SAMPLE_TOKENS_THREADS 128
#define SAMPLE_TOKENS_ROW_BLOCKS 65535
#endif
constexpr int kChunk = SAMPLE_TOKENS_CHUNK;
constexpr int kThreads = SAMPLE_TOKENS_THREADS;
constexpr int kMaxRowBlocks = SAMPLE_TOKENS_ROW_BLOCKS;  // of one row: the limit of gridDim.y

using ChunkPart = FoundPart;

template <class T>
struct Row : Reading {
  const T* logits;          // [vocab]
  const uint32_t* allowed;  // a bit for each token, or null: all are
  int vocab;

  __device__ __forceinline__ int length(int chunk) const { return min(kChunk, vocab - chunk * kChunk); }
  // One bit for each of the tokens from `token` up to the end of its word.
  __device__ __forceinline__ uint32_t allowed_from(int token) const {
    return allowed != nullptr ? __ldg(allowed + token / 32) >> token % 32 : ~0u;
  }
  // -inf if the token is not allowed or behind the end.
  __device__ __forceinline__ float allowed_logit(int token) const {
    return token < vocab && (allowed_from(token) & 1) ? to_float(__ldg(logits + token)) : -INFINITY;
  }
};

// Whether any row may be cut by the size of its logits.
inline bool has_cuts(const SampleTokens& op) {
  return op.top_k.values != nullptr || op.top_k.value != 0 || op.top_p.values != nullptr || op.top_p.value != 1 ||
         op.min_p.values != nullptr || op.min_p.value != 0;
}

// Whether the candidate of this row is left to restricted_draw. Otherwise the row is none the wiser of what limits
// others: statistics of its allowed tokens alone give its draw as well.
__device__ __forceinline__ bool draws_later(const SampleTokens& op, int64_t r) {
  if (op.allowed != nullptr && !op.restricted) return true;
  const int64_t top_k = at(op.top_k, r);
  return at(op.temperature, r) > 0 && ((top_k > 0 && top_k < op.vocab) || at(op.top_p, r) < 1 || at(op.min_p, r) > 0);
}

template <class T>
__device__ __forceinline__ Row<T> row_of(const SampleTokens& op, int64_t r) {
  const unsigned inner = unsigned(op.inner), outer_index = unsigned(r) / inner, inner_index = unsigned(r) % inner;
  Row<T> row;
  static_cast<Reading&>(row) = reading_of(op, r);
  row.logits = static_cast<const T*>(op.logits) + outer_index * op.outer_stride + inner_index * op.inner_stride;
  row.allowed = op.allowed != nullptr ? reinterpret_cast<const uint32_t*>(op.allowed) + r * op.allowed_stride : nullptr;
  row.vocab = int(op.vocab);
  return row;
}

__device__ __forceinline__ Uniforms uniforms_of(const SampleTokens& op, int64_t r) {
  const int64_t position = op.position != nullptr ? op.position[r] : unsigned(r) % unsigned(op.inner);
  return philox_uniforms(static_cast<uint64_t>(at(op.seed, r)), static_cast<uint32_t>(position),
                         static_cast<uint32_t>(at(op.step, r)), kDrawToken);
}

__host__ __device__ __forceinline__ int chunks_of(int64_t vocab) { return int((vocab + kChunk - 1) / kChunk); }
__host__ __device__ __forceinline__ int64_t ticket_bytes(int64_t rows) { return (rows * 4 + 15) / 16 * 16; }

// The workspace: a ticket for each row and the parts [rows, chunks]. Behind them, for restricted draws, the mass of
// each row at the temperature of its statistics and, of each tile [rows, tiles], the key of its largest allowed logit
// and the mass that may be drawn from it.
struct Workspace {
  unsigned* tickets;
  ChunkPart* parts;
  double* mass;
  uint32_t* tile_keys;
  float* tile_masses;
};

__device__ __forceinline__ Workspace workspace_of(const SampleTokens& op) {
  Workspace at;
  at.tickets = static_cast<unsigned*>(op.workspace);
  at.parts = reinterpret_cast<ChunkPart*>(static_cast<char*>(op.workspace) + ticket_bytes(op.rows));
  at.mass = reinterpret_cast<double*>(at.parts + op.rows * chunks_of(op.vocab));
  at.tile_keys = reinterpret_cast<uint32_t*>(at.mass + op.rows);
  at.tile_masses = reinterpret_cast<float*>(at.tile_keys + op.rows * tiles_of(op.vocab));
  return at;
}

}  // namespace
}  // namespace diffusion_runtime
