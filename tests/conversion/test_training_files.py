"""Files as the official training scripts write them, and others that are as near at hand."""

import argparse
import datetime
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_ifsq.conversion import convert_checkpoint, generators


FIXTURES = Path(__file__).parents[1] / "fixtures"
VQ = FIXTURES / "llamagen_vq" / "vq_tiny.pt"
C2I = FIXTURES / "llamagen_ar" / "official" / "c2i_tiny.pt"
AR = FIXTURES / "llamagen_ar" / "ifsq_repa" / "0000100.pt"
DIT = FIXTURES / "dit" / "0000100.pt"
IFSQ = FIXTURES / "ifsq_tokenizer" / "checkpoint-5000.ckpt"
IFSQ_CONFIG = IFSQ.with_name("run.json")
ARGUMENTS = {VQ: {}, C2I: {"num_attention_heads": 4}, AR: {"num_attention_heads": 4}, DIT: {}}


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def convert(tmp_path):
    """Function that converts a content as that of a file."""

    def convert(content, name="0000100.pt", **arguments):
        torch.save(content, tmp_path / name)
        return convert_checkpoint(tmp_path / name, **arguments)

    return convert


def assert_equal_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def optimizer_state(weights, optimizer_class=torch.optim.AdamW, **options):
    """The state of an optimizer after a step, with a second group for vectors."""
    parameters = [nn.Parameter(weight.clone()) for weight in list(weights.values())[:6]]
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.0}]
    optimizer = optimizer_class(groups, lr=1e-4, **options)
    sum(parameter.square().sum() for parameter in parameters).backward()
    optimizer.step()
    return optimizer.state_dict()


