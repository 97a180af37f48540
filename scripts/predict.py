#!/usr/bin/env python3
"""The five most likely classes of image files, by a trained network.

    scripts/predict.py runs/quickstart/online_clamp/seed0 shoe.png bag.jpg
    scripts/predict.py runs/table1/batch/seed0 photos/ --json > predictions.json

Images are seen as the run's validation images were. The clamp, where there is one, is kept. Exit code 0: all
predicted; 1: some files could not be read (named on stderr; the others are predicted), or a network of one's own lacks
its data set; 2: the run or the arguments do not allow it.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

from onlinenorm.cli.arguments import parse_options
from onlinenorm.deploy import DeployError, load_trained
from onlinenorm.deploy.command import ALLOW, exit_code
from onlinenorm.deploy.images import pick_device
from onlinenorm.deploy.predict import class_names, find_images, predict


def main(arguments: list[str] | None = None) -> int:
    """Predicts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or a checkpoint file in one")
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes an image (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON: a list with an entry for each file")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once (default 32)")
    parser.add_argument("--data-root", metavar="DIR", help="where the dataset lies, for its class names")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--allow", metavar="NAME", action="append", default=[], help=ALLOW)
    options = parse_options(parser, arguments)

    def program() -> int:
        for key, value in (("--top", options.top), ("--batch-size", options.batch_size)):
            if value < 1:
                raise DeployError(f"{key} {value}: must be at least 1")
        device = pick_device(options.device)
        files = find_images(options.images)
        trained = load_trained(options.run, options.data_root, "center_crop", options.allow)
        names, reason = class_names(trained)
        if reason:
            print(f"predict.py: classes are numbers only: {reason}", file=sys.stderr)
        found = []
        for prediction in predict(trained, files, names, device, options.top, options.batch_size):
            found.append(prediction)
            if prediction.error:
                print(f"predict.py: {prediction.file}: {prediction.error}", file=sys.stderr)
            elif not options.json:
                print(prediction.file)
                for label, name, share in prediction.classes:
                    print(f"  {share:7.2%}  {name} ({label})")
        if options.json:
            print(json.dumps([prediction.as_dict() for prediction in found], indent=2))
        return 1 if any(prediction.error for prediction in found) else 0

    return exit_code("predict.py", program)


if __name__ == "__main__":
    run_main(main)
