"""The C++ backend of ``sample_from_hidden``, of the soft embeddings, and of both at once: what is around the kernels.

torch makes a tile of logits that fits a cache, C++ keeps what is needed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_runtime.ops._instruction_set import instruction_set
from diffusion_runtime.ops._products import add_product, head_product
from diffusion_runtime.ops._sample_reference import softcapped
from diffusion_runtime.ops._settings import Settings

if TYPE_CHECKING:
    from diffusion_runtime.ops._sample_from_hidden import Run
    from diffusion_runtime.ops._soft_embedding import Softmax, Weigh

# hidden, weight, bias, embedding, settings without masked rows -> ids, statistics, soft embeddings
RunWithEmbedding = Callable[[Tensor, Tensor, Tensor | None, Tensor, Settings], tuple[Tensor, Tensor, Tensor]]

CHUNK = 2048  # tokens: kChunk of csrc/cpu/sample_row.h
# Of the logits of a tile, where it has more than a chunk, by the size of an element. Threads meet twice in each tile:
# those of 16-bit floats, whose products take less time, are larger.
TILE_BYTES = {2: 1 << 22, 4: 1 << 21}
MOST_ROWS = 1024  # at once: what is kept takes 12 bytes a row for each 512 tokens, and a tile has a chunk at least


def tiles(rows: int, vocab: int, element_size: int) -> Iterator[slice]:
    """The vocabulary in tiles of whole chunks. What is left joins the last one: products of few tokens round otherwise,
    and a row must not depend on how many there are."""
    size = max(1, TILE_BYTES[element_size] // (rows * element_size) // CHUNK) * CHUNK
    first = 0
    while first < vocab:
        last = first + size if vocab - first - size >= CHUNK else vocab
        yield slice(first, last)
        first = last


def load_sample_from_hidden() -> Run:
    wanted = instruction_set()
    return lambda hidden, weight, bias, settings: run_cpp(hidden, weight, bias, settings, wanted)


def load_sample_with_soft_embedding() -> RunWithEmbedding:
    wanted = instruction_set()
    return lambda hidden, weight, bias, embedding, settings: run_with_embedding_cpp(
        hidden, weight, bias, embedding, settings, wanted
    )


def load_weigh() -> Weigh:
    wanted = instruction_set()
    return lambda logits, softmax, out: weigh_cpp(logits, softmax, out, wanted)


def run_cpp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, instruction_set: str
) -> tuple[Tensor, Tensor]:
    if 0 < len(hidden) <= MOST_ROWS:
        return _of_group(hidden.contiguous(), weight, bias, settings, instruction_set)
    ids = torch.empty(2, len(hidden), dtype=torch.int64)
    statistics = torch.empty(5, len(hidden), dtype=torch.float32)
    for first in range(0, len(hidden), MOST_ROWS):
        group = slice(first, first + MOST_ROWS)
        found = _of_group(hidden[group].contiguous(), weight, bias, settings.of_rows(group), instruction_set)
        ids[:, group], statistics[:, group] = found
    return ids, statistics


def run_with_embedding_cpp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, embedding: Tensor, settings: Settings, instruction_set: str
) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.empty(2, len(hidden), dtype=torch.int64)
    statistics = torch.empty(5, len(hidden), dtype=torch.float32)
    expected = torch.empty(len(hidden), embedding.shape[1], dtype=embedding.dtype)
    for first in range(0, len(hidden), MOST_ROWS):
        group = slice(first, first + MOST_ROWS)
        rows, of_rows = hidden[group].contiguous(), settings.of_rows(group)
        sums = _WeightedSums(len(rows), embedding, of_rows, instruction_set)
        ids[:, group], statistics[:, group] = _of_group(rows, weight, bias, of_rows, instruction_set, sums.add)
        expected[group] = sums.over(statistics[4, group])
    return ids, statistics, expected


class _WeightedSums:
    """Embeddings summed tile by tile, each weighted by its probability relative to the largest so far."""

    LOWEST = -1e30  # stands for the -inf of a row that has no token yet, of which no difference can be taken

    def __init__(self, rows: int, embedding: Tensor, settings: Settings, instruction_set: str) -> None:
        self.embedding, self.settings, self.instruction_set = embedding, settings, instruction_set
        self.total = torch.zeros(rows, embedding.shape[1], dtype=torch.promote_types(embedding.dtype, torch.float32))
        self.top = torch.full((rows,), self.LOWEST)
        narrow = torch.float32 if embedding.dtype == torch.float64 else embedding.dtype
        self.weights = torch.empty(rows, 0, dtype=narrow)  # of a tile

    def add(self, logits: Tensor, tile: slice) -> None:
        from diffusion_runtime.ops._soft_embedding import Softmax

        temperature, softcap = self.settings.temperature, self.settings.softcap
        top = torch.maximum(self.top, softcapped(logits.amax(1).float(), softcap) / temperature)
        if self.weights.shape[1] < logits.shape[1]:
            self.weights = torch.empty(logits.shape, dtype=self.weights.dtype)
        part = self.weights[:, : logits.shape[1]]
        weigh_cpp(logits[None], Softmax(temperature, softcap, None, top), part, self.instruction_set)
        self.total *= (self.top - top).exp()[:, None]
        add_product(self.total, part.to(self.embedding.dtype), self.embedding[tile])
        self.top = top

    def over(self, logsumexp: Tensor) -> Tensor:
        """The sums over those of the weights, whose logarithm this is."""
        return (self.total * (self.top - logsumexp).exp()[:, None]).to(self.embedding.dtype)


def _of_group(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: Settings,
    instruction_set: str,
    also: Callable[[Tensor, slice], None] | None = None,
) -> tuple[Tensor, Tensor]:
    from diffusion_runtime import _C

    rows, vocab = len(hidden), len(weight)
    temperatures = settings.temperature, settings.statistics_temperature
    workspace = torch.empty(_C.head_workspace(rows, vocab, settings.temperature), dtype=torch.uint8)
    product = head_product(weight)
    for tile in tiles(rows, vocab, hidden.element_size()):
        logits = product(hidden, weight[tile], None if bias is None else bias[tile])
        _C.read_head_tile(
            logits, tile.start, vocab, *temperatures, settings.softcap, settings.allowed, workspace, instruction_set
        )
        if also is not None:
            also(logits, tile)
        del logits  # before the next ones are made
    ids, statistics = torch.empty(2, rows, dtype=torch.int64), torch.empty(5, rows, dtype=torch.float32)
    of_rows = settings[1:8]  # from temperature to allowed
    _C.sample_head(hidden, weight, bias, *of_rows, workspace, ids, statistics, instruction_set)
    return ids, statistics


def weigh_cpp(logits: Tensor, softmax: Softmax, out: Tensor, instruction_set: str) -> None:
    from diffusion_runtime import _C

    temperature, softcap, masked, logsumexp = softmax
    assert logsumexp is not None
    _C.weigh(logits, temperature, softcap, masked, logsumexp.float(), out, instruction_set)
