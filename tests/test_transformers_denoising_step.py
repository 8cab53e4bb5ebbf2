"""A denoising step of DiffusionGemma: what ours decides is what transformers' decides, on the same canvas."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs the transformers extra")

from test_transformers_diffusion_gemma import CANVAS, VOCAB, inputs, make
from test_transformers_diffusion_gemma import pytestmark as needs_diffusion_gemma
from transformers import LogitsProcessorList
from transformers.models.diffusion_gemma import generation_diffusion_gemma as stock

from diffusion_runtime.integrations import transformers as bridge
from diffusion_runtime.integrations._transformers_denoising_step import Carried, denoising_step

BATCH = 3
pytestmark = [
    needs_diffusion_gemma,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's own, of its compiler
]


class Model:
    """As much of a model as a step looks at: logits that the canvas and the last logits decide."""

    def __init__(self, dtype: torch.dtype, settles: bool) -> None:
        self.settles = settles
        self.config = type("", (), {"text_config": type("", (), {"vocab_size": VOCAB})})
        embedding = type("", (), {"weight": torch.zeros(1, dtype=dtype)})
        self.model = type("", (), {"decoder": type("", (), {"embed_tokens": embedding})})
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 2

    _denoising_step = stock.DiffusionGemmaGenerationMixin._denoising_step

    def forward(self, decoder_input_ids, self_conditioning_logits, **_):
        logits = self.table[decoder_input_ids].cumsum(1)
        if self.settles:  # the first two rows do not hear the canvas
            logits[:2] = self.table[:CANVAS] * 40
        elif self_conditioning_logits is not None:
            logits = logits + 0.5 * self_conditioning_logits.float()
        return type("", (), {"logits": logits})


class Ban(stock.LogitsProcessor):
    """A processor of the user's."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, torch.tensor([3, 5]), -torch.inf)


def state(
    steps: int, threshold: int | None, processors=(), temperatures=(0.4, 0.8), dtype=torch.float32, settles=False
):
    """The arguments of a first step."""
    model = Model(dtype, settles)
    config = stock.EntropyBoundSamplerConfig(entropy_bound=0.4)
    every = [*processors]
    if temperatures is not None:
        every.append(stock.LinearTemperatureScheduleLogitsProcessor(*temperatures, steps))
    canvas = torch.randint(0, VOCAB, (BATCH, CANVAS), generator=torch.Generator().manual_seed(2))
    return model, {
        "decoder_forward": lambda **given: model.forward(**given),  # as a compiled one, it gives logits
        "current_canvas": canvas,
        "argmax_canvas": canvas,
        "input_ids": canvas,
        "decoder_position_ids": None,
        "self_conditioning_logits": None,
        "mask_mapping": None,
        "past_key_values": None,
        "finished_denoising": torch.zeros(BATCH, dtype=torch.bool),
        "cur_step": steps,
        "sampler": stock.EntropyBoundSampler(config, CANVAS, VOCAB, steps),
        "logits_processor": LogitsProcessorList(every),
        "diffusion_stopping_criteria": None
        if threshold is None
        else stock.StableAndConfidentStoppingCriteria(threshold, 0.3),
    }


def copied(arguments):
    """What a step may write to, apart."""
    stop, sampler = arguments["diffusion_stopping_criteria"], arguments["sampler"]
    fresh = dict(arguments, finished_denoising=arguments["finished_denoising"].clone())
    config = stock.EntropyBoundSamplerConfig(entropy_bound=sampler.entropy_bound)
    fresh["sampler"] = stock.EntropyBoundSampler(config, CANVAS, VOCAB, 1)
    if stop is not None:
        fresh["diffusion_stopping_criteria"] = stock.StableAndConfidentStoppingCriteria(
            stop.stability_threshold, stop.confidence_threshold
        )
        history = stop.argmax_canvas_history
        fresh["diffusion_stopping_criteria"].argmax_canvas_history = None if history is None else history.clone()
    return fresh


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 1},
        {"threshold": None},
        {"threshold": 0},
        {"threshold": 2, "settles": True},
        {"threshold": 1, "processors": [Ban()]},
        {"threshold": 1, "temperatures": None},
        {"threshold": 1, "dtype": torch.bfloat16},
    ],
    ids=["stop", "no stop", "confident alone", "rows that finish", "a processor", "no temperature", "bfloat16"],
)
def test_decides_what_transformers_decides(settings):
    steps = 6
    model, given = state(steps, **settings)
    for left in range(steps, 0, -1):
        given["cur_step"] = left
        theirs = copied(given)
        ours = copied(given)
        expected = model._denoising_step(**theirs)
        got = denoising_step(model, **ours)
        live = ~given["finished_denoising"]
        accepted = ours["sampler"].accepted_token_mask
        assert torch.equal(accepted[live], theirs["sampler"].accepted_token_mask[live])
        assert torch.equal(got[1], expected[1])
        assert got[2].dtype == expected[2].dtype
        torch.testing.assert_close(got[2], expected[2], rtol=1e-6 if got[2].dtype == torch.float32 else 8e-3, atol=1e-6)
        assert torch.equal(got[3], expected[3])
        assert torch.equal(got[0][~live], given["current_canvas"][~live])
        assert ((got[0] >= 0) & (got[0] < VOCAB)).all()
        for name, value in zip(("current_canvas", "argmax_canvas", "self_conditioning_logits"), expected, strict=False):
            given[name] = value
        given["finished_denoising"] = expected[3]
        given["diffusion_stopping_criteria"] = theirs["diffusion_stopping_criteria"]
    if settings.get("settles"):
        assert given["finished_denoising"].tolist() == [True, True, False]


