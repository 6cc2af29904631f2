"""Verbs that train, and those about recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from moesaic.cli.arguments import AsJson, RecipeName, recipe_of
from moesaic.errors import RecipeError
from moesaic.terminal import out, print_report, print_rows, program, say


def train(
    context: typer.Context,
    recipe: RecipeName,
    data: Annotated[
        list[str] | None,
        typer.Option(help="FILE, or NAME=FILE for each domain: short for data.path; may be given again."),
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            help="shared (only networks learn), experts (only what they share, and the router) or nothing."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest valid checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, measure real steps, train nothing.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: plan for so many GPUs, by arithmetic alone.")
    ] = None,
    gpu_tflops: Annotated[
        float | None, typer.Option(min=1, help="What one multiplies at best, dense bf16; 989.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="The share of it that is reached; 0.2.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe, perhaps starting from a model: moesaic train RECIPE [MODEL] [a.b=c …]."""
    words = training_words(context.args, data or [], freeze)
    chosen = recipe_of(recipe, words, resume)
    if gpus is not None and not dry_run:
        raise RecipeError("--gpus plans and trains nothing: say --dry-run too")
    if gpus is None and (gpu_tflops is not None or mfu is not None):
        raise RecipeError("--gpu-tflops and --mfu are about a cluster: say --gpus too")
    if dry_run:
        from moesaic.train import measure

        if gpus is not None:
            report = measure.plan(chosen, measure.Cluster(gpus, gpu_tflops or 989.0, mfu=mfu or 0.2))
        elif measure.too_large(chosen):
            report = measure.plan(chosen, None)
        else:
            report = measure.dry_run(chosen, say, resume=resume)
        print_report(report, as_json, title=f"{chosen.name}: what it would take")
        return
    from moesaic.train.loop import train as run_training

    run = run_training(chosen, resume=resume)
    if as_json:
        typer.echo(json.dumps({"run": str(run)}))
    else:
        out.print(Text(f"done: {run}"), soft_wrap=True)


# What --freeze stands for, by its word.
_FREEZE = {
    "shared": ["train.freeze=[]", 'train.only=["*.mlp.*", "*.post_attention_layernorm.weight"]'],
    "experts": ['train.freeze=["*.mlp.experts.*"]', "train.only=[]"],
    "nothing": ["train.freeze=[]", "train.only=[]"],
}


def training_words(given: list[str], data: list[str], freeze: str | None) -> list[str]:
    """Overrides out of what ``train`` was given: a model to start from, files of data, what is frozen; what
    is said as an override comes last and wins. Raises RecipeError."""
    words, rest = [], list(given)
    if rest and "=" not in rest[0] and not rest[0].startswith("--"):
        words.append(f"start={rest.pop(0)}")
    pairs = [("", word) if Path(word).exists() else word.partition("=")[::2] for word in data]
    pairs = [(name, file) if file else ("", name) for name, file in pairs]
    if len(pairs) > 1 and (not all(name for name, _ in pairs) or len(dict(pairs)) < len(pairs)):
        raise RecipeError("--data: give one FILE, or NAME=FILE for each of several, each name once")
    if pairs and pairs[0][0]:  # as a table: a name may hold a dot
        table = ", ".join(f"{json.dumps(name)} = {json.dumps(file)}" for name, file in pairs)
        words.append(f"data.path={{{table}}}")
    elif pairs:
        words.append(f"data.path={json.dumps(pairs[0][1])}")
    if freeze is not None and freeze not in _FREEZE:
        raise RecipeError(f"--freeze {freeze}: {', '.join(_FREEZE)} can be frozen")
    return [*words, *(_FREEZE[freeze] if freeze else []), *rest]


def demo(
    context: typer.Context,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train dense models of equal active size.")
    ] = False,
    directory: Annotated[str | None, typer.Option("--out", help="The run directory.")] = None,
) -> None:
    """Train a small MoE on text that is already here, and look inside it (a few minutes)."""
    from moesaic.train.demo import run_demo

    overrides = context.args if directory is None else [*context.args, f"out={directory}"]
    run_demo(out, overrides, compare=compare, program=program())


def demo_merge(
    directory: Annotated[
        Path, typer.Option("--out", help="Where everything is made; what is there is not made again.")
    ] = Path("runs/demo-merge"),
    seed: Annotated[int, typer.Option(help="Of data, training and routers.")] = 1337,
) -> None:
    """Merge eight small role experts from nothing, prove what it is worth, and talk with it (a few
    minutes)."""
    from moesaic.train.merge_demo import run_merge_demo

    run_merge_demo(out, directory, seed, say, program())


def demo_pipeline(
    directory: Annotated[
        Path, typer.Option("--out", help="Where everything is made; what is there is not made again.")
    ] = Path("runs/demo-pipeline"),
    seed: Annotated[int, typer.Option(min=0, help="Of data and training.")] = 1337,
) -> None:
    """OLMoE's stages in miniature: pretrain, anneal, fine-tune, prefer, evaluate, analyse (ten minutes)."""
    from moesaic.train.pipeline_demo import run_pipeline_demo

    run_pipeline_demo(out, directory, seed, say, program())


def demo_arche(
    directory: Annotated[Path, typer.Option("--out", help="The run directory.")] = Path("runs/demo-arche"),
    seed: Annotated[int, typer.Option(min=0, help="Of data and training.")] = 1337,
) -> None:
    """2,560 experts on disk learn a curriculum of structured patterns (a few minutes)."""
    from moesaic.train.arche_demo import run_arche_demo

    run_arche_demo(out, directory, seed, program())


def recipes(context: typer.Context) -> None:
    """Without a verb: list."""
    if context.invoked_subcommand is None:
        recipes_list()


def recipes_list(as_json: AsJson = False) -> None:
    """The built-in recipes, a line each."""
    from moesaic.config import read_toml
    from moesaic.train.recipe import builtin_recipes

    rows = [(name, str(read_toml(path).get("about", ""))) for name, path in builtin_recipes().items()]
    print_rows(rows, as_json)


def recipes_show(
    context: typer.Context,
    recipe: RecipeName,
    resolved: Annotated[bool, typer.Option("--resolved", help="Every key, defaults included.")] = False,
) -> None:
    """Print a recipe, as written or resolved (with overrides)."""
    from moesaic.config import dump_toml, read_text
    from moesaic.train.recipe import recipe_path

    if resolved or context.args:
        typer.echo(dump_toml(recipe_of(recipe, context.args)), nl=False)
    else:
        typer.echo(read_text(recipe_path(recipe)), nl=False)


def recipes_copy(
    recipe: RecipeName,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="Where to put the copy; never overwritten.")],
) -> None:
    """Copy a recipe to a file of your own, to change it there."""
    from moesaic.config import read_text
    from moesaic.train.recipe import recipe_path

    source = recipe_path(recipe)
    text = read_text(source)
    if target.is_dir():
        target = target / f"{source.stem}.toml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target}: exists; choose another name") from None
    except OSError as error:
        raise RecipeError(f"{target}: cannot be written: {error.strerror}") from None
    typer.echo(str(target))
