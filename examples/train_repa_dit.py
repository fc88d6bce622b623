"""
Train the diffusion generator on the codes of an image tokenizer, aligned with a vision model if one is given.

    accelerate launch examples/train_repa_dit.py --dataset_name DATASET --tokenizer outputs/tokenizer \\
        --teacher facebook/dinov2-base --output_dir outputs/dit

With `--token_dataset outputs/tokens`, which `tokenize_dataset.py` writes, in place of `--dataset_name` and
`--tokenizer` no image is tokenized on the way. The output is a folder for `IFSQDiTPipeline.from_pretrained`. All
arguments: `--help`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.utils.data import DataLoader

from hf_ifsq import IFSQDiTPipeline, IFSQDiTTransformer2DModel
from hf_ifsq.guidance import check_guidance
from hf_ifsq.metrics.alignment import cknna
from hf_ifsq.models.transformer_ifsq_dit import SIZES
from hf_ifsq.randomness import draw, generators_at
from hf_ifsq.training.arguments import GeneratorArguments, argument, parse_args, values_for
from hf_ifsq.training.losses import velocity_loss
from hf_ifsq.training.model_card import make_model_card, without_local_paths
from hf_ifsq.training.optimization import make_optimizer
from hf_ifsq.training.repa import RepresentationAlignment
from hf_ifsq.training.run import TrainingRun
from hf_ifsq.training.tokens import TokenSource, hash_weights


@dataclass
class DiTTrainingArguments(GeneratorArguments):
    """Arguments of this script beside those that both generator scripts share."""

    output_dir: str = argument("outputs/dit", "Folder of the result.")
    size: str | None = argument(
        None,
        "Size of the model, one of DiT's, and side of the square of codes that makes a token; by default B/1.",
        choices=[f"{name}/{patch_size}" for name in SIZES for patch_size in (1, 2)],
    )
    patch_size: int | None = argument(None, "Side of that square, in place of that of its size.", choices=[1, 2])
    num_layers: int | None = argument(None, "Blocks of the model, in place of those of its size.")
    num_attention_heads: int | None = argument(None, "Attention heads, in place of those of its size.")
    attention_head_dim: int | None = argument(None, "Channels of a head, in place of those of its size.")
    repa_weight: float = argument(0.5, "Weight of the alignment loss.")
    num_inference_steps: int = argument(50, "Euler steps of the validation pictures.")

    POSITIVE = (*GeneratorArguments.POSITIVE, "num_inference_steps")
    NOT_NEGATIVE = (*GeneratorArguments.NOT_NEGATIVE, "repa_weight")
    ARCHITECTURE = ("size", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim")


def main(args: DiTTrainingArguments) -> dict[str, float]:
    run = TrainingRun(**values_for(TrainingRun, args), arguments=asdict(args))
    accelerator = run.accelerator

    # 1. Data: images or their tokens, class names, tokenizer and teacher.
    pretrained = args.pretrained("transformer", IFSQDiTTransformer2DModel)
    sizes = {"size": "B/1", **args.given(args.ARCHITECTURE)}
    patch_size = sizes.get("patch_size", int(sizes["size"].split("/")[1]))
    if pretrained is not None:
        patch_size = pretrained.config["patch_size"]
    source = args.load_source(accelerator.device, patch_size)
    tokenizer, id2label = source.tokenizer, source.id2label
    train_loader = run.dataloader(source.train_data)
    validation_loader = None
    if source.validation_data is not None:
        validation_loader = run.evaluation_dataloader(source.validation_data)

    # 2. Model.
    options = {
        "sample_size": tokenizer.grid_size,
        "in_channels": tokenizer.latent_channels,
        "num_classes": len(id2label),
        **args.given(["class_dropout_prob"]),
        "id2label": id2label,
        "levels": tokenizer.levels,
        "scaling_factor": tokenizer.scaling_factor,
        "equal_bins": tokenizer.equal_bins,
    }
    if pretrained is None:
        model = IFSQDiTTransformer2DModel.from_size(**sizes, **options)
    else:
        model = pretrained.load(IFSQDiTTransformer2DModel, **options)
    class_dropout_prob = model.config.class_dropout_prob
    check_guidance(args.guidance_scale, (0.0, 1.0), class_dropout_prob)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    alignments, repa_depth, cknna_depth = [], None, None
    if args.teacher is not None:
        repa_depth, cknna_depth = args.alignment_depths(model.config.num_layers)
        hidden_size = model.config.num_attention_heads * model.config.attention_head_dim
        alignments.append(RepresentationAlignment(hidden_size, source.teacher_hidden_size, args.projector_dim))

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
    pipeline = IFSQDiTPipeline(run.saved_model, tokenizer.model, FlowMatchEulerDiscreteScheduler())
    names = ("num_images_per_label", "num_inference_steps", "guidance_scale")
    sampling = {name: getattr(args, name) for name in names}
    validation = (run, pipeline, source, validation_loader, cknna_depth, sampling)

    # 4. Training.
    model.train()
    if run.validation_due:
        validate(*validation)
    for batch in train_loader:
        # All that is random is drawn for each image, so that several processes train like one.
        generators = generators_at(args.seed, batch["position"])
        latents = tokenizer.codes_to_latents(source.codes(batch, generators))
        # A point on the straight path from noise (t = 0) to data (t = 1), more often in its middle.
        noise, t = draw_noise_and_times(generators, latents)
        noisy_latents = torch.lerp(noise, latents, t.view(-1, 1, 1, 1))
        options = {
            "class_dropout_mask": draw(torch.rand, (), generators, latents.device) < class_dropout_prob,
            "output_hidden_states": bool(alignments),
        }
        with accelerator.accumulate(model, *alignments):
            output = model(noisy_latents, t, batch["class_labels"], **options)
            squared_error, direction_error = (part.mean() for part in velocity_loss(output.sample, latents - noise))
            loss = squared_error + direction_error
            run.record(squared_error=squared_error, direction_error=direction_error)
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
            run.end_step(learning_rate)
            if run.validation_due:
                validate(*validation)

    # 5. Result. The model is on disk before anything else can fail.
    run.save(pipeline)
    with run.after_training():
        metrics = validate(*validation)
        description = f"Generates images of {len(id2label)} classes by flow matching."
        if args.teacher is not None:
            description += (
                f" In training, its block {repa_depth} was aligned with `{without_local_paths(args.teacher)}` by REPA "
                f"([arXiv 2410.06940](https://arxiv.org/abs/2410.06940)) with the weight {args.repa_weight:g}."
            )
        card = make_model_card(
            title=f"Diffusion image generator on codes of {type(tokenizer.model).__name__}",
            description=description,
            usage="from hf_ifsq import IFSQDiTPipeline\n\n"
            f'pipe = IFSQDiTPipeline.from_pretrained("{run.model_name}")\n'
            f"image = pipe({id2label[0]!r}).images[0]",
            facts=args.facts(tokenizer.model.config.sample_size, run.saved_model.num_parameters()) | run.facts(),
            metrics=metrics,
            arguments=asdict(args),
            pipeline_tag="unconditional-image-generation",
        )
        run.finish(card)
    return metrics


def draw_noise_and_times(
    generators: Sequence[torch.Generator], latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal noise of the shape of the latents and logit-normal times `(batch,)`, by a generator an image."""
    noise = draw(torch.randn, tuple(latents.shape[1:]), generators, latents.device)
    return noise, draw(torch.randn, (), generators, latents.device).sigmoid()


