"""What the README promises: its commands exist, the files it names exist, and its sessions print what it shows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL_LINES = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
COMMANDS = [shlex.split(line) for line in SHELL_LINES if line.startswith("hybridvl ")]
SESSIONS = [text.removeprefix("$ ").split("\n", 1) for _, text in BLOCKS if text.startswith("$ hybridvl ")]


def hybridvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from hybridvl.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_blocks_are_found() -> None:
    assert {command[1] for command in COMMANDS} >= {"plan", "fit", "test", "generate", "doctor"}
    assert [line.split("#")[0].strip() for line in SHELL_LINES if line.startswith("make ")] == ["make fit", "make test"]
    assert len(SESSIONS) == 1


@pytest.mark.parametrize("name", sorted({command[1] for command in COMMANDS}))
def test_command_and_its_options_exist(name: str) -> None:
    done = hybridvl(name, "--help")
    assert done.returncode == 0, done.stderr
    used = {word for command in COMMANDS if command[1] == name for word in command if word.startswith("--")}
    # Options below model.net are values of the recipe: their names are checked by the tests of the command line.
    assert {option for option in used if f"{option} " not in done.stdout} <= {"--model.net.mixers.swa.window"}


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session[0])
def test_session_prints_what_is_shown(session: list[str]) -> None:
    command, shown = session
    done = hybridvl(*shlex.split(command)[1:])
    assert done.returncode == 2
    assert done.stdout + done.stderr == shown


def test_named_files_exist() -> None:
    paths = set(re.findall(r"\b(?:recipes|ablations|docs)/[\w/-]+\.\w+", README))
    assert {"recipes/digits.yaml", "ablations/claims.yaml", "docs/mixers.md"} <= paths
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []


def test_the_verdicts_on_the_claims_are_those_that_were_drawn() -> None:
    claims = json.loads((ROOT / "docs" / "benchmarks" / "claims.json").read_text())["claims"]
    number = dict(enumerate(("no", "one", "two", "three", "four")))
    counts = Counter(claim["verdict"] for claim in claims)
    told = (
        f"Of {number[len(claims)]} claims about hybrids, {number[counts['supported']]} are supported in miniature "
        f"and {number[counts['undecided']]} undecided"
    )
    assert counts.keys() == {"supported", "undecided"}
    assert told in " ".join(README.split())
    page = (ROOT / "docs" / "benchmarks" / "claims.md").read_text()
    assert [(claim["text"], claim["verdict"]) for claim in claims] == re.findall(
        r"^\| (\S.*?) \| \*\*(\w+)\*\*", page, re.M
    )
