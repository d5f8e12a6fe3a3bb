"""Cosmos: a world that predicts frames. Each frame becomes one latent, a recurrent net or a transformer rolls latents
on from its own guesses, and a decoder paints them.

    context [B,Tc,3,H,W] -> encoder, frame by frame -> latents [B,Tc,D] -> dynamics, closed loop -> latents [B,n,D]
                                                           |                                           |
                                                        decoder                                     decoder
                                                           v                                           v
                                                the context once more                       n future frames

    python tools/make_videos.py --out data/raw && python tools/split_videos.py --input data/raw --output data/split
    python worlds/cosmos.py --data_root data/split --preset cosmos_tiny --device cpu
    python tools/futures.py rollout --ckpt runs/cosmos/checkpoints/ckpt_best.pt
    python tools/evaluate.py --ckpt runs/cosmos/checkpoints/ckpt_best.pt

From Python:

    model, cfg = V.load_model("runs/cosmos/checkpoints/ckpt_best.pt")
    frames, future, context = model(context_frames, 60)  # [B,60,3,H,W] in [0,1], [B,60,D], [B,Tc,D]

Letters as in VJepa_AUTO_V2.py, and: Tc frames of context, n predicted frames, D latent_dim, C base_channels, N frames
of all clips of a batch.

Sources: latent dynamics in a closed loop (World Models, arXiv 1803.10122), residual prediction of the next state,
perceptual loss (Johnson et al., 1603.08155), self-attention behind a gate that starts at 0 (SAGAN, 1805.08318),
sub-pixel convolution (1609.05158).
"""

import os

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as VJepa_AUTO_V2.py does, and why

import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import VJepa_AUTO_V2 as V

# fmt: off


