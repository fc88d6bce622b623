"""Decoding one token at a time, with a cache, guidance and compiled layers, against whole forward passes."""

import copy
import math
import pickle
import shutil
import tempfile

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from hf_ifsq import IFSQARPipeline
from hf_ifsq.guidance import guidance_scales


FACTORS = {1: [12], 2: [4, 3], 4: [2, 3, 2, 4]}
every_factorization = pytest.mark.parametrize(
    "vocab_sizes", FACTORS.values(), ids=lambda sizes: f"{len(sizes)}-factors"
)
# Without a C++ compiler the traced graphs run as they are.
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()


def compile_decoding(model, **kwargs):
    model.setup_cache(max_rows=1)
    for decoder in model.decoders:
        decoder.compile(fullgraph=True, **kwargs)


def record_logits(model):
    """List that fills with the logits of each head at each step, `(rows, vocab_size)`."""
    recorded = []
    for head in model.lm_heads:
        head.register_forward_hook(lambda _, inputs, output: recorded.append(output[:, -1]))
    return recorded


def logits_of_forward(model, class_labels, indices):
    """Of each head at each token, in the order of decoding, by one forward pass over the whole sequences."""
    logits = model(class_labels, indices).logits.split(model.config.vocab_sizes, dim=-1)
    return [scores[:, token] for token in range(indices.shape[1]) for scores in logits]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["eager", "sdpa", "compiled"])
@every_factorization
def test_cached_logits_equal_those_of_a_forward_pass(make_ar, vocab_sizes, mode, guidance_scale):
    model = make_ar(vocab_sizes=vocab_sizes)
    model.set_attn_implementation("eager" if mode == "eager" else "sdpa")
    reference = make_ar(vocab_sizes=vocab_sizes)
    reference.load_state_dict(model.state_dict())
    if mode == "compiled":
        compile_decoding(model, dynamic=False, backend=BACKEND)
    recorded = record_logits(model)
    class_labels = torch.tensor([3, 0, 5])
    indices = model.generate(class_labels, guidance_scale=guidance_scale)
    with torch.no_grad():
        expected = logits_of_forward(reference, class_labels, indices)
        if guidance_scale > 1:
            null = logits_of_forward(reference, torch.full_like(class_labels, 5), indices)
            expected = [torch.cat(pair) for pair in zip(expected, null, strict=True)]
    assert len(recorded) == 12 * len(vocab_sizes)
    for got, wanted in zip(recorded, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@every_factorization
def test_logits_of_a_row_do_not_depend_on_the_others(make_ar, vocab_sizes, mode):
    model = make_ar(vocab_sizes=vocab_sizes)
    if mode == "compiled":
        compile_decoding(model, dynamic=False, backend=BACKEND)
    recorded = record_logits(model)

    def logits_of_first_row(class_labels):
        recorded.clear()
        model.generate(torch.tensor(class_labels), guidance_scale=2.0, do_sample=False)
        return torch.cat([logits[[0, len(class_labels)]] for logits in recorded], dim=1)

    alone = logits_of_first_row([3])
    torch.testing.assert_close(logits_of_first_row([3, 1, 4]), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of_first_row([3, 0, 2]), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocab_sizes, graphs", [([12], 1), ([4, 3], 2), ([2, 3, 2, 4], 2)])
def test_one_graph_for_the_whole_sequence(make_ar, vocab_sizes, graphs):
    model, class_labels = make_ar(vocab_sizes=vocab_sizes), torch.tensor([3, 0])
    expected = [model.generate(class_labels, guidance_scale=scale, do_sample=False) for scale in (2.0, 3.0)]
    compile_decoding(model, dynamic=False, backend="aot_eager")
    assert torch.equal(model.generate(class_labels, guidance_scale=2.0, do_sample=False), expected[0])
    assert torch.equal(model.generate(class_labels, guidance_scale=3.0, do_sample=False), expected[1])
    # Nothing about sampling is part of a graph.
    model.generate(class_labels, guidance_scale=1.5, guidance_schedule="linear", guidance_interval=(0.2, 0.6), top_k=2)
    # One over the grid and, for several factors, one over those.
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [3, 3, 3, 3, 3]),
        ("linear", [1, 1.5, 2, 2.5, 3]),
        ("cosine", [1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3]),
    ],
)
def test_guidance_schedules(schedule, expected):
    assert guidance_scales(5, 3.0, schedule, (0.0, 1.0)) == pytest.approx(expected)
    assert guidance_scales(5, 3.0, schedule, (0.25, 0.6)) == pytest.approx([1, *expected[1:3], 1, 1])
    assert guidance_scales(5, 1.0, schedule, (0.0, 1.0)) == [1.0] * 5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("interval, last_guided", [((0.0, 1.0), 11), ((0.2, 0.5), 5), ((0.95, 1.0), 11)])
