"""tools/plan.py: the search on toys with a known best, modes, driving a plan in the simulator, figures, the command."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, V, needs, small_config
from training import cpu_process, new_model, new_state

sys.path.insert(0, str(ROOT / "tools"))

import evaluate as E  # noqa: E402
import plan as L  # noqa: E402

needs("matplotlib")


def plan_config(**overrides):
    """A tiny model of steered forks that knows how they are steered; wide pictures."""
    own = dict(image_size=(16, 32), scenes="render", clip_fps=2.0, actions="steer,accel", scene_mix="steered=1")
    return small_config(**{**own, **overrides})


def toy_law(times=4, signals=2):
    """Signals between -2 and 2, a bank around 0."""
    bank = 0.3 * torch.randn(16, times, signals, generator=torch.Generator().manual_seed(9))
    ones = torch.ones(signals)
    return L.Law(0 * ones, 0.5 * ones, -2 * ones, 2 * ones, bank)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- search


BEST = torch.tensor([[1.0, -1.5], [1.2, -1.0], [0.8, 0.0], [0.3, 0.5]])  # of the toy


def toy_cost(actions):
    """Squared distance from BEST [n, F, A] -> [n]."""
    return (actions - BEST).square().sum((1, 2))


def test_the_search_finds_a_known_best_and_beats_random_draws():
    """Eight rounds of 64 candidates come within 0.15 of each number of BEST; the best of as many random draws costs ten
    times as much. Seen red with the worst candidates as elites, and without the floor under the deviation."""
    search, law = L.Search(), toy_law()
    for seed in range(3):
        found = L.cross_entropy(toy_cost, law, search, generator(seed))
        drawn = toy_cost(law.draw(8 * 64 + 2, search.smoothing, generator(seed))).min()
        assert (found.actions - BEST).abs().max() < 0.15 and found.cost < 0.1 * drawn, (found, drawn)
        assert found.cost == pytest.approx(float(toy_cost(found.actions[None])))
        best, elites, everyone = np.array(found.history).T
        assert best[-1] < 0.1 * best[0] and (best <= elites).all() and (elites <= everyone).all()


def test_plans_stay_within_what_training_saw():
    """The best lies outside: the plan goes to the bound and not beyond. Seen red without Law.clip."""
    seen = []

    def cost(actions):
        seen.append(actions)
        return (actions - 10).square().sum((1, 2))

    found = L.cross_entropy(cost, toy_law(), L.Search(), generator())
    assert torch.cat(seen).abs().max() <= 2 and found.actions.min() > 1.7


def test_plans_stay_within_reach_of_what_was_driven():
    """Two sequences were driven; the best lies between them, where nobody drove: the plan stops at its reach, in units
    of the spread. Seen red with the mean of the elites judged as it is."""
    ones = torch.ones(2)
    bank = torch.stack([torch.ones(4, 2), -torch.ones(4, 2)])
    law = L.Law(0 * ones, 0.5 * ones, -ones, ones, bank, 0.4)
    found = L.cross_entropy(lambda actions: actions.square().sum((1, 2)), law, L.Search(), generator())
    assert law.apart(found.actions[None]).min() <= 0.4 + 1e-5
    assert found.actions.abs().mean() == pytest.approx(1 - 0.4 * float(law.spread()[0]), abs=0.02)
    model = SimpleNamespace(action_mean=0 * ones, action_std=0.5 * ones)
    drawn = L.law_of(model, list(torch.randn(64, 4, 2, generator=generator())), 2.0)
    nearest = drawn.apart(drawn.bank).fill_diagonal_(9).amin(1)
    assert (nearest < drawn.reach / 2).float().mean() == pytest.approx(0.95, abs=0.02)


def test_the_seed_decides_and_nothing_else():
    """Equal seeds give equal plans to the bit, others do not; the global generator is neither used nor moved."""
    search, law, state = L.Search(3, 16, 4), toy_law(), torch.get_rng_state()
    plans = [L.cross_entropy(toy_cost, law, search, generator(seed)).actions for seed in (1, 1, 2)]
    assert torch.equal(plans[0], plans[1]) and not torch.equal(plans[0], plans[2])
    assert torch.equal(state, torch.get_rng_state())


def test_noise_has_unit_variance_and_the_asked_correlation():
    noise = L.smooth_noise((4000, 5, 2), 0.6, generator())
    assert noise.std(0).sub(1).abs().max() < 0.06
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean((0, 2))
    assert neighbours.sub(0.6).abs().max() < 0.06


def test_forecasts_that_are_not_finite_are_an_error_unless_some_are():
    """Candidates without a finite cost are never elites; none at all is one line."""
    broken = lambda actions: torch.full((len(actions),), torch.nan)  # noqa: E731
    with pytest.raises(V.UserError, match="not finite"):
        L.cross_entropy(broken, toy_law(), L.Search(2, 8, 2), generator())
    partly = lambda actions: torch.where(actions[:, 0, 0] > 0, toy_cost(actions), torch.nan)  # noqa: E731
    assert L.cross_entropy(partly, toy_law(), L.Search(6, 64, 8), generator()).actions[0, 0] > 0


# -- modes


class Gamble:
    """A model whose futures hang on the first action a: all tokens are 0.5 * (1 - a), and in a quarter of the sampled
    futures 1.2 * a more. It counts its calls."""

    def __init__(self, cfg):
        self.cfg, self.calls = cfg, []

    def tokens(self, values):
        """values [...] -> [..., F, D]."""
        shape = self.cfg.soon_tokens + self.cfg.flow_chunks, self.cfg.enc_dim
        return values[..., None, None].expand(*values.shape, *shape)

    def forecast(self, context, soon_preds=None, actions=None):
        self.calls.append(tuple(actions.shape))
        return self.tokens(0.5 * (1 - actions[:, 0, 0]))

    def sample_futures(self, context, num_samples, num_steps=None, generator=None, actions=None):
        self.calls.append(tuple(actions.shape))
        a, unlucky = actions[:, :1, 0], torch.arange(num_samples) % 4 == 0
        return self.tokens(0.5 * (1 - a) + 1.2 * a * unlucky)


def gamble_cost(mode, samples=8, alpha=0.25):
    cfg = plan_config()
    wish, context = L.Wish(torch.zeros(cfg.sites, cfg.enc_dim)), torch.zeros(1, cfg.now_tokens, cfg.enc_dim)
    return L.ModelCost(Gamble(cfg), cpu_process(), context, wish, mode, samples, alpha, generator())


def test_mean_takes_the_gamble_and_cvar_does_not():
    """The gamble costs 0.3 on average, 1.2 in its worst quarter, and safety 0.5 always. Seen red with topk of the
    smallest."""
    law = replace(toy_law(), low=torch.zeros(2), high=torch.ones(2))
    chosen = {}
    for mode in ("point", "mean", "cvar"):
        cost = gamble_cost(mode)
        chosen[mode] = L.cross_entropy(cost, law, L.Search(6, 32, 6), generator()).actions[0, 0]
        assert len(cost.model.calls) == 7 and cost.model.calls[0] == (32, 4, 2)  # each round in one batch
    assert chosen["mean"] > 0.95 and chosen["point"] > 0.95 and chosen["cvar"] < 0.05
    ends = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 4, 2)
    for mode, alpha, costs in (("mean", 0.25, (0.5, 0.3)), ("cvar", 0.25, (0.5, 1.2)), ("cvar", 1.0, (0.5, 0.3))):
        assert gamble_cost(mode, alpha=alpha)(ends).tolist() == pytest.approx(costs)


def test_candidates_beyond_memory_go_in_parts(monkeypatch):
    """The same costs, in several calls."""
    actions, whole = torch.rand(10, 4, 2), gamble_cost("mean")
    expected, cfg = whole(actions), whole.model.cfg
    monkeypatch.setattr(E, "SAMPLED_NUMBERS", 3 * 8 * (cfg.soon_tokens + cfg.flow_chunks) * cfg.enc_dim)
    parted = gamble_cost("mean")
    assert torch.equal(parted(actions), expected) and [call[0] for call in parted.model.calls] == [3, 3, 3, 1]


def test_a_goal_is_the_end_of_soon_or_all_of_it():
    cfg = plan_config()
    targets = torch.arange(cfg.num_tokens).float()[:, None].expand(-1, cfg.enc_dim)
    whole, end = (L.wanted_latents(targets, part, cfg) for part in ("whole", "end"))
    assert whole[:, 0].tolist() == list(range(cfg.now_tokens, cfg.now_tokens + cfg.soon_tokens))
    assert torch.equal(end, whole[-cfg.sites :])
    early = whole.clone()
    early[0] += 1  # a difference at the beginning of SOON
    assert float(L.Wish(end).of_latents(early, cfg)) == 0 < float(L.Wish(whole).of_latents(early, cfg))


# -- driving


def test_actions_lead_where_they_should():
    """By hand: a steady turn, a steady acceleration from 10 m/s; steer and yaw_rate say the same."""
    cfg = plan_config(actions="yaw_rate,accel")
    frames = cfg.num_frames - cfg.now_frames
    own = dict(speed=np.full(1 + frames, 10.0), yaw_rate=np.zeros(1 + frames))
    actions = np.tile([0.1, 2.0], (frames // cfg.tubelet_t, 1))
    path, seconds = L.reckon(actions, cfg, own), np.arange(1 + frames) / 2
    assert path["speed"][1:] == pytest.approx(10 + 2 * seconds[1:] - 0.5)  # half a frame until the first action holds
    assert path["heading"][1:] == pytest.approx(0.1 * seconds[1:] - 0.025)
    assert path["s"][-1] == pytest.approx(10 * seconds[-1] + seconds[-1] ** 2, abs=2) and path["x"][-1] > 1
    steer = np.arctan(0.1 * V.WHEELBASE / path["speed"][1:].reshape(-1, cfg.tubelet_t).mean(1))
    told = np.stack([steer, actions[:, 1]], 1)
    assert L.reckon(told, plan_config(), own)["x"] == pytest.approx(path["x"], abs=0.05)
    alone = L.reckon(actions[:, :1], plan_config(actions="yaw_rate"), {**own, "speed": own["speed"] + 5})
    assert (alone["speed"] == 15).all()  # what no action says is the car's own


@pytest.mark.parametrize("actions", ["steer,accel", "yaw_rate,speed"])
@pytest.mark.parametrize("kind", ["steered", "lane"])
def test_true_actions_drive_the_true_future(kind, actions):
    """NOW is the same to the bit; the car ends within 0.3 m of where it truly did (branches lie 10 m apart, lanes 3.5),
    and pictures are nearer to the truth than another branch's. Seen red with steering to the other side."""
    cfg = plan_config(actions=actions)
    for number in range(3):
        seeds = [E.futures_where(number, cfg, kind, "choice", side, 1)[:1] for side in (-1, 1)]
        jobs = [E.Job(number, seed, kind) for found in seeds for seed in found]
        clips, labels = zip(*(E.scene_pictures(job, cfg) for job in jobs))
        for clip, label in zip(clips, labels):
            driver = L.Driver(L.future_actions(label, cfg).double().numpy(), cfg)
            driven, said = E.scene_pictures(jobs[0], cfg, driver)
            assert torch.equal(driven[: cfg.now_frames], clip[: cfg.now_frames])
            places = [L.quantity_of(one, "lateral", cfg) for one in (said, label)]
            assert places[0] == pytest.approx(places[1], abs=0.3)
            soon = slice(cfg.now_frames, cfg.now_frames + cfg.soon_frames)
            errors = [(driven.float() - other.float())[soon].abs().mean() for other in clips]
            assert errors[[other is clip for other in clips].index(True)] == min(errors)


