import ast
from pathlib import Path

import pytest

import sagl.settings

FILES = sorted(Path(sagl.settings.__file__).parent.glob("*.py"))


def undocumented_fields(source):
    """Yield the annotated fields of classes that no string follows."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not documented:
                    yield f"{node.name}.{ast.unparse(field.target)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_field_has_a_docstring_for_its_help(file):
    assert list(undocumented_fields(file.read_text())) == []


def test_a_field_without_a_docstring_would_be_found():
    source = 'class S:\n    a: int\n    """help"""\n    b: int\n    c: int\n    """help"""\n    d: int = 1\n'
    assert list(undocumented_fields(source)) == ["S.b", "S.d"]
