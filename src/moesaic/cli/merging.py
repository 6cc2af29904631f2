"""Verbs that make one model of several, and say what that was worth."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from moesaic.cli.arguments import AsJson, ModelDir
from moesaic.errors import RecipeError
from moesaic.terminal import out, print_rows, say

if TYPE_CHECKING:
    from moesaic.train.merge_parts import Parts

Base = Annotated[str | None, typer.Option(help="The dense model that the experts were tuned from.")]


def merge(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A TOML recipe, or a mergekit-moe YAML file.")
    ] = None,
    base: Base = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR, a dense model or a LoRA adapter of the base; two or more times."),
    ] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: text of that expert's domain, to fit the router to.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fuse fine-tuned dense models into one MoE: moesaic merge OUT --base DIR --expert NAME=DIR … [a.b=c
    …]."""
    from moesaic.merge.merge import merge as run_merge
    from moesaic.merge.merge import plan_merge
    from moesaic.merge.options import merge_options

    options = merge_options(recipe, base, expert or [], calibration or [], context.args)
    plan = plan_merge(options) if dry_run else run_merge(options, target, say, overwrite=overwrite)
    title = f"{target}: what it would be" if dry_run else f"{target}"
    print_rows(plan.rows(), as_json, title)


def repair(
    model: ModelDir,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
) -> None:
    """Rewrite a checkpoint whose experts are fused, as mergekit writes them, with each expert by itself."""
    from moesaic.export import export_model

    out.print(Text(f"{export_model(model, target)}: {target}"), soft_wrap=True)


def eval_merge(
    context: typer.Context,
    model: ModelDir,
    data: Annotated[
        list[str],
        typer.Option(help="NAME=FILE: instructions of an expert's role, as it was trained on; once or more."),
    ],
    base: Base = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR; where the merge was made here, it remembers base and experts."),
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR: the merge on the way; may be given again.")
    ] = None,
    router_steps: Annotated[
        int, typer.Option(min=0, help="How long your router was trained; SmolMoE's recipe gets as much.")
    ] = 0,
    dense_steps: Annotated[
        int, typer.Option(min=0, help="How long all was trained; dense models of all data get as much.")
    ] = 0,
    work: Annotated[
        Path | None, typer.Option(help="Where the rivals are made, and kept; default: beside the model.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Where a text is cut.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the rivals.")] = 1337,
    as_json: AsJson = False,
) -> None:
    """Measure a merge against all that could be made of the same parts, on held-out text; overrides (a.b=c)
    are for the runs that rivals need. The table and the verdict also go into the model's card."""
    from moesaic.lm import described
    from moesaic.train.merge_proof import check_names, check_roles, dense_rivals, prove, rivals
    from moesaic.weights.card import write_measured

    parts, top_k = _parts_of(model, base, expert or [], data, work, seq_len, seed, context.args)
    ours = {name: Path(directory) for name, directory in _pairs("--stage", stage or []).items()}
    check_names({**parts.experts, **ours})
    for directory in ours.values():
        described(directory)
    check_roles(parts)
    others, missing = rivals(parts, router_steps, None, say)
    dense, no_dense = dense_rivals(parts, top_k, dense_steps, None, say)
    proof = prove(parts, {**others, **dense}, {**ours, "the merge": model}, [*missing, *no_dense], say)
    if as_json:
        typer.echo(json.dumps(proof.as_json()))
    for table in [] if as_json else proof.tables(out.width):
        out.print(table)
    for sentence in [] if as_json else proof.sentences():
        out.print(Text(sentence, style="bold"), soft_wrap=True)
    if (model / "config.json").exists():
        write_measured(model, proof.markdown())
        say(f"written into {model / 'README.md'}")
    else:
        say(f"{model}: is a run, which has no card; export it to have one")


def _parts_of(
    model: Path,
    base: str | None,
    experts: list[str],
    data: list[str],
    work: Path | None,
    seq_len: int,
    seed: int,
    overrides: list[str],
) -> "tuple[Parts, int]":
    """What a merge was made of, by its own memory or by what was given; and its top-k. Everything is looked
    at before anything is made. Raises RecipeError."""
    from moesaic.lm import described
    from moesaic.merge.options import merge_options, recorded_options
    from moesaic.train.merge_parts import Parts
    from moesaic.train.recipe import load_recipe

    config, _ = described(model)
    known = recorded_options(model)
    options = merge_options(None, base, experts, [], []) if base or experts else known
    if options is None:
        raise RecipeError(f"{model}: does not say what it was merged of; give --base and --expert NAME=DIR")
    for path in (options.base, *(source.model for source in options.experts.values())):
        if not Path(path).expanduser().is_dir():
            raise RecipeError(f"{path}: no such directory here; say --base DIR and --expert NAME=DIR")
    router = config.router
    merging: dict[str, object] = {"top_k": router.top_k, "renormalize": router.weights_sum_to_one}
    if known is not None:
        merging |= {"shared_expert": known.shared_expert, "dtype": known.dtype}
    prompts = {name: source.positive for name, source in options.experts.items() if source.positive}
    parts = Parts(
        work or model.absolute().parent / f"{model.name}-rivals",
        Path(options.base).expanduser(),
        {name: Path(source.model).expanduser() for name, source in options.experts.items()},
        {name: Path(file).expanduser() for name, file in _pairs("--data", data).items()},
        prompts,
        seed,
        seq_len,
        overrides,
        merging,
    )
    load_recipe("router", [f"start={parts.base}", *overrides])  # so that a bad override is told now
    return parts, router.top_k


def _pairs(option: str, words: list[str]) -> dict[str, str]:
    found = dict(word.split("=", 1) for word in words if "=" in word)
    if len(found) < len(words):
        raise RecipeError(f"{option}: write NAME=VALUE, each name once; not {' '.join(words)}")
    return found
