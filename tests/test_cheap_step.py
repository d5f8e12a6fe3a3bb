"""What makes a step cheaper, each setting beside its plain form: what predicted tokens read, a share of them, one mask
family per clip, windows of the target, and visible pixels alone tokenised."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import V, plain_config, random_batch, small_config
from training import new_model

CLOSE = dict(rtol=1e-4, atol=1e-5)  # fp32 products of other sizes, summed in another order


def stirred(net):
    """A net whose attention is far from uniform, so that what a token reads matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in net.trunk.blocks:
            for linear in (block.attn.qkv, block.attn.proj):
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 0.2)
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return net


def predictor_of(attention, **overrides):
    return stirred(V.Predictor(small_config(pred_attention=attention, **overrides)))


def asked(cfg, family, num_holes=None):
    """Arguments of a predictor for two clips: context, places of both, family, and actions where there are any."""
    idx = torch.stack([torch.randperm(cfg.num_tokens) for _ in range(2)])
    keep, mask, told = idx[:, :30].sort(1)[0], idx[:, 30:].sort(1)[0][:, :num_holes], ()
    if family == V.SOON:
        places = torch.arange(cfg.now_tokens + cfg.soon_tokens).expand(2, -1)
        keep, mask = places.tensor_split((cfg.now_tokens,), 1)
        if cfg.action_names:
            told = torch.randn(2, cfg.future_tubelets[1], 1), torch.tensor([False, True])
    return torch.randn(2, keep.shape[1], cfg.enc_dim), keep, mask, family, *told


def attend_to(attn, x, context, ropes):
    """Attention of tokens to a context alone, in plain formulas: nn.Linear, softmax of scores."""
    q, _, _ = V.split_heads(attn.qkv(x), 3, attn.num_heads)
    _, k, v = V.split_heads(attn.qkv(context), 3, attn.num_heads)
    if ropes[0] is not None:
        q, k = V.rotate(q, *ropes[0]), V.rotate(k, *ropes[1])
    scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
    return attn.proj((scores @ v).transpose(1, 2).flatten(2))


