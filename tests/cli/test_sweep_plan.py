"""The jobs of a sweep: what is listed before the first one, what is told at the end, and who gets which card."""

import json
import os
import sys
import types

import pytest
from helpers import MINI
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from tofu.cli import command_line, jobs, pool, schema, sweeps
from tofu.runtime import provenance, resumption
from utils import BadInput


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        (["seed=[1,2]", "lr=1"], ["-m", "seed=1,2", "lr=1"]),
        (["-m", "seed=[1, 2]"], ["-m", "seed=1, 2"]),
        (["--multirun", "lr=1,2", "seed=3"], ["--multirun", "lr=1,2", "seed=3"]),
        (["split_list=[1,2]", "seed=[a]"], ["split_list=[1,2]", "seed=[a]"]),
    ],
)
def test_a_list_of_seeds_is_a_sweep(typed, taken):
    assert sweeps.spread(["x.py", *typed], schema.Forget) == ["x.py", *taken]
    assert sweeps.spread(["x.py", *typed], schema.Evaluate) == ["x.py", *typed]


OVERRIDES = [
    "model_family=tiny",
    f"data_path={MINI}",
    "split=forget05,forget10",
    "seed=1,2",
    "save_dir='r${split}_${seed}'",
]


def leave(folder, overrides, *, whole, **other):
    """A run's folder as the job with these overrides leaves it, complete or cut off."""
    import hydra

    with hydra.initialize_config_dir(str(schema.CONFIG_DIR), version_base="1.3"):
        cfg = sweeps.check(hydra.compose("finetune", overrides), schema.Finetune)
    made = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg)), other)
    folder.mkdir()
    (folder / provenance.CONFIG).write_text(OmegaConf.to_yaml(made))
    (folder / provenance.VERSIONS).write_text('{"inputs": {}}')
    (folder / ("finished.json" if whole else "trainer_state.json")).write_text("{}")


def plan(*overrides):
    return sweeps.plan("finetune", schema.Finetune, [*OVERRIDES, *overrides])


def test_states_before_the_first_job(tmp_path, monkeypatch):
    """Keys that change no number do not count; another order of keys, and a listing, change nothing."""
    monkeypatch.chdir(tmp_path)
    first, second, third, _ = [one.overrides for one in plan()]
    leave(tmp_path / "rforget05_1", first, whole=True, logging_steps=7)
    leave(tmp_path / "rforget05_2", second, whole=False)
    assert [one.state for one in plan("overwrite_dir=true")] == ["to do"] * 4
    leave(tmp_path / "rforget10_1", third, whole=False, num_epochs=3)
    found = plan()
    assert [one.state for one in found] == ["complete", "to do", "refused", "to do"]
    sweeps.tell(found[:2])
    with pytest.raises(BadInput, match=r"split=forget10 seed=1 .*an unfinished run with other settings: num_epochs=3 "):
        sweeps.tell(found)
    (tmp_path / "rforget10_1" / "finished.json").write_text("{}")
    with pytest.raises(BadInput, match=r"save_dir=rforget10_1 holds a complete run with other settings: num_epochs=3 "):
        sweeps.tell(plan())


@pytest.mark.parametrize(
    ("made", "now", "said"),
    [
        ({}, (), None),
        ({"cut": 8}, (), "other settings: batch_size x gradient_accumulation_steps x processes=8 (now 16): take"),
        ({}, ("batch_size=2",), "processes=16 (now 2): take the same"),
        (
            {"kind": "fsdp", "processes": 2},
            (),
            "was interrupted under fsdp with 2 processes, and its checkpoint is",
        ),
        ({"processes": 2}, ("engine=ddp",), None),
        ({"kind": "ZeRO-3", "processes": 2}, ("engine=deepspeed",), "was interrupted under ZeRO-3 with 2 processes, a"),
        ({"kind": "ZeRO-3"}, ("engine=deepspeed",), None),
        ({}, ("resume=false",), "holds a checkpoint in resume/ and resume=false: overwrite_dir=true starts again"),
        (None, ("resume=false",), "save_dir=r holds an interrupted run: overwrite_dir=true starts again"),
    ],
)
def test_what_cannot_go_on_is_refused_before_the_first_job(tmp_path, monkeypatch, made, now, said):
    """Of the newest checkpoint: its steps' rows, its engine, its processes, and resume=false."""
    monkeypatch.chdir(tmp_path)
    job = [*OVERRIDES[:2], "split=forget05", "seed=1", "save_dir=r"]
    leave(tmp_path / "r", job, whole=False)
    for step in (4, 12) if made is not None else ():
        place = tmp_path / "r" / resumption.RESUME / f"step-{step}"
        place.mkdir(parents=True)
        (place / resumption.MANIFEST).write_text("{}")
        engine = {"kind": "ddp", "processes": 1} | {key: one for key, one in made.items() if key != "cut"}
        about = {resumption.CUT: 1 if step == 4 else made.get("cut", 16), "engine": engine}
        (place / resumption.MADE_FROM).write_text(json.dumps(about))
    (found,) = sweeps.plan("finetune", schema.Finetune, [*job, *now])
    assert (found.state, found.why) == ("continues", "") if said is None else said in found.why
    assert said is None or found.state == "refused"


