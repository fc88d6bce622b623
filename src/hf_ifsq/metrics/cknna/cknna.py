"""How alike two representations of the same images are, as a module of `evaluate`."""

import datasets
import evaluate
import torch

from hf_ifsq.metrics import alignment


DESCRIPTION = """
Centred kernel nearest-neighbour alignment (CKNNA) of two representations of the same images.
"""

INPUTS = """
Args:
    predictions: one representation, a list of numbers for each image; at least 4 images.
    references: the other, of the same images in the same order; it may be of another width.
    k: number of nearest neighbours, by default 10, fewer than images.

Returns:
    cknna: 1 for equal representations, near 0 for unrelated ones.

Example:
    >>> from importlib.resources import files
    >>> import evaluate
    >>> cknna = evaluate.load(str(files("hf_ifsq.metrics") / "cknna"))
    >>> predictions = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.8], [0.5, 0.5]]
    >>> references = [[2.0], [1.5], [-1.0], [-2.0], [0.1]]
    >>> round(cknna.compute(predictions=predictions, references=references, k=2)["cknna"], 3)
    0.787
"""

CITATION = """
@inproceedings{huh2024platonic,
  title={The Platonic Representation Hypothesis},
  author={Huh, Minyoung and Cheung, Brian and Wang, Tongzhou and Isola, Phillip},
  booktitle={ICML},
  year={2024}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class CKNNA(evaluate.Metric):
    """Alignment of two representations."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.List(datasets.Value("float64"))
        info = evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": features, "references": features}),
            reference_urls=["https://arxiv.org/abs/2405.07987"],
        )
        # Not among the arguments, which refuse it for nested features. Lists would take four times the memory.
        info.format = "numpy"
        return info

    def _compute(self, predictions, references, k: int = alignment.CKNNA_NEIGHBORS) -> dict[str, float]:
        return {"cknna": alignment.cknna(torch.as_tensor(predictions), torch.as_tensor(references), k)}
