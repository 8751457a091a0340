"""The kinds of questions the built-in model learns, each a function from a random generator to one exchange.

``corpus`` draws the training text from these functions and ``heldout`` draws the held-out questions from
the same ones; the training text then loses everything that holds a held-out question. So a held-out
question is a combination of a fact and a wording that training never showed, while the fact came in other
wordings and the wording with other facts.

The functions return the plain form of a question ("What is 2 plus 3?"); ``corpus`` adds the careless forms.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from random import Random

from . import facts, unknowns
from .exchange import Exchange
from .sums import addition, division, multiplication, subtraction, unknown_sum

UNKNOWN_ANSWER = "I do not know."


_NEXT_FORMS = (
    "What {unit} comes after {x}?", "Which {unit} comes after {x}?", "Which {unit} follows {x}?",
    "What {unit} follows {x}?", "What is the {unit} after {x}?", "Name the {unit} after {x}.",
    "Tell me the {unit} after {x}.", "What comes after {x}?", "What is the next {unit} after {x}?",
    "Which {unit} is right after {x}?", "After {x}, which {unit} is it?",
)  # fmt: skip
_PREVIOUS_FORMS = (
    "What {unit} comes before {x}?", "Which {unit} comes before {x}?", "What is the {unit} before {x}?",
    "Name the {unit} before {x}.", "Tell me the {unit} before {x}.", "What comes before {x}?",
    "Which {unit} is right before {x}?", "Which {unit} precedes {x}?", "Before {x}, which {unit} is it?",
)  # fmt: skip
_TODAY_FORMS = {
    1: ("If today is {x}, what day is tomorrow?", "Today is {x}. What day is tomorrow?",
        "Today is {x}. Which day is tomorrow?", "If it is {x} today, what day is it tomorrow?",
        "If yesterday was {x}, what day is today?", "What day is it tomorrow if today is {x}?"),
    -1: ("If today is {x}, what day was yesterday?", "Today is {x}. What day was yesterday?",
         "Today is {x}. Which day was yesterday?", "If it is {x} today, what day was it yesterday?",
         "If tomorrow is {x}, what day is today?"),
    2: ("Which day is two days after {x}?", "What day is two days after {x}?"),
    -2: ("Which day is two days before {x}?", "What day is two days before {x}?"),
}  # fmt: skip
_POSITION_FORMS = (
    "Which {unit} is the {ordinal} of the {whole}?", "What is the {ordinal} {unit} of the {whole}?",
    "Name the {ordinal} {unit} of the {whole}.", "Which is the {ordinal} {unit} in the {whole}?",
    "Tell me the {ordinal} {unit} of the {whole}.",
)  # fmt: skip


def _cycle(rng: Random, kind: str, names: tuple[str, ...], unit: str, whole: str) -> Exchange:
    """Returns a question about the order of ``names``, which repeats after its end."""
    place = rng.randrange(len(names))
    if rng.random() < 0.15:
        form = rng.choice(_POSITION_FORMS)
        ordinal = facts.ORDINALS[place] if place + 1 < len(names) or rng.random() < 0.5 else "last"
        return Exchange(kind, form.format(unit=unit, ordinal=ordinal, whole=whole), f"{names[place]}.")
    step = rng.choice((1, -1))
    form = rng.choice(_NEXT_FORMS if step == 1 else _PREVIOUS_FORMS)
    return Exchange(kind, form.format(unit=unit, x=names[place]), f"{names[(place + step) % len(names)]}.")


def weekdays(rng: Random) -> Exchange:
    """Returns a question about the order of the days of the week."""
    draw = rng.random()
    if draw < 0.4:
        step = rng.choice((1, -1, 1, -1, 2, -2))
        place = rng.randrange(7)
        form = rng.choice(_TODAY_FORMS[step])
        return Exchange("weekdays", form.format(x=facts.DAYS[place]), f"{facts.DAYS[(place + step) % 7]}.")
    if draw < 0.45:
        form = rng.choice(
            ("Name the days of the week.", "What are the days of the week?", "List the days of the week.")
        )
        return Exchange("weekdays", form, ", ".join(facts.DAYS) + ".")
    if draw < 0.48:
        return Exchange(
            "weekdays", rng.choice(("How many days are in a week?", "How many days does a week have?")), "7"
        )
    return _cycle(rng, "weekdays", facts.DAYS, "day", "week")


def months(rng: Random) -> Exchange:
    """Returns a question about the order of the months."""
    draw = rng.random()
    if draw < 0.05:
        form = rng.choice(
            ("Name the months of the year.", "What are the months of the year?", "List the months.")
        )
        return Exchange("months", form, ", ".join(facts.MONTHS) + ".")
    if draw < 0.08:
        question = rng.choice(("How many months are in a year?", "How many months does a year have?"))
        return Exchange("months", question, "12")
    if draw < 0.2:
        place = rng.randrange(12)
        form = rng.choice(
            ("Which month has the number {n}?", "What is month number {n}?", "Name month number {n}.")
        )
        return Exchange("months", form.format(n=place + 1), f"{facts.MONTHS[place]}.")
    return _cycle(rng, "months", facts.MONTHS, "month", "year")


_COLOUR_FORMS = (
    "What {c} is {x}?", "What is the {c} of {x}?", "Which {c} is {x}?", "Which {c} does {x} have?",
    "Tell me the {c} of {x}.", "What {c} does {x} have?", "Name the {c} of {x}.",
    "Do you know the {c} of {x}?",
    "Say which {c} {x} has.", "{X} has which {c}?",
)  # fmt: skip
_MIX_FORMS = (
    "What {c} do you get when you mix {a} and {b}?", "Mix {a} and {b}. Which {c} is it?",
    "What do {a} and {b} make?",
    "Which {c} do {a} and {b} make?", "If I mix {a} with {b}, what {c} do I get?",
    "What {c} is {a} mixed with {b}?",
)  # fmt: skip


def colours(rng: Random) -> Exchange:
    """Returns a question about the colour of a thing or about a mixture of two colours."""
    spelling = "color" if rng.random() < 0.4 else "colour"
    if rng.random() < 0.15:
        pair = rng.choice(tuple(facts.MIXES))
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        return Exchange(
            "colours", rng.choice(_MIX_FORMS).format(c=spelling, a=a, b=b), f"{facts.MIXES[pair]}."
        )
    thing = rng.choice(tuple(facts.COLOURS))
    question = rng.choice(_COLOUR_FORMS).format(c=spelling, x=thing, X=thing[0].upper() + thing[1:])
    return Exchange("colours", question, f"{facts.COLOURS[thing]}.")


_CAPITAL_FORMS = (
    "What is the capital of {x}?", "What is the capital city of {x}?", "Which city is the capital of {x}?",
    "Name the capital of {x}.", "Tell me the capital of {x}.", "Do you know the capital of {x}?",
    "What's the capital of {x}?", "{X} has which capital?", "What is {x}'s capital?",
    "Give me the capital of {x}.",
    "Which capital does {x} have?",
)  # fmt: skip
_COUNTRY_FORMS = (
    "{y} is the capital of which country?", "Which country has the capital {y}?",
    "{y} is the capital of what?",
    "Of which country is {y} the capital?", "Name the country whose capital is {y}.",
)  # fmt: skip


# Careless forms; part of the other wordings, so they are never held out.
_CAPITAL_FORMS_SHORT = ("Capital of {x}?", "The capital of {x}?", "{x} capital?")


def capitals(rng: Random) -> Exchange:
    """Returns a question for the capital of a country, or for the country of a capital."""
    if rng.random() < 0.92:
        return capitals_worded(rng)
    country = rng.choice(tuple(facts.CAPITALS))
    question = rng.choice(_CAPITAL_FORMS_SHORT).format(x=country)
    return Exchange("capitals", question, f"The capital of {country} is {facts.CAPITALS[country]}.")


def capitals_worded(rng: Random) -> Exchange:
    """Returns such a question as a whole sentence; the held-out questions are of this sort."""
    country = rng.choice(tuple(facts.CAPITALS))
    capital = facts.CAPITALS[country]
    if rng.random() < 0.25:
        return Exchange(
            "capitals",
            rng.choice(_COUNTRY_FORMS).format(y=capital),
            f"{capital} is the capital of {country}.",
        )
    question = rng.choice(_CAPITAL_FORMS).format(x=country, X=country[0].upper() + country[1:])
    return Exchange("capitals", question, f"The capital of {country} is {capital}.")


_SPELL_FORMS = (
    "Spell the word {w}.", "How do you spell {w}?",
    "How is {w} spelled?", 'Spell "{w}".', "Can you spell {w}?",
    "What are the letters of {w}?", "Spell out {w}.", "Which letters does {w} have?", "Spell {w} for me.",
    'Please spell the word "{w}".', "What is the spelling of {w}?", "Spell {w}, please.",
)  # fmt: skip


def pseudo_word(rng: Random) -> str:
    """Returns a word that does not exist: syllables, so that every piece the tokenizer knows gets spelled."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        onset = rng.choice(
            ("", *"bcdfghjklmnpqrstvwxyz", "st", "tr", "ch", "sh", "th", "br", "gr", "pl", "fl", "cl", "qu")
        )
        vowel = rng.choice((*"aeiouy", "ea", "ou", "ai", "oo", "ee", "ie"))
        coda = rng.choice(
            ("", "", *"bdgklmnprstx", "nd", "st", "ng", "ck", "ll", "rt", "ss", "er", "ing", "ter")
        )
        parts.append(onset + vowel + coda)
    return "".join(parts)


