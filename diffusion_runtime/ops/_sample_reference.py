"""The definition of ``sample_tokens`` in plain torch: float64 in gives float64 out, the ground truth of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion_runtime.ops._philox import DRAW_TOKEN, philox_uniforms
from diffusion_runtime.ops._restriction import kept, unpack_allowed
from diffusion_runtime.ops._rows import Setting
from diffusion_runtime.ops._settings import Settings

TILE = 128  # tokens: a draw picks a tile by its mass, then a token inside it


def sample_reference(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """``[outer, inner, vocab]`` logits -> ids ``[2, rows]``, statistics ``[5, rows]``."""
    outer, inner, vocab = logits.shape
    device = logits.device
    count = outer * inner
    wide = torch.promote_types(logits.dtype, torch.float32)
    ids = torch.full((2, count), -1, dtype=torch.int64, device=device)
    statistics = torch.zeros(5, count, dtype=wide, device=device)
    chosen = torch.arange(count, device=device) if settings.masked is None else settings.masked.nonzero()[:, 0]
    if chosen.numel() == 0:
        return ids, statistics

    def setting(value: Setting, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=device).expand(count)[chosen]

    x = logits[chosen // inner, chosen % inner].to(wide)
    allowed = None if settings.allowed is None else settings.allowed[chosen]
    if settings.restricted and allowed is not None:
        x = x.masked_fill(~unpack_allowed(allowed, vocab), -math.inf)
    y = softcapped(x, settings.softcap)
    temperature = setting(settings.temperature, wide)
    cuts = (setting(settings.top_k, torch.int64), setting(settings.top_p, wide), setting(settings.min_p, wide))
    keep = kept(x, y, temperature, allowed, *cuts)
    may_draw = y.masked_fill(~keep, -math.inf)
    measured = may_draw if settings.restricted else y

    # of the logits, not of y: rounding under the softcap can make unequal logits equal
    argmax = x.argmax(-1)
    best = x.masked_fill(~keep, -math.inf).argmax(-1)
    top = y.gather(-1, argmax[:, None])
    statistics_temperature = setting(settings.statistics_temperature, wide)
    z = (measured - top) / statistics_temperature[:, None]
    weight = z.exp()
    mass = weight.sum(-1)
    log_mass = mass.log()
    entropy = log_mass - torch.where(weight > 0, z * weight, 0).sum(-1) / mass
    second = z.scatter(-1, argmax[:, None], -math.inf).amax(-1)

    position = torch.arange(count, device=device) % inner if settings.position is None else settings.position
    uniforms = philox_uniforms(
        setting(settings.seed, torch.int64), position[chosen], setting(settings.step, torch.int64), DRAW_TOKEN
    )
    below = may_draw - y.gather(-1, best[:, None])
    drawn = _draw((below / torch.where(temperature > 0, temperature, 1)[:, None]).exp(), *uniforms)
    token = torch.where(temperature > 0, drawn, best)

    valid = x.amax(-1).isfinite() & keep.any(-1)  # amax keeps a NaN
    ids[:, chosen] = torch.where(valid, torch.stack((token, argmax)), -1)
    results = (
        z.gather(-1, token[:, None])[:, 0] - log_mass,
        1 / mass,
        -second.expm1() / mass,
        entropy.clamp(min=0),
        top[:, 0] / statistics_temperature + log_mass,
    )
    statistics[:, chosen] = torch.where(valid, torch.stack(results), math.nan)
    return ids, statistics


def softcapped(x: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(x / softcap)``, or x where ``softcap`` is 0; -inf stays."""
    return torch.where(x == -math.inf, x, softcap * (x / softcap).tanh()) if softcap else x


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
