"""Run folders: what may be written where, and what may be removed."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import REPO
from omegaconf import OmegaConf

import utils
from tofu.runtime import claim, machine, provenance, run_folder

CFG = OmegaConf.create({"lr": 1e-5})


@pytest.fixture(autouse=True)
def no_claims():
    yield
    claim.release()


def names(folder):
    """What is in a folder beside the run's own notes."""
    return {path.name for path in folder.iterdir()} - {run_folder.WRITTEN, claim.CLAIM, machine.PATCH}


def start(folder, **changes):
    return run_folder.start_run(CFG, folder, **{"overwrite": False, "inputs": ()} | changes)


def test_a_run_makes_its_folder_and_a_refused_one_can_start_again(tmp_path):
    for _ in range(2):
        folder = start(tmp_path / "runs" / "one")
        assert names(folder) == {"config.yaml", "versions.json"}
    assert OmegaConf.load(folder / "config.yaml") == CFG


@pytest.mark.parametrize("name", ["config.yaml", "versions.json", "notes.txt"])
def test_what_is_not_this_suites_is_never_removed(tmp_path, name):
    """One of the two names alone is as much somebody's as any other file."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(utils.BadInput, match="exists: name another"):
        start(tmp_path)
    if name != "versions.json":
        with pytest.raises(utils.BadInput, match="is not a run of this suite"):
            start(tmp_path, overwrite=True)
    assert (tmp_path / name).read_text() == "mine"


def test_a_start_that_is_killed_can_be_started_again(tmp_path, monkeypatch):
    """Between removing the old run and explaining the new one the folder stays known as this suite's."""
    start(tmp_path)
    for name in ("model.safetensors", run_folder.REFERENCE):
        run_folder.note(tmp_path, name)
        (tmp_path / name).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "_explain", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(tmp_path, overwrite=True, keep=(run_folder.REFERENCE,))
    assert names(tmp_path) == {"versions.json", run_folder.REFERENCE}
    start(tmp_path, overwrite=True)
    assert names(tmp_path) == {"config.yaml", "versions.json"}


