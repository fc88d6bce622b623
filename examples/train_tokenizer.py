"""
Train an image tokenizer: iFSQ, or one of its baselines with the same encoder, decoder, losses and data.

    accelerate launch examples/train_tokenizer.py --config examples/recipes/ifsq_f16_d4_4bit.yaml \\
        --dataset_name DATASET --output_dir outputs/tokenizer

The output is a folder for `from_pretrained` of `AutoencoderIFSQ`, `VQModel` or `AutoencoderKL`. Arguments: `--help`.
"""

from dataclasses import asdict, dataclass

import torch
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend
from diffusers.image_processor import VaeImageProcessor
from torch.utils.data import DataLoader

from hf_ifsq import AutoencoderIFSQ
from hf_ifsq.metrics.codebook import CodebookUsage
from hf_ifsq.metrics.images import peak_signal_noise_ratio
from hf_ifsq.models.image_tokenizer import ImageTokenizer, as_image_tokenizer
from hf_ifsq.models.quantization import BOUNDS
from hf_ifsq.randomness import generators_at
from hf_ifsq.training import adversarial
from hf_ifsq.training.arguments import TrainingArguments, argument, parse_args, values_for
from hf_ifsq.training.data import ImageDataset, ImageTransform, load_image_dataset
from hf_ifsq.training.model_card import make_model_card
from hf_ifsq.training.optimization import make_optimizer
from hf_ifsq.training.run import TrainingRun
from hf_ifsq.training.tokenizer import (
    BOTTLENECK_WEIGHTS,
    BOTTLENECKS,
    TokenizerLosses,
    check_options,
    make_tokenizer,
)
from hf_ifsq.vision.lpips import LPIPS


logger = get_logger(__name__)


