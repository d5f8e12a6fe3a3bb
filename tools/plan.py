"""Plan with a trained world model: the actions that lead to a wanted future, by the cross-entropy method on latents.

    python tools/plan.py runs/x/checkpoints/ckpt_final.pt [--probe lateral=4 | --goal FILE] [--mode point|mean|cvar]

The run must know actions (`--actions steer,accel`). Sequences of actions, a vector per tubelet after NOW, are drawn as
training drove them; the model forecasts SOON under each, a cost judges the forecasts, the best ones say where the next
are drawn.

    cost     distance of predicted SOON latents to those of a goal clip, or of a probed quantity to a wanted value
    mode     point: of the point forecast; mean: over --samples futures; cvar: over the worst share --alpha of them
    scenes   the plan is driven in the simulator, the clip it gives is encoded and judged: its cost less that of the
             best true actions is the regret. Controls: random actions of training, and doing nothing. Without --goal
             and --probe the goal is a true future of the scene, at forks left and right in turn
    videos   a plan cannot be driven: it is held against the true actions, in the model's eyes and as numbers. The goal
             is the clip's own future, or --goal

Written to --out (default: the run's folder / plan): plan.json with all figures and plan.png (docs/planning.md).
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


# -- where actions lead


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
        speed = speed[0] + P.running(np.concatenate([[0], given["accel"]]), step)
    elif along == "speed":
        speed = np.concatenate([speed[:1], given["speed"]])
    speed = np.maximum(speed, 0)
    across = next((name for name in cfg.action_names if name in ACROSS), "")
    if across:
        turn = given[across]
        turn = turn if across == "yaw_rate" else np.tan(np.clip(turn, -1, 1)) * np.maximum(speed[1:], 1) / V.WHEELBASE
        yaw_rate = np.concatenate([yaw_rate[:1], turn])
    heading = np.clip(P.running(yaw_rate, step), -1.2, 1.2)
    moved = dict(s=P.running(speed, step), x=P.running(speed * np.tan(heading), step))
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
    """What is wanted of SOON. goal [m, D]: latents, of its last tubelet or of all, and their picture uint8 [H, W, 3];
    else a value of a quantity, with its probe's weights [features + 1] and what is said about it."""

    goal: torch.Tensor | None = None
    picture: np.ndarray | None = None
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


def wanted_latents(targets, part, cfg):
    """Targets [L, D] of a clip -> those of SOON that are wanted [m, D]: its last tubelet or all."""
    soon = targets[cfg.now_tokens : cfg.now_tokens + cfg.soon_tokens].float()
    return soon[-cfg.sites :] if part == "end" else soon


def own_goal(targets, frames, part, cfg):
    """SOON of a clip, its targets [L, D] and frames uint8 [T, H, W, 3] -> Wish."""
    return Wish(wanted_latents(targets, part, cfg), frames[cfg.now_frames + cfg.soon_frames - 1])


def case_of(model, wish, part, clip, actions, speed, title, **of_scene):
    """A clip uint8 [T, 3, H, W], actions [n, F, A] of true futures, the speed in NOW -> Case; its own SOON is the goal
    unless `wish` is given."""
    cfg, frames = model.cfg, clip.permute(0, 2, 3, 1).numpy()
    context, _, targets = model.see(clip[None].to(model.image_mean.device))
    own = dict.fromkeys(("speed", "yaw_rate"), np.zeros(1 + cfg.num_frames - cfg.now_frames))
    own["speed"] = own["speed"] + speed
    wish = wish or own_goal(targets[0], frames, part, cfg)
    return Case(title, frames[cfg.now_frames - 1], context, wish, actions, own, **of_scene)


def scene_case(model, wish, args, number):
    """Built-in scene `number` of a seed, whose goal is a true future unless `wish` is given -> Case."""
    cfg, kind, scene_seed = model.cfg, args.kind, PLAN_SEED + 10**6 * args.seed + number
    groups = [E.futures_where(scene_seed, cfg, kind, "choice", side, PER_CHOICE) for side in (-1, 0, 1)]
    groups = [[E.Job(scene_seed, seed, kind) for seed in seeds] for seeds in groups if seeds]
    jobs = sum(groups, [])
    clips, labels = zip(*(E.scene_pictures(job, cfg) for job in jobs))
    place, side = jobs.index(groups[number % len(groups)][0]), 0
    if wish is None:
        side = labels[place]["branch"]
    elif wish.quantity == "lateral" and kind in V.FORKS:
        side = int(np.sign(wish.value))
    if wish and wish.quantity and math.isnan(quantity_of(labels[place], wish.quantity, cfg)):
        text = f"probe {wish.quantity}: nobody knows it in scenes of kind {kind} (--probe, --kind)"
        raise V.UserError(text)
    true, speed = torch.stack([future_actions(one, cfg) for one in labels]), labels[0]["speed"][cfg.now_frames - 1]
    about = dict(title=f"{kind} scene {number}", side=side, job=E.Job(scene_seed, OTHER_FUTURE, kind))
    return case_of(model, wish, args.part, clips[place], true, speed, **about)


