import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sagl

PACKAGE = Path(sagl.__file__).parent
LAYERS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"configuration"},
    {"training", "playground"},
    {"callbacks", "evaluation", "analysis"},
    {"modules", "sampling"},
    {"guidance", "samplers", "metrics", "data", "models"},
    {"diffusion", "utils"},
    {"settings"},
    {"errors", "shapes"},
]
"""From the top down; packages of one layer do not import each other."""
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
WITHOUT_LIGHTNING = ("diffusion", "models", "guidance", "samplers", "metrics", "sampling", "settings", "shapes")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def package_of(module):
    """Return the package of a module: sagl.guidance.sag -> guidance."""
    return module.split(".")[1] if module.count(".") else None


def imported(source, module):
    """Return the full names of a module's imports at any depth, by statement or by name in a string."""
    parents = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"sagl.{alias.name}" for alias in node.names if alias.name != "__version__"]
            yield from (names if base == "sagl" else [base])
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"sagl(\.\w+)+", node.value)
        ):
            yield node.value


def wrong_imports(source, module):
    """Return the imports of a module from higher, equal or unknown layers."""
    package = package_of(module)
    for name in imported(source, module):
        other = package_of(name) if name.split(".")[0] == "sagl" else package
        if other not in (None, package) and LEVEL.get(other, -1) <= LEVEL[package]:
            yield f"{module} imports {name}"


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def all_imports(package):
    """Return the top-level names that a package imports."""
    files = [path for path in FILES if package_of(module_name(path)) == package]
    return {name.split(".")[0] for path in files for name in imported(path.read_text(), module_name(path))}


def test_every_package_is_in_a_layer():
    assert {package_of(module_name(path)) for path in FILES} <= set(LEVEL)


def test_imports_point_down_only():
    assert [found for path in FILES for found in wrong_imports(path.read_text(), module_name(path))] == []


@pytest.mark.parametrize("package", WITHOUT_LIGHTNING)
def test_the_functional_core_does_not_import_lightning(package):
    assert not {"lightning", "pytorch_lightning", "lightning_fabric"} & all_imports(package)


def test_settings_import_the_standard_library_only():
    assert all_imports("settings") <= set(sys.stdlib_module_names) | {"sagl"}


@pytest.mark.parametrize("package", ["diffusion", "shapes"])
def test_diffusion_and_shapes_import_little_besides_torch(package):
    allowed = {"torch", "sagl"} | ({"numpy"} if package == "diffusion" else set())
    assert all_imports(package) - set(sys.stdlib_module_names) <= allowed


def test_package_files_are_empty_except_the_first():
    assert [module_name(path) for path in FILES if path.name == "__init__.py" and path.read_text().strip()] == []


IMPORT = """
import sys
from importlib import import_module

for module in sys.argv[1:]:
    import_module(module)
    if "torch" in sys.modules:
        sys.exit(f"{module} loads torch")
"""


def test_the_command_line_settings_names_of_networks_and_downloads_load_no_torch():
    modules = ["sagl", "sagl.cli", "sagl.settings.network", "sagl.settings.guidance"]
    command = [sys.executable, "-c", IMPORT, *modules, "sagl.models.zoo", "sagl.utils.download"]
    process = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sagl.samplers.ddim", "from sagl.guidance.base import with_guidance"),
        ("sagl.samplers.ddim", "def late():\n    from sagl.guidance import build_sag"),
        ("sagl.samplers.ddim", "from ..guidance.sag import build_sag"),
        ("sagl.samplers.ddim", "from .. import guidance"),
        ("sagl.samplers.ddim", "import_module('sagl.guidance.sag')"),
        ("sagl.models.adm", "from sagl import samplers"),
        ("sagl.settings.network", "from sagl.utils.files import sha256"),
        ("sagl.shapes", "from sagl.errors import UserError"),
        ("sagl.guidance.sag", "from sagl.data.folder import FolderImageSource"),
        ("sagl.modules.diffusion_module", "from sagl.callbacks.ema import EMA"),
        ("sagl.commands.fit", "from sagl.cli import main"),
        ("sagl.commands.fit", "from sagl.unheard_of import thing"),
    ],
)
def test_an_import_from_a_higher_or_equal_layer_is_detected(module, source):
    assert len(list(wrong_imports(source, module))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sagl.samplers.ddim", "from .ddpm import ddpm"),
        ("sagl.samplers.ddim", "from sagl.diffusion.process import add_noise"),
        ("sagl.sampling.pipeline", "from sagl.guidance.sag import build_sag\nfrom sagl.samplers.ddim import ddim"),
        ("sagl.cli", "TABLE = {'fit': 'sagl.commands.fit'}"),
        ("sagl.commands.fit", "import torch\nfrom sagl import __version__ as v, sampling"),
        ("sagl.guidance.sag", '"""See `sagl.samplers.ddim`."""'),
    ],
)
def test_an_import_that_points_down_is_allowed(module, source):
    assert list(wrong_imports(source, module)) == []
