"""Environment variables of the vLLM worker, made into vLLM's command line and explained. All of it is pure.

`translate` is the way in. What each variable is stands in `variables`, what older templates need in
`repairs`.
"""

from pilotlight.engines.flags.draft import without_prefix
from pilotlight.engines.flags.masking import mask_secrets, mask_value
from pilotlight.engines.flags.parallel import Ranks, TensorParallel, decide_tensor_parallel, read_ranks
from pilotlight.engines.flags.plan import Explanation, FlagError, FlagPlan, Source
from pilotlight.engines.flags.raw import config_path, read_config
from pilotlight.engines.flags.translation import named_files, translate
from pilotlight.engines.flags.values import clean_value, parse_boolean

__all__ = [
    "Explanation",
    "FlagError",
    "FlagPlan",
    "Ranks",
    "Source",
    "TensorParallel",
    "clean_value",
    "config_path",
    "decide_tensor_parallel",
    "mask_secrets",
    "mask_value",
    "named_files",
    "parse_boolean",
    "read_config",
    "read_ranks",
    "translate",
    "without_prefix",
]
