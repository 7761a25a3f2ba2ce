"""Data flows one way: a module imports only what stands above it (docs/method.md, README)."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "config", "constraints", "data", "model", "kernels", "logprobs", "reference", "objectives",
    "training", "evaluation", "construct",
]  # fmt: skip
HYDRA_ONLY_IN = {"train.py", "evaluate.py", "construct/__main__.py", "training/fill.py"}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
        tree.body.pop()  # run as a program, a module is an entry point, above all others
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.ImportFrom) and node.level > 1:  # one dot stays in its folder
            raise AssertionError(f"{path}:{node.lineno}: leaves its folder; write the full name")
    return names


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    if parts[0] != "iopo" or len(parts) == 1 or parts[1] not in ORDER:
        return None
    return ORDER.index(parts[1])


def test_modules_import_only_what_stands_above_them():
    wrong = []
    for path in sorted((ROOT / "iopo").rglob("*.py")):
        own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in imports_of(path):
            other = layer_of(name)
            if own is not None and other is not None and other > own:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_hydra_stays_in_the_entry_points():
    wrong = []
    for path in sorted((ROOT / "iopo").rglob("*.py")):
        if str(path.relative_to(ROOT / "iopo")) in HYDRA_ONLY_IN:
            continue
        roots = {name.split(".")[0] for name in imports_of(path)}
        wrong += [f"{path.relative_to(ROOT)}: {r}" for r in roots & {"hydra", "omegaconf"}]
    assert not wrong, wrong


def test_constraints_do_not_need_torch():
    for path in sorted((ROOT / "iopo" / "constraints").glob("*.py")):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"torch", "transformers"}, path


def test_no_file_is_too_long_to_read():
    folders = ("iopo", "tests", "benchmarks")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
