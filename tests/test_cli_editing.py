"""`denoise`, `inpaint`, `edit`, `interpolate`, as commands and as functions, on one tiny run."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import undiffuse
from tiny_world import SIZE, World, make_world, spoil
from undiffuse import editing, images, runs
from undiffuse.checkpoint import Model, Pictures
from undiffuse.cli import main
from undiffuse.denoiser import Denoiser, KarrasPrecond, Velocity
from undiffuse.errors import ConfigError, DataError, ResourceError
from undiffuse.noise import (
    Cosine,
    Karras,
    LinearBetas,
    Schedule,
    Stream,
    keyed_normal,
)
from undiffuse.oracles import Gaussian, fit_gaussian
from undiffuse.recipes import preset
from undiffuse.unet import UNet

DAY = "{pictures}/day/00.png"
QUICK = "--num-inference-steps 3 --output-dir new"
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    spoil(made)
    _draw(made.root)
    return made


def _draw(root: Path) -> None:
    Image.new("L", (SIZE, SIZE), 0).save(root / "black.png")
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (2, 3, 6, 8))
    mask.save(root / "mask.png")
    Image.new("L", (SIZE, SIZE + 1), 255).save(root / "wide.png")
    pixels = torch.linspace(-1, 1, 3 * 40 * 21).reshape(3, 40, 21)
    images.save_image(pixels, root / "large.png")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ask(world: World, capsys: pytest.CaptureFixture[str]) -> Ask:
    """A command with --json that succeeds: its one object."""

    def answer(line: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*world.words(line), "--json"]) == 0, capsys.readouterr().err
        (only,) = capsys.readouterr().out.splitlines()
        return json.loads(only)

    return answer


@pytest.fixture(scope="module")
def model(world: World) -> Model:
    return undiffuse.load(world.run, device="cpu")


@pytest.fixture(scope="module")
def day(world: World) -> Tensor:
    return images.read(world.pictures / "day" / "00.png", 3)


def knowing(oracle: Gaussian, schedule: Schedule | None = None) -> Model:
    """A model whose network is an oracle in disguise."""
    channels, height, width = oracle.mean.shape
    spec = preset("tiny", channels)
    net = _Knowing(spec, oracle)
    denoiser = Denoiser(net, schedule or Karras(), KarrasPrecond(0.5))
    return Model(denoiser, Pictures(height, width, channels))


class _Knowing(UNet):
    def __init__(self, spec: undiffuse.UNetSpec, oracle: Gaussian) -> None:
        super().__init__(spec)
        self.oracle, self.prediction = oracle, KarrasPrecond(0.5)

    def forward(self, x: Tensor, timestep: Tensor, *others: Any) -> Tensor:
        """The raw output at which `KarrasPrecond` gives the oracle's estimate, of any size."""
        sigma = (4 * timestep.double()).exp().reshape(-1, 1, 1, 1)
        level = Karras().at(sigma)
        k = self.prediction(level)
        noisy = x.double() / k.c_in
        return ((self.oracle(noisy, level) - k.c_skip * noisy) / k.c_out).float()


def stripes() -> Gaussian:
    """Pictures of 1x8x8 with smooth columns."""
    places = torch.arange(8.0, dtype=torch.float64)
    line = torch.exp(-(places[:, None] - places).abs() / 4)
    return Gaussian.from_covariance(torch.zeros(1, 8, 8), 0.2 * torch.kron(line, line))


# --- denoise ------------------------------------------------------------------------------------


def test_noise_is_estimated_where_none_is_stated(ask: Ask, world: World, model: Model) -> None:
    (one,) = ask("denoise {run} {root}/large.png --output-dir new")["files"]
    assert one["estimated"]
    picture = images.read(world.root / "large.png", 3)
    assert one["sigma"] == pytest.approx(runs.estimate_sigma(model, picture), rel=1e-6)
    (told,) = ask(f"denoise {{run}} {{root}}/large.png --sigma {one['sigma']} --output-dir b")[
        "files"
    ]
    assert not told["estimated"]
    assert Path(told["file"]).read_bytes() == Path(one["file"]).read_bytes()


