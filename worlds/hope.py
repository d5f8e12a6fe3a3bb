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

Sources: V-JEPA 2-AC (arXiv 2506.09985, section 3), ConvLSTM (1506.04214), Titans (2501.00663), Nested Learning
(Behrouz et al. 2025).
"""

import math
import os
import re
import sys
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import VJepa_AUTO_V2 as V

# fmt: off


@dataclass
class HopeConfig(V.RunConfig):
    """Feature folders, predictor, losses, curriculum and schedule of the world that predicts features by actions."""

    preset: str = "base"  # vjepa2_ac | baseline_convlstm | hope_param_matched | hope_depth_matched | *_tiny | base
    out_dir: str = "runs/hope"  # everything the run writes
    video_glob: str = "*"  # * = **/feature_maps/FEATURE_MAP.npy, one such file per clip
    # -- clips
    feature_map: str = "vjepa2_vitl16"  # name of the files below feature_maps, without .npy
    feature_dim: int = 1024  # D, numbers of a patch
    grid_high: int = 16  # patches of a frame from top to bottom
    grid_wide: int = 16  # patches of a frame from left to right
    num_timesteps: int = 8  # T, frames to predict; a clip needs one more
    action_dim: int = 7  # A, numbers of an action and of a state
    use_extrinsics: bool = False  # a third token per frame: the camera's place, A - 1 numbers
    clip_start: int = -1  # smallest clip id that is used; -1 = all
    clip_end: int = -1  # clip ids from here on are left out; -1 = none
    test_fraction: float = 0.1  # share of the clips that never train nor validate, by id
    # -- predictor
    predictor: str = "ac_vit"  # ac_vit | convlstm | identity | hope | hybrid
    pred_dim: int = 384  # P; half as wide again in convlstm
    pred_depth: int = 24  # blocks
    num_heads: int = 16  # heads
    mlp_ratio: float = 4.0  # hidden width of an MLP over P
    drop_path: float = 0.1  # share of samples that skip the last block in training, less in those before
    init_from: str = ""  # .pt of V-JEPA 2-AC, or a checkpoint of this world: the predictor begins with its weights
    # -- losses
    normalise: bool = True  # LayerNorm without weights over D of features and predictions
    context_frames: int = 1  # C, true frames that a rollout begins with
    rollout_steps: int = 2  # frames that a rollout predicts in training
    jump_frames: int = 3  # a jump leads to one of so many last frames
    lambda_teacher: float = 1.0  # weight of the error of the next frame after true ones
    lambda_rollout: float = 1.0  # weight of the error of rollouts
    lambda_jump: float = 0.0  # weight of the error of jumps
    loss_form: str = "l1"  # l1 | l2 | huber
    curriculum: str = ""  # such as 0:rollout=2;7:rollout=4,teacher=0.7 from epochs on, 500s: from a step on; see docs

    RANGES = {
        "feature_dim": (1, 65536), "grid_high": (1, 1024), "grid_wide": (1, 1024), "num_timesteps": (1, 1000),
        "action_dim": (1, 1024), "clip_start": (-1, 10**9), "clip_end": (-1, 10**9), "test_fraction": (0, 0.9),
        "pred_dim": (6, 65536), "pred_depth": (1, 1000), "num_heads": (1, 1024), "mlp_ratio": (0.1, 64),
        "drop_path": (0, 0.9), "context_frames": (1, 1000), "rollout_steps": (1, 1000), "jump_frames": (1, 1000),
        "lambda_teacher": (0, None), "lambda_rollout": (0, None), "lambda_jump": (0, None),
    }
    CHOICES = {
        "predictor": ("ac_vit", "convlstm", "identity", "hope", "hybrid"), "loss_form": ("l1", "l2", "huber"),
    }
    MUST_MATCH = (
        "feature_dim", "grid_high", "grid_wide", "num_timesteps", "action_dim", "use_extrinsics", "predictor",
        "pred_dim", "pred_depth", "num_heads", "mlp_ratio", "normalise",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.video_glob == "*":
            self.video_glob = f"**/feature_maps/{self.feature_map}.npy"

    @property
    def patches(self) -> int:
        """N, patches of a frame."""
        return self.grid_high * self.grid_wide


# fmt: on


class FeatureClips(V.FileDataset):
    """A placeholder for the reader of feature folders."""

    SUFFIXES = (".npy",)

    def blank(self):
        cfg = self.cfg
        T, A = cfg.num_timesteps, cfg.action_dim
        sample = {
            "features": torch.zeros(T + 1, cfg.patches, cfg.feature_dim),
            "actions": torch.zeros(T, A),
            "states": torch.zeros(T, A),
        }
        return sample | ({"extrinsics": torch.zeros(T, A - 1)} if cfg.use_extrinsics else {})


# -- predictors: frames 0..T-1 and what is done at each -> frames 1..T


class Identity(nn.Module):
    """A copy of the last frame. Its one parameter has no numbers: it is there so that the loop can train it."""

    def __init__(self, cfg):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0))

    def forward(self, features, actions, states, extrinsics=None):
        return features + self.nothing.sum()


class Hope(V.World):
    """Predict the latents of frames by actions: teacher forcing, rollouts, jumps."""

    Config = HopeConfig
    Dataset = FeatureClips
    KEYS = {
        "loss_teacher": "error of the next frame after true ones",
        "loss_rollout": "error of frames predicted from own guesses",
        "loss_jump": "error of a late frame predicted from the first in one pass",
    }

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.predictor = Identity(cfg)

    def normalise(self, features):
        """Features [..., D] -> fp32, mean 0 and deviation 1 over D where the config says so."""
        features = features.float()
        return F.layer_norm(features, features.shape[-1:], eps=1e-6) if self.cfg.normalise else features

    def predict(self, features, actions, states, extrinsics=None):
        """Frames [B, T, N, D], actions and states [B, T, A] -> [B, T, N, D], slot t = frame t + 1, normalised."""
        return self.normalise(self.predictor(self.normalise(features), actions, states, extrinsics))

    def rollout(self, features, actions, states, extrinsics=None, context=1, steps=None):
        """From the first `context` frames on own guesses -> [B, steps, N, D]; by default as far as actions reach."""
        steps = actions.shape[1] - context + 1 if steps is None else steps
        seen = self.normalise(features[:, :context])
        for t in range(context, context + steps):
            parts = (actions[:, :t], states[:, :t], None if extrinsics is None else extrinsics[:, :t])
            seen = torch.cat([seen, self.predict(seen, *parts)[:, -1:]], 1)
        return seen[:, context:]

    def frame_error(self, preds, targets):
        """Frames [B, T, N, D], both normalised -> the configured error of each, [B, T]."""
        d = preds.float() - targets.float()
        if self.cfg.loss_form == "huber":
            return F.huber_loss(d, torch.zeros_like(d), reduction="none").mean((2, 3))
        return (d.abs() if self.cfg.loss_form == "l1" else d.square()).mean((2, 3))


if __name__ == "__main__":
    sys.exit(V.main(world=Hope))
