"""Functions of denoise functions. No flag reaches a sampler or the network.

A denoise function maps (x, level) to an estimate of the clean picture.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.noise import NoiseLevel, Schedule

Pictures = Float[Tensor, "b c h w"]
Denoise = Callable[[Pictures, NoiseLevel], Pictures]
Labelled = Callable[[Pictures, NoiseLevel, Tensor | None], Pictures]


def with_label(denoiser: Labelled, label: Int[Tensor, "b"] | None) -> Denoise:
    """Fix the label; None means "no class"."""
    return lambda x, level: denoiser(x, level, label)


def guided(strong: Denoise, weak: Denoise, scale: float) -> Denoise:
    """weak + scale * (strong - weak); at scale 1 exactly `strong`, and `weak` is never called.

    With the null label as `weak` this is classifier-free guidance (2207.12598); with a smaller or
    less trained network it is autoguidance (2406.02507, eq. 3). On x0 and on epsilon it is the
    same formula, since each is affine in the other.

    Raises:
        ConfigError: `scale` is not a finite number.
    """
    if not abs(scale) < float("inf"):
        raise ConfigError(f"guidance_scale must be a finite number; got {scale}")
    if scale == 1.0:
        return strong

    def denoise(x: Pictures, level: NoiseLevel) -> Pictures:
        return torch.lerp(weak(x, level), strong(x, level), scale)

    return denoise


PAIRED = 2**12  # positions (pictures x height x width) up to which one call beats two


def classifier_free(
    denoiser: Labelled, label: Int[Tensor, "b"] | None, scale: float, null: int | None = None
) -> Denoise:
    """Classifier-free guidance (2207.12598) with the network's own null label.

    Args:
        null: the number of the null label. With it a small batch, whose time is that of the calls
            rather than of the arithmetic, is evaluated once with both labels instead of twice.

    Raises:
        ConfigError: `scale` is not a finite number, or not 1 without `label`.
    """
    if label is None and scale != 1.0:
        raise ConfigError(
            f"guidance_scale {scale:g} needs class labels; pass labels, a weaker model, or scale 1"
        )
    apart = guided(with_label(denoiser, label), with_label(denoiser, None), scale)
    if label is None or null is None or scale == 1.0:
        return apart
    labels = torch.cat((torch.full_like(label, null), label))

    def denoise(x: Pictures, level: NoiseLevel) -> Pictures:
        if x[:, 0].numel() > PAIRED:
            return apart(x, level)
        weak, strong = denoiser(torch.cat((x, x)), _twice(level), labels).chunk(2)
        return torch.lerp(weak, strong, scale)

    return denoise


def _twice(level: NoiseLevel) -> NoiseLevel:
    """The level of a batch that is there twice; a shared level stays shared."""
    return NoiseLevel(*(v if v.ndim == 0 else torch.cat((v, v)) for v in level))


def within(inside: Denoise, outside: Denoise, low: float, high: float) -> Denoise:
    """`inside` where low <= sigma / alpha <= high, else `outside` (2404.07724).

    For levels shared by the whole batch, as samplers use.
    """

    def denoise(x: Pictures, level: NoiseLevel) -> Pictures:
        chosen = low <= float(level.ratio) <= high  # infinite where alpha is 0
        return (inside if chosen else outside)(x, level)

    return denoise


def on_schedule(denoise: Labelled, schedule: Schedule) -> Labelled:
    """`denoise`, which knows the levels of `schedule`, asked at those of any other.

    What is noise of one sigma / alpha in every schedule is told as the level that `schedule` has
    there, and x is scaled to it (2206.00364, section 2). Beyond its ends the nearest one is told,
    which is why x is scaled by sqrt(alpha^2 + sigma^2): alpha may be 0.
    """

    def asked(x: Pictures, level: NoiseLevel, label: Tensor | None = None) -> Pictures:
        own = schedule.at(level.ratio)
        scale = torch.hypot(own.alpha, own.sigma) / torch.hypot(level.alpha, level.sigma)
        return denoise(scale.to(x.dtype) * x, own, label)

    return asked


def clipped(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
    """Keep the estimate of the clean picture within the range of pictures."""
    return lambda x, level: denoise(x, level).clamp(low, high)
