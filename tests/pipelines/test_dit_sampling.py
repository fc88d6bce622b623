"""The sampler of the diffusion pipeline against velocities that are known exactly."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
    VQModel,
)

from hf_ifsq import IFSQDiTPipeline, IFSQDiTTransformer2DModel
from hf_ifsq.models.transformer_ifsq_dit import IFSQDiTOutput


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "euler": lambda shift=1.0: FlowMatchEulerDiscreteScheduler(shift=shift),
    "heun": lambda shift=1.0: FlowMatchHeunDiscreteScheduler(shift=shift),
    "dpm": lambda shift=1.0: DPMSolverMultistepScheduler(**FLOW, flow_shift=shift),
    "unipc": lambda shift=1.0: UniPCMultistepScheduler(**FLOW, flow_shift=shift),
}
LATENTS = {"snap_to_codes": False, "output_type": "latent"}

# Of each class, and the null class at last, three components of a mixture of normal distributions in two dimensions.
WEIGHTS = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]], dtype=torch.float64)
MEANS = torch.tensor(
    [
        [[2.5, -0.5], [-1.5, 1.5], [-1.0, -2.5]],
        [[0.0, 3.0], [2.5, -1.0], [-2.5, -0.5]],
        [[1.0, 1.0], [-1.0, 1.0], [0.0, -1.5]],
    ],
    dtype=torch.float64,
)
COVARIANCES = torch.tensor(
    [[[0.25, 0.08], [0.08, 0.15]], [[0.1, 0.0], [0.0, 0.25]], [[0.2, -0.08], [-0.08, 0.2]]], dtype=torch.float64
)


def mixture_velocity(x, t, labels):
    """E[x_1 - x_0 | x_t = x] of points `(batch, points, 2)`, each drawn from the mixture of its row's label."""
    spread = t**2 * COVARIANCES + (1 - t) ** 2 * torch.eye(2, dtype=torch.float64)
    away = x[:, :, None] - t * MEANS[labels][:, None]
    solved = torch.einsum("kij,bnkj->bnki", spread.inverse(), away)
    log_shares = WEIGHTS.log()[labels][:, None] - spread.logdet() / 2 - (away * solved).sum(-1) / 2
    data = MEANS[labels][:, None] + t * torch.einsum("kij,bnkj->bnki", COVARIANCES, solved)
    return (log_shares.softmax(-1)[..., None] * (data - (1 - t) * solved)).sum(2)


def to_points(latents):
    return latents.double().flatten(2).transpose(1, 2)


def runge_kutta(latents, labels, start=0.0, steps=400):
    """Points at t = 1 of latents at t = start, by the classical method of fourth order."""
    x, step = to_points(latents), (1 - start) / steps
    for t in np.arange(steps) * step + start:
        k1 = mixture_velocity(x, t, labels)
        k2 = mixture_velocity(x + step / 2 * k1, t + step / 2, labels)
        k3 = mixture_velocity(x + step / 2 * k2, t + step / 2, labels)
        k4 = mixture_velocity(x + step * k3, t + step, labels)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


class MixtureVelocity(IFSQDiTTransformer2DModel):
    """Every cell of the latents is a point of the mixture. Remembers t and the labels of each call."""

    def __init__(self, **config):
        super().__init__(**config)
        self.calls = []

    def forward(self, hidden_states, timestep, class_labels):
        (t,) = set(timestep.tolist())
        self.calls.append((t, class_labels.tolist()))
        velocity = mixture_velocity(to_points(hidden_states), t, class_labels)
        return IFSQDiTOutput(sample=velocity.transpose(1, 2).reshape(hidden_states.shape).float())


@pytest.fixture
def make_pipeline(make_autoencoder):
    def make(transformer, scheduler):
        tokenizer = make_autoencoder(levels=(5, 3), sample_size=(12, 16), scaling_factor=1.5)
        pipeline = IFSQDiTPipeline(transformer.eval(), tokenizer, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def make_exact_pipeline(make_pipeline):
    """Factory of pipelines with 3 x 4 points of the mixture of a class."""

    def make(name, shift=1.0):
        config = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "num_classes": 2}
        transformer = MixtureVelocity(sample_size=(3, 4), in_channels=2, **config)
        return make_pipeline(transformer, SCHEDULERS[name](shift))

    return make


