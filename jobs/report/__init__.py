"""What a run tells: metrics.jsonl, a progress bar or plain lines, TensorBoard events, plots. No torch, no Ray."""

from shoal.jobs.report.journal import Record, read_records
from shoal.jobs.report.run import RunReport

__all__ = ["Record", "RunReport", "read_records"]
