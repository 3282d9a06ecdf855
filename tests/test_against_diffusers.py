"""Our samplers against Hugging Face diffusers' schedulers, number by number.

diffusers keeps its tables in float32. Where a scheduler computes in the precision of its table,
the table is replaced by one in float64 (their own formulas) and the two agree to rounding. With
the table as it is, they agree to what float32 allows.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from exact_paths import parabola
from undiffuse.denoiser import Denoiser, Epsilon, Prediction, Sample, Velocity
from undiffuse.guidance import clipped, with_label
from undiffuse.noise import Cosine, LinearBetas, NoiseLevel, ScaledLinearBetas, Schedule, clean
from undiffuse.sampling import (
    Step,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    heun,
    ipndm,
    unipc,
)

TABLES: dict[str, Schedule] = {
    "linear": LinearBetas(),
    "scaled_linear": ScaledLinearBetas(),
    "squaredcos_cap_v2": Cosine(),
}
TYPES: dict[str, Prediction] = {
    "epsilon": Epsilon(),
    "v_prediction": Velocity(),
    "sample": Sample(),
}
SHAPE = (2, 1, 4, 4)

every_table = pytest.mark.parametrize("table", TABLES)
every_type = pytest.mark.parametrize("kind", TYPES)
# diffusers calls numpy.array on a torch tensor, whose __array__ lacks numpy 2's copy argument.
numpy_2 = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
    """Any smooth function will do; bounded, so that the last steps cannot blow up."""
    phase = (timestep / 250).to(x.dtype).reshape(-1, 1, 1, 1)
    return 0.5 * torch.tanh(x) * torch.cos(phase) + 0.1 * torch.sin(phase)


def alphas_cumprod(table: str) -> Tensor:
    """DDPM's and improved DDPM's products in float64, by diffusers' formulas."""
    if table == "linear":
        betas = np.linspace(1e-4, 0.02, 1000)
    elif table == "scaled_linear":
        betas = np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2
    else:

        def f(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = np.array([min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999) for i in range(1000)])
    return torch.from_numpy(np.cumprod(1 - betas))


def peer(cls: Any, table: str, kind: str, exact: bool = True, **settings: Any) -> Any:
    scheduler = cls(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=table,
        prediction_type=kind,
        **settings,
    )
    if exact:
        scheduler.alphas_cumprod = alphas_cumprod(table)
        scheduler.betas = 1 - scheduler.alphas_cumprod / torch.cat(
            [torch.ones(1), scheduler.alphas_cumprod[:-1]]
        )
        scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def grid_of(table: str, timesteps: Tensor) -> tuple[NoiseLevel, ...]:
    grid = TABLES[table](timesteps.double() / 999)
    return (*(NoiseLevel(*values) for values in zip(*grid, strict=True)), clean())


def ours(table: str, kind: str):
    return with_label(Denoiser(net, TABLES[table], TYPES[kind]), None)


def raw(x: Tensor, timestep: Tensor) -> Tensor:
    return net(x, timestep.double().expand(len(x)), None)


def close(steps: Iterator[Step], theirs: Sequence[Tensor], tolerance: float) -> None:
    found = [step.x for step in steps]
    assert len(found) == len(theirs) > 1
    for mine, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine, other.double(), rtol=tolerance, atol=tolerance)


def test_tables_agree_within_float32():
    """Their table is a float32 product of 1,000 factors."""
    for table, schedule in TABLES.items():
        level = schedule(torch.arange(1000, dtype=torch.float64) / 999)
        exact, theirs = alphas_cumprod(table), peer(DDPMScheduler, table, "epsilon", exact=False)
        torch.testing.assert_close(level.alpha**2, exact, rtol=1e-9, atol=0.0)
        torch.testing.assert_close(theirs.alphas_cumprod.double(), exact, rtol=2e-4, atol=2e-7)


