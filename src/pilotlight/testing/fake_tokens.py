"""The vocabulary of the stand-in engine: from a token its word can be told, also by another process. Pure.

A word of a prompt is one token for each seven bytes of it. The words of an answer are numbered, because the
prompt says what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_PIECE: Final = 7
_GOES_ON: Final = 1 << 60
_WORD: Final = 1 << 61
_ANSWER: Final = 1 << 62


def prompt_tokens(text: str) -> list[int]:
    """The tokens of a prompt."""
    tokens = []
    for word in text.split():
        data = word.encode()
        for start in range(0, len(data), _PIECE):
            piece = int.from_bytes(data[start : start + _PIECE], "big")
            tokens.append(_WORD | (_GOES_ON if start else 0) | piece)
    return tokens


def answer_tokens(first: int, count: int) -> list[int]:
    """The tokens of so many words of an answer.

    Args:
        first: How many words come before these.
        count: How many.
    """
    return [_ANSWER | position for position in range(first, first + count)]


def read_prompt(tokens: Sequence[int]) -> tuple[str, int]:
    """The text of a prompt, and how many words of its answer follow it.

    Args:
        tokens: Those of this vocabulary, in which a beginning of the answer may come last; others are words
            of their own, their number.

    Raises:
        ValueError: What follows is no beginning of an answer.
    """
    words: list[bytes] = []
    done = 0
    for token in tokens:
        if token & _ANSWER:
            if token != _ANSWER | done:
                raise ValueError(f"word {token ^ _ANSWER} of the answer where word {done} comes next")
            done += 1
        elif done:
            raise ValueError("a word of the prompt behind the answer")
        elif token & _WORD:
            piece = token & (_GOES_ON - 1)
            data = piece.to_bytes((piece.bit_length() + 7) // 8, "big")
            if token & _GOES_ON and words:
                words[-1] += data
            else:
                words.append(data)
        else:
            words.append(str(token).encode())
    return b" ".join(words).decode("utf-8", "replace"), done
