"""The command line: every verb, and for every bad input one sentence, its exit code and no traceback."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_runs import command, run_tiny, tiny_file

from moesaic import cli, machine
from moesaic.train.recipe import builtin_recipes
from moesaic.weights.checkpoint import step_name


class Answer(NamedTuple):
    """What a command left behind. ``said`` is standard error without progress lines."""

    code: int
    out: str
    said: str


Command = Callable[..., Answer]


@pytest.fixture
def moesaic(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``moesaic WORDS`` in this process, as the installed script runs it."""

    def run(*words: object, stdin: str = "") -> Answer:
        monkeypatch.setattr(sys, "argv", ["moesaic", *map(str, words)])
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape")))
        )
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny recipe and its run."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(folder / "cache"))
        run_tiny(folder, "run", "train.steps=2", "checkpoint.every=1")
    return folder


def refused(answer: Answer, code: int, *said: str) -> None:
    assert answer.code == code, answer
    for words in said:
        assert words in answer.said
    assert "Traceback" not in answer.said
    sentences = [line for line in answer.said.splitlines() if line.startswith("moesaic: ")]
    assert len(sentences) == 1


def test_no_verb_and_an_unknown_one(moesaic: Command) -> None:
    for words in ([], ["--help"]):
        answer = moesaic(*words)
        for verb in ("train", "demo", "generate", "inspect", "recipes", "env", "bench"):
            assert verb in answer.out + answer.said
    assert moesaic("--help").code == 0
    assert moesaic("trian").code == 2
    assert moesaic("generate").code == 2


def test_train_and_its_json(moesaic: Command, tmp_path: Path) -> None:
    """Both ways of writing an override, in one command."""
    file = tiny_file(tmp_path)
    answer = moesaic("train", file, f"out={tmp_path / 'a'}", "--train.steps", "2", "--model.router.top_k=1")
    assert (answer.code, answer.out) == (0, f"done: {tmp_path / 'a'}\n")
    stored = (tmp_path / "a" / "recipe.toml").read_text()
    assert "steps = 2" in stored
    assert "top_k = 1" in stored
    answer = moesaic("train", file, "--out", tmp_path / "b", "train.steps=1", "tracker=none", "--json")
    assert answer.code == 0
    assert json.loads(answer.out) == {"run": str(tmp_path / "b")}
    answer = moesaic("train", tmp_path / "b", f"out={tmp_path / 'b'}", "train.steps=2", "--resume", "--json")
    assert answer.code == 0
    assert "continues at step 1 of 2" in answer.said


