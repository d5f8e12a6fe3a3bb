"""VJepa_AUTO_V2: a folder of driving videos -> a world model at three time scales, and a sampler of possible futures.

One encoder reads a clip as Conv3D tubelet tokens and learns by predicting the latents of its own slow copy:

    clip [B,T,3,H,W] -> tubelet tokens [B,L,D] -> online encoder (visible tokens only) -> context [B,K,D]
            |                                              |
            |          NOW         context + mask tokens  -> predictor    -> masked latents       L1
            |          SOON        NOW context            -> predictor    -> near-future latents  L1
            |          EVENTUALLY  NOW context            -> outcome head -> one embedding        InfoNCE
            |          FLOW        NOW context + noise    -> flow net     -> one sampled future   flow matching
            v                                              |
       target encoder (EMA of online, whole clip, no grad) -> targets [B,L,D], LayerNorm without affine

Run it (every config field below is a flag of the same name):

    python VJepa_AUTO_V2.py                                  built-in driving scenes, needs no data
    python VJepa_AUTO_V2.py --preset tiny --device cpu       minutes on a laptop
    python VJepa_AUTO_V2.py --data_root DIR --steps 10000 --device cuda --amp --compile
    torchrun --nproc_per_node=8 VJepa_AUTO_V2.py --data_root DIR --steps 100000 --device cuda --amp

Axis letters, the same in the whole file:

    B clips per rank   C channels   T frames   H W pixels                    clip    [B, T, C, H, W]
    t h w token grid   L = t*h*w tokens   K kept   M masked                  tokens  [B, L, D]
    D encoder width    P predictor width   nh heads   S sampled futures   F future tokens
    R draws per clip   N noised flow tokens of k dimensions each

Names: `frames` are the decoder's uint8 pictures, `clip` is normalised video, `context` is the online encoder's output on
kept tokens, `targets` the target encoder's output, `preds` the predictor's. tau is flow time: 0 is noise, 1 is data.

Sources: V-JEPA (arXiv 2404.08471), V-JEPA 2 (2506.09985), InfoNCE (1807.03748), SupCon (2004.11362), flow matching
(2210.02747), clean-data prediction under a velocity loss (JiT, 2511.13720), time shift by dimension (RAE, 2510.11690),
RankMe (2210.02885), incremental PCA (Ross et al. 2008), AdaLN-zero (DiT, 2212.09748).
"""

import argparse
import copy
import csv
import difflib
import errno
import fcntl
import fnmatch
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
import typing
import weakref
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from functools import lru_cache, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as checkpoint_activations

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75


class UserError(Exception):
    """A cause the user can remove. `report_errors` prints it as one last line and returns `exit_code`."""

    exit_code = EXIT_ERROR


class UsageError(UserError):
    """Bad flags, config or paths."""

    exit_code = EXIT_USAGE


class Stopped(Exception):
    """A signal ended a wait or a long piece of work before its result was there. Whoever has something to save saves it first."""


