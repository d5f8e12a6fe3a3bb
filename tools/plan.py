"""Plan with a trained world model: the actions that lead to a wanted future, by the cross-entropy method on latents.

    python tools/plan.py runs/x/checkpoints/ckpt_final.pt [--probe lateral=4 | --goal FILE] [--mode point|mean|cvar]

The run must know actions (`--actions steer,accel`). Sequences of actions, a vector per tubelet after NOW, are drawn as
training drove them; the model forecasts SOON under each, a cost judges the forecasts, the best ones say where the next
are drawn. NOW is encoded once, all candidates of an iteration go through the model together.

    cost     distance of predicted SOON latents to those of a goal clip, or of a probed quantity to a wanted value
    mode     point: of the point forecast; mean: over --samples futures; cvar: over the worst share --alpha of them
    scenes   the plan is driven in the simulator, the clip it gives is encoded and judged: its cost less that of the
             best true actions is the regret. Controls: random actions of training, and doing nothing. Without --goal
             and --probe the goal is a true future of the scene, at forks left and right in turn
    videos   a plan cannot be driven: it is held against the true actions, in the model's eyes and as numbers. The goal
             is the clip's own future, or --goal

Written to --out (default: the run's folder / plan): plan.json with every figure, its 95 % bootstrap interval over
scenes and its controls, and plan.png: what is driven beside what was wanted, paths from above, cost per iteration.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 0)]

import evaluate as E
import futures as P

import VJepa_AUTO_V2 as V

# Scene seeds of a range of their own, far from training's
PLAN_SEED, PROBE_SEED = P.SHOW_SEED + 10**11, P.SHOW_SEED + 2 * 10**11
OTHER_FUTURE = 10**6  # future seed of what a plan cannot choose: it is never one of the true futures
PER_CHOICE = 2  # true futures of every branch
BANK_CLIPS, PROBE_CLIPS, RANDOM_PLANS = 256, 256, 4
RESAMPLES = 1000  # of the bootstrap
FLOOR = 0.7  # of the first deviation, at the first round; it falls to 0: few elites narrow the search too early
ALONG, ACROSS = ("accel", "speed"), ("steer", "yaw_rate")  # signals that drive the car; the first one named does
LENGTH = 2.8  # metres between axles, as `steer` of V.scene_labels has it


# -- where actions lead


def running(values, step):
    """Integral of values [n] over steps of `step`, 0 at the first -> [n]."""
    return np.concatenate([[0], np.cumsum((values[1:] + values[:-1]) / 2 * step)])


def reckon(actions, cfg, own):
    """Where actions [F, A] lead, from the last NOW frame on -> {speed, yaw_rate, heading, s, x: float [1 + n]} for it
    and the n frames after it; s along the road and x to its right in metres, both 0 in that frame.

    own: {speed, yaw_rate: [1 + n]} of the car without actions, which hold where no action says otherwise.
    """
    step, speed, yaw_rate = 1 / (cfg.clip_fps or 4.0), own["speed"].astype(float), own["yaw_rate"].astype(float)
    frames = np.repeat(np.asarray(actions, float), cfg.tubelet_t, 0)  # [n, A]
    given = dict(zip(cfg.action_names, frames.T))
    along = next((name for name in cfg.action_names if name in ALONG), "")
    if along == "accel":
        speed = speed[0] + running(np.concatenate([[0], given["accel"]]), step)
    elif along == "speed":
        speed = np.concatenate([speed[:1], given["speed"]])
    speed = np.maximum(speed, 0)
    across = next((name for name in cfg.action_names if name in ACROSS), "")
    if across:
        turn = given[across]
        turn = turn if across == "yaw_rate" else np.tan(np.clip(turn, -1, 1)) * np.maximum(speed[1:], 1) / LENGTH
        yaw_rate = np.concatenate([yaw_rate[:1], turn])
    heading = np.clip(running(yaw_rate, step), -1.2, 1.2)
    moved = dict(s=running(speed, step), x=running(speed * np.tan(heading), step))
    return dict(speed=speed, yaw_rate=yaw_rate, heading=heading, **moved)


@dataclass(frozen=True)
class Driver:
    """Takes the place of V.ego_path in a built-in scene: after NOW the car does what `actions` [F, A] say. What they do
    not say (a speed under `steer` alone, the sway in the lane) is as in the scene's own future."""

    actions: np.ndarray
    cfg: object

    def __call__(self, scene, future, times, tau, fork_at):
        calm = {**future, "choice": 0, "push": 0.0, "brake_at": math.inf}
        own, idle = (V.ego_path(scene, what, times, tau, fork_at) for what in (future, calm))
        last = int(np.argmin(np.abs(tau)))
        path = reckon(self.actions, self.cfg, {name: own[name][last:] for name in ("speed", "yaw_rate")})
        pose = {name: value.copy() for name, value in idle.items() if name in ("s", "x", "speed", "yaw_rate")}
        if scene["kind"] == "lane":  # where the sway is in the signals, and so in the actions
            pose["x"][last:] = idle["x"][last]
        pose["s"][last:] = idle["s"][last] + path["s"]
        pose["x"][last:] += path["x"]
        pose["speed"][last + 1 :], pose["yaw_rate"][last + 1 :] = path["speed"][1:], path["yaw_rate"][1:]
        heading = np.concatenate([np.zeros(last), path["heading"]])
        side = np.sign(path["x"][-1]) * (scene["kind"] in V.FORKS)  # of the branch whose lane is meant
        offset = pose["x"] - V.ROADS[scene["lanes"]][3] - side * V.branch_offset(pose["s"] - fork_at)
        turned = dict(heading=heading, cos=np.cos(heading), sin=np.sin(heading), offset=offset)
        return {**idle, **pose, **turned}


