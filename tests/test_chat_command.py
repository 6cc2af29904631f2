"""Conversations: the template, the commands, who said what, and a plain pipe."""

import io
import json
from pathlib import Path

import pytest
from dense_donors import TEMPLATE, change, chat_template, dense
from rich.console import Console

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic.chat import Chat, run_chat  # noqa: E402
from moesaic.data.chat import PLAIN_TEMPLATE  # noqa: E402
from moesaic.errors import RecipeError  # noqa: E402
from moesaic.merge.merge import merge  # noqa: E402
from moesaic.merge.options import MergeOptions  # noqa: E402


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    base = dense(tmp_path / "base")
    chat_template(base, TEMPLATE)
    experts = {name: str(change(base, tmp_path / name, seed, ".mlp.")) for seed, name in enumerate("ab", 1)}
    merge(
        MergeOptions.model_validate({"base": str(base), "experts": experts}), tmp_path / "moe", lambda _: None
    )
    return tmp_path / "moe"


def talk(
    moe: Path, *lines: str, width: int = 200, colour: bool = False, **options: object
) -> tuple[Chat, str]:
    chat = Chat(moesaic.load(moe), max_new_tokens=6, temperature=0.0, **options)  # type: ignore[arg-type]
    written = io.StringIO()
    system = "truecolor" if colour else None
    run_chat(chat, Console(file=written, width=width, color_system=system, force_terminal=colour), lines)
    return chat, written.getvalue()


def test_answers_are_greedy_continuations_of_the_rendered_conversation(moe: Path) -> None:
    chat, written = talk(moe, "the mill", "turns")
    lm = moesaic.load(moe)
    first = lm.generate(lm.tokenizer.encode("u:the mill\na:").tolist(), 6)
    second = lm.generate(lm.tokenizer.encode(f"u:the mill\na:{first}\nu:turns\na:").tolist(), 6)
    assert [m["content"] for m in chat.messages] == ["the mill", first, "turns", second]
    assert written.replace("\n", "") == (first + second).replace("\n", "")


def test_commands(moe: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    chat, written = talk(
        moe, "/system old", "the mill", f"/save {file}", f"/save {file}", "/what", "/help", "/quit", "x"
    )
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert json.loads(file.read_text())["messages"] == chat.messages
    assert "exists" in written
    assert "/what: no such command" in written
    assert "/reset" in written
    chat, _ = talk(moe, "/system old", "the mill", "/reset")
    assert [m["role"] for m in chat.messages] == ["system"]


def test_who_said_what_is_the_routing_of_the_answer(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    chat, written = talk(moe, "/experts", "the mill", colour=True)
    said = chat.experts()
    assert "".join(piece for piece, _ in said) == chat.messages[-1]["content"]
    lm = moesaic.load(moe)
    prompt = "u:the mill\na:"
    routings = lm.routing(lm.ids(lm.tokenizer.encode(prompt + chat.messages[-1]["content"]).tolist()))
    for n, (_, expert) in enumerate(said):
        where = len(prompt) - 1 + n
        weight = [0.0, 0.0]
        for r in routings:
            for e, w in zip(r.expert_TK[where].tolist(), r.weight_TK[where].tolist(), strict=True):
                weight[e] += w
        assert expert == weight.index(max(weight))
    assert "\x1b[" in written
    assert "a " in written or "b " in written


def test_what_cannot_be_said_is_a_sentence_and_the_talk_goes_on(moe: Path) -> None:
    chat, written = talk(moe, "Ж", "the mill " * 20, "the mill")
    assert "not among the" in written
    assert "say /reset" in written
    assert chat.messages[0]["content"] == "the mill"


def test_a_dense_model_has_no_experts_and_a_model_without_a_template_gets_chatml(moe: Path) -> None:
    base = moe.parent / "base"
    chat, written = talk(base, "/experts")
    assert "dense model" in written
    (base / "tokenizer_config.json").unlink()
    assert Chat(moesaic.load(base)).template.source == PLAIN_TEMPLATE
    with pytest.raises(RecipeError):
        chat.command("/save", lambda _: None)
