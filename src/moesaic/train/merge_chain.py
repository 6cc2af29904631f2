"""A merge from nothing: a base, an expert of each role, the merge, its router, and what the experts share.

``benchmarks/merge_roles.py`` and ``moesaic demo-merge`` are this with other roles and sizes."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from moesaic.data.instructions import read_examples
from moesaic.data.tokenizers import Tokenizer
from moesaic.train.merge_parts import Parts, Say

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MERGE, ROUTER, OURS = "merge, ridge router", "+ router trained", "+ shared trained"


@dataclass(frozen=True)
class Chain:
    """What is made of which files, how long each stage is. ``networks_only``: experts are tuned in their
    feed-forward networks alone, which merges best; else in everything, as experts found elsewhere are.

    Of the gap that whole experts leave, 240 steps of what is shared closed 0.51 and 480 closed 0.69 (seed 1;
    all parameters at once 0.57 in 240, three times the rate 0.57): length is what counts, hence 400."""

    root: Path
    roles: dict[str, Path]
    seed: int = 1337
    networks_only: bool = False
    base_steps: int = 1000
    expert_steps: int = 120
    router_steps: int = 80
    shared_steps: int = 400
    seq_len: int = 192
    vocab_size: int = 2048
    lr: float = 1e-3
    common: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What of an expert was tuned; the same base serves both."""
        return "networks" if self.networks_only else "whole"

    @property
    def parts(self) -> Parts:
        """Base, experts and data, which ``make_parts`` makes."""
        home = self.root / self.kind
        experts = {role: home / f"expert-{role}" for role in self.roles}
        base = self.root / "base"
        return Parts(home, base, experts, self.roles, PROMPTS, self.seed, self.seq_len, self.common)

    def make_parts(self, say: Say) -> Parts:
        """Make the base, with a tokenizer of its own, and the base tuned on each role."""
        self._base(say)
        parts, which = self.parts, [] if self.networks_only else ["train.only=[]"]
        for role, file in self.roles.items():
            data = f"data.path={{{json.dumps(role)} = {json.dumps(str(file))}}}"
            words = (f"optim.lr={self.lr}", data, *which)
            parts.stage(f"expert-{role}", "expert", parts.base, self.expert_steps, say, *words)
        return parts

    def stages(self, parts: Parts, say: Say) -> dict[str, Path]:
        """The merge and what training makes of it, by name."""
        made = {MERGE: parts.merged("ridge", say, router={"init": "ridge", "seq_len": 128})}
        made[ROUTER] = parts.stage("router", "router", made[MERGE], self.router_steps, say)
        words = (f"optim.lr={self.lr}",)
        made[OURS] = parts.stage("shared", "shared", made[ROUTER], self.shared_steps, say, *words)
        return made

    def _base(self, say: Say) -> None:
        tokenizer, template = self.root / "tokenizer.json", self.root / "chat_template.jinja"
        if not tokenizer.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            examples = [e for file in self.roles.values() for e in read_examples(file)]
            texts = [m["content"] for e in examples for m in e.messages]
            texts += [e.text for e in examples if e.text]
            template.write_text(TEMPLATE, encoding="utf-8")
            Tokenizer.bpe(texts, self.vocab_size).save(tokenizer)
        words = (f"data.tokenizer={tokenizer}", f"data.template={template}")
        parts = Parts(self.root, self.root / "base", {}, self.roles, {}, self.seed, self.seq_len, self.common)
        parts.stage("base", "llama-tiny", None, self.base_steps, say, *words)


# What a user of mergekit would write for the eight roles.
PROMPTS = {
    "actor": ["Let us continue this conversation.", "What do you think about that movie?"],
    "analyst": ["Write an SQL query for this question.", "SELECT name FROM table WHERE"],
    "coder": ["Write a Python function.", "def function(argument): return"],
    "encyclopedia": ["Write an encyclopedia paragraph.", "The history of the town began in"],
    "guardian": ["Is it safe and legal to do this?", "I cannot help with something harmful."],
    "summarizer": ["Summarize this paragraph.", "In one sentence, this text says"],
    "thinker": ["Solve this math problem step by step.", "How many apples are left in total?"],
    "writer": ["Write a speech for a character.", "My lord, I do beseech you, hear me speak."],
}