class Oracle:
    """A model that knows the simulator: its latents are pixels per token, its forecast the driven clip itself."""

    def __init__(self, cfg):
        self.cfg, self.job, self.image_mean = cfg, None, torch.zeros(1)
        self.action_mean, self.action_std = torch.zeros(2), torch.tensor([0.05, 0.5])

    def normalise(self, frames):
        return frames.float() / 255

    def make_targets(self, clip):
        kernel = (self.cfg.tubelet_t, self.cfg.patch, self.cfg.patch)
        return F.avg_pool3d(clip.transpose(1, 2), kernel).flatten(2).transpose(1, 2)  # [B, L, 3]

    def see(self, frames):
        return torch.zeros(1, 1, 1), None, self.make_targets(self.normalise(frames))

    def forecast(self, context, soon_preds=None, actions=None):
        drivers = [L.Driver(one.double().numpy(), self.cfg) for one in actions]
        clips = torch.stack([E.scene_pictures(self.job, self.cfg, driver)[0] for driver in drivers])
        return self.make_targets(self.normalise(clips))[:, self.cfg.now_tokens :]


def oracle_plans(count, **options):
    cfg = plan_config()
    model, search = Oracle(cfg), L.Search(2, 10, 3)
    own = dict(mode="point", samples=1, alpha=1.0, part="end", kind="steered", seed=0, search=search)
    args, plans = SimpleNamespace(**{**own, **options}), []
    law = L.law_of(model, L.training_scenes(cfg)[:16], 1.0)
    for number in range(count):
        case = L.scene_case(model, None, args, number)
        model.job = case.job
        plans.append(L.make_plan(model, case, law, args, number))
    return plans


