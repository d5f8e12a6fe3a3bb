"""Hope: latents of video frames and the actions between them -> the latents that follow. Rivals on one loop: attention,
a ConvLSTM, self-modifying memories, and a copy of the last frame.

    features [B,T+1,N,D] -> LayerNorm -> frames 0..T-1, one action and state each -> predictor -> frames 1..T
                                              frame 0 -> predictor -> its own guess -> predictor -> ... (rollout)
                                              frame 0 -> predictor at time tau - 1 -> frame tau (jump)

    python tools/make_pushes.py --out data/pushes
    python worlds/hope.py --data_root data/pushes --preset vjepa2_ac_tiny --device cpu
    python worlds/hope.py --data_root DIR --preset hope_param_matched

From Python:

    model, cfg = V.load_model("runs/hope/checkpoints/ckpt_final.pt")
    preds = model.predict(features, actions, states)            # slot t: frame t + 1, [B,T,N,D]
    future = model.rollout(features, actions, states, steps=7)  # from frame 0 on its own guesses, [B,7,N,D]

Letters as in VJepa_AUTO_V2.py, and: T frames with an action each, N patches of a frame, D their width, A numbers of an
action, P width of the predictor, M tokens of a frame (action, state, extrinsics, patches), C frames of context.

A clip is a folder:

    clip_00012/feature_maps/NAME.npy           [T*N, D], [T, N, D] or [T, H, W, D] floats, T latents in time order
    clip_00012/actions_states/actions.npy      [T - 1, A]; row t leads from latent t to latent t + 1
    clip_00012/actions_states/states.npy       [T - 1, A], may be absent
    clip_00012/actions_states/extrinsics.npy   [T - 1, A - 1], read with use_extrinsics only

Sources: V-JEPA 2-AC (arXiv 2506.09985, section 3), ConvLSTM (1506.04214), Titans (2501.00663), Nested Learning
(Behrouz et al. 2025).
"""

import os

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as VJepa_AUTO_V2.py does, and why

import math
import re
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import VJepa_AUTO_V2 as V

# fmt: off

# What the original's experiments set, whose clips hold 8 latents and 2 numbers per action; 30 epochs of 4500 clips
ORIGINAL = dict(
    num_timesteps=7, action_dim=2, rollout_steps=7, batch_size=64, steps=2110, schedule="flat", amp=True,
    curriculum="0:teacher=1.0;7:teacher=0.7;11:teacher=0.3", val_epochs=1, num_workers=8,
)
SLOWER = "0:teacher=1.0;15:teacher=0.7;25:teacher=0.5"
# Two cores: clips of tools/make_pushes.py. By l2, for under l1 nearly all patches stand still and actions come late
TINY = dict(
    feature_map="pushes", feature_dim=48, grid_high=4, grid_wide=4, num_timesteps=8, action_dim=2, pred_dim=96,
    pred_depth=3, num_heads=4, drop_path=0.0, residual=True, rollout_steps=2, loss_form="l2",
    curriculum="0s:rollout=2;500s:rollout=4;1000s:rollout=8",
    batch_size=16, steps=1500, lr=3e-3, warmup_steps=100, num_workers=1, log_every=100, val_every=500, ckpt_every=500,
)
# a step of memories takes four times as long
SHORT = dict(TINY, steps=660, curriculum="0s:rollout=2;220s:rollout=4;440s:rollout=8", val_every=220, ckpt_every=220)
# what an entry of a curriculum may set -> the field whose value holds until then
STAGE_FIELDS = {
    "rollout": "rollout_steps", "jump": "jump_frames", "teacher": "lambda_teacher", "lambda_rollout": "lambda_rollout",
    "lambda_jump": "lambda_jump",
}


class Stage(NamedTuple):
    """A part of the curriculum: from which epoch or step on, frames of rollouts and jumps, weights of the losses."""

    begin: int
    by_step: bool
    rollout: int
    jump: int
    teacher: float
    lambda_rollout: float
    lambda_jump: float

    def __str__(self):
        unit = "step" if self.by_step else "epoch"
        jumps = f", jumps to the last {self.jump} x {self.lambda_jump:g}" if self.lambda_jump else ""
        return (
            f"from {unit} {self.begin} on: next frame x {self.teacher:g}, rollouts of {self.rollout} frames x "
            f"{self.lambda_rollout:g}{jumps}"
        )


@lru_cache(maxsize=64)
def read_curriculum(text, first):
    """Text of a curriculum and the Stage before it -> list of Stages, in order. ValueError."""
    stages, units = [first], set()
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        found = re.fullmatch(r"(\d{1,9})(s?)\s*:(.*)", entry)
        if not found:
            raise ValueError(f"{entry!r} is not EPOCH:NAME=VALUE,... or STEPs:NAME=VALUE,...")
        begin, changes = int(found[1]), {}
        for change in found[3].split(","):
            name, is_set, value = (part.strip() for part in change.partition("="))
            if name not in STAGE_FIELDS or not is_set:
                raise ValueError(f"{entry!r}: {change.strip()!r} does not set one of {', '.join(STAGE_FIELDS)}")
            if name in changes:
                raise ValueError(f"{entry!r} sets {name} twice")
            changes[name] = read_value(name, value, entry)
        units.add(found[2])
        if len(units) > 1:
            raise ValueError("begins its parts by epoch or by step, not both")
        if len(stages) > 1 and begin <= stages[-1].begin:
            raise ValueError(f"{entry!r} must begin after {stages[-1].begin}")
        stages.append(stages[-1]._replace(begin=begin, by_step=bool(found[2]), **changes))
    return stages[1:] if len(stages) > 1 and not stages[1].begin else stages


def read_value(name, value, entry):
    """A value of a curriculum's entry -> a whole number above 0 for frames, else a weight. ValueError."""
    if name in ("rollout", "jump"):
        if not re.fullmatch(r"\d{1,6}", value) or not int(value):
            raise ValueError(f"{entry!r}: {name} must be a whole number above 0")
        return int(value)
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(f"{entry!r}: {name} must be a number of 0 or more")
    return weight



