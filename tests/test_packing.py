"""Several examples in one row: none sees another, forwards and backwards, and nothing is lost or learnt
twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_donors import TEMPLATE, chat_template, dense
from torch.nn.utils.rnn import pad_sequence

from moesaic.config import validate
from moesaic.data.corpora import DataOptions
from moesaic.data.examples import ExampleStore, packed, prepare_examples
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import RecipeError
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import LanguageModel
from moesaic.train.loop import run
from moesaic.train.objectives import Batch, LossOptions, next_token
from moesaic.train.recipe import load_recipe

LENGTHS = (5, 1, 7, 3)


def store_of(tmp_path: Path, **more: Any) -> ExampleStore:
    rows = [{"instruction": f"{n}", "output": f"{n}" * (1 + n % 5)} for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    options = DataOptions(source="instructions", path=str(file), template=str(template), pack=True, **more)
    return prepare_examples(options, Tokenizer.byte(), 64, lambda _: None)


def test_rows_are_filled_with_whole_examples(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    size = store.rows_per_epoch(3, 64) - 1  # the last row has what is left
    windows = store.batch(3, 1, size, 64)
    assert torch.equal(windows.ids_BT, store.batch(3, 1, size, 64).ids_BT)
    assert not torch.equal(windows.ids_BT, store.batch(3, 2, size, 64).ids_BT)
    assert windows.document_BT is not None
    texts = {ids.tobytes() for shard in store.shards for ids, _ in shard.train}
    longest = max(len(ids) for shard in store.shards for ids, _ in shard.train)
    for ids_T, target_T, document_T in zip(
        windows.ids_BT, windows.target_BT, windows.document_BT, strict=True
    ):
        count = int(document_T.max())
        assert count > 4
        assert int((document_T == 0).sum()) < longest
        for number in range(1, count):  # the last may be cut
            place = document_T == number
            ids, target = ids_T[place], target_T[place]
            whole = torch.cat([ids, target[-1:]]).to(torch.int32).numpy()
            assert whole.tobytes() in texts
            learnt = target >= 0
            asked, said = Tokenizer.byte().decode(whole).split("\n")[:2]
            assert Tokenizer.byte().decode(target[learnt].tolist()) == said + "\n"
            assert said.startswith(asked)
        assert (target_T[document_T == 0] == -100).all()


SHAPES: dict[str, dict[str, Any]] = {
    "rope": {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": "head"}},
    "learned": {"position": "learned", "attention": {"heads": 2}, "norm": "layer"},
    "post": {"norm_position": "post", "attention": {"heads": 2, "qk_norm": "full"}, "pattern": "DM"},
}


def model_of(shape: str) -> LanguageModel:
    table = {"layers": 2, "width": 16, "context": 32, "vocab_size": 30, "experts": {"count": 4, "hidden": 8}}
    torch.manual_seed(1)
    model = LanguageModel(validate(ModelConfig, {**table, **SHAPES[shape]}, "test"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model: LanguageModel, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = next_token(LossOptions(balance=0.02, z=0.01))(model, batch)
    loss.total.backward()
    return loss.total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_row_is_its_documents_one_by_one(shape: str) -> None:
    model = model_of(shape)
    draw = torch.Generator().manual_seed(2)
    documents = [torch.randint(30, (length,), generator=draw) for length in LENGTHS]
    targets = [torch.randint(30, (length,), generator=draw) for length in LENGTHS]
    alone = Batch(
        pad_sequence(documents, True),
        pad_sequence(targets, True, -100),
        pad_sequence([torch.ones(length, dtype=torch.bool) for length in LENGTHS], True),
    )
    number = torch.cat([torch.full((length,), n + 1) for n, length in enumerate(LENGTHS)])
    number = torch.cat([number, torch.zeros(4, dtype=torch.int64)])[None]
    ids = torch.cat([*documents, torch.zeros(4, dtype=torch.int64)])[None]
    target = torch.cat([*targets, torch.full((4,), -100)])[None]
    together = Batch(ids, target, number > 0, number)
    whole = model(together.ids_BT, together.real_BT, document_BT=number).logits_BTV[0, : sum(LENGTHS)]
    parts = model(alone.ids_BT, alone.real_BT).logits_BTV
    torch.testing.assert_close(
        whole, torch.cat([parts[n, :length] for n, length in enumerate(LENGTHS)]), rtol=1e-5, atol=1e-6
    )
    (loss, grads), (other, others) = gradients(model, together), gradients(model, alone)
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-6)
    for grad, expected in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_a_row_without_padding_says_so() -> None:
    import numpy as np

    example = (np.arange(5, dtype=np.int32), np.array([False, False, True, True, True]))
    windows = packed([[example, example]], 8)
    assert windows.real_BT is None
    assert windows.ids_BT.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert windows.target_BT.tolist() == [[-100, 2, 3, 4, -100, 2, 3, 4]]
    assert windows.document_BT is not None
    assert windows.document_BT.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]]


def test_packed_examples_train_and_short_convolutions_are_refused(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    chat_template(base, TEMPLATE)
    rows = [{"instruction": "the old"[: 2 + n % 5], "output": "mill turns"[: 3 + n % 6]} for n in range(30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"start={base}", f"data.path={file}", "data.pack=true", "train.seq_len=48", "train.batch_size=4"]
    words += ["train.steps=2", "eval.every=2", f"out={tmp_path / 'run'}"]
    assert (run("expert", words) / "model").is_dir()
    with pytest.raises(RecipeError, match=r"data\.pack: model\.conv looks across the borders"):
        load_recipe("expert", [*words, "model.conv=3"])
    model = model_of("rope")
    with pytest.raises(ValueError, match="neither a cache"):
        model(torch.zeros(1, 2).long(), cache=model.new_cache(1, 4), document_BT=torch.ones(1, 2).long())
