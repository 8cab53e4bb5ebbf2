"""rms_norm: every backend against float64, what published norms it is, its gradients, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from backends import ALL, KERNELS, run_op
from torch.nn.functional import rms_norm as torch_rms_norm

from diffusion_runtime import ops
from diffusion_runtime.nn import LlamaRMSNorm
from diffusion_runtime.ops._rms_norm import Norm, rms_norm_reference
from diffusion_runtime.testing import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"plain": {}, "Llama": {"round_before_weight": True}, "Gemma": {"weight_offset": 1.0}, "no weight": None}


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_agrees(x, weight, *, backend, **settings):
    got = run_op("rms_norm", x, weight, backend=backend, **settings)
    same = ops.rms_norm(x, weight, backend="reference", **settings)
    truth = ops.rms_norm(x.double(), wide(weight), backend="reference", **settings)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    assert_as_accurate(got, same, truth)
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_agrees_with_float64(backend, dtype, weight_dtype, kind):
    for size in (1, 3, 8, 15, 17, 64, 77, 130, 1025, 2050, 8200):
        x = (torch.randn(3, size) * torch.tensor([[1.0], [50.0], [1e-3]])).to(dtype)
        settings = KINDS[kind]
        weight = None if settings is None else torch.randn(size).to(weight_dtype)
        assert_agrees(x, weight, eps=1e-6, backend=backend, **(settings or {}))


@pytest.mark.parametrize("backend", ALL)
class TestEdges:
    @pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_torchs(self, backend, dtype, weight_dtype):
        x, weight = torch.randn(4, 3, 200).to(dtype), torch.randn(200).to(weight_dtype)
        got = run_op("rms_norm", x, weight, eps=1e-5, backend=backend)
        expected = torch_rms_norm(x.float(), (200,), weight.float(), 1e-5).to(dtype)
        # one rounding: nearly every element has the same bits
        torch.testing.assert_close(got, expected)
        assert (got == expected).float().mean() > (0.99 if dtype != torch.float32 else 0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_rounds_where_published_models_do(self, backend, dtype):
        x, weight = torch.randn(50, 96).to(dtype), torch.randn(96).to(dtype)
        unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        llama = run_op("rms_norm", x, weight, eps=1e-6, round_before_weight=True, backend=backend)
        gemma = run_op("rms_norm", x, weight, eps=1e-6, weight_offset=1.0, backend=backend)
        assert (llama == unit.to(dtype) * weight).float().mean() > 0.998
        assert (gemma == (unit * (1 + weight.float())).to(dtype)).float().mean() > 0.998
        # the two differ, so that the counts above mean something
        once = run_op("rms_norm", x, weight, eps=1e-6, backend=backend)
        assert (once != llama).float().mean() > 0.1

    def test_any_strides(self, backend):
        base = torch.randn(5, 4, 6, 90)
        weight = torch.randn(70)
        views = [
            base[..., 7:77],
            base[:, 1:3, ::2, 3:73],
            base.transpose(1, 2)[..., :70],
            base.permute(2, 0, 1, 3)[..., 1:71],
            base[0, 0, 0, :70],
            base[:, 0, :, 10:80],
            base[:1, :1, :1, :70].expand(3, 2, 4, 70),
            base.transpose(2, 3)[..., :70, :][..., 0:1].transpose(-1, -2)[..., :70],
            base.view(5, 2, 2, 3, 2, 90)[..., :70],
            base[..., ::2][..., :40].repeat(1, 1, 1, 2)[..., :70],
            base[..., ::1].mT[:, :, :70].mT,
        ]
        for x in views:
            got = run_op("rms_norm", x, weight, eps=1e-6, backend=backend)
            expected = run_op(
                "rms_norm", x.clone(memory_format=torch.contiguous_format), weight, eps=1e-6, backend=backend
            )
            assert got.shape == x.shape
            assert torch.equal(got, expected)

    def test_a_strided_last_dimension(self, backend):
        x, weight = torch.randn(40, 3).t(), torch.randn(80)[::2]
        got = run_op("rms_norm", x, weight, eps=1e-6, backend=backend)
        expected = run_op("rms_norm", x.contiguous(), weight.contiguous(), eps=1e-6, backend=backend)
        assert torch.equal(got, expected)

    def test_a_row_depends_on_itself_alone(self, backend):
        for dtype in DTYPES:
            for size in (24, 100, 1000):
                x, weight = torch.randn(37, size).to(dtype), torch.randn(size)
                every = run_op("rms_norm", x, weight, eps=1e-6, backend=backend)
                for first, last in ((0, 1), (5, 6), (36, 37), (3, 20)):
                    some = run_op("rms_norm", x[first:last], weight, eps=1e-6, backend=backend)
                    assert torch.equal(some, every[first:last])
                x[::2] = math.nan
                assert torch.equal(run_op("rms_norm", x, weight, eps=1e-6, backend=backend)[1::2], every[1::2])

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4), (1,), (2, 1, 1, 1, 1, 7)])
    def test_shapes(self, backend, shape):
        x = torch.randn(shape)
        got = run_op("rms_norm", x, torch.ones(shape[-1]), eps=1e-6, backend=backend)
        assert got.shape == x.shape
        torch.testing.assert_close(got, rms_norm_reference(x, None, Norm(1e-6, 0.0, False)))

    def test_extremes(self, backend):
        x = torch.zeros(6, 20)
        x[1] = 3e38  # the sum overflows
        x[2, 3] = math.inf
        x[3, 3] = math.nan
        x[4] = 1e-30  # the squares vanish
        x[5, 0] = 1e18
        for dtype in (torch.float32, torch.bfloat16):
            got = run_op("rms_norm", x.to(dtype), None, eps=1e-6, backend=backend)
            expected = ops.rms_norm(x.to(dtype), None, eps=1e-6, backend="reference")
            torch.testing.assert_close(got, expected, equal_nan=True)
            assert (got[:2] == 0).all()
        assert run_op("rms_norm", x[:1], None, eps=0.0, backend=backend).isnan().all()

    def test_nothing_else_is_read_or_written(self, backend):
        around = torch.full((4, 50), math.nan)
        x = around[:, 3:40]
        x.copy_(torch.randn(4, 37))
        weight = torch.full((50,), math.nan)
        weight[5:42] = 2.0
        got = run_op("rms_norm", x, weight[5:42], eps=1e-6, backend=backend)
        assert not got.isnan().any()
        torch.testing.assert_close(got, 2 * rms_norm_reference(x, None, Norm(1e-6, 0.0, False)))


class TestGradients:
    @pytest.mark.parametrize("settings", [{}, {"weight_offset": 1.0}, {"round_before_weight": True}], ids=str)
    def test_gradcheck(self, settings):
        x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

        def op(x, weight):
            return ops.rms_norm(x, weight, eps=1e-3, backend="reference", **settings)

        torch.autograd.gradcheck(op, (x, weight))
        torch.autograd.gradgradcheck(op, (x, weight))

    def test_gradcheck_without_a_weight(self):
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(lambda x: ops.rms_norm(x, eps=1e-3, backend="reference"), (x,))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
    def test_are_those_of_the_formula(self, backend, dtype, kind):
        settings = KINDS[kind]
        x = torch.randn(3, 4, 40).to(dtype).transpose(0, 1).requires_grad_()
        weight = None if settings is None else torch.randn(40).to(dtype).requires_grad_()
        inputs = [x] if weight is None else [x, weight]
        settings = settings or {}
        seed = torch.randn(4, 3, 40).to(dtype)
        got = torch.autograd.grad(ops.rms_norm(x, weight, eps=1e-3, backend=backend, **settings), inputs, seed)
        norm = Norm(1e-3, settings.get("weight_offset", 0.0), settings.get("round_before_weight", False))
        same = torch.autograd.grad(rms_norm_reference(x, weight, norm), inputs, seed)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        truth = torch.autograd.grad(rms_norm_reference(*[*doubles, None][:2], norm), doubles, seed.double())
        for one, yardstick, exact in zip(got, same, truth, strict=True):
            assert one.dtype == dtype
            assert_as_accurate(one, yardstick, exact)
        if dtype != torch.float32:
            # torch's autograd rounds the gradient where the forward rounds; the formula does not
            assert (got[0] == truth[0].to(dtype)).float().mean() > 0.97
            # but the weight's is a sum of what it multiplied
            assert weight is None or (got[1] == same[1]).float().mean() > 0.97

    def test_of_the_weight_alone(self):
        weight = torch.ones(7, requires_grad=True)
        ops.rms_norm(torch.randn(3, 7), weight, eps=1e-6).sum().backward()
        assert weight.grad is not None

    def test_none_are_kept_without_need(self):
        with torch.no_grad():
            assert not ops.rms_norm(torch.randn(3, 7, requires_grad=True), eps=1e-6).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[..., size\]"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must be \(5,\) on cpu, got \(4,\)"),
        ({"weight": torch.ones(1, 5)}, ValueError, r"weight must be \(5,\) on cpu, got \(1, 5\)"),
        ({"weight": torch.ones(5, dtype=torch.int32)}, TypeError, "weight must be a floating-point tensor"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"eps": math.nan}, ValueError, "eps must be finite, got nan"),
        ({"eps": None}, TypeError, "eps must be a float, got NoneType"),
        ({"weight_offset": math.inf}, ValueError, "weight_offset must be finite"),
        ({"weight": None, "weight_offset": 1.0}, ValueError, "there is none: got 1.0 and False"),
        ({"weight": None, "round_before_weight": True}, ValueError, "there is none: got 0.0 and True"),
        ({"backend": "cuda"}, ops.BackendUnavailableError, "cuda takes cuda tensors, got cpu"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(**({"x": torch.zeros(3, 5), "weight": torch.ones(5), "eps": 1e-6} | arguments))


@pytest.mark.parametrize("weight", [torch.randn(20), None], ids=["weight", "none"])
def test_operator_registration(weight):
    x = torch.randn(2, 3, 20, requires_grad=True)
    arguments = (x, weight, 1e-6, 0.0, False, "cpp")
    torch.library.opcheck(torch.ops.diffusion_runtime.rms_norm.default, arguments)


def test_compiles_without_a_graph_break():
    norm = LlamaRMSNorm(24, 1e-6)
    x = torch.randn(2, 5, 24, requires_grad=True)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x))
    gradients = [torch.autograd.grad(f(x).square().sum(), [x, norm.weight]) for f in (compiled, norm)]
    torch.testing.assert_close(*gradients)


def test_the_module_is_llamas_norm():
    norm = LlamaRMSNorm(64, 1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(10, 64).bfloat16()
    expected = ops.rms_norm(x, norm.weight, eps=1e-5, round_before_weight=True, backend="reference")
    assert (norm(x) == expected).float().mean() > 0.998
    assert norm(x).requires_grad
