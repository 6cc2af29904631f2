"""The short causal convolution against its oracle, in pieces, over padding, and where it stands.

Shape legend: B batch, T positions, D width, K kernel size, J positions remembered.
"""

import pytest
import reference_attention as ref
import torch
from router_oracles import randomise
from torch import Tensor

from moesaic.model.config import ModelConfig
from moesaic.model.conv import ShortConv
from moesaic.model.experts import ExpertOptions
from moesaic.model.transformer import LanguageModel

torch.set_num_threads(1)

WIDTH = 5


def convolution(kernel: int) -> ShortConv:
    made = ShortConv(kernel, WIDTH)
    randomise(made, seed=kernel)
    return made


def rows(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_output_and_gradients_equal_the_oracles(kernel: int, length: int) -> None:
    made, x_BTD = convolution(kernel), rows(3, length).requires_grad_()
    weight_KD = made.weight.detach().double().requires_grad_()
    leaf_BTD = x_BTD.detach().double().requires_grad_()
    wanted_BTD = torch.stack([ref.short_conv(row_TD, weight_KD) for row_TD in leaf_BTD])
    y_BTD = made(x_BTD, None, None)
    torch.testing.assert_close(y_BTD.double(), wanted_BTD, rtol=1e-6, atol=1e-6)
    dy_BTD = rows(3, length) + 1
    y_BTD.backward(dy_BTD)
    wanted_BTD.backward(dy_BTD.double())
    assert made.weight.grad is not None
    torch.testing.assert_close(made.weight.grad.double(), weight_KD.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_BTD.grad.double(), leaf_BTD.grad, rtol=1e-5, atol=1e-5)


def test_bf16_stays_within_its_precision() -> None:
    made, x_BTD = convolution(4), rows(2, 9)
    y_BTD = made(x_BTD.bfloat16(), None, None)
    assert y_BTD.dtype == torch.bfloat16
    torch.testing.assert_close(y_BTD.float(), made(x_BTD, None, None), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 4], [1, 6], [7]], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 6])
def test_pieces_with_memory_equal_the_whole(kernel: int, pieces: list[int]) -> None:
    made, x_BTD = convolution(kernel), rows(2, 7)
    before_BJD = torch.zeros(2, kernel - 1, WIDTH)
    with torch.inference_mode():
        parts = [made(part, None, before_BJD) for part in x_BTD.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), made(x_BTD, None, None))
    torch.testing.assert_close(before_BJD, x_BTD[:, 7 - (kernel - 1) :])


def test_padding_counts_as_nothing() -> None:
    made, x_BTD = convolution(3), rows(1, 6)
    real_BT = torch.tensor([[False, False, True, True, True, True]])
    alone_BTD = made(x_BTD[:, 2:], None, None)
    torch.testing.assert_close(made(x_BTD, real_BT, None)[:, 2:], alone_BTD)


def test_a_new_model_begins_without_mixing_and_learns_to() -> None:
    torch.manual_seed(0)
    experts = ExpertOptions(count=2, hidden=8)
    model = LanguageModel(ModelConfig(layers=2, width=16, vocab_size=11, conv=4, experts=experts))
    taps = {name: p for name, p in model.named_parameters() if "conv" in name}
    assert sorted(taps) == sorted(
        f"model.layers.{layer}.{place}_conv.weight"
        for layer in (0, 1)
        for place in ("input", "post_attention")
    )
    assert all(p.shape == (4, 16) and not p.any() for p in taps.values())
    logits_BTV = model(torch.randint(11, (2, 6))).logits_BTV
    assert logits_BTV is not None
    torch.autograd.backward(logits_BTV.square().sum())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in taps.values())
