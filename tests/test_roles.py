"""Who serves whom on labelled text, and models without some of their experts."""

import json
from pathlib import Path

import pytest
import torch
from dense_donors import TEMPLATE, change, chat_template, dense
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic.analysis.ablation import WHOLE, labelled_documents, role_report  # noqa: E402
from moesaic.analysis.roles import expert_number, without  # noqa: E402
from moesaic.errors import DataError, RecipeError  # noqa: E402
from moesaic.merge.merge import merge  # noqa: E402
from moesaic.merge.options import MergeOptions  # noqa: E402
from moesaic.weights.shards import Shards  # noqa: E402

IDS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))


def quiet(_: str) -> None:
    pass


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    base = dense(tmp_path / "base")
    chat_template(base, TEMPLATE)
    experts = {name: str(change(base, tmp_path / name, seed, ".mlp.")) for seed, name in enumerate("abc", 1)}
    table = {"base": str(base), "experts": experts, "router": {"init": "random", "std": 0.5}}
    merge(MergeOptions.model_validate(table), tmp_path / "moe", quiet)
    return tmp_path / "moe"


def files(root: Path) -> list[str]:
    words = []
    for name, text in (("mill", "the old mill turns"), ("sums", "1, 2, 3.")):
        rows = [{"instruction": text[: 2 + n], "output": text * (1 + n % 2)} for n in range(6)]
        file = root / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words.append(f"{name}={file}")
    return words


def test_a_model_without_an_expert_is_the_merge_of_the_others(moe: Path, tmp_path: Path) -> None:
    lm = moesaic.load(moe)
    whole = lm.logits(IDS)
    config = lm.config.model_copy(
        update={"experts": lm.config.experts.model_copy(update={"count": 2, "names": None})}
    )
    smaller = moesaic.model.transformer.LanguageModel(config).eval()
    kept = [0, 2]
    state = lm.model.state_dict()
    for name in state:
        if ".mlp.experts." in name or name.endswith("mlp.gate.weight"):
            state[name] = state[name][kept]
    smaller.load_state_dict(state)
    with without(lm.model, [1]):
        torch.testing.assert_close(lm.logits(IDS), smaller(IDS).logits_BTV.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(lm.logits(IDS), whole)
    with pytest.raises(RecipeError, match="no expert would be left"), without(lm.model, [0, 1, 2]):
        pass


def test_one_expert_alone_is_its_dense_model(moe: Path) -> None:
    lm = moesaic.load(moe)
    with without(lm.model, [0, 2]):
        torch.testing.assert_close(
            lm.logits(IDS), moesaic.load(moe.parent / "b").logits(IDS), rtol=1e-5, atol=2e-6
        )


def test_counts_are_those_of_each_text_by_itself(moe: Path, tmp_path: Path) -> None:
    lm, words = moesaic.load(moe), files(tmp_path)
    report = role_report(moe, words, [], [], 40, quiet)
    documents = labelled_documents(lm, words, 40)
    expected = torch.zeros_like(report.routing.counts_LCE)
    for (ids, _), c in zip(documents.coded, documents.domain_N, strict=True):
        for layer, routing in enumerate(lm.routing(torch.tensor(ids[None, :-1]).long())):
            expected[layer, c] += routing.counts_E()
    assert torch.equal(report.routing.counts_LCE, expected)
    assert report.comparison is None
    assert report.as_json()["experts"] == ["a", "b", "c"]
    report.draw(tmp_path / "roles.png")
    assert (tmp_path / "roles.png").stat().st_size > 1000


def test_losses_without_and_alone(moe: Path, tmp_path: Path) -> None:
    report = role_report(moe, files(tmp_path), ["a"], ["2"], 40, quiet)
    losses = report.as_json()["loss"]
    assert list(losses) == [WHOLE, "without a", "only 2"]
    assert losses["without a"]["mill"] != losses[WHOLE]["mill"]
    assert len(report.tables(40)) == 3
    assert len(report.tables(200)) == 2


def test_what_cannot_be_shown_is_named(moe: Path, tmp_path: Path) -> None:
    words = files(tmp_path)
    for call, sentence, kind in (
        ((moe, words, ["z"], []), "'z' is no expert; there are a, b, c", RecipeError),
        ((moe.parent / "base", words, [], []), "dense model", RecipeError),
        ((moe, ["mill"], [], []), "write NAME=FILE", RecipeError),
        ((moe, [words[0], words[0]], [], []), "each name once", RecipeError),
        ((moe, ["x=" + str(tmp_path / "none.jsonl")], [], []), "cannot be read|no such", DataError),
    ):
        with pytest.raises(kind, match=sentence):
            role_report(*call, 40, quiet)
    with pytest.raises(DataError, match="nothing to predict"):
        role_report(moe, words, [], [], 3, quiet)
    assert expert_number(moesaic.load(moe), "b") == 1


def test_a_fused_checkpoint_is_written_apart_again(moe: Path, tmp_path: Path) -> None:
    """What mergekit writes: transformers' fused names on disk."""
    lm = moesaic.load(moe)
    whole = load_file(moe / "model.safetensors")
    fused = {k: v for k, v in whole.items() if ".experts." not in k and ".gate.weight" not in k}
    for name, parameter in lm.model.named_parameters():
        if ".mlp.experts." in name or name.endswith(".mlp.gate.weight"):
            fused[name] = parameter.detach().contiguous()
    broken = tmp_path / "fused"
    broken.mkdir()
    for file in moe.iterdir():
        if file.suffix != ".safetensors" and file.name != "manifest.json":
            (broken / file.name).write_bytes(file.read_bytes())
    save_file(fused, broken / "model.safetensors", {"format": "pt"})
    moesaic.export_model(broken, tmp_path / "apart")
    mended = Shards(tmp_path / "apart")
    assert mended.tensors.keys() == whole.keys()
    assert all(torch.equal(mended.read(name), tensor) for name, tensor in whole.items())
