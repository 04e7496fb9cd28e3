"""The explorer page, a static folder that opens from disk, offline; and pictures of games."""

from retrograd.report.game_figures import branch_tree_figure, phase_portrait, spectrum_figure
from retrograd.report.page import MethodView, QueryView, RankedImage, write_report

__all__ = [
    "MethodView",
    "QueryView",
    "RankedImage",
    "branch_tree_figure",
    "phase_portrait",
    "spectrum_figure",
    "write_report",
]
