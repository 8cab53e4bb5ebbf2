"""The layers of a decoder in one call: what their modules compute, row by row, and only where it is the same thing."""

from __future__ import annotations

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from backends import instruction_set
from families import MASK
from models import CONFIG, random_llada
from torch import nn

from diffusion_runtime import Denoiser
from diffusion_runtime.nn import AttentionContext
from diffusion_runtime.nn import decoder_layers as one_call
from diffusion_runtime.ops import BlockCausal, _decoder_layers, _products
from diffusion_runtime.testing import assert_as_accurate, poisoned_memory

NORM = torch.ones(CONFIG.d_model)
SETS = ["avx512", "avx2", "portable"]
DENSE = ["SDAR", "Dream", "Fast-dLLM v2", "LLaDA"]  # with norms of heads, with biases twice, with neither


def tokens_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, MASK, (batch, length), generator=torch.Generator().manual_seed(length))


def modules_alone():
    """The modules are called one by one."""
    return patch.object(one_call, "in_one_call", lambda *_: None)


def by_modules(model, tokens, context=None) -> torch.Tensor:
    with modules_alone(), torch.no_grad():
        return model.hidden(tokens, context)


@pytest.fixture(autouse=True)
def _needs_cpp():
    pytest.importorskip("diffusion_runtime._C")


@pytest.fixture
def calls():
    """How often the layers were run in one call."""
    with patch.object(one_call, "decoder_layers", wraps=one_call.decoder_layers) as counted:
        yield counted


@pytest.mark.parametrize("wanted", SETS)
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 5), (1, 32), (3, 41)])
def test_the_same_states_as_by_modules(wanted, name, batch, length, model_of, calls):
    model, tokens = model_of(name), tokens_of(batch, length)
    expected = by_modules(model, tokens)
    with instruction_set(wanted), poisoned_memory():
        got = model.hidden(tokens)
    assert calls.call_count == 1
    truth = by_modules(deepcopy(model).double(), tokens)
    assert_as_accurate(got, expected, truth)


@pytest.mark.parametrize("context", ["lengths", "mask", "both"])
def test_masks_and_lengths_hold(context, model_of, calls):
    model, tokens = model_of("SDAR"), tokens_of(3, 19)
    mask = None if context == "lengths" else BlockCausal(4)
    lengths = None if context == "mask" else torch.tensor([19, 7, 1])
    given = AttentionContext(mask, lengths)
    got, expected = model.hidden(tokens, given), by_modules(model, tokens, given)
    assert calls.call_count == 1
    for i, length in enumerate([19] * 3 if lengths is None else lengths.tolist()):
        torch.testing.assert_close(got[i, :length], expected[i, :length], rtol=1e-5, atol=1e-5)
    other = AttentionContext(None, torch.tensor([19, 19, 19]))
    assert not torch.allclose(got, model.hidden(tokens, other), atol=1e-3)


@pytest.mark.parametrize("wanted", SETS)
def test_a_row_does_not_depend_on_the_rows_beside_it(wanted, model_of):
    """To the bit: in a batch and alone, and where the same keys are seen from fewer rows."""
    model, tokens = model_of("SDAR"), tokens_of(5, 24)
    with instruction_set(wanted):
        together = model.hidden(tokens)
        for i in range(5):
            assert torch.equal(model.hidden(tokens[i : i + 1]), together[i : i + 1])
        assert torch.equal(model.hidden(tokens[:, :12]), together[:, :12])  # later blocks are not seen


@pytest.mark.parametrize(("name", "cache"), [("SDAR", "block"), ("Dream", "prefix"), ("LLaDA", "dual")])
def test_caches_are_written_and_read_as_by_modules(name, cache, model_of, calls):
    model, prompt = model_of(name), tokens_of(2, 70)
    blocks = {} if cache == "block" else {"block_length": 16, "num_steps": 12}
    denoiser = Denoiser(model, cache=cache, **blocks)
    got = list(denoiser.stream(prompt, max_new_tokens=48))
    assert calls.call_count >= len(got)
    with modules_alone():
        expected = list(denoiser.stream(prompt, max_new_tokens=48))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.samples.logsumexp, b.samples.logsumexp, rtol=1e-5, atol=2e-5)


