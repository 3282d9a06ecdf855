"""The same network faster: hand-written kernels under the same program.

`UNet.forward` is the program; `Fast` is a way to run its layers. The numbers are those of the plain
path up to the rounding of bfloat16, gradients included, and tests hold that.
"""

from undiffuse.fast._layers import Fast

__all__ = ["Fast"]
