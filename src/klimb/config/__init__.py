"""What a run is: one schema for the YAML file, for `--name value` on the command line and for editors (`klimb schema`).

One idea a file: options (the schema), kinds (of its parts that there are several of), methods (and what each reads), values (what
one may be), together (what goes with what), loading (files and options into it). Python users do not need any of this: the
verbs take values.
"""

from klimb.config.kinds import (
    TAUGHT,
    Aim,
    Context,
    EntropyBonus,
    Full,
    LengthNormalized,
    Lora,
    PlainTilt,
    Prefix,
    SoftPrompt,
    Teacher,
    VllmSampler,
)
from klimb.config.loading import load, read_yaml, schema
from klimb.config.methods import FAMILIES, NEED_LOG_Z, TRAINED, UNTRAINED
from klimb.config.options import Config
from klimb.config.together import DESTINATIONS

__all__ = [
    "DESTINATIONS",
    "FAMILIES",
    "NEED_LOG_Z",
    "TAUGHT",
    "TRAINED",
    "UNTRAINED",
    "Aim",
    "Config",
    "Context",
    "EntropyBonus",
    "Full",
    "LengthNormalized",
    "Lora",
    "PlainTilt",
    "Prefix",
    "SoftPrompt",
    "Teacher",
    "VllmSampler",
    "load",
    "read_yaml",
    "schema",
]
