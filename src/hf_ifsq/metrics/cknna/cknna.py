import torch

from hf_ifsq.metrics import alignment, evaluation


class CKNNA(evaluation.Metric):
    """Alignment of two representations, see the card beside this file."""

    inputs = {"predictions": evaluation.VECTOR, "references": evaluation.VECTOR}

    def _compute(self, predictions, references, k: int = alignment.CKNNA_NEIGHBORS) -> dict[str, float]:
        return {"cknna": alignment.cknna(torch.as_tensor(predictions), torch.as_tensor(references), k)}
