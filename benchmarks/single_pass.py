"""Ours alone, once forward and backward, on the first case of each op in bfloat16: what a profiler of kernels watches."""

import importlib

import torch

from benchmarks import OPS
from benchmarks.correctness import evaluate

CUDA = torch.device("cuda")


def main() -> None:
    torch.manual_seed(0)
    for op in OPS:
        case = importlib.import_module(f"benchmarks.bench_{op}").cases(CUDA.type)[0]
        dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else torch.float32
        evaluate(case.build(CUDA, dtype, case.layouts[0]).ours)
        torch.cuda.synchronize()
        print(f"{op}, {case.name}: ran", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
