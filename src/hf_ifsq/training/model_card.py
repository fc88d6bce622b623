"""The `README.md` of a trained model."""

import shlex
import sys
from collections.abc import Mapping

import yaml
from huggingface_hub import ModelCardData

from .run import TrainingRun


TEMPLATE = """---
{metadata}
---

# {title}

{description}

## Use

```python
{usage}
```

## Training

| | |
|---|---|
{facts}

```bash
{command}
```

<details><summary>All arguments</summary>

```yaml
{arguments}```

</details>

## Evaluation

| metric | value |
|---|---|
{metrics}

Method: iFSQ, [arXiv 2601.17124](https://arxiv.org/abs/2601.17124).
"""


def make_model_card(
    run: TrainingRun,
    title: str,
    description: str,
    usage: str,
    metrics: Mapping[str, float],
    num_parameters: int,
    pipeline_tag: str,
) -> str:
    """
    Write the model card of a run: data, steps, metrics and the command.

    Args:
        run ([`TrainingRun`]): the finished run.
        title (`str`): headline.
        description (`str`): what the model is.
        usage (`str`): Python code that loads and uses it.
        metrics (`dict[str, float]`): results of the last validation.
        num_parameters (`int`): parameters of the trained model.
        pipeline_tag (`str`): task in the terms of the Hub.

    Returns:
        `str`: the card, with metadata for the Hub.
    """
    args = run.args
    (data,) = (getattr(args, name) for name in args.SOURCES if getattr(args, name) is not None)
    facts = {
        "data": f"`{data}`, {args.resolution} x {args.resolution} pixels",
        "parameters": f"{num_parameters:,}",
        "steps": f"{run.global_step:,}",
        "images a step": f"{run.global_batch_size:,}",
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}",
        "precision": {"no": "fp32"}.get(run.accelerator.mixed_precision, run.accelerator.mixed_precision),
        "averaging": f"EMA of {args.ema_decay}" if args.use_ema else "none",
        "seed": f"{args.seed}",
    }
    metadata = ModelCardData(library_name="hf-ifsq", pipeline_tag=pipeline_tag, tags=["ifsq"])
    return TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=title,
        description=description,
        usage=usage,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        arguments=yaml.safe_dump(args.to_dict(), sort_keys=False),
        command=f"accelerate launch {shlex.join(sys.argv)}",
        metrics="\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
    )
