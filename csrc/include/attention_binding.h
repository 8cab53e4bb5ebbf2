// AttentionArguments out of the tensors that Python passes, checked so that a kernel cannot read past them.
#pragma once

#include <initializer_list>
#include <optional>

#include "attention_arguments.h"
#include "row_setting.h"

namespace diffusion_runtime {

using MaybeTensor = std::optional<TensorView>;

// [batch, heads, rows, dim], each of these sizes, or of any where it is below 0.
inline AttentionTensor attention_tensor(const char* name, const TensorView& tensor, const TensorView& beside,
                                        std::initializer_list<std::int64_t> sizes) {
  check(tensor.ndim() == 4, name, " must have 4 dimensions, got ", tensor.shape());
  check(tensor.dtype() == beside.dtype() && tensor.device_type() == beside.device_type() &&
            tensor.device_id() == beside.device_id(),
        name, " must have the dtype and the device of query");
  int d = 0;
  for (const std::int64_t size : sizes) {
    check(size < 0 || tensor.size(d) == size, name, " has a size in dimension ", d, " that does not fit, ",
          tensor.shape());
    ++d;
  }
  check(tensor.size(3) == 1 || tensor.stride(3) == 1 || tensor.numel() == 0, name,
        " must have stride 1 along the last dimension");
  return {tensor.raw_data(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline const std::int32_t* attention_counts(const char* name, const MaybeTensor& tensor, const TensorView& beside,
                                            std::int64_t count) {
  if (!tensor) return nullptr;
  check_rows(name, *tensor, beside, count);
  return tensor->data<const std::int32_t>();
}

// The arguments in the order of AttentionProblem.to_operator, and the two results.
inline AttentionArguments attention_arguments(
    const TensorView& query, const TensorView& key, const TensorView& value, const MaybeTensor& prefix_key,
    const MaybeTensor& prefix_value, const MaybeTensor& prefix_lengths, const MaybeTensor& page_table,
    const MaybeTensor& mask, const MaybeTensor& key_starts, const MaybeTensor& key_ends, const MaybeTensor& cu_seqlens,
    const MaybeTensor& cu_seqlens_k, const MaybeTensor& chosen, int left, int right, int block, int prefix_window,
    int offset, int max_length, double scale, double softcap, const TensorView& out, const TensorView& logsumexp) {
  check(query.ndim() == 4 && key.ndim() == 4 && value.ndim() == 4, "query, key and value must have 4 dimensions");
  const std::int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), dim = query.size(3);
  const std::int64_t kv_heads = key.size(1), num_keys = key.size(2), value_dim = value.size(3);
  check(kv_heads > 0 && heads % kv_heads == 0, "the key's heads must divide those of query, ", heads, ", got ",
        kv_heads);
  check(length <= INT32_MAX && num_keys <= INT32_MAX, "at most 2^31 - 1 rows, got ", length, " and ", num_keys);
  AttentionArguments a{};
  a.type = logit_type(query.dtype());
  a.query = attention_tensor("query", query, query, {batch, heads, length, dim});
  a.key = attention_tensor("key", key, query, {batch, kv_heads, num_keys, dim});
  a.value = attention_tensor("value", value, query, {batch, kv_heads, num_keys, value_dim});
  check(cu_seqlens.has_value() == cu_seqlens_k.has_value() && (!cu_seqlens || cu_seqlens->numel() > 0),
        "cu_seqlens and cu_seqlens_k go together and are not empty");
  const std::int64_t sequences = cu_seqlens ? cu_seqlens->numel() - 1 : batch;
  if (prefix_key) {
    check(prefix_value.has_value() && prefix_key->ndim() == 4, "a prefix has keys and values");
    const std::int64_t rows = page_table ? prefix_key->size(0) : sequences, capacity = prefix_key->size(2);
    a.prefix_key = attention_tensor("prefix_key", *prefix_key, query, {rows, kv_heads, capacity, dim});
    a.prefix_value = attention_tensor("prefix_value", *prefix_value, query, {rows, kv_heads, capacity, value_dim});
    std::int64_t keys = capacity;
    if (page_table) {
      check(page_table->ndim() == 2, "page_table must be [sequences, max_pages], got ", page_table->shape());
      a.page_size = int(capacity), a.max_pages = int(page_table->size(1)), keys = capacity * a.max_pages;
    }
    check(keys + num_keys <= INT32_MAX, "at most 2^31 - 1 keys, got ", keys + num_keys);
    a.capacity = int(keys);
  }
  a.prefix_lengths = attention_counts("prefix_lengths", prefix_lengths, query, sequences);
  a.page_table = attention_counts("page_table", page_table, query, sequences * a.max_pages);
  a.key_starts = attention_counts("key_starts", key_starts, query, batch);
  a.key_ends = attention_counts("key_ends", key_ends, query, batch);
  a.cu_seqlens = attention_counts("cu_seqlens", cu_seqlens, query, sequences + 1);
  a.cu_seqlens_k = attention_counts("cu_seqlens_k", cu_seqlens_k, query, sequences + 1);
  if (chosen) {
    check_rows("chosen", *chosen, query, sequences);
    a.chosen = chosen->data<const bool>();
  }
  if (mask) {
    check(mask->ndim() == 4 && mask->size(0) == batch && mask->size(1) == heads && mask->size(2) == length &&
              mask->size(3) == num_keys,
          "the mask must be [batch, heads, length, num_keys], got ", mask->shape());
    a.mask = mask->raw_data();
    a.mask_batch = mask->stride(0), a.mask_head = mask->stride(1), a.mask_row = mask->stride(2);
    a.mask_column = mask->stride(3);
    a.mask_type = mask->dtype() == DType::Bool      ? MaskType::Bool
                  : mask->dtype() == DType::Float32 ? MaskType::Float32
                                                    : MaskType::AsQuery;
    check(a.mask_type != MaskType::AsQuery || mask->dtype() == query.dtype(),
          "the mask must be bool, float32 or of the dtype of query, got ", mask->dtype());
  }
  check(block >= 1, "block must be at least 1, got ", block);
  a.visible = {left, right, block, prefix_window}, a.offset = offset;
  a.sequences = int(sequences), a.heads = int(heads), a.kv_heads = int(kv_heads);
  a.head_dim = int(dim), a.value_dim = int(value_dim), a.length = int(length), a.num_keys = int(num_keys);
  a.max_length = max_length, a.scale = float(scale), a.softcap = float(softcap);
  const AttentionTensor result = attention_tensor("out", out, query, {batch, heads, length, value_dim});
  a.out = out.raw_data(), a.out_batch = result.batch, a.out_head = result.head, a.out_row = result.row;
  check(logsumexp.dtype() == DType::Float32 && logsumexp.is_contiguous() && logsumexp.numel() == batch * heads * length,
        "logsumexp must be contiguous float32 [batch, heads, length], got ", logsumexp.shape());
  a.logsumexp = logsumexp.data<float>();
  return a;
}

}  // namespace diffusion_runtime
