"""What is special to the Triton backend of sample_from_hidden: its two products, its parts and its order of rows."""

from __future__ import annotations

import math

import pytest
import torch
from backends import assert_same_tokens, device_of

pytest.importorskip("triton")

from diffusion_runtime.kernels import _tile_parts, finish_head
from diffusion_runtime.kernels import sample_from_hidden as kernel

from diffusion_runtime import ops
from diffusion_runtime.ops import _head_triton
from diffusion_runtime.ops._sample_from_hidden import SPEC
from diffusion_runtime.ops._settings import Settings
from diffusion_runtime.testing import assert_as_accurate

DEVICE = device_of("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["fused", "product"])
def path(request, monkeypatch):
    """Forces one of the two ways to the parts, whatever the rule would take."""
    monkeypatch.setattr(kernel, "prefers_fused", lambda hidden, masked: request.param == "fused")
    return request.param


def head(rows, vocab, dim, dtype=torch.float32, scale=3.0):
    """Hidden states and weights whose logits have about this standard deviation."""
    return torch.randn(rows, dim).to(dtype), (torch.randn(vocab, dim) * scale / dim**0.5).to(dtype)


def whole_numbers(rows, vocab, dim):
    """The same with products that are exact in any order: only the sampling is left to differ."""
    return torch.randint(-2, 3, (rows, dim)).float(), torch.randint(-2, 3, (vocab, dim)).float() / 4


def run(hidden, weight, bias=None, **settings) -> ops.TokenSamples:
    """The backend alone on flat rows: on a CPU the op would leave out the rows that are not masked before it."""
    settings = {"position": torch.arange(len(hidden)), **settings}
    settings = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    bias = None if bias is None else bias.to(DEVICE)
    backend = SPEC.resolve(DEVICE.type, hidden.dtype, "triton")
    ids, statistics = backend(hidden.to(DEVICE), weight.to(DEVICE), bias, Settings(**settings))
    return ops.TokenSamples(*(x.cpu() for x in (ids[0], statistics[0], ids[1], *statistics[1:])))


def reference(logits, **settings) -> ops.TokenSamples:
    settings = {"position": torch.arange(len(logits)), **settings}
    ids, statistics = ops._sample_reference.sample_reference(logits[None], Settings(**settings))
    return ops.TokenSamples(ids[0], statistics[0], ids[1], *statistics[1:])


def assert_matches(got, logits, logits32, **settings):
    """Ids equal to those of the float64 logits, statistics as accurate as the float32 reference's."""
    truth, yardstick = reference(logits, **settings), reference(logits32, **settings)
    assert torch.equal(got.argmax, truth.argmax)
    same = got.token == truth.token
    for name in ("logprob", "confidence", "margin", "entropy", "logsumexp"):
        actual, same_dtype, expected = (getattr(x, name)[same] for x in (got, yardstick, truth))
        finite = expected.isfinite()
        assert_as_accurate(actual[finite], same_dtype[finite], expected[finite], floor=4e-6)


SHAPES = [(1, 1, 1), (16, 127, 16), (17, 128, 17), (65, 129, 64), (3, 1000, 100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_and_statistics_are_the_references(shape, dtype, path):
    hidden, weight = head(*shape, dtype)
    bias = torch.randn(shape[1]).to(dtype)
    # not the logits in 16 bits: the products are kept in float32
    logits = hidden.double() @ weight.double().T + bias.double()
    got = run(hidden, weight, bias, temperature=0.8, seed=7)
    truth = reference(logits, temperature=0.8, seed=7)
    assert_same_tokens(got.token, truth.token, logits, 0.8, 7)
    assert_matches(got, logits, logits.float(), temperature=0.8, seed=7)


def test_every_setting_for_each_row(path):
    rows, vocab = 33, 300
    hidden, weight = head(rows, vocab, 24, scale=8.0)
    logits = hidden.double() @ weight.double().T
    settings = {
        "temperature": torch.where(torch.arange(rows) % 3 == 0, 0.0, torch.rand(rows) * 2 + 0.05),
        "statistics_temperature": torch.rand(rows) + 0.5,
        "softcap": 6.0,
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,)),
        "step": torch.randint(0, 2**32, (rows,)),
        "position": torch.randint(0, 2**32, (rows,)),
    }
    got = run(hidden, weight, **settings)
    assert torch.equal(got.token, reference(logits, **settings).token)
    assert_matches(got, logits, logits.float(), **settings)
    greedy = settings["temperature"] == 0
    assert torch.equal(got.token[greedy], got.argmax[greedy])


@pytest.mark.parametrize("ends", [(0, 1), (5, 999), (127, 128), (300, 310), (0, 999)])
def test_equal_weights_tie_and_the_lowest_id_wins(ends, path):
    hidden, weight = whole_numbers(17, 1000, 20)
    hidden[:, 0] = 2
    weight[list(ends)] = 0
    weight[list(ends), 0] = 64
    got = run(hidden, weight)
    assert got.argmax.tolist() == [ends[0]] * 17
    assert got.token.tolist() == [ends[0]] * 17
    assert got.margin.tolist() == [0.0] * 17


def test_the_second_best_may_lie_in_the_tile_of_the_best_or_in_another(path):
    hidden, weight = torch.ones(1, 16), torch.zeros(400, 16)
    for best, second in ((3, 4), (4, 3), (3, 399), (399, 3), (130, 129)):
        weight[:, 0] = 0
        weight[best, 0], weight[second, 0] = 5.0, 4.5
        logits = hidden.double() @ weight.double().T
        assert_matches(run(hidden, weight), logits, logits.float())


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_that_are_not_allowed(shared, path):
    rows, vocab = 19, 300
    hidden, weight = head(rows, vocab, 20)
    weight[7] = math.nan  # allowed for nobody
    mask = torch.rand(1 if shared else rows, vocab) < 0.3
    mask[:, 7], mask[:, 128:256], mask[:, 299] = False, False, True  # and a tile of which nothing is left
    words = ops.pack_allowed(mask)
    words[:, -1] |= -(1 << 20)  # bits behind the vocabulary do not matter
    words = words.expand(rows, -1)
    assert words.stride(0) == (0 if shared else words.shape[1])
    logits = (hidden.double() @ weight.double().T).masked_fill(~mask, -math.inf)
    settings = {"temperature": 1.3, "seed": 5}
    got = run(hidden, weight, allowed=words, restricted=True, **settings)
    assert torch.equal(got.token, reference(logits, **settings).token)
    assert_matches(got, logits, logits.float(), **settings)


@pytest.mark.parametrize("count", [0, 1, 16, 17, 40, 65])
def test_rows_that_are_not_masked_are_not_read(count, path):
    hidden, weight = whole_numbers(65, 200, 20)
    masked = torch.zeros(65, dtype=torch.bool)
    masked[torch.randperm(65)[:count]] = True
    settings = {"temperature": torch.rand(65) + 0.5, "seed": torch.arange(65), "step": 3}
    full = run(hidden, weight, **settings)
    hidden[~masked] = math.nan
    for name in ("temperature", "seed"):
        settings[name][~masked] = torch.iinfo(torch.int64).max if name == "seed" else math.nan
    got = run(hidden, weight, masked=masked, **settings)
    for name, actual, expected in zip(got._fields, got, full, strict=True):
        assert torch.equal(actual[masked], expected[masked]), name
        assert (actual[~masked] == (-1 if name in ("token", "argmax") else 0)).all(), name


def test_rows_without_a_distribution(path):
    hidden, weight = whole_numbers(20, 260, 16)
    hidden[:, 0] = 1
    hidden[2, 3], hidden[4, 3], hidden[18, 0] = math.nan, math.inf, math.nan
    got = run(hidden, weight, temperature=1.0, seed=1)
    lost = torch.zeros(20, dtype=torch.bool)
    lost[[2, 4, 18]] = True
    bias = torch.zeros(260)
    for name, value in zip(got._fields, got, strict=True):
        if name in ("token", "argmax"):
            assert (value < 0).tolist() == lost.tolist()
        else:
            assert value.isnan().tolist() == lost.tolist()
    for values in (math.nan, math.inf, "all -inf"):
        bias.fill_(-math.inf if values == "all -inf" else 0)
        if values != "all -inf":
            bias[200] = values
        assert run(hidden, weight, bias).token.tolist() == [-1] * 20
    bias.fill_(-math.inf)
    bias[131] = 0.0
    assert set(run(hidden[5:9], weight, bias, temperature=1.0).token.tolist()) == {131}


def test_a_row_alone_is_as_in_the_batch(path):
    hidden, weight = whole_numbers(37, 300, 40)
    settings = {"temperature": 0.9, "seed": 11, "statistics_temperature": 0.7, "softcap": 5.0}
    together = run(hidden, weight, **settings)
    for r in (0, 15, 16, 36):
        alone = run(hidden[r : r + 1], weight, position=torch.tensor([r]), **settings)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[r])


