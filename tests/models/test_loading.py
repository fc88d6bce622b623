"""Checkpoints that are trained further on other classes, or on the codes of another tokenizer."""

import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_ifsq import (
    AutoencoderIFSQ,
    IFSQARConfig,
    IFSQARForImageGeneration,
    IFSQARModel,
    IFSQDiTTransformer2DModel,
)


NAMES = {class_id: f"class {class_id}" for class_id in range(5)}


@pytest.fixture(autouse=True)
def memory_full_of_rubbish():
    """As programs leave it behind."""
    rubbish = [torch.full((size,), 1e30) for size in (96, 128, 192, 256, 512)] * 20
    del rubbish


@pytest.fixture(params=["ar", "dit"])
def generator(request, make_ar, make_dit, tmp_path):
    """A generator of 5 named classes whose weights all differ from those at the beginning, and its folder."""
    options = {"ar": {"vocab_sizes": [4, 3], "initializer_range": 0.02}, "dit": {"sample_size": 4}}[request.param]
    model = {"ar": make_ar, "dit": make_dit}[request.param](id2label=NAMES, **options)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def changed_weights(before, after):
    """Those of another shape or with other values."""
    old = dict(before.named_parameters())
    assert not any(weight.is_meta for weight in after.parameters())
    return {
        name: weight
        for name, weight in after.named_parameters()
        if name not in old or old[name].shape != weight.shape or not torch.equal(old[name], weight)
    }


def assert_reloads(model, folder):
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert not changed_weights(model, loaded)
    assert (loaded.config.num_classes, loaded.config.id2label) == (model.config.num_classes, model.config.id2label)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("names", [None, {0: "cat", 1: "dog"}, {class_id: str(class_id) for class_id in range(1, 8)}])
def test_other_classes(generator, tmp_path, names, low_cpu_mem_usage):
    model, folder = generator
    num_classes = 2 if names and len(names) == 2 else 7
    options = {} if names is None else {"id2label": names}
    options.update(num_classes=num_classes, ignore_mismatched_sizes=True, low_cpu_mem_usage=low_cpu_mem_usage)
    if names is not None and 0 not in names:
        with pytest.raises(ValueError, match="`id2label` must name the ids 0 to 6"):
            type(model).from_pretrained(folder, **options)
        return
    loaded = type(model).from_pretrained(folder, **options)
    ((name, table),) = changed_weights(model, loaded).items()
    assert name in ("model.embed_classes.weight", "class_embed.weight")
    assert table.shape == (num_classes + 1, 32)
    # The bounds are five standard deviations of that of so few numbers.
    assert (
        abs(table.std() / 0.02 - 1) < 5 / math.sqrt(2 * table.numel())
        and abs(table.mean()) < 0.1 / table.numel() ** 0.5
    )
    general = {class_id: f"LABEL_{class_id}" for class_id in range(num_classes)}
    expected = names or (general if isinstance(model, IFSQARForImageGeneration) else None)
    assert (loaded.config.num_classes, loaded.config.id2label) == (num_classes, expected)
    assert_reloads(loaded, tmp_path / "again")


def test_the_new_weights_are_named(generator, caplog):
    model, folder = generator
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        type(model).from_pretrained(folder, num_classes=7, ignore_mismatched_sizes=True)
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert "embed" in caplog.text and "class" in caplog.text


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_other_classes_must_be_asked_for(generator, low_cpu_mem_usage):
    model, folder = generator
    with pytest.raises(ValueError, match="(class_embed|embed_classes).weight"):
        type(model).from_pretrained(folder, num_classes=7, low_cpu_mem_usage=low_cpu_mem_usage)


def test_other_names_of_the_same_classes(generator):
    model, folder = generator
    names = {class_id: str(class_id) for class_id in range(5)}
    loaded = type(model).from_pretrained(folder, id2label=names)
    assert loaded.config.id2label == names and not changed_weights(model, loaded)
    assert type(model).from_pretrained(folder, num_classes=5).config.id2label == NAMES


