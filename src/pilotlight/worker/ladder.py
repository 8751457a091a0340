"""From which rung of the warm ladder an engine is started, and why from no better one. Pure.

Best first: forked from a launcher, started so that it imports once, and vLLM's own entry point, which always
works. Whoever starts the engine asks for the rung, tries it, and steps down with the reason when it refuses.
"""

from __future__ import annotations

from typing import Final

from pilotlight.domain.worker import Failure, Rung

_DESCENT: Final = (Rung.LAUNCHABLE, Rung.COLD, Rung.PLAIN)

_REPEATABLE: Final = frozenset({"engine_exited", "missing_module", "engine_stuck"})
"""Failures that may be those of the rung. The others name a mistake that would be the same on every rung."""

REASON_CHARS_MAX: Final = 300
"""Of each reason; they go into a record of the store."""


class Ladder:
    """The rungs of one start, from the best that can be tried downwards.

    Args:
        replaced: An engine command replaces vLLM.
        known: The engine has a manifest.
        launcher: A launcher is there to be asked.
        method: How the user wants vLLM to start its processes (`VLLM_WORKER_MULTIPROC_METHOD`); "" = no wish.
    """

    def __init__(self, *, replaced: bool, known: bool, launcher: bool, method: str = "") -> None:
        self._rung = Rung.LAUNCHABLE
        self._reasons: list[str] = []
        if replaced:
            self.fall("PILOTLIGHT_ENGINE_COMMAND replaces vLLM")
        elif not known:
            self.fall("the engine has no manifest that says what it is")
        elif method not in {"", "fork"}:
            self.fall(f"VLLM_WORKER_MULTIPROC_METHOD is {method}")
        elif not launcher:
            self.step_down("the platform keeps no launcher for it")

    @property
    def rung(self) -> Rung:
        """The one to try, or the one that was reached."""
        return self._rung

    @property
    def note(self) -> str:
        """Why it is not a better one; "" for the best."""
        return "; ".join(self._reasons)

    def step_down(self, reason: str) -> None:
        """The next rung, because this one refused."""
        self._reasons.append(reason[:REASON_CHARS_MAX])
        self._rung = _DESCENT[min(_DESCENT.index(self._rung) + 1, len(_DESCENT) - 1)]

    def fall(self, reason: str) -> None:
        """The lowest rung, because something cannot be trusted."""
        self._reasons.append(reason[:REASON_CHARS_MAX])
        self._rung = Rung.PLAIN

    def may_repeat(self, failure: Failure, *, loading: bool) -> bool:
        """Whether a start that failed on this rung may be repeated on the lowest.

        Args:
            failure: Why it failed.
            loading: It had come as far as the model. An engine that was killed then has mostly been killed
                for lack of memory, of which a start from the lowest rung takes more.
        """
        if self._rung is Rung.PLAIN:
            return False
        return failure.kind in _REPEATABLE or (failure.kind == "killed" and not loading)
