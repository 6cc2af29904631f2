"""The command line: one binary with verbs. Everything heavy is imported inside the verb."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from moesaic.errors import MoesaicError, RecipeError, ResourceError
from moesaic.terminal import err, flat, out, print_report, print_rows, program, prompt_text, say, write

if TYPE_CHECKING:
    from moesaic.train.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Build, train and inspect sparse mixture-of-experts language models on hardware you own.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage or recipe, 3 data, 4 checkpoint, 5 diverged, "
    "6 disk or memory, 75 stopped and resumable.",
)
recipes_app = typer.Typer(no_args_is_help=False, help="List, show and copy the recipes that come along.")
app.add_typer(recipes_app, name="recipes")

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A built-in name, a TOML file or a run directory.")
]
ModelDir = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A run directory, a checkpoint, an export or a Hugging Face directory."
    ),
]
Prompt = Annotated[
    str, typer.Option("--prompt", "-p", help="The text to start from; - reads standard input.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    recipe: RecipeName,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest valid checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, measure real steps, train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe: moesaic train RECIPE [a.b=c …]."""
    chosen = _recipe(recipe, context.args, resume)
    if dry_run:
        from moesaic.train import measure

        report = measure.dry_run(chosen, say, resume=resume)
        print_report(report, as_json, title=f"{chosen.name}: what it would take")
        return
    from moesaic.train.loop import train as run_training

    run = run_training(chosen, resume=resume)
    if as_json:
        typer.echo(json.dumps({"run": str(run)}))
    else:
        out.print(Text(f"done: {run}"), soft_wrap=True)


@app.command(context_settings=OVERRIDES)
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


@app.command("demo-merge")
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


@app.command()
def generate(
    model: ModelDir,
    prompt: Prompt,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option(help="Repeat the same draw.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    weights: Annotated[
        str | None,
        typer.Option(
            help="stored, packed (on a CPU, where it is faster, the default) or int8 (half the reading)."
        ),
    ] = None,
) -> None:
    """Continue a text, streaming."""
    from moesaic.lm import load

    text = prompt_text(prompt)
    lm = load(model, device)
    lm.ids(text)  # refused before anything is echoed
    lm.lay_out(weights)
    write(text)
    for piece in lm.stream(text, max_new_tokens, temperature, seed, top_k, top_p, stop or ()):
        write(piece)
    write("\n")


