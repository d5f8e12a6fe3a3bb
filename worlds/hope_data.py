"""Feature folders: clips as latents on disk, with the actions between them.

clip_00012/feature_maps/NAME.npy           [T*N, D], [T, N, D] or [T, H, W, D] floats, T latents in time order
clip_00012/actions_states/actions.npy      [T - 1, A]; row t leads from latent t to latent t + 1
clip_00012/actions_states/states.npy       [T - 1, A], may be absent
clip_00012/actions_states/extrinsics.npy   [T - 1, A - 1], read with use_extrinsics only
"""

import math
import os
import re
from dataclasses import replace

import numpy as np
import torch

import VJepa_AUTO_V2 as V

LOOKED_AT = 32  # clips whose headers are read for the start-up lines
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npy_head(path, what):
    """The header of an npy file of plain numbers -> (shape, type, place of the first number in bytes). BadFile."""
    if not os.path.lexists(path):
        raise V.BadFile(f"{what} is missing")
    V.check_regular(path)
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in HEADERS:
                raise ValueError(f"npy version {version}")
            shape, by_columns, kind = HEADERS[version](file)
            begin = file.tell()
    except OSError as error:
        raise V.BadFile(f"{what}: cannot be read ({error.strerror})") from error
    except (ValueError, EOFError, SyntaxError) as error:
        raise V.BadFile(f"{what}: no npy file ({V.flat(error)[:120]})") from error
    if kind.kind not in "fiu" or by_columns and len(shape) > 1:
        raise V.BadFile(f"{what}: holds {kind}{' stored by columns' * by_columns}, not numbers stored by rows")
    return shape, kind, begin


def read_rows(path, what, head, first, count):
    """Rows of an npy file with this header -> float32 [count, ...]. Read, not mapped: a file that shrinks under a map
    kills the process. BadFile, also for what is not finite."""
    shape, kind, begin = head
    row = math.prod(shape[1:])
    try:
        with open(path, "rb") as file:
            file.seek(begin + first * row * kind.itemsize)
            content = file.read(count * row * kind.itemsize)
    except OSError as error:
        raise V.BadFile(f"{what}: cannot be read ({error.strerror})") from error
    if len(content) < count * row * kind.itemsize:
        raise V.BadFile(f"{what}: cut short, its header tells of {list(shape)} {kind}")
    values = np.frombuffer(content, kind).reshape(count, *shape[1:]).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        raise V.BadFile(f"{what}: NaN or infinity in row {first + int(np.argwhere(~finite)[0][0])}")
    return values


def clip_id(video, feature_map):
    """The number of a clip's folder, None where a file is no feature map of that name."""
    found = re.search(rf"(?:^|/)clip_(\d+)/feature_maps/{re.escape(feature_map)}\.npy$", video.path)
    return int(found[1]) if found else None


def split_by_id(clips, cfg):
    """Clips in the order of their ids -> {side: clips}: the last groups are test, those before them val. UsageError.

    By ids, not by hashes: windows that were cut from one video have neighbouring ids, so that few neighbours stand on
    two sides, and none where `group` names what belongs together.
    """
    drives = list(dict.fromkeys(clip.drive for clip in clips))
    shares = {"test": cfg.test_fraction, "val": cfg.val_fraction}
    counts = {side: max(round(share * len(drives)), 1) if share > 0 else 0 for side, share in shares.items()}
    begin_test = len(drives) - counts["test"]
    begin_val = begin_test - counts["val"]
    if begin_val < 1:
        parts = f"train, {counts['val']} val and {counts['test']} test"
        raise V.UsageError(
            f"data_root {cfg.data_root}: {len(drives)} clips or groups cannot be split into {parts} "
            "(--val_fraction, --test_fraction)"
        )
    place = {drive: number for number, drive in enumerate(drives)}
    bounds = {"train": (0, begin_val), "val": (begin_val, begin_test), "test": (begin_test, len(drives))}
    return {side: [clip for clip in clips if first <= place[clip.drive] < end] for side, (first, end) in bounds.items()}


