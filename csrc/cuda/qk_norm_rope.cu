// A row of a head by 8 lanes or a warp; heads of one position beside each other, so that they share its angles. The
// partner of an element is read again, from the first-level cache, rather than exchanged between lanes.
#include "norm.cuh"
#include "norm_row.cuh"

namespace diffusion_runtime {
namespace {

constexpr int kThreads = 128;
constexpr int kFew = 8, kWarp = 32;             // lanes of a row
constexpr int kMostOfFew = kFew * kAtOnce * 4;  // elements

enum class Part { Query, Key, Value };

// One row, as every lane of it sees it.
struct HeadRow {
  Part part;
  int64_t batch, head, place;
};

__device__ __forceinline__ HeadRow head_row(const QKNormRope& op, unsigned r) {
  const unsigned heads = unsigned(op.heads), kv_heads = unsigned(op.kv_heads), length = unsigned(op.length);
  const unsigned each = heads + kv_heads * (op.value.data != nullptr ? 2 : 1), token = r / each, number = r % each;
  HeadRow row;
  row.part = number < heads ? Part::Query : number < heads + kv_heads ? Part::Key : Part::Value;
  row.head = row.part == Part::Query ? number : row.part == Part::Key ? number - heads : number - heads - kv_heads;
  row.batch = token / length;
  row.place = token % length;
  return row;
}

template <class T>
__device__ __forceinline__ T* row_at(const HeadRows& rows, const HeadRow& row, int64_t place) {
  return static_cast<T*>(rows.data) + row.batch * rows.batch + row.head * rows.head + place * rows.row;
}

__device__ __forceinline__ int64_t place_of(const Places& places, const HeadRow& row) {
  return places.data != nullptr ? places.data[row.batch * places.batch + row.place * places.row] : row.place;
}

// Where the row goes; null: nowhere, as its slot is not in the cache.
template <class T>
__device__ __forceinline__ T* target_of(const QKNormRope& op, const HeadRow& row) {
  if (row.part == Part::Query) return row_at<T>(op.query_out, row, row.place);
  if (op.key_out.data != nullptr) return row_at<T>(op.key_out, row, row.place);
  const int64_t slot = place_of(op.slots, row);
  if (slot < 0 || slot >= op.capacity) return nullptr;
  return row_at<T>(row.part == Part::Key ? op.key_cache : op.value_cache, row, slot);
}

// What turns an element.
struct Turn {
  bool turns;
  int partner, pair;
  float sign;  // of the partner's product
};

__device__ __forceinline__ Turn turn_of(const RotaryPairs& pairs, int i) {
  if (pairs.interleaved) return {i < 2 * pairs.count, i ^ 1, i / 2, i % 2 == 0 ? -1.0f : 1.0f};
  if (i < pairs.count) return {true, i + pairs.distance, i, -1};
  const int pair = i - pairs.distance;
  return {pair >= 0 && pair < pairs.count, pair, pair, 1};
}

// Whether eight elements that begin at a multiple of eight have eight partners that do, too.
__device__ __forceinline__ bool whole_vectors(const RotaryPairs& pairs) {
  const int parts = pairs.interleaved ? 2 * pairs.count : pairs.count | pairs.distance;
  return parts % kAtOnce == 0;
}

template <class T, class W>
struct Rope {
  const T* x;       // [head_dim]
  const W* weight;  // [head_dim], or null
  const float *cos, *sin;
  int size;
  Scaling<T> scaled;

  __device__ __forceinline__ Elements<float> normed(int at) const {
    const Elements<T> loaded = load(x + at, size - at);
    Elements<W> weights = {};
    if (weight != nullptr) weights = load(weight + at, size - at);
    Elements<float> y;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) y.element[i] = scaled(to_float(loaded.element[i]), to_float(weights.element[i]));
    return y;
  }

  __device__ __forceinline__ float normed_one(int at) const {
    return scaled(to_float(x[at]), weight != nullptr ? to_float(weight[at]) : 0);
  }

