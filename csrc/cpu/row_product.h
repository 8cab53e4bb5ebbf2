// Products of some rows with a matrix as nn.Linear keeps it, as each instruction set implements them (row_product.inc).
#pragma once

#include <stdint.h>

namespace diffusion_runtime {

// to[r][c] = sum over k of rows[r][k] * weight[c][k], + added[r][c]. Strides in elements, 1 along k and c.
//
// A sum's order depends on `depth` alone: a row's bits do not depend on what is beside it.
struct RowProduct {
  const float* rows;
  int64_t rows_stride;
  int64_t num_rows;  // at least 1
  const float* weight;
  int64_t columns, depth;  // weight [columns][depth], contiguous
  const float* added;      // or null; stride 0: the same for all rows
  int64_t added_stride;
  float* to;
  int64_t to_stride;
};

#define ROW_PRODUCT_FUNCTIONS(instruction_set)                                              \
  namespace instruction_set {                                                               \
  void row_product(const RowProduct& p);                                                    \
  /* to = silu(rows @ weight^T) * (rows @ up^T), up laid out as weight; nothing is added */ \
  void gated_row_product(const RowProduct& p, const float* up);                             \
  }
ROW_PRODUCT_FUNCTIONS(avx512)
ROW_PRODUCT_FUNCTIONS(avx2)
ROW_PRODUCT_FUNCTIONS(portable)
#undef ROW_PRODUCT_FUNCTIONS

}  // namespace diffusion_runtime
