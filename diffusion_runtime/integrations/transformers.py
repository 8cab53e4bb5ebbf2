"""``attn_implementation="diffusion_runtime"`` for the models of transformers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from diffusion_runtime.ops._registry import BACKENDS

NAME = "diffusion_runtime"


def register(*, backend: str | None = None) -> None:
    """Let every model of transformers run its attention through :func:`diffusion_runtime.ops.attention`.

    Afterwards ``from_pretrained(..., attn_implementation="diffusion_runtime")``, or
    ``model.set_attn_implementation("diffusion_runtime")`` for a model that exists, is all there is to do. To register
    again changes the backend of all such models.

    What a model asks of its masks (causal, bidirectional, sliding, padded left or right, before a cache) stays a rule
    where the rule says exactly the same, and no ``[length, num_keys]`` tensor is made. Everything else is computed with
    the boolean tensor that transformers itself would make: equal results, more memory and time. That is so for padding
    with holes, packed sequences, chunked attention, image tokens that see each other, masks of the caller's own, and
    whatever is traced by torch.compile. On a GPU, a padding mask is looked at once for each mask that a forward makes,
    which synchronises, as it does with ``"sdpa"``.

    Soft caps, attention sinks and position biases are computed. Dropout during training runs in torch's own attention,
    and so does not go with a soft cap or sinks. Rows that see no key, which are padding, give 0.

    Args:
        backend: as for :func:`diffusion_runtime.ops.attention`; None for the first that can run.

    Raises:
        ImportError: transformers is absent, or makes masks in a way that this version does not know.
        ValueError: an unknown backend. When a model runs: an argument of its attention that cannot be computed exactly
            (head masks, indices of sparse attention, pages of continuous batching, ``output_attentions``), by name.
    """
    if backend not in (None, "auto", *BACKENDS):
        raise ValueError(f"backend must be None, auto, {', '.join(BACKENDS)}, got {backend!r}")
    attention_functions, mask_functions = _interfaces()

    from diffusion_runtime.integrations._transformers_attention import attention_forward
    from diffusion_runtime.integrations._transformers_masks import make_mask

    attention_functions.register(NAME, partial(attention_forward, backend=backend))
    # with the first alone, transformers would silently make no masks at all
    mask_functions.register(NAME, make_mask)


def unregister() -> None:
    """Undo :func:`register`; models that use it cannot run until it is called again. Not registered: nothing happens.

    Raises:
        ImportError: as :func:`register`.
    """
    for interface in _interfaces():
        interface._global_mapping.pop(NAME, None)


def _interfaces() -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install 'diffusion-runtime[transformers]'") from error
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        known = {"q_length", "q_offset", "kv_offset", "mask_function"} <= inspect.signature(sdpa_mask).parameters.keys()
    except ImportError:
        known = False
    if not known:
        raise ImportError(
            f"transformers {transformers.__version__} makes its masks in another way than known here: "
            "pip install --upgrade 'diffusion-runtime[transformers]'"
        )
    return AttentionInterface, AttentionMaskInterface
