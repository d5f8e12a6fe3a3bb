"""worlds/cosmos.py: shapes, the closed loop, losses against a float64 reference, pretrained encoders of the real
libraries with random weights, the plateau schedule, clips of videos, training, and the real command."""

import contextlib
import io
import json
import math
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, V
from training import cpu_process, new_state, run_file, stop_after_update, train_steps

sys.path.insert(0, str(ROOT / "tools"))

import make_videos as M  # noqa: E402
import split_videos as S  # noqa: E402

WORLD = ROOT / "worlds" / "cosmos.py"
Cosmos = V.import_world(WORLD, "Cosmos")
W = sys.modules[Cosmos.__module__]

# a few ten thousand parameters, 3 + 3 frames
SMALL = dict(
    image_size=32,
    num_frames=6,
    now_frames=3,
    soon_frames=3,
    base_channels=8,
    latent_dim=16,
    hidden_dim=24,
    num_heads=2,
    dropout=0.0,
    brightness=0.0,
    batch_size=2,
    num_workers=0,
    steps=6,
    warmup_steps=0,
    device="cpu",
    log_every=1,
    val_clips=4,
    val_every=0,
)
LOSSES = ("loss_mse", "loss_l1", "loss_perceptual", "loss_temporal", "loss_reconstruct")
DYNAMICS = ("gru", "lstm", "transformer")


def config(**overrides):
    """A small config that holds its own rules -> CosmosConfig."""
    cfg = replace(W.CosmosConfig(), **{**SMALL, **overrides})
    V.validate_config(cfg)
    return cfg


def small_frames(now, soon, **overrides):
    """A small config of other lengths."""
    return config(now_frames=now, soon_frames=soon, num_frames=now + soon, **overrides)


def new_world(cfg, seed=0):
    """A new world of a config in train mode, the same for the same seed."""
    torch.manual_seed(seed)
    return Cosmos(cfg).train()


