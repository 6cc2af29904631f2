"""A checkpoint of OLMoE's shape, written by stock transformers: opened, trained on, exported, opened
there."""

import json
from pathlib import Path

import pytest
import torch

import moesaic
from moesaic.data.tokenizers import Tokenizer
from moesaic.export import export_model
from moesaic.train.loop import train
from moesaic.train.recipe import load_recipe


def stock_olmoe(folder: Path) -> Path:
    """OLMoE's ratios: 64 experts of half the width, 8 active, norms on queries and keys over the full
    width."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=304,  # padded past the tokenizer's, as 50,280 to 50,304
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=128,
        eos_token_id=0,
        pad_token_id=None,
        bos_token_id=None,
    )
    model = transformers.OlmoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms that are all one would hide a norm that is left out
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    Tokenizer.bpe(["the old mill turns its wheel " * 9], 300).save(folder / "tokenizer.json")
    return folder


def logits_there(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return found


@pytest.mark.parametrize("recipe", ["sft", "olmoe-1b-7b-anneal", "dpo"])
def test_it_opens_here_trains_a_step_is_exported_and_opens_there(tmp_path: Path, recipe: str) -> None:
    stock = stock_olmoe(tmp_path / "stock")
    ids = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(1))
    before = moesaic.load(stock).logits(ids)
    torch.testing.assert_close(before, logits_there(stock, ids), rtol=1e-5, atol=1e-5)

    talk = {"instruction": "what turns?", "output": "the wheel turns"}
    pair = {"prompt": "what turns?", "chosen": "the wheel turns", "rejected": "the mill"}
    text = {"text": " ".join(f"the old mill turns wheel {n}" for n in range(400))}
    row = {"sft": talk, "dpo": pair, "olmoe-1b-7b-anneal": text}[recipe]
    lines = (json.dumps({k: f"{v} {n}" for k, v in row.items()}) + "\n" for n in range(8))
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    run = train(
        load_recipe(
            recipe,
            [
                *(f"start={stock}", f"out={tmp_path / 'run'}", f"data.path={tmp_path / 'rows.jsonl'}"),
                *("train.steps=1", "train.batch_size=2", "train.accumulate=1", "train.seq_len=96"),
                *("train.precision=fp32", "optim.lr=1e-3", "schedule.warmup=0", "schedule.kind=constant"),
                *("data.val_fraction=0.2", f"data.cache={tmp_path / 'cache'}", "start_optimizer=false"),
            ],
        )
    )
    after = moesaic.load(run).logits(ids)
    assert (after - before).abs().max() > 1e-3
    export_model(run, tmp_path / "exported", dtype="float32")
    torch.testing.assert_close(logits_there(tmp_path / "exported", ids), after, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["architectures"] == ["OlmoeForCausalLM"]
    assert (config["vocab_size"], config["norm_topk_prob"]) == (304, False)
