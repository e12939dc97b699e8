"""The house stays small, and its rooms import one way. `make size` prints the figures."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "tiny_audio"
# A room may import from itself and from those before it. Files without a room are shared tools.
ROOMS = ["asr", "shared", "evaluation", "training", "commands"]
# Code lines: neither blank nor comment nor docstring. The aims are in docs/architecture.md. There
# is room for a change of some dozens of lines; a release should use less of it, not more.
READING_PATH, EVERYTHING, LONGEST_FILE, LONGEST_FUNCTION = 4386, 7935, 350, 60
PASSIVE = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")


def code_lines(path: Path) -> set[int]:
    """The numbers of a file's code lines."""
    text = path.read_text()
    passive = {getattr(tokenize, name) for name in PASSIVE}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in passive:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return lines


def functions(path: Path, lines: set[int]) -> Iterator[tuple[str, int]]:
    """The name of each function with its number of code lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = lines.intersection(range(node.lineno, (node.end_lineno or 0) + 1))
            yield f"{path.relative_to(ROOT)}: {node.name}", len(own)


def sizes() -> dict[Path, set[int]]:
    """The code lines of every file but tests."""
    files = [path for name in ("src", "bench", "demo") for path in (ROOT / name).rglob("*.py")]
    return {path: code_lines(path) for path in sorted(files)}


def reading_path(size: dict[Path, set[int]]) -> int:
    """Code lines of what one reads to understand the product."""
    rooms = (PACKAGE / "asr", PACKAGE / "training")
    return sum(len(lines) for path, lines in size.items() if path.parent in rooms)


def test_the_code_stays_small():
    size = sizes()
    longest = {name: n for path, lines in size.items() for name, n in functions(path, lines)}
    advice = "remove lines; if that is not possible, raise the limit in this commit and say why"
    assert reading_path(size) <= READING_PATH, advice
    assert sum(map(len, size.values())) <= EVERYTHING, advice
    assert not [str(path) for path, lines in size.items() if len(lines) > LONGEST_FILE]
    assert not [(name, n) for name, n in longest.items() if n > LONGEST_FUNCTION]


def room_of(path: Path) -> str:
    """The room that a file of the package is in."""
    return path.parent.name if path.parent != PACKAGE else "shared"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_rooms_import_one_way(path):
    if path == PACKAGE / "__init__.py":  # shows what the package offers
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            imported = base.joinpath(*(node.module or "__init__").split("."))
            allowed = ROOMS[: 1 + ROOMS.index(room_of(path))]
            assert room_of(imported) in allowed, f"{path.name} imports {node.module}"


def main() -> None:
    """Print the sizes beside their limits."""
    size = sizes()
    for path, lines in size.items():
        print(f"{len(lines):6}  {path.relative_to(ROOT)}")
    most = sorted(((n, name) for p, lines in size.items() for name, n in functions(p, lines)))
    print(f"{max(map(len, size.values())):6}  the longest file, at most {LONGEST_FILE}")
    print(f"{most[-1][0]:6}  the longest function, at most {LONGEST_FUNCTION} ({most[-1][1]})")
    print(f"{reading_path(size):6}  asr/ and training/, at most {READING_PATH}")
    print(f"{sum(map(len, size.values())):6}  all but tests, at most {EVERYTHING}")


if __name__ == "__main__":
    main()
