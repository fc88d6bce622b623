import json
import pathlib

import pytest

from hf_ifsq.training.output_folder import remove_partial, reset_permissions, written_whole


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder, version):
    (folder / "transformer").mkdir()
    (folder / "transformer" / f"{version}.txt").write_text(version)
    (folder / "model_index.json").write_text(json.dumps({"version": version}))


def test_a_result_replaces_the_one_before_and_leaves_the_rest(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "state").write_text("state")
    for version in ("old", "new"):
        with written_whole(tmp_path) as folder:
            write(folder, version)
    assert files(tmp_path) == {
        "checkpoint-1/state": "state",
        "model_index.json": '{"version": "new"}',
        "transformer/new.txt": "new",
    }


def test_a_result_of_another_kind_leaves_nothing_of_the_one_before(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with written_whole(tmp_path) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "diffusion_pytorch_model.safetensors").write_text("weights")
    for scheduler in ("scheduler", None):
        with written_whole(tmp_path) as folder:
            for name in filter(None, ("transformer", scheduler)):
                (folder / name).mkdir()
                (folder / name / "config.json").write_text(name)
            index = {
                "_class_name": "Pipeline",
                "transformer": ["a", "b"],
                **({scheduler: ["c", "d"]} if scheduler else {}),
            }
            (folder / "model_index.json").write_text(json.dumps(index))
        assert ("scheduler/config.json" in files(tmp_path)) == (scheduler is not None)
    assert set(files(tmp_path)) == {"notes.txt", "model_index.json", "transformer/config.json"}


def test_a_result_that_fails_leaves_the_one_before(tmp_path):
    with written_whole(tmp_path) as folder:
        write(folder, "old")
    with pytest.raises(OSError, match="no space"), written_whole(tmp_path) as folder:
        (folder / "model_index.json").write_text("half")
        raise OSError("no space")
    remove_partial(tmp_path)
    assert files(tmp_path) == {"model_index.json": '{"version": "old"}', "transformer/old.txt": "old"}


@pytest.mark.parametrize("killed_at", ["rename", "replace"])
def test_a_process_that_is_killed_between_two_renames_loses_nothing(tmp_path, monkeypatch, killed_at):
    with written_whole(tmp_path) as folder:
        write(folder, "old")

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("hf_ifsq.training.output_folder.remove_partial", lambda _: None)
        with pytest.raises(Killed), written_whole(tmp_path) as folder:
            write(folder, "new")
            (folder / "model_index.json").unlink()
            patch.setattr(pathlib.Path, killed_at, die)
    remove_partial(tmp_path)
    assert files(tmp_path) == {"model_index.json": '{"version": "old"}', "transformer/old.txt": "old"}


def test_rights_of_new_files(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("private", "a/private", "usual"):
        (tmp_path / name).touch()
    for name in ("private", "a/private"):
        (tmp_path / name).chmod(0o600)
    reset_permissions(tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777} and len(files(tmp_path)) == 4
