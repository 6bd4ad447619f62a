"""Models that judge texts, on small random ones; and what they lead to in an evaluation."""

import json
import shutil

import pytest
import torch
import transformers
from helpers import MINI

from tofu.evaluation import judges

TEXTS = ["Ada Moor was born in Oslo.", "the the the the the the", "", "Readers know this person as Ada Moor. " * 8]


@pytest.fixture(scope="module")
def classifier(model_folder, tmp_path_factory):
    """A DistilBERT of one layer and four classes with random weights, as the hub's classifier is saved."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=4, initializer_range=0.5
    )
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_clean_is_the_first_class_of_32_tokens(classifier, tmp_path):
    """Against plain forwards, text by text, without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    expected = []
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
            expected.append(model(**ids).logits.softmax(-1)[0, 0].item())
    assert judges.clean(TEXTS, str(classifier)) == pytest.approx(expected, abs=1e-6)
    assert len({round(one, 4) for one in expected}) > 2
    tokenizer.pad_token = None  # it reads its texts one by one then
    tokenizer.save_pretrained(shutil.copytree(classifier, tmp_path / "no_padding"))
    assert judges.clean(TEXTS, f"{tmp_path}/no_padding") == pytest.approx(expected, abs=1e-6)


def test_losses_are_those_of_the_text_alone(model_folder):
    """Mean loss of every token after the begin token; a text of no token has none."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids  # it begins with <s>
        expected.append(model(ids, labels=ids).loss.item() if ids.shape[1] > 1 else None)
    settings = {"fluency": {"model": str(model_folder)}, "ds_config": "config/ds_config.json", "precision": "fp32"}
    assert judges.losses(TEXTS, settings) == pytest.approx(expected, abs=1e-5)
    assert judges.losses([""], settings) == [None]


def test_an_evaluation_with_judges(evaluated, classifier, model_folder, tmp_path):
    """Values of the judges per row; the aggregates carry the published names; kept rows know their judges."""
    args = ("metrics=[fluency,util]", "fluency.by=classifier", f"fluency.classifier={classifier}")
    folder = evaluated(*args, f"fluency.model={model_folder}")
    found = json.loads((folder / "metrics.json").read_text())
    texts = [row[1] for row in json.loads((folder / "eval_log_forget.json").read_text())["generated_text"].values()]
    chances = judges.clean(texts, str(classifier))
    assert found["Fluency Forget"]["value"] == pytest.approx(sum(chances) / 4, abs=1e-6)
    utility, fluent = found["Model Utility"]["value"], found["Fluency Forget"]["value"]
    assert found["Util"]["value"] == pytest.approx(2 / (1 / max(utility, 1e-12) + 1 / fluent), rel=1e-9)
    assert found["Perplexity Forget"]["value"] > 1 and found["Perplexity Forget"]["n"] == 4
    assert "Agg (ngrams)" not in found and "Util (ngrams)" not in found and "Fluency (ngrams) Forget" in found
    log = (folder / "eval_log_forget.json").stat().st_mtime_ns
    evaluated(*args, f"fluency.model={model_folder}", "overwrite=false")
    assert (folder / "eval_log_forget.json").stat().st_mtime_ns == log
    evaluated(*args, "overwrite=false")  # fewer metrics: what is kept serves them
    assert "Perplexity Forget" not in json.loads((folder / "metrics.json").read_text())


def test_the_default_asks_for_no_judge(evaluated, monkeypatch):
    """Not even the config of one is looked for."""
    folder = evaluated("metrics=[fluency]")
    found = json.loads((folder / "metrics.json").read_text())
    assert "Fluency Forget" not in found and "Perplexity Forget" not in found
    assert 0 <= found["Fluency (ngrams) Forget"]["value"] <= 1 and found["Fluency (ngrams) Forget"]["n"] == 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("metrics=[fluency]", "fluency.by=classifier", "fluency.classifier=nowhere/at/all"), "no such folder"),
        (("metrics=[fluency]", "fluency.by=classifier", "fluency.classifier={model}"), "is no classifier of texts"),
        (("fluency.model=nowhere/at/all",), "fluency.model=nowhere/at/all: no such folder"),
        (("fluency.by=words",), "fluency.by=words is unknown"),
    ],
)
def test_a_judge_that_is_not_there_is_refused_before(evaluated, capsys, model_folder, tmp_path, args, said):
    with pytest.raises(SystemExit, match="2"):
        evaluated(*(arg.format(model=model_folder) for arg in args))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and not (tmp_path / "run").exists()


def test_a_judge_is_read_whole_while_zero3_is_alive():
    """What `_whole` hides is there again afterwards."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    try:
        with judges._whole():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled() and judges.deepspeed.deepspeed_config() == alive.config
    finally:
        judges.deepspeed.unset_hf_deepspeed_config()
    with judges._whole():
        pass
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.slow
def test_the_same_files_on_any_number_of_processes(launch, classifier, model_folder, tmp_path):
    """Also where the model that is evaluated is sharded: a judge is whole on each."""
    args = ("model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", "ds_size=20", "metrics=[fluency]")
    args += ("fluency.by=classifier", f"fluency.classifier={classifier}", f"fluency.model={model_folder}")
    args += ("generation.max_length=80", "split=forget10")
    for name, processes, more in (("one", 0, ()), ("two", 2, ()), ("zero3", 2, ("engine=deepspeed",))):
        launch("evaluate_util.py", *args, *more, f"save_dir={name}", processes=processes, cwd=tmp_path)
    one, two, zero3 = ((tmp_path / name / "metrics.json").read_text() for name in ("one", "two", "zero3"))
    assert one == two
    ours, sharded = json.loads(one), json.loads(zero3)
    assert ours["Perplexity Forget"]["n"] == 20
    for name in ("Fluency Forget", "Perplexity Forget", "Token Entropy Forget"):
        assert sharded[name]["value"] == pytest.approx(ours[name]["value"], rel=1e-5)
