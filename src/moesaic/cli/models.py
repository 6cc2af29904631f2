"""Verbs that use a model: generate, chat, inspect, analyze, export."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from moesaic.cli.arguments import AsJson, ModelDir, Prompt, memory_of
from moesaic.errors import RecipeError
from moesaic.terminal import err, out, print_rows, prompt_text, say, write


def generate(
    context: typer.Context,
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
    lm = load(model, device, memory=memory_of(context.args))
    lm.ids(text)  # refused before anything is echoed
    lm.lay_out(weights)
    write(text)
    for piece in lm.stream(text, max_new_tokens, temperature, seed, top_k, top_p, stop or ()):
        write(piece)
    write("\n")


def chat(
    context: typer.Context,
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

    lm = load(model, device, memory=memory_of(context.args))
    if experts and not lm.config.moe_layers:
        raise RecipeError(f"{model}: is a dense model; it has no experts to show")
    lm.lay_out(weights)
    talk = Chat(lm, max_new_tokens, temperature, top_p, seed, show_experts=experts)
    if system:
        talk.command(f"/system {system}", lambda _: None)
    run_chat(talk, out)


def inspect(
    context: typer.Context,
    model: ModelDir,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A text to look at; - reads standard input.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: labelled text to look at instead; once or more.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="With --data: the loss without this expert; may be given again."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="With --data: the loss with this expert alone; may be given again."),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="With --data: where a text is cut.")] = 512,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="With --prompt: also a row for every token.")
    ] = False,
    most: Annotated[
        int, typer.Option("--most", min=1, help="With --prompt: how many experts to show per layer.")
    ] = 3,
    picture: Annotated[Path | None, typer.Option("--out", help="Draw the routing as a PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which experts take a text, per layer and token; or which serve which labelled text, and what each
    is worth to it."""
    if (prompt is None) == (not data):
        raise RecipeError("give --prompt TEXT, or --data NAME=FILE: one of them")
    if prompt is not None and (without or only):
        raise RecipeError("--without and --only measure a loss on labelled text; give --data NAME=FILE")
    if data and tokens:
        raise RecipeError("--tokens shows the tokens of a --prompt; --data has too many")
    memory = memory_of(context.args)
    if prompt is not None:
        _inspect_prompt(model, memory, prompt, tokens, most, picture, as_json)
        return
    from moesaic.analysis.ablation import role_report

    report = role_report(model, data or [], without or [], only or [], seq_len, say, memory)
    if picture is not None:
        report.draw(picture)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
        return
    for table in report.tables(out.width):
        out.print(table)
    out.print(Text(report.routing.summary()), soft_wrap=True)


def _inspect_prompt(
    model: Path,
    memory: int | None,
    prompt: str,
    tokens: bool,
    most: int,
    picture: Path | None,
    as_json: bool,
) -> None:
    from moesaic.analysis.prompt import route_prompt
    from moesaic.lm import load

    routing = route_prompt(load(model, memory=memory), prompt_text(prompt))
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


def analyze(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL…",
            help="A model, or a run (its checkpoints), or several checkpoints, the last one last.",
        ),
    ],
    data: Annotated[list[str], typer.Option(help="NAME=FILE: labelled text; once or more.")],
    folder: Annotated[Path, typer.Option("--out", help="Where report.json and the figures go.")] = Path(
        "analysis"
    ),
    tokens: Annotated[int, typer.Option(min=2, help="At most so many of each file.")] = 200_000,
    seq_len: Annotated[int, typer.Option(min=2, help="Text is read in windows of so many tokens.")] = 2048,
    least: Annotated[
        int, typer.Option(min=1, help="How often a token id must occur to count as vocabulary.")
    ] = 10,
    as_json: AsJson = False,
) -> None:
    """OLMoE's analysis of a routing: saturation, co-activation, specialisation in domains and vocabulary,
    load."""
    from moesaic.analysis.report import analyse

    analysis = analyse(models, data, tokens, seq_len, least, say)
    written = analysis.write(folder)
    if as_json:
        typer.echo(json.dumps(analysis.as_json()))
        return
    print_rows([*analysis.rows(), ("written", ", ".join(str(path) for path in written))], False)


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
