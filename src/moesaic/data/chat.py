"""Chat templates: a conversation to the text that a model was tuned on, and which of it the assistant said.

A template comes with a model and is a program of its author. It runs in jinja2's sandbox, which keeps it from
Python's insides, and here also under a limit of work and of output: it may loop, or write without end.
"""

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from moesaic.errors import DataError

MOST_CHARACTERS = 4 * 2**20
MOST_STEPS = 2_000_000  # lines of compiled template; a long conversation takes some thousands
_MOST_SOURCE = 2**18

# ChatML, which most small models speak, for a tokenizer that comes without a template.
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Message = dict[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, the special tokens it may name, and where it is from (for messages)."""

    source: str
    tokens: dict[str, str] = field(default_factory=dict)
    where: str = "the chat template"

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The conversation as text; with ``answer``, up to where the assistant's next words begin.

        Raises DataError for a template that fails, refuses the conversation, or passes a limit.
        """
        import jinja2

        names = {"messages": list(messages), "add_generation_prompt": answer, **self.tokens}
        pieces, size, watch = [], 0, _Watch()
        before = sys.gettrace()
        try:
            template = _compiled(self.source)
            sys.settrace(watch)
            for piece in template.generate(names):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_CHARACTERS:
                    raise DataError(f"{self.where}: writes more than {MOST_CHARACTERS:,} characters")
        except _TooLong:
            raise DataError(f"{self.where}: does not come to an end") from None
        except DataError:
            raise
        except (jinja2.TemplateError, Exception) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self.where}: {reason[:200]}") from None
        finally:
            sys.settrace(before)
        return "".join(pieces)

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation, and from where to where the assistant speaks in it (its end mark included).

        Raises DataError for a template whose text changes when the conversation goes on, since nothing then
        tells what the assistant said.
        """
        text, spans = self.render(messages), []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = self.render(messages[:turn], answer=True)
            end = self.render(messages[: turn + 1])
            if not text.startswith(begin) or not text.startswith(end) or len(begin) > len(end):
                raise DataError(f"{self.where}: what it writes of a turn depends on later turns")
            spans.append((len(begin), len(end)))
        return text, spans


def load_template(directory: Path) -> ChatTemplate | None:
    """The chat template of a model directory, None where it has none. Raises DataError."""
    config, file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    table: Any = {}
    try:
        if config.is_file():
            table = json.loads(config.read_text(encoding="utf-8"))
        source = file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}: its chat template cannot be read: {error}") from None
    table = table if isinstance(table, dict) else {}
    where = str(file if source is not None else config)
    source = table.get("chat_template") if source is None else source
    if isinstance(source, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    if len(source) > _MOST_SOURCE:
        raise DataError(f"{where}: the chat template is {len(source):,} characters long, which none is")
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = table.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return ChatTemplate(source, {"bos_token": "", "eos_token": "", **tokens}, where)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    environment.globals.update(raise_exception=refuse)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


class _TooLong(Exception):
    pass


class _Watch:
    """A trace function that counts the lines a template runs, for a loop that writes nothing has no other
    place to be stopped at."""

    def __init__(self) -> None:
        self.left = MOST_STEPS

    def __call__(self, frame: FrameType, event: str, argument: object) -> "_Watch | None":
        if frame.f_code.co_filename != "<template>":
            return None
        self.left -= 1
        if self.left < 0:
            raise _TooLong
        return self