@dataclass
class HopeConfig(V.RunConfig):
    """Feature folders, predictor, losses, curriculum and schedule of the world that predicts features by actions."""

    preset: str = "base"  # vjepa2_ac | baseline_convlstm | hope_param_matched | hope_depth_matched | *_tiny | base
    out_dir: str = "runs/hope"  # everything the run writes
    # -- clips
    feature_map: str = "vjepa2_vitl16"  # name of the files below feature_maps, without .npy
    feature_dim: int = 1024  # D, numbers of a patch
    grid_high: int = 16  # patches of a frame from top to bottom
    grid_wide: int = 16  # patches of a frame from left to right
    num_timesteps: int = 8  # T, frames to predict; a clip needs one more
    action_dim: int = 7  # A, numbers of an action and of a state
    use_extrinsics: bool = False  # a third token per frame: the camera's pose, A - 1 numbers
    clip_start: int = -1  # smallest clip id that is used; -1 = all
    clip_end: int = -1  # clip ids from here on are left out; -1 = none
    test_fraction: float = 0.1  # share of the clips, the last by id, that neither train nor validate
    # -- predictor
    predictor: str = "ac_vit"  # ac_vit | convlstm | identity | hope | hybrid
    pred_dim: int = 384  # P, its width; channels of convlstm
    pred_depth: int = 24  # blocks
    num_heads: int = 16  # heads
    mlp_ratio: float = 4.0  # hidden width of an MLP over P, of ac_vit
    titan_hidden: float = 2.0  # hidden width of a Titan memory over P
    chunk: int = 1  # frames that hope and hybrid read before they write
    surprise: float = 0.0  # a clip whose surprise is not above this keeps its memories as they are
    memory_lr: float = 0.5  # learning rate of Titan memories, as a share of the others'
    drop_path: float = 0.1  # share of samples that skip the last block in training, less in those before
    residual: bool = False  # guesses are changes of the last frame, none at the start; docs/hope.md
    normalise_actions: bool = True  # actions, states, extrinsics by mean and deviation over the training clips
    grad_checkpoint: bool = False  # compute blocks twice, keep less in memory
    init_from: str = ""  # .pt of V-JEPA 2-AC, or a checkpoint of this world: the predictor begins with its weights
    # -- losses
    normalise: bool = True  # LayerNorm without weights over D, of features and predictions
    context_frames: int = 1  # C, true frames that a rollout begins with
    rollout_steps: int = 2  # frames that a rollout predicts in training
    known_states: bool = False  # rollouts are told true states and extrinsics behind the context, as of a robot's arm
    jump_frames: int = 3  # a jump leads to one of so many last frames
    lambda_teacher: float = 1.0  # weight of the error of the next frame after true ones
    lambda_rollout: float = 1.0  # weight of the error of rollouts
    lambda_jump: float = 0.0  # weight of the error of jumps
    loss_form: str = "l1"  # l1 | l2 (mean square) | huber (from l2 / 2 to l1 at 1)
    curriculum: str = ""  # 0:rollout=2;7:rollout=4,teacher=0.7 by epoch, 0s:...;500s:... by step; docs/hope.md
    # -- optimisation
    schedule: str = "cosine"  # cosine | flat (constant between a rise and a fall of 8.5 % of the steps each)
    lr: float = 4.25e-4  # peak learning rate
    weight_decay: float = 0.04  # AdamW, on matrices only
    grad_clip: float = 1.01  # largest gradient norm; 0 = off

    PRESETS = {
        "vjepa2_ac": dict(ORIGINAL),
        "vjepa2_ac_vitg": dict(
            feature_map="vjepa2_vitg16", feature_dim=1408, pred_dim=1024, batch_size=8, known_states=True,
            normalise_actions=False,
        ),
        "baseline_convlstm": dict(ORIGINAL, predictor="convlstm", pred_dim=256),
        "hope_param_matched": dict(ORIGINAL, predictor="hope", pred_depth=6, curriculum=SLOWER),
        "hope_depth_matched": dict(ORIGINAL, predictor="hope", pred_depth=12, curriculum=SLOWER),
        "hope_hybrid": dict(ORIGINAL, predictor="hybrid", pred_depth=12, curriculum=SLOWER),
        "vjepa2_ac_tiny": dict(TINY),
        "baseline_convlstm_tiny": dict(TINY, predictor="convlstm", pred_dim=68),
        "hope_param_matched_tiny": dict(SHORT, predictor="hope", pred_dim=56, pred_depth=2, titan_hidden=2.5),
        "hope_depth_matched_tiny": dict(SHORT, predictor="hope", pred_depth=3),
        "hope_hybrid_tiny": dict(SHORT, predictor="hybrid", pred_dim=80, pred_depth=2),
    }
    RANGES = {
        "feature_dim": (1, 65536), "grid_high": (1, 1024), "grid_wide": (1, 1024), "num_timesteps": (1, 1000),
        "action_dim": (1, 1024), "clip_start": (-1, 10**9), "clip_end": (-1, 10**9), "test_fraction": (0, 0.9),
        "pred_dim": (1, 65536), "pred_depth": (1, 1000), "num_heads": (1, 1024), "mlp_ratio": (0.1, 64),
        "titan_hidden": (0.1, 64), "chunk": (1, 1000), "surprise": (0, None), "memory_lr": (0, 1000),
        "drop_path": (0, 0.9), "context_frames": (1, 1000), "rollout_steps": (1, 1000), "jump_frames": (1, 1000),
        "lambda_teacher": (0, None), "lambda_rollout": (0, None), "lambda_jump": (0, None),
    }
    CHOICES = {
        "predictor": ("ac_vit", "convlstm", "identity", "hope", "hybrid"), "loss_form": ("l1", "l2", "huber"),
        "schedule": ("cosine", "flat"),
    }
    MUST_MATCH = (
        "feature_dim", "grid_high", "grid_wide", "num_timesteps", "action_dim", "use_extrinsics", "predictor",
        "pred_dim", "pred_depth", "num_heads", "mlp_ratio", "titan_hidden", "chunk", "surprise", "normalise",
        "residual", "normalise_actions",
    )

    @property
    def patches(self) -> int:
        """N, patches of a frame."""
        return self.grid_high * self.grid_wide

    @property
    def tokens(self) -> int:
        """M, tokens of a frame: action, state, with use_extrinsics the camera's, patches."""
        return 2 + self.use_extrinsics + self.patches

    def stages(self):
        """The curriculum -> [Stage]; the first holds what the fields say, each other what it changes of the one before
        it. ValueError where it cannot be read."""
        first = Stage(0, False, *(getattr(self, name) for name in STAGE_FIELDS.values()))
        return read_curriculum(self.curriculum, first)

    def stage_at(self, step, num_files=0, world_size=1):
        """(number, Stage) at a step of a run on so many training files, where epochs count."""
        files = step * V.step_samples(self, world_size)
        epoch = files // num_files if num_files else 0
        *_, last = (pair for pair in enumerate(self.stages()) if pair[1].begin <= (step if pair[1].by_step else epoch))
        return last

    def longest_pass(self, stage):
        """Frames of the longest pass through the predictor in a part of the curriculum."""
        rolled = (self.context_frames + stage.rollout - 1) * (stage.lambda_rollout > 0)
        return max(self.num_timesteps * (stage.teacher > 0), rolled, 1)

    def rules(self):
        problem, most, stages = "", self.num_timesteps - self.context_frames + 1, []
        try:
            stages = self.stages()
        except ValueError as error:
            problem = str(error)
        rolled, jumped = (max((getattr(stage, name) for stage in stages), default=0) for name in ("rollout", "jump"))
        jumps = any(stage.lambda_jump for stage in stages)
        idle = any(not (stage.teacher or stage.lambda_rollout or stage.lambda_jump) for stage in stages)
        named = "curriculum" if self.curriculum else "rollout_steps"
        attends = self.predictor in ("ac_vit", "hope", "hybrid")
        heads = f"must be divisible by {self.num_heads} heads, an even number of 6 or more for each"
        wide = self.pred_dim // self.num_heads
        uneven = attends and (self.pred_dim % self.num_heads or wide < 6 or wide % 2)
        # a memory learns by what is read behind its writes
        passes = min((self.longest_pass(stage) for stage in stages), default=0)
        unread = self.predictor in ("hope", "hybrid") and stages and self.chunk >= passes
        blind = "moves the place in time of a frame, and convlstm knows no such place: must be 0"
        return [*super().rules(), *V.broken(
            (problem, "curriculum", problem),
            (most < 1, "context_frames", f"must not exceed num_timesteps = {self.num_timesteps}"),
            (most >= 1 and rolled > most, named, f"a rollout of {rolled} frames exceeds num_timesteps - "
             f"context_frames + 1 = {most}"),
            (jumps and jumped > self.num_timesteps, "jump_frames", f"must not exceed num_timesteps, {jumped} asked"),
            (idle, "lambda_teacher", "some loss must have a weight, in every part of the curriculum"),
            (uneven, "pred_dim", heads),
            (unread, "chunk", f"must be below {passes}, the frames of the longest pass in some part of the training: "
             "memories that nothing is read behind learn nothing"),
            (self.predictor == "convlstm" and jumps, "lambda_jump", blind),
            (self.use_extrinsics and self.action_dim < 2, "action_dim", "must be at least 2 with use_extrinsics"),
            (0 <= self.clip_end <= max(self.clip_start, 0), "clip_end", f"must exceed clip_start = {self.clip_start}"),
            (self.init_from and self.predictor == "identity", "init_from", "identity has no weights"),
        )]


# fmt: on

HORIZONS = 16  # most frames of a rollout whose errors are logged one by one
EDGE, START = 0.085, 0.176  # schedule flat: share of the steps that rise, and that fall; share of the peak it begins at