def test_a_model_that_knows_the_simulator_plans_the_wanted_branch():
    """Steered forks, left and right in turn: every plan takes the wanted branch and costs at most a third of random
    actions' regret. Seen red with the steering of Driver turned round."""
    plans = oracle_plans(2)
    assert [plan.case.side for plan in plans] == [-1, 1]
    figures = L.regret_figures(plans)
    branch, share = figures["plan_right_branch"], figures["plan_regret_share"]
    assert branch["value"] == 1 == branch["controls"]["best true actions"] and branch["controls"]["random actions"] < 1
    assert share["value"] < 0.34 and figures["plan_regret"]["controls"]["do nothing"] > figures["plan_regret"]["value"]
    for plan in plans:  # what the oracle believes is what is driven
        assert plan.believed["plan"] == pytest.approx(plan.driven["plan"], abs=1e-6)
        assert json.dumps(E.without_nan(L.plan_record(plan)))


def made_plan(side, driven, places):
    """A Plan with nothing but driven costs and places."""
    case = SimpleNamespace(side=side, title=f"scene {side}")
    rows = {name: np.array(values, float) for name, values in driven.items()}
    return L.Plan(case, None, {}, rows, rows, {}, {name: np.array(values) for name, values in places.items()})


def test_regret_by_hand():
    """Plan 3 and 1 against the best true 1 and 1, random actions 5 and 3 on average."""
    places = dict(plan=[-1], true=[-2, 3], random=[1, -1], nothing=[0])
    first = made_plan(1, dict(plan=[3], true=[2, 1], random=[4, 6], nothing=[2]), places)
    places = dict(plan=[-4], true=[-2, 3], random=[1, 1], nothing=[0])
    plans = [first, made_plan(-1, dict(plan=[1], true=[1, 9], random=[3, 3], nothing=[4]), places)]
    figures = L.regret_figures(plans)
    assert figures["plan_regret"]["value"] == 1 and figures["plan_regret"]["controls"] == pytest.approx(
        {"random actions": 3, "do nothing": 2}
    )
    assert figures["plan_regret_share"]["value"] == pytest.approx(1 / 3)
    right = figures["plan_right_branch"]
    assert right["value"] == 0.5 and right["n"] == 2 and right["interval"] == [0, 1]
    assert right["controls"] == {"random actions": 0.25, "do nothing": 0, "best true actions": 1}


