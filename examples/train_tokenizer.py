"""
Train an image tokenizer: iFSQ, or one of its baselines with the same encoder, decoder, losses and data.

    accelerate launch examples/train_tokenizer.py --config examples/recipes/ifsq_f16_d4_4bit.yaml \\
        --dataset_name DATASET --output_dir outputs/tokenizer

The output is a folder for `from_pretrained` of `AutoencoderIFSQ`, or of diffusers' `VQModel` or `AutoencoderKL`. All
arguments: `--help`.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.metrics.images import peak_signal_noise_ratio
from hf_ifsq.models.image_tokenizer import BOTTLENECKS, ImageTokenizer, as_image_tokenizer, make_image_tokenizer
from hf_ifsq.training import adversarial
from hf_ifsq.training.arguments import TrainingArguments, argument, parse_args
from hf_ifsq.training.data import ImageDataset, load_image_dataset
from hf_ifsq.training.model_card import make_model_card
from hf_ifsq.training.run import TrainingRun
from hf_ifsq.vision.lpips import LPIPS


# Weight of the bottleneck's own loss where the arguments do not say.
BOTTLENECK_WEIGHT = {VQModel: 1.0, AutoencoderKL: 1e-6}


@dataclass
class TokenizerTrainingArguments(TrainingArguments):
    """Arguments of this script beside those that all training scripts share."""

    output_dir: str = argument("outputs/tokenizer", "Folder of the result.")
    adam_beta2: float = argument(0.999, "Decay of AdamW's mean of squared gradients.")
    bottleneck: str = argument(
        "ifsq", "`ifsq` or `fsq`: AutoencoderIFSQ, `vq`: VQModel, `kl`: AutoencoderKL.", choices=list(BOTTLENECKS)
    )
    channels: int = argument(3, "1 for grey images, 3 for RGB.")
    block_out_channels: list[int] = argument(
        [128, 128, 256, 512, 512], "Widths of the resolutions; all but the last halve the resolution."
    )
    layers_per_block: int = argument(2, "Residual blocks at each resolution.")
    levels: list[int] = argument([17, 17, 17, 17], "Levels of each channel of `ifsq` and `fsq`.")
    alpha: float | None = argument(None, "Slope of the bound; by default 1.6 for `ifsq`.")
    latent_channels: int = argument(4, "Channels of the codes of `vq` and `kl`.")
    codebook_size: int = argument(16384, "Entries of the codebook of `vq`.")
    bottleneck_weight: float | None = argument(
        None, "Weight of the commitment (`vq`, by default 1) or the KL divergence (`kl`, 1e-6)."
    )
    reconstruction_loss: str = argument("l1", "Distance of pixels: `l1` or `l2`.", choices=["l1", "l2"])
    perceptual_weight: float = argument(1.0, "Weight of LPIPS; 0 trains without.")
    perceptual_vgg: str = argument(
        "timm/vgg16.tv_in1k", "Weights of VGG16 for LPIPS: a Hub name, a folder or a safetensors file."
    )
    discriminator_start_step: int | None = argument(None, "First step of the discriminator; without it there is none.")
    discriminator_weight: float = argument(0.5, "Weight of the adversarial loss, times the adaptive weight.")
    discriminator_layers: int = argument(4, "Halvings of the resolution in the discriminator; fewer for small images.")
    num_validation_images: int = argument(16, "Images in the picture of a validation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("perceptual_weight", "discriminator_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.bottleneck == "vq" and self.gradient_checkpointing:
            raise ValueError("`gradient_checkpointing` must be off with the bottleneck `vq`: VQModel has none.")
        if self.discriminator_start_step is not None and self.discriminator_start_step < 0:
            raise ValueError(f"`discriminator_start_step` must be at least 0, got {self.discriminator_start_step}.")


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

    # 2. Models.
    model = make_image_tokenizer(
        args.bottleneck,
        channels=args.channels,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        sample_size=args.resolution,
        levels=args.levels,
        alpha=args.alpha,
        latent_channels=args.latent_channels,
        codebook_size=args.codebook_size,
    )
    num_parameters = model.num_parameters()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    tokenizer = as_image_tokenizer(model)
    lpips = LPIPS(args.perceptual_vgg).to(accelerator.device) if args.perceptual_weight > 0 else None
    start = run.max_train_steps if args.discriminator_start_step is None else args.discriminator_start_step
    discriminator_steps = range(start, run.max_train_steps, 2)

    # 3. Optimizers. Generator and discriminator take turns, and the schedule of each counts its own steps.
    optimizer, lr_scheduler = make_optimizer(run, tokenizer, run.max_train_steps - len(discriminator_steps))
    tokenizer, optimizer, lr_scheduler, train_loader, *adversary = run.prepare(
        tokenizer, optimizer, lr_scheduler, train_loader, *make_adversary(run, len(discriminator_steps)), saved=model
    )
    players = {"generator": (tokenizer, optimizer, lr_scheduler), "discriminator": tuple(adversary)}

    # 4. Training.
    model.train()
    metrics = None
    for batch in train_loader:
        turn = "discriminator" if run.global_step in discriminator_steps else "generator"
        player, optimizer, lr_scheduler = players[turn]
        with accelerator.accumulate(player):
            if turn == "generator":
                discriminator = adversary[0] if run.global_step > start else None
                loss = generator_loss(run, tokenizer, model, batch["pixel_values"], lpips, discriminator)
            else:
                loss = discriminator_loss(run, tokenizer, player, batch["pixel_values"])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(player.parameters(), args.max_grad_norm)
            learning_rate = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        run.record(**{"loss" if turn == "generator" else "discriminator_loss": loss})
        if accelerator.sync_gradients:
            run.end_step(learning_rate, model_changed=turn == "generator")
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
    tokenizer = as_image_tokenizer(model)
    library = "hf_ifsq" if isinstance(model, AutoencoderIFSQ) else "diffusers"
    run.finish(
        make_model_card(
            run,
            title=f"Image tokenizer, {args.bottleneck}",
            description=f"Each square of {tokenizer.downsampling_factor} pixels a side becomes a code of "
            f"{tokenizer.latent_channels} channels"
            f"{f', one of {tokenizer.codebook_size}' if tokenizer.codebook_size else ''}.",
            usage=f"from {library} import {type(model).__name__}\n\n"
            f'tokenizer = {type(model).__name__}.from_pretrained("{run.model_name}")',
            metrics=metrics,
            num_parameters=num_parameters,
            pipeline_tag="image-feature-extraction",
        )
    )
    return metrics


def make_optimizer(
    run: TrainingRun, module: nn.Module, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and a learning-rate schedule over `num_steps`."""
    args, num_processes = run.args, run.accelerator.num_processes
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * num_processes,
        num_training_steps=num_steps * num_processes,
    )
    return optimizer, lr_scheduler


