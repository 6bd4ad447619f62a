"""The process in which vLLM generates: python -P vllm_worker.py ASKED ANSWERS. It imports nothing of ours.

Both are JSON files. ASKED holds the model's folder or hub id, its dtype, the prompts in token ids with the most new
tokens of each, the ids that end an answer, and the most tokens of a prompt and its answer together. ANSWERS are the new
tokens of each prompt.
"""

import json
import sys
from pathlib import Path


def main(asked: str, answers: str) -> None:
    """Generate, greedily: nothing but the token ids goes in or comes out."""
    from vllm import LLM, SamplingParams

    job = json.loads(Path(asked).read_text())
    model = LLM(model=job["model"], dtype=job["dtype"], max_model_len=job["longest"], seed=0)
    how = [
        # the tokenizer's own end token is among `ends` where it counts, so vLLM's idea of it must not
        SamplingParams(
            temperature=0.0, max_tokens=budget, stop_token_ids=job["ends"], ignore_eos=True, detokenize=False
        )
        for budget in job["budgets"]
    ]
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], how, use_tqdm=False)
    Path(answers).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
