"""The four kinds of sums, and the sums that are beyond the model; ``kinds`` lists them with the others."""

from __future__ import annotations

from random import Random

from . import facts
from .exchange import Exchange

# Wordings of sums. None is a word-for-word part of another one, else a held-out question in the short
# wording would take the long wording out of the training text with it. The first one is what most people
# ask, so it counts thrice.
_SUM_FORMS = (
    "What is {a} {op} {b}?", "What is {a} {op} {b}?", "What is {a} {op} {b}?", "How much is {a} {op} {b}?",
    "Calculate {a} {op} {b}.", "Compute {a} {op} {b}.",
    "Tell me the result of {a} {op} {b}.", "{a} {op} {b} equals what?", "What do you get for {a} {op} {b}?",
    "What does {a} {op} {b} make?", "Work out {a} {op} {b}.", "Solve {a} {op} {b}.", "What's {a} {op} {b}?",
)  # fmt: skip
_SUM_FORMS_SHORT = (
    "{a} {op} {b}",
    "{a} {op} {b} =",
    "{a} {op} {b} = ?",
    "{a}{op}{b}",
    "{a}{op}{b}=",
    "{a}{op}{b}=?",
)
_ADD_FORMS = ("What is the sum of {a} and {b}?", "Add {a} and {b}.", "Add {b} to {a}.")
_SUBTRACT_FORMS = (
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "What is the difference between {a} and {b}?",
)
_MULTIPLY_FORMS = ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}.")
_DIVIDE_FORMS = ("Divide {a} by {b}.", "How often does {b} go into {a}?")


def _sum(
    rng: Random,
    kind: str,
    a: int,
    b: int,
    answer: str,
    words: tuple[str, ...],
    sign: str,
    forms: tuple[str, ...],
) -> Exchange:
    """Returns one sum: in words, with its sign, as a bare formula, or in a form of its own."""
    draw = rng.random()
    left, right = str(a), str(b)
    if draw < 0.45:
        form, op = rng.choice(_SUM_FORMS), rng.choice(words)
        if max(a, b) <= 10 and rng.random() < 0.15:
            left, right = facts.NUMBER_WORDS[a], facts.NUMBER_WORDS[b]
    elif draw < 0.65:
        form, op = rng.choice(_SUM_FORMS), sign
    elif draw < 0.80:
        form, op = rng.choice(_SUM_FORMS_SHORT), sign
    else:
        form, op = rng.choice(forms), ""
    return Exchange(kind, form.format(a=left, b=right, op=op), answer)


def addition(rng: Random) -> Exchange:
    """Returns a sum of two numbers from 0 to 20."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return _sum(rng, "addition", a, b, str(a + b), ("plus",), "+", _ADD_FORMS)


def subtraction(rng: Random) -> Exchange:
    """Returns a difference of two numbers from 0 to 20; few of them are below zero."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    if a < b and rng.random() < 0.7:
        a, b = b, a
    forms = _SUBTRACT_FORMS if a >= b else _SUBTRACT_FORMS[:2]
    return _sum(rng, "subtraction", a, b, str(a - b), ("minus",), "-", forms)


def multiplication(rng: Random) -> Exchange:
    """Returns a product from the table up to 12 times 12."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return _sum(
        rng, "multiplication", a, b, str(a * b), ("times", "multiplied by"), rng.choice("*x"), _MULTIPLY_FORMS
    )


def division(rng: Random) -> Exchange:
    """Returns a division that leaves nothing over, from the table up to 12 times 12."""
    b, quotient = rng.randint(1, 12), rng.randint(0, 12)
    return _sum(rng, "division", b * quotient, b, str(quotient), ("divided by",), "/", _DIVIDE_FORMS)


def unknown_sum(rng: Random) -> str:
    """Returns a sum beyond the tables the model knows, or a division that does not come out even."""
    if rng.random() < 0.3:
        b = rng.randint(2, 12)
        a = b * rng.randint(0, 12) + rng.randint(1, b - 1)
        op = rng.choice(("divided by", "/"))
    else:
        large = rng.randint(21, 99) if rng.random() < 0.5 else rng.randint(100, 99999)
        other = rng.randint(2, 20) if rng.random() < 0.5 else rng.randint(21, 9999)
        a, b = (large, other) if rng.random() < 0.5 else (other, large)
        op = rng.choice(("plus", "minus", "times", "+", "-", "*"))
    return rng.choice(_SUM_FORMS).format(a=a, b=b, op=op)
