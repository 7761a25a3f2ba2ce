"""The house: parts in one order, files without circles, folders and files of a size to read.

Imports are read from the syntax tree: those inside functions and `__main__` blocks count too.
"""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A file imports only from its own part and from those that stand before it.
ORDER = [
    "progress", "sources", "files", "jobs", "redact", "stats", "page", "objectives", "config",
    "entry", "constraints", "data", "kernels", "model", "logprobs", "agreement", "training",
    "evaluation", "construct", "rounds", "experiments",
]  # fmt: skip
ENTRY_POINTS = ("train.py", "evaluate.py")
HYDRA_ONLY_IN = {
    *("entry.py", "construct/__main__.py", "training/reference/__main__.py"),
    "rounds/__main__.py",
    "training/launch/sweep_names.py",  # a callback, which Hydra calls
}
OPERATORS = ("iopo.kernels", "iopo.model.attention")  # their arguments are given from outside
TORCH_FREE = (
    *("constraints", "progress.py", "sources.py", "files.py", "redact.py", "stats.py", "page.py"),
)


def source_files() -> dict[str, Path]:
    """Module name -> file, of the package and the entry points."""
    files = {name.removesuffix(".py"): ROOT / name for name in ENTRY_POINTS}
    for path in (ROOT / "iopo").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_names(path: Path) -> set[str]:
    """Dotted names of everything that the file imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def file_graph() -> dict[str, set[str]]:
    """Module -> modules of the project whose file it imports."""
    files = source_files()
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names = imported_names(path)
        # `from iopo.a import b` is the file of iopo.a.b if there is one, else that of iopo.a
        targets = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = {t for t in targets if t in files and t not in ("iopo", module)}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules that cannot be put in an order; empty if all can."""
    left = dict(graph)
    while ready := [m for m, targets in left.items() if not targets & left.keys()]:
        for module in ready:
            del left[module]
    return sorted(left)


def part_of(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def test_no_two_files_import_each_other():
    assert circle_in(file_graph()) == []


def test_the_search_for_circles_finds_one():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_imports_go_up_the_order_of_parts_only():
    wrong = [
        f"{module} imports {target}"
        for module, targets in file_graph().items()
        for target in targets
        if module not in ("train", "evaluate", "iopo") and part_of(target) > part_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_an_experiment():
    wrong = [
        module
        for module, targets in file_graph().items()
        if not module.startswith("iopo.experiments")
        and any(target.startswith("iopo.experiments") for target in targets)
    ]
    assert not wrong, wrong


def test_hydra_stays_in_the_entry_points():
    package = ROOT / "iopo"
    for path in package.rglob("*.py"):
        if str(path.relative_to(package)) not in HYDRA_ONLY_IN:
            roots = {name.split(".")[0] for name in imported_names(path)}
            assert not roots & {"hydra", "omegaconf"}, path


def test_parts_that_need_no_torch():
    for module, path in source_files().items():
        part = path.relative_to(ROOT / "iopo").parts[0] if module.startswith("iopo") else ""
        if part in TORCH_FREE:
            roots = {name.split(".")[0] for name in imported_names(path)}
            assert not roots & {"torch", "transformers"}, path


def test_functions_take_what_they_need():
    """Few arguments, and sections of the config instead of the whole of it."""
    many, whole = [], []
    for module, path in source_files().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [a.arg for a in taken if a.arg not in ("self", "cls")]
                if len(names) > 6 and not module.startswith(OPERATORS):
                    many.append(f"{module}.{node.name}")
                if any(a.annotation and "TrainConfig" in ast.unparse(a.annotation) for a in taken):
                    whole.append(f"{module}.{node.name}")
    assert not many
    assert len(whole) <= 15, whole


def test_files_and_folders_are_of_a_size_to_read():
    files = [p for folder in ("iopo", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
    full = Counter(str(p.parent.relative_to(ROOT)) for p in files if p.name != "__init__.py")
    assert {folder: count for folder, count in full.items() if count > 16} == {}
