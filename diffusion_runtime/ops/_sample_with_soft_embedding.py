"""The sampler, and the embedding that its distribution expects, from hidden states: what self-conditioning needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.ops import _head_cpp, _head_cuda, _head_triton
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices
from diffusion_runtime.ops._rows import float_setting
from diffusion_runtime.ops._sample_from_hidden import head, places_of, sample_from_hidden, spread, validate_head
from diffusion_runtime.ops._sample_tokens import FLOATS, TokenSamples, as_samples, check_distributions
from diffusion_runtime.ops._settings import read_settings
from diffusion_runtime.ops._soft_embedding import check_embedding, soft_embedding_from_hidden


def sample_with_soft_embedding(
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor | None = None,
    *,
    temperature: Tensor | float,
    seed: Tensor | int,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    step: Tensor | int = 0,
    masked: Tensor | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[TokenSamples, Tensor]:
    """:func:`sample_from_hidden` and :func:`soft_embedding_from_hidden` of one distribution, at one temperature.

    The results are those of the two ops, the first with ``statistics_temperature=temperature``, up to roundings. In C++
    the head is multiplied once, not twice: embeddings are summed tile by tile with weights relative to the largest
    logit so far, and the sum is rescaled where a larger one comes. The other backends run the two ops.

    Args:
        hidden, weight, bias, seed, position, step, masked, softcap: as in :func:`sample_from_hidden`.
        embedding: ``[vocab, dim]``; None: the weight, where it is tied to the embedding.
        temperature: above 0 and finite, a float or a tensor: of the draw, the statistics and the soft embedding.
        backend: as in :func:`sample_from_hidden`.

    Returns:
        the samples, and ``[..., dim]`` in the dtype of the embedding, 0 in rows that are not masked.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as the two ops.
    """
    validate_head(hidden, weight, bias)
    embedding = weight if embedding is None else embedding
    leading = hidden.shape[:-1]
    check_embedding(embedding, weight, hidden)
    float_setting("temperature", temperature, leading, hidden.device, zero=False)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "statistics_temperature": temperature,
        "seed": seed,
        "position": places_of(hidden, position),
        "step": step,
        "masked": masked,
        "softcap": softcap,
    }
    run = None if torch.compiler.is_compiling() else SPEC.resolve(hidden.device.type, hidden.dtype, backend)
    if run is None or run is one_after_the_other:
        return one_after_the_other(hidden, weight, embedding, bias=bias, backend=backend, **settings)
    settings |= dict.fromkeys(("allowed", "suppress", "top_k", "top_p", "min_p"))
    read = read_settings(leading, len(weight), hidden.device, **settings, statistics="unrestricted")
    rows, weight = hidden.detach().reshape(leading.numel(), hidden.shape[-1]), weight.detach()
    bias, embedding = None if bias is None else bias.detach().contiguous(), embedding.detach()
    if read.masked is None or read.masked.all():
        ids, statistics, expected = run(rows, weight, bias, embedding, read._replace(masked=None))
    else:
        chosen = read.masked.nonzero()[:, 0]
        *found, some = run(rows[chosen], weight, bias, embedding, read._replace(masked=None).of_rows(chosen))
        ids, statistics = spread((found[0], found[1]), chosen, len(rows))
        expected = some.new_zeros(len(rows), some.shape[1])
        expected[chosen] = some
    check_distributions(ids, read, leading, lambda r: head(rows[r : r + 1], weight, bias)[0])
    return as_samples(ids, statistics, leading), expected.view(*leading, expected.shape[1])


def one_after_the_other(
    hidden: Tensor, weight: Tensor, embedding: Tensor, *, bias: Tensor | None, backend: str | None, **settings: Any
) -> tuple[TokenSamples, Tensor]:
    """By the two ops; the second is told the logsumexp."""
    samples = sample_from_hidden(hidden, weight, bias=bias, backend=backend, **settings)
    same = {name: settings[name] for name in ("temperature", "softcap", "masked")}
    expected = soft_embedding_from_hidden(
        hidden, weight, embedding, bias=bias, backend=backend, logsumexp=samples.logsumexp, **same
    )
    return samples, expected


def _if(load: Callable[[], object]) -> Callable[[], Callable[..., Any]]:
    """The two ops, where their kernels can be loaded."""

    def two() -> Callable[..., Any]:
        load()
        return one_after_the_other

    return two


SPEC = OpSpec(
    name="sample_with_soft_embedding",
    reference=one_after_the_other,
    validate=validate_head,
    implementations=(
        Implementation("cuda", frozenset({"cuda"}), FLOATS, _if(_head_cuda.load_weigh)),
        Implementation("cpp", frozenset({"cpu"}), FLOATS, _head_cpp.load_sample_with_soft_embedding),
        Implementation("triton", triton_devices(), FLOATS, _if(_head_triton.load_weigh)),
    ),
)
