"""What a world model expects to happen, as pictures: a pixel decoder for its latents, and the futures it samples.

    python tools/futures.py --ckpt runs/x/checkpoints/ckpt_final.pt [--clip FILE] [--num_samples 8] [--minutes 3]

A small decoder is trained for --minutes on frozen target latents of the run's own data (built-in scenes that no run
ever trains on, or the run's training videos) and kept beside the checkpoint. It learns only to look: the world model is
not changed, and how well the decoder sees is printed beside two pictures that need no model. Written to --out (default:
the run's folder / futures):

    rollout.mp4   truth, decoded true latents (the ceiling), point forecast and sampled futures side by side, NOW first
    frames.png    the same as a grid, one file per clip (frames_2.png, ...)
    latents.png   the first three principal components of SOON latents as colours, beside the pixels
    fan.png       built-in scenes: where sampled futures drive at a fork, and their shares against the true odds;
                  videos: a plane of futures with NOW, truth, point forecast and samples

A video of your own is shown with --clip FILE [--start SECONDS]. Where it ends inside SOON there is no truth to show.

A world that predicts frames (worlds/cosmos.py) needs no decoder of this tool:

    python tools/futures.py rollout --ckpt runs/x/checkpoints/ckpt_best.pt [--num_predict 60] [--clip FILE]

writes rollout.mp4, truth beside prediction with the error of every frame, and grid.png (tools/rollout.py).
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import copy
import hashlib
import io
import math
import os
import pickle
import sys
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 0)]

import evaluate as E

import VJepa_AUTO_V2 as V

# Scene seeds that no training run reaches, one range per purpose: to train the decoder, to judge it, to show.
TRAIN_SEED, JUDGE_SEED, SHOW_SEED = 10**16 + 10**12, 10**16 + 2 * 10**12, 10**16 + 3 * 10**12
RECIPE = 1  # counted up when the decoder or its training changes: older caches are then not used
POOL_CLIPS, POOL_BYTES, JUDGE_CLIPS = 4096, 2**30, 64
LEARNING_RATE = 6e-3  # of the decoder
LATENT_NOISE = 0.1  # deviation of the noise on latents in training, per clip |N(0, 1)| times this (RAE, 2510.11690)
FAN_SAMPLES, FAN_SCENES = 64, 12  # samples per scene, scenes per sign
SIGNS = (0.1, 0.3, 0.5, 0.7, 0.9)
BETWEEN = (0.25, 0.75)  # places on the line from the left branch (0) to the right one (1) that belong to neither
VGG_LAYERS = (3, 8, 15)  # relu1_2, relu2_2, relu3_3

# Okabe and Ito's colours, which the colour-blind tell apart
INK, QUIET, PAPER = (34, 34, 34), (120, 120, 120), (255, 255, 255)
COLOURS = {
    **dict(truth=INK, ceiling=QUIET, point=(0, 158, 115), sample=(0, 114, 178)),
    **dict(left=(0, 114, 178), right=(213, 94, 0), between=(150, 150, 150)),
}


# -- what the decoder learns from


def running(values, step):
    """Integral of values [n] over steps of `step`, 0 at the first -> [n]."""
    return np.concatenate([[0], np.cumsum((values[1:] + values[:-1]) / 2 * step)])


def lateral_path(labels):
    """Metres to the right of straight on, from speed and yaw rate of a scene's labels -> float [T]."""
    step, speed = 1 / labels["fps"], np.array(labels["speed"])
    return running(speed * np.tan(running(np.array(labels["yaw_rate"]), step)), step)


def tubelet_means(values, cfg):
    """Per-frame values [T] -> their mean over each SOON tubelet [soon_t]."""
    return values[cfg.now_frames : cfg.now_frames + cfg.soon_frames].reshape(-1, cfg.tubelet_t).mean(1)


def render(cfg, scene_seed, future_seed=0, kind=""):
    """A built-in scene as the model sees it -> (uint8 [T, H, W, 3], labels)."""
    clip, labels = E.scene_pictures(E.Job(scene_seed, future_seed, kind), cfg)
    return clip.permute(0, 2, 3, 1).numpy(), labels