def future_actions(labels, cfg):
    """Labels of a clip, per-frame signals among them -> actions of the tubelets after NOW [F, A], NaN where unknown."""
    return V.action_rows(labels, cfg)[cfg.future_tubelets[0] :]


# -- the search


@dataclass
class Law:
    """How training drove: mean, std, low, high [A] of its signals in SI units; bank [N, F, A] of sequences that it saw;
    reach: how far from the nearest of these a plan may lie, as root mean square in units of `spread`."""

    mean: torch.Tensor
    std: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    bank: torch.Tensor
    reach: float = math.inf

    def apart(self, actions):
        """Distances of sequences [n, F, A] from those of the bank -> [n, N]."""
        rows, bank = ((these / self.spread()).flatten(1) for these in (actions, self.bank))
        return torch.cdist(rows, bank) / math.sqrt(bank.shape[1])

    def clip(self, actions):
        """Within what training saw: every signal within its bounds, every sequence within reach of one that was driven.
        Elsewhere a model has learned nothing, and a search finds where it errs in one's favour."""
        actions = torch.maximum(torch.minimum(actions, self.high), self.low)
        if not math.isfinite(self.reach):
            return actions
        distance, nearest = self.apart(actions).min(1)
        share, nearest = (self.reach / distance.clamp_min(1e-12)).clamp_max(1)[:, None, None], self.bank[nearest]
        return nearest + share * (actions - nearest)

    def spread(self):
        """Deviation [A] of the first draws: rare signals, as steering is, lie far outside their own deviation."""
        return torch.maximum(self.std, (self.high - self.low) / 4)

    def draw(self, count, smoothing, generator):
        """Sequences [count, F, A], the first half of them from the bank, the others mean and smooth noise."""
        seen = (count + 1) // 2
        rows = torch.randint(len(self.bank), (seen,), generator=generator)
        noise = smooth_noise((count - seen, *self.bank.shape[1:]), smoothing, generator)
        return self.clip(torch.cat([self.bank[rows], self.mean + self.spread() * noise]))


@dataclass(frozen=True)
class Search:
    """How long and how wide is searched. momentum: share of the last mean and deviation that stays; smoothing:
    correlation of the noise from tubelet to tubelet; keep: share of the elites that stand again."""

    iterations: int = 8
    population: int = 64
    elites: int = 8
    momentum: float = 0.1
    smoothing: float = 0.3
    keep: float = 0.25


@dataclass
class Found:
    """A plan [F, A], its cost, and per iteration (best cost, mean cost of the elites, of all candidates)."""

    actions: torch.Tensor
    cost: float
    history: list


def smooth_noise(shape, smoothing, generator):
    """Normal noise [n, F, A] of variance 1, its correlation from step to step of F is `smoothing`."""
    noise = torch.randn(shape, generator=generator)
    for step in range(1, shape[1]):
        noise[:, step] = smoothing * noise[:, step - 1] + math.sqrt(1 - smoothing**2) * noise[:, step]
    return noise


def cross_entropy(cost, law, search, generator):
    """The sequence of actions with the smallest cost (Rubinstein 1999; smooth noise and standing elites of Pinneri et
    al. 2020; a floor under the deviation that falls to 0, Szita and Lorincz 2006) -> Found.

    cost: actions [n, F, A] -> [n], maybe with noise: at the end mean and best candidate are judged anew. UserError for
    a cost that is not finite anywhere.
    """
    candidates, history, best = law.draw(search.population, search.smoothing, generator), [], (math.inf, None)
    (mean, std), elites = (row.expand_as(law.bank[0]) for row in (law.mean, law.spread())), candidates[:0]
    for number in range(search.iterations):
        if number:
            shape, kept = (search.population, *mean.shape), elites[: int(search.keep * search.elites)]
            candidates = mean + std * smooth_noise(shape, search.smoothing, generator)
            candidates[0], candidates[1 : 1 + len(kept)] = mean, kept[: search.population - 1]
            candidates = law.clip(candidates)
        costs = cost(candidates)
        if not costs.isfinite().any():
            raise V.UserError("the model's forecasts under actions are not finite: no plan can be told from another")
        order = costs.nan_to_num(math.inf).argsort(stable=True)[: search.elites]
        elites, stays = candidates[order], search.momentum if number else 0.0
        mean = stays * mean + (1 - stays) * elites.mean(0)
        std = stays * std + (1 - stays) * elites.std(0, unbiased=False)
        std = torch.maximum(std, FLOOR * (1 - (number + 1) / search.iterations) * law.spread())
        best = min(best, (float(costs[order[0]]), elites[0]), key=lambda pair: pair[0])
        history.append([float(costs[order[0]]), float(costs[order].mean()), float(costs[costs.isfinite()].mean())])
    finalists = law.clip(torch.stack([mean, best[1]]))
    costs = cost(finalists)
    return Found(finalists[costs.argmin()], float(costs.min()), history)


# -- costs


