"""Memories for the predictors `hope` and `hybrid`: weights that a clip reads and rewrites while it passes.

    x [B,T,M,dim] -> +FrameMixing   tokens of one frame see each other: attention, two narrow heads
                  -> +Titans        read, then write: fast weights per clip, one write behind every chunk of frames
                  -> ContinuumMemory  a cascade of residual MLPs, each with a state that moves every `period` frames

M is the number of tokens of a frame: action, state, (extrinsics), then the patches. Frames never see later ones.
Fast weights and states live inside one call and start from the learned ones: nothing is remembered from call to call.

Sources: Titans (arXiv 2501.00663), Nested Learning (arXiv 2512.24695; self-modifying memories: section 8.1, their
chunks: 8.2, continuum memory: 7.1).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as checkpoint_activations

import VJepa_AUTO_V2 as V

MEMORY_PART = "memory."  # in the name of every parameter of a Titan memory: those learn at half the rate
PERIODS = ((1, 4.0), (4, 4.0), (16, 4.0))  # (period in frames, hidden width over dim) of the levels of hope
HYBRID_PERIODS = ((1, 2.0), (3, 2.5), (7, 3.0))  # of hybrid
LEARNING, KEEPING = -1.0, 4.0  # where eta and alpha start, before softplus and sigmoid: 0.31 and 0.98 per write


def drop_clips(x, rate, training):
    """The branch of a whole clip set to zero with probability `rate`. x [B, ...] -> like x."""
    if not training or rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= rate
    return x * keep / (1.0 - rate)


def turn(x, rope, num_heads):
    """Rotate the channels of each head by position. x [B, L, dim], rope (cos, sin) [L, dim / num_heads] or None."""
    if rope is None:
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

    def pairs(self, fast, y):
        """What a chunk y [B, n, dim] is written with: k, v [B, n, dim], eta, alpha [B, dim]."""
        if self.modifies:
            k, v, eta, alpha = self.pair_memory.read(fast, y).unbind(1)
            return k, v, F.softplus(eta).mean(1), alpha.sigmoid().mean(1)
        k, v = (F.layer_norm(part(y), y.shape[-1:], eps=1e-6) for part in (self.key, self.value))
        return k, v, *(row.expand(y.shape[0], -1) for row in (F.softplus(self.eta), self.alpha.sigmoid()))

    def forward(self, x, rope=None):
        batch, frames, per_frame = x.shape[:3]
        memories, said = [self.memory] + ([self.pair_memory] if self.modifies else []), []
        with torch.autocast(x.device.type, enabled=False):
            y = x.float().flatten(1, 2)  # [B, T * M, dim]
            q, fast = turn(self.query(y), rope, self.num_heads), [memory.start(batch) for memory in memories]
            for begin in range(0, frames, self.chunk):
                part = slice(begin * per_frame, (begin + self.chunk) * per_frame)
                said.append(self.memory.read(fast[0], q[:, part])[:, 0])
                if begin + self.chunk >= frames:
                    break  # nobody reads a write behind the last chunk
                k, v, eta, alpha = self.pairs(fast[-1], y[:, part])
                k = turn(k, rope and tuple(code[part] for code in rope), self.num_heads)
                surprise = (v - said[-1]).detach().square().mean(2).sqrt().mean(1)  # [B]
                opened = (surprise > self.threshold)[:, None]
                keep = (alpha - eta * k.square().mean(1) / k.shape[2]).clamp(0.0, 1.0)
                rates = torch.where(opened, eta, 0.0), torch.where(opened, keep, 1.0)
                fast = [memory.write(own, k, v, *rates, surprise) for memory, own in zip(memories, fast)]
        return self.proj(torch.cat(said, 1)).view_as(x)


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

    def states(self, hidden):
        """hidden [B, T, M, H] -> the state that each frame reads, like it."""
        state, read, begin = torch.zeros_like(hidden[:, 0]), [], 0
        for frame in range(hidden.shape[1]):
            read.append(state)
            if frame % self.period == 0:
                state = state + self.rate.sigmoid() * (hidden[:, begin : frame + 1].mean(1) - state)
                begin = frame + 1
        return torch.stack(read, 1)

    def forward(self, x):
        hidden = self.mlp.fc1(self.norm(x))
        return self.mlp.fc2(F.gelu(hidden + self.gain * self.states(hidden)))


class ContinuumMemory(nn.Module):
    """A cascade of residual levels, fast to slow, given as (period, ratio). [B, T, M, dim] -> like it."""

    def __init__(self, dim, levels, drop_path=0.0):
        super().__init__()
        self.levels, self.drop_path = nn.ModuleList(Level(dim, *level) for level in levels), drop_path

    def forward(self, x):
        for level in self.levels:
            x = x + drop_clips(level(x), self.drop_path, self.training)
        return x


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

    def forward(self, x, rope=None):
        batch, frames, per_frame = x.shape[:3]
        q, k, v = V.split_heads(self.qkv(x.flatten(1, 2)), 3, self.heads)  # each [B, nh, T * M, hd]
        if rope is not None:
            q, k = V.rotate(q, *rope), V.rotate(k, *rope)
        q, k, v = (part.unflatten(2, (frames, per_frame)).transpose(1, 2).flatten(0, 1) for part in (q, k, v))
        return self.proj(V.attend(q, k, v).transpose(1, 2).flatten(2)).view_as(x)  # attended [B * T, nh, M, hd]


class FrameAttention(V.Attention):
    """Attention over all tokens of this and earlier frames. [B, T, M, dim] -> like it."""

    def forward(self, x, rope=None):
        frames = torch.arange(x.shape[1], device=x.device).repeat_interleave(x.shape[2])
        q, k, v = V.split_heads(self.qkv(x.flatten(1, 2)), 3, self.num_heads)  # each [B, nh, T * M, hd]
        if rope is not None:
            q, k = V.rotate(q, *rope), V.rotate(k, *rope)
        seen = frames[:, None] >= frames
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.proj(attended.transpose(1, 2).flatten(2)).view_as(x)


class HopeBlock(nn.Module):
    """Mixing within a frame, five self-modifying memories, continuum memory: x [B, T, M, dim] -> like it.

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

    def forward(self, x, rope=None):
        x = x + drop_clips(self.mixing(self.norm1(x), rope), self.drop_path, self.training)
        x = x + drop_clips(self.titans(self.norm2(x), rope), self.drop_path, self.training)
        return self.cms(x)


