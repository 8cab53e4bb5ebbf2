"""LLaDA's architecture against one written out plainly here, and its config against what it cannot express."""

from __future__ import annotations

import pytest
import torch
from models import CONFIG, random_llada

from diffusion_runtime.models import LLaDA, LLaDAConfig

RELEASED = {  # config.json of GSAI-ML/LLaDA-8B-Instruct, as far as it describes the model
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


def plain_llada(model: LLaDA, tokens: torch.Tensor) -> torch.Tensor:
    """The published equations on the same weights, one head and one position pair at a time."""
    config, weights = model.config, model.state_dict()

    def w(name: str) -> torch.Tensor:
        return weights[f"model.transformer.{name}.weight"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w(name)

    def rotate(x: torch.Tensor) -> torch.Tensor:  # as complex numbers, element i with element i + head_dim / 2
        length, dim = x.shape
        angle = torch.arange(length)[:, None] * config.rope_theta ** (-torch.arange(0, dim, 2) / dim)
        turned = torch.complex(x[:, : dim // 2], x[:, dim // 2 :]) * torch.polar(torch.ones_like(angle), angle).to(
            torch.complex128
        )
        return torch.cat((turned.real, turned.imag), -1)

    size = config.d_model // config.n_heads
    group = config.n_heads // (config.n_kv_heads or config.n_heads)
    rows = []
    for row in tokens:
        x = w("wte")[row]
        for layer in range(config.n_layers):
            name = f"blocks.{layer}."
            h = norm(x, name + "attn_norm")
            q, k, v = (h @ w(name + p).T for p in ("q_proj", "k_proj", "v_proj"))
            heads = []
            for i in range(config.n_heads):
                own, shared = slice(i * size, (i + 1) * size), slice(i // group * size, (i // group + 1) * size)
                scores = rotate(q[:, own]) @ rotate(k[:, shared]).T / size**0.5
                heads.append(scores.softmax(-1) @ v[:, shared])
            x = x + torch.cat(heads, -1) @ w(name + "attn_out").T
            h = norm(x, name + "ff_norm")
            gate = h @ w(name + "ff_proj").T
            x = x + (gate * gate.sigmoid() * (h @ w(name + "up_proj").T)) @ w(name + "ff_out").T
        rows.append(norm(x, "ln_f") @ w("ff_out").T)
    return torch.stack(rows)


def test_the_published_equations():
    model = random_llada(scale=1.5).double()
    tokens = torch.randint(0, 61, (2, 13))
    torch.testing.assert_close(model(tokens), plain_llada(model, tokens), rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_close():
    model, tokens = random_llada(scale=1.0), torch.randint(0, 61, (2, 13))
    expected = model(tokens)
    got = model.bfloat16()(tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.03


def test_a_tied_head_uses_the_embedding():
    model = LLaDA(LLaDAConfig(32, 1, 2, 48, 11, 10, weight_tying=True))
    assert "model.transformer.ff_out.weight" not in model.state_dict()
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 11)


def test_a_padded_embedding_gives_no_logits_past_the_vocabulary():
    model = LLaDA(LLaDAConfig(32, 1, 2, 48, 11, 10, embedding_size=16))
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 11)


def test_the_released_config_and_names():
    config = LLaDAConfig.from_dict(RELEASED)
    assert (config.d_model, config.n_layers, config.mask_token_id) == (4096, 32, 126336)
    with torch.device("meta"):
        names = {name: tuple(x.shape) for name, x in LLaDA(config).state_dict().items()}
    assert len(names) == 32 * 9 + 3
    assert names["model.transformer.wte.weight"] == names["model.transformer.ff_out.weight"] == (126464, 4096)
    assert names["model.transformer.ln_f.weight"] == (4096,)
    block = "model.transformer.blocks.31."
    for name in ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"):
        assert f"{block}{name}.weight" in names
    assert names[f"{block}ff_out.weight"] == (4096, 12288)
    assert sum(torch.Size(shape).numel() for shape in names.values()) == 8_015_581_184  # the 8B of the name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": True}, "asks for alibi=True; only False is implemented"),
        ({"layer_norm_type": "default"}, "layer_norm_type='default'"),
        ({"include_qkv_bias": True}, "include_qkv_bias=True"),
        ({"sliding_window": 12}, "unknown key 'sliding_window'"),
        ({"n_heads": 33}, "d_model must be n_heads times an even head size"),
        ({"n_kv_heads": 5}, "n_kv_heads must divide n_heads"),
        ({"mask_token_id": 126464}, "mask_token_id 126464 is outside"),
    ],
)
def test_a_config_that_would_change_the_mathematics(change, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(RELEASED | change)


def test_a_config_that_lacks_keys():
    with pytest.raises(ValueError, match="lacks d_model, mask_token_id"):
        LLaDAConfig.from_dict({k: v for k, v in RELEASED.items() if k not in ("d_model", "mask_token_id")})


def test_grouped_heads_are_used():
    assert random_llada().state_dict()["model.transformer.blocks.0.k_proj.weight"].shape == (32, CONFIG.d_model)


def test_compiles_without_a_graph_break():
    model, tokens = random_llada(), torch.randint(0, 61, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))