def test_a_dry_run_trains_nothing(moesaic: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = moesaic("train", tiny_file(tmp_path), f"out={out}", "--dry-run")
    assert answer.code == 0
    assert "5,168 active" in answer.out
    assert not out.exists()
    answer = moesaic("train", tiny_file(tmp_path), f"out={out}", "--dry-run", "--json")
    told = json.loads(answer.out)
    assert told["run"] == str(out)
    assert told["active"] == 5168
    assert {"parameters", "peak_bytes", "disk_bytes", "step_seconds", "total_seconds"} <= told.keys()
    assert not out.exists()


def test_bench(moesaic: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.train.measure.matmul_rate", partial(machine.matmul_rate, size=64))
    monkeypatch.setattr("moesaic.train.measure.read_bandwidth", partial(machine.read_bandwidth, size=2**16))
    answer = moesaic("bench", tiny_file(tmp_path), "--json")
    assert answer.code == 0
    told = json.loads(answer.out)
    assert all(told[key] > 0 for key in ("matmul_flops", "read_bytes_per_second", "decode_tokens_per_second"))


def test_env(moesaic: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_rate", partial(machine.matmul_rate, size=64))
    monkeypatch.setattr(machine, "read_bandwidth", partial(machine.read_bandwidth, size=2**16))
    answer = moesaic("env", "--json")
    assert answer.code == 0
    told = json.loads(answer.out)
    assert {"python", "packages", "threads", "matmul_gflops", "read_gb_per_s"} <= told.keys()
    for secret in (os.environ.get("HOME"), os.environ.get("USER"), os.uname().nodename):
        assert not secret or len(secret) < 6 or secret not in answer.out
    assert "torch" in moesaic("env").out


def test_recipes(moesaic: Command, tmp_path: Path) -> None:
    listed = json.loads(moesaic("recipes", "list", "--json").out)
    assert list(listed) == list(builtin_recipes())
    assert all(name in moesaic("recipes").out for name in listed)
    source = builtin_recipes()["makemoe"].read_text(encoding="utf-8")
    assert moesaic("recipes", "show", "makemoe").out == source
    resolved = moesaic("recipes", "show", "makemoe", "--resolved", "train.steps=7").out
    assert "steps = 7" in resolved
    assert "max_line_bytes" in resolved
    refused(moesaic("recipes", "show", "nothing"), 2, "'nothing' is no recipe")


def test_a_copied_recipe_overwrites_nothing(moesaic: Command, tmp_path: Path) -> None:
    source = builtin_recipes()["demo"].read_text(encoding="utf-8")
    assert moesaic("recipes", "copy", "demo", tmp_path).out.split() == [str(tmp_path / "demo.toml")]
    assert (tmp_path / "demo.toml").read_text(encoding="utf-8") == source
    (tmp_path / "demo.toml").write_text("mine")
    for target in (tmp_path, tmp_path / "demo.toml"):
        refused(moesaic("recipes", "copy", "demo", target), 2, "exists; choose another name")
    assert (tmp_path / "demo.toml").read_text() == "mine"
    refused(moesaic("recipes", "copy", "demo", tmp_path / "no" / "x.toml"), 2, "cannot be written")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.stepz=3"], "did you mean train.steps?"),
        (["--model.routr.top_k", "3"], "did you mean model.router?"),
        (["model.router.top_k=9"], "above experts.count = 4"),
        (["model.width=15"], "does not divide"),
        (["optim.lr=-1"], "optim.lr"),
        (["optim.lr=nan"], "optim.lr"),
        (["optim.lr=quick"], "optim.lr"),
        (["train.steps=1.5"], "train.steps"),
        (["stray"], "key=value"),
        (["--train.steps"], "value is missing"),
        (["train.device=cuda:7"], "train.device"),
        (["train.freeze=['nothing*']"], "matches no parameter"),
        (["eval.prompt=''", "eval.sample=5"], "eval.prompt"),
    ],
)
def test_a_wrong_override(moesaic: Command, words: list[str], said: str, tmp_path: Path) -> None:
    refused(moesaic("train", tiny_file(tmp_path), f"out={tmp_path / 'out'}", *words), 2, said)


@pytest.mark.parametrize(
    ("name", "content", "words", "said"),
    [
        ("gone.txt", None, [], ["gone.txt"]),
        ("empty.txt", b"", [], ["empty.txt"]),
        ("latin.txt", b"fa\xe7ade\n" * 50, [], ["latin.txt", "UTF-8"]),
        ("short.txt", b"too short", [], ["train.seq_len=16 needs 17"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', [], ["bad.jsonl:2", "JSON"]),
        ("bad.jsonl", b'{"text": "a"}\n["a"]\n', [], ["bad.jsonl:2"]),
        ("other.jsonl", b'{"body": "a"}\n', [], ["other.jsonl:1", "'text'", "body"]),
        (
            "long.jsonl",
            b'{"text": "a"}\n{"text": "' + b"b" * 5000 + b'"}\n',
            ["data.max_line_bytes=1000"],
            ["long.jsonl:2", "1000 bytes"],
        ),
        ("odd.jsonl", b'{"text": 3}\n', [], ["odd.jsonl:1", "not a string"]),
    ],
)
def test_a_corpus_that_cannot_be_read(
    moesaic: Command, name: str, content: bytes | None, words: list[str], said: list[str], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    answer = moesaic("train", tiny_file(tmp_path), f"out={out}", f"data.path={tmp_path / name}", *words)
    refused(answer, 3, *said)
    (tmp_path / name).write_text("the old river runs\n" * 60)  # mended, the same command works
    if name.endswith(".txt"):
        assert (
            moesaic("train", tmp_path / "tiny.toml", f"out={out}", f"data.path={tmp_path / name}").code == 0
        )


def test_a_sample_prompt_that_cannot_be_read(moesaic: Command, tmp_path: Path) -> None:
    words = ["eval.prompt=ß", "eval.sample=5", "eval.every=1", f"out={tmp_path / 'out'}"]
    refused(moesaic("train", tiny_file(tmp_path), *words), 3, "U+00DF")


def test_a_directory_that_cannot_be_used(moesaic: Command, tmp_path: Path, trained: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    file = tiny_file(tmp_path)
    refused(moesaic("train", file, f"out={tmp_path / 'full'}"), 2, "not empty")
    refused(moesaic("train", file, f"out={trained / 'run'}"), 2, "--resume")
    refused(moesaic("train", file, f"out={file}"), 2, "is a file")
    refused(moesaic("train", file, f"out={file}/below"), 2, str(file))
    refused(moesaic("train", file, "--resume", f"out={tmp_path / 'none'}"), 2, "no run to resume")
    refused(moesaic("train", tmp_path / "none.toml"), 2, "no such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(moesaic: Command, tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir(mode=0o500)
    refused(moesaic("train", tiny_file(tmp_path), f"out={tmp_path / 'sealed' / 'run'}"), 2, "sealed")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint(moesaic: Command, trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    flip(run / "model" / "model.safetensors")
    for verb in ("generate", "inspect"):
        refused(moesaic(verb, run, "-p", "the"), 4, "model.safetensors")
    for step in (1, 2):
        flip(run / "checkpoints" / step_name(step) / "optimizer.safetensors")
    answer = moesaic("train", run, f"out={run}", "train.steps=3", "--resume")
    refused(answer, 4, "optimizer.safetensors")


def test_generate(moesaic: Command, trained: Path) -> None:
    words = ["generate", trained / "run", "-n", "12", "--seed", "4"]
    answer = moesaic(*words, "--prompt", "the old")
    assert answer.code == 0
    assert answer.out.startswith("the old")
    assert len(answer.out) == len("the old") + 12 + 1
    assert moesaic(*words, "-p", "-", stdin="the old").out == answer.out
    assert moesaic(*words, "-p", "the old", "--temperature", "0").code == 0
    first = answer.out[len("the old")]
    assert moesaic(*words, "-p", "the old", "--stop", first).out == "the old\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-p", "groß"], 3, "is not among the 19 characters"),
        (["-p", ""], 2, "prompt is empty"),
        (["-p", "the", "--top-p", "0"], 2, "top_p"),
        (["-p", "the", "--seed", str(2**70)], 2, "seed"),
        (["-p", "the", "--device", "banana"], 2, "banana"),
    ],
)
def test_generate_refuses(moesaic: Command, trained: Path, words: list[str], code: int, said: str) -> None:
    refused(moesaic("generate", trained / "run", *words), code, said)


def test_a_model_that_is_not_there(moesaic: Command, tmp_path: Path) -> None:
    refused(moesaic("generate", tmp_path / "none", "-p", "the"), 2, "no such directory")
    refused(moesaic("inspect", tmp_path, "-p", "the"), 2, "no moesaic run")


def test_inspect(moesaic: Command, trained: Path, tmp_path: Path) -> None:
    words = ["inspect", trained / "run", "-p", "the old"]
    answer = moesaic(*words, "--tokens", "--out", tmp_path / "routing.png")
    assert answer.code == 0
    assert "routing of 7 tokens" in answer.out
    assert "first expert of each token" in answer.out
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(moesaic(*words, "--json").out)
    assert told["tokens"] == list("the old")
    refused(moesaic(*words, "--out", tmp_path / "routing.jpg"), 2, ".png")
    refused(moesaic(*words, "--out", tmp_path / "nowhere" / "routing.png"), 2, "nowhere")


def test_inspect_of_a_dense_model(moesaic: Command, tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "dense", "model.pattern=D", "train.steps=1")
    refused(moesaic("inspect", run, "-p", "the"), 2, "is a dense model")
    assert moesaic("generate", run, "-p", "the", "-n", "3").code == 0


def test_what_could_steer_a_terminal_is_printed_escaped(moesaic: Command, tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "bytes", "data.tokenizer=byte", "train.steps=1")
    answer = moesaic("inspect", run, "-p", "\x1b]0;owned\x07[red]", "--tokens")
    assert answer.code == 0
    assert "\x1b" not in answer.out
    assert "\x07" not in answer.out
    assert "\\x1b" in answer.out


def test_out_of_memory_is_a_sentence(moesaic: Command, tmp_path: Path) -> None:
    words = [f"out={tmp_path / 'out'}", "model.width=65536", "model.experts.hidden=10000000"]
    refused(moesaic("train", tiny_file(tmp_path), *words), 6, "memory")


def test_the_real_process_ends_with_the_code_and_one_sentence(tmp_path: Path) -> None:
    done = command("train", str(tiny_file(tmp_path)), "train.stepz=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "did you mean train.steps?" in done.stderr


def test_recipes_that_are_not_there_are_named_and_nothing_is_left(moesaic: Command, tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    refused(moesaic("recipes", "show", tmp_path / "gone.toml"), 2, "gone.toml", "no such file")
    refused(moesaic("recipes", "show", tmp_path), 2, "is a directory")
    refused(moesaic("recipes", "copy", tmp_path / "gone.toml", target), 2, "gone.toml", "no such file")
    assert not target.exists()


@pytest.mark.parametrize(("prompt", "stdin"), [("a\udcff", ""), ("-", "a\udcff")], ids=["option", "stdin"])
def test_a_prompt_that_is_not_text_is_refused_and_not_echoed(
    moesaic: Command, trained: Path, prompt: str, stdin: str
) -> None:
    answer = moesaic("generate", trained / "run", "--prompt", prompt, stdin=stdin)
    refused(answer, 3, "not UTF-8 text (byte 1)")
    assert answer.out == ""


def test_a_character_the_model_cannot_read_is_refused_and_not_echoed(moesaic: Command, trained: Path) -> None:
    answer = moesaic("generate", trained / "run", "--prompt", "river \N{SNOWMAN}")
    refused(answer, 3, "\N{SNOWMAN}")
    assert answer.out == ""


def test_a_dry_run_finds_what_the_run_would(moesaic: Command, trained: Path) -> None:
    recipe, run = tiny_file(trained), f"out={trained / 'run'}"
    refused(moesaic("train", recipe, run, "--resume", "--dry-run", "optim.lr=9"), 2, "optim.lr")
    answer = moesaic("train", recipe, f"out={trained / 'other'}", "--dry-run", "--json")
    numbers = json.loads(answer.out)
    assert numbers["run"] == str(trained / "other")
    assert numbers["step_seconds"] > 0
    assert numbers["disk_bytes"] > numbers["checkpoint_bytes"] > 0
