"""merge_attention: parts of the keys give what all of them give."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from diffusion_runtime import ops
from diffusion_runtime.testing import assert_as_accurate


def _parts(dtype, cuts=(0, 5, 6, 23), dim=8):
    query, key, value = (torch.randn(2, 4, n, dim, dtype=dtype) for n in (3, 23, 23))
    return (query, key, value), [
        ops.attention(query, key[:, :, i:j], value[:, :, i:j], return_logsumexp=True, backend="reference")
        for i, j in pairwise(cuts)
    ]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_attention_over_all_keys(dtype, stacked):
    inputs, parts = _parts(dtype)
    outs, sums = (torch.stack(x) if stacked else list(x) for x in zip(*parts, strict=True))
    out, logsumexp = ops.merge_attention(outs, sums)
    truth, true_sums = ops.attention(*(x.double() for x in inputs), return_logsumexp=True, backend="reference")
    same, same_sums = ops.attention(*inputs, return_logsumexp=True, backend="reference")
    assert out.dtype == dtype
    assert logsumexp.dtype == same_sums.dtype
    assert_as_accurate(out, same, truth, floor=2**-7 if dtype == torch.bfloat16 else 2e-6)  # parts were rounded too
    assert_as_accurate(logsumexp, same_sums, true_sums)


def test_parts_that_saw_nothing_do_not_count():
    outs = torch.randn(3, 2, 4)
    sums = torch.tensor([[-torch.inf, -torch.inf], [1e4, -torch.inf], [-torch.inf, -torch.inf]])
    outs[0], outs[2, 1] = torch.nan, torch.inf
    out, logsumexp = ops.merge_attention(outs, sums)
    assert torch.equal(out, torch.stack((outs[1, 0], torch.zeros(4))))
    assert logsumexp.tolist() == [1e4, -torch.inf]


def test_gradients():
    outs = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    sums = torch.randn(3, 2, 5, dtype=torch.float64)
    sums[1, 0], sums[:, 1, 2] = -torch.inf, -torch.inf
    sums.requires_grad_()
    assert torch.autograd.gradcheck(lambda o: ops.merge_attention(o, sums.detach())[0], outs)
    out, logsumexp = ops.merge_attention(outs, sums)
    (out.sum() + logsumexp[logsumexp > -torch.inf].sum()).backward()
    assert outs.grad.isfinite().all()
    assert sums.grad.isfinite().all()
    seen = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ops.merge_attention(outs[:2, 0, :3].detach(), s), seen)


def test_empty_rows():
    out, logsumexp = ops.merge_attention([torch.zeros(0, 4)], [torch.zeros(0)])
    assert out.shape == (0, 4)
    assert logsumexp.shape == (0,)


@pytest.mark.parametrize(
    ("outs", "sums", "error", "message"),
    [
        ([], [], ValueError, r"outs must be parts of one shape, got \[\]"),
        (torch.zeros(0, 3, 4), torch.zeros(0, 3), ValueError, "at least one part"),
        ([torch.zeros(3, 4)], [torch.zeros(4)], ValueError, r"got \(1, 3, 4\) and \(1, 4\)"),
        ([torch.zeros(3, 4), torch.zeros(2, 4)], torch.zeros(2, 3), ValueError, "one shape"),
        ([torch.zeros(3, 4), torch.zeros(3, 4).half()], torch.zeros(2, 3), TypeError, "one dtype"),
        ([torch.zeros(3, 4, dtype=torch.int64)], [torch.zeros(3)], TypeError, "floating point"),
        ([1.0], [torch.zeros(3)], TypeError, "must be tensors, got float"),
    ],
)
def test_rejects(outs, sums, error, message):
    with pytest.raises(error, match=message):
        ops.merge_attention(outs, sums)
