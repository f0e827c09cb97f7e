"""What can go wrong on a GPU: `WHERE:WHAT` in FAKE_GPU_FAULTS, where WHAT is dies, hangs, lost (the device) or fails.

WHERE is part of a test's name, with this module as pytest's plugin (`-p fake_faults`), or of `/OP/CASE/DTYPE` of a benchmark.
`compute-sanitizer` and `ncu` know one WHAT, refuses.
"""

import os
import signal
import time

import pytest


def happen(where):
    for fault in filter(None, os.environ.get("FAKE_GPU_FAULTS", "").split(",")):
        place, what = fault.rsplit(":", 1)
        if place not in where:
            continue
        if what == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "hangs":
            time.sleep(3600)
        elif what == "lost":
            import fake_cuda

            fake_cuda.lost = True
        elif what == "fails":
            raise RuntimeError(f"{where} fails")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.timeout(15))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    happen(item.nodeid)