@dataclass
class CosmosConfig(V.ClipConfig):
    """Clips, networks, losses and schedule of the world that predicts frames."""

    preset: str = "base"  # cosmos_tiny | cosmos_gru | cosmos_lstm | cosmos_transformer | cosmos_dino | base
    out_dir: str = "runs/cosmos"  # everything the run writes
    # -- clips
    image_size: int | tuple = 64  # pixels, one number or H,W; multiples of 16
    num_frames: int = 60  # frames per clip = now + soon
    now_frames: int = 30  # context
    soon_frames: int = 30  # frames to predict in training; a rollout may go further
    clip_fps: float = 30.0  # frames per second taken from a video
    crop_scale_min: float = 1.0  # smallest crop, share of the largest box that fits the frame
    crop_ratio_min: float = 1.0  # stretch of the crop's aspect ratio
    crop_ratio_max: float = 1.0  # stretch of the crop's aspect ratio
    hflip: bool = True  # mirror clips at random
    brightness: float = 0.2  # half of the training clips are made darker or brighter by up to this share
    # -- networks
    encoder: str = "cnn"  # cnn | resnet50 | resnet101 | folder of a DINOv2 or DINOv3 model as transformers saves it
    freeze_encoder: bool = False  # a pretrained encoder stays as it is; only the projection behind it learns
    random_weights: bool = False  # a pretrained encoder without its weights, for tests; told in every log line
    latent_dim: int = 256  # D, numbers that a frame becomes
    base_channels: int = 64  # C of cnn and painter at a quarter of the image's side, doubled at every halving
    dynamics: str = "gru"  # gru | lstm | transformer
    hidden_dim: int = 512  # width of gru and lstm, half that of the transformer's MLP
    num_layers: int = 2  # layers of the dynamics
    num_heads: int = 8  # heads of the transformer
    dropout: float = 0.1  # in the dynamics
    painter: str = "auto"  # the decoder: plain | attention (at 8 x 8 and 16 x 16) | auto (attention if pretrained)
    # -- losses
    lambda_mse: float = 1.0  # weight of the squared error of predicted frames
    lambda_l1: float = 0.0  # weight of their absolute error
    lambda_perceptual: float = 0.0  # weight of their error in features of a VGG16, whose weights it needs
    lambda_temporal: float = 0.1  # weight of the absolute error of their differences from frame to frame
    lambda_reconstruct: float = 1.0  # weight of the squared error of context frames through encoder and decoder
    painted_frames: int = 0  # frames of the future, and of the context, painted per clip and step; 0 = all
    # -- optimisation
    lr: float = 3e-4  # peak learning rate
    weight_decay: float = 1e-5  # AdamW, on matrices only
    warmup_steps: int = 200  # linear warm-up, capped at a tenth of steps
    schedule: str = "cosine"  # cosine | plateau (the rate falls when val_loss_total no longer does)
    plateau_factor: float = 0.5  # by which the rate is multiplied then
    plateau_patience: int = 10  # evaluations without a new best that are waited for
    val_every: int = 500  # steps between evaluations; 0 = only at the end
    best_by: str = "val_loss_mse"  # figure of an evaluation whose smallest is kept as ckpt_best.pt; -figure: largest

    PRESETS = {
        "cosmos_tiny": dict(
            now_frames=10, num_frames=40, base_channels=32, latent_dim=128, hidden_dim=256, dropout=0.0, brightness=0.0,
            painted_frames=8, batch_size=8, steps=1800, lr=2e-3, warmup_steps=100, num_workers=1, log_every=50,
            val_every=300, ckpt_every=300,
        ),
        "cosmos_gru": dict(dynamics="gru"),
        "cosmos_lstm": dict(dynamics="lstm"),
        "cosmos_transformer": dict(dynamics="transformer", num_layers=4),
        "cosmos_dino": dict(encoder="dinov2", freeze_encoder=True, image_size=224, dynamics="transformer"),
    }
    RANGES = {
        "brightness": (0, 0.9), "latent_dim": (2, 65536), "base_channels": (8, 4096), "hidden_dim": (2, 65536),
        "num_layers": (1, 100), "num_heads": (1, 256), "dropout": (0, 0.9), "painted_frames": (0, 100000),
        "lambda_mse": (0, None), "lambda_l1": (0, None), "lambda_perceptual": (0, None), "lambda_temporal": (0, None),
        "lambda_reconstruct": (0, None), "plateau_factor": (0.01, 0.99), "plateau_patience": (0, 10**6),
    }
    CHOICES = {
        "dynamics": ("gru", "lstm", "transformer"), "painter": ("auto", "plain", "attention"),
        "schedule": ("cosine", "plateau"),
    }
    MUST_MATCH = (
        "encoder", "freeze_encoder", "random_weights", "latent_dim", "base_channels", "dynamics", "hidden_dim",
        "num_layers", "num_heads", "painter", "painted_frames", "schedule",
    )

    @property
    def is_pretrained(self) -> bool:
        return self.encoder != "cnn"

    @property
    def has_attention(self) -> bool:
        return self.painter == "attention" or self.painter == "auto" and self.is_pretrained

    def rules(self):
        total, stride, problem = self.now_frames + self.soon_frames, 16, ""
        try:
            stride = encoder_stride(self.encoder)
        except ValueError as error:
            problem = str(error)
        both = f"must be divisible by 16, the stride of the painter, and by {stride}, that of the encoder"
        heads = 2 * self.num_heads
        return [*super().rules(), *V.broken(
            (problem, "encoder", problem),
            (self.num_frames != total, "num_frames", f"must equal now + soon frames = {total}"),
            (self.now_frames < 2, "now_frames", "must be at least 2: one frame shows no motion"),
            (any(side % 16 or side % stride for side in (self.height, self.width)), "image_size", both),
            (self.base_channels % 8, "base_channels", "must be divisible by 8, the width of an attention head"),
            (self.dynamics == "transformer" and self.latent_dim % heads, "latent_dim",
             f"must be divisible by 2 x num_heads = {heads}"),
            (not self.is_pretrained and self.freeze_encoder, "freeze_encoder", "encoder cnn begins from nothing"),
            (not self.is_pretrained and self.random_weights, "random_weights", "encoder cnn always begins with such"),
            (self.painted_frames % 2, "painted_frames", "must be even: frames are compared in pairs"),
            (self.schedule == "plateau" and not self.val_every, "val_every", "must not be 0 for schedule plateau"),
        )]


# fmt: on

RESNETS = ("resnet50", "resnet101")
DINOS = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # model types of transformers
FETCH = "python -c \"from torchvision import models; models.get_model('{}', weights='DEFAULT')\" puts them there"


# -- encoder: frames -> latents


