// The kernel of attention for every GPU since sm_80: a warp has 16 rows of queries, blocks of keys and values come
// through two stages, the next while one is multiplied (Dao, 2023, FlashAttention-2).
#pragma once

#include "attention_chunks.cuh"
#include "attention_products.cuh"

namespace diffusion_runtime {

struct TileProblem : AttentionLaunch {
  bool whole_vectors;  // rows of queries, keys and values are vectors of 16 bytes at multiples of 16
};

// Copies rows into a tile, zeros where row_of(row) is null and behind `size`; they arrive by the wait for their group.
template <class T, int kDim, int kRows, int kThreads, class RowOf>
__device__ __forceinline__ void copy_rows(T* to, int size, bool whole_vectors, const void* readable,
                                          const RowOf& row_of) {
  constexpr int kSize = Vector16<T>::kSize, kChunks = kDim / kSize;
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, first = chunk * kSize;
    const T* const from = row_of(row);
    T* const at = to + place<T, kDim>(row, chunk);
    if (whole_vectors) {
      const bool there = from != nullptr && first < size;
      async_copy_16(at, there ? from + first : readable, there);
    } else {
      Vector16<T> vector;
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        vector.element[e] = from != nullptr && first + e < size ? from[first + e] : narrowed<T>(0);
      store_aligned(at, vector);
    }
  }
}

// The tile's queries. A negative scale is their sign, so that larger scores are always larger weights; a scale of 0
// makes them zeros.
template <class T, int kDim, int kThreads>
__device__ __forceinline__ void load_queries(const TileProblem& p, const QueryTile& t, T* to) {
  constexpr int kSize = Vector16<T>::kSize, kChunks = kDim / kSize;
  const AttentionTensor& q = p.a.query;
#pragma unroll 2
  for (int i = threadIdx.x; i < kWarpgroupRows * kChunks; i += kThreads) {
    const int r = i / kChunks, first = i % kChunks * kSize;
    Vector16<T> vector;
#pragma unroll
    for (int e = 0; e < kSize; ++e) vector.element[e] = narrowed<T>(0);
    if (t.first + r < t.rows && first < p.a.head_dim && !p.zero) {
      const T* const from = static_cast<const T*>(q.data) + element_of(t, p, q.batch, q.head, q.row, t.first + r);
      if (p.whole_vectors) {
        vector = as_vector<T>(load_aligned<uint4>(from + first));
      } else {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          if (first + e < p.a.head_dim) vector.element[e] = from[first + e];
      }
      if (p.negated) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) vector.element[e] = narrowed<T>(-to_float(vector.element[e]));
      }
    }
    store_aligned(to + place<T, kDim>(r, i % kChunks), vector);
  }
}

// Rows of a block of keys or values that some row of the tile sees; the others become zeros, whatever lies there.
template <class T, int kDim, int kKeys, int kThreads>
__device__ __forceinline__ void copy_block(const TileProblem& p, const QueryTile& t, const KeyBlock& b,
                                           const AttentionTensor& near, const AttentionTensor& far, int size, T* to) {
  const AttentionTensor& from = b.prefix ? far : near;
  const T* const data = static_cast<const T*>(from.data) + t.kv_head * from.head;
  const int low = t.seen.low - b.position, high = min(t.seen.high - b.position, b.count);
  copy_rows<T, kDim, kKeys, kThreads>(to, size, p.whole_vectors, p.a.query.data, [&](int r) -> const T* {
    if (r < low || r >= high) return nullptr;
    int64_t row = b.row + r, batch = b.prefix ? t.sequence : t.s.batch;
    if (!b.prefix) {
      row += t.s.first_key;
    } else if (p.a.page_table != nullptr) {
      batch = p.a.page_table[int64_t{t.sequence} * p.a.max_pages + row / p.a.page_size];
      row %= p.a.page_size;
    }
    return data + batch * from.batch + row * from.row;
  });
}

// A mask tensor, on scores that are or are not scaled yet.
template <class T>
struct DenseMask {
  const TileProblem& p;
  const QueryTile& t;

  template <int kScores>
  __device__ __forceinline__ void operator()(float (&scores)[kScores], const AttentionRows& rows,
                                             const KeyBlock& b) const {
    const AttentionArguments& a = p.a;
    const float scale = a.softcap > 0 ? 1 : p.size;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = min(rows.row[r], t.rows - 1), first = threadIdx.x % 4 * 2;
      const int64_t at = element_of(t, p, a.mask_batch, a.mask_head, a.mask_row, row) +
                         (t.s.first_key + b.row + first) * a.mask_column;
#pragma unroll
      for (int i = 2 * r; i < kScores; i += 4)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = i / 4 * 8 + j;
          if (first + column < b.count) scores[i + j] = masked(scores[i + j] * scale, at + column * a.mask_column);
        }
    }
  }

  __device__ __forceinline__ float masked(float score, int64_t at) const {
    if (p.a.mask_type == MaskType::Bool) return static_cast<const bool*>(p.a.mask)[at] ? score : -INFINITY;
    const float bias = p.a.mask_type == MaskType::Float32 ? static_cast<const float*>(p.a.mask)[at]
                                                          : to_float(static_cast<const T*>(p.a.mask)[at]);
    return bias == -INFINITY ? bias : score + bias;  // of a key that is not seen not even NaN counts
  }
};

