"""What every process of an engine would do in the same way, done once before they are forked.

All of it is best effort: where vLLM has no such function, the engine does its own work, and that is all.
"""

from __future__ import annotations

import contextlib
import copy
import logging.config
from typing import Any


def warm_up() -> None:
    """Does it all; vLLM must have been imported."""
    # The documented place for a configurator of one's own.
    logging.config.dictConfigClass = RememberingConfigurator  # type: ignore[assignment]
    for step in (_configure_logging, _build_parser, _replace_kernels, _find_titles):
        with contextlib.suppress(Exception):
            step()


class RememberingConfigurator(logging.config.DictConfigurator):
    """Does not configure again what is configured in just that way.

    Each process of an engine does, and each time that goes through two thousand loggers for every one of the
    four hundred that vLLM has.
    """

    _last: dict[str, Any] | None = None

    def configure(self) -> None:
        """Applies the configuration, unless it is the one that was applied last."""
        if self._wanted != RememberingConfigurator._last:
            super().configure()
            RememberingConfigurator._last = self._wanted

    def __init__(self, config: dict[str, Any]) -> None:
        # To configure takes the dictionary apart.
        self._wanted = copy.deepcopy(config)
        super().__init__(config)


def _configure_logging() -> None:
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging

    configure_logging(LoggingConfig())


def _build_parser() -> None:
    """What is found out is kept by vLLM: that about the types of two hundred options."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser(FlexibleArgumentParser())


def _replace_kernels() -> None:
    """On CPUs vLLM goes through all modules for kernels that it replaces; our platform does so once."""
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()


def _find_titles() -> None:
    """The place of process titles is found by the environment, which a forked engine replaces."""
    import setproctitle

    setproctitle.getproctitle()
