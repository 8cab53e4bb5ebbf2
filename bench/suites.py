"""Every suite of the bench, by the op, or the larger thing, that it times."""

from __future__ import annotations

from bench import (
    attention_suites,
    commit_suite,
    diffusion_gemma_suite,
    generate_suite,
    growth_suites,
    head_suites,
    norm_suites,
    sampling_suites,
)
from bench.comparison import Suite, merged

SUITES: dict[str, Suite] = {
    "sample_tokens": merged(sampling_suites.sample_tokens, sampling_suites.restricted),
    "sample_from_hidden": head_suites.sample_from_hidden,
    "soft_embedding": head_suites.soft_embedding,
    "sample_with_soft_embedding": head_suites.sample_with_soft_embedding,
    "commit_step": commit_suite.commit_step,
    "attention": merged(attention_suites.square, attention_suites.canvas, attention_suites.prefill),
    "rms_norm": norm_suites.rms_norm,
    "qk_norm_rope": norm_suites.qk_norm_rope,
    "step": diffusion_gemma_suite.step,
    "generate": merged(generate_suite.pycode, generate_suite.llada),
    "growth": merged(growth_suites.growth, generate_suite.pycode_by_batch),
}
# what has one dtype: float32 on a CPU, bfloat16 on a GPU
ONE_DTYPE = ("step", "generate", "growth")
