"""One image tokenizer for autoregressive and diffusion models: iFSQ (https://arxiv.org/abs/2601.17124)."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# Importing torch, transformers and diffusers takes seconds, so every public name is resolved when it is first used.
# The defining modules register their classes with transformers and diffusers.
_MODULE_OF_NAME = {
    "AutoencoderIFSQ": "hf_ifsq.models.autoencoder_ifsq",
    "FiniteScalarQuantizer": "hf_ifsq.models.quantization",
    "IFSQARConfig": "hf_ifsq.models.configuration_ifsq_ar",
    "IFSQARForImageGeneration": "hf_ifsq.models.modeling_ifsq_ar",
    "IFSQARModel": "hf_ifsq.models.modeling_ifsq_ar",
    "IFSQARPipeline": "hf_ifsq.pipelines.pipeline_ifsq_ar",
    "IFSQDiTPipeline": "hf_ifsq.pipelines.pipeline_ifsq_dit",
    "IFSQDiTTransformer2DModel": "hf_ifsq.models.transformer_ifsq_dit",
}

__all__ = sorted(_MODULE_OF_NAME)

if TYPE_CHECKING:
    from .models.autoencoder_ifsq import AutoencoderIFSQ as AutoencoderIFSQ
    from .models.configuration_ifsq_ar import IFSQARConfig as IFSQARConfig
    from .models.modeling_ifsq_ar import IFSQARForImageGeneration as IFSQARForImageGeneration
    from .models.modeling_ifsq_ar import IFSQARModel as IFSQARModel
    from .models.quantization import FiniteScalarQuantizer as FiniteScalarQuantizer
    from .models.transformer_ifsq_dit import IFSQDiTTransformer2DModel as IFSQDiTTransformer2DModel
    from .pipelines.pipeline_ifsq_ar import IFSQARPipeline as IFSQARPipeline
    from .pipelines.pipeline_ifsq_dit import IFSQDiTPipeline as IFSQDiTPipeline


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
