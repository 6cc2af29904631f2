"""Recipes: those that come along, what may not be combined, and what they are called by."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny, tiny_file

from moesaic.config import dump_toml, flatten, known_keys, read_toml, validate
from moesaic.data.corpora import DataOptions
from moesaic.data.pretrain import prepare
from moesaic.errors import DataError, RecipeError
from moesaic.model.routers import ROUTERS
from moesaic.model.transformer import LanguageModel
from moesaic.train.measure import Cluster, plan, too_large
from moesaic.train.recipe import Recipe, builtin_recipes, load_recipe, recipe_path

# The keys that people type; renaming one breaks what they have written down.
PROMISED = {
    "out": "runs/x",
    "seed": "7",
    "data.source": "stdlib",
    "train.steps": "11",
    "train.batch_size": "3",
    "train.seq_len": "5",
    "model.router.kind": "smart",
    "model.router.top_k": "4",
    "model.router.capacity_factor": "1.25",
    "checkpoint.every": "13",
}


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_builtin_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.about) > 20
    assert recipe.about == read_toml(builtin_recipes()[name])["about"]


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["train.freeze=['a.*', 'b']", "optim.lr=0.00025"])
    (tmp_path / "resolved.toml").write_text(dump_toml(recipe), encoding="utf-8")
    assert load_recipe(str(tmp_path / "resolved.toml")) == recipe


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_builtin_recipe_is_counted_as_it_is_built(name: str) -> None:
    config = load_recipe(name).model.model_copy(update={"vocab_size": 65})
    with torch.device("meta"):
        model = LanguageModel(config)
    assert config.parameters().total == sum(p.numel() for p in model.parameters())


def test_makemoe_has_the_published_size() -> None:
    config = load_recipe("makemoe").model.model_copy(update={"vocab_size": 65})
    assert config.parameters().total == 8_996_545


def test_promised_keys_are_there() -> None:
    recipe = load_recipe("makemoe", [f"{key}={value}" for key, value in PROMISED.items()])
    flat = flatten(recipe)
    for key, value in PROMISED.items():
        assert str(flat[key]) == value, key
    assert "data.path" in set(known_keys(Recipe))


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_can_be_chosen_by_an_override(kind: str, tmp_path: Path) -> None:
    chosen = tiny(tmp_path, f"model.router={{kind = '{kind}', top_k = 3}}")
    assert type(chosen.model.router) is ROUTERS[kind][0]
    assert chosen.model.router.top_k == 3
    assert tiny(tmp_path, f"--model.router.kind={kind}").model.router.kind == kind
    over_makemoe = load_recipe("makemoe", ["--model.router.kind", kind]).model.router
    assert (over_makemoe.kind, over_makemoe.top_k, over_makemoe.bias) == (kind, 2, True)


def test_an_unknown_router_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("makemoe", ["model.router.kind=best"])
    assert "model.router.kind" in str(caught.value)
    assert all(kind in str(caught.value) for kind in ROUTERS)


@pytest.mark.parametrize(
    "router",
    [
        "{kind='top_k', top_k=1, renormalize=true}",
        "{kind='top_k', top_k=1, softmax_after=true}",
        "{kind='noisy_top_k', top_k=1}",
        "{kind='loss_free', top_k=1}",
        "{kind='smart', top_k=1, min_k=1}",
    ],
)
def test_a_gate_that_is_always_one_is_refused(router: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="top_k = 1") as caught:
        tiny(tmp_path, f"model.router={router}")
    assert "gradient" in str(caught.value)
    dense = tiny(tmp_path, f"model.router={router}", "model.pattern=D")
    assert dense.model.moe_layers == []


@pytest.mark.parametrize("router", ["{kind='top_k', top_k=1}", "{kind='expert_choice', top_k=1}"])
def test_one_expert_without_renormalising_is_fine(router: str, tmp_path: Path) -> None:
    assert tiny(tmp_path, f"model.router={router}").model.router.top_k == 1


def test_a_window_beyond_the_learned_positions_is_refused(tmp_path: Path) -> None:
    words = ["model.position=learned", "model.context=8", "train.seq_len=9"]
    with pytest.raises(RecipeError, match=r"train\.seq_len = 9 is above model\.context = 8"):
        tiny(tmp_path, *words)
    assert tiny(tmp_path, *words[:2], "train.seq_len=8").train.seq_len == 8
    assert tiny(tmp_path, "model.context=8", "train.seq_len=9").model.position == "rope"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.stepz=1"], "train.stepz: unknown key; did you mean train.steps?"),
        (["steps=1"], "did you mean train.steps?"),
        (["model.router.top_k=5"], "router.top_k = 5 is above experts.count = 4"),
        (["model.width=15"], "width = 15 does not divide"),
        (["train.steps=0"], "train.steps"),
        (["train.steps=-3"], "train.steps"),
        (["train.steps=many"], "train.steps"),
        (["optim.lr=nan"], "optim.lr"),
        (["optim.lr=inf"], "optim.lr"),
        (["optim.lr=-1e-3"], "optim.lr"),
        (["seed=-1"], "seed"),
        (["train.accumulate=3"], "does not divide by accumulate = 3"),
        (["checkpoint.keep=1"], "checkpoint.keep"),
        (["model.dropout=1"], "model.dropout"),
        (["name=../away"], "name"),
        (["train=5"], "train"),
        (["train.steps.more=5"], "train.steps"),
    ],
)
def test_a_wrong_value_is_named(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny(tmp_path, *words)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_mistake_gets_a_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny(tmp_path, "train.steps=0", "optim.lr=-1", "nonsense=1")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all("tiny" in line for line in lines)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("makemo")
    assert "'makemo' is no recipe" in str(caught.value)
    assert all(name in str(caught.value) for name in builtin_recipes())


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"steps = = 3", "not valid TOML"), (b"name = '\xff'", "not UTF-8"), (None, "no such file")],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(str(file))
    assert "mine.toml" in str(caught.value)


def test_a_recipe_is_named_after_its_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nsteps = 3\n")
    assert load_recipe(str(tmp_path / "mine.toml")).name == "mine"
    assert load_recipe(str(tmp_path / "mine.toml"), ["name=other"]).name == "other"


def test_a_run_directory_is_a_recipe(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "train.steps=4")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(dump_toml(recipe), encoding="utf-8")
    assert recipe_path(str(tmp_path / "run")) == tmp_path / "run" / "recipe.toml"
    assert load_recipe(str(tmp_path / "run")) == recipe


def test_the_last_override_wins_and_leaves_the_file_alone(tmp_path: Path) -> None:
    before = tiny_file(tmp_path).read_bytes()
    recipe = tiny(tmp_path, "train.steps=4", "--train.steps", "5", "--train.steps=6")
    assert recipe.train.steps == 6
    assert tiny_file(tmp_path).read_bytes() == before


def test_a_dense_twin_has_the_active_size_and_no_experts() -> None:
    model = load_recipe("demo").model.model_copy(update={"vocab_size": 2048})
    twin = model.dense_twin()
    sparse, dense = model.parameters(), twin.parameters()
    routers = sum(model.router.parameters(model.width, model.experts.count) for _ in model.moe_layers)
    assert twin.moe_layers == []
    assert dense.total == dense.active == sparse.active - routers


def test_builtin_recipes_are_plain_tables_of_known_keys() -> None:
    known = set(known_keys(Recipe))

    def keys(table: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, value in table.items():
            found.add(prefix + key)
            if isinstance(value, dict) and prefix + key not in known:
                found |= keys(value, f"{prefix}{key}.")
        return found

    for path in builtin_recipes().values():
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        assert keys(table) <= known
        validate(Recipe, table, where=path.stem)


@pytest.mark.parametrize("kind", ROUTERS)
def test_another_router_is_one_override_away(kind: str) -> None:
    """The recipe's own router has keys that others do not know; they go with it."""
    recipe = load_recipe("char", [f"model.router.kind={kind}"])
    assert recipe.model.router.kind == kind
    assert recipe.model.router.top_k == load_recipe("char").model.router.top_k


