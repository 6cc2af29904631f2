"""``moesaic demo-merge``: eight experts from nothing, their merge, the proof, and a look inside."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moesaic.analysis.compare import held_out, verdict
from moesaic.analysis.roles import route_roles
from moesaic.chat import Chat
from moesaic.data.roles import write_roles
from moesaic.lm import load
from moesaic.model.transformer import LanguageModel
from moesaic.train.merge_chain import BASE, ORACLE, OURS, SOUP, Chain, prove

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
    made = chain.run(say)
    models: dict[str, Path | LanguageModel] = {
        BASE: made[BASE],
        **{role: made[role] for role in chain.roles},
        SOUP: chain.soup(say),
        "random router": chain.merged("random", say, router={"init": "random"}),
        "ridge router": made["merge"],
        "ridge + router": made["merge + router"],
        OURS: made[OURS],
    }
    comparison, changing = prove(chain, models, say)
    out.print(comparison.table(out.width))
    out.print(comparison.domain_table([BASE, "ridge router", OURS, ORACLE]))
    rivals = [BASE, SOUP, "random router", *chain.roles]
    for sentence in (*verdict(comparison, OURS, rivals, ORACLE), *verdict(changing, OURS, [BASE])):
        out.print(Text(sentence, style="bold"), soft_wrap=True)
    lm = load(made[OURS])
    routing = route_roles(lm, held_out(chain.store()), chain.seq_len)
    out.print(routing.table())
    out.print(Text(routing.summary()), soft_wrap=True)
    out.print(Text(f"\nyou: {QUESTION}"))
    talk = Chat(lm, max_new_tokens=60, temperature=0.0)
    out.print(Text("it:  " + "".join(talk.answer(QUESTION)).strip().replace("\n", "\n     ")))
    out.print(Text(f"\n{time.perf_counter() - started:.0f} s. It opens in stock transformers: {made[OURS]}"))
    out.print(Text(f"{program} chat {made[OURS]} --experts"), soft_wrap=True)
    return made[OURS]
