"""The embedding that a distribution over tokens expects: ``softmax(logits / temperature) @ embedding``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops import _head_cpp, _head_cuda, _head_triton
from diffusion_runtime.ops._products import add_product, head_product
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices
from diffusion_runtime.ops._rows import Setting, as_rows, float_setting, mask_setting
from diffusion_runtime.ops._sample_from_hidden import head, validate_head
from diffusion_runtime.ops._sample_from_hidden import run as sample_from_hidden_rows
from diffusion_runtime.ops._sample_reference import softcapped
from diffusion_runtime.ops._sample_tokens import FLOATS
from diffusion_runtime.ops._sample_tokens import SPEC as SAMPLE_TOKENS
from diffusion_runtime.ops._sample_tokens import Run as RunSampler
from diffusion_runtime.ops._settings import Settings, softcap_setting


class Softmax(NamedTuple):
    """Which softmax, as backends take it; a tensor has one element for each row."""

    temperature: Setting
    softcap: float  # 0: none
    masked: Tensor | None
    logsumexp: Tensor | None  # [rows] float32, or None: to be found


def soft_embedding(
    logits: Tensor,
    embedding: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    masked: Tensor | None = None,
    logsumexp: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``softmax(y / temperature) @ embedding`` with ``y = softcap * tanh(logits / softcap)`` (or ``y = logits``).

    The probabilities never exist at full size: they are made a tile of the vocabulary at a time, in float32, and
    multiplied in the dtype of the embedding, as ``probabilities.to(embedding.dtype) @ embedding`` would be. Results
    carry no gradient.

    Args:
        logits: ``[..., vocab]`` float32, float16, bfloat16 or float64. The last two dimensions may be any slice.
        embedding: ``[vocab, dim]`` floating point.
        temperature: above 0 and finite; a float, or a tensor that broadcasts to the leading shape.
        softcap: above 0, or None.
        masked: bool, broadcastable to the leading shape. Rows where it is False are not read and give 0.
        logsumexp: of ``y / temperature``, float32, of the leading shape, if it is known:
            ``sample_tokens(..., statistics_temperature=temperature).logsumexp``. It spares one pass over the logits,
            and is taken as it is.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None picks the fastest that can run.

    Returns:
        ``[..., dim]`` in the dtype of the embedding.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; on a CPU, a row without a
            distribution (NaN, ``inf``, or nothing but ``-inf``). On a GPU such a row gives NaN.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    _validate(logits, embedding)
    leading = logits.shape[:-1]
    softmax = _read_softmax(leading, logits.device, temperature, softcap, masked, logsumexp)
    rows, embedding = as_rows(logits), embedding.detach()
    if torch.compiler.is_compiling():
        operator = torch.ops.diffusion_runtime.soft_embedding
        result: Tensor = operator(rows, embedding, *to_operator(softmax), backend or "auto")
    else:
        run: Run = SPEC.resolve(logits.device.type, logits.dtype, backend)
        result = run(rows, embedding, softmax)
    return result.view(*leading, embedding.shape[1])


def soft_embedding_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    masked: Tensor | None = None,
    logsumexp: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``soft_embedding(hidden @ weight.T + bias, embedding, ...)`` without the logits.

    Args:
        hidden, weight, bias: as in :func:`diffusion_runtime.ops.sample_from_hidden`.
        embedding: ``[vocab, dim]``; None: the weight, where it is tied to the embedding.

    All else as in :func:`soft_embedding`; with ``logsumexp``, of ``sample_from_hidden``, the head is computed once, and
    without it twice.
    """
    validate_head(hidden, weight, bias)
    embedding = weight if embedding is None else embedding
    leading = hidden.shape[:-1]
    check_embedding(embedding, weight, hidden)
    softmax = _read_softmax(leading, hidden.device, temperature, softcap, masked, logsumexp)
    rows = hidden.detach().reshape(leading.numel(), hidden.shape[-1])
    weight, embedding = weight.detach(), embedding.detach()
    bias = None if bias is None else bias.detach().contiguous()
    if torch.compiler.is_compiling():
        operator = torch.ops.diffusion_runtime.soft_embedding_from_hidden
        result: Tensor = operator(rows, weight, bias, embedding, *to_operator(softmax), backend or "auto")
    else:
        run: RunFromHidden = SPEC_FROM_HIDDEN.resolve(hidden.device.type, hidden.dtype, backend)
        result = run(rows, weight, bias, embedding, softmax)
    return result.view(*leading, embedding.shape[1])