class HybridBlock(HopeBlock):
    """Attention over all frames so far, one Titan memory, continuum memory: x [B, T, M, dim] -> like it."""

    def __init__(self, dim, num_heads, titan_hidden=2.0, cms_levels=HYBRID_PERIODS, **kept):
        super().__init__(dim, num_heads, titan_hidden, cms_levels, **kept, modifies=False)


def start_weights(module):
    """The start of all but the memories: V.init_weights for linear layers, and a mean gain of 1 where tokens mix.

    The rule of 0.02 would make mixing and query a hundredth of the residual stream in a narrow net.
    """
    V.init_weights(module)
    for child in module.modules():
        if isinstance(child, (FrameMixing, Titans)):
            for layer in child.children():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)


class MemoryPredictor(nn.Module):
    """features [B, T, N, D] of frames 0 .. T - 1 and the actions behind them -> frames 1 .. T, [B, T, N, D].

    Per frame the tokens are [action, state, (extrinsics), patches]; slot t predicts frame t + 1.
    """

    def __init__(
        self, block, feature_dim, dim, depth, num_heads, grid, num_timesteps, action_dim, use_extrinsics=False,
        grad_checkpoint=False, drop_path=0.0, **sizes,
    ):  # fmt: skip
        super().__init__()
        self.use_extrinsics, self.grad_checkpoint = use_extrinsics, grad_checkpoint
        self.embed, self.norm = nn.Linear(feature_dim, dim), nn.LayerNorm(dim, eps=1e-6)
        self.action, self.state = nn.Linear(action_dim, dim), nn.Linear(action_dim, dim)
        self.extrinsics = nn.Linear(action_dim - 1, dim) if use_extrinsics else None
        drops = (
            drop_path * number / max(depth - 1, 1) for number in range(depth)
        )  # later blocks are skipped more often
        self.blocks = nn.ModuleList(block(dim, num_heads, drop_path=drop, **sizes) for drop in drops)
        self.head = nn.Linear(dim, feature_dim)
        patches = V.grid_positions((num_timesteps, *grid)).unflatten(0, (num_timesteps, -1))  # [T, N, 3]
        told = patches[:, :1].repeat(1, 3 if use_extrinsics else 2, 1) * torch.tensor([1, 0, 0])
        rope = V.rope_table(torch.cat([told, patches], 1).flatten(0, 1), dim // num_heads)
        for name, code in zip(("rope_cos", "rope_sin"), rope):
            self.register_buffer(name, code, persistent=False)
        start_weights(self)

    def forward(self, features, actions, states, extrinsics=None):
        told = [self.action(actions), self.state(states)] + ([self.extrinsics(extrinsics)] if self.extrinsics else [])
        x = torch.cat([torch.stack(told, 2), self.embed(features)], 2)  # [B, T, M, dim]
        seen = x.shape[1] * x.shape[2]
        rope = self.rope_cos[:seen], self.rope_sin[:seen]
        for block in self.blocks:
            if self.grad_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint_activations(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.head(self.norm(x[:, :, len(told) :]))
