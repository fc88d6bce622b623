from typing import Any

import numpy as np

from hf_ifsq.metrics import codebook, evaluation


class CodebookUsage(evaluation.Metric):
    """Usage of a codebook, see the card beside this file."""

    inputs = {"predictions": evaluation.TOKENS}

    def _compute(
        self, predictions, codebook_size: int | None = None, levels: list[int] | None = None, bounded=None
    ) -> dict[str, Any]:
        usage = codebook.CodebookUsage(codebook_size, levels)
        usage.update(np.concatenate(predictions), bounded)
        return usage.compute()
