"""What the loop of :mod:`diffusion_runtime.denoiser` is made of: requests, rows, batches, and a forward."""

from diffusion_runtime.denoising.batch import Batch, decide
from diffusion_runtime.denoising.constrained import judge_rows
from diffusion_runtime.denoising.forward import Forward
from diffusion_runtime.denoising.noise import denoise_noise
from diffusion_runtime.denoising.requests import Request, Result, check_prompts, seeds_of, stop_strings
from diffusion_runtime.denoising.rows import Defaults, Row, blocks_between, num_steps_per_block, result_of, row_of
from diffusion_runtime.denoising.step import Step, last_tokens

__all__ = [
    "Batch",
    "Defaults",
    "Forward",
    "Request",
    "Result",
    "Row",
    "Step",
    "blocks_between",
    "check_prompts",
    "decide",
    "denoise_noise",
    "judge_rows",
    "last_tokens",
    "num_steps_per_block",
    "result_of",
    "row_of",
    "seeds_of",
    "stop_strings",
]
