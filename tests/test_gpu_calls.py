"""The four calls for a card: what they compute is right, and at toy size all that a CPU can run of them runs."""

import collections
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers import REPO, needs_shared

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    for folder in ("benchmarks", "benchmarks/gpu"):
        monkeypatch.syspath_prepend(REPO / folder)


def test_a_figure_is_on_disk_at_once_and_a_failure_is_a_line(tmp_path):
    from figures import Figures

    figures = Figures(1, "toy size", tmp_path / "out")
    with figures.measuring("steps", "ours") as values:
        values |= {"median_ms": 12.3456, "waits": 7, "mfu": None}
    with figures.measuring("steps", "other"):
        raise RuntimeError(f"{REPO}/x.py:\n no | card")
    lines = [json.loads(line) for line in (tmp_path / "out" / "call1.jsonl").read_text().splitlines()]
    assert lines[0] == {
        **{"part": "steps", "name": "ours", "median_ms": 12.3456, "waits": 7, "mfu": None},
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
    }
    assert lines[1]["why"] == "RuntimeError: x.py: no / card"
    text = (tmp_path / "out" / "call1.md").read_text()
    assert text.startswith("## gpu/call.sh 1, ") and f"torch {torch.__version__}" in text and "; toy size\n" in text
    assert text.endswith(
        "| steps | median_ms | waits | mfu |\n| --- | ---: | ---: | ---: |\n"
        "| ours | 12.35 | 7 |  |\n| other | not run: RuntimeError: x.py: no / card |  |  |\n"
    )


def test_a_process_is_stopped_with_all_that_it_started():
    from protocol import ended, reason

    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
    child += "start_new_session=True).wait()"
    began = time.monotonic()
    done = ended([sys.executable, "-c", child], timeout=1.0)  # the pipes are closed when the grandchild is gone
    assert reason(done, REPO) == "stopped after 1 s" and time.monotonic() - began < 20
    assert ended([sys.executable, "-c", "print(1)"]).stdout == "1\n"


def test_paged_states_are_measured_at_large_sizes_only_where_they_are_named():
    import peaks
    from protocol import SETTINGS, settings_of

    assert settings_of(["toy", "bench"]) == list(SETTINGS)
    assert settings_of(["8b"]) == settings_of(["toy", "1b"]) == [name for name in SETTINGS if name != "full_paged"]
    assert set(peaks.NAMES) <= set(settings_of(["8b"]))


def test_what_a_run_said_that_it_would_need():
    from peaks import estimate

    assert estimate("loading 16 GB\n[INFO] peak memory: about 38.5 GB (weights 16.1 GB)\npeak 40 GB\n") == 38.5
    assert estimate("about 12 GB at the peak") == 12.0
    assert estimate("loading 16 GB\nCUDA out of memory, tried 2 GiB at the peak") is None


def test_two_evaluations_are_compared():
    from engines import compared

    def log(loss, wrong, text):
        texts = {"0": ["q", "same", "t"], "1": ["q", text, "t"]}
        columns = {"avg_gt_loss": {"0": 1.0, "1": loss}, "average_perturb_loss": {"0": [2.0, wrong], "1": [1.0, 1.0]}}
        return {"eval_log.json": {**columns, "generated_text": texts}}

    assert compared(log(1.0, 3.0, "a"), log(1.0, 3.0, "a")) == (0.0, 0, 2)
    assert compared(log(1.0, 3.0, "a"), log(1.25, 3.0, "b")) == (0.25, 1, 2)
    assert compared(log(1.0, 3.0, "a"), log(1.25, 3.5, "a")) == (0.5, 0, 2)


def test_the_work_of_a_step():
    """A model of 1,000 weights that does 10,000 tokens' work in 1 ms does 6e10 FLOP/s; tied embeddings count once."""
    import train_speed
    import training

    import data_module

    assert training.share_of_peak(6 * 1000 * 10_000, 1e-3) == pytest.approx(6e10 / 989e12)

    class Rows:
        def __getitem__(self, slot):
            return {"retain": data_module.Sample((1, 2, 3, 4, 5), (-100, -100, 6, 7, 8), False)}, 1.0

    for tied in (True, False):
        model = train_speed.make_model("toy", 50, tie_word_embeddings=tied)
        blocks = sum(weight.numel() for name, weight in model.named_parameters() if "layers" in name or "norm" in name)
        flops, tokens = train_speed.work(model, Rows(), [[0, 1], [2, 3]])
        assert (flops, tokens) == (6 * (blocks * 10 + 50 * 32 * 6), 10)