@pytest.mark.parametrize("schedule", [Karras(), Cosine()], ids=str)
def test_an_oracle_finds_the_noise_of_one_small_picture(schedule: Schedule) -> None:
    """64 values cannot tell it closer than by 9 %; the mean of some pictures can."""
    oracle = stripes()
    model = knowing(oracle, schedule)
    clean = oracle.draw(keyed_normal(0, Stream.NOISE, range(12), (1, 8, 8)))
    noise = keyed_normal(1, Stream.NOISE, range(12), (1, 8, 8))
    found = [runs.estimate_sigma(model, one) for one in clean + 0.3 * noise]
    assert math.prod(found) ** (1 / 12) == pytest.approx(0.3, rel=0.1)
    assert all(0.15 < one < 0.6 for one in found)
    cleaned = runs.denoise_pictures(model, list((clean + 0.3 * noise).unbind()))
    after = torch.stack([one.picture for one in cleaned])
    assert float((after - clean.clamp(-1, 1)).square().mean()) < 0.5 * 0.09


def test_crops_lie_within_and_spread() -> None:
    picture = torch.arange(3.0 * 90 * 200).reshape(3, 90, 200)
    crops = runs._editing._crops(picture, 32, 32)
    assert crops.shape == (5, 3, 32, 32)  # 2^14 values
    tops, lefts = (crops[:, 0, 0, 0] // 200).long(), (crops[:, 0, 0, 0] % 200).long()
    assert int(tops.min()) < 10
    assert int(tops.max()) > 45
    assert int(lefts.max() - lefts.min()) > 80
    whole = runs._editing._crops(picture[:, :20, :10], 32, 32)
    assert torch.equal(whole, picture[None, :, :20, :10])


def test_a_clean_picture_gives_figures_and_a_comparison(ask: Ask, world: World) -> None:
    pytest.importorskip("skimage", reason="the extra `compare` is optional")
    line = "denoise {run} {pictures}/day/00.png --add-noise --sigma 0.3 --compare --output-dir new"
    (one,) = ask(line)["files"]
    names = ["noisy", "denoised", "wiener", "trained wiener", "nlm"]
    assert list(one["judged"]) == names
    assert one["comparison"]["pictures"] == [*names, "clean"]
    with Image.open(one["comparison"]["file"]) as sheet:
        assert sheet.width == 6 * 64 + 5
    clean = images.read(world.pictures / "day" / "00.png", 3)[None]
    kept = images.read(one["file"], 3)[None]
    assert one["psnr_denoised"] == pytest.approx(float(editing.psnr(kept, clean)), abs=0.1)
    assert one["ssim_denoised"] == pytest.approx(float(editing.ssim(kept, clean)), abs=0.01)
    assert one["judged"]["nlm"]["psnr"] > one["psnr_noisy"]


def test_a_clean_file_beside_a_noisy_one(ask: Ask, world: World) -> None:
    line = "denoise {run} {pictures}/day/00.png --add-noise --sigma 0.2 --output-dir new"
    (first,) = ask(line)["files"]
    line = f"denoise {{run}} {first['noisy']} --clean {{pictures}}/day/00.png --sigma 0.2"
    (again,) = ask(f"{line} --output-dir other")["files"]
    assert again["psnr_noisy"] == pytest.approx(first["psnr_noisy"], abs=0.1)
    assert "noisy" not in again


def test_the_table_is_printed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    line = "denoise {run} {pictures}/day/00.png --add-noise --output-dir new --quiet"
    assert main(world.words(line)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "new/00_denoised.png  sigma 0.2, as stated"
    assert [row.split()[:1] for row in said[1:]] == [["PSNR"], ["noisy"], ["denoised"]]


@pytest.mark.parametrize("grey", [True, False])
def test_filters_remove_noise_and_keep_the_picture_upright(grey: bool) -> None:
    pytest.importorskip("skimage", reason="the extra `compare` is optional")
    clean = torch.full((1 if grey else 3, 24, 32), -0.5)
    clean[:, 4:20, 4:8] = 0.5
    noisy = clean + 0.2 * keyed_normal(0, Stream.NOISE, range(1), tuple(clean.shape))[0]
    fitted = fit_gaussian(clean + torch.linspace(-0.1, 0.1, 9).reshape(-1, 1, 1, 1))
    made = runs.filters(noisy, 0.2, fitted)
    assert list(made) == ["wiener", "trained wiener", "nlm"]
    before = float(editing.psnr(noisy[None], clean[None]))
    for one in made.values():
        assert float(editing.psnr(one[None], clean[None])) > before + 2
    assert list(runs.filters(noisy[:, :20], 0.2, fitted)) == ["wiener", "nlm"]  # another size


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_filters_take_a_single_line(size: tuple[int, int]) -> None:
    pytest.importorskip("skimage", reason="the extra `compare` is optional")
    noisy = keyed_normal(0, Stream.NOISE, range(1), (3, *size))[0]
    for one in runs.filters(noisy, 0.2).values():
        assert one.shape == noisy.shape
        assert bool(one.isfinite().all())


def test_without_scikit_image_compare_names_the_extra(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    line = "denoise {run} {pictures}/day/00.png --compare --output-dir new"
    assert main(world.words(line)) == 2
    assert "undiffuse[compare]" in capsys.readouterr().err
    assert not Path("new").exists()


def within_range() -> Gaussian:
    """`stripes`, so weak that next to nothing leaves the range of pictures."""
    return replace(stripes(), eigenvalues=stripes().eigenvalues * 0.16)


def test_a_draw_from_the_posterior_keeps_what_the_mean_smooths() -> None:
    """Twice the error, and the variance of the data."""
    oracle = within_range()
    model = knowing(oracle)
    clean = oracle.draw(keyed_normal(0, Stream.NOISE, range(24), (1, 8, 8)))
    noisy = clean + 0.3 * keyed_normal(1, Stream.NOISE, range(24), (1, 8, 8))

    def cleaned(**options: Any) -> Tensor:
        made = runs.denoise_pictures(model, list(noisy.unbind()), 0.3, **options)
        return torch.stack([one.picture for one in made])

    mean, drawn = cleaned(), cleaned(num_inference_steps=12)
    error, twice = (float((one - clean).square().mean()) for one in (mean, drawn))
    assert twice / error == pytest.approx(2.0, rel=0.2)
    assert float(drawn.var()) == pytest.approx(float(clean.var()), rel=0.15)
    assert float(mean.var()) < 0.75 * float(clean.var())
    few = [noisy[0]] * 2
    again, other = (
        [
            one.picture
            for one in runs.denoise_pictures(model, few, 0.3, seed=n, num_inference_steps=12)
        ]
        for n in (0, 1)
    )
    assert torch.equal(again[0], drawn[0])
    assert not torch.equal(again[1], again[0])  # picture n depends on (seed, n)
    assert not torch.equal(other[0], again[0])


@pytest.mark.parametrize("schedule", [Karras(), Cosine(), LinearBetas()], ids=str)
def test_down_to_the_least_noise_a_draw_is_near_the_picture(schedule: Schedule) -> None:
    """No room for a sampler means one evaluation; a little more room is enough for a grid."""
    model, least = knowing(within_range(), schedule), float(schedule.at(torch.zeros(())).ratio)
    picture = within_range().draw(keyed_normal(0, Stream.NOISE, range(1), (1, 8, 8)))[0]
    for sigma in (least, 1.9 * least, 2.1 * least, 10 * least):
        drawn, mean = (
            runs.denoise_pictures(model, [picture], sigma, num_inference_steps=steps)[0].picture
            for steps in (20, None)
        )
        assert torch.equal(drawn, mean) == (sigma < 2 * least)
        assert float((drawn - mean).square().mean().sqrt()) < 1.5 * sigma
    with pytest.raises(ConfigError, match="num_inference_steps must be at least 1; got 0"):
        runs.denoise_pictures(model, [picture], least, num_inference_steps=0)


def test_an_estimate_at_the_end_of_the_schedule_is_one_that_the_model_knows() -> None:
    """Of a clean picture; these ends come back from the logarithm a rounding too low."""
    picture, refused = torch.zeros(1, 8, 8), 0
    for least in torch.linspace(0.011, 0.05, 12).tolist():
        model = knowing(stripes(), Karras(sigma_min=least))
        ((cleaned, sigma),) = runs.denoise_pictures(model, [picture])
        assert sigma == pytest.approx(least, rel=1e-12)
        assert cleaned.shape == picture.shape
        refused += math.exp(math.log(least)) < least
    assert refused > 0


def test_a_large_picture_is_cut_and_a_small_one_is_not(world: World, model: Model) -> None:
    seen: list[tuple[int, ...]] = []
    hook = model.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0].shape))
    picture = images.read(world.root / "large.png", 3)
    sizes: dict[int | None, set[tuple[int, int]]] = {}
    made: dict[int | None, Tensor] = {}
    for tile in (None, 0, 24):
        seen.clear()
        (cleaned,) = runs.denoise_pictures(model, [picture], 0.3, tile=tile)
        made[tile], sizes[tile] = cleaned.picture, {(s[2], s[3]) for s in seen}
    hook.remove()
    assert sizes == {None: {(16, 16)}, 0: {(40, 24)}, 24: {(24, 24)}}
    assert all(one.shape == picture.shape for one in made.values())
    assert float((made[24] - made[0]).abs().mean()) < 0.05