def idle_actions(case, cfg):
    """Doing nothing -> [1, F, A]: no steering, no acceleration, the speed of the last NOW frame."""
    still = [float(case.own["speed"][0]) if name == "speed" else 0.0 for name in cfg.action_names]
    return torch.tensor(still).expand_as(case.true[:1]).contiguous()


def targets_of(model, clips):
    """Frames uint8 [B, T, 3, H, W] -> targets [B, L, D] in fp32."""
    return model.make_targets(model.normalise(clips.to(model.image_mean.device))).float()


@torch.no_grad()
def drive(model, case, actions):
    """Drive actions [n, F, A] in the case's scene -> (costs [n], frames [n] of uint8 [T, H, W, 3], metres to the right
    at the end of SOON [n])."""
    cfg, costs, frames, places = model.cfg, [], [], []
    for one in actions:
        clip, labels = E.scene_pictures(case.job, cfg, Driver(one.double().numpy(), cfg))
        soon = wanted_latents(targets_of(model, clip[None])[0], "whole", cfg)
        costs.append(case.wish.of_clip(soon, labels, cfg))
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
        except V.BadFile:  # training named it
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
        targets = targets_of(model, frames).cpu()
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
        targets = targets_of(model, E.as_frames(frames)[None])[0]
    return own_goal(targets, frames, args.part, cfg)


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
        speed, found = np.nan_to_num(speed[cfg.now_frames - 1]), found + 1
        yield case_of(model, wish, args.part, E.as_frames(frames), actions[None], speed, video.name)
    if not found:
        raise V.UserError(f"data_root {source.root}: no held-out clip has the signals {names} (--data_root)")


# -- figures


def best_true(plan):
    """Number of the true actions that cost least: driven, or in the model's eyes for a video."""
    return int(np.argmin((plan.driven or plan.believed)["true"]))


def per_case(tables):
    """{row: values [n, ...]} of every case -> {row: their means [cases]} of plan, random actions and doing nothing."""
    return {name: np.array([np.mean(table[name]) for table in tables]) for name in ("plan", "random", "nothing")}


def compared(name, values, reading, whole=None, **more):
    """Plans beside random actions and doing nothing, {name: [cases]}: the mean, or the ratio to `whole` [cases] -> the
    figure. more: other controls."""
    statistic = np.mean if whole is None else E.mean_ratio
    rows = values if whole is None else {key: np.stack([row, whole], 1) for key, row in values.items()}
    beside = {"random actions": statistic(rows["random"]), "do nothing": statistic(rows["nothing"]), **more}
    return E.measured(name, rows["plan"], statistic, beside, RESAMPLES, reading=reading)


def regret_figures(plans):
    """Driven costs of scenes -> figures."""
    best = np.array([plan.driven["true"].min() for plan in plans])
    regret = {name: cost - best for name, cost in per_case([plan.driven for plan in plans]).items()}
    told = "Cost of the driven plan less that of the best true actions of the same scene: 0 is right"
    figures = compared("plan_regret", regret, told)
    told = "The same regret over that of random actions of training: 0 is as good as the best true actions, 1 as luck"
    figures |= compared("plan_regret_share", regret, told, regret["random"])
    if forked := [plan for plan in plans if plan.case.side]:
        sides = [{name: np.sign(row) == plan.case.side for name, row in plan.places.items()} for plan in forked]
        true = np.mean([side["true"][best_true(plan)] for side, plan in zip(sides, forked)])
        told = "Share of scenes in which the driven plan ends on the side of the wanted branch: 1 is right"
        figures |= compared("plan_right_branch", per_case(sides), told, **{"best true actions": true})
    return figures


