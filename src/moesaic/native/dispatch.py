"""Choices sorted by expert, by counting (dispatch.cpp): one pass where a stable sort makes several.

Shape legend: T tokens, K choices per token, E experts, R rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.native.library import kernel, numbers


def count_choices(expert_TK: Tensor, keep_TK: Tensor, num_experts: int) -> list[int]:
    """The kept choices of each expert; int64 and bool, both contiguous and in main memory."""
    counts_E = torch.empty(num_experts, dtype=torch.int64)
    run = kernel("count_choices", 5)
    run(expert_TK.data_ptr(), keep_TK.data_ptr(), expert_TK.numel(), num_experts, counts_E.data_ptr())
    return counts_E.tolist()


def place_choices(
    expert_TK: Tensor, keep_TK: Tensor, starts_E: Sequence[int], rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice and the token of each of ``rows`` rows, of which expert e's begin at ``starts_E[e]``, and
    the row of each choice [T, K]; int64. A row of nobody has choice T·K and the last token, a choice that is
    not kept the row R."""
    place_TK = torch.empty_like(expert_TK)
    order_R, token_R = expert_TK.new_empty(rows), expert_TK.new_empty(rows)
    pointers = order_R.data_ptr(), token_R.data_ptr(), place_TK.data_ptr()
    sizes = expert_TK.numel(), expert_TK.shape[1], rows
    run = kernel("place_choices", 9)
    run(expert_TK.data_ptr(), keep_TK.data_ptr(), *sizes, numbers(starts_E), *pointers)
    return order_R, token_R, place_TK
