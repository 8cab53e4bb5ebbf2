// ops.attention on Hopper, after the structure of FlashAttention-3 and ThunderKittens: one warp asks the copy engine
// for blocks of keys and values, two warpgroups of 64 query rows each multiply them. The scores of a block are computed
// while the values of the block before are summed; the exponentials overlap with that sum.
#include "attention_hopper.cuh"
#include "attention_hopper_load.cuh"
#include "attention_hopper_rows.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kChunk = 8;  // elements of 16 bytes

template <class T, int kDim, int kRows>
__device__ __forceinline__ T* chunk_of(Panels<T, kDim, kRows>& panels, int row, int chunk) {
  constexpr int kChunks = kPanel / kChunk;
  return panels.at[chunk / kChunks] + row * kPanel + (chunk % kChunks ^ row % kChunks) * kChunk;
}

__device__ __forceinline__ int64_t element_of(const HopperTile& t, const HopperProblem& p, int64_t batch, int64_t head,
                                              int64_t row_stride, int row) {
  const int query = row / p.group, member = row - query * p.group;
  return t.s.batch * batch + (t.kv_head * p.group + member) * head + (t.s.first_query + query) * row_stride;
}

// The warpgroup's 64 rows, zeros behind the last. A negative scale is the queries' sign, so that larger scores are
// always larger weights; a scale of 0 makes them zeros.
template <class T, int kDim>
__device__ __forceinline__ void load_query(const HopperProblem& p, const HopperTile& t, int warpgroup,
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
__device__ __forceinline__ void store_rows(const HopperProblem& p, const HopperTile& t, int warpgroup,
                                           const HopperRows& rows, const float (&sums)[kDim / 2],
                                           Panels<T, kDim, kWarpgroupRows>& through) {
  constexpr int kChunks = kDim / kChunk;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 16;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = rows.sum[r] == 0 ? 0 : 1 / rows.sum[r];
#pragma unroll
    for (int i = 2 * r; i < kDim / 2; i += 4) {
      T* const to = chunk_of(through, first_row + lane / 4 + 8 * r, i / 4) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = narrowed_pair<T>(sums[i] * inverse, sums[i + 1] * inverse);
    }
    if (lane % 4 == 0 && rows.row[r] < t.rows) {
      const float nats = rows.largest[r] * float(kLn2) + logf(rows.sum[r]);
      p.a.logsumexp[element_of(t, p, int64_t{p.a.heads} * p.a.length, p.a.length, 1, rows.row[r])] =
          rows.sum[r] == 0 ? -INFINITY : nats;
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
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    const uint64_t a = rows_operand(query.at[k / kPanel] + k % kPanel);
    const uint64_t b = rows_operand(key.at[k / kPanel] + k % kPanel);
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
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k)
    multiply_columns<T>(sums, weights[k], columns_operand(value.at[0] + k * 16 * kPanel, sizeof value.at[0]));
  products_commit();
}

template <class T, int kKeys>
__device__ __forceinline__ void narrow(uint32_t (&weights)[kKeys / 16][4], const float (&scores)[kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) weights[i / 4][i % 4] = narrowed_pair<T>(scores[2 * i], scores[2 * i + 1]);
}

template <class T, int kDim>
__device__ __forceinline__ void attend(const HopperProblem& p, const HopperTile& t, int warpgroup,
                                       HopperShared<T, kDim>& shared) {
  constexpr int kKeys = HopperSizes<kDim>::kKeys;
  Panels<T, kDim, kWarpgroupRows>& query = shared.query[warpgroup];
  load_query<T, kDim>(p, t, warpgroup, query);
  HopperRows rows;
  rows.begin(p, t, warpgroup);
  numbered_barrier(1 + warpgroup, kWarpgroup);
  const int blocks = t.blocks();
  float sums[kDim / 2], scores[kKeys / 2];
  uint32_t weights[kKeys / 16][4];
#pragma unroll
  for (int i = 0; i < kDim / 2; ++i) sums[i] = 0;
  if (blocks > 0) {
    barrier_wait(&shared.key_full[0], 0);
    products_fence();
    begin_scores<T, kDim, kKeys>(scores, query, shared.key[0]);
    products_wait<0>();
    hand_back(&shared.key_empty[0]);
    rows.weigh(scores, p, hopper_block<kKeys>(t, 0));
    narrow<T, kKeys>(weights, scores);
  }
  for (int i = 1; i < blocks; ++i) {
    const int stage = i % kStages, before = (i - 1) % kStages;
    barrier_wait(&shared.key_full[stage], i / kStages % 2);
    products_fence();
    begin_scores<T, kDim, kKeys>(scores, query, shared.key[stage]);
    barrier_wait(&shared.value_full[before], (i - 1) / kStages % 2);
    products_fence();
    begin_sums<T, kDim, kKeys>(sums, weights, shared.value[before]);
    products_wait<1>();
    hand_back(&shared.key_empty[stage]);
    rows.weigh(scores, p, hopper_block<kKeys>(t, i));
    products_wait<0>();
    hand_back(&shared.value_empty[before]);
    rows.rescale_sums(sums);
    narrow<T, kKeys>(weights, scores);
  }
  if (blocks > 0) {
    const int last = (blocks - 1) % kStages;
    barrier_wait(&shared.value_full[last], (blocks - 1) / kStages % 2);
    products_fence();
    begin_sums<T, kDim, kKeys>(sums, weights, shared.value[last]);
    products_wait<0>();
  }
  rows.end();
  numbered_barrier(1 + warpgroup, kWarpgroup);  // all four warps have multiplied their queries
  store_rows<T, kDim>(p, t, warpgroup, rows, sums, query);
}

// Grid (tiles of all sequences and heads of keys).
template <class T, int kDim>
__global__ void __launch_bounds__(kHopperThreads, 1) attention_hopper_kernel(const __grid_constant__ HopperProblem p) {
#ifdef HOPPER_CODE
  using Shared = HopperShared<T, kDim>;
  SHARED(Shared, shared);
  const HopperTile t = hopper_tile<HopperSizes<kDim>::kKeys>(p, blockIdx.x);
  if (t.first >= t.rows) return;
  const int warpgroups = min(kConsumers, (t.rows - t.first + kWarpgroupRows - 1) / kWarpgroupRows);  // that have rows
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
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
    if (warpgroup < warpgroups) attend(p, t, warpgroup, shared);
  }
#else
  __trap();
#endif
}

