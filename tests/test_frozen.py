"""A frozen encoder, online and target in one, and a frozen teacher: what learns, what is saved, what is told."""

import json
import shutil

import pytest
import torch
from conftest import V, random_batch, small_config
from training import new_model, new_state, train_steps


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of random weights, whose target is no copy of its online encoder -> its path."""
    model = new_model(small_config(), seed=3)
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    path = tmp_path_factory.mktemp("source") / "source.pt"
    torch.save(new_state(model), path)
    return path


def frozen_config(source, **overrides):
    return small_config(**{"init_from": str(source), "freeze_encoder": True, **overrides})


def test_one_module_serves_both(source):
    """No copy, no gradient, no optimizer state, no EMA, and no weights in a checkpoint but their hash."""
    cfg = frozen_config(source)
    model = new_model(cfg)
    wanted = torch.load(source, weights_only=True)["target"]
    assert model.online is model.target and not model.online.training
    before = {name: value.clone() for name, value in model.online.state_dict().items()}
    assert before.keys() == wanted.keys() and all(torch.equal(before[name], wanted[name]) for name in wanted)
    history, optimizer = train_steps(model, lambda step: [random_batch(cfg, 2, first=2 * step)], 2)
    assert all(torch.equal(value, before[name]) for name, value in model.online.state_dict().items())
    learning = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not learning & {id(p) for p in model.online.parameters()}
    assert {id(p) for p in model.predictor.parameters()} <= learning
    state = new_state(model)
    assert "online" not in state and "target" not in state and state["frozen"].keys() == {"online"}
    assert "ema_momentum" not in model.state(0) and all(step["loss_vjepa"] > 0 for step in history)


def test_a_published_folder_is_frozen(tmp_path):
    """Positions of the weights become the config's, and the predictor beside them is taken where a run begins."""
    rope = dict(pos_embed="rope", enc_dim=48, pred_dim=24, num_heads=4)
    trained = new_model(small_config(**rope), seed=3)
    torch.save(new_state(trained), tmp_path / "source.pt")
    V.export_hf(tmp_path / "source.pt", tmp_path / "folder")
    cfg, lines = frozen_config(tmp_path / "folder", soon_start="mask", **{**rope, "pos_embed": "sincos"}), []
    model = new_model(cfg)
    assert cfg.pos_embed == "rope" and model.predictor.position.kind == "rope"
    model.take_weights(lines.append)
    assert torch.equal(model.predictor.out.weight, trained.predictor.out.weight)
    clip = model.normalise(random_batch(cfg, 1)["frames"])
    torch.testing.assert_close(model.make_targets(clip), trained.make_targets(clip))
    assert "frozen" in lines[0] and "predictor, " in lines[1] and not model.beside


def test_now_sees_nothing_of_its_future(source):
    """Other future pixels leave context, SOON prediction, outcome and samples as they are, to the bit, and move the
    targets. Seen red with the context cut out of the tokens of the whole clip."""
    cfg = frozen_config(source)
    model = new_model(cfg).eval()
    batch = random_batch(cfg, 2)
    other = {**batch, "frames": batch["frames"].clone()}
    other["frames"][:, cfg.now_frames :] = 255 - other["frames"][:, cfg.now_frames :]
    seen = []
    for each in (batch, other):
        latents = model.latents(each)
        context = latents["context"]
        generator = torch.Generator().manual_seed(0)
        samples = model.sample_futures(context, 3, generator=generator)
        seen.append((context, model.predict_soon(context), model.outcome(context), samples, latents["targets"]))
    assert all(torch.equal(one, two) for one, two in zip(seen[0][:-1], seen[1][:-1]))
    assert not torch.equal(seen[0][-1], seen[1][-1])


def test_nothing_is_kept_of_the_frozen_part(source):
    """Activations of the encoder are not saved for a backward pass: only those of what learns are."""
    cfg = frozen_config(source, enc_depth=2)
    frozen, free = new_model(cfg), new_model(small_config())
    kept = {}
    for name, model in (("frozen", frozen), ("free", free)):
        inside = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda value, into=inside: into.append(value) or value, lambda value: value
        )
        with hooks:
            losses, _, _ = model(random_batch(cfg, 2))
        kept[name] = sum(value.numel() for value in inside)
        context = model.encode_now(model.online.tokenizer.cut(model.normalise(random_batch(cfg, 2)["frames"])))
        assert context.requires_grad == (name == "free")
    assert kept["frozen"] < 0.8 * kept["free"]


def test_masked_loss_of_a_frozen_encoder_is_that_of_a_copy(source):
    """Frozen and free models with the same weights in both encoders give the same losses."""
    cfg = frozen_config(source)
    frozen = new_model(cfg)
    free = new_model(small_config())
    free.load_state_dict(
        frozen.state_dict()
        | {k.replace("online", "target", 1): v for k, v in frozen.state_dict().items() if k.startswith("online")}
    )
    batch = random_batch(cfg, 2)
    ours, theirs = (model(batch)[0] for model in (frozen, free))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_description_tells_the_truth(source):
    """FLOP and memory of a frozen encoder: forward alone, no state; of cached latents none."""
    free, frozen = new_model(small_config()), new_model(frozen_config(source))
    assert frozen.flops()["online"] * 3 == free.flops()["online"] and frozen.flops()["target"] == free.flops()["target"]
    cfg = frozen_config(source, lambda_vjepa=0.0)
    alone = new_model(cfg)
    assert alone.flops()["online"] < frozen.flops()["online"]
    assert V.memory_estimate_gb(cfg, 0) < V.memory_estimate_gb(small_config(lambda_vjepa=0.0), 0)
    assert "frozen" in frozen.describe()[0] and "target = online" in free.describe()[0]


