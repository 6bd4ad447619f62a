"""The norm of a model's gradient on each row's answer: an attack that costs a backward pass per row."""

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from tofu.evaluation import inference
from tofu.evaluation.sets import Task, reach
from tofu.runtime import ranks


def why_not(model: PreTrainedModel, sharded: bool) -> str | None:
    """Why there are no gradients of whole parameters; None where there are."""
    if sharded:
        return "gradient norms need a whole model in each process: engine=ddp"
    if hasattr(model, "get_base_model"):
        return "gradient norms are those of all weights, and this model has adapters: evaluate it once it is saved"
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        return "gradient norms need weights that are numbers, and this model has them in four bits"
    return None


def norms(model: PreTrainedModel, task: Task) -> list[float | None]:
    """Of each row the mean, over the parameter tensors, of the L2 norm of the gradient of the answer's mean loss.

    The end token is left out. A tensor that the row does not reach counts not. Rows are dealt to the ranks one by one,
    so that no number depends on how many there are. The parameters' own `grad` is neither read nor written.

    Args:
        model: whole (`why_not`), in training or not.

    Returns:
        A number per row; None where the answer has no token but its end.
    """
    parameters = list(model.parameters())
    trained = [parameter.requires_grad for parameter in parameters]
    found: dict[int, float] = {}
    with inference.ready(model, reach(task)), torch.inference_mode(False), torch.enable_grad():
        try:
            model.requires_grad_(True)
            for batch in ranks.share([[i] for i in range(len(task.trees))], f"{task.data.task}: gradient norms"):
                for i in batch:
                    ids, n = _answer(task, i)
                    if n:
                        found[i] = _norm(model, parameters, ids, n)
        finally:
            for parameter, before in zip(parameters, trained, strict=True):
                parameter.requires_grad_(before)
    found = ranks.merge(found)
    return [found.get(i) for i in range(len(task.trees))]


def _answer(task: Task, i: int) -> tuple[list[int], int]:
    """A row's question and answer without the end token, and how many of these tokens are the answer's."""
    ended, scored = task.ended[i][0], len(task.trees[i].paths[0])
    whole = list(task.likely[i][0])
    return whole[: len(whole) - ended], scored - ended


def _norm(model: PreTrainedModel, parameters: list[torch.nn.Parameter], ids: list[int], n: int) -> float:
    """Of one text, of whose tokens the last n are scored."""
    text = torch.tensor([ids], device=model.device)
    logits = model(input_ids=text[:, :-1], use_cache=False).logits[0, -n:].float()
    gradients = torch.autograd.grad(F.cross_entropy(logits, text[0, -n:]), parameters, allow_unused=True)
    each = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in gradients if one is not None]
    return torch.stack(each).mean().item()
