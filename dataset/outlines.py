"""Outlines of labelling tools as masks of pixels.

Coordinates are those of COCO and Labelme: a pixel is a square of side 1, and the first one begins at (0, 0). It belongs
to an outline if its center lies inside, so that neighbors with a common edge neither overlap nor leave a gap. Functions
return a window of the image (two slices) and the mask in it, and raise ValueError with the reason if there is none.
"""

import base64
import io

import numpy as np
from PIL import Image

FARTHEST = 1e9      # coordinates may lie outside the image, but not farther away, in pixels


def read_points(values):
    """Convert coordinates [x, y, x, y, ...] or [[x, y], ...] to (N, 2) float64."""
    try:
        points = np.asarray(values, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("coordinates that are not pairs of numbers") from None
    if not (np.abs(points) < FARTHEST).all():       # also false for NaN
        raise ValueError("coordinates that are not finite numbers")
    return points


def fill_polygon(points, size):
    """Fill a polygon of (N, 2) points x, y in an image of size (H, W) by the even-odd rule."""
    if len(points) < 3:
        raise ValueError("polygons of fewer than three points")
    points = points - 0.5       # now the centers of pixels are at whole numbers
    corners = np.ceil([points.min(0), points.max(0)]).clip(0, size[::-1]).astype(int)
    columns, rows = (slice(*ends) for ends in corners.T.tolist())
    x, y = points.T
    x_end, y_end = np.roll(x, -1), np.roll(y, -1)
    # Each edge goes from its upper end, however it was drawn, so that neighbors compute the same crossings.
    upward = y > y_end
    x, x_end = np.where(upward, x_end, x), np.where(upward, x, x_end)
    y, y_end = np.minimum(y, y_end), np.maximum(y, y_end)
    first, last = (np.ceil(end).clip(rows.start, rows.stop).astype(int) for end in (y, y_end))
    edge = np.repeat(np.arange(len(x)), last - first)       # (M,) an element for each row that an edge crosses
    row = np.arange(len(edge)) + np.repeat(last - np.cumsum(last - first), last - first)
    crossing = x[edge] + (row - y[edge]) * ((x_end - x)[edge] / (y_end - y)[edge])
    column = np.ceil(crossing).clip(columns.start, columns.stop).astype(int)
    changes = np.zeros((rows.stop - rows.start, columns.stop - columns.start + 1), bool)
    np.logical_xor.at(changes, (row - rows.start, column - columns.start), True)
    return (rows, columns), np.logical_xor.accumulate(changes, axis=1)[:, :-1]


def read_bitmap(points, text, size):
    """Read a mask of Labelme: (N, 2) points, of which the first is its top left pixel, and an image in Base64."""
    try:
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("L")) > 0
    except (TypeError, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("masks that are not images in Base64") from None
    window = tuple(slice(int(start), int(start) + length) for start, length in zip(
        points[:1].ravel()[::-1], mask.shape, strict=False))
    if len(window) < 2 or any(part.start < 0 or part.stop > side for part, side in zip(window, size, strict=True)):
        raise ValueError("masks outside of the image")
    return window, mask


def read_runs(runs, size):
    """Read the run lengths of COCO, {"size": [H, W], "counts": list or compressed text}: column by column, 0 first.

    pycocotools would return memory that nothing was written to where runs are too short.
    """
    counts = runs.get("counts")
    try:
        counts = np.array(_decompress(counts) if isinstance(counts, str) else counts)
        valid = counts.dtype.kind == "i" and 0 <= counts.min() <= counts.max() <= size[0] * size[1]
    except ValueError:      # lists of different lengths, or none
        valid = False
    if not valid or counts.ndim != 1 or counts.sum() != size[0] * size[1] or runs.get("size") != list(size):
        raise ValueError("run lengths (RLE) that do not fit the size of the image")
    mask = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T
    return (slice(0, size[0]), slice(0, size[1])), mask


def _decompress(text):
    """Decompress run lengths as rleFrString of COCO's maskApi.c does; [] for other text.

    Each byte is 48 plus 5 bits of a number, lowest first, plus 32 if more follow; bit 16 of the last one is the sign.
    From the fourth on, the numbers are differences to the number two before.
    """
    counts, value, shift = [], 0, 0
    for byte in text.encode(errors="replace"):
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not 0 <= bits < 64 or shift > 40:
            return []
        if bits < 32:
            value -= (bits & 16) << shift - 4
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def draw(kind, geometry, size):
    """Draw a shape.

    Args:
        kind: "coco", or the shape_type of Labelme.
        geometry: segmentation of a COCO annotation, or a shape of Labelme.
        size: (H, W) of the image.

    Returns:
        [(window, mask)].
    """
    if kind == "coco":
        if isinstance(geometry, dict):
            return [read_runs(geometry, size)]
        if not isinstance(geometry, list) or not geometry:
            raise ValueError("annotation without an outline, such as a box")
        rings = geometry if isinstance(geometry[0], list) else [geometry]
        return [fill_polygon(read_points(ring), size) for ring in rings]
    points = read_points(geometry.get("points"))
    if kind == "mask":
        return [read_bitmap(points, geometry.get("mask"), size)]
    if kind == "circle" and len(points) == 2:       # its center and a point on it
        kind, angles = "polygon", np.arange(720) * (np.pi / 360)
        points = points[0] + np.hypot(*(points[1] - points[0])) * np.stack([np.cos(angles), np.sin(angles)], 1)
    if kind == "rectangle" and len(points) == 2:
        (x, y), (x_end, y_end) = points
        points = np.array([[x, y], [x_end, y], [x_end, y_end], [x, y_end]])
    if kind in ("polygon", "rectangle", "oriented_rectangle"):
        return [fill_polygon(points, size)]
    raise ValueError(f"shape of the kind {str(kind)[:40]}, which has no area")
