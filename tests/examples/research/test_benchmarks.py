import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def load(monkeypatch):
    """Function that imports a script of the benchmarks."""
    folder = str(Path(__file__).parents[3] / "examples" / "research" / "benchmarks")
    monkeypatch.setattr(sys, "path", [folder, *sys.path])
    return importlib.import_module


def test_ar(load, tmp_path, capsys):
    script = load("benchmark_ar")
    file = tmp_path / "results.json"
    args = script.BenchmarkArguments(
        sizes=["S"],
        batch_sizes=[2],
        variants=["floor", "ours", "ours, CPU kernels", "Llama", "no cache"],
        vocab_sizes=[20],
        grid_size=[2, 2],
        device="cpu",
        turns=1,
        output_file=str(file),
    )
    rows = script.main(args)
    assert json.loads(file.read_text()) == rows
    assert [(row["guidance"], row["variant"]) for row in rows] == [
        (guidance, variant) for guidance in ("no", "yes") for variant in args.variants
    ]
    assert all(row["images per second"] > 0 and row["first token (ms)"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\n| S |") == 10


def test_dit(load, capsys):
    script = load("benchmark_dit")
    args = script.BenchmarkArguments(
        sizes=["S/2"],
        batch_sizes=[1],
        variants=["floor", "ours", "ours, CPU kernels", "diffusers"],
        sample_size=4,
        device="cpu",
        turns=1,
    )
    rows = script.main(args)
    assert [row["variant"] for row in rows] == args.variants
    assert all(row["per step (ms)"] > 0 for row in rows)


def test_memory_of_training(load):
    script = load("benchmark_ar_training")
    rows = script.main(script.BenchmarkArguments(size="S", batch_size=1, device="cpu"))
    assert len(rows) == 3


def test_floor_runs_the_linear_layers_that_it_is_asked_for(load):
    machine = load("machine")
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(4, 5), "b": torch.nn.Linear(6, 7), "c": torch.nn.Conv2d(1, 1, 1)}
    )
    calls = []
    for name, module in model.items():
        module.register_forward_hook(lambda _, inputs, output, name=name: calls.append((name, tuple(inputs[0].shape))))
    machine.linear_layers(model, {"b": 3, "a": 2})()
    assert calls == [("a", (2, 4)), ("b", (3, 6))]


def test_unknown_variants(load):
    with pytest.raises(ValueError, match=r"`variants` must be of .*got \['other'\]"):
        script = load("benchmark_ar")
        script.main(script.BenchmarkArguments(variants=["ours", "other"]))