@pytest.mark.parametrize("vocab_sizes", [[12], [4, 3]], ids=["1-factor", "2-factors"])
def test_guidance_over_the_sequence(make_ar, vocab_sizes, interval, last_guided, schedule, compiled):
    model, class_labels, null = make_ar(vocab_sizes=vocab_sizes), torch.tensor([3, 1]), torch.tensor([5, 5])
    if compiled:
        compile_decoding(model, dynamic=False, backend="eager")
    options = {"guidance_scale": 4.0, "guidance_schedule": schedule, "guidance_interval": interval}
    if not compiled:
        rows = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        model.generate(class_labels, **options)
        hook.remove()
        assert rows == [4] * (last_guided + 1) + [2] * (11 - last_guided)
    greedy = model.generate(class_labels, do_sample=False, **options)

    expected = torch.zeros(2, 12, dtype=torch.long)
    for token in range(12):
        progress = token / 11
        growth = {"constant": 1, "linear": progress, "cosine": math.sin(math.pi * progress / 2) ** 2}[schedule]
        scale = 1 + 3 * growth if interval[0] <= progress <= interval[1] else 1
        for factor in range(len(vocab_sizes)):
            place = token * len(vocab_sizes) + factor
            with torch.no_grad():
                cond, uncond = (logits_of_forward(model, labels, expected)[place] for labels in (class_labels, null))
            choice = (uncond + scale * (cond - uncond)).argmax(-1)
            expected[:, token] += choice * math.prod(vocab_sizes[:factor])
    assert torch.equal(greedy, expected)


