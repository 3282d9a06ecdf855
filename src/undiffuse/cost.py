"""What a network costs, from its program alone: parameters, multiply-adds, bytes.

Nothing is built and no torch is needed, so a network that would not fit is refused before its
first weight exists. The counting rules:

- a convolution costs kernel area x channels in x channels out per output position (a transposed
  one: per input position), with no discount for padding; a linear layer in x out;
- attention over n positions of c channels costs 2 n (n + memory) c for its two products, linear
  attention with heads of d channels (2 n + memory) c d;
- norms, activations, sums and resampling cost nothing;
- one multiply-add is two FLOP; a training step is about three forward passes.

Heights and widths are in pixels. Functions of a `Site` want those of the padded picture, which
the network's stride divides (`padded`); functions of a `UNetSpec` take any picture and pad.
"""

from collections.abc import Collection

from undiffuse.spec import (
    Act,
    Activation,
    Attn,
    Conv,
    Down,
    Downsampling,
    Inject,
    LinearAttn,
    Norm,
    Order,
    Out,
    Part,
    Res,
    Resize,
    Site,
    Style,
    UNetSpec,
    Up,
    Upsampling,
    inner_width,
    trace,
)

BYTES_PER_PARAMETER = 16  # float32: weight, gradient, and the two moments of AdamW
BYTES_PER_ACTIVATION = 4  # float32

COMPONENTS: tuple[str, ...] = (
    "time_embed",
    "init_conv",
    "encoder",
    "bottleneck",
    "decoder",
    "output",
)

# Weights per pair of channels; unshuffling makes channels of four positions for a 1x1 convolution.
_DOWN_AREA = {
    Downsampling.CONV: 9,
    Downsampling.CONV_END: 9,
    Downsampling.CONV4: 16,
    Downsampling.UNSHUFFLE: 4,
}


# --- parameters ---------------------------------------------------------------------------------


def parameters(site: Site, style: Style) -> int:
    """Number of parameters of the layer that `site` becomes."""
    w_in, w_out = site.in_width, site.out_width
    match site.op:
        case Conv(_, kernel):
            return _conv(w_in, w_out, kernel)
        case Res(_, resize):
            return _res_parameters(w_in, w_out, style, resize)
        case Attn() | LinearAttn():
            return _attention_parameters(site.op, w_in, style)
        case Down(by):
            return w_in * w_out * _DOWN_AREA[by] + w_out if by in _DOWN_AREA else 0
        case Up(Upsampling.NEAREST_CONV):
            return _conv(w_in, w_out, 3)
        case Up(Upsampling.DECONV4):
            return _conv(w_in, w_out, 4)
        case Out(kernel, norm):
            return (_norm(w_in, style) if norm else 0) + _conv(w_in, w_out, kernel)
        case _:
            return 0


def embedding_parameters(spec: UNetSpec) -> int:
    """Number of parameters of the timestep embedding, its label table and its map of augmentation.

    0 for a program without `Res`: nothing would listen, so the network has no embedding.
    """
    if not _hears(spec):
        return 0
    one = spec.style.embedding
    linears = _linear(one.width, one.hidden) + _linear(one.hidden, one.out)
    linears += one.augment * one.width
    return linears + (one.classes + int(one.null)) * (one.width if one.label_first else one.out)


def total_parameters(spec: UNetSpec) -> int:
    """Number of parameters of the whole network."""
    return embedding_parameters(spec) + sum(parameters(s, spec.style) for s in trace(spec))


def by_component(spec: UNetSpec) -> dict[str, int]:
    """Parameters per part of the U; the values add up to `total_parameters`.

    The keys are `COMPONENTS`, in that order. A first `Conv` is `init_conv` and `Out` is
    `output`; every other layer counts where its `Site.part` says.
    """
    counts = dict.fromkeys(COMPONENTS, 0)
    counts["time_embed"] = embedding_parameters(spec)
    for site in trace(spec):
        counts[_component(site)] += parameters(site, spec.style)
    return counts


def _component(site: Site) -> str:
    match site.op:
        case Conv() if site.index == 0:
            return "init_conv"
        case Out():
            return "output"
        case _:
            return _PART_COMPONENT[site.part]


_PART_COMPONENT = {
    Part.ENCODER: "encoder",
    Part.BOTTLENECK: "bottleneck",
    Part.DECODER: "decoder",
}


