"""
Convert an official checkpoint of iFSQ or LlamaGen.

    python examples/convert_checkpoint.py --checkpoint vq_ds16_c2i.pt --output_dir outputs/llamagen-vq-16
    python examples/convert_checkpoint.py --checkpoint c2i_B_256.pt --grid_size 16 \\
        --tokenizer outputs/llamagen-vq-16 --output_dir outputs/llamagen-b

The output is a folder for `from_pretrained` of the class that its `README.md` names: a tokenizer, a generator model,
or with `--tokenizer` a pipeline of both. All arguments: `--help`.
"""

import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import ModelCardData, create_repo, upload_folder
from safetensors.torch import save_file
from transformers import HfArgumentParser, PreTrainedModel

from hf_ifsq.conversion import Conversion, assemble_pipeline, convert_checkpoint
from hf_ifsq.training.arguments import argument
from hf_ifsq.training.model_card import without_local_paths
from hf_ifsq.training.output_folder import PARTIAL_RESULT, written_whole
from hf_ifsq.training.repa import RepresentationAlignment


MODEL_CARD = """---
{metadata}
---

# {title}

The weights of {format_name}{entry} in `{checkpoint}`, converted by hf-ifsq to {class_name}{tokenizer}.

```python
{usage}
```
{facts}{alignment}"""

ALIGNMENT = """
## Representation alignment

The model was trained with REPA. Its projectors are not part of the model; they are kept for further training:

```python
from hf_ifsq.training.repa import RepresentationAlignment
from safetensors.torch import load_file

{usage}
```
"""


@dataclass
class ConversionArguments:
    """Arguments of this script."""

    checkpoint: str = field(metadata={"help": "Official file, or its weights alone as safetensors."})
    output_dir: str = field(
        metadata={"help": "Folder of the result, new or empty, or of an earlier conversion of the same file."}
    )
    config: str | None = argument(
        None, "Config of an iFSQ tokenizer; by default `config.json` or `run.json` beside the file."
    )
    weights: str | None = argument(
        None, "`ema` or `raw`; by default `ema`, or the only weights in a LlamaGen file.", choices=["ema", "raw"]
    )
    num_attention_heads: int | None = argument(None, "Heads of an AR model, if its sizes are none of LlamaGen's.")
    grid_size: list[int] | None = argument(
        None,
        "Rows and columns of the tokens of an AR model, or one number for both, if the file does not tell.",
    )
    tokenizer: str | None = argument(
        None,
        "Converted or trained tokenizer of a generator model, a folder or a Hub name: makes the output a pipeline.",
    )
    push_to_hub: bool = argument(False, "Push the result to the Hub.")
    hub_model_id: str | None = argument(None, "Repository on the Hub; by default the name of `output_dir`.")
    hub_private_repo: bool = argument(False, "Make the repository private if it is new.")


def main(args: ConversionArguments) -> None:
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    paths = ("checkpoint", "config", "tokenizer", "output_dir")
    args = replace(args, **{name: os.path.expanduser(path) for name in paths if (path := getattr(args, name))})
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir, args.checkpoint, args.config, args.tokenizer)
    grid_size = args.grid_size
    if grid_size is not None and len(grid_size) == 1:
        grid_size = grid_size[0]
    conversion = convert_checkpoint(args.checkpoint, args.config, args.weights, args.num_attention_heads, grid_size)
    result = conversion.model
    if args.tokenizer is not None:
        result = assemble_pipeline(conversion.model, args.tokenizer)
    repo_id = None
    if args.push_to_hub:
        name = args.hub_model_id or output_dir.resolve().name
        repo_id = create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    card = make_model_card(args, conversion, result, repo_id or without_local_paths(args.output_dir))
    with written_whole(output_dir) as folder:
        (folder / "README.md").write_text(card, "utf-8")
        result.save_pretrained(folder)
        for file, alignment in name_alignments(conversion).items():
            save_file(alignment.state_dict(), folder / file)
    logging.getLogger(__name__).info(f"Wrote {type(result).__name__} to {output_dir}.")
    if repo_id is not None:
        message = f"Conversion of {Path(args.checkpoint).name}"
        upload_folder(repo_id=repo_id, folder_path=output_dir, commit_message=message)


