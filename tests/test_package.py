"""The package: what is installed, what imports what, how long a file may be."""

import ast
import functools
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = {"data", "ib", "models", "optim", "parallel", "scripts"}
OUTSIDE = {"build", "docs", "notebooks", "results", "tests"}

# Whom a room may import beside itself. Of `parallel`, models may take the layout's
# constraint hooks, the ring and the pipeline alone. A path below a room, as
# `models/kernels`, has its own line.
MAY_IMPORT = {
    "data": set(),
    "ib": set(),
    "models/kernels": set(),
    "parallel": set(),
    "models": {
        "ib",
        "models/kernels",
        "parallel/layout",
        "parallel/pipeline",
        "parallel/pipeline_table",
        "parallel/ring_attention",
        "parallel/schedules",
        "parallel/sequence",
    },
    "optim": {"parallel"},
    "scripts": ROOMS | {"models/kernels"},
}


def packages():
    folders = {
        path.parent.relative_to(ROOT)
        for path in ROOT.rglob("__init__.py")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    return {f for f in folders if f.parts[:1] == () or f.parts[0] not in OUTSIDE}


FILES = sorted(path for folder in packages() for path in (ROOT / folder).glob("*.py"))


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: pathlib.Path, module: ast.Module | None = None):
    """Absolute dotted names of all that a file imports, relative ones resolved."""
    here = ("narrows", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(module or tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            source = ".".join((*base, *filter(None, [node.module])))
            # `from .. import ib` imports a room by the name it binds
            yield from (f"{source}.{alias.name}" for alias in node.names)


def room_of(path: str) -> str:
    """The longest line of MAY_IMPORT that a slashed path lies under."""
    found = [room for room in MAY_IMPORT if f"{path}/".startswith(f"{room}/")]
    return max(found, key=len) if found else path


def rooms_imported(path: pathlib.Path, module: ast.Module | None = None):
    """Slashed paths of the library that a file imports, but for its own room."""
    mine = room_of(path.relative_to(ROOT).as_posix())
    for name in imports(path, module):
        if name.startswith("narrows."):
            target = "/".join(name.split(".")[1:])
            if room_of(target) != mine:
                yield target


def named(path):
    return path.relative_to(ROOT).as_posix()


def test_every_folder_of_modules_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = listed["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(
        ".".join(("narrows", *folder.parts)) for folder in packages()
    )


def test_every_room_has_its_arrows():
    rooms = {folder.parts[0] for folder in packages() if folder.parts}
    assert rooms == ROOMS
    assert {room.split("/")[0] for room in MAY_IMPORT} == ROOMS


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_one_way(path):
    room = room_of(path.relative_to(ROOT).as_posix())
    for target in rooms_imported(path):
        allowed = MAY_IMPORT.get(room, set())
        assert any(f"{target}/".startswith(f"{a}/") for a in allowed), (
            f"{named(path)} imports {target}, but {room} may import "
            f"{sorted(allowed) or 'no other room'}"
        )


@pytest.mark.parametrize("path", FILES, ids=named)
def test_library_files_import_relatively_and_never_by_a_bare_name(path):
    """`import models` from the root would make a second copy of every class."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            assert name.split(".")[0] not in ROOMS, f"{named(path)} imports {name}"
            if not named(path).startswith("scripts/"):
                assert name.split(".")[0] != "narrows", f"{named(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_hold_one_idea(path):
    longest = 700 if "kernels" in path.parts else 400
    assert len(path.read_text().splitlines()) <= longest


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_library_reads_no_flag_and_no_environment(path):
    if named(path).startswith("scripts/"):
        return
    for name in imports(path):
        assert not name.startswith("absl"), f"{named(path)} imports {name}"
        assert name not in ("os.environ", "os.getenv"), f"{named(path)} imports {name}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            read = f"{node.value.id}.{node.attr}"
            assert read not in ("os.environ", "os.getenv"), f"{named(path)}: {read}"


ALONE = """
import sys
import narrows
assert "jax" not in sys.modules, "import narrows imports jax"
import narrows.data.text, narrows.models.language_model, narrows.parallel.step
import narrows.optim.table
copies = set(sys.argv[1:]) & sys.modules.keys()
assert not copies, copies
"""


def test_the_root_is_light_and_rooms_have_one_name():
    """A fresh interpreter: no jax after `import narrows`, no room by its bare name."""
    command = [sys.executable, "-c", ALONE, *sorted(ROOMS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_arrows_are_read_right():
    """The reader itself, on the ways in which an import can be written."""
    path = ROOT / "models" / "imagined.py"
    source = (
        "from ..ib import infonce\nfrom .. import parallel\nfrom .kernels import fft\n"
        "from . import waists\nimport narrows.optim.table\ndef f():\n"
        "    from ..parallel.layout import constrain\n"
    )
    found = sorted(rooms_imported(path, ast.parse(source)))
    assert found == [
        "ib/infonce",
        "models/kernels/fft",
        "optim/table",
        "parallel",
        "parallel/layout/constrain",
    ]
