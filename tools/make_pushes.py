"""Write tiny physics clips with actions as feature folders: a pushed ball, others that it meets, walls, friction.

    python tools/make_pushes.py --out DIR --num 200 [--seed 0] [--balls 2] [--latents 9]
    python tools/make_pushes.py --out DIR --num 40 --first_id 200 --shift ice       a part with other physics

Each clip is DIR/clip_<id>/ with feature_maps/pushes.npy [T*N, D] fp16, a fixed random projection of each frame's
patches (no encoder is needed), actions_states/actions.npy [T - 1, 2], the push in x and y from one frame to the next,
and actions_states/states.npy [T - 1, 2], the pushed ball's velocity before it. The box is 1 wide, time counts in steps.
With --videos also DIR/videos/clip_<id>.mp4 and DIR/annotations/clip_<id>.json, where push_x and push_y at a frame are
those that led to it, for tools/cache_latents.py --layout hope --signals push_x,push_y.

A clip follows from seed, id and settings alone. The same command goes on where it was stopped; a clip of other settings
is refused.

Shifts, in the order of the ids of the original's parts: base, scale (large balls), ice (no friction), walls (a smaller
box), rotate (pushes act at a right angle), compose (all of these).
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import argparse
import io
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import VJepa_AUTO_V2 as V

BASE = {"radius": 0.11, "friction": 0.25, "margin": 0.04, "turn": 0.0}  # of the box; share of speed lost in a step
CHANGES = {
    "base": {},
    "scale": {"radius": 0.18},
    "ice": {"friction": 0.0},
    "walls": {"margin": 0.18},
    "rotate": {"turn": 90.0},
}
SHIFTS = {**CHANGES, "compose": {key: value for change in CHANGES.values() for key, value in change.items()}}
PAINT = np.array([(220, 60, 50), (60, 110, 220), (70, 170, 90), (200, 160, 50), (140, 80, 180)], np.float32)
SUBSTEPS, STRONGEST, RESTS = 8, 0.16, 0.3  # per step; largest push; share of steps without one


def bounce(place, speed, radius, low, high):
    """Walls and equal balls, elastic, in place. place, speed [K, 2]."""
    below, above = place < low + radius, place > high - radius
    speed[below], speed[above] = np.abs(speed[below]), -np.abs(speed[above])
    np.clip(place, low + radius, high - radius, out=place)
    for one in range(len(place)):
        for other in range(one):
            apart = place[one] - place[other]
            distance = max(float(np.hypot(*apart)), 1e-9)
            along = apart / distance
            closing = float((speed[one] - speed[other]) @ along)
            if distance < 2 * radius and closing < 0:
                speed[one] -= closing * along
                speed[other] += closing * along


def simulate(rng, latents, balls, physics):
    """-> (places [T, K, 2], pushes [T - 1, 2], velocities [T, K, 2])."""
    low, high, radius = physics["margin"], 1 - physics["margin"], physics["radius"]
    place = rng.uniform(low + radius, high - radius, (balls, 2))
    speed = rng.normal(0, 0.05, (balls, 2))
    pushes = rng.uniform(-STRONGEST, STRONGEST, (latents - 1, 2)) * (rng.random((latents - 1, 1)) > RESTS)
    cos, sin = np.cos(np.radians(physics["turn"])), np.sin(np.radians(physics["turn"]))
    places, speeds = [place.copy()], [speed.copy()]
    for push in pushes:
        for _ in range(SUBSTEPS):
            speed *= (1 - physics["friction"]) ** (1 / SUBSTEPS)
            speed[0] += np.array([cos * push[0] - sin * push[1], sin * push[0] + cos * push[1]]) / SUBSTEPS
            place += speed / SUBSTEPS
            bounce(place, speed, radius, low, high)
        places.append(place.copy())
        speeds.append(speed.copy())
    return np.stack(places), pushes, np.stack(speeds)


def render(places, size, physics):
    """places [T, K, 2] -> frames uint8 [T, size, size, 3]: discs with soft edges on grey, walls dark."""
    centres = (np.arange(size) + 0.5) / size
    inside = (np.abs(centres - 0.5) < 0.5 - physics["margin"]).astype(np.float32)
    ground = 40 + 160 * (inside[:, None] * inside)[..., None]
    image = np.repeat(np.broadcast_to(ground, (size, size, 3))[None], len(places), 0).astype(np.float32)
    for ball in range(places.shape[1]):
        x, y = places[:, ball, 0, None, None], places[:, ball, 1, None, None]
        distance = np.hypot(centres[None, None] - x, centres[None, :, None] - y)
        cover = np.clip((physics["radius"] - distance) * size + 0.5, 0, 1)[..., None]
        image += cover * (PAINT[ball % len(PAINT)] - image)
    return image.round().astype(np.uint8)


def project(frames, patch, dim):
    """frames uint8 [T, S, S, 3] -> fp16 [T*N, dim]: each patch through one fixed random matrix."""
    grid = frames.shape[1] // patch
    pixels = frames.reshape(len(frames), grid, patch, grid, patch, 3).swapaxes(2, 3).reshape(-1, patch * patch * 3)
    matrix = np.random.default_rng(patch).normal(0, 1 / np.sqrt(pixels.shape[1]), (pixels.shape[1], dim))
    return ((pixels / 127.5 - 1) @ matrix).astype(np.float16)


def make_clip(seed, number, latents, size, balls, shift):
    """A clip -> (frames uint8 [T, S, S, 3], pushes [T - 1, 2], velocities of the pushed ball [T - 1, 2])."""
    physics = {**BASE, **SHIFTS[shift]}
    places, pushes, speeds = simulate(np.random.default_rng([seed, number]), latents, balls, physics)
    return render(places, size, physics), pushes.astype(np.float32), speeds[:-1, 0].astype(np.float32)


def write_clip(args, number):
    """Write a clip whole, unless it is there -> whether it was written. UserError where another stands there."""
    names = ("seed", "latents", "size", "patch", "dim", "balls", "shift")
    about = json.dumps({name: getattr(args, name) for name in names})
    folder = args.out / f"clip_{number:05d}"
    if folder.exists():
        if not (folder / "pushes.json").is_file() or (folder / "pushes.json").read_text() != about:
            raise V.UserError(f"{folder}: holds another clip; use another --out or --first_id")
        return False
    frames, pushes, speeds = make_clip(args.seed, number, args.latents, args.size, args.balls, args.shift)
    if args.videos:
        video = io.BytesIO()
        V.write_video(video, frames, 4)
        noted = {"fps": 4, **{f"push_{axis}": [None, *map(float, pushes[:, k])] for k, axis in enumerate("xy")}}
        for part, ending, content in (("videos", "mp4", video.getvalue()), ("annotations", "json", json.dumps(noted))):
            (args.out / part).mkdir(exist_ok=True)
            V.write_new(args.out / part / f"{folder.name}.{ending}", content.encode() if part[0] == "a" else content)
    made = args.out / f".{folder.name}.tmp"  # may be there, of a command that was killed: all its files come anew
    for part in ("feature_maps", "actions_states"):
        (made / part).mkdir(parents=True, exist_ok=True)
    np.save(made / "feature_maps" / "pushes.npy", project(frames, args.patch, args.dim))
    np.save(made / "actions_states" / "actions.npy", pushes)
    np.save(made / "actions_states" / "states.npy", speeds)
    (made / "pushes.json").write_text(about)
    os.rename(made, folder)
    return True


def start(argv):
    """Command line -> the clips on disk."""
    parser = V.ArgumentParser(description="Write tiny physics clips with actions as feature folders.")
    parser.add_argument("--out", required=True, type=lambda text: Path(os.path.expanduser(text)))
    for name, default, help in (
        ("num", 200, "clips"),
        ("first_id", 0, "id of the first one"),
        ("seed", 0, "of all chance"),
        ("latents", 9, "frames of a clip, a latent each"),
        ("size", 32, "side of a frame in pixels"),
        ("patch", 8, "side of a patch in pixels"),
        ("dim", 48, "width of a latent"),
        ("balls", 2, "balls, the first of which is pushed"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=help)
    parser.add_argument("--shift", choices=tuple(SHIFTS), default="base", help="what is other than in the base physics")
    parser.add_argument("--videos", action=argparse.BooleanOptionalAction, default=False, help="write videos as well")
    args = parser.parse_args(argv)
    for name, least in (
        ("num", 1),
        ("first_id", 0),
        ("seed", 0),
        ("latents", 2),
        ("patch", 1),
        ("dim", 1),
        ("balls", 1),
    ):
        if getattr(args, name) < least:
            raise V.UsageError(f"{name} = {getattr(args, name)}: must be at least {least} (--{name})")
    if args.size < args.patch or args.size % args.patch:
        raise V.UsageError(f"size = {args.size}: must be a multiple of patch = {args.patch} (--size)")
    args.out.mkdir(parents=True, exist_ok=True)
    new = sum(write_clip(args, number) for number in range(args.first_id, args.first_id + args.num))
    grid = args.size // args.patch
    flags = f"--feature_map pushes --feature_dim {args.dim} --grid_high {grid} --grid_wide {grid} --action_dim 2"
    V.say(f"{args.num} clips in {args.out}, {new} of them new; train from it with --data_root {args.out} {flags}")


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(start, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
