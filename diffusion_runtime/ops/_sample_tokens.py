"""From logits to a candidate token and the statistics a policy needs, in one pass over each row."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops._philox import DRAW_TOKEN, philox_uniforms
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices
from diffusion_runtime.ops._rows import Setting, as_rows, float_setting, int_setting, mask_setting

TILE = 128  # tokens: a draw picks a tile by its mass, then a token inside it
# read once; on a GPU, reading the result of the check synchronises
_CHECKED = os.environ.get("DIFFUSION_RUNTIME_CHECKED") == "1"


class TokenSamples(NamedTuple):
    """What :func:`sample_tokens` gives for each row; every field has the leading shape of the logits."""

    token: Tensor  # int64: the candidate
    logprob: Tensor  # of the candidate, nats
    argmax: Tensor  # int64: the most probable token, the lowest id at a tie
    confidence: Tensor  # probability of argmax
    margin: Tensor  # confidence minus the probability of the second best token; 0 at a tie
    entropy: Tensor  # nats
    logsumexp: Tensor  # of softcap(logits) / statistics_temperature, nats


class Rows(NamedTuple):
    """The arguments as backends take them; the fields are documented in ``csrc/cpu/sample_tokens.h``."""

    logits: Tensor
    masked: Tensor | None
    temperature: Tensor | float
    seed: Tensor | int
    position: Tensor | None
    step: Tensor | int
    statistics_temperature: Tensor | float
    softcap: float


# -> ids [2, rows] int64, statistics [5, rows]
_Run = Callable[[Rows], tuple[Tensor, Tensor]]


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
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None picks the fastest that can run.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        ValueError: a row without a distribution (NaN, ``inf``, or nothing but ``-inf``), named by its index. On a
            GPU such a row has token and argmax -1 and NaN statistics instead, unless the environment variable
            ``DIFFUSION_RUNTIME_CHECKED`` is 1, because looking would synchronise.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    _validate(logits)
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be None or finite and above 0, got {softcap}")
    rows = Rows(
        logits=as_rows(logits),
        masked=mask_setting("masked", masked, logits),
        temperature=float_setting("temperature", temperature, logits, zero=True),
        seed=0 if seed is None else int_setting("seed", seed, logits, 64),
        position=None if position is None else int_setting("position", position, logits, 32),  # type: ignore[arg-type]
        step=int_setting("step", step, logits, 32),
        statistics_temperature=float_setting("statistics_temperature", statistics_temperature, logits, zero=False),
        softcap=softcap or 0.0,
    )
    if seed is None and _may_draw(rows.temperature):
        raise ValueError(f"seed is needed to draw at temperature {temperature}")

    if torch.compiler.is_compiling():
        ids, statistics = torch.ops.diffusion_runtime.sample_tokens(*_operator_arguments(rows), backend or "auto")
    else:
        run: _Run = SPEC.resolve(logits.device.type, logits.dtype, backend)
        ids, statistics = run(rows)
        if logits.device.type == "cpu" or _CHECKED:
            _check_distributions(rows, ids, logits.shape[:-1])
    leading = logits.shape[:-1]
    token, argmax = ids.view(2, *leading).unbind()
    logprob, confidence, margin, entropy, logsumexp = statistics.view(5, *leading).unbind()
    return TokenSamples(token, logprob, argmax, confidence, margin, entropy, logsumexp)


def _validate(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits))}")
    if logits.ndim == 0 or not 0 < logits.shape[-1] < 2**31:
        raise ValueError(f"logits must be [..., vocab] with vocab in [1, 2^31), got {tuple(logits.shape)}")


def _operator_arguments(rows: Rows) -> list[Any]:
    """The arguments of the operator in ``_library.py``, where a setting is a tensor or None, then a value."""

    def both(setting: Setting) -> list[Any]:
        return [setting, 0] if isinstance(setting, Tensor) else [None, setting]

    before = [rows.logits, rows.masked, *both(rows.temperature), *both(rows.seed), rows.position, *both(rows.step)]
    return [*before, *both(rows.statistics_temperature), rows.softcap]


def _may_draw(temperature: Setting) -> bool:
    if not isinstance(temperature, Tensor):
        return temperature > 0
    if temperature.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool((temperature > 0).any())


def _check_distributions(rows: Rows, ids: Tensor, leading: torch.Size) -> None:
    invalid = ids[1] < 0
    if rows.masked is not None:
        invalid &= rows.masked
    if not invalid.any():
        return
    first = int(invalid.nonzero()[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), leading)]
    row = rows.logits[first // rows.logits.shape[1], first % rows.logits.shape[1]]
    what = "holds NaN" if row.isnan().any() else "holds inf" if (row == math.inf).any() else "is all -inf"
    raise ValueError(f"row {index} of the logits {what}: it has no distribution")


def _reference(rows: Rows) -> tuple[Tensor, Tensor]:
    outer, inner, vocab = rows.logits.shape
    device = rows.logits.device
    count = outer * inner
    wide = torch.promote_types(rows.logits.dtype, torch.float32)  # float64 stays: the ground truth of the tests
    ids = torch.full((2, count), -1, dtype=torch.int64, device=device)
    statistics = torch.zeros(5, count, dtype=wide, device=device)
    chosen = torch.arange(count, device=device) if rows.masked is None else rows.masked.nonzero()[:, 0]
    if chosen.numel() == 0:
        return ids, statistics

    def setting(value: Setting, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=device).expand(count)[chosen]

    x = rows.logits[chosen // inner, chosen % inner].to(wide)
    y = torch.where(x == -math.inf, x, rows.softcap * (x / rows.softcap).tanh()) if rows.softcap else x
    argmax = x.argmax(-1)
    top = y.gather(-1, argmax[:, None])
    below = y - top
    z = below / setting(rows.statistics_temperature, wide)[:, None]
    weight = z.exp()
    mass = weight.sum(-1)
    log_mass = mass.log()
    entropy = log_mass - torch.where(weight > 0, z * weight, 0).sum(-1) / mass

    temperature = setting(rows.temperature, wide)
    position = torch.arange(count, device=device) % inner if rows.position is None else rows.position
    uniforms = philox_uniforms(
        setting(rows.seed, torch.int64), position[chosen], setting(rows.step, torch.int64), DRAW_TOKEN
    )
    drawn = _draw((below / torch.where(temperature > 0, temperature, 1)[:, None]).exp(), *uniforms)
    token = torch.where(temperature > 0, drawn, argmax)

    second = z.scatter(-1, argmax[:, None], -math.inf).amax(-1)
    valid = x.amax(-1).isfinite()
    ids[:, chosen] = torch.where(valid, torch.stack((token, argmax)), -1)
    results = (
        z.gather(-1, token[:, None])[:, 0] - log_mass,
        1 / mass,
        -second.expm1() / mass,
        entropy.clamp(min=0),
        top[:, 0] / setting(rows.statistics_temperature, wide) + log_mass,
    )
    statistics[:, chosen] = torch.where(valid, torch.stack(results), math.nan)
    return ids, statistics


def _draw(weight: Tensor, tile_uniform: Tensor, token_uniform: Tensor) -> Tensor:
    """Inverse CDF of ``[rows, vocab]`` weights in two levels; sums of masses are in float64."""
    tiles = torch.nn.functional.pad(weight, (0, -weight.shape[1] % TILE)).unflatten(1, (-1, TILE))
    tile = _pick(tiles.sum(-1).double(), tile_uniform)
    token = _pick(tiles[torch.arange(len(tile), device=tile.device), tile].double(), token_uniform)
    return (tile * TILE + token).clamp(max=weight.shape[1] - 1)  # a row without a distribution may point past the end


def _pick(mass: Tensor, uniform: Tensor) -> Tensor:
    """The first index of ``[rows, n]`` whose cumulative mass exceeds ``uniform`` times the sum."""
    cumulative = mass.cumsum(-1)
    return (cumulative > uniform[:, None] * cumulative[:, -1:]).to(torch.uint8).argmax(-1)


def _load_cpp() -> _Run:
    from diffusion_runtime import _C

    usable = _C.instruction_sets()
    wanted = os.environ.get("DIFFUSION_RUNTIME_INSTRUCTION_SET") or usable[0]
    if wanted not in usable:
        raise ImportError(f"DIFFUSION_RUNTIME_INSTRUCTION_SET={wanted}, but this CPU has {', '.join(usable)}")
    return lambda rows: run_cpp(rows, wanted)


def run_cpp(rows: Rows, instruction_set: str) -> tuple[Tensor, Tensor]:
    from diffusion_runtime import _C

    ids, statistics = _results(rows)
    _C.sample_tokens(*rows, ids, statistics, instruction_set)
    return ids, statistics


def _load_triton() -> _Run:
    from diffusion_runtime.kernels import sample_tokens as kernel

    def run(rows: Rows) -> tuple[Tensor, Tensor]:
        ids, statistics = _results(rows)
        if ids.numel():
            kernel.sample_tokens(*rows, ids, statistics)
        return ids, statistics

    return run


def _load_cuda() -> _Run:
    from diffusion_runtime import _C_cuda

    def run(rows: Rows) -> tuple[Tensor, Tensor]:
        ids, statistics = _results(rows)
        if ids.numel():
            with torch.cuda.device(rows.logits.device):
                size = _C_cuda.sample_tokens_workspace(ids.shape[1], rows.logits.shape[2])
                workspace = torch.zeros(size, dtype=torch.uint8, device=rows.logits.device)
                stream = torch.cuda.current_stream().cuda_stream
                _C_cuda.sample_tokens(*rows, ids, statistics, workspace, stream)
        return ids, statistics

    return run


def _results(rows: Rows) -> tuple[Tensor, Tensor]:
    count, device = rows.logits.shape[0] * rows.logits.shape[1], rows.logits.device
    return (
        torch.empty(2, count, dtype=torch.int64, device=device),
        torch.empty(5, count, dtype=torch.float32, device=device),
    )


_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
SPEC = OpSpec(
    name="sample_tokens",
    reference=_reference,
    validate=_validate,
    implementations=(
        Implementation("cuda", frozenset({"cuda"}), _FLOATS, _load_cuda),
        Implementation("cpp", frozenset({"cpu"}), _FLOATS, _load_cpp),
        Implementation("triton", triton_devices(), _FLOATS, _load_triton),
    ),
)
