"""
Convert an official checkpoint of iFSQ or LlamaGen.

    python examples/convert_checkpoint.py --checkpoint vq_ds16_c2i.pt --output_dir outputs/llamagen-vq-16

The output is a folder for `from_pretrained` of the class that its `README.md` names. All arguments: `--help`.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData, create_repo, upload_folder
from transformers import HfArgumentParser

from hf_ifsq.conversion import Conversion, convert_checkpoint
from hf_ifsq.training.arguments import argument


MODEL_CARD = """---
{metadata}
---

# {title}

The weights of {format_name}{entry} in `{checkpoint}`, converted by hf-ifsq to {class_name}.

```python
from {library} import {class_name}

model = {class_name}.from_pretrained("{name}")
```
"""


@dataclass
class ConversionArguments:
    """Arguments of this script."""

    checkpoint: str = field(metadata={"help": "Official file, or its weights alone as safetensors."})
    output_dir: str = field(metadata={"help": "Folder of the result."})
    config: str | None = argument(
        None, "Config of an iFSQ tokenizer; by default `config.json` or `run.json` beside the file."
    )
    weights: str | None = argument(
        None, "`ema` or `raw`; by default `ema`, or the only weights in a LlamaGen file.", choices=["ema", "raw"]
    )
    push_to_hub: bool = argument(False, "Push the result to the Hub.")
    hub_model_id: str | None = argument(None, "Repository on the Hub; by default the name of `output_dir`.")
    hub_private_repo: bool = argument(False, "Make the repository private if it is new.")


def main(args: ConversionArguments) -> None:
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    output_dir = Path(args.output_dir)
    sources = [Path(path).resolve().parent for path in (args.checkpoint, args.config) if path is not None]
    if output_dir.resolve() in sources:
        raise ValueError(f"`output_dir` must be another folder than {output_dir}, where official files would be lost.")
    conversion = convert_checkpoint(args.checkpoint, args.config, args.weights)
    repo_id = None
    if args.push_to_hub:
        name = args.hub_model_id or output_dir.resolve().name
        repo_id = create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    conversion.model.save_pretrained(output_dir)
    (output_dir / "README.md").write_text(make_model_card(args, conversion, repo_id or args.output_dir), "utf-8")
    logging.getLogger(__name__).info(f"Wrote {type(conversion.model).__name__} to {output_dir}.")
    if repo_id is not None:
        message = f"Conversion of {Path(args.checkpoint).name}"
        upload_folder(repo_id=repo_id, folder_path=output_dir, commit_message=message)


def make_model_card(args: ConversionArguments, conversion: Conversion, name: str) -> str:
    model_class = type(conversion.model)
    library = model_class.__module__.split(".")[0]
    metadata = ModelCardData(library_name=library.replace("_", "-"), tags=["hf-ifsq"])
    return MODEL_CARD.format(
        metadata=metadata.to_yaml(),
        title=Path(name).name,
        format_name=conversion.format_name,
        entry="" if conversion.entry is None else f" under `{conversion.entry}`",
        checkpoint=Path(args.checkpoint).name,
        class_name=model_class.__name__,
        library=library,
        name=name,
    )


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(ConversionArguments, allow_abbrev=False).parse_args_into_dataclasses()
    main(arguments)
