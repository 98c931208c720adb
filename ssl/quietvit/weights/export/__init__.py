"""Writing a model for others: `export_model`, in the forms of the TARGETS table."""

from quietvit.weights.export.all_targets import TARGETS, find_target
from quietvit.weights.export.card import Run, ScoreRow, read_run
from quietvit.weights.export.export_model import Report, export_model
from quietvit.weights.export.target import ExportOptions, Opened, Parity, Size, Target

__all__ = [
    "TARGETS",
    "ExportOptions",
    "Opened",
    "Parity",
    "Report",
    "Run",
    "ScoreRow",
    "Size",
    "Target",
    "export_model",
    "find_target",
    "read_run",
]
