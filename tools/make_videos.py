"""Write physics videos with the state of every frame as annotations, or draw a contact sheet of them.

    python tools/make_videos.py --out DIR [--num_videos 128] [--kinds bouncing,pendulum,falling,projectile]
                                [--num_frames 60] [--fps 30] [--size 64] [--seed 0] [--max_balls 8]
                                [--max_falling 1]
    python tools/make_videos.py --sheet FILE.png

Written under --out: videos/<kind>/<kind>_000.mp4, annotations/<kind>/<kind>_000.json (what `simulate` returns) and
videos.json (the settings). Lengths are in sides of the frame, x to the right and y down from its upper left corner, and
times in seconds: --size changes the picture and --fps the instants, never the motion. Video i of a kind depends on
--seed, the kind and i, on --max_balls where balls bounce and on --max_falling where things fall; on nothing else that
is made beside it.

--kinds shapes, which must be named, is the bouncing-shapes set of FutureLatents: on a dark ground a square that bounces
off the walls and a disk that goes round once in two seconds. Their annotations also hold each one's position_pixel and
position_normalized (-1 to 1, the frame's edges), [x, y] for every frame.

The same command goes on where it was interrupted, and one with more videos or kinds adds them. A folder with other
settings or other contents is refused, and no file that stands there is overwritten.

From Python: `simulate(kind, seed, num_frames, fps)` -> state, `render(state, size)` -> frames.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import colorsys
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

KINDS = ("bouncing", "pendulum", "falling", "projectile")  # a kind's place is part of its seeds: append, never sort
ALL_KINDS = (*KINDS, "shapes")  # what --kinds may name; by default it is KINDS
PHYSICS = 1  # another number where the same settings give other motions or pictures: a folder never holds both
STEPS_PER_S = 480  # sub-steps of the motion; frames look at it between them, so that it is the same at every fps
CONSTANTS = {  # sides and seconds; `simulate` takes other values by these names
    "bouncing": {"gravity": 1.2, "drag": 0.0, "floor_restitution": 0.85, "wall_restitution": 0.85},
    "pendulum": {"damping": 0.15},
    "falling": {"gravity": 1.4, "drag": 0.6, "floor_restitution": 0.7, "wall_restitution": 0.7},
    "projectile": {"gravity": 1.6, "drag": 0.0, "floor_restitution": 0.7, "wall_restitution": 0.8},
    "shapes": {"gravity": 0.0, "drag": 0.0, "floor_restitution": 1.0, "wall_restitution": 1.0},
}
# FutureLatents' numbers in sides and seconds: 256 pixels, at 30 frames per second, a turn in as long as 60 of them
SHAPES = dict(square=32 / 256, disk=24 / 256, speed=(90 / 256, 60 / 256), orbit=96 / 256, turn_s=2.0)
SHAPE_COLOURS, SHAPE_GROUND = ([200, 50, 50], [50, 180, 250]), 20
MAX_BALLS = 16  # more would not find room to start
MAX_FALLING = 3  # more would overlap
PIVOT = (0.5, 0.06)
STRING_WIDTH, PIVOT_RADIUS, GREY = 0.022, 0.025, (90, 90, 90)
TRAIL = 5  # earlier frames in which a projectile is still seen
MAX_PIXELS = 2**26  # of one video: about 1 GB while it is drawn


# -- motion -----------------------------------------------------------------------------------------------------------


def fly(place, speed, seconds, law):
    """Exact free flight with gravity and linear drag. place, speed [..., 2], seconds later (earlier where negative)
    -> (place, speed) at that time."""
    pull, drag = np.array((0.0, law["gravity"])), law["drag"]
    if not drag:
        return place + speed * seconds + pull * (seconds * seconds / 2), speed + pull * seconds
    final, lost = pull / drag, -math.expm1(-drag * seconds)  # the terminal speed; the share of what differs from it
    return place + final * seconds + (speed - final) * (lost / drag), speed - (speed - final) * lost


def turn_at(wall, axis, place, speed, seconds, restitution, law):
    """One body that went through a wall within the last `seconds`: back to the touch, turned, and forth again.

    place, speed [2] -> the same. A body that still presses on the wall lies on it, at rest along the axis.
    """
    outward, since = 1.0 if wall > 0.5 else -1.0, 0.0
    if speed[axis] * outward > 0:
        for _ in range(4):  # Newton: the error of a sub-step squares every time
            then, pace = fly(place, speed, -since, law)
            if pace[axis] * outward > 0:
                since = min(max(since + (then[axis] - wall) / pace[axis], 0.0), seconds)
        place, speed = fly(place, speed, -since, law)
        speed[axis] *= -restitution
        place, speed = fly(place, speed, since, law)
    if (place[axis] - wall) * outward > 0:
        place[axis] = wall
        speed[axis] = outward * min(outward * speed[axis], 0.0)
    return place, speed


def bounce(place, speed, radius, seconds, law):
    """Keep bodies within the frame, in place. place, speed [N, 2], radius [N, 1]."""
    outside = (place < radius) | (place > 1 - radius)
    if outside.any():
        for body, axis in np.argwhere(outside):
            far = place[body, axis] > 0.5
            wall = 1 - radius[body, 0] if far else radius[body, 0]
            restitution = law["floor_restitution" if far and axis == 1 else "wall_restitution"]
            place[body], speed[body] = turn_at(wall, axis, place[body], speed[body], seconds, restitution, law)


def collide(place, speed, reach, seconds):
    """Elastic collision of two equal masses that overlap, place and speed [2, 2] -> the same.

    Their centre goes on as it was; what lies between them goes back to the touch, is turned along the normal, and
    comes forth again. Overlap that is left, as between three at once, is removed along the line of the centres.
    """
    gap, closing = place[1] - place[0], speed[1] - speed[0]
    if gap @ closing < 0:
        pace, along, depth = closing @ closing, gap @ closing, gap @ gap - reach * reach
        since = min((along + math.sqrt(along * along - pace * depth)) / pace, seconds)
        touch = gap - closing * since
        closing = closing - touch * (2 * (closing @ touch) / (touch @ touch))
        gap = touch + closing * since
    gap = gap * max(reach / math.sqrt(gap @ gap), 1.0)
    half = np.array(((-0.5,), (0.5,)))
    return place.mean(0) + half * gap, speed.mean(0) + half * closing


def advance(place, speed, radius, pairs, seconds, law):
    """All bodies a short time later -> (place, speed) [N, 2]. `pairs`: (first, second) of those that may collide."""
    place, speed = fly(place, speed, seconds, law)
    if len(pairs[0]):
        gaps, reach = place[pairs[1]] - place[pairs[0]], (radius[pairs[0]] + radius[pairs[1]])[:, 0]
        for number in np.flatnonzero((gaps * gaps).sum(1) < reach * reach):
            two = [pairs[0][number], pairs[1][number]]
            if math.dist(*place[two]) < reach[number]:  # an earlier pair may have moved them
                place[two], speed[two] = collide(place[two], speed[two], reach[number], seconds)
    bounce(place, speed, radius, seconds, law)
    return place, speed


def move_bodies(place, speed, radius, law, times, colliding=False):
    """Motion of bodies in the frame, place and speed [N, 2] at time 0, radius [N], rising times [T] -> both [T, N, 2].

    A frame between two sub-steps is reached by a shorter one that the motion itself does not take.
    """
    place, speed = np.array(place, dtype=float), np.array(speed, dtype=float)
    radius, done, seen = np.array(radius, dtype=float)[:, None], 0, []
    pairs = np.triu_indices(len(place) if colliding else 0, 1)
    for instant in times:
        steps = int(instant * STEPS_PER_S + 1e-6)
        for _ in range(steps - done):
            place, speed = advance(place, speed, radius, pairs, 1 / STEPS_PER_S, law)
        done, rest = steps, instant - steps / STEPS_PER_S
        seen.append(advance(place, speed, radius, pairs, rest, law) if rest > 1e-9 else (place.copy(), speed.copy()))
    return np.array([place for place, _ in seen]), np.array([speed for _, speed in seen])


def swing(angle, rate, seconds, pull, damping):
    """A step of Runge and Kutta for angle'' = -pull sin(angle) - damping angle' -> (angle, rate) after `seconds`."""
    slopes, moved = [], (angle, rate)
    for share in (0.5, 0.5, 1.0, 0.0):
        slopes.append((moved[1], -pull * math.sin(moved[0]) - damping * moved[1]))
        moved = angle + share * seconds * slopes[-1][0], rate + share * seconds * slopes[-1][1]
    (a, b), (c, d), (e, f), (g, h) = slopes
    return angle + seconds / 6 * (a + 2 * c + 2 * e + g), rate + seconds / 6 * (b + 2 * d + 2 * f + h)


