"""The transformer layers of the AR model."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ifsq_ar import IFSQARConfig
from .rotary import apply_rotary_2d


class KeyValues(Protocol):
    """What attention asks of a cache, be it one of transformers' or a decoder's."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new states, `(batch, heads, positions, head_dim)`, and return all that there are to attend to."""


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain matrix products, behind `attn_implementation="eager"`."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class IFSQARAttention(nn.Module):
    """Causal self-attention with two-dimensional rotary positions."""

    def __init__(self, config: IFSQARConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: KeyValues | None,
    ) -> torch.Tensor:
        """`(batch, sequence, hidden_size)` to the same."""
        batch, sequence, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, sequence, 3, self.num_heads, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        query, key = apply_rotary_2d(qkv[:2], *position_embeddings)
        value = qkv[2]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attn_output, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(attn_output.reshape(batch, sequence, -1))


class IFSQARMLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: IFSQARConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` to the same."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class IFSQARDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer with dropout on both residual branches."""

    def __init__(self, config: IFSQARConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = IFSQARAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = IFSQARMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: KeyValues | None = None,
    ) -> torch.Tensor:
        """`(batch, sequence, hidden_size)` to the same."""
        attn_output = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values
        )
        hidden_states = hidden_states + self.dropout(attn_output)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: KeyValues | None = None,
) -> tuple[torch.Tensor, ...]:
    """What goes into layers one after another, `(batch, sequence, hidden_size)`, and the output of each."""
    states = [hidden_states]
    for layer in layers:
        hidden_states = layer(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        states.append(hidden_states)
    return tuple(states)


class Decoder(nn.Module):
    """
    Layers that run one position of a sequence at a time, with the keys and values of the positions before it in memory
    that is allocated once, as in gpt-fast (https://github.com/pytorch-labs/gpt-fast).

    As it is made, attention reads what was written so far alone. After `setup` it reads the whole memory behind a
    mask, and neither shapes nor addresses change: what compilers and CUDA graphs need.

    Args:
        layers (`torch.nn.ModuleList`): decoder layers, which stay the model's own.
        rotary (`tuple[torch.Tensor, torch.Tensor]`): cosines and sines of each position, `(length, head_dim)`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    position: torch.Tensor
    mask: torch.Tensor | None

    def __init__(self, layers: nn.ModuleList, rotary: tuple[torch.Tensor, torch.Tensor]):
        super().__init__()
        # Not registered: neither weights nor hooks are the decoder's.
        self.layers = tuple(layers)
        for name, part in zip(("cos", "sin"), rotary, strict=True):
            self.register_buffer(name, part, persistent=False)
        self.register_buffer("position", torch.zeros(1, dtype=torch.long, device=self.cos.device), persistent=False)
        self.register_buffer("mask", None, persistent=False)
        self.readable = 0

    def setup(self, rows: int, num_heads: int, dtype: torch.dtype) -> None:
        """Allocate the memory for all layers, each on its device, for `rows` rows at most."""
        self.readable, head_dim = self.cos.shape
        for layer_idx, layer in enumerate(self.layers):
            device = next(layer.parameters()).device
            self._allocate(layer_idx, torch.empty(rows, num_heads, 1, head_dim, dtype=dtype, device=device))
        mask = torch.full((self.readable, self.readable), -torch.inf, dtype=dtype, device=self.cos.device)
        self.mask = mask.triu(1)[None, None]

    def reset(self) -> None:
        """Forget what was written: behind a mask, NaN would still spread."""
        for name, memory in self.named_buffers():
            if name.startswith("memory"):
                memory.zero_()

    def step(self, hidden_states: torch.Tensor, position: int) -> torch.Tensor:
        """Run `(rows, 1, hidden_size)` at a position through the layers, after all positions before it."""
        self.position.fill_(position)
        if self.mask is None:
            self.readable = position + 1
        return self(hidden_states)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What is compiled: `(rows, 1, hidden_size)` to the same, at `position`."""
        cos, sin = self.cos[self.position], self.sin[self.position]
        mask = None if self.mask is None else self.mask[:, :, self.position]
        return run_layers(self.layers, hidden_states, (cos, sin), mask, self)[-1]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Write `(rows, heads, 1, head_dim)` at `position` and return what attention reads. Fewer rows than before are
        the first of them.
        """
        if not hasattr(self, f"memory_{layer_idx}"):
            self._allocate(layer_idx, key)
        keys, values = getattr(self, f"memory_{layer_idx}")[:, : len(key)]
        position = self.position.to(key.device)
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        return keys[:, :, : self.readable], values[:, :, : self.readable]

    def _allocate(self, layer_idx: int, like: torch.Tensor) -> None:
        rows, num_heads, _, head_dim = like.shape
        memory = like.new_zeros(2, rows, num_heads, len(self.cos), head_dim)
        self.register_buffer(f"memory_{layer_idx}", memory, persistent=False)