@pytest.mark.parametrize(
    "name, value", [("guidance_schedule", "sine"), ("guidance_interval", (0.6, 0.4)), ("guidance_interval", (0, 1.5))]
)
def test_guidance_out_of_range(make_ar, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        make_ar().generate(torch.tensor([1]), guidance_scale=2.0, **{name: value})


def test_options_of_each_factor(make_ar):
    model, class_labels = make_ar(vocab_sizes=[4, 3]), torch.arange(5)

    def generate(**options):
        generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
        indices = model.generate(class_labels, generator=generators, **options)
        return indices % 4, indices // 4

    # A single value is the same as one for each factor.
    for name, value in (("temperature", 0.7), ("top_k", 2), ("top_p", 0.6)):
        for alone, each in zip(generate(**{name: value}), generate(**{name: [value, value]}), strict=True):
            assert torch.equal(alone, each)
    # What is said of the second factor leaves the first one of the first token as it is, and the other way round.
    first, second = generate()
    for options in ({"temperature": [1.0, 0.01]}, {"top_k": [None, 1]}, {"top_p": [None, 0.0]}):
        changed_first, changed_second = generate(**options)
        assert torch.equal(changed_first[:, 0], first[:, 0])
        assert not torch.equal(changed_second, second)
    greedy = model.generate(class_labels, do_sample=False) % 4
    only_first, free_second = generate(top_k=[1, None])
    assert torch.equal(only_first[:, 0], greedy[:, 0])
    assert free_second.unique().numel() == 3


@pytest.mark.parametrize("name, value", [("temperature", [1.0]), ("top_k", [1, 2, 3]), ("top_p", (0.5,))])
def test_options_of_another_number_of_factors(make_ar, name, value):
    with pytest.raises(ValueError, match=rf"`{name}`.*each of the 2 factors.*\[{', '.join(map(str, value))}\]"):
        make_ar(vocab_sizes=[4, 3]).generate(torch.tensor([1]), **{name: value})


def make_pipeline(make_ar, make_autoencoder, vocab_sizes=(5, 3)):
    tokenizer = make_autoencoder(levels=(5, 3), sample_size=(12, 16))
    pipeline = IFSQARPipeline(make_ar(vocab_sizes=list(vocab_sizes)), tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_batch_size_does_not_change_the_images(make_ar, make_autoencoder, batch_size, output_type):
    pipeline, steps = make_pipeline(make_ar, make_autoencoder), []

    def callback(pipe, step, timestep, values):
        steps.append((step, len(values["indices"])))
        return values

    def run(**options):
        return pipeline(
            [0, 1, 2, 3, 4],
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
            **options,
        ).images

    expected = run()
    split = run(batch_size=batch_size, callback_on_step_end=callback)
    torch.testing.assert_close(split, expected, rtol=0, atol=1e-5)
    sizes = [min(batch_size, 5 - start) for start in range(0, 5, batch_size)]
    assert steps == [(step, size) for size in sizes for step in range(12)]


def test_batch_size_out_of_range(make_ar, make_autoencoder):
    with pytest.raises(ValueError, match="`batch_size` must be an integer .* got 0"):
        make_pipeline(make_ar, make_autoencoder)(0, batch_size=0)


def test_compiled_pipeline(make_ar, make_autoencoder):
    pipeline = make_pipeline(make_ar, make_autoencoder)

    def run(**options):
        generator = torch.Generator().manual_seed(0)
        return pipeline([1, 2, 3], guidance_scale=2.0, generator=generator, output_type="latent", **options).images

    expected = run()
    pipeline.compile(backend="aot_eager")
    assert torch.equal(run(), expected)
    assert torch.equal(run(batch_size=2), expected)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.parametrize("vocab_sizes", [[15], [5, 3]], ids=["1-factor", "2-factors"])
def test_compiled_for_any_number_of_images(make_ar, make_autoencoder, vocab_sizes):
    pipeline = make_pipeline(make_ar, make_autoencoder, vocab_sizes)
    expected = [pipeline([0] * count, do_sample=False, output_type="latent").images for count in range(1, 11)]
    pipeline.compile(backend="aot_eager")
    for count in range(1, 11):
        got = pipeline([0] * count, do_sample=False, output_type="latent").images
        assert torch.equal(got, expected[count - 1])
    assert pipeline.transformer.decoders[0].memory[0].shape[1] == 10


@pytest.mark.parametrize("mode", ["plain", "set up", "compiled"])
def test_caches_are_not_shared_by_calls_within_calls(make_ar, mode):
    model, class_labels = make_ar(vocab_sizes=[4, 3]), torch.tensor([3, 0])
    expected = model.generate(class_labels, do_sample=False)
    if mode == "compiled":
        compile_decoding(model, backend="aot_eager")
    elif mode == "set up":
        model.setup_cache(max_rows=2)
    inner = []
    outer = model.generate(
        class_labels,
        do_sample=False,
        callback=lambda step, indices: step == 3 and inner.append(model.generate(class_labels, do_sample=False)),
    )
    assert torch.equal(outer, expected) and torch.equal(inner[0], expected)
    assert len(model.decoders) == (0 if mode == "plain" else 2)


def test_a_cache_that_is_set_up_stays_where_it_is(make_ar):
    model = make_ar(vocab_sizes=[4, 3])
    expected = {rows: model.generate(torch.arange(rows), do_sample=False) for rows in (1, 2, 3, 5)}
    model.setup_cache(max_rows=3)

    def addresses():
        return [memory.data_ptr() for decoder in model.decoders for memory in decoder.memory]

    before = addresses()
    for rows in (2, 3, 1):
        assert torch.equal(model.generate(torch.arange(rows), do_sample=False), expected[rows])
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(torch.arange(3), callback=lambda step, indices: (_ for _ in ()).throw(RuntimeError("stop")))
    assert addresses() == before
    assert torch.equal(model.generate(torch.arange(5), do_sample=False), expected[5])
    assert model.decoders[0].memory[0].shape == (2, 5, 4, 12, 8)


def test_a_cache_that_is_set_up_is_no_part_of_the_model(make_ar, tmp_path):
    model, class_labels = make_ar(vocab_sizes=[4, 3]), torch.tensor([3, 0])
    expected = model.generate(class_labels, do_sample=False)
    names = set(model.state_dict())
    compile_decoding(model, backend="aot_eager")
    assert torch.equal(model.generate(class_labels, do_sample=False), expected)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(class_labels, do_sample=False), expected)
        # A copy reads its own weights.
        other.model.layers[1].mlp.down_proj.weight.data.neg_()
        assert not torch.equal(other.generate(class_labels, do_sample=False), expected)
        assert torch.equal(model.generate(class_labels, do_sample=False), expected)
    assert model.double().generate(class_labels, do_sample=False).shape == (2, 12)
    assert model.decoders[0].memory[0].dtype == torch.float64


def test_nothing_of_an_overflow_stays_in_a_cache_that_is_set_up(make_ar):
    model, class_labels = make_ar(), torch.tensor([3, 0])
    expected = model.generate(class_labels, do_sample=False)
    model.setup_cache(max_rows=2)
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    intact = weight.data.clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.generate(class_labels)
    weight.data.copy_(intact)
    assert torch.equal(model.generate(class_labels, do_sample=False), expected)


def test_layers_on_several_devices(make_ar):
    model, class_labels = make_ar(vocab_sizes=[4, 3]), torch.tensor([3, 0])
    expected = model.generate(class_labels, guidance_scale=2.0, do_sample=False)
    # Weights that live on the disk or on the CPU and visit the device layer by layer.
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"model": "disk"}
    with tempfile.TemporaryDirectory() as folder:
        dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)
        assert torch.equal(model.generate(class_labels, guidance_scale=2.0, do_sample=False), expected)


