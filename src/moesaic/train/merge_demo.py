"""``moesaic demo-merge``: eight experts from nothing, their merge, the proof, and a look inside."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moesaic.analysis.compare import held_out
from moesaic.analysis.roles import route_roles
from moesaic.chat import Chat
from moesaic.data.roles import write_roles
from moesaic.lm import load
from moesaic.train.merge_chain import OURS, Chain
from moesaic.train.merge_proof import prove, rivals
from moesaic.weights.card import write_measured

QUESTION = "Ada has 12 apples. Ben brings 3 bags of 4. How many are there?"


def run_merge_demo(out: Console, root: Path, seed: int, say: Callable[[str], None], program: str) -> Path:
    """Make everything under ``root``, print losses, verdict, who serves whom and an answer; the merge's
    directory."""
    started = time.perf_counter()
    say("writing the rows of eight roles, from rules and from Python's own library")
    roles = write_roles(root / "roles", seed=seed)
    chain = Chain(
        root,
        roles,
        seed=seed,
        networks_only=True,
        base_steps=300,
        expert_steps=80,
        router_steps=60,
        shared_steps=60,
        seq_len=128,
        vocab_size=1024,
    )
    parts = chain.make_parts(say)
    ours = chain.stages(parts, say)
    others, missing = rivals(parts, chain.router_steps, chain.lr, say)
    proof = prove(parts, others, ours, missing, say)
    for table in proof.tables(out.width):
        out.print(table)
    for sentence in proof.sentences():
        out.print(Text(sentence, style="bold"), soft_wrap=True)
    lm = load(ours[OURS])
    write_measured(ours[OURS], proof.markdown())
    routing = route_roles(lm, held_out(parts.store()), chain.seq_len)
    out.print(routing.table())
    out.print(Text(routing.summary()), soft_wrap=True)
    out.print(Text(f"\nyou: {QUESTION}"))
    talk = Chat(lm, max_new_tokens=60, temperature=0.0)
    out.print(Text("it:  " + "".join(talk.answer(QUESTION)).strip().replace("\n", "\n     ")))
    out.print(Text(f"\n{time.perf_counter() - started:.0f} s. It opens in stock transformers: {ours[OURS]}"))
    out.print(Text(f"{program} chat {ours[OURS]} --experts"), soft_wrap=True)
    return ours[OURS]
