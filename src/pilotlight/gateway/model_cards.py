"""The models an endpoint answers to, in OpenAI's form, without waking a worker (`vllm-worker.md` §4.8, §6.1).

Pure. Called by the data path for `GET /v1/models`.
"""

from __future__ import annotations

from pilotlight.domain.endpoint import Endpoint
from pilotlight.engines.flags import clean_value
from pilotlight.engines.flags.lora import lora_modules


def model_cards(endpoint: Endpoint) -> list[dict[str, object]]:
    """One card for each name: those of the model, the first of them first, then those of its adapters."""
    revision = endpoint.revision
    try:
        adapters = lora_modules(clean_value(revision.env.get("LORA_MODULES")) or "[]")
    except ValueError:
        # No worker of this endpoint can start, and deploying it says why.
        adapters = ()
    names = endpoint.served_names
    cards: dict[str, tuple[str, str | None]] = dict.fromkeys(names, (revision.model, None))
    cards |= {adapter.name: (adapter.path, names[0] if names else None) for adapter in adapters}
    return [
        {
            "id": name,
            "object": "model",
            "created": revision.created_ms // 1000,
            "owned_by": "pilotlight",
            "root": root,
            "parent": parent,
        }
        for name, (root, parent) in cards.items()
    ]
