"""The explorer page: a static folder that opens from disk, offline."""

from retrograd.report.page import MethodView, QueryView, RankedImage, write_report

__all__ = ["MethodView", "QueryView", "RankedImage", "write_report"]