# ---------------------------------------------------------------------------------------------------------------------
# 1  Config: every number that shapes a run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class VJepaAutoV2Config:
    """Edit a default here to change it for every run; pass `--field value` to change one run. Units stand in the comments."""

    # -- run
    preset: str = "base"  # tiny | proof | small | base | large: a named set of overrides (base = these defaults)
    data_root: str = ""  # folder of videos, one video, or a list file (csv, txt, jsonl); empty = built-in driving scenes
    video_glob: str = "*"  # which files count, matched on the name or on the path below data_root
    out_dir: str = "runs/vjepa_auto_v2"  # everything the run writes
    resume: str = "auto"  # auto (newest checkpoint in out_dir) | never | a checkpoint file
    steps: int = 20000  # optimizer steps of the whole run; all schedules end here
    device: str = "auto"  # auto | cuda | mps | cpu
    amp: bool = False  # bf16 autocast (fp16 with a loss scaler on CUDA cards without bf16)
    compile: bool = False  # torch.compile of the model's forward
    grad_checkpoint: bool = False  # recompute block activations in backward: less memory, about 26 % more compute
    seed: int = 1337  # every sample, mask and noise draw is a pure function of (seed, sample number)
    # -- data
    clip_fps: float = 4.0  # frames per second taken from a video; 0 spreads the frames over the whole file
    decoder: str = "auto"  # auto (pyav, then decord) | pyav | decord | torchcodec
    missing_data: str = "scenes"  # when data_root holds no video: scenes | error | random
    val_fraction: float = 0.1  # share of the files held out, by hash of the name
    max_bad_fraction: float = 0.5  # stop when more than this share of the files cannot be decoded
    decode_timeout_s: float = 60.0  # a file that a clip takes longer from twice is left out (with num_workers > 0); data that are away are waited for so long
    crop_scale_min: float = 0.6  # smallest crop, share of the largest box that fits the frame
    crop_scale_max: float = 1.0  # largest crop, same unit
    crop_ratio_min: float = 0.85  # stretch of the crop's aspect ratio
    crop_ratio_max: float = 1.18  # stretch of the crop's aspect ratio
    hflip: bool = False  # mirror clips at random; steering and left/right labels are mirrored with them
    num_workers: int = 4  # loader processes per rank
    scene_clips: int = 512  # built-in scenes written as mp4 when there is no data_root
    scene_size: int = 0  # side of the written scenes in pixels; 0 = image_size
    scene_mix: str = "default"  # kinds of built-in scenes: default | fork_only | shares like fork=3,brake=1
    scenes: str = "files"  # files (scene_clips mp4s, read back like any video) | render (a new scene for every sample)
    # -- clip and grid
    image_size: int | tuple = 224  # pixels, one number or H,W
    num_frames: int = 84  # frames per clip = now + soon + eventually
    channels: int = 3  # RGB
    now_frames: int = 4  # what is seen
    soon_frames: int = 16  # near future
    eventually_frames: int = 64  # far future
    tubelet_t: int = 2  # frames per token
    patch: int = 16  # pixels per token side
    # -- networks
    enc_dim: int = 768  # encoder width D
    enc_depth: int = 12  # encoder blocks
    pred_dim: int = 384  # predictor width P
    pred_depth: int = 12  # predictor blocks
    num_heads: int = 12  # attention heads of encoder, predictor and outcome head
    mlp_ratio: float = 4.0  # hidden width of an MLP over its width
    dropout: float = 0.0  # after attention and MLP
    pos_embed: str = "sincos"  # sincos (added once) | rope (rotary, inside attention, V-JEPA 2 form)
    # -- objective
    short_num_blocks: int = 8  # blocks of a short-range mask
    short_scale: float = 0.15  # area of one block, share of the h x w grid
    long_num_blocks: int = 2  # blocks of a long-range mask
    long_scale: float = 0.70  # area of one block, share of the h x w grid
    aspect_min: float = 0.75  # block height over width, smallest
    aspect_max: float = 1.50  # block height over width, largest
    short_visible: float = 0.0  # visible share of sites under a short mask; 0 = mean of the block sampler
    long_visible: float = 0.0  # visible share of sites under a long mask; 0 = mean of the block sampler
    mask_draws: int = 1  # mask draws per family and clip for one target pass
    lambda_vjepa: float = 1.0  # weight of NOW
    lambda_soon: float = 1.0  # weight of SOON
    lambda_eventually: float = 0.25  # weight of EVENTUALLY
    lambda_flow: float = 1.0  # weight of FLOW; its gradient stays in the flow net while flow_context_grad is 0
    lambda_supcon: float = 0.0  # weight of the supervised contrast on annotated maneuvers; 0 = off
    supcon_temperature: float = 0.1  # temperature of the supervised contrast
    outcome_queries: int = 8  # learned queries of the outcome head
    outcome_temperature: float = 0.2  # temperature of InfoNCE
    outcome_queue: int = 1024  # past target embeddings kept as negatives; 0 = in-batch negatives only
    outcome_target: str = "mean"  # mean of the EVENTUALLY targets | delta (minus the mean NOW target)
    # -- flow
    flow_dim: int = 512  # width of the flow net
    flow_depth: int = 4  # blocks of the flow net
    flow_heads: int = 8  # heads of the flow net
    flow_rank: int = 64  # principal directions k that are noised, per noised token
    flow_chunks: int = 4  # EVENTUALLY chunk tokens drawn jointly with SOON
    flow_joint_max: int = 65536  # SOON + chunk numbers up to which the directions span all tokens jointly
    flow_pool: int = 4  # side of the pooled SOON grid above flow_joint_max
    flow_draws: int = 8  # (tau, noise) draws per clip and step
    flow_shift: float = 0.0  # time shift a; 0 = from the number of noised dimensions
    flow_steps: int = 20  # Euler steps when sampling
    flow_rest: str = "mean"  # residual outside the directions: mean (left out) | gaussian
    flow_context_grad: float = 0.0  # share of the flow gradient that reaches the encoder
    flow_lr: float = 5e-4  # learning rate of the flow net, same schedule
    flow_ema: float = 0.999  # highest momentum of the flow net's own EMA
    flow_fit_clips: int = 0  # clips whose frozen latents the flow net is fitted on after the last step; 0 = no flow phase, it learns along
    flow_fit_steps: int = 2000  # optimizer steps of that flow phase
    flow_fit_batch: int = 128  # clips per step of the flow phase and process, flow_draws draws each
    flow_fit_lr: float = 1e-3  # peak learning rate of the flow phase, SOON included
    soon_fit_steps: int = 0  # steps before those in which a copy of the predictor learns SOON alone on the same latents; 0 = no copy
    soon_fit_batch: int = 32  # clips per step of that and process
    # -- optimisation
    batch_size: int = 8  # clips per process and micro-step
    grad_accum: int = 1  # micro-steps per optimizer step
    lr: float = 1e-4  # peak learning rate
    min_lr: float = 1e-6  # learning rate at the last step
    weight_decay: float = 0.05  # AdamW, on matrices only
    warmup_steps: int = 2000  # linear warm-up, capped at a tenth of steps
    grad_clip: float = 1.0  # largest gradient norm, world model and flow net apart; 0 = off
    ema_momentum: float = 0.996  # target encoder momentum
    ema_momentum_end: float = 0.0  # momentum at the last step, linear in between; 0 = constant
    max_skipped_steps: int = 20  # consecutive non-finite steps before the run stops
    # -- log, checkpoints, evaluation
    log_every: int = 50  # steps between log lines
    ckpt_every: int = 1000  # steps between checkpoints
    keep_last: int = 3  # checkpoints kept beside the final one
    val_every: int = 1000  # steps between evaluations; 0 = only at the end
    val_clips: int = 64  # clips of an evaluation, rounded up to full batches
    track: str = ""  # tensorboard, wandb or both, separated by a comma
    picture: bool = True  # write futures.png at the end
    dist_timeout_s: float = 600.0  # seconds before a stuck collective ends the run

    @property
    def height(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def grid(self) -> tuple:
        """(t, h, w) of the token grid."""
        return self.num_frames // self.tubelet_t, self.height // self.patch, self.width // self.patch

    @property
    def sites(self) -> int:
        """Tokens of one tubelet, h * w."""
        return self.grid[1] * self.grid[2]

    @property
    def num_tokens(self) -> int:
        """L = t * h * w."""
        return self.grid[0] * self.sites

    @property
    def now_tokens(self) -> int:
        return self.now_frames // self.tubelet_t * self.sites

    @property
    def soon_tokens(self) -> int:
        return self.soon_frames // self.tubelet_t * self.sites

    @property
    def eventually_tubelets(self) -> int:
        return self.eventually_frames // self.tubelet_t

    @property
    def flow_joint(self) -> bool:
        """Whether the noised directions span all future tokens jointly (small grids) or single pooled tokens."""
        return (self.soon_tokens + self.flow_chunks) * self.enc_dim <= self.flow_joint_max

    @property
    def flow_tokens(self) -> int:
        """N, the number of noised flow tokens."""
        pooled = self.soon_frames // self.tubelet_t * self.flow_pool**2 + self.flow_chunks
        return 1 if self.flow_joint else pooled

    @property
    def tau_shift(self) -> float:
        """Time shift a by the number of noised dimensions (RAE's square-root law, capped at 12)."""
        dims = self.flow_tokens * self.flow_rank
        return self.flow_shift or (1.0 if dims <= 1000 else min(12.0, math.sqrt(dims / 1000)))

    @property
    def warmup(self) -> int:
        return min(self.warmup_steps, self.steps // 10)


PRESETS = {
    "tiny": dict(
        image_size=48, patch=8, num_frames=20, now_frames=4, soon_frames=8, eventually_frames=8, enc_dim=96, enc_depth=4,
        pred_dim=96, pred_depth=3, num_heads=2, batch_size=8, steps=500, lr=1.5e-3, warmup_steps=50, ema_momentum=0.992,
        ema_momentum_end=0.998, lambda_soon=2.0, flow_dim=256, flow_depth=3, flow_heads=4, flow_chunks=2, flow_draws=16, flow_lr=2e-3,
        num_workers=2, log_every=25, ckpt_every=125, val_every=125, outcome_queue=256, scene_clips=768, scene_size=96,
        crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0, amp=True,
    ),
    "small": dict(
        image_size=128, num_frames=36, now_frames=4, soon_frames=16, eventually_frames=16, enc_dim=384, enc_depth=12,
        pred_dim=192, pred_depth=6, num_heads=6, batch_size=32, lr=3e-4, ema_momentum=0.998, ema_momentum_end=0.9998,
        flow_dim=384, flow_heads=6, amp=True,
    ),
    "proof": dict(
        image_size=48, patch=8, num_frames=20, now_frames=4, soon_frames=8, eventually_frames=8, enc_dim=96, enc_depth=4,
        pred_dim=96, pred_depth=3, num_heads=2, batch_size=8, steps=5000, lr=1.5e-3, warmup_steps=50, ema_momentum=0.992,
        ema_momentum_end=0.998, lambda_soon=2.0, scenes="render", flow_dim=512, flow_depth=3, flow_heads=8, flow_rank=1024, flow_chunks=2, flow_draws=4,
        flow_shift=3.0, flow_fit_clips=100000, flow_fit_steps=4000, soon_fit_steps=3000, num_workers=2, log_every=50, ckpt_every=500, val_every=500,
        outcome_queue=256, crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0, amp=True,
    ),
    "base": {},
    "large": dict(enc_dim=1024, enc_depth=24, num_heads=16, flow_dim=1024, flow_heads=16, batch_size=4, grad_checkpoint=True, amp=True),
}


def preset_config(preset, **overrides):
    """The config of a named preset with some fields replaced, for use from Python."""
    return VJepaAutoV2Config(**{**PRESETS[preset], "preset": preset, **overrides})


SCENE_KINDS = ("fork", "brake", "lane", "occluder", "steady")
SCENE_MIXES = {"default": "fork=3,brake=2,lane=2,occluder=1,steady=2", "fork_only": "fork=1"}


def mix_shares(scene_mix):
    """A value of scene_mix -> share of every kind in SCENE_KINDS, summing to 1. ValueError when it cannot be read."""
    shares = dict.fromkeys(SCENE_KINDS, 0.0)
    for part in SCENE_MIXES.get(scene_mix, scene_mix).split(","):
        kind, _, weight = part.partition("=")
        if kind.strip() not in shares:
            raise ValueError(f"{kind.strip()!r} is not one of {', '.join((*SCENE_MIXES, *SCENE_KINDS))}")
        shares[kind.strip()] = float(weight)
    total = sum(shares.values())
    if not (0 < total < math.inf) or min(shares.values()) < 0:
        raise ValueError("shares must be zero or above, one of them above")
    return [share / total for share in shares.values()]


# Control characters, line separators, and the surrogates that stand for bytes of a file name that is not UTF-8.
UNPRINTABLE = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
# field -> (smallest, largest) value allowed; None leaves a side open
RANGES = {
    "steps": (1, 10**9), "seed": (0, 2**31 - 1), "clip_fps": (0, 1000), "val_fraction": (0, 0.9), "max_bad_fraction": (0, 0.99),
    "decode_timeout_s": (0.1, 10**6), "crop_scale_min": (0.01, 1), "crop_scale_max": (0.01, 1), "crop_ratio_min": (0.1, 10), "crop_ratio_max": (0.1, 10),
    "num_workers": (0, 512), "scene_clips": (4, 10**7), "scene_size": (0, 4096), "num_frames": (3, 100000),
    "channels": (3, 3), "now_frames": (1, None), "soon_frames": (1, None), "eventually_frames": (1, None),
    "tubelet_t": (1, None), "patch": (1, None), "enc_dim": (6, 65536), "enc_depth": (1, 1000), "pred_dim": (6, 65536),
    "pred_depth": (1, 1000), "num_heads": (1, None), "mlp_ratio": (0.1, 64), "dropout": (0, 0.9),
    "short_num_blocks": (1, 1000), "short_scale": (0.001, 1), "long_num_blocks": (1, 1000), "long_scale": (0.001, 1),
    "aspect_min": (0.05, 20), "aspect_max": (0.05, 20), "short_visible": (0, 0.99), "long_visible": (0, 0.99),
    "mask_draws": (1, 64), "lambda_vjepa": (0, None), "lambda_soon": (0, None), "lambda_eventually": (0, None),
    "lambda_flow": (0, None), "lambda_supcon": (0, None), "supcon_temperature": (1e-4, None), "outcome_queries": (1, 65536),
    "outcome_temperature": (1e-4, None), "outcome_queue": (0, 10**7), "flow_dim": (2, 65536), "flow_depth": (1, 1000),
    "flow_heads": (1, None), "flow_rank": (1, None), "flow_chunks": (1, None), "flow_joint_max": (0, None),
    "flow_pool": (1, None), "flow_draws": (1, 4096), "flow_shift": (0, 1000), "flow_steps": (1, 10000),
    "flow_context_grad": (0, 1), "flow_lr": (0, None), "flow_ema": (0, 1), "flow_fit_clips": (0, 10**9), "soon_fit_steps": (0, 10**9), "soon_fit_batch": (1, 65536),
    "flow_fit_steps": (1, 10**9), "flow_fit_batch": (1, 65536), "flow_fit_lr": (0, None), "batch_size": (1, 65536), "grad_accum": (1, 65536),
    "lr": (0, None), "min_lr": (0, None), "weight_decay": (0, None), "warmup_steps": (0, None), "grad_clip": (0, None),
    "ema_momentum": (0, 1), "ema_momentum_end": (0, 1), "max_skipped_steps": (1, None), "log_every": (1, None),
    "ckpt_every": (1, None), "keep_last": (1, None), "val_every": (0, None), "val_clips": (2, 10**7), "dist_timeout_s": (1, 10**6),
}
CHOICES = {
    "preset": tuple(PRESETS), "device": ("auto", "cuda", "mps", "cpu"), "decoder": ("auto", "pyav", "decord", "torchcodec"),
    "missing_data": ("scenes", "error", "random"), "pos_embed": ("sincos", "rope"), "outcome_target": ("mean", "delta"),
    "flow_rest": ("mean", "gaussian"), "scenes": ("files", "render"),
}


def one_line(text, limit=300):
    """Any text -> one printable line: what would break a message, a log or a terminal stands as \\x1b, a long rest as ..."""
    text = re.sub(UNPRINTABLE, lambda match: repr(match[0])[1:-1], str(text)[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def fits(kind, value):
    """Whether a value has a field's type: a whole number will do for float, a pair of them for image_size."""
    if kind is float:
        return isinstance(value, float) or fits(int, value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind in (str, bool):
        return isinstance(value, kind)
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return all(fits(int, side) for side in sides)


def shown(value):
    """A value of any type for a message. Lists of anything but plain values are counted, not printed: they may be deep."""
    if isinstance(value, int) and not fits(int, value) and not isinstance(value, bool):
        return f"too large a number ({value.bit_length()} bits)"
    if isinstance(value, dict) or isinstance(value, (list, tuple)) and not all(fits(float, part) or isinstance(part, str) for part in value):
        return f"a {type(value).__name__} of {len(value)}"
    return one_line(repr(value), 100)


def type_problems(cfg):
    """Fields of another type than their own, and texts that no log line or path should hold -> list of messages."""
    problems = []
    for field in fields(cfg):
        value, wanted = getattr(cfg, field.name), getattr(field.type, "__name__", "a number or a pair of numbers")
        if not fits(field.type, value):
            problems.append(f"{field.name} = {shown(value)}: must be {wanted} (--{field.name})")
        elif isinstance(value, str) and re.search(UNPRINTABLE, value):
            problems.append(f"{field.name} = {shown(value)}: must hold no control characters, and only UTF-8 (--{field.name})")
    return problems


def value_problems(cfg):
    """Fields whose value lies outside its own range or choices -> list of messages. Assumes that every value has its type."""
    problems = []
    for name, (low, high) in RANGES.items():
        value = getattr(cfg, name)
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            span = f"{'-inf' if low is None else low} to {'inf' if high is None else high}"
            problems.append(f"{name} = {value}: must lie in {span} (--{name})")
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            problems.append(f"{name} = {shown(getattr(cfg, name))}: must be one of {', '.join(allowed)} (--{name})")
    if not 1 <= min(cfg.height, cfg.width) <= max(cfg.height, cfg.width) <= 8192:
        problems.append(f"image_size = {cfg.image_size}: must lie in 1 to 8192 (--image_size)")
    try:
        mix_shares(cfg.scene_mix)
    except ValueError as error:
        problems.append(f"scene_mix = {shown(cfg.scene_mix)}: {one_line(error)} (--scene_mix)")
    unknown = sorted({t for t in cfg.track.split(",") if t} - {"tensorboard", "wandb"})
    if unknown:
        problems.append(f"track = {shown(cfg.track)}: {one_line(', '.join(unknown))} is not one of tensorboard, wandb (--track)")
    return problems


def relation_problems(cfg):
    """Rules between fields that the code relies on -> list of messages. Assumes that every value is in its own range."""
    problems = []
    parts = cfg.now_frames + cfg.soon_frames + cfg.eventually_frames
    if cfg.num_frames != parts:
        problems.append(f"num_frames = {cfg.num_frames}: must equal now + soon + eventually frames = {parts} (--num_frames)")
    for name in ("now_frames", "soon_frames", "eventually_frames"):
        if getattr(cfg, name) % cfg.tubelet_t:
            problems.append(f"{name} = {getattr(cfg, name)}: must be divisible by tubelet_t = {cfg.tubelet_t} (--{name})")
    for side in dict.fromkeys((cfg.height, cfg.width)):
        if side % cfg.patch:
            problems.append(f"image_size = {cfg.image_size}: {side} must be divisible by patch = {cfg.patch} (--image_size)")
    for name, heads in (("enc_dim", "num_heads"), ("pred_dim", "num_heads"), ("flow_dim", "flow_heads")):
        width, count = getattr(cfg, name), getattr(cfg, heads)
        if width % count:
            problems.append(f"{name} = {width}: must be divisible by {heads} = {count} (--{name})")
        elif name != "flow_dim" and cfg.pos_embed == "rope" and (width // count < 6 or width // count % 2):
            problems.append(f"{name} = {width}: rope needs an even number of channels per head, at least 6, not {width // count} (--{name})")
        if width % 2:
            problems.append(f"{name} = {width}: must be even, the position code pairs sine and cosine (--{name})")
    for low, high in (("crop_scale_min", "crop_scale_max"), ("crop_ratio_min", "crop_ratio_max"), ("aspect_min", "aspect_max")):
        if getattr(cfg, low) > getattr(cfg, high):
            problems.append(f"{low} = {getattr(cfg, low)}: must not exceed {high} = {getattr(cfg, high)} (--{low})")
    if not problems and cfg.sites < 2:
        problems.append(f"image_size = {cfg.image_size}: needs at least 2 patches of {cfg.patch} to mask one (--image_size)")
    if not problems and cfg.flow_chunks > cfg.eventually_tubelets:
        problems.append(f"flow_chunks = {cfg.flow_chunks}: only {cfg.eventually_tubelets} EVENTUALLY tubelets to chunk (--flow_chunks)")
    if not cfg.flow_joint and not problems and cfg.flow_pool > min(cfg.grid[1:]):
        problems.append(f"flow_pool = {cfg.flow_pool}: exceeds the {cfg.grid[1]} x {cfg.grid[2]} token grid (--flow_pool)")
    if not cfg.flow_joint and cfg.flow_rank > cfg.enc_dim:
        problems.append(f"flow_rank = {cfg.flow_rank}: exceeds enc_dim = {cfg.enc_dim} (--flow_rank)")
    if cfg.soon_fit_steps and not cfg.flow_fit_clips:
        problems.append(f"soon_fit_steps = {cfg.soon_fit_steps}: the flow phase fits SOON, and flow_fit_clips = 0 leaves it out (--flow_fit_clips)")
    if cfg.lambda_vjepa + cfg.lambda_soon + cfg.lambda_eventually + cfg.lambda_supcon <= 0:
        problems.append("lambda_vjepa = 0: at least one of vjepa, soon, eventually, supcon must train the encoder (--lambda_vjepa)")
    return problems


def validate_config(cfg):
    """Raise UsageError naming every field that breaks a rule, its value, the rule and the flag to change."""
    problems = type_problems(cfg) or value_problems(cfg) or relation_problems(cfg)
    if problems:
        raise UsageError("config: " + "; ".join(problems))


# ---------------------------------------------------------------------------------------------------------------------
# 2  Command line: argv -> Config
# ---------------------------------------------------------------------------------------------------------------------

FIELD_TYPES = typing.get_type_hints(VJepaAutoV2Config)
MAX_CONFIG_BYTES = 2**18
MAX_INHERITS = 8  # files between the first config and the last that it inherits from, this one included
# YAML 1.2's reading of an unquoted word. YAML 1.1, pyyaml's own, takes 1e-4 for text, 012 for ten and 1:30 for ninety.
YAML_WORDS = {
    "null": r"(~|null|Null|NULL)?", "bool": r"(?i:true|false|yes|no|on|off)", "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


@lru_cache(maxsize=1)
def field_help():
    """{field: its trailing comment}, read from the dataclass source, so that flags and comments cannot disagree."""
    return dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", inspect.getsource(VJepaAutoV2Config), re.MULTILINE))


def parse_image_size(text):
    """'224' -> 224, '128,256' -> (128, 256). ValueError otherwise."""
    parts = [int(part) for part in str(text).split(",")]
    if len(parts) > 2:
        raise ValueError(text)
    return parts[0] if len(parts) == 1 else tuple(parts)


def coerce(name, value, source):
    """Bring a value from a config file to the field's type. UsageError names the field, the value and the source."""
    kind = FIELD_TYPES[name]
    if not fits(kind, value):
        wanted = "a number or a pair of numbers" if name == "image_size" else f"of type {kind.__name__}"
        raise UsageError(f"{source}: {name} = {shown(value)} must be {wanted}")
    if kind is float:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def nearest(name, known):
    """' (did you mean x?)' for the closest known name, or ''."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


class DuplicateKey(ValueError):
    """A mapping names its key, the argument, a second time."""


def unique_pairs(pairs):
    """The pairs of a JSON object -> dict. DuplicateKey where the last one would silently win."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise DuplicateKey(key)
        values[key] = value
    return values


def parse_json(text):
    """JSON text -> plain values. ValueError or RecursionError when it cannot be read."""
    try:
        return json.loads(text, object_pairs_hook=unique_pairs)
    except DuplicateKey as error:
        (key,) = error.args
        places = re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)
        lines = " and ".join(str(text.count("\n", 0, place.start()) + 1) for place in places)
        raise ValueError(f"key {shown(key)} stands twice, in lines {lines}") from error


def yaml_value(node, seen):
    """A YAML node -> plain value. `seen` holds the ids of nodes met before: an alias, of which nine lines can make a billion values."""
    kind, line = node.tag.removeprefix("tag:yaml.org,2002:"), node.start_mark.line + 1
    if id(node) in seen:
        raise ValueError(f"line {line}: aliases are not allowed")
    seen.add(id(node))
    if (node.id, kind) == ("sequence", "seq"):
        return [yaml_value(part, seen) for part in node.value]
    if (node.id, kind) == ("mapping", "map"):
        values, lines = {}, {}
        for key_node, value_node in node.value:
            key, line = yaml_value(key_node, seen), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ValueError(f"line {line}: key {shown(key)} is not a text")
            if key in values:
                raise ValueError(f"key {shown(key)} stands twice, in lines {lines[key]} and {line}")
            values[key], lines[key] = yaml_value(value_node, seen), line
        return values
    if node.id != "scalar" or kind != "str" and not re.fullmatch(YAML_WORDS.get(kind, "(?!)"), node.value):
        raise ValueError(f"line {line}: tag {node.tag} is not allowed here")
    readers = {"null": None, "bool": node.value.lower() in ("true", "yes", "on"), "str": node.value}
    if kind in readers:
        return readers[kind]
    return int(node.value) if kind == "int" else float(node.value.lower().replace(".i", "i").replace(".n", "n"))


def parse_yaml(text):
    """YAML text -> plain values; nothing in it can name a Python object. ValueError or RecursionError when it cannot be read."""
    import yaml

    loader = type("ConfigLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    for kind, pattern in YAML_WORDS.items():
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), None)
    try:
        node = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return None if node is None else yaml_value(node, set())


def parse_config(path):
    """One JSON or YAML file -> its mapping, keys unchecked. UsageError says in one line why it cannot be read."""
    kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
    if kind == "YAML" and importlib.util.find_spec("yaml") is None:
        raise UsageError(f"config {one_line(path)}: YAML needs pyyaml (pip install pyyaml), or write the file as JSON")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a file")  # a pipe or a device may have no end
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise OSError(f"larger than {MAX_CONFIG_BYTES} bytes")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {one_line(path)}: cannot be read ({one_line(error)})") from error
    try:
        data = parse_yaml(text) if kind == "YAML" else parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"config {one_line(path)}: not valid {kind} ({one_line(error)})") from error
    data = data.get("config", data) if isinstance(data, dict) and "versions" in data else data  # a run's own config.json
    if not isinstance(data, dict):
        raise UsageError(f"config {one_line(path)}: must hold a mapping of fields, not {type(data).__name__}")
    return data


def read_config_file(path, seen=None):
    """One config with all that it inherits -> {field: value}. `seen`: files met so far -> their values, None while they are read.

    An inherited file lies in the folder of the first one or below it. Loops and unknown keys raise UsageError, like all else.
    """
    seen = {} if seen is None else seen
    path = Path(path if re.search(UNPRINTABLE, str(path)) else os.path.realpath(path))
    if re.search(UNPRINTABLE, str(path)):
        raise UsageError(f"config {one_line(path)}: its name must hold no control characters, and only UTF-8")
    trail = [*(file for file, values in seen.items() if values is None), path]
    if path in trail[:-1]:
        raise UsageError(f"config {one_line(path)}: inherits itself through {' -> '.join(file.name for file in trail)}")
    if not path.is_relative_to(trail[0].parent):
        raise UsageError(f"config {one_line(trail[-2])}: inherits {one_line(path)}, which lies outside {one_line(trail[0].parent)}; move it there")
    if len(trail) > MAX_INHERITS + 1:
        raise UsageError(f"config {one_line(path)}: more than {MAX_INHERITS} files inherit from each other")
    if path in seen:
        return seen[path]
    seen[path] = None
    data = parse_config(path)
    parents = data.pop("inherits", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UsageError(f"config {one_line(path)}: inherits = {shown(parents)} must be a file name or a list of them")
    merged = {}
    for parent in parents:
        merged.update(read_config_file(path.parent / parent, seen))
    for key, value in data.items():
        if key not in FIELD_TYPES:
            raise UsageError(f"config {one_line(path)}: unknown key {shown(key)}{nearest(key, FIELD_TYPES)}")
        merged[key] = coerce(key, value, f"config {one_line(path)}")
    seen[path] = merged
    return merged


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        raise UsageError(one_line(message))


def build_parser():
    """A flag for every config field, with - or _ in its name, and no abbreviations."""
    parser = ArgumentParser(prog="VJepa_AUTO_V2.py", allow_abbrev=False, description="Train a driving world model on a folder of videos.")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="JSON or YAML file of fields; later files win")
    parser.add_argument("--print_config", "--print-config", action="store_true", help="print the resolved config and leave")
    comments = field_help()
    for field in fields(VJepaAutoV2Config):
        flags = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
        options = dict(dest=field.name, default=argparse.SUPPRESS, help=comments[field.name].replace("%", "%%") + f" [{field.default}]")
        if FIELD_TYPES[field.name] is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
        else:
            kind = parse_image_size if field.name == "image_size" else FIELD_TYPES[field.name]
            parser.add_argument(*flags, type=kind, metavar=field.name.upper(), **options)
    return parser


def resolve_config(argv):
    """argv -> (config, {field: value} set by the user, whether to print it). Default < preset < config file < flag."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise UsageError(f"unknown argument {one_line(unknown[0])}{nearest(unknown[0].split('=')[0], known)}; --help lists all flags")
    flags = {name: value for name, value in vars(args).items() if name not in ("config", "print_config")}
    from_files = {}
    for path in args.config:
        from_files.update(read_config_file(path))
    overrides = {**from_files, **flags}
    preset = overrides.get("preset", VJepaAutoV2Config.preset)
    if preset not in PRESETS:
        raise UsageError(f"preset {shown(preset)}: must be one of {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
    cfg = replace(VJepaAutoV2Config(), **{**PRESETS[preset], **overrides})
    validate_config(cfg)
    return cfg, overrides, args.print_config


# ---------------------------------------------------------------------------------------------------------------------
# 3  Video files: folder / list -> decoded frames
# ---------------------------------------------------------------------------------------------------------------------

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mkv", ".mov", ".avi", ".webm", ".ts", ".hevc", ".h264")
# Demuxers that may open a file: a playlist script named .mp4 would otherwise make FFmpeg read other files.
CONTAINER_WHITELIST = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,hevc,h264"
DECODERS = {"auto": ("pyav", "decord"), "pyav": ("pyav", "decord"), "decord": ("decord", "pyav"), "torchcodec": ("torchcodec", "pyav")}
# What FFmpeg's bindings raise on damaged files besides their own errors (seen while fuzzing): not programming errors here.
DECODE_ERRORS = (OSError, ValueError, LookupError, EOFError, AttributeError, MemoryError, RuntimeError, ArithmeticError)
MAX_PIXELS = 2**26  # frames larger than this (8K has half of it), or stretched beyond it, are refused instead of filling the memory
WORKERS_IGNORE = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # the main process saves first and then ends them
SKIPPING_CODECS = ("h264", "hevc")  # decoders that obey skip_frame packet by packet; dav1d obeys the first packet's for the whole file


class BadFile(Exception):
    """This file cannot give a clip; the message is the reason."""


class CannotOpen(BadFile):
    """This decoder cannot open the file; another one may."""


@dataclass(frozen=True)
class VideoFile:
    """One video. `name` (path below the data root, with /) is its identity in splits and logs; `label` a maneuver or ''."""

    name: str
    path: str
    label: str = ""


@dataclass(frozen=True)
class ClipPlan:
    """What to take from a video, drawn before the file is opened. Numbers named u_* lie in [0, 1]."""

    num_frames: int
    fps: float  # 0: spread over the whole file
    height: int
    width: int
    u_start: float  # where the window starts, share of the room that the file leaves
    scale: float  # crop area, share of the largest box that fits
    ratio: float  # stretch of the crop's width over height
    u_x: float
    u_y: float


def scan_folder(root, video_glob):
    """Walk a folder, following links but no loops -> sorted [VideoFile] with a known suffix that match the glob."""
    found, visited = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((info.st_dev, info.st_ino))
        subfolders.sort()  # of several links to one folder the first name counts, on every machine
        parent = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"  # once per folder: relpath is slow
        for name in names:
            if name.lower().endswith(VIDEO_SUFFIXES) and (fnmatch.fnmatch(name, video_glob) or fnmatch.fnmatch(parent + name, video_glob)):
                found.append(VideoFile(parent + name, os.path.join(folder, name)))
    return sorted(found, key=lambda video: video.name)


def parse_list_line(line, folder):
    """One line of a list file, `path` or `path<separator>label` with blanks allowed in the path -> VideoFile."""
    candidates = [(line.strip('"'), "")]
    for separator in ("\t", ",", "::", ";", " "):
        head, found, tail = line.rpartition(separator)
        if found:
            candidates.append((head.strip().strip('"'), tail.strip().strip('"')))
    for path, label in candidates:
        if os.path.exists(os.path.join(folder, path)):
            return VideoFile(path.replace(os.sep, "/"), os.path.abspath(os.path.join(folder, path)), label)
    path, label = candidates[1] if len(candidates) > 1 else candidates[0]  # missing on disk: named as bad when first read
    return VideoFile(path, os.path.abspath(os.path.join(folder, path)), label)


def read_list(path):
    """A csv, txt or jsonl list -> [VideoFile] in file order. UsageError names a line that is not understood."""
    folder, found = os.path.dirname(os.path.abspath(path)), []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data_root {path}: list cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or (number == 1 and re.match(r"(path|video|file\w*)\b", line, re.IGNORECASE)
                        and not any(suffix in line.lower() for suffix in VIDEO_SUFFIXES)):
            continue  # blank, or a header
        if not str(path).lower().endswith(".jsonl"):
            found.append(parse_list_line(line, folder))
            continue
        try:
            row = json.loads(line)
            name = row.get("video") or row["path"]
            found.append(VideoFile(str(name), os.path.abspath(os.path.join(folder, str(name))), str(row.get("maneuver") or row.get("label") or "")))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(f"data_root {path} line {number}: needs a JSON object with a key 'video' or 'path'") from error
    return found


def find_videos(data_root, video_glob):
    """Folder (its videos/ if it has one), list file or single video -> [VideoFile]. UsageError if the path is absent."""
    if not os.path.exists(data_root):
        raise UsageError(f"data_root {data_root}: no such file or folder; give a folder of videos, or leave --data_root out for built-in scenes")
    if not os.access(data_root, os.R_OK):
        raise UsageError(f"data_root {data_root}: not readable; check its permissions")
    if os.path.isfile(data_root):
        if data_root.lower().endswith((".csv", ".txt", ".jsonl")):
            return read_list(data_root)
        if data_root.lower().endswith(VIDEO_SUFFIXES):
            return [VideoFile(os.path.basename(data_root), os.path.abspath(data_root))]
        raise UsageError(f"data_root {data_root}: neither a folder, a video, nor a csv, txt or jsonl list")
    videos = os.path.join(data_root, "videos")
    return scan_folder(videos if os.path.isdir(videos) else data_root, video_glob)


def name_hash(video):
    """Hash of a video's name as hexadecimal text: its fixed place in the order in which files are held out."""
    return hashlib.sha256(video.name.encode("utf-8", "surrogateescape")).hexdigest()


def split_videos(videos, val_fraction, at_least=1):
    """Hold out files by the hash of their name, never by window -> (train, val). Both are non-empty from two files up."""
    ranked = sorted(videos, key=name_hash)
    threshold = f"{int(val_fraction * 16**8):08x}"
    num_val = sum(name_hash(video)[:8] < threshold for video in ranked)
    num_val = min(max(num_val, at_least if val_fraction > 0 else 0), len(ranked) - 1)
    val = {video.name for video in ranked[:num_val]}
    return [v for v in videos if v.name not in val], [v for v in videos if v.name in val]


def read_annotation(data_root, video):
    """DIR/annotations/<clip>.json of a video, in its own subfolder or flat -> dict, empty when there is none. BadFile when it is not a JSON object."""
    folder, relative = Path(data_root) / "annotations", Path(video.name).with_suffix(".json")
    path = folder / relative if (folder / relative).is_file() else folder / relative.name
    if not data_root or not path.is_file():
        return {}
    try:
        annotation = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise BadFile(f"annotation {path.name}: {error}") from error
    if not isinstance(annotation, dict):
        raise BadFile(f"annotation {path.name}: must hold a JSON object")
    return annotation


def frame_times(plan, duration, native_fps):
    """Seconds from the first frame at which the clip's frames are taken -> float64 [T].

    Half a native frame is added, so that a request falls inside a frame and not on the border of two. Files shorter than
    the window give frames over their whole length; with fewer frames than asked for, each one and then the last again.
    """
    steps, half = np.arange(plan.num_frames), 0.5 / native_fps
    window = plan.num_frames / plan.fps if plan.fps else math.inf
    if duration >= window - half:
        return plan.u_start * max(duration - window, 0.0) + steps / plan.fps + half
    if duration * native_fps < plan.num_frames:
        return steps / native_fps + half
    return steps * (duration / plan.num_frames) + half


def crop_box(plan, width, height):
    """Frame size -> (scaled width, scaled height, x, y): scale the frame to this, cut [height, width] of the plan at x, y."""
    aspect = plan.width / plan.height * plan.ratio
    box_w = min(width, height * aspect)
    box_h = min(height, box_w / aspect)
    shrink = math.sqrt(plan.scale)
    box_w, box_h = max(box_w * shrink, 1e-6), max(box_h * shrink, 1e-6)
    scaled_w = max(round(width * plan.width / box_w), plan.width)
    scaled_h = max(round(height * plan.height / box_h), plan.height)
    if scaled_w * scaled_h > MAX_PIXELS:
        raise BadFile(f"frame of {width} x {height} is too stretched for a {plan.width} x {plan.height} crop")
    return scaled_w, scaled_h, round((scaled_w - plan.width) * plan.u_x), round((scaled_h - plan.height) * plan.u_y)


def check_regular(path):
    """BadFile unless the path is a non-empty regular file: a pipe would block the open, a folder confuse it."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(info.st_mode):
        raise BadFile("not a regular file")
    if info.st_size == 0:
        raise BadFile("empty file (0 bytes)")


def open_pyav(url):
    """Open a file for PyAV with the allowed demuxers only -> container. CannotOpen with the reason when it is none of them."""
    import av

    try:
        return av.open(url, options={"format_whitelist": CONTAINER_WHITELIST, "max_pixels": str(MAX_PIXELS)}, metadata_errors="ignore")
    except (av.FFmpegError, *DECODE_ERRORS) as error:  # PatchWelcomeError, UnknownError and some others are FFmpegError and nothing else
        raise CannotOpen(f"pyav cannot open it ({getattr(error, 'strerror', None) or error})") from error


def pyav_timing(container, stream):
    """-> (duration in s, frames per second). Raw H.264 / HEVC streams hold no times: their packets are counted."""
    fps = float(stream.average_rate or stream.guessed_rate or 25)
    if stream.duration:
        return float(stream.duration * stream.time_base), fps
    if container.duration:
        return container.duration / 1e6, fps
    fps = float(stream.guessed_rate or fps)  # the average is the demuxer's default here, the guess reads the stream's header
    with open_pyav(container.name) as counted:  # raw streams cannot be rewound
        num_frames = sum(1 for packet in counted.demux(video=0) if packet.size)
    return num_frames / fps, fps


def pyav_picture(frame, plan, pixel_aspect):
    """One decoded frame -> uint8 [H, W, 3], rotated as the file asks, non-square pixels squared, cropped and resized."""
    quarter_turns = round(frame.rotation / 90) % 4
    if abs((frame.rotation + 45) % 90 - 45) > 5:  # in degrees; a damaged display matrix, -2**31 where it holds no rotation at all
        raise BadFile(f"its display matrix turns it by {frame.rotation} degrees")
    width, height = frame.width * pixel_aspect, frame.height
    if quarter_turns % 2:
        width, height = height, width
    scaled_w, scaled_h, x, y = crop_box(plan, width, height)
    size = (scaled_h, scaled_w) if quarter_turns % 2 else (scaled_w, scaled_h)
    picture = frame.reformat(width=size[0], height=size[1], format="rgb24", interpolation="AREA").to_ndarray()
    return np.rot90(picture, quarter_turns)[y : y + plan.height, x : x + plan.width]


def pyav_frames(container, stream, times, fast):
    """Decoded frames in display order. `fast` leaves out frames that nobody refers to and that lie half a frame or more away
    from every requested time, by the packets' own times and durations: the frames that are kept come out bit for bit the same."""
    start, unit = stream.start_time or 0, float(stream.time_base)
    may_skip = fast and stream.codec_context.name in SKIPPING_CODECS
    for packet in container.demux(stream):
        if may_skip and packet.pts is not None and packet.duration:
            begin, length = (packet.pts - start) * unit, packet.duration * unit
            near = np.searchsorted(times, begin - length / 2)  # first request that this packet's frame could serve
            wanted = near < len(times) and times[near] < begin + 1.5 * length
            stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
        yield from packet.decode()


def pyav_walk(container, stream, plan, fast):
    """Decode forward and keep the frame shown at each requested time -> uint8 [T, H, W, 3]."""
    duration, fps = pyav_timing(container, stream)
    times = frame_times(plan, duration, fps)
    start, aspect = stream.start_time or 0, float(stream.sample_aspect_ratio or 1)
    if not 1 / 8 <= aspect <= 8:
        raise BadFile(f"its pixels are {aspect:g} times as wide as high")
    if fast and times[0] > 1:
        container.seek(start + int(times[0] / stream.time_base), stream=stream)
    frames, shown, shown_end, count = [], None, 0.0, 0
    for frame in pyav_frames(container, stream, times, fast):
        now = count / fps if frame.pts is None else float((frame.pts - start) * stream.time_base)
        if count == 0 and fast and times[0] > 1 and (now > times[0] or now > 0 and not frame.key_frame):  # at 0 the key frame may be hidden
            raise BadFile(f"seek to {times[0]:.2f} s landed at {now:.2f} s{'' if frame.key_frame else ', on no key frame'}")
        count += 1
        picture = None
        while len(frames) < len(times) and shown is not None and now > times[len(frames)]:
            picture = pyav_picture(shown, plan, aspect) if picture is None else picture
            frames.append(picture)
        if len(frames) == len(times):
            return np.stack(frames)
        if frame.is_corrupt:
            raise BadFile(f"damaged picture at {now:.2f} s")
        shown, shown_end = frame, now + float((frame.duration or 0) * stream.time_base)
    if shown is None:
        raise BadFile("no frame could be decoded")
    slack = 1.0 + 2 / fps  # containers round their length; a whole missing second is a truncated file
    if times[-1] > shown_end + slack and duration * fps >= plan.num_frames:
        raise BadFile(f"ends at {shown_end:.2f} s, its header promises {duration:.2f} s")
    last = pyav_picture(shown, plan, aspect)
    return np.stack(frames + [last] * (len(times) - len(frames)))


def read_pyav(path, plan, fast=True):
    """Frames through PyAV, strict about damage: it stops at broken data instead of painting over it. `fast` seeks to the window
    and leaves out frames that are not needed; a file on which that fails is read plainly from its start."""
    import av

    container = open_pyav(f"file:{path}")
    try:
        with container:
            if not container.streams.video:
                raise BadFile("no video stream")
            stream = container.streams.video[0]
            stream.thread_type, stream.thread_count = "NONE", 1
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
            return pyav_walk(container, stream, plan, fast)
    except (BadFile, av.FFmpegError, *DECODE_ERRORS) as error:
        if fast:  # an open GOP cannot be entered at its key frame, and frame durations may be wrong
            return read_pyav(path, plan, fast=False)
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"pyav stopped decoding ({getattr(error, 'strerror', None) or error})") from error


def check_mp4_or_mkv(path):
    """CannotOpen for anything but mp4, mov, mkv and webm: decord and torchcodec take no list of allowed demuxers (a playlist
    would open other files), and decord's frames are seconds off in ts and repeat in avi."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") and head[:4] != b"\x1aE\xdf\xa3":
        raise CannotOpen("only pyav is trusted with containers other than mp4, mov, mkv and webm")


def read_decord(path, plan):
    """Frames through decord. It is opened twice: its resize must be known before the first frame tells the size."""
    if importlib.util.find_spec("decord") is None:
        raise CannotOpen("decord is not installed")
    import decord

    check_mp4_or_mkv(path)
    decord.logging.set_level(decord.logging.FATAL)
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        height, width = reader[0].shape[:2]
        scaled_w, scaled_h, x, y = crop_box(plan, width, height)
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, width=scaled_w, height=scaled_h)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
        starts -= starts[0]
        fps = float(reader.get_avg_fps()) or 25.0
        times = frame_times(plan, float(starts[-1]) + 1 / fps, fps)
        wanted = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, len(starts) - 1)
        pictures = reader.get_batch(wanted).asnumpy()
    except (*DECODE_ERRORS, decord.DECORDError) as error:
        raise CannotOpen(f"decord cannot read it ({str(error).strip().splitlines()[-1][:120] if str(error).strip() else type(error).__name__})") from error
    return pictures[:, y : y + plan.height, x : x + plan.width]


def read_torchcodec(path, plan):
    """Frames through torchcodec, an extra that needs FFmpeg's libraries on the system."""
    if importlib.util.find_spec("torchcodec") is None:
        raise CannotOpen("torchcodec is not installed")
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    check_mp4_or_mkv(path)
    try:
        info = VideoDecoder(path, num_ffmpeg_threads=1).metadata
        scaled_w, scaled_h, x, y = crop_box(plan, info.width, info.height)
        decoder = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC", transforms=[Resize((scaled_h, scaled_w))])
        begin, end = info.begin_stream_seconds, info.end_stream_seconds
        times = frame_times(plan, end - begin, float(info.average_fps))
        pictures = decoder.get_frames_played_at(list(np.minimum(begin + times, end - 1e-3))).data.numpy()
    except DECODE_ERRORS as error:
        raise CannotOpen(f"torchcodec cannot read it ({str(error).strip()[:120]})") from error
    return pictures[:, y : y + plan.height, x : x + plan.width]


READERS = {"pyav": read_pyav, "decord": read_decord, "torchcodec": read_torchcodec}


def read_frames(path, plan, decoder):
    """Decode just the frames of a plan, resized -> uint8 [T, H, W, 3]. Raises BadFile with the reason of every decoder tried."""
    check_regular(path)
    reasons = []
    for name in DECODERS[decoder]:
        try:
            return np.ascontiguousarray(READERS[name](path, plan))
        except CannotOpen as error:
            reasons.append(str(error))
    raise BadFile("; ".join(reasons))


class HeldSignals:
    """Context that holds back signals which have a handler, and raises them again at its end. Around a fork: Python drops the
    exception of a handler (Ctrl-C) that runs in one of its fork hooks, and a process whose start was cut off is ended by nobody."""

    def hear(self, number, frame):
        self.heard.append(number)

    def __enter__(self):
        in_main = threading.current_thread() is threading.main_thread()  # nobody else may set handlers
        numbers = [number for number in WORKERS_IGNORE if in_main and callable(signal.getsignal(number))]
        self.heard = []
        self.previous = {number: signal.signal(number, self.hear) for number in numbers}

    def __exit__(self, kind, error, trace):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        for number in self.heard:
            signal.raise_signal(number)


def end_without(parent):
    """End this process within a second of its parent's death, which no signal may tell it: run in a thread."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(EXIT_ERROR)


def exit_unless_readable(cfg, video, parent):
    """Decode one small clip of a video and end this process: exit code 0 when it worked."""
    threading.Thread(target=end_without, args=(parent,), daemon=True).start()
    try:
        read_frames(video.path, ClipPlan(2, cfg.clip_fps, cfg.height, cfg.width, 0.0, 1.0, 1.0, 0.5, 0.5), cfg.decoder)
    except BadFile:
        os._exit(1)
    os._exit(0)


def can_read(cfg, video):
    """Whether one small clip of a video can be decoded, tried in a process of its own: a decoder may crash or hang."""
    process = multiprocessing.get_context("fork").Process(target=exit_unless_readable, args=(cfg, video, os.getpid()))
    with HeldSignals():
        process.start()
    process.join(cfg.decode_timeout_s)
    process.kill()
    process.join()
    return process.exitcode == 0


def split_readable(cfg, videos):
    """split_videos, but while none of a handful of held-out files can be decoded, one more is held out -> (train, val)."""
    train, val = split_videos(videos, cfg.val_fraction)
    most = min(len(val) + 8, len(videos) - 1)
    for at_least in range(len(val), most + 1):
        wider = split_videos(videos, cfg.val_fraction, at_least)
        if len(val) > 8 or any(can_read(cfg, video) for video in wider[1]):
            return wider
    return train, val


# ---------------------------------------------------------------------------------------------------------------------
# 4  Built-in driving scenes: seed -> clip + labels
# ---------------------------------------------------------------------------------------------------------------------
# Road coordinates: s metres along the road, x metres to the right of its centre; tau seconds since the last NOW frame.
# Everything up to tau = 0 uses scene_seed alone; future_seed decides what happens after, with odds that the picture shows.

TWIN_KINDS = ("teleport", "vanish", "pass_through", "recolour", "reverse")  # physics broken after an instant
CAMERA_HEIGHT, HORIZON, FOCAL = 1.4, 0.42, 0.9  # metres; share of the height; share of the width (about 58 degrees)
LANE, DASH, BONNET = 3.5, 6.0, 0.93  # metres of a lane, of a dash and of the space after it; where the own bonnet begins, share of the height
ROADS = {2: (3.9, 3.4, 0.0, LANE / 2), 3: (5.65, 5.25, LANE / 2, 0.0)}  # lanes -> paved half width, edge line, dashed line, own lane
ARC, BEND = 22.0, 0.028  # metres until a branch of a fork runs straight, curvature in 1/m
FORK_ODDS = (0.5, 0.5, 0.5, 0.1, 0.3, 0.7, 0.9)  # p(right branch), drawn evenly: half is the common case
SIGN_COLOURS = {0.1: (40, 90, 220), 0.3: (60, 200, 220), 0.5: (240, 240, 240), 0.7: (250, 170, 40), 0.9: (220, 40, 40)}
HAZARDS = {False: 0.2, True: 1.0}  # beacon of the lead car lit -> braking rate per second
BRAKE, REACTION, CRAWL = 6.0, 0.8, 0.3  # m/s2 of lead and own car, own delay in seconds, share of the speed that is kept
LANE_ODDS = {"none": (0.1, 0.8, 0.1), "left": (0.8, 0.2, 0.0), "right": (0.0, 0.2, 0.8)}  # indicator -> left, keep, right
TRUCK_AT = 4.9  # metres, centre of the parked truck
STOP_ODDS = 0.15  # a car that passes behind the parked truck stops there
SIDE_NAMES = {-1: "left", 0: "keep", 1: "right"}
SCENE_MANEUVERS = ("brake", "fork_left", "fork_right", "keep", "lane_change_left", "lane_change_right")


def branch_offset(ahead):
    """Lateral position of the right branch `ahead` metres past the fork: an arc, then a straight line. Zero before it."""
    ahead = np.maximum(ahead, 0.0)
    bent = np.minimum(ahead, ARC)
    return 0.5 * BEND * bent**2 + BEND * ARC * (ahead - bent)


def scene_seed_at(cfg, index, stream="train"):
    """Scene seed number `index` of a run: training's and validation's ranges never meet, nor do those of two run seeds."""
    return cfg.seed * 1_000_003 + index + (5 * 10**15 if stream == "val" else 0)


def draw_scene(scene_seed, cfg, kind=""):
    """Everything that the present decides -> dict of parameters in metres and seconds. An empty kind is drawn from scene_mix."""
    shares = mix_shares(cfg.scene_mix)
    kind = kind or str(np.random.default_rng([scene_seed, 3]).choice(SCENE_KINDS, p=shares))
    rng = np.random.default_rng([scene_seed, 0, SCENE_KINDS.index(kind)])
    plot = {"brake": "lead", "occluder": "cross", "steady": str(rng.choice(("lead", "cross", "barrier")))}.get(kind, "")
    slow = plot in ("cross", "barrier")
    scene = dict(
        kind=kind, plot=plot, lanes=3 if kind == "lane" else 2, speed=float(rng.uniform(1.5, 3) if slow else rng.uniform(9, 14)),
        lane=float(rng.uniform(-0.3, 0.3)), phase=float(rng.uniform(0, 2 * DASH)), sway=float(rng.uniform(0, 2 * np.pi)),
        sky=rng.uniform((90, 130, 170), (170, 200, 245)), ground=rng.uniform((60, 90, 40), (150, 150, 90)),
        asphalt=float(rng.uniform(70, 120)), clouds=rng.uniform(0, 2 * np.pi, 3), paint=rng.uniform(40, 230, 3),
        prob=float(rng.choice(FORK_ODDS)), reach=float(rng.uniform(0.3, 0.8)), beacon=bool(rng.random() < 0.5),
        indicator=str(rng.choice(tuple(LANE_ODDS))), gap=float(rng.uniform(8, 13) if kind == "steady" else rng.uniform(11, 18)), drift=float(rng.choice((-1, 1)) * rng.uniform(1.5, 3)),
        cross_speed=float(rng.uniform(5, 7)), cross_from=float(rng.uniform(0.4, 0.9)), cross_gap=float(rng.uniform(16, 20)),
        truck_gap=float(rng.uniform(9, 11)), broken_after=float(rng.uniform(0.15, 0.5)), jump=float(rng.choice((-1, 1)) * rng.uniform(5, 7)),
    )
    metres = int(scene["speed"] * cfg.num_frames / (cfg.clip_fps or 4.0)) + 110
    num_trees = max(4, int(metres * rng.uniform(0.06, 0.13)))
    scene["trees"] = np.stack([rng.uniform(0, metres, num_trees), rng.choice([-1, 1], num_trees) * rng.uniform(7.5, 17, num_trees),
                               rng.uniform(2.5, 6, num_trees), rng.uniform(0.6, 1.1, num_trees)])  # s, x, height, brightness
    others = [(float(rng.uniform(30, 150)), float(rng.uniform(-1, 2)), float(rng.uniform(8, 14)), rng.uniform(40, 230, 3)) for _ in range(int(rng.integers(1, 4)))]
    if kind == "lane":  # ahead in a lane beside ours, about as fast as we are
        beside = LANE * float(rng.choice([-1, 1]))
        scene["cars"] = [(s, beside, scene["speed"] + faster, paint) for s, faster, _, paint in others]
    else:
        scene["cars"] = [(s, -LANE / 2, -speed, paint) for s, _, speed, paint in others if not slow]
    return scene


def scene_odds(scene_seed, cfg, kind=""):
    """The exact odds of what may happen after NOW -> dict with `kind`. Rates per second, the rest probabilities."""
    scene = draw_scene(scene_seed, cfg, kind)
    left, keep, right = LANE_ODDS[scene["indicator"]]
    rate, seconds = HAZARDS[scene["beacon"]], cfg.soon_frames / (cfg.clip_fps or 4.0)
    odds = {"fork": {"right": scene["prob"]}, "brake": {"hazard": rate, "brake_in_soon": 1 - math.exp(-rate * seconds)},
            "lane": {"left": left, "keep": keep, "right": right}, "occluder": {"stops": STOP_ODDS}, "steady": {"barrier": scene["plot"] == "barrier"}}
    return {"kind": scene["kind"], **odds[scene["kind"]]}


def draw_future(scene, future_seed, scene_seed):
    """Everything that the present leaves open -> dict: choice (-1, 0, 1), brake_at, stops, and small differences of driving."""
    rng = np.random.default_rng([scene_seed, 1, future_seed])
    choice, chance = 0, float(rng.random())
    if scene["kind"] == "fork":
        choice = 1 if chance < scene["prob"] else -1
    elif scene["kind"] == "lane":
        choice = int(np.searchsorted(np.cumsum(LANE_ODDS[scene["indicator"]]), chance, side="right")) - 1
    loose = scene["kind"] not in ("brake", "steady")
    future = dict(
        choice=min(choice, 1), stops=scene["kind"] == "occluder" and chance < STOP_ODDS,
        brake_at=-math.log(1 - chance) / HAZARDS[scene["beacon"]] if scene["kind"] == "brake" else math.inf,
        push=float(np.clip(rng.normal(0, 0.04), -0.1, 0.1)) * scene["speed"] * loose, wander=float(rng.normal(0, 0.12)) * loose,
        start=float(rng.uniform(0.1, 0.5)), duration=float(rng.uniform(1.6, 2.2)),
    )
    return future, rng


def slowed(since, speed):
    """Metres lost `since` seconds after a braking began at `speed`: constant deceleration down to a crawl, which is kept."""
    ramp = (1 - CRAWL) * speed / BRAKE
    held = np.clip(since, 0, ramp)
    return 0.5 * BRAKE * held**2 + (1 - CRAWL) * speed * np.maximum(since - ramp, 0)


def ego_path(scene, future, times, tau, fork_at):
    """Pose over time -> dict of arrays [T]: s, x (m), heading (rad), speed (m/s), yaw_rate (rad/s), offset (m from the own lane)."""
    speed, side, fine = scene["speed"], future["choice"], 1e-3
    states = []
    for t, u in ((times, tau), (times + fine, tau + fine)):  # two close instants give the derivatives
        u = np.maximum(u, 0) * (tau > 0)  # nothing of the future reaches a NOW frame, not even its heading
        held = np.minimum(u, 3.0)
        s = speed * t + future["push"] * (0.5 * held**2 + 3.0 * (u - held)) - slowed(u - future["brake_at"] - REACTION, speed)
        offset = scene["lane"] + 0.15 * np.sin(0.8 * t + scene["sway"]) + future["wander"] * (1 - np.cos(np.pi * np.minimum(u / 2, 1))) / 2
        if scene["kind"] == "lane":
            share = np.clip((u - future["start"]) / future["duration"], 0, 1)
            offset = offset + side * LANE * share**2 * (3 - 2 * share)
        bend = side * branch_offset(s - fork_at) if scene["kind"] == "fork" else np.zeros_like(s)
        states.append((s, ROADS[scene["lanes"]][3] + offset + bend, offset))
    (s, x, offset), (s_next, x_next, _) = states
    # the car points where the road goes; the small wander inside the lane does not turn the camera
    bent = np.minimum(np.maximum(s - fork_at, 0), ARC) * (scene["kind"] == "fork")
    heading = np.arctan(side * BEND * bent) if scene["kind"] != "lane" else np.arctan((x_next - x) / np.maximum(s_next - s, 1e-9)) * (tau > 0)
    rate = (s_next - s) / fine
    turning = np.gradient(heading, times) * (tau > 0)  # NOW runs straight
    return dict(s=s, x=x, heading=heading, speed=rate, yaw_rate=turning, offset=offset)


def mover_path(scene, future, tau, now_s, twin, broken):
    """The main mover: lead car, crossing car or none -> (s [T], x [T], shown [T], repainted [T]) or None. broken [T]: frames after the break."""
    speed, plot = scene["speed"], scene["plot"]
    if not plot:
        return None
    since = np.where(broken, tau - tau[broken][0] if broken.any() else 0.0, 0.0)  # seconds after the break
    if plot == "lead":
        drift = scene["drift"] if scene["kind"] == "steady" else 0.0
        gap = scene["gap"] + drift * tau
        if twin == "teleport":
            gap = gap + np.where(broken, np.where(gap - 7 < 5, 1, np.sign(scene["jump"])) * abs(scene["jump"]), 0)
        if twin == "reverse":
            gap = gap - 2 * drift * since
        gap = np.maximum(gap, 4.0)  # a slower car is followed in the end
        s, x = now_s + speed * tau + gap - slowed(tau - future["brake_at"], speed), np.full_like(tau, LANE / 2)
    else:
        # from the right behind the truck (occluder), or from the left (steady), as car centres
        toward = -1.0 if scene["kind"] == "occluder" else 1.0
        meets = 6.3 if scene["kind"] == "occluder" else 1.9
        way = scene["cross_speed"] * (tau - scene["cross_from"])  # metres from the meeting point, negative before it
        if (plot == "barrier" and twin != "pass_through") or future["stops"]:
            way = np.minimum(way, 0.0)
        if twin == "reverse" and broken.any():
            way = np.where(broken, way[broken][0] - scene["cross_speed"] * since, way)
        if twin == "teleport":
            way = way + np.where(broken, scene["jump"], 0)
        s, x = np.full_like(tau, now_s + scene["cross_gap"]), meets + toward * way
    return s, x, ~(broken & (twin == "vanish")), broken & (twin == "recolour")


def car_parts(view, paint, lit=""):
    """Boxes of a car seen from `rear`, `front` or `side` -> rows (left, right, bottom, top, r, g, b) in metres round its base."""
    dark, glass = (20, 20, 20), (30, 35, 45)
    if view == "side":
        return [(-2.1, 2.1, 0.3, 0.95, *paint), (-1.2, 1.2, 0.9, 1.5, *paint), (-1.0, 1.0, 1.0, 1.4, *glass), (-1.6, -0.9, 0, 0.55, *dark), (0.9, 1.6, 0, 0.55, *dark)]
    lamp = (255, 245, 200) if view == "front" else (200, 30, 30)
    parts = [(-0.95, 0.95, 0.2, 1.45, *paint), (-0.75, 0.75, 0.85, 1.35, *glass), (-0.9, 0.9, 0, 0.3, *dark)]
    parts += [(place - 0.18, place + 0.18, 0.5, 0.78, *lamp) for place in (-0.7, 0.7)]
    if lit == "beacon":
        parts.append((-0.8, 0.8, 1.45, 1.95, 255, 180, 0))
    if lit == "brake":
        parts.append((-0.95, 0.95, 0.4, 0.8, 255, 20, 20))
    return parts


def thing_list(scene, pose, mover, times, tau, fork_at, future):
    """Everything that stands or drives on the road -> list of (s, x, parts, shown), arrays [T] or scalars."""
    is_fork, things = scene["kind"] == "fork", []
    for ts, tx, size, shade in scene["trees"].T:
        crown = np.array((35, 95, 35)) * shade
        parts = [(-0.25, 0.25, 0, 0.5 * size, 70, 50, 35), (-1.3, 1.3, 0.35 * size, size, *crown)]
        things.append((ts, tx + np.sign(tx) * branch_offset(ts - fork_at) * is_fork, parts, True))
    for car_s, car_x, car_speed, paint in scene["cars"]:
        where = car_s + car_speed * times  # oncoming cars come from the left branch of a fork
        things.append((where, car_x - branch_offset(where - fork_at) * is_fork, car_parts("front" if car_speed < 0 else "rear", paint), True))
    if is_fork:
        things.append((fork_at + 9, 0.0, [(-0.1, 0.1, 0, 2.2, 60, 60, 60), (-1.2, 1.2, 1.9, 3.8, *SIGN_COLOURS[scene["prob"]])], True))
    now_s = float(scene["speed"] * times[np.argmin(np.abs(tau))])
    if scene["kind"] == "occluder":
        for depth in (6, 4, 2, 0):
            paint = (225, 225, 215) if depth == 0 else (150, 150, 145)
            things.append((now_s + scene["truck_gap"] + depth, TRUCK_AT, [(-1.2, 1.2, 0.4, 3.1, *paint), (-1.1, 1.1, 0, 0.5, 25, 25, 25)], True))
    if scene["plot"] == "barrier":
        parts = [(-0.6, 0.6, 0, 1.8, 235, 235, 235), (-0.6, 0.6, 0.25, 0.7, 220, 40, 40), (-0.6, 0.6, 1.1, 1.55, 220, 40, 40)]
        things.append((now_s + scene["cross_gap"] - 0.2, 4.6, parts, True))
    if mover is not None:
        s, x, shown, repainted = mover
        view = "rear" if scene["plot"] == "lead" else "side"
        beacon = "beacon" if scene["kind"] == "brake" and scene["beacon"] else ""
        things.append((s, x, car_parts(view, scene["paint"], beacon), shown & ~repainted))
        if repainted.any():
            things.append((s, x, car_parts(view, np.where(scene["paint"] > 135, scene["paint"] - 110, scene["paint"] + 110), beacon), repainted))
        braking = (tau > 0) & (tau >= future["brake_at"])
        if braking.any():
            things.append((s - 0.01, x, car_parts(view, scene["paint"], "brake")[-1:], braking))
    return things


def paint_ground(scene, pose, height, width, fork_at, now):
    """Grass, road, crossing road and markings below the horizon -> float32 [T, rows, W, 3]. now: time of the last NOW frame."""
    paved, edge_at, line_at, _ = ROADS[scene["lanes"]]
    rows = np.arange(int(np.ceil(HORIZON * height - 0.5)), height, dtype=np.float32)
    depth = (CAMERA_HEIGHT * FOCAL * width / (rows + 0.5 - HORIZON * height)).astype(np.float32)  # metres ahead of each row
    across = depth[:, None] * (((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5) / FOCAL)  # [rows, W]
    cos, sin, s, x = (value.astype(np.float32)[:, None, None] for value in (np.cos(pose["heading"]), np.sin(pose["heading"]), pose["s"], pose["x"]))
    ground_s = s + depth[:, None] * cos - across * sin  # [T, rows, W]
    ground_x = x + depth[:, None] * sin + across * cos
    side = np.abs(ground_x)
    if scene["kind"] == "fork":  # a fork mirrors its two roads, so one distance serves both
        side = np.abs(side - branch_offset(ground_s - np.float32(fork_at)).astype(np.float32))
    sharp = (FOCAL * width / depth)[:, None]  # pixels per metre sideways
    near = np.clip(8 / depth, 0, 1)[:, None]
    road = np.clip((paved - side) * sharp + 0.5, 0, 1)
    if scene["plot"] in ("cross", "barrier"):
        at = scene["speed"] * now + scene["cross_gap"]
        road = np.maximum(road, np.clip(3 - np.abs(ground_s - np.float32(at)), 0, 1))
    edge = np.clip((0.15 - np.abs(side - edge_at)) * sharp + 0.5, 0, 1) * np.clip(0.3 * sharp, 0, 1)
    dash = np.clip(np.sin((ground_s + scene["phase"]) * np.float32(np.pi / DASH)) * 4 + 0.5, 0, 1) * near
    line = np.clip((0.13 - np.abs(side - line_at)) * sharp + 0.5, 0, 1) * np.clip(0.3 * sharp, 0, 1) * dash
    texture = 8 * np.sin(ground_s * 1.3) * np.sin(ground_x * 0.9) * near
    image = texture[..., None] + scene["ground"].astype(np.float32)
    for alpha, colour in ((road, scene["asphalt"]), (edge, 225.0), (line, 235.0)):
        image += alpha[..., None] * (np.float32(colour) - image)
    return image


def paint_sky(scene, pose, height, width, times):
    """Sky with a gradient and drifting clouds down to the horizon -> float32 [T, rows, W, 3]."""
    v = (np.arange(int(np.ceil(HORIZON * height - 0.5)), dtype=np.float32) + 0.5) / height / HORIZON  # 0 above, 1 at the horizon
    u = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5) / FOCAL
    drift = (3 * u[None] + 2 * pose["heading"][:, None] + 0.1 * times[:, None]).astype(np.float32)  # [T, W]
    bands = sum(np.sin((k + 1) * drift + np.float32(scene["clouds"][k])) for k in range(3))[:, None] * np.sin(6 * (1 - v))[:, None]
    return (scene["sky"].astype(np.float32) + 50 * v[:, None, None])[None] + 12 * bands[..., None]


def draw_things(image, things, pose, break_order=90.0):
    """Paint all parts of all things on every frame, far ones first, with soft edges. image [T, H, W, 3] changes in place."""
    T, height, width, _ = image.shape
    parts = np.array([part for _, _, rows, _ in things for part in rows], np.float32)  # [P, 7]
    owner = np.repeat(np.arange(len(things)), [len(rows) for _, _, rows, _ in things])
    ds = np.stack([np.broadcast_to(s, (T,)) for s, _, _, _ in things], 1) - pose["s"][:, None]  # [T, n]
    dx = np.stack([np.broadcast_to(x, (T,)) for _, x, _, _ in things], 1) - pose["x"][:, None]
    shown = np.stack([np.broadcast_to(seen, (T,)) for _, _, _, seen in things], 1)
    cos, sin = np.cos(pose["heading"])[:, None], np.sin(pose["heading"])[:, None]
    depth = ds * cos + dx * sin
    scale = FOCAL * width / np.maximum(depth, 1.0)
    u, v = width / 2 + (dx * cos - ds * sin) * scale, HORIZON * height + CAMERA_HEIGHT * scale
    shown = shown & (depth > 1.5) & (depth < break_order)
    left, right = (u[:, owner] + parts[:, side] * scale[:, owner] for side in (0, 1))  # [T, P] pixels
    low, high = (v[:, owner] - parts[:, side] * scale[:, owner] for side in (2, 3))
    x0, x1 = np.floor(np.clip(left, 0, width)).astype(int), np.ceil(np.clip(right, 0, width)).astype(int)
    y0, y1 = np.floor(np.clip(high, 0, height)).astype(int), np.ceil(np.clip(low, 0, height)).astype(int)
    visible = shown[:, owner] & (x1 > x0) & (y1 > y0)
    columns, rows = np.arange(width), np.arange(height)
    cover_x = np.clip(np.minimum(right[..., None], columns + 1) - np.maximum(left[..., None], columns), 0, 1).astype(np.float32)
    cover_y = np.clip(np.minimum(low[..., None], rows + 1) - np.maximum(high[..., None], rows), 0, 1).astype(np.float32)
    order = np.argsort(-depth[:, owner], axis=1, kind="stable")
    for frame in range(T):
        picture = image[frame]
        for part in order[frame][visible[frame, order[frame]]]:
            ys, xs = slice(y0[frame, part], y1[frame, part]), slice(x0[frame, part], x1[frame, part])
            alpha = (cover_y[frame, part, ys, None] * cover_x[frame, part, None, xs])[..., None]
            spot = picture[ys, xs]
            spot += alpha * (parts[part, 4:] - spot)


def scene_noise(scene_seed, rng, cfg, rows, width):
    """Per-frame noise of the sky: the NOW frames' share is drawn from scene_seed, the rest from the future -> [T, rows, W, 1]."""
    now = np.random.default_rng([scene_seed, 2]).standard_normal((cfg.now_frames, rows, width, 1), dtype=np.float32)
    later = rng.standard_normal((cfg.num_frames - cfg.now_frames, rows, width, 1), dtype=np.float32)
    return 4 * np.concatenate([now, later])


def draw_bonnet(image, scene):
    """Own bonnet with the two indicator lamps at the lower edge of every frame. image [T, H, W, 3] changes in place."""
    _, height, width, _ = image.shape
    top, lamp = int(BONNET * height), max(2, width // 8)
    image[:, top:] = (38, 40, 46)
    for name, columns in (("left", slice(0, lamp)), ("right", slice(width - lamp, width))):
        lit = scene["kind"] == "lane" and scene["indicator"] == name
        image[:, top:, columns] = (70, 255, 90) if lit else (18, 20, 24)


def scene_labels(scene, future, pose, mover, tau, fork_at, cfg):
    """What is true of a clip -> dict: per-clip values and per-frame lists in SI units, None where a thing is not there."""
    side, kind = future["choice"], scene["kind"]
    moves = {"fork": f"fork_{SIDE_NAMES[side]}", "lane": f"lane_change_{SIDE_NAMES[side]}" if side else "keep"}
    braked = math.isfinite(future["brake_at"]) and future["brake_at"] < tau[-1]
    lead_gap = mover_u = mover_depth = [None] * len(tau)
    event = np.full(len(tau), "", object)
    if mover is not None:
        s, x, shown, _ = mover
        ds, dx, cos, sin = s - pose["s"], x - pose["x"], np.cos(pose["heading"]), np.sin(pose["heading"])
        depth = ds * cos + dx * sin
        column = 0.5 + FOCAL * (dx * cos - ds * sin) / np.maximum(depth, 1.0)
        there = shown & (depth > 1.5) & (column > -0.05) & (column < 1.05)
        mover_u, mover_depth = ([float(v) if ok else None for v, ok in zip(values, there)] for values in (column, depth))
        if scene["plot"] == "lead":
            lead_gap = mover_depth
        if kind == "occluder":  # the truck's picture against the car's centre
            now_s = pose["s"][cfg.now_frames - 1]
            near, far = (now_s + scene["truck_gap"] + d - pose["s"] for d in (0, 6))
            event[(near > 1.5) & ((TRUCK_AT - 1.2 - pose["x"]) / np.maximum(far, 1) < dx / depth) & (dx / depth < (TRUCK_AT + 1.2 - pose["x"]) / np.maximum(near, 1))] = "hidden"
        event[(tau > 0) & (tau >= future["brake_at"])] = "braking"
    if kind == "fork":
        event[pose["s"] > fork_at] = "fork"
    if kind == "lane" and side:
        event[(tau > future["start"]) & (tau < future["start"] + future["duration"])] = "changing"
    return dict(
        kind=kind, maneuver="brake" if braked else moves.get(kind, "keep"), branch=side if kind == "fork" else 0, prob=scene["prob"] if kind == "fork" else 0.0,
        brake_time=future["brake_at"] if braked else None, speed=pose["speed"].tolist(), yaw_rate=pose["yaw_rate"].tolist(),
        steer=np.arctan(2.8 * pose["yaw_rate"] / np.maximum(pose["speed"], 1)).tolist(), lane_offset=pose["offset"].tolist(),
        lead_gap=lead_gap, mover_u=mover_u, mover_depth=mover_depth, event=event.tolist(),
    )


def scene(scene_seed, future_seed, cfg, kind="", twin=""):
    """Render one built-in driving scene -> (frames uint8 [T, H, W, 3], labels dict with per-frame SI signals).

    NOW frames are a function of scene_seed (and a forced `kind`) alone, bit for bit; future_seed draws what happens after
    with the odds of `scene_odds`. `twin` breaks physics in SOON, for steady scenes only: every frame before
    labels["break_frame"] stays as it is without. Square pixels, `scene_size` on the short side where that is set.
    """
    grow = cfg.scene_size / min(cfg.height, cfg.width) if cfg.scene_size else 1.0
    height, width = (2 * max(round(side * grow / 2), 1) for side in (cfg.height, cfg.width))
    params = draw_scene(scene_seed, cfg, kind)
    if twin and (twin not in TWIN_KINDS or params["kind"] != "steady" or (twin == "pass_through" and params["plot"] != "barrier")):
        raise ValueError(f"twin {twin!r}: one of {', '.join(TWIN_KINDS)}, of a steady scene, pass_through of one with a barrier")
    future, rng = draw_future(params, future_seed, scene_seed)
    times = np.arange(cfg.num_frames) / (cfg.clip_fps or 4.0)
    tau = times - times[cfg.now_frames - 1]
    after = params["cross_from"] if twin == "pass_through" else params["broken_after"] * cfg.soon_frames / (cfg.clip_fps or 4.0)
    broken = (tau > max(after, 0)) & bool(twin)
    fork_at = params["speed"] * (times[cfg.now_frames - 1] + params["reach"])
    pose = ego_path(params, future, times, tau, fork_at)
    mover = mover_path(params, future, tau, pose["s"][cfg.now_frames - 1], twin, broken)
    sky = paint_sky(params, pose, height, width, times)
    sky += scene_noise(scene_seed, rng, cfg, sky.shape[1], width)
    image = np.concatenate([sky, paint_ground(params, pose, height, width, fork_at, times[cfg.now_frames - 1])], 1)
    draw_things(image, thing_list(params, pose, mover, times, tau, fork_at, future), pose)
    draw_bonnet(image, params)
    labels = scene_labels(params, future, pose, mover, tau, fork_at, cfg)
    labels |= dict(fps=cfg.clip_fps or 4.0, scene_seed=int(scene_seed), future_seed=int(future_seed), twin=twin,
                   break_frame=int(broken.argmax()) if broken.any() else -1)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def siblings(scene_seed, num, cfg, kind=""):
    """`num` futures of one present, future seeds 0, 1, 2, ... -> generator of (frames, labels); NOW frames are bit-identical."""
    for future_seed in range(num):
        yield scene(scene_seed, future_seed, cfg, kind)


def write_video(path, frames, fps):
    """frames uint8 [T, H, W, 3] -> H.264 file. Without look-ahead or B-frames: a frame's bits depend on no later frame."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        even = frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p" if even else "yuv444p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "16", "preset": "veryfast", "tune": "zerolatency"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_scene(folder, name, cfg, scene_seed, future_seed=0, kind="", twin=""):
    """Render one scene into folder/videos/<name>.mp4 and folder/annotations/<name>.json -> labels."""
    frames, labels = scene(scene_seed, future_seed, cfg, kind, twin)
    write_video(Path(folder) / "videos" / f"{name}.mp4", frames, labels["fps"])
    (Path(folder) / "annotations" / f"{name}.json").write_text(json.dumps(labels))
    return labels


def write_scenes(folder, cfg):
    """Write `scene_clips` scenes as mp4 with annotations, once per folder and setting."""
    names = ("seed", "scene_clips", "scene_size", "scene_mix", "image_size", "num_frames", "now_frames", "soon_frames", "clip_fps")
    setting = json.dumps({name: getattr(cfg, name) for name in names})
    done = Path(folder) / "scenes.json"
    if done.is_file() and done.read_text() == setting:
        return
    shutil.rmtree(folder, ignore_errors=True)
    (Path(folder) / "videos").mkdir(parents=True)
    (Path(folder) / "annotations").mkdir()
    for index in range(cfg.scene_clips):
        write_scene(folder, f"scene_{index:06d}", cfg, scene_seed_at(cfg, index))
    done.write_text(setting)


# ---------------------------------------------------------------------------------------------------------------------
# 5  Masks: token grid -> keep_idx, mask_idx
# ---------------------------------------------------------------------------------------------------------------------

MASK_FAMILIES = ("short", "long")  # of NOW, each with its own mask token; SOON has the third
SOON = len(MASK_FAMILIES)


def block_mask(rng, cfg, family):
    """Union of random blocks on the h x w grid -> bool [h, w], True = hidden. Positions and aspects are drawn per call."""
    _, rows, cols = cfg.grid
    num_blocks, scale = getattr(cfg, f"{family}_num_blocks"), getattr(cfg, f"{family}_scale")
    mask = np.zeros((rows, cols), bool)
    for _ in range(num_blocks):
        aspect = rng.uniform(cfg.aspect_min, cfg.aspect_max)
        block_h = int(np.clip(round(math.sqrt(scale * rows * cols * aspect)), 1, rows))
        block_w = int(np.clip(round(math.sqrt(scale * rows * cols / aspect)), 1, cols))
        top, left = rng.integers(0, rows - block_h + 1), rng.integers(0, cols - block_w + 1)
        mask[top : top + block_h, left : left + block_w] = True
    return mask


@lru_cache(maxsize=64)
def visible_sites(grid, num_blocks, scale, aspect_min, aspect_max, share):
    """Visible sites of a mask family, one constant per run: `share` of the grid, or the block sampler's mean when 0."""
    shape = VJepaAutoV2Config(short_num_blocks=num_blocks, short_scale=scale, aspect_min=aspect_min, aspect_max=aspect_max,
                              tubelet_t=1, patch=1, num_frames=1, image_size=grid)
    if not share:
        rng = np.random.default_rng(0)
        share = 1 - np.mean([block_mask(rng, shape, "short").mean() for _ in range(2000)])
    return int(np.clip(round(share * grid[0] * grid[1]), 1, grid[0] * grid[1] - 1))


def family_visible(cfg, family):
    """Visible sites per tubelet of a mask family, in [1, h*w - 1]."""
    values = [getattr(cfg, f"{family}_{name}") for name in ("num_blocks", "scale")]
    return visible_sites(cfg.grid[1:], *values, cfg.aspect_min, cfg.aspect_max, getattr(cfg, f"{family}_visible"))


def sample_mask(rng, cfg, family):
    """One clip's mask -> (keep_idx [K], mask_idx [M]) int64, ascending, disjoint, together all L tokens.

    Spatial blocks are repeated over time. Random sites are added or dropped until the visible count is the family's
    constant: shapes stay static and no draw hides everything or favours early frames.
    """
    hidden = block_mask(rng, cfg, family).reshape(-1)
    visible = family_visible(cfg, family)
    surplus = int((~hidden).sum()) - visible
    if surplus:
        pool = np.flatnonzero(~hidden if surplus > 0 else hidden)
        hidden[rng.choice(pool, abs(surplus), replace=False)] = surplus > 0
    tubelets = np.arange(cfg.grid[0])[:, None] * cfg.sites
    keep_idx = (tubelets + np.flatnonzero(~hidden)).reshape(-1)
    mask_idx = (tubelets + np.flatnonzero(hidden)).reshape(-1)
    return keep_idx.astype(np.int64), mask_idx.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# 6  Loading: (seed, sample number) -> batch
# ---------------------------------------------------------------------------------------------------------------------

STREAMS = {"train": 0, "val": 1, "bank": 2}  # separate random streams of one seed


def sample_rng(seed, stream, index, purpose):
    """The only source of randomness of a sample: a generator keyed by numbers, not by who asks or when."""
    return np.random.default_rng([seed, STREAMS[stream], index, purpose])


@lru_cache(maxsize=4)
def epoch_order(seed, stream, epoch, count):
    """Order of the files in one epoch -> int64 [count]."""
    return sample_rng(seed, stream, epoch, 0).permutation(count)


def draw_plan(rng, cfg, stream):
    """Window and crop of a clip. Validation keeps random windows but takes the largest centred crop, undistorted."""
    u_start, u_scale, u_ratio, u_x, u_y = rng.random(5)
    scale = cfg.crop_scale_min + (cfg.crop_scale_max - cfg.crop_scale_min) * u_scale
    ratio = cfg.crop_ratio_min * (cfg.crop_ratio_max / cfg.crop_ratio_min) ** u_ratio
    if stream != "train":
        scale, ratio, u_x, u_y = 1.0, 1.0, 0.5, 0.5
    return ClipPlan(cfg.num_frames, cfg.clip_fps, cfg.height, cfg.width, u_start, scale, ratio, u_x, u_y)


def mirror_label(label):
    """Swap left and right in a label's words: what a horizontal flip does to it."""
    return re.sub(r"(?<![a-z])(left|right)(?![a-z])", lambda word: "right" if word[0] == "left" else "left", label)


def shifted_tau(normal, shift):
    """Standard normal draws -> times in (0, 1): logit-normal, shifted towards noise by `shift`. Arrays or tensors."""
    u = 1 / (1 + (torch.exp if torch.is_tensor(normal) else np.exp)(-normal))
    return u / (u + shift * (1 - u))


def mask_and_noise(cfg, stream, index):
    """Masks [R, K], [R, M] per family and flow draws of sample `index`: noise [R, N, k], tau [R] -> dict of tensors."""
    rng = sample_rng(cfg.seed, stream, index, 3)
    sample = {}
    for family in MASK_FAMILIES:
        draws = [sample_mask(rng, cfg, family) for _ in range(cfg.mask_draws)]
        sample[f"keep_{family}"] = torch.from_numpy(np.stack([keep_idx for keep_idx, _ in draws]))
        sample[f"mask_{family}"] = torch.from_numpy(np.stack([mask_idx for _, mask_idx in draws]))
    tau = shifted_tau(rng.standard_normal(cfg.flow_draws), cfg.tau_shift)
    sample["tau"] = torch.from_numpy(tau.astype(np.float32))
    noise = rng.standard_normal((cfg.flow_draws, cfg.flow_tokens, cfg.flow_rank), dtype=np.float32)
    sample["noise"] = torch.from_numpy(noise)
    return sample


# Faults of a machine or a network, told in a reason by their texts, that say nothing about a file that is there.
PASSING_FAULTS = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
                  errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EACCES, errno.ENOENT)
RETRY_S = 0.5  # between two looks at a file whose fault may pass


class Attendant:
    """Who a dataset tells what it does; this one reads in the main process. `stopping`, if given, says whether the run was asked to stop."""

    def __init__(self, stopping=None):
        self.stopping, self.told = stopping, False

    def holding(self, number):
        """Context in which a file is in hand."""
        return nullcontext()

    def tell(self, text):
        """Say what is waited for, once; "" says nothing."""
        if text and not self.told:
            print(one_line(text), file=sys.stderr, flush=True)
            self.told = True

    def waiting(self, text):
        """Called again and again while a fault may pass. Stopped when the run was asked to stop."""
        self.tell(text)
        if self.stopping is not None and self.stopping():
            raise Stopped


class ClipDataset(torch.utils.data.Dataset):
    """Sample i is a pure function of (seed, i): video, window, crop, flip, masks and flow noise.

    `data_root` locates annotations. A file that cannot be decoded is replaced by the next one of an order drawn from
    (seed, i), and named in the sample's `bad` list; when no file at all can be decoded the sample holds zeros, and the
    list then names every file, which the caller must treat as the end of the run. `quarantine` (name -> reason) holds files
    that must not be opened at all; `watch`, an Attendant, is told which file is in hand.
    """

    def __init__(self, cfg, videos, data_root, stream, maneuvers=(), quarantine=None):
        self.cfg, self.videos, self.data_root, self.stream, self.quarantine = cfg, videos, data_root, stream, {} if quarantine is None else quarantine
        self.maneuvers = {name: number for number, name in enumerate(maneuvers)}
        self.watch, self.waited, self.retried = Attendant(), 0.0, set()

    def __len__(self):
        return len(self.videos)

    def candidates(self, index):
        """File numbers to try for sample `index`, best first."""
        count = len(self.videos)
        yield int(epoch_order(self.cfg.seed, self.stream, index // count, count)[index % count])
        yield from sample_rng(self.cfg.seed, self.stream, index, 1).permutation(count).tolist()

    def are_away(self):
        """Whether none of a handful of files can be seen: then their disk or their mount is missing, not a file."""
        return not any(os.path.exists(video.path) for video in self.videos[:: max(1, len(self.videos) // 16)])

    def read(self, number, plan):
        """Decode a plan's frames of a file -> uint8 [T, H, W, 3]. BadFile with the reason.

        A fault that may pass does not condemn a file, and no other one takes its place at once: data that are away as a
        whole are waited for, decode_timeout_s at most until one is read again; a fault of the machine is tried four times, once per file.
        """
        video, tries, limit_s = self.videos[number], 0, self.cfg.decode_timeout_s
        while True:
            try:
                with self.watch.holding(number):
                    frames = read_frames(video.path, plan, self.cfg.decoder)
            except BadFile as error:
                away = not os.path.exists(video.path) and self.are_away()
                passing = os.path.exists(video.path) and number not in self.retried and any(os.strerror(code) in str(error) for code in PASSING_FAULTS)
                if passing and tries == 3:
                    self.retried.add(number)
                if self.waited >= limit_s or not away and (not passing or tries == 3):
                    raise
                missing = f"{video.name}: {error}, and no other file of {self.data_root or 'the list'} can be seen; waiting up to {limit_s:g} s for the data"
                self.watch.waiting(missing if away else "")
                tries, self.waited = tries + passing, self.waited + RETRY_S
                time.sleep(RETRY_S)
            else:
                self.waited = 0.0
                return frames

    def decode(self, index, height, width):
        """-> (uint8 [T, height, width, 3], file number, annotation, bad files as (name, reason), flipped)."""
        rng = sample_rng(self.cfg.seed, self.stream, index, 2)
        plan = replace(draw_plan(rng, self.cfg, self.stream), height=height, width=width)
        flip = bool(self.cfg.hflip and self.stream == "train" and rng.random() < 0.5)
        bad = OrderedDict()
        for number in self.candidates(index):
            video = self.videos[number]
            if video.name in bad:
                continue
            if video.name in self.quarantine:
                bad[video.name] = self.quarantine[video.name]
                continue
            try:
                frames = self.read(number, plan)
                annotation = {"maneuver": video.label} if video.label else {}
                annotation.update((key, value) for key, value in read_annotation(self.data_root, video).items() if value is not None)
            except BadFile as error:
                bad[video.name] = str(error)
                continue
            return (frames[:, :, ::-1] if flip else frames), number, annotation, list(bad.items()), flip
        empty = np.zeros((plan.num_frames, height, width, 3), np.uint8)
        return empty, -1, {}, list(bad.items()), flip

    def __getitem__(self, index):
        cfg = self.cfg
        frames, number, annotation, bad, flip = self.decode(index, cfg.height, cfg.width)
        maneuver = str(annotation.get("maneuver", ""))
        sample = mask_and_noise(cfg, self.stream, index)
        sample["frames"] = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))  # [T, 3, H, W]
        sample["file"] = torch.tensor(number)
        sample["maneuver"] = torch.tensor(self.maneuvers.get(mirror_label(maneuver) if flip else maneuver, -1))
        sample["index"], sample["bad"] = torch.tensor(index), bad
        return sample


class NoiseDataset(ClipDataset):
    """`--missing_data random`: pixels drawn from (seed, i), for speed tests without data. Never used unless asked for."""

    def decode(self, index, height, width):
        rng = sample_rng(self.cfg.seed, self.stream, index, 2)
        return rng.integers(0, 256, (self.cfg.num_frames, height, width, 3), dtype=np.uint8), index % len(self.videos), {}, [], False


class SceneDataset(ClipDataset):
    """Built-in scenes drawn when they are asked for: every training sample is a scene that was never seen before.

    Scene i is the one that `write_scenes` writes as file i. Crops are not drawn: the camera of a scene varies little.
    """

    def decode(self, index, height, width):
        cfg = replace(self.cfg, image_size=(height, width), scene_size=0)
        frames, labels = scene(scene_seed_at(cfg, index, self.stream), 0, cfg)
        flip = bool(cfg.hflip and self.stream == "train" and sample_rng(cfg.seed, self.stream, index, 2).random() < 0.5)
        return (frames[:, :, ::-1] if flip else frames), index % len(self.videos), labels, [], flip


class StepSampler:
    """Sample numbers of this rank, micro-step after micro-step: rank r of W takes start + i*W + r. Holds no state."""

    def __init__(self, start, num_batches, batch_size, rank, world_size):
        self.start, self.num_batches, self.batch_size, self.rank, self.world_size = start, num_batches, batch_size, rank, world_size

    def __len__(self):
        return self.num_batches

    def __getitem__(self, batch):
        if not 0 <= batch < self.num_batches:
            raise IndexError(batch)
        first = batch * self.batch_size
        return [self.start + (first + i) * self.world_size + self.rank for i in range(self.batch_size)]


def collate(samples):
    """List of samples -> dict of stacked tensors, and `bad`: every (file, reason) met."""
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if key != "bad"}
    batch["bad"] = [entry for sample in samples for entry in sample["bad"]]
    return batch


QUARANTINED = "quarantined"  # how the reason of a file begins that must not be opened again
START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # macOS: its system libraries do not survive a fork
PREFETCH = 2  # batches that a worker may be ahead of the loop
TICK_S = 0.25  # how often a wait for a batch looks up
QUIET_S = 10.0  # a worker without a file in hand may be silent for so long at least: it starts, draws, copies
INLINE_BYTES = 4096  # smaller arrays travel in the message itself
TOO_MANY = "raise the limit on processes and open files (ulimit -u, ulimit -n) or lower --num_workers (0 reads in the main process)"
CURE = "lower --num_workers or --batch_size, give the container more memory (docker run --memory), or read in the main process (--num_workers 0)"


# What a worker's exception comes out as in the main process; others are programming errors.
WORKER_ERRORS = {"UsageError": UsageError, "UserError": UserError, "MemoryError": MemoryError, "OSError": OSError}


def init_worker():
    """Loader workers leave signals to the main process; one thread each."""
    for number in WORKERS_IGNORE:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


class BatchPickler(ForkingPickler):
    """Writes tensors as NumPy arrays, whose contents can travel beside the message (protocol 5)."""

    def reducer_override(self, thing):
        return (torch.from_numpy, (thing.numpy(),)) if isinstance(thing, torch.Tensor) else NotImplemented


class WorkerEnd(Attendant):
    """A worker's side of its socket: messages (kind, content), each preceded by its length. Kinds: hold (number of the file in
    hand, -1 for none), waiting (text), batch, error. Whatever exception leaves its `with` block is told.

    The large arrays of a batch lie in shared memory where there is some; the message says where.
    """

    def __init__(self, channel, memory):
        super().__init__()
        self.channel, self.memory, self.places, self.free, self.end = channel, b"" if memory is None else memory, [], 0, 0
        self.spoken = time.monotonic()

    def say(self, kind, content):
        """Send one message. OSError when the main process is gone."""
        message = ForkingPickler.dumps((kind, content), 5)
        self.channel.sendall(len(message).to_bytes(8, "little") + message)
        self.spoken = time.monotonic()

    @contextmanager
    def holding(self, number):
        """Mark a file as in hand while it is read."""
        self.say("hold", number)
        try:
            yield
        finally:
            self.say("hold", -1)

    def waiting(self, text):
        self.say("waiting", text)

    def pass_on(self, sample):
        """A sample was made: said now and then, so that a long batch is not taken for a standstill."""
        if time.monotonic() - self.spoken > 1.0:
            self.say("hold", -1)
        return sample

    def place(self, array):
        """Put an array's bytes into the slot if they fit -> whether they must travel in the message instead."""
        raw = array.raw()
        if raw.nbytes < INLINE_BYTES or self.free + raw.nbytes > self.end:
            return True
        self.memory[self.free : self.free + raw.nbytes] = raw
        self.places.append((self.free, raw.nbytes))
        self.free += -(-raw.nbytes // 64) * 64
        return False

    def hand_over(self, batch, turn):
        """Send a batch, its arrays in slot turn % PREFETCH; before a slot is used again the main process has said that it is free."""
        if turn >= PREFETCH and not self.channel.recv(1):
            raise EOFError("the main process is gone")
        slot = len(self.memory) // PREFETCH
        self.places, self.free, self.end = [], turn % PREFETCH * slot, (turn % PREFETCH + 1) * slot
        inner = io.BytesIO()
        BatchPickler(inner, 5, True, self.place).dump(batch)
        self.say("batch", (self.places, inner.getvalue()))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            known = next((name for name, base in WORKER_ERRORS.items() if isinstance(error, base)), "")
            text = str(error) if known else f"{kind.__name__}: {error}"
            try:
                self.say("error", (known, text, "".join(traceback.format_exception(kind, error, trace))))
            except OSError:
                pass  # the main process is gone: nobody is left to tell
        return True


def serve_batches(parent, channel, memory, dataset, files, sampler, batch_numbers, collate_fn):
    """Life of a loader worker: make its share of the batches, in order, at most PREFETCH ahead of the loop."""
    init_worker()
    with WorkerEnd(channel, memory) as own_end:
        try:
            threading.Thread(target=end_without, args=(parent,), daemon=True).start()
        except RuntimeError as error:  # Python's word for a limit on processes
            raise UserError(f"loader workers cannot be started ({error}); {TOO_MANY}") from error
        if files is not None:
            files.watch = own_end
        for turn, number in enumerate(batch_numbers):
            own_end.hand_over(collate_fn([own_end.pass_on(dataset[index]) for index in sampler[number]]), turn)


class Worker:
    """The main process's side of a worker: its process, its socket and what it has said.

    `held` is the file in its hand, `silent` for how long the loop has waited without a word from it, `parcels` its batches
    that were not taken yet, `failure` the exception that ended it (name in WORKER_ERRORS or "", text, traceback).
    """

    def __init__(self, batch_numbers, memory_bytes):
        self.memory = mmap.mmap(-1, memory_bytes) if START_METHOD == "fork" and memory_bytes else None  # anonymous: needs no /dev/shm
        self.channel, self.theirs = socket.socketpair()
        for end in (self.channel, self.theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, 2**20)
        self.channel.setblocking(False)
        self.batch_numbers, self.received, self.taken = batch_numbers, 0, 0
        self.inbox, self.held, self.silent, self.parcels, self.lost, self.failure, self.process = bytearray(), -1, 0.0, [], False, None, None

    def start(self, dataset, files, sampler, collate_fn):
        """Start the process. OSError when the system refuses."""
        work = os.getpid(), self.theirs, self.memory, dataset, files, sampler, self.batch_numbers, collate_fn
        self.process = multiprocessing.get_context(START_METHOD).Process(target=serve_batches, args=work, daemon=True)
        self.process.start()
        self.theirs.close()  # the worker alone holds it: its death closes it

    @property
    def owes(self):
        """Whether it has a batch to make now."""
        return self.received < min(len(self.batch_numbers), self.taken + PREFETCH)

    @property
    def died(self):
        """Whether it ended with work undone and without an exception."""
        return self.lost and self.failure is None and self.received < len(self.batch_numbers)

    def read(self):
        """Take in what has arrived, without waiting -> texts for whoever watches."""
        try:
            while piece := self.channel.recv(2**20):
                self.silent = 0.0
                self.inbox += piece
            self.lost = True
        except BlockingIOError:
            pass  # no more for now
        except ConnectionError:
            self.lost = True
        told = []
        while len(self.inbox) >= 8 and len(self.inbox) >= (until := 8 + int.from_bytes(self.inbox[:8], "little")):
            kind, content = ForkingPickler.loads(memoryview(self.inbox)[8:until].tobytes())
            del self.inbox[:until]
            if kind == "hold":
                self.held = content
            elif kind == "batch":
                self.received += 1
                self.parcels.append(content)
            elif kind == "error":
                self.failure = content
            else:
                told.append(content)
        return told

    @property
    def fate(self):
        """How it ended, in words."""
        self.process.join(1.0)
        code = self.process.exitcode
        if not self.lost or code is None:
            return "no sign of life"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def fail(self):
        """Raise the exception that ended it, its traceback there as the cause."""
        known, text, trace = self.failure
        raise WORKER_ERRORS.get(known, RuntimeError)(text if known else f"in a loader worker: {text}") from RuntimeError(f"\n{trace}")

    def take(self, in_place=False):
        """The next batch. Its arrays are copies, or lie in shared memory until `release` when `in_place`."""
        places, inner = self.parcels.pop(0)
        pieces = [np.frombuffer(self.memory, np.uint8, size, start) for start, size in places]
        return ForkingPickler.loads(inner, buffers=pieces if in_place else [piece.copy() for piece in pieces])

    def release(self):
        """Say that the slot of the batch taken last is free."""
        self.taken += 1
        try:
            self.channel.send(b"f")
        except ConnectionError:
            pass  # it has made its last batch, or its death is noticed when it is waited for

    def end(self):
        """End it at once: a worker that hangs in a decoder hears nothing else."""
        if self.process is not None and self.process.pid:
            self.process.kill()
            self.process.join(5.0)  # a disk that does not answer may hold it for longer
        self.channel.close()
        self.theirs.close()


def end_workers(workers, owner):
    """End all workers of a list and forget them, in the process that started them alone: a fork of it holds the same list."""
    if os.getpid() == owner:
        for worker in workers:
            worker.end()
    workers.clear()


def init_pinning(device):
    """The thread that fills pinned memory stays on the rank's GPU and on one core."""
    torch.cuda.set_device(device)
    torch.set_num_threads(1)


def pin_batch(batch):
    """A batch's tensors in pinned memory, for copies that the GPU fetches itself."""
    return {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}


class ClipLoader:
    """Iterator over batches in the sampler's order, whatever the number of workers and whatever becomes of them.

    Each worker makes every num_workers-th batch. One that dies, or says nothing while the loop waits for decode_timeout_s,
    is replaced and reading goes on with the batch that was due; the file in its hand at two such ends goes into the
    `quarantine` of `files`, the ClipDataset that reads. Since a sample's substitute depends on the sample alone, all later
    batches are the same as if the file had been left out from the start. With num_workers = 0 nothing guards the process.

    A wait looks at `stopping()` and raises Stopped; the batch is still due then. `failing` (name -> reason) is kept up to
    date with the files that could not be decoded and have not been since. It draws no random numbers.
    """

    def __init__(self, dataset, sampler, num_workers, pin_memory=False, timeout_s=60.0, *, collate_fn=None, files=None, batch_bytes=0, stopping=None,
                 failing=None):
        self.dataset, self.sampler, self.num_workers, self.timeout_s, self.batch_bytes = dataset, sampler, num_workers, timeout_s, batch_bytes
        self.collate_fn, self.files = collate_fn or collate, files or (dataset if isinstance(dataset, ClipDataset) else None)
        self.stopping, self.failing, self.attendant = stopping, failing, Attendant(stopping)
        self.delivered, self.begun, self.strikes, self.deaths, self.workers, self.pinned, self.pinning = 0, 0, {}, 0, [], None, None
        if pin_memory and torch.cuda.is_available():
            self.pinning = ThreadPoolExecutor(1, initializer=init_pinning, initargs=(torch.cuda.current_device(),))
        # forgotten or at exit: workers ignore SIGTERM, and the interpreter would wait for them for ever
        weakref.finalize(self, end_workers, self.workers, os.getpid())
        if num_workers:
            self.start()
        elif self.files is not None:
            self.files.watch = self.attendant

    def start(self):
        """Start workers at the batch that is due. UserError when the system refuses."""
        self.begun, self.pinned = self.delivered, None
        try:
            for number in range(min(self.num_workers, len(self.sampler) - self.delivered)):
                self.workers.append(Worker(range(self.delivered + number, len(self.sampler), self.num_workers), PREFETCH * self.batch_bytes))
                with HeldSignals():
                    self.workers[-1].start(self.dataset, self.files, self.sampler, self.collate_fn)
        except OSError as error:
            self.close()
            cure = CURE if error.errno == errno.ENOMEM else TOO_MANY
            raise UserError(f"loader workers cannot be started ({error.strerror or error}); {cure}") from error

    def __iter__(self):
        return self

    def __len__(self):
        return len(self.sampler)

    @property
    def due(self):
        """The worker whose batch is due."""
        return self.workers[(self.delivered - self.begun) % self.num_workers]

    def __next__(self):
        if self.delivered >= len(self.sampler):
            self.close()
            raise StopIteration
        if not self.num_workers:
            batch = self.collate_fn([self.dataset[index] for index in self.sampler[self.delivered]])
            batch = pin_batch(batch) if self.pinning else batch
        else:
            self.look(0.0)
            while not self.due.parcels and not self.pinned:
                self.wait()
            batch = self.receive()
        self.delivered, self.deaths, self.attendant.told = self.delivered + 1, 0, False
        if self.pinning and self.workers and self.delivered < len(self.sampler) and self.due.parcels:  # while the loop computes
            self.pinned = self.pinning.submit(pin_batch, self.due.take(in_place=True))
        if self.failing is not None:
            self.keep_account(batch)
        return batch

    def look(self, seconds):
        """Read what the workers say, and wait for it at most so long."""
        multiprocessing.connection.wait([worker.channel for worker in self.workers if not worker.lost], seconds)
        for worker in self.workers:
            for text in [] if worker.lost else worker.read():
                self.attendant.tell(text)

    def wait(self):
        """One tick of waiting for the batch that is due. Stopped, or the exception that ended its worker."""
        if self.due.failure:
            self.due.fail()
        if self.stopping is not None and self.stopping():
            raise Stopped
        before = time.monotonic()
        self.look(TICK_S)
        waited = min(time.monotonic() - before, 2 * TICK_S)  # no more: time in which this process stood still counts for nobody
        for worker in self.workers:
            worker.silent += waited if worker.owes else 0.0
        gone = [worker for worker in self.workers if worker.died]
        late = [worker for worker in self.workers if worker.silent > (self.timeout_s if worker.held >= 0 else max(self.timeout_s, QUIET_S)) and not worker.lost]
        if gone or late:
            self.replace_workers(gone, late)

    def receive(self):
        """The batch that is due and has arrived."""
        worker = self.due
        if self.pinning:
            batch = (self.pinned or self.pinning.submit(pin_batch, worker.take(in_place=True))).result()
            self.pinned = None
        else:
            batch = worker.take()
        worker.release()
        return batch

    def replace_workers(self, gone, late):
        """Count strikes, quarantine, start anew. UserError when workers fail without a file in hand, again and again."""
        ends = {worker.fate for worker in gone} | {f"no word for {self.timeout_s:g} s" for worker in late}
        held = [(worker.held, f"one clip took longer than decode_timeout_s = {self.timeout_s:g}") for worker in late if worker.held >= 0]
        held += [(worker.held, "it killed two loader workers") for worker in gone if worker.held >= 0]
        self.close()
        for number, reason in held:
            self.strikes[number] = self.strikes.get(number, 0) + 1
            if self.strikes[number] > 1:
                self.files.quarantine[self.files.videos[number].name] = f"{QUARANTINED}: {reason}"
        self.deaths += not held
        if self.deaths > 2:
            raise UserError(f"loader workers die before they open a file ({', '.join(sorted(ends))}); {CURE}")
        self.start()

    def keep_account(self, batch):
        """Files decoded now are good again; those that could not be decoded are failing."""
        for number in batch["file"].tolist():
            if number >= 0:
                self.failing.pop(self.files.videos[number].name, None)
        self.failing.update(batch["bad"])

    def close(self):
        """End the workers."""
        self.pinned = None
        end_workers(self.workers, os.getpid())


def batch_bytes(cfg, num_clips):
    """Room that the large arrays of a batch take: frames, noise, masks."""
    noise = cfg.flow_draws * cfg.flow_tokens * cfg.flow_rank * 4
    masks = len(MASK_FAMILIES) * cfg.mask_draws * cfg.num_tokens * 8
    return num_clips * (cfg.num_frames * cfg.channels * cfg.height * cfg.width + noise + masks) + 2**16


def open_loader(source, cfg, stream, sampler, num_workers, pin_memory=False, stopping=None):
    """The ClipLoader of a stream of a DataSource. While it waits for a batch and `stopping()` is true, it raises Stopped."""
    return ClipLoader(source.dataset(cfg, stream), sampler, num_workers, pin_memory, cfg.decode_timeout_s,
                      batch_bytes=batch_bytes(cfg, sampler.batch_size), stopping=stopping, failing=source.failing)


def maneuver_names(videos, data_root):
    """All maneuvers that lists and annotations name, mirrored ones included -> sorted list."""
    names = set()
    for video in videos:
        try:
            name = str(read_annotation(data_root, video).get("maneuver") or video.label)
        except BadFile:
            continue  # counted with its reason when the clip itself is read
        names |= {name, mirror_label(name)} - {""}
    return sorted(names)


@dataclass
class DataSource:
    """What a run trains on. kind: videos | scenes | render | random, printed on every log line when it is not videos."""

    kind: str
    root: str
    train: list
    val: list
    maneuvers: list
    held_out: bool  # False: a single file serves both sides
    quarantine: dict = field(default_factory=dict)  # files that no worker may open: name -> reason
    failing: dict = field(default_factory=dict)  # files that this process could not decode and has not decoded since: name -> reason

    def dataset(self, cfg, stream):
        """The dataset of a stream: train files for `train` and `bank`, held-out files for `val`."""
        videos = self.val if stream == "val" else self.train
        kind = {"random": NoiseDataset, "render": SceneDataset}.get(self.kind, ClipDataset)
        return kind(cfg, videos, self.root, stream, self.maneuvers, self.quarantine)


def list_data(cfg):
    """The videos that a config names, [] for built-in scenes. UsageError for a wrong path, or an empty one if so configured."""
    videos = find_videos(cfg.data_root, cfg.video_glob) if cfg.data_root else []
    if cfg.data_root and not videos and cfg.missing_data == "error":
        raise UsageError(f"data_root {cfg.data_root}: no video matches {cfg.video_glob!r} among {', '.join(VIDEO_SUFFIXES)} (--video_glob)")
    return videos


def open_data(cfg, videos, is_main, barrier):
    """Listed videos -> DataSource. Rank 0 writes built-in scenes where they are needed, the others wait at `barrier()`."""
    kind, root = "videos", cfg.data_root
    if not videos and cfg.data_root and cfg.missing_data == "random":
        kind, videos = "random", [VideoFile(f"random_{number}", "") for number in range(64)]
    elif not videos and cfg.scenes == "render":
        kind, videos = "render", [VideoFile(f"scene_{number}", "") for number in range(cfg.scene_clips)]
    elif not videos:
        kind, root = "scenes", os.path.join(cfg.out_dir, "scenes")
        if is_main:
            write_scenes(root, cfg)
        barrier()
        videos = find_videos(root, "*")
    made_up = kind in ("random", "render")
    train, val = split_videos(videos, cfg.val_fraction) if made_up else split_readable(cfg, videos)
    held_out = bool(val) and bool(train)
    maneuvers = [] if not cfg.lambda_supcon else list(SCENE_MANEUVERS) if kind == "render" else maneuver_names(videos, root)
    return DataSource(kind, root, train or videos, val or videos, maneuvers, held_out)


# ---------------------------------------------------------------------------------------------------------------------
# 7  Blocks: position code, attention, MLP
# ---------------------------------------------------------------------------------------------------------------------


def grid_positions(grid):
    """(t, h, w) sizes -> integer position of every token, int64 [t*h*w, 3], in (t, h, w) order."""
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes], 1)


def sincos_table(positions, dim):
    """Fixed 3D sine-cosine code: a third of the channels per axis, left-over channels zero. [L, 3] -> float32 [L, dim]."""
    third = dim // 6 * 2
    frequencies = 10000.0 ** (-torch.arange(third // 2, dtype=torch.float64) / (third // 2))
    angles = positions.double()[:, :, None] * frequencies  # [L, 3, third / 2]
    code = torch.cat([angles.sin(), angles.cos()], 2).flatten(1)
    return F.pad(code, (0, dim - code.shape[1])).float()


def rope_table(positions, head_dim):
    """3D rotary angles in V-JEPA 2's published form -> (cos, sin), float32 [L, head_dim].

    The channels of a head are split in three equal even parts (t, h, w); the rest stays unrotated (cos 1, sin 0). Each
    part repeats its frequency list twice while rotating neighbouring pairs: that is what the published weights expect.
    """
    part = 2 * (head_dim // 3 // 2)
    frequencies = 10000.0 ** (-torch.arange(part // 2, dtype=torch.float64) / (part / 2))
    angles = (positions.double()[:, :, None] * frequencies).repeat(1, 1, 2).flatten(1)  # [L, 3 * part]
    rest = (0, head_dim - 3 * part)
    return F.pad(angles.cos(), rest, value=1.0).float(), F.pad(angles.sin(), rest).float()


def rotate(x, cos, sin):
    """Rotate neighbouring channel pairs. x [B, nh, N, hd], cos and sin [B, 1, N, hd] -> like x."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def init_weights(module):
    """Truncated normal 0.02 on every matrix, zero biases, unit norms: the rule of all networks but the flow net."""
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(child.weight, std=0.02)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm) and child.elementwise_affine:
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)


MAX_PLAIN_SCORES = 2**23  # attention scores of one call that may be kept for backward


def attend(q, k, v):
    """Attention of queries [B, nh, Q, hd] to keys and values [B, nh, K, hd] -> [B, nh, Q, hd].

    torch's fused kernel, except for bf16 gradients on a CPU, where its backward is slow for few tokens: 8 clips of 2 heads took
    4.5 ms for 72 tokens and 9.6 ms for 216, as plain products 0.8 and 2.3 ms. Those keep the scores, so only few of them.
    """
    num_scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and num_scores <= MAX_PLAIN_SCORES:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention over tokens [B, N, dim] -> [B, N, dim], with optional rotary (cos, sin) of the tokens' positions."""

    def __init__(self, dim, num_heads, dropout):
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = num_heads, dim // num_heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, rope=None):
        B, N, dim = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # each [B, nh, N, hd]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        x = attend(q, k, v).transpose(1, 2).reshape(B, N, dim)  # [B, N, dim]
        return F.dropout(self.proj(x), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Queries [B, Q, dim] read keys and values that `project` made once from a context [B, K, context_dim]."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(context_dim, 2 * dim), nn.Linear(dim, dim)

    def project(self, context):
        """context [B, K, context_dim] -> (keys, values), each [B, nh, K, hd]."""
        B, K, _ = context.shape
        keys, values = self.kv(context).view(B, K, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, x, keys, values):
        B, Q, dim = x.shape
        q = self.q(x).view(B, Q, self.num_heads, self.head_dim).transpose(1, 2)  # [B, nh, Q, hd]
        x = attend(q, keys, values).transpose(1, 2).reshape(B, Q, dim)  # [B, Q, dim]
        return self.proj(x)


class MLP(nn.Module):
    """Linear, GELU, linear: [..., dim] -> [..., dim]."""

    def __init__(self, dim, hidden, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), dropout

    def forward(self, x):
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim, num_heads, mlp_ratio, dropout):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x, rope=None):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """A stack of blocks and a last norm over tokens at given positions: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, cfg, dim, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, cfg.num_heads, cfg.mlp_ratio, cfg.dropout) for _ in range(depth))
        self.norm, self.grad_checkpoint = nn.LayerNorm(dim, eps=1e-6), cfg.grad_checkpoint
        init_weights(self)
        for number, block in enumerate(self.blocks, 1):
            for last in (block.attn.proj, block.mlp.fc2):  # the residual stream keeps its scale with depth
                last.weight.data.div_(math.sqrt(2.0 * number))

    def forward(self, x, rope=None):
        for block in self.blocks:
            if self.grad_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint_activations(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.norm(x)


def gather_tokens(tokens, idx):
    """Pick tokens by position. tokens [B, L, D], idx [B, K] int64 in [0, L) -> [B, K, D]."""
    return tokens.gather(1, idx[..., None].expand(-1, -1, tokens.shape[-1]))


class PositionCode(nn.Module):
    """Positions of the clip's token grid as buffers: an additive code (sincos) or rotary angles (rope)."""

    def __init__(self, cfg, dim):
        super().__init__()
        self.is_rope = cfg.pos_embed == "rope"
        positions = grid_positions(cfg.grid)
        if self.is_rope:
            cos, sin = rope_table(positions, dim // cfg.num_heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        else:
            self.register_buffer("code", sincos_table(positions, dim), persistent=False)

    def add(self, x, idx):
        """x [B, N, dim] at positions idx [B, N] -> x with the additive code; unchanged for rope."""
        return x if self.is_rope else x + self.code[idx]

    def rope(self, idx):
        """(cos, sin) [B, 1, N, hd] of positions idx [B, N], or None for sincos."""
        return (self.cos[idx][:, None], self.sin[idx][:, None]) if self.is_rope else None


# ---------------------------------------------------------------------------------------------------------------------
# 8  Tokenizer and encoder: clip -> tokens -> context
# ---------------------------------------------------------------------------------------------------------------------


class Tokenizer(nn.Module):
    """Conv3D tubelet embedding: clip [B, T, C, H, W] -> tokens [B, L, D] in (t, h, w) order.

    Kernel and stride are equal, so the convolution is computed as one matrix product over cut-out tubelets, which was
    measured 1.4 times faster; the weight keeps Conv3d's layout [D, C, tubelet_t, patch, patch].
    """

    def __init__(self, cfg):
        super().__init__()
        kernel = (cfg.tubelet_t, cfg.patch, cfg.patch)
        self.proj = nn.Conv3d(cfg.channels, cfg.enc_dim, kernel_size=kernel, stride=kernel)
        init_weights(self)

    def forward(self, clip):
        B, T, C, H, W = clip.shape
        _, _, dt, p, _ = self.proj.weight.shape
        tubelets = clip.reshape(B, T // dt, dt, C, H // p, p, W // p, p).permute(0, 1, 4, 6, 3, 2, 5, 7)
        tubelets = tubelets.reshape(B, -1, C * dt * p * p)  # [B, L, C * dt * p * p]
        return F.linear(tubelets, self.proj.weight.flatten(1), self.proj.bias)  # [B, L, D]


class Encoder(nn.Module):
    """Vision transformer over chosen tokens of a clip."""

    def __init__(self, cfg):
        super().__init__()
        self.tokenizer, self.position = Tokenizer(cfg), PositionCode(cfg, cfg.enc_dim)
        self.trunk = Trunk(cfg, cfg.enc_dim, cfg.enc_depth)

    def encode(self, tokens, keep_idx):
        """tokens [B, L, D] of the tokenizer, keep_idx [B, K] -> context [B, K, D]; other tokens are never seen."""
        x = self.position.add(gather_tokens(tokens, keep_idx), keep_idx)  # [B, K, D]
        return self.trunk(x, self.position.rope(keep_idx))

    def forward(self, clip):
        """Whole clip [B, T, C, H, W], T at most num_frames -> [B, L, D]."""
        tokens = self.tokenizer(clip)  # [B, L, D]
        every = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return self.encode(tokens, every)


# ---------------------------------------------------------------------------------------------------------------------
# 9  Predictor: context + masked positions -> predicted targets
# ---------------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """Narrow transformer that fills masked positions from a context, with one mask token per family (short, long, SOON).

    A SOON position starts from what the context holds at its site in the last NOW tubelet, so that the trunk learns what
    changes and need not first learn to copy: val soon_skill of the proof preset after 400 steps 0.15 instead of -0.04.
    """

    def __init__(self, cfg):
        super().__init__()
        self.sites = cfg.sites
        self.embed, self.position = nn.Linear(cfg.enc_dim, cfg.pred_dim), PositionCode(cfg, cfg.pred_dim)
        self.mask_tokens = nn.Parameter(torch.zeros(SOON + 1, cfg.pred_dim))
        self.trunk, self.out = Trunk(cfg, cfg.pred_dim, cfg.pred_depth), nn.Linear(cfg.pred_dim, cfg.enc_dim)
        init_weights(self.embed)
        init_weights(self.out)
        nn.init.trunc_normal_(self.mask_tokens, std=0.02)

    def forward(self, context, keep_idx, mask_idx, family):
        """context [B, K, D] at keep_idx [B, K], positions mask_idx [B, M], family 0, 1 or SOON -> preds [B, M, D]."""
        idx = torch.cat([keep_idx, mask_idx], 1)  # [B, K + M]
        holes = self.mask_tokens[family].expand(*mask_idx.shape, -1)  # [B, M, P]
        seen = self.embed(context)  # [B, K, P]
        if family == SOON:
            holes = holes + seen[:, -self.sites :].repeat(1, mask_idx.shape[1] // self.sites, 1)
        x = self.position.add(torch.cat([seen, holes.to(seen.dtype)], 1), idx)  # [B, K + M, P]
        x = self.trunk(x, self.position.rope(idx))
        return self.out(x[:, keep_idx.shape[1] :])


# ---------------------------------------------------------------------------------------------------------------------
# 10  Outcome head: context -> outcome embedding
# ---------------------------------------------------------------------------------------------------------------------


class OutcomeHead(nn.Module):
    """Learned queries read the NOW context [B, K, D] -> one outcome embedding [B, D]."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.enc_dim
        self.queries = nn.Parameter(torch.zeros(cfg.outcome_queries, D))
        self.norm_context, self.cross = nn.LayerNorm(D, eps=1e-6), CrossAttention(D, D, cfg.num_heads)
        self.norm, self.mlp, self.out = nn.LayerNorm(D, eps=1e-6), MLP(D, int(D * cfg.mlp_ratio)), nn.Linear(D, D)
        init_weights(self)
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, context):
        queries = self.queries.expand(len(context), -1, -1)  # [B, Q, D]
        x = queries + self.cross(queries, *self.cross.project(self.norm_context(context)))
        x = x + self.mlp(self.norm(x))  # [B, Q, D]
        return self.out(x.mean(1))  # [B, D]


# ---------------------------------------------------------------------------------------------------------------------
# 11  Flow: context + noise -> future latents
# ---------------------------------------------------------------------------------------------------------------------
# A future is [F, D]: all SOON tokens, then `flow_chunks` means over equal stretches of EVENTUALLY. The point forecast
# says what NOW tells; FutureSpace holds the rest, the residual, in its leading directions; FlowNet samples there.


def flow_path(noise, y, tau):
    """Straight path from noise (tau 0) to data (tau 1): noise, y [..., N, k], tau [...] -> x_tau like y."""
    tau = tau[..., None, None]
    return (1 - tau) * noise + tau * y


def flow_velocity(y_hat, x_tau, tau):
    """Velocity at x_tau of the straight path that ends in y_hat; its blow-up at tau = 1 is cut at 0.05 (JiT, section 3)."""
    return (y_hat - x_tau) / (1 - tau).clamp_min(0.05)[..., None, None]


def velocity_loss(flow, projected, y, noise, tau):
    """Mean squared velocity error of a flow net: y, noise [B, R, N, k], tau [B, R], projected from the NOW context -> scalar."""
    x_tau = flow_path(noise, y, tau)
    y_hat = flow(x_tau, tau, projected)
    return (flow_velocity(y_hat, x_tau, tau) - flow_velocity(y, x_tau, tau)).square().mean()


def flow_positions(cfg, dim):
    """Position code of the noised tokens, pooled SOON grid then chunks -> [N, dim]; zeros for the one joint token."""
    if cfg.flow_joint:
        return torch.zeros(1, dim)
    soon_t = cfg.soon_frames // cfg.tubelet_t
    soon = grid_positions((soon_t, cfg.flow_pool, cfg.flow_pool))
    chunks = torch.tensor([[soon_t + 4 * (number + 1), 0, 0] for number in range(cfg.flow_chunks)])  # a time of their own
    return sincos_table(torch.cat([soon, chunks]), dim)


class FlowBlock(nn.Module):
    """MLP, and where several tokens are noised before it self-attention over them and cross-attention to NOW, each gated
    by the condition (AdaLN-zero)."""

    def __init__(self, dim, context_dim, num_heads, joint):
        super().__init__()
        self.attn = None if joint else Attention(dim, num_heads, 0.0)
        self.cross = None if joint else CrossAttention(dim, context_dim, num_heads)
        self.mlp = MLP(dim, 4 * dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(1 if joint else 3))
        self.modulate = nn.Linear(dim, 3 * len(self.norms) * dim)

    def forward(self, x, condition, keys, values):
        """x [B, R, N, W], condition [B, R, W], keys and values of the NOW context or None -> [B, R, N, W]."""
        B, R, N, W = x.shape
        parts = self.modulate(F.silu(condition))[:, :, None].chunk(3 * len(self.norms), -1)  # each [B, R, 1, W]
        if self.attn is not None:
            shift, scale, gate = parts[3:6]
            h = self.norms[1](x) * (1 + scale) + shift
            x = x + gate * self.attn(h.reshape(B * R, N, W)).reshape(B, R, N, W)
            shift, scale, gate = parts[6:9]
            h = self.norms[2](x) * (1 + scale) + shift
            x = x + gate * self.cross(h.reshape(B, R * N, W), keys, values).reshape(B, R, N, W)
        shift, scale, gate = parts[:3]
        return x + gate * self.mlp(self.norms[0](x) * (1 + scale) + shift)


class FlowNet(nn.Module):
    """Predicts the clean residual y from its noised version, the time tau and the NOW context.

    Where the whole future is one noised token, the flattened context conditions it through an MLP: a single query that
    cross-attends read the geometry of a fork far worse. Several tokens cross-attend to the context.
    """

    def __init__(self, cfg):
        super().__init__()
        W, joint = cfg.flow_dim, cfg.flow_joint
        self.embed, self.out = nn.Linear(cfg.flow_rank, W), nn.Linear(W, cfg.flow_rank)
        self.tau_mlp = nn.Sequential(nn.Linear(64, W), nn.SiLU(), nn.Linear(W, W))
        self.norm_context = nn.LayerNorm(cfg.enc_dim, eps=1e-6)
        self.whole = nn.Sequential(nn.Linear(cfg.now_tokens * cfg.enc_dim, W), nn.SiLU(), nn.Linear(W, W)) if joint else None
        self.blocks = nn.ModuleList(FlowBlock(W, cfg.enc_dim, cfg.flow_heads, joint) for _ in range(cfg.flow_depth))
        self.norm, self.modulate = nn.LayerNorm(W, eps=1e-6, elementwise_affine=False), nn.Linear(W, 2 * W)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            # at 0.02 what comes from NOW is a product of small numbers: 500 steps of `tiny` sampled as if NOW were not there
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        for zeroed in (*(block.modulate for block in self.blocks), self.modulate, self.out):
            nn.init.zeros_(zeroed.weight)  # every block starts as the identity and the first guess as the mean, zero
        self.register_buffer("code", flow_positions(cfg, W), persistent=False)
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.1), math.log(10.0), 32)), persistent=False)

    def project(self, context):
        """What every sample and step reuses of the NOW context [B, K, D]: its summary [B, W], or keys and values per block."""
        context = self.norm_context(context)
        if self.whole is not None:
            return self.whole(context.flatten(1)), [(None, None)] * len(self.blocks)
        return None, [block.cross.project(context) for block in self.blocks]

    def forward(self, x_tau, tau, projected):
        """x_tau [B, R, N, k], tau [B, R] -> y_hat [B, R, N, k]."""
        summary, keys_values = projected
        time = torch.logit(tau.float(), eps=1e-4)[..., None] * self.frequencies  # [B, R, 32], resolves both ends
        condition = self.tau_mlp(torch.cat([time.sin(), time.cos()], -1))  # [B, R, W]
        x = self.embed(x_tau) + self.code  # [B, R, N, W]
        if summary is not None:
            condition, x = condition + summary[:, None], x + summary[:, None, None]
        for block, (keys, values) in zip(self.blocks, keys_values):
            x = block(x, condition, keys, values)
        shift, scale = self.modulate(F.silu(condition))[:, :, None].chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift).float()


class FutureSpace(nn.Module):
    """Running linear map between a residual future [B, F, D] and its coordinates y [B, N, k].

    Small grids: N = 1 and the k directions span all tokens jointly. Large grids: SOON is pooled to flow_pool x flow_pool
    sites per tubelet, and the k directions span the channels of single pooled tokens. The directions are the leading ones
    of a forgetting covariance, followed by incremental PCA and turned as little as possible from update to update, so
    that the flow net's coordinates do not jump. One scale for all directions makes the mean variance of y 1: what NOW leaves
    open most stands out most. Whitened directions gave all of them, noise included, the same say (62 % against 52 % of fork
    samples between the branches after 600 steps on frozen latents).
    """

    def __init__(self, cfg):
        super().__init__()
        self.joint, self.num_chunks, self.pool_side, self.rank = cfg.flow_joint, cfg.flow_chunks, cfg.flow_pool, cfg.flow_rank
        self.soon_grid = (cfg.soon_frames // cfg.tubelet_t, *cfg.grid[1:])
        D, num_future = cfg.enc_dim, cfg.soon_tokens + cfg.flow_chunks
        span = num_future * D if self.joint else D
        for name, shape in (("variance", (D,)), ("rest_variance", (D,)), ("mean", (cfg.flow_tokens, span)), ("basis", (span, self.rank)),
                            ("covariance", (self.rank, self.rank)), ("scale", ()), ("explained", ()), ("updates", ())):
            self.register_buffer(name, torch.zeros(shape))
        self.variance.fill_(1.0)
        self.scale.fill_(1.0)

    def pool(self, residual):
        """Residual [B, F, D], in units of its channels' deviation, as rows of the space -> [B, N, span]."""
        scaled = residual / self.variance.sqrt()
        if self.joint:
            return scaled.flatten(1)[:, None]
        B, _, D = scaled.shape
        t, h, w = self.soon_grid
        soon = scaled[:, : t * h * w].reshape(B * t, h, w, D).permute(0, 3, 1, 2)
        soon = F.adaptive_avg_pool2d(soon, self.pool_side).permute(0, 2, 3, 1).reshape(B, -1, D)
        return torch.cat([soon, scaled[:, t * h * w :]], 1)

    def unpool(self, rows):
        """Rows [B, N, span] -> residual [B, F, D]; pooled sites are repeated over the tokens they stand for."""
        B = len(rows)
        if self.joint:
            return rows.reshape(B, -1, len(self.variance)) * self.variance.sqrt()
        t, h, w = self.soon_grid
        soon, chunks = rows[:, : -self.num_chunks], rows[:, -self.num_chunks :]
        soon = soon.reshape(B * t, self.pool_side, self.pool_side, -1).permute(0, 3, 1, 2)
        soon = F.interpolate(soon, size=(h, w), mode="nearest").permute(0, 2, 3, 1).reshape(B, t * h * w, -1)
        return torch.cat([soon, chunks], 1) * self.variance.sqrt()

    def encode(self, rows):
        """Rows [B, N, span] -> coordinates y [B, N, k]."""
        return (rows - self.mean) @ self.basis / self.scale

    def decode(self, y):
        """Coordinates y [B, N, k] -> residual [B, F, D]; what lies outside the directions comes back as its mean."""
        return self.unpool(y * self.scale @ self.basis.T + self.mean)

    def gaussian(self, noise):
        """Standard normal noise [B, N, k] -> coordinates with the residual's own covariance: the control `mean + noise`."""
        values, vectors = torch.linalg.eigh(self.covariance.double())
        return noise @ (vectors * values.clamp_min(0).sqrt()).float().T / self.scale

    @torch.no_grad()
    def absorb(self, rows, square):
        """Update all statistics from one step's rows [n, N, span] of all ranks, or None, and the mean squared residual [D]."""
        self.updates += 1
        rate = max(1.0 / float(self.updates), 0.01)
        self.variance.lerp_(square.clamp_min(1e-6), rate)
        if rows is None or self.updates < 2:
            return  # the first step only sets the scale; its rows were made without one
        rate = max(1.0 / (float(self.updates) - 1), 0.01)
        self.mean.lerp_(rows.mean(0), rate)
        centred = (rows - self.mean).flatten(0, 1)
        centred = centred[:: max(1, len(centred) // 256)]  # enough rows for the directions at a bounded cost
        inside = centred @ self.basis
        outside = centred - inside @ self.basis.T
        share = 1 - outside.square().sum() / centred.square().sum().clamp_min(1e-12)
        self.explained.lerp_(share, rate)  # how much of a future that was not yet absorbed lies in the directions
        self.rest_variance.lerp_(outside.square().reshape(-1, len(self.variance)).mean(0), rate)
        self.follow(centred, rate)

    def follow(self, centred, rate):
        """Incremental PCA with forgetting: refresh basis and covariance from centred rows [n, span]."""
        values, vectors = torch.linalg.eigh(self.covariance.double())
        root = (vectors * values.clamp_min(0).sqrt()).T  # [k, k], rows in basis coordinates
        old = root.float() @ self.basis.T * math.sqrt(1 - rate)  # [k, span]
        stacked = torch.cat([old, centred * math.sqrt(rate / len(centred))])
        gram = (stacked @ stacked.T).double()
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0)[: self.rank].clamp_min(0), vectors.flip(1)[:, : self.rank]
        solid = values > 1e-7 * values[0].clamp_min(1e-12)
        inverse = torch.where(solid, values.clamp_min(1e-30).rsqrt(), 0)
        fresh = stacked.T @ (vectors * inverse).float()  # [span, k], orthonormal where solid, else zero
        values = values * solid
        self.turn_to(fresh, values)

    def fit(self, rows):
        """Set all statistics but the channel scale to those of rows [n, N, span], which one frozen encoder made."""
        self.mean.copy_(rows.mean(0))
        centred = (rows - self.mean).flatten(0, 1)
        few = centred[:: math.ceil(len(centred) / 4096)]
        values, vectors = torch.linalg.eigh((few @ few.T).double() / len(few))
        values, vectors = values.flip(0)[: self.rank].clamp_min(0), vectors.flip(1)[:, : self.rank]
        fresh = few.T @ (vectors * torch.where(values > 1e-7 * values[0], values.clamp_min(1e-30).rsqrt(), 0)).float() / math.sqrt(len(few))
        pad = self.rank - len(values)  # fewer rows than directions
        self.turn_to(F.pad(fresh, (0, pad)), F.pad(values, (0, pad)))
        outside = centred - centred @ self.basis @ self.basis.T
        self.explained.copy_(1 - outside.square().sum() / centred.square().sum().clamp_min(1e-12))
        self.rest_variance.copy_(outside.square().reshape(-1, len(self.variance)).mean(0))

    def turn_to(self, fresh, values):
        """Take in orthonormal directions [span, k] with their variances [k], turned as little as possible from the old ones."""
        left, _, right = torch.linalg.svd((fresh.T @ self.basis).double())
        turn = (left @ right).float()  # the orthogonal matrix that brings the fresh basis closest to the old one
        self.basis.copy_(fresh @ turn)
        self.covariance.copy_(turn.T @ torch.diag(values.float()) @ turn)
        self.scale.copy_(values.sum().div(self.rank).clamp_min(1e-12).sqrt())


@torch.no_grad()
def sample_flow(flow, projected, noise, num_steps, shift):
    """Euler integration from noise [B, S, N, k] to y [B, S, N, k] on the shifted time grid; the last step returns y_hat."""
    x = noise
    for step in range(num_steps):
        tau, tau_next = (u / (u + shift * (1 - u)) for u in (step / num_steps, (step + 1) / num_steps))
        y_hat = flow(x, torch.full(x.shape[:2], tau, device=x.device), projected)
        x = y_hat if step == num_steps - 1 else x + (tau_next - tau) / (1 - tau) * (y_hat - x)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# 12  Losses and collapse gauges
# ---------------------------------------------------------------------------------------------------------------------


def layer_norm(x):
    """LayerNorm over channels without affine, in fp32: [..., D] -> [..., D]."""
    return F.layer_norm(x.float(), x.shape[-1:])


def l1_loss(preds, targets):
    """Mean absolute error in fp32 over all tokens and channels."""
    return (preds.float() - targets).abs().mean()


def full_precision(x):
    """Context in which autocast is off on x's device: losses and statistics are computed in fp32."""
    return torch.autocast(x.device.type, enabled=False)


def info_nce(outcome, keys, labels, absent, temperature):
    """Cross-entropy of cosine similarities (van den Oord et al. 2018, eq. 4).

    outcome [B, D]; keys [A, D] of which `absent` [A] rows take no part; labels [B], the row of each clip's own key
    -> (loss, share of clips whose own key ranks first).
    """
    with full_precision(outcome):
        logits = F.normalize(outcome.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T / temperature  # [B, A]
        logits = logits.masked_fill(absent[None], float("-inf"))
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


def sup_con(outcome, others, maneuver, other_maneuver, file, other_file, temperature):
    """Supervised contrast (Khosla et al. 2020, eq. 2): positives share a maneuver and come from other files.

    outcome [B, D] against others [A, D], with maneuver and file numbers of both; maneuver -1 is unknown and takes no part.
    `others` are the clips of all ranks, these included. Clips without a positive contribute nothing -> scalar, 0 if none has one.
    """
    with full_precision(outcome):
        logits = F.normalize(outcome.float(), dim=-1) @ F.normalize(others.float(), dim=-1).T / temperature  # [B, A]
    other = (file[:, None] != other_file[None]) & (other_maneuver >= 0)[None]
    positive = (other & (maneuver[:, None] == other_maneuver[None]) & (maneuver >= 0)[:, None]).float()
    log_share = logits - torch.logsumexp(logits.masked_fill(~other, -1e4), 1, keepdim=True)
    per_clip = -(positive * log_share).sum(1) / positive.sum(1).clamp_min(1)
    pairs = (other_file[:, None] != other_file[None]) & (other_maneuver[:, None] == other_maneuver[None]) & (other_maneuver >= 0)[None]
    anchors = pairs.any(1).sum().clamp_min(1)  # of all ranks: each rank's share then averages to the mean over all anchors
    return per_clip.sum() * (len(other_maneuver) // len(maneuver)) / anchors


def gauge_tokens(targets, per_clip=128):
    """About `per_clip` tokens of every clip, evenly spaced: enough for the gauges below. [B, L, D] -> [B, <= 2 * per_clip, D]."""
    return targets[:, :: max(1, targets.shape[1] // per_clip)]


def target_std(targets):
    """Standard deviation of each channel over all tokens of all clips, averaged over channels. targets [B, L, D]."""
    return targets.flatten(0, 1).std(0).mean()


def target_std_clips(targets):
    """Standard deviation over clips at one position, averaged: the part that position alone cannot fake. NaN for one clip."""
    return targets.std(0).mean() if len(targets) > 1 else torch.tensor(float("nan"))


def effective_rank(targets, max_tokens=2048):
    """exp(entropy of the normalised singular values) of centred tokens (RankMe, Garrido et al. 2023). [B, L, D] -> scalar."""
    tokens = targets.flatten(0, 1)
    tokens = tokens[:: max(1, len(tokens) // max_tokens)].float().cpu()
    if not torch.isfinite(tokens).all():
        return torch.tensor(float("nan"))  # a skipped step is logged as well; the SVD would raise
    singular = torch.linalg.svdvals(tokens - tokens.mean(0))
    share = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())


@torch.compiler.disable
def gather_rows(rows, world_size):
    """Rows [B, ...] of every rank without gradient -> [B*W, ...] in sample order (clip i of rank r is row i*W + r)."""
    parts = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# 13  Model: batch -> dict of losses (online + EMA target)
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as V-JEPA 2 normalises


class WorldModel(nn.Module):
    """All networks and all running state. `forward` is the only thing compiled and wrapped in DDP.

    Nothing in `forward` changes state: what a step leaves behind (queue keys, flow residuals) comes back as `carry` and
    is taken in by `absorb` after the optimizer step, on all ranks alike.
    """

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__()
        self.cfg, self.rank, self.world_size = cfg, rank, world_size
        self.online, self.predictor, self.outcome, self.flow = Encoder(cfg), Predictor(cfg), OutcomeHead(cfg), FlowNet(cfg)
        self.read_out = nn.Linear(cfg.enc_dim, cfg.flow_chunks * cfg.enc_dim)  # linear forecast of the EVENTUALLY chunks
        init_weights(self.read_out)
        self.target, self.flow_ema = copy.deepcopy(self.online), copy.deepcopy(self.flow)
        self.soon_predictor = None  # the predictor's copy that the flow phase fits to SOON alone
        self.space = FutureSpace(cfg)
        self.register_buffer("queue", torch.zeros(cfg.outcome_queue, cfg.enc_dim))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(1, 1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(1, 1, 3, 1, 1), persistent=False)
        self.register_buffer("now_idx", torch.arange(cfg.now_tokens), persistent=False)
        self.register_buffer("soon_idx", torch.arange(cfg.now_tokens, cfg.now_tokens + cfg.soon_tokens), persistent=False)
        frozen = [self.target, self.flow_ema]
        if not cfg.lambda_flow:
            frozen += [self.flow, self.read_out]
        elif cfg.flow_fit_clips:
            frozen.append(self.flow)  # it waits for the flow phase
        if not cfg.lambda_eventually and not cfg.lambda_supcon:
            frozen.append(self.outcome)
        if not cfg.lambda_vjepa and not cfg.lambda_soon:
            frozen.append(self.predictor)
        for module in frozen:
            module.requires_grad_(False)
        self.target.eval(), self.flow_ema.eval()

    def train(self, mode=True):
        """As nn.Module.train, but the target encoder and the flow EMA stay in eval mode for ever."""
        super().train(mode)
        self.target.eval(), self.flow_ema.eval()
        return self

    def normalise(self, frames):
        """uint8 frames -> clip in units of ImageNet's deviation; floats count as normalised already. [B, T, 3, H, W]."""
        if frames.dtype != torch.uint8:
            return frames
        return (frames.float() / 255 - self.image_mean) / self.image_std

    @torch.no_grad()
    def make_targets(self, clip):
        """clip [B, T, C, H, W] -> targets [B, L, D]: EMA encoder on the whole clip, LayerNorm without affine, no gradient."""
        return layer_norm(self.target(clip))

    def encode_now(self, tokens):
        """Tokens [B, >= NOW, D] -> context of the NOW tokens alone [B, K, D]."""
        return self.online.encode(tokens, self.now_idx.expand(len(tokens), -1))

    def predict_soon(self, context):
        """NOW context [B, K, D] -> predicted SOON targets [B, M, D]."""
        B, predictor = len(context), self.soon_predictor or self.predictor
        return predictor(context, self.now_idx.expand(B, -1), self.soon_idx.expand(B, -1), SOON)

    def split_soon_predictor(self):
        """Give SOON a predictor of its own, a copy of the shared one that does not learn yet -> that copy."""
        self.soon_predictor = copy.deepcopy(self.predictor).requires_grad_(False)
        return self.soon_predictor

    def now_loss(self, tokens, targets, batch):
        """Masked prediction over the whole clip: mean over the two mask families and all draws."""
        losses = []
        for family, name in enumerate(MASK_FAMILIES):
            for draw in range(self.cfg.mask_draws):
                keep_idx, mask_idx = batch[f"keep_{name}"][:, draw], batch[f"mask_{name}"][:, draw]
                context = self.online.encode(tokens, keep_idx)  # [B, K, D]
                preds = self.predictor(context, keep_idx, mask_idx, family)  # [B, M, D]
                losses.append(l1_loss(preds, gather_tokens(targets, mask_idx)))
        return torch.stack(losses).mean()

    def outcome_key(self, targets):
        """targets [B, L, D] -> mean EVENTUALLY target [B, D], minus the mean NOW target for `outcome_target` delta."""
        key = targets[:, -self.cfg.eventually_tubelets * self.cfg.sites :].mean(1)
        return key - targets[:, : self.cfg.now_tokens].mean(1) if self.cfg.outcome_target == "delta" else key

    def gather(self, rows):
        """Rows [B, ...] of this rank -> those of all ranks [B*W, ...], detached."""
        return gather_rows(rows.detach(), self.world_size) if self.world_size > 1 else rows.detach()

    def eventually_loss(self, outcome, key):
        """InfoNCE against the keys of all ranks and the filled part of the queue. [B, D], [B, D] -> (loss, top-1 share)."""
        keys = self.gather(key)  # [B * W, D]
        labels = torch.arange(len(key), device=key.device) * self.world_size + self.rank
        places = torch.arange(len(self.queue), device=key.device)
        absent = torch.cat([torch.zeros_like(keys[:, 0], dtype=torch.bool), places >= self.queue_filled])
        return info_nce(outcome, torch.cat([keys, self.queue]), labels, absent, self.cfg.outcome_temperature)

    def future_target(self, targets):
        """targets [B, L, D] -> a future [B, F, D]: the SOON tokens, then the chunk means of EVENTUALLY."""
        cfg, B = self.cfg, len(targets)
        soon = targets[:, cfg.now_tokens : cfg.now_tokens + cfg.soon_tokens]
        tubelets = targets[:, cfg.now_tokens + cfg.soon_tokens :].reshape(B, cfg.eventually_tubelets, cfg.sites, -1).mean(2)
        chunks = [part.mean(1) for part in tubelets.tensor_split(cfg.flow_chunks, 1)]
        return torch.cat([soon, torch.stack(chunks, 1)], 1)

    def forecast(self, context, soon_preds):
        """Point forecast of a future: SOON predictions [B, M, D] and a linear read-out of the mean NOW context -> [B, F, D]."""
        chunks = self.read_out(context.mean(1)).reshape(len(context), self.cfg.flow_chunks, -1)
        return torch.cat([soon_preds.float(), chunks.float()], 1)

    def flow_loss(self, context, soon_preds, targets, batch):
        """Velocity L2 in residual space plus L2 of the chunk read-out -> (loss, residual rows, squared residual).

        Where a flow phase is to come, the read-out and the residual's scale alone: no rows.
        """
        grad = self.cfg.flow_context_grad
        context = context.detach() + grad * (context - context.detach()) if grad else context.detach()
        future = self.future_target(targets)  # [B, F, D]
        point = self.forecast(context, soon_preds.detach())
        residual = future - point.detach()
        read_out_loss = (future - point)[:, -self.cfg.flow_chunks :].square().mean()
        if self.cfg.flow_fit_clips:
            return read_out_loss, None, residual.square().mean((0, 1))
        with full_precision(residual):
            rows = self.space.pool(residual)  # [B, N, span]
            y = self.space.encode(rows)[:, None].expand_as(batch["noise"])  # [B, R, N, k]
        loss = velocity_loss(self.flow, self.flow.project(context), y, batch["noise"], batch["tau"]) + read_out_loss
        return loss, rows, residual.square().mean((0, 1))

    def forward(self, batch):
        """Batch of device tensors -> (losses, gauges, carry): scalars with gradient, scalars without, tensors for `absorb`."""
        cfg = self.cfg
        clip = self.normalise(batch["frames"])  # [B, T, C, H, W]
        targets = self.make_targets(clip)  # [B, L, D]
        tokens = self.online.tokenizer(clip)  # [B, L, D]
        zero = targets.new_zeros(())
        losses = dict.fromkeys(("loss_vjepa", "loss_soon", "loss_eventually", "loss_flow"), zero)
        gauges, carry = {}, {"targets": targets}
        if cfg.lambda_vjepa:
            losses["loss_vjepa"] = self.now_loss(tokens, targets, batch)
        context = self.encode_now(tokens)  # [B, K, D]
        soon_preds = self.predict_soon(context)  # [B, M, D]
        soon_targets = gather_tokens(targets, self.soon_idx.expand(len(clip), -1))
        losses["loss_soon"] = l1_loss(soon_preds, soon_targets)
        last_now = targets[:, cfg.now_tokens - cfg.sites : cfg.now_tokens]  # [B, h*w, D], repeated as the forecast that nothing moves
        persistence = l1_loss(last_now.repeat(1, cfg.soon_tokens // cfg.sites, 1), soon_targets)
        gauges["persistence"] = persistence
        gauges["soon_skill"] = 1 - losses["loss_soon"].detach() / persistence
        outcome = self.outcome(context)  # [B, D]
        carry["key"] = self.outcome_key(targets)
        losses["loss_eventually"], gauges["outcome_top1"] = self.eventually_loss(outcome, carry["key"])
        if cfg.lambda_flow:
            losses["loss_flow"], rows, carry["square"] = self.flow_loss(context, soon_preds, targets, batch)
            if rows is not None:
                carry["rows"] = rows
        weights = {name: getattr(cfg, f"lambda_{name.removeprefix('loss_')}") for name in losses}
        total = sum((weights[name] * loss for name, loss in losses.items() if weights[name]), zero)
        if cfg.lambda_supcon:
            others, maneuver, file = (self.gather(rows) for rows in (outcome, batch["maneuver"], batch["file"]))
            losses["loss_supcon"] = sup_con(outcome, others, batch["maneuver"], maneuver, batch["file"], file, cfg.supcon_temperature)
            total = total + cfg.lambda_supcon * losses["loss_supcon"]
        losses = {"loss_total": total, **losses}
        return losses, gauges, carry

    @torch.no_grad()
    def absorb(self, carries):
        """Take in what the micro-steps of one optimizer step left: queue keys first in, first out, and flow residuals."""
        for carry in carries:
            if len(self.queue):
                keys = self.gather(carry["key"].to(self.queue.dtype))[-len(self.queue) :]
                self.queue.copy_(torch.cat([keys.flip(0), self.queue])[: len(self.queue)])
                self.queue_filled.copy_((self.queue_filled + len(keys)).clamp_max(len(self.queue)))
        if self.cfg.lambda_flow:
            square = torch.stack([carry["square"] for carry in carries]).mean(0)
            square = self.gather(square[None]).mean(0)
            rows = torch.cat([self.gather(carry["rows"].float()) for carry in carries]) if "rows" in carries[0] else None
            self.space.absorb(rows, square)
            for value in self.space.buffers() if self.world_size > 1 else ():
                dist.broadcast(value, 0)  # young directions hang on rounding: all ranks must hold the same ones

    @torch.no_grad()
    def update_ema(self, momentum, flow_momentum):
        """target <- m * target + (1 - m) * online, in fp32, over all parameters; the same for the flow net."""
        for slow, fast, m in ((self.target, self.online, momentum), (self.flow_ema, self.flow, flow_momentum)):
            torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1.0 - m)

    @torch.no_grad()
    def sample_futures(self, clip_or_context, num_samples, num_steps=None, generator=None):
        """Draw joint futures in target-latent space -> [B, S, F, D]: SOON tokens, then EVENTUALLY chunk means.

        Takes uint8 or normalised clips [B, >= now_frames, 3, H, W], of which only NOW is read, or a NOW context [B, K, D].
        `generator` must live on the model's device. Uses the flow net's EMA.
        """
        cfg, context = self.cfg, clip_or_context
        if context.dim() == 5:
            context = self.encode_now(self.online.tokenizer(self.normalise(context[:, : cfg.now_frames])))
        B, S = len(context), num_samples
        point = self.forecast(context, self.predict_soon(context))  # [B, F, D]
        noise = torch.randn((B, S, cfg.flow_tokens, cfg.flow_rank), generator=generator, device=context.device)
        y = sample_flow(self.flow_ema, self.flow_ema.project(context), noise, num_steps or cfg.flow_steps, cfg.tau_shift)
        residual = self.space.decode(y.flatten(0, 1)).unflatten(0, (B, S))  # [B, S, F, D]
        if cfg.flow_rest == "gaussian":
            scale = (self.space.rest_variance * self.space.variance).sqrt()
            residual = residual + scale * torch.randn(residual.shape, generator=generator, device=context.device)
        return point[:, None] + residual


def block_flops(num_tokens, dim, mlp_ratio):
    """Forward FLOP of one transformer block: four projections, the MLP, scores and their product with the values."""
    return 2 * num_tokens * dim * dim * (4 + 2 * mlp_ratio) + 4 * num_tokens**2 * dim


def flops_per_clip(cfg):
    """Multiply-adds times two of one training step on one clip, forward and backward, by module -> {name: FLOP}."""
    D, P, L, ratio = cfg.enc_dim, cfg.pred_dim, cfg.num_tokens, cfg.mlp_ratio
    kept = [family_visible(cfg, family) * cfg.grid[0] for family in MASK_FAMILIES]
    tokenizer = 2 * L * D * 3 * cfg.tubelet_t * cfg.patch**2
    online = cfg.mask_draws * sum(cfg.enc_depth * block_flops(k, D, ratio) for k in kept) + cfg.enc_depth * block_flops(cfg.now_tokens, D, ratio) + tokenizer
    predictor = cfg.pred_depth * (cfg.mask_draws * len(kept) * block_flops(L, P, ratio) + block_flops(cfg.now_tokens + cfg.soon_tokens, P, ratio))
    W, N, R = cfg.flow_dim, cfg.flow_tokens, cfg.flow_draws
    mixing = 0 if cfg.flow_joint else R * N * 2 * W * W * 6 + 4 * cfg.now_tokens * W * D + 4 * R * N * (cfg.now_tokens + N) * W
    flow = cfg.flow_depth * (R * N * 2 * W * W * 8 + mixing) + 2 * cfg.now_tokens * D * W * cfg.flow_joint
    again = 4 if cfg.grad_checkpoint else 3
    return {"online": again * online, "target": cfg.enc_depth * block_flops(L, D, ratio) + tokenizer, "predictor": again * predictor, "flow": 3 * flow * bool(cfg.lambda_flow)}


def memory_estimate_gb(cfg, num_parameters):
    """Weights, gradients, AdamW state and saved activations of a micro-step -> GB. 53 bytes per token, channel and block
    under autocast (70 in fp32) were measured with saved-tensor hooks; checkpointing keeps one input per block."""
    kept = cfg.mask_draws * sum(family_visible(cfg, family) * cfg.grid[0] for family in MASK_FAMILIES) + cfg.now_tokens
    filled = 2 * cfg.mask_draws * cfg.num_tokens + cfg.now_tokens + cfg.soon_tokens
    per_value = 5 if cfg.grad_checkpoint else 53 if cfg.amp else 70
    values = kept * cfg.enc_dim * cfg.enc_depth + filled * cfg.pred_dim * cfg.pred_depth
    return (num_parameters * 16 + cfg.batch_size * values * per_value) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# 14  Optimizer and schedules: step -> learning rate, EMA momentum
# ---------------------------------------------------------------------------------------------------------------------


def lr_at(step, cfg, peak):
    """Linear warm-up, then a cosine that reaches min_lr (at the same ratio for every group) at the last step."""
    if step < cfg.warmup:
        return peak * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(cfg.steps - 1 - cfg.warmup, 1)
    floor = min(cfg.min_lr / cfg.lr, 1.0) if cfg.lr else 0.0
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def ema_momentum_at(step, cfg):
    """Target momentum, linear from ema_momentum to ema_momentum_end where that is set."""
    end = cfg.ema_momentum_end or cfg.ema_momentum
    return cfg.ema_momentum + (end - cfg.ema_momentum) * step / max(cfg.steps - 1, 1)


def flow_momentum_at(step, cfg):
    """Momentum of the flow EMA: short at first, so that sampling follows the young net."""
    return min(cfg.flow_ema, (1 + step) / (10 + step))


def parameter_groups(model, cfg):
    """Every trainable parameter in exactly one group: matrices with decay; biases, norms, mask tokens and queries without;
    the flow net with its own learning rate and none."""
    groups = {"decay": [], "no_decay": [], "flow": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith(("flow.", "read_out.")):
            groups["flow"].append(parameter)
        elif parameter.ndim < 2 or name.endswith(("mask_tokens", "queries")):
            groups["no_decay"].append(parameter)
        else:
            groups["decay"].append(parameter)
    settings = {"decay": (cfg.weight_decay, cfg.lr), "no_decay": (0.0, cfg.lr), "flow": (0.0, cfg.flow_lr)}
    return [dict(params=members, name=name, weight_decay=settings[name][0], peak_lr=settings[name][1], lr=0.0)
            for name, members in groups.items() if members]


def build_optimizer(model, cfg):
    """AdamW (0.9, 0.95), fused: 3.5 times faster than the plain loop on the CPU as well."""
    return torch.optim.AdamW(parameter_groups(model, cfg), betas=(0.9, 0.95), eps=1e-8, fused=True)


def clip_gradients(optimizer, cfg):
    """Clip the world model and the flow net apart, so that neither's gradient shrinks the other's -> (norm, flow norm)."""
    sides = {False: [], True: []}
    for group in optimizer.param_groups:
        sides[group["name"] == "flow"] += [p.grad for p in group["params"] if p.grad is not None]
    norms = []
    for grads in sides.values():
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        if cfg.grad_clip and grads:
            torch._foreach_mul_(grads, (cfg.grad_clip / (norm + 1e-6)).clamp_max(1.0).to(grads[0].device))
        norms.append(norm)
    return norms


# ---------------------------------------------------------------------------------------------------------------------
# 15  Process: ranks, device, precision, seeds
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Process:
    """Who this process is and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    amp_dtype: torch.dtype | None  # None: fp32
    store: object = None  # the key-value store behind the process group

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def mean(self, values):
        """Mean over ranks of a list of floats -> list of floats."""
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu" if self.device.type != "cuda" else self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return (tensor / self.world_size).tolist()

    def any(self, *flags):
        """Whether each flag is set on at least one rank -> list of bools, the same on all ranks."""
        tensor = torch.tensor([int(flag) for flag in flags], device="cpu" if self.device.type != "cuda" else self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]

    def collect(self, thing):
        """Gather one Python object per rank -> list in rank order."""
        if self.world_size == 1:
            return [thing]
        things = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    def silent_ranks(self, seconds=3.0):
        """After a failed collective: the ranks that do not report the failure within a few seconds, dead or hung -> list."""
        deadline = time.monotonic() + seconds
        self.store.set(f"failed/{self.rank}", "1")
        while True:
            silent = [rank for rank in range(self.world_size) if not self.store.check([f"failed/{rank}"])]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(0.1)


def choose_device(name, local_rank):
    """`auto` takes cuda, then mps, then cpu; a device that is asked for and absent is an error, never replaced."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device = cuda: this machine has no usable CUDA device; use --device cpu or --device auto")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UsageError(f"device = cuda: local rank {local_rank} but {torch.cuda.device_count()} GPUs here; lower --nproc_per_node")
    if name == "mps" and not has_mps:
        raise UsageError("device = mps: not available on this machine; use --device cpu or --device auto")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def amp_dtype(cfg, device):
    """bf16 where the device has it, fp16 on older CUDA cards, None without --amp."""
    if not cfg.amp:
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def open_store(rank, world_size, timeout_s):
    """The key-value store through which ranks find each other, under a prefix of this attempt.

    torchrun serves one store for all its restarts, and a restarted rank would read addresses that dead ranks left in it. The
    count of restarts is the same for all ranks of one node only: several nodes need the launcher's own switch (README).
    """
    env, timeout = os.environ, timedelta(seconds=timeout_s)
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), None if served else world_size, is_master=not served and rank == 0, timeout=timeout)
    one_node = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    return dist.PrefixStore(f"attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0') if one_node else 'any'}", store)


def start_process(cfg):
    """Read torchrun's environment, choose the device, join the process group, seed -> Process."""
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = choose_device(cfg.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = None
    if world_size > 1:
        backend, store = "nccl" if device.type == "cuda" else "gloo", open_store(rank, world_size, cfg.dist_timeout_s)
        dist.init_process_group(backend, timeout=timedelta(seconds=cfg.dist_timeout_s), store=store, rank=rank, world_size=world_size,
                                device_id=device if device.type == "cuda" else None)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(cfg.seed)
    return Process(rank, world_size, device, amp_dtype(cfg, device), store)


def fingerprint(model):
    """Order-free integer sums over the bits of all parameters and buffers -> list, equal on two ranks when the weights are."""
    return [int(value.detach().reshape(-1).view(torch.int32).sum(dtype=torch.int64)) for value in model.state_dict().values()]


def digest(thing):
    """Short hash of a JSON-like value, for comparing it over ranks."""
    return hashlib.sha256(json.dumps(thing, default=str).encode()).hexdigest()[:16]


def check_ranks(process, **parts):
    """UserError naming the ranks whose values differ from rank 0's: said at once, instead of as a hang or a slow divergence."""
    told = process.collect(parts)
    for name in parts:
        odd = [rank for rank, other in enumerate(told) if other[name] != told[0][name]]
        if odd:
            raise UserError(f"ranks disagree: {name.replace('_', ' ')} of rank {', '.join(map(str, odd))} differs from rank 0's; start all ranks with the same "
                            "code, flags and data, from the same checkpoint")


def failed_collective(error):
    """Whether an exception is how a collective reports a peer that is gone or a timeout."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def autocast(process):
    """The autocast context of a forward pass; does nothing in fp32."""
    return torch.autocast(process.device.type, dtype=process.amp_dtype or torch.bfloat16, enabled=process.amp_dtype is not None)


@contextmanager
def spare_threads(num_busy):
    """Compute with `num_busy` CPU threads fewer (one at least): where loader workers fill their cores, threads that share
    them wait for each other. 3,200 clips of `proof` through frozen encoders, two cores, two workers: 34 s with two threads, 23 s with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - num_busy))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_device(batch, device):
    """Tensors of a batch on the device, `bad` left out."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "bad"}


class StopFlag:
    """Remembers that something asked the run to stop; the loop reads it between steps. A second signal ends at once.

    `reason` is "" while nothing has. Under torchrun the death of the launcher counts as well: nobody would end its ranks.
    """

    def __init__(self, signals=(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
        self.signal_name, self.launcher = "", os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.previous = {number: signal.signal(number, self.handle) for number in signals}

    @property
    def reason(self):
        orphaned = self.launcher is not None and os.getppid() != self.launcher
        return self.signal_name or ("the death of its launcher" if orphaned else "")

    def handle(self, number, frame):
        if self.signal_name:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name

    def restore(self):
        """Give the signals back to whoever held them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# 16  Checkpoint and log: state <-> disk
# ---------------------------------------------------------------------------------------------------------------------

LOG_KEYS = {
    "step": "optimizer steps done",
    "loss_total": "weighted sum of the losses that train",
    "loss_vjepa": "NOW: L1 on masked target latents, mean of the short and long masks",
    "loss_soon": "SOON: L1 on near-future target latents predicted from NOW alone",
    "loss_eventually": "EVENTUALLY: InfoNCE of the outcome embedding; ln(batch x ranks + filled queue) is chance",
    "loss_flow": "FLOW: squared velocity error in residual space, plus the squared error of the chunk read-out",
    "loss_supcon": "supervised contrast on maneuvers; only with lambda_supcon",
    "lr": "learning rate of the world model",
    "ema_momentum": "momentum of the target encoder",
    "grad_norm": "gradient norm of the world model before clipping",
    "flow_grad_norm": "gradient norm of the flow net before clipping",
    "target_std": "standard deviation of target channels over all tokens; near 0 = collapsed",
    "target_std_clips": "the same over clips at one position, which position alone cannot fake; nan for a single clip",
    "effective_rank": "exp(entropy) of the singular values of target tokens; 1 = collapsed, at most enc_dim",
    "soon_skill": "1 - L1(SOON prediction) / L1(last NOW tubelet repeated); above 0 = better than a world that stands still",
    "outcome_top1": "share of clips whose own future ranks first among all keys",
    "flow_explained": "share of the residual's variance inside the flow's directions",
    "clips_per_s": "clips per second over all ranks since the last line, warm-up left out",
    "data_wait": "share of that time spent waiting for the loader",
    "mem_gb": "peak memory in GB: GPU memory on cuda, else resident memory of rank 0",
    "bad_files": "files that could not be decoded so far, named in bad_files.jsonl",
    "skipped_steps": "steps skipped so far for a non-finite loss or gradient",
    "time": "seconds since the run started, over all restarts",
}
VAL_KEYS = {
    "val_loss_vjepa": "loss_vjepa on held-out clips",
    "val_loss_soon": "loss_soon on held-out clips",
    "val_loss_eventually": "loss_eventually on held-out clips",
    "val_loss_flow": "loss_flow on held-out clips",
    "val_soon_skill": "soon_skill on held-out clips",
    "val_outcome_top1": "outcome_top1 on held-out clips",
    "val_target_std": "target_std on held-out clips",
    "val_target_std_clips": "target_std_clips on held-out clips; nan when they are all the same clip",
    "val_effective_rank": "effective_rank on held-out clips",
    "val_flow_spread": "deviation among sampled futures over the deviation of real futures from the forecast; 0 = one mode, 1 = as wide as reality",
}
# Fields that decide what the weights mean or which samples come next: a checkpoint with other values is not resumed.
RESUME_MUST_MATCH = (
    "seed", "image_size", "num_frames", "channels", "now_frames", "soon_frames", "eventually_frames", "tubelet_t", "patch", "enc_dim",
    "enc_depth", "pred_dim", "pred_depth", "num_heads", "mlp_ratio", "pos_embed", "outcome_queries", "outcome_queue", "outcome_target",
    "flow_dim", "flow_depth", "flow_heads", "flow_rank", "flow_chunks", "flow_joint_max", "flow_pool",
)


@dataclass
class Progress:
    """How far a run is: optimizer steps and samples of all ranks done, seconds over all restarts, steps skipped, flow phase."""

    step: int = 0
    consumed: int = 0
    seconds: float = 0.0
    skipped: int = 0
    flow_fitted: bool = False  # the flow phase is done


class HashedFile:
    """A file open for writing that keeps the SHA-256 of what went into it and the error that a writer may hide behind its own."""

    def __init__(self, handle):
        self.handle, self.sha256, self.error = handle, hashlib.sha256(), None

    def write(self, data):
        try:
            self.handle.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self):
        self.handle.flush()


def sync_folder(folder):
    """Make renames in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path, write, announce=None):
    """Write through a temporary file, fsync, rename, fsync of the folder: at any moment the old or the new file is whole.

    `write` gets the open file; `announce`, if given, the SHA-256 of the new content before it takes the old one's place.
    OSError when the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as raw:
            handle = HashedFile(raw)
            try:
                write(handle)
            except RuntimeError:  # how torch.save reports that a write failed
                if handle.error is None:
                    raise
                raise handle.error from None
            raw.flush()
            os.fsync(raw.fileno())
        if announce is not None:
            announce(handle.sha256.hexdigest())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def hash_file(path):
    """The file beside a checkpoint that holds its SHA-256, in the format of sha256sum."""
    return path.with_name(path.name + ".sha256")


def known_hashes(path):
    """SHA-256 sums that a checkpoint may have -> list, [] where none is on record. Two while one file takes another's place."""
    try:
        return [line.split()[0] for line in hash_file(path).read_text(encoding="ascii").splitlines() if line.strip()]
    except FileNotFoundError:
        return []


def write_hashes(path, hashes):
    """Put SHA-256 sums on record for a checkpoint."""
    write_atomic(hash_file(path), lambda handle: handle.write("".join(f"{one}  {path.name}\n" for one in hashes).encode()))


def move_checkpoint(path, target):
    """Rename a checkpoint together with its hash, over an older file of that name if there is one."""
    hashes = known_hashes(path)
    if hashes:
        write_hashes(target, hashes + known_hashes(target) if target.exists() else hashes)
    elif hash_file(target).exists():
        hash_file(target).unlink()
    os.replace(path, target)
    hash_file(path).unlink(missing_ok=True)
    sync_folder(target.parent)


CHECKPOINT_FORMAT = 2  # 2: SOON positions start from the last seen tubelet
CHECKPOINT_KEYS = {"format", "step", "cfg", "online", "predictor", "outcome", "flow", "flow_ema", "read_out", "target", "opt", "scaler", "flow_stats",
                   "outcome_queue", "rng", "consumed", "world_size", "seconds", "skipped", "data", "source"}


@lru_cache(maxsize=1)
def source_text():
    """This file as text, read once when a run begins: what runs, whatever becomes of the file on disk."""
    return Path(__file__).read_text(encoding="utf-8")


def checkpoint_state(model, optimizer, scaler, source, process, progress):
    """Everything a restart needs as one dict of tensors and plain values; collective, since every rank adds its RNG."""
    cuda_rng = torch.cuda.get_rng_state(process.device) if process.device.type == "cuda" else None
    rng = process.collect({"torch": torch.get_rng_state(), "cuda": cuda_rng})
    return {
        "format": CHECKPOINT_FORMAT, **asdict(progress), "cfg": asdict(model.cfg), "online": model.online.state_dict(), "predictor": model.predictor.state_dict(),
        "outcome": model.outcome.state_dict(), "flow": model.flow.state_dict(), "flow_ema": model.flow_ema.state_dict(),
        "read_out": model.read_out.state_dict(), "target": model.target.state_dict(), "opt": optimizer.state_dict(),
        "soon_predictor": model.soon_predictor.state_dict() if model.soon_predictor else None,
        "scaler": scaler.state_dict(), "flow_stats": model.space.state_dict(),
        "outcome_queue": {"keys": model.queue, "filled": model.queue_filled}, "rng": rng,
        "world_size": process.world_size, "data": {"kind": source.kind, "root": source.root}, "source": source_text(),
    }


def checkpoint_files(out_dir):
    """Finished checkpoints of a run folder, oldest first -> [(step, path)]; ckpt_final.pt counts as the newest."""
    found = []
    for path in (Path(out_dir) / "checkpoints").glob("ckpt_*.pt"):
        match = re.fullmatch(r"ckpt_(\d+|final)\.pt", path.name)
        if match:
            found.append((math.inf if match[1] == "final" else int(match[1]), path))
    return sorted(found)


def save_checkpoint(state, out_dir, cfg, final):
    """Write ckpt_<step>.pt or ckpt_final.pt atomically with its hash, then drop what exceeds keep_last -> path. OSError when
    the disk refuses: what was there before still stands."""
    folder = Path(out_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("ckpt_final.pt" if final else f"ckpt_{state['step']}.pt")
    before = known_hashes(path) if path.exists() else []
    write_atomic(path, lambda handle: torch.save(state, handle), lambda sha256: write_hashes(path, [sha256, *before]))
    numbered = [old for step, old in checkpoint_files(out_dir) if step != math.inf]
    for old in numbered[: -cfg.keep_last]:
        old.unlink()
        hash_file(old).unlink(missing_ok=True)
    return path


class BadCheckpoint(UserError):
    """A checkpoint file that cannot be trusted."""


def damage_of(path):
    """What is wrong with the bytes of a checkpoint -> text, "" when they are those that were written."""
    hashes = known_hashes(path)
    if not hashes:  # copied without its hash: the archive's own checksums, which torch.load does not compare
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        return f"checksum of {damaged}" if damaged else ""
    sha256 = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            sha256.update(block)
    return "" if sha256.hexdigest() in hashes else f"its SHA-256 is {sha256.hexdigest()[:12]}..., not {hashes[0][:12]}..."


def load_checkpoint(path):
    """Read a checkpoint with weights_only -> state dict on the CPU. BadCheckpoint when it is damaged or not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"resume {path}: no such checkpoint")
    try:
        damage = damage_of(path)
        if damage:
            raise zipfile.BadZipFile(damage)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can make the unpickler raise anything; it is named and refused
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise BadCheckpoint(f"checkpoint {path}: not readable ({why}); use another one, or --resume never") from error
    missing = CHECKPOINT_KEYS - (state.keys() if isinstance(state, dict) else set())
    if missing:
        raise BadCheckpoint(f"checkpoint {path}: not a VJepa_AUTO_V2 checkpoint (it lacks {', '.join(sorted(missing))})")
    if state["format"] != CHECKPOINT_FORMAT:
        raise BadCheckpoint(f"checkpoint {path}: format {state['format']}, this file reads format {CHECKPOINT_FORMAT}")
    return state


def newest_checkpoint(out_dir, tell):
    """Newest checkpoint of a run folder that can be trusted -> (its state, its path), (None, None) in a folder without any.

    Damaged ones are told and passed over; when all are damaged that is a UserError: a run never starts anew by itself.
    """
    reasons = []
    for _, path in reversed(checkpoint_files(out_dir)):
        try:
            state = load_checkpoint(path)
        except BadCheckpoint as error:
            reasons.append(str(error))
        else:
            for reason in reasons:
                tell(f"WARNING: {reason}")
            return state, path
    if reasons:
        raise UserError(f"out_dir {out_dir}: none of its checkpoints can be read, so nothing starts over unasked; the newest: {reasons[0]}")
    return None, None


def check_same_run(state, cfg, path):
    """UsageError naming the fields in which a checkpoint and this config cannot be the same run."""
    plain = json.loads(json.dumps(asdict(cfg)))
    saved = json.loads(json.dumps(state["cfg"]))
    different = [f"{name} = {plain[name]} (checkpoint: {saved.get(name)})" for name in RESUME_MUST_MATCH if plain[name] != saved.get(name)]
    for name in ("lambda_vjepa", "lambda_soon", "lambda_eventually", "lambda_flow", "lambda_supcon"):
        if bool(plain[name]) != bool(saved.get(name)):  # decides which parameters the optimizer holds
            different.append(f"{name} = {plain[name]} (checkpoint: {saved.get(name)})")
    if different:
        raise UsageError(f"resume {path}: made by another config: {'; '.join(different)}; use the same values, another --out_dir, or --resume never")


def restore_model(state, model):
    """Load networks and running statistics of a checkpoint."""
    for name in ("online", "predictor", "outcome", "flow", "flow_ema", "read_out", "target"):
        getattr(model, name).load_state_dict(state[name])
    if state.get("soon_predictor"):
        model.split_soon_predictor().load_state_dict(state["soon_predictor"])
    model.space.load_state_dict(state["flow_stats"])
    model.queue.copy_(state["outcome_queue"]["keys"])
    model.queue_filled.copy_(state["outcome_queue"]["filled"])


def restore_run(state, optimizer, scaler, process):
    """Load optimizer, scaler and, when the number of ranks is the same, each rank's random state."""
    optimizer.load_state_dict(state["opt"])
    scaler.load_state_dict(state["scaler"])
    if state["world_size"] == process.world_size:
        rng = state["rng"][process.rank]
        torch.set_rng_state(rng["torch"])
        if rng["cuda"] is not None and process.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], process.device)


def load_model(path, device="cpu"):
    """Checkpoint -> (WorldModel in eval mode on the device, its config): what tools and notebooks start from."""
    state = load_checkpoint(path)
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in state["cfg"].items() if name in FIELD_TYPES}
    cfg = VJepaAutoV2Config(**saved)
    model = WorldModel(cfg)
    restore_model(state, model)
    return model.to(device).eval(), cfg


def run_info(cfg, argv, source):
    """Versions, commit, data and decoders (in the order in which they are tried) of a run for config.json -> dict."""
    git = shutil.which("git")
    head = subprocess.run([git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True) if git else None
    commit = head.stdout.strip() if head is not None and head.returncode == 0 else "unknown"
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "numpy", "av")}
    return {"versions": {"python": platform.python_version(), **versions}, "commit": commit, "command": list(argv),
            "data": {"kind": source.kind, "root": source.root, "train_files": len(source.train), "val_files": len(source.val)},
            "decoders": [name for name in DECODERS[cfg.decoder] if importlib.util.find_spec({"pyav": "av"}.get(name, name))]}


def format_number(value):
    """Short text of a logged value: four digits, integers whole."""
    return str(value) if isinstance(value, (int, str)) else f"{value:.4g}"


class RunLog:
    """Console text to stdout and train.log, records to metrics.jsonl, bad files to bad_files.jsonl. Silent off rank 0."""

    def __init__(self, cfg, is_main):
        self.folder, self.is_main, self.bad, self.trackers = Path(cfg.out_dir), is_main, {}, []
        self.bar_width, self.pending, self.evaluated = 0, {}, set()
        if not is_main:
            return
        for package in filter(None, cfg.track.split(",")):
            if importlib.util.find_spec(package) is None:
                raise UsageError(f"track = {cfg.track}: {package} is not installed (pip install {package}), or leave --track out")
        if "tensorboard" in cfg.track:
            from torch.utils.tensorboard import SummaryWriter

            self.trackers.append(("tensorboard", SummaryWriter(str(self.folder / "tensorboard"))))
        if "wandb" in cfg.track:
            import wandb

            self.trackers.append(("wandb", wandb.init(project="vjepa_auto_v2", name=self.folder.name, dir=cfg.out_dir, config=asdict(cfg), resume="allow")))

    def line(self, text):
        """One line of console text."""
        if self.is_main:
            self.clear_bar()
            print(text, flush=True)
            self.append("train.log", text + "\n")

    def append(self, name, text):
        """Add whole lines to a file of the run. While the disk refuses they wait in memory, and no half line stays behind."""
        path, waiting = self.folder / name, self.pending.pop(name, "") + text
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab") as handle:
                handle.write(waiting.encode())
        except OSError as error:
            self.pending[name] = waiting
            print(f"WARNING: {path} cannot be written ({error.strerror}); its lines wait in memory", file=sys.stderr)
            if path.exists():
                os.truncate(path, size)

    def bar(self, step, steps, text):
        """Progress bar on a terminal; nothing elsewhere, where plain lines tell."""
        if self.is_main and sys.stdout.isatty():
            filled = round(24 * step / steps)
            bar = f"[{'#' * filled}{'.' * (24 - filled)}] {step}/{steps} {text}"[: shutil.get_terminal_size().columns - 1]
            print("\r" + bar.ljust(self.bar_width), end="", flush=True)
            self.bar_width = len(bar)

    def clear_bar(self):
        if self.bar_width:
            print("\r" + " " * self.bar_width + "\r", end="")
            self.bar_width = 0

    def record(self, values, mark=""):
        """One object in metrics.jsonl and one `key:value` line, prefixed by `mark`."""
        if not self.is_main:
            return
        self.append("metrics.jsonl", json.dumps({key: value if value == value else None for key, value in values.items()}) + "\n")
        self.line(mark + " ".join(f"{key}:{format_number(value)}" for key, value in values.items()))
        for kind, tracker in self.trackers:
            numbers = {key: value for key, value in values.items() if key != "step"}
            if kind == "wandb":
                tracker.log(numbers, step=values["step"])
            else:
                for key, value in numbers.items():
                    tracker.add_scalar(key, value, values["step"])
                tracker.flush()

    def add_bad(self, entries):
        """Name files that could not be decoded, each once, and once more when it must not be opened again. This is history, not what counts now."""
        for name, reason in entries:
            if name in self.bad and (self.bad[name].startswith(QUARANTINED) or not reason.startswith(QUARANTINED)):
                continue
            self.bad[name] = reason
            if self.is_main:
                self.append("bad_files.jsonl", json.dumps({"path": name, "reason": reason}) + "\n")
                self.line(f"bad file: {name}: {reason}")

    def forget_after(self, step, finished):
        """Drop records beyond a resumed step, so that metrics.jsonl holds no step twice; read the bad files and evaluated steps known so far."""
        for name in ("metrics.jsonl", "bad_files.jsonl"):
            path = self.folder / name
            if not path.is_file():
                continue
            rows = []
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(text))
                except json.JSONDecodeError:
                    continue  # a line torn by a kill
            if name == "bad_files.jsonl":
                self.bad = {row["path"]: row["reason"] for row in rows}
                continue
            self.evaluated = {row["step"] for row in rows if "val_loss_soon" in row}
            if self.is_main:
                kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] < step or row["step"] == step and not (finished and "val_loss_soon" in row))
                write_atomic(path, lambda handle: handle.write(kept.encode()))


def sweep_folder(folder):
    """Delete what writers that were killed left behind: temporary files, and hashes without their checkpoint."""
    for stale in [*folder.glob(".*.tmp"), *(folder / "checkpoints").glob(".*.tmp")]:
        stale.unlink(missing_ok=True)
    for hashes in (folder / "checkpoints").glob("*.sha256"):
        if not hashes.with_suffix("").exists():
            hashes.unlink()


def open_folder(cfg):
    """Create out_dir and prove that it is writable. UserError says what is in the way."""
    folder = Path(cfg.out_dir)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomic(folder / ".writable", lambda handle: handle.write(b"ok"))
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"out_dir {cfg.out_dir}: cannot be written ({error.strerror}); choose another --out_dir") from error


class RunFolder:
    """out_dir while a run owns it: nobody else writes there, and status.json says how the run stands and how it ended.

    The lock is a POSIX record lock on .lease, which the kernel drops with the process, whatever ends it: a lease cannot go
    stale. Forked loader workers do not inherit it. Ranks other than 0 hold nothing.
    """

    def __init__(self, cfg, process):
        self.folder, self.lease, self.step, self.reason, self.closing = Path(cfg.out_dir), None, 0, "", []
        if not process.is_main:
            return
        open_folder(cfg)
        handle = open(self.folder / ".lease", "a+", encoding="utf-8")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            handle.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"out_dir {cfg.out_dir}: another run writes there ({owner}); stop it, or choose another --out_dir") from error
            raise UserError(f"out_dir {cfg.out_dir}: its file system gives no locks ({error.strerror}), so nothing would keep a second run away; "
                            "choose another --out_dir") from error
        handle.truncate(0)
        handle.write(f"host {socket.gethostname()}, pid {os.getpid()}")
        handle.flush()
        self.lease = handle
        sweep_folder(self.folder)
        self.status("running")

    def status(self, state, exit_code=None):
        """Write status.json. state: running | finished | stopped | failed; running with a dead pid means killed."""
        if self.lease is None:
            return
        values = {"state": state, "exit_code": exit_code, "step": self.step, "reason": self.reason, "host": socket.gethostname(), "pid": os.getpid(),
                  "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        write_atomic(self.folder / "status.json", lambda handle: handle.write(json.dumps(values).encode()))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Leave the folder and close what is in `closing`; a full disk must not hide the error that ended the run behind its own."""
        for thing in self.closing:
            thing.close()
        if self.lease is None:
            return
        try:
            if error is not None:
                self.reason = " ".join(f"{kind.__name__}: {error}".split())[:500]
                self.status("failed", getattr(error, "exit_code", EXIT_ERROR))
        except OSError as second:
            print(f"status.json could not be written ({second.strerror})", file=sys.stderr)
        finally:
            self.lease.close()
            self.lease = None


def previous_folder(folder):
    """A new folder previous_<k> for what a run no longer goes on from."""
    aside = next(name for k in itertools.count(1) if not (name := Path(folder) / f"previous_{k}").exists())
    aside.mkdir()
    return aside


def put_aside(cfg):
    """`--resume never` in a used folder: move the old run's files to previous_<k> instead of mixing with or losing them."""
    folder = Path(cfg.out_dir)
    old = [folder / name for name in ("checkpoints", "metrics.jsonl", "train.log", "bad_files.jsonl", "config.json", "futures.png")]
    old = [path for path in old if path.is_file() or path.is_dir() and any(path.iterdir())]
    aside = previous_folder(folder) if old else None
    for path in old:
        path.rename(aside / path.name)
    (folder / "checkpoints").mkdir(exist_ok=True)


def peak_memory_gb(device):
    """Peak memory of this process in GB: allocated GPU memory on cuda, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


# ---------------------------------------------------------------------------------------------------------------------
# 17  Evaluation: model -> metrics, picture
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def flow_spread(model, context, future, num_samples=8):
    """Deviation among sampled futures over the deviation of real futures from the forecast. [B, K, D], [B, F, D] -> float."""
    generator = torch.Generator(context.device).manual_seed(0)
    samples = model.sample_futures(context, num_samples, generator=generator)  # [B, S, F, D]
    residual = future - model.forecast(context, model.predict_soon(context))
    return float(samples.std(1).square().mean().sqrt() / residual.square().mean().sqrt())


@torch.no_grad()
def validate(model, source, process):
    """Losses and gauges on val_clips held-out clips, the same ones every time -> (dict of val_* floats, bad files)."""
    cfg = model.cfg
    num_batches = max(1, math.ceil(cfg.val_clips / (cfg.batch_size * process.world_size)))
    sampler = StepSampler(0, num_batches, cfg.batch_size, process.rank, process.world_size)
    loader = open_loader(source, cfg, "val", sampler, min(cfg.num_workers, 2), process.device.type == "cuda")
    was_training, sums, targets, looks, bad, spread = model.training, {}, [], [], [], 0.0
    model.eval()
    for batch in loader:
        bad += batch["bad"]
        batch = to_device(batch, process.device)
        with autocast(process):
            losses, gauges, carry = model.forward(batch)
        for name, value in {**losses, **gauges}.items():
            sums[name] = sums.get(name, 0.0) + float(value) / num_batches
        if not targets and cfg.lambda_flow:
            context = model.encode_now(model.online.tokenizer(model.normalise(batch["frames"][:, : cfg.now_frames])))
            spread = flow_spread(model, context, model.future_target(carry["targets"]))
        targets.append(gauge_tokens(carry["targets"]))
        looks.append(batch["frames"].float().flatten(1).mean(1))
    model.train(was_training)
    targets, looks = torch.cat(targets), torch.cat(looks)
    several = bool((looks != looks[0]).any())  # one short held-out file gives the same clip again and again: nothing to compare
    # a ratio of means: clips in which nothing moves would blow up a mean of ratios
    sums["soon_skill"] = 1 - sums["loss_soon"] / sums["persistence"]
    sums |= {"target_std": float(target_std(targets)), "target_std_clips": float(target_std_clips(targets)) if several else float("nan"),
             "effective_rank": float(effective_rank(targets)), "flow_spread": spread}
    names = [key for key in VAL_KEYS if key.removeprefix("val_") in sums]
    means = process.mean([sums[key.removeprefix("val_")] for key in names])
    return dict(zip(names, means)), bad


def verdict(metrics, cfg):
    """One sentence about a run's health from its last evaluation."""
    skill, rank, across = metrics["val_soon_skill"], metrics["val_effective_rank"], metrics["val_target_std_clips"]
    std, what = (across, "across clips") if math.isfinite(across) else (metrics["val_target_std"], "(one held-out clip)")
    collapsed = std < 0.2 or rank < 0.05 * cfg.enc_dim
    health = "COLLAPSED: lower lr, raise ema_momentum or warm up longer" if collapsed else "no sign of collapse"
    moves = "better than a world that stands still" if skill > 0 else "no better than a world that stands still"
    return (f"soon_skill {skill:.2f} ({moves}), sampled futures spread {metrics['val_flow_spread']:.2f} of real ones, "
            f"effective rank {rank:.1f} of {cfg.enc_dim}, target std {what} {std:.2f}: {health}")


@torch.no_grad()
def encode_bank(model, source, process, num_clips):
    """Real futures to look samples up in -> (futures [n, F * D] on the CPU, sample numbers in the `bank` stream, file numbers)."""
    cfg, size = model.cfg, min(model.cfg.batch_size, num_clips)
    sampler = StepSampler(0, math.ceil(num_clips / size), size, 0, 1)
    futures, numbers, files = [], [], []
    for batch in open_loader(source, cfg, "bank", sampler, min(cfg.num_workers, 2)):
        with autocast(process):
            targets = model.make_targets(model.normalise(batch["frames"].to(process.device)))
        usable = (batch["file"] >= 0).tolist()
        futures.append(model.future_target(targets)[torch.tensor(usable)].flatten(1).cpu())
        numbers += [int(number) for number, ok in zip(batch["index"], usable) if ok]
        files += [int(number) for number, ok in zip(batch["file"], usable) if ok]
    return torch.cat(futures), numbers, files


def picture_canvas(num_blocks, num_samples, columns, side, caption):
    """Blank page and drawing tools for futures.png -> (image, draw, font, height of one block)."""
    from PIL import Image, ImageDraw, ImageFont

    block_h = (1 + num_samples) * (side[0] + 4) + 30
    image = Image.new("RGB", (130 + columns * (side[1] + 4) + 20, num_blocks * block_h + 86), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    words, line, y = caption.split(), "", num_blocks * block_h + 12
    for word in [*words, ""]:
        if not word or draw.textlength(f"{line} {word}", font=font) > image.width - 24:
            draw.text((12, y), line, fill="black", font=font)
            line, y = "", y + 18
        line = f"{line} {word}".strip()
    return image, draw, font, block_h


@torch.no_grad()
def draw_futures(model, source, process, metrics, path, num_clips=3, num_samples=4):
    """futures.png: for some val clips the NOW frames, the true SOON frames, and for each sampled future the SOON frames of
    the nearest real clip in latent space, with the verdict under them. The clip's own file never answers for a sample."""
    from PIL import Image

    cfg, data = model.cfg, {stream: source.dataset(model.cfg, stream) for stream in ("val", "bank")}
    budget = (2e15 if process.device.type == "cuda" else 2e13) / flops_per_clip(cfg)["target"]
    bank, bank_numbers, bank_files = encode_bank(model, source, process, int(min(max(budget, 16), 256)))
    grow = max(1, round(96 / min(cfg.height, cfg.width)))
    side = cfg.height * grow, cfg.width * grow
    now = sorted({0, cfg.now_frames - 1})
    soon = np.unique(np.linspace(0, cfg.soon_frames - 1, 5).round().astype(int)) + cfg.now_frames
    image, draw, font, block_h = picture_canvas(num_clips, num_samples, len(now) + len(soon), side, verdict(metrics, cfg))
    for block in range(num_clips):
        frames, number, _, _, _ = data["val"].decode(block, *side)
        clip = torch.from_numpy(np.ascontiguousarray(data["val"].decode(block, cfg.height, cfg.width)[0].transpose(0, 3, 1, 2)))
        generator = torch.Generator(process.device).manual_seed(block)
        samples = model.sample_futures(clip[None].to(process.device), num_samples, generator=generator)[0].flatten(1).cpu()
        own = data["val"].videos[number].name
        other = torch.tensor([data["bank"].videos[file].name != own for file in bank_files])
        other = other if other.any() else torch.ones_like(other)  # a single file has only itself to show
        distance = torch.cdist(samples, bank).masked_fill(~other, float("inf"))
        rows = [("truth", frames)] + [(f"sample {k + 1}", data["bank"].decode(bank_numbers[int(distance[k].argmin())], *side)[0]) for k in range(num_samples)]
        for row, (title, shown) in enumerate(rows):
            y = block * block_h + 24 + row * (side[0] + 4)
            draw.text((12, y + side[0] // 2 - 8), title if row == 0 else f"{title}: nearest", fill="black", font=font)
            for column, frame in enumerate([*now, *soon]):
                if row and column < len(now):
                    continue
                x = 130 + column * (side[1] + 4) + (12 if column >= len(now) else 0)
                image.paste(Image.fromarray(np.ascontiguousarray(shown[frame])), (x, y))
                if row == 0:
                    title = f"NOW {frame + 1}" if column < len(now) else f"SOON {frame + 1 - cfg.now_frames}"
                    draw.text((x, y - 18), title, fill="black", font=font)  # frames, not seconds: short files are sampled denser
    image.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# 18  Training: Config -> checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def measure_speed(process):
    """TFLOP/s of a matrix product on the device in the run's precision: the yardstick of the first time estimate."""
    size = 4096 if process.device.type == "cuda" else 768
    x = torch.randn(size, size, device=process.device, dtype=process.amp_dtype or torch.float32)
    float((x @ x).sum())
    start, rounds = time.perf_counter(), 5
    for _ in range(rounds):
        y = x @ x
    float(y.sum())
    return rounds * 2 * size**3 / (time.perf_counter() - start) / 1e12


def describe_time(seconds):
    """Seconds -> '3.2 days', '4.1 h', '12 min' or '40 s'."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def print_summary(cfg, overrides, model, source, process, log):
    """The start-up lines: device, precision, parameters, tokens, cost, memory, data, overrides and a first time estimate."""
    device = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = {None: "fp32", torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast + scaler"}[process.amp_dtype]
    sizes = {name: sum(p.numel() for p in getattr(model, name).parameters()) / 1e6 for name in ("online", "predictor", "outcome", "flow")}
    flops = flops_per_clip(cfg)
    clips = cfg.batch_size * cfg.grad_accum * process.world_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + sum(p.numel() for p in model.target.parameters()) / 4
    seconds = sum(flops.values()) * cfg.batch_size * cfg.grad_accum / (measure_speed(process) * 0.4e12)
    log.line(f"device: {process.device.type} ({device}), {process.world_size} process(es), {precision}{', compiled' if cfg.compile else ''}")
    log.line("parameters: " + ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items()) + " (target = online)")
    log.line(f"clip: {cfg.num_frames} frames of {cfg.height} x {cfg.width}, {'%g per second' % cfg.clip_fps if cfg.clip_fps else 'spread over the file'} "
             f"-> grid {' x '.join(map(str, cfg.grid))} = {cfg.num_tokens} tokens; visible under a mask: "
             + ", ".join(f"{name} {family_visible(cfg, name)}/{cfg.sites} sites" for name in MASK_FAMILIES))
    log.line(f"step: {clips} clips, {sum(flops.values()) * clips / 1e12:.3g} TFLOP ("
             + ", ".join(f"{name} {value / sum(flops.values()):.0%}" for name, value in flops.items())
             + f"); memory about {memory_estimate_gb(cfg, trained):.1f} GB per process plus the framework")
    held = "" if source.held_out else "; ONE FILE ONLY: validation uses the training file"
    log.line(f"data: {source.kind}, {len(source.train)} train and {len(source.val)} val files under {source.root or 'no folder'}{held}")
    log.line(f"schedule: {cfg.steps} steps, warm-up {cfg.warmup}" + (f" (warmup_steps {cfg.warmup_steps} capped at a tenth of steps)" if cfg.warmup < cfg.warmup_steps else ""))
    log.line("set: " + (", ".join(f"{name}={value}" for name, value in overrides.items()) or "nothing, all defaults"))
    estimate = seconds * cfg.steps
    log.line(f"first estimate: {describe_time(estimate)} for {cfg.steps} steps at 40 % of this device's matrix speed"
             + ("; THAT IS DAYS: think of --preset small or tiny, fewer --steps, or a faster device" if estimate > 2 * 86400 else ""))


def retire_later(cfg, step, resumed_from):
    """Going on from a checkpoint that is not the last of its folder: move later ones to previous_<k>, where `auto` does not
    find them. A final checkpoint that the run is extended from becomes a numbered one."""
    folder, aside = Path(cfg.out_dir), None
    for saved_step, path in checkpoint_files(folder):
        if path.resolve() == Path(resumed_from).resolve():
            if saved_step == math.inf and step < cfg.steps:
                move_checkpoint(path, path.with_name(f"ckpt_{step}.pt"))
        elif saved_step > step:
            aside = aside or previous_folder(folder)
            move_checkpoint(path, aside / path.name)


def open_run(cfg, process, log):
    """Find what to resume from, the same on all ranks -> (state or None, its path). Refuses another run's checkpoint."""
    state, path = None, "" if cfg.resume in ("auto", "never") else cfg.resume
    if process.is_main and cfg.resume == "auto":
        state, path = newest_checkpoint(cfg.out_dir, log.line)
    path = process.collect(str(path or ""))[0]
    if not path:
        return None, None
    state = state or load_checkpoint(path)
    check_same_run(state, cfg, path)
    return state, path


def warm_up_ddp(model, wrapped, cfg, process):
    """One pass forward and back that is thrown away: DDP regroups its gradient buckets after its first backward.

    Ring sums then add in another order, so that without this a resumed run would differ in the last bits from one that was
    never stopped, from three ranks on.
    """
    noise = NoiseDataset(cfg, [VideoFile("noise", "")], "", "train")
    with autocast(process):
        losses, _, _ = wrapped(to_device(collate([noise[index] for index in range(cfg.batch_size)]), process.device))
    losses["loss_total"].backward()
    model.zero_grad(set_to_none=True)


def save_run(model, optimizer, scaler, source, process, progress, log, final=False, must=False):
    """Gather the state of all ranks, which must still hold the same weights, and let rank 0 write it.

    Where the disk refuses, that is told and the run goes on to its next checkpoint; with `must` it is a UserError.
    """
    check_ranks(process, weights=digest(fingerprint(model)))
    state = checkpoint_state(model, optimizer, scaler, source, process, progress)
    if not process.is_main:
        return
    try:
        save_checkpoint(state, model.cfg.out_dir, model.cfg, final)
    except OSError as error:
        newest = checkpoint_files(model.cfg.out_dir)
        text = f"checkpoint of step {progress.step} could not be saved ({error.strerror}); {newest[-1][1] if newest else 'no earlier one'} stands"
        if must:
            raise UserError(f"{text}; make room and run the same command again") from error
        log.line(f"WARNING: {text}, the next try is in {model.cfg.ckpt_every} steps")


def take_step(model, wrapped, optimizer, scaler, batches, step, cfg, process):
    """One optimizer step over its micro-batches -> (metrics as tensors, carries, whether it was finite on every rank)."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg, group["peak_lr"])
    metrics, carries = {}, []
    for number, batch in enumerate(batches):
        wrapped.require_backward_grad_sync = number == len(batches) - 1  # read by DDP alone: ranks average once per step
        with autocast(process):
            losses, gauges, carry = wrapped(batch)
        scaler.scale(losses["loss_total"] / len(batches)).backward()
        carries.append({name: value.detach() for name, value in carry.items()})
        for name, value in {**losses, **gauges}.items():
            metrics[name] = metrics.get(name, 0) + value.detach() / len(batches)
    scaler.unscale_(optimizer)
    metrics["grad_norm"], metrics["flow_grad_norm"] = clip_gradients(optimizer, cfg)
    numbers = torch.stack([metrics[name].float().to(process.device) for name in ("loss_total", "grad_norm", "flow_grad_norm")])
    return metrics, carries, bool(torch.isfinite(numbers).all())


def apply_step(model, optimizer, scaler, carries, step, cfg):
    """Update weights, EMA copies, queue and flow statistics: the only place where training state changes."""
    scaler.step(optimizer)
    model.update_ema(ema_momentum_at(step, cfg), flow_momentum_at(step, cfg))
    model.absorb(carries)


def log_values(metrics, carries, model, process, log, clock, progress):
    """The record of one logged step, losses and gauges as means over ranks, in the order of LOG_KEYS."""
    cfg = model.cfg
    targets = torch.cat([gauge_tokens(carry["targets"]) for carry in carries])
    values = {name: float(value) for name, value in metrics.items() if name in LOG_KEYS}
    values |= {"target_std": float(target_std(targets)), "target_std_clips": float(target_std_clips(targets)), "effective_rank": float(effective_rank(targets))}
    means = dict(zip(values, process.mean(list(values.values()))))
    means |= {
        "step": progress.step, "lr": lr_at(progress.step - 1, cfg, cfg.lr), "ema_momentum": ema_momentum_at(progress.step - 1, cfg),
        "flow_explained": float(model.space.explained), "clips_per_s": cfg.batch_size * cfg.grad_accum * process.world_size / clock.seconds_per_step,
        "data_wait": clock.data_wait, "mem_gb": peak_memory_gb(process.device), "bad_files": len(log.bad), "skipped_steps": progress.skipped,
        "time": progress.seconds,
    }
    return {key: means[key] for key in LOG_KEYS if key in means}


def check_bad_files(log, entries, source, cfg, process):
    """Name new bad files of all ranks; stop when too large a share of the data is bad now: named by this attempt of the run and not decoded since."""
    told, failing = zip(*process.collect((entries, source.failing)))
    log.add_bad([entry for part in told for entry in part])
    failing = {name: reason for part in failing for name, reason in part.items()}
    for side, videos in (("training", source.train), ("validation", source.val)):
        if all(video.name in failing for video in videos):  # blank frames would stand in for them
            raise UserError(f"all {len(videos)} {side} files cannot be decoded; the first is {videos[0].name}: {failing[videos[0].name]}; "
                            f"all are in {cfg.out_dir}/bad_files.jsonl")
    total = len({video.name for video in source.train + source.val})
    if len(failing) / total > cfg.max_bad_fraction:
        name, reason = next(iter(failing.items()))
        raise UserError(f"{len(failing)} of {total} files cannot be decoded (max_bad_fraction {cfg.max_bad_fraction}); the first is {name}: {reason}; "
                        f"all are in {cfg.out_dir}/bad_files.jsonl")


class Clock:
    """Seconds per step and loader share since the last log line. The first steps after a start do not count."""

    def __init__(self, warmup_steps=3):
        self.seconds_per_step, self.data_wait = float("nan"), float("nan")  # of the last full interval
        self.skip, self.steps, self.waited, self.since = warmup_steps, 0, 0.0, time.perf_counter()

    def tick(self, waited):
        """Count one step, of which `waited` seconds went to the loader."""
        if self.skip:
            self.skip -= 1
            self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()
        else:
            self.steps, self.waited = self.steps + 1, self.waited + waited

    def close(self):
        """End an interval: set seconds_per_step and data_wait where a step was counted, NaN before the first, and start anew."""
        passed = time.perf_counter() - self.since
        if self.steps:
            self.seconds_per_step, self.data_wait = passed / self.steps, self.waited / passed
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def skip_pause(self, began):
        """Leave out what has passed since `began` (a perf_counter reading): evaluations and saves are no training time."""
        self.since += time.perf_counter() - began


@torch.no_grad()
def cache_latents(model, source, process, start, num_clips, log, stop):
    """Frozen latents of this rank's clips, from sample `start` on -> (contexts [n, K, D], futures [n, F, D]) on the CPU, None when stopped."""
    cfg, size = model.cfg, 4 * model.cfg.batch_size
    kept = torch.bfloat16 if cfg.amp else torch.float32
    num_batches = math.ceil(num_clips / (size * process.world_size))
    sampler = StepSampler(start, num_batches, size, process.rank, process.world_size)
    cached, began, told = None, time.perf_counter(), 1
    for number, batch in enumerate(open_loader(source, cfg, "train", sampler, cfg.num_workers)):
        with torch.no_grad(), autocast(process):
            clip = model.normalise(batch["frames"].to(process.device))
            parts = model.encode_now(model.online.tokenizer(clip[:, : cfg.now_frames])), model.future_target(model.make_targets(clip))
        if cached is None:  # taken whole: joining pieces in the end would need the memory twice
            cached = tuple(torch.empty((num_batches * size, *part.shape[1:]), dtype=kept) for part in parts)
        for whole, part in zip(cached, parts):
            whole[number * size : (number + 1) * size] = part
        log.bar(number + 1, num_batches, "latents for the flow phase")
        if time.perf_counter() - began > 60 * told:
            told += 1
            log.line(f"latents for the flow phase: {(number + 1) * size * process.world_size} of {num_clips} clips")
        if number % 16 == 0 and process.any(bool(stop.reason))[0]:
            return None
    return cached


def residual_rows(model, contexts, futures, process):
    """What the point forecast leaves open of cached futures [n, F, D] -> rows of the space [n, N, span] on the device."""
    context = contexts.to(process.device)
    with torch.no_grad(), autocast(process):
        residual = futures.to(process.device).float() - model.forecast(context, model.predict_soon(context))
    with full_precision(residual):
        return model.space.pool(residual)


def flow_coordinates(model, contexts, futures, process):
    """Fit the space to the residuals of the first 2,048 clips over all ranks -> coordinates y [n, N, k] of all of them on the CPU."""
    size = 4 * model.cfg.batch_size
    parts = [slice(begin, begin + size) for begin in range(0, len(contexts), size)]
    few = math.ceil(2048 / (size * process.world_size))
    first = [residual_rows(model, contexts[part], futures[part], process) for part in parts[:few]]
    model.space.fit(model.gather(torch.cat(first)))
    for value in model.space.buffers() if process.world_size > 1 else ():
        dist.broadcast(value, 0)
    ys = []
    for number, part in enumerate(parts):
        rows = first[number] if number < few else residual_rows(model, contexts[part], futures[part], process)
        with full_precision(rows):
            ys.append(model.space.encode(rows).cpu())
    return torch.cat(ys)


def draw_pairs(cfg, contexts, y, chosen, rng, device):
    """Cached pairs `chosen` with fresh noise and times from a CPU generator -> (contexts [b, K, D], y and noise [b, R, N, k], tau [b, R])."""
    shape = (len(chosen), cfg.flow_draws)
    noise = torch.randn((*shape, *y.shape[1:]), generator=rng).to(device)
    tau = shifted_tau(torch.randn(shape, generator=rng), cfg.tau_shift).to(device)
    return contexts[chosen].to(device), y[chosen, None].to(device).expand_as(noise), noise, tau


def fit_step(net, optimizer, loss, lr, cfg, process):
    """One optimizer step of a net that is fitted on frozen latents, its gradients averaged over ranks."""
    loss.backward()
    for parameter in net.parameters() if process.world_size > 1 else ():
        dist.all_reduce(parameter.grad.div_(process.world_size))
    torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def fit_rng(cfg, step, process):
    """The generator of one step of a fit on frozen latents."""
    return torch.Generator().manual_seed((cfg.seed * 1_000_003 + step) * 4096 + process.rank)


def soon_fit_loss(model, contexts, futures, kept, process, step=None):
    """SOON's loss on the clips that a step draws from the first `kept`; without a step on held-out ones, NaN where there are none."""
    cfg, chosen = model.cfg, torch.arange(kept, len(contexts))[:512]
    if step is not None:
        chosen = torch.randint(kept, (cfg.soon_fit_batch,), generator=fit_rng(cfg, step, process))
    with autocast(process):
        preds = model.predict_soon(contexts[chosen].to(process.device))
    return l1_loss(preds, futures[chosen, : cfg.soon_tokens].to(process.device))


def flow_fit_loss(model, contexts, y, kept, process, step=None):
    """The flow net's loss on the clips that a step draws from the first `kept`; without a step its EMA's on held-out ones, NaN where there are none."""
    cfg, net, rng, chosen = model.cfg, model.flow_ema, torch.Generator().manual_seed(model.cfg.seed), torch.arange(kept, len(y))[:512]
    if step is not None:
        net, rng = model.flow, fit_rng(cfg, step, process)
        chosen = torch.randint(kept, (cfg.flow_fit_batch,), generator=rng)
    context, clean, noise, tau = draw_pairs(cfg, contexts, y, chosen, rng, process.device)
    with autocast(process):
        return velocity_loss(net, net.project(context), clean, noise, tau)


def fit_net(net, slow, num_steps, loss_at, name, key, began, cfg, process, log, stop):
    """Fit a net on frozen latents, and its EMA `slow` where there is one, until a signal ends it.

    loss_at(step) is the loss of a step, loss_at() the held-out one; the log's lines begin with `name` and call the loss `key`.
    """
    optimizer = torch.optim.AdamW(net.requires_grad_(True).parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = replace(cfg, steps=num_steps, warmup_steps=num_steps)  # capped at a tenth
    for step in range(num_steps):
        loss = loss_at(step)
        fit_step(net, optimizer, loss, lr_at(step, schedule, cfg.flow_fit_lr), cfg, process)
        if slow is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(slow.parameters()), list(net.parameters()), 1 - flow_momentum_at(step, cfg))
        log.bar(step + 1, num_steps, name)
        if (step + 1) % (4 * cfg.log_every) == 0 or step + 1 == num_steps:
            with torch.no_grad():
                held = float(loss_at())
            log.line(f"{name} step:{step + 1} {key}:{float(loss.detach()):.4g} held_out:{held:.4g} time:{time.perf_counter() - began:.0f}")
            if process.any(bool(stop.reason))[0]:
                break
    net.requires_grad_(False)


def fit_soon(model, contexts, futures, kept, process, log, stop):
    """Fit a copy of the predictor to the SOON tokens of the first `kept` clips with the loss of training.

    A clip costs a small part of a training step here (no encoder, no mask of the whole clip), and its targets stand still: proof
    preset after 3,000 steps, skill over persistence on held-out scenes 0.19 before and 0.27 after 1,500 steps.
    """
    cfg, name, net = model.cfg, "flow phase, SOON", model.split_soon_predictor()
    loss_at = partial(soon_fit_loss, model, contexts, futures, kept, process)
    with torch.no_grad():
        log.line(f"{name} step:0 held_out:{float(loss_at()):.4g}")
    fit_net(net, None, cfg.soon_fit_steps, loss_at, name, "loss_soon", time.perf_counter(), cfg, process, log, stop)


def fit_flow(model, source, process, log, stop, progress):
    """The flow phase: the encoders stand still, so latents are made once and seen often -> False when stopped by a signal.

    First SOON's copy of the predictor, then the flow net over what that forecast leaves open. One clip in twenty is held
    out; when its loss rises while the other falls, the net learns clips by heart: more flow_fit_clips.
    """
    cfg, began = model.cfg, time.perf_counter()
    model.eval()
    with spare_threads(cfg.num_workers):
        cached = cache_latents(model, source, process, progress.consumed, cfg.flow_fit_clips, log, stop)
    if cached is None:
        return False
    contexts, futures = cached
    kept = max(1, len(contexts) - len(contexts) // 20)
    log.line(f"flow phase: latents of {len(contexts) * process.world_size} clips in {describe_time(time.perf_counter() - began)}")
    if cfg.soon_fit_steps:
        fit_soon(model, contexts, futures, kept, process, log, stop)
    if process.any(bool(stop.reason))[0]:
        return False
    y = flow_coordinates(model, contexts, futures, process)
    del cached, futures
    log.line(f"flow phase: {float(model.space.explained):.0%} of the residual in {cfg.flow_rank} directions; {cfg.flow_fit_steps} steps")
    model.flow_ema.load_state_dict(model.flow.state_dict())
    loss_at = partial(flow_fit_loss, model, contexts, y, kept, process)
    fit_net(model.flow, model.flow_ema, cfg.flow_fit_steps, loss_at, "flow phase", "loss_flow", began, cfg, process, log, stop)
    return not process.any(bool(stop.reason))[0]


def finish(model, optimizer, scaler, source, process, log, mark, progress):
    """Save ckpt_final.pt, evaluate on held-out clips, draw futures.png -> exit code."""
    cfg = model.cfg
    save_run(model, optimizer, scaler, source, process, progress, log, final=True, must=True)
    values, bad = validate(model, source, process)
    check_bad_files(log, bad, source, cfg, process)
    log.record({"step": progress.step, **values}, mark)
    log.line("verdict: " + verdict(values, cfg))
    if cfg.picture and process.is_main:
        model.eval()
        draw_futures(model, source, process, values, Path(cfg.out_dir) / "futures.png")
        log.line(f"picture: {cfg.out_dir}/futures.png")
    process.barrier()
    log.line(f"done: {progress.step} steps in {describe_time(progress.seconds)}; checkpoint {cfg.out_dir}/checkpoints/ckpt_final.pt")
    return EXIT_OK


def is_due(every, progress, cfg):
    """Whether something done every so many steps is done after the last one; the end of a run has its own saving and evaluation."""
    return bool(every) and 0 < progress.step < cfg.steps and progress.step % every == 0


def end_early(stop, folder, log, where):
    """Say what stopped the run and where -> exit code."""
    folder.reason = stop.reason or "a signal on another rank"
    log.line(f"stopped by {folder.reason} {where}")
    stop.restore()
    return EXIT_STOPPED


def run(cfg, overrides, argv, videos, process, folder):
    """The run itself, inside its folder -> exit code."""
    # -- data
    began = time.perf_counter()
    check_ranks(process, config=digest(asdict(cfg)), data_listing=digest([video.name for video in videos]), code=digest(source_text()))
    if process.is_main and cfg.resume == "never":
        put_aside(cfg)
    log = RunLog(cfg, process.is_main)
    state, resumed_from = open_run(cfg, process, log)
    if not cfg.data_root:
        log.line(f"no --data_root: training on built-in driving scenes, {cfg.scene_clips} clips in {cfg.out_dir}/scenes")
    elif not videos:
        log.line(f"WARNING: no video under {cfg.data_root} matches {cfg.video_glob!r}; going on with data:{cfg.missing_data} (--missing_data error refuses instead)")
    source = open_data(cfg, videos, process.is_main, process.barrier)
    mark = "" if source.kind == "videos" else f"data:{source.kind} "

    # -- model
    model = WorldModel(cfg, process.rank, process.world_size).to(process.device)
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.amp_dtype == torch.float16)
    if cfg.compile:
        model.compile(dynamic=False)
    wrapped = model
    if process.world_size > 1:
        devices = [process.device] if process.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
        warm_up_ddp(model, wrapped, cfg, process)
    torch.manual_seed(cfg.seed + 1 + process.rank)  # dropout differs between ranks, weights do not

    # -- resume
    progress, skipped_in_row, timed = Progress(), 0, False
    if process.is_main:
        config = {**run_info(cfg, argv, source), "config": asdict(cfg)}
        write_atomic(Path(cfg.out_dir) / "config.json", lambda handle: handle.write(json.dumps(config, indent=2).encode()))
    print_summary(cfg, overrides, model, source, process, log)
    if state is not None:
        try:
            restore_model(state, model)
            restore_run(state, optimizer, scaler, process)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"checkpoint {resumed_from}: does not fit this model ({str(error).splitlines()[0]})") from error
        progress = Progress(**{field.name: state[field.name] for field in fields(Progress)})
        progress.flow_fitted &= progress.step >= cfg.steps  # a run that is extended fits its flow anew at its new end
        if not progress.flow_fitted:
            model.soon_predictor = None
        log.line(f"resumed from {resumed_from} at step {progress.step}")
        if process.is_main:
            retire_later(cfg, progress.step, resumed_from)
        del state
    log.forget_after(progress.step, progress.step >= cfg.steps)
    source.quarantine.update((name, reason) for name, reason in log.bad.items() if reason.startswith(QUARANTINED))
    check_ranks(process, weights=digest(fingerprint(model)), quarantine=digest(sorted(source.quarantine)))
    began -= progress.seconds

    # -- loop
    stop, clock, bad, last = StopFlag(), Clock(), [], {}
    model.train()
    sampler = StepSampler(progress.consumed, (cfg.steps - progress.step) * cfg.grad_accum, cfg.batch_size, process.rank, process.world_size)
    loader = open_loader(source, cfg, "train", sampler, cfg.num_workers, process.device.type == "cuda")
    folder.closing.append(loader)
    if is_due(cfg.val_every, progress, cfg) and process.any(progress.step not in log.evaluated)[0]:  # the stop came before it
        values, bad = validate(model, source, process)
        log.record({"step": progress.step, **values}, mark)
    while progress.step < cfg.steps:
        # -- batch
        folder.step = progress.step
        waiting = time.perf_counter()
        batches = [next(loader) for _ in range(cfg.grad_accum)]
        waited = time.perf_counter() - waiting
        bad += [entry for batch in batches for entry in batch["bad"]]
        if process.any(bool(bad))[0]:
            check_bad_files(log, bad, source, cfg, process)
            bad = []
        # -- update
        step, batches = progress.step, [to_device(batch, process.device) for batch in batches]
        metrics, carries, finite = take_step(model, wrapped, optimizer, scaler, batches, step, cfg, process)
        broken, stopping = process.any(not finite, bool(stop.reason))
        skipped_in_row = skipped_in_row + 1 if broken else 0
        if broken:
            progress.skipped += 1
            files = [source.train[number].name for batch in batches for number in batch["file"].tolist() if number >= 0 and not finite]
            named = [f"rank {rank}: {', '.join(dict.fromkeys(names))}" for rank, names in enumerate(process.collect(files)) if names]
            log.line(f"step {step + 1} skipped: loss or gradient not finite; its files: {'; '.join(named) or 'none'}")
            if skipped_in_row >= cfg.max_skipped_steps:
                raise UserError(f"{skipped_in_row} steps in a row were not finite; lower --lr or --flow_lr, or look at the data; the last checkpoint stands")
        else:
            apply_step(model, optimizer, scaler, carries, step, cfg)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.step, progress.consumed = step + 1, progress.consumed + cfg.batch_size * cfg.grad_accum * process.world_size
        progress.seconds = time.perf_counter() - began
        clock.tick(waited)
        log.bar(progress.step, cfg.steps, f"{describe_time(progress.seconds)} {' '.join(f'{key}:{format_number(value)}' for key, value in last.items())}")
        # -- log
        if progress.step % cfg.log_every == 0 or progress.step == cfg.steps or stopping:
            clock.close()
            record = log_values(metrics, carries, model, process, log, clock, progress)
            log.record(record, mark)
            if not timed and math.isfinite(clock.seconds_per_step):
                timed = True
                log.line(f"{clock.seconds_per_step:.3g} s per step: {describe_time(clock.seconds_per_step * (cfg.steps - progress.step))} to go")
            last = {key: record[key] for key in ("loss_total", "soon_skill", "clips_per_s")}
        # -- evaluate and save
        pause = time.perf_counter()
        if is_due(cfg.val_every, progress, cfg) and not stopping:
            values, bad = validate(model, source, process)
            log.record({"step": progress.step, **values}, mark)
        if stopping or is_due(cfg.ckpt_every, progress, cfg):
            folder.step = progress.step
            save_run(model, optimizer, scaler, source, process, progress, log, must=stopping)
        clock.skip_pause(pause)
        if stopping:
            return end_early(stop, folder, log, f"at step {progress.step}, saved; run the same command to go on")

    # -- flow phase
    loader.close()
    folder.step = progress.step
    if cfg.flow_fit_clips and cfg.lambda_flow and not progress.flow_fitted:
        save_run(model, optimizer, scaler, source, process, progress, log)  # a stop in the flow phase costs the flow phase alone
        progress.flow_fitted = fit_flow(model, source, process, log, stop, progress)
        if not progress.flow_fitted:
            return end_early(stop, folder, log, "in the flow phase; run the same command to start that phase again")
        progress.seconds = time.perf_counter() - began

    # -- end
    stop.restore()
    return finish(model, optimizer, scaler, source, process, log, mark, progress)


def train(cfg, overrides=None, argv=()):
    """Run a config from its first or its last saved step to the end -> exit code. Owns out_dir and says how the run ended."""
    validate_config(cfg)
    videos = list_data(cfg)
    process = start_process(cfg)
    try:
        with RunFolder(cfg, process) as folder:
            code = run(cfg, overrides or {}, argv, videos, process, folder)
            folder.status("finished" if code == EXIT_OK else "stopped", code)
            return code
    except RuntimeError as error:
        if process.world_size == 1 or not failed_collective(error):
            raise
        silent = process.silent_ranks()
        who = f"rank {', '.join(map(str, silent))} did not answer: dead, hung or stopped" if silent else "all ranks are alive: a slow network?"
        raise UserError(f"ranks lost each other at step {folder.step} ({' '.join(str(error).split())[:120]}); {who}; run the same command to go on "
                        f"from the last checkpoint (dist_timeout_s = {cfg.dist_timeout_s:g})") from error


def start(argv):
    """Command line -> exit code. What a user can cause or cure is a UserError or an OSError."""
    cfg, overrides, print_config = resolve_config(argv)
    if print_config:
        print(json.dumps(asdict(cfg), indent=2))
        return EXIT_OK
    try:
        return train(cfg, overrides, argv)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):  # the CPU allocator has no type of its own
            raise
        peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else ""
        raise UserError(f"out of memory ({' '.join(str(error).split())[:160]}{peak}); in order of effect: lower --batch_size (raise --grad_accum), "
                        "--grad_checkpoint, --amp, smaller --image_size or --num_frames, --preset small; nothing saved before is harmed") from error
    except OSError as error:
        raise UserError(f"{error}; nothing saved before is harmed, run the same command to go on") from error
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def report_errors(command, *args):
    """Run what a command line asks for -> its exit code, 0 for none. Every error a user can cause ends in one line on stderr."""
    try:
        return command(*args) or EXIT_OK
    except UserError as error:
        print(f"error: {one_line(' '.join(str(error).split()), 3000)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {one_line(' '.join(str(error).split()), 3000)}", file=sys.stderr)
        return EXIT_ERROR


def main(argv=None):
    """Command line -> exit code."""
    return report_errors(start, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
