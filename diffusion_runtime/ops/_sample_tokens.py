"""From logits to a candidate token and the statistics a policy needs, in one pass over each row."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops._instruction_set import instruction_set
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices
from diffusion_runtime.ops._restriction import unpack_allowed
from diffusion_runtime.ops._rows import as_rows
from diffusion_runtime.ops._sample_reference import sample_reference
from diffusion_runtime.ops._settings import Settings, read_settings, to_operator

# read once; on a GPU, reading the result of the check synchronises
CHECKED = os.environ.get("DIFFUSION_RUNTIME_CHECKED") == "1"


class TokenSamples(NamedTuple):
    """What :func:`sample_tokens` gives for each row; every field has the leading shape of the logits."""

    token: Tensor  # int64: the candidate
    logprob: Tensor  # of the candidate, nats; -inf if the statistics give it no probability
    argmax: Tensor  # int64: the most probable token, the lowest id at a tie
    confidence: Tensor  # probability of argmax
    margin: Tensor  # confidence minus the probability of the second best token; 0 at a tie
    entropy: Tensor  # nats
    logsumexp: Tensor  # of softcap(logits) / statistics_temperature, nats


# logits [outer, inner, vocab], settings -> ids [2, rows] int64, statistics [5, rows]
Run = Callable[[Tensor, Settings], tuple[Tensor, Tensor]]


def sample_tokens(
    logits: Tensor,
    *,
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
    """Pick a candidate token in each row of logits and measure the row's distribution, in one pass.

    With ``y = softcap * tanh(logits / softcap)`` (or ``y = logits``), the candidate is the argmax where
    ``temperature`` is 0 and an exact draw from ``softmax(y / temperature)`` elsewhere; the statistics are those of
    ``softmax(y / statistics_temperature)``. Sums are in float32 whatever the logits are, statistics are float32
    (float64 for float64 logits, which only the reference takes). No copy of the logits is made. A logit of ``-inf``
    is a token that cannot be drawn and stays ``-inf`` under the softcap. Results carry no gradient.

    A draw is an inverse CDF in two levels: one uniform picks a tile of 128 tokens by its mass, a second one a token in
    the tile, both from Philox4x32-10 with key ``seed`` and counter ``(position, step, 0, 0)``. So it depends on the
    row's logits, seed, position and step, and on nothing else: not on the batch, the row number or the backend, except
    where two roundings of a mass straddle the uniform.

    The candidate can be restricted. Tokens that ``allowed`` and ``suppress`` rule out are never candidates. Where a row
    is drawn, ``softmax(y / temperature)`` of the others is then cut as transformers' samplers do, in this order:
    ``top_k``, ``top_p``, ``min_p``, each on what the one before it left. Tokens of equal logits stay or go together.

    Args:
        logits: ``[..., vocab]`` float32, float16, bfloat16 or float64. The last two dimensions may be any slice.
        temperature: at least 0 and finite; a float, or a tensor that broadcasts to the leading shape.
        seed: 64 bits; an int or an int64 tensor that broadcasts to the leading shape. Needed unless every temperature
            is 0 (on a GPU: unless ``temperature`` is the float 0).
        position: int64, broadcastable to the leading shape, in [0, 2^32): place in the sequence. Default: the index
            along the last leading dimension.
        step: denoising step in [0, 2^32); an int or an int64 tensor.
        masked: bool, broadcastable to the leading shape. Rows where it is False are not read: token and argmax are
            -1, the statistics 0.
        statistics_temperature: above 0 and finite; as ``temperature``.
        softcap: above 0, or None.
        allowed: ``[..., ceil(vocab / 32)]`` int32, broadcastable to the leading shape: token ``t`` may be a candidate
            if bit ``t % 32`` of word ``t // 32`` is set, as grammar libraries have it and :func:`pack_allowed` makes
            it. Bits behind the vocabulary do not matter.
        suppress: ids of tokens that may not be candidates in any row.
        top_k: draw among the ``top_k`` most probable tokens, and those that tie with the last of them; an int or an
            int64 tensor. 0 or None: no cut. A row at temperature 0 is never cut.
        top_p: in [0, 1]; draw among the most probable tokens up to the one at which their mass reaches ``top_p``. 1 or
            None: no cut; 0: only the most probable token. A float or a tensor, as ``temperature``.
        min_p: in [0, 1]; draw among the tokens whose probability is at least ``min_p`` times that of the most probable
            one. 0 or None: no cut. A float or a tensor.
        statistics: ``"unrestricted"``: those of all tokens, whatever may be drawn (``logprob`` is then not that of the
            draw). ``"restricted"``: those of the tokens that may be drawn; ``argmax`` is one of them, and logits of
            tokens that are not allowed count for nothing, NaN included.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None picks the fastest that can run.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        ValueError: a row without a distribution (NaN, ``inf``, nothing but ``-inf``, or no token that may be drawn),
            named by its index. On a GPU such a row has token and argmax -1 and NaN statistics instead, unless the
            environment variable ``DIFFUSION_RUNTIME_CHECKED`` is 1, because looking would synchronise.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    _validate(logits)
    leading, vocab = logits.shape[:-1], logits.shape[-1]
    settings = read_settings(
        leading, vocab, logits.device,
        temperature=temperature, seed=seed, position=position, step=step, masked=masked,
        statistics_temperature=statistics_temperature, softcap=softcap, allowed=allowed, suppress=suppress,
        top_k=top_k, top_p=top_p, min_p=min_p, statistics=statistics,
    )  # fmt: skip
    rows = as_rows(logits)
    if torch.compiler.is_compiling():
        ids, values = torch.ops.diffusion_runtime.sample_tokens(rows, *to_operator(settings), backend or "auto")
    else:
        run: Run = SPEC.resolve(logits.device.type, logits.dtype, backend)
        ids, values = run(rows, settings)
        if logits.device.type == "cpu" or CHECKED:
            check_distributions(ids, settings, leading, lambda r: rows[r // rows.shape[1], r % rows.shape[1]])
    return as_samples(ids, values, leading)


def as_samples(ids: Tensor, statistics: Tensor, leading: torch.Size) -> TokenSamples:
    token, argmax = ids.view(2, *leading).unbind()
    logprob, confidence, margin, entropy, logsumexp = statistics.view(5, *leading).unbind()
    return TokenSamples(token, logprob, argmax, confidence, margin, entropy, logsumexp)


def _validate(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits))}")
    if logits.ndim == 0 or not 0 < logits.shape[-1] < 2**31:
        raise ValueError(f"logits must be [..., vocab] with vocab in [1, 2^31), got {tuple(logits.shape)}")


