"""The CUDA backend of ``sample_from_hidden``, and the part of ``soft_embedding`` that is no matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_runtime.ops._settings import Settings

if TYPE_CHECKING:
    from diffusion_runtime.ops._soft_embedding import Softmax

# The fused kernel reads the weights once and makes no logits, but multiplies at half the rate of the library's kernels
# or less. Up to 64 rows the weights' bytes decide. With `masked` only the device knows how many rows are left; most
# often few are, and the library would compute all of them.
MOST_FUSED_ROWS = 64
MOST_FUSED_MASKED_ROWS = 256

# Otherwise: logits that exist at once, 32 MB of bfloat16 at most, which are read from the second-level cache; and rows
# that are done together, so that a tile is wide and the parts of a vocabulary of 2^17 take 32 MB.
MOST_LOGITS = 1 << 24
MOST_ROWS = 1024
TILE = 128  # tokens


def load_sample_from_hidden() -> Callable[[Tensor, Tensor, Tensor | None, Settings], tuple[Tensor, Tensor]]:
    from diffusion_runtime import _C_cuda

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor]:
        hidden, weight = _with_rows(hidden), _with_rows(weight)
        if len(hidden) <= MOST_ROWS:
            return run_rows(hidden, weight, bias, settings)
        groups = [slice(first, first + MOST_ROWS) for first in range(0, len(hidden), MOST_ROWS)]
        found = [run_rows(hidden[group], weight, bias, settings.of_rows(group)) for group in groups]
        ids, statistics = zip(*found, strict=True)
        return torch.cat(ids, 1), torch.cat(statistics, 1)

    def run_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor]:
        rows, vocab, device = len(hidden), len(weight), hidden.device
        ids = torch.empty(2, rows, dtype=torch.int64, device=device)
        statistics = torch.empty(5, rows, dtype=torch.float32, device=device)
        if not rows:
            return ids, statistics
        with torch.cuda.device(device):
            size = _C_cuda.sample_from_hidden_workspace(rows, vocab)
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            stream = torch.cuda.current_stream().cuda_stream
            op = _C_cuda.SampleFromHidden(hidden, weight, bias, *settings[:8], ids, statistics, workspace)
            if rows <= most_fused_rows(settings) and op.head_parts_takes():
                op.head_parts(stream)
            else:
                for first, logits in logits_of_tiles(hidden, weight, bias):
                    op.logit_parts(logits, first, stream)
            op.finish(stream)
        return ids, statistics

    return run


def most_fused_rows(settings: Settings) -> int:
    return MOST_FUSED_ROWS if settings.masked is None else MOST_FUSED_MASKED_ROWS


def logits_of_tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The logits of one tile of the vocabulary after the other, with its first token, all in the same memory."""
    rows, vocab = len(hidden), len(weight)
    size = min(max(TILE, MOST_LOGITS // rows // TILE * TILE), vocab)
    buffer = torch.empty(rows, size, dtype=hidden.dtype, device=hidden.device)
    for first in range(0, vocab, size):
        tile = weight[first : first + size].t()
        logits = buffer[:, : tile.shape[1]]
        if bias is None:
            torch.mm(hidden, tile, out=logits)
        else:
            torch.addmm(bias[first : first + size], hidden, tile, out=logits)
        yield first, logits


def load_weigh() -> Callable[[Tensor, Softmax, Tensor], None]:
    from diffusion_runtime import _C_cuda

    def weigh(logits: Tensor, softmax: Softmax, out: Tensor) -> None:
        """Fills ``out`` ``[rows, n]`` with ``exp(y / temperature - logsumexp)`` of logits ``[outer, inner, n]``."""
        assert softmax.logsumexp is not None
        if out.dtype == torch.float64:
            narrow = torch.empty_like(out, dtype=torch.float32)
            weigh(logits, softmax, narrow)
            out.copy_(narrow)
            return
        with torch.cuda.device(logits.device):
            stream = torch.cuda.current_stream().cuda_stream
            logsumexp = softmax.logsumexp.float()
            _C_cuda.weigh(logits, softmax.masked, softmax.temperature, softmax.softcap, logsumexp, out, stream)

    return weigh


def _with_rows(matrix: Tensor) -> Tensor:
    """With stride 1 along the rows, as kernels read them."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
