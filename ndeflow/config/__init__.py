"""YAML in, objects out: the signature of a class is the schema of its section.

`find` and `load` read files (`extends`, `vars`, overrides, interpolation) into plain dicts and lists;
`validate` checks a node against the signatures its `_target_`s name, before anything is built; `build` and
`section` make the objects; `describe` prints what may be set. Whatever is wrong is a `ConfigError` of one
line; `located` adds the file or override it was found in. Nothing here imports torch: a class is imported
when a `_target_` names it.

>>> build({"_target_": "torch.nn.Linear", "in_features": 2, "out_feature": 3}, "module.net")
Traceback (most recent call last):
ndeflow.config.errors.ConfigError: unknown key module.net.out_feature for torch.nn.Linear; did you mean out_features?
"""

from ndeflow.config.building import build, section, validate
from ndeflow.config.describing import describe
from ndeflow.config.errors import ConfigError
from ndeflow.config.loading import available, find, load, located, save

__all__ = ["ConfigError", "available", "build", "describe", "find", "load", "located", "save", "section", "validate"]