def check_distributions(
    ids: Tensor, settings: Settings, leading: torch.Size, logits_of: Callable[[int], Tensor]
) -> None:
    """Raise for the first row that was to be sampled and could not be."""
    invalid = ids[0] < 0
    if settings.masked is not None:
        invalid &= settings.masked
    if not invalid.any():
        return
    first = int(invalid.nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), leading)]
    row, what = logits_of(first), ""
    if settings.allowed is not None:
        allowed = unpack_allowed(settings.allowed[first], len(row))
        if not allowed.any():
            raise ValueError(f"row {index} has no token that may be drawn: allowed and suppress rule out all of them")
        if settings.restricted or not (row.isnan() | (row == math.inf)).any():
            row, what = row[allowed], " for the tokens that are allowed"
    problem = "holds NaN" if row.isnan().any() else "holds inf" if (row == math.inf).any() else "is all -inf"
    raise ValueError(f"row {index} of the logits {problem}{what}: it has no distribution")


def _load_cpp() -> Run:
    wanted = instruction_set()
    return lambda logits, settings: run_cpp(logits, settings, wanted)


def run_cpp(logits: Tensor, settings: Settings, instruction_set: str) -> tuple[Tensor, Tensor]:
    from diffusion_runtime import _C

    ids, statistics = _results(logits)
    _C.sample_tokens(logits, *settings, ids, statistics, instruction_set)
    return ids, statistics


def _load_triton() -> Run:
    from diffusion_runtime.kernels import sample_tokens as kernel

    def run(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        ids, statistics = _results(logits)
        if ids.numel():
            kernel.sample_tokens(logits, *settings, ids, statistics)
        return ids, statistics

    return run


def _load_cuda() -> Run:
    from diffusion_runtime import _C_cuda

    def run(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        ids, statistics = _results(logits)
        if ids.numel():
            with torch.cuda.device(logits.device):
                size = _C_cuda.sample_tokens_workspace(ids.shape[1], logits.shape[2], settings.limits)
                workspace = torch.zeros(size, dtype=torch.uint8, device=logits.device)
                stream = torch.cuda.current_stream().cuda_stream
                _C_cuda.sample_tokens(logits, *settings, ids, statistics, workspace, stream)
        return ids, statistics

    return run


def _results(logits: Tensor) -> tuple[Tensor, Tensor]:
    count, device = logits.shape[0] * logits.shape[1], logits.device
    return (
        torch.empty(2, count, dtype=torch.int64, device=device),
        torch.empty(5, count, dtype=torch.float32, device=device),
    )


FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
SPEC = OpSpec(
    name="sample_tokens",
    reference=sample_reference,
    validate=_validate,
    implementations=(
        Implementation("cuda", frozenset({"cuda"}), FLOATS, _load_cuda),
        Implementation("cpp", frozenset({"cpu"}), FLOATS, _load_cpp),
        Implementation("triton", triton_devices(), FLOATS, _load_triton),
    ),
)
