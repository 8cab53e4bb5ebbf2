// Chunks of keys, summed apart, and how their sums come together: in order, by the same arithmetic wherever they are.
#pragma once

#include "attention_rows.cuh"
#include "tensor_core_ops.h"

namespace diffusion_runtime {

// Numbers of chunks in which some row of a tile sees something.
struct ChunkSpans {
  BlockSpan prefix, key;  // may have one in common

  __device__ __forceinline__ bool has(int chunk) const {
    return (chunk >= prefix.first && chunk < prefix.end) || (chunk >= key.first && chunk < key.end);
  }
  __device__ __forceinline__ int count() const {
    return prefix.count() + key.count() - (prefix.count() > 0 && key.count() > 0 && key.first < prefix.end);
  }
};

// Chunks of kChunk blocks of kKeys keys.
template <int kKeys, int kChunk>
__device__ __forceinline__ ChunkSpans chunks_of(const QueryTile& t) {
  const int before = prefix_blocks<kKeys>(t.s);
  ChunkSpans c = {{0, 0}, {0, 0}};
  if (t.prefix.count() > 0) c.prefix = {t.prefix.first / kChunk, (t.prefix.end - 1) / kChunk + 1};
  if (t.key.count() > 0) c.key = {(before + t.key.first) / kChunk, (before + t.key.end - 1) / kChunk + 1};
  return c;
}

template <int kKeys, int kChunk>
__device__ __forceinline__ void limit_to_chunk(QueryTile& t, int chunk) {
  const int before = prefix_blocks<kKeys>(t.s), low = chunk * kChunk;
  t.prefix.limit(low, low + kChunk);
  t.key.limit(low - before, low + kChunk - before);
}

// Adds a chunk to those before it in `memory`, where each thread has its own sums, `kWarpgroup` apart.
template <int kSums>
__device__ __forceinline__ void add_chunk(AttentionPart& total, const AttentionPart& chunk, float (&sums)[kSums],
                                          float* memory, bool is_first) {
  float keep[2], take[2];
  total.merge(chunk, keep, take);
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const float before = is_first ? 0 : memory[i * kWarpgroup];
    memory[i * kWarpgroup] = fmaf(before, keep[i / 2 % 2], sums[i] * take[i / 2 % 2]);
  }
}

// What a warpgroup leaves of a chunk for whoever comes last to the tile: floats, a thread's own kWarpgroup apart.
template <int kSums>
constexpr int kPartFloats = (kSums + 4) * kWarpgroup;

template <int kSums>
__device__ __forceinline__ void save_chunk(float* memory, const AttentionPart& chunk, const float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) memory[i * kWarpgroup] = sums[i];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    memory[(kSums + r) * kWarpgroup] = chunk.largest[r];
    memory[(kSums + 2 + r) * kWarpgroup] = chunk.sum[r];
  }
}

// Adds a chunk in memory to sums that begin with 0.
template <int kSums>
__device__ __forceinline__ void add_saved_chunk(AttentionPart& total, float (&sums)[kSums], const float* memory) {
  AttentionPart chunk;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    chunk.largest[r] = memory[(kSums + r) * kWarpgroup];
    chunk.sum[r] = memory[(kSums + 2 + r) * kWarpgroup];
  }
  float keep[2], take[2];
  total.merge(chunk, keep, take);
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = fmaf(sums[i], keep[i / 2 % 2], memory[i * kWarpgroup] * take[i / 2 % 2]);
}

// Tickets of tiles and warpgroups, zero between launches, come first in the workspace: others' sums never lie there.
constexpr int kMostSplitTiles = 1024, kMostWarpgroups = 2;
constexpr int64_t kTicketBytes = int64_t{kMostSplitTiles} * kMostWarpgroups * 4;

// True in the warpgroup that comes last of `count`: it sees what all the others have saved.
__device__ __forceinline__ bool is_last_chunk(unsigned* ticket, int count, int warpgroup, unsigned& is_last) {
  numbered_barrier(1 + warpgroup, kWarpgroup);
  if (threadIdx.x % kWarpgroup == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == unsigned(count) - 1;
    __threadfence();
    if (is_last) *ticket = 0;
  }
  numbered_barrier(1 + warpgroup, kWarpgroup);
  return is_last;
}

// A tile's sums out of those of its chunks, if the calling warpgroup comes last to them.
template <int kWarpgroups, int kSums>
__device__ __forceinline__ bool merge_chunks(const AttentionLaunch& p, const ChunkSpans& chunks, int warpgroup,
                                             AttentionPart& part, float (&sums)[kSums], unsigned& is_last) {
  const int64_t place = int64_t{blockIdx.x} * p.chunks;
  float* const saved = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + kTicketBytes) +
                       warpgroup * kPartFloats<kSums> + threadIdx.x % kWarpgroup;
  const auto of = [&](int chunk) { return saved + (place + chunk) * kWarpgroups * kPartFloats<kSums>; };
  save_chunk(of(blockIdx.y), part, sums);
  unsigned* const ticket = static_cast<unsigned*>(p.workspace) + blockIdx.x * kWarpgroups + warpgroup;
  if (!is_last_chunk(ticket, chunks.count(), warpgroup, is_last)) return false;
  part = AttentionRows::no_part();
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    if (chunks.has(chunk)) add_saved_chunk(part, sums, of(chunk));
  }
  return true;
}

}  // namespace diffusion_runtime
