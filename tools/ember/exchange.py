"""One question with its answer: what every kind makes and everything else reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """One question and its only right answer.

    Attributes:
        kind: Name of the kind, a key of ``KINDS``.
        question: What the user says.
        answer: What the model has to say, exactly.
        verbatim: The answer copies a part of the question, so the question must not be re-cased.
    """

    kind: str
    question: str
    answer: str
    verbatim: bool = False
