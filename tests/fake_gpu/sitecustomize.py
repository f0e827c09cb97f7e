"""A GPU that is none, to rehearse `make gpu`: with this folder on PYTHONPATH, "cuda" means the CPU in every Python process.

FAKE_GPU_FAULTS names what goes wrong, as `WHERE:WHAT` separated by commas, see `fake_faults`; FAKE_GPU_HIDES packages that are
not to be found outside of PYTHONPATH.
"""

import importlib.util
import os
import sys
import sysconfig


class AfterImport:
    """Calls `change(module)` once a module is imported whose name begins with `name`."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(self.name) or (self.name == "torch" and name != "torch"):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


class Hidden:
    """Packages that the rehearsed machine does not have; those that are carried there lie elsewhere."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name not in self.names:
            return None
        installed = sysconfig.get_paths()["purelib"]
        elsewhere = [folder for folder in sys.path if folder != installed]
        if spec := importlib.machinery.PathFinder.find_spec(name, elsewhere):
            return spec
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def fake_cuda(torch):
    import fake_cuda

    fake_cuda.install(torch)


def fake_clock(timing):
    timing.LEAST_FLUSHED = 1 << 10


def fake_cases(module):
    import fake_cases

    module.cases = fake_cases.cases_of(module.OP)


sys.meta_path[:0] = [
    AfterImport("torch", fake_cuda),
    AfterImport("benchmarks.timing", fake_clock),
    AfterImport("benchmarks.bench_", fake_cases),
]
if hidden := os.environ.get("FAKE_GPU_HIDES"):
    sys.meta_path.insert(0, Hidden(hidden.split(",")))
