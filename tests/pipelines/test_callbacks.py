"""What a function that is called after each step sees and may do."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback


PIPELINES = ["ar", "dit"]
NAME = {"ar": "indices", "dit": "latents"}
OPTIONS = {"ar": {}, "dit": {"num_inference_steps": 5}}


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


class Interrupt:
    """Ends the generation after a number of steps, counted over all batches; remembers what it saw last."""

    def __init__(self, steps):
        self.steps, self.calls, self.seen = steps, 0, None

    def __call__(self, pipe, step, timestep, values):
        self.calls += 1
        (self.seen,) = values.values()
        pipe._interrupt = self.calls == self.steps
        return values


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_callback_may_call_the_pipeline(make_pipeline, kind):
    """For a preview, with other options: the images of the outer call are as if it had not."""
    pipeline = make_pipeline(kind)
    arguments = {"guidance_scale": 3.0, **OPTIONS[kind], "output_type": "latent"}
    expected = pipeline([1, 2], generator=generators(2), **arguments).images

    def preview(pipe, step, timestep, values):
        steps = {"num_inference_steps": 2} if kind == "dit" else {}
        pipe(0, generator=torch.Generator().manual_seed(9), **steps)
        return values

    images = pipeline([1, 2], generator=generators(2), callback_on_step_end=preview, **arguments).images
    assert torch.equal(images, expected) and pipeline.guidance_scale == 3.0


def test_calls_in_threads_do_not_disturb_one_another(make_pipeline):
    pipeline = make_pipeline("dit")
    arguments = [{"num_inference_steps": steps, "output_type": "latent"} for steps in (3, 8, 5, 4)]
    alone = [pipeline([1, 2], generator=generators(2), **each).images for each in arguments]
    started = threading.Barrier(len(arguments))

    def wait(pipe, step, timestep, values):
        if step == 0:
            started.wait(60)
        return values

    def call(each):
        return pipeline([1, 2], generator=generators(2), callback_on_step_end=wait, **each).images

    with ThreadPoolExecutor(len(arguments)) as threads:
        for images, expected in zip(threads.map(call, arguments), alone, strict=True):
            assert torch.equal(images, expected)


# --- interruption ---


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("kind", PIPELINES)
def test_interruption_ends_the_generation(make_pipeline, kind, steps):
    pipeline, interrupt = make_pipeline(kind), Interrupt(steps)
    latent = {"snap_to_codes": False} if kind == "dit" else {}
    arguments = {"generator": generators(2), "callback_on_step_end": interrupt, **OPTIONS[kind], **latent}
    images = pipeline([1, 2], output_type="latent", **arguments).images
    assert interrupt.calls == steps and pipeline.interrupt
    torch.testing.assert_close(images.flatten(1), interrupt.seen.flatten(1))
    if kind == "ar":
        whole = pipeline([1, 2], generator=generators(2), output_type="latent").images.flatten(1)
        assert torch.equal(images.flatten(1)[:, :steps], whole[:, :steps])
        assert not images.flatten(1)[:, steps:].any() and whole[:, steps:].any()


@pytest.mark.parametrize("kind", PIPELINES)
def test_what_there_is_is_decoded(make_pipeline, kind):
    pipeline = make_pipeline(kind)

    def images(output_type):
        arguments = {"generator": generators(2), "callback_on_step_end": Interrupt(4), **OPTIONS[kind]}
        return pipeline([1, 2], output_type=output_type, **arguments).images

    decode = (
        pipeline.tokenizer.decode_indices if kind == "ar" else lambda codes: pipeline.tokenizer.decode(codes / 1.5)
    )
    with torch.no_grad():
        expected = decode(images("latent")).sample
    torch.testing.assert_close(images("pt"), (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", PIPELINES)
def test_batches_after_an_interruption_are_left_out(make_pipeline, kind):
    pipeline = make_pipeline(kind)
    in_a_batch = 12 if kind == "ar" else 5
    whole = pipeline([0, 1, 2, 3, 4], generator=generators(5), output_type="latent", **OPTIONS[kind]).images
    for steps, images in ((in_a_batch - 1, 2), (in_a_batch, 2), (in_a_batch + 1, 4), (2 * in_a_batch, 4)):
        interrupt = Interrupt(steps)
        arguments = {"batch_size": 2, "output_type": "latent", "callback_on_step_end": interrupt, **OPTIONS[kind]}
        got = pipeline([0, 1, 2, 3, 4], generator=generators(5), **arguments).images
        assert interrupt.calls == steps and len(got) == images
        done = steps // in_a_batch * 2
        assert torch.equal(got[:done], whole[:done])


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_next_call_is_not_interrupted(make_pipeline, kind):
    pipeline = make_pipeline(kind)
    assert pipeline.interrupt is False
    arguments = {"output_type": "latent", **OPTIONS[kind]}
    expected = pipeline([1, 2], generator=generators(2), **arguments).images
    pipeline([1, 2], callback_on_step_end=Interrupt(2), **arguments)
    assert torch.equal(pipeline([1, 2], generator=generators(2), **arguments).images, expected)
    assert pipeline.interrupt is False


def test_interruption_between_the_two_calls_of_a_step(make_pipeline):
    pipeline, interrupt = make_pipeline("dit", scheduler=FlowMatchHeunDiscreteScheduler()), Interrupt(2)
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(pipeline.interrupt))
    pipeline(0, num_inference_steps=5, callback_on_step_end=interrupt)
    assert interrupt.calls == 2 and len(calls) == 4


def test_interruption_of_compiled_decoding(make_pipeline):
    pipeline = make_pipeline("ar")
    expected = pipeline(1, do_sample=False, output_type="latent", callback_on_step_end=Interrupt(3)).images
    pipeline.compile(backend="aot_eager")
    for _ in range(2):
        interrupt = Interrupt(3)
        images = pipeline(1, do_sample=False, output_type="latent", callback_on_step_end=interrupt).images
        assert torch.equal(images, expected) and interrupt.calls == 3
    assert pipeline(1, do_sample=False, output_type="latent").images.flatten(1)[:, 3:].any()


def test_numbers_that_are_not_finite_when_interrupted(make_pipeline):
    def callback(pipe, step, timestep, values):
        pipe._interrupt = True
        return {"latents": values["latents"] * torch.nan}

    with pytest.raises(ValueError, match="not finite any more"):
        make_pipeline("dit")(0, callback_on_step_end=callback, **OPTIONS["dit"])


# --- what is shown, and diffusers' own callbacks ---


@pytest.mark.parametrize("kind", PIPELINES)
def test_tensor_inputs(make_pipeline, kind):
    pipeline, seen = make_pipeline(kind), []

    def callback(pipe, step, timestep, values):
        seen.append(list(values))
        return values

    def images(**arguments):
        seen.clear()
        arguments = {"generator": generators(1), "output_type": "latent", **OPTIONS[kind], **arguments}
        return pipeline(0, callback_on_step_end=callback, **arguments).images

    expected, steps = images(), len(seen)
    for names in ([], [NAME[kind]], (NAME[kind],)):
        assert torch.equal(images(callback_on_step_end_tensor_inputs=names), expected)
        assert seen == [list(names)] * steps


class Recorder(PipelineCallback):
    """Of diffusers' kind: remembers the steps from a share of all of them on."""

    def __init__(self, tensor_inputs, **options):
        super().__init__(**options)
        self.names, self.steps = tensor_inputs, []

    @property
    def tensor_inputs(self):
        return self.names

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert sorted(callback_kwargs) == sorted(self.names)
        if step_index >= pipeline.num_timesteps * self.config.cutoff_step_ratio:
            self.steps.append(step_index)
        return callback_kwargs


