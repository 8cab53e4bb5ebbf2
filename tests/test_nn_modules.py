"""Our modules against torch's: MultiheadAttention on a grid of its arguments, layers, encoders, RMSNorm."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from unittest.mock import patch

import pytest
import torch
from module_cases import BATCH, HEADS, KEYS, LENGTH, SIZE, assert_same, outputs, pair, results
from torch.utils.checkpoint import checkpoint

from diffusion_runtime import nn, ops
from diffusion_runtime.ops import _attention

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim and vdim": {"kdim": 6, "vdim": 4},
    "all": {"kdim": 6, "vdim": 4, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
}
LAYOUTS = ["batch_first", "length_first", "unbatched"]
MASKS = ["none", "padding", "float padding", "2", "float 2", "3", "float 3", "padding 2", "float padding 3", "causal"]
MASKS += ["padding causal"]
MODES = ["train", "eval", "no_grad"]  # the last takes torch's fast path where there is one


def _inputs(layout, same, options):
    def tensor(length, size):
        shape = {"batch_first": (BATCH, length), "length_first": (length, BATCH), "unbatched": (length,)}[layout]
        return torch.randn(*shape, size)

    query = tensor(LENGTH, SIZE)
    if same == "query is key is value":
        return query, query, query
    key = tensor(KEYS, options.get("kdim", SIZE))
    return query, key, key if same == "key is value" else tensor(KEYS, options.get("vdim", SIZE))


def _masks(kind, layout, num_keys):
    """Every query keeps its first key: torch's fast path gives NaN where it keeps none."""
    batch = 1 if layout == "unbatched" else BATCH
    as_float = (lambda x: x * torch.randn(x.shape)) if "float" in kind else lambda x: x
    shape = (LENGTH, num_keys) if "2" in kind else (batch * HEADS, LENGTH, num_keys)
    kwargs = {}
    if "padding" in kind:
        mask = torch.rand(num_keys if layout == "unbatched" else (batch, num_keys)) > 0.5
        mask[..., 0] = False
        kwargs["key_padding_mask"] = as_float(mask)
    if "2" in kind or "3" in kind:
        mask = torch.rand(shape) > 0.5
        mask[..., 0] = False
        kwargs["attn_mask"] = as_float(mask)
    if "causal" in kind:
        kwargs |= {"attn_mask": torch.ones(LENGTH, num_keys, dtype=torch.bool).triu(1), "is_causal": True}
    return kwargs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_multihead_attention(options, layout):
    """15 grids of 99 calls and 6 of 33: 1683, each output and gradient beside torch's."""
    settings = {"dropout": 0.4, "batch_first": layout == "batch_first", **options}
    theirs, ours = pair(nn.MultiheadAttention, torch.nn.MultiheadAttention, SIZE, HEADS, **settings)
    sames = ["none"] if "kdim" in options else ["query is key is value", "key is value", "none"]
    count = 0
    for same, mask, mode in product(sames, MASKS, MODES):
        inputs = _inputs(layout, same, options)
        kwargs = _masks(mask, layout, inputs[1].shape[0 if layout != "batch_first" else 1])
        with patch.object(torch.nn.MultiheadAttention, "forward", side_effect=AssertionError("torch's forward")):
            results(ours, mode, inputs, {**kwargs, "need_weights": False})
        assert_same(ours, theirs, mode, inputs, {**kwargs, "need_weights": False})
        count += 1
    assert count == 33 * len(sames)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights(layout, average):
    settings = {"dropout": 0.4, "batch_first": layout == "batch_first"}
    theirs, ours = pair(nn.MultiheadAttention, torch.nn.MultiheadAttention, SIZE, HEADS, **settings)
    for same, mask, mode in product(["query is key is value", "none"], MASKS, MODES):
        inputs = _inputs(layout, same, {})
        kwargs = _masks(mask, layout, inputs[1].shape[0 if layout != "batch_first" else 1])
        assert_same(ours, theirs, mode, inputs, {**kwargs, "average_attn_weights": average})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    theirs, ours = pair(nn.MultiheadAttention, torch.nn.MultiheadAttention, SIZE, HEADS, dtype=dtype)
    x = torch.randn(LENGTH, BATCH, SIZE, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for mode in MODES:
        assert_same(ours, theirs, mode, (x, x, x), {"need_weights": False}, tolerance)


def test_a_query_without_keys_gives_the_bias():
    theirs, ours = pair(nn.MultiheadAttention, torch.nn.MultiheadAttention, SIZE, HEADS, batch_first=True)
    x = torch.randn(1, LENGTH, SIZE)
    kwargs = {"key_padding_mask": torch.ones(1, LENGTH, dtype=torch.bool), "need_weights": False}
    assert_same(ours, theirs, "train", (x, x, x), kwargs)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x, x, x, **kwargs)[0], ours.out_proj.bias.expand(1, LENGTH, SIZE))


