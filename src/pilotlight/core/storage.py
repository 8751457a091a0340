"""Where models lie on a volume: the cache layout of `vllm-worker.md` §5.2 as environment variables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pilotlight.core.variables import clean_value, parse_boolean

VOLUME: Final = "/runpod-volume"
"""Where containers find their network volume; `BASE_PATH` where that is not set."""

_HUB_CACHES: Final = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_HOME_IN_LAYOUT: Final = "/huggingface-cache/hub"
_COMPILE_CACHES: Final = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}
"""What engines compile for a model, in minutes, and find again at their next start."""


def storage_environment(env: Mapping[str, str], *, volume_present: bool) -> dict[str, str]:
    """The variables to set for a program so that it keeps models where the contract says.

    * `BASE_PATH` makes the layout `huggingface-cache/hub` and `huggingface-cache/datasets` below it. Consoles
      send its default whether there is a volume or not, so `/runpod-volume` counts only where it exists.
    * What engines compile is kept there, too, in `compile-cache`.
    * What is set already stays; the hub cache has two names, of which `HF_HUB_CACHE` wins, and both are set.
    * A `HF_HOME` of this layout is the hub cache itself, also where it is the only variable.
    * `HF_HUB_ENABLE_HF_TRANSFER=1` is `HF_XET_HIGH_PERFORMANCE=1` now, `HUGGING_FACE_HUB_TOKEN` `HF_TOKEN`.

    Args:
        env: A program's variables; empty ones and `None` count as unset.
        volume_present: `/runpod-volume` exists.

    Returns:
        Only what is to be set; nothing where the hub library's own defaults do.
    """
    given = {name: text for name, raw in env.items() if (text := clean_value(raw)) is not None}
    base = given.get("BASE_PATH", VOLUME).rstrip("/") or "/"
    made: dict[str, str] = {}
    hub = next((given[name] for name in _HUB_CACHES if name in given), None)
    if hub is None and given.get("HF_HOME", "").rstrip("/").endswith(_HOME_IN_LAYOUT):
        hub = given["HF_HOME"]
    if base != VOLUME or volume_present:
        folder = f"{base.rstrip('/')}/huggingface-cache"
        made["HF_DATASETS_CACHE"] = f"{folder}/datasets"
        if "HF_HOME" not in given:
            # Existing volumes have it so: the library's home is the hub cache itself.
            made["HF_HOME"] = f"{base.rstrip('/')}{_HOME_IN_LAYOUT}"
            hub = hub or made["HF_HOME"]
        made |= compile_caches(env)
    if hub is not None:
        made |= dict.fromkeys(_HUB_CACHES, hub)
    if parse_boolean(given.get("HF_HUB_ENABLE_HF_TRANSFER", "")):
        made["HF_XET_HIGH_PERFORMANCE"] = "1"
    if "HUGGING_FACE_HUB_TOKEN" in given:
        made["HF_TOKEN"] = given["HUGGING_FACE_HUB_TOKEN"]
    return {name: text for name, text in made.items() if name == "HUGGINGFACE_HUB_CACHE" or name not in given}


def compile_caches(env: Mapping[str, str]) -> dict[str, str]:
    """Where engines would keep what they compile if there is a volume: folders by variable."""
    base = (clean_value(env.get("BASE_PATH")) or VOLUME).rstrip("/")
    return {name: f"{base}/compile-cache/{folder}" for name, folder in _COMPILE_CACHES.items()}


CACHE_VARIABLES: Final = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
"""What of the gateway's environment says where it keeps models; worker processes inherit it."""


def chosen_cache(env: Mapping[str, str], *, volume_present: bool) -> dict[str, str]:
    """Where an endpoint's own variables keep models; goes before what a worker process inherits.

    Args:
        env: The endpoint's variables.
        volume_present: `/runpod-volume` exists.
    """
    made = storage_environment(env, volume_present=volume_present)
    home = clean_value(env.get("HF_HOME"))
    said = "HF_HUB_CACHE" in made or any(clean_value(env.get(name)) for name in _HUB_CACHES)
    if home and not said:
        # Else an inherited HF_HUB_CACHE would go before the endpoint's own home.
        made["HF_HUB_CACHE"] = f"{home.rstrip('/')}/hub"
    return {name: made[name] for name in CACHE_VARIABLES if name in made}