@pytest.mark.parametrize("kind, steps", [("ar", range(6, 12)), ("dit", range(3, 5))])
def test_callbacks_of_diffusers(make_pipeline, kind, steps):
    pipeline = make_pipeline(kind)
    for names in ([], [NAME[kind]]):
        recorder = Recorder(names, cutoff_step_ratio=0.5)
        pipeline(0, callback_on_step_end=recorder, **OPTIONS[kind])
        assert recorder.steps == [*steps]
    recorders = [Recorder([NAME[kind]], cutoff_step_ratio=0.5) for _ in range(2)]
    pipeline(0, callback_on_step_end=MultiPipelineCallbacks(recorders), **OPTIONS[kind])
    assert [recorder.steps for recorder in recorders] == [[*steps]] * 2


@pytest.mark.parametrize("kind", PIPELINES)
def test_callbacks_of_diffusers_for_other_pipelines(make_pipeline, kind):
    with pytest.raises(ValueError, match=rf"`callback_on_step_end_tensor_inputs`.*'{NAME[kind]}'.*'prompt_embeds'"):
        make_pipeline(kind)(0, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4))


@pytest.mark.parametrize("scheduler", [None, FlowMatchHeunDiscreteScheduler()])
def test_number_of_steps_and_guidance_scale(make_pipeline, scheduler):
    pipeline, seen = make_pipeline("dit", scheduler=scheduler), []

    def callback(pipe, step, timestep, values):
        seen.append((step, pipe.num_timesteps, pipe.guidance_scale))
        return values

    pipeline(0, guidance_scale=2, callback_on_step_end=callback, **OPTIONS["dit"])
    assert seen == [(step, 5, 2.0) for step in range(5)]