struct Sizes {
  int64_t batch, head, row;
};

// What the copy engine and 16-byte loads ask for.
bool in_16_bytes(const AttentionTensor& t, const Sizes& sizes) {
  if (sizes.batch * sizes.head * sizes.row == 0) return true;
  const auto fits = [](int64_t stride, int64_t size) { return size == 1 || (stride % 8 == 0 && stride >= 0); };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && fits(t.batch, sizes.batch) && fits(t.head, sizes.head) &&
         (sizes.row == 1 || (t.row % 8 == 0 && t.row > 0));
}

int64_t batches(const AttentionArguments& a) { return a.cu_seqlens != nullptr ? 1 : a.sequences; }
Sizes key_sizes(const AttentionArguments& a) { return {batches(a), a.kv_heads, a.num_keys}; }
Sizes prefix_sizes(const AttentionArguments& a) {
  if (a.prefix_key.data == nullptr || a.capacity == 0) return {0, 0, 0};
  // how many pages there are, nobody has said: as many as the table can name
  return a.page_size > 0 ? Sizes{INT32_MAX, a.kv_heads, a.page_size} : Sizes{a.sequences, a.kv_heads, a.capacity};
}

int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// No map where there is no row: nobody asks for one then.
HopperSource source(const AttentionArguments& a, const AttentionTensor& from, const Sizes& sizes, bool paged,
                    int keys) {
  HopperSource s = {};
  if (sizes.batch * sizes.head * sizes.row == 0) return s;
  s.page_size = int(sizes.row);
  s.page_table = paged ? a.page_table : nullptr;
  s.max_pages = a.max_pages;
  s.box_rows = paged ? common_divisor(s.page_size, keys) : keys;
  TiledTensor t = {from.data,   a.type,       a.head_dim,    sizes.row,      sizes.head,
                   sizes.batch, from.row * 2, from.head * 2, from.batch * 2, s.box_rows};
  s.head_step = sizes.head > 1 && from.head > 0;
  s.batch_step = sizes.batch > 1 && from.batch > 0;
  // a map has no stride of 0, and none that does not matter
  if (!s.head_step) t.heads = 1, t.head = 16;
  if (!s.batch_step) t.batches = 1, t.batch = 16;
  if (sizes.row == 1) t.row = 16;
  s.map = tensor_map(t);
  return s;
}

