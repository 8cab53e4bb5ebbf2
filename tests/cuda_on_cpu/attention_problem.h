// Requests of attention and what must come out: the op in double; and the same requests laid out in every way a call
// can hold them. A test says before which kernel it is about: takes, workspace_of and launch_kernel of attention_test.
#pragma once

#include <random>

#include "attention_grid.cuh"
#include "test_support.h"

namespace attention_test {

using namespace diffusion_runtime;

struct Request {
  int queries, prefix = 0;
  bool chosen = true;
};

// Of all requests of a call.
struct Rules {
  int heads = 1, kv_heads = 1, dim = 64;
  VisibleKeys visible = {-1, -1, 1, -1};
  int offset = 0, more_keys = 0;  // keys behind those of the queries; fewer where below 0
  float scale = 0.125f, softcap = 0;
  bool by_sequence = false;  // requests have a `chosen`
  int page_size = 24;
  float size = 1;                  // of the queries
  int value_dim = 0, apart = 0;    // 0: as dim; elements between rows, so that not all are at multiples of 16 bytes
  MaskType mask = MaskType::None;  // without a prefix, and not packed
};

enum class Layout { Right, Left, Packed, Paged };  // padding, and pages of the prefix
constexpr const char* kLayoutNames[] = {"right", "left", "packed", "paged"};

// Rows of a request: the same numbers wherever they are laid out.
template <class T>
void fill(T* to, int which, int request, int row, int head, int dim, float size) {
  std::mt19937 random(((which * 61 + request) * 4099 + row) * 67 + head);
  std::normal_distribution<float> normal(0, size);
  for (int d = 0; d < dim; d++) to[d] = from_float<T>(normal(random));
}

// A mask's number for a query of a request and one of its keys.
inline float bias_of(int request, int query, int head, int key) {
  std::mt19937 random(((request * 331 + query) * 67 + head) * 4099 + key);
  random.discard(3);
  return random() % 3 == 0 ? -INFINITY : float(int(random() % 65) - 32) / 16;
}

template <class T>
struct Result {
  std::vector<T> out;  // [queries, heads, value_dim]
  std::vector<float> logsumexp;
};

inline int most(const std::vector<Request>& requests, int Request::* member) {
  int largest = 0;
  for (const Request& r : requests) largest = max(largest, r.*member);
  return largest;
}

// Lays the requests out, runs the kernel, `split` if it has more than one chunk, and hands back what each of them got.
// `ids` say which numbers they hold.
template <class T>
std::vector<Result<T>> run(const std::vector<Request>& requests, const std::vector<int>& ids, const Rules& rules,
                           Layout layout, bool split) {
  const int count = int(requests.size()), dim = rules.dim, heads = rules.heads, kv = rules.kv_heads;
  const int value_dim = rules.value_dim > 0 ? rules.value_dim : dim, step = dim + rules.apart;
  const int value_step = value_dim + rules.apart;
  const bool packed = layout == Layout::Packed, left = layout == Layout::Left, paged = layout == Layout::Paged;
  std::vector<int> first_query(count + 1, 0), first_key(count + 1, 0);
  for (int i = 0; i < count; i++) {
    first_query[i + 1] = first_query[i] + requests[i].queries;
    first_key[i + 1] = first_key[i] + max(requests[i].queries + rules.more_keys, 0);
  }
  const int longest = most(requests, &Request::queries), batches = packed ? 1 : count;
  const int length = packed ? first_query[count] : longest + !left * 3;
  const int num_keys = packed ? first_key[count] : max(longest + rules.more_keys, 0) + !left * 5;
  const int largest_prefix = most(requests, &Request::prefix), page = rules.page_size;
  const int pages = (largest_prefix + page - 1) / page, capacity = paged ? pages * page : largest_prefix + 3;

  const size_t key_rows = size_t(batches) * kv * num_keys;
  const size_t prefix_rows = size_t(count) * (paged ? max(pages, 1) * page : capacity) * kv;
  Buffer<T> query(size_t(batches) * length * heads * step), key(key_rows * step), value(key_rows * value_step);
  Buffer<T> out(size_t(batches) * length * heads * value_dim);
  Buffer<T> prefix_key(prefix_rows * step), prefix_value(prefix_rows * value_step);
  Buffer<float> logsumexp(size_t(batches) * heads * length);
  Buffer<int> starts(count), ends(count), prefix_lengths(count), cu(count + 1), cu_k(count + 1), table(count * pages);
  Buffer<bool> chosen(count);
  const auto query_row = [&](int i, int q) {  // of [rows, heads]
    return packed ? first_query[i] + q : i * length + q + left * (length - requests[i].queries);
  };
  for (int i = 0; i < count; i++) {
    const Request& r = requests[i];
    const int keys = max(r.queries + rules.more_keys, 0), padding = left ? num_keys - keys : 0;
    starts[i] = padding, ends[i] = padding + keys, prefix_lengths[i] = r.prefix, chosen[i] = r.chosen;
    for (int q = 0; q < r.queries; q++)
      for (int h = 0; h < heads; h++)
        fill(&query.data[(size_t(query_row(i, q)) * heads + h) * step], 0, ids[i], q, h, dim, rules.size);
    for (int h = 0; h < kv; h++) {
      for (int k = 0; k < keys; k++) {
        const size_t row =
            packed ? size_t(h) * num_keys + first_key[i] + k : (size_t(i) * kv + h) * num_keys + padding + k;
        fill(&key.data[row * step], 1, ids[i], k, h, dim, 1);
        fill(&value.data[row * value_step], 2, ids[i], k, h, value_dim, 1);
      }
      for (int k = 0; k < r.prefix; k++) {  // pages are [page_size, kv_heads, dim], those of a request far apart
        const size_t row =
            paged ? ((size_t(k / page) * count + i) * page + k % page) * kv + h : (size_t(i) * kv + h) * capacity + k;
        fill(&prefix_key.data[row * step], 3, ids[i], k, h, dim, 1);
        fill(&prefix_value.data[row * value_step], 4, ids[i], k, h, value_dim, 1);
      }
    }
    for (int n = 0; n < pages; n++) table[i * pages + n] = n * page < r.prefix ? n * count + i : 1 << 30;
  }
  for (int i = 0; i <= count; i++) cu[i] = first_query[i], cu_k[i] = first_key[i];

  const size_t scores = rules.mask == MaskType::None ? 0 : size_t(batches) * heads * length * num_keys;
  Buffer<float> float_mask(rules.mask == MaskType::Float32 ? scores : 0);
  Buffer<T> own_mask(rules.mask == MaskType::AsQuery ? scores : 0);
  Buffer<bool> bool_mask(rules.mask == MaskType::Bool ? scores : 0);
  for (int i = 0; i < count && scores > 0; i++)
    for (int q = 0; q < requests[i].queries; q++)
      for (int h = 0; h < heads; h++)
        for (int k = starts[i]; k < ends[i]; k++) {
          const size_t at = ((size_t(i) * heads + h) * length + query_row(i, q) % length) * num_keys + k;
          const float bias = bias_of(ids[i], q, h, k - starts[i]);
          if (rules.mask == MaskType::Bool) bool_mask[at] = bias != -INFINITY;
          if (rules.mask == MaskType::Float32) float_mask[at] = bias;
          if (rules.mask == MaskType::AsQuery) own_mask[at] = from_float<T>(bias);
        }

  const auto tensor = [](const T* data, int64_t batch, int64_t head, int64_t row, int of) {
    return AttentionTensor{data, batch * of, head * of, row * of};
  };
  AttentionArguments a = {};
  a.query = tensor(query.data, int64_t{length} * heads, 1, heads, step);
  a.key = tensor(key.data, int64_t{kv} * num_keys, num_keys, 1, step);
  a.value = tensor(value.data, int64_t{kv} * num_keys, num_keys, 1, value_step);
  if (largest_prefix > 0) {
    const int64_t batch = paged ? int64_t{page} * kv : int64_t{kv} * capacity;
    a.prefix_key = tensor(prefix_key.data, batch, paged ? 1 : capacity, paged ? kv : 1, step);
    a.prefix_value = tensor(prefix_value.data, batch, paged ? 1 : capacity, paged ? kv : 1, value_step);
    a.prefix_lengths = prefix_lengths.data, a.capacity = capacity;
    if (paged) a.page_table = table.data, a.page_size = page, a.max_pages = pages;
  }
  if (scores > 0) {
    a.mask_type = rules.mask;
    a.mask = rules.mask == MaskType::Bool      ? static_cast<const void*>(bool_mask.data)
             : rules.mask == MaskType::Float32 ? static_cast<const void*>(float_mask.data)
                                               : static_cast<const void*>(own_mask.data);
    a.mask_column = 1, a.mask_row = num_keys, a.mask_head = int64_t{length} * num_keys;
    a.mask_batch = heads * a.mask_head;
  }
  if (packed) a.cu_seqlens = cu.data, a.cu_seqlens_k = cu_k.data;
  if (!packed) a.key_ends = ends.data, a.key_starts = left ? starts.data : nullptr;
  a.chosen = rules.by_sequence ? chosen.data : nullptr;
  a.type = std::is_same<T, float>::value     ? LogitType::Float32
           : std::is_same<T, Float16>::value ? LogitType::Float16
                                             : LogitType::BFloat16;
  a.visible = rules.visible, a.offset = rules.offset, a.scale = rules.scale, a.softcap = rules.softcap;
  a.sequences = count, a.heads = heads, a.kv_heads = kv, a.head_dim = dim, a.value_dim = value_dim;
  a.length = length, a.num_keys = num_keys, a.max_length = packed ? longest : length;
  a.out = out.data, a.out_batch = int64_t{length} * heads * value_dim, a.out_head = value_dim;
  a.out_row = int64_t{heads} * value_dim;
  a.logsumexp = logsumexp.data;
  expect(takes(a), "taken", [&] { return kLayoutNames[int(layout)]; });
  cuda_on_cpu::num_multiprocessors = split ? 1000 : 0;
  const size_t bytes = workspace_of(a);
  expect(split || bytes == 0, "not split", [] { return ""; });
  Buffer<char> workspace(bytes);
  std::memset(workspace.data, 0, min(bytes, size_t(kTicketBytes)));
  launch_kernel(a, workspace.data);
  if (bytes > 0) {  // a second launch finds the workspace as the first left it
    const std::vector<T> before(out.data, out.data + out.size);
    std::memset(out.data, 0xFF, out.size * sizeof(T));
    launch_kernel(a, workspace.data);
    expect(std::memcmp(before.data(), out.data, out.size * sizeof(T)) == 0, "the same again",
           [&] { return kLayoutNames[int(layout)]; });
  }

  std::vector<Result<T>> results(count);
  for (int i = 0; i < count; i++)
    for (int q = 0; q < requests[i].queries; q++)
      for (int h = 0; h < heads; h++) {
        const int row = query_row(i, q);
        const T* const from = &out.data[(size_t(row) * heads + h) * value_dim];
        results[i].out.insert(results[i].out.end(), from, from + value_dim);
        results[i].logsumexp.push_back(logsumexp[(size_t(row / length) * heads + h) * length + row % length]);
      }
  return results;
}

// What one request must get, in double.
template <class T>
void check_request(const Result<T>& got, const Request& r, int id, const Rules& rules, const std::string& where) {
  const int dim = rules.dim, keys = max(r.queries + rules.more_keys, 0), total = r.prefix + keys;
  const int value_dim = rules.value_dim > 0 ? rules.value_dim : dim;
  const double precision = std::is_same<T, float>::value ? 0x1p-17 : std::is_same<T, Float16>::value ? 0x1p-10 : 0x1p-7;
  std::vector<T> q(dim), row(max(dim, value_dim));
  std::vector<std::vector<double>> key(total), value(total);
  for (int h = 0; h < rules.heads; h++) {
    const int head = h / (rules.heads / rules.kv_heads);
    for (int k = 0; k < total; k++) {
      const bool prefix = k < r.prefix;
      fill(row.data(), prefix ? 3 : 1, id, prefix ? k : k - r.prefix, head, dim, 1);
      key[k].assign(dim, 0), value[k].assign(value_dim, 0);
      for (int d = 0; d < dim; d++) key[k][d] = to_float(row[d]);
      fill(row.data(), prefix ? 4 : 2, id, prefix ? k : k - r.prefix, head, value_dim, 1);
      for (int d = 0; d < value_dim; d++) value[k][d] = to_float(row[d]);
    }
    for (int i = 0; i < r.queries; i++) {
      fill(q.data(), 0, id, i, h, dim, rules.size);
      const bool chosen = !rules.by_sequence || r.chosen;
      const KeyRange seen = visible_keys(rules.visible, chosen, !rules.by_sequence || !chosen,
                                         r.prefix + i + rules.offset, r.prefix, total);
      std::vector<double> weight(total, 0);
      double largest = -INFINITY, sum = 0;
      for (int k = seen.low; k < seen.high; k++) {
        double score = 0;
        for (int d = 0; d < dim; d++) score += double(to_float(q[d])) * key[k][d];
        score *= double(rules.scale);
        weight[k] = rules.softcap > 0 ? rules.softcap * std::tanh(score / rules.softcap) : score;
        if (rules.mask != MaskType::None) {
          const float bias = bias_of(id, i, h, k);
          weight[k] += rules.mask == MaskType::Bool && bias != -INFINITY ? 0 : bias;
        }
        largest = std::max(largest, weight[k]);
      }
      if (largest == -INFINITY) largest = 0;
      for (int k = seen.low; k < seen.high; k++) sum += weight[k] = std::exp(weight[k] - largest);
      const double nats = got.logsumexp[i * rules.heads + h],
                   wanted_nats = sum > 0 ? largest + std::log(sum) : -INFINITY;
      const auto at = [&](int d) {
        return where + ", query " + std::to_string(i) + " head " + std::to_string(h) + " element " + std::to_string(d);
      };
      expect(nats == wanted_nats || std::fabs(nats - wanted_nats) < 2e-6 * (2 + std::fabs(wanted_nats) + largest),
             "logsumexp", [&] { return at(0) + ": " + compare(nats, wanted_nats); });
      for (int d = 0; d < value_dim; d++) {
        double wanted = 0, size = 0;
        for (int k = seen.low; k < seen.high; k++)
          if (sum > 0) wanted += weight[k] / sum * value[k][d], size += weight[k] / sum * std::fabs(value[k][d]);
        const double x = to_float(got.out[(size_t(i) * rules.heads + h) * value_dim + d]);
        expect(std::fabs(x - wanted) <= precision * size * 0.75, "out",
               [&] { return at(d) + ": " + compare(x, wanted); });
      }
    }
  }
}

template <class T>
bool same_results(const Result<T>& a, const Result<T>& b) {
  return std::memcmp(a.out.data(), b.out.data(), a.out.size() * sizeof(T)) == 0 &&
         std::memcmp(a.logsumexp.data(), b.logsumexp.data(), a.logsumexp.size() * sizeof(float)) == 0;
}

}  // namespace attention_test
