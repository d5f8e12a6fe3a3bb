"""Split a folder of videos into train/ val/ test/, the same shares in every sub-folder, with links or copies.

    python tools/split_videos.py --input DIR --output DIR [--ratios 0.8,0.1,0.1] [--seed 42] [--copy]

Videos are those of DIR/videos where there is such a folder, else of DIR. Written under --output:
<side>/<sub-folder>/<name>, annotations/<side>/<sub-folder>/<stem>.json for those that DIR/annotations holds, and
split.json (settings and placement). The side is decided by the hash of seed and name, within each sub-folder, which has
a video on every side from three videos up. Sub-folders with fewer are split together, as one; fewer than three of those
all train.

The same command may be given again: what was placed stays on its side whatever has come since, and what is new is dealt
out so that the shares hold. So a grown folder may be split otherwise than one that was full from the start: a pure hash
would not depend on that, but it holds shares only roughly, and leaves small sub-folders without a side. Nothing is
deleted or overwritten.

Links are relative: a tree that holds input and output can be moved or mounted elsewhere. Give --copy where the input
will go away.
"""

import signal

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits for report_errors: imports take seconds

import hashlib
import math
import os
import secrets
import shutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V

SIDES = ("train", "val", "test")


def parse_ratios(text):
    """'0.8,0.1,0.1' -> [train, val, test] with sum 1. UsageError for any other text."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    usable = len(ratios) == 3 and all(0 <= ratio < math.inf for ratio in ratios) and ratios[0] > 0
    if not usable:
        raise V.UsageError(f"--ratios {V.shown(text)}: must be three numbers, train,val,test, none negative, train > 0")
    normalised = [round(ratio / sum(ratios), 6) for ratio in ratios]
    if abs(sum(ratios) - 1) > 1e-6:
        V.say(f"note: --ratios {text} are taken as {','.join(map(str, normalised))}")
    return normalised


def parse(argv):
    """Command line -> namespace, `ratios` a list, folders without links. UsageError names what is wrong."""
    parser = V.ArgumentParser(description="Split a folder of videos into train/ val/ test/.", allow_abbrev=False)
    parser.add_argument("--input", required=True, type=os.path.expanduser, help="folder of videos")
    parser.add_argument("--output", required=True, type=os.path.expanduser, help="folder to write")
    parser.add_argument("--ratios", default="0.8,0.1,0.1", help="shares of train, val and test")
    parser.add_argument("--seed", type=int, default=42, help="another seed, another split")
    parser.add_argument("--copy", action="store_true", help="copy the files; else links")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.input):
        parser.error(f"--input {args.input}: no such folder")
    args.ratios = parse_ratios(args.ratios)
    args.input, args.output = Path(args.input).resolve(), Path(args.output).resolve()
    if args.output.is_relative_to(args.input):
        parser.error(
            f"--output {args.output} lies in --input: its links would be found there as videos; choose another"
        )
    return args


def settings_of(args):
    """What decides where a video is placed, and how -> dict."""
    # the input as seen from the output: both may be moved together
    return {
        "split_of": os.path.relpath(args.input, args.output),
        "ratios": args.ratios,
        "seed": args.seed,
        "copy": args.copy,
    }


def read_split(folder, settings):
    """What an earlier call placed in the folder -> {name: side}, {} for a new one. UserError for any other folder."""
    path = folder / "split.json"
    try:
        if not path.is_file():
            if folder.exists() and any(folder.iterdir()):
                raise V.UserError(f"--output {folder} is not empty and holds no split.json; use another --output")
            return {}
        found = V.parse_json(V.read_text(path, V.MAX_LIST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise V.UserError(f"--output {folder}: cannot be used ({V.reason_of(error)})") from error
    for name, value in settings.items():
        there = found.get(name) if isinstance(found, dict) else None
        if there != value:
            raise V.UserError(
                f"--output {folder} holds another split ({name} {V.shown(there)}, not {V.shown(value)}); "
                f"use another --output"
            )
    return {name: side for side in SIDES for name in found.get(side, [])}


def hash_of(seed, name):
    """The place of a video in the order in which sides are dealt out."""
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).hexdigest()


def groups_of(names):
    """Names -> {sub-folder: its names}; those of sub-folders with fewer than three videos stand together under None."""
    sizes, groups = Counter(map(os.path.dirname, names)), {}
    for name in names:
        folder = os.path.dirname(name)
        groups.setdefault(folder if sizes[folder] >= len(SIDES) else None, []).append(name)
    return groups


def deal_out(names, placed, ratios, seed):
    """Give the names of a group that have no side one, in the order of their hashes -> {name: side} of all of them.

    It is a side that has none yet, else the one that lacks most to its share; fewer than three names all train.
    """
    sides = {name: placed[name] for name in names if name in placed}
    have, shares = Counter(sides.values()), {side: ratio for side, ratio in zip(SIDES, ratios) if ratio > 0}
    if len(names) < len(SIDES):
        shares = {"train": 1.0}
    for name in sorted(set(names) - set(sides), key=lambda name: hash_of(seed, name)):
        wants = {side: (not have[side], share * len(names) - have[side]) for side, share in shares.items()}
        sides[name] = max(wants, key=wants.get)
        have[sides[name]] += 1
    return sides


def place(source, target, copy):
    """Link to a file, or copy it, under a name that is whole from the start, unless that was done before -> whether it
    was not. UserError where anything else stands there."""
    link = os.path.relpath(source, target.parent)
    if os.path.lexists(target):
        is_link = target.is_symlink()
        if not is_link and copy and target.is_file() or is_link and not copy and os.readlink(target) == link:
            return False
        raise V.UserError(f"{target} stands there and was not placed by this split; move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        if copy:
            shutil.copy2(source, temporary)
        else:
            os.symlink(link, temporary)
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def find_annotation(folder, name):
    """Where `read_annotation` finds that of a video -> path, None for no such file."""
    stem = os.path.splitext(name)[0] + ".json"
    places = (folder / "annotations" / stem, folder / "annotations" / os.path.basename(stem))
    return next((path for path in places if path.is_file()), None)


def place_all(videos, sides, args):
    """Place videos and annotations -> how many of each are new. UserError where the disk refuses."""
    counts, shown = Counter(), V.is_terminal(sys.stderr)
    for number, video in enumerate(videos, 1):
        name = f"{sides[video.name]}/{video.name}"
        counts["videos"] += place(Path(video.path), args.output / name, args.copy)
        annotation = find_annotation(args.input, video.name)
        if annotation:
            target = args.output / "annotations" / (os.path.splitext(name)[0] + ".json")
            counts["annotations"] += place(annotation, target, args.copy)
        if shown:
            bar = V.progress_bar(number / len(videos), f"{number}/{len(videos)} videos")
            V.emit("\r" + bar + ("" if number < len(videos) else "\n"), sys.stderr)
    return counts


def describe(names, sides):
    """'train 102, val 13, test 13' of these names."""
    counts = Counter(sides[name] for name in names)
    return ", ".join(f"{side} {counts[side]}" for side in SIDES)


def tell(sides, gone):
    """Say how many videos stand where, what was pooled, and what has gone."""
    groups = groups_of(sides)
    small = groups.pop(None, [])
    for folder in sorted(groups):
        V.say(f"  {folder or '(no sub-folder)'}: {describe(groups[folder], sides)}")
    if small:
        names = V.name_some(sorted({os.path.dirname(name) or "(no sub-folder)" for name in small}))
        V.say(f"  fewer than {len(SIDES)} videos each, split together: {names}: {describe(small, sides)}")
    V.say(f"{len(sides)} videos: {describe(sides, sides)}")
    if gone:
        what = f"{len(gone)} placed videos are gone from --input, and links to them lead nowhere"
        V.say(f"WARNING: {what}: {V.name_some(gone)}", sys.stderr)


def split(argv):
    """Find the videos, decide their sides, write that down, place them."""
    args = parse(argv)
    settings = settings_of(args)
    listing = V.find_videos(str(args.input), "*")
    for note in listing.notes:
        V.say(note, sys.stderr)
    if not listing:
        raise V.UserError(f"--input {args.input}: no videos ({listing.seen})")
    placed = read_split(args.output, settings)
    names, sides = [video.name for video in listing], {}
    for group in groups_of(names).values():
        sides.update(deal_out(group, placed, args.ratios, args.seed))
    # before the files: a command that is cut off and given again, on a grown folder too, keeps to it
    kept = {**placed, **sides}
    by_side = {side: sorted(name for name in kept if kept[name] == side) for side in SIDES}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        V.write_report(args.output / "split.json", {**settings, **by_side})
        counts = place_all(listing, sides, args)
    except OSError as error:
        where = error.filename or args.output
        raise V.UserError(f"--output {args.output}: cannot be written ({V.reason_of(error)}: {where})") from error
    tell(sides, sorted(set(placed) - set(sides)))
    how = "copied" if args.copy else "linked"
    V.say(f"{counts['videos']} videos and {counts['annotations']} annotations {how} under {args.output}")


def main(argv=None):
    """Command line -> exit code."""
    return V.report_errors(split, sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
