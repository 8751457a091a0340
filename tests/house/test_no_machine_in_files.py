"""No file of the project knows the machine it was written on: neither its folders nor its package mirrors."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = re.compile(r"(?<![\w.{}~-])/(?:work|root|home/[a-z]\w*|Users/\w+)/")
INDEXES = re.compile(r"https?://[\w.:@-]*(?:pypi|devpi|nexus|artifactory|simple)[\w.:-]*", re.IGNORECASE)
OPTIONS = re.compile(r"--(?:extra-)?index-url[= ]+(?:file|http)|--find-links[= ]+[/\w]+/|--trusted-host[= ]")
PUBLIC = ("https://pypi.org", "https://download.pytorch.org")


def project_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    # The contracts describe other people's containers, where such folders are part of the interface.
    names = [name for name in listed.split("\0") if name and not name.startswith("docs/contract/")]
    return [path for name in names if (path := ROOT / name).is_file() and not path.is_symlink()]


def findings(text: str) -> list[str]:
    found = [match[0] for pattern in (FOLDERS, OPTIONS) for match in pattern.finditer(text)]
    return found + [match[0] for match in INDEXES.finditer(text) if not match[0].startswith(PUBLIC)]


def test_no_file_names_this_machine():
    bad = {}
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if found := findings(text):
            bad[str(path.relative_to(ROOT))] = sorted(set(found))
    assert not bad


@pytest.mark.parametrize(
    "text",
    [
        "see /ho" + "me/alice/notes",
        "pip install --index-url " + "http://mirror.local/x y",
        "https:" + "//pypi.mirror.example/simple",
    ],
)
def test_the_search_finds_what_it_is_for(text):
    assert findings(text)


@pytest.mark.parametrize(
    "text", ["https://pypi.org/simple", "src/work/x", "/v2/root/x", "~/.cache/pilotlight"]
)
def test_the_search_leaves_the_rest_alone(text):
    assert not findings(text)
