"""`effdet-fast doctor`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    from effdet_fast.cli import doctor

    return doctor.main()
