#include "product.h"

#include "instruction_set.h"
#include "row_product.h"
#include "row_tasks.h"

namespace diffusion_runtime {

void product_cpu(const TensorView& rows, const TensorView& weight, const std::optional<TensorView>& bias,
                 const TensorView& out, const std::string& instruction_set) {
  const auto row_product = OF_INSTRUCTION_SET(find_instruction_set(instruction_set), row_product);
  for (const TensorView* tensor : {&rows, &weight, &out})
    check(tensor->is_cpu() && tensor->is_contiguous() && tensor->ndim() == 2,
          "product: matrices must be contiguous on the CPU, got ", tensor->shape());
  const std::int64_t count = rows.size(0), depth = rows.size(1), columns = weight.size(0);
  check(weight.size(1) == depth && out.size(0) == count && out.size(1) == columns, "product: out of ", out.shape(),
        " does not fit rows of ", rows.shape(), " and a weight of ", weight.shape());
  check(!bias || (bias->is_cpu() && bias->is_contiguous() && bias->ndim() == 1 && bias->size(0) == columns),
        "product: bias must be contiguous [", columns, "] on the CPU");
  const float *const from = rows.data<const float>(), *const matrix = weight.data<const float>();
  const float* const added = bias ? bias->data<const float>() : nullptr;
  float* const to = out.data<float>();
#pragma omp parallel if (count * depth * columns > kManyProducts)
  for_tasks(count, columns, [&](const Part& some, const Part& c) {
    row_product({from + some.first * depth, depth, some.count, matrix + c.first * depth, c.count, depth,
                 added == nullptr ? nullptr : added + c.first, 0, to + some.first * columns + c.first, columns});
  });
}

}  // namespace diffusion_runtime