def move_pendulum(angle, pull, damping, times):
    """A pendulum let go at an angle (rad, 0 straight down), pull = gravity / length -> angles, rates (rad/s), both
    [T] lists."""
    rate, done, seen = 0.0, 0, []
    for instant in times:
        steps = int(instant * STEPS_PER_S + 1e-6)
        for _ in range(steps - done):
            angle, rate = swing(angle, rate, 1 / STEPS_PER_S, pull, damping)
        done, rest = steps, instant - steps / STEPS_PER_S
        seen.append(swing(angle, rate, rest, pull, damping) if rest > 1e-9 else (angle, rate))
    return [float(angle) for angle, _ in seen], [float(rate) for _, rate in seen]


# -- clips ------------------------------------------------------------------------------------------------------------


def draw_colours(rng, count):
    """`count` colours with hues far from each other, all dark enough for a white ground -> list of [r, g, b]."""
    first, colours = rng.random(), []
    for number in range(count):
        saturation, value = rng.uniform(0.75, 1.0), rng.uniform(0.6, 0.9)
        rgb = np.array(colorsys.hsv_to_rgb((first + number / count) % 1.0, saturation, value))
        light = rgb @ (0.299, 0.587, 0.114)
        colours.append([int(round(255 * part)) for part in rgb * min(1.0, 0.5 / light)])
    return colours