def _res_parameters(w_in: int, w_out: int, style: Style, resize: Resize | None) -> int:
    norm_first = style.order is Order.NORM_ACT_CONV
    norms = _norm(w_in if norm_first else w_out, style) + _norm(w_out, style)
    convs = _conv(w_in, w_out, 3) + _conv(w_out, w_out, 3)
    shortcut = _conv(w_in, w_out, 1) if _projected(w_in, w_out, style, resize) else 0
    return norms + convs + _linear(style.embedding.out, _injected(w_out, style)) + shortcut


def _attention_parameters(op: Attn | LinearAttn, width: int, style: Style) -> int:
    inner = inner_width(op, width)
    linear = isinstance(op, LinearAttn)
    norms = int(linear or op.norm) + int(linear)
    bias = 0 if linear or not op.bias else 3 * inner
    qkv = 3 * width * inner + bias
    return norms * _norm(width, style) + qkv + 2 * op.memory * inner + _conv(inner, width, 1)


def _projected(w_in: int, w_out: int, style: Style, resize: Resize | None) -> bool:
    return w_in != w_out or (resize is not None and style.project_resized)


def _injected(width: int, style: Style) -> int:
    return 2 * width if style.inject is Inject.SCALE_SHIFT else width


def _conv(w_in: int, w_out: int, kernel: int) -> int:
    return w_in * w_out * kernel**2 + w_out


def _linear(w_in: int, w_out: int) -> int:
    return w_in * w_out + w_out


def _norm(width: int, style: Style) -> int:
    return 2 * width if style.norm is Norm.GROUP else width


def _hears(spec: UNetSpec) -> bool:
    return any(isinstance(op, Res) for op in spec.program)


# --- multiply-adds ------------------------------------------------------------------------------


def padded(spec: UNetSpec, height: int, width: int) -> tuple[int, int]:
    """The size that the network works on: both sides rounded up to a multiple of its stride."""
    stride = spec.stride
    return height + -height % stride, width + -width % stride


def multiply_adds(site: Site, style: Style, height: int, width: int) -> int:
    """Multiply-adds of one layer for one padded picture, forward."""
    w_in, w_out = site.in_width, site.out_width
    n_in, n = _positions(site, height, width)
    match site.op:
        case Conv(_, kernel) | Out(kernel):
            return n * w_in * w_out * kernel**2
        case Res(_, resize):
            shortcut = w_in * w_out if _projected(w_in, w_out, style, resize) else 0
            convs = n * (9 * w_in * w_out + 9 * w_out**2 + shortcut)
            return convs + style.embedding.out * _injected(w_out, style)
        case Attn():
            inner = inner_width(site.op, w_in)
            return n * inner * (4 * w_in + 2 * (n + site.op.memory))
        case LinearAttn(_, head_width, memory):
            inner = inner_width(site.op, w_in)
            return n * 4 * w_in * inner + (2 * n + memory) * inner * head_width
        case Down(by):
            return n * w_in * w_out * _DOWN_AREA.get(by, 0)
        case Up(Upsampling.NEAREST_CONV):
            return n * w_in * w_out * 9
        case Up(Upsampling.DECONV4):
            return n_in * w_in * w_out * 16
        case _:
            return 0


def embedding_multiply_adds(spec: UNetSpec) -> int:
    """Multiply-adds of the timestep embedding, once per picture.

    Without those of the augmentation's map, which only training uses.
    """
    one = spec.style.embedding
    return one.width * one.hidden + one.hidden * one.out if _hears(spec) else 0


def total_multiply_adds(spec: UNetSpec, height: int, width: int) -> int:
    """Multiply-adds of one forward pass for one picture of any size."""
    size = padded(spec, height, width)
    layers = sum(multiply_adds(site, spec.style, *size) for site in trace(spec))
    return embedding_multiply_adds(spec) + layers


def flops(spec: UNetSpec, height: int, width: int) -> int:
    """Floating-point operations of one forward pass for one picture: two per multiply-add."""
    return 2 * total_multiply_adds(spec, height, width)


def _positions(site: Site, height: int, width: int) -> tuple[int, int]:
    """Positions of the features going in and coming out."""
    area = height * width
    return area // site.in_scale**2, area // site.out_scale**2


# --- memory -------------------------------------------------------------------------------------