def test_a_picture_that_fits_nowhere_in_one_piece(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs._editing.forward_bytes(model, 40, 21)
    assert whole == runs._editing.forward_bytes(model, 40, 24)  # as padded
    assert 2 < runs._editing.forward_bytes(model, 80, 48) / whole < 4.1
    monkeypatch.setattr("undiffuse.runtime.memory", lambda device: whole - 1)
    picture = torch.zeros(3, 40, 21)
    with pytest.raises(ResourceError, match=r"40x21 in one piece needs about .* another tile"):
        runs.denoise_pictures(model, [picture], 0.3, tile=0)
    runs.denoise_pictures(model, [picture], 0.3)


# --- inpaint ------------------------------------------------------------------------------------


def test_inpaint_fills_the_white_and_keeps_the_rest(ask: Ask, world: World) -> None:
    body = ask(f"inpaint {{run}} {{pictures}}/day/00.png {{root}}/mask.png -n 3 {QUICK}")
    sheet, *files = body["files"]
    assert sheet == "new/00_filled.png"
    assert len(files) == 3
    assert body["pixels"] == 20
    hole = images.read(world.root / "mask.png", 1)[0] > 0
    picture = images.read(world.pictures / "day" / "00.png", 3)
    made = torch.stack([images.read(file, 3) for file in files])
    assert torch.equal(made[:, :, ~hole], picture[:, ~hole].expand(3, -1, -1))
    assert float((made[0] - made[1]).abs().max()) > 0.02
    with Image.open(sheet) as grid:
        assert grid.width == 4 * 64 + 3


@pytest.mark.parametrize("options", [{}, {"num_resamples": 2}], ids=["moments", "repaint"])
def test_a_result_depends_on_its_own_number_alone(
    model: Model, day: Tensor, options: dict[str, int]
) -> None:
    hole = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    hole[2:6, 2:6] = True
    few = {"num_inference_steps": 3, **options}
    three = undiffuse.inpaint(model, day, hole, 3, batch_size=2, **few)
    one = undiffuse.inpaint(model, day, hole, 1, **few)
    torch.testing.assert_close(one, three[:1], rtol=0, atol=1e-4)
    assert not torch.equal(undiffuse.inpaint(model, day, hole, 1, seed=1, **few), one)
    assert torch.equal(three[:, :, ~hole], day[:, ~hole].expand(3, -1, -1))


def test_a_label_and_guidance_reach_the_filling(model: Model, day: Tensor) -> None:
    hole = torch.ones(SIZE, SIZE, dtype=torch.bool)
    none, first, second = (
        undiffuse.inpaint(model, day, hole, 1, label=label, num_inference_steps=2)
        for label in (None, [0], [1])
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, none)
    far = undiffuse.inpaint(model, day, hole, 1, label=[0], num_inference_steps=2, guidance_scale=4)
    assert not torch.equal(far, first)


def test_an_oracle_fills_a_hole_with_its_conditional() -> None:
    """One pixel among eight known ones of its row: mean and deviation in closed form."""
    small = within_range()
    model = knowing(small)
    picture = small.draw(keyed_normal(3, Stream.NOISE, range(1), (1, 8, 8)))[0]
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[3:5, 4] = True
    made = undiffuse.inpaint(model, picture, hole, 300, num_inference_steps=16, batch_size=300)
    covariance = (small.eigenvectors * small.eigenvalues) @ small.eigenvectors.mT
    inside = hole.flatten()
    gain = torch.linalg.solve(covariance[~inside][:, ~inside], covariance[~inside][:, inside]).mT
    mean = gain @ picture.flatten()[~inside].double()
    spread = covariance[inside][:, inside] - gain @ covariance[~inside][:, inside]
    found = made.flatten(1)[:, inside].double()
    deviation = spread.diagonal().sqrt()
    assert float(((found.mean(0) - mean) / deviation).abs().max()) < 0.35
    torch.testing.assert_close(found.std(0), deviation, rtol=0.25, atol=0)


# --- edit ---------------------------------------------------------------------------------------


def test_edit_writes_a_sheet_and_every_result(ask: Ask) -> None:
    pictures = "{pictures}/day/00.png {pictures}/night/01.png"
    body = ask(f"edit {{run}} {pictures} --strength 0.4 -n 2 --sampler ddim {QUICK}")
    stems = [Path(file).name for file in body["files"]]
    assert stems == [
        *("00_edited.png", "00_edited_00000.png", "00_edited_00001.png"),
        *("01_edited.png", "01_edited_00000.png", "01_edited_00001.png"),
    ]
    assert body["strength"] == 0.4
    assert 0 < body["sigma"] < 80


def test_strength_0_is_the_picture_and_1_is_sampling(model: Model, day: Tensor) -> None:
    few: dict[str, Any] = {"num_inference_steps": 4, "label": [0, 1], "seed": 3}
    assert torch.equal(undiffuse.edit(model, day, 0.0, 2, **few), day.expand(2, -1, -1, -1))
    sampled = undiffuse.generate(model, 2, **few)
    assert torch.equal(undiffuse.edit(model, day, 1.0, 2, **few), sampled)
    half = undiffuse.edit(model, day, 0.5, 2, **few)
    assert not torch.equal(half, sampled)
    assert runs.strength_sigma(model, 1.0, 4) == pytest.approx(80)
    assert runs.strength_sigma(model, 0.0, 4) == 0.0


def test_at_strength_1_no_class_is_what_sampling_does_only_if_told(
    model: Model, day: Tensor
) -> None:
    """`generate` takes the classes in turn where none is named."""
    few: dict[str, Any] = {"num_inference_steps": 3}
    edited = undiffuse.edit(model, day, 1.0, 2, **few)
    assert torch.equal(edited, undiffuse.generate(model, 2, label=[2, 2], **few))  # "no class"
    assert not torch.equal(edited, undiffuse.generate(model, 2, **few))


def test_every_option_that_decides_how_pictures_are_made_reaches_the_sampler(
    monkeypatch: pytest.MonkeyPatch, world: World, ask: Ask
) -> None:
    seen: list[dict[str, Any]] = []

    def generate(model: Model, count: int, **options: Any) -> Tensor:
        seen.append(options)
        return torch.zeros(count, 3, SIZE, SIZE)

    monkeypatch.setattr(runs._editing, "generate", generate)
    monkeypatch.setattr(runs._generate, "generate", generate)
    how = (
        "--seed 5 --num-inference-steps 3 --guidance-scale 2 --guidance-low 0.5 --guidance-high 4"
        " --batch-size 7 --mixed-precision no --class-label day --output-dir new"
    )
    for line in (
        f"inpaint {{run}} {DAY} {{root}}/mask.png {how}",
        f"edit {{run}} {DAY} {how}",
        f"sample {{run}} {how}",
    ):
        ask(line)
        for name, value in {
            "seed": 5,
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "guidance_interval": (0.5, 4.0),
            "batch_size": 7,
            "mixed_precision": "no",
        }.items():
            assert seen[-1][name] == value, (line, name)
    assert len(seen) == 3


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 0), (0.3, 2), (0.5, 2), (0.51, 3), (1, 4)])
def test_only_the_share_of_the_steps_is_taken(
    model: Model, day: Tensor, strength: float, steps: int
) -> None:
    calls: list[int] = []
    hook = model.net.register_forward_pre_hook(lambda net, inputs: calls.append(1))
    undiffuse.edit(model, day, strength, 1, num_inference_steps=4)
    hook.remove()
    assert len(calls) == steps


