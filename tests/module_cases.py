"""A module of ours beside torch's: the same parameters, the same inputs, outputs and gradients compared."""

from __future__ import annotations

import torch

BATCH, LENGTH, KEYS, SIZE, HEADS = 3, 5, 7, 8, 2


def pair(ours, theirs, *args, **kwargs):
    """The same arguments and seed, so the same parameters."""
    made = []
    for kind in (theirs, ours):
        torch.manual_seed(1)
        made.append(kind(*args, **kwargs))
    for mine, torchs in zip(made[1].parameters(), made[0].parameters(), strict=True):
        assert torch.equal(mine, torchs)
    with torch.no_grad():  # biases begin at 0
        for mine, torchs in zip(made[1].parameters(), made[0].parameters(), strict=True):
            torchs += 0.1 * torch.randn_like(torchs)
            mine.copy_(torchs)
    return made


def results(module, mode, inputs, kwargs):
    """Outputs and every gradient, dropout drawn from seed 0."""
    module.train(mode == "train")
    torch.manual_seed(0)
    if mode == "no_grad":
        with torch.no_grad():
            return outputs(module(*inputs, **kwargs))
    copies = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    out, *weights = outputs(module(*(copies[id(x)] for x in inputs), **kwargs))
    used = [*copies.values(), *module.parameters()]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), used), *weights]


def outputs(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def assert_same(ours, theirs, mode, inputs, kwargs, tolerance=2e-5):
    got, expected = (results(module, mode, inputs, kwargs) for module in (ours, theirs))
    assert len(got) == len(expected)
    for mine, torchs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=tolerance, atol=tolerance)
    # of torch's paths some give a transposed output
    assert got[0].is_contiguous() or not expected[0].is_contiguous()
