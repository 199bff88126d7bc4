"""Objects that stand on the ground: vehicles, people and two-wheelers, plants, street furniture.

Each function `draw_*(scene, x, z, ...)` draws one object, with its near end x meters to the right and z meters ahead
of the camera. Shared names: `half` is half of a width and `top` a height, both in meters; `away` is whether a vehicle
drives away from the camera instead of toward it, `ridden` whether a two-wheeler has a rider.
"""

import cv2
import numpy as np

from .camera import IDS

# ---- vehicles: cross-sections drawn from far to near ----

def loft(scene, x, z, length, section, name, instance):
    """Draw a solid as a stack of cross-sections, from far to near.

    Args:
        scene: `Scene`.
        x, z: position of its near end, meters.
        length: along z, meters.
        section: function of t, from 0 (near end) to 1 (far end), that returns [(outline, color)]. All sections but the
            nearest are drawn darker, since their edges form the visible side.
        name: its class.
        instance: its instance id.
    """
    pixels = scene.focal * max(abs(x), 1.0) * (1 / max(z, 1) - 1 / (z + length))
    steps = int(np.clip(pixels, 6, 90))
    for t in np.linspace(1, 0, steps):
        side = 0.62 if t > 0.02 else 1.0
        for outline, color in section(t):
            scene.upright(x, z + t * length, outline, np.asarray(color) * side, name, instance)


def box(half, low, high, top_half=None):
    """Return the outline of a box from `low` to `high`; with `top_half`, of a trapezoid with that half width on top."""
    top_half = half if top_half is None else top_half
    return [(-half, low), (-top_half, high), (top_half, high), (half, low)]


def wheels(t, half, length, radius, axles):
    """Return the cross-section of the wheels at t: a dark block of the wheel's height there; axles are values of t."""
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
    paint = scene.choice(scene.color(25, 235, 0.1), scene.color(25, 235, 0.1), scene.color(30, 220, 1.0))
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
    _draw_near_end(scene, x, z, half, belt, away, paint)


def _draw_near_end(scene, x, z, half, belt, away, paint):
    """Draw lights, plate, bumper and tires of the end that faces the camera."""
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
    _draw_near_end(scene, x, z, half, 1.0, away, stripe)


def draw_truck(scene, x, z, away):
    rng = scene.rng
    instance = scene.new_instance("truck")
    length, half, top = rng.uniform(6.5, 9), 1.22, rng.uniform(3.0, 3.7)
    cargo, cab = scene.choice(scene.color(150, 240, 0.15), scene.color(40, 220, 1.0)), scene.color(40, 220, 0.9)
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
    _draw_near_end(scene, x, z, half, 0.95, away, np.array([90, 90, 90.0]))


def draw_train(scene, x, z, away):
    """Draw a tram: long, in sections, with a pantograph."""
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
    _draw_upper_body(scene, x, z, 0.80 * scale, scale, "person", instance, lean=0.0,
                     reach=scene.rng.uniform(-0.25, 0.25))


def _draw_upper_body(scene, x, z, hip, scale, name, instance, lean, reach):
    """Draw trunk, arms and head above the hips; `lean` and `reach` of the hands are sideways, meters at scale 1."""
    coat, skin = scene.color(30, 235, 1.0), np.array(scene.choice(*SKIN))
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


def _draw_wheel(scene, x, z, middle, radius, name, instance, tire):
    """Draw a wheel seen from the side: the full disc is labeled, but only tire and spokes are painted."""
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    fixed = scene.fixed_point([(x + middle + p[0] * radius, radius + p[1] * radius, z) for p in ring])
    cv2.fillPoly(scene.ids, [fixed], IDS[name], shift=4)
    cv2.fillPoly(scene.instances, [fixed], instance, shift=4)
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        scene.bar(x, z, (middle + a[0] * radius, radius + a[1] * radius),
                  (middle + b[0] * radius, radius + b[1] * radius), tire, (25, 25, 27))
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
        _draw_wheel(scene, x, z, wheel, radius, "bicycle", instance, 0.05)
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
        _draw_rider(scene, x, z, -0.2 * facing, 0.92, facing)


def draw_motorcycle(scene, x, z, ridden):
    rng = scene.rng
    instance = scene.new_instance("motorcycle")
    paint, facing = scene.color(20, 220, 1.0), rng.choice([-1, 1])
    scene.shadow(x, z, 1.1, 0.3, 0.6)
    for wheel in (-0.68, 0.68):
        _draw_wheel(scene, x, z, wheel, 0.33, "motorcycle", instance, 0.13)
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
        _draw_rider(scene, x, z, -0.25 * facing, 0.85, facing)


