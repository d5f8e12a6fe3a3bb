"""Titan memories, continuum memory and the predictors made of them: what they compute, see, and forget."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, V

Hope = V.import_world(ROOT / "worlds" / "hope.py", "Hope")
H = sys.modules[Hope.__module__]

B, T, N, D, A, DIM, HEADS = 2, 5, 4, 12, 2, 24, 2


class Transformer(nn.Module):
    """A pre-norm transformer block that is causal over frames: what a memory is measured against."""

    def __init__(self, dim, num_heads, **_):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), H.FrameAttention(dim, num_heads, 0.0)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), V.MLP(dim, 4 * dim)

    def forward(self, x, rope=None, past=None):
        y, past = self.attn(self.norm1(x), rope, past)
        x = x + y
        return x + self.mlp(self.norm2(x)), past


def predictor(block, depth=2, seed=0, num_timesteps=T, **sizes):
    torch.manual_seed(seed)
    grid = dict(feature_dim=D, grid_high=2, grid_wide=2, num_timesteps=num_timesteps, action_dim=A)
    net = dict(pred_dim=DIM, pred_depth=depth, num_heads=HEADS, drop_path=0.0)
    return H.Memories(replace(H.HopeConfig(), **{**grid, **net, **sizes}), block)


def inputs(batch=B, frames=T, seed=1):
    """Features, actions, states."""
    torch.manual_seed(seed)
    return torch.randn(batch, frames, N, D), torch.randn(batch, frames, A), torch.randn(batch, frames, A)


def rope_of(net, frames):
    return net.rope(0, frames)


BLOCKS = pytest.mark.parametrize("block", [H.HopeBlock, H.HybridBlock])


# -- fast weights against a loop over clips whose inner gradients come from autograd


def plain_read(memory, number, w1, w2, x):
    said = F.layer_norm(x + F.gelu(x @ w1.T) @ w2.T, x.shape[-1:], eps=1e-6)
    return said * memory.scale[number] + memory.shift[number]


def plain_write(w1, w2, k, v, eta, alpha, surprise, clip):
    """One memory of one clip: the gradient by autograd at weights that are constants."""
    fixed = [w.detach().requires_grad_() for w in (w1, w2)]
    target = F.layer_norm(v + F.gelu(v @ fixed[0].T.detach()) @ fixed[1].T.detach(), v.shape[-1:], eps=1e-6)
    error = k + F.gelu(k @ fixed[0].T) @ fixed[1].T - target
    grads = torch.autograd.grad(0.5 * surprise * error.square().mean(), fixed, create_graph=True)
    keep = alpha - eta * k.square().mean(0) / k.shape[1]
    grads = [grad * min(1.0, clip / grad.norm().item()) for grad in grads]
    return w1 * keep - eta * grads[0], w2 * keep[:, None] - eta[:, None] * grads[1]


def by_loop(titans, x, rope):
    """What `Titans` gives for one clip x [T, M, dim], memory by memory, the one that is read first."""
    owners = [(titans.memory, 0)] + [(titans.pair_memory, i) for i in range(4 * titans.modifies)]
    fast, chunk, out = [(owner.start1[i], owner.start2[i]) for owner, i in owners], titans.chunk, []
    for begin in range(0, x.shape[0], chunk):
        y = x[begin : begin + chunk].flatten(0, 1)
        code = [part[begin * x.shape[1] : (begin + chunk) * x.shape[1]] for part in rope]
        out.append(plain_read(*owners[0], *fast[0], H.turn(titans.query(y)[None], code, HEADS)[0]))
        if titans.modifies:
            k, v, eta, alpha = (plain_read(*owner, *own, y) for owner, own in zip(owners[1:], fast[1:]))
            eta, alpha = F.softplus(eta).mean(0), alpha.sigmoid().mean(0)
        else:
            k, v = (F.layer_norm(part(y), y.shape[-1:], eps=1e-6) for part in (titans.key, titans.value))
            eta, alpha = F.softplus(titans.eta), titans.alpha.sigmoid()
        k, surprise = H.turn(k[None], code, HEADS)[0], (v - out[-1]).detach().square().mean(1).sqrt().mean()
        fast = [plain_write(*own, k, v, eta, alpha, surprise, titans.memory.clip) for own in fast]
    return titans.proj(torch.cat(out)).view_as(x)


@pytest.mark.parametrize("modifies", [True, False])
@pytest.mark.parametrize("chunk, clip", [(1, 1.0), (2, 0.05)])
def test_memories_equal_a_loop_with_autograd(modifies, chunk, clip):
    """Values and meta-gradients are those of the first-order definition; a clip of 0.05 does cut."""
    torch.manual_seed(0)
    titans = H.Titans(DIM, HEADS, 2 * DIM, chunk, clip=clip, modifies=modifies)
    H.start_weights(titans, True)
    x, rope = torch.randn(B, T, N + 2, DIM), rope_of(predictor(H.HopeBlock), T)
    weights = torch.randn(B, T, N + 2, DIM)
    sides = []
    for out in (titans(x, rope)[0], torch.stack([by_loop(titans, clip_, rope) for clip_ in x])):
        sides.append((out, torch.autograd.grad((out * weights).sum(), list(titans.parameters()))))
    (ours, our_grads), (plain, plain_grads) = sides
    assert torch.allclose(ours, plain, atol=1e-5)
    for (name, _), grad, other in zip(titans.named_parameters(), our_grads, plain_grads):
        # float32 sums in another order
        assert (grad - other).norm() <= 1e-4 * other.norm() + 1e-6, name
        assert other.norm() > 0 or name == "key.bias", name


def test_chunks():
    """Chunks of one and of two frames differ; one chunk for all frames only reads the learned start."""
    torch.manual_seed(0)
    x, outs = torch.randn(B, T, N + 2, DIM), {}
    for chunk in (1, 2, T, T + 3):
        torch.manual_seed(1)
        titans = H.Titans(DIM, HEADS, 2 * DIM, chunk)
        outs[chunk], _ = titans(x)
    still = titans.proj(titans.memory.read(titans.memory.start(B), titans.query(x.flatten(1, 2)))[:, 0])
    assert (outs[1] - outs[2]).abs().max() > 1e-3
    assert torch.equal(outs[T], still.view_as(x)) and torch.equal(outs[T + 3], outs[T])
    assert (outs[1] - outs[T])[:, 1:].abs().max() > 1e-3 and torch.equal(outs[1][:, 0], outs[T][:, 0])


@pytest.mark.parametrize("modifies", [True, False])
def test_surprise_gate_is_per_clip(modifies):
    """A clip whose surprise is below the threshold writes nothing, whatever the clip beside it does."""
    torch.manual_seed(0)
    titans, x = H.Titans(DIM, HEADS, 2 * DIM, modifies=modifies), torch.randn(B, T, 3, DIM)
    gated, by_chunk = [], {}
    for chunk in (1, T):
        titans.chunk = chunk
        by_chunk[chunk], _ = titans(x)
    titans.chunk, surprises = 1, []
    for threshold in (0.0, float("inf")):
        titans.threshold = threshold
        gated.append(titans(x)[0])
    assert torch.equal(gated[0], by_chunk[1])
    torch.testing.assert_close(gated[1], by_chunk[T], rtol=0, atol=1e-5)  # products of unlike shapes: not to the bit
    for row in x:
        k, v, *_ = titans.pairs(titans.pair_memory.start(1) if modifies else None, row[:1].flatten(0, 1)[None])
        said = titans.memory.read(titans.memory.start(1), titans.query(row[:1]))[:, 0]
        surprises.append((v - said).square().mean(2).sqrt().mean().item())
    titans.threshold, low = sum(surprises) / 2, min(range(2), key=surprises.__getitem__)
    out, _ = titans(x)
    assert torch.equal(out[low, 1], gated[1][low, 1])  # frame 1 reads what frame 0 wrote
    assert (out[1 - low, 1] - by_chunk[T][1 - low, 1]).abs().max() > 1e-4


def test_a_write_lowers_the_error_of_what_was_written():
    """In every memory: after one step the memory gives the target of the pair better than before."""
    torch.manual_seed(0)
    k, v = F.layer_norm(torch.randn(2, B, 6, DIM), (DIM,)).unbind(0)
    memory, ones = H.TitanMemory(5, DIM, 2 * DIM), torch.ones(B, DIM)
    fast = memory.start(B)
    target = memory.read(fast, v)
    new = memory.write(fast, k, v, 0.5 * ones, ones, torch.ones(B))
    start, end = ((target - memory.read(w, k)).square().mean((0, 2, 3)) for w in (fast, new))
    assert (end < 0.95 * start).all(), (start, end)


# -- levels


def test_levels_run_at_their_periods():
    """The state of a level changes behind frames 0, p, 2p ... only, by the mean of what it gathered."""
    torch.manual_seed(0)
    hidden = torch.randn(B, 20, 3, 8)
    for period, moves in ((1, range(19)), (4, (0, 4, 8, 12, 16)), (16, (0, 16))):
        level = H.Level(8, period, 1.0)
        states, _ = level.states(hidden)
        changed = (states[:, 1:] != states[:, :-1]).flatten(2).any(2).all(0)
        assert changed.nonzero().flatten().tolist() == list(moves)
        assert torch.equal(states[:, 0], torch.zeros_like(states[:, 0]))
        assert torch.allclose(states[:, 1], 0.5 * hidden[:, 0])
        if period == 4:
            assert torch.allclose(states[:, 5], 0.25 * hidden[:, 0] + 0.5 * hidden[:, 1:5].mean(1), atol=1e-6)


def test_the_slow_level_matters():
    """In 8 frames period 16 keeps frame 0: every later frame reads it, and its parameters learn."""
    torch.manual_seed(0)
    level, x = H.Level(DIM, 16, 2.0), torch.randn(B, 8, 3, DIM)
    other = x.clone()
    other[:, 0] = torch.randn(B, 3, DIM)
    out, _ = level(x)
    effect = (out - level(other)[0]).abs().mean((0, 2, 3))
    assert (effect[1:] > 0.02 * out.std()).all(), effect / out.std()
    other = x.clone()
    other[:, 1:7] = torch.randn(B, 6, 3, DIM)
    assert torch.equal(level(other)[0][:, 7], out[:, 7])
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in level.parameters())


# -- whole predictors


@BLOCKS
def test_every_parameter_learns(block):
    net, rows = predictor(block, use_extrinsics=True), inputs()
    out = net(*rows, torch.randn(B, T, A - 1))
    assert out.shape == rows[0].shape
    (out * torch.randn_like(out)).sum().backward()
    still = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert not still
    for name, p in net.named_parameters():
        if H.MEMORY_PART in name:  # each of the stacked memories, not only some of them
            assert all(part.abs().max() > 0 for part in p.grad), name


@BLOCKS
def test_clips_of_a_batch_do_not_meet(block):
    net, rows = predictor(block), inputs(3)
    others = [torch.cat([part[:1], torch.randn_like(part[1:]) * 3]) for part in rows]
    with torch.no_grad():
        whole = net(*rows)
        assert torch.equal(whole[0], net(*others)[0])
        # another batch size may sum in another order
        assert (whole[0] - net(*(part[:1] for part in rows))[0]).abs().max() < 1e-6


@BLOCKS
def test_the_future_never_reaches_the_past(block):
    net, rows = predictor(block, chunk=2), inputs()
    with torch.no_grad():
        before = net(*rows)
        for part in range(3):
            for t in range(T):
                other = [row.clone() for row in rows]
                other[part][:, t] = torch.randn_like(other[part][:, t])
                change = (net(*other) - before).abs().amax((0, 2, 3))
                assert change[:t].sum() == 0 and change[t] > 1e-4, (part, t, change)


@BLOCKS
def test_calls_do_not_remember(block):
    net, rows = predictor(block), inputs()
    first = net(*rows)
    net(*inputs(seed=7))
    assert torch.equal(net(*rows), first)
    shorter = net(*(row[:, :2] for row in rows))
    assert torch.allclose(shorter, first[:, :2], atol=1e-6)


@pytest.mark.parametrize("block, chunk", [(H.HopeBlock, 1), (H.HopeBlock, 2), (H.HybridBlock, 3)])
def test_a_clip_in_pieces_is_the_whole(block, chunk):
    """What a call passes on, fast weights, the open chunk, states, keys, is all that later frames need: values and
    gradients. Seen red without the open chunk, with states that begin anew, with places in time that do."""
    net, rows, found = predictor(block, num_timesteps=7, chunk=chunk), inputs(frames=7), []
    pieces, past = [], None
    for begin, end in ((0, 1), (1, 3), (3, 4), (4, 7)):
        guesses, past = net.advance(*(row[:, begin:end] for row in rows), past=past)
        pieces.append(guesses)
    learns, weights = [p for p in net.parameters() if p.requires_grad], torch.randn_like(rows[0])
    for out in (net(*rows), torch.cat(pieces, 1)):
        found.append((out.detach(), torch.autograd.grad((out * weights).sum(), learns)))
    (whole, wanted), (joined, grads) = found
    assert torch.allclose(whole, joined, atol=1e-5)
    assert all((a - b).norm() <= 1e-3 * a.norm() + 1e-5 for a, b in zip(wanted, grads))


def test_checkpointing_gives_the_same_gradients():
    net, rows = predictor(H.HopeBlock, drop_path=0.3), inputs()
    grads = []
    for net.grad_checkpoint in (False, True):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(net(*rows).square().sum(), [p for p in net.parameters() if p.requires_grad]))
    assert net.training and all(torch.equal(*pair) for pair in zip(*grads))


@BLOCKS
def test_fast_weights_are_float32_under_autocast(block, monkeypatch):
    net, rows, kinds = predictor(block), inputs(), set()
    answer = H.TitanMemory.answer

    def spied(self, fast, x):
        found = answer(self, fast, x)
        kinds.update(part.dtype for part in (*fast, x, *found))
        return found

    monkeypatch.setattr(H.TitanMemory, "answer", spied)
    exact = net(*rows)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*rows)
    out.float().square().sum().backward()
    assert kinds == {torch.float32}
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    assert (out - exact).norm() < 0.05 * exact.norm()  # bfloat16 keeps 8 bits


def effects(net, rows):
    """How much other actions, and another first frame, change the predictions behind them."""
    features, actions, states = rows
    torch.manual_seed(11)
    other, moved = torch.randn_like(actions), features.clone()
    moved[:, 0] = torch.randn_like(features[:, 0])
    with torch.no_grad():
        out = net(*rows)
        scale = out.std()
        return (
            (net(features, other, states) - out).abs().mean() / scale,
            (net(moved, actions, states) - out)[:, 1:].abs().mean() / scale,
        )


def trained(net, steps=20):
    """A few steps on clips whose frames turn by what the actions say."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    torch.manual_seed(5)
    for _ in range(steps):
        start, actions = torch.randn(8, 1, N, D), torch.randn(8, T, A)
        drift = F.pad(actions.cumsum(1), (0, D - A))[:, :, None]
        loss = (net(start.expand(-1, T, -1, -1), actions, torch.zeros_like(actions)) - start - drift).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("block, depth", [(H.HopeBlock, 2), (H.HybridBlock, 4)])
