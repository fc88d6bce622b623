"""
Train the autoregressive generator on the tokens of an image tokenizer, aligned with a vision model if one is given.

    accelerate launch examples/train_repa_ar.py --dataset_name DATASET --tokenizer outputs/tokenizer \\
        --teacher facebook/dinov2-base --output_dir outputs/ar

With `--token_dataset outputs/tokens`, which `tokenize_dataset.py` writes, in place of `--dataset_name` and
`--tokenizer` no image is tokenized on the way. The output is a folder for `IFSQARPipeline.from_pretrained`. All
arguments: `--help`.
"""

from dataclasses import dataclass

import torch
from diffusers.optimization import get_scheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hf_ifsq import IFSQARConfig, IFSQARForImageGeneration, IFSQARPipeline
from hf_ifsq.metrics.alignment import cknna
from hf_ifsq.models.configuration_ifsq_ar import SIZES
from hf_ifsq.training.arguments import GeneratorArguments, argument, parse_args
from hf_ifsq.training.model_card import make_model_card
from hf_ifsq.training.repa import RepresentationAlignment
from hf_ifsq.training.run import TrainingRun
from hf_ifsq.training.tokens import TokenSource


@dataclass
class ARTrainingArguments(GeneratorArguments):
    """Arguments of this script beside those that both generator scripts share."""

    output_dir: str = argument("outputs/ar", "Folder of the result.")
    vocab_sizes: list[int] | None = argument(
        None, "Sizes of the factors of a token; by default one head over the codebook."
    )
    size: str = argument("B", "Size of the model, one of LlamaGen's.", choices=list(SIZES))
    hidden_size: int | None = argument(None, "Width of the model, in place of that of its size.")
    num_hidden_layers: int | None = argument(None, "Layers over the grid, in place of those of its size.")
    num_attention_heads: int | None = argument(None, "Attention heads, in place of those of its size.")
    num_factor_layers: int = argument(2, "Layers over the factors of a token.")
    dropout: float = argument(0.1, "Dropout of embeddings and residual branches.")
    repa_weight: float = argument(2.0, "Weight of the alignment loss.")


def main(args: ARTrainingArguments) -> dict[str, float]:
    run = TrainingRun(args)
    accelerator = run.accelerator

    # 1. Data: images or their tokens, class names, tokenizer and teacher.
    source = TokenSource(args, accelerator.device)
    tokenizer, id2label = source.tokenizer, source.id2label
    train_loader = run.dataloader(source.train_data)
    validation_loader = None
    if source.validation_data is not None:
        validation_loader = run.evaluation_dataloader(source.validation_data)

    # 2. Model. The pipeline checks that it fits the tokenizer.
    dimensions = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    config = IFSQARConfig.from_size(
        args.size,
        **{name: getattr(args, name) for name in dimensions if getattr(args, name) is not None},
        vocab_sizes=args.vocab_sizes or [tokenizer.require_codebook()],
        num_classes=len(id2label),
        grid_size=tokenizer.grid_size,
        num_factor_layers=args.num_factor_layers,
        dropout=args.dropout,
        class_dropout_prob=args.class_dropout_prob,
        id2label=id2label,
    )
    model = IFSQARForImageGeneration(config)
    pipeline = IFSQARPipeline(model, tokenizer.model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    alignments = []
    if args.teacher is not None:
        repa_depth, _ = args.alignment_depths(config.num_hidden_layers)
        alignments.append(RepresentationAlignment(config.hidden_size, source.teacher_hidden_size, args.projector_dim))

    # 3. Optimizer.
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

    # 4. Training.
    model.train()
    metrics = None
    for batch in train_loader:
        indices = source.indices(batch)
        with accelerator.accumulate(model, *alignments):
            output = model(batch["class_labels"], indices, labels=indices, output_hidden_states=bool(alignments))
            loss = output.loss
            run.record(cross_entropy=output.loss)
            if len(output.factor_losses) > 1:
                run.record(**{f"cross_entropy_{factor}": part for factor, part in enumerate(output.factor_losses)})
            for alignment in alignments:
                alignment_loss = alignment(output.hidden_states[repa_depth], source.teacher_features(batch))
                loss = loss + args.repa_weight * alignment_loss
                run.record(alignment_loss=alignment_loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            learning_rate = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        run.record(loss=loss)
        if accelerator.sync_gradients:
            # Gradients in float16 overflow now and then: such a step is skipped.
            if not accelerator.optimizer_step_was_skipped:
                run.record(gradient_norm=gradient_norm)
            run.end_step(learning_rate, tokens_per_image=config.num_tokens)
            if run.validation_due:
                metrics = validate(run, pipeline, source, validation_loader)

    # 5. Result. A finished run that is resumed has not validated.
    if metrics is None:
        metrics = validate(run, pipeline, source, validation_loader)
    with run.averaged():
        if accelerator.is_main_process:
            pipeline.save_pretrained(args.output_dir)
    description = f"Generates images of {len(id2label)} classes, token by token."
    if args.teacher is not None:
        description += (
            f" In training, its layer {repa_depth} was aligned with `{args.teacher}` by REPA "
            f"([arXiv 2410.06940](https://arxiv.org/abs/2410.06940)) with the weight {args.repa_weight:g}."
        )
    run.finish(
        make_model_card(
            run,
            title=f"Autoregressive image generator on tokens of {type(tokenizer.model).__name__}",
            description=description,
            usage="from hf_ifsq import IFSQARPipeline\n\n"
            f'pipe = IFSQARPipeline.from_pretrained("{run.model_name}")\n'
            f"image = pipe({id2label[0]!r}).images[0]",
            metrics=metrics,
            num_parameters=pipeline.transformer.num_parameters(),
            pipeline_tag="unconditional-image-generation",
        )
    )
    return metrics


def cross_entropy_of_images(
    model: IFSQARForImageGeneration, logits: torch.Tensor | tuple[torch.Tensor, ...], indices: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy in nats a token, summed over the factors, of each image: `(batch,)`."""
    logits = logits if isinstance(logits, tuple) else (logits,)
    factors = model.model.split_indices(indices)
    losses = [F.cross_entropy(scores.mT.float(), factor, reduction="none") for scores, factor in zip(logits, factors)]
    return sum(losses).mean(dim=1)


@torch.no_grad()
def validate(
    run: TrainingRun, pipeline: IFSQARPipeline, source: TokenSource, loader: DataLoader | None
) -> dict[str, float]:
    """
    Mean cross-entropy in nats a token over the validation images, with a teacher the alignment of a layer's hidden
    states with its features (CKNNA of means over the tokens), and a picture with one row of samples a class.
    """
    metrics = {}
    with run.averaged() as model:
        if loader is not None:
            losses, features = [], []
            for batch in loader:
                indices = source.indices(batch)
                output = model(batch["class_labels"], indices, output_hidden_states=source.measures_cknna)
                loss = cross_entropy_of_images(model, output.logits, indices)
                losses.append(run.accelerator.gather_for_metrics(loss))
                if source.measures_cknna:
                    _, depth = run.args.alignment_depths(model.config.num_hidden_layers)
                    pair = (output.hidden_states[depth], source.teacher_features(batch))
                    features.append(run.accelerator.gather_for_metrics(tuple(part.mean(dim=1) for part in pair)))
            metrics["validation_cross_entropy"] = torch.cat(losses).mean().item()
            if source.measures_cknna:
                metrics["validation_cknna"] = cknna(*map(torch.cat, zip(*features)))
            run.log(metrics)
        if run.accelerator.is_main_process:
            pipeline.set_progress_bar_config(disable=True)
            with source.tokenizer_on_device():
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