def spelling_word(rng: Random) -> str:
    """Returns a word to spell: from the list, a name, or one that does not exist."""
    draw = rng.random()
    if draw < 0.5:
        word = rng.choice(facts.WORDS)
    elif draw < 0.6:
        word = rng.choice((*facts.NAMES, *facts.CAPITALS.values(), "Pilotlight", "Ember"))
    elif draw < 0.9:
        word = pseudo_word(rng)
    else:
        word = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 8)))
    if rng.random() < 0.1:
        word = word.capitalize()
    return word


def spelling(rng: Random) -> Exchange:
    """Returns a word to spell; the answer has its letters with hyphens between them."""
    word = spelling_word(rng)
    return _spell(rng, word)


def spelling_known(rng: Random) -> Exchange:
    """Returns a word of the list to spell; the held-out questions are of this sort."""
    return _spell(rng, rng.choice(facts.WORDS))


def _spell(rng: Random, word: str) -> Exchange:
    return Exchange("spelling", rng.choice(_SPELL_FORMS).format(w=word), "-".join(word), verbatim=True)


_REPEAT_FORMS = (
    "Repeat after me: {t}", "Repeat: {t}", "Say: {t}", "Please repeat: {t}", "Echo: {t}",
    "Repeat these words: {t}",
    "Repeat this: {t}", "Say this: {t}", 'Repeat "{t}"', 'Say "{t}"', "Say after me: {t}", "Write: {t}",
    "Copy this text: {t}", "Please say: {t}",
)  # fmt: skip


