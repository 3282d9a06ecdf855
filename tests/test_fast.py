"""The fast path computes what the plain path computes: outputs and gradients.

In float32 features the two agree to float32's rounding, so every rearrangement (Winograd, four
small convolutions for doubling, recomputed activations, blocks of queries) is exact mathematics. In
bfloat16 they agree as far as bfloat16 goes.
"""

# pyright: basic

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from programs import specs
from undiffuse import kernels
from undiffuse.fast import Fast, _attention, _convolution, _layers, _packed
from undiffuse.recipes import adm_family, ddpm_family, ddpmpp_family
from undiffuse.spec import Style, UNetSpec
from undiffuse.unet import ResBlock, UNet

pytestmark = pytest.mark.skipif(
    kernels.why_not() is not None, reason=f"no kernels: {kernels.why_not()}"
)

DDPM = ddpm_family(32, (1, 2), 1, (1,))
NETWORKS = {
    "ddpm": DDPM,
    "scale-shift, resized in blocks": adm_family(32, (1, 2), 1, (1,)),
    "skip gain": ddpmpp_family(32, (1, 2), 1, (1,)),
    "classes": DDPM.with_classes(3, null=True),
}


@pytest.fixture(autouse=True)
def _narrow_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd's form for narrow test networks, too, and in several parts of the batch."""
    monkeypatch.setattr(_convolution, "MIN_WIDTH", 1)
    monkeypatch.setattr(_convolution, "WINDOW_BYTES", 16 * 64 * 32 * 4)


def awake(spec: UNetSpec) -> UNet:
    """A network without zeros, which would hide every difference before them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(spec)
        with torch.no_grad():
            for p in net.parameters():
                if p.ndim == 1 or not p.any():
                    p.add_(0.2 * torch.randn_like(p))
    return net


def inputs(spec: UNetSpec, size: tuple[int, int] = (16, 16), batch: int = 3) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, spec.in_channels, *size, generator=generator)
    label = torch.arange(batch) % spec.classes if spec.classes else None
    return [x, torch.linspace(-1.0, 2.0, batch), label]


def gradients(net: UNet, given: list, run: Fast | None) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    given = [given[0].clone().requires_grad_(), *given[1:]]
    y = net(*given) if run is None else net(*given, run)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return y.detach(), {**grads, "x": given[0].grad}


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-6))


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Against the size of the largest gradient: small ones are sums that cancel."""
    scale = max(float(g.norm()) for g in wanted.values())
    return max((float((got[n] - w).norm()) / scale, n) for n, w in wanted.items())


@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_features_give_the_plain_numbers_and_gradients(name: str, winograd: bool) -> None:
    spec = NETWORKS[name]
    net, given = awake(spec), inputs(spec)
    fast = Fast(torch.float32, winograd)
    wanted, plain = gradients(net, given, None)
    got, quick = gradients(net, given, fast)
    assert error(got, wanted) < 1e-5
    assert quick.keys() == plain.keys()
    assert worst(quick, plain)[0] < 2e-5
    with torch.no_grad():
        frozen = net(*given, fast)
    assert error(frozen, wanted) < 1e-5


@settings(max_examples=25)
@given(
    spec=specs(),
    side=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    winograd=st.booleans(),
)
def test_any_program_in_any_style(spec: UNetSpec, side: tuple[int, int], winograd: bool) -> None:
    spec = replace(spec, style=replace(spec.style, dropout=0.0))
    net, given = awake(spec).double(), inputs(spec, side, batch=2)
    doubles = [v.double() if v is not None and v.is_floating_point() else v for v in given]
    wanted, plain = gradients(net, doubles, None)
    got, quick = gradients(net.float(), given, Fast(torch.float32, winograd))
    scale = float(wanted.norm()) + 1.0
    assert float((got - wanted).norm()) < 1e-3 * scale
    assert worst(quick, {name: g.float() for name, g in plain.items()})[0] < 5e-3
    fast = Fast(torch.float32, winograd)
    with torch.no_grad():
        for _ in range(2):  # the second time with the weights as they were packed
            assert float((net(*given, fast) - wanted).norm()) < 1e-3 * scale
        fewer = [None if v is None else v[:1] for v in given]
        one = net(*fewer, fast)
    assert float((one - wanted[:1]).norm()) < 1e-3 * scale


