"""Whole answers, beside the published loops."""

from __future__ import annotations

import calendar
import heapq
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import plain_models
from bench.check import SEED, WrongAnswerError
from bench.comparison import Answer, Comparison
from bench.inputs import dtype_name
from bench.plain_models import Past
from bench.scope import Scope
from diffusion_runtime import Denoiser, load
from diffusion_runtime.loading import local_folder
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
BATCHES = (1, 2, 4, 8, 16)
# batch, prompt, answer; tokens a forward, temperature
PYCODE = tuple(product(((1, 224, 32), (8, 224, 32)), ((1, 0.0), (4, 0.0), (4, 1.0))))


def llada(scope: Scope) -> Iterator[Comparison]:
    """Answers at temperature 1 by our loop, by cache, beside the published one with torch's attention."""
    if not scope.full:
        return  # the published loop takes half a minute
    device = scope.device
    size = SIZES[device.type]
    model = _model(size, device)
    forward = plain_models.llada(model)
    loops = {"published loop": (published, forward), "Fast-dLLM's loop": (fast_dllm, forward)}
    if device.type == "cuda":
        loops["published loop, compiled"] = (published, torch.compile(plain_models.llada(model)))
    for batch, length, answer, block, steps in size.answers:
        generator = torch.Generator(device).manual_seed(length)
        prompt = torch.randint(0, size.config.mask_token_id, (batch, length), generator=generator, device=device)
        settings: dict[str, Any] = {"num_steps": steps, "block_length": block}
        mask, asked = size.config.mask_token_id, (prompt, answer, block, steps)
        right = {
            cache: Answer(partial(loop, forward, *asked, 0.0, mask=mask, suppress_mask=True), device)
            for cache, loop in (("none", published), ("prefix", fast_dllm))
        }
        at_least = 0.95 if size.dtype == torch.float32 else 0.5
        yield Comparison(
            f"LLaDA, {size.name}, {dtype_name(size.dtype)}: {answer} tokens in {steps} forwards",
            f"{batch} x {length}",
            {
                f"cache {cache}": _ours(Denoiser(model, temperature=1.0, cache=cache, **settings), prompt, answer)
                for cache in CACHES
            },
            {
                name: Answer(partial(loop, forward, *asked, 1.0, mask=mask), device)
                for name, (loop, forward) in loops.items()
            },
            partial(_check_caches, model, settings, prompt, answer, right, at_least),
            tokens=batch * answer,
            forwards=steps,
        )


def pycode(scope: Scope) -> Iterator[Comparison]:
    """The model that ships continues modules that it was not trained on.

    Beside the published loop without a cache, and beside it with the cache of blocks that SDAR's own code has. At
    temperature 0 all give the same tokens, so that none is more accurate.
    """
    make = _pycode(scope)
    if make is None:
        return
    chosen = {"quick": PYCODE[1:2], "normal": PYCODE[1::3], "full": PYCODE}[scope.level]
    for (batch, length, answer), (at_once, temperature) in chosen:
        yield make(
            f"pycode, float32: {answer} tokens behind {length}",
            f"batch {batch}, {at_once} a forward, temperature {temperature:g}",
            batch, length, answer, at_once, temperature,
        )  # fmt: skip


def pycode_by_batch(scope: Scope) -> Iterator[Comparison]:
    """How the time of an answer grows with how many there are."""
    make = None if scope.level == "quick" else _pycode(scope)
    if make is None:
        return
    for batch in BATCHES if scope.full else BATCHES[:-1]:
        group = "Growth of generate: pycode, 32 tokens behind 224, by batch"
        yield make(group, f"{batch} answers", batch, 224, 32, 4, 0.0, at=batch)


