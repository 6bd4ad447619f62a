"""Faults from outside, and what becomes of the run: python tests/faults.py [--n 30] [--seed S].

Each run is a tiny one on one process or two. It gets one fault at a drawn moment, must end within a minute with one
message, and ends with the same bytes as an undisturbed run when the same command is given again.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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


@dataclass
class Fault:
    """What happens to a run, at a moment of it."""

    name: str
    processes: int
    happens: Callable[[Run, subprocess.Popen], None] = lambda run, process: None
    environment: dict[str, str] = field(default_factory=dict)
    mend: Callable[[Run], None] = lambda run: None  # before the same command is given again
    code: int | None = None  # that must come of it; None: any but 0


def kill(rank: int) -> Callable[[Run, subprocess.Popen], None]:
    """Kill a rank."""
    return lambda run, process: os.kill(run.pid(rank), signal.SIGKILL)


def send(name: str) -> Callable[[Run, subprocess.Popen], None]:
    """Send a signal to what was started: the script, or torchrun, which passes it on to its workers."""
    return lambda run, process: process.send_signal(getattr(signal, name))


def remove(run: Run, process: subprocess.Popen) -> None:
    """Remove the run's folder; what writes at this moment is overtaken."""
    while run.out.exists():
        shutil.rmtree(run.out, ignore_errors=True)


def fill(run: Run, process: subprocess.Popen) -> None:
    """Fill the small disk that the run's folder is on."""
    with contextlib.suppress(OSError), (run.folder / "out" / "..fill").open("wb", buffering=0) as full:
        while True:
            full.write(bytes(2**14))


def unfill(run: Run) -> None:
    (run.out / "..fill").unlink(missing_ok=True)


def read_only(run: Run, process: subprocess.Popen) -> None:
    """Make the small disk read-only, as a file system does after an error. Open files would be in the way of it."""
    subprocess.run(["mount", "-o", "remount,ro", str(run.out)], check=False)


def writable(run: Run) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(run.out)], check=True)


def faults(disks: bool) -> list[Fault]:
    """All kinds.

    Args:
        disks: whether a small disk can be mounted.
    """
    found = [Fault(f"kill -9 of rank {rank}", n, kill(rank)) for n, rank in ((1, 0), (2, 0), (2, 1))]
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        found.append(Fault(name, 1, send(name), code=75))
        if name != "SIGUSR1":  # torchrun passes it on only where it is told to, as run.sh does
            found.append(Fault(f"{name} to torchrun", 2, send(name), code=1))
    found.append(Fault("SIGUSR1 to one worker", 2, lambda run, _: os.kill(run.pid(1), signal.SIGUSR1), code=1))
    found += [Fault("out of memory on rank 1", 2, environment={"FAULT_RAISE": "1:{at}:oom"})]
    found += [Fault("out of memory", 1, environment={"FAULT_RAISE": "0:{at}:memory"})]
    found += [Fault("rank 1 alone refuses", 2, environment={"FAULT_RAISE": "1:{at}:bad"})]
    found += [Fault("folder removed", n, remove) for n in (1, 2)]
    if disks:
        found += [Fault("disk full", n, fill, mend=unfill) for n in (1, 2)]
        found += [Fault("folder read-only", 1, read_only, mend=writable)]
    return found


def jobs(model: Path) -> dict[str, list[str]]:
    """The command lines, by name; the global batch is 4 on one process and on two."""
    common = ["model_family=tiny", f"data_path={REPO / 'data' / 'mini'}", f"model_path={model}", "progress=false"]
    train = [
        *common,
        "split=forget10",
        "lr=1e-3",
        "num_epochs=2",
        "checkpoint_every=1",
        "gradient_accumulation_steps=1",
    ]
    return {
        "forget.py": [*train, "forget_loss=grad_diff"],
        "evaluate_util.py": [*common, "split=forget10", "ds_size=8", "generation.max_length=80"],
    }


def moments(script: str, processes: int) -> int:
    """How many micro-batches a rank has in a run that nothing happens to."""
    return 20 if script == "forget.py" else 6 // processes


def command(script: str, model: Path, processes: int) -> list[str]:
    """A script's command line on so many processes."""
    batch = [f"batch_size={4 // processes}"] if script == "forget.py" else []
    return [*jobs(model)[script], *batch]


