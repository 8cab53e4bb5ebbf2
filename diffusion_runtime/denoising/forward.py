"""From the tokens of a batch to the states of its current blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_runtime.denoising.batch import Batch
from diffusion_runtime.models import LanguageModel
from diffusion_runtime.nn import AttentionContext


def states_of(model: LanguageModel, batch: Batch, guidance_scale: float) -> Tensor:
    """``[rows, width, dim]`` states, or logits where the model has no head, that belong to each position.

    With ``guidance_scale`` ``w`` they are ``u + (w + 1) (c - u)``, ``u`` those of the sequences whose given tokens are
    masked. A head is linear, so its logits are the same as if these had been combined, at half the cost.
    """
    stop = batch.tokens.shape[1]
    if model.block_length is not None:  # what lies behind the current block is not seen
        stop = max(row.blocks[0].stop for row in batch.rows if row.blocks)
    tokens, given = batch.tokens[:, :stop], ~batch.editable[:, :stop]
    lengths = batch.lengths[:, 0].clamp(max=stop) if batch.ragged else None
    if not guidance_scale:
        return _of_blocks(model, batch, tokens, lengths)
    both = torch.cat((tokens, tokens.masked_fill(given, batch.mask_token_id)))
    if lengths is not None:
        lengths = torch.cat((lengths, lengths))
    conditional, unconditional = _of_blocks(model, batch, both, lengths).chunk(2)
    wide = torch.promote_types(conditional.dtype, torch.float32)
    mixed = torch.lerp(unconditional.to(wide), conditional.to(wide), guidance_scale + 1)
    return mixed.to(conditional.dtype)


def _of_blocks(model: LanguageModel, batch: Batch, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    whole = model.whole_sequences()
    context = whole if lengths is None else AttentionContext(whole.mask, lengths)
    states = model.hidden(tokens, context)
    blocks = {(row.blocks[0].start, row.blocks[0].stop) if row.blocks else None for row in batch.rows}
    if len(blocks) == 1 and not model.shifted:
        return states[:, slice(*blocks.pop())]  # type: ignore[misc]
    position = batch.position - int(model.shifted)
    if len(tokens) > len(position):
        position = torch.cat((position, position))
    places = position.clamp(0, states.shape[1] - 1)[..., None]
    return states.gather(1, places.expand(-1, -1, states.shape[-1]))
