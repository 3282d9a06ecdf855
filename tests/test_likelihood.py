"""Bits per dimension against closed forms, Bayes' rule and densities that integrate to one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from undiffuse import images
from undiffuse.denoiser import Denoiser, KarrasPrecond, LogUniform
from undiffuse.errors import ConfigError
from undiffuse.likelihood import (
    GRIDS,
    BesideExact,
    Clean,
    Grid,
    Noised,
    Point,
    Uniform,
    beside_exact,
    bits_per_dimension,
    bound_from_errors,
    reading_of,
)
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    NoiseLevel,
    Schedule,
    Stream,
    clean,
    keyed_normal,
    keyed_uniform,
)
from undiffuse.oracles import FiniteSet, Gaussian, Mixture, power_law_field
from undiffuse.spec import Attn, Concat, Conv, Out, Res, Skip, UNetSpec
from undiffuse.unet import UNet

SIZES = {8: 4, 16: 2}  # side -> pictures
MANY = 4096  # pictures at once: oracles are fast in large batches


def drawn(oracle: Gaussian, count: int, seed: int = 0) -> Tensor:
    """Pictures of that law; float64."""
    shape = tuple(oracle.mean.shape)
    return oracle.draw(keyed_normal(seed, Stream.SAMPLE, range(count), shape).double())


def at(ratio: float) -> NoiseLevel:
    return NoiseLevel(*torch.tensor([1.0, ratio, math.nan], dtype=torch.float64))


def in_bits(log_density: Tensor, x: Tensor) -> Tensor:
    return -log_density / (x[0].numel() * math.log(2))


def white(mean: Tensor, deviation: float) -> Gaussian:
    """Independent values of one deviation."""
    size = mean.numel()
    variance = torch.full((size,), deviation**2, dtype=torch.float64)
    return Gaussian(mean.double(), variance, torch.eye(size, dtype=torch.float64))


def clusters(count: int, side: int, deviation: float) -> Mixture:
    """Small clouds far apart: the path has to turn sharply between them."""
    means = keyed_normal(9, Stream.SAMPLE, range(count), (1, side, side)) * 0.6
    parts = tuple(white(mean, deviation) for mean in means)
    return Mixture(parts, (1.0,) * count, tuple(range(count)))


def quickly(mixture: Mixture) -> Callable[..., Tensor]:
    """The same estimate for equally likely clouds of one deviation, without the oracle's checks."""
    means = torch.stack([part.mean.flatten() for part in mixture.components])
    variance = mixture.components[0].eigenvalues[0]

    def denoise(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        spread = variance + level.sigma**2
        share = (-torch.cdist(x.flatten(1), means).square() / (2 * spread)).softmax(1)
        mean = (share @ means).reshape(x.shape)
        return mean + variance / spread * (x - mean)

    return denoise


def drawn_in_turn(mixture: Mixture, count: int) -> tuple[Tensor, Tensor]:
    """Pictures of every class as often, and their classes."""
    label = torch.arange(count) % len(mixture.components)
    each = [drawn(part, count, seed=3) for part in mixture.components]
    return torch.stack([each[k][n] for n, k in enumerate(label.tolist())]), label


# --- exact densities ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Karras(), Cosine(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("exponent", "side"), [(1.0, 8), (2.0, 8), (3.0, 8), (1.0, 16), (3.0, 16)], ids=str
)
def test_gaussian_fields_have_their_own_density(
    exponent: float, side: int, schedule: Schedule
) -> None:
    field = power_law_field(exponent, side, side, spread=0.5)
    oracle = replace(field, mean=field.mean - 0.3)
    x0 = drawn(oracle, SIZES[side])
    found = bits_per_dimension(
        oracle, schedule, x0, reading=Clean(), tolerance=0.001, batch_size=MANY
    )
    off = (found.bits - in_bits(oracle.log_density(x0, clean()), x0)).abs()
    assert off.max() < 1e-4  # the target is 0.001
    assert bool((off <= found.error).all())
    assert bool((found.integration_error <= 0.001).all())
    assert found.error.max() < 0.003
    assert not found.probe_error.any()


def test_the_density_under_noise_is_that_of_the_lowest_level() -> None:
    oracle = power_law_field(2.0, 4, 4, spread=0.5)
    x0 = drawn(oracle, 8)
    for low in (0.05, 0.4):
        found = bits_per_dimension(oracle, Karras(), x0, reading=Noised(), low=low, tolerance=1e-4)
        u = Noised().point(x0, low, 0, range(8)).u
        torch.testing.assert_close(
            found.bits, in_bits(oracle.log_density(u, at(low)), u), rtol=0, atol=1e-5
        )
        assert found.low == pytest.approx(low)
        assert not found.truncation_error.any()


