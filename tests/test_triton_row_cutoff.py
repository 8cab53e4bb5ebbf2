"""The smallest logit that a row may draw, as Triton finds it, where the whole op would hide a mistake."""

from __future__ import annotations

import math

import pytest
import torch
from backends import device_of

triton = pytest.importorskip("triton")

from diffusion_runtime.kernels import row_cutoff as kernel  # noqa: E402
from diffusion_runtime.kernels import row_parts  # noqa: E402

from diffusion_runtime import ops  # noqa: E402
from diffusion_runtime.ops._restriction import kept  # noqa: E402
from diffusion_runtime.ops._sample_reference import softcapped  # noqa: E402

DEVICE = device_of("triton")
LOWEST = torch.finfo(torch.float32).min


def cutoff_of(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, softcap=0.0, allowed=None, masked=None):
    logits, allowed, masked = (None if x is None else x.to(DEVICE) for x in (logits, allowed, masked))
    parts = row_parts.row_parts(logits[None], masked, temperature, 1.0, softcap, allowed)
    cutoff = kernel.row_cutoff(logits[None], masked, temperature, softcap, allowed, top_k, top_p, min_p, parts)
    return cutoff.cpu()


def keeps(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, softcap=0.0, allowed=None):
    def per_row(value, dtype=torch.float64):
        return torch.as_tensor(value, dtype=dtype).expand(len(logits))

    x = logits.double()
    cuts = per_row(top_k, torch.int64), per_row(top_p), per_row(min_p)
    return kept(x, softcapped(x, softcap), per_row(temperature), allowed, *cuts)


def assert_keeps(logits, **cuts):
    """The tokens that reach the cutoff are those of the definition, but for a top_p that rounding may move."""
    cutoff = cutoff_of(logits, **cuts)
    allowed = cuts.get("allowed")
    may = torch.ones_like(logits, dtype=torch.bool) if allowed is None else ops.unpack_allowed(allowed, logits.shape[1])
    got = may & (logits.float() >= cutoff[:, None]) & (logits > -math.inf)
    expected = keeps(logits, **cuts)
    if not torch.equal(got, expected):
        p = torch.as_tensor(cuts["top_p"])
        fewest, most = (keeps(logits, **cuts | {"top_p": (p + x).clamp(0, 1)}) for x in (-2e-6, 2e-6))
        assert (got <= most).all()
        assert (got >= fewest).all()
    return got.sum(1)


@pytest.fixture
def small_chunks(monkeypatch):
    """Rows of many parts that are cheap to interpret."""

    def launch_config(vocab):
        config = {"CHUNK": 128, "BLOCK_ROWS": 8}
        rows = config | {"BLOCK_PARTS": 4}
        return row_parts.Launch(triton.cdiv(vocab, 128), config, rows, rows)

    for module in (kernel, row_parts):
        monkeypatch.setattr(module, "launch_config", launch_config)