def make_adversary(run: TrainingRun, num_steps: int) -> tuple:
    """Discriminator, optimizer and learning-rate schedule, if one is asked for."""
    if run.args.discriminator_start_step is None:
        return ()
    discriminator = adversarial.PatchDiscriminator(run.args.channels, num_layers=run.args.discriminator_layers)
    # A run may end before its first step, for another to go on with it.
    return discriminator, *make_optimizer(run, discriminator, max(1, num_steps))


def generator_loss(
    run: TrainingRun,
    tokenizer: nn.Module,
    model: ModelMixin,
    pixel_values: torch.Tensor,
    lpips: LPIPS | None,
    discriminator: nn.Module | None,
) -> torch.Tensor:
    """Reconstruction, perceptual, bottleneck and adversarial loss of the tokenizer."""
    args, accelerator = run.args, run.accelerator
    sample, bottleneck_loss = tokenizer(pixel_values)
    sample = sample.float()
    distance = F.l1_loss if args.reconstruction_loss == "l1" else F.mse_loss
    reconstruction_loss = distance(sample, pixel_values)
    run.record(reconstruction_loss=reconstruction_loss)
    if lpips is not None:
        perceptual_loss = lpips(sample, pixel_values).mean()
        reconstruction_loss = reconstruction_loss + args.perceptual_weight * perceptual_loss
        run.record(perceptual_loss=perceptual_loss)
    loss = reconstruction_loss
    if type(model) in BOTTLENECK_WEIGHT:
        weight = BOTTLENECK_WEIGHT[type(model)] if args.bottleneck_weight is None else args.bottleneck_weight
        loss = loss + weight * bottleneck_loss
        run.record(bottleneck_loss=bottleneck_loss)
    if discriminator is not None:
        adversarial_loss, weight = adversarial.generator_loss(
            accelerator.unwrap_model(discriminator),
            sample,
            reconstruction_loss,
            last_layer=model.decoder.conv_out.weight,
            reduce=lambda gradient: accelerator.reduce(gradient, "mean"),
        )
        loss = loss + args.discriminator_weight * weight * adversarial_loss
        run.record(adversarial_loss=adversarial_loss, adaptive_weight=weight)
    return loss