class PoolClips(torch.utils.data.Dataset):
    """Clip i of a stream -> (frames uint8 [T, 3, H, W], lateral [soon_t], nan for videos, branch, readable).

    source None: built-in scenes, every second one a fork where the run has forks, since fan.png reads them.
    """

    def __init__(self, cfg, source, stream):
        self.cfg, self.dataset = cfg, source and source.dataset(cfg, stream)
        self.first = JUDGE_SEED if stream == "val" else TRAIN_SEED
        self.has_forks = V.mix_shares(cfg.scene_mix)[V.SCENE_KINDS.index("fork")] > 0

    def __getitem__(self, index):
        cfg = self.cfg
        if self.dataset is None:
            frames, labels = render(cfg, self.first + index, kind="fork" if self.has_forks and index % 2 else "")
            lateral = torch.from_numpy(tubelet_means(lateral_path(labels), cfg)).float()
            return E.as_frames(frames), lateral, torch.tensor(labels["branch"]), torch.tensor(True)
        frames, number, _, _, _ = self.dataset.decode(index, cfg.height, cfg.width)
        lateral = torch.full((cfg.soon_frames // cfg.tubelet_t,), math.nan)
        return E.as_frames(frames), lateral, torch.tensor(0), torch.tensor(number >= 0)


@dataclass
class Pool:
    """Encoded NOW and SOON: frames uint8 [n, T, 3, H, W], latents fp16 [n, t, h, w, D], points [n, M, D], labels."""

    frames: torch.Tensor
    latents: torch.Tensor
    points: torch.Tensor
    lateral: torch.Tensor
    branch: torch.Tensor

    def soon(self, cfg):
        """-> (true frames uint8 [n, soon_frames, 3, H, W], true latents fp32 [n, M, D])."""
        latents = self.latents[:, cfg.now_frames // cfg.tubelet_t :].flatten(1, 3)
        return self.frames[:, cfg.now_frames :], latents.float()


@torch.no_grad()
def fill_pool(model, source, stream, seconds, most, num_workers=0, least=8):
    """Encode clips until the time is up or there are enough, at least `least` -> Pool on the CPU. Held-out clips get
    their point forecasts too. UserError when none of the source's files can be decoded."""
    cfg, device, held_out = model.cfg, model.image_mean.device, stream == "val"
    seen, tubelets = cfg.now_frames + cfg.soon_frames, (cfg.now_frames + cfg.soon_frames) // cfg.tubelet_t
    clip_bytes = seen * 3 * cfg.height * cfg.width + 2 * tubelets * cfg.sites * cfg.enc_dim
    most = max(least, min(most, POOL_BYTES // clip_bytes))
    name, rows, count = "encode held-out clips" if held_out else "encode clips", [], 0
    collate = torch.utils.data.default_collate
    bar, loader = E.Bar(), E.open_loader(PoolClips(cfg, source, stream), most, 4, num_workers, collate)
    for frames, lateral, branch, readable in loader:
        if not readable.all():
            raise V.UserError(f"data_root {source.root}: none of its files can be decoded")
        shown = frames.to(device)
        if held_out:
            _, point, targets = model.see(shown)
        else:
            targets = model.make_targets(model.normalise(shown))
            point = targets.new_zeros(len(frames), 0)
        latents = targets[:, : tubelets * cfg.sites].reshape(-1, tubelets, *cfg.grid[1:], cfg.enc_dim)
        points = point[:, : cfg.soon_tokens].cpu()
        rows.append((frames[:, :seen].clone(), latents.half().cpu(), points, lateral, branch))
        count += len(frames)
        bar.show(max(bar.seconds / seconds, count / most), f"{name}: {count}")
        if bar.seconds > seconds and count >= least:
            break
    loader.close()
    bar.close(f"{name}: {count} of them, {V.describe_time(bar.seconds)}")
    return Pool(*(torch.cat(parts) for parts in zip(*rows)))


# -- the pixel decoder


def prime_factors(number):
    """8 -> [2, 2, 2], 14 -> [7, 2]: largest first, so that the widest picture is reached by the smallest step."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors[::-1]


class ConvBlock(nn.Module):
    """Residual block over [B, C, t, h, w]: a spatial 3 x 3 convolution, then one over three steps of time, or space."""

    def __init__(self, width, over_time):
        super().__init__()
        kernels = [(1, 3, 3), (3, 1, 1) if over_time else (1, 3, 3)]
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in kernels)
        self.convs = nn.ModuleList(
            nn.Conv3d(width, width, kernel, padding=tuple(side // 2 for side in kernel)) for kernel in kernels
        )
        nn.init.zeros_(self.convs[1].weight)

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.silu(norm(y)))
        return x + y


class Grow(nn.Module):
    """[B, C, t, h, w] -> [B, C', t, h * factor, w * factor]: a convolution, then channels become pixels."""

    def __init__(self, width, out, factor):
        super().__init__()
        self.conv, self.factor = nn.Conv3d(width, out * factor**2, (1, 3, 3), padding=(0, 1, 1)), factor

    def forward(self, x):
        B, _, t, h, w = x.shape
        x = self.conv(x).transpose(1, 2).flatten(0, 1)  # [B * t, C' * factor^2, h, w]
        return F.pixel_shuffle(x, self.factor).reshape(B, t, -1, h * self.factor, w * self.factor).transpose(1, 2)


class PixelDecoder(nn.Module):
    """Target latents [B, t, h, w, D] -> pictures [B, t * tubelet_t, 3, H, W] in units of 0 to 1, not cut off there.

    Tokens first look at their neighbours in space and time, then every tubelet unfolds into its frames, which grow to
    full size step by step. All layers overlap the borders of tokens, so no seams appear.
    """

    def __init__(self, cfg, width):
        super().__init__()
        _, h, w = cfg.grid
        self.frames_each, factors = cfg.tubelet_t, prime_factors(cfg.patch) or [1]
        self.stem, self.place = nn.Linear(cfg.enc_dim, width), nn.Parameter(torch.zeros(1, width, 1, h, w))
        self.mix = nn.Sequential(*(ConvBlock(width, over_time=True) for _ in range(3)))
        self.unfold = nn.Conv3d(width, width * cfg.tubelet_t, 1)
        steps, now = [ConvBlock(width, over_time=True)], width
        for factor in factors[:-1]:
            out = max(16, now // 16 * 8)
            steps += [Grow(now, out, factor), ConvBlock(out, over_time=False)]
            now = out
        self.rise, self.last = nn.Sequential(*steps), Grow(now, 3, factors[-1])
        # at the library's own scale nothing was learned for 100 steps
        for layer in (self.stem, self.unfold, *(step.conv for step in steps if isinstance(step, Grow))):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)

    def forward(self, latents):
        x = self.stem(latents).permute(0, 4, 1, 2, 3) + self.place  # [B, C, t, h, w]
        B, C, t, h, w = x.shape
        x = self.unfold(self.mix(x)).reshape(B, C, self.frames_each, t, h, w)  # [B, C, dt, t, h, w]
        x = x.transpose(2, 3).reshape(B, C, t * self.frames_each, h, w)
        return self.last(F.silu(self.rise(x))).transpose(1, 2) + 0.5  # [B, T, 3, H, W]


def l1(a, b):
    """Mean absolute difference -> scalar."""
    return (a - b).abs().mean()


class Perceptual(nn.Module):
    """Distance of pictures in the features of a VGG16 whose weights lie in torchvision's cache already."""

    def __init__(self):
        super().__init__()
        from torchvision.models import VGG16_Weights
        from torchvision.models.vgg import cfgs, make_layers

        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
        if not path.is_file():
            advice = "put them there, or leave --perceptual out"
            raise V.UserError(f"perceptual: the VGG16 weights are not at {path}; {advice}")
        self.layers = make_layers(cfgs["D"], batch_norm=False)[: max(VGG_LAYERS) + 1]
        weights = torch.load(path, map_location="cpu", weights_only=True)
        self.layers.load_state_dict({name: weights[f"features.{name}"] for name in self.layers.state_dict()})
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(V.IMAGE_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(V.IMAGE_STD).view(3, 1, 1))

    def forward(self, pictures, truth):
        """[n, 3, H, W] in units of 0 to 1, both -> scalar."""
        both = (torch.cat([pictures, truth]) - self.mean) / self.std
        loss = 0.0
        for number, layer in enumerate(self.layers):
            both = layer(both)
            if number in VGG_LAYERS:
                loss = loss + l1(*F.normalize(both, dim=1).chunk(2))
        return loss


def picture_loss(pictures, truth):
    """L1 of pixels plus L1 of differences between neighbours at three scales, which keeps edges sharp. [n, 3, H, W]
    each -> scalar. Pixels that stand out from their surroundings count up to five times: cars and markings are few."""
    detail = (truth - F.avg_pool2d(truth, 9, 1, 4, count_include_pad=False)).abs().amax(1, keepdim=True)
    loss = ((1 + 4 * (detail / 0.2).clamp_max(1)) * (pictures - truth).abs()).mean()
    for _ in range(3):
        if min(pictures.shape[-2:]) < 4:
            break
        loss = loss + l1(pictures.diff(dim=-1), truth.diff(dim=-1)) + l1(pictures.diff(dim=-2), truth.diff(dim=-2))
        pictures, truth = F.avg_pool2d(pictures, 2), F.avg_pool2d(truth, 2)
    return loss


def train_decoder(decoder, pool, cfg, seconds, max_steps=math.inf, perceptual=None, seed=0):
    """Train on noisy latents of the pool until time or steps are spent -> (its EMA in eval mode, steps done).

    The learning rate falls to zero with the larger spent share. A batch is a few tubelets of each of some clips. The
    precision is what the run's --amp means on this machine.
    """
    device, slow = decoder.place.device, copy.deepcopy(decoder).eval().requires_grad_(False)
    process = E.own_precision(cfg, device)
    if process.amp_dtype == torch.float16:  # would need a loss scaler
        process.amp_dtype = None
    tubelets, dt = pool.latents.shape[1], cfg.tubelet_t
    window = min(4, tubelets)
    batch_size = int(np.clip(2**17 // (window * dt * cfg.height * cfg.width), 2, 16)) if device.type == "cpu" else 16
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    generator, bar, step, share = torch.Generator().manual_seed(seed), E.Bar(), 0, 0.0
    while step == 0 or share < 1:
        rate = LEARNING_RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = rate
        rows = torch.randint(len(pool.latents), (batch_size,), generator=generator)
        first = int(torch.randint(tubelets - window + 1, (), generator=generator))
        latents = pool.latents[rows, first : first + window].to(device).float()
        scale = LATENT_NOISE * torch.randn(batch_size, 1, 1, 1, 1, generator=generator).abs()
        latents = latents + scale.to(device) * torch.randn(latents.shape, generator=generator).to(device)
        truth = pool.frames[rows, first * dt : (first + window) * dt].to(device).float().flatten(0, 1) / 255
        with V.autocast(process):
            pictures = decoder(latents).flatten(0, 1).float()
        loss = picture_loss(pictures, truth)
        if perceptual is not None:
            loss = loss + 0.1 * perceptual(pictures, truth)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        follow = 1 - min(0.99, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(slow.parameters()), list(decoder.parameters()), follow)
        step += 1
        share = max(bar.seconds / seconds, step / max_steps)
        if step % 10 == 0:
            bar.show(share, f"train decoder: step {step} loss {float(loss.detach()):.4f}")
    bar.close(f"train decoder: {step} steps, {V.describe_time(bar.seconds)}")
    return slow, step


def soon_grid(cfg):
    """Token grid of SOON (t, h, w)."""
    return (cfg.soon_frames // cfg.tubelet_t, *cfg.grid[1:])


@torch.no_grad()
def decode_soon(decoder, latents, cfg):
    """SOON latents [n, M, D] in (t, h, w) order -> uint8 [n, soon_frames, H, W, 3] on the CPU."""
    shape, device = (-1, *soon_grid(cfg), cfg.enc_dim), decoder.place.device
    pictures = [decoder(part.to(device).float().reshape(shape)).cpu() for part in latents.split(4)]
    return (torch.cat(pictures).clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()


def psnr(pictures, truth):
    """Both in units of 0 to 255, any shape -> (mean absolute error, peak signal-to-noise ratio in dB)."""
    error = pictures.astype(np.float32) - truth.astype(np.float32)
    return float(np.abs(error).mean()), float(10 * np.log10(255**2 / max(np.square(error).mean(), 1e-9)))


def judge_decoder(decoder, pool, held_out, cfg):
    """{what: (L1, PSNR)} on held-out SOON frames: the decoder, and two pictures that need no model."""
    truth, latents = held_out.soon(cfg)
    truth = truth.permute(0, 1, 3, 4, 2).numpy()
    last_now = held_out.frames[:, cfg.now_frames - 1 : cfg.now_frames].permute(0, 1, 3, 4, 2).numpy()
    mean = pool.soon(cfg)[0].float().mean((0, 1)).permute(1, 2, 0).numpy()
    shown = {
        "decoder on true latents": decode_soon(decoder, latents, cfg),
        "decoder on the point forecast": decode_soon(decoder, held_out.points, cfg),
        "last NOW frame repeated": np.broadcast_to(last_now, truth.shape),
        "mean frame": np.broadcast_to(mean, truth.shape),
    }
    return {name: psnr(pictures, truth) for name, pictures in shown.items()}


# -- readings of latents: where the car drives, and a plane of futures


def probe_features(soon, cfg):
    """SOON latents [n, M, D] -> per tubelet, means over 2 x 3 parts of the picture [n, soon_t, features]."""
    n, (_, h, w) = len(soon), cfg.grid
    picture = soon.float().reshape(-1, h, w, cfg.enc_dim).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(picture, (min(2, h), min(3, w))).reshape(n, cfg.soon_frames // cfg.tubelet_t, -1)


def ridge(features, values):
    """Ridge regression [n, d], [n] -> weights [d + 1], constant last; the strength is best on a left-out quarter."""
    mean, centre, n = features.double().mean(0), values.double().mean(), len(features)
    x, y, fit = features.double() - mean, values.double() - centre, torch.arange(n) % 4 > 0
    strengths, errors = 10.0 ** torch.arange(-4, 3) * x.square().sum() / n, []
    u, s, v = torch.linalg.svd(x[fit], full_matrices=False)
    for strength in strengths:
        errors.append((x[~fit] @ (v.T @ (s / (s**2 + strength) * (u.T @ y[fit]))) - y[~fit]).square().mean())
    strength = strengths[int(torch.stack(errors).argmin())]
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    weights = v.T @ (s / (s**2 + strength) * (u.T @ y))
    return torch.cat([weights, (centre - mean @ weights)[None]]).float()


def read_lateral(weights, soon, cfg):
    """Probe weights [soon_t, features + 1] on SOON latents [n, M, D] -> metres to the right [n, soon_t]."""
    return torch.einsum("ntf,tf->nt", probe_features(soon, cfg), weights[:, :-1]) + weights[:, -1]


def fit_readings(pool, held_out, cfg):
    """What fan.png needs, fitted on real latents -> dict of tensors: a plane, and where the clips are scenes the probe
    of lateral displacement, with its R2 and the share of held-out forks whose branch it tells."""
    soon = pool.soon(cfg)[1]
    pooled = soon.mean(1)
    mean = pooled.mean(0)
    basis = torch.linalg.svd(pooled - mean, full_matrices=False).Vh[:2].T  # [D, 2]
    readings = {"mean": mean, "basis": basis, "bank": ((pooled - mean) @ basis)[:512]}
    if not pool.lateral.isfinite().all() or not pool.branch.any():
        return readings
    features = probe_features(soon, cfg)
    weights = torch.stack([ridge(features[:, step], pool.lateral[:, step]) for step in range(features.shape[1])])
    read, fork = read_lateral(weights, held_out.soon(cfg)[1], cfg), held_out.branch != 0
    left_over = (read - held_out.lateral).square().sum() / (held_out.lateral - held_out.lateral.mean(0)).square().sum()
    told = (read[fork, -1] > 0) == (held_out.branch[fork] > 0)
    return {**readings, "probe": weights, "probe_r2": 1 - left_over, "branch_told": told.float().mean()}


def branch_shares(last, left, right):
    """Lateral places [K] of samples at the end of SOON, true places of the two branches -> (share right, share between,
    names [K]).

    A sample belongs to the branch on whose side of the middle it lies; between are those nearer to the middle.
    """
    place = (np.asarray(last) - left) / (right - left)
    between = (place > BETWEEN[0]) & (place < BETWEEN[1])
    names = np.where(between, "between", np.where(place > 0.5, "right", "left"))
    return float((place > 0.5).mean()), float(between.mean()), names.tolist()


def true_branches(cfg, scene_seed):
    """A fork scene's two true futures -> {-1: lateral [soon_t], 1: lateral [soon_t]}, the first of each that comes."""
    small, found = replace(cfg, image_size=(16, 16), scene_size=0), {}  # labels do not depend on the size drawn
    for future_seed in range(1000):
        _, labels = V.scene(scene_seed, future_seed, small, "fork")
        found.setdefault(labels["branch"], tubelet_means(lateral_path(labels), cfg))
        if len(found) == 2:
            return found
    raise ValueError(f"scene {scene_seed}: one of its branches never came in 1000 futures")


# -- the cache beside the checkpoint


def decoder_key(model, step, origin):
    """Hash of what a decoder hangs on: step, weights that make latents and forecast, data, recipe -> 16 letters."""
    digest = hashlib.sha256(f"{RECIPE} {step} {origin}".encode())
    for part in (model.target, model.online, model.predictor):
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def read_cache(path, key, cfg, device):
    """The decoder at a path -> (decoder, its saved dict), or (None, why not), as for one made for other weights."""
    if not path.is_file():
        return None, ""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["key"] != key:
            return None, f"{path}: made for other weights or data"
        decoder = PixelDecoder(cfg, saved["width"])
        decoder.load_state_dict(saved["decoder"])
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
        return None, f"{path}: not readable ({type(error).__name__})"
    return decoder.to(device).eval().requires_grad_(False), saved


def get_decoder(model, source, path, key, minutes, num_workers, perceptual, seed):
    """The cached decoder if it fits and was trained long enough, else a new one -> (decoder, its saved dict)."""
    cfg, device = model.cfg, model.image_mean.device
    decoder, saved = read_cache(path, key, cfg, device)
    if decoder is not None and saved["minutes"] >= minutes:
        V.say(f"decoder: {path}, trained before for {saved['minutes']:g} min", sys.stderr)
        return decoder, saved
    if decoder is not None:
        V.say(f"decoder: {path} was trained for {saved['minutes']:g} min only: trained anew", sys.stderr)
    elif saved:
        V.say(f"decoder: {saved}: trained anew", sys.stderr)
    seconds, width = 60 * minutes, 96 if device.type == "cpu" else 192
    held_out = fill_pool(model, source, "val", 0.08 * seconds, JUDGE_CLIPS, num_workers)
    pool = fill_pool(model, source, "train", 0.27 * seconds, POOL_CLIPS, num_workers, least=16)
    torch.manual_seed(seed)
    fresh = PixelDecoder(cfg, width).to(device)
    decoder, _ = train_decoder(fresh, pool, cfg, 0.65 * seconds, perceptual=perceptual, seed=seed)
    saved = {"key": key, "width": width, "minutes": minutes, "decoder": decoder.state_dict(), "made_by": V.MARK}
    saved |= {"readings": fit_readings(pool, held_out, cfg), "report": judge_decoder(decoder, pool, held_out, cfg)}
    try:
        V.write_own(path, lambda handle: torch.save(saved, handle))
    except OSError as error:
        V.say(f"decoder: not kept, {path.parent} cannot be written ({error.strerror})", sys.stderr)
    return decoder, saved


# -- what is shown


@dataclass
class Exhibit:
    """One clip to show. true, true_pictures: None where the file ends in SOON; names: branch of samples at a fork."""

    title: str
    frames: np.ndarray  # uint8 [T, H, W, 3]: NOW, and SOON where it is known
    fps: float  # 0: frames are spread over the file, their times are not known
    now: torch.Tensor  # [D], pooled latents of NOW
    true: torch.Tensor | None  # [M, D]
    point: torch.Tensor  # [M, D]
    samples: torch.Tensor  # [S, M, D]
    true_pictures: np.ndarray | None  # uint8 [soon_frames, H, W, 3]
    point_pictures: np.ndarray
    sample_pictures: np.ndarray  # uint8 [S, soon_frames, H, W, 3]
    names: list = field(default_factory=list)

    def time_of(self, frame):
        """'+0.50 s' after the last NOW frame, for a frame counted from the first SOON frame (below 0: in NOW)."""
        return f"{(frame + 1) / self.fps:{'+' if frame != -1 else ''}.2f} s" if self.fps else f"frame {frame + 1:+d}"


def scene_title(odds):
    """One line that says what may happen in a built-in scene."""
    if odds["kind"] == "fork":
        return f"Fork: the sign gives the right branch {odds['right']:.0%}"
    if odds["kind"] == "brake":
        return f"Lead car: it brakes within SOON with {odds['brake_in_soon']:.0%}"
    if odds["kind"] == "lane":
        return f"Lane change: left {odds['left']:.0%}, keep {odds['keep']:.0%}, right {odds['right']:.0%}"
    if odds["kind"] == "occluder":
        return f"A car passes behind a truck: it stops there with {odds['stops']:.0%}"
    return "Steady: nothing uncertain happens"


SHOWN_ODDS = {  # kind -> key and values of the odds of its first, second and third scene
    "fork": ("right", (0.5, 0.9, 0.1)),
    "lane": ("left", (0.8, 0.1, 0.0)),
    "brake": ("hazard", (1.0, 0.2, 1.0)),
}


def pick_scenes(cfg, seed):
    """Three built-in scenes of kinds that the run trains on -> [(scene_seed, kind)], an even fork first."""
    shares = dict(zip(V.SCENE_KINDS, V.mix_shares(cfg.scene_mix)))
    kinds = [kind for kind in ("fork", "lane", "brake", "occluder", "steady") if shares[kind] > 0]
    first, chosen = SHOW_SEED + 1000 * seed, {}
    for kind in (kinds * 3)[:3]:
        key, wanted = SHOWN_ODDS.get(kind, ("", ()))
        number = list(chosen.values()).count(kind)
        for scene_seed in range(first, first + 1000):
            odds = V.scene_odds(scene_seed, cfg, kind)
            if scene_seed not in chosen and (not key or math.isclose(odds[key], wanted[number], abs_tol=1e-9)):
                chosen[scene_seed] = kind
                break
    return list(chosen.items())


def clip_window(path, start, cfg, name="clip"):
    """A user's video from `start` s on -> uint8 [T, H, W, 3], T the longest of all, NOW + SOON, NOW that it holds.
    `name` is what an error calls it."""
    if not os.path.isfile(path):
        raise V.UsageError(f"{name} {path}: no such file")
    try:
        V.check_regular(path)
        plan = V.ClipPlan(cfg.num_frames, cfg.clip_fps, cfg.height, cfg.width, 0.0, 1.0, 1.0, 0.5, 0.5, cfg.frame_fps)
        duration, native_fps = V.video_timing(path, plan)
    except (V.BadFile, *V.DECODE_ERRORS) as error:
        raise V.UserError(f"{name} {path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    num_frames, room = cfg.num_frames, 0.0  # without clip_fps the frames are spread over the whole file
    if cfg.clip_fps:
        lengths = (cfg.num_frames, cfg.now_frames + cfg.soon_frames, cfg.now_frames)
        fitting = [length for length in lengths if start + length / cfg.clip_fps <= duration + 0.5 / native_fps]
        if not fitting:
            needed = f"NOW needs {cfg.now_frames / cfg.clip_fps:.2f} s from {start:g} s on (--start)"
            raise V.UserError(f"{name} {path}: {duration:.2f} s long, {needed}")
        num_frames = fitting[0]
        room = duration - num_frames / cfg.clip_fps
    plan = replace(plan, num_frames=num_frames, u_start=min(start / room, 1.0) if room > 0 else 0.0)
    try:
        return V.read_frames(path, plan, cfg.decoder)
    except V.BadFile as error:
        raise V.UserError(f"{name} {path}: {error}") from error


@torch.no_grad()
def make_exhibit(model, decoder, frames, title, num_samples, seed):
    """frames uint8 [T, H, W, 3], T at least NOW -> Exhibit with all latents on the CPU."""
    cfg, device, M = model.cfg, model.image_mean.device, model.cfg.soon_tokens
    context, point, targets = model.see(E.as_frames(frames)[None].to(device))
    generator, point, targets = torch.Generator(device).manual_seed(seed), point[0, :M], targets[0]
    samples = model.sample_futures(context, num_samples, generator=generator)[0, :, :M]
    true, pictures, now = None, None, targets[: cfg.now_tokens].mean(0)
    if len(frames) >= cfg.now_frames + cfg.soon_frames:
        true = targets[cfg.now_tokens : cfg.now_tokens + M].cpu()
        pictures = decode_soon(decoder, true[None], cfg)[0]
    latents = (now.cpu(), true, point.cpu(), samples.cpu())
    pictures = (pictures, decode_soon(decoder, point[None], cfg)[0], decode_soon(decoder, samples, cfg))
    return Exhibit(title, frames[: cfg.now_frames + cfg.soon_frames], cfg.clip_fps, *latents, *pictures)


def gather_exhibits(model, decoder, source, readings, args):
    """The clips to show: the user's, or three built-in scenes, or three held-out videos -> [Exhibit]."""
    cfg, shown, how = model.cfg, [], (args.num_samples, args.seed)
    if args.clip:
        frames = clip_window(args.clip, args.start, cfg)
        if len(frames) < cfg.now_frames + cfg.soon_frames:
            V.say(f"clip {args.clip}: ends inside SOON, so there is no truth to show beside the forecast")
        return [make_exhibit(model, decoder, frames, os.path.basename(args.clip), *how)]
    if source is not None:
        data = source.dataset(cfg, "val")
        for index in range(min(3, len(source.val))):
            frames, number, _, _, _ = data.decode(index + 3 * args.seed, cfg.height, cfg.width)
            shown.append(make_exhibit(model, decoder, frames, data.videos[number].name, *how))
        return shown
    for scene_seed, kind in pick_scenes(cfg, args.seed):
        frames, _ = render(cfg, scene_seed, 0, kind)
        exhibit = make_exhibit(model, decoder, frames, scene_title(V.scene_odds(scene_seed, cfg, kind)), *how)
        if kind == "fork" and "probe" in readings:
            truth, read = true_branches(cfg, scene_seed), read_lateral(readings["probe"], exhibit.samples, cfg)
            exhibit.names = branch_shares(read[:, -1], truth[-1][-1], truth[1][-1])[2]
        shown.append(exhibit)
    return shown


# -- pictures


@lru_cache(maxsize=8)
def font(size):
    """Pillow's own typeface."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def scaled(picture, size):
    """uint8 [H, W, 3] -> Pillow image of size (width, height), smooth."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.BICUBIC)


def panel_size(cfg, side):
    """(width, height) of a panel of about side x side pixels in area, both even."""
    grow = side / math.sqrt(cfg.height * cfg.width)
    return 2 * round(cfg.width * grow / 2), 2 * round(cfg.height * grow / 2)


def new_page(width, height, title):
    """A blank page with a title -> (image, drawing tools)."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((12, 10), title, fill=INK, font=font(19))
    return page, draw


def draw_label(draw, y, height, title, colour, below):
    """The name of a row at its left end; what follows a comma stands below it, in the colour `below`."""
    name, _, side = title.partition(", ")
    draw.rectangle((12, y, 17, y + height - 1), fill=colour)
    draw.text((25, y + height / 2 - (18 if side else 9)), name, fill=INK, font=font(14))
    draw.text((25, y + height / 2), side, fill=below, font=font(14))


def panels(exhibit, now_frames):
    """What is shown of a clip, in order -> [(title, colour, pictures [soon_frames, H, W, 3])]; truth where known."""
    rows = []
    if exhibit.true is not None:
        rows.append(("Truth", COLOURS["truth"], exhibit.frames[now_frames:]))
        rows.append(("Truth, decoded", COLOURS["ceiling"], exhibit.true_pictures))
    rows.append(("Point forecast", COLOURS["point"], exhibit.point_pictures))
    for number, pictures in enumerate(exhibit.sample_pictures):
        name = exhibit.names[number] if exhibit.names else ""
        rows.append((f"Sample {number + 1}" + f", {name}" * bool(name), COLOURS[name or "sample"], pictures))
    return rows


UNIT = {name: tuple(value / 255 for value in colour) for name, colour in COLOURS.items()}  # for matplotlib


def counted(names):
    """['left', 'right', 'left'] -> '2 left, 1 right'."""
    return ", ".join(f"{names.count(name)} {name}" for name in ("left", "between", "right") if name in names)


def draw_panel(draw, page, place, size, title, colour, picture, badge):
    """One titled picture with a coloured frame at a place (x, y) of the page; the title stands above it."""
    x, y = place
    draw.rectangle((x - 3, y - 3, x + size[0] + 2, y + size[1] + 2), fill=colour)
    page.paste(scaled(picture, size), (x, y))
    draw.rectangle((x, y - 16, x + 9, y - 7), fill=colour)
    draw.text((x + 15, y - 20), title, fill=INK, font=font(14))
    if badge:
        wide = draw.textlength(badge, font=font(13))
        draw.rectangle((x, y, x + wide + 10, y + 19), fill=INK)
        draw.text((x + 5, y + 1), badge, fill=PAPER, font=font(13))


def draw_notes(draw, x, y, width, exhibit, now_frames):
    """The text in the free part of a rollout page: what was seen, what is shown, what the samples say."""
    seconds = f", {now_frames / exhibit.fps:g} s" if exhibit.fps else ""
    shown = "All but the truth are decoded from latents."
    if exhibit.true is None:
        shown = "What came next is not known: all pictures after NOW are decoded from latents."
    said = f"{len(exhibit.samples)} samples: {counted(exhibit.names)}" if exhibit.names else ""
    for text in (f"The model has seen NOW: {now_frames} frames{seconds}.", shown, said):
        y = 8 + V.draw_text(draw, text, (x, y), width, font(15), 20, INK)


def rollout_page(exhibit, frame, cfg):
    """One picture of rollout.mp4, all panels at a frame of NOW + SOON, samples below -> uint8 [H, W, 3]."""
    from PIL import Image, ImageDraw

    shown, size, gap, head = panels(exhibit, cfg.now_frames), panel_size(cfg, 208), 14, 62
    first_row = len(shown) - len(exhibit.samples)
    columns = 4
    rows = 1 + math.ceil(len(exhibit.samples) / columns)
    width, height = gap + columns * (size[0] + gap), head + rows * (size[1] + gap + 24)
    page = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
    draw, soon = ImageDraw.Draw(page), frame - cfg.now_frames
    draw.text((gap, 8), exhibit.title, fill=INK, font=font(19))
    clock = ("NOW" if soon < 0 else "SOON") + f"  {exhibit.time_of(soon)}"
    draw.text((width - gap - draw.textlength(clock, font=font(19)), 8), clock, fill=INK, font=font(19))
    total, line = cfg.now_frames + cfg.soon_frames, width - 2 * gap
    split, here = gap + line * cfg.now_frames // total, gap + line * (frame + 1) // total
    draw.rectangle((gap, 40, gap + line, 44), fill=(225, 225, 225))
    draw.rectangle((gap, 40, here, 44), fill=COLOURS["sample"])
    draw.rectangle((gap, 40, min(split, here), 44), fill=INK)
    for number, (title, colour, pictures) in enumerate(shown):
        row, column = (0, number) if number < first_row else divmod(number - first_row + columns, columns)
        place = gap + column * (size[0] + gap), head + 22 + row * (size[1] + gap + 24)
        picture = exhibit.frames[frame] if soon < 0 else pictures[soon]
        draw_panel(draw, page, place, size, title, colour, picture, "NOW" if soon < 0 else "")
    notes = gap + first_row * (size[0] + gap)
    draw_notes(draw, notes, head + 20, width - gap - notes, exhibit, cfg.now_frames)
    return np.asarray(page)


def write_rollout(path, exhibits, cfg):
    """rollout.mp4: clip after clip with a short stay on each last picture; 4 to 8 pictures per second, at least 6 s."""
    pages = []
    for exhibit in exhibits:
        clip = [rollout_page(exhibit, frame, cfg) for frame in range(cfg.now_frames + cfg.soon_frames)]
        pages += clip + clip[-1:] * 3
    fps = int(np.clip(round(len(pages) / 9), 4, 8))
    pages = pages * max(1, round(6 * fps / len(pages)))
    video = io.BytesIO()
    V.write_video(video, np.stack(pages), fps, V.MARK)
    V.write_own(path, lambda handle: handle.write(video.getvalue()))


def even_picks(count, most):
    """At most `most` of count places, evenly spread, both ends included -> list."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def draw_frames(exhibit, cfg):
    """frames.png: rows truth, decoded truth, forecast, samples; columns two NOW, up to eight SOON frames -> image."""
    shown, size, gap, label, top = panels(exhibit, cfg.now_frames), panel_size(cfg, 104), 5, 138, 68
    columns = [frame for frame in (-2, -1) if frame >= -cfg.now_frames] + even_picks(cfg.soon_frames, 8)
    extra = 12  # between NOW and SOON
    wide = label + len(columns) * (size[0] + gap) + extra + 8
    page, draw = new_page(wide, top + len(shown) * (size[1] + gap) + 8, exhibit.title)
    for number, frame in enumerate(columns):
        x = label + number * (size[0] + gap) + extra * (frame >= 0)
        head = ("NOW " if frame < 0 else "") + exhibit.time_of(frame)
        draw.text((x + (size[0] - draw.textlength(head, font=font(13))) / 2, top - 22), head, fill=INK, font=font(13))
        for row, (_, _, pictures) in enumerate(shown):
            picture = pictures[frame] if frame >= 0 else exhibit.frames[cfg.now_frames + frame]
            page.paste(scaled(picture, size), (x, top + row * (size[1] + gap)))
    for row, (title, colour, _) in enumerate(shown):
        below = colour if exhibit.names and row > 2 else QUIET
        draw_label(draw, top + row * (size[1] + gap), size[1], title, colour, below)
    return page


def latent_colours(fitted, shown, cfg):
    """Principal components of fitted [M, D] as colours of shown [n, M, D] -> uint8 [n, t, h, w, 3]."""
    mean = fitted.mean(0)
    basis = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[:3].T
    basis = F.pad(basis, (0, 3 - basis.shape[1]))
    own = (fitted - mean) @ basis
    low, high = own.quantile(0.02, 0), own.quantile(0.98, 0)
    unit = ((shown - mean) @ basis - low) / (high - low).clamp_min(1e-6)
    return (unit.clamp(0, 1) * 255).round().byte().reshape(len(shown), *soon_grid(cfg), 3).numpy()


def draw_latents(exhibit, cfg, most_samples=4):
    """latents.png: principal components as colours, left, beside the pixels of the same tubelets, right -> image."""
    from PIL import Image

    shown = [row for row in panels(exhibit, cfg.now_frames) if row[0] != "Truth, decoded"][: 2 + most_samples]
    latents = ([] if exhibit.true is None else [exhibit.true]) + [exhibit.point, *exhibit.samples]
    colours = latent_colours(latents[0], torch.stack(latents[: len(shown)]), cfg)
    picks, size, gap, label, top = even_picks(cfg.soon_frames // cfg.tubelet_t, 6), panel_size(cfg, 104), 5, 138, 94
    half = len(picks) * (size[0] + gap)
    page, draw = new_page(label + 2 * half + 30, top + len(shown) * (size[1] + gap) + 8, exhibit.title)
    of_what = "the point forecast" if exhibit.true is None else "the true latents"
    draw.text((label, 42), f"Latents: three principal components of {of_what}", fill=QUIET, font=font(14))
    draw.text((label + half + 20, 42), "Pixels: first frame of the same tubelets", fill=QUIET, font=font(14))
    for column, tubelet in enumerate(picks):
        x, time = label + column * (size[0] + gap), exhibit.time_of(tubelet * cfg.tubelet_t)
        for left in (x, x + half + 20):
            draw.text((left + size[0] / 2 - 24, top - 24), time, fill=INK, font=font(13))
        for row, (_, _, pictures) in enumerate(shown):
            y, block = top + row * (size[1] + gap), Image.fromarray(colours[row, tubelet])
            page.paste(block.resize(size, Image.Resampling.NEAREST), (x, y))
            page.paste(scaled(pictures[tubelet * cfg.tubelet_t], size), (x + half + 20, y))
    for row, (title, colour, _) in enumerate(shown):
        draw_label(draw, top + row * (size[1] + gap), size[1], title, colour, colour)
    return page


# -- the fan


@torch.no_grad()
def sample_fans(model, readings, seed, num_samples, num_scenes):
    """Sampled futures of num_scenes fork scenes of every sign, read by the probe -> {odds of right: [fan, one dict per
    scene]}.

    A fan holds samples [K, soon_t], point [soon_t] and truth {-1, 1: [soon_t]} in metres to the right, the shares of
    `branch_shares` and the last NOW frame.
    """
    cfg, device, probe, M = model.cfg, model.image_mean.device, readings["probe"], model.cfg.soon_tokens
    first, fans, bar = SHOW_SEED + 10**9 + 10**5 * seed, {sign: [] for sign in SIGNS}, E.Bar()
    for scene_seed in range(first, first + 10**4):
        sign = V.scene_odds(scene_seed, cfg, "fork")["right"]
        if len(fans[sign]) == num_scenes:
            continue
        now = render(cfg, scene_seed, 0, "fork")[0][: cfg.now_frames]
        context, point, _ = model.see(E.as_frames(now)[None].to(device))
        generator = torch.Generator(device).manual_seed(seed * 10**6 + scene_seed % 10**6)
        samples = model.sample_futures(context, num_samples, generator=generator)[0, :, :M].cpu()
        read, truth = read_lateral(probe, samples, cfg).numpy(), true_branches(cfg, scene_seed)
        right, between, names = branch_shares(read[:, -1], truth[-1][-1], truth[1][-1])
        fan = dict(samples=read, truth=truth, right=right, between=between, names=names, now=now[-1])
        fans[sign].append({**fan, "point": read_lateral(probe, point[:, :M].cpu(), cfg)[0].numpy()})
        bar.show(sum(map(len, fans.values())) / (num_scenes * len(SIGNS)), "sample fans")
        if all(len(rows) == num_scenes for rows in fans.values()):
            break
    each = f"{num_scenes} scenes for each of {len(SIGNS)} signs, {num_samples} samples each"
    bar.close(f"sample fans: {each}, {V.describe_time(bar.seconds)}")
    return fans


def share_summary(rows):
    """Fans of one sign -> (mean share right, its standard error over scenes, mean share between)."""
    right = np.array([row["right"] for row in rows])
    error = right.std(ddof=1) / math.sqrt(len(right)) if len(right) > 1 else 0.0
    return float(right.mean()), float(error), float(np.mean([row["between"] for row in rows]))


def plot_fan(axes, fan, sign, cfg, big):
    """One fan from above: metres sideways against seconds, samples thin, true branches thick, point forecast dashed."""
    fps = cfg.clip_fps or 4.0
    seconds = (np.arange(len(fan["point"])) + 0.5) * (cfg.tubelet_t / fps) + 0.5 / fps
    up, paths = np.concatenate([[0], seconds]), []
    wide = dict(alpha=0.3, linewidth=11 if big else 7, solid_capstyle="round")
    paths += [(fan["truth"][side], name, wide) for side, name in ((-1, "left"), (1, "right"))]
    paths += [(path, name, dict(alpha=0.55, linewidth=0.9)) for path, name in zip(fan["samples"], fan["names"])]
    paths.append((fan["point"], "point", dict(linestyle="--", linewidth=2.2)))
    for path, name, style in paths:
        axes.plot(np.concatenate([np.zeros(1), path]), up, color=UNIT[name], **style)
    truth = max(abs(fan["truth"][side][-1]) for side in (-1, 1))
    # a model that knows nothing may draw far outside
    reach = 1.15 * max(truth, min(float(np.quantile(np.abs(fan["samples"]), 0.99)), 2 * truth))
    axes.set_xlim(-reach, reach)
    axes.set_ylim(0, seconds[-1] * 1.04)
    axes.spines[["top", "right"]].set_visible(False)
    sampled = f"sampled: right {fan['right']:.0%}" + f", between {fan['between']:.0%}" * big
    axes.set_title(f"sign: right {sign:.0%}{', ' if big else chr(10)}{sampled}", fontsize=13 if big else 11)
    inset = axes.inset_axes((0.01, 0.02, 0.3, 0.3) if big else (0.01, 0.02, 0.34, 0.34))
    inset.imshow(fan["now"])
    inset.set_xticks([]), inset.set_yticks([])
    inset.set_title("NOW", fontsize=9, pad=2)


def plot_shares(axes, fans):
    """Bars of the share of samples on the right branch per sign, with errors over scenes, against the true odds."""
    signs, (shares, errors, _) = list(fans), zip(*(share_summary(fan) for fan in fans.values()))
    places, look = np.arange(len(signs)), dict(color=UNIT["right"], alpha=0.85, label="share of samples")
    axes.bar(places, list(shares), 0.62, yerr=list(errors), capsize=4, error_kw={"linewidth": 1.4}, **look)
    axes.hlines(signs, places - 0.42, places + 0.42, color="black", linewidth=2.5, label="true odds")
    axes.set_xticks(places, [f"{sign:.0%}" for sign in signs])
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("odds of the right branch, as the sign shows them")
    axes.set_title("Samples that turn right", fontsize=13)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(width, height):
    """An empty matplotlib figure that needs no display. Sides in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path):
    """A matplotlib figure as PNG with the MARK."""
    V.write_own(path, lambda handle: figure.savefig(handle, format="png", dpi=120, metadata={"Software": V.MARK}))


LEGEND = (  # name, colour, and how its line looks
    ("true branch", "between", dict(linewidth=7, linestyle="-", alpha=0.4)),
    ("sample, left", "left", dict(linewidth=1.5, linestyle="-", alpha=1)),
    ("sample, right", "right", dict(linewidth=1.5, linestyle="-", alpha=1)),
    ("sample, between", "between", dict(linewidth=1.5, linestyle="-", alpha=1)),
    ("point forecast", "point", dict(linewidth=2.2, linestyle="--", alpha=1)),
)


def draw_fan(path, fans, readings, cfg):
    """fan.png for built-in scenes: the fan at even odds, the shares, and a fan for every other sign."""
    from matplotlib.lines import Line2D

    figure = new_figure(13, 9.4)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    big, bars = upper.subplots(1, 2, width_ratios=(1.25, 1))
    plot_fan(big, fans[0.5][0], 0.5, cfg, True)
    big.set_xlabel("metres to the right of straight on")
    big.set_ylabel("seconds after NOW")
    plot_shares(bars, fans)
    lines = [Line2D([], [], color=UNIT[colour], **look) for _, colour, look in LEGEND]
    big.legend(lines, [name for name, _, _ in LEGEND], frameon=False, loc="lower right", fontsize=9)
    small = lower.subplots(1, len(SIGNS) - 1, sharey=True)
    for axes, sign in zip(small, [sign for sign in SIGNS if sign != 0.5]):
        plot_fan(axes, fans[sign][0], sign, cfg, False)
    small[0].set_ylabel("seconds after NOW")
    between = np.mean([share_summary(rows)[2] for rows in fans.values()])
    num_samples, num_scenes = len(fans[0.5][0]["samples"]), len(fans[0.5])
    told, r2 = float(readings["branch_told"]), float(readings["probe_r2"])
    caption = (
        f"{num_samples} samples per scene, {num_scenes} scenes per sign; {between:.0%} of samples lie between the "
        f"branches.\nPlaces are read from latents by a linear probe: R2 {r2:.2f}, branch of real futures told in "
        f"{told:.0%} of held-out forks."
    )
    lower.supxlabel(caption, fontsize=10)
    save_figure(figure, path)


def draw_plane(path, exhibits, readings):
    """fan.png for videos: pooled SOON latents in the plane of the run's own futures: NOW, truth, forecast, samples."""
    figure = new_figure(5.2 * len(exhibits) + 0.6, 5.4)
    mean, basis, bank = (readings[name].float() for name in ("mean", "basis", "bank"))
    for axes, exhibit in zip(figure.subplots(1, len(exhibits), squeeze=False)[0], exhibits):
        pooled = (exhibit.now, exhibit.point.mean(0), exhibit.samples.mean(1))
        now, point, samples = ((latents - mean) @ basis for latents in pooled)
        axes.scatter(*bank.T.numpy(), s=9, color="0.85", label="futures of other clips")
        for sample in samples:
            axes.plot(*zip(now.tolist(), sample.tolist()), color=UNIT["sample"], linewidth=0.7, alpha=0.5)
        axes.scatter(*samples.T.numpy(), s=34, color=UNIT["sample"], label="samples", zorder=3)
        axes.scatter(*now.tolist(), s=70, marker="s", color="black", label="NOW", zorder=4)
        axes.scatter(*point.tolist(), s=80, marker="D", color=UNIT["point"], label="point forecast", zorder=4)
        if exhibit.true is not None:
            true = ((exhibit.true.mean(0) - mean) @ basis).tolist()
            axes.scatter(*true, s=190, marker="*", color=UNIT["right"], label="truth", zorder=5)
        axes.set_title(exhibit.title, fontsize=11)
        axes.set_xlabel("first principal component of SOON")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("second principal component of SOON")
    figure.axes[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


# -- the command


LIMITS = {
    "num_samples": (1, 64),
    "minutes": (0.001, 10**4),
    "start": (0, 10**7),
    "seed": (0, 10**4),
    "num_workers": (0, 64),
}


def parse_arguments(argv):
    """Flags -> namespace. UsageError in one line."""
    about = "Pictures of what a world model expects: decoded forecasts and sampled futures. `rollout` in front of the "
    about += "flags: those of a world that predicts frames (futures.py rollout --help)."
    parser = V.ArgumentParser(description=about, allow_abbrev=False)
    path, flag = dict(default="", type=os.path.expanduser), parser.add_argument
    flag("--ckpt", required=True, type=os.path.expanduser, help="checkpoint of a run")
    flag("--init_from", **path, help="where the frozen weights of the run are, if they were moved")
    flag("--clip", **path, help="show this video instead of clips of the run's own data")
    flag("--start", type=float, default=0.0, help="where the clip's window begins, in seconds [0]")
    flag("--data_root", **path, help="folder, video or list to train the decoder on; default the run's own data")
    flag("--num_samples", type=int, default=8, help="sampled futures shown per clip [8]")
    flag("--out", **path, help="output folder [the run's folder / futures]")
    minutes = "time for the decoder: a third for clips, the rest for training [3]"
    flag("--minutes", type=float, default=3.0, help=minutes)
    flag("--num_workers", type=int, default=2, help="processes that read or draw clips [2]")
    flag("--perceptual", action="store_true", help="add a VGG16 loss; its weights must lie in torchvision's cache")
    flag("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    flag("--seed", type=int, default=0, help="which scenes or clips are shown, and the noise of the samples [0]")
    args = parser.parse_args(argv)
    E.check_limits(args, LIMITS)
    E.need("PIL", "matplotlib")
    return args


def open_source(cfg, data, data_root):
    """What the decoder learns from -> DataSource, None for built-in scenes. data: kind and root of the run's own."""
    if not data_root and data["kind"] in ("scenes", "render"):
        return None
    if not data_root and data["kind"] == "random":
        raise V.UserError("data_root: this run was trained on random pixels; give videos to look at (--data_root)")
    return E.open_videos(cfg, E.videos_of(data, data_root))[0]


def open_run(args):
    """-> (model on its device, DataSource or None, cache file, its key)."""
    model, cfg, about = E.open_checkpoint(args.ckpt, args.device, args.init_from)
    if not cfg.lambda_flow:
        raise V.UserError(f"ckpt {args.ckpt}: trained with lambda_flow 0, it has no sampled futures to show")
    source = open_source(cfg, about["data"], args.data_root)
    if args.clip and source is None:
        note = "note: the decoder is trained on built-in scenes; for your own videos give them as --data_root too"
        V.say(note, sys.stderr)
    origin = "scenes" if source is None else os.path.abspath(source.root)
    key = decoder_key(model, about["step"], origin + " perceptual" * args.perceptual)
    return model, source, Path(args.ckpt).resolve().parent / f"decoder_{key}.pt", key


def print_report(report, source):
    """The decoder's figures beside those of pictures that need no model."""
    of = "scenes" if source is None else "videos" if source.held_out else "windows of the only video"
    V.say(f"{'SOON frames of held-out ' + of:<44}{'L1 of 255':>10}{'PSNR dB':>9}")
    for name, (error, ratio) in report.items():
        V.say(f"{name:<44}{error:>10.2f}{ratio:>9.2f}")


def output_folder(args, name):
    """--out, by default a folder of this name in the run's, made where it is missing -> Path."""
    out = Path(args.out) if args.out else E.run_folder(args.ckpt) / name
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise V.UserError(f"out {out}: cannot be written ({error.strerror}); choose another --out") from error
    return out


def show(args):
    """Open the run, get a decoder, write the pictures -> their paths."""
    model, source, cache, key = open_run(args)
    perceptual = Perceptual().to(model.image_mean.device) if args.perceptual else None
    out = output_folder(args, "futures")
    if args.clip:
        clip_window(args.clip, args.start, model.cfg)  # a wrong file is named before minutes of training
    decoder, saved = get_decoder(model, source, cache, key, args.minutes, args.num_workers, perceptual, args.seed)
    print_report(saved["report"], source)
    readings, cfg = saved["readings"], model.cfg
    exhibits = gather_exhibits(model, decoder, source, readings, args)
    paths = [out / "rollout.mp4"]
    write_rollout(paths[0], exhibits, cfg)
    for number, exhibit in enumerate(exhibits):
        paths.append(out / ("frames.png" if number == 0 else f"frames_{number + 1}.png"))
        V.save_picture(draw_frames(exhibit, cfg), paths[-1])
    paths += [out / "latents.png", out / "fan.png"]
    V.save_picture(draw_latents(exhibits[0], cfg), paths[-2])
    if args.clip or "probe" not in readings:
        draw_plane(paths[-1], exhibits, readings)
    else:
        draw_fan(paths[-1], sample_fans(model, readings, args.seed, FAN_SAMPLES, FAN_SCENES), readings, cfg)
    return paths


def main(argv=None):
    """Command line -> exit code. `rollout` in front: of a world that predicts frames."""
    argv, parse, draw = sys.argv[1:] if argv is None else argv, parse_arguments, show
    if argv[:1] == ["rollout"]:
        import rollout  # it imports this file

        argv, parse, draw = argv[1:], rollout.parse, rollout.show
    return V.report_errors(lambda: [V.say(path) for path in draw(parse(argv))] and V.EXIT_OK)


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
