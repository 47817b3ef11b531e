import ast
from pathlib import Path

import pytest

import sagl.settings

FILES = sorted(Path(sagl.settings.__file__).parent.glob("*.py"))


def undocumented_fields(tree):
    """Annotated fields of classes that no string follows."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not said:
                    yield f"{node.name}.{ast.unparse(field.target)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_field_says_what_it_is(file):
    assert list(undocumented_fields(ast.parse(file.read_text()))) == []


def test_a_field_without_a_docstring_would_be_found():
    source = 'class S:\n    a: int\n    """said"""\n    b: int\n    c: int\n    """said"""\n    d: int = 1\n'
    assert list(undocumented_fields(ast.parse(source))) == ["S.b", "S.d"]
