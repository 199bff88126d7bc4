"""Draw labelled street scenes, laid out and named like Cityscapes, for a machine without the real data.

    python -m dataset.streets OUT --train 200 --val 50 --size 256,512 --seed 0

A camera stands on a road and looks along it. Ground and house fronts are planes, found for every pixel by
intersecting its ray; everything else is polygons in metres, drawn from far to near. Colours are drawn at
random within each class, so that shape, place and texture have to tell what something is.
The same seed gives the same files, byte for byte.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils import cli
from utils.logger import progress

from .labels import ClassTable

CITY = "drawn"
CAMERA_HEIGHT = 1.6     # metres above the road
FAR = 150.0             # metres; nothing is drawn beyond
IDS = {row["name"]: row["id"] for row in ClassTable.read().rows}
INSTANCE_CLASSES = ("person", "rider", "car", "truck", "bus", "caravan", "trailer", "train", "motorcycle",
                    "bicycle")
# Every scene is sure to hold two of these, in turn, so that each class is in every split.
RARE = ("train", "truck", "bus", "motorcycle", "rider", "wall", "fence", "traffic light", "traffic sign")


class Scene:
    """A picture under construction: colours, label ids and instance ids, drawn through one camera.

    Points are (x, y, z) in metres: right, up from the road, ahead. All draws come from `rng`.
    """

    def __init__(self, height, width, rng):
        self.height, self.width, self.rng = height, width, rng
        self.focal = width * rng.uniform(0.75, 0.95)                  # pixels
        self.center = width * rng.uniform(0.42, 0.58)
        self.horizon = height * rng.uniform(0.40, 0.48)
        self.image = np.zeros((height, width, 3), np.uint8)
        self.ids = np.zeros((height, width), np.uint8)
        self.instances = np.zeros((height, width), np.uint16)
        self.counts = dict.fromkeys(INSTANCE_CLASSES, 0)
        self.haze = np.array([205, 212, 220.0]) * rng.uniform(0.85, 1.05)
        self.haze_range = rng.uniform(120, 500)                       # metres
        self.noise = _noise(rng, 512)

    def project(self, points):
        """Points (n, 3) → pixels (n, 2)."""
        x, y, z = np.asarray(points, float).reshape(-1, 3).T
        z = np.maximum(z, 0.5)
        return np.stack([self.center + self.focal * x / z,
                         self.horizon + self.focal * (CAMERA_HEIGHT - y) / z], axis=1)

    def fixed(self, points):
        """Points (n, 3) → pixels (n, 2) in sixteenths, as OpenCV draws them with shift=4."""
        return np.round(np.clip(self.project(points), -3e4, 3e4) * 16).astype(np.int32)

    def in_haze(self, color, z):
        """Colours (..., 3) as seen over z metres."""
        clear = np.exp(-np.asarray(z, float) / self.haze_range)[..., None]
        return np.asarray(color, float) * clear + self.haze * (1 - clear)

    def new_instance(self, name):
        """The instance id of one more object of that class; None for classes without instances."""
        if name not in self.counts:
            return None
        self.counts[name] += 1
        return IDS[name] * 1000 + self.counts[name] - 1

    def polygon(self, points, color, name=None, instance=None):
        """Fill a polygon; with no name it only paints, and what it lies on keeps its label."""
        points = np.asarray(points, float).reshape(-1, 3)
        fixed = self.fixed(points)
        shade = np.clip(self.in_haze(color, points[:, 2].mean()), 0, 255)
        cv2.fillPoly(self.image, [fixed], shade.tolist(), shift=4)
        if name is not None:
            cv2.fillPoly(self.ids, [fixed], IDS[name], shift=4)
            cv2.fillPoly(self.instances, [fixed], IDS[name] if instance is None else instance, shift=4)

    def upright(self, x, z, outline, color, name=None, instance=None):
        """Fill an outline (n, 2) of (right, up) metres that stands at (x, z) and faces the camera."""
        outline = np.asarray(outline, float).reshape(-1, 2)
        points = np.stack([x + outline[:, 0], outline[:, 1], np.full(len(outline), z)], axis=1)
        self.polygon(points, color, name, instance)

    def bar(self, x, z, start, end, width, color, name=None, instance=None):
        """A straight bar between two (right, up) points of an upright plane; width in metres."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        along = (end - start) / max(np.linalg.norm(end - start), 1e-6)
        side = np.array([-along[1], along[0]]) * width / 2
        self.upright(x, z, [start + side, end + side, end - side, start - side], color, name, instance)

    def shadow(self, x, z, half_width, half_length, strength=0.55):
        """Darken an ellipse of the ground."""
        angle = np.linspace(0, 2 * np.pi, 24)
        points = np.stack([x + half_width * np.cos(angle), 0 * angle,
                           np.maximum(z + half_length * np.sin(angle), 1)], axis=1)
        mask = np.zeros(self.ids.shape, np.uint8)
        cv2.fillPoly(mask, [self.fixed(points)], 1, shift=4)
        mask = mask.astype(bool)
        self.image[mask] = (self.image[mask] * strength).astype(np.uint8)

    def fill(self, mask, colors, name):
        """Paint the pixels of a mask (H, W) in colours (n, 3) and label them."""
        self.image[mask] = np.clip(colors, 0, 255)
        self.ids[mask] = IDS[name]
        self.instances[mask] = IDS[name]

    def grain(self, u, v, scale):
        """Smooth noise in -1 to 1 at surface coordinates u, v (metres); scale: metres of its whole tile."""
        u, v = ((np.asarray(a, float) / scale * 512).astype(np.int64) % 512 for a in (u, v))
        return self.noise[v, u]

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def color(self, low=40, high=220, saturation=1.0):
        """A random colour; saturation 0 is grey."""
        grey = self.rng.uniform(low, high)
        return np.clip(grey + (self.rng.uniform(low, high, 3) - grey) * saturation, 0, 255)


