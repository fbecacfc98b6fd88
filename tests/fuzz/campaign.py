"""Run all fuzzers in turn for a long time, go on after failures, and write counts and failures to a log.

PYTHONPATH=.:tests python tests/fuzz/campaign.py --seconds 7200 --log fuzz.log --keep failures
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from fuzz.harness import run
from fuzz.test_fuzz import FUZZERS

# Each fuzzer runs for this many seconds of CPU time before the next one.
TURN = 5.0
MEMORY = 12 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="time for all fuzzers together (600)")
    parser.add_argument("--log", type=Path, default=Path("fuzz.log"), help="the log, to which lines are appended")
    parser.add_argument("--keep", type=Path, default=Path("failures"), help="folder for the files that failed")
    parser.add_argument("--only", nargs="+", choices=FUZZERS, default=list(FUZZERS), metavar="NAME", help="(all)")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    args.keep.mkdir(parents=True, exist_ok=True)
    totals: dict[str, Counter[str]] = {name: Counter() for name in args.only}
    end = time.monotonic() + args.seconds
    with args.log.open("a") as log, tempfile.TemporaryDirectory() as folder:

        def tell(text: str) -> None:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=log, flush=True)

        tell(f"START {len(args.only)} fuzzers, {args.seconds:g} seconds")
        while time.monotonic() < end:
            for name in args.only:
                fuzzer = FUZZERS[name]
                fuzzer.make(random.Random(0))  # This may import modules.
                seed, stop = time.time_ns() // 1000, time.process_time() + TURN
                while time.process_time() < stop:
                    content = fuzzer.make(random.Random(seed))
                    # Code outside Python cannot be interrupted. This writes its traceback to the log.
                    faulthandler.dump_traceback_later(300, exit=True, file=log)
                    try:
                        totals[name][run(fuzzer, content, Path(folder))] += 1
                    except AssertionError as error:
                        totals[name]["FAILED"] += 1
                        kept = args.keep / f"{name}-{seed}"
                        kept.write_bytes(content)
                        tell(f"FAILED {name}, KEDIT_FUZZ_SEED={seed}, {kept}: {error}\n{traceback.format_exc()}")
                    seed += 1
                faulthandler.cancel_dump_traceback_later()
                tell(f"COUNT {name} {totals[name].total()} files: {dict(totals[name])}")
            tell(f"SUM {sum(map(Counter.total, totals.values()))} files, {time.process_time():.0f} s of CPU time")
        tell("END")


if __name__ == "__main__":
    main()
