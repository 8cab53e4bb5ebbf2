// The kernel of attention on Hopper, after the structure of FlashAttention-3 and ThunderKittens: one warp asks the copy
// engine for blocks of keys and values, two warpgroups of 64 query rows each multiply them. The scores of a block are
// computed while the values of the block before are summed; the exponentials overlap with that sum.
#pragma once

#include "attention_chunks.cuh"
#include "attention_hopper_load.cuh"

namespace diffusion_runtime {

constexpr int kChunk = 8;  // elements of 16 bytes

template <class T, int kDim, int kRows>
__device__ __forceinline__ T* chunk_of(Panels<T, kDim, kRows>& panels, int row, int chunk) {
  constexpr int kChunks = kPanel / kChunk;
  return panels.at[chunk / kChunks] + row * kPanel + (chunk % kChunks ^ row % kChunks) * kChunk;
}

// The warpgroup's 64 rows, zeros behind the last. A negative scale is the queries' sign, so that larger scores are
// always larger weights; a scale of 0 makes them zeros.
template <class T, int kDim>
__device__ __forceinline__ void load_query(const HopperProblem& p, const QueryTile& t, int warpgroup,
                                           Panels<T, kDim, kWarpgroupRows>& to) {
  constexpr int kChunks = kDim / kChunk;
  const AttentionTensor& q = p.a.query;
  const T* const data = static_cast<const T*>(q.data);
  const int first = t.first + warpgroup * kWarpgroupRows;
  const uint32_t sign = p.negated ? 0x80008000u : 0;
#pragma unroll 4
  for (int i = threadIdx.x % kWarpgroup; i < kWarpgroupRows * kChunks; i += kWarpgroup) {
    const int r = i / kChunks, chunk = i % kChunks;
    uint4 bytes = {0, 0, 0, 0};
    if (first + r < t.rows && !p.zero) {
      bytes = load_aligned<uint4>(data + element_of(t, p, q.batch, q.head, q.row, first + r) + chunk * kChunk);
      bytes.x ^= sign, bytes.y ^= sign, bytes.z ^= sign, bytes.w ^= sign;
    }
    store_operand(chunk_of(to, r, chunk), bytes);
  }
  async_proxy_fence();
}

// Divided by the rows' sums, through the shared memory of the queries, which nobody needs any more.
template <class T, int kDim>
__device__ __forceinline__ void store_rows(const HopperProblem& p, const QueryTile& t, int warpgroup,
                                           const AttentionRows& rows, const AttentionPart& part,
                                           const float (&sums)[kDim / 2], Panels<T, kDim, kWarpgroupRows>& through) {
  constexpr int kChunks = kDim / kChunk;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 16;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // plus 0: whether a sum of nothing is 0 or -0 depends on how many blocks and chunks it went through
    const float inverse = part.sum[r] == 0 ? 0 : 1 / part.sum[r];
#pragma unroll
    for (int i = 2 * r; i < kDim / 2; i += 4) {
      T* const to = chunk_of(through, first_row + lane / 4 + 8 * r, i / 4) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = narrowed_pair<T>(fmaf(sums[i], inverse, 0), fmaf(sums[i + 1], inverse, 0));
    }
    if (lane % 4 == 0 && rows.row[r] < t.rows) {
      const float nats = part.largest[r] * float(kLn2) + logf(part.sum[r]);
      p.a.logsumexp[element_of(t, p, int64_t{p.a.heads} * p.a.length, p.a.length, 1, rows.row[r])] =
          part.sum[r] == 0 ? -INFINITY : nats;
    }
  }
  __syncwarp();
  T* const out = static_cast<T*>(p.a.out);
#pragma unroll 4
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int r = first_row + i / kChunks, chunk = i % kChunks;
    const int row = t.first + warpgroup * kWarpgroupRows + r;
    const uint4 bytes = load_aligned<uint4>(chunk_of(through, r, chunk));
    if (row < t.rows)
      store_aligned(out + element_of(t, p, p.a.out_batch, p.a.out_head, p.a.out_row, row) + chunk * kChunk, bytes);
  }
}

