"""What is special to the Triton backend of sample_tokens: its Philox, its inverse CDF, its cut and its launches."""

from __future__ import annotations

import math

import pytest
import torch
from backends import device_of

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from diffusion_runtime.kernels import _common, philox, row_parts  # noqa: E402
from diffusion_runtime.kernels import sample_tokens as kernel  # noqa: E402

from diffusion_runtime import ops  # noqa: E402

DEVICE = device_of("triton")


@triton.jit
def _philox_kernel(seed_ptr, position_ptr, step_ptr, first_ptr, second_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    seed, position, step = tl.load(seed_ptr + i), tl.load(position_ptr + i), tl.load(step_ptr + i)
    first, second = philox.philox_uniforms(seed, position, step, philox.DRAW_TOKEN)
    tl.store(first_ptr + i, first)
    tl.store(second_ptr + i, second)


def test_philox_is_the_reference_bit_for_bit():
    seed = torch.randint(-(2**63), 2**63 - 1, (1024,))
    seed[:6] = torch.tensor([0, -1, 1, 2**32, -(2**63), 2**63 - 1])
    position, step = torch.randint(0, 2**32, (2, 1024))
    position[:4], step[:4] = torch.tensor([0, 2**31, 2**32 - 1, 0]), torch.tensor([0, 2**32 - 1, 2**31, 1])
    first, second = torch.empty(2, 1024, dtype=torch.float64, device=DEVICE)
    _philox_kernel[(1,)](seed.to(DEVICE), position.to(DEVICE), step.to(DEVICE), first, second, BLOCK=1024)
    expected = ops.philox_uniforms(seed, position, step, ops.DRAW_TOKEN)
    assert torch.equal(first.cpu(), expected[0])
    assert torch.equal(second.cpu(), expected[1])


@triton.jit
def _pick_kernel(mass_ptr, target_ptr, index_ptr, left_ptr, found_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    row = tl.arange(0, ROWS)
    mass = tl.load(mass_ptr + row[:, None] * N + tl.arange(0, N)[None, :])
    index, left, found = _common.pick_by_mass(mass, tl.load(target_ptr + row))
    tl.store(index_ptr + row, index)
    tl.store(left_ptr + row, left)
    tl.store(found_ptr + row, found)


MANY_ZEROS = ([0, 1, 0, 2, 0, 0, 4, 0], [0, 0.5, 1, 2.5, 3, 6.5, 7, math.inf], [1, 1, 3, 3, 6, 6, 6, 6])


@pytest.mark.parametrize(
    ("mass", "targets", "expected", "left"),
    [
        (*MANY_ZEROS, [0, 0.5, 0, 1.5, 0, 3.5]),
        ([3], [0, 2, 3, math.inf], [0, 0, 0, 0], [0, 2]),
        ([0, 0, 0, 5], [0, 4, 5, 6], [3, 3, 3, 3], [0, 4]),
    ],
)
def test_the_pick_never_has_zero_mass(mass, targets, expected, left):
    rows, n = len(targets), len(mass)
    masses = torch.tensor(mass, dtype=torch.float64, device=DEVICE).repeat(rows, 1)
    target = torch.tensor(targets, dtype=torch.float64, device=DEVICE)
    index = torch.empty(rows, dtype=torch.int32, device=DEVICE)
    found = torch.empty(rows, dtype=torch.int32, device=DEVICE)
    rest = torch.empty(rows, dtype=torch.float64, device=DEVICE)
    _pick_kernel[(1,)](masses, target, index, rest, found, ROWS=rows, N=n)
    assert index.tolist() == expected
    assert rest.tolist()[: len(left)] == left
    assert found.tolist() == [int(t < sum(mass)) for t in targets]


def test_a_row_of_more_parts_than_one_block():
    vocab = 65 * 4096 + 5
    config = row_parts.launch_config(vocab)
    assert config.num_parts > config.rows["BLOCK_PARTS"] > 1
    logits = torch.randn(1, vocab) * 3
    logits[0, [4095, vocab - 1]] = 40.0  # the largest in the first and in the last block of parts
    for temperature, settings in ((0.0, {}), (30.0, {}), (1.0, {"statistics_temperature": 3.0, "softcap": 20.0})):
        call = {"temperature": temperature, "seed": 3, **settings}
        got = ops.sample_tokens(logits.to(DEVICE), backend="triton", **call)
        truth = ops.sample_tokens(logits.double(), backend="reference", **call)
        assert got.argmax.item() == 4095
        assert got.margin.item() == 0
        for actual, expected in zip(got, truth, strict=True):
            torch.testing.assert_close(actual.cpu().double(), expected.double(), rtol=2e-6, atol=2e-6)


def test_the_cut_depends_on_the_vocabulary_alone():
    for vocab in (1, 127, 129, 1000, 4096, 4097, 126_464, 2**31 - 1):
        config = row_parts.launch_config(vocab)
        chunk = config.parts["CHUNK"]
        assert chunk % 128 == 0
        assert (config.num_parts - 1) * chunk < vocab <= config.num_parts * chunk
        assert config.rows.items() >= config.parts.items()


def test_the_size_of_a_block_of_rows_changes_nothing(monkeypatch):
    """The interpreter takes other blocks than a GPU: the same bits come out of both."""
    logits = torch.randn(21, 300, device=DEVICE)
    masked = torch.rand(21, device=DEVICE) < 0.6
    masked[8:16] = False  # a block of the smaller size without a row to read
    call = {"temperature": 0.8, "seed": 5, "masked": masked, "backend": "triton"}
    results = []
    for interpreted in (True, False):
        monkeypatch.setattr(row_parts, "_INTERPRETED", interpreted)
        results.append(ops.sample_tokens(logits, **call))
    if DEVICE.type == "cpu":  # a compiler chooses the order of a sum by the size of the block
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0].token, results[1].token)


@pytest.mark.parametrize("value", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -1, -(2**63), -(2**31) - 1])
def test_words_fit_32_bits_with_a_sign(value):
    low, high = kernel.signed_word(value), kernel.signed_word(value >> 32)
    assert -(2**31) <= low < 2**31
    assert -(2**31) <= high < 2**31
    assert (high << 32) + (low & 0xFFFFFFFF) == value


@pytest.mark.gpu
def test_values_of_settings_do_not_recompile():
    def compiled() -> int:
        return len(kernel._finish_rows_kernel.device_caches[torch.cuda.current_device()][0])

    logits = torch.randn(16, 300, device=DEVICE)
    ops.sample_tokens(logits, temperature=1.0, seed=0, backend="triton")
    before = compiled()
    for rows, temperature, seed, step in ((1, 0.5, 1, 16), (7, 2.0, 2**63, 1), (16, 1e-9, -1, 2**32 - 1)):
        ops.sample_tokens(logits[:rows], temperature=temperature, seed=seed, step=step, backend="triton")
    assert compiled() == before
