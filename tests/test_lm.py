"""Loading what was trained, and using it: logits, routing, text.

Shape legend: B batch, T positions, V vocabulary.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import run_tiny, tiny

import moesaic
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import CheckpointError, DataError, RecipeError
from moesaic.lm import LM, load
from moesaic.model.transformer import LanguageModel
from moesaic.weights.checkpoint import newest_valid


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(folder / "cache"))
        return run_tiny(folder, "run", "train.steps=40", "checkpoint.every=20", "optim.lr=0.02")


@pytest.fixture
def lm(run: Path) -> LM:
    return load(run)


def copy(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_run_a_checkpoint_and_a_model_folder_are_the_same_model(run: Path) -> None:
    places = [run, run / "model", run / "checkpoints" / "step-00000040", str(run)]
    loaded = [load(place) for place in places]
    assert [lm.path for lm in loaded] == [run / "model", *map(Path, places[1:3]), run / "model"]
    ids_BT = loaded[0].ids("the old mill")
    for lm in loaded[1:]:
        assert torch.equal(lm.logits(ids_BT), loaded[0].logits(ids_BT))
    earlier = load(run / "checkpoints" / "step-00000020")
    assert not torch.equal(earlier.logits(ids_BT), loaded[0].logits(ids_BT))
    assert not loaded[0].model.training
    assert moesaic.load(run).config == loaded[0].config


def test_a_run_that_is_going_on_is_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    going = copy(run, tmp_path / "going")
    shutil.rmtree(going / "model")
    assert load(going).path == going / "checkpoints" / "step-00000040"
    flip(going / "checkpoints" / "step-00000040" / "optimizer.safetensors")
    assert load(going).path == going / "checkpoints" / "step-00000020"
    shutil.rmtree(going / "checkpoints")
    with pytest.raises(RecipeError, match="no checkpoint"):
        load(going)


def test_logits_are_those_of_the_model_in_memory(lm: LM, run: Path) -> None:
    ids_BT = torch.randint(lm.tokenizer.vocab_size, (3, 10), generator=torch.Generator().manual_seed(0))
    logits_BTV = lm.logits(ids_BT)
    assert logits_BTV.dtype == torch.float32
    assert logits_BTV.shape == (3, 10, lm.tokenizer.vocab_size)
    other = LanguageModel(lm.config)
    other.load_state_dict(lm.model.state_dict())
    with torch.no_grad():
        assert torch.equal(logits_BTV, other.eval()(ids_BT).logits_BTV)


def test_padding_changes_nothing_for_the_tokens_beside_it(lm: LM) -> None:
    ids_BT = lm.ids("the old mill")
    padded_BT = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids_BT], dim=1)
    mask_BT = torch.tensor([[0] * 3 + [1] * ids_BT.shape[1]])
    torch.testing.assert_close(lm.logits(padded_BT, mask_BT)[:, 3:], lm.logits(ids_BT))
    plain, masked = lm.routing(ids_BT), lm.routing(padded_BT, mask_BT)
    for one, two in zip(plain, masked, strict=True):
        assert torch.equal(one.counts_E(), two.counts_E())


def test_routing_is_one_value_per_sparse_layer(lm: LM, tmp_path: Path) -> None:
    ids_BT = lm.ids("the old mill")
    routings = lm.routing(ids_BT)
    assert len(routings) == len(lm.config.moe_layers) == 2
    for routing in routings:
        assert routing.expert_TK.shape == (ids_BT.shape[1], 2)
        assert routing.counts_E().sum() == 2 * ids_BT.shape[1]
    mixed = load(run_tiny(tmp_path, "mixed", "model.pattern=DM", "train.steps=1"))
    assert mixed.config.moe_layers == [1]
    assert len(mixed.routing(mixed.ids("the"))) == 1


def test_greedy_text_is_the_argmax_of_the_logits(lm: LM) -> None:
    ids = lm.tokenizer.encode("the ").tolist()
    prompt = list(ids)
    for _ in range(10):
        ids.append(int(lm.logits(torch.tensor([ids[-16:]]))[0, -1].argmax()))
    assert lm.generate("the ", max_new_tokens=10) == lm.tokenizer.decode(ids[len(prompt) :])
    assert lm.generate(prompt, max_new_tokens=10) == lm.generate("the ", max_new_tokens=10)
    assert lm.generate(torch.tensor(prompt), max_new_tokens=10) == lm.generate("the ", max_new_tokens=10)


def test_a_seed_repeats_a_draw(lm: LM) -> None:
    def draw(seed: int | None) -> str:
        return lm.generate("the ", max_new_tokens=60, temperature=1.0, seed=seed)

    assert draw(3) == draw(3)
    assert len({draw(seed) for seed in range(4)}) == 4
    assert len(draw(3)) == 60


def spoken(tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch) -> LM:
    """An LM whose model always says ``text``, then as many newlines as it is asked for."""
    ids = tokenizer.encode(text + "\n" * 50).tolist()

    def stream(model: object, ids_BT: object, most: int, options: object) -> Iterator[torch.Tensor]:
        for token in ids[:most]:
            yield torch.tensor([token])

    monkeypatch.setattr("moesaic.lm.stream", stream)
    model: Any = SimpleNamespace(lm_head=SimpleNamespace(weight=torch.zeros(1)))
    config: Any = None
    return LM(config, model, tokenizer, Path("."))


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (["mill"], "the old "),
        (["mill", "old"], "the "),
        (["old", "old mill"], "the "),
        (["mint", "milk"], "the old mill by the mile\n"),
        (["l by", " mile"], "the old mil"),
        (["the old"], ""),
        ([""], "the old mill by the mile\n"),
        (["mile\n\n"], "the old mill by the "),
    ],
)
def test_no_part_of_a_stop_text_is_given_away(
    stop: Sequence[str], pieces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the old mill by the mile"
    lm = spoken(Tokenizer.char([text + "\n"]), text, monkeypatch)
    found = list(lm.stream("t", max_new_tokens=len(text) + (1 if stop[0] != "mile\n\n" else 9), stop=stop))
    assert "".join(found) == pieces
    assert all(found)
    given = ""
    for piece in found:  # what has been printed never needs taking back
        given += piece
        assert pieces.startswith(given)


def test_what_was_held_back_comes_when_nothing_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = spoken(Tokenizer.char(["the mil\n"]), "the mil", monkeypatch)
    assert list(lm.stream("t", max_new_tokens=7, stop=["mill"]))[-1] == "mil"


def test_characters_of_several_bytes_come_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = spoken(Tokenizer.byte(), "zß水🍌", monkeypatch)
    assert list(lm.stream("t", max_new_tokens=10)) == ["z", "ß", "水", "🍌"]
    assert "".join(lm.stream("t", max_new_tokens=8)) == "zß水\ufffd"
    assert "".join(lm.stream("t", max_new_tokens=10, stop=["水"])) == "zß"


def test_the_end_of_a_text_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.bpe(["the old mill " * 20], 270)
    lm = spoken(tokenizer, "the old<|endoftext|>mill", monkeypatch)
    assert lm.generate("the", max_new_tokens=40) == "the old"


@pytest.mark.parametrize("prompt", ["", [], torch.zeros(1, 0, dtype=torch.int64)])
def test_an_empty_prompt_is_refused(lm: LM, prompt: Any) -> None:
    with pytest.raises(RecipeError, match="empty"):
        lm.generate(prompt)


def test_a_batch_and_an_unknown_character_are_refused(lm: LM) -> None:
    with pytest.raises(RecipeError, match="one sequence"):
        lm.generate(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(DataError, match="U\\+00DF"):
        lm.generate("the ß")


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}, {"temperature": float("nan")}]
)
def test_a_wrong_option_is_a_sentence(lm: LM, wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        lm.generate("the", **wrong)


def test_a_path_that_holds_no_model_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such directory"):
        load(tmp_path / "nothing")
    with pytest.raises(RecipeError, match="no such directory"):
        load(run / "recipe.toml")
    with pytest.raises(RecipeError, match="holds no moesaic run"):
        load(tmp_path)
    with pytest.raises(RecipeError, match="cuda"):
        load(run, "cudda")


@pytest.mark.parametrize("name", ["model.safetensors", "moesaic.json", "tokenizer.json", "manifest.json"])
def test_one_flipped_bit_names_its_file(run: Path, name: str, tmp_path: Path) -> None:
    for place in ("model", "checkpoints/step-00000040"):
        damaged = copy(run, tmp_path / place.replace("/", "-"))
        flip(damaged / place / name)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
            load(damaged / place)
        assert caught.value.exit_code == 4
        assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "moesaic.json", "tokenizer.json"])
def test_a_file_that_is_gone_is_named(run: Path, name: str, tmp_path: Path) -> None:
    damaged = copy(run, tmp_path / "damaged")
    (damaged / "model" / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(damaged / "model")


def test_weights_of_another_shape_are_refused(run: Path, tmp_path: Path) -> None:
    from moesaic.weights.checkpoint import read_checkpoint, write_checkpoint

    contents = read_checkpoint(run / "model")
    described = json.loads(json.dumps(contents.json["moesaic.json"]))
    described["model"]["experts"]["hidden"] = 20
    contents.json["moesaic.json"] = described
    write_checkpoint(tmp_path / "changed", contents)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path / "changed")


@pytest.mark.parametrize("words", [["model.position=learned"], ["model.dropout=0.3", "model.norm=layer"]])
def test_a_tied_model_is_stored_once_and_loads(words: list[str], tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "model.tied=true", "train.steps=3", *words)
    newest = newest_valid(run, print)
    assert newest is not None
    for place in (run / "model", newest):
        lm = load(place)
        assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
        ids_BT = lm.ids("the old mill")
        hidden_BTD = lm.model(ids_BT).hidden_BTD
        with torch.no_grad():
            torch.testing.assert_close(
                lm.logits(ids_BT), hidden_BTD @ lm.model.model.embed_tokens.weight.T, rtol=1e-5, atol=1e-5
            )
    stored = (run / "model" / "model.safetensors").read_bytes()
    assert b"lm_head" not in stored
    assert tiny(tmp_path, "model.tied=true").model.tied
