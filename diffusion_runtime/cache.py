"""Keys and values of what need not be computed again, in pages of one pool.

============ ===================================== ======================== ==========================================
cache        computed in a step                    for attention            exact?
============ ===================================== ======================== ==========================================
``"none"``   everything                            any                      yes
``"prefix"`` the current block and what follows it both ways                no: keys before the block are those of the
                                                                            block's first step
``"dual"``   the current block                     both ways                no: all other keys are those of that step
``"block"``  the current block                     causal by blocks         yes, up to the order of sums
============ ===================================== ======================== ==========================================

Sources: prefix and dual are Fast-dLLM's (Wu et al., 2025), block is that of every block diffusion model.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from diffusion_runtime import ops
from diffusion_runtime.nn import AttentionContext
from diffusion_runtime.ops._decoder_layers import LayerKeys

CACHES = ("none", "prefix", "dual", "block")
_LEAST_PAGE = 64  # positions; a whole number of blocks


def check_cache(cache: str, block_length: int | None, refresh_interval: int | None, *, has_keys: bool) -> None:
    """Whether a model can be run with a cache.

    Raises:
        ValueError: an unknown one, or one that its attention does not allow; the message says why.
    """
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
    if cache != "none" and not has_keys:
        raise ValueError(f"cache {cache!r} needs a native model, or one with a key_shape: others keep theirs")
    if cache == "block" and block_length is None:
        raise ValueError(
            "cache 'block' needs attention that is causal from block to block; here every position sees all"
        )
    if cache in ("prefix", "dual") and block_length is not None:
        raise ValueError(f"cache {cache!r} is for attention both ways: 'block' is exact for this model")
    if refresh_interval is not None and (refresh_interval < 1 or cache not in ("prefix", "dual")):
        raise ValueError(
            f"refresh_interval must be at least 1, and belongs to 'prefix' and 'dual', got {refresh_interval} and "
            f"{cache!r}"
        )


def page_size_of(block_length: int | None) -> int:
    """Positions of a page: a whole number of blocks."""
    block = block_length or 1
    return -(-_LEAST_PAGE // block) * block


class Pages:
    """A pool of pages for the keys and values of all layers, and which sequences use them.

    Pages whose keys depend on nothing but the tokens up to their end can be *published* under these tokens. They are
    then found again by later sequences that begin with the same tokens, until their place is needed.

    Args:
        num_layers, kv_heads, head_dim: of the model.
        block_length: of its attention; a page holds a whole number of blocks.
        dtype, device: of the keys.
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        block_length: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size_of(block_length)
        # [layers, keys and values, pages, positions, heads, head_dim]; page 0 takes what nobody reads, keys of padding
        shape = (num_layers, 2, 1, self.page_size, kv_heads, head_dim)
        self.pool = torch.zeros(shape, dtype=dtype, device=device)
        self._free: list[int] = []
        self._users: dict[int, int] = {}
        self._published: OrderedDict[bytes, int] = OrderedDict()  # the oldest first
        self._key_of: dict[int, bytes] = {}

    def hold(self, pages: Sequence[int]) -> None:
        """One more sequence uses these."""
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1

    def pages_of(self, length: int) -> int:
        """How many pages so many positions take."""
        return -(-length // self.page_size)

    def make_room(self, count: int) -> None:
        """See to it that so many pages are free: forget what nobody uses, then enlarge the pool, in one go."""
        while len(self._free) < count and self._forget_one():
            pass
        missing, held = count - len(self._free), self.pool.shape[2]
        if missing > 0:
            larger = self.pool.new_zeros(*self.pool.shape[:2], held + missing, *self.pool.shape[3:])
            larger[:, :, :held] = self.pool
            self.pool = larger
            self._free.extend(range(held, held + missing))

    def take(self, count: int) -> list[int]:
        """So many free pages, for one sequence."""
        self.make_room(count)
        pages = [self._free.pop() for _ in range(count)]
        self.hold(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """A sequence is done with its pages. What is published stays until its place is needed."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page not in self._key_of:
                    self._free.append(page)

    def publish(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """The pages that ``tokens`` fill are theirs, and nothing is written there any more."""
        for key, page in zip(self._keys(tokens), pages, strict=False):
            if key not in self._published and page not in self._key_of:
                self._published[key] = page
                self._key_of[page] = key

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The published pages that ``tokens`` begin with."""
        pages = []
        for key in self._keys(tokens):
            if key not in self._published:
                break
            self._published.move_to_end(key)
            pages.append(self._published[key])
        return pages

    def _keys(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Of each full page, a digest of all tokens up to its end."""
        digest = b""
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            page = array("q", tokens[end - self.page_size : end]).tobytes()
            digest = blake2b(digest + page, digest_size=16).digest()
            yield digest

    def table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """``[rows, most pages]`` int32, 0 behind a row's last page."""
        most = max(map(len, rows), default=0)
        padded = [[*pages, *[0] * (most - len(pages))] for pages in rows]
        return torch.tensor(padded, dtype=torch.int32, device=self.pool.device).view(len(rows), most)

    def _forget_one(self) -> bool:
        for key, page in self._published.items():
            if page not in self._users:
                del self._published[key], self._key_of[page]
                self._free.append(page)
                return True
        return False


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedContext(AttentionContext):
    """The context of tokens whose sequences have keys in pages.

    Args:
        pages: the pool.
        table: ``[batch, most pages]`` int32, as :meth:`Pages.table` makes it.
        starts: ``[batch]`` int64, where each row's tokens begin in its sequence.
        kept: ``[batch]`` int64, how many keys of the pool each row sees; None: all are among those computed now.
        overwrites: the keys computed now are put into the pool first, and are read there: ``kept`` counts them too.
        keep_from, keep_to: ``[batch]`` int64, the positions whose keys are written; None: none are.
    """

    pages: Pages
    table: Tensor
    starts: Tensor
    kept: Tensor | None
    overwrites: bool = False
    keep_from: Tensor | None = None
    keep_to: Tensor | None = None
    width: int = 0  # of the tokens

    def __post_init__(self) -> None:
        position = self.starts[:, None] + torch.arange(self.width, device=self.starts.device)
        object.__setattr__(self, "_positions", position)
        object.__setattr__(self, "_rotary", {})  # the same in every step of a block
        if self.keep_from is None or self.keep_to is None:
            return
        written = (position >= self.keep_from[:, None]) & (position < self.keep_to[:, None])
        size = self.pages.page_size
        number = (position // size).clamp(max=self.table.shape[1] - 1)
        page = self.table.long().gather(1, number).where(written, 0)
        object.__setattr__(self, "_places", (page * size + position % size).flatten())

    def positions(self, tokens: Tensor) -> Tensor:
        del tokens
        positions: Tensor = self._positions  # type: ignore[attr-defined]
        return positions

    def rotary(self, tokens: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        asked = (rotary_dim, theta)
        if asked not in self._rotary:  # type: ignore[attr-defined]
            self._rotary[asked] = super().rotary(tokens, rotary_dim, theta)  # type: ignore[attr-defined]
        found: tuple[Tensor, Tensor] = self._rotary[asked]  # type: ignore[attr-defined]
        return found

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pool = self.pages.pool[layer]
        if self.keep_from is not None:
            for kept, new in zip(pool, (key, value), strict=True):
                kept.flatten(0, 1).index_copy_(0, self._places, new.transpose(1, 2).flatten(0, 1))  # type: ignore[attr-defined]
        if self.kept is None:
            return ops.attention(query, key, value, mask=self.mask, lengths=self.lengths)
        prefix = ops.PagedPrefix(pool.transpose(2, 3), self.table, self.kept)
        if self.overwrites:
            return ops.attention(query, key[:, :, :0], value[:, :, :0], prefix=prefix)
        return ops.attention(query, key, value, prefix=prefix, mask=self.mask, lengths=self.lengths)

    def layer_keys(self) -> LayerKeys | None:
        if type(self).attend is not CachedContext.attend:
            return None
        places = None if self.keep_from is None else self._places  # type: ignore[attr-defined]
        pool = None if places is None and self.kept is None else self.pages.pool
        if self.overwrites:
            return LayerKeys(None, None, pool, places, self.kept, self.table, own=self.kept is None)
        return LayerKeys(self.mask, self.lengths, pool, places, self.kept, self.table)
