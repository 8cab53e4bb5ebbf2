"""One denoising step of transformers' DiffusionGemma from the hidden states on, without logits where none are asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.models.diffusion_gemma import generation_diffusion_gemma as stock
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling

from diffusion_runtime import ops

PARAMETERS = (
    *("self", "decoder_forward", "current_canvas", "argmax_canvas", "input_ids", "decoder_position_ids"),
    *("self_conditioning_logits", "mask_mapping", "past_key_values", "finished_denoising", "cur_step", "sampler"),
    *("logits_processor", "diffusion_stopping_criteria"),
)


class SelfConditioning(modeling.DiffusionGemmaSelfConditioning):  # type: ignore[misc]
    """transformers' module, which hears the signal that a step left here in place of the decoder's zeros."""

    signal: Tensor | None = None

    def forward(self, inputs_embeds: Tensor, self_conditioning_signal: Tensor) -> Tensor:
        """Both ``[batch, canvas, hidden]``."""
        result: Tensor = super().forward(
            inputs_embeds, self_conditioning_signal if self.signal is None else self.signal
        )
        return result


@dataclass(frozen=True, eq=False)
class Carried:
    """What a step hands to the next in place of its logits: what they would be made of."""

    hidden: Tensor  # [batch, canvas, hidden]
    logsumexp: Tensor  # [batch, canvas]
    temperature: Tensor  # [batch, 1]
    weight: Tensor  # of the head
    embedding: Tensor  # of the tokens
    softcap: float

    def soft_embedding(self, live: Tensor) -> Tensor:
        """``[batch, canvas, hidden]``, the embedding expected of each distribution; 0 where a row is not live."""
        return ops.soft_embedding_from_hidden(
            self.hidden,
            self.weight,
            self.embedding,
            temperature=self.temperature,
            softcap=self.softcap,
            masked=live,
            logsumexp=self.logsumexp,
        )

    def where(self, live: Tensor, before: Carried) -> Carried:
        """This where a row is ``live``, and elsewhere what it had when it finished."""
        return replace(
            self,
            hidden=torch.where(live[..., None], self.hidden, before.hidden),
            logsumexp=torch.where(live, self.logsumexp, before.logsumexp),
            temperature=torch.where(live[:, :1], self.temperature, before.temperature),
        )

    def cpu(self) -> Tensor:
        """The logits themselves, for a streamer that takes them."""
        logits = self.softcap * torch.tanh((self.hidden @ self.weight.mT).float() / self.softcap)
        return (logits / self.temperature[..., None]).to(self.embedding.dtype).cpu()


def denoising_step(
    self: Any,
    decoder_forward: Any,
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | Carried | None,
    mask_mapping: dict[str, Tensor | None],
    past_key_values: Any,
    finished_denoising: Tensor,
    cur_step: int,
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor | Carried, Tensor]:
    """In place of ``DiffusionGemmaGenerationMixin._denoising_step``: the same rules.

    The argmax, the accepted positions and the stop are transformers'. The draws follow the same distribution, keyed by
    one number a row from torch's generator, so that ``torch.manual_seed`` decides them. Finished rows are not read.
    Logits are made only for a processor that is not the schedule of temperatures, and by a compiled decoder; otherwise
    the soft embedding of the next step is that of logits that were not rounded to the dtype of the model.
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
    others, temperature = _split(logits_processor, cur_step)
    live = (~finished_denoising)[:, None].expand_as(current_canvas)
    seed = torch.randint(2**63 - 1, (len(current_canvas), 1), device=current_canvas.device)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "statistics_temperature": temperature,
        "seed": seed,
        "masked": live,
    }
    inputs = {
        "decoder_input_ids": current_canvas,
        "decoder_attention_mask": mask_mapping,
        "past_key_values": past_key_values,
        "decoder_position_ids": decoder_position_ids,
        **model_kwargs,
    }
    before = self_conditioning_logits
    carried: Tensor | Carried
    if not others and getattr(decoder_forward, "__func__", None) is type(self).forward:
        hidden = _hidden(self, before, live, inputs)
        weight, softcap = self.lm_head.weight, self.final_logit_softcapping
        samples = ops.sample_from_hidden(hidden, weight, softcap=softcap, **settings)
        embedding = self.model.decoder.embed_tokens.weight
        at = torch.full_like(samples.logsumexp[:, :1], temperature)
        carried = Carried(hidden, samples.logsumexp, at, weight, embedding, softcap)
        if isinstance(before, Carried) and len(live) > 1:  # of a single row the loop ends where it finishes
            carried = carried.where(live, before)
    else:
        logits = decoder_forward(self_conditioning_logits=before, **inputs).logits
        if others:
            left = torch.tensor(cur_step, device=logits.device, dtype=torch.int32)
            logits = LogitsProcessorList(others)(input_ids, logits, cur_step=left)
        samples = ops.sample_tokens(logits, **settings)
        dtype = self.model.decoder.embed_tokens.weight.dtype
        carried = torch.div(logits, temperature, out=torch.empty_like(logits, dtype=dtype))
        if isinstance(before, Tensor) and len(live) > 1:
            carried = torch.where(live[:, :, None], carried, before)
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
    if stop is not None:
        finished_denoising |= _stable(stop, argmax) & (samples.entropy.mean(-1) < stop.confidence_threshold)
    return canvas, argmax, carried, finished_denoising


def _hidden(model: Any, before: Tensor | Carried | None, live: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The decoder's last hidden states, conditioned on what the step before left."""
    module = model.model.decoder.self_conditioning
    logits = before if isinstance(before, Tensor) else None
    if isinstance(before, Carried):
        soft = before.soft_embedding(live)
        module.signal = soft * model.model.decoder.embed_tokens.embed_scale.to(soft.dtype)
    try:
        hidden: Tensor = model.model(self_conditioning_logits=logits, **inputs).last_hidden_state
    finally:
        module.signal = None
    return hidden


def _split(processors: Any, cur_step: int) -> tuple[list[Any], float]:
    """All processors but a last one that divides by a temperature, and that temperature."""
    others, temperature = list(processors), 1.0
    if others and type(others[-1]) is stock.LinearTemperatureScheduleLogitsProcessor:
        last = others.pop()
        temperature = last.t_min + (last.t_max - last.t_min) * (cur_step / last.max_denoising_steps)
    return others, temperature


def _stable(stop: Any, argmax: Tensor) -> Tensor:
    """Whether each row's argmax is that of the steps before, which ``stop`` remembers."""
    if stop.stability_threshold == 0:
        return torch.ones(len(argmax), dtype=torch.bool, device=argmax.device)
    if stop.argmax_canvas_history is None:
        stop.argmax_canvas_history = argmax.new_full((stop.stability_threshold, *argmax.shape), -1)
    stable: Tensor = (stop.argmax_canvas_history == argmax).all(-1).all(0)
    stop.argmax_canvas_history = torch.cat((stop.argmax_canvas_history[1:], argmax[None]))
    return stable
