"""What the commands that denoise share: a model, a denoiser, and its steps with their times."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from diffusion_runtime import decoding, tracing
from diffusion_runtime.cli import backends
from diffusion_runtime.cli.errors import MISSING, CommandError, killed_by_interrupt
from diffusion_runtime.cli.output import announced
from diffusion_runtime.denoiser import Denoiser, Step
from diffusion_runtime.loading import SHIPPED, load, local_folder
from diffusion_runtime.ops import BackendUnavailableError
from diffusion_runtime.ops._registry import REGISTRY


class Progressed(NamedTuple):
    """A step, and what a person wants to know about it."""

    step: Step
    num_committed: int
    num_left: int
    least_confidence: float | None  # the probability of the committed token that had least; None: none was committed
    seconds: float  # spent in the model and the loop so far

    @property
    def num_forwards(self) -> int:
        return self.step.index + 1


def load_model(path: str | Path, device: str, *, dtype: torch.dtype | None = None, quiet: bool = False) -> Any:
    """A checkpoint as a model on a device; every failure is a CommandError.

    Without a dtype it has its own, but the models of this package have float32: few CPUs are quick in bfloat16.
    """
    folder = local_folder(path)
    if dtype is None and folder is not None and folder.parent == SHIPPED:
        dtype = torch.float32
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise CommandError(f"--device {device}: {reason}; see: diffusion-runtime doctor", MISSING) from error
    try:
        with announced(f"loading {path}", quiet=quiet), killed_by_interrupt():
            return load(path, dtype=dtype, device=device)
    except ValueError as error:
        raise CommandError(f"{error}; --model takes a folder with config.json and model.safetensors") from error
    except ImportError as error:
        raise CommandError(error, MISSING) from error
    except OSError as error:
        raise CommandError(f"{error}; --model takes a folder with config.json and its weights", MISSING) from error


@contextmanager
def _refusals() -> Iterator[None]:
    """What the library refuses, as a CommandError."""
    try:
        yield
    except BackendUnavailableError as error:
        raise CommandError(f"{error}; leave --backend out, or see: diffusion-runtime doctor", MISSING) from error
    except ValueError as error:
        raise CommandError(error) from error


def make_denoiser(model: Any, args: argparse.Namespace, **settings: Any) -> Denoiser:
    """The denoiser that the options describe, with further settings."""
    policy = args.policy
    if args.threshold is not None:
        policy = decoding.Policy(partial(decoding.threshold, threshold=args.threshold), scheduled=False)
    weight = next(model.parameters())
    with _refusals():
        REGISTRY["sample_tokens"].resolve(weight.device.type, weight.dtype, args.backend)
    return Denoiser(
        model,
        policy=policy,
        num_steps=args.steps,
        block_length=getattr(args, "block_length", None),
        temperature=getattr(args, "temperature", 0.0),
        backend=args.backend,
        **settings,
    )


def sampling_backend(model: Any, args: argparse.Namespace) -> str:
    """The backend of ``sample_tokens`` for the logits of this model."""
    weight = next(model.parameters())
    return backends.label("sample_tokens", weight.device.type, weight.dtype, args.backend)


def denoise(
    denoiser: Denoiser,
    tokens: Tensor,
    *,
    file: TextIO | None,
    text_of: Callable[[int], bytes] | None = None,
    about: dict[str, Any] | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> Iterator[Progressed]:
    """Run the loop, writing a trace to ``file`` on the way; what it refuses is a CommandError."""
    steps = denoiser.stream(tokens, max_new_tokens=max_new_tokens, seed=seed)
    if file is not None:
        mask = denoiser.mask_token_id
        steps = tracing.write(steps, file, tokens=tokens, mask_token_id=mask, text_of=text_of, about=about)
    seconds = 0.0
    while True:
        started = time.perf_counter()
        try:
            with _refusals():
                step = next(steps)
        except StopIteration:
            return
        num_left = int((step.tokens == denoiser.mask_token_id).sum())  # waits for the device
        seconds += time.perf_counter() - started
        committed = step.samples.logprob[step.at_blocks(step.commit_mask)].exp()
        least = float(committed.min()) if len(committed) else None
        yield Progressed(step, len(committed), num_left, least, seconds)


@contextmanager
def trace_file(path: str | None) -> Iterator[TextIO | None]:
    """The file of ``--trace``, opened before any work is done."""
    with ExitStack() as stack:
        file = None
        if path is not None:
            try:
                file = stack.enter_context(Path(path).open("w", encoding="utf-8"))
            except OSError as error:
                raise CommandError(f"--trace: cannot write {path}: {error.strerror}; name another file") from error
        yield file