def inject(fault: Fault, script: str, at: int, folder: Path, model: Path, whole: dict[str, bytes]) -> tuple[str, ...]:
    """One fault in one run, and the same command again.

    Returns:
        The row of the table: fault, processes, script, moment, code, seconds, what was said, and what came of it.
    """
    run = Run(folder, script, command(script, model, fault.processes), fault.processes)
    disk = fault.happens in (fill, read_only)
    if disk:
        run.out.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(run.out)], check=True)
    try:
        asked = {name: value.format(at=at) for name, value in fault.environment.items()}
        process = run.start(FAULT_PAUSE=str(PAUSE), **asked)
        if run.wait_for(process, at) and not asked:
            fault.happens(run, process)
        elif asked:
            process.wait(300)
        ended = run.wait(process)
        fault.mend(run)
        again = run.again()
        same = run.results() == whole
        (folder / "said.again").write_text(again.output)
        verdict = _verdict(fault, ended, again, same)
    finally:
        if disk:
            subprocess.run(["umount", str(run.out)], check=False)
    line = (ended.messages or ["-"])[0].split(" (")[0].replace(str(folder), "").replace("|", "/")
    code, seconds = "hangs" if ended.code is None else str(ended.code), f"{ended.seconds:.0f}"
    return fault.name, str(fault.processes), script, str(at), code, seconds, line, verdict


def _verdict(fault: Fault, ended: Outcome, again: Outcome, same: bool) -> str:
    wrong = []
    if ended.code is None or ended.seconds > END:
        wrong.append("hangs")
    if ended.code == 0 or (fault.code is not None and ended.code != fault.code):
        wrong.append(f"code {ended.code}")
    silent = fault.name.startswith("kill -9") and fault.processes == 1
    if len(ended.messages) != (0 if silent else 1):
        wrong.append(f"{len(ended.messages)} messages")
    if again.code != 0:
        wrong.append("does not go on")
    elif not same:
        wrong.append("other bytes")
    return ", ".join(wrong) or "whole, the same bytes"


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a small disk."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]).returncode:
        return False
    return subprocess.run(["umount", str(folder)]).returncode == 0


def all_of(n: int, seed: int, folder: Path, kinds: Callable[[Fault], bool] = lambda fault: True) -> list[tuple]:
    """So many faults, each kind as often as the others, at drawn moments."""
    from conftest import random_llama

    draw = random.Random(seed)
    model = random_llama(folder / "model")
    drawn = [fault for fault in faults(can_mount(folder / "disk")) if kinds(fault)]
    whole: dict[tuple[str, int], dict[str, bytes]] = {}
    rows = []
    for i in range(n):
        fault = drawn[i % len(drawn)]
        late = fault.happens in (fill, read_only, remove)  # an evaluation's last set is not in the middle of anything
        script = "forget.py" if late or (i // len(drawn) + i) % 3 else "evaluate_util.py"
        key = script, fault.processes
        if key not in whole:
            run = Run(folder / f"whole{i}", script, command(script, model, fault.processes), fault.processes)
            assert run.again().code == 0, (run.folder / "said").read_text()
            whole[key] = run.results()
        at = draw.randint(1, moments(*key) - (4 if script == "forget.py" else 1))
        rows.append(inject(fault, script, at, folder / f"run{i}", model, whole[key]))
        sys.stdout.write(" | ".join(rows[-1]) + "\n")
        sys.stdout.flush()
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    head = ("fault", "processes", "script", "at", "exit code", "seconds", "said", "run again")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Inject, and put the table into docs/reliability.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None)
    asked = parser.parse_args()
    seed = random.randrange(10**6) if asked.seed is None else asked.seed
    folder = Path(tempfile.mkdtemp(prefix="faults."))
    sys.stdout.write(f"seed {seed}, in {folder}\n")
    rows = all_of(asked.n, seed, folder)
    bad = [row for row in rows if row[-1] != "whole, the same bytes"]
    page = REPO / "docs" / "reliability.md"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    told = f"`python tests/faults.py --n {asked.n} --seed {seed}`: {len(rows) - len(bad)} of {len(rows)} whole."
    page.write_text(
        f"{before}{MARKS[0]}\n{told}\n\n{table(rows)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8"
    )
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(REPO)]
    import environment  # noqa: F401 - first: what it sets is read when the others are imported

    sys.exit(main())
