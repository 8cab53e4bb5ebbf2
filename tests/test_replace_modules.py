"""replace_modules: what it swaps, what it leaves and why, what stays as it was."""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
from module_cases import BATCH, HEADS, LENGTH, SIZE, assert_same, results
from torch.nn.utils import parametrize

from diffusion_runtime import nn, ops
from diffusion_runtime.ops import _attention, _attention_library

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")


def _encoder(**kwargs):
    layer = torch.nn.TransformerEncoderLayer(SIZE, HEADS, 16, dropout=0.3, batch_first=True, **kwargs)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=not kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("lengths", [None, [5, 3, 1]], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_an_encoder_gives_the_same_before_and_after(mode, lengths, kwargs):
    model = _encoder(**kwargs)
    before = copy.deepcopy(model)
    report = nn.replace_modules(model)
    assert sorted(report.swapped) == ["layers.0", "layers.0.self_attn", "layers.1", "layers.1.self_attn"]
    padding = None if lengths is None else torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]
    x = torch.randn(BATCH, LENGTH, SIZE)
    with patch.object(_attention, "run_attention", side_effect=_attention.run_attention) as attention:
        results(model, "no_grad", (x,), {"src_key_padding_mask": padding})
    assert attention.call_count == 2
    assert_same(model, before, mode, (x,), {"src_key_padding_mask": padding})


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_a_whole_transformer(mode):
    model = torch.nn.Transformer(SIZE, HEADS, 1, 2, 16, dropout=0.2, batch_first=True)
    before = copy.deepcopy(model)
    report = nn.replace_modules(model)
    assert len(report.swapped) == 2 + 4  # the decoder layers stay torch's, with our attention in them
    assert not report.left
    kwargs = {"tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(LENGTH), "tgt_is_causal": True}
    inputs = (torch.randn(BATCH, 7, SIZE), torch.randn(BATCH, LENGTH, SIZE))
    assert_same(model, before, mode, inputs, kwargs)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(SIZE)
        self.attention = torch.nn.MultiheadAttention(SIZE, HEADS)
        self.again = self.attention
        self.linear = torch.nn.Linear(SIZE, SIZE)

    def forward(self, x):
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.linear(x + self.again(x, x, x, need_weights=False)[0])


def test_everything_else_stays():
    model = Model()
    calls = []
    model.attention.register_forward_hook(lambda *_: calls.append("after"))
    model.norm.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.norm.weight.requires_grad_(False)
    model.attention.eval()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr=0.5)
    report = nn.replace_modules(model)
    assert list(report.swapped) == ["norm", "attention", "again"]
    assert model.again is model.attention
    assert all(x is y for x, y in zip(modules.values(), model.modules(), strict=True))
    assert all(x is y for x, y in zip(parameters.values(), model.parameters(), strict=True))
    assert (model.norm.training, model.attention.training) == (True, False)
    assert not model.norm.weight.requires_grad
    weight = model.attention.in_proj_weight.clone()
    model(torch.randn(LENGTH, BATCH, SIZE)).sum().backward()
    assert calls == ["before", "after", "after"]
    optimizer.step()
    assert not torch.equal(model.attention.in_proj_weight, weight)


def test_undo_and_once_more():
    model = Model()
    kinds = [type(x) for x in model.modules()]
    report = nn.replace_modules(model, backend="reference")
    assert not nn.replace_modules(model).swapped
    assert [type(x) for x in model.modules()] == [Model, nn.RMSNorm, nn.MultiheadAttention, *kinds[3:]]
    assert model.attention.backend == "reference"
    report.undo()
    report.undo()
    assert [type(x) for x in model.modules()] == kinds
    assert "backend" not in vars(model.attention)
    assert len(nn.replace_modules(model).swapped) == 3


def test_the_model_itself():
    model = torch.nn.MultiheadAttention(SIZE, HEADS)
    report = nn.replace_modules(model)
    assert type(model) is nn.MultiheadAttention
    assert report.swapped[""] is model
    assert str(report) == "(the model): MultiheadAttention"
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got list"):
        nn.replace_modules([model])


class OwnAttention(torch.nn.MultiheadAttention):
    pass


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def _parametrized():
    module = torch.nn.RMSNorm(SIZE)
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


def _wrapped():
    module = torch.nn.MultiheadAttention(SIZE, HEADS)
    module.forward = module.forward
    return module


def _adapted(attribute, module):
    setattr(module, attribute, torch.nn.Sequential(getattr(module, attribute)))
    return module


def _with_own_attention():
    layer = torch.nn.TransformerEncoderLayer(SIZE, HEADS, 16)
    layer.self_attn = OwnAttention(SIZE, HEADS)
    return layer


LEFT = {
    "subclass": (lambda: OwnAttention(SIZE, HEADS), r"is a subclass, .*OwnAttention"),
    "parametrized": (_parametrized, "is parametrized"),
    "forward": (_wrapped, "its forward was replaced"),
    "out_proj": (
        lambda: _adapted("out_proj", torch.nn.MultiheadAttention(SIZE, HEADS)),
        "its out_proj is a torch.nn.modules.container.Sequential",
    ),
    "linear1": (
        lambda: _adapted("linear1", torch.nn.TransformerEncoderLayer(SIZE, HEADS, 16)),
        "its linear1 is a torch.nn.modules.container.Sequential",
    ),
    "self_attn": (_with_own_attention, "its self_attn is a subclass"),
    "quantized": (lambda: torch.ao.nn.quantizable.MultiheadAttention(SIZE, HEADS), "is a subclass, torch.ao.nn"),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_leaves_with_a_reason(make, reason):
    model = torch.nn.Sequential(make(), torch.nn.RMSNorm(SIZE))
    kind = type(model[0])
    report = nn.replace_modules(model)
    assert type(model[0]) is kind
    assert "1" in report.swapped
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.left["0"])
    assert f"0: left, {report.left['0']}" in str(report)


def test_skip():
    model = Model()
    report = nn.replace_modules(model, skip=lambda name, module: isinstance(module, torch.nn.RMSNorm))
    assert report.left == {"norm": "skip said so"}
    assert list(report.swapped) == ["attention", "again"]


def test_a_named_backend_is_asked():
    model = torch.nn.TransformerEncoderLayer(SIZE, HEADS, 16, dropout=0.0)
    nn.replace_modules(model, backend="triton")
    with (
        patch.object(_attention, "run_attention", side_effect=_attention.run_attention) as attention,
        suppress(ops.BackendUnavailableError),
    ):
        model(torch.randn(LENGTH, BATCH, SIZE))
    assert attention.call_args.args[1] == "triton"


def test_copies_pickles_and_compiles():
    model = Model()
    x = torch.randn(LENGTH, BATCH, SIZE)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(x)
    nn.replace_modules(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), compiled):
        with patch.object(_attention_library, "run_backend", side_effect=_attention_library.run_backend) as run:
            torch.testing.assert_close(other(x), expected)
        assert run.call_count == 2  # a graph that was compiled before is compiled again
    other = copy.deepcopy(model)
    assert other.again is other.attention
    assert type(other.attention) is nn.MultiheadAttention