def test_a_low_top_is_corrected_and_owned_up_to() -> None:
    """At 5 times the data's spread N(m, s^2 I) is far off. Corrected it is not, and the size of the
    correction covers what is left of most pictures: it is an estimate, not a bound."""
    field = power_law_field(2.0, 4, 4, spread=0.5)
    oracle = replace(field, mean=field.mean + 0.7)
    x0 = drawn(oracle, 16)
    found = bits_per_dimension(oracle, Karras(), x0, reading=Clean(), high=2.5, tolerance=1e-4)
    off = (found.bits - in_bits(oracle.log_density(x0, clean()), x0)).abs()
    assert off.max() < 0.02
    assert off.mean() < found.prior_error.mean() / 2
    assert 0.01 < found.prior_error.mean() < 0.1
    assert (off <= found.error).float().mean() > 0.7


def test_mixtures_have_their_own_density_and_that_of_a_class() -> None:
    mixture = clusters(3, 2, 0.4)
    x0, label = drawn_in_turn(mixture, 6)
    u = Noised().point(x0, 0.002, 0, range(6)).u

    def bits(label: Tensor | None) -> Tensor:
        return bits_per_dimension(
            *(mixture, Karras(), x0, label), reading=Noised(), tolerance=0.03, batch_size=MANY
        ).bits

    every = torch.stack([part.log_density(u, at(0.002)) for part in mixture.components], 1)
    own = every.gather(1, label[:, None])[:, 0]
    for found, exact in ((bits(None), mixture.log_density(u, at(0.002))), (bits(label), own)):
        torch.testing.assert_close(found, in_bits(exact, u), rtol=0, atol=2e-3)
    assert (bits(None) - bits(label)).abs().max() > 0.05


def curl(x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor:
    """No denoiser of any data, since it turns: but a smooth field that is x at no noise."""
    first, second = x.unbind(3)
    turned = torch.stack((second.tanh(), -first.sin()), 3)
    total = 1 + level.sigma**2
    return x / total + 0.6 * level.sigma * turned / total**1.5


@dataclass(frozen=True)
class Unmoved:
    """The density of the lowest level at the pictures themselves."""

    low: float

    def point(self, x0: Tensor, ratio: float, seed: int, positions: range) -> Point:
        return Point(x0, x0.new_zeros(len(x0)), clean=False)


def test_any_smooth_field_has_a_density_that_integrates_to_one() -> None:
    edge, steps = 6.0, 48
    axis = (torch.arange(steps, dtype=torch.float64) + 0.5) * (2 * edge / steps) - edge
    plane = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2)
    found = bits_per_dimension(
        curl, Karras(), plane, reading=Unmoved(0.05), tolerance=0.05, batch_size=MANY
    )
    mass = (2 ** (-2 * found.bits)).sum() * (2 * edge / steps) ** 2
    assert float(mass) == pytest.approx(1.0, abs=0.005)


# --- estimates of the error ---------------------------------------------------------------------


@pytest.mark.parametrize(("count", "side", "deviation"), [(3, 1, 0.1), (8, 2, 0.3), (9, 4, 0.2)])
def test_the_estimate_covers_the_error_at_every_tolerance(
    count: int, side: int, deviation: float
) -> None:
    mixture = clusters(count, side, deviation)
    x0, _ = drawn_in_turn(mixture, 32)
    u = Noised().point(x0, 0.002, 0, range(32)).u
    exact = in_bits(mixture.log_density(u, at(0.002)), u)
    worst: list[float] = []
    for tolerance in (1.0, 0.1, 0.01):
        found = bits_per_dimension(
            *(quickly(mixture), Karras(), x0),
            reading=Noised(),
            tolerance=tolerance,
            batch_size=MANY,
        )
        off = (found.bits - exact).abs()
        worst.append(float(off.max()))
        assert (off <= found.error).float().mean() > 0.9
        assert bool((off <= 5 * found.error).all())
        assert found.integration_error.max() <= tolerance
        assert abs(found.mean - float(exact.mean())) < found.mean_error
    assert worst[-1] < 0.01 < worst[0]  # there was something to cover