def check_output_dir(output_dir: Path, checkpoint: str, config: str | None, tokenizer: str | None) -> None:
    """Raise a `ValueError` if the output would be mixed with other files than those of an earlier conversion."""
    sources = [Path(path).resolve().parent for path in (checkpoint, config) if path is not None]
    if tokenizer is not None:
        sources.append(Path(tokenizer).resolve())
    if output_dir.resolve() in sources:
        raise ValueError(f"`output_dir` must be another folder than {output_dir}, where files would be lost.")
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"`output_dir` must be a folder to write to, but {existing} is none, got {output_dir}.")
    files = {path.name for path in output_dir.iterdir()} - {PARTIAL_RESULT} if output_dir.is_dir() else set()
    card = (output_dir / "README.md").read_text("utf-8") if "README.md" in files else ""
    same = f"in `{Path(checkpoint).name}`, converted by hf-ifsq" in card
    if files and not (same and ("model_index.json" in files) == (tokenizer is not None)):
        raise ValueError(
            f"`output_dir` must be a new or an empty folder, or that of an earlier conversion of the same, but "
            f"{output_dir} has {sorted(files)[:5]}."
        )


def name_alignments(conversion: Conversion) -> dict[str, RepresentationAlignment]:
    """The projectors of REPA by the files that they are saved in, numbered where there are several."""
    names = ["repa_projectors.safetensors"]
    if len(conversion.alignments) > 1:
        names = [f"repa_projectors_{index}.safetensors" for index in range(len(conversion.alignments))]
    return dict(zip(names, conversion.alignments))


def make_model_card(
    args: ConversionArguments,
    conversion: Conversion,
    result: ModelMixin | PreTrainedModel | DiffusionPipeline,
    name: str,
) -> str:
    result_class = type(result)
    library = result_class.__module__.split(".")[0]
    metadata = ModelCardData(library_name=library.replace("_", "-"), tags=["hf-ifsq"])
    usage = f"from {library} import {result_class.__name__}\n\n"
    tokenizer = facts = ""
    if isinstance(result, DiffusionPipeline):
        metadata.pipeline_tag = "unconditional-image-generation"
        # The name of a local folder means nothing elsewhere.
        tokenizer_name = Path(args.tokenizer).name if Path(args.tokenizer).is_dir() else args.tokenizer
        tokenizer = f" with the tokenizer `{tokenizer_name}`"
        config = result.transformer.config
        options = ", guidance_scale=2.0" if config.class_dropout_prob > 0 else ""
        label = "golden retriever" if config.num_classes == 1000 else 0
        usage += f'pipe = {result_class.__name__}.from_pretrained("{name}")\n'
        usage += f"image = pipe({json.dumps(label)}{options}).images[0]"
        size = result.tokenizer.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        names = " or by the names in `pipe.labels`" if config.num_classes == 1000 else ""
        facts = (
            f"\nImages have {height} x {width} pixels. Classes are given by ids in [0, {config.num_classes}){names}.\n"
        )
    else:
        usage += f'model = {result_class.__name__}.from_pretrained("{name}")'
    return MODEL_CARD.format(
        metadata=metadata.to_yaml(),
        title=Path(name).name,
        format_name=conversion.format_name,
        entry="" if conversion.entry is None else f" under `{conversion.entry}`",
        checkpoint=Path(args.checkpoint).name,
        class_name=result_class.__name__,
        tokenizer=tokenizer,
        usage=usage,
        facts=facts,
        alignment=describe_alignments(conversion),
    )


def describe_alignments(conversion: Conversion) -> str:
    lines = []
    for file, alignment in name_alignments(conversion).items():
        first, last = alignment.projector[0], alignment.projector[-1]
        sizes = f"{first.in_features}, {last.out_features}, projector_dim={first.out_features}"
        lines.append(f"alignment = RepresentationAlignment({sizes})")
        lines.append(f'alignment.load_state_dict(load_file("{file}"))')
    return ALIGNMENT.format(usage="\n".join(lines)) if lines else ""


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(ConversionArguments, allow_abbrev=False).parse_args_into_dataclasses()
    main(arguments)
