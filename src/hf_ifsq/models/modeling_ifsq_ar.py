"""The AR model: LlamaGen (https://arxiv.org/abs/2406.06525) over one or several factors per token."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, DynamicCache, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from ..guidance import drop_labels
from .checks import as_ids
from .configuration_ifsq_ar import IFSQARConfig
from .generation_ifsq_ar import IFSQARGenerationMixin
from .grid import as_grid
from .layers_ifsq_ar import FactorEmbeddings, IFSQARDecoderLayer, linear_cross_entropy, run_layers, split_indices
from .loading import StrictLoadingMixin
from .rotary import rotary_table_2d


@dataclass
class IFSQAROutput(ModelOutput):
    """
    Output of [`IFSQARForImageGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`):
            mean cross-entropy in nats, summed over the factors.
        logits (`torch.Tensor` of shape `(batch, sequence, sum(vocab_sizes))`, *optional*):
            scores of the factors of each token before the softmax: `logits.split(config.vocab_sizes, dim=-1)`. `None`
            in training mode with `labels`, where the loss is computed without ever holding all of them.
        factor_losses (`tuple[torch.Tensor]`, *optional*, returned with `labels`): the terms of the loss.
        past_key_values ([`~transformers.Cache`], *optional*): keys and values seen so far.
        hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
            the embeddings and the output of each layer, `(batch, sequence, hidden_size)`. Position i is the one that
            predicts token i.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    factor_losses: tuple[torch.Tensor, ...] | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def num_seen(past_key_values: Cache | None) -> int:
    """Positions that a cache holds; of one on a device, such as a `StaticCache`, a tensor."""
    if past_key_values is None:
        return 0
    if not isinstance(past_key_values, Cache):
        raise TypeError(f"`past_key_values` must be a `Cache`, got {type(past_key_values).__name__}.")
    return past_key_values.get_seq_length()


class _InputName(str):
    """Name of an argument in which nobody who looks for "label" finds it."""

    def __contains__(self, part: object) -> bool:
        return False


