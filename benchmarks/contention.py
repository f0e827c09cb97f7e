"""Times training steps while other processes keep cores busy, with OpenMP's threads waiting as they do by default and briefly.

    python -m benchmarks contention              # EfficientDet-Lite0, ours and effdet's, beside none, one and two busy processes
    python -m benchmarks contention --rounds 9   # more steps of each; the median counts

A thread that waits for another spins, by default for long. Where a core is shared it spins instead of the thread it waits for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import environment, records
from benchmarks.bench_training_step import efficientdet
from benchmarks.workload import CHANNELS_LAST, OURS
from effdet_fast.cpu_tuning import SPIN_COUNT
from effdet_fast.files import write_json

MODEL = "efficientdet_lite0"
PEERS = (OURS, "effdet")
WAITING = {"as OpenMP does": {}, f"GOMP_SPINCOUNT={SPIN_COUNT}": {"GOMP_SPINCOUNT": SPIN_COUNT}}
WARMUP = 2


def steps(peer: str, batch: int, size: int, rounds: int) -> None:
    """In a process of its own: says when it is ready, and the seconds of each step once it is told to go."""
    workload = efficientdet(torch.device("cpu"), torch.float32, CHANNELS_LAST, name=MODEL, batch=batch, size=size)
    (step,) = (each.step for each in (workload.ours, *workload.peers) if each.name == peer)
    assert step is not None
    for _ in range(WARMUP):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


def measure(peer: str, waiting: dict[str, str], neighbors: int, arguments: argparse.Namespace) -> list[float]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_WAIT"))}
    command = [sys.executable, "-m", "benchmarks", "contention", "--peer", peer, "--rounds", str(arguments.rounds)]
    command += ["--batch", str(arguments.batch), "--size", str(arguments.size)]
    with subprocess.Popen(
        command, env=kept | waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the process of {peer} ended")
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbors)]
        try:
            process.stdin.write("go\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        finally:
            for each in busy:
                each.kill()
                each.wait()


def main(command_line: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks contention", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each; the median counts (default: 5)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--neighbors", type=int, nargs="*", default=[0, 1, 2], metavar="N", help="busy processes")
    parser.add_argument("--output", type=Path, default=records.RESULTS / "contention", help="folder for the record")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args(command_line)
    if arguments.peer:
        steps(arguments.peer, arguments.batch, arguments.size, arguments.rounds)
        return 0
    record = environment.describe(torch.device("cpu"), ["contention", *command_line])
    record |= {"case": f"{MODEL}, {arguments.batch} x {arguments.size}^2", "rows": []}
    print(f"{record['case']} on {record['device']['name']}; seconds of a step, median of {arguments.rounds}")
    print(f"{'':12}{'threads wait':24}" + "".join(f"{n:>4} busy" for n in arguments.neighbors))
    for peer in PEERS:
        for name, waiting in WAITING.items():
            seconds = {n: measure(peer, waiting, n, arguments) for n in arguments.neighbors}
            record["rows"] += [{"peer": peer, "waiting": name, "busy": n, "seconds": s} for n, s in seconds.items()]
            print(f"{peer:12}{name:24}" + "".join(f"{statistics.median(s):9.2f}" for s in seconds.values()), flush=True)
    path = arguments.output / f"{record['device']['slug']}-{record['date'][:10]}.json"
    write_json(str(path), record, indent=1)
    print(path)
    return 0