def encoder_stride(encoder):
    """Pixels of a frame's side behind one place of an encoder's grid. ValueError for what is no encoder."""
    if encoder in ("cnn", *RESNETS):
        return 16 if encoder == "cnn" else 32
    path, config = os.path.join(os.path.expanduser(encoder), "config.json"), None
    what = f"is neither cnn, {', '.join(RESNETS)} nor a folder with the config.json of a DINOv2 or DINOv3 model"
    what = f"{what}; save_pretrained of transformers writes one"
    if os.path.isfile(path):
        try:
            config = V.parse_json(V.read_text(path, 2**22))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what} ({path}: {error})") from error
    is_known = isinstance(config, dict) and config.get("model_type") in DINOS
    stride = config.get("patch_size") if is_known else None
    if not V.fits(int, stride) or stride < 1:
        raise ValueError(what)
    return stride


@contextmanager
def reading(what):
    """Context in which weights are read: a UsageError says where their file is damaged or another network's."""
    try:
        yield
    except V.UserError:
        raise
    except Exception as error:  # such a file makes its readers raise anything
        why = f"{type(error).__name__}: {V.flat(error)[:160]}"
        raise V.UsageError(f"{what}: its weights cannot be read ({why})") from error


def cached_weights(name):
    """torchvision's weights of a network, which must lie in its cache -> dict of tensors. UsageError if they do not."""
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.is_file():
        raise V.UsageError(f"weights of {name}: not at {path}; {FETCH.format(name)}")
    return torch.load(path, map_location="cpu", weights_only=True)


class ResNet(nn.Module):
    """torchvision's ResNet without its head. Frames [N, 3, H, W] -> map [N, 2048, H/32, W/32]."""

    channels = 2048

    def __init__(self, name, has_weights):
        from torchvision import models

        super().__init__()
        net = models.get_model(name)
        if has_weights:
            with reading(f"encoder {name}"):
                net.load_state_dict(cached_weights(name))
        self.body = nn.Sequential(*list(net.children())[:-2])

    def forward(self, frames):
        return self.body(frames)


class PatchNet(nn.Module):
    """A vision transformer of a local folder. Frames [N, 3, H, W] -> its patch tokens as a map [N, C, H/p, W/p]."""

    def __init__(self, folder, has_weights):
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise V.UsageError(
                f"encoder {folder}: needs the package transformers (pip install transformers)"
            ) from error
        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if has_weights and not any(Path(folder).glob("*.safetensors")):
            raise V.UsageError(f"encoder {folder}: holds no *.safetensors; save_pretrained of transformers writes them")
        if has_weights:
            options = dict(local_files_only=True, dtype=torch.float32, output_loading_info=True)
            with reading(f"encoder {folder}"):
                self.net, told = transformers.AutoModel.from_pretrained(folder, **options)
            if absent := sorted(told["missing_keys"]):  # else they stay as they were drawn, with a warning
                raise V.UsageError(f"encoder {folder}: its weights lack {V.name_some(absent)}")
        else:
            self.net = transformers.AutoModel.from_config(config)
        self.patch, self.channels = config.patch_size, config.hidden_size
        for name in ("mask_token", "pooler"):  # no frame reaches them
            for part in (self.net, getattr(self.net, "embeddings", None)):
                if isinstance(getattr(part, name, None), nn.Parameter):
                    getattr(part, name).requires_grad_(False)

    def forward(self, frames):
        grid = frames.shape[2] // self.patch, frames.shape[3] // self.patch
        tokens = self.net(pixel_values=frames).last_hidden_state  # class and register tokens come first
        return tokens[:, -math.prod(grid) :].transpose(1, 2).unflatten(2, grid)


