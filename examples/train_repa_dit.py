"""
Train the diffusion generator on the codes of an image tokenizer, aligned with a vision model if one is given.

    accelerate launch examples/train_repa_dit.py --dataset_name DATASET --tokenizer outputs/tokenizer \\
        --teacher facebook/dinov2-base --output_dir outputs/dit

The output is a folder for `IFSQDiTPipeline.from_pretrained`. All arguments: `--help`.
"""

from dataclasses import dataclass, field

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from hf_ifsq import AutoencoderIFSQ, IFSQDiTPipeline, IFSQDiTTransformer2DModel
from hf_ifsq.training.arguments import TrainingArguments, parse_args
from hf_ifsq.training.data import ImageDataset, check_labels, load_image_dataset, read_class_names
from hf_ifsq.training.losses import velocity_loss
from hf_ifsq.training.model_card import make_model_card
from hf_ifsq.training.repa import RepresentationAlignment, Teacher
from hf_ifsq.training.run import TrainingRun


@dataclass
class DiTTrainingArguments(TrainingArguments):
    """Arguments of this script beside those that all training scripts share."""

    output_dir: str = field(default="outputs/dit", metadata={"help": "Folder of the result."})
    tokenizer: str = field(default="outputs/tokenizer", metadata={"help": "Tokenizer: a folder or a Hub name."})
    patch_size: int = field(default=1, metadata={"help": "Side of the square of codes that makes a token, 1 or 2."})
    num_layers: int = field(default=12, metadata={"help": "Blocks of the model."})
    num_attention_heads: int = field(default=12, metadata={"help": "Attention heads."})
    attention_head_dim: int = field(default=64, metadata={"help": "Channels of a head."})
    class_dropout_prob: float = field(default=0.1, metadata={"help": "Share of labels dropped, for guidance."})
    teacher: str | None = field(default=None, metadata={"help": "Vision model to align with: a folder or Hub name."})
    repa_weight: float = field(default=0.5, metadata={"help": "Weight of the alignment loss."})
    repa_depth: int | None = field(
        default=None, metadata={"help": "Block whose output is aligned; by default at a third of the depth."}
    )
    projector_dim: int = field(default=2048, metadata={"help": "Width of the alignment's projector."})
    num_images_per_label: int = field(default=4, metadata={"help": "Images of each class in a validation picture."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the validation pictures."})
    num_inference_steps: int = field(default=50, metadata={"help": "Euler steps of the validation pictures."})


def main(args: DiTTrainingArguments) -> dict[str, float]:
    run = TrainingRun(args)
    accelerator = run.accelerator

    # 1. Tokenizer, in float32 whatever the precision of training: a rounded latent is another code.
    tokenizer = AutoencoderIFSQ.from_pretrained(args.tokenizer, sample_size=args.resolution).eval()
    tokenizer.requires_grad_(False).to(accelerator.device)

    # 2. Data.
    train_images, validation_images = load_image_dataset(args)
    id2label = read_class_names(train_images, args.label_column)
    train_loader = run.dataloader(ImageDataset(train_images, args, tokenizer.config.in_channels, with_labels=True))
    validation_loader = None
    if validation_images is not None:
        check_labels(validation_images, args.label_column, len(id2label))
        validation_data = ImageDataset(validation_images, args, tokenizer.config.in_channels, with_labels=True)
        validation_loader = run.evaluation_dataloader(validation_data)

    # 3. Model. The pipeline checks that it fits the tokenizer.
    model = IFSQDiTTransformer2DModel(
        sample_size=tokenizer.grid_size,
        patch_size=args.patch_size,
        in_channels=len(tokenizer.config.levels),
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_classes=len(id2label),
        class_dropout_prob=args.class_dropout_prob,
        id2label=id2label,
        levels=tokenizer.config.levels,
        scaling_factor=tokenizer.config.scaling_factor,
    )
    pipeline = IFSQDiTPipeline(model, tokenizer, FlowMatchEulerDiscreteScheduler())
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    teacher, alignments = None, []
    repa_depth = max(1, round(args.num_layers / 3)) if args.repa_depth is None else args.repa_depth
    if args.teacher is not None:
        if not 1 <= repa_depth <= args.num_layers:
            raise ValueError(f"`repa_depth` must be in [1, {args.num_layers}], got {repa_depth}.")
        hidden_size = args.num_attention_heads * args.attention_head_dim
        teacher = Teacher(args.teacher, tuple(side // args.patch_size for side in tokenizer.grid_size)).to(
            accelerator.device
        )
        alignments.append(RepresentationAlignment(hidden_size, teacher.hidden_size, args.projector_dim))

    # 4. Optimizer.
    parameters = [parameter for module in (model, *alignments) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters,
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
    model, optimizer, lr_scheduler, train_loader, *alignments = run.prepare(
        model, optimizer, lr_scheduler, train_loader, *alignments
    )

    # 5. Training.
    model.train()
    metrics = None
    for batch in train_loader:
        latents = encode(tokenizer, batch["pixel_values"])
        with accelerator.accumulate(model, *alignments):
            # A point on the straight path from noise (t = 0) to data (t = 1), more often in its middle.
            noise = torch.randn_like(latents)
            t = torch.randn(len(latents), device=latents.device).sigmoid()
            noisy_latents = torch.lerp(noise, latents, t.view(-1, 1, 1, 1))
            output = model(noisy_latents, t, batch["class_labels"], output_hidden_states=teacher is not None)
            squared_error, direction_error = (part.mean() for part in velocity_loss(output.sample, latents - noise))
            loss = squared_error + direction_error
            run.record(squared_error=squared_error, direction_error=direction_error)
            for alignment in alignments:
                alignment_loss = alignment(output.hidden_states[repa_depth], teacher(batch["pixel_values"]))
                loss = loss + args.repa_weight * alignment_loss
                run.record(alignment_loss=alignment_loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            learning_rate = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        run.record(loss=loss)
        if accelerator.sync_gradients:
            run.end_step(learning_rate)
            if run.validation_due:
                metrics = validate(run, pipeline, validation_loader)

    # 6. Result. A finished run that is resumed has not validated.
    if metrics is None:
        metrics = validate(run, pipeline, validation_loader)
    with run.averaged():
        if accelerator.is_main_process:
            pipeline.save_pretrained(args.output_dir)
    run.finish(
        make_model_card(
            run,
            title="Diffusion image generator on iFSQ codes",
            description=f"Generates images of {len(id2label)} classes by flow matching.",
            usage="from hf_ifsq import IFSQDiTPipeline\n\n"
            f'pipe = IFSQDiTPipeline.from_pretrained("{run.model_name}")\n'
            f"image = pipe({id2label[0]!r}).images[0]",
            metrics=metrics,
            num_parameters=pipeline.transformer.num_parameters(),
            pipeline_tag="unconditional-image-generation",
        )
    )
    return metrics


@torch.no_grad()
def encode(tokenizer: AutoencoderIFSQ, pixel_values: torch.Tensor) -> torch.Tensor:
    """Latents, codes times the scaling factor, `(batch, channels, rows, columns)`."""
    return tokenizer.encode(pixel_values).codes * tokenizer.config.scaling_factor


def validation_noise_and_times(
    run: TrainingRun, step: int, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed by the seed and the number of the image, so that any two runs compare, on any number of processes."""
    batch_number = step * run.accelerator.num_processes + run.accelerator.process_index
    first_image = batch_number * run.args.train_batch_size
    noise, times = [], []
    for number in range(first_image, first_image + len(latents)):
        generator = torch.Generator().manual_seed(run.args.seed + number)
        noise.append(torch.randn(latents.shape[1:], generator=generator))
        times.append(torch.randn((), generator=generator).sigmoid())
    return torch.stack(noise).to(latents.device), torch.stack(times).to(latents.device)


@torch.no_grad()
def validate(run: TrainingRun, pipeline: IFSQDiTPipeline, loader: DataLoader | None) -> dict[str, float]:
    """Mean loss over the validation images, on the same noise and times each time, and a picture of samples."""
    metrics = {}
    with run.averaged() as model:
        if loader is not None:
            losses = []
            for step, batch in enumerate(loader):
                latents = encode(pipeline.tokenizer, batch["pixel_values"])
                noise, t = validation_noise_and_times(run, step, latents)
                noisy_latents = torch.lerp(noise, latents, t.view(-1, 1, 1, 1))
                velocity = model(noisy_latents, t, batch["class_labels"]).sample
                losses.append(run.accelerator.gather_for_metrics(sum(velocity_loss(velocity, latents - noise))))
            metrics["validation_loss"] = torch.cat(losses).mean().item()
            run.log(metrics)
        if run.accelerator.is_main_process:
            pipeline.set_progress_bar_config(disable=True)
            images = pipeline(
                range(min(10, model.config.num_classes)),
                num_images_per_label=run.args.num_images_per_label,
                num_inference_steps=run.args.num_inference_steps,
                guidance_scale=run.args.guidance_scale,
                generator=torch.Generator().manual_seed(run.args.seed),
            ).images
            run.log_images("samples", images, columns=run.args.num_images_per_label)
    return metrics


if __name__ == "__main__":
    main(parse_args(DiTTrainingArguments))