def _noise(rng, size):
    """(size, size) periodic noise of several octaves, in -1 to 1."""
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((4, 1.0), (16, 0.6), (64, 0.5), (256, 0.4), (512, 0.3)):
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        wrapped = np.pad(grid, 2, mode="wrap")
        step = size // cells
        large = cv2.resize(wrapped, None, fx=step, fy=step, interpolation=cv2.INTER_LINEAR)
        total += weight * large[2 * step:2 * step + size, 2 * step:2 * step + size]
    return total / np.abs(total).max()


# ---- planes: sky, ground, house fronts ----

def draw_sky(scene):
    height, width = scene.height, scene.width
    rows = np.linspace(0, 1, height)[:, None, None]
    top, bottom = scene.pick(([90, 140, 205], [190, 210, 230]), ([150, 160, 170], [215, 218, 222]),
                             ([120, 150, 200], [240, 215, 190]), ([185, 190, 195], [225, 225, 228]))
    sky = np.array(top) * (1 - rows) + np.array(bottom) * rows
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    clouds = np.clip(scene.grain(x, y * 2.5 + scene.rng.uniform(), 1.7) * 2.2, 0, 1)[..., None]
    sky = sky * (1 - 0.7 * clouds) + 238 * 0.7 * clouds
    scene.fill(np.ones((height, width), bool), sky.reshape(-1, 3), "sky")


def draw_skyline(scene):
    """Far houses and trees at the end of the street."""
    for _ in range(14):
        x, half = scene.rng.uniform(-130, 130), scene.rng.uniform(4, 14)
        if scene.rng.uniform() < 0.5:
            top = scene.rng.uniform(6, 22)
            scene.upright(x, FAR, [(-half, 0), (-half, top), (half, top), (half, 0)],
                          scene.color(90, 200, 0.3), "building")
        else:
            _foliage(scene, x, FAR, scene.rng.uniform(3, 7), half, scene.rng.uniform(4, 8))


def draw_ground(scene, layout):
    """Road, markings, pavement and what lies beside it, by the ground point of every pixel below the horizon."""
    rng = scene.rng
    v, u = np.mgrid[0:scene.height, 0:scene.width]
    below = v > scene.horizon + scene.focal * CAMERA_HEIGHT / (FAR * 1.5)
    z = scene.focal * CAMERA_HEIGHT / (v[below] - scene.horizon)
    x = (u[below] - scene.center) * z / scene.focal

    grass = scene.color(60, 120, 0.25) + scene.pick([5, 35, -25], [40, 30, -15], [20, 15, 0])
    fine, coarse = scene.grain(x, z, 3.0), scene.grain(x, z, 22.0)
    colors = grass * (1 + 0.35 * fine + 0.15 * coarse)[:, None]
    names = np.full(len(x), IDS["terrain"])

    left, right, walk_left, walk_right = layout["left"], layout["right"], layout["walk_left"], layout["walk_right"]
    walk = (x > left - walk_left) & (x < right + walk_right)
    tile = scene.pick(0.5, 0.8, 1.2)
    joints = ((x % tile) < 0.05) | ((z % tile) < 0.06)
    paving = scene.color(110, 190, 0.18)[None] * (1 + 0.14 * fine)[:, None]
    paving = np.where((joints & (z < 22))[:, None], paving * 0.78, paving)
    colors[walk], names[walk] = paving[walk], IDS["sidewalk"]

    road = (x > left) & (x < right)
    asphalt = scene.color(65, 125, 0.1)
    surface = asphalt * (1 + 0.12 * fine + 0.10 * coarse)[:, None]
    tracks = np.exp(-((np.abs(x - layout["lane"]) - 0.8) / 0.35) ** 2)
    surface *= (1 - 0.07 * tracks)[:, None]
    surface[_markings(x, z, layout)] = rng.uniform(180, 235)
    colors[road], names[road] = surface[road], IDS["road"]
    curb = (np.abs(x - left) < 0.12) | (np.abs(x - right) < 0.12)
    colors[curb] = asphalt * rng.uniform(1.3, 1.7)
    names[curb] = IDS["sidewalk"]

    if layout["parking"]:
        bay = (x > right - 2.2) & (x < right) & (z > layout["parking"]) & (z < layout["parking"] + 14)
        colors[bay] *= rng.uniform(0.8, 1.25)
        names[bay] = IDS["parking"]
    if layout["rails"] is not None:
        offset = np.abs(np.abs(x - layout["rails"]) - 0.72)
        colors[offset < 0.07] = [60, 58, 56]
        names[np.abs(x - layout["rails"]) < 1.0] = IDS["rail track"]

    colors *= layout["shade"]
    scene.image[below] = np.clip(scene.in_haze(colors, z), 0, 255)
    scene.ids[below] = names
    scene.instances[below] = names


def _markings(x, z, layout):
    """Which ground points bear road paint: centre dashes, edge lines, a crossing."""
    middle = (layout["left"] + layout["right"]) / 2
    dashes = (np.abs(x - middle) < 0.08) & ((z + layout["phase"]) % 9 < 4)
    edges = (np.abs(x - layout["left"] - 0.35) < 0.06) | (np.abs(x - layout["right"] + 0.35) < 0.06)
    crossing = (np.abs(z - layout["crossing"]) < 1.6) & (x % 1.0 < 0.5)
    return dashes | (edges & layout["edge_lines"]) | crossing


def draw_front(scene, side, distance, segments):
    """One row of house fronts, walls, fences or hedges, on the plane x = side · distance.

    side: -1 left, 1 right; segments: dicts with name, start, end (metres ahead), height (metres), style.
    """
    for segment in segments:
        if segment["name"] == "building":       # the gable end that faces the camera
            depth, top, z = 9.0, segment["height"], segment["start"]
            gable = [(side * distance, 0, z), (side * distance, top, z),
                     (side * (distance + depth), top, z), (side * (distance + depth), 0, z)]
            scene.polygon(gable, segment["color"] * 0.8, "building")
    v, u = np.mgrid[0:scene.height, 0:scene.width]
    offset = (u - scene.center) * side
    z = scene.focal * distance / np.maximum(offset, 1e-3)
    y = CAMERA_HEIGHT - (v - scene.horizon) * z / scene.focal
    for segment in segments:
        here = (offset > 0) & (z >= segment["start"]) & (z < segment["end"]) & (y >= 0) & (y <= segment["height"])
        if not here.any():
            continue
        along, up = z[here] - segment["start"], y[here]
        colors, solid = PAINTERS[segment["name"]](scene, segment, along, up, scene.image[here].astype(float))
        colors = scene.in_haze(colors * segment["light"], z[here])
        whole = here.copy()
        whole[here] = solid
        scene.fill(whole, colors[solid], segment["name"])


