"""Ops as ``torch.library`` operators, which is how they go through ``torch.compile`` without a graph break.

In eager mode the public functions call their backend directly: an operator call costs ten microseconds more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_runtime.ops import _sample_tokens


@torch.library.custom_op("diffusion_runtime::sample_tokens", mutates_args=())
def _sample_tokens_operator(
    logits: Tensor,
    masked: Tensor | None,
    temperature: Tensor | None,
    temperature_value: float,
    seed: Tensor | None,
    seed_value: int,
    position: Tensor | None,
    step: Tensor | None,
    step_value: int,
    statistics_temperature: Tensor | None,
    statistics_temperature_value: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = _sample_tokens.Rows(
        logits,
        masked,
        temperature_value if temperature is None else temperature,
        seed_value if seed is None else seed,
        position,
        step_value if step is None else step,
        statistics_temperature_value if statistics_temperature is None else statistics_temperature,
        softcap,
    )
    ids, statistics = _sample_tokens.SPEC.resolve(logits.device.type, logits.dtype, backend)(rows)
    return ids, statistics


@_sample_tokens_operator.register_fake
def _(logits: Tensor, *_settings: object) -> tuple[Tensor, Tensor]:
    count = logits.shape[0] * logits.shape[1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((2, count), dtype=torch.int64), logits.new_empty((5, count), dtype=dtype)
