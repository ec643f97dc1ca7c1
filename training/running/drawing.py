"""What draws on a figure -> a PNG, in one style (not by pyplot, which is for one thread only)."""

import io
from collections.abc import Callable

import matplotlib as mpl
from matplotlib.figure import Figure

TEXT, MUTED, LINE = "#1f2328", "#59636e", "#d8dee4"


def draw_png(size: tuple[float, float], draw: Callable[[Figure], None], dpi: int = 130) -> bytes:
    """Draw on a figure of a size in inches."""
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5}):
        figure = Figure(size, dpi, facecolor="white", layout="constrained")
        draw(figure)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