def start_bouncing(rng, most):
    """Balls in the upper part of the frame that do not touch -> (shapes, radius [N], place [N, 2], speed [N, 2])."""
    count, radius, places = int(rng.integers(1, most + 1)), 1 / 16, []
    while len(places) < count:
        place = rng.uniform((radius, radius), (1 - radius, 0.62))
        if all(math.dist(place, other) > 2.1 * radius for other in places):
            places.append(place)
    heading, pace = rng.uniform(0, 2 * math.pi, count), rng.uniform(0.3, 1.0, count)
    speed = np.stack((np.cos(heading), np.sin(heading)), 1) * pace[:, None]
    return ["circle"] * count, np.full(count, radius), np.array(places), speed


def start_falling(rng, most):
    """Things in the top third, side by side; they do not meet -> as `start_bouncing`."""
    count = int(rng.integers(1, most + 1))
    shapes = ["square" if one else "circle" for one in rng.integers(0, 2, count)]
    radius, lane = rng.uniform(0.05, 0.08, count), (rng.permutation(count) + rng.uniform(0.2, 0.8, count)) / count
    place = np.stack((np.clip(lane, radius, 1 - radius), rng.uniform(radius, 1 / 3)), 1)
    return shapes, radius, place, np.stack((rng.uniform(-0.2, 0.2, count), np.zeros(count)), 1)