def paint_building(scene, segment, along, up, behind):
    """Windows in rows, a ground floor, a cornice. Returns colours (n, 3) and which points are there."""
    fine = scene.grain(along, up, 2.5)
    colors = segment["color"] * (1 + 0.10 * fine)[:, None]
    if segment["style"] == 0:                       # courses of stone or brick
        course = (up % 0.4 < 0.06) | ((along + 0.4 * (np.floor(up / 0.4) % 2)) % 0.9 < 0.06)
        colors[course] *= 0.85
    floor, bay = segment["floor"], segment["bay"]
    in_bay, in_floor = along % bay / bay, (up % floor) / floor
    framed = (np.abs(in_bay - 0.5) < segment["wide"] + 0.04) & (in_floor > 0.22) & (in_floor < 0.88)
    glass = (np.abs(in_bay - 0.5) < segment["wide"]) & (in_floor > 0.27) & (in_floor < 0.84)
    lit = _hash(np.floor(along / bay) + 17 * np.floor(up / floor) + segment["seed"])
    colors[framed] = segment["trim"]
    panes = np.array([62, 74, 88]) + (lit * 90)[:, None] * np.array([0.9, 0.95, 1.0])
    sill = glass & (np.abs(in_bay - 0.5) > 0.02)
    colors[sill] = panes[sill] * (0.8 + 0.4 * in_floor[sill])[:, None]
    ground = up < floor
    shop = ground & (np.abs(in_bay - 0.5) < 0.42) & (up < floor * 0.8) & (up > 0.4) & segment["shop"]
    colors[shop] = panes[shop] * 0.7
    sign = ground & (up > floor * 0.82) & segment["shop"]
    colors[sign] = segment["accent"]
    door = ground & (np.abs(along - segment["door"]) < 0.6) & (up < 2.2)
    colors[door] = segment["accent"] * 0.6
    colors[up > segment["height"] - 0.4] = segment["trim"] * 0.85
    return colors, np.ones(len(up), bool)


def paint_wall(scene, segment, along, up, behind):
    """Blocks or plaster with stains, and a coping."""
    colors = segment["color"] * (1 + 0.16 * scene.grain(along, up, 2.0) + 0.10 * scene.grain(along, up, 9.0))[:, None]
    if segment["style"] < 2:
        block = 0.3 if segment["style"] else 0.6
        course = (up % block < 0.05) | ((along + block * (np.floor(up / block) % 2)) % (2 * block) < 0.05)
        colors[course] *= 0.72
    colors[up > segment["height"] - 0.15] *= 1.25
    return colors, np.ones(len(up), bool)


def paint_fence(scene, segment, along, up, behind):
    """Pickets, mesh or railing; what lies behind shows between the bars but is labelled fence."""
    pitch = (0.25, 0.14, 0.5)[segment["style"]]
    bars = along % pitch < pitch * (0.55, 0.22, 0.16)[segment["style"]]
    rails = (np.abs(up - 0.25) < 0.05) | (np.abs(up - segment["height"] + 0.12) < 0.06)
    posts = along % 2.4 < 0.12
    if segment["style"] == 1:
        rails |= (up + along) % 0.2 < 0.035
    there = (bars | rails | posts)[:, None]
    colors = np.where(there, segment["color"] * (1 + 0.1 * scene.grain(along, up, 1.5))[:, None], behind * 0.9)
    return colors, np.ones(len(up), bool)


def paint_hedge(scene, segment, along, up, behind):
    leaves = scene.grain(along, up, 1.6)
    colors = segment["color"] * (1 + 0.5 * leaves)[:, None]
    return colors, up < segment["height"] * (0.88 + 0.12 * scene.grain(along, along, 5.0))


PAINTERS = {"building": paint_building, "wall": paint_wall, "fence": paint_fence, "vegetation": paint_hedge}


def _hash(values):
    """Pseudo-random numbers in 0 to 1, the same for the same value."""
    return np.abs(np.sin(values * 12.9898) * 43758.5453) % 1


# ---- vehicles: cross-sections drawn from far to near ----

def loft(scene, x, z, length, section, name, instance):
    """Draw a solid of the given length by its cross-sections; `section(t)` → [(outline, colour)], t from 0
    (near end) to 1. Sections behind the first are darker: they make the visible side."""
    pixels = scene.focal * max(abs(x), 1.0) * (1 / max(z, 1) - 1 / (z + length))
    steps = int(np.clip(pixels, 6, 90))
    for t in np.linspace(1, 0, steps):
        side = 0.62 if t > 0.02 else 1.0
        for outline, color in section(t):
            scene.upright(x, z + t * length, outline, np.asarray(color) * side, name, instance)


def box(half, low, high, top_half=None):
    """Outline of a (trapezoid) cross-section."""
    top_half = half if top_half is None else top_half
    return [(-half, low), (-top_half, high), (top_half, high), (half, low)]


def wheels(t, half, length, radius, axles):
    """Cross-section of the wheels at t: two dark blocks as high as the circle is there."""
    for axle in axles:
        reach = radius ** 2 - ((t - axle) * length) ** 2
        if reach > 0:
            r = np.sqrt(reach)
            return [(box(half + 0.02, radius - r, radius + r), (28, 28, 30))]
    return []


