"""The README says what is: its commands and options exist, its table of reason codes is the program's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from flows.cli import app
from medmamba.errors import REASON_CODES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def commands() -> Iterator[str]:
    """Every `medmamba ...` line of a code block or in backticks, comments cut off."""
    for block in re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        yield from (line.split("#")[0] for line in block.splitlines() if line.startswith("medmamba "))
    yield from (text for text in re.findall(r"`(medmamba [^`]+)`", README) if not text.startswith("medmamba["))


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_and_options_exist(line: str) -> None:
    command = typer.main.get_command(app)
    words = line.split()[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"{line!r}: no such command"
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_reason_codes_are_all_told() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE)) == REASON_CODES