def test_overwriting_leaves_runs_in_folders_of_their_own(tmp_path):
    start(tmp_path)
    run_folder.note(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors").write_text("old")
    start(tmp_path / "other")
    start(tmp_path, overwrite=True)
    assert names(tmp_path) == {"config.yaml", "other", "versions.json"}


def test_a_recipe_is_the_finetuned_models(tmp_path):
    """Of an unlearned model: that of the model it began with; of a folder without a record, nothing."""
    made = {"lr": 7e-4, "num_epochs": 10, "batch_size": 16, "gradient_accumulation_steps": 1, "split": "full"}
    for name, cfg in (("full", made), ("npo", {"lr": 1e-4, "forget_loss": {}, "model_path": str(tmp_path / "full")})):
        (tmp_path / name).mkdir()
        OmegaConf.save(OmegaConf.create(cfg), tmp_path / name / provenance.CONFIG)
    expected = "lr=0.0007 num_epochs=10 batch_size=16 gradient_accumulation_steps=1"
    assert provenance.recipe(str(tmp_path / "full")) == provenance.recipe(str(tmp_path / "npo")) == expected
    assert provenance.recipe(str(tmp_path)) == provenance.recipe("owner/model") == provenance.recipe(None) == ""


MINE = ("notes.txt", "weights.safetensors", "eval_notes.json", "checkpoint-9/notes.txt", "plots/one.png")


@pytest.mark.parametrize("list_kept", [True, False], ids=["by its list", "of an older version"])
def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path, list_kept):
    start(tmp_path)
    theirs = ("model.safetensors", "config.json", "tokenizer.json", "trainer_state.json", "finished.json")
    for name in theirs:
        run_folder.note(tmp_path, name)
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoint-9").mkdir()
    run_folder.note(tmp_path / "checkpoint-9", "eval_log.json")
    (tmp_path / "checkpoint-9" / "eval_log.json").write_text("{}")
    mine = [name for name in MINE if list_kept or name not in ("weights.safetensors", "eval_notes.json")]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    if not list_kept:
        for path in tmp_path.rglob(run_folder.WRITTEN):
            path.unlink()
    start(tmp_path, overwrite=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left - {machine.PATCH} == {*mine, "config.yaml", "versions.json", run_folder.WRITTEN, claim.CLAIM}


class TestClaims:
    """Two runs into one folder: the second stops."""

    HOLD = "import sys; from pathlib import Path; from tofu.runtime import claim; claim.make(Path(sys.argv[1]));"

    def test_a_second_process_is_refused_until_the_first_is_gone(self, tmp_path, caplog):
        code = f"{self.HOLD} print('held', flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        other = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "held\n"
        for attempt in (start, lambda folder: run_folder.start_evaluation(CFG, folder, overwrite=True, own=())):
            with pytest.raises(
                utils.BadInput, match=f"another run writes there .process {other.pid} on .*, started 20"
            ):
                attempt(tmp_path / "run")
        other.kill()
        other.wait()
        start(tmp_path / "run")
        assert "is gone (process" in caplog.text

    def test_another_machines_claim_is_believed(self, tmp_path):
        (tmp_path / claim.CLAIM).write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "then"}))
        with pytest.raises(utils.BadInput, match=f"process 1 on elsewhere, started then.*remove {tmp_path}"):
            start(tmp_path)

    def theirs(self, folder: Path, **more) -> Path:
        """A claim of a process on another machine."""
        found = {"host": "elsewhere", "pid": 1, "start": "then", "beat": claim.BEAT, **more}
        (folder / claim.CLAIM).write_text(json.dumps(found))
        return folder / claim.CLAIM

    def test_another_machines_claim_without_a_sign(self, tmp_path, monkeypatch, caplog):
        """Old by its time; then new, and nothing comes; then with signs."""
        os.utime(self.theirs(tmp_path), (0, time.time() - claim.QUIET - 1))
        start(tmp_path)
        assert "is gone (process 1 on elsewhere, started then), its claim is replaced" in caplog.text
        run_folder.finish_run(tmp_path, {})
        monkeypatch.setattr(claim, "PAUSE", 0.05)
        monkeypatch.setattr(claim, "QUIET", 0.2)
        for name in ("silent", "alive"):
            (tmp_path / name).mkdir()
            self.theirs(tmp_path / name)
        start(tmp_path / "silent")
        monkeypatch.setattr(claim, "QUIET", 20)
        over, file = threading.Event(), tmp_path / "alive" / claim.CLAIM

        def live() -> None:
            while not over.wait(0.05):
                os.utime(file)

        thread = threading.Thread(target=live)
        thread.start()
        with pytest.raises(utils.BadInput, match="another run writes there .process 1 on elsewhere"):
            start(tmp_path / "alive")
        over.set()
        thread.join()

    def test_a_job_that_was_put_back_into_the_queue(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        self.theirs(tmp_path, job="7", restart=1)
        start(tmp_path)
        found = json.loads((tmp_path / claim.CLAIM).read_text())
        assert (found["job"], found["restart"], found["pid"]) == ("7", 2, os.getpid())

    def test_one_takes_over_what_several_want(self, tmp_path):
        """Three processes and thirty stale claims: each is taken once."""
        for i in range(30):
            (tmp_path / f"{i}").mkdir()
            theirs = {"host": claim.socket.gethostname(), "pid": 1, "born": "-1"}
            (tmp_path / f"{i}" / claim.CLAIM).write_text(json.dumps(theirs))
        code = (
            "import sys; from pathlib import Path; from tofu.runtime import claim\n"
            "print('ready', flush=True); sys.stdin.read(1)\n"
            "for i in range(30):\n"
            "    try: claim.take(Path(sys.argv[1]) / f'{i}'); print(i, flush=True)\n"
            "    except Exception: pass\n"
            "print('end', flush=True); sys.stdin.read(1)"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        takers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPO, **pipes) for _ in range(3)]
        assert [one.stdout.readline() for one in takers] == ["ready\n"] * 3
        for one in takers:
            one.stdin.write("g")
            one.stdin.flush()
        took = []
        for one in takers:
            took += (int(line) for line in iter(one.stdout.readline, "end\n"))
        for one in takers:
            one.communicate("s")
        assert sorted(took) == list(range(30))

    def test_a_pid_that_is_used_again_is_another_process(self, tmp_path):
        theirs = {"host": claim.socket.gethostname(), "pid": 1, "born": "-1", "start": "then"}
        (tmp_path / claim.CLAIM).write_text(json.dumps(theirs))
        start(tmp_path)
        assert json.loads((tmp_path / claim.CLAIM).read_text())["pid"] == os.getpid()

    def test_a_process_that_nobody_has_waited_for_is_gone(self, tmp_path):
        other = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays in the kernel's table
        theirs = {"host": claim.socket.gethostname(), "pid": other.pid}
        theirs["born"] = (claim.Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split())[19]
        (tmp_path / claim.CLAIM).write_text(json.dumps(theirs))
        start(tmp_path)
        assert json.loads((tmp_path / claim.CLAIM).read_text())["pid"] == os.getpid()
        other.wait()

    def test_a_refused_run_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(run_folder, "_explain", lambda *_: (_ for _ in ()).throw(utils.BadInput("no")))
        with pytest.raises(utils.BadInput):
            start(tmp_path / "a" / "b")
        assert tmp_path.is_dir() and not any(tmp_path.iterdir())

    def test_where_nobody_may_write(self):
        with pytest.raises(utils.BadInput, match="save_dir=/proc/run cannot be made"):
            start(run_folder.Path("/proc/run"))

    def test_the_end_of_a_run_releases_it(self, tmp_path):
        start(tmp_path)
        assert (tmp_path / claim.CLAIM).is_file()
        run_folder.finish_run(tmp_path, {})
        assert not (tmp_path / claim.CLAIM).exists()
