"""Runs the self-tests on an emulated library, in a process of its own: exit status 0 if every op is right, 1 if not.

python -m tests.emulation.check LIBRARY [OP ...]
"""

import sys
from pathlib import Path

import torch

from effdet_fast.self_tests import SELF_TESTS, TOLERANCE
from tests.emulation.backend import emulated


def main(library: str, *names: str) -> int:
    try:
        with emulated(Path(library), thread_order_seed=3):
            errors = {name: SELF_TESTS[name](torch.device("cpu")) for name in names or SELF_TESTS}
    except (AssertionError, RuntimeError) as error:
        print(error)
        return 1
    print(errors)
    return int(not all(error <= TOLERANCE for error in errors.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