def _repeat_words(rng: Random, count: int) -> list[str]:
    pools = (
        facts.WORDS,
        facts.WORDS,
        facts.WORDS,
        facts.SMALL_WORDS,
        facts.SMALL_WORDS,
        facts.NAMES,
        tuple(facts.CAPITALS.values()),
        facts.DAYS,
    )
    return [rng.choice(rng.choice(pools)) for _ in range(count)]


def repeating(rng: Random) -> Exchange:
    """Returns a text to say back: words, made-up words, numbers, and now and then a long or a wild one."""
    draw = rng.random()
    if draw < 0.55:
        words = _repeat_words(rng, rng.randint(1, 8))
    elif draw < 0.75:
        words = [
            rng.choice(facts.WORDS) if rng.random() < 0.5 else pseudo_word(rng)
            for _ in range(rng.randint(1, 8))
        ]
    elif draw < 0.85:
        words = [rng.choice((str(rng.randint(0, 9999)), pseudo_word(rng))) for _ in range(rng.randint(1, 6))]
    elif draw < 0.93:
        alphabet = (
            string.ascii_letters
            + string.digits
            + string.punctuation.replace('"', "")
            + "äöüéñçß€漢字かな🙂🔥"
        )
        words = [
            "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 4))
        ]
    else:
        words = _repeat_words(rng, rng.randint(9, 40))
    text = " ".join(words)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    form = rng.choice(_REPEAT_FORMS)
    if not form.endswith('"') and rng.random() < 0.2:
        text += rng.choice(".!?")
    return Exchange("repeating", form.format(t=text), text, verbatim=True)