def _pycode(scope: Scope) -> Callable[..., Comparison] | None:
    """What makes a comparison of the model that ships; None where it does not."""
    from tokenizers import Tokenizer

    folder, device = local_folder("pycode"), scope.device
    if folder is None:
        return None
    model: Any = load(folder, dtype=torch.float32, device=device)
    text = "".join(inspect.getsource(module) for module in (heapq, textwrap, calendar))
    ids = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids, device=device)
    forward, block, mask = plain_models.sdar(model), model.block_length, model.mask_token_id

    def make(
        group: str, case: str, batch: int, length: int, answer: int, at_once: int, temperature: float, at: float = 0.0
    ) -> Comparison:
        prompt = ids[: batch * length].view(batch, length)
        settings: dict[str, Any] = {"cache": "block", "num_steps": answer // at_once, "block_length": block}
        denoiser = Denoiser(model, temperature=temperature, **settings)
        asked = (prompt, answer, block, answer // at_once)
        plain = partial(published, forward, *asked, mask=mask, suppress_mask=True)
        behind_cache = partial(published_behind_cache, forward, *asked, mask=mask)
        right = Answer(partial(plain, temperature=0.0), device)
        return Comparison(
            group,
            case,
            {"cache block": _ours(denoiser, prompt, answer)},
            {
                "published loop": Answer(partial(plain, temperature=temperature), device),
                "with its cache": Answer(partial(behind_cache, temperature=temperature), device),
            },
            partial(_check, Denoiser(model, **settings), prompt, answer, right, 0.99),
            tokens=batch * answer,
            forwards=answer // at_once,
            at=at,
        )

    return make


def _model(size: Size, device: torch.device) -> LLaDA:
    torch.manual_seed(0)
    with device:
        return LLaDA(size.config).to(size.dtype).requires_grad_(False).eval()


def published(
    forward: Callable[[Tensor], Tensor],
    prompt: Tensor,
    answer: int,
    block: int,
    steps: int,
    temperature: float,
    *,
    mask: int,
    suppress_mask: bool = False,
) -> Iterator[Tensor]:
    """LLaDA's ``generate``: all logits, float64 Gumbel noise, ranks row by row. What it does, in our words.

    Yields the tokens after each forward, as the loops below do.
    """
    tokens = functional.pad(prompt, (0, answer), value=mask)
    for stop in range(prompt.shape[1] + block, tokens.shape[1] + 1, block):
        for quota in _quotas(tokens[:, stop - block : stop] == mask, steps // (answer // block)):
            logits = forward(tokens)
            if suppress_mask:  # as ours does, where the answers are compared
                logits[..., mask] = -torch.inf
            _commit(tokens, logits, quota, temperature, mask, stop)
            yield tokens


def fast_dllm(
    forward: Callable[..., Tensor],
    prompt: Tensor,
    answer: int,
    block: int,
    steps: int,
    temperature: float,
    *,
    mask: int,
    suppress_mask: bool = False,
) -> Iterator[Tensor]:
    """Fast-dLLM's ``generate_with_prefix_cache``: of each block the first step sees everything and leaves the keys
    before the block, behind which the others compute the block and what follows it."""
    tokens = functional.pad(prompt, (0, answer), value=mask)
    for start in range(prompt.shape[1], tokens.shape[1], block):
        own = tokens[:, start:]
        past: Past = []
        for quota in _quotas(own[:, :block] == mask, steps // (answer // block)):
            if past:
                logits = forward(own, past)
            else:
                logits = forward(tokens, past, keep=True)[:, start:]
                past[:] = [(key[:, :, :start], value[:, :, :start]) for key, value in past]
            if suppress_mask:
                logits[..., mask] = -torch.inf
            _commit(own, logits, quota, temperature, mask, block)
            yield tokens


def published_behind_cache(
    forward: Callable[..., Tensor],
    prompt: Tensor,
    answer: int,
    block: int,
    steps: int,
    temperature: float,
    *,
    mask: int,
) -> Iterator[Tensor]:
    """The same as block diffusion's own code has it: blocks that are done are kept as keys."""
    tokens = functional.pad(prompt, (0, answer), value=mask)
    past: Past = []
    forward(prompt, past, keep=True)
    for start in range(prompt.shape[1], tokens.shape[1], block):
        own = tokens[:, start : start + block]
        for quota in _quotas(own == mask, steps // (answer // block)):
            logits = forward(own, past)
            logits[..., mask] = -torch.inf
            _commit(own, logits, quota, temperature, mask, block)
            yield tokens
        forward(own, past, keep=True)


def _quotas(masked: Tensor, steps: int) -> Iterator[list[int]]:
    """How many of each row's masks each step commits."""
    count = masked.sum(1, keepdim=True)
    quotas = count // steps + (torch.arange(steps, device=masked.device) < count % steps)
    return iter(quotas.T.tolist())


def _commit(tokens: Tensor, logits: Tensor, quota: list[int], temperature: float, mask: int, stop: int) -> None:
    """Write the candidates that have most confidence, of those before ``stop``."""
    masks = tokens == mask
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
        commits[row, confidence[row].topk(quota[row]).indices] = True
    tokens[commits] = candidates[commits]


def _ours(denoiser: Denoiser, prompt: Tensor, answer: int) -> Answer:
    return Answer(
        lambda: (step.tokens for step in denoiser.stream(prompt, max_new_tokens=answer, seed=SEED)), prompt.device
    )


def _check_caches(
    model: LLaDA, settings: dict[str, Any], prompt: Tensor, answer: int, right: dict[str, Answer], at_least: float
) -> None:
    for cache, loop in right.items():
        _check(Denoiser(model, cache=cache, **settings), prompt, answer, loop, at_least)


def _check(
    denoiser: Denoiser, prompt: Tensor, answer: int, published_loop: Callable[[], Tensor], at_least: float
) -> None:
    """At temperature 0 the same tokens, but for what a rounding decides."""
    got = denoiser.generate(prompt, max_new_tokens=answer)
    same = (got == published_loop())[:, prompt.shape[1] :].float().mean()
    if not same > at_least:
        raise WrongAnswerError(f"our loop is not timed: {same:.0%} of its tokens are those of the published one")
