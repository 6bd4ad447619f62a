"""Faults from outside, and what becomes of the run: python tests/faults.py [--n 30] [--seed S].

Each run is a tiny one on one process or two. It gets one fault at a drawn moment, must end within a minute with one
message, and ends with the same bytes as an undisturbed run when the same command is given again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
END = 60  # seconds from the fault to the end of every process
WATCHDOG = 120  # seconds after which a run counts as hanging
PAUSE = 0.25  # seconds that a micro-batch takes longer
MARKS = ("<!-- faults -->", "<!-- /faults -->")  # in docs/reliability.md, around the table
TOLD = ("error: ", "interrupted by ")
RESULTS = ("*.safetensors", "eval_*.json", "fingerprints.json", "metrics.json", "aggregate_stat.csv")


@dataclass
class Outcome:
    """What became of a run."""

    code: int | None  # None: it had to be killed
    seconds: float  # from the fault to the end of the last process
    messages: list[str]
    output: str = ""


@dataclass
class Run:
    """One command line of the suite, in a folder of its own."""

    folder: Path
    script: str
    args: Sequence[str]
    processes: int = 1
    port: int = 29620
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """The run's save_dir."""
        return self.folder / "out"

    def start(self, **environment: str) -> subprocess.Popen:
        """Start it, with a pulse."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.glob("pulse.*"):
            file.unlink()
        command = [sys.executable]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={self.processes}"]
            command += [f"--master_port={self.port}"]
        command += [str(HERE / "fault_worker.py"), self.script, *self.args, f"save_dir={self.out}"]
        ours = {"FAULT_PULSE": str(self.folder / "pulse"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with (self.folder / "said").open("w") as said:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, **ours, **self.environment, **environment},
                stdout=said,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait_for(self, process: subprocess.Popen, count: int, rank: int = 0) -> bool:
        """Wait until a rank's pulse is at `count`; False if the run ends before."""
        file, deadline = self.folder / f"pulse.{rank}", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if file.is_file() and int(file.read_text() or 0) >= count:
                return True
            time.sleep(0.02)
        return False

    def wait(self, process: subprocess.Popen) -> Outcome:
        """Wait for the end of every process of it, under the watchdog."""
        began = time.monotonic()
        while (process.poll() is None or self.workers()) and time.monotonic() - began < WATCHDOG:
            time.sleep(0.1)
        code, seconds = process.poll(), time.monotonic() - began
        for pid in self.workers():
            code = None
            os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
            process.wait()
            code = None
        said = (self.folder / "said").read_text(errors="replace")
        return Outcome(code, seconds, [line for line in said.splitlines() if line.startswith(TOLD)], said)

    def workers(self) -> dict[int, int]:
        """The processes that run it: pid -> rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._ours(entry):
                    found[int(entry.name)] = int(_environment(entry).get("RANK", 0))
            except OSError:
                continue
        return found

    def _ours(self, entry: Path) -> bool:
        words = (entry / "cmdline").read_text().split("\0")
        ours = words[1:2] == ["-u"] or any(word.endswith("fault_worker.py") for word in words[1:3])
        return ours and f"save_dir={self.out}" in words

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return next(pid for pid, of in self.workers().items() if of == rank)

    def results(self) -> dict[str, bytes]:
        """The bytes that must not depend on what happened on the way."""
        found = (path for pattern in RESULTS for path in self.out.rglob(pattern) if "checkpoint-" not in str(path))
        return {str(path.relative_to(self.out)): path.read_bytes() for path in found}

    def again(self) -> Outcome:
        """The same command, undisturbed."""
        return self.wait(self.start())


def _environment(entry: Path) -> dict[str, str]:
    return dict(one.split("=", 1) for one in (entry / "environ").read_text().split("\0") if "=" in one)
