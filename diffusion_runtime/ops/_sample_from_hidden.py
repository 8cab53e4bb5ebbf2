"""The LM head and the sampler as one op: no ``[rows, vocab]`` tensor in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion_runtime.ops import _head_cpp, _head_cuda, _head_triton
from diffusion_runtime.ops._products import head_product
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices
from diffusion_runtime.ops._sample_reference import sample_reference
from diffusion_runtime.ops._sample_tokens import CHECKED, FLOATS, TokenSamples, as_samples, check_distributions
from diffusion_runtime.ops._sample_tokens import SPEC as SAMPLE_TOKENS
from diffusion_runtime.ops._settings import Settings, read_settings, to_operator

# Logits that may exist at once, where a row's logits have to be read more than once: 16 MB of float32.
MOST_LOGITS = 1 << 22

# hidden [rows, dim], weight [vocab, dim], bias [vocab] or None, settings -> ids [2, rows], statistics [5, rows]
Run = Callable[[Tensor, Tensor, Tensor | None, Settings], tuple[Tensor, Tensor]]


def sample_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 0.0,
    seed: Tensor | int | None = None,
    position: Tensor | None = None,
    step: Tensor | int = 0,
    masked: Tensor | None = None,
    statistics_temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    allowed: Tensor | None = None,
    suppress: Sequence[int] | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    statistics: str = "unrestricted",
    backend: str | None = None,
) -> TokenSamples:
    """``sample_tokens(hidden @ weight.T + bias, ...)`` without its ``[rows, vocab]`` logits.

    The same results and the same draws, up to the rounding of the products. The vocabulary is walked through in tiles;
    of each only a few numbers per row are kept, and the tile that a draw falls into is computed once more. Rows that
    are not ``masked`` cost nothing on a CPU; on a GPU they are gathered away on the device where the fused kernel runs.

    With ``top_k``, ``top_p`` or ``min_p``, or with ``allowed`` or ``suppress`` and unrestricted statistics, a row's
    logits are read more than once: then at most four million logits (16 MB) exist at a time, a group of rows after the
    other.

    Logits are rounded to the dtype of the weight, as those of the caller's own ``hidden @ weight.T`` would be; sums
    over them are in float32. A row depends on its batch no further than torch's products do: in how they round.

    Args:
        hidden: ``[..., dim]`` float32, float16, bfloat16 or float64: the last hidden states, after the final norm.
        weight: ``[vocab, dim]`` of the same dtype: the LM head, or the tied embedding.
        bias: ``[vocab]`` of the same dtype, or None.

    All other arguments, the results and the errors are those of :func:`diffusion_runtime.ops.sample_tokens`.
    """
    validate_head(hidden, weight, bias)
    leading = hidden.shape[:-1]
    settings = read_settings(
        leading, weight.shape[0], hidden.device,
        temperature=temperature, seed=seed, position=places_of(hidden, position), step=step, masked=masked,
        statistics_temperature=statistics_temperature, softcap=softcap, allowed=allowed, suppress=suppress,
        top_k=top_k, top_p=top_p, min_p=min_p, statistics=statistics,
    )  # fmt: skip
    rows, weight = hidden.detach().reshape(leading.numel(), hidden.shape[-1]), weight.detach()
    bias = None if bias is None else bias.detach().contiguous()
    if torch.compiler.is_compiling():
        operator = torch.ops.diffusion_runtime.sample_from_hidden
        ids, values = operator(rows, weight, bias, *to_operator(settings), backend or "auto")
    else:
        ids, values = run(rows, weight, bias, settings, backend)
        if hidden.device.type == "cpu" or CHECKED:
            check_distributions(ids, settings, leading, lambda r: head(rows[r : r + 1], weight, bias)[0])
    return as_samples(ids, values, leading)


def places_of(hidden: Tensor, position: Tensor | None) -> Tensor:
    """Said even where it is the default: rows are flattened, and their index along the length is lost."""
    if position is not None:
        return position
    length = torch.arange(hidden.shape[-2] if hidden.ndim > 1 else 1, device=hidden.device)
    return length if hidden.ndim > 1 else length[0]


def validate_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name == "bias" and value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value))}")
        if value.dtype != hidden.dtype or value.device != hidden.device:
            raise ValueError(
                f"{name} must be {hidden.dtype} on {hidden.device} as hidden is, got {value.dtype} on {value.device}"
            )
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1] or hidden.shape[-1] == 0:
        raise ValueError(
            f"hidden must be [..., dim] and weight [vocab, dim], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not 0 < weight.shape[0] < 2**31:
        raise ValueError(f"weight must have between 1 and 2^31 - 1 rows, got {weight.shape[0]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits ``[rows, vocab]`` in the dtype of the arguments."""
    return torch.nn.functional.linear(hidden, weight, bias)


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The op on flat rows, on the backend that is to run it."""
    if settings.masked is not None and hidden.device.type == "cpu":
        return _of_masked_rows(hidden, weight, bias, settings, backend)
    if settings.cuts or (settings.allowed is not None and not settings.restricted):
        return _by_groups_of_rows(hidden, weight, bias, settings, backend)
    fused: Run = SPEC.resolve(hidden.device.type, hidden.dtype, backend)
    return fused(hidden, weight, bias, settings)


def _of_masked_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, backend: str | None
) -> tuple[Tensor, Tensor]:
    assert settings.masked is not None
    if settings.masked.all():  # as good as not said, and a dozen small operations fewer
        return run(hidden, weight, bias, settings._replace(masked=None), backend)
    chosen = settings.masked.nonzero()[:, 0]
    found = run(hidden[chosen], weight, bias, settings._replace(masked=None).of_rows(chosen), backend)
    return spread(found, chosen, len(hidden))


def spread(found: tuple[Tensor, Tensor], chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and statistics of some rows among all of them."""
    ids, statistics = (x.new_full((len(x), count), fill) for x, fill in zip(found, (-1, 0), strict=True))
    ids[:, chosen], statistics[:, chosen] = found
    return ids, statistics


def _by_groups_of_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, backend: str | None
) -> tuple[Tensor, Tensor]:
    sample = SAMPLE_TOKENS.resolve(hidden.device.type, hidden.dtype, backend)
    size = max(1, MOST_LOGITS // len(weight))
    product = head_product(weight)
    groups = [slice(first, first + size) for first in range(0, max(1, len(hidden)), size)]
    found = [sample(product(hidden[group], weight, bias)[None], settings.of_rows(group)) for group in groups]
    ids, statistics = zip(*found, strict=True)
    return torch.cat(ids, 1), torch.cat(statistics, 1)


def _reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor]:
    return sample_reference(head(hidden, weight, bias)[None], settings)


SPEC = OpSpec(
    name="sample_from_hidden",
    reference=_reference,
    validate=validate_head,
    implementations=(
        Implementation("cuda", frozenset({"cuda"}), FLOATS, _head_cuda.load_sample_from_hidden),
        Implementation("cpp", frozenset({"cpu"}), FLOATS, _head_cpp.load_sample_from_hidden),
        Implementation("triton", triton_devices(), FLOATS, _head_triton.load_sample_from_hidden),
    ),
)