def test_a_hubs_model_that_is_not_there_is_refused_before_the_first_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["model_family=tiny,phi", *OVERRIDES[1:2], "save_dir='${model_family}'"]
    found = sweeps.plan("finetune", schema.Finetune, args)
    assert [one.state for one in found] == ["to do", "refused"]
    assert found[1].why.startswith("hf_key=microsoft/phi-1_5: no such folder, not in the local cache, and the hub does")


def test_an_evaluation_is_complete_of_the_model_that_is_there(tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "finished.json").write_text("1")
    args = [
        "model_family=tiny",
        f"data_path={MINI}",
        "model_path=model",
        "split=forget05,forget10",
        "save_dir='e${split}'",
    ]

    def states(*more):
        return [one.state for one in sweeps.plan("eval_everything", schema.Evaluate, [*args, *more])]

    assert states() == ["to do"] * 2
    import hydra

    with hydra.initialize_config_dir(str(schema.CONFIG_DIR), version_base="1.3"):
        job = [*args[:3], "split=forget10", "save_dir=eforget10"]
        cfg = sweeps.check(hydra.compose("eval_everything", job), schema.Evaluate)
    (tmp_path / "eforget10").mkdir()
    record = {"inputs": provenance.inputs({"model_path": "model"})}
    (tmp_path / "eforget10" / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (tmp_path / "eforget10" / "versions.json").write_text(json.dumps(record))
    (tmp_path / "eforget10" / "finished.json").write_text("{}")
    assert states() == ["to do", "complete"] and states("overwrite=true") == ["to do"] * 2
    assert states("ds_size=3") == ["to do"] * 2
    (tmp_path / "model" / "finished.json").write_text("2")
    assert states() == ["to do"] * 2


def test_a_folder_by_the_jobs_number():
    found = sweeps.plan("finetune", schema.Finetune, [*OVERRIDES[:-1], "save_dir=out${hydra:job.num}"])
    assert [one.place for one in found] == ["out0", "out1", "out2", "out3"]
    assert sweeps.varying(found, 2) == "split=forget10 seed=1"


def test_the_table_at_the_end(tmp_path):
    planned = [sweeps.Planned([f"lr={lr}", "seed=1"], f"r{lr}", state) for lr, state in ((1, "complete"), (2, "to do"))]
    planned += [sweeps.Planned([f"lr={lr}", "seed=1"], f"r{lr}") for lr in (3, 4)]
    sweeps.write(sweeps.Outcome(2, ["lr=3", "seed=1"], sweeps.FAILED, "no such thing", 90.0, 2), str(tmp_path))
    sweeps.write(sweeps.Outcome(1, ["lr=2", "seed=1"], sweeps.DONE, seconds=30.0, value=float("nan")), str(tmp_path))
    assert sweeps.summary(sweeps.outcomes(str(tmp_path), planned)).splitlines() == [
        "4 jobs: 1 done, 1 complete, 1 failed, 1 not run",
        "  job  lr  minutes  outcome",
        "  0    1            complete",
        "  1    2   0.5      done",
        "  2    3   1.5      failed: no such thing",
        "  3    4            not run",
    ]


def test_how_long_it_takes():
    assert sweeps.left([], 3) == " (3 jobs left)" and sweeps.left([60], 1) == " (the last job, about 1 min)"
    assert sweeps.left([60, 180], 5) == " (5 jobs left, about 10 min)"
    assert sweeps.left([60, 180], 5, at_once=2) == " (5 jobs left, about 6 min)"
    assert sweeps.left([7200], 2) == " (2 jobs left, about 4.0 h)" and sweeps.left([1], 0) == ""


def test_cards_are_dealt_out(monkeypatch):
    assert pool.deal("auto", []) == [None] and pool.deal(2, []) == [None, None]
    assert pool.deal("auto", ["0", "3"]) == ["0", "3"] and pool.deal(1, ["0", "3"]) == ["0"]
    for parallel in (3, 0, "two", True):
        with pytest.raises(BadInput, match=f"hydra.launcher.parallel={parallel}: "):
            pool.deal(parallel, ["0", "3"])
    for visible, found in (("2,GPU-5", ["2", "GPU-5"]), ("", []), ("-1", [])):
        monkeypatch.setenv(pool.VISIBLE, visible)
        assert pool.cards() == found


TELLS = "import os, time; time.sleep(0.3); print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['TOFU_SWEEP'])"
DIES = "import os; os.kill(os.getpid(), 9)"


def test_each_job_has_a_card_of_its_own(monkeypatch, tmp_path, capsys):
    """Three jobs on two cards: the third takes the one that is free first. One that is killed is noted."""
    from concurrent.futures import ThreadPoolExecutor

    codes = [TELLS, TELLS.replace("0.3", "0.9"), TELLS, DIES]
    told = types.SimpleNamespace(plan=[], seconds=[], command=lambda job: [sys.executable, "-c", codes[int(job[0])]])
    one = pool.Pool(told, ["4", "7"], str(tmp_path), range(4))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda i: one.run(i, [str(i)]), range(4)))
    lines = sorted(line for line in capsys.readouterr().out.splitlines() if line.startswith("["))
    cards = {line.split()[2].split(":")[0]: line.split()[1] for line in lines}
    assert {cards["0"], cards["1"]} == {"4", "7"} and cards["2"] == cards["0"]
    (failed,) = sweeps.outcomes(str(tmp_path))
    assert (failed.number, failed.state, failed.why, failed.code) == (3, "failed", "its process ended with signal 9", 1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"] not in ("4", "7")


def test_what_a_sweeper_gets():
    scores = {"Model Utility": 0.5, "Forget Quality": 0.25, "family": {}}
    assert jobs.objective(OmegaConf.create({"objective": None}), scores) == scores
    assert jobs.objective(OmegaConf.create({"objective": "Model Utility"}), scores) == 0.5
    assert jobs.objective(OmegaConf.create({"objective": ["Forget Quality", "Model Utility"]}), scores) == [0.25, 0.5]
    with pytest.raises(
        BadInput, match="objective=family: the run has no such score: it has Model Utility, Forget Qual"
    ):
        jobs.objective(OmegaConf.create({"objective": "family"}), scores)


def test_what_plugins_cannot_do(monkeypatch):
    with pytest.raises(BadInput, match="hydra/sweeper=optuna: it looks for the best value of a score: name the"):
        sweeps.check_plugins(["hydra/sweeper=optuna", "lr=1,2"])
    for one in ("hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra/launcher=submitit_slurm"):
        if sweeps.missing(*one.split("=")):
            with pytest.raises(BadInput, match=rf"{one} is not installed: pip install -e '\.\[sweep\]'"):
                sweeps.check_plugins([one, "objective=Agg"])
        else:
            sweeps.check_plugins([one, "objective=Agg"])
    monkeypatch.setitem(sweeps.PLUGINS["hydra/sweeper"], "gone", "hydra_plugins.gone")
    assert sweeps.missing("hydra/sweeper", "gone").startswith("hydra/sweeper=gone is not installed: pip")
    gone = MissingConfigException("", "hydra/launcher/jobs")
    assert command_line._explain(gone, "forget", []).startswith("hydra/launcher=jobs is unknown (did you mean joblib?)")
    sweeps.check_plugins(["hydra/launcher=basic", "hydra.sweep.dir=x"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="hydra/launcher=processes: it starts processes .* here are 2 .* torchrun"):
        sweeps.check_plugins(["hydra/launcher=processes"])
