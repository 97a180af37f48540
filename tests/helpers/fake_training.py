"""Programs in place of train.py, for sweeps."""

import json

from tests_training import RESULTS, ROOT

FAKE_RESULTS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import yaml
from onlinenorm.cli.compose import load_config
(folder / "config.yaml").write_text(yaml.safe_dump(load_config(sys.argv[1:])))
(folder / "results.json").write_text({json.dumps(RESULTS)!r})
"""
FAKE_TRAIN = (
    """
import os, signal, sys, time
from pathlib import Path
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(options["run_dir"].strip("'"))
with open(folder / "started", "a") as file:
    file.write("x")
print("epoch 1/3", flush=True)
if "recipe.lr" in options and float(options["recipe.lr"]) > 1 and not Path("repaired").exists():
    sys.exit("the loss became NaN")
if Path("slow").exists():
    def stop(number, frame):
        (folder / "saved").write_text(signal.Signals(number).name)
        sys.exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    Path("waiting").touch()
    time.sleep(60)
(folder / "metrics.csv").write_text("epoch,seconds\\n1,2.0\\n2,2.0\\n3,2.0\\n")
"""
    + FAKE_RESULTS
)
