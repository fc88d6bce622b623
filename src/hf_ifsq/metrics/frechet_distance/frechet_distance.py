from hf_ifsq.metrics import evaluation, frechet


class FrechetDistance(evaluation.Metric):
    """Fréchet distance between sets of features of equal numbers, see the card beside this file."""

    inputs = {"predictions": evaluation.VECTOR, "references": evaluation.VECTOR}

    def _compute(self, predictions, references) -> dict[str, float]:
        moments, reference_moments = frechet.FeatureMoments(), frechet.FeatureMoments()
        moments.update(predictions)
        reference_moments.update(references)
        return {"frechet_distance": frechet.frechet_distance(moments, reference_moments)}