template <class T, int kDim>
__device__ __forceinline__ void store_rows(const TileProblem& p, const QueryTile& t, const AttentionRows& rows,
                                           const AttentionPart& part, int column,
                                           const float (&sums)[AttentionSizes<T, kDim>::kSums]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (rows.row[r] >= t.rows) continue;
    // plus 0: whether a sum of nothing is 0 or -0 depends on how many blocks and chunks it went through
    const float inverse = part.sum[r] == 0 ? 0 : 1 / part.sum[r];
    T* const out = static_cast<T*>(p.a.out) + element_of(t, p, p.a.out_batch, p.a.out_head, p.a.out_row, rows.row[r]);
#pragma unroll
    for (int i = 2 * r; i < AttentionSizes<T, kDim>::kSums; i += 4)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = column + i / 4 * 8 + lane % 4 * 2 + j;
        if (at < p.a.value_dim) out[at] = narrowed<T>(fmaf(sums[i + j], inverse, 0));
      }
    if (lane % 4 == 0 && column == 0) {
      const float nats = part.largest[r] * float(kLn2) + logf(part.sum[r]);
      p.a.logsumexp[element_of(t, p, int64_t{p.a.heads} * p.a.length, p.a.length, 1, rows.row[r])] =
          part.sum[r] == 0 ? -INFINITY : nats;
    }
  }
}

template <class T, int kDim, class Mask>
__device__ __forceinline__ void attend(const TileProblem& p, const QueryTile& t, const ChunkSpans& chunks,
                                       const Mask& mask, AttentionShared<T, kDim>& shared) {
  using Sizes = AttentionSizes<T, kDim>;
  using Shared = AttentionShared<T, kDim>;
  constexpr int kKeys = Sizes::kKeys, kSums = Sizes::kSums, kThreads = Sizes::kThreads;
  constexpr int kChunk = Sizes::kChunk > 0 ? Sizes::kChunk : 1 << 30;
  const int warp = int(threadIdx.x) / 32, first_row = warp % 4 * 16;
  const int column = int(threadIdx.x) / kWarpgroup * Sizes::kColumns;
  const auto ask_for = [&](int i) {
    const KeyBlock b = key_block<kKeys>(t, i);
    copy_block<T, kDim, kKeys, kThreads>(p, t, b, p.a.key, p.a.prefix_key, p.a.head_dim, shared.key[i % 2]);
    copy_block<T, kDim, kKeys, kThreads>(p, t, b, p.a.value, p.a.prefix_value, p.a.value_dim, shared.value[i % 2]);
  };
  const int blocks = t.blocks();
  load_queries<T, kDim, kThreads>(p, t, shared.query);
  if (blocks > 0) ask_for(0);
  async_copy_commit();
  AttentionRows rows;
  rows.begin(p, t, 0);
  float sums[kSums], scores[kKeys / 2];
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  float* const memory = shared.total + threadIdx.x % kWarpgroup;
  float* const weights = shared.weights + (Shared::kExact ? warp * 16 * (kKeys + 4) : 0);
  AttentionPart total = AttentionRows::no_part();
  bool is_first = true;  // chunk, none is in memory
  int number = 0;
  for (int i = 0; i < blocks; ++i) {
    if (i + 1 < blocks) ask_for(i + 1);
    async_copy_commit();  // of nothing behind the last
    async_copy_wait<1>();
    __syncthreads();
    const KeyBlock b = key_block<kKeys>(t, i);
    if (i > 0 && b.number / kChunk != number / kChunk) {
      add_chunk(total, rows.end_chunk(), sums, memory, is_first);
      is_first = false;  // what is in `sums` is rescaled by 0
    }
    number = b.number;
    if constexpr (Shared::kExact)
      multiply_keys_exactly<kDim, kKeys>(scores, shared.query, first_row, shared.key[i % 2]);
    else
      multiply_keys<T, kDim, kKeys>(scores, shared.query, first_row, shared.key[i % 2]);
    rows.weigh(scores, p, b, mask);
    rows.rescale_sums(sums);
    if constexpr (Shared::kExact)
      multiply_values_exactly<kDim, kKeys>(sums, scores, shared.value[i % 2], column, weights);
    else
      multiply_values<T, kDim, kKeys>(sums, scores, shared.value[i % 2], column);
    __syncthreads();  // the next round copies into the stage read here
  }
  async_copy_wait<0>();
  AttentionPart part = rows.end_chunk();
  if (!is_first) {
    add_chunk(total, part, sums, memory, false);
    part = total;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = memory[i * kWarpgroup];
  }
  if constexpr (Sizes::kChunk > 0) {
    if (p.chunks > 0 && chunks.count() > 1 && !merge_chunks<1>(p, chunks, 0, part, sums, shared.is_last)) return;
  }
  store_rows<T, kDim>(p, t, rows, part, column, sums);
}

// Grid (tiles of all sequences and heads of keys, chunks of a tile or 1).
template <class T, int kDim, class Mask>
__global__ void __launch_bounds__(AttentionSizes<T, kDim>::kThreads)
    attention_kernel(const __grid_constant__ TileProblem p) {
  using Sizes = AttentionSizes<T, kDim>;
  using Shared = AttentionShared<T, kDim>;
  SHARED(Shared, shared);
  QueryTile t = query_tile<kWarpgroupRows, Sizes::kKeys>(p, blockIdx.x);
  if (t.first >= t.rows) return;
  ChunkSpans chunks = {};
  if constexpr (Sizes::kChunk > 0) {
    if (p.chunks > 0) {
      chunks = chunks_of<Sizes::kKeys, Sizes::kChunk>(t);
      if (chunks.count() > 0 ? !chunks.has(blockIdx.y) : blockIdx.y > 0) return;
      limit_to_chunk<Sizes::kKeys, Sizes::kChunk>(t, blockIdx.y);
    }
  }
  if constexpr (std::is_same<Mask, NoMask>::value)
    attend<T, kDim>(p, t, chunks, NoMask{}, shared);
  else
    attend<T, kDim>(p, t, chunks, Mask{p, t}, shared);
}

}  // namespace diffusion_runtime
