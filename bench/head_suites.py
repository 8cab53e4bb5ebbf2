"""The LM head and the sampler as one op, soft embeddings, and both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.check import SEED, WrongAnswerError
from bench.comparison import Comparison
from bench.inputs import backends, dtype_name, noise
from bench.peers import READS
from bench.scope import Scope
from diffusion_runtime import ops
from diffusion_runtime.ops._sample_with_soft_embedding import one_after_the_other

# rows, dim, vocab
HEADS = ((32, 1024, 126_464), (256, 1024, 262_144), (64, 4096, 126_464), (32, 4096, 126_464))
SOFT = ((32, 1024, 126_464), (256, 1024, 262_144))


def sample_from_hidden(scope: Scope) -> Iterator[Comparison]:
    """``sample_from_hidden`` beside the product, its softmax and what is read off it."""
    for (rows, dim, vocab), dtype in product(scope.some(HEADS), scope.torch_dtypes()):
        hidden = noise(rows, dim, scope.device, dtype, scale=2.5 * dim**-0.5)
        weight = noise(vocab, dim, scope.device, dtype)
        for case, settings in (("statistics", {}), ("sampled at 1", {"temperature": 1.0, "seed": SEED})):
            sample = partial(ops.sample_from_hidden, hidden, weight, **settings)  # type: ignore[arg-type]
            names = backends("sample_from_hidden", scope.device, dtype)
            calls = {name: partial(sample, backend=name) for name in names}
            yield Comparison(
                f"[{rows}, {dim}] x [{vocab}, {dim}] {dtype_name(dtype)}",
                case,
                calls,
                {
                    "eager torch": partial(_eager_head, hidden, weight, draws=bool(settings)),
                    "product + sample_tokens": lambda h=hidden, w=weight, s=settings: ops.sample_tokens(h @ w.T, **s),  # type: ignore[misc]
                },
                partial(_check_head, calls, hidden, weight, settings),
                {
                    "the product": lambda h=hidden, w=weight: h @ w.T,  # type: ignore[misc]
                    "a read of the weight": partial(READS["amax of int32"], weight),
                },
            )


def soft_embedding(scope: Scope) -> Iterator[Comparison]:
    """``soft_embedding`` of known and unknown logsumexp, beside ``softmax(...) @ embedding``."""
    for (rows, dim, vocab), dtype in product(scope.some(SOFT), scope.torch_dtypes()):
        logits = noise(rows, vocab, scope.device, torch.float32, scale=2.5)
        embedding = noise(vocab, dim, scope.device, dtype)
        logsumexp = ops.sample_tokens(logits, statistics_temperature=0.7).logsumexp
        names = backends("soft_embedding", scope.device, dtype)
        for case, known in (("logsumexp known", logsumexp), ("unknown", None)):
            embed = partial(ops.soft_embedding, logits, embedding, temperature=0.7, logsumexp=known)
            calls = {name: partial(embed, backend=name) for name in names}
            yield Comparison(
                f"soft_embedding [{rows}, {vocab}] float32 @ [{vocab}, {dim}] {dtype_name(dtype)}",
                case,
                calls,
                {"eager torch": partial(_eager_soft, logits, embedding)},
                partial(_check_soft, calls, logits, embedding),
                {"the product": partial(torch.mm, logits.to(dtype), embedding)},
            )


def sample_with_soft_embedding(scope: Scope) -> Iterator[Comparison]:
    """``sample_with_soft_embedding`` beside its two ops, and beside the logits and what is made of them."""
    for (rows, dim, vocab), dtype in product(scope.some(SOFT), scope.torch_dtypes()):
        hidden = noise(rows, dim, scope.device, dtype, scale=2.5 * dim**-0.5)
        weight = noise(vocab, dim, scope.device, dtype)
        settings: dict[str, Any] = {"temperature": 0.7, "seed": SEED}
        sample = partial(ops.sample_with_soft_embedding, hidden, weight, **settings)
        names = backends("sample_with_soft_embedding", scope.device, dtype)
        calls = {name: partial(sample, backend=name) for name in names}
        first = {name: lambda call=call: call()[0] for name, call in calls.items()}
        yield Comparison(
            f"sampled and embedded, [{rows}, {dim}] x [{vocab}, {dim}] {dtype_name(dtype)}",
            "tied",
            calls,
            {
                "the two ops": partial(
                    one_after_the_other,
                    hidden,
                    weight,
                    weight,
                    bias=None,
                    backend=None,
                    statistics_temperature=0.7,
                    softcap=None,
                    masked=None,
                    **settings,
                ),
                "eager torch": partial(_eager_both, hidden, weight),
            },
            partial(_check_head, first, hidden, weight, settings | {"statistics_temperature": 0.7}),
            {"the two products": lambda h=hidden, w=weight: (h @ w.T) @ w},  # type: ignore[misc]
        )


def _eager_head(hidden: Tensor, weight: Tensor, draws: bool) -> tuple[Tensor, ...]:
    logits = hidden @ weight.T
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    confidence, argmax = probabilities.max(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    token = probabilities.multinomial(1)[:, 0] if draws else argmax
    return token, confidence, entropy


def _eager_soft(logits: Tensor, embedding: Tensor) -> Tensor:
    return (logits / 0.7).softmax(-1).to(embedding.dtype) @ embedding


def _eager_both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    logits = (hidden @ weight.T).float() / 0.7
    probabilities = logits.softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)
    token, argmax = probabilities.multinomial(1)[:, 0], probabilities.argmax(-1)
    return token, argmax, entropy, probabilities.to(weight.dtype) @ weight


def _check_head(
    calls: Mapping[str, Callable[[], ops.TokenSamples]], hidden: Tensor, weight: Tensor, settings: dict[str, Any]
) -> None:
    rows = slice(0, 4)
    logits = (hidden[rows] @ weight.T).double().cpu()
    truth = ops.sample_tokens(logits, backend="reference", **settings)
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 3e-2
    for name, call in calls.items():
        samples = call()
        # products of 4 rows and of all round differently, so that two near logits may change places
        behind = logits.amax(1) - logits.gather(1, samples.argmax[rows, None].cpu())[:, 0]
        if (behind > tolerance * logits.abs().amax()).any():
            raise WrongAnswerError(f"{name} is not timed, its best tokens are behind the best by {behind}")
        entropy = samples.entropy[rows].cpu().double()
        if not torch.allclose(entropy, truth.entropy, rtol=tolerance, atol=tolerance):
            raise WrongAnswerError(f"{name} is not timed, entropy is {entropy}, in float64 {truth.entropy}")


def _check_soft(calls: Mapping[str, Callable[[], Tensor]], logits: Tensor, embedding: Tensor) -> None:
    truth = (logits[:4].double() / 0.7).softmax(-1) @ embedding.double()
    tolerance = 1e-4 if embedding.dtype == torch.float32 else 1e-2
    for name, call in calls.items():
        error = (call()[:4].double() - truth).abs().max() / truth.abs().max()
        if error > tolerance:
            raise WrongAnswerError(f"{name} is not timed, its soft embedding is off by {error:.1e}")