def start_projectile(rng, most):
    """A ball thrown from the lower left, back at its height after 1 to 1.4 s and before the right wall -> as
    `start_bouncing`. Lower throws than 40 degrees, or those that would hit the wall first, are steeper instead."""
    place, seconds = rng.uniform((0.07, 0.86), (0.12, 0.93)), rng.uniform(1.0, 1.4)
    gravity = CONSTANTS["projectile"]["gravity"]
    lift = gravity * seconds / 2
    steep = math.atan(lift * seconds / (0.93 - place[0]))  # lands where the right wall stops it
    angle = rng.uniform(max(math.radians(40), steep), math.radians(65))
    return ["circle"], np.array([0.05]), place[None], np.array([[lift / math.tan(angle), -lift]])


STARTS = {"bouncing": start_bouncing, "falling": start_falling, "projectile": start_projectile}


def start_pendulum(rng):
    """-> angle (rad) at which it is let go, length (sides) and period (s); the bob stays within the frame."""
    angle = math.radians(rng.uniform(20, 60)) * rng.choice((-1, 1))
    return angle, rng.uniform(0.35, min(0.6, 0.43 / abs(math.sin(angle)))), rng.uniform(1.3, 1.9)


def move_shapes(rng, law, times):
    """A square that flies and bounces from a random place, a disk on a circle from a random phase -> (shapes, radius
    [2], place [T, 2, 2], speed [T, 2, 2]). They do not meet."""
    radius, orbit, rate = np.array([SHAPES["square"], SHAPES["disk"]]), SHAPES["orbit"], 2 * math.pi / SHAPES["turn_s"]
    start, phase = rng.uniform(radius[0], 1 - radius[0], 2), rng.uniform(0, 2 * math.pi)
    place, speed = move_bodies([start], [SHAPES["speed"]], radius[:1], law, times)
    angle = phase + rate * times
    towards = np.stack((np.cos(angle), np.sin(angle)), 1)[:, None]  # [T, 1, 2]
    across = towards[:, :, ::-1] * (-1, 1)
    place = np.concatenate([place, 0.5 + orbit * towards], 1)
    return ["square", "circle"], radius, place, np.concatenate([speed, orbit * rate * across], 1)


def add_places(state, size):
    """Give each thing of a state its places as FutureLatents' labels have them, for a frame of `size` pixels."""
    for thing in state["objects"]:
        place = np.stack((thing["x"], thing["y"]), 1)  # [T, 2]
        thing["position_pixel"] = np.clip(np.floor(place * size), 0, size - 1).astype(int).tolist()
        thing["position_normalized"] = (2 * place - 1).tolist()
    return state


def pendulum_gravity(angle, length, period):
    """Gravity with which an undamped pendulum let go at an angle has a period (Gauss: arithmetic-geometric mean)."""
    one, other = 1.0, math.cos(angle / 2)
    for _ in range(6):
        one, other = (one + other) / 2, math.sqrt(one * other)
    return length * (2 * math.pi / (period * one)) ** 2


