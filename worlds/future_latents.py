"""FutureLatents: the latents of a frozen backbone -> those that follow, as one forecast or as samples of many.

    now   [B,T,3,H,W] -> backbone (frozen) -> context [B,K,D] -+-> direct  a transformer over the context
                                                               |-> cross   learned queries that read it
    whole [B,T,3,H,W] -> backbone (frozen) -> targets [B,F,D]  +-> flow    DiT: noise + context -> a sampled future
                         its tokens behind NOW                 +-> locate  where a square and a disk are

NOW is encoded alone: a video backbone that sees the whole clip would tell of the future in the context.

    python tools/make_videos.py --out data/shapes --kinds shapes --num_videos 2000 --num_frames 40 --fps 15
    python worlds/future_latents.py --data_root data/shapes --preset future_tiny --device cpu
    python worlds/future_latents.py --data_root DIR --preset future_flow --init_from FOLDER_OF_VJEPA2
    python worlds/future_latents.py --data_root DIR --config configs/vjepa2_kinetics_400.yaml --init_from FOLDER

From Python:

    model, cfg = V.load_model("runs/future_latents/checkpoints/ckpt_final.pt")
    future = model.predict(now_frames)               # uint8 or in [0, 1], [B,now_frames,3,H,W] -> [B,F,D]
    futures = model.sample(now_frames, 8)            # [B,8,F,D], predictor flow
    tokens = model.encode(frames)                    # a whole clip -> [B,L,D]

Letters as in VJepa_AUTO_V2.py, and: K context tokens, F target tokens, D width of the backbone, W of the predictor,
t' steps of the backbone in time, G its patches of one step, h*w.

Sources: V-JEPA 2 (arXiv 2506.09985), DINOv2 (2304.07193), DINOv3 (2508.10104), flow matching (2210.02747), DiT
(2212.09748), clean-data prediction under a velocity loss (JiT, 2511.13720).
"""

import os

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as VJepa_AUTO_V2.py does, and why

import io
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import VJepa_AUTO_V2 as V

C = sys.modules[V.import_world(Path(__file__).with_name("cosmos.py"), "Cosmos").__module__]  # its backbones and clips

# fmt: off

