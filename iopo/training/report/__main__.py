"""`python -m iopo.training.report FOLDER`: write the page of a run, or of a sweep, again.

RUN/curves.png and RUN/report.html, or SWEEP/sweep.html, sweep.png and sweep.csv.
"""

import sys
from pathlib import Path

from iopo.training.report import run, sweep

if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m iopo.training.report RUN_OR_SWEEP_FOLDER")
    folder = Path(sys.argv[1])
    is_run = (folder / "metrics.jsonl").exists()
    try:
        print(run.write_report(folder) if is_run else sweep.write_page(folder))
    except ValueError as error:
        sys.exit(str(error))
