"""Pure functions of tensors: tilting, weights, intervals, the frontier, the certificate. Nothing here draws or trains.

One idea a file: tilt (log Z, mean and KL of the target), weights (how far weights can be trusted), baselines,
estimate (intervals, KL estimators), frontier, best_of_n, bounds, certificate, diagnose.

Import from the files, `from klimb.numbers.tilt import log_partition`. scipy and arviz_stats are slow to import, so
they are imported inside the functions that use them.
"""