# --- interpolate --------------------------------------------------------------------------------


def test_seeds_end_at_their_samples(model: Model) -> None:
    few: dict[str, Any] = {"num_inference_steps": 4}
    made = undiffuse.interpolate(model, 3, 8, 5, label=1, batch_size=2, **few)
    assert made.shape == (5, 3, SIZE, SIZE)
    for end, seed in ((made[0], 3), (made[-1], 8)):
        alone = undiffuse.generate(model, 1, seed=seed, label=[1], sampler="heun", **few)[0]
        torch.testing.assert_close(end, alone, rtol=0, atol=1e-4)
    steps = (made[1:] - made[:-1]).flatten(1).norm(dim=1)
    assert float(steps.max()) < float((made[0] - made[-1]).norm())


def test_pictures_end_at_themselves(ask: Ask) -> None:
    ends = "{pictures}/day/00.png {pictures}/night/01.png"
    body = ask(f"interpolate {{run}} {ends} -n 4 --num-inference-steps 12 --film webp")
    assert [Path(file).name for file in body["files"]] == ["00_to_01.png", "00_to_01.webp"]
    assert len(body["psnr_of_ends"]) == 2
    assert min(body["psnr_of_ends"].values()) > 30
    with Image.open(body["files"][1]) as film:
        assert 2 <= film.n_frames <= 6  # there and back