@pytest.fixture
def make_real_pipeline(make_pipeline, make_dit):
    def make(name):
        return make_pipeline(make_dit(sample_size=(3, 4), in_channels=2), SCHEDULERS[name]())

    return make


# --- exact velocities ---


@pytest.mark.parametrize("name, steps", [("euler", 200), ("heun", 40), ("dpm", 60), ("unipc", 60)])
def test_samples_are_those_of_the_mixture(make_exact_pipeline, name, steps):
    pipeline = make_exact_pipeline(name)
    arguments = {"num_images_per_label": 1500, "num_inference_steps": steps, **LATENTS}
    images = pipeline([0, 1], generator=torch.Generator().manual_seed(0), **arguments).images
    for label, points in enumerate(to_points(images).reshape(2, -1, 2)):
        # The components are far apart.
        nearest = torch.cdist(points, MEANS[label]).argmin(1)
        for component in range(3):
            own = points[nearest == component]
            assert len(own) / len(points) == pytest.approx(WEIGHTS[label, component].item(), abs=0.015)
            torch.testing.assert_close(own.mean(0), MEANS[label, component], rtol=0, atol=0.03)
            torch.testing.assert_close(own.T.cov(), COVARIANCES[component], rtol=0, atol=0.02)


@pytest.mark.parametrize("shift", [1.0, 0.5])
@pytest.mark.parametrize(
    "name, order, error",
    [
        ("euler", (0.95, 1.05), 0.02),
        ("heun", (1.9, 2.2), 3e-5),
        ("dpm", (1.5, 2.2), 8e-4),
        ("unipc", (1.9, 2.2), 1e-4),
    ],
)
def test_trajectories_converge_at_the_order_of_the_method(make_exact_pipeline, name, order, error, shift):
    pipeline, noise, labels = make_exact_pipeline(name, shift), torch.randn(16, 2, 3, 4), torch.arange(16) % 2
    expected = runge_kutta(noise, labels)
    steps, errors = [24, 48, 96, 192], []
    for count in steps:
        images = pipeline(labels, latents=noise, num_inference_steps=count, **LATENTS).images
        # The median: points that start between two components tell little.
        errors.append((to_points(images) - expected).norm(dim=-1).median().item())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order[0] < slope < order[1] and errors[-1] < error


def test_timesteps_that_are_rounded_to_the_same_number(make_exact_pipeline):
    pipeline, noise, labels = make_exact_pipeline("dpm", shift=20.0), torch.randn(4, 2, 3, 4), torch.arange(4) % 2
    images = pipeline(labels, latents=noise, num_inference_steps=512, **LATENTS).images
    first, second, *_ = pipeline.scheduler.timesteps.tolist()
    assert first == second
    torch.testing.assert_close(to_points(images), runge_kutta(noise, labels), rtol=0, atol=0.02)


# --- times ---


