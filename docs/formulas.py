"""Formulas of the pages as SVG, drawn by matplotlib when the pages are built: no script, no network."""

from __future__ import annotations

import html

from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from matplotlib.path import Path
from matplotlib.textpath import TextPath

SIZE = 100.0  # of the letters, in units of a picture
EM = 1.12  # of the letters, beside those of the text
FONT = FontProperties(family="serif", math_fontfamily="stix")
# commands of LaTeX that matplotlib lacks, and its own
REPLACED = {
    r"\lvert": "|", r"\rvert": "|", r"\lVert": r"\|", r"\rVert": r"\|", r"\tfrac": r"\frac",
    r"\mathcal N": r"\mathcal{N}",
}  # fmt: skip
COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}


def svg(formula: str) -> str:
    """A formula in LaTeX as SVG, in the size of the text; ``ValueError`` for an unknown command."""
    text = " ".join(formula.split())
    for before, after in REPLACED.items():
        text = text.replace(before, after)
    text = f"${text}$"
    width, height, depth, *_ = MathTextParser("path").parse(text, 72, FONT.copy())
    scale = FONT.get_size_in_points()
    outline = TextPath((0, 0), text, size=SIZE, prop=FONT)
    parts = []
    for points, code in outline.iter_segments(curves=True, simplify=False):
        numbers = " ".join(f"{x:.1f} {-y:.1f}" for x, y in zip(*[iter(points)] * 2, strict=True))
        parts.append("Z" if code == Path.CLOSEPOLY else COMMANDS[code] + numbers)
    box = [0.0, -height / scale * SIZE, width / scale * SIZE, (height + depth) / scale * SIZE]
    return (
        f'<svg class="formula" role="img" aria-label="{html.escape(formula)}" '
        f'viewBox="{" ".join(f"{v:.1f}" for v in box)}" fill="currentColor" style="'
        f"width:{box[2] / SIZE * EM:.2f}em;height:{box[3] / SIZE * EM:.2f}em;"
        f'vertical-align:{-depth / scale * EM:.2f}em"><path d="{"".join(parts)}"/></svg>'
    )


def visit(self, node) -> None:
    """Write a formula of a page."""
    from docutils import nodes

    text = svg(node.astext())
    block = isinstance(node, nodes.math_block)
    self.body.append(f'<div class="math">{text}</div>' if block else text)
    raise nodes.SkipNode
