"""What was trained opens elsewhere with the same logits, ids and facts, or is refused and leaves nothing."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import rows, run_tiny

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic import cli  # noqa: E402
from moesaic.errors import RecipeError  # noqa: E402

WORDS = ["model.attention.qk_norm=full", "data.tokenizer=bpe", "data.vocab_size=300", "eval.every=2"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An OLMoE in the making, and a model that no stock architecture expresses."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(folder / "cache"))
        run = run_tiny(folder, "run", *WORDS)
        return {"run": run, "conv": run_tiny(folder, "conv", "model.conv=4", "train.steps=1")}


@pytest.fixture
def run(runs: dict[str, Path]) -> Path:
    return runs["run"]


def config(out: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((out / "config.json").read_text())
    return table


@torch.no_grad()
def same_logits(out: Path, run: Path) -> bool:
    """Whether transformers and ``load`` make of ``out`` what the run makes of its own weights."""
    ids_BT = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()(ids_BT).logits
    ours = moesaic.load(out).logits(ids_BT)
    return torch.equal(ours, moesaic.load(run).logits(ids_BT)) and bool((theirs - ours).abs().max() <= 1e-6)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def model_of(out: Path) -> dict[str, bytes]:
    """All that an export is but its card, whose title is the source's name, and the card's checksum."""
    about = ("README.md", "manifest.json")
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in about}


# What is written


def test_transformers_opens_it_with_the_same_logits_and_ids(run: Path, tmp_path: Path) -> None:
    assert moesaic.export_model(run, tmp_path / "out") == "OlmoeForCausalLM"
    assert same_logits(tmp_path / "out", run)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), moesaic.load(run).tokenizer
    for text in ("the old river turns past Zürich\n", "", " the  the", "<|endoftext|>the", "\N{SNOWMAN}\x00"):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text, special=True).tolist()
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eos_id == config(tmp_path / "out")["eos_token_id"]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ours.eos_id


def test_a_finished_run_is_not_changed_and_an_empty_directory_will_do(run: Path, tmp_path: Path) -> None:
    before = names(run)
    (tmp_path / "out").mkdir()
    moesaic.export_model(str(run), str(tmp_path / "out"))
    assert names(run) == before
    assert names(tmp_path) == ["out", *(f"out/{name}" for name in names(tmp_path / "out"))]


@pytest.mark.parametrize(("dtype", "part"), [("float32", 1), ("bfloat16", 2)])
def test_a_dtype_is_that_of_file_and_config(dtype: str, part: int, run: Path, tmp_path: Path) -> None:
    moesaic.export_model(run, tmp_path / "out", dtype=dtype)
    moesaic.export_model(run, tmp_path / "stored")
    assert config(tmp_path / "out")["torch_dtype"] == config(tmp_path / "out")["dtype"] == dtype
    stored, written = load_file(tmp_path / "stored" / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name].to(getattr(torch, dtype))) for name in stored)
    assert all(stored[name].nbytes == part * written[name].nbytes for name in stored)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == getattr(torch, dtype)


def test_the_card_names_parameters_and_the_last_held_out_loss(run: Path, tmp_path: Path) -> None:
    resumed = Path(shutil.copytree(run, tmp_path / "resumed"))
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "split": "train", "loss": 9.0}\n')
    moesaic.export_model(resumed, tmp_path / "out")
    card, last = (tmp_path / "out" / "README.md").read_text(), rows(run, "val")[-1]
    counts = moesaic.load(run).config.parameters()
    assert counts.total == sum(tensor.numel() for tensor in load_file(tmp_path / "out" / SINGLE).values())
    assert f"| parameters | {counts.total:,} in all, {counts.active:,} active per token |" in card
    assert f"| held-out loss | {last['loss']:.4f} nats per token at step 6 |" in card
    assert "| trained on | files, 6 steps (tiny) |" in card
    assert str(run.parent) not in card


@pytest.mark.parametrize("within", ["checkpoints/step-00000006", "model"])
def test_a_checkpoint_is_a_source_too(within: str, run: Path, tmp_path: Path) -> None:
    moesaic.export_model(run, tmp_path / "whole")
    moesaic.export_model(run / within, tmp_path / "out")
    assert model_of(tmp_path / "out") == model_of(tmp_path / "whole")
    assert "| held-out loss |" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_of_an_export_is_the_same_model(run: Path, tmp_path: Path) -> None:
    moesaic.export_model(run, tmp_path / "out")
    moesaic.export_model(tmp_path / "out", tmp_path / "again")
    assert model_of(tmp_path / "again") == model_of(tmp_path / "out")


def test_shards_and_their_index(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moesaic.export_model(run, tmp_path / "one")
    monkeypatch.setattr("moesaic.weights.hf.SHARD_BYTES", 20_000)
    moesaic.export_model(run, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [
        f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)
    ]
    index, whole = json.loads((tmp_path / "out" / INDEX).read_text()), load_file(tmp_path / "one" / SINGLE)
    shards = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in whole.values())}
    # A tensor is never cut, so that only one that is too large alone makes a file too large.
    assert all(len(t) == 1 or sum(x.nbytes for x in t.values()) <= 20_000 for t in shards.values())
    assert same_logits(tmp_path / "out", run)


# What is not


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("conv out", r"model\.conv = 4"),
        ("conv out.gguf to=gguf", r"model\.conv = 4"),
        ("run full", "full: exists"),
        ("run file", "file: exists"),
        ("run file.gguf to=gguf", r"file\.gguf: exists"),
        ("run out.gguf", r"out\.gguf: a GGUF is a file that ends in \.gguf"),
        ("run out to=gguf", r"out: a GGUF is a file that ends in \.gguf"),
        ("run out dtype=int8", "--dtype int8: hf takes float32, bfloat16, float16"),
        ("run out.gguf to=gguf dtype=float16", "--dtype float16: gguf takes f32, f16, bf16, q8_0"),
        ("run out to=onnx", "--to onnx: hf and gguf are the formats"),
        ("none out", "none: no such directory"),
    ],
)
def test_a_refusal_leaves_everything_as_it_was(
    words: str, said: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, *given = words.split()
    (tmp_path / "full").mkdir()
    for name in ("full/thesis.txt", "file", "file.gguf"):
        (tmp_path / name).touch()
    before, path = names(tmp_path), runs.get(source, tmp_path / "none")
    options: dict[str, Any] = dict(word.split("=") for word in given)
    with pytest.raises(RecipeError, match=said):
        moesaic.export_model(path, tmp_path / out, **options)
    flags = [f"--{word}" for word in given]
    monkeypatch.setattr(sys, "argv", ["moesaic", "export", str(path), str(tmp_path / out), *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert names(tmp_path) == before


# The verb


def test_the_verb_tells_what_became_of_it_and_generate_works(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cli.app(["export", str(run), str(out), "--dtype", "bfloat16"], standalone_mode=False)
    assert capsys.readouterr().out == f"OlmoeForCausalLM: {out}\n"
    assert config(out)["dtype"] == "bfloat16"
    cli.app(["generate", str(out), "-p", "the old", "-n", "8", "--seed", "3"], standalone_mode=False)
    assert capsys.readouterr().out.removeprefix("the old").strip("\n") != ""
    cli.app(["inspect", str(out), "-p", "the old", "--json"], standalone_mode=False)
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    cli.app(["export", str(run), str(tmp_path / "new" / "exact")], standalone_mode=False)
    again = moesaic.load(tmp_path / "new" / "exact")
    assert again.generate("the old") == moesaic.load(run).generate("the old") != ""
