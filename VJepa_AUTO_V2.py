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

Names: `frames` are the decoder's uint8 pictures, `clip` is normalised video, `context` the online encoder's output on
kept tokens, `targets` the target encoder's output, `preds` the predictor's. tau is flow time: 0 is noise, 1 is data.

Sources: V-JEPA (arXiv 2404.08471), V-JEPA 2 (2506.09985), InfoNCE (1807.03748), SupCon (2004.11362), flow matching
(2210.02747), clean-data prediction under a velocity loss (JiT, 2511.13720), time shift by dimension (RAE, 2510.11690),
RankMe (2210.02885), incremental PCA (Ross et al. 2008), AdaLN-zero (DiT, 2212.09748).
"""

import os
import signal

# what asks a run to stop; where this file is what was started, it waits until StopFlag listens, seconds later
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # torch's threads wait for each other in loops of so many rounds, before the system may give their core away. The
    # default, 300000, is fine while nobody else wants it: loader workers do, and a step then takes up to ten times as
    # long (records/speed). Read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import bisect
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
import operator
import platform
import re
import resource
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
import tokenize
import traceback
import typing
import warnings
import weakref
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from functools import cached_property, lru_cache, partial, reduce
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as checkpoint_activations

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75


class UserError(Exception):
    """A cause the user can remove. `report_errors` prints it as one last line and returns `exit_code`."""

    exit_code = EXIT_ERROR


class UsageError(UserError):
    """Bad flags, config or paths."""

    exit_code = EXIT_USAGE


class Stopped(Exception):
    """A signal ended a wait or long work before its result was there. Whoever has something to save saves it first."""


# ---------------------------------------------------------------------------------------------------------------------
# 1  Config: every number that shapes a run
# ---------------------------------------------------------------------------------------------------------------------
# One dataclass drives a run: VJepaAutoV2Config. What it shares with other worlds (worlds/) stands in the two above it.

SCENE_KINDS = ("fork", "brake", "lane", "occluder", "steady", "steered")  # new ones last: the index seeds a scene
ACTION_SIGNALS = ("speed", "steer", "yaw_rate", "accel")  # of an annotation, that may be actions
SCENE_MIXES = {"default": "fork=3,brake=2,lane=2,occluder=1,steady=2", "fork_only": "fork=1"}


def mix_shares(scene_mix):
    """A value of scene_mix -> share of every kind in SCENE_KINDS, summing to 1. ValueError when it cannot be read."""
    shares = dict.fromkeys(SCENE_KINDS, 0.0)
    for part in SCENE_MIXES.get(scene_mix, scene_mix).split(","):
        kind, _, weight = part.strip().partition("=")
        if (kind := kind.strip()) not in shares:
            raise ValueError(f"{kind!r} is not one of {', '.join((*SCENE_MIXES, *SCENE_KINDS))}")
        shares[kind] = float(weight)
    total = sum(shares.values())
    if not (0 < total < math.inf) or min(shares.values()) < 0:
        raise ValueError("shares must be zero or above, one of them above")
    return [share / total for share in shares.values()]


def broken(*rules):
    """Rows (whether a rule is broken, the field to name, the rule) -> [(field, rule)] of those that are."""
    return [(name, rule) for is_broken, name, rule in rules if is_broken]


# fmt: off


@dataclass
class RunConfig:
    """What every world needs. Edit a default to change it for every run; pass `--field value` to change one run.

    A world derives its own dataclass, with what it adds to these tables: PRESETS (name -> {field: value}), RANGES
    (field -> (smallest, largest), None leaves a side open), CHOICES, MUST_MATCH (what decides what weights mean or
    which samples come next: a checkpoint with other values is not resumed) and `rules`.
    """

    # -- run
    preset: str = "base"  # a named set of overrides (base = these defaults)
    data_root: str = ""  # videos or pictures: folder, file or list (csv, txt, jsonl); empty = built-in driving scenes
    video_glob: str = "*"  # *.mp4: by name; sub/*.mp4: by path below data_root; **/: any folders or none
    out_dir: str = "runs/vjepa_auto_v2"  # everything the run writes
    resume: str = "auto"  # auto (newest checkpoint in out_dir) | never | a checkpoint file
    steps: int = 20000  # optimizer steps of the whole run; all schedules end here
    device: str = "auto"  # auto | cuda | mps | cpu
    amp: bool = False  # bf16 autocast where it is no slower (fp16 with a loss scaler on CUDA cards without bf16)
    amp_type: str = "auto"  # auto (as --amp finds best) | bf16 | fp16 (with a loss scaler); with --amp, without a trial
    compile: bool = False  # torch.compile of the model's blocks
    compile_whole: bool = False  # of the whole forward: 3 % faster, the first step minutes later; not with --shard fsdp
    cuda_graph: bool = True  # one GPU: a step's kernels are recorded once and replayed; False = started one by one
    shard: str = "none"  # none (each process holds all weights) | fsdp (each holds a part of them and of the moments)
    seed: int = 1337  # every sample, mask and noise draw is a pure function of (seed, sample number)
    # -- data
    val_fraction: float = 0.1  # share of the files held out, by hash of the name
    max_bad_fraction: float = 0.5  # stop when more than this share of the files cannot be decoded
    decode_timeout_s: float = 60.0  # a file that a clip takes longer from twice is left out; absent data are waited for
    num_workers: int = 4  # loader processes per rank
    worker_nice: int = 19  # by how much their priority is lower while the step computes on the CPU; 0 = not at all
    # -- optimisation
    batch_size: int = 8  # clips per process and micro-step
    grad_accum: int = 1  # micro-steps per optimizer step
    lr: float = 1e-4  # peak learning rate
    min_lr: float = 1e-6  # learning rate at the last step
    weight_decay: float = 0.05  # AdamW, on matrices only
    warmup_steps: int = 2000  # linear warm-up, capped at a tenth of steps
    grad_clip: float = 1.0  # largest gradient norm of what is clipped as one; 0 = off
    grad_clip_value: float = 0.0  # largest size of any number of a gradient; 0 = off; needs grad_clip 0
    max_skipped_steps: int = 20  # consecutive non-finite steps before the run stops
    # -- log, checkpoints, evaluation
    log_every: int = 50  # steps between log lines
    ckpt_every: int = 1000  # steps between checkpoints
    keep_last: int = 3  # checkpoints kept beside the final one
    val_every: int = 1000  # steps between evaluations; 0 = only at the end
    val_epochs: int = 0  # passes over the training files between evaluations, in place of val_every; 0 = by val_every
    val_clips: int = 64  # clips of an evaluation, rounded up to full batches
    best_by: str = ""  # val_ figure by which ckpt_best.pt is kept: the smallest, with a - in front the largest
    track: str = ""  # tensorboard, wandb or both, separated by a comma
    dist_timeout_s: float = 600.0  # seconds before a stuck collective ends the run

    PRESETS = {"base": {}}
    RANGES = {
        "steps": (1, 10**9), "seed": (0, 2**31 - 1), "val_fraction": (0, 0.9), "max_bad_fraction": (0, 0.99),
        "decode_timeout_s": (0.1, 10**6), "num_workers": (0, 512), "worker_nice": (0, 19),
        "batch_size": (1, 65536), "grad_accum": (1, 65536),
        "lr": (0, None), "min_lr": (0, None), "weight_decay": (0, None), "grad_clip": (0, None),
        "grad_clip_value": (0, None), "val_epochs": (0, 10**6),
        "warmup_steps": (0, 10**9), "max_skipped_steps": (1, 10**9), "log_every": (1, 10**9), "ckpt_every": (1, 10**9),
        "keep_last": (1, 10**9), "val_every": (0, 10**9), "val_clips": (2, 10**7), "dist_timeout_s": (1, 10**6),
    }
    CHOICES = {
        "device": ("auto", "cuda", "mps", "cpu"), "amp_type": ("auto", "bf16", "fp16"), "shard": ("none", "fsdp"),
    }  # fmt: skip
    MUST_MATCH = ("seed",)

    def __init_subclass__(cls):
        """TypeError where a field of a derived dataclass would hide a property or a method above it."""
        base = cls.__base__
        for name in inspect.get_annotations(cls):
            if callable(hidden := getattr(base, name, None)) or isinstance(hidden, property):
                raise TypeError(f"{cls.__name__}: a field must not be called {name}, which {base.__name__} computes")

    def __post_init__(self):
        """A ~ at the front of a path is the home folder, wherever the config comes from."""
        for name in ("data_root", "out_dir", "resume", "init_from", "latents", "frame_cache"):
            if isinstance(getattr(self, name, None), str):
                setattr(self, name, os.path.expanduser(getattr(self, name)))

    def rules(self):
        """What ranges and choices cannot say -> list of (field, rule it breaks). Values are in their ranges by then."""
        unknown = ", ".join(sorted(set(filter(None, self.track.split(","))) - {"tensorboard", "wandb"}))
        return broken(
            (not self.out_dir.strip(), "out_dir", "must name a folder"),
            (not self.resume.strip(), "resume", "must be auto, never or a checkpoint file"),
            (unknown, "track", f"{unknown} is not one of tensorboard, wandb"),
            (self.amp_type != "auto" and not self.amp, "amp_type", "needs --amp"),
            (self.grad_clip and self.grad_clip_value, "grad_clip_value", "clips in another way: needs --grad_clip 0"),
        )

    def in_order(self, *pairs):
        """The rule broken by pairs of fields of which the first exceeds the second, as in `rules`."""
        values = [(low, getattr(self, low), high, getattr(self, high)) for low, high in pairs]
        return broken(*((a > b, low, f"must not exceed {high} = {b}") for low, a, high, b in values))

    @property
    def warmup(self) -> int:
        return min(self.warmup_steps, self.steps // 10)

    @property
    def lr_floor(self) -> float:
        """Share of its peak that a learning rate never falls below."""
        return min(self.min_lr / self.lr, 1.0) if self.lr else 0.0


@dataclass
class ClipConfig(RunConfig):
    """What every world needs that learns from clips of videos, or from the built-in scenes."""

    # -- clips
    image_size: int | tuple = 224  # pixels, one number or H,W
    num_frames: int = 84  # frames per clip = now + soon + eventually
    now_frames: int = 4  # what is seen; the built-in scenes branch after it
    soon_frames: int = 16  # near future
    channels: int = 3  # RGB
    clip_fps: float = 4.0  # frames per second taken from a video; 0 spreads the frames over the whole file
    frame_fps: float = 0.0  # frames per second of pictures and raw H.264 / HEVC; 0 = as times, header or annotation say
    start_fps: float = 0.0  # windows start at multiples of 1 / start_fps s, a multiple of clip_fps; 0 = anywhere
    decoder: str = "auto"  # auto (pyav, then decord) | pyav | decord
    frame_cache: str = "auto"  # folder of decoded frames | off | auto: out_dir/frame_cache where that pays and fits
    frame_cache_gb: float = 20.0  # most GB in it; what was used least recently goes first, never what this run used
    windows_per_file: int = 1  # so many training samples on end are windows of one file that follow one another
    missing_data: str = "scenes"  # when data_root holds no video: scenes | error | random
    latents: str = ""  # folder or csv of latents cached by tools/cache_latents.py, read instead of videos
    crop_scale_min: float = 0.6  # smallest crop, share of the largest box that fits the frame
    crop_scale_max: float = 1.0  # largest crop, same unit
    crop_ratio_min: float = 0.85  # stretch of the crop's aspect ratio
    crop_ratio_max: float = 1.18  # stretch of the crop's aspect ratio
    hflip: bool = False  # mirror clips at random; steering and left/right labels are mirrored with them
    # -- built-in driving scenes
    scene_clips: int = 512  # built-in scenes written as mp4 when there is no data_root
    scene_size: int = 0  # side of the written scenes in pixels; 0 = image_size
    scene_mix: str = "default"  # kinds of built-in scenes: default | fork_only | shares like fork=3,brake=1
    scenes: str = "files"  # files (scene_clips mp4s, read back like any video) | render (a new scene for every sample)

    RANGES = {
        "windows_per_file": (1, 1000), "start_fps": (0, 1000), "frame_cache_gb": (0, 10**6),
        "clip_fps": (0, 1000), "frame_fps": (0, 1000), "crop_scale_min": (0.01, 1), "crop_scale_max": (0.01, 1),
        "crop_ratio_min": (0.1, 10), "crop_ratio_max": (0.1, 10), "scene_clips": (4, 10**7), "scene_size": (0, 4096),
        "num_frames": (2, 100000), "now_frames": (1, 100000), "soon_frames": (1, 100000), "channels": (3, 3),
    }
    CHOICES = {
        "decoder": ("auto", "pyav", "decord"), "missing_data": ("scenes", "error", "random"),
        "scenes": ("files", "render"),
    }
    MUST_MATCH = ("image_size", "num_frames", "now_frames", "soon_frames", "channels")
    action_names = ()  # signals that samples hold for every tubelet, beside their frames
    UNCROPPED = dict(crop_scale_min=1.0, crop_scale_max=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0, hflip=False)

    @property
    def height(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    def rules(self):
        problem, least, sides = "", self.now_frames + self.soon_frames, (self.height, self.width)
        times, kept = self.start_fps / (self.clip_fps or math.inf), self.frame_cache not in ("auto", "off")
        alone = "a file of cached latents is one sample" if self.latents else ""
        alone = alone or "with clip_fps 0 a window is a whole file" * (not self.clip_fps)
        alone = alone or "a scene that is rendered is one sample" * (self.scenes == "render" and not self.data_root)
        try:
            mix_shares(self.scene_mix)
        except ValueError as error:
            problem = str(error)
        return [
            *super().rules(),
            *broken(
                (not 1 <= min(sides) <= max(sides) <= 8192, "image_size", "must lie in 1 to 8192"),
                (self.num_frames < least, "num_frames", f"must be at least now + soon frames = {least}"),
                (problem, "scene_mix", problem),
                (self.start_fps and (times < 0.5 or abs(times - np.round(times)) > 1e-9), "start_fps",
                 f"must be 0 or a multiple of clip_fps = {self.clip_fps:g}"),
                (not self.frame_cache.strip(), "frame_cache", "must be auto, off or a folder"),
                (kept and self.decoder == "decord", "frame_cache", "keeps what PyAV decodes: not with decoder decord"),
                (self.windows_per_file > 1 and alone, "windows_per_file", f"must be 1: {alone}"),
                *((self.latents and getattr(self, name) != plain, name, f"must be {plain}: cached latents are of clips "
                   "as they are") for name, plain in self.UNCROPPED.items()),
            ),
            *self.in_order(("crop_scale_min", "crop_scale_max"), ("crop_ratio_min", "crop_ratio_max")),
        ]


@dataclass
class VJepaAutoV2Config(ClipConfig):
    """The tri-temporal world: how a clip is cut into NOW, SOON and EVENTUALLY, networks, losses, and the flow net."""

    preset: str = "base"  # tiny | proof | small | base | large | vjepa2_vitl, _vitl_latents, _vith, _vitg, _vitg_384
    # -- grid
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
    pred_heads: int = 0  # attention heads of the predictor; 0 = num_heads
    pred_mlp_ratio: float = 0.0  # the same for the predictor; 0 = mlp_ratio
    dropout: float = 0.0  # after attention and MLP
    pos_embed: str = "sincos"  # sincos (added once) | rope (rotary, V-JEPA 2 form) | rope21 (V-JEPA 2.1 form)
    pred_attention: str = "cross"  # what predicted tokens read: full (all) | context | cross (context as it came in)
    soon_start: str = "last"  # SOON starts from the last NOW tubelet: last | from the mask token alone: mask (V-JEPA 2)
    grad_checkpoint: bool = False  # recompute block activations in backward: less memory, about 26 % more compute
    # -- weights to start from
    init_from: str = ""  # V-JEPA 2 weights (folder, .pt, hub id), or a checkpoint; resuming comes first
    init_key: str = ""  # entry: target_encoder, ema_encoder or encoder, first found; of a checkpoint: target or online
    allow_partial: bool = False  # start even where tensors of the encoder are missing or too many
    # -- objective
    freeze_encoder: bool = False  # the encoder of init_from learns nothing: NOW's and the target encoder in one
    teacher: str = "ema"  # ema (the target follows the encoder) | frozen (it is that of init_from, of any width)
    target_window: int = 8  # EVENTUALLY tubelets that see each other in the target encoder, no others; 0 = all see all
    ema_momentum: float = 0.996  # target encoder momentum
    ema_momentum_end: float = 0.0  # momentum at the last step, linear in between; 0 = constant
    short_num_blocks: int = 8  # blocks of a short-range mask
    short_scale: float = 0.15  # area of one block, share of the h x w grid
    long_num_blocks: int = 2  # blocks of a long-range mask
    long_scale: float = 0.70  # area of one block, share of the h x w grid
    aspect_min: float = 0.75  # block height over width, smallest
    aspect_max: float = 1.50  # block height over width, largest
    short_visible: float = 0.0  # visible share of sites under a short mask; 0 = mean of the block sampler
    long_visible: float = 0.0  # visible share of sites under a long mask; 0 = mean of the block sampler
    mask_draws: int = 1  # mask draws per family and clip for one target pass
    mask_families: str = "one"  # a clip has one, short masks in half of a batch: one | both
    pred_share: float = 0.25  # share of a mask's tokens that is predicted, drawn anew for every clip
    eventually_stride: int = 2  # of so many EVENTUALLY tubelets on end a training clip holds one, drawn anew
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
    # -- actions
    actions: str = "none"  # signals of the future that SOON and FLOW are told, such as steer,accel; none: passive
    action_drop: float = 0.3  # share of training clips whose actions are hidden, so that it predicts without them too
    # -- flow
    flow_dim: int = 512  # width of the flow net
    flow_depth: int = 4  # blocks of the flow net
    flow_heads: int = 8  # heads of the flow net
    flow_squeeze: int = 16  # channels kept of each NOW token that the flow net reads flattened; 0 = all
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
    flow_fit_clips: int = 0  # clips whose frozen latents the flow net is fitted on after training; 0 = it learns along
    flow_fit_steps: int = 2000  # optimizer steps of that flow phase
    flow_fit_batch: int = 128  # clips per step of the flow phase and process, flow_draws draws each
    flow_fit_lr: float = 1e-3  # peak learning rate of the flow phase, SOON included
    flow_fit_drop: float = 0.0  # share of the numbers of the NOW context hidden from the flow net in a step of it
    soon_fit_steps: int = 0  # steps before those in which a copy of the predictor learns SOON alone; 0 = no copy
    soon_fit_batch: int = 32  # clips per step of that and process
    # -- end of a run
    picture: bool = True  # write futures.png at the end

    BEFORE = dict(  # what a run had before these were fields
        pred_attention="full", target_window=0, mask_families="both", pred_share=1.0, eventually_stride=1,
        flow_squeeze=0,
    )
    MINUTES = dict(  # what tiny and proof share
        image_size=48, patch=8, num_frames=20, now_frames=4, soon_frames=8, eventually_frames=8, enc_dim=96,
        enc_depth=4, pred_dim=96, pred_depth=3, num_heads=2, batch_size=8, lr=1.5e-3, warmup_steps=50,
        ema_momentum=0.992, ema_momentum_end=0.998, lambda_soon=2.0, flow_depth=3, flow_chunks=2, num_workers=2,
        outcome_queue=256, crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0, amp=True,
    )
    VJEPA2 = dict(  # what the published sizes share; 8 s of 4 frames per second
        image_size=256, num_frames=32, now_frames=8, soon_frames=8, eventually_frames=16, clip_fps=4.0,
        enc_dim=1024, enc_depth=24, num_heads=16, pred_heads=12, pred_mlp_ratio=4.0, pos_embed="rope",
        soon_start="mask", lr=5e-5, ema_momentum=0.999, batch_size=4, grad_accum=4, grad_checkpoint=True, amp=True,
        **BEFORE,
    )
    VITG = dict(VJEPA2, enc_dim=1408, enc_depth=40, num_heads=22, mlp_ratio=48 / 11, batch_size=2, grad_accum=8)
    PRESETS = {
        "tiny": dict(
            MINUTES, steps=500, flow_dim=256, flow_heads=4, flow_lr=2e-3, scene_clips=768, scene_size=96,
            log_every=25, ckpt_every=125, val_every=125,
        ),
        "small": dict(
            image_size=128, num_frames=36, now_frames=4, soon_frames=16, eventually_frames=16, enc_dim=384,
            enc_depth=12, pred_dim=192, pred_depth=6, num_heads=6, batch_size=32, lr=3e-4, ema_momentum=0.998,
            ema_momentum_end=0.9998, flow_dim=384, flow_heads=6, amp=True,
        ),
        "proof": dict(
            {**MINUTES, "image_size": 56}, steps=5000, scenes="render", flow_dim=512, flow_heads=8, flow_rank=1024,
            flow_draws=4, flow_shift=3.0, flow_fit_clips=100000, flow_fit_steps=3500, soon_fit_steps=2500, log_every=50,
            ckpt_every=500, val_every=500,
        ),
        "large": dict(
            enc_dim=1024, enc_depth=24, num_heads=16, flow_dim=1024, flow_heads=16, batch_size=4, grad_checkpoint=True,
            amp=True,
        ),
        "vjepa2_vitl": VJEPA2,
        "vjepa2_vitl_latents": dict(  # with --freeze_encoder, and from a cache with --latents
            {**VJEPA2, **ClipConfig.UNCROPPED}, lambda_vjepa=0.0, batch_size=32, grad_accum=1, lr=2e-4,
            warmup_steps=500, steps=5000, val_every=500, ckpt_every=500,
        ),
        "vjepa2_vith": dict(VJEPA2, enc_dim=1280, enc_depth=32),
        "vjepa2_vitg": VITG,
        "vjepa2_vitg_384": dict(VITG, image_size=384, batch_size=1, grad_accum=16),
    }
    RANGES = {
        "num_frames": (3, 100000), "eventually_frames": (1, 100000), "tubelet_t": (1, 100000), "patch": (1, 8192),
        "enc_dim": (6, 65536), "enc_depth": (1, 1000), "pred_dim": (6, 65536), "pred_depth": (1, 1000),
        "num_heads": (1, 65536), "mlp_ratio": (0.1, 64), "pred_heads": (0, 65536), "pred_mlp_ratio": (0, 64),
        "dropout": (0, 0.9), "ema_momentum": (0, 1),
        "ema_momentum_end": (0, 1), "short_num_blocks": (1, 1000), "short_scale": (0.001, 1),
        "long_num_blocks": (1, 1000), "long_scale": (0.001, 1), "aspect_min": (0.05, 20), "aspect_max": (0.05, 20),
        "short_visible": (0, 0.99), "long_visible": (0, 0.99), "mask_draws": (1, 64), "pred_share": (0.001, 1),
        "target_window": (0, 100000), "eventually_stride": (1, 100000), "lambda_vjepa": (0, 10**6),
        "lambda_soon": (0, 10**6), "lambda_eventually": (0, 10**6), "lambda_flow": (0, 10**6),
        "lambda_supcon": (0, 10**6), "supcon_temperature": (1e-4, None), "outcome_queries": (1, 65536),
        "outcome_temperature": (1e-4, None), "outcome_queue": (0, 10**7), "flow_dim": (2, 65536),
        "flow_depth": (1, 1000), "flow_heads": (1, 65536), "flow_squeeze": (0, 65536), "flow_rank": (1, 4096),
        "flow_chunks": (1, 100000),
        "flow_joint_max": (0, 2**62), "flow_pool": (1, 8192), "flow_draws": (1, 4096), "flow_shift": (0, 1000),
        "flow_steps": (1, 10000), "flow_context_grad": (0, 1), "flow_lr": (0, None), "flow_ema": (0, 1),
        "flow_fit_clips": (0, 10**9), "flow_fit_steps": (1, 10**9), "flow_fit_batch": (1, 65536),
        "flow_fit_lr": (0, None), "flow_fit_drop": (0, 0.9), "action_drop": (0, 1),
        "soon_fit_steps": (0, 10**9), "soon_fit_batch": (1, 65536),
    }
    CHOICES = {
        "pos_embed": ("sincos", "rope", "rope21"), "soon_start": ("last", "mask"), "outcome_target": ("mean", "delta"),
        "flow_rest": ("mean", "gaussian"), "teacher": ("ema", "frozen"), "pred_attention": ("full", "context", "cross"),
        "mask_families": ("both", "one"),
    }
    MUST_MATCH = (
        "eventually_frames", "tubelet_t", "patch", "enc_dim", "enc_depth", "pred_dim", "pred_depth", "num_heads",
        "mlp_ratio", "pred_heads", "pred_mlp_ratio", "pos_embed", "soon_start", "outcome_queries", "outcome_queue",
        "outcome_target", "flow_dim", "flow_depth", "flow_heads", "flow_rank", "flow_chunks", "flow_joint_max",
        "flow_pool", "freeze_encoder", "teacher", "actions", "pred_attention", "target_window",
        "flow_squeeze",
    )

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
    def action_names(self) -> tuple:
        """The signals of `actions`, in their order."""
        return () if self.actions == "none" else tuple(name.strip() for name in self.actions.split(","))

    @property
    def future_tubelets(self) -> tuple:
        """Tubelets (of NOW, of SOON, of SOON and EVENTUALLY)."""
        soon = self.soon_frames // self.tubelet_t
        return self.now_frames // self.tubelet_t, soon, soon + self.eventually_tubelets

    @property
    def window_starts(self) -> tuple:
        """First tubelets of the target's windows but the first, which is NOW and SOON; () where all see all."""
        (now, soon, _), later = self.future_tubelets, self.eventually_tubelets
        count = math.ceil(later / self.target_window) if self.target_window else 0
        return tuple(now + soon + later * number // count for number in range(count))

    @property
    def stretches(self) -> list:
        """Ranges of EVENTUALLY tubelets of which a training clip holds one each; none reaches over a window."""
        now, soon, _ = self.future_tubelets
        starts, step = self.window_starts or (now + soon,), self.eventually_stride
        ends = *starts[1:], self.grid[0]
        return [range(at, min(at + step, end)) for start, end in zip(starts, ends) for at in range(start, end, step)]

    @property
    def flow_joint(self) -> bool:
        """Whether the noised directions span all future tokens jointly (small grids) or single pooled tokens."""
        return (self.soon_tokens + self.flow_chunks) * self.enc_dim <= self.flow_joint_max

    @property
    def flow_read(self) -> int:
        """Channels of a NOW token that the flow net reads."""
        return min(self.flow_squeeze or self.enc_dim, self.enc_dim) if self.flow_joint else self.enc_dim

    @property
    def flow_tokens(self) -> int:
        """N, the number of noised flow tokens."""
        return 1 if self.flow_joint else self.soon_frames // self.tubelet_t * self.flow_pool**2 + self.flow_chunks

    @property
    def tau_shift(self) -> float:
        """Time shift a by the number of noised dimensions (RAE's square-root law, capped at 12)."""
        dims = self.flow_tokens * self.flow_rank
        return self.flow_shift or (1.0 if dims <= 1000 else min(12.0, math.sqrt(dims / 1000)))

    def rules(self):
        total = self.now_frames + self.soon_frames + self.eventually_frames
        losses = self.lambda_vjepa + self.lambda_soon + self.lambda_eventually + self.lambda_supcon
        rows = [(self.num_frames != total, "num_frames", f"must equal now + soon + eventually frames = {total}")]
        for name in ("now_frames", "soon_frames", "eventually_frames"):
            rows += [(getattr(self, name) % self.tubelet_t, name, f"must be divisible by tubelet_t = {self.tubelet_t}")]
        for side in dict.fromkeys((self.height, self.width)):
            rows += [(side % self.patch, "image_size", f"{side} must be divisible by patch = {self.patch}")]
        of_predictor = "pred_heads" if self.pred_heads else "num_heads"
        for name, heads in (("enc_dim", "num_heads"), ("pred_dim", of_predictor), ("flow_dim", "flow_heads")):
            width, count = getattr(self, name), getattr(self, heads)
            odd = self.pos_embed != "sincos" and name != "flow_dim" and (width // count < 6 or width // count % 2)
            even_heads = f"rope needs an even number of channels per head, at least 6, not {width // count}"
            rows += [
                (width % count, name, f"must be divisible by {heads} = {count}"),
                (odd and not width % count, name, even_heads),
                (width % 2, name, "must be even, the position code pairs sine and cosine"),
            ]
        no_fit = self.soon_fit_steps and not self.flow_fit_clips
        names = self.action_names
        unknown = ", ".join(name or "''" for name in names if name not in ACTION_SIGNALS)
        taught, needs = self.teacher == "frozen", "needs the weights of init_from (--init_from)"
        rows += [
            (self.init_key and not self.init_from, "init_key", "chooses within --init_from, which names nothing"),
            (self.freeze_encoder and not self.init_from, "freeze_encoder", needs),
            (taught and not self.init_from, "teacher", needs),
            (taught and self.freeze_encoder, "teacher", "freeze_encoder leaves nothing to teach"),
            (self.latents and not self.freeze_encoder, "latents", "needs a frozen encoder (--freeze_encoder)"),
            (self.latents and self.lambda_vjepa, "lambda_vjepa", "must be 0: cached latents know no masks"),
            (unknown, "actions", f"no signal {unknown}; none, or some of {','.join(ACTION_SIGNALS)}"),
            (len(set(names)) < len(names), "actions", "names a signal twice"),
            (self.latents and names, "actions", "must be none: cached latents hold no signals (--latents)"),
            (no_fit, "soon_fit_steps", "the flow phase fits SOON, and flow_fit_clips = 0 leaves it out"),
            (losses <= 0, "lambda_vjepa", "at least one of vjepa, soon, eventually, supcon must train the networks"),
        ]
        problems = [*super().rules(), *broken(*rows), *self.in_order(("aspect_min", "aspect_max"))]
        tubelets, (_, high, wide) = self.eventually_tubelets, self.grid
        span = (self.soon_tokens + self.flow_chunks) * self.enc_dim if self.flow_joint else self.enc_dim
        pool = not self.flow_joint and self.flow_pool > min(high, wide)
        return problems or broken(  # what needs a grid, and whole tubelets
            (self.sites < 2, "image_size", f"needs at least 2 patches of {self.patch} to mask one"),
            (self.flow_chunks > tubelets, "flow_chunks", f"only {tubelets} EVENTUALLY tubelets to chunk"),
            (pool, "flow_pool", f"exceeds the {high} x {wide} token grid"),
            (self.flow_rank > span, "flow_rank", f"exceeds the {span} numbers that a direction spans"),
        )


# fmt: on


def merged(Config, table):
    """A dict such as RANGES of a config class, with what the classes above it have; its own entries win."""
    return {key: value for cls in reversed(Config.__mro__) for key, value in vars(cls).get(table, {}).items()}


def preset_config(preset, **overrides):
    """The config of a named preset with some fields replaced, for use from Python."""
    return VJepaAutoV2Config(**{**merged(VJepaAutoV2Config, "PRESETS")[preset], "preset": preset, **overrides})


MAX_LINE = 4000  # characters of a message or of a line of the log
SILENCE_S = 18.0  # after so long without a word a run says what it is at: nobody waits 20 s for a sign of life
# Control characters, line separators, changes of the writing direction, which show another name than is there, and the
# surrogates that stand for bytes of a file name that is not UTF-8.
UNPRINTABLE = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def one_line(text, limit=300):
    """Any text -> one printable line: what would break a log or a terminal stands as \\x1b, a long rest as ..."""
    text = re.sub(UNPRINTABLE, lambda match: repr(match[0])[1:-1], str(text)[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."


def flat(text):
    """Any text, an error say, with line breaks and runs of blanks as single blanks."""
    return " ".join(str(text).split())


def reason_of(error):
    """What an error says, for a message: the system's own words without number and path, else all of its text."""
    return getattr(error, "strerror", None) or flat(error)


def emit(text, stream):
    """Write text to a console stream -> "" or why it did not get out. What the encoding lacks is escaped; a stream that
    broke is pointed at /dev/null, since whoever flushes it later, Python at its end included, would fail again."""
    if stream is None:  # closed before the program began
        return "closed"
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: closed since
        with suppress(OSError, ValueError):  # a stream that is no file has nothing to point elsewhere
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return reason_of(error)
    return ""


def say(text, stream=None):
    """One line for the user on stdout, or on the stream given, where all that is printed goes through: what comes from
    outside can neither begin a line of its own nor reach the terminal as control codes."""
    return emit(one_line(text, MAX_LINE) + "\n", sys.stdout if stream is None else stream)


def is_terminal(stream):
    """Whether a console stream is a terminal; one that is closed is none."""
    return stream is not None and not stream.closed and stream.isatty()


def progress_bar(share, text):
    """'[######..................] text', no longer than the terminal is wide."""
    filled = round(24 * min(share, 1.0))
    return one_line(f"[{'#' * filled}{'.' * (24 - filled)}] {text}")[: shutil.get_terminal_size().columns - 1]


def fits(kind, value):
    """Whether a value has a field's type: a whole number will do for float, a pair of them for image_size."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind in (str, bool, float):
        return isinstance(value, kind) or kind is float and fits(int, value)
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return all(fits(int, side) for side in sides)


def shown(value):
    """A value of any type for a message. Lists of anything but plain values, which may be deep, are only counted."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"too large a number ({value.bit_length()} bits)"
    parts = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, dict) or not all(isinstance(part, str) or fits(float, part) for part in parts):
        return f"a {type(value).__name__} of {len(value)}"
    return one_line(repr(value), 100)


def describe_time(seconds):
    """Seconds -> '3.2 days', '4.1 h', '12 min' or '40 s'."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def refusal(cfg, name, rule):
    """The message of a broken rule: field, value, rule and the flag to change."""
    value = getattr(cfg, name)
    return f"{name} = {shown(value) if isinstance(value, str) else value}: {one_line(rule)} (--{name})"


@lru_cache(maxsize=8)
def field_types(Config):
    """{field: int, float, str, bool or int | tuple} of a config class. TypeError for a field of any other type."""
    hints = typing.get_type_hints(Config)
    types = {entry.name: hints[entry.name] for entry in fields(Config)}
    for name, kind in types.items():
        if kind not in (int, float, str, bool, int | tuple):
            raise TypeError(f"{Config.__name__}.{name}: a field is an int, float, str, bool or int | tuple, not {kind}")
    return types


def type_problems(cfg):
    """Fields of another type than their own, and texts that no log line or path may hold -> list of messages."""
    problems = []
    for name, kind in field_types(type(cfg)).items():
        value, wanted = getattr(cfg, name), getattr(kind, "__name__", "a number or a pair of numbers")
        if not fits(kind, value):
            problems.append(f"{name} = {shown(value)}: must be {wanted} (--{name})")
        elif isinstance(value, str) and re.search(UNPRINTABLE, value):
            problems.append(refusal(cfg, name, "must hold no control characters, and only UTF-8"))
    return problems


def value_problems(cfg):
    """Fields whose value lies outside its range or choices -> list of messages. Every value has its type by then."""
    problems = []
    for name, (low, high) in merged(type(cfg), "RANGES").items():
        value = getattr(cfg, name)
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not math.isfinite(value) or not low <= value <= high:
            problems.append(refusal(cfg, name, f"must lie in {low} to {high}"))
    for name, allowed in {"preset": merged(type(cfg), "PRESETS"), **merged(type(cfg), "CHOICES")}.items():
        if getattr(cfg, name) not in allowed:
            problems.append(refusal(cfg, name, f"must be one of {', '.join(allowed)}"))
    return problems


def validate_config(cfg):
    """Raise UsageError naming every field that breaks a rule, its value, the rule and the flag to change."""
    odd = type_problems(cfg) or value_problems(cfg)
    if problems := odd or [refusal(cfg, name, rule) for name, rule in cfg.rules()]:
        raise UsageError("config: " + "; ".join(problems))


# ---------------------------------------------------------------------------------------------------------------------
# 2  Command line: argv -> Config
# ---------------------------------------------------------------------------------------------------------------------

MAX_CONFIG_BYTES = 2**18
MAX_INHERITS = 8  # files between the first config and the last that it inherits from, this one included
# YAML 1.2's reading of an unquoted word. YAML 1.1, pyyaml's own, takes 1e-4 for text, 012 for ten and 1:30 for ninety.
YAML_WORDS = {
    "null": r"(~|null|Null|NULL)?",
    "bool": r"(?i:true|false|yes|no|on|off)",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


@lru_cache(maxsize=8)
def field_help(Config):
    """{field: its trailing comment}, read from the dataclass source, so that flags and comments cannot disagree."""
    helps = {}
    for cls in reversed(Config.__mro__[:-1]):
        with suppress(OSError, TypeError):  # typed into an interpreter: there is no source
            # getsource(cls) would parse the whole file, a second for each class
            text = inspect.getsource(sys.modules.get(cls.__module__))
            if begin := re.search(rf"^class {cls.__name__}\b", text, re.MULTILINE):
                text = "".join(inspect.getblock(text[begin.start() :].splitlines(keepends=True)))
                helps |= dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", text, re.MULTILINE))
    return helps


def parse_image_size(text):
    """'224' -> 224, '128,256' -> (128, 256). ValueError otherwise."""
    height, *width = map(int, text.split(","))
    if len(width) > 1:
        raise ValueError(text)
    return (height, *width) if width else height


def coerce(kind, name, value, source):
    """Bring a value from a config file to a field's type. UsageError names the field, the value and the source."""
    if not fits(kind, value):
        wanted = "a number or a pair of numbers" if kind == int | tuple else f"of type {kind.__name__}"
        raise UsageError(f"{source}: {name} = {shown(value)} must be {wanted}")
    if kind is float:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def nearest(name, known):
    """' (did you mean x?)' for the closest known name, or ''."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def twice(key, *lines):
    """The error of a mapping that names a key in more than one line: the last one would silently win."""
    return ValueError(f"key {shown(key)} stands twice, in lines {' and '.join(map(str, lines))}")


def unique_pairs(text, pairs):
    """The pairs of an object in a JSON text -> dict. ValueError for a key that stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        places = re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)
        raise twice(key, *(text.count("\n", 0, place.start()) + 1 for place in places))
    return values


def refuse_constant(name):
    """NaN, Infinity and -Infinity, which Python's reader takes for JSON."""
    raise ValueError(f"{name} is no JSON; write null for what is unknown")


def parse_json(text, constant=refuse_constant):
    """JSON text -> plain values. ValueError or RecursionError where it is none. `constant` gets NaN and its like."""
    return json.loads(text, object_pairs_hook=partial(unique_pairs, text), parse_constant=constant)


def read_text(path, most_bytes):
    """A file that a user wrote -> its text, a byte-order mark left out. OSError; ValueError where it is not UTF-8."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a file")  # a pipe or a device may have no end
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes")
    return content.decode("utf-8-sig")


def read_mapping(path, most_bytes):
    """A JSON file that a run wrote -> its dict, {} where it is absent, damaged or something else."""
    try:
        values = parse_json(read_text(path, most_bytes), float)
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def yaml_value(node, seen):
    """A YAML node -> plain value. `seen`: ids of nodes met before. Nine lines of aliases can make a billion values."""
    kind, line, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.start_mark.line + 1, node.value
    if id(node) in seen:
        raise ValueError(f"line {line}: aliases are not allowed")
    seen.add(id(node))
    if (node.id, kind) == ("sequence", "seq"):
        return [yaml_value(part, seen) for part in text]
    if (node.id, kind) == ("mapping", "map"):
        values, lines = {}, {}
        for key_node, value_node in text:
            key, line = yaml_value(key_node, seen), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ValueError(f"line {line}: key {shown(key)} is not a text")
            if key in values:
                raise twice(key, lines[key], line)
            values[key], lines[key] = yaml_value(value_node, seen), line
        return values
    if node.id != "scalar" or kind != "str" and not re.fullmatch(YAML_WORDS.get(kind, "(?!)"), text):
        raise ValueError(f"line {line}: tag {node.tag} is not allowed here")
    if kind in ("int", "float"):
        return int(text) if kind == "int" else float(re.sub(r"\.([in])", r"\1", text.lower()))
    return {"null": None, "bool": text.lower() in ("true", "yes", "on"), "str": text}[kind]


def parse_yaml(text):
    """YAML text -> plain values, never a Python object. ValueError or RecursionError where it cannot be read."""
    import yaml

    loader = type("ConfigLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    for kind, pattern in YAML_WORDS.items():
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), None)
    try:
        node = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(flat(error)) from error
    return None if node is None else yaml_value(node, set())


def config_error(path, why):
    """The UsageError of a config file."""
    return UsageError(f"config {one_line(path)}: {why}")


def parse_config(path, Config):
    """One JSON or YAML file -> its mapping, keys unchecked; fields that a run's own config.json lacks are as they were
    before they were fields. UsageError says in one line why it cannot be read."""
    is_yaml = path.suffix in (".yaml", ".yml")
    if is_yaml and importlib.util.find_spec("yaml") is None:
        raise config_error(path, "YAML needs pyyaml (pip install pyyaml), or write the file as JSON")
    try:
        text = read_text(path, MAX_CONFIG_BYTES)
        data = parse_yaml(text) if is_yaml else parse_json(text, float)
    except (OSError, UnicodeDecodeError) as error:
        raise config_error(path, f"cannot be read ({one_line(error)})") from error
    except (ValueError, RecursionError) as error:
        raise config_error(path, f"not valid {'YAML' if is_yaml else 'JSON'} ({one_line(error)})") from error
    if isinstance(data, dict) and "versions" in data:  # a run's own config.json
        data = data.get("config", data)
        data = {**merged(Config, "BEFORE"), **data} if isinstance(data, dict) else data
    if not isinstance(data, dict):
        raise config_error(path, f"must hold a mapping of fields, not {type(data).__name__}")
    return data


def read_config_file(path, Config, seen=None):
    """One config with all that it inherits, from the folder of the first one or below -> {field: value}. `seen`: files
    met so far -> their values, None while they are read. UsageError for loops and unknown keys, like all else."""
    seen = {} if seen is None else seen
    if not re.search(UNPRINTABLE, str(path)):
        path = Path(os.path.realpath(os.path.expanduser(path)))
    if re.search(UNPRINTABLE, str(path)):
        raise config_error(path, "its name must hold no control characters, and only UTF-8")
    trail = [*(file for file, values in seen.items() if values is None), path]
    if path in trail[:-1]:
        raise config_error(path, f"inherits itself through {' -> '.join(file.name for file in trail)}")
    if not path.is_relative_to(home := trail[0].parent):
        outside = f"inherits {one_line(path)}, which lies outside {one_line(home)}; move it there"
        raise config_error(trail[-2], outside)
    if len(trail) > MAX_INHERITS + 1:
        raise config_error(path, f"more than {MAX_INHERITS} files inherit from each other")
    if path in seen:
        return seen[path]
    seen[path] = None
    data, types, values = parse_config(path, Config), field_types(Config), {}
    parents = data.pop("inherits", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise config_error(path, f"inherits = {shown(parents)} must be a file name or a list of them")
    for parent in parents:
        values |= read_config_file(path.parent / os.path.expanduser(parent), Config, seen)
    for key, value in data.items():
        if key not in types:
            raise config_error(path, f"unknown key {shown(key)}{nearest(key, types)}")
        values[key] = coerce(types[key], key, value, f"config {one_line(path)}")
    seen[path] = values
    return values


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        raise UsageError(one_line(message))


def build_parser(world):
    """A flag for every config field of a world, with - or _ in its name, and no abbreviations."""
    Config, does = world.Config, flat(world.__doc__ or "").split(": ")[0]
    program = os.path.basename(inspect.getfile(world))
    parser = ArgumentParser(prog=program, allow_abbrev=False, description=does)
    parser._negative_number_matcher = re.compile("-[^-]")  # a value may begin with a dash, as that of best_by does
    files = "JSON or YAML file of fields; later files win"
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help=files)
    shown_only = "print the resolved config and leave"
    parser.add_argument("--print_config", "--print-config", action="store_true", help=shown_only)
    counted = "print what a step on so many ranks would take, memory above all, and leave; needs no data and no GPU [1]"
    ranks = dict(type=int, nargs="?", const=1, metavar="RANKS", help=counted)
    parser.add_argument("--dry_run", "--dry-run", **ranks)
    comments = field_help(Config)
    for entry, kind in zip(fields(Config), field_types(Config).values()):
        flags = dict.fromkeys((f"--{entry.name}", f"--{entry.name.replace('_', '-')}"))
        words = comments.get(entry.name, "").replace("%", "%%") + f" [{entry.default}]"
        kinds = dict(type=parse_image_size if kind == int | tuple else kind, metavar=entry.name.upper())
        options = dict(action=argparse.BooleanOptionalAction) if kind is bool else kinds
        parser.add_argument(*flags, dest=entry.name, default=argparse.SUPPRESS, help=words, **options)
    return parser


def resolve_config(argv, world):
    """argv -> (config, {field: value} set by the user, what was asked for besides). Default < preset < config file <
    flag."""
    parser = build_parser(world)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        guess = nearest(unknown[0].split("=")[0], parser._option_string_actions)
        raise UsageError(f"unknown argument {one_line(unknown[0])}{guess}; --help lists all flags")
    overrides = {}
    for path in args.config:
        overrides |= read_config_file(path, world.Config)
    if args.dry_run is not None and args.dry_run < 1:
        raise UsageError(f"--dry_run {args.dry_run}: must be a number of ranks, 1 or more")
    asked = {name: vars(args).pop(name) for name in ("config", "print_config", "dry_run")}
    overrides |= vars(args)
    preset, presets = overrides.get("preset", world.Config.preset), merged(world.Config, "PRESETS")
    if preset not in presets:
        raise UsageError(f"preset {shown(preset)}: must be one of {', '.join(presets)}{nearest(preset, presets)}")
    cfg = replace(world.Config(), **{**presets[preset], **overrides})
    validate_config(cfg)
    return cfg, overrides, asked


# ---------------------------------------------------------------------------------------------------------------------
# 3  Video files: folder / list -> names, labels, annotations
# ---------------------------------------------------------------------------------------------------------------------

RAW_SUFFIXES = (".h264", ".hevc", ".264", ".265", ".h265")  # bare streams
VIDEO_SUFFIXES = (
    *re.findall(r"\.\w+", ".mp4.m4v.mkv.mov.avi.webm.ts.mts.m2ts.3gp.3g2.f4v.wmv.asf.flv.mpg.mpeg.vob.ogv"),
    *RAW_SUFFIXES,
)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LIST_KEYS = re.findall(r"\w+", "video path frames begin length fps times group signals maneuver label")
SIDES = ("train", "val", "test")  # folders that split a data_root
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")  # copies that systems and network disks keep
SEPARATORS = ("\t", ",", "::", ";", " ")  # of a list's columns, in this order
HEADER_WORDS = (r"(?i)(path|video|file|clip)\w*", r"(?i)(maneuver|label|class)\w*")  # a list's columns
MAX_LIST_BYTES, MAX_ANNOTATION_BYTES = 2**28, 2**26
# Lists of numbers in an annotation, one per frame: tools/evaluate.py fits probes on them.
SIGNALS = ("speed", "yaw_rate", "lane_offset", "lead_gap", "steer", "mover_u", "accel")
MIRRORED = ("steer", "yaw_rate")  # change their sign with a horizontal flip


class BadFile(Exception):
    """This file cannot give a clip; the message is the reason."""


def bad_part(what, path, error):
    """The BadFile of a video, for an error in another file that goes with it."""
    return BadFile(f"{what} {one_line(os.path.basename(path))}: {one_line(reason_of(error))}")


@dataclass(frozen=True)
class VideoFile:
    """One video, one drive of pictures, or a part of one."""

    name: str  # path below the data root, with /, and #t=begin,end of a part: its identity in logs
    path: str
    label: str = ""  # a maneuver
    begin: float = 0.0  # second after the first frame from which on it is used
    length: float = 0.0  # seconds that are used; 0: up to the end
    fps: float = 0.0  # of pictures, or of a raw stream
    times: str = ""  # file with the times of these, that csv too
    group: str = ""  # held out together
    signals: str = ""  # an annotation: its file, or itself
    pictures: str = ""  # pattern of their names, where path is their folder, or a csv of path,time

    @property
    def drive(self):
        """What no split cuts: a group, else all parts of a file."""
        return self.group or re.sub(r"#t=[\d.,e+-]+$", "", self.name)


class Listing(list):
    """The videos of a data_root. `notes`: lines for the user; `seen`: what else was found where no video was; `sides`:
    {side: its videos} where `split_by`, folders say, splits them; `drives`: the Listing of folders with pictures."""

    split_by = "folders"

    def __init__(self, videos=(), notes=(), seen="", drives=()):
        super().__init__(videos)
        self.notes, self.seen, self.sides, self.drives = list(notes), seen, {}, drives


def name_some(names, most=3):
    """The first few of many names, and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name, 100) for name in names[:most]) + more


def left_out_note(kind, names, what):
    """A note of a Listing on what it leaves out -> list of one line, none for no names."""
    return [f"{kind}: {len(names)} {what} are left out: {name_some(names)}"] if names else []


def glob_pattern(video_glob):
    """A glob -> compiled pattern. * crosses folders, as in fnmatch; **/ is any number of folders, none included."""
    marked = re.sub(r"(^|(?<=/))(\*\*/)+", "\0", video_glob.removeprefix("./"))
    return re.compile(fnmatch.translate(marked).replace("\0", "(?:.*/)?"))


def walk_folder(root, closed):
    """All below a root that is no folder -> generator of (its folder's path below the root, ending in /, entry). Links
    are followed, each folder is entered once, by its first name in sorted order, hidden and system ones are not.
    `closed` gets what cannot be read; UsageError for the root."""
    visited, todo = set(), [""]
    while todo:
        parent = todo.pop()
        try:
            info = os.stat(folder := os.path.join(root, parent)[:-1] or "/")
            entries = [] if (info.st_dev, info.st_ino) in visited else list(os.scandir(folder))
        except OSError as error:  # closed, gone meanwhile, or deeper than a path may be long
            if not parent:
                raise UsageError(f"data_root {one_line(root)}: cannot be read ({error.strerror})") from error
            closed.append(f"{error.strerror}: {parent[:-1]}")
            continue
        visited.add((info.st_dev, info.st_ino))
        folders = []
        for entry in entries:
            is_folder = False
            with suppress(OSError):  # a link that leads nowhere
                is_folder = entry.is_dir()
            if not is_folder:
                yield parent, entry
            elif entry.name[0] != "." and entry.name not in SYSTEM_FOLDERS:
                folders.append(f"{parent}{entry.name}/")
        todo += sorted(folders, reverse=True)  # the last one is taken first


def one_name_each(videos):
    """Leave out further names of one file (links) -> (videos, names left out). One that brings another label stays,
    under the first name: the split goes by names, so no file ever stands on both sides, nor its parts without group."""
    first, drives, kept, left_out = {}, {}, [], []
    for video in videos:
        key = video.name
        with suppress(OSError, ValueError):
            info = os.stat(video.path)
            if info.st_ino and stat.S_ISREG(info.st_mode):  # some network disks give one number to many files
                key = info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
        drive = drives.setdefault(key, video.drive)
        known, labels = first.setdefault((key, video.begin, video.length), (video, {video.label}))
        if video.name == known.name or video.label not in labels:
            part = replace(video, name=known.name)
            kept.append(part if part.group or part.drive == drive else replace(part, group=drive))
        else:
            left_out.append(video.name)
        if video.name != known.name:
            labels.add(video.label)
    return kept, left_out


def count_suffixes(names):
    """File names -> '12 .jpg, 3 .wmv, 2 hidden', the most frequent first."""
    kinds = ("hidden" if name[0] == "." else os.path.splitext(name)[1].lower() or "without suffix" for name in names)
    counts = Counter(kinds).most_common(8)
    return ", ".join(f"{count} {one_line(suffix, 20)}" for suffix, count in counts) or "no file at all"


def below_sides(videos):
    """{side: the videos below its folder}."""
    return {side: [video for video in videos if video.name.startswith(f"{side}/")] for side in SIDES}


def split_by_folders(listing, root):
    """Fill in the `sides` of a folder with train/ and val/ or test/, all of whose videos stand below these; where some
    stand elsewhere, a note. UsageError when train/ or val/ holds none."""
    there = [side for side in SIDES if os.path.isdir(os.path.join(root, side))]
    if not listing or there[:1] != ["train"] or len(there) == 1:
        return
    sides = below_sides(listing)
    outside = sorted({video.name for video in listing}.difference(*([v.name for v in part] for part in sides.values())))
    split = " and ".join(f"{side}/" for side in there)
    if outside:
        listing.notes.append(f"note: {root} holds {split}, and files elsewhere: split by the hash of all names")
        return
    for side in SIDES[:2]:
        if not sides[side]:
            cure = "move some of the others there, or let tools/split_videos.py split a folder into all three"
            raise UsageError(f"data_root {root}: split by its folders {split}, and {side}/ holds no video; {cure}")
    listing.sides = sides


def scan_folder(root, video_glob, suffixes=VIDEO_SUFFIXES):
    """Walk a folder -> Listing by name of the files with a known suffix that match the glob, one name each. Names with
    a dot in front do not count: they are hidden, or macOS's twins of other files."""
    matches, found, others, closed, drives = glob_pattern(video_glob).match, [], [], [], set()
    below = "videos/" if os.path.basename(root) == "videos" else ""  # a glob may name that folder or not
    for parent, entry in walk_folder(root, closed):
        name, path = entry.name, parent + entry.name
        wanted = name[0] != "." and any(map(matches, (name, path, below + path)))
        if wanted and name.lower().endswith(suffixes):
            found.append(VideoFile(path, os.path.join(root, path)))
        else:
            others.append(name)
            if wanted and name.lower().endswith(PICTURE_SUFFIXES):
                drives.add(parent)
    videos, links = one_name_each(sorted(found, key=operator.attrgetter("name")))
    notes = left_out_note("WARNING", closed, f"folder(s) below {one_line(root)} cannot be read and")
    notes += left_out_note("note", links, "further name(s) of files listed already (links)")
    names = {parent: parent[:-1] or os.path.basename(os.path.abspath(root)) for parent in sorted(drives)}
    drives = Listing(VideoFile(name, os.path.join(root, parent), pictures="*") for parent, name in names.items())
    listing = Listing(videos, notes, "" if videos else f"found {count_suffixes(others)}", drives)
    split_by_folders(listing or drives, root)
    return listing


def label_text(value, what="label"):
    """A label of a list or an annotation -> text, "" for null alone. ValueError for no plain text or number."""
    if value is None:
        return ""
    if not isinstance(value, (str, bool)) and not fits(float, value) or re.search(UNPRINTABLE, str(value)):
        raise ValueError(f"{what} {shown(value)} must be a text without control characters or a number")
    return str(value)


def check_annotation(annotation):
    """Bring what is read of an annotation to its types, in place. ValueError names the key."""
    if not isinstance(annotation, dict):
        raise ValueError("must hold a JSON object")
    fps = annotation.get("fps")
    if fps is not None and not (fits(float, fps) and 0 < fps <= 10**6):
        raise ValueError(f"fps = {shown(fps)} must be a positive number")
    label = label_text(annotation.pop("maneuver", None))
    if label:
        annotation["maneuver"] = label
    for name in SIGNALS:
        values = annotation.get(name) if isinstance(annotation.get(name), list) else []
        if name == "accel" and list in map(type, values):  # the axes of a sensor, which nothing here reads
            del annotation[name]
            continue
        if not set(map(type, values)) <= {int, float, bool, type(None)}:
            raise ValueError(f"{name} must be a list of numbers, null where it is unknown")
        if not all(abs(value) < 1e30 for value in values if value is not None):
            raise ValueError(f"{name} holds a number that is too large")


def csv_cells(line, separator):
    """Cells of a line by csv's rules: quotes hold separators, doubled quotes stand for one. csv.Error if too long."""
    mark = separator if len(separator) == 1 else "\x1f"
    rows = csv.reader([line.replace(separator, mark)], delimiter=mark, skipinitialspace=True)
    return [cell.replace(mark, separator).strip() for row in rows for cell in row]


def list_header(line):
    """A list's first line -> (separator, columns of path and label, inf for none), None if it is no header."""
    if any(suffix in line.lower() for suffix in VIDEO_SUFFIXES):
        return None
    separator = next((separator for separator in SEPARATORS if separator in line), "\t")
    cells = csv_cells(line, separator)
    paths, labels = ([at for at, cell in enumerate(cells) if re.fullmatch(words, cell)] for words in HEADER_WORDS)
    if not paths and not re.match(r"(path|video|file\w*)\b", line, re.IGNORECASE):
        return None
    path = (paths or [0])[0]
    labels = [at for at in labels if at != path] or ([1 - path] if len(cells) == 2 else [math.inf])
    return separator, path, labels[0]


def text_readings(line, header):
    """What a line of a list may say -> [(path, label)], best first: the header's columns, the whole line, all before a
    last separator (paths with blanks and commas need no quotes), the first two cells of a csv line."""
    named, split, quoted = [], [[line.strip('"'), ""]], []
    if header:
        cells = csv_cells(line, header[0])
        named = [[cells[column] if column < len(cells) else "" for column in header[1:]]]
    for separator in (separator for separator in SEPARATORS if separator in line):
        split.append([cell.strip().strip('"') for cell in line.rsplit(separator, 1)])
        quoted.append(csv_cells(line, separator)[:2])
    quoted = [pair for pair in quoted if len(pair) == 2]
    return [pair for pair in named + (quoted + split if '"' in line else split + quoted) if pair[0]]


def listed_path(folder, path, key="path"):
    """A path in a list -> the absolute one. ValueError where no file can be called so."""
    if not isinstance(path, str) or "\0" in path:
        raise ValueError(f"{key} = {shown(path)} must be a text without NUL")
    os.fsencode(path)  # UnicodeEncodeError for what the file system's encoding lacks
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))


def json_video(row, folder):
    """A line of a jsonl list -> VideoFile. ValueError says what is wrong with it."""
    row = {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else {}
    frames, video = row.get("frames"), row.get("video") or row.get("path")
    path = str(video) if fits(int, video) else video or frames
    if not path or video and frames:
        raise ValueError("a line is a JSON object that names either a 'video' (or 'path') or 'frames'")
    for key, least in (("begin", 0), ("length", 1e-9), ("fps", 1e-9)):
        if key in row and not (fits(float, row[key]) and least <= row[key] <= 10**9):
            raise ValueError(f"{key} = {shown(row[key])} must be a number {'above 0' if least else 'from 0 on'}")
    place, pictures, times, signals = listed_path(folder, path), "", row.get("times"), row.get("signals")
    times = listed_path(folder, times, "times") if times else ""
    if isinstance(signals, dict):
        check_annotation(signals)
        signals = json.dumps(signals)
    elif signals:
        signals = listed_path(folder, signals, "signals")
    if frames:
        is_pattern = re.search(r"[*?[]", os.path.basename(place)) and not os.path.isdir(place)
        times = place if place.lower().endswith(".csv") else times
        place, pictures = os.path.split(place) if is_pattern else (place, "*")
    elif times and not place.lower().endswith(RAW_SUFFIXES):
        raise ValueError("times are for pictures and raw streams: this video holds its own")
    begin, length, fps = (float(row.get(key, 0)) for key in ("begin", "length", "fps"))
    if begin or length:
        path += f"#t={begin:.12g}" + f",{begin + length:.12g}" * bool(length)
    label, group = label_text(row.get("maneuver")) or row.get("label"), label_text(row.get("group"), "group")
    return VideoFile(path, place, label_text(label), begin, length, fps, times, group, signals or "", pictures)


def listed_video(readings, folder, is_comment):
    """What a line may say, [(path, label)] -> VideoFile, None for a comment. ValueError for no path or label. Which
    reading holds is seen on the disk; where no such file exists, the first that ends like a video is taken."""
    found = [(path, listed_path(folder, path), label) for path, label in readings]
    present = [one for one in found if os.path.isfile(one[1])] or [one for one in found if os.path.exists(one[1])]
    if not present and (is_comment or not found):
        return None
    named = [one for one in found if one[0].lower().endswith(VIDEO_SUFFIXES)]
    path, absolute, label = (present or named or found[1:2] or found)[0]
    return VideoFile(path, absolute, label_text(label))


def read_list(path):
    """A csv, txt or jsonl list, blank lines, comments (#) and a header left out -> Listing in its order. UsageError
    names a line that is not understood."""
    folder, found, header, keys = os.path.dirname(os.path.abspath(path)), [], None, {}
    try:
        text = read_text(path, MAX_LIST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data_root {one_line(path)}: list cannot be read ({one_line(error)})") from error
    as_json = path.lower().endswith(".jsonl")
    for number, line in enumerate(map(str.strip, io.StringIO(text, newline=None)), 1):
        is_comment = line.startswith("#")
        if not line or as_json and is_comment:
            continue
        try:
            if header is None and not as_json and not is_comment:
                header = not os.path.isfile(os.path.join(folder, line)) and list_header(line) or ()
                if header:
                    continue
            if as_json:
                row = parse_json(line)
                found.append(json_video(row, folder))
                keys |= dict.fromkeys(row)
            else:
                found.append(listed_video(text_readings(line, header), folder, is_comment))
        except (ValueError, RecursionError, csv.Error) as error:
            why = f"cannot be understood ({one_line(error)})"
            raise UsageError(f"data_root {one_line(path)} line {number}: {why}") from error
    videos, links = one_name_each(filter(None, found))
    notes = left_out_note("note", links, f"line(s) of {one_line(path)} name files again under other names (links) and")
    unknown = [key + nearest(key, LIST_KEYS) for key in keys if key not in LIST_KEYS]
    notes += left_out_note("note", unknown, f"key(s) of {one_line(path)} mean nothing here and")
    return Listing(videos, notes, "the list names no video")


def find_videos(data_root, video_glob, suffixes=VIDEO_SUFFIXES):
    """Folder (its videos/ if it has one), list or single video -> Listing. UsageError for any other path."""
    if not os.path.exists(data_root):
        hint = "give a folder of videos, or leave --data_root out for built-in scenes"
        raise UsageError(f"data_root {data_root}: no such file or folder; {hint}")
    if not os.access(data_root, os.R_OK):
        raise UsageError(f"data_root {data_root}: not readable; check its permissions")
    if not os.path.isfile(data_root):
        videos = os.path.join(data_root, "videos")
        return scan_folder(videos if os.path.isdir(videos) else data_root, video_glob, suffixes)
    if data_root.lower().endswith((".csv", ".txt", ".jsonl")):
        return read_list(data_root)
    if data_root.lower().endswith(suffixes):
        return Listing([VideoFile(os.path.basename(data_root), os.path.abspath(data_root))])
    raise UsageError(f"data_root {data_root}: neither a folder, a video, nor a csv, txt or jsonl list")


def split_videos(videos, val_fraction, at_least=1):
    """Hold out drives by the hash of their name, never by window -> (train, val), from two up both non-empty."""
    names = {video.drive for video in videos}  # a list may name a file more than once
    hashes = {name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest() for name in names}
    threshold = f"{int(val_fraction * 16**8):08x}"
    num_val = max(sum(hashed[:8] < threshold for hashed in hashes.values()), at_least if val_fraction > 0 else 0)
    val = set(sorted(hashes, key=hashes.get)[: max(min(num_val, len(names) - 1), 0)])
    return [video for video in videos if video.drive not in val], [video for video in videos if video.drive in val]


def read_annotation(data_root, video):
    """The annotation of a video: its line's signals, else DIR/annotations/<clip>.json, in its own subfolder or flat ->
    dict, {} when there is none. `maneuver` is a text or absent. BadFile when it is not what it should be."""
    name, own = os.path.splitext(video.name)[0] + ".json", video.signals
    if own.startswith("{"):  # it was checked with its line
        return json.loads(own)
    places = dict.fromkeys((name, os.path.basename(name))) if data_root else ()
    for path in [own] if own else [os.path.join(data_root, "annotations", place) for place in places]:
        try:
            if own or stat.S_ISREG(os.stat(path).st_mode):
                annotation = parse_json(read_text(path, MAX_ANNOTATION_BYTES))
                check_annotation(annotation)
                return annotation
        except (OSError, ValueError, RecursionError) as error:
            if own or getattr(error, "errno", None) not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise bad_part("annotation", path, error) from error
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# 4  Decoding: video, plan -> frames
# ---------------------------------------------------------------------------------------------------------------------

# Demuxers that may open a file: a playlist named .mp4 would otherwise make FFmpeg read other files.
CONTAINER_WHITELIST = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,hevc,h264,asf,flv,mpeg,ogg"
DECODERS = {"auto": ("pyav", "decord"), "pyav": ("pyav", "decord"), "decord": ("decord", "pyav")}
# What FFmpeg's bindings raise on damaged files besides their own errors (seen while fuzzing).
DECODE_ERRORS = (OSError, ValueError, LookupError, EOFError, AttributeError, MemoryError, RuntimeError, ArithmeticError)
MAX_PIXELS = 2**26  # of a frame, stored or scaled, twice 8K: more would fill the memory
RAW_FORMATS = ("h264", "hevc")  # demuxers of bare streams, which hold no times and cannot be rewound
RAW_FPS = 25.0  # frames per second of a bare stream of which nobody says anything
LOOK_AHEAD = 20  # packets read ahead of the one decoded: in H.264 and HEVC at most 16 overtake a frame
MAX_JUMP_S = 10.0  # a transport stream whose clock jumps further has lost what lay between
# A longer step than both between the told times of frames is a gap, which no window crosses: seconds, usual steps.
GAP_S, GAP_STEPS = 0.5, 2.5
KEPT_FORMAT, MAX_KEPT_BYTES = 1, 2**24  # of what is kept about a file
SKIPPING_CODECS = ("h264", "hevc")  # they obey skip_frame by the packet; dav1d the first packet's for the whole file


class CannotOpen(BadFile):
    """This decoder cannot open the file; another one may."""


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
    frame_fps: float = 0.0  # rate of a raw stream, whatever its header says; 0: the header's
    noted_fps: float = 0.0  # rate that its annotation names, for a raw stream whose header names none
    start_fps: float = 0.0  # windows start at multiples of its inverse; 0: anywhere
    windows: int = 1  # of a group, which follow one another in a file; u_start is where the group starts
    place: int = 0  # of this window in its group
    later: tuple = ()  # plans of the group's windows behind this one, for who goes on decoding
    kept: str = ""  # folder in which what was found out about a file is kept; "": in memory only
    file: VideoFile = VideoFile("", "")  # which part of it may be used, and its told times; set by fit_plan


@dataclass(frozen=True)
class TimeLine:
    """When the frames of the stream that plays are on screen; pyav_walk without `fast` is the reference.

    Second 0 is when the first picture that can be shown is: the first key frame, or where an edit list hides it, the
    list's beginning. The picture at second t is the frame with the latest presentation time at or before t. Sound,
    covers and what the container says of them have no part in it.
    """

    start: int  # presentation time at second 0
    unit: Fraction  # of presentation times, in seconds
    duration: float  # seconds, at which the last frame of this stream ends
    fps: float  # mean frames per second
    in_order: bool = False  # no presentation times: frames come in order, at the times of the packets
    told: np.ndarray | None = None  # seconds of the frames of a raw stream, where a file tells them

    def second(self, pts):
        """Presentation times -> seconds, to the last bit: a moment on the very border of two frames must not waver."""
        since = pts - self.start
        return since * self.unit.numerator / self.unit.denominator if self.told is None else self.told[since]


def usable_part(plan, duration, native_fps):
    """Seconds of a file that a plan may use. BadFile for a list that promises more than containers round off."""
    begin, length, slack = plan.file.begin, plan.file.length, 1.0 + 2 / native_fps
    rest = duration - begin
    if begin and rest < 0.5 / native_fps or length > rest + slack:
        raise BadFile(f"lasts {duration:.2f} s, its line asks for begin {begin:g}, length {length or 'to its end'}")
    return min(rest, length or rest)


def start_share(plan, room, window):
    """u_start, for a window of a group its own: each begins where the one before ends, or earlier where the file leaves
    less room (seconds) for starts. The group is placed as a window of its length would be."""
    spread = min((plan.windows - 1) * window, room)
    if not spread:
        return plan.u_start
    return (plan.u_start * (room - spread) + spread * plan.place / (plan.windows - 1)) / room


def frame_times(plan, duration, native_fps):
    """Seconds from the first frame at which the clip's frames are taken -> float64 [T]; `duration` is what may be used.
    Half a native frame is added: a request falls inside a frame, not on the border of two. A file shorter than the
    window gives frames over its whole length; one with too few frames each of them, then the last again. With start_fps
    times are whole steps of it, so that all windows ask for the very same."""
    steps, half = np.arange(plan.num_frames), 0.5 / native_fps
    window = plan.num_frames / plan.fps if plan.fps else math.inf
    half = min(half, duration / 2) if plan.file.length else half
    if duration >= window - half:
        room = max(duration - window, 0.0)
        share = start_share(plan, room, window)
        times = share * room + steps / plan.fps + half
        if plan.start_fps:
            last = math.floor(room * plan.start_fps + 1e-9)
            first = min(int(share * (last + 1)), last)
            times = (first + steps * round(plan.start_fps / plan.fps)) / plan.start_fps + half
    elif duration * native_fps < plan.num_frames:
        times = steps / native_fps + half
    else:
        times = steps * (duration / plan.num_frames) + half
    return plan.file.begin + (np.minimum(times, duration - half) if plan.file.length else times)  # no neighbour's


def wanted_times(plan, duration, native_fps):
    """All seconds that windows with start_fps can ask for -> float64 [n], increasing."""
    room, step = duration - plan.num_frames / plan.fps, round(plan.start_fps / plan.fps)
    if room > 0:  # as one long window
        count = math.floor(room * plan.start_fps + 1e-9) + (plan.num_frames - 1) * step + 1
        plan = replace(plan, fps=plan.start_fps, num_frames=count)
    return np.unique(frame_times(replace(plan, u_start=0.0, windows=1), duration, native_fps))


def crop_box(plan, width, height):
    """Frame size -> (scaled width, scaled height, x, y): scale to this, cut [height, width] of the plan at x, y."""
    aspect = plan.width / plan.height * plan.ratio
    box_w = min(width, height * aspect)
    box_h, shrink = min(height, box_w / aspect), math.sqrt(plan.scale)
    scaled_w = max(round(width * plan.width / max(box_w * shrink, 1e-6)), plan.width)
    scaled_h = max(round(height * plan.height / max(box_h * shrink, 1e-6)), plan.height)
    if scaled_w * scaled_h > MAX_PIXELS:
        raise BadFile(f"frame of {width} x {height} is too stretched for a {plan.width} x {plan.height} crop")
    return scaled_w, scaled_h, round((scaled_w - plan.width) * plan.u_x), round((scaled_h - plan.height) * plan.u_y)


def check_regular(path):
    """BadFile unless the path is a non-empty regular file: a pipe would block the open, a folder confuse it."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(info.st_mode) or info.st_size == 0:
        raise BadFile("empty file (0 bytes)" if stat.S_ISREG(info.st_mode) else "not a regular file")


def open_pyav(path):
    """Open a file for PyAV with the allowed demuxers only -> container. CannotOpen with the reason when it is none."""
    import av

    options = {"format_whitelist": CONTAINER_WHITELIST, "max_pixels": str(MAX_PIXELS)}
    # names in another encoding are no reason to refuse a file; from 19 on they never are
    errors = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        return av.open(f"file:{path}", options=options, **errors)
    except (av.FFmpegError, *DECODE_ERRORS) as error:  # PatchWelcomeError and some others are only FFmpegError
        raise CannotOpen(f"pyav cannot open it ({reason_of(error)})") from error


def path_stamp(path, kept=""):
    """Path of a file, what changes when it is written or replaced (size, two times in ns), and the folder in which what
    is known of it may be kept. BadFile unless it is a regular file."""
    check_regular(path)
    info = os.stat(path)
    return path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, kept


def file_stamp(container, kept=""):
    """path_stamp of an open file."""
    return path_stamp(container.name.removeprefix("file:"), kept)


@lru_cache(maxsize=2**16)
def ends_hash(stamp):
    """SHA-256 of the first and the last 64 kB of a file. BadFile."""
    try:
        with open(stamp[0], "rb") as file:
            head = file.read(2**16)
            file.seek(max(stamp[1] - 2**16, 0))
            return hashlib.sha256(head + file.read(2**16)).hexdigest()
    except OSError as error:
        raise BadFile(reason_of(error)) from error


@lru_cache(maxsize=1)
def decoder_versions():
    """Versions of PyAV and of FFmpeg's libraries: other ones may give other pixels -> list."""
    import av

    return [av.__version__, *map(list, av.library_versions.values())]


def file_key(stamp):
    """What must be the same for what was kept of a file to count -> list, for JSON. BadFile."""
    return [KEPT_FORMAT, os.path.abspath(stamp[0]), *stamp[1:3], ends_hash(stamp), decoder_versions()]


class Finding:
    """What `find(stamp, *numbers)`, a look through a file, gives: a number, a text or a list. MOST of them are kept in
    memory, and each in the folder that the stamp names, if it does, as a small JSON, which counts only with its own sum
    and file_key; a folder or file that cannot be read, believed or written is as if it were not there."""

    MOST = 2**18

    def __init__(self, find):
        self.find, self.known, self.held = find, {}, 0
        self.__name__, self.__doc__ = find.__name__, find.__doc__

    def __call__(self, stamp, *numbers):
        key = (*stamp[:4], *numbers)
        if key not in self.known:
            self.known[key] = found = self.look(stamp, numbers) if stamp[4] else self.find(stamp, *numbers)
            self.held += self.weight(found)
            while self.held > self.MOST and len(self.known) > 1:  # the oldest goes
                self.held -= self.weight(self.known.pop(next(iter(self.known))))
        return self.known[key]

    @staticmethod
    def weight(found):
        return len(found) + 1 if isinstance(found, list) else 1

    def look(self, stamp, numbers):
        """The finding from its folder; else by `find`, and then kept there, unless the file changed meanwhile."""
        about = [self.__name__, *numbers, *file_key(stamp)]
        name = hashlib.sha256(json.dumps([self.__name__, *numbers, stamp[0]]).encode()).hexdigest()[:40] + ".json"
        place = os.path.join(stamp[4], name)
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            kept = json.loads(read_text(place, MAX_KEPT_BYTES))
            if kept["about"] == about and kept["sum"] == hashlib.sha256(json.dumps(kept["found"]).encode()).hexdigest():
                return kept["found"]
        found = self.find(stamp, *numbers)
        text = json.dumps(found)
        kept = {"about": about, "sum": hashlib.sha256(text.encode()).hexdigest(), "found": found}
        temporary = Path(f"{place}.{secrets.token_hex(8)}.tmp")  # nobody else's name
        if len(text) < MAX_KEPT_BYTES // 2 and path_stamp(*stamp[::4]) == stamp:
            with suppress(OSError):
                os.makedirs(stamp[4], exist_ok=True)
                try:
                    temporary.write_text(json.dumps(kept))
                    os.replace(temporary, place)
                finally:
                    temporary.unlink(missing_ok=True)
        return found


@lru_cache(maxsize=64)
def read_times(path):
    """Times of frames: npy, a text with a line of seconds or a date for each, or a csv of path,time -> (float64 seconds
    after the first, usual rate, paths of the csv). BadFile unless they are two or more and increase."""
    rows = []
    try:
        with open(path, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
        if is_npy:
            times = np.load(path, allow_pickle=False)
        else:
            rows = [row for row in csv.reader(read_text(path, MAX_LIST_BYTES).splitlines()) if row]
            if path.lower().endswith(".csv") and rows.pop(0) != ["path", "time"]:
                raise ValueError("its first line must be path,time")
            times = np.array([row[-1] for row in rows])
            times = times.astype("datetime64[ns]" if re.search(r"\d-\d", str(times[:1])) else np.float64)
        seconds = (times - times[:1]) / (np.timedelta64(1, "s") if times.dtype.kind == "M" else 1.0)
        steps = np.diff(seconds)
        if seconds.ndim != 1 or not len(steps) or not np.all((0 < steps) & (steps < math.inf)):
            raise ValueError("they must be two or more in one column, each later than the one before")
    except (*DECODE_ERRORS, TypeError, SyntaxError, tokenize.TokenError, csv.Error) as error:
        raise bad_part("times", path, error) from error
    paths = [os.path.join(os.path.dirname(path), row[0].strip()) for row in rows]
    return seconds, 1 / float(np.median(steps)), paths


@lru_cache(maxsize=64)
def list_pictures(folder, pattern):
    """Pictures of a folder -> their paths in natural order, 2 before 10. BadFile."""
    try:
        names = fnmatch.filter(os.listdir(folder), pattern)
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})") from error
    names = [name for name in names if name.lower().endswith(PICTURE_SUFFIXES) and name[0] != "."]
    if not names:
        raise BadFile(f"no picture in it ({', '.join(PICTURE_SUFFIXES)}) called {one_line(pattern, 60)}")
    names.sort(key=lambda name: (re.sub("[0-9]+", lambda number: number[0].zfill(255), name), name))
    return [os.path.join(folder, name) for name in names]


def picture_line(path, plan):
    """A drive of pictures -> (paths, seconds of each, seconds that may be used, frames per second). BadFile."""
    told = plan.file.times
    if not told and not plan.frame_fps:
        raise BadFile("its pictures have no times: fps or times in its line, or --frame_fps")
    seconds, fps, paths = read_times(told) if told else ((), plan.frame_fps, ())
    if path != told:
        paths = list_pictures(path, plan.file.pictures)
        seconds = seconds if told else np.arange(len(paths)) / fps
    if len(paths) != len(seconds):
        raise BadFile(f"{len(paths)} pictures, and {len(seconds)} times in {one_line(os.path.basename(told))}")
    return paths, seconds, usable_part(plan, float(seconds[-1]) + 1 / fps, fps), fps


@Finding
def streams_alive(stamp):
    """Numbers of the video streams that show a second frame before some other one shows its hundredth -> list."""
    counts = Counter()
    with open_pyav(stamp[0]) as container:
        for packet in container.demux(video=tuple(range(len(container.streams.video)))):
            counts[packet.stream_index] += packet.size > 0
            if counts[packet.stream_index] == 100:
                break
    return [number for number, count in counts.items() if count > 1]


def stretches(video):
    """The parts between gaps in a video's told times, cut to what may be used of it -> (seconds at which they begin,
    their lengths, float64 [n], usual rate). BadFile."""
    seconds, fps, _ = read_times(video.times)
    gaps = np.flatnonzero(np.diff(seconds) > max(GAP_S, GAP_STEPS / fps))
    begins = np.maximum(seconds[[0, *gaps + 1]], video.begin)
    ends = np.minimum(seconds[[*gaps, -1]] + 1 / fps, video.begin + (video.length or math.inf))
    return begins, ends - begins, fps


def fit_plan(plan, video, annotation=()):
    """A plan -> the same for a file: which part of it may be used, and what tells the times of its frames. With gaps
    between these, u_start draws a place among all stretches into which the window fits; where it fits into none, the
    longest one is the file. BadFile."""
    noted = dict(annotation).get("fps") or 0.0
    plan = replace(plan, file=video, frame_fps=video.fps or plan.frame_fps, noted_fps=noted)
    if not video.times:
        return plan
    begins, lengths, fps = stretches(video)
    if len(begins) == 1 or lengths.max() <= 0:  # it begins behind the end, which usable_part says
        return plan
    window = plan.num_frames / plan.fps - 0.5 / fps if plan.fps else math.inf
    until = np.cumsum(lengths * (lengths >= min(window, lengths.max())))
    place = max(plan.u_start * until[-1], 1e-9)
    chosen = int(np.searchsorted(until, place))
    part = replace(video, begin=float(begins[chosen]), length=float(lengths[chosen]))
    return replace(plan, file=part, u_start=float(1 - (until[chosen] - place) / part.length))


def playing_stream(container, kept=""):
    """The video stream that plays: the first that is marked default, else the first. Attached pictures and streams of
    one frame (covers, thumbnails) never count beside another. BadFile without any."""
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    moving = [stream for stream in streams if stream.frames != 1]  # 0: not known
    if len(moving) > 1 and not all(stream.frames for stream in moving):
        alive = streams_alive(file_stamp(container, kept))
        moving = [stream for stream in moving if stream.index in alive]
    if not streams:
        raise BadFile("no video stream")
    return min(moving or streams, key=lambda stream: not stream.disposition & Disposition.default)


@contextmanager
def opened_stream(path, kept=""):
    """Context of a file that is read by PyAV -> (container, stream that plays, whose decoder stops at broken data and
    does not paint over it). BadFile for all that goes wrong."""
    import av

    try:
        with open_pyav(path) as container:
            stream = playing_stream(container, kept)
            stream.thread_type, stream.thread_count = "NONE", 1
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except (av.FFmpegError, *DECODE_ERRORS) as error:
        raise BadFile(f"pyav stopped decoding ({reason_of(error)})") from error


def from_key(packets, pts=None):
    """Packets from the first key packet (or the one at `pts`) on, without those that stand behind it and are shown
    before: they refer to pictures that are not there."""
    key = None
    for packet in packets:
        if key is None and packet.is_keyframe and packet.size and pts in (None, packet.pts):
            key = packet
        if key is not None and (packet is key or None in (packet.pts, key.pts) or packet.pts >= key.pts):
            yield packet


def clock_step(dts, before):
    """From one time of a transport stream to a later one: its clock of 33 bits starts anew every 26.5 hours."""
    return (dts - before + 2**32) % 2**33 - 2**32


def by_stretch(packets, unit):
    """(number of its stretch, packet) of a transport stream: one ends where a decoding time lies before the last, or
    over MAX_JUMP_S behind it."""
    number, before = 0, None
    for packet in packets:
        if packet.dts is not None:
            number += before is not None and not 0 <= clock_step(packet.dts, before) * unit <= MAX_JUMP_S
            before = packet.dts
        yield number, packet


def packet_end(packet):
    """When a packet's frame ends, in its stream's units. The container may call it 0 long: a video's frame stays for
    the mean of all at least."""
    rate = packet.stream.average_rate if packet.stream.type == "video" else 0
    return packet.pts + max(packet.duration or 0, round(1 / (rate * packet.time_base)) if rate else 0)


@Finding
def stream_keys(stamp, number):
    """Demux a transport stream once -> [[second, presentation time, byte, end of its stretch in s]] of its key packets.
    After a jump the next stretch lies as much later; one whose clock starts anew follows at once. BadFile without
    any."""
    keys, at, start, end = [], 0.0, 0, 0.0
    with open_pyav(stamp[0]) as container:
        stream = container.streams[number]
        unit = float(stream.time_base)
        for _, stretch in itertools.groupby(by_stretch(container.demux(stream), unit), operator.itemgetter(0)):
            found, last = [], -math.inf
            for _, packet in stretch:
                if packet.pts is not None and packet.is_keyframe and packet.pos is not None:
                    found.append((packet.pts, packet.pos))
                if packet.pts is not None and found:
                    last = max(last, packet_end(packet))
            if found:
                at = max(at + clock_step(found[0][0], start) * unit, end) if keys else 0.0
                start = found[0][0]
                end = at + (last - start) * unit
                keys += [[at + (pts - start) * unit, pts, byte, end] for pts, byte in found]
    if not keys:
        raise BadFile("no key frame in it")
    return keys


@Finding
def end_of_stream(stamp, number):
    """Where a video stream ends whose container does not say it -> seconds by the file's clock. Only what follows the
    last key frame is demuxed. Where no stream reaches the length that the header promises, the file is cut, and the
    promise stands: windows in the missing part are refused."""
    import av

    ends = {}
    with open_pyav(stamp[0]) as container:
        stream, promised = container.streams[number], (container.duration or 0) / 1e6
        for second in (promised or 10**9, 0):
            with suppress(av.FFmpegError):  # it cannot be sought: it stands at its start, or was read from there
                container.seek(int(second / stream.time_base), stream=stream)
            for packet in container.demux():
                if packet.pts is not None and packet.size:
                    end = float(packet_end(packet) * packet.time_base)
                    ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
            if number in ends:
                break
    return ends[number] if number in ends and max(ends.values()) > promised - 1.0 else promised


@Finding
def count_packets(stamp):
    """Pictures of a raw stream from its first key frame on -> their number."""
    with open_pyav(stamp[0]) as container:
        return sum(packet.size > 0 for packet in from_key(container.demux(video=0)))


def time_line(container, stream, plan, fast=True):
    """-> (TimeLine, its packets from the first key packet on). A transport stream's line covers all its parts."""
    kind, codec, unit = container.format.name, stream.codec_context, Fraction(stream.time_base)
    stamp = file_stamp(container, plan.kept)
    packets, fps = from_key(container.demux(stream)), float(stream.average_rate or stream.guessed_rate or 25)
    if kind in RAW_FORMATS:
        count, path = count_packets(stamp), plan.file.times
        if path:
            told, fps, _ = read_times(path)
            if len(told) < count:
                raise BadFile(f"{count} frames, and {len(told)} times in {one_line(os.path.basename(path))}")
            return TimeLine(0, unit, float(told[count - 1]) + 1 / fps, fps, in_order=True, told=told), packets
        fps = plan.frame_fps or float(codec.framerate or 0) or plan.noted_fps or RAW_FPS
        return TimeLine(0, 1 / Fraction(fps).limit_denominator(10**6), count / fps, fps, in_order=True), packets
    if kind == "mpegts":
        keys = stream_keys(stamp, stream.index)
        return TimeLine(keys[0][1], unit, keys[-1][3], fps), packets
    first, begin = next(packets, None), stream.start_time or 0
    if first is None and not fast:  # no packet is marked: the decoder decides what can be shown
        container.seek(begin, stream=stream)
        first = next(packets := container.demux(stream), None)
    if first is None:
        raise BadFile("no key frame in it")
    # AVI's presentation times are FFmpeg's guess, wrong where frames are stored in another order than shown
    in_order = kind == "avi" and (not fast or bool(codec.has_b_frames))
    start = first.dts if in_order else max(begin, begin if first.pts is None else first.pts)
    if stream.duration:
        lost = (first.dts if kind == "avi" else start) - begin  # what stands before the first key frame
        duration = float((stream.duration - max(lost, 0)) * unit)
    else:
        duration = end_of_stream(stamp, stream.index) - float(start * unit)
    return TimeLine(start, unit, duration, fps, in_order), itertools.chain([first], packets)


def enter_window(container, stream, line, times):
    """Go to a key frame at or before a window -> packets from there on. BadFile where none is found. Some demuxers
    seek by decoding times, which lie before presentation times: then the first try lands too late."""
    for back in (0.0, 2.0, 10.0):  # seconds
        container.seek(line.start + int((times[0] - back) / line.unit), stream=stream)
        packets = from_key(container.demux(stream))
        key = next(packets, None)
        if key is not None and (key.pts is None or line.second(key.pts) <= times[0]):
            return itertools.chain([key], packets)
    raise BadFile(f"no key frame found at or before {times[0]:.2f} s")


def key_before(keys, times):
    """The entry of stream_keys that is the last at or before a window, else the first. BadFile for one over a jump."""
    key = keys[max(bisect.bisect(keys, [times[0], math.inf]) - 1, 0)]
    if key[3] < keys[-1][3] and times[-1] > key[3]:
        raise BadFile(f"its time stamps jump at {key[3]:.2f} s, inside the window; cut the file there")
    return key


def enter_stretch(container, stream, line, times, fast):
    """Go to the stretch of a transport stream in which a window lies, for `fast` to the last key packet before it,
    else to the first -> (TimeLine by its clock, packets to its end). BadFile."""
    keys = stream_keys(file_stamp(container), stream.index)
    at, pts, byte, end = key_before(keys, times)
    if not fast:
        at, pts, byte, _ = next(key for key in keys if key[3] == end)
    container.seek(byte, unsupported_byte_offset=True)
    line = replace(line, start=pts - round(at / line.unit))
    stretches = itertools.groupby(by_stretch(from_key(container.demux(stream), pts), line.unit), operator.itemgetter(0))
    return line, (packet for _, packet in next(stretches, (0, ()))[1])


def orientation(frame):
    """How a decoded frame is shown -> (whether rows and columns change places, steps through rows and columns).

    Its display matrix a b u, c d v, x y w shows what is stored in column p, row q in column a p + c q, row b p + d q,
    up to a shift (ISO/IEC 14496-12, 6.2.2). BadFile unless it is one of the eight that turn by quarters or mirror. Its
    scale is part of the pixels' aspect.
    """
    from av.sidedata.sidedata import SideDataContainer

    # frame.side_data would tie the frame to itself until the garbage collector comes, which hangs for ever in a fork,
    # where the threads of the frame's scaler are not
    data = SideDataContainer(frame).get("DISPLAYMATRIX")
    if data is None:
        return False, 1, 1
    matrix = np.frombuffer(bytes(data), np.int32).reshape(3, 3).astype(np.float64)
    turn = matrix[:2, :2] / np.maximum(np.hypot(*matrix[:2, :2]), 1e-9)
    signs = np.round(turn)
    across, down = signs.sum(0)  # each column holds one 1 or -1 beside a 0
    if np.abs(turn - signs).max() > 0.01 or abs(np.linalg.det(signs)) != 1 or matrix[:2, 2].any():
        raise BadFile(f"its display matrix {matrix.astype(int).ravel().tolist()} neither turns by quarters nor mirrors")
    return not signs[0, 0], int(down), int(across)


@lru_cache(maxsize=1)
def one_thread():
    """For a scaler: PyAV 17 and later start one of these per core for each clip, beside as many workers."""
    import av

    return {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


def whole_picture(frame, box, pixel_aspect, scaler):
    """One decoded frame -> (uint8 [h, w, 3], turned and mirrored as it asks, pixels squared, what `box` gives). `box`
    tells from its size as shown the size w, h to which it is scaled, and two more. The scaler is that of all frames of
    a clip: to set up one costs as much as to scale a small frame ten times."""
    on_its_side, down, across = orientation(frame)
    turn = -1 if on_its_side else 1
    scaled = box(*(frame.width * pixel_aspect, frame.height)[::turn])
    width, height = scaled[:2][::turn]
    plane = scaler.reformat(frame, width, height, "rgb24", interpolation="AREA", **one_thread()).planes[0]
    # to_ndarray would copy most widths line by line, at more cost than the scaling
    picture = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : 3 * width].reshape(height, width, 3)
    picture = picture.swapaxes(0, 1) if on_its_side else picture
    return picture[::down, ::across], scaled


def pyav_picture(frame, plan, pixel_aspect, scaler):
    """whole_picture, cut as a plan asks -> uint8 [H, W, 3]."""
    picture, (_, _, x, y) = whole_picture(frame, partial(crop_box, plan), pixel_aspect, scaler)
    return picture[y : y + plan.height, x : x + plan.width]


def is_wanted(packet, near, line, times):
    """Whether a packet's frame is on screen at a requested time: from its presentation time to the next of `near`,
    those known, in order. One not known yet makes that longer: a frame too many is decoded, never one too few."""
    place = bisect.bisect_left(near, packet.pts)
    if place == 0 or near[place - 1] < line.start:
        return True  # the first picture also stands for whatever is asked for before it
    later, request = bisect.bisect_right(near, packet.pts, place), bisect.bisect_left(times, line.second(packet.pts))
    return request < len(times) and (later == len(near) or times[request] < line.second(near[later]))


def starts_anew(packet, codec):
    """Whether what follows a key packet never speaks of pictures before it: in H.264 only an IDR picture promises that.
    Behind others a seek may fail, and a reader that jumps would meet one at every jump."""
    if codec.name != "h264":
        return True
    data, extra, at = bytes(packet), codec.extradata or b"", 0
    if extra[:1] != b"\1":  # units begin with 0 0 1, else with their length
        return re.search(rb"\x00\x00\x01[\x25\x45\x65]", data) is not None
    width, kinds = (extra[4] & 3) + 1 if len(extra) > 4 else 4, set()
    while at + width < len(data):
        kinds.add(data[at + width] & 31)
        at += width + int.from_bytes(data[at : at + width], "big")
    return 5 in kinds


def unneeded_run(queue, near, line, times, codec):
    """Packets read ahead -> (how many of the first need not be decoded since no request falls on their frames and a key
    packet follows, for how many packets there is no need to look again). -1 of them where nothing more is asked for."""
    if queue and all(packet.pts is not None and line.second(packet.pts) > times[-1] for packet in queue):
        # the last frame's own length may be a guess: where it is on screen for long, the next one is decoded to show it
        return (-1 if any(0 <= times[-1] - line.second(pts) < 1 for pts in near) else 0), 0
    for place, packet in enumerate(queue):
        if place and packet.is_keyframe and packet.pts is not None and starts_anew(packet, codec):
            return place, 0
        if packet.pts is None or is_wanted(packet, near, line, times):
            return 0, place
    return 0, len(queue) - 1


def pyav_frames(stream, times, fast, line, packets):
    """Decoded frames of packets in display order. `fast` leaves out, by the presentation times around them (a
    container's durations are its guess), what is not on screen at a requested time: frames that nobody refers to, and
    all from there to the next key packet, which is entered as after a seek. The others come out bit for bit the
    same."""
    codec, packets, queue, near, order = stream.codec_context, iter(packets), deque(), [], deque()
    between = np.median(np.diff(times)) * line.fps if len(times) > 1 else 0.0  # frames; of a group as of its windows
    may_skip, times, settled, entry, entered = fast and codec.name in SKIPPING_CODECS, times.tolist(), 0, None, True
    depth = LOOK_AHEAD + int(min(between + 1e-6, 12 * LOOK_AHEAD))
    for number in itertools.count():
        while len(queue) <= depth and (ahead := next(packets, None)) is not None:
            if ahead.size or ahead.dts is not None:  # else the demuxer's word for the end
                queue.append(ahead)
            if ahead.pts is not None and not ahead.is_discard:
                bisect.insort(near, ahead.pts)
                del near[: -4 * depth]
        run, settled = unneeded_run(queue, near, line, times, codec) if fast and not settled else (0, settled - 1)
        packet = queue.popleft() if queue and not run else None  # asks for what the decoder still holds
        if packet is not None and entry is not None and packet.pts is not None and packet.pts < entry:
            if is_wanted(packet, near, line, times):
                raise BadFile("a frame before a key frame refers to what was left out")
            continue
        if packet is not None and may_skip and packet.pts is not None:
            codec.skip_frame = "DEFAULT" if is_wanted(packet, near, line, times) else "NONREF"
        if packet is not None and line.in_order and packet.size:
            order.append(number if packet.dts is None else packet.dts)
        for frame in codec.decode(packet):
            if not entered and (frame.pts != entry or not frame.key_frame):
                raise BadFile("a key frame cannot be entered")
            frame.pts, entered = order.popleft() if line.in_order else frame.pts, True
            yield frame
        if run > 0:
            codec.flush_buffers()
            for _ in range(run):
                queue.popleft()
            entry, entered, settled = queue[0].pts, False, 0
        elif packet is None:
            return


def pixel_aspect_of(stream):
    """Width over height of a stream's pixels. BadFile where no picture could be made of them."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / 8 <= aspect <= 8:
        raise BadFile(f"its pixels are {aspect:g} times as wide as high")
    return aspect


def shown_frames(container, stream, line, packets, times, fast, every=False):
    """Decode forward from a key frame at or before times[0] -> generator of (second from which on a frame is on screen,
    second at which it ends where it is the last, frame). `fast` seeks and leaves out what nobody needs at `times`,
    unless `every` frame is asked for. The first frame from the start of a file is there for all time before it, too.
    BadFile for what follows a frame when the next one is asked for: who has all needs no more."""
    kind, codec, fast = container.format.name, stream.codec_context, fast and not line.in_order
    sought, before, reorders = fast and times[0] > 1, None, codec.has_b_frames
    if kind == "mpegts":
        line, packets = enter_stretch(container, stream, line, times, fast)
    elif sought:
        packets = enter_window(container, stream, line, times)
    for frame in pyav_frames(stream, times, fast and not every, line, packets):
        if frame.pts is None and fast:
            raise BadFile("a picture without a presentation time")  # its forerunner tells it: none may be left out
        if frame.pts is None and before is None:
            continue  # before the beginning of time
        now = before + 1 / line.fps if frame.pts is None else line.second(frame.pts)
        is_first = before is None
        if is_first and sought and (now > times[0] or now > 0 and not frame.key_frame):  # at 0 it may be hidden
            what = "" if frame.key_frame else ", on no key frame"
            raise BadFile(f"seek to {times[0]:.2f} s landed at {now:.2f} s{what}")
        if not is_first and now < before:
            raise BadFile(f"its time stamps run backwards, from {before:.2f} s to {now:.2f} s; convert it to mp4")
        length = 1 / line.fps if line.in_order else float((frame.duration or 0) * line.unit)
        if fast and kind == "avi" and codec.has_b_frames != reorders:
            raise BadFile("its frames are not stored in the order in which they are shown")
        yield -math.inf if is_first and not sought else now, now + length, frame
        if frame.is_corrupt:
            raise BadFile(f"damaged picture at {now:.2f} s")
        before = now
    if before is None:
        raise BadFile("no frame could be decoded")


def end_slack(line):
    """Seconds by which a stream may end before its header says: containers round; a missing second is a cut file."""
    return 1.0 + 2 / line.fps


def pyav_walks(container, stream, plans, fast):
    """Decode forward once for windows of a file, in the order of their starts, and keep the frame on screen at each
    requested time -> generator of uint8 [T, H, W, 3], one for each plan."""
    from av.video.reformatter import VideoReformatter

    line, packets = time_line(container, stream, plans[0], fast)
    times = [frame_times(plan, usable_part(plan, line.duration, line.fps), line.fps) for plan in plans]
    order, moments = np.argsort(times, axis=None, kind="stable"), np.sort(times, axis=None)
    aspect, answered, given, shown, shown_end = pixel_aspect_of(stream), 0, 0, None, 0.0
    looks, frames = [(plan, aspect, VideoReformatter()) for plan in plans], [[] for _ in plans]
    walk = shown_frames(container, stream, line, packets, moments, fast)
    for now, end, frame in itertools.chain(walk, [(math.inf, 0.0, None)]):
        slack = end_slack(line) if frame is None and line.duration * line.fps >= plans[0].num_frames else math.inf
        if moments[-1] > shown_end + slack:
            raise BadFile(f"ends at {shown_end:.2f} s, its header promises {line.duration:.2f} s")
        due, pictures = answered if shown is None else int(np.searchsorted(moments, now)), {}
        for place in (order[answered:due] // len(times[0])).tolist():  # requests that the frame before this one answers
            if place not in pictures:
                pictures[place] = pyav_picture(shown, *looks[place])
            frames[place].append(pictures[place])
        answered = max(due, answered)
        while given < len(plans) and len(frames[given]) == len(times[0]):
            yield np.stack(frames[given])
            frames[given] = []
            given += 1
        if given == len(plans):
            return
        shown, shown_end = frame, end


def pyav_walk(container, stream, plan, fast):
    """pyav_walks for one window."""
    return next(pyav_walks(container, stream, (plan,), fast))


def read_pyav(path, plan, fast=True, walk=pyav_walk):
    """Frames through PyAV. `fast` seeks to the window and leaves out frames that are not needed; where that fails the
    file is read plainly from its start."""
    try:
        with opened_stream(path, plan.kept) as (container, stream):
            return walk(container, stream, plan, fast)
    except BadFile as error:
        if not fast or isinstance(error, CannotOpen):
            raise
    return read_pyav(path, plan, False, walk)  # an open GOP cannot always be entered at its key frame


def group_frames(path, plans):
    """read_pyav for windows of a group, in one go -> generator. BadFile where each must be read alone."""
    check_regular(path)
    with opened_stream(path, plans[0].kept) as (container, stream):
        yield from pyav_walks(container, stream, plans, True)


def video_timing(path, plan):
    """-> (seconds that may be used, frames per second) of a video, for frame_times of a plan. BadFile for a bad one."""
    if plan.file.pictures:
        return picture_line(path, plan)[2:]
    with opened_stream(path, plan.kept) as (container, stream):
        line, _ = time_line(container, stream, plan)
        return usable_part(plan, line.duration, line.fps), line.fps


def signal_values(annotation, names):
    """Signals of an annotation that are lists -> {name: float64 [n]}, NaN for null."""
    there = [name for name in names if isinstance(annotation.get(name), list) and annotation[name]]
    return {name: np.array([math.nan if v is None else v for v in annotation[name]], np.float64) for name in there}


def timed_signals(annotation, video, plan, names):
    """Signals at the times of a clip's frames, whose plan fits the video -> {name: float64 [T]}: the value at or before
    each, NaN where that is null or behind the list's end. BadFile without times."""
    values = signal_values(annotation, names)
    if not values:
        return {}
    try:
        duration, native_fps = video_timing(video.path, plan)
    except DECODE_ERRORS as error:
        raise BadFile(f"no times for its signals: {one_line(reason_of(error))}") from error
    times = frame_times(plan, duration, native_fps) - video.begin
    at = (times * float(annotation.get("fps") or native_fps)).astype(int)
    return {name: np.append(row, math.nan)[np.minimum(at, len(row))] for name, row in values.items()}


def action_rows(signals, cfg):
    """{name: values of T frames} -> means over tubelets, float32 [tubelets, A], NaN for signals that are absent."""
    absent = [math.nan] * cfg.num_frames
    rows = torch.tensor(np.array([signals.get(name, absent) for name in cfg.action_names], np.float64))
    return rows.unflatten(1, (-1, cfg.tubelet_t)).mean(2).T.float()


def open_picture(path):
    """A picture -> uint8 [H, W, 3], turned as it asks. BadFile."""
    from PIL import Image, ImageOps

    try:
        check_regular(path)
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS or image.mode[0] in "IF":
                raise BadFile(f"{image.width} x {image.height} pixels of kind {image.mode}")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (BadFile, SyntaxError, Image.DecompressionBombError, *DECODE_ERRORS) as error:
        raise bad_part("picture", path, error) from error


def read_pictures(path, plan):
    """The pictures of a drive that a plan needs, no others are opened -> uint8 [T, H, W, 3]. BadFile."""
    import av
    from av.video.reformatter import VideoReformatter

    paths, seconds, duration, fps = picture_line(path, plan)
    wanted = np.searchsorted(seconds, frame_times(plan, duration, fps), side="right") - 1
    frames, sizes, scaler = {}, {}, VideoReformatter()
    for number in dict.fromkeys(wanted.tolist()):
        picture = open_picture(paths[number])
        height, width, _ = picture.shape
        sizes.setdefault((height, width), f"{one_line(os.path.basename(paths[number]))} {width} x {height}")
        if len(sizes) > 1:
            raise BadFile(f"pictures of two sizes: {', '.join(sizes.values())}")
        frames[number] = pyav_picture(av.VideoFrame.from_ndarray(picture, format="rgb24"), plan, 1.0, scaler)
    return np.stack([frames[number] for number in wanted.tolist()])


@Finding
def beyond_decord(stamp):
    """What of a file decord cannot be trusted with -> text or "". It has no list of allowed demuxers (a playlist would
    open other files), is seconds off in ts, repeats frames in avi, chooses a video stream by its own rules, does not
    mirror, and knows nothing of first frames that cannot be shown."""
    with open(stamp[0], "rb") as file:
        head = file.read(12)
    if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") and head[:4] != b"\x1aE\xdf\xa3":
        return "containers other than mp4, mov, mkv and webm"
    with open_pyav(stamp[0]) as container:
        if len(container.streams.video) != 1:
            return f"{len(container.streams.video)} video streams in one file"
        first = next(container.demux(video=0))
        if first.is_discard or not first.is_keyframe:
            return "a stream whose first frame is not shown"
        on_its_side, down, across = orientation(next(iter(first.decode()), None) or next(container.decode(video=0)))
        return "mirrored pictures" if (down * across < 0) != on_its_side else ""


@Finding
def decord_size(stamp):
    """Height and width of the frames that decord gives."""
    import decord

    return list(decord.VideoReader(stamp[0], ctx=decord.cpu(0), num_threads=1)[0].shape[:2])


def read_decord(path, plan):
    """Frames through decord. For a file's first clip it is opened twice: its resize must be known before a frame tells
    the size."""
    if importlib.util.find_spec("decord") is None:
        raise CannotOpen("decord is not installed")
    import av
    import decord

    decord.logging.set_level(decord.logging.FATAL)
    try:
        # in HEVC and AV1 its frames may be two off, which at a border is another episode
        if (
            beyond := "parts of a file"
            if plan.file.begin or plan.file.length
            else beyond_decord(stamp := path_stamp(path, plan.kept))
        ):
            raise CannotOpen(f"only pyav is trusted with {beyond}")
        scaled_w, scaled_h, x, y = crop_box(plan, *decord_size(stamp)[::-1])
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, width=scaled_w, height=scaled_h)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
        starts -= starts[0]
        fps = float(reader.get_avg_fps()) or 25.0
        times = frame_times(plan, float(starts[-1]) + 1 / fps, fps)
        wanted = np.clip(np.searchsorted(starts, times, side="right") - 1, 0, len(starts) - 1)
        return reader.get_batch(wanted).asnumpy()[:, y : y + plan.height, x : x + plan.width]
    except (StopIteration, av.FFmpegError, *DECODE_ERRORS, decord.DECORDError) as error:
        words = (str(error).strip() or type(error).__name__).splitlines()
        raise CannotOpen(f"decord cannot read it ({words[-1][:120]})") from error


READERS = {"pyav": read_pyav, "decord": read_decord}


def read_frames(path, plan, decoder):
    """Decode just the frames of a plan, resized -> uint8 [T, H, W, 3]. BadFile with every decoder's reason."""
    if plan.file.pictures:
        return read_pictures(path, plan)
    check_regular(path)
    reasons = []
    for name in DECODERS[decoder]:
        try:
            return np.ascontiguousarray(READERS[name](path, plan))
        except CannotOpen as error:
            reasons.append(str(error))
    raise BadFile("; ".join(reasons))


def usable_cores():
    """Cores that this process may use: a job or a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class HeldSignals:
    """Context around a fork: signals with a handler are held back and raised again at its end. Python drops the
    exception of a handler (Ctrl-C) in a fork hook, and nobody ends a process whose start was cut off."""

    def hear(self, number, frame):
        self.heard.append(number)

    def __enter__(self):
        in_main = threading.current_thread() is threading.main_thread()  # nobody else may set handlers
        held = [number for number in STOP_SIGNALS if in_main and callable(signal.getsignal(number))]
        self.heard = []  # there before the first handler is
        self.previous = {number: signal.signal(number, self.hear) for number in held}

    def __exit__(self, kind, error, trace):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        for number in self.heard:
            signal.raise_signal(number)


def end_without(parent):
    """End this process within a second of its parent's death, which no signal tells: run in a thread."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(EXIT_ERROR)


def do_apart(parent, pipe, work, *args):
    """Life of a process of told_apart: sends what `work` gives, then None unless it was a BadFile."""
    threading.Thread(target=end_without, args=(parent,), daemon=True).start()
    with suppress(BadFile):
        for value in work(*args) or ():
            pipe.send(value)
        pipe.send(None)
    os._exit(0)


def told_apart(seconds, work, *args):
    """What `work` gives, one by one, in a forked process that may crash or hang and is killed after so many seconds ->
    (list, whether that is all)."""
    pipe, end = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=do_apart, args=(os.getpid(), end, work, *args))
    values, done, deadline = [], False, time.monotonic() + seconds
    with HeldSignals():
        process.start()
    try:
        end.close()
        with suppress(EOFError):  # it died of a file
            while not done and pipe.poll(max(deadline - time.monotonic(), 0.0)):
                values.append(pipe.recv())
                done = values[-1] is None
    finally:
        process.kill()
        process.join()
    return values[: len(values) - done], done


def small_clip(cfg, video):
    """Decode a small clip of a video, for told_apart."""
    plan = ClipPlan(2, cfg.clip_fps, cfg.height, cfg.width, 0.0, 1.0, 1.0, 0.5, 0.5, cfg.frame_fps)
    read_frames(video.path, fit_plan(plan, video), cfg.decoder)


def guessed_names(root, videos):
    """Names of the raw streams whose rate nobody gives."""
    for video in videos:
        with suppress(BadFile):  # named with its reason when a clip of it is read
            check_regular(video.path)
            with open_pyav(video.path) as container:
                raw = container.format.name in RAW_FORMATS and container.streams.video
                codec = raw and raw[0].codec_context
                if codec and codec.width and not codec.framerate and not read_annotation(root, video).get("fps"):
                    yield video.name


def guessed_rates(cfg, root, videos):
    """Names of the files that are read at RAW_FPS since neither frame_fps nor header nor annotation says more -> (list,
    whether all were looked at). Only raw suffixes are opened, for 20 s at most."""
    raw = [video for video in videos if video.path.lower().endswith(RAW_SUFFIXES) and not (video.fps or video.times)]
    if cfg.frame_fps or not raw:
        return [], True
    return told_apart(min(cfg.decode_timeout_s, 20.0), guessed_names, root, raw)


def split_readable(cfg, videos, read_one=small_clip):
    """split_videos, but while none of a handful of held-out files can be read by `read_one`, one more is held out."""
    train, val = split_videos(videos, cfg.val_fraction)
    held_out = len({number if video.drive == video.name else video.drive for number, video in enumerate(val)})
    for at_least in range(held_out, min(held_out + 8, len(videos) - 1) + 1):
        wider = split_videos(videos, cfg.val_fraction, at_least)
        if len(val) > 8 or any(told_apart(cfg.decode_timeout_s, read_one, cfg, video)[1] for video in wider[1]):
            return wider
    return train, val


# ---------------------------------------------------------------------------------------------------------------------
# 5  Frame cache: decoded frames on disk
# ---------------------------------------------------------------------------------------------------------------------
# A file is kept in segments of some seconds: a row of bytes for each frame that is on screen in it, scaled but not cut,
# and a tail: what they were made from, from which to which second each row answers, and its sum. What no row answers is
# decoded: a missing one gives no wrong frame. Rows are read, not mapped: a network disk that goes away under a map
# kills the process.

KEPT_MARK = "VJepa_AUTO_V2 frame cache\n"  # it stands in the file `frame_cache` of each
KEPT_NAME = r"([0-9a-f]{40}\.\d+)(\.tmp)?"  # of all else that is ours, in folders called by two digits
KEPT_S, KEPT_BYTES = 10.0, 2**27  # a segment lasts so long, half of it and so on while it would take more bytes
LOCK_S = 2.0  # the folder's count is locked for moments, or while much is deleted


class Unkept(Exception):
    """Frames cannot be kept, and the message says why: from now on what is not there is decoded."""


class OutOfTime(Exception):
    """To keep a segment takes so long that its worker would be taken for hung."""


def kept_box(plan, ratios, width, height):
    """Size at which a frame is kept and its size as shown, for whole_picture: what the plan's crop asks for, or with
    several ratios the most that any asks for and the frame has."""
    sides = np.max([crop_box(replace(plan, ratio=ratio), width, height)[:2] for ratio in ratios], 0)
    sides = np.minimum(sides, np.ceil((width, height))) if len(ratios) > 1 else sides
    return int(sides[0]), int(sides[1]), width, height


def line_values(line):
    """A TimeLine without told times -> list, for JSON and to compare."""
    return [line.start, line.unit.numerator, line.unit.denominator, line.in_order, line.duration, line.fps]


def kept_cut(picture, plan, shown, scaler):
    """A kept frame -> uint8 [H, W, 3] as a plan asks; scaled again where it was kept for another crop than the plan's.
    `shown` is the size of the frame before it was scaled."""
    import av

    height, width, _ = picture.shape
    scaled_w, scaled_h, x, y = crop_box(plan, *shown)
    if (scaled_w, scaled_h) == (width, height):
        return picture[y : y + plan.height, x : x + plan.width]
    left, right = (round(at * (width / scaled_w)) for at in (x, x + plan.width))
    top, bottom = (round(at * (height / scaled_h)) for at in (y, y + plan.height))
    part = np.ascontiguousarray(picture[top : max(bottom, top + 1), left : max(right, left + 1)])
    frame = av.VideoFrame.from_ndarray(part, format="rgb24")
    return scaler.reformat(frame, plan.width, plan.height, interpolation="AREA", **one_thread()).to_ndarray()


def open_segment(path, key, since, stack):
    """A segment, open as long as an ExitStack -> (number of the open file, size of its frames and as they are shown,
    float64 [3, rows]: from which second to before which each answers, its sum), None where none is whole and of this
    key. What was used last before `since` is so now."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    stack.callback(os.close, number)
    info = os.fstat(number)
    end = os.pread(number, 2**14, max(info.st_size - 2**14, 0))
    length = int.from_bytes(end[-8:], "little")
    if len(end) < length + 16 <= info.st_size:
        end = os.pread(number, length + 16, info.st_size - length - 16)
    tail = end[-16 - length : -16]
    if len(tail) != length or hashlib.sha256(tail).digest()[:8] != end[-16:-8]:
        return None
    text, _, arrays = tail.partition(b"\n")
    says = json.loads(text)
    if info.st_mtime < since:
        with suppress(OSError):  # a cache that nobody may write knows no least recently used either
            os.utime(path)
    return (number, says["size"], np.frombuffer(arrays).reshape(3, -1)) if says["key"] == key else None


def kept_picture(segment, row):
    """A row of a segment -> uint8 [h, w, 3], None where it is damaged."""
    number, (width, height, *_), says = segment
    size = width * height * 3
    stride = -(-size // 8) * 8
    content = os.pread(number, stride, row * stride)
    if len(content) == stride and np.frombuffer(content, np.uint64).sum() == says[2].view(np.uint64)[row]:
        return np.frombuffer(content, np.uint8, size).reshape(height, width, 3)
    return None


class SegmentMaker:
    """A segment in the making: a temporary file that nobody reads, whose lock says that somebody is at it and goes with
    its process. BlockingIOError where somebody is."""

    def __init__(self, path):
        self.path, self.temporary = path, path.with_name(f"{path.name}.tmp")
        path.parent.mkdir(exist_ok=True)
        self.handle = open(self.temporary, "ab")
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.is_there():
                raise BlockingIOError  # it was opened just before its maker renamed it
            self.restart()
        except OSError:
            self.handle.close()
            raise

    def is_there(self):
        """Whether the temporary file still is the one that is open here."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.temporary), os.fstat(self.handle.fileno()))
        return False

    def restart(self):
        """Forget all rows, those of a process that was killed too."""
        self.handle.truncate(0)
        self.size, self.spans, self.sums = [], [], []

    def add(self, picture, shown, begin, end):
        """A row that answers from second `begin` to before `end`. BadFile unless all are of one size."""
        size = [*picture.shape[1::-1], *shown]
        if self.size not in ([], size):
            raise BadFile("frames of two sizes")
        row = np.zeros(-(-picture.size // 8) * 8, np.uint8)
        row[: picture.size] = picture.reshape(-1)
        self.handle.write(row)
        self.size = size
        self.spans.append((begin, end))
        self.sums.append(row.view(np.uint64).sum())

    def seal(self, key):
        """Write the tail, and all of it to the disk -> bytes."""
        arrays = np.array(self.spans).reshape(-1, 2).T.tobytes() + np.array(self.sums, np.uint64).tobytes()
        tail = json.dumps({"key": key, "size": self.size}).encode() + b"\n" + arrays
        self.handle.write(tail + hashlib.sha256(tail).digest()[:8] + len(tail).to_bytes(8, "little"))
        self.handle.flush()
        os.fsync(self.handle.fileno())
        return self.handle.tell()

    def close(self):
        """Leave nothing that is not whole."""
        with suppress(OSError):  # what kept it from being written has been told
            if self.is_there():
                self.temporary.unlink(missing_ok=True)
        with suppress(OSError):  # flushes what a full disk did not take
            self.handle.close()


@Finding
def kept_line(stamp, frame_fps, noted_fps, times="", *_):
    """What is kept of a file's times and form -> [start and unit (its parts) of its TimeLine, in_order, duration, fps,
    width and height of what it shows, number of its stream if it is a transport stream's, else -1]. BadFile."""
    drawn = 2, 1.0, 2, 2, 0.0, 1.0, 1.0, 0.5, 0.5
    plan = ClipPlan(*drawn, frame_fps, noted_fps, kept=stamp[4], file=VideoFile("", "", times=times))
    with opened_stream(stamp[0], stamp[4]) as (container, stream):
        values = line_values(time_line(container, stream, plan)[0])
        sides = stream.codec_context.width * pixel_aspect_of(stream), stream.height
        return [*values, *sides, stream.index if container.format.name == "mpegts" else -1]


class KeptFile:
    """A file while a FrameCache reads a clip of it. `plan` and `ratios`, with kept_box, decide the size of what is kept
    of it, in segments of so many `seconds`, each of about `rate` bytes per second. BadFile."""

    def __init__(self, cache, path, plan, ratios):
        self.cache, self.path, self.plan, self.ratios = cache, path, plan, ratios
        self.stamp = path_stamp(path, plan.kept)
        told, is_thin = plan.file.times, plan.start_fps > 0  # then not all frames are kept
        clock = [plan.frame_fps, plan.noted_fps, *(path_stamp(told)[:3] if told else ())]
        starts = [plan.start_fps, plan.fps, plan.num_frames, plan.file.begin, plan.file.length] if is_thin else []
        self.key = [*file_key(self.stamp), clock, [plan.height, plan.width, plan.scale, *ratios], starts]
        self.name = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:40]
        self.deadline, self.makers = time.monotonic() + cache.limit_s, {}  # number of a segment -> SegmentMaker
        if self.name in cache.failed:
            raise BadFile("it could not be kept")
        cache.failed.add(self.name)
        *self.line, width, height, self.number = kept_line(self.stamp, *clock)
        cache.failed.discard(self.name)
        width, height, *_ = kept_box(plan, ratios, width, height)
        self.seconds, self.rate = KEPT_S, width * height * 3 * min(self.line[-1], plan.start_fps or math.inf)
        while self.seconds > 1.0 and self.seconds * self.rate > KEPT_BYTES:
            self.seconds /= 2

    def frames(self, plan):
        """Frames of a plan out of what is kept, after keeping what is missing if possible -> uint8 or None. BadFile."""
        times = frame_times(plan, usable_part(plan, *self.line[-2:]), self.line[-1])
        if self.number >= 0:
            key_before(stream_keys(self.stamp, self.number), times)
        frames, missing = self.take(plan, times)
        return self.take(plan, times)[0] if missing and self.fill(missing) else frames

    def place(self, number):
        """Path of a segment."""
        return self.cache.folder / self.name[:2] / f"{self.name}.{number}"

    def take(self, plan, times):
        """Read what is kept -> (uint8 [T, H, W, 3] or None, numbers of the segments that are missing or damaged)."""
        from av.video.reformatter import VideoReformatter

        numbers = np.maximum(times // self.seconds, 0).astype(int).tolist()
        frames = np.empty((len(times), plan.height, plan.width, 3), np.uint8)
        scaler, since = VideoReformatter(), self.cache.since
        with ExitStack() as stack:
            segments = {n: open_segment(self.place(n), self.key, since, stack) for n in dict.fromkeys(numbers)}
            if missing := [number for number, segment in segments.items() if segment is None]:
                return None, missing
            for place, (number, second) in enumerate(zip(numbers, times.tolist())):
                _, size, (begin, end, _) = segments[number]
                row = int(begin.searchsorted(second, "right")) - 1
                if row < 0 or second >= end[row]:
                    return None, []
                if (picture := kept_picture(segments[number], row)) is None:
                    return None, [number]
                frames[place] = kept_cut(picture, plan, size[2:], scaler)
        return frames, []

    def fill(self, numbers):
        """Decode from the first to the last of some segments and keep them -> whether all are kept now; not where
        another process makes one. What failed is not tried again by this process."""
        cache, tried = self.cache, (self.name, *numbers)
        if not cache.stores or tried in cache.failed:
            return False
        try:
            for number in sorted(numbers):
                self.makers[number] = SegmentMaker(self.place(number))
            if not cache.make_room(round(len(numbers) * self.seconds * self.rate)):
                raise Unkept(cache.full)
            read_pyav(self.path, self.plan, walk=self.keep)
            return True
        except BadFile:
            cache.failed.add(tried)
        except OutOfTime:
            if len(self.makers) == len(numbers):
                cache.failed.add(self.name)
        except BlockingIOError:
            pass  # another process is at it
        finally:
            for maker in self.makers.values():
                maker.close()
            self.makers.clear()
        return False

    def keep(self, container, stream, plan, fast):
        """The walk of read_pyav that fills `makers`."""
        from av.video.reformatter import VideoReformatter

        line, packets = time_line(container, stream, plan, fast)
        if line_values(line) != self.line:
            raise BadFile("its times are others when it is read from its start")
        times, wanted = np.array([min(self.makers), max(self.makers) + 1]) * self.seconds, None
        if plan.start_fps:
            wanted = wanted_times(plan, usable_part(plan, line.duration, line.fps), line.fps)
            times = np.unique([*times, *wanted[(times[0] < wanted) & (wanted < times[1])]])
        look = partial(kept_box, plan, self.ratios), pixel_aspect_of(stream), VideoReformatter()
        for maker in self.makers.values():
            maker.restart()
        walk, shown = shown_frames(container, stream, line, packets, times, fast, not plan.start_fps), None
        for now, end, frame in itertools.chain(walk, [(math.inf, math.inf, None)]):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            if shown is not None:
                since, shown_end, picture = shown
                until = now if frame is not None else math.nextafter(shown_end + end_slack(line), math.inf)
                self.add(picture, look, since, until, wanted, frame is None)
            if not self.makers:
                return
            shown = now, end, frame

    def add(self, frame, look, since, until, wanted, is_last):
        """Give a frame that is on screen from second `since` to before `until` to the segments in which it is, and
        finish those that end in it."""
        picture = None
        for number, maker in list(self.makers.items()):
            low, high = number * self.seconds, (number + 1) * self.seconds
            begin, end = max(low, since), min(high, until)
            if begin < end and wanted is not None:
                inside = wanted[slice(*np.searchsorted(wanted, (begin, end)))]
                begin, end = (inside[0], math.nextafter(inside[-1], math.inf)) if len(inside) else (0, 0)
            if begin < end:
                picture = picture or whole_picture(frame, *look)
            try:
                if begin < end:
                    maker.add(picture[0], picture[1][2:], begin, end)
                if is_last or until >= high:
                    self.finish(number, maker)
            except OSError as error:  # would be a BadFile to who reads a video
                raise Unkept(reason_of(error)) from error

    def finish(self, number, maker):
        """Give a segment that has all its rows its name. BadFile where its source has changed meanwhile."""
        size = maker.seal(self.key)
        if path_stamp(self.path, self.plan.kept) != self.stamp:
            raise BadFile("it changed while it was read")
        if not self.cache.make_room(size, maker):
            raise Unkept(self.cache.full)
        self.makers.pop(number).handle.close()


class FrameCache:
    """Decoded frames in a folder, put there by whoever needs them first: any number of processes and runs.

    `read` gives the frames of read_frames, bit for bit the same unless crops of several sizes are drawn. `since` is
    when this run began: what has been used later is not deleted. `stores`: whether more can be kept.
    """

    def __init__(self, folder, cfg, since=0.0, stores=True):
        self.folder, self.limit, self.since, self.stores = Path(folder), cfg.frame_cache_gb * 1e9, since, stores
        self.decoder, self.limit_s, self.side = cfg.decoder, cfg.decode_timeout_s / 3, (cfg.height, cfg.width)
        self.low, self.high = (cfg.crop_scale_min, cfg.crop_ratio_min), (cfg.crop_scale_max, cfg.crop_ratio_max)
        self.full = f"this run uses all of its frame_cache_gb = {cfg.frame_cache_gb:g} (--frame_cache_gb)"
        self.failed = set()  # names of files, or these with segments, that are not to be tried again

    def open(self):
        """Prepare the folder. UsageError where it is somebody else's or none, OSError where it cannot be written."""
        mark, what = self.folder / "frame_cache", f"frame_cache {self.folder}"
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UsageError(f"{what}: is no folder (--frame_cache)")
        is_ours = mark.is_file() and mark.read_bytes() == KEPT_MARK.encode()
        if not is_ours and self.folder.is_dir() and any(self.folder.iterdir()):
            raise UsageError(f"{what}: holds something else; name a new or an empty folder (--frame_cache)")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not is_ours:
            mark.write_bytes(KEPT_MARK.encode())
        for *_, path in self.listing(".tmp"):  # of processes that were killed
            with suppress(BlockingIOError):
                SegmentMaker(path.with_suffix("")).close()
        self.make_room(0, recount=True)

    def listing(self, suffix=None):
        """Its segments, or what else has this suffix -> (when used last, bytes, path), oldest first."""
        found = []
        for place in self.folder.glob("[0-9a-f][0-9a-f]"):
            for entry in os.scandir(place):
                name = re.fullmatch(KEPT_NAME, entry.name)
                if name and name[2] == suffix:
                    with suppress(FileNotFoundError):
                        found.append((entry.stat().st_mtime, entry.stat().st_size, place / entry.name))
        return sorted(found)

    def make_room(self, size, maker=None, recount=False):
        """Whether so many bytes more may be kept, after deleting what was used least recently and not since this run
        began; then what a SegmentMaker has made gets its name. OutOfTime where the count stays locked."""
        with open(self.folder / "total", "a+", encoding="utf-8") as handle:
            deadline = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OutOfTime from None
                    time.sleep(0.02)
            handle.seek(0)
            known = re.fullmatch(r"\d+", handle.read(32))
            total = int(known[0]) if known else math.inf
            if recount or total + size > self.limit:
                kept = self.listing()
                total = sum(row[1] for row in kept)
                most = self.limit if total + size <= self.limit else 0.95 * self.limit - size
                while kept and total > most and kept[0][0] < self.since:
                    _, gone, stale = kept.pop(0)
                    stale.unlink(missing_ok=True)
                    total -= gone
            has_room = total + size <= self.limit
            if maker is not None and has_room:
                os.replace(maker.temporary, maker.path)
                total += size
            handle.truncate(0)
            handle.write(str(total))
        return has_room

    def file(self, path, plan):
        """The KeptFile of a plan, None where it is not one of the config. BadFile."""
        mine, scale, ratios = (plan.scale, plan.ratio), plan.scale, (plan.ratio,)
        if plan.file.pictures or (plan.height, plan.width) != self.side:
            return None
        if mine != (1.0, 1.0) and not mine == self.low == self.high:
            scale, ratios = self.low[0], (self.low[1], self.high[1])
            if not (scale <= plan.scale <= self.high[0] and ratios[0] <= plan.ratio <= ratios[1] + 1e-9):
                return None
        kept = str(self.folder / "index") if self.folder.is_dir() else ""
        return KeptFile(self, path, replace(plan, scale=scale, kept=kept), ratios)

    def read(self, path, plan, tell=say):
        """read_frames, out of what is kept where that answers. `tell` gets a line once nothing more can be kept."""
        frames = None
        try:
            with suppress(BadFile):  # reading it below says the same, or another decoder can
                file = self.file(path, plan)
                frames = file and file.frames(plan)
        except (Unkept, OSError) as error:
            if self.stores:
                tell(f"WARNING: frame_cache {self.folder}: {reason_of(error)}; what is not in it is decoded")
            self.stores = False
        return read_frames(path, plan, self.decoder) if frames is None else frames


def kept_sizes(cache, plan, videos):
    """What videos take in a cache, for told_apart -> pairs (bytes, seconds)."""
    for video in videos:
        size = seconds = 0.0
        with suppress(BadFile):  # takes nothing
            own = fit_plan(plan, video)
            if file := cache.file(video.path, own):
                seconds = usable_part(own, *file.line[-2:])
                size = seconds * file.rate
        yield size, seconds


# ---------------------------------------------------------------------------------------------------------------------
# 6  Built-in driving scenes: seed -> clip + labels
# ---------------------------------------------------------------------------------------------------------------------
# Road coordinates: s metres along the road, x metres to the right of its centre; tau seconds since the last NOW frame.
# Up to tau = 0 all follows from scene_seed; future_seed decides what happens after, with odds that the picture shows.

TWIN_KINDS = ("teleport", "vanish", "pass_through", "recolour", "reverse")  # physics broken after an instant
CAMERA_HEIGHT, HORIZON, FOCAL = 1.4, 0.42, 0.9  # metres; share of the height; share of the width (about 58 degrees)
LANE, DASH = 3.5, 6.0  # metres of a lane, of a dash and of the space after it
WHEELBASE = 2.8  # metres between the own axles
BONNET = 0.93  # where the own bonnet begins, share of the height
# lanes -> paved half width, edge line, dashed line, own lane
ROADS = {2: (3.9, 3.4, 0.0, LANE / 2), 3: (5.65, 5.25, LANE / 2, 0.0)}
ARC, BEND = 22.0, 0.028  # metres until a branch of a fork runs straight, curvature in 1/m
FORKS = ("fork", "steered")  # a steered one shows no sign: the own steering alone tells the branch
FORK_ODDS = (0.5, 0.5, 0.5, 0.1, 0.3, 0.7, 0.9)  # p(right branch), drawn evenly: half is the common case
SIGN_COLOURS = {0.1: (40, 90, 220), 0.3: (60, 200, 220), 0.5: (240, 240, 240), 0.7: (250, 170, 40), 0.9: (220, 40, 40)}
HAZARDS = {False: 0.2, True: 1.0}  # beacon of the lead car lit -> braking rate per second
BRAKE, REACTION, CRAWL = 6.0, 0.8, 0.3  # m/s2 of lead and own car, own delay in seconds, share of the speed kept
# indicator -> odds of left, keep, right
LANE_ODDS = {"none": (0.1, 0.8, 0.1), "left": (0.8, 0.2, 0.0), "right": (0.0, 0.2, 0.8)}
TRUCK_AT = 4.9  # metres, centre of the parked truck
STOP_ODDS = 0.15  # a car that passes behind the parked truck stops there
SIDE_NAMES = {-1: "left", 0: "keep", 1: "right"}
SCENE_MANEUVERS = ("brake", "fork_left", "fork_right", "keep", "lane_change_left", "lane_change_right")


def branch_offset(ahead):
    """x of the right branch `ahead` metres past the fork: an arc, then a straight line; 0 before it."""
    ahead = np.maximum(ahead, 0.0)
    bent = np.minimum(ahead, ARC)
    return 0.5 * BEND * bent**2 + BEND * ARC * (ahead - bent)


def scene_seed_at(cfg, index, stream="train"):
    """Scene seed number `index` of a run; training and validation never meet, nor do two run seeds."""
    return cfg.seed * 1_000_003 + index + (5 * 10**15 if stream == "val" else 0)


def draw_scene(scene_seed, cfg, kind=""):
    """All that the present decides -> dict, in metres and seconds. An empty kind is drawn from scene_mix."""
    shares = mix_shares(cfg.scene_mix)
    kind = kind or str(np.random.default_rng([scene_seed, 3]).choice(SCENE_KINDS, p=shares))
    rng = np.random.default_rng([scene_seed, 0, SCENE_KINDS.index(kind)])
    draw = rng.uniform
    plot = {"brake": "lead", "occluder": "cross", "steady": str(rng.choice(("lead", "cross", "barrier")))}.get(kind, "")
    slow = plot in ("cross", "barrier")
    scene = dict(  # drawn in this order
        kind=kind,
        plot=plot,
        lanes=3 if kind == "lane" else 2,
        speed=draw(1.5, 3) if slow else draw(9, 14),
        lane=draw(-0.3, 0.3),
        phase=draw(0, 2 * DASH),
        sway=draw(0, 2 * np.pi),
        sky=draw((90, 130, 170), (170, 200, 245)),
        ground=draw((60, 90, 40), (150, 150, 90)),
        asphalt=draw(70, 120),
        clouds=draw(0, 2 * np.pi, 3),
        paint=draw(40, 230, 3),
        prob=float(rng.choice(FORK_ODDS)),
        reach=draw(0.3, 0.8),
        beacon=rng.random() < 0.5,
        indicator=str(rng.choice(tuple(LANE_ODDS))),
        gap=draw(8, 13) if kind == "steady" else draw(11, 18),
        drift=float(rng.choice((-1, 1)) * draw(1.5, 3)),
        cross_speed=draw(5, 7),
        cross_from=draw(0.4, 0.9),
        cross_gap=draw(16, 20),
        truck_gap=draw(9, 11),
        broken_after=draw(0.15, 0.5),
        jump=float(rng.choice((-1, 1)) * draw(5, 7)),
    )
    if kind == "steered":
        scene["prob"] = 0.5
    speed = scene["speed"]
    metres = int(speed * cfg.num_frames / (cfg.clip_fps or 4.0)) + 110
    num = max(4, int(metres * draw(0.06, 0.13)))
    aside = draw(0, metres, num), rng.choice([-1, 1], num) * draw(7.5, 17, num)
    scene["trees"] = np.stack([*aside, draw(2.5, 6, num), draw(0.6, 1.1, num)])  # s, x, height, brightness
    others = [(draw(30, 150), draw(-1, 2), draw(8, 14), draw(40, 230, 3)) for _ in range(rng.integers(1, 4))]
    if kind == "lane":  # ahead in a lane beside ours, about as fast as we are
        beside = LANE * float(rng.choice([-1, 1]))
        scene["cars"] = [(s, beside, speed + faster, paint) for s, faster, _, paint in others]
    else:
        scene["cars"] = [(s, -LANE / 2, -oncoming, paint) for s, _, oncoming, paint in others if not slow]
    return scene


def scene_odds(scene_seed, cfg, kind=""):
    """The exact odds of what may happen after NOW -> dict with `kind`. Rates per second, the rest probabilities."""
    scene = draw_scene(scene_seed, cfg, kind)
    left, keep, right = LANE_ODDS[scene["indicator"]]
    rate, seconds = HAZARDS[scene["beacon"]], cfg.soon_frames / (cfg.clip_fps or 4.0)
    odds = {
        "fork": {"right": scene["prob"]},
        "brake": {"hazard": rate, "brake_in_soon": 1 - math.exp(-rate * seconds)},
        "lane": {"left": left, "keep": keep, "right": right},
        "occluder": {"stops": STOP_ODDS},
        "steady": {"barrier": scene["plot"] == "barrier"},
        "steered": {"right": 0.5},
    }
    return {"kind": scene["kind"], **odds[scene["kind"]]}


def draw_future(scene, future_seed, scene_seed):
    """What the present leaves open -> (dict: choice -1, 0, 1, brake_at, stops, differences of driving; generator)."""
    rng = np.random.default_rng([scene_seed, 1, future_seed])
    kind, choice, chance = scene["kind"], 0, rng.random()
    if kind in FORKS:
        choice = 1 if chance < scene["prob"] else -1
    elif kind == "lane":
        choice = int(np.searchsorted(np.cumsum(LANE_ODDS[scene["indicator"]]), chance, side="right")) - 1
    loose = kind not in ("brake", "steady")
    future = dict(
        choice=min(choice, 1),
        stops=kind == "occluder" and chance < STOP_ODDS,
        brake_at=-math.log(1 - chance) / HAZARDS[scene["beacon"]] if kind == "brake" else math.inf,
        push=float(np.clip(rng.normal(0, 0.04), -0.1, 0.1)) * scene["speed"] * loose,
        wander=rng.normal(0, 0.12) * loose,
        start=rng.uniform(0.1, 0.5),
        duration=rng.uniform(1.6, 2.2),
    )
    return future, rng


def slowed(since, speed):
    """Metres lost `since` seconds after braking began at `speed`: constant deceleration to a crawl, which is kept."""
    ramp = (1 - CRAWL) * speed / BRAKE
    held = np.clip(since, 0, ramp)
    return 0.5 * BRAKE * held**2 + (1 - CRAWL) * speed * np.maximum(since - ramp, 0)


def ego_path(scene, future, times, tau, fork_at):
    """The own car -> dict of arrays [T]: s, x (m), heading (rad), its cos and sin, speed (m/s), yaw_rate (rad/s),
    offset (m from the own lane), times, tau; with fork_at and now_s, its place in the last NOW frame."""
    side, kind, fine, states = future["choice"], scene["kind"], 1e-3, []
    for t, u in ((times, tau), (times + fine, tau + fine)):  # two close instants give the derivatives
        u = np.maximum(u, 0) * (tau > 0)  # nothing of the future reaches a NOW frame, not even its heading
        held = np.minimum(u, 3.0)
        s = scene["speed"] * t + future["push"] * (0.5 * held**2 + 3.0 * (u - held))
        s = s - slowed(u - future["brake_at"] - REACTION, scene["speed"])
        offset = scene["lane"] + 0.15 * np.sin(0.8 * t + scene["sway"])
        offset = offset + future["wander"] * (1 - np.cos(np.pi * np.minimum(u / 2, 1))) / 2
        if kind == "lane":
            share = np.clip((u - future["start"]) / future["duration"], 0, 1)
            offset = offset + side * LANE * share**2 * (3 - 2 * share)
        bend = side * branch_offset(s - fork_at) if kind in FORKS else 0.0
        states.append((s, ROADS[scene["lanes"]][3] + offset + bend, offset))
    (s, x, offset), (s_next, x_next, _) = states
    if kind == "lane":
        heading = np.arctan((x_next - x) / np.maximum(s_next - s, 1e-9)) * (tau > 0)
    else:  # the car points where the road goes; the small wander inside the lane does not turn the camera
        heading = np.arctan(side * BEND * np.minimum(np.maximum(s - fork_at, 0), ARC) * (kind in FORKS))
    path = dict(s=s, x=x, heading=heading, cos=np.cos(heading), sin=np.sin(heading), speed=(s_next - s) / fine)
    path["yaw_rate"] = np.gradient(heading, times) * (tau > 0)  # NOW runs straight
    return path | dict(offset=offset, times=times, tau=tau, fork_at=fork_at, now_s=s[np.argmin(np.abs(tau))])


def mover_path(scene, future, pose, twin, broken):
    """Lead car or crossing car -> (s, x, shown, repainted, each [T]); None without one. broken [T]: after the break."""
    plot, tau, pace = scene["plot"], pose["tau"], scene["cross_speed"]
    if not plot:
        return None
    since = np.where(broken, tau - tau[broken.argmax()], 0.0)  # seconds after the break
    if plot == "lead":
        drift = scene["drift"] if scene["kind"] == "steady" else 0.0
        gap = scene["gap"] + drift * tau
        if twin == "teleport":
            gap = gap + np.where(broken, np.where(gap - 7 < 5, 1, np.sign(scene["jump"])) * abs(scene["jump"]), 0)
        if twin == "reverse":
            gap = gap - 2 * drift * since
        gap = np.maximum(gap, 4.0)  # a slower car is followed in the end
        s = pose["now_s"] + scene["speed"] * tau + gap - slowed(tau - future["brake_at"], scene["speed"])
        x = np.full_like(tau, LANE / 2)
    else:
        way = pace * (tau - scene["cross_from"])  # metres from the meeting point, negative before it
        if (plot == "barrier" and twin != "pass_through") or future["stops"]:
            way = np.minimum(way, 0.0)
        if twin == "reverse":
            way = np.where(broken, way[broken.argmax()] - pace * since, way)
        if twin == "teleport":
            way = way + np.where(broken, scene["jump"], 0)
        s = np.full_like(tau, pose["now_s"] + scene["cross_gap"])
        # from the right behind the truck (occluder), or from the left (steady), as car centres
        x = 6.3 - way if scene["kind"] == "occluder" else 1.9 + way
    return s, x, ~(broken & (twin == "vanish")), broken & (twin == "recolour")


def car_parts(view, paint):
    """Boxes of a car from `rear`, `front` or `side` -> rows (left, right, bottom, top in metres from its base, rgb)."""
    dark, glass = (20, 20, 20), (30, 35, 45)
    if view == "side":
        parts = [(-2.1, 2.1, 0.3, 0.95, *paint), (-1.2, 1.2, 0.9, 1.5, *paint), (-1.0, 1.0, 1.0, 1.4, *glass)]
        return parts + [(left, left + 0.7, 0, 0.55, *dark) for left in (-1.6, 0.9)]
    lamp = (255, 245, 200) if view == "front" else (200, 30, 30)
    parts = [(-0.95, 0.95, 0.2, 1.45, *paint), (-0.75, 0.75, 0.85, 1.35, *glass), (-0.9, 0.9, 0, 0.3, *dark)]
    return parts + [(place - 0.18, place + 0.18, 0.5, 0.78, *lamp) for place in (-0.7, 0.7)]


def thing_list(scene, future, pose, mover):
    """Everything that stands or drives on the road -> list of (s, x, parts, shown), arrays [T] or scalars."""
    tau, fork_at, now_s = pose["tau"], pose["fork_at"], pose["now_s"]
    is_fork, things = scene["kind"] in FORKS, []
    for s, x, size, shade in scene["trees"].T:
        crown = np.array((35, 95, 35)) * shade
        parts = [(-0.25, 0.25, 0, 0.5 * size, 70, 50, 35), (-1.3, 1.3, 0.35 * size, size, *crown)]
        things.append((s, x + np.sign(x) * branch_offset(s - fork_at) * is_fork, parts, True))
    for s, x, speed, paint in scene["cars"]:
        s, parts = s + speed * pose["times"], car_parts("front" if speed < 0 else "rear", paint)
        things.append((s, x - branch_offset(s - fork_at) * is_fork, parts, True))  # from the left branch of a fork
    if scene["kind"] == "fork":
        sign = (-1.2, 1.2, 1.9, 3.8, *SIGN_COLOURS[scene["prob"]])
        things.append((fork_at + 9, 0.0, [(-0.1, 0.1, 0, 2.2, 60, 60, 60), sign], True))
    if scene["kind"] == "occluder":
        for depth in (6, 4, 2, 0):
            body = (-1.2, 1.2, 0.4, 3.1, *((150, 150, 145) if depth else (225, 225, 215)))
            parts = [body, (-1.1, 1.1, 0, 0.5, 25, 25, 25)]
            things.append((now_s + scene["truck_gap"] + depth, TRUCK_AT, parts, True))
    if scene["plot"] == "barrier":
        stripes = [(-0.6, 0.6, low, low + 0.45, 220, 40, 40) for low in (0.25, 1.1)]
        parts = [(-0.6, 0.6, 0, 1.8, 235, 235, 235), *stripes]
        things.append((now_s + scene["cross_gap"] - 0.2, 4.6, parts, True))
    if mover is not None:
        (s, x, shown, repainted), paint = mover, scene["paint"]
        view = "rear" if scene["plot"] == "lead" else "side"
        beacon = [(-0.8, 0.8, 1.45, 1.95, 255, 180, 0)] if scene["kind"] == "brake" and scene["beacon"] else []
        things.append((s, x, car_parts(view, paint) + beacon, shown & ~repainted))
        if repainted.any():
            things.append((s, x, car_parts(view, np.where(paint > 135, paint - 110, paint + 110)), repainted))
        braking = (tau > 0) & (tau >= future["brake_at"])
        things.append((s - 0.01, x, [(-0.95, 0.95, 0.4, 0.8, 255, 20, 20)], braking))
    return things


def colour_first(colour):
    """A colour, or one number for its three, as float32 that spreads over images [3, T, H, W]."""
    return np.float32(colour).reshape(-1, 1, 1, 1)


def paint_view(scene, pose, height, width, top):
    """Sky with drifting clouds; from row `top`, the horizon, grass, roads and markings -> float32 [3, T, H, W]. Colours
    come first, as NumPy is slow along an axis of three."""
    v = (np.arange(top, dtype=np.float32) + 0.5) / height / HORIZON  # 0 above, 1 at the horizon
    u = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5) / FOCAL
    drift = (3 * u[None] + 2 * pose["heading"][:, None] + 0.1 * pose["times"][:, None]).astype(np.float32)  # [T, W]
    bands = sum(np.sin((k + 1) * drift + np.float32(scene["clouds"][k])) for k in range(3))[:, None]
    bands = bands * np.sin(6 * (1 - v))[:, None]
    sky = colour_first(scene["sky"]) + 50 * v[:, None] + 12 * bands
    paved, edge_at, line_at, _ = ROADS[scene["lanes"]]
    rows = np.arange(top, height, dtype=np.float32)
    # metres ahead of each row, [rows, 1]
    depth = (CAMERA_HEIGHT * FOCAL * width / (rows + 0.5 - HORIZON * height)).astype(np.float32)[:, None]
    cos, sin, s, x = (pose[name].astype(np.float32)[:, None, None] for name in ("cos", "sin", "s", "x"))
    across = depth * u  # [rows, W]
    ground_s = s + depth * cos - across * sin  # [T, rows, W]
    ground_x = x + depth * sin + across * cos
    side = np.abs(ground_x)
    if scene["kind"] in FORKS:  # a fork mirrors its two roads, so one distance serves both
        side = np.abs(side - branch_offset(ground_s - np.float32(pose["fork_at"])).astype(np.float32))
    sharp, near = FOCAL * width / depth, np.clip(8 / depth, 0, 1)  # pixels per metre sideways; 1 near by, 0 far away
    road = np.clip((paved - side) * sharp + 0.5, 0, 1)
    if scene["plot"] in ("cross", "barrier"):
        crossing = np.float32(pose["now_s"] + scene["cross_gap"])
        road = np.maximum(road, np.clip(3 - np.abs(ground_s - crossing), 0, 1))
    thin = np.clip(0.3 * sharp, 0, 1)
    edge = np.clip((0.15 - np.abs(side - edge_at)) * sharp + 0.5, 0, 1) * thin
    dash = np.clip(np.sin((ground_s + scene["phase"]) * np.float32(np.pi / DASH)) * 4 + 0.5, 0, 1) * near
    line = np.clip((0.13 - np.abs(side - line_at)) * sharp + 0.5, 0, 1) * thin * dash
    texture = 8 * np.sin(ground_s * 1.3) * np.sin(ground_x * 0.9) * near
    ground = texture + colour_first(scene["ground"])
    for alpha, colour in ((road, scene["asphalt"]), (edge, 225.0), (line, 235.0)):
        ground += alpha * (colour_first(colour) - ground)
    return np.concatenate([sky, ground], 2)


def seen_from(pose, s, x):
    """A place s, x (numbers or [T]) from the camera of every frame -> metres ahead [T], metres to the right [T]."""
    ds, dx, cos, sin = s - pose["s"], x - pose["x"], pose["cos"], pose["sin"]
    return ds * cos + dx * sin, dx * cos - ds * sin


def cover(near, far, size):
    """Pixels of a line between two edges [T, P] -> (first, end [T, P], covered share float32 [T, P, size])."""
    pixels = np.arange(size)
    share = np.clip(np.minimum(far[..., None], pixels + 1) - np.maximum(near[..., None], pixels), 0, 1)
    first, end = np.floor(np.clip(near, 0, size)), np.ceil(np.clip(far, 0, size))
    return first.astype(int), end.astype(int), share.astype(np.float32)


def draw_things(image, things, pose):
    """Paint all parts of all things on every frame, far ones first, soft edges. image [3, T, H, W] changes in place."""
    _, T, height, width = image.shape
    parts = np.array([part for _, _, rows, _ in things for part in rows], np.float32)  # [P, 7]
    owner = np.repeat(np.arange(len(things)), [len(rows) for _, _, rows, _ in things])
    depth, across = np.stack([seen_from(pose, s, x) for s, x, _, _ in things], 2)  # [T, things]
    scale = FOCAL * width / np.maximum(depth, 1.0)
    u, v = width / 2 + across * scale, HORIZON * height + CAMERA_HEIGHT * scale
    shown = np.stack([np.broadcast_to(seen, (T,)) for _, _, _, seen in things], 1) & (depth > 1.5) & (depth < 90)
    left, right = (u[:, owner] + parts[:, side] * scale[:, owner] for side in (0, 1))  # [T, P] pixels
    low, high = (v[:, owner] - parts[:, side] * scale[:, owner] for side in (2, 3))
    (x0, x1, cover_x), (y0, y1, cover_y) = cover(left, right, width), cover(high, low, height)
    visible = shown[:, owner] & (x1 > x0) & (y1 > y0)
    order = np.argsort(-depth[:, owner], axis=1, kind="stable")
    colours = parts[:, 4:, None, None]
    for frame in range(T):
        for part in order[frame][visible[frame, order[frame]]]:
            ys, xs = slice(y0[frame, part], y1[frame, part]), slice(x0[frame, part], x1[frame, part])
            spot = image[:, frame, ys, xs]
            spot += cover_y[frame, part, ys, None] * cover_x[frame, part, xs] * (colours[part] - spot)


def draw_bonnet(image, scene):
    """Own bonnet with two indicator lamps at the lower edge of image [3, T, H, W], which changes in place."""
    bonnet = image[:, :, int(BONNET * image.shape[2]) :]
    bonnet[:] = colour_first((38, 40, 46))
    lamp = max(2, image.shape[3] // 8)
    for name, columns in (("left", slice(lamp)), ("right", slice(-lamp, None))):
        lit = scene["kind"] == "lane" and scene["indicator"] == name
        bonnet[..., columns] = colour_first((70, 255, 90) if lit else (18, 20, 24))


def scene_labels(scene, future, pose, mover):
    """What is true of a clip -> dict of values and per-frame lists in SI units, None where a thing is not there."""
    side, kind, tau = future["choice"], scene["kind"], pose["tau"]
    forks, accel = kind in FORKS, np.gradient(pose["speed"], pose["times"]) * (tau > 0)  # NOW knows no future
    lane = f"lane_change_{SIDE_NAMES[side]}" if side else "keep"
    moves = {"lane": lane, **dict.fromkeys(FORKS, f"fork_{SIDE_NAMES[side]}")}
    braked = future["brake_at"] < tau[-1]
    mover_u = mover_depth = [None] * len(tau)
    event = np.full(len(tau), "", object)
    if mover is not None:
        s, x, shown, _ = mover
        depth, across = seen_from(pose, s, x)
        column = 0.5 + FOCAL * across / np.maximum(depth, 1.0)
        there = shown & (depth > 1.5) & (column > -0.05) & (column < 1.05)
        mover_u, mover_depth = ([float(v) if ok else None for v, ok in zip(row, there)] for row in (column, depth))
        if kind == "occluder":  # the truck's picture against the car's centre
            near, far = (pose["now_s"] + scene["truck_gap"] + d - pose["s"] for d in (0, 6))
            left, right = TRUCK_AT - 1.2 - pose["x"], TRUCK_AT + 1.2 - pose["x"]
            way = (x - pose["x"]) / depth
            event[(near > 1.5) & (left / np.maximum(far, 1) < way) & (way < right / np.maximum(near, 1))] = "hidden"
        event[(tau > 0) & (tau >= future["brake_at"])] = "braking"
    if forks:
        event[pose["s"] > pose["fork_at"]] = "fork"
    if kind == "lane" and side:
        event[(tau > future["start"]) & (tau < future["start"] + future["duration"])] = "changing"
    return dict(
        kind=kind,
        maneuver="brake" if braked else moves.get(kind, "keep"),
        branch=side if forks else 0,
        prob=scene["prob"] if forks else 0.0,
        brake_time=future["brake_at"] if braked else None,
        speed=pose["speed"].tolist(),
        yaw_rate=pose["yaw_rate"].tolist(),
        steer=np.arctan(WHEELBASE * pose["yaw_rate"] / np.maximum(pose["speed"], 1)).tolist(),
        lane_offset=pose["offset"].tolist(),
        lead_gap=mover_depth if scene["plot"] == "lead" else [None] * len(tau),
        mover_u=mover_u,
        mover_depth=mover_depth,
        event=event.tolist(),
        accel=accel.tolist(),
    )


def scene_truth(scene_seed, future_seed, cfg, kind="", twin="", drive=None):
    """A scene but for its pictures -> (what draw_scene gives, what draw_future gives, pose, mover, labels)."""
    params, passes = draw_scene(scene_seed, cfg, kind), twin == "pass_through"
    fits = params["kind"] == "steady" and (params["plot"] == "barrier" or not passes)
    if twin and not (fits and twin in TWIN_KINDS):
        kinds = ", ".join(TWIN_KINDS)
        raise ValueError(f"twin {twin!r}: one of {kinds}, of a steady scene, pass_through of one with a barrier")
    future, rng = draw_future(params, future_seed, scene_seed)
    fps = cfg.clip_fps or 4.0
    times = np.arange(cfg.num_frames) / fps
    now = times[cfg.now_frames - 1]
    tau = times - now
    broken = (tau > (params["cross_from"] if passes else params["broken_after"] * cfg.soon_frames / fps)) & bool(twin)
    pose = (drive or ego_path)(params, future, times, tau, params["speed"] * (now + params["reach"]))
    mover = mover_path(params, future, pose, twin, broken)
    labels = scene_labels(params, future, pose, mover)
    labels |= dict(fps=fps, scene_seed=int(scene_seed), future_seed=int(future_seed), twin=twin)
    labels["break_frame"] = int(broken.argmax()) if broken.any() else -1
    return params, (future, rng), pose, mover, labels


def scene(scene_seed, future_seed, cfg, kind="", twin="", drive=None):
    """Render one built-in driving scene -> (frames uint8 [T, H, W, 3], labels dict with per-frame SI signals).

    NOW frames are a function of scene_seed (and a forced `kind`) alone, bit for bit; future_seed draws what happens
    after, with the odds of `scene_odds`. `twin` breaks physics in SOON, for steady scenes only: frames before
    labels["break_frame"] stay as they are without. Square pixels, `scene_size` on the short side where that is set.
    `drive` takes the place of `ego_path`: how else the own car drives after NOW.
    """
    grow = cfg.scene_size / min(cfg.height, cfg.width) if cfg.scene_size else 1.0
    height, width = (2 * max(round(side * grow / 2), 1) for side in (cfg.height, cfg.width))
    params, (future, rng), pose, mover, labels = scene_truth(scene_seed, future_seed, cfg, kind, twin, drive)
    rows = int(np.ceil(HORIZON * height - 0.5))  # of sky
    parts = (np.random.default_rng([scene_seed, 2]), cfg.now_frames), (rng, cfg.num_frames - cfg.now_frames)
    noise = [source.standard_normal((count, rows, width), dtype=np.float32) for source, count in parts]
    image = paint_view(params, pose, height, width, rows)
    image[:, :, :rows] += 4 * np.concatenate(noise)
    draw_things(image, thing_list(params, future, pose, mover), pose)
    draw_bonnet(image, params)
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8).transpose(1, 2, 3, 0)), labels


def siblings(scene_seed, num, cfg, kind=""):
    """`num` futures of one present, future seeds 0, 1, ... -> generator of (frames, labels) with bit-identical NOW."""
    for future_seed in range(num):
        yield scene(scene_seed, future_seed, cfg, kind)


def write_video(path, frames, fps, comment=""):
    """frames uint8 [T, H, W, 3] -> H.264 in a file or an open file, a comment in its header. Without look-ahead and
    B-frames: a frame's bits depend on no later frame."""
    import av

    with av.open(path if hasattr(path, "write") else str(path), "w", format="mp4") as container:
        container.metadata.update({"comment": comment} if comment else {})
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "16", "preset": "veryfast", "tune": "zerolatency"}
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_new(path, content):
    """Bytes -> a file that is whole from the moment it has its name. What stands there already stays as it is."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # nobody else's name
    try:
        temporary.write_bytes(content)
        if not os.path.lexists(path):
            os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_scene(folder, name, cfg, scene_seed, future_seed=0, kind="", twin=""):
    """Render a scene into folder/videos/<name>.mp4 and annotations/<name>.json, where they are absent -> labels."""
    frames, labels = scene(scene_seed, future_seed, cfg, kind, twin)
    video = io.BytesIO()
    write_video(video, frames, labels["fps"])
    write_new(Path(folder) / "videos" / f"{name}.mp4", video.getvalue())
    write_new(Path(folder) / "annotations" / f"{name}.json", json.dumps(labels).encode())
    return labels


def scene_names(cfg):
    """File stems of the written scenes, in order."""
    return [f"scene_{index:06d}" for index in range(cfg.scene_clips)]


def scenes_folder(folder, cfg):
    """Where the scenes of a setting stand -> (folder, its setting as text, whether it is taken up).

    A folder is theirs when its scenes.json holds the setting; an absent or empty one is free. Any other is somebody's
    own; folder_<digest of the setting> is looked at instead, then the same with _2, _3, ...
    """
    names = "seed scene_clips scene_size scene_mix image_size num_frames now_frames soon_frames clip_fps".split()
    setting = json.dumps({name: getattr(cfg, name) for name in names})
    other = f"{folder}_{hashlib.sha256(setting.encode()).hexdigest()[:8]}"
    for candidate in itertools.chain([str(folder), other], (f"{other}_{k}" for k in itertools.count(2))):
        with suppress(OSError, ValueError):  # absent, or not ours
            if read_text(os.path.join(candidate, "scenes.json"), MAX_CONFIG_BYTES) == setting:
                return Path(candidate), setting, True
        if not os.path.lexists(candidate) or os.path.isdir(candidate) and not os.listdir(candidate):
            return Path(candidate), setting, False


def scene_stands(folder, name):
    """Whether a scene has been written whole."""
    return all(os.path.lexists(folder / part) for part in (f"videos/{name}.mp4", f"annotations/{name}.json"))


def help_writing(watch, end, folder, cfg, jobs):
    """Life of a process that helps `write_scenes`: writes (index, name) from the last one on, until the other end of
    `watch` is closed."""
    end.close()
    for number in STOP_SIGNALS:  # the main process hears them, and closes its end
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # the main process meets it as well
        for index, name in reversed(jobs):
            if watch.poll():
                break
            if not scene_stands(folder, name):
                write_scene(folder, name, cfg, scene_seed_at(cfg, index))
    os._exit(0)


def write_scenes(folder, cfg, stopping=None):
    """Write the `scene_clips` scenes that are absent as mp4 with annotations, on all cores where they are many -> the
    folder, another one than `folder` where that holds anything else. Nothing is deleted. `stopping()` is asked before
    every scene: Stopped."""
    folder, setting, taken = scenes_folder(folder, cfg)
    if not taken:
        folder.mkdir(parents=True, exist_ok=True)
        write_new(folder / "scenes.json", setting.encode())  # first: from here on the folder is known for what it is
    for part in ("videos", "annotations"):
        (folder / part).mkdir(exist_ok=True)
    jobs = [job for job in enumerate(scene_names(cfg)) if not scene_stands(folder, job[1])]
    helpers = min(usable_cores() - 1, cfg.num_workers, len(jobs) // 32)
    watch, end = multiprocessing.Pipe(duplex=False)
    apart = multiprocessing.get_context("fork").Process
    shares = [(watch, end, folder, cfg, jobs[number::helpers]) for number in range(helpers)]
    processes = [apart(target=help_writing, args=share, daemon=True) for share in shares]
    try:
        with HeldSignals(), suppress(OSError):  # a limit on processes: with fewer, or alone
            for process in processes:
                process.start()
        for index, name in jobs:
            if scene_stands(folder, name):  # by a helper
                continue
            if stopping is not None and stopping():
                raise Stopped(f"{index} of {cfg.scene_clips} scenes are written; the same command goes on from there")
            write_scene(folder, name, cfg, scene_seed_at(cfg, index))
    finally:
        end.close()
        watch.close()
        for process in processes:
            if process.pid is not None:
                process.join()
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# 7  Masks: token grid -> keep_idx, mask_idx
# ---------------------------------------------------------------------------------------------------------------------

MASK_FAMILIES = ("short", "long")  # of NOW, each with its own mask token; SOON has the third
SOON = len(MASK_FAMILIES)


def mask_blocks(cfg, family):
    """Arguments of `block_mask` for a mask family: (h, w), number of blocks, share of the grid of one, aspects."""
    blocks = {"short": (cfg.short_num_blocks, cfg.short_scale), "long": (cfg.long_num_blocks, cfg.long_scale)}
    return cfg.grid[1:], *blocks[family], cfg.aspect_min, cfg.aspect_max


def block_mask(rng, grid, num_blocks, scale, aspect_min, aspect_max):
    """Union of blocks of random place and aspect on the (h, w) grid -> bool [h, w], True = hidden."""
    rows, cols = grid
    mask = np.zeros(grid, bool)
    for _ in range(num_blocks):
        aspect = rng.uniform(aspect_min, aspect_max)
        block_h = min(max(round(math.sqrt(scale * rows * cols * aspect)), 1), rows)
        block_w = min(max(round(math.sqrt(scale * rows * cols / aspect)), 1), cols)
        top, left = rng.integers(0, rows - block_h + 1), rng.integers(0, cols - block_w + 1)
        mask[top : top + block_h, left : left + block_w] = True
    return mask


@lru_cache(maxsize=64)
def visible_sites(share, grid, *blocks):
    """Visible sites of a mask family, one constant per run: `share` of the grid, or the block sampler's mean when 0."""
    if not share:
        rng = np.random.default_rng(0)
        share = 1 - np.mean([block_mask(rng, grid, *blocks).mean() for _ in range(2000)])
    return int(np.clip(round(share * grid[0] * grid[1]), 1, grid[0] * grid[1] - 1))


def family_visible(cfg, family):
    """Visible sites per tubelet of a mask family, in [1, h*w - 1]."""
    return visible_sites({"short": cfg.short_visible, "long": cfg.long_visible}[family], *mask_blocks(cfg, family))


def sample_mask(rng, cfg, family):
    """One clip's mask -> (keep_idx [K], mask_idx [M]) int64, ascending, disjoint, together all L tokens.

    Blocks are repeated over time. Random sites are added or dropped until the visible count is the family's constant:
    shapes stay static and no draw hides everything or favours early frames.
    """
    hidden = block_mask(rng, *mask_blocks(cfg, family)).reshape(-1)
    surplus = int((~hidden).sum()) - family_visible(cfg, family)
    if surplus:
        pool = np.flatnonzero(~hidden if surplus > 0 else hidden)
        hidden[rng.choice(pool, abs(surplus), replace=False)] = surplus > 0
    tubelets = np.arange(cfg.grid[0])[:, None] * cfg.sites
    return tuple((tubelets + np.flatnonzero(sites)).reshape(-1).astype(np.int64) for sites in (~hidden, hidden))


def share_of(count, share):
    """So many of `count` things, at least one."""
    return max(1, round(count * share))


def random_share(rng, idx, share):
    """A random share of positions [M], at least one, in their order -> [m]."""
    return np.sort(rng.choice(idx, share_of(len(idx), share), replace=False))


# ---------------------------------------------------------------------------------------------------------------------
# 8  Samples: (seed, sample number) -> frames, masks, noise
# ---------------------------------------------------------------------------------------------------------------------

STREAMS = {"train": 0, "val": 1, "bank": 2, "test": 3}  # separate random streams of one seed


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
    window = cfg.num_frames, cfg.clip_fps, cfg.height, cfg.width, u_start
    return ClipPlan(*window, scale, ratio, u_x, u_y, cfg.frame_fps, start_fps=cfg.start_fps)


def mirror_label(label):
    """Swap left and right in a label's words: what a horizontal flip does to it."""
    return re.sub(r"(?<![a-z])(left|right)(?![a-z])", lambda word: "right" if word[0] == "left" else "left", label)


def shifted_tau(normal, shift):
    """Standard normal draws -> times in (0, 1): logit-normal, shifted towards noise by `shift`. Arrays or tensors."""
    u = 1 / (1 + (torch.exp if torch.is_tensor(normal) else np.exp)(-normal))
    return u / (u + shift * (1 - u))


def mask_and_noise(cfg, stream, index):
    """What VJepaAutoV2 draws for a sample: masks [R, K], [R, M] per family, of whose M hidden tokens those that are
    predicted, the tubelets [t] that a training clip holds unless all, flow noise [R, N, k] and tau [R]; with actions,
    whether they are hidden."""
    rng, drawn = sample_rng(cfg.seed, stream, index, 3), {}
    for family in MASK_FAMILIES:
        keep, mask = zip(*(sample_mask(rng, cfg, family) for _ in range(cfg.mask_draws)))
        drawn |= {f"keep_{family}": np.stack(keep), f"mask_{family}": np.stack(mask)}
    drawn["tau"] = shifted_tau(rng.standard_normal(cfg.flow_draws), cfg.tau_shift).astype(np.float32)
    drawn["noise"] = rng.standard_normal((cfg.flow_draws, cfg.flow_tokens, cfg.flow_rank), dtype=np.float32)
    if cfg.action_names:
        drawn["actions_hidden"] = np.array(stream == "train" and rng.random() < cfg.action_drop)
    if cfg.eventually_stride > 1 and stream == "train":
        seen = range(sum(cfg.future_tubelets[:2]))
        drawn["tubelets"] = np.array([*seen, *(rng.choice(part) for part in cfg.stretches)])
        for name in (f"{kind}_{family}" for kind in ("keep", "mask") for family in MASK_FAMILIES):
            rows = drawn[name]
            drawn[name] = rows[np.isin(rows // cfg.sites, drawn["tubelets"])].reshape(len(rows), -1)
    if cfg.pred_share < 1:
        for family in MASK_FAMILIES:
            drawn[f"mask_{family}"] = np.stack(
                [random_share(rng, row, cfg.pred_share) for row in drawn[f"mask_{family}"]]
            )
    return {name: torch.from_numpy(value) for name, value in drawn.items()}


# Faults of a machine or a network, told in a reason by their texts, that say nothing about a file that is there.
# fmt: off
PASSING_FAULTS = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EACCES, errno.ENOENT,
)
# fmt: on
RETRY_S = 0.5  # between two looks at a file whose fault may pass


class Attendant:
    """Who a dataset tells what it does; here, in the main process. `stopping()`: whether the run was asked to stop."""

    def __init__(self, stopping=None, line=say):
        self.stopping, self.has_spoken, self.line = stopping, False, line

    def holding(self, number):
        """Context in which a file is in hand."""
        return nullcontext()

    def tell(self, text):
        """Say what is waited for, once; "" says nothing."""
        if text and not self.has_spoken:
            say(text, sys.stderr)
            self.has_spoken = True

    def note(self, text):
        """Say what stays so for the rest of the run; here, whoever says it sees to it that it is said once."""
        self.line(text)

    def waiting(self, text):
        """Called again and again while a fault may pass. Stopped when the run was asked to stop."""
        self.tell(text)
        if self.stopping is not None and self.stopping():
            raise Stopped


def describe_form(value):
    """Type and shape of a tensor for a message, such as float32 [4, 6]; of anything else its type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]} {list(value.shape)}"
    return f"a {type(value).__name__}, which is no tensor"


class FileDataset(torch.utils.data.Dataset):
    """Sample i is a pure function of (seed, i): which file, what is read of it, and what the world draws for it.

    Another kind of data derives from it: SUFFIXES, `read_file`, `blank`, and `plan` where a window is not enough. A
    file that cannot be read, or has another form than `blank`, is named in the sample's `bad` list and replaced by the
    next one of an order drawn from (seed, i); when none can be read the sample is blank and the list names every file:
    the caller must end the run.
    `data_root` locates annotations, `quarantine` (name -> reason) holds files that must not be opened, `watch`, an
    Attendant, is told which file is in hand, `draw` is the world's.
    """

    SUFFIXES = ()  # of the files that it reads
    HAS_SCENES = False  # whether the built-in scenes stand in where there is no data_root

    def __init__(self, cfg, videos, data_root, stream, maneuvers=(), quarantine=None, draw=None):
        self.cfg, self.videos, self.data_root, self.stream, self.draw = cfg, videos, data_root, stream, draw
        self.quarantine = {} if quarantine is None else quarantine
        self.maneuvers = {name: number for number, name in enumerate(maneuvers)}
        self.watch, self.waited, self.retried, self.form = Attendant(), 0.0, set(), {}

    @classmethod
    def read_one(cls, cfg, video):
        """Read a file to see whether it can be, in a process of its own: until one is found for the held-out side."""
        data = cls(cfg, [video], "", "val")
        data.check_form(data.read_file(video, data.plan(np.random.default_rng(0))))

    @staticmethod
    def notes(cfg, source):
        """What a user should know about the files before the first step -> lines."""
        return []

    @classmethod
    def arrange(cls, cfg, listing):
        """The Listing of a data_root -> the one that a run uses: fewer files, or `sides` filled in. UsageError."""
        return listing

    def plan(self, rng):
        """What is drawn before a file is chosen, the same for all that are tried: here a window's start, 0 to 1."""
        return rng.random()

    def read_file(self, video, plan):
        """A file -> dict of tensors in the form of `blank`. BadFile with the reason where it cannot be read."""
        raise NotImplementedError

    def blank(self):
        """A dict like that of `read_file` where nothing can be read: its names, types and shapes are every sample's."""
        raise NotImplementedError

    def check_form(self, content):
        """BadFile where what was read has not the form of `blank`: samples that differ cannot be stacked."""
        found = {key: describe_form(value) for key, value in content.items()}
        self.form = self.form or {key: describe_form(value) for key, value in self.blank().items()}
        odd = [key for key in {**self.form, **found} if found.get(key) != self.form.get(key)]
        if odd:
            wanted = self.form.get(odd[0], "absent")
            raise BadFile(f"{odd[0]} is {found.get(odd[0], 'absent')}, and {wanted} in other samples")

    def __len__(self):
        return len(self.videos)

    def windows(self):
        """How many samples on end share a file."""
        return 1

    def candidates(self, index):
        """File numbers to try for sample `index`, best first; the same for a group of windows."""
        count, index = len(self.videos), index // self.windows()
        yield int(epoch_order(self.cfg.seed, self.stream, index // count, count)[index % count])
        yield from sample_rng(self.cfg.seed, self.stream, index, 1).permutation(count).tolist()

    def are_away(self):
        """Whether none of a handful of files can be seen: then their disk or their mount is missing, not a file."""
        return not any(os.path.exists(video.path) for video in self.videos[:: max(1, len(self.videos) // 16)])

    def read(self, number, plan):
        """`read_file` of a file by its number. BadFile with the reason.

        A fault that may pass does not condemn a file at once: data that are away as a whole are waited for,
        decode_timeout_s at most until one is read again; a fault of the machine is tried four times, once per file.
        """
        video, tries, limit_s = self.videos[number], 0, self.cfg.decode_timeout_s
        while True:
            try:
                with self.watch.holding(number):
                    content = self.read_file(video, plan)
                    self.check_form(content)
            except BadFile as error:
                there = os.path.exists(video.path)
                away = not there and self.are_away()
                passing = any(os.strerror(code) in str(error) for code in PASSING_FAULTS)
                passing = passing and there and number not in self.retried
                if passing and tries == 3:
                    self.retried.add(number)
                if self.waited >= limit_s or not away and (not passing or tries == 3):
                    raise
                alone = f"no other file of {self.data_root or 'the list'} can be seen"
                waiting = f"{video.name}: {error}, and {alone}; waiting up to {limit_s:g} s for the data"
                self.watch.waiting(waiting if away else "")
                tries, self.waited = tries + passing, self.waited + RETRY_S
                time.sleep(RETRY_S)
            else:
                self.waited = 0.0
                return content

    def first_good(self, index, plan):
        """-> (what was read for sample `index` or None, file number or -1, bad files met as (name, reason))."""
        bad = {}
        for number in self.candidates(index):
            name = self.videos[number].name
            if name not in bad and name not in self.quarantine:
                try:
                    return self.read(number, plan), number, list(bad.items())
                except BadFile as error:
                    bad[name] = str(error)
            elif name not in bad:
                bad[name] = self.quarantine[name]
        return None, -1, list(bad.items())

    def sample(self, index):
        """-> (dict of tensors, file number or -1, bad files met as (name, reason))."""
        content, number, bad = self.first_good(index, self.plan(sample_rng(self.cfg.seed, self.stream, index, 2)))
        return self.blank() if content is None else content, number, bad

    def whole(self, index, sample, number, bad):
        """Sample `index` with what the world draws for it and where it comes from -> dict, all tensors but `bad`."""
        drawn = self.draw(self.cfg, self.stream, index) if self.draw else {}
        return {**sample, **drawn, "file": torch.tensor(number), "index": torch.tensor(index), "bad": bad}

    def __getitem__(self, index):
        return self.whole(index, *self.sample(index))


class ClipDataset(FileDataset):
    """Clips of videos: window, crop and flip by (seed, i) -> frames uint8 [T, 3, H, W], number of the maneuver."""

    SUFFIXES, HAS_SCENES = VIDEO_SUFFIXES, True
    read_one = staticmethod(small_clip)
    frame_cache = None  # where decoded frames are kept
    going, awaited = None, None  # frames of a group that is being decoded; which process may go on with which window

    def __getstate__(self):
        return {**self.__dict__, "going": None, "awaited": None}

    @staticmethod
    def notes(cfg, source):
        guessed, complete = guessed_rates(cfg, source.root, dict.fromkeys((*source.train, *source.val)))
        names = ", ".join(one_line(name, 60) for name in guessed[:5]) + ", ..." * (len(guessed) > 5)
        told = f"data: {len(guessed)}{'' if complete else ' or more'} raw streams name no frame rate and are read at "
        told += f"{RAW_FPS:g} per second, a guess (--frame_fps, or fps in their annotation): {names}"
        return [told] if guessed else []

    def read_file(self, video, plan):
        """-> (frames uint8 [T, H, W, 3], annotation)."""
        noted = read_annotation(self.data_root, video).items()
        annotation = {"maneuver": video.label or "", **{key: value for key, value in noted if value is not None}}
        plan, *later = (fit_plan(one, video, annotation) for one in (replace(plan, later=()), *plan.later))
        if self.frame_cache is not None:
            frames = self.frame_cache.read(video.path, plan, self.watch.note)
        else:
            frames = self.read_window(video.path, plan, later)
        if names := self.cfg.action_names:
            annotation["actions"] = action_rows(timed_signals(annotation, video, plan, names), self.cfg)
        return frames, annotation

    def read_window(self, path, plan, later):
        """read_frames of a plan -> uint8 [T, H, W, 3]. Where windows of its group follow, the decoder waits at its end,
        and goes on if the next sample asks for that: as when each is read alone, but decoded once."""
        forward = plan.windows > 1 and not plan.file.pictures and DECODERS[self.cfg.decoder][0] == "pyav"
        if forward and self.awaited != (os.getpid(), path, plan):
            self.going = group_frames(path, (plan, *later)) if later else None
        going, self.going, frames = self.going, None, None
        with suppress(BadFile):  # who cannot go on reads it alone, and says why where that fails
            frames = next(going) if forward and going else None
        if frames is None:
            return read_frames(path, plan, self.cfg.decoder)
        self.going, self.awaited = going, later and (os.getpid(), path, later[0])
        return frames

    def windows(self):
        return self.cfg.windows_per_file if self.stream == "train" else 1

    def plan_of(self, index, height, width):
        """-> (plan of a sample, its generator). The windows of a group lie in its file as one that is drawn for all."""
        rng, count = sample_rng(self.cfg.seed, self.stream, index, 2), self.windows()
        plan = replace(draw_plan(rng, self.cfg, self.stream), height=height, width=width)
        if count > 1:
            u_start = sample_rng(self.cfg.seed, self.stream, index // count, 4).random()
            plan = replace(plan, u_start=u_start, windows=count, place=index % count)
        return plan, rng

    def check_form(self, content):
        """Frames come from the decoder in the shape that was asked for."""

    def decode(self, index, height, width):
        """-> (uint8 [T, height, width, 3], file number, annotation, bad files as (name, reason), flipped)."""
        (plan, rng), behind = self.plan_of(index, height, width), self.windows() - 1 - index % self.windows()
        plan = replace(plan, later=tuple(self.plan_of(index + step, height, width)[0] for step in range(1, behind + 1)))
        flip = bool(self.cfg.hflip and self.stream == "train" and rng.random() < 0.5)
        content, number, bad = self.first_good(index, plan)
        frames, annotation = content or (np.zeros((plan.num_frames, height, width, 3), np.uint8), {})
        return (frames[:, :, ::-1] if flip and content else frames), number, annotation, bad, flip

    def sample(self, index):
        frames, number, annotation, bad, flip = self.decode(index, self.cfg.height, self.cfg.width)
        maneuver = annotation.get("maneuver", "")
        maneuver = self.maneuvers.get(mirror_label(maneuver) if flip else maneuver, -1)
        frames = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))  # [T, 3, H, W]
        found = {"frames": frames, "maneuver": torch.tensor(maneuver)}
        if names := self.cfg.action_names:
            rows = annotation["actions"] if "actions" in annotation else action_rows(annotation, self.cfg)
            signs = torch.tensor([-1.0 if flip and name in MIRRORED else 1.0 for name in names])
            found["actions"] = signs * rows  # [tubelets, A]
        return found, number, bad

    def signals(self, number):
        """Signals of a whole training file that are actions -> {name: float64 [n]}. BadFile."""
        return signal_values(read_annotation(self.data_root, self.videos[number]), self.cfg.action_names)

    def blank(self):
        cfg = self.cfg
        frames = torch.zeros((cfg.num_frames, cfg.channels, cfg.height, cfg.width), dtype=torch.uint8)
        actions = {"actions": action_rows({}, cfg)} if cfg.action_names else {}
        return {"frames": frames, "maneuver": torch.tensor(-1), **actions}


class NoiseDataset(ClipDataset):
    """`--missing_data random`: pixels drawn from (seed, i), for speed tests without data; only when asked for."""

    def decode(self, index, height, width):
        rng = sample_rng(self.cfg.seed, self.stream, index, 2)
        frames = rng.integers(0, 256, (self.cfg.num_frames, height, width, 3), dtype=np.uint8)
        return frames, index % len(self.videos), {}, [], False


class SceneDataset(ClipDataset):
    """Built-in scenes drawn when they are asked for: every training sample is a scene that was never seen before.

    Scene i is the one that `write_scenes` writes as file i. Crops are not drawn: the camera of a scene varies little.
    """

    def decode(self, index, height, width):
        cfg = replace(self.cfg, image_size=(height, width), scene_size=0)
        frames, labels = scene(scene_seed_at(cfg, index, self.stream), 0, cfg)
        flip = bool(cfg.hflip and self.stream == "train" and sample_rng(cfg.seed, self.stream, index, 2).random() < 0.5)
        return (frames[:, :, ::-1] if flip else frames), index % len(self.videos), labels, [], flip

    def signals(self, number):
        return signal_values(scene_truth(scene_seed_at(self.cfg, number), 0, self.cfg)[-1], self.cfg.action_names)


class LatentDataset(FileDataset):
    """What a frozen encoder makes of clips, a cached file for each, in the form of `zeros`. `cache`: what cache.json
    says, {} of a cache of others, whose whole clips `world`, which has no memory, takes apart."""

    SUFFIXES, cache, world, zeros = (".pt",), {}, None, {}

    @staticmethod
    def notes(cfg, source):
        told = "" if source.Dataset.cache else "WARNING: whole clips were encoded, so NOW saw its future: "
        return [f"{told}latents of {cfg.latents} are read, videos neither decoded nor encoded"]

    def read_file(self, video, plan):
        check_regular(video.path)
        try:
            found = torch.load(video.path, map_location="cpu", weights_only=True)
        except Exception as error:  # such a file makes the unpickler raise anything
            raise BadFile(f"latents cannot be read ({type(error).__name__}: {flat(error)[:160]})") from error
        if self.world is not None:
            if (
                not torch.is_tensor(found)
                or found.ndim not in (4, 5)
                or not found.is_floating_point()
                or not len(found)
            ):
                raise BadFile(f"latents are no tensor [B, D, T, H, W] or [D, T, H, W], but {describe_form(found)}")
            whole = found[int(plan * len(found))] if found.ndim == 5 else found  # [D, T, H, W]
            found = self.world.latents_of(whole.flatten(1).T.float())
        if not isinstance(found, dict):
            raise BadFile(f"latents are no dict of tensors, but {describe_form(found)}")
        if odd := [name for name, value in found.items() if torch.is_tensor(value) and not value.isfinite().all()]:
            raise BadFile(f"latents hold NaN or infinity: {name_some(odd)}")
        return {**found, "maneuver": torch.tensor(self.maneuvers.get(video.label, -1))}

    def blank(self):
        return {**self.zeros, "maneuver": torch.tensor(-1)}


def latent_settings(world, cfg):
    """What decides, beside frozen weights, what the latents of a world, its class, are -> {name: value} for JSON."""
    values = {"world": world.__name__, **{name: getattr(cfg, name) for name in world.latent_fields}}
    return json.loads(json.dumps(values))


def list_latents(world, cfg):
    """The clips of a cache -> Listing, with `Dataset`, which reads them, and `root`, the list of their videos.
    UsageError for a world that reads none, and for a cache that cannot be read or was made with other settings."""
    place, cache, zeros, other, listing = Path(cfg.latents), {}, {}, [], Listing()
    index, what = place / "index.csv" if place.is_dir() else place, f"latents {one_line(place)}"
    about = index.with_name("cache.json")
    if not world.latent_fields:
        raise UsageError(f"{what}: {world.__name__} has none to read (--latents)")
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(index, MAX_LIST_BYTES), newline="")))
        if place.is_dir() or about.is_file():
            cache = parse_json(read_text(about, 2**24))
            forms = cache["tensors"].items()
            zeros = {name: torch.zeros(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in forms}
            here, then = latent_settings(world, cfg), {**merged(world.Config, "BEFORE"), **cache["settings"]}
            other = [f"{name} = {then.get(name)} (here {here[name]})" for name in here if then.get(name) != here[name]]
    except (*DECODE_ERRORS, TypeError, csv.Error) as error:
        told = f"{what}: no {index.name} or cache.json that can be read ({reason_of(error)})"
        raise UsageError(f"{told}; tools/cache_latents.py makes them, and goes on where it was stopped") from error
    if other:
        raise UsageError(f"{what}: made with {', '.join(other)}; use the same, or another cache (--latents)")
    needed = ("out_path", "name", "begin", "group") if cache else ("out_path",)
    if not rows or not all(row.get(name) for row in rows for name in needed):
        raise UsageError(f"{what}: {index.name} has no rows, or not all have {', '.join(needed)}")
    for row in rows:
        path = os.path.join(index.parent, os.path.expanduser(row["out_path"]))
        name = f"{row['name']}#t={row['begin']}" if cache else row["out_path"]
        listing.append(VideoFile(name, path, row.get("maneuver") or "", group=row.get("group") or ""))
    listing.root = str(index.with_name("list.jsonl") if cache else index)
    listing.Dataset = type("LatentDataset", (LatentDataset,), {"cache": cache, "zeros": zeros})
    if cache:
        listing.sides = below_sides(listing) if cache.get("split") == "folders" else {}
        return listing
    with torch.device("meta"):
        listing.Dataset.world = world(cfg)
    for clip in listing[:16]:
        try:
            found = listing.Dataset(cfg, [clip], "", "train").read_file(clip, 0.0)
        except BadFile as error:
            reason = f"{clip.name}: {error}"
        else:
            listing.Dataset.zeros = {name: torch.zeros_like(value) for name, value in found.items()}
            return listing
    raise UsageError(f"{what}: no usable file among the first ({reason})")


def maneuver_names(videos, data_root):
    """All maneuvers that lists and annotations name, mirrored ones included -> sorted list."""
    names = set()
    for video in videos:
        try:
            name = read_annotation(data_root, video).get("maneuver", video.label)
        except BadFile:
            continue  # counted with its reason when the clip itself is read
        names |= {name, mirror_label(name)} - {""}
    return sorted(names)


SIGNAL_FILES = 512  # files at most whose signals are looked through for their mean and deviation


def action_statistics(data, stopping):
    """The actions in a dataset's files -> (means [A], deviations [A], a line about them); where no file has them all,
    empty and why. Mirrored clips count both ways; a signal that never changes has deviation 1. Stopped."""
    cfg, names, total, complete = data.cfg, data.cfg.action_names, len(data.videos), 0
    numbers, parts = range(0, total, -(-total // SIGNAL_FILES)), {name: [] for name in names}
    for number in numbers:
        if stopping():
            raise Stopped
        with suppress(BadFile):  # counted with its reason when the clip itself is read
            found = {name: row[np.isfinite(row)] for name, row in data.signals(number).items()}
            found = {name: row for name, row in found.items() if len(row)}
            complete += len(found) == len(names)
            for name, row in found.items():
                row = np.concatenate([row, -row]) if cfg.hflip and name in MIRRORED else row
                parts[name].append((len(row), row.mean(), row.var()))
    looked, means, deviations = f"{len(numbers)} of {total} training files", [], []
    if not complete:
        counts = ", ".join(f"{name} in {len(rows)}" for name, rows in parts.items())
        return (), (), f"no file has them all: {counts} annotations of {looked}"
    for count, mean, variance in (np.array(rows).T for rows in parts.values()):
        means.append(np.average(mean, weights=count))
        deviations.append(math.sqrt(np.average(variance + (mean - means[-1]) ** 2, weights=count)))
    deviations = [s if s > 1e-6 * max(abs(m), 1e-3) else 1.0 for m, s in zip(means, deviations)]
    told = ", ".join(f"{name} {m:.4g} +- {s:.4g}" for name, m, s in zip(names, means, deviations))
    passive = f"; {len(numbers) - complete} of these lack one, and are passive" * (complete < len(numbers))
    return means, deviations, f"actions: {told} in {looked}{passive}"


SAMPLED, SAMPLE_S = 24, 3.0  # files at most that are opened, and seconds, to tell the size of all
MAX_LISTED = 2**17  # names of files that a checkpoint holds at most


@dataclass
class DataSource:
    """What a run trains on. kind: videos | scenes | render | random, on every log line where it is not videos."""

    kind: str
    root: str
    train: list
    val: list
    maneuvers: list
    held_out: bool  # False: a single file serves both sides
    Dataset: type = ClipDataset  # what reads the files, and the world's draws
    draw: object = None
    quarantine: dict = field(default_factory=dict)  # files that no worker may open: name -> reason
    failing: dict = field(default_factory=dict)  # files not decoded when this process last tried: name -> reason
    test: list = field(default_factory=list)  # files of test/, which no run touches
    split_by: str = "hash"  # of their names; else what the sides of their Listing follow: folders, ids
    frame_cache: object = None  # a FrameCache
    line: object = say  # says a line about the data, once

    def listing(self):
        """What a checkpoint keeps of it: number of files and what splits them; a user's names, groups, if few."""
        videos = (*self.train, *self.val)
        names = sorted({video.name + f" of {video.group}" * bool(video.group) for video in videos})
        kept = names if self.kind == "videos" and len(names) <= MAX_LISTED else []
        return {"kind": self.kind, "root": self.root, "files": len(names), "names": kept, "split": self.split_by}

    def dataset(self, cfg, stream):
        """The dataset of a stream: train files for `train` and `bank`, held-out files for `val`, those of test/ for
        `test`, which is `val` where there are none."""
        stream = "val" if stream == "test" and not self.test else stream
        videos = {"val": self.val, "test": self.test}.get(stream, self.train)
        kind = {"random": NoiseDataset, "render": SceneDataset}.get(self.kind, self.Dataset)
        if not issubclass(kind, self.Dataset):  # a world's own samples, of frames that are made up
            kind = type(self.Dataset.__name__, (kind, self.Dataset), {})
        data = kind(cfg, videos, self.root, stream, self.maneuvers, self.quarantine, self.draw)
        data.frame_cache = self.frame_cache
        return data


def nothing_found(cfg, videos, suffixes=VIDEO_SUFFIXES):
    """What was looked for and what stands there instead, for a message."""
    return f"no video matches {cfg.video_glob!r} among {', '.join(suffixes)}; {videos.seen}"


def instead_of_videos(cfg, videos):
    """What a run without any video learns from -> one line."""
    if cfg.data_root:
        goes_on = f"going on with data:{cfg.missing_data} (--missing_data error refuses instead)"
        return f"WARNING: no video under {cfg.data_root}: {nothing_found(cfg, videos)}; {goes_on}"
    written = f"{cfg.scene_clips} clips in {cfg.out_dir}/scenes"
    what = "a new one for every sample" if cfg.scenes == "render" else written
    return f"no --data_root: training on built-in driving scenes, {what}"


def drives_of_pictures(cfg, videos):
    """What was listed -> the same, or where it is no video the folders of pictures, whose rate --frame_fps tells.
    UsageError without it, and for layouts that would be misread without a list."""
    root, what, otherwise = cfg.data_root, "", ""
    raw = [] if cfg.frame_fps else [video.path for video in videos if not (video.fps or video.times)]
    if any(path.endswith("/video.hevc") and os.path.exists(path[:-10] + "global_pose/frame_times") for path in raw):
        what = "this is comma2k19, whose streams hold no times"
    elif videos.drives and not videos and not cfg.frame_fps:
        what = nothing_found(cfg, videos)
        otherwise = "; --frame_fps N takes each folder of pictures for a drive"
    with suppress(OSError, ValueError):
        if '"codebase_version"' in read_text(os.path.join(root, "meta", "info.json"), MAX_ANNOTATION_BYTES):
            what = "this is LeRobot, several episodes in a file or cameras of one"
    if what:
        cure = f"python tools/make_list.py {root} --out LIST.jsonl makes the list to be given instead{otherwise}"
        raise UsageError(f"data_root {root}: {what}; {cure}")
    return videos or videos.drives or videos


def list_data(cfg, Dataset=ClipDataset):
    """The files that a config names, [] for built-in scenes. UsageError for a wrong or a missing path."""
    suffixes, must = Dataset.SUFFIXES, not Dataset.HAS_SCENES
    if must and not os.path.exists(cfg.data_root):  # no scenes stand in
        wanted = f"must name a folder or a list of files {', '.join(suffixes)} (--data_root)"
        raise UsageError(f"data_root = {cfg.data_root or repr('')}: {wanted}")
    videos = find_videos(cfg.data_root, cfg.video_glob, suffixes) if cfg.data_root else Listing()
    videos = drives_of_pictures(cfg, videos) if cfg.data_root and not must else videos
    if cfg.data_root and not videos and (must or cfg.missing_data == "error"):
        raise UsageError(f"data_root {cfg.data_root}: {nothing_found(cfg, videos, suffixes)} (--video_glob)")
    return Dataset.arrange(cfg, videos)


def open_data(world, cfg, videos, is_main, barrier, stopping=None):
    """Listed files -> the DataSource of a world (its class). Built-in scenes are written where they are needed, by
    rank 0, while the others wait at `barrier()`. Stopped when `stopping()` says so meanwhile."""
    kind, root, sides = "videos", getattr(videos, "root", cfg.data_root), getattr(videos, "sides", {})
    Dataset = getattr(videos, "Dataset", world.Dataset)
    if not videos and cfg.data_root and cfg.missing_data == "random":
        kind, videos = "random", [VideoFile(f"random_{number}", "") for number in range(64)]
    elif not videos and cfg.scenes == "render":
        kind, videos = "render", [VideoFile(f"scene_{number}", "") for number in range(cfg.scene_clips)]
    elif not videos:
        kind, root = "scenes", os.path.join(cfg.out_dir, "scenes")
        if is_main:
            write_scenes(root, cfg, stopping)
        barrier()
        root = str(scenes_folder(root, cfg)[0])
        names = sorted(f"{name}.mp4" for name in scene_names(cfg))  # not what else may stand there
        videos = [VideoFile(name, os.path.join(root, "videos", name)) for name in names]
    if sides:
        train, val = sides["train"], sides["val"]
    elif kind in ("random", "render"):
        train, val = split_videos(videos, cfg.val_fraction)
    else:
        train, val = split_readable(cfg, videos, Dataset.read_one)
    maneuvers = []
    if world.wants_labels(cfg):
        maneuvers = list(SCENE_MANEUVERS) if kind == "render" else maneuver_names([*train, *val], root)
    split = dict(held_out=bool(val and train), test=sides.get("test", []))
    split |= {"split_by": videos.split_by} if sides else {}
    return DataSource(
        kind, root, train or videos, val or train or videos, maneuvers, Dataset=Dataset, draw=world.draw, **split
    )


def cache_objection(cache, cfg, source, clips):
    """Why `--frame_cache auto` keeps no frames of a run of so many clips -> (text, "" where it does, bytes)."""
    if cfg.decoder == "decord":
        return "what decord decodes is not kept", 0
    if cache.low != cache.high:
        how = "they would be scaled twice, not the same bit for bit (--frame_cache DIR keeps them)"
        return f"crops of several sizes are drawn: {how}", 0
    videos, plan = [*source.train, *source.val], draw_plan(np.random.default_rng(0), cfg, "train")
    sample = videos[:: -(-len(videos) // SAMPLED)]
    told, _ = told_apart(min(cfg.decode_timeout_s, SAMPLE_S), kept_sizes, cache, plan, sample)
    size, seconds = np.sum(told, 0) * len(videos) / len(told) if told else (0, 0)
    window = min(cfg.num_frames / cfg.clip_fps + KEPT_S if cfg.clip_fps else math.inf, seconds / len(videos))
    place = next(place for place in (cache.folder, *cache.folder.absolute().parents) if place.is_dir())
    free, gb = shutil.disk_usage(place).free, f"about {size / 1e9:.2g} GB"
    rows = (
        (not size, "no size of theirs could be told in time"),
        (clips * window < 2 * seconds, f"the run shows each {clips * window / max(seconds, 1e-9):.2g} times"),
        (size > cache.limit, f"{gb}, more than frame_cache_gb = {cfg.frame_cache_gb:g}"),
        (size > free / 2, f"{gb}, more than half of what is free on the disk"),
    )
    return next((why for is_so, why in rows if is_so), ""), size


def choose_frame_cache(cfg, source, clips):
    """Where a run that shows so many clips keeps decoded frames -> (arguments of FrameCache or None, line to say).
    UsageError for a folder that cannot be one."""
    decodes = issubclass(source.Dataset, ClipDataset) and source.kind in ("videos", "scenes")
    if not decodes or cfg.frame_cache == "off":
        return None, ""
    is_auto, why, size, stores, since = cfg.frame_cache == "auto", "", 0, True, time.time()
    cache = FrameCache(os.path.join(cfg.out_dir, "frame_cache") if is_auto else cfg.frame_cache, cfg, since)
    if is_auto:
        why, size = cache_objection(cache, cfg, source, clips)
    try:
        if not why:
            cache.open()
    except UsageError as error:
        if not is_auto:
            raise
        why = str(error)
    except OSError as error:
        stores, why = False, f"{cache.folder} cannot be written: {reason_of(error)}"
    if why and (is_auto or not cache.folder.is_dir()):
        return None, f"{'' if stores else 'WARNING: '}frames: not kept ({why})"
    told = f"frames: kept in {cache.folder}{f', about {size / 1e9:.2g} GB' * is_auto}"
    told += ", so that none is decoded twice" if stores else f"; WARNING: {why}, what is not there is decoded"
    if cache.low != cache.high:
        told += "; crops of several sizes are drawn, so they are scaled twice: not the same bit for bit"
    return (str(cache.folder), since, stores), told


def listing_change(saved, source):
    """How the data differ from `saved`, those of a checkpoint -> one line, "" where they do not or it does not say."""
    listed, saved = source.listing(), {"split": "hash", **saved}
    if "files" not in saved or all(saved[name] == listed[name] for name in ("kind", "files", "names", "split")):
        return ""
    what = f"{saved['files']} files ({saved['kind']}) then, {listed['files']} ({listed['kind']}) now"
    if saved["kind"] == listed["kind"] and saved["names"] and listed["names"]:
        before, now = set(saved["names"]), set(listed["names"])
        changes = (("added", sorted(now - before)), ("removed", sorted(before - now)))
        what = ", ".join(f"{len(names)} {word} ({name_some(names)})" for word, names in changes if names)
    if saved["split"] != listed["split"]:
        what += f"{', ' * bool(what)}split by {saved['split']} then, by {listed['split']} now"
    return f"WARNING: the files are not those of the checkpoint: {what}; samples are drawn from the present ones now"


def data_notes(cfg, videos, source, saved=None):
    """What to know about the data before the first step -> lines. `saved`: those of the checkpoint, if there is one."""
    notes = list(getattr(videos, "notes", ()))
    if source.kind == "scenes" and source.root != os.path.join(cfg.out_dir, "scenes"):
        kept = f"note: {cfg.out_dir}/scenes holds something else and stays as it is"
        notes.append(f"{kept}; this run's scenes stand in {source.root}")
    change = listing_change(saved, source) if saved else ""
    return notes + [change] * bool(change)


# ---------------------------------------------------------------------------------------------------------------------
# 9  Workers: samples -> batches in order, whatever becomes of a process
# ---------------------------------------------------------------------------------------------------------------------
# torch's DataLoader is not used: a worker that is killed or stopped in the middle of handing over a batch leaves the
# parent waiting for ever in a read that nothing can interrupt. It also needs /dev/shm, which containers keep small.


@dataclass(frozen=True)
class StepSampler:
    """Sample numbers of this rank, micro-step after micro-step: rank r of W takes start + i*W + r. Holds no state."""

    start: int
    num_batches: int
    batch_size: int
    rank: int
    world_size: int

    def __len__(self):
        return self.num_batches

    def __getitem__(self, batch):
        if not 0 <= batch < self.num_batches:
            raise IndexError(batch)
        first = batch * self.batch_size
        return [self.start + i * self.world_size + self.rank for i in range(first, first + self.batch_size)]


def collate(samples):
    """List of samples -> dict of stacked tensors, and `bad`: every (file, reason) met."""
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if key != "bad"}
    return batch | {"bad": [entry for sample in samples for entry in sample["bad"]]}


QUARANTINED = "quarantined"  # how the reason of a file begins that must not be opened again
START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # macOS: its system libraries do not survive a fork
PREFETCH = 2  # batches that a worker may be ahead of the loop
TICK_S = 0.25  # how often a wait for a batch looks up
QUIET_S = 10.0  # a worker without a file in hand may be silent for so long at least: it starts, draws, copies
INLINE_BYTES = 4096  # smaller arrays travel in the message itself
TOO_MANY = (
    "raise the limit on processes and open files (ulimit -u, ulimit -n) or lower --num_workers (0 reads in the "
    "main process)"
)
TOO_LARGE = (
    "lower --num_workers or --batch_size, give the container more memory (docker run --memory), or read in "
    "the main process (--num_workers 0)"
)
# What a worker's exception comes out as in the main process; others are programming errors.
WORKER_ERRORS = {"UsageError": UsageError, "UserError": UserError, "MemoryError": MemoryError, "OSError": OSError}


class BatchPickler(ForkingPickler):
    """Writes tensors as NumPy arrays, whose contents can travel beside the message (protocol 5)."""

    def reducer_override(self, thing):
        return (torch.from_numpy, (thing.numpy(),)) if isinstance(thing, torch.Tensor) else NotImplemented


class WorkerEnd(Attendant):
    """A worker's side of its socket: messages (kind, content), each preceded by its length. Kinds: hold (number of the
    file in hand, -1 for none), waiting and note (text), batch, whose large arrays lie in shared memory where there is
    some, and error: whatever exception leaves its `with` block.
    """

    def __init__(self, channel, memory):
        super().__init__()
        self.channel, self.memory, self.last_word = channel, memory, time.monotonic()
        self.places, self.free, self.end = [], 0, 0  # arrays laid down as (start, bytes), what is left of the slot

    def say(self, kind, content):
        message = ForkingPickler.dumps((kind, content), 5)
        self.channel.sendall(len(message).to_bytes(8, "little") + message)
        self.last_word = time.monotonic()

    @contextmanager
    def holding(self, number):
        self.say("hold", number)
        try:
            yield
        finally:
            self.say("hold", -1)

    def waiting(self, text):
        self.say("waiting", text)

    def note(self, text):
        self.say("note", text)

    def pass_on(self, sample):
        """A sample was made: said now and then, so that a long batch is not taken for a standstill."""
        if time.monotonic() - self.last_word > 1.0:
            self.say("hold", -1)
        return sample

    def lay_down(self, array):
        """Put an array's bytes into the slot if they fit -> whether they must travel in the message instead."""
        raw = array.raw()
        if raw.nbytes < INLINE_BYTES or self.free + raw.nbytes > self.end:
            return True
        self.memory[self.free : self.free + raw.nbytes] = raw
        self.places.append((self.free, raw.nbytes))
        self.free += -(-raw.nbytes // 64) * 64
        return False

    def hand_over(self, batch, turn):
        """Send a batch, its arrays in slot turn % PREFETCH. The main process says when a slot is free again."""
        if turn >= PREFETCH and not self.channel.recv(1):
            raise EOFError("the main process is gone")
        size, inner = len(self.memory) // PREFETCH, io.BytesIO()
        self.places, self.free = [], turn % PREFETCH * size
        self.end = self.free + size
        BatchPickler(inner, 5, True, self.lay_down).dump(batch)
        self.say("batch", (self.places, inner.getvalue()))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            known = next((name for name, base in WORKER_ERRORS.items() if isinstance(error, base)), "")
            text = str(error) if known else f"{kind.__name__}: {error}"
            with suppress(OSError):  # the main process is gone: nobody is left to tell
                self.say("error", (known, text, "".join(traceback.format_exception(error))))
        return True


def serve_batches(parent, channel, memory, batch_numbers, nice, dataset, files, sampler, collate_fn):
    """Life of a loader worker: make its share of the batches, in order, at most PREFETCH ahead of the loop."""
    for number in STOP_SIGNALS:  # the main process saves first and then ends its workers
        signal.signal(number, signal.SIG_IGN)
    os.nice(nice)
    torch.set_num_threads(1)
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
    """The main process's side of a worker: its process, its socket and what it has said."""

    def __init__(self, batch_numbers, memory_bytes):
        shared = START_METHOD == "fork" and memory_bytes
        self.memory = mmap.mmap(-1, memory_bytes) if shared else b""  # anonymous: needs no /dev/shm
        self.channel, self.theirs = socket.socketpair()
        for end, option in itertools.product((self.channel, self.theirs), (socket.SO_SNDBUF, socket.SO_RCVBUF)):
            end.setsockopt(socket.SOL_SOCKET, option, 2**20)
        self.channel.setblocking(False)
        self.batch_numbers, self.todo, self.ahead = batch_numbers, len(batch_numbers), 0  # to make; made, slot in use
        self.inbox, self.parcels, self.in_hand = bytearray(), [], -1  # bytes, batches not taken yet, file that it reads
        # seconds for which the loop has waited for a word, whether its end is closed
        self.silent, self.lost = 0.0, False
        self.process, self.failure = None, None  # what ended it: (name in WORKER_ERRORS or "", text, traceback)

    def start(self, *work):
        """Start the process. OSError when the system refuses."""
        args = os.getpid(), self.theirs, self.memory, self.batch_numbers, *work
        self.process = multiprocessing.get_context(START_METHOD).Process(target=serve_batches, args=args, daemon=True)
        self.process.start()
        self.theirs.close()  # the worker alone holds it: its death closes it

    def read(self):
        """Take in what has arrived -> [(kind, text)] for whoever watches."""
        try:
            while piece := self.channel.recv(2**20):
                self.silent = 0.0
                self.inbox += piece
            self.lost = True
        except (BlockingIOError, ConnectionError) as error:  # no more for now, or its death
            self.lost = isinstance(error, ConnectionError)
        texts = []
        while len(self.inbox) >= 8 and len(self.inbox) >= (until := 8 + int.from_bytes(self.inbox[:8], "little")):
            kind, content = ForkingPickler.loads(self.inbox[8:until])
            del self.inbox[:until]
            if kind == "hold":
                self.in_hand = content
            elif kind == "batch":
                self.parcels.append(content)
                self.todo, self.ahead = self.todo - 1, self.ahead + 1
            elif kind == "error":
                self.failure = content
            else:
                texts.append((kind, content))
        return texts

    @property
    def fate(self):
        """How it ended, in words."""
        self.process.join(1.0)
        if (code := self.process.exitcode) is None:
            return "no sign of life"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def fail(self):
        """Raise the exception that ended it, its traceback there as the cause."""
        known, text, trace = self.failure
        error = WORKER_ERRORS[known](text) if known else RuntimeError(f"in a loader worker: {text}")
        raise error from RuntimeError(f"\n{trace}")

    def take(self, in_place=False):
        """The next batch, its arrays copied or, `in_place`, in shared memory until `release`."""
        places, inner = self.parcels.pop(0)
        pieces = [np.frombuffer(self.memory, np.uint8, size, start) for start, size in places]
        return ForkingPickler.loads(inner, buffers=pieces if in_place else [piece.copy() for piece in pieces])

    def release(self):
        """Say that the slot of the batch taken last is free."""
        self.ahead -= 1
        with suppress(ConnectionError):  # it has made its last batch, or its death is noticed when it is waited for
            self.channel.send(b"f")

    def end(self):
        """End it at once: a worker that hangs in a decoder hears nothing else."""
        if self.process is not None and self.process.pid:
            self.process.kill()
            self.process.join(5.0)  # a disk that does not answer may hold it for longer
        self.channel.close()
        self.theirs.close()


def end_workers(workers, owner):
    """End and forget all workers of a list; a fork of the process that started them holds the same list, and ends
    none."""
    for worker in workers if os.getpid() == owner else ():
        worker.end()
    workers.clear()


def init_pinning(device):
    """The thread that fills pinned memory stays on the rank's GPU and on one core."""
    torch.cuda.set_device(device)
    torch.set_num_threads(1)


def pin_batch(batch):
    """A batch's tensors in pinned memory, for copies that the GPU fetches itself."""
    return {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}


@dataclass(eq=False)
class ClipLoader:
    """Iterator over batches in the sampler's order, whatever the number of workers and whatever becomes of them.

    Each worker makes every num_workers-th batch. When one dies, or says nothing while the loop waits for timeout_s, all
    are replaced and reading goes on with the batch that was due; the file in hand at two such ends goes into the
    `quarantine` of `files`. Since a sample's substitute depends on the sample alone, later batches are as if the file
    had been left out from the start. With num_workers = 0 nothing guards the process. It draws no random numbers.

    Workers with a `nice` above 0 take what time the loop's own threads leave over: these wait for each other, so a core
    that one of them shares with a worker holds up all. Where other programs leave nothing over they may be late: after
    the first of them that is, they are not nice any more.
    """

    dataset: object
    sampler: StepSampler
    num_workers: int
    pin_memory: bool = False
    timeout_s: float = 60.0
    collate_fn: object = collate
    files: object = None  # the FileDataset that reads; by default `dataset` where it is one
    batch_bytes: int = 0
    stopping: object = None  # a wait looks at stopping() and raises Stopped; the batch is still due then
    failing: dict | None = None  # name -> reason of files that could not be decoded and have not been since, kept here
    line: object = say  # says what workers note
    nice: int = 0

    def __post_init__(self):
        self.attendant = Attendant(self.stopping, self.line)
        self.files = self.files or (self.dataset if isinstance(self.dataset, FileDataset) else None)
        self.delivered, self.begun, self.workers = 0, 0, []  # batches delivered, now and when these workers began
        self.strikes, self.deaths = Counter(), 0  # ends of workers: by number of the file in hand, without any in a row
        self.pinned, self.pinning = None, None
        if self.pin_memory and torch.cuda.is_available():
            self.pinning = ThreadPoolExecutor(1, initializer=init_pinning, initargs=(torch.cuda.current_device(),))
        # forgotten or at exit: workers ignore SIGTERM, and the interpreter would wait for them for ever
        weakref.finalize(self, end_workers, self.workers, os.getpid())
        if self.num_workers:
            self.start()
        elif self.files is not None:
            self.files.watch = self.attendant

    def start(self):
        """Start workers at the batch that is due. UserError when the system refuses."""
        self.begun, self.pinned, end = self.delivered, None, len(self.sampler)
        try:
            for first in range(self.begun, min(self.begun + self.num_workers, end)):
                self.workers.append(Worker(range(first, end, self.num_workers), PREFETCH * self.batch_bytes))
                with HeldSignals():
                    self.workers[-1].start(self.nice, self.dataset, self.files, self.sampler, self.collate_fn)
        except OSError as error:
            self.close()
            cure = TOO_LARGE if error.errno == errno.ENOMEM else TOO_MANY
            raise UserError(f"loader workers cannot be started ({reason_of(error)}); {cure}") from error

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
            batch = (self.pinned or self.pin()).result() if self.pinning else self.due.take()
            self.pinned = None
            self.due.release()
        self.delivered, self.deaths, self.attendant.has_spoken = self.delivered + 1, 0, False
        if self.pinning and self.workers and self.delivered < len(self.sampler) and self.due.parcels:
            self.pinned = self.pin()  # while the loop computes
        if self.failing is not None:
            self.keep_account(batch)
        return batch

    def pin(self):
        """Let the thread copy the batch that is due and has arrived -> its future."""
        return self.pinning.submit(pin_batch, self.due.take(in_place=True))

    def look(self, seconds):
        """Read what the workers say, and wait for it at most so long."""
        there = [worker for worker in self.workers if not worker.lost]
        multiprocessing.connection.wait([worker.channel for worker in there], seconds)
        for kind, text in [word for worker in there for word in worker.read()]:
            (self.attendant.note if kind == "note" else self.attendant.tell)(text)

    def wait(self):
        """One tick of waiting for the batch that is due. Stopped, or the exception that ended its worker."""
        if self.due.failure:
            self.due.fail()
        self.attendant.waiting("")
        before = time.monotonic()
        self.look(TICK_S)
        waited = min(time.monotonic() - before, 2 * TICK_S)  # time in which this process stood still counts for nobody
        for worker in self.workers:
            worker.silent += waited if worker.todo and worker.ahead < PREFETCH else 0.0
        gone = [worker for worker in self.workers if worker.lost and worker.todo and not worker.failure]
        limits_s = max(self.timeout_s, QUIET_S), self.timeout_s  # without and with a file in hand
        late = [worker for worker in self.workers if not worker.lost and worker.silent > limits_s[worker.in_hand >= 0]]
        if gone or late:
            self.replace_workers(gone, late)

    def replace_workers(self, gone, late):
        """Count strikes, quarantine, start anew. UserError when workers keep failing without a file in hand."""
        if late and self.nice:
            self.nice = 0
            self.line(f"no word from a loader worker for {self.timeout_s:g} s: the next have the run's own priority")
        ends = {worker.fate for worker in gone} | {f"no word for {self.timeout_s:g} s" for worker in late}
        too_slow = f"one clip took longer than decode_timeout_s = {self.timeout_s:g}"
        blamed = [(worker.in_hand, too_slow) for worker in late if worker.in_hand >= 0]
        blamed += [(worker.in_hand, "it killed two loader workers") for worker in gone if worker.in_hand >= 0]
        self.close()
        for number, reason in blamed:
            self.strikes[number] += 1
            if self.strikes[number] > 1:
                self.files.quarantine[self.files.videos[number].name] = f"{QUARANTINED}: {reason}"
        self.deaths += not blamed
        if self.deaths > 2:
            raise UserError(f"loader workers die before they open a file ({', '.join(sorted(ends))}); {TOO_LARGE}")
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


def batch_bytes(data, num_samples):
    """Room that the arrays of a batch of a FileDataset take."""
    sample = data.whole(0, data.blank(), -1, [])
    return num_samples * sum(value.nbytes for key, value in sample.items() if key != "bad") + 2**16


def open_loader(source, cfg, stream, sampler, num_workers, pin_memory=False, stopping=None, nice=0):
    """The ClipLoader of a stream of a DataSource. A wait for a batch raises Stopped once `stopping()` is true."""
    data = source.dataset(cfg, stream)
    options = dict(batch_bytes=batch_bytes(data, sampler.batch_size), stopping=stopping, failing=source.failing)
    options |= dict(line=source.line, nice=nice)
    return ClipLoader(data, sampler, num_workers, pin_memory, cfg.decode_timeout_s, **options)


# ---------------------------------------------------------------------------------------------------------------------
# 10  Process: ranks, device, precision, seeds
# ---------------------------------------------------------------------------------------------------------------------


# a signal that comes again within these seconds is the same request, told to launcher and ranks or to a whole group
REPEAT_S = 10.0


class StopFlag:
    """Remembers that something asked the run to stop, for whoever waits or works for long; `saved` is the step up to
    which everything is on the disk. Much later, a second signal ends at once. Under torchrun the death of the launcher
    counts as well: nobody would end its ranks. A SIGHUP that nohup has switched off stays off.
    """

    def __init__(self, signals=STOP_SIGNALS):
        self.signal_name, self.since, self.saved, self.previous = "", 0.0, 0, {}
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other thread
            for number in signals:
                if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):
                    self.previous[number] = signal.signal(number, self.handle)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # those since the program's first line come now

    @property
    def reason(self):
        """What asked, "" while nothing has."""
        orphaned = self.launcher is not None and os.getppid() != self.launcher
        return self.signal_name or ("the death of its launcher" if orphaned else "")

    def asked(self):
        """Whether to stop."""
        return bool(self.reason)

    def handle(self, number, frame):
        """Called by Python between two instructions of whatever runs."""
        name = signal.Signals(number).name
        if not self.signal_name:
            self.signal_name, self.since = name, time.monotonic()
        elif time.monotonic() - self.since > REPEAT_S:
            text = f"{name} after {self.signal_name}: ended at once, nothing is saved since step {self.saved}\n"
            with suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, text.encode())
            os._exit(128 + number)

    def restore(self, ignore=False):
        """Give the signals back, or switch them off: a launcher that repeats one must not change the exit code."""
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN if ignore else handler)


class StoppedTogether(Stopped):
    """A stop of which all ranks know: whoever catches it need not tell the others, who have left the same work."""


@dataclass
class Process:
    """Who this process is and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    amp_dtype: torch.dtype | None  # None: fp32
    store: object = None  # the key-value store behind the process group
    stop: StopFlag = field(default_factory=partial(StopFlag, ()))  # what a signal sets; by default none does

    @property
    def is_main(self):
        return self.rank == 0

    def worker_nice(self, cfg):
        """The `nice` of loader workers: on a GPU they hold up nobody."""
        return cfg.worker_nice if self.device.type == "cpu" else 0

    def reduce(self, values, dtype, op):
        """One all-reduce of a list of numbers -> list."""
        tensor = torch.tensor(values, dtype=dtype, device=self.device if self.device.type == "cuda" else "cpu")
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def mean(self, values):
        """Mean over ranks of a list of floats -> list of floats."""
        if self.world_size == 1:
            return list(map(float, values))
        return [value / self.world_size for value in self.reduce(values, torch.float64, dist.ReduceOp.SUM)]

    def any(self, *flags):
        """Whether each flag is set on at least one rank -> list of bools, the same on all ranks."""
        flags = list(map(bool, flags))
        if self.world_size == 1:
            return flags  # twice a step: nothing that a GPU would have to be waited for
        return list(map(bool, self.reduce(flags, torch.int64, dist.ReduceOp.MAX)))

    def collect(self, thing):
        """Gather one Python object per rank -> list in rank order."""
        things = [thing] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(things, thing)
        return things

    def stop_together(self, mine=False):
        """StoppedTogether on all ranks when one of them was asked to stop, or has met a Stopped (`mine`)."""
        if self.any(mine or self.stop.asked())[0]:
            raise StoppedTogether

    def together(self, work, *args):
        """A piece of work without collectives, done by every rank -> its result; StoppedTogether where a stop came
        before or in it."""
        result, met = None, self.stop.asked()
        try:
            result = None if met else work(*args)
        except StoppedTogether:
            raise
        except Stopped:
            met = True
        self.stop_together(met)
        return result

    def in_step(self, loader):
        """The batches of a loader, over which all ranks walk until one is asked to stop (StoppedTogether)."""
        try:
            for _ in range(len(loader)):
                yield self.together(next, loader)
        finally:
            loader.close()

    def silent_ranks(self, seconds=3.0):
        """After a failed collective: the ranks that do not report it within a few seconds, dead or hung -> list."""
        deadline, silent = time.monotonic() + seconds, [0]
        with suppress(dist.DistError):  # the store is gone, and rank 0 that held it
            self.store.set(f"failed/{self.rank}", "1")
            while silent := [rank for rank in range(self.world_size) if not self.store.check([f"failed/{rank}"])]:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        return silent

    def leave(self, seconds=10.0):
        """Wait until every rank is through its last collective: one that is gone resets connections from which another
        has still to read, and that one would call a finished run lost."""
        deadline = time.monotonic() + seconds
        with suppress(dist.DistError):  # rank 0 held the store and has gone, having seen all of us
            self.store.set(f"done/{self.rank}", "1")
            while not all(self.store.check([f"done/{rank}"]) for rank in range(self.world_size)):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.02)


def choose_device(name, local_rank):
    """`auto` takes cuda, then mps, then cpu; a device that is asked for and absent is an error, never replaced."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in has if has[kind]) if name == "auto" else name
    if not has[name]:
        why = {"cuda": "this machine has no usable CUDA device", "mps": "not available on this machine"}[name]
        raise UsageError(f"device = {name}: {why}; use --device cpu or --device auto")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= (here := torch.cuda.device_count()):
        raise UsageError(f"device = cuda: local rank {local_rank} but {here} GPUs here; lower --nproc_per_node")
    return torch.device(name, local_rank)


PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # amp_dtype -> its name in checkpoints
EMULATED = 4.0  # products that take so many times as long as in fp32 are done by other instructions


def amp_dtype(cfg, device):
    """The type under --amp: amp_type, else bf16, or fp16 on CUDA cards that only emulate bf16. None without --amp."""
    if not cfg.amp:
        return None
    kind = cfg.amp_type
    if kind == "auto" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        kind = "fp16"
    return torch.float16 if kind == "fp16" else torch.bfloat16


def fastest(calls, device, rounds=3):
    """Seconds of each call: the best of some rounds, taken in turn after one round that does not count -> list."""
    seconds = [math.inf] * len(calls)
    for number in range(rounds + 1):
        for place, call in enumerate(calls):
            began = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number:
                seconds[place] = min(seconds[place], time.perf_counter() - began)
    return seconds


def part_pass(part, values, dtype):
    """One pass of a module forward and back, under autocast where a dtype is given."""
    with torch.autocast(values.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = part(values).square().mean()
    loss.backward()


def amp_cost(world, cfg, device, dtype):
    """Time of a training pass under autocast over its time in fp32, tried on a typical part of a world.

    A product comes first. A CPU without bf16 instructions takes 30 times as long for it, which is known after
    milliseconds; for a CUDA card it decides: parts as small as a clip's leave the card waiting for the next kernel.
    """
    square = torch.ones(*[2048 if device.type == "cuda" else 128] * 2, device=device)
    plain, half = fastest([partial(torch.mm, matrix, matrix) for matrix in (square, square.to(dtype))], device)
    if device.type == "cuda" or device.type == "cpu" and half > EMULATED * plain:
        return half / plain
    part, values = (thing.to(device) for thing in world.typical_part(cfg, device))
    plain, half = fastest([partial(part_pass, part, values, kind) for kind in (None, dtype)], device)
    return half / plain


def choose_precision(world, cfg, process, saved=""):
    """Autocast only where it is no slower than fp32 on this machine -> (amp dtype or None, the reason in words).

    The slowest rank decides for all. `saved` is the precision of the checkpoint that the run goes on from: it stays
    unless the other one is clearly faster here, so that a resumed run computes the same bits. The draws of the global
    generator differ from run to run after this: seed it afterwards.
    """
    dtype = amp_dtype(cfg, process.device)
    if dtype is None or cfg.amp_type != "auto":
        return dtype, "as amp_type says" if dtype else ""
    name, kind = PRECISIONS[dtype], {"cpu": "CPU", "cuda": "GPU"}.get(process.device.type, process.device.type)
    try:
        cost = amp_cost(world, cfg, process.device, dtype)
    except TypeError:  # what Metal says where it has no bf16 at all
        cost = math.inf
    cost = max(process.collect(cost))
    if cost <= {name: 1.5, "fp32": 1 / 1.5}.get(saved, 1.0):
        return dtype, f"{cost:.2g} of the time of fp32 on this {kind}"
    if cost > EMULATED and kind == "CPU":
        return None, f"this CPU has no {name} instructions, {name} would take {cost:.0f} times as long"
    return None, f"{name} would take {cost:.2g} times as long on this {kind}"


def read_count(name, default, least, most):
    """A whole number in the environment, set by torchrun or a user. UsageError when it is none or out of range."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        rule = f"must be a whole number from {least} to {most}; torchrun sets it for every process"
        raise UsageError(f"environment: {name} = {shown(text)} {rule}")
    return int(text)


def restart_count():
    """How often torchrun has started this run again."""
    return read_count("TORCHELASTIC_RESTART_COUNT", 0, 0, 10**9 - 1)


def rounds_of_wait(what, deadline, stop, pause_s):
    """Generator of the rounds of a wait between ranks, one at least and none after the deadline. Stopped on a signal;
    what is waited for is said whenever nothing was said for SILENCE_S."""
    spoken = time.monotonic()
    while True:
        if stop.asked():
            raise Stopped
        if time.monotonic() - spoken >= SILENCE_S:
            say(f"at work: waiting for {what}, {deadline - time.monotonic():.0f} s more")
            spoken = time.monotonic()
        yield
        if time.monotonic() > deadline:
            return
        time.sleep(pause_s)


def reach(address, port, deadline, stop):
    """Wait until something listens. UserError after the deadline; Stopped on a signal: the store would hear none."""
    place, reason = f"{address} port {port}", ""
    for _ in rounds_of_wait(f"rank 0 at {place}", deadline, stop, 0.2):
        try:
            return socket.create_connection((address, port), timeout=1.0).close()
        except OSError as error:
            reason = reason_of(error)
    cure = "start it there, or correct MASTER_ADDR and MASTER_PORT"
    raise UserError(f"rank 0 does not answer at {place} ({reason}): {cure}")


def open_store(rank, world_size, timeout_s, stop):
    """Wait until all ranks are there -> the key-value store through which they find each other, under a prefix of this
    attempt. UserError names the ranks that are absent after timeout_s.

    torchrun serves one store for all its restarts, and a restarted rank would read addresses that dead ranks left in
    it. The count of restarts is the same for all ranks of one node only: several nodes need the launcher's own switch
    (README).
    """
    env, deadline, absent = os.environ, time.monotonic() + timeout_s, range(world_size)
    if not (address := env.get("MASTER_ADDR")):
        rule = "but MASTER_ADDR, where rank 0 is met, is not set; torchrun sets both"
        raise UsageError(f"environment: WORLD_SIZE = {world_size}, {rule}")
    port, served = read_count("MASTER_PORT", "", 1, 65535), env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_node = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    number, limit, hosts = None if served else world_size, timedelta(seconds=timeout_s), not served and rank == 0
    try:
        if not hosts:
            reach(address, port, deadline, stop)
        store = dist.TCPStore(address, port, number, hosts, limit, wait_for_workers=False)
        store = dist.PrefixStore(f"attempt_{restart_count() if one_node else 'any'}", store)
        store.set(f"here/{rank}", "1")
        for _ in rounds_of_wait(f"the other ranks of {world_size}", deadline, stop, 0.05):
            absent = [other for other in absent if not store.check([f"here/{other}"])]
            if not absent:
                return store
    except dist.DistError as error:
        why = f"{flat(error)[:200]}); rank 0 may be gone, or the port in use"
        raise UserError(f"ranks cannot meet at {address} port {port} ({why}") from error
    who = f"rank {', '.join(map(str, absent))} of {world_size}"
    raise UserError(f"{who} did not come within dist_timeout_s = {timeout_s:g} s; start all of them, on all nodes")


def identify_process(cfg, stop):
    """Torchrun's environment -> Process with its device, not yet joined to its peers. UsageError for what cannot be."""
    world_size = read_count("WORLD_SIZE", 1, 1, 10**6)
    rank = read_count("RANK", 0 if world_size == 1 else "", 0, world_size - 1)
    device = choose_device(cfg.device, read_count("LOCAL_RANK", 0, 0, world_size - 1))
    return Process(rank, world_size, device, None, stop=stop)


def join_ranks(process, cfg):
    """Join the process group once all ranks are there. UserError names absent ones; Stopped where a signal comes."""
    rank, world_size, gpu = process.rank, process.world_size, process.device if process.device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    if world_size > 1:
        process.store = open_store(rank, world_size, cfg.dist_timeout_s, process.stop)
        own = dict(store=process.store, rank=rank, world_size=world_size, device_id=gpu)
        dist.init_process_group("gloo" if gpu is None else "nccl", timeout=timedelta(seconds=cfg.dist_timeout_s), **own)
    torch.set_float32_matmul_precision("high")


def is_sharded(value):
    """Whether a tensor lies in parts on all ranks, cut along its first axis: one of torch's DTensors."""
    return hasattr(value, "to_local")


def own_part(value):
    """The part of a sharded tensor that this rank holds, without gradient; any other tensor as it is."""
    return value.detach().to_local() if is_sharded(value) else value


def whole(value):
    """A sharded tensor in one piece, on every rank: collective. Any other as it is."""
    return value.detach().full_tensor() if is_sharded(value) else value


def cut_like(value, saved):
    """A whole tensor, cut as another of its shape is; as it is where that is not sharded. ValueError."""
    if not is_sharded(value):
        return saved
    if value.shape != saved.shape:
        raise ValueError(f"a tensor of shape {list(saved.shape)} for one of {list(value.shape)}")
    return torch.distributed.tensor.distribute_tensor(saved, value.device_mesh, value.placements, src_data_rank=None)


def fingerprint(model):
    """Order-free integer sums over the bits of all parameters and buffers, of any type -> list, equal on two ranks when
    the weights are. What is sharded exists once and is left out."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    values = (value.detach().reshape(-1) for value in model.state_dict().values() if not is_sharded(value))
    return [int(value.view(bits[value.element_size()]).sum(dtype=torch.int64)) for value in values]


def digest(thing):
    """Short hash of a JSON-like value, for comparing it over ranks."""
    return hashlib.sha256(json.dumps(thing, default=str).encode()).hexdigest()[:16]


def check_ranks(process, **parts):
    """UserError naming ranks whose values differ from rank 0's: said at once, not as a hang or a slow divergence."""
    of_ranks = process.collect(parts)
    for name in parts:
        odd = [str(rank) for rank, other in enumerate(of_ranks) if other[name] != of_ranks[0][name]]
        if odd:
            told = f"ranks disagree: {name.replace('_', ' ')} of rank {', '.join(odd)} differs from rank 0's"
            raise UserError(f"{told}; start all ranks with the same code, flags and data, from the same checkpoint")


def failed_collective(error):
    """Whether an exception is how a collective reports a peer that is gone or a timeout."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def autocast(process):
    """The autocast context of a forward pass; does nothing in fp32."""
    dtype = process.amp_dtype
    return torch.autocast(process.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def spare_threads(num_busy):
    """Compute with `num_busy` CPU threads fewer (one at least): where loader workers fill the cores, threads that share
    them wait for each other. Two workers on two cores: frozen encoders take 34 s with two threads, 23 s with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - num_busy))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_device(batch, device):
    """Tensors of a batch on the device, `bad` left out."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "bad"}


# ---------------------------------------------------------------------------------------------------------------------
# 11  Files: written whole, and never over what somebody else put there
# ---------------------------------------------------------------------------------------------------------------------


class GuardedFile:
    """A file open for writing that keeps the SHA-256 of what went into it, and the error of the disk, which torch.save
    hides behind its own."""

    def __init__(self, handle):
        self.handle, self.sha256, self.error, self.flush = handle, hashlib.sha256(), None, handle.flush

    def write(self, data):
        try:
            self.handle.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)


def sync_folder(folder):
    """Make renames in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path, write, announce=None):
    """Write through a temporary file, fsync, rename, fsync of the folder: the old or the new file is whole at any time.

    `write` gets the open file; `announce`, if given, path and SHA-256 of the temporary one before it is renamed.
    OSError when the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as raw:
            handle = GuardedFile(raw)
            try:
                write(handle)
            except RuntimeError:  # how torch.save reports that a write failed
                if handle.error is None:
                    raise
                raise handle.error from None
            raw.flush()
            os.fsync(raw.fileno())
        if announce is not None:
            announce(temporary, handle.sha256.hexdigest())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # the error above tells more
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def previous_folder(folder):
    """A new folder previous_<k> for what a run no longer goes on from."""
    aside = next(name for k in itertools.count(1) if not os.path.lexists(name := Path(folder) / f"previous_{k}"))
    aside.mkdir()
    return aside


# Stands in every result that is written under a fixed name: what proves a file to be the project's own.
MARK = "VJepa_AUTO_V2"


def move_aside(path):
    """Move somebody's file, which is never overwritten, into a new previous_<k> beside it, and say so."""
    aside = previous_folder(path.parent) / path.name
    os.rename(path, aside)
    say(f"note: {path} was not written by a run; it now stands in {aside.parent}", sys.stderr)


def write_own(path, write):
    """write_atomic for a result under a fixed name, which bears the MARK. Another file of that name is moved aside."""
    path = Path(path)
    if os.path.lexists(path) and not (path.is_file() and MARK.encode() in path.read_bytes()):
        move_aside(path)
    write_atomic(path, write)


def write_report(path, values):
    """A dict of plain values -> JSON file with the MARK in it, by write_own. NaN is refused: ValueError."""
    text = json.dumps({"made_by": MARK, **values}, indent=1, allow_nan=False) + "\n"
    write_own(path, lambda handle: handle.write(text.encode()))


# ---------------------------------------------------------------------------------------------------------------------
# 12  Schedules and clipping: step -> learning rate, EMA momentum
# ---------------------------------------------------------------------------------------------------------------------


def lr_at(step, cfg, peak):
    """Linear warm-up, then a cosine that reaches min_lr (at the same ratio for every group) at the last step."""
    if step < cfg.warmup:
        return peak * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(cfg.steps - 1 - cfg.warmup, 1)
    floor = cfg.lr_floor
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def ema_momentum_at(step, cfg):
    """Target momentum, linear from ema_momentum to ema_momentum_end where that is set."""
    end = cfg.ema_momentum_end or cfg.ema_momentum
    return cfg.ema_momentum + (end - cfg.ema_momentum) * step / max(cfg.steps - 1, 1)


def flow_momentum_at(step, cfg):
    """Momentum of the flow EMA: short at first, so that sampling follows the young net."""
    return min(cfg.flow_ema, (1 + step) / (10 + step))


@torch.no_grad()
def move_ema(slow, fast, momentum):
    """slow <- m * slow + (1 - m) * fast, in fp32, over all parameters of two equal modules."""
    torch._foreach_lerp_(list(map(own_part, slow.parameters())), list(map(own_part, fast.parameters())), 1.0 - momentum)


def total_norm(grads):
    """The norm of a list of gradients, over the parts of all ranks where they are sharded."""
    kinds = ([grad for grad in grads if is_sharded(grad) == cut] for cut in (True, False))
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind] or [torch.zeros(())]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def clip_gradients(optimizer, cfg):
    """Clip each optimizer group on its own, `decay` and `no_decay` as one, so that no gradient shrinks another's
    -> {grad_norm and NAME_grad_norm: norm before clipping}. With grad_clip_value each number on its own instead."""
    sides = {"grad_norm": []}
    for group in optimizer.param_groups:
        name = "grad_norm" if group["name"] in ("decay", "no_decay") else f"{group['name']}_grad_norm"
        sides.setdefault(name, []).extend(p.grad for p in group["params"] if p.grad is not None)
    norms = {name: total_norm(grads) for name, grads in sides.items()}
    for name, grads in sides.items():
        grads = list(map(own_part, grads))
        if cfg.grad_clip and grads:
            torch._foreach_mul_(grads, (cfg.grad_clip / (norms[name] + 1e-6)).clamp_max(1.0).to(grads[0].device))
        elif cfg.grad_clip_value and grads:
            torch._foreach_clamp_min_(grads, -cfg.grad_clip_value)
            torch._foreach_clamp_max_(grads, cfg.grad_clip_value)
    return norms


# ---------------------------------------------------------------------------------------------------------------------
# 13  World: what the loop asks of a model
# ---------------------------------------------------------------------------------------------------------------------


def param_group(cfg, name, parameters, lr=None):
    """An optimizer group: weight decay where it is called `decay`, peak learning rate cfg.lr where none is given."""
    decay = cfg.weight_decay if name == "decay" else 0.0
    return dict(params=parameters, name=name, weight_decay=decay, peak_lr=cfg.lr if lr is None else lr, lr=0.0)


class World(nn.Module):
    """A model and its objective, as the loop sees them. Config, KEYS and `forward` are needed, all else has a default.

    A world is one file: a dataclass, a class derived from this one, and `sys.exit(main(world=ItsName))`. It gets data,
    ranks, autocast, compile, checkpoints, resume, signals, log and evaluation from the loop, which knows it by class
    name and file. Randomness of a sample belongs into `draw`, state into `after_step`: so a run is resumed to the bit.
    """

    Config = ClipConfig  # the dataclass of its settings; derived from RunConfig where files are no videos
    Dataset = ClipDataset  # the FileDataset that reads its files
    KEYS = {}  # what `forward` and `figures` give, {key: meaning}; an evaluation logs the same keys behind val_
    TRAIN_KEYS = {}  # what `state` gives, and NAME_grad_norm of the groups that are clipped apart
    VAL_KEYS = {}  # what `held_out` gives, without val_
    NO_DECAY = ()  # ends of the names of matrices without weight decay
    # names of children whose weights `__init__` takes from elsewhere: checkpoints hold only their hash; it may set it
    FROZEN = ()
    FILES = ()  # names of what `report` writes into the run folder
    # on a GPU a pass may be recorded and replayed: `forward` reads nothing from the device, keeps nothing for the next
    # pass but buffers, and starts the same kernels each time; `__init__` may set it
    REPLAYS = False
    num_files = 0  # files to learn from, which the loop counts: an epoch is as many samples
    mark = ""  # what stands before every log line, such as weights:random; `__init__` may set it

    def __init_subclass__(cls):
        """TypeError for what would otherwise show after days, or never: a setting without flag, loss or field."""
        super().__init_subclass__()
        Config, known = cls.Config, {entry.name for entry in fields(cls.Config)}
        tuples = "NO_DECAY", "FROZEN", "FILES"
        problems = [f"{name} must be a tuple of names" for name in tuples if isinstance(getattr(cls, name), str)]
        if "__dataclass_fields__" not in vars(Config) and inspect.get_annotations(Config):
            problems.append(f"{Config.__name__} lacks @dataclass above it")
        if issubclass(cls.Dataset, ClipDataset) and not issubclass(Config, ClipConfig):
            problems.append(f"{Config.__name__} must derive from ClipConfig, or name a Dataset that reads other files")
        named = {name for each in Config.__mro__ for name in vars(each).get("MUST_MATCH", ())}
        named = named.union(
            *(merged(Config, table) for table in ("RANGES", "CHOICES")), *merged(Config, "PRESETS").values()
        )
        problems += [
            f"{Config.__name__} has no field {name}, which a table of it names" for name in sorted(named - known)
        ]
        lambdas = [name for name in known if name.startswith("lambda_") and f"loss_{name[7:]}" not in cls.KEYS]
        problems += [f"{name} weighs loss_{name[7:]}, of which KEYS says nothing" for name in sorted(lambdas)]
        if problems:
            raise TypeError(f"{cls.__name__}: {'; '.join(problems)}")

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__()
        self.cfg, self.rank, self.world_size = cfg, rank, world_size

    def __setattr__(self, name, value):
        """As nn.Module's. TypeError where an attribute, a child say, would hide something that the loop calls."""
        if callable(getattr(type(self), name, None)) and name in vars(World):
            raise TypeError(f"{type(self).__name__}: an attribute must not be called {name}, which the loop calls")
        super().__setattr__(name, value)

    # -- samples
    @staticmethod
    def draw(cfg, stream, index):
        """What a sample needs besides its file -> dict of tensors, by sample_rng(cfg.seed, stream, index, 3) alone."""
        return {}

    @staticmethod
    def wants_labels(cfg):
        """Whether samples carry the number of their maneuver."""
        return False

    # -- latents of a frozen encoder
    latent_fields = ()  # names of the settings that decide what latents are

    def latents(self, batch):
        """All that `forward` needs of a batch's clips, made by FROZEN parts alone -> {name: tensor [B, ...]}: what a
        batch holds with --latents, instead of `frames`."""
        return {}

    def latents_of(self, whole):
        """All tokens [L, D] of a clip in a foreign cache -> its `latents`, without batch axis."""
        raise BadFile(f"{type(self).__name__} reads no latents of whole clips")

    # -- a step
    def forward(self, batch):
        """-> (losses with loss_total, gauges, carry): scalars with gradient, scalars without, tensors for what follows.

        batch: stacked samples, and `step`, a scalar tensor. Changes no state. All that is compiled and wrapped.
        """
        raise NotImplementedError

    def weigh(self, losses):
        """{loss_NAME: scalar} -> the same behind loss_total, the sum of those whose field lambda_NAME is not 0."""
        weights = {name: getattr(self.cfg, f"lambda_{name.removeprefix('loss_')}", 1) for name in losses}
        zero = next(iter(losses.values())).new_zeros(())
        return {
            "loss_total": sum((weights[name] * loss for name, loss in losses.items() if weights[name]), zero),
            **losses,
        }

    def lr(self, step, peak):
        """Learning rate of a group with this peak at a step, by the step and what a checkpoint holds alone -> float."""
        return lr_at(step, self.cfg, peak)

    def trained(self):
        """What learns -> {name: parameter}: what asks for a gradient and is not FROZEN."""
        frozen = tuple(f"{name}." for name in self.FROZEN)
        return {name: p for name, p in self.named_parameters() if p.requires_grad and not name.startswith(frozen)}

    def groups(self):
        """Optimizer groups, each trained parameter in one: `decay`, `no_decay`, and others, which are clipped apart."""
        groups = {"decay": [], "no_decay": []}
        for name, parameter in self.trained().items():
            plain = parameter.ndim < 2 or name.endswith(self.NO_DECAY)
            groups["no_decay" if plain else "decay"].append(parameter)
        return [param_group(self.cfg, *item) for item in groups.items() if item[1]]

    def optimizer(self):
        """AdamW (0.9, 0.95), fused: 3.5 times faster than the plain loop on the CPU as well. ValueError where `groups`
        leaves out something that should learn."""
        groups = self.groups()
        given = {id(parameter) for group in groups for parameter in group["params"]}
        left_out = [name for name, parameter in self.trained().items() if id(parameter) not in given]
        if left_out:
            what = f"no group of {type(self).__name__} holds {name_some(left_out)}"
            raise ValueError(f"{what}; call requires_grad_(False) on what does not learn")
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def after_step(self, carries, step):
        """Take in what the micro-steps of a step left, on all ranks alike: EMA copies, queues, statistics. May return
        lines for the log."""

    def after_validation(self, values):
        """Take in the val_* figures of an evaluation in the middle of training, on all ranks alike, once for each: a
        schedule by held-out figures. Figures that are not finite are NaN."""

    def train(self, mode=True):
        """As nn.Module.train; what is FROZEN stays in eval mode and learns nothing."""
        super().train(mode)
        for name in self.FROZEN:
            getattr(self, name).eval().requires_grad_(False)
        return self

    # -- figures
    def look(self, batch, carry):
        """What `figures` wants to see of a batch -> dict of small tensors."""
        return {}

    def figures(self, looks, means):
        """Logged figures that are no means over batches -> dict. `means`: those of all losses and gauges."""
        return {}

    def state(self, step):
        """Figures of what the world holds after step number `step` -> dict."""
        return {}

    def held_out(self, batch, carry):
        """Costly figures, asked once per evaluation -> dict."""
        return {}

    def verdict(self, values):
        """One sentence about the last evaluation, "" for none."""
        return ""

    def report(self, run, values, seconds):
        """After the last evaluation, on rank 0: draw a picture, in about so many seconds. Stopped on a signal."""

    # -- start-up lines
    def take_weights(self, say):
        """Take in weights where a run begins, not where one goes on. `say` logs a line."""

    def take_data(self, run):
        """Take in what a run that begins must know of its data, on all ranks alike: statistics, say."""

    def describe(self):
        """Lines about the model; by default its parameters."""
        sizes = {name: sum(p.numel() for p in child.parameters()) / 1e6 for name, child in self.named_children()}
        return ["parameters: " + ", ".join(f"{name} {size:.3g} M" for name, size in sizes.items() if size)]

    def flops(self):
        """FLOP of a training step on one sample, forward and backward -> {part: FLOP}, {} where nobody counted."""
        return {}

    @staticmethod
    def typical_part(cfg, device):
        """(a new module, an input for it) on the CPU, on which autocast is timed against fp32 on the device."""
        return nn.Linear(512, 512), torch.randn(256, 512)

    # -- checkpoints
    def snapshot(self):
        """Entries of a checkpoint -> {name: dict of tensors that live in this world, or None}."""
        frozen = tuple(f"{name}." for name in self.FROZEN)
        return {"model": {key: value for key, value in self.state_dict().items() if not key.startswith(frozen)}}

    def expect(self, state):
        """Make what a checkpoint holds and a new world lacks. ValueError for values that cannot be."""

    @torch.no_grad()
    def restore(self, state):
        """Take in the entries of a checkpoint."""
        self.expect(state)
        for name, own in self.snapshot().items():
            for key, value in (own or {}).items():
                value.copy_(cut_like(value, state[name][key]))

    # -- phases after training
    def phases(self):
        """Fits that follow the last step -> [(name, number of steps)]."""
        return []

    def phase_groups(self, name):
        """Optimizer groups of such a fit."""
        return []

    def open_phase(self, name, run, before):
        """The Fit of a phase. `before`: that of the phase before it, None where the run goes on inside this one."""
        raise NotImplementedError


def shard_units(world):
    """The modules whose weights --shard fsdp gathers one by one, when each is called: those of nn.ModuleLists, blocks
    say, where no other module has the same weights. All else is gathered for the whole step."""
    owners = Counter(id(p) for module in world.modules() for p in module._parameters.values() if p is not None)
    units, inside = [], set()
    for module in world.modules():
        for child in module if isinstance(module, nn.ModuleList) and module not in inside else ():
            weights = [p for p in child.parameters() if p.ndim]
            if weights and not isinstance(child, nn.ModuleList) and all(owners[id(p)] == 1 for p in weights):
                units.append(child)
                inside.update(child.modules())
    return units


def compile_world(world):
    """Compile a world in place: block by block, so that like blocks share what is compiled, or as cfg.compile_whole."""
    for module in not world.cfg.compile_whole and shard_units(world) or [world]:
        module.compile(dynamic=False)


def held_bytes(world, ranks):
    """What each of so many ranks holds of a world that learns -> {what: bytes with --shard none, with fsdp}. Gathered
    are two blocks, one in use and one on its way, with gradients, and what is in no block."""
    learns, units = set(world.trained().values()), [set(unit.parameters()) for unit in shard_units(world)]
    weights, is_cut = set(world.parameters()), ranks > 1
    rest = weights.difference(*units)
    parts = learns, weights - learns, set(world.buffers()), rest, rest & learns, *units
    learns, others, buffers, *gathered = (sum(value.nbytes for value in part) for part in parts)
    own = learns / ranks
    return {
        "weights that learn": (learns, own),
        "other weights, buffers": (others + buffers, others / ranks + buffers),
        "gradients": (learns, own + learns * (is_cut and world.cfg.grad_accum > 1)),  # whole until the last micro-step
        "AdamW": (2 * learns, 2 * own),
        "gathered shards": (0, is_cut * (sum(gathered[:2]) + 4 * max(gathered[2:], default=0))),
    }


class Fit(World):
    """Steps on latents that frozen networks made, after training: a world for the loop, which draws its own batches.

    A subclass makes its latents in `__init__(model, run, before)`, then calls this one's, and has KEYS, `batch` and
    `forward`. What learns is a part of `model`, named by its `phase_groups`: a checkpoint holds the model's weights and
    the optimizer, nothing of the Fit. One clip in twenty is held out; when its loss rises while the other falls, the
    net learns clips by heart.
    """

    latents = None  # not asked of a Fit, which may call its own so

    def __init__(self, model, name, num_steps, batch_size, num_clips):
        cfg = replace(model.cfg, steps=num_steps, warmup_steps=num_steps, batch_size=batch_size, grad_accum=1)
        super().__init__(cfg, model.rank, model.world_size)
        self.name, self.hidden, self.num_clips = name, (model,), num_clips
        self.kept = max(1, num_clips - num_clips // 20)  # clips to learn from
        self.learning = nn.ParameterList(p for group in model.phase_groups(name) for p in group["params"])
        self.learning.requires_grad_(True)

    @property
    def model(self):
        """The world whose part is fitted; in a tuple, so that its weights are not this module's."""
        return self.hidden[0]

    def groups(self):
        return self.model.phase_groups(self.name)

    def train(self, mode=True):
        """For ever in eval mode: without dropout."""
        return super().train(False)

    def rng(self, step):
        """The generator of a step; without one, of the held-out clips."""
        seed = self.cfg.seed if step is None else (self.cfg.seed * 1_000_003 + step) * 4096 + self.rank
        return torch.Generator().manual_seed(seed)

    def pick(self, step, rng):
        """The clips of a step by their numbers; without one, the first 512 that are held out."""
        if step is None:
            return torch.arange(self.kept, self.num_clips)[:512]
        return torch.randint(self.kept, (self.cfg.batch_size,), generator=rng)

    def batch(self, step=None):
        """What a step learns from, a function of its number -> dict of CPU tensors; without one, held-out clips."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# 14  Blocks: position code, attention, MLP
# ---------------------------------------------------------------------------------------------------------------------


def grid_positions(grid):
    """(t, h, w) sizes -> integer position of every token, int64 [t*h*w, 3], in (t, h, w) order."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid))


def axis_angles(positions, num):
    """Positions [L, 3] times `num` frequencies from 1 towards 1 / 10000 -> float64 [L, 3, num]."""
    return positions.double()[:, :, None] * 10000.0 ** (-torch.arange(num, dtype=torch.float64) / num)


def sincos_table(positions, dim):
    """Fixed 3D sine-cosine code: a third of the channels per axis, left-over ones zero. [L, 3] -> float32 [L, dim]."""
    angles = axis_angles(positions, dim // 6)
    code = torch.cat([angles.sin(), angles.cos()], 2).flatten(1)
    return F.pad(code, (0, dim - code.shape[1])).float()


def rope_table(positions, head_dim, paired=False):
    """3D rotary angles in V-JEPA 2's published form -> (cos, sin), float32 [L, head_dim].

    A head's channels are split in three equal even parts (t, h, w); the rest stays unrotated (cos 1, sin 0). Each part
    repeats its frequency list twice while rotating neighbouring pairs: the published weights expect that. Those of
    V-JEPA 2.1 expect one frequency per pair (`paired`).
    """
    angles = axis_angles(positions, head_dim // 6)
    angles = (angles.repeat_interleave(2, 2) if paired else angles.repeat(1, 1, 2)).flatten(1)
    rest = (0, head_dim - angles.shape[1])
    return F.pad(angles.cos(), rest, value=1.0).float(), F.pad(angles.sin(), rest).float()


def rotate(x, cos, sin):
    """Rotate neighbouring channel pairs. x [B, nh, N, hd], cos and sin [B, 1, N, hd] -> like x."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def init_weights(module):
    """Truncated normal 0.02 on every matrix, zero biases: the rule of all networks but the flow net. Norms start as
    torch makes them, ones and zeros."""
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(child.weight, std=0.02)
            nn.init.zeros_(child.bias)


MAX_PLAIN_SCORES = 2**23  # attention scores of one call that may be kept for backward
NEAR_SCORES = 2**20  # those that lie in the cache between the two products


@torch.compiler.assume_constant_result
def plain_is_faster():
    """Whether bf16 attention without gradients was seen to take less time by plain products on such a CPU: one with
    bf16 instructions and no tiles (AMX). One answer for a compiled graph."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def attend_plainly(q, k, v):
    """Attention as two products, with the scores in between kept in the type of the queries."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def attend(q, k, v):
    """Attention of queries [B, nh, Q, hd] to keys and values [B, nh, K, hd] -> [B, nh, Q, hd].

    torch's fused kernel, except for bf16 on a CPU. With gradients its backward is several times slower than plain
    products for few tokens. Those keep the scores, so only few of them. Without gradients plain products of as many
    clips as the cache holds take 0.7 of its time (AMD with bf16 instructions); other CPUs were not timed and keep it.
    """
    scores = q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        if torch.is_grad_enabled():
            if q.shape[0] * scores <= MAX_PLAIN_SCORES:
                return attend_plainly(q, k, v)
        elif scores <= NEAR_SCORES and plain_is_faster():
            parts = zip(*(x.split(NEAR_SCORES // scores) for x in (q, k, v)))
            return torch.cat([attend_plainly(*part) for part in parts])
    return F.scaled_dot_product_attention(q, k, v)


def split_heads(x, num, num_heads):
    """[B, N, num * dim] -> num views [B, nh, N, hd], whose gradients are joined by one copy."""
    return tuple(part.unflatten(2, (num_heads, -1)).transpose(1, 2) for part in x.chunk(num, 2))


class Attention(nn.Module):
    """Self-attention over tokens [B, N, dim], or attention of them to others alone, a context [B, K, dim] ->
    [B, N, dim]; with rotary (cos, sin) of the positions of both or without."""

    def __init__(self, dim, num_heads, dropout):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, rope=None, context=None, context_rope=None):
        if context is None:
            (q, k, v), context_rope = split_heads(self.qkv(x), 3, self.num_heads), rope  # each [B, nh, N, hd]
        else:
            (q_weight, kv_weight), (q_bias, kv_bias) = (p.tensor_split((x.shape[2],)) for p in self.qkv.parameters())
            (q,) = split_heads(F.linear(x, q_weight, q_bias), 1, self.num_heads)
            k, v = split_heads(F.linear(context, kv_weight, kv_bias), 2, self.num_heads)  # each [B, nh, K, hd]
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *context_rope)
        x = attend(q, k, v).transpose(1, 2).flatten(2)  # [B, N, dim]
        return F.dropout(self.proj(x), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Queries [B, Q, dim] read keys and values that `project` made once from a context [B, K, context_dim]."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(context_dim, 2 * dim), nn.Linear(dim, dim)

    def project(self, context):
        """context [B, K, context_dim] -> keys and values, each [B, nh, K, hd]."""
        return split_heads(self.kv(context), 2, self.num_heads)

    def forward(self, x, keys, values):
        (q,) = split_heads(self.q(x), 1, self.num_heads)  # [B, nh, Q, hd]
        return self.proj(attend(q, keys, values).transpose(1, 2).flatten(2))  # [B, Q, dim]


class MLP(nn.Module):
    """Linear, GELU, linear: [..., dim] -> [..., dim]."""

    def __init__(self, dim, hidden, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), dropout

    def forward(self, x):
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block: [B, N, dim] -> [B, N, dim]; with a context [B, K, dim] tokens read that alone."""

    def __init__(self, dim, num_heads, mlp_ratio, dropout):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x, rope=None, context=None, context_rope=None):
        context = context if context is None else self.norm1(context)
        x = x + self.attn(self.norm1(x), rope, context, context_rope)
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """A stack of blocks and a last norm over tokens at given positions: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, cfg, dim, depth, num_heads=0, mlp_ratio=0.0):
        super().__init__()
        sizes = dim, num_heads or cfg.num_heads, mlp_ratio or cfg.mlp_ratio, cfg.dropout
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(depth))
        self.norm, self.grad_checkpoint = nn.LayerNorm(dim, eps=1e-6), cfg.grad_checkpoint
        self.draws = cfg.dropout > 0  # the state of the generator cannot be read while a CUDA graph is recorded
        init_weights(self)
        for number, block in enumerate(self.blocks, 1):
            for last in (block.attn.proj, block.mlp.fc2):  # the residual stream keeps its scale with depth
                last.weight.data.div_(math.sqrt(2.0 * number))

    def forward(self, x, rope=None, context=None, context_rope=None, num_read=0):
        """With a context [B, K, dim] all tokens read that alone, in every block as it is; with num_read all read the
        first so many tokens alone."""
        if num_read and rope is not None:
            context_rope = tuple(part[:, :, :num_read] for part in rope)
        for block in self.blocks:
            args = x, rope, x[:, :num_read] if num_read else context, context_rope
            if self.grad_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint_activations(block, *args, use_reentrant=False, preserve_rng_state=self.draws)
            else:
                x = block(*args)
        return self.norm(x)


def gather_tokens(tokens, idx):
    """Pick tokens by position. tokens [B, L, D], idx [B, K] int64 in [0, L) -> [B, K, D]."""
    return tokens.gather(1, idx[..., None].expand(-1, -1, tokens.shape[-1]))


class PositionCode(nn.Module):
    """Positions of a token grid as buffers: an additive code (sincos) or rotary angles (rope, rope21)."""

    def __init__(self, kind, grid, dim, num_heads):
        super().__init__()
        self.kind, self.grid, self.sizes, self.other = kind, grid, (dim, num_heads), None
        self.is_rope, positions = kind != "sincos", grid_positions(grid)
        if kind == "rope21":  # rows and columns of every grid span those of its pretraining, 0 to 15
            positions = positions * torch.tensor([1.0, *(15 / max(n - 1, 1) for n in grid[1:])], dtype=torch.float64)
        if self.is_rope:
            tables = dict(zip(("cos", "sin"), rope_table(positions, dim // num_heads, kind == "rope21")))
        else:
            tables = {"code": sincos_table(positions, dim)}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def changed(self, kind, grid):
        """The code of another kind or grid, on the same device."""
        with torch.inference_mode(False):  # it may be made in a look at a clip, and used in training
            return PositionCode(kind, grid, *self.sizes).to(next(self.buffers()))

    def at(self, grid):
        """The code of a grid: this one where it holds that, else another, kept until a third is asked for."""
        if grid[1:] == self.grid[1:] and grid[0] <= self.grid[0]:
            return self
        if self.other is None or self.other.grid != grid:
            self.other = self.changed(self.kind, grid)
        return self.other

    def add(self, x, idx):
        """x [B, N, dim] at positions idx [B, N] -> x with the additive code; unchanged for rope."""
        return x if self.is_rope else x + self.code[idx]

    def rope(self, idx):
        """(cos, sin) [B, 1, N, hd] of positions idx [B, N], or None for sincos."""
        return (self.cos[idx][:, None], self.sin[idx][:, None]) if self.is_rope else None


class ActionTokens(nn.Module):
    """Actions of tubelets [B, t, A], in units of their deviation -> tokens [B, t, dim] with a code of their time; those
    of a clip that is `passive` [B] start from one learned vector."""

    def __init__(self, num_signals, num_tubelets, dim):
        super().__init__()
        self.embed, self.absent = nn.Linear(num_signals, dim), nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.embed.weight, std=num_signals**-0.5)
        nn.init.zeros_(self.embed.bias)
        nn.init.trunc_normal_(self.absent, std=0.02)
        self.register_buffer("code", sincos_table(grid_positions((num_tubelets, 1, 1)), dim), persistent=False)

    def forward(self, actions, passive):
        return torch.where(passive[:, None, None], self.absent, self.embed(actions)) + self.code


# ---------------------------------------------------------------------------------------------------------------------
# 15  Tokenizer and encoder: clip -> tokens -> context
# ---------------------------------------------------------------------------------------------------------------------


class Tokenizer(nn.Module):
    """Conv3D tubelet embedding: clip [B, T, C, H, W] -> tokens [B, L, D] in (t, h, w) order.

    Kernel and stride are equal, so the convolution is one matrix product over cut-out tubelets, measured 1.4 times
    faster; the weight keeps Conv3d's layout [D, C, tubelet_t, patch, patch].
    """

    def __init__(self, cfg):
        super().__init__()
        kernel = (cfg.tubelet_t, cfg.patch, cfg.patch)
        self.proj = nn.Conv3d(cfg.channels, cfg.enc_dim, kernel_size=kernel, stride=kernel)
        init_weights(self)

    def cut(self, clip):
        """clip [B, T, C, H, W] -> its tubelets' pixels [B, L, C * dt * p * p]."""
        B, T, C, H, W = clip.shape
        dt, p = self.proj.weight.shape[2:4]
        pieces = clip.reshape(B, T // dt, dt, C, H // p, p, W // p, p).permute(0, 1, 4, 6, 3, 2, 5, 7)
        return pieces.reshape(B, -1, C * dt * p * p)

    def embed(self, pieces):
        """Pixels of tubelets [B, N, C * dt * p * p] -> tokens [B, N, D]."""
        return F.linear(pieces, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, clip):
        return self.embed(self.cut(clip))


class Encoder(nn.Module):
    """Vision transformer over chosen tokens of a clip."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = Tokenizer(cfg)
        self.position = PositionCode(cfg.pos_embed, cfg.grid, cfg.enc_dim, cfg.num_heads)
        self.trunk = Trunk(cfg, cfg.enc_dim, cfg.enc_depth)

    def encode(self, pieces, keep_idx, starts=()):
        """What the tokenizer cut, [B, L, C * dt * p * p], and keep_idx [B, K] -> context [B, K, D]; other pieces are
        never seen. `starts` as in `follow`."""
        return self.follow(self.tokenizer.embed(gather_tokens(pieces, keep_idx)), keep_idx, self.position, starts)

    def follow(self, tokens, idx, position, starts=()):
        """Tokens [B, K, D] at positions idx [B, K] of a code -> [B, K, D]. `starts`: places in K where windows begin,
        beside the first, whose tokens see no others."""
        x = position.add(tokens, idx)
        if not starts:
            return self.trunk(x, position.rope(idx))
        parts = zip(x.tensor_split(starts, 1), idx.tensor_split(starts, 1))
        return torch.cat([self.trunk(part, position.rope(places)) for part, places in parts], 1)

    def forward(self, clip, starts=()):
        """Whole clip [B, T, C, H, W] of any length and size in whole tubelets and patches, or what the tokenizer cut of
        one on the config's grid -> [B, L, D]; `starts` are the tubelets at which windows begin, see `follow`."""
        pieces, grid = clip, self.cfg.grid
        if clip.dim() == 5:
            sizes, units = (clip.shape[1], *clip.shape[3:]), self.tokenizer.proj.weight.shape[2:]
            if any(size % unit for size, unit in zip(sizes, units)):
                raise UsageError(f"a clip of {' x '.join(map(str, sizes))} is cut in pieces of {list(units)}")
            pieces, grid = self.tokenizer.cut(clip), tuple(size // unit for size, unit in zip(sizes, units))
        tokens = self.tokenizer.embed(pieces)  # [B, L, D]
        everything = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        starts = tuple(start * grid[1] * grid[2] for start in starts if start < grid[0])
        return self.follow(tokens, everything, self.position.at(grid), starts)


# ---------------------------------------------------------------------------------------------------------------------
# 16  Predictor: context + masked positions -> predicted targets
# ---------------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """Narrow transformer that fills masked positions from a context; one mask token per family (short, long, SOON).

    A SOON position starts from what the context holds at its site in the last NOW tubelet, so that the trunk learns
    what changes and need not first learn to copy; not so where `soon_start` is mask, as in published predictors.
    Actions of SOON are tokens, each in the middle of its tubelet, and added to the positions of that: by attention
    alone a short run learned nothing of them.

    `pred_attention`: full, all tokens read all; context, all read the context, so that a prediction does not hang on
    what else is predicted; cross, the same, but the context stays as it came in. The weights are the same in all.
    """

    def __init__(self, cfg):
        super().__init__()
        self.sites, self.from_last, num_heads = cfg.sites, cfg.soon_start == "last", cfg.pred_heads or cfg.num_heads
        self.attention = cfg.pred_attention
        self.embed = nn.Linear(cfg.enc_dim, cfg.pred_dim)
        self.position = PositionCode(cfg.pos_embed, cfg.grid, cfg.pred_dim, num_heads)
        self.mask_tokens = nn.Parameter(torch.zeros(SOON + 1, cfg.pred_dim))
        self.trunk = Trunk(cfg, cfg.pred_dim, cfg.pred_depth, num_heads, cfg.pred_mlp_ratio)
        self.out = nn.Linear(cfg.pred_dim, cfg.enc_dim)
        init_weights(self.embed)
        init_weights(self.out)
        nn.init.trunc_normal_(self.mask_tokens, std=0.02)
        num_signals, (_, soon, _) = len(cfg.action_names), cfg.future_tubelets
        self.actions = ActionTokens(num_signals, soon, cfg.pred_dim) if num_signals else None

    def forward(self, context, keep_idx, mask_idx, family, actions=None, passive=None):
        """context [B, K, D] at keep_idx [B, K], positions mask_idx [B, M], family 0, 1 or SOON, for SOON its actions
        [B, t, A] as ActionTokens takes them -> preds [B, M, D]."""
        holes = self.mask_tokens[family].expand(*mask_idx.shape, -1)  # [B, M, P]
        seen = self.embed(context)  # [B, K, P]
        if family == SOON and self.from_last:
            holes = holes + seen[:, -self.sites :].repeat(1, mask_idx.shape[1] // self.sites, 1)
        parts, places = [seen], [keep_idx]
        if actions is not None:
            tokens = self.actions(actions, passive)  # [B, t, P]
            holes = holes + tokens.repeat_interleave(self.sites, 1)
            parts, places = [seen, tokens], [keep_idx, mask_idx[:, self.sites // 2 :: self.sites]]
        if self.attention == "cross":
            x, rope = self.placed([holes.to(seen.dtype)], [mask_idx])  # [B, M, P]
            return self.out(self.trunk(x, rope, *self.placed(parts, places)))
        at = 1 if self.attention == "full" else len(parts)  # actions come last, or are read with the context
        x, rope = self.placed([*parts[:at], holes, *parts[at:]], [*places[:at], mask_idx, *places[at:]])
        before = sum(idx.shape[1] for idx in places[:at])
        x = self.trunk(x, rope, num_read=0 if self.attention == "full" else before)  # [B, K + M, P], t more
        return self.out(x[:, before : before + mask_idx.shape[1]])

    def placed(self, parts, places):
        """Tokens [B, n, P] and their positions [B, n], both in parts -> all tokens with their code, their rope."""
        idx = torch.cat(places, 1)
        x = torch.cat([part.to(parts[0].dtype) for part in parts], 1)
        return self.position.add(x, idx), self.position.rope(idx)


# ---------------------------------------------------------------------------------------------------------------------
# 17  Outcome head: context -> outcome embedding
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
        x = self.queries.expand(len(context), -1, -1)  # [B, Q, D]
        x = x + self.cross(x, *self.cross.project(self.norm_context(context)))
        x = x + self.mlp(self.norm(x))  # [B, Q, D]
        return self.out(x.mean(1))  # [B, D]


# ---------------------------------------------------------------------------------------------------------------------
# 18  Flow: context + noise -> future latents
# ---------------------------------------------------------------------------------------------------------------------
# A future is [F, D]: all SOON tokens, then `flow_chunks` means over equal stretches of EVENTUALLY. The point forecast
# says what NOW tells; FutureSpace holds the rest, the residual, in its leading directions; FlowNet samples there.


def flow_path(noise, y, tau):
    """Straight path from noise (tau 0) to data (tau 1): noise, y [..., N, k], tau [...] -> x_tau like y."""
    tau = tau[..., None, None]
    return (1 - tau) * noise + tau * y


def flow_velocity(y_hat, x_tau, tau):
    """Velocity at x_tau of the straight path to y_hat; its blow-up at tau = 1 is cut at 0.05 (JiT, section 3)."""
    return (y_hat - x_tau) / (1 - tau).clamp_min(0.05)[..., None, None]


def velocity_loss(flow, projected, y, noise, tau):
    """Mean squared velocity error of a flow net: y, noise [B, R, N, k], tau [B, R], projected NOW context -> scalar."""
    x_tau = flow_path(noise, y, tau)
    y_hat = flow(x_tau, tau, projected)
    return (flow_velocity(y_hat, x_tau, tau) - flow_velocity(y, x_tau, tau)).square().mean()


def flow_positions(cfg, dim):
    """Position code of the noised tokens, pooled SOON grid then chunks -> [N, dim]; zeros for the one joint token."""
    if cfg.flow_joint:
        return torch.zeros(1, dim)
    soon_t = cfg.soon_frames // cfg.tubelet_t
    soon = grid_positions((soon_t, cfg.flow_pool, cfg.flow_pool))
    chunks = [[soon_t + 4 * number, 0, 0] for number in range(1, cfg.flow_chunks + 1)]  # times of their own
    return sincos_table(torch.cat([soon, torch.tensor(chunks)]), dim)


def modulated(norm, x, shift, scale):
    """x [B, R, N, W], normed, then scaled and shifted by the condition [B, R, 1, W] (AdaLN)."""
    return norm(x) * (1 + scale) + shift


class FlowBlock(nn.Module):
    """MLP, where several tokens are noised after self-attention and cross-attention to NOW; each gated by the condition
    (AdaLN-zero)."""

    def __init__(self, dim, context_dim, num_heads, joint):
        super().__init__()
        self.attn = None if joint else Attention(dim, num_heads, 0.0)
        self.cross = None if joint else CrossAttention(dim, context_dim, num_heads)
        self.mlp = MLP(dim, 4 * dim)
        norms = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(1 if joint else 3))
        self.norms = nn.ModuleList(norms)
        self.modulate = nn.Linear(dim, 3 * len(self.norms) * dim)

    def forward(self, x, condition=None, keys=None, values=None):
        """x [B, R, N, W], condition [B, R, W], keys and values of the NOW context or None -> [B, R, N, W]. A context
        alone -> its keys and values: a block that is sharded has its weights only where it is called itself."""
        if condition is None:
            return self.cross.project(x)
        parts = self.modulate(F.silu(condition))[:, :, None].chunk(3 * len(self.norms), -1)  # each [B, R, 1, W]
        if self.attn is not None:
            h = modulated(self.norms[1], x, *parts[3:5])
            x = x + parts[5] * self.attn(h.flatten(0, 1)).view_as(x)
            h = modulated(self.norms[2], x, *parts[6:8])
            x = x + parts[8] * self.cross(h.flatten(1, 2), keys, values).view_as(x)
        return x + parts[2] * self.mlp(modulated(self.norms[0], x, *parts[:2]))


class FlowNet(nn.Module):
    """Predicts the clean residual y from its noised version, the time tau and the NOW context.

    Where the whole future is one noised token, the flattened context conditions it through an MLP: a single query that
    cross-attends read the geometry of a fork far worse. Its tokens are squeezed to a few channels first, by one linear
    map: with all of them the MLP learns clips by heart. Several noised tokens cross-attend to the context. Future
    actions join the context: in the hidden layer of that MLP, or as tokens.
    """

    def __init__(self, cfg):
        super().__init__()
        W, joint, read = cfg.flow_dim, cfg.flow_joint, cfg.flow_read
        self.embed, self.out = nn.Linear(cfg.flow_rank, W), nn.Linear(W, cfg.flow_rank)
        self.tau_mlp = nn.Sequential(nn.Linear(64, W), nn.SiLU(), nn.Linear(W, W))
        self.norm_context = nn.LayerNorm(cfg.enc_dim, eps=1e-6)
        self.squeeze = nn.Linear(cfg.enc_dim, read) if read < cfg.enc_dim else nn.Identity()
        self.whole = nn.Sequential(nn.Linear(cfg.now_tokens * read, W), nn.SiLU(), nn.Linear(W, W)) if joint else None
        self.blocks = nn.ModuleList(FlowBlock(W, cfg.enc_dim, cfg.flow_heads, joint) for _ in range(cfg.flow_depth))
        self.norm, self.modulate = nn.LayerNorm(W, eps=1e-6, elementwise_affine=False), nn.Linear(W, 2 * W)
        A, (_, _, times), self.actions = len(cfg.action_names), cfg.future_tubelets, None
        if A:  # joint: all at once, and whether there are none
            self.actions = nn.Linear(times * A + 1, W) if joint else ActionTokens(A, times, cfg.enc_dim)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            # at 0.02 what comes from NOW is a product of small numbers: a short run samples as if it were not there
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        for zeroed in (*(block.modulate for block in self.blocks), self.modulate, self.out):
            nn.init.zeros_(zeroed.weight)  # every block starts as the identity and the first guess as the mean, zero
        self.register_buffer("code", flow_positions(cfg, W), persistent=False)
        frequencies = torch.exp(torch.linspace(math.log(0.1), math.log(10.0), 32))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def project(self, context, actions=None, passive=None, keep=None):
        """What samples and steps reuse of a NOW context [B, K, D] and future actions [B, F, A], as ActionTokens takes
        them: a summary [B, W], or keys and values per block. `keep` [B, K, cfg.flow_read]: factors of what is read of
        the context, 0 where hidden."""
        context = self.squeeze(self.norm_context(context))
        if keep is not None:
            context = context * keep
        if self.whole is None:
            if actions is not None:
                context = torch.cat([context, self.actions(actions, passive).to(context.dtype)], 1)
            return None, [block(context) for block in self.blocks]
        hidden = self.whole[0](context.flatten(1))
        if actions is not None:
            hidden = hidden + self.actions(torch.cat([actions.flatten(1), passive[:, None].to(actions.dtype)], 1))
        return self.whole[2](self.whole[1](hidden)), [(None, None)] * len(self.blocks)

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
        return self.out(modulated(self.norm, x, *self.modulate(F.silu(condition))[:, :, None].chunk(2, -1))).float()


def leading_directions(rows, count, rank, share, least=0.0):
    """Leading eigenvalues of rows.T @ rows / count, rows [n, span] -> (values [<= rank], which are solid: above `share`
    of the largest, orthonormal directions [span, <= rank], 0 where not solid). By the Gram matrix, as n is small."""
    values, vectors = torch.linalg.eigh((rows @ rows.T).double() / count)
    values, vectors = values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
    solid = values > share * values[0].clamp_min(least)
    inverse = torch.where(solid, values.clamp_min(1e-30).rsqrt(), 0)
    return values, solid, rows.T @ (vectors * inverse).float() / math.sqrt(count)


class FutureSpace(nn.Module):
    """Running linear map between a residual future [B, F, D] and its coordinates y [B, N, k].

    Small grids: N = 1, the k directions span all tokens jointly. Large grids: SOON is pooled to flow_pool x flow_pool
    sites per tubelet, the k directions span the channels of single pooled tokens. They are the leading ones of a
    forgetting covariance, followed by incremental PCA and turned as little as possible from update to update: the flow
    net's coordinates must not jump. One scale for all makes the mean variance of y 1: what NOW leaves open most stands
    out most. Whitened, all directions, noise included, would have the same say.
    """

    YOUNG = 100  # updates up to which a step moves them most: by eigenvalues, then by iteration, without a wait

    def __init__(self, cfg):
        super().__init__()
        self.joint, self.num_chunks, self.pool_side = cfg.flow_joint, cfg.flow_chunks, cfg.flow_pool
        self.rank, D, k = cfg.flow_rank, cfg.enc_dim, cfg.flow_rank
        self.soon_grid = (cfg.soon_frames // cfg.tubelet_t, *cfg.grid[1:])
        span = (cfg.soon_tokens + cfg.flow_chunks) * D if self.joint else D
        shapes = dict(variance=D, rest_variance=D, mean=(cfg.flow_tokens, span), basis=(span, k), covariance=(k, k))
        for name, shape in (shapes | dict(scale=(), explained=(), updates=())).items():
            self.register_buffer(name, torch.zeros(shape))
        self.variance.fill_(1.0)
        self.scale.fill_(1.0)
        # what the CPU knows without waiting for the device: `updates` as of a version of it, whether k directions stand
        self.count, self.version, self.is_full = 0.0, None, False

    def pool(self, residual):
        """Residual [B, F, D], in units of its channels' deviation, as rows of the space -> [B, N, span]."""
        scaled = residual / self.variance.sqrt()
        if self.joint:
            return scaled.flatten(1)[:, None]
        soon, chunks = scaled.tensor_split((-self.num_chunks,), 1)
        soon = soon.unflatten(1, self.soon_grid).flatten(0, 1).permute(0, 3, 1, 2)  # [B * t, D, h, w]
        soon = F.adaptive_avg_pool2d(soon, self.pool_side).permute(0, 2, 3, 1)
        return torch.cat([soon.reshape(len(scaled), -1, chunks.shape[2]), chunks], 1)

    def unpool(self, rows):
        """Rows [B, N, span] -> residual [B, F, D]; pooled sites are repeated over the tokens they stand for."""
        if self.joint:
            return rows.reshape(len(rows), -1, len(self.variance)) * self.variance.sqrt()
        soon, chunks = rows.tensor_split((-self.num_chunks,), 1)
        soon = soon.reshape(-1, self.pool_side, self.pool_side, chunks.shape[2]).permute(0, 3, 1, 2)  # [B * t, D, ...]
        soon = F.interpolate(soon, size=self.soon_grid[1:], mode="nearest").permute(0, 2, 3, 1)
        return torch.cat([soon.reshape(len(rows), -1, chunks.shape[2]), chunks], 1) * self.variance.sqrt()

    def encode(self, rows):
        """Rows [B, N, span] -> coordinates y [B, N, k]."""
        return (rows - self.mean) @ self.basis / self.scale

    def decode(self, y):
        """Coordinates y [B, N, k] -> residual [B, F, D]; what lies outside the directions comes back as its mean."""
        return self.unpool(y * self.scale @ self.basis.T + self.mean)

    def root(self):
        """Transposed root of the covariance [k, k]: its rows are in basis coordinates."""
        values, vectors = torch.linalg.eigh(self.covariance.double())
        return (vectors * values.clamp_min(0).sqrt()).float().T

    def gaussian(self, noise):
        """Normal noise [B, N, k] -> coordinates with the residual's own covariance: the control `mean + noise`."""
        return noise @ self.root() / self.scale

    def measure(self, centred, rate):
        """Follow how much of centred rows [n, span] lies in the directions, and the variance [D] of the rest."""
        rest = centred - centred @ self.basis @ self.basis.T
        self.explained.lerp_(1 - rest.square().sum() / centred.square().sum().clamp_min(1e-12), rate)
        self.rest_variance.lerp_(rest.square().reshape(-1, len(self.variance)).mean(0), rate)

    @torch.no_grad()
    def absorb(self, rows, square):
        """Take in one step's rows [n, N, span] of all ranks, or None, and the mean squared residual [D]."""
        if self.version != self.updates._version:  # a checkpoint was loaded
            self.count, self.is_full = float(self.updates), False
        self.updates += 1
        self.count, self.version = self.count + 1, self.updates._version
        self.variance.lerp_(square.clamp_min(1e-6), max(1.0 / self.count, 0.01))
        if rows is None or self.count < 2:
            return  # the first step only sets the scale; its rows were made without one
        rate = max(1.0 / (self.count - 1), 0.01)
        self.mean.lerp_(rows.mean(0), rate)
        centred = (rows - self.mean).flatten(0, 1)
        centred = centred[:: max(1, len(centred) // 256)]  # enough rows for the directions at a bounded cost
        self.measure(centred, rate)  # of futures that are not yet absorbed
        self.is_full = self.is_full or float(self.basis.square().sum()) > self.rank - 0.5
        (self.iterate if self.is_full and self.count > self.YOUNG else self.follow)(centred, rate)

    def iterate(self, centred, rate):
        """What `follow` does, by two rounds of subspace iteration from present directions, all k of which stand:
        nothing but products and triangular solves, for which the CPU does not wait, as it does for eigenvalues."""
        k = self.rank
        corner, side, old = self.basis.T @ self.basis, centred @ self.basis, (1 - rate) * self.covariance.double()
        gram = torch.cat([torch.cat([corner, side.T], 1), torch.cat([side, centred @ centred.T], 1)]).double()
        # directions are sums of old ones and rows, weights w [k + n, k]; the forgetting covariance takes w to pull @ w
        pull = torch.cat([old @ gram[:k], rate / len(centred) * gram[k:]])
        start = w = torch.eye(len(gram), k, dtype=gram.dtype, device=gram.device)
        least = (1e-6 * pull.trace()).clamp_min(1e-30)  # of all variance: directions with less stay as they are
        for _ in range(2):
            w = pull @ w + least * w
            lower = torch.linalg.cholesky_ex(w.T @ gram @ w)[0]
            w = torch.linalg.solve_triangular(lower, w.T, upper=False).T
        turn = w.T @ gram @ start  # nearly orthogonal: Newton-Schulz rounds give what an SVD would
        for _ in range(15):
            turn = torch.addmm(turn, turn @ turn.T, turn, beta=1.5, alpha=-0.5)
        w = w @ turn
        covariance = w.T @ gram @ (pull @ w)
        self.basis.copy_(torch.addmm(centred.T @ w[k:].float(), self.basis, w[:k].float()))
        self.covariance.copy_((covariance + covariance.T) / 2)
        self.scale.copy_(self.covariance.trace().div(k).clamp_min(1e-12).sqrt())

    def follow(self, centred, rate):
        """Incremental PCA with forgetting: refresh basis and covariance from centred rows [n, span]."""
        old = self.root() @ self.basis.T * math.sqrt(1 - rate)  # [k, span]
        stacked = torch.cat([old, centred * math.sqrt(rate / len(centred))])
        # below the share of 1e-6 lies the rounding of an fp32 product
        values, solid, fresh = leading_directions(stacked, 1, self.rank, 1e-6, 1e-12)
        # While fewer rows than directions were seen, coordinates that get their first direction now are anchored to the
        # first rows: turning says nothing about them, and rounding would place them, otherwise on every rank.
        num_old, anchor = int(self.basis.square().sum().round()), self.basis.clone()
        new = centred[: max(int(solid.sum()) - num_old, 0)]
        new = new - new @ self.basis @ self.basis.T
        anchor[:, num_old : num_old + len(new)] = F.normalize(new, dim=1).T
        self.turn_to(fresh, values * solid, anchor)

    def fit(self, rows):
        """Set all statistics but the channel scale to those of rows [n, N, span], which one frozen encoder made."""
        self.mean.copy_(rows.mean(0))
        centred = (rows - self.mean).flatten(0, 1)
        few = centred[:: math.ceil(len(centred) / 4096)]
        values, _, fresh = leading_directions(few, len(few), self.rank, 1e-7)
        pad = (0, self.rank - len(values))  # fewer rows than directions
        self.turn_to(F.pad(fresh, pad), F.pad(values, pad), self.basis)
        self.measure(centred, 1.0)

    def turn_to(self, fresh, values, anchor):
        """Take in orthonormal directions [span, k] with variances [k], turned as near as can be to the anchor's."""
        left, _, right = torch.linalg.svd((fresh.T @ anchor).double())
        turn = (left @ right).float()  # the orthogonal matrix that brings the fresh basis closest to the anchor
        self.basis.copy_(fresh @ turn)
        self.covariance.copy_(turn.T @ torch.diag(values.float()) @ turn)
        self.scale.copy_(values.sum().div(self.rank).clamp_min(1e-12).sqrt())


@torch.no_grad()
def sample_flow(flow, projected, noise, num_steps, shift):
    """Euler from noise [B, S, N, k] to y [B, S, N, k] on the shifted time grid; the last step returns y_hat."""
    x = noise
    for step in range(num_steps):
        tau, tau_next = (u / (u + shift * (1 - u)) for u in (step / num_steps, (step + 1) / num_steps))
        y_hat = flow(x, torch.full(x.shape[:2], tau, device=x.device), projected)
        x = y_hat if step == num_steps - 1 else x + (tau_next - tau) / (1 - tau) * (y_hat - x)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# 19  Losses and collapse gauges
# ---------------------------------------------------------------------------------------------------------------------


def layer_norm(x):
    """LayerNorm over channels without affine, in fp32: [..., D] -> [..., D]."""
    return F.layer_norm(x.float(), x.shape[-1:])


def l1_loss(preds, targets):
    """Mean absolute error in fp32 over all tokens and channels."""
    return (preds.float() - targets).abs().mean()


def saved_share(loss, reference):
    """Share of a reference's error that is saved; NaN where it makes none, as nothing moves."""
    return torch.where(reference > 0, 1 - loss / reference, torch.nan)


def full_precision(x):
    """Context in which autocast is off on x's device: losses and statistics are computed in fp32."""
    return torch.autocast(x.device.type, enabled=False)


def cosines(rows, others):
    """Cosine similarities in fp32: [B, D] and [A, D] -> [B, A]."""
    with full_precision(rows):
        return F.normalize(rows.float(), dim=-1) @ F.normalize(others.float(), dim=-1).T


def info_nce(outcome, keys, labels, absent, temperature):
    """Cross-entropy of cosine similarities (van den Oord et al. 2018, eq. 4).

    outcome [B, D]; keys [A, D] of which `absent` [A] rows take no part; labels [B], the row of each clip's own key
    -> (loss, share of clips whose own key ranks first).
    """
    logits = (cosines(outcome, keys) / temperature).masked_fill(absent[None], float("-inf"))  # [B, A], fp32
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


def sup_con(outcome, others, maneuver, other_maneuver, file, other_file, temperature):
    """Supervised contrast (Khosla et al. 2020, eq. 2): positives share a maneuver and come from other files.

    outcome [B, D] against others [A, D], the clips of all ranks, these included; maneuver and file numbers of both.
    Maneuver -1 is unknown and takes no part. Clips without a positive contribute nothing -> scalar, 0 if none has one.
    """
    logits, known = cosines(outcome, others) / temperature, other_maneuver >= 0  # [B, A], [A]
    other = (file[:, None] != other_file) & known
    positive = (other & (maneuver[:, None] == other_maneuver)).float()
    log_share = logits - torch.logsumexp(logits.masked_fill(~other, -1e4), 1, keepdim=True)
    per_clip = -(positive * log_share).sum(1) / positive.sum(1).clamp_min(1)
    pairs = (other_file[:, None] != other_file) & (other_maneuver[:, None] == other_maneuver) & known
    anchors = pairs.any(1).sum().clamp_min(1)  # of all ranks: the mean of the ranks' shares is that over all anchors
    return per_clip.sum() * (len(other_maneuver) // len(maneuver)) / anchors


def gauge_tokens(targets):
    """Evenly spaced tokens of every clip, enough for the gauges: [B, L, D] -> [B, <= 255, D]."""
    return targets[:, :: max(1, targets.shape[1] // 128)]


def target_std(targets):
    """Standard deviation of each channel over all tokens of all clips, averaged over channels. targets [B, L, D]."""
    return targets.flatten(0, 1).std(0).mean()


def target_std_clips(targets):
    """Mean standard deviation over clips at one position, which position alone cannot fake. NaN for one clip."""
    return targets.std(0).mean() if len(targets) > 1 else torch.tensor(float("nan"))


def effective_rank(targets):
    """exp(entropy of the normalised singular values) of centred tokens [B, L, D] (RankMe, Garrido et al. 2023)."""
    tokens = targets.flatten(0, 1)
    tokens = tokens[:: max(1, len(tokens) // 2048)].float().cpu()  # enough of them
    if not torch.isfinite(tokens).all():
        return torch.tensor(float("nan"))  # a skipped step is logged as well; the SVD would raise
    singular = torch.linalg.svdvals(tokens - tokens.mean(0))
    share = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())


# what is public imports the compiler at once, for longer than a second
@getattr(torch, "_disable_dynamo", torch.compiler.disable)
def gather_rows(rows, world_size):
    """Rows [B, ...] of every rank without gradient -> [B*W, ...] in sample order (clip i of rank r is row i*W + r)."""
    parts = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# 20  Flow phase: frozen latents -> SOON predictor and flow net
# ---------------------------------------------------------------------------------------------------------------------
# After the last step of training the encoders stand still, so latents are made once and seen often. First a copy of the
# predictor learns SOON alone, then the flow net what that forecast leaves open. A clip costs little of a step here.


@torch.no_grad()
def cache_latents(model, run):
    """Frozen latents of this rank's clips, those after the last step's -> (contexts [n, K, D], futures [n, F, D]), and
    with actions these, [n, tubelets, A], on the CPU. StoppedTogether on a signal."""
    cfg, process, size, began = model.cfg, run.process, 4 * model.cfg.batch_size, time.perf_counter()
    num_batches = math.ceil(cfg.flow_fit_clips / (size * process.world_size))
    loader = run.loader("train", run.progress.consumed, num_batches, size)
    kept, cached, what = torch.bfloat16 if cfg.amp else torch.float32, (), "latents for the flow phase"
    with spare_threads(cfg.num_workers):
        for number, batch in enumerate(process.in_step(loader)):
            with autocast(process):
                batch = to_device(batch, process.device)
                parts = [model.context_of(batch), model.future_target(model.targets_of(batch))]
            parts = [part.to(kept) for part in parts] + ([batch["actions"]] if cfg.action_names else [])
            # taken whole: joining pieces in the end would need the memory twice
            cached = cached or [torch.empty((num_batches * size, *part.shape[1:]), dtype=part.dtype) for part in parts]
            for whole, part in zip(cached, parts):
                whole[number * size : (number + 1) * size] = part
            run.log.bar(number + 1, num_batches, what, f"{what}: batch")
    num_clips, took = len(cached[0]) * process.world_size, describe_time(time.perf_counter() - began)
    run.log.line(f"flow phase: latents of {num_clips} clips in {took}")
    return tuple(cached)


@torch.no_grad()
def residual_rows(model, process, context, future, actions=None):
    """What the forecast, passive without actions, leaves open of cached futures [n, F, D] -> rows of the space
    [n, N, span] on the device."""
    context = context.to(process.device).float()
    with autocast(process):
        soon_preds = model.predict_soon(context, model.given(len(context), actions))
        residual = future.to(process.device).float() - model.forecast(context, soon_preds)
    with full_precision(residual):
        return model.space.pool(residual)


def flow_coordinates(model, latents, run, is_fitted):
    """Coordinates y [n, N, k] of all residuals of cache_latents on the CPU, with actions [2, n, N, k]: told them, then
    passive; the space is fitted to the first 2,048 clips of all ranks unless it was. StoppedTogether on a signal."""
    size, ways, ys = 4 * model.cfg.batch_size, (latents, latents[:2])[: len(latents) - 1], []
    process, what = run.process, "coordinates for the flow phase"
    parts = [slice(begin, begin + size) for begin in range(0, len(latents[0]), size)]
    if not is_fitted:
        few = itertools.product(ways, parts[: math.ceil(2048 / (size * process.world_size))])
        rows = [residual_rows(model, process, *(whole[part] for whole in way)) for way, part in few]
        model.space.fit(model.gather(torch.cat(rows)))
        model.agree_on_space()
    for number, (way, part) in enumerate(itertools.product(ways, parts), 1):
        process.stop_together()
        rows = residual_rows(model, process, *(whole[part] for whole in way))
        with full_precision(rows):
            ys.append(model.space.encode(rows).cpu())
        run.log.bar(number, len(ways) * len(parts), what, f"{what}: batch")
    return torch.cat(ys).unflatten(0, (2, -1)) if len(ways) > 1 else torch.cat(ys)


def told_in_fit(fit, step, rng, chosen, actions=None):
    """Actions of a fit's chosen clips, and which of these hide them -> entries of its batch."""
    if actions is None:
        return {}
    hidden = torch.rand(len(chosen), generator=rng) < fit.cfg.action_drop * (step is not None)
    return {"actions": actions[chosen], "actions_hidden": hidden}


class SoonFit(Fit):
    """A copy of the predictor learns the SOON tokens of cached clips with the loss of training."""

    REPLAYS = True
    KEYS = {"loss_soon": "SOON on cached latents"}

    def __init__(self, model, run, before):
        if model.soon_predictor is None:
            model.split_soon_predictor()
        latents = cache_latents(model, run)
        super().__init__(model, "soon", model.cfg.soon_fit_steps, model.cfg.soon_fit_batch, len(latents[0]))
        self.latents = latents

    def batch(self, step=None):
        (contexts, futures, *actions), rng = self.latents, self.rng(step)
        chosen = self.pick(step, rng)
        told = told_in_fit(self, step, rng, chosen, *actions)
        return {"context": contexts[chosen], "soon": futures[chosen, : self.cfg.soon_tokens], **told}

    def forward(self, batch):
        preds = self.model.predict_soon(batch["context"].float(), self.model.given_of(batch))
        loss = l1_loss(preds, batch["soon"])
        return {"loss_total": loss, "loss_soon": loss}, {}, {}


class FlowFit(Fit):
    """The flow net learns the residuals of cached clips, each step with fresh noise and times, and its EMA follows."""

    REPLAYS = True
    KEYS = {"loss_flow": "squared velocity error on cached latents; held out: that of the EMA"}

    def __init__(self, model, run, before):
        latents = before.latents if before else cache_latents(model, run)
        super().__init__(model, "flow", model.cfg.flow_fit_steps, model.cfg.flow_fit_batch, len(latents[0]))
        goes_on = run.progress.after > sum(steps for name, steps in model.phases() if name != "flow")
        self.contexts, _, *self.actions = latents
        self.y = flow_coordinates(model, latents, run, goes_on)
        if not goes_on:
            model.flow_ema.load_state_dict(model.flow.state_dict())
        share = f"{float(model.space.explained):.0%} of the residual in {model.cfg.flow_rank} directions"
        run.log.line(f"flow phase: {share}; {model.cfg.flow_fit_steps} steps")

    def batch(self, step=None):
        rng = self.rng(step)
        chosen = self.pick(step, rng)
        shape = (len(chosen), self.cfg.flow_draws)
        noise = torch.randn((*shape, *self.y.shape[-2:]), generator=rng)  # [b, R, N, k]
        tau = shifted_tau(torch.randn(shape, generator=rng), self.cfg.tau_shift)  # [b, R]
        told = told_in_fit(self, step, rng, chosen, *self.actions)
        y = self.y[told["actions_hidden"].long(), chosen] if told else self.y[chosen]
        context, drop = self.contexts[chosen], self.cfg.flow_fit_drop
        if drop and step is not None:
            told["keep"] = (torch.rand((*context.shape[:2], self.cfg.flow_read), generator=rng) >= drop) / (1 - drop)
        return {"context": context, "y": y, "noise": noise, "tau": tau, **told}

    def forward(self, batch):
        flow = self.model.flow if torch.is_grad_enabled() else self.model.flow_ema
        y = batch["y"][:, None].expand_as(batch["noise"])
        projected = flow.project(batch["context"].float(), *self.model.given_of(batch), keep=batch.get("keep"))
        loss = velocity_loss(flow, projected, y, batch["noise"], batch["tau"])
        return {"loss_total": loss, "loss_flow": loss}, {}, {}

    def after_step(self, carries, step):
        move_ema(self.model.flow_ema, self.model.flow, flow_momentum_at(step, self.cfg))


# ---------------------------------------------------------------------------------------------------------------------
# 21  Picture: sampled futures -> futures.png and a verdict
# ---------------------------------------------------------------------------------------------------------------------


def verdict(metrics, cfg):
    """One sentence about a run's health from its last evaluation."""
    skill, rank, std = metrics["val_soon_skill"], metrics["val_effective_rank"], metrics["val_target_std_clips"]
    what = "across clips"
    if not math.isfinite(std):
        std, what = metrics["val_target_std"], "(one held-out clip)"
    collapsed = std < 0.2 or rank < 0.05 * cfg.enc_dim
    health = "COLLAPSED: lower lr, raise ema_momentum or warm up longer" if collapsed else "no sign of collapse"
    if collapsed and (cfg.freeze_encoder or cfg.teacher == "frozen"):
        health = "LOW: the frozen encoder hardly tells these clips apart"
    moves = f"{'' if skill > 0 else 'no '}better than a world that stands still"
    moves = "nothing moves in the held-out clips" if math.isnan(skill) else moves
    return (
        f"soon_skill {skill:.2f} ({moves}), sampled futures spread {metrics['val_flow_spread']:.2f} of real ones, "
        f"effective rank {rank:.1f} of {cfg.enc_dim}, target std {what} {std:.2f}: {health}"
    )


@torch.no_grad()
def encode_bank(model, source, process, num_clips, deadline):
    """Real futures to look samples up in, as many as the deadline allows -> (futures [n, F * D] on the CPU, sample
    numbers in the `bank` stream, file numbers, clips read)."""
    cfg, size = model.cfg, min(model.cfg.batch_size, num_clips)
    sampler = StepSampler(0, math.ceil(num_clips / size), size, 0, 1)
    futures, numbers, files = [], [], []
    options = dict(stopping=process.stop.asked, nice=process.worker_nice(cfg))
    loader = open_loader(source, cfg, "bank", sampler, min(cfg.num_workers, 2), **options)
    for batch in loader:
        if process.stop.asked():  # rank 0 alone is here, the others learn of it afterwards
            raise Stopped
        with autocast(process):
            targets = model.targets_of(to_device(batch, process.device))
        usable = batch["file"] >= 0
        futures.append(model.future_target(targets)[usable].flatten(1).cpu())
        numbers += batch["index"][usable].tolist()
        files += batch["file"][usable].tolist()
        if time.monotonic() > deadline:
            break
    loader.close()
    return torch.cat(futures), numbers, files, size * loader.delivered


def draw_text(draw, text, place, width, font, step, fill="black"):
    """Text from a place (x, y) on, wrapped to a width, lines a step apart, all in pixels -> y below its last line."""
    (x, y), line = place, ""
    for word in [*text.split(), ""]:
        if line and (not word or draw.textlength(f"{line} {word}", font=font) > width):
            draw.text((x, y), line, fill=fill, font=font)
            line, y = "", y + step
        line = f"{line} {word}".strip()
    return y


def picture_page(blocks, cfg, side, caption):
    """The page of futures.png -> image. blocks: the rows of each clip, [(title, uint8 frames [T, *side, 3])], the first
    of them with its NOW frames."""
    from PIL import Image, ImageDraw, ImageFont

    now = sorted({0, cfg.now_frames - 1})
    soon = np.unique(np.linspace(0, cfg.soon_frames - 1, 5).round().astype(int)) + cfg.now_frames
    block_h = len(blocks[0]) * (side[0] + 4) + 30
    image = Image.new("RGB", (150 + (len(now) + len(soon)) * (side[1] + 4), len(blocks) * block_h + 86), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw_text(draw, caption, (12, len(blocks) * block_h + 12), image.width - 24, font, 18)
    for block, rows in enumerate(blocks):
        for row, (title, pictures) in enumerate(rows):
            y = block * block_h + 24 + row * (side[0] + 4)
            draw.text((12, y + side[0] // 2 - 8), title, fill="black", font=font)
            for column, frame in enumerate([*now, *soon]):
                is_soon = column >= len(now)
                x = 130 + column * (side[1] + 4) + 12 * is_soon
                if is_soon or not row:
                    image.paste(Image.fromarray(np.ascontiguousarray(pictures[frame])), (x, y))
                if not row:  # frames, not seconds: short files are sampled denser
                    title = f"SOON {frame + 1 - cfg.now_frames}" if is_soon else f"NOW {frame + 1}"
                    draw.text((x, y - 18), title, fill="black", font=font)
    return image


def picture_rows(model, data, bank, process, number, side, num_samples):
    """The rows of one val clip: the clip itself, then for each sampled future the nearest real clip in latent space
    -> [(title, uint8 frames [T, *side, 3])]. The clip's own file never answers for a sample."""
    cfg, (futures, bank_numbers, bank_files, _) = model.cfg, bank
    frames, file, _, _, _ = data["val"].decode(number, *side)
    seen = data["val"].decode(number, cfg.height, cfg.width)[0]
    clip = torch.from_numpy(np.ascontiguousarray(seen.transpose(0, 3, 1, 2)))
    generator = torch.Generator(process.device).manual_seed(number)
    samples = model.sample_futures(clip[None].to(process.device), num_samples, generator=generator)[0].flatten(1).cpu()
    own = data["val"].videos[file].drive
    other = torch.tensor([data["bank"].videos[file].drive != own for file in bank_files])
    other = other if other.any() else torch.ones_like(other)  # a single file has only itself to show
    nearest = torch.cdist(samples, futures).masked_fill(~other, float("inf")).argmin(1).tolist()
    found = [data["bank"].decode(bank_numbers[entry], *side)[0] for entry in nearest]
    return [("truth", frames), *((f"sample {k}: nearest", clip) for k, clip in enumerate(found, 1))]


def save_picture(image, path):
    """Write a PNG that bears the MARK."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    write_own(path, partial(image.save, format="PNG", optimize=True, pnginfo=info))


def videos_behind(world, cfg, path):
    """The list that tools/cache_latents.py left of a cache's clips -> (their DataSource, what is gone)."""
    if not path.endswith(".jsonl") or not os.path.exists(path):
        return None, [path]
    videos = read_list(path)
    if gone := [video.name for video in videos if not os.path.exists(video.path)]:
        return None, gone
    if read_mapping(os.path.join(os.path.dirname(path), "cache.json"), MAX_LIST_BYTES).get("split") == "folders":
        videos.sides = {side: [part for part in videos if part.group.startswith(f"{side}/")] for side in SIDES}
    return open_data(world, replace(cfg, data_root=path), videos, True, None), []


@torch.no_grad()
def draw_futures(model, source, process, metrics, path, seconds, num_clips=3, num_samples=4):
    """futures.png: for some val clips the NOW frames, the true SOON frames, and for each sampled future the SOON frames
    of the nearest real clip, with the verdict under them -> what was left out for want of time, "" for nothing. One
    clip is drawn at least, the others while `seconds` last, of which the search may take two fifths."""
    cfg, began = model.cfg, time.monotonic()
    data = {stream: source.dataset(cfg, stream) for stream in ("val", "bank")}
    budget = (2e15 if process.device.type == "cuda" else 2e13) / (model.flops()["target"] or 1.0)
    wanted = int(min(max(budget, 16), 256))
    bank = encode_bank(model, source, process, wanted, began + 0.4 * seconds)
    grow = max(1, round(96 / min(cfg.height, cfg.width)))
    side, blocks = (cfg.height * grow, cfg.width * grow), []
    while len(blocks) < num_clips and (not blocks or time.monotonic() < began + seconds):
        blocks.append(picture_rows(model, data, bank, process, len(blocks), side, num_samples))
    save_picture(picture_page(blocks, cfg, side, verdict(metrics, cfg)), path)
    if len(blocks) == num_clips and bank[-1] >= wanted:
        return ""
    done = f"{len(blocks)} of {num_clips} clips and a search among {bank[-1]} of {wanted}"
    return f"its {seconds:.0f} s were over after {done}"


# ---------------------------------------------------------------------------------------------------------------------
# 22  Weights: published encoders and predictors <-> ours
# ---------------------------------------------------------------------------------------------------------------------

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 22, 1664: 26}  # by width: an official .pt does not say them
FRAMES_SEEN = 64  # of the longest clips in the published pretraining
ENCODER_SIZES = ("enc_depth", "enc_dim", "mlp_ratio", "num_heads", "tubelet_t", "patch")
PREDICTOR_SIZES = ("pred_depth", "pred_dim", "pred_mlp_ratio", "pred_heads")
OFFICIAL, OURS, THEIRS = range(3)  # how names of tensors begin in V-JEPA 2's own code, here, and in transformers
# fmt: off
ENCODER_NAMES = (
    ("patch_embed.", "tokenizer.", "encoder.embeddings.patch_embeddings."),
    ("blocks.", "trunk.blocks.", "encoder.layer."), ("norm.", "trunk.norm.", "encoder.layernorm."),
)
PREDICTOR_NAMES = (
    ("predictor_embed.", "embed.", "predictor.embeddings.predictor_embeddings."),
    ("predictor_blocks.", "trunk.blocks.", "predictor.layer."),
    ("predictor_norm.", "trunk.norm.", "predictor.layernorm."), ("predictor_proj.", "out.", "predictor.proj."),
    ("mask_tokens", "mask_tokens", "predictor.embeddings.mask_tokens"),
)
CONFIG_NAMES = {  # fields of a config -> transformers' names
    "num_heads": "num_attention_heads", "pred_heads": "pred_num_attention_heads", "num_frames": "frames_per_clip",
    "image_size": "crop_size", "patch": "patch_size", "tubelet_t": "tubelet_size", "enc_dim": "hidden_size",
    "enc_depth": "num_hidden_layers", "mlp_ratio": "mlp_ratio", "pred_dim": "pred_hidden_size",
    "pred_depth": "pred_num_hidden_layers", "pred_mlp_ratio": "pred_mlp_ratio",
}
NO_PLACE = {  # what may stand beside an encoder, and why it is left out
    "pos_embed": "rope needs none", "predictor_pos_embed": "rope needs none", "patch_embed_img": "for single pictures",
    "img_mod_embed": "for single pictures", "norms_block": "norms at other depths", "pooler": "a classifier's",
    "classifier": "a classifier's",
}
# fmt: on


def extra(name, why):
    """A package that only some need, imported. UsageError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{why}: needs the package {name} (pip install {name})") from error


def renamed(name, rows, old, new):
    """A tensor's name in another column of a table; as it is where no row fits."""
    return next((row[new] + name[len(row[old]) :] for row in rows if name.startswith(row[old])), name)


def own_tensor(value, name, path):
    """A tensor of a file -> a copy in fp32. UsageError where it is none, or not finite."""
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{path}: {one_line(name)} is a {type(value).__name__}, not a tensor")
    value = value.to(torch.float32, copy=True)
    if not value.isfinite().all():
        raise UsageError(f"{path}: {one_line(name)} holds NaN or infinite numbers")
    return value


def check_weights(folder):
    """A folder of transformers, weights in one safetensors file or in shards -> {name: fp32 tensor}, all finite.
    UsageError for files that are absent, cut, damaged, git lfs pointers, or outside the folder."""
    folder, tensors = Path(folder), {}
    table = read_mapping(folder / "model.safetensors.index.json", 2**25).get("weight_map") or {"": "model.safetensors"}
    for shard in sorted(set(map(str, table.values()))):
        path = folder / shard
        if Path(shard).name != shard:
            raise UsageError(f"{folder}: its index names {shown(shard)}, no file of that folder")
        if not path.is_file():
            raise UsageError(f"{folder}: no weights, it lacks {shard}")
        safetensors = extra("safetensors", path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = list(file.keys())
            for name in names:  # each by itself: pages of a file that stays open count as memory
                with safetensors.safe_open(path, "pt") as file:
                    tensors[name] = own_tensor(file.get_tensor(name), name, path)
        except safetensors.SafetensorError as error:
            why = "cut, damaged, or a git lfs pointer (git lfs pull)"
            raise UsageError(f"{path}: {why}: {flat(error)[:160]}") from error
    if lacking := [name for name in table if name and name not in tensors]:
        raise UsageError(f"{folder}: its shards lack {name_some(lacking)}, which the index promises")
    return tensors


def read_folder(folder):
    """A folder of transformers -> (encoder, predictor, what it is, fields of a config that it decides, why the
    predictor is of no use). UsageError for another model, or one that computes otherwise."""
    if not (config := read_mapping(folder / "config.json", 2**20)):
        raise UsageError(f"{folder}: no config.json that can be read")
    config = {"model_type": None, **config}
    fixed = {"model_type": "vjepa2", "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "in_chans": 3}
    for name, value in fixed.items():
        if (found := config.get(name, value)) != value:
            raise UsageError(f"{folder}: {name} = {shown(found)} in its config.json, only {value} can be taken")
    values = dict(num_heads=16, pred_heads=12, num_frames=FRAMES_SEEN, image_size=256)  # as transformers has them
    values = {name: config.get(CONFIG_NAMES[name], default) for name, default in values.items()}
    if odd := [CONFIG_NAMES[name] for name, number in values.items() if not fits(int, number) or number < 1]:
        raise UsageError(f"{folder}: {odd[0]} in its config.json is no number above 0")
    tensors = {}
    for name, value in check_weights(folder).items():
        name = renamed(name.removeprefix("vjepa2."), ENCODER_NAMES + PREDICTOR_NAMES, THEIRS, OFFICIAL)
        tensors[name.replace(".attention.", ".attn.")] = value
    for name in [name for name in tensors if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in tensors for part in parts):
            tensors[name.replace("query", "qkv")] = torch.cat([tensors.pop(part) for part in parts])
    predictor = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("predictor_", "mask_tokens"))}
    return tensors, predictor, "transformers folder", {**values, "pos_embed": "rope"}, ""


def read_pt(path, key):
    """An official .pt, or a checkpoint of a run -> as read_folder. UsageError."""
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path}: no .pt file, cut, or a git lfs pointer (git lfs pull)")
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise UsageError(f"{path}: damaged (checksum of {damaged})")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    ours = state.get("cfg") if "format" in state else None
    known = ("target", "online") if ours else ("target_encoder", "ema_encoder", "encoder")
    tables = (ENCODER_NAMES, PREDICTOR_NAMES) if ours else ((), ())
    entries = {name: state[name] for name in known if isinstance(state.get(name), dict)}
    key = key or next(iter(entries), known[0])
    if key not in entries:
        there = ", ".join(entries) or name_some(sorted(state))
        raise UsageError(f"{path}: no entry {one_line(key)}; there are {there} (--init_key)")
    encoder, predictor = {}, {}
    for tensors, part, rows in zip((encoder, predictor), (entries[key], state.get("predictor") or {}), tables):
        for name, value in part.items():
            official = re.sub(r"^(module\.|backbone\.|_orig_mod\.)+", "", name)
            tensors[renamed(official, rows, OURS, OFFICIAL)] = own_tensor(value, name, path)
    if ours:
        return encoder, predictor, f"checkpoint of a run, {key}", ours, "of a run the encoder alone is taken"
    what, positions, why = f"official .pt, {key}", "rope", ""
    if "norms_block.0.weight" in encoder:
        what, positions, why = f"V-JEPA 2.1, {what}", "rope21", "that of V-JEPA 2.1 has other shapes"
        last = max(name.split(".")[1] for name in encoder if name.startswith("norms_block."))
        for part in ("weight", "bias"):
            encoder[f"norm.{part}"] = encoder.pop(f"norms_block.{last}.{part}")
        encoder["patch_embed.proj.bias"] += encoder.pop("video_mod_embed", torch.zeros(1)).flatten()
    if "action_encoder.weight" in predictor:
        why = "it is conditioned on actions"
    return encoder, predictor, what, {"pos_embed": positions}, why


def trunk_sizes(tensors, blocks):
    """Depth, width and MLP ratio of the blocks whose names begin so, () where there are none."""
    fc1 = tensors.get(f"{blocks}.0.mlp.fc1.weight", torch.empty(0))
    depth = len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})
    return (depth, fc1.shape[1], len(fc1) / fc1.shape[1]) if fc1.ndim == 2 else ()


def config_of(Config, values):
    """A dict of values, those of a checkpoint say -> Config, without those that it has no field for; fields that are
    younger than the values are as they were before."""
    known = {
        name: value for name, value in {**merged(Config, "BEFORE"), **values}.items() if name in field_types(Config)
    }
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


@dataclass
class Origin:
    """What is known of weights beside their tensors."""

    path: str
    what: str  # in words
    cfg: VJepaAutoV2Config  # has their sizes; pred_heads 0: unknown
    no_predictor: str  # why there is none to load
    left_out: str  # what and why


def sized(path, encoder, predictor, what, values, why, num_heads):
    """What read_folder gives, less tensors that have no place -> as read_weights. UsageError."""
    roots = {name.split(".")[0] for name in (*encoder, *predictor)}
    left_out = ", ".join(f"{root} ({reason})" for root, reason in NO_PLACE.items() if root in roots)
    for tensors in (encoder, predictor):
        for name in [name for name in tensors if name.split(".")[0] in NO_PLACE]:
            del tensors[name]
    if tokens := [predictor.pop(name).flatten(0, -2) for name in sorted(predictor) if name.startswith("mask_tokens")]:
        predictor["mask_tokens"] = torch.cat(tokens)
    dims, patch = trunk_sizes(encoder, "blocks"), encoder.get("patch_embed.proj.weight", torch.empty(0))
    if not dims or patch.ndim != 5:
        raise UsageError(f"{path}: holds no video encoder of V-JEPA 2")
    heads = values.get("num_heads") or HEADS.get(dims[1], num_heads)
    if not heads or dims[1] % heads:
        raise UsageError(f"{path}: a width of {dims[1]} with {heads or 'an unknown number of'} heads (--num_heads)")
    sizes = dict(zip(ENCODER_SIZES, (*dims, heads, *patch.shape[2:4])), num_frames=FRAMES_SEEN, image_size=256)
    if (dims := trunk_sizes(predictor, "predictor_blocks")) and tokens:
        sizes |= dict(zip(PREDICTOR_SIZES, (*dims, 12 * (dims[1] == 384))))
    else:
        why = why or "there is none"
    return encoder, predictor, Origin(path, what, config_of(VJepaAutoV2Config, {**sizes, **values}), why, left_out)


def read_weights(path, key="", num_heads=0):
    """Weights of V-JEPA 2 or 2.1, or of a run -> (encoder, predictor, Origin), both {official name: fp32 tensor}, but
    mask_tokens [K, P]. `path`: folder, file, or hub id, which is fetched; `key`: entry of a .pt; `num_heads`: for a
    width that does not say. UsageError for all that may be wrong."""
    path = os.path.expanduser(path)
    found = Path(path)
    try:
        if not found.exists():
            if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) or path.endswith(".pt") or found.parent.is_dir():
                raise UsageError(f"{path}: no such folder or file, and no hub id (--init_from)")
            hub, wanted = extra("huggingface_hub", f"hub id {path}"), ["config.json", "*.safetensors*"]
            found = Path(hub.snapshot_download(path, allow_patterns=wanted))
        if key and found.is_dir():
            raise UsageError(f"{path}: a folder holds one encoder, nothing to choose from (--init_key)")
        return sized(path, *(read_folder(found) if found.is_dir() else read_pt(found, key)), num_heads)
    except UserError as error:
        raise UsageError(f"{error}{' (--init_from)' * ('(--' not in str(error))}") from error
    except Exception as error:  # a foreign file makes the unpickler raise anything, and so does a network
        why = f"{type(error).__name__}: {flat(error)[:160]}"
        raise UsageError(f"{path}: cannot be read as weights ({why}) (--init_from)") from error


def misfits(cfg, other, names):
    """Sizes that a config has otherwise than the weights' -> [text]. 0: the predictor's are the encoder's in a config,
    unknown in weights."""
    odd = []
    for name in names:
        own = getattr(cfg, name) or getattr(cfg, {"pred_heads": "num_heads"}.get(name, "mlp_ratio"))
        theirs, width = getattr(other, name), other.pred_dim if name.startswith("pred") else other.enc_dim
        if theirs and int(width * own) != int(width * theirs):
            odd.append(f"{name} = {own}, the weights have {theirs} (--{name})")
    return odd


def read_init(cfg):
    """read_weights of init_from. UsageError where sizes are others: a frozen teacher's pieces, else all, but the depth
    with allow_partial."""
    taught = cfg.teacher == "frozen"
    heads = cfg.num_heads * (cfg.num_heads != type(cfg).num_heads and not taught)
    encoder, predictor, origin = read_weights(cfg.init_from, cfg.init_key, heads)
    if odd := misfits(cfg, origin.cfg, ENCODER_SIZES[4 if taught else cfg.allow_partial :]):
        raise UsageError(f"init_from {origin.path}: {'; '.join(odd)}")
    return encoder, predictor, origin


def fill(net, tensors, rows, partial=False):
    """Load tensors by official names into a network, on the meta device without a copy -> what is lacking or of another
    shape, and what has no place: then none is loaded, or with `partial` what fits."""
    own = net.state_dict()
    names = {renamed(name, rows, OURS, OFFICIAL): name for name in own if not name.startswith("actions.")}
    good = {name: tensors[name] for name in names if name in tensors and tensors[name].shape == own[names[name]].shape}
    odd = (("no", names.keys() - good.keys()), ("no place for", tensors.keys() - names.keys()))
    odd = " and ".join(f"{what} {name_some(sorted(found))}" for what, found in odd if found)
    if partial or not odd:
        own |= {names[name]: value for name, value in good.items()}
        net.load_state_dict(own, assign=next(net.parameters()).is_meta)
    return odd


def take_predictor(model, cfg, tensors, origin):
    """The predictor of read_weights into a model, where all of it fits -> what became of it. Mask tokens that were
    never trained are zero: then all families have the first that was. UsageError where the sizes fit, but not all."""
    if why := origin.no_predictor or "; ".join(misfits(cfg, origin.cfg, (*PREDICTOR_SIZES, "enc_dim"))):
        return f"weights: predictor starts anew: {why}"
    norms = tensors["mask_tokens"].norm(dim=1).tolist()
    first, second, *_ = [number for number, norm in enumerate(norms) if norm][:2] * 2 or (0, 0)
    families = (first, second, first)
    tokens = tensors["mask_tokens"][list(families)]
    if odd := fill(model.predictor, {**tensors, "mask_tokens": tokens}, PREDICTOR_NAMES):
        if not cfg.allow_partial:
            raise UsageError(f"init_from {origin.path}: the predictor fits in part only: {odd} (--allow_partial)")
        return f"weights: predictor starts anew: {odd}"
    start = "; SOON starts from the last tubelet, which it never saw (--soon_start mask)" * (cfg.soon_start == "last")
    start += "; it learned to read all tokens (--pred_attention full)" * (cfg.pred_attention != "full")
    listed = ", ".join(f"{norm:.3g}" for norm in norms)
    return f"weights: predictor, {len(tensors)} tensors, mask tokens {families} of those with norms {listed}{start}"


def take_encoder(model, cfg, tensors, origin, say):
    """The encoder of read_weights, its kind of positions as well, into a model -> what became of it. UsageError."""
    if cfg.pos_embed != (kind := origin.cfg.pos_embed):
        say(f"pos_embed: {kind}, as the weights need, not {cfg.pos_embed}")
        cfg.pos_embed = kind
        validate_config(cfg)
        for net in (model.online, model.target, model.predictor):
            net.position = net.position.changed(kind, cfg.grid)
    if (part := fill(model.online, tensors, ENCODER_NAMES, cfg.allow_partial)) and not cfg.allow_partial:
        raise UsageError(f"init_from {origin.path}: the encoder fits in part only: {part} (--allow_partial)")
    model.target.load_state_dict(model.online.state_dict())
    return "into online and target" + f", in part: {part}" * bool(part)


@torch.no_grad()
def take_weights(model, cfg, say):
    """Fill online encoder and target, unless they are frozen, and where it fits the predictor of a model from what
    cfg.init_from names. `say` tells what was loaded, left out and starts anew. UsageError."""
    tensors, predictor, origin = model.beside or read_init(cfg)
    into = "frozen" if model.beside else take_encoder(model, cfg, tensors, origin, say)
    model.beside, count = (), sum(value.numel() for value in tensors.values()) / 1e6
    say(f"weights: encoder of {origin.path} ({origin.what}), {count:.1f} M, {into}")
    say(take_predictor(model, cfg, predictor, origin))
    left_out = f"; left out: {origin.left_out}" * bool(origin.left_out)
    anew = ", action tokens" * bool(cfg.action_names)
    say(f"weights: outcome head{anew}, flow net and read-out start anew{left_out}")
    if cfg.num_frames > (seen := origin.cfg.num_frames):
        say(f"note: a clip has {cfg.num_frames} frames, the weights saw at most {seen}")


def encoder_of(tensors, origin, cfg=None):
    """Tensors of read_weights, uncopied, as an Encoder of their config or of one with these sizes, in eval mode and
    without gradients. UsageError where they fit in part only."""
    cfg = cfg or origin.cfg
    with torch.device("meta"):  # first values would be made in vain
        encoder = Encoder(cfg)
    if odd := fill(encoder, tensors, ENCODER_NAMES):
        raise UsageError(f"{origin.path}: the encoder fits in part only: {odd}")
    encoder.position = PositionCode(cfg.pos_embed, cfg.grid, cfg.enc_dim, cfg.num_heads)
    return encoder.eval().requires_grad_(False)


def load_encoder(path, key="", num_heads=0):
    """Weights as of read_weights -> their Encoder, in eval mode and without gradients: normalised clip [B, T, 3, H, W],
    of any length and size in whole tubelets and patches -> [B, L, D]. `cfg` has its sizes. UsageError."""
    tensors, _, origin = read_weights(path, key, num_heads)
    return encoder_of(tensors, origin)


def export_hf(checkpoint, folder, key="", size=0):
    """Encoder (target, or `key` online) and predictor of a checkpoint -> a new folder that transformers' VJEPA2Model
    reads, for pictures of size x size pixels, by default the run's -> (number of tensors, Origin). UsageError."""
    (tensors, predictor, origin), folder = read_weights(checkpoint, key), Path(folder)
    cfg, has_both = origin.cfg, origin.what.startswith("checkpoint") and "mask_tokens" in predictor
    size = size or cfg.height * (cfg.height == cfg.width)
    form = f"{cfg.height} x {cfg.width} pixels, and the format takes all pictures for squares"
    problems = (
        "no checkpoint with encoder and predictor" * (not has_both),
        f"pos_embed = {cfg.pos_embed}, and the format has rope alone" * (cfg.pos_embed != "rope"),
        f"{form}; name their side (--size)" * (not size),
        f"--size {size} is not divisible by patch = {cfg.patch}" * (size % cfg.patch > 0),
    )
    if any(problems):
        raise UsageError(f"{checkpoint}: {next(filter(None, problems))}")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: is there already; use another --out")
    saved = {}
    predictor["mask_tokens"] = predictor["mask_tokens"][[*range(SOON)] * 5, None, None]  # any index finds one in use
    for name, value in {**tensors, **predictor}.items():
        name = renamed(name, ENCODER_NAMES + PREDICTOR_NAMES, OFFICIAL, THEIRS).replace(".attn.", ".attention.")
        parts = zip(("query", "key", "value"), value.chunk(3)) if ".qkv." in name else [("", value)]
        saved |= {name.replace("qkv", part): piece.contiguous() for part, piece in parts}
    heads, ratio = cfg.pred_heads or cfg.num_heads, cfg.pred_mlp_ratio or cfg.mlp_ratio
    values = asdict(replace(cfg, image_size=size, pred_heads=heads, pred_mlp_ratio=ratio))
    config = {"model_type": "vjepa2", "architectures": ["VJEPA2Model"], "dtype": "float32", "pred_num_mask_tokens": 10}
    config |= {theirs: values[own] for own, theirs in CONFIG_NAMES.items()}
    content = extra("safetensors.torch", folder).save(saved, {"format": "pt"}), json.dumps(config, indent=1).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("model.safetensors", "config.json"), content):
        write_atomic(folder / name, partial(GuardedFile.write, data=part))
    return len(saved), origin


# ---------------------------------------------------------------------------------------------------------------------
# 23  Model: batch -> dict of losses (online + EMA target)
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as V-JEPA 2 normalises


def block_flops(num_tokens, dim, mlp_ratio):
    """Forward FLOP of one transformer block: four projections, the MLP, scores and their product with the values."""
    return 2 * num_tokens * dim * dim * (4 + 2 * mlp_ratio) + 4 * num_tokens**2 * dim


def held_places(cfg):
    """Which of the tubelets that a training clip holds stands for each of the clip's -> [t] numbers."""
    seen = sum(cfg.future_tubelets[:2])
    return [*range(seen), *(seen + number for number, part in enumerate(cfg.stretches) for _ in part)]


def predictor_flops(cfg, num_seen, num_holes):
    """Forward FLOP of one predictor block on so many tokens of a context and predicted ones."""
    P, ratio = cfg.pred_dim, cfg.pred_mlp_ratio or cfg.mlp_ratio
    if cfg.pred_attention == "full":
        return block_flops(num_seen + num_holes, P, ratio)
    seen = block_flops(num_seen, P, ratio) if cfg.pred_attention == "context" else 4 * num_seen * P * P
    return seen + 2 * num_holes * P * P * (2 + 2 * ratio) + 4 * num_holes * num_seen * P


def now_passes(cfg):
    """Forward passes of NOW -> [(passes per clip, tokens seen, tokens predicted)], one of each mask family."""
    share = cfg.mask_draws / (1 if cfg.mask_families == "both" or cfg.batch_size == 1 else len(MASK_FAMILIES))
    held = sum(cfg.future_tubelets[:2]) + len(cfg.stretches)  # tubelets
    kept = [family_visible(cfg, family) * held for family in MASK_FAMILIES if cfg.lambda_vjepa]
    return [(share, num_kept, share_of(cfg.sites * held - num_kept, cfg.pred_share)) for num_kept in kept]


def flops_per_clip(cfg, teacher=None):
    """Multiply-adds times two of one training step on one clip, forward and backward, by module -> {name: FLOP}.
    `teacher`: the config of the target encoder where it has its own."""
    teacher = teacher or cfg
    D, ratio, piece = cfg.enc_dim, cfg.mlp_ratio, 2 * 3 * cfg.tubelet_t * cfg.patch**2
    passes = [*now_passes(cfg), (1, cfg.now_tokens, 0)]
    online = sum(times * (cfg.enc_depth * block_flops(n, D, ratio) + n * D * piece) for times, n, _ in passes)
    told = cfg.future_tubelets if cfg.action_names else (0, 0, 0)  # actions, a token each
    passes[-1] = 1, cfg.now_tokens + told[1], cfg.soon_tokens
    filled = sum(times * predictor_flops(cfg, seen, holes) for times, seen, holes in passes)
    W, RN, K = cfg.flow_dim, cfg.flow_draws * cfg.flow_tokens, cfg.now_tokens + told[2] * (not cfg.flow_joint)
    mixing = RN * 2 * W * W * 6 + 4 * K * W * D + 4 * RN * (K + cfg.flow_tokens) * W
    flow = cfg.flow_depth * (RN * 2 * W * W * 8 + mixing * (not cfg.flow_joint))
    flow += 2 * K * cfg.flow_read * (W + D * (cfg.flow_read < D)) * cfg.flow_joint
    again = 4 if cfg.grad_checkpoint else 3
    bounds, held = [0, *cfg.window_starts, cfg.grid[0]], held_places(cfg)
    windows = [cfg.sites * len({*held[begin:end]}) for begin, end in itertools.pairwise(bounds)]
    target = sum(block_flops(n, teacher.enc_dim, teacher.mlp_ratio) for n in windows) * teacher.enc_depth
    target += sum(windows) * piece * teacher.enc_dim
    return {
        "online": (1 if cfg.freeze_encoder else again) * online * (not cfg.latents),
        "target": target * (not cfg.latents),
        "predictor": again * cfg.pred_depth * filled,
        "flow": 3 * flow * bool(cfg.lambda_flow and not cfg.flow_fit_clips),  # else the flow phase has it
    }


def memory_estimate_gb(cfg, held):
    """Bytes held and saved activations of a micro-step -> GB; --dry_run counts them. 53 bytes per token, channel and
    block under autocast (70 in fp32) were measured with saved-tensor hooks; checkpointing keeps one input per block."""
    kept = (sum(times * n for times, n, _ in now_passes(cfg)) + cfg.now_tokens) * (not cfg.freeze_encoder)
    told = cfg.future_tubelets[1] * bool(cfg.action_names)
    passes, read = [*now_passes(cfg), (1, cfg.now_tokens + told, cfg.soon_tokens)], cfg.pred_attention != "cross"
    filled = sum(times * (seen * (1 if read else 0.2) + holes) for times, seen, holes in passes)
    per_value = 53 if cfg.amp else 70
    values = kept * cfg.enc_dim * cfg.enc_depth + filled * cfg.pred_dim * cfg.pred_depth
    values *= 0.1 if cfg.grad_checkpoint else 1  # the flow net never recomputes
    learns = cfg.lambda_flow and not cfg.flow_fit_clips
    values += cfg.flow_draws * cfg.flow_tokens * cfg.flow_dim * cfg.flow_depth * bool(learns)
    return (held + cfg.batch_size * values * per_value) / 1e9


def frozen_encoder(cfg):
    """The encoder of init_from on a config's token grid -> (encoder, what read_init gave). Where it has the config's
    sizes, as with freeze_encoder, its kind of positions becomes the config's. On meta nothing is read. UsageError."""
    if torch.get_default_device().type == "meta":
        return Encoder(cfg).requires_grad_(False), ()
    tensors, _, origin = found = read_init(cfg)
    if misfits(cfg, origin.cfg, ENCODER_SIZES[:4]):
        cfg = replace(cfg, **{name: getattr(origin.cfg, name) for name in (*ENCODER_SIZES, "pos_embed")})
    else:
        cfg.pos_embed = origin.cfg.pos_embed
        validate_config(cfg)
    return encoder_of(tensors, origin, cfg), found


def fixed_map(width, wanted, seed):
    """Orthonormal random matrix [width, wanted], the same everywhere: it keeps distances, nearly so onto a smaller
    width. One that learns would let targets collapse."""
    rows = torch.randn((max(width, wanted), min(width, wanted)), generator=torch.Generator().manual_seed(seed)).double()
    directions, upper = torch.linalg.qr(rows)
    directions = (directions * upper.diagonal().sign()).float()  # else only up to signs
    return directions if width > wanted else directions.T


class VJepaAutoV2(World):
    """Train a driving world model on a folder of videos: V-JEPA at three time scales, and a flow net on top.

    What a step leaves behind (queue keys, flow residuals) comes back as `carry` and is taken in by `after_step`.
    """

    Config, Dataset, REPLAYS = VJepaAutoV2Config, ClipDataset, True
    KEYS = {
        "loss_vjepa": "NOW: L1 on masked target latents, mean of the short and long masks",
        "loss_soon": "SOON: L1 on near-future target latents predicted from NOW alone",
        "loss_eventually": "EVENTUALLY: InfoNCE of the outcome embedding; ln(batch x ranks + filled queue) is chance",
        "loss_flow": "FLOW: squared velocity error in residual space, plus the squared error of the chunk read-out",
        "loss_supcon": "supervised contrast on maneuvers; only with lambda_supcon",
        "target_std": "deviation of target channels over tokens (with a stride of NOW and SOON); near 0 = collapsed",
        "target_std_clips": "the same over clips at one position, which position cannot fake; nan for equal clips",
        "effective_rank": "exp(entropy) of the singular values of target tokens; 1 = collapsed, at most enc_dim",
        "soon_skill": "1 - L1(SOON prediction) / L1(last NOW tubelet repeated); above 0 = better than a still world",
        "outcome_top1": "share of clips whose own future ranks first among all keys",
        "passive_share": "share of clips without actions, or with hidden ones; only with actions",
    }
    TRAIN_KEYS = {
        "ema_momentum": "momentum of the target encoder; absent where that is frozen",
        "flow_grad_norm": "gradient norm of the flow net before clipping",
        "flow_explained": "share of the residual's variance inside the flow's directions",
    }
    latent_fields = (
        *ClipConfig.MUST_MATCH, "clip_fps", "eventually_frames", "tubelet_t", "patch", "num_heads", "target_window",
    )  # fmt: skip
    VAL_KEYS = {
        "flow_spread": "deviation among sampled futures over that of real futures from the forecast; "
        "0 = one mode, 1 = as wide; without actions",
        "soon_action_gain": "soon_skill with the true actions minus that without any, first batch; only with actions",
    }
    NO_DECAY, FILES = ("mask_tokens", "queries"), ("futures.png",)
    NETWORKS = ("online", "predictor", "outcome", "flow", "flow_ema", "read_out", "target")
    draw = staticmethod(mask_and_noise)

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        is_frozen = cfg.freeze_encoder or cfg.teacher == "frozen"
        frozen, self.beside = frozen_encoder(cfg) if is_frozen else (None, ())
        self.online, self.predictor = frozen if cfg.freeze_encoder else Encoder(cfg), Predictor(cfg)
        self.outcome, self.flow = OutcomeHead(cfg), FlowNet(cfg)
        self.read_out = nn.Linear(cfg.enc_dim, cfg.flow_chunks * cfg.enc_dim)  # forecast of the EVENTUALLY chunks
        init_weights(self.read_out)
        self.target, self.flow_ema = frozen or copy.deepcopy(self.online), copy.deepcopy(self.flow)
        if frozen is not None:  # with freeze_encoder, one module has both names
            self.FROZEN = ("online" if cfg.freeze_encoder else "target",)
            self.NETWORKS = tuple(name for name in self.NETWORKS if getattr(self, name, None) is not frozen)
            if frozen.cfg is cfg and not cfg.freeze_encoder:
                self.online.load_state_dict(frozen.state_dict())
            if (width := frozen.cfg.enc_dim) != cfg.enc_dim:
                self.register_buffer("target_map", fixed_map(width, cfg.enc_dim, cfg.seed), persistent=False)
        self.soon_predictor = None  # the predictor's copy that the flow phase fits to SOON alone
        self.space = FutureSpace(cfg)
        self.register_buffer("queue", torch.zeros(cfg.outcome_queue, cfg.enc_dim))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        fixed = dict(
            image_mean=torch.tensor(IMAGE_MEAN).view(1, 1, 3, 1, 1),
            image_std=torch.tensor(IMAGE_STD).view(1, 1, 3, 1, 1),
            now_idx=torch.arange(cfg.now_tokens),
            soon_idx=torch.arange(cfg.now_tokens, cfg.now_tokens + cfg.soon_tokens),
            held=torch.tensor(held_places(cfg)),
        )
        for name, value in fixed.items():
            self.register_buffer(name, value, persistent=False)
        if num_signals := len(cfg.action_names):
            self.register_buffer("action_mean", torch.zeros(num_signals))
            self.register_buffer("action_std", torch.ones(num_signals))
            if not cfg.lambda_soon:
                self.predictor.actions.requires_grad_(False)
        learns = {
            "flow": cfg.lambda_flow and not cfg.flow_fit_clips,  # else it waits for the flow phase
            "read_out": cfg.lambda_flow,
            "outcome": cfg.lambda_eventually or cfg.lambda_supcon,
            "predictor": cfg.lambda_vjepa or cfg.lambda_soon,
        }
        for name in ("target", "flow_ema", *(name for name, yes in learns.items() if not yes)):
            getattr(self, name).requires_grad_(False)
        self.target.eval(), self.flow_ema.eval()

    @staticmethod
    def wants_labels(cfg):
        return bool(cfg.lambda_supcon)

    def take_weights(self, say):
        if self.cfg.init_from:
            take_weights(self, self.cfg, say)

    @torch.no_grad()
    def take_data(self, run):
        """Statistics of the actions, those of rank 0 for all. UsageError where no file has them all."""
        if not self.cfg.action_names:
            return
        process, work = run.process, (tuple,)
        if process.is_main:
            work = action_statistics, run.source.dataset(self.cfg, "train"), process.stop.asked
        mean, std, told = process.collect(process.together(*work))[0]
        if not mean:
            raise UsageError(f"config: {refusal(self.cfg, 'actions', told)}")
        self.action_mean.copy_(torch.tensor(mean)), self.action_std.copy_(torch.tensor(std))
        run.log.line(told)

    def train(self, mode=True):
        """As nn.Module.train, but the target encoder and the flow EMA stay in eval mode for ever."""
        super().train(mode)
        self.target.eval(), self.flow_ema.eval()
        return self

    def normalise(self, frames):
        """uint8 frames [B, T, 3, H, W] -> clip in units of ImageNet's deviation; floats count as normalised."""
        if frames.dtype != torch.uint8:
            return frames
        return (frames.float() / 255 - self.image_mean) / self.image_std

    def pieces_of(self, frames):
        """Frames, uint8 or normalised, [B, T, 3, H, W] -> what the tokenizer cuts of the normalised clip. Bytes are cut
        first: that moves a quarter of the memory."""
        pieces = self.online.tokenizer.cut(frames)
        if frames.dtype != torch.uint8:
            return pieces
        mean, std = (value.view(3, 1) for value in (self.image_mean, self.image_std))
        return pieces.unflatten(2, (3, -1)).float().div_(255).sub_(mean).div_(std).flatten(2)

    @torch.no_grad()
    def make_targets(self, clip, tubelets=None):
        """clip [B, T, C, H, W], or its pieces -> targets [B, L, D]: target encoder on the whole clip, LayerNorm without
        affine. With `tubelets` [B, t] on these alone, of pieces: one of each stretch of EVENTUALLY, whose targets
        stand for all of it."""
        cfg = self.cfg
        if tubelets is None:
            targets = self.target(clip, cfg.window_starts)
        else:
            idx = (tubelets[:, :, None] * cfg.sites + torch.arange(cfg.sites, device=tubelets.device)).flatten(1)
            held = held_places(cfg)
            starts = tuple(held[at] * cfg.sites for at in cfg.window_starts)
            targets = self.target.encode(clip, idx, starts)
        if hasattr(self, "target_map"):
            targets = layer_norm(targets) @ self.target_map
        targets = layer_norm(targets)
        return targets if tubelets is None else targets.unflatten(1, (-1, cfg.sites))[:, self.held].flatten(1, 2)

    @torch.no_grad()
    def latents(self, batch):
        """NOW context [B, K, D], of NOW alone, and targets [B, L', D], of EVENTUALLY one per tubelet: only means of it
        are used."""
        return self.brief(self.context_of(batch), self.targets_of(batch))

    def latents_of(self, whole):
        """As in World; here NOW's tokens saw the future. BadFile for tokens of another grid or width."""
        if whole.shape != (self.cfg.num_tokens, self.cfg.enc_dim):
            grid = " x ".join(map(str, self.cfg.grid))
            raise BadFile(f"holds {list(whole.shape)} tokens and channels, not {grid} tokens of {self.cfg.enc_dim}")
        brief = self.brief(whole[None, : self.cfg.now_tokens], layer_norm(whole[None]))
        return {name: value[0] for name, value in brief.items()}

    def brief(self, context, targets):
        """NOW context and targets [B, L, D] -> `latents`."""
        kept, later = targets.tensor_split((self.cfg.now_tokens + self.cfg.soon_tokens,), 1)
        later = later.unflatten(1, (self.cfg.eventually_tubelets, -1)).mean(2)
        return {"context": context, "targets": torch.cat([kept, later], 1)}

    def context_of(self, batch):
        """NOW context [B, K, D] of a batch of clips or of their latents."""
        return batch["context"].float() if "context" in batch else self.now_context(batch["frames"])

    def targets_of(self, batch):
        """Targets of a batch of whole clips [B, L, D], or of their latents [B, L', D]."""
        return batch["targets"].float() if "targets" in batch else self.make_targets(self.pieces_of(batch["frames"]))

    def encode_now(self, pieces):
        """What the tokenizer cut of a clip, [B, >= NOW, C * dt * p * p] -> context of NOW alone [B, K, D]."""
        return self.online.encode(pieces, self.now_idx.expand(len(pieces), -1))

    def now_context(self, frames):
        """Frames, uint8 or normalised, [B, >= NOW, 3, H, W], of which NOW alone is read -> context [B, K, D]."""
        return self.encode_now(self.pieces_of(frames[:, : self.cfg.now_frames]))

    def given(self, num_clips, actions=None, hidden=None):
        """Actions in SI units [B, >= F, A], NaN in passive clips, and who hides theirs [B] -> what nets are told: (the
        last F in units of their deviation, 0 in passive clips, these [B]); () in a world without actions."""
        if not self.cfg.action_names:
            return ()
        times = self.cfg.future_tubelets[2]
        if actions is None:
            actions = self.action_mean.new_full((num_clips, times, len(self.action_mean)), math.nan)
        actions = actions[:, -times:].to(self.action_mean.device)
        units = ((actions - self.action_mean) / self.action_std).clamp(-30, 30)  # a sensor's fault is cut
        passive = units.isnan().flatten(1).any(1)
        passive = passive if hidden is None else passive | hidden
        return units.masked_fill(passive[:, None, None], 0.0), passive

    def given_of(self, batch):
        """`given` of a batch, which holds `actions` wherever the world knows any."""
        return self.given(0, batch.get("actions"), batch.get("actions_hidden"))

    def told(self, num_clips, actions):
        """`given` of actions [B, F, A] in SI units that a caller names, or None. UsageError for others."""
        if actions is None:
            return self.given(num_clips)
        if not self.cfg.action_names:
            raise UsageError("actions: this world was trained without (actions = none) and takes none")
        shape = [num_clips, self.cfg.future_tubelets[2], len(self.cfg.action_names)]
        if not torch.is_tensor(actions) or list(actions.shape) != shape or not actions.is_floating_point():
            wanted = f"floats {shape}: {self.cfg.actions} of every SOON and EVENTUALLY tubelet"
            raise UsageError(f"actions: {describe_form(actions)}, must be {wanted}")
        if not actions.isfinite().all():
            raise UsageError("actions: hold NaN or infinity; leave them out for passive futures")
        return self.given(num_clips, actions.to(self.action_mean))

    def predict_soon(self, context, given=None):
        """NOW context [B, K, D], and `given` -> predicted SOON targets [B, M, D]; passive without."""
        B, predictor = len(context), self.soon_predictor or self.predictor
        given = self.given(B) if given is None else given
        given = (given[0][:, : self.cfg.future_tubelets[1]], given[1]) if given else ()
        return predictor(context, self.now_idx.expand(B, -1), self.soon_idx.expand(B, -1), SOON, *given)

    def split_soon_predictor(self):
        """Give SOON a predictor of its own, a copy of the shared one that does not learn yet -> that copy."""
        self.soon_predictor = copy.deepcopy(self.predictor).requires_grad_(False)
        return self.soon_predictor

    def now_loss(self, pieces, targets, batch):
        """Masked prediction over the whole clip: mean over the two mask families and all draws."""
        losses, half = [], (len(pieces) + 1) // 2
        halves = slice(None, half), slice(half, None)
        for family, name in enumerate(MASK_FAMILIES):
            clips = halves[family] if self.cfg.mask_families == "one" and len(pieces) > 1 else slice(None)
            for draw in range(self.cfg.mask_draws):
                keep_idx, mask_idx = batch[f"keep_{name}"][clips, draw], batch[f"mask_{name}"][clips, draw]
                context = self.online.encode(pieces[clips], keep_idx)  # [B, K, D]
                preds = self.predictor(context, keep_idx, mask_idx, family)  # [B, M, D]
                losses.append(l1_loss(preds, gather_tokens(targets[clips], mask_idx)))
        return torch.stack(losses).mean()

    def outcome_key(self, targets):
        """targets [B, L, D] -> mean EVENTUALLY target [B, D], minus the mean NOW target for `outcome_target` delta."""
        key = targets[:, self.cfg.now_tokens + self.cfg.soon_tokens :].mean(1)
        return key - targets[:, : self.cfg.now_tokens].mean(1) if self.cfg.outcome_target == "delta" else key

    def gather(self, rows):
        """Rows [B, ...] of this rank -> those of all ranks [B*W, ...], detached."""
        return gather_rows(rows.detach(), self.world_size) if self.world_size > 1 else rows.detach()

    def eventually_loss(self, outcome, key):
        """InfoNCE against the keys of all ranks and of the queue. [B, D] each -> (loss, top-1 share)."""
        keys = self.gather(key)  # [B * W, D]
        labels = torch.arange(len(key), device=key.device) * self.world_size + self.rank
        places = torch.arange(len(self.queue), device=key.device)
        absent = torch.cat([torch.zeros_like(keys[:, 0], dtype=torch.bool), places >= self.queue_filled])
        return info_nce(outcome, torch.cat([keys, self.queue]), labels, absent, self.cfg.outcome_temperature)

    def future_target(self, targets):
        """targets [B, L, D] -> a future [B, F, D]: the SOON tokens, then the chunk means of EVENTUALLY."""
        cfg, later = self.cfg, self.cfg.now_tokens + self.cfg.soon_tokens
        tubelets = targets[:, later:].unflatten(1, (cfg.eventually_tubelets, -1)).mean(2)  # [B, t, D]
        chunks = [part.mean(1) for part in tubelets.tensor_split(cfg.flow_chunks, 1)]
        return torch.cat([targets[:, cfg.now_tokens : later], torch.stack(chunks, 1)], 1)

    def forecast(self, context, soon_preds=None, actions=None):
        """Point forecast of a future [B, F, D] from NOW context [B, K, D]: SOON predictions [B, M, D], made here unless
        given, with `actions` as in `sample_futures`, and a linear read-out of the mean context."""
        if soon_preds is None:
            soon_preds = self.predict_soon(context, self.told(len(context), actions))
        chunks = self.read_out(context.mean(1)).reshape(len(context), self.cfg.flow_chunks, -1)
        return torch.cat([soon_preds.float(), chunks.float()], 1)

    def flow_loss(self, context, soon_preds, targets, batch, given=()):
        """Velocity L2 in residual space plus L2 of the chunk read-out -> (loss, residual rows, squared residual); where
        a flow phase is to come, no velocity and no rows."""
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
        projected = self.flow.project(context, *given)
        loss = velocity_loss(self.flow, projected, y, batch["noise"], batch["tau"]) + read_out_loss
        return loss, rows, residual.square().mean((0, 1))

    def forward(self, batch):
        cfg, pieces = self.cfg, None if "context" in batch else self.pieces_of(batch["frames"])
        # [B, L, D], of the tubelets that a training clip holds
        targets = self.targets_of(batch) if pieces is None else self.make_targets(pieces, batch.get("tubelets"))
        losses = dict.fromkeys(("loss_vjepa", "loss_soon", "loss_eventually", "loss_flow"), targets.new_zeros(()))
        gauges, carry = {}, {"targets": targets, "key": self.outcome_key(targets)}
        if cfg.lambda_vjepa:
            losses["loss_vjepa"] = self.now_loss(pieces, targets, batch)
        context = self.context_of(batch) if pieces is None else self.encode_now(pieces)  # [B, K, D]
        given = self.given_of(batch)
        soon_preds = self.predict_soon(context, given)  # [B, M, D]
        soon_targets = gather_tokens(targets, self.soon_idx.expand(len(targets), -1))
        losses["loss_soon"] = l1_loss(soon_preds, soon_targets)
        still = targets[:, cfg.now_tokens - cfg.sites : cfg.now_tokens]  # [B, h*w, D], as if nothing moved
        gauges["persistence"] = l1_loss(still.repeat(1, cfg.soon_tokens // cfg.sites, 1), soon_targets)
        if given:
            gauges["passive_share"] = given[1].float().mean()
            carry["soon"] = torch.stack([losses["loss_soon"].detach(), gauges["persistence"]])
        outcome = self.outcome(context)  # [B, D]
        losses["loss_eventually"], gauges["outcome_top1"] = self.eventually_loss(outcome, carry["key"])
        if cfg.lambda_flow:
            losses["loss_flow"], rows, carry["square"] = self.flow_loss(context, soon_preds, targets, batch, given)
            carry |= {} if rows is None else {"rows": rows}
        if cfg.lambda_supcon:
            others, maneuver, file = (self.gather(rows) for rows in (outcome, batch["maneuver"], batch["file"]))
            own = batch["maneuver"], maneuver, batch["file"], file
            losses["loss_supcon"] = sup_con(outcome, others, *own, cfg.supcon_temperature)
        return self.weigh(losses), gauges, carry

    def groups(self):
        """The flow net and the chunk read-out with their own learning rate and no decay; the others as always."""
        apart = {id(p): p for net in (self.flow, self.read_out) for p in net.parameters() if p.requires_grad}
        groups = super().groups()
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
        groups.append(param_group(self.cfg, "flow", list(apart.values()), self.cfg.flow_lr))
        return [group for group in groups if group["params"]]

    def after_step(self, carries, step):
        self.update_ema(ema_momentum_at(step, self.cfg), flow_momentum_at(step, self.cfg))
        self.absorb(carries)

    def update_ema(self, momentum, flow_momentum):
        """target follows online unless it is frozen, and the flow net's EMA the flow net where that learns."""
        if not self.FROZEN:
            move_ema(self.target, self.online, momentum)
        if next(self.flow.parameters()).requires_grad:
            move_ema(self.flow_ema, self.flow, flow_momentum)

    @torch.no_grad()
    def absorb(self, carries):
        """Take in what the micro-steps of a step left: queue keys first in, first out, and flow residuals."""
        for carry in carries:
            if len(self.queue):
                keys = self.gather(carry["key"].to(self.queue.dtype))[-len(self.queue) :]
                self.queue.copy_(torch.cat([keys.flip(0), self.queue])[: len(self.queue)])
                self.queue_filled.copy_((self.queue_filled + len(keys)).clamp_max(len(self.queue)))
        if self.cfg.lambda_flow:
            square = torch.stack([carry["square"] for carry in carries]).mean(0)
            square = self.gather(square[None]).mean(0)
            rows = [self.gather(carry["rows"].float()) for carry in carries if "rows" in carry]
            self.space.absorb(torch.cat(rows) if rows else None, square)
            self.agree_on_space()

    def agree_on_space(self):
        """Rank 0's directions for all ranks: young ones hang on rounding."""
        for name, value in self.space.named_buffers() if self.world_size > 1 else ():
            if name != "updates":  # as on every rank; written to, it would be read again, with a wait for the device
                dist.broadcast(value, 0)

    def look(self, batch, carry):
        targets, clips = carry["targets"], batch["context" if "context" in batch else "frames"]
        # latents hold EVENTUALLY as means; with a stride its tubelets stand for others, other ones in each clip
        if self.cfg.freeze_encoder or self.cfg.eventually_stride > 1:
            targets = targets[:, : self.cfg.now_tokens + self.cfg.soon_tokens]
        return {"targets": gauge_tokens(targets), "brightness": clips.float().flatten(1).mean(1)}

    def figures(self, looks, means):
        targets, brightness = (torch.cat([look[name] for look in looks]) for name in ("targets", "brightness"))
        several = bool((brightness != brightness[0]).any())  # a short file gives one clip again and again
        # a ratio of means: clips in which nothing moves would blow up a mean of ratios
        soon = torch.tensor([means["loss_soon"], means["persistence"]], dtype=torch.float64)
        return {
            "target_std": float(target_std(targets)),
            "target_std_clips": float(target_std_clips(targets)) if several else float("nan"),
            "effective_rank": float(effective_rank(targets)),
            "soon_skill": float(saved_share(*soon)),
        }

    def state(self, step):
        momentum = {} if self.FROZEN else {"ema_momentum": ema_momentum_at(step, self.cfg)}
        return {**momentum, "flow_explained": float(self.space.explained)}

    def held_out(self, batch, carry):
        cfg, found = self.cfg, {"flow_spread": 0.0}
        context, future = self.context_of(batch), self.future_target(carry["targets"])
        if cfg.lambda_flow:
            samples = self.sample_futures(context, 8, generator=torch.Generator(context.device).manual_seed(0))
            residual = (future - self.forecast(context)).detach()
            found["flow_spread"] = float(samples.std(1).square().mean().sqrt() / residual.square().mean().sqrt())
        if cfg.action_names:
            told, still = carry["soon"]
            passive = l1_loss(self.predict_soon(context), future[:, : cfg.soon_tokens])
            found["soon_action_gain"] = float(saved_share(told, still) - saved_share(passive, still))
        return found

    def verdict(self, values):
        return verdict(values, self.cfg)

    def report(self, run, values, seconds):
        path, log = Path(run.cfg.out_dir) / "futures.png", run.log
        if not self.cfg.picture:
            return
        source, gone = run.source, ()
        if self.cfg.latents:
            source, gone = videos_behind(type(self), self.cfg, source.root)
        if gone:
            log.line(f"picture: none, since videos behind the latents are not there: {name_some(gone)}")
            return
        log.stage = "drawing futures.png"
        try:
            cut = draw_futures(self, source, run.process, values, path, seconds)
        except OSError as error:  # a full disk
            log.line(f"WARNING: {path} could not be written ({error.strerror})")
        else:
            log.line(f"picture: {path}" + f"; {cut}" * bool(cut))

    def describe(self):
        cfg, flops, clips = self.cfg, self.flops(), self.cfg.batch_size * self.cfg.grad_accum * self.world_size
        nets = ("online", "predictor", "outcome", "flow")
        sizes = {name: sum(p.numel() for p in getattr(self, name).parameters()) / 1e6 for name in (*nets, "target")}
        spread = f"{cfg.clip_fps:g} per second" if cfg.clip_fps else "spread over the file"
        visible = (f"{name} {family_visible(cfg, name)}/{cfg.sites} sites" for name in MASK_FAMILIES)
        shares = (f"{name} {value / sum(flops.values()):.0%}" for name, value in flops.items())
        held = sum(size[cfg.shard == "fsdp"] for size in held_bytes(self, self.world_size).values())
        target = "frozen, target as well" if cfg.freeze_encoder else "target = online"
        told = [f"actions: {cfg.actions}, hidden in {cfg.action_drop:.0%} of the clips"] if cfg.action_names else []
        target = f"target {sizes['target']:.2f} M, frozen" if cfg.teacher == "frozen" else target
        grid = f"grid {' x '.join(map(str, cfg.grid))} = {cfg.num_tokens} tokens"
        return [
            f"parameters: {', '.join(f'{name} {sizes[name]:.2f} M' for name in nets)} ({target})",
            f"clip: {cfg.num_frames} frames of {cfg.height} x {cfg.width}, {spread} -> {grid}; "
            f"visible under a mask: {', '.join(visible)}",
            *told,
            f"step: {clips} clips, {sum(flops.values()) * clips / 1e12:.3g} TFLOP ({', '.join(shares)}); memory about "
            f"{memory_estimate_gb(cfg, held):.1f} GB per process plus the framework",
        ]

    def flops(self):
        return flops_per_clip(self.cfg, self.target.cfg)

    @staticmethod
    def typical_part(cfg, device):
        """An encoder block, on a CPU for at most 128 tokens: about a GFLOP is enough there to tell."""
        num_tokens, num_clips = cfg.now_tokens, cfg.batch_size
        if device.type == "cpu":
            num_tokens = min(num_tokens, 128)
            num_clips = min(num_clips, math.ceil(3e8 / block_flops(num_tokens, cfg.enc_dim, cfg.mlp_ratio)))
        block = Block(cfg.enc_dim, cfg.num_heads, cfg.mlp_ratio, 0.0)
        return block, torch.randn(num_clips, num_tokens, cfg.enc_dim)

    def snapshot(self):
        return {
            **{name: getattr(self, name).state_dict() for name in self.NETWORKS},
            "soon_predictor": self.soon_predictor.state_dict() if self.soon_predictor else None,
            "flow_stats": self.space.state_dict(),
            "outcome_queue": {"keys": self.queue, "filled": self.queue_filled},
            **({"action_stats": {"mean": self.action_mean, "std": self.action_std}} if self.cfg.action_names else {}),
        }

    def expect(self, state):
        self.soon_predictor = None
        if state["after"] and state.get("soon_predictor") is not None:  # else SOON is fitted anew
            self.split_soon_predictor()
        if not 0 <= (filled := int(state["outcome_queue"]["filled"])) <= len(self.queue):
            raise ValueError(f"outcome_queue: {filled} of {len(self.queue)} places filled")

    def restore(self, state):
        super().restore(state)
        self.beside = ()

    def phases(self):
        cfg, fits = self.cfg, (("soon", self.cfg.soon_fit_steps), ("flow", self.cfg.flow_fit_steps))
        return [fit for fit in fits if fit[1] and cfg.flow_fit_clips and cfg.lambda_flow]

    def phase_groups(self, name):
        net = (self.soon_predictor or self.predictor) if name == "soon" else self.flow
        return [param_group(self.cfg, "no_decay", list(net.parameters()), self.cfg.flow_fit_lr)]

    def open_phase(self, name, run, before):
        return {"soon": SoonFit, "flow": FlowFit}[name](self, run, before)

    @torch.no_grad()
    def see(self, frames, actions=None):
        """Look at clips, uint8 or normalised, [B, T, 3, H, W], T at least NOW and whole tubelets -> (context of NOW
        [B, K, D], point forecast of the future [B, F, D], with `actions` as in `sample_futures`, targets of all frames
        there are [B, L, D])."""
        context = self.now_context(frames)
        return context, self.forecast(context, actions=actions), self.make_targets(self.normalise(frames))

    @torch.no_grad()
    def sample_futures(self, clip_or_context, num_samples, num_steps=None, generator=None, actions=None):
        """Draw joint futures in target-latent space -> [B, S, F, D]: SOON tokens, then EVENTUALLY chunk means.

        Takes clips as `now_context` does, or a NOW context [B, K, D]. `generator` must live on the model's device. Uses
        the flow net's EMA. `actions`: means over every SOON and EVENTUALLY tubelet in SI units, floats [B, t, A] in the
        order of the config's `actions`, or None: passive. UsageError for others, and where the world knows none.
        """
        cfg, context = self.cfg, clip_or_context
        context = self.now_context(context) if context.dim() == 5 else context
        given, flow = self.told(len(context), actions), self.flow_ema
        point = self.forecast(context, self.predict_soon(context, given))  # [B, F, D]
        shape = (len(context), num_samples, cfg.flow_tokens, cfg.flow_rank)
        noise = torch.randn(shape, generator=generator, device=context.device)
        y = sample_flow(flow, flow.project(context, *given), noise, num_steps or cfg.flow_steps, cfg.tau_shift)
        residual = self.space.decode(y.flatten(0, 1)).unflatten(0, shape[:2])  # [B, S, F, D]
        if cfg.flow_rest == "gaussian":
            scale = (self.space.rest_variance * self.space.variance).sqrt()
            residual = residual + scale * torch.randn(residual.shape, generator=generator, device=context.device)
        return point[:, None] + residual


# ---------------------------------------------------------------------------------------------------------------------
# 24  Checkpoint: state of a run <-> file
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is: steps and samples of all ranks in training, steps of the phases after it, seconds over all
    restarts, steps skipped; the step whose evaluation the world has taken in; what the best evaluation so far had of
    the figure best_by, less being better, and its step."""

    step: int = 0
    after: int = 0
    consumed: int = 0
    seconds: float = 0.0
    skipped: int = 0
    validated: int = 0
    best: float = math.inf
    best_step: int = 0

    @property
    def total(self):
        """All optimizer steps: what logs and names of checkpoints count."""
        return self.step + self.after


BEST = "ckpt_best.pt"  # that of the best evaluation; never resumed from unasked, never deleted
WRITTEN = ".written.json"  # in the folder of checkpoints: size, time and SHA-256 of each one that a run wrote there


def size_and_time(path):
    """What tells a checkpoint from any other file of its name: [size, time of its last change in ns]."""
    info = os.stat(path)
    return [info.st_size, info.st_mtime_ns]


def written_record(folder):
    """What is on record in a folder of checkpoints -> {name: [[size, time, SHA-256], that of the one before]}. Where it
    is absent or damaged nothing is proven, and nothing is deleted."""
    return {
        name: known
        for name, known in read_mapping(folder / WRITTEN, 2**22).items()
        if os.path.lexists(folder / name)
        and isinstance(known, list)
        and all(isinstance(entry, list) and len(entry) == 3 for entry in known)
    }


def recorded_hashes(path):
    """SHA-256 on record for a checkpoint that is the very file a run wrote -> list, empty for anything else."""
    known = written_record(path.parent).get(path.name, []) if path.is_file() else []
    return [sha256 for *written, sha256 in known if written == size_and_time(path)]


def is_written(path):
    """Whether a run wrote this checkpoint, by its record: no other file is ever overwritten or deleted."""
    return bool(recorded_hashes(path))


SHARD = r"__\d+_\d+\.distcp"  # the files of torch.distributed.checkpoint, of one rank each


def shards_folder(path):
    """Where the sharded tensors of a checkpoint lie that has any: ckpt_<step>_shards, beside it."""
    return path.with_name(f"{path.stem}_shards")


def delete_shards(path):
    """Delete what a run wrote, by its record, of the shards of a checkpoint that is gone, and their folder where
    nothing is left."""
    folder = shards_folder(path)
    for size, changed, name in () if os.path.lexists(path) else written_record(path.parent).get(folder.name, ()):
        if (shard := folder / str(name)).is_file() and size_and_time(shard) == [size, changed]:
            shard.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def drop_unfinished(folder):
    """Delete the temporary folder of a save that came to nothing; what is not of torch in it stays."""
    with suppress(OSError):  # the error that led here tells more, and somebody's file may be in it
        for path in folder.iterdir():
            if re.fullmatch(rf"{SHARD}|\.metadata(\.tmp)?", path.name):
                path.unlink()
        folder.rmdir()


def place_shards(folder, path, is_new=False):
    """Name a folder of shards for a checkpoint, and put on record which files in it a run wrote: all of a new one, else
    those that were. What has that name is moved aside."""
    target, record = shards_folder(path), written_record(path.parent)
    if os.path.lexists(target):
        move_aside(target)
    known = written_record(folder.parent).get(folder.name, [])
    record[target.name] = [[*size_and_time(each), each.name] for each in folder.iterdir()] if is_new else known
    write_atomic(path.parent / WRITTEN, lambda handle: handle.write(json.dumps(record).encode()))
    os.replace(folder, target)


def note_written(path, source, sha256, shards=None):
    """Put on record that a run wrote the file `source`, about to be named `path`; what has that name until then stays
    on record, not what another run was about to give it when it was killed. Its new shards are named first: should the
    run be killed in between, `source` shows that they are orphans."""
    if shards is not None:
        place_shards(shards, path, is_new=True)
    record = written_record(path.parent)
    there = [entry for entry in record.get(path.name, []) if entry[:2] == size_and_time(path)]
    record[path.name] = [[*size_and_time(source), sha256], *there[:1]]
    write_atomic(path.parent / WRITTEN, lambda handle: handle.write(json.dumps(record).encode()))


def free_name(path):
    """Move what stands under a checkpoint's name aside, unless a run wrote it."""
    if os.path.lexists(path) and not is_written(path):
        move_aside(path)


def move_checkpoint(path, target):
    """Rename a checkpoint, over an older one of that name if there is one."""
    free_name(target)
    if hashes := recorded_hashes(path):
        note_written(target, path, hashes[0])
    os.replace(path, target)
    if (shards := shards_folder(path)).is_dir():
        place_shards(shards, target)
    sync_folder(target.parent)


def sha256_of(content):
    """SHA-256 of bytes, as text."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(path):
    """SHA-256 of a file's bytes, as text."""
    found = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def misfit(path, known):
    """Why a file is none of those with these SHA-256 -> text, "" where it is."""
    found = sha256_of_file(path)
    return "" if found in known else f"its SHA-256 is {found[:12]}..., not {str(known[0])[:12]}..."


@lru_cache(maxsize=8)
def source_text(path=__file__):
    """A source file as text, read once when a run begins: what runs, whatever becomes of the file on disk."""
    return Path(path).read_text(encoding="utf-8")


def identity(world):
    """What tells a world, its class, from any other -> {name, file, sha256}. A file below this one's folder is named
    from there; this file itself has one name, whatever a copy of it is called."""
    path, own = Path(inspect.getfile(world)).resolve(), Path(__file__).resolve()
    file = path.relative_to(own.parent) if path.is_relative_to(own.parent) else path
    sha256 = sha256_of(source_text(str(path)).encode())
    return {"name": world.__name__, "file": f"{MARK}.py" if path == own else file.as_posix(), "sha256": sha256}


def subclasses(cls):
    """All classes derived from a class, in the order of their definition."""
    return [each for child in cls.__subclasses__() for each in (child, *subclasses(child))]


class WrongWorld(UsageError):
    """A checkpoint of another world, or of one whose file is not there."""


def import_world(path, name):
    """The class `name` of a world file, imported under a name of its own: two files may share a stem. WrongWorld."""
    module = f"world_{sha256_of(path.read_bytes())[:12]}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[module])
        except (Exception, SystemExit) as error:  # somebody's code: anything may come out of it
            del sys.modules[module]
            why = f"{type(error).__name__}: {flat(error)}"
            raise WrongWorld(f"world file {path} cannot be imported ({why})") from error
    world = getattr(sys.modules[module], name, None)
    if not isinstance(world, type) or not issubclass(world, World):
        raise WrongWorld(f"world file {path} holds no world called {one_line(name)}")
    return world


def find_world(saved):
    """What a checkpoint says of its world -> the class: one that is loaded, else from the file it names, or from one of
    that name in worlds/. WrongWorld when there is none. A file in another folder called worlds is run only while it has
    the content that the checkpoint knows; no other file is ever run on a checkpoint's word."""
    name, file, sha256 = (saved[key] for key in ("name", "file", "sha256"))
    for world in reversed(subclasses(World)):
        if world.__name__ == name and identity(world)["file"] == file:
            return world
    here = Path(__file__).resolve().parent
    named, twin = (here / file).resolve(), here / "worlds" / Path(file).name
    for path in (named, twin):
        known = path.is_file() and (named == twin or sha256_of(path.read_bytes()) == sha256)
        if known and path.parent.name == "worlds":
            return import_world(path, name)
    missing = f"made by the world {one_line(name)} of {one_line(file)}, and there is no such file"
    raise WrongWorld(f"{missing}; put it into {here}/worlds, or import it first")


CHECKPOINT_FORMAT = 3  # 3: any world, steps after training; 2: VJepaAutoV2 alone
# fmt: off
LOOP_KEYS = (
    "format", "step", "after", "consumed", "seconds", "skipped", "cfg", "world", "frozen", "opt", "phase_opt", "scaler",
    "rng", "world_size", "precision", "data", "source",
)
# fmt: on


def frozen_hashes(world):
    """SHA-256 of the weights of every FROZEN child -> {name: hash}. Collective where they are sharded."""
    hashes = {}
    for name in world.FROZEN:
        found = hashlib.sha256()
        for key, value in getattr(world, name).state_dict().items():
            found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            found.update(whole(value).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        hashes[name] = found.hexdigest()
    return hashes


def checkpoint_state(run):
    """Everything a restart needs as one dict of tensors and plain values; collective, since every rank adds its RNG.
    What is sharded stays so."""
    process, world = run.process, run.world
    cuda_rng = torch.cuda.get_rng_state(process.device) if process.device.type == "cuda" else None
    own = {
        "format": CHECKPOINT_FORMAT,
        **asdict(run.progress),
        "cfg": asdict(world.cfg),
        "world": {**identity(type(world)), "mark": world.mark},
        "frozen": run.frozen,
        "opt": run.optimizer.state_dict(),
        "phase_opt": run.phase_optimizer and run.phase_optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": process.collect({"torch": torch.get_rng_state(), "cuda": cuda_rng}),
        "world_size": process.world_size,
        "precision": PRECISIONS[process.amp_dtype],
        "data": run.source.listing(),
        "source": source_text(),
    }
    snapshot = world.snapshot()
    if taken := {*own, "shards"} & snapshot.keys():
        raise ValueError(f"{type(world).__name__}.snapshot: the loop itself uses the name {min(taken)}")
    return {**own, **snapshot}


def take_shards(thing, shards, place=()):
    """A state with None in place of its sharded tensors, which go into shards {their keys: tensor}."""
    if isinstance(thing, dict):
        return {key: take_shards(value, shards, (*place, key)) for key, value in thing.items()}
    if not is_sharded(thing):
        return thing
    shards[place] = thing.detach()


def gather_state(thing, is_kept):
    """A state with its sharded tensors whole and on the CPU where `is_kept`, else without them. Collective."""
    if isinstance(thing, dict):
        return {key: gather_state(value, is_kept) for key, value in thing.items()}
    full = whole(thing)
    return thing if full is thing else full.cpu() if is_kept else None


def write_shards(process, shards, folder):
    """Let every rank write its parts of sharded tensors {keys: tensor} into a new folder -> {"files": {name: [size,
    SHA-256]}, "tensors": [[keys, shape, dtype, [[offsets, sizes, file, offset in it, bytes] of each piece]]]}, as the
    pickle beside them is never read; or the OSError of a disk."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    files, reason, tensors = {}, "", []
    named = {"/".join(map(str, place)): value for place, value in shards.items()}
    try:
        written = dcp.save(named, storage_writer=dcp.FileSystemWriter(folder))
        for path in folder.glob(f"__{process.rank}_*.distcp"):
            files[path.name] = [os.stat(path).st_size, sha256_of_file(path)]
        at = {(index.fqn, index.offset): found for index, found in written.storage_data.items()}
        for place, (name, value) in zip(shards, named.items()):
            found = [(chunk, at[name, chunk.offsets]) for chunk in written.state_dict_metadata[name].chunks]
            pieces = [[[*c.offsets], [*c.sizes], f.relative_path, f.offset, f.length] for c, f in found]
            tensors.append([[*place], [*value.shape], value.dtype, pieces])
    except CheckpointException as error:  # of any rank, known to all
        reason = "; ".join(f"rank {rank}: {reason_of(cause)}" for rank, (cause, _) in error.failures.items())
    except OSError as error:
        reason = f"rank {process.rank}: {reason_of(error)}"
    reasons, parts = zip(*process.collect((reason, files)))
    files = {name: entry for part in parts for name, entry in part.items()}
    if any(reasons):
        return OSError(errno.EIO, next(filter(None, reasons)))
    if process.is_main and (absent := sorted(name for name in files if not (folder / name).is_file())):
        return OSError(errno.ENOENT, f"{absent[0]} of another node is not there: all must share the disk of out_dir")
    return {"files": files, "tensors": tensors}


def read_shards(state, path):
    """Put the tensors that lie beside a checkpoint into it, whole and on the CPU. ValueError, OSError for a file that
    is missing or is not the one that was written."""
    known, folder = state.pop("shards"), shards_folder(path)
    with ExitStack() as opened:
        handles = {}
        for name, (size, sha256) in known["files"].items():
            if not re.fullmatch(SHARD, name):
                raise ValueError(f"shards: {shown(name)} is no name of one")
            if (there := os.stat(folder / name).st_size) != size:
                raise ValueError(f"{folder.name}/{name} has {there} bytes, not {size}")
            if why := misfit(folder / name, [sha256]):
                raise ValueError(f"{folder.name}/{name}: {why}")
            handles[name] = opened.enter_context(open(folder / name, "rb"))
        for place, shape, dtype, pieces in known["tensors"]:
            tensor = torch.empty(shape, dtype=dtype)
            for offsets, sizes, name, begin, length in pieces:
                handles[name].seek(begin)
                part = torch.load(io.BytesIO(handles[name].read(length)), map_location="cpu", weights_only=True)
                tensor[tuple(slice(o, o + size) for o, size in zip(offsets, sizes))].copy_(part)
            if sum(math.prod(sizes) for _, sizes, *_ in pieces) != tensor.numel():
                raise ValueError(f"shards: pieces of {'/'.join(map(str, place))} are missing")
            node = reduce(operator.getitem, place[:-1], state)
            node[place[-1]] = tensor


def checkpoint_files(out_dir):
    """Finished checkpoints of a run folder, oldest first -> [(step, path)]; ckpt_final.pt counts as the newest."""
    paths = (Path(out_dir) / "checkpoints").glob("ckpt_*.pt")
    found = [(match[1], path) for path in paths if (match := re.fullmatch(r"ckpt_(\d+|final)\.pt", path.name))]
    return sorted((math.inf if step == "final" else int(step), path) for step, path in found)


def steps_of(state):
    """All optimizer steps that a checkpoint's run had done."""
    return state["step"] + state.get("after", 0)


def save_checkpoint(state, out_dir, cfg, final, best=False, shards=None):
    """Write ckpt_<step>.pt, ckpt_final.pt or ckpt_best.pt atomically, and name the folder of its `shards`, then drop
    what exceeds keep_last -> path. OSError where the disk refuses: what was there before still stands."""
    folder = Path(out_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (BEST if best else "ckpt_final.pt" if final else f"ckpt_{steps_of(state)}.pt")
    free_name(path)
    write_atomic(path, lambda handle: torch.save(state, handle), partial(note_written, path, shards=shards))
    numbered = [old for step, old in checkpoint_files(out_dir) if step != math.inf and is_written(old)]
    for old in numbered[: -cfg.keep_last]:
        old.unlink()
        delete_shards(old)
    return path


class BadCheckpoint(UserError):
    """A checkpoint file that cannot be trusted."""


def damage_of(path):
    """What is wrong with the bytes of a checkpoint -> text, "" when they are those that were written.

    Its SHA-256 is on record beside it. Where it was copied without that, the archive's own CRC-32 must do, which
    torch.load does not compare: of bits flipped in the archive's directory one in 300 gets by with other content.
    """
    known = [entry[2] for entry in written_record(path.parent).get(path.name, [])]
    if not known:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        return f"checksum of {damaged}" if damaged else ""
    return misfit(path, known)


def saved_config(state, world):
    """The config in a checkpoint, less fields that the world no longer has. ValueError, TypeError where it is none."""
    cfg = config_of(world.Config, state["cfg"])
    try:
        validate_config(cfg)
    except UsageError as error:  # no error of the user's
        raise ValueError(str(error)) from error
    return cfg


@lru_cache(maxsize=4)
def checkpoint_template(world, cfg_json):
    """A config as JSON -> (a world of it without memory, its optimizer): what a checkpoint is compared with."""
    cfg = saved_config({"cfg": json.loads(cfg_json)}, world)
    try:
        with torch.device("meta"):
            model = world(cfg)
    except RuntimeError:  # it reads values while it is built, as .item() or weights from a file do: made, then emptied
        model = world(cfg).to("meta")
    return model, model.optimizer()


def compare_tensors(found, wanted, name):
    """ValueError unless a dict of tensors has the keys, shapes and types of another."""
    if odd := found.keys() ^ wanted.keys():
        raise ValueError(f"{name}: {shown(sorted(map(str, odd))[0])} is missing or too much")
    for key, tensor in wanted.items():
        value, kind = found[key], (tensor.shape, tensor.dtype, torch.strided, "cpu")
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor or (value.shape, value.dtype, value.layout, value.device.type) != kind:
            raise ValueError(f"{name}: {key} is not a {str(tensor.dtype)[6:]} of shape {list(tensor.shape)}")


def same_kind(value, wanted):
    """Whether a setting of an optimizer is of another one's kind: flags, finite numbers, texts, lists of such."""
    if isinstance(wanted, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(wanted) and all(map(same_kind, value, wanted))
    if wanted is None or isinstance(wanted, bool):
        return value is None or isinstance(value, bool)
    return isinstance(value, str) if isinstance(wanted, str) else fits(float, value) and math.isfinite(value)


def compare_optimizer(found, optimizer, name="opt"):
    """ValueError unless an optimizer can have this state. Later versions of torch may add settings."""
    for group, wanted in zip(found["param_groups"], optimizer.state_dict()["param_groups"], strict=True):
        odd = [key for key, value in wanted.items() if key in group and not same_kind(group[key], value)]
        if odd or group["params"] != wanted["params"] or not {"lr", "weight_decay", "peak_lr"} <= group.keys():
            raise ValueError(f"{name}: a group of parameters has other settings{': ' + odd[0] if odd else ''}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in found["state"].items():
        moment = parameters[operator.index(number)]
        if isinstance(optimizer, torch.optim.AdamW):  # what others keep of a parameter only they know
            wanted = {"step": torch.empty((), device="meta"), "exp_avg": moment, "exp_avg_sq": moment}
            compare_tensors({key: entry[key] for key in wanted}, wanted, f"{name} {number}")


def phase_at(phases, after):
    """Which of the phases [(name, steps)] step number `after` after training belongs to -> (name, steps before it);
    ("", all of them) when they are done."""
    begin = 0
    for name, steps in phases:
        if after < begin + steps:
            return name, begin
        begin += steps
    return "", begin


def check_insides(state, world):
    """ValueError, or whatever else wrong types lead to, unless a checkpoint holds what one of its own config holds."""
    model, optimizer = checkpoint_template(world, json.dumps(asdict(saved_config(state, world))))
    counts, data = "step after consumed skipped validated best_step world_size".split(), state["data"]
    good = {name: fits(int, state[name]) and 0 <= state[name] < 2**62 for name in counts}
    good["best"] = fits(float, state["best"]) and not math.isnan(state["best"])
    good["seconds"] = fits(float, state["seconds"]) and 0 <= state["seconds"] < math.inf
    good["precision"] = state["precision"] in PRECISIONS.values()
    for name in good:
        if not good[name]:
            raise ValueError(f"{name} = {shown(state[name])}")
    names = data.get("names", [])
    if not isinstance(names, list) or not fits(int, data.get("files", 0)):
        raise ValueError("data: its listing is a count and a list of names")
    if not all(isinstance(text, str) for text in (state["source"], data["kind"], data["root"], *names)):
        raise ValueError("source and data must be texts")
    if state["frozen"].keys() != set(model.FROZEN) or not all(map(same_kind, state["frozen"].values(), model.FROZEN)):
        raise ValueError(f"frozen: no hashes of {', '.join(model.FROZEN) or 'nothing'}")
    model.expect(state)
    for name, wanted in model.snapshot().items():
        if wanted is not None:
            compare_tensors(state[name], wanted, name)
    compare_optimizer(state["opt"], optimizer)
    if state["phase_opt"] is not None:
        name, _ = phase_at(model.phases(), state["after"] - 1)
        with torch.device("meta"):
            compare_optimizer(state["phase_opt"], torch.optim.AdamW(model.phase_groups(name), fused=True), "phase_opt")
    wanted = torch.amp.GradScaler("cpu", enabled=True).state_dict()
    if state["scaler"] and not all(same_kind(state["scaler"][name], 1) for name in wanted):
        raise ValueError("scaler: not all of its values are numbers")
    if not state["rng"] or len(state["rng"]) != state["world_size"]:
        raise ValueError(f"rng: of {len(state['rng'])} ranks, world_size = {state['world_size']}")
    for rng in state["rng"]:
        torch.Generator().set_state(rng["torch"])
        if rng["cuda"] is not None and rng["cuda"].dtype != torch.uint8:
            raise ValueError("rng: not bytes")


def upgrade(state):
    """The entries of a checkpoint of format 2, which only VJepaAutoV2 wrote, as they are now."""
    steps = [state["cfg"].get(name, 0) for name in ("soon_fit_steps", "flow_fit_steps")]
    world = {"name": "VJepaAutoV2", "file": f"{MARK}.py", "sha256": sha256_of(state["source"].encode())}
    new = {"format": CHECKPOINT_FORMAT, "after": sum(steps) if state.get("flow_fitted") else 0, "world": world}
    return {"precision": "fp32", "soon_predictor": None, **state, **new, "frozen": {}, "phase_opt": None}


def read_checkpoint(path):
    """A checkpoint, its bytes proven, loaded with weights_only -> its dict. BadCheckpoint for another format."""
    if damage := damage_of(path):
        raise zipfile.BadZipFile(damage)
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state if isinstance(state, dict) else {}
    if "shards" in state:
        read_shards(state, path)
    if "format" in state and state["format"] not in (2, CHECKPOINT_FORMAT):
        known = f"this file reads formats 2 and {CHECKPOINT_FORMAT}"
        raise BadCheckpoint(f"checkpoint {path}: format {shown(state['format'])}, {known}")
    state = upgrade(state) if state.get("format") == 2 else state
    if missing := ", ".join(sorted(set(LOOP_KEYS) - state.keys())):
        raise BadCheckpoint(f"checkpoint {path}: not a VJepa_AUTO_V2 checkpoint (it lacks {missing})")
    return {**asdict(Progress()), **state}  # what early checkpoints of format 3 lack


def world_of(state, world=None):
    """The world that made a checkpoint. WrongWorld when it is not the one given, that is of another name, or of another
    file with other content, or cannot be found."""
    saved = state["world"]
    if not all(isinstance(saved[key], str) for key in ("name", "file", "sha256")):
        raise ValueError(f"world: {shown(list(saved.values()))} are not three texts")
    if world is None:
        return find_world(saved)
    own = identity(world)
    if saved["name"] == own["name"] and (saved["file"] == own["file"] or saved["sha256"] == own["sha256"]):
        return world
    made_by = f"made by the world {one_line(saved['name'])} ({one_line(saved['file'])})"
    cure = "use another --out_dir, or --resume never"
    raise WrongWorld(f"{made_by}, this is {own['name']} ({own['file']}); {cure}")


def load_checkpoint(path, world=None, instead="use another one, or --resume never", init_from=""):
    """Read a checkpoint -> state dict on the CPU. BadCheckpoint, with what to do `instead`, where it is damaged or none
    of ours, UsageError where it is absent or of another world than the one given. `init_from`: where the weights are
    now that it names in a place that is gone."""
    path = Path(path)
    if not os.path.lexists(path):
        raise UsageError(f"resume {path}: no such checkpoint")
    if not path.is_file():
        raise BadCheckpoint(f"checkpoint {path}: not a file, but a folder, a pipe or a link to nothing; {instead}")
    try:
        state = read_checkpoint(path)
        name = "init_from" if state["cfg"].get("init_from") else "backbone"
        if init_from and os.path.exists(init_from) and not os.path.exists(state["cfg"].get(name) or "."):
            state["cfg"][name] = init_from
        check_insides(state, world_of(state, world))
    except WrongWorld as error:
        raise WrongWorld(f"checkpoint {path}: {error}") from error
    except UserError:  # of the world's own, too: say, of weights that are not on this machine
        raise
    except Exception as error:  # a foreign file makes the unpickler, and whoever looks at its insides, raise anything
        why = f"not readable, damaged or made by another version ({type(error).__name__}: {flat(error)[:160]})"
        raise BadCheckpoint(f"checkpoint {path}: {why}; {instead}") from error
    return state


def newest_checkpoint(out_dir, tell, world=None, init_from=""):
    """Newest checkpoint of a run folder that can be trusted -> (state, path), (None, None) where there is none. Damaged
    ones are told and passed over; when all are, that is a UserError: a run never starts anew by itself."""
    reasons = []
    for _, path in reversed(checkpoint_files(out_dir)):
        try:
            state = load_checkpoint(path, world, init_from=init_from)
        except BadCheckpoint as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            tell(f"WARNING: {reason}")
        return state, path
    if reasons:
        none = "none of its checkpoints can be read, so nothing starts over unasked"
        raise UserError(f"out_dir {out_dir}: {none}; the newest: {reasons[0]}")
    return None, None


def check_same_run(state, cfg, path):
    """UsageError naming the fields in which a checkpoint and this config cannot be the same run. Whether a loss has
    weight decides which parameters learn."""
    earlier = asdict(config_of(type(cfg), state["cfg"]))
    plain, saved = (json.loads(json.dumps(values)) for values in (asdict(cfg), earlier))
    names = [name for cls in reversed(type(cfg).__mro__) for name in vars(cls).get("MUST_MATCH", ())]
    different = [name for name in names if plain[name] != saved.get(name)]
    different += [name for name in plain if name.startswith("lambda_") and bool(plain[name]) != bool(saved.get(name))]
    if different:
        listed = "; ".join(f"{name} = {plain[name]} (checkpoint: {saved.get(name)})" for name in different)
        cure = "use the same values, another --out_dir, or --resume never"
        raise UsageError(f"resume {path}: made by another config: {listed}; {cure}")


def check_frozen(state, world, path):
    """UsageError when FROZEN parts are others than those of which a checkpoint holds the hashes."""
    hashes = frozen_hashes(world)
    changed = [name for name in {**hashes, **state["frozen"]} if state["frozen"].get(name) != hashes.get(name)]
    if changed:
        others = "are others than those it was made with"
        raise UsageError(f"checkpoint {path}: the frozen weights of {', '.join(changed)} {others}")


def cut_moments(saved, optimizer):
    """The state of an optimizer, saved whole -> the same, cut as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            key: cut_like(parameters[number], value) if value.shape else value  # steps are whole
            for key, value in entry.items()
        }
        for number, entry in saved["state"].items()
    }
    return {**saved, "state": state}


def restore_run(state, run):
    """Load optimizer, scaler and, when the number of ranks is the same, each rank's random state."""
    run.optimizer.load_state_dict(cut_moments(state["opt"], run.optimizer))
    if state["scaler"]:  # empty where the run so far needed none
        run.scaler.load_state_dict(state["scaler"])
    if state["world_size"] == run.process.world_size:
        rng = state["rng"][run.process.rank]
        torch.set_rng_state(rng["torch"])
        if rng["cuda"] is not None and run.process.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], run.process.device)


def load_model(path, device="cpu", world=None, init_from=""):
    """Checkpoint -> (its world in eval mode on the device, its config): what tools and notebooks start from. The world
    is found by what the checkpoint says, unless its class is given. `init_from`: where its frozen weights are now, if
    they were moved."""
    state = load_checkpoint(path, world, "use another one", init_from)
    world = world_of(state, world)
    cfg = saved_config(state, world)
    model = world(cfg)
    check_frozen(state, model, path)
    model.restore(state)
    return model.to(device).eval(), cfg


# ---------------------------------------------------------------------------------------------------------------------
# 25  Log and folder: what a run says, and where it writes
# ---------------------------------------------------------------------------------------------------------------------


def log_keys(world):
    """{key: meaning} of the log lines of a world, its class, in their order."""
    own = {**world.KEYS, **world.TRAIN_KEYS}
    before = {
        "step": "optimizer steps done, those after training included",
        "phase": "which fit after training the step belongs to; absent in training",
        "loss_total": "weighted sum of the losses that train",
    }
    between = {
        "lr": "learning rate of the first group of parameters",
        "grad_norm": "gradient norm before clipping, without groups that are clipped apart",
    }
    after = {
        "clips_per_s": "clips per second over all ranks since the last line, warm-up left out",
        "data_wait": "share of that time spent waiting for the loader",
        "mem_gb": "peak memory in GB: GPU memory on cuda, else resident memory of rank 0",
        "bad_files": "files that could not be decoded so far, named in bad_files.jsonl",
        "skipped_steps": "steps skipped so far for a non-finite loss or gradient",
        "time": "seconds since the run started, over all restarts",
    }
    if taken := own.keys() & {*before, *between, *after, "clips"}:
        raise TypeError(f"{world.__name__}: the loop itself logs {min(taken)}; give yours another name")
    losses = {key: text for key, text in own.items() if key.startswith("loss_")}
    others = {key: text for key, text in own.items() if key not in losses}
    return {**before, **losses, **between, **others, **after}


def val_keys(world):
    """{key: meaning} of what an evaluation logs beside step and phase, in its order."""
    return {
        "val_loss_total": "loss_total on held-out data",
        **{f"val_{key}": f"{key} on held-out data" for key in world.KEYS},
        **{f"val_{key}": text for key, text in world.VAL_KEYS.items()},
        "val_clips": "held-out clips that this evaluation saw; fewer than asked for when the last one ran out of time",
    }


def run_info(run):
    """Versions, commit, world, data and decoders, as they are tried in turn, of a run for config.json -> dict."""
    source, commit = run.source, ""
    if git := shutil.which("git"):
        head = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "numpy", "av")}
    counts = {"train_files": len(source.train), "val_files": len(source.val)}
    counts |= {"test_files": len(source.test)} if source.split_by != "hash" else {}
    decoders = DECODERS[run.cfg.decoder] if hasattr(run.cfg, "decoder") else ()
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit or "unknown",
        "world": {**identity(type(run.world)), "mark": run.world.mark},
        "command": run.argv,
        "launch": os.environ.get("TORCHELASTIC_RUN_ID"),
        "data": {"kind": source.kind, "root": source.root, **counts},
        "decoders": [name for name in decoders if importlib.util.find_spec({"pyav": "av"}.get(name, name))],
    }


def format_number(value):
    """Short text of a logged value: four digits, integers whole."""
    return str(value) if isinstance(value, (int, str)) else f"{value:.4g}"


def write_rows(path, rows):
    """A list of dicts -> a jsonl file."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_atomic(path, lambda handle: handle.write(content))


class Tracker:
    """One of the packages that --track names. Whatever a foreign package raises costs the tracker, never the run."""

    def __init__(self, package, cfg, tell):
        self.package, self.tell = package, tell
        self.writer = self.call(self.open, cfg)

    def call(self, work, *args):
        """What work of the package gives; it is left out from its first failure on."""
        try:
            return work(*args)
        except (Exception, SystemExit) as error:  # a foreign package's, of any kind: a full disk, a login
            self.writer = None
            why = f"{type(error).__name__}: {error}"
            self.tell(f"WARNING: track: {self.package} failed ({why}) and is left out from here on")

    def open(self, cfg):
        """Start the package -> what takes the records."""
        folder = Path(cfg.out_dir)
        if self.package == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(str(folder / "tensorboard"))
        import wandb

        shared = dict(project="vjepa_auto_v2", name=folder.name, resume="allow")
        return wandb.init(dir=cfg.out_dir, config=asdict(cfg), **shared)

    def record(self, values):
        """Hand over one record of metrics.jsonl."""
        if self.writer is not None:
            numbers = {key: value for key, value in values.items() if key != "step" and not isinstance(value, str)}
            self.call(self.write, numbers, values["step"])

    def write(self, numbers, step):
        """One record in the package's own terms."""
        if self.package == "wandb":
            self.writer.log(numbers, step=step)
            return
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()


class RunLog:
    """Console text to stdout and train.log, records to metrics.jsonl, bad files to bad_files.jsonl. Silent off rank 0.

    `folder`: the RunFolder, without which nobody checks whether out_dir is still ours; with it a thread tells `stage`,
    what the run is at, whenever nothing else is said. A console that is lost costs nothing else.
    """

    def __init__(self, cfg, is_main, folder=None):
        self.folder, self.is_main, self.owner, self.pulse = Path(cfg.out_dir), is_main, folder, None
        self.bad, self.evaluated = {}, {}  # why each bad file is one; evaluations that were logged, by their step
        self.bar_width, self.pending, self.lost = 0, {}, ""  # lines that wait for the disk; how the console was lost
        self.stage, self.spoken = "starting", time.monotonic()
        self.lock, self.closed = threading.RLock(), threading.Event()
        packages = [package for package in cfg.track.split(",") if package and is_main]
        for package in packages:
            if importlib.util.find_spec(package) is None:
                cure = f"is not installed (pip install {package}), or leave --track out"
                raise UsageError(f"track = {cfg.track}: {package} {cure}")
        self.trackers = [Tracker(package, cfg, self.line) for package in packages]
        if is_main and folder is not None:
            self.pulse = threading.Thread(target=self.tell_stage, daemon=True)
            self.pulse.start()

    def tell_stage(self):
        """In a thread: say now and then what the run is at, for as long as nothing else is said."""
        while not self.closed.wait(min(1.0, SILENCE_S)):
            if time.monotonic() - self.spoken >= SILENCE_S:
                try:
                    self.line(f"at work: {self.stage}")
                except UserError:
                    return  # the folder is somebody else's now: the run itself meets that at its next line or save

    def line(self, text):
        """One line of console text."""
        if not self.is_main:
            return
        text = one_line(text, MAX_LINE) + "\n"
        with self.lock:
            wiped, self.bar_width = "\r" + " " * self.bar_width + "\r" if self.bar_width else "", 0
            self.show(wiped + text)
            self.append("train.log", text)

    def show(self, text):
        """Text on the console; the first time that it cannot be written is remembered."""
        self.spoken = time.monotonic()
        self.lost = self.lost or emit(text, sys.stdout)

    def append(self, name, text):
        """Add whole lines to a file of the run. While the disk refuses they wait in memory, and no half line stays."""
        with self.lock:
            path, size, told = self.folder / name, None, name in self.pending
            waiting = self.pending.pop(name, "") + text
            try:
                if self.owner is not None:
                    self.owner.check()
                size = path.stat().st_size if path.exists() else 0
                with open(path, "ab") as handle:
                    handle.write(waiting.encode())
            except OSError as error:
                self.pending[name] = waiting
                if not told:
                    say(f"WARNING: {path} cannot be written ({error.strerror}); its lines wait in memory", sys.stderr)
                if size is not None:
                    with suppress(OSError):  # a disk that refuses this as well has taken no half line either
                        os.truncate(path, size)

    def close(self):
        """The last word in train.log, where the console did not get all."""
        self.closed.set()
        if self.pulse is not None:
            self.pulse.join()
        for name in list(self.pending):
            self.append(name, "")
        if self.is_main and self.lost:
            why = f"the console was lost in this run ({one_line(self.lost)})"
            self.append("train.log", f"WARNING: {why}; this file holds all its lines\n")

    def bar(self, step, steps, text, what="step"):
        """Progress bar on a terminal; nothing elsewhere, where plain lines tell. `what` is counted."""
        self.stage = f"{what} {step} of {steps} is done"
        if self.is_main and is_terminal(sys.stdout):
            bar = progress_bar(step / steps, f"{step}/{steps} {text}")
            with self.lock:
                self.show("\r" + bar.ljust(self.bar_width))
                self.bar_width = len(bar)

    def record(self, values, mark=""):
        """One object in metrics.jsonl, null where JSON knows no NaN and no infinity, and one `key:value` line, prefixed
        by `mark`."""
        if not self.is_main:
            return
        absent = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        self.append("metrics.jsonl", json.dumps({**values, **dict.fromkeys(absent)}, allow_nan=False) + "\n")
        self.line(mark + " ".join(f"{key}:{format_number(value)}" for key, value in values.items()))
        for tracker in self.trackers:
            tracker.record(values)

    def add_bad(self, entries):
        """Name files that could not be decoded, each once, and once more when it must not be opened again. This is
        history, not what counts now."""
        for name, reason in entries:
            if name in self.bad and (self.bad[name].startswith(QUARANTINED) or not reason.startswith(QUARANTINED)):
                continue
            self.bad[name] = reason
            if self.is_main:
                self.append("bad_files.jsonl", json.dumps({"path": name, "reason": reason}) + "\n")
                self.line(f"bad file: {name}: {reason}")

    def read_rows(self, name, types):
        """The objects in a jsonl file of the run that have these keys; what else its lines hold, damaged or torn by a
        kill, is told and left out."""
        path, rows, damaged = self.folder / name, [], []
        for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
            try:
                row = parse_json(line.decode("utf-8"))
                if not all(fits(kind, row[key]) for key, kind in types.items()):
                    raise ValueError("a value of another type")
                json.dumps(row, allow_nan=False)  # 1e999 is read as infinity
            except (ValueError, TypeError, LookupError, RecursionError):
                damaged.append(str(number))
            else:
                rows.append(row)
        if damaged:
            numbers = ", ".join(damaged[:10]) + "..." * (len(damaged) > 10)
            self.line(f"WARNING: {path}: line {numbers} cannot be read, damaged or torn, and is left out")
        return rows

    def forget_after(self, step, finished):
        """Drop records beyond a resumed step, so that metrics.jsonl holds no step twice, and of a finished run its last
        evaluation; read the bad files and evaluations known so far, NaN for what is null."""
        rows = self.read_rows("metrics.jsonl", {"step": int})
        bad = self.read_rows("bad_files.jsonl", {"path": str, "reason": str})
        self.bad = {row["path"]: row["reason"] for row in bad}
        for row in rows:
            if values := {key: value for key, value in row.items() if key.startswith("val_")}:
                values = {key: float(value) if fits(float, value) else math.nan for key, value in values.items()}
                self.evaluated[row["step"]] = values
        rows = [row for row in rows if row["step"] < step + (not finished or "val_clips" not in row)]
        for path, kept in ((self.folder / "metrics.jsonl", rows), (self.folder / "bad_files.jsonl", bad)):
            if self.is_main and path.is_file():
                write_rows(path, kept)


# Names that belong to a run in its folder, checkpoints and the FILES of its world aside.
RUN_FILES = ("config.json", "status.json", "metrics.jsonl", "train.log", "bad_files.jsonl")


def sweep_folder(folder, files=()):
    """Delete the temporary files that killed writers left under a run's own names, those of its world included."""
    own = "|".join([r"ckpt_(\d+|final|best)\.pt", *map(re.escape, (WRITTEN, *RUN_FILES, *files))])
    for stale in [*folder.glob(".*.tmp"), *(folder / "checkpoints").glob(".*.tmp")]:
        if re.fullmatch(rf"\.({own})\.\d+\.tmp", stale.name) and stale.is_file():
            if stale.name.startswith(".ckpt_"):
                delete_shards(stale.with_name(".".join(stale.name.split(".")[1:3])))  # named just before
            stale.unlink(missing_ok=True)
        elif re.fullmatch(r"\.ckpt_\d+_shards\.\d+\.tmp", stale.name) and stale.is_dir():
            drop_unfinished(stale)


def clear_folder(folder, files=()):
    """Move aside what bears a run's name and cannot be a run's: all of it in a folder that no run has owned, which has
    neither a lease nor a config.json as runs write it, else what is no file (a pipe would block)."""
    checkpoints, config = folder / "checkpoints", read_mapping(folder / "config.json", 2**20)
    known = os.path.exists(folder / ".lease") or {"versions", "config"} <= config.keys()
    right = {folder / name: known and (folder / name).is_file() for name in (*RUN_FILES, *files)}
    right[checkpoints] = checkpoints.is_dir()
    right |= {path: path.is_file() for path in (folder / ".lease", checkpoints / WRITTEN)}
    for path in right:
        if os.path.lexists(path) and not right[path]:
            move_aside(path)


class RunFolder:
    """out_dir while a run owns it: nobody else writes there, and status.json says how the run stands and how it ended.

    The lock is a POSIX record lock on .lease, which the kernel drops with the process, whatever ends it: a lease cannot
    go stale. Forked loader workers do not inherit it. Ranks other than 0 hold nothing.
    """

    def __init__(self, cfg, process, files=()):
        self.folder, self.lease, self.step, self.reason = Path(cfg.out_dir), None, 0, ""
        self.closing, self.taken, self.where = [], False, "while it started; run the same command to go on"
        if not process.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.identity = self.folder.stat()
            clear_folder(self.folder, files)
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            self.take()
            sweep_folder(self.folder, files)
            self.write_status("running", None)
        except OSError as error:
            why = f"cannot be written ({reason_of(error)})"
            raise UserError(f"out_dir {cfg.out_dir}: {why}; choose another --out_dir") from error

    def take(self):
        """Lock .lease. UserError when another run holds it."""
        handle = open(self.folder / ".lease", "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            owner = handle.read(300).strip() or "unknown"
            handle.close()
            why = f"another run writes there ({owner}); stop it, or"
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                why = f"its file system gives no locks ({error.strerror}), so nothing would keep a second run away;"
            raise UserError(f"out_dir {self.folder}: {why} choose another --out_dir") from error
        handle.truncate(0)
        handle.write(f"host {socket.gethostname()}, pid {os.getpid()}")
        handle.flush()
        self.lease = handle

    def check(self):
        """OSError unless out_dir still is the folder whose lease this run holds: it may have been removed, and another
        run may have made it anew."""
        if self.lease is None:
            return
        try:
            self.taken = not os.path.samestat(os.stat(self.folder / ".lease"), os.fstat(self.lease.fileno()))
        except FileNotFoundError:
            if not os.path.samestat(os.stat(self.folder), self.identity):  # the folder's own absence is the error
                raise OSError(errno.ESTALE, "the folder was removed while the run writes there") from None
            self.take()  # the lease alone was deleted
        if self.taken:
            raise OSError(errno.ESTALE, "another run has made the folder anew and writes there")

    def write_status(self, state, exit_code):
        """Write status.json. state: running | finished | stopped | failed; running with a dead pid means killed."""
        values = {"state": state, "exit_code": exit_code, "step": self.step, "reason": self.reason}
        values |= {"host": socket.gethostname(), "pid": os.getpid(), "attempt": restart_count()}
        values["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.check()
        write_atomic(self.folder / "status.json", lambda handle: handle.write(json.dumps(values).encode()))

    def status(self, state, exit_code):
        """Write how the run ended, or say why that cannot be: it must not hide the end itself."""
        if self.lease is None:
            return
        try:
            self.write_status(state, exit_code)
        except (OSError, UserError) as error:
            say(f"WARNING: {self.folder}/status.json could not be written ({error})", sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Leave the folder and close what is in `closing`."""
        for thing in self.closing:
            thing.close()
        if error is not None:
            self.reason = flat(f"{kind.__name__}: {error}")[:500]
            self.status("failed", getattr(error, "exit_code", EXIT_ERROR))
        if self.lease is not None:
            self.lease.close()
            self.lease = None


def put_aside(cfg, files=()):
    """`--resume never` in a used folder: move the old run's files to previous_<k>, so that none is mixed or lost."""
    folder = Path(cfg.out_dir)
    old = [folder / name for name in ("checkpoints", *RUN_FILES, *files) if name != "status.json"]
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
# 26  Ranks: a world under DDP or FSDP
# ---------------------------------------------------------------------------------------------------------------------


def has_drifting_statistics(module):
    """Whether a module keeps statistics of the batches of its own rank."""
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    return is_norm and module.training and module.track_running_stats


def wrap(world, process):
    """DDP around a world where there are several ranks. Buffers are the world's own business."""
    if process.world_size == 1:
        return world
    devices = [process.device] if process.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers, which 2.10 needs
        return nn.parallel.DistributedDataParallel(
            world, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


class Sharded(nn.Module):
    """A world whose weights, gradients and moments lie in parts on all ranks (torch's fully_shard), scalars aside: what
    the loop calls in place of DDP. `plain` is the world without weights, for the time after training."""

    def __init__(self, world, process, is_compiled=False):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        self.module, self.units, self.device = world, shard_units(world), process.device
        self.scalars = [p for p in world.parameters() if not p.ndim]
        empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in world.parameters()}
        self.plain = (copy.deepcopy(world, {**empty, id(world.cfg): world.cfg}),)  # its weights are not this module's
        for module in self.units or [world] if is_compiled else ():
            module.forward = torch.compile(module.forward, dynamic=False)
        mesh = init_device_mesh(process.device.type, (process.world_size,))
        # made on the CPU; each unit is moved to the device, and cut there, before the next
        for module in (*self.units, self):
            fully_shard(module, mesh=mesh, ignored_params=set(self.scalars))
        for scalar in self.scalars:
            scalar.data = scalar.data.to(process.device)

    def forward(self, batch):
        try:
            return self.module(batch)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            why = "uses a part of a block outside of the block's own forward, where its weights are not gathered"
            raise UserError(f"{type(self.module).__name__} {why}; call the block itself") from error

    def describe(self):
        """A line about what is cut, in millions of numbers."""
        total, *sizes = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (self, *self.units))
        return (
            f"sharded: {total:.3g} M numbers over {self.module.world_size} processes; {len(sizes)} blocks of at most "
            f"{max(sizes, default=0):.3g} M are gathered one by one, {total - sum(sizes):.3g} M for the whole step, "
            "all for evaluations and after training"
        )

    def average(self):
        """Gradients of what is not cut, as means over ranks."""
        for parameter in self.scalars:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.div_(self.module.world_size))

    @contextmanager
    def gathered(self):
        """All weights whole on every rank."""
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
        for module in (*self.units, self):
            module.unshard()
        try:
            yield
        finally:
            for module in (*self.units, self):
                module.reshard()
            for unit in self.units:
                unit.set_reshard_after_forward(True, recurse=False)

    def dissolve(self):
        """The world in one piece on every rank, in eval mode: a module of its own. Collective."""
        (plain,), made = self.plain, {}
        for old in self.module.parameters():
            made[old] = nn.Parameter(whole(old).detach(), requires_grad=old.requires_grad)
        for name, old in self.module.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(owner), leaf, made[old])
        for new, old in zip(plain.to(self.device).buffers(), self.module.buffers()):
            new.copy_(old)
        return plain


def end_sharding(run):
    """After the last step of training: the run's world with whole weights on every rank; moments stay in parts."""
    if run.sharded:
        run.world, run.sharded = run.sharded.dissolve(), None
    return run.world


def build_world(world, run, is_new=False):
    """The world of a run with its optimizer, on the device -> what the loop calls: itself, or DDP or Sharded around it.
    Where a run `is_new`, its world takes in weights."""
    cfg, process = run.cfg, run.process
    is_cut = cfg.shard == "fsdp" and process.world_size > 1
    if cfg.shard == "fsdp" and amp_dtype(cfg, process.device) is torch.float16:
        raise UsageError(f"config: {refusal(cfg, 'shard', 'does not go with fp16: use --amp_type bf16, or no --amp')}")
    torch.manual_seed(cfg.seed)
    run.world = world(cfg, process.rank, process.world_size).to("cpu" if is_cut else process.device).train()
    drifting = [name for name, module in run.world.named_modules() if has_drifting_statistics(module)]
    if process.world_size > 1 and drifting:
        cure = "use GroupNorm or LayerNorm, or SyncBatchNorm on GPUs"
        raise UserError(f"{drifting[0]} is a BatchNorm that learns, and its statistics drift apart over ranks; {cure}")
    run.world.num_files = len(run.source.train)
    if is_new:
        run.world.take_weights(run.log.line)
        run.world.take_data(run)
    if is_cut:
        check_ranks(process, first_weights=digest(fingerprint(run.world)))
        run.sharded = Sharded(run.world, process, cfg.compile)
    elif cfg.shard == "fsdp":
        alone = "one process holds everything, so nothing is sharded (torchrun starts several)"
        run.log.line(f"note: shard = fsdp: {alone}")
    run.optimizer = run.world.optimizer()
    if cfg.compile:  # sizes that blocks of a kind are called with; beyond, they would run uncompiled
        torch._dynamo.config.recompile_limit = 64
    if cfg.compile and not is_cut:
        compile_world(run.world)
    return run.sharded or wrap(run.world, process)


# ---------------------------------------------------------------------------------------------------------------------
# 27  Steps: resume, rehearse, update, log, evaluate, save
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What travels together while a run lasts."""

    cfg: RunConfig
    process: Process
    folder: RunFolder
    log: RunLog
    source: DataSource = None
    world: World = None
    optimizer: object = None  # of training
    scaler: object = None
    phase_optimizer: object = None  # of the phase after training that the run is in
    progress: Progress = field(default_factory=Progress)
    argv: tuple = ()
    began: float = 0.0  # time.perf_counter() at which the run would have begun, had it never been interrupted
    sharded: object = None  # the Sharded around the world while it learns in parts

    @property
    def mark(self):
        """What stands before every log line when the data are not the user's, or the world says so."""
        marks = [f"data:{self.source.kind}" if self.source.kind != "videos" else "", self.world.mark]
        return "".join(f"{mark} " for mark in marks if mark)

    @cached_property
    def frozen(self):
        """Hashes of the world's FROZEN parts, made once: they never change, and may be large."""
        return frozen_hashes(self.world)

    def gathered(self):
        """Context in which every rank has all weights, for what is called past the hooks of a sharded world."""
        return self.sharded.gathered() if self.sharded else nullcontext()

    def loader(self, stream, first, num_batches, batch_size):
        """This rank's batches of a stream from sample number `first` on -> ClipLoader."""
        cfg, process = self.cfg, self.process
        workers = cfg.num_workers if stream == "train" else min(cfg.num_workers, 2)
        sampler = StepSampler(first, num_batches, batch_size, process.rank, process.world_size)
        options = dict(pin_memory=process.device.type == "cuda", nice=process.worker_nice(cfg))
        return open_loader(self.source, cfg, stream, sampler, workers, stopping=process.stop.asked, **options)

    def means(self, values, keys):
        """The values that have one of these keys, in their order, as means over ranks -> dict of floats."""
        names = [key for key in keys if key in values]
        return dict(zip(names, self.process.mean([values[name] for name in names])))


def step_samples(cfg, world_size):
    """Samples of an optimizer step, those of all ranks and micro-steps."""
    return cfg.batch_size * cfg.grad_accum * world_size


def is_replayed(world, process):
    """Whether the passes of a world are recorded as a CUDA graph: on one GPU, without a loss scaler."""
    alone = process.device.type == "cuda" and process.world_size == 1
    return world.cfg.cuda_graph and world.REPLAYS and alone and process.amp_dtype != torch.float16


def take_pass(phase, batch, count):
    """Forward and backward of one of `count` micro-steps -> what `forward` gives, detached."""
    with autocast(phase.run.process):
        found = phase.wrapped(batch)
    phase.run.scaler.scale(found[0]["loss_total"] / count).backward()
    return tuple({name: value.detach() for name, value in part.items()} for part in found)


class Recorder:
    """Passes of a phase that are recorded once as a CUDA graph and then replayed: the CPU starts one graph where it
    started thousands of kernels, for which a small model's GPU waits. The first passes are plain: they compile. Batch,
    results and gradients have fixed places in the device's memory; a batch of another form is passed plainly."""

    PLAIN = 3

    def __init__(self, phase):
        self.phase, self.num_plain, self.graph, self.form = phase, 0, None, None

    def take(self, batch, count):
        """As `take_pass`; results hold until the next call, of several micro-steps the carry for longer."""
        form = {name: (value.shape, value.dtype) for name, value in batch.items()}
        if self.num_plain < self.PLAIN or self.form not in (None, form):
            self.num_plain += 1
            found = take_pass(self.phase, batch, count)
            if self.num_plain == self.PLAIN:
                self.parameters = [p for p in self.phase.world.trained().values() if p.grad is not None]
            return found
        if self.form is None:
            self.form, self.batch = form, {name: value.clone() for name, value in batch.items()}
            self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.place_gradients()
        torch._foreach_copy_(list(self.batch.values()), [batch[name] for name in self.batch])
        if self.graph is None:
            self.record(count)
        self.graph.replay()
        losses, gauges, carry = self.found
        return losses, gauges, {name: value.clone() for name, value in carry.items()} if count > 1 else carry

    def place_gradients(self):
        """Gradients where the graph adds its own: zeros, or what micro-steps before this one left."""
        if self.parameters[0].grad is self.gradients[0]:
            return
        torch._foreach_zero_(self.gradients)
        for parameter, gradient in zip(self.parameters, self.gradients):
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def record(self, count):
        """Record a pass; nothing is computed. UserError where it cannot be."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders pin memory meanwhile
                self.found = take_pass(self.phase, self.batch, count)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = error
            while first.__context__ is not None:  # the end of a broken recording hides what broke it
                first = first.__context__
            why = f"a step cannot be recorded as a CUDA graph ({flat(first)[:200]})"
            raise UserError(f"{why}; --no-cuda_graph starts its kernels one by one") from error
        self.graph = graph


class Phase:
    """A stretch of optimizer steps: training (`name` ""), or a Fit that begins `begin` steps after it. `wrapped` is the
    world, or DDP or Sharded around it."""

    def __init__(self, run, world, wrapped, optimizer, name="", begin=0):
        self.run, self.world, self.wrapped, self.optimizer = run, world, wrapped, optimizer
        self.cfg, self.name, self.begin = world.cfg, name, begin
        self.recorder = Recorder(self) if is_replayed(world, run.process) else None

    @property
    def step(self):
        """Steps of this phase that are done."""
        return self.run.progress.after - self.begin if self.name else self.run.progress.step

    def advance(self):
        """Count a step."""
        progress = self.run.progress
        if self.name:
            progress.after += 1
        else:
            progress.step += 1
            progress.consumed += step_samples(self.cfg, self.world.world_size)
        progress.seconds = time.perf_counter() - self.run.began
        self.run.folder.step = progress.total

    def batches(self):
        """Iterator over the micro-batches that are left, with `close`."""
        run, cfg = self.run, self.cfg
        if self.name:
            return ({**self.world.batch(step), "bad": []} for step in range(self.step, cfg.steps))
        return run.loader("train", run.progress.consumed, (cfg.steps - self.step) * cfg.grad_accum, cfg.batch_size)

    def is_due(self, every):
        """Whether what is done every so many steps is done now; the end of a phase is saved and evaluated by itself."""
        return bool(every) and 0 < self.step < self.cfg.steps and self.step % every == 0

    def is_val_due(self):
        """Whether an evaluation is: every val_epochs passes over the training files, in a Fit or without, val_every
        steps."""
        cfg, now = self.cfg, self.run.progress.consumed
        if not cfg.val_epochs or self.name:
            return self.is_due(cfg.val_every)
        before, span = now - step_samples(cfg, self.world.world_size), cfg.val_epochs * len(self.run.source.train)
        return 0 < self.step < cfg.steps and now // span > before // span


REHEARSAL_S = 10.0  # a pass longer than this is not made just to time it


def small_presets(cfg):
    """The presets of a config's class that are called small or tiny -> 'small or tiny', "" for none."""
    return " or ".join(sorted(name for name in merged(type(cfg), "PRESETS") if name.endswith(("small", "tiny"))))


def memory_cures(cfg, ranks=1):
    """What needs less memory, in order of effect, by the flags that a config's class has -> text."""
    sizes = " or ".join(f"--{name}" for name in ("image_size", "num_frames") if hasattr(cfg, name))
    cures = (
        ("lower --batch_size (raise --grad_accum)", True),
        ("--grad_checkpoint", hasattr(cfg, "grad_checkpoint")),
        ("--amp", True),
        ("--shard fsdp", ranks > 1 and cfg.shard == "none"),
        (f"smaller {sizes}", sizes),
        (f"--preset {small_presets(cfg)}", small_presets(cfg)),
    )
    return ", ".join(text for text, helps in cures if helps)


def measure_speed(process):
    """TFLOP/s of a matrix product on the device in the run's precision."""
    size = 4096 if process.device.type == "cuda" else 768
    matrix = torch.ones(size, size, device=process.device, dtype=process.amp_dtype or torch.float32)
    (seconds,) = fastest([partial(torch.mm, matrix, matrix)], process.device)
    return 2 * size**3 / seconds / 1e12


def print_summary(run, overrides, reason):
    """The start-up lines: device, precision and why, the model, data and overrides."""
    cfg, process, source, log = run.cfg, run.process, run.source, run.log
    on_gpu = process.device.type == "cuda"
    device = torch.cuda.get_device_name(process.device) if on_gpu else f"{torch.get_num_threads()} threads"
    kinds = {None: "fp32", torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast + scaler"}
    precision = kinds[process.amp_dtype] + (f": {reason}" if reason else "") + ", compiled" * cfg.compile
    precision += ", steps replayed as a CUDA graph" * is_replayed(run.world, process)
    held = "" if source.held_out else "; NOTHING IS HELD OUT: validation uses training files"
    where = "drawn when asked for" if source.kind == "render" else f"under {source.root or 'no folder'}"
    kind = source.kind if source.Dataset.HAS_SCENES else "files"
    sides = f"{len(source.train)} train and {len(source.val)} val files"
    if source.split_by != "hash":
        counts = f"{len(source.train)} train, {len(source.val)} val, {len(source.test)} test files"
        sides = f"split by {source.split_by}: {counts}"
        held = "; val_fraction is not used" if source.split_by == "folders" else held
    capped = f" (warmup_steps {cfg.warmup_steps} capped at a tenth of steps)" if cfg.warmup < cfg.warmup_steps else ""
    changed = ", ".join(f"{name}={value}" for name, value in overrides.items())
    steps_each = len(source.train) / step_samples(cfg, process.world_size)
    for line in (
        f"device: {process.device.type} ({device}), {process.world_size} process(es), {precision}",
        *run.world.describe(),
        *([run.sharded.describe()] if run.sharded else []),
        f"data: {kind}, {sides} {where}{held}",
        *source.Dataset.notes(cfg, source),
        f"schedule: {cfg.steps} steps, warm-up {cfg.warmup}{capped}; a pass over the files is {steps_each:.3g} steps",
        f"set: {changed or 'nothing, all defaults'}",
    ):
        log.line(line)


def fit_steps_kept(state, world):
    """How many of a checkpoint's steps after training count in this run: none where training is extended, else those of
    the phases that are as they were, from the first on. The others come anew."""
    then, _ = checkpoint_template(type(world), json.dumps(asdict(saved_config(state, type(world)))))
    kept = 0
    for before, now in zip(then.phases(), world.phases()):
        if before != now or state["step"] < world.cfg.steps:
            break
        kept += now[1]
    return min(state["after"], kept)


def retire_later(cfg, progress, is_done, resumed_from):
    """Going on from a checkpoint that is not the last of its folder: move later ones to previous_<k>, where `auto` does
    not find them -> that folder, None where there are none. One whose name is ahead of the steps that count, in a run
    that is extended, gets their number."""
    folder, aside = Path(cfg.out_dir), None
    for saved_step, path in checkpoint_files(folder):
        if os.path.realpath(path) == os.path.realpath(resumed_from):
            if saved_step > progress.total and not is_done:
                move_checkpoint(path, path.with_name(f"ckpt_{progress.total}.pt"))
        elif saved_step > progress.total:
            aside = aside or previous_folder(folder)
            move_checkpoint(path, aside / path.name)
    return aside


def open_best(run, resumed_from, aside):
    """Look at ckpt_best.pt when a run begins, on rank 0 -> figure and step of the best so far, (inf, 0) without one.
    It stays while it is the best known, or of the step that the run goes on from; any other, of later steps, by another
    figure, or damaged, is moved to `aside` or a new previous_<k>."""
    cfg, progress, log = run.cfg, run.progress, run.log
    path = Path(cfg.out_dir) / "checkpoints" / BEST
    if os.path.lexists(path):
        try:
            saved = load_checkpoint(path, type(run.world), "it is not kept as the best")
        except (BadCheckpoint, WrongWorld) as error:
            log.line(f"WARNING: {error}")
        else:
            best, same = (saved["best"], saved["best_step"]), saved["cfg"].get("best_by") == cfg.best_by
            if same and (best == (progress.best, progress.best_step) or steps_of(saved) == progress.total):
                return best
        if os.path.realpath(path) != os.path.realpath(resumed_from or ""):
            move_checkpoint(path, (aside or previous_folder(cfg.out_dir)) / BEST)
    if progress.best_step and cfg.best_by:
        log.line(f"note: {path} of step {progress.best_step} is no longer there; the best is looked for anew")
    return math.inf, 0


def is_restart(cfg):
    """Whether torchrun starts this run again after it had begun: config.json then holds the id of this launch."""
    config = read_mapping(os.path.join(cfg.out_dir, "config.json"), 2**20) if restart_count() else {}
    return bool(config) and config.get("launch") == os.environ.get("TORCHELASTIC_RUN_ID")


def weights_place(cfg):
    """Where a config says that frozen weights are, "" where it says nothing."""
    return getattr(cfg, "init_from", "") or getattr(cfg, "backbone", "")


def newest_of_launch(world, cfg, tell):
    """What a restarted run goes on from -> (state, path): its own newest checkpoint, whatever --resume asked for when
    it began; (None, None) where it has made none, and --resume FILE counts."""
    state, path = newest_checkpoint(cfg.out_dir, tell, world, weights_place(cfg))
    if state is not None and cfg.resume != "never" and os.path.lexists(cfg.resume):
        named = load_checkpoint(
            cfg.resume, world, init_from=weights_place(cfg)
        )  # the fits after its training do not count where the run is extended
        if (named["step"], named["after"]) >= (state["step"], state["after"]):
            return None, None
    return state, path


def open_run(world, cfg, process, log):
    """Find what to resume from, the same on all ranks -> (state or None, its path). Refuses another world's."""
    state, path = None, None
    if process.is_main and cfg.resume == "auto":
        state, path = newest_checkpoint(cfg.out_dir, log.line, world, weights_place(cfg))
    elif process.is_main and is_restart(cfg):
        state, path = newest_of_launch(world, cfg, log.line)
    path = process.collect(str(path or ("" if cfg.resume in ("auto", "never") else cfg.resume)))[0]
    if not path:
        return None, None
    state = state or load_checkpoint(path, world, init_from=weights_place(cfg))
    if getattr(cfg, "init_from", "") and "pos_embed" in state["cfg"]:  # its weights said which when the run began
        cfg.pos_embed = state["cfg"]["pos_embed"]
    check_same_run(state, cfg, path)
    return state, path


def open_frame_cache(run):
    """Give the source of a run its FrameCache, as rank 0 chooses, and say so."""
    cfg, process, log, source = run.cfg, run.process, run.log, run.source
    clips = cfg.steps * step_samples(cfg, process.world_size)
    work = (choose_frame_cache, cfg, source, clips) if process.is_main else (tuple,)
    place, told = process.collect(process.together(*work))[0]
    source.line = lru_cache(log.line if process.is_main else say)
    if told:
        log.line(told)
    if place is not None:
        source.frame_cache = FrameCache(place[0], cfg, *place[1:])
        if not source.frame_cache.folder.is_dir():  # on this node
            with suppress(OSError):  # whoever reads the first clip says it
                source.frame_cache.open()


def check_cache(run):
    """UsageError where cached latents are of other frozen weights than the world's."""
    made_by = getattr(run.source.Dataset, "cache", {}).get("frozen")
    if made_by is not None and made_by != run.frozen:
        raise UsageError(f"latents {run.cfg.latents}: made by an encoder with other weights (--latents)")


def noise_like(value):
    """Noise in the shape of a tensor of a sample; whole numbers other than bytes stay as they are."""
    if value.dtype == torch.uint8:
        return torch.randint(0, 256, value.shape, dtype=torch.uint8)
    return torch.randn(value.shape).to(value.dtype) if value.is_floating_point() else value


def noise_batch(run, num_samples):
    """A batch of noise in the shape of the data, with what the world draws -> dict as a loader gives it."""
    data = run.source.dataset(run.cfg, "train")
    noise = [{key: noise_like(value) for key, value in data.blank().items()} for _ in range(num_samples)]
    return collate([data.whole(index, sample, 0, []) for index, sample in enumerate(noise)])


def for_step(batch, step, device):
    """A loader's batch on the device, `step` beside its samples, `bad` left out."""
    return {**to_device(batch, device), "step": torch.full((), step, dtype=torch.int64, device=device)}


def throw_away_pass(run, wrapped, batch):
    """Seconds of one micro-step forward and back, of which nothing stays."""
    batch = for_step(batch, 0, run.process.device)
    kept = [(buffer, buffer.clone()) for buffer in wrapped.buffers()]  # the statistics of a BatchNorm
    began = time.perf_counter()
    with autocast(run.process):
        losses, _, _ = wrapped(batch)
    losses["loss_total"].backward()
    float(losses["loss_total"].detach())  # waits for the device
    passed = time.perf_counter() - began
    if run.process.world_size > 1:
        idle = [name for name, parameter in wrapped.module.trained().items() if parameter.grad is None]
        if idle:  # DDP would call it an error of its own, in the next step
            cure = "call requires_grad_(False) on what does not learn"
            raise UserError(f"{type(wrapped.module).__name__}: {name_some(idle)} got no gradient; {cure}")
    wrapped.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    return passed


def rehearse(run, wrapped):
    """Passes that are thrown away -> seconds per step of the slowest rank, and in words where the figure comes from.

    DDP regroups its gradient buckets after its first backward: without that pass sums would add in another order from
    then on, and a resumed run would differ in the last bits from one that was never stopped. The second pass is timed,
    or the first or none where one would take too long.
    """
    cfg, process = run.cfg, run.process
    seconds = sum(run.world.flops().values()) * cfg.batch_size / (measure_speed(process) * 0.4e12)
    whole, told = process.world_size > 1 or cfg.compile or seconds < REHEARSAL_S, "timed on noise"
    num_samples = cfg.batch_size if whole else 1
    if whole or seconds / cfg.batch_size < REHEARSAL_S:
        batch = noise_batch(run, num_samples)
        passed = throw_away_pass(run, wrapped, batch)
        if passed < REHEARSAL_S or cfg.compile:
            passed = throw_away_pass(run, wrapped, batch)
        seconds = passed * cfg.batch_size / num_samples
        told += ", before its kernels are recorded: at most" * is_replayed(run.world, process)
    else:
        told = "at 40 % of this device's matrix speed, so roughly"
    return max(process.collect(seconds * cfg.grad_accum)), told


def save_shards(run, state):
    """Write what is sharded of a state, each rank its parts -> (the state with where they are instead, their temporary
    folder). Collective; OSError on rank 0 alone where a disk refuses."""
    process, shards = run.process, {}
    state, name = take_shards(state, shards), f".ckpt_{steps_of(state)}_shards.{process.collect(os.getpid())[0]}.tmp"
    known = write_shards(process, shards, folder := Path(run.cfg.out_dir) / "checkpoints" / name)
    if isinstance(known, OSError) and process.is_main:
        drop_unfinished(folder)
        raise known
    return {**state, "shards": known}, folder


def save_run(run, final=False, must=False, best=False):
    """Gather the state of all ranks, which must still hold the same weights, and let rank 0 write it -> False on rank 0
    where the disk refuses: then the run goes on to its next checkpoint; with `must`, or when another run took the
    folder: UserError."""
    cfg, process, log, total = run.cfg, run.process, run.log, run.progress.total
    log.stage = f"saving step {total}"
    check_ranks(process, weights=digest(fingerprint(run.world)))
    state, shards = checkpoint_state(run), None
    try:
        if run.sharded and not (final or best):
            state, shards = save_shards(run, state)
        else:
            state = gather_state(state, process.is_main)
        if not process.is_main:
            return True
        run.folder.check()
        save_checkpoint(state, cfg.out_dir, cfg, final, best, shards)
        process.stop.saved = process.stop.saved if best else total  # nothing goes on from the best unasked
        return True
    except OSError as error:
        if shards is not None:
            drop_unfinished(shards)
            delete_shards(shards.with_name(f"ckpt_{total}.pt"))
        newest = checkpoint_files(cfg.out_dir)
        stands = newest[-1][1] if newest else "no earlier one"
        text = f"checkpoint of step {total} could not be saved ({reason_of(error)}); {stands} stands"
        if must or run.folder.taken:
            raise UserError(f"{text}; make room and run the same command again") from error
        retry = "after the next good evaluation" if best else f"in {cfg.ckpt_every} steps"
        log.line(f"WARNING: {text}, the next try is {retry}")
        return False


def save_unsaved(run, must=False):
    """`save_run` where not all steps so far are on the disk."""
    if run.process.any(run.process.is_main and run.process.stop.saved < run.progress.total)[0]:
        save_run(run, must=must)


def take_step(phase, batches, step):
    """One optimizer step over its micro-batches, which lie on the device -> (metrics as tensors, carries, whether it
    was finite on this rank)."""
    cfg, run, wrapped = phase.cfg, phase.run, phase.wrapped
    for group in phase.optimizer.param_groups:
        group["lr"] = phase.world.lr(step, group["peak_lr"])
    take = phase.recorder.take if phase.recorder else partial(take_pass, phase)
    metrics, carries = {}, []
    for number, batch in enumerate(batches):
        is_last = number == len(batches) - 1  # ranks average once per step
        if run.sharded:
            wrapped.set_requires_gradient_sync(is_last)
        else:
            wrapped.require_backward_grad_sync = is_last  # for DDP
        losses, gauges, carry = take(batch, len(batches))
        carries.append(carry)
        for name, value in {**losses, **gauges}.items():
            metrics[name] = metrics.get(name, 0) + value / len(batches)
    if run.sharded:
        run.sharded.average()
    run.scaler.unscale_(phase.optimizer)
    norms = clip_gradients(phase.optimizer, cfg)
    numbers = torch.stack([value.float().to(run.process.device) for value in (metrics["loss_total"], *norms.values())])
    return metrics | norms, carries, bool(torch.isfinite(numbers).all())


def apply_step(phase, carries, step):
    """Update weights, EMA copies, queues and statistics: the only place where training state changes."""
    phase.run.scaler.step(phase.optimizer)
    for line in phase.world.after_step(carries, step) or ():
        phase.run.log.line(line)


def log_values(phase, metrics, looks, clock):
    """The record of one logged step, losses and figures as means over ranks, in the order of log_keys."""
    run, world, cfg, progress = phase.run, phase.world, phase.cfg, phase.run.progress
    keys = log_keys(type(world))
    values = {name: float(value) for name, value in metrics.items()}
    values = {
        **run.means({**values, **world.figures(looks, values)}, keys),
        **({"phase": phase.name} if phase.name else {}),
        "step": progress.total,
        "lr": world.lr(phase.step - 1, phase.optimizer.param_groups[0]["peak_lr"]),
        **world.state(phase.step - 1),
        "clips_per_s": step_samples(cfg, run.process.world_size) / clock.seconds_per_step,
        "data_wait": clock.data_wait,
        "mem_gb": peak_memory_gb(run.process.device),
        "bad_files": len(run.log.bad),
        "skipped_steps": progress.skipped,
        "time": progress.seconds,
    }
    return {key: values[key] for key in keys if key in values}


def check_bad_files(run, entries):
    """Name new bad files of all ranks; stop when too large a share of the data is bad now: named by this attempt of the
    run and not decoded since."""
    cfg, source = run.cfg, run.source
    named, failing = zip(*run.process.collect((entries, source.failing)))
    run.log.add_bad([entry for part in named for entry in part])
    failing = {name: reason for part in failing for name, reason in part.items()}
    listed = f"all are in {cfg.out_dir}/bad_files.jsonl"
    for side, videos in (("training", source.train), ("validation", source.val)):
        if all(video.name in failing for video in videos):  # blank frames would stand in for them
            first = f"{videos[0].name}: {failing[videos[0].name]}"
            raise UserError(f"all {len(videos)} {side} files cannot be decoded; the first is {first}; {listed}")
    total = len({video.name for video in source.train + source.val})
    if len(failing) / total > cfg.max_bad_fraction:
        share, first = f"{len(failing)} of {total} files cannot be decoded", ": ".join(next(iter(failing.items())))
        raise UserError(f"{share} (max_bad_fraction {cfg.max_bad_fraction}); the first is {first}; {listed}")


@torch.no_grad()
def validate(run, deadline=math.inf):
    """Losses and figures on val_clips held-out samples, the same every time -> dict of val_* floats. StoppedTogether on
    a signal. One batch is seen at least, the others only before the deadline (time.monotonic)."""
    world, cfg, process = run.world, run.cfg, run.process
    num_batches = max(1, math.ceil(cfg.val_clips / (cfg.batch_size * process.world_size)))
    loader = run.loader("val", 0, num_batches, cfg.batch_size)
    was_training, sums, looks, bad, extra = world.training, {}, [], [], {}
    world.eval()
    for batch in process.in_step(loader):
        bad += batch["bad"]
        batch = for_step(batch, run.progress.step, process.device)
        with autocast(process):
            losses, gauges, carry = world.forward(batch)
        for name, value in {**losses, **gauges}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        extra = extra if looks else world.held_out(batch, carry)
        looks.append(world.look(batch, carry))
        if process.any(time.monotonic() > deadline)[0]:
            break
    loader.close()
    check_bad_files(run, bad)
    world.train(was_training)
    means = {name: value / len(looks) for name, value in sums.items()}
    values = {**means, **world.figures(looks, means), **extra}
    values["clips"] = len(looks) * cfg.batch_size * process.world_size
    return run.means({f"val_{name}": value for name, value in values.items()}, val_keys(type(world)))


@torch.no_grad()
def validate_fit(run, fit):
    """Losses of a Fit on its held-out part -> dict of val_* floats; {} where it has none."""
    batch = for_step(fit.batch(), run.progress.step, run.process.device)
    if not len(next(iter(batch.values()))):
        return {}
    with autocast(run.process):
        losses, _, _ = fit.forward(batch)
    return run.means({f"val_{name}": float(loss) for name, loss in losses.items()}, val_keys(type(fit)))


class Clock:
    """Seconds per step and loader share since the last log line. The first steps after a start do not count."""

    def __init__(self, warmup_steps=3):
        self.seconds_per_step, self.data_wait = float("nan"), float("nan")  # of the last full interval
        self.skip, self.told = warmup_steps, False  # whether the time left was told
        self.begin()

    def begin(self):
        """Start an interval."""
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def tick(self, waited):
        """Count one step, of which `waited` seconds went to the loader."""
        if self.skip:
            self.skip -= 1
            self.begin()
        else:
            self.steps, self.waited = self.steps + 1, self.waited + waited

    def close(self):
        """End an interval: its seconds_per_step and data_wait, where a step was counted (else NaN, or as before)."""
        passed = time.perf_counter() - self.since
        if self.steps:
            self.seconds_per_step, self.data_wait = passed / self.steps, self.waited / passed
        self.begin()

    def skip_pause(self, began):
        """Leave out what has passed since `began` (perf_counter): evaluations and saves are no training time."""
        self.since += time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------------
# 28  Dry run: a step in shapes alone -> bytes, FLOP
# ---------------------------------------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Counts the bytes of tensors that live (`now`, at most `peak`) and the FLOP of products. Three blocks stand for a
    longer stack of like ones: `grown` is what the others would leave in a forward pass."""

    def __init__(self):
        from torch.utils.flop_counter import flop_registry  # takes a tenth of a second

        super().__init__()
        self.known, self.now, self.peak, self.grown, self.flop = weakref.WeakSet(), 0, 0, 0, 0
        self.formulas, aten = dict(flop_registry), torch.ops.aten
        for end in ("", "_backward"):  # a CPU has its own name for it
            own, other = (f"_scaled_dot_product_flash_attention{kind}{end}" for kind in ("_for_cpu", ""))
            self.formulas[getattr(aten, own)] = flop_registry[getattr(aten, other)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # shapes have no values
        made = func(*args, **(kwargs or {}))
        if formula := self.formulas.get(func.overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=made)
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.count, -storage.nbytes())
                self.count(storage.nbytes())
        return made

    def count(self, size):
        """Bytes that begin to live, or end."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def shorten(self, model):
        """Leave three blocks of every stack. Neighbours tell what each of the others would add."""
        for stack in [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) > 3]:
            for block, times in zip(stack[1:3], (3 - len(stack), len(stack) - 3)):
                block.register_forward_pre_hook(partial(self.pass_by, times))
            del stack[3:]

    def pass_by(self, times, *_):
        """A hook before a block."""
        self.grown += times * self.now

    def step(self, model, batch, dtype):
        """A micro-step forth and back -> bytes that it needs at most beside what is there before."""
        before, self.grown, self.flop = self.now, 0, 0
        self.peak = before
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            losses, _, _ = model(batch)
        grown = self.grown  # in backward, blocks may be called again
        losses["loss_total"].backward()
        return self.peak - before + grown


def count_step(model, cfg, sample):
    """A micro-step on batches of a sample, in shapes alone -> (FLOP that it takes, bytes of activations with the
    config's grad_checkpoint, with the other). The model comes from meta and is changed."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    ledger, dtype, work = Ledger(), amp_dtype(cfg, torch.device("cpu")), [0, 0]
    if model.flops():
        ledger.shorten(model)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        model.to_empty(device="cpu")  # whose attention keeps no more than a GPU's
        for parameter in model.train().trained().values():
            parameter.grad = torch.zeros_like(parameter)
        batch = {key: torch.empty((cfg.batch_size, *value.shape), dtype=value.dtype) for key, value in sample.items()}
        batch = for_step(batch, 0, "cpu")
        for other in (True, False) if hasattr(cfg, "grad_checkpoint") else (False,):
            for part in model.modules():
                if hasattr(part, "grad_checkpoint"):
                    part.grad_checkpoint = other != cfg.grad_checkpoint
            work[other] = ledger.step(model, batch, dtype)
    return ledger.flop, *work


CARDS = 24, 40, 80, 141  # GB of common GPUs


def dry_run(world, cfg, ranks):
    """What a step on so many ranks takes -> lines. Needs neither data nor memory: everything is a shape."""
    Dataset = list_latents(world, cfg).Dataset if getattr(cfg, "latents", "") else world.Dataset
    data = DataSource("videos", "", [], [], [], True, Dataset, world.draw).dataset(cfg, "train")
    sample = {key: value for key, value in data.whole(0, data.blank(), 0, []).items() if key != "bad"}
    with torch.device("meta"):
        model = world(replace(cfg, random_weights=True) if hasattr(cfg, "random_weights") else cfg)  # none are read
    told, rows, flops = model.describe(), held_bytes(model, ranks), model.flops()
    weights = sum(value.nbytes for value in model.parameters())
    counted, work, other = count_step(model, cfg, sample)
    batch = sum(value.nbytes for value in sample.values()) * cfg.batch_size
    rows |= {"batch": (batch, batch), "activations": (work, work)}
    rows["sum"] = sums = [sum(side) for side in zip(*rows.values())]
    fit = [[name for name, size in zip(("none", "fsdp"), sums) if size < 0.9e9 * card - 1e9] for card in CARDS]
    flops = flops or {"counted": counted / cfg.batch_size}
    clips, flop = step_samples(cfg, ranks), sum(flops.values()) or 1
    parts = ", ".join(f"{name} {value / flop:.0%}" for name, value in flops.items())
    switch = f"activations {'without' if getattr(cfg, 'grad_checkpoint', 0) else 'with'} grad_checkpoint"
    fits = ", ".join(f"{card} GB {' and '.join(names) or 'neither'}" for card, names in zip(CARDS, fit))
    return [
        *(line for line in told if not line.startswith("step:")),
        f"step: {clips} clips = {cfg.batch_size} x {cfg.grad_accum} micro-steps x {ranks} ranks; "
        f"{flop / 1e12:.4g} TFLOP per clip ({parts}), {flop * clips / 1e12:.6g} per step",
        f"{'GB per rank, --shard':<24}{'none':>9}{'fsdp':>9}",
        *(f"{name:<24}{one / 1e9:>9.3f}{two / 1e9:>9.3f}" for name, (one, two) in rows.items()),
        *([f"{switch}: {other / 1e9:.3f} GB"] if hasattr(cfg, "grad_checkpoint") else []),
        f"evaluations under --shard fsdp gather all weights: {weights / 1e9:.3f} GB on every rank",
        f"fits, with 1 GB and a tenth of the card to spare: {fits}",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# 29  Training: Config -> checkpoints
# ---------------------------------------------------------------------------------------------------------------------

END_S = 20.0  # for the last evaluation, and again for the picture; a hundredth of a long run's time where that is more


def end_early(stop, folder, tell, where):
    """Say what stopped the run and where -> exit code."""
    folder.reason = stop.reason or "a signal on another rank"
    tell(f"stopped by {folder.reason} {where}")
    return EXIT_STOPPED


def keep_best(run, values):
    """Save ckpt_best.pt where an evaluation is the best so far by the figure best_by. What could not be saved does not
    count."""
    cfg, progress = run.cfg, run.progress
    name, before = cfg.best_by.removeprefix("-"), (progress.best, progress.best_step)
    if cfg.best_by and name not in values:
        run.log.line(f"WARNING: best_by = {cfg.best_by}: this evaluation has no such figure")
    value = values.get(name, math.nan)
    value = value if name == cfg.best_by else -value
    if math.isfinite(value) and value < progress.best:
        progress.best, progress.best_step = value, progress.total
        if run.process.any(not save_run(run, best=True))[0]:
            progress.best, progress.best_step = before


def take_in(phase, values):
    """Let the world change by an evaluation in training, once for each, and keep the best checkpoint."""
    run, progress = phase.run, phase.run.progress
    if phase.name:
        return
    if progress.validated != progress.total:
        finite = {name: value if math.isfinite(value) else math.nan for name, value in values.items()}  # as read back
        run.world.after_validation(finite)
        progress.validated = progress.total
    keep_best(run, values)


def evaluate(phase):
    """An evaluation in the middle of a run -> whether a stop cut it off: then it is due when the run goes on."""
    run = phase.run
    run.log.stage = f"evaluating on held-out data after step {run.progress.total}"
    try:
        with run.gathered():
            values = {"phase": phase.name, **validate_fit(run, phase.world)} if phase.name else validate(run)
    except StoppedTogether:
        return True
    if any(key.startswith("val_") for key in values):
        run.log.record({"step": run.progress.total, **values}, run.mark)
    take_in(phase, values)
    return False


def next_batches(loader, count, stop):
    """The micro-batches of one step -> list, empty when a stop was asked for before all were there: they stay due."""
    try:
        return [] if stop.asked() else [next(loader) for _ in range(count)]
    except Stopped:
        return []


def skip_step(phase, batches, is_mine, in_a_row):
    """Count and name a step that was not finite on some rank. UserError when there were too many in a row."""
    run, cfg = phase.run, phase.cfg
    run.progress.skipped += 1
    numbers = [number for batch in batches if is_mine and "file" in batch for number in batch["file"].tolist()]
    mine = [run.source.train[number].name for number in numbers if number >= 0]
    of_ranks = enumerate(run.process.collect(mine))
    named = "; ".join(f"rank {rank}: {', '.join(dict.fromkeys(names))}" for rank, names in of_ranks if names)
    step = run.progress.total + 1
    run.log.line(f"step {step} skipped: loss or gradient not finite; its files: {named or 'none'}")
    if in_a_row >= cfg.max_skipped_steps:
        rates = " or ".join(f"--{name}" for name in ("lr", "flow_lr") if hasattr(cfg, name))
        cure = f"lower {rates}, or look at the data; the last checkpoint stands"
        raise UserError(f"{in_a_row} steps in a row were not finite; {cure}")


def log_step(phase, record, clock):
    """Log a record, and once the time left -> what the progress bar shows of it."""
    log = phase.run.log
    log.record(record, phase.run.mark)
    if not clock.told and math.isfinite(clock.seconds_per_step):
        left = describe_time(clock.seconds_per_step * (phase.cfg.steps - phase.step))
        log.line(f"{clock.seconds_per_step:.3g} s per step: {left} to go")
        clock.told = True
    chosen = [key for key in record if key in ("loss_total", "clips_per_s") or key.endswith("skill")]
    return " ".join(f"{key}:{format_number(record[key])}" for key in chosen)


def train_phase(phase):
    """The steps of a phase that are left, with log, evaluations and checkpoints -> whether a stop ended it."""
    run, cfg, world = phase.run, phase.cfg, phase.world
    process, log, progress = run.process, run.log, run.progress
    log.stage = f"step {progress.total + 1} of {cfg.steps + progress.total - phase.step} has begun"
    clock, last, stopping, skipped_in_row, first_step = Clock(), "", False, 0, phase.step + 1
    world.train()
    loader = phase.batches()
    run.folder.closing.append(loader)
    if phase.is_val_due():  # a stop came before it, or before what it changed was saved
        values = process.collect(log.evaluated.get(progress.total))[0]
        if values is None:
            stopping = evaluate(phase)
        else:
            take_in(phase, values)
    while phase.step < cfg.steps and not stopping:
        # -- batch
        waiting = time.perf_counter()
        batches = next_batches(loader, cfg.grad_accum, process.stop)
        waited = time.perf_counter() - waiting
        bad = [entry for batch in batches for entry in batch["bad"]]
        any_bad, stopping = process.any(bool(bad), not batches)
        if stopping:
            break
        if any_bad:
            check_bad_files(run, bad)
        # -- update
        step, batches = phase.step, [for_step(batch, phase.step, process.device) for batch in batches]
        metrics, carries, finite = take_step(phase, batches, step)
        broken, stopping = process.any(not finite, process.stop.asked())
        skipped_in_row = skipped_in_row + 1 if broken else 0
        if broken:
            skip_step(phase, batches, not finite, skipped_in_row)
        else:
            apply_step(phase, carries, step)
        run.scaler.update()
        phase.optimizer.zero_grad(set_to_none=True)
        phase.advance()
        clock.tick(waited)
        log.bar(phase.step, cfg.steps, f"{describe_time(progress.seconds)} {last}", f"{phase.name} step".strip())
        # -- log
        if phase.step in (first_step, cfg.steps) or phase.step % cfg.log_every == 0 or stopping:
            clock.close()
            with run.gathered():
                looks = [world.look(batch, carry) for batch, carry in zip(batches, carries)]
            last = log_step(phase, log_values(phase, metrics, looks, clock), clock)
        # -- save and evaluate
        pause = time.perf_counter()
        if phase.is_due(cfg.ckpt_every) and not stopping:
            save_run(run)
        if phase.is_val_due() and not stopping:
            stopping = evaluate(phase)
        if phase.name and phase.step == cfg.steps:  # after a stop as well: it takes a moment, and is due only here
            evaluate(phase)
        clock.skip_pause(pause)
    loader.close()
    return stopping


def resume(run, state, path):
    """Take in a checkpoint, if there is one, and prepare folder and log for what follows. UserError where it does not
    fit."""
    cfg, process, log, world, anew, aside = run.cfg, run.process, run.log, run.world, "", None
    if state is not None:
        check_frozen(state, world, path)
        if (kept := fit_steps_kept(state, world)) < state["after"]:
            state["after"], anew = kept, "; its steps after that come anew"
        if state["step"] >= cfg.steps:
            world = end_sharding(run)
        try:
            world.restore(state)
            restore_run(state, run)
        except (KeyError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"checkpoint {path}: does not fit this model ({why})") from error
        run.progress = Progress(**{entry.name: state[entry.name] for entry in fields(Progress)})
    progress = run.progress
    is_done = progress.step >= cfg.steps and not phase_at(world.phases(), progress.after)[0]
    if state is not None:
        log.line(f"resumed from {path} at step {progress.total}{anew}")
        if process.is_main:
            aside = retire_later(cfg, progress, is_done, path)
    best = open_best(run, path, aside) if process.is_main else None
    progress.best, progress.best_step = process.collect(best)[0]
    if process.is_main:  # with the id of the launch, so not before what it does not go on from is out of the way
        config = json.dumps({**run_info(run), "config": asdict(cfg)}, indent=2).encode()
        write_atomic(Path(cfg.out_dir) / "config.json", lambda handle: handle.write(config))
    log.forget_after(progress.total, is_done)
    run.source.quarantine.update((name, why) for name, why in log.bad.items() if why.startswith(QUARANTINED))
    quarantine = digest(sorted(run.source.quarantine))
    check_ranks(process, weights=digest(fingerprint(world)), quarantine=quarantine)
    run.began -= progress.seconds
    process.stop.saved = run.folder.step = progress.total


def begin_phase(last, name, begin, phase_opt):
    """What follows the phase `last` -> the Phase of a Fit, its optimizer as in the checkpoint that the run goes on from
    inside it."""
    run = last.run
    last.recorder = None  # gives its memory back
    run.folder.where = f"before the {name} phase began; run the same command to go on"
    world, before = end_sharding(run).eval().requires_grad_(False), last.world if last.name else None
    fit = world.open_phase(name, run, before).to(run.process.device)
    run.phase_optimizer, wrapped = fit.optimizer(), wrap(fit, run.process)
    if run.process.world_size > 1:
        throw_away_pass(run, wrapped, fit.batch(0))
    if run.progress.after > begin:
        run.phase_optimizer.load_state_dict(phase_opt)
    return Phase(run, fit, wrapped, run.phase_optimizer, name, begin)


def run_phases(run, wrapped, phase_opt):
    """Training and the fits that follow it -> whether a stop ended one of them."""
    phase = Phase(run, run.world, wrapped, run.optimizer)
    while not (stopped := train_phase(phase)):
        name, begin = phase_at(run.world.phases(), run.progress.after)
        if not name:
            break
        save_unsaved(run)  # a stop while latents are made costs them alone
        phase = begin_phase(phase, name, begin, phase_opt)
    return stopped


def report(run, values, seconds):
    """The world's own report, on rank 0."""
    if run.process.is_main:
        run.world.eval().report(run, values, seconds)


def finish(run):
    """After ckpt_final.pt: evaluate on held-out data, report -> exit code. StoppedTogether on a signal."""
    cfg, world, log, seconds = run.cfg, end_sharding(run), run.log, max(END_S, 0.01 * run.progress.seconds)
    log.stage = "evaluating on held-out data after the last step"
    values = validate(run, time.monotonic() + seconds)
    if values["val_clips"] < cfg.val_clips:
        log.line(f"evaluation: its {seconds:.0f} s were over after {values['val_clips']:.0f} of {cfg.val_clips} clips")
    log.record({"step": run.progress.total, **values}, run.mark)
    if values["val_clips"] >= cfg.val_clips:
        keep_best(run, values)
    if verdict_text := world.verdict(values):
        log.line(f"verdict: {verdict_text}")
    run.process.together(report, run, values, seconds)
    took = describe_time(run.progress.seconds)
    log.line(f"done: {run.progress.total} steps in {took}; checkpoint {cfg.out_dir}/checkpoints/ckpt_final.pt")
    return EXIT_OK


PREPARED = {720: 6, 540: 5, 360: 2}  # shorter side -> times faster once prepared, at least (records/speed/prepare.md)


def decode_costs(data):
    """(CPU seconds of a clip, shorter side or 0 where prepared) of up to three files, for told_apart."""
    plan, videos = draw_plan(np.random.default_rng(0), data.cfg, "train"), [v for v in data.videos if not v.pictures]
    for video in videos[:: max(len(videos) // 3, 1)][:3]:
        with suppress(BadFile):  # named when it is read
            with opened_stream(video.path) as (container, stream):
                side = min(stream.width, stream.height) * ("prepare_videos" not in str(container.metadata))
            began = time.process_time()
            read_frames(video.path, fit_plan(plan, video), data.cfg.decoder)
            yield time.process_time() - began, side


def advise_preparing(run, seconds):
    """A line where steps of so many seconds will wait, as decoding a few clips tells, else "". A run of a few seconds
    gains nothing from it and is spared the decoding."""
    cfg, process, data = run.cfg, run.process, run.source.dataset(run.cfg, "train")
    read = process.is_main and isinstance(data, ClipDataset) and run.source.kind == "videos" and seconds * cfg.steps > 5
    costs = told_apart(5.0, decode_costs, data)[0] if read and not getattr(data, "frame_cache", None) else ()
    cost, side = np.median(costs or [(0.0, 0)], axis=0)
    cores = max(usable_cores() // read_count("LOCAL_WORLD_SIZE", 1, 1, 2**16), 1)
    decoding = cost * cfg.batch_size * cfg.grad_accum / min(cores, max(cfg.num_workers, 1))
    faster = max((times for least, times in PREPARED.items() if side >= least), default=0)
    if not faster or decoding <= seconds:
        return ""
    # on a CPU both want the same cores
    share = decoding / (decoding + seconds) if process.device.type == "cpu" else 1 - seconds / decoding
    gain = "halve it" if faster == 2 else f"make it {faster} times faster"
    how = f"python tools/prepare_videos.py --input {shlex.quote(cfg.data_root)} --output DIR would {gain}"
    return f"decoding takes {share:.0%} of the time: {how}"


def run_world(world, run, overrides, argv, videos):
    """The run itself, inside its folder -> exit code. StoppedTogether where a signal comes while nothing is unsaved."""
    cfg, process, log = run.cfg, run.process, run.log
    # -- data
    run.began, run.argv = time.perf_counter(), list(argv)
    state, path = open_run(world, cfg, process, log)
    if not videos:
        log.line(instead_of_videos(cfg, videos))
    log.stage = "opening the data"
    barrier, asked = process.stop_together, process.stop.asked
    run.source = process.together(open_data, world, cfg, videos, process.is_main, barrier, asked)
    for note in data_notes(cfg, videos, run.source, state["data"] if state else None):
        log.line(note)
    open_frame_cache(run)

    # -- model
    log.stage = "building the model and timing a pass on noise"
    wrapped = build_world(world, run, is_new=state is None)
    if state is not None and (named := getattr(cfg, "init_from", "")) and not run.world.FROZEN:
        log.line(f"note: init_from {named} does not count, the run goes on from {path}")
    check_cache(run)
    process.amp_dtype, reason = choose_precision(world, cfg, process, state["precision"] if state else "")
    run.scaler = torch.amp.GradScaler(process.device.type, enabled=process.amp_dtype == torch.float16)
    seconds, told = rehearse(run, wrapped)
    torch.manual_seed(cfg.seed + 1 + process.rank)  # dropout differs between ranks, weights do not
    print_summary(run, overrides, reason)
    presets = small_presets(cfg)
    small = f"--preset {presets}, " * bool(presets)
    days = f"; THAT IS DAYS: think of {small}fewer --steps, or a faster device"
    first = f"first estimate: {describe_time(seconds * cfg.steps)} for {cfg.steps} steps, {told}"
    log.line(first + days * (seconds * cfg.steps > 2 * 86400))
    if advice := advise_preparing(run, seconds):
        log.line(advice)
    resume(run, state, path)
    phase_opt = state["phase_opt"] if state else None
    del state

    # -- steps
    if run_phases(run, wrapped, phase_opt):
        save_unsaved(run, must=True)
        total = run.progress.total
        where = f"at step {total}{', saved' if total else ''}; run the same command to go on"
        return end_early(process.stop, run.folder, log.line, where)

    # -- end
    save_run(run, final=True, must=True)
    run.folder.where = "after its last step, saved; run the same command to evaluate"
    return finish(run)


def attempt(world, cfg, overrides, argv, videos, process, folder):
    """Prepare folder and log, then run; says where it was when a stop came that left nothing to save -> exit code."""
    names, code = [video.name for video in videos], source_text() + source_text(inspect.getfile(world))
    check_ranks(process, config=digest(asdict(cfg)), data_listing=digest(names), code=digest(code))
    if process.is_main and cfg.resume == "never" and not is_restart(cfg):
        put_aside(cfg, world.FILES)
    log = RunLog(cfg, process.is_main, folder)
    folder.closing.append(log)
    try:
        return run_world(world, Run(cfg, process, folder, log), overrides, argv, videos)
    except StoppedTogether:
        return end_early(process.stop, folder, log.line, folder.where)


def check_best_by(cfg, world):
    """UsageError unless best_by is empty or a figure that an evaluation of the world has."""
    name, known = cfg.best_by.removeprefix("-"), val_keys(world)
    if cfg.best_by and name not in known:
        rule = f"is no figure of an evaluation{nearest(name, known)}; there are {', '.join(known)}"
        raise UsageError(f"config: {refusal(cfg, 'best_by', rule)}")


def train(cfg, overrides=None, argv=(), stop=None, world=VJepaAutoV2):
    """Run a config from its first or its last saved step to the end -> exit code. Owns out_dir and says how the run
    ended. `stop` is the flag that a signal sets; without one, the run hears signals itself until it returns."""
    own, stop = stop is None, stop or StopFlag()
    try:
        validate_config(cfg)
        check_best_by(cfg, world)
        videos = list_latents(world, cfg) if getattr(cfg, "latents", "") else list_data(cfg, world.Dataset)
        process, met = identify_process(cfg, stop), False
        with suppress(Stopped):
            join_ranks(process, cfg)
            met = True
        with RunFolder(cfg, process, world.FILES) as folder:
            if met:
                code = attempt(world, cfg, overrides or {}, argv, videos, process, folder)
            else:
                code = end_early(stop, folder, say, "while it waited for its ranks")
            folder.status("finished" if code == EXIT_OK else "stopped", code)
        if process.store is not None:
            process.leave()
        return code
    except RuntimeError as error:
        if process.world_size == 1 or not failed_collective(error):
            raise
        who = "all ranks are alive: a slow network?"
        if silent := ", ".join(map(str, process.silent_ranks())):
            who = f"rank {silent} did not answer: dead, hung or stopped"
        cure = f"run the same command to go on from the last checkpoint (dist_timeout_s = {cfg.dist_timeout_s:g})"
        raise UserError(f"ranks lost each other at step {folder.step} ({flat(error)[:120]}); {who}; {cure}") from error
    finally:
        if own:
            stop.restore()


def start(world, argv, stop):
    """Command line -> exit code. What a user can cause or cure is a UserError or an OSError."""
    cfg, overrides, asked = resolve_config(argv, world)
    if asked["print_config"]:
        emit(json.dumps(asdict(cfg), indent=2) + "\n", sys.stdout)
        return EXIT_OK
    if asked["dry_run"]:
        try:
            emit("\n".join(dry_run(world, cfg, asked["dry_run"])) + "\n", sys.stdout)
            return EXIT_OK
        except RuntimeError as error:  # it reads values, and there are shapes alone
            raise UserError(f"--dry_run cannot count a step of {world.__name__} ({flat(error)[:200]})") from error
    try:
        return train(cfg, overrides, argv, stop, world)
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):  # the CPU allocator has no type of its own
            raise
        peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if torch.cuda.is_available() else ""
        cures = memory_cures(cfg, read_count("WORLD_SIZE", 1, 1, 10**6))
        cure = f"in order of effect: {cures}; nothing saved before is harmed"
        raise UserError(f"out of memory ({flat(error)[:160]}{peak}); {cure}") from error
    except OSError as error:
        raise UserError(f"{error}; nothing saved before is harmed, run the same command to go on") from error
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def open_streams():
    """Put /dev/null where stdin, stdout or stderr was closed: else the next file opened, a checkpoint say, gets their
    text."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)


def report_errors(command, *args):
    """Run what a command line asks for -> its exit code, 0 for none. Every error a user can cause ends in one line on
    stderr. A console that is lost neither ends the command nor changes its exit code."""
    open_streams()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # those that a tool's imports held back come now
        return command(*args) or EXIT_OK
    except (UserError, OSError) as error:
        say(f"error: {flat(error)}", sys.stderr)
        return getattr(error, "exit_code", EXIT_ERROR)
    except (Stopped, KeyboardInterrupt):
        say("error: interrupted", sys.stderr)
        return 128 + signal.SIGINT
    finally:
        for stream in (sys.stdout, sys.stderr):
            emit("", stream)


def main(argv=None, world=VJepaAutoV2):
    """Command line -> exit code of a world. Signals are heard from here on; one that was obeyed is not heard again
    while the process ends."""
    stop, code = StopFlag(), EXIT_ERROR
    try:
        code = report_errors(start, world, sys.argv[1:] if argv is None else list(argv), stop)
    finally:
        stop.restore(ignore=argv is None and code == EXIT_STOPPED)
    return code


if __name__ == "__main__":
    sys.exit(main())
