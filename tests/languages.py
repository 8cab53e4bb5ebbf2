"""Regular expressions and JSON schemas at random, and what JSON schema means, read plainly."""

from __future__ import annotations

import random
import re


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    if depth == 0:
        return rng.choice(["a", "b", "c", "é", "[a-c]", r"\d", "x?", "[^a]", "ab", "."])
    inner = (random_pattern(rng, depth - 1) for _ in range(2))
    kind = rng.randrange(6)
    if kind < 2:
        return "".join(inner)
    if kind == 2:
        return f"({'|'.join(inner)})"
    return f"({next(inner)}){rng.choice(['*', '+', '?', '{1,3}'])}"


def random_schema(rng: random.Random, depth: int = 2) -> dict:
    kind = rng.choice(["integer", "boolean", "null", "enum", "string", *["array", "object"] * depth])
    if kind == "enum":
        return {"enum": rng.sample(["a", "bc", "x1"], rng.randint(1, 3))}
    if kind == "string":
        return {"type": "string", "pattern": rng.choice(["[a-c]+", "x[0-9]?", "a|b|c"])}
    if kind == "array":
        most = rng.randint(1, 3)
        return {
            "type": "array",
            "items": random_schema(rng, depth - 1),
            "minItems": rng.randint(0, 1),
            "maxItems": most,
        }
    if kind == "object":
        names = rng.sample("abcxyz", rng.randint(1, 2))
        return {"type": "object", "properties": {n: random_schema(rng, depth - 1) for n in names}, "required": names}
    return {"type": kind}


def conforms(value, schema: dict) -> bool:
    """The part of JSON schema that :func:`random_schema` uses, read plainly."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "string":
        return isinstance(value, str) and re.fullmatch(schema["pattern"], value) is not None
    if kind == "array":
        fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(conforms(item, schema["items"]) for item in value)
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and value.keys() == properties.keys()
            and all(conforms(value[name], properties[name]) for name in properties)
        )
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if kind == "null" else isinstance(value, bool)