def draw_car(scene, x, z, away):
    rng = scene.rng
    instance = scene.new_instance("car")
    length, half, top = rng.uniform(3.8, 4.8), rng.uniform(0.82, 0.95), rng.uniform(1.38, 1.75)
    paint = scene.pick(scene.color(25, 235, 0.1), scene.color(25, 235, 0.1), scene.color(30, 220, 1.0))
    belt = rng.uniform(0.85, 1.0)
    trunk = rng.uniform(0.0, 0.2) if away else rng.uniform(0.2, 0.28)
    hood = rng.uniform(0.24, 0.3) if away else rng.uniform(0.04, 0.15)
    glass = np.array([40, 48, 58]) * rng.uniform(0.8, 1.6)

    def section(t):
        parts = [(box(half, 0.28, belt * (1 if trunk < t < 1 - hood else 0.88)), paint)]
        rise = np.clip(min((t - trunk + 0.05) / 0.14, (1 - hood + 0.05 - t) / 0.16), 0, 1)
        if rise > 0:
            roof = belt + (top - belt) * rise
            pillar = min(abs(t - trunk), abs(t - 0.55), abs(t - 1 + hood)) < 0.025
            parts.append((box(half * 0.95, belt, roof, half * (0.95 - 0.2 * rise)), paint if pillar else glass))
            if rise == 1:
                parts.append((box(half * 0.76, roof - 0.08, roof), paint))
        return parts + wheels(t, half, length, 0.32, (0.18, 0.8))

    scene.shadow(x, z + length / 2, half + 0.35, length / 2 + 0.4)
    loft(scene, x, z, length, section, "car", instance)
    if trunk < 0.1:
        scene.upright(x, z, box(half * 0.8, belt, top - 0.12, half * 0.7), glass)
    _face(scene, x, z, half, belt, away, paint)


def _face(scene, x, z, half, belt, away, paint):
    """Lights, plate, bumper and tyres of the end that faces the camera."""
    lamp = (200, 30, 25) if away else (250, 248, 225)
    for side in (-1, 1):
        scene.upright(x + side * half * 0.76, z, box(half * 0.17, belt * 0.70, belt * 0.84), lamp)
        scene.upright(x + side * half * 0.74, z, box(0.12, 0.0, 0.3), (25, 25, 26))
    scene.upright(x, z, box(half, 0.28, 0.45), paint * 0.45)
    scene.upright(x, z, box(0.26, 0.50, 0.61), (225, 225, 215))
    if not away:
        scene.upright(x, z, box(half * 0.45, 0.62, 0.76), (35, 35, 38))


def draw_bus(scene, x, z, away):
    rng = scene.rng
    instance = scene.new_instance("bus")
    length, half, top = rng.uniform(9, 12), 1.25, rng.uniform(2.9, 3.2)
    paint, stripe = scene.color(50, 235, 0.8), scene.color(40, 230, 1.0)
    glass = np.array([48, 56, 66.0])

    def section(t):
        pane = 0.03 < t < 0.97 and (t * length) % 1.5 > 0.12
        return [(box(half, 0.35, 1.1), stripe), (box(half, 1.0, top), paint),
                (box(half, 1.25, 2.35), glass if pane else paint),
                *wheels(t, half, length, 0.48, (0.2, 0.75))]

    scene.shadow(x, z + length / 2, half + 0.4, length / 2 + 0.5)
    loft(scene, x, z, length, section, "bus", instance)
    scene.upright(x, z, box(half * 0.92, 1.2, 2.45), glass)
    scene.upright(x, z, box(half * 0.7, 2.55, top - 0.12), (25, 25, 25))
    scene.upright(x, z, box(half * 0.45, 2.62, top - 0.2), (240, 170, 40))
    _face(scene, x, z, half, 1.0, away, stripe)


def draw_truck(scene, x, z, away):
    rng = scene.rng
    instance = scene.new_instance("truck")
    length, half, top = rng.uniform(6.5, 9), 1.22, rng.uniform(3.0, 3.7)
    cargo, cab = scene.pick(scene.color(150, 240, 0.15), scene.color(40, 220, 1.0)), scene.color(40, 220, 0.9)
    cab_part = 0.26
    logo = scene.color(30, 230, 1.0)

    def section(t):
        front = t > 1 - cab_part if away else t < cab_part
        gap = abs(t - (1 - cab_part if away else cab_part)) < 0.02
        chassis = (box(half * 0.8, 0.45, 0.95), (45, 45, 48))
        if gap:
            parts = [chassis]
        elif front:
            nose = t < 0.12 or t > 0.88
            parts = [(box(half, 0.5, 2.6), cab), (box(half, 1.5, 2.25), (50, 58, 66) if not nose else cab)]
        else:
            middle = 0.45 < t < 0.62
            parts = [chassis, (box(half, 0.95, top), cargo), (box(half, 1.5, top - 0.7), logo if middle else cargo)]
        return parts + wheels(t, half, length, 0.48, (0.14, 0.3, 0.86))

    scene.shadow(x, z + length / 2, half + 0.4, length / 2 + 0.5)
    loft(scene, x, z, length, section, "truck", instance)
    if away:
        scene.upright(x, z, box(0.03, 1.0, top - 0.1), cargo * 0.6)
        for side in (-1, 1):
            scene.upright(x + side * half * 0.5, z, box(half * 0.42, 1.05, top - 0.15), cargo * 0.93)
            scene.upright(x + side * half * 0.12, z, box(0.04, 1.1, top - 0.2), (120, 120, 120))
    else:
        scene.upright(x, z, box(half * 0.9, 1.5, 2.4), (44, 52, 62))
        scene.upright(x, z, box(half * 0.6, 0.85, 1.3), (30, 30, 32))
    _face(scene, x, z, half, 0.95, away, np.array([90, 90, 90.0]))


