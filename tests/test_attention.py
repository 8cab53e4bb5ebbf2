"""attention's reference: what it must equal, and what it refuses. Its kernels are held to it in their own tests."""

from __future__ import annotations

import math

import attention_cases
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffusion_runtime import ops
from diffusion_runtime.nn import LlamaRMSNorm, apply_rotary, rotary_table
from diffusion_runtime.testing import assert_as_accurate


def _sees(mask, p, position, prefix, sequence):
    """Whether a query at ``p`` sees a key at ``position``, in the words of each mask's docstring."""
    match mask:
        case ops.Causal(offset):
            return position <= p + offset
        case ops.BlockCausal(block_length, offset):
            return position // block_length <= (p + offset) // block_length
        case ops.SlidingWindow(left, right, offset):
            near = left is None or position >= p + offset - left
            return near and (right is None or position <= p + offset + right)
        case ops.PrefixWindow(num_keys):
            return position >= prefix - num_keys
        case ops.PerSequence(chosen, one, otherwise):
            return _sees(one if chosen[sequence] else otherwise, p, position, prefix, sequence)
    return True


def _segments(one, b):
    """The real keys and values of a sequence, each ``[kv_heads, keys, dim]``, and where its rows are."""
    query, key, value, kwargs = one
    lengths, prefix = kwargs.get("lengths"), kwargs.get("prefix")
    at, rows, first, end = b, (0, query.shape[2]), 0, key.shape[2]
    if isinstance(lengths, ops.Packed):
        at, rows = 0, lengths.cu_seqlens[b : b + 2].tolist()
        first, end = (lengths.cu_seqlens if lengths.cu_seqlens_k is None else lengths.cu_seqlens_k)[b : b + 2].tolist()
    elif isinstance(lengths, tuple):
        first, end = (int(x[b]) for x in lengths)
    elif lengths is not None:
        end = int(lengths[b])
    keys, values = key[at, :, first:end], value[at, :, first:end]
    before = 0
    if prefix is not None:
        before = int(prefix.lengths[b])
        if isinstance(prefix, ops.PagedPrefix):
            size = prefix.pool.shape[3]
            places = [(int(prefix.table[b, i // size]), i % size) for i in range(before)]
            pool = [
                torch.stack([side[page, :, i] for page, i in places], 1) if places else keys[:, :0]
                for side in prefix.pool
            ]
        else:
            pool = [prefix.key[b, :, :before], prefix.value[b, :, :before]]
        keys, values = torch.cat((pool[0], keys), 1), torch.cat((pool[1], values), 1)
    padding = 0 if isinstance(lengths, ops.Packed) else first
    return keys.double(), values.double(), at, rows, before, padding


@pytest.mark.parametrize("name", attention_cases.NAMES)
def test_is_what_the_words_say(name):
    """One query at a time, from the keys that its mask's docstring lets it see."""
    one = attention_cases.case(name)
    query, key, value, kwargs = one
    lengths, mask = kwargs.get("lengths"), kwargs.get("mask")
    scale, softcap = kwargs.get("scale", query.shape[3] ** -0.5), kwargs.get("softcap")
    sequences = len(lengths.cu_seqlens) - 1 if isinstance(lengths, ops.Packed) else len(query)
    out, logsumexp = attention_cases.run(
        attention_cases.Case(*attention_cases.mapped(lambda x: x.double() if x.is_floating_point() else x, tuple(one))),
        "reference",
    )
    group = query.shape[1] // key.shape[1]
    for b in range(sequences):
        keys, values, at, rows, prefix, padding = _segments(one, b)
        for h in range(query.shape[1]):
            for i in range(*rows):
                p = prefix + i - (rows[0] if isinstance(lengths, ops.Packed) else padding)
                scores = keys[h // group] @ query[at, h, i].double() * scale
                if softcap:
                    scores = softcap * (scores / softcap).tanh()
                if isinstance(mask, torch.Tensor):
                    row = mask.expand(*query.shape[:3], key.shape[2])[at, h, i]
                    hidden = ~row if mask.dtype == torch.bool else row == -torch.inf
                    scores = (scores if mask.dtype == torch.bool else scores + row).masked_fill(hidden, -torch.inf)
                else:
                    seen = [_sees(mask, p, position, prefix, b) for position in range(len(scores))]
                    scores = scores.masked_fill(~torch.tensor(seen, dtype=torch.bool), -torch.inf)
                total = scores.logsumexp(0) if len(scores) else torch.tensor(-math.inf)
                expected = (scores - total).exp() @ values[h // group] if total > -math.inf else torch.zeros(())
                torch.testing.assert_close(logsumexp[at, h, i], total.double(), rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(
                    out[at, h, i], expected.double().expand_as(out[at, h, i]), rtol=1e-9, atol=1e-9
                )


@pytest.mark.parametrize("mask", [None, *list(attention_cases.MASKS.values())[:9]], ids=str)
def test_company_changes_nothing(mask):
    attention_cases.check_invariant("reference", mask, torch.float64, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", attention_cases.NAMES)
def test_gives_no_nan(name, dtype):
    out, logsumexp = attention_cases.run(attention_cases.case(name, dtype), "reference")
    assert not out.isnan().any()
    assert not logsumexp.isnan().any()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_torch(dtype, heads):
    query = torch.randn(2, 7, heads[0], 16, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(2, heads[1], 11, 16, dtype=dtype) for _ in range(2))
    got = ops.attention(query, key, value, scale=0.3)
    wide = [x.double() for x in (query, key, value)]
    truth = scaled_dot_product_attention(*wide, scale=0.3, enable_gqa=True)
    same = scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    assert got.dtype == dtype
    assert_as_accurate(got, same, truth)


def test_gradients_flow():
    inputs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(ops.attention, inputs)


def test_no_keys_give_zeros():
    empty = torch.zeros(1, 2, 0, 4)
    assert torch.equal(ops.attention(torch.randn(1, 2, 3, 4), empty, empty), torch.zeros(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        (((2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), ValueError, r"query must be \[batch, heads, length, head_dim\]"),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 5, 4)), ValueError, r"value must be \[1, 2, 3"),
        (((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), ValueError, "a divisor of 3"),
        (((1, 2, 3, 4), (1, 2, 3, 8), (1, 2, 3, 8)), ValueError, "to fit query"),
    ],
)
def test_rejects_shapes(shapes, error, message):
    with pytest.raises(error, match=message):
        ops.attention(*(torch.zeros(shape) for shape in shapes))


def test_rejects_other_dtypes_and_backends():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"share one floating-point dtype, got key torch.float64"):
        ops.attention(x, x.double(), x)
    with pytest.raises(ops.BackendUnavailableError, match=r"cpp takes .*, got torch.float64"):
        ops.attention(x.double(), x.double(), x.double(), backend="cpp")


def test_rms_norm_rounds_before_the_weight():
    norm = LlamaRMSNorm(8, 1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
    x = torch.randn(3, 8).bfloat16()
    wide = x.float()
    expected = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16() * norm.weight
    assert (norm(x) - expected).abs().max() <= 2**-7


def test_rotary_preserves_relative_angles():
    table = rotary_table(50, 16, 10000.0, torch.device("cpu"))
    query, key = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    rotated_query, rotated_key = (apply_rotary(x.expand(1, 1, 50, 16), table)[0, 0] for x in (query, key))
    products = rotated_query @ rotated_key.T
    for offset in (0, 3, 20):  # the product depends on the distance alone
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated_query[0], query)