// One arrival of a warp, which has done with the stage.
__device__ __forceinline__ void hand_back(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

template <class T, int kDim, int kKeys>
__device__ __forceinline__ void begin_scores(float (&scores)[kKeys / 2], const Panels<T, kDim, kWarpgroupRows>& query,
                                             const Panels<T, kDim, kKeys>& key) {
  const uint64_t query_operand = rows_operand(query.at[0]), key_operand = rows_operand(key.at[0]);
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    const unsigned in_panel = k % kPanel * sizeof(T);
    const uint64_t a = operand_behind(query_operand, k / kPanel * sizeof query.at[0] + in_panel);
    const uint64_t b = operand_behind(key_operand, k / kPanel * sizeof key.at[0] + in_panel);
    if (k == 0)
      multiply_rows<false, T>(scores, a, b);
    else
      multiply_rows<true, T>(scores, a, b);
  }
  products_commit();
}

template <class T, int kDim, int kKeys>
__device__ __forceinline__ void begin_sums(float (&sums)[kDim / 2], const uint32_t (&weights)[kKeys / 16][4],
                                           const Panels<T, kDim, kKeys>& value) {
  const uint64_t operand = columns_operand(value.at[0], sizeof value.at[0]);
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k)
    multiply_columns<T>(sums, weights[k], operand_behind(operand, k * 16 * kPanel * sizeof(T)));
  products_commit();
}

template <class T, int kKeys>
__device__ __forceinline__ void narrow(uint32_t (&weights)[kKeys / 16][4], const float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) weights[i / 4][i % 4] = narrowed_pair<T>(scores[2 * i], scores[2 * i + 1]);
}

// Two warpgroups issue their products in turns, the first begins: while one multiplies, the other has exponentials to
// do.
struct HopperTurns {
  int warpgroup, rounds;  // 0 rounds: there is one warpgroup only, or nothing to do in turns

