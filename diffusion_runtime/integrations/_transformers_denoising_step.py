"""One denoising step of transformers' DiffusionGemma, its sampler in two launches behind the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.models.diffusion_gemma import generation_diffusion_gemma as stock

from diffusion_runtime import ops

PARAMETERS = (
    *("self", "decoder_forward", "current_canvas", "argmax_canvas", "input_ids", "decoder_position_ids"),
    *("self_conditioning_logits", "mask_mapping", "past_key_values", "finished_denoising", "cur_step", "sampler"),
    *("logits_processor", "diffusion_stopping_criteria"),
)


def denoising_step(
    self: Any,
    decoder_forward: Any,
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | None,
    mask_mapping: dict[str, Tensor | None],
    past_key_values: Any,
    finished_denoising: Tensor,
    cur_step: int,
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In place of ``DiffusionGemmaGenerationMixin._denoising_step``: the same rules, read off one pass over the logits.

    The argmax, the accepted positions and the stop are transformers'. The draws follow the same distribution, keyed by
    one number a row from torch's generator, so that ``torch.manual_seed`` decides them. Finished rows are not read.
    A sampler or a stopping criterion that is not transformers' own runs transformers' own step.
    """
    stop = diffusion_stopping_criteria
    if type(sampler) is not stock.EntropyBoundSampler or not (
        stop is None or type(stop) is stock.StableAndConfidentStoppingCriteria
    ):
        result: tuple[Tensor, Tensor, Tensor, Tensor] = type(self)._denoising_step(
            self, decoder_forward, current_canvas, argmax_canvas, input_ids, decoder_position_ids,
            self_conditioning_logits, mask_mapping, past_key_values, finished_denoising, cur_step, sampler,
            logits_processor, stop, **model_kwargs,
        )  # fmt: skip
        return result
    logits = decoder_forward(
        decoder_input_ids=current_canvas,
        self_conditioning_logits=self_conditioning_logits,
        decoder_attention_mask=mask_mapping,
        past_key_values=past_key_values,
        decoder_position_ids=decoder_position_ids,
        **model_kwargs,
    ).logits
    logits, temperature = _tempered(logits, input_ids, cur_step, logits_processor)

    live = (~finished_denoising)[:, None].expand_as(current_canvas)
    seed = torch.randint(2**63 - 1, (len(current_canvas), 1), device=logits.device)
    samples = ops.sample_tokens(
        logits, temperature=temperature, statistics_temperature=temperature, seed=seed, masked=live
    )
    canvas, sampler.accepted_token_mask = ops.commit_step(
        current_canvas,
        samples.token,
        samples.entropy,
        live,
        rule="entropy_bound",
        bound=sampler.entropy_bound,
        renoise_vocab=sampler.vocab_size,
        seed=seed,
        step=1,  # another number of the same key than the draw's
    )
    argmax = torch.where(live, samples.argmax, argmax_canvas)
    dtype = self.model.decoder.embed_tokens.weight.dtype
    carried = torch.div(logits, temperature, out=torch.empty_like(logits, dtype=dtype))
    if stop is not None:
        if self_conditioning_logits is not None and len(live) > 1:  # of a single row the loop ends where it finishes
            carried = torch.where(live[:, :, None], carried, self_conditioning_logits)
        finished_denoising |= _stable(stop, argmax) & (samples.entropy.mean(-1) < stop.confidence_threshold)
    return canvas, argmax, carried, finished_denoising


def _tempered(logits: Tensor, input_ids: Tensor, cur_step: int, processors: Any) -> tuple[Tensor, float]:
    """The logits after all processors but a last one that divides by a temperature, and that temperature."""
    others, temperature = list(processors), 1.0
    if others and type(others[-1]) is stock.LinearTemperatureScheduleLogitsProcessor:
        last = others.pop()
        temperature = last.t_min + (last.t_max - last.t_min) * (cur_step / last.max_denoising_steps)
    if others:
        left = torch.tensor(cur_step, device=logits.device, dtype=torch.int32)
        logits = LogitsProcessorList(others)(input_ids, logits, cur_step=left)
    return logits, temperature


def _stable(stop: Any, argmax: Tensor) -> Tensor:
    """Whether each row's argmax is that of the steps before, which ``stop`` remembers."""
    if stop.stability_threshold == 0:
        return torch.ones(len(argmax), dtype=torch.bool, device=argmax.device)
    if stop.argmax_canvas_history is None:
        stop.argmax_canvas_history = argmax.new_full((stop.stability_threshold, *argmax.shape), -1)
    stable: Tensor = (stop.argmax_canvas_history == argmax).all(-1).all(0)
    stop.argmax_canvas_history = torch.cat((stop.argmax_canvas_history[1:], argmax[None]))
    return stable
