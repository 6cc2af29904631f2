"""Generation: the cache, the window, the cuts of the tail, seeds and padding.

Shape legend: B batch, T positions, V vocabulary.
"""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from router_oracles import randomise, router_options
from torch import Tensor

from moesaic.generate import SampleOptions, sample, stream
from moesaic.model.attention import AttentionOptions
from moesaic.model.config import ModelConfig
from moesaic.model.experts import ExpertOptions
from moesaic.model.routers import ROUTERS
from moesaic.model.transformer import LanguageModel

torch.set_num_threads(1)

VOCABULARY, CONTEXT = 29, 8
GREEDY = SampleOptions(temperature=0)
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"router": router_options(kind, 2)} for kind in ROUTERS},
    "learned": {"position": "learned"},
}


def model(**changed: Any) -> LanguageModel:
    options: dict[str, Any] = {
        "layers": 2,
        "width": 16,
        "vocab_size": VOCABULARY,
        "context": CONTEXT,
        "attention": AttentionOptions(heads=2, kv_heads=1),
        "experts": ExpertOptions(count=4, hidden=12),
    }
    made = LanguageModel(ModelConfig(**options | changed))
    randomise(made, seed=1)
    return made.eval()


def prompt(batch: int = 3, length: int = 4) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def generate(made: LanguageModel, ids_BT: Tensor, n: int, options: SampleOptions, **more: Any) -> Tensor:
    return torch.stack(list(stream(made, ids_BT, n, options, **more)), dim=1)


def greedy_by_hand(made: LanguageModel, ids_BT: Tensor, n: int) -> Tensor:
    start = ids_BT.shape[1]
    with torch.no_grad():
        for _ in range(n):
            best_B = made(ids_BT[:, -CONTEXT:]).logits_BTV[:, -1].argmax(-1)
            ids_BT = torch.cat([ids_BT, best_B[:, None]], dim=1)
    return ids_BT[:, start:]


@pytest.mark.parametrize("length", [1, 4, CONTEXT, CONTEXT + 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_with_and_without_cache_equals_the_loop_beyond_the_window(name: str, length: int) -> None:
    made, ids_BT, n = model(**VARIANTS[name]), prompt(length=length), CONTEXT + 5
    expected = greedy_by_hand(made, ids_BT, n)
    assert torch.equal(generate(made, ids_BT, n, GREEDY, use_cache=True), expected)
    assert torch.equal(generate(made, ids_BT, n, GREEDY, use_cache=False), expected)
    assert len(expected.unique()) > 5


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_left_padded_batch_equals_each_prompt_alone(name: str, use_cache: bool) -> None:
    made, lengths, n = model(**VARIANTS[name]), [6, 2, 4], CONTEXT + 2
    ids_BT = prompt(length=6)
    real_BT = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    batch = generate(made, ids_BT, n, GREEDY, real_BT=real_BT, use_cache=use_cache)
    for row, length, answer in zip(ids_BT, lengths, batch, strict=True):
        assert torch.equal(greedy_by_hand(made, row[None, -length:], n)[0], answer)


def test_padding_longer_than_the_window_is_cut_with_the_prompt() -> None:
    made = model()
    ids_BT = prompt(length=CONTEXT + 3)
    real_BT = torch.arange(CONTEXT + 3) >= torch.tensor([0, 2, CONTEXT + 1])[:, None]
    batch = generate(made, ids_BT, 5, GREEDY, real_BT=real_BT)
    assert torch.equal(batch[2], greedy_by_hand(made, ids_BT[2:, -2:], 5)[0])
    assert torch.equal(batch[:2], greedy_by_hand(made, ids_BT[:2], 5))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_a_tail_cut_to_one_token_is_greedy(options: dict[str, Any]) -> None:
    made, ids_BT = model(), prompt()
    expected = generate(made, ids_BT, 12, GREEDY)
    assert torch.equal(generate(made, ids_BT, 12, SampleOptions(**options)), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_seed_repeats_the_draws_and_leaves_the_global_generator_alone(use_cache: bool) -> None:
    made, ids_BT = model(), prompt()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(made, ids_BT, 12, SampleOptions(seed=7), use_cache=use_cache)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generate(made, ids_BT, 12, SampleOptions(seed=7)), first)
    assert not torch.equal(generate(made, ids_BT, 12, SampleOptions(seed=8)), first)


def test_without_a_seed_the_global_generator_decides() -> None:
    made, ids_BT = model(), prompt()
    torch.manual_seed(0)
    first = generate(made, ids_BT, 12, SampleOptions())
    assert not torch.equal(generate(made, ids_BT, 12, SampleOptions()), first)
    torch.manual_seed(0)
    assert torch.equal(generate(made, ids_BT, 12, SampleOptions()), first)


def drawn(logits: list[float], number: int = 4000, **options: Any) -> list[float]:
    """The share of draws that each token gets."""
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.tensor([logits]).expand(number, -1)
    tokens_B = sample(logits_BV, SampleOptions(**options), generator)
    return (torch.bincount(tokens_B, minlength=len(logits)) / number).tolist()


P = [0.1, 0.5, 0.15, 0.25]
LOGITS = [float(torch.tensor(p).log()) for p in P]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, P),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 9}, P),
        ({"top_p": 0.45}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"top_p": 1.0}, P),
        ({"temperature": 0.5}, [p * p / 0.345 for p in P]),
        ({"top_k": 3, "top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),  # top_p reads what top_k has left
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_draws_have_the_probabilities_that_the_options_leave(
    options: dict[str, Any], expected: list[float]
) -> None:
    shares = drawn(LOGITS, **options)
    assert shares == pytest.approx(expected, abs=0.03)
    assert [s == 0 for s in shares] == [e == 0 for e in expected]


def test_rows_are_drawn_apart() -> None:
    logits_BV = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]])
    assert sample(logits_BV, SampleOptions(top_p=0.5)).tolist() == [1, 0]
    assert sample(logits_BV, SampleOptions(top_k=1)).dtype == torch.int64


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stop_early", [True, False])
def test_the_model_returns_to_its_mode_however_generation_ends(stop_early: bool, training: bool) -> None:
    made = model(router=router_options("noisy_top_k", 2)).train(training)
    tokens = stream(made, prompt(), 5, GREEDY)
    next(tokens)
    assert not made.training
    if stop_early:
        tokens.close()
    else:
        assert len(list(tokens)) == 4
    assert made.training is training
    assert all(m.training is training for m in made.modules())


def test_generation_in_training_mode_has_no_router_noise() -> None:
    made = model(router=router_options("noisy_top_k", 2), dropout=0.5).train()
    torch.manual_seed(0)
    first = generate(made, prompt(), 6, GREEDY)
    assert torch.equal(generate(made, prompt(), 6, GREEDY), first)


def test_nothing_asked_is_nothing_given_and_an_empty_prompt_is_refused() -> None:
    assert list(stream(model(), prompt(), 0)) == []
    with pytest.raises(ValueError, match="at least one token"):
        next(stream(model(), prompt()[:, :0], 3))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"temperature": float("nan")}]
)
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SampleOptions(**wrong)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e-8])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -9.0, -5.5]])
    assert sample(logits_BV, SampleOptions(temperature=temperature)).tolist() == [1, 0]