def stir(model, seed=1, scale=0.2):
    """Give a world's dynamics weights under which latents move; a new one stands still."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.dynamics.change.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def squares(cfg, num_clips, seed=0):
    """Dark squares that glide over a light ground, each at its own speed -> uint8 [B, T, 3, H, W]."""
    rng = np.random.default_rng(seed)
    clips = np.full((num_clips, cfg.num_frames, 3, cfg.height, cfg.width), 230, np.uint8)
    for clip in clips:
        side, colour = cfg.height // 4, rng.integers(0, 120, 3)
        start, speed = rng.uniform(0, 12, 2), rng.uniform(0.5, 1.5, 2)
        for frame, picture in enumerate(clip):
            y, x = (start + speed * frame).astype(int)
            picture[:, y : y + side, x : x + side] = colour[:, None, None]
    return torch.from_numpy(clips)


def batch_of(cfg, frames, stream="train", first=0):
    """Frames [B, T, 3, H, W] with what the world draws for samples first, first + 1, ... -> a batch."""
    drawn = [Cosmos.draw(cfg, stream, first + number) for number in range(len(frames))]
    return {"frames": frames, **{key: torch.stack([each[key] for each in drawn]) for key in drawn[0]}}


def noise(*shape, seed=0):
    """Frames of noise -> uint8."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def one_line(call, *args, kind=V.UserError):
    """The error of a call, which must be one line -> its text."""
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def facts(out_dir):
    """Every record of a run without times and memory."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("clips_per_s", "data_wait", "mem_gb", "time")} for row in rows]


def saved(out_dir):
    return torch.load(out_dir / "checkpoints" / "ckpt_final.pt", weights_only=True)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- videos shared by the tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def raw_videos(tmp_path_factory):
    """Two kinds of physics videos, five each, 12 frames of 64 x 64 at 30 per second -> folder."""
    folder = tmp_path_factory.mktemp("physics") / "raw"
    assert M.main(f"--out {folder} --num_videos 5 --kinds bouncing,falling --num_frames 12 --size 64".split()) == 0
    return folder


@pytest.fixture(scope="session")
def split(raw_videos):
    """The same, split into train/ val/ test/ -> folder."""
    folder = raw_videos.parent / "split"
    assert S.main(["--input", str(raw_videos), "--output", str(folder)]) == 0
    return folder


# -- shapes and verbs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("painter", ["plain", "attention"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_any_context_and_horizon(dynamics, painter):
    """model(context, n) -> frames in [0, 1], their latents, those of the context, for any lengths, not only those of
    training. Seen red with the context cut to the length of training."""
    cfg = config(dynamics=dynamics, painter=painter, image_size=64)
    model = stir(new_world(cfg)).eval()
    for length, n in ((2, 1), (7, 9)):  # trained: 3 and 3
        frames, future, context = model(noise(2, length, 3, 64, 64), n)
        assert frames.shape == (2, n, 3, 64, 64) and 0 <= frames.min() < frames.max() <= 1
        assert future.shape == (2, n, 16) and context.shape == (2, length, 16)
        assert frames.dtype == future.dtype == torch.float32


def test_verbs_fit_together():
    """encode, decode, reconstruct and the model itself say the same of bytes and of numbers in 0 to 1. Seen red without
    the division by 255."""
    model = stir(new_world(config())).eval()
    clip = noise(2, 5, 3, 32, 32)
    numbers = clip.float() / 255
    latents = model.encode(clip)
    assert latents.shape == (2, 5, 16) and torch.equal(latents, model.encode(numbers))
    again = model.reconstruct(clip)
    assert again.shape == clip.shape and torch.equal(again, model.decode(latents))
    for one, other in zip(model(clip, 3), model(numbers, 3)):
        assert torch.equal(one, other)
    with torch.no_grad():
        model.decoder.body[-2].bias.fill_(9)  # far beyond white
    assert (model.decode(latents) == 1).all() and model.paint(latents).min() > 1


def test_frames_need_not_be_square():
    """64 x 96: a step forward and back, and a rollout. Seen red with height and width swapped in the painter."""
    cfg = config(image_size=(64, 96), painter="attention")
    model = new_world(cfg)
    losses, _, _ = model(batch_of(cfg, noise(2, 6, 3, 64, 96)))
    losses["loss_total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trained().values())
    assert model.eval()(noise(1, 2, 3, 64, 96), 4)[0].shape == (1, 4, 3, 64, 96)


def attended(model, latents):
    """Run the decoder -> {(h, w) of maps with attention: (input, output)}."""
    seen, hooks = {}, []
    for module in model.decoder.modules():
        if isinstance(module, W.MapAttention):
            hooks.append(
                module.register_forward_hook(lambda _, args, out: seen.update({args[0].shape[2:]: (args[0], out)}))
            )
    model.decode(latents)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("size", "painter", "places"),
    [
        (64, "attention", {(8, 8), (16, 16)}),
        (128, "attention", {(8, 8), (16, 16)}),
        ((64, 96), "attention", {(8, 12)}),
        (64, "plain", set()),
        (64, "auto", set()),  # no pretrained encoder
    ],
)
def test_attention_stands_at_8_and_16_places(size, painter, places):
    """And nowhere else: 4 x 4 is too coarse to need it, 32 x 32 too much to pay for. Its gate starts at 0, where it
    changes no bit, and has a gradient. Seen red with the gate at 1."""
    cfg = config(image_size=size, painter=painter)
    model = new_world(cfg).eval()
    latents = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    seen = attended(model, latents)
    assert seen.keys() == places and all(torch.equal(before, after) for before, after in seen.values())
    gates = [module.gate for module in model.modules() if isinstance(module, W.MapAttention)]
    model.paint(latents).square().sum().backward()
    assert len(gates) == len(places) and all(gate.grad.abs() > 0 for gate in gates)


def test_attention_of_maps_is_attention_over_places():
    """Gate 0.5, against softmax products in float64, heads of 8 channels. Seen red with heads of 4."""
    torch.manual_seed(2)
    module, x = W.MapAttention(16).double(), torch.randn(2, 16, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        module.gate.fill_(0.5)
    places = F.group_norm(x, 8).flatten(2).transpose(1, 2)  # [N, 15, 16]
    q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in module.attention.qkv(places).chunk(3, 2))
    mixed = ((q @ k.transpose(-1, -2)) / math.sqrt(8)).softmax(-1) @ v
    told = module.attention.proj(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(module(x), x + 0.5 * told, atol=1e-12)


# -- closed loop ------------------------------------------------------------------------------------------------------


def loop_by_hand(dynamics, latents, n):
    """What follows latents [B, Tc, D], by torch's own layer over context and own guesses anew for every one of them;
    nothing is carried along. -> [B, n, D]"""
    guesses, D = latents[:, -1:], latents.shape[2]
    for _ in range(n):
        if isinstance(dynamics, W.Recurrent):
            output, _ = dynamics.net(torch.cat([latents, guesses[:, 1:]], 1))
            change = dynamics.change(F.silu(dynamics.hidden(output[:, -1:])))
        else:
            span = latents.shape[1] - 1 + guesses.shape[1]
            angles = np.arange(span)[:, None] / 10000 ** (np.arange(0, D, 2) / D)
            code = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1)).to(latents.dtype)
            mask = torch.ones(guesses.shape[1], guesses.shape[1], dtype=torch.bool).triu(1)
            source, target = latents + code[: latents.shape[1]], guesses + code[latents.shape[1] - 1 :]
            output = dynamics.look_ahead(target, dynamics.look_back(source), tgt_mask=mask)
            change = dynamics.change(output[:, -1:])
        guesses = torch.cat([guesses, guesses[:, -1:] + change], 1)
    return guesses[:, 1:]


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_rollout_feeds_on_its_own_guesses(dynamics):
    """Guesses equal a loop by hand over torch's own layer, and a longer rollout begins with the shorter one. Seen red
    with the last latent of the context fed for ever, and with frame numbers that count from 0 again."""
    model = stir(new_world(config(dynamics=dynamics))).eval()
    context = noise(2, 4, 3, 32, 32)
    with torch.no_grad():
        short, long = model(context, 5), model(context, 10)
        assert torch.equal(short[1], long[1][:, :5]) and torch.equal(short[2], long[2])
        assert torch.allclose(short[0], long[0][:, :5], atol=1e-6)  # convolutions of other batches round otherwise
        by_hand = loop_by_hand(model.dynamics.double(), long[2].double(), 10)
        exact = model.dynamics(long[2].double(), 10)
    # float64 of both; only the sine codes, made in float32 by the world, differ by their rounding
    assert torch.allclose(exact, by_hand, atol=1e-5)
    assert torch.allclose(long[1].double(), by_hand, atol=1e-4)
    assert (by_hand.diff(dim=1).abs().amax((0, 2)) > 1e-3).all()  # it moves, so that the loop matters


@pytest.mark.parametrize("painted_frames", [0, 2])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_future_is_never_seen(dynamics, painted_frames):
    """Other future frames in the batch change losses, and no bit of a latent or a painted frame. Seen red with the
    dynamics fed the truth."""
    cfg = small_frames(3, 4, dynamics=dynamics, painted_frames=painted_frames)
    model, seen = stir(new_world(cfg)), []
    for net in (model.dynamics, model.decoder):
        net.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out.detach())))
    frames = noise(2, 7, 3, 32, 32)
    other = torch.cat([frames[:, :3], noise(2, 4, 3, 32, 32, seed=9)], 1)
    (one, _, _), (two, _, _) = (model(batch_of(cfg, clip)) for clip in (frames, other))
    half = len(seen) // 2
    assert half >= 2
    for first, second in zip(seen[:half], seen[half:]):
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert one["loss_mse"] != two["loss_mse"] and one["loss_temporal"] != two["loss_temporal"]
    assert one["loss_reconstruct"] == two["loss_reconstruct"]


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_new_world_stands_still(dynamics):
    """Before the first step every guess is the last latent of the context, to the bit: the persistence baseline."""
    model = new_world(config(dynamics=dynamics)).eval()
    _, future, context = model(noise(2, 4, 3, 32, 32), 6)
    assert torch.equal(future, context[:, -1:].expand_as(future))


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_nothing_cannot_be_predicted(dynamics):
    """A loop would give one frame for 0. Seen red without the check."""
    with pytest.raises(ValueError, match="must be at least 1"):
        new_world(config(dynamics=dynamics))(torch.zeros(1, 3, 3, 32, 32), 0)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_small_changes_add_up_under_autocast(dynamics):
    """40 changes of 1/500 are 0.08 with bf16 products too. Seen red with latents in bf16, whose steps between 0.5 and 1
    are 1/256: nothing moved."""
    model = new_world(config(dynamics=dynamics)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.dynamics.change.bias.fill_(1 / 512)  # a number of bf16
        model.encoder.project.bias.fill_(0.75)
        _, future, context = model(noise(1, 3, 3, 32, 32), 40)
    assert future.dtype == context.dtype == torch.float32
    assert torch.allclose(future[:, -1] - context[:, -1], torch.tensor(40 / 512), atol=1e-4)


def test_layers_of_the_transformer_begin_apart():
    """torch's stacks copy one layer: each must be drawn anew. Seen red: all layers were the same at the start."""
    dynamics = new_world(config(dynamics="transformer", num_layers=3)).dynamics
    for stack in (dynamics.look_back, dynamics.look_ahead):
        first = [layer.linear1.weight[0, 0].item() for layer in stack.layers]
        inner = [layer.self_attn.in_proj_weight[0, 0].item() for layer in stack.layers]
        assert len(set(first)) == len(set(inner)) == 3