def test_waits_are_counted_where_they_are_asked_for():
    from training import Waiting

    found, numbers = collections.Counter(), torch.arange(6)
    with Waiting(found):
        numbers.sum().item()
        numbers.nonzero()
        numbers[numbers > 3]
        numbers[torch.tensor([1, 2])]  # places are known: no wait
    assert found.total() >= 3 and all(place.startswith("test_gpu_calls.py:") for place in found) and len(found) == 3


def call(number: int, folder, *args: str) -> dict[str, dict[str, dict]]:
    """Run a call at toy size: part -> name -> figure."""
    command = [str(REPO / "benchmarks" / "gpu" / "call.sh"), str(number), "--toy", "--minutes", "30", *args]
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in folder.iterdir()} == {f"call{number}.jsonl", f"call{number}.md"}
    found: dict[str, dict[str, dict]] = {}
    for line in (folder / f"call{number}.jsonl").read_text().splitlines():
        figure = json.loads(line)
        found.setdefault(figure["part"], {})[figure["name"]] = figure
    table = (folder / f"call{number}.md").read_text()
    assert "toy size" in table and all(f"\n| {part} |" in table for part in found)
    return found


@needs_shared
@pytest.mark.slow
def test_training_at_toy_size(tmp_path):
    """The ways to train have the same first loss; what needs a GPU or a package says so."""
    found = call(1, tmp_path)
    assert set(found) == {"waits", "steps", "liger", "optimisers", "attention shape", "shapes"}
    assert [len(its) for its in found.values()] == [5, 15, 10, 5, 2, 2]
    ran = {name: figure for its in found.values() for name, figure in its.items() if "why" not in figure}
    for batch in (16, 64):
        losses = [figure["first_loss"] for name, figure in ran.items() if f"{batch} samples" in name]
        assert len(losses) >= 3 and max(losses) - min(losses) < 1e-4
    assert {"ours, sdpa", "padded, sdpa", "flattened, sdpa", "cuDNN off", "cuDNN as torch chooses"} <= set(ran)
    assert all(figure["waits"] > 0 for figure in found["waits"].values() if "why" not in figure)
    assert found["steps"]["ours, sdpa, 16 samples"]["times_padded"] > 0
    if not CUDA:
        whys = [figure["why"] for its in found.values() for figure in its.values() if "why" in figure]
        assert all("varlen" in why or "liger" in why or "torchao" in why for why in whys), whys


@needs_shared
@pytest.mark.slow
def test_peaks_at_toy_size(tmp_path):
    """Without full_8bit and lora, which are lora_4bit but for a key."""
    chosen = ("full_stochastic", "lora_4bit", "lora_dpo")
    found = call(2, tmp_path, "--only", *chosen)["peak memory"]
    assert list(found) == [f"toy_{name}" for name in chosen]
    if not CUDA:
        assert found.pop("toy_full_stochastic")["why"].startswith("optim=adamw_8bit_stochastic trains bf16 weights")
    assert all(0.1 < figure["peak_gb"] < 10 for figure in found.values())


@needs_shared
@pytest.mark.slow
def test_engines_at_toy_size(tmp_path):
    found = call(3, tmp_path)
    assert not [figure for its in found.values() for figure in its.values() if "why" in figure]
    assert set(found["engines"]) == {"ddp", "zero2", "zero3", "zero3_without_launcher"}
    assert set(found["methods"]) == {"npo", "rmu", "dpo"}
    apart = found["largest difference of a step's loss"]
    (batches,) = found["two batch sizes"].values()
    assert len(apart) == 3 and batches["of"] == 16
    if not CUDA:
        assert max(figure["nats"] for figure in apart.values()) < 1e-5
        assert batches["largest_loss_difference"] < 1e-6 and batches["differing_generations"] == 0


@needs_shared
@pytest.mark.slow
def test_evaluation_at_toy_size(tmp_path):
    """Ours and transformers' generate the same texts, at every batch size."""
    found = call(4, tmp_path)
    assert [len(its) for its in found.values()] == [10, 6]
    figures = [figure for its in found.values() for figure in its.values()]
    assert all(figure["seconds"] > 0 for figure in figures)
    compared = [figure["differing_from_ours"] for figure in figures if "differing_from_ours" in figure]
    assert len(compared) == 6 and (CUDA or not any(compared))
