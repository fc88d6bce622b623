"""The diffusion backbone: a diffusion transformer that predicts the velocity of flow matching."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F

from ..guidance import drop_labels
from .checks import (
    as_class_names,
    as_ids,
    check_choice,
    check_flag,
    check_integer,
    check_integers,
    check_number,
    check_positive,
    check_tensor,
)
from .grid import as_grid
from .loading import DiffusersLoadingMixin
from .quantization import MAX_LEVEL
from .rotary import apply_rotary_2d, rotary_table_2d


# Blocks, attention heads and channels of a head of the models of DiT (https://arxiv.org/abs/2212.09748, table 1).
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}


@dataclass
class IFSQDiTOutput(BaseOutput):
    """
    Output of [`IFSQDiTTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): the velocity, data minus noise.
        hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
            the embedded patches and the output of each block, `(batch, patches, hidden_size)`, in raster order.
    """

    sample: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


def _norm(norm_type: str, size: int) -> nn.Module:
    if norm_type == "rms_norm":
        return nn.RMSNorm(size, eps=1e-6)
    return nn.LayerNorm(size, eps=1e-6, elementwise_affine=False)


def _qk_norm(norm_type: str | None, size: int) -> nn.Module:
    if norm_type == "layer_norm":
        # The official code gives it weights and PyTorch's default epsilon.
        return nn.LayerNorm(size)
    return nn.RMSNorm(size, eps=1e-6) if norm_type == "rms_norm" else nn.Identity()


def _modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift[:, None], hidden_states, 1 + scale[:, None])


class IFSQDiTAttention(nn.Module):
    """Bidirectional self-attention with two-dimensional rotary positions and normalized queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm_q = _qk_norm(qk_norm, hidden_size // num_heads)
        self.norm_k = _qk_norm(qk_norm, hidden_size // num_heads)
        self.to_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """`(batch, patches, hidden_size)` to the same."""
        query, key, value = self.to_qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        # Heads come before patches only after the norms, which run through memory in its order.
        query = apply_rotary_2d(self.norm_q(query).transpose(1, 2), *rotary)
        key = apply_rotary_2d(self.norm_k(key).transpose(1, 2), *rotary)
        attended = F.scaled_dot_product_attention(query, key, value.transpose(1, 2))
        return self.to_out(attended.transpose(1, 2).flatten(2))


class IFSQDiTFeedForward(nn.Module):
    """SwiGLU, or the two-layer perceptron with a tanh-approximated GELU of the original DiT."""

    def __init__(self, hidden_size: int, inner_size: int, activation_fn: str):
        super().__init__()
        self.gated = activation_fn == "swiglu"
        inner_size = 2 * inner_size // 3 if self.gated else inner_size
        self.proj_in = nn.Linear(hidden_size, 2 * inner_size if self.gated else inner_size)
        self.proj_out = nn.Linear(inner_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, patches, hidden_size)` to the same."""
        hidden_states = self.proj_in(hidden_states)
        if self.gated:
            gate, hidden_states = hidden_states.chunk(2, dim=-1)
            return self.proj_out(F.silu(gate) * hidden_states)
        return self.proj_out(F.gelu(hidden_states, approximate="tanh"))


class IFSQDiTBlock(nn.Module):
    """Transformer block modulated by the condition (adaLN-zero, https://arxiv.org/abs/2212.09748)."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        inner_size: int,
        norm_type: str,
        qk_norm: str | None,
        activation_fn: str,
    ):
        super().__init__()
        self.norm1 = _norm(norm_type, hidden_size)
        self.attn = IFSQDiTAttention(hidden_size, num_heads, qk_norm)
        self.norm2 = _norm(norm_type, hidden_size)
        self.ff = IFSQDiTFeedForward(hidden_size, inner_size, activation_fn)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, condition: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """`(batch, patches, hidden_size)` to the same; `condition` is `(batch, hidden_size)`."""
        parts = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = parts
        attended = self.attn(_modulate(self.norm1(hidden_states), shift_attn, scale_attn), rotary)
        hidden_states = torch.addcmul(hidden_states, gate_attn[:, None], attended)
        fed = self.ff(_modulate(self.norm2(hidden_states), shift_ff, scale_ff))
        return torch.addcmul(hidden_states, gate_ff[:, None], fed)


class IFSQDiTTransformer2DModel(DiffusersLoadingMixin, ModelMixin, ConfigMixin):  # type: ignore[misc]
    r"""
    Class-conditional diffusion transformer over the codes of an image tokenizer, as in iFSQ's DiT
    (https://arxiv.org/abs/2601.17124). On the straight path `x_t = t * x_1 + (1 - t) * x_0` from noise `x_0` to scaled
    codes `x_1` it predicts the velocity `x_1 - x_0`.

    Args:
        sample_size (`int` or `tuple[int, int]`, *optional*, defaults to 16): rows and columns of the latents.
        patch_size (`int`, *optional*, defaults to 1): side of the square of latents that makes a token.
        in_channels (`int`, *optional*, defaults to 4): channels of the latents.
        num_layers (`int`, *optional*, defaults to 12): number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 12): attention heads of each block.
        attention_head_dim (`int`, *optional*, defaults to 64):
            channels of a head, a multiple of 4; the hidden size is `num_attention_heads * attention_head_dim`.
        num_classes (`int`, *optional*, defaults to 1000): number of class labels; `num_classes` is the null class.
        class_dropout_prob (`float`, *optional*, defaults to 0.1):
            probability in training of replacing a label by the null class, for classifier-free guidance.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            width of the feed-forward layers over the hidden size; with SwiGLU two thirds of that.
        norm_type (`str`, *optional*, defaults to `"rms_norm"`): `"rms_norm"`, or `"layer_norm"` without weights.
        qk_norm (`str`, *optional*, defaults to `"rms_norm"`):
            normalization of queries and keys: `"rms_norm"`, `"layer_norm"` or `None`.
        activation_fn (`str`, *optional*, defaults to `"swiglu"`): `"swiglu"` or `"gelu-approximate"`.
        id2label (`dict[int, str]`, *optional*):
            names of the classes. With another `num_classes` alone, `from_pretrained` does not keep those of before.
        levels (`tuple[int, ...]`, *optional*), scaling_factor (`float`, *optional*), equal_bins (`bool`, *optional*):
            those of the tokenizer that the model was trained with, if it is quantized; a pipeline refuses another one.

    Example:

    ```python
    >>> import torch
    >>> from hf_ifsq import IFSQDiTTransformer2DModel

    >>> model = IFSQDiTTransformer2DModel(sample_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=16)
    >>> model(torch.randn(2, 4, 4, 4), timestep=torch.rand(2), class_labels=torch.tensor([3, 7])).sample.shape
    torch.Size([2, 4, 4, 4])

    ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["IFSQDiTBlock"]  # type: ignore[assignment]
    _repeated_blocks = ["IFSQDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        mlp_ratio: float = 4.0,
        norm_type: str = "rms_norm",
        qk_norm: str | None = "rms_norm",
        activation_fn: str = "swiglu",
        id2label: dict[int, str] | None = None,
        levels: tuple[int, ...] | None = None,
        scaling_factor: float | None = None,
        equal_bins: bool | None = None,
    ):
        super().__init__()
        _check_config(self.config)
        if id2label is not None:
            # JSON turns integer keys into strings.
            self.register_to_config(id2label=as_class_names(id2label, num_classes))
        # As they come back from JSON.
        for name in ("sample_size", "levels"):
            if isinstance(self.config[name], tuple):
                self.register_to_config(**{name: list(self.config[name])})
        hidden_size = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, hidden_size)
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        block = (hidden_size, num_attention_heads, int(mlp_ratio * hidden_size), norm_type, qk_norm, activation_fn)
        self.blocks = nn.ModuleList([IFSQDiTBlock(*block) for _ in range(num_layers)])
        self.norm_out = _norm(norm_type, hidden_size)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self._init_weights()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A model of a config, with random weights; `kwargs` override the config."""
        if isinstance(config, Mapping) and kwargs.get("num_classes", config.get("num_classes")) != config.get(
            "num_classes"
        ):
            # The names of other classes.
            kwargs.setdefault("id2label", None)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "IFSQDiTTransformer2DModel":
        """
        A model of a named size of DiT with its patch size, such as `"L/1"` or `"XL/2"`, and random weights. Further
        arguments of the class override those of the size.
        """
        names = [f"{name}/{patch_size}" for name in SIZES for patch_size in (1, 2)]
        check_choice(size, "size", names)
        name, patch_size = size.split("/")
        sizes = zip(("num_layers", "num_attention_heads", "attention_head_dim"), SIZES[name], strict=True)
        return cls(**{"patch_size": int(patch_size), **dict(sizes), **kwargs})

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        class_dropout_mask: torch.Tensor | None = None,
    ) -> IFSQDiTOutput | tuple:
        """
        Predict the velocity at a point of the path.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): noisy latents `x_t`.
            timestep (`torch.Tensor` of shape `(batch,)`): `t` in [0, 1], unchecked: 0 for noise, 1 for data.
            class_labels (`torch.LongTensor` of shape `(batch,)`): ids in [0, num_classes].
            output_hidden_states (`bool`, *optional*, defaults to `False`): whether to return each block's output.
            return_dict (`bool`, *optional*, defaults to `True`): whether to return a named output or a plain tuple.
            class_dropout_mask (`torch.BoolTensor` of shape `(batch,)`, *optional*):
                the labels that training replaces by the null class; by default a random share.
        """
        class_labels = self._check_inputs(hidden_states, timestep, class_labels)
        patch_size = self.config["patch_size"]
        grid = (hidden_states.shape[2] // patch_size, hidden_states.shape[3] // patch_size)
        device = hidden_states.device

        hidden_states = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)
        # In the dtype of the weights, not of the convolution's output: under autocast the residual stream is float32.
        dtype = self.patch_embed.weight.dtype
        hidden_states = hidden_states + self._fixed_positions(grid, device).to(dtype)
        rotary = rotary_table_2d(grid, self.config["attention_head_dim"], device=device)
        time = self.time_embed(self.time_features(timestep).to(dtype))
        if self.training:
            probability, null_label = self.config["class_dropout_prob"], self.config["num_classes"]
            class_labels = drop_labels(class_labels, probability, null_label, class_dropout_mask)
        condition = time + self.class_embed(class_labels)

        collected = [hidden_states] if output_hidden_states else []
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, condition, rotary)
            else:
                hidden_states = block(hidden_states, condition, rotary)
            if output_hidden_states:
                collected.append(hidden_states)

        shift, scale = self.modulation_out(F.silu(condition)).chunk(2, dim=-1)
        patches = self.proj_out(_modulate(self.norm_out(hidden_states), shift, scale))
        # (batch, rows * columns, p * p * channels) to (batch, channels, rows * p, columns * p)
        patches = patches.unflatten(1, grid).unflatten(-1, (patch_size, patch_size, -1))
        sample = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        output = IFSQDiTOutput(sample=sample, hidden_states=tuple(collected) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()

    def _fixed_positions(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Sine-cosine positions, `(rows * columns, hidden_size)`: the first half of the channels is the column."""
        rows, columns = torch.meshgrid(*[torch.arange(size, device=device) for size in grid], indexing="ij")
        hidden_size = self.config["num_attention_heads"] * self.config["attention_head_dim"]
        return get_2d_sincos_pos_embed_from_grid(hidden_size, torch.stack([columns, rows])).float()

    def _init_weights(self) -> None:
        """As in DiT: Xavier weights, small embeddings, and zeros where a block or the model begins as the identity."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.get_parameter("bias"))
        for weight in (self.class_embed.weight, self.time_embed.linear_1.weight, self.time_embed.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        modulations = [block.get_submodule("modulation") for block in self.blocks]
        for layer in (self.proj_out, self.modulation_out, *modulations):
            nn.init.zeros_(layer.get_parameter("weight"))

    def _check_inputs(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """What can be said without reading a value; gives the class labels as int64."""
        inputs = {"hidden_states": hidden_states, "timestep": timestep}
        for name, values in inputs.items():
            check_tensor(values, name)
            if not values.is_floating_point():
                raise ValueError(f"`{name}` must be floating-point numbers, got a tensor of dtype {values.dtype}.")
        class_labels = as_ids(class_labels, "class_labels")
        dtype, device_type = self.patch_embed.weight.dtype, hidden_states.device.type
        if hidden_states.dtype != dtype and not torch.is_autocast_enabled(device_type):
            raise ValueError(
                f"`hidden_states` has dtype {hidden_states.dtype}, but the model {dtype}: cast one of them."
            )
        channels, patch_size = self.config["in_channels"], self.config["patch_size"]
        shape = tuple(hidden_states.shape)
        if len(shape) != 4 or shape[1] != channels or 0 in shape or shape[2] % patch_size or shape[3] % patch_size:
            raise ValueError(
                f"`hidden_states` must have shape (batch, {channels}, height, width) with sides that are multiples of "
                f"the patch size {patch_size}, got {shape}."
            )
        for name, values in (("timestep", timestep), ("class_labels", class_labels)):
            if tuple(values.shape) != shape[:1]:
                raise ValueError(f"`{name}` must have shape ({shape[0]},), one per image, got {tuple(values.shape)}.")
        return class_labels


def _check_config(config: Mapping[str, Any]) -> None:
    check_choice(config["norm_type"], "norm_type", ("rms_norm", "layer_norm"))
    check_choice(config["qk_norm"], "qk_norm", ("rms_norm", "layer_norm", None))
    check_choice(config["activation_fn"], "activation_fn", ("swiglu", "gelu-approximate"))
    check_choice(config["patch_size"], "patch_size", (1, 2))
    for name in ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "num_classes"):
        check_integer(config[name], name)
    size, patch_size, head_dim = (config[name] for name in ("sample_size", "patch_size", "attention_head_dim"))
    if head_dim % 4:
        raise ValueError(
            f"`attention_head_dim` must be a multiple of 4, for rotary positions in two dimensions, got {head_dim}."
        )
    if any(side % patch_size for side in as_grid(size)):
        raise ValueError(f"`sample_size` must be a multiple of `patch_size` {patch_size}, got {size}.")
    check_number(config["class_dropout_prob"], "class_dropout_prob", 0, 1, below=True)
    # At least one channel of the feed-forward layers, of two thirds of which are gates.
    check_number(config["mlp_ratio"], "mlp_ratio", 2 / head_dim, 2**10)
    levels, channels = config["levels"], config["in_channels"]
    if levels is not None:
        check_integers(levels, "levels", minimum=2, maximum=MAX_LEVEL)
        if len(levels) != channels:
            raise ValueError(f"`levels` must be one for each of the {channels} `in_channels`, got {list(levels)}.")
    if config["scaling_factor"] is not None:
        check_positive(config["scaling_factor"], "scaling_factor")
    if config["equal_bins"] is not None:
        check_flag(config["equal_bins"], "equal_bins")


# `AutoModel` of diffusers looks up the class that a config names in diffusers itself.
diffusers.IFSQDiTTransformer2DModel = IFSQDiTTransformer2DModel  # type: ignore[attr-defined]
