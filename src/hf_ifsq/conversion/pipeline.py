"""A converted generator model and a tokenizer into a pipeline."""

import logging
from typing import Any

from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from ..models.grid import as_grid
from ..models.image_tokenizer import load_image_tokenizer
from ..models.modeling_ifsq_ar import IFSQARForImageGeneration
from ..models.transformer_ifsq_dit import IFSQDiTTransformer2DModel
from ..pipelines.pipeline_ifsq_ar import IFSQARPipeline
from ..pipelines.pipeline_ifsq_dit import IFSQDiTPipeline


logger = logging.getLogger(__name__)


def assemble_pipeline(
    model: IFSQARForImageGeneration | IFSQDiTTransformer2DModel, tokenizer: str
) -> IFSQARPipeline | IFSQDiTPipeline:
    """
    Put a converted generator model and the tokenizer that it was trained with into a pipeline.

    The tokenizer is loaded for images of the model's grid. For diffusion the two must agree on `scaling_factor`, which
    the official code keeps beside the model: where the model's config has one, the pipeline's tokenizer takes it over,
    since the model was trained on no other latents; where not, the model takes over that of the tokenizer. It takes
    over the tokenizer's `levels` too.

    Args:
        model ([`IFSQARForImageGeneration`] or [`IFSQDiTTransformer2DModel`]):
            the generator model; the config of a diffusion model is changed in place.
        tokenizer (`str`): a folder or a name on the Hub, of a converted or a trained tokenizer.

    Returns:
        [`IFSQARPipeline`], or [`IFSQDiTPipeline`] with Euler's method.

    Example:

    ```python
    from hf_ifsq.conversion import assemble_pipeline, convert_checkpoint

    model = convert_checkpoint("c2i_B_256.pt", grid_size=16).model
    assemble_pipeline(model, "llamagen-vq-16").save_pretrained("llamagen-b")
    ```
    """
    changes: dict[str, Any] = {}
    if isinstance(model, IFSQARForImageGeneration):
        grid_size = model.config.grid_size
    elif isinstance(model, IFSQDiTTransformer2DModel):
        grid_size = as_grid(model.config["sample_size"])
        if model.config["scaling_factor"] is not None:
            changes["scaling_factor"] = model.config["scaling_factor"]
    else:
        raise ValueError(f"`tokenizer` must be left out for {type(model).__name__}, which is not a generator model.")
    # Twice: how many pixels a cell has is known of a loaded tokenizer, and what is made of its config when it loads.
    loaded = load_image_tokenizer(tokenizer)
    rows, columns = (cells * loaded.downsampling_factor for cells in grid_size)
    changes["sample_size"] = rows if rows == columns else (rows, columns)
    for name, value in changes.items():
        if loaded.model.config[name] != value:
            logger.info(f"Changing `{name}` of the tokenizer from {loaded.model.config[name]} to {value}.")
    loaded = load_image_tokenizer(tokenizer, **changes)
    components: dict[str, Any] = {"transformer": model, "tokenizer": loaded.model}
    if isinstance(model, IFSQARForImageGeneration):
        return IFSQARPipeline(**components)
    model.register_to_config(levels=loaded.levels, scaling_factor=loaded.scaling_factor)
    return IFSQDiTPipeline(**components, scheduler=FlowMatchEulerDiscreteScheduler())