def draw_train(scene, x, z, away):
    """A tram: long, in sections, with a pantograph and an overhead wire."""
    rng = scene.rng
    instance = scene.new_instance("train")
    length, half, top = rng.uniform(18, 30), 1.25, rng.uniform(3.3, 3.6)
    paint, band = scene.color(60, 240, 0.9), scene.color(60, 240, 0.3)
    glass = np.array([42, 50, 60.0])

    def section(t):
        if (t * length) % 9 > 8.5:
            return [(box(half * 0.93, 0.3, top - 0.1), (50, 50, 52))]
        pane = (t * length) % 1.9 > 0.25
        return [(box(half, 0.15, 1.2), paint), (box(half, 1.2, top, half * 0.88), band),
                (box(half * 0.99, 1.4, 2.6, half * 0.95), glass if pane else band)]

    scene.shadow(x, z + length / 2, half + 0.4, length / 2 + 0.5)
    loft(scene, x, z, length, section, "train", instance)
    scene.upright(x, z, box(half * 0.85, 1.35, 2.7, half * 0.75), glass)
    scene.upright(x, z, box(half * 0.5, 2.8, 3.15), (20, 20, 22))
    scene.upright(x, z, box(half * 0.35, 2.87, 3.08), (250, 180, 60))
    for side in (-1, 1):
        scene.upright(x + side * half * 0.65, z, box(0.14, 0.75, 0.98), (250, 245, 220))
    middle = z + 4
    scene.bar(x, middle, (-0.7, top), (0.5, top + 0.7), 0.07, (40, 40, 42), "train", instance)
    scene.bar(x, middle, (0.5, top + 0.7), (-0.4, top + 1.3), 0.07, (40, 40, 42), "train", instance)


# ---- people, two-wheelers ----

SKIN = ((236, 200, 170), (205, 160, 125), (150, 105, 75), (90, 62, 45))


def draw_person(scene, x, z):
    instance = scene.new_instance("person")
    scale = scene.rng.uniform(0.85, 1.08) if scene.rng.uniform() < 0.85 else scene.rng.uniform(0.55, 0.75)
    scene.shadow(x, z, 0.45, 0.3, 0.65)
    stride = scene.rng.uniform(0.03, 0.3)
    legs = scene.color(25, 150, 0.5)
    for foot in (-stride, stride):
        scene.bar(x, z, (foot * scale, 0.0), (foot * 0.25 * scale, 0.86 * scale), 0.17 * scale, legs, "person",
                  instance)
        scene.bar(x, z, ((foot - 0.05) * scale, 0.04), ((foot + 0.12) * scale, 0.04), 0.08, (35, 30, 28), "person",
                  instance)
    _torso(scene, x, z, 0.80 * scale, scale, "person", instance, lean=0.0, reach=scene.rng.uniform(-0.25, 0.25))


def _torso(scene, x, z, hip, scale, name, instance, lean, reach):
    """Trunk, arms and head above the hips; lean and reach (of the hands) in metres at scale 1."""
    coat, skin = scene.color(30, 235, 1.0), np.array(scene.pick(*SKIN))
    shoulder = hip + 0.58 * scale
    top = lean * scale
    half = 0.20 * scale
    scene.upright(x, z, [(-half * 0.85, hip), (top - half, shoulder), (top + half, shoulder), (half * 0.85, hip)],
                  coat, name, instance)
    for side in (-1, 1):
        hand = (top + side * half * 1.25 + reach * scale, hip + (0.05 if lean == 0 else 0.2) * scale)
        scene.bar(x, z, (top + side * half, shoulder - 0.04 * scale), hand, 0.11 * scale, coat * 0.8, name, instance)
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring = np.stack([np.cos(angle) * 0.105, np.sin(angle) * 0.14], axis=1) * scale
    head = ring + [top * 1.25, shoulder + 0.19 * scale]
    scene.upright(x, z, head, skin, name, instance)
    hair = head[(ring[:, 1] > 0.02 * scale)]
    scene.upright(x, z, hair, scene.color(15, 120, 0.4), name, instance)


def _wheel(scene, x, z, middle, radius, name, instance, tyre):
    """A wheel seen from the side: the whole disc is labelled, only tyre and spokes are painted."""
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    fixed = scene.fixed([(x + middle + p[0] * radius, radius + p[1] * radius, z) for p in ring])
    cv2.fillPoly(scene.ids, [fixed], IDS[name], shift=4)
    cv2.fillPoly(scene.instances, [fixed], instance, shift=4)
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        scene.bar(x, z, (middle + a[0] * radius, radius + a[1] * radius),
                  (middle + b[0] * radius, radius + b[1] * radius), tyre, (25, 25, 27))
    for k in range(0, 28, 4):
        scene.bar(x, z, (middle, radius), (middle + ring[k, 0] * radius, radius + ring[k, 1] * radius), 0.012,
                  (150, 150, 155))


def draw_bicycle(scene, x, z, ridden):
    rng = scene.rng
    instance = scene.new_instance("bicycle")
    frame, facing = scene.color(20, 230, 1.0), rng.choice([-1, 1])
    scene.shadow(x, z, 0.9, 0.25, 0.7)
    radius, base = 0.34, 0.52
    for wheel in (-base, base):
        _wheel(scene, x, z, wheel, radius, "bicycle", instance, 0.05)
    points = {"rear": (-base, radius), "crank": (-0.05, 0.3), "seat": (-0.2, 0.85), "head": (0.38, 0.85),
              "front": (base, radius), "bar": (0.42, 1.05)}
    lines = (("rear", "crank"), ("crank", "seat"), ("seat", "rear"), ("crank", "head"), ("seat", "head"),
             ("head", "front"), ("head", "bar"))
    for a, b in lines:
        (ax, ay), (bx, by) = points[a], points[b]
        scene.bar(x, z, (ax * facing, ay), (bx * facing, by), 0.06, frame, "bicycle", instance)
    scene.upright(x, z, box(0.15, 0.86, 0.93) + np.array([-0.2 * facing, 0]), (30, 28, 27), "bicycle", instance)
    scene.bar(x, z, (0.36 * facing, 1.05), (0.56 * facing, 1.0), 0.06, (40, 40, 42), "bicycle", instance)
    if ridden:
        _rider(scene, x, z, -0.2 * facing, 0.92, facing)


