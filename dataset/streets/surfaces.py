"""Surfaces: sky, skyline, ground with road markings, and the rows of fronts beside the street.

Ground and fronts are planes. The ray of each pixel is intersected with the plane, and the color is a function of the
intersection's coordinates in meters.
"""

import numpy as np

from .camera import CAMERA_HEIGHT, FAR, IDS
from .objects import draw_foliage


def draw_sky(scene):
    """Fill the whole picture with a vertical gradient and clouds; all other parts are drawn over it."""
    height, width = scene.height, scene.width
    rows = np.linspace(0, 1, height)[:, None, None]
    top, bottom = scene.choice(([90, 140, 205], [190, 210, 230]), ([150, 160, 170], [215, 218, 222]),
                             ([120, 150, 200], [240, 215, 190]), ([185, 190, 195], [225, 225, 228]))
    sky = np.array(top) * (1 - rows) + np.array(bottom) * rows
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    clouds = np.clip(scene.grain(x, y * 2.5 + scene.rng.uniform(), 1.7) * 2.2, 0, 1)[..., None]
    sky = sky * (1 - 0.7 * clouds) + 238 * 0.7 * clouds
    scene.fill(np.ones((height, width), bool), sky.reshape(-1, 3), "sky")


def draw_skyline(scene):
    """Draw distant houses and trees at the end of the street."""
    for _ in range(14):
        x, half = scene.rng.uniform(-130, 130), scene.rng.uniform(4, 14)
        if scene.rng.uniform() < 0.5:
            top = scene.rng.uniform(6, 22)
            scene.upright(x, FAR, [(-half, 0), (-half, top), (half, top), (half, 0)],
                          scene.color(90, 200, 0.3), "building")
        else:
            draw_foliage(scene, x, FAR, scene.rng.uniform(3, 7), half, scene.rng.uniform(4, 8))


def draw_ground(scene, layout):
    """Draw road, markings, sidewalks and the terrain beside them, by the ground point of each pixel below the horizon.

    Args:
        scene: `Scene`.
        layout: dict from `scene.choose_layout`.
    """
    rng = scene.rng
    v, u = np.mgrid[0:scene.height, 0:scene.width]
    below = v > scene.horizon + scene.focal * CAMERA_HEIGHT / (FAR * 1.5)
    z = scene.focal * CAMERA_HEIGHT / (v[below] - scene.horizon)
    x = (u[below] - scene.center) * z / scene.focal

    grass = scene.color(60, 120, 0.25) + scene.choice([5, 35, -25], [40, 30, -15], [20, 15, 0])
    fine, coarse = scene.grain(x, z, 3.0), scene.grain(x, z, 22.0)
    colors = grass * (1 + 0.35 * fine + 0.15 * coarse)[:, None]
    names = np.full(len(x), IDS["terrain"])

    left, right = layout["left"], layout["right"]
    sidewalk = (x > left - layout["sidewalk_left"]) & (x < right + layout["sidewalk_right"])
    tile = scene.choice(0.5, 0.8, 1.2)
    joints = ((x % tile) < 0.05) | ((z % tile) < 0.06)
    paving = scene.color(110, 190, 0.18)[None] * (1 + 0.14 * fine)[:, None]
    paving = np.where((joints & (z < 22))[:, None], paving * 0.78, paving)
    colors[sidewalk], names[sidewalk] = paving[sidewalk], IDS["sidewalk"]

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
    """Return a mask (n,) of the ground points with road paint: dashes in the middle, edge lines, a zebra crossing."""
    middle = (layout["left"] + layout["right"]) / 2
    dashes = (np.abs(x - middle) < 0.08) & ((z + layout["phase"]) % 9 < 4)
    edges = (np.abs(x - layout["left"] - 0.35) < 0.06) | (np.abs(x - layout["right"] + 0.35) < 0.06)
    crossing = (np.abs(z - layout["crossing"]) < 1.6) & (x % 1.0 < 0.5)
    return dashes | (edges & layout["edge_lines"]) | crossing


def draw_front(scene, side, distance, segments):
    """Draw one row of house fronts, walls, fences or hedges, on the plane x = side · distance.

    Args:
        scene: `Scene`.
        side: -1 left, 1 right.
        distance: meters.
        segments: dicts from `scene.front_segments`.
    """
    for segment in segments:
        if segment["name"] == "building":       # the side wall that faces the camera
            depth, top, z = 9.0, segment["height"], segment["start"]
            side_wall = [(side * distance, 0, z), (side * distance, top, z),
                         (side * (distance + depth), top, z), (side * (distance + depth), 0, z)]
            scene.polygon(side_wall, segment["color"] * 0.8, "building")
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
        mask = here.copy()
        mask[here] = solid
        scene.fill(mask, colors[solid], segment["name"])


# Painters color n points of a front: `along` and `up` (n,) are their coordinates on it in meters, `behind` (n, 3) the
# colors drawn so far. They return colors (n, 3) and a mask (n,) of the points that belong to the front.

def paint_building(scene, segment, along, up, behind):
    """Paint rows of windows, a ground floor with a door and optional shops, and a cornice."""
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
    """Paint blocks or plaster with stains, and a coping."""
    colors = segment["color"] * (1 + 0.16 * scene.grain(along, up, 2.0) + 0.10 * scene.grain(along, up, 9.0))[:, None]
    if segment["style"] < 2:
        block = 0.3 if segment["style"] else 0.6
        course = (up % block < 0.05) | ((along + block * (np.floor(up / block) % 2)) % (2 * block) < 0.05)
        colors[course] *= 0.72
    colors[up > segment["height"] - 0.15] *= 1.25
    return colors, np.ones(len(up), bool)


def paint_fence(scene, segment, along, up, behind):
    """Paint pickets, mesh or a railing; the background is visible between the bars, but labeled fence."""
    pitch = (0.25, 0.14, 0.5)[segment["style"]]
    bars = along % pitch < pitch * (0.55, 0.22, 0.16)[segment["style"]]
    rails = (np.abs(up - 0.25) < 0.05) | (np.abs(up - segment["height"] + 0.12) < 0.06)
    posts = along % 2.4 < 0.12
    if segment["style"] == 1:
        rails |= (up + along) % 0.2 < 0.035
    opaque = (bars | rails | posts)[:, None]
    colors = np.where(opaque, segment["color"] * (1 + 0.1 * scene.grain(along, up, 1.5))[:, None], behind * 0.9)
    return colors, np.ones(len(up), bool)


def paint_hedge(scene, segment, along, up, behind):
    """Paint leaves, with an uneven upper edge."""
    leaves = scene.grain(along, up, 1.6)
    colors = segment["color"] * (1 + 0.5 * leaves)[:, None]
    return colors, up < segment["height"] * (0.88 + 0.12 * scene.grain(along, along, 5.0))


PAINTERS = {"building": paint_building, "wall": paint_wall, "fence": paint_fence, "vegetation": paint_hedge}


def _hash(values):
    """Map values to pseudo-random numbers from 0 to 1; equal values give equal numbers."""
    return np.abs(np.sin(values * 12.9898) * 43758.5453) % 1
