"""The compiled kernels against float64, and every way in which there may be none of them.

References are torch's own operations in float64, gradients are autograd's, and linear maps are
checked to be each other's transposes. Tests of the build use small scripts as compilers.
"""

import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from undiffuse import kernels
from undiffuse.errors import ConfigError
from undiffuse.kernels import Act, _build, _library

LAST = torch.channels_last
FLOAT, BF16 = torch.float32, torch.bfloat16
ACTS: dict[Act, Callable[[Tensor], Tensor]] = {
    Act.NONE: lambda u: u,
    Act.SILU: F.silu,
    Act.GELU: F.gelu,
    Act.RELU: F.relu,
}


@pytest.fixture(scope="session")
def usable() -> None:
    reason = kernels.why_not()
    if reason is not None:
        pytest.skip(reason)


native = pytest.mark.usefixtures("usable")


def randn(*shape: int, seed: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def features(*shape: int, seed: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype).contiguous(memory_format=LAST)


def off(got: Tensor, want: Tensor) -> float:
    """Largest difference, in units of the largest value wanted."""
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


# ------------------------------------------------------------------------- norm and activation


class NormCase(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    add: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    act: Act

    def given(self) -> list[Tensor]:
        return [t for t in self[:6] if t is not None]


@st.composite
def norm_cases(draw: st.DrawFn) -> NormCase:
    size = st.integers(1, 9)
    groups = draw(st.integers(1, 5))
    b, h, w, c = draw(st.integers(1, 3)), draw(size), draw(size), groups * draw(st.integers(2, 9))
    dtype, seed = draw(st.sampled_from([FLOAT, BF16])), draw(st.integers(0, 99))
    x = (features(b, c, h, w, seed=seed) * 2 + 1).to(dtype)
    rows = randn(3, b, c, seed=seed + 1).unbind()
    add = rows[0] if draw(st.booleans()) else None
    scale, shift = rows[1:] if draw(st.booleans()) else (None, None)
    weight, bias = randn(2, c, seed=seed + 2).unbind()
    return NormCase(x, weight, bias, add, scale, shift, groups, draw(st.sampled_from(Act)))


def reference(case: NormCase, tensors: list[Tensor]) -> Tensor:
    """The same in float64, from `tensors` in place of `case.given()`."""
    rest = iter(tensors)
    x, weight, bias = next(rest), next(rest), next(rest)
    if case.add is not None:
        x = x + next(rest)[..., None, None]
    u = F.group_norm(x, case.groups, weight, bias, 1e-5)
    if case.scale is not None:
        u = u * (1 + next(rest)[..., None, None]) + next(rest)[..., None, None]
    return ACTS[case.act](u)


def run(case: NormCase) -> tuple[Tensor, Tensor]:
    x, weight, bias, add, scale, shift, groups, act = case
    return kernels.norm_act(x, weight, bias, groups, 1e-5, act, add, scale, shift)


@native
@given(norm_cases())
def test_norm_act_is_group_norm_and_activation(case: NormCase) -> None:
    y, stats = run(case)
    want = reference(case, [t.double() for t in case.given()])
    assert y.dtype == case.x.dtype
    assert y.is_contiguous(memory_format=LAST)
    # float32: the norm of one pixel of two like channels divides by a variance near zero.
    assert off(y, want) < (2**-8 if y.dtype == BF16 else 2e-5)
    assert stats.shape == (len(y), case.groups, 2)


@native
@given(norm_cases())
def test_statistics_are_mean_and_inverse_deviation(case: NormCase) -> None:
    _, stats = run(case)
    x = case.x.double() if case.add is None else case.x.double() + case.add[..., None, None]
    grouped = x.reshape(len(x), case.groups, -1)
    variance = grouped.var(-1, correction=0)
    assert off(stats[..., 0], grouped.mean(-1)) < 1e-5
    assert off(stats[..., 1], (variance + 1e-5).rsqrt()) < 1e-5


@native
@given(norm_cases())
def test_the_same_again_from_kept_statistics(case: NormCase) -> None:
    y, stats = run(case)
    x, weight, bias, add, scale, shift, _, act = case
    assert torch.equal(kernels.norm_act_again(x, stats, weight, bias, act, add, scale, shift), y)


@native
@given(norm_cases())
def test_norm_act_backward_is_autograd(case: NormCase) -> None:
    _, stats = run(case)
    x, weight, bias, add, scale, shift, _, act = case
    dy = features(*x.shape, seed=7, dtype=x.dtype)
    got = kernels.norm_act_backward(dy, x, stats, weight, bias, act, add, scale, shift)
    inputs = [t.double().requires_grad_() for t in case.given()]
    want = torch.autograd.grad(reference(case, inputs), inputs, dy.double())
    assert [g is None for g in got] == [t is None for t in case[:6]]
    # Where terms of size `inverse deviation` cancel, what is left is judged by that size.
    size = float(stats[..., 1].max() * weight.abs().max()) * 10
    for g, wanted in zip([g for g in got if g is not None], want, strict=True):
        close = 2**-7 if g.dtype == BF16 else 2e-5
        floor = max(float(wanted.abs().max()), size)
        assert float((g.double() - wanted).abs().max()) <= close * floor
    assert got.x.dtype == x.dtype
    assert got.x.is_contiguous(memory_format=LAST)


@native
@pytest.mark.parametrize("shape", [(2, 32, 64, 64), (1, 8, 5, 5), (2, 48, 31, 33)])
def test_a_large_mean_cancels_nothing(shape: tuple[int, ...]) -> None:
    x = features(*shape, seed=0) + 100
    one, zero = torch.ones(shape[1]), torch.zeros(shape[1])
    y, _ = kernels.norm_act(x, one, zero, 4, 1e-5, Act.NONE)
    want = F.group_norm(x.double(), 4, eps=1e-5)
    assert float((y - want).abs().max()) < 1.1e-5


@native
def test_one_far_pixel_at_the_start_cancels_nothing() -> None:
    x = features(1, 8, 16, 16, seed=0)
    x[..., 0, 0] = 1e4
    y, _ = kernels.norm_act(x, torch.ones(8), torch.zeros(8), 2, 1e-5, Act.NONE)
    assert off(y, F.group_norm(x.double(), 2, eps=1e-5)) < 1e-6


def activate(u: Tensor, act: Act) -> tuple[Tensor, Tensor]:
    """act(u) and act'(u): a norm whose mean is 0 and deviation 1 by decree, on one pixel each."""
    x, zeros, n = u.reshape(1, -1, 1, 1), torch.zeros(1, u.numel()), u.numel()
    stats = torch.tensor([[[0.0, 1.0]]])
    rest = (torch.ones(n), torch.zeros(n), act, None, zeros, zeros)
    y = kernels.norm_act_again(x, stats, *rest)
    slope = kernels.norm_act_backward(torch.ones_like(x), x, stats, *rest).shift
    assert slope is not None
    return y.reshape(-1), slope.reshape(-1)


@native
@pytest.mark.parametrize("act", Act)
def test_activations_are_right_to_a_millionth(act: Act) -> None:
    u = torch.linspace(-86 if act is Act.SILU else -4.5, 90, 60_001)
    got, slope = activate(u, act)
    exact = u.double().requires_grad_()
    want = ACTS[act](exact)
    (dwant,) = torch.autograd.grad(want.sum(), exact)
    want = want.detach()
    assert float(((got - want).abs() / want.abs().clamp_min(1e-36)).max()) < 1.5e-6
    # A slope passes through zero: absolute there.
    assert float(((slope - dwant).abs() / dwant.abs().clamp_min(1.0)).max()) < 1e-6


@native
@pytest.mark.parametrize("act", Act)
def test_activations_have_their_limits_and_keep_nan(act: Act) -> None:
    y, slope = activate(torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38]), act)
    ends = [-math.inf, -3e38] if act is Act.NONE else [0.0, 0.0]
    assert y[[0, 3]].tolist() == pytest.approx([math.inf, 3e38], rel=1e-6)
    assert y[[1, 4]].tolist() == pytest.approx(ends, abs=1e-30, rel=1e-6)
    assert slope[[0, 3]].tolist() == [1.0, 1.0]
    assert slope[[1, 4]].tolist() == pytest.approx([float(act is Act.NONE)] * 2, abs=1e-30)
    assert bool(y[2].isnan())


