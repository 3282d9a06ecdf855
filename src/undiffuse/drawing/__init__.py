"""Pictures for people: the U of a spec, still or moving, loss curves, noise levels, a schedule.

Every `draw_` function returns a matplotlib `Figure` made with the object interface, so nothing is
opened, shown or remembered between calls; matplotlib itself is imported at the first picture,
since it costs more time than most commands take. `save`, `to_svg` and `to_png` turn a figure into
a file that is the same, byte for byte, every time. `animate_unet` returns SVG text, for which
there is `save_svg`.
"""

from undiffuse.drawing._animation import animate_unet
from undiffuse.drawing._axes import Row
from undiffuse.drawing._curves import draw_losses, draw_schedule
from undiffuse.drawing._figure import save, save_svg, to_png, to_svg
from undiffuse.drawing._levels import draw_gap, draw_levels
from undiffuse.drawing._pareto import draw_pareto
from undiffuse.drawing._unet import draw_unet

__all__ = [
    "Row",
    "animate_unet",
    "draw_gap",
    "draw_levels",
    "draw_losses",
    "draw_pareto",
    "draw_schedule",
    "draw_unet",
    "save",
    "save_svg",
    "to_png",
    "to_svg",
]