@torch.no_grad()
def validate(
    run: TrainingRun,
    pipeline: IFSQDiTPipeline,
    source: TokenSource,
    loader: DataLoader | None,
    cknna_depth: int | None,
    sampling: dict[str, Any],
) -> dict[str, float]:
    """
    Mean loss over the validation images, on the same noise and times each time, with a teacher the alignment of a
    block's hidden states with its features (CKNNA of means over the patches), and a picture of samples.
    """
    model, gather = run.saved_model, run.accelerator.gather_for_metrics
    metrics = {}
    with run.untimed():
        if loader is not None:
            losses, features = [], []
            for batch in loader:
                latents = source.tokenizer.codes_to_latents(source.codes(batch))
                noise, t = draw_noise_and_times(generators_at(run.seed, batch["position"]), latents)
                noisy_latents = torch.lerp(noise, latents, t.view(-1, 1, 1, 1))
                output = model(noisy_latents, t, batch["class_labels"], output_hidden_states=source.measures_cknna)
                losses.append(gather(sum(velocity_loss(output.sample, latents - noise))))
                if source.measures_cknna:
                    pair = (output.hidden_states[cknna_depth], source.teacher_features(batch))
                    features.append(gather(tuple(part.mean(dim=1) for part in pair)))
            metrics["validation_loss"] = torch.cat(losses).mean().item()
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
    main(parse_args(DiTTrainingArguments))