@native
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_group(bad: float) -> None:
    x = features(2, 8, 4, 4, seed=0)
    x[1, 5, 2, 2] = bad
    y, _ = kernels.norm_act(x, torch.ones(8), torch.zeros(8), 2, 1e-5, Act.SILU)
    assert bool(y[1, 4:].isnan().all())
    assert bool(y[1, :4].isfinite().all())
    assert bool(y[0].isfinite().all())


@native
def test_an_empty_batch_has_no_output_and_no_gradient() -> None:
    x, one = torch.empty(0, 8, 4, 4).contiguous(memory_format=LAST), torch.ones(8)
    y, stats = kernels.norm_act(x, one, one, 2, 1e-5, Act.SILU)
    grads = kernels.norm_act_backward(y, x, stats, one, one, Act.SILU)
    assert y.shape == (0, 8, 4, 4)
    assert grads.weight.tolist() == [0.0] * 8


# ------------------------------------------------------------------------- Winograd

sizes = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 7), st.integers(1, 7))


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    u = kernels.winograd_weight(w, x.dtype)
    m = torch.bmm(kernels.winograd_input(x), u.transpose(1, 2))
    shape = (x.shape[0], w.shape[0], x.shape[2], x.shape[3])
    return kernels.winograd_output(m, shape, bias, residual)