# Shifts of a third and 0.4 round the first sigma above 1.
@pytest.mark.parametrize("shift", [1.0, 0.3, 1 / 3, 0.4, 3.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_times_of_the_model(make_exact_pipeline, name, shift):
    pipeline = make_exact_pipeline(name, shift)
    pipeline(0, num_inference_steps=10, **LATENTS)
    times = torch.tensor([t for t, _ in pipeline.transformer.calls])
    # Even steps, which the shift moves; Heun's method sees every time but the first at the end of a step and again at
    # the start of the next, and has its last, tiny step by Euler's.
    even = torch.linspace(0, 1, 10)[[0] + [1 + place // 2 for place in range(18)]]
    if name != "heun":
        even = torch.linspace(0, 0.9, 10)
    factor = 1 / shift
    torch.testing.assert_close(times, factor * even / (1 + (factor - 1) * even), rtol=0, atol=0.01)
    assert times[0] < 2e-5 and (name != "heun" or torch.equal(times[1::2], times[2::2]))


@torch.no_grad()
def guided_velocity(transformer, latents, labels, t, guidance_scale, interval):
    times = torch.full((len(latents),), t)
    velocity = transformer(latents, times, labels).sample
    if guidance_scale > 1 and interval[0] <= t <= interval[1]:
        null = transformer(latents, times, torch.full_like(labels, 5)).sample
        velocity = null + guidance_scale * (velocity - null)
    return velocity


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("guidance_scale, interval", [(1.0, (0.0, 1.0)), (2.5, (0.0, 1.0)), (2.5, (0.3, 0.65))])
def test_steps_by_hand(make_real_pipeline, name, guidance_scale, interval):
    pipeline, noise, labels = make_real_pipeline(name), torch.randn(3, 2, 3, 4), torch.tensor([4, 0, 2])
    guidance = {"guidance_scale": guidance_scale, "guidance_interval": interval}
    images = pipeline(labels, latents=noise, num_inference_steps=10, **guidance, **LATENTS).images
    times = np.linspace(0, 1, 11) if name == "euler" else [*np.linspace(0, 0.999, 10), 1.0]
    expected = noise
    for start, end in zip(times[:-1], times[1:], strict=True):
        velocity = guided_velocity(pipeline.transformer, expected, labels, start, guidance_scale, interval)
        if name == "heun" and end < 1:
            there = expected + (end - start) * velocity
            velocity += guided_velocity(pipeline.transformer, there, labels, end, guidance_scale, interval)
            velocity /= 2
        expected = expected + (end - start) * velocity
    assert (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "interval, counts", [((0.25, 0.55), (3, 4, 3, 3)), ((0.0, 0.0), (1, 1, 0, 0)), ((0, 1), None)]
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_interval(make_exact_pipeline, name, interval, counts):
    pipeline = make_exact_pipeline(name)
    guidance = {"guidance_scale": 3.0, "guidance_interval": interval}
    pipeline([0, 1], num_inference_steps=10, **guidance, **LATENTS)
    calls = pipeline.transformer.calls
    assert len(calls) == (19 if name == "heun" else 10)
    for t, labels in calls:
        assert labels == ([0, 1, 2, 2] if interval[0] <= t <= interval[1] else [0, 1])
    expected = len(calls) if counts is None else counts[list(SCHEDULERS).index(name)]
    assert sum(len(labels) == 4 for _, labels in calls) == expected


@pytest.mark.parametrize("interval, guided", [((0.8, 1.0), 2), ((0.0, 0.3), 4), ((0.1, 0.1), 1)])
def test_ends_of_the_guidance_interval_are_part_of_it(make_exact_pipeline, interval, guided):
    pipeline = make_exact_pipeline("euler")
    pipeline(0, num_inference_steps=10, guidance_scale=3.0, guidance_interval=interval, **LATENTS)
    assert sum(len(labels) == 2 for _, labels in pipeline.transformer.calls) == guided


# --- snapping, callbacks, batches, compilation ---


@pytest.mark.parametrize("name", SCHEDULERS)
def test_snapping(make_real_pipeline, name):
    pipeline, noise = make_real_pipeline(name), torch.randn(3, 2, 3, 4)
    options = {"latents": noise, "num_inference_steps": 5, "output_type": "latent"}
    plain = pipeline([0, 1, 2], snap_to_codes=False, **options).images
    snapped = pipeline([0, 1, 2], **options).images
    # By comparison with every code: multiples of 1/2 and of 1, times the scaling factor.
    for channel, codes in enumerate(([-1, -0.5, 0, 0.5, 1], [-1, 0, 1])):
        codes = torch.tensor(codes) * 1.5
        nearest = codes[(plain[:, channel, ..., None] - codes).abs().argmin(-1)]
        torch.testing.assert_close(snapped[:, channel], nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokenizer_class", [VQModel, AutoencoderKL])
def test_snapping_with_other_tokenizers(make_dit, make_baseline, tokenizer_class):
    tokenizer = make_baseline(tokenizer_class, scaling_factor=1.5)
    pipeline = IFSQDiTPipeline(make_dit(sample_size=4), tokenizer, SCHEDULERS["heun"]())
    options = {"latents": torch.randn(2, 3, 4, 4), "num_inference_steps": 5, "output_type": "latent"}
    expected = pipeline([0, 1], snap_to_codes=False, **options).images
    if tokenizer_class is VQModel:
        codebook = tokenizer.quantize.embedding.weight.detach() * 1.5
        away = (expected.movedim(1, -1)[..., None, :] - codebook).square().sum(-1)
        expected = codebook[away.argmin(-1)].movedim(-1, 1)
    torch.testing.assert_close(pipeline([0, 1], **options).images, expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_callback_sees_every_step_once(make_exact_pipeline, name):
    pipeline, seen = make_exact_pipeline(name), []

    def callback(pipe, step, timestep, values):
        seen.append((step, len(pipe.transformer.calls), values["latents"]))
        return {}

    images = pipeline([0, 1], num_inference_steps=6, callback_on_step_end=callback, **LATENTS).images
    calls = [2, 4, 6, 8, 10, 11] if name == "heun" else range(1, 7)
    assert [(step, count) for step, count, _ in seen] == list(enumerate(calls))
    torch.testing.assert_close(seen[-1][2], images)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_changed_by_the_callback_are_gone_on_from(make_exact_pipeline, name):
    pipeline, middle, labels = make_exact_pipeline(name), torch.randn(4, 2, 3, 4), torch.arange(4) % 2

    def callback(pipe, step, timestep, values):
        if step == 79:
            values["latents"] = middle
            callback.t = 1 - pipe.scheduler.sigmas[pipe.scheduler.step_index].item()
        return values

    images = pipeline(labels, num_inference_steps=200, callback_on_step_end=callback, **LATENTS).images
    assert callback.t == pytest.approx(0.4, abs=0.01)
    expected = runge_kutta(middle, labels, start=callback.t)
    assert (to_points(images) - expected).norm(dim=-1).median() < 0.02


def test_latents_of_another_shape_from_the_callback(make_exact_pipeline):
    with pytest.raises(ValueError, match=r"`callback_on_step_end` must return `latents` of shape \(1, 2, 3, 4\)"):
        make_exact_pipeline("euler")(0, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 2, 4, 3)})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokenizer_class", [VQModel, AutoencoderKL])
def test_latents_that_are_not_finite_give_no_picture(make_dit, make_baseline, tokenizer_class, bad):
    pipeline = IFSQDiTPipeline(make_dit(sample_size=4), make_baseline(tokenizer_class), SCHEDULERS["euler"](1.0))
    with pytest.raises(ValueError, match="latents are not finite any more.*`callback_on_step_end` returned NaN"):
        pipeline(0, num_inference_steps=3, callback_on_step_end=lambda *_: {"latents": torch.full((1, 3, 4, 4), bad)})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_batches_give_the_same_images(make_real_pipeline, name):
    pipeline, steps = make_real_pipeline(name), []

    def images(batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
        options = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8), "num_inference_steps": 4}

        def callback(pipe, step, timestep, values):
            steps.append((step, len(values["latents"])))
            return values

        options |= {"batch_size": batch_size, "callback_on_step_end": callback, **LATENTS}
        return pipeline([0, 1, 2, 3, 4], generator=generators, **options).images

    expected = images(None)
    for batch_size in (1, 2, 5, 7):
        torch.testing.assert_close(images(batch_size), expected, rtol=0, atol=1e-5)
    assert steps[:4] == [(step, 5) for step in range(4)]
    assert steps[24:36] == [(step, size) for size in (2, 2, 1) for step in range(4)]


def test_compiled(make_real_pipeline):
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    pipeline = make_real_pipeline("heun")

    def images(seed, labels):
        noise = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(seed))
        options = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8), "num_inference_steps": 6}
        return pipeline(labels, latents=noise, **options, **LATENTS).images

    expected = images(0, [1, 2]), images(1, [3, 0])
    pipeline.compile(backend="aot_eager")
    torch.testing.assert_close(images(0, [1, 2]), expected[0], rtol=0, atol=1e-5)
    # One graph with the unconditional rows and one without.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch.testing.assert_close(images(1, [3, 0]), expected[1], rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


# --- schedulers that are refused ---


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DPMSolverMultistepScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True),
        FlowMatchLCMScheduler(),
        SASolverScheduler(**FLOW),
        DPMSolverSinglestepScheduler(**FLOW),
        DEISMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_that_are_refused(make_real_pipeline, scheduler):
    pipeline = make_real_pipeline("euler")
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=f"`scheduler` must be a deterministic.*got {type(scheduler).__name__}"):
        pipeline(0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True),
        UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True),
        DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
        UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
    ],
)
def test_sigmas_that_do_not_go_from_noise_to_data(make_exact_pipeline, scheduler):
    pipeline = make_exact_pipeline("euler")
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=f"`scheduler` must go from noise.*config of {type(scheduler).__name__}"):
        pipeline(0)
    assert not pipeline.transformer.calls
