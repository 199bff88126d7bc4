"""Composition of a scene: layout of the street, positions of the objects, and the order of drawing."""

import numpy as np

from .camera import FAR, Scene, finish
from .objects import (
    draw_bicycle,
    draw_bus,
    draw_bush,
    draw_car,
    draw_hood,
    draw_lamp,
    draw_motorcycle,
    draw_person,
    draw_pole,
    draw_traffic_light,
    draw_traffic_sign,
    draw_train,
    draw_tree,
    draw_truck,
    draw_void,
)
from .surfaces import draw_front, draw_ground, draw_sky, draw_skyline

# By chance, these classes could be missing in small data sets. Each scene must contain two of them, in turn, so that
# every split has every class.
RARE_CLASSES = ("train", "truck", "bus", "motorcycle", "rider", "wall", "fence", "traffic light", "traffic sign")
# Meters of road that a vehicle needs for itself; objects without an entry may stand anywhere.
LENGTHS = {draw_car: 5.2, draw_truck: 9.5, draw_bus: 12.5, draw_train: 30.5}


def choose_layout(rng):
    """Draw the layout of a street at random.

    Returns:
        A dict, lengths in meters. left, right: x of the road's edges; lane: x of the middle of the camera's lane;
        sidewalk_left, sidewalk_right: widths; rails: x of a tram track, or None; phase: shift of the dashes in the
        middle; edge_lines: whether there are any; crossing: z of a zebra crossing, negative without one; parking: z of
        the near end of a parking bay, or None; shade: brightness of the ground.
    """
    lane = rng.uniform(-0.4, 0.4)
    left, right = lane - rng.uniform(4.5, 7.5), lane + rng.uniform(2.3, 5.0)
    return {"left": left, "right": right, "lane": lane, "sidewalk_left": rng.uniform(1.8, 4), "rails": None,
            "sidewalk_right": rng.uniform(1.8, 4), "phase": rng.uniform(0, 9), "edge_lines": rng.uniform() < 0.5,
            "crossing": rng.uniform(7, 30) if rng.uniform() < 0.35 else -99.0,
            "parking": rng.uniform(8, 20) if rng.uniform() < 0.2 else None, "shade": rng.uniform(0.8, 1.1)}


def front_segments(scene, names, probabilities, heights):
    """Draw a row of house fronts, walls, fences or hedges at random, from near to far.

    Args:
        scene: `Scene`.
        names: classes to choose from; None for a gap.
        probabilities: of each name.
        heights: {class: (lowest, highest)}, meters.

    Returns:
        A list of dicts, lengths in meters, with name, start and end (z), height, style (0 to 2, a variant of the
        class), colors (color, trim, accent), light (brightness), and for buildings floor (height of a floor), bay
        (distance between windows), wide (half of a window's width, in bays), shop (whether there are shops), door
        (position) and seed (of the windows' brightness).
    """
    rng = scene.rng
    start, segments = rng.uniform(1.5, 4), []
    while start < FAR:
        name = names[rng.choice(len(names), p=probabilities)]
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


def draw_fronts(scene, layout, required):
    """Draw both sides of the street: houses, trees in front of them, and low fronts along the sidewalk."""
    rng = scene.rng
    for side, edge in ((-1, -layout["left"] + layout["sidewalk_left"]),
                       (1, layout["right"] + layout["sidewalk_right"])):
        setback = rng.uniform(3.0, 6.0)
        houses = front_segments(scene, ("building", None), (0.82, 0.18), {"building": (5, 17)})
        low = front_segments(scene, ("wall", "fence", "vegetation", None), (0.25, 0.27, 0.16, 0.32),
                             {"wall": (1.0, 2.6), "fence": (0.9, 1.9), "vegetation": (0.8, 1.8)})
        near = [segment for segment in low if segment["start"] < 14]
        for name in ("wall", "fence"):      # not in the order of the set `required`, which differs between processes
            if name in required:
                segment = near[0] if near else low[0]
                segment |= {"name": name, "height": rng.uniform(1.2, 2.2), "color": scene.color(60, 215, 0.45)}
        draw_front(scene, side, edge + setback, houses)
        for _ in range(rng.integers(0, 3)):
            draw_tree(scene, side * (edge + setback * rng.uniform(0.3, 0.8)), rng.uniform(12, 60))
        draw_front(scene, side, edge + 0.2, low)