def discriminator_loss(
    run: TrainingRun, tokenizer: nn.Module, discriminator: nn.Module, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Hinge loss of the discriminator on images and their reconstructions."""
    with torch.no_grad():
        sample = run.accelerator.unwrap_model(tokenizer)(pixel_values)[0]
    scores = discriminator(torch.cat([pixel_values, sample.float()]))
    return adversarial.hinge_loss(*scores.chunk(2))


@torch.no_grad()
def validate(run: TrainingRun, shown_data: ImageDataset, loader: DataLoader | None) -> dict[str, float]:
    """Mean PSNR in dB over the validation images, and a picture of originals above their reconstructions."""
    metrics = {}
    with run.averaged() as model:
        tokenizer = as_image_tokenizer(model)
        if loader is not None:
            psnrs = []
            for batch in loader:
                pixel_values = batch["pixel_values"]
                reconstructions = reconstruct(tokenizer, pixel_values).clamp(-1, 1)
                psnr = peak_signal_noise_ratio(reconstructions, pixel_values)
                psnrs.append(run.accelerator.gather_for_metrics(psnr))
            metrics["validation_psnr_db"] = torch.cat(psnrs).mean().item()
            run.log(metrics)
        count = min(run.args.num_validation_images, len(shown_data))
        originals = torch.stack([shown_data[index]["pixel_values"] for index in range(count)])
        reconstructions = reconstruct(tokenizer, originals.to(run.accelerator.device)).cpu()
        images = VaeImageProcessor().postprocess(torch.cat([originals, reconstructions]), output_type="pil")
        run.log_images("reconstructions", images, columns=count)
    return metrics


def reconstruct(tokenizer: ImageTokenizer, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images decoded from their codes, with those of an AutoencoderKL at their most likely values."""
    return tokenizer.decode_codes(tokenizer.encode_codes(pixel_values)).float()


@torch.no_grad()
def measure_std(run: TrainingRun, model: ModelMixin, data: ImageDataset) -> float:
    """Standard deviation of the codes of the training images, at most 2,000 of them."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.args.seed))
    loader = run.evaluation_dataloader(torch.utils.data.Subset(data, order[:2000].tolist()))
    tokenizer = as_image_tokenizer(model)
    moments = []
    for batch in loader:
        codes = tokenizer.encode_codes(batch["pixel_values"], sample_posterior=True).float().flatten(1)
        moments_of_images = torch.stack([codes.mean(dim=1), codes.square().mean(dim=1)], dim=1)
        moments.append(run.accelerator.gather_for_metrics(moments_of_images).cpu())
    mean, mean_of_squares = torch.cat(moments).double().mean(dim=0)
    return (mean_of_squares - mean**2).sqrt().item()


if __name__ == "__main__":
    main(parse_args(TokenizerTrainingArguments))