@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_as_good_as_the_network_rounded_to_bfloat16(name: str, winograd: bool) -> None:
    """Direct convolutions a little better, Winograd's a little worse."""
    spec = NETWORKS[name]
    net, given = awake(spec), inputs(spec)
    fast, allowed = Fast(torch.bfloat16, winograd), 1.8 if winograd else 1.1
    wanted, plain = gradients(net, given, None)
    with torch.no_grad():
        rounded = copy.deepcopy(net).bfloat16()(given[0].bfloat16(), *given[1:])
    usual = error(rounded.float(), wanted)
    got, quick = gradients(net, given, fast)
    assert got.dtype == torch.float32
    assert 1e-4 < error(got, wanted) < allowed * usual
    assert all(g.dtype == torch.float32 for g in quick.values())
    flat = [torch.cat([g[n].flatten() for n in sorted(g)]) for g in (plain, quick)]
    assert float(F.cosine_similarity(flat[0], flat[1], dim=0)) > 0.998
    with torch.no_grad():
        assert error(net(*given, fast), wanted) < allowed * usual


def test_packed_weights_follow_every_change_of_the_parameters() -> None:
    net, given, fast = awake(DDPM), inputs(DDPM), Fast(torch.float32)
    with torch.no_grad():
        net(*given, fast)
        for p in net.parameters():
            p.mul_(0.9)
        assert error(net(*given, fast), net(*given)) < 1e-5
        net.load_state_dict({name: value * 1.1 for name, value in net.state_dict().items()})
        assert error(net(*given, fast), net(*given)) < 1e-5
        conv = net.get_submodule("layers.00_conv")
        conv.weight = nn.Parameter(conv.weight * 2)
        assert error(net(*given, fast), net(*given)) < 1e-5


def test_no_path_through_the_layers_twice() -> None:
    """A second derivative would miss what the kernels do; it is refused, not wrong."""
    net, given = awake(DDPM), inputs(DDPM)
    x = given[0].requires_grad_()
    y = net(x, *given[1:], Fast(torch.float32))
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Kernels write float32 where they say so, whatever torch makes by default."""
    net, given, before = awake(DDPM), inputs(DDPM), torch.get_default_dtype()
    wanted, plain = gradients(net, given, None)
    torch.set_default_dtype(dtype)
    try:
        got, quick = gradients(net, given, Fast(torch.float32))
        with torch.no_grad():
            frozen = net(*given, Fast(torch.float32))
    finally:
        torch.set_default_dtype(before)
    assert error(got, wanted) < 1e-5
    assert error(frozen, wanted) < 1e-5
    assert worst(quick, plain)[0] < 2e-5


def test_without_gradients_in_any_way() -> None:
    """One that was used in inference mode goes on outside of it."""
    net, given, fast = awake(DDPM), inputs(DDPM), Fast(torch.float32)
    with torch.inference_mode():
        inside = net(*given, fast).clone()
        made_inside = awake(DDPM)
        again = made_inside(*given, Fast(torch.float32)).clone()
    with torch.no_grad():
        outside = net(*given, fast)
    assert torch.equal(inside, outside)
    assert torch.equal(inside, again)
    assert error(net(*given, fast).detach(), outside) < 1e-5


def test_autocast_around_it_changes_nothing() -> None:
    net, given, fast = awake(DDPM), inputs(DDPM), Fast(torch.float32)
    with torch.no_grad():
        wanted = net(*given, fast)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(net(*given, fast), wanted)


def test_processors_that_cannot_pack_bfloat16_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    net, given = awake(DDPM), inputs(DDPM)
    with torch.no_grad():
        wanted = net(*given, Fast(torch.bfloat16))
        monkeypatch.setattr(_packed, "_packs", lambda x: False)
        got = net(*given, Fast(torch.bfloat16))
    assert error(got, wanted) < 3e-2


def test_one_embedding_serves_pictures_that_share_the_level() -> None:
    spec = NETWORKS["classes"]
    net, (x, _, _) = awake(spec), inputs(spec)
    rows: list[int] = []
    net.embedding.linear1.register_forward_hook(lambda m, given, y: rows.append(len(y)))
    level, label = torch.tensor([0.7]), torch.tensor([2])
    with torch.no_grad():
        shared = net(x, level.expand(3), label.expand(3), Fast(torch.float32))
        single = net(x, level.repeat(3), label.repeat(3), Fast(torch.float32))
    assert rows == [1, 3]
    assert error(shared, single) < 1e-5


def test_dropout_scales_what_is_left_and_its_gradient_uses_the_same_mask() -> None:
    spec = replace(DDPM, style=replace(DDPM.style, dropout=0.5))
    net, given = awake(spec), inputs(spec)
    fast = Fast(torch.float32)
    with torch.no_grad():
        wanted = net.eval()(*given)
    assert error(net.eval()(*given, fast).detach(), wanted) < 1e-5  # none in evaluation
    x = given[0].double()
    net = net.train()
    torch.manual_seed(3)
    first = net(*given, fast)
    torch.manual_seed(3)
    again = net(*given, fast)
    assert torch.equal(first, again)
    assert error(first.detach(), wanted) > 0.05
    # the gradient is that of the function with this very mask: a finite difference along it
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    probe = given[0].clone().requires_grad_()
    torch.manual_seed(3)
    net(probe, *given[1:], fast).sum().backward()
    slope = float((probe.grad * direction).sum())
    ends = []
    for sign in (1.0, -1.0):
        torch.manual_seed(3)
        moved = given[0] + sign * 1e-2 * direction
        ends.append(float(net(moved, *given[1:], fast).double().sum().detach()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02)


# --- memory -------------------------------------------------------------------------------------


def saved_bytes(net: UNet, given: list, run: Fast | None) -> int:
    """Bytes that autograd keeps for the backward pass, every storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(*given) if run is None else net(*given, run)
    assert y.requires_grad
    return sum(kept.values())


