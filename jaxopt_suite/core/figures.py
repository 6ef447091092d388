"""How our figures look. They are matplotlib's; nothing here imports it."""

from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers, less the yellow and the black, which
# are lost on a white or a dark page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#808080"


def dress(axes: Any, xlabel: str, ylabel: str | None = None, *, ink: str) -> None:
    """Labels a panel, and leaves of its frame the two sides that are read."""
    axes.set_xlabel(xlabel, color=ink)
    if ylabel is not None:
        axes.set_ylabel(ylabel, color=ink)
    axes.set_facecolor("none")
    axes.grid(visible=True, color=GREY, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=ink, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
