"""Processes that hold a connection to rank 0, without the libraries: who speaks, and what is taken for a death."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import REPO

WORKER = """
import os, secrets, socket, sys, time
from tofu.runtime import peers, ranks
PORT, do = int(sys.argv[1]), sys.argv[2]
ranks.merge = lambda found: found
def from_rank_0(value):  # as if broadcast: the port is said on the command line
    return PORT, "token"
ranks.from_rank_0 = from_rank_0
peers._listen = lambda: socket.create_server(("127.0.0.1", PORT))
time.sleep(0.5 * (ranks.rank() > 0))
peers.GRACE = 2
peers.join()
print("joined", flush=True)
if do == "fail":
    time.sleep(1)
    told = peers.may_speak()
    print("speaks" if told else "silent", flush=True)
    sys.exit(1)
if do == "leave":
    time.sleep(1)
    peers.leave()
time.sleep(60 if do == "hang" else 3)
print("alive", peers.lost(), flush=True)
"""


def start(rank: int, port: int, do: str) -> subprocess.Popen:
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, **here, "PYTHONPATH": str(REPO)}
    return subprocess.Popen([sys.executable, "-c", WORKER, str(port), do], env=environment, **pipes)


@pytest.mark.parametrize(("zero", "one", "said"), [("leave", "hang", ""), ("hang", "hang", "is gone")])
def test_a_killed_process_ends_the_others_and_a_goodbye_does_not(zero, one, said):
    """Rank 1 waits for ever. It is killed: rank 0 says so and ends. Rank 0 has left before: nobody is told anything."""
    both = start(0, 29625, zero), start(1, 29625, one)
    assert both[1].stdout.readline() == "joined\n"
    time.sleep(0.5 if said else 2)
    both[1].send_signal(signal.SIGKILL)
    out = both[0].communicate(timeout=20)[0]
    assert said in out and out.count("error: ") == bool(said), out
    assert both[0].returncode == bool(said)
    both[1].communicate()


@pytest.mark.parametrize(("failing", "speakers"), [((1,), {1}), ((0, 1), {0})])
def test_one_rank_speaks(failing, speakers):
    """Rank 0 where both fail, else the one that fails; the other one is ended though it hangs."""
    both = [start(rank, 29626, "fail" if rank in failing else "hang") for rank in (0, 1)]
    outs = [one.communicate(timeout=30)[0] for one in both]
    assert {rank for rank in (0, 1) if "speaks" in outs[rank]} == speakers, outs
    assert [one.returncode for one in both] == [1, 1]