def plain_predictions(net, context, keep, mask, family, actions=None, passive=None):
    """What a predictor of form context or cross says, by plain formulas."""
    seen, holes = net.embed(context), net.mask_tokens[family].expand(*mask.shape, -1)
    if family == V.SOON and net.from_last:
        holes = holes + seen[:, -net.sites :].repeat(1, mask.shape[1] // net.sites, 1)
    if actions is not None:
        tokens = net.actions(actions, passive)
        holes = holes + tokens.repeat_interleave(net.sites, 1)
        seen, keep = torch.cat([seen, tokens], 1), torch.cat([keep, mask[:, net.sites // 2 :: net.sites]], 1)
    seen, holes = net.position.add(seen, keep), net.position.add(holes, mask)
    ropes = net.position.rope(mask), net.position.rope(keep)
    for block in net.trunk.blocks:
        read = block.norm1(seen)
        holes = holes + attend_to(block.attn, block.norm1(holes), read, ropes)
        holes = holes + block.mlp(block.norm2(holes))
        if net.attention == "context":
            seen = seen + attend_to(block.attn, read, read, (ropes[1], ropes[1]))
            seen = seen + block.mlp(block.norm2(seen))
    return net.out(net.trunk.norm(holes))


FORMS = ("context", "cross")
CASES = [*itertools.product(FORMS, ("sincos", "rope"), (0, 2), ("none",)), ("cross", "sincos", 2, "steer")]


@pytest.mark.parametrize(["form", "pos_embed", "family", "actions"], [*CASES, ("context", "rope", 2, "steer")])
def test_predictor_that_reads_the_context_is_its_plain_form(form, pos_embed, family, actions):
    """Predictions and gradients. Seen red with the holes' own keys, and with the ropes of queries for keys."""
    torch.manual_seed(0)
    net = predictor_of(form, pos_embed=pos_embed, actions=actions)
    args, results = asked(small_config(actions=actions), family), []
    for call in (net, lambda *values: plain_predictions(net, *values)):
        net.zero_grad()
        preds = call(*args)
        preds.square().sum().backward()
        results.append((preds, [p.grad for p in net.parameters() if p.grad is not None]))
    (preds, grads), (plain, plain_grads) = results
    torch.testing.assert_close(preds, plain, **CLOSE)
    torch.testing.assert_close(grads, plain_grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["full", *FORMS])
def test_a_prediction_hangs_on_no_other_one_but_in_the_full_form(form):
    """So that a share of the holes is an unbiased part of the loss. Full attention is another function."""
    torch.manual_seed(0)
    net = predictor_of(form)
    context, keep, mask, family = asked(small_config(), 1)
    few = mask[:, ::3]
    gap = (net(context, keep, few, family) - net(context, keep, mask, family)[:, ::3]).abs().max()
    assert (gap > 0.01) if form == "full" else (gap < 1e-4), gap


def test_all_forms_have_the_same_weights():
    nets = [V.Predictor(small_config(pred_attention=form)).state_dict() for form in ("full", *FORMS)]
    assert all({k: v.shape for k, v in net.items()} == {k: v.shape for k, v in nets[0].items()} for net in nets)


def test_a_share_of_the_hidden_tokens_is_drawn_evenly():
    """Right count, in order, all hidden, each as often as any other; nothing else is drawn otherwise. Seen red with
    the first quarter, and with the share drawn before the noise."""
    plain, counts = plain_config(mask_draws=2, actions="steer"), {}
    cfg = replace(plain, pred_share=0.25)
    for index in range(400):
        few, whole = V.mask_and_noise(cfg, "train", index), V.mask_and_noise(plain, "train", index)
        for name, value in whole.items():
            if not name.startswith("mask_"):
                assert torch.equal(few[name], value)
                continue
            assert few[name].shape == (2, round(value.shape[1] / 4)) and (few[name].diff(dim=1) > 0).all()
            for some, others in zip(few[name].tolist(), value.tolist()):
                assert set(some) <= set(others)
                found = counts.setdefault(name, np.zeros(len(others)))
                found[[others.index(place) for place in some]] += 1
    for found in counts.values():
        chi2 = ((found - found.mean()) ** 2 / found.mean()).sum()  # places of a draw exclude each other: below 1 each
        assert chi2 < len(found) + 4 * (2 * len(found)) ** 0.5
    assert len(V.mask_and_noise(replace(plain, pred_share=0.001), "train", 0)["mask_long"][0]) == 1


@pytest.mark.parametrize("num_clips", [4, 3, 1])
def test_one_family_per_clip_is_both_on_halves(num_clips):
    """The first half has short masks, the rest long ones; a single clip has both. Seen red with halves swapped."""
    cfg = plain_config(mask_draws=2)
    model, batch = new_model(cfg), random_batch(cfg, num_clips)
    pieces = model.online.tokenizer.cut(model.normalise(batch["frames"]))
    targets = model.targets_of(batch)
    half, losses = (num_clips + 1) // 2, []
    parts = [slice(half), slice(half, None)] if num_clips > 1 else [slice(None)] * 2
    for family, part in zip(V.MASK_FAMILIES, parts):
        idx = V.MASK_FAMILIES.index(family)
        for draw in range(2):
            keep, mask = (batch[f"{kind}_{family}"][part, draw] for kind in ("keep", "mask"))
            preds = model.predictor(model.online.encode(pieces[part], keep), keep, mask, idx)
            losses.append(V.l1_loss(preds, V.gather_tokens(targets[part], mask)))
    model.cfg = replace(cfg, mask_families="one")
    torch.testing.assert_close(model.now_loss(pieces, targets, batch), torch.stack(losses).mean())


@pytest.mark.parametrize("pos_embed", ["sincos", "rope"])
def test_windows_of_the_target_are_encoded_by_themselves(pos_embed):
    """Each as the encoder says of its tokens alone, at their own places. Seen red with windows a tubelet early, and
    with rotary places that begin anew."""
    cfg = small_config(pos_embed=pos_embed, eventually_frames=10, num_frames=18, target_window=3)
    assert cfg.window_starts == (4, 6)
    model = new_model(cfg)
    stirred(model.target)
    clip = torch.randn(2, cfg.num_frames, 3, cfg.height, cfg.width)
    targets, pieces = model.make_targets(clip), model.target.tokenizer.cut(clip)
    places = torch.arange(cfg.num_tokens).expand(2, -1).split([4 * cfg.sites, 2 * cfg.sites, 3 * cfg.sites], 1)
    alone = torch.cat([V.layer_norm(model.target.encode(pieces, part)) for part in places], 1)
    torch.testing.assert_close(targets, alone, **CLOSE)
    short = model.make_targets(clip[:, :10])  # a clip that ends earlier: the last window is cut
    torch.testing.assert_close(short[:, : 4 * cfg.sites], targets[:, : 4 * cfg.sites], **CLOSE)
    assert short.shape[1] == 5 * cfg.sites
    model.cfg = replace(cfg, target_window=0)
    assert (model.make_targets(clip) - targets).abs().max() > 0.1


def test_a_window_sees_no_other():
    """SOON's targets know nothing of EVENTUALLY, nor one window of the next."""
    cfg = small_config(eventually_frames=8, num_frames=16, target_window=2)
    model = new_model(cfg)
    stirred(model.target)
    clip = torch.randn(1, cfg.num_frames, 3, cfg.height, cfg.width)
    other = clip.clone()
    other[:, 14:] += 1.0  # the last tubelet
    moved = (model.make_targets(other) - model.make_targets(clip)).abs().amax(2)[0].unflatten(0, (8, -1)).amax(1)
    assert (moved[:6] == 0).all() and (moved[6:] > 0).all()


def test_windows_are_as_equal_as_can_be():
    assert small_config(target_window=8).window_starts == (4,)  # two tubelets of EVENTUALLY: one window
    assert small_config(target_window=1).window_starts == (4, 5)
    assert small_config(target_window=4, eventually_frames=12, num_frames=20).window_starts == (4, 7)
    assert small_config(target_window=0).window_starts == ()
    assert V.VJepaAutoV2Config(target_window=8).window_starts == (10, 18, 26, 34)


def test_visible_pixels_alone_are_tokenised():
    """The same tokens as of the whole clip, and no product over more pixels than are seen."""
    cfg = small_config()
    encoder = V.Encoder(cfg)
    pieces = torch.randn(2, cfg.num_tokens, 3 * cfg.tubelet_t * cfg.patch**2)
    keep = torch.tensor([[0, 5, 17, 95], [3, 40, 41, 94]])
    whole = encoder.position.add(V.gather_tokens(encoder.tokenizer.embed(pieces), keep), keep)
    torch.testing.assert_close(encoder.encode(pieces, keep), encoder.trunk(whole), **CLOSE)
    seen, embed = [], encoder.tokenizer.embed
    encoder.tokenizer.embed = lambda some: seen.append(some.shape) or embed(some)
    encoder.encode(pieces, keep)
    assert [tuple(shape[:2]) for shape in seen] == [(2, 4)]


def test_flop_of_the_cheap_forms_by_hand():
    """One predictor block: three tokens seen and two predicted, width 24, MLP four times as wide."""
    cfg, products = plain_config(), 24 * 24
    for form, factor in (
        ("full", 5 * 24 * products + 4 * 25 * 24),
        ("context", 3 * 24 * products + 2 * 20 * products + 4 * (9 + 6) * 24),
        ("cross", 3 * 4 * products + 2 * 20 * products + 4 * 6 * 24),
    ):
        assert V.predictor_flops(replace(cfg, pred_attention=form), 3, 2) == factor
    one = replace(cfg, mask_families="one", pred_share=0.25)
    assert [times for times, _, _ in V.now_passes(one)] == [0.5, 0.5]
    assert all(few == round((cfg.num_tokens - seen) / 4) for _, seen, few in V.now_passes(one))
    assert [times for times, _, _ in V.now_passes(replace(one, batch_size=1))] == [1, 1]


@pytest.mark.parametrize("window", [0, 4])
def test_targets_of_some_tubelets_are_those_of_a_clip_of_these(window):
    """At their own places, each standing for its stretch. Seen red with the places of tubelets on end."""
    cfg = small_config(eventually_frames=16, num_frames=24, eventually_stride=3, target_window=window)
    assert [list(part) for part in cfg.stretches] == ([[4, 5, 6], [7], [8, 9, 10], [11]] if window else
                                                      [[4, 5, 6], [7, 8, 9], [10, 11]])  # fmt: skip
    model, batch = new_model(cfg), random_batch(cfg, 2)
    stirred(model.target)
    held = batch["tubelets"]
    assert held.shape == (2, 4 + len(cfg.stretches))
    targets = model.make_targets(model.pieces_of(batch["frames"]), held).unflatten(1, (12, -1))
    pieces = model.target.tokenizer.cut(model.normalise(batch["frames"]))
    places = (held[:, :, None] * cfg.sites + torch.arange(cfg.sites)).split([4, 2, 2] if window else [7], 1)
    encoded = torch.cat([V.layer_norm(model.target.encode(pieces, part.flatten(1))) for part in places], 1)
    for place, values in enumerate(encoded.unflatten(1, (-1, cfg.sites)).unbind(1)):
        for stands_for in [place] if place < 4 else cfg.stretches[place - 4]:
            torch.testing.assert_close(targets[:, stands_for], values, **CLOSE)


def test_latents_for_a_flow_phase_are_of_whole_clips():
    """Seen red with the tubelets of the training step."""
    cfg = small_config(eventually_frames=8, num_frames=16)
    model, batch = new_model(cfg), random_batch(cfg, 2)
    assert cfg.eventually_stride > 1 and "tubelets" in batch
    torch.testing.assert_close(model.targets_of(batch), model.make_targets(model.normalise(batch["frames"])), **CLOSE)


def test_masks_keep_to_the_tubelets_that_are_there():
    """Training clips alone; every tubelet of a stretch is drawn; masks hide the same sites as without. Seen red with
    the first tubelet of each stretch."""
    cfg, found = small_config(eventually_frames=12, num_frames=20, eventually_stride=3, pred_share=0.5), set()
    plain = replace(cfg, eventually_stride=1, pred_share=1.0)
    for index in range(40):
        few, whole = V.mask_and_noise(cfg, "train", index), V.mask_and_noise(plain, "train", index)
        found |= set(few["tubelets"][4:].tolist())
        for family in V.MASK_FAMILIES:
            for kind in ("keep", "mask"):
                places = few[f"{kind}_{family}"][0]
                assert set((places // cfg.sites).tolist()) <= set(few["tubelets"].tolist())
                assert set(places.tolist()) <= set(whole[f"{kind}_{family}"][0].tolist())
            assert len(few[f"keep_{family}"][0]) == V.family_visible(cfg, family) * 6
    assert found == set(range(4, 10))
    assert "tubelets" not in V.mask_and_noise(cfg, "val", 0) | V.mask_and_noise(plain, "train", 0)


def test_a_stride_of_one_is_the_plain_form():
    """All tubelets, drawn by the same code: targets and losses are the plain ones."""
    cfg = small_config(target_window=1)
    model, batch = new_model(cfg), random_batch(cfg, 2)
    everything = torch.arange(cfg.grid[0]).expand(2, -1)
    clip = model.normalise(batch["frames"])
    torch.testing.assert_close(
        model.make_targets(model.pieces_of(batch["frames"]), everything), model.make_targets(clip), **CLOSE
    )


def test_bytes_cut_first_are_the_normalised_clip():
    """To the bit: what the tokenizer cuts of bytes, then normalised, and of the normalised clip. Seen red with the
    channels of a piece taken for its pixels."""
    cfg = small_config(image_size=(16, 32))
    model, batch = new_model(cfg), random_batch(cfg, 2)
    clip = model.normalise(batch["frames"])
    for frames in (batch["frames"], clip):
        assert torch.equal(model.pieces_of(frames), model.online.tokenizer.cut(clip))


@torch.no_grad()
def test_what_is_younger_than_a_run_was_plain(tmp_path):
    """A run's config.json, its checkpoint and the comparison on resuming: fields that they lack had their plain form,
    whatever is the default now. Seen red with the defaults in their place."""
    values = V.asdict(plain_config())
    for name in V.VJepaAutoV2Config.BEFORE:
        values.pop(name)
    assert V.config_of(V.VJepaAutoV2Config, values) == plain_config()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"versions": {}, "config": {"steps": 7}}))
    found = V.read_config_file(path, V.VJepaAutoV2Config)
    assert found == {**V.VJepaAutoV2Config.BEFORE, "steps": 7}
    path.write_text(json.dumps({"steps": 7}))  # a config that a person wrote
    assert V.read_config_file(path, V.VJepaAutoV2Config) == {"steps": 7}
    state = {"cfg": json.loads(json.dumps(values))}
    V.check_same_run(state, plain_config(), path)
    with pytest.raises(V.UsageError, match="pred_attention = cross .checkpoint: full."):
        V.check_same_run(state, small_config(), path)


def test_published_predictors_keep_the_form_that_they_were_trained_in():
    for name in V.merged(V.VJepaAutoV2Config, "PRESETS"):
        cfg = V.preset_config(name)
        plain = {field: getattr(cfg, field) for field in cfg.BEFORE} == cfg.BEFORE
        assert plain == name.startswith("vjepa2"), name