def test_both_paths_and_all_sizes_of_blocks_give_the_same_bits(monkeypatch):
    hidden, weight = whole_numbers(70, 300, 40)
    settings = {"temperature": 0.9, "seed": 11, "masked": torch.rand(70) < 0.7}
    results = []
    for fused, most_rows, block_rows in ((True, 128, 16), (True, 32, 1), (True, 16, 16), (False, 128, 16)):
        monkeypatch.setattr(kernel, "prefers_fused", lambda *_, fused=fused: fused)
        monkeypatch.setattr(kernel, "MOST_ROWS", {2: most_rows, 4: most_rows})
        monkeypatch.setattr(finish_head, "_INTERPRETED", block_rows == 16)
        results.append(run(hidden, weight, **settings))
    if DEVICE.type == "cpu":  # a compiler chooses the order of a sum by the size of the block
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_groups_of_rows_and_products_of_some_tiles(monkeypatch):
    monkeypatch.setattr(_head_triton, "MOST_ROWS", 16)
    monkeypatch.setattr(kernel, "_MOST_LOGITS", 16 * 256)
    monkeypatch.setattr(kernel, "prefers_fused", lambda *_: False)
    hidden, weight = head(37, 700, 20)
    bias, mask = torch.randn(700), torch.rand(37, 700) < 0.5
    logits = (hidden.double() @ weight.double().T + bias.double()).masked_fill(~mask, -math.inf)
    settings = {"temperature": torch.rand(37) + 0.5, "seed": 2}
    got = run(hidden, weight, bias, allowed=ops.pack_allowed(mask), restricted=True, **settings)
    assert torch.equal(got.token, reference(logits, **settings).token)
    assert_matches(got, logits, logits.float(), **settings)
    assert run(hidden[:0], weight, bias).token.shape == (0,)


