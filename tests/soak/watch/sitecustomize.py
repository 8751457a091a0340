"""Makes a gateway tell what it holds: on SIGUSR2 it writes its tasks and objects to the file `SOAK_CENSUS`.

Loaded by every Python that has this folder in its path; only `pilotlight up` listens.
"""

import os
import sys

if "SOAK_CENSUS" in os.environ and "up" in sys.argv[1:] + getattr(sys, "orig_argv", []):
    import signal

    def tell(*_: object) -> None:
        import asyncio
        import collections
        import gc
        import json
        import threading

        gc.collect()
        kinds: collections.Counter[str] = collections.Counter()
        for each in gc.get_objects():
            kind = type(each)
            kinds[f"{kind.__module__}.{kind.__qualname__}"] += 1
        held = {
            "tasks": collections.Counter(task.get_name() for task in asyncio.all_tasks()),
            "objects": {name: count for name, count in kinds.items() if count > 2},
            "blocks": sys.getallocatedblocks(),
            "threads": threading.active_count(),
        }
        target = os.environ["SOAK_CENSUS"]
        with open(f"{target}.new", "w") as file:  # noqa: PTH123 - as little as possible is imported here
            json.dump(held, file)
        os.replace(f"{target}.new", target)  # noqa: PTH105 - see above

    signal.signal(signal.SIGUSR2, tell)
