"""Time and memory of training steps at full size: `python full_step.py VARIANT`.

In a process of its own, so that the peak of memory is its own. Prints one JSON object.
"""

import json
import os
import resource
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from s02_scaling import FULL_SIDE, full_specs
from undiffuse.unet import UNet

MOST_BYTES = 12 * 2**30


def main(variant: str) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    before = _peak()
    net = UNet(full_specs()[variant])
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    times: list[float] = []
    for _ in range(2):  # the first step also allocates
        began = time.perf_counter()
        x = torch.randn(1, 3, FULL_SIDE, FULL_SIDE)
        (net(x, torch.zeros(1), None) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    print(json.dumps({"seconds": round(min(times), 2), "bytes": _peak() - before}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(sys.argv[1])
