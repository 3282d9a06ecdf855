"""The only module that serialises: the model file and the checkpoint directories.

Tensors are kept as safetensors, everything else as JSON. Reading runs no code from a file, and any
damage to a file of ours is detected and named.
"""

from undiffuse.checkpoint._averages import Average, Averages
from undiffuse.checkpoint._codec import (
    JSON,
    decode_prediction,
    decode_schedule,
    decode_spec,
    encode,
)
from undiffuse.checkpoint._directory import Loaded, Snapshot
from undiffuse.checkpoint._disk import REAL_DISK, Chunk, Disk, RealDisk
from undiffuse.checkpoint._lock import RunLock
from undiffuse.checkpoint._model import Header, Model, load_model, read_header, save_model
from undiffuse.checkpoint._pictures import Pictures
from undiffuse.checkpoint._steps import Checkpoints

__all__ = [
    "JSON",
    "REAL_DISK",
    "Average",
    "Averages",
    "Checkpoints",
    "Chunk",
    "Disk",
    "Header",
    "Loaded",
    "Model",
    "Pictures",
    "RealDisk",
    "RunLock",
    "Snapshot",
    "decode_prediction",
    "decode_schedule",
    "decode_spec",
    "encode",
    "load_model",
    "read_header",
    "save_model",
]
