"""The held-out questions: made once, committed, and from then on kept out of the training text.

``python tools/train_ember.py --freeze-heldout`` calls ``make_heldout``; everything else only reads the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from .exchange import Exchange
from .kinds import KINDS

PER_KIND = 16
SEED = 20


def normalise(text: str) -> str:
    """Returns the words of a text, lower case, without punctuation around them, with one space between them.

    Two questions that differ only in case, spacing or punctuation at the edge of a word are the same
    question.
    """
    return " ".join(bare for word in text.casefold().split() if (bare := word.strip(".,:;!?\"'")))


def make_heldout() -> list[Exchange]:
    """Returns ``PER_KIND`` questions of every kind, all different, none a part of another.

    A bare formula ("2+3") is never held out: it would be a word-for-word part of most longer wordings.
    """
    rng = Random(SEED)
    chosen: list[Exchange] = []
    for kind, (_, make, _) in KINDS.items():
        wanted = len(chosen) + PER_KIND
        while len(chosen) < wanted:
            exchange = make(rng)
            words = normalise(exchange.question)
            if not words[:1].isalpha() or len(words.split()) < 2:
                continue
            if exchange.kind != kind or any(_overlap(words, normalise(other.question)) for other in chosen):
                continue
            chosen.append(exchange)
    return chosen


def _overlap(one: str, other: str) -> bool:
    return f" {one} " in f" {other} " or f" {other} " in f" {one} "


def write_heldout(path: Path, exchanges: list[Exchange]) -> None:
    """Writes one JSON object per line: kind, question, answer."""
    lines = [
        json.dumps({"kind": item.kind, "question": item.question, "answer": item.answer}, ensure_ascii=False)
        for item in exchanges
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_heldout(path: Path) -> list[Exchange]:
    """Returns the committed list.

    Raises:
        FileNotFoundError: There is no list yet; freeze one before training.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [Exchange(record["kind"], record["question"], record["answer"]) for record in records]