@dataclass
class TokenizerTrainingArguments(TrainingArguments):
    """Arguments of this script beside those that all training scripts share."""

    output_dir: str = argument("outputs/tokenizer", "Folder of the result.")
    adam_beta2: float = argument(0.999, "Decay of AdamW's mean of squared gradients.")
    bottleneck: str | None = argument(
        None,
        "`ifsq`, the default, or `fsq`: AutoencoderIFSQ, `vq`: VQModel, `kl`: AutoencoderKL.",
        choices=list(BOTTLENECKS),
    )
    channels: int | None = argument(None, "1 for grey images, 3, the default, for RGB.")
    block_out_channels: list[int] | None = argument(
        None, "Widths, all but the last of which halve the resolution; by default 128 128 256 512 512."
    )
    layers_per_block: int | None = argument(None, "Residual blocks at each resolution; by default 2.")
    levels: list[int] | None = argument(
        None, "Levels of each channel of `ifsq` and `fsq`; by default 17 in each of 4."
    )
    alpha: float | None = argument(None, "Slope of the bound of `ifsq`; by default 1.6.")
    bound: str | None = argument(
        None, "Bound of `ifsq`; `normal` is the normal distribution function.", choices=[*BOUNDS]
    )
    equal_bins: bool = argument(False, "Quantize `ifsq` by bins of equal width in place of rounding.")
    noise_prob: float | None = argument(
        None, "Share of the values of `ifsq` that get noise within their bin in training; by default none."
    )
    latent_channels: int | None = argument(None, "Channels of the codes of `vq` and `kl`; by default 4.")
    codebook_size: int | None = argument(None, "Entries of the codebook of `vq`; by default 16,384.")
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

    POSITIVE = (
        *TrainingArguments.POSITIVE,
        *("layers_per_block", "latent_channels", "codebook_size", "discriminator_layers", "num_validation_images"),
    )
    NOT_NEGATIVE = (
        *TrainingArguments.NOT_NEGATIVE,
        *("perceptual_weight", "discriminator_weight", "discriminator_start_step", "bottleneck_weight"),
    )
    ARCHITECTURE = (
        *("bottleneck", "channels", "block_out_channels", "layers_per_block", "levels", "alpha", "bound"),
        *("equal_bins", "latent_channels", "codebook_size"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = {name for of_bottleneck in BOTTLENECKS.values() for name in of_bottleneck}
        if self.pretrained_model_name_or_path is None:
            check_options(self.bottleneck or "ifsq", self.given(names))
        if self.bottleneck == "vq" and self.gradient_checkpointing:
            raise ValueError("`gradient_checkpointing` must be off with the bottleneck `vq`: VQModel has none.")


def main(args: TokenizerTrainingArguments) -> dict[str, float]:
    run = TrainingRun(**values_for(TrainingRun, args), arguments=asdict(args))
    accelerator = run.accelerator

    # 1. Model.
    options = args.given([*args.ARCHITECTURE, "noise_prob"])
    pretrained = args.pretrained("tokenizer", *BOTTLENECK_WEIGHTS)
    if pretrained is None:
        model = make_tokenizer(sample_size=args.resolution, **options)
    else:
        model = pretrained.load_tokenizer(sample_size=args.resolution, **options)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    tokenizer = view = as_image_tokenizer(model)

    plugin = accelerator.state.dynamo_plugin
    if plugin.use_regional_compilation and plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "`ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION` must be off: a tokenizer has no blocks that are repeated."
        )

    # 2. Data.
    train_rows, validation_rows = load_image_dataset(**values_for(load_image_dataset, args) | {"label_column": None})
    transform = ImageTransform(**values_for(ImageTransform, args) | {"channels": tokenizer.in_channels})
    train_data = ImageDataset(train_rows, transform, args.image_column)
    train_loader = run.dataloader(train_data)
    # Without a validation split the pictures show training images, and no metric is reported.
    shown_data, validation_loader = train_data, None
    if validation_rows is not None:
        shown_data = ImageDataset(validation_rows, transform, args.image_column)
        validation_loader = run.evaluation_dataloader(shown_data)

    # 3. Losses.
    lpips = LPIPS(args.perceptual_vgg).to(accelerator.device) if args.perceptual_weight > 0 else None
    weights = {"perceptual": args.perceptual_weight, "adversarial": args.discriminator_weight}
    weights["bottleneck"] = BOTTLENECK_WEIGHTS[type(model)]
    if args.bottleneck_weight is not None:
        if isinstance(model, AutoencoderIFSQ):
            raise ValueError("`bottleneck_weight` is for the bottlenecks 'vq' and 'kl': that of iFSQ has no loss.")
        weights["bottleneck"] = args.bottleneck_weight
    losses = TokenizerLosses(args.reconstruction_loss, lpips, weights)
    start = run.num_steps if args.discriminator_start_step is None else args.discriminator_start_step
    discriminator_steps = range(start, run.num_steps, 2)

    # 4. Optimizers. Tokenizer and discriminator take turns, and the schedule of each counts its own steps.
    optimization = {"num_processes": accelerator.num_processes, **values_for(make_optimizer, args)}
    num_tokenizer_steps = run.num_steps - len(discriminator_steps)
    optimizer, lr_scheduler = make_optimizer(tokenizer.parameters(), num_tokenizer_steps, **optimization)
    adversary = []
    if args.discriminator_start_step is not None:
        discriminator = adversarial.PatchDiscriminator(tokenizer.in_channels, num_layers=args.discriminator_layers)
        # A run may end before its first step, for another to go on with it.
        num_steps = max(1, len(discriminator_steps))
        adversary = [discriminator, *make_optimizer(discriminator.parameters(), num_steps, **optimization)]
    tokenizer, optimizer, lr_scheduler, train_loader, *adversary = run.prepare(
        tokenizer, optimizer, lr_scheduler, train_loader, *adversary, saved=model
    )
    players = {"tokenizer": (tokenizer, optimizer, lr_scheduler), "discriminator": tuple(adversary)}
    last_layer = model.decoder.conv_out
    validation = (run, shown_data, validation_loader, args.num_validation_images)
    if adversary:
        adversarial.remember_input(last_layer)

    # 5. Training.
    model.train()
    if run.validation_due:
        validate(*validation)
    for batch in train_loader:
        turn = "discriminator" if run.global_step in discriminator_steps else "tokenizer"
        player, optimizer, lr_scheduler = players[turn]
        with accelerator.accumulate(player):
            pixel_values = batch["pixel_values"]
            # Drawn for each image, so that several processes train like one.
            noise = view.draw_noise(generators_at(args.seed, batch["position"]))
            if turn == "tokenizer":
                discriminator = accelerator.unwrap_model(adversary[0]) if run.global_step > start else None
                outputs = tokenizer(pixel_values, noise)
                loss, terms = losses(*outputs, pixel_values, discriminator, last_layer, accelerator)
                run.record(loss=loss, **terms)
            else:
                with torch.no_grad():
                    sample = accelerator.unwrap_model(tokenizer)(pixel_values, noise)[0]
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
                validate(*validation)

    # 6. Result. The model is on disk before anything else can fail.
    run.save(run.saved_model)
    with run.after_training():
        metrics = validate(*validation)
        run.saved_model.register_to_config(scaling_factor=1 / measure_std(run, train_data))
        run.save(run.saved_model)
        name, library = type(model).__name__, "hf_ifsq" if isinstance(model, AutoencoderIFSQ) else "diffusers"
        card = make_model_card(
            title=f"Image tokenizer, {args.bottleneck or name}",
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
    codes = []
    for batch in loader:
        generators = generators_at(run.seed, batch["position"])
        codes.append(gather(tokenizer.encode_codes(batch["pixel_values"], generators)).cpu())
    std = torch.cat(codes).double().std(correction=0).item()
    if std == 0:
        raise ValueError(
            "All codes of the training images are equal: there is no `scaling_factor` to measure, and nothing to "
            "generate. Train for longer, at another `learning_rate`, or with fewer `levels`."
        )
    return std


if __name__ == "__main__":
    main(parse_args(TokenizerTrainingArguments))