# -- losses -----------------------------------------------------------------------------------------------------------


def losses_by_hand(model, batch):
    """The losses of a batch by loops over frames, in float64 of numpy -> dict."""
    cfg, clip = model.cfg, batch["frames"].double().numpy() / 255
    if model.training:
        clip = np.minimum(clip * batch["bright"].double().numpy()[:, None, None, None, None], 1)
    with torch.no_grad():
        now = torch.from_numpy(clip[:, : cfg.now_frames]).float()
        context = model.encode(now)
        future = model.dynamics(context, cfg.soon_frames)
        paint = model.paint if model.training else model.decode
        again, guess = paint(context).double().numpy(), paint(future).double().numpy()
    truth, sums, counts = clip[:, cfg.now_frames :], {}, {}
    for row in range(len(clip)):
        now_idx, soon_idx = (batch[name][row].tolist() for name in ("now_idx", "soon_idx"))
        if not model.training:
            now_idx, soon_idx = range(cfg.now_frames), range(cfg.soon_frames)
        terms = [("loss_reconstruct", (again[row, i] - clip[row, i]) ** 2) for i in now_idx]
        for place, i in enumerate(soon_idx):
            terms += [("loss_mse", (guess[row, i] - truth[row, i]) ** 2)]
            terms += [("loss_l1", np.abs(guess[row, i] - truth[row, i]))]
            terms += [("still", (clip[row, cfg.now_frames - 1] - truth[row, i]) ** 2)]
            if place and i == soon_idx[place - 1] + 1:
                moved = guess[row, i] - guess[row, i - 1] - (truth[row, i] - truth[row, i - 1])
                terms += [("loss_temporal", np.abs(moved))]
        for name, value in terms:
            sums[name], counts[name] = sums.get(name, 0) + value.mean(), counts.get(name, 0) + 1
    return {name: total / counts[name] for name, total in sums.items()}


@pytest.mark.parametrize(("painted_frames", "is_training"), [(0, True), (4, True), (4, False)])
def test_losses_equal_a_reference_in_float64(painted_frames, is_training):
    """All losses, their sum and the figure of a still world, for all frames, for some, and for all again where it is
    evaluated; brightness in training alone. Seen red with brightness in evaluations and with frames that do not follow
    each other compared."""
    weights = dict(lambda_l1=0.3, lambda_temporal=0.7, lambda_mse=1.1, lambda_reconstruct=0.5)
    cfg = small_frames(5, 6, painted_frames=painted_frames, brightness=0.5, **weights)
    model = stir(new_world(cfg)).train(is_training)
    batch = batch_of(cfg, squares(cfg, 4), first=4)
    assert len(set(batch["bright"].tolist())) > 2 and [1, 2, 4, 5] in batch["soon_idx"].tolist() or not painted_frames
    losses, gauges, _ = model(batch)
    hand = losses_by_hand(model, batch)
    for name, value in hand.items():  # float32 sums of some ten thousand pixels
        assert {**losses, **gauges}[name].item() == pytest.approx(value, rel=2e-5), name
    total = sum(weight * hand[f"loss_{name.removeprefix('lambda_')}"] for name, weight in weights.items())
    assert losses["loss_total"].item() == pytest.approx(total, rel=2e-5)
    assert {"loss_total", *LOSSES} == losses.keys() and losses["loss_perceptual"] == 0


def test_temporal_loss_rewards_the_right_motion_alone():
    """0 for the right motion at a wrong brightness; a still guess of a moving truth pays, and a moving guess of a still
    truth as well. The original asks for small differences of its own guess, so still pictures are its best."""
    cfg = config()
    moving = squares(cfg, 2).float() / 255  # [B, T, 3, H, W]
    still, idx = moving[:, :1].expand_as(moving), torch.arange(6).expand(2, 6)
    assert W.neighbour_loss(moving + 0.25, moving, idx) < 1e-6
    assert W.neighbour_loss(still, moving, idx) == W.neighbour_loss(moving, still, idx) > 1e-3
    far = torch.tensor([[0, 2, 4]]).expand(2, 3)  # no two that follow each other: nothing to compare
    assert W.neighbour_loss(still[:, ::2], moving[:, ::2], far) == 0


def test_a_single_future_frame_has_no_neighbour():
    """soon_frames = 1: the temporal loss is 0, and a step is taken. Seen red: an IndexError."""
    cfg = small_frames(2, 1)
    losses, _, _ = new_world(cfg)(batch_of(cfg, noise(2, 3, 3, 32, 32)))
    assert losses["loss_temporal"] == 0 and losses["loss_mse"] > 0


