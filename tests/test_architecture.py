import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sagl

PACKAGE = Path(sagl.__file__).parent
LAYERS = [
    {"cli"},
    {"commands"},
    {"callbacks", "evaluation", "analysis"},
    {"modules", "sampling"},
    {"guidance", "samplers", "metrics", "data", "models"},
    {"diffusion", "utils"},
    {"settings"},
    {"errors", "shapes"},
]
"""From the top down; rooms of one layer never see each other."""
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
WITHOUT_LIGHTNING = (
    "diffusion",
    "models",
    "guidance",
    "samplers",
    "metrics",
    "analysis",
    "sampling",
    "settings",
    "shapes",
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(module):
    """Of sagl.guidance.sag: guidance."""
    return module.split(".")[1] if module.count(".") else None


def imported(source, module):
    """Full names of all that a module imports, at any depth, by statement or by name in a string."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ([f"sagl.{alias.name}" for alias in node.names] if base == "sagl" else [base])
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"sagl(\.\w+)+", node.value)
        ):
            yield node.value


def wrong_imports(source, module):
    """Imports of a module that go up, sideways, or to a room that nobody knows."""
    room = room_of(module)
    for name in imported(source, module):
        other = room_of(name) if name.split(".")[0] == "sagl" else room
        if other not in (None, room) and LEVEL.get(other, -1) <= LEVEL[room]:
            yield f"{module} imports {name}"


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def all_imports(room):
    """Top-level names that a room's files import."""
    files = [path for path in FILES if room_of(module_name(path)) == room]
    return {name.split(".")[0] for path in files for name in imported(path.read_text(), module_name(path))}


def test_every_room_has_its_place_in_the_layers():
    assert {room_of(module_name(path)) for path in FILES} <= set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down_only(path):
    assert list(wrong_imports(path.read_text(), module_name(path))) == []


@pytest.mark.parametrize("room", WITHOUT_LIGHTNING)
def test_the_functional_core_does_not_import_lightning(room):
    assert not {"lightning", "pytorch_lightning", "lightning_fabric"} & all_imports(room)


def test_settings_import_the_standard_library_only():
    assert all_imports("settings") <= set(sys.stdlib_module_names) | {"sagl"}


@pytest.mark.parametrize("room", ["diffusion", "shapes"])
def test_the_process_and_the_shapes_import_torch_and_hardly_anything_else(room):
    allowed = {"torch", "sagl"} | ({"numpy"} if room == "diffusion" else set())
    assert all_imports(room) - set(sys.stdlib_module_names) <= allowed


def test_package_files_are_empty_but_for_the_first():
    assert [module_name(path) for path in FILES if path.name == "__init__.py" and path.read_text().strip()] == []


@pytest.mark.parametrize("module", ["sagl", "sagl.cli", "sagl.settings.network", "sagl.settings.guidance"])
def test_the_command_line_and_the_settings_load_no_torch(module):
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=PACKAGE.parent, check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sagl.samplers.ddim", "from sagl.guidance.base import with_guidance"),
        ("sagl.samplers.ddim", "import sagl.guidance.sag as sag"),
        ("sagl.samplers.ddim", "def late():\n    from sagl.guidance import build_sag"),
        ("sagl.samplers.ddim", "from ..guidance.sag import build_sag"),
        ("sagl.samplers.ddim", "from .. import guidance"),
        ("sagl.samplers.ddim", "import_module('sagl.guidance.sag')"),
        ("sagl.models.adm", "from sagl.guidance.base import Guidance"),
        ("sagl.models.adm", "from sagl import samplers"),
        ("sagl.settings.network", "from sagl.utils.files import sha256"),
        ("sagl.shapes", "from sagl.errors import UserError"),
        ("sagl.guidance.sag", "from sagl.sampling.pipeline import build_pipeline"),
        ("sagl.guidance.sag", "from sagl.data.folder import FolderImageSource"),
        ("sagl.sampling.pipeline", "from sagl.commands.sample import main"),
        ("sagl.analysis.objects", "from sagl.callbacks.ema import EMA"),
        ("sagl.modules.diffusion_module", "from sagl.callbacks.ema import EMA"),
        ("sagl.commands.fit", "from sagl.cli import main"),
        ("sagl.commands.fit", "from sagl.unheard_of import thing"),
    ],
)
def test_an_import_that_points_up_or_aside_would_be_found(module, source):
    assert len(list(wrong_imports(source, module))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sagl.samplers.ddim", "from sagl.samplers.ddpm import ddpm"),
        ("sagl.samplers.ddim", "from .ddpm import ddpm"),
        ("sagl.samplers.ddim", "from sagl.diffusion.process import maybe_clip"),
        ("sagl.sampling.pipeline", "from sagl.guidance.sag import build_sag\nfrom sagl.samplers.ddim import ddim"),
        ("sagl.cli", "TABLE = {'fit': 'sagl.commands.fit'}"),
        ("sagl.commands.fit", "import torch\nfrom sagl import __version__ as v, sampling"),
        ("sagl.modules.diffusion_module", "from sagl.utils.images import to_float"),
        ("sagl.guidance.sag", '"""See `sagl.samplers.ddim`."""'),
    ],
)
def test_an_import_that_points_down_is_allowed(module, source):
    assert [found for found in wrong_imports(source, module) if "__version__" not in found] == []
