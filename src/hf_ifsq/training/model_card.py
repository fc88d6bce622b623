"""The `README.md` of a trained model."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_suffix(".md")


def make_model_card(
    title: str,
    description: str,
    usage: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, float],
    arguments: Mapping[str, Any],
    pipeline_tag: str,
) -> str:
    """
    Write the model card of a run. It names no folder of the machine that trained, see [`without_local_paths`].

    Args:
        title, description (`str`): headline, and what the model is.
        usage (`str`): Python code that loads and uses it.
        facts (`dict[str, str]`): what it was trained on and how.
        metrics (`dict[str, float]`): results of the last validation.
        arguments (`dict[str, Any]`): all arguments of the training script.
        pipeline_tag (`str`): task in the terms of the Hub.
    """
    card = ModelCard.from_template(
        ModelCardData(library_name="hf-ifsq", pipeline_tag=pipeline_tag, tags=["ifsq"]),
        template_path=str(TEMPLATE),
        title=title,
        description=description,
        usage=usage,
        facts=facts,
        command=f"accelerate launch {shlex.join(map(without_local_paths, sys.argv))}",
        arguments=yaml.safe_dump({name: without_local_paths(arguments[name]) for name in arguments}, sort_keys=False),
        metrics=metrics,
    )
    return f"{card}\n"


def without_local_paths(value: Any) -> Any:
    """
    A value as it may be published: of a path that says where something lies on this machine, absolute, in a home or
    above the working folder, the last part alone. `--name=PATH` is shortened likewise.
    """
    if not isinstance(value, str | Path):
        return value
    option, equals, text = "", "", str(value)
    if text.startswith("--") and "=" in text:
        option, equals, text = text.partition("=")
    path = Path(text)
    leads_home = ".." in path.parts or Path.home().name in path.parts[:-1]
    if path.is_absolute() or text.startswith(("~", "file:")) or leads_home:
        text = path.name
    return f"{option}{equals}{text}"
