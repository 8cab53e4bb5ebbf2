"""attention in CUDA: what of it is Python, and on a GPU every case and arrangement; the kernels: ``cuda_on_cpu``."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from attention_cases import Case

from diffusion_runtime import ops
from diffusion_runtime.ops import _attention_cuda
from diffusion_runtime.ops._attention_arguments import read_problem

HALVES = [torch.bfloat16, torch.float16]


def test_a_workspace_is_kept_for_each_stream_and_grows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device("cpu")
    first = _attention_cuda.workspace(100, device, 1)
    assert first.numel() == 100
    assert not first.any()
    first[3] = 7  # a launch left it ready: it is not zeroed again
    assert _attention_cuda.workspace(60, device, 1) is first
    assert _attention_cuda.workspace(60, device, 2) is not first
    grown = _attention_cuda.workspace(101, device, 1)
    assert grown.numel() == 101
    assert not grown.any()


def test_refuses_wide_heads_by_size():
    def reason(dim, dtype):
        query, key, value = (torch.randn(1, 1, 3, size).to(dtype) for size in (16, 16, dim))
        return _attention_cuda.refuses(read_problem(query, key, value, None, None, None, None, None))

    assert reason(520, torch.bfloat16) == "takes heads of up to 512, got 520"
    assert reason(264, torch.float32) == "takes heads of up to 256 in float32, got 264"


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize("name", attention_cases.NAMES)
    def test_equals_the_reference(self, name, dtype):
        attention_cases.check(attention_cases.case(name, dtype), "cuda", "cuda")

    @pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 256, 512])
    @pytest.mark.parametrize("name", ["square", "long", "prefix:window", "paged:causal", "packed:blocks", "softcap"])
    def test_heads_of_any_size(self, name, dim):
        attention_cases.check(attention_cases.case(name, torch.bfloat16, dim), "cuda", "cuda")

    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
    @pytest.mark.parametrize("mask", [None, *list(attention_cases.MASKS.values())[:9]], ids=str)
    def test_company_changes_no_bit(self, mask, dtype):
        for dim in (32, 64):  # the second on Hopper's own kernel, where there is one
            attention_cases.check_invariant("cuda", mask, dtype, "cuda", dim)

    @pytest.mark.parametrize("dim", [64, 128, 256])
    def test_both_kernels_agree(self, dim):
        case = attention_cases.to(attention_cases.case("long", torch.bfloat16, dim), "cuda")
        # rows that are not aligned to 16 bytes go to the kernel for every GPU
        apart = [torch.randn(*x.shape[:3], dim + 1, device="cuda").to(x) for x in case[:3]]
        for wide, x in zip(apart, case[:3], strict=True):
            wide[..., :dim] = x
        views = Case(*(x[..., :dim] for x in apart), case.kwargs)
        torch.testing.assert_close(attention_cases.run(case, "cuda"), attention_cases.run(views, "cuda"))

    def test_a_short_canvas_is_split_and_gets_the_same_bits(self):
        for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 512), (torch.float32, 64)):
            query, key, value = (torch.randn(1, 4, 32, dim, device="cuda").to(dtype) for _ in range(3))
            prefix = ops.Prefix(*torch.randn(2, 1, 4, 9000, dim, device="cuda").to(dtype))
            one = ops.attention(query, key, value, prefix=prefix, backend="cuda")
            batch = [x.expand(64, -1, -1, -1) for x in (query, key, value, prefix.key, prefix.value)]
            many = ops.attention(*batch[:3], prefix=ops.Prefix(*batch[3:]), backend="cuda")
            assert torch.equal(one, many[7:8])
            torch.testing.assert_close(one, ops.attention(query, key, value, prefix=prefix, backend="reference"))

    def test_replays_in_a_graph(self):
        query, key, value = (torch.randn(2, 4, 40, 64, device="cuda").bfloat16() for _ in range(3))
        expected = ops.attention(query, key, value, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.attention(query, key, value, backend="cuda")
        graph.replay()
        assert torch.equal(out, expected)
