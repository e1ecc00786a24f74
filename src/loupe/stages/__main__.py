"""`python -m loupe.stages NAME` runs one stage in the current folder. DVC calls it."""

import argparse
import importlib

from loupe.config import Params
from loupe.stages.entry import run_stage
from loupe.stages.skipping import skip

OF_IMAGES = ("fetch", "ingest", "validate", "split", "prepare", "augment")
OF_TASKS = tuple(f"{verb}_{task}" for task in ("classifier", "detector") for verb in ("train", "evaluate", "export"))


def main() -> None:
    """Run the stage of that name, or skip it before its imports, which take seconds."""
    parser = argparse.ArgumentParser(prog="python -m loupe.stages", description=__doc__)
    parser.add_argument("stage", choices=OF_IMAGES + OF_TASKS)
    name: str = parser.parse_args().stage
    run_stage(lambda params: _run(name, params))


def _run(name: str, params: Params) -> None:
    if name in OF_TASKS and skip(*name.split("_")):
        return
    getattr(importlib.import_module(f"loupe.stages.{name}"), name)(params)


if __name__ == "__main__":
    main()
