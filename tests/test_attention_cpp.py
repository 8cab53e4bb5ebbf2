"""attention in C++, with each instruction set."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from backends import instruction_set

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["avx512", "avx2", "portable"], autouse=True)
def _set(request):
    with instruction_set(request.param):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", attention_cases.NAMES)
def test_equals_the_reference(name, dtype):
    attention_cases.check(attention_cases.case(name, dtype), "cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, *list(attention_cases.MASKS.values())[:9]], ids=str)
def test_company_changes_no_bit(mask, dtype):
    attention_cases.check_invariant("cpp", mask, dtype)