def test_more_points_are_spent_where_they_are_needed_alone() -> None:
    """A picture gets what it gets in other company."""
    mixture = clusters(3, 1, 0.1)
    x0, _ = drawn_in_turn(mixture, 12)
    denoise = quickly(mixture)
    together = bits_per_dimension(denoise, Karras(), x0, reading=Noised())
    assert len(together.evaluations.unique()) > 1
    parts = [
        bits_per_dimension(denoise, Karras(), x0[n : n + 4], reading=Noised(), first=n)
        for n in range(0, 12, 4)
    ]
    for name in ("bits", "integration_error", "evaluations", "products"):
        apart = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(getattr(together, name), apart, rtol=1e-6, atol=1e-9)


def test_a_tolerance_out_of_reach_is_owned_up_to() -> None:
    mixture = clusters(3, 1, 0.02)
    x0, _ = drawn_in_turn(mixture, 6)
    found = bits_per_dimension(quickly(mixture), Karras(), x0, reading=Noised(), tolerance=1e-14)
    assert bool((found.integration_error > 1e-14).any())
    assert int(found.evaluations.max()) == sum(6 * points + 8 for points in GRIDS)


# --- probes -------------------------------------------------------------------------------------


def test_probes_are_unbiased_and_their_error_is_what_it_says() -> None:
    oracle = power_law_field(2.0, 8, 8, spread=0.5)
    x0 = drawn(oracle, 200)
    exact = bits_per_dimension(oracle, Karras(), x0, reading=Noised(), batch_size=MANY)
    found = bits_per_dimension(
        oracle, Karras(), x0, reading=Noised(), num_probes=8, batch_size=MANY
    )
    off = found.bits - exact.bits
    assert abs(off.mean()) < 3 * off.std() / math.sqrt(200)
    stated = found.probe_error.square().mean().sqrt()
    assert float(off.square().mean().sqrt() / stated) == pytest.approx(1.0, abs=0.15)
    assert (found.probes, exact.probes) == (8, 0)
    # the mean's own estimate leans on the pictures' independence
    assert abs(float(off.mean())) < 3 * float(stated) / math.sqrt(200)
    assert found.mean_error < float(found.error.mean()) / 3


def test_as_many_probes_as_values_are_the_exact_trace() -> None:
    oracle = power_law_field(2.0, 2, 3, spread=0.5)
    x0 = drawn(oracle, 3)
    exact = bits_per_dimension(oracle, Karras(), x0, reading=Noised())
    for many in (6, 100):
        found = bits_per_dimension(oracle, Karras(), x0, reading=Noised(), num_probes=many)
        torch.testing.assert_close(found.bits, exact.bits)
        assert found.probes == 0
    assert int(exact.products[0]) == 6 * (GRIDS[0] + GRIDS[1] + 2)


def test_large_pictures_take_probes_by_themselves() -> None:
    large = white(torch.zeros(1, 16, 17), 0.3)
    found = bits_per_dimension(large, Karras(), drawn(large, 2), reading=Noised())
    assert found.probes == 8
    # J is a multiple of I there, so that every probe is exact
    assert found.probe_error.max() < 1e-12


@pytest.mark.parametrize("probes", [None, 3])
def test_batches_and_positions_change_nothing(probes: int | None) -> None:
    mixture = clusters(2, 2, 0.3)
    x0, label = drawn_in_turn(mixture, 5)

    def bits(pictures: slice, batch_size: int) -> Tensor:
        return bits_per_dimension(
            *(mixture, Karras(), x0[pictures], label[pictures]),
            reading=Noised(),
            num_probes=probes,
            tolerance=1.0,
            first=pictures.start,
            batch_size=batch_size,
        ).bits

    whole = bits(slice(0, 5), 64)
    torch.testing.assert_close(bits(slice(0, 5), 3), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bits(slice(4, 5), 1), whole[4:], rtol=1e-9, atol=1e-9)


def test_what_is_counted_is_what_is_done() -> None:
    """One picture at a time, so that a call is an evaluation and a backward pass a product."""
    oracle = power_law_field(2.0, 2, 2, spread=0.5)
    calls, backward = [0], [0]

    def counting(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        calls[0] += 1
        estimate = oracle(x, level)
        if estimate.requires_grad:
            estimate.register_hook(lambda g: backward.__setitem__(0, backward[0] + 1))
        return estimate

    seen: list[tuple[int, int]] = []
    found = bits_per_dimension(
        *(counting, Karras(), drawn(oracle, 1)),
        reading=Clean(),
        batch_size=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert calls[0] == int(found.evaluations[0])
    assert backward[0] == int(found.products[0])
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))