@dataclass
class FutureLatentsConfig(V.ClipConfig):
    """Clips, backbone, predictor, losses and schedule of the world that predicts frozen latents."""

    preset: str = "base"  # future_tiny | future_flow | future_direct | future_cross | future_locate | base
    out_dir: str = "runs/future_latents"  # everything the run writes
    # -- clips
    image_size: int | tuple = 256  # pixels, one number or H,W; multiples of the backbone's patch
    num_frames: int = 64  # frames per clip = now + soon
    now_frames: int = 32  # frames of the context
    soon_frames: int = 32  # frames of the targets
    num_context_latents: int = 0  # steps in time of the context's latents, which now_frames must give; 0 = as they do
    num_target_latents: int = 0  # steps in time of the targets' latents, which soon_frames must give; 0 = as they do
    clip_fps: float = 15.0  # frames per second taken from a video
    crop_scale_min: float = 1.0  # smallest crop, share of the largest box that fits the frame
    crop_ratio_min: float = 1.0  # stretch of the crop's aspect ratio
    crop_ratio_max: float = 1.0  # stretch of the crop's aspect ratio
    # -- backbone
    backbone: str = "vjepa2"  # vjepa2 | dinov2 | dinov3 | resnet50 | tiny (random, for trials) | a FOLDER
    init_from: str = ""  # weights of a backbone that is named: a folder of transformers, for vjepa2 a .pt as well
    init_key: str = ""  # which encoder of a .pt file; empty = its own order of preference
    random_weights: bool = False  # a backbone without its weights, for tests; told in every log line
    encoder_trainable: bool = False  # the backbone learns through the context; targets stay without gradient
    frame_stride: int = 1  # picture backbones encode every so many frames of the clip
    embedding_norm: str = "l2"  # none | l1 | l2 | layer, over the channels of every latent
    # -- predictor
    predictor: str = "flow"  # flow | direct (needs as many target as context latents) | cross | locate
    hidden_dim: int = 1024  # width W
    depth: int = 12  # blocks
    context_depth: int = 0  # blocks of self-attention over the context before flow and cross read it
    num_heads: int = 8  # heads
    mlp_ratio: float = 4.0  # hidden width of an MLP over W; flow has 4
    dropout: float = 0.0  # in direct
    grad_checkpoint: bool = False  # compute blocks twice, keep less in memory
    units: str = "change"  # change: added to the last context latent, on the scale of changes | raw: as the original
    loss: str = "mse"  # mse | l1; of velocities in flow
    flow_shift: float = 1.0  # above 1 more of the flow's time is near noise, in training and sampling
    flow_steps: int = 20  # steps of a sample
    sampler: str = "euler"  # euler | heun (two passes per step)
    val_samples: int = 4  # samples per clip in an evaluation of flow
    dump_clips: int = 3  # held-out clips that are drawn at the end; 0 = none
    # -- optimisation
    batch_size: int = 1  # clips per process and micro-step
    lr: float = 1e-5  # peak learning rate
    min_lr: float = 1e-5  # learning rate at the last step
    weight_decay: float = 0.01  # AdamW, on matrices only
    warmup_steps: int = 5  # linear warm-up, capped at a tenth of steps
    num_workers: int = 8  # loader processes per rank

    PRESETS = {
        "future_tiny": dict(
            backbone="tiny", image_size=64, num_frames=16, now_frames=8, soon_frames=8, hidden_dim=128, depth=4,
            context_depth=2, num_heads=4, embedding_norm="layer", batch_size=8, lr=1e-3, warmup_steps=100,
            steps=3000, flow_steps=10, num_workers=1, log_every=100, val_every=500, ckpt_every=500,
        ),
        "future_flow": dict(amp=True, amp_type="fp16", grad_checkpoint=True, val_epochs=1),
        "future_direct": dict(predictor="direct", loss="l1", grad_clip=0.0, amp=True, amp_type="fp16", val_epochs=1),
        "future_cross": dict(predictor="cross", loss="l1", amp=True, amp_type="fp16", val_epochs=1),
        "future_locate": dict(
            predictor="locate", backbone="dinov3", embedding_norm="none", num_frames=2, now_frames=1, soon_frames=1,
            batch_size=128, lr=1e-4, min_lr=1e-4, weight_decay=0.0, grad_clip=0.0, amp=True, amp_type="fp16",
            val_epochs=1,
        ),
    }
    RANGES = {
        "num_context_latents": (0, 100000), "num_target_latents": (0, 100000), "frame_stride": (1, 1000),
        "hidden_dim": (8, 65536), "depth": (1, 1000), "num_heads": (1, 1024), "mlp_ratio": (0.1, 64),
        "dropout": (0, 0.9), "flow_shift": (0.01, 1000), "flow_steps": (1, 10000), "val_samples": (2, 1000),
        "dump_clips": (0, 8), "context_depth": (0, 1000),
    }
    CHOICES = {
        "embedding_norm": ("none", "l1", "l2", "layer"), "predictor": ("flow", "direct", "cross", "locate"),
        "units": ("change", "raw"), "loss": ("mse", "l1"), "sampler": ("euler", "heun"),
    }
    MUST_MATCH = (
        "random_weights", "encoder_trainable", "frame_stride", "embedding_norm", "predictor", "hidden_dim",
        "depth", "context_depth", "num_heads", "mlp_ratio", "units",
    )

    @property
    def form(self):
        """What the backbone is: kind, is_video, patch (pixels), step (frames of a latent), dim (D)."""
        form = backbone_form(self.backbone, self.init_from, self.init_key)
        return form if form.is_video else SimpleNamespace(**{**vars(form), "step": self.frame_stride})

    @property
    def grid(self) -> tuple:
        """(t', h, w) of the whole clip's latents."""
        form = self.form
        return self.num_frames // form.step, self.height // form.patch, self.width // form.patch

    @property
    def context_tokens(self) -> int:
        """K, tokens of NOW."""
        return self.now_frames // self.form.step * self.grid[1] * self.grid[2]

    @property
    def target_tokens(self) -> int:
        """F, tokens behind NOW."""
        return math.prod(self.grid) - self.context_tokens

    def rules(self):
        try:
            form = self.form
        except (ValueError, V.UserError) as error:
            return [*super().rules(), ("backbone", f"{error}; --init_from names the weights of a backbone")]
        total, step, sides = self.now_frames + self.soon_frames, form.step, {self.height, self.width}
        rows = [(self.num_frames != total, "num_frames", f"must equal now + soon frames = {total}")]
        for name, count in (("now_frames", self.num_context_latents), ("soon_frames", self.num_target_latents)):
            frames = getattr(self, name)
            rows += [
                (frames % step, name, f"must be divisible by {step}, the frames of a latent of {self.backbone}"),
                (count and frames != count * step, name, f"{count} latents of {step} frames are {count * step}"),
            ]
        cropped = (self.crop_scale_min, self.crop_scale_max, self.crop_ratio_min, self.crop_ratio_max) != (1, 1, 1, 1)
        is_flow, locates = self.predictor == "flow", self.predictor == "locate"
        shapes = "locate reads the places of make_videos --kinds shapes, in videos neither cropped nor mirrored"
        uneven = self.predictor == "direct" and self.now_frames != self.soon_frames
        return [*super().rules(), *V.broken(
            *rows,
            (any(side % form.patch for side in sides), "image_size", f"must be divisible by {form.patch}, the patch"),
            (form.is_video and self.frame_stride > 1, "frame_stride", f"is for pictures; {form.kind} reads all frames"),
            (uneven, "soon_frames", f"direct makes a target of each context latent: must equal {self.now_frames}"),
            (self.hidden_dim % (2 * self.num_heads), "hidden_dim", f"must be divisible by 2 x {self.num_heads} heads"),
            (is_flow and self.mlp_ratio != 4, "mlp_ratio", "must be 4 in a DiT"),
            (locates and (cropped or self.hflip), "predictor", shapes),
            (locates and not self.data_root, "data_root", shapes),
            (self.encoder_trainable and self.latents, "encoder_trainable", "must be off: a cache is of a frozen one"),
            (locates and self.latents, "latents", "hold no places (--predictor locate)"),
        )]


# fmt: on

CONVOLUTIONS = ("resnet", "dinov3_convnext")  # 32 pixels of a side become one place of their last map
# name -> model types of transformers
NAMES = {
    "vjepa2": ("vjepa2",), "dinov2": C.DINOS[:2], "dinov3": (*C.DINOS[2:], CONVOLUTIONS[1]),
    "resnet50": CONVOLUTIONS[:1],
}  # fmt: skip
TINY = SimpleNamespace(kind="tiny", is_video=True, patch=16, step=2, dim=64, depth=2, heads=4, mlp_ratio=4.0)
RESNET = SimpleNamespace(kind="resnet50", is_video=False, patch=32, step=1, dim=2048)
SHAPES = ("square", "circle")  # what locate finds, by their names in an annotation


# -- backbone: frames -> tokens


