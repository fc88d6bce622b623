"""
Train the autoregressive generator on the tokens of an image tokenizer, aligned with a vision model if one is given.

    accelerate launch examples/train_repa_ar.py --dataset_name DATASET --tokenizer outputs/tokenizer \\
        --teacher facebook/dinov2-base --output_dir outputs/ar

With `--token_dataset outputs/tokens`, which `tokenize_dataset.py` writes, in place of `--dataset_name` and
`--tokenizer` no image is tokenized on the way. The output is a folder for `IFSQARPipeline.from_pretrained`. All
arguments: `--help`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hf_ifsq import IFSQARConfig, IFSQARForImageGeneration, IFSQARPipeline
from hf_ifsq.guidance import check_guidance
from hf_ifsq.metrics.alignment import cknna
from hf_ifsq.models.configuration_ifsq_ar import SIZES
from hf_ifsq.randomness import draw, generators_at
from hf_ifsq.training.arguments import GeneratorArguments, argument, parse_args, values_for
from hf_ifsq.training.model_card import make_model_card, without_local_paths
from hf_ifsq.training.optimization import make_optimizer
from hf_ifsq.training.repa import RepresentationAlignment
from hf_ifsq.training.run import TrainingRun
from hf_ifsq.training.tokens import TokenSource, hash_weights


@dataclass
class ARTrainingArguments(GeneratorArguments):
    """Arguments of this script beside those that both generator scripts share."""

    output_dir: str = argument("outputs/ar", "Folder of the result.")
    vocab_sizes: list[int] | None = argument(
        None, "Sizes of the factors of a token; by default one head over the codebook."
    )
    size: str | None = argument(None, "Size of the model, one of LlamaGen's; by default B.", choices=list(SIZES))
    hidden_size: int | None = argument(None, "Width of the model, in place of that of its size.")
    num_hidden_layers: int | None = argument(None, "Layers over the grid, in place of those of its size.")
    num_attention_heads: int | None = argument(None, "Attention heads, in place of those of its size.")
    num_factor_layers: int | None = argument(None, "Layers over the factors of a token; by default 2.")
    dropout: float | None = argument(
        None, "Dropout of embeddings and residual branches; by default 0.1, or as of the weights begun with."
    )
    repa_weight: float = argument(2.0, "Weight of the alignment loss.")

    NOT_NEGATIVE = (*GeneratorArguments.NOT_NEGATIVE, "repa_weight")
    SHARES = (*GeneratorArguments.SHARES, "dropout")
    ARCHITECTURE = ("size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_factor_layers")


def main(args: ARTrainingArguments) -> dict[str, float]:
    run = TrainingRun(**values_for(TrainingRun, args), arguments=asdict(args))
    accelerator = run.accelerator

    # 1. Data: images or their tokens, class names, tokenizer and teacher.
    source = args.load_source(accelerator.device)
    tokenizer, id2label = source.tokenizer, source.id2label
    train_loader = run.dataloader(source.train_data)
    validation_loader = None
    if source.validation_data is not None:
        validation_loader = run.evaluation_dataloader(source.validation_data)

    # 2. Model.
    pretrained = args.pretrained("transformer", IFSQARForImageGeneration)
    vocab_sizes = args.vocab_sizes or (pretrained and pretrained.config["vocab_sizes"]) or []
    if not args.vocab_sizes and math.prod(vocab_sizes) != tokenizer.require_codebook():
        vocab_sizes = [tokenizer.require_codebook()]
    about_data = {
        "vocab_sizes": vocab_sizes,
        "num_classes": len(id2label),
        "grid_size": list(tokenizer.grid_size),
        "id2label": id2label,
    }
    dropouts = args.given(["dropout", "class_dropout_prob"])
    if pretrained is None:
        sizes = {"size": "B", **args.given(args.ARCHITECTURE)}
        model = IFSQARForImageGeneration(IFSQARConfig.from_size(**sizes, **about_data, **dropouts))
    else:
        model = pretrained.load(IFSQARForImageGeneration, **about_data, **dropouts)
    config = model.config
    check_guidance(args.guidance_scale, (0.0, 1.0), config.class_dropout_prob)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    alignments, repa_depth, cknna_depth = [], None, None
    if args.teacher is not None:
        repa_depth, cknna_depth = args.alignment_depths(config.num_hidden_layers)
        alignments.append(RepresentationAlignment(config.hidden_size, source.teacher_hidden_size, args.projector_dim))

    # 3. Optimizer.
    parameters = [parameter for module in (model, *alignments) for parameter in module.parameters()]
    optimizer, lr_scheduler = make_optimizer(
        parameters, run.num_steps, accelerator.num_processes, **values_for(make_optimizer, args)
    )
    frozen = {"tokenizer": tokenizer.model} | ({} if source.teacher is None else {"teacher": source.teacher})
    hashes = {name: hash_weights(frozen_model) for name, frozen_model in frozen.items()}
    model, optimizer, lr_scheduler, train_loader, *alignments = run.prepare(
        model, optimizer, lr_scheduler, train_loader, *alignments, hashes=hashes
    )
    # It checks that the model fits the tokenizer.
    pipeline = IFSQARPipeline(run.saved_model, tokenizer.model)
    sampling = {"num_images_per_label": args.num_images_per_label, "guidance_scale": args.guidance_scale}
    validation = (run, pipeline, source, validation_loader, cknna_depth, sampling)

    # 4. Training.
    model.train()
    if run.validation_due:
        validate(*validation)
    for batch in train_loader:
        indices = source.indices(batch)
        # Drawn for each image, so that several processes train like one; the masks of dropout are not.
        uniforms = draw(torch.rand, (), generators_at(args.seed, batch["position"]), indices.device)
        options = {
            "class_dropout_mask": uniforms < config.class_dropout_prob,
            "output_hidden_states": bool(alignments),
        }
        with accelerator.accumulate(model, *alignments):
            output = model(batch["class_labels"], indices, labels=indices, **options)
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
                validate(*validation)

    # 5. Result. The model is on disk before anything else can fail.
    run.save(pipeline)
    with run.after_training():
        metrics = validate(*validation)
        description = f"Generates images of {len(id2label)} classes, token by token."
        if args.teacher is not None:
            description += (
                f" In training, its layer {repa_depth} was aligned with `{without_local_paths(args.teacher)}` by REPA "
                f"([arXiv 2410.06940](https://arxiv.org/abs/2410.06940)) with the weight {args.repa_weight:g}."
            )
        card = make_model_card(
            title=f"Autoregressive image generator on tokens of {type(tokenizer.model).__name__}",
            description=description,
            usage="from hf_ifsq import IFSQARPipeline\n\n"
            f'pipe = IFSQARPipeline.from_pretrained("{run.model_name}")\n'
            f"image = pipe({id2label[0]!r}).images[0]",
            facts=args.facts(tokenizer.model.config.sample_size, run.saved_model.num_parameters()) | run.facts(),
            metrics=metrics,
            arguments=asdict(args),
            pipeline_tag="unconditional-image-generation",
        )
        run.finish(card)
    return metrics


def cross_entropy_of_images(
    model: IFSQARForImageGeneration, logits: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy in nats per token, summed over the factors, of each image: `(batch,)`."""
    scores_of_factors = logits.float().split(model.config.vocab_sizes, dim=-1)
    factors = model.model.split_indices(indices)
    losses = [F.cross_entropy(scores.mT, ids, reduction="none") for scores, ids in zip(scores_of_factors, factors)]
    return sum(losses).mean(dim=1)


