"""The gradients of attention in Triton, against those of the reference in float64."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from diffusion_runtime.kernels import attention_key_gradient, attention_query_gradient

from diffusion_runtime import ops
from diffusion_runtime.testing import assert_as_accurate


def gradients(
    case: attention_cases.Case, backend: str, device: str | torch.device = "cpu", wide: bool = False
) -> dict[str, Tensor]:
    """Of every input that has one, for random gradients of both results."""
    inputs: dict[str, Tensor] = {}

    def leaf(name: str, x: Tensor) -> Tensor:
        x = (x.double() if wide else x).to(device).detach().requires_grad_()
        inputs[name] = x
        return x

    kwargs = dict(case.kwargs)
    query, key, value = (leaf(name, x) for name, x in zip(("query", "key", "value"), case[:3], strict=True))
    prefix = kwargs.get("prefix")
    if isinstance(prefix, ops.Prefix):
        kwargs["prefix"] = ops.Prefix(
            leaf("prefix_key", prefix.key), leaf("prefix_value", prefix.value), prefix.lengths
        )
    if isinstance(kwargs.get("mask"), Tensor) and kwargs["mask"].is_floating_point():
        kwargs["mask"] = leaf("mask", kwargs["mask"])
    others = attention_cases.mapped(
        lambda x: (
            x if x.requires_grad else x.to(device, torch.float64) if wide and x.is_floating_point() else x.to(device)
        ),
        kwargs,
    )
    out, sums = ops.attention(query, key, value, **others, return_logsumexp=True, backend=backend)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(out.shape, generator=generator).to(case.query.dtype).to(out)
    grad_sums = torch.randn(sums.shape, generator=generator).to(sums)
    loss = (out.double() * grad.double()).sum() + (
        sums.double().masked_fill(sums == -torch.inf, 0) * grad_sums.double()
    ).sum()
    loss.backward()
    return {name: x.grad.cpu() for name, x in inputs.items()}


# a product with 0 is not enough to hide NaN from the gradient of a query
NAMES = [name for name in attention_cases.NAMES if not name.startswith("hidden")]


@pytest.mark.parametrize("name", NAMES)
def test_equal_the_reference(name, device):
    case = attention_cases.case(name)
    got, same, true = (
        gradients(case, "triton", device),
        gradients(case, "reference"),
        gradients(case, "reference", wide=True),
    )
    for which in true:
        assert got[which].dtype == case.query.dtype
        assert_as_accurate(got[which], same[which], true[which], floor=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["square", "prefix:window", "left:blocks", "packed:prefix", "float-mask", "softcap"])
def test_of_halves(name, dtype, device):
    case = attention_cases.case(name, dtype, 40)
    got, same, true = (
        gradients(case, "triton", device),
        gradients(case, "reference"),
        gradients(case, "reference", wide=True),
    )
    for which in true:
        # weights and gradients of scores are rounded where they are multiplied, as in every fused backward
        assert_as_accurate(got[which], same[which], true[which], floor=8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("dim", [16, 24, 128, 512])
def test_heads_of_any_size(dim, device):
    case = attention_cases.case("prefix:window", torch.bfloat16, dim)
    got, same, true = (
        gradients(case, "triton", device),
        gradients(case, "reference"),
        gradients(case, "reference", wide=True),
    )
    for which in true:
        assert_as_accurate(got[which], same[which], true[which], floor=8e-3)


def test_several_blocks_and_any_layout(device):
    query, key, value = torch.randn(1, 150, 4, 24), torch.randn(1, 150, 2, 24), torch.randn(1, 2, 16, 150)
    case = attention_cases.Case(
        query.transpose(1, 2), key.transpose(1, 2), value.mT, {"mask": ops.SlidingWindow(70, 9)}
    )
    got, same, true = (
        gradients(case, "triton", device),
        gradients(case, "reference"),
        gradients(case, "reference", wide=True),
    )
    for which in true:
        assert_as_accurate(got[which], same[which], true[which])


@pytest.mark.parametrize(
    "name", ["prefix:window", "prefix:per-sequence", "prefix:blocks-odd", "left:window", "packed:blocks"]
)
def test_tiles_as_small_as_they_get(name, device, monkeypatch):
    """Whose ends are close to what a query or a key sees."""
    for module, name_of in (
        (attention_query_gradient, "query_gradient_config"),
        (attention_key_gradient, "key_gradient_config"),
    ):
        config = getattr(module, name_of)
        small = {"BLOCK_ROWS": 16, "BLOCK_KEYS": 16}
        monkeypatch.setattr(module, name_of, lambda *args, config=config, small=small: config(*args) | small)
    case = attention_cases.case(name, dim=16)
    got, same, true = (
        gradients(case, "triton", device),
        gradients(case, "reference"),
        gradients(case, "reference", wide=True),
    )
    for which in true:
        assert_as_accurate(got[which], same[which], true[which])


def test_the_same_call_gives_the_same_bits(device):
    case = attention_cases.case("prefix:blocks")
    first, second = (gradients(case, "triton", device) for _ in range(2))
    assert all(torch.equal(first[which], second[which]) for which in first)