def simulate(kind, seed, num_frames=60, fps=30.0, index=0, max_balls=8, max_falling=1, **changed):
    """Video `index` of a kind -> its state, plain values: constants, and for each of `objects` shape, radius, colour
    and x, y, vx, vy, lists over frames; a pendulum has `angle` and `angular_velocity` as well. `changed`: other
    CONSTANTS of the kind. ValueError for a kind or constant that is not known."""
    unknown = [name for name in changed if name not in CONSTANTS.get(kind, changed)]
    if kind not in ALL_KINDS or unknown:
        raise ValueError(f"no kind {kind}, or no constant {unknown} of it; known: {CONSTANTS}")
    rng, law = np.random.default_rng([seed, ALL_KINDS.index(kind), index]), {**CONSTANTS[kind], **changed}
    times = np.arange(num_frames) / fps
    state = dict(maneuver=kind, kind=kind, fps=fps, num_frames=num_frames, seed=seed, index=index, **law)
    if kind == "pendulum":
        angle, length, period = start_pendulum(rng)
        gravity, shapes, radius = pendulum_gravity(angle, length, period), ["circle"], np.array([0.06])
        angles, rates = move_pendulum(angle, gravity / length, law["damping"], times)
        towards = np.stack((np.sin(angles), np.cos(angles)), 1)  # [T, 2]
        place = PIVOT + length * towards[:, None]
        speed = (length * np.array(rates)[:, None] * towards[:, ::-1] * (1, -1))[:, None]
        state.update(gravity=gravity, length=length, period=period, pivot=list(PIVOT))
        state.update(angle=angles, angular_velocity=rates)
    elif kind == "shapes":
        shapes, radius, place, speed = move_shapes(rng, law, times)
    else:
        shapes, radius, place, speed = STARTS[kind](rng, {"bouncing": max_balls, "falling": max_falling}.get(kind, 1))
        place, speed = move_bodies(place, speed, radius, law, times, kind == "bouncing")
    colours, state["objects"] = SHAPE_COLOURS if kind == "shapes" else draw_colours(rng, len(shapes)), []
    for body, shape in enumerate(shapes):
        columns = dict(x=place[:, body, 0], y=place[:, body, 1], vx=speed[:, body, 0], vy=speed[:, body, 1])
        thing = dict(shape=shape, radius=float(radius[body]), colour=colours[body])
        state["objects"].append({**thing, **{name: values.tolist() for name, values in columns.items()}})
    return state


# -- pictures ---------------------------------------------------------------------------------------------------------


def margin_of(size):
    """Pixels around a canvas in which bodies that leave the frame are drawn and then cut off."""
    return size // 4 + 4


def paint_body(canvas, size, x, y, radius, shape, colour, opacity=1.0):
    """Blend a body into every frame, its rim smooth. canvas float32 [T, S + 2 margins, S + 2 margins, 3], x, y [T] and
    radius in sides, opacity a number or [T]."""
    margin, radius = margin_of(size), radius * size
    span, pixels = math.ceil(2 * radius) + 3, []
    for centre in (np.clip(y, -0.1, 1.1) * size, np.clip(x, -0.1, 1.1) * size):
        first = np.floor(centre - radius - 1).astype(int)
        pixels.append((first[:, None] + np.arange(span), centre[:, None]))
    (rows, y), (columns, x) = pixels
    down, right = rows + 0.5 - y, columns + 0.5 - x  # [T, span], from the body's centre to the pixels'
    if shape == "square":
        inside = (np.clip(radius + 0.5 - np.abs(side), 0, 1) for side in (down[:, :, None], right[:, None]))
        cover = np.prod(np.broadcast_arrays(*inside), 0)
    else:
        cover = np.clip(radius + 0.5 - np.hypot(down[:, :, None], right[:, None]), 0, 1)
    cover = (cover * np.broadcast_to(opacity, len(x))[:, None, None])[..., None].astype(np.float32)
    spot = np.arange(len(x))[:, None, None], rows[:, :, None] + margin, columns[:, None] + margin
    canvas[spot] += cover * (np.array(colour, np.float32) - canvas[spot])


def paint_string(canvas, size, state, x, y):
    """Blend the string from the pivot to a bob at x, y [T] into every frame."""
    margin, (from_x, from_y) = margin_of(size), state["pivot"]
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    right, down = centres[None, None] - from_x, centres[None, :, None] - from_y
    to_x, to_y = ((x - from_x)[:, None, None].astype(np.float32), (y - from_y)[:, None, None].astype(np.float32))
    share = np.clip((right * to_x + down * to_y) / (to_x**2 + to_y**2), 0, 1)  # of the string, [T, S, S]
    distance = np.hypot(right - share * to_x, down - share * to_y)
    cover = np.clip((STRING_WIDTH / 2 - distance) * size + 0.5, 0, 1)[..., None]
    inner = canvas[:, margin : margin + size, margin : margin + size]
    inner += cover * (np.array(GREY, np.float32) - inner)


