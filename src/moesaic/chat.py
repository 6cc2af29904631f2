"""Talk with a model: turns through its chat template, streamed, and which expert said what.

A line that begins with a slash is a command; everything else is said to the model. In a pipe there is no
colour and no prompt, one answer for each line.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from moesaic.data.chat import PLAIN_TEMPLATE, ChatTemplate, Message, load_template
from moesaic.errors import DataError, MoesaicError, RecipeError
from moesaic.files import write_atomic
from moesaic.lm import LM

HELP = """/experts       show which expert said each word, or stop showing it
/system TEXT   what the model is told about itself; begins anew
/reset         forget the conversation
/save FILE     write the conversation as one row of JSON lines (messages)
/help          this
/quit          end (as does the end of input)"""
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")


@dataclass
class Chat:
    """One conversation with one model."""

    lm: LM
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float | None = 0.95
    seed: int | None = None
    messages: list[Message] = field(default_factory=list)
    show_experts: bool = False

    def __post_init__(self) -> None:
        self.template = load_template(self.lm.path) or ChatTemplate(PLAIN_TEMPLATE)

    def answer(self, said: str) -> Iterator[str]:
        """The model's answer, piece by piece; both turns are then part of the conversation."""
        self.messages.append({"role": "user", "content": said})
        pieces = []
        try:
            ids = self._ids(answer=True)
            room = self.lm.config.context - len(ids)
            if room < 1:
                raise RecipeError(
                    f"the conversation fills the model's {self.lm.config.context} tokens; say /reset"
                )
            steps = self.lm.stream(
                ids,
                min(self.max_new_tokens, room),
                self.temperature,
                self.seed,
                top_p=self.top_p if self.temperature else None,
            )
            for piece in steps:
                pieces.append(piece)
                yield piece
        except MoesaicError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def experts(self) -> list[tuple[str, int]]:
        """The pieces of the last answer, each with the expert of most weight over all layers where the model
        was when it said it."""
        before = self.template.render(self.messages[:-1], answer=True)
        begin = len(self.lm.tokenizer.encode(before))
        ids = [*self.lm.tokenizer.encode(before).tolist()]
        ids += self.lm.tokenizer.encode(self.messages[-1]["content"]).tolist()
        routings = self.lm.routing(torch.tensor([ids[-self.lm.config.context :]]))
        weight_TE = torch.stack(
            [
                torch.zeros(len(r.weight_TK), r.num_experts).scatter_add_(
                    1, r.expert_TK, r.weight_TK * r.keep_TK
                )
                for r in routings
            ]
        ).sum(0)
        said = [self.lm.tokenizer.decode([token]) for token in ids[begin:]][1 - len(weight_TE) :]
        chosen = weight_TE.argmax(1)[-len(said) - 1 : -1].tolist() if said else []
        return list(zip(said, chosen, strict=True))

    def command(self, line: str, say: Callable[[str], None]) -> bool:
        """Carry out a command; whether the conversation goes on. Raises RecipeError for an unknown one."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/experts":
            if not self.lm.config.moe_layers:
                raise RecipeError("this is a dense model; it has no experts to show")
            self.show_experts = not self.show_experts
            say(f"experts are {'shown' if self.show_experts else 'no longer shown'}")
        elif word == "/system":
            self.messages = [{"role": "system", "content": rest}] if rest else []
            say("begun anew")
        elif word == "/reset":
            self.messages = [m for m in self.messages if m["role"] == "system"]
            say("begun anew")
        elif word == "/save":
            self._save(rest.strip())
            say(f"saved: {rest.strip()}")
        elif word == "/help":
            say(HELP)
        else:
            raise RecipeError(f"{word}: no such command; /help lists them")
        return True

    def _ids(self, answer: bool) -> list[int]:
        ids: list[int] = self.lm.tokenizer.encode(self.template.render(self.messages, answer=answer)).tolist()
        return ids

    def _save(self, name: str) -> None:
        if not name:
            raise RecipeError("/save: give a file")
        row = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            path = Path(name).expanduser()
            if path.exists():
                raise RecipeError(f"/save {name}: exists; choose another name")
            write_atomic(path, row + "\n")
        except (OSError, RuntimeError) as error:
            raise RecipeError(f"/save {name}: cannot be written: {error}") from None


def run_chat(chat: Chat, out: Console, lines: Iterable[str] | None = None) -> None:
    """Converse until the input ends. A mistake is a sentence, and the conversation goes on."""
    person = lines is None and sys.stdin.isatty()
    if person:
        out.print(Text(f"{chat.lm.path.name}: /help lists commands, /quit ends"))
    for line in _lines(out) if person else (_piped() if lines is None else lines):
        said = line.rstrip("\n")
        if not said.strip():
            continue
        try:
            if said.startswith("/"):
                if not chat.command(said, lambda text: out.print(Text(text))):
                    return
                continue
            for piece in chat.answer(said):
                out.print(Text(piece), end="", soft_wrap=True)
            out.print()
            if chat.show_experts:
                _show(chat, out)
        except (RecipeError, DataError) as error:
            out.print(Text(str(error)), style="red")


def _piped() -> Iterator[str]:
    """Standard input line by line. Raises DataError where it is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"standard input, line {number}: not UTF-8 text") from None


def _lines(out: Console) -> Iterator[str]:
    while True:
        try:
            yield out.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            out.print()
            return


def _show(chat: Chat, out: Console) -> None:
    """The last answer again, each word in the colour of its expert, and whose colour is whose."""
    options, said = chat.lm.config.experts, chat.experts()
    coloured = Text()
    for piece, expert in said:
        coloured.append(piece, style=_COLOURS[expert % len(_COLOURS)])
    legend = Text()
    for expert in sorted({expert for _, expert in said}):
        share = sum(e == expert for _, e in said) / len(said)
        legend.append(f"{options.name(expert)} {100 * share:.0f}%  ", style=_COLOURS[expert % len(_COLOURS)])
    if out.color_system is not None:
        out.print(coloured, soft_wrap=True)
    out.print(legend, soft_wrap=True)
