from __future__ import annotations

import pytest
import torch

from tests.cuda.conftest import exact_float32
from var_ext import _C, info

BUILT = "80-real 90a-real 90-virtual"


@pytest.mark.parametrize(
    ("targets", "capability", "code"),
    [
        (BUILT, (7, 5), None),
        (BUILT, (8, 0), "machine code"),
        (BUILT, (8, 9), "machine code"),
        (BUILT, (9, 0), "machine code"),
        (BUILT, (10, 0), "PTX"),
        (BUILT, (12, 0), "PTX"),
        ("80-real 90a-real", (12, 0), None),
        ("90a-real", (9, 1), None),
        ("86", (8, 6), "machine code"),
        ("86", (8, 0), None),
        ("86", (9, 0), "PTX"),
        ("native", (12, 0), "machine code"),
    ],
)
def test_code_for(targets: str, capability: tuple[int, int], code: str | None) -> None:
    assert info.code_for(targets, capability) == code


def test_the_report_says_whose_products_train(monkeypatch: pytest.MonkeyPatch) -> None:
    for faster, said in ((True, "this package's in fp32 and bf16"), (False, "torch's")):
        monkeypatch.setattr(_C, "multiplies_faster", lambda bf16, faster=faster: faster)
        assert f"training   linear layers on the CPU: {said}\n" in info.describe_installation()


def test_the_report_names_targets_and_a_first_call_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {**_C.build_info(), "cuda": "13.0", "cuda_targets": BUILT}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    assert "CUDA 13.0 for sm_80, sm_90a, PTX 90\n" in info.describe_installation()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    said = {}
    for capability in ((9, 0), (12, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        said[capability] = info.describe_installation()
    assert "first call" not in said[9, 0]
    assert "a GPU (sm_120)" in said[12, 0] and "the first call compiles the kernels" in said[12, 0]
    assert "this build has no code for it" in said[7, 5]


def test_tests_on_hardware_keep_all_bits_of_float32() -> None:
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    with exact_float32():
        assert not any(switch.allow_tf32 for switch in switches)
    assert [switch.allow_tf32 for switch in switches] == before