@pytest.mark.parametrize(("pictures", "probes", "batch_size"), [(2, 8, 64), (5, 6, 20), (5, 3, 4)])
def test_every_picture_that_goes_through_the_denoiser_is_counted(
    pictures: int, probes: int, batch_size: int
) -> None:
    """Small batches are repeated for the trace, and some pictures need more grids than others."""
    mixture = clusters(3, 4, 0.05)
    x0, _ = drawn_in_turn(mixture, pictures)
    rows = [0]

    def counting(x: Tensor, level: NoiseLevel, label: Tensor | None) -> Tensor:
        assert len(x) <= batch_size
        rows[0] += len(x)
        return mixture(x, level)

    options = {"num_probes": probes, "batch_size": batch_size, "tolerance": 0.2}
    found = bits_per_dimension(counting, Karras(), x0, reading=Clean(), **options)  # type: ignore[arg-type] # by name
    assert int(found.evaluations.sum()) == rows[0]


# --- readings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "ratio"), [(17, 0.03), (17, 0.4), (256, 0.002)])
def test_the_comb_is_the_sum_over_all_grey_values(levels: int, ratio: float) -> None:
    u = torch.linspace(-1.0 - 3 * ratio, 1.0 + 3 * ratio, 400, dtype=torch.float64)
    grey = torch.linspace(-1, 1, levels, dtype=torch.float64)
    whole = torch.distributions.Normal(grey, ratio).log_prob(u[:, None]).logsumexp(1)
    torch.testing.assert_close(Grid(levels).log_comb(u, ratio), whole, rtol=1e-9, atol=1e-9)


def test_sixteen_bits_are_summed_by_an_integral() -> None:
    u = torch.linspace(-1.004, 1.004, 101, dtype=torch.float64)
    grey = torch.linspace(-1, 1, 2**16, dtype=torch.float64)
    whole = torch.distributions.Normal(grey, 0.002).log_prob(u[:, None]).logsumexp(1)
    torch.testing.assert_close(Grid(2**16).log_comb(u, 0.002), whole, rtol=0, atol=1e-4)


def test_grey_values_of_known_probability() -> None:
    """Two pixels of three grey values, dependent: where the noise hides nothing the bits are those
    of the table; where it does they lie above, on average."""
    table = {(-1, -1): 5, (-1, 0): 1, (0, 0): 2, (1, 1): 1, (1, -1): 1}
    pictures = torch.tensor(list(table), dtype=torch.float64).reshape(-1, 1, 1, 2)
    counts = torch.tensor(list(table.values()))
    oracle = FiniteSet(pictures.repeat_interleave(counts, 0))
    exact = -(counts / counts.sum()).log2().double() / 2

    def bits(low: float, times: int) -> Tensor:
        x0 = pictures.repeat(times, 1, 1, 1)
        found = bits_per_dimension(
            *(oracle, Karras(), x0), reading=Grid(3), low=low, tolerance=2e-3, batch_size=MANY
        )
        return found.bits.reshape(times, -1)

    torch.testing.assert_close(bits(0.1, 1)[0], exact, rtol=0, atol=2e-3)
    gaps = bits(0.4, 16).mean(0) - exact
    assert 0.02 < float((gaps * counts).sum() / counts.sum()) < 0.5


def test_bytes_of_smooth_data_have_the_probability_of_their_cell() -> None:
    """Both dequantisers; the uniform one is the density plus log2(127.5)."""
    oracle = white(torch.full((1, 2, 4), 0.1), 0.25)
    wide = drawn(oracle, 64)
    cell = 2 / 255
    x0 = (((wide + 1) / cell).round().clamp(0, 255) * cell - 1).clamp(-1, 1)
    law = torch.distributions.Normal(0.1, 0.25)
    mass = law.cdf(x0 + cell / 2) - law.cdf(x0 - cell / 2)
    exact = float(-mass.log2().mean())
    grid = bits_per_dimension(oracle, Karras(), x0, reading=Grid(256), low=cell, tolerance=1e-3)
    uniform = bits_per_dimension(oracle, Karras(), x0, reading=Uniform(256), tolerance=1e-3)
    for found in (grid, uniform):
        assert found.mean == pytest.approx(exact, abs=0.003)
    u = Uniform(256).point(x0, 0.002, 0, range(64)).u
    assert float((u - x0).abs().max()) <= cell / 2
    density = bits_per_dimension(oracle, Karras(), u, reading=Clean(), tolerance=1e-3)
    torch.testing.assert_close(uniform.bits, density.bits + math.log2(127.5), rtol=1e-9, atol=1e-9)
    assert Grid(256).low == pytest.approx(0.002, rel=0.02)


