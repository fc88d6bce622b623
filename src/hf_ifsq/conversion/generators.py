"""What the two official generators have in common: the config in their files, class names and REPA projectors."""

import json
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights

from ..training.repa import RepresentationAlignment
from .checkpoint import Weights, count_indices, load_exactly, size_of


# In names of weights; they are no part of a generator, see `convert_projectors`.
PROJECTORS = r"projectors\.\d+\..*"


def config_value(config: dict[str, Any] | None, section: str, name: str) -> Any:
    """An entry of a section of the config in an official file; `None` where the file has none."""
    values = (config or {}).get(section)
    return values.get(name) if isinstance(values, dict) else None


def imagenet_classes() -> list[str]:
    """
    Short names of the 1000 classes of ImageNet-1k in the usual order, by WordNet id: those that torchvision 0.29 gives
    with its weights (`torchvision/models/_meta.py`). Five that differ in case or meaning alone are changed, so that no
    name is short for two classes: two cranes, two maillots, and the dog called Cardigan.

    Returns:
        `list[str]`: 1000 different names.
    """  # noqa: D205
    return json.loads(Path(__file__).with_name("imagenet_classes.json").read_text(encoding="utf-8"))


def class_names(num_classes: int) -> dict[int, str] | None:
    """The `id2label` of an official generator: 1000 classes are those of ImageNet, as in all that are published."""
    return dict(enumerate(imagenet_classes())) if num_classes == 1000 else None


def count_classes(weights: Weights, table: str, config: dict[str, Any] | None, model_class: type) -> tuple[int, bool]:
    """
    Number of classes of an official generator, and whether the table of their embeddings has a null class after them.

    The number of rows alone does not tell, but the config in the file may. Without one there is a null class, as in
    all published files.

    Raises:
        ValueError: if the config names a number of classes that the table does not have.
    """
    rows = size_of(weights, table, 0, model_class)
    num_classes = config_value(config, "data", "num_classes")
    if num_classes is None:
        num_classes = rows - 1
    if rows - num_classes not in (0, 1):
        raise ValueError(
            f"`checkpoint` was trained with {num_classes} classes by the entry `data.num_classes` of its config, but "
            f"its table `{table}` has {rows} rows."
        )
    return num_classes, rows > num_classes


def convert_projectors(weights: Weights) -> list[RepresentationAlignment]:
    """
    The projectors of a generator that was trained with representation alignment.

    Args:
        weights (`dict[str, torch.Tensor]`): all weights of the generator by official name.

    Returns:
        `list[RepresentationAlignment]`: one a teacher, as a rule one or none.

    Raises:
        ValueError: if the weights of a projector do not fit.
    """
    alignments = []
    for index in range(count_indices(weights, r"projectors\.(\d+)\.")):
        prefix = f"projectors.{index}."
        first, last = f"{prefix}0.weight", f"{prefix}4.weight"
        with init_empty_weights():
            alignment = RepresentationAlignment(
                hidden_size=size_of(weights, first, 1, RepresentationAlignment),
                teacher_hidden_size=size_of(weights, last, 0, RepresentationAlignment),
                projector_dim=size_of(weights, first, 0, RepresentationAlignment),
            )
        own = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
        load_exactly(alignment, own, lambda name, prefix=prefix: [prefix + name.removeprefix("projector.")])
        alignments.append(alignment)
    return alignments
