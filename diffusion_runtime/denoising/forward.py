"""From the tokens of a batch to the states of its current blocks, with what a cache keeps of the steps before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.cache import CachedContext, Pages
from diffusion_runtime.denoising.batch import Batch, noise_level
from diffusion_runtime.denoising.rows import Row
from diffusion_runtime.models import LanguageModel
from diffusion_runtime.nn import AttentionContext


class Span(NamedTuple):
    """What a forward computes of one row."""

    start: int
    stop: int
    kept: int | None  # how many keys of the cache it sees; None: it sees what it computes
    keeps: tuple[int, int] | None  # the positions whose keys the cache takes


class Forward:
    """Runs the model where its current blocks need it.

    Args:
        model: native, or wrapped.
        cache: one of :data:`diffusion_runtime.cache.CACHES`.
        refresh_interval: with ``"prefix"`` and ``"dual"``, after how many steps of a block all keys are computed anew;
            None: at a block's first step only.
        guidance_scale: ``w``; the states are then ``u + (w + 1) (c - u)``, ``u`` those of the sequences whose given
            tokens are masked. A head is linear, so its logits are the same as if these had been combined, at half the
            cost.
    """

    def __init__(self, model: LanguageModel, cache: str, refresh_interval: int | None, guidance_scale: float) -> None:
        if cache == "block" and model.noise_conditioned:
            raise ValueError("cache 'block' would keep keys of other noise levels, which the model is conditioned on")
        self.model = model
        self.cache = cache
        self.refresh_interval = refresh_interval
        self.guidance_scale = guidance_scale
        self.shares = cache == "block" and not guidance_scale  # with guidance both branches are computed together
        self.pages: Pages | None = None
        if model.key_shape is not None and cache != "none":
            weight = next(model.parameters())
            self.pages = Pages(
                *model.key_shape, block_length=model.block_length, dtype=weight.dtype, device=weight.device
            )

    def begin(self, rows: list[Row]) -> None:
        """Room in the cache for new rows, and what it holds already of their prompts."""
        if self.pages is None:
            return
        pages = self.pages
        for row in rows:
            if self.shares and row.blocks:
                first = row.blocks[0].start - int(self.model.shifted)
                row.pages = pages.find(row.prompt[: max(0, first)])
                row.kept = len(row.pages) * pages.page_size
                pages.hold(row.pages)
        missing = [pages.pages_of(row.length) - len(row.pages) for row in rows]
        pages.make_room(sum(missing) * (2 if self.guidance_scale else 1))
        for row, count in zip(rows, missing, strict=True):
            row.pages = [*row.pages, *pages.take(count)]
            row.guide_pages = pages.take(count) if self.guidance_scale else []

    def end(self, batch: Batch, numbers: list[int] | None = None) -> None:
        """Give the room of these rows back, or of all; what was computed may serve requests that begin alike."""
        if self.pages is None:
            return
        for i in range(len(batch.rows)) if numbers is None else numbers:
            row = batch.rows[i]
            if self.shares:
                self.pages.publish(batch.tokens[i, : row.kept].tolist(), row.pages)
            self.pages.release(row.pages)
            self.pages.release(row.guide_pages)
            row.pages, row.guide_pages = [], []

    def states(self, batch: Batch) -> Tensor:
        """``[rows, width, dim]`` states, or logits where the model has no head, that belong to each position."""
        if self.pages is None:
            return self._mixed(batch, list(range(len(batch.rows))), None)
        spans = {i: self._span(row) for i, row in enumerate(batch.rows) if row.blocks}
        groups: dict[bool, list[int]] = {}  # those that compute much to keep it, and those that do not
        for i, span in spans.items():
            groups.setdefault(span.keeps is not None and not self._overwrites(span), []).append(i)
        parts = [(rows, self._mixed(batch, rows, spans)) for rows in groups.values()]
        for i, span in spans.items():
            if span.keeps is not None:
                row = batch.rows[i]
                row.kept = span.keeps[1]
                if self.shares and span.keeps[0] < row.prompt_length:  # others may begin with this prompt
                    self.pages.publish(row.prompt[: row.kept], row.pages)
        rows, first = parts[0]
        if len(rows) == len(batch.rows):
            return first
        whole = first.new_zeros(len(batch.rows), *first.shape[1:])
        for rows, part in parts:
            whole[batch.index_of(rows)] = part
        return whole

    def _overwrites(self, span: Span) -> bool:
        return self.cache == "dual" and span.kept is not None

    def _span(self, row: Row) -> Span:
        block = row.blocks[0]
        start = max(0, block.start - int(self.model.shifted))
        if self.cache == "block":
            keeps = (row.kept, start) if row.kept < start else None
            return Span(min(row.kept, start), block.stop, min(row.kept, start), keeps)
        if row.index == 0 or (self.refresh_interval is not None and row.index % self.refresh_interval == 0):
            return Span(0, row.length, None, (0, row.length))
        if self.cache == "prefix":
            return Span(start, row.length, start, None)
        return Span(start, block.stop, row.length, (start, block.stop))

    def _mixed(self, batch: Batch, rows: list[int], spans: dict[int, Span] | None) -> Tensor:
        """States of some rows, both branches combined."""
        if not self.guidance_scale:
            return self._of_rows(batch, rows, spans, batch.tokens)
        hidden = batch.tokens.masked_fill(~batch.editable, batch.mask_token_id)
        conditional, unconditional = self._of_rows(batch, rows, spans, batch.tokens, hidden).chunk(2)
        wide = torch.promote_types(conditional.dtype, torch.float32)
        mixed = torch.lerp(unconditional.to(wide), conditional.to(wide), self.guidance_scale + 1)
        return mixed.to(conditional.dtype)

    def _of_rows(self, batch: Batch, rows: list[int], spans: dict[int, Span] | None, *tokens: Tensor) -> Tensor:
        """Of each branch, whose tokens are given, one after the other."""
        if spans is None:
            return self._uncached(batch, *tokens)
        context = self._context(batch, rows, [spans[i] for i in rows], len(tokens))
        positions, index = batch.position, None if len(rows) == len(batch.rows) else batch.index_of(rows)
        if index is not None:
            tokens, positions = tuple(x[index] for x in tokens), positions[index]
        computed = context.positions(tokens[0]).clamp(max=batch.tokens.shape[1] - 1)
        states = self._hidden(batch, index, torch.cat(tokens).gather(1, computed), context)
        if batch.even and not self.model.shifted and all(self._is_block(batch.rows[i], spans[i]) for i in rows):
            return states
        return self._at(states, positions - context.starts[: len(rows), None])

    @staticmethod
    def _is_block(row: Row, span: Span) -> bool:
        return (span.start, span.stop) == (row.blocks[0].start, row.blocks[0].stop)

    def _uncached(self, batch: Batch, *tokens: Tensor) -> Tensor:
        stop = batch.tokens.shape[1]
        if self.model.block_length is not None:  # what lies behind the current block is not seen
            stop = max(row.blocks[0].stop for row in batch.rows if row.blocks)
        context = self.model.whole_sequences()
        if batch.ragged:
            lengths = batch.lengths[:, 0].clamp(max=stop).repeat(len(tokens))
            context = AttentionContext(context.mask, lengths)
        states = self._hidden(batch, None, torch.cat([x[:, :stop] for x in tokens]), context)
        blocks = {(row.blocks[0].start, row.blocks[0].stop) if row.blocks else None for row in batch.rows}
        block = blocks.pop()
        if block is None or blocks or self.model.shifted:
            return self._at(states, batch.position)
        return states[:, slice(*block)]  # a view

    def _hidden(self, batch: Batch, rows: Tensor | None, tokens: Tensor, context: AttentionContext) -> Tensor:
        """Of these rows, or all, in each branch."""
        level = {}
        if self.model.noise_conditioned:
            sigma = noise_level(batch)
            sigma = sigma if rows is None else sigma[rows]
            level = {"sigma": sigma.repeat(len(tokens) // len(sigma))}
        return self.model.hidden(tokens, context, **level)

    def _at(self, states: Tensor, positions: Tensor) -> Tensor:
        """The states that belong to these positions; each branch has the same."""
        places = (positions - int(self.model.shifted)).clamp(0, states.shape[1] - 1)
        places = places.repeat(len(states) // len(places), 1)[..., None]
        return states.gather(1, places.expand(-1, -1, states.shape[-1]))

    def _context(self, batch: Batch, rows: list[int], spans: list[Span], branches: int) -> CachedContext:
        """The same from step to step of a block, so that nothing is sent to the device."""
        assert self.pages is not None
        pages = self.pages
        contexts = batch.contexts
        key = (*rows, *(x if isinstance(x, int) else -1 for span in spans for x in span[:3]))
        if key in contexts:
            return contexts[key]

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values * branches, dtype=torch.int64, device=batch.tokens.device)

        kept = None if spans[0].kept is None else column([span.kept or 0 for span in spans])
        tables = [batch.rows[i].pages for i in rows]
        if branches > 1:
            tables = tables + [batch.rows[i].guide_pages for i in rows]
        keeps = [span.keeps or (0, 0) for span in spans]
        keeping = any(span.keeps for span in spans)
        contexts[key] = CachedContext(
            mask=self.model.whole_sequences().mask,
            lengths=column([span.stop - span.start for span in spans]),
            pages=pages,
            table=pages.table(tables),
            starts=column([span.start for span in spans]),
            kept=kept,
            overwrites=self._overwrites(spans[0]),
            keep_from=column([first for first, _ in keeps]) if keeping else None,
            keep_to=column([last for _, last in keeps]) if keeping else None,
            width=max(span.stop - span.start for span in spans),
        )
        return contexts[key]