@app.command()
def roles(
    model: ModelDir,
    data: Annotated[list[str], typer.Option(help="NAME=FILE: labelled text; once or more.")],
    without: Annotated[
        list[str] | None, typer.Option(help="What the loss would be without this expert; may be given again.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="What the loss would be with this expert alone; may be given again."),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Where a text is cut.")] = 512,
    picture: Annotated[Path | None, typer.Option("--out", help="Draw role by expert as a PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which experts serve which text, over a labelled data set; and what each expert is worth to it."""
    from moesaic.analysis.ablation import role_report

    report = role_report(model, data, without or [], only or [], seq_len, say)
    if picture is not None:
        report.draw(picture)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
        return
    for table in report.tables(out.width):
        out.print(table)
    out.print(Text(report.routing.summary()), soft_wrap=True)


@app.command()
def inspect(
    model: ModelDir,
    prompt: Prompt,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also a row for every token.")] = False,
    most: Annotated[int, typer.Option("--most", min=1, help="How many experts to show per layer.")] = 3,
    picture: Annotated[Path | None, typer.Option("--out", help="Draw the routing as a PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which experts take a text: per layer, per token, as JSON or as a picture."""
    from moesaic.analysis.prompt import route_prompt
    from moesaic.lm import load

    routing = route_prompt(load(model), prompt_text(prompt))
    if not routing.routings:
        raise RecipeError(f"{model}: is a dense model; it has no experts to show")
    if picture is not None:
        if picture.suffix.lower() != ".png":
            raise RecipeError(f"--out {picture}: the picture is a PNG; give a name that ends in .png")
        try:
            routing.draw(picture)
        except OSError as error:
            raise RecipeError(f"--out {picture}: cannot be written: {error.strerror}") from None
    if as_json:
        typer.echo(json.dumps(routing.as_json()))
        return
    out.print(routing.layer_table(most))
    if tokens:
        out.print(routing.token_table())
    if picture is not None:
        err.print(Text(f"drawn: {picture}"))


@app.command()
def export(
    model: ModelDir,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory, or a new .gguf file.")],
    to: Annotated[str, typer.Option("--to", help="hf or gguf.")] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="hf: float32, bfloat16, float16 (as stored). gguf: f32, f16 (default), bf16, q8_0."
        ),
    ] = None,
) -> None:
    """Write a model for other tools: transformers, vLLM and lm-eval (hf), llama.cpp (gguf)."""
    from moesaic.export import export_model

    if to not in ("hf", "gguf"):
        raise RecipeError(f"--to {to}: hf and gguf are the formats")
    architecture = export_model(model, target, "hf" if to == "hf" else "gguf", dtype)
    out.print(Text(f"{architecture}: {target}"), soft_wrap=True)


@app.command()
def chat(
    model: ModelDir,
    system: Annotated[str | None, typer.Option(help="What the model is told about itself.")] = None,
    experts: Annotated[bool, typer.Option("--experts", help="Show which expert said what.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Repeat the same draws.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    weights: Annotated[str | None, typer.Option(help="stored, packed or int8, as for generate.")] = None,
) -> None:
    """Talk with a model; /help lists what can be asked besides. Reads lines in a pipe."""
    from moesaic.chat import Chat, run_chat
    from moesaic.lm import load

    lm = load(model, device)
    if experts and not lm.config.moe_layers:
        raise RecipeError(f"{model}: is a dense model; it has no experts to show")
    lm.lay_out(weights)
    talk = Chat(lm, max_new_tokens, temperature, top_p, seed, show_experts=experts)
    if system:
        talk.command(f"/system {system}", lambda _: None)
    run_chat(talk, out)


@app.command(context_settings=OVERRIDES)
def merge(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A TOML recipe, or a mergekit-moe YAML file.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The dense model that the experts were tuned from.")
    ] = None,
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


@app.command()
def repair(
    model: ModelDir,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
) -> None:
    """Rewrite a checkpoint whose experts are fused, as mergekit writes them, with each expert by itself."""
    from moesaic.export import export_model

    out.print(Text(f"{export_model(model, target)}: {target}"), soft_wrap=True)


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """Without a verb: list."""
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """The built-in recipes, a line each."""
    from moesaic.config import read_toml
    from moesaic.train.recipe import builtin_recipes

    rows = [(name, str(read_toml(path).get("about", ""))) for name, path in builtin_recipes().items()]
    print_rows(rows, as_json)


@recipes_app.command("show", context_settings=OVERRIDES)
def recipes_show(
    context: typer.Context,
    recipe: RecipeName,
    resolved: Annotated[bool, typer.Option("--resolved", help="Every key, defaults included.")] = False,
) -> None:
    """Print a recipe, as written or resolved (with overrides)."""
    from moesaic.config import dump_toml, read_text
    from moesaic.train.recipe import recipe_path

    if resolved or context.args:
        typer.echo(dump_toml(_recipe(recipe, context.args)), nl=False)
    else:
        typer.echo(read_text(recipe_path(recipe)), nl=False)


@recipes_app.command("copy")
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


@app.command()
def env(as_json: AsJson = False) -> None:
    """Versions, hardware, and this machine's measured matmul rate and bandwidth."""
    import torch

    from moesaic.files import human_size
    from moesaic.machine import describe, matmul_rate, read_bandwidth

    facts = describe()
    device = "cuda" if facts["gpus"] else "cpu"
    rates = {name: matmul_rate(getattr(torch, name), device=device) for name in ("float32", "bfloat16")}
    facts["matmul_gflops"] = {name: round(rate / 1e9) for name, rate in rates.items()}
    facts["read_gb_per_s"] = round(read_bandwidth(device=device) / 1e9, 1)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    if "memory_bytes" in facts:
        facts["memory_bytes"] = human_size(facts["memory_bytes"])
    print_rows([(key, flat(value)) for key, value in facts.items()], False)


@app.command(context_settings=OVERRIDES)
def bench(
    context: typer.Context,
    recipe: RecipeName = "makemoe",
    as_json: AsJson = False,
) -> None:
    """Training and decoding speed of a recipe, beside this machine's own limits."""
    from moesaic.train.measure import bench as measure

    chosen = _recipe(recipe, context.args)
    print_report(measure(chosen, say), as_json, title=f"{chosen.name} on this machine")


def main() -> None:
    """Run a command; a failure is one sentence on standard error and its exit code."""
    try:
        app()
    except MoesaicError as error:
        _fail(error)
    except MemoryError:
        _fail(ResourceError("out of memory; make the batch, the window or the model smaller"))
    except RuntimeError as error:  # how PyTorch reports an allocation that failed, on CPU and on CUDA
        if not any(words in str(error) for words in ("can't allocate memory", "out of memory")):
            raise
        _fail(ResourceError("out of memory; make train.batch_size, train.seq_len or the model smaller"))


def _fail(error: MoesaicError) -> None:
    err.print(Text(f"moesaic: {error}"), soft_wrap=True)
    sys.exit(error.exit_code)


def _recipe(name: str, words: list[str], resume: bool = False) -> "Recipe":
    from moesaic.train.recipe import load_recipe

    return load_recipe(name, words, resume=resume)