def draw_motorcycle(scene, x, z, ridden):
    rng = scene.rng
    instance = scene.new_instance("motorcycle")
    paint, facing = scene.color(20, 220, 1.0), rng.choice([-1, 1])
    scene.shadow(x, z, 1.1, 0.3, 0.6)
    for wheel in (-0.68, 0.68):
        _wheel(scene, x, z, wheel, 0.33, "motorcycle", instance, 0.13)
    shapes = (([(-0.5, 0.35), (-0.35, 0.75), (0.35, 0.8), (0.45, 0.4), (0.1, 0.22), (-0.3, 0.22)], (58, 58, 62)),
              ([(-0.05, 0.72), (0.05, 0.98), (0.42, 0.95), (0.45, 0.72)], paint),
              ([(-0.85, 0.86), (-0.75, 0.72), (0.0, 0.74), (0.0, 0.84), (-0.55, 0.88)], (28, 26, 26)),
              ([(0.36, 0.7), (0.42, 1.15), (0.62, 1.1), (0.62, 0.75)], paint),
              ([(0.5, 0.75), (0.62, 0.75), (0.74, 0.36), (0.62, 0.34)], (120, 120, 125)),
              ([(-0.9, 0.34), (-0.1, 0.26), (-0.1, 0.34), (-0.9, 0.44)], (150, 150, 152)))
    for outline, color in shapes:
        scene.upright(x, z, np.array(outline) * [facing, 1], color, "motorcycle", instance)
    scene.bar(x, z, (0.4 * facing, 1.14), (0.2 * facing, 1.2), 0.05, (40, 40, 42), "motorcycle", instance)
    if ridden:
        _rider(scene, x, z, -0.25 * facing, 0.85, facing)


def _rider(scene, x, z, seat, hip, facing):
    instance = scene.new_instance("rider")
    legs = scene.color(25, 150, 0.5)
    knee, foot = (seat + 0.36 * facing, hip - 0.15), (seat + 0.22 * facing, 0.34)
    scene.bar(x, z, (seat, hip), knee, 0.17, legs, "rider", instance)
    scene.bar(x, z, knee, foot, 0.14, legs, "rider", instance)
    _torso(scene, x + seat, z, hip - 0.03, 1.0, "rider", instance, lean=0.22 * facing, reach=0.25 * facing)


# ---- street furniture and plants ----

def _foliage(scene, x, z, height, half, spread, trunk=0.0):
    """A crown of overlapping leaf clumps between `height - spread / 2` and `height + spread / 2`."""
    base = scene.color(45, 110, 0.3) + scene.pick([-5, 25, -20], [15, 25, -20], [-10, 12, -8], [35, 15, -25])
    angle = np.linspace(0, 2 * np.pi, 9, endpoint=False)
    for layer in range(3):
        for _ in range(16):
            a, r = scene.rng.uniform(0, 2 * np.pi), np.sqrt(scene.rng.uniform())
            cx, cy = r * np.cos(a) * half * 0.75, height + r * np.sin(a) * spread * 0.4
            size = scene.rng.uniform(0.18, 0.4) * half * (1 - 0.2 * layer)
            rough = size * scene.rng.uniform(0.7, 1.2, 9)
            clump = np.stack([cx + rough * np.cos(angle), cy + rough * np.sin(angle) * spread / (2 * half)], axis=1)
            light = 0.65 + 0.2 * layer + 0.25 * (cy - height) / spread + scene.rng.uniform(-0.12, 0.12)
            clump[:, 1] = np.maximum(clump[:, 1], trunk)
            scene.upright(x, z, clump, base * light, "vegetation")


def draw_tree(scene, x, z):
    rng = scene.rng
    height, half = rng.uniform(3.8, 6.5), rng.uniform(1.3, 2.6)
    bark = scene.color(50, 110, 0.2) + [15, 5, -5]
    scene.shadow(x, z, half, half * 0.6, 0.7)
    scene.upright(x, z, box(0.17, 0, height, 0.10), bark, "vegetation")
    _foliage(scene, x, z, height, half, rng.uniform(2.2, 4.0), trunk=1.6)


def draw_bush(scene, x, z):
    half = scene.rng.uniform(0.4, 1.0)
    scene.shadow(x, z, half, half * 0.5, 0.7)
    _foliage(scene, x, z, half * 0.75, half, half * 1.3, trunk=0.0)


def draw_pole(scene, x, z, top=None):
    color = scene.color(50, 160, 0.1)
    top = top or scene.rng.uniform(4.5, 7)
    scene.upright(x, z, box(0.11, 0, top, 0.08), color, "pole")
    scene.upright(x - 0.05, z, box(0.025, 0, top), color * 1.35)
    return color


def draw_lamp(scene, x, z):
    top = scene.rng.uniform(5, 7)
    color = draw_pole(scene, x, z, top)
    reach = -np.sign(x) * 1.5
    scene.bar(x, z, (0, top), (reach, top + 0.25), 0.12, color, "pole")
    scene.bar(x, z, (reach * 0.8, top + 0.18), (reach * 1.25, top + 0.2), 0.2, (200, 200, 195), "pole")


def draw_light(scene, x, z):
    rng = scene.rng
    draw_pole(scene, x, z, 3.0)
    shell = scene.pick((30, 32, 30), (45, 60, 45), (70, 65, 40))
    low, half, high = 2.3, 0.24, 3.35
    scene.upright(x, z, box(half, low, high), shell, "traffic light")
    lit = rng.integers(3)
    lamps = ((235, 40, 30), (245, 180, 40), (50, 220, 120))
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for k, lamp in enumerate(lamps):
        middle = high - 0.19 - 0.335 * k
        disc = np.stack([0.13 * np.cos(angle), middle + 0.13 * np.sin(angle)], axis=1)
        scene.upright(x, z, disc, np.array(lamp) * (1.0 if k == lit else 0.3))


