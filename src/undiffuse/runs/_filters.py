"""What cleans pictures without a network: for comparison."""

from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse import editing
from undiffuse.checkpoint import Model
from undiffuse.errors import ConfigError, UndiffuseError
from undiffuse.noise import NoiseLevel
from undiffuse.oracles import Gaussian, fit_gaussian
from undiffuse.runs._real import real_pictures

Picture = Float[Tensor, "c h w"]
LARGEST = 4096  # values of a picture whose covariance is still computed


def training_gaussian(run: str | Path, model: Model, most: int = 2000) -> Gaussian | None:
    """The Gaussian fitted to a run's own training pictures, whose denoiser is a Wiener filter.

    None where the pictures are not at hand, or too large for a covariance.
    """
    size = model.pictures
    if size.channels * size.height * size.width > LARGEST:
        return None
    try:
        train, _ = real_pictures(Path(run), model, None).splits()
    except UndiffuseError:
        return None
    x0 = train.x0[:most]
    return fit_gaussian(x0, 0.0 if len(x0) >= 10 * x0[0].numel() else 0.1)


def filters(noisy: Picture, sigma: float, gaussian: Gaussian | None = None) -> dict[str, Picture]:
    """The picture cleaned by what needs no network, each filter told the noise level.

    "wiener" is the local one (`editing.local_wiener`), "trained wiener" that of a Gaussian of the
    picture's size, "nlm" non-local means (Buades et al. 2005), from scikit-image with the
    parameters that its documentation recommends.

    Raises:
        ConfigError: scikit-image is missing.
    """
    made = {"wiener": editing.local_wiener(noisy[None], sigma)[0]}
    if gaussian is not None and gaussian.mean.shape == noisy.shape:
        one = torch.ones((), dtype=torch.float64)
        made["trained wiener"] = gaussian(noisy[None], NoiseLevel(one, one * sigma, one))[0]
    made["nlm"] = _non_local_means(noisy, sigma)
    return {name: picture.clamp(-1, 1) for name, picture in made.items()}


def check_filters() -> None:
    """Raises ConfigError if scikit-image is missing."""
    if find_spec("skimage") is None:
        raise ConfigError(
            "compare needs scikit-image, which is not installed: pip install 'undiffuse[compare]'"
        )


def _non_local_means(noisy: Picture, sigma: float) -> Picture:
    check_filters()
    from skimage.restoration import denoise_nl_means

    grey = len(noisy) == 1  # a single channel in front of it comes back with sides exchanged
    values = denoise_nl_means(
        (noisy[0] if grey else noisy).numpy(),
        patch_size=5,
        patch_distance=6,
        h=0.6 * sigma,
        sigma=sigma,
        fast_mode=True,
        channel_axis=None if grey else 0,
    )
    return torch.from_numpy(values).to(noisy).reshape(noisy.shape)
