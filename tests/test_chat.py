"""Chat templates in their sandbox, instruction rows, and what of them is learnt."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_donors import chat_template

from moesaic.data.chat import ChatTemplate, load_template
from moesaic.data.corpora import DataOptions
from moesaic.data.examples import prepare_examples
from moesaic.data.instructions import Example, read_examples, tokens_of
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError

TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]
PLAIN = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FLOOD = "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}"
STRINGS = "{% set s = 'x' * 99999 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}"


def test_the_assistants_words_are_found() -> None:
    text, spans = ChatTemplate(PLAIN).spans(TALK)
    assert text == "<user>2+2?\n<assistant>4.\n<user>sure?\n<assistant>yes\n"
    assert [text[a:b] for a, b in spans] == ["4.\n", "yes\n"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (LOOP, "does not come to an end"),
        (STRINGS, "does not come to an end"),
        (FLOOD, "writes more than"),
        ("{{ messages[0].content * 10000000000 }}", "the chat template: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('no system turn, please') }}", "no system turn, please"),
        ("{% for %}", "the chat template: "),
        ("{{ messages | length - add_generation_prompt | int }}", "depends on later turns"),
    ],
)
def test_a_template_is_a_stranger(source: str, sentence: str) -> None:
    before = sys.gettrace()
    with pytest.raises(DataError, match=sentence):
        ChatTemplate(source).spans(TALK)
    assert sys.gettrace() is before


def test_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    chat_template(tmp_path, PLAIN, eos_token={"content": "</s>"})
    found = load_template(tmp_path)
    assert found is not None
    assert (found.source, found.tokens["eos_token"], found.tokens["bos_token"]) == (PLAIN, "</s>", "")
    (tmp_path / "chat_template.jinja").write_text("other")
    assert load_template(tmp_path) == ChatTemplate(
        "other", found.tokens, str(tmp_path / "chat_template.jinja")
    )
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_template(tmp_path)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_every_form_are_conversations(tmp_path: Path) -> None:
    file = write(
        tmp_path / "coder.jsonl",
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "output": "done", "domain": "other"},
        {"messages": TALK},
        {"text": "plain"},
    )
    a, b, c, d = read_examples(file)
    assert a.messages[0]["content"] == "do\n\nthis"
    assert (a.domain, b.domain) == ("coder", "other")
    assert c.messages == TALK
    assert (d.messages, d.text) == ([], "plain")
    assert next(read_examples(file, "given")).domain == "given"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"instruction": "do", "output": " "}, "x.jsonl:1: output is empty"),
        ({"instruction": "do"}, "no field 'output'; instruction and output go together"),
        ({"messages": []}, "no list of turns"),
        ({"messages": [{"role": "user", "content": "hm"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "robot", "content": "hm"}]}, "role is one of"),
        ({"instruction": "do", "input": 3, "output": "x"}, "field 'input' holds int"),
        ({"question": "do"}, "no field 'text'"),
    ],
)
def test_rows_that_say_nothing_are_named(row: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        list(read_examples(write(tmp_path / "x.jsonl", row)))


def test_only_what_the_assistant_says_is_learnt() -> None:
    tokenizer = Tokenizer.byte()
    ids, learnt = tokens_of(Example(TALK, "", "x", "x"), tokenizer, ChatTemplate(PLAIN))
    assert tokenizer.decode(ids[learnt]) == "4.\nyes\n"
    assert tokenizer.decode(ids) == "<user>2+2?\n<assistant>4.\n<user>sure?\n<assistant>yes\n"
    ids, learnt = tokens_of(Example([], "plain", "x", "x"), tokenizer, None)
    assert learnt.all()


def store_of(tmp_path: Path, seq_len: int = 64, **files: int):  # type: ignore[no-untyped-def]
    paths = {}
    for label, count in files.items():
        rows = [{"instruction": f"{label} {n}", "output": f"{n}" * (1 + n % 5)} for n in range(count)]
        paths[label] = str(write(tmp_path / f"{label}.jsonl", *rows))
    template = tmp_path / "t.jinja"
    template.write_text(PLAIN)
    options = DataOptions(source="instructions", path=paths, tokenizer="byte", template=str(template))
    return prepare_examples(options, Tokenizer.byte(), seq_len, lambda _: None)


def test_batches_are_padded_and_masked_and_a_function_of_seed_and_step(tmp_path: Path) -> None:
    store = store_of(tmp_path, a=20, b=10)
    windows = store.batch(1, 2, 6, 64)
    ids_BT, target_BT, real_BT = windows.ids_BT, windows.target_BT, windows.real_BT
    assert windows.document_BT is None
    assert torch.equal(store.batch(1, 2, 6, 64).ids_BT, ids_BT)
    assert not torch.equal(store.batch(1, 3, 6, 64).ids_BT[:, :8], ids_BT[:, :8])
    assert (ids_BT[~real_BT] == 0).all()
    assert (target_BT[~real_BT] == -100).all()
    for ids, target in zip(ids_BT, target_BT, strict=True):
        said = Tokenizer.byte().decode(target[target >= 0].tolist())
        asked = Tokenizer.byte().decode(ids.tolist()).split("\n")[0]
        number = asked.split(" ")[1]
        assert said == number * (1 + int(number) % 5) + "\n"


def test_a_tenth_of_each_domain_is_held_out_once(tmp_path: Path) -> None:
    store = store_of(tmp_path, a=200, b=10)
    assert store.domains == ["a", "b"]
    assert 10 < len(store.shards[0].val) < 32  # 20 are expected, with a deviation of 4
    assert len(store.shards[1].val) >= 1
    held_out = {ids.tobytes() for shard in store.shards for ids, _ in shard.val}
    assert not held_out & {ids.tobytes() for shard in store.shards for ids, _ in shard.train}
    windows = list(store.validation(2, 64))
    targets = sum(int((w.target_BT >= 0).sum()) for w in windows)
    assert targets == sum(shard.tokens - shard.train_tokens for shard in store.shards)
    bytes_ = store.bytes_per_token("val", "b")
    assert bytes_ == 1
    with pytest.raises(DataError, match="no domain 'c'"):
        store.validation(1, 64, "c")


def test_no_length_template_or_neighbour_moves_an_example_to_the_other_side(tmp_path: Path) -> None:
    def sides(seq_len: int, rows: int, template: str) -> dict[str, bool]:
        data = [{"instruction": f"q {n}", "output": f"{n} " * 9} for n in range(rows)]
        file, source = write(tmp_path / "rows.jsonl", *data), tmp_path / "t.jinja"
        source.write_text(template)
        options = DataOptions(source="instructions", path=str(file), tokenizer="byte", template=str(source))
        store = prepare_examples(options, Tokenizer.byte(), seq_len, lambda _: None)
        found = {}
        for shard in store.shards:
            for held, part in ((False, shard.train), (True, shard.val)):
                for ids, _ in part:
                    text = Tokenizer.byte().decode(ids.tolist())
                    found[text[text.index("q ") :].split("\n")[0]] = held
        return found

    first = sides(64, 80, PLAIN)
    for other in (sides(24, 80, PLAIN), sides(64, 40, PLAIN), sides(64, 80, "# " + PLAIN)):
        assert other.items() <= first.items()
        assert len(other) >= 40


def test_rows_of_another_domain_are_not_this_ones(tmp_path: Path) -> None:
    rows = [{"domain": "ab"[n % 2], "instruction": f"{n}", "output": "x"} for n in range(6)]
    file = write(tmp_path / "mixed.jsonl", *rows, {"instruction": "any", "output": "y"})
    assert [e.messages[0]["content"] for e in read_examples(file, "a")] == ["0", "2", "4", "any"]
    assert [e.domain for e in read_examples(file)] == ["a", "b"] * 3 + ["mixed"]


def test_examples_cut_to_nothing_are_counted_and_a_domain_of_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing is left to learn of a in train\.seq_len = 8"):
        store_of(tmp_path, 8, a=20)
    rows = [{"instruction": "x" * 90 * (n % 2), "output": "yes"} for n in range(20)]
    file = write(tmp_path / "half.jsonl", *rows)
    options = DataOptions(source="instructions", path=str(file), tokenizer="byte")
    store = prepare_examples(options, Tokenizer.byte(), 90, lambda _: None)
    assert store.notes == ["10 examples have nothing to learn in 90 tokens; left out"]
    assert np.all([len(ids) <= 91 for shard in store.shards for ids, _ in shard.train])
    with pytest.raises(DataError, match="too few to hold one out"):
        store_of(tmp_path, a=1)
    with pytest.raises(DataError, match=r"data\.path: name the files"):
        prepare_examples(DataOptions(source="instructions"), Tokenizer.byte(), 8, lambda _: None)


def test_joined_rows_always_have_something_to_learn(tmp_path: Path) -> None:
    rows = [{"instruction": "x" * (40 * (n % 2)), "output": "yes"} for n in range(20)]
    file = write(tmp_path / "half.jsonl", *rows)
    options = DataOptions(source="instructions", path=str(file), tokenizer="byte", join=1.0)
    store = prepare_examples(options, Tokenizer.byte(), 110, lambda _: None)
    for step in range(20):
        assert (store.batch(0, step, 8, 110).target_BT >= 0).any(1).all()


def test_a_refusing_template_is_told_with_the_row(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"instruction": "a", "output": "b"})
    (example,) = read_examples(file)
    with pytest.raises(DataError, match=r"x\.jsonl:1: .*no, thanks"):
        tokens_of(example, Tokenizer.byte(), ChatTemplate("{{ raise_exception('no, thanks') }}"))


def test_a_row_of_another_field_is_read_where_it_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"content": "plain"})
    assert next(read_examples(file, field="content")).text == "plain"