def groups_of(root):
    """What tools/cache_latents.py says of clips that belong together -> {folder of a clip: group}."""
    try:
        lines = V.read_text(os.path.join(root, "index.csv"), V.MAX_LIST_BYTES).splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    rows = [V.csv_cells(line, ",") for line in lines]
    if not rows or not {"clip", "group"} <= set(rows[0]):
        return {}
    clip, group = rows[0].index("clip"), rows[0].index("group")
    return {row[clip]: row[group] for row in rows[1:] if len(row) == len(rows[0])}


def beside_map(path):
    """The folder of actions and states that goes with a feature map."""
    return os.path.join(os.path.dirname(os.path.dirname(path)), "actions_states")


def frames_in(cfg, shape):
    """How many latents a feature map of this shape holds. BadFile where it is not of the config's grid and width."""
    patches, grid = cfg.grid_high * cfg.grid_wide, (cfg.grid_high, cfg.grid_wide)
    if not 2 <= len(shape) <= 4 or not shape[0]:
        raise V.BadFile(f"features: shape {list(shape)}, not [T*N, D], [T, N, D] or [T, H, W, D]")
    if shape[-1] != cfg.feature_dim:
        raise V.BadFile(f"features: {shape[-1]} wide, not feature_dim = {cfg.feature_dim} (--feature_dim)")
    told = f"{patches} patches per frame, {cfg.grid_high} x {cfg.grid_wide} (--grid_high, --grid_wide)"
    if len(shape) == 2 and shape[0] % patches:
        raise V.BadFile(f"features: {shape[0]} rows cannot be divided into {told}")
    if len(shape) > 2 and shape[1:-1] not in ((patches,), grid):
        raise V.BadFile(f"features: shape {list(shape)} does not fit {told}")
    return shape[0] // patches if len(shape) == 2 else shape[0]