@pytest.mark.parametrize("steps", [0, pytest.param(20, marks=pytest.mark.slow)])
def test_actions_and_the_first_frame_matter(block, depth, steps):
    """More than a tenth of what they do in a transformer of the same size, at the start and after some steps."""
    rows, nets = inputs(8), (predictor(block, depth), predictor(Transformer, 8))
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert 0.8 < counts[0] / counts[1] < 1.25, counts
    ours, theirs = (effects(trained(net, steps), rows) for net in nets)
    for mine, other in zip(ours, theirs):
        assert mine > 0.1 * other and mine > 1e-3, (ours, theirs)


def test_writes_alone_carry_the_first_frame():
    """Without attention over frames and without states, later frames know the first by what was written."""
    net, rows = predictor(H.HopeBlock), inputs()
    for block in net.blocks:
        for level in block.cms.levels:
            level.gain.data.zero_()
    assert effects(net, rows)[1] > 0.02  # of the deviation of the predictions
    for block in net.blocks:
        block.titans.threshold = float("inf")
    assert effects(net, rows)[1] == 0


def test_counts_at_full_size():
    """Parameters equal those of the system that this one answers to, within a thousandth or two."""
    for preset, wanted in (
        ("hope_param_matched", 42042880),
        ("hope_depth_matched", 83294080),
        ("hope_hybrid", 48720256),
    ):
        cfg = replace(H.HopeConfig(), **V.merged(H.HopeConfig, "PRESETS")[preset])
        with torch.device("meta"):
            net = Hope(cfg)
        assert abs(sum(p.numel() for p in net.parameters()) / wanted - 1) < 0.002
