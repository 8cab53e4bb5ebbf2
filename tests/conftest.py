"""Makes the suite mean something without a GPU: Triton kernels run under its interpreter, on poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any kernel file is
    if find_spec("triton") is not None:
        import triton_bf16

        triton_bf16.apply()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is not None and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device; ``-m gpu`` selects the CUDA half of a test that takes this."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    from diffusion_runtime.testing import poisoned_memory

    torch.manual_seed(0)
    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.nn.Module]:
    """A family's tiny model with random weights, by its name in ``families.FAMILIES``; loaded once."""
    from families import FAMILIES, random_weights, write_checkpoint

    from diffusion_runtime import load

    @cache
    def build(name: str) -> torch.nn.Module:
        folder = tmp_path_factory.mktemp("model")
        return load(write_checkpoint(folder, FAMILIES[name], random_weights(FAMILIES[name])))

    return build
