"""Language models as policies: load them, pick the family that may move, ask for log-probabilities."""
