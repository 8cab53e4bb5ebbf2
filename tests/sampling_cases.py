"""Cases of ``sample_tokens`` with every combination of its settings, and where rounding may decide one."""

from __future__ import annotations

import math

import torch
from backends import is_rounding_boundary
from hypothesis import strategies as st

from diffusion_runtime import ops
from diffusion_runtime.ops._restriction import allowed_words, kept
from diffusion_runtime.ops._sample_reference import softcapped
from diffusion_runtime.testing import awkward_logits

# what may be cut and how, as property-based tests draw it
CASES = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 5),
        "vocab": st.sampled_from([1, 2, 31, 33, 127, 128, 129, 1000, 2049, 4500]),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7, "mixed"]),
        "top_k": st.sampled_from([None, 0, 1, 3, 50, 10_000, "mixed"]),
        "top_p": st.sampled_from([None, 0.0, 0.1, 0.5, 0.9, 0.999, 1.0, "mixed"]),
        "min_p": st.sampled_from([None, 0.0, 0.01, 0.3, 1.0, "mixed"]),
        "allowed": st.sampled_from([None, "one", "few", "most", "shared"]),
        "suppress": st.booleans(),
        "softcap": st.sampled_from([None, 8.0]),
        "statistics_temperature": st.sampled_from([1.0, 0.6]),
        "statistics": st.sampled_from(["unrestricted", "restricted"]),
        "masked": st.booleans(),
        "data": st.sampled_from(["noise", "awkward", "ties"]),
        "seed": st.integers(0, 2**31),
    }
)


def build(case):
    """Logits and the arguments of ``sample_tokens`` for a case."""
    g = torch.Generator().manual_seed(case["seed"])
    rows, vocab = case["rows"], case["vocab"]
    if case["data"] == "awkward":
        logits = awkward_logits(6, vocab, seed=case["seed"])[torch.randperm(6, generator=g)[:rows]]
    else:
        logits = torch.randn(rows, vocab, generator=g) * 3
        if case["data"] == "ties":
            logits = logits.round()
    logits = logits.to(case["dtype"])
    mixed = {
        "temperature": torch.tensor([1.0, 0.0, 0.6, 2.0, 0.0])[:rows],
        "top_k": torch.tensor([0, 1, 5, 20, vocab])[:rows],
        "top_p": torch.tensor([0.95, 1.0, 0.4, 0.0, 0.8])[:rows],
        "min_p": torch.tensor([0.0, 0.1, 0.5, 0.02, 1.0])[:rows],
    }
    arguments = {name: mixed[name] if case[name] == "mixed" else case[name] for name in mixed}
    for name in ("softcap", "statistics_temperature", "statistics", "seed"):
        arguments[name] = case[name]
    if case["allowed"]:
        share = {"one": 0.0, "few": 0.05, "most": 0.9, "shared": 0.5}[case["allowed"]]
        mask = torch.rand(1 if case["allowed"] == "shared" else rows, vocab, generator=g) < share
        finite = (logits > -math.inf).all(0).nonzero()[:, 0]  # a token that each row can draw
        if len(finite) == 0:
            mask[:] = True
        else:
            mask[:, finite[-1]] = True
        arguments["allowed"] = ops.pack_allowed(mask)
    if case["suppress"] and vocab > 100:
        keep = logits.clone() if not case["allowed"] else logits.masked_fill(~mask, -math.inf)
        ids = [0, 33, vocab - 1, int(keep[0].argmax())]
        rest = keep.clone()
        rest[:, ids] = -math.inf
        if (rest.amax(-1) > -math.inf).all():
            arguments["suppress"] = ids
    if case["masked"]:
        arguments["masked"] = torch.arange(rows) % 2 == 0
    return logits, arguments


def at_a_cut(logits, arguments, expected):
    """``[rows]``: whether rounding may decide what is cut of a row, because a token lies at the edge."""
    decided = torch.zeros(len(logits), dtype=torch.bool)
    for change in (1e-4, -1e-4):
        nudged = dict(arguments)
        for name in ("top_p", "min_p"):
            value = nudged.get(name)
            if value is not None:
                nudged[name] = (torch.as_tensor(value) + change).clamp(0, 1) * torch.ones(len(logits))
        other = ops.sample_tokens(logits.double(), backend="reference", **nudged)
        same_sum = torch.isclose(other.logsumexp, expected.logsumexp, atol=1e-7, equal_nan=True)
        decided |= (other.token != expected.token) | ~same_sum
    return decided


def at_an_edge_of_a_mass(logits, arguments, got, truth):
    """``[rows]``: whether the tokens differ, and the uniforms lie where two roundings of a mass may part."""
    x = logits.double()
    softcap = arguments["softcap"]
    y = softcapped(x, softcap or 0.0)
    temperature, top_k, top_p, min_p = (
        torch.as_tensor(default if arguments[name] is None else arguments[name]).expand(len(x))
        for name, default in (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    )
    words = allowed_words(x.shape[:1], x.shape[1], x.device, arguments.get("allowed"), arguments.get("suppress"))
    keep = kept(x, y, temperature.double(), words, top_k, top_p.double(), min_p.double())
    parted = torch.zeros(len(x), dtype=torch.bool)
    for r in (got.token != truth.token).nonzero()[:, 0].tolist():
        uniforms = ops.philox_uniforms(arguments["seed"], r, 0, ops.DRAW_TOKEN)
        tokens = {int(got.token[r]), int(truth.token[r])}
        row = y[r].masked_fill(~keep[r], -math.inf)
        both = (float(uniforms[0]), float(uniforms[1]))
        parted[r] = is_rounding_boundary(row, float(temperature[r]), both, tokens)
    return parted
