"""Texts that an answer must be one of, kept to while tokens are decided in any order.

A language is an automaton over tokens. Before a position is decided, its candidates are those with which the answer can
still be completed, given what is decided on both sides; what a step decides is judged together.
"""

from diffusion_runtime.constraints.automaton import Automaton
from diffusion_runtime.constraints.languages import json_schema, regex
from diffusion_runtime.constraints.progress import Progress, judge
from diffusion_runtime.constraints.vocabulary import token_bytes

__all__ = ["Automaton", "Progress", "json_schema", "judge", "regex", "token_bytes"]