@native
@given(sizes, st.integers(1, 20), st.booleans(), st.booleans(), st.booleans())
@example((1, 3, 1, 1), 4, True, True, True)
@example((2, 16, 3, 5), 8, True, True, False)
def test_winograd_is_a_convolution(
    size: tuple[int, ...], d: int, biased: bool, added: bool, last: bool
) -> None:
    x, (b, _, h, w) = features(*size, seed=0), size
    weight = randn(d, size[1], 3, 3, seed=1)
    weight = weight.contiguous(memory_format=LAST) if last else weight
    bias = randn(d, seed=2) if biased else None
    residual = features(b, d, h, w, seed=3) if added else None
    want = F.conv2d(x.double(), weight.double(), None, padding=1)
    want = want if bias is None else want + bias[:, None, None]
    want = want if residual is None else want + residual
    y = convolve(x, weight, bias, residual)
    assert off(y, want) < 1e-5
    assert y.is_contiguous(memory_format=LAST)


@native
@pytest.mark.parametrize("size", [(2, 64, 8, 8), (1, 96, 5, 7)])
def test_winograd_in_bfloat16_is_near(size: tuple[int, ...]) -> None:
    x, weight = features(*size, seed=0, dtype=BF16), randn(48, size[1], 3, 3, seed=1)
    want = F.conv2d(x.double(), weight.double(), padding=1)
    error = (convolve(x, weight, None, None).double() - want).pow(2).mean().sqrt()
    # U, V, M and y are rounded to 2^-9 each, and the output map adds nine numbers M.
    assert float(error / want.pow(2).mean().sqrt()) < 0.015


def check_adjoint(x: Tensor, ax: Tensor, y: Tensor, aty: Tensor) -> None:
    """<A x, y> = <x, A^T y>."""
    left, right = ax.double() * y, x.double() * aty
    assert float((left.sum() - right.sum()).abs()) <= 1e-5 * float(left.abs().sum()) + 1e-30


@native
@given(sizes)
def test_the_input_map_and_its_adjoint(size: tuple[int, int, int, int]) -> None:
    x = features(*size, seed=0)
    v = kernels.winograd_input(x)
    dv = randn(*v.shape, seed=1)
    dx = kernels.winograd_input_adjoint(dv, size)
    check_adjoint(x, v, dv, dx)
    assert dx.is_contiguous(memory_format=LAST)


@native
@given(sizes)
def test_the_output_map_and_its_adjoint(size: tuple[int, int, int, int]) -> None:
    dy = features(*size, seed=0)
    dm = kernels.winograd_output_adjoint(dy)
    m = randn(*dm.shape, seed=1)
    check_adjoint(m, kernels.winograd_output(m, size), dy, dm)