def load_backbone(cfg):
    """The pretrained network of a config -> module from frames, normalised as for ImageNet, to a map. UsageError where
    its weights are not there. Nothing is fetched. Random weights follow from the seed."""
    on_meta = torch.get_default_device().type == "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        try:
            Net = ResNet if cfg.encoder in RESNETS else PatchNet
            return Net(os.path.expanduser(cfg.encoder), not (cfg.random_weights or on_meta))
        except V.UsageError as error:
            raise V.UsageError(f"{error}, --encoder names another encoder, --random_weights is for tests") from error


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a straight path. [N, C, h, w] -> the same shape. Without a norm: with GroupNorm
    nets as shallow as these learned no better and took a tenth longer."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class FrameEncoder(nn.Module):
    """A small residual CNN. Frames [N, 3, H, W] in [0, 1] -> latents [N, D]. The mean colour goes past the
    convolutions: small things on a wide ground stand out sooner without it. The last map is not averaged over its
    places: where things are is what a frame has to say."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.base_channels
        self.body = nn.Sequential(
            nn.Conv2d(3, C, 7, stride=4, padding=3),  # [N, C, H/4, W/4]
            ResidualBlock(C),
            nn.Conv2d(C, 2 * C, 3, stride=2, padding=1),  # [N, 2C, H/8, W/8]
            ResidualBlock(2 * C),
            nn.Conv2d(2 * C, 4 * C, 3, stride=2, padding=1),  # [N, 4C, H/16, W/16]
            ResidualBlock(4 * C),
            nn.SiLU(),
        )
        self.project = nn.Linear(4 * C * (cfg.height // 16) * (cfg.width // 16) + 3, cfg.latent_dim)

    def forward(self, frames):
        mean = frames.mean((2, 3), keepdim=True)  # [N, 3, 1, 1]
        maps = self.body(2 * (frames - mean))  # [N, 4C, H/16, W/16]
        return self.project(torch.cat([maps.flatten(1), mean.flatten(1)], 1))


class Projection(nn.Module):
    """Maps of a backbone [N, channels, h, w] -> latents [N, D]: few channels, then a matrix over all places."""

    def __init__(self, cfg, channels, stride, narrow=64):
        super().__init__()
        self.narrow = nn.Conv2d(channels, narrow, 1)
        places = (cfg.height // stride) * (cfg.width // stride)
        self.project = nn.Linear(narrow * places, cfg.latent_dim)

    def forward(self, maps):
        return self.project(F.silu(self.narrow(maps)).flatten(1))


# -- dynamics: latents -> the latents that follow


class Recurrent(nn.Module):
    """GRU or LSTM in a closed loop. Latents [B, Tc, D] -> the n that follow [B, n, D], each the one before and a
    change. It begins as a world that stands still."""

    def __init__(self, cfg):
        super().__init__()
        net, dropout = nn.GRU if cfg.dynamics == "gru" else nn.LSTM, cfg.dropout if cfg.num_layers > 1 else 0.0
        self.net = net(cfg.latent_dim, cfg.hidden_dim, cfg.num_layers, batch_first=True, dropout=dropout)
        self.hidden, self.change = nn.Linear(cfg.hidden_dim, cfg.hidden_dim), nn.Linear(cfg.hidden_dim, cfg.latent_dim)
        nn.init.zeros_(self.change.weight), nn.init.zeros_(self.change.bias)

    def forward(self, latents, n):
        output, state = self.net(latents)
        guesses = [latents[:, -1:] + self.change(F.silu(self.hidden(output[:, -1:])))]
        while len(guesses) < n:
            output, state = self.net(guesses[-1], state)
            guesses.append(guesses[-1] + self.change(F.silu(self.hidden(output))))
        return torch.cat(guesses, 1)


class Transformer(nn.Module):
    """torch's encoder and decoder in a closed loop. Latents [B, Tc, D] -> the n that follow [B, n, D], each the one
    before and a change. It begins as a world that stands still."""

    def __init__(self, cfg):
        super().__init__()
        shape = dict(d_model=cfg.latent_dim, nhead=cfg.num_heads, dim_feedforward=2 * cfg.hidden_dim)
        shape |= dict(dropout=cfg.dropout, activation="gelu", batch_first=True, norm_first=True)
        norms, depth = [nn.LayerNorm(cfg.latent_dim) for _ in range(2)], cfg.num_layers
        encoder = nn.TransformerEncoderLayer(**shape)
        self.look_back = nn.TransformerEncoder(encoder, depth, norms[0], enable_nested_tensor=False)
        self.look_ahead = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape), depth, norms[1])
        for matrix in (p for p in self.parameters() if p.ndim > 1):  # torch's stacks copy one layer
            nn.init.xavier_uniform_(matrix)
        self.change = nn.Linear(cfg.latent_dim, cfg.latent_dim)
        nn.init.zeros_(self.change.weight), nn.init.zeros_(self.change.bias)

    def placed(self, latents, first):
        """Latents [B, T, D] with the sine-cosine code of their frame numbers, which count from `first`."""
        steps = torch.arange(latents.shape[2] // 2, device=latents.device)
        frames = torch.arange(first, first + latents.shape[1], device=latents.device)
        angles = frames[:, None] * 10000.0 ** (-2 * steps / latents.shape[2])  # [T, D/2]
        return latents + torch.cat([angles.sin(), angles.cos()], 1)

    def forward(self, latents, n):
        memory, now = self.look_back(self.placed(latents, 0)), latents.shape[1] - 1
        sequence = latents[:, -1:]
        for length in range(1, n + 1):
            mask = nn.Transformer.generate_square_subsequent_mask(length, device=latents.device)
            output = self.look_ahead(self.placed(sequence, now), memory, tgt_mask=mask, tgt_is_causal=True)
            sequence = torch.cat([sequence, sequence[:, -1:] + self.change(output[:, -1:])], 1)
        return sequence[:, 1:]


# -- decoder: latents -> frames


class MapAttention(nn.Module):
    """Self-attention over the places of a map, behind a gate that starts at 0. [N, C, h, w] -> the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(8, channels), V.Attention(channels, channels // 8, 0.0)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        places = self.norm(x).flatten(2).transpose(1, 2)  # [N, h*w, C]
        return x + self.gate * self.attention(places).transpose(1, 2).unflatten(2, x.shape[2:])


class FrameDecoder(nn.Module):
    """Latents [N, D] -> frames [N, 3, H, W] about 0 to 1: maps from a sixteenth to a quarter of the side, where every
    place paints its own 4 x 4 pixels. With attention where the longer side of a map has 8 to 16 places. A sigmoid at
    the end learned no sooner."""

    def __init__(self, cfg):
        super().__init__()
        height, width, C = cfg.height // 16, cfg.width // 16, cfg.base_channels
        self.unfold, self.grid = nn.Linear(cfg.latent_dim, 4 * C * height * width), (height, width)
        layers = []
        for scale, channels in ((1, 4 * C), (2, 2 * C), (4, C)):
            layers.append(ResidualBlock(channels))
            if cfg.has_attention and 8 <= scale * max(self.grid) <= 16:
                layers.append(MapAttention(channels))
            if scale < 4:
                layers += [nn.Conv2d(channels, channels // 2, 1), nn.Upsample(scale_factor=2)]
        layers += [nn.SiLU(), nn.Conv2d(C, 48, 3, padding=1), nn.PixelShuffle(4)]
        self.body = nn.Sequential(*layers)

    def forward(self, latents):
        maps = self.unfold(latents).unflatten(1, (-1, *self.grid))  # [N, 4C, H/16, W/16]
        return 0.5 + self.body(maps).float()


# -- losses


class Perceptual(nn.Module):
    """Squared distance of frames in the features of torchvision's VGG16 (Johnson et al. 2016), mean of four layers."""

    LAYERS = (3, 8, 15, 22)  # relu1_2, relu2_2, relu3_3, relu4_3

    def __init__(self):
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        self.layers = make_layers(cfgs["D"])[: max(self.LAYERS) + 1]
        try:
            with reading("vgg16"):
                weights = cached_weights("vgg16")
                self.layers.load_state_dict({name: weights[f"features.{name}"] for name in self.layers.state_dict()})
        except V.UsageError as error:
            raise V.UsageError(f"lambda_perceptual: {error}, --lambda_perceptual 0 does without") from error
        self.eval().requires_grad_(False)

    def forward(self, guess, truth):
        """Frames [N, 3, H, W], normalised as for ImageNet, both -> scalar."""
        both, distances = torch.cat([guess, truth]), []
        for number, layer in enumerate(self.layers):
            both = layer(both)
            if number in self.LAYERS:
                distances.append((both[: len(guess)] - both[len(guess) :]).float().square().mean())
        return torch.stack(distances).mean()


def neighbour_loss(guess, truth, idx):
    """L1 of the differences between frames that follow each other: a still picture of a moving scene pays, a moving one
    of a still scene as well. guess, truth [B, K, 3, H, W] at frame numbers idx [B, K] -> scalar."""
    follow = (idx.diff(dim=1) == 1)[:, :, None, None, None]  # [B, K-1, 1, 1, 1]
    error = (guess.diff(dim=1) - truth.diff(dim=1)).abs() * follow
    return error.sum() / (follow.sum() * guess[0, 0].numel()).clamp_min(1)


# -- the world


class FrameClips(V.ClipDataset):
    """Clips of videos. One that is shorter than its clip is a bad file: its last frame repeated is no true future."""

    @staticmethod
    def read_one(cfg, video):
        FrameClips(cfg, [video], "", "val").read_file(video, V.draw_plan(np.random.default_rng(0), cfg, "val"))

    def read_file(self, video, plan):
        seconds, fps = V.video_timing(video.path, V.fit_plan(plan, video))
        wanted = plan.num_frames / (plan.fps or fps)  # at 0 the frames spread over the file: none of them twice
        if seconds < wanted - 0.5 / fps:
            lasts = f"lasts {seconds:.2f} s, {round(seconds * fps)} frames at {fps:g} per second"
            raise V.BadFile(
                f"{lasts}, and a clip {wanted:.2f} s: fewer now_frames and soon_frames, or a higher clip_fps"
            )
        return super().read_file(video, plan)


def painted_idx(rng, count, wanted):
    """Which of `count` frames a step paints: all for wanted 0, else pairs of neighbours anywhere -> int64 [K]. The last
    and the first are a pair as well: else the ends of a clip would have half the weight of other frames."""
    if not 0 < wanted < count:
        return torch.arange(count)
    starts = rng.permutation(count)[: wanted // 2]
    return torch.from_numpy(np.sort(np.concatenate([starts, (starts + 1) % count])))


class Cosmos(V.World):
    """Predict frames: an encoder for each, dynamics of latents in a closed loop, and a decoder that paints them."""

    Config = CosmosConfig
    Dataset = FrameClips
    KEYS = {
        "loss_mse": "squared error of predicted frames, whose numbers lie in 0 to 1",
        "loss_l1": "absolute error of predicted frames",
        "loss_perceptual": "squared error of predicted frames in features of a VGG16; 0 without lambda_perceptual",
        "loss_temporal": "absolute error of the differences from one predicted frame to the next",
        "loss_reconstruct": "squared error of context frames through encoder and decoder",
        "still": "squared error of the last context frame, repeated",
        "skill": "1 - loss_mse / still: above 0 is better than a world that stands still",
        "latent_std": "deviation of a latent number over frames and clips, mean of all numbers; 0 = collapsed",
    }
    FILES = ("rollout.png",)

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        if cfg.is_pretrained:
            self.backbone = load_backbone(cfg)
            self.encoder = Projection(cfg, self.backbone.channels, encoder_stride(cfg.encoder))
            self.FROZEN = ("backbone",) if cfg.freeze_encoder else ()
            self.mark = "weights:random" if cfg.random_weights else ""
        else:
            self.encoder = FrameEncoder(cfg)
            self.REPLAYS = not cfg.lambda_perceptual  # seen on a card with all own encoders and dynamics
        self.dynamics = Transformer(cfg) if cfg.dynamics == "transformer" else Recurrent(cfg)
        self.decoder = FrameDecoder(cfg)
        self.critic = ()  # a Perceptual in a tuple, so that its weights are not this module's
        # what torch's scheduler holds: best loss, evaluations since, share of the peak learning rate
        self.register_buffer("plateau", torch.tensor([math.inf, 0.0, 1.0]))
        for name, values in (("image_mean", V.IMAGE_MEAN), ("image_std", V.IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        """As V.World.train. A backbone that learns stays in eval mode too: its BatchNorms keep the statistics that it
        came with, as neighbouring frames are too alike to take new ones, and DINOv3 does not stretch its positions at
        random. Training with lambda_perceptual needs the VGG16."""
        super().train(mode)
        if self.cfg.is_pretrained:
            self.backbone.eval()
        if mode and self.cfg.lambda_perceptual and not self.critic:
            self.critic = (Perceptual(),)
        return self

    # -- samples
    @staticmethod
    def draw(cfg, stream, index):
        """Which frames a step paints, and how bright the clip is."""
        rng = V.sample_rng(cfg.seed, stream, index, 3)
        bright = 1 + cfg.brightness * rng.uniform(-1, 1) * (rng.random() < 0.5)
        idx = [painted_idx(rng, count, cfg.painted_frames) for count in (cfg.now_frames, cfg.soon_frames)]
        return {"now_idx": idx[0], "soon_idx": idx[1], "bright": torch.tensor(bright, dtype=torch.float32)}

    def pixels(self, frames):
        """Frames uint8, or float in [0, 1], of any shape -> float in [0, 1]."""
        return frames.float() / 255 if frames.dtype == torch.uint8 else frames

    # -- the verbs of a world model
    def encode(self, frames):
        """Frames [B, T, 3, H, W], uint8 or in [0, 1] -> latents [B, T, D]."""
        flat = self.pixels(frames).flatten(0, 1)  # [N, 3, H, W]
        if self.cfg.is_pretrained:
            latents = self.encoder(self.backbone((flat - self.image_mean) / self.image_std))
        else:
            latents = self.encoder(flat)
        return latents.float().unflatten(0, frames.shape[:2])  # a rollout adds small changes to them, lost in bf16

    def decode(self, latents):
        """Latents [B, T, D] -> frames [B, T, 3, H, W] in [0, 1]."""
        return self.paint(latents).clamp(0, 1)

    def paint(self, latents):
        """As `decode`, but what lies outside 0 to 1 stays, so that it is told to come back."""
        return self.decoder(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])

    def reconstruct(self, frames):
        """Frames [B, T, 3, H, W] through encoder and decoder -> the same in [0, 1]."""
        return self.decode(self.encode(frames))

    def predict(self, context_frames, num_predictions):
        """Frames [B, Tc, 3, H, W] -> (the n that follow [B, n, 3, H, W] in [0, 1], their latents [B, n, D], latents of
        the context [B, Tc, D]). n may be larger than the horizon of training. ValueError where it is below 1."""
        if num_predictions < 1:
            raise ValueError(f"num_predictions = {num_predictions}: must be at least 1")
        context = self.encode(context_frames)
        future = self.dynamics(context, num_predictions)
        return self.decode(future), future, context

    # -- a step
    def forward(self, batch, num_predictions=None):
        """A step on a batch, as V.World has it; with frames instead and their number, `predict`."""
        if num_predictions is not None:
            return self.predict(batch, num_predictions)
        cfg, clip, now_idx, soon_idx = self.cfg, self.pixels(batch["frames"]), batch["now_idx"], batch["soon_idx"]
        if self.training:
            clip = (clip * batch["bright"][:, None, None, None, None]).clamp(max=1)  # [B, T, 3, H, W]
        else:  # an evaluation paints all
            now_idx, soon_idx = (
                torch.arange(count, device=clip.device).expand(len(clip), -1)
                for count in (cfg.now_frames, cfg.soon_frames)
            )
        rows = torch.arange(len(clip), device=clip.device)[:, None]
        now, soon = clip.split([cfg.now_frames, cfg.soon_frames], 1)
        context = self.encode(now)  # [B, Tc, D]
        future = self.dynamics(context, cfg.soon_frames)  # [B, n, D]
        latents = torch.cat([context[rows, now_idx], future[rows, soon_idx]], 1)  # [B, K, D]
        painted = self.paint(latents) if self.training else self.decode(latents)  # [B, K, 3, H, W]
        again, guess = painted.split([now_idx.shape[1], soon_idx.shape[1]], 1)
        truth, last = soon[rows, soon_idx], now[:, -1:]
        losses = {
            "loss_mse": (guess - truth).square().mean(),
            "loss_l1": (guess - truth).abs().mean(),
            "loss_perceptual": self.perceptual_loss(guess, truth),
            "loss_temporal": neighbour_loss(guess, truth, soon_idx),
            "loss_reconstruct": (again - now[rows, now_idx]).square().mean(),
        }
        spread = context.detach().float().flatten(0, 1).std(0).mean()
        return self.weigh(losses), {"still": (last - truth).square().mean(), "latent_std": spread}, {}

    def perceptual_loss(self, guess, truth):
        """Frames [B, K, 3, H, W] in [0, 1], both -> scalar, 0 where it has no weight."""
        if not self.critic or not self.cfg.lambda_perceptual:
            return guess.new_zeros(())
        critic = self.critic[0].to(guess.device)
        return critic(*((frames.flatten(0, 1) - self.image_mean) / self.image_std for frames in (guess, truth)))

    # -- schedule
    def lr(self, step, peak):
        """A cosine; or after the warm-up, the peak times what torch's scheduler has made of it."""
        if self.cfg.schedule == "cosine":
            return super().lr(step, peak)
        return peak * min((step + 1) / max(self.cfg.warmup, 1), 1.0) * float(self.plateau[2])

    @torch.no_grad()
    def after_validation(self, values):
        if self.cfg.schedule == "plateau":
            best, waited, share = self.plateau.tolist()
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=share)
            cfg = self.cfg
            rule = dict(factor=cfg.plateau_factor, patience=cfg.plateau_patience, min_lr=cfg.lr_floor)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **rule)
            scheduler.best, scheduler.num_bad_epochs = best, int(waited)
            scheduler.step(values["val_loss_total"])
            state = scheduler.best, scheduler.num_bad_epochs, optimizer.param_groups[0]["lr"]
            self.plateau.copy_(torch.tensor(state))

    # -- figures
    def figures(self, looks, means):
        return {"skill": 1 - means["loss_mse"] / means["still"] if means["still"] else math.nan}

    def verdict(self, values):
        skill, spread = values["val_skill"], values["val_latent_std"]
        better = f"{'' if skill > 0 else 'no '}better than a world that stands still"
        better = "nothing moves in the held-out clips" if math.isnan(skill) else better
        blind = values["val_loss_reconstruct"] / max(values["val_loss_mse"], 1e-12)
        return (
            f"squared error {values['val_loss_mse']:.2e} of {self.cfg.soon_frames} predicted frames, skill {skill:.2f} "
            f"({better}); {blind:.0%} of it is what the decoder cannot paint; latents deviate by {spread:.2g}"
        )

    @torch.no_grad()
    def report(self, run, values, seconds):
        """rollout.png: three held-out clips, the truth above what is predicted from its first frames."""
        cfg, data, path = self.cfg, run.source.dataset(self.cfg, "val"), Path(run.cfg.out_dir) / "rollout.png"
        grow, blocks = max(1, round(96 / min(cfg.height, cfg.width))), []
        for number in range(3):
            truth = data[number]["frames"]  # [T, 3, H, W]
            now = truth[None, : cfg.now_frames].to(run.process.device)
            guess = self.predict(now, cfg.soon_frames)[0][0].cpu()
            guess = torch.cat([truth[: cfg.now_frames], (255 * guess).round().to(torch.uint8)])
            rows = [("truth", truth), ("predicted", guess)]
            big = [
                (title, frames.permute(0, 2, 3, 1).numpy().repeat(grow, 1).repeat(grow, 2)) for title, frames in rows
            ]
            blocks.append(big)
        side = (cfg.height * grow, cfg.width * grow)
        try:
            V.save_picture(V.picture_page(blocks, cfg, side, self.verdict(values)), path)
        except OSError as error:  # a full disk
            run.log.line(f"WARNING: {path} could not be written ({error.strerror})")
        else:
            run.log.line(f"picture: {path}")

    # -- start-up lines
    def describe(self):
        cfg, nets = self.cfg, {name: net for name, net in self.named_children() if any(True for _ in net.parameters())}
        sizes = {name: sum(p.numel() for p in net.parameters()) / 1e6 for name, net in nets.items()}
        learning = sum(p.numel() for p in self.trained().values()) / 1e6
        listed = ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items())
        loss = "all of them painted" if not cfg.painted_frames else f"{cfg.painted_frames} of each painted per step"
        return [
            f"parameters: {sum(sizes.values()):.2f} M ({listed}), of which {learning:.2f} M learn",
            f"clip: {cfg.now_frames} + {cfg.soon_frames} frames of {cfg.height} x {cfg.width} at {cfg.clip_fps:g} per "
            f"second, {loss}; each becomes {cfg.latent_dim} numbers, {cfg.dynamics} x {cfg.num_layers} rolls them on",
        ]

    @staticmethod
    def typical_part(cfg, device):
        """A residual block at a quarter of the image's side."""
        C = cfg.base_channels
        return ResidualBlock(C), torch.randn(8, C, cfg.height // 4, cfg.width // 4)

    def compile(self, **options):
        """Encoder and decoder alone: a loop over frames would be unrolled into one graph for minutes."""
        for net in (self.encoder, self.decoder):
            net.compile(**options)


if __name__ == "__main__":
    sys.exit(V.main(world=Cosmos))
