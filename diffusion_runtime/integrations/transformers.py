"""``attn_implementation="diffusion_runtime"`` for the models of transformers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch.nn import Module

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


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` changed."""

    attention: int
    """Layers of the decoder whose cached keys are no longer joined to those of the canvas."""
    norms: int
    """Norms in one pass."""
    rotary: int
    """Attention layers, of encoder and decoder, that normalise and rotate queries and keys in one pass."""
    sampler: bool
    """Whether what follows the logits is ours."""
    graphs: bool
    """Whether the steps of a canvas are recorded once and replayed."""


def accelerate(
    model: Any,
    *,
    sampler: bool = True,
    attention: bool = True,
    norms: bool = True,
    graphs: bool | str = "auto",
    backend: str | None = None,
) -> Acceleration:
    """Make a DiffusionGemma of transformers faster in place; its ``generate`` and everything else are called as before.

    Weights and configurations stay what they were, and what is computed too, as far as roundings go. Drawn tokens
    follow the same distribution, by other random numbers.

    Args:
        model: a ``DiffusionGemmaForBlockDiffusion``. Others are refused, and so is a version of it that is laid out
            in another way than known here: nothing is changed then.
        sampler: from the hidden states to the next canvas, with no logits and no copy of them: draw, statistics,
            accepted positions, new noise, the stop and the next step's soft embedding. A logits processor of the
            caller's, or a compiled decoder, still makes the logits, which are then read once.
        attention: every attention layer runs :func:`diffusion_runtime.ops.attention`, and the decoder reads the cache
            where it is, dynamic or static, padded or not: no joined copy, no repeated head. (Padding with holes is
            joined as before.) With a static cache transformers would compile the model, and past the sliding window
            write the canvas over older keys; here nothing is compiled, and a static cache gives what a dynamic one
            gives. Calls :func:`register`.
        norms: RMS norms run :func:`diffusion_runtime.ops.rms_norm`, and those of queries and keys, with the rotation
            behind them, :func:`diffusion_runtime.ops.qk_norm_rope`.
        graphs: on a GPU, the third step of each canvas is recorded as a CUDA graph, which takes the rest: the host then
            starts one graph a step and reads whether all rows have finished. Needs ``sampler``, and has no part in
            steps that make logits. "auto": if the model is on a GPU now; a step that cannot be recorded is said in the
            log, and all are taken without. True: either is an error. False: no graphs.
        backend: of the attention, as for :func:`register`.

    Raises:
        ImportError: as :func:`register`, or this transformers has no DiffusionGemma.
        ValueError: a model that cannot be accelerated, with the reason; or one that is already; graphs that cannot be.
    """
    if graphs not in ("auto", True, False):
        raise ValueError(f'graphs must be "auto", True or False, got {graphs!r}')
    internals = _internals()
    if isinstance(model, Module) and model in _BEFORE:
        raise ValueError("the model is accelerated already: restore it first")
    reason = internals.why_not(model)
    if reason is not None:
        raise ValueError(f"cannot accelerate: the model {reason}")
    replayed = bool(graphs) and sampler and model.device.type == "cuda"
    if graphs is True and not replayed:
        raise ValueError(f"graphs need sampler=True and a model on a GPU, got sampler={sampler} on {model.device}")
    if attention:
        register(backend=backend)
    _BEFORE[model] = model.config._attn_implementation
    if attention:
        model.set_attn_implementation(NAME)
    if sampler:
        internals.swap_sampler(model)
    if replayed:
        internals.add_graphs(model, required=graphs is True)
    return Acceleration(
        attention=internals.swap_cache(model) if attention else 0,
        norms=internals.swap_norms(model) if norms else 0,
        rotary=internals.swap_heads(model) if norms else 0,
        sampler=sampler,
        graphs=replayed,
    )


def restore(model: Any) -> None:
    """Undo :func:`accelerate`. A model that is not accelerated stays as it is."""
    if model not in _BEFORE:
        return
    internals = _internals()
    internals.swap_cache(model, back=True)
    internals.swap_norms(model, back=True)
    internals.swap_heads(model, back=True)
    internals.swap_sampler(model, back=True)
    model.set_attn_implementation(_BEFORE.pop(model))


_BEFORE: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # the attention that accelerated models had


def _internals() -> Any:
    _interfaces()
    try:
        from diffusion_runtime.integrations import _transformers_diffusion_gemma
    except ImportError as error:
        raise ImportError("this transformers has no DiffusionGemma: it came with 5.17") from error
    return _transformers_diffusion_gemma


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