@native
@given(st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_the_weight_map_and_its_adjoint(d: int, c: int, last: bool) -> None:
    w = randn(d, c, 3, 3, seed=0)
    w = w.contiguous(memory_format=LAST) if last else w
    u = kernels.winograd_weight(w, FLOAT)
    du = randn(*u.shape, seed=1)
    dw = kernels.winograd_weight_backward(du, w)
    check_adjoint(w, u, du, dw)
    assert dw.stride() == w.stride()


@native
@given(sizes)
def test_bfloat16_maps_are_the_float32_maps_rounded(size: tuple[int, int, int, int]) -> None:
    x = features(*size, seed=0, dtype=BF16)
    dv = randn(*kernels.winograd_input(x).shape, seed=1, dtype=BF16)
    wide = x.float().contiguous(memory_format=LAST)
    du = randn(16, 4, size[1], seed=2, dtype=BF16)
    like = torch.empty(4, size[1], 3, 3)
    assert torch.equal(kernels.winograd_input(x), kernels.winograd_input(wide).bfloat16())
    assert torch.equal(
        kernels.winograd_output_adjoint(x), kernels.winograd_output_adjoint(wide).bfloat16()
    )
    assert torch.equal(
        kernels.winograd_input_adjoint(dv, size),
        kernels.winograd_input_adjoint(dv.float(), size).bfloat16(),
    )
    assert torch.equal(
        kernels.winograd_output(dv, size), kernels.winograd_output(dv.float(), size).bfloat16()
    )
    assert torch.equal(
        kernels.winograd_weight_backward(du, like),
        kernels.winograd_weight_backward(du.float(), like),
    )


@native
def test_results_go_where_they_are_wanted() -> None:
    x = features(2, 8, 4, 6, seed=0)
    v, y = torch.empty(16, 12, 8), x.clone()
    m = kernels.winograd_output_adjoint(x)
    want = kernels.winograd_output(m, (2, 8, 4, 6), None, x)
    assert kernels.winograd_input(x, out=v) is v
    assert torch.equal(v, kernels.winograd_input(x))
    assert kernels.winograd_output_adjoint(x, out=v) is v
    assert torch.equal(v, m)
    assert kernels.winograd_output(m, (2, 8, 4, 6), None, y, out=y) is y  # onto its own residual
    assert torch.equal(y, want)


@native
def test_a_nan_reaches_only_the_windows_that_see_it() -> None:
    x = features(1, 4, 9, 9, seed=0)
    x[0, 0, 4, 4] = math.nan
    y = convolve(x, randn(4, 4, 3, 3, seed=1), None, None)
    # Windows overlap by two pixels, so the tiles of rows and columns 4 to 5 and 2 to 3 see it.
    assert bool(y[..., 2:6, 2:6].isnan().any())
    y[..., 2:6, 2:6] = 0
    assert bool(y.isfinite().all())


@native
def test_rounding_to_bfloat16_is_torchs() -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(0x3F80_0000, 0x3F88_0000, 0x4000)
    edges = torch.tensor([0, 1, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 0x7FFF_FFFF, 0x8000])
    signed = torch.cat([bits, ties, edges, edges - 2**31]).to(torch.int32)
    w = torch.zeros(1, len(signed), 3, 3).contiguous(memory_format=LAST)
    w[0, :, 0, 0] = signed.view(FLOAT)
    got, want = kernels.winograd_weight(w)[0, 0], signed.view(FLOAT).bfloat16()  # U_00 = g_00
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


@native
@given(sizes, st.sampled_from([FLOAT, BF16]))
def test_channel_sum(size: tuple[int, ...], dtype: torch.dtype) -> None:
    dy = features(*size, seed=0, dtype=dtype)
    got = kernels.channel_sum(dy)
    assert got.dtype == FLOAT
    assert float((got - dy.double().sum((0, 2, 3))).abs().max()) < 1e-5


# ------------------------------------------------------------------------- optimiser

SHAPES = [(33, 7), (8, 4, 3, 3), (), (40_000,), (5, 6, 1, 1), (0,)]


def tensors(seed: int) -> list[Tensor]:
    made = [randn(*shape, seed=seed + i) for i, shape in enumerate(SHAPES)]
    made[1] = made[1].contiguous(memory_format=LAST)
    return made


def step(state: list[list[Tensor]], grads: list[Tensor], number: int, scale: float) -> None:
    params, m, v, ema = state
    kernels.adamw_ema(
        params, grads, m, v, ema, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1,
        step=number, grad_scale=scale, ema_weight=0.1,
    )  # fmt: skip


def fresh_state() -> list[list[Tensor]]:
    params = tensors(0)
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return [params, *zeros, [p.clone() for p in params]]


@native
def test_five_steps_are_torchs_adamw_and_a_running_mean() -> None:
    state = fresh_state()
    theirs = [p.clone().requires_grad_() for p in state[0]]
    ema = [p.clone() for p in state[0]]
    adamw = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for number in range(1, 6):
        grads = tensors(10 * number)
        kept = [g.clone() for g in grads]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g * 0.5
        adamw.step()
        for e, p in zip(ema, theirs, strict=True):
            e.lerp_(p.detach(), 0.1)
        step(state, grads, number, 0.5)
        assert all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True))
    for mine, their in zip(state[0] + state[3], theirs + ema, strict=True):
        assert torch.allclose(mine, their.detach(), rtol=1e-6, atol=1e-6)


@native
def test_the_layout_of_an_axis_of_one_does_not_matter() -> None:
    state = fresh_state()
    grads = tensors(1)
    other = [g.clone() for g in grads]
    other[4] = torch.empty(5, 1, 1, 6).permute(0, 3, 1, 2).copy_(grads[4])
    assert other[4].stride() != grads[4].stride()
    step(state, other, 1, 1.0)
    want = fresh_state()
    step(want, grads, 1, 1.0)
    assert torch.equal(state[0][4], want[0][4])


@native
def test_squared_norm_of_all_tensors() -> None:
    grads = tensors(0)
    want = sum(float(g.double().square().sum()) for g in grads)
    got = kernels.squared_norm(grads)
    assert got.shape == ()
    assert float(got) == pytest.approx(want, rel=1e-12)
    assert float(kernels.squared_norm([])) == 0.0
    assert math.isnan(float(kernels.squared_norm([*grads, torch.tensor([math.nan])])))


