"""What training does as a whole: losses fall on a fixed batch, and a collapsed model is seen on the gauges."""

import math

import pytest
import torch
from conftest import V, random_batch, small_config
from training import new_model, new_phase, train_steps


def test_thirty_steps_on_one_batch_cut_the_losses():
    """NOW and SOON fall below the stated share of their start on a batch seen 30 times; EVENTUALLY below chance.

    Seen red with the optimizer's learning rate left at 0.
    """
    cfg = small_config(batch_size=4, steps=30, warmup_steps=0, lr=3e-3, ema_momentum=0.9995, outcome_queue=0)
    model, batch = new_model(cfg), random_batch(cfg, 4)
    history, _ = train_steps(model, lambda step: [batch], 30)
    first, last = history[0], history[-1]
    assert last["loss_vjepa"] < 0.75 * first["loss_vjepa"]
    assert last["loss_soon"] < 0.75 * first["loss_soon"]
    assert last["loss_eventually"] < 0.7 * first["loss_eventually"]
    assert all(metrics["grad_norm"] > 0 for metrics in history)


def collapsed_model(cfg, position_only):
    """A model whose target encoder says the same for every clip: everywhere one vector, or one vector per position."""
    model = new_model(cfg)
    with torch.no_grad():
        if position_only:
            model.target.tokenizer.proj.weight.zero_()
        else:
            model.target.trunk.norm.weight.zero_()
            model.target.trunk.norm.bias.normal_()
    return model


@pytest.mark.parametrize("position_only", [False, True])
def test_collapse_is_seen_on_the_gauges(position_only):
    """target_std_clips is 0 for both kinds of collapse, while target_std alone misses targets that know only positions.

    Seen red with target_std_clips taken over positions instead of clips, and over tubelets that stand for others.
    """
    cfg = small_config()
    batch, model = random_batch(cfg, 4), new_model(cfg)
    healthy = model.look(batch, model(batch)[2])["targets"]
    assert V.target_std_clips(healthy) > 0.05 and V.effective_rank(healthy) > 5
    model = collapsed_model(cfg, position_only)
    targets = model.look(batch, model(batch)[2])["targets"]
    assert V.target_std_clips(targets) < 1e-3
    if position_only:
        assert V.target_std(targets) > 0.2
    else:
        assert V.target_std(targets) < 1e-3 and V.effective_rank(targets) < 1.5


def test_one_short_held_out_file_is_not_called_a_collapse(tmp_path, scene_folder):
    """A single held-out clip, seen again and again, has no deviation across clips: nan, and a verdict from tokens."""
    one = tmp_path / "one.mp4"
    one.write_bytes(sorted((scene_folder / "videos").glob("*.mp4"))[0].read_bytes())
    cfg = small_config()
    source = V.open_data(V.VJepaAutoV2, cfg, [V.VideoFile("one.mp4", str(one))], True, None)
    run = new_phase(new_model(cfg), source=source).run
    run.log = V.RunLog(cfg, False)
    values = V.validate(run)
    assert (
        run.log.bad == {}
        and not source.held_out
        and math.isnan(values["val_target_std_clips"])
        and values["val_target_std"] > 0.2
    )
    assert "no sign of collapse" in V.verdict(values, cfg)
    values["val_target_std_clips"] = 0.01
    assert "COLLAPSED" in V.verdict(values, cfg)