@every_table
@every_type
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(table: str, kind: str, eta: float, spacing: str):
    scheduler = peer(DDIMScheduler, table, kind, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    x, theirs, noises = normal(0), [], [normal(i + 1) for i in range(20)]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(raw(x, t), t, x, eta=eta, variance_noise=noises[i]).prev_sample
        theirs.append(x)
    grid = grid_of(table, scheduler.timesteps)
    steps = ddim(ours(table, kind), normal(0), grid, noise=lambda i: noises[i], eta=eta)
    close(steps, theirs, 1e-9)


@every_table
@every_type
def test_ddpm_with_the_same_noise(table: str, kind: str):
    scheduler = peer(DDPMScheduler, table, kind, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(25)
    x, theirs, generator = normal(0), [], torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x, t), t, x, generator=generator).prev_sample
        theirs.append(x)
    same = torch.Generator().manual_seed(7)
    steps = ddpm(
        ours(table, kind),
        normal(0),
        grid_of(table, scheduler.timesteps),
        noise=lambda i: torch.randn(SHAPE, dtype=torch.float64, generator=same),
    )
    close(steps, theirs, 1e-8)
    assert torch.equal(same.get_state(), generator.get_state())  # no draw more, none less


@every_type
def test_ddpm_with_clipping(kind: str):
    """Their clip_sample is our `clipped`."""
    scheduler = peer(DDPMScheduler, "linear", kind, clip_sample=True)
    scheduler.set_timesteps(10)
    x, theirs, generator = 3 * normal(0), [], torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x, t), t, x, generator=generator).prev_sample
        theirs.append(x)
    same = torch.Generator().manual_seed(7)
    steps = ddpm(
        clipped(ours("linear", kind)),
        3 * normal(0),
        grid_of("linear", scheduler.timesteps),
        noise=lambda i: torch.randn(SHAPE, dtype=torch.float64, generator=same),
    )
    close(steps, theirs, 1e-9)


@numpy_2
@every_table
@every_type
@pytest.mark.parametrize("count", [8, 20])  # theirs ends differently below 15 steps; 2M does not
def test_dpmpp_2m(table: str, kind: str, count: int):
    """Their step rounds x to float32 each time, hence the tolerance."""
    scheduler = peer(
        DPMSolverMultistepScheduler,
        table,
        kind,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(count)
    x, theirs = normal(0), []
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x.double(), t), t, x.double()).prev_sample
        theirs.append(x)
    grid = grid_of(table, scheduler.timesteps)
    close(dpmpp_2m(ours(table, kind), normal(0), grid), theirs, 2e-5)


def with_our_ratios(scheduler: Any, grid: Sequence[NoiseLevel]) -> Any:
    """Theirs are rounded to float32."""
    ratios = torch.stack([level.ratio for level in grid])
    torch.testing.assert_close(scheduler.sigmas.double(), ratios, rtol=2e-5, atol=0.0)
    scheduler.sigmas = ratios
    return scheduler


@numpy_2
@every_table
@every_type
def test_dpmpp_2m_sde_with_the_same_noise(table: str, kind: str):
    """Their step rounds x to float32 each time, hence the tolerance."""
    scheduler = peer(
        DPMSolverMultistepScheduler,
        table,
        kind,
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(12)
    grid = grid_of(table, scheduler.timesteps)
    scheduler = with_our_ratios(scheduler, grid)
    x, theirs, noises = normal(0), [], [normal(i + 1) for i in range(12)]
    for i, t in enumerate(scheduler.timesteps):
        step = scheduler.step(raw(x.double(), t), t, x.double(), variance_noise=noises[i])
        x = step.prev_sample
        theirs.append(x)
    steps = dpmpp_2m_sde(ours(table, kind), normal(0), grid, noise=lambda i: noises[i])
    close(steps, theirs, 2e-6)


@numpy_2
@every_table
@every_type
def test_their_dpmpp_3m_takes_half_of_the_curvature(table: str, kind: str):
    """Their factor of the second difference is phi_3 where the integral has 2 phi_3.

    So it is of order 2, as tests/test_solvers.py shows. Nothing else differs: their second step is
    that of 2M.
    """
    scheduler = peer(
        DPMSolverMultistepScheduler,
        table,
        kind,
        algorithm_type="dpmsolver++",
        solver_order=3,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(16)  # theirs ends with lower orders below 15 steps
    grid = grid_of(table, scheduler.timesteps)
    scheduler = with_our_ratios(scheduler, grid)
    x, theirs = normal(0), []
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x.double(), t), t, x.double()).prev_sample
        theirs.append(x)
    halved = parabola(1.0, lambda h: -math.expm1(-h) / 2)
    close(halved(ours(table, kind), normal(0), grid), theirs, 2e-6)