def test_clips_of_one_video_are_no_independent_cases():
    """Four plans from one video have no interval, from two videos that of two; their actions by hand against the true
    ones. Seen red without groups, and with a sum for the difference."""
    beliefs = [dict(plan=np.array([value]), true=np.ones(1), random=np.ones(1), nothing=np.ones(1)) for value in (1, 2)]
    for titles, known in ((["a.mp4"] * 4, False), (["a.mp4", "a.mp4", "b.mp4", "b.mp4"], True)):
        cases = [SimpleNamespace(title=title, side=0) for title in titles]
        rows = {name: torch.full((1, 4, 2), value) for name, value in zip(beliefs[0], (3.0, 1.0, 7.0, -2.0))}
        plans = [L.Plan(case, None, rows, beliefs[number // 2], {}, {}, {}) for number, case in enumerate(cases)]
        figures = L.model_figures(plans, plan_config())
        figure, error = figures["plan_believed"], figures["plan_error_accel"]
        assert error["value"] == 2 and error["controls"] == {"random actions": 6, "do nothing": 3}
        assert figure["value"] == 1.5 and (figure["interval"] == [1, 2] if known else figure["interval"] is None)


def test_quantities_at_the_end_of_soon():
    cfg = plan_config()
    labels = V.scene_truth(3, 1, cfg, "steered")[-1]
    end = cfg.now_frames + cfg.soon_frames
    assert L.quantity_of(labels, "speed", cfg) == pytest.approx(np.mean(labels["speed"][end - 2 : end]))
    side = np.sign(L.quantity_of(labels, "lateral", cfg))
    assert side == labels["branch"] and np.isnan(L.quantity_of({}, "lateral", cfg))
    wish = L.Wish(quantity="speed", value=3.0)
    assert wish.of_clip(None, labels, cfg) == pytest.approx(abs(L.quantity_of(labels, "speed", cfg) - 3))


# -- the command


def save_run(folder, cfg, kind="render", root="", steps=0):
    """A checkpoint of a model, untrained -> its path."""
    model = new_model(cfg)
    source = V.DataSource(kind, str(root), [], [], [], True)
    return V.save_checkpoint(new_state(model, source, step=3), folder, cfg, final=True)


SHORT = dict(num_workers=0, device="cpu", iterations=2, population=6, elites=2, num_scenes=2)


def command(capsys, *argv):
    """Run the command in this process -> (exit code, stdout, stderr)."""
    short = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
    return L.main([*map(str, argv[:1]), *short, *map(str, argv[1:])]), *capsys.readouterr()


def error_line(result):
    """Check that the last line of stderr is the only error line -> (exit code, that line)."""
    assert result[0] and result[2].count("error: ") == 1 and "Traceback" not in result[2], result
    return result[0], result[2].splitlines()[-1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--samples 0", ("samples = 0", "--samples")),
        ("--population 4 --elites 9", ("elites = 9", "population = 4", "--elites")),
        ("--probe lateral", ("probe lateral", "QUANTITY=NUMBER")),
        ("--probe speed=fast", ("probe speed=fast", "--probe")),
        ("--probe latteral=3", ("latteral", "did you mean lateral")),
        ("--probe speed=3 --goal x.mp4", ("--goal", "--probe")),
        ("--mode worst", ("mode",)),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, words):
    code = L.main(["x.pt", *flags.split(), "--device", "cpu"])
    _, line = error_line((code, *capsys.readouterr()))
    assert all(word in line for word in words), line


def test_checkpoints_and_clips_that_cannot_be_planned_with(tmp_path, capsys, scene_folder):
    """No such file, a run without actions, one without a flow net in a sampled mode, a goal that is gone or short,
    videos without the signals."""
    passive = save_run(tmp_path / "a", plan_config(actions="none"))
    no_flow = save_run(tmp_path / "b", plan_config(lambda_flow=0.0))
    good = save_run(tmp_path / "c", plan_config())
    short = tmp_path / "short.mp4"
    V.write_video(short, np.zeros((8, 32, 64, 3), np.uint8), 4)
    bare = tmp_path / "bare" / "videos"
    bare.mkdir(parents=True)
    for path in sorted((scene_folder / "videos").iterdir()):
        (bare / path.name).symlink_to(path)
    cases = [
        ((tmp_path / "none.pt",), "no such checkpoint"),
        ((passive,), "trained without actions"),
        ((no_flow, "--mode", "mean"), "lambda_flow 0"),
        ((good, "--goal", tmp_path / "gone.mp4"), "goal", "no such file"),
        ((good, "--goal", short), "goal", "too short", "12 frames, 6 s", "--start"),
        ((good, "--data_root", bare.parent), "no training file has the signals steer, accel"),
        ((good, "--data_root", bare.parent, "--data", "scenes"), "--data scenes reads no videos"),
        ((good, "--data_root", bare.parent, "--kind", "lane"), "kind lane: videos have none", "--kind"),
        ((good, "--data", "videos"), "data_root", "learned from no videos"),
    ]
    for argv, *words in cases:
        _, line = error_line(command(capsys, *argv))
        assert all(word in line for word in words), line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of steered forks, 12 steps -> its checkpoint."""
    cfg = plan_config(out_dir=str(tmp_path_factory.mktemp("run")), steps=12, log_every=12, picture=False, val_every=0)
    assert V.train(cfg) == V.EXIT_OK
    return next((Path(cfg.out_dir) / "checkpoints").glob("ckpt_final.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--mode cvar --samples 4", "--probe lateral=3 --mode mean"])
def test_the_command_on_a_trained_run(trained, tmp_path, capsys, monkeypatch, flags):
    """Reports and picture are there, the file twice the same, every plan within the bounds."""
    monkeypatch.setattr(L, "PROBE_CLIPS", 48)
    texts = []
    for out in (tmp_path / "a", tmp_path / "b"):
        result = command(capsys, trained, "--out", out, *flags.split())
        assert result[0] == 0, result
        texts.append((out / "plan.json").read_text())
        assert (out / "plan.png").stat().st_size > 10_000
    assert texts[0] == texts[1]
    report = json.loads(texts[0])
    assert {"plan_regret", "plan_regret_share", "plan_right_branch", "plan_believed"} <= report["figures"].keys()
    actions, (low, high) = np.array([plan["actions"] for plan in report["plans"]]), np.array(report["bounds"])
    assert actions.shape == (2, 4, 2) and (actions >= low - 1e-6).all() and (actions <= high + 1e-6).all()
    assert report["figures"]["plan_right_branch"]["controls"]["best true actions"] == 1
    assert ("probe_r2" in report) == ("probe" in flags)


@pytest.mark.slow
def test_the_command_on_videos(trained, tmp_path, capsys):
    """Clips with annotations, towards their own future and towards a goal clip."""
    scenes = V.write_scenes(tmp_path / "scenes", plan_config())
    goal = sorted((scenes / "videos").iterdir())[0]
    for number, more in enumerate(([], ["--goal", goal])):
        out = tmp_path / str(number)
        result = command(capsys, trained, "--data_root", scenes, "--out", out, *more)
        assert result[0] == 0, result
        report = json.loads((out / "plan.json").read_text())
        assert {"plan_believed", "plan_error_steer", "plan_error_accel"} <= report["figures"].keys()
        assert "plan_regret" not in report["figures"] and (out / "plan.png").stat().st_size > 10_000