@torch.no_grad()
def validate(
    run: TrainingRun,
    pipeline: IFSQARPipeline,
    source: TokenSource,
    loader: DataLoader | None,
    cknna_depth: int | None,
    sampling: dict[str, Any],
) -> dict[str, float]:
    """
    Mean cross-entropy in nats per token over the validation images, with a teacher the alignment of a layer's hidden
    states with its features (CKNNA of means over the tokens), and a picture with one row of samples per class.
    """
    model, gather = run.saved_model, run.accelerator.gather_for_metrics
    metrics = {}
    with run.untimed():
        if loader is not None:
            losses, features = [], []
            for batch in loader:
                indices = source.indices(batch)
                output = model(batch["class_labels"], indices, output_hidden_states=source.measures_cknna)
                losses.append(gather(cross_entropy_of_images(model, output.logits, indices)))
                if source.measures_cknna:
                    pair = (output.hidden_states[cknna_depth], source.teacher_features(batch))
                    features.append(gather(tuple(part.mean(dim=1) for part in pair)))
            metrics["validation_cross_entropy"] = torch.cat(losses).mean().item()
            if source.measures_cknna:
                metrics["validation_cknna"] = cknna(*map(torch.cat, zip(*features)))
            run.log(metrics)
        if run.accelerator.is_main_process:
            pipeline.set_progress_bar_config(disable=True)
            with source.tokenizer_on(run.accelerator.device):
                generator = torch.Generator().manual_seed(run.seed)
                images = pipeline(range(min(10, model.config.num_classes)), generator=generator, **sampling).images
            run.log_images("samples", images, columns=sampling["num_images_per_label"])
    return metrics


if __name__ == "__main__":
    main(parse_args(ARTrainingArguments))
