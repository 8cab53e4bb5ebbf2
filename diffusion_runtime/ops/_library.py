"""Ops as ``torch.library`` operators, which is how they go through ``torch.compile`` without a graph break.

In eager mode the public functions call their backend directly: an operator call costs ten microseconds more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.ops import _commit_backends, _sample_from_hidden, _sample_tokens, _soft_embedding
from diffusion_runtime.ops._commit_reference import Problem, results
from diffusion_runtime.ops._settings import from_operator

# the arguments of read_settings' result, in the order of to_operator
_SETTINGS = (
    "Tensor? masked, Tensor? temperature, float temperature_value, Tensor? seed, int seed_value, Tensor? position, "
    "Tensor? step, int step_value, Tensor? statistics_temperature, float statistics_temperature_value, float softcap, "
    "Tensor? allowed, Tensor? top_k, int top_k_value, Tensor? top_p, float top_p_value, Tensor? min_p, "
    "float min_p_value, bool restricted, str backend"
)


def _sample_tokens_operator(logits: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *values, backend = settings
    run: _sample_tokens.Run = _sample_tokens.SPEC.resolve(logits.device.type, logits.dtype, backend)
    return run(logits, from_operator(tuple(values)))


def _sample_from_hidden_operator(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    *values, backend = settings
    return _sample_from_hidden.run(hidden, weight, bias, from_operator(tuple(values)), backend)


def _results(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty((2, count), dtype=torch.int64), rows.new_empty((5, count), dtype=dtype)


def _commit_step_operator(*fields: Any) -> tuple[Tensor, Tensor]:
    *values, backend = fields
    problem = Problem.from_operator(tuple(values))
    return _commit_backends.resolve(problem, backend)(problem)


torch.library.define("diffusion_runtime::sample_tokens", f"(Tensor logits, {_SETTINGS}) -> (Tensor, Tensor)")
torch.library.impl("diffusion_runtime::sample_tokens", "CompositeExplicitAutograd", _sample_tokens_operator)
torch.library.register_fake(
    "diffusion_runtime::sample_tokens", lambda logits, *_: _results(logits, logits.shape[0] * logits.shape[1])
)
torch.library.define(
    "diffusion_runtime::sample_from_hidden",
    f"(Tensor hidden, Tensor weight, Tensor? bias, {_SETTINGS}) -> (Tensor, Tensor)",
)
torch.library.impl("diffusion_runtime::sample_from_hidden", "CompositeExplicitAutograd", _sample_from_hidden_operator)
torch.library.register_fake(
    "diffusion_runtime::sample_from_hidden", lambda hidden, *_: _results(hidden, hidden.shape[0])
)


# the arguments of Softmax, in the order of to_operator
_SOFTMAX = "Tensor? temperature, float temperature_value, float softcap, Tensor? masked, Tensor? logsumexp, str backend"


def _soft_embedding_operator(logits: Tensor, embedding: Tensor, *softmax: Any) -> Tensor:
    *values, backend = softmax
    run: _soft_embedding.Run = _soft_embedding.SPEC.resolve(logits.device.type, logits.dtype, backend)
    return run(logits, embedding, _soft_embedding.from_operator(*values))


def _soft_embedding_from_hidden_operator(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, embedding: Tensor, *softmax: Any
) -> Tensor:
    *values, backend = softmax
    spec = _soft_embedding.SPEC_FROM_HIDDEN
    run: _soft_embedding.RunFromHidden = spec.resolve(hidden.device.type, hidden.dtype, backend)
    return run(hidden, weight, bias, embedding, _soft_embedding.from_operator(*values))


def _embedded(embedding: Tensor, count: int) -> Tensor:
    return embedding.new_empty((count, embedding.shape[1]))


torch.library.define("diffusion_runtime::soft_embedding", f"(Tensor logits, Tensor embedding, {_SOFTMAX}) -> Tensor")
torch.library.impl("diffusion_runtime::soft_embedding", "CompositeExplicitAutograd", _soft_embedding_operator)
torch.library.register_fake(
    "diffusion_runtime::soft_embedding",
    lambda logits, embedding, *_: _embedded(embedding, logits.shape[0] * logits.shape[1]),
)
torch.library.define(
    "diffusion_runtime::soft_embedding_from_hidden",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor embedding, {_SOFTMAX}) -> Tensor",
)
torch.library.impl(
    "diffusion_runtime::soft_embedding_from_hidden", "CompositeExplicitAutograd", _soft_embedding_from_hidden_operator
)
torch.library.register_fake(
    "diffusion_runtime::soft_embedding_from_hidden",
    lambda hidden, weight, bias, embedding, *_: _embedded(embedding, hidden.shape[0]),
)
# the fields of Problem, in the order of its to_operator
torch.library.define(
    "diffusion_runtime::commit_step",
    "(Tensor masked, Tensor? score, int rule, Tensor? bound, float bound_value, Tensor? tokens, Tensor? candidates, "
    "int vocab, Tensor? seed, int seed_value, Tensor? position, Tensor? step, int step_value, str backend) "
    "-> (Tensor, Tensor)",
)
torch.library.impl("diffusion_runtime::commit_step", "CompositeExplicitAutograd", _commit_step_operator)
torch.library.register_fake(
    "diffusion_runtime::commit_step", lambda *fields: results(Problem.from_operator(fields[:-1]))
)
