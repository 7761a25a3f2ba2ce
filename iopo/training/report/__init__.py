"""Pages of a run and of a sweep, written from the files of run folders."""

from iopo.training.report.run import write_report, write_summary
from iopo.training.report.sweep import collect, table, write_page

__all__ = ["collect", "table", "write_page", "write_report", "write_summary"]