@pytest.mark.usefixtures("small_chunks")
class TestSearch:
    """With chunks of 128, so that most searches pass over parts, gather and go on in registers."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_mixed_rows(self, dtype):
        logits = (torch.randn(16, 1500) * torch.linspace(0.2, 6, 16)[:, None]).to(dtype)
        cuts = {
            "temperature": torch.linspace(0.3, 2, 16),
            "top_k": torch.tensor([0, 1, 20, 127, 128, 129, 700, 1499, 0, 5, 300, 1000, 0, 1500, 3, 400]),
            "top_p": torch.tensor([0.5, 1, 1, 1, 1, 1, 1, 1, 0.95, 0.9, 0.9, 0.5, 0.0, 0.99, 0.3, 0.99]),
            "min_p": torch.tensor([0.0, 0, 0, 0, 0.01, 0, 0, 0, 0, 0, 0.001, 0, 0, 0, 0, 0]),
        }
        num_kept = assert_keeps(logits, **cuts)
        if dtype == torch.float32:
            assert num_kept[[1, 2, 3, 5, 6, 7]].tolist() == [1, 20, 127, 129, 700, 1499]

    def test_allowed_tokens_alone_are_counted(self):
        logits = torch.randn(8, 1500) * 2
        allowed = ops.pack_allowed(torch.rand(8, 1500) < torch.linspace(0.01, 0.9, 8)[:, None])
        assert_keeps(logits, top_k=40, allowed=allowed)
        assert_keeps(logits, top_p=0.8, allowed=allowed)
        assert_keeps(logits, top_k=300, top_p=0.9, min_p=0.01, allowed=allowed)

    def test_more_ties_than_a_chunk(self):
        logits = (torch.randn(4, 1500) * 1.2).round()
        logits[3] = 2.0
        for k in (1, 600):
            assert_keeps(logits, top_k=k)
            assert_keeps(logits, top_k=k, top_p=0.7)
        assert_keeps(logits, top_p=0.6)

    @pytest.mark.parametrize("temperature", [1e-3, 1e9])
    def test_far_apart_and_close_together(self, temperature):
        logits = torch.randn(6, 700)
        logits[0, ::2] = LOWEST
        logits[1] = torch.linspace(-126, 100, 700).exp2()
        logits[2] = -logits[1]
        logits[3] = 1 + torch.arange(700) * 2.0**-23
        logits[4, 100:] = -math.inf
        logits[5] = torch.arange(700) % 3 * 0.0 * torch.tensor([1.0, -1.0]).repeat(350)
        for cuts in ({"top_k": 150}, {"top_k": 340, "top_p": 0.8}):
            assert_keeps(logits, temperature=temperature, **cuts)

    @pytest.mark.parametrize("softcap", [0.0, 0.5, 30.0])
    def test_a_share_of_the_best(self, softcap):
        logits = torch.randn(6, 700) * 4
        logits[1] = 1e4 + torch.arange(700)
        logits[2] -= 100
        for min_p in (1e-6, 0.04, 0.5, 1.0):
            cutoff = cutoff_of(logits, min_p=min_p, softcap=softcap)
            x = logits.double()
            y = softcapped(x, softcap)
            weight = (y - y.amax(1, keepdim=True)).exp()
            got, rounding = x >= cutoff[:, None].double(), 3e-6 * max(softcap, 100.0) / 100
            assert (got | (weight < min_p + rounding)).all()
            assert (~got | (weight > min_p - rounding)).all()

    def test_a_share_and_a_mass_that_are_just_reached(self):
        half = -math.log(2)  # times log2(e) it rounds to -1, and weighs 1/2
        logits = torch.full((1, 300), -math.inf)
        logits[0, [7, 50, 100]] = torch.tensor([half, 0.0, half])  # in one part, whose top is that of the row
        assert cutoff_of(logits, top_p=0.5) == 0
        assert cutoff_of(logits, top_p=0.501) == logits[0, 7]
        assert cutoff_of(logits, min_p=0.5) <= logits[0, 7]
        assert cutoff_of(logits, min_p=0.501) > logits[0, 7]

    def test_a_part_whose_largest_logit_is_the_middle(self):
        logits = torch.full((1, 768), -math.inf)
        logits[0, :30], logits[0, 30:530], logits[0, 640:670], logits[0, 670:700] = 1.0, 2.0, 1.0, 0.0
        for k, expected in ((500, 2), (501, 1), (560, 1), (561, 0), (575, 0), (591, -math.inf)):
            assert cutoff_of(logits, top_k=k) == expected

    def test_rows_that_are_not_cut(self):
        logits = torch.randn(6, 700)
        logits[1, 5], logits[2, 5], logits[3] = math.nan, math.inf, -math.inf
        temperature = torch.tensor([0.0, 1, 1, 1, 1, 1])
        masked = torch.tensor([True, True, True, True, False, True])
        cutoff = cutoff_of(logits, temperature.to(DEVICE), top_k=3, top_p=0.5, min_p=0.1, masked=masked)
        assert (cutoff[:4] == -math.inf).all()
        assert cutoff[4].isnan()  # not read, not written: as the poison left it
        assert cutoff[5].isfinite()
        assert not kernel.may_cut(700, 0.0, 3, 0.5, 0.1)
        assert not kernel.may_cut(700, 1.0, 700, 1.0, 0.0)
        assert kernel.may_cut(700, torch.zeros(6), 699, 1.0, 0.0)

    def test_a_row_is_searched_as_if_it_were_alone(self):
        logits = torch.randn(8, 1500) * torch.linspace(0.1, 8, 8)[:, None]
        together = cutoff_of(logits, top_k=900, top_p=0.93)
        for r in (0, 3, 7):
            assert torch.equal(cutoff_of(logits[r : r + 1], top_k=900, top_p=0.93), together[r : r + 1])

    def test_parts_below_the_cutoff_are_not_read(self):
        logits = torch.randn(2, 1500)
        logits[:, 256:384] += 40
        uncut = row_parts.row_parts(logits[None].to(DEVICE), None, 1.0, 1.0, 0.0, None)
        cutoff = cutoff_of(logits, top_k=100)
        logits[:, :256] = logits[:, 384:] = math.nan
        parts = row_parts.row_parts(logits[None].to(DEVICE), None, 1.0, 1.0, 0.0, None, cutoff.to(DEVICE), uncut)
        assert (parts[0] > -math.inf).sum(1).tolist() == [1, 1]
        assert not parts.isnan().any()
        assert (parts[0, :, 2] > 30).all()


def test_a_large_vocabulary():
    logits = torch.randn(2, 50_257) * torch.tensor([[1.0], [3.0]])
    for cuts in ({"top_p": 0.95}, {"top_k": 9000, "top_p": 0.97}):
        assert_keeps(logits, **cuts)
