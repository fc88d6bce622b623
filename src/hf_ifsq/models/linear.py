"""The linear layer of both generators, and the loss of one with very many outputs."""

import torch
from torch import library, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


# The operator that `torch.compile` takes for frozen linear layers on CPUs.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

# Scores that exist at a time in the training of a head: 256 MiB in float32.
MAX_SCORES = 2**26


def onednn_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN, for float32 on a CPU, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


# For `torch.compile`, which would not find its way through the operator itself.
opaque_linear = library.custom_op("hf_ifsq::onednn_linear", onednn_linear, mutates_args=())


@opaque_linear.register_fake
def _(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """
    `torch.nn.Linear` that in inference in float32 on a CPU multiplies by oneDNN, where PyTorch takes MKL. For the few
    rows that decoding has, oneDNN is 1.4 to 2.6 times as fast on an AMD EPYC, and 1.1 times for a thousand rows. The
    two differ by rounding.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        weight = self.weight
        if (
            HAS_ONEDNN
            and torch.backends.mkldnn.enabled
            and input.device.type == weight.device.type == "cpu"
            and input.dtype == weight.dtype == torch.float32
            # Subclasses, such as quantized weights, have products of their own.
            and type(weight) is nn.Parameter
            # Neither gradients nor, by `torch.func.jvp`, derivatives in a direction.
            and not torch.is_grad_enabled()
            and forward_ad._current_level < 0
            and not torch.is_autocast_enabled("cpu")
            # What is exported must run where this package is not installed.
            and not torch.compiler.is_exporting()
        ):
            multiply = opaque_linear if torch.compiler.is_compiling() else onednn_linear
            return multiply(input, weight, self.bias)
        return super().forward(input)


def linear_cross_entropy(head: nn.Linear, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Mean cross-entropy of a linear head. Its scores, which over a codebook of 83,521 would be the largest tensors of a
    training step by far, are computed some rows at a time, and once more for the gradients.

    Args:
        head (`torch.nn.Linear`): from `hidden_size` to `vocab_size`.
        hidden_states (`torch.Tensor` of shape `(rows, hidden_size)`): what the head reads.
        targets (`torch.Tensor` of shape `(rows,)`): ids in [0, vocab_size), or -100 for rows that do not count.

    Returns:
        `torch.Tensor`: nats, a float32 scalar.
    """
    device_type = hidden_states.device.type
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def summed_losses(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # With its cache, autocast would add up the gradients of all parts in low precision.
        with torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=False):
            scores = head(states)
        return F.cross_entropy(scores.float(), ids, reduction="sum")

    rows = max(1, MAX_SCORES // head.out_features)
    if len(targets) <= rows:
        total = summed_losses(hidden_states, targets)
    else:
        parts = zip(hidden_states.split(rows), targets.split(rows), strict=True)
        total = sum(checkpoint(summed_losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)
    return total / (targets != -100).sum()
