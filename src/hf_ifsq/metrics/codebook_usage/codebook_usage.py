"""How image tokens use their codebook, as a module of `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_ifsq.metrics import codebook


DESCRIPTION = """
How the tokens of images use their codebook: share of codes used, entropy, perplexity, and for finite scalar
quantization the entropy and the histogram of each dimension, and how uniform its values were before rounding.
"""

INPUTS = """
Args:
    predictions: tokens of each image, a list of integers in [0, codebook_size).
    codebook_size: number of codes; by default the product of `levels`.
    levels: levels of each dimension of finite scalar quantization, the first least significant in a token.
    bounded: floats in [-1, 1] of shape (images, dimensions, tokens of an image), the values that were rounded to the
        tokens.

Returns:
    num_tokens, num_codes_used: tokens, and how many different ones.
    usage: share of the codebook that occurs, in [0, 1].
    entropy_bits: entropy of a token in bits, at most log2(codebook_size).
    perplexity: 2**entropy_bits.
    dimension_histograms, dimension_entropies_bits: with `levels`, how often each level of each dimension occurs, and
        the entropy in bits of each.
    dimension_ks_distances: with `bounded`, the Kolmogorov-Smirnov distance of the values of each dimension to the
        uniform distribution on [-1, 1], in [0, 1].

Example:
    >>> from importlib.resources import files
    >>> import evaluate
    >>> codebook_usage = evaluate.load(str(files("hf_ifsq.metrics") / "codebook_usage"))
    >>> result = codebook_usage.compute(predictions=[[0, 1, 2, 3], [0, 1, 2, 3]], levels=[4, 2])
    >>> result["usage"], result["entropy_bits"], result["dimension_entropies_bits"]
    (0.5, 2.0, [2.0, 0.0])
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class CodebookUsage(evaluate.Metric):
    """Usage of a codebook."""

    def _info(self) -> evaluate.MetricInfo:
        info = evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("int64"))}),
            reference_urls=["https://arxiv.org/abs/2309.15505", "https://arxiv.org/abs/2601.17124"],
        )
        # Not among the arguments, which refuse it for nested features. Lists would take four times the memory.
        info.format = "numpy"
        return info

    def _compute(
        self, predictions, codebook_size: int | None = None, levels: list[int] | None = None, bounded=None
    ) -> dict[str, Any]:
        usage = codebook.CodebookUsage(codebook_size, levels)
        usage.update(np.concatenate(predictions), bounded)
        return usage.compute()
