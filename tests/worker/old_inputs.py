"""The inputs that the older public worker documented, from `data/old_inputs.json`, with the model filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parent / "data" / "old_inputs.json"


@dataclass(frozen=True)
class OldInput:
    """One published input.

    Attributes:
        name: What it was published as.
        style: `native`, `openai` or `route`.
        input: The job's `input`.
    """

    name: str
    style: str
    input: dict[str, Any]

    @property
    def streamed(self) -> bool:
        body = self.input.get("openai_input") or self.input.get("body") or self.input
        return body.get("stream") is True


def load_old_inputs(model: str) -> list[OldInput]:
    """All of them; where they name a model, or say that the reader should, it is `model`."""
    data = json.loads(_FILE.read_text())
    named = set(data["models"])

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: model if key == "model" and text in named else fill(text) for key, text in value.items()
            }
        return [fill(one) for one in value] if isinstance(value, list) else value

    return [OldInput(entry["name"], entry["style"], fill(entry["input"])) for entry in data["inputs"]]