def render(state, size):
    """State of a clip -> uint8 frames [T, size, size, 3] on white, shapes on dark; positions are those of no whole
    pixel."""
    num_frames, margin = len(state["objects"][0]["x"]), margin_of(size)
    ground = SHAPE_GROUND if state["kind"] == "shapes" else 255
    canvas = np.full((num_frames, size + 2 * margin, size + 2 * margin, 3), ground, np.float32)
    for thing in state["objects"]:
        x, y = np.array(thing["x"]), np.array(thing["y"])
        radius, colour = thing["radius"], thing["colour"]
        if state["kind"] == "pendulum":
            paint_string(canvas, size, state, x, y)
            pivot = (np.full(num_frames, place) for place in state["pivot"])
            paint_body(canvas, size, *pivot, PIVOT_RADIUS, "circle", GREY)
        for age in range(min(TRAIL, num_frames - 1) if state["kind"] == "projectile" else 0, 0, -1):
            seen = 0.5 * (1 - age / (TRAIL + 1)) * (np.arange(num_frames) >= age)
            paint_body(canvas, size, np.roll(x, age), np.roll(y, age), 0.8 * radius, "circle", colour, seen)
        paint_body(canvas, size, x, y, radius, thing["shape"], colour)
    inner = canvas[:, margin : margin + size, margin : margin + size]
    return (inner + 0.5).astype(np.uint8)