@pytest.mark.parametrize("extra", ["lm_heads.2.weight", "factor_layers.2.mlp.down_proj.weight"])
def test_more_than_the_ar_model_has(make_ar, tmp_path, extra):
    make_ar(vocab_sizes=[4, 3]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {extra: torch.zeros(2, 2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 unexpected_keys: .*{extra}"):
        IFSQARForImageGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "misshapen"])
def test_other_classes_do_not_excuse_a_broken_checkpoint(generator, kind):
    model, folder = generator
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    name = max(weights)
    if kind == "missing":
        del weights[name]
    elif kind == "unexpected":
        weights[name := "extra.weight"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(7, 7)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        type(model).from_pretrained(folder, num_classes=7, ignore_mismatched_sizes=True)


def test_the_name_that_transformers_has_for_the_number_of_classes(make_ar, make_dit, tmp_path):
    make_ar(id2label=NAMES).save_pretrained(tmp_path / "ar")
    options = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}, "ignore_mismatched_sizes": True}
    model = IFSQARForImageGeneration.from_pretrained(tmp_path / "ar", num_labels=2, **options)
    assert model.config.num_classes == model.config.num_labels == 2 and model.config.label2id == {"cat": 0, "dog": 1}
    config = AutoConfig.from_pretrained(tmp_path / "ar", num_labels=7)
    assert (config.num_classes, len(config.id2label), config.label2id["LABEL_6"]) == (7, 7, 6)
    assert IFSQARConfig(num_labels=3).num_classes == 3
    config.num_labels = 4
    assert config.num_classes == len(config.id2label) == 4
    for call in (IFSQARConfig, lambda **options: AutoConfig.from_pretrained(tmp_path / "ar", **options)):
        with pytest.raises(ValueError, match="`num_labels` 2.*`num_classes`, which is 3"):
            call(num_labels=2, num_classes=3)
    make_dit().save_pretrained(tmp_path / "dit")
    with pytest.raises(TypeError, match="no `num_labels`.*'num_classes'"):
        IFSQDiTTransformer2DModel.from_pretrained(tmp_path / "dit", num_labels=2)


def test_a_config_that_was_changed_is_checked_by_the_model(make_ar):
    config = make_ar(id2label=NAMES).config
    config.num_classes = 7
    with pytest.raises(ValueError, match="`id2label` names 5 classes, but `num_classes` is 7"):
        IFSQARForImageGeneration(config)


def test_the_null_class_comes_and_goes(make_ar, tmp_path):
    make_ar().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"embed_classes.weight.*6, 32.*5, 32"):
        IFSQARForImageGeneration.from_pretrained(tmp_path, class_dropout_prob=0.0)
    options = {"class_dropout_prob": 0.0, "ignore_mismatched_sizes": True}
    assert IFSQARForImageGeneration.from_pretrained(tmp_path, **options).model.embed_classes.num_embeddings == 5


