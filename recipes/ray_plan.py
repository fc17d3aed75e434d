"""A plan's pool of millions of draws on a Ray cluster: python recipes/ray_plan.py run.yaml --workers 8 [--gpu] [--resume]."""

import argparse

from klimb.config import load
from klimb.integrations.ray import plan_over_ray

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    config = load(options.config, [])
    print(plan_over_ray(config, num_workers=options.workers, use_gpu=options.gpu, resume=options.resume))
