"""The border: files become pixels in [-1, 1] here, and pixels become files again.

No other module opens or writes a picture. Inside the package a picture is a float32 tensor
(channels, height, width) in [-1, 1]; stored pictures keep their integers, so that all 256 (or
65,536) values survive the way in and out exactly.

What a file becomes is fixed, not guessed: the EXIF orientation is applied, transparency is
composited on a stated colour, animations give their first frame, CMYK is converted by Pillow,
colour profiles and gamma chunks are ignored (values are taken as sRGB), and 16 bits are kept for
grey pictures. Every such case is counted in ``Data.notes``.
"""

from undiffuse.images._cache import load_cache, save_cache
from undiffuse.images._dataset import Data, Dataset, Skipped
from undiffuse.images._decode import SUFFIXES, read
from undiffuse.images._options import DataOptions, OnBadImage
from undiffuse.images._pixels import to_float, to_uint8, to_uint16
from undiffuse.images._scan import Scan, scan
from undiffuse.images._sources import load
from undiffuse.images._write import encode_png, grid, save_film, save_grid, save_image

__all__ = [
    "SUFFIXES",
    "Data",
    "DataOptions",
    "Dataset",
    "OnBadImage",
    "Scan",
    "Skipped",
    "encode_png",
    "grid",
    "load",
    "load_cache",
    "read",
    "save_cache",
    "save_film",
    "save_grid",
    "save_image",
    "scan",
    "to_float",
    "to_uint8",
    "to_uint16",
]
