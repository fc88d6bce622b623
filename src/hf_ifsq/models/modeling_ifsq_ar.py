"""The autoregressive generator: LlamaGen (https://arxiv.org/abs/2406.06525) over one or several factors a token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, initialization
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ifsq_ar import IFSQARConfig
from .generation_ifsq_ar import IFSQARGenerationMixin, preallocated_cache
from .linear import Linear, linear_cross_entropy
from .loading import StrictLoadingMixin
from .rotary import apply_rotary_2d, rotary_table_2d


@dataclass
class IFSQAROutput(ModelOutput):
    """
    Output of [`IFSQARForImageGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`):
            mean cross-entropy in nats, summed over the factors.
        factor_losses (`tuple[torch.Tensor]`, *optional*, returned with `labels`): the terms of that sum.
        logits (`torch.Tensor` of shape `(batch, sequence, vocab_size)` or `tuple[torch.Tensor]`, *optional*):
            scores of the next token before the softmax; a tuple with one tensor a factor if there are several. `None`
            in training mode with `labels`, where the loss is computed without ever holding all of them.
        past_key_values ([`~transformers.Cache`], *optional*): keys and values seen so far.
        hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
            the embeddings and the output of each layer, `(batch, sequence, hidden_size)`. Position i is the one that
            predicts token i.
    """

    loss: torch.Tensor | None = None
    factor_losses: tuple[torch.Tensor, ...] | None = None
    logits: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


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
        self.qkv_proj = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
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
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

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
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """`(batch, sequence, hidden_size)` to the same."""
        attn_output = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values
        )
        hidden_states = hidden_states + self.dropout(attn_output)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class IFSQARDecoderLayers(nn.ModuleList):
    """Layers one after another: those over the grid, or those over the factors of a token."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """`(batch, sequence, hidden_size)` to the same, and if asked for, what goes in and each layer's output."""
        collected = (hidden_states,) if output_hidden_states else None
        for layer in self:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
            if collected is not None:
                collected += (hidden_states,)
        return hidden_states, collected


class IFSQAROutputHead(Linear):
    """Starts at zero: as in LlamaGen, training begins with uniform predictions."""


class IFSQARPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """Weight initialization, loading and saving."""

    config: IFSQARConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["IFSQARDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, IFSQAROutputHead):
            initialization.zeros_(module.weight)
        else:
            super()._init_weights(module)


class IFSQARModel(IFSQARPreTrainedModel):
    """
    The transformer over the token grid, without heads. Its sequence is the class followed by tokens in raster order;
    the output at each position is the residual stream, not yet normalized.

    Args:
        config ([`IFSQARConfig`]): sizes of the model.
    """

    # A whole generator's checkpoint also loads into this part of it.
    _keys_to_ignore_on_load_unexpected = [r"^norm\.", r"^lm_heads\.", r"^factor_layers\."]

    def __init__(self, config: IFSQARConfig):
        super().__init__(config)
        # The row after the last class is the null class. Without class dropout it would never be trained.
        num_rows = config.num_classes + (config.class_dropout_prob > 0)
        self.embed_classes = nn.Embedding(num_rows, config.hidden_size)
        self.embed_tokens = nn.ModuleList([nn.Embedding(size, config.hidden_size) for size in config.vocab_sizes])
        self.dropout = nn.Dropout(config.dropout)
        self.layers = IFSQARDecoderLayers(
            [IFSQARDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.ModuleList:
        """The embedding tables, one a factor."""
        return self.embed_tokens

    def rotary_table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Cosines and sines for every position of the sequence, `(1 + num_tokens, head_dim)` each. The class comes first,
        with a row of zeros: as in LlamaGen, its query and key vanish. Computed from the config, so that nothing is
        lost in `from_pretrained` and nothing rounded when the model is cast.
        """
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        table = rotary_table_2d(tuple(self.config.grid_size), head_dim, self.config.rope_theta, device)
        cos, sin = (F.pad(part, (0, 0, 1, 0)) for part in table)
        return cos, sin

    def split_indices(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Split whole indices into their factors, mixed radix, the least significant first."""
        factors = []
        for size in self.config.vocab_sizes[:-1]:
            factors.append(indices % size)
            indices = indices // size
        return [*factors, indices]

    def join_factors(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join factors into whole indices: the inverse of `split_indices`."""
        indices = factors[-1]
        for size, factor in zip(reversed(self.config.vocab_sizes[:-1]), reversed(factors[:-1]), strict=True):
            indices = indices * size + factor
        return indices

    @can_return_tuple
    def forward(
        self,
        class_labels: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                ids in [0, num_classes], put before the tokens; `num_classes` is the null class. In training a share
                of `class_dropout_prob` of them is replaced by it.
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): whole token ids.
            past_key_values ([`~transformers.Cache`], *optional*): cache of the positions before these.
            use_cache (`bool`, *optional*): whether to make a cache if there is none; by default as in the config.
            output_hidden_states (`bool`, *optional*): whether to return the embeddings and each layer's output.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPast`]: `last_hidden_state` of shape
            `(batch, positions, hidden_size)`, one position for the class, if given, and one for each token.

        Raises:
            ValueError: if neither `class_labels` nor `input_ids` is given.
        """  # noqa: D205
        hidden_states = self.dropout(self.embed(class_labels, input_ids))
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = preallocated_cache(self.config.num_hidden_layers, self.config.num_tokens)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen
        cos, sin = self.rotary_table(hidden_states.device)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=past_key_values
        )
        hidden_states, collected = self.layers(
            hidden_states,
            (cos[position_ids], sin[position_ids]),
            causal_mask,
            past_key_values,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values, hidden_states=collected
        )

    def embed(
        self, class_labels: torch.LongTensor | None = None, input_ids: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """
        Embeddings of the class, of tokens or of both, `(batch, positions, hidden_size)`; arguments and errors as in
        `forward`.
        """  # noqa: D205
        embeddings = []
        if class_labels is not None:
            if self.training and self.config.class_dropout_prob > 0:
                dropped = torch.rand(class_labels.shape, device=class_labels.device) < self.config.class_dropout_prob
                class_labels = class_labels.masked_fill(dropped, self.config.num_classes)
            embeddings.append(self.embed_classes(class_labels)[:, None])
        if input_ids is not None:
            factors = self.split_indices(input_ids)
            embeddings.append(sum(embed(factor) for embed, factor in zip(self.embed_tokens, factors, strict=True)))
        if not embeddings:
            raise ValueError("Give `class_labels`, `input_ids` or both: there is nothing to run the model on.")
        return torch.cat(embeddings, dim=1)


class IFSQARForImageGeneration(IFSQARGenerationMixin, IFSQARPreTrainedModel):
    """
    Class-conditional autoregressive generator of image tokens: [`IFSQARModel`] with one output head a factor and, for
    several factors, a small causal transformer that predicts the factors of one token one after another.

    Args:
        config ([`IFSQARConfig`]): sizes of the model.

    Example:

    ```python
    >>> import torch
    >>> from hf_ifsq import IFSQARConfig, IFSQARForImageGeneration

    >>> config = IFSQARConfig(
    ...     vocab_sizes=[9, 9], grid_size=[2, 2], hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> model = IFSQARForImageGeneration(config).eval()
    >>> indices = model.generate(torch.tensor([3, 7]), generator=torch.Generator().manual_seed(0))
    >>> indices.shape
    torch.Size([2, 4])
    >>> loss = model(torch.tensor([3, 7]), indices, labels=indices).loss

    ```
    """

    def __init__(self, config: IFSQARConfig):
        super().__init__(config)
        self.model = IFSQARModel(config)
        num_factor_layers = config.num_factor_layers if len(config.vocab_sizes) > 1 else 0
        self.factor_layers = IFSQARDecoderLayers(
            [IFSQARDecoderLayer(config, layer_idx) for layer_idx in range(num_factor_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_heads = nn.ModuleList(
            [IFSQAROutputHead(config.hidden_size, size, bias=False) for size in config.vocab_sizes]
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        class_labels: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> IFSQAROutput:
        """
        Predict each token from the class and the tokens before it (teacher forcing).

        Args:
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                ids in [0, num_classes]. Left out only if `past_key_values` holds the class already.
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`):
                whole token ids of the images in raster order, the last one included: it is predicted, not read.
                Without `class_labels` the first one is read, not predicted.
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                whole token ids to predict, as a rule equal to `input_ids`; -100 leaves a position out of the loss.
            past_key_values ([`~transformers.Cache`], *optional*): cache of the positions before these.
            use_cache (`bool`, *optional*): whether to make a cache if there is none; by default as in the config.
            output_hidden_states (`bool`, *optional*): whether to return the embeddings and each layer's output.

        Returns:
            [`IFSQAROutput`]: with `logits` at position i for token i, or without `class_labels` for token i + 1.

        Raises:
            ValueError: if `class_labels`, `input_ids` or `labels` are missing, out of range or of the wrong shape.
        """
        self._check_forward_inputs(class_labels, input_ids, labels, past_key_values)
        outputs = self.model(
            class_labels,
            input_ids[:, :-1],
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        first_predicted = 0 if class_labels is not None else 1
        factors = self.model.split_indices(input_ids[:, first_predicted:])
        states = self._states_of_factors(outputs.last_hidden_state, factors)
        logits, loss, factor_losses = None, None, None
        if labels is None or not self.training:
            logits = tuple(head(state) for head, state in zip(self.lm_heads, states, strict=True))
        if labels is not None:
            factor_losses = self._losses_of_factors(states, logits, labels[:, first_predicted:])
            loss = sum(factor_losses)
        return IFSQAROutput(
            loss=loss,
            factor_losses=factor_losses,
            logits=logits[0] if logits is not None and len(logits) == 1 else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def compile(self, **kwargs: Any) -> None:
        """
        Compile the layers by [`torch.compile`], for training and, with a static cache, for `generate`: one graph for
        all positions of the sequence. What is around them (embeddings, heads, sampling) stays as it is.

        Args:
            kwargs: arguments of `torch.compile`; `mode="reduce-overhead"` records CUDA graphs.
        """
        self._compiled_layers = {}
        for layers in (self.model.layers, self.factor_layers):
            if len(layers) > 0:
                layers.compile(**kwargs)

    def _states_of_factors(self, hidden_states: torch.Tensor, factors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What each head reads, `(batch, sequence, hidden_size)`, given the true values of the factors before it."""
        if len(self.lm_heads) == 1:
            return [self.norm(hidden_states)]
        # Each token is a short sequence of its own: the hidden state, then the embeddings of all factors but the last.
        embeddings = [embed(factor) for embed, factor in zip(self.model.embed_tokens[:-1], factors[:-1], strict=True)]
        sequence = torch.stack([hidden_states, *embeddings], dim=2).flatten(0, 1)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=sequence, attention_mask=None, past_key_values=None
        )
        # As in iFSQ's generator, factors take the first rows of the grid's table, the class's row of zeros included.
        cos, sin = (part[: len(factors)] for part in self.model.rotary_table(sequence.device))
        sequence, _ = self.factor_layers(sequence, (cos, sin), causal_mask)
        return list(self.norm(sequence).unflatten(0, hidden_states.shape[:2]).unbind(dim=2))

    def _losses_of_factors(
        self, states: list[torch.Tensor], logits: tuple[torch.Tensor, ...] | None, labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ignored = labels == -100
        targets = [
            factor.masked_fill(ignored, -100).flatten()
            for factor in self.model.split_indices(labels.masked_fill(ignored, 0))
        ]
        if logits is None:
            inputs = zip(states, self.lm_heads, targets, strict=True)
            return tuple(linear_cross_entropy(head, state.flatten(0, 1), target) for state, head, target in inputs)
        return tuple(
            F.cross_entropy(scores.flatten(0, 1).float(), target)
            for scores, target in zip(logits, targets, strict=True)
        )

    def _check_class_labels(self, class_labels: torch.Tensor) -> None:
        if class_labels.ndim != 1 or class_labels.numel() == 0 or class_labels.is_floating_point():
            raise ValueError(
                f"`class_labels` must be one or more integers of shape (batch,), got {class_labels.dtype} of shape "
                f"{tuple(class_labels.shape)}."
            )
        last = self.model.embed_classes.num_embeddings - 1
        if class_labels.min() < 0 or class_labels.max() > last:
            raise ValueError(
                f"`class_labels` must be in [0, {last}] for a model of {self.config.num_classes} classes, got "
                f"{class_labels.tolist()}."
            )

    def _check_forward_inputs(
        self,
        class_labels: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> None:
        # Without the class the first token is read, and it takes a second one to predict anything.
        shortest = 1 if class_labels is not None else 2
        longest = self.config.num_tokens
        if input_ids is None or input_ids.ndim != 2 or not shortest <= input_ids.shape[1] <= longest:
            got = "None" if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"`input_ids` must have shape (batch, {shortest} to {longest}), got {got}.")
        if class_labels is not None:
            self._check_class_labels(class_labels)
            if len(class_labels) != len(input_ids):
                raise ValueError(
                    f"`class_labels` must have one label for each of the {len(input_ids)} rows of `input_ids`, got "
                    f"shape {tuple(class_labels.shape)}."
                )
        elif past_key_values is None:
            raise ValueError("`class_labels` must be given, unless `past_key_values` holds the class already.")
        if past_key_values is not None:
            seen = int(past_key_values.get_seq_length())
            if class_labels is not None and seen > 0:
                raise ValueError("`class_labels` must be left out: `past_key_values` holds the class already.")
            if seen + (class_labels is not None) + input_ids.shape[1] - 1 > longest:
                raise ValueError(
                    f"`input_ids` has {input_ids.shape[1]} tokens, but after the {seen} positions of "
                    f"`past_key_values` there is no room for them in a sequence of {longest}."
                )
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"`labels` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got {tuple(labels.shape)}."
            )
        for name, ids in (("input_ids", input_ids), ("labels", labels)):
            if ids is None:
                continue
            if ids.is_floating_point():
                raise ValueError(f"`{name}` must be integers, got a tensor of dtype {ids.dtype}.")
            values = ids if name == "input_ids" else ids[ids != -100]
            if values.numel() and (values.min() < 0 or values.max() >= self.config.codebook_size):
                raise ValueError(
                    f"`{name}` must be in [0, {self.config.codebook_size}), the codebook of `vocab_sizes` "
                    f"{self.config.vocab_sizes}, but they span [{values.min().item()}, {values.max().item()}]."
                )


AutoModel.register(IFSQARConfig, IFSQARModel)
