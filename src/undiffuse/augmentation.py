"""Augmentation that does not leak: transformed training pictures, and nine numbers that say how.

A network that sees transformed pictures without being told learns to draw them. Told the nine
numbers, it learns what each of them does; told zeros, as for every generated picture, it draws
pictures as they were (2206.00364, appendix F.2; the transformations are those of 2006.06676).

The numbers are those of 2206.00364, table 6, so that weights trained elsewhere know them:

    0     1: mirrored left to right
    1     1: mirrored upside down
    2     scale, in steps of 0.2 octaves
    3, 4  cos - 1 and sin of the rotation, counter-clockwise
    5, 6  stretch along a direction, counter-clockwise from the right, by steps of 0.2 octaves,
          and across it by as much less
    7, 8  shift to the right and down, in steps of 1/8 of the width and of the height

They act in this order, about the picture's centre. `transform` knows nothing else, so what the
network is told is the whole truth. Beyond its edge a picture goes on as its mirror image.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.noise import Pictures

PARAMETERS = 9
OCTAVES = 0.2  # of a scale or stretch of 1
SHARE = 0.125  # of the side, of a shift of 1

DRAWS = 15  # uniform numbers per picture: coins and amounts


@dataclass(frozen=True)
class Augment:
    """Draws transformations: each of the kinds with probability `p`, independently.

    Args:
        p: from 0 to 1; 0.12 is usual for small pictures, 0.15 for larger ones.
        flip_x: mirror left to right.
        flip_y: mirror upside down.
        whole_shift: by whole pixels, which costs no sharpness: at most this share of each side.
        scale: standard deviation, in octaves.
        rotate: at most this many degrees, either way.
        stretch: standard deviation, in octaves; the direction is any.
        shift: by parts of pixels: standard deviation, as a share of each side.

    A kind with amount 0 (False) is left out.

    Raises:
        ConfigError: a number is out of range.
    """

    p: float
    flip_x: bool = True
    flip_y: bool = False
    whole_shift: float = SHARE
    scale: float = OCTAVES
    rotate: float = 180.0
    stretch: float = OCTAVES
    shift: float = SHARE

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise ConfigError(f"p must be from 0 to 1; got {self.p}")
        for name in ("whole_shift", "scale", "rotate", "stretch", "shift"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"{name} must be a finite number of at least 0; got {value}")

    @property
    def draws(self) -> int:
        """How many uniform numbers each picture takes, whatever is left out."""
        return DRAWS

    def __call__(
        self, x0: Pictures, draws: Float[Tensor, "b n"]
    ) -> tuple[Pictures, Float[Tensor, "b k"]]:
        """The transformed pictures, and the nine numbers of each, in the pictures' precision.

        Args:
            draws: uniform in [0, 1), `DRAWS` per picture; the outcome is a function of them alone.
        """
        height, width = x0.shape[-2:]
        numbers = self.parameters(draws, height, width)
        return transform(x0, numbers), numbers.to(x0.dtype)

    def parameters(
        self, draws: Float[Tensor, "b n"], height: int, width: int
    ) -> Float[Tensor, "b 9"]:
        """The nine numbers of each picture of this size; float64."""
        u = draws.double().unbind(1)
        turn = math.radians(self.rotate) * _either_way(u[6])
        angle = math.pi * _either_way(u[9])
        # Against table 6 the amount is never negative: in these two numbers less along a direction
        # cannot be told from more along it. Any direction is as likely, so nothing is lost.
        stretch = self._on(u[8], self.stretch / OCTAVES * _normal(u[10]).abs())
        shifts = [
            self._on(u[11], self.shift / SHARE * _normal(fine))
            + self._on(u[2], (self.whole_shift * side * _either_way(whole)).round())
            / (SHARE * side)
            for fine, whole, side in ((u[12], u[3], width), (u[13], u[4], height))
        ]
        columns = (
            self._on(u[0], torch.full_like(u[0], self.flip_x)),
            self._on(u[1], torch.full_like(u[1], self.flip_y)),
            self._on(u[5], self.scale / OCTAVES * _normal(u[14])),
            self._on(u[7], turn.cos() - 1),
            self._on(u[7], turn.sin()),
            stretch * angle.cos(),
            stretch * angle.sin(),
            *shifts,
        )
        return torch.stack(columns, dim=1)

    def _on(self, coin: Tensor, value: Tensor) -> Tensor:
        return torch.where(coin < self.p, value, torch.zeros_like(value))


def _either_way(u: Tensor) -> Tensor:
    """Uniform in [-1, 1)."""
    return 2 * u - 1


def _normal(u: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float64).eps
    return torch.special.ndtri(u.clamp(tiny, 1 - tiny))


# --- from nine numbers to pictures --------------------------------------------------------------


class Motion(NamedTuple):
    """What nine numbers mean: out - centre = linear @ (mirrored in - centre) + shift, in pixels,
    (x, y)."""

    mirrored: Bool[Tensor, "b 2"]
    linear: Float[Tensor, "b 2 2"]
    shift: Float[Tensor, "b 2"]

    def of(self, rows: Bool[Tensor, "b"]) -> "Motion":
        """That of some pictures."""
        return Motion(*(part[rows] for part in self))


def motion(parameters: Float[Tensor, "b 9"], height: int, width: int) -> Motion:
    """The motion that nine numbers stand for, on pictures of this size.

    Sines change their sign: the table's angles are counter-clockwise, y points down.
    """
    p = parameters.double()
    scale = torch.exp2(OCTAVES * p[:, 2])[:, None, None] * torch.eye(2, dtype=p.dtype)
    shift = p[:, 7:9] * SHARE * torch.tensor([width, height], dtype=p.dtype)
    whole = shift.round()  # n / side * side may miss n by a rounding
    return Motion(
        mirrored=p[:, 0:2] > 0.5,
        linear=_stretch(p[:, 5], -p[:, 6]) @ _rotation(p[:, 3] + 1, -p[:, 4]) @ scale,
        shift=torch.where((shift - whole).abs() < 1e-6, whole, shift),
    )


def _rotation(cos: Tensor, sin: Tensor) -> Tensor:
    rows = (torch.stack((cos, -sin), dim=1), torch.stack((sin, cos), dim=1))
    return torch.stack(rows, dim=1)


def _stretch(along_x: Tensor, along_y: Tensor) -> Tensor:
    amount = torch.hypot(along_x, along_y)
    angle = torch.atan2(along_y, along_x)
    turned = _rotation(angle.cos(), angle.sin())
    factors = torch.exp2(OCTAVES * torch.stack((amount, -amount), dim=1))
    return turned @ torch.diag_embed(factors) @ turned.mT


def transform(x0: Pictures, parameters: Float[Tensor, "b 9"]) -> Pictures:
    """What the nine numbers say, done to each picture.

    Mirrors and shifts by whole pixels, and nothing at all, are exact. All else is resampled: a
    shift by half a pixel keeps frequencies up to 0.8 of the highest to within 2 %.
    """
    height, width = x0.shape[-2:]
    moved = motion(parameters, height, width)
    identity = torch.eye(2, dtype=moved.linear.dtype)
    whole = (moved.shift == moved.shift.round()).all(1)
    exact = whole & (moved.linear == identity).flatten(1).all(1)
    out = _moved(x0, moved.mirrored, torch.where(exact[:, None], moved.shift, 0.0).long())
    if not bool(exact.all()):
        out[~exact] = _resampled(out[~exact], moved.of(~exact))
    return out


def _moved(x0: Pictures, mirrored: Bool[Tensor, "b 2"], shift: Int[Tensor, "b 2"]) -> Pictures:
    """Mirrored, then shifted by whole pixels: every value is one of the picture's."""
    sides = (x0.shape[3], x0.shape[2])
    columns, rows = (_sources(side, mirrored[:, i], shift[:, i]) for i, side in enumerate(sides))
    picture = torch.arange(len(x0))[:, None, None]
    return x0[picture, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def _sources(side: int, mirrored: Tensor, shift: Tensor) -> Int[Tensor, "b side"]:
    """Where the pixels of a row come from."""
    found = _reflected(torch.arange(side) - shift[:, None], side)
    return torch.where(mirrored[:, None], side - 1 - found, found)


def _reflected(index: Int[Tensor, "..."], side: int) -> Int[Tensor, "..."]:
    """The pixel that stands at `index`, inside or outside: 2 1 | 0 1 2 3 | 2 1."""
    last = side - 1
    return last - (last - index % max(1, 2 * last)).abs()


# --- resampling ---------------------------------------------------------------------------------
#
# The picture is made FINE times finer by a long windowed sinc, so that cubic interpolation finds
# values between its points without loss; these are taken on a grid twice as fine as the result's,
# for what the transformation makes smaller must be filtered before points are left out.

FINE = 4
TWICE = 2
REACH = 6  # pixels, either way, of the sinc's window
KAISER = 4.0  # the window's beta
AT_ONCE = 2**24  # numbers of finer pictures that are held together


def _resampled(x: Pictures, moved: Motion) -> Pictures:
    height, width = x.shape[-2:]
    step = max(1, AT_ONCE // (FINE**2 * x[0].numel()))
    grid = _grid(moved, height, width).to(x.dtype)
    parts = [_on_grid(x[i : i + step], grid[i : i + step]) for i in range(0, len(x), step)]
    return torch.cat(parts)


def _on_grid(x: Pictures, grid: Float[Tensor, "b y x 2"]) -> Pictures:
    height, width = x.shape[-2:]
    finer = _finer(height).to(x.dtype) @ x @ _finer(width).to(x.dtype).T
    found = F.grid_sample(
        finer, grid, mode="bicubic", padding_mode="reflection", align_corners=True
    )
    return _coarser(height).to(x.dtype) @ found @ _coarser(width).to(x.dtype).T


def _grid(moved: Motion, height: int, width: int) -> Float[Tensor, "b y x 2"]:
    """Where each point of the result's doubled grid comes from; -1 and 1 are the outer pixels."""
    centre = torch.tensor([width - 1, height - 1], dtype=torch.float64) / 2
    x, y = _points(width), _points(height)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) - centre
    before = (points - moved.shift[:, None, None]) @ torch.linalg.inv(moved.linear).mT[:, None]
    return before / centre.clamp(min=0.5)


def _points(side: int) -> Float[Tensor, "n"]:
    """The doubled grid along one side, as far beyond the edges as the filter reaches."""
    return torch.arange(-TWICE * REACH, TWICE * (side - 1 + REACH) + 1).double() / TWICE


@lru_cache(maxsize=8)
def _finer(side: int) -> Float[Tensor, "m side"]:
    """The values between the pixels of a row: FINE - 1 between each two."""
    at = torch.arange(FINE * (side - 1) + 1).double() / FINE
    pixels = torch.arange(-REACH - 1, side + REACH + 1)
    weights = _kernel(at[:, None] - pixels)
    folded = torch.zeros(len(at), side, dtype=torch.float64)
    folded.index_add_(1, _reflected(pixels, side), weights)
    return folded / folded.sum(1, keepdim=True)


@lru_cache(maxsize=8)
def _coarser(side: int) -> Float[Tensor, "side n"]:
    """Each pixel out of the doubled grid around it."""
    weights = _kernel(_points(side) - torch.arange(side)[:, None])
    return weights / weights.sum(1, keepdim=True)


def _kernel(t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Kaiser's window times the sinc that passes what pixels one apart can hold."""
    inside = (1 - (t / REACH).square()).clamp(min=0)
    window = torch.special.i0(KAISER * inside.sqrt()) / torch.special.i0(
        torch.tensor(KAISER, dtype=torch.float64)
    )
    return torch.sinc(t) * torch.where(t.abs() <= REACH, window, 0.0)