def activations(site: Site, style: Style, height: int, width: int) -> int:
    """Numbers that one layer keeps for the backward pass of one padded picture.

    In eager mode a norm, an activation and a convolution each keep their input (ReLU keeps its
    output, which the next layer keeps anyway), and attention keeps query, key, value and result.
    """
    w_in = site.in_width
    n_in, n = _positions(site, height, width)
    match site.op:
        case Conv() | Up(Upsampling.DECONV4):
            return n_in * w_in
        case Up(Upsampling.NEAREST_CONV):
            return n * w_in
        case Res(_, resize):
            return _res_activations(site, style, resize, n_in, n)
        case Attn(heads, norm):
            # query, key, value, result; the input and the norm's input; heads laid side by side
            inner = inner_width(site.op, w_in)
            normed = _norm_keeps(w_in, style) if norm else 0
            return n * (inner * (4 + int(heads > 1)) + w_in + normed)
        case LinearAttn(_, head_width):
            # query after its softmax and its scaling, key, value, result; the first convolution's
            # input, two norms; keys times values
            inner = inner_width(site.op, w_in)
            return n * (5 * inner + w_in + 2 * _norm_keeps(w_in, style)) + inner * head_width
        case Down(by):
            indices = 2 * n * w_in if by is Downsampling.MAX else 0  # int64: two numbers each
            return n_in * w_in + indices
        case Act(by):
            return n * w_in * _kept_by(by)
        case Out(_, norm):
            normed = w_in + _norm_keeps(w_in, style) if norm else 0  # the activation is SiLU
            return n * (w_in + normed)
        case _:
            return 0


def _res_activations(site: Site, style: Style, resize: Resize | None, n_in: int, n: int) -> int:
    w_in, w_out, kept = site.in_width, site.out_width, _kept_by(style.activation)
    if style.order is Order.NORM_ACT_CONV:
        norms = n_in * _norm_keeps(w_in, style) + n * _norm_keeps(w_out, style)
        halves = n_in * w_in * kept + n * w_in + n * w_out * (1 + kept)
    else:
        norms = 2 * n * _norm_keeps(w_out, style)
        halves = n * w_in + n * w_out * (1 + 2 * kept)
    resized = resize is not None and _projected(w_in, w_out, style, resize)
    extra = (
        n_in * w_in if resize is Resize.DOWN else 0,  # the pooling keeps its input
        n * w_in if resized else 0,  # the shortcut sees a resampled copy
        n * w_out if style.inject is Inject.SCALE_SHIFT else 0,
        n * w_out if style.dropout else 0,
    )
    return norms + halves + sum(extra)


def _norm_keeps(width: int, style: Style) -> int:
    """Numbers per position: the input, and for RMS the result before its gain and two lengths."""
    return width if style.norm is Norm.GROUP else 2 * width + 2


def _kept_by(activation: Activation) -> int:
    return 0 if activation is Activation.RELU else 1


def training_bytes(
    spec: UNetSpec, height: int, width: int, batch: int, recomputed: Collection[str] = ()
) -> int:
    """About how many bytes training needs at once, in float32 and eager mode.

    16 per parameter plus the activations of `batch` pictures. Layers in `recomputed` (names of
    sites) keep their input alone, but one of them at a time is computed again in full. An estimate
    from below: averages of the weights, work space of the kernels and the pictures themselves are
    not in it. Its use is to refuse a size that can never fit before anything is allocated.
    """
    size = padded(spec, height, width)
    whole = {site: activations(site, spec.style, *size) for site in trace(spec)}
    again = [site for site in whole if site.name in recomputed]
    kept = sum(n for site, n in whole.items() if site not in again)
    kept += sum(input_numbers(site, *size) for site in again)
    kept += max((whole[site] for site in again), default=0)
    return BYTES_PER_PARAMETER * total_parameters(spec) + BYTES_PER_ACTIVATION * batch * kept


def input_numbers(site: Site, height: int, width: int) -> int:
    """Numbers that come into a layer, for one padded picture."""
    return site.in_width * _positions(site, height, width)[0]


def recomputable(spec: UNetSpec, height: int, width: int) -> list[str]:
    """The names of the layers worth computing again, those that save most memory first."""
    size = padded(spec, height, width)
    saving = {
        site.name: activations(site, spec.style, *size) - input_numbers(site, *size)
        for site in trace(spec)
        if isinstance(site.op, Res | Attn | LinearAttn)
    }
    return sorted(saving, key=lambda name: -saving[name])
