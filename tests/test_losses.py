"""Sections 11, 18 and 21: every loss and gauge against a float64 reference, queue, EMA, schedules, clipping.

The references take the networks' own outputs (recorded by hooks) and do the arithmetic of the loss again in float64.
"""

import math

import numpy as np
import pytest
import torch
from conftest import V, plain_config, random_batch
from training import fill_space, new_model, new_phase, train_steps, watch

# fp32 means over a few thousand numbers of size 1 against float64: rounding stays below 1e-5 of the value
TIGHT = dict(rtol=1e-5, atol=1e-6)


def close(value, reference, **tolerance):
    torch.testing.assert_close(
        torch.as_tensor(value).detach().double(), torch.as_tensor(reference).detach().double(), **{**TIGHT, **tolerance}
    )


def targets_by_hand(model, batch):
    """Target encoder output, normalised per token over channels in float64 (biased variance, eps 1e-5)."""
    with torch.no_grad():
        raw = model.target(model.normalise(batch["frames"])).double()
    mean = raw.mean(-1, keepdim=True)
    return (raw - mean) / (((raw - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt()


# -- targets and gauges


def test_pixels_are_normalised_and_floats_taken_as_they_are():
    model = new_model(plain_config())
    frames = torch.zeros(1, 12, 3, 32, 32, dtype=torch.uint8)
    frames[:, :, 1] = 255
    clip = model.normalise(frames)
    for channel, value in enumerate((-0.485 / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225)):
        assert torch.allclose(clip[:, :, channel], torch.tensor(value), atol=1e-6)
    assert model.normalise(clip) is clip


def test_targets_are_normalised_over_channels():
    """LayerNorm without affine: each token has mean 0 and variance 1. Seen red without make_targets' LayerNorm."""
    cfg = plain_config()
    model, batch = new_model(cfg), random_batch(cfg, 2)
    torch.nn.init.normal_(model.target.trunk.norm.weight)  # a fresh encoder's own last norm would hide a missing one
    torch.nn.init.normal_(model.target.trunk.norm.bias)
    targets = model.make_targets(model.normalise(batch["frames"]))
    close(
        targets, targets_by_hand(model, batch), rtol=0, atol=1e-4
    )  # raw outputs near 0 leave few digits after the mean is taken off
    assert targets.mean(-1).abs().max() < 1e-5
    assert targets.dtype == torch.float32
    assert V.layer_norm(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_gauges_by_hand():
    """target_std, target_std_clips and effective_rank against numpy, and at values known without computing."""
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((3, 20, 6)) @ np.diag([3, 2, 1, 1, 0.5, 0.1])
    tensor = torch.from_numpy(targets).float()
    flat = targets.reshape(-1, 6)
    close(V.target_std(tensor), np.mean([flat[:, c].std(ddof=1) for c in range(6)]))
    close(V.target_std_clips(tensor), targets.std(0, ddof=1).mean())
    assert math.isnan(V.target_std_clips(tensor[:1]))
    singular = np.linalg.svd(flat - flat.mean(0), compute_uv=False)
    share = singular / singular.sum()
    close(V.effective_rank(tensor), np.exp(-(share * np.log(share)).sum()))
    line = torch.arange(24.0)[None, :, None] * torch.randn(6)
    close(
        V.effective_rank(line), 1.0, atol=1e-3
    )  # fp32 singular values of a rank-1 matrix are 1e-6 of the first, not 0
    corners = torch.cat([torch.eye(6), -torch.eye(6)])[None]
    close(V.effective_rank(corners), 6.0)
    assert V.effective_rank(torch.zeros(1, 10, 6)) == 1
    assert V.target_std(torch.ones(2, 5, 3)) == 0


# -- NOW and SOON


def test_now_loss_by_hand():
    """L1 on hidden tokens, mean of short and long and of all draws. Seen red with squares and summed families."""
    cfg = plain_config(mask_draws=2)
    model, batch = new_model(cfg), random_batch(cfg, 3)
    losses, _, _, seen = watch(model, batch)
    targets, errors = targets_by_hand(model, batch), []
    for call, (name, draw) in enumerate([("short", 0), ("short", 1), ("long", 0), ("long", 1)]):
        mask_idx = batch[f"mask_{name}"][:, draw]
        assert seen["predictor"][call][0][3] == ("short", "long").index(name)
        hidden = torch.stack([targets[b, mask_idx[b]] for b in range(3)])
        errors.append((seen["predictor"][call][1].double() - hidden).abs().mean())
    close(losses["loss_vjepa"], sum(errors) / 4)


def test_soon_loss_and_skill_by_hand():
    """L1 on SOON tokens, and the skill over the last NOW tubelet repeated. Seen red with the first one repeated."""
    cfg = plain_config(soon_frames=6, num_frames=14)
    model, batch = new_model(cfg), random_batch(cfg, 3)
    losses, gauges, carry, seen = watch(model, batch)
    targets = targets_by_hand(model, batch).view(3, 7, cfg.sites, cfg.enc_dim)
    soon = targets[:, 2:5]
    preds = seen["predictor"][-1][1].double().view_as(soon)
    close(losses["loss_soon"], (preds - soon).abs().mean())
    still = (targets[:, 1:2] - soon).abs().mean()
    close(gauges["persistence"], still)
    means = {name: float(value.detach()) for name, value in {**losses, **gauges}.items()}
    skill = model.figures([model.look(batch, carry)], means)["soon_skill"]
    close(skill, 1 - (preds - soon).abs().mean() / still, atol=1e-5)


def test_mask_draws_average_over_one_target_pass():
    """Two draws give the mean of the two single-draw losses, and the target encoder runs once.

    Seen red with the draw index fixed at 0 in now_loss.
    """
    cfg = plain_config(mask_draws=2)
    model, batch = new_model(cfg), random_batch(cfg, 2)
    calls = []
    hook = model.target.register_forward_hook(lambda *_: calls.append(1))
    both = model(batch)[0]["loss_vjepa"]
    hook.remove()
    assert len(calls) == 1
    single = new_model(plain_config(mask_draws=1))
    parts = []
    for draw in range(2):
        view = {
            key: value[:, draw : draw + 1] if key.startswith(("keep_", "mask_")) else value
            for key, value in batch.items()
        }
        parts.append(single(view)[0]["loss_vjepa"])
    assert parts[0] != parts[1]
    close(both, sum(parts) / 2)


# -- EVENTUALLY


def cosine_cross_entropy(outcome, keys, own, temperature):
    """InfoNCE in float64, row by row: own[i] is the row of keys that belongs to outcome i."""
    outcome, keys = outcome.detach().double(), keys.double()
    losses, hits = [], []
    for i, vector in enumerate(outcome):
        scores = torch.stack([vector @ key / (vector.norm() * key.norm()) for key in keys]) / temperature
        losses.append(-(scores[own[i]] - torch.logsumexp(scores, 0)))
        hits.append(float(scores.argmax() == own[i]))
    return sum(losses) / len(losses), sum(hits) / len(hits)


@pytest.mark.parametrize("outcome_target", ["mean", "delta"])
def test_eventually_loss_by_hand(outcome_target):
    """InfoNCE over the batch and the filled part of the queue alone. Seen red with the unfilled rows let in."""
    cfg = plain_config(outcome_target=outcome_target, outcome_queue=9)
    model, batch = new_model(cfg), random_batch(cfg, 3)
    generator = torch.Generator().manual_seed(0)
    model.queue.copy_(torch.randn(9, cfg.enc_dim, generator=generator))
    model.queue_filled.fill_(4)
    losses, gauges, carry, seen = watch(model, batch)
    targets = targets_by_hand(model, batch)
    key = targets[:, cfg.now_tokens + cfg.soon_tokens :].mean(1)
    if outcome_target == "delta":
        key = key - targets[:, : cfg.now_tokens].mean(1)
    close(carry["key"], key, atol=1e-5)
    loss, top1 = cosine_cross_entropy(
        seen["outcome"][0][1], torch.cat([key, model.queue[:4].double()]), range(3), cfg.outcome_temperature
    )
    close(losses["loss_eventually"], loss, rtol=1e-4)
    assert float(gauges["outcome_top1"]) == pytest.approx(top1)


def test_batch_of_one_learns_from_the_queue():
    """One clip without a queue has loss 0 and nothing to learn; past keys make it a real loss with a gradient.

    Seen red with the queue left out of the keys.
    """
    cfg = plain_config(lambda_vjepa=0.0, lambda_soon=0.0, lambda_flow=0.0, lambda_eventually=1.0)
    model, batch = new_model(cfg), random_batch(cfg, 1)
    losses, _, carry = model(batch)
    assert float(losses["loss_eventually"].detach()) == 0
    model.absorb([{"key": torch.randn(6, cfg.enc_dim)}])
    losses, _, _ = model(batch)
    assert float(losses["loss_eventually"].detach()) > 0.1
    losses["loss_total"].backward()
    assert model.outcome.queries.grad.abs().sum() > 0
    assert model.online.tokenizer.proj.weight.grad.abs().sum() > 0


def test_queue_is_first_in_first_out():
    """Newest key first, oldest dropped at the end. Seen red with the oldest keys kept (old rows before new ones)."""
    cfg = plain_config(outcome_queue=5, lambda_flow=0.0)
    model, history, number = new_model(cfg), [], 0
    for count in (2, 2, 2, 1, 7):
        keys = torch.arange(number, number + count).float()[:, None].expand(-1, cfg.enc_dim)
        number += count
        history += keys[:, 0].tolist()
        model.absorb([{"key": keys}])
        held = min(len(history), 5)
        assert int(model.queue_filled) == held
        assert model.queue[:held, 0].tolist() == history[::-1][:held]
    model.absorb([{"key": torch.full((1, cfg.enc_dim), 100.0)}, {"key": torch.full((1, cfg.enc_dim), 101.0)}])
    assert model.queue[:3, 0].tolist() == [101, 100, 13]


def test_no_queue():
    """outcome_queue 0 leaves in-batch negatives alone."""
    cfg = plain_config(outcome_queue=0)
    model, batch = new_model(cfg), random_batch(cfg, 3)
    losses, _, carry, seen = watch(model, batch)
    loss, _ = cosine_cross_entropy(seen["outcome"][0][1], carry["key"], range(3), cfg.outcome_temperature)
    close(losses["loss_eventually"], loss, rtol=1e-4)
    model.absorb([carry])
    assert model.queue.shape == (0, cfg.enc_dim)


# -- supervised contrast


def supcon_by_hand(outcome, maneuver, file, temperature):
    """SupCon (L_out) in float64 with explicit loops over anchors; anchors without a positive do not count."""
    z = outcome.detach().double()
    z = z / z.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if file[j] != file[i] and maneuver[j] >= 0]
        positives = [j for j in others if maneuver[i] >= 0 and maneuver[j] == maneuver[i]]
        if positives:
            denominator = sum(math.exp(z[i] @ z[j] / temperature) for j in others)
            losses.append(
                -sum(math.log(math.exp(z[i] @ z[p] / temperature) / denominator) for p in positives) / len(positives)
            )
    return sum(losses) / len(losses) if losses else 0.0


def test_supcon_by_hand():
    """Positives share a maneuver and come from other files; unknown ones take no part. Seen red: same-file pairs."""
    cfg = plain_config(lambda_supcon=0.7)
    model, batch = new_model(cfg), random_batch(cfg, 6)
    batch["maneuver"], batch["file"] = torch.tensor([0, 0, 1, 0, -1, 2]), torch.tensor([0, 1, 2, 0, 3, 4])
    losses, _, _, seen = watch(model, batch)
    reference = supcon_by_hand(seen["outcome"][0][1], [0, 0, 1, 0, -1, 2], [0, 1, 2, 0, 3, 4], cfg.supcon_temperature)
    assert reference > 0
    close(losses["loss_supcon"], reference, rtol=1e-4)


@pytest.mark.parametrize("maneuver, file", [([-1, -1, -1], [0, 1, 2]), ([0, 0, 0], [5, 5, 5]), ([0, 1, 2], [0, 1, 2])])
def test_supcon_without_positives_is_zero(maneuver, file):
    """No labels, one file, or no two alike: exactly 0 and a finite (zero) gradient."""
    outcome = torch.randn(3, 8, requires_grad=True)
    labels, files = torch.tensor(maneuver), torch.tensor(file)
    loss = V.sup_con(outcome, outcome.detach(), labels, labels, files, files, 0.1)
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(outcome.grad, torch.zeros_like(outcome))


# -- FLOW


def test_flow_loss_by_hand():
    """Velocity error in residual space, cut at 1 - tau = 0.05, plus the read-out's error.

    Seen red with the forecast not taken off, with the scale left out, and with the cut at 0.01.
    """
    cfg = plain_config(num_frames=18, eventually_frames=10)  # 5 tubelets in 2 chunks of 3 and 2
    model, batch = new_model(cfg), random_batch(cfg, 3)
    fill_space(model)
    torch.nn.init.normal_(model.flow.out.weight, std=0.1)
    batch["tau"][0] = torch.tensor([0.99, 0.5, 0.01])
    losses, _, carry, seen = watch(model, batch)
    targets = targets_by_hand(model, batch)
    late = targets[:, cfg.now_tokens + cfg.soon_tokens :].view(3, 5, cfg.sites, cfg.enc_dim)
    future = torch.cat(
        [
            targets[:, cfg.now_tokens : cfg.now_tokens + cfg.soon_tokens],
            late[:, :3].mean((1, 2))[:, None],
            late[:, 3:].mean((1, 2))[:, None],
        ],
        1,
    )
    (context, _, _, _), preds = seen["predictor"][-1]
    chunks = context.double().mean(1) @ model.read_out.weight.double().T + model.read_out.bias.double()
    residual = future - torch.cat([preds.double(), chunks.view(3, 2, -1)], 1)
    rows = (residual / model.space.variance.double().sqrt()).reshape(3, -1)
    y = (rows - model.space.mean[0].double()) @ model.space.basis.double() / model.space.scale.double()
    tau = batch["tau"].double()
    x_tau = (1 - tau)[:, :, None] * batch["noise"][:, :, 0].double() + tau[:, :, None] * y[:, None]
    close(seen["flow"][0][0][0][:, :, 0], x_tau, atol=1e-4)
    error = (seen["flow"][0][1][:, :, 0].double() - y[:, None]) / (1 - tau).clamp(min=0.05)[:, :, None]
    close(
        losses["loss_flow"], (error**2).mean() + (residual[:, -2:] ** 2).mean(), rtol=1e-4
    )  # 1 / 0.05 squared enlarges rounding 400 times
    close(carry["square"], (residual**2).mean((0, 1)))
    close(carry["rows"][:, 0], rows, atol=1e-5)


def test_total_is_the_weighted_sum():
    """loss_total = sum of lambda * loss. Seen red with one lambda used for all."""
    cfg = plain_config(lambda_vjepa=0.3, lambda_soon=0.7, lambda_eventually=0.11, lambda_flow=1.9, lambda_supcon=0.5)
    model, batch = new_model(cfg), random_batch(cfg, 3)
    batch["maneuver"] = torch.zeros_like(batch["maneuver"])
    fill_space(model)
    losses = model(batch)[0]
    parts = [(0.3, "vjepa"), (0.7, "soon"), (0.11, "eventually"), (1.9, "flow"), (0.5, "supcon")]
    assert all(losses[f"loss_{name}"] > 0 for _, name in parts)
    close(losses["loss_total"], sum(weight * losses[f"loss_{name}"].double() for weight, name in parts))


# -- EMA


def test_ema_follows_the_closed_form():
    """After updates with momenta m_i towards a moving online net, every parameter equals the closed form, in fp32.

    Seen red with m and 1 - m exchanged, and with the norms left out.
    """
    cfg = plain_config()
    model = new_model(cfg)
    pairs = ((model.target, model.online), (model.flow_ema, model.flow))
    expected = [[p.detach().double().clone() for p in slow.parameters()] for slow, _ in pairs]
    generator = torch.Generator().manual_seed(0)
    for momentum, flow_momentum in [(0.9, 0.1), (0.99, 0.5), (0.5, 0.999), (1.0, 0.0)]:
        for _, fast in pairs:
            for parameter in fast.parameters():
                parameter.data += torch.randn(parameter.shape, generator=generator)
        model.update_ema(momentum, flow_momentum)
        for values, (_, fast), m in zip(expected, pairs, (momentum, flow_momentum)):
            for value, parameter in zip(values, fast.parameters()):
                value.mul_(m).add_((1 - m) * parameter.detach().double())
    for values, (slow, _) in zip(expected, pairs):
        for value, (name, parameter) in zip(values, slow.named_parameters()):
            assert parameter.dtype == torch.float32
            torch.testing.assert_close(
                parameter.double(), value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )  # fp32 lerps
    # constant online net: n updates leave m^n of the way
    start = [p.clone() for p in model.target.parameters()]
    for _ in range(20):
        model.update_ema(0.9, 0.9)
    for first, slow, fast in zip(start, model.target.parameters(), model.online.parameters()):
        torch.testing.assert_close(slow, fast + 0.9**20 * (first - fast), rtol=1e-4, atol=1e-5)  # 20 roundings


def test_apply_step_uses_the_scheduled_momenta():
    """One whole step moves the target by exactly 1 - ema_momentum_at(step) of the new online weights."""
    cfg = plain_config(ema_momentum=0.8, ema_momentum_end=1.0, lr=1e-2, warmup_steps=0)
    model, batch = new_model(cfg), random_batch(cfg, 2)
    for _ in range(2):
        before = model.target.tokenizer.proj.weight.clone()
        train_steps(model, lambda step: [batch], 1)  # always step 0
        after = model.target.tokenizer.proj.weight
        torch.testing.assert_close(after, 0.8 * before + 0.2 * model.online.tokenizer.proj.weight, rtol=1e-5, atol=1e-7)
    assert not torch.equal(before, after)


# -- schedules and clipping


@pytest.mark.parametrize("steps, warmup_steps", [(100, 2000), (100, 5), (1000, 2000), (7, 2000), (2, 0), (1, 10)])
def test_learning_rate_schedule(steps, warmup_steps):
    """Warm-up capped at a tenth of the run, peak once, then down to min_lr at the last step. Pure in the step."""
    cfg = plain_config(steps=steps, warmup_steps=warmup_steps, lr=1e-3, min_lr=1e-5)
    rates = [V.lr_at(step, cfg, cfg.lr) for step in range(steps)]
    warmup = min(warmup_steps, steps // 10)
    assert cfg.warmup == warmup
    for step in range(warmup):
        assert rates[step] == pytest.approx(1e-3 * (step + 1) / warmup)
    assert rates[warmup] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in zip(rates[warmup:], rates[warmup + 1 :]))
    if steps > 1:
        assert rates[-1] == pytest.approx(1e-5)
        middle = warmup + (steps - 1 - warmup) / 2
        if middle == int(middle):
            assert rates[int(middle)] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates == [V.lr_at(step, cfg, cfg.lr) for step in range(steps)]
    for step in range(steps):
        assert V.lr_at(step, cfg, 5e-4) == pytest.approx(rates[step] / 2)  # every group at the same ratio


def test_ema_schedules():
    """Constant without an end value, linear to it at the last step; the flow EMA starts short and is capped."""
    constant = plain_config(steps=50, ema_momentum=0.97)
    assert {V.ema_momentum_at(step, constant) for step in range(50)} == {0.97}
    rising = plain_config(steps=51, ema_momentum=0.9, ema_momentum_end=1.0)
    values = [V.ema_momentum_at(step, rising) for step in range(51)]
    assert values[0] == 0.9 and values[25] == pytest.approx(0.95) and values[50] == pytest.approx(1.0)
    assert values == sorted(values)
    flow = [V.flow_momentum_at(step, plain_config(flow_ema=0.99)) for step in range(3000)]
    assert flow[0] == pytest.approx(0.1) and flow == sorted(flow) and flow[-1] == 0.99
    assert V.ema_momentum_at(0, plain_config(steps=1)) == 0.996


def test_clip_gradients_clips_the_two_sides_apart():
    """A huge flow gradient leaves the world model's alone, and the other way round; norms are those before clipping.

    Seen red with one norm over both sides.
    """
    cfg = plain_config(grad_clip=1.0)
    for big, small in ((True, False), (False, True)):
        model = new_model(cfg)
        optimizer = model.optimizer()
        generator = torch.Generator().manual_seed(0)
        sides = {False: [], True: []}
        for group in optimizer.param_groups:
            sides[group["name"] == "flow"] += group["params"]
        for side, parameters in sides.items():
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            norm = torch.cat([p.grad.flatten() for p in parameters]).double().norm()
            for parameter in parameters:
                parameter.grad *= (1000.0 if side == big else 0.5) / norm
        before = [p.grad.clone() for p in sides[small]]
        norms, key = V.clip_gradients(optimizer, cfg), {False: "grad_norm", True: "flow_grad_norm"}
        close(norms[key[big]], 1000.0, rtol=1e-4)
        close(norms[key[small]], 0.5, rtol=1e-4)
        assert all(torch.equal(p.grad, old) for p, old in zip(sides[small], before))
        close(torch.cat([p.grad.flatten() for p in sides[big]]).norm(), 1.0, rtol=1e-4)
    untouched = plain_config(grad_clip=0.0)
    sides[False][0].grad = torch.full_like(sides[False][0], 1e6)
    V.clip_gradients(optimizer, untouched)
    assert (sides[False][0].grad == 1e6).all()


def test_steps_use_the_clipped_gradient():
    """take_step leaves both sides at or below grad_clip and reports the norms before."""
    cfg = plain_config(grad_clip=0.01)
    model, batch = new_model(cfg), random_batch(cfg, 2)
    fill_space(model)
    phase = new_phase(model)
    optimizer = phase.optimizer
    metrics, _, finite = V.take_step(phase, [batch], 0)
    assert finite and metrics["grad_norm"] > 0.02 and metrics["flow_grad_norm"] > 0.02
    for flow in (False, True):
        grads = [
            p.grad.flatten()
            for group in optimizer.param_groups
            if (group["name"] == "flow") == flow
            for p in group["params"]
        ]
        close(torch.cat(grads).norm(), 0.01, rtol=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [
        V.lr_at(0, cfg, group["peak_lr"]) for group in optimizer.param_groups
    ]
