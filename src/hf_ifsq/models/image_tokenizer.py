"""
What pipelines and training ask of an image tokenizer, answered alike by [`AutoencoderIFSQ`] and by its baselines,
diffusers' [`~diffusers.VQModel`] and [`~diffusers.AutoencoderKL`].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..randomness import draw
from .autoencoder_ifsq import AutoencoderIFSQ, check_finite, check_pixel_values
from .grid import token_grid
from .loading import HUB_OPTIONS, check_loading_info, forget_place
from .quantization import check_indices


class ImageTokenizer(nn.Module, ABC):
    """
    A tokenizer `model` seen as a map from images to codes, integers where it has a codebook, and back. `codes` are the
    values that its decoder takes, `(batch, latent_channels, rows, columns)`. It has no weights of its own. What is not
    finite is a `ValueError` in all but `forward`.

    Attributes:
        grid_size (`tuple[int, int]`): rows and columns of the codes of an image of the model's `sample_size`.
        downsampling_factor (`int`): side in pixels of the square that a code stands for.
        in_channels (`int`), latent_channels (`int`): channels of the images and of the codes.
        codebook_size (`int` or `None`): number of different tokens; `None` where codes are continuous.
        levels (`list[int]` or `None`), equal_bins (`bool` or `None`): of finite scalar quantization alone.
        scaling_factor (`float`): what a diffusion model multiplies codes by.
    """

    latent_channels: int
    codebook_size: int | None = None
    levels: list[int] | None = None
    equal_bins: bool | None = None

    def __init__(self, model: ModelMixin):
        super().__init__()
        self.model = model
        self.in_channels: int = model.config.in_channels
        self.scaling_factor: float = model.config.scaling_factor
        self.downsampling_factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.grid_size = token_grid(model.config.sample_size, self.downsampling_factor)

    @abstractmethod
    def encode_codes(
        self, pixel_values: torch.Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Codes of images `(batch, in_channels, height, width)` in [-1, 1]. With `generators`, one an image, those of an
        `AutoencoderKL` are drawn from their distribution instead of being its mode.
        """  # noqa: D205

    @abstractmethod
    def forward(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encode and decode images `(batch, in_channels, height, width)` in [-1, 1] for training, by what `draw_noise`
        gives or else by the global random state; no value is read back from the device. Gives the reconstruction and
        the loss of the bottleneck itself, a scalar: the commitment loss of a `VQModel`, the divergence from a standard
        normal distribution of an `AutoencoderKL` in nats per value of the image, 0 for an `AutoencoderIFSQ`.
        """

    def draw_noise(self, generators: Sequence[torch.Generator]) -> torch.Tensor | None:
        """What is random in `forward` for images of the model's `sample_size`, drawn by the generator of each."""
        return None

    def encode_indices(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Token ids `(batch, rows, columns)`, int64, of images `(batch, in_channels, height, width)` in [-1, 1]."""
        raise self._no_codebook()

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        """Codes of token ids `(batch, rows, columns)`, integers in [0, codebook_size), on the device of these."""
        raise self._no_codebook()

    def nearest_codes(self, values: torch.Tensor) -> torch.Tensor:
        """The codes next to any values of their shape, in the dtype of these; without a codebook the values."""
        # The code next to NaN would be some code.
        if not torch.isfinite(values).all():
            raise ValueError("`values` is not finite (NaN or infinity): no codes are next to it.")
        return self._nearest_codes(values)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Images `(batch, channels, height, width)`, about in [-1, 1], of codes or of values near codes."""
        sample = self._decode(codes)
        check_finite(sample, "decoded images", self.model)
        return sample

    def decode_indices(self, indices: torch.Tensor) -> torch.Tensor:
        """Images `(batch, channels, height, width)`, about in [-1, 1], of token ids `(batch, rows, columns)`."""
        return self.decode_codes(self.indices_to_codes(indices))

    def codes_to_latents(self, codes: torch.Tensor) -> torch.Tensor:
        """What a diffusion model sees: codes of about unit variance."""
        return codes * self.scaling_factor

    def latents_to_codes(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `codes_to_latents`."""
        return latents / self.scaling_factor

    def require_codebook(self) -> int:
        """The number of different tokens; an error if the codes are continuous."""
        if self.codebook_size is None:
            raise self._no_codebook()
        return self.codebook_size

    def _nearest_codes(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.model.decode(codes.to(self.model.dtype)).sample

    def _no_codebook(self) -> ValueError:
        return ValueError(
            f"`tokenizer` is an {type(self.model).__name__}, whose codes are continuous: it has no tokens. Use an "
            "AutoencoderIFSQ or a VQModel."
        )

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        """The checks that diffusers' own classes leave out."""
        check_pixel_values(pixel_values, self.in_channels, self.downsampling_factor)
        if not torch.isfinite(pixel_values).all():
            raise ValueError("`pixel_values` is not finite (NaN or infinity).")


class _IFSQTokenizer(ImageTokenizer):
    def __init__(self, model: AutoencoderIFSQ):
        super().__init__(model)
        self.codebook_size = model.codebook_size
        self.levels, self.equal_bins = model.quantizer.levels, model.quantizer.equal_bins
        self.latent_channels = len(self.levels)

    def encode_codes(
        self, pixel_values: torch.Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        return self.model.encode(pixel_values.to(self.model.dtype)).codes

    def encode_indices(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode(pixel_values.to(self.model.dtype)).indices

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        return self.model.quantizer.indices_to_codes(indices)

    def _nearest_codes(self, values: torch.Tensor) -> torch.Tensor:
        return self.model.quantizer.nearest_codes(values)

    def forward(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self.model(pixel_values, uniforms=noise).sample
        return sample, sample.new_zeros(())

    def draw_noise(self, generators: Sequence[torch.Generator]) -> torch.Tensor | None:
        if not self.model.quantizer.noise_prob:
            return None
        return draw(torch.rand, (2, self.latent_channels, *self.grid_size), generators, self.model.device)


class _VQTokenizer(ImageTokenizer):
    def __init__(self, model: VQModel):
        super().__init__(model)
        self.codebook_size = self.model.config.num_vq_embeddings
        self.latent_channels = self.model.quantize.vq_embed_dim
        if self.model.config.lookup_from_codebook:
            raise ValueError("`tokenizer` is a VQModel with `lookup_from_codebook=True`: load it with `False`.")

    def encode_codes(
        self, pixel_values: torch.Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        return self.indices_to_codes(self.encode_indices(pixel_values))

    def encode_indices(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self._check_pixel_values(pixel_values)
        return self._nearest_indices(self.model.encode(pixel_values.to(self.model.dtype)).latents)

    def indices_to_codes(self, indices: torch.Tensor) -> torch.Tensor:
        return self._look_up(check_indices(indices, self.require_codebook())).movedim(-1, 1)

    def _nearest_codes(self, values: torch.Tensor) -> torch.Tensor:
        return self.indices_to_codes(self._nearest_indices(values)).to(values.dtype)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.model.decode(codes.to(self.model.dtype), force_not_quantize=True).sample

    def forward(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(pixel_values)
        return output.sample, output.commit_loss

    def _look_up(self, indices: torch.Tensor) -> torch.Tensor:
        # A model kept on the CPU beside a token dataset, or offloaded as a whole, has its codebook on another device;
        # if it is offloaded by parts, the embedding fetches its weight itself.
        embedding = self.model.quantize.embedding
        device = indices.device if embedding.weight.is_meta else embedding.weight.device
        return embedding(indices.to(device)).to(indices.device)

    def _nearest_indices(self, values: torch.Tensor) -> torch.Tensor:
        # As VQModel does it, but in float32 whatever its dtype.
        codebook = self._look_up(torch.arange(self.require_codebook(), device=values.device)).float()
        distances = torch.cdist(values.movedim(1, -1).flatten(0, -2).float(), codebook)
        indices = distances.argmin(dim=1, keepdim=True)
        # The smallest of them is NaN where any is.
        check_finite(distances.gather(1, indices), "distances to the codebook", self.model)
        return indices.view(values.shape[0], *values.shape[2:])


class _KLTokenizer(ImageTokenizer):
    def __init__(self, model: AutoencoderKL):
        super().__init__(model)
        self.latent_channels = self.model.config.latent_channels
        self.shift_factor = self.model.config.shift_factor or 0.0

    def encode_codes(
        self, pixel_values: torch.Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        self._check_pixel_values(pixel_values)
        with self._upcast():
            posterior = self.model.encode(pixel_values.to(self.model.dtype)).latent_dist
        codes = posterior.mode() if generators is None else posterior.sample(generators)
        codes = codes.to(pixel_values.dtype)
        check_finite(codes, "codes", self.model)
        return codes

    def codes_to_latents(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - self.shift_factor) * self.scaling_factor

    def latents_to_codes(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.scaling_factor + self.shift_factor

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        with self._upcast():
            return super()._decode(codes)

    @contextmanager
    def _upcast(self) -> Iterator[None]:
        """With `force_upcast` in its config a model in float16 computes in float32, as that of Stable Diffusion XL."""
        needed = self.model.config.force_upcast and self.model.dtype == torch.float16
        # Quantized weights cannot be cast.
        if not needed or getattr(self.model, "is_quantized", False):
            yield
            return
        self.model.float()
        try:
            yield
        finally:
            self.model.half()

    def forward(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.model.encode(pixel_values).latent_dist
        # As latent diffusion, which sums both the error and the divergence over an image, divided by its values.
        divergence = posterior.kl().mean() / math.prod(pixel_values.shape[1:])
        codes = posterior.sample() if noise is None else posterior.mean + posterior.std * noise
        return self.model.decode(codes).sample, divergence

    def draw_noise(self, generators: Sequence[torch.Generator]) -> torch.Tensor | None:
        return draw(torch.randn, (self.latent_channels, *self.grid_size), generators, self.model.device)


_VIEWS = {AutoencoderIFSQ: _IFSQTokenizer, VQModel: _VQTokenizer, AutoencoderKL: _KLTokenizer}


def as_image_tokenizer(model: ModelMixin) -> ImageTokenizer:
    """
    The common view of an [`AutoencoderIFSQ`], a [`~diffusers.VQModel`] or an [`~diffusers.AutoencoderKL`], or of the
    model in one that `torch.compile` returned, whose encoder and decoder are not compiled in any case.
    """
    model = unwrap_module(model)
    for model_class, view in _VIEWS.items():
        if isinstance(model, model_class):
            return view(model)
    names = [model_class.__name__ for model_class in _VIEWS]
    raise ValueError(f"`tokenizer` must be one of {names}, got {type(model).__name__}.")


def load_image_tokenizer(
    name_or_path: str | PathLike[str], sample_size: int | Sequence[int] | None = None, **kwargs: Any
) -> ImageTokenizer:
    """
    Load a tokenizer of any of the classes, as its config names it, from a folder or the Hub, in evaluation mode and
    without gradients. `sample_size` is height and width in pixels of the images, if other than the config says;
    `kwargs` are further arguments of `from_pretrained`, such as `revision`.
    """
    hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    class_name = AutoencoderIFSQ.load_config(name_or_path, **hub_options).get("_class_name")
    classes = {model_class.__name__: model_class for model_class in _VIEWS}
    if class_name not in classes:
        raise ValueError(f"The tokenizer {name_or_path!r} must be one of {list(classes)}, got {class_name}.")
    if sample_size is not None:
        kwargs["sample_size"] = sample_size
    model, loading_info = classes[class_name].from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    check_loading_info(model, loading_info)
    forget_place(model, name_or_path)
    return as_image_tokenizer(model.eval().requires_grad_(False))
