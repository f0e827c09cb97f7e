"""`torch.cuda` over the CPU: what is asked for on "cuda" is made on the CPU, and nothing is asynchronous."""

import os
import time
from types import SimpleNamespace

NAME = "Fake GPU"
CAPABILITY = tuple(map(int, os.environ.get("FAKE_GPU_CAPABILITY", "9.0").split(".")))
lost = False  # after a fault, as CUDA has it: every later call of the process fails


class Event:
    def __init__(self, *arguments, **options):
        self.time = 0.0

    def record(self, *arguments):
        self.time = time.perf_counter()

    def synchronize(self):
        synchronize()

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def synchronize(*arguments):
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def install(torch):
    properties = SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=132,
        total_memory=1 << 37,
        L2_cache_size=1 << 16,
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "empty_cache": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_snapshot": [],
        "reset_peak_memory_stats": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *arguments, _answer=answer, **options: _answer)
    torch.cuda.synchronize, torch.cuda.Event = synchronize, Event

    def on_cpu(value):
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == "cuda" else value
        return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value

    class OnCpu(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function is torch.device:
                return function(*arguments, **(options or {}))
            options = {key: on_cpu(value) for key, value in (options or {}).items()}
            return function(*map(on_cpu, arguments), **options)

    OnCpu().__enter__()
