"""Call 2: what an 8B needs of a card. benchmarks/gpu/call.sh 2 [--toy] [--only SETTING ...]

The entry scripts, a process a setting, as `benchmarks/protocol.py --memory`, but with steps of about 2,048 tokens.
Paged AdamW is not among the settings: it asks for managed memory, and a card can hang where that is more than the card
has. Where a run says beforehand what it will need, that estimate stands beside the peak.
"""

import re

from figures import CUDA, begin, parser_of
from protocol import CARDS, SPARE, Row, memory

NAMES = ("full_stochastic", "lora", "lora_4bit", "lora_dpo", "full_8bit")
BATCH, ROWS = 27, 81  # samples of 75 tokens on average: 2,048 a step; three steps
LONGEST = 150.0  # seconds of one setting
GB = re.compile(r"(\d+(?:\.\d+)?) ?GB\b")


def estimate(said: str) -> float | None:
    """The peak in GB that a run announced, in the first line that speaks of one; None: it announced none."""
    found = [GB.search(line) for line in said.splitlines() if re.search(r"\bpeak\b", line, re.IGNORECASE)]
    return next((float(number[1]) for number in found if number), None)


def cells(row: Row) -> dict[str, object]:
    """The figures of a setting that ran, or why it did not."""
    if row.why:
        return {"why": row.why}
    fits = [card for card in CARDS if row.peak + SPARE <= card]
    on_a_card = {"fits": f"{fits[0]} GB" if fits else f"more than {CARDS[-1]} GB"} if CUDA else {}
    return {"peak_gb": row.peak, "estimated_gb": estimate(row.said), **on_a_card, "seconds": row.seconds}


def main() -> None:
    """Measure what is asked for."""
    args = parser_of(__doc__, NAMES).parse_args()
    size = "toy" if args.toy else "8b"
    figures = begin(2, f"{BATCH} samples a step; peaks are {'of torch on the GPU' if CUDA else 'of the process'}", args)
    rows = memory(size, ROWS, args.only, BATCH, lambda: figures.left(LONGEST))
    for row in rows:
        figures.add("peak memory", row.name, **cells(row))


if __name__ == "__main__":
    main()