def repeating_plain(rng: Random) -> Exchange:
    """Returns three to six words of the list to say back; the held-out questions are of this sort."""
    text = " ".join(rng.choice(facts.WORDS) for _ in range(rng.randint(3, 6)))
    return Exchange("repeating", rng.choice(_REPEAT_FORMS).format(t=text), text, verbatim=True)


_COUNT_FORMS = (
    "Count from {a} to {b}.", "Can you count from {a} to {b}?", "Count: {a} to {b}.",
    "Say the numbers from {a} to {b}.",
    "Write the numbers from {a} to {b}.", "List the numbers from {a} to {b}.",
    "Give me the numbers from {a} to {b}.",
)  # fmt: skip


def counting(rng: Random) -> Exchange:
    """Returns a range to count, up or down; most are short, a few go to a hundred."""
    draw = rng.random()
    if draw < 0.15:
        b = rng.randint(2, 20) if rng.random() < 0.8 else rng.choice((30, 40, 50, 60, 100))
        form = rng.choice(
            ("Count to {b}.", "Can you count to {b}?", "Please count up to {b}.", "Count up to {b} for me.")
        )
        return Exchange("counting", form.format(b=b), ", ".join(str(n) for n in range(1, b + 1)))
    if draw < 0.95:
        a = rng.randint(0, 20) if rng.random() < 0.7 else rng.randint(0, 90)
        b = a + rng.randint(2, 10)
    else:
        a, b = rng.choice((0, 1)), rng.randint(20, 100)
    if draw < 0.3:
        form = rng.choice(("Count down from {a} to {b}.", "Count backwards from {a} to {b}."))
        return Exchange("counting", form.format(a=b, b=a), ", ".join(str(n) for n in range(b, a - 1, -1)))
    question = rng.choice(_COUNT_FORMS).format(a=a, b=b)
    return Exchange("counting", question, ", ".join(str(n) for n in range(a, b + 1)))


# What is said, and the answer it gets. "{n}" is a name, copied into the answer where the answer has it.
_HELLO = ("Hello", "Hi", "Hey", "Good day", "Greetings", "Hello there", "Hi there", "Hey there")
_HELLO_TAILS = ("", " Ember", " my friend", " Pilotlight", " everybody", ", can you hear me",
    ", are you there",
                ", nice to meet you", " again", " little model")  # fmt: skip
