"""Initial weights by name, for linear layers and for stacked experts alike.

A stacked expert matrix [E, out, in] is initialised as E separate matrices, so fan-in and fan-out
are those of one expert.
"""

import math

import torch
from torch import Tensor, nn

from moesaic.model.config import InitOptions

# The matrices that write to the residual stream.
_OUTPUTS = ("o_proj.weight", "down_proj.weight", "down_proj")
_OUTPUT_BIASES = ("o_proj.bias", "down_proj.bias", "down_bias")


@torch.no_grad()
def initialise(model: nn.Module, options: InitOptions) -> None:
    """Fill every parameter of ``model`` in place, from torch's global generator."""
    fan_in = {
        name.removesuffix("weight"): p.shape[-1]
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.ndim > 1
    }
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if options.zero_output and name.endswith(_OUTPUTS + _OUTPUT_BIASES):
            parameter.zero_()
        elif name.endswith("_conv.weight"):
            parameter.zero_()  # the identity: see conv.py
        elif leaf in ("bias", "noise_bias", "up_bias", "down_bias"):
            _initialise_bias(parameter, options, _bias_fan_in(name, parameter, fan_in))
        elif parameter.ndim < 2:
            parameter.fill_(0.0 if leaf == "log_temperature" else 1.0)
        elif "embed_" in name and options.kind in ("kaiming", "xavier"):
            parameter.normal_(0.0, 1.0)
        else:
            _initialise_matrix(parameter, options)


def _initialise_matrix(weight: Tensor, options: InitOptions) -> None:
    fan_out, fan_in = weight.shape[-2:]
    if options.kind == "kaiming":  # He et al. 2015, arXiv 1502.01852, eq. 10
        weight.normal_(0.0, math.sqrt(2.0 / fan_in))
    elif options.kind == "xavier":  # Glorot and Bengio 2010, eq. 16, as a normal of that variance
        weight.normal_(0.0, math.sqrt(2.0 / (fan_in + fan_out)))
    elif options.kind == "normal":
        weight.normal_(0.0, options.std)
    else:
        nn.init.trunc_normal_(weight, 0.0, options.std, -3 * options.std, 3 * options.std)


def _initialise_bias(bias: Tensor, options: InitOptions, fan_in: int | None) -> None:
    if options.kind in ("kaiming", "xavier") and fan_in is not None:
        bound = 1.0 / math.sqrt(fan_in)
        bias.uniform_(-bound, bound)
    else:
        bias.zero_()


def _bias_fan_in(name: str, bias: Tensor, fan_in: dict[str, int]) -> int | None:
    """The input width of the matrix a bias belongs to; None for a norm's bias."""
    prefix, _, leaf = name.rpartition(".")
    matrix = {
        "bias": f"{prefix}.",
        "noise_bias": f"{prefix}.noise_",
        "up_bias": f"{prefix}.up_proj",
        "down_bias": f"{prefix}.down_proj",
    }[leaf]
    return fan_in.get(matrix, fan_in.get(f"{prefix}.gate_up_proj") if leaf == "up_bias" else None)