  static_assert(kConsumers == 2, "turns are of two");
  static constexpr int kBarrier = 1 + kConsumers;  // and the next: a warpgroup waits at its own
  __device__ __forceinline__ void begin() const {
    if (rounds > 0 && warpgroup == 1) numbered_arrive(kBarrier, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void take() const {
    if (rounds > 0) numbered_barrier(kBarrier + warpgroup, 2 * kWarpgroup);
  }
  // The last turn is the second warpgroup's: nobody waits behind it.
  __device__ __forceinline__ void pass(int round) const {
    if (rounds > 0 && (warpgroup == 0 || round < rounds)) numbered_arrive(kBarrier + 1 - warpgroup, 2 * kWarpgroup);
  }
};

template <class T, int kDim>
__device__ __forceinline__ void attend(const HopperProblem& p, const QueryTile& t, const ChunkSpans& chunks,
                                       int warpgroup, int warpgroups, HopperShared<T, kDim>& shared) {
  using Sizes = HopperSizes<kDim>;
  constexpr int kKeys = Sizes::kKeys, kSums = Sizes::kSums, kStages = Sizes::kStages;
  Panels<T, kDim, kWarpgroupRows>& query = shared.query[warpgroup];
  load_query<T, kDim>(p, t, warpgroup, query);
  AttentionRows rows;
  rows.begin(p, t, warpgroup);
  numbered_barrier(1 + warpgroup, kWarpgroup);
  const int blocks = t.blocks();
  float sums[kSums], scores[kKeys / 2];
  uint32_t weights[kKeys / 16][4];
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  float* const memory = shared.total + warpgroup * kSums * kWarpgroup + threadIdx.x % kWarpgroup;
  AttentionPart total = AttentionRows::no_part();
  bool is_first = true;  // chunk, none is in memory
  int number = 0;
  const HopperTurns turns = {warpgroup, warpgroups == 2 ? blocks - 1 : 0};
  turns.begin();
  const auto wait_for_keys = [&](int i) {
    if (i < blocks) barrier_wait(&shared.key_full[i % kStages], i / kStages % 2);
  };
  if (blocks > 0) {
    const KeyBlock b = key_block<kKeys>(t, 0);
    number = b.number;
    wait_for_keys(0);
    products_fence();
    begin_scores<T, kDim, kKeys>(scores, query, shared.key[0]);
    products_wait<0>();
    hand_back(&shared.key_empty[0]);
    rows.weigh(scores, p, b);
    narrow<T, kKeys>(weights, scores);
    wait_for_keys(1);
  }
  for (int i = 1; i < blocks; ++i) {
    const int stage = i % kStages, before = (i - 1) % kStages;
    turns.take();
    products_fence();
    begin_scores<T, kDim, kKeys>(scores, query, shared.key[stage]);
    barrier_wait(&shared.value_full[before], (i - 1) / kStages % 2);
    products_fence();
    begin_sums<T, kDim, kKeys>(sums, weights, shared.value[before]);
    turns.pass(i);
    products_wait<1>();
    hand_back(&shared.key_empty[stage]);
    const KeyBlock b = key_block<kKeys>(t, i);
    const bool new_chunk = Sizes::kChunk > 0 && b.number / max(Sizes::kChunk, 1) != number / max(Sizes::kChunk, 1);
    number = b.number;
    AttentionPart ended = {};
    if (new_chunk) ended = rows.end_chunk();
    rows.weigh(scores, p, b);
    wait_for_keys(i + 1);  // here, because the assembler would put the exponentials behind a wait that follows them
    products_wait<0>();
    hand_back(&shared.value_empty[before]);
    if (new_chunk) {
      add_chunk(total, ended, sums, memory, is_first);
      is_first = false;
#pragma unroll
      for (int j = 0; j < kSums; ++j) sums[j] = 0;
    } else {
      rows.rescale_sums(sums);
    }
    narrow<T, kKeys>(weights, scores);
  }
  if (blocks > 0) {
    const int last = (blocks - 1) % kStages;
    barrier_wait(&shared.value_full[last], (blocks - 1) / kStages % 2);
    products_fence();
    begin_sums<T, kDim, kKeys>(sums, weights, shared.value[last]);
    products_wait<0>();
  }
  AttentionPart part = rows.end_chunk();
  if (!is_first) {
    add_chunk(total, part, sums, memory, false);
    part = total;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = memory[i * kWarpgroup];
  }
  if (p.chunks > 0 && chunks.count() > 1 &&
      !merge_chunks<kConsumers>(p, chunks, warpgroup, part, sums, shared.is_last[warpgroup]))
    return;
  numbered_barrier(1 + warpgroup, kWarpgroup);  // all four warps have multiplied their queries
  store_rows<T, kDim>(p, t, warpgroup, rows, part, sums, query);
}

// Grid (tiles of all sequences and heads of keys, chunks of a tile or 1).
template <class T, int kDim>
__global__ void __launch_bounds__(kHopperThreads, 1) attention_hopper_kernel(const __grid_constant__ HopperProblem p) {
#ifdef HOPPER_CODE
  using Shared = HopperShared<T, kDim>;
  SHARED(Shared, shared);
  QueryTile t = query_tile<kTileRows, HopperSizes<kDim>::kKeys>(p, blockIdx.x);
  if (t.first >= t.rows) return;
  ChunkSpans chunks = {};
  if constexpr (HopperSizes<kDim>::kChunk > 0) {
    if (p.chunks > 0) {
      chunks = chunks_of<HopperSizes<kDim>::kKeys, HopperSizes<kDim>::kChunk>(t);
      if (chunks.count() > 0 ? !chunks.has(blockIdx.y) : blockIdx.y > 0) return;
      limit_to_chunk<HopperSizes<kDim>::kKeys, HopperSizes<kDim>::kChunk>(t, blockIdx.y);
    }
  }
  const int warpgroups = min(kConsumers, (t.rows - t.first + kWarpgroupRows - 1) / kWarpgroupRows);  // that have rows
  if (threadIdx.x == 0) {
    for (int s = 0; s < HopperSizes<kDim>::kStages; ++s) {
      barrier_init(&shared.key_full[s], 1);
      barrier_init(&shared.value_full[s], 1);
      barrier_init(&shared.key_empty[s], warpgroups * 4);
      barrier_init(&shared.value_empty[s], warpgroups * 4);
    }
    barrier_init(&shared.landed, 1);
    async_proxy_fence();
  }
  __syncthreads();
  const int warpgroup = int(threadIdx.x) / kWarpgroup - 1;
  if (warpgroup < 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < 32) load_blocks(p, t, shared);
  } else {
    take_registers<kConsumerRegisters>();
    if (warpgroup < warpgroups) attend(p, t, chunks, warpgroup, warpgroups, shared);
  }
#else
  __trap();
#endif
}

}  // namespace diffusion_runtime