def test_changed_weights_are_read(model_of):
    model, tokens = deepcopy(model_of("SDAR")), tokens_of(1, 8)
    before = model.hidden(tokens)
    model.model["layers"][1].mlp.up_proj.weight.data.mul_(2)  # which no version counter tells of
    changed = model.hidden(tokens)
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(changed, by_modules(model, tokens), rtol=1e-5, atol=1e-5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hook(layer):
    layer.self_attn.o_proj.register_forward_hook(lambda module, arguments, out: 2 * out)


def _hook_around(layer):
    layer.mlp.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))


def _replaced(layer):
    layer.mlp.gate_proj.__class__ = Doubled


def _patched(layer):
    plain = layer.post_attention_layernorm.forward
    layer.post_attention_layernorm.forward = lambda x: 2 * plain(x)


def _biased(layer):
    layer.self_attn.o_proj.bias = nn.Parameter(torch.ones(layer.self_attn.o_proj.out_features), requires_grad=False)


def _eps(layer):
    layer.input_layernorm.eps = 1.0


def _last_norm(norm):
    norm.register_forward_hook(lambda module, arguments, out: 2 * out)


@pytest.mark.parametrize("change", [_hook, _hook_around, _replaced, _patched, _biased, _eps, _last_norm])
def test_whoever_changes_a_module_is_heard(change, model_of, calls):
    model, tokens = deepcopy(model_of("SDAR")), tokens_of(1, 8)
    before = model.hidden(tokens)
    calls.reset_mock()
    change(model.model["norm"] if change is _last_norm else model.model["layers"][1])
    assert torch.equal(model.hidden(tokens), by_modules(model, tokens))
    assert calls.call_count == 0
    assert not torch.allclose(model.hidden(tokens), before)


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *others):
        return 2 * self.layer(x, *others)


@pytest.mark.parametrize("inherits", [False, True])
@pytest.mark.parametrize("name", ["SDAR", "LLaDA"])
def test_layers_of_another_class_are_called(name, inherits, model_of, calls):
    model, tokens = deepcopy(model_of(name)), tokens_of(1, 8)
    before = model.hidden(tokens)
    calls.reset_mock()
    layers = model.model["layers"] if name == "SDAR" else model.model["transformer"]["blocks"]
    if inherits:
        plain = type(layers[0])
        layers[0].__class__ = type(
            "Doubled", (plain,), {"forward": lambda self, *given: 2 * plain.forward(self, *given)}
        )
    else:
        layers[0] = Wrapped(layers[0])
    assert not torch.allclose(model.hidden(tokens), before)
    assert calls.call_count == 0


