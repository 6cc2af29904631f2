"""The routing of one text as tables, as JSON and as a picture."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table
from tiny_runs import tiny_file

from moesaic.analysis.prompt import PromptRouting, route_prompt
from moesaic.data.tokenizers import Tokenizer
from moesaic.lm import LM
from moesaic.model.transformer import LanguageModel
from moesaic.train.recipe import load_recipe

TEXT = "the old\x1b[31m [bold]mill\n"


def made(folder: Path, *words: str, tokenizer: Tokenizer | None = None) -> LM:
    tokenizer = tokenizer or Tokenizer.byte()
    config = load_recipe(str(tiny_file(folder)), [f"model.vocab_size={tokenizer.vocab_size}", *words]).model
    torch.manual_seed(0)
    return LM(config, LanguageModel(config).eval(), tokenizer, folder)


def printed(table: Table) -> str:
    out = StringIO()
    Console(file=out, width=200, force_terminal=False).print(table)
    return out.getvalue()


@pytest.fixture
def routing(tmp_path: Path) -> PromptRouting:
    return route_prompt(made(tmp_path, "model.context=64"), TEXT)


def test_json_holds_every_choice(routing: PromptRouting) -> None:
    told = json.loads(json.dumps(routing.as_json()))
    assert told["num_experts"] == 4
    assert len(told["tokens"]) == len(TEXT)
    assert [layer["layer"] for layer in told["layers"]] == [0, 1]
    for layer, value in zip(told["layers"], routing.routings, strict=True):
        assert [token["experts"] for token in layer["tokens"]] == value.expert_TK.tolist()
        assert layer["tokens"][3]["weights"] == pytest.approx(value.weight_TK[3].tolist(), abs=1e-6)
        assert sum(share["confidence"] for share in layer["dominant"]) <= 1.00001
        first = layer["dominant"][0]
        assert first["confidence"] == max(share["confidence"] for share in layer["dominant"])


def test_the_layer_table_names_the_dominant_experts(routing: PromptRouting) -> None:
    shown = printed(routing.layer_table(2))
    told = routing.as_json()
    for layer in told["layers"]:
        for share in layer["dominant"][:2]:
            assert f"expert {share['expert']}  {100 * share['confidence']:.0f}%" in shown
    assert f"routing of {len(TEXT)} tokens" in shown
    assert "third" not in shown
    assert printed(routing.layer_table(99))  # no more columns than experts


def test_tokens_are_shown_escaped_and_not_as_markup(routing: PromptRouting) -> None:
    shown = printed(routing.token_table())
    assert "\x1b" not in shown
    assert "\\x1b" in shown
    assert "⏎" in shown
    assert shown.count(" (") >= 2 * len(TEXT)
    assert all("\x1b" not in token for token in routing.as_json()["tokens"])


def test_words_in_brackets_stay(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bpe(["[bold] [red] " * 40], 262)
    routing = route_prompt(made(tmp_path, "model.context=64", tokenizer=tokenizer), "[bold] [red]")
    assert "".join(routing.tokens) == "[bold] [red]"
    shown = printed(routing.token_table())
    assert all(token.strip() in shown for token in routing.tokens)


def test_a_picture_is_drawn(routing: PromptRouting, tmp_path: Path) -> None:
    routing.draw(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_last_window_is_looked_at(tmp_path: Path) -> None:
    lm = made(tmp_path, "model.context=8")
    assert route_prompt(lm, "0123456789abc").tokens == list("56789abc")


def test_expert_choice_and_dropped_tokens_are_told_as_they_are(tmp_path: Path) -> None:
    lm = made(tmp_path, "model.router={kind='top_k', eval_capacity_factor=0.5}", "model.context=64")
    told = route_prompt(lm, "the old mill runs past").as_json()
    kept = [len(token["experts"]) for layer in told["layers"] for token in layer["tokens"]]
    assert min(kept) < 2
    assert max(kept) <= 2


def test_a_dense_model_has_no_routings(tmp_path: Path) -> None:
    assert route_prompt(made(tmp_path, "model.pattern=D"), "the").routings == []
