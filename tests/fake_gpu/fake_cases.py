"""Two cases of each benchmark that take milliseconds: 2 x, by ours and by peers of the names that are asked for."""

import fake_faults
import torch

from benchmarks.workload import FORWARD, OURS, STEP, Case, Implementation, Workload

PEERS = {
    "efficientdet": ("effdet", "effdet_fast on effdet", "effdet_fast, graphed", "effdet, compiled"),
    "retinanet": ("torchvision", "effdet_fast on torchvision", "effdet_fast, graphed"),
}


def cases_of(op):
    def build(case, device, dtype, layout):
        fake_faults.happen(f"/{op}/{case}/{dtype}")
        x = torch.randn(100, device=device).to(dtype)

        def twice():
            return 2 * x

        def of(name):
            return Implementation(name, twice, step=twice)

        return Workload(
            ours=of(OURS),
            oracle=Implementation("float64", lambda: 2 * x.double()),
            bytes={STEP if op == "training_step" else FORWARD: 1000},
            peers=[of(name) for name in PEERS.get(case, ("eager", "torch.compile"))],
            images=1,
        )

    def case(name):
        return Case(name, lambda *given: build(name, *given))

    names = tuple(PEERS) if op == "training_step" else ("first", "second")
    return lambda device_type: [case(name) for name in names]
