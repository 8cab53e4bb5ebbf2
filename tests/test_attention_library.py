"""attention as an operator of torch: opcheck, gradients, compiled graphs, exports, autocast, checkpoints."""

from __future__ import annotations

import pytest
import torch
from attention_forms import FORMS, OPERATOR, SIZE, arguments_of, call_of, differentiable, tensor
from torch.utils.checkpoint import checkpoint

from diffusion_runtime import nn, ops


@pytest.mark.parametrize("name", FORMS)
def test_gradients(name):
    arguments = arguments_of(name)
    places = differentiable(arguments)
    leaves = [arguments[i].clone().requires_grad_() for i in places]
    assert torch.autograd.gradcheck(call_of(arguments, places), leaves, fast_mode=True)


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output(output):
    arguments = arguments_of("softcap, mask")
    places = differentiable(arguments)
    leaves = [arguments[i].clone().requires_grad_() for i in places if output == 0 or i != 2]
    function = call_of(arguments, [i for i in places if output == 0 or i != 2])
    assert torch.autograd.gradcheck(lambda *x: function(*x)[output], leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x)[output], leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "packed, prefix", "paged", "softcap", "float mask", "mask per-sequence"])
def test_gradients_of_gradients(name):
    arguments = arguments_of(name)
    places = differentiable(arguments)
    leaves = [arguments[i].clone().requires_grad_() for i in places]
    assert torch.autograd.gradgradcheck(call_of(arguments, places), leaves, fast_mode=True)


@pytest.mark.parametrize(
    "name", ["plain", "left padding", "prefix", "paged", "packed, prefix", "float mask", "mask per-sequence"]
)
def test_opcheck(name):
    arguments = arguments_of(name, torch.float32)
    for i in differentiable(arguments):
        arguments[i] = arguments[i].clone().requires_grad_()
    torch.library.opcheck(OPERATOR, tuple(arguments))


def test_a_pool_of_pages_takes_no_gradients():
    arguments = arguments_of("paged")
    arguments[3] = arguments[3].clone().requires_grad_()
    with pytest.raises(ValueError, match="the pool of a PagedPrefix takes no gradients"):
        OPERATOR(*arguments)


def _public(name, **more):
    """The public function as a module of the three tensors, so that it can be exported too."""
    kwargs = {**FORMS[name](), **more}

    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return ops.attention(query, key, value, **kwargs)

    return Module()


def _tensors(name, dtype=torch.float64):
    return [x.clone().requires_grad_() for x in arguments_of(name, dtype)[:3]]


COMPILED = ["plain", "lengths", "left padding", "packed", "bool mask", "softcap, mask", "scale"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_into_one_graph(name):
    module, tensors = _public(name), _tensors(name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected, got = module(*tensors), compiled(*tensors)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.square().sum(), tensors) for x in (got, expected)), rtol=1e-5, atol=1e-5
    )


def test_compiles_with_a_prefix_and_dynamic_sizes():
    def call(query, key, value, prefix_key, prefix_value, ends):
        out, logsumexp = ops.attention(
            query,
            key,
            value,
            prefix=ops.Prefix(prefix_key, prefix_value, ends),
            mask=ops.BlockCausal(2),
            return_logsumexp=True,
        )
        return ops.scaled_dot_product_attention(out, out, out, is_causal=True), logsumexp

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (4, 7):
        query, key, value = (tensor(2, 2, length, SIZE) for _ in range(3))
        rest = (tensor(2, 2, 3 + length, SIZE), tensor(2, 2, 3 + length, SIZE), torch.tensor([3, length]))
        torch.testing.assert_close(compiled(query, key, value, *rest), call(query, key, value, *rest))


@pytest.mark.parametrize("name", COMPILED)
def test_exports(name):
    module, tensors = _public(name).eval(), tuple(_tensors(name))
    program = torch.export.export(module, tensors)
    torch.testing.assert_close(program.module()(*tensors), module(*tensors))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "diffusion_runtime.attention.default" in targets


BATCH_DIM, LENGTH_DIM, KEYS_DIM = (torch.export.Dim(name, min=2) for name in ("batch", "length", "num_keys"))


class Both(torch.nn.Module):
    """Both functions with all that may grow."""

    def forward(self, query, key, value, mask, ends):
        out = ops.attention(query, key, value, lengths=ends, mask=ops.SlidingWindow(3, 1))
        return out + ops.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def _growing(batch, length, num_keys):
    query, key, value = (tensor(batch, h, n, SIZE) for h, n in ((4, length), (2, num_keys), (2, num_keys)))
    ends = torch.arange(batch) % (num_keys + 1)
    return query, key, value, torch.rand(batch, 1, length, num_keys) > 0.3, ends


def test_exports_with_dynamic_sizes():
    keys = {0: BATCH_DIM, 2: KEYS_DIM}
    shapes = ({0: BATCH_DIM, 2: LENGTH_DIM}, keys, keys, {0: BATCH_DIM, 2: LENGTH_DIM, 3: KEYS_DIM}, {0: BATCH_DIM})
    program = torch.export.export(Both(), _growing(2, 5, 7), dynamic_shapes=shapes)
    for sizes in ((2, 5, 7), (5, 9, 3), (3, 2, 11)):
        tensors = _growing(*sizes)
        torch.testing.assert_close(program.module()(*tensors), Both()(*tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_compiled_or_not(dtype):
    tensors = _tensors("plain", torch.float32)
    with torch.autocast("cpu", dtype):
        plain = ops.attention(*tensors)
        compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)(*tensors)
    assert plain.dtype == dtype
    # autocast casts the inputs, and nothing that attention computes from them
    assert torch.equal(plain, ops.attention(*(x.to(dtype) for x in tensors)))
    assert torch.equal(plain, compiled)
    for gradient in torch.autograd.grad(plain.float().sum(), tensors):
        assert gradient.dtype == torch.float32


def test_an_encoder_layer_compiles_exports_and_maps():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    expected = layer(x, src_key_padding_mask=padding)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, src_key_padding_mask=padding), expected)
    sizes = {0: BATCH_DIM, 1: LENGTH_DIM}
    program = torch.export.export(
        layer,
        (x[:2],),
        {"src_key_padding_mask": padding[:2]},
        dynamic_shapes={"src": sizes, "src_key_padding_mask": sizes},
    )
    torch.testing.assert_close(program.module()(x, src_key_padding_mask=padding), expected)
    parameters = dict(layer.named_parameters())

    def one(row, pad):
        return torch.func.functional_call(layer, parameters, (row[None],), {"src_key_padding_mask": pad[None]})[0]

    torch.testing.assert_close(torch.vmap(one)(x, padding), expected)


def test_checkpoint():
    tensors = _tensors("lengths")
    module = _public("lengths")
    expected = torch.autograd.grad(module(*tensors).square().sum(), tensors)
    got = torch.autograd.grad(checkpoint(module, *tensors, use_reentrant=False).square().sum(), tensors)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_has_shapes_and_strides_without_memory():
    query, key, value = (x.to("meta") for x in _tensors("plain"))
    out, logsumexp = ops.attention(query, key, value, return_logsumexp=True)
    real = ops.attention(*_tensors("plain"))
    assert (out.shape, out.stride(), logsumexp.shape) == (real.shape, real.stride(), real.shape[:3])
    assert ops.scaled_dot_product_attention(query, key, value, enable_gqa=True).shape == real.shape