def test_banned_tokens_are_never_accepted():
    model, given = state(4, 1, [Ban()])
    for seed in range(20):
        torch.manual_seed(seed)
        arguments = copied(given)
        canvas = denoising_step(model, **arguments)[0]
        assert not torch.isin(canvas[arguments["sampler"].accepted_token_mask], torch.tensor([3, 5])).any()


def test_the_generator_of_torch_decides_the_draws():
    model, given = state(4, None)
    canvases = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        canvases.append(denoising_step(model, **copied(given))[0])
    assert torch.equal(canvases[0], canvases[1])
    assert not torch.equal(canvases[0], canvases[2])


@pytest.mark.parametrize("ours", [False, True], ids=["transformers", "ours"])
def test_draws_and_noise_are_of_their_distributions(ours):
    """Chi-square, six standard deviations of it: accepted tokens by their probabilities, all others uniform."""
    rows, steps = 4000, 4
    model, given = state(steps, None)
    canvas = given["current_canvas"][:1].expand(rows, -1).contiguous()
    given |= {"current_canvas": canvas, "argmax_canvas": canvas, "finished_denoising": torch.zeros(rows).bool()}
    torch.manual_seed(11)
    after = (denoising_step if ours else type(model)._denoising_step)(model, **given)[0]
    accepted = given["sampler"].accepted_token_mask
    assert (accepted == accepted[0]).all()
    assert 0 < accepted[0].sum() < CANVAS
    logits = model.forward(canvas[:1], None).logits[0]
    probability = (logits.double() / 0.8).softmax(-1)
    counts = torch.nn.functional.one_hot(after, VOCAB).sum(0).double()
    noise = counts[~accepted[0]].sum(0, keepdim=True)  # of all positions together, so that one token less is seen
    counts = torch.cat((counts[accepted[0]], noise))
    uniform = torch.full((1, VOCAB), noise.sum().item() / VOCAB)
    expected = torch.cat((rows * probability[accepted[0]], uniform))
    rare = expected < 5
    for count, mean, pooled in zip(counts, expected, rare, strict=True):
        seen, means = (torch.cat((x[~pooled], x[pooled].sum()[None])) for x in (count, mean))
        freedom = int((means > 0).sum()) - 1
        if freedom:
            distance = ((seen - means).square() / means.clamp_min(1e-9)).sum()
            assert distance < freedom + 6 * (2 * freedom) ** 0.5 + 12


def test_another_sampler_runs_transformers_own_step():
    class Sampler(stock.EntropyBoundSampler):
        def renoise_canvas(self, accepted_canvas, cur_step):
            return accepted_canvas * 0 + 7

    model, given = state(4, 1)
    config = stock.EntropyBoundSamplerConfig(entropy_bound=0.4)
    given["sampler"] = Sampler(config, CANVAS, VOCAB, 4)
    assert (denoising_step(model, **given)[0] == 7).all()


def test_from_hidden_states_as_from_logits():
    """Step by step on transformers' own canvases, finished rows of a batch and a streamer's logits included."""
    theirs, ours = make("eager"), make("eager")
    for model in (theirs, ours):  # as they are, a rounding grows thirtyfold from step to step
        for weight in model.parameters():
            weight.data.mul_(0.25 if weight.ndim > 1 else 1.0)
        model.final_logit_softcapping = 2.0  # one that is felt
    bridge.accelerate(ours, attention=False, norms=False)
    prompt = inputs(None)["input_ids"]
    steps, stops = 5, []
    given = state(steps, 0)[1] | {
        "self_conditioning_logits": None,
        "mask_mapping": {"full_attention": None, "sliding_attention": None},
    }
    given["diffusion_stopping_criteria"].confidence_threshold = 4.3  # of ln 96 = 4.56: each row stops at another step
    carried = None
    caches = [model.model.encoder(input_ids=prompt).past_key_values for model in (theirs, ours)]
    with torch.no_grad():
        for left in range(steps, 0, -1):
            given["cur_step"] = left
            mine = copied(given) | {
                "self_conditioning_logits": carried,
                "past_key_values": caches[1],
                "decoder_forward": ours.forward,
            }
            stock_arguments = copied(given) | {"past_key_values": caches[0], "decoder_forward": theirs.forward}
            expected, got = theirs._denoising_step(**stock_arguments), ours._denoising_step(**mine)
            carried = got[2]
            assert isinstance(carried, Carried)
            torch.testing.assert_close(carried.cpu(), expected[2], rtol=1e-4, atol=1e-3)
            assert torch.equal(got[1], expected[1])
            assert torch.equal(got[3], expected[3])
            for name, value in zip(
                ("current_canvas", "argmax_canvas", "self_conditioning_logits"), expected, strict=False
            ):
                given[name] = value
            given["finished_denoising"] = expected[3]
            given["diffusion_stopping_criteria"] = stock_arguments["diffusion_stopping_criteria"]
            stops.append(int(expected[3].sum()))
    assert 0 < sum(stops) < BATCH * steps, "rows must finish, and not at once"
    bridge.restore(ours)
    assert type(ours.model.decoder.self_conditioning) is type(theirs.model.decoder.self_conditioning)
