"""
Train an iFSQ image tokenizer.

    accelerate launch examples/train_tokenizer.py --dataset_name DATASET --output_dir outputs/tokenizer

The output is a folder for `AutoencoderIFSQ.from_pretrained`. All arguments: `--help`.
"""

from dataclasses import dataclass, field

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.training.arguments import TrainingArguments, parse_args
from hf_ifsq.training.data import ImageDataset, load_image_dataset
from hf_ifsq.training.model_card import make_model_card
from hf_ifsq.training.run import TrainingRun


@dataclass
class TokenizerTrainingArguments(TrainingArguments):
    """Arguments of this script beside those that all training scripts share."""

    output_dir: str = field(default="outputs/tokenizer", metadata={"help": "Folder of the result."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Decay of AdamW's mean of squared gradients."})
    channels: int = field(default=3, metadata={"help": "1 for grey images, 3 for RGB."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 128, 256, 512, 512],
        metadata={"help": "Widths of the resolutions; all but the last halve the resolution."},
    )
    layers_per_block: int = field(default=2, metadata={"help": "Residual blocks at each resolution."})
    levels: list[int] = field(
        default_factory=lambda: [17, 17, 17, 17], metadata={"help": "Levels of each channel of the codes."}
    )
    alpha: float = field(default=1.6, metadata={"help": "Slope of the bound: 1.6 is iFSQ, 2.0 is FSQ."})
    num_validation_images: int = field(default=16, metadata={"help": "Images in the picture of a validation."})


def main(args: TokenizerTrainingArguments) -> dict[str, float]:
    run = TrainingRun(args)
    accelerator = run.accelerator

    # 1. Data.
    train_images, validation_images = load_image_dataset(args)
    train_data = ImageDataset(train_images, args, args.channels, with_labels=False)
    train_loader = run.dataloader(train_data)
    # Without a validation split the pictures show training images, and no metric is reported.
    shown_images = train_images if validation_images is None else validation_images
    shown_data = ImageDataset(shown_images, args, args.channels, with_labels=False)
    validation_loader = None if validation_images is None else run.evaluation_dataloader(shown_data)

    # 2. Model.
    model = AutoencoderIFSQ(
        in_channels=args.channels,
        out_channels=args.channels,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        levels=tuple(args.levels),
        alpha=args.alpha,
        sample_size=args.resolution,
    )
    num_parameters = model.num_parameters()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()

    # 3. Optimizer.
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=run.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, lr_scheduler, train_loader = run.prepare(model, optimizer, lr_scheduler, train_loader)

    # 4. Training.
    model.train()
    metrics = None
    for batch in train_loader:
        with accelerator.accumulate(model):
            pixel_values = batch["pixel_values"]
            loss = F.l1_loss(model(pixel_values).sample.float(), pixel_values)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            learning_rate = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        run.record(loss=loss)
        if accelerator.sync_gradients:
            run.end_step(learning_rate)
            if run.validation_due:
                metrics = validate(run, shown_data, validation_loader)

    # 5. Result. A finished run that is resumed has not validated.
    if metrics is None:
        metrics = validate(run, shown_data, validation_loader)
    with run.averaged() as model:
        std = measure_std(run, model, train_data)
        model.register_to_config(scaling_factor=1 / std)
        if accelerator.is_main_process:
            model.save_pretrained(args.output_dir)
    run.finish(
        make_model_card(
            run,
            title="iFSQ image tokenizer",
            description=f"An image tokenizer with channels of {args.levels} levels, one code for each square of "
            f"{model.downsampling_factor} pixels a side.",
            usage="from hf_ifsq import AutoencoderIFSQ\n\n"
            f'tokenizer = AutoencoderIFSQ.from_pretrained("{run.model_name}")',
            metrics=metrics,
            num_parameters=num_parameters,
            pipeline_tag="image-feature-extraction",
        )
    )
    return metrics


@torch.no_grad()
def validate(run: TrainingRun, shown_data: ImageDataset, loader: DataLoader | None) -> dict[str, float]:
    """Mean PSNR in dB over the validation images, and a picture of originals above their reconstructions."""
    metrics = {}
    with run.averaged() as model:
        if loader is not None:
            psnrs = []
            for batch in loader:
                pixel_values = batch["pixel_values"]
                difference = model(pixel_values).sample.float().clamp(-1, 1) - pixel_values
                # The range of the images, 2, squared over the mean squared error of each.
                psnr = 10 * torch.log10(4 / difference.square().mean(dim=(1, 2, 3)))
                psnrs.append(run.accelerator.gather_for_metrics(psnr))
            metrics["validation_psnr_db"] = torch.cat(psnrs).mean().item()
            run.log(metrics)
        count = min(run.args.num_validation_images, len(shown_data))
        originals = torch.stack([shown_data[index]["pixel_values"] for index in range(count)])
        reconstructions = model(originals.to(run.accelerator.device)).sample.float().cpu()
        images = VaeImageProcessor().postprocess(torch.cat([originals, reconstructions]), output_type="pil")
        run.log_images("reconstructions", images, columns=count)
    return metrics


@torch.no_grad()
def measure_std(run: TrainingRun, model: AutoencoderIFSQ, data: ImageDataset) -> float:
    """Standard deviation of the codes of the training images, at most 10,000 of them."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.args.seed))
    loader = run.evaluation_dataloader(torch.utils.data.Subset(data, order[:10_000].tolist()))
    moments = []
    for batch in loader:
        codes = model.encode(batch["pixel_values"]).codes.float().flatten(1)
        moments_of_images = torch.stack([codes.mean(dim=1), codes.square().mean(dim=1)], dim=1)
        moments.append(run.accelerator.gather_for_metrics(moments_of_images).cpu())
    mean, mean_of_squares = torch.cat(moments).double().mean(dim=0)
    return (mean_of_squares - mean**2).sqrt().item()


if __name__ == "__main__":
    main(parse_args(TokenizerTrainingArguments))
