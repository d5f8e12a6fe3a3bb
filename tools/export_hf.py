"""Write encoder and predictor of a checkpoint as a folder that transformers' VJEPA2Model reads.

    python tools/export_hf.py --ckpt FILE --out DIR [--key target|online] [--size PIXELS]

--out must be new or empty. --size names the side of the square pictures that it is for, by default the run's; the
format knows no others. What has no place there is named; docs/weights.md tells more.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import VJepa_AUTO_V2 as V


def run(argv):
    """Command line -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="checkpoint of a run")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--key", choices=("target", "online"), default="target", help="which of its two encoders")
    parser.add_argument("--size", type=int, default=0, help="side of the pictures in pixels; 0 = the run's")
    args = parser.parse_args(argv)
    count, origin = V.export_hf(args.ckpt, args.out, args.key, args.size)
    start = ", the start of SOON from the last tubelet" * (origin.cfg.soon_start == "last")
    V.say(f"{args.out}: {count} tensors of {args.ckpt} ({origin.what})")
    V.say(
        f"left out, no place there: mask token of SOON{start}, outcome head, flow net, read-out, queue, other encoder"
    )


if __name__ == "__main__":
    sys.exit(V.report_errors(run, sys.argv[1:]))