template <class T, int kDim>
void launch_for(const AttentionArguments& a, cudaStream_t stream) {
  constexpr int kKeys = HopperSizes<kDim>::kKeys;
  HopperProblem p = {};
  p.a = a;
  p.group = a.heads / a.kv_heads;
  const int64_t rows = int64_t{a.max_length} * p.group, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t grid = tiles * a.kv_heads * a.sequences;
  if (grid == 0) return;
  if (rows > INT32_MAX - kTileRows || grid > INT32_MAX) throw std::runtime_error("attention: too many queries");
  p.tiles = int(tiles);
  p.negated = a.scale < 0, p.zero = a.scale == 0;
  const float size = p.zero ? 1 : fabsf(a.scale);
  p.factor = a.softcap > 0 ? size / a.softcap : 0;
  p.unit = (a.softcap > 0 ? 1 : size) * kLog2e;
  p.key = source(a, a.key, key_sizes(a), false, kKeys);
  p.value = source(a, a.value, key_sizes(a), false, kKeys);
  p.prefix_key = source(a, a.prefix_key, prefix_sizes(a), a.page_size > 0, kKeys);
  p.prefix_value = source(a, a.prefix_value, prefix_sizes(a), a.page_size > 0, kKeys);
  launch(attention_hopper_kernel<T, kDim>, dim3(unsigned(grid)), dim3(kHopperThreads), sizeof(HopperShared<T, kDim>),
         stream, p);
}

template <class T>
void launch_for(const AttentionArguments& a, cudaStream_t stream) {
  switch (a.head_dim) {
    case 64: return launch_for<T, 64>(a, stream);
    case 128: return launch_for<T, 128>(a, stream);
    default: return launch_for<T, 256>(a, stream);
  }
}

}  // namespace

bool hopper_takes(const AttentionArguments& a) {
  const bool sizes = a.head_dim == 64 || a.head_dim == 128 || a.head_dim == 256;
  const int64_t length = a.length;
  return sizes && a.value_dim == a.head_dim && a.type != LogitType::Float32 && a.mask_type == MaskType::None &&
         in_16_bytes(a.query, {batches(a), a.heads, length}) && in_16_bytes(a.key, key_sizes(a)) &&
         in_16_bytes(a.value, key_sizes(a)) && in_16_bytes(a.prefix_key, prefix_sizes(a)) &&
         in_16_bytes(a.prefix_value, prefix_sizes(a)) &&
         in_16_bytes({a.out, a.out_batch, a.out_head, a.out_row}, {batches(a), a.heads, length}) && device_is_hopper();
}

void launch_attention_hopper(const AttentionArguments& a, cudaStream_t stream) {
  if (a.type == LogitType::BFloat16)
    launch_for<BFloat16>(a, stream);
  else
    launch_for<Float16>(a, stream);
}

}  // namespace diffusion_runtime
