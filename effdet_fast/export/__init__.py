"""Export of trained detectors to files for other runtimes."""

from effdet_fast.export.to_file import export_model

__all__ = ["export_model"]
