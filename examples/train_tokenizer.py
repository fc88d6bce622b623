"""
Train an image tokenizer: iFSQ, or one of its baselines with the same encoder, decoder, losses and data.

    accelerate launch examples/train_tokenizer.py --config examples/recipes/ifsq_f16_d4_4bit.yaml \\
        --dataset_name DATASET --output_dir outputs/tokenizer

The output is a folder for `from_pretrained` of `AutoencoderIFSQ`, `VQModel` or `AutoencoderKL`. Arguments: `--help`.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, ModelMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.metrics.codebook import CodebookUsage
from hf_ifsq.metrics.images import peak_signal_noise_ratio
from hf_ifsq.models.image_tokenizer import ImageTokenizer, as_image_tokenizer
from hf_ifsq.models.quantization import BOUNDS
from hf_ifsq.training import adversarial
from hf_ifsq.training.arguments import TrainingArguments, argument, parse_args, values_for
from hf_ifsq.training.data import ImageDataset, ImageTransform, load_image_dataset
from hf_ifsq.training.model_card import make_model_card
from hf_ifsq.training.optimization import make_optimizer
from hf_ifsq.training.run import TrainingRun
from hf_ifsq.vision.lpips import LPIPS


logger = get_logger(__name__)

# Slope of the bound and weight of the bottleneck's own loss, where the arguments do not say.
ALPHAS = {"ifsq": 1.6, "fsq": 2.0}
BOTTLENECK_WEIGHTS = {"vq": 1.0, "kl": 1e-6}


@dataclass
class TokenizerTrainingArguments(TrainingArguments):
    """Arguments of this script beside those that all training scripts share."""

    output_dir: str = argument("outputs/tokenizer", "Folder of the result.")
    adam_beta2: float = argument(0.999, "Decay of AdamW's mean of squared gradients.")
    bottleneck: str = argument(
        "ifsq",
        "`ifsq` or `fsq`: AutoencoderIFSQ, `vq`: VQModel, `kl`: AutoencoderKL.",
        choices=[*ALPHAS, *BOTTLENECK_WEIGHTS],
    )
    channels: int = argument(3, "1 for grey images, 3 for RGB.")
    block_out_channels: list[int] = argument(
        [128, 128, 256, 512, 512], "Widths; all but the last halve the resolution."
    )
    layers_per_block: int = argument(2, "Residual blocks at each resolution.")
    levels: list[int] = argument([17, 17, 17, 17], "Levels of each channel of `ifsq` and `fsq`.")
    alpha: float | None = argument(None, "Slope of the bound of `ifsq`; by default 1.6.")
    bound: str = argument(
        "sigmoid", "Bound of `ifsq`; `normal` is the normal distribution function.", choices=[*BOUNDS]
    )
    equal_bins: bool = argument(False, "Quantize `ifsq` by bins of equal width in place of rounding.")
    noise_prob: float = argument(0.0, "Share of the values of `ifsq` that get noise within their bin in training.")
    latent_channels: int = argument(4, "Channels of the codes of `vq` and `kl`.")
    codebook_size: int = argument(16384, "Entries of the codebook of `vq`.")
    bottleneck_weight: float | None = argument(None, "Weight of the loss of `vq` (by default 1) and `kl` (1e-6).")
    reconstruction_loss: str = argument("l1", "Distance of pixels: `l1` or `l2`.", choices=["l1", "l2"])
    perceptual_weight: float = argument(1.0, "Weight of LPIPS; 0 trains without.")
    perceptual_vgg: str = argument(
        "timm/vgg16.tv_in1k", "VGG16 for LPIPS: a Hub name, a folder or a safetensors file."
    )
    discriminator_start_step: int | None = argument(None, "First step of the discriminator; without it there is none.")
    discriminator_weight: float = argument(0.5, "Weight of the adversarial loss, times the adaptive weight.")
    discriminator_layers: int = argument(4, "Halvings of the resolution in the discriminator; fewer for small images.")
    num_validation_images: int = argument(16, "Images in the picture of a validation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("perceptual_weight", "discriminator_weight", "discriminator_start_step"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        for name in ("alpha", "bound", "equal_bins", "noise_prob"):
            value = getattr(self, name)
            if self.bottleneck != "ifsq" and value != getattr(type(self), name):
                raise ValueError(
                    f"`{name}` can be chosen for the bottleneck 'ifsq' alone, got {value} with {self.bottleneck!r}."
                )
        if self.bottleneck == "vq" and self.gradient_checkpointing:
            raise ValueError("`gradient_checkpointing` must be off with the bottleneck `vq`: VQModel has none.")


def main(args: TokenizerTrainingArguments) -> dict[str, float]:
    run = TrainingRun(**values_for(TrainingRun, args), arguments=asdict(args))
    accelerator = run.accelerator

    # 1. Data.
    train_rows, validation_rows = load_image_dataset(**values_for(load_image_dataset, args) | {"label_column": None})
    transform = ImageTransform(**values_for(ImageTransform, args))
    train_data = ImageDataset(train_rows, transform, args.image_column)
    train_loader = run.dataloader(train_data)
    # Without a validation split the pictures show training images, and no metric is reported.
    shown_data, validation_loader = train_data, None
    if validation_rows is not None:
        shown_data = ImageDataset(validation_rows, transform, args.image_column)
        validation_loader = run.evaluation_dataloader(shown_data)

    # 2. Models and losses.
    sizes = {
        "in_channels": args.channels,
        "out_channels": args.channels,
        "block_out_channels": tuple(args.block_out_channels),
        "layers_per_block": args.layers_per_block,
        "sample_size": args.resolution,
        "scaling_factor": 1.0,
    }
    if args.bottleneck in ALPHAS:
        alpha = ALPHAS[args.bottleneck] if args.alpha is None else args.alpha
        quantizer = {"alpha": alpha, "bound": args.bound, "equal_bins": args.equal_bins, "noise_prob": args.noise_prob}
        model = AutoencoderIFSQ(**sizes, levels=tuple(args.levels), **quantizer)
    else:
        model = make_baseline(args.bottleneck, args.latent_channels, args.codebook_size, sizes)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    tokenizer = as_image_tokenizer(model)
    lpips = LPIPS(args.perceptual_vgg).to(accelerator.device) if args.perceptual_weight > 0 else None
    weight = BOTTLENECK_WEIGHTS.get(args.bottleneck, 0.0) if args.bottleneck_weight is None else args.bottleneck_weight
    weights = {"perceptual": args.perceptual_weight, "bottleneck": weight, "adversarial": args.discriminator_weight}
    losses = TokenizerLosses(args.reconstruction_loss, lpips, weights)
    start = run.num_steps if args.discriminator_start_step is None else args.discriminator_start_step
    discriminator_steps = range(start, run.num_steps, 2)

    # 3. Optimizers. Tokenizer and discriminator take turns, and the schedule of each counts its own steps.
    optimization = {"num_processes": accelerator.num_processes, **values_for(make_optimizer, args)}
    num_tokenizer_steps = run.num_steps - len(discriminator_steps)
    optimizer, lr_scheduler = make_optimizer(tokenizer.parameters(), num_tokenizer_steps, **optimization)
    adversary = []
    if args.discriminator_start_step is not None:
        discriminator = adversarial.PatchDiscriminator(args.channels, num_layers=args.discriminator_layers)
        # A run may end before its first step, for another to go on with it.
        num_steps = max(1, len(discriminator_steps))
        adversary = [discriminator, *make_optimizer(discriminator.parameters(), num_steps, **optimization)]
    tokenizer, optimizer, lr_scheduler, train_loader, *adversary = run.prepare(
        tokenizer, optimizer, lr_scheduler, train_loader, *adversary, saved=model
    )
    players = {"tokenizer": (tokenizer, optimizer, lr_scheduler), "discriminator": tuple(adversary)}
    last_layer = model.decoder.conv_out
    if adversary:
        adversarial.remember_input(last_layer)

    # 4. Training.
    model.train()
    metrics = None
    for batch in train_loader:
        turn = "discriminator" if run.global_step in discriminator_steps else "tokenizer"
        player, optimizer, lr_scheduler = players[turn]
        with accelerator.accumulate(player):
            pixel_values = batch["pixel_values"]
            if turn == "tokenizer":
                discriminator = accelerator.unwrap_model(adversary[0]) if run.global_step > start else None
                loss, terms = losses(*tokenizer(pixel_values), pixel_values, discriminator, last_layer, accelerator)
                run.record(loss=loss, **terms)
            else:
                with torch.no_grad():
                    sample = accelerator.unwrap_model(tokenizer)(pixel_values)[0]
                scores = player(torch.cat([pixel_values, sample.float()]))
                loss = adversarial.hinge_loss(*scores.chunk(2))
                run.record(discriminator_loss=loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(player.parameters(), args.max_grad_norm)
            learning_rate = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.end_step(learning_rate, model_changed=turn == "tokenizer")
            if run.validation_due:
                metrics = validate(run, shown_data, validation_loader, args.num_validation_images)

    # 5. Result. A finished run that is resumed has not validated.
    if metrics is None:
        metrics = validate(run, shown_data, validation_loader, args.num_validation_images)
    std = measure_std(run, train_data)
    run.saved_model.register_to_config(scaling_factor=1 / std)
    if accelerator.is_main_process:
        run.saved_model.save_pretrained(args.output_dir)
    view = as_image_tokenizer(run.saved_model)
    name, library = type(model).__name__, "hf_ifsq" if isinstance(model, AutoencoderIFSQ) else "diffusers"
    card = make_model_card(
        title=f"Image tokenizer, {args.bottleneck}",
        description=f"Each square of {view.downsampling_factor} pixels a side becomes a code of "
        f"{view.latent_channels} channels{f', one of {view.codebook_size}' if view.codebook_size else ''}.",
        usage=f'from {library} import {name}\n\ntokenizer = {name}.from_pretrained("{run.model_name}")',
        facts=args.facts(args.resolution, model.num_parameters()) | run.facts(),
        metrics=metrics,
        arguments=asdict(args),
        pipeline_tag="image-feature-extraction",
    )
    run.finish(card)
    return metrics


def make_baseline(bottleneck: str, latent_channels: int, codebook_size: int, sizes: dict[str, Any]) -> ModelMixin:
    """A tokenizer of diffusers with the encoder and decoder of AutoencoderIFSQ and another bottleneck."""
    depth = len(sizes["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * depth, "up_block_types": ("UpDecoderBlock2D",) * depth}
    blocks |= {"mid_block_add_attention": False, "latent_channels": latent_channels}
    if bottleneck == "vq":
        return VQModel(**sizes, **blocks, num_vq_embeddings=codebook_size)
    return AutoencoderKL(**sizes, **blocks)


class TokenizerLosses(nn.Module):
    """The losses of the tokenizer, weighted and added: pixels, LPIPS, the bottleneck's own, the discriminator's."""

    def __init__(self, distance: str, lpips: LPIPS | None, weights: dict[str, float]):
        super().__init__()
        self.distance = {"l1": F.l1_loss, "l2": F.mse_loss}[distance]
        self.lpips = lpips
        self.weights = weights

    def forward(
        self,
        sample: torch.Tensor,
        bottleneck_loss: torch.Tensor,
        pixel_values: torch.Tensor,
        discriminator: nn.Module | None,
        last_layer: nn.Conv2d,
        accelerator: Accelerator,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum, and its terms for the log; with a discriminator also the adversarial loss of its turn."""
        sample = sample.float()
        loss = self.distance(sample, pixel_values)
        terms = {"reconstruction_loss": loss}
        if self.lpips is not None:
            terms["perceptual_loss"] = self.lpips(sample, pixel_values).mean()
            loss = loss + self.weights["perceptual"] * terms["perceptual_loss"]
        if discriminator is not None:
            terms["adversarial_loss"], terms["adaptive_weight"] = adversarial.adversarial_loss(
                discriminator, sample, loss, last_layer, reduce=lambda gradient: accelerator.reduce(gradient, "mean")
            )
            loss = loss + self.weights["adversarial"] * terms["adaptive_weight"] * terms["adversarial_loss"]
        adversarial.forget_input(last_layer)
        if self.weights["bottleneck"] > 0:
            terms["bottleneck_loss"] = bottleneck_loss
            loss = loss + self.weights["bottleneck"] * bottleneck_loss
        return loss, terms