def folder_form(folder):
    """What a folder's config.json says of a backbone -> its form. ValueError where it is none of ours."""
    path, known = os.path.join(folder, "config.json"), [kind for kinds in NAMES.values() for kind in kinds]
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder, and none of {', '.join((*NAMES, 'tiny'))}")
    what = f"{folder} is no folder with the config.json of one of {', '.join(known)}"
    try:
        found = V.parse_json(V.read_text(path, 2**22))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} ({V.reason_of(error)})") from error
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in known:
        raise ValueError(f"{what}, but of {V.shown(kind)}")
    if kind in CONVOLUTIONS:
        sizes = found.get("hidden_sizes")
        if not isinstance(sizes, list) or len(sizes) != 4 or not V.fits(int, sizes[-1]) or sizes[-1] < 1:
            raise ValueError(f"{path}: hidden_sizes = {V.shown(sizes)} must be four numbers")
        if found.get("downsample_in_first_stage"):
            raise ValueError(f"{path}: downsample_in_first_stage makes places of 64 pixels, only 32 can be taken")
        return SimpleNamespace(kind=kind, is_video=False, patch=32, step=1, dim=sizes[-1])
    numbers = {name: found.get(name) for name in ("patch_size", "hidden_size", "num_hidden_layers")}
    numbers |= {name: found.get(name) for name in ("num_attention_heads", "tubelet_size") if kind == "vjepa2"}
    if odd := [name for name, value in numbers.items() if not V.fits(int, value) or value < 1]:
        raise ValueError(f"{path}: {odd[0]} = {V.shown(numbers[odd[0]])} must be a number of 1 or more")
    return SimpleNamespace(
        kind=kind, is_video=kind == "vjepa2", patch=numbers["patch_size"], step=numbers.get("tubelet_size", 1),
        dim=numbers["hidden_size"], depth=numbers["num_hidden_layers"], heads=numbers.get("num_attention_heads"),
        mlp_ratio=found.get("mlp_ratio", 4.0),
    )  # fmt: skip


@lru_cache(maxsize=16)
def backbone_form(backbone, init_from="", init_key=""):
    """What the backbone of a config is, without reading its weights where a config.json says it -> namespace: kind,
    is_video, patch (pixels), step (frames of a latent), dim. ValueError or UsageError where it cannot be used."""
    if backbone == "tiny" and init_from:
        raise ValueError(f"{backbone} takes no init_from")
    if backbone == "tiny" or backbone == "resnet50" and not init_from:
        return TINY if backbone == "tiny" else RESNET
    source = os.path.expanduser(init_from or ("" if backbone in NAMES else backbone))
    if not source:
        raise ValueError(f"{backbone} has no weights of its own, and nothing is fetched")
    if init_from and backbone not in NAMES:
        raise ValueError(f"{backbone} is a folder itself, so init_from must be empty")
    if os.path.isfile(source) and backbone == "vjepa2":
        try:
            cfg = V.read_weights(source, init_key)[2].cfg
        except V.UsageError as error:  # --num_heads is the predictor's here
            cure = "a folder of transformers says its heads"
            raise ValueError(str(error).replace("(--num_heads)", f"({cure})")) from error
        sizes = dict(depth=cfg.enc_depth, heads=cfg.num_heads, mlp_ratio=cfg.mlp_ratio)
        return SimpleNamespace(
            kind="vjepa2", is_video=True, patch=cfg.patch, step=cfg.tubelet_t, dim=cfg.enc_dim, **sizes
        )
    form = folder_form(source)
    if form.kind not in NAMES.get(backbone, (form.kind,)):
        raise ValueError(f"{source} holds a model of type {form.kind}, and not {backbone}")
    return form