@dataclass
class Wish:
    """What is wanted of SOON. goal [m, D]: latents, of its last tubelet or of all; else a quantity with its probe's
    weights [features + 1] and a value."""

    goal: torch.Tensor | None = None
    quantity: str = ""
    value: float = 0.0
    weights: torch.Tensor | None = None
    about: dict = field(default_factory=dict)

    def of_latents(self, soon, cfg):
        """SOON latents [..., M, D] -> cost [...]: mean absolute distance, or that of what the probe reads."""
        if self.goal is not None:
            return (soon[..., -len(self.goal) :, :] - self.goal).abs().mean((-2, -1))
        lead, weights = soon.shape[:-2], self.weights.to(soon.device)
        read = P.probe_features(soon.flatten(0, -3), cfg)[:, -1] @ weights[:-1] + weights[-1]
        return (read - self.value).abs().reshape(lead)

    def of_clip(self, soon, labels, cfg):
        """The same of a driven clip, its SOON latents [M, D] and labels -> float; a quantity is the true one."""
        if self.goal is not None:
            return float(self.of_latents(soon, cfg))
        return abs(quantity_of(labels, self.quantity, cfg) - self.value)


def quantity_of(labels, name, cfg):
    """A quantity at the end of SOON, from labels -> float, NaN where it is unknown."""
    if name != "lateral":
        return E.soon_end(labels.get(name), cfg)
    if not (labels.get("speed") and labels.get("yaw_rate")) or None in (*labels["speed"], *labels["yaw_rate"]):
        return math.nan
    return float(P.tubelet_means(P.lateral_path({"fps": cfg.clip_fps or 4.0, **labels}), cfg)[-1])


