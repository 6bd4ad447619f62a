"""What is imported without inductor compiles all the same, once it is called."""

import subprocess
import sys

import torch

from tofu.runtime import libraries


def test_a_function_is_compiled_when_it_is_called(monkeypatch):
    """Once, with the options that were given, as a decorator with and without them; afterwards all is as before."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: made.append((f.__name__, options)) or f)
    before = torch.compile
    with libraries.compiled_when_called():

        @torch.compile
        def double(x):
            return 2 * x

        @torch.compile(dynamic=True)
        def half(x):
            return x / 2

    assert torch.compile is before and made == []
    assert [double(2), double(3), half(2)] == [4, 6, 1.0] and double.__name__ == "double"
    assert made == [("double", {}), ("half", {"dynamic": True})]


def test_the_trainer_loads_no_inductor():
    code = "import sys; from tofu.runtime import libraries; libraries.load_trainer(); import torch; "
    code += "names = ('peft', 'bitsandbytes', 'torch._inductor.compile_fx'); "
    code += "print([name in sys.modules for name in names], torch.compile.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True, False] torch", done.stderr[-2000:]
