import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_ifsq import AutoencoderIFSQ, IFSQARForImageGeneration, IFSQARPipeline, IFSQDiTPipeline
from hf_ifsq.conversion import assemble_pipeline, convert_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"
IFSQ_FILE = FIXTURES / "ifsq_tokenizer" / "checkpoint-5000.ckpt"
IFSQ_CONFIG = FIXTURES / "ifsq_tokenizer" / "run.json"
VQ_FILE = FIXTURES / "llamagen_vq" / "vq_tiny.pt"
LLAMAGEN_FILE = FIXTURES / "llamagen_ar" / "official" / "c2i_tiny.pt"
REPA_FILE = FIXTURES / "llamagen_ar" / "ifsq_repa" / "0000100.pt"
DIT_FILE = FIXTURES / "dit" / "0000100.pt"
SCRIPT = Path(__file__).parents[2] / "examples" / "convert_checkpoint.py"


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def save(tmp_path):
    """Function that writes a content to a file."""

    def save(content, name="checkpoint.pt", **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return tmp_path / name

    return save


def assert_equal_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# Which weights are taken.


@pytest.mark.parametrize(
    "style", ["{}", "module.{}", "module.module.{}", "_orig_mod.{}", "module._orig_mod.{}", "inner"]
)
def test_prefixes_of_wrapped_models(save, style):
    weights = load(VQ_FILE)["model"]
    if style == "inner":
        renamed = {name.replace("encoder.", "encoder._orig_mod."): weight for name, weight in weights.items()}
    else:
        renamed = {style.format(name): weight for name, weight in weights.items()}
    assert_equal_weights(convert_checkpoint(save({"model": renamed})).model, convert_checkpoint(VQ_FILE).model)


def test_names_that_differ_by_a_prefix_only(save):
    weights = load(VQ_FILE)["model"]
    weights["module.quant_conv.bias"] = weights["quant_conv.bias"] + 1
    with pytest.raises(ValueError, match="differ in `module.` or `_orig_mod.` alone"):
        convert_checkpoint(save({"model": weights}))


def test_weights_alone(save, tmp_path):
    weights = {name: weight.clone() for name, weight in load(VQ_FILE)["model"].items()}
    save_file(weights, tmp_path / "vq.safetensors")
    for file in (
        save(weights),
        tmp_path / "vq.safetensors",
        save({"model": weights}, _use_new_zipfile_serialization=False),
    ):
        assert_equal_weights(convert_checkpoint(file).model, convert_checkpoint(VQ_FILE).model)
    with pytest.raises(ValueError, match="`weights` must be left out .* got 'ema'"):
        convert_checkpoint(tmp_path / "vq.safetensors", weights="ema")


def test_weights_of_other_dtype_and_memory_format(save, tmp_path):
    def convert(change):
        model = {name: change(weight) for name, weight in load(VQ_FILE)["model"].items()}
        return convert_checkpoint(save({"model": model})).model

    rounded = convert(lambda weight: weight.half().float())
    strided = convert(
        lambda weight: (
            weight.half().contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight.half()
        )
    )
    strided.save_pretrained(tmp_path / "vq")
    for model in (strided, VQModel.from_pretrained(tmp_path / "vq")):
        assert model.dtype == torch.float32
        assert_equal_weights(model, rounded)


def test_average_of_a_llamagen_tokenizer(save):
    weights = load(VQ_FILE)["model"]
    file = save({"model": weights, "ema": {name: weight * 2 for name, weight in weights.items()}, "steps": 3})
    bias = convert_checkpoint(file, weights="raw").model.quant_conv.bias
    torch.testing.assert_close(bias, weights["quant_conv.bias"])
    for choice in (None, "ema"):
        torch.testing.assert_close(convert_checkpoint(file, weights=choice).model.quant_conv.bias, 2 * bias)


@pytest.mark.parametrize("average", [{}, None, "absent"])
def test_ifsq_tokenizer_without_average(save, average):
    content = load(IFSQ_FILE)
    if average == "absent":
        del content["ema_state_dict"]
    else:
        content["ema_state_dict"] = average
    file = save(content)
    for weights in (None, "ema"):
        with pytest.raises(ValueError, match="no weights under `ema_state_dict`: ask for .* by `weights` 'raw'"):
            convert_checkpoint(file, IFSQ_CONFIG, weights)
    model = convert_checkpoint(file, IFSQ_CONFIG, "raw").model
    assert_equal_weights(model, convert_checkpoint(IFSQ_FILE, weights="raw").model)


def test_missing_choices_of_weights():
    with pytest.raises(ValueError, match="no weights under `ema`: ask for those under `model` by `weights` 'raw'"):
        convert_checkpoint(VQ_FILE, weights="ema")
    with pytest.raises(ValueError, match="`weights` must be 'ema' or 'raw', got 'mean'"):
        convert_checkpoint(VQ_FILE, weights="mean")


# Weights that do not fit.


@pytest.mark.parametrize("file, entry", [(IFSQ_FILE, "ema_state_dict"), (VQ_FILE, "model")])
@pytest.mark.parametrize("name", ["decoder.conv_in.weight", "encoder.conv_in.weight", "quant_conv.weight"])
def test_weights_that_do_not_fit(save, file, entry, name):
    config = IFSQ_CONFIG if file == IFSQ_FILE else None

    def convert(change):
        content = load(file)
        official_name = f"module.{name}" if file == IFSQ_FILE else name
        change(content[entry], official_name)
        return convert_checkpoint(save(content), config)

    def fill(value):
        return lambda weights, name: weights[name].view(-1)[0].fill_(value)

    fits = "do not fit (AutoencoderIFSQ|VQModel).*"
    with pytest.raises(ValueError, match=f"{fits}1 missing.*'{re.escape(name)}'"):
        convert(lambda weights, name: weights.pop(name))
    with pytest.raises(ValueError, match=f"{fits}1 unexpected.*'{re.escape(name)}_extra'"):
        convert(lambda weights, name: weights.update({f"{name}_extra": torch.zeros(2)}))
    with pytest.raises(ValueError, match=f"{fits}misshapen.*'{re.escape(name)}"):
        convert(lambda weights, name: weights.update({name: torch.zeros(7, 5, 1, 1)}))
    with pytest.raises(ValueError, match=f"{fits}1 not finite.*'{re.escape(name)}'"):
        convert(fill(float("nan")))
    convert(fill(0.5))


def test_nothing_that_may_be_weights_is_dropped_unless_named(save):
    for name in ("quantize.codebook_used_extra", "quantize.running_mean"):
        weights = load(VQ_FILE)["model"] | {name: torch.zeros(4)}
        with pytest.raises(ValueError, match=f"1 unexpected: \\['{name}'\\]"):
            convert_checkpoint(save({"model": weights}))
    with pytest.raises(
        ValueError, match=r"entries \['sampler'\]; those of a LlamaGen VQ tokenizer are \['args', 'discrim"
    ):
        convert_checkpoint(save({"model": load(VQ_FILE)["model"], "sampler": [{"weight": torch.zeros(2)}]}))
    content = load(IFSQ_FILE)
    content["state_dict"]["other_model"] = {"weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"entries \['state_dict.other_model'\]"):
        convert_checkpoint(save(content), IFSQ_CONFIG)


# Files that are not read.


def test_unknown_format(save):
    content = {"model": {"layers.0.weight": torch.zeros(2)}, "opt": {"state": {0: {"step": torch.tensor(1.0)}}}}
    with pytest.raises(ValueError) as error:
        convert_checkpoint(save(content))
    message = str(error.value)
    for expected in ("an iFSQ tokenizer", "'quantize.running_mean'", "`ema_state_dict`", "a LlamaGen VQ tokenizer"):
        assert expected in message
    for expected in ("'encoder.conv_blocks.0.res.0.conv1.weight'", "'layers.0.weight'", "'opt'"):
        assert expected in message
    for content in ({}, {"a.weight": torch.zeros(2)}, {"model": {}}):
        with pytest.raises(ValueError, match="of no known format(.|\n)*The file has"):
            convert_checkpoint(save(content))


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_in_a_pickle(save, zipped):
    content = {**load(VQ_FILE), "args": Fraction(1, 2)}
    file = save(content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="tensors, numbers.* holds fractions.Fraction, and") as error:
        convert_checkpoint(file)
    # The advice of torch to run the code of the file is not passed on.
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_code_in_a_pickle_is_not_run(save, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    with pytest.raises(ValueError, match="holds .*mkdir"):
        convert_checkpoint(save({**load(VQ_FILE), "harm": Harmful()}))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", VQ_FILE.read_bytes()[:10_000]])
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"`checkpoint` .*{name} is damaged, or no file"):
        convert_checkpoint(tmp_path / name)


def test_other_content_and_missing_files(save, tmp_path):
    with pytest.raises(ValueError, match="must hold a dictionary, got list"):
        convert_checkpoint(save([torch.zeros(2)]))
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="`checkpoint` must be a file"):
            convert_checkpoint(path)


# Configs.


def test_missing_configs(save, tmp_path):
    file = save(load(IFSQ_FILE))
    with pytest.raises(ValueError, match="`config` must be the JSON file .*config.json nor .*run.json is there"):
        convert_checkpoint(file)
    with pytest.raises(FileNotFoundError, match="`config` must be a JSON file, but there is none at .*absent.json"):
        convert_checkpoint(file, tmp_path / "absent.json")
    for text, message in (("[1]", "must be a JSON object, got list"), ("{", "is not a JSON file")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=f"`config` .*run.json {message}"):
            convert_checkpoint(file)
    with pytest.raises(ValueError, match="`config` must be left out for a LlamaGen VQ tokenizer"):
        convert_checkpoint(VQ_FILE, IFSQ_CONFIG)


def with_config(tmp_path, **changes):
    config = json.loads(IFSQ_CONFIG.read_text()) | changes
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    return convert_checkpoint(IFSQ_FILE, path).model


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("act_fun", "tanh", r"must be one of \['scale_sigmoid_16', 'scale_sigmoid_20'\], got 'tanh'"),
        ("act_fun", "absent", r"lacks \['act_fun'\]"),
        ("do_simple_bound", "absent", r"lacks \['do_simple_bound'\]"),
        ("levels", "absent", r"lacks \['levels'\]"),
        ("do_simple_bound", False, "must be True for AutoencoderIFSQ, got False"),
        ("norm_type", "rmsnorm", "must be 'groupnorm' for AutoencoderIFSQ, got 'rmsnorm'"),
        ("double_z", False, "must be True"),
        ("use_quant_layer", False, "must be True"),
        ("_class_name", "VQVAEModel", "must be 'ImageFSQVAEModel'"),
        ("attn_resolutions", [16], r"must be empty for AutoencoderIFSQ, .* got \[16\]"),
        ("use_attention", True, "must be empty"),
        ("use_attention", False, "must be empty"),
        ("encoder_resnet_blocks", ["ResnetBlock2D", "ResnetBlock2D", "Other"], "must be .*, got .*'Other'"),
        ("encoder_spatial_downsample", ["Downsample", "", ""], "must be .*'Downsample', 'Downsample', ''"),
        ("decoder_spatial_upsample", ["Upsample", "Upsample", ""], "must be .*'', 'Upsample', 'Upsample'"),
        ("levels", [17, 17, 17, 16], "must be odd"),
        ("levels", 17, "must be a list of positive integers, got 17"),
        ("hidden_size", "32", "must be a positive integer, got '32'"),
        ("embed_dim", 5, "must be the number of `levels` .*, got 5"),
        # Without a trace in the shapes, but the average holds the levels too.
        ("levels", [17, 17, 15, 17], r"is \[17, 17, 15, 17\], but .* with \[17, 17, 17, 17\]"),
    ],
)
def test_configs_of_other_architectures(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=f"`config` .*`?{name}`?.*") as error:
        with_config(tmp_path, **{name: value})
    assert re.search(message, str(error.value))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64},
        {"hidden_size_mult": [1, 1, 2, 2]},
        {"hidden_size_mult": [1, 2]},
        {"num_res_blocks": 2},
        {"z_channels": 8},
        {"levels": [17, 17], "embed_dim": 2},
    ],
)
def test_configs_that_do_not_fit_the_weights(tmp_path, changes):
    lists = {
        "encoder_resnet_blocks",
        "decoder_resnet_blocks",
        "encoder_spatial_downsample",
        "decoder_spatial_upsample",
    }
    with pytest.raises(ValueError, match="do not fit AutoencoderIFSQ|the checkpoint was trained with"):
        with_config(tmp_path, **dict.fromkeys(lists, "absent"), **changes)


