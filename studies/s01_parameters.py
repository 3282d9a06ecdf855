"""S1: the parameter tables of text 001 beside the true numbers. Exact; nothing is trained."""

from collections.abc import Callable

from matplotlib.figure import Figure

from figures import COLOURS, canvas, decorate
from harness import Claim, Judgement, Lab, Numbers, Study, Table, Training, Verdict
from undiffuse import cost, recipes
from undiffuse.spec import Attn, UNetSpec, trace

PRINTED = {  # text 001, for "ddpm_config"
    "time_embed": 132_352,
    "init_conv": 3_584,
    "encoder": 17_234_432,
    "bottleneck": 2_363_392,
    "decoder": 15_234_816,
    "output": 66_560,
}
PRINTED_PRESETS = {"light": 8e6, "ddpm": 35e6, "improved": 113e6, "highres": 100e6}
DDPM, TESTED = "ddpm_config", "tested configuration"
NEAR = 0.15  # two numbers that a text prints as "about" equal
ATTENTION = "share of attention"


def networks() -> dict[str, UNetSpec]:
    """The two configurations of text 001 and every preset."""
    named: dict[str, Callable[[int], UNetSpec]] = {k: v.build for k, v in recipes.PRESETS.items()}
    presets = {name: make(3) for name, make in named.items()}
    ddpm = recipes.text001(128, (1, 2, 2, 2), 2, (2,))
    return {DDPM: ddpm, TESTED: recipes.text001(), **presets}


def attention_parameters(spec: UNetSpec) -> int:
    """Parameters of all attention blocks."""
    sites = (site for site in trace(spec) if isinstance(site.op, Attn))
    return sum(cost.parameters(site, spec.style) for site in sites)


def measure(lab: Lab) -> Numbers:
    """Counts of every network: components, total, attention."""
    del lab
    return {
        name: {
            **cost.by_component(spec),
            "total": cost.total_parameters(spec),
            "attention": attention_parameters(spec),
        }
        for name, spec in networks().items()
    }


# --- judging ------------------------------------------------------------------------------------


def judge_breakdown(numbers: Numbers) -> Judgement:
    """The printed table of components."""
    true = numbers[DDPM]
    right = [name for name, count in PRINTED.items() if count == true[name]]
    total = sum(PRINTED.values())
    off = 100 * (total / true["total"] - 1)
    verdict = Verdict.HOLDS if len(right) == len(PRINTED) else Verdict.FAILS
    return Judgement(
        verdict,
        f"{len(right)} of {len(PRINTED)} parts are right ({', '.join(right)}). The printed total of"
        f" {total:,} is {off:+.1f} % off {true['total']:,}, but the parts are spread wrongly:"
        f" the output layer has {true['output']:,} parameters and not {PRINTED['output']:,}, the"
        f" decoder {true['decoder']:,} and not {PRINTED['decoder']:,}.",
    )


def judge_presets(numbers: Numbers) -> Judgement:
    """The printed sizes of the four configurations."""
    off = {name: numbers[name]["total"] / wanted - 1 for name, wanted in PRINTED_PRESETS.items()}
    near = [name for name, by in off.items() if abs(by) <= NEAR]
    said = ", ".join(f"{name} {numbers[name]['total'] / 1e6:.1f} M" for name in off)
    tested = numbers[TESTED]["total"] / 1e6
    told = f"True sizes: {said}. The configuration that the text calls 35 M has {tested:.1f} M."
    fits = abs(tested / 35 - 1) <= NEAR
    whole = len(near) == len(off) and fits
    return Judgement(Verdict.HOLDS if whole else Verdict.DEPENDS if near else Verdict.FAILS, told)


def judge_shares(numbers: Numbers) -> Judgement:
    """Encoder and decoder nearly equal, bottleneck small."""
    counts = numbers[DDPM]
    ratio = counts["decoder"] / counts["encoder"]
    equal = abs(ratio - 1) <= NEAR
    small = counts["bottleneck"] / counts["total"] <= 0.1
    verdict = (
        Verdict.HOLDS if equal and small else Verdict.DEPENDS if equal or small else Verdict.FAILS
    )
    tested = numbers[TESTED]
    return Judgement(
        verdict,
        f"The decoder is {ratio:.2f} times the encoder, since its convolutions read the skips too;"
        f" the bottleneck holds {100 * counts['bottleneck'] / counts['total']:.0f} %"
        f" (tested configuration: {100 * tested['bottleneck'] / tested['total']:.0f} %).",
    )


