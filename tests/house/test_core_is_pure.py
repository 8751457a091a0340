"""Core and domain decide and describe; they never look at a clock, at chance, or at the world.

The import contracts in pyproject.toml hold the modules out; here are the calls that need no such import.
"""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "pilotlight"
MODULES = sorted([*(SOURCE / "core").rglob("*.py"), *(SOURCE / "domain").rglob("*.py")])
BANNED_MODULES = {
    *(
        "asyncio",
        "http",
        "io",
        "logging",
        "os",
        "pathlib",
        "random",
        "secrets",
        "socket",
        "sqlite3",
        "subprocess",
    ),
    *("sys", "threading", "time", "aiohttp", "httpx", "structlog"),
}
BANNED_CALLS = {"open", "print", "input", "eval", "exec", "__import__"}
BANNED_METHODS = {"now", "utcnow", "today", "uuid1", "uuid4", "getenv"}


def test_there_is_a_core():
    assert MODULES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_pure(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"line {getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), f"{where}: core does not wait"
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.partition(".")[0] for name in names} & BANNED_MODULES, f"{where}: {names}"
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in BANNED_CALLS, f"{where}: {node.func.id}()"
            elif isinstance(node.func, ast.Attribute):
                assert node.func.attr not in BANNED_METHODS, f"{where}: {node.func.attr}()"
