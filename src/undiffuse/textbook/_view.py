"""What the four texts' systems share: the one network's layers under the texts' names.

A view owns no arithmetic. It holds a layer of `undiffuse.unet`, registers that layer's children
under the names that a text prints, and calls the layer. The children (convolutions, norms, linear
layers) are the same objects on both sides, and torch changes weights inside them: `to`,
`load_state_dict` (with `assign=True` too), `requires_grad_` and hooks on a child reach both sides.
The held layer stands in a tuple, where torch does not look, so that the state dict has the text's
names and nothing else; `copy.deepcopy` does look there, and copies both sides as one.

A whole network's `forward` calls its named parts, so that a hook on any of them fires. `unet` is
the bare network over the same weights; a part that is replaced as a whole (`net.enc1 = other`) is
not followed there.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from undiffuse.errors import ConfigError
from undiffuse.spec import Activation, Conv, Embedding, Join, Out, Program, Style, UNetSpec, trace
from undiffuse.unet import (
    ConcatSkip,
    Head,
    TimestepEmbedding,
    UNet,
    build,
    check_inputs,
    pad_to_multiple,
)

Layer = TypeVar("Layer", bound=nn.Module)
ViewT = TypeVar("ViewT", bound="View[Any]")
GroupT = TypeVar("GroupT", bound="Group")

join = ConcatSkip(Join.CONCAT)  # (features, skip) -> both along channels


class Linked(nn.Module):
    """A module some of whose children are also children of a core layer, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self._links: dict[str, tuple[nn.Module, str]] = {}

    def link(self, name: str, owner: nn.Module, theirs: str) -> None:
        """Register the child `theirs` of `owner` here as `name`."""
        self._links[name] = (owner, theirs)
        setattr(self, name, getattr(owner, theirs))

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)  # pyright: ignore[reportArgumentType] # torch: any value
        # Whoever puts another layer in place of a linked one wants it to be used.
        if isinstance(value, nn.Module) and name in self.__dict__.get("_links", {}):
            owner, theirs = self._links[name]
            setattr(owner, theirs, value)


class View(Linked, Generic[Layer]):
    """A core layer whose children have other names; `core` is that layer."""

    names: ClassVar[Mapping[str, str]] = {}  # the text's -> ours, in the text's order; {}: ours

    def hold(self, core: Layer) -> None:
        """Become the view of `core`: the whole of a view's construction."""
        Linked.__init__(self)
        self._held = (core,)
        own = {name: name for name, _ in core.named_children()}
        for name, theirs in (self.names or own).items():
            self.link(name, core, theirs)

    @classmethod
    def over(cls: type[ViewT], core: nn.Module) -> ViewT:
        """The view of a layer that exists, as a whole network needs it."""
        view = cls.__new__(cls)
        view.hold(core)
        return view

    @property
    def core(self) -> Layer:
        """The layer that does the work."""
        return self._held[0]

    def train(self, mode: bool = True) -> "View[Layer]":
        """Switch dropout on or off, in the core layer too."""
        self.core.train(mode)
        super().train(mode)
        return self


class Group(nn.Module):
    """A part of a text's network that is made of several layers of ours."""

    def hold(self, layers: "Layers") -> None:
        """Become the view of the next few layers: the whole of a group's construction."""
        raise NotImplementedError

    @classmethod
    def over(cls: type[GroupT], layers: "Layers") -> GroupT:
        """The group of layers that exist, as a whole network needs it."""
        group = cls.__new__(cls)
        group.hold(layers)
        return group


class TimeMLP(View[TimestepEmbedding]):
    """timestep (b) -> sinusoid of `dim` values -> `mlp` -> (b, dim)."""

    activation: ClassVar[Activation]
    names: ClassVar[Mapping[str, str]] = {}
    mlp: nn.Sequential

    def __init__(self, dim: int) -> None:
        """An odd `dim` is padded with a zero."""
        self.hold(TimestepEmbedding(time_embedding(dim, self.activation)))

    def hold(self, core: TimestepEmbedding) -> None:
        Linked.__init__(self)
        self._held = (core,)
        # The text's Sequential itself, called as the text does, so that a hook on it fires.
        activation = nn.GELU() if self.activation is Activation.GELU else nn.SiLU()
        self.mlp = nn.Sequential(core.linear1, activation, core.linear2)

    def forward(self, t: Shaped[Tensor, "b"]) -> Float[Tensor, "b e"]:
        """t: integers or floats."""
        return self.mlp(self.core.sinusoid(t).to(next(self.mlp.parameters()).dtype))

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "TimeMLP":
        """The frequencies belong to the core layer: they move along."""
        super()._apply(fn, recurse)
        self.core._apply(fn, recurse=False)  # pyright: ignore[reportPrivateUsage] # torch's name
        return self


def time_embedding(dim: int, activation: Activation) -> Embedding:
    """The embedding of texts 000 and 002: dim -> 4 dim -> dim, nothing after it."""
    return Embedding(dim, 4 * dim, dim, activation=activation, final_activation=None)


class Network(Linked):
    """A whole network of a text over one bare `UNet`."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self._held = (unet,)

    @property
    def unet(self) -> UNet:
        """The bare network with the very same parameters: for `checkpoint.Model`, `compile`."""
        return self._held[0]

    @property
    def spec(self) -> UNetSpec:
        """The program that the network runs."""
        return self.unet.spec

    @property
    def head(self) -> Head:
        """The last layer."""
        *_, last = self.unet.layers.values()
        assert isinstance(last, Head)
        return last

    def train(self, mode: bool = True) -> "Network":
        """Switch dropout on or off, in the bare network too."""
        self.unet.train(mode)
        super().train(mode)
        return self

    def enter(
        self,
        x: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, "b"],
        label: Int[Tensor, "b"] | None,
    ) -> Float[Tensor, "b c y x"]:
        """What the bare network does first: check, and pad to sizes that can be halved.

        Raises:
            ConfigError: shapes, dtypes or labels do not fit this network.
        """
        check_inputs(self.spec, x, t, label)
        return pad_to_multiple(x, self.spec.stride)


def crop(h: Float[Tensor, "b d y x"], like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
    """What the bare network does last: cut the padding off."""
    height, width = like.shape[-2:]
    return h[..., :height, :width]


class Layers:
    """The layers of a network or of a piece of one, handed out in the order of the program."""

    def __init__(self, layers: Iterator[nn.Module]) -> None:
        self._layers = layers

    def take(self, kind: type[Layer]) -> Layer:
        """The next layer of this kind."""
        return next(layer for layer in self._layers if isinstance(layer, kind))


def layers_of(unet: UNet) -> Layers:
    """All layers of a network."""
    return Layers(iter(unet.layers.values()))


def piece(in_width: int, program: Program, style: Style, start: int = 0) -> Layers:
    """The layers of a piece of a program that gets `in_width` channels, from op `start` on."""
    spec = UNetSpec(in_width, 1, (*program, Out()), style)
    return Layers(build(site, style) for site in islice(trace(spec), start, len(program)))


def linked_stem(unet: UNet) -> tuple[nn.Module, str]:
    """Where the first convolution of `unet` hangs, for `Linked.link`."""
    first = next(trace(unet.spec))
    assert isinstance(first.op, Conv)
    return unet.layers, first.name


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ConfigError: names the argument and its value.
    """
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}; got {value!r}")
