"""What bf16 costs on a CPU: said where it is slow, and only there."""

import pytest
import torch

from tofu.models import engines

SLOW = "precision=bf16 on a CPU without AMX is slower than fp32, often many times: take precision=fp32"


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, False),  # no faster: 1.2 times as long
        ({"avx2": True}, False),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({}, False),
    ],
)
def test_which_cpus_are_fast_in_bf16(capabilities, fast):
    assert engines.fast_bf16(capabilities) is fast


@pytest.mark.parametrize("name", ["ddp", "deepspeed"])
@pytest.mark.parametrize(("amx", "precision"), [(False, "bf16"), (False, "fp32"), (False, "auto"), (True, "bf16")])
def test_slow_bf16_is_warned_of(name, amx, precision, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    monkeypatch.setattr(engines, "_stand_alone", lambda: None)  # it sets variables of this process
    engine = engines.engine_of(name, "config/ds_config.json", precision)
    assert engine.bf16 == (precision == "bf16")
    assert caplog.messages == ([SLOW] if precision == "bf16" and not amx else [])
