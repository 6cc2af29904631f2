"""The held-out loss against a loop over single tokens, by domain and in bits per byte.

Shape legend: B batch, T positions.
"""

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny, words

from moesaic.analysis.evaluate import evaluate
from moesaic.analysis.routing import neighbours_summed
from moesaic.data.pretrain import prepare
from moesaic.data.store import TokenStore
from moesaic.model.transformer import LanguageModel

SEQ_LEN = 16


@pytest.fixture
def made(tmp_path: Path) -> tuple[LanguageModel, TokenStore]:
    (tmp_path / "river.txt").write_text(words(500, seed=1), encoding="utf-8")
    (tmp_path / "grün.txt").write_text(words(300, seed=2).replace("mill", "Mühle"), encoding="utf-8")
    path = f"data.path={{river = '{tmp_path}/river.txt', green = '{tmp_path}/grün.txt'}}"
    recipe = tiny(tmp_path, path, "data.tokenizer=byte", "data.val_fraction=0.15")
    store = prepare(recipe.data)
    torch.manual_seed(4)
    config = recipe.model.model_copy(update={"vocab_size": store.tokenizer.vocab_size})
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform
    return model, store


def validation_ids(store: TokenStore, domain: str) -> list[int]:
    """The validation part of a domain, put together from windows of one token."""
    windows = list(store.validation(1, 1, domain))
    return [int(ids[0, 0]) for ids, *_ in windows] + [int(windows[-1][1][0, 0])]


@torch.no_grad()
def by_hand(model: LanguageModel, ids: list[int]) -> list[float]:
    """Nats of every token after the first, each in the window that it belongs to."""
    nats = []
    for start in range(0, len(ids) - 1, SEQ_LEN):
        window = ids[start : start + SEQ_LEN + 1]
        logits_BTV = model(torch.tensor([window[:-1]])).logits_BTV.double()
        for t, target in enumerate(window[1:]):
            nats.append(float(-logits_BTV[0, t].log_softmax(-1)[target]))
    return nats


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_it_is_the_mean_over_every_token(made: tuple[LanguageModel, TokenStore], batch_size: int) -> None:
    model, store = made
    result = evaluate(model, store, batch_size, SEQ_LEN)
    model.eval()
    everything: list[float] = []
    for domain in result.domains:
        ids = validation_ids(store, domain.domain)
        nats = by_hand(model, ids)
        assert domain.tokens == len(ids) - 1
        assert domain.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
        size = len(bytes(ids)) / len(ids)  # the tokens are bytes
        assert domain.bits_per_byte == pytest.approx(domain.loss / math.log(2) / size, rel=0.01)
        everything += nats
    assert [d.domain for d in result.domains] == store.domains == ["river", "green"]
    assert result.tokens == len(everything)
    assert result.loss == pytest.approx(sum(everything) / len(everything), rel=1e-5)


def test_every_predicted_token_is_routed_once(made: tuple[LanguageModel, TokenStore]) -> None:
    model, store = made
    result = evaluate(model, store, 4, SEQ_LEN)
    for domain in result.domains:
        assert domain.counts_LE.shape == (2, 4)
        assert domain.counts_LE.sum(1).tolist() == [2 * domain.tokens] * 2
    assert torch.equal(result.counts_LE(), result.domains[0].counts_LE + result.domains[1].counts_LE)
    assert torch.equal(result.counts_LCE()[1, 0], result.domains[0].counts_LE[1])
    assert result.counts_LCE().shape == (2, 2, 4)


def test_the_batch_size_does_not_matter(made: tuple[LanguageModel, TokenStore]) -> None:
    model, store = made
    one, many = (evaluate(model, store, size, SEQ_LEN) for size in (1, 7))
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert torch.equal(one.counts_LE(), many.counts_LE())


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_the_model_as_it_was(made: tuple[LanguageModel, TokenStore], training: bool) -> None:
    model, store = made
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(model, store, 4, SEQ_LEN)
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_a_few_windows_are_the_first_of_each_domain(
    made: tuple[LanguageModel, TokenStore], batch_size: int
) -> None:
    model, store = made
    result = evaluate(model, store, batch_size, SEQ_LEN, most=3)
    model.eval()
    for domain in result.domains:
        nats = by_hand(model, validation_ids(store, domain.domain)[: 3 * SEQ_LEN + 1])
        assert domain.tokens == 3 * SEQ_LEN
        assert domain.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_loads_of_thousands_are_written_by_groups_of_neighbours() -> None:
    counts_LE = torch.arange(2 * 1000).view(2, 1000)
    summed_LE, size = neighbours_summed(counts_LE)
    assert (size, summed_LE.shape) == (4, (2, 250))
    assert torch.equal(summed_LE.sum(1), counts_LE.sum(1))
    assert summed_LE[1, 3] == counts_LE[1, 12:16].sum()
    same_LE, size = neighbours_summed(counts_LE[:, :64])
    assert size == 1
    assert torch.equal(same_LE, counts_LE[:, :64])
