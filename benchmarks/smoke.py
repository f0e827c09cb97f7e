"""Every op on small odd shapes on the GPU, forward and backward: what compute-sanitizer watches."""

import torch

from effdet_fast.random_calls import Draw
from effdet_fast.self_tests import CALLS, results_of

DTYPES = (torch.float32, torch.bfloat16)


def main(device: str = "cuda") -> None:
    for name, calls in CALLS.items():
        for dtype in DTYPES:
            for call in calls(Draw(device, dtype)):
                results_of(call)
            if device == "cuda":
                torch.cuda.synchronize()  # so that what goes wrong is told beside its op
            print(f"{name} {dtype}: ran", flush=True)


if __name__ == "__main__":
    main()
