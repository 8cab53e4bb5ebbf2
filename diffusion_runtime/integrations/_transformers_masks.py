"""The masks of transformers as rules, where a rule says exactly what the mask says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, masking_utils
from transformers.utils.import_utils import is_tracing

from diffusion_runtime.ops import Bidirectional, Causal, SlidingWindow

Rule = Bidirectional | Causal | SlidingWindow


class RuleMask(Tensor):
    """A ``[batch, 1, length, num_keys]`` bool mask that is not written out, unless someone uses it as a tensor.

    Models index, expand and combine their masks, and ask for shapes and dtypes; every such operation gets the tensor
    that the rule stands for. One that may have changed it, through a view too, makes it the mask from then on.
    """

    rule: Rule
    starts: Tensor | None  # [batch] first key of each sequence that is not padding; None: no padding
    ends: Tensor | None
    written: Tensor | None
    _cuts: dict[int, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]

    @staticmethod
    def __new__(
        cls, rule: Rule, starts: Tensor | None, ends: Tensor | None, shape: tuple[int, ...], device: torch.device
    ) -> RuleMask:
        mask: RuleMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.rule, mask.starts, mask.ends, mask.written, mask._cuts = rule, starts, ends, None, {}
        return mask

    # results are ordinary tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        keep = any(argument.alias_info is not None for argument in func._schema.arguments)
        args, kwargs = tree_map_only(cls, lambda mask: mask.write(keep=keep), (args, kwargs or {}))
        return func(*args, **kwargs)

    def write(self, *, keep: bool = False) -> Tensor:
        """The mask as a tensor; with ``keep`` that tensor is the mask from now on."""
        if self.written is not None:
            return self.written
        dense = write_rule(self.rule, self.starts, self.ends, tuple(self.shape), self.device)
        if keep:
            self.written = dense = dense.contiguous()
        return dense

    def cut(self, at: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Starts and ends within the first ``at`` keys and within the rest; None without padding.

        Every layer of every step asks for the same: they are computed once.
        """
        if self.starts is None or self.ends is None:
            return None
        if at not in self._cuts:
            starts, ends, rest = self.starts, self.ends, self.shape[3] - at
            before = (starts.clamp(0, at), ends.clamp(0, at))
            self._cuts[at] = (before, ((starts - at).clamp(0, rest), (ends - at).clamp(0, rest)))
        return self._cuts[at]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RuleMask({tuple(self.shape)}, {self.rule})"