def test_readings_are_found_out() -> None:
    digits = images.load("digits").train
    assert digits.bits == 32
    assert reading_of(digits.fixed()[0], digits.bits) == Grid(17)
    numbers = torch.linspace(-1, 1, 64).square().reshape(1, 1, 8, 8)
    assert reading_of(numbers, 32) == Noised()
    assert reading_of(2 * digits.fixed()[0], 32) == Noised()  # outside [-1, 1]
    assert reading_of(numbers, 8) == Grid(256)
    assert reading_of(numbers, 16) == Grid(2**16)
    assert Grid(17).low == pytest.approx(0.125 / 4)


# --- from losses --------------------------------------------------------------------------------


def mmse(oracle: Gaussian, ratios: Tensor) -> Tensor:
    return torch.stack([oracle.mmse(at(ratio)) for ratio in ratios.tolist()])


def entropy(oracle: Gaussian, ratio: float) -> float:
    variance = oracle.eigenvalues + ratio**2
    return float((2 * math.pi * math.e * variance).log2().mean() / 2)


@pytest.mark.parametrize("exponent", [0.0, 2.0, 3.0])
def test_the_bound_of_the_least_errors_is_the_entropy(exponent: float) -> None:
    oracle = power_law_field(exponent, 8, 8, spread=0.5)
    ratios = torch.linspace(math.log(0.002), math.log(80.0), 28).double().exp()
    found = bound_from_errors(ratios, mmse(oracle, ratios))
    assert float(found.noised) == pytest.approx(entropy(oracle, 0.002), abs=1e-4)
    assert float(found.clean) == pytest.approx(entropy(oracle, 0.0), abs=1e-4)


def test_worse_errors_bound_by_what_they_cost() -> None:
    """Errors 2 % above the least cost 0.02 * the integral of least error / s^2 over ln s."""
    oracle = power_law_field(2.0, 8, 8, spread=0.5)
    ratios = torch.linspace(math.log(0.05), math.log(80.0), 200).double().exp()
    least = mmse(oracle, ratios)
    cost = bound_from_errors(ratios, 1.02 * least).noised - bound_from_errors(ratios, least).noised
    values = oracle.eigenvalues
    integral = ((1 + values / 0.05**2) / (1 + values / 80.0**2)).log().mean() / 2
    assert float(cost) == pytest.approx(float(0.02 * integral / math.log(2)), rel=0.01)


def test_the_bound_of_single_pictures_is_their_own_density() -> None:
    """With the expectation over the noise in closed form: E |x - D|^2 along every direction."""
    oracle = power_law_field(2.0, 4, 4, spread=0.5)
    x0 = drawn(oracle, 5)
    ratios = torch.linspace(math.log(0.002), math.log(80.0), 40).double().exp()
    along = (x0.flatten(1) @ oracle.eigenvectors).square()
    s2, values = ratios.square()[:, None, None], oracle.eigenvalues
    error = (s2**2 * along + values**2 * s2) / (values + s2) ** 2
    found = bound_from_errors(ratios, error.mean(2))
    exact = in_bits(oracle.log_density(x0, clean()), x0)
    torch.testing.assert_close(found.clean, exact, rtol=0, atol=1e-3)


# --- a network ----------------------------------------------------------------------------------

FIELD = power_law_field(2.0, 8, 8, spread=0.5)


class Filters(nn.Module):
    """A linear filter per noise level, mixed from 32: all that this data needs, and quick."""

    def __init__(self) -> None:
        super().__init__()
        self.told = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32))
        self.filters = nn.Parameter(torch.zeros(32, 64, 64))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
        shares = self.told(timestep[:, None])
        return torch.einsum("bk,kij,bj->bi", shares, self.filters, x.flatten(1)).reshape(x.shape)


def seeded(make: Callable[[], nn.Module]) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(make(), Karras(), KarrasPrecond(0.5))