_PARTING = (
    "Goodbye",
    "Bye",
    "Bye bye",
    "See you later",
    "See you tomorrow",
    "See you",
    "Farewell",
    "So long",
)
_THANKS = (
    "Thank you",
    "Thanks",
    "Many thanks",
    "Thank you very much",
    "Thanks a lot",
    "Thanks so much",
    "Cheers",
)
_TAILS = (
    "",
    " Ember",
    " my friend",
    " Pilotlight",
    " little model",
    " then",
    " for everything",
    " and take care",
)
_NAMED = (
    "Hello, I am {n}.", "Hi, I am {n}.", "My name is {n}.", "Hello, my name is {n}.", "Hi, my name is {n}.",
    "I am {n}.", "Hey, I am {n}.", "Good day, my name is {n}.", "Good day, I am {n}.", "Hey, this is {n}.",
    "Hello, this is {n}.", "People call me {n}.", "You can call me {n}.", "Please call me {n}.",
    "They call me {n}.",
)  # fmt: skip
_WELLBEING = (
    "How are you?", "How do you do?", "How are you today?", "Are you well?", "How are you doing?",
    "How is it going?",
    "How do you feel?", "How have you been?", "Are you fine?", "How is your day?",
)  # fmt: skip


def greetings(rng: Random) -> Exchange:
    """Returns something that opens or closes a talk, and the polite reply."""
    draw = rng.random()
    if draw < 0.01:
        return Exchange("greetings", "", "Hello! How can I help you?")
    if draw < 0.3:
        text = rng.choice(_HELLO) + rng.choice(_HELLO_TAILS) + rng.choice("!.")
        return Exchange("greetings", text, "Hello! How can I help you?")
    if draw < 0.5:
        part = rng.choice(("morning", "afternoon", "evening"))
        text = f"Good {part}{rng.choice(_HELLO_TAILS)}{rng.choice('!.')}"
        return Exchange("greetings", text, f"Good {part}! How can I help you?")
    if draw < 0.65:
        name = rng.choice(facts.NAMES) if rng.random() < 0.7 else pseudo_word(rng).capitalize()
        return Exchange(
            "greetings", rng.choice(_NAMED).format(n=name), f"Hello, {name}! How can I help you?", True
        )
    if draw < 0.77:
        text = rng.choice(_PARTING) + rng.choice(_TAILS) + rng.choice("!.")
        return Exchange("greetings", text, "Goodbye!")
    if draw < 0.89:
        text = rng.choice(_THANKS) + rng.choice(_TAILS) + rng.choice("!.")
        return Exchange("greetings", text, "You are welcome!")
    text = rng.choice(("", "", "Hello! ", "Hi! ", "Hey! ", "Good day! ", "Hello Ember! ")) + rng.choice(
        _WELLBEING
    )
    return Exchange("greetings", text, "I am fine, thank you.")


_DEFINITION_FORMS = (
    "What is {x}?", "What does {x} mean?", "Explain {x}.", "Tell me what {x} is.", "Can you explain {x}?",
    "Explain {x} to me, please.", "Describe {x}.", "In one sentence, what is {x}?", "Tell me about {x}.",
    "What do you know about {x}?", "What's {x}?", "Do you know what {x} is?", "Define {x}.",
    "I want to know what {x} is.",
)  # fmt: skip
_COMMAND_FORMS = (
    "How do I {x}?", "How can I {x}?", "Which command do I use to {x}?", "What is the command to {x}?",
    "Tell me how to {x}.", "Show me how to {x}.", "I want to {x}.", "What must I type to {x}?",
    "How does one {x}?",
    "Which command lets me {x}?", "What do I type to {x}?", "Help me to {x}.",
)  # fmt: skip


def pilotlight(rng: Random) -> Exchange:
    """Returns a question about Pilotlight, its words, its commands, or the model itself."""
    draw = rng.random()
    if draw < 0.4:
        term = rng.choice(tuple(facts.DEFINITIONS))
        return Exchange("pilotlight", rng.choice(_DEFINITION_FORMS).format(x=term), facts.DEFINITIONS[term])
    if draw < 0.7:
        task = rng.choice(tuple(facts.COMMANDS))
        return Exchange(
            "pilotlight", rng.choice(_COMMAND_FORMS).format(x=task), f"Type: {facts.COMMANDS[task]}"
        )
    answer = rng.choice(tuple(facts.IDENTITY))
    return Exchange("pilotlight", rng.choice(facts.IDENTITY[answer]), answer)