def place_objects(scene, layout, required):
    """Place the objects of a scene at random.

    Args:
        scene: `Scene`.
        layout: dict from `choose_layout`.
        required: classes that the scene must contain.

    Returns:
        [(z, function that draws the object)], from far to near.
    """
    rng = scene.rng
    objects = []
    occupied = []       # (x, near z, far z) of vehicles

    def add(z, draw, x, *args):
        length = LENGTHS.get(draw)
        if length is not None:
            if any(abs(x - a) < 2.4 and z < far and near < z + length for a, near, far in occupied):
                return
            occupied.append((x, z, z + length))
        objects.append((z, lambda: draw(scene, x, *args)))

    left, right = layout["left"], layout["right"]
    sidewalks = ((left - layout["sidewalk_left"], left), (right, right + layout["sidewalk_right"]))

    def on_sidewalk():
        low, high = sidewalks[rng.integers(2)]
        return rng.uniform(low + 0.4, high - 0.3)

    _add_required(scene, layout, required, add, on_sidewalk)
    oncoming, ahead = left + (layout["lane"] - left) * 0.42, layout["lane"] + rng.uniform(-0.2, 0.2)
    for lane, away in ((ahead, True), (oncoming, False)):
        z = rng.uniform(9, 22)
        for _ in range(rng.integers(1, 4)):
            draw = rng.choice([draw_car, draw_bus, draw_truck], p=[0.7, 0.15, 0.15])
            add(z, draw, lane, z, away)
            z += rng.uniform(14, 30)
    z = rng.uniform(5, 12)
    while z < 55:       # cars parked at the curb
        if rng.uniform() < 0.55:
            add(z, draw_car, right - 1.0, z, rng.uniform() < 0.7)
        z += rng.uniform(5.5, 9)

    for draw, mean in ((draw_person, 4.5), (draw_lamp, 1.5), (draw_pole, 1.0), (draw_traffic_light, 0.9),
                       (draw_traffic_sign, 1.4), (draw_tree, 1.6), (draw_bush, 1.0), (draw_void, 0.6)):
        for _ in range(rng.poisson(mean)):
            z = rng.uniform(5, 45)
            add(z, draw, on_sidewalk(), z)
    for draw, mean in ((draw_bicycle, 1.0), (draw_motorcycle, 0.7)):
        for _ in range(rng.poisson(mean)):
            z, ridden = rng.uniform(5, 25), rng.uniform() < 0.5
            add(z, draw, rng.uniform(left + 1, right - 0.5) if ridden else on_sidewalk(), z, ridden)
    if rng.uniform() < 0.12:
        z = rng.uniform(5, 20)
        add(z, draw_person, rng.uniform(left, right), z)
    return sorted(objects, key=lambda item: -item[0])


def _add_required(scene, layout, required, add, on_sidewalk):
    """Add objects of the required classes, near the camera."""
    rng = scene.rng
    left, right = layout["left"], layout["right"]
    z = rng.uniform(7, 14)
    if layout["rails"] is not None:
        add(z + 3, draw_train, layout["rails"], z + 3, False)
    for name, draw in (("truck", draw_truck), ("bus", draw_bus)):
        if name in required:
            add(z, draw, right - 1.3, z, rng.uniform() < 0.6)
    if "motorcycle" in required:
        add(z, draw_motorcycle, rng.uniform(left + 2, right - 1), z, rng.uniform() < 0.5)
    if "rider" in required:
        draw = scene.choice(draw_bicycle, draw_motorcycle)
        add(z * 0.8, draw, rng.uniform(left + 2, right - 1), z * 0.8, True)
    for name, draw in (("traffic light", draw_traffic_light), ("traffic sign", draw_traffic_sign)):
        if name in required:
            add(z, draw, on_sidewalk(), z)


def draw_scene(height, width, seed, split, index):
    """Draw one scene, which depends only on the arguments.

    Args:
        height, width: of the image, pixels.
        seed: of the data set.
        split: its name.
        index: of the scene in the split.

    Returns:
        image (H, W, 3) uint8 RGB, label ids (H, W) uint8, instance ids (H, W) uint16.
    """
    rng = np.random.default_rng((seed, sum(map(ord, split)), index))
    supersampling = 2 if height <= 512 else 1       # draw small images at twice the size and average
    scene = Scene(height * supersampling, width * supersampling, rng)
    required = {RARE_CLASSES[number % len(RARE_CLASSES)] for number in (2 * index, 2 * index + 1)}
    layout = choose_layout(rng)
    if "train" in required or rng.uniform() < 0.08:
        layout["rails"] = layout["left"] + 1.9
        layout["left"] -= 2.0
    draw_sky(scene)
    draw_skyline(scene)
    draw_ground(scene, layout)
    draw_fronts(scene, layout, required)
    for _, draw in place_objects(scene, layout, required):
        draw()
    if rng.uniform() < 0.6:
        draw_hood(scene)
    return finish(scene, height, width)