def train_on_field(denoiser: Denoiser, steps: int, batch: int = 64) -> None:
    """By the product's loss, on pictures drawn anew at every step."""
    assert isinstance(denoiser.net, nn.Module)
    optimiser = torch.optim.Adam(denoiser.net.parameters(), 1e-2, (0.9, 0.99))
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps, pct_start=0.1)
    levels = LogUniform(0.03, 8.0)
    for step in range(steps):
        places = range(step * batch, (step + 1) * batch)
        x0 = FIELD.draw(keyed_normal(1, Stream.AUGMENT, places, (1, 8, 8)))
        noise = keyed_normal(1, Stream.NOISE, places, (1, 8, 8))
        u = torch.from_numpy(keyed_uniform(1, Stream.LEVEL, places, 1))[:, 0]
        optimiser.zero_grad()
        denoiser.loss(x0, noise, levels(denoiser.schedule, u).like(x0)).mean().backward()
        optimiser.step()
        decay.step()


def beside(denoiser: Denoiser) -> BesideExact:
    x0 = drawn(FIELD, 16, seed=5).float()
    return beside_exact(
        *(denoiser, denoiser.schedule, FIELD.log_density, x0), tolerance=0.01, batch_size=256
    )


def test_a_trained_network_is_near_the_exact_value_and_an_untrained_one_is_not() -> None:
    denoiser = seeded(Filters)
    assert beside(denoiser).excess > 0.15
    train_on_field(denoiser, 300)
    found = beside(denoiser)
    assert abs(found.excess) < 0.05
    assert found.bits == pytest.approx(found.exact + found.excess)
    assert found.standard_error is not None
    assert found.error < 0.01


def test_a_unet_is_differentiated_where_gradients_are_off_and_keeps_none() -> None:
    """Float32 beside float64: rounding is far below what the estimates speak of."""
    spec = UNetSpec(1, 1, (Conv(4), Res(4), Skip(), Attn(), Concat(), Out()))
    denoiser = seeded(lambda: UNet(spec))
    assert isinstance(denoiser.net, UNet)
    for parameter in denoiser.net.parameters():
        nn.init.normal_(parameter, 0.0, 0.1, generator=torch.Generator().manual_seed(1))
    x0 = drawn(FIELD, 2)

    def bits(x0: Tensor) -> Tensor:
        return bits_per_dimension(
            *(denoiser, denoiser.schedule, x0), reading=Noised(), num_probes=2, tolerance=10.0
        ).bits

    with torch.no_grad():
        single = bits(x0.float())
        denoiser.net.double()
        torch.testing.assert_close(single, bits(x0), rtol=0, atol=1e-4)
    assert all(parameter.grad is None for parameter in denoiser.net.parameters())


# --- what is refused ----------------------------------------------------------------------------

ONE = torch.zeros(1, 1, 1, 2)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "none": (lambda: bits_per_dimension(curl, Karras(), ONE[:0]), "no pictures"),
    "labels": (
        lambda: bits_per_dimension(curl, Karras(), ONE, torch.zeros(2, dtype=torch.int64)),
        "as many labels; got 2",
    ),
    "probes": (lambda: bits_per_dimension(curl, Karras(), ONE, num_probes=1), "num_probes .* 1"),
    "tolerance": (lambda: bits_per_dimension(curl, Karras(), ONE, tolerance=0.0), "above 0; .* 0"),
    "batch": (lambda: bits_per_dimension(curl, Karras(), ONE, batch_size=0), "batch_size .* 0"),
    "ends": (lambda: bits_per_dimension(curl, Karras(), ONE, low=1.0, high=0.5), "0 < low < high"),
    "range": (
        lambda: bits_per_dimension(curl, Karras(), ONE, low=100.0, high=200.0),
        "no noise levels between 100.0 and 200.0",
    ),
    "off the grid": (
        lambda: bits_per_dimension(curl, Karras(), ONE + 0.3, reading=Grid(3)),
        "3 levels per value .* 0.3 spacings",
    ),
    "beyond the grid": (
        lambda: bits_per_dimension(curl, Karras(), ONE + 2.0, reading=Uniform(3)),
        "3 levels per value .* 1 spacings",
    ),
    "grid": (lambda: Grid(1), "2 levels; got 1"),
    "ratios": (lambda: bound_from_errors(torch.tensor([1.0, 1.0, 2.0]), torch.ones(3)), "rising"),
    "few": (lambda: bound_from_errors(torch.tensor([1.0, 2.0]), torch.ones(2)), "at least three"),
    "rows": (lambda: bound_from_errors(torch.tensor([1.0, 2.0, 3.0]), torch.ones(2)), "2 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        call()
