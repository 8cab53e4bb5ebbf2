// What an attention kernel is given: AttentionProblem of ops/_attention_problem.py, as pointers and sizes.
#pragma once

#include <stdint.h>

#include "logit_type.h"
#include "visible_keys.h"

namespace diffusion_runtime {

// A tensor [batch, heads, rows, dim] with stride 1 along dim; strides in elements.
struct AttentionTensor {
  const void* data;
  int64_t batch, head, row;
};

enum class MaskType : int { None, Bool, Float32, AsQuery };

struct AttentionArguments {
  AttentionTensor query, key, value;
  AttentionTensor prefix_key, prefix_value;  // data null: no prefix. Paged: `batch` is the stride of a page.
  // each null where it does not apply
  const int32_t *prefix_lengths, *page_table, *key_starts, *key_ends, *cu_seqlens, *cu_seqlens_k;
  const bool* chosen;
  const void* mask;
  int64_t mask_batch, mask_head, mask_row, mask_column;  // strides in elements
  MaskType mask_type;
  LogitType type;  // of query, keys and values
  VisibleKeys visible;
  int offset;
  int sequences, heads, kv_heads, head_dim, value_dim;
  int length, num_keys;      // rows of query and of key: those of all sequences where they are packed
  int max_length;            // queries of a sequence
  int capacity;              // keys of a dense prefix, or of all the pages of one
  int page_size, max_pages;  // 0: the prefix is dense
  float scale, softcap;      // softcap 0: none
  void* out;                 // [batch, heads, length, value_dim]
  int64_t out_batch, out_head, out_row;
  float* logsumexp;  // [batch, heads, length], contiguous
};

// One sequence: where its rows begin and how many there are.
struct AttentionSequence {
  int batch;                     // of query, key, value and mask
  int first_query, num_queries;  // rows of query
  int first_key, num_keys;       // rows of key that are real
  int prefix;                    // real keys of the prefix
  bool by_position, by_prefix;   // as visible_keys() takes them
};

HOST_DEVICE int attention_clamp(int value, int most) { return value < 0 ? 0 : value < most ? value : most; }

// Lengths outside of what there is are clamped: on a GPU nobody has looked at them.
HOST_DEVICE AttentionSequence attention_sequence(const AttentionArguments& a, int sequence) {
  AttentionSequence s;
  const bool packed = a.cu_seqlens != nullptr;
  s.batch = packed ? 0 : sequence;
  s.first_query = packed ? attention_clamp(a.cu_seqlens[sequence], a.length) : 0;
  s.num_queries = packed ? attention_clamp(a.cu_seqlens[sequence + 1], a.length) - s.first_query : a.length;
  s.first_key = packed                    ? attention_clamp(a.cu_seqlens_k[sequence], a.num_keys)
                : a.key_starts != nullptr ? attention_clamp(a.key_starts[sequence], a.num_keys)
                                          : 0;
  const int end = packed                  ? attention_clamp(a.cu_seqlens_k[sequence + 1], a.num_keys)
                  : a.key_ends != nullptr ? attention_clamp(a.key_ends[sequence], a.num_keys)
                                          : a.num_keys;
  s.num_keys = end > s.first_key ? end - s.first_key : 0;
  s.prefix = a.prefix_lengths != nullptr ? attention_clamp(a.prefix_lengths[sequence], a.capacity) : a.capacity;
  const bool chosen = a.chosen == nullptr || a.chosen[sequence];
  s.by_position = chosen;
  s.by_prefix = a.chosen == nullptr || !chosen;
  return s;
}

// What the query in row `first_query + query` sees, in positions: those of the prefix are [0, prefix), those of key
// [prefix, prefix + num_keys), its row first_key + i being prefix + i.
HOST_DEVICE KeyRange attention_range(const AttentionArguments& a, const AttentionSequence& s, int query) {
  const int padding = a.cu_seqlens == nullptr ? s.first_key : 0;  // padded queries come first, as padded keys do
  return visible_keys(a.visible, s.by_position, s.by_prefix, s.prefix + query - padding + a.offset, s.prefix,
                      s.prefix + s.num_keys);
}

}  // namespace diffusion_runtime