@pytest.mark.parametrize("width", [48, 96, 24])
def test_frozen_teacher_of_any_width(source, width):
    """The target stands still and is saved as a hash; the encoder learns, from the same weights where it can."""
    cfg = small_config(
        init_from=str(source), teacher="frozen", enc_dim=width, pred_dim=24, num_heads=4, pos_embed="sincos"
    )
    model = new_model(cfg)
    wanted = torch.load(source, weights_only=True)["target"]
    assert all(torch.equal(model.target.state_dict()[name], wanted[name]) for name in wanted)
    first = {name: value.clone() for name, value in model.online.state_dict().items()}
    assert all(torch.equal(first[name], wanted[name]) for name in wanted) == (width == 48)
    targets = model.make_targets(model.normalise(random_batch(cfg, 2)["frames"]))
    assert targets.shape == (2, cfg.num_tokens, width)
    torch.testing.assert_close(targets.std(2, correction=0), torch.ones(2, cfg.num_tokens), rtol=1e-2, atol=1e-2)
    train_steps(model, lambda step: [random_batch(cfg, 2, first=2 * step)], 1)
    assert all(torch.equal(model.target.state_dict()[name], wanted[name]) for name in wanted)
    assert not torch.equal(model.online.tokenizer.proj.weight, first["tokenizer.proj.weight"])
    state = new_state(model)
    assert state["frozen"].keys() == {"target"} and "target" not in state and "online" in state
    twin = new_model(cfg, seed=9)
    twin.restore({**state, "after": 0})
    again = twin.make_targets(twin.normalise(random_batch(cfg, 2)["frames"]))
    assert torch.equal(again, targets)


def test_fixed_map_keeps_distances():
    """Onto a larger width to rounding, onto a smaller one as a random projection does: about 1 / sqrt(width)."""
    rows = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for width, most in ((192, 1e-4), (48, 0.35)):
        mapped = rows @ V.fixed_map(96, width, 0) * max(1.0, 96 / width) ** 0.5
        share = torch.pdist(mapped) / torch.pdist(rows)
        assert (share - 1).abs().max() < most
    assert torch.equal(V.fixed_map(96, 48, 5), V.fixed_map(96, 48, 5))
    assert not torch.equal(V.fixed_map(96, 48, 5), V.fixed_map(96, 48, 6))


@pytest.mark.parametrize(
    "overrides, word",
    [
        (dict(freeze_encoder=True), "freeze_encoder"),
        (dict(teacher="frozen"), "teacher"),
        (dict(teacher="frozen", freeze_encoder=True, init_from="x"), "teacher"),
        (dict(latents="x", lambda_vjepa=0.0), r"--latents"),
        (dict(latents="x", freeze_encoder=True, init_from="x"), "--lambda_vjepa"),
        (
            dict(latents="x", freeze_encoder=True, init_from="x", lambda_vjepa=0.0, crop_scale_min=0.5),
            "--crop_scale_min",
        ),
        (dict(latents="x", freeze_encoder=True, init_from="x", lambda_vjepa=0.0, hflip=True), "--hflip"),
    ],
)
def test_settings_that_cannot_be(overrides, word):
    plain = dict(crop_scale_min=1.0, crop_ratio_min=1.0, crop_ratio_max=1.0) if "latents" in overrides else {}
    with pytest.raises(V.UsageError, match=word):
        V.validate_config(small_config(**{**plain, **overrides}))


def test_other_shapes_are_named(source):
    """Widths, patch and position code that are not those of the weights."""
    for name, value in dict(enc_dim=96, enc_depth=3, patch=16, num_heads=2).items():
        with pytest.raises(V.UsageError, match=f"init_from .*--{name}"):
            new_model(frozen_config(source, **{name: value}))


@pytest.mark.slow
def test_a_frozen_run_is_resumed_shown_and_refuses_other_weights(source, scene_folder, tmp_path, capsys):
    """The real loop: training, a resume, load_model, a moved folder and changed weights, each in one line."""
    weights = tmp_path / "weights.pt"
    shutil.copy(source, weights)
    argv = [
        f"--data_root={scene_folder}",
        f"--out_dir={tmp_path / 'run'}",
        f"--init_from={weights}",
        "--freeze_encoder",
    ]
    for name, value in vars(small_config(steps=2, val_every=0)).items():
        if value != getattr(V.VJepaAutoV2Config(), name):
            argv.append(f"--{name}={value}")
    assert V.main(argv) == 0
    assert V.main([*argv, "--steps=4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4 and not any("ema_momentum" in row for row in rows)
    assert (tmp_path / "run" / "futures.png").is_file()
    final = tmp_path / "run" / "checkpoints" / "ckpt_final.pt"
    model, _ = V.load_model(final)
    assert model.online is model.target
    shutil.move(weights, tmp_path / "moved.pt")
    with pytest.raises(V.UsageError, match="weights.pt: no such folder or file"):
        V.load_model(final)
    assert V.load_model(final, init_from=str(tmp_path / "moved.pt"))[0].online.trunk.blocks
    state = torch.load(tmp_path / "moved.pt", weights_only=True)
    state["target"]["trunk.norm.bias"] += 1
    torch.save(state, weights)
    with pytest.raises(V.UsageError, match="the frozen weights of online are others"):
        V.load_model(final)
    capsys.readouterr()
    assert V.main([*argv, "--steps=6"]) == V.EXIT_USAGE
    assert "the frozen weights of online are others" in capsys.readouterr().err
    assert V.main([*argv, "--steps=6", f"--init_from={tmp_path / 'moved.pt'}"]) == 0
