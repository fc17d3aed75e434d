"""A climb on the Ray cluster that this runs in: python recipes/ray_climb.py run.yaml --workers 2 [--gpu]."""

import argparse

from klimb.config import load
from klimb.integrations.ray import ray_run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--verb", default="climb", choices=["plan", "train", "climb"])
    options = parser.parse_args()
    config = load(options.config, [])
    print(ray_run(config, verb=options.verb, num_workers=options.workers, use_gpu=options.gpu))