def write_rule(
    rule: Rule, starts: Tensor | None, ends: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """``[batch, 1, length, num_keys]`` bool, expanded where sequences do not differ."""
    visible = rule.visible_keys()
    key = torch.arange(shape[3], device=device)
    query = torch.arange(shape[2], device=device)[:, None] + visible.offset
    seen = torch.ones(shape[2:], dtype=torch.bool, device=device)
    if visible.left >= 0:
        seen = seen & (key >= query - visible.left)
    if visible.right >= 0:
        seen = seen & (key <= query + visible.right)
    if starts is not None and ends is not None:
        real = (key >= starts[:, None]) & (key < ends[:, None])
        return (seen & real[:, None, :])[:, None]
    return seen.expand(shape)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls for its ``sdpa_mask``: the same mask, as a :class:`RuleMask` where that is exact.

    Raises:
        ValueError: the model does not hand its masks to :func:`attention_forward`, by name.
    """
    config = kwargs.get("config")
    if config is not None and computes_attention_itself(type(config)):
        raise ValueError(
            f'attn_implementation="diffusion_runtime" cannot run {config.model_type}: its layers compute attention '
            "themselves, and would not read these masks as they are meant"
        )
    device = torch.device(device)
    found = None
    if is_tracing(attention_mask) or is_tracing(q_offset):
        if attention_mask is None and _goes_without_mask(
            q_length, kv_length, q_offset, kv_offset, mask_function, kwargs
        ):
            return None
    # Where a static cache counts in a tensor, a rule would have each token's number in it: compiled code that gets the
    # mask of one token would be compiled anew for the next, and on a GPU the number would have to be fetched.
    elif not (isinstance(q_offset, Tensor) and q_length == 1):
        found = _rule_mask(
            (batch_size, 1, q_length, kv_length), int(q_offset), kv_offset, mask_function, attention_mask, device
        )
    if found is not None:
        return found
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense: Tensor = masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )
    return dense


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile does not look into it
def computes_attention_itself(config_class: type) -> bool:
    """Whether the models of a configuration have attention of their own, by transformers' own judgement of its source.

    They add masks to scores, and what they get from here is boolean.
    """
    if config_class not in _JUDGED:
        name = config_class.__module__.replace("configuration_", "modeling_")
        things: list[Any] = list(vars(sys.modules[name]).values()) if name in sys.modules else []
        models: list[Any] = [
            x for x in things if isinstance(x, type) and issubclass(x, PreTrainedModel) and x.__module__ == name
        ]
        _JUDGED[config_class] = bool(models) and not models[0]._can_set_attn_implementation()
    return _JUDGED[config_class]


_JUDGED: dict[type, bool] = {}


def _goes_without_mask(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    allowed: dict[str, Any],
) -> bool:
    """Whether a layer does the same by its ``is_causal`` alone, without a mask; for code that is traced."""
    if mask_function is masking_utils.bidirectional_mask_function:
        return bool(allowed.get("allow_is_bidirectional_skip", False))
    if mask_function is not masking_utils.causal_mask_function or not allowed.get("allow_is_causal_skip", True):
        return False
    return not isinstance(q_offset, Tensor) and q_offset == kv_offset and q_length == kv_length


def _rule_mask(
    shape: tuple[int, int, int, int],
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    device: torch.device,
) -> RuleMask | None:
    reach = _reach(mask_function)
    if reach is None or q_offset < 0:
        return None
    batch, _, _, kv_length = shape
    questions = [(ids >= 0).any() for ids in reach.blocks]  # that must be answered no
    starts = ends = None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + kv_length]
        if attention_mask.dtype != torch.bool or attention_mask.shape[0] != batch or not real.shape[1]:
            return None
        starts, ends, holes, padded = _extent(real, kv_length)
        questions += [holes, padded]
    if questions:
        answers = torch.stack(questions).tolist()  # the one look at values
        if attention_mask is not None and not answers.pop():
            starts = ends = None
        if any(answers):
            return None
    return RuleMask(reach.rule(q_offset - kv_offset), starts, ends, shape, device)


def _extent(real: Tensor, kv_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first real key of each sequence, one past its last, and whether there are holes, or padding at all.

    ``real`` may be shorter than ``kv_length``: what it lacks is padding.
    """
    starts, count = real.to(torch.uint8).argmax(1), real.sum(1)  # argmax is the first of equals
    ends = starts + count
    place = torch.arange(real.shape[1], device=real.device)
    holes = (real != ((place >= starts[:, None]) & (place < ends[:, None]))).any()
    return starts.int(), ends.int(), holes, (count < kv_length).any()


class _Reach(NamedTuple):
    """How far a query sees to each side, and the blocks, if any, within which it sees everything as well."""

    left: int | None
    right: int | None
    blocks: tuple[Tensor, ...] = ()

    def rule(self, offset: int) -> Rule:
        if self.left is None and self.right is None:
            return Bidirectional()
        if self.left is None and self.right == 0:
            return Causal(offset)
        return SlidingWindow(self.left, self.right, offset)


def _reach(function: Callable[..., Any]) -> _Reach | None:
    """What a mask function of transformers says, or None where that is not known for sure.

    The functions are closures. One is known by the very code that transformers' maker of such closures returns, and
    what it closes over says the rest.
    """
    if function is masking_utils.causal_mask_function:
        return _Reach(None, 0)
    if function is masking_utils.bidirectional_mask_function:
        return _Reach(None, None)
    kind = _MAKERS.get(getattr(function, "__code__", None))
    if kind is None:
        return None
    over = [cell.cell_contents for cell in function.__closure__ or ()]
    if len(over) != 1:
        return None
    if kind in ("sliding", "sliding both ways"):
        if not isinstance(over[0], int) or over[0] < 1:
            return None
        return _Reach(over[0] - 1, None) if kind == "sliding" else _Reach(over[0], over[0])
    if kind == "blocks":
        return None  # alone it is no such rule
    if kind == "and":
        parts = [_reach(part) for part in over[0]]
        known = [part for part in parts if part is not None and not part.blocks]
        if len(known) < len(parts):
            return None
        return _Reach(_least([part.left for part in known]), _least([part.right for part in known]))
    # a union: with blocks that turn out to be empty it is the other part
    others = [part for part in over[0] if _MAKERS.get(getattr(part, "__code__", None)) != "blocks"]
    reach = _reach(others[0]) if len(others) == 1 else None
    if reach is None:
        return None
    blocks = (part.__closure__[0].cell_contents for part in over[0] if part is not others[0])
    return reach._replace(blocks=(*reach.blocks, *blocks))


def _least(bounds: list[int | None]) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


_MAKERS = {
    masking_utils.and_masks().__code__: "and",
    masking_utils.or_masks().__code__: "or",
    masking_utils.sliding_window_overlay(1).__code__: "sliding",
    masking_utils.sliding_window_bidirectional_overlay(1).__code__: "sliding both ways",
    masking_utils.blockwise_overlay(torch.zeros(1, 1)).__code__: "blocks",
}