# ------------------------------------------------------------------------- threads


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(dtype: torch.dtype) -> list[Tensor]:
    """Results of every kernel on enough numbers for many threads, and three pictures for two."""
    x = features(3, 32, 24, 25, seed=0, dtype=dtype)
    dy = features(3, 32, 24, 25, seed=1, dtype=dtype)
    weight, bias = randn(2, 32, seed=2).unbind()
    add, scale, shift = randn(3, 3, 32, seed=3).unbind()
    w = randn(64, 32, 3, 3, seed=4)
    size = (3, 32, 24, 25)
    y, stats = kernels.norm_act(x, weight, bias, 8, 1e-5, Act.SILU, add, scale, shift)
    got = kernels.norm_act_backward(dy, x, stats, weight, bias, Act.GELU, add, scale, shift)
    v, u = kernels.winograd_input(x), kernels.winograd_weight(w, dtype)
    state, grads = fresh_state(), tensors(5)
    step(state, grads, 1, 1.0)
    return [
        y, stats, *(g for g in got if g is not None), v, u,
        kernels.winograd_input_adjoint(v, size), kernels.winograd_output(v, size, bias, x),
        kernels.winograd_output_adjoint(dy), kernels.winograd_weight_backward(u, w),
        kernels.channel_sum(dy), kernels.squared_norm(grads), *state[0], *state[3],
    ]  # fmt: skip


@native
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_the_number_of_threads_changes_no_bit(
    dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    want = everything(dtype)
    for count in (2, 3, 5):
        set_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(everything(dtype), want, strict=True))


@native
def test_python_threads_may_call_at_once() -> None:
    wanted, got = everything(FLOAT), [[], [], []]

    def call(into: list[list[Tensor]]) -> None:
        into.extend(everything(FLOAT) for _ in range(3))

    callers = [threading.Thread(target=call, args=(into,)) for into in got]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for results in (one for into in got for one in into):
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    assert [len(into) for into in got] == [3, 3, 3]


# ------------------------------------------------------------------------- refusals

X = features(2, 8, 4, 4, seed=0)
ONE, ROWS = torch.ones(8), torch.zeros(2, 8)
STATS = torch.ones(2, 4, 2)


def norm(x: Tensor = X, weight: Tensor = ONE, groups: int = 4, eps: float = 1e-5) -> None:
    kernels.norm_act(x, weight, ONE, groups, eps, Act.SILU)