@torch.no_grad()
def validate(run: TrainingRun, data: ImageDataset, loader: DataLoader | None, num_images: int) -> dict[str, float]:
    """Mean PSNR in dB, share of the codebook that is used, and a picture of originals above their reconstructions."""
    metrics = {}
    tokenizer = as_image_tokenizer(run.saved_model)
    with run.untimed():
        if loader is not None:
            psnrs, usage = [], CodebookUsage(tokenizer.codebook_size) if tokenizer.codebook_size else None
            for batch in loader:
                pixel_values = batch["pixel_values"]
                psnr = peak_signal_noise_ratio(reconstruct(tokenizer, pixel_values).clamp(-1, 1), pixel_values)
                psnrs.append(run.accelerator.gather_for_metrics(psnr))
                if usage is not None:
                    usage.update(run.accelerator.gather_for_metrics(tokenizer.encode_indices(pixel_values)))
            metrics["validation_psnr_db"] = torch.cat(psnrs).mean().item()
            if usage is not None:
                counted = usage.compute()
                metrics["validation_codes_used"] = counted["usage"]
                if counted["num_codes_used"] < usage.num_codes_if_even / 2:
                    logger.warning(
                        f"Most codes are unused: {counted['num_codes_used']} of {usage.codebook_size} occur."
                    )
            run.log(metrics)
        count = min(num_images, len(data))
        originals = torch.stack([data[index]["pixel_values"] for index in range(count)])
        reconstructions = reconstruct(tokenizer, originals.to(run.accelerator.device)).cpu()
        images = VaeImageProcessor().postprocess(torch.cat([originals, reconstructions]), output_type="pil")
        run.log_images("reconstructions", images, columns=count)
    return metrics


def reconstruct(tokenizer: ImageTokenizer, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images decoded from their codes, with those of an AutoencoderKL at their most likely values."""
    return tokenizer.decode_codes(tokenizer.encode_codes(pixel_values)).float()


@torch.no_grad()
def measure_std(run: TrainingRun, data: ImageDataset) -> float:
    """Standard deviation of the codes of the training images, at most 2,000 of them."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.seed))
    loader = run.evaluation_dataloader(torch.utils.data.Subset(data, order[:2000].tolist()))
    tokenizer = as_image_tokenizer(run.saved_model)
    gather = run.accelerator.gather_for_metrics
    codes = [gather(tokenizer.encode_codes(batch["pixel_values"], sample_posterior=True)).cpu() for batch in loader]
    return torch.cat(codes).double().std(correction=0).item()


if __name__ == "__main__":
    main(parse_args(TokenizerTrainingArguments))