def _draw_rider(scene, x, z, seat, hip, facing):
    """Draw a rider: seat in meters right of x, hip in meters above the road, facing -1 left or 1 right."""
    instance = scene.new_instance("rider")
    legs = scene.color(25, 150, 0.5)
    knee, foot = (seat + 0.36 * facing, hip - 0.15), (seat + 0.22 * facing, 0.34)
    scene.bar(x, z, (seat, hip), knee, 0.17, legs, "rider", instance)
    scene.bar(x, z, knee, foot, 0.14, legs, "rider", instance)
    _draw_upper_body(scene, x + seat, z, hip - 0.03, 1.0, "rider", instance, lean=0.22 * facing, reach=0.25 * facing)


# ---- street furniture and plants ----

def draw_foliage(scene, x, z, height, half, spread, trunk=0.0):
    """Draw a crown of overlapping clumps of leaves, from about `height - spread / 2` to `height + spread / 2` meters.

    Args:
        scene: `Scene`.
        x, z: position, meters.
        height: of the middle of the crown, meters.
        half: half of its width, meters.
        spread: vertical extent, meters.
        trunk: height below which there are no leaves, meters.
    """
    base = scene.color(45, 110, 0.3) + scene.choice([-5, 25, -20], [15, 25, -20], [-10, 12, -8], [35, 15, -25])
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
    draw_foliage(scene, x, z, height, half, rng.uniform(2.2, 4.0), trunk=1.6)


def draw_bush(scene, x, z):
    half = scene.rng.uniform(0.4, 1.0)
    scene.shadow(x, z, half, half * 0.5, 0.7)
    draw_foliage(scene, x, z, half * 0.75, half, half * 1.3, trunk=0.0)


def draw_pole(scene, x, z, top=None):
    """Draw a pole of `top` meters, by default of a random height, and return its color."""
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


def draw_traffic_light(scene, x, z):
    rng = scene.rng
    draw_pole(scene, x, z, 3.0)
    shell = scene.choice((30, 32, 30), (45, 60, 45), (70, 65, 40))
    low, half, high = 2.3, 0.24, 3.35
    scene.upright(x, z, box(half, low, high), shell, "traffic light")
    lit = rng.integers(3)
    lamps = ((235, 40, 30), (245, 180, 40), (50, 220, 120))
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for k, lamp in enumerate(lamps):
        middle = high - 0.19 - 0.335 * k
        disc = np.stack([0.13 * np.cos(angle), middle + 0.13 * np.sin(angle)], axis=1)
        scene.upright(x, z, disc, np.array(lamp) * (1.0 if k == lit else 0.3))


def draw_traffic_sign(scene, x, z):
    rng = scene.rng
    draw_pole(scene, x, z, 2.5)
    kind = rng.integers(4)
    middle, r = 2.5, rng.uniform(0.36, 0.5)
    corners = (20, 3, 4, 8)[kind]
    turn = (0, np.pi / 2, np.pi / 4, np.pi / 8)[kind]
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) + turn
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    edge = np.array(scene.choice((190, 25, 30), (30, 70, 160), (235, 190, 40), (230, 230, 230)))
    face = np.array(scene.choice((240, 240, 238), (245, 205, 60), (35, 80, 170), (190, 30, 35)))
    scene.upright(x, z, ring * r + [0, middle], edge, "traffic sign")
    scene.upright(x, z, ring * r * 0.76 + [0, middle], face)
    ink = 255 - face if rng.uniform() < 0.5 else np.array([25, 25, 28])
    scene.bar(x, z, (-r * 0.4, middle), (r * 0.4, middle + rng.uniform(-0.15, 0.15)), r * 0.22, ink)


def draw_void(scene, x, z):
    """Draw a bin, box or bench, labeled static or dynamic: void classes, which are not scored."""
    color, half, top = scene.color(40, 170, 0.5), scene.rng.uniform(0.3, 0.6), scene.rng.uniform(0.7, 1.2)
    name = scene.choice("static", "dynamic")
    scene.shadow(x, z, half + 0.1, 0.3, 0.7)
    scene.upright(x, z, box(half, 0, top), color, name)
    scene.upright(x, z, box(half * 1.05, top * 0.85, top), color * 0.6, name)


def draw_hood(scene):
    """Draw the hood of the camera's car at the lower edge, labeled ego vehicle."""
    h, w = scene.height, scene.width
    u = np.arange(w)
    rise = h * (0.045 + 0.03 * np.cos((u / w - 0.5) * 2.6))
    v = np.arange(h)[:, None]
    mask = v > h - rise
    gloss = 45 + 60 * ((h - v) / (h * 0.08)) * np.ones(w)
    scene.fill(mask, np.repeat(gloss[mask][:, None], 3, axis=1), "ego vehicle")