def test_compiled_caches_outlive_inference_mode_and_autocast(make_ar):
    model, class_labels = make_ar(), torch.tensor([3, 0])
    expected = model.generate(class_labels, do_sample=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected_in_bfloat16 = model.generate(class_labels, do_sample=False)
    compile_decoding(model, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(model.generate(class_labels, do_sample=False), expected)
    assert torch.equal(model.generate(class_labels, do_sample=False), expected)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.generate(class_labels, do_sample=False)
    assert (got == expected_in_bfloat16).float().mean() > 0.5


@pytest.mark.parametrize(
    "options", [{"guidance_interval": (0.4, 0.45)}, {"guidance_schedule": "linear", "guidance_interval": (0.0, 0.0)}]
)
def test_guidance_of_no_token(make_ar, options):
    with pytest.raises(ValueError, match="none of the 12 tokens.*no token would be guided"):
        make_ar().generate(torch.tensor([1]), guidance_scale=2.0, **options)
    make_ar().generate(torch.tensor([1]), **options)


@pytest.mark.parametrize("changed", [torch.tensor(5), torch.zeros(1, 12, dtype=torch.long), torch.zeros(2, 12)])
def test_callback_that_returns_something_else(make_ar, make_autoencoder, changed):
    pipeline = make_pipeline(make_ar, make_autoencoder)
    with pytest.raises(ValueError, match=r"`callback_on_step_end` must return `indices` of shape \(2, 12\)"):
        pipeline([0, 1], callback_on_step_end=lambda *_: {"indices": changed})


def test_callback_may_keep_what_it_sees(make_ar, make_autoencoder):
    pipeline, seen = make_pipeline(make_ar, make_autoencoder), []

    def callback(pipe, step, timestep, values):
        seen.append(values["indices"])
        return values

    pipeline([0, 1], callback_on_step_end=callback)
    assert all((indices[:, step + 1 :] == 0).all() for step, indices in enumerate(seen))
    assert not torch.equal(seen[0], seen[-1])