def test_a_block_keeps_two_tensors_for_its_backward_pass() -> None:
    """Its input and what comes before its second norm; layer by layer it keeps six."""
    spec = ddpm_family(32, (1,), 2, ())
    net, given = awake(spec), inputs(spec, (32, 32), batch=8)
    plain = saved_bytes(net, given, None)
    fast = saved_bytes(net, given, Fast(torch.float32))
    assert fast < 0.45 * plain
    assert saved_bytes(net, given, Fast(torch.bfloat16)) < 0.3 * plain


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [1, 100, 10**6])
def test_attention_in_blocks_is_attention(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, n, 8, generator=generator, dtype=torch.float64) for n in (50, 70, 70))
    parts = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*parts)
    wanted.sin().sum().backward()
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    got = _attention.attention(*ours)
    got.sin().sum().backward()
    assert torch.allclose(got, wanted, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(_attention.attention(*ours), wanted, atol=1e-12)
    for mine, theirs in zip(ours, parts, strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)  # sums over blocks are float32


@given(st.integers(1, 6), st.integers(1, 6))
def test_doubling_and_a_convolution_are_four_small_convolutions(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    w = torch.randn(5, 3, 3, 3, generator=generator, dtype=torch.float64)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0), w, padding=1)
    got = _layers.interleaved(F.conv2d(x, _layers.phases(w), padding=1))
    assert torch.allclose(got, wanted, atol=1e-12)


def test_other_styles_run_as_they_are_written() -> None:
    """Orders and norms without a kernel take the plain layer, under autocast."""
    spec = ddpm_family(32, (1,), 1, ())
    other = replace(spec, style=replace(Style(), order=list(type(spec.style.order))[-1]))
    net, given = awake(other), inputs(other)
    ran: list[type] = []
    for module in net.modules():
        if isinstance(module, ResBlock):
            module.register_forward_hook(lambda m, given, y: ran.append(type(m)))
    with torch.no_grad():
        assert error(net(*given, Fast(torch.float32)), net(*given)) < 1e-5
    assert ran