LOOKED_AT = 32  # clips whose headers are read for the start-up lines
MEASURED = 512  # clips at most whose actions and states are read for their mean and deviation
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


# -- clips: folders of features and actions


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
        features = torch.from_numpy(values.reshape(count, -1, cfg.feature_dim))
        return {"features": features, **self.read_told(video, frames, first)}

    def read_told(self, video, frames, first):
        """Actions, states and extrinsics of the steps from latent `first` on -> {name: [T, width]}."""
        cfg = self.cfg
        clip = {"actions": self.read_beside(video, "actions.npy", frames, first, cfg.action_dim)}
        if os.path.lexists(os.path.join(beside_map(video.path), "states.npy")):
            clip["states"] = self.read_beside(video, "states.npy", frames, first, cfg.action_dim)
        else:
            clip["states"] = torch.zeros_like(clip["actions"])
        if cfg.use_extrinsics:
            clip["extrinsics"] = self.read_beside(video, "extrinsics.npy", frames, first, cfg.action_dim - 1)
        return clip

    def statistics(self, stopping):
        """Of what is told beside the frames, over the first steps of at most MEASURED clips -> ({name: (mean,
        deviation)}, each [width], how many clips). What never changes has deviation 1. Stopped."""
        rows = []
        for video in self.videos[:: -(-len(self.videos) // MEASURED)]:
            if stopping():
                raise V.Stopped
            with suppress(V.BadFile):  # counted with its reason when the clip itself is read
                rows.append(self.read_told(video, frames_in(self.cfg, npy_head(video.path, "features")[0]), 0))
        found = {}
        for name in rows[0] if rows else ():
            values = torch.cat([row[name] for row in rows]).double()
            mean, std = values.mean(0), values.std(0, correction=0)
            found[name] = mean, torch.where(std > 1e-6 * mean.abs().clamp(min=1e-3), std, 1.0)
        return found, len(rows)

    def blank(self):
        cfg = self.cfg
        shapes = {"features": (cfg.num_timesteps + 1, cfg.grid_high * cfg.grid_wide, cfg.feature_dim)}
        shapes |= dict.fromkeys(("actions", "states"), (cfg.num_timesteps, cfg.action_dim))
        shapes |= {"extrinsics": (cfg.num_timesteps, cfg.action_dim - 1)} if cfg.use_extrinsics else {}
        return {name: torch.zeros(shape) for name, shape in shapes.items()}


# -- predictors: frames 0..T-1 and what is done at each -> frames 1..T
# All are called predictor(features [B, T, N, D], actions [B, T, A], states [B, T, A], extrinsics [B, T, A - 1] or None)
# -> [B, T, N, D], slot t the guess of frame t + 1, from frames and actions up to t alone. Those with `advance` take
# frames up where an earlier call ended.


class Identity(nn.Module):
    """A copy of the last frame. Its one parameter has no numbers: it is there so that the loop can train it."""

    def __init__(self, cfg):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0))

    def forward(self, features, actions, states, extrinsics=None, times=None):
        return features + self.nothing.sum()


class ConvLSTM(nn.Module):
    """One cell of 3 x 3 convolutions over the grid adds a change to every frame; that is zero at first. It sees
    actions, spread over the grid, and neither states nor extrinsics."""

    def __init__(self, cfg):
        super().__init__()
        self.grid, P, D = (cfg.grid_high, cfg.grid_wide), cfg.pred_dim, cfg.feature_dim
        self.embed, self.out = nn.Conv2d(D, P, 1), nn.Conv2d(P, D, 1)
        self.gates = nn.Conv2d(2 * P + cfg.action_dim, 4 * P, 3, padding=1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def advance(self, features, actions, states, extrinsics=None, past=None):
        """As forward, `past` what an earlier call gave, None at the beginning -> (guesses, past)."""
        maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, self.grid)  # [B T, D, h, w]
        seen = self.embed(maps).unflatten(0, features.shape[:2])  # [B, T, P, h, w]
        hidden, cell = past or (torch.zeros_like(seen[:, 0]), torch.zeros_like(seen[:, 0]))
        changes = []
        for t in range(features.shape[1]):
            action = actions[:, t, :, None, None].to(seen.dtype).expand(-1, -1, *self.grid)
            keep, take, show, new = self.gates(torch.cat([seen[:, t], action, hidden], 1)).chunk(4, 1)
            cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
            hidden = show.sigmoid() * cell.tanh()
            changes.append(self.out(hidden).flatten(2).transpose(1, 2))  # [B, N, D]
        return features + torch.stack(changes, 1), (hidden, cell)

    def forward(self, features, actions, states, extrinsics=None):
        return self.advance(features, actions, states, extrinsics)[0]


def drop_path(x, share, training):
    """What a block adds, x [B, ...] -> zero for a share of the samples, the others larger for it."""
    if not share or not training:
        return x
    keep = torch.empty(len(x), *[1] * (x.ndim - 1), device=x.device, dtype=x.dtype).bernoulli_(1 - share)
    return x * keep / (1 - share)


class FrameAttention(V.Attention):
    """Attention of each frame's tokens to its own and those of the frames before: [B, T, M, P] -> the same.

    Frame by frame, so that no mask is needed and nothing is computed that a mask would hide.
    """

    def forward(self, x, rope, past=None):
        """`past`: keys and values [B, nh, K, hd] of the frames before, None where there are none -> (x, the same with
        these)."""
        T, M = x.shape[1:3]
        q, k, v = V.split_heads(self.qkv(x.flatten(1, 2)), 3, self.num_heads)  # each [B, nh, T M, hd]
        q, k = V.rotate(q, *rope), V.rotate(k, *rope)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        before = k.shape[2] - T * M
        parts = ((t * M, (t + 1) * M) for t in range(T))
        found = [V.attend(q[:, :, a:b], k[:, :, : before + b], v[:, :, : before + b]) for a, b in parts]
        x = self.proj(torch.cat(found, 2).transpose(1, 2).flatten(2))  # [B, T M, P]
        return x.unflatten(1, (T, M)), (k, v)


class FrameBlock(nn.Module):
    """Pre-norm transformer block over the tokens of frames, causal in time: [B, T, M, P] -> the same, and its past."""

    def __init__(self, dim, num_heads, mlp_ratio, share):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), FrameAttention(dim, num_heads, 0.0)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), V.MLP(dim, int(dim * mlp_ratio))
        self.share = share

    def forward(self, x, rope, past=None):
        y, past = self.attn(self.norm1(x), rope, past)
        x = x + drop_path(y, self.share, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.share, self.training), past


def start_weights(module, by_width):
    """V.init_weights; `by_width` matrices of gain 1 instead: the published 0.02 is meant for wide nets."""
    V.init_weights(module)
    for layer in module.modules() if by_width else ():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)


