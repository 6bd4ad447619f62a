"""AltPO's alternates: wrong answers out of a file, preferred to the true ones by `losses.dpo`.

Source: Mekala et al. 2024, arXiv 2409.13474; scripts/make_alternates.py writes the file.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import utils
from tofu.methods.objective import Method, contract_of
from utils import BadInput


class Altpo(Method):
    """Each forget row is trained with every alternate that the file has of it, in the place of a refusal."""

    @dataclass
    class Keys:
        """See config/forget_loss/altpo.yaml."""

        alternates: str = field(metadata={"how": "a file that scripts/make_alternates.py makes for a split (--help)"})

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Raise BadInput unless the forget term reads alternates, and their file is there."""
        method = cfg.forget_loss
        if "idk" not in contract_of("forget_loss.forget", method.forget).parts:
            raise BadInput(
                f"forget_loss.alternates: {method.forget} reads none: leave it out, and sweep altpo by itself"
            )
        if not Path(utils.find(method.alternates)).is_file():
            raise BadInput(
                f"forget_loss.alternates={method.alternates}: no such file; scripts/make_alternates.py makes one of a "
                "split"
            )

    def reads(self) -> tuple[str, ...]:
        """The file of alternates."""
        return (utils.find(self.keys.alternates),)

    def rows(self, forget: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str] | None]:
        """A row for each alternate of the file, and the alternates."""
        return load_alternates(self.keys.alternates, forget)


def load_alternates(path: str, rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """The wrong answers in a file of scripts/make_alternates.py, and the forget rows that they belong to.

    Args:
        path: JSON lines {"question", "answer", "alternate"}; a row has as many as it has lines.
        rows: the forget set.

    Returns:
        Rows and alternates, one a line of the file.

    Raises:
        BadInput: a file that is not so, or of other rows than these.
    """
    try:
        lines = [json.loads(line) for line in Path(utils.find(path)).read_text(encoding="utf-8").split("\n") if line]
        found = [({key: line[key] for key in ("question", "answer")}, line["alternate"].strip()) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"forget_loss.alternates={path} cannot be read ({type(error).__name__}: {error}): it must hold lines like "
            '{"question": "...", "answer": "...", "alternate": "..."}, as scripts/make_alternates.py writes them'
        ) from None
    have, want = ({(row["question"], row["answer"]) for row in these} for these in ((r for r, _ in found), rows))
    if have != want:
        raise BadInput(
            f"forget_loss.alternates={path} was made for another split: {len(want - have)} rows of the forget set have "
            f"none in it, and {len(have - want)} of its rows are not in the set; scripts/make_alternates.py makes one"
        )
    return [row for row, _ in found], [alternate for _, alternate in found]