def test_guidance_scale_of_the_generation_config(make_pipeline):
    pipeline, seen = make_pipeline("ar"), []

    def callback(pipe, step, timestep, values):
        seen.append(pipe.guidance_scale)
        return values

    for configured, given, expected in ((None, {}, 1.0), (1.5, {}, 1.5), (1.5, {"guidance_scale": 2.0}, 2.0)):
        pipeline.transformer.generation_config.guidance_scale = configured
        pipeline(0, callback_on_step_end=callback, **given)
        assert set(seen) == {expected}
        seen.clear()


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize(
    "scheduler",
    [None, UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")],
)
def test_guidance_turned_off_by_the_callback(make_pipeline, scheduler, batch_size):
    pipeline = make_pipeline("dit", scheduler=scheduler)

    def callback(pipe, step, timestep, values):
        if step == 2:
            pipe._guidance_scale = 0.0
        return values

    def images(**arguments):
        options = {"generator": generators(2), "num_inference_steps": 10, "snap_to_codes": False}
        return pipeline([0, 1], guidance_scale=3.0, output_type="latent", **options, **arguments).images

    turned_off = images(callback_on_step_end=callback, batch_size=batch_size)
    # Steps 0 to 2 begin at t = 0, 0.1 and 0.2.
    assert torch.equal(turned_off, images(guidance_interval=(0.0, 0.25), batch_size=batch_size))
    assert not torch.equal(turned_off, images(batch_size=batch_size))


def test_guidance_of_the_ar_model_is_not_changed_by_the_callback(make_pipeline):
    def callback(pipe, step, timestep, values):
        pipe._guidance_scale = 0.0
        return values

    with pytest.raises(ValueError, match="`callback_on_step_end` must leave the guidance scale.*`guidance_interval`"):
        make_pipeline("ar")(0, guidance_scale=2.0, callback_on_step_end=callback)


# --- what it may not return ---


BAD = [None, [], 0, "indices", {"x": 1}, {"prompt_embeds": torch.zeros(1)}]
BAD_TENSORS = [
    None,
    0,
    [0.0],
    torch.zeros(2),
    torch.ones(1, 1, dtype=torch.bool),
    torch.zeros(1, 1, dtype=torch.cfloat),
]


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("returned", BAD, ids=repr)
def test_returning_something_else(make_pipeline, kind, returned):
    with pytest.raises(
        TypeError, match=f"`callback_on_step_end` must return a dictionary, empty or with `{NAME[kind]}`"
    ):
        make_pipeline(kind)(0, callback_on_step_end=lambda *_: returned, **OPTIONS[kind])


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("value", [*BAD_TENSORS, "other kind", "meta"], ids=repr)
def test_returning_other_values(make_pipeline, kind, value):
    def callback(pipe, step, timestep, values):
        (values,) = values.values()
        changed = value
        if value == "meta":
            changed = values.to("meta")
        elif value == "other kind":
            changed = values.float() if kind == "ar" else values.long()
        elif isinstance(value, torch.Tensor) and value.ndim == 2:
            changed = value.expand(len(values), values[0].numel()).view(values.shape)
        return {NAME[kind]: changed}

    with pytest.raises(ValueError, match=f"`callback_on_step_end` must return `{NAME[kind]}` of shape .* got "):
        make_pipeline(kind)(0, callback_on_step_end=callback, **OPTIONS[kind])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_ids_of_other_integers_from_the_callback(make_pipeline, dtype):
    pipeline = make_pipeline("ar")
    expected = pipeline(0, do_sample=False, output_type="latent").images
    changed = pipeline(
        0,
        do_sample=False,
        output_type="latent",
        callback_on_step_end=lambda *arguments: {"indices": arguments[3]["indices"].to(dtype)},
    ).images
    assert torch.equal(changed, expected) and changed.dtype == torch.int64


@pytest.mark.parametrize("callback", [5, "f", [print], lambda: None, lambda pipe, step, values: values])
@pytest.mark.parametrize("kind", PIPELINES)
def test_what_is_no_callback(make_pipeline, kind, callback):
    with pytest.raises(TypeError, match="`callback_on_step_end` must be a function of the pipeline, the step, .* got"):
        make_pipeline(kind)(0, callback_on_step_end=callback, **OPTIONS[kind])