def check_embedding(embedding: Tensor, weight: Tensor, hidden: Tensor) -> None:
    if embedding.ndim != 2 or embedding.shape[0] != weight.shape[0] or embedding.device != hidden.device:
        raise ValueError(
            f"embedding must be [{weight.shape[0]}, dim] on {hidden.device}, "
            f"got {tuple(embedding.shape)} on {embedding.device}"
        )


MIN_TILE = 1024  # tokens
# that exist at once: on a CPU few enough for a cache, with a tile of 1024 tokens at least; on a GPU enough for products
# that fill it, and 32 MB of bfloat16, which its second-level cache can hold until they are multiplied
MOST_PROBABILITIES = {"cpu": 1 << 20, "cuda": 1 << 24}

# logits [outer, inner, n], softmax with its logsumexp, out [rows, n] in float32, float16 or bfloat16, rows may be
# strided: fills it with exp(y / temperature - logsumexp), and with 0 in rows that are not masked, which are not read
Weigh = Callable[[Tensor, Softmax, Tensor], None]
# logits [outer, inner, vocab], embedding [vocab, dim], softmax -> [rows, dim]
Run = Callable[[Tensor, Tensor, Softmax], Tensor]
# hidden [rows, dim], weight [vocab, dim], bias [vocab] or None, embedding [vocab, dim of the result], softmax
RunFromHidden = Callable[[Tensor, Tensor, Tensor | None, Tensor, Softmax], Tensor]


def _read_softmax(
    leading: torch.Size,
    device: torch.device,
    temperature: Tensor | float,
    softcap: float | None,
    masked: Tensor | None,
    logsumexp: Tensor | None,
) -> Softmax:
    if logsumexp is not None:
        if not isinstance(logsumexp, Tensor) or logsumexp.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"logsumexp must be float32, got {getattr(logsumexp, 'dtype', type(logsumexp).__name__)}")
        if logsumexp.shape != leading or logsumexp.device != device:
            expected = f"{tuple(leading)} on {device}"
            raise ValueError(f"logsumexp must be {expected}, got {tuple(logsumexp.shape)} on {logsumexp.device}")
        logsumexp = logsumexp.detach().reshape(-1).contiguous()
    return Softmax(
        float_setting("temperature", temperature, leading, device, zero=False),
        softcap_setting(softcap),
        mask_setting("masked", masked, leading, device),
        logsumexp,
    )


def to_operator(softmax: Softmax) -> list[Any]:
    """A softmax as an operator of ``_library.py`` takes it: the temperature is a tensor or None, then a number."""
    temperature, *others = softmax
    return [temperature, 1.0, *others] if isinstance(temperature, Tensor) else [None, temperature, *others]


def from_operator(tensor: Tensor | None, number: float, *others: Any) -> Softmax:
    """The inverse of :func:`to_operator`."""
    return Softmax(number if tensor is None else tensor, *others)


def _validate(logits: Tensor, embedding: Tensor) -> None:
    for name, value in (("logits", logits), ("embedding", embedding)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value))}")
    if logits.ndim == 0 or embedding.ndim != 2 or logits.shape[-1] != embedding.shape[0] or not len(embedding):
        raise ValueError(
            "logits must be [..., vocab] and embedding [vocab, dim], "
            f"got {tuple(logits.shape)} and {tuple(embedding.shape)}"
        )
    if embedding.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, but embedding is on {embedding.device}")


def tiled(weigh: Weigh, backend: str) -> Run:
    """The op over tiles of the vocabulary, around a kernel that turns logits of a tile into probabilities."""

    def run(logits: Tensor, embedding: Tensor, softmax: Softmax) -> Tensor:
        if softmax.logsumexp is None:
            measure: RunSampler = SAMPLE_TOKENS.resolve(logits.device.type, logits.dtype, backend)
            settings = Settings(
                masked=softmax.masked, statistics_temperature=softmax.temperature, softcap=softmax.softcap
            )
            softmax = softmax._replace(logsumexp=_logsumexp(measure(logits, settings), settings, logits.device))
        return _accumulate(weigh, lambda tile: logits[:, :, tile], embedding, softmax)

    return run


