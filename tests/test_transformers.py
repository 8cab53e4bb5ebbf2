"""The models of transformers give the same with ours as their attention, padding and caches included."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs the transformers extra")

import tiny_transformers as tiny
import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from diffusion_runtime.integrations import transformers as bridge

NAME = bridge.NAME


@pytest.fixture(autouse=True)
def _registered():
    bridge.register()
    yield
    bridge.unregister()


def both(name: str, **changes):
    """The model by transformers' own attention and by ours, of the same weights."""
    return tiny.make(name, "eager", **changes), tiny.make(name, NAME, **changes)


def padding(side: str | None) -> dict[str, torch.Tensor]:
    return {} if side is None else {"attention_mask": tiny.padding_mask(side)}


def assert_same(got: torch.Tensor, expected: torch.Tensor, real: torch.Tensor | None = None) -> None:
    if real is not None:
        got, expected = got[real.bool()], expected[real.bool()]
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_outputs(name, side):
    before, after = both(name)
    inputs = {"input_ids": tiny.tokens()} | padding(side)
    expected = tiny.run(before, **inputs)
    assert_same(tiny.run(after, **inputs), expected, inputs.get("attention_mask"))
    other = tiny.run(before, input_ids=tiny.tokens().flip(0), **padding(side))
    assert (expected - other).abs().max() > 1e-2, "attention makes no difference here"


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_token_of_padding(name):
    for place in (0, tiny.LENGTH - 1):
        mask = torch.ones(tiny.BATCH, tiny.LENGTH, dtype=torch.int64)
        mask[1, place] = 0
        expected, got = (tiny.run(model, input_ids=tiny.tokens(), attention_mask=mask) for model in both(name))
        assert_same(got, expected, mask)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_generates_the_same_tokens(name, cache):
    before, after = both(name)
    inputs = {"input_ids": tiny.tokens(), "attention_mask": tiny.padding_mask("left")}
    settings = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    assert torch.equal(after.generate(**inputs, **settings), before.generate(**inputs, **settings))


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gemma2", "gpt_oss"])
def test_gradients(name):
    found = []
    for model in both(name):
        model.train()
        out = tiny.run(model, input_ids=tiny.tokens(), **padding("right"))[tiny.padding_mask("right").bool()]
        # not its mean square, which a last norm makes constant
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(6))).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    before, after = found
    assert before.keys() == after.keys()
    largest = max(float(gradient.abs().max()) for gradient in before.values())
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=2e-3, atol=1e-5 * largest, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_no_mask_is_written_where_a_rule_says_it(name, side, monkeypatch):
    from diffusion_runtime.integrations import _transformers_attention, _transformers_masks

    def write_rule(*_):
        raise AssertionError("a mask tensor was made")

    for module in (_transformers_attention, _transformers_masks):
        monkeypatch.setattr(module, "write_rule", write_rule)
    monkeypatch.setattr(_transformers_masks.masking_utils, "sdpa_mask", write_rule)
    tiny.run(tiny.make(name, NAME), input_ids=tiny.tokens(), **padding(side))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_masks_that_are_no_rule(name):
    before, after = both(name)
    tokens, length = tiny.tokens(), tiny.LENGTH
    holes = torch.ones(tiny.BATCH, length, dtype=torch.int64)
    holes[1, 3:5] = 0
    assert_same(
        tiny.run(after, input_ids=tokens, attention_mask=holes),
        tiny.run(before, input_ids=tokens, attention_mask=holes),
        holes,
    )
    packed = torch.cat((torch.arange(5), torch.arange(length - 5))).expand(tiny.BATCH, -1)
    got, expected = (tiny.run(model, input_ids=tokens, position_ids=packed) for model in (after, before))
    assert_same(got, expected)
    seen = torch.rand(tiny.BATCH, 1, length, length, generator=torch.Generator().manual_seed(3)) < 0.5
    seen |= torch.eye(length, dtype=torch.bool)
    own = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    got, expected = (tiny.run(model, input_ids=tokens, attention_mask=own) for model in (after, before))
    assert_same(got, expected)


def test_half_precision():
    inputs = {"input_ids": tiny.tokens()} | padding("left")
    real = inputs["attention_mask"].bool()
    truth = tiny.run(tiny.make("gemma2", "eager", torch.bfloat16).float(), **inputs)[real]
    error = {}
    for kind in ("eager", NAME):
        error[kind] = (tiny.run(tiny.make("gemma2", kind, torch.bfloat16), **inputs)[real].float() - truth).abs().mean()
    assert error[NAME] <= 1.5 * error["eager"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiles_whole(name):
    model = tiny.make(name, NAME)
    inputs = {"input_ids": tiny.tokens()}
    expected = tiny.run(model, **inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(tiny.run(compiled, **inputs), expected)


def test_dropout_is_torchs():
    before, after = (tiny.make("llama", kind, attention_dropout=0.5).train() for kind in ("sdpa", NAME))
    found = []
    for model in (before, after):
        torch.manual_seed(7)
        found.append(tiny.run(model, input_ids=tiny.tokens()))
    assert_same(found[1], found[0])
    with pytest.raises(ValueError, match="cannot train Gemma2Attention with dropout and softcap"):
        tiny.run(tiny.make("gemma2", NAME, attention_dropout=0.5).train(), input_ids=tiny.tokens())


def test_refuses_models_that_compute_attention_themselves():
    config = transformers.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=1, n_head=2, bos_token_id=1)
    model = transformers.BloomModel._from_config(config, attn_implementation=NAME)
    with pytest.raises(ValueError, match="cannot run bloom: its layers compute attention themselves"):
        model(tiny.tokens())


def test_refuses_by_name():
    model = tiny.make("llama", NAME)
    with pytest.raises(ValueError, match=r"cannot run LlamaAttention with output_attentions"):
        model(tiny.tokens(), output_attentions=True)


def test_a_backend_by_name_and_another_one_later():
    model = tiny.make("llama", NAME)
    expected = tiny.run(model, input_ids=tiny.tokens())
    bridge.register(backend="reference")
    assert_same(tiny.run(model, input_ids=tiny.tokens()), expected)
    bridge.register(backend="cuda")
    with pytest.raises(RuntimeError, match="cuda"):
        tiny.run(model, input_ids=tiny.tokens())
    with pytest.raises(ValueError, match="backend must be None"):
        bridge.register(backend="fastest")


def test_unregister():
    bridge.unregister()
    bridge.unregister()
    assert NAME not in AttentionInterface.valid_keys(AttentionInterface())
    assert NAME not in AttentionMaskInterface.valid_keys(AttentionMaskInterface())


def test_transformers_is_imported_only_when_asked_for():
    code = "import sys, diffusion_runtime.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