def draw_sign(scene, x, z):
    rng = scene.rng
    draw_pole(scene, x, z, 2.5)
    kind = rng.integers(4)
    middle, r = 2.5, rng.uniform(0.36, 0.5)
    corners = (20, 3, 4, 8)[kind]
    turn = (0, np.pi / 2, np.pi / 4, np.pi / 8)[kind]
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) + turn
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    edge = np.array(scene.pick((190, 25, 30), (30, 70, 160), (235, 190, 40), (230, 230, 230)))
    face = np.array(scene.pick((240, 240, 238), (245, 205, 60), (35, 80, 170), (190, 30, 35)))
    scene.upright(x, z, ring * r + [0, middle], edge, "traffic sign")
    scene.upright(x, z, ring * r * 0.76 + [0, middle], face)
    ink = 255 - face if rng.uniform() < 0.5 else np.array([25, 25, 28])
    scene.bar(x, z, (-r * 0.4, middle), (r * 0.4, middle + rng.uniform(-0.15, 0.15)), r * 0.22, ink)


def draw_void(scene, x, z):
    """A bin, box or bench: there, but not a class that is scored."""
    color, half, top = scene.color(40, 170, 0.5), scene.rng.uniform(0.3, 0.6), scene.rng.uniform(0.7, 1.2)
    name = scene.pick("static", "dynamic")
    scene.shadow(x, z, half + 0.1, 0.3, 0.7)
    scene.upright(x, z, box(half, 0, top), color, name)
    scene.upright(x, z, box(half * 1.05, top * 0.85, top), color * 0.6, name)


def draw_bonnet(scene):
    """The car the camera rides in, at the lower edge: ego vehicle."""
    h, w = scene.height, scene.width
    u = np.arange(w)
    rise = h * (0.045 + 0.03 * np.cos((u / w - 0.5) * 2.6))
    v = np.arange(h)[:, None]
    mask = v > h - rise
    gloss = 45 + 60 * ((h - v) / (h * 0.08)) * np.ones(w)
    scene.fill(mask, np.repeat(gloss[mask][:, None], 3, axis=1), "ego vehicle")


# ---- composition ----

# Metres of road that a vehicle needs; things without an entry stand wherever they are put.
LENGTHS = {draw_car: 5.2, draw_truck: 9.5, draw_bus: 12.5, draw_train: 30.5}


def plan(rng):
    """Widths and details of one street: metres, x to the right of the camera."""
    lane = rng.uniform(-0.4, 0.4)
    left, right = lane - rng.uniform(4.5, 7.5), lane + rng.uniform(2.3, 5.0)
    return {"left": left, "right": right, "lane": lane, "walk_left": rng.uniform(1.8, 4), "rails": None,
            "walk_right": rng.uniform(1.8, 4), "phase": rng.uniform(0, 9), "edge_lines": rng.uniform() < 0.5,
            "crossing": rng.uniform(7, 30) if rng.uniform() < 0.35 else -99.0,
            "parking": rng.uniform(8, 20) if rng.uniform() < 0.2 else None, "shade": rng.uniform(0.8, 1.1)}


def front_segments(scene, kinds, shares, heights):
    """A row of segments from near to far; kinds may hold None for a gap."""
    rng = scene.rng
    start, segments = rng.uniform(1.5, 4), []
    while start < FAR:
        name = kinds[rng.choice(len(kinds), p=shares)]
        end = start + rng.uniform(6, 18)
        if name is not None:
            low, high = heights[name]
            height = rng.uniform(low, high)
            green = scene.color(45, 100, 0.3) + [-5, 22, -18]
            segments.append({
                "name": name, "start": start, "end": end, "height": height, "style": int(rng.integers(3)),
                "color": green if name == "vegetation" else scene.color(60, 215, 0.45),
                "trim": scene.color(130, 240, 0.15), "accent": scene.color(40, 210, 1.0),
                "floor": rng.uniform(2.8, 3.6), "bay": rng.uniform(1.8, 3.4), "wide": rng.uniform(0.2, 0.32),
                "shop": bool(rng.uniform() < 0.4), "door": rng.uniform(1, end - start - 1),
                "seed": rng.uniform(0, 99), "light": rng.uniform(0.75, 1.1)})
        start = end + (rng.uniform(0, 5) if rng.uniform() < 0.3 else 0)
    return segments


def draw_fronts(scene, layout, sure):
    rng = scene.rng
    for side, edge in ((-1, -layout["left"] + layout["walk_left"]), (1, layout["right"] + layout["walk_right"])):
        setback = rng.uniform(3.0, 6.0)
        houses = front_segments(scene, ("building", None), (0.82, 0.18), {"building": (5, 17)})
        low = front_segments(scene, ("wall", "fence", "vegetation", None), (0.25, 0.27, 0.16, 0.32),
                             {"wall": (1.0, 2.6), "fence": (0.9, 1.9), "vegetation": (0.8, 1.8)})
        near = [segment for segment in low if segment["start"] < 14]
        for name in {"wall", "fence"} & sure:
            segment = near[0] if near else low[0]
            segment |= {"name": name, "height": rng.uniform(1.2, 2.2), "color": scene.color(60, 215, 0.45)}
        draw_front(scene, side, edge + setback, houses)
        for _ in range(rng.integers(0, 3)):
            draw_tree(scene, side * (edge + setback * rng.uniform(0.3, 0.8)), rng.uniform(12, 60))
        draw_front(scene, side, edge + 0.2, low)


