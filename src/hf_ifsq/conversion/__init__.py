"""Official checkpoints of iFSQ and LlamaGen into the classes of this package and of diffusers."""

from .convert import Conversion as Conversion
from .convert import assemble_pipeline as assemble_pipeline
from .convert import convert_checkpoint as convert_checkpoint
