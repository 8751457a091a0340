"""What the notes in docs/decisions say is true of the project."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = ROOT / "docs" / "decisions"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_dependency_has_its_reason_and_no_reason_is_left_over():
    text = (DECISIONS / "0002-dependencies.md").read_text()
    reasons = dict(re.findall(r"^\| ([a-z][\w-]*) \| (.+) \|$", text, re.MULTILINE))
    reasons.pop("package")
    extras = PROJECT["project"].get("optional-dependencies", {}).values()
    groups = [PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"].values(), *extras]
    names = {Requirement(entry).name for group in groups for entry in group}
    assert reasons.keys() == names


def test_notes_are_numbered_without_gaps_and_say_where_they_stand():
    notes = sorted(DECISIONS.glob("*.md"))
    assert [int(note.name[:4]) for note in notes] == list(range(1, len(notes) + 1))
    for note in notes:
        text = note.read_text()
        assert text.startswith(f"# {note.name[:4]}: "), note.name
        assert "\nStatus: " in text, note.name