X = torch.zeros(LENGTH, BATCH, SIZE)


@pytest.mark.parametrize(
    ("inputs", "kwargs"),
    [
        ((X, X[:, :2], X[:, :2]), {}),
        ((X, X[:3], X), {}),
        ((X[..., :4], X, X), {}),
        ((X, X[0], X[0]), {}),
        ((X[None], X[None], X[None]), {}),
        ((X, X, X), {"is_causal": True}),
        ((X, X, X), {"attn_mask": torch.zeros(LENGTH, 3)}),
        ((X, X, X), {"attn_mask": torch.zeros(2, LENGTH, LENGTH)}),
        ((X, X, X), {"attn_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.int64)}),
        ((X, X, X), {"key_padding_mask": torch.zeros(LENGTH, BATCH)}),
        ((X, X, X), {"key_padding_mask": torch.zeros(LENGTH)}),
    ],
)
def test_refuses_as_torch_does(inputs, kwargs):
    theirs, ours = pair(nn.MultiheadAttention, torch.nn.MultiheadAttention, SIZE, HEADS)
    errors = []
    for module in (theirs, ours):
        with pytest.raises((RuntimeError, AssertionError)) as error:
            module(*inputs, need_weights=False, **kwargs)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


LAYER = {
    "plain": {},
    "norm_first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "own activation": {"activation": torch.nn.functional.silu},
    "no bias": {"bias": False},
    "odd heads": {"nhead": 1},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", LAYER.values(), ids=LAYER)
def test_encoder_layer(options, batch_first):
    settings = {"d_model": SIZE, "nhead": HEADS, "dim_feedforward": 16, "dropout": 0.3, **options}
    theirs, ours = pair(
        nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer, **settings, batch_first=batch_first
    )
    padding = torch.arange(LENGTH) >= torch.tensor([5, 3, 1])[:, None]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for mode, kwargs in product(
        MODES, ({}, {"src_key_padding_mask": padding}, {"src_mask": causal}, {"src_mask": causal, "is_causal": True})
    ):
        x = torch.randn(BATCH, LENGTH, SIZE) if batch_first else torch.randn(LENGTH, BATCH, SIZE)
        assert_same(ours, theirs, mode, (x,), kwargs)


def _encoders(**kwargs):
    """torch's encoder with torch's layers and with ours."""
    settings = {"d_model": SIZE, "nhead": HEADS, "dim_feedforward": 16, "dropout": 0.3, "batch_first": True}
    layers = pair(nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer, **settings)
    return [torch.nn.TransformerEncoder(layer, 2, **kwargs) for layer in layers]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("lengths", [None, [5, 3, 1], [5, 5, 5], [0, 4, 2]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_torchs_encoder_calls_our_attention(mode, lengths, nested):
    """Padded batches become nested tensors inside of torch's encoder in eval mode."""
    theirs, ours = _encoders(enable_nested_tensor=nested)
    kwargs = {}
    if lengths is not None:
        kwargs["src_key_padding_mask"] = torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]
    x = torch.randn(BATCH, LENGTH, SIZE)
    if lengths != [0, 4, 2]:  # a sequence without tokens is NaN in torch's fast path
        assert_same(ours, theirs, mode, (x,), kwargs)
    with (
        patch.object(torch, "_transformer_encoder_layer_fwd", side_effect=AssertionError("torch's fused layer")),
        patch.object(torch, "_native_multi_head_attention", side_effect=AssertionError("torch's fused attention")),
        patch.object(_attention, "run_attention", side_effect=_attention.run_attention) as attention,
    ):
        out, *_ = results(ours.eval(), "no_grad", (x,), kwargs)
    assert attention.call_count == 2
    assert out.shape == x.shape
    assert not out.isnan().any()
    if nested and lengths is not None and 0 not in lengths:
        assert not out[kwargs["src_key_padding_mask"]].any()


def test_encoder_layer_takes_nested_tensors():
    theirs, ours = pair(nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer, SIZE, HEADS, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(4, SIZE), torch.randn(2, SIZE)])
    with torch.no_grad():
        for mine, torchs in zip(ours.eval()(x).unbind(), theirs.eval()(x).unbind(), strict=True):
            torch.testing.assert_close(mine, torchs)
        with pytest.raises(AssertionError, match="does not support NestedTensor"):
            ours(x, src_key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_nested_inputs_have_gradients(training, layout):
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 16, dropout=0.0, batch_first=True).train(training)
    parts = [torch.randn(4, SIZE, requires_grad=True), torch.randn(2, SIZE, requires_grad=True)]
    nested = torch.cat(layer(torch.nested.as_nested_tensor(parts, layout=layout)).unbind())
    alone = torch.cat([layer(part) for part in parts])
    torch.testing.assert_close(nested, alone)
    used = [*parts, *layer.parameters()]
    got, expected = (torch.autograd.grad(y.square().sum(), used) for y in (nested, alone))
    torch.testing.assert_close(got, expected)


MODULES = {
    "attention": (nn.MultiheadAttention, torch.nn.MultiheadAttention, (SIZE, HEADS)),
    "layer": (nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer, (SIZE, HEADS, 16, 0.0)),
    "norm": (nn.RMSNorm, torch.nn.RMSNorm, (SIZE,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_is_torchs_module(name):
    kind, torchs, args = MODULES[name]
    theirs, ours = pair(kind, torchs, *args)
    assert isinstance(ours, torchs)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    inputs = (torch.randn(LENGTH, BATCH, SIZE),) * (3 if name == "attention" else 1)
    kwargs = {"need_weights": False} if name == "attention" else {}
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.double().float()):
        assert type(other) is kind
        assert_same(other, theirs, "eval", inputs, kwargs)


@pytest.mark.parametrize("name", MODULES)
def test_checkpoint_and_functional_call(name):
    kind, torchs, args = MODULES[name]
    _, ours = pair(kind, torchs, *args)
    inputs = (torch.randn(LENGTH, BATCH, SIZE),) * (3 if name == "attention" else 1)
    kwargs = {"need_weights": False} if name == "attention" else {}
    parameters = dict(ours.named_parameters())

    def gradients(call):
        return torch.autograd.grad(outputs(call())[0].square().sum(), list(parameters.values()))

    plain = gradients(lambda: ours(*inputs, **kwargs))
    again = gradients(lambda: checkpoint(ours, *inputs, use_reentrant=False, **kwargs))
    called = gradients(lambda: torch.func.functional_call(ours, parameters, inputs, kwargs))
    for x, y, z in zip(plain, again, called, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_backend_of_a_module():
    module = nn.MultiheadAttention(SIZE, HEADS, dropout=0.1)
    x = torch.randn(LENGTH, BATCH, SIZE)
    module.backend = "triton"
    with pytest.raises(ops.BackendUnavailableError):
        module(x, x, x, need_weights=False)


@pytest.mark.parametrize("shape", [8, (8,), (5, 8)], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"eps": 1e-3}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(dtype, kwargs, shape):
    theirs, ours = pair(nn.RMSNorm, torch.nn.RMSNorm, shape, dtype=dtype, **kwargs)
    for x in (torch.randn(2, 5, 8, dtype=dtype), torch.zeros(1, 5, 8, dtype=dtype), torch.zeros(0, 5, 8, dtype=dtype)):
        assert_same(
            ours, theirs, "eval", (x,), {}, {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]
        )
