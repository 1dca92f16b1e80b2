"""Every scenario of the fault suite, in a short form (`make test`) and in full (`make faults`)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import attacks, damage, failing, full_disk, fuzz, interruptions, kills, power_loss, surroundings

Trials = Callable[..., Iterator[list[str]]]
SIZES = [200, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192]  # KiB


@dataclass(frozen=True)
class Scenario:
    """A kind of fault: the promises it tries, its trials (each a list of what was wrong), and how many of them in each form."""

    name: str
    promises: str
    trials: Trials
    short: dict[str, Any]
    full: dict[str, Any]
    needs: Callable[[], str] = lambda: ""  # why it cannot run here

    def run(self, folder: Path, *, in_full: bool) -> Iterator[list[str]]:
        """The trials of one form."""
        return self.trials(folder, **(self.full if in_full else self.short))


def _expected(trials: Callable[..., Iterator[list[damage.Miss]]]) -> Trials:
    """Trials without what is known to be missed."""

    def found(folder: Path, **options: Any) -> Iterator[list[str]]:
        for misses in trials(folder, **options):
            yield [str(miss) for miss in misses if (miss.kind, miss.what) not in damage.NOT_YET_REPORTED]

    return found


def _needs_mounts() -> str:
    return "" if full_disk.may_mount() else "this system lets only root mount a RAM disk (unshare -Urm)"


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder for the runs of a scenario, on a RAM disk where there is one."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="tensortape-faults-", dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


EVERY_FAULT = list(failing.FAULTS)
SOME_FAULTS = ["EIO", "EIO, though done", "KeyboardInterrupt"]

SCENARIOS = [
    Scenario(
        "SIGKILL at random instants of recording, resuming and adding a column",
        "P1 P2 P3",
        kills.kills,
        {"count": 5, "appends": 8, "seed": 1},
        {"count": 250, "appends": 24, "seed": 0},
    ),
    Scenario(
        "six processes write one run at once, two are killed",
        "P1 P2 P6",
        kills.together,
        {"trials": 1, "writers": 3, "seed": 0},
        {"trials": 20, "writers": 6, "seed": 1},
    ),
    Scenario(
        "SIGKILL after every single file operation (durability='rename')",
        "P1 P2 P3 P4",
        power_loss.killed,
        {"every": 97},
        {"every": 1},
    ),
    Scenario(
        "n-th file operation fails while recording",
        "P1 P2 P3 P7",
        partial(failing.nth_operation, job="recording"),
        {"faults": EVERY_FAULT, "first": 5, "step": 97},
        {"faults": EVERY_FAULT},
    ),
    Scenario(
        "n-th file operation fails while several threads record",
        "P1 P2 P3 P7",
        partial(failing.nth_operation, job="recording by threads"),
        {"faults": SOME_FAULTS, "first": 7, "step": 97},
        {"faults": SOME_FAULTS},
    ),
    Scenario(
        "n-th file operation fails while resuming",
        "P1 P2 P3 P7",
        partial(failing.nth_operation, job="resuming"),
        {"faults": SOME_FAULTS, "first": 3, "step": 97},
        {"faults": SOME_FAULTS},
    ),
    Scenario(
        "n-th file operation fails while overwriting",
        "P1 P2 P3 P7",
        partial(failing.nth_operation, job="overwriting"),
        {"faults": SOME_FAULTS, "first": 1, "step": 97},
        {"faults": SOME_FAULTS},
    ),
    Scenario("a signal every half millisecond (EINTR)", "P1 P3 P7", failing.signal_storm, {"trials": 1}, {"trials": 20}),
    Scenario(
        "full disk: RAM disks of 0.2 to 8 MiB",
        "P2 P3 P7",
        full_disk.tmpfs,
        {"kibibytes": SIZES[:1]},
        {"kibibytes": SIZES},
        _needs_mounts,
    ),
    Scenario(
        "full disk: files limited to 1 to 500 KiB (RLIMIT_FSIZE)",
        "P2 P3 P7",
        full_disk.file_size_limit,
        {"kibibytes": [150]},
        {"kibibytes": [1, 8, 30, 60, 100, 150, 200, 300, 400, 500]},
    ),
    Scenario(
        "power loss after every file operation (durability='fsync')",
        "P1 P2 P3 P4",
        power_loss.power_loss,
        {"fates": 3, "every": 151},
        {"fates": 4},
    ),
    Scenario(
        "power loss with durability='rename': nothing but what was recorded is read",
        "P4 P5",
        power_loss.power_loss_without_fsync,
        {"fates": 3, "every": 13},
        {"fates": 4},
    ),
    Scenario("one flipped bit", "P5", _expected(damage.flips), {"count": 33, "seed": 2}, {"count": 2000, "seed": 1}),
    Scenario(
        "a truncated or emptied object", "P5", _expected(damage.truncations), {"count": 11, "seed": 3}, {"count": 200, "seed": 3}
    ),
    Scenario("a deleted object", "P5", _expected(damage.deletions), {"count": 11, "seed": 4}, {"count": 200, "seed": 4}),
    Scenario("two swapped shards", "P5", _expected(damage.swaps), {"count": 6, "seed": 5}, {"count": 200, "seed": 5}),
    Scenario("a stale object put back", "P5", _expected(damage.stale), {"count": 6, "seed": 6}, {"count": 200, "seed": 6}),
    *(
        Scenario(
            f"an exception in {name}, a hook, a backward, a target or the loader",
            "P3 P8",
            partial(interruptions.interrupted, name=name),
            {"every": short},
            {"every": full},
        )
        for name, short, full in (("GPT-2", 47, 1), ("T5", 97, 2), ("torch encoder", 31, 1))
    ),
    Scenario(
        "a disk that is full from the n-th operation on, under a model",
        "P7 P8",
        surroundings.full_disk_under_a_model,
        {"every": 401},
        {"every": 9},
    ),
    Scenario("clocks that jump by up to a year", "P12", surroundings.jumping_clock, {"trials": 1}, {"trials": 20}),
    Scenario("secrets in the environment", "P14", surroundings.secrets, {}, {}),
    Scenario("documents made to do harm", "P13", attacks.hostile_documents, {}, {}),
    Scenario("files made to do harm", "P13", attacks.hostile_files, {}, {}),
    Scenario("rows made to do harm", "P13", attacks.hostile_rows, {}, {}),
    Scenario("fuzzed documents", "P13", fuzz.fuzzed, {"count": 60, "seed": 0}, {"count": 10_000, "seed": 1000}),
    Scenario("mutated documents", "P13", attacks.mutated_documents, {"count": 20, "seed": 0}, {"count": 2000, "seed": 1000}),
]
