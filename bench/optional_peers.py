"""Libraries that may be installed beside a GPU. Without one its peer is left out, and the record says so.

None of them has been run by us yet: their answers are checked like ours before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from torch import Tensor

Attend = Callable[[], Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Attend]:
    """``[1, heads, length, head_dim]``, every query sees every key: flash-attn and FlashInfer, for heads up to 256."""
    found: dict[str, Attend] = {}
    if not query.is_cuda or query.shape[-1] > 256:
        return found
    if find_spec("flash_attn"):
        found["flash-attn"] = partial(_flash_attention, query, key, value)
    if find_spec("flashinfer"):
        found["FlashInfer"] = partial(_flashinfer, query, key, value)
    return found


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> dict[str, Attend]:
    """Liger's kernel, which rounds before the weight as Llama does."""
    if not x.is_cuda or not find_spec("liger_kernel"):
        return {}
    from liger_kernel.transformers.functional import liger_rms_norm

    return {"Liger": partial(liger_rms_norm, x, weight, eps, casting_mode="llama", in_place=False)}


def _flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def _flashinfer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flashinfer import single_prefill_with_kv_cache

    out: Tensor = single_prefill_with_kv_cache(*(x[0].transpose(0, 1) for x in (query, key, value)), causal=False)
    return out.transpose(0, 1)[None]
