"""The two forwards of an evaluation against plain ones: every architecture, every way that a batch can fall."""

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, WORDS, make, rows

from data_module import IGNORE, Sample
from tofu.evaluation import inference
from tofu.methods import losses
from tofu.models import batches, forward


@pytest.fixture(params=list(ARCHITECTURES))
def model(request):
    return make(request.param)


def test_tree_holds_what_is_shared_once():
    samples = [
        Sample((1, 5, 6), (IGNORE, 6, 2), False),
        Sample((1, 5, 6, 7), (IGNORE, 6, 7, 2), False),
        Sample((1, 5, 8), (IGNORE, 8, 2), False),
    ]
    tree = inference.tree(samples)
    assert tree.tokens == [1, 5, 6, 7, 8] and tree.parents == [-1, 0, 1, 2, 1] and tree.depths == [0, 1, 2, 3, 2]
    assert list(zip(tree.nodes, tree.targets, strict=True)) == [(1, 6), (2, 2), (2, 7), (3, 2), (1, 8), (4, 2)]
    assert tree.paths == [[0, 1], [0, 2, 3], [4, 5]]


def test_tree_scores_are_the_plain_ones(model):
    """Each answer in a row of its own, padded, against one forward over the trees: 1e-5."""
    with inference.ready(model, 64):
        found = inference.score_trees(model, [inference.tree(samples) for samples in rows()])
        for samples, scores in zip(rows(), found, strict=True):
            view = forward.score(model, batches.collate({"forget": samples}))["forget"]
            expected = -losses.sequence_logp(view)
            assert [len(tokens.nll) for tokens in scores] == torch.bincount(view.sample).tolist()
            totals = [tokens.nll.sum() for tokens in scores]
            assert totals == pytest.approx(expected.tolist(), abs=1e-5, rel=1e-5)
            logp = view.logits.log_softmax(-1)
            mean = (logp.exp() * logp).sum(-1)
            deviation = ((logp.exp() * logp.square()).sum(-1) - mean.square()).sqrt()
            for i, tokens in enumerate(scores):
                its = view.sample == i
                right = view.logits.argmax(-1)[its] == view.labels[its]
                assert tokens.right.tolist() == right.tolist()
                assert tokens.mean == pytest.approx(mean[its].tolist(), abs=1e-4)
                assert tokens.deviation == pytest.approx(deviation[its].tolist(), abs=1e-4)


def test_moments_by_hand():
    """Min-k++'s worked number: (log p - mean) / deviation of ZF[0, 1:4] at tokens 3, 1, 4 (arXiv 2404.02936)."""
    logits = torch.tensor(
        [[1.5, 0.5, 2.25, 3.25, 0.25, 2], [0, 3.75, 0.75, 2.5, 1.5, 0.5], [1.25, 0.25, 2, 1, 2, 1.75]]
    )
    mean, deviation = inference.moments(logits, logits.logsumexp(-1))
    logp = logits.log_softmax(-1)[range(3), [3, 1, 4]]
    assert ((logp - mean) / deviation).tolist() == pytest.approx([0.842248, 0.626330, 0.691739], abs=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_greedy_is_generates_greedy(model, at_once):
    """Prompts of several lengths and budgets in few places, against each alone by the library."""
    prompts = [sample.input_ids for samples in rows(1) + rows(2) for sample in samples[:1]]
    budgets = [12, 1, 30, 7, 30, 18]
    with inference.ready(model, 64):
        found = inference.greedy(model, prompts, budgets, [2, 7], at_once=at_once)
    for prompt, budget, answer in zip(prompts, budgets, found, strict=True):
        config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=budget, eos_token_id=[2, 7], pad_token_id=0
        )
        alone = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert answer == alone[: next((i for i, token in enumerate(alone) if token in (2, 7)), len(alone))]
    assert any(len(answer) == budget for answer, budget in zip(found, budgets, strict=True))


def test_known_texts_move_no_token_and_save_steps(model):
    """An answer that is known is written in ceil(30 / WIDEST) steps; a wrong one costs none."""
    prompt, wrong = (1, *rows(3)[1][0].input_ids), (1, *rows(4)[1][0].input_ids)

    def write(*known):
        forwards = []
        found = inference.greedy(
            model, [prompt], [30], [WORDS], at_once=1, known=[known], before_forward=lambda: forwards.append(1)
        )[0]
        return found, len(forwards)

    with inference.ready(model, 64):
        plain, steps = write()
        assert len(plain) == 30
        assert write(wrong, (*prompt, *plain)) == (plain, 1 + -(-29 // inference.WIDEST))
        assert write((*prompt, *plain[:10], *wrong))[0] == write(wrong)[0] == plain
        assert steps <= 30


def test_a_repeating_text_guesses_itself():
    guess = inference._Drafts([7, 8], [])
    for token in [3, 4, 5, 3, 4]:
        guess.append(token)
    assert list(guess.next(3)) == [5, 3, 4]
    guess.append(6)
    assert list(guess.next(3)) == []
    guess.append(7), guess.append(8)
    assert list(guess.next(2)) == [3, 4]


def test_a_window_shorter_than_the_text_takes_no_masks(caplog):
    with inference.ready(make("Mistral"), 200) as masks:
        assert not masks
    assert "attends to the last 128 tokens and a text has up to 200: it is evaluated one text at a time" in caplog.text
    with (
        pytest.raises(inference.BadInput, match="which a sharded model cannot: engine=ddp"),
        inference.ready(make("Mistral"), 200, sharded=True),
    ):
        raise AssertionError("not reached")


def test_the_model_comes_back_as_it_was():
    model = make("Llama").train()
    with inference.ready(model, 10):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()
    assert all(not parameter.is_inference() for parameter in model.parameters())