@pytest.mark.parametrize(
    "changes", [{"dropout": 0.1}, {"attn_resolutions": []}, {"factorized_bits": [2, 2]}, {"double_z": True}]
)
def test_configs_of_the_same_model(tmp_path, changes):
    assert_equal_weights(with_config(tmp_path, **changes), convert_checkpoint(IFSQ_FILE).model)


# The script.


class HubHandler(BaseHTTPRequestHandler):
    """Takes a new repository and a commit of small files, as the Hub does."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            repo = self.server.repo = json.loads(body)
            self.answer({"url": f"https://huggingface.co/{repo['organization']}/{repo['name']}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            lines = map(json.loads, body.splitlines())
            values = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            self.server.commit_path = self.path
            self.answer({"commitUrl": "https://huggingface.co/someone/mine/commit/0", "commitOid": "0" * 40})
        else:
            self.answer({"valid": True})

    def do_GET(self):
        self.answer({"id": "someone/tokenizer", "sha": "0" * 40, "name": "someone"})

    def answer(self, content):
        self.send_response(200)
        content = json.dumps(content).encode()
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_example(monkeypatch):
    """Runs the Python code in the model card of a folder, beside the folder; returns the namespace after it."""

    def run(output_dir):
        namespace = {}
        monkeypatch.chdir(output_dir.parent)
        card = (output_dir / "README.md").read_text()
        # Where the model lies is nobody else's business.
        assert str(output_dir.parent) not in card
        exec(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], namespace)
        return namespace

    return run


def run_script_with_push(hub, home, *arguments):
    """Standard error of the script as its own process, which pushes to `hub`."""
    command = [sys.executable, SCRIPT, *arguments, "--push_to_hub", "--hub_model_id", "someone/mine"]
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_none"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "" and hub.commit_path == "/api/models/someone/mine/commit/main"
    return result.stderr


def test_script_with_push(tmp_path, hub):
    output_dir = tmp_path / "tokenizer"
    arguments = ["--checkpoint", IFSQ_FILE, "--config", IFSQ_CONFIG, "--weights", "raw", "--output_dir", output_dir]
    log = run_script_with_push(hub, tmp_path / "home", *arguments, "--hub_private_repo")
    assert "under `state_dict.gen_model`" in log
    model = AutoencoderIFSQ.from_pretrained(output_dir)
    assert_equal_weights(model, convert_checkpoint(IFSQ_FILE, weights="raw").model)
    pushed = {path.name: path.read_bytes() for path in output_dir.iterdir()}
    assert hub.repo["visibility"] == "private"
    assert hub.files == pushed and set(pushed) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    assert 'from hf_ifsq import AutoencoderIFSQ\n\nmodel = AutoencoderIFSQ.from_pretrained("someone/mine")' in (
        pushed["README.md"].decode()
    )


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("convert_checkpoint_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_script_without_push(script, run_example, tmp_path):
    output_dir = tmp_path / "outputs" / "vq"
    script.main(script.ConversionArguments(checkpoint=str(VQ_FILE), output_dir=str(output_dir)))
    card = (output_dir / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {"library_name": "diffusers", "tags": ["hf-ifsq"]}
    assert "a LlamaGen VQ tokenizer under `model` in `vq_tiny.pt`" in card
    example = run_example(output_dir)
    assert type(example["model"]) is VQModel
    assert_equal_weights(example["model"], convert_checkpoint(VQ_FILE).model)


def test_script_keeps_official_files(script, save, tmp_path):
    file = save(load(IFSQ_FILE))
    (tmp_path / "config.json").write_text(IFSQ_CONFIG.read_text())
    with pytest.raises(ValueError, match="`output_dir` must be another folder than"):
        script.main(script.ConversionArguments(checkpoint=str(file), output_dir=str(tmp_path)))
    assert (tmp_path / "config.json").read_text() == IFSQ_CONFIG.read_text()


# Pipelines of a converted generator and a tokenizer.


@pytest.fixture
def tokenizer_folder(tmp_path, make_autoencoder):
    """Function that saves a tokenizer of given levels for images of 32 x 32 pixels, and 4 x 4 a token."""

    def save(levels, **config):
        make_autoencoder(levels=levels, sample_size=32, **config).save_pretrained(tmp_path / "tokenizer")
        return str(tmp_path / "tokenizer")

    return save


def test_ar_pipeline_with_push(tmp_path, hub, tokenizer_folder):
    output_dir = tmp_path / "outputs" / "ar"
    arguments = ["--checkpoint", REPA_FILE, "--num_attention_heads", 4, "--grid_size", 4, 4]
    arguments += ["--tokenizer", tokenizer_folder((17, 17)), "--output_dir", output_dir]
    log = run_script_with_push(hub, tmp_path / "home", *arguments)
    assert "Changing `sample_size` of the tokenizer from 32 to 16." in log
    files = {path.relative_to(output_dir).as_posix(): path for path in output_dir.rglob("*") if path.is_file()}
    assert hub.files == {name: path.read_bytes() for name, path in files.items()}
    assert {"model_index.json", "transformer/model.safetensors", "repa_projectors.safetensors"} <= files.keys()
    card = files["README.md"].read_text()
    assert ModelCard(card).data.to_dict() == {
        "library_name": "hf-ifsq",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["hf-ifsq"],
    }
    assert 'pipe = IFSQARPipeline.from_pretrained("someone/mine")\nimage = pipe(0, guidance_scale=2.0)' in card
    assert "with the tokenizer `tokenizer`" in card and "16 x 16 pixels" in card and "ids in [0, 10)." in card

    pipe = IFSQARPipeline.from_pretrained(output_dir)
    assert_equal_weights(pipe.tokenizer, AutoencoderIFSQ.from_pretrained(tmp_path / "tokenizer"))
    expected = load_file(REPA_FILE.parent / "goldens.safetensors")
    indices = pipe(expected["gen_labels"], guidance_scale=2.0, do_sample=False, output_type="latent").images
    assert torch.equal(indices.flatten(1), expected["gen_tokens_cfg2"])
    assert pipe(3).images[0].size == (16, 16)


def test_dit_pipeline(script, run_example, tmp_path, tokenizer_folder):
    output_dir = tmp_path / "dit"
    arguments = {"checkpoint": str(DIT_FILE), "tokenizer": tokenizer_folder((17,) * 4), "output_dir": str(output_dir)}
    script.main(script.ConversionArguments(**arguments))
    card = (output_dir / "README.md").read_text()
    example = run_example(output_dir)
    assert type(example["pipe"]) is IFSQDiTPipeline and example["image"].size == (16, 16)
    config = example["pipe"].transformer.config
    assert config.levels == [17] * 4
    # What latents were multiplied by is in the official generator's file, not in the tokenizer's.
    assert config.scaling_factor == example["pipe"].tokenizer.config.scaling_factor == 1.092421
    # The code in the card that loads the projector.
    loading = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    namespace = {}
    exec(loading.replace("repa_projectors.safetensors", str(output_dir / "repa_projectors.safetensors")), namespace)
    assert_equal_weights(namespace["alignment"], convert_checkpoint(DIT_FILE).alignments[0])


def test_scaling_factor_of_a_dit_whose_file_does_not_tell(save, tokenizer_folder):
    content = load(DIT_FILE)
    del content["config"]
    tokenizer = tokenizer_folder((17,) * 4, scaling_factor=1.7)
    pipe = assemble_pipeline(convert_checkpoint(save(content)).model, tokenizer)
    assert pipe.tokenizer.config.scaling_factor == pipe.transformer.config.scaling_factor == 1.7


def test_pipeline_with_class_names(script, run_example, save, tmp_path, tokenizer_folder):
    content = load(LLAMAGEN_FILE)
    content["model"]["cls_embedding.embedding_table.weight"] = torch.randn(1001, 64)
    arguments = {"checkpoint": str(save(content)), "num_attention_heads": 4, "grid_size": [2, 8]}
    arguments |= {"tokenizer": tokenizer_folder((17, 17)), "output_dir": str(tmp_path / "ar")}
    script.main(script.ConversionArguments(**arguments))
    output_dir = tmp_path / "ar"
    card = (output_dir / "README.md").read_text()
    assert 'pipe("golden retriever", guidance_scale=2.0)' in card and "names in `pipe.labels`" in card
    assert "Representation alignment" not in card and not (tmp_path / "ar" / "repa_projectors.safetensors").exists()
    example = run_example(output_dir)
    # Eight rows of four pixels, of a grid of 2 x 8.
    assert example["image"].size == (32, 8)
    pipe = example["pipe"]
    names, ids = (
        pipe(classes, do_sample=False, output_type="latent").images
        for classes in (["giant panda", "daisy"], [388, 985])
    )
    assert torch.equal(names, ids)
    with pytest.raises(ValueError, match="'crane', which is none of the 1000 class names"):
        pipe("crane")


def test_llamagen_with_its_tokenizer(script, run_example, save, tmp_path):
    content = load(LLAMAGEN_FILE)
    for name in ("tok_embeddings.weight", "output.weight"):
        content["model"][name] = torch.randn(128, 64)
    tokenizer, output_dir = tmp_path / "vq", tmp_path / "ar"
    script.main(script.ConversionArguments(checkpoint=str(VQ_FILE), output_dir=str(tokenizer)))
    arguments = {"checkpoint": str(save(content)), "num_attention_heads": 4, "grid_size": [4]}
    script.main(script.ConversionArguments(**arguments, tokenizer=str(tokenizer), output_dir=str(output_dir)))
    example = run_example(output_dir)
    assert example["image"].size == (8, 8)
    assert_equal_weights(example["pipe"].tokenizer, convert_checkpoint(VQ_FILE).model)


def test_generator_alone_with_several_projectors(script, run_example, save, tmp_path):
    content = load(REPA_FILE)
    for name, weight in list(content["ema"].items()):
        if name.startswith("projectors.0."):
            content["ema"][name.replace("projectors.0.", "projectors.1.")] = weight + 1
    output_dir = tmp_path / "ar"
    arguments = {"checkpoint": str(save(content)), "num_attention_heads": 4, "output_dir": str(output_dir)}
    script.main(script.ConversionArguments(**arguments))
    card = (output_dir / "README.md").read_text()
    assert type(run_example(output_dir)["model"]) is IFSQARForImageGeneration
    for index in range(2):
        file = f"repa_projectors_{index}.safetensors"
        assert f'load_file("{file}")' in card
        weights = load_file(output_dir / file)
        torch.testing.assert_close(
            weights["projector.4.bias"], content["ema"]["projectors.0.4.bias"] + index, rtol=0, atol=0
        )


def test_tokenizers_that_do_not_fit(script, tmp_path, tokenizer_folder):
    generator = convert_checkpoint(REPA_FILE, num_attention_heads=4).model
    with pytest.raises(ValueError, match="predicts 289 tokens .* codebook of 15"):
        assemble_pipeline(generator, tokenizer_folder((5, 3)))
    with pytest.raises(ValueError, match="has 4 `in_channels`, but the codes of `tokenizer` have 2"):
        assemble_pipeline(convert_checkpoint(DIT_FILE).model, tokenizer_folder((17, 17)))
    tokenizer = tokenizer_folder((17, 17))
    with pytest.raises(ValueError, match="`tokenizer` must be left out for VQModel, which is not a generator model"):
        assemble_pipeline(convert_checkpoint(VQ_FILE).model, tokenizer)
    arguments = {"checkpoint": str(REPA_FILE), "num_attention_heads": 4, "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="`output_dir` must be another folder than"):
        script.main(script.ConversionArguments(**arguments, output_dir=tokenizer))
