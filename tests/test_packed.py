"""Weights laid out for decoding against the model they came from."""

import copy

import pytest
import torch
from test_experts import through
from torch import Tensor, nn

from moesaic.generate import SampleOptions, stream
from moesaic.model.attention import AttentionOptions
from moesaic.model.config import ModelConfig
from moesaic.model.experts import ExpertOptions, Experts, FFNKind
from moesaic.model.packed import PackedExperts, PackedLinear, pack
from moesaic.model.transformer import LanguageModel
from moesaic.native import library

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(params=["kernels", "PyTorch"], autouse=True)
def _with_and_without_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(library, "available", lambda: False)
    elif not library.available():
        pytest.skip(library.state())


IDS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))


def model(dtype: torch.dtype = torch.bfloat16, **more: object) -> LanguageModel:
    torch.manual_seed(1)
    experts = ExpertOptions(count=4, hidden=32, shared_hidden=16, shared_gate=True)
    settings: dict[str, object] = {"layers": 2, "width": 48, "vocab_size": 32, "context": 64, "pattern": "MD"}
    config = ModelConfig(
        **{**settings, **more},
        experts=experts,
        attention=AttentionOptions(heads=4, qkv_bias=True, qk_norm="head"),
    )
    made = LanguageModel(config).eval()
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.2)
    return made.to(dtype)


@torch.inference_mode()
def logits(made: LanguageModel) -> Tensor:
    output = made(IDS).logits_BTV
    assert output is not None
    return output.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_give_the_same_logits(dtype: torch.dtype, tied: bool) -> None:
    plain = model(dtype, tied=tied)
    expected = logits(plain)
    packed = pack(copy.deepcopy(plain), "packed")
    assert not any(isinstance(m, nn.Linear) and m.out_features > 1 for m in packed.modules())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(packed), expected, rtol=tolerance, atol=tolerance)


def test_greedy_decoding_of_a_packed_model_is_that_of_the_plain_one() -> None:
    plain = model(torch.float32)
    told = [int(t) for t in stream(plain, IDS[:1], 20, SampleOptions(temperature=0))]
    packed = pack(plain, "packed")
    assert [int(t) for t in stream(packed, IDS[:1], 20, SampleOptions(temperature=0))] == told


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int8_is_the_product_with_the_rounded_matrix(rows: int) -> None:
    weight_OI = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    bias_O, x = torch.randn(24), torch.randn(rows, 32).bfloat16()
    layer = PackedLinear(weight_OI, bias_O.bfloat16(), "int8")
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    rounded_OI = (weight_OI / scale_O1).round() * scale_O1.bfloat16().float()
    assert (rounded_OI - weight_OI).abs().max() < weight_OI.abs().max() / 127
    expected = x.float() @ rounded_OI.T + bias_O
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.1)
    assert layer(x.float()).dtype == torch.float32


def test_int8_logits_stay_near() -> None:
    plain = model(torch.float32)
    expected = logits(plain)
    near = logits(pack(copy.deepcopy(plain), "int8"))
    assert (near - expected).norm() < 0.1 * expected.norm()
    assert (near - expected).norm() > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "relu", "gelu", "relu2"])
def test_a_packed_bank_is_the_bank(kind: FFNKind, bias: bool) -> None:
    bank = Experts(ExpertOptions(kind=kind, hidden=16, bias=bias, count=4), 32)
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, counts_E = torch.randn(6, 32), [3, 0, 1, 2]
    with torch.inference_mode():
        packed = through(PackedExperts(bank, "packed"), x, counts_E)  # type: ignore[arg-type]
        torch.testing.assert_close(packed, through(bank, x, counts_E), rtol=1e-4, atol=1e-4)


def test_experts_without_rows_are_not_read() -> None:
    bank = Experts(ExpertOptions(hidden=16, count=3), 32)
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    bank.gate_up_proj.data[1] = bank.down_proj.data[1] = torch.nan
    packed = PackedExperts(bank, "packed")
    with torch.inference_mode():
        assert through(packed, torch.randn(4, 32), [3, 0, 1]).isfinite().all()  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [2, 40])
def test_int8_takes_matrices_of_any_shape(rows: int) -> None:
    weight_OI, x = torch.randn(7, 21, generator=torch.Generator().manual_seed(2)), torch.randn(rows, 21)
    torch.testing.assert_close(
        PackedLinear(weight_OI, None, "int8")(x), x @ weight_OI.T, rtol=0.05, atol=0.15
    )


def test_a_packed_model_shares_the_memory_of_its_matrices_where_there_are_kernels() -> None:
    if not library.available():
        pytest.skip(library.state())
    plain = model(torch.bfloat16)
    before = plain.lm_head.weight.data_ptr()
    head = pack(plain, "packed").lm_head
    assert isinstance(head, PackedLinear)
    assert head.matrices.stack.matrix_EOI.data_ptr() == before
