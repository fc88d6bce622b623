"""
Tokenize images once, to train both generators on their tokens.

    accelerate launch examples/tokenize_dataset.py --dataset_name DATASET --tokenizer outputs/tokenizer \\
        --output_dir outputs/tokens

The output is a folder for `--token_dataset` of `train_repa_ar.py` and `train_repa_dit.py`, and for
`datasets.load_dataset`. The same command goes on with a run that was stopped. All arguments: `--help`.
"""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Value
from huggingface_hub import create_repo, upload_folder
from token_dataset_writer import ShardBatches, TokenDatasetWriter, fingerprint_images
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import hf_ifsq
from hf_ifsq.models.image_tokenizer import load_image_tokenizer
from hf_ifsq.training.arguments import ABOUT_IMAGES, DataArguments, argument, parse_args, values_for
from hf_ifsq.training.data import NONE, ImageDataset, load_image_dataset, read_class_names
from hf_ifsq.training.image_transform import ImageTransform
from hf_ifsq.training.model_card import without_local_paths
from hf_ifsq.training.output_folder import LOCK_FILE
from hf_ifsq.training.tokens import TokenDatasetInfo, fingerprint, hash_weights, remember_tokenizer
from hf_ifsq.vision.vision_model import Teacher


IMAGE_SETTINGS = ("dataset_name", "train_data_dir", *ABOUT_IMAGES, "max_train_samples", "num_augmentations", "seed")


@dataclass
class TokenizationArguments(DataArguments):
    """Arguments of this script beside those about images."""

    output_dir: str = argument("outputs/tokens", "Folder of the token dataset.")
    tokenizer: str = argument("outputs/tokenizer", "Tokenizer: a folder or a Hub name.")
    num_augmentations: int = argument(
        0, "Random crops and flips of each training image; 0 for its plain middle square alone."
    )
    teacher: str | None = argument(None, "Vision model whose features are stored in float16: a folder or Hub name.")
    batch_size: int = argument(64, "Images per device and forward pass.")
    images_per_shard: int = argument(20_000, "Rows of a file.")
    hub_dataset_id: str | None = argument(None, "Dataset repository on the Hub; by default the name of `output_dir`.")

    POSITIVE = (*DataArguments.POSITIVE, "batch_size", "images_per_shard")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_augmentations < 0:
            raise ValueError(f"`num_augmentations` must be at least 0, got {self.num_augmentations}.")
        if self.num_augmentations == 0 and (self.random_flip or self.min_crop_scale < 1):
            raise ValueError(
                "`random_flip` and `min_crop_scale` are about random crops, but `num_augmentations` is 0, which takes "
                "each image as it is: give the number of crops of each image."
            )


@torch.no_grad()
def main(args: TokenizationArguments) -> None:
    accelerator = Accelerator(mixed_precision="no")
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)

    # 1. Models, in float32: a rounded latent is another token.
    tokenizer = load_image_tokenizer(args.tokenizer, sample_size=args.resolution).to(accelerator.device)
    tokenizer.require_codebook()
    teacher, teacher_facts = None, None
    if args.teacher is not None:
        teacher = Teacher(args.teacher, tokenizer.grid_size).to(accelerator.device)
        teacher_facts = {"name_or_path": without_local_paths(args.teacher), "hidden_size": teacher.hidden_size}
        teacher_facts["weights_sha256"] = hash_weights(teacher)

    # 2. Images and labels.
    train_images, validation_images = load_image_dataset(**values_for(load_image_dataset, args))
    splits = {"train": train_images} | ({} if validation_images is None else {"validation": validation_images})
    label_feature = find_label_feature(train_images, validation_images, args.label_column)
    label_column = None if label_feature is None else args.label_column
    transform = ImageTransform(channels=tokenizer.in_channels, **values_for(ImageTransform, args))
    data = {name: ImageDataset(images, transform, args.image_column, label_column) for name, images in splits.items()}
    # Validation images are taken as they are.
    num_augmentations = {"train": args.num_augmentations, "validation": 0}

    # 3. The folder, which may have shards of an earlier run already. The main process compares them.
    hashes = {}
    if accelerator.is_main_process:
        hashes = {f"{name}_sha256": fingerprint_images(images) for name, images in data.items()}
    info = TokenDatasetInfo(
        tokenizer={
            "name_or_path": without_local_paths(args.tokenizer),
            "revision": type(tokenizer.model).load_config(args.tokenizer, return_commit_hash=True)[1],
            **fingerprint(tokenizer),
        },
        scaling_factor=tokenizer.scaling_factor,
        resolution=args.resolution,
        teacher=teacher_facts,
        num_rows={name: len(images) * max(1, num_augmentations[name]) for name, images in splits.items()},
        images={name: without_local_paths(getattr(args, name)) for name in IMAGE_SETTINGS} | hashes,
        shards={name: getattr(args, name) for name in ("batch_size", "images_per_shard")},
        hf_ifsq_version=hf_ifsq.__version__,
    )
    writer = TokenDatasetWriter(args.output_dir, info, label_feature)
    if accelerator.is_main_process:
        writer.begin()
        remember_tokenizer(args.output_dir, args.tokenizer)
    accelerator.wait_for_everyone()

    # 4. Tokens. Each process makes its own share of the shards, as far as they are missing.
    missing = {split: [shard for shard in writer.shards(split) if not shard.path.exists()] for split in splits}
    # All processes see the same shards missing before any of them writes one.
    accelerator.wait_for_everyone()
    for split in splits:
        shards = missing[split][accelerator.process_index :: accelerator.num_processes]
        batches = ShardBatches(shards, args.batch_size, num_augmentations[split])
        loader = iter(DataLoader(data[split], batch_sampler=batches, num_workers=args.dataloader_num_workers))
        for shard in tqdm(shards, desc=f"Shards of {split}", disable=not accelerator.is_local_main_process):
            with writer.open(shard) as add_rows:
                for batch in itertools.islice(loader, batches.count(shard)):
                    pixel_values = batch["pixel_values"].to(accelerator.device)
                    columns = {"indices": tokenizer.encode_indices(pixel_values).flatten(1)}
                    if label_feature is not None:
                        columns["label"] = batch["class_labels"]
                    if teacher is not None:
                        columns["teacher_features"] = teacher(pixel_values)
                    add_rows(**columns)
    accelerator.wait_for_everyone()

    # 5. Result.
    if accelerator.is_main_process:
        writer.finish(title=f"Tokens of {without_local_paths(args.data_name)}")
        if args.push_to_hub:
            name = args.hub_dataset_id or Path(args.output_dir).resolve().name
            repo = create_repo(name, repo_type="dataset", private=args.hub_private_repo, exist_ok=True)
            options = {"folder_path": args.output_dir, "ignore_patterns": [LOCK_FILE]}
            upload_folder(repo_id=repo.repo_id, repo_type="dataset", **options)
    accelerator.end_training()


def find_label_feature(train: Dataset, validation: Dataset | None, label_column: str) -> ClassLabel | Value | None:
    """Type of the labels, with names where they are known; `None` if there are none and no column was named."""
    if label_column == NONE or label_column == "label" and "label" not in train.column_names:
        return None
    read_class_names(train, label_column, validation)
    feature = train.features[label_column]
    return feature if isinstance(feature, ClassLabel) else Value("int64")


if __name__ == "__main__":
    main(parse_args(TokenizationArguments))