def model_figures(plans, cfg):
    """What can be said without driving -> figures: costs in the model's eyes and, for videos, actions against true."""
    true = np.array([plan.believed["true"][best_true(plan)] for plan in plans])
    told = "Cost of the plan in the model's eyes over that of the best true actions: far below 1 the search finds "
    told += "sequences that the model likes better than any that leads there"
    figures = compared("plan_believed", per_case([plan.believed for plan in plans]), told, true)
    soon = cfg.soon_frames // cfg.tubelet_t
    for column, name in enumerate(() if plans[0].driven else cfg.action_names):
        apart = []
        for rows in (plan.rows for plan in plans):
            off = {row: (actions - rows["true"])[:, :soon, column] for row, actions in rows.items()}
            apart.append({row: values.abs().numpy() for row, values in off.items()})
        told = f"Mean distance of planned and true {name} over SOON, in its unit: 0 is right"
        figures |= compared(f"plan_error_{name}", per_case(apart), told)
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
    record = {"title": plan.case.title, "wanted_side": plan.case.side}
    if plan.driven:
        record |= {"scene_seed": plan.case.job.scene_seed, "kind": plan.case.job.kind}
        record |= {"driven_cost": {name: cost.tolist() for name, cost in plan.driven.items()}}
        record |= {"regret": plan.driven["plan"][0] - plan.driven["true"].min()}
        record |= {"lateral_m": {name: place.tolist() for name, place in plan.places.items()}}
    record |= {"model_cost": {name: cost.tolist() for name, cost in plan.believed.items()}}
    best, history = plan.rows["true"][best_true(plan)].tolist(), plan.found.history
    return record | {"actions": plan.found.actions.tolist(), "best_true_actions": best, "history": history}


# -- picture

LOOKS = {  # name -> title, colour, line width
    "random": ("random actions", P.UNIT["between"], 1.0),
    "nothing": ("do nothing", P.UNIT["point"], 1.6),
    "true": ("true futures", P.UNIT["truth"], 1.6),
    "plan": ("plan", P.UNIT["right"], 2.8),
}


