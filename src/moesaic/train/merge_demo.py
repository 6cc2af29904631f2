"""``moesaic demo-merge``: eight experts from nothing, their merge, the proof, and a look inside."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesaic.analysis.compare import Documents, held_out, verdict
from moesaic.analysis.routing import counts_per_layer, mutual_information, specialisation
from moesaic.chat import Chat
from moesaic.data.examples import padded
from moesaic.data.roles import write_roles
from moesaic.lm import LM, load
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
    out.print(comparison.table())
    rivals = [BASE, SOUP, "random router", *chain.roles]
    for sentence in (*verdict(comparison, OURS, rivals, ORACLE), *verdict(changing, OURS, [BASE])):
        out.print(Text(sentence, style="bold"), soft_wrap=True)
    lm = load(made[OURS])
    out.print(role_table(lm, held_out(chain.store()), chain.seq_len))
    out.print(Text(f"\nyou: {QUESTION}"))
    talk = Chat(lm, max_new_tokens=60, temperature=0.0)
    out.print(Text("it:  " + "".join(talk.answer(QUESTION)).strip().replace("\n", "\n     ")))
    out.print(Text(f"\n{time.perf_counter() - started:.0f} s. It opens in stock transformers: {made[OURS]}"))
    out.print(Text(f"{program} chat {made[OURS]} --experts"), soft_wrap=True)
    return made[OURS]


@torch.inference_mode()
def role_table(lm: LM, documents: Documents, seq_len: int) -> Table:
    """Who serves whom: the share of each domain's choices, over all layers, that went to each expert."""
    E, C = lm.config.experts.count, len(documents.domains)
    counts_CE = torch.zeros(C, E)
    for c in range(C):
        coded = [e for e, d in zip(documents.coded, documents.domain_N, strict=True) if d == c]
        for start in range(0, len(coded), 32):
            ids_BT, _, real_BT = padded(coded[start : start + 32], seq_len)
            counts_CE[c] += counts_per_layer(lm.model(ids_BT, real_BT, logits=False).routings).sum(0)
    share_CE = specialisation(counts_CE)
    bits = mutual_information(counts_CE)
    table = Table(
        title=f"choices of each role in percent; an expert's name tells {bits:.2f} bits of the role"
    )
    table.title_justify = "left"
    table.add_column("text of")
    for expert in range(E):
        table.add_column(lm.config.experts.name(expert), justify="right")
    for domain, row in zip(documents.domains, share_CE.tolist(), strict=True):
        own = max(row)
        table.add_row(domain, *(Text(f"{100 * x:.0f}", style="bold" if x == own else "") for x in row))
    return table