def injected(add: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> None:
    kernels.norm_act(X, ONE, ONE, 4, 1e-5, Act.SILU, add, scale, shift)


def again(stats: Tensor) -> None:
    kernels.norm_act_again(X, stats, ONE, ONE, Act.SILU)


def backward(dy: Tensor) -> None:
    kernels.norm_act_backward(dy, X, STATS, ONE, ONE, Act.SILU)


def optimise(change: Callable[[list[list[Tensor]]], None], number: int = 1) -> None:
    state = [[torch.ones(4, 6)] for _ in range(5)]
    kept = [one.clone() for tensors in state for one in tensors]
    change(state)
    params, grads, m, v, ema = state
    try:
        step([params, m, v, ema], grads, number, 1.0)
    finally:
        assert all(bool((one == 1).all()) for tensors in state for one in tensors)
        assert len(kept) == 5


def put(index: int, tensor: Tensor) -> Callable[[list[list[Tensor]]], None]:
    return lambda state: state[index].__setitem__(0, tensor)


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "NCHW": (lambda: norm(X.contiguous()), "x must be in channels_last"),
    "double": (lambda: norm(X.double()), "x must be float32 or bfloat16; got torch.float64"),
    "meta": (lambda: norm(X.to("meta")), "x must be a dense tensor on the CPU; got meta"),
    "3-d": (lambda: norm(X[0]), r"x must have shape \(b, c, h, w\)"),
    "no pixel": (lambda: norm(X[:, :, :0]), r"x must have shape .*none of c, h, w zero"),
    "weight": (lambda: norm(weight=torch.ones(7)), r"weight must be contiguous torch.float32 \(8,"),
    "bf16 weight": (lambda: norm(weight=ONE.bfloat16()), "weight must be contiguous torch.float32"),
    "groups": (lambda: norm(groups=3), "groups must divide the 8 channels of x; got 3"),
    "no group": (lambda: norm(groups=0), "groups must divide"),
    "eps": (lambda: norm(eps=-1.0), "eps must not be negative; got -1.0"),
    "eps nan": (lambda: norm(eps=math.nan), "eps must not be negative; got nan"),
    "add": (lambda: injected(ROWS[:1], None, None), r"add must be contiguous torch.float32 \(2, 8"),
    "scale": (lambda: injected(None, ROWS, None), "scale and shift must be given together"),
    "shift": (lambda: injected(None, None, ROWS), "scale and shift must be given together"),
    "gaps": (lambda: injected(ROWS.T.contiguous().T, None, None), "add must be contiguous"),
    "stats": (lambda: again(torch.ones(2, 3, 2)), "stats must have shape"),
    "stats batch": (lambda: again(torch.ones(1, 4, 2)), "stats must be contiguous"),
    "stats 2-d": (lambda: again(torch.ones(2, 4)), "stats must have shape"),
    "dy": (lambda: backward(X[:1]), r"dy must be torch.float32 \(2, 8, 4, 4\)"),
    "dy dtype": (lambda: backward(X.bfloat16()), "dy must be torch.float32"),
    "filters": (lambda: kernels.winograd_weight(torch.ones(2, 2, 5, 5)), r"w must be .*, 3, 3\)"),
    "filter gaps": (
        lambda: kernels.winograd_weight(torch.ones(4, 2, 3, 3)[::2]),
        "w must be contiguous or channels_last",
    ),
    "U dtype": (
        lambda: kernels.winograd_weight(torch.ones(2, 2, 3, 3), torch.float16),
        "dtype must be float32 or bfloat16; got torch.float16",
    ),
    "dU": (
        lambda: kernels.winograd_weight_backward(torch.ones(16, 2, 3), torch.ones(2, 2, 3, 3)),
        r"du must be contiguous torch.float32 \(16, 2, 2\)",
    ),
    "V": (lambda: kernels.winograd_input(X, out=torch.ones(16, 8, 7)), "out must be contiguous"),
    "V dtype": (
        lambda: kernels.winograd_input(X, out=torch.ones(16, 8, 8).bfloat16()),
        "out must be contiguous torch.float32",
    ),
    "dV": (
        lambda: kernels.winograd_input_adjoint(torch.ones(16, 7, 8), (2, 8, 4, 4)),
        r"dv must be contiguous torch.float32 \(16, 8, 8\)",
    ),
    "shape": (
        lambda: kernels.winograd_output(torch.ones(16, 8, 8), (2, 8, 0, 4)),
        r"shape must be \(b, c, h, w\), none of c, h, w zero; got \(2, 8, 0, 4\)",
    ),
    "M": (lambda: kernels.winograd_output(torch.ones(16, 8, 8), (2, 8, 4, 6)), "m must be cont"),
    "bias": (
        lambda: kernels.winograd_output(torch.ones(16, 8, 8), (2, 8, 4, 4), ROWS[0, :4]),
        r"bias must be contiguous torch.float32 \(8,\)",
    ),
    "residual": (
        lambda: kernels.winograd_output(torch.ones(16, 8, 8), (2, 8, 4, 4), None, X[:1]),
        "residual must be torch.float32",
    ),
    "y": (
        lambda: kernels.winograd_output(torch.ones(16, 8, 8), (2, 8, 4, 4), out=X[:1]),
        "out must be torch.float32",
    ),
    "dM": (lambda: kernels.winograd_output_adjoint(X.contiguous()), "dy must be in channels_last"),
    "sum": (lambda: kernels.channel_sum(X.half()), "dy must be float32 or bfloat16"),
    "lists": (lambda: optimise(lambda s: s[1].append(torch.ones(1))), "grads must have as many"),
    "size": (lambda: optimise(put(2, torch.ones(4, 5))), r"exp_avg\[0\] must be laid out as"),
    "order": (lambda: optimise(put(4, torch.ones(6, 4).T)), r"ema\[0\] must be laid out as"),
    "state dtype": (lambda: optimise(put(3, torch.ones(4, 6).double())), r"exp_avg_sq\[0\] must"),
    "holes": (lambda: optimise(put(0, torch.ones(4, 12)[:, ::2])), r"params\[0\] must fill its"),
    "repeats": (lambda: optimise(put(0, torch.ones(6).expand(4, 6))), r"params\[0\] must fill its"),
    "step": (lambda: optimise(lambda _: None, number=0), "step must be at least 1; got 0"),
    "norm": (lambda: kernels.squared_norm([torch.ones(9)[::3]]), r"grads\[0\] must fill its"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(ConfigError, match=f"^{message}"):
        call()


# ------------------------------------------------------------------------- building and loading

UNIX = pytest.mark.skipif(os.name != "posix", reason="compilers are shell scripts here")


@pytest.fixture(scope="session")
def compiled(usable: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that a script may hand out as its own work; compiling takes seconds each time."""
    kept = list(_build.cache_folder().glob("*.so"))
    if kept:
        return max(kept, key=lambda path: path.stat().st_mtime)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNDIFFUSE_CACHE", str(tmp_path_factory.mktemp("kernels")))
        _build._find_or_build()
        return next(_build.cache_folder().glob("*.so"))


class Bench(NamedTuple):
    """A cache of its own, and a compiler that is a script."""

    folder: Path
    script: Path

    def compiler(self, body: str) -> None:
        """`body` runs for each command but `--version`; $out is the file to write."""
        log, shell = self.folder / "log", textwrap.dedent(body)
        self.script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "fake 1.0" && exit 0\necho "$$" >> {log}\n'
            f'while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done\n{shell}\n'
        )
        self.script.chmod(0o755)

    def commands(self) -> list[str]:
        """Process numbers of the commands that were run, `--version` aside."""
        log = self.folder / "log"
        return log.read_text().split() if log.exists() else []

    def libraries(self) -> list[Path]:
        return list((self.folder / "cache" / "kernels").iterdir())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("CXX", str(tmp_path / "fake c++").replace(" ", "\\ "))
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return Bench(tmp_path, tmp_path / "fake c++")


def reason() -> str:
    """Why a build failed; that it did is part of the test."""
    result = _build._find_or_build()
    assert isinstance(result, _build.Missing)
    assert "\n" not in result.reason
    return result.reason


@UNIX
def test_a_build_is_kept_and_found_again(bench: Bench, compiled: Path) -> None:
    bench.compiler(f'cp {compiled} "$out"')
    first, second = _build._find_or_build(), _build._find_or_build()
    assert isinstance(first, _build.Library)
    assert isinstance(second, _build.Library)
    assert first.compiler == "fake 1.0"
    assert len(bench.commands()) == 2  # to compile and to link, once
    assert [path.suffix for path in bench.libraries()] == [".so"]
    assert (bench.folder / "cache" / "kernels").stat().st_mode & 0o777 == 0o700


@UNIX
def test_another_compiler_or_processor_builds_anew(
    bench: Bench, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.compiler(f'cp {compiled} "$out"')
    _build._find_or_build()
    bench.script.write_text(bench.script.read_text().replace("fake 1.0", "fake 1.1"))
    _build._find_or_build()
    monkeypatch.setattr(_build, "cpu", lambda: "model name: another")
    _build._find_or_build()
    assert len(bench.libraries()) == 3


@UNIX
def test_a_kept_library_that_does_not_load_is_built_once_more(bench: Bench, compiled: Path) -> None:
    bench.compiler(f'cp {compiled} "$out"')
    _build._find_or_build()
    (kept,) = bench.libraries()
    kept.unlink()
    kept.write_bytes(b"\x7fELF and then nothing")
    assert isinstance(_build._find_or_build(), _build.Library)
    assert kept.read_bytes() == compiled.read_bytes()
    assert len(bench.commands()) == 4


@UNIX
def test_a_compiler_that_fails_is_quoted(bench: Bench) -> None:
    bench.compiler('echo "In file: note" >&2; echo "native.cpp:1: error: bad luck" >&2; exit 3')
    assert reason() == f"{bench.script} failed with code 3: native.cpp:1: error: bad luck"
    assert bench.libraries() == []


@UNIX
def test_a_compiler_that_fails_without_a_word(bench: Bench) -> None:
    bench.compiler("exit 1")
    assert reason() == f"{bench.script} failed with code 1: no message"


@UNIX
def test_a_compiler_that_hangs_is_ended_with_all_its_children(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build, "LIMIT_S", 0.5)
    bench.compiler(f"sleep 300 & echo $! >> {bench.folder}/log; wait")
    assert reason() == f"{bench.script} did not end within 0.5 s"
    assert len(bench.commands()) == 2
    assert not any(running(int(number)) for number in bench.commands())
    assert bench.libraries() == []


def running(number: int) -> bool:
    """Whether a process runs; one that ended and was not yet waited for does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


@UNIX
@pytest.mark.parametrize("body", ['echo garbage > "$out"', ': > "$out"'])
def test_a_compiler_that_writes_garbage(bench: Bench, body: str) -> None:
    bench.compiler(body)
    assert reason().startswith("what was compiled does not load: ")
    assert bench.libraries() == []


@UNIX
def test_a_compiler_that_writes_nothing(bench: Bench) -> None:
    bench.compiler("exit 0")
    assert reason() == f"{bench.script} reported success but wrote nothing"


@UNIX
def test_a_library_of_something_else_does_not_load(bench: Bench) -> None:
    other = next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.*"))
    bench.compiler(f'cp {other} "$out"')
    assert reason().startswith("what was compiled does not load: ")


@UNIX
def test_no_compiler(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason() == f"the compiler that CXX names, {os.environ['CXX']}, was not found"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(bench.folder))
    assert reason() == "no C++ compiler was found (c++, g++, clang++); install one or set CXX"


@UNIX
def test_the_next_compiler_is_tried_and_the_first_complaint_told(
    bench: Bench, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", f"{bench.folder}:{os.environ['PATH']}")
    for name, body in (("c++", "echo error: c >&2; exit 1"), ("g++", f'cp {compiled} "$out"')):
        Bench(bench.folder, bench.folder / name).compiler(body)
    assert isinstance(_build._find_or_build(), _build.Library)
    Bench(bench.folder, bench.folder / "g++").compiler("echo error: g >&2; exit 1")
    monkeypatch.setattr(_build, "CANDIDATES", ("c++", "g++"))
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(bench.folder / "another"))
    assert reason() == f"{bench.folder}/c++ failed with code 1: error: c"


@UNIX
def test_a_cache_that_cannot_be_written_is_done_without(
    bench: Bench, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.compiler(f'cp {compiled} "$out"')
    (bench.folder / "file").touch()
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(bench.folder / "file"))
    assert isinstance(_build._find_or_build(), _build.Library)
    assert list((bench.folder / "temporary").iterdir()) == []


@UNIX
def test_a_cache_of_somebody_else_is_not_used(
    bench: Bench, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.compiler(f'cp {compiled} "$out"')
    _build._find_or_build()
    before = {path: path.stat().st_mtime_ns for path in bench.libraries()}
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert isinstance(_build._find_or_build(), _build.Library)
    assert len(bench.commands()) == 4  # built again, elsewhere
    assert {path: path.stat().st_mtime_ns for path in bench.libraries()} == before


@UNIX
def test_a_cache_open_to_others_is_closed(bench: Bench, compiled: Path) -> None:
    bench.compiler(f'cp {compiled} "$out"')
    folder = bench.folder / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    _build._find_or_build()
    assert folder.stat().st_mode & 0o777 == 0o700


@UNIX
def test_no_openmp_and_no_source(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.compiler("exit 0")
    with monkeypatch.context() as patch:
        patch.setattr(_build, "SOURCE", bench.folder / "gone.cpp")
        assert reason() == f"No such file or directory: {bench.folder}/gone.cpp"
    monkeypatch.setattr(_build, "OPENMP", _build.re.compile("never"))
    assert reason() == "the OpenMP library that torch uses was not found in this process"


def test_a_system_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        result = _build._find_or_build()
    assert isinstance(result, _build.Missing)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("UNDIFFUSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert _build.cache_folder() == Path("/home/someone/.cache/undiffuse/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert _build.cache_folder() == Path("/var/x/undiffuse/kernels")
    monkeypatch.setenv("UNDIFFUSE_CACHE", "/var/own")
    assert _build.cache_folder() == Path("/var/own/kernels")


def test_one_attempt_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(_build, "_loaded", [])
    monkeypatch.setattr(
        _build, "_find_or_build", lambda: tried.append(1) or _build.Missing("of a test")
    )
    callers = [threading.Thread(target=_build.load) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert tried == [1]
    assert _build.load() == _build.Missing("of a test")


def test_without_kernels_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "load", lambda: _build.Missing("there is no compiler"))
    _library.library.cache_clear()
    assert kernels.why_not() == "there is no compiler"
    assert kernels.describe() == "not available: there is no compiler"
    with pytest.raises(ConfigError, match="kernels are not available here: there is no compiler"):
        norm()
    _library.library.cache_clear()


@native
def test_the_description_names_compiler_and_vectors() -> None:
    version, _, width = kernels.describe().rpartition(", ")
    assert width in [f"{n} floats per vector" for n in (4, 8, 16)]
    assert version


def test_the_table_of_functions_is_that_of_the_source() -> None:
    source = _build.SOURCE.read_text(encoding="utf-8").partition('extern "C"')[2]
    declared = dict.fromkeys(_build.re.findall(r"undiffuse_(\w+)\(([^)]*)\)", source))
    counts = {name: arguments.count(",") + 1 for name, arguments in declared if arguments}
    assert counts == {name: len(types) for name, types in _library.SIGNATURES.items()}


def python(code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: "subprocess.Popen[str]") -> str:
    out, error = process.communicate(timeout=120)
    assert error == ""
    return out.strip()


def test_importing_looks_for_no_compiler() -> None:
    code = """
import sys, torch
began = []
sys.addaudithook(lambda event, _: began.append(event) if event == "subprocess.Popen" else None)
from undiffuse import kernels
from undiffuse.kernels import _build
print(began, _build._loaded)
"""
    assert said(python(code)) == "[] []"


@UNIX
def test_processes_may_race_and_share_torchs_openmp(bench: Bench, compiled: Path) -> None:
    bench.compiler(f'sleep 0.2; cp {compiled} "$out"')
    code = """
from undiffuse import kernels
print(kernels.why_not())
try:
    maps = open("/proc/self/maps").read().splitlines()
except OSError:
    maps = []
print(len({line.split()[-1] for line in maps if "omp" in line.rpartition("/")[2]}))
"""
    first, second = python(code), python(code)
    assert said(first) in ("None\n1", "None\n0")
    assert said(second) in ("None\n1", "None\n0")
    assert [path.suffix for path in bench.libraries()] == [".so"]


@native
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_real_build_from_nothing_maps_one_openmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path))
    code = """
import torch
from undiffuse import kernels
assert kernels.why_not() is None, kernels.why_not()
total = kernels.channel_sum(torch.ones(2, 8, 64, 64).contiguous(memory_format=torch.channels_last))
maps = open("/proc/self/maps").read().splitlines()
paths = {line.split()[-1] for line in maps if "omp" in line.rpartition("/")[2]}
print(total.tolist() == [8192.0] * 8, len(paths))
"""
    assert said(python(code)) == "True 1"
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]