def test_the_way_of_an_oracle_is_that_of_its_flow() -> None:
    """A Gaussian's flow is linear: what is between two pictures lies in their plane."""
    small = within_range()
    a, b = small.draw(keyed_normal(3, Stream.NOISE, range(2), (1, 8, 8)))
    made = undiffuse.interpolate(knowing(small), a, b, 5, num_inference_steps=24).flatten(1)
    plane = torch.stack((a.flatten(), b.flatten())).mT
    weights = torch.linalg.lstsq(plane, made.mT).solution
    assert float((plane @ weights - made.mT).abs().max()) < 0.02
    torch.testing.assert_close(weights[:, 0], torch.tensor([1.0, 0.0]), rtol=0, atol=0.02)
    assert float((weights[0] - weights[1].flip(0)).abs().max()) < 0.02
    assert float(weights[0, 2]) > 0.55  # a straight line would have 0.5


def test_a_seed_and_a_picture(ask: Ask) -> None:
    body = ask(f"interpolate {{run}} 5 {{pictures}}/day/00.png --class-label day {QUICK}")
    assert [Path(file).name for file in body["files"]] == ["5_to_00.png"]
    assert body["num_images"] == 8
    assert len(body["psnr_of_ends"]) == 1


# --- refusals -----------------------------------------------------------------------------------

