"""`python -m iopo.training.report FOLDER`: write the page of a run, or of a sweep, again."""

import sys
from pathlib import Path

from iopo.training.report import run, sweep


def main(arguments: list[str]) -> None:
    """Write the page of a run folder, or of a folder of run folders (a sweep)."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.exit("usage: python -m iopo.training.report RUN_OR_SWEEP_FOLDER")
    folder = Path(arguments[0])
    if (folder / "metrics.jsonl").exists():
        print(run.write_report(folder))
        return
    try:
        print(sweep.write_page(folder))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