def judge_attention(numbers: Numbers) -> Judgement:
    """Attention holds 10 to 20 percent of the parameters."""
    shares = {n: 100 * c["attention"] / c["total"] for n, c in numbers.items() if c["attention"]}
    inside = [name for name, share in shares.items() if 10 <= share <= 20]
    verdict = Verdict.HOLDS if len(inside) == len(shares) else Verdict.DEPENDS
    return Judgement(
        verdict if inside else Verdict.FAILS,
        f"The share runs from {min(shares.values()):.1f} % to {max(shares.values()):.1f} %; it lies"
        f" in the range for {len(inside)} of {len(shares)} networks ({', '.join(inside)}).",
    )


# --- showing ------------------------------------------------------------------------------------


def tables(numbers: Numbers) -> list[Table]:
    """Printed beside true, then every network."""
    return [_printed(numbers), _all(numbers)]


def _printed(numbers: Numbers) -> Table:
    true, tested = numbers[DDPM], numbers[TESTED]
    rows = [
        (name, f"{count:,}", _share(true, name), _share(tested, name))
        for name, count in PRINTED.items()
    ]
    totals = ("total", f"{sum(PRINTED.values()):,}", f"{true['total']:,}", f"{tested['total']:,}")
    return Table("Parameters by part", ("part", "printed", DDPM, TESTED), (*rows, totals))


def _share(counts: dict[str, int], name: str) -> str:
    return f"{counts[name]:,} ({100 * counts[name] / counts['total']:.1f} %)"


def _all(numbers: Numbers) -> Table:
    parts = ("encoder", "bottleneck", "decoder", "attention")
    rows = [
        (name, f"{c['total']:,}", *(f"{100 * c[part] / c['total']:.1f} %" for part in parts))
        for name, c in numbers.items()
    ]
    return Table("Every network, 3 channels", ("network", "parameters", *parts), tuple(rows))


def figure(numbers: Numbers) -> Figure:
    """Shares of the parts, printed and true."""
    drawn, (axes,) = canvas(1, width=7.6, height=2.4)
    printed = {**PRINTED, "total": sum(PRINTED.values())}
    bars = {"printed": printed, DDPM: numbers[DDPM], TESTED: numbers[TESTED]}
    for place, counts in enumerate(bars.values()):
        left = 0.0
        for colour, part in zip(COLOURS, PRINTED, strict=False):
            share = 100 * counts[part] / counts["total"]
            axes.barh(place, share, left=left, color=colour, label=part if place == 0 else None)
            if share > 4:
                axes.text(
                    left + share / 2, place, f"{share:.0f}", ha="center", va="center", color="w"
                )
            left += share
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    decorate(axes, x="percent of all parameters", y="", legend=False)
    drawn.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    return drawn


def no_trainings(lab: Lab) -> tuple[Training, ...]:
    """Nothing to train."""
    del lab
    return ()


STUDY = Study(
    id="s01",
    title="Where the parameters are",
    claims=(
        Claim(
            ("T001-15",),
            "A 35-million-parameter network splits into the six printed parts.",
            "holds if all six printed counts equal the true ones, else fails",
            judge_breakdown,
        ),
        Claim(
            ("T001-13",),
            "The four named configurations have about 8, 35, 113 and 100 million parameters, and"
            " the configuration under test about 35 million.",
            f"holds if all five are within {NEAR:.0%}, fails if none of the four is, else depends",
            judge_presets,
        ),
        Claim(
            ("T001-16",),
            "Encoder and decoder have nearly as many parameters, and the bottleneck few.",
            f"two halves: within {NEAR:.0%} of each other; bottleneck at most 10 %. Both: holds",
            judge_shares,
        ),
        Claim(
            ("T001-16",),
            "Attention holds 10 to 20 % of the parameters.",
            "holds if the share of every network with attention lies there, fails if none does",
            judge_attention,
        ),
    ),
    how="""Counted from each network's program; the same counts are checked against built networks
    in the tests. Convolutions that only resample count as encoder or decoder.""",
    trainings=no_trainings,
    measure=measure,
    tables=tables,
    figure=figure,
    caption="Shares of the six parts: as printed, and as they are in two configurations.",
)
