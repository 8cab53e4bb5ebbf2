"""What ``python -m bench --suite NAME`` compares: restricted draws, the fused head, soft embeddings, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench import attention_suites
from bench.check import SEED, WrongAnswerError
from bench.comparison import Comparison
from bench.peers import READS
from bench.runners import default_backends
from diffusion_runtime import ops

DTYPES = (torch.float32, torch.bfloat16)
RESTRICTED = (64, 131_072)  # rows, vocab
HEADS = ((256, 1024, 262_144), (32, 4096, 126_464))  # rows, dim, vocab
SOFT = (256, 1024, 262_144)
Suite = Callable[[torch.device], Iterator[Comparison]]


def restricted(device: torch.device) -> Iterator[Comparison]:
    """Draws among some of the tokens, beside transformers' processors and ``multinomial``."""
    rows, vocab = RESTRICTED
    for dtype in DTYPES:
        logits = _noise(rows, vocab, device, dtype, scale=2.5)
        for cut in ({"top_k": 50, "top_p": 0.9}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}):
            sample = partial(ops.sample_tokens, logits, temperature=1.0, seed=SEED, **cut)
            calls = {name: partial(sample, backend=name) for name in default_backends(device, dtype)}
            yield Comparison(
                f"Restricted draws on [{rows}, {vocab}] {_name(dtype)}",
                ", ".join(f"{name} {value}" for name, value in cut.items()),
                calls,
                {"transformers": partial(_transformers_draw, logits, **cut)},
                partial(_check_tokens, calls, logits, cut),
                {"a read": partial(READS["amax of int32"], logits)},
            )


def head(device: torch.device) -> Iterator[Comparison]:
    """``sample_from_hidden`` beside the product, its softmax and what is read off it."""
    for (rows, dim, vocab), dtype in product(HEADS, DTYPES):
        hidden = _noise(rows, dim, device, dtype, scale=2.5 * dim**-0.5)
        weight = _noise(vocab, dim, device, dtype)
        for case, settings in (("statistics", {}), ("sampled at 1", {"temperature": 1.0, "seed": SEED})):
            sample = partial(ops.sample_from_hidden, hidden, weight, **settings)  # type: ignore[arg-type]
            names = _backends("sample_from_hidden", device, dtype)
            calls = {name: partial(sample, backend=name) for name in names}
            yield Comparison(
                f"[{rows}, {dim}] x [{vocab}, {dim}] {_name(dtype)}",
                case,
                calls,
                {
                    "eager torch": partial(_eager_head, hidden, weight, draws=bool(settings)),
                    "product + sample_tokens": lambda h=hidden, w=weight, s=settings: ops.sample_tokens(h @ w.T, **s),  # type: ignore[misc]
                },
                partial(_check_head, calls, hidden, weight, settings),
                {"the product": lambda h=hidden, w=weight: h @ w.T},  # type: ignore[misc]
            )


def soft(device: torch.device) -> Iterator[Comparison]:
    """``soft_embedding`` of known and unknown logsumexp, beside ``softmax(...) @ embedding``."""
    rows, dim, vocab = SOFT
    for dtype in DTYPES:
        logits = _noise(rows, vocab, device, torch.float32, scale=2.5)
        embedding = _noise(vocab, dim, device, dtype)
        logsumexp = ops.sample_tokens(logits, statistics_temperature=0.7).logsumexp
        names = _backends("soft_embedding", device, dtype)
        for case, known in (("logsumexp known", logsumexp), ("unknown", None)):
            embed = partial(ops.soft_embedding, logits, embedding, temperature=0.7, logsumexp=known)
            calls = {name: partial(embed, backend=name) for name in names}
            yield Comparison(
                f"soft_embedding [{rows}, {vocab}] float32 @ [{vocab}, {dim}] {_name(dtype)}",
                case,
                calls,
                {"eager torch": partial(_eager_soft, logits, embedding)},
                partial(_check_soft, calls, logits, embedding),
                {"the product": partial(torch.mm, logits.to(dtype), embedding)},
            )


SUITES: dict[str, Suite] = {
    "restricted": restricted,
    "head": head,
    "soft": soft,
    "square": attention_suites.square,
    "canvas": attention_suites.canvas,
    "prefill": attention_suites.prefill,
}


def _noise(rows: int, columns: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    skipped = {"reference", "triton"} if device.type == "cpu" else {"reference"}
    return [name for name in ops.available_backends(op, device.type, dtype) if name not in skipped]


def _transformers_draw(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    from transformers.generation import logits_process as processors

    scores, none = logits.float(), torch.empty(0)
    if top_k:
        scores = processors.TopKLogitsWarper(top_k)(none, scores)
    if top_p < 1:
        scores = processors.TopPLogitsWarper(top_p)(none, scores)
    if min_p:
        scores = processors.MinPLogitsWarper(min_p)(none, scores)
    return scores.softmax(-1).multinomial(1)[:, 0]


def _eager_head(hidden: Tensor, weight: Tensor, draws: bool) -> tuple[Tensor, ...]:
    logits = hidden @ weight.T
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    confidence, argmax = probabilities.max(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    token = probabilities.multinomial(1)[:, 0] if draws else argmax
    return token, confidence, entropy


def _eager_soft(logits: Tensor, embedding: Tensor) -> Tensor:
    return (logits / 0.7).softmax(-1).to(embedding.dtype) @ embedding


def _check_tokens(calls: Mapping[str, Callable[[], ops.TokenSamples]], logits: Tensor, cut: dict[str, Any]) -> None:
    some = logits[:4].double().cpu()
    truth = ops.sample_tokens(some, temperature=1.0, seed=SEED, backend="reference", **cut)
    for name, call in calls.items():
        if not torch.equal(call().token[:4].cpu(), truth.token):
            raise WrongAnswerError(f"{name} is not timed, it draws other tokens than the reference")


def _check_head(
    calls: Mapping[str, Callable[[], ops.TokenSamples]], hidden: Tensor, weight: Tensor, settings: dict[str, Any]
) -> None:
    rows = slice(0, 4)
    logits = (hidden[rows] @ weight.T).double().cpu()
    truth = ops.sample_tokens(logits, backend="reference", **settings)
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 3e-2
    for name, call in calls.items():
        entropy = call().entropy[rows].cpu().double()
        if not torch.allclose(entropy, truth.entropy, rtol=tolerance, atol=tolerance):
            raise WrongAnswerError(f"{name} is not timed, entropy is {entropy}, in float64 {truth.entropy}")


def _check_soft(calls: Mapping[str, Callable[[], Tensor]], logits: Tensor, embedding: Tensor) -> None:
    truth = (logits[:4].double() / 0.7).softmax(-1) @ embedding.double()
    tolerance = 1e-4 if embedding.dtype == torch.float32 else 1e-2
    for name, call in calls.items():
        error = (call()[:4].double() - truth).abs().max() / truth.abs().max()
        if error > tolerance:
            raise WrongAnswerError(f"{name} is not timed, its soft embedding is off by {error:.1e}")
