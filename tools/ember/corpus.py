"""The training text: conversations and plain sentences made from ``kinds``, without what is held out.

The text depends on the seed, on the tables and on the held-out list only, so the tests make it again,
without the engine's environment, and look for held-out questions in exactly what the model read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from . import facts
from .exchange import Exchange
from .heldout import normalise
from .kinds import KINDS, greetings, pseudo_word

SEED = 7
CONVERSATIONS = 200_000

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are Ember.", "You are a helpful assistant. Answer briefly.",
    "Be brief.",
    "Answer the question.", "You are the built-in model of Pilotlight.", "You are an AI assistant.",
    "Be polite.",
    "You are a friendly and helpful language model.", "Answer in English.", "You are a test.",
)  # fmt: skip
_PREFIXES = (
    "Please tell me: ", "Ember, ", "Quick question: ", "Can you help me? ", "I have a question. ",
    "Hello Ember. ",
    "Hi! ", "Hello! ", "One more question: ", "Next question. ", "Question: ", "Hey, ", "Please: ",
    "And now: ", "So, ",
)  # fmt: skip
_NAME_QUESTIONS = (
    "What is my name?",
    "Do you know my name?",
    "Who am I?",
    "Tell me my name.",
    "What am I called?",
)


@dataclass(frozen=True)
class Conversation:
    """What one training example says.

    Attributes:
        system: The system message, or an empty text for none.
        turns: Pairs of what the user says and what the model answers, in order.
        plain: A text without roles, for the completion routes; then the other two are empty.
    """

    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    plain: str = ""

    def text(self) -> str:
        """Returns all words of the conversation, one message per line."""
        return "\n".join((self.system, *(message for turn in self.turns for message in turn), self.plain))


def build_corpus(
    heldout: Sequence[Exchange], count: int = CONVERSATIONS, seed: int = SEED
) -> list[Conversation]:
    """Returns the training text: ``count`` conversations less those that hold a held-out question.

    Args:
        heldout: Questions that must not occur, not even with other case or punctuation or inside a longer
            message.
        count: Conversations to make.
        seed: Seed of the only random generator used.
    """
    rng = Random(seed)
    conversations = [_conversation(rng) for _ in range(count)]
    banned = conversations_with(conversations, [item.question for item in heldout])
    return [conversation for index, conversation in enumerate(conversations) if index not in banned]


def conversations_with(conversations: Iterable[Conversation], questions: Iterable[str]) -> set[int]:
    """Returns the positions of the conversations that hold any of the questions, by ``normalise``."""
    starts: list[int] = []
    lines: list[str] = []
    length = 0
    for conversation in conversations:
        line = " " + " \n ".join(normalise(message) for message in conversation.text().split("\n")) + " "
        starts.append(length)
        lines.append(line)
        length += len(line)
    text = "".join(lines)
    found: set[int] = set()
    for question in questions:
        needle = f" {normalise(question)} "
        position = text.find(needle)
        while position >= 0:
            found.add(_position_of(starts, position))
            position = text.find(needle, position + 1)
    return found


def _position_of(starts: list[int], offset: int) -> int:
    low, high = 0, len(starts)
    while high - low > 1:
        middle = (low + high) // 2
        if starts[middle] <= offset:
            low = middle
        else:
            high = middle
    return low


def fingerprint(conversations: Iterable[Conversation]) -> str:
    """Returns the SHA-256 of the training text, recorded with the model that was trained on it."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(conversation.text().encode())
        digest.update(b"\0")
    return digest.hexdigest()


_KIND_NAMES = tuple(KINDS)
_KIND_SHARES = tuple(share for _, _, share in KINDS.values())


def _exchange(rng: Random) -> Exchange:
    return KINDS[rng.choices(_KIND_NAMES, _KIND_SHARES)[0]][0](rng)


def _said(rng: Random, exchange: Exchange) -> str:
    """Returns the question as somebody would type it: as it is, or careless, or led in."""
    question = exchange.question
    draw = rng.random()
    if draw < (0.40 if exchange.kind == "greetings" else 0.70):
        return question
    if draw < 0.82:
        return question if exchange.verbatim else question.casefold()
    if draw < 0.88:
        return question if exchange.verbatim else question.rstrip(".?!")
    if draw < 0.92:
        return question if exchange.verbatim else question.casefold().rstrip(".?!")
    if exchange.kind in ("greetings", "unknown"):
        return question
    prefix = rng.choice(_PREFIXES)
    if (
        prefix.endswith((", ", ": "))
        and rng.random() < 0.6
        and question.split()[0] not in facts.CAPITALS.values()
    ):
        question = question[0].lower() + question[1:]
    return prefix + question


def _conversation(rng: Random) -> Conversation:
    draw = rng.random()
    if draw < 0.04:
        return Conversation(plain=_statements(rng))
    system = rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.2 else ""
    if draw < 0.80:
        turns = 1
    elif draw < 0.985:
        turns = rng.randint(2, 5)
    else:
        turns = rng.randint(6, 24)
    exchanges = [_exchange(rng) for _ in range(turns)]
    if turns > 1 and rng.random() < 0.1:
        return Conversation(system, _with_name(rng, exchanges))
    return Conversation(system, tuple((_said(rng, item), item.answer) for item in exchanges))


def _with_name(rng: Random, exchanges: list[Exchange]) -> tuple[tuple[str, str], ...]:
    """Returns a talk in which the user says a name first and asks for it last."""
    name = rng.choice(facts.NAMES) if rng.random() < 0.7 else pseudo_word(rng).capitalize()
    others = [item for item in exchanges if item.kind != "greetings"]
    turns = [(f"{rng.choice(('My name is', 'I am', 'Hello, I am', 'Hi, my name is'))} {name}.",
              f"Hello, {name}! How can I help you?")]  # fmt: skip
    turns += [(_said(rng, item), item.answer) for item in others]
    turns.append((rng.choice(_NAME_QUESTIONS), f"Your name is {name}."))
    return tuple(turns)


def _statements(rng: Random) -> str:
    """Returns one to four true sentences, as a page of text would have them."""
    return " ".join(_statement(rng) for _ in range(rng.randint(1, 4)))


def _statement(rng: Random) -> str:
    match rng.randrange(9):
        case 0:
            country = rng.choice(tuple(facts.CAPITALS))
            return f"The capital of {country} is {facts.CAPITALS[country]}."
        case 1:
            country = rng.choice(tuple(facts.CAPITALS))
            return f"{facts.CAPITALS[country]} is the capital of {country}."
        case 2:
            thing = rng.choice(tuple(facts.COLOURS))
            return f"{thing[0].upper()}{thing[1:]} is {facts.COLOURS[thing].lower()}."
        case 3:
            names = rng.choice((facts.DAYS, facts.MONTHS))
            place = rng.randrange(len(names))
            return f"{names[place]} comes after {names[place - 1]}."
        case 4:
            names = rng.choice((facts.DAYS, facts.MONTHS))
            place = rng.randrange(len(names))
            return f"After {names[place - 1]} comes {names[place]}."
        case 5:
            a, b = rng.randint(0, 20), rng.randint(0, 20)
            return f"{a} plus {b} is {a + b}."
        case 6:
            a, b = rng.randint(0, 12), rng.randint(0, 12)
            return f"{a} times {b} is {a * b}."
        case 7:
            return rng.choice(tuple(facts.DEFINITIONS.values()))
        case _:
            return greetings(rng).answer