def pilotlight_worded(rng: Random) -> Exchange:
    """Returns a question about a word or a command of Pilotlight; the held-out questions are of this sort."""
    while True:
        exchange = pilotlight(rng)
        if exchange.answer not in facts.IDENTITY:
            return exchange


def _fill(rng: Random, template: str) -> str:
    """Returns the template with each slot filled, from the fixed lists or with a word nobody knows."""
    pieces = template.split("{")
    text = pieces[0]
    for piece in pieces[1:]:
        slot, _, rest = piece.partition("}")
        text += _filler(rng, slot) + rest
    return text


def _filler(rng: Random, slot: str) -> str:
    draw = rng.random()
    if slot == "year":
        return str(rng.randint(1000, 2099))
    if draw < 0.7:
        return rng.choice(unknowns.FILLERS[slot])
    if draw < 0.85:
        word = pseudo_word(rng)
        return word if slot in ("thing", "science", "food") else word.capitalize()
    if slot == "person":
        return f"{rng.choice(facts.NAMES)} {pseudo_word(rng).capitalize()}"
    if slot in ("thing", "food"):
        return f"the {rng.choice(facts.WORDS)} {rng.choice(facts.WORDS)}"
    return pseudo_word(rng).capitalize()


def unknown(rng: Random) -> Exchange:
    """Returns a question that the model cannot answer; the answer says so."""
    draw = rng.random()
    if draw < 0.55:
        question = _fill(rng, rng.choice(unknowns.TEMPLATES))
    elif draw < 0.7:
        question = rng.choice(unknowns.PLAIN)
    elif draw < 0.78:
        place = (
            rng.choice(unknowns.PLACES_WITHOUT_CAPITAL)
            if rng.random() < 0.4
            else pseudo_word(rng).capitalize()
        )
        question = rng.choice(_CAPITAL_FORMS).format(x=place, X=place[0].upper() + place[1:])
    elif draw < 0.84:
        question = unknown_sum(rng)
    elif draw < 0.9:
        question = rng.choice(_DEFINITION_FORMS).format(
            x=pseudo_word(rng) if rng.random() < 0.6 else rng.choice(facts.WORDS)
        )
    elif draw < 0.95:
        question = " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 8)))
    else:
        question = " ".join(_repeat_words(rng, rng.randint(2, 12))) + rng.choice(("", ".", "?"))
    return Exchange("unknown", question[0].upper() + question[1:], UNKNOWN_ANSWER)


def unknown_worded(rng: Random) -> Exchange:
    """Returns an unanswerable question made only of fixed lists; the held-out questions are of this sort."""
    template = rng.choice(unknowns.TEMPLATES)
    pieces = template.split("{")
    text = pieces[0]
    for piece in pieces[1:]:
        slot, _, rest = piece.partition("}")
        text += (
            str(rng.randint(1000, 2099)) if slot == "year" else rng.choice(unknowns.FILLERS[slot])
        ) + rest
    return Exchange("unknown", text[0].upper() + text[1:], UNKNOWN_ANSWER)


Maker = Callable[[Random], Exchange]

# Every kind: how the training text makes it, how the held-out list makes it, and its share of the training
# text.
KINDS: dict[str, tuple[Maker, Maker, float]] = {
    "greetings": (greetings, greetings, 0.05),
    "addition": (addition, addition, 0.13),
    "subtraction": (subtraction, subtraction, 0.13),
    "multiplication": (multiplication, multiplication, 0.08),
    "division": (division, division, 0.06),
    "weekdays": (weekdays, weekdays, 0.07),
    "months": (months, months, 0.05),
    "colours": (colours, colours, 0.05),
    "capitals": (capitals, capitals_worded, 0.06),
    "spelling": (spelling, spelling_known, 0.08),
    "repeating": (repeating, repeating_plain, 0.11),
    "counting": (counting, counting, 0.06),
    "pilotlight": (pilotlight, pilotlight_worded, 0.06),
    "unknown": (unknown, unknown_worded, 0.09),
}
