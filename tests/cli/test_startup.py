"""What is refused without a model is refused without torch; a line appears before the heavy libraries do."""

import json
import subprocess
import sys

import pytest
from helpers import MINI, REPO

HEAVY = ("torch", "transformers", "datasets")
CODE = """
import json, runpy, sys
sys.argv = json.loads(sys.argv[1])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
else:
    code = 0
sys.stderr.write("\\n" + json.dumps([code, [name for name in {heavy!r} if name in sys.modules]]))
""".replace("{heavy!r}", repr(HEAVY))


def start(script: str, *args: str) -> tuple[int, list[str], str]:
    """Run a script as its command line: the exit code, which heavy libraries it loaded, what it said."""
    words = json.dumps([str(REPO / script), *args])
    done = subprocess.run([sys.executable, "-c", CODE, words], capture_output=True, text=True, cwd=REPO)
    said, _, last = done.stderr.rpartition("\n")
    code, loaded = json.loads(last)
    return code, loaded, done.stdout + said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("forget.py", "--help"), "forget_loss=grad_ascent"),
        (("forget.py", "lrr=3"), "lrr is no key of forget.yaml"),
        (("finetune.py", "batch_size=many"), "batch_size=many"),
        (("finetune.py", "model_family=phy"), "model_family=phy is unknown (did you mean phi?)"),
        (("forget.py", "forget_loss=npoo"), "forget_loss=npoo is unknown (did you mean npo?)"),
        (("forget.py", "+experiment=tuned"), "experiment=tuned is unknown"),
        (("finetune.py", "model_family=tiny", f"data_path={MINI}", "split=retain42"), "split=retain42 is not in"),
        (
            ("forget.py", "model_family=phi", "model_path=o/m", f"data_path={MINI}", "split=forget42"),
            "split=forget42 is not in",
        ),
        (
            ("evaluate_util.py", "model_family=phi", "model_path=o/m", f"data_path={MINI}", "split=forget42"),
            "forget42_perturbed is not in",
        ),
        (
            ("evaluate_util.py", "model_path=o/m"),
            "model_family is missing, and model_path=o/m (there is no such folder",
        ),
        (
            ("aggregate_eval_stat.py", "retain_result=x"),
            "ckpt_result, method_name, submitted_by, save_file are",
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_refused_without_the_heavy_libraries(args, said):
    code, loaded, text = start(*args)
    assert said in text and loaded == [] and code == (0 if "--help" in args else 2)


def test_a_loss_is_refused_with_torch_alone():
    code, loaded, text = start("forget.py", "model_family=phi", "model_path=o/m", "forget_loss.forget=npoo")
    assert code == 2 and "forget_loss.forget=npoo is unknown" in text and loaded == ["torch"]
    assert "forget.py: checking the config, then loading the libraries" in text
