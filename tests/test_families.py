"""Every family's released format and forward, against one written out plainly."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, MASK, VOCAB, Family, random_weights, write_checkpoint

from diffusion_runtime import load, models
from diffusion_runtime.nn import AttentionContext


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


def test_a_released_checkpoint_gives_the_published_logits(family, tmp_path):
    weights = random_weights(family)
    model = load(write_checkpoint(tmp_path, family, weights))
    tokens = torch.randint(0, VOCAB, (2, 37))
    expected = torch.stack([family.logits(weights, row) for row in tokens])
    assert expected.std() > 0.3  # logits that say something
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert model.mask_token_id == MASK


def test_padding_on_the_right_is_not_seen(family, tmp_path):
    model = load(write_checkpoint(tmp_path, family, random_weights(family)))
    tokens = torch.randint(0, VOCAB, (2, 21))
    whole = model.whole_sequences()
    context = AttentionContext(whole.mask, torch.tensor([9, 21]))
    got = model.hidden(tokens, context)
    torch.testing.assert_close(got[:1, :9], model.hidden(tokens[:1, :9]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], model.hidden(tokens)[1], rtol=1e-5, atol=1e-5)


def test_dtypes_and_what_is_loaded(family, tmp_path):
    model = load(write_checkpoint(tmp_path, family, random_weights(family)), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} <= {torch.float32}  # the router's bias stays as precise as it was
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    logits = model(torch.randint(0, VOCAB, (1, 9)))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_the_noise_level_of_a_time_conditioned_checkpoint(tmp_path):
    family = FAMILIES["MDLM with time conditioning"]
    weights = random_weights(family)
    model = load(write_checkpoint(tmp_path, family, weights))
    tokens, sigma = torch.randint(0, VOCAB, (2, 11)), torch.tensor([0.2, 3.0])
    expected = [family.logits(weights, row, sigma=float(s)) for row, s in zip(tokens, sigma, strict=True)]
    got = torch.nn.functional.linear(model.hidden(tokens, sigma=sigma), *model.head)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert (got[0] - model(tokens)[0]).abs().max() > 0.1


def test_a_noise_level_is_refused_where_none_was_trained(tmp_path):
    family = FAMILIES["MDLM"]
    model = load(write_checkpoint(tmp_path, family, random_weights(family)))
    with pytest.raises(ValueError, match="trained without time conditioning"):
        model.hidden(torch.zeros(1, 3, dtype=torch.int64), sigma=torch.zeros(1))


def test_shifted_families_say_so():
    shifted = {name for name in models.MODELS if models.family_of({"model_type": name})[0].shifted}
    assert shifted == {"Dream", "Fast_dLLM_Qwen"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Dream", {"rope_scaling": {"type": "yarn"}}, r"asks for rope_scaling=\{'type': 'yarn'\}; only None"),
        ("Dream", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("Dream", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "asks for rope_parameters="),
        ("Dream", {"layer_types": ["sliding_attention"]}, r"asks for layers of \['sliding_attention'\]"),
        ("Dream", {"logit_softcap": 30}, "Dream config has an unknown key 'logit_softcap'"),
        ("Dream", {"mask_token_id": VOCAB}, f"mask_token_id {VOCAB} is outside"),
        ("Dream", {"num_key_value_heads": 3}, "4 heads, 3 key heads"),
        ("Dream", {"hidden_size": 33}, "hidden_size must be a multiple"),
        ("SDAR", {"attention_bias": True}, "attention_bias=True"),
        ("SDAR", {"block_size": 0}, "block_size must be positive, got 0"),
        ("SDAR-MoE", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]; only \[\] or None is implemented"),
        ("LLaDA-MoE", {"moe_layer_freq": [0, 1]}, "layers without experts"),
        ("LLaDA-MoE", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
        ("LLaDA2", {"norm_head": True}, "norm_head=True"),
        ("LLaDA2", {"score_function": "softmax"}, "score_function='softmax'"),
        ("LLaDA2", {"n_group": 3}, "num_experts must be a multiple of n_group"),
        ("LLaDA2", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must leave an even number"),
        ("BD3LM", {"causal": True}, "causal=True"),
        ("MDLM", {"n_heads": 5}, "hidden_dim must be a multiple of n_heads"),
        ("MDLM", {"model_type": "mdlm2"}, "unknown model_type 'mdlm2'; known are Dream, "),
    ],
)  # fmt: skip
def test_a_config_that_would_change_the_mathematics(name, change, message, tmp_path):
    family = FAMILIES[name]
    family = family._replace(config=family.config | change)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load(write_checkpoint(tmp_path, family, random_weights(family)))


def test_what_transformers_5_writes_is_read(tmp_path):
    family = FAMILIES["Dream"]
    config = {name: value for name, value in family.config.items() if name not in ("rope_theta", "rope_scaling")}
    newer = family._replace(config=config | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})
    weights = random_weights(family)
    tokens = torch.randint(0, VOCAB, (1, 7))
    got = load(write_checkpoint(tmp_path, newer, weights))(tokens)
    torch.testing.assert_close(got[0], family.logits(weights, tokens[0]), rtol=1e-5, atol=1e-5)


def test_an_expert_of_another_size_or_missing(tmp_path):
    family = FAMILIES["LLaDA2"]
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    weights = random_weights(family)
    with pytest.raises(ValueError, match=rf"{name} must be \(24, 32\), got \(24, 31\)"):
        load(write_checkpoint(tmp_path, family, weights | {name: torch.zeros(24, 31)}))
    del weights[name]
    with pytest.raises(ValueError, match=f"1 tensors are missing, the first {name}"):
        load(write_checkpoint(tmp_path, family, weights))


def test_a_family_of_ones_own(tmp_path, monkeypatch):
    """As docs/models.md shows it."""
    monkeypatch.setitem(models.MODELS, "my_dream", (models.Dream, models.DreamConfig))
    family = FAMILIES["Dream"]
    family = family._replace(config=family.config | {"model_type": "my_dream"})
    assert isinstance(load(write_checkpoint(tmp_path, family, random_weights(family))), models.Dream)