class MapNet(nn.Module):
    """A convolutional network of a local folder. Frames [N, 3, H, W] -> its last map [N, D, H/32, W/32]. UsageError."""

    def __init__(self, folder, form, has_weights):
        super().__init__()
        transformers = V.extra("transformers", f"backbone {folder}")
        transformers.utils.logging.disable_progress_bar()
        self.dim, options = form.dim, dict(local_files_only=True)
        if not has_weights:
            self.net = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder, **options))
            return
        V.check_weights(folder)
        with C.reading(f"backbone {folder}"):
            options |= dict(dtype=torch.float32, output_loading_info=True)
            self.net, told = transformers.AutoModel.from_pretrained(folder, **options)
        if absent := sorted(told["missing_keys"]):  # else they stay as they were drawn, with a warning
            raise V.UsageError(f"backbone {folder}: its weights lack {V.name_some(absent)}")

    def forward(self, frames):
        found = self.net(pixel_values=frames).last_hidden_state
        if found.ndim == 3:  # DINOv3's: the mean of the map stands before its places
            size = (self.dim, frames.shape[2] // 32, frames.shape[3] // 32)
            found = found[:, 1:].transpose(1, 2).unflatten(2, size[1:])
        return found


def load_backbone(cfg):
    """The network behind a config's backbone, with its weights unless they are random by the seed. UsageError where
    they cannot be read. Nothing is fetched."""
    form, source, has_weights = cfg.form, os.path.expanduser(cfg.init_from or cfg.backbone), not cfg.random_weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        if form.kind == "resnet50":
            return C.ResNet("resnet50", has_weights)
        if form.kind in CONVOLUTIONS:
            return MapNet(source, form, has_weights)
        if not form.is_video:
            if has_weights:
                V.check_weights(source)
            return C.PatchNet(source, has_weights)
        if has_weights and form.kind != "tiny":
            return V.load_encoder(source, cfg.init_key).requires_grad_(cfg.encoder_trainable)
        sizes = dict(enc_dim=form.dim, enc_depth=form.depth, num_heads=form.heads, mlp_ratio=form.mlp_ratio)
        clip = dict(tubelet_t=form.step, patch=form.patch, image_size=cfg.image_size, num_frames=cfg.num_frames)
        return V.Encoder(replace(V.VJepaAutoV2Config(), pos_embed="rope", **sizes, **clip))


class Backbone(nn.Module):
    """Clips, normalised as for ImageNet, [B, T, 3, H, W] -> tokens [B, L, D] in (t, h, w) order, without the class and
    register tokens that stand before them. Pictures are encoded one by one."""

    def __init__(self, cfg):
        super().__init__()
        self.is_video, self.every, self.net = cfg.form.is_video, cfg.frame_stride, None
        on_meta = torch.get_default_device().type == "meta"
        # on meta a checkpoint is compared, and of what is frozen it holds the hash alone; or shapes are wanted
        if not on_meta or cfg.encoder_trainable or cfg.random_weights:
            with torch.device("meta" if on_meta and cfg.random_weights else "cpu"):
                self.net = load_backbone(cfg)

    def forward(self, clip):
        if self.is_video:
            return self.net(clip)
        maps = self.net(clip[:, :: self.every].flatten(0, 1))  # [B t', D, h, w]
        return maps.flatten(2).transpose(1, 2).reshape(len(clip), -1, maps.shape[1])


def normalised(latents, norm):
    """Latents [..., D] -> fp32, brought to length 1 (l1, l2), or to mean 0 and deviation 1 (layer), over channels."""
    latents = latents.float()
    if norm in ("l1", "l2"):
        return F.normalize(latents, p=int(norm[1]), dim=-1)
    return V.layer_norm(latents) if norm == "layer" else latents


# -- predictors: context -> targets


def grid_code(cfg, dim):
    """Sine-cosine code of the 3D positions of all latents of a clip -> [K + F, dim]."""
    return V.sincos_table(V.grid_positions(cfg.grid), dim)


class Reader(nn.Module):
    """Context [B, K, D] -> [B, K, W]: normed, projected, with the code of its positions, then through some blocks."""

    def __init__(self, cfg, dim, depth):
        super().__init__()
        self.norm, self.embed = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, cfg.hidden_dim)
        nn.init.trunc_normal_(self.embed.weight, std=dim**-0.5)
        nn.init.zeros_(self.embed.bias)
        self.register_buffer("code", grid_code(cfg, cfg.hidden_dim)[: cfg.context_tokens], persistent=False)
        self.sites, self.num_targets = cfg.grid[1] * cfg.grid[2], cfg.target_tokens
        self.trunk = V.Trunk(cfg, cfg.hidden_dim, depth) if depth else nn.Identity()

    def forward(self, context):
        return self.trunk(self.embed(self.norm(context)) + self.code)

    def nearest(self, seen):
        """What was read [B, K, W] -> for each target that of its place in the last step of NOW, [B, F, W]."""
        return seen[:, -self.sites :].repeat(1, self.num_targets // self.sites, 1)


def silent(linear):
    """A linear map that begins as zero: a new predictor says that nothing changes."""
    nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    return linear


class Direct(nn.Module):
    """A transformer over the context, whose token number i becomes target number i: [B, K, D] -> [B, F = K, D]."""

    def __init__(self, cfg, dim):
        super().__init__()
        self.read, self.out = Reader(cfg, dim, cfg.depth), silent(nn.Linear(cfg.hidden_dim, dim))

    def forward(self, context):
        return self.out(self.read(context))


class CrossBlock(V.Block):
    """A block that reads a context behind its self-attention: [B, F, W] and [B, K, W] -> [B, F, W]."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__(dim, num_heads, mlp_ratio, 0.0)
        self.norm_cross, self.cross = nn.LayerNorm(dim, eps=1e-6), V.CrossAttention(dim, dim, num_heads)

    def forward(self, x, context):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm_cross(x), *self.cross.project(context))
        return x + self.mlp(self.norm2(x))


class Cross(nn.Module):
    """Learned queries, one for each target, read the context: [B, K, D] -> [B, F, D]."""

    def __init__(self, cfg, dim):
        super().__init__()
        W, form = cfg.hidden_dim, (cfg.hidden_dim, cfg.num_heads, cfg.mlp_ratio)
        self.grad_checkpoint, self.read = cfg.grad_checkpoint, Reader(cfg, dim, cfg.context_depth)
        self.queries = nn.Parameter(grid_code(cfg, W)[cfg.context_tokens :].clone())
        self.blocks = nn.ModuleList(CrossBlock(*form) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(W, eps=1e-6)
        V.init_weights(self.blocks)
        self.out = silent(nn.Linear(W, dim))

    def forward(self, context):
        context = self.read(context)
        x = self.queries + self.read.nearest(context)
        for block in self.blocks:
            if self.grad_checkpoint and self.training and torch.is_grad_enabled():
                x = V.checkpoint_activations(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.out(self.norm(x))


class DiTBlock(V.FlowBlock):
    """A FlowBlock whose insides may be computed twice."""

    grad_checkpoint = False

    def forward(self, *inputs):
        if self.grad_checkpoint and self.training and torch.is_grad_enabled():
            return V.checkpoint_activations(super().forward, *inputs, use_reentrant=False)
        return super().forward(*inputs)


class DiT(V.FlowNet):
    """A flow net over all targets: noised targets [B, R, F, D], time [B, R], `project`ed context -> clean targets."""

    def __init__(self, cfg, dim):
        W = cfg.hidden_dim
        sizes = dict(flow_dim=W, enc_dim=W, flow_read=W, flow_rank=dim, flow_depth=cfg.depth, flow_heads=cfg.num_heads)
        shape = dict(flow_joint=False, now_tokens=0, soon_frames=1, tubelet_t=1, flow_pool=1, flow_chunks=0)
        shape |= dict(action_names=(), future_tubelets=(0, 0, 0))
        super().__init__(SimpleNamespace(**sizes, **shape))
        self.read, self.embed = Reader(cfg, dim, cfg.context_depth), nn.Linear(dim + W, W)
        nn.init.trunc_normal_(self.embed.weight, std=(dim + W) ** -0.5)
        nn.init.zeros_(self.embed.bias)
        self.register_buffer("code", grid_code(cfg, W)[cfg.context_tokens :], persistent=False)
        for block in self.blocks:
            block.__class__, block.grad_checkpoint = DiTBlock, cfg.grad_checkpoint

    def project(self, context):
        """-> (what is near to each target [B, F, W], keys and values of the context for every block)."""
        seen = self.read(context)
        return self.read.nearest(seen), super().project(seen)[1]

    def forward(self, x_tau, tau, projected):
        """The net adds to the best linear guess for targets of unit deviation, in the unit of what that leaves open:
        its error counts alike at every time, where clean targets alone are mostly copied from late ones."""
        near, keys_values = projected
        seen = torch.cat([x_tau.to(near.dtype), near[:, None].expand(-1, x_tau.shape[1], -1, -1)], -1)
        t = tau[..., None, None]
        square = t * t + (1 - t) ** 2
        return t / square * x_tau + (1 - t) / square.sqrt() * super().forward(seen, tau, (None, keys_values))


class Finder(nn.Module):
    """Where one thing is: tokens [N, G, D] of pictures -> (place [N, 2], x and y in -1 to 1, heat [N, G], logits).

    The place is the mean of the patches' centres, weighed by the heat, and what the tokens, weighed alike, say besides:
    a plain mean over tokens knows of no place.
    """

    def __init__(self, cfg, dim):
        super().__init__()
        self.heat = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, 1))
        self.shift = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), silent(nn.Linear(256, 2)))
        _, high, wide = cfg.grid
        y, x = ((2 * torch.arange(size) + 1) / size - 1 for size in (high, wide))
        self.register_buffer("centres", torch.cartesian_prod(y, x).flip(1), persistent=False)  # [G, 2]

    def forward(self, tokens):
        heat = self.heat(tokens)[..., 0].float()  # [N, G]
        weight = heat.softmax(1)[:, None]  # [N, 1, G]
        return (weight @ self.centres + self.shift(weight @ tokens).float())[:, 0], heat


class Locate(nn.Module):
    """A Finder for each thing: tokens [N, G, D] -> (places [N, 2 things, 2], heat [N, 2, G])."""

    def __init__(self, cfg, dim):
        super().__init__()
        self.norm, self.finders = nn.LayerNorm(dim, eps=1e-6), nn.ModuleList(Finder(cfg, dim) for _ in SHAPES)

    def forward(self, tokens):
        tokens = self.norm(tokens)
        return tuple(torch.stack(parts, 1) for parts in zip(*(find(tokens) for find in self.finders)))


PREDICTORS = {"flow": DiT, "direct": Direct, "cross": Cross, "locate": Locate}


@torch.no_grad()
def sample_heun(flow, projected, noise, num_steps, shift):
    """As V.sample_flow, by Heun's rule: every step but the last has a second look at where it leads."""
    x = noise
    for step in range(num_steps):
        tau, after = (u / (u + shift * (1 - u)) for u in (step / num_steps, (step + 1) / num_steps))
        y_hat = flow(x, torch.full(x.shape[:2], tau, device=x.device), projected)
        if step == num_steps - 1:
            return y_hat
        slope = (y_hat - x) / (1 - tau)
        there = x + (after - tau) * slope
        y_hat = flow(there, torch.full(x.shape[:2], after, device=x.device), projected)
        x = x + (after - tau) * (slope + (y_hat - there) / (1 - after)) / 2
    return x


@getattr(torch, "_disable_dynamo", torch.compiler.disable)  # as in V.gather_rows
def seeded_noise(seeds, shape, device):
    """Standard normal noise of samples by their seeds [B], drawn on the device -> [B, *shape]."""
    makers = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
    return torch.stack([torch.randn(shape, generator=maker, device=device) for maker in makers])


# -- samples


def true_places(annotation, times):
    """Places of the things at some seconds of a video -> float32 [T, 2 things, 2], x and y in -1 to 1. BadFile where
    its annotation does not tell them."""
    places = []
    for shape in SHAPES:
        try:
            (thing,) = (thing for thing in annotation["objects"] if thing["shape"] == shape)
            place = 2 * np.stack((np.array(thing["x"], np.float32), np.array(thing["y"], np.float32)), 1) - 1
            number = np.floor(times * annotation["fps"]).astype(int).clip(0, len(place) - 1)
            places.append(place[number])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise V.BadFile(f"its annotation names no places of a {shape}, as make_videos --kinds shapes do") from error
    return torch.from_numpy(np.stack(places, 1))


class FutureClips(C.FrameClips):
    """Clips of videos, none shorter than its frames; for locate with the places of the things, [T, 2, 2]."""

    def read_file(self, video, plan):
        frames, annotation = super().read_file(video, plan)
        if self.cfg.predictor == "locate":
            plan = V.fit_plan(plan, video)
            times = V.frame_times(plan, *V.video_timing(video.path, plan))
            annotation = {**annotation, "places": true_places(annotation, times - video.begin)}
        return frames, annotation

    def sample(self, index):
        if self.cfg.predictor != "locate":
            return super().sample(index)
        frames, number, annotation, bad, _ = self.decode(index, self.cfg.height, self.cfg.width)
        frames = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))  # [T, 3, H, W]
        return (
            {**self.blank(), "frames": frames, "places": annotation.get("places", self.blank()["places"])},
            number,
            bad,
        )

    def blank(self):
        places = {"places": torch.zeros(self.cfg.num_frames, 2, 2)} if self.cfg.predictor == "locate" else {}
        return {**super().blank(), **places}


