"""Installing an engine: the decisions, then whole installations of a tiny stand-in by the real pip.

The stand-in is a pair of wheels called torch and vllm, made here, with just enough in them for the probe.
"""

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pilotlight.engines import install
from pilotlight.engines.environments import Reporter, SetupError, content_key, exclusive
from pilotlight.engines.install import Installer, Machine, Standing, Step, decide_engine, plan_steps
from pilotlight.engines.manifest import MANIFEST_NAME, load_manifest

PLAIN = Machine(
    system="linux",
    architecture="x86_64",
    python=(3, 11),
    cpu_flags=frozenset({"avx2", "fma"}),
    nvidia_devices=(),
    nvidia_listed=(),
    nvidia_driver=False,
)
NO_LIMIT = 180


def machine(**changes) -> Machine:
    return dataclasses.replace(PLAIN, **changes)


# --- decisions


@pytest.mark.parametrize(
    ("facts", "requested", "kind", "reason"),
    [
        (machine(), "auto", "cpu", "no NVIDIA GPU found"),
        (
            machine(architecture="aarch64", cpu_flags=frozenset({"asimd"})),
            "auto",
            "cpu",
            "no NVIDIA GPU found",
        ),
        (machine(cpu_flags=frozenset()), "auto", "cpu", "no NVIDIA GPU found"),
        (machine(nvidia_devices=("/dev/nvidia0",)), "auto", "cuda", "1 NVIDIA GPU found"),
        (machine(nvidia_listed=("GPU 0: A", "GPU 1: B")), "auto", "cuda", "2 NVIDIA GPUs found"),
        (machine(nvidia_driver=True), "auto", "cpu", "a container without GPUs?"),
        (machine(nvidia_devices=("/dev/nvidia0",)), "cpu", "cpu", "asked for"),
        (machine(), "cuda", "cuda", "asked for; no NVIDIA GPU found"),
    ],
)
def test_the_engine_follows_from_the_machine(facts, requested, kind, reason):
    choice = decide_engine(facts, requested)
    assert choice.recipe.kind == kind
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        (machine(system="darwin", architecture="arm64"), "no build for darwin on arm64"),
        (machine(architecture="riscv64"), "no build for linux on riscv64"),
        (machine(python=(3, 10)), r"Python 3\.10 is too old"),
        (machine(cpu_flags=frozenset({"sse4_2"})), "AVX2"),
    ],
)
def test_a_machine_without_a_build_is_refused_with_the_reason(facts, complaint):
    with pytest.raises(SetupError, match=complaint):
        decide_engine(facts, "auto")


def test_a_gpu_machine_needs_no_avx2():
    facts = machine(cpu_flags=frozenset({"sse4_2"}), nvidia_devices=("/dev/nvidia0",))
    assert decide_engine(facts, "auto").recipe.kind == "cuda"


@pytest.mark.parametrize(
    ("standing", "steps"),
    [
        (Standing(complete=False, described=False, linked=False), (Step.BUILD, Step.PROBE, Step.LINK)),
        (Standing(complete=False, described=False, linked=True), (Step.BUILD, Step.PROBE, Step.LINK)),
        (Standing(complete=True, described=False, linked=True), (Step.PROBE,)),
        (Standing(complete=True, described=True, linked=False), (Step.LINK,)),
        (Standing(complete=True, described=True, linked=True), ()),
    ],
)
def test_only_what_is_missing_is_done(standing, steps):
    assert plan_steps(standing) == steps


def test_torch_is_looked_for_where_pip_looks_and_then_at_its_makers():
    (_, first), (_, second) = install.torch_sources(None)
    assert first == ()
    assert second == ("--index-url", "https://download.pytorch.org/whl/cpu")


def test_an_index_set_by_hand_is_the_only_one():
    assert [arguments for _, arguments in install.torch_sources("file:///mirror")] == [
        ("--index-url", "file:///mirror")
    ]


def test_the_key_changes_with_any_lock(tmp_path):
    recipe = dataclasses.replace(install.RECIPES["cpu"], locks=("a.lock", "b.lock"))
    (tmp_path / "a.lock").write_text("x")
    (tmp_path / "b.lock").write_text("y")
    before = install.environment_key(recipe, tmp_path)
    (tmp_path / "b.lock").write_text("z")
    assert install.environment_key(recipe, tmp_path) != before
    assert content_key("ab", "c") != content_key("a", "bc")