def test_views_of_hidden_states_and_weights(path):
    hidden, weight = head(9, 200, 30)
    expected = run(hidden, weight, temperature=1.0, seed=3)
    hidden_view = torch.full((18, 40), math.nan)[::2, 5:35].copy_(hidden)
    weight_view = torch.full((200, 33), math.nan)[:, :30].copy_(weight)
    for h, w in ((hidden_view, weight_view), (hidden.T.contiguous().T, weight), (hidden, weight.T.contiguous().T)):
        for a, b in zip(run(h, w, temperature=1.0, seed=3), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_draws_have_the_frequencies_of_the_softmax(path, monkeypatch):
    rows, vocab = 4000, 150
    if DEVICE.type == "cpu":  # the interpreter pays by the program
        many = {"BLOCK_ROWS": 512}
        launch = kernel._Launch(many | {"SLICE": 512, "BLOCK_K": 16}, {})
        monkeypatch.setattr(kernel, "_launch_config", lambda *_: launch)
        monkeypatch.setattr(kernel, "_LOGITS_CONFIG", kernel._Launch(many, {}))
        finish = many | {"BLOCK_PARTS": 2, "BLOCK_K": 16, "STAGES": 3}
        monkeypatch.setattr(finish_head, "_launch_config", lambda _: finish)
    weight = torch.randn(vocab, 16) * 0.4
    hidden = torch.randn(1, 16).expand(rows, 16)
    got = run(hidden, weight, temperature=0.7, seed=4)
    expected = (hidden[0].double() @ weight.double().T / 0.7).softmax(-1) * rows
    counts = got.token.bincount(minlength=vocab).double()
    common = expected > 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    chi = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(observed) - 1
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1e30])
def test_extreme_temperatures(temperature, path):
    hidden, weight = head(16, 260, 50)
    got = run(hidden, weight, temperature=temperature, seed=3)
    if temperature < 1:
        assert torch.equal(got.token, got.argmax)
        assert torch.equal(got.logprob, got.confidence.log().clamp(max=0)) or (
            (got.logprob - got.confidence.log()).abs().max() < 1e-6
        )
    else:
        assert len(set(got.token.tolist())) > 8
    assert (got.logprob <= 0).all()


def test_a_row_of_more_tiles_than_one_block(monkeypatch, path):
    vocab = 1000
    finish = finish_head._launch_config(vocab) | {"BLOCK_PARTS": 2}
    monkeypatch.setattr(finish_head, "_launch_config", lambda _: finish)
    hidden, weight = head(18, vocab, 20)
    logits = hidden.double() @ weight.double().T
    settings = {"temperature": 1.5, "seed": 9}
    got = run(hidden, weight, **settings)
    assert torch.equal(got.token, reference(logits, **settings).token)
    assert_matches(got, logits, logits.float(), **settings)


def test_the_rule():
    for size in (2, 4):
        hidden = torch.zeros(1000, 16, dtype=torch.float32 if size == 4 else torch.bfloat16)
        most = kernel.MOST_ROWS[size]
        assert kernel.prefers_fused(hidden[:most], None)
        assert not kernel.prefers_fused(hidden[: most + 1], None)
        assert kernel.prefers_fused(hidden, torch.ones(1000, dtype=torch.bool))
        for aligned in (True, False):
            configs = [kernel._launch_config(rows, size, aligned).constants for rows in (1, 16, 17, 64, 65, 5000)]
            assert len({config["BLOCK_K"] for config in configs}) == 1
            assert all(config["BLOCK_ROWS"] % config["SLICE"] == 0 for config in configs)
            assert all(16 <= config["BLOCK_ROWS"] <= most for config in configs)
    assert _tile_parts.INDEX.value + 1 == _tile_parts.NUM_KINDS


def test_the_op_takes_the_backend():
    hidden, weight = head(6, 200, 20)
    call = {"temperature": 1.0, "seed": 1, "masked": torch.tensor([[True, False, True]] * 2), "top_k": None}
    got = ops.sample_from_hidden(hidden.view(2, 3, 20), weight, backend="triton", **call)
    expected = ops.sample_from_hidden(hidden.double().view(2, 3, 20), weight.double(), backend="reference", **call)
    assert torch.equal(got.token, expected.token)
