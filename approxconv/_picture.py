"""The only module that imports matplotlib at its top; `approxconv.pictures` imports it when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        return self.png(self.dpi)

    def png(self, dpi: float) -> bytes:
        file = BytesIO()
        ground = self.get_facecolor()
        # Opaque even where a style has it transparent: dark letters would not be seen in a dark notebook.
        self.savefig(file, format="png", dpi=dpi, transparent=False, facecolor=ground if ground[3] == 1 else "white")
        return file.getvalue()

    def small_png(self, palette: Sequence[int], most_bytes: int) -> bytes:
        """The figure in the colours ``r, g, b, r, …`` of `palette`, coarser if that is needed to fit `most_bytes`."""
        from PIL import Image

        colors = Image.new("P", (1, 1))
        colors.putpalette(palette)
        for dpi in (100, 80, 60, 45):
            image = Image.open(BytesIO(self.png(dpi))).convert("RGB")
            file = BytesIO()
            image.quantize(palette=colors, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
            if file.tell() <= most_bytes:
                break
        return file.getvalue()
