"""`python -m loupe.stages NAME` runs one stage in the current folder. DVC calls it."""

import argparse
import gc
import importlib
from collections.abc import Callable
from functools import partial

from loupe.config import Params
from loupe.stages.entry import end_with_parent, run_stage
from loupe.stages.skipping import find_reason, skip

OF_IMAGES = ("fetch", "ingest", "validate", "split", "prepare", "augment")
OF_TASKS = tuple(f"{verb}_{task}" for task in ("classifier", "detector") for verb in ("train", "evaluate", "export"))


def main() -> None:
    """Run the stage of that name, or skip it before its imports, which take seconds."""
    parser = argparse.ArgumentParser(prog="python -m loupe.stages", description=__doc__)
    parser.add_argument("stage", choices=OF_IMAGES + OF_TASKS)
    end_with_parent()
    run_stage(_find_stage(parser.parse_args().stage))


def _find_stage(name: str) -> Callable[[Params], None]:
    """Imported by now: libraries set how much they say as they are imported, and `run_stage` sets it anew."""
    if name in OF_TASKS:
        verb, task = name.split("_")
        reason = find_reason(verb, task)
        if reason is not None:
            return partial(skip, verb, task, reason)
    gc.disable()  # nothing that is imported is garbage, and to look for some takes a second of a stage's seven
    stage: Callable[[Params], None] = getattr(importlib.import_module(f"loupe.stages.{name}"), name)
    gc.freeze()  # nor is it later
    gc.enable()
    return stage


if __name__ == "__main__":
    main()
