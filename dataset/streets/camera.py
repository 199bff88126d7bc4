"""The camera: projection of polygons in meters to pixels, label ids and instance ids.

`Scene` contains the unfinished picture and draws into it. `finish` makes it look like a photograph: light, blur, sensor
noise.
"""

import cv2
import numpy as np

from ..labels import ClassTable

CAMERA_HEIGHT = 1.6     # meters above the road
FAR = 150.0             # meters; nothing is drawn beyond
IDS = {row["name"]: row["id"] for row in ClassTable.read().rows}
INSTANCE_CLASSES = ("person", "rider", "car", "truck", "bus", "caravan", "trailer", "train", "motorcycle",
                    "bicycle")


class Scene:
    """An unfinished picture: colors, label ids and instance ids, as seen by a pinhole camera.

    Points are (x, y, z) in meters: right of the camera, up from the road, ahead of the camera. There is no depth
    buffer: later shapes cover earlier ones.

    Args:
        height, width: of the picture, pixels.
        rng: NumPy Generator of all random numbers of the scene.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) uint8, label ids of Cityscapes.
        instances: (H, W) uint16, instance ids as in Cityscapes: id · 1000 + number, or the id for classes without
            instances.
    """

    def __init__(self, height, width, rng):
        self.height, self.width, self.rng = height, width, rng
        self.focal = width * rng.uniform(0.75, 0.95)      # focal length, pixels
        self.center = width * rng.uniform(0.42, 0.58)     # column of x = 0
        self.horizon = height * rng.uniform(0.40, 0.48)   # row of the horizon
        self.image = np.zeros((height, width, 3), np.uint8)
        self.ids = np.zeros((height, width), np.uint8)
        self.instances = np.zeros((height, width), np.uint16)
        self.counts = dict.fromkeys(INSTANCE_CLASSES, 0)
        self.haze = np.array([205, 212, 220.0]) * rng.uniform(0.85, 1.05)
        self.haze_range = rng.uniform(120, 500)     # meters over which the contrast falls to 1/e
        self.noise = periodic_noise(rng, 512)

    def project(self, points):
        """Project points (n, 3) to pixels (n, 2)."""
        x, y, z = np.asarray(points, float).reshape(-1, 3).T
        z = np.maximum(z, 0.5)
        return np.stack([self.center + self.focal * x / z,
                         self.horizon + self.focal * (CAMERA_HEIGHT - y) / z], axis=1)

    def fixed_point(self, points):
        """Project points (n, 3) to pixels (n, 2) in sixteenths: fixed-point numbers for OpenCV with shift=4."""
        return np.round(np.clip(self.project(points), -3e4, 3e4) * 16).astype(np.int32)

    def in_haze(self, color, z):
        """Blend colors (..., 3) with haze over a distance of z meters."""
        clear = np.exp(-np.asarray(z, float) / self.haze_range)[..., None]
        return np.asarray(color, float) * clear + self.haze * (1 - clear)

    def new_instance(self, name):
        """Count a new object of a class and return its instance id; None for classes without instances."""
        if name not in self.counts:
            return None
        self.counts[name] += 1
        return IDS[name] * 1000 + self.counts[name] - 1

    def polygon(self, points, color, name=None, instance=None):
        """Fill a polygon. Without a class name, only colors change, not labels."""
        points = np.asarray(points, float).reshape(-1, 3)
        fixed = self.fixed_point(points)
        shade = np.clip(self.in_haze(color, points[:, 2].mean()), 0, 255)
        cv2.fillPoly(self.image, [fixed], shade.tolist(), shift=4)
        if name is not None:
            cv2.fillPoly(self.ids, [fixed], IDS[name], shift=4)
            cv2.fillPoly(self.instances, [fixed], IDS[name] if instance is None else instance, shift=4)

    def upright(self, x, z, outline, color, name=None, instance=None):
        """Fill an upright outline (n, 2) of (right, up) meters that faces the camera at (x, z)."""
        outline = np.asarray(outline, float).reshape(-1, 2)
        points = np.stack([x + outline[:, 0], outline[:, 1], np.full(len(outline), z)], axis=1)
        self.polygon(points, color, name, instance)

    def bar(self, x, z, start, end, width, color, name=None, instance=None):
        """Draw a straight bar, `width` meters wide, between two (right, up) points of the upright plane at (x, z)."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        along = (end - start) / max(np.linalg.norm(end - start), 1e-6)
        side = np.array([-along[1], along[0]]) * width / 2
        self.upright(x, z, [start + side, end + side, end - side, start - side], color, name, instance)

    def shadow(self, x, z, half_width, half_length, strength=0.55):
        """Darken an ellipse of the ground with center (x, z) and half axes in meters to `strength` times its light."""
        angle = np.linspace(0, 2 * np.pi, 24)
        points = np.stack([x + half_width * np.cos(angle), 0 * angle,
                           np.maximum(z + half_length * np.sin(angle), 1)], axis=1)
        mask = np.zeros(self.ids.shape, np.uint8)
        cv2.fillPoly(mask, [self.fixed_point(points)], 1, shift=4)
        mask = mask.astype(bool)
        self.image[mask] = (self.image[mask] * strength).astype(np.uint8)

    def fill(self, mask, colors, name):
        """Paint the n pixels of a mask (H, W) in colors (n, 3) and label them."""
        self.image[mask] = np.clip(colors, 0, 255)
        self.ids[mask] = IDS[name]
        self.instances[mask] = IDS[name]

    def grain(self, u, v, scale):
        """Return smooth noise from -1 to 1 at surface coordinates u, v in meters, with a period of `scale` meters."""
        u, v = ((np.asarray(a, float) / scale * 512).astype(np.int64) % 512 for a in (u, v))
        return self.noise[v, u]

    def choice(self, *choices):
        """Choose one of the arguments at random."""
        return choices[self.rng.integers(len(choices))]

    def color(self, low=40, high=220, saturation=1.0):
        """Draw a random RGB color (3,) with values from low to high; saturation 0 is gray."""
        gray = self.rng.uniform(low, high)
        return np.clip(gray + (self.rng.uniform(low, high, 3) - gray) * saturation, 0, 255)


def periodic_noise(rng, size):
    """Make (size, size) periodic noise of several octaves, from -1 to 1."""
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((4, 1.0), (16, 0.6), (64, 0.5), (256, 0.4), (512, 0.3)):
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        wrapped = np.pad(grid, 2, mode="wrap")
        step = size // cells
        large = cv2.resize(wrapped, None, fx=step, fy=step, interpolation=cv2.INTER_LINEAR)
        total += weight * large[2 * step:2 * step + size, 2 * step:2 * step + size]
    return total / np.abs(total).max()


def finish(scene, height, width):
    """Reduce a scene to its final size and add uneven light, white balance, blur and sensor noise.

    Args:
        scene: `Scene`.
        height, width: of the result, pixels.

    Returns:
        image (H, W, 3) uint8 RGB, label ids (H, W) uint8, instance ids (H, W) uint16.
    """
    rng = scene.rng
    image = cv2.resize(scene.image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    u, v = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    slope = 1 + rng.uniform(-0.18, 0.18) * u + rng.uniform(-0.08, 0.08) * v
    image *= (slope * (1 - 0.12 * (u ** 2 + v ** 2)) * rng.uniform(0.72, 1.15))[..., None]
    image *= rng.uniform(0.93, 1.07, 3)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7))
    image += rng.normal(0, rng.uniform(2, 6), image.shape)
    step = scene.height // height
    ids, instances = (np.ascontiguousarray(a[::step, ::step]) for a in (scene.ids, scene.instances))
    return np.clip(image, 0, 255).astype(np.uint8), ids, instances
