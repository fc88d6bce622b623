"""The layers of the AR model: embeddings, transformer layers, the loss of a head, and decoding."""

import functools
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ifsq_ar import IFSQARConfig
from .rotary import apply_rotary_2d


# Scores that exist at a time in the training of a head: 256 MiB in float32.
MAX_SCORES = 2**26


def split_indices(indices: torch.Tensor, vocab_sizes: Sequence[int]) -> list[torch.Tensor]:
    """Split whole indices, int64, into their factors, mixed radix, the least significant first."""
    factors = []
    for size in vocab_sizes[:-1]:
        factors.append(indices % size)
        indices = indices // size
    return [*factors, indices]


class FactorEmbeddings(nn.Sequential):
    """Embedding tables, one for each factor of a token; not one after another, but side by side."""

    def __init__(self, vocab_sizes: Sequence[int], hidden_size: int):
        super().__init__(*[nn.Embedding(size, hidden_size) for size in vocab_sizes])
        self.vocab_sizes = list(vocab_sizes)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of whole token ids, of a shape with `hidden_size` added: the sum over their factors."""
        factors = split_indices(input_ids.long(), self.vocab_sizes)
        return functools.reduce(torch.add, [table(factor) for table, factor in zip(self, factors, strict=True)])

    def embed_factor(self, position: int, values: torch.Tensor) -> torch.Tensor:
        """Embeddings of values of one factor, of a shape with `hidden_size` added."""
        return self[position](values)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain matrix products, behind `attn_implementation="eager"`."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
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
        attention_mask: torch.Tensor | BlockMask | None,
        past_key_values: "Cache | Decoder | None",
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
        # The config has put a number where there was none.
        intermediate_size = cast(int, config.intermediate_size)
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

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
        attention_mask: torch.Tensor | BlockMask | None = None,
        past_key_values: "Cache | Decoder | None" = None,
    ) -> torch.Tensor:
        """`(batch, sequence, hidden_size)` to the same."""
        normed = self.input_layernorm(hidden_states)
        attn_output = self.self_attn(normed, position_embeddings, attention_mask, past_key_values)
        hidden_states = hidden_states + self.dropout(attn_output)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | BlockMask | None = None,
    past_key_values: "Cache | Decoder | None" = None,
    outputs: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """`(batch, sequence, hidden_size)` through layers one after another; `outputs` takes in the output of each."""
    for layer in layers:
        hidden_states = layer(hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values)
        if outputs is not None:
            outputs.append(hidden_states)
    return hidden_states


def linear_cross_entropy(head: nn.Linear, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Mean cross-entropy in nats, a float32 scalar, of a linear head that reads `(rows, hidden_size)`, for targets
    `(rows,)` in [0, vocab_size), or -100 for rows that do not count. The scores, over a codebook of 83,521 the largest
    tensors of a training step by far, are computed some rows at a time, and once more for the gradients.
    """
    device_type = hidden_states.device.type
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def summed_losses(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # With its cache, autocast would add up the gradients of all parts in low precision.
        with torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=False):
            scores = head(states)
        return F.cross_entropy(scores.float(), ids, reduction="sum")

    rows = max(1, MAX_SCORES // head.out_features)
    if targets.shape[0] <= rows:
        total = summed_losses(hidden_states, targets)
    else:
        parts = zip(hidden_states.split(rows), targets.split(rows), strict=True)
        losses = [checkpoint(summed_losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        total = torch.stack(losses).sum()
    return total / (targets != -100).sum()


class Decoder(nn.Module):
    """
    Layers that run one position of a sequence at a time, with keys and values of all positions in memory that is
    allocated once, as in gpt-fast (https://github.com/pytorch-labs/gpt-fast). As it is made, attention reads what was
    written so far alone. After `setup` it reads the whole memory behind a mask, and neither shapes nor addresses
    change: what compilers and CUDA graphs need. `rotary` are cosines and sines of each position, `(length, head_dim)`.
    """

    def __init__(self, layers: nn.ModuleList, rotary: tuple[torch.Tensor, torch.Tensor]):
        super().__init__()
        # Neither weights nor buffers are registered: a decoder has none of its own.
        self.layers = tuple(layers)
        self.cos, self.sin = rotary
        # Where is written, and how many positions are read.
        self.position = torch.zeros(1, dtype=torch.long, device=self.cos.device)
        self.readable = len(self.cos)
        # Keys and values of each layer, `(2, rows, heads, length, head_dim)`.
        self.memory: list[torch.Tensor] = []
        self.mask: torch.Tensor | None = None
        self.max_rows = 0

    def setup(self, rows: int, num_heads: int, dtype: torch.dtype, device: torch.device) -> None:
        """Have cleared memory for `rows` rows at least, each layer's on its device; what fits stays where it is."""
        if self.mask is not None and self.max_rows >= rows and (self.mask.dtype, self.mask.device) == (dtype, device):
            for memory in self.memory:
                # NaN of an earlier sequence would spread through the mask.
                memory.zero_()
            return
        length, head_dim = self.cos.shape
        shape = (2, rows, num_heads, length, head_dim)
        devices = [next(layer.parameters()).device for layer in self.layers]
        self.max_rows, self.readable = rows, length
        self.memory = [torch.zeros(shape, dtype=dtype, device=layer_device) for layer_device in devices]
        self.position, self.cos, self.sin = (old.to(device) for old in (self.position, self.cos, self.sin))
        self.mask = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1)[None, None]
        for tensor in (self.position, self.cos, self.sin, self.mask, *self.memory):
            # CUDA graphs would copy it, and not be recorded at all if they change it.
            torch._dynamo.mark_static_address(tensor)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `(rows, heads, 1, head_dim)`, of the first rows or of all, and return what attention reads."""
        if layer_idx == len(self.memory):
            rows, num_heads, _, head_dim = key.shape
            self.memory.append(key.new_zeros(2, rows, num_heads, len(self.cos), head_dim))
        keys, values = self.memory[layer_idx][:, : len(key)]
        if self.mask is not None:
            position = self.position.to(key.device)
            return keys.index_copy_(2, position, key), values.index_copy_(2, position, value)
        here = slice(self.readable - 1, self.readable)
        keys[:, :, here], values[:, :, here] = key, value
        return keys[:, :, : self.readable], values[:, :, : self.readable]

    def step(self, hidden_states: torch.Tensor, position: int) -> torch.Tensor:
        """Run `(rows, 1, hidden_size)` at a position through the layers, after all positions before it."""
        self.position.fill_(position)
        if self.mask is None:
            self.readable = position + 1
        return self(hidden_states)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What `compile` compiles: `(rows, 1, hidden_size)` to the same."""
        rotary = (self.cos[self.position], self.sin[self.position])
        mask = None if self.mask is None else self.mask[:, :, self.position]
        return run_layers(self.layers, hidden_states, rotary, mask, self)