class FrameTokens(nn.Module):
    """What ac_vit and the memories share: frames and what is done at each as tokens, M of a frame, and back.

    Tokens are rotated by their place in time, patches by row and column as well, in the published form: columns are
    stretched so that a grid that is no square is as wide as high. The encoder of extrinsics is there even where none
    are read, as in published weights, and learns nothing then.
    """

    def __init__(self, cfg):
        super().__init__()
        P, D, A = cfg.pred_dim, cfg.feature_dim, cfg.action_dim
        self.uses_extrinsics, self.grad_checkpoint = cfg.use_extrinsics, cfg.grad_checkpoint
        self.num_timesteps, self.num_beside = cfg.num_timesteps, cfg.tokens - cfg.patches
        self.residual = cfg.residual
        self.embed, self.action_encoder, self.state_encoder = nn.Linear(D, P), nn.Linear(A, P), nn.Linear(A, P)
        if A > 1:
            self.extrinsics_encoder = nn.Linear(A - 1, P).requires_grad_(cfg.use_extrinsics)
        self.norm, self.out = nn.LayerNorm(P, eps=1e-6), nn.Linear(P, D)
        start_weights(self, cfg.residual)
        sites = V.grid_positions((1, cfg.grid_high, cfg.grid_wide)).double()  # [N, 3]
        sites[:, 2] *= cfg.grid_high / cfg.grid_wide
        places = torch.cat([sites.new_zeros(self.num_beside, 3), sites]).repeat(cfg.num_timesteps, 1)  # [T M, 3]
        places[:, 0] = torch.arange(cfg.num_timesteps).repeat_interleave(cfg.tokens)
        for name, table in zip(("cos", "sin"), V.rope_table(places, P // cfg.num_heads)):
            self.register_buffer(name, table.unflatten(0, (-1, cfg.tokens)), persistent=False)  # [T, M, hd]

    def start_ends(self, cfg):
        """What differs from the published start: no change of a frame where `residual`; with normalise_actions tokens
        of actions as large as of patches, half of it bias, without which a norm would hide how strong an action is."""
        if cfg.residual:
            nn.init.zeros_(self.out.weight)
        if cfg.normalise_actions:
            size = math.sqrt(0.5) * (1.0 if cfg.residual else 0.02 * math.sqrt(cfg.feature_dim))
            for name, layer in self.named_children():
                if name.endswith("_encoder"):
                    nn.init.trunc_normal_(layer.weight, std=size * layer.in_features**-0.5, a=-9, b=9)
                    nn.init.trunc_normal_(layer.bias, std=size, a=-9, b=9)

    def rope(self, first, count, times=None):
        """(cos, sin) of the tokens of `count` frames from number `first` on, each [count M, hd]; of one frame of each
        sample at `times` [B] instead, [B, 1, M, hd]. ValueError beyond the last frame."""
        if times is not None:
            return self.cos[times][:, None], self.sin[times][:, None]
        if first + count > self.num_timesteps:
            raise ValueError(f"{first + count} frames, and num_timesteps = {self.num_timesteps}")
        return tuple(table[first : first + count].flatten(0, 1) for table in (self.cos, self.sin))

    def frame_tokens(self, features, actions, states, extrinsics=None):
        """-> tokens [B, T, M, P]: action, state, extrinsics where they are used, patches."""
        beside = [self.action_encoder(actions), self.state_encoder(states)]
        if self.uses_extrinsics:
            beside.append(self.extrinsics_encoder(extrinsics))
        x = self.embed(features)  # [B, T, N, P]
        return torch.cat([torch.stack(beside, 2).to(x.dtype), x], 2)

    def guesses(self, x, features):
        """Tokens [B, T, M, P] -> guesses [B, T, N, D], changes of the frames [B, T, N, D] where `residual`."""
        guess = self.out(self.norm(x[:, :, self.num_beside :]))
        return features + guess if self.residual else guess

    def call(self, block, *inputs):
        """A block on its inputs, computed twice where that is asked for."""
        if self.grad_checkpoint and self.training and torch.is_grad_enabled():
            return V.checkpoint_activations(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def advance(self, features, actions, states, extrinsics=None, past=None, times=None):
        """As forward, `past` what an earlier call gave, None at the beginning -> (guesses, past)."""
        first, pasts = past or (0, [None] * len(self.blocks))
        x, rope = self.frame_tokens(features, actions, states, extrinsics), self.rope(first, features.shape[1], times)
        kept = []
        for block, before in zip(self.blocks, pasts):
            x, now = self.call(block, x, rope, before)
            kept.append(now)
        return self.guesses(x, features), (first + features.shape[1], kept)

    def forward(self, features, actions, states, extrinsics=None, times=None):
        return self.advance(features, actions, states, extrinsics, None, times)[0]


class AcVit(FrameTokens):
    """The predictor of V-JEPA 2-AC: a transformer over the tokens of frames, causal from frame to frame."""

    def __init__(self, cfg):
        super().__init__(cfg)
        shares = np.linspace(0, cfg.drop_path, cfg.pred_depth)
        sizes = cfg.pred_dim, cfg.num_heads, cfg.mlp_ratio
        self.blocks = nn.ModuleList(FrameBlock(*sizes, float(share)) for share in shares)
        start_weights(self.blocks, cfg.residual)
        for number, block in enumerate(self.blocks, 1):
            for last in (block.attn.proj, block.mlp.fc2):  # the residual stream keeps its scale with depth
                last.weight.data.div_(math.sqrt(2.0 * number))
        self.start_ends(cfg)


# -- memories: weights that a clip reads and rewrites while it passes
#
#    x [B, T, M, P] -> +FrameMixing     tokens of one frame see each other: attention, two narrow heads
#                   -> +Titans          read, then write: fast weights per clip, one write behind every chunk of frames
#                   -> ContinuumMemory  a cascade of residual MLPs, each with a state that moves every `period` frames
#
# Fast weights and states live inside one call and start from the learned ones: nothing is remembered from call to call.

MEMORY_PART = "memory."  # in the name of every parameter of a Titan memory: those learn at half the rate
PERIODS = ((1, 4.0), (4, 4.0), (16, 4.0))  # (period in frames, hidden width over dim) of the levels of hope
HYBRID_PERIODS = ((1, 2.0), (3, 2.5), (7, 3.0))  # of hybrid
LEARNING, KEEPING = -1.0, 4.0  # where eta and alpha start, before softplus and sigmoid: 0.31 and 0.98 per write


def turn(x, rope, num_heads):
    """Rotate the channels of each head by position. x [B, L, dim], rope (cos, sin) [L, dim / num_heads] or nothing."""
    if not rope:
        return x
    heads = x.unflatten(2, (num_heads, -1)).transpose(1, 2)  # [B, nh, L, hd]
    return V.rotate(heads, *rope).transpose(1, 2).flatten(2)


class TitanMemory(nn.Module):
    """`num` memories M(x) = LN(x + W2 gelu(W1 x)) of one width; W1, W2 are fast: every clip has its own.

    The parameters `start1` [num, H, dim] and `start2` [num, dim, H] are where each clip begins. LN is no fast weight.
    """

    def __init__(self, num, dim, hidden, clip=1.0):
        super().__init__()
        self.start1 = nn.Parameter(torch.randn(num, hidden, dim) * dim**-0.5)
        self.start2 = nn.Parameter(torch.randn(num, dim, hidden) * hidden**-0.5)
        self.scale, self.shift = nn.Parameter(torch.ones(num, 1, dim)), nn.Parameter(torch.zeros(num, 1, dim))
        self.clip = clip  # longest gradient of a write, per clip and matrix

    def start(self, batch):
        """Fast weights of `batch` clips before the first write: (W1 [B, num, H, dim], W2 [B, num, dim, H]), float32."""
        return tuple(w.float().expand(batch, *w.shape) for w in (self.start1, self.start2))

    def answer(self, fast, x):
        """x [B, n, dim] -> W1 x and its GELU [B, num, n, H], x + W2 gelu(W1 x) [B, num, n, dim]."""
        w1, w2 = fast
        before = (x @ w1.flatten(1, 2).mT).unflatten(2, w1.shape[1:3]).transpose(1, 2)
        hidden = F.gelu(before)
        return before, hidden, x[:, None] + hidden @ w2.mT

    def read(self, fast, x):
        """What each memory says to x [B, n, dim] -> [B, num, n, dim]."""
        return F.layer_norm(self.answer(fast, x)[2], x.shape[-1:], eps=1e-6) * self.scale + self.shift

    def write(self, fast, k, v, rate, keep, surprise):
        """One step of delta gradient descent on the pairs k -> v [B, n, dim] -> new fast weights.

            W <- W * keep - rate * gradient of surprise / 2 * mean over tokens and features of (W(k) - target)^2

        W(k) is the answer without LN, target = LN(W(v)) without scale and shift: what each memory itself says to v
        (Nested Learning, equations 84 to 88). rate, keep [B, dim] belong to the columns of W1 and the rows of W2. The
        gradient of each clip and matrix is cut to the length `clip`.

        First order: inside the gradient the fast weights are constants, as are the surprise [B] and the factor that
        cuts. k, v, rate and keep are not, nor is W outside the gradient: so what later frames read sends a gradient
        into the start of each memory and into all that made k and v.
        """
        fixed = tuple(w.detach() for w in fast)
        before, hidden, said = self.answer(fixed, k)
        error = said - F.layer_norm(self.answer(fixed, v)[2], v.shape[-1:], eps=1e-6)
        error = error * (surprise / (k.shape[1] * k.shape[2]))[:, None, None, None]
        inner = torch.ops.aten.gelu_backward(error @ fixed[1], before)  # the slope of GELU, without its parts in memory
        key, rate, keep = k[:, None], rate[:, None, None], keep[:, None]
        cut1, cut2 = (self.cut(*pair) for pair in ((inner, key), (error, hidden)))
        return (
            fast[0] * keep[:, :, None] - (inner * cut1).mT @ (key * rate),
            fast[1] * keep[..., None] - (error * rate * cut2).mT @ hidden,
        )

    @torch.no_grad()
    def cut(self, left, right):
        """The factor that cuts the gradients left^T right to the length `clip`, [B, num, 1, 1], without making them."""
        square = ((left @ left.mT) * (right @ right.mT)).sum((2, 3), keepdim=True)
        return self.clip / square.clamp(min=self.clip**2).sqrt()


class Titans(nn.Module):
    """Titan memories over the frames of a clip, read before write. [B, T, M, dim] -> like it.

    `chunk` frames are read with the weights before them, then one write follows, which later chunks read; with
    chunk >= T the learned start is only read. `modifies`: five memories k, v, eta, alpha and the memory itself, each
    rewritten (Nested Learning 8.1). Without it one memory, with k and v static projections and eta, alpha learned
    per feature. A write keeps alpha I - eta k k^T of the weights, its diagonal and k of unit norm (Titans, 4.4). A clip
    writes nothing where its surprise, mean over tokens of the rms of v - read, is not above `threshold`. Fast weights
    are float32 under autocast too.
    """

    def __init__(self, dim, num_heads, hidden, chunk=1, threshold=0.0, clip=1.0, modifies=True):
        super().__init__()
        self.num_heads, self.chunk, self.threshold, self.modifies = num_heads, chunk, threshold, modifies
        self.memory = TitanMemory(1, dim, hidden, clip)
        self.query, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if modifies:
            self.pair_memory = TitanMemory(4, dim, hidden, clip)  # k, v, eta, alpha
            with torch.no_grad():
                self.pair_memory.shift[2:] += torch.tensor([LEARNING, KEEPING])[:, None, None]
        else:
            self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.eta, self.alpha = (nn.Parameter(torch.full((dim,), start)) for start in (LEARNING, KEEPING))

    def memories(self):
        return [self.memory, self.pair_memory] if self.modifies else [self.memory]

    def pairs(self, fast, y):
        """What a chunk y [B, n, dim] is written with: k, v [B, n, dim], eta, alpha [B, dim]."""
        if self.modifies:
            k, v, eta, alpha = self.pair_memory.read(fast, y).unbind(1)
            return k, v, F.softplus(eta).mean(1), alpha.sigmoid().mean(1)
        k, v = (F.layer_norm(part(y), y.shape[-1:], eps=1e-6) for part in (self.key, self.value))
        return k, v, *(row.expand(y.shape[0], -1) for row in (F.softplus(self.eta), self.alpha.sigmoid()))

    def written(self, fast, y, said, *rope):
        """Fast weights -> those behind a chunk y that was told `said`, both [B, n, dim]."""
        k, v, eta, alpha = self.pairs(fast[-1], y)
        k = turn(k, rope, self.num_heads)
        surprise = (v - said).detach().square().mean(2).sqrt().mean(1)  # [B]
        opened = (surprise > self.threshold)[:, None]
        keep = (alpha - eta * k.square().mean(1) / k.shape[2]).clamp(0.0, 1.0)
        rates = torch.where(opened, eta, 0.0), torch.where(opened, keep, 1.0)
        return [memory.write(own, k, v, *rates, surprise) for memory, own in zip(self.memories(), fast)]

    def forward(self, x, rope=None, past=None):
        """`past`: fast weights and the chunk that they have not taken in, None before the first frame -> (x, the
        same behind these frames)."""
        said, (fast, chunk) = [], past or ([memory.start(len(x)) for memory in self.memories()], None)
        with torch.autocast(x.device.type, enabled=False):
            y = x.float().flatten(1, 2)  # [B, T * M, dim]
            q = turn(self.query(y), rope, self.num_heads)
            begin, whole = 0, self.chunk * x.shape[2]  # tokens of a chunk
            while begin < y.shape[1]:
                if chunk and chunk[0].shape[1] == whole:  # written when somebody reads it
                    fast, chunk = self.written(fast, *chunk), None
                end = begin + whole - (chunk[0].shape[1] if chunk else 0)
                said.append(self.memory.read(fast[0], q[:, begin:end])[:, 0])
                now = y[:, begin:end], said[-1], *(code[..., begin:end, :] for code in rope or ())
                chunk = tuple(torch.cat(pair, -2) for pair in zip(chunk, now)) if chunk else now
                begin = end
        return self.proj(torch.cat(said, 1)).view_as(x), (fast, chunk)


class Level(nn.Module):
    """One level of the continuum memory: a residual MLP with a state. [B, T, M, dim] -> like it.

    All frames pass through the MLP; what has a period is its state, as in Nested Learning 7.1, where the weights of a
    level change every `period` steps by what it has gathered since. Here the fast weight is the bias of the hidden
    layer, one per clip and token of a frame. Behind frames 0, period, 2 * period ... it moves by `rate` towards the
    mean of the hidden layer over the frames since the last move: gradient descent on half their squared distance. A
    frame reads the state that frames before it made. In a clip of 8 frames period 16 moves once: it keeps frame 0.
    """

    def __init__(self, dim, period, ratio):
        super().__init__()
        hidden = int(dim * ratio)
        self.period, self.norm, self.mlp = period, nn.LayerNorm(dim, eps=1e-6), V.MLP(dim, hidden)
        self.rate = nn.Parameter(torch.zeros(hidden))  # before the sigmoid: 0.5
        self.gain = nn.Parameter(torch.linspace(-1.0, 1.0, hidden))  # from the change to the mean

    def states(self, hidden, past=None):
        """hidden [B, T, M, H], `past` what an earlier call gave -> (the state that each frame reads, like hidden; past:
        state, sum and number of the frames since it moved, frames so far)."""
        state, total, count, first = past or (torch.zeros_like(hidden[:, 0]), 0.0, 0, 0)
        read, begin = [], 0
        for frame in range(hidden.shape[1]):
            read.append(state)
            count += 1
            if (first + frame) % self.period == 0:
                mean = (total + hidden[:, begin : frame + 1].sum(1)) / count
                state, total, count, begin = state + self.rate.sigmoid() * (mean - state), 0.0, 0, frame + 1
        total = total + hidden[:, begin:].sum(1) if count else total
        return torch.stack(read, 1), (state, total, count, first + len(read))

    def forward(self, x, past=None):
        hidden = self.mlp.fc1(self.norm(x))
        state, past = self.states(hidden, past)
        return self.mlp.fc2(F.gelu(hidden + self.gain * state)), past


class ContinuumMemory(nn.Module):
    """A cascade of residual levels, fast to slow, given as (period, ratio). [B, T, M, dim] -> like it, and its past."""

    def __init__(self, dim, levels, drop_path=0.0):
        super().__init__()
        self.levels, self.drop_path = nn.ModuleList(Level(dim, *level) for level in levels), drop_path

    def forward(self, x, past=None):
        kept = []
        for level, before in zip(self.levels, past or [None] * len(self.levels)):
            y, now = level(x, before)
            x = x + drop_path(y, self.drop_path, self.training)
            kept.append(now)
        return x, kept


class FrameMixing(nn.Module):
    """Attention among the tokens of one frame, `heads` heads as wide as those of num_heads. [B,T,M,dim] -> like it.

    Memories are written behind their reads: without this an action would reach no patch of its own frame. Attention is
    the memory that keeps each pair (Nested Learning 5.1), here emptied at every frame.
    """

    def __init__(self, dim, num_heads, heads=2):
        super().__init__()
        self.heads = min(heads, num_heads)
        width = self.heads * (dim // num_heads)
        self.qkv, self.proj = nn.Linear(dim, 3 * width), nn.Linear(width, dim)

    def forward(self, x, rope=None, past=None):
        """-> (x, None): there is no past."""
        frames, per_frame = x.shape[1:3]
        q, k, v = V.split_heads(self.qkv(x.flatten(1, 2)), 3, self.heads)  # each [B, nh, T * M, hd]
        if rope is not None:
            q, k = V.rotate(q, *rope), V.rotate(k, *rope)
        q, k, v = (part.unflatten(2, (frames, per_frame)).transpose(1, 2).flatten(0, 1) for part in (q, k, v))
        return self.proj(V.attend(q, k, v).transpose(1, 2).flatten(2)).view_as(x), None  # attended [B T, nh, M, hd]


class HopeBlock(nn.Module):
    """Mixing within a frame, five self-modifying memories, continuum memory: x [B, T, M, dim] -> like it, and its past.

    `titan_hidden` is the hidden width of a Titan memory over dim, `drop_path` the share of clips that skip a branch.
    """

    def __init__(
        self, dim, num_heads, titan_hidden=2.0, cms_levels=PERIODS, chunk=1, threshold=0.0, drop_path=0.0, modifies=True
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mixing = FrameMixing(dim, num_heads) if modifies else FrameAttention(dim, num_heads, 0.0)
        self.titans = Titans(dim, num_heads, int(dim * titan_hidden), chunk, threshold, modifies=modifies)
        self.cms, self.drop_path = ContinuumMemory(dim, cms_levels, drop_path), drop_path

    def forward(self, x, rope=None, past=None):
        """`past` what an earlier call gave, None before the first frame -> (x, the same behind these frames)."""
        mixed, titans, cms = past or (None, None, None)
        y, mixed = self.mixing(self.norm1(x), rope, mixed)
        x = x + drop_path(y, self.drop_path, self.training)
        y, titans = self.titans(self.norm2(x), rope, titans)
        x, cms = self.cms(x + drop_path(y, self.drop_path, self.training), cms)
        return x, (mixed, titans, cms)


class HybridBlock(HopeBlock):
    """Attention over all frames so far, one Titan memory, continuum memory: x [B, T, M, dim] -> like it, and its
    past."""

    def __init__(self, dim, num_heads, titan_hidden=2.0, cms_levels=HYBRID_PERIODS, **kept):
        super().__init__(dim, num_heads, titan_hidden, cms_levels, **kept, modifies=False)


class Memories(FrameTokens):
    """Blocks of memories over the tokens of frames, `hope` or `hybrid`."""

    def __init__(self, cfg, block=None):
        super().__init__(cfg)
        block = block or (HopeBlock if cfg.predictor == "hope" else HybridBlock)
        sizes = dict(titan_hidden=cfg.titan_hidden, chunk=cfg.chunk, threshold=cfg.surprise)
        shares = np.linspace(0, cfg.drop_path, cfg.pred_depth).tolist()
        self.blocks = nn.ModuleList(block(cfg.pred_dim, cfg.num_heads, drop_path=share, **sizes) for share in shares)
        start_weights(self, cfg.residual)
        for part in self.modules():  # mixing and query would be a hundredth of the residual stream in a narrow net
            if isinstance(part, (FrameMixing, Titans)):
                for layer in part.children():
                    if isinstance(layer, nn.Linear):
                        nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        self.start_ends(cfg)


PREDICTORS = {"ac_vit": AcVit, "convlstm": ConvLSTM, "identity": Identity, "hope": Memories, "hybrid": Memories}


# -- weights

# names of V-JEPA 2-AC's predictor -> ours, where they differ
PUBLISHED = (
    ("predictor_embed.", "embed."), ("predictor_blocks.", "blocks."), ("predictor_norm.", "norm."),
    ("predictor_proj.", "out."),
)  # fmt: skip


def read_predictor(path):
    """The predictor of a published .pt of V-JEPA 2-AC, or of a checkpoint of this world -> ({published name: fp32
    tensor}, what the file is, the config that it was learned by). UsageError."""
    try:
        if not os.path.isfile(path):
            raise V.UsageError("no such file")
        if not zipfile.is_zipfile(path):
            raise V.UsageError("no .pt file, cut, or a git lfs pointer (git lfs pull)")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        ours = isinstance(state, dict) and "format" in state
        part = state.get("model" if ours else "predictor") if isinstance(state, dict) else None
        if not isinstance(part, dict):
            raise V.UsageError("holds no predictor")
        tensors = {}
        for name, value in part.items():
            name = re.sub(r"^(module\.|backbone\.|_orig_mod\.)+", "", str(name))
            if ours and not name.startswith("predictor.") and not name.endswith(("_mean", "_std")):
                continue
            name = V.renamed(name.removeprefix("predictor."), PUBLISHED, 1, 0) if ours else name
            tensors[name] = V.own_tensor(value, name, path)
        learned = state.get("cfg") if ours else None
        return tensors, "checkpoint of a run" if ours else "published .pt", learned or {}
    except V.UsageError as error:
        text = str(error)
        raise V.UsageError(f"init_from {text if path in text else f'{path}: {text}'} (--init_from)") from error
    except Exception as error:  # a foreign file makes the unpickler raise anything
        why = f"{type(error).__name__}: {V.flat(error)[:160]}"
        raise V.UsageError(f"init_from {path}: cannot be read as weights ({why}) (--init_from)") from error


def other_sizes(cfg, tensors):
    """Sizes that published weights have otherwise than a config -> text, "" where there are none."""
    shape = {name: tuple(value.shape) for name, value in tensors.items()}
    P, D = shape.get("predictor_embed.weight", (0, 0))
    hidden, _ = shape.get("predictor_blocks.0.mlp.fc1.weight", (0, 0))
    _, A = shape.get("action_encoder.weight", (0, 0))
    depth = len({name.split(".")[1] for name in tensors if name.startswith("predictor_blocks.")})
    sizes = dict(feature_dim=D, pred_dim=P, action_dim=A, pred_depth=depth, mlp_ratio=hidden / P if P else 0)
    odd = ((name, getattr(cfg, name), size) for name, size in sizes.items() if size and size != getattr(cfg, name))
    return "; ".join(f"{name} = {own}, the weights have {size:g} (--{name})" for name, own, size in odd)


# -- the world


class Hope(V.World):
    """Predict the latents of frames by actions: teacher forcing, rollouts, jumps."""

    Config = HopeConfig
    Dataset = FeatureClips
    KEYS = {
        "loss_teacher": "error of the next frame after true ones, in the form of loss_form",
        "loss_rollout": "error of the frames of a rollout, predicted from own guesses",
        "loss_jump": "error of a late frame predicted from the first alone in one pass; absent without lambda_jump",
        "still": "error of the frame before in place of the next one: identity's loss_teacher",
        "ratio": "loss_teacher / still: below 1 is better than identity",
    }
    TRAIN_KEYS = {
        "rollout_frames": "frames of a training rollout by now",
        "stage": "number of the curriculum's part, 0 the first",
        "memory_grad_norm": "hope, hybrid: gradient norm of the Titan memories, clipped apart",
    }
    VAL_KEYS = {
        "rollout_ratio": "error of a rollout from the context to the last frame / that of the last context frame",
        "action_gain": "share of a rollout's error that true actions save beside those of another clip; 0: no use",
        **{f"ratio_{h}": f"rollout_ratio of frame {h} of the rollout alone" for h in range(1, HORIZONS + 1)},
    }
    FILES = ("horizons.png",)

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.predictor, self.measured = PREDICTORS[cfg.predictor](cfg), False
        widths = {"actions": cfg.action_dim, "states": cfg.action_dim, "extrinsics": cfg.action_dim - 1}
        if not cfg.use_extrinsics:
            del widths["extrinsics"]
        for name, width in widths.items() if cfg.normalise_actions else ():
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    @staticmethod
    def draw(cfg, stream, index):
        """Where a jump leads, as a share of the frames that it may lead to."""
        return {"jump": torch.tensor(V.sample_rng(cfg.seed, stream, index, 3).random(), dtype=torch.float32)}

    # -- the verbs of a world model
    def normalise(self, features):
        """Features [..., D] -> fp32, mean 0 and deviation 1 over D where the config says so."""
        features = features.float()
        return F.layer_norm(features, features.shape[-1:], eps=1e-6) if self.cfg.normalise else features

    def scaled(self, actions, states, extrinsics=None):
        """What is told beside the frames -> list of it, normalised where the config says so."""
        parts = {"actions": actions, "states": states} | ({} if extrinsics is None else {"extrinsics": extrinsics})
        if not self.cfg.normalise_actions:
            return list(parts.values())
        return [(part - getattr(self, f"{n}_mean")) / getattr(self, f"{n}_std") for n, part in parts.items()]

    def predict(self, features, actions, states, extrinsics=None):
        """Frames [B, T, N, D], actions and states [B, T, A] -> [B, T, N, D], slot t = frame t + 1, normalised."""
        return self.normalise(self.predictor(self.normalise(features), *self.scaled(actions, states, extrinsics)))

    def jump(self, features, actions, states, extrinsics=None, times=None):
        """From frame 0, action and state 0 in one pass to frame times + 1, times [B] int64 -> [B, N, D]."""
        beside = pick(self.scaled(actions, states, extrinsics), 0, 1)
        return self.normalise(self.predictor(self.normalise(features[:, :1]), *beside, times=times))[:, 0]

    def rollout(self, features, actions, states, extrinsics=None, context=1, steps=None):
        """From the first `context` frames on own guesses, each with the action of its time -> [B, steps, N, D], by
        default as far as actions reach. What features hold behind the context is not looked at, nor, unless they are
        known_states, are states and extrinsics: a ball's speed tells what became of it. There states are 0, with
        normalise_actions their mean, and extrinsics stay."""
        steps = actions.shape[1] - context + 1 if steps is None else steps
        if not 1 <= context <= features.shape[1] or not 1 <= steps <= actions.shape[1] - context + 1:
            had = f"{features.shape[1]} frames and {actions.shape[1]} actions"
            raise ValueError(f"a rollout of {steps} frames from {context} needs more than {had}")
        seen, guesses, past, first = self.normalise(features[:, :context]), [], None, 0
        beside = self.scaled(actions, states, extrinsics)
        if not self.cfg.known_states:
            _, states, *poses = beside
            beside[1] = torch.cat([states[:, :context], torch.zeros_like(states[:, context:])], 1)
            for pose in poses:
                held = pose[:, context - 1 : context].expand_as(pose[:, context:])
                beside[2] = torch.cat([pose[:, :context], held], 1)
        for end in range(context, context + steps):
            if hasattr(self.predictor, "advance"):
                preds, past = self.predictor.advance(seen, *pick(beside, first, end), past=past)
            else:
                preds = self.predictor(seen, *pick(beside, 0, end))
            guesses.append(self.normalise(preds[:, -1:]))
            first, seen = end, guesses[-1] if past else torch.cat([seen, guesses[-1]], 1)
        return torch.cat(guesses, 1)

    def frame_error(self, preds, targets):
        """Frames [B, T, N, D], both normalised -> the configured error of each, [B, T]."""
        form = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}[self.cfg.loss_form]
        return form(preds.float(), targets.float(), reduction="none").mean((2, 3))

    # -- a step
    def forward(self, batch):
        cfg, step = self.cfg, batch["step"]
        _, stage = cfg.stage_at(0 if step.is_meta else int(step), self.num_files, self.world_size)
        beside = [batch[name] for name in ("actions", "states", "extrinsics") if name in batch]
        z = self.normalise(batch["features"])  # [B, T + 1, N, D]
        weights = dict(teacher=stage.teacher, rollout=stage.lambda_rollout, jump=stage.lambda_jump)
        losses, gauges = {}, {"still": self.frame_error(z[:, :-1], z[:, 1:]).mean()}
        if stage.teacher or not self.training:
            losses["loss_teacher"] = self.frame_error(self.predict(z[:, :-1], *beside), z[:, 1:]).mean()
        C, T = cfg.context_frames, cfg.num_timesteps
        if self.training and stage.lambda_rollout:
            guesses = self.rollout(z, *beside, context=C, steps=stage.rollout)
            losses["loss_rollout"] = self.frame_error(guesses, z[:, C : C + stage.rollout]).mean()
        if stage.lambda_jump:
            times = T - 1 - (batch["jump"] * stage.jump).long()  # [B]
            guess, rows = self.jump(z, *beside, times=times), torch.arange(len(z), device=z.device)
            losses["loss_jump"] = self.frame_error(guess[:, None], z[rows, times + 1][:, None]).mean()
        if not self.training:
            losses["loss_rollout"], seen = self.seen_ahead(z, beside, stage.rollout)
            gauges |= seen
        total = sum(weights[name[5:]] * loss for name, loss in losses.items() if weights[name[5:]])
        return {"loss_total": total, **losses}, gauges, {}

    def seen_ahead(self, z, beside, steps):
        """Evaluation: (error of the first `steps` frames of a whole rollout, gauges of each of its frames)."""
        C = self.cfg.context_frames
        errors = self.frame_error(self.rollout(z, *beside, context=C), z[:, C:]).mean(0)  # [T - C + 1]
        still = self.frame_error(z[:, C - 1 : C].expand_as(z[:, C:]), z[:, C:]).mean(0)
        actions, *others = beside
        swapped = actions.roll(1, 0) if len(actions) > 1 else actions.flip(1)
        blind = self.frame_error(self.rollout(z, swapped, *others, context=C), z[:, C:]).mean()
        gauges = {"rolled": errors.mean(), "stood": still.mean(), "blind": blind}
        for h in range(min(len(errors), HORIZONS)):
            gauges |= {f"rolled_{h + 1}": errors[h], f"stood_{h + 1}": still[h]}
        return errors[:steps].mean(), gauges

    def after_step(self, carries, step):
        """-> a line for the log where the next step begins a part of the curriculum."""
        (old, _), (new, stage) = (self.cfg.stage_at(at, self.num_files, self.world_size) for at in (step, step + 1))
        return [f"curriculum: {stage}"] if new != old else []

    # -- schedule
    def lr(self, step, peak):
        """A cosine; or flat between a rise and a fall of EDGE of the steps each."""
        cfg = self.cfg
        if cfg.schedule == "cosine":
            return super().lr(step, peak)
        edge = max(1, round(EDGE * cfg.steps))
        share = min(START + (1 - START) * step / edge, 1.0, (cfg.steps - step) / edge)
        return peak * max(share, cfg.lr_floor)

    def groups(self):
        """As V.World's, the Titan memories apart, with their own learning rate and no decay: where a clip begins."""
        groups, memory = super().groups(), [p for name, p in self.trained().items() if MEMORY_PART in name]
        if not memory:
            return groups
        inside = set(map(id, memory))
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in inside]
        return [*groups, V.param_group(self.cfg, "memory", memory, self.cfg.memory_lr * self.cfg.lr)]

    def optimizer(self):
        """AdamW (0.9, 0.999), as the original's."""
        optimizer = super().optimizer()
        for group in optimizer.param_groups:
            group["betas"] = (0.9, 0.999)
        return optimizer

    def compile(self, **options):
        """Block by block, --compile_whole too: a rollout would be unrolled into one graph for minutes, and its blocks
        see more each time."""
        for block in getattr(self.predictor, "blocks", [self.predictor]):
            block.compile(**{**options, "dynamic": None})

    # -- figures
    def figures(self, looks, means):
        pairs = [("ratio", "loss_teacher", "still"), ("rollout_ratio", "rolled", "stood")]
        pairs += [(f"ratio_{h}", f"rolled_{h}", f"stood_{h}") for h in range(1, HORIZONS + 1)]
        values = {name: means[a] / means[b] if means[b] else math.nan for name, a, b in pairs if a in means}
        if means.get("blind"):
            values["action_gain"] = 1 - means["rolled"] / means["blind"]
        return values

    def state(self, step):
        number, stage = self.cfg.stage_at(step, self.num_files, self.world_size)
        return {"rollout_frames": stage.rollout, "stage": number}

    def verdict(self, values):
        ratios = horizon_ratios(values)
        above = [h for h, ratio in ratios.items() if not ratio < 1]
        last, gain = max(ratios), values.get("val_action_gain", math.nan)
        told = (
            "better than identity at every horizon"
            if not above
            else f"no better at {V.name_some([str(h) for h in above])}"
        )
        gain = f"true actions save {gain:.0%} of the error" if gain > 0 else "true actions save nothing"
        return f"error / identity's {ratios[1]:.3f} at 1 frame, {ratios[last]:.3f} at {last} ({told}); {gain}"

    def report(self, run, values, seconds):
        """horizons.png: error of each frame of a rollout, beside identity's."""
        path = Path(run.cfg.out_dir) / "horizons.png"
        try:
            V.save_picture(curve(horizon_ratios(values), f"{self.cfg.predictor}: error / identity's"), path)
        except OSError as error:  # a full disk
            run.log.line(f"WARNING: {path} could not be written ({V.reason_of(error)})")
        else:
            run.log.line(f"picture: {path}")

    # -- start-up lines
    def take_weights(self, say):
        """The predictor begins with the weights of init_from. UsageError where they do not fit."""
        cfg = self.cfg
        if not cfg.init_from:
            return
        tensors, what, learned = read_predictor(cfg.init_from)
        measured = {name: tensors.pop(name) for name in [*tensors] if name.endswith(("_mean", "_std"))}
        odd = other_sizes(cfg, tensors)
        for name in ("residual", "normalise_actions"):
            if (asked := getattr(cfg, name)) != learned.get(name, False):
                told = f"{'without' if asked else 'with'} {name} (--{'no-' * asked}{name})"
                odd = odd or f"its weights were learned {told}"
        odd = odd or V.fill(self.predictor, tensors, PUBLISHED)
        if odd:
            raise V.UsageError(f"init_from {cfg.init_from}: does not fit: {odd}")
        heads = f", taken to have {cfg.num_heads} heads, which a .pt does not say" * (what == "published .pt")
        for name, value in measured.items():  # what the weights know, whatever the new clips hold
            getattr(self, name).copy_(value)
        self.measured = bool(measured)
        say(f"weights: predictor of {cfg.init_from} ({what}), {len(tensors)} tensors{heads}")

    def take_data(self, run):
        """Statistics of actions, states and extrinsics in the training clips, those of rank 0 for all; those of
        init_from stay. UsageError where no clip can be read."""
        if not self.cfg.normalise_actions or self.measured:
            return
        process, work = run.process, (tuple,)
        if process.is_main:
            work = run.source.dataset(self.cfg, "train").statistics, process.stop.asked
        found, count = process.collect(process.together(*work))[0]
        if not found:
            raise V.UsageError(f"data_root {self.cfg.data_root}: no training clip's actions can be read")
        for name, (mean, std) in found.items():
            getattr(self, f"{name}_mean").copy_(mean), getattr(self, f"{name}_std").copy_(std)
            pairs = ", ".join(f"{m:.3g} +- {s:.3g}" for m, s in zip(mean.tolist()[:8], std.tolist()))
            run.log.line(f"{name}: {pairs}{', ...' * (len(mean) > 8)} in {count} training clips, normalised by that")

    def describe(self):
        cfg = self.cfg
        count = sum(p.numel() for p in self.predictor.parameters())
        learning = sum(p.numel() for p in self.trained().values())
        extras = " + extrinsics" * cfg.use_extrinsics
        return [
            f"parameters: {count:,} ({cfg.predictor}), of which {learning:,} learn",
            f"clip: {cfg.num_timesteps} + 1 frames of {cfg.grid_high} x {cfg.grid_wide} patches, {cfg.feature_dim} "
            f"numbers each{', normalised' * cfg.normalise}; action + state{extras} of {cfg.action_dim} numbers",
            *(f"curriculum: {stage}" for stage in cfg.stages()),
        ]

    def flops(self):
        """ac_vit and convlstm, whose work is that of their weights and of attention; {} for others."""
        cfg, net = self.cfg, self.predictor
        _, stage = cfg.stage_at(0)
        passes = {"teacher": cfg.num_timesteps, "rollout": cfg.context_frames + stage.rollout - 1}
        rows = {"ac_vit": cfg.tokens, "convlstm": cfg.patches}.get(cfg.predictor)
        if rows is None:
            return {}
        weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
        pairs = 4 * cfg.pred_dim * cfg.pred_depth * rows**2 * (cfg.predictor == "ac_vit")  # of one frame with another
        return {name: 3.0 * (2 * weights * rows * T + pairs * T * (T + 1) // 2) for name, T in passes.items()}

    @staticmethod
    def typical_part(cfg, device):
        """A block over a clip's tokens; of convlstm its gates."""
        if cfg.predictor == "convlstm":
            channels = 2 * cfg.pred_dim
            return nn.Conv2d(channels, channels, 3, padding=1), torch.randn(4, channels, cfg.grid_high, cfg.grid_wide)
        heads = cfg.num_heads if cfg.pred_dim % cfg.num_heads == 0 else 1
        tokens = min(cfg.tokens * cfg.num_timesteps, 1024)
        return V.Block(cfg.pred_dim, heads, cfg.mlp_ratio, 0.0), torch.randn(4, tokens, cfg.pred_dim)


def pick(parts, first, end):
    """Rows first to end of tensors [B, T, ...] -> list."""
    return [part[:, first:end] for part in parts]


def horizon_ratios(values):
    """Figures of an evaluation -> {frame of the rollout: its error / identity's}."""
    return {h: values[f"val_ratio_{h}"] for h in range(1, HORIZONS + 1) if f"val_ratio_{h}" in values}


def curve(ratios, title, width=480, height=280):
    """{frame: error / identity's} -> an image of the curve, with identity as a line at 1."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "white")
    draw, font, left, low = ImageDraw.Draw(image), ImageFont.load_default(12), 48, height - 48
    known = {h: ratio for h, ratio in ratios.items() if math.isfinite(ratio)}
    top = max(1.2, *known.values(), 0) if known else 1.2
    x = {h: left + (h - 0.5) * (width - left - 12) / len(ratios) for h in ratios}
    draw.text((left, 6), title, fill="black", font=font)
    for level in (0.0, 0.5, 1.0):
        y = low - level / top * (low - 30)
        draw.line((left, y, width - 12, y), fill="red" if level == 1 else "lightgray")
        draw.text((8, y - 7), f"{level:.1f}", fill="black", font=font)
    points = [(x[h], low - min(ratio, top) / top * (low - 30)) for h, ratio in known.items()]
    if len(points) > 1:
        draw.line(points, fill="navy", width=2)
    for (column, row), ratio in zip(points, known.values()):
        draw.ellipse((column - 3, row - 3, column + 3, row + 3), fill="navy")
        draw.text((column - 12, row - 18), f"{ratio:.2f}", fill="navy", font=font)
    for h, column in x.items():
        draw.text((column - 3, low + 6), str(h), fill="black", font=font)
    draw.text(
        (left, height - 18), "frame of the rollout; red: a copy of the last context frame", fill="black", font=font
    )
    return image


if __name__ == "__main__":
    sys.exit(V.main(world=Hope))