def test_the_engine_is_looked_for_beside_the_environment_that_runs_us(tmp_path, monkeypatch):
    sibling = tmp_path / ".venv-engine"
    sibling.mkdir()
    assert install.default_engine_home(tmp_path / ".venv") == sibling
    assert install.default_engine_home(tmp_path / "elsewhere" / ".venv").name == ".venv-engine"
    monkeypatch.setattr(install, "_checkout", lambda: None)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    home = install.default_engine_home(tmp_path / "elsewhere" / ".venv")
    assert home == tmp_path / "data" / "pilotlight" / "engines" / "vllm"


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"PILOTLIGHT_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/pilotlight"),
        ({"HOME": "/c"}, "/c/.cache/pilotlight"),
    ],
)
def test_the_cache_folder_can_be_moved(monkeypatch, variables, folder):
    for name in ("PILOTLIGHT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert install.cache_folder() == Path(folder)


# --- whole installations


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> str:
    """Write a wheel and return its line for a lock."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-{version}-py3-none-any.whl").write_bytes(data.getvalue())
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(data.getvalue()).hexdigest()}\n"


VLLM = {
    "vllm/__init__.py": "__version__ = '0.32.0'\n",
    "vllm/_version.py": "__version__ = version = '0.32.0'\n",
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/launchers/__init__.py": "",
    "vllm/entrypoints/launchers/cli_args.py": (
        "import argparse\n"
        "def make_arg_parser(parser):\n"
        "    parser.add_argument('--max-model-len', type=int)\n"
        "    parser.add_argument('--enforce-eager', action=argparse.BooleanOptionalAction)\n"
        "    parser.add_argument('--disable-log-stats', action='store_true')\n"
        "    parser.add_argument('--middleware', action='append')\n"
        "    parser.add_argument('--served-model-name', nargs='+')\n"
        "    parser.add_argument('--dtype', choices=['auto', 'bfloat16'])\n"
        "    print('talk on stdout must not spoil the manifest')\n"
    ),
    "vllm/utils/__init__.py": "",
    "vllm/utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser\n",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/models.py": (
        "class ModelRegistry:\n"
        "    def get_supported_archs():\n"
        "        return {'QwenForCausalLM', 'LlamaForCausalLM'}\n"
    ),
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """An installer of the stand-in, cut off from every index of this machine but a folder of its own."""

    def make(torch_version: str = "2.13.0+cpu") -> Installer:
        torch = {
            "torch/__init__.py": "from .version import __version__\nfrom . import version\n",
            "torch/version.py": f"__version__ = '{torch_version}'\ncuda = None\n",
        }
        locks = tmp_path / "locks"
        locks.mkdir()
        (locks / "torch-cpu.lock").write_text(make_wheel(tmp_path / "index", "torch", "2.13.0+cpu", torch))
        (locks / "engine-cpu.lock").write_text(make_wheel(tmp_path / "index", "vllm", "0.32.0", VLLM))
        recipe = dataclasses.replace(install.RECIPES["cpu"], disk_bytes=50_000_000)
        return Installer(
            recipe=recipe,
            link=tmp_path / "checkout" / ".venv-engine",
            cache=tmp_path / "cache",
            reporter=Reporter(io.StringIO()),
            key=install.environment_key(recipe, locks),
            locks=locks,
        )

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv(install.TORCH_INDEX_VARIABLE, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return make


@pytest.mark.timeout(NO_LIMIT)
def test_an_installation_from_nothing_to_ready_and_every_way_back(stand_in):
    """1. From nothing: built, probed, stamped, linked, downloads removed.

    2. Again: nothing to do. 3. The manifest is lost: only the probe runs. 4. The link is a real environment of
    former days: replaced. 5. It was never stamped: built anew. 6. Its Python is gone: to be built anew.
    """
    installer = stand_in()
    assert installer.install() == (Step.BUILD, Step.PROBE, Step.LINK)
    assert installer.link.resolve() == installer.home.resolve()
    assert not installer.wheels.exists()
    manifest = load_manifest(installer.link)
    assert (manifest.version, manifest.torch_version) == ("0.32.0", "2.13.0+cpu")
    assert {name: flag.kind for name, flag in manifest.flags.items()} == {
        "MAX_MODEL_LEN": "value",
        "ENFORCE_EAGER": "pair",
        "DISABLE_LOG_STATS": "switch",
        "MIDDLEWARE": "repeat",
        "SERVED_MODEL_NAME": "value",
        "DTYPE": "value",
    }
    assert manifest.flags["SERVED_MODEL_NAME"].multi
    assert manifest.flags["DTYPE"].choices == ("auto", "bfloat16")
    assert manifest.architectures == {"LlamaForCausalLM", "QwenForCausalLM"}

    assert installer.install() == ()

    (installer.home / MANIFEST_NAME).unlink()
    assert installer.install() == (Step.PROBE,)

    installer.link.unlink()
    installer.link.mkdir()
    (installer.link / "pyvenv.cfg").touch()
    assert installer.install() == (Step.LINK,)
    assert installer.link.is_symlink()
    assert [path.name for path in installer.link.parent.iterdir()] == [".venv-engine"]

    (installer.home / install.STAMP_NAME).unlink()
    assert installer.install()[0] is Step.BUILD
    assert load_manifest(installer.link) == manifest

    (installer.home / "bin" / "python").unlink()
    assert Step.BUILD in plan_steps(installer.look())


@pytest.mark.timeout(NO_LIMIT)
def test_vllm_is_never_put_beside_a_build_for_cuda(stand_in):
    """A mirror serves a CUDA build under the CPU build's name: the installation ends before vLLM is there."""
    installer = stand_in(torch_version="2.13.0+cu130")
    with pytest.raises(SetupError, match=r"torch 2\.13\.0\+cu130 is no CPU build"):
        installer.install()
    assert not list(installer.home.glob("lib/python3*/site-packages/vllm"))
    assert not installer.link.exists()
    assert plan_steps(installer.look())[0] is Step.BUILD


@pytest.mark.timeout(NO_LIMIT)
def test_torch_comes_from_the_index_set_by_hand(stand_in, tmp_path, monkeypatch):
    installer = stand_in()
    (wheel,) = (tmp_path / "index").glob("torch-*.whl")
    page = tmp_path / "simple" / "torch" / "index.html"
    page.parent.mkdir(parents=True)
    wheel = wheel.rename(page.parent / wheel.name)
    page.write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    with pytest.raises(SetupError, match=r"no CPU build of torch found") as caught:
        installer.install()
    assert "pip's configured index" in str(caught.value)
    assert "download.pytorch.org" in str(caught.value)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nothing").as_uri())
    monkeypatch.setenv(install.TORCH_INDEX_VARIABLE, (tmp_path / "simple").as_uri())
    assert installer.install()[0] is Step.BUILD


@pytest.mark.timeout(NO_LIMIT)
def test_a_wheel_with_another_hash_is_refused(stand_in, tmp_path):
    installer = stand_in()
    make_wheel(tmp_path / "index", "vllm", "0.32.0", {**VLLM, "vllm/more.py": ""})
    with pytest.raises(SetupError, match=r"HASHES[\s\S]*the downloads are kept"):
        installer.install()


def test_too_little_disk_is_said_before_anything_is_done(stand_in):
    installer = stand_in()
    greedy = dataclasses.replace(installer, recipe=dataclasses.replace(installer.recipe, disk_bytes=10**18))
    with pytest.raises(SetupError, match=r"needs 1000000000\.0 GB of disk.*PILOTLIGHT_CACHE"):
        greedy.install()
    assert not installer.home.exists()


def test_a_folder_that_is_no_environment_is_left_alone(stand_in):
    installer = stand_in()
    installer.link.mkdir(parents=True)
    (installer.link / "precious").touch()
    with pytest.raises(SetupError, match="is no virtual environment"):
        installer._link()
    assert (installer.link / "precious").exists()
    assert [path.name for path in installer.link.parent.iterdir()] == [".venv-engine"]


def test_a_second_run_waits_for_the_first_and_can_be_interrupted(tmp_path):
    """The command line, waiting on a lock that we hold, is ended by SIGTERM and leaves nothing behind."""
    choice = decide_engine(install.look_at_machine(), "cpu")
    installer = Installer(
        choice.recipe,
        tmp_path / "x",
        tmp_path,
        Reporter(io.StringIO()),
        install.environment_key(choice.recipe),
    )
    script = Path(install.__file__)
    with (
        exclusive(installer.home.with_name(f"{installer.home.name}.lock"), installer.reporter),
        subprocess.Popen(
            [sys.executable, script, "--engine", "cpu", "--into", installer.link],
            env={**os.environ, "PILOTLIGHT_CACHE": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        ) as waiting,
    ):
        for line in waiting.stderr:
            if f"another set-up (process {os.getpid()}) is at work here" in line:
                waiting.send_signal(signal.SIGTERM)
        assert waiting.wait() == 130
    assert not installer.link.exists()
    assert not installer.home.exists()


def test_check_changes_nothing_and_prints_one_object(tmp_path):
    answer = subprocess.run(
        [sys.executable, install.__file__, "--check", "--json", "--engine", "cpu", "--into", tmp_path / "x"],
        env={**os.environ, "PILOTLIGHT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    result = json.loads(answer.stdout)
    assert (result["status"], result["engine"], result["steps"]) == (
        "incomplete",
        "cpu",
        ["build", "probe", "link"],
    )
    assert "3.5 GB of disk" in answer.stderr
    assert not list(tmp_path.iterdir())
