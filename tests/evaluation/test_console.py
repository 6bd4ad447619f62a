"""The scores in a run's log."""

from tofu.evaluation import console


def test_a_small_table():
    """A line for each set and one for each other score; what is not there is a dash; no -0."""
    values = {"ROUGE Retain": 0.98765, "Prob. Retain": 0.5, "Truth Ratio Retain": -0.0, "ROUGE Forget": 1.0}
    assert console.table({**values, "Forget Quality": 1.9e-21}, "geometric").splitlines() == [
        "         ROUGE  Prob.  Truth Ratio (geometric)",
        "Retain  0.9877    0.5                        0",
        "Forget       1      -                        -",
        "Forget Quality  1.9e-21",
    ]
    assert console.table({}, "geometric") == ""