def draw_sheet(path, kinds, seed, most, side=88, columns=8):
    """Contact sheet: two rows for each kind, evenly spaced frames of one video in each, its instants above them. most:
    max_balls, max_falling."""
    from PIL import Image, ImageDraw, ImageFont

    num_frames, left, top, rows = 60, 96, 24, [(kind, index) for kind in kinds for index in (0, 1)]
    shown = np.linspace(0, num_frames - 1, columns).round().astype(int)
    sheet = Image.new("RGB", (left + columns * (side + 4), top + len(rows) * (side + 4)), (222, 222, 222))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.rectangle((0, 0, left - 4, sheet.height), fill="white")
    draw.rectangle((0, 0, sheet.width, top - 4), fill="white")
    for column, frame in enumerate(shown):
        draw.text((left + column * (side + 4) + 4, 2), f"{frame / 30:.2f} s", fill="black", font=font)
    for row, (kind, index) in enumerate(rows):
        frames, y = render(simulate(kind, seed, num_frames, 30.0, index, *most), side), top + row * (side + 4)
        draw.text((6, y + side // 2 - 16), f"{kind}\n{index}", fill="black", font=font)
        for column, frame in enumerate(shown):
            sheet.paste(Image.fromarray(frames[frame]), (left + column * (side + 4), y))
    V.save_picture(sheet.quantize(128), path)  # a third of the bytes


# -- files ------------------------------------------------------------------------------------------------------------


def parse(argv):
    """Command line -> namespace, `kinds` a list. UsageError names what is wrong."""
    parser = V.ArgumentParser(description="Write physics videos with the state of every frame.", allow_abbrev=False)
    parser.add_argument("--out", default="", type=os.path.expanduser, help="folder to write")
    parser.add_argument("--num_videos", type=int, default=128, help="videos of each kind [128]")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds to write, separated by commas")
    parser.add_argument("--num_frames", type=int, default=60, help="frames of each video [60]")
    parser.add_argument("--fps", type=float, default=30.0, help="frames per second [30]")
    parser.add_argument("--size", type=int, default=64, help="pixels on each side [64]")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same videos [0]")
    parser.add_argument("--max_balls", type=int, default=8, help="most balls of a bouncing video [8]")
    parser.add_argument("--max_falling", type=int, default=1, help="most things of a falling video [1]")
    parser.add_argument("--sheet", default="", type=os.path.expanduser, help="draw a contact sheet to this png")
    args = parser.parse_args(argv)
    if not args.out and not args.sheet:
        parser.error("one of --out and --sheet is needed")
    args.kinds = list(dict.fromkeys(kind.strip() for kind in args.kinds.split(",") if kind.strip()))
    unknown = [kind for kind in args.kinds if kind not in ALL_KINDS]
    if unknown or not args.kinds:
        what = f"no kind {V.shown(unknown[0])}{V.nearest(unknown[0], ALL_KINDS)}" if unknown else "names no kind"
        parser.error(f"--kinds: {what}; known: {', '.join(ALL_KINDS)}")
    for name, low, high in (
        ("num_videos", 1, 10**6),
        ("num_frames", 2, 10**6),
        ("fps", 0.1, 1000),
        ("size", 16, 4096),
        ("seed", 0, 2**63 - 1),
        ("max_balls", 1, MAX_BALLS),
        ("max_falling", 1, MAX_FALLING),
    ):
        value = getattr(args, name)
        if not low <= value <= high:
            parser.error(f"--{name} {value}: must lie in {low} to {high}")
    if args.size % 2:
        parser.error(f"--size {args.size}: must be even, as the video's colours have half its pixels")
    if args.num_frames * args.size**2 > MAX_PIXELS:
        parser.error(f"--num_frames {args.num_frames} of --size {args.size}: too much for one video; make either less")
    return args


def open_folder(folder, settings):
    """Make the folder, or take up one of the same settings. UserError for any other that is not empty."""
    done = folder / "videos.json"
    try:
        if done.is_file():
            found = V.parse_json(V.read_text(done, V.MAX_CONFIG_BYTES))
            if found != settings:
                raise V.UserError(f"--out {folder} holds videos of other settings ({done}); use another --out")
        elif folder.is_dir() and any(folder.iterdir()):
            raise V.UserError(f"--out {folder} is not empty and holds no videos.json; use another --out")
        folder.mkdir(parents=True, exist_ok=True)
        V.write_new(done, json.dumps(settings).encode())
    except (OSError, ValueError, RecursionError) as error:
        raise V.UserError(f"--out {folder}: cannot be used ({V.reason_of(error)})") from error


def write_one(folder, kind, index, args):
    """Write a video and its annotation where one of them is absent -> whether it was."""
    name = f"{kind}_{index:03d}"
    video, annotation = folder / "videos" / kind / f"{name}.mp4", folder / "annotations" / kind / f"{name}.json"
    if video.is_file() and annotation.is_file():
        return False
    most, content = (args.max_balls, args.max_falling), io.BytesIO()
    state = simulate(kind, args.seed, args.num_frames, args.fps, index, *most)
    V.write_video(content, render(state, args.size), args.fps)
    state = add_places(state, args.size) if kind == "shapes" else state
    V.write_new(video, content.getvalue())
    V.write_new(annotation, json.dumps(state, allow_nan=False).encode())
    return True


def write_all(folder, args):
    """Write every video that is absent, with a progress line -> how many were."""
    total, written, count, shown = len(args.kinds) * args.num_videos, 0, 0, V.is_terminal(sys.stderr)
    for kind in args.kinds:
        for part in ("videos", "annotations"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for index in range(args.num_videos):
            written += write_one(folder, kind, index, args)
            count += 1
            if shown:
                bar = V.progress_bar(count / total, f"{count}/{total} videos, {kind}")
                V.emit("\r" + bar + ("" if count < total else "\n"), sys.stderr)
    return written


def make(argv):
    """Draw the sheet, write the folder, as the flags say."""
    args, began = parse(argv), time.perf_counter()
    if args.sheet:
        draw_sheet(args.sheet, args.kinds, args.seed, (args.max_balls, args.max_falling))
        V.say(f"written: {args.sheet}")
    if args.out:
        names = ("seed", "num_frames", "fps", "size", "max_balls", "max_falling")
        settings = {name: getattr(args, name) for name in names}
        open_folder(Path(args.out), {"physics": PHYSICS, **settings})
        written, seconds = write_all(Path(args.out), args), time.perf_counter() - began
        there = len(args.kinds) * args.num_videos - written
        V.say(f"{written} videos in {seconds:.1f} s under {args.out}" + (f", {there} were there" if there else ""))


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(make, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