@dataclass
class ModelCost:
    """Cost of actions [n, F, A] in the model's eyes -> [n]. context [1, K, D] of NOW; the noise of the sampled futures
    comes from `generator`, which lives on the model's device."""

    model: object
    process: object
    context: torch.Tensor
    wish: Wish
    mode: str
    samples: int
    alpha: float
    generator: torch.Generator

    def soon(self, actions):
        """SOON latents [n, S, M, D] under actions [n, F, A], one of the point forecast or `samples` futures."""
        actions, M = actions.to(self.context.device), self.model.cfg.soon_tokens
        context = self.context.expand(len(actions), -1, -1)
        with V.autocast(self.process):
            if self.mode == "point":
                return self.model.forecast(context, actions=actions)[:, None, :M].float()
            futures = self.model.sample_futures(context, self.samples, generator=self.generator, actions=actions)
        return futures[:, :, :M].float()

    @torch.no_grad()
    def __call__(self, actions):
        cfg, samples = self.model.cfg, 1 if self.mode == "point" else self.samples
        size = max(1, E.SAMPLED_NUMBERS // (samples * (cfg.soon_tokens + cfg.flow_chunks) * cfg.enc_dim))
        costs = torch.cat([self.wish.of_latents(self.soon(part), cfg) for part in actions.split(size)])
        worst = math.ceil(self.alpha * samples) if self.mode == "cvar" else samples
        return costs.topk(worst, 1).values.mean(1).cpu()


# -- cases: one present, what is wanted, what is known to be true


@dataclass
class Case:
    """One present to plan from. true [n, F, A]: actions of its true futures; own: speed and yaw rate without actions,
    [1 + frames after NOW]; side: of the wanted branch, 0 without; job: of the scene, None for a video."""

    title: str
    now: np.ndarray  # uint8 [H, W, 3], the last NOW frame
    wanted: np.ndarray | None  # the goal at the end of SOON
    context: torch.Tensor
    wish: Wish
    true: torch.Tensor
    own: dict
    side: int = 0
    job: E.Job | None = None


@dataclass
class Plan:
    """What came of a case: rows {name: actions [n, F, A]} of plan, true, random, nothing; their costs in the model's
    eyes and driven, [n] each; frames of driven clips uint8 [T, H, W, 3]; places [n] to the right at the end of SOON."""

    case: Case
    found: Found
    rows: dict
    believed: dict
    driven: dict
    frames: dict
    places: dict


def scene_case(model, wish, args, number):
    """Built-in scene `number` of a seed, whose goal is a true future unless `wish` is given -> Case."""
    cfg, kind, scene_seed = model.cfg, args.kind, PLAN_SEED + 10**6 * args.seed + number
    groups = [E.futures_where(scene_seed, cfg, kind, "choice", side, PER_CHOICE) for side in (-1, 0, 1)]
    groups = [seeds for seeds in groups if seeds]
    goal, side = groups[number % len(groups)][0], 0
    clips, labels = zip(*(E.scene_pictures(E.Job(scene_seed, s, kind), cfg) for seeds in groups for s in seeds))
    place = [seed for seeds in groups for seed in seeds].index(goal)
    context, _, targets = model.see(clips[place][None].to(model.image_mean.device))
    last, pictures = cfg.now_frames + cfg.soon_frames - 1, clips[place].permute(0, 2, 3, 1).numpy()
    if wish is None:
        side = E.future_of(E.Job(scene_seed, goal, kind), cfg)["choice"] * (kind in V.FORKS)
        wish = Wish(wanted_latents(targets[0], args.part, cfg))
    elif wish.quantity == "lateral" and kind in V.FORKS:
        side = int(np.sign(wish.value))
    if wish.quantity and math.isnan(quantity_of(labels[place], wish.quantity, cfg)):
        text = f"probe {wish.quantity}: nobody knows it in scenes of kind {kind} (--probe, --kind)"
        raise V.UserError(text)
    speed = np.full(1 + cfg.num_frames - cfg.now_frames, labels[0]["speed"][cfg.now_frames - 1])
    own, true = dict(speed=speed, yaw_rate=0 * speed), torch.stack([future_actions(one, cfg) for one in labels])
    shown = None if wish.goal is None else wish.about.get("picture", pictures[last])
    job, title = E.Job(scene_seed, OTHER_FUTURE, kind), f"{kind} scene {number}"
    return Case(title, pictures[cfg.now_frames - 1], shown, context, wish, true, own, side, job)


def wanted_latents(targets, part, cfg):
    """Targets [L, D] of a clip -> those of SOON that are wanted [m, D]: its last tubelet or all."""
    soon = targets[cfg.now_tokens : cfg.now_tokens + cfg.soon_tokens].float()
    return soon[-cfg.sites :] if part == "end" else soon


def video_case(model, wish, args, frames, actions, speed, video):
    """A clip of a video, uint8 [T, H, W, 3], with its true actions [F, A] and the speed in NOW (0: unknown) -> Case;
    its own future is the goal unless `wish` is given."""
    cfg = model.cfg
    context, _, targets = model.see(E.as_frames(frames)[None].to(model.image_mean.device))
    shown, count = frames[cfg.now_frames + cfg.soon_frames - 1], 1 + cfg.num_frames - cfg.now_frames
    if wish is not None:
        shown = wish.about.get("picture")
    wish = wish or Wish(wanted_latents(targets[0], args.part, cfg))
    own = dict(speed=np.full(count, speed), yaw_rate=np.zeros(count))
    return Case(video.name, frames[cfg.now_frames - 1], shown, context, wish, actions[None], own)


def idle_actions(case, cfg):
    """Doing nothing -> [1, F, A]: no steering, no acceleration, the speed of the last NOW frame."""
    still = [float(case.own["speed"][0]) if name == "speed" else 0.0 for name in cfg.action_names]
    return torch.tensor(still).expand_as(case.true[:1]).contiguous()


@torch.no_grad()
def drive(model, case, actions):
    """Drive actions [n, F, A] in the case's scene -> (costs [n], frames [n] of uint8 [T, H, W, 3], metres to the right
    at the end of SOON [n])."""
    cfg, costs, frames, places = model.cfg, [], [], []
    for one in actions:
        clip, labels = E.scene_pictures(case.job, cfg, Driver(one.double().numpy(), cfg))
        targets = model.make_targets(model.normalise(clip[None].to(model.image_mean.device)))[0].float()
        costs.append(case.wish.of_clip(wanted_latents(targets, "whole", cfg), labels, cfg))
        frames.append(clip.permute(0, 2, 3, 1).numpy())
        places.append(quantity_of(labels, "lateral", cfg))
    return np.array(costs), frames, np.array(places)


def make_plan(model, case, law, args, number):
    """Search, then judge the plan beside true actions, random ones and none -> Plan."""
    device = model.image_mean.device
    draws, noise = torch.Generator(), torch.Generator(device)
    draws.manual_seed(10**6 * args.seed + number), noise.manual_seed(10**6 * args.seed + number)
    how = (case.wish, args.mode, args.samples, args.alpha, noise)
    cost = ModelCost(model, E.own_precision(model.cfg, device), case.context, *how)
    found = cross_entropy(cost, law, args.search, draws)
    rows = dict(plan=found.actions[None], true=case.true, nothing=idle_actions(case, model.cfg))
    rows["random"] = law.draw(RANDOM_PLANS, args.search.smoothing, draws)
    believed = {name: cost(actions).numpy() for name, actions in rows.items()}
    driven, frames, places = {}, {}, {}
    if case.job is not None:
        for name, actions in rows.items():
            driven[name], frames[name], places[name] = drive(model, case, actions)
    return Plan(case, found, rows, believed, driven, frames, places)


# -- what is there before the search


def training_scenes(cfg):
    """Actions of the first training scenes -> list of [F, A]."""
    count = min(BANK_CLIPS, cfg.scene_clips) if cfg.scenes == "files" else BANK_CLIPS
    seeds = (V.scene_seed_at(cfg, index) for index in range(count))
    return [future_actions(V.scene_truth(scene_seed, 0, cfg)[-1], cfg) for scene_seed in seeds]


def training_videos(source, cfg):
    """Actions of windows of training files, of which no frame is decoded -> list of [F, A]. Files that cannot be read
    are passed over."""
    data, rows, names = source.dataset(cfg, "bank"), [], cfg.action_names
    for index in range(min(BANK_CLIPS, 8 * len(data.videos))):
        video, (plan, _) = data.videos[next(data.candidates(index))], data.plan_of(index, cfg.height, cfg.width)
        try:
            annotation = V.read_annotation(source.root, video)
            signals = V.timed_signals(annotation, video, V.fit_plan(plan, video, annotation), names)
        except (V.BadFile, *V.DECODE_ERRORS):
            continue
        rows.append(future_actions(signals, cfg))
    return rows


def law_of(model, rows, reach):
    """Law of training's actions, a list of [F, A], with the model's own statistics; None where none has all signals.
    reach: 1 is what 95 % of the sequences have to their nearest neighbour; 0 sets no limit."""
    rows = [row for row in rows if row.isfinite().all()]
    if not rows:
        return None
    bank = torch.stack(rows)
    low, high = bank.flatten(0, 1).amin(0), bank.flatten(0, 1).amax(0)
    law = Law(model.action_mean.cpu(), model.action_std.cpu(), low, high, bank)
    if reach and len(bank) > 1:
        neighbour = law.apart(bank).fill_diagonal_(math.inf).amin(1)
        law.reach = reach * float(neighbour.quantile(0.95)) or math.inf
    return law


@torch.no_grad()
def fit_probe(model, clips, name, value, num_workers):
    """A wish for a quantity, its probe fitted on the real latents of three quarters of `clips`, a dataset of (frames,
    labels), and tested on the rest. UserError where too few know the quantity."""
    cfg, features, truth, bar = model.cfg, [], [], E.Bar()
    for frames, labels in E.open_loader(clips, len(clips), 16, num_workers, E.collate_clips):
        targets = model.make_targets(model.normalise(frames.to(model.image_mean.device))).float().cpu()
        soon = targets[:, cfg.now_tokens : cfg.now_tokens + cfg.soon_tokens]
        features.append(P.probe_features(soon, cfg)[:, -1])
        truth += [quantity_of(label, name, cfg) for label in labels]
        bar.show(len(truth) / len(clips), f"probe of {name}")
    truth, features = torch.tensor(truth), torch.cat(features)
    features, truth = features[truth.isfinite()], truth[truth.isfinite()]
    if len(truth) < 16:
        raise V.UserError(f"probe {name}: {len(truth)} of {len(clips)} clips know it, at least 16 are needed (--probe)")
    held = torch.arange(len(truth)) % 4 == 3
    weights = P.ridge(features[~held], truth[~held])
    read = features[held] @ weights[:-1] + weights[-1]
    r2 = E.r2(torch.stack([truth[held], read], 1).double().numpy())
    bar.close(f"probe of {name}: {len(truth)} clips, R2 {r2:.2f} on {int(held.sum())} held out")
    span = [float(truth.min()), float(truth.max())]
    if not span[0] <= value <= span[1]:
        V.say(f"note: {name} = {value:g} is wanted; the probe saw {span[0]:.3g} to {span[1]:.3g} only", sys.stderr)
    return Wish(quantity=name, value=value, weights=weights, about={"probe_r2": r2, "seen": span, "clips": len(truth)})


def goal_wish(model, args):
    """The clip at --goal -> Wish. UserError for one that is shorter than the model's clip."""
    cfg = model.cfg
    frames = P.clip_window(args.goal, args.start, cfg, "goal")
    if len(frames) < cfg.num_frames:
        seconds = f", {cfg.num_frames / cfg.clip_fps:g} s" if cfg.clip_fps else ""
        raise V.UserError(
            f"goal {args.goal}: too short, a whole clip of the run ({cfg.num_frames} frames{seconds}) is needed from "
            f"{args.start:g} s on (--goal, --start)"
        )
    with torch.no_grad():
        targets = model.make_targets(model.normalise(E.as_frames(frames)[None].to(model.image_mean.device)))[0]
    picture = frames[cfg.now_frames + cfg.soon_frames - 1]
    return Wish(wanted_latents(targets, args.part, cfg), about={"picture": picture})


def prepare(model, source, args):
    """-> (Law; Wish, None where each case has its own; generator of Cases)."""
    cfg, wish = model.cfg, goal_wish(model, args) if args.goal else None
    law = law_of(model, training_scenes(cfg) if source is None else training_videos(source, cfg), args.reach)
    if law is None:
        names = ", ".join(cfg.action_names)
        raise V.UserError(f"data_root {source.root}: no training file has the signals {names} (--data_root)")
    if args.probe:
        if source is None:
            kinds = (args.kind, "")  # a half as the run's own mix
            jobs = [E.Job(PROBE_SEED + index, 0, kinds[index % 2]) for index in range(PROBE_CLIPS)]
            clips = E.SceneJobs(jobs, cfg)
        else:
            clips = E.VideoClips(source.dataset(cfg, "bank"), PROBE_CLIPS)
        wish = fit_probe(model, clips, *args.probe, args.num_workers)
    if source is None:
        return law, wish, (scene_case(model, wish, args, number) for number in range(args.num_scenes))
    return law, wish, video_cases(model, source, wish, args)


def video_cases(model, source, wish, args):
    """Clips of held-out videos that have all signals -> generator of Cases. UserError where none has."""
    cfg, data, found, names = model.cfg, source.dataset(model.cfg, "val"), 0, ", ".join(model.cfg.action_names)
    for index in range(min(args.num_scenes, 32 * len(data.videos))):
        frames, number, annotation, bad, _ = data.decode(index, cfg.height, cfg.width)
        if number < 0:
            raise E.unreadable(source, "held-out", dict(bad))
        video, actions = data.videos[number], annotation["actions"][cfg.future_tubelets[0] :]
        if not actions.isfinite().all():
            V.say(f"note: {video.name}: its clip has not all of the signals {names}, left out", sys.stderr)
            continue
        plan = V.fit_plan(data.plan_of(index, cfg.height, cfg.width)[0], video, annotation)
        speed = V.timed_signals(annotation, video, plan, ("speed",)).get("speed", np.zeros(cfg.num_frames))
        found += 1
        yield video_case(model, wish, args, frames, actions, float(np.nan_to_num(speed[cfg.now_frames - 1])), video)
    if not found:
        raise V.UserError(f"data_root {source.root}: no held-out clip has the signals {names} (--data_root)")


# -- figures


def best_true(plan):
    """Number of the true actions that cost least: driven, or in the model's eyes for a video."""
    return int(np.argmin((plan.driven or plan.believed)["true"]))


def regret_figures(plans):
    """Driven costs of scenes -> figures."""
    costs = {name: np.array([plan.driven[name].mean() for plan in plans]) for name in ("plan", "random", "nothing")}
    best = np.array([plan.driven["true"].min() for plan in plans])
    regret = {name: cost - best for name, cost in costs.items()}
    told = dict(reading="Cost of the driven plan less that of the best true actions of the same scene: 0 is right")
    beside = {"random actions": regret["random"].mean(), "do nothing": regret["nothing"].mean()}
    figures = E.measured("plan_regret", regret["plan"], np.mean, beside, RESAMPLES, **told)
    share = "The same regret over that of random actions of training: 0 is as good as the best true actions, 1 as luck"
    beside = {"random actions": 1.0, "do nothing": E.ratio(regret["nothing"].sum(), regret["random"].sum())}
    rows = np.stack([regret["plan"], regret["random"]], 1)
    figures |= E.measured("plan_regret_share", rows, E.mean_ratio, beside, RESAMPLES, reading=share)
    forked = [plan for plan in plans if plan.case.side]
    if forked:
        sides = {name: [(np.sign(p.places[name]) == p.case.side).mean() for p in forked] for name in costs}
        true = np.mean([np.sign(plan.places["true"][best_true(plan)]) == plan.case.side for plan in forked])
        beside = {"random actions": np.mean(sides["random"]), "do nothing": np.mean(sides["nothing"])}
        beside["best true actions"] = true
        told = dict(
            reading="Share of scenes in which the driven plan ends on the side of the wanted branch: 1 is right"
        )
        figures |= E.measured("plan_right_branch", np.array(sides["plan"]), np.mean, beside, RESAMPLES, **told)
    return figures


def model_figures(plans, cfg):
    """What can be said without driving -> figures: costs in the model's eyes and, for videos, actions against true."""
    costs = {name: np.array([plan.believed[name].mean() for plan in plans]) for name in ("plan", "random", "nothing")}
    true = np.array([plan.believed["true"][best_true(plan)] for plan in plans])
    reading = "Cost of the plan in the model's eyes over that of the best true actions: far below 1 the search finds "
    reading += "sequences that the model likes better than any that leads there"
    beside = {"random actions": E.ratio(costs["random"].sum(), true.sum())}
    beside["do nothing"] = E.ratio(costs["nothing"].sum(), true.sum())
    rows = np.stack([costs["plan"], true], 1)
    figures = E.measured("plan_believed", rows, E.mean_ratio, beside, RESAMPLES, reading=reading)
    soon = cfg.soon_frames // cfg.tubelet_t
    for column, name in enumerate(() if plans[0].driven else cfg.action_names):
        errors = {}
        for row in ("plan", "random", "nothing"):
            apart = [(p.rows[row] - p.rows["true"])[:, :soon, column].abs().mean() for p in plans]
            errors[row] = np.array([float(value) for value in apart])
        beside = {"random actions": errors["random"].mean(), "do nothing": errors["nothing"].mean()}
        reading = f"Mean distance of planned and true {name} over SOON, in its unit: 0 is right"
        figures |= E.measured(f"plan_error_{name}", errors["plan"], np.mean, beside, RESAMPLES, reading=reading)
    return figures


def say_figures(figures):
    """Figures with intervals and controls on standard output; a note where the forecasts do not hang on the actions."""
    for name, figure in figures.items():
        interval = "" if figure["interval"] is None else "  95 % {:.3g} to {:.3g}".format(*figure["interval"])
        beside = ", ".join(f"{control} {value:.3g}" for control, value in figure["controls"].items())
        V.say(f"{name:<20}{E.short(figure['value']):>10}{interval}  ({beside})")
    believed = figures["plan_believed"]
    if believed["value"] and believed["controls"]["random actions"] < 1.01 * believed["value"]:
        V.say("note: the forecasts hardly change with the actions; this checkpoint has not learned to hear them")


def plan_record(plan):
    """One case of plan.json -> dict of plain values."""
    best, record = best_true(plan), {"title": plan.case.title, "wanted_side": plan.case.side}
    if plan.case.job is not None:
        record |= {"scene_seed": plan.case.job.scene_seed, "kind": plan.case.job.kind}
        record |= {"driven_cost": {name: cost.tolist() for name, cost in plan.driven.items()}}
        record |= {"regret": plan.driven["plan"][0] - plan.driven["true"].min()}
        record |= {"lateral_m": {name: place.tolist() for name, place in plan.places.items()}}
    record |= {"model_cost": {name: cost.tolist() for name, cost in plan.believed.items()}}
    record |= {"actions": plan.found.actions.tolist(), "best_true_actions": plan.rows["true"][best].tolist()}
    return record | {"history": plan.found.history}


# -- picture

LOOKS = {  # name -> title, colour, line width
    "random": ("random actions", P.UNIT["between"], 1.0),
    "nothing": ("do nothing", P.UNIT["point"], 1.6),
    "true": ("true futures", P.UNIT["truth"], 1.6),
    "plan": ("plan", P.UNIT["right"], 2.8),
}


def show_picture(axes, picture, title, colour="black"):
    """A frame with its title; an empty place without one."""
    axes.set_xticks([]), axes.set_yticks([])
    axes.set_title(title, fontsize=9, color=colour, pad=3)
    if picture is None:
        axes.axis("off")
    else:
        axes.imshow(picture)
        for spine in axes.spines.values():
            spine.set_color(colour), spine.set_linewidth(2)


def plot_frames(figure, plan, cfg):
    """NOW, the goal, and what plan, best true actions and random ones lead to."""
    middle, last = cfg.now_frames + cfg.soon_frames // 2 - 1, cfg.now_frames + cfg.soon_frames - 1
    shown = [(plan.case.now, "NOW", "black"), (plan.case.wanted, "goal, end of SOON", LOOKS["true"][1])]
    if plan.frames:
        own, colour = plan.frames["plan"][0], LOOKS["plan"][1]
        shown.append((plan.frames["true"][best_true(plan)][last], "best true actions", LOOKS["true"][1]))
        shown += [(own[middle], "plan, middle of SOON", colour), (own[last], "plan, end of SOON", colour)]
        shown.append((plan.frames["random"][0][last], "random actions", LOOKS["random"][1]))
    rows = math.ceil(len(shown) / 3)
    for axes, (picture, title, colour) in zip(figure.subplots(rows, len(shown) // rows, squeeze=False).flat, shown):
        show_picture(axes, picture, title, colour)


def plot_paths(axes, plan, cfg):
    """From above: where the actions lead up to the end of SOON."""
    end = 1 + cfg.soon_frames
    for name, (title, colour, width) in LOOKS.items():
        for number, actions in enumerate(plan.rows[name]):
            path = reckon(actions.numpy(), cfg, plan.case.own)
            label = title if number == 0 else None
            axes.plot(path["x"][:end], path["s"][:end], color=colour, linewidth=width, label=label)
    axes.plot([0], [0], "s", color="black")
    low, high = axes.get_xlim()
    reach = max(-low, high, 2.0)
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("metres to the right"), axes.set_ylabel("metres ahead")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("from above, to the end of SOON", fontsize=10)


def plot_costs(axes, plan):
    """Cost in the model's eyes over the iterations, with that of the best true actions and of doing nothing."""
    best, elites, everyone = np.array(plan.found.history).T
    steps, colour = np.arange(1, len(best) + 1), LOOKS["plan"][1]
    axes.plot(steps, everyone, color=colour, linewidth=1, linestyle=":", label="all candidates")
    axes.plot(steps, elites, color=colour, linewidth=1.4, linestyle="--", label="elites")
    axes.plot(steps, best, color=colour, linewidth=2.4, marker="o", markersize=3, label="best")
    axes.axhline(plan.believed["true"][best_true(plan)], color=LOOKS["true"][1], linewidth=1.4, label="best true")
    axes.axhline(plan.believed["nothing"][0], color=LOOKS["nothing"][1], linewidth=1.4, label="do nothing")
    axes.set_xlabel("iteration"), axes.set_title("cost in the model's eyes", fontsize=10)
    axes.set_ylim(0, 1.12 * max(everyone.max(), plan.believed["nothing"][0], plan.believed["true"].min()))
    axes.spines[["top", "right"]].set_visible(False)


def draw_plans(path, plans, caption, cfg):
    """plan.png: up to three cases, one per row."""
    shown = plans[:3]
    figure = P.new_figure(15, 4.2 * len(shown) + 0.4)
    for row, plan in zip(np.atleast_1d(figure.subfigures(len(shown), 1)), shown):
        frames, charts = row.subfigures(1, 2, width_ratios=(1, 1.25))
        plot_frames(frames, plan, cfg)
        above, costs = charts.subplots(1, 2)
        plot_paths(above, plan, cfg)
        plot_costs(costs, plan)
        wanted = {-1: ", wanted: left", 1: ", wanted: right"}.get(plan.case.side, "")
        row.suptitle(plan.case.title + wanted, fontsize=12)
        if plan is shown[0]:
            above.legend(frameon=False, fontsize=8), costs.legend(frameon=False, fontsize=8)
    figure.supxlabel(caption, fontsize=10)
    P.save_figure(figure, path)


# -- the command


QUANTITIES = ("lateral", *E.SIGNALS)
LIMITS = {
    **{"samples": (1, 1024), "iterations": (1, 1000), "population": (2, 10**5), "elites": (1, 10**5)},
    **{
        "num_scenes": (1, 10**4),
        "alpha": (0.001, 1),
        "momentum": (0, 0.99),
        "smoothing": (0, 0.99),
        "reach": (0, 1000),
    },
    **{"start": (0, 10**7), "seed": (0, 10**4), "num_workers": (0, 64)},
}


def parse_probe(text):
    """'lateral=4' -> ('lateral', 4.0). UsageError for another form, an unknown quantity, no finite number."""
    name, sign, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not sign or not math.isfinite(value):
        raise V.UsageError(f"probe {text}: write QUANTITY=NUMBER, as in lateral=4 (--probe)")
    if name not in QUANTITIES:
        known = f"one of {', '.join(QUANTITIES)}{V.nearest(name, QUANTITIES)}"
        raise V.UsageError(f"probe {name}: unknown quantity, {known} (--probe)")
    return name, value


def parse_arguments(argv):
    """Flags -> namespace, with `search` and `probe` in their own forms. UsageError in one line."""
    parser = V.ArgumentParser(description="Plan actions with a trained world model.", allow_abbrev=False)
    path, flag, own = dict(default="", type=os.path.expanduser), parser.add_argument, Search()
    flag("ckpt", metavar="CHECKPOINT", type=os.path.expanduser, help="checkpoint of a run that knows actions")
    flag("--out", **path, help="output folder [the run's folder / plan]")
    flag("--goal", **path, help="video whose SOON is wanted, a whole clip long")
    flag("--start", type=float, default=0.0, help="where the goal's window begins, in seconds [0]")
    flag("--probe", default="", help=f"QUANTITY=VALUE wanted at the end of SOON: {', '.join(QUANTITIES)}")
    flag("--part", default="end", choices=("end", "whole"), help="of SOON that must be like the goal [end]")
    flag("--mode", default="point", choices=("point", "mean", "cvar"), help="what of a forecast is judged [point]")
    flag("--samples", type=int, default=8, help="futures per candidate, in modes mean and cvar [8]")
    flag("--alpha", type=float, default=0.25, help="worst share of the futures that cvar averages [0.25]")
    flag("--iterations", type=int, default=own.iterations, help=f"rounds of the search [{own.iterations}]")
    flag("--population", type=int, default=own.population, help=f"candidates of a round [{own.population}]")
    flag("--elites", type=int, default=own.elites, help=f"of these, the best that say where to go on [{own.elites}]")
    flag("--momentum", type=float, default=own.momentum, help=f"share of the last round that stays [{own.momentum}]")
    flag("--smoothing", type=float, default=own.smoothing, help=f"correlation in time of the noise [{own.smoothing}]")
    reach = "how far a plan may lie from what training drove, in the distance of neighbours there; 0: anywhere [1]"
    flag("--reach", type=float, default=1.0, help=reach)
    flag("--num_scenes", type=int, default=16, help="scenes or clips to plan from [16]")
    flag("--data", default="", choices=("", "scenes", "videos"), help="plan from these [what the run learned from]")
    flag("--kind", default="", choices=("", *V.SCENE_KINDS), help="kind of the scenes [a fork that the run knows]")
    flag("--data_root", **path, help="videos to plan from, with signals in annotations [the run's own]")
    flag("--init_from", **path, help="where the frozen weights of the run are, if they were moved")
    flag("--num_workers", type=int, default=2, help="processes that draw clips for the probe [2]")
    flag("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    flag("--seed", type=int, default=0, help="scenes, candidates and noise [0]")
    args = parser.parse_args(argv)
    E.check_limits(args, LIMITS)
    if args.elites > args.population:
        text = f"elites = {args.elites}: must be at most population = {args.population} (--elites, --population)"
        raise V.UsageError(text)
    if args.goal and args.probe:
        raise V.UsageError("goal and probe: one of the two says what is wanted (--goal, --probe)")
    args.probe = parse_probe(args.probe) if args.probe else None
    args.search = Search(args.iterations, args.population, args.elites, args.momentum, args.smoothing)
    E.need("matplotlib")
    return args


def open_run(args):
    """-> (model on its device, DataSource of videos or None for built-in scenes). Sets args.kind. UserError for a run
    that knows no actions, or has no flow net where futures are sampled."""
    model, cfg, about = E.open_checkpoint(args.ckpt, args.device, args.init_from)
    if not cfg.action_names:
        cure = "train one with --actions steer,accel"
        raise V.UserError(f"ckpt {args.ckpt}: trained without actions, it cannot be steered; {cure}")
    if args.mode != "point" and not cfg.lambda_flow:
        cure = "use --mode point"
        raise V.UserError(f"ckpt {args.ckpt}: trained with lambda_flow 0, it samples no futures; {cure}")
    kind = "videos" if args.data_root or about["data"]["kind"] == "videos" else "scenes"
    if (args.data or kind) == "videos":
        source, model.cfg = E.open_videos(cfg, E.videos_of(about["data"], args.data_root))
        return model, source
    if args.data_root:
        raise V.UsageError("data_root: --data scenes reads no videos; leave one of the two out")
    shares = dict(zip(V.SCENE_KINDS, V.mix_shares(cfg.scene_mix)))
    known = [kind for kind in ("steered", "fork", "lane") if shares.get(kind)]
    args.kind = args.kind or (known or ["fork"])[0]
    return model, None


def plan_all(args):
    """Open, search, drive, write -> paths."""
    model, source = open_run(args)
    cfg, out, bar, plans = model.cfg, P.output_folder(args, "plan"), E.Bar(), []
    law, wish, cases = prepare(model, source, args)
    for number, case in enumerate(cases):
        plans.append(make_plan(model, case, law, args, number))
        bar.show((number + 1) / args.num_scenes, f"plan: {number + 1}/{args.num_scenes}")
    bar.close(f"plan: {len(plans)} of them, {V.describe_time(bar.seconds)}")
    figures = (regret_figures(plans) if plans[0].driven else {}) | model_figures(plans, cfg)
    say_figures(figures)
    about = {} if wish is None else {key: value for key, value in wish.about.items() if key != "picture"}
    wanted = f"{wish.quantity} = {wish.value:g}" if args.probe else args.goal or "a true future"
    settings = {name: getattr(args, name) for name in ("mode", "samples", "alpha", "part", "kind", "seed", "reach")}
    report = {"checkpoint": str(args.ckpt), "actions": list(cfg.action_names), "wanted": wanted, **about}
    report |= {
        "settings": settings | asdict(args.search),
        "figures": figures,
        "bounds": [law.low.tolist(), law.high.tolist()],
    }
    report["plans"] = [plan_record(plan) for plan in plans]
    paths = [out / "plan.json", out / "plan.png"]
    V.write_report(paths[0], E.without_nan(report))
    draw_plans(paths[1], plans, f"The first of {len(plans)} plans. Wanted: {wanted}; mode {args.mode}.", cfg)
    return paths


def main(argv=None):
    """Command line -> exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return V.report_errors(lambda: [V.say(path) for path in plan_all(parse_arguments(argv))] and V.EXIT_OK)


if __name__ == "__main__":
    sys.exit(V.report_errors(main))