def test_a_builtin_name_means_the_builtin_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert load_recipe("demo").name == "demo"
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe("./demo")


def test_olmoe_has_the_published_size_and_takes_the_published_time() -> None:
    recipe = load_recipe("olmoe-1b-7b")
    tokens = {"dclm": 3860, "starcoder": 101, "pes2o": 57.2, "arxiv": 21.1, "wiki": 3.69}
    tokens |= {"open_web_math": 12.7, "algebraic_stack": 12.6}  # in billions; arXiv 2409.02060, table 2
    for given in (recipe, load_recipe("olmoe-1b-7b-anneal")):
        assert isinstance(given.data.path, dict)
        assert set(given.data.path) == set(given.data.weights or {}) == set(tokens)
        for name, share in (given.data.weights or {}).items():
            assert share == pytest.approx(tokens[name] / sum(tokens.values()), abs=2e-5)
        assert given.data.clean.repeats == 32
    other = load_recipe("olmoe-1b-7b", ['data.path={mine = "mine.txt"}']).data
    assert (other.path, other.weights, other.clean.repeats) == ({"mine": "mine.txt"}, None, 32)
    counts = recipe.model.parameters()
    assert (counts.total, counts.active) == (6_919_161_856, 1_282_017_280)
    numbers = plan(recipe, Cluster(256)).numbers
    assert 9 < numbers["seconds"] / 86_400 < 11  # "about 10 days" for 5.03 T tokens on 256 H100
    assert numbers["tokens"] == 1_200_000 * 4_194_304
    assert plan(recipe, Cluster(512)).numbers["seconds"] == pytest.approx(numbers["seconds"] / 2)
    small = load_recipe("olmoe-nano")
    assert not too_large(small)
    with pytest.raises(RecipeError, match=r"model\.vocab_size: say it"):
        plan(small, None)
    assert too_large(load_recipe("olmoe-1b-7b", ["model.layers=999"]))


def test_a_mix_is_drawn_by_its_weights(tmp_path: Path) -> None:
    for name, size in (("a", 4000), ("b", 400)):
        (tmp_path / f"{name}.txt").write_text(name * size)
    table = {"a": str(tmp_path / "a.txt"), "b": str(tmp_path / "b.txt")}
    common = {"source": "files", "path": table, "tokenizer": "byte", "cache": str(tmp_path / "cache")}
    store = prepare(DataOptions(**common, weights={"a": 0.25, "b": 0.75}), seq_len=8)
    drawn = torch.cat([store.batch(1, step, 50, 8).ids_BT[:, 0] for step in range(40)])
    assert (drawn == ord("b")).double().mean().item() == pytest.approx(0.75, abs=0.04)
    plain = prepare(DataOptions(**common), seq_len=8)
    drawn = torch.cat([plain.batch(1, step, 50, 8).ids_BT[:, 0] for step in range(40)])
    assert (drawn == ord("b")).double().mean().item() == pytest.approx(1 / 11, abs=0.03)
    assert store.fingerprint != plain.fingerprint
    with pytest.raises(DataError, match="'b' is in the weights or in the corpus"):
        prepare(DataOptions(**common, weights={"a": 0.5, "c": 0.5}), seq_len=8)
    for weights in ({"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(ValueError, match="add up to"):
            DataOptions(**common, weights=weights)
