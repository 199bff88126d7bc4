"""All error messages in one table, so that their wording is read and changed as a whole.

After a change of a message: python -m tests.test_messages
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests/messages.txt"
ERRORS = ("UserError", "ArgumentTypeError", "TableNeeded")


def template(node):
    """A string of the source, with `{}` for values; "" for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "{}") + (template(node.right) or "{}")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"\{[^}]*\}", "{}", template(node.func.value))
    return ""


def messages():
    """Sorted templates of the messages of `ERRORS` in the product."""
    templates = set()
    for path in [*ROOT.glob("*.py"), *(path for folder in ("dataset", "libs", "loss", "networks", "utils")
                                      for path in ROOT.glob(f"{folder}/**/*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in ERRORS:
                    templates.add(template(node.args[0]))
    return sorted(templates - {""})


def test_error_messages_are_those_of_the_table():
    assert TABLE.read_text().splitlines() == messages(), "after a change: python -m tests.test_messages"


def test_error_messages_name_what_was_expected_and_found():
    """Values may stand for a part: {}, found {}."""
    assert [text for text in messages() if not re.search("expected|^-*{}|: {}", text)] == []


if __name__ == "__main__":
    TABLE.write_text("\n".join(messages()) + "\n")
