"""Every command that the README and the manual show is one its script takes."""

import importlib
import pathlib
import re
import shlex

import pytest
from absl import flags

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
COMMAND = re.compile(r"python (scripts/\w+\.py[^\n#&`|:]*)")
COMMANDS = sorted(
    {
        command.strip()
        for page in PAGES
        for command in COMMAND.findall(re.sub(r"\s*\\\n\s*", " ", page.read_text()))
        if "<slug>" not in command
    }
)


def test_there_are_commands():
    assert any("train.py" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_its_script_takes(command, monkeypatch):
    """The script reads all its flags, and would begin; it is stopped there."""

    class Read(Exception):
        pass

    def stop(values, argv, doc):
        flags.DEFINE_bool("help", False, "", flag_values=values)
        assert values(argv) == argv[:1]
        raise Read

    script, *arguments = shlex.split(command)
    module = importlib.import_module(f"narrows.scripts.{pathlib.Path(script).stem}")
    monkeypatch.setattr("narrows.scripts.command.parse", stop)
    with pytest.raises(Read):
        module.main([script, *arguments])