@pytest.mark.parametrize(
    "vocab_sizes, tables", [([4, 5], [1]), ([6, 5], [0, 1]), ([4, 3, 2], [2]), ([4], []), ([12], [0])], ids=str
)
def test_ar_model_for_another_tokenizer(make_ar, tmp_path, vocab_sizes, tables):
    model = make_ar(vocab_sizes=[4, 3], initializer_range=0.02)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="lm_heads|factor_layers"):
        IFSQARForImageGeneration.from_pretrained(tmp_path / "saved", vocab_sizes=vocab_sizes)
    options = {"vocab_sizes": vocab_sizes, "ignore_mismatched_sizes": True}
    loaded = IFSQARForImageGeneration.from_pretrained(tmp_path / "saved", **options)
    changed = changed_weights(model, loaded)
    assert {name for name in changed if "lm_heads" in name} == {f"lm_heads.{table}.weight" for table in tables}
    assert {name for name in changed if "embed" in name} == {f"model.embed_tokens.{table}.weight" for table in tables}
    assert len(changed) == 2 * len(tables)
    for name, weight in changed.items():
        assert weight.std().item() == pytest.approx(0.0 if "lm_heads" in name else 0.02, rel=0.5)
    assert_reloads(loaded, tmp_path / "again")


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_dit_for_another_tokenizer(make_dit, tmp_path, low_cpu_mem_usage):
    model = make_dit(levels=(5, 4, 3))
    torch.nn.init.normal_(model.proj_out.bias)
    model.save_pretrained(tmp_path)
    options = {"in_channels": 2, "levels": (7, 7), "low_cpu_mem_usage": low_cpu_mem_usage}
    with pytest.raises(ValueError, match="patch_embed.weight"):
        IFSQDiTTransformer2DModel.from_pretrained(tmp_path, **options)
    loaded = IFSQDiTTransformer2DModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **options)
    changed = changed_weights(model, loaded)
    assert set(changed) == {"patch_embed.weight", "proj_out.weight", "proj_out.bias"}
    # Xavier's bound for 2 channels in and 32 out.
    bound = math.sqrt(6 / (2 + 32))
    assert 0.8 * bound < changed["patch_embed.weight"].abs().max() <= bound
    assert not changed["proj_out.weight"].any() and not changed["proj_out.bias"].any()
    with pytest.raises(ValueError, match="`levels` must be one for each of the 3 `in_channels`"):
        IFSQDiTTransformer2DModel.from_pretrained(tmp_path, levels=(7, 7))


@pytest.mark.parametrize("name", ["num_clases", "device"])
def test_unknown_arguments_are_not_passed_over(make_dit, make_autoencoder, tmp_path, name):
    for model in (make_dit(), make_autoencoder()):
        model.save_pretrained(tmp_path)
        with pytest.raises(TypeError, match=f"`{name}`"):
            type(model).from_pretrained(tmp_path, **{name: 3})


def test_no_device_map_with_new_weights_of_a_diffusers_model(make_dit, tmp_path):
    make_dit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`device_map`.*`ignore_mismatched_sizes`"):
        IFSQDiTTransformer2DModel.from_pretrained(
            tmp_path, num_classes=7, ignore_mismatched_sizes=True, device_map="cpu"
        )


def test_other_ways_to_the_same(make_ar, make_dit, make_autoencoder, tmp_path):
    options = {"num_classes": 7, "ignore_mismatched_sizes": True, "subfolder": "transformer"}
    make_ar().save_pretrained(tmp_path / "ar" / "transformer", max_shard_size="20KB")
    for model_class in (AutoModel, IFSQARModel):
        model = model_class.from_pretrained(tmp_path / "ar", dtype=torch.bfloat16, **options)
        assert model.embed_classes.weight.shape == (8, 32) and model.embed_classes.weight.dtype == torch.bfloat16
    make_dit().save_pretrained(tmp_path / "dit" / "transformer", max_shard_size="20KB")
    for low_cpu_mem_usage in (True, False):
        model = IFSQDiTTransformer2DModel.from_pretrained(
            tmp_path / "dit", torch_dtype=torch.bfloat16, low_cpu_mem_usage=low_cpu_mem_usage, **options
        )
        assert model.class_embed.weight.std() < 0.03 and {weight.dtype for weight in model.parameters()} == {
            torch.bfloat16
        }
    make_autoencoder().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="quant_conv"):
        AutoencoderIFSQ.from_pretrained(tmp_path / "tokenizer", levels=(5, 5), z_channels=3)
    tokenizer = AutoencoderIFSQ.from_pretrained(
        tmp_path / "tokenizer", levels=(5, 5), z_channels=3, ignore_mismatched_sizes=True
    )
    assert tokenizer.quant_conv.weight.shape == (2, 6, 1, 1) and tokenizer.quant_conv.weight.abs().max() < 1
