"""How to draw completions; every sampler states the law it drew from."""