@pytest.mark.parametrize(("count", "wanted"), [(10, 4), (30, 8), (5, 4), (3, 2)])
def test_painted_frames_come_in_pairs(count, wanted):
    """1,000 draws: so many as are wanted, in order, in pairs of neighbours on the ring of all frames, every frame
    equally often. Seen red with pairs that never close the ring: the first and the last frame had half their share."""
    seen = np.zeros(count)
    for draw in range(1000):
        idx = W.painted_idx(np.random.default_rng(draw), count, wanted).tolist()
        assert len(idx) == wanted and idx == sorted(idx) and 0 <= idx[0] and idx[-1] < count
        follows = sum((b - a) % count == 1 for a, b in zip(idx, [*idx[1:], idx[0]]))
        assert follows >= min(wanted // 2, 2)  # overlapping pairs share neighbours
        assert all((i + 1) % count in idx or (i - 1) % count in idx for i in idx)
        seen += np.bincount(idx, minlength=count)
    share = 1000 * wanted / count  # its standard deviation is below 2 sqrt(share)
    assert np.abs(seen - share).max() < 8 * math.sqrt(share)


def test_all_frames_are_painted_where_that_is_wanted():
    for wanted in (0, 10, 11):
        assert W.painted_idx(np.random.default_rng(0), 10, wanted).tolist() == list(range(10))


def test_some_painted_frames_stand_for_all():
    """The mean loss over many draws is the loss of all frames, though the last frame has most of the error. Seen red
    with the ends drawn half as often: 0.57 of it."""
    full = small_frames(4, 8)
    few, count = replace(full, painted_frames=4), 400
    clip = squares(full, 1)
    clip[:, -1], clip[:, 0] = 0, 255  # the last of the future, the first of the context
    model = new_world(full)
    with torch.no_grad():
        wanted, _, _ = model(batch_of(full, clip))
        errors = (model.paint(model.dynamics(model.encode(clip[:, :4]), 8))[0] - clip[0, 4:] / 255).square()
        model.cfg = few
        batch = batch_of(few, clip.expand(count, -1, -1, -1, -1))
        losses, _, _ = model(batch)
    per_draw = errors.mean((1, 2, 3))[batch["soon_idx"]].mean(1)  # [count]
    for name in ("loss_mse", "loss_reconstruct"):
        # five standard errors of the mean over draws, those of loss_mse; the context has fewer frames and no less
        assert abs(losses[name] - wanted[name]) < 5 * per_draw.std() / math.sqrt(count), name


# -- perceptual loss --------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_hub(tmp_path):
    """torch's cache in an empty folder -> its folder of checkpoints."""
    before, folder = torch.hub._hub_dir, tmp_path / "hub"
    torch.hub.set_dir(folder)
    yield folder / "checkpoints"
    torch.hub._hub_dir = before


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A cache with random weights of VGG16 (features alone, the rest is 500 MB) and ResNet-50 -> folder."""
    from torchvision import models

    folder = tmp_path_factory.mktemp("hub")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(11)
    with torch.device("meta"):
        features = models.vgg16().features
    features = features.to_empty(device="cpu")
    for parameter in features.parameters():  # variance kept from layer to layer
        nn.init.normal_(parameter, std=math.sqrt(2 / parameter[0].numel()) if parameter.ndim > 1 else 0.1)
    weights = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(weights, folder / "checkpoints" / "vgg16-397923af.pth")
    net = models.resnet50()
    for name, value in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    torch.save(net.state_dict(), folder / "checkpoints" / "resnet50-11ad3fa6.pth")
    return folder


@pytest.fixture
def filled_hub(hub):
    before = torch.hub._hub_dir
    torch.hub.set_dir(hub)
    yield hub / "checkpoints"
    torch.hub._hub_dir = before


def test_perceptual_loss_is_refused_without_its_weights(empty_hub):
    """One line with the place, what puts the weights there, and the way around. A model for predictions alone does
    without them."""
    model = Cosmos(config(lambda_perceptual=0.1))
    told = one_line(model.train, kind=V.UsageError)
    assert f"not at {empty_hub / 'vgg16-397923af.pth'}" in told and told.startswith("lambda_perceptual: ")
    assert "models.get_model('vgg16', weights='DEFAULT')" in told and "--lambda_perceptual 0" in told
    assert model.eval()(noise(1, 2, 3, 32, 32), 1)[0].shape == (1, 1, 3, 32, 32)


def test_perceptual_loss_equals_torchvisions_own_features(filled_hub):
    """Mean squared distance at relu1_2, relu2_2, relu3_3 and relu4_3 of torchvision's vgg16, frames normalised as for
    ImageNet; its weights learn nothing and are in no checkpoint. Seen red without the normalisation."""
    from torchvision import models
    from torchvision.transforms.functional import normalize

    cfg = config(lambda_perceptual=0.5)
    model = stir(new_world(cfg))
    batch = batch_of(cfg, squares(cfg, 2))
    losses, _, _ = model(batch)
    with torch.device("meta"):
        features = models.vgg16().features
    weights = torch.load(filled_hub / "vgg16-397923af.pth", weights_only=True)
    features = features.to_empty(device="cpu").eval()
    features.load_state_dict({name.removeprefix("features."): value for name, value in weights.items()})
    with torch.no_grad():
        guess = model.paint(model.dynamics(model.encode(batch["frames"][:, :3]), 3)).flatten(0, 1)
        x, y = guess, batch["frames"][:, 3:].flatten(0, 1) / 255
        x, y = (normalize(each, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for each in (x, y))
        distances = [F.mse_loss(features[: end + 1](x), features[: end + 1](y)) for end in (3, 8, 15, 22)]
    assert losses["loss_perceptual"].item() == pytest.approx(float(sum(distances) / 4), rel=1e-4)
    assert losses["loss_total"].item() == pytest.approx(
        sum(getattr(cfg, f"lambda_{name[5:]}") * losses[name].item() for name in LOSSES), rel=1e-5
    )
    losses["loss_perceptual"].backward()
    assert model.decoder.unfold.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.critic[0].parameters())
    assert model.state_dict().keys() == new_world(config()).state_dict().keys()


# -- pretrained encoders ----------------------------------------------------------------------------------------------

PATCHES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
FAMILIES = ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT")


def write_dino(folder, family, seed=0):
    """A small random model of a family as transformers saves it -> the library's own model in eval mode."""
    transformers = pytest.importorskip("transformers")
    options = dict(patch_size=14, image_size=112, mlp_ratio=2)
    if family == "Dinov2WithRegisters":
        options.update(num_register_tokens=3)
    if family == "DINOv3ViT":
        options = dict(patch_size=16, image_size=64, intermediate_size=64, num_register_tokens=4)
    settings = getattr(transformers, f"{family}Config")(**PATCHES, **options)
    torch.manual_seed(seed)
    net = getattr(transformers, f"{family}Model")(settings)
    transformers.utils.logging.disable_progress_bar()
    net.save_pretrained(folder)
    return net.eval()


@pytest.fixture(scope="session")
def dinos(tmp_path_factory):
    """Folders of small random models -> {family: (folder, the library's model)}."""
    root = tmp_path_factory.mktemp("dinos")
    return {family: (root / family, write_dino(root / family, family, seed=4)) for family in FAMILIES}


def dino_config(folder, family="DINOv3ViT", **overrides):
    side = 64 if family == "DINOv3ViT" else 112
    return config(encoder=str(folder), image_size=side, **overrides)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dino_gives_its_patch_tokens_as_a_map(dinos, family):
    """The library's own last hidden state of frames normalised as for ImageNet, class and register tokens left out, row
    by row: a patch that is bright shows at its place. Seen red with one register token too few, and with rows and
    columns swapped."""
    folder, net = dinos[family]
    cfg = dino_config(folder, family)
    model, side, specials = new_world(cfg).eval(), cfg.height // net.config.patch_size, 1
    specials += getattr(net.config, "num_register_tokens", 0)
    assert same_weights(model.backbone.net.state_dict(), net.state_dict())
    frames, seen = noise(1, 2, 3, cfg.height, cfg.width), []
    model.backbone.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        latents = model.encode(frames)
        tokens = net(pixel_values=(frames[0].float() / 255 - mean) / std).last_hidden_state[:, specials:]
        dark = torch.zeros(1, 2, 3, cfg.height, cfg.width)
        patch = net.config.patch_size
        dark[0, 1, :, 2 * patch : 3 * patch, patch : 2 * patch] = 1  # row 2, column 1
        model.encode(dark)
    assert torch.allclose(seen[0][1], tokens.transpose(1, 2).reshape(2, 32, side, side), atol=1e-5)
    assert latents.shape == (1, 2, 16)
    black, bright = seen[1][1]
    assert (bright - black).square().sum(0).argmax() == 2 * side + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_a_trained_dino_learns(dinos, family):
    """Every parameter that asks for a gradient gets one in every step, as several ranks need, and what no frame reaches
    asks for none. In training a frame has the latent that it has in an evaluation. Seen red without the rule for the
    mask token, and with DINOv3 in train mode, where it stretches its positions at random."""
    cfg = dino_config(dinos[family][0], family)
    model = new_world(cfg)
    frames = noise(1, 2, 3, cfg.height, cfg.width)
    with torch.no_grad():
        assert torch.equal(model.encode(frames), model.eval().encode(frames))
    model.train()
    model(batch_of(cfg, noise(1, 6, 3, cfg.height, cfg.width)))[0]["loss_total"].backward()
    learning = {name for name in model.trained() if name.startswith("backbone.")}
    assert [name for name, p in model.trained().items() if p.grad is None] == []
    every = {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
    assert every - learning == {"backbone.net.embeddings.mask_token"}


def test_a_frozen_dino_stays_as_it_is(dinos):
    """It gets no gradient, stays in eval mode and out of the checkpoint, where its hash stands; the projection behind
    it learns."""
    cfg = dino_config(dinos["DINOv3ViT"][0], freeze_encoder=True)
    model = new_world(cfg)
    assert model.training and not any(module.training for module in model.backbone.modules())
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    projected = model.encoder.project.weight.detach().clone()
    train_steps(model, lambda step: [batch_of(cfg, noise(1, 6, 3, 64, 64), first=step)], 2)
    assert same_weights(before, model.backbone.state_dict()) and not torch.equal(
        projected, model.encoder.project.weight
    )
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.parameters())
    state = new_state(model)
    assert not any(name.startswith("backbone") for name in state["model"])
    assert any(name.startswith("encoder.project") for name in state["model"])
    assert V.frozen_hashes(model).keys() == {"backbone"}
    open_state = Cosmos(replace(cfg, freeze_encoder=False)).snapshot()["model"]
    assert any(name.startswith("backbone") for name in open_state)


def test_weights_of_another_encoder_are_refused(tmp_path, split):
    """A run with a frozen encoder goes on, and its checkpoint loads, with the very weights it was made with; another
    model in the same folder is told by its hash. Random weights of another seed would be others too."""
    folder, out_dir = tmp_path / "dino", tmp_path / "run"
    write_dino(folder, "DINOv3ViT", seed=1)
    cfg = dino_config(folder, freeze_encoder=True, data_root=str(split), out_dir=str(out_dir), steps=1, val_clips=2)
    assert V.train(cfg, world=Cosmos) == 0
    path, state = out_dir / "checkpoints" / "ckpt_final.pt", saved(out_dir)
    assert state["frozen"].keys() == {"backbone"} and not any(name.startswith("backbone") for name in state["model"])
    model, _ = V.load_model(path, world=Cosmos)
    assert V.frozen_hashes(model) == state["frozen"]
    write_dino(folder, "DINOv3ViT", seed=2)
    for call in (lambda: V.load_model(path, world=Cosmos), lambda: V.train(replace(cfg, steps=2), world=Cosmos)):
        assert "the frozen weights of backbone are others" in one_line(call, kind=V.UsageError)
    shutil.rmtree(folder)
    assert "encoder" in one_line(V.load_model, path, "cpu", Cosmos)


def test_random_weights_are_marked_and_repeat(tmp_path, split, dinos, capsys):
    """--random_weights needs no weights and no network, gives the same ones for the same seed, and says so in every log
    line. The seed of all else is not disturbed."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(dinos["DINOv3ViT"][0] / "config.json", folder)
    cfg = dino_config(folder, freeze_encoder=True, random_weights=True, data_root=str(split), steps=2, val_clips=2)
    one, two, three = new_world(cfg), new_world(cfg, seed=5), new_world(replace(cfg, seed=1))
    assert V.frozen_hashes(one) == V.frozen_hashes(two) != V.frozen_hashes(three)
    before = torch.get_rng_state()
    W.load_backbone(cfg)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one.encoder.project.weight, two.encoder.project.weight)
    cfg = replace(cfg, out_dir=str(tmp_path / "run"))
    assert V.train(cfg, world=Cosmos) == 0
    lines = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "step:" in line]
    assert len(lines) == 3 and all(re.match(r"(\S+ )*weights:random step:", line) for line in lines), lines
    assert saved(tmp_path / "run")["world"]["mark"] == "weights:random" and Cosmos(config()).mark == ""
    V.load_model(tmp_path / "run" / "checkpoints" / "ckpt_final.pt", world=Cosmos)


def test_encoders_that_cannot_be_had_are_refused(tmp_path, dinos, monkeypatch):
    """Each in one line that names the place and a way out. Seen red: a config.json that is a list, one of a model that
    is no DINO, weights of which half are missing, a file of weights cut short."""
    bare, junk = tmp_path / "bare", tmp_path / "junk"
    bare.mkdir(), junk.mkdir()
    shutil.copy(dinos["DINOv3ViT"][0] / "config.json", bare)
    told = one_line(lambda: Cosmos(dino_config(bare)), kind=V.UsageError)
    assert f"encoder {bare}: holds no *.safetensors" in told and "--random_weights is for tests" in told
    for content in (
        None,
        "[]",
        "{",
        '{"patch_size": 16}',
        '{"patch_size": 16, "model_type": "vit"}',
        '{"patch_size": "a"}',
    ):
        if content:
            (junk / "config.json").write_text(content)
        told = one_line(lambda: config(encoder=str(junk), image_size=64), kind=V.UsageError)
        assert f"encoder = '{junk}': " in told and "save_pretrained" in told and "(--encoder)" in told
    absent = str(tmp_path / "absent")
    assert "folder with the config.json" in one_line(lambda: config(encoder=absent), kind=V.UsageError)
    assert "begins from nothing (--freeze_encoder)" in one_line(lambda: config(freeze_encoder=True))
    assert "(--random_weights)" in one_line(lambda: config(random_weights=True))
    monkeypatch.setitem(sys.modules, "transformers", None)
    told = one_line(lambda: Cosmos(dino_config(dinos["DINOv3ViT"][0])), kind=V.UsageError)
    assert "needs the package transformers (pip install" in told


def test_damaged_weights_are_refused(tmp_path, dinos, empty_hub):
    """A file cut short, and one of which a tensor is missing: transformers would draw that one at random and go on."""
    from safetensors.torch import load_file, save_file

    for name, cut in (("short", 200), ("missing", 0)):
        folder = tmp_path / name
        shutil.copytree(dinos["DINOv3ViT"][0], folder)
        path = folder / "model.safetensors"
        if cut:
            path.write_bytes(path.read_bytes()[:cut])
        else:
            weights = load_file(path)
            weights.pop("embeddings.patch_embeddings.weight")
            save_file(weights, path, metadata={"format": "pt"})
        told = one_line(lambda: Cosmos(dino_config(folder)), kind=V.UsageError)  # noqa: B023
        assert f"encoder {folder}: " in told and "--random_weights is for tests" in told
    empty_hub.mkdir(parents=True)
    (empty_hub / "resnet50-11ad3fa6.pth").write_bytes(b"PK\3\4 cut short")
    told = one_line(lambda: Cosmos(config(encoder="resnet50", image_size=64)), kind=V.UsageError)
    assert told.startswith("encoder resnet50: its weights cannot be read (") and "--random_weights is for tests" in told


@pytest.mark.parametrize(
    ("family", "size", "fits"),
    [
        ("Dinov2", 64, False),
        ("Dinov2", 112, True),
        ("DINOv3ViT", 48, True),
        ("DINOv3ViT", 56, False),
        ("resnet50", 64, True),
        ("resnet50", 48, False),
        ("cnn", 48, True),
        ("cnn", (32, 40), False),
    ],
)
def test_admissible_sizes(dinos, family, size, fits):
    """Both the encoder's stride and the painter's divide the image; the refusal names both."""
    encoder = str(dinos[family][0]) if family in dinos else family
    if fits:
        config(encoder=encoder, image_size=size)
        return
    told = one_line(lambda: config(encoder=encoder, image_size=size), kind=V.UsageError)
    stride = {"Dinov2": 14, "resnet50": 32}.get(family, 16)
    assert "divisible by 16, the stride of the painter" in told and f"by {stride}, that of the encoder" in told
    assert "(--image_size)" in told


def test_resnet_is_refused_without_its_weights(empty_hub):
    told = one_line(lambda: Cosmos(config(encoder="resnet50", image_size=64)), kind=V.UsageError)
    assert f"not at {empty_hub / 'resnet50-11ad3fa6.pth'}" in told and "--random_weights is for tests" in told
    assert "models.get_model('resnet50', weights='DEFAULT')" in told and "--encoder names another" in told


def test_a_resnet_learns_with_the_statistics_it_came_with(filled_hub, monkeypatch):
    """Map and weights are torchvision's own. Trained, every parameter gets a gradient, its BatchNorms keep their
    statistics, and so several ranks may train it. Seen red without eval mode for BatchNorms."""
    from torchvision import models

    cfg = config(encoder="resnet50", image_size=64)
    monkeypatch.setattr(V, "wrap", lambda world, process: world)  # DDP needs a second process
    run = V.Run(cfg, cpu_process(world_size=2), None, None, V.DataSource("render", "", [], [], [], True))
    model = V.build_world(Cosmos, run)
    net = models.resnet50().eval()
    net.load_state_dict(torch.load(filled_hub / "resnet50-11ad3fa6.pth", weights_only=True))
    frames, seen = noise(1, 1, 3, 64, 64), []
    net.layer4.register_forward_hook(lambda _, args, out: seen.append(out))
    model.backbone.register_forward_hook(lambda _, args, out: seen.append(out))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        net((frames[0].float() / 255 - mean) / std)
        model.encode(frames)
    assert seen[0].shape == (1, 2048, 2, 2) and torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-4)
    buffers = {name: value.clone() for name, value in model.backbone.named_buffers()}
    assert model.training
    model(batch_of(cfg, noise(1, 6, 3, 64, 64)))[0]["loss_total"].backward()
    assert [name for name, p in model.trained().items() if p.grad is None] == []
    assert sum(name.startswith("backbone.") for name in model.trained()) == 159  # 161 of ResNet-50 less its head's two
    assert same_weights(buffers, dict(model.backbone.named_buffers()))
    assert not any(V.has_drifting_statistics(module) for module in model.modules())


# -- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "patience", "min_lr"), [(0, 1, 0.0), (7, 3, 1e-4)])
def test_plateau_follows_torchs_scheduler(warmup, patience, min_lr):
    """40 losses that fall, stay, rise and are NaN: after each evaluation the rate is that of ReduceLROnPlateau to
    float32, through a checkpoint in the middle as well. Seen red with the threshold left out."""
    options = dict(steps=400, warmup_steps=warmup, schedule="plateau", plateau_patience=patience, plateau_factor=0.4)
    cfg = config(lr=2e-3, min_lr=min_lr, val_every=10, **options)
    world = new_world(cfg)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=cfg.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.4, patience=patience, min_lr=min_lr)
    rng = np.random.default_rng(5)
    losses = np.exp(-np.minimum(np.arange(40), 15) / 8) + 0.05 * rng.random(40)
    losses[20], losses[6:12] = math.nan, losses[6] * (1 - 1.9e-5 * np.arange(6))  # new bests too small to count
    rates = []
    for number, loss in enumerate(losses):
        step = 10 * (number + 1)
        warm = min((step + 1) / warmup, 1.0) if warmup else 1.0
        assert world.lr(step, cfg.lr) == pytest.approx(warm * optimizer.param_groups[0]["lr"], rel=1e-6)
        world.after_validation({"val_loss_total": float(loss)})
        scheduler.step(float(loss))
        rates.append(optimizer.param_groups[0]["lr"])
        if number == 18:
            other = new_world(cfg, seed=3)
            other.restore({"model": {name: value.clone() for name, value in world.snapshot()["model"].items()}})
            world = other
    assert len(set(rates)) > 3 and (min(rates) == min_lr or not min_lr)


def test_the_state_of_the_plateau_is_in_the_checkpoint():
    world = new_world(config(schedule="plateau", val_every=1, plateau_patience=0, plateau_factor=0.5))
    assert world.snapshot()["model"]["plateau"].tolist() == [math.inf, 0, 1]
    for loss in (2.0, 3.0):
        world.after_validation({"val_loss_total": loss})
    assert world.snapshot()["model"]["plateau"].tolist() == [2.0, 0, 0.5]


def test_cosine_is_the_loops_own():
    """And figures of an evaluation do not move it."""
    cfg = config(steps=100, warmup_steps=5, min_lr=1e-5)
    world = new_world(cfg)
    for _ in range(30):
        world.after_validation({"val_loss_total": 1.0})
    assert all(world.lr(step, 3e-4) == V.lr_at(step, cfg, 3e-4) for step in range(100))


def test_a_plateau_needs_evaluations():
    """With val_every = 0 the rate would never fall, without a word."""
    assert "val_every = 0: " in one_line(lambda: config(schedule="plateau"), kind=V.UsageError)


# -- clips of videos --------------------------------------------------------------------------------------------------


def opened(cfg):
    """The DataSource of a config, as a run opens it."""
    return V.open_data(Cosmos, cfg, V.list_data(cfg, Cosmos.Dataset), True, lambda: None)


@pytest.mark.parametrize(
    ("frames", "fps", "fits"),
    [(12, 30, True), (13, 30, False), (6, 15, True), (7, 15, False), (12, 0, True), (13, 0, False)],
)
def test_a_video_shorter_than_its_clip_is_a_bad_file(split, frames, fps, fits):
    """12 frames at 30 per second hold a clip of exactly 0.4 s; a longer one is refused with both lengths, where frames
    repeated at the end would be learned as a world that stops. At fps 0 a clip spreads over the file. Seen red with
    the loop's own reader, and at fps 0."""
    cfg = small_frames(frames - 2, 2, clip_fps=fps, data_root=str(split))
    data = opened(cfg).dataset(cfg, "val")
    if fits:
        Cosmos.Dataset.read_one(cfg, data.videos[0])
        sample = data[0]
        assert sample["frames"].shape == (frames, 3, 32, 32) and sample["file"] >= 0 and sample["bad"] == []
        assert (sample["frames"][1:] != sample["frames"][:-1]).flatten(1).any(1).all()  # no frame twice
        return
    with pytest.raises(V.BadFile):  # nor is it all that is held out
        Cosmos.Dataset.read_one(cfg, data.videos[0])
    reason = dict(data[0]["bad"])[data.videos[0].name]
    assert "lasts 0.40 s, 12 frames at 30 per second" in reason and "now_frames and soon_frames" in reason
    assert f"a clip {frames / (fps or 30):.2f} s" in reason


def test_augmentation_is_for_training_alone(split):
    """With hflip some training clips are mirrored and none of the held-out ones; half of all draws leave
    the brightness as it is. That evaluations do so always is held above. Seen red with every clip dimmed."""
    plain = small_frames(3, 3, data_root=str(split), hflip=False)
    flipped, source = replace(plain, hflip=True), opened(plain)
    for stream, wanted in (("train", {True, False}), ("val", {False})):
        both = [source.dataset(cfg, stream) for cfg in (plain, flipped)]
        mirrored = set()
        for index in range(12):
            one, two = (data[index]["frames"] for data in both)
            mirrored.add(not torch.equal(one, two))
            assert torch.equal(one, two) or torch.equal(one.flip(-1), two)
        assert mirrored == wanted, stream
    cfg = replace(plain, brightness=0.3)
    bright = np.array([float(Cosmos.draw(cfg, "train", index)["bright"]) for index in range(1000)])
    assert 0.44 < (bright == 1).mean() < 0.56  # 500 of 1,000, deviation 16
    assert bright.min() == pytest.approx(0.7, abs=0.01) and bright.max() == pytest.approx(1.3, abs=0.01)


def test_draws_are_functions_of_seed_stream_and_index(split):
    """In any order, asked for again, and from another dataset. Seen red with one generator for all."""
    cfg = small_frames(6, 6, data_root=str(split), painted_frames=4, brightness=0.3)
    source = opened(cfg)
    one, two = source.dataset(cfg, "train"), source.dataset(cfg, "train")
    drawn = {index: one[index] for index in (0, 5, 3)}
    for index in (3, 0, 5):
        again = two[index]
        assert drawn[index].keys() == again.keys() and again.pop("bad") == []
        assert all(torch.equal(drawn[index][key], value) for key, value in again.items())
    keys = [(cfg, "train", 0), (cfg, "train", 1), (cfg, "val", 0), (replace(cfg, seed=7), "train", 0)]
    assert len({str(Cosmos.draw(*key)) for key in keys}) == 4


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamics", ["gru", "transformer"])
def test_sixty_steps_learn_a_batch(dynamics):
    """Of one square that crosses the frame: the squared error falls to an eighth at most, and below that
    of the best still picture, the mean of the future frames: it moves. Seen red with dynamics that do not learn."""
    cfg = config(dynamics=dynamics, lr=1e-2, base_channels=16, latent_dim=32, steps=60, warmup_steps=4)
    clip = np.full((1, 6, 3, 32, 32), 230, np.uint8)
    for frame in range(6):
        clip[:, frame, :, 4:16, 4 * frame : 4 * frame + 12] = 20
    batch = batch_of(cfg, torch.from_numpy(clip))
    future = batch["frames"][:, 3:] / 255
    still = float((future - future.mean(1, keepdim=True)).square().mean())
    history, _ = train_steps(new_world(cfg), lambda step: [batch], 60)
    assert history[-1]["loss_mse"] < min(still, history[0]["loss_mse"] / 8)


def run_config(split, out_dir, **overrides):
    base = dict(data_root=str(split), out_dir=str(out_dir), val_clips=2, lr=2e-3)
    return small_frames(5, 6, **{**base, **overrides})


@pytest.mark.slow
def test_an_interrupted_run_is_equal_to_the_bit(split, tmp_path, monkeypatch):
    """4 steps against 2 and 2, with dropout, augmentation, some frames painted and a plateau that has fallen: records,
    weights and the state of the schedule. Seen red with the plateau in plain numbers."""
    options = dict(
        dynamics="lstm", dropout=0.3, brightness=0.3, painted_frames=4, ckpt_every=3, val_every=1, num_workers=1
    )
    plateau = dict(schedule="plateau", plateau_patience=0, plateau_factor=0.5, lr=0.05, steps=4)
    whole, cut = (run_config(split, tmp_path / name, **options, **plateau) for name in ("whole", "cut"))
    assert V.train(whole, world=Cosmos) == 0
    stop_after_update(monkeypatch, lambda phase, step: step == 1)
    assert V.train(cut, world=Cosmos) == 75
    monkeypatch.undo()
    assert V.train(cut, world=Cosmos) == 0
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")
    one, two = (saved(tmp_path / name)["model"] for name in ("cut", "whole"))
    assert same_weights(one, two) and one["plateau"][2] < 1
    rows = [row for row in facts(tmp_path / "whole") if "loss_mse" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("preset", [*W.CosmosConfig.PRESETS, "base"])
def test_presets_resolve_and_tell_their_size(preset, dinos):
    """Each gives a config that holds all rules; describe() counts the parameters. The original's GRU model has 17.5 M,
    its transformer 21.8 M."""
    argv = ["--preset", preset, "--device", "cpu"]
    if preset == "cosmos_dino":
        assert "(--encoder)" in one_line(V.resolve_config, argv, Cosmos, kind=V.UsageError)
        argv += ["--encoder", str(dinos["Dinov2"][0])]
    cfg = V.resolve_config(argv, Cosmos)[0]
    V.validate_config(cfg)
    with torch.device("meta"):
        model = Cosmos(cfg)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    told = re.match(r"parameters: ([\d.]+) M \((.+)\), of which ([\d.]+) M learn$", model.describe()[0])
    assert float(told[1]) == pytest.approx(count, abs=0.006)
    assert sum(map(float, re.findall(r"([\d.]+) M", told[2]))) == pytest.approx(count, abs=0.02)
    assert count < {"cosmos_gru": 17.5, "cosmos_lstm": 21.8, "cosmos_transformer": 21.8, "cosmos_tiny": 6}.get(
        preset, 99
    )
    assert f"{cfg.now_frames} + {cfg.soon_frames} frames" in model.describe()[1]
    if preset == "cosmos_dino":
        assert cfg.freeze_encoder and cfg.has_attention and float(told[3]) < float(told[1])


# -- the command ------------------------------------------------------------------------------------------------------

FLAGS = [
    f"--{name}={value}"
    for name, value in {**SMALL, "now_frames": 5, "soon_frames": 6, "num_frames": 11, "val_clips": 2}.items()
]


def run_here(*argv):
    """A command line of the world in this process -> (exit code, all that it printed)."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = V.main([*FLAGS, *map(str, argv)], world=Cosmos)
    return code, output.getvalue()


def test_a_run_ends_with_a_picture_and_a_verdict(split, tmp_path):
    """Figures of an evaluation, a picture of the size of its clips, a status; again with more steps it goes on, and the
    best checkpoint predicts."""
    from PIL import Image

    argv = ["--data_root", split, "--out_dir", tmp_path, "--val_every", 1, "--best_by", "val_loss_mse"]
    code, output = run_here(*argv, "--steps", 2)
    assert code == 0, output
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 2)
    picture = Image.open(tmp_path / "rollout.png")
    assert picture.width > 5 * 96 and picture.height > 6 * 96  # three clips of two rows, as many frames as fit
    assert "squared error" in output and "skill" in output and "parameters: " in output
    last = facts(tmp_path)[-1]
    assert {f"val_{key}" for key in (*LOSSES, "loss_total", "still", "skill", "latent_std")} <= last.keys()
    assert last["val_skill"] == pytest.approx(1 - last["val_loss_mse"] / last["val_still"], rel=1e-5)
    code, output = run_here(*argv, "--steps", 3)
    assert code == 0 and "resumed from" in output and facts(tmp_path)[-1]["step"] == 3
    model, cfg = V.load_model(tmp_path / "checkpoints" / "ckpt_best.pt", world=Cosmos)
    assert not model.training and model(noise(1, 4, 3, 32, 32), 20)[0].shape == (1, 20, 3, 32, 32)


def test_wrong_command_lines_are_told_in_one_line(split, raw_videos, tmp_path):
    """Sizes that the strides do not divide, lengths that do not add up, a split without val/, a checkpoint of another
    world, videos all shorter than a clip: an exit code, and one line that says what to change."""
    from conftest import small_config
    from training import new_model

    other = tmp_path / "ckpt_final.pt"
    torch.save(new_state(new_model(small_config())), other)
    half = tmp_path / "half"
    shutil.copytree(split, half, symlinks=True)
    shutil.rmtree(half / "val")
    for argv, told in (
        (["--image_size", "72"], "image_size = 72: must be divisible by 16"),
        (["--num_frames", "12"], "num_frames = 12: must equal now + soon frames = 11 (--num_frames)"),
        (["--dynamics", "transformer", "--num_heads", "3"], "latent_dim = 16: must be divisible by 2 x num_heads = 6"),
        (["--dynamics", "rnn"], "dynamics = 'rnn'"),
        (["--painted_frames", "3"], "painted_frames = 3: must be even"),
        (["--data_root", half], "val"),
        (["--data_root", split, "--resume", other], "made by the world VJepaAutoV2"),
        (["--data_root", split, "--now_frames", 60, "--num_frames", 66], "frames at 30 per second"),
    ):
        code, output = run_here("--out_dir", tmp_path / "run", *argv)
        last = output.splitlines()[-1]
        assert code in (1, 2) and last.startswith("error: ") and told in last, output
        assert output.count("error: ") == 1 and "Traceback" not in output


@pytest.mark.slow
def test_the_real_commands(tmp_path):
    """Videos, their split, three steps, and on from there, each as typed."""
    kinds = ["--kinds", "pendulum,projectile", "--num_videos", 4, "--num_frames", 12]
    run_file(ROOT / "tools" / "make_videos.py", "--out", tmp_path / "raw", *kinds)
    run_file(ROOT / "tools" / "split_videos.py", "--input", tmp_path / "raw", "--output", tmp_path / "split")
    command = [WORLD, *FLAGS, "--data_root", tmp_path / "split", "--out_dir", tmp_path / "run"]
    run_file(*command, "--steps", 2)
    path = tmp_path / "run" / "checkpoints" / "ckpt_final.pt"
    output = run_file(*command, "--steps", 3, "--resume", path)
    assert "resumed from" in output and (tmp_path / "run" / "rollout.png").stat().st_size > 1000
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 3)
    code = f"import VJepa_AUTO_V2 as V; m, c = V.load_model({str(path)!r}); print(type(m).__name__, m.cfg.dynamics)"
    assert run_file("-c", code, cwd=tmp_path).split()[-2:] == ["Cosmos", "gru"]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["cnn", "DINOv3ViT"])
def test_two_ranks_are_one(split, tmp_path, dinos, encoder):
    """Under torchrun two gloo ranks at half the batch log the losses of one process, a trained DINO's as well. Without
    the temporal loss: where some frames are painted, each rank divides by its own number of neighbours."""
    more = ["--data_root", split, "--brightness", "0.3", "--min_lr", "0.0003", "--painted_frames", "4"]
    more += ["--lambda_temporal", "0"]
    if encoder != "cnn":
        more += ["--encoder", dinos[encoder][0], "--image_size", "64"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_file(WORLD, *FLAGS, *more, "--batch_size", "4", "--steps", "4", "--out_dir", tmp_path / "one")
    run_file(*ranks, WORLD, *FLAGS, *more, "--batch_size", "2", "--steps", "4", "--out_dir", tmp_path / "two")
    one, two = ([row["loss_total"] for row in facts(tmp_path / name) if "loss_total" in row] for name in ("one", "two"))
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-4)
    assert json.loads((tmp_path / "two" / "status.json").read_text())["state"] == "finished"
