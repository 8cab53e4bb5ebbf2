"""The Triton backend of ``sample_from_hidden`` and of the soft embeddings: what happens around the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_runtime.ops._settings import Settings

if TYPE_CHECKING:
    from diffusion_runtime.ops._sample_from_hidden import Run
    from diffusion_runtime.ops._soft_embedding import Softmax, Weigh

# Rows that are sampled together. What is kept of a row while the vocabulary is walked through is a tenth of its logits.
MOST_ROWS = 4096


def load_sample_from_hidden() -> Run:
    from diffusion_runtime.kernels import sample_from_hidden as kernel

    def run_group(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor]:
        ids = torch.empty(2, len(hidden), dtype=torch.int64, device=hidden.device)
        statistics = torch.empty(5, len(hidden), dtype=torch.float32, device=hidden.device)
        if len(hidden):
            fused = kernel.prefers_fused(hidden, settings.masked)
            kernel.sample_from_hidden(
                hidden, weight, bias, settings.allowed, *settings[:7], ids, statistics, fused=fused
            )
        return ids, statistics

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor]:
        hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
        groups = [slice(first, first + MOST_ROWS) for first in range(0, max(1, len(hidden)), MOST_ROWS)]
        found = [run_group(hidden[group], weight, bias, settings.of_rows(group)) for group in groups]
        ids, statistics = zip(*found, strict=True)
        return torch.cat(ids, 1), torch.cat(statistics, 1)

    return run


def load_weigh() -> Weigh:
    from diffusion_runtime.kernels import soft_embedding as kernel

    def weigh(logits: Tensor, softmax: Softmax, out: Tensor) -> None:
        assert softmax.logsumexp is not None
        kernel.weigh(logits, softmax.masked, softmax.temperature, softmax.softcap, softmax.logsumexp, out)

    return weigh
