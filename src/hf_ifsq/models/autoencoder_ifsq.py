"""The iFSQ image tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import EllipsisType
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .checks import check_has_values, check_integer, check_integers, check_positive, check_tensor
from .grid import token_grid
from .loading import DiffusersLoadingMixin
from .quantization import FiniteScalarQuantizer


def check_pixel_values(pixel_values: torch.Tensor, in_channels: int, factor: int) -> None:
    """Raise a `ValueError` unless they are floats `(batch, in_channels, *, *)` with sides that `factor` divides."""
    check_tensor(pixel_values, "pixel_values")
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != in_channels:
        raise ValueError(f"`pixel_values` must have shape (batch, {in_channels}, height, width), got {shape}.")
    if shape[2] % factor or shape[3] % factor or 0 in shape:
        raise ValueError(
            f"The height and width of `pixel_values` must be positive multiples of the downsampling factor {factor}, "
            f"got shape {shape}: resize or crop the images."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(f"`pixel_values` must be floats in [-1, 1], got a tensor of dtype {pixel_values.dtype}.")


def check_finite(values: torch.Tensor, what: str, tokenizer: ModelMixin) -> None:
    """Raise a `ValueError` unless all of what a tokenizer has made are numbers: NaN would become a picture."""
    if not torch.isfinite(values).all():
        raise ValueError(
            f"The {what} of the tokenizer, {type(tokenizer).__name__} in {tokenizer.dtype}, are not finite: it "
            "overflows in this dtype, or its weights or what it was given hold NaN or infinity."
        )


# All fields but the first have a default: accelerate rebuilds outputs from a dict, which `BaseOutput` then takes.
@dataclass
class AutoencoderIFSQEncoderOutput(BaseOutput):
    """
    Output of [`AutoencoderIFSQ.encode`].

    Args:
        codes (`torch.Tensor` of shape `(batch, d, height / f, width / f)`): quantized values in [-1, 1].
        indices (`torch.Tensor` of shape `(batch, height / f, width / f)`): int64 token ids in [0, codebook_size).
        unquantized (`torch.Tensor` of the shape of `codes`): the unbounded latent that was quantized.
    """

    codes: torch.Tensor
    indices: torch.Tensor | None = None
    unquantized: torch.Tensor | None = None


@dataclass
class AutoencoderIFSQOutput(BaseOutput):
    """
    Output of [`AutoencoderIFSQ.forward`].

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): reconstruction, about in [-1, 1].
        codes, indices (`torch.Tensor`): as of [`AutoencoderIFSQEncoderOutput`].
    """

    sample: torch.Tensor
    codes: torch.Tensor | None = None
    indices: torch.Tensor | None = None


class AutoencoderIFSQ(DiffusersLoadingMixin, ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    r"""
    Convolutional autoencoder whose bottleneck is finite scalar quantization with the iFSQ bound
    (https://arxiv.org/abs/2601.17124). Its `indices` feed an autoregressive generator, its `codes` a diffusion model.
    Encoder and decoder are those of [`~diffusers.AutoencoderKL`] and [`~diffusers.VQModel`], without attention.
    The defaults are the paper's model with a downsampling factor `f = 2 ** (len(block_out_channels) - 1) = 16` and
    4 bits in each of 4 dimensions.

    Args:
        in_channels (`int`, *optional*, defaults to 3): channels of the input image, 1 for grey images.
        out_channels (`int`, *optional*, defaults to 3): channels of the reconstruction.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(128, 128, 256, 512, 512)`):
            width of each resolution; every one but the last is followed by a halving of the resolution.
        layers_per_block (`int`, *optional*, defaults to 2): residual blocks at each resolution of the encoder.
        norm_num_groups (`int`, *optional*, defaults to 32): groups of the group normalizations.
        z_channels (`int`, *optional*, defaults to `len(levels)`):
            channels between decoder and quantizer; between encoder and quantizer there are twice as many.
        levels (`tuple[int, ...]`, *optional*, defaults to `(17, 17, 17, 17)`):
            levels of each of the `d` channels of the codes.
        alpha, bound, equal_bins, noise_prob: further options of the [`FiniteScalarQuantizer`].
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 256):
            height and width in pixels of the images trained on, and of a tile.
        scaling_factor (`float`, *optional*, defaults to 1.0):
            what a diffusion model multiplies codes by: the inverse of their standard deviation over the training set.

    Example:

    ```python
    >>> import torch
    >>> from hf_ifsq import AutoencoderIFSQ

    >>> tokenizer = AutoencoderIFSQ(block_out_channels=(32, 32, 64), layers_per_block=1, sample_size=32)
    >>> encoded = tokenizer.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    >>> encoded.codes.shape, encoded.indices.shape
    (torch.Size([2, 4, 8, 8]), torch.Size([2, 8, 8]))
    >>> tokenizer.decode_indices(encoded.indices).sample.shape
    torch.Size([2, 3, 32, 32])

    ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D"]  # type: ignore[assignment]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

    # Share of a tile that overlaps with the next one.
    tile_overlap_factor = 0.25

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        z_channels: int | None = None,
        levels: tuple[int, ...] = (17, 17, 17, 17),
        alpha: float = 1.6,
        sample_size: int | tuple[int, int] = 256,
        scaling_factor: float = 1.0,
        bound: str = "sigmoid",
        equal_bins: bool = False,
        noise_prob: float = 0.0,
    ):
        super().__init__()
        # It checks the options that the other parts are built by.
        quantizer = FiniteScalarQuantizer(levels, alpha, bound, equal_bins, noise_prob)
        z_channels = len(levels) if z_channels is None else z_channels
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "z_channels": z_channels}
        sizes.update(layers_per_block=layers_per_block, norm_num_groups=norm_num_groups)
        for name, size in sizes.items():
            check_integer(size, name)
        check_integers(block_out_channels, "block_out_channels")
        if any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(
                f"`block_out_channels` must be multiples of `norm_num_groups` {norm_num_groups}, got "
                f"{list(block_out_channels)}."
            )
        check_positive(scaling_factor, "scaling_factor")
        self.downsampling_factor = 2 ** (len(block_out_channels) - 1)
        self.grid_size = token_grid(sample_size, self.downsampling_factor)
        depth = len(block_out_channels)
        blocks: dict[str, Any] = {
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": False,
        }
        self.encoder = Encoder(in_channels, z_channels, down_block_types=("DownEncoderBlock2D",) * depth, **blocks)
        self.quant_conv = nn.Conv2d(2 * z_channels, len(levels), 1)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(len(levels), z_channels, 1)
        self.decoder = Decoder(z_channels, out_channels, up_block_types=("UpDecoderBlock2D",) * depth, **blocks)
        self.use_slicing = False
        self.use_tiling = False

    @property
    def codebook_size(self) -> int:
        """Number of different indices."""
        return self.quantizer.codebook_size

    @apply_forward_hook
    def encode(
        self, pixel_values: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderIFSQEncoderOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Encode images into `codes`, their `indices`, and `unquantized`, the latent before.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, in_channels, height, width)`):
                images in [-1, 1]; height and width are multiples of the downsampling factor.
            return_dict (`bool`, *optional*, defaults to `True`): whether to return a named output or a plain tuple.
        """
        check_has_values(pixel_values, "pixel_values")
        self._check_dtype(pixel_values, "pixel_values")
        latent = self._encode(pixel_values)
        if not torch.compiler.is_compiling() and not torch.isfinite(latent).all():
            if torch.isfinite(pixel_values).all():
                raise ValueError(
                    f"The latents are not finite: the encoder overflows in {self.dtype}, or its weights are not "
                    "finite (NaN or infinity)."
                )
            raise ValueError("`pixel_values` is not finite (NaN or infinity): there is nothing to quantize.")
        codes, indices = self.quantizer(latent)
        if not return_dict:
            return codes, indices, latent
        return AutoencoderIFSQEncoderOutput(codes=codes, indices=indices, unquantized=latent)

    @apply_forward_hook
    def decode(self, codes: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Decode codes `(batch, d, height / f, width / f)`, or any other values in [-1, 1], into images: a
        [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple` with `sample` of shape `(batch, out_channels,
        height, width)`, about in [-1, 1].
        """
        check_has_values(codes, "codes")
        if codes.ndim != 4 or codes.shape[1] != len(self.quantizer.levels) or 0 in codes.shape:
            raise ValueError(
                f"`codes` must have shape (batch, {len(self.quantizer.levels)}, height, width), got "
                f"{tuple(codes.shape)}."
            )
        if not codes.is_floating_point():
            raise ValueError(f"`codes` must be floats in [-1, 1], got a tensor of dtype {codes.dtype}.")
        self._check_dtype(codes, "codes")
        if not torch.compiler.is_compiling() and not torch.isfinite(codes).all():
            raise ValueError("`codes` is not finite (NaN or infinity): there is nothing to decode.")
        sample = self._decode(codes)
        if not torch.compiler.is_compiling():
            check_finite(sample, "decoded images", self)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_indices(self, indices: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode token ids `(batch, height / f, width / f)`, integers in [0, codebook_size), as `decode` codes."""
        check_tensor(indices, "indices")
        if indices.ndim != 3:
            raise ValueError(f"`indices` must have shape (batch, height, width), got {tuple(indices.shape)}.")
        return self.decode(self.quantizer.indices_to_codes(indices, dtype=self.dtype), return_dict=return_dict)

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool = True, uniforms: torch.Tensor | None = None
    ) -> AutoencoderIFSQOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Encode and decode images, as `encode` takes them, into `sample`, `codes` and `indices`; gradients pass straight
        through the rounding, and `uniforms` go to the [`FiniteScalarQuantizer`]. No value is read back from the
        device: what is not finite comes out as it is.
        """  # noqa: D205
        codes, indices = self.quantizer(self._encode(pixel_values), uniforms)
        sample = self._decode(codes)
        if not return_dict:
            return sample, codes, indices
        return AutoencoderIFSQOutput(sample=sample, codes=codes, indices=indices)

    def _check_dtype(self, values: torch.Tensor, name: str) -> None:
        compared = values.is_floating_point() and not torch.compiler.is_compiling()
        if compared and values.dtype != self.dtype and not torch.is_autocast_enabled(values.device.type):
            raise ValueError(f"`{name}` has dtype {values.dtype}, but the model {self.dtype}: cast one of them.")

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        factor = self.downsampling_factor
        check_pixel_values(pixel_values, self.config["in_channels"], factor)
        return self._sliced(lambda images: self.quant_conv(self.encoder(images)), pixel_values, factor, 1)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self._sliced(lambda part: self.decoder(self.post_quant_conv(part)), codes, 1, self.downsampling_factor)

    def _sliced(
        self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, scale_in: int, scale_out: int
    ) -> torch.Tensor:
        if self.use_slicing and len(batch) > 1:
            return torch.cat([self._tiled(function, row, scale_in, scale_out) for row in batch.split(1)])
        return self._tiled(function, batch, scale_in, scale_out)

    def _tiled(
        self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, scale_in: int, scale_out: int
    ) -> torch.Tensor:
        """
        With tiling on, apply `function` to overlapping tiles of the size of `grid_size` and average them, with weights
        that fall off linearly towards the edges of a tile. Sizes are counted in cells of the token grid; a cell is
        `scale_in` values wide in the input of `function` and `scale_out` in its output.
        """  # noqa: D205
        rows, columns = (size // scale_in for size in batch.shape[-2:])
        tile_rows, tile_columns = self.grid_size
        if not self.use_tiling or (rows <= tile_rows and columns <= tile_columns):
            return function(batch)

        def window(start: tuple[int, int], scale: int) -> tuple[EllipsisType | slice, ...]:
            ends = zip(start, self.grid_size)
            return (..., *[slice(first * scale, (first + length) * scale) for first, length in ends])

        starts = list(product(self._tile_starts(rows, tile_rows), self._tile_starts(columns, tile_columns)))
        parts = [function(batch[window(start, scale_in)]) for start in starts]
        # In float32: the sum of the weights would overflow or be rounded in half precision.
        weights = torch.zeros(rows * scale_out, columns * scale_out, device=batch.device)
        total = weights.repeat(*parts[0].shape[:2], 1, 1)
        for start, part in zip(starts, parts):
            ramps = [torch.arange(1, side + 1.0, device=part.device) for side in part.shape[-2:]]
            weight = torch.outer(*[torch.minimum(ramp, ramp.flip(0)) for ramp in ramps])
            total[window(start, scale_out)] += part * weight
            weights[window(start, scale_out)] += weight
        return (total / weights).to(parts[0].dtype)

    def _tile_starts(self, size: int, tile: int) -> list[int]:
        """Starts of the tiles along one side; the last tile ends where the side ends."""
        if size <= tile:
            return [0]
        return [*range(0, size - tile, max(1, round(tile * (1 - self.tile_overlap_factor)))), size - tile]


# `AutoModel` of diffusers looks up the class that a config names in diffusers itself.
diffusers.AutoencoderIFSQ = AutoencoderIFSQ  # type: ignore[attr-defined]
