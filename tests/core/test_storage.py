"""Where models lie on a volume: vllm-worker.md §4.9 (storage) and §5.2."""

from __future__ import annotations

import pytest

from pilotlight.core.storage import chosen_cache, storage_environment

VOLUME = {
    "HF_HOME": "/runpod-volume/huggingface-cache/hub",
    "HF_HUB_CACHE": "/runpod-volume/huggingface-cache/hub",
    "HUGGINGFACE_HUB_CACHE": "/runpod-volume/huggingface-cache/hub",
    "HF_DATASETS_CACHE": "/runpod-volume/huggingface-cache/datasets",
    "VLLM_CACHE_ROOT": "/runpod-volume/compile-cache/vllm",
    "TORCHINDUCTOR_CACHE_DIR": "/runpod-volume/compile-cache/torchinductor",
}


@pytest.mark.parametrize(
    ("env", "present", "expected"),
    [
        ({}, False, {}),
        ({}, True, VOLUME),
        ({"BASE_PATH": "/runpod-volume"}, True, VOLUME),
        ({"BASE_PATH": "/runpod-volume/"}, False, {}),
        ({"BASE_PATH": " "}, False, {}),
        ({"BASE_PATH": "/d/"}, False, {name: path.replace("/runpod-volume", "/d") for name, path in VOLUME.items()}),
        ({"BASE_PATH": "/"}, False, {name: path.replace("/runpod-volume", "") for name, path in VOLUME.items()}),
        (
            {"BASE_PATH": "/d", "HF_HOME": "/h", "HF_DATASETS_CACHE": "/s", "VLLM_CACHE_ROOT": "/v"},
            False,
            {"TORCHINDUCTOR_CACHE_DIR": "/d/compile-cache/torchinductor"},
        ),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, False, {"HF_HUB_CACHE": "/old", "HUGGINGFACE_HUB_CACHE": "/old"}),
        (
            {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"},
            False,
            {"HUGGINGFACE_HUB_CACHE": "/new"},
        ),
        ({"HF_HUB_ENABLE_HF_TRANSFER": "1"}, False, {"HF_XET_HIGH_PERFORMANCE": "1"}),
        ({"HF_HUB_ENABLE_HF_TRANSFER": "0"}, False, {}),
        ({"BASE_PATH": "None", "HF_HOME": "null", "HUGGING_FACE_HUB_TOKEN": "None"}, False, {}),
        ({"BASE_PATH": "None", "HF_HOME": "None", "HF_HUB_CACHE": "~"}, True, VOLUME),
        (
            {"HF_HOME": "/runpod-volume/huggingface-cache/hub"},
            True,
            {name: path for name, path in VOLUME.items() if name != "HF_HOME"},
        ),
        (
            {"HF_HOME": "/d/huggingface-cache/hub"},
            False,
            {"HF_HUB_CACHE": "/d/huggingface-cache/hub", "HUGGINGFACE_HUB_CACHE": "/d/huggingface-cache/hub"},
        ),
        ({"HF_HOME": "/d/huggingface-cache/hub", "HF_HUB_CACHE": "/e"}, False, {"HUGGINGFACE_HUB_CACHE": "/e"}),
        ({"HF_HUB_ENABLE_HF_TRANSFER": "1", "HF_XET_HIGH_PERFORMANCE": "0"}, False, {}),
        ({"HUGGING_FACE_HUB_TOKEN": "t", "HF_TOKEN": ""}, False, {"HF_TOKEN": "t"}),
        ({"HUGGING_FACE_HUB_TOKEN": "t", "HF_TOKEN": "u"}, False, {}),
    ],
)  # fmt: skip
def test_storage(env: dict[str, str], present: bool, expected: dict[str, str]) -> None:
    assert storage_environment(env, volume_present=present) == expected


@pytest.mark.parametrize(
    ("home", "cache"),
    [
        ("/h", "/h/hub"),
        ("/d/huggingface-cache/hub", "/d/huggingface-cache/hub"),
        ("None", None),
    ],
)
def test_the_cache_that_a_home_means(home: str, cache: str | None) -> None:
    """§5.2: on existing volumes the library's home is the hub cache itself."""
    assert chosen_cache({"HF_HOME": home}, volume_present=False).get("HF_HUB_CACHE") == cache
