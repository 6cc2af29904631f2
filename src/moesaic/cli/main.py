"""The command line: one binary with verbs, in the order in which a new user meets them. Everything heavy is
imported inside the verb."""

import sys
from typing import Any

import typer
import typer.core
from rich.text import Text

from moesaic.cli import datasets, evaluation, machine, merging, models, storing, training
from moesaic.cli.arguments import OVERRIDES
from moesaic.errors import MoesaicError, ResourceError
from moesaic.terminal import err

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Build, train, merge and inspect sparse mixture-of-experts language models on hardware you own.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage or recipe, 3 data, 4 checkpoint, 5 diverged, "
    "6 disk or memory, 75 stopped and resumable.",
)
app.command(context_settings=OVERRIDES)(training.train)
app.command(context_settings=OVERRIDES)(training.demo)
app.command("demo-merge")(training.demo_merge)
app.command("demo-pipeline")(training.demo_pipeline)
app.command("demo-arche")(training.demo_arche)
app.command(context_settings=OVERRIDES)(models.generate)
app.command(context_settings=OVERRIDES)(models.chat)
app.command(context_settings=OVERRIDES)(models.inspect)
app.command()(models.analyze)
app.command()(models.export)
app.command(context_settings=OVERRIDES)(merging.merge)
app.command()(merging.repair)
app.command(context_settings=OVERRIDES)(machine.bench)
app.command()(machine.env)


class _ModelOrVerb(typer.core.TyperGroup):
    """``eval MODEL …`` is ``eval model MODEL …``, so that the usual thing needs no verb."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["model", *args]
        return super().resolve_command(ctx, args)


_evaluations = typer.Typer(
    no_args_is_help=True, cls=_ModelOrVerb, help="Measure models on text that they were not trained on."
)
_evaluations.command("model")(evaluation.eval_model)
_evaluations.command("merge", context_settings=OVERRIDES)(merging.eval_merge)
app.add_typer(_evaluations, name="eval")

_data = typer.Typer(no_args_is_help=True, help="Make training data: of public datasets, and tokens of text.")
_data.command("build", context_settings=OVERRIDES)(datasets.build)
_data.command("prepare", context_settings=OVERRIDES)(datasets.prepare)
_data.command("show")(datasets.show)
app.add_typer(_data, name="data")

_store = typer.Typer(no_args_is_help=True, help="Experts that a run keeps on disk.")
_store.command("info")(storing.info)
_store.command("verify")(storing.verify)
_store.command("compact")(storing.compact)
app.add_typer(_store, name="store")

_recipes = typer.Typer(no_args_is_help=False, help="List, show and copy the recipes that come along.")
_recipes.callback(invoke_without_command=True)(training.recipes)
_recipes.command("list")(training.recipes_list)
_recipes.command("show", context_settings=OVERRIDES)(training.recipes_show)
_recipes.command("copy")(training.recipes_copy)
app.add_typer(_recipes, name="recipes")


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
