"""
Train the autoregressive generator on the tokens of an image tokenizer, aligned with a vision model if one is given.

    accelerate launch examples/train_repa_ar.py --dataset_name DATASET --tokenizer outputs/tokenizer \\
        --teacher facebook/dinov2-base --output_dir outputs/ar

The output is a folder for `IFSQARPipeline.from_pretrained`. All arguments: `--help`.
"""

from dataclasses import dataclass, field

import torch
from diffusers.optimization import get_scheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hf_ifsq import AutoencoderIFSQ, IFSQARConfig, IFSQARForImageGeneration, IFSQARPipeline
from hf_ifsq.training.arguments import TrainingArguments, parse_args
from hf_ifsq.training.data import ImageDataset, check_labels, load_image_dataset, read_class_names
from hf_ifsq.training.model_card import make_model_card
from hf_ifsq.training.repa import RepresentationAlignment, Teacher
from hf_ifsq.training.run import TrainingRun


@dataclass
class ARTrainingArguments(TrainingArguments):
    """Arguments of this script beside those that all training scripts share."""

    output_dir: str = field(default="outputs/ar", metadata={"help": "Folder of the result."})
    tokenizer: str = field(default="outputs/tokenizer", metadata={"help": "Tokenizer: a folder or a Hub name."})
    vocab_sizes: list[int] | None = field(
        default=None, metadata={"help": "Sizes of the factors of a token; by default one head over the codebook."}
    )
    hidden_size: int = field(default=768, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Layers over the grid."})
    num_factor_layers: int = field(default=2, metadata={"help": "Layers over the factors of a token."})
    num_attention_heads: int = field(default=12, metadata={"help": "Attention heads."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of embeddings and residual branches."})
    class_dropout_prob: float = field(default=0.1, metadata={"help": "Share of labels dropped, for guidance."})
    teacher: str | None = field(default=None, metadata={"help": "Vision model to align with: a folder or Hub name."})
    repa_weight: float = field(default=2.0, metadata={"help": "Weight of the alignment loss."})
    repa_depth: int | None = field(
        default=None, metadata={"help": "Layer whose output is aligned; by default at a third of the depth."}
    )
    projector_dim: int = field(default=2048, metadata={"help": "Width of the alignment's projector."})
    num_images_per_label: int = field(default=4, metadata={"help": "Images of each class in a validation picture."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the validation pictures."})


def main(args: ARTrainingArguments) -> dict[str, float]:
    run = TrainingRun(args)
    accelerator = run.accelerator

    # 1. Tokenizer, in float32 whatever the precision of training: a rounded latent is another token.
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
    config = IFSQARConfig(
        vocab_sizes=args.vocab_sizes or [tokenizer.codebook_size],
        num_classes=len(id2label),
        grid_size=tokenizer.grid_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_factor_layers=args.num_factor_layers,
        num_attention_heads=args.num_attention_heads,
        dropout=args.dropout,
        class_dropout_prob=args.class_dropout_prob,
        id2label=id2label,
    )
    model = IFSQARForImageGeneration(config)
    pipeline = IFSQARPipeline(model, tokenizer)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    teacher, alignments = None, []
    repa_depth = max(1, round(args.num_hidden_layers / 3)) if args.repa_depth is None else args.repa_depth
    if args.teacher is not None:
        if not 1 <= repa_depth <= args.num_hidden_layers:
            raise ValueError(f"`repa_depth` must be in [1, {args.num_hidden_layers}], got {repa_depth}.")
        teacher = Teacher(args.teacher, tokenizer.grid_size).to(accelerator.device)
        alignments.append(RepresentationAlignment(args.hidden_size, teacher.hidden_size, args.projector_dim))

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
        indices = tokenize(tokenizer, batch["pixel_values"])
        with accelerator.accumulate(model, *alignments):
            output = model(batch["class_labels"], indices, labels=indices, output_hidden_states=teacher is not None)
            loss = output.loss
            run.record(cross_entropy=output.loss)
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
            title="Autoregressive image generator on iFSQ tokens",
            description=f"Generates images of {len(id2label)} classes, token by token.",
            usage="from hf_ifsq import IFSQARPipeline\n\n"
            f'pipe = IFSQARPipeline.from_pretrained("{run.model_name}")\n'
            f"image = pipe({id2label[0]!r}).images[0]",
            metrics=metrics,
            num_parameters=pipeline.transformer.num_parameters(),
            pipeline_tag="unconditional-image-generation",
        )
    )
    return metrics


@torch.no_grad()
def tokenize(tokenizer: AutoencoderIFSQ, pixel_values: torch.Tensor) -> torch.Tensor:
    """Token ids in raster order, `(batch, num_tokens)`."""
    return tokenizer.encode(pixel_values).indices.flatten(1)


def cross_entropy_of_images(
    model: IFSQARForImageGeneration, logits: torch.Tensor | tuple[torch.Tensor, ...], indices: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy in nats a token, summed over the factors, of each image: `(batch,)`."""
    logits = logits if isinstance(logits, tuple) else (logits,)
    factors = model.model.split_indices(indices)
    losses = [F.cross_entropy(scores.mT.float(), factor, reduction="none") for scores, factor in zip(logits, factors)]
    return sum(losses).mean(dim=1)


@torch.no_grad()
def validate(run: TrainingRun, pipeline: IFSQARPipeline, loader: DataLoader | None) -> dict[str, float]:
    """Mean cross-entropy in nats a token over the validation images, and a picture with one row of samples a class."""
    metrics = {}
    with run.averaged() as model:
        if loader is not None:
            losses = []
            for batch in loader:
                indices = tokenize(pipeline.tokenizer, batch["pixel_values"])
                logits = model(batch["class_labels"], indices).logits
                loss = cross_entropy_of_images(model, logits, indices)
                losses.append(run.accelerator.gather_for_metrics(loss))
            metrics["validation_cross_entropy"] = torch.cat(losses).mean().item()
            run.log(metrics)
        if run.accelerator.is_main_process:
            pipeline.set_progress_bar_config(disable=True)
            images = pipeline(
                range(min(10, model.config.num_classes)),
                num_images_per_label=run.args.num_images_per_label,
                guidance_scale=run.args.guidance_scale,
                generator=torch.Generator().manual_seed(run.args.seed),
            ).images
            run.log_images("samples", images, columns=run.args.num_images_per_label)
    return metrics


if __name__ == "__main__":
    main(parse_args(ARTrainingArguments))
