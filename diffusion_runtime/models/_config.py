"""Reading a ``config.json``: what is known is checked, and what would change the mathematics unseen is an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

# keys that cannot change what a model computes at inference, whatever wrote them
BOOKKEEPING = frozenset(
    "_attn_implementation_autoset _name_or_path architectures attn_implementation auto_map bos_token_id dtype "
    "eos_token_id model_type pad_token_id torch_dtype transformers_version use_cache".split()
)
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}


@dataclass(frozen=True)
class ModelConfig:
    """The base of every family's config: a dataclass whose fields are named as the keys of ``config.json``.

    Fields without a default are keys that the file must have. A field that is None, where its type says it may be, was
    not said. Numbers are positive, unless :attr:`MAY_BE_ZERO` names them.
    """

    NAME: ClassVar[str]  # of the family, for messages
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # keys that change the mathematics, and what is implemented
    IGNORED: ClassVar[frozenset[str]] = BOOKKEEPING
    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"mask_token_id"})

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            declared = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
            if value is None and "None" in declared:
                continue
            kind = declared.split(" ")[0]
            fits = isinstance(value, _KINDS[kind]) and isinstance(value, bool) == (kind == "bool")
            if not fits:
                raise ValueError(f"{field.name} must be {declared}, got {value!r}")
            may_be_zero = kind == "bool" or field.name in self.MAY_BE_ZERO
            if not (value > 0 or (value == 0 and may_be_zero)):
                raise ValueError(f"{field.name} must be positive, got {value!r}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``.

        Raises:
            ValueError: a required key is missing, or a key would change the mathematics in a way that this family does
                not implement; the message names it.
        """
        known = {field.name: field for field in fields(cls)}
        if missing := [n for n, field in known.items() if field.default is MISSING and n not in config]:
            raise ValueError(f"the {cls.NAME} config lacks {', '.join(missing)}")
        for name, value in config.items():
            if name in cls.FIXED and value not in cls.FIXED[name]:
                implemented = " or ".join(map(repr, cls.FIXED[name]))
                raise ValueError(f"the {cls.NAME} config asks for {name}={value!r}; only {implemented} is implemented")
            if name not in cls.FIXED and name not in cls.IGNORED and name not in known:
                raise ValueError(f"the {cls.NAME} config has an unknown key {name!r} (= {value!r})")
        return cls(**{name: config[name] for name in known if name in config})

    def for_tensors(self, names: Collection[str]) -> Self:
        """This config, with what ``config.json`` leaves unsaid taken from the names of the checkpoint's tensors."""
        del names
        return self

    def check_heads(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """Heads of an even size, a whole number of which share each key head."""
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"the heads must share the key heads evenly and have an even size, got {heads} heads, {kv_heads} key "
                f"heads and head size {head_dim}"
            )

    def check_mask_token(self, mask_token_id: int, vocab_size: int) -> None:
        """A mask token must have an embedding."""
        if not 0 <= mask_token_id < vocab_size:
            raise ValueError(f"mask_token_id {mask_token_id} is outside of the vocabulary of {vocab_size}")