  // The elements from `at` on, where eight of them turn alike.
  __device__ __forceinline__ Elements<float> turned(const RotaryPairs& pairs, int at) const {
    Elements<float> y = normed(at);
    const Turn turn = turn_of(pairs, at);
    if (!turn.turns) return y;
    if (pairs.interleaved) {
#pragma unroll
      for (int i = 0; i < kAtOnce; i += 2) {
        const float c = __ldg(cos + turn.pair + i / 2), s = __ldg(sin + turn.pair + i / 2);
        const float a = y.element[i], b = y.element[i + 1];
        y.element[i] = a * c - b * s;
        y.element[i + 1] = b * c + a * s;
      }
      return y;
    }
    const Elements<float> other = normed(turn.partner), c = load(cos + turn.pair, kAtOnce);
    const Elements<float> s = load(sin + turn.pair, kAtOnce);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      y.element[i] = y.element[i] * c.element[i] + turn.sign * (other.element[i] * s.element[i]);
    return y;
  }

  // One by one, where they do not.
  __device__ __forceinline__ Elements<float> turned_each(const RotaryPairs& pairs, int at) const {
    Elements<float> y = normed(at);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Turn turn = turn_of(pairs, at + i);
      if (turn.turns)  // those behind the row do not
        y.element[i] =
            y.element[i] * __ldg(cos + turn.pair) + turn.sign * (normed_one(turn.partner) * __ldg(sin + turn.pair));
    }
    return y;
  }
};

template <class T, class W, int kLanes>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rope_kernel(const __grid_constant__ QKNormRope op, unsigned num_rows) {
  constexpr int kSpan = kLanes * kAtOnce;
  const unsigned r = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool exists = r < num_rows;
  const HeadRow row = head_row(op, exists ? r : 0);
  const HeadRows& from = row.part == Part::Query ? op.query : row.part == Part::Key ? op.key : op.value;
  const int first = threadIdx.x % kLanes * kAtOnce, size = exists ? op.head_dim : 0;
  const T* const x = row_at<const T>(from, row, row.place);

  float inverse = 1;
  if (op.normalized) {
    float squares = 0;
#pragma unroll 4
    for (int at = first; at < size; at += kSpan) squares = sum_of_squares(load(x + at, size - at), squares);
    inverse = inverse_root(sum_over_lanes<kLanes>(squares), op.head_dim, op.eps);
  }
  T* const to = target_of<T>(op, row);
  if (to == nullptr) return;  // no barrier follows
  if (row.part == Part::Value) {
    for (int at = first; at < size; at += kSpan) save(to + at, load(x + at, size - at), size - at);
    return;
  }

  const int64_t position = place_of(op.positions, row);
  const bool known = position >= 0 && position < op.table_rows;
  const int64_t table = row.batch * op.table_batch + position * op.table_row;
  const W* const weight = static_cast<const W*>(row.part == Part::Query ? op.query_weight : op.key_weight);
  const Scaling<T> scaled{inverse, weight != nullptr, op.round_before_weight, op.weight_offset};
  const Rope<T, W> rope{x, weight, op.cos + table, op.sin + table, size, scaled};
  const bool whole = whole_vectors(op.pairs);
  for (int at = first; at < size; at += kSpan) {
    Elements<float> y;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) y.element[i] = NAN;
    if (known) y = whole ? rope.turned(op.pairs, at) : rope.turned_each(op.pairs, at);
    Elements<T> result;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) result.element[i] = narrowed<T>(y.element[i]);
    save(to + at, result, size - at);
  }
}

template <int kLanes>
void launch_rows(const QKNormRope& op, cudaStream_t stream) {
  constexpr int kRows = kThreads / kLanes;
  const int64_t rows = op.batch * op.length * (op.heads + op.kv_heads * (op.value.data != nullptr ? 2 : 1));
  if (rows == 0 || op.head_dim == 0) return;
  // both weights are of one type: where one of them is missing, that of the other counts
  const LogitType weight_type = op.query_weight != nullptr ? op.query_weight_type : op.key_weight_type;
  for_types(op.type, weight_type, [&](auto element, auto weight) {
    launch(qk_norm_rope_kernel<decltype(element), decltype(weight), kLanes>, dim3(unsigned((rows + kRows - 1) / kRows)),
           dim3(kThreads), 0, stream, op, unsigned(rows));
  });
}

}  // namespace

void qk_norm_rope(const QKNormRope& arguments, cudaStream_t stream) {
  arguments.head_dim <= kMostOfFew ? launch_rows<kFew>(arguments, stream) : launch_rows<kWarp>(arguments, stream);
}

}  // namespace diffusion_runtime
