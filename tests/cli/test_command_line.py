"""The command line, in this process; test_cli.py runs the real scripts."""

import logging
import os
import pty
import subprocess
import sys

import pytest
from helpers import REPO
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from tofu.cli import checks, command_line, schema
from tofu.cli import jobs as jobs_module
from tofu.runtime import run_folder
from utils import BadInput


class TestEntry:
    """entry() in this process; test_cli.py runs the real scripts."""

    @pytest.fixture
    def command(self, monkeypatch, tmp_path, capsys):
        """Run a command line of a script whose job notes what it got: (exit code, stdout, stderr, jobs)."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(command_line, "_log", lambda: None)  # it would replace pytest's handlers
        monkeypatch.setattr(jobs_module, "PATIENCE", 0)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # these jobs load no model
        monkeypatch.setattr(logging.root, "level", logging.WARNING)  # whatever a script run before has left

        def run(*args: str, job=None, name: str = "forget"):
            jobs = []

            @command_line.entry(name, after=lambda: jobs.append("after"))
            def main(cfg):
                """Run one job."""
                jobs.append(cfg)
                assert sys.argv == ["forget.py", *args], "a run's record holds what the user typed"
                if job is not None:
                    job(checks.check(cfg, schema.Forget))

            monkeypatch.setattr(sys, "argv", ["forget.py", *args])
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code
            assert list(tmp_path.iterdir()) == []
            out, err = capsys.readouterr()
            return code, out, err, jobs

        return run

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["lrr=3"], "lrr is no key of forget.yaml (did you mean lr?): there are model_family, LoRA, "),
            (["eval.dssize=3"], "(did you mean eval.ds_size"),
            (["forget_loss=dpoo"], "forget_loss=dpoo is unknown (did you mean dpo?): it may be KL, altpo, "),
            (["forget_loss=dpoo", "--help"], "forget_loss=dpoo is unknown"),
            (["+experiment=tofu_llama"], "experiment=tofu_llama is unknown (did you mean tofu_llama2?): it may be "),
            (["--config-name=run"], "--config-name=run is unknown"),
            (["forget_loss.forget_args={beta: 1}"], "forget_loss.forget_args.beta is no key"),
            (["--config-name=forgets.yaml"], "--config-name=forgets is unknown (did you mean forget?): it may be "),
            (["--config-name", "forgets", "--help"], "--config-name=forgets is unknown"),
            (["lr"], "lr is no key=value"),
            (["lr=[1"], "lr=[1 is no key=value"),
            (["save_dir=~/x"], """in quotes of its own: 'save_dir="~/x"'"""),
            (["data_path=a=b"], """in quotes of its own: 'data_path="a=b"'"""),
            (["split=forget01,forget05"], "--multirun"),
            (["--nonsense"], "unrecognized arguments: --nonsense"),
            (["learning_rate=1e-4"], "learning_rate is no key of forget.yaml: it is called lr here"),
            (["forget_loss=npo_gd"], "forget_loss=npo_gd is unknown (did you mean npo_grad_diff?)"),
            (["model_family=phy", "--cfg", "job", "--resolve"], "model_family=phy is unknown"),
        ],
    )
    def test_errors_before_the_job_are_one_line(self, command, args, said):
        code, out, err, jobs = command(*args)
        assert (code, out, jobs) == (2, "", [])
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err

    @pytest.mark.parametrize("preset", ["+experiment=tofu_phi", "experiment=tofu_phi"])
    def test_presets_are_forgets(self, preset, capsys, monkeypatch):
        monkeypatch.setattr("sys.argv", ["finetune.py", preset])
        with pytest.raises(SystemExit, match="2"):
            command_line.entry("finetune")(lambda cfg: None)()
        assert capsys.readouterr().err == (
            f"error: {preset}: the presets are settings of unlearning, forget.py takes them, finetune.py does not\n"
        )

    def test_bad_input_in_the_job_is_one_line(self, command):
        code, _, err, jobs = command("lr=0", "model_family=phi", job=lambda cfg: None)
        assert (code, err) == (2, "error: lr=0.0: it must be above 0\n")
        assert "after" not in jobs

    def test_a_bug_keeps_its_traceback(self, command):
        """Also where its type is one that a bad command line raises."""
        with pytest.raises(ConfigAttributeError):
            command("model_family=phi", job=lambda cfg: cfg.no_such_key)
        with pytest.raises(ZeroDivisionError):
            command("model_family=phi", job=lambda cfg: 1 / 0)

    def test_letters_need_no_quotes(self, command):
        code, _, _, (cfg, _) = command("model_path=modèle/été", "save_dir='Übung'", "model_family=phi")
        assert (code, cfg.model_path, cfg.save_dir) == (0, "modèle/été", "Übung")

    def test_options_stand_anywhere(self, command):
        code, _, _, (cfg, _) = command("split=forget05", "--config-name=forget_lora.yaml", "LoRA.alpha=16")
        assert (code, cfg.split, cfg.LoRA.r, cfg.LoRA.alpha) == (0, "forget05", 8, 16)

    def test_a_bad_job_does_not_end_a_sweep(self, command):
        """The others run, and the end lists it; the exit code is 1 where one has a bug, else 2."""

        def job(cfg):
            if cfg.seed == 2:
                raise BadInput("no such thing")
            if cfg.seed == 4:
                raise ZeroDivisionError("a bug")

        code, _, err, jobs = command("-m", "seed=1,2,3", "model_family=phi", "save_dir=out${seed}", job=job)
        assert (code, len(jobs)) == (2, 6)
        assert err.splitlines() == [
            "error: job 1 (seed=2 model_family=phi save_dir=out${seed}): no such thing",
            "error: 1 of 3 jobs failed: 1 (seed=2 model_family=phi save_dir=out${seed})",
        ]
        code, _, err, jobs = command("-m", "seed=2,4,5", "model_family=phi", "save_dir=out${seed}", job=job)
        assert (code, len(jobs)) == (1, 6) and "Traceback" in err and "2 of 3 jobs failed: 0 (" in err

    def test_a_complete_job_of_a_sweep_is_skipped(self, command, caplog):
        def job(cfg):
            if cfg.seed == 1:
                raise run_folder.Complete("out1")

        with caplog.at_level(logging.INFO):
            code, _, err, _ = command("-m", "seed=1,2", "model_family=phi", "save_dir=out${seed}", job=job)
        assert (code, err) == (0, "") and "job 0: skipped, it is complete: out1" in caplog.text

    def test_an_interrupt_is_one_line(self, command):
        def job(cfg):
            raise KeyboardInterrupt

        assert command("model_family=phi", job=job)[:3:2] == (130, "error: interrupted\n")

    def test_a_full_disk_is_one_line(self, command):
        """Also in a sweep, which it ends: the next job has no room either."""

        def job(cfg):
            with open("/dev/full", "w") as file:
                file.write("x")

        for args in ((), ("-m", "seed=1,2", "save_dir=out${seed}")):
            code, _, err, jobs = command(*args, "model_family=phi", job=job)
            assert (code, len(jobs)) == (1, 1) and err.startswith("error: the disk is full ([Errno 28]"), err

    def test_sweep_runs_every_job(self, command):
        code, _, _, jobs = command("-m", "forget_loss=KL,dpo", "split=forget01,forget10")
        assert code == 0 and jobs[1::2] == ["after"] * 4
        assert [(cfg.forget_loss.name, cfg.split) for cfg in jobs[::2]] == [
            *(("KL", "forget01"), ("KL", "forget10"), ("dpo", "forget01"), ("dpo", "forget10")),
        ]

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (
                ["seed=1,2", "save_dir=out"],
                "seed=1 save_dir=out and seed=2 save_dir=out, share save_dir=out: put the swept key into it, "
                "save_dir='out_${seed}'",
            ),
            (["lr=1,2", "seed=1,2", "save_dir='runs/${seed}'"], "save_dir='runs/${seed}_${lr}'"),
            (["forget_loss=KL,dpo", "save_dir=out"], "save_dir='out_${forget_loss.name}'"),
            (["weight_decay=0,0.1", "model_path=o/m"], "_${weight_decay}'"),
        ],
    )
    def test_jobs_of_a_sweep_do_not_share_a_folder(self, command, args, said):
        code, _, err, jobs = command("-m", *args)
        assert (code, jobs) == (2, []) and err.count("\n") == 1 and said in err, err

    def test_a_sweep_may_name_its_folders_by_job(self, command):
        assert command("--multirun", "seed=1,2", "save_dir=out${hydra:job.num}", "model_family=phi")[0] == 0
        code, _, err, _ = command("-m", "sed=1,2", "save_dir=out")
        assert code == 2 and "did you mean seed" in err

    @pytest.mark.parametrize("name", ["finetune", "finetune_lora", "eval_everything", "aggregate_eval_stat"])
    def test_a_config_of_another_script(self, command, name):
        code, _, err, jobs = command(f"--config-name={name}.yaml", "model_path=o/m")
        assert (code, jobs) == (2, [])
        assert err == f"error: --config-name={name} is another script's config: forget.py takes forget, forget_lora\n"

    def test_cfg_shows_the_config(self, command):
        code, out, _, jobs = command("--cfg", "job", "lr=3")
        assert code == 0 and jobs == [] and OmegaConf.create(out).lr == 3

    def test_help_explains_the_chosen_method_and_config(self, command):
        code, out, _, jobs = command("forget_loss=dpo", "--help", "--config-name=forget_lora.yaml")
        assert code == 0 and jobs == []
        assert "forget_loss.forget_args.beta=0.1 " in out and "LoRA.r=8 " in out and "config/forget_lora.yaml" in out

    def test_help_lists_the_presets(self, command):
        code, out, _, _ = command("+experiment=tuned_npo", "--help")
        line = next(line for line in out.splitlines() if line.strip().startswith("tuned_npo "))
        assert code == 0 and "NPO as tuned for forget10" in line and "2605.24614" in line

    def test_a_sweep_over_presets(self, command):
        code, _, _, jobs = command("-m", "+experiment=tuned_npo,tofu_phi", "model_path=o/m")
        assert code == 0 and [(cfg.forget_loss.name, cfg.model_family) for cfg in jobs[::2]] == [
            *(("npo_grad_diff", "ou-llama3.2-1b"), ("grad_diff", "phi")),
        ]

    def test_other_ranks_wait_before_they_speak(self, command, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        waited = []
        monkeypatch.setattr(jobs_module.time, "sleep", waited.append)
        assert command("lrr=3")[0] == 2 and command("lr=0", "model_family=phi", job=lambda cfg: None)[0] == 2
        assert waited == [jobs_module.PATIENCE] * 2
        assert command("--help")[1] == ""

    def test_what_hydra_warned_of_is_passed_on_once(self, command, monkeypatch):
        monkeypatch.setattr(command_line.hydra, "main", lambda **_: lambda job: lambda: sys.stderr.write("careful\n"))
        assert command()[2] == "careful\n"
        monkeypatch.setenv("RANK", "1")
        assert command()[2] == ""


def test_only_rank_0_logs(monkeypatch, capsys):
    before, level = logging.root.handlers[:], logging.root.level
    try:
        for rank, expected in (("0", "said\n"), ("1", "")):
            monkeypatch.setenv("RANK", rank)
            command_line._log()
            logging.getLogger("ours").info("said")
            assert capsys.readouterr().out.endswith(expected)
    finally:
        logging.root.handlers[:] = before
        logging.root.setLevel(level)


BAR = """
import logging, tqdm
from tofu.cli.jobs import BesideBars
log = logging.getLogger("x")
log.addHandler(BesideBars())
for i in tqdm.tqdm(range(3), mininterval=0):
    log.warning("line %d", i)
"""


def test_on_a_terminal_log_lines_stand_above_the_bar():
    """Each on a line of its own: the bar is taken away before it and drawn anew after it."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", BAR], stdout=theirs, stderr=theirs, cwd=REPO, close_fds=True)
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        said += piece
    assert child.wait() == 0
    os.close(ours)
    for i in range(3):
        before, _, after = said.decode().partition(f"line {i}")
        assert before == "" or before[-1] in "\r\n", repr(before[-40:])
        assert after.startswith("\r\n")


@pytest.mark.slow
def test_progress_false_draws_no_bar(launch, model_folder, tmp_path):
    args = ("model_family=tiny", "data_path=data/mini", f"model_path={model_folder}", "split=forget10", "ds_size=2")
    args = (*args, "generation.max_new_tokens=2", "save_dir=out", "overwrite=true")
    assert "it/s]" in launch("evaluate_util.py", *args, cwd=tmp_path).stderr
    assert "it/s]" not in launch("evaluate_util.py", *args, "progress=false", cwd=tmp_path).stderr
