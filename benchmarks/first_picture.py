"""What a first picture cannot do without, timed part by part, in this process.

    python -m benchmarks.first_picture MODEL

Torch is imported, the weights are read, and the network is evaluated as often as the sampler does
it. What else must happen, such as building the network, is left out.
"""

import json
import sys
import time
from pathlib import Path


def main(file: Path) -> dict[str, float]:
    """Seconds of each part."""
    began = time.perf_counter()
    import torch

    imported = time.perf_counter()
    from safetensors.torch import load_file

    reading = time.perf_counter()
    load_file(file)
    read = time.perf_counter()
    from undiffuse import checkpoint, runtime
    from undiffuse.config import Device, SampleConfig

    model = checkpoint.load_model(file)
    device = runtime.choose_device(Device.AUTO)
    runtime.move(model.net, device)
    run = runtime.callable_net(model.net, runtime.choose(model.net).path)
    size = (model.pictures.channels, model.pictures.height, model.pictures.width)
    x, timestep = torch.randn(1, *size, device=device), torch.zeros(1, device=device)
    ready = time.perf_counter()
    with torch.no_grad():
        for _ in range(SampleConfig().num_inference_steps):
            run(x, timestep, None).cpu()
    done = time.perf_counter()
    return {"torch": imported - began, "weights": read - reading, "evaluations": done - ready}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
