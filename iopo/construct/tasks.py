"""The bank of bare tasks: short English instructions without constraints."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

BANK = Path(__file__).with_name("tasks.txt")
INPUT_MARK = " # Inputs: "


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction without constraints, with the text it works on where it has one."""

    description: str
    input: str | None = None

    @property
    def line(self) -> str:
        return (
            self.description if self.input is None else self.description + INPUT_MARK + self.input
        )

    @property
    def digest(self) -> str:
        """Twelve hex digits of the task's line."""
        return hashlib.sha256(self.line.encode()).hexdigest()[:12]

    @property
    def key(self) -> str:
        """Twelve hex digits that decide the split: those of the input, where tasks share one."""
        text = self.description if self.input is None else self.input
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_tasks(path: Path = BANK) -> list[Task]:
    """One task a line, `description` or `description # Inputs: text`.

    Raises ValueError on an empty or repeated line: a repeated task could reach both splits.
    """
    tasks: list[Task] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            raise ValueError(f"{path}:{number}: empty line; expected one task a line")
        if line in seen:
            raise ValueError(
                f"{path}:{number}: repeats line {seen[line]}; each task must be unique"
            )
        seen[line] = number
        description, _, text = line.partition(INPUT_MARK)
        tasks.append(Task(description, text or None))
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
