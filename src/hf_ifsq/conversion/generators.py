"""What the two official generator models share: the config in their files, class names and REPA projectors."""

import json
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights

from ..training.repa import RepresentationAlignment
from .checkpoint import Weights, load_exactly


# In names of weights; they are not part of a generator model, see `convert_projectors`.
PROJECTORS = r"projectors\.\d+\..*"


def config_value(config: dict[str, Any], section: str, name: str) -> Any:
    """An entry of a section of the config in an official file; `None` where there is none."""
    values = config.get(section)
    return values.get(name) if isinstance(values, dict) else None


def class_names(num_classes: int) -> dict[int, str] | None:
    """
    The `id2label` of an official model: 1000 classes are those of ImageNet-1k, as in all that are published, under the
    short names of torchvision 0.29 (`torchvision/models/_meta.py`) by WordNet id. Five that differ in case or meaning
    alone are changed, so that no name is short for two classes: two cranes, two maillots, and the dog called Cardigan.
    """
    if num_classes != 1000:
        return None
    names = json.loads(Path(__file__).with_name("imagenet_classes.json").read_text(encoding="utf-8"))
    return dict(enumerate(names))


def count_classes(weights: Weights, table: str, config: dict[str, Any]) -> int:
    """
    Number of classes of an official model. In the table of their embeddings a null class may follow; without a number
    in the config of the file it does, as in all published files.
    """
    rows = weights.size(table, 0)
    num_classes = config_value(config, "data", "num_classes")
    if num_classes is None:
        return rows - 1
    if rows - num_classes not in (0, 1):
        raise ValueError(
            f"`checkpoint` was trained with {num_classes} classes by the entry `data.num_classes` of its config, but "
            f"its table `{table}` has {rows} rows."
        )
    return num_classes


def convert_projectors(weights: Weights) -> list[RepresentationAlignment]:
    """The projectors of a generator model that was trained with representation alignment: one per teacher."""
    alignments = []
    for index in range(weights.count(r"projectors\.(\d+)\.")):
        prefix = f"projectors.{index}."
        own = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
        projector = Weights(own, RepresentationAlignment)
        with init_empty_weights():
            alignment = RepresentationAlignment(
                hidden_size=projector.size(f"{prefix}0.weight", 1),
                teacher_hidden_size=projector.size(f"{prefix}4.weight", 0),
                projector_dim=projector.size(f"{prefix}0.weight", 0),
            )
        load_exactly(alignment, projector, [(r"^projector\.", prefix)], dropped=())
        alignments.append(alignment)
    return alignments
