"""Fréchet distance between two sets of features, as a module of `evaluate`."""

import datasets
import evaluate

from hf_ifsq.metrics import frechet


DESCRIPTION = """
Fréchet distance between the Gaussians fitted to two sets of features, the distance behind FID.
"""

INPUTS = """
Args:
    predictions: features of one set of images, a list of numbers for each image.
    references: features of the other set, from the same extractor; as many as predictions.

Returns:
    frechet_distance: at least 0, in the squared unit of the features.

Example:
    >>> from importlib.resources import files
    >>> import evaluate
    >>> frechet_distance = evaluate.load(str(files("hf_ifsq.metrics") / "frechet_distance"))
    >>> frechet_distance.compute(predictions=[[0.0], [2.0]], references=[[3.0], [5.0]])
    {'frechet_distance': 9.0}
"""

CITATION = """
@inproceedings{heusel2017gans,
  title={GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle={NeurIPS},
  year={2017}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class FrechetDistance(evaluate.Metric):
    """Fréchet distance between sets of features of equal numbers."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.List(datasets.Value("float64"))
        info = evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": features, "references": features}),
            reference_urls=["https://arxiv.org/abs/1706.08500"],
        )
        # Not among the arguments, which refuse it for nested features. Lists would take four times the memory.
        info.format = "numpy"
        return info

    def _compute(self, predictions, references) -> dict[str, float]:
        moments, reference_moments = frechet.FeatureMoments(), frechet.FeatureMoments()
        moments.update(predictions)
        reference_moments.update(references)
        return {"frechet_distance": frechet.frechet_distance(moments, reference_moments)}
