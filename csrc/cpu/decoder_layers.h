#pragma once

#include <string>
#include <vector>

#include "attention.h"

namespace diffusion_runtime {

// All layers of a decoder (diffusion_runtime/ops/_decoder_layers.py documents them). Floats are float32, all tensors
// contiguous and on the CPU.
//   x               [batch, length, hidden], overwritten
//   layers          of each the tensors of LayerWeights, in their order; biases and norms of heads may be none
//   norm            [hidden], of the last norm
//   cos, sin        [table_rows, pairs]; row r of batch * length takes row r % table_rows
//   pool            [layers, 2, num_pages, page_size, kv_heads, head_dim], keys and values
//   places          [batch * length] int64, of each row among the num_pages * page_size of a layer, where its key and
//                   value are written before the pool is read; none: nothing is written
//   prefix_lengths  [batch] int32, how many keys of the pool are seen; none: it is not read
//   page_table      [batch, max_pages] int32
//   own_keys        whether keys of x are seen behind the prefix
//   key_ends        [batch] int32, how many of them are real; none: all
//   chosen to offset: as attention_cpu takes them
void decoder_layers_cpu(const TensorView& x, const std::vector<std::vector<MaybeTensor>>& layers,
                        const TensorView& norm, float eps, std::int64_t head_dim, const TensorView& cos,
                        const TensorView& sin, const MaybeTensor& pool, const MaybeTensor& places,
                        const MaybeTensor& prefix_lengths, const MaybeTensor& page_table, bool own_keys,
                        const MaybeTensor& key_ends, const MaybeTensor& chosen, int left, int right, int block,
                        int prefix_window, int offset, const std::string& instruction_set);

}  // namespace diffusion_runtime