def plot_frames(figure, plan, cfg):
    """NOW, the goal, and what plan, best true actions and random ones lead to."""
    middle, last = cfg.now_frames + cfg.soon_frames // 2 - 1, cfg.now_frames + cfg.soon_frames - 1
    shown = [(plan.case.now, "NOW", ""), (plan.case.wish.picture, "goal, end of SOON", "true")]
    if plan.frames:
        own, best = plan.frames["plan"][0], plan.frames["true"][best_true(plan)]
        shown += [(best[last], "best true actions", "true"), (own[middle], "plan, middle of SOON", "plan")]
        shown += [(own[last], "plan, end of SOON", "plan")]
        shown += [(plan.frames["random"][0][last], "random actions", "random")]
    rows = math.ceil(len(shown) / 3)
    for axes, (picture, title, name) in zip(figure.subplots(rows, len(shown) // rows, squeeze=False).flat, shown):
        colour = LOOKS[name][1] if name else "black"
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=9, color=colour, pad=3)
        axes.spines[:].set(color=colour, linewidth=2)
        if picture is None:  # a probed quantity has none
            axes.axis("off")
        else:
            axes.imshow(picture)


def plot_paths(axes, plan, cfg):
    """From above: where the actions lead up to the end of SOON."""
    end = 1 + cfg.soon_frames
    for name, (title, colour, width) in LOOKS.items():
        for number, actions in enumerate(plan.rows[name]):
            path = reckon(actions.numpy(), cfg, plan.case.own)
            label = title if number == 0 else None
            axes.plot(path["x"][:end], path["s"][:end], color=colour, linewidth=width, label=label)
    axes.plot([0], [0], "s", color="black")
    reach = max(2.0, *np.abs(axes.get_xlim()))
    axes.set(xlim=(-reach, reach), xlabel="metres to the right", ylabel="metres ahead")
    axes.set_title("from above, to the end of SOON", fontsize=10)


def plot_costs(axes, plan):
    """Cost in the model's eyes over the iterations, with that of the best true actions and of doing nothing."""
    best, elites, everyone = np.array(plan.found.history).T
    true, nothing = plan.believed["true"][best_true(plan)], plan.believed["nothing"][0]
    looks = (("all candidates", everyone, ":", 1), ("elites", elites, "--", 1.4), ("best", best, ".-", 2.4))
    for label, values, style, width in looks:
        axes.plot(np.arange(1, len(best) + 1), values, style, color=LOOKS["plan"][1], linewidth=width, label=label)
    for label, level, name in (("best true", true, "true"), ("do nothing", nothing, "nothing")):
        axes.axhline(level, color=LOOKS[name][1], linewidth=1.4, label=label)
    axes.set(xlabel="iteration", ylim=(0, 1.12 * max(everyone.max(), nothing, true)))
    axes.set_title("cost in the model's eyes", fontsize=10)


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
        for axes in (above, costs):
            axes.spines[["top", "right"]].set_visible(False)
            if plan is shown[0]:
                axes.legend(frameon=False, fontsize=8)
        wanted = {-1: ", wanted: left", 1: ", wanted: right"}.get(plan.case.side, "")
        row.suptitle(plan.case.title + wanted, fontsize=12)
    figure.supxlabel(caption, fontsize=10)
    P.save_figure(figure, path)


# -- the command


QUANTITIES = ("lateral", *E.SIGNALS)
NUMBERS = (  # flag, its default, smallest and largest value, what it says
    ("--samples", 8, (1, 1024), "futures per candidate, in modes mean and cvar"),
    ("--alpha", 0.25, (0.001, 1), "worst share of the futures that cvar averages"),
    ("--iterations", Search.iterations, (1, 1000), "rounds of the search"),
    ("--population", Search.population, (2, 10**5), "candidates of a round"),
    ("--elites", Search.elites, (1, 10**5), "of these, the best that say where to go on"),
    ("--momentum", Search.momentum, (0, 0.99), "share of the last round that stays"),
    ("--smoothing", Search.smoothing, (0, 0.99), "correlation in time of the noise"),
    ("--reach", 1.0, (0, 1000), "how far from what training drove, in the distance of neighbours there; 0: anywhere"),
    ("--start", 0.0, (0, 10**7), "where the goal's window begins, in seconds"),
    ("--num_scenes", 16, (1, 10**4), "scenes or clips to plan from"),
    ("--num_workers", 2, (0, 64), "processes that draw clips for the probe"),
    ("--seed", 0, (0, 10**4), "scenes, candidates and noise"),
)


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
    path, flag = dict(default="", type=os.path.expanduser), parser.add_argument
    flag("ckpt", metavar="CHECKPOINT", type=os.path.expanduser, help="checkpoint of a run that knows actions")
    flag("--out", **path, help="output folder [the run's folder / plan]")
    flag("--goal", **path, help="video whose SOON is wanted, a whole clip long")
    flag("--probe", default="", help=f"QUANTITY=VALUE wanted at the end of SOON: {', '.join(QUANTITIES)}")
    flag("--part", default="end", choices=("end", "whole"), help="of SOON that must be like the goal [end]")
    flag("--mode", default="point", choices=("point", "mean", "cvar"), help="what of a forecast is judged [point]")
    flag("--data", default="", choices=("", "scenes", "videos"), help="plan from these [what the run learned from]")
    flag("--kind", default="", choices=("", *V.SCENE_KINDS), help="kind of the scenes [a fork that the run knows]")
    flag("--data_root", **path, help="videos to plan from, with signals in annotations [the run's own]")
    flag("--init_from", **path, help="where the frozen weights of the run are, if they were moved")
    flag("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    for name, default, _, text in NUMBERS:
        flag(name, type=type(default), default=default, help=f"{text} [{default:g}]")
    args = parser.parse_args(argv)
    E.check_limits(args, {name[2:]: limits for name, _, limits, _ in NUMBERS})
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
        if args.kind:
            raise V.UsageError(
                f"kind {args.kind}: videos have none; leave it out, or plan from scenes (--kind, --data)"
            )
        source, model.cfg = E.open_videos(cfg, E.videos_of(about["data"], args.data_root))
        return model, source
    if args.data_root:
        raise V.UsageError("data_root: --data scenes reads no videos; leave one of the two out")
    shares = dict(zip(V.SCENE_KINDS, V.mix_shares(cfg.scene_mix)))
    known = [kind for kind in ("steered", "fork", "lane") if shares[kind]]
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
    about = {} if wish is None else wish.about
    wanted = f"{wish.quantity} = {wish.value:g}" if args.probe else args.goal or "a true future"
    settings = {name: getattr(args, name) for name in ("mode", "samples", "alpha", "part", "kind", "seed", "reach")}
    report = {"checkpoint": str(args.ckpt), "actions": list(cfg.action_names), "wanted": wanted, **about}
    report |= {"settings": settings | asdict(args.search), "figures": figures}
    report |= {"bounds": [law.low.tolist(), law.high.tolist()], "plans": [plan_record(plan) for plan in plans]}
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