def _class_labels_are_inputs(forward: Callable) -> Callable:
    """
    Let `transformers.Trainer` take `labels` alone for what the model is to predict: it looks for arguments of
    `forward` with "label" in their names, which it finds in the signature and nowhere else.
    """
    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(name=_InputName(name)) if name == "class_labels" else parameter
        for name, parameter in signature.parameters.items()
    ]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


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
        if any(module is head for head in getattr(self, "lm_heads", ())):
            # As in LlamaGen, training begins with uniform predictions.
            initialization.zeros_(module.get_parameter("weight"))
        else:
            super()._init_weights(module)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: the tokens are those of an image tokenizer."""
        raise NotImplementedError(
            f"The tokens are the codebook of an image tokenizer, with `vocab_sizes` {self.config.vocab_sizes}: none "
            "can be added. Load the model with other `vocab_sizes` and `ignore_mismatched_sizes=True` instead."
        )


class IFSQARModel(IFSQARPreTrainedModel):
    """
    The transformer over the token grid, without heads. Its sequence is the class followed by tokens in raster order;
    the output at each position is the residual stream, not yet normalized.
    """

    # A whole AR model's checkpoint also loads into this part of it.
    _keys_to_ignore_on_load_unexpected = [r"^norm\.", r"^lm_heads\.", r"^factor_layers\."]

    def __init__(self, config: IFSQARConfig):
        super().__init__(config)
        # It may have been changed since it was made.
        config.validate()
        # The row after the last class is the null class. Without class dropout it would never be trained.
        num_rows = config.num_classes + (config.class_dropout_prob > 0)
        self.embed_classes = nn.Embedding(num_rows, config.hidden_size)
        self.embed_tokens = FactorEmbeddings(config.vocab_sizes, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(IFSQARDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def rotary_table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Cosines and sines for every position of the sequence, `(1 + num_tokens, head_dim)` each. The class comes first,
        with a row of zeros: as in LlamaGen, its query and key vanish. Computed from the config, so that nothing is
        lost in `from_pretrained` and nothing rounded when the model is cast.
        """
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = rotary_table_2d(as_grid(self.config.grid_size), head_dim, self.config.rope_theta, device)
        return F.pad(cos, (0, 0, 1, 0)), F.pad(sin, (0, 0, 1, 0))

    def split_indices(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Split whole indices into their factors, mixed radix, the least significant first."""
        return split_indices(indices.long(), self.config.vocab_sizes)

    def join_factors(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join factors into whole indices: the inverse of `split_indices`."""
        indices = factors[-1]
        for size, factor in zip(reversed(self.config.vocab_sizes[:-1]), reversed(factors[:-1]), strict=True):
            indices = indices * size + factor
        return indices

    @can_return_tuple
    def forward(
        self,
        class_labels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        class_dropout_mask: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """
        Run the class, whole token ids or both, as `embed` takes them, through the layers; the other arguments are
        those of [`IFSQARForImageGeneration`]. `last_hidden_state` has shape `(batch, positions, hidden_size)`.
        """
        hidden_states = self.dropout(self.embed(class_labels, input_ids, class_dropout_mask))
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        seen = num_seen(past_key_values)
        longest = 1 + self.config.num_tokens
        if isinstance(seen, int) and seen + hidden_states.shape[1] > longest:
            raise ValueError(
                f"`input_ids` are too many: with the class and the {seen} positions of `past_key_values` there is "
                f"room for {longest}, but there would be {seen + hidden_states.shape[1]}."
            )
        position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen
        cos, sin = self.rotary_table(hidden_states.device)
        causal_mask = create_causal_mask(
            self.config, hidden_states, attention_mask=None, past_key_values=past_key_values
        )
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [hidden_states] if wants_states else None
        rotary = (cos[position_ids], sin[position_ids])
        hidden_states = run_layers(self.layers, hidden_states, rotary, causal_mask, past_key_values, states)
        return BaseModelOutputWithPast(hidden_states, past_key_values, None if states is None else tuple(states))

    def embed(
        self,
        class_labels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        class_dropout_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Embeddings, `(batch, positions, hidden_size)`, of class labels `(batch,)` in [0, num_classes], the last being
        the null class, before those of whole token ids `(batch, sequence)`. In training the labels of
        `class_dropout_mask`, by default a share of `class_dropout_prob`, are replaced by the null class.
        """
        embeddings = []
        if class_labels is not None:
            class_labels = as_ids(class_labels, "class_labels")
            if class_labels.ndim != 1:
                raise ValueError(f"`class_labels` must have shape (batch,), got {tuple(class_labels.shape)}.")
            if self.training:
                probability, null_label = self.config.class_dropout_prob, self.config.num_classes
                class_labels = drop_labels(class_labels, probability, null_label, class_dropout_mask)
            embeddings.append(self.embed_classes(class_labels)[:, None])
        if input_ids is not None:
            input_ids = as_ids(input_ids, "input_ids")
            if input_ids.ndim != 2 or (embeddings and input_ids.shape[0] != embeddings[0].shape[0]):
                raise ValueError(
                    "`input_ids` must have shape (batch, sequence), with a row for each of `class_labels`, got "
                    f"{tuple(input_ids.shape)}."
                )
            embeddings.append(self.embed_tokens(input_ids))
        if not embeddings:
            raise ValueError("Give `class_labels`, `input_ids` or both: there is nothing to run the model on.")
        return torch.cat(embeddings, dim=1)


class IFSQARForImageGeneration(IFSQARGenerationMixin, IFSQARPreTrainedModel):
    """
    Class-conditional autoregressive model of image tokens: [`IFSQARModel`] with one output head per factor and, for
    several factors, a small causal transformer that predicts the factors of one token one after another.

    Example:

    ```python
    >>> import torch
    >>> from hf_ifsq import IFSQARConfig, IFSQARForImageGeneration

    >>> config = IFSQARConfig(vocab_sizes=[9, 9], grid_size=[2, 2], hidden_size=16, num_attention_heads=2)
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
        self.factor_layers = nn.ModuleList(IFSQARDecoderLayer(config, i) for i in range(num_factor_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_heads = nn.ModuleList([nn.Linear(config.hidden_size, size, bias=False) for size in config.vocab_sizes])
        self.post_init()
        # transformers takes over what `model` alone may find too much.
        self._keys_to_ignore_on_load_unexpected = set()

    def get_output_embeddings(self) -> nn.ModuleList:
        """The heads, which quantizers leave as they are."""
        return self.lm_heads

    @_class_labels_are_inputs
    @can_return_tuple
    def forward(
        self,
        class_labels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        class_dropout_mask: torch.Tensor | None = None,
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
            class_dropout_mask (`torch.BoolTensor` of shape `(batch,)`, *optional*):
                the labels that training replaces by the null class; by default a random share.

        Returns:
            [`IFSQAROutput`]: with `logits` at position i for token i, or without `class_labels` for token i + 1.
        """
        input_ids, labels = self._check_forward_inputs(class_labels, input_ids, labels, past_key_values)
        outputs = self.model(
            class_labels,
            input_ids[:, :-1],
            past_key_values,
            use_cache,
            output_hidden_states,
            class_dropout_mask,
            return_dict=True,
        )
        first_predicted = 0 if class_labels is not None else 1
        factors = self.model.split_indices(input_ids[:, first_predicted:])
        states = self._states_of_factors(outputs.last_hidden_state, factors)
        scores, logits, loss, factor_losses = None, None, None, None
        if labels is None or not self.training:
            scores = [head(state) for head, state in zip(self.lm_heads, states, strict=True)]
            logits = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
        if labels is not None:
            factor_losses = self._losses_of_factors(states, scores, labels[:, first_predicted:])
            loss = torch.stack(factor_losses).sum()
        return IFSQAROutput(loss, logits, factor_losses, outputs.past_key_values, outputs.hidden_states)

    def _states_of_factors(self, hidden_states: torch.Tensor, factors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What each head reads, `(batch, sequence, hidden_size)`, given the true values of the factors before it."""
        if len(self.lm_heads) == 1:
            return [self.norm(hidden_states)]
        # Each token is a short sequence of its own: the hidden state, then the embeddings of all factors but the last.
        embeddings = [self.model.embed_tokens.embed_factor(*factor) for factor in enumerate(factors[:-1])]
        sequence = torch.stack([hidden_states, *embeddings], dim=2).flatten(0, 1)
        causal_mask = create_causal_mask(self.config, sequence, attention_mask=None, past_key_values=None)
        # As in iFSQ's generator, factors take the first rows of the grid's table, the class's row of zeros included.
        cos, sin = (part[: len(factors)] for part in self.model.rotary_table(sequence.device))
        sequence = run_layers(self.factor_layers, sequence, (cos, sin), causal_mask)
        return list(self.norm(sequence).unflatten(0, hidden_states.shape[:2]).unbind(dim=2))

    def _losses_of_factors(
        self, states: list[torch.Tensor], scores: list[torch.Tensor] | None, labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The cross-entropies of the heads, of scores where there are any, otherwise of what the heads read."""
        ignored = labels == -100
        losses = []
        for factor, target in enumerate(self.model.split_indices(labels.masked_fill(ignored, 0))):
            target = target.masked_fill(ignored, -100).flatten()
            if scores is None:
                head = cast(nn.Linear, self.lm_heads[factor])
                losses.append(linear_cross_entropy(head, states[factor].flatten(0, 1), target))
            else:
                losses.append(F.cross_entropy(scores[factor].flatten(0, 1).float(), target))
        return tuple(losses)

    def _check_forward_inputs(
        self,
        class_labels: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What can be said without reading a value, which would make the host wait; gives token ids and labels."""
        labelled, longest = class_labels is not None, self.config.num_tokens
        # Without the class the first token is read, and it takes a second one to predict anything.
        shortest = 1 if labelled else 2
        input_ids = None if input_ids is None else as_ids(input_ids, "input_ids")
        if input_ids is None or input_ids.ndim != 2 or not shortest <= input_ids.shape[1] <= longest:
            got = "None" if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"`input_ids` must have shape (batch, {shortest} to {longest}), got {got}.")
        if class_labels is not None:
            self._check_class_labels(class_labels)
            if class_labels.shape[0] != input_ids.shape[0]:
                raise ValueError(
                    f"`class_labels` must have one label for each of the {input_ids.shape[0]} rows of `input_ids`, "
                    f"got shape {tuple(class_labels.shape)}."
                )
        elif past_key_values is None:
            raise ValueError("`class_labels` must be given, unless `past_key_values` holds the class already.")
        seen = num_seen(past_key_values)
        # A `StaticCache` counts its positions on the device.
        if isinstance(seen, int) and labelled and seen > 0:
            raise ValueError("`class_labels` must be left out: `past_key_values` holds the class already.")
        if isinstance(seen, int) and seen + labelled + input_ids.shape[1] - 1 > longest:
            raise ValueError(
                f"`input_ids` has {input_ids.shape[1]} tokens, but after the {seen} positions of `past_key_values` "
                f"there is no room for them in a sequence of {longest}."
            )
        labels = None if labels is None else as_ids(labels, "labels")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"`labels` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got {tuple(labels.shape)}."
            )
        return input_ids, labels


AutoModel.register(IFSQARConfig, IFSQARModel)
