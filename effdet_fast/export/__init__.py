"""Trained detectors as files for other runtimes."""

from effdet_fast.export.export_model import export_model

__all__ = ["export_model"]
