"""klimb moves a language model up a reward inside a budget of KL: plan, train, measure, sample."""

__version__ = "0.1.0"
