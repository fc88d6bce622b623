"""Converted generators against stored outputs of the official code."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from hf_ifsq import IFSQARForImageGeneration, IFSQDiTPipeline, IFSQDiTTransformer2DModel
from hf_ifsq.conversion import convert_checkpoint
from hf_ifsq.conversion.generators import class_names
from hf_ifsq.training.losses import velocity_loss
from hf_ifsq.training.repa import RepresentationAlignment


FIXTURES = Path(__file__).parents[1] / "fixtures"
FILES = {
    "official": FIXTURES / "llamagen_ar" / "official" / "c2i_tiny.pt",
    "repa": FIXTURES / "llamagen_ar" / "ifsq_repa" / "0000100.pt",
    "factorized": FIXTURES / "llamagen_ar_factorized" / "0000100.pt",
    "dit": FIXTURES / "dit" / "0000100.pt",
    "dit_plain": FIXTURES / "dit_plain" / "0000100.pt",
}
AR, DIT = ("official", "repa", "factorized"), ("dit", "dit_plain")
# What the tiny files cannot tell, whose sizes are none of the named ones.
ARGUMENTS = {
    "official": {"num_attention_heads": 4, "grid_size": (4, 4)},
    "repa": {"num_attention_heads": 4},
    "factorized": {"num_attention_heads": 4},
    "dit": {},
    "dit_plain": {},
}

close = {"atol": 1e-4, "rtol": 0}


def goldens(kind):
    return load_file(FILES[kind].parent / "goldens.safetensors")


def convert(kind, file=None, **arguments):
    return convert_checkpoint(file or FILES[kind], **{**ARGUMENTS[kind], **arguments})


def changed(tmp_path, kind, change):
    """A copy of the file of a kind after `change` of its content."""
    content = torch.load(FILES[kind], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


# Autoregressive generators.


def whole(model, tokens):
    """Whole indices of official tokens, whose last axis are the factors if there are several."""
    return model.model.join_factors(tokens.unbind(-1)) if tokens.ndim == 3 else tokens


def golden_logits(expected, name):
    parts = sorted(key for key in expected if re.fullmatch(rf"{name}(\.\d)?", key))
    assert parts
    return [expected[part] for part in parts]


def of_factors(model, logits):
    return logits.split(model.config.vocab_sizes, -1)


def assert_close_logits(logits, expected):
    for ours, official in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, official, **close)


@pytest.mark.parametrize("kind", AR)
@torch.no_grad()
def test_ar_equals_the_official_one(tmp_path, kind):
    expected = goldens(kind)
    conversion = convert(kind)
    assert conversion.entry == ("model" if kind == "official" else "ema")
    conversion.model.save_pretrained(tmp_path)
    depth = json.loads((FILES[kind].parent / "config.json").read_text())["tf_hidden_after_layers"]
    for model in (conversion.model, IFSQARForImageGeneration.from_pretrained(tmp_path)):
        assert type(model) is IFSQARForImageGeneration and not model.training and model.dtype == torch.float32
        tokens = whole(model, expected["tokens"])
        output = model(expected["cond_ids"], tokens, labels=tokens, output_hidden_states=True)
        assert_close_logits(of_factors(model, output.logits), golden_logits(expected, "tf_logits"))
        torch.testing.assert_close(output.hidden_states[depth], expected["tf_hidden"], **close)
        losses = expected["tf_losses"] if kind == "factorized" else expected["tf_loss"]
        torch.testing.assert_close(torch.stack(output.factor_losses), losses, **close)
        for scale in (1, 2):
            indices = model.generate(expected["gen_labels"], guidance_scale=float(scale), do_sample=False)
            assert torch.equal(indices, whole(model, expected[f"gen_tokens_cfg{scale}"]))


@pytest.mark.parametrize("kind", ["repa", "factorized"])
@torch.no_grad()
def test_raw_weights_of_ar(kind):
    expected = goldens(kind)
    raw = golden_logits(expected, "raw.tf_logits_row0")
    for weights in ("raw", "ema"):
        conversion = convert(kind, weights=weights)
        assert conversion.entry == {"raw": "model", "ema": "ema"}[weights]
        tokens = whole(conversion.model, expected["tokens"])[:1]
        logits = of_factors(conversion.model, conversion.model(expected["cond_ids"][:1], tokens).logits)
        if weights == "raw":
            assert_close_logits(logits, raw)
        else:
            assert all((ours - other).abs().max() > 0.07 for ours, other in zip(logits, raw, strict=True))


@pytest.mark.parametrize("kind", ["repa", "factorized"])
@torch.no_grad()
def test_projectors_of_ar(kind):
    expected, conversion = goldens(kind), convert(kind)
    (alignment,) = conversion.alignments
    assert type(alignment) is RepresentationAlignment
    assert not any("projector" in name for name in conversion.model.state_dict())
    torch.testing.assert_close(alignment.projector(expected["tf_hidden"]), expected["tf_proj.0"], **close)
    raw = convert(kind, weights="raw").alignments[0]
    assert (raw.projector(expected["tf_hidden"]) - expected["tf_proj.0"]).abs().max() > 0.07


def test_several_and_no_projectors(tmp_path):
    def add(content):
        for name, weight in list(content["ema"].items()):
            if name.startswith("projectors.0."):
                content["ema"][name.replace("projectors.0.", "projectors.1.")] = weight + 1

    first, second = convert("repa", changed(tmp_path, "repa", add)).alignments
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight + 1)
    for kind in ("official", "dit_plain"):
        assert convert(kind).alignments == []


def named_shapes(layers, width, inner, vocab_size, classes):
    shapes = {
        "cls_embedding.embedding_table.weight": (classes, width),
        "tok_embeddings.weight": (vocab_size, width),
        "norm.weight": (width,),
        "output.weight": (vocab_size, width),
    }
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * width, width),
            f"layers.{layer}.attention.wo.weight": (width, width),
            f"layers.{layer}.feed_forward.w1.weight": (inner, width),
            f"layers.{layer}.feed_forward.w3.weight": (inner, width),
            f"layers.{layer}.feed_forward.w2.weight": (width, inner),
            f"layers.{layer}.attention_norm.weight": (width,),
            f"layers.{layer}.ffn_norm.weight": (width,),
        }
    return shapes


def test_a_published_llamagen_fits(tmp_path):
    # GPT-B as released, whose elements share one number: a file of some kilobytes.
    shapes = named_shapes(12, 768, 2048, 16384, 1001)
    torch.save(
        {"model": {name: torch.tensor(0.5).expand(shape) for name, shape in shapes.items()}}, tmp_path / "c2i_B_384.pt"
    )
    model = convert_checkpoint(tmp_path / "c2i_B_384.pt", grid_size=(24, 24)).model
    assert model.config.num_attention_heads == 12 and model.config.vocab_sizes == [16384]
    assert model.config.num_classes == 1000 and model.config.class_dropout_prob == 0.1
    assert model.config.grid_size == [24, 24] and model.config.intermediate_size == 2048
    assert model.config.id2label[207] == "golden retriever" and model.config.id2label[999] == "toilet tissue"
    # As LlamaGen states it.
    assert round(model.num_parameters() / 1e6) == 111


def test_other_files_of_llamagen(tmp_path):
    expected = convert("official").model.state_dict()
    # As its largest models are released, and as its trainer saves them.
    weights = torch.load(FILES["official"], weights_only=True)["model"]
    training = {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, "steps": 10, "args": {}}
    for content, entry in ((weights, None), ({"model": weights, **training}, "model")):
        torch.save(content, tmp_path / "c2i.pt")
        conversion = convert("official", tmp_path / "c2i.pt")
        assert conversion.entry == entry
        assert all(torch.equal(weight, expected[name]) for name, weight in conversion.model.state_dict().items())
    # Keys and values of fewer heads than queries.
    torch.save(weights | {"layers.0.attention.wqkv.weight": torch.zeros(64 + 2 * 32, 64)}, tmp_path / "c2i.pt")
    with pytest.raises(ValueError, match=r"1 misshapen: \['layers.0.attention.wqkv.weight of shape"):
        convert("official", tmp_path / "c2i.pt")


def test_null_class_by_the_config_of_the_file(tmp_path):
    def set_classes(number):
        return changed(tmp_path, "repa", lambda content: content["config"]["data"].update(num_classes=number))

    config = convert("repa", set_classes(11)).model.config
    assert config.num_classes == 11 and config.class_dropout_prob == 0
    for number in (9, 12):
        with pytest.raises(ValueError, match=f"trained with {number} classes .*`data.num_classes`.* has 11 rows"):
            convert("repa", set_classes(number))


def test_heads_and_grid_that_the_file_does_not_tell():
    file = FILES["official"]
    with pytest.raises(
        ValueError, match="`num_attention_heads` must be given: .* 3 layers of width 64.*'B': .12, 768"
    ):
        convert_checkpoint(file, grid_size=(4, 4))
    with pytest.raises(ValueError, match=r"`grid_size` must be given.*\(16, 16\) for .*256 .*\(24, 24\) for 384"):
        convert_checkpoint(file, num_attention_heads=4)
    for heads, message in ((5, r"`hidden_size` \(64\) must be a multiple of .*\(4 \* 5\)"), (0, "at least 1, got 0")):
        with pytest.raises(ValueError, match=message):
            convert("official", num_attention_heads=heads)
    for grid_size in ((4,), (0, 4), (4, 4, 4)):
        with pytest.raises(ValueError, match="`grid_size` must be two positive integers"):
            convert("official", grid_size=grid_size)
    for grid_size, expected in (((2, 8), [2, 8]), (4, [4, 4])):
        assert convert("official", grid_size=grid_size).model.config.grid_size == expected


def test_grid_of_the_config_of_the_file():
    assert convert("repa").model.config.grid_size == [4, 4]
    for grid_size in ([4, 4], 4):
        assert convert("repa", grid_size=grid_size).model.config.grid_size == [4, 4]
    for grid_size in ((8, 8), 8):
        with pytest.raises(ValueError, match=r"`grid_size` must be \[4, 4\] or left out.* 64 x 64 .* got \[8, 8\]"):
            convert("repa", grid_size=grid_size)


def test_arguments_of_other_formats():
    for arguments in ({"num_attention_heads": 4}, {"grid_size": (4, 4)}):
        with pytest.raises(ValueError, match="must be left out for a diffusion transformer of iFSQ, which needs none"):
            convert_checkpoint(FILES["dit"], **arguments)
    for kind in ("official", "dit"):
        with pytest.raises(ValueError, match="`config` must be left out for"):
            convert(kind, config=FILES["dit"].parent / "config.json")


# Diffusion transformers.


@pytest.mark.parametrize("kind", DIT)
@torch.no_grad()
def test_dit_equals_the_official_one(tmp_path, kind):
    expected = goldens(kind)
    conversion = convert(kind)
    assert conversion.entry == "ema"
    conversion.model.save_pretrained(tmp_path)
    depth = json.loads((FILES[kind].parent / "config.json").read_text())["hidden_after_blocks"]
    for model in (conversion.model, IFSQDiTTransformer2DModel.from_pretrained(tmp_path)):
        assert type(model) is IFSQDiTTransformer2DModel and not model.training and model.dtype == torch.float32
        output = model(expected["latents"], expected["t"], expected["y"], output_hidden_states=True)
        torch.testing.assert_close(output.sample, expected["out"], **close)
        torch.testing.assert_close(output.hidden_states[depth], expected["hidden"], **close)
    raw = convert(kind, weights="raw").model(expected["latents"], expected["t"], expected["y"]).sample
    torch.testing.assert_close(raw, expected["raw.out"], **close)
    assert (raw - expected["out"]).abs().max() > 0.07


@pytest.mark.parametrize("kind", DIT)
@torch.no_grad()
def test_training_losses_of_dit(kind):
    expected, conversion = goldens(kind), convert(kind)
    latents, t = torch.lerp(expected["noise"], expected["plan.x1"], expected["t"].view(-1, 1, 1, 1)), expected["t"]
    torch.testing.assert_close(latents, expected["plan.xt"], **close)
    output = conversion.model(latents, t, expected["y"], output_hidden_states=True)
    squared_error, direction_error = velocity_loss(output.sample, expected["plan.x1"] - expected["noise"])
    torch.testing.assert_close(squared_error, expected["train.loss"], **close)
    torch.testing.assert_close(direction_error, expected["train.cos_loss"], **close)
    for alignment in conversion.alignments:
        torch.testing.assert_close(alignment.projector(expected["hidden"]), expected["proj.0"], **close)
        loss = alignment(output.hidden_states[2], expected["train.features.0"])
        torch.testing.assert_close(loss, expected["train.proj_loss"].squeeze(), **close)
    assert len(conversion.alignments) == (kind == "dit")


@pytest.mark.parametrize("kind", DIT)
def test_dit_pipeline_equals_the_official_sampler(make_autoencoder, kind):
    expected, model = goldens(kind), convert(kind).model
    assert model.config.scaling_factor == 1.092421
    tokenizer = make_autoencoder(levels=(17,) * 4, scaling_factor=model.config.scaling_factor)
    pipeline = IFSQDiTPipeline(model, tokenizer, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    for scale in (1, 2):
        latents = pipeline(
            expected["sample_labels"],
            num_inference_steps=10,
            guidance_scale=float(scale),
            latents=expected["noise"],
            snap_to_codes=False,
            output_type="latent",
        ).images
        torch.testing.assert_close(latents, expected[f"ode10_cfg{scale}"], **close)


def test_dit_of_other_kinds(tmp_path):
    def convert_changed(section, **values):
        return convert("dit", changed(tmp_path, "dit", lambda content: content["config"][section].update(values)))

    for section, name, value in (
        ("transport", "path_type", "VP"),
        ("transport", "prediction", "noise"),
        ("data", "latent_norm", True),
    ):
        with pytest.raises(ValueError, match=f"trained with `{section}.{name}` .* but its config has {value!r}"):
            convert_changed(section, **{name: value})
    with pytest.raises(ValueError, match="trained with 12 classes .* has 11 rows"):
        convert_changed("data", num_classes=12)

    def without_rotary(content):
        for name in [name for name in content["ema"] if "feat_rope" in name]:
            del content["ema"][name]

    with pytest.raises(ValueError, match="must have rotary positions.*no `feat_rope.freqs_cos`"):
        convert("dit", changed(tmp_path, "dit", without_rotary))


@pytest.mark.parametrize(
    "name, change",
    [
        ("pos_embed", lambda table: table + 0.1),
        ("pos_embed", lambda table: table[:, 1:]),
        ("feat_rope.freqs_sin", lambda table: table * float("nan")),
        ("feat_rope.freqs_cos", lambda table: table.square()),
    ],
)
def test_dit_with_other_positions(tmp_path, name, change):
    def replace(content):
        content["ema"][name] = change(content["ema"][name])

    with pytest.raises(ValueError, match=f"positions under `{name}` of shape .* not those of a square grid of"):
        convert("dit", changed(tmp_path, "dit", replace))


def test_dit_without_config_or_with_another_entry(tmp_path):
    expected = convert("dit").model
    without = convert("dit", changed(tmp_path, "dit", lambda content: content.pop("config"))).model
    assert without.config.scaling_factor is None and without.config.num_classes == 10
    assert all(map(torch.equal, without.parameters(), expected.parameters()))
    with pytest.raises(ValueError, match="must have a dictionary under `config`, got list"):
        convert("dit", changed(tmp_path, "dit", lambda content: content.update(config=[1])))
    with pytest.raises(ValueError, match=r"entries \['sampler'\]; those of a diffusion .*'config', 'ema', 'model'"):
        convert("dit", changed(tmp_path, "dit", lambda content: content.update(sampler=torch.ones(2))))


# Weights that do not fit.

# A weight whose shape sizes are read from, an ordinary one, one of two that become one, and one of a projector.
NAMES = {
    "repa": ["tok_embeddings.weight", "layers.1.attention_norm.weight", "layers.2.feed_forward.w3.weight"],
    "factorized": ["0_emb.weight", "1_emb.weight", "factorized_blocks.1.feed_forward.w1.weight", "output.0.weight"],
    "dit": ["x_embedder.proj.weight", "blocks.1.mlp.w3.bias", "blocks.0.attn.q_norm.weight", "projectors.0.2.bias"],
    "dit_plain": ["blocks.1.adaLN_modulation.1.weight", "final_layer.linear.bias"],
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in NAMES for name in NAMES[kind]])
def test_weights_that_do_not_fit(tmp_path, kind, name):
    def convert_changed(change):
        return convert(kind, changed(tmp_path, kind, lambda content: change(content["ema"])))

    quoted = f"'{re.escape(name)}"
    # Without its `q_norm`, the model is one that has no `k_norm` either.
    missing = "'blocks.0.attn.k_norm.weight" if "q_norm" in name else quoted
    with pytest.raises(ValueError, match=f"(missing|unexpected|of no known format).*{missing}"):
        convert_changed(lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"1 unexpected: .*{quoted}_extra'"):
        convert_changed(lambda weights: weights.update({f"{name}_extra": torch.zeros(2)}))
    with pytest.raises(ValueError, match=f"misshapen: .*{quoted}"):
        convert_changed(lambda weights: weights.update({name: torch.zeros(2, 3, 5)}))
    with pytest.raises(ValueError, match=f"1 not finite: .*{quoted}"):
        convert_changed(lambda weights: weights[name].view(-1)[0].fill_(float("nan")))


@pytest.mark.parametrize("kind", ["repa", "dit"])
def test_layers_with_a_gap(tmp_path, kind):
    first = "layers" if kind == "repa" else "blocks"

    def change(content):
        for name in [name for name in content["ema"] if name.startswith(f"{first}.1.")]:
            content["ema"][name.replace(f"{first}.1.", f"{first}.7.")] = content["ema"].pop(name)

    with pytest.raises(ValueError, match=f"missing: .*'{first}.1..*unexpected: .*'{first}.7."):
        convert(kind, changed(tmp_path, kind, change))


# Class names.


def test_class_names_of_imagenet():
    names = list(class_names(1000).values())
    # Not even case makes a difference.
    assert len(names) == len({name.lower() for name in names}) == 1000
    known = {0: "tench", 207: "golden retriever", 281: "tabby", 388: "giant panda", 985: "daisy", 999: "toilet tissue"}
    assert {class_id: names[class_id] for class_id in known} == known
    # Names that are alike elsewhere: a bird and a machine, tights and a swimsuit, a dog and a garment.
    assert [names[i] for i in (134, 517)] == ["crane (bird)", "crane (machine)"]
    assert [names[i] for i in (638, 639)] == ["maillot (tights)", "maillot (tank suit)"]
    assert [names[i] for i in (264, 474)] == ["Cardigan Welsh corgi", "cardigan"]
    assert all(name == name.strip() and name.isascii() for name in names)