# -- pictures


def colours(context, *others):
    """Latents [N, D] -> uint8 [N, 3] each: their three leading directions in the context, as deviations from its mean,
    through a sigmoid. The same latent has the same colour in all."""
    mean = context.mean(0)
    values, vectors = torch.linalg.eigh((context - mean).T @ (context - mean) / len(context))
    turned = vectors[:, -3:].flip(1) / values[-3:].flip(0).clamp_min(1e-20).sqrt()
    return [
        (255 * torch.sigmoid(2 * (tokens - mean) @ turned)).round().to(torch.uint8) for tokens in (context, *others)
    ]


def enlarged(tokens, grid, side, repeat):
    """Colours [t' h w, 3] -> frames uint8 [t' * repeat, *side, 3], every latent a tile."""
    maps = tokens.reshape(-1, *grid, 3).permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, side, mode="nearest").permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
    return maps.repeat(repeat, 0)


def write_crosses(frames, places, colour):
    """Paint a cross at each of places [T, 2, 2], x and y in -1 to 1, into frames uint8 [T, H, W, 3]."""
    high, wide = frames.shape[1:3]
    arm = max(2, high // 32)
    for picture, pair in zip(frames, places.tolist()):
        for x, y in pair:
            column, row = (round((place + 1) / 2 * size) for place, size in ((x, wide), (y, high)))
            picture[max(row - arm, 0) : row + arm + 1, max(column, 0) : column + 1] = colour
            picture[max(row, 0) : row + 1, max(column - arm, 0) : column + arm + 1] = colour


# -- the world


class FutureLatents(V.World):
    """Predict latents of a frozen backbone: a sampler of futures, a forecast, or where two things are."""

    Config = FutureLatentsConfig
    Dataset = FutureClips
    KEYS = {
        "loss_predict": "error that trains, mse or l1: of velocities in flow, else of latents, in their `units`",
        "loss_place": "locate: absolute error of places, whose numbers lie in -1 to 1",
        "loss_heat": "locate: cross-entropy of the patch in which each thing is",
        "still": "squared error of the last context latent, repeated",
        "error": "squared error of predicted latents; in flow of the mean of val_samples samples, in evaluations alone",
        "skill": "1 - error / still: above 0 is better than a world that stands still",
        "cosine": "mean cosine of predicted and true latents",
        "sample_skill": "flow: the same as skill of single samples",
        "best_skill": "flow: the same of the best of val_samples samples of every clip",
        "spread": "flow: deviation of samples of a clip, as a share of that which persistence leaves open",
        "pixels": "locate: distance to the true place in pixels",
    }
    FILES = tuple(f"dump_{number}_{name}" for number in range(8) for name in ("latents.png", "clip.mp4", "latents.pt"))
    latent_fields = ("frame_stride", "clip_fps", "image_size", "num_frames", "now_frames", "soon_frames")

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.backbone, dim = Backbone(cfg), cfg.form.dim
        self.predictor = PREDICTORS[cfg.predictor](cfg, dim)
        self.FROZEN = () if cfg.encoder_trainable else ("backbone",)
        self.mark = "weights:random" if cfg.random_weights or cfg.form.kind == "tiny" else ""
        self.register_buffer("change", torch.ones(dim))  # running variance of what is predicted, [D]
        for name, values in (("image_mean", V.IMAGE_MEAN), ("image_std", V.IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        """As V.World.train; a backbone that learns keeps its eval mode: neighbouring frames are no batch for a norm."""
        super().train(mode)
        self.backbone.eval()
        return self

    @staticmethod
    def draw(cfg, stream, index):
        """Flow time, 0 noise to 1 data, and the seed of the noise."""
        if cfg.predictor != "flow":
            return {}
        rng = V.sample_rng(cfg.seed, stream, index, 3)
        tau = torch.tensor(V.shifted_tau(rng.standard_normal(), cfg.flow_shift), dtype=torch.float32)
        return {"tau": tau, "noise_seed": torch.tensor(int(rng.integers(2**62)))}

    # -- latents
    def clip(self, frames):
        """Frames uint8, or float in [0, 1] -> normalised as the backbone expects."""
        frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames
        return (frames - self.image_mean) / self.image_std

    def latents(self, batch):
        """Frames of a batch -> {context [B, K, D], targets [B, F, D]} as the backbone gives them. NOW alone, targets
        from the whole clip: only a picture backbone need not see NOW for them."""
        cfg, clip = self.cfg, self.clip(batch["frames"])
        with torch.set_grad_enabled(torch.is_grad_enabled() and cfg.encoder_trainable):
            context = self.backbone(clip[:, : cfg.now_frames])
        with torch.no_grad():
            seen = 0 if cfg.form.is_video else cfg.now_frames
            targets = self.backbone(clip[:, seen:])[:, -cfg.target_tokens :]
        return {"context": context, "targets": targets}

    def latents_of(self, whole):
        """Tokens [L, D] of a whole clip, from somebody's cache -> the same for one clip. BadFile for other counts."""
        if whole.shape != (wanted := (math.prod(self.cfg.grid), self.cfg.form.dim)):
            raise V.BadFile(f"holds {list(whole.shape)} tokens and channels, not {list(wanted)}")
        return dict(zip(("context", "targets"), whole.split([self.cfg.context_tokens, self.cfg.target_tokens])))

    @torch.no_grad()
    def encode(self, frames):
        """A clip [B, T, 3, H, W], uint8 or in [0, 1], T whole steps -> its latents [B, L, D], normalised."""
        return normalised(self.backbone(self.clip(frames)), self.cfg.embedding_norm)

    def standing(self, context):
        """(the last latent of a context repeated [B, F, D], what a predictor adds to [1 or B, 1 or F, D], the scale in
        which it does, [D])."""
        cfg = self.cfg
        sites = cfg.grid[1] * cfg.grid[2]
        still = context[:, -sites:].repeat(1, cfg.target_tokens // sites, 1)
        if cfg.units == "raw":
            return still, torch.zeros_like(still[:1, :1]), torch.ones_like(self.change)
        return still, still, self.change.clamp_min(1e-12).sqrt()

    # -- the verbs of a world model
    def known(self, clip_or_context):
        """NOW frames [B, T, 3, H, W], or latents [B, K, D] as `encode` gives them -> the latter. ValueError for others
        than now_frames."""
        context = self.encode(clip_or_context) if clip_or_context.ndim == 5 else clip_or_context
        if self.cfg.predictor != "locate" and context.shape[1] != self.cfg.context_tokens:
            raise ValueError(f"NOW is {self.cfg.now_frames} frames, {self.cfg.context_tokens} latents")
        return context

    @torch.no_grad()
    def predict(self, clip_or_context):
        """NOW, frames or latents -> the latents that follow, [B, F, D]; in flow the mean of val_samples samples, the
        same every time. In locate places [B, t', 2 things, 2] of what is given."""
        context, cfg = self.known(clip_or_context), self.cfg
        if cfg.predictor == "locate":
            grid = (-1, cfg.grid[1] * cfg.grid[2])
            places, _ = self.predictor(context.unflatten(1, grid).flatten(0, 1))
            return places.unflatten(0, (len(context), -1))
        if cfg.predictor == "flow":
            generator = torch.Generator(context.device).manual_seed(cfg.seed)
            return self.sample(context, cfg.val_samples, generator=generator).mean(1)
        _, base, scale = self.standing(context)
        return base + scale * self.predictor(context).float()

    @torch.no_grad()
    def sample(self, clip_or_context, num_samples, num_steps=None, sampler=None, generator=None):
        """NOW, frames or latents -> sampled futures [B, S, F, D]. `generator` must live on the model's device; steps
        and sampler (euler, heun) are the config's by default. ValueError where the predictor is no flow."""
        if self.cfg.predictor != "flow":
            raise ValueError(f"predictor {self.cfg.predictor} makes one forecast and no samples")
        context = self.known(clip_or_context)
        shape = (len(context), num_samples, self.cfg.target_tokens, context.shape[-1])
        return self.solve(context, torch.randn(shape, generator=generator, device=context.device), num_steps, sampler)

    def solve(self, context, noise, num_steps=None, sampler=None):
        """Noise [B, S, F, D] -> samples [B, S, F, D]."""
        cfg, (_, base, scale) = self.cfg, self.standing(context)
        rule = {"euler": V.sample_flow, "heun": sample_heun}[sampler or cfg.sampler]
        y = rule(self.predictor, self.predictor.project(context), noise, num_steps or cfg.flow_steps, cfg.flow_shift)
        return base[:, None] + scale * y

    # -- a step
    def forward(self, batch):
        cfg, names = self.cfg, ("context", "targets")
        latents = batch if names[0] in batch else self.latents(batch)
        context, targets = (normalised(latents[name], cfg.embedding_norm) for name in names)  # [B, K, D], [B, F, D]
        if cfg.predictor == "locate":
            return self.locate_step(torch.cat([context, targets], 1), batch["places"])
        still, base, scale = self.standing(context)
        truth, measure = (targets - base) / scale, {"mse": torch.square, "l1": torch.abs}[cfg.loss]
        gauges, carry = {"still": (still - targets).square().mean()}, {"change": (targets - base).square().mean((0, 1))}
        if cfg.predictor == "flow":
            tau, y = batch["tau"][:, None], truth[:, None]  # [B, 1], [B, 1, F, D]
            noise = seeded_noise(batch["noise_seed"], (1, *truth.shape[1:]), truth.device)
            x_tau = V.flow_path(noise, y, tau)
            y_hat = self.predictor(x_tau, tau, self.predictor.project(context))
            loss = measure(V.flow_velocity(y_hat, x_tau, tau) - V.flow_velocity(y, x_tau, tau)).mean()
        else:
            guess = self.predictor(context).float()  # [B, F, D]
            loss = measure(guess - truth).mean()
        with torch.no_grad():
            if cfg.predictor != "flow":
                gauges |= self.compare(base + scale * guess, targets)
            elif not self.training:
                noise = seeded_noise(batch["noise_seed"], (cfg.val_samples, *truth.shape[1:]), truth.device)
                gauges |= self.compare_samples(self.solve(context, noise), targets)
        return self.weigh({"loss_predict": loss}), gauges, carry

    def compare(self, guess, targets):
        """Gauges of a forecast, both [B, F, D]."""
        cosine = F.cosine_similarity(guess, targets, dim=-1).mean()
        return {"error": (guess - targets).square().mean(), "cosine": cosine}

    def compare_samples(self, samples, targets):
        """Gauges of samples [B, S, F, D]."""
        errors = (samples - targets[:, None]).square().mean((2, 3))  # [B, S]
        more = {"sample_error": errors.mean(), "best_error": errors.amin(1).mean(), "varied": samples.var(1).mean()}
        return {**self.compare(samples.mean(1), targets), **more}

    def locate_step(self, tokens, places):
        """Losses of the places of things: tokens [B, L, D], places [B, T, 2, 2] of every frame."""
        cfg, (_, high, wide) = self.cfg, self.cfg.grid
        guess, heat = self.predictor(tokens.unflatten(1, (-1, high * wide)).flatten(0, 1))  # [N, 2, 2], [N, 2, G]
        step = cfg.form.step
        steps = places.unflatten(1, (-1, step))  # a tubelet's place is the mean of its frames'
        truth = (steps.mean(2) if cfg.form.is_video else steps[:, :, 0]).flatten(0, 1)  # [N, 2, 2]
        column, row = (
            ((truth[..., axis] + 1) / 2 * size).long().clamp(0, size - 1) for axis, size in ((0, wide), (1, high))
        )
        side = torch.tensor([cfg.width / 2, cfg.height / 2], device=truth.device)
        losses = {
            "loss_place": (guess - truth).abs().mean(),
            "loss_heat": F.cross_entropy(heat.flatten(0, 1), (row * wide + column).flatten()),
        }
        return self.weigh(losses), {"pixels": ((guess - truth).detach() * side).norm(dim=-1).mean()}, {}

    @torch.no_grad()
    def after_step(self, carries, step):
        """The variance of what is predicted follows the batches, quickly at first."""
        if self.cfg.units == "change" and self.cfg.predictor != "locate":
            square = torch.stack([carry["change"] for carry in carries]).mean(0)
            if self.world_size > 1:
                square = V.gather_rows(square[None], self.world_size).mean(0)
            self.change.lerp_(square, max(0.01, 9 / (10 + step)))

    # -- figures
    def figures(self, looks, means):
        still = means.get("still") or math.nan
        pairs = (("skill", "error"), ("sample_skill", "sample_error"), ("best_skill", "best_error"))
        shares = {name: 1 - means[key] / still for name, key in pairs if key in means}
        return shares | ({"spread": math.sqrt(means["varied"] / still)} if "varied" in means else {})

    def verdict(self, values):
        if self.cfg.predictor == "locate":
            return f"places are {values['val_pixels']:.2f} pixels off, of {self.cfg.height}"
        skill = values["val_skill"]
        better = f"{'' if skill > 0 else 'no '}better than a world that stands still"
        better = "nothing moves in the held-out clips" if math.isnan(skill) else better
        told = f"skill {skill:.3f} ({better}), cosine {values['val_cosine']:.3f}"
        if self.cfg.predictor == "flow":
            best, single = values["val_best_skill"], values["val_sample_skill"]
            told += f"; single samples {single:.3f}, best of {self.cfg.val_samples} {best:.3f}, spread "
            told += f"{values['val_spread']:.2f}"
        return told

    def report(self, run, values, seconds):
        """dump_<k>_*: the first held-out clips."""
        data, began, done = run.source.dataset(self.cfg, "val"), time.monotonic(), 0
        try:
            while done < self.cfg.dump_clips and (not done or time.monotonic() < began + seconds):
                batch = V.for_step(V.collate([data[done]]), 0, run.process.device)
                self.dump(batch, Path(run.cfg.out_dir) / f"dump_{done}")
                done += 1
        except OSError as error:  # a full disk
            run.log.line(f"WARNING: dump {done} could not be written ({V.reason_of(error)})")
        if done:
            run.log.line(f"pictures and latents of {done} held-out clips: {run.cfg.out_dir}/dump_*")

    @torch.no_grad()
    def dump(self, batch, stem):
        """The first clip of a batch -> files STEM_latents.png and STEM_clip.mp4 (frames, true and predicted latents,
        in colours shared by all), and STEM_latents.pt (context, targets, predicted or samples, [tokens, D]); for
        locate its frames with true (white) and predicted (yellow) places. Frames are left out where a cache has none.
        """
        cfg, stem, rows, names, frames = self.cfg, str(stem), [], [], None
        latents = batch if "context" in batch else self.latents(batch)
        context, targets = (normalised(latents[name][:1], cfg.embedding_norm) for name in ("context", "targets"))
        if "frames" in batch:
            frames = batch["frames"][0].permute(0, 2, 3, 1).cpu().numpy().copy()
            rows.append(frames)
        saved = {"context": context[0], "targets": targets[0]}
        if cfg.predictor == "locate":
            saved["places"] = self.predict(torch.cat([context, targets], 1))[0]
            write_crosses(frames, batch["places"][0], (255, 255, 255))
            write_crosses(frames, saved["places"].repeat_interleave(cfg.form.step, 0), (255, 255, 0))
        else:
            flow = cfg.predictor == "flow"
            generator = torch.Generator(context.device).manual_seed(cfg.seed)
            guesses = self.sample(context, 2, generator=generator)[0] if flow else self.predict(context)
            saved["samples" if flow else "predicted"] = guesses if flow else guesses[0]
            seen, *others = colours(context[0], targets[0], *guesses)
            clips = [torch.cat([seen, other]) for other in others]
            names = ["truth", *(("sample 1", "sample 2") if flow else ("predicted",))]
            rows += [enlarged(each, cfg.grid[1:], (cfg.height, cfg.width), cfg.form.step) for each in clips]
        saved = {"made_by": V.MARK, **{name: value.cpu() for name, value in saved.items()}}
        Path(stem).parent.mkdir(parents=True, exist_ok=True)
        V.write_own(f"{stem}_latents.pt", partial(torch.save, saved))
        video = io.BytesIO()
        V.write_video(video, np.concatenate(rows, 1), cfg.clip_fps or 1.0, V.MARK)
        V.write_own(f"{stem}_clip.mp4", lambda handle: handle.write(video.getvalue()))
        V.save_picture(self.page(["clip"] * ("frames" in batch) + names, rows), f"{stem}_latents.png")

    def page(self, titles, rows):
        """Rows of frames uint8 [T, H, W, 3] -> one image with their titles: a column for each latent, NOW and SOON
        over them with a gap between."""
        from PIL import Image, ImageDraw, ImageFont

        cfg, step, left, top = self.cfg, self.cfg.form.step, 84, 24
        now, count, grow = cfg.now_frames // step, cfg.num_frames // step, max(1, round(96 / cfg.height))
        side = cfg.width * grow + 4, cfg.height * grow + 4
        image = Image.new("RGB", (left + count * side[0] + 16, top + len(rows) * side[1]), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
        for row, (title, frames) in enumerate(zip(titles, rows)):
            draw.text((8, top + row * side[1] + side[1] // 2 - 8), title, fill="black", font=font)
            for column, picture in enumerate(frames[::step].repeat(grow, 1).repeat(grow, 2)):
                x = left + column * side[0] + 16 * (column >= now)
                image.paste(Image.fromarray(picture), (x, top + row * side[1]))
                if not row:
                    name = f"SOON {column + 1 - now}" if column >= now else f"NOW {column + 1}"
                    draw.text((x, 4), name, fill="black", font=font)
        return image

    # -- start-up lines
    def describe(self):
        cfg, form = self.cfg, self.cfg.form
        sizes = {name: sum(p.numel() for p in net.parameters()) / 1e6 for name, net in self.named_children()}
        listed = ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items())
        learning = sum(p.numel() for p in self.trained().values()) / 1e6
        t, h, w = cfg.grid
        now = cfg.now_frames // form.step
        return [
            f"parameters: {sum(sizes.values()):.2f} M ({listed}), of which {learning:.2f} M learn",
            f"latents: {form.kind}, {now} + {t - now} steps of {form.step} frames, {h} x {w} patches of {form.patch} "
            f"pixels, {form.dim} numbers each, norm {cfg.embedding_norm}; predictor {cfg.predictor}",
        ]

    @staticmethod
    def typical_part(cfg, device):
        """A block of the predictor's width over a clip's tokens."""
        tokens = min(cfg.target_tokens, 1024)
        return V.Block(cfg.hidden_dim, cfg.num_heads, cfg.mlp_ratio, 0.0), torch.randn(1, tokens, cfg.hidden_dim)


if __name__ == "__main__":
    sys.exit(V.main(world=FutureLatents))
