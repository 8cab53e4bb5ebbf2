"""The code in docs/ does what the text around it says: each block is run, beside the formulas it replaces."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_draws import z_score

from diffusion_runtime import ops
from diffusion_runtime.decoding import POLICIES

DOCS = Path(__file__).resolve().parents[1] / "docs"


def functions(page: str) -> SimpleNamespace:
    """Everything that the ```python blocks of a page define."""
    names = {"torch": torch}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(block, names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("vocab", [100, 1000, 128 * 9])
def test_a_draw_by_hand(backend, vocab):
    draw = functions("randomness.md").draw
    logits = np.linspace(-4, 4, vocab)
    for seed, position, step, temperature in ((77, 12, 3, 0.8), (2**63 + 5, 2**31 + 1, 0, 1.0), (0, 0, 9, 2.5)):
        settings = {"temperature": temperature, "seed": seed, "position": torch.tensor(position), "step": step}
        got = ops.sample_tokens(torch.tensor(logits).float(), backend=backend, **settings).token.item()
        assert got == draw(logits, seed, position, step, temperature)


def counts_of(tokens: torch.Tensor, vocab: int) -> np.ndarray:
    return torch.bincount(tokens.flatten(), minlength=vocab).numpy()


def follows(tokens: torch.Tensor, probability: torch.Tensor) -> bool:
    p = probability.double().numpy()
    counts = counts_of(tokens, len(p))
    return counts[p == 0].sum() == 0 and abs(z_score(counts[p > 0], p[p > 0] * counts.sum())) < 4


def test_llada():
    page = functions("drop_in.md")
    logits = (torch.randn(30) * 2).expand(4, 5000, 30)
    x = torch.full((4, 5000), 29)
    mask_index = torch.arange(5000).expand(4, -1) % 4 != 0
    seeds = torch.arange(4)[:, None]
    x0, confidence = page.llada_step(logits, x, mask_index, 0.7, seeds, 3)
    assert torch.equal(x0[~mask_index], x[~mask_index])
    assert (confidence[~mask_index] == -math.inf).all()
    torch.testing.assert_close(confidence[mask_index], logits[0, 0].softmax(-1)[x0[mask_index]])
    # exp(z) / (-log u)^T, the published noise, draws from softmax(z / T)
    assert follows(x0[mask_index], (logits[0, 0] / 0.7).softmax(-1))
    greedy, _ = page.llada_step(logits, x, mask_index, 0.0, seeds, 3)
    assert (greedy[mask_index] == logits[0, 0].argmax()).all()


def test_llada_from_hidden():
    page = functions("drop_in.md")
    torch.manual_seed(1)
    lm_head = torch.nn.Linear(16, 300)
    hidden, x = torch.randn(2, 7, 16), torch.zeros(2, 7, dtype=torch.int64)
    mask_index = torch.rand(2, 7) < 0.5
    with torch.no_grad():
        expected = page.llada_step(lm_head(hidden), x, mask_index, 1.0, 5, 2)
    got = page.llada_step_from_hidden(hidden, lm_head, x, mask_index, 1.0, 5, 2)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


def dream_published(logits, temperature, top_p, top_k):
    """The distribution that Dream's ``sample_tokens`` draws from, by its rules, for one row."""
    logits = logits / temperature if temperature > 0 else logits
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        drop = ordered.softmax(-1).cumsum(-1) > top_p
        drop = torch.cat((torch.zeros(1, dtype=torch.bool), drop[:-1]))
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -math.inf)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    return logits.softmax(-1)


@pytest.mark.parametrize(("top_p", "top_k"), [(None, None), (0.9, None), (None, 8)])
def test_dream(top_p, top_k):
    dream_sample = functions("drop_in.md").dream_sample
    logits = torch.randn(40) * 2
    rows = logits.expand(20_000, 40)
    p = dream_published(logits.double(), 0.8, top_p, top_k)
    confidence, token = dream_sample(rows, 0.8, 7, 0, top_p, top_k)
    assert follows(token, p)
    torch.testing.assert_close(confidence.double(), p[token], rtol=1e-5, atol=1e-6)
    margin, _ = dream_sample(rows[:2], 0.8, 7, 0, top_p, top_k, margin_confidence=True)
    torch.testing.assert_close(margin[0].double(), -p.topk(2).values.diff()[0], rtol=1e-5, atol=1e-6)
    entropy, _ = dream_sample(rows[:2], 0.8, 7, 0, top_p, top_k, neg_entropy=True)
    torch.testing.assert_close(entropy[0].double(), (p * (p + 1e-10).log()).sum(), rtol=1e-5, atol=1e-6)
    confidence, token = dream_sample(rows[:2], 0.0, 7, 0)
    assert token[0] == logits.argmax()
    torch.testing.assert_close(confidence[0], logits.softmax(-1).max())


def test_transformers_processors():
    from transformers import GenerationConfig
    from transformers.generation import logits_process as processors

    next_tokens = functions("drop_in.md").next_tokens
    config = GenerationConfig(do_sample=True, temperature=0.9, top_k=12, top_p=0.9, min_p=0.02)
    scores = torch.randn(50) * 2
    input_ids = torch.zeros(20_000, 6, dtype=torch.int64)
    others = processors.LogitsProcessorList([processors.SuppressTokensLogitsProcessor([3, 4])])
    token = next_tokens(input_ids, scores.repeat(20_000, 1), others, config, torch.arange(20_000))
    warped = others(input_ids[:1], scores[None].clone()) / 0.9
    for warper in (
        processors.TopKLogitsWarper(12),
        processors.TopPLogitsWarper(0.9),
        processors.MinPLogitsWarper(0.02),
    ):
        warped = warper(input_ids[:1], warped)
    assert follows(token, warped[0].softmax(-1))


def test_canvas():
    page = functions("drop_in.md")
    query, key, value = torch.randn(2, 4, 8, 32), *torch.randn(2, 2, 2, 8, 32)
    past = torch.randn(2, 2, 2, 20, 32)
    for count in (20, 13):
        joined = (torch.cat((x[:, :, :count], y), 2) for x, y in zip(past, (key, value), strict=True))
        expected = torch.nn.functional.scaled_dot_product_attention(query, *joined, enable_gqa=True)
        got = page.canvas_attention(query, key, value, *past, None if count == 20 else torch.tensor([count, count]))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_swap(capsys):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 9, 32)
    expected = model(x)
    report = functions("drop_in.md").swap(model)
    assert type(model.layers[1].self_attn).__module__.startswith("diffusion_runtime")
    assert "layers.1.self_attn" in capsys.readouterr().out
    torch.testing.assert_close(model(x), expected)
    report.undo()
    assert type(model.layers[1].self_attn) is torch.nn.MultiheadAttention


def test_transformers():
    tiny = pytest.importorskip("tiny_transformers", reason="needs the transformers extra")
    from diffusion_runtime.integrations.transformers import unregister

    model = tiny.make("llama")
    expected = model(tiny.tokens()).logits
    changed = functions("drop_in.md").with_our_attention(model)
    assert changed.config._attn_implementation == "diffusion_runtime"
    torch.testing.assert_close(changed(tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    unregister()


def numbers_of(page: str, heading: str) -> list[list[float]]:
    """The rows of the first table below a heading."""
    below = (DOCS / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| *([\d,]+.*)\|$", below, re.MULTILINE)
    return [[float(cell.replace(",", "")) for cell in row.split("|")] for row in rows]


def test_tables_of_diffusion_gemma():
    page = functions("diffusion_gemma.md")
    memory = numbers_of("diffusion_gemma.md", "Memory")
    for context, *cells in memory:
        expected = [page.memory_gb(context, batch, ours) for batch in (1, 8, 32) for ours in (True, False)]
        assert cells == [round(x, 1) for x in expected]
    speed = numbers_of("diffusion_gemma.md", "Tokens a second, by steps")
    for steps, *cells in speed:
        assert cells == [round(page.most_tokens_per_second(steps, ms)) for ms in (13.3, 15.0)]
    assert len(memory) == 4
    assert len(speed) == 5
    # what the text below the first table says
    fits = [max(b for b in range(1, 99) if page.memory_gb(8192, b, ours) <= 80) for ours in (True, False)]
    assert fits == [65, 12]


def test_requests_and_a_policy_of_ones_own(capsys):
    page = functions("decoding.md")
    assert "need a module that takes a padding mask" in capsys.readouterr().out
    steps = list(page.denoiser.stream(torch.tensor([[5, 6, 7]]), max_new_tokens=8))
    places = [step.commit_mask[0].nonzero()[:, 0].tolist() for step in steps]
    assert places == [[9, 10], [7, 8], [5, 6], [3, 4]]
    assert page.tokens.shape == (1, 11)


def test_answers_in_a_language(capsys):
    page = functions("constraints.md")
    texts = [page.tokenizer.decode(result.new_tokens) for result in page.denoiser.serve(page.requests, batch_size=1)]
    assert capsys.readouterr().out.splitlines() == texts
    (date,) = (text for text in texts if "{" not in text)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    (born,) = (json.loads(text) for text in texts if "{" in text)
    assert born["name"] in ("Ada", "Alan")
    assert isinstance(born["born"], int)


def test_a_trace_from_python():
    page = functions("tracing.md")
    assert len(page.trace.steps) == 16
    assert page.path.with_suffix(".html").stat().st_size < 100_000


def test_a_loop_beside_ours():
    assert functions("parity.md").parting is None


def test_the_policies_of_the_page_are_those_there_are():
    table = (DOCS / "decoding.md").read_text().split("## Policies")[1].split("*Raw*")[0]
    assert set(re.findall(r"`([a-z0-9_.]+)`", re.sub(r"\| [^|]* \| [^|]* \| [^|]* \|$", "", table, flags=re.M))) == set(
        POLICIES
    )
    for line in table.splitlines():
        for name in re.findall(r"`([a-z0-9_.]+)`", line.split("|")[1] if "|" in line else ""):
            assert POLICIES[name].confidence in line
            assert POLICIES[name].scheduled == ("fixed" in line) or "its own" in line


def test_a_family_of_ones_own(monkeypatch, tmp_path):
    from diffusion_runtime import load, models

    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    page = functions("models.md")
    config = {"model_type": "tiny", "hidden_act": "silu", "hidden_size": 32, "vocab_size": 50, "mask_token_id": 49}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(page.model.state_dict(), tmp_path / "model.safetensors")
    tokens = torch.tensor([[4, 49, 5]])
    assert torch.equal(load(tmp_path)(tokens), page.model(tokens))
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="the Tiny config asks for hidden_act='gelu'; only 'silu' is implemented"):
        load(tmp_path)
    families = {name for name, _ in re.findall(r"`(\w+)`( with experts)?", (DOCS / "models.md").read_text())}
    assert set(models.MODELS) <= families | {"tiny"}
