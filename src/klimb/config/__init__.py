"""What a run is: one schema for the YAML file, for `--name value` on the command line and for editors (`klimb schema`).

One idea a file: options (the schema), loading (files and options into it). Python users do not need any of this: the
verbs take values.
"""

from klimb.config.loading import load, read_yaml, schema
from klimb.config.options import (
    DESTINATIONS,
    FAMILIES,
    NEED_LOG_Z,
    TAUGHT,
    TRAINED,
    UNTRAINED,
    Aim,
    Config,
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
