"""The training step of the tri-temporal world, written plainly: what tools/bench.py plain holds ours against.

The same networks, losses, numbers of tokens and widths, in fp32: nn.MultiheadAttention, a Conv3d tokenizer over the
whole clip, masks that lie on the device, each loss by itself, AdamW(foreach=True), an EMA that loops over parameters.
Where two plain ways are at hand it takes the faster one: attention without weights, tokens picked by gather, the target
encoder in training mode, since the path of nn.MultiheadAttention in eval mode keeps all scores.

FLOW lives in a space of fixed random directions. Ours follows the residual's own; that is left out on both sides.
`space_of` gives ours the same directions. What the plain step does not cover, `plain_config` refuses.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import VJepa_AUTO_V2 as V

# the values of settings that change what a step computes: both sides have them, whatever preset and defaults say
PLAIN = dict(
    getattr(V.VJepaAutoV2Config, "BEFORE", {}), mask_draws=1, grad_checkpoint=False, dropout=0.0, pos_embed="sincos",
    soon_start="last", actions="none", freeze_encoder=False, teacher="ema", latents="", init_from="", init_key="",
    outcome_target="mean", lambda_supcon=0.0, grad_accum=1, flow_context_grad=0.0, grad_clip_value=0.0, shard="none",
    compile=False, compile_whole=False,
)  # fmt: skip


# -- what is covered


def plain_config(cfg, named):
    """A config -> (the one that both sides have, what was changed in words). `named`: fields that the user set.
    UsageError where one of these asks for what the plain step does not know."""
    changed = {}
    for name, value in PLAIN.items():
        if getattr(cfg, name) != value:
            if name in named:
                told = f"{name} = {V.shown(getattr(cfg, name))}: the plain step knows {V.shown(value)} alone (--{name})"
                raise V.UsageError(told)
            changed[name] = value
    if cfg.lambda_flow and not cfg.flow_joint:
        changed["lambda_flow"] = 0.0  # a flow net over several tokens
    told = ", ".join(f"{name} {V.shown(value)}" for name, value in changed.items())
    return replace(cfg, **changed), f"on both sides: {told}" if told else ""


def no_following(rows, square):
    """In place of FutureSpace.absorb: the directions stay."""


def space_of(world, seed=0):
    """Fixed random directions for a world of ours, in place -> the same world."""
    span, rank = world.space.basis.shape
    noise = torch.randn(span, rank, generator=torch.Generator().manual_seed(seed))
    world.space.basis.copy_(torch.linalg.qr(noise)[0])
    world.space.absorb = no_following
    return world


# -- networks


def pick(tokens, idx):
    """tokens [B, L, D], idx [B, K] -> [B, K, D]."""
    return torch.gather(tokens, 1, idx[..., None].expand(-1, -1, tokens.shape[-1]))


def mlp(dim, hidden):
    """[..., dim] -> [..., dim]."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def trunk(dim, depth, num_heads, ratio):
    """Blocks and a norm: [B, N, dim] -> [B, N, dim]."""
    how = dict(dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    block = nn.TransformerEncoderLayer(dim, num_heads, int(dim * ratio), **how)
    return nn.TransformerEncoder(block, depth, nn.LayerNorm(dim, eps=1e-6), enable_nested_tensor=False)


class Encoder(nn.Module):
    """Tokens of a clip [B, T, C, H, W], and the trunk over some of them."""

    def __init__(self, cfg):
        super().__init__()
        kernel = (cfg.tubelet_t, cfg.patch, cfg.patch)
        self.proj = nn.Conv3d(cfg.channels, cfg.enc_dim, kernel, stride=kernel)
        self.trunk = trunk(cfg.enc_dim, cfg.enc_depth, cfg.num_heads, cfg.mlp_ratio)
        self.register_buffer("code", V.sincos_table(V.grid_positions(cfg.grid), cfg.enc_dim))

    def tokens(self, clip):
        """-> [B, L, D] with positions."""
        return self.proj(clip.transpose(1, 2)).flatten(2).transpose(1, 2) + self.code

    def forward(self, tokens, idx):
        return self.trunk(pick(tokens, idx))  # [B, K, D]


class Predictor(nn.Module):
    """Context [B, K, D] -> predicted tokens [B, M, D]."""

    def __init__(self, cfg):
        super().__init__()
        self.sites, ratio = cfg.sites, cfg.pred_mlp_ratio or cfg.mlp_ratio
        self.embed, self.out = nn.Linear(cfg.enc_dim, cfg.pred_dim), nn.Linear(cfg.pred_dim, cfg.enc_dim)
        self.mask_tokens = nn.Parameter(torch.randn(V.SOON + 1, cfg.pred_dim) * 0.02)
        self.trunk = trunk(cfg.pred_dim, cfg.pred_depth, cfg.pred_heads or cfg.num_heads, ratio)
        self.register_buffer("code", V.sincos_table(V.grid_positions(cfg.grid), cfg.pred_dim))

    def forward(self, context, keep_idx, mask_idx, family):
        seen = self.embed(context)  # [B, K, P]
        holes = self.mask_tokens[family].expand(*mask_idx.shape, -1)  # [B, M, P]
        if family == V.SOON:
            holes = holes + seen[:, -self.sites :].repeat(1, mask_idx.shape[1] // self.sites, 1)
        x = torch.cat([seen, holes], 1) + self.code[torch.cat([keep_idx, mask_idx], 1)]
        return self.out(self.trunk(x)[:, keep_idx.shape[1] :])


class Outcome(nn.Module):
    """Context [B, K, D] -> [B, D]."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.enc_dim
        self.queries, self.out = nn.Parameter(torch.randn(cfg.outcome_queries, D) * 0.02), nn.Linear(D, D)
        self.norm_context, self.norm = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.attn, self.mlp = nn.MultiheadAttention(D, cfg.num_heads, batch_first=True), mlp(D, int(D * cfg.mlp_ratio))

    def forward(self, context):
        x, context = self.queries.expand(len(context), -1, -1), self.norm_context(context)
        x = x + self.attn(x, context, context, need_weights=False)[0]
        return self.out((x + self.mlp(self.norm(x))).mean(1))


class Flow(nn.Module):
    """Noised coordinates [B, R, k], times [B, R], NOW context -> clean coordinates. Each of its blocks is an MLP that
    the condition scales, shifts and gates."""

    def __init__(self, cfg):
        super().__init__()
        W, depth = cfg.flow_dim, cfg.flow_depth
        self.embed, self.out = nn.Linear(cfg.flow_rank, W), nn.Linear(W, cfg.flow_rank)
        self.tau_mlp = nn.Sequential(nn.Linear(64, W), nn.SiLU(), nn.Linear(W, W))
        self.whole = nn.Sequential(nn.Linear(cfg.now_tokens * cfg.enc_dim, W), nn.SiLU(), nn.Linear(W, W))
        self.norm_context = nn.LayerNorm(cfg.enc_dim, eps=1e-6)
        self.mlps = nn.ModuleList(mlp(W, 4 * W) for _ in range(depth))
        self.modulate = nn.ModuleList(nn.Linear(W, width * W) for width in (*[3] * depth, 2))
        self.norm = nn.LayerNorm(W, eps=1e-6, elementwise_affine=False)
        self.register_buffer("frequencies", torch.exp(torch.linspace(-1, 1, 32) * torch.tensor(10.0).log()))

    def forward(self, x_tau, tau, context):
        summary = self.whole(self.norm_context(context).flatten(1))[:, None]  # [B, 1, W]
        time = torch.logit(tau, eps=1e-4)[..., None] * self.frequencies
        condition = self.tau_mlp(torch.cat([time.sin(), time.cos()], -1)) + summary
        x = self.embed(x_tau) + summary
        for layer, modulate in zip(self.mlps, self.modulate):
            shift, scale, gate = modulate(F.silu(condition)).chunk(3, -1)
            x = x + gate * layer(self.norm(x) * (1 + scale) + shift)
        shift, scale = self.modulate[-1](F.silu(condition)).chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift)


# -- the step


class PlainWorld(nn.Module):
    """Networks, targets and losses."""

    def __init__(self, cfg):
        super().__init__()
        D, k = cfg.enc_dim, cfg.flow_rank
        self.cfg, self.online, self.target = cfg, Encoder(cfg), Encoder(cfg)
        self.predictor, self.outcome = Predictor(cfg), Outcome(cfg)
        self.read_out = nn.Linear(D, cfg.flow_chunks * D)
        velocity = cfg.lambda_flow and not cfg.flow_fit_clips  # else it waits for a phase after training
        self.flow, self.flow_ema = (Flow(cfg), Flow(cfg)) if velocity else (None, None)
        self.register_buffer("queue", torch.zeros(cfg.outcome_queue, D))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        span = (cfg.soon_tokens + cfg.flow_chunks) * D
        self.register_buffer("basis", torch.linalg.qr(torch.randn(span, k))[0] if velocity else torch.zeros(()))
        for name, value in (("mean", V.IMAGE_MEAN), ("std", V.IMAGE_STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 1, 3, 1, 1))
        for copy in filter(None, (self.target, self.flow_ema, None if cfg.lambda_flow else self.read_out)):
            copy.requires_grad_(False)

    def now_loss(self, tokens, targets, batch):
        """L1 on hidden tokens, mean over both families."""
        losses = []
        for family, name in enumerate(V.MASK_FAMILIES):
            keep_idx, mask_idx = batch[f"keep_{name}"][:, 0], batch[f"mask_{name}"][:, 0]
            preds = self.predictor(self.online(tokens, keep_idx), keep_idx, mask_idx, family)
            losses.append(F.l1_loss(preds, pick(targets, mask_idx)))
        return torch.stack(losses).mean()

    def eventually_loss(self, outcome, key):
        """InfoNCE against the batch and the queue."""
        keys = torch.cat([key, self.queue])
        logits = F.normalize(outcome, dim=1) @ F.normalize(keys, dim=1).T / self.cfg.outcome_temperature
        absent = torch.arange(len(keys), device=key.device) >= len(key) + self.filled
        return F.cross_entropy(logits.masked_fill(absent, float("-inf")), torch.arange(len(key), device=key.device))

    def flow_loss(self, context, soon, targets, batch):
        """Squared velocity error of the residual in the fixed directions, and that of the chunk read-out."""
        cfg, now, later = self.cfg, self.cfg.now_tokens, self.cfg.now_tokens + self.cfg.soon_tokens
        tubelets = targets[:, later:].unflatten(1, (cfg.eventually_tubelets, -1)).mean(2)
        chunks = torch.stack([part.mean(1) for part in tubelets.tensor_split(cfg.flow_chunks, 1)], 1)
        read = self.read_out(context.mean(1)).view_as(chunks)
        loss = F.mse_loss(read, chunks)
        if self.flow is None:
            return loss
        residual = torch.cat([targets[:, now:later] - soon, chunks - read.detach()], 1)  # [B, F, D]
        y, noise = (residual.flatten(1) @ self.basis)[:, None], batch["noise"][:, :, 0]  # [B, 1, k], [B, R, k]
        tau = batch["tau"][..., None]
        x_tau = (1 - tau) * noise + tau * y
        error = self.flow(x_tau, batch["tau"], context) - y
        return loss + (error / (1 - tau).clamp_min(0.05)).square().mean()

    def forward(self, batch):
        """-> ({loss: scalar}, outcome keys [B, D])."""
        cfg, now, later = self.cfg, self.cfg.now_tokens, self.cfg.now_tokens + self.cfg.soon_tokens
        clip = (batch["frames"].float() / 255 - self.mean) / self.std
        places = torch.arange(cfg.num_tokens, device=clip.device).expand(len(clip), -1)
        with torch.no_grad():
            targets = F.layer_norm(self.target.trunk(self.target.tokens(clip)), (cfg.enc_dim,))  # [B, L, D]
        tokens = self.online.tokens(clip)  # [B, L, D]
        losses = {"loss_vjepa": self.now_loss(tokens, targets, batch)} if cfg.lambda_vjepa else {}
        context = self.online(tokens, places[:, :now])  # [B, K, D]
        soon = self.predictor(context, places[:, :now], places[:, now:later], V.SOON)  # [B, M, D]
        losses["loss_soon"] = F.l1_loss(soon, targets[:, now:later])
        key = targets[:, later:].mean(1)
        losses["loss_eventually"] = self.eventually_loss(self.outcome(context), key)
        if cfg.lambda_flow:
            losses["loss_flow"] = self.flow_loss(context.detach(), soon.detach(), targets, batch)
        return losses, key


class PlainStep:
    """Optimizer steps of a plain world."""

    def __init__(self, cfg, device):
        self.cfg, self.world = cfg, PlainWorld(cfg).to(device)
        flow = [*self.world.read_out.parameters(), *(self.world.flow.parameters() if self.world.flow else ())]
        known = {id(parameter) for parameter in flow}
        rest = [p for p in self.world.parameters() if p.requires_grad and id(p) not in known]
        decay, others = ([p for p in rest if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
        rows = (decay, cfg.weight_decay, cfg.lr), (others, 0.0, cfg.lr), (flow, 0.0, cfg.flow_lr)
        groups = [dict(params=params, weight_decay=weight, lr=lr) for params, weight, lr in rows]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=True)
        self.clipped = decay + others, flow

    def take(self, batch, step):
        """One step on a batch that lies on the device; `step` counts from 0."""
        cfg, world = self.cfg, self.world
        losses, key = world(batch)
        total = sum(getattr(cfg, f"lambda_{name[5:]}") * loss for name, loss in losses.items())
        total.backward()
        for parameters in self.clipped:
            torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or float("inf"))
        if torch.isfinite(total):
            self.optimizer.step()
        self.optimizer.zero_grad()
        copies = (world.target, world.online, cfg.ema_momentum), (world.flow_ema, world.flow, cfg.flow_ema)
        with torch.no_grad():
            for slow, fast, momentum in copies if world.flow else copies[:1]:
                for ours, theirs in zip(slow.parameters(), fast.parameters()):
                    ours.mul_(momentum).add_(theirs, alpha=1 - momentum)
        world.queue.copy_(torch.cat([key, world.queue])[: len(world.queue)])
        world.filled.copy_((world.filled + len(key)).clamp_max(len(world.queue)))
