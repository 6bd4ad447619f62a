"""Signals set a flag, and nothing else; ranks that work for themselves stop at their next meeting."""

import os
import signal

import pytest

from data_module import EpochLoader, own_group
from tofu.runtime import peers, ranks, run_folder, signals


@pytest.fixture(autouse=True)
def cleared():
    yield
    signals.clear()


def test_a_signal_is_a_flag_for_the_while():
    before = [signal.getsignal(getattr(signal, name)) for name in signals.NAMES]
    with signals.handled():
        with signals.handled():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.requested() == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested() == "SIGUSR1"  # the first one counts
        with pytest.raises(signals.Flagged):
            signals.look()
    assert signals.requested() is None and signals.look() is None
    assert [signal.getsignal(getattr(signal, name)) for name in signals.NAMES] == before


def test_a_second_sigint_ends_at_once(capfd):
    with signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested() == "SIGINT" and "once more ends" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_batches_end_early_and_the_meeting_says_so():
    ranks.state()
    with signals.handled():
        seen = []
        with pytest.raises(signals.Interrupted) as stop:
            for batch in ranks.share([[0], [1], [2]], "x"):
                seen += batch
                os.kill(os.getpid(), signal.SIGTERM)
            ranks.merge({})
    assert seen == [0] and stop.value.name == "SIGTERM"
    assert list(ranks.share([[0], [1]], "x")) == [[0], [1]]


def test_what_an_interrupted_run_leaves(tmp_path, monkeypatch):
    monkeypatch.setenv("TOFU_INTERRUPTED", str(tmp_path / "copy.json"))
    run_folder.interrupt(signals.Interrupted(tmp_path, "saved at step 3", 3, "SIGTERM"))
    said = (tmp_path / signals.INTERRUPTED).read_text()
    assert '"signal": "SIGTERM"' in said and '"step": 3' in said and (tmp_path / "copy.json").read_text() == said
    run_folder.going_on(tmp_path)
    assert not (tmp_path / signals.INTERRUPTED).exists()


def test_one_process_alone_watches_nobody():
    peers.join()
    assert peers.lost() is None and peers.may_speak() is None
    peers.leave()


def test_what_makes_batches_does_not_get_the_groups_signals():
    loader = EpochLoader(list(range(4)), num_workers=1, worker_init_fn=own_group, collate_fn=lambda _: os.getpgid(0))
    assert os.getpgid(0) not in list(loader)
