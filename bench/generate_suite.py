"""What ``python -m bench --suite generate`` compares: whole answers, beside the published loop of LLaDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.check import SEED, WrongAnswerError
from bench.comparison import Comparison
from diffusion_runtime import Denoiser
from diffusion_runtime.models import LLaDA, LLaDAConfig


@dataclass(frozen=True)
class Size:
    """A model with random weights, and what is asked of it."""

    name: str
    config: LLaDAConfig
    answers: tuple[tuple[int, int, int, int, int], ...]  # batch, prompt, answer, block, steps
    dtype: torch.dtype = torch.float32


SIZES = {
    "cpu": Size(
        "8 layers of 512, vocabulary 126,464",
        LLaDAConfig(
            d_model=512, n_layers=8, n_heads=8, mlp_hidden_size=1536, vocab_size=126_464, mask_token_id=126_336,
            rope_theta=500_000.0,
        ),
        ((1, 256, 128, 32, 8), (4, 256, 128, 32, 4)),
    ),
    "cuda": Size(
        "LLaDA-8B",
        LLaDAConfig(
            d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12_288, vocab_size=126_464, mask_token_id=126_336,
            rope_theta=500_000.0,
        ),
        ((1, 1024, 256, 32, 16), (8, 1024, 256, 32, 16)),
        torch.bfloat16,
    ),
}  # fmt: skip
CACHES = ("none", "prefix", "dual")


def generate(device: torch.device) -> Iterator[Comparison]:
    """Answers at temperature 1 by our loop, by cache, beside the published one with torch's attention."""
    size = SIZES[device.type]
    model = _model(size, device)
    loops = {"published loop": _plain_forward(model)}
    if device.type == "cuda":
        loops["published loop, compiled"] = torch.compile(_plain_forward(model))
    for batch, length, answer, block, steps in size.answers:
        generator = torch.Generator(device).manual_seed(length)
        prompt = torch.randint(0, size.config.mask_token_id, (batch, length), generator=generator, device=device)
        settings: dict[str, Any] = {"num_steps": steps, "block_length": block}
        mask = size.config.mask_token_id
        yield Comparison(
            f"LLaDA, {size.name}, {str(size.dtype).removeprefix('torch.')}: {answer} tokens in {steps} forwards",
            f"{batch} x {length}",
            {
                f"cache {cache}": partial(
                    Denoiser(model, temperature=1.0, cache=cache, **settings).generate,
                    prompt,
                    max_new_tokens=answer,
                    seed=SEED,
                )
                for cache in CACHES
            },
            {
                name: partial(published, forward, prompt, answer, block, steps, 1.0, mask)
                for name, forward in loops.items()
            },
            partial(_check, model, prompt, answer, settings, loops["published loop"]),
        )


def _model(size: Size, device: torch.device) -> LLaDA:
    torch.manual_seed(0)
    with device:
        return LLaDA(size.config).to(size.dtype).requires_grad_(False).eval()


def _plain_forward(model: LLaDA) -> Callable[[Tensor], Tensor]:
    """The same weights as plain torch has them, with its own attention."""
    config, weights = model.config, dict(model.state_dict())
    head_dim = config.head_size

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"model.transformer.{name}.weight"])

    def norm(x: Tensor, name: str) -> Tensor:
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)).to(x.dtype)
        scaled: Tensor = weights[f"model.transformer.{name}.weight"] * normed
        return scaled

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return (x.float() * cos + turned * sin).to(x.dtype)

    @torch.no_grad()
    def forward(tokens: Tensor) -> Tensor:
        x = functional.embedding(tokens, weights["model.transformer.wte.weight"])
        every_second = torch.arange(0, head_dim, 2, device=tokens.device).float()
        frequency = config.rope_theta ** -(every_second / head_dim)
        angle = torch.outer(torch.arange(tokens.shape[1], device=tokens.device).float(), frequency).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        for layer in range(config.n_layers):
            name = f"blocks.{layer}."
            h = norm(x, name + "attn_norm")
            query, key, value = (
                linear(h, name + p).unflatten(-1, (-1, head_dim)).transpose(1, 2)
                for p in ("q_proj", "k_proj", "v_proj")
            )
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            mixed = functional.scaled_dot_product_attention(
                query, key, value, enable_gqa=config.kv_heads < config.n_heads
            )
            x = x + linear(mixed.transpose(1, 2).flatten(2), name + "attn_out")
            h = norm(x, name + "ff_norm")
            x = x + linear(functional.silu(linear(h, name + "ff_proj")) * linear(h, name + "up_proj"), name + "ff_out")
        return linear(norm(x, "ln_f"), "ff_out")

    return forward


@torch.no_grad()
def published(
    forward: Callable[[Tensor], Tensor],
    prompt: Tensor,
    answer: int,
    block: int,
    steps: int,
    temperature: float,
    mask: int,
    *,
    suppress_mask: bool = False,
) -> Tensor:
    """LLaDA's ``generate``: all logits, float64 Gumbel noise, ranks row by row. What it does, in our words."""
    tokens = functional.pad(prompt, (0, answer), value=mask)
    start, per_block = prompt.shape[1], steps // (answer // block)
    for number in range(answer // block):
        stop = start + (number + 1) * block
        masked = (tokens[:, stop - block : stop] == mask).sum(1, keepdim=True)
        quotas = masked // per_block + (torch.arange(per_block, device=tokens.device) < masked % per_block)
        for step in range(per_block):
            masks = tokens == mask
            logits = forward(tokens)
            if suppress_mask:  # as ours does, where the answers are compared
                logits[..., mask] = -torch.inf
            noisy = logits
            if temperature > 0:
                wide = logits.to(torch.float64)
                noise = (-torch.log(torch.rand_like(wide))) ** temperature
                noisy = wide.exp() / noise
            candidates = noisy.argmax(-1)
            probability = functional.softmax(logits, -1).gather(-1, candidates[..., None])[..., 0]
            probability[:, stop:] = -torch.inf
            candidates = torch.where(masks, candidates, tokens)
            confidence = torch.where(masks, probability, -torch.inf)
            commits = torch.zeros_like(masks)
            for row in range(len(tokens)):
                commits[row, confidence[row].topk(int(quotas[row, step])).indices] = True
            tokens[commits] = candidates[commits]
    return tokens


def _check(
    model: LLaDA, prompt: Tensor, answer: int, settings: dict[str, Any], forward: Callable[[Tensor], Tensor]
) -> None:
    """At temperature 0 the same tokens, but for what a rounding decides."""
    got = Denoiser(model, **settings).generate(prompt, max_new_tokens=answer)
    block, steps = settings["block_length"], settings["num_steps"]
    expected = published(forward, prompt, answer, block, steps, 0.0, model.mask_token_id, suppress_mask=True)
    same = (got == expected)[:, prompt.shape[1] :].float().mean()
    if not same > (0.95 if next(model.parameters()).dtype == torch.float32 else 0.5):
        raise WrongAnswerError(f"our loop is not timed: {same:.0%} of its tokens are those of the published one")
