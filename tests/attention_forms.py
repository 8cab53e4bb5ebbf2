"""Every form of a call of ``attention``, small enough for numerical derivatives, as the operator's arguments."""

from __future__ import annotations

import torch
from attention_cases import MASKS

from diffusion_runtime import ops
from diffusion_runtime.ops._attention_arguments import read_problem

OPERATOR = torch.ops.diffusion_runtime.attention
BATCH, HEADS, KV_HEADS, LENGTH, KEYS, SIZE, VALUE_SIZE, BEFORE = 2, 4, 2, 5, 6, 3, 2, 4
FLOATS = (0, 1, 2, 3, 4, 7)  # the places of what may be differentiable


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def dense_prefix(sequences=BATCH, lengths=(3, 4)):
    key, value = tensor(sequences, KV_HEADS, BEFORE, SIZE), tensor(sequences, KV_HEADS, BEFORE, VALUE_SIZE)
    return ops.Prefix(key, value, torch.tensor(lengths))


def paged_prefix():
    table = torch.tensor([[2, 0], [3, 1]])
    return ops.PagedPrefix(tensor(2, 5, KV_HEADS, 2, SIZE), table, torch.tensor([3, 4]))


def _bool_mask():
    mask = torch.rand(BATCH, 1, LENGTH, KEYS) > 0.4
    mask[1, :, 2] = False
    return mask


PACKED = ops.Packed(torch.tensor([0, 2, 2, LENGTH]), torch.tensor([0, 3, 4, KEYS]))
FORMS = {
    "plain": dict,
    "lengths": lambda: {"lengths": torch.tensor([4, 6]), "mask": ops.Causal()},
    "left padding": lambda: {"lengths": (torch.tensor([0, 2]), torch.tensor([6, 5])), "mask": ops.Causal()},
    "prefix": lambda: {"prefix": dense_prefix()},
    "whole prefix": lambda: {"prefix": ops.Prefix(dense_prefix().key, dense_prefix().value)},
    "paged": lambda: {"prefix": paged_prefix(), "mask": ops.Causal()},
    "packed": lambda: {"lengths": PACKED, "mask": ops.Causal()},
    "packed, prefix": lambda: {"lengths": PACKED, "prefix": dense_prefix(3, (1, 0, 4))},
    "bool mask": lambda: {"mask": _bool_mask()},
    "float mask": lambda: {"mask": tensor(HEADS, LENGTH, KEYS)},
    "row mask": lambda: {"mask": tensor(BATCH, 1, 1, KEYS)},
    "softcap": lambda: {"softcap": 0.8, "prefix": dense_prefix()},
    "softcap, mask": lambda: {"softcap": 0.8, "mask": tensor(LENGTH, KEYS)},
    "scale": lambda: {"scale": -0.7},
    **{f"mask {name}": lambda mask=mask: {"mask": mask, "prefix": dense_prefix()} for name, mask in MASKS.items()},
}


def arguments_of(name, dtype=torch.float64):
    """The operator's, for a form of the call."""
    kwargs = FORMS[name]()
    batch = 1 if "packed" in name else BATCH
    value_size = SIZE if name == "paged" else VALUE_SIZE
    tensors = (
        tensor(batch, HEADS, LENGTH, SIZE),
        tensor(batch, KV_HEADS, KEYS, SIZE),
        tensor(batch, KV_HEADS, KEYS, value_size),
    )
    named = [kwargs.get(x) for x in ("prefix", "mask", "lengths", "scale", "softcap")]
    values = (*read_problem(*tensors, *named).to_operator(), "reference")
    return [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


def differentiable(arguments):
    """The places of its differentiable tensors; a pool of pages takes no gradients."""
    places = [i for i in FLOATS if isinstance(arguments[i], torch.Tensor) and arguments[i].is_floating_point()]
    return [i for i in places if arguments[6] is None or i not in (3, 4)]


def call_of(arguments, places):
    """A function of the tensors at some places; a query that sees nothing has 0, not -inf, as its logsumexp."""

    def function(*tensors):
        values = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        out, logsumexp = OPERATOR(*values)
        return out, logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)

    return function
