"""How fast text becomes tokens, and what loading them costs a step of training.

    python benchmarks/data_speed.py --megabytes 60

Python's own library, repeated under other names until it is large enough, as JSON lines: prepared from start
to finish by ``prepare`` with a BPE tokenizer that exists, as it is and with every filter on. The peer is the
tokenizers library alone on the same texts, which no preparation can beat. Then the time of a batch of
``olmoe-nano`` beside that of its step.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from timing import header

from moesaic.data.cleaning import CleanOptions
from moesaic.data.corpora import DataOptions, open_corpus
from moesaic.data.pretrain import prepare
from moesaic.data.tokenizers import Tokenizer
from moesaic.train.loop import train_step
from moesaic.train.recipe import load_recipe
from moesaic.train.session import build_session

EVERY_FILTER = CleanOptions(
    normalise=True, repeats=32, top_word=0.3, top_two_words=0.5, exact_duplicates=True, near_duplicates=0.8
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        tokenising(Path(name), args.megabytes * 10**6, args.rounds)
        loading(Path(name))


def tokenising(folder: Path, size: int, rounds: int) -> None:
    texts, total = [], 0
    library = [d.text for d in open_corpus(DataOptions(max_chars=size)).documents()]
    while total < size:
        for text in library:
            texts.append(f"# copy {total}\n{text}")
            total += len(text)
    Tokenizer.bpe(library[:1000], 8192).save(folder / "tokenizer.json")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8"
    )
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    rates: dict[str, list[float]] = {}
    for number in range(rounds):
        started = time.perf_counter()
        tokens = 0
        for first in range(0, len(texts), 500):
            tokens += sum(map(len, tokenizer.library.encode_batch_fast(texts[first : first + 500])))
        rates.setdefault("tokenizers alone", []).append(tokens / (time.perf_counter() - started))
        for label, clean in (("prepare", CleanOptions()), ("prepare, every filter", EVERY_FILTER)):
            options = DataOptions(
                source="files",
                path=str(folder / "text.jsonl"),
                tokenizer=str(folder / "tokenizer.json"),
                clean=clean,
                cache=str(folder / f"cache-{number}-{label}"),
            )
            started = time.perf_counter()
            prepare(options)
            # Of the tokens that were read: what is left out had to be read too.
            rates.setdefault(label, []).append(tokens / (time.perf_counter() - started))
    print(f"{total / 1e6:.0f} MB of text, {tokens:,} tokens, vocabulary {tokenizer.vocab_size:,}")
    for label, values in rates.items():
        middle = statistics.median(values) / 1e6
        print(f"{label:24} {middle:.2f} M tokens/s ({min(values) / 1e6:.2f} to {max(values) / 1e6:.2f})")


def loading(folder: Path) -> None:
    for mask in ("false", "true"):
        words = [f"data.cache={folder / 'nano'}", f"data.document_mask={mask}"]
        session = build_session(load_recipe("olmoe-nano", words), lambda sentence: None)
        batches, steps = [], []
        for step in range(1, 13):
            started = time.perf_counter()
            session.micro_batches(step)
            batches.append(time.perf_counter() - started)
            train_step(session, step)
            steps.append(time.perf_counter() - started - batches[-1])
        batch, whole = statistics.median(batches[2:]), statistics.median(steps[2:])
        share = 100 * batch / whole
        print(
            f"olmoe-nano, document_mask = {mask}: a batch takes {batch * 1e3:.2f} ms, "
            f"a step {whole * 1e3:.0f} ms: {share:.2f} %"
        )


if __name__ == "__main__":
    main()
