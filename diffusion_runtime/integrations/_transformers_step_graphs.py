"""Denoising steps over fixed memory: the first two of a canvas as they come, the third recorded, then replays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffusion_runtime.integrations._transformers_denoising_step import State, Step

Replay = Callable[[], object]
Record = Callable[[Callable[[], None]], Replay]

logger = logging.getLogger(__name__)
# Kernels are compiled and loaded when they run for the first time, which must not happen while a graph is recorded. The
# first step of a canvas has nothing to condition itself on, so that only the second runs them all. The temperature is a
# tensor in every step, since a number could mean another kernel.
NUM_EAGER = 2


class StepGraphs:
    """Takes the steps of one model.

    Within a canvas nothing changes but what a step leaves to the next, its temperature and its seeds; the length of the
    cache does between canvases, so that each has a graph of its own. A generation's graph and memory go when it ends.

    Args:
        record: runs a function of no arguments, or only notes what it would do, and returns what does the same again,
            on the same memory.
        required: whether a step that cannot be recorded is an error. Otherwise it is said in the log, once, and steps
            are taken as they come from then on.
    """

    def __init__(self, record: Record, *, required: bool) -> None:
        self.record: Record | None = record
        self.required = required
        self.canvases: WeakKeyDictionary[Any, _Canvas] = WeakKeyDictionary()

    def take(self, step: Step, state: State, temperature: float, seed: Tensor, *, generation: object) -> State:
        """``step(state, temperature, seed)``, the temperature as a tensor. The next step overwrites the result.

        Args:
            step: the same function throughout a canvas.
            state: what this returned before, or a first one: without anything carried.
            seed: ``[batch, 1]`` int64.
            generation: any object that lives as long as the generation does.
        """
        if state.carried is None:
            self.canvases[generation] = _Canvas()
        canvas = self.canvases[generation]
        canvas.num_steps += 1
        at = torch.full((), temperature, device=seed.device)
        if self.record is None or canvas.num_steps <= NUM_EAGER:
            return step(state, at, seed)
        try:
            return canvas.take(self.record, step, state, at, seed)
        except RuntimeError as error:
            if self.required or canvas.replay is not None:
                raise
            logger.warning("the denoising step cannot be recorded, and is not replayed from now on: %s", error)
            self.record = None
            return step(state, at, seed)


class _Canvas:
    num_steps = 0
    replay: Replay | None = None
    memory: State
    temperature: Tensor
    seed: Tensor

    def take(self, record: Record, step: Step, state: State, temperature: Tensor, seed: Tensor) -> State:
        if self.replay is None:
            memory, own_temperature, own_seed = state, temperature.clone(), seed.clone()
            self.replay = record(lambda: step(memory, own_temperature, own_seed).write_to(memory))
            self.memory, self.temperature, self.seed = memory, own_temperature, own_seed
        else:
            state.write_to(self.memory)  # itself, unless a caller changed it
            self.temperature.copy_(temperature)
            self.seed.copy_(seed)
        self.replay()
        return self.memory


def cuda_graphs() -> Record:
    """Records CUDA graphs, all in one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        replay: Replay = graph.replay
        return replay

    return record