def tiled_from_hidden(weigh: Weigh, backend: str) -> RunFromHidden:
    """As :func:`tiled`; the logits of a tile are made when they are needed."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, embedding: Tensor, softmax: Softmax) -> Tensor:
        if softmax.logsumexp is None:
            settings = Settings(
                masked=softmax.masked, statistics_temperature=softmax.temperature, softcap=softmax.softcap
            )
            found = sample_from_hidden_rows(hidden, weight, bias, settings, backend)
            softmax = softmax._replace(logsumexp=_logsumexp(found, settings, hidden.device))

        product = head_product(weight)

        def logits_of(tile: slice) -> Tensor:
            return product(hidden, weight[tile], None if bias is None else bias[tile])[None]

        return _accumulate(weigh, logits_of, embedding, softmax)

    return run


def _logsumexp(found: tuple[Tensor, Tensor], settings: Settings, device: torch.device) -> Tensor:
    ids, statistics = found
    if device.type == "cpu":
        invalid = ids[0] < 0 if settings.masked is None else (ids[0] < 0) & settings.masked
        if invalid.any():
            raise ValueError(f"row {int(invalid.nonzero()[0])} has no distribution: NaN, inf or nothing but -inf")
    return statistics[4]


def _accumulate(weigh: Weigh, logits_of: Callable[[slice], Tensor], embedding: Tensor, softmax: Softmax) -> Tensor:
    assert softmax.logsumexp is not None
    num_rows, (vocab, dim) = len(softmax.logsumexp), embedding.shape
    most = MOST_PROBABILITIES.get(embedding.device.type, MOST_PROBABILITIES["cpu"])
    size = max(MIN_TILE, most // max(1, num_rows) // MIN_TILE * MIN_TILE)
    # partial products are in the dtype of the embedding, their sum in float32 at least
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    total = torch.zeros(num_rows, dim, dtype=dtype, device=embedding.device)
    narrow = torch.float32 if embedding.dtype == torch.float64 else embedding.dtype
    probabilities = torch.empty(num_rows, min(size, vocab), dtype=narrow, device=embedding.device)
    for first in range(0, vocab, size) if num_rows else ():
        tile = slice(first, min(first + size, vocab))
        part = probabilities[:, : tile.stop - first]
        weigh(logits_of(tile), softmax, part)
        add_product(total, part.to(embedding.dtype), embedding[tile])
    return total.to(embedding.dtype)


def _reference(logits: Tensor, embedding: Tensor, softmax: Softmax) -> Tensor:
    x = logits.reshape(-1, logits.shape[2])
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if softmax.masked is not None:
        x = x.masked_fill(~softmax.masked[:, None], 0)
    temperature = torch.as_tensor(softmax.temperature, dtype=x.dtype, device=x.device).expand(len(x))
    z = softcapped(x, softmax.softcap) / temperature[:, None]
    if softmax.logsumexp is None:
        probabilities = z.softmax(-1)
        if z.device.type == "cpu" and probabilities.isnan().any():
            first = int(probabilities.isnan().any(-1).nonzero()[0])
            raise ValueError(f"row {first} of the logits has no distribution")
    else:
        probabilities = (z - softmax.logsumexp[:, None]).exp()
    result = probabilities.to(embedding.dtype) @ embedding
    return result if softmax.masked is None else result.masked_fill(~softmax.masked[:, None], 0)


def _reference_from_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, embedding: Tensor, softmax: Softmax
) -> Tensor:
    return _reference(head(hidden, weight, bias)[None], embedding, softmax)


def _implementations(loop: Callable[[Weigh, str], Callable[..., Tensor]]) -> tuple[Implementation, ...]:
    """The loop over tiles around the kernel of each backend."""

    def implementation(backend: str, devices: frozenset[str], load: Callable[[], Weigh]) -> Implementation:
        return Implementation(backend, devices, FLOATS, lambda: loop(load(), backend))

    return (
        implementation("cuda", frozenset({"cuda"}), _head_cuda.load_weigh),
        implementation("cpp", frozenset({"cpu"}), _head_cpp.load_weigh),
        implementation("triton", triton_devices(), _head_triton.load_weigh),
    )


SPEC = OpSpec(
    name="soft_embedding",
    reference=_reference,
    validate=_validate,
    implementations=_implementations(tiled),
)
SPEC_FROM_HIDDEN = OpSpec(
    name="soft_embedding_from_hidden",
    reference=_reference_from_hidden,
    validate=validate_head,
    implementations=_implementations(tiled_from_hidden),
)