@numpy_2
@every_table
@every_type
@pytest.mark.parametrize("order", [2, 3])
def test_unipc(table: str, kind: str, order: int):
    scheduler = peer(
        UniPCMultistepScheduler,
        table,
        kind,
        solver_order=order,
        solver_type="bh2",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(10)
    grid = grid_of(table, scheduler.timesteps)
    scheduler = with_our_ratios(scheduler, grid)
    x, theirs = normal(0), []
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x, t), t, x).prev_sample
        theirs.append(x)
    close(unipc(ours(table, kind), normal(0), grid, order=order), theirs, 1e-11)


@every_table
@every_type
def test_ipndm(table: str, kind: str):
    """Theirs wants velocities, names alpha and sigma otherwise, and does not end with x0."""
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(10)
    grid = grid_of(table, torch.linspace(999, 0, 10).round())
    scheduler.alphas = torch.stack([level.alpha for level in grid])
    scheduler.betas = torch.stack([level.sigma for level in grid])
    x, theirs, denoise = normal(0), [], ours(table, kind)
    for level, t in zip(grid, scheduler.timesteps, strict=False):
        x0 = denoise(x, level)
        velocity = level.alpha * level.noise_in(x, x0) - level.sigma * x0
        x = scheduler.step(velocity, t, x).prev_sample
        theirs.append(x)
    steps = list(ipndm(denoise, normal(0), grid))
    close(iter(steps[:-1]), theirs[:-1], 1e-9)


@numpy_2
@every_table
@every_type
def test_heun(table: str, kind: str):
    """They move x / alpha over sigma / alpha, two calls per step."""
    scheduler = peer(HeunDiscreteScheduler, table, kind, timestep_spacing="trailing")
    scheduler.set_timesteps(12)
    grid = grid_of(table, scheduler.timesteps[::2])
    ratios = torch.stack([level.ratio for level in grid])
    torch.testing.assert_close(scheduler.sigmas[::2].double(), ratios[:-1], rtol=2e-5, atol=0.0)
    scheduler.sigmas = torch.cat(
        [ratios[:1], ratios[1:-1].repeat_interleave(2), ratios[-1:]]
    )  # theirs, before rounding to float32
    x, theirs = normal(0) / grid[0].alpha, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(raw(scaled, t), t, x).prev_sample
        theirs.append(x)
    ends = [*theirs[1::2], theirs[-1]]
    scaled_ends = [end * level.alpha for end, level in zip(ends, grid[1:], strict=True)]
    close(heun(ours(table, kind), normal(0), grid), scaled_ends, 1e-8)


def test_with_their_own_float32_table_the_end_differs_by_rounding():
    """What a user who switches will see; the tests above remove it."""
    scheduler = peer(DDIMScheduler, "linear", "epsilon", exact=False, clip_sample=False)
    scheduler.set_timesteps(20)
    x = normal(0)
    for t in scheduler.timesteps:
        x = scheduler.step(raw(x, t), t, x).prev_sample
    *_, last = ddim(ours("linear", "epsilon"), normal(0), grid_of("linear", scheduler.timesteps))
    difference = float((last.x - x).abs().max() / x.abs().max())
    assert 1e-9 < difference < 1e-3


def test_grids_cover_the_same_levels():
    """Both sides really walk from noise to clean."""
    scheduler = peer(DDIMScheduler, "linear", "epsilon", clip_sample=False)
    scheduler.set_timesteps(20)
    grid = grid_of("linear", scheduler.timesteps)
    assert float(grid[-1].sigma) == 0
    assert all(float(a.ratio) > float(b.ratio) for a, b in pairwise(grid))
