"""Languages that people write down, by ``outlines-core``, which turns them into automata over bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_runtime.constraints.automaton import Automaton

# The library loses transitions of accepting states that go on (seen in 0.2.14), so every pattern is given an end of its
# own, a character that Unicode promises never to use: what is left without it is accepted where it leads to the end.
_END = chr(0x10FFFF)

# keys of a schema whose values are no schemas
_DATA = ("const", "default", "enum", "examples")


def regex(pattern: str, vocabulary: Sequence[bytes | None]) -> Automaton:
    """The texts that a regular expression matches, as a whole.

    Args:
        pattern: in the syntax of Rust's ``regex`` crate: no backreferences and no looking around, and no anchors, since
            the whole text is matched anyway.
        vocabulary: of :func:`~diffusion_runtime.constraints.token_bytes`.

    Raises:
        ValueError: a pattern that the library does not take, with its reason.
        ImportError: ``outlines-core`` is absent.
    """
    library = _library()
    single_bytes = library.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    try:
        index = library.Index(f"(?:{pattern}){_END}", single_bytes)
    except ValueError as error:
        raise ValueError(f"the regular expression {pattern!r} cannot be used: {error}") from error
    transitions: dict[int, dict[int, int]] = index.get_transitions()
    final = set(index.get_final_states())
    numbers: dict[int, int] = {}
    for state, behind in transitions.items():
        for each in (state, *behind.values()):
            numbers.setdefault(each, len(numbers))
    table = np.full((len(numbers), 256), -1, np.int32)
    for state, behind in transitions.items():
        for byte, target in behind.items():
            if byte < 256:  # the library's own end token is 256
                table[numbers[state], byte] = numbers[target]
    at = np.arange(len(table), dtype=np.int32)
    for byte in _END.encode():
        at = np.where(at >= 0, table[at, byte], -1)
    accepting = np.isin(at, [numbers[state] for state in final])
    return Automaton.of_bytes(table, numbers[index.get_initial_state()], accepting, vocabulary)


def json_schema(schema: str | Mapping[str, Any], vocabulary: Sequence[bytes | None]) -> Automaton:
    """The JSON texts that a schema describes, with at most one space where JSON allows any.

    Args:
        schema: a JSON schema, as a mapping or as text. Keys of objects come in the order of the schema. A ``pattern``
            is of the whole string, as it is written between its quotes.
        vocabulary: of :func:`~diffusion_runtime.constraints.token_bytes`.

    Raises:
        ValueError: a schema that the library does not take, with its reason.
        ImportError: ``outlines-core`` is absent.
    """
    _library()
    from outlines_core.json_schema import build_regex_from_schema

    try:
        loaded = json.loads(schema) if isinstance(schema, str) else schema
        pattern = build_regex_from_schema(json.dumps(_grouped(loaded)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the JSON schema cannot be used: {error}") from error
    return regex(pattern, vocabulary)


def _grouped(schema: Any) -> Any:
    """The same schema with each pattern in parentheses, which the library (0.2.14) forgets around alternatives."""
    if isinstance(schema, list):
        return [_grouped(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    grouped = {key: value if key in _DATA else _grouped(value) for key, value in schema.items()}
    if isinstance(pattern := schema.get("pattern"), str):
        grouped["pattern"] = f"(?:{pattern.removeprefix('^').removesuffix('$')})"
    return grouped


def _library() -> Any:
    try:
        import outlines_core
    except ImportError as error:
        raise ImportError(
            "regular expressions and JSON schemas need the extra: pip install 'diffusion-runtime[constraints]'"
        ) from error
    return outlines_core