class FeatureClips(V.FileDataset):
    """Clips of latents with actions -> features [T + 1, N, D], actions and states [T, A], extrinsics [T, A - 1] with
    use_extrinsics, all float32; T = num_timesteps. Of a longer clip a window drawn by (seed, i) is read in training,
    the first one elsewhere, and nothing else of the file."""

    SUFFIXES = (".npy",)

    @classmethod
    def arrange(cls, cfg, listing):
        """Feature maps of the wanted name and ids, in the order of ids, with a test part that never trains."""
        every = {video: clip_id(video, cfg.feature_map) for video in listing}
        clips = sorted((video for video in every if every[video] is not None), key=lambda video: every[video])
        what = f"data_root {cfg.data_root}:"
        if not clips:
            others = sorted({os.path.basename(video.path) for video in listing if "/feature_maps/" in video.path})
            there = f"; there are {V.name_some(others)}" if others else ""
            raise V.UsageError(f"{what} no clip_<id>/feature_maps/{cfg.feature_map}.npy{there} (--feature_map)")
        first, end = max(cfg.clip_start, 0), cfg.clip_end if cfg.clip_end >= 0 else math.inf
        wanted = [video for video in clips if first <= every[video] < end]
        if not wanted:
            ids = f"they go from {every[clips[0]]} to {every[clips[-1]]}"
            raise V.UsageError(
                f"{what} no clip has an id from {first} to below {end}; {ids} (--clip_start, --clip_end)"
            )
        root = getattr(listing, "root", cfg.data_root)
        groups = groups_of(root) if os.path.isdir(root) else {}
        wanted = [replace(clip, group=clip.group or groups.get(clip.name.split("/")[0], "")) for clip in wanted]
        found = V.Listing(wanted, listing.notes, listing.seen)
        if listing.sides:
            found.sides = V.below_sides(found)
            if not found.sides["train"] or not found.sides["val"]:
                raise V.UsageError(f"{what} train/ or val/ holds no clip of these ids (--clip_start, --clip_end)")
        elif len(found) > 1:
            found.sides, found.split_by = split_by_id(found, cfg), "ids"
        cls.try_some(cfg, found, what)
        return found

    @classmethod
    def try_some(cls, cfg, clips, what, most=16):
        """UsageError where none of the first clips can be read: then the settings are wrong, not the files."""
        why = ""
        for clip in clips[:most]:
            try:
                cls(cfg, [clip], "", "val").read_file(clip, 0.0)
            except V.BadFile as error:
                why = why or f"{clip.name}: {error}"
            else:
                return
        raise V.UsageError(f"{what} none of {min(len(clips), most)} clips can be read; {why}")

    @staticmethod
    def notes(cfg, source):
        """What stands in for absent states, and rows of actions that are left out."""
        clips = list(dict.fromkeys((*source.train, *source.val)))
        looked, without, longer = clips[:: -(-len(clips) // LOOKED_AT)], 0, 0
        for clip in looked:
            beside = beside_map(clip.path)
            without += not os.path.exists(os.path.join(beside, "states.npy"))
            try:
                rows = npy_head(os.path.join(beside, "actions.npy"), "actions.npy")[0][0]
                longer += rows == frames_in(cfg, npy_head(clip.path, "features")[0])
            except V.BadFile:
                continue  # named with its reason when it is read
        told = f"of {len(looked)} clips looked at"
        lines = [f"states: {without} {told} have no states.npy: zeros stand in"] if without else []
        lines += [f"actions: {longer} {told} have a row per latent: the last leads nowhere, left out"] if longer else []
        return lines

    def plan(self, rng):
        return rng.random() if self.stream == "train" else 0.0

    def read_beside(self, clip, name, frames, first, width):
        """Rows first, ..., first + T of a file beside the actions, one for each step or each latent -> [T, width]."""
        path, what = os.path.join(beside_map(clip.path), name), f"actions_states/{name}"
        shape, *_ = head = npy_head(path, what)
        if len(shape) != 2 or shape[1] != width:
            wide = "action_dim - 1" if width < self.cfg.action_dim else "action_dim"
            raise V.BadFile(f"{what}: is {list(shape)}, not {width} wide = {wide} (--action_dim)")
        if shape[0] not in (frames - 1, frames):
            raise V.BadFile(f"{what}: {shape[0]} rows for {frames} latents, and {frames - 1} are needed")
        return torch.from_numpy(read_rows(path, what, head, first, self.cfg.num_timesteps))

    def read_file(self, video, plan):
        cfg, head = self.cfg, npy_head(video.path, "features")
        frames, count = frames_in(cfg, head[0]), cfg.num_timesteps + 1
        if frames < count:
            told = f"features: {frames} latents, and num_timesteps = {cfg.num_timesteps} needs {count}"
            raise V.BadFile(f"{told} (--num_timesteps {frames - 1})" if frames > 1 else told)
        first = int(plan * (frames - count + 1))
        each = head[0][0] // frames  # rows of the file in a frame
        values = read_rows(video.path, "features", head, first * each, count * each)
        clip = {
            "features": torch.from_numpy(values.reshape(count, -1, cfg.feature_dim)),
            "actions": self.read_beside(video, "actions.npy", frames, first, cfg.action_dim),
        }
        if os.path.lexists(os.path.join(beside_map(video.path), "states.npy")):
            clip["states"] = self.read_beside(video, "states.npy", frames, first, cfg.action_dim)
        else:
            clip["states"] = torch.zeros_like(clip["actions"])
        if cfg.use_extrinsics:
            clip["extrinsics"] = self.read_beside(video, "extrinsics.npy", frames, first, cfg.action_dim - 1)
        return clip

    def blank(self):
        cfg = self.cfg
        shapes = {"features": (cfg.num_timesteps + 1, cfg.grid_high * cfg.grid_wide, cfg.feature_dim)}
        shapes |= dict.fromkeys(("actions", "states"), (cfg.num_timesteps, cfg.action_dim))
        shapes |= {"extrinsics": (cfg.num_timesteps, cfg.action_dim - 1)} if cfg.use_extrinsics else {}
        return {name: torch.zeros(shape) for name, shape in shapes.items()}