REFUSED = {
    f"denoise {{run}} {DAY} --add-noise --sigma auto": (2, "add_noise needs --sigma"),
    f"denoise {{run}} {DAY} --add-noise --clean {DAY}": (2, "clean does not go with --add-noise"),
    f"denoise {{run}} {DAY} --clean {DAY} {DAY}": (2, "one picture for each IMAGE, 1; got 2"),
    f"denoise {{run}} {DAY} --clean {{root}}/large.png": (3, "is 40x21, its noisy picture 8x8"),
    f"denoise {{run}} {DAY} --clean nothing.png": (3, "nothing.png"),
    f"denoise {{run}} {DAY} --sigma -0": (2, "sigma must be above 0, or auto; got -0"),
    f"denoise {{run}} {DAY} --num-inference-steps 0": (2, "num_inference_steps", "'0'"),
    f"denoise {{run}} {DAY} --class-label dusk": (2, "class_label 'dusk'", "day, night"),
    f"denoise {{run}} {DAY} --tile -1": (2, "tile", "at least 0", "'-1'"),
    f"denoise {{run}} {DAY} --sigma 0.1 --tile 3": (2, "tile must be 0 or at least 8", "got 3"),
    "denoise {run} {root}/white.png": (3, "white.png"),
    "denoise {run} {root}/black.png": (2, "sigma cannot be estimated", "every value"),
    "inpaint {run}": (2, "IMAGE", "missing"),
    f"inpaint {{run}} {DAY}": (2, "MASK is missing"),
    f"inpaint {{run}} {DAY} nothing.png": (3, "nothing.png"),
    f"inpaint {{run}} {DAY} {{root}}/wide.png": (3, "wide.png is 9x8, the picture 8x8"),
    f"inpaint {{run}} {DAY} {{root}}/black.png": (3, "black.png has no white pixel"),
    "inpaint {run} {root}/large.png {root}/mask.png": (3, "large.png is 40x21", "8x8", "resize"),
    f"inpaint {{run}} {DAY} {{root}}/mask.png --num-resamples 0": (2, "num_resamples", "'0'"),
    f"inpaint {{run}} {DAY} {{root}}/mask.png -n 0": (2, "num_images", "at least 1"),
    f"inpaint {{run}} {DAY} {{root}}/mask.png -n 1000000000000": (7, "num_images", "fewer"),
    f"inpaint {{run}} {DAY} {{root}}/mask.png --guidance-scale 2": (
        *(2, "guidance_scale 2 needs a class label"),
    ),
    f"edit {{run}} {DAY} --strength 1.5": (2, "strength must be in [0, 1]; got 1.5"),
    f"edit {{run}} {DAY} --strength much": (2, "strength", "'much'"),
    f"edit {{run}} {DAY} --sampler euler": (2, "sampler", "ddim", "'euler'"),
    "edit {run} {root}/large.png": (3, "large.png is 40x21", "8x8"),
    "edit {run} {root}/texts/a.png": (3, "a.png"),
    f"edit {{root}}/plain.safetensors {DAY} --class-label day": (2, "without classes"),
    f"edit {{root}}/plain.safetensors {DAY} --guidance-scale 2": (2, "guidance_scale 2"),
    f"img2img {{run}} {DAY}": (2, "'img2img'", "Did you mean edit?"),
    "interpolate {run} 1": (2, "B is missing"),
    "interpolate {run} 1 -2": (2, "seed", "at least 0", "-2"),
    "interpolate {run} 1 2 -n 1": (2, "num_images must be at least 2", "got 1"),
    "interpolate {run} 1 nothing.png": (3, "nothing.png"),
    f"interpolate {{run}} {DAY} {{root}}/large.png": (3, "large.png is 40x21"),
    "interpolate {run} 1 2 --class-label day night": (2, "class_label must be one"),
    "interpolate {run} 1 2 --film mp4": (2, "film", "webp, gif", "'mp4'"),
    "interpolate {run} 1 2 --guidance-scale 2": (2, "guidance_scale 2 needs a class label"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusal(words: str, world: World, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, *said = REFUSED[words]
    line = words if " --output-dir" in words else f"{words} --output-dir new"
    got = main([*world.words(line), "--quiet"])
    stdout, stderr = capsys.readouterr()
    assert got == code, stderr
    (last,) = stderr.splitlines()
    assert last.startswith("undiffuse: ")
    for part in said:
        assert world.put(str(part)) in last
    assert "Traceback" not in stdout + stderr
    assert not stdout
    assert list(here.iterdir()) == []


def test_functions_refuse_pictures_that_do_not_fit(model: Model, day: Tensor) -> None:
    hole = torch.ones(SIZE, SIZE, dtype=torch.bool)
    with pytest.raises(DataError, match=r"shape \(3, 9, 8\).*this model makes \(3, 8, 8\)"):
        undiffuse.edit(model, torch.zeros(3, 9, 8))
    with pytest.raises(DataError, match="1 channels, this model knows pictures of 3"):
        undiffuse.denoise_pictures(model, [torch.zeros(1, 8, 8)])
    with pytest.raises(ConfigError, match="mask is 8x9, the picture 8x8"):
        undiffuse.inpaint(model, day, torch.ones(8, 9, dtype=torch.bool))
    with pytest.raises(ConfigError, match="nothing to fill"):
        undiffuse.inpaint(model, day, ~hole)
    with pytest.raises(ConfigError, match=r"strength must be in \[0, 1\]; got 2"):
        undiffuse.edit(model, day, 2.0)
    with pytest.raises(ConfigError, match="tile must be 0 or at least 8 for this network; got -1"):
        undiffuse.denoise_pictures(model, [day], 0.2, tile=-1)
    with pytest.raises(ConfigError, match="batch_size must be at least 1; got 0"):
        undiffuse.interpolate(model, 1, 2, batch_size=0)
    with pytest.raises(ConfigError, match=r"label must be 1 numbers in 0 \.\.\. 2"):
        undiffuse.denoise_pictures(model, [day], 0.2, label=7)


def test_pictures_with_values_that_are_no_numbers_are_refused(model: Model, day: Tensor) -> None:
    hole = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    hole[2:4, 2:4] = True
    known, unknown = (torch.where(where, math.nan, day) for where in (~hole, hole))
    calls: list[Callable[[], object]] = [
        lambda: undiffuse.denoise_pictures(model, [day, known], 0.2),
        lambda: undiffuse.denoise_pictures(model, [day / 0.0], 0.2),
        lambda: runs.estimate_sigma(model, known),
        lambda: undiffuse.inpaint(model, known, hole),
        lambda: undiffuse.edit(model, known),
        lambda: undiffuse.interpolate(model, 1, known),
    ]
    for call in calls:
        with pytest.raises(DataError, match=r"^picture.* has values that are not finite"):
            call()
    made = undiffuse.inpaint(model, unknown, hole, 1, num_inference_steps=2)  # what nobody looks at
    assert bool(made.isfinite().all())


def test_a_model_that_must_be_told_the_class() -> None:
    net = UNet(preset("tiny", 3).with_classes(2, null=False))
    told = Model(Denoiser(net, Cosine(), Velocity()), Pictures(8, 8, 3, 8, ("a", "b")))
    with pytest.raises(ConfigError, match=r"class_label is missing: .* one of its 2 classes"):
        undiffuse.denoise_pictures(told, [torch.zeros(3, 8, 8)], 0.2)
    (cleaned,) = undiffuse.denoise_pictures(told, [torch.zeros(3, 8, 8)], 0.2, label=1)
    assert cleaned.picture.shape == (3, 8, 8)
    with pytest.raises(ConfigError, match="class_label is missing"):
        undiffuse.interpolate(told, 1, 2)