def c2i_arguments(*line):
    """Arguments of LlamaGen's `train_c2i.py`, with what it adds to them where processes start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--code-path", type=str, required=True)
    parser.add_argument("--gpt-model", choices=["GPT-B", "GPT-L"], default="GPT-B")
    parser.add_argument("--gpt-ckpt", type=str, default=None)
    parser.add_argument("--gpt-type", choices=["c2i", "t2i"], default="c2i")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--cls-token-num", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--downsample-size", type=int, default=16)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args(["--code-path", "/data/codes", *line])
    args.rank, args.world_size, args.gpu, args.dist_url, args.distributed = 0, 8, 0, "env://", True
    return args


TINY = ("--image-size", "64", "--num-classes", "10", "--vocab-size", "289")


def c2i_file(*line):
    args, weights = c2i_arguments(*line), load(C2I)["model"]
    content = {"model": weights, "optimizer": optimizer_state(weights), "steps": 100, "args": args}
    if args.ema:
        content["ema"] = {name: weight * 2 for name, weight in weights.items()}
    return content


# LlamaGen.


def test_files_of_the_tokenizer_trainer_of_llamagen(convert):
    weights, expected = load(VQ)["model"], convert_checkpoint(VQ).model
    discriminator = nn.Sequential(nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 4)).state_dict()
    parser = argparse.ArgumentParser()
    parser.add_argument("--vq-model", default="VQ-16")
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--codebook-l2-norm", action="store_true", default=True)
    parser.add_argument("--image-size", type=int, default=256)
    for line in ([], ["--ema"]):
        content = {
            "model": weights,
            "optimizer": optimizer_state(weights, torch.optim.Adam),
            "discriminator": discriminator,
            "optimizer_disc": optimizer_state(discriminator, torch.optim.Adam),
            "steps": 5000,
            "args": parser.parse_args(line),
        }
        if line:
            content["ema"] = {name: weight * 2 for name, weight in weights.items()}
        conversion = convert(content)
        assert conversion.entry == ("ema" if line else "model")
        torch.testing.assert_close(
            conversion.model.quant_conv.bias, expected.quant_conv.bias * (2 if line else 1), atol=0, rtol=0
        )
        assert_equal_weights(convert(content, weights="raw").model, expected)
        assert_equal_weights(convert({**content, "args": vars(content["args"])}, weights="raw").model, expected)


def test_files_of_the_trainer_of_llamagen(convert):
    expected = convert_checkpoint(C2I, grid_size=4, num_attention_heads=4).model
    # The grid is told by the arguments.
    for content in (c2i_file(*TINY), {**c2i_file(*TINY), "args": vars(c2i_arguments(*TINY))}):
        conversion = convert(content, num_attention_heads=4)
        assert conversion.entry == "model" and conversion.model.config.grid_size == [4, 4]
        assert_equal_weights(conversion.model, expected)
    averaged = c2i_file(*TINY, "--ema")
    assert convert(averaged, num_attention_heads=4).entry == "ema"
    assert_equal_weights(convert(averaged, num_attention_heads=4, weights="raw").model, expected)
    tokens_of_8 = convert(c2i_file(*TINY, "--downsample-size", "8"), num_attention_heads=4).model
    assert tokens_of_8.config.grid_size == [8, 8]


def test_what_is_asked_for_wins_over_arguments_of_a_script(convert, caplog):
    model = convert(c2i_file(), num_attention_heads=4, grid_size=(2, 8)).model
    assert model.config.grid_size == [2, 8] and model.config.num_classes == 10
    assert "`grid_size` [2, 8] is taken" in caplog.text and "[16, 16]" in caplog.text
    assert "`args.num_classes` of `checkpoint` is 1000" in caplog.text and "11 rows" in caplog.text
    caplog.clear()
    assert convert(c2i_file(*TINY), num_attention_heads=4, grid_size=4).model.config.grid_size == [4, 4]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_all_rows_are_classes_by_the_arguments(convert):
    config = convert(c2i_file(*TINY, "--num-classes", "11"), num_attention_heads=4).model.config
    assert config.num_classes == 11 and config.class_dropout_prob == 0


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("cls_token_num", 2, "trained with `cls_token_num` 1"),
        ("image_size", "64", "a positive integer as `args.image_size`, got '64'"),
        ("downsample_size", 0, "a positive integer as `args.downsample_size`, got 0"),
        ("image_size", np.int64(64), "`args.image_size`, got an object that is not read"),
    ],
)
def test_arguments_of_other_models(convert, name, value, message):
    content = c2i_file(*TINY)
    setattr(content["args"], name, value)
    with pytest.raises(ValueError, match=message):
        convert(content, num_attention_heads=4)


def test_average_that_was_not_asked_for_in_training(convert):
    content = c2i_file(*TINY, "--ema")
    content["args"].ema = False
    with pytest.raises(
        ValueError, match="`weights` must be given .*, got None: it has weights under `ema`, but by its"
    ):
        convert(content, num_attention_heads=4)
    assert [convert(content, num_attention_heads=4, weights=weights).entry for weights in ("raw", "ema")] == [
        "model",
        "ema",
    ]


def test_files_of_sharded_training(convert, tmp_path):
    weights = load(C2I)["model"]
    arguments = {"num_attention_heads": 4, "grid_size": 4}
    halved = {name: weight.bfloat16() for name, weight in weights.items()}
    for content in (weights, halved):
        conversion = convert(content, "consolidated.pth", **arguments)
        assert conversion.entry is None and conversion.model.dtype == torch.float32
        assert torch.equal(conversion.model.state_dict()["lm_heads.0.weight"], content["output.weight"].float())
    # Beside them.
    with pytest.raises(ValueError, match="looks like the state of an optimizer.*`consolidated.pth`"):
        convert(optimizer_state(weights), "optimizer.00000-of-00008.pth", **arguments)
    (tmp_path / "resume_step.txt").write_text("5000\n")
    with pytest.raises(ValueError, match="resume_step.txt is damaged, or no file of `torch.save`"):
        convert_checkpoint(tmp_path / "resume_step.txt")
    with pytest.raises(
        FileNotFoundError, match=r"is a folder, with the files \['consolidated.pth', 'optimizer.00000-of"
    ):
        convert_checkpoint(tmp_path)


@pytest.mark.parametrize("entry", ["module", "state_dict"])
def test_other_entries_that_samplers_of_llamagen_read(convert, entry):
    for file, arguments in ((VQ, {}), (C2I, {"num_attention_heads": 4, "grid_size": 4})):
        conversion = convert({entry: load(file)["model"], "global_steps": 10}, **arguments)
        assert conversion.entry == entry
        assert_equal_weights(conversion.model, convert_checkpoint(file, **arguments).model)


def test_text_conditional_models_are_refused_by_name(convert):
    content = c2i_file("--gpt-type", "t2i", "--cls-token-num", "120")
    del content["model"]["cls_embedding.embedding_table.weight"]
    content["model"]["cls_embedding.cap_proj.fc1.weight"] = torch.zeros(64, 2048)
    content["model"]["cls_embedding.uncond_embedding"] = torch.zeros(120, 2048)
    for weights in (content, content["model"]):
        with pytest.raises(ValueError, match="looks like a text-conditional model of LlamaGen, of which class-cond"):
            convert(weights, num_attention_heads=4, grid_size=4)


@pytest.mark.parametrize(
    "layers, width, heads", [(12, 384, 12), (48, 2560, 40), (22, 2048, 32), (24, 3200, 32), (32, 4096, 32)]
)
def test_heads_of_all_official_sizes(convert, monkeypatch, layers, width, heads):
    # The sizes alone: these models are too large to be filled here.
    monkeypatch.setattr(generators, "load_exactly", lambda *_, **__: None)
    shapes = {"cls_embedding.embedding_table.weight": (11, width), "tok_embeddings.weight": (4, width)}
    for layer in range(layers):
        shapes[f"layers.{layer}.attention.wqkv.weight"] = (3 * width, width)
    shapes["layers.0.feed_forward.w1.weight"] = (256, width)
    config = convert(
        {name: torch.tensor(0.5).expand(shape) for name, shape in shapes.items()}, grid_size=4
    ).model.config
    assert config.num_hidden_layers == layers and config.num_attention_heads == heads


# iFSQ.


def test_average_of_a_compiled_ifsq_tokenizer(convert):
    content, expected = load(IFSQ), convert_checkpoint(IFSQ).model
    names = [name for name in content["ema_state_dict"] if name.startswith("module.encoder")]
    assert names
    content["ema_state_dict"] = {f"_orig_mod.{name}": w for name, w in content["ema_state_dict"].items()}
    content["sampler_state"] = {"epoch": 3, "order": torch.arange(4)}
    assert_equal_weights(convert(content, config=IFSQ_CONFIG).model, expected)


@pytest.mark.parametrize("section", ["vqvae", "cusvq"])
def test_grid_of_a_model_over_another_tokenizer(convert, section):
    content = load(AR)
    del content["config"]["fsq"]
    content["config"][section] = {"codebook_size": 289, "downsample_ratio": 16, "model_path": "/checkpoints/vq.pt"}
    assert convert(content, num_attention_heads=4).model.config.grid_size == [4, 4]
    with pytest.raises(ValueError, match=r"`grid_size` must be \[4, 4\] or left out"):
        convert(content, num_attention_heads=4, grid_size=8)
    content["config"]["model"]["cls_token_num"] = 4
    with pytest.raises(ValueError, match="trained with `cls_token_num` 1"):
        convert(content, num_attention_heads=4)


@pytest.mark.parametrize(
    "section, name, value, message",
    [
        ("scheduler", "diffusion", True, "`scheduler.diffusion` False"),
        ("data", "latent_multiplier", "1.09", "a number as `data.latent_multiplier`, got '1.09'"),
        ("data", "latent_multiplier", np.float64(1.09), "latent_multiplier`, got an object that is not read"),
        ("data", "num_classes", 10.0, "a positive integer as `data.num_classes`, got 10.0"),
    ],
)
def test_configs_of_other_diffusion_transformers(convert, section, name, value, message):
    content = load(DIT)
    content["config"].setdefault(section, {})[name] = value
    with pytest.raises(ValueError, match=message):
        convert(content)


# All of them.


@pytest.mark.parametrize("file", [VQ, C2I, AR, DIT])
def test_states_of_training_never_stop_a_conversion(convert, file):
    content, arguments = load(file), ARGUMENTS[file]
    arguments = arguments | ({"grid_size": 4} if file == C2I else {})
    expected = convert_checkpoint(file, **arguments).model
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    recursive = [1]
    recursive.append(recursive)
    content |= {
        "args": argparse.Namespace(
            output_dir=Path("runs/1"),
            started=datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC),
            day=datetime.date(2025, 1, 1),
            limit=datetime.timedelta(hours=1),
            rate=np.float64(0.1),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            tags={"a", "b"},
        ),
        "epoch": 3,
        "global_step": 100,
        "best_fid": np.float32(3.5),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "scaler": torch.amp.GradScaler(enabled=False).state_dict(),
        "rng_state": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "cuda": [torch.zeros(2)]},
        "random_states": {"cpu": torch.get_rng_state()},
        "optimizer_disc": optimizer.state_dict(),
        "opt": optimizer_state({"w": torch.ones(2), "v": torch.ones(2)}),
        "sampler_state": {"order": torch.arange(4)},
        "lion_optimizer": {"state": {"weight": torch.ones(2)}, "param_groups": []},
        "history": recursive,
    }
    assert_equal_weights(convert(content, **arguments).model, expected)


def test_what_may_be_weights_is_never_passed_over(convert):
    weights = load(VQ)["model"]
    for average in ({"decay": 0.9, "shadow": list(weights.values())}, {"conv": np.zeros(3)}, torch.zeros(2)):
        with pytest.raises(ValueError, match="must have weights by their names under `ema`"):
            convert({"model": weights, "ema": average})
    for name, other in (("ema_model", weights), ("shadow", [np.zeros(3)]), ("opt_model", {"a": [torch.ones(1)]})):
        with pytest.raises(ValueError, match=f"has entries \\['{name}'\\]"):
            convert({"model": weights, name: other})


def test_buffers_for_sampling(convert):
    weights, expected = load(C2I)["model"], convert_checkpoint(C2I, grid_size=4, num_attention_heads=4).model
    angles = torch.outer(torch.arange(4.0), 10000 ** (-torch.arange(4) / 4))
    rows, columns = (angles[:, None].expand(4, 4, 4), angles[None].expand(4, 4, 4))
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.cat([torch.zeros(1, 8, 2), torch.stack([grid.cos(), grid.sin()], dim=-1)])
    buffers = {
        "freqs_cis": table,
        "causal_mask": torch.ones(1, 24, 24, dtype=torch.bool),
        "layers.0.attention.kv_cache.k_cache": torch.full((2, 4, 24, 16), float("nan")),
        "layers.0.attention.kv_cache.v_cache": torch.zeros(2, 4, 24, 16),
    }
    assert_equal_weights(convert({**weights, **buffers}, grid_size=4, num_attention_heads=4).model, expected)
    for arguments in ({"grid_size": 8, "num_attention_heads": 4}, {"grid_size": 4, "num_attention_heads": 8}):
        with pytest.raises(ValueError, match="positions under `freqs_cis` of shape .17, 8, 2. that are not those of"):
            convert({**weights, "freqs_cis": table}, **arguments)
    with pytest.raises(ValueError, match="under `freqs_cis`"):
        convert({**weights, "freqs_cis": table.roll(1, 0)}, grid_size=4, num_attention_heads=4)


def test_weights_that_share_memory(convert):
    weights = load(C2I)["model"]
    for change in (lambda weight: weight, lambda weight: weight.clone()):
        tied = weights | {"output.weight": change(weights["tok_embeddings.weight"])}
        model = convert(tied, grid_size=4, num_attention_heads=4).model
        parameters = list(model.parameters())
        assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)
        embedding, head = (model.state_dict()[name] for name in ("model.embed_tokens.0.weight", "lm_heads.0.weight"))
        assert torch.equal(embedding, head)


# What is no such file.


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)


@pytest.mark.filterwarnings("ignore::")
def test_other_files(convert, tmp_path):
    with pytest.raises(ValueError, match=r"holds \S*test_training_files.Model, .* a model as its `state_dict\(\)`"):
        convert(Model())
    with pytest.raises(ValueError, match="holds .*Model"):
        convert({"model": Model()})
    np.save(tmp_path / "0.npy", np.zeros((1, 256), dtype=np.int64))
    np.savez(tmp_path / "0.npz", np.zeros(3))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    torch.save(load(C2I), tmp_path / "protocol.pt", pickle_protocol=4)
    for name in ("0.npy", "0.npz", "script.pt", "protocol.pt"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or no file of `torch.save`, in its default pickle"):
            convert_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "names, message",
    [
        (["encoder.mid.block_1.conv1.weight", "quantize.embedding.weight"], "an autoencoder such as that of VQGAN"),
        (["encoder.mid_block.0.conv1.weight", "quantize.embedding.weight"], "a tokenizer of the iFSQ repository with"),
        (["pos_1LC", "lvl_embed.weight", "head.weight"], "the generator model of VAR"),
        (["encoder.mid_block.resnets.0.conv1.weight"], "a model that needs no conversion"),
        (["model.embed_classes.weight"], "an AR model that needs no conversion"),
        (["time_embed.linear_1.weight"], "a diffusion transformer that needs no conversion"),
    ],
)
def test_related_models_are_told_by_name(convert, names, message):
    weights = dict.fromkeys(names, torch.zeros(2))
    for content in (
        weights,
        {"model": weights, "epoch": 1},
        {"state_dict": weights, "pytorch-lightning_version": "1"},
    ):
        with pytest.raises(ValueError, match=f"of no known format, and looks like {message}"):
            convert(content)


def test_transformers_without_rotary_positions(convert):
    # As REPA writes its SiT.
    weights = {name: weight for name, weight in load(DIT)["model"].items() if "feat_rope" not in name}
    args = argparse.Namespace(model="SiT-XL/2", resolution=256, num_classes=1000, enc_type="dinov2-vit-b")
    content = {"model": weights, "ema": weights, "opt": optimizer_state(weights), "args": args, "steps": 1}
    with pytest.raises(ValueError, match="must have rotary positions.* such as DiT or SiT"):
        convert(content)


# No code of a file is run.


class Crafted:
    """An object whose pickle calls a function, and may then give its result a state."""

    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


def test_objects_that_are_not_read_are_not_made_either(convert):
    # The real classes would refuse these values.
    args = argparse.Namespace(
        date=Crafted(datetime.date, ("no date",)),
        delta=Crafted(datetime.timedelta, ("x", [], {})),
        path=Crafted(type(Path()), (1, 2)),
        array=Crafted(np.zeros(0).__reduce__()[0], (1, 2, 3), "no state"),
    )
    assert_equal_weights(convert(load(VQ) | {"args": args}).model, convert_checkpoint(VQ).model)


def test_arguments_cannot_carry_code(convert, tmp_path):
    harm = (os.mkdir, (str(tmp_path / "harm"),))
    slots = Crafted(argparse.Namespace, (), (None, {"__class__": Crafted(*harm)}))
    for harmful in (
        argparse.Namespace(lr=Crafted(*harm)),
        Crafted(argparse.Namespace, (), {"lr": Crafted(*harm)}),
        Crafted(argparse.Namespace, (Crafted(*harm),)),
        Crafted(datetime.date, (Crafted(*harm),)),
        Crafted(getattr, (argparse.Namespace(), "__class__")),
        slots,
    ):
        with pytest.raises(ValueError, match="`checkpoint` .* holds (posix.mkdir|nt.mkdir|getattr)"):
            convert(load(VQ) | {"args": harmful})
    assert not (tmp_path / "harm").exists()


def test_what_torch_may_load_stays_as_it_was(convert):
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([argparse.Namespace]):
        convert(c2i_file(*TINY), num_attention_heads=4)
        assert set(torch.serialization.get_safe_globals()) == before | {argparse.Namespace}
    with pytest.raises(ValueError, match="damaged"):
        convert(load(VQ) | {"args": Crafted(argparse.Namespace, (1,))})
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.filterwarnings("ignore::")
def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {"weight": [0.0]}}))
    with pytest.raises(ValueError, match="model.pkl is damaged, or no file of `torch.save`"):
        convert_checkpoint(tmp_path / "model.pkl")