def test_gradients_other_dtypes_and_autocast_go_by_modules(model_of, calls):
    model, tokens = deepcopy(model_of("SDAR")), tokens_of(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(tokens)
    model.to(torch.bfloat16).hidden(tokens)
    model.float().requires_grad_(True).hidden(tokens).sum().backward()
    assert model.model["layers"][0].mlp.up_proj.weight.grad is not None
    model.zero_grad()
    with nn.modules.module.register_module_forward_hook(lambda module, arguments, out: None), torch.no_grad():
        model.hidden(tokens)
    assert calls.call_count == 0
    model.requires_grad_(False).hidden(tokens)
    assert calls.call_count == 1


def test_experts_and_contexts_of_other_kinds_go_by_modules(model_of, calls):
    class Own(AttentionContext):
        def attend(self, layer, query, key, value):
            return torch.zeros_like(query)

    tokens = tokens_of(1, 8)
    model_of("SDAR-MoE").hidden(tokens)
    model_of("SDAR").hidden(tokens, Own())
    model_of("SDAR").hidden(tokens, AttentionContext(torch.ones(8, 8, dtype=torch.bool)))
    assert calls.call_count == 0


@pytest.mark.parametrize("wanted", SETS)
@pytest.mark.parametrize(("rows", "columns", "depth"), [
    (0, 5, 3), (1, 1, 1), (2, 3, 7), (5, 4, 8), (6, 33, 16), (7, 65, 40), (19, 31, 70), (40, 130, 200),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_any_shape(wanted, rows, columns, depth, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, depth, generator=generator), torch.randn(columns, depth, generator=generator)
    added = torch.randn(columns, generator=generator) if bias else None
    with instruction_set(wanted), poisoned_memory():
        got = _products.head_product(weight)(x, weight, added)
        alone = [_products.head_product(weight)(x[i : i + 1], weight, added) for i in range(rows)]
    truth = nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    assert_as_accurate(got, nn.functional.linear(x, weight, added), truth)
    assert all(torch.equal(one[0], row) for one, row in zip(alone, got, strict=True))


def test_extremes_pass_through_a_product():
    weight, x = torch.eye(9), torch.zeros(4, 9)
    x[0], x[1, 3], x[2, 8] = torch.finfo(torch.float32).max, torch.nan, torch.inf
    got = _products.head_product(weight)(x, weight, None)
    torch.testing.assert_close(got, nn.functional.linear(x, weight), equal_nan=True)


def _layer(model):
    parts = model.model["transformer"]["blocks"][0].parts()
    return one_call._weights_of(parts, set())


@pytest.mark.parametrize(("name", "value"), [
    ("places", torch.tensor([0, 1, 2, 4])), ("places", torch.tensor([0, -1, 2, 3])), ("places", torch.arange(3)),
    ("kept", torch.tensor([5])), ("kept", torch.tensor([-1])), ("kept", torch.tensor([1, 1])),
    ("table", torch.tensor([[1]], dtype=torch.int32)), ("table", torch.tensor([[-1]], dtype=torch.int32)),
    ("table", None), ("pool", None), ("pool", torch.zeros(2, 2, 1, 4, 2, 16)), ("lengths", torch.tensor([5])),
])  # fmt: skip
def test_what_is_outside_of_a_pool_is_an_error(name, value):
    model = random_llada()
    pool = torch.zeros(1, 2, 1, 4, 2, 16)
    given = {
        "pool": pool,
        "places": torch.arange(4),
        "kept": torch.tensor([4]),
        "table": torch.zeros(1, 1, dtype=torch.int32),
    }
    keys = _decoder_layers.LayerKeys(**{**given, name: value})
    x, table = torch.randn(1, 4, CONFIG.d_model), torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"decoder_layers|lengths"):
        _decoder_layers.decoder_layers(x, [_layer(model)], NORM, keys, 16, 1e-5, (table, table))
    assert not pool.any()
    fine = _decoder_layers.LayerKeys(**given)
    assert _decoder_layers.decoder_layers(x, [_layer(model)], NORM, fine, 16, 1e-5, (table, table)).isfinite().all()
    assert pool.any()


def test_weights_that_do_not_fit_are_an_error():
    layer = _layer(random_llada())
    x, table = torch.randn(1, 4, CONFIG.d_model), torch.ones(4, 8)
    wrong = [
        layer._replace(key=layer.key[:-1]), layer._replace(up=layer.up[1:]), layer._replace(norm=layer.norm[1:]),
        layer._replace(query_norm=torch.ones(16)), layer._replace(down=None), layer._replace(gate=layer.gate.half()),
    ]  # fmt: skip
    for one in wrong:
        with pytest.raises(ValueError, match=r"decoder_layers|kernel cannot view"):
            _decoder_layers.decoder_layers(x, [layer, one], NORM, _decoder_layers.LayerKeys(), 16, 1e-5, (table, table))
    with pytest.raises(ValueError, match="the last norm"):
        _decoder_layers.decoder_layers(x, [layer], NORM[1:], _decoder_layers.LayerKeys(), 16, 1e-5, (table, table))
    with pytest.raises(ValueError, match="cos"):
        _decoder_layers.decoder_layers(x, [layer], NORM, _decoder_layers.LayerKeys(), 16, 1e-5, (table[:3], table[:3]))
