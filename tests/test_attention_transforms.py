"""attention under the transforms of torch.func: grad, vmap in every argument, forward mode, hessians."""

from __future__ import annotations

import pytest
import torch
from attention_forms import FORMS, OPERATOR, arguments_of, paged_prefix
from torch.autograd import forward_ad

from diffusion_runtime import ops


def _variants(place, value):
    """Three legal values of one argument."""
    if value.is_floating_point():
        return [value, torch.randn_like(value), value + 1]
    if value.dtype == torch.bool:
        return [value, ~value, value]
    if place in (10, 11):  # cu_seqlens
        return [value, value[-1] - value.flip(0), value]
    return [value, value.clamp(max=2) if place in (5, 8) else value, value]


@pytest.mark.parametrize("name", FORMS)
def test_vmap(name):
    """All tensors mapped, and each of them alone, over dimensions in turn."""
    arguments = arguments_of(name)
    places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
    if arguments[6] is not None:
        places = [i for i in places if i not in (3, 4)]
    for mapped in (places, *([i] for i in places)):
        variants = {i: _variants(i, arguments[i]) for i in mapped}
        dims = {i: n % variants[i][0].ndim for n, i in enumerate(mapped)}
        stacked = [torch.stack(variants[i], dims[i]) if i in dims else x for i, x in enumerate(arguments)]
        got = torch.vmap(OPERATOR, tuple(dims.get(i) for i in range(len(stacked))))(*stacked)
        for n in range(3):
            expected = OPERATOR(*(variants[i][n] if i in variants else x for i, x in enumerate(arguments)))
            torch.testing.assert_close(tuple(x[n] for x in got), expected)


@pytest.mark.parametrize("name", ["plain", "lengths", "prefix", "packed, prefix", "float mask", "row mask", "softcap"])
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap", "vmap of vmap of grad"])
def test_func_transforms(name, order):
    """Keys are not mapped, the others are; the same through a loop and torch.autograd."""
    kwargs = FORMS[name]()
    query, key, value = arguments_of(name)[:3]
    queries = torch.stack([query, query + 1, -query])
    values = torch.stack([value, value + 1, -value])

    def loss(query, key, value):
        out, logsumexp = ops.attention(query, key, value, return_logsumexp=True, **kwargs)
        return out.square().sum() + logsumexp.sin().sum()

    leaves = [x.clone().requires_grad_() for x in (queries, key, values)]
    each = [loss(leaves[0][n], leaves[1], leaves[2][n]) for n in range(3)]
    shared = torch.autograd.grad(sum(each), leaves, retain_graph=True)
    alone = torch.stack([torch.autograd.grad(x, leaves[1], retain_graph=True)[0] for x in each])
    gradient = torch.func.grad(loss, (0, 1, 2))
    if order == "vmap of grad":
        got, expected = torch.vmap(gradient, (0, None, 0))(queries, key, values), (shared[0], alone, shared[2])
    elif order == "grad of vmap":
        got = torch.func.grad(lambda *x: torch.vmap(loss, (0, None, 0))(*x).sum(), (0, 1, 2))(queries, key, values)
        expected = shared
    else:
        nested = torch.vmap(torch.vmap(gradient, (0, None, 0)), (None, 0, None))
        found = nested(queries, key[None].expand(2, *key.shape), values)
        got, expected = tuple(x[1] for x in found), (shared[0], alone, shared[2])
    torch.testing.assert_close(got, expected)


def test_vmap_over_lengths_and_pages():
    query, key, value = arguments_of("paged")[:3]
    prefix, lengths = paged_prefix(), torch.tensor([[6, 2], [0, 5]])

    def call(table, ends):
        return ops.attention(
            query, key, value, prefix=ops.PagedPrefix(prefix.pool, table, prefix.lengths), lengths=ends
        )

    tables = torch.stack([prefix.table, prefix.table.flip(0)])
    got = torch.vmap(call)(tables, lengths)
    torch.testing.assert_close(got, torch.stack([call(*x) for x in zip(tables, lengths, strict=True)]))
    with pytest.raises(ValueError, match="vmap cannot map the pool of a PagedPrefix"):
        torch.vmap(
            lambda pool: ops.attention(query, key, value, prefix=ops.PagedPrefix(pool, prefix.table, prefix.lengths))
        )(prefix.pool[None])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in forward mode
def test_forward_mode_and_hessians():
    query, key, value = arguments_of("plain")[:3]
    tangent = torch.randn_like(query)
    expected = torch.func.jvp(lambda x: _composed(x, key, value), (query,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(lambda x: ops.attention(x, key, value), (query,), (tangent,)), expected)
    with forward_ad.dual_level():
        out = ops.attention(forward_ad.make_dual(query, tangent), key, value)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected[1])
        with pytest.raises(ops.BackendUnavailableError, match="forward-mode derivatives"):
            ops.attention(query, key, value, backend="cpp")
    one = query[:1, :2, :2]

    def loss(function):
        return lambda x: function(x, key[:1], value[:1]).pow(3).sum()

    hessian = torch.func.hessian(loss(_composed))(one)
    for outer, inner in ((torch.func.jacfwd, torch.func.jacrev), (torch.func.jacrev, torch.func.jacrev)):
        torch.testing.assert_close(outer(inner(loss(ops.attention)))(one), hessian)


def _composed(query, key, value):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


@pytest.mark.parametrize("name", ["plain", "lengths", "float mask", "softcap"])
def test_compiled_transforms(name):
    """torch traces the reference then; a named kernel says that it cannot."""
    kwargs = FORMS[name]()
    tensors = arguments_of(name)[:3]

    def loss(query, key, value):
        return ops.attention(query, key, value, **kwargs).square().sum()

    mapped = (*tensors[:2], torch.stack([tensors[2], tensors[2] + 1]))
    for function, values in ((torch.func.grad(loss, (0, 1, 2)), tensors), (torch.vmap(loss, (None, None, 0)), mapped)):
        got = torch.compile(function, backend="aot_eager", fullgraph=True)(*values)
        torch.testing.assert_close(got, function(*values))
