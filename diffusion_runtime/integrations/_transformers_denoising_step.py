"""One denoising step of transformers' DiffusionGemma from the hidden states on, without logits where none are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

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
    """What a step hands to the next in place of its logits: the embedding they expect, and what they are made of."""

    signal: Tensor  # [batch, canvas, hidden]; 0 in rows that had finished before
    hidden: Tensor  # [batch, canvas, hidden]
    temperature: Tensor  # [batch, 1]
    weight: Tensor  # of the head
    softcap: float

    def where(self, live: Tensor, before: Carried) -> Carried:
        """This where a row is ``live``, and elsewhere the logits that it had when it finished."""
        return replace(
            self,
            hidden=torch.where(live[..., None], self.hidden, before.hidden),
            temperature=torch.where(live[:, :1], self.temperature, before.temperature),
        )

    def cpu(self) -> Tensor:
        """The logits themselves, for a streamer that takes them."""
        logits = self.softcap * torch.tanh((self.hidden @ self.weight.mT).float() / self.softcap)
        return (logits / self.temperature[..., None]).to(self.signal.dtype).cpu()


class State(NamedTuple):
    """What a step takes, and leaves to the next: in the order of what transformers' step returns."""

    canvas: Tensor  # [batch, canvas] int64
    argmax: Tensor  # [batch, canvas] int64
    carried: Tensor | Carried | None  # None: nothing, before a canvas' first step
    finished: Tensor  # [batch] bool

    @property
    def live(self) -> Tensor:
        """``[batch, canvas]``, the positions of rows that have not finished."""
        return (~self.finished)[:, None].expand_as(self.canvas)

    def write_to(self, memory: State) -> None:
        """Overwrite what another state holds. Both have a :class:`Carried`."""
        assert isinstance(self.carried, Carried)
        assert isinstance(memory.carried, Carried)
        for new, old in (
            (self.canvas, memory.canvas),
            (self.argmax, memory.argmax),
            (self.finished, memory.finished),
            (self.carried.signal, memory.carried.signal),
            (self.carried.hidden, memory.carried.hidden),
            (self.carried.temperature, memory.carried.temperature),
        ):
            if new is not old:
                old.copy_(new)


Step = Callable[[State, Tensor, Tensor], State]  # state, temperature [], seed [batch, 1]


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
) -> tuple[Tensor, Tensor, Tensor | Carried | None, Tensor]:
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
    inputs = {
        "decoder_attention_mask": mask_mapping,
        "past_key_values": past_key_values,
        "decoder_position_ids": decoder_position_ids,
        **model_kwargs,
    }
    state = State(current_canvas, argmax_canvas, self_conditioning_logits, finished_denoising)
    seed = torch.randint(2**63 - 1, (len(current_canvas), 1), device=current_canvas.device)
    if not others and getattr(decoder_forward, "__func__", None) is type(self).forward:
        step = partial(_from_hidden, self, inputs, sampler, stop)
        graphs = vars(self).get("_step_graphs")
        if graphs is None:
            return step(state, temperature, seed)
        taken: State = graphs.take(step, state, temperature, seed, generation=sampler)
        return taken
    logits = decoder_forward(
        decoder_input_ids=current_canvas, self_conditioning_logits=self_conditioning_logits, **inputs
    ).logits
    if others:
        left = torch.tensor(cur_step, device=logits.device, dtype=torch.int32)
        logits = LogitsProcessorList(others)(input_ids, logits, cur_step=left)
    return _from_logits(logits, self.model.decoder.embed_tokens.weight.dtype, sampler, stop, state, temperature, seed)


def _from_hidden(
    model: Any, inputs: dict[str, Any], sampler: Any, stop: Any, state: State, temperature: Tensor | float, seed: Tensor
) -> State:
    """A step without logits. A temperature that is a tensor is read when the step runs, not when it is called."""
    live, before = state.live, state.carried
    hidden = _hidden(model, before, {"decoder_input_ids": state.canvas, **inputs})
    weight, softcap = model.lm_head.weight, model.final_logit_softcapping
    samples, signal = ops.sample_with_soft_embedding(
        hidden,
        weight,
        model.model.decoder.embed_tokens.weight,
        softcap=softcap,
        temperature=temperature,
        seed=seed,
        masked=live,
    )
    at = torch.ones_like(samples.logsumexp[:, :1]) * temperature
    carried = Carried(signal, hidden, at, weight, softcap)
    if isinstance(before, Carried) and len(live) > 1:  # of a single row the loop ends where it finishes
        carried = carried.where(live, before)
    return _decide(samples, carried, sampler, stop, state, seed)


def _from_logits(
    logits: Tensor, dtype: torch.dtype, sampler: Any, stop: Any, state: State, temperature: float, seed: Tensor
) -> State:
    """A step whose logits exist; what it carries is what transformers would, in the dtype of the model."""
    samples = ops.sample_tokens(
        logits, temperature=temperature, statistics_temperature=temperature, seed=seed, masked=state.live
    )
    carried = torch.div(logits, temperature, out=torch.empty_like(logits, dtype=dtype))
    if isinstance(state.carried, Tensor) and len(logits) > 1:
        carried = torch.where(state.live[:, :, None], carried, state.carried)
    return _decide(samples, carried, sampler, stop, state, seed)


def _decide(
    samples: ops.TokenSamples, carried: Tensor | Carried, sampler: Any, stop: Any, state: State, seed: Tensor
) -> State:
    """What is accepted, noise for the rest, and who has finished."""
    live = state.live
    canvas, sampler.accepted_token_mask = ops.commit_step(
        state.canvas,
        samples.token,
        samples.entropy,
        live,
        rule="entropy_bound",
        bound=sampler.entropy_bound,
        renoise_vocab=sampler.vocab_size,
        seed=seed,
        step=1,  # another number of the same key than the draw's
    )
    argmax = torch.where(live, samples.argmax, state.argmax)
    finished = state.finished
    if stop is not None:
        finished |= _stable(stop, argmax) & (samples.entropy.mean(-1) < stop.confidence_threshold)
    return State(canvas, argmax, carried, finished)


def _hidden(model: Any, before: Tensor | Carried | None, inputs: dict[str, Any]) -> Tensor:
    """The decoder's last hidden states, conditioned on what the step before left."""
    module = model.model.decoder.self_conditioning
    logits = before if isinstance(before, Tensor) else None
    if isinstance(before, Carried):
        module.signal = before.signal * model.model.decoder.embed_tokens.embed_scale.to(before.signal.dtype)
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
    # in place: a step that is replayed knows its memory only
    stop.argmax_canvas_history.copy_(torch.cat((stop.argmax_canvas_history[1:], argmax[None])))
    return stable
