"""Figures as inline SVG that refers to nothing outside itself."""

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

MARKERS = "osD^vP*X"


def svg(figure: Figure) -> str:
    """Return a figure as one element of a page of HTML."""
    buffer = io.StringIO()
    # Text stays text: it can be searched, and a page holds no glyph twice.
    with mpl.rc_context({"svg.fonttype": "none"}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    drawn = buffer.getvalue()
    # Inside a page of HTML the namespaces are known.
    return re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", drawn[drawn.index("<svg") :])
