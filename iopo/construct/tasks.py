"""The bank of bare tasks (short English instructions without constraints), and their layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from iopo.files import sha256_text

BANK = Path(__file__).with_name("tasks.txt")
INPUT_MARK = " # Inputs: "
Row = dict[str, Any]


def digest(*texts: str) -> str:
    """Twelve hex digits that name these texts: the ids of quads, tasks, seeds and prompts."""
    return sha256_text("\x1f".join(texts))[:12]


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction without constraints, with the text it works on where it has one."""

    description: str
    input: str | None = None

    @property
    def line(self) -> str:
        return self.description + ("" if self.input is None else INPUT_MARK + self.input)

    @classmethod
    def of_line(cls, line: str) -> Self:
        description, _, text = line.partition(INPUT_MARK)
        return cls(description, text or None)

    @property
    def digest(self) -> str:
        """Of the task's line."""
        return digest(self.line)

    @property
    def key(self) -> str:
        """The digest that decides the split: that of the input, where tasks share one."""
        return digest(self.description if self.input is None else self.input)


def read_tasks(path: Path = BANK) -> list[Task]:
    """One task a line, `description` or `description # Inputs: text`.

    Raises ValueError on an empty or repeated line: a repeated task could reach both splits.
    """
    tasks: list[Task] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        first = lines.index(line) + 1
        if not line.strip() or first < number:
            fault = f"repeats line {first}" if line.strip() else "is empty"
            raise ValueError(f"{path}:{number}: {fault}; expected one task a line, each once")
        tasks.append(Task.of_line(line))
    return tasks


def instruction(task: Task, constraint_lines: list[str]) -> str:
    """The instruction in TRACE's layout: description, numbered constraints, `# Inputs:`.

    >>> print(instruction(Task("Summarize.", "A text."), ["Use no commas.", "Be brief."]))
    Summarize.
    1. Use no commas.
    2. Be brief.
    # Inputs:
    A text.
    """
    lines = [task.description]
    lines += [f"{n}. {line}" for n, line in enumerate(constraint_lines, start=1)]
    if task.input is not None:
        lines += ["# Inputs:", task.input]
    return "\n".join(lines)


def quad_row(
    task: Task, c1: list[Row], y1: str, c2: list[Row], y2: str, system: str | None = None
) -> Row:
    """The first keys of a quad's row. c1, c2: constraints as {"kind", "params", "text"}."""
    x1, x2 = (instruction(task, [constraint["text"] for constraint in c]) for c in (c1, c2))
    row = {"id": digest(x1, y1, x2, y2), "task": task.line, "x1": x1, "y1": y1, "x2": x2, "y2": y2}
    if system is not None:
        row["system"] = system
    return row | {"c1": c1, "c2": c2}
