"""The products around a head and an embedding, by the fastest routine for each.

In float32 torch takes MKL, which leaves AVX-512 alone on AMD's processors: [256, 1024] x [1024, 262144] took 0.69 s by
MKL and 0.30 s by oneDNN on two cores of an EPYC of the fifth generation. With AVX2 alone MKL is as fast, and twice as
fast where oneDNN wants a transposed embedding ([256, 262144] x [262144, 704] on one core: 1.05 s and 2.1).

Both lay the weight out anew for each product, which is most of the work where rows are few: of our own kernel, which
reads it as it is, [8, 1024] x [1024, 8192] takes 2.1 ms and of MKL 9.1, with 256 rows 36 and 42.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_runtime.ops._instruction_set import cpp_instruction_set

# hidden [rows, dim], some rows of the weight [n, dim], the same of the bias [n] or None -> [rows, n]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Elements of a weight from which oneDNN is asked: it compiles a kernel for each shape, which takes about a millisecond.
_WORTH_COMPILING = 1 << 20


# Rows from which an embedding is transposed for oneDNN, and tokens that are at a time: the copy costs as much as what
# is gained with 80 rows.
_WORTH_TRANSPOSING = 128
_TRANSPOSED = 1024


def head_product(weight: Tensor) -> Product:
    """The routine for tiles of this weight; it depends on nothing else, so that a row does not depend on its batch."""
    if _suits_onednn(weight):
        return _by_onednn
    if weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous():
        wanted = cpp_instruction_set()
        if wanted is not None:
            return lambda hidden, tile, bias: run_cpp(hidden, tile, bias, wanted)
    return torch.nn.functional.linear


def add_product(total: Tensor, part: Tensor, embedding: Tensor) -> None:
    """``total += part @ embedding``: [rows, dim], [rows, n] in the dtype of the embedding, [n, dim]."""
    if len(part) >= _WORTH_TRANSPOSING and _suits_onednn(embedding):
        for first in range(0, len(embedding), _TRANSPOSED):
            some = slice(first, first + _TRANSPOSED)
            total += _by_onednn(part[:, some], embedding[some].T.contiguous(), None)
    elif total.dtype == embedding.dtype:
        total.addmm_(part, embedding)
    else:
        total += part @ embedding


def _suits_onednn(weight: Tensor) -> bool:
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.numel() >= _WORTH_COMPILING
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def run_cpp(hidden: Tensor, weight: Tensor, bias: Tensor | None, instruction_set: str) -> Tensor:
    from diffusion_runtime import _C

    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    _C.product(hidden.contiguous(), weight, bias, out, instruction_set)
    return out


def _by_onednn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # one row alone would go to a routine that rounds in another way
    rows = hidden if len(hidden) != 1 else hidden.expand(2, -1)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
    return product[: len(hidden)]