def things(scene, layout, sure):
    """[(z, draw)] of everything that stands on the ground."""
    rng = scene.rng
    found = []

    taken = []      # (x, near z, far z) of vehicles

    def add(z, draw, x, *args):
        length = LENGTHS.get(draw)
        if length is not None:
            if any(abs(x - a) < 2.4 and z < far and near < z + length for a, near, far in taken):
                return
            taken.append((x, z, z + length))
        found.append((z, lambda: draw(scene, x, *args)))

    left, right = layout["left"], layout["right"]
    walks = ((left - layout["walk_left"], left), (right, right + layout["walk_right"]))

    def on_walk():
        low, high = walks[rng.integers(2)]
        return rng.uniform(low + 0.4, high - 0.3)

    _add_sure(scene, layout, sure, add, on_walk)
    oncoming, ahead = left + (layout["lane"] - left) * 0.42, layout["lane"] + rng.uniform(-0.2, 0.2)
    for lane, away in ((ahead, True), (oncoming, False)):
        z = rng.uniform(9, 22)
        for _ in range(rng.integers(1, 4)):
            draw = rng.choice([draw_car, draw_bus, draw_truck], p=[0.7, 0.15, 0.15])
            add(z, draw, lane, z, away)
            z += rng.uniform(14, 30)
    z = rng.uniform(5, 12)
    while z < 55:       # parked at the kerb
        if rng.uniform() < 0.55:
            add(z, draw_car, right - 1.0, z, rng.uniform() < 0.7)
        z += rng.uniform(5.5, 9)

    for draw, mean in ((draw_person, 4.5), (draw_lamp, 1.5), (draw_pole, 1.0), (draw_light, 0.9), (draw_sign, 1.4),
                       (draw_tree, 1.6), (draw_bush, 1.0), (draw_void, 0.6)):
        for _ in range(rng.poisson(mean)):
            z = rng.uniform(5, 45)
            add(z, draw, on_walk(), z)
    for draw, mean in ((draw_bicycle, 1.0), (draw_motorcycle, 0.7)):
        for _ in range(rng.poisson(mean)):
            z, ridden = rng.uniform(5, 25), rng.uniform() < 0.5
            add(z, draw, rng.uniform(left + 1, right - 0.5) if ridden else on_walk(), z, ridden)
    if rng.uniform() < 0.12:
        z = rng.uniform(5, 20)
        add(z, draw_person, rng.uniform(left, right), z)
    return sorted(found, key=lambda item: -item[0])


def _add_sure(scene, layout, sure, add, on_walk):
    """The classes whose turn it is, near enough to be seen."""
    rng = scene.rng
    left, right = layout["left"], layout["right"]
    z = rng.uniform(7, 14)
    if layout["rails"] is not None:
        add(z + 3, draw_train, layout["rails"], z + 3, False)
    for name, draw in (("truck", draw_truck), ("bus", draw_bus)):
        if name in sure:
            add(z, draw, right - 1.3, z, rng.uniform() < 0.6)
    if "motorcycle" in sure:
        add(z, draw_motorcycle, rng.uniform(left + 2, right - 1), z, rng.uniform() < 0.5)
    if "rider" in sure:
        draw = scene.pick(draw_bicycle, draw_motorcycle)
        add(z * 0.8, draw, rng.uniform(left + 2, right - 1), z * 0.8, True)
    for name, draw in (("traffic light", draw_light), ("traffic sign", draw_sign)):
        if name in sure:
            add(z, draw, on_walk(), z)


def draw_scene(height, width, seed, split, index):
    """One scene, a function of its arguments alone.

    Returns image (H, W, 3) uint8 RGB, label ids (H, W) uint8, instance ids (H, W) uint16.
    """
    rng = np.random.default_rng((seed, sum(map(ord, split)), index))
    fine = 2 if height <= 512 else 1        # drawn at twice the size and averaged, where that is affordable
    scene = Scene(height * fine, width * fine, rng)
    sure = {RARE[(2 * index) % len(RARE)], RARE[(2 * index + 1) % len(RARE)]}
    layout = plan(rng)
    if "train" in sure or rng.uniform() < 0.08:
        layout["rails"] = layout["left"] + 1.9
        layout["left"] -= 2.0
    draw_sky(scene)
    draw_skyline(scene)
    draw_ground(scene, layout)
    draw_fronts(scene, layout, sure)
    for _, draw in things(scene, layout, sure):
        draw()
    if rng.uniform() < 0.6:
        draw_bonnet(scene)
    return finish(scene, height, width)


def finish(scene, height, width):
    """Light, sensor noise, and the final size."""
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


def write_scene(out, split, index, size, seed):
    """Draw scene `index` of a split and write its four files below `out`."""
    image, ids, instances = draw_scene(*size, seed, split, index)
    table = np.zeros((256, 4), np.uint8)
    for row in ClassTable.read().rows:
        table[row["id"] % 256] = row["red"], row["green"], row["blue"], 255
    stem = f"{CITY}_{index:06d}_000019"
    images, labels = (Path(out) / room / split / CITY for room in ("leftImg8bit", "gtFine"))
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(images / f"{stem}_leftImg8bit.png")
    Image.fromarray(ids).save(labels / f"{stem}_gtFine_labelIds.png")
    Image.fromarray(instances).save(labels / f"{stem}_gtFine_instanceIds.png")
    Image.fromarray(table[ids]).save(labels / f"{stem}_gtFine_color.png")


def write_dataset(out, train=200, val=50, size=(256, 512), seed=0, workers=None):
    """Draw a data set below the folder `out`; size is (height, width). Raises `UserError` if scenes lie there."""
    out = Path(out)
    existing = next((out / "leftImg8bit").glob("*/*/*.png"), None)
    if existing:
        raise cli.UserError(f"{out}: expected a folder without images, found {existing}")
    jobs = [(split, index) for split, count in (("train", train), ("val", val)) for index in range(count)]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        tasks = [pool.submit(write_scene, out, split, index, size, seed) for split, index in jobs]
        for task in progress(tasks, f"drawing {out}", "scene"):
            task.result()


def main():
    parser = cli.Parser(description="Draw labelled street scenes in the layout of Cityscapes.")
    parser.add_argument("out", type=cli.path, help="folder to make")
    parser.add_argument("--train", type=cli.not_negative(int, 999999), default=200, help="training scenes (200)")
    parser.add_argument("--val", type=cli.not_negative(int, 999999), default=50, help="validation scenes (50)")
    parser.add_argument("--size", type=cli.size, default=(256, 512), help="HEIGHT,WIDTH in pixels (256,512)")
    parser.add_argument("--seed", type=cli.random_seed, default=0, help="other seeds draw other streets (0)")
    args = parser.parse_args()
    write_dataset(args.out, args.train, args.val, args.size, args.seed)
    print(f"{args.out}: {args.train} training and {args.val} validation scenes of {args.size[1]}×{args.size[0]}")


if __name__ == "__main__":
    cli.run(main)
