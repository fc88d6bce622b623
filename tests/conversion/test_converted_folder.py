"""Where `examples/convert_checkpoint.py` writes to, and what it leaves there."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from diffusers import VQModel

from hf_ifsq import IFSQARForImageGeneration
from hf_ifsq.conversion import convert_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"
SCRIPT = Path(__file__).parents[2] / "examples" / "convert_checkpoint.py"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with official files, which is the working folder too."""
    home = tmp_path / "home" / "somebody"
    shutil.copytree(FIXTURES / "llamagen_vq", home / "official")
    shutil.copy(FIXTURES / "llamagen_ar" / "ifsq_repa" / "0000100.pt", home / "official")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def convert(home, monkeypatch):
    """Function that runs the script; the tokenizer of LlamaGen goes to `vq` by default."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def convert(**arguments):
        arguments = {"checkpoint": "~/official/vq_tiny.pt", "output_dir": "vq"} | arguments
        module.main(module.ConversionArguments(**arguments))

    convert.module = module
    return convert


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_paths_in_the_home_folder(convert, home):
    convert(output_dir="~/outputs/vq")
    assert not (home / "~").exists()
    assert type(VQModel.from_pretrained(home / "outputs" / "vq")) is VQModel
    for file in (home / "outputs").rglob("*"):
        assert not file.is_file() or b"somebody" not in file.read_bytes()
    with pytest.raises(ValueError, match="`config` must be left out"):
        convert(config="~/official/config.json")


def test_other_files_in_the_output_folder(convert, home):
    (home / "vq").mkdir()
    (home / "vq" / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"`output_dir` must be a new or an empty folder, .* vq has \['config.json'\]"
    ):
        convert()
    assert (home / "vq" / "config.json").read_text() == "{}" and names(home / "vq") == {"config.json"}


def test_output_folders_that_cannot_be(convert, home):
    (home / "file").touch()
    for output_dir in ("file", "file/below"):
        with pytest.raises(ValueError, match="`output_dir` must be a folder to write to, but file is none, got file"):
            convert(output_dir=output_dir)


def test_a_conversion_may_be_repeated(convert, home):
    convert()
    (home / "vq" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    convert()
    expected = convert_checkpoint(home / "official" / "vq_tiny.pt").model
    assert VQModel.from_pretrained(home / "vq").quant_conv.bias.equal(expected.quant_conv.bias)
    # Nothing of another model is left beside one.
    with pytest.raises(ValueError, match="`output_dir` must be a new or an empty folder, or that of an earlier"):
        convert(checkpoint="official/0000100.pt", num_attention_heads=4)


def test_interrupted_conversions(convert, home, monkeypatch):
    arguments = {"checkpoint": "official/0000100.pt", "output_dir": "ar", "num_attention_heads": 4}

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert.module, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(**arguments)
    assert names(home / "ar") == set()
    # One that was killed leaves what it wrote in a folder that the next removes.
    with monkeypatch.context() as patch:
        patch.setattr(convert.module, "save_file", interrupt)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            convert(**arguments)
    left = names(home / "ar")
    assert left and all(name.startswith(convert.module.PARTIAL_RESULT) for name in left)
    convert(**arguments)
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors", "repa_projectors.safetensors"}
    assert names(home / "ar") <= files and "model.safetensors" in names(home / "ar")
    assert IFSQARForImageGeneration.from_pretrained(home / "ar").config.grid_size == [4, 4]


def test_tokenizers_that_do_not_load(convert, home):
    (home / "empty").mkdir()
    for tokenizer in ("empty", "~/empty"):
        with pytest.raises(ValueError, match="`tokenizer` must be the folder or the name on the Hub .* does not load"):
            convert(checkpoint="official/0000100.pt", num_attention_heads=4, tokenizer=tokenizer)
    assert not (home / "vq").exists()
