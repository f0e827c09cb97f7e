"""`effdet-fast doctor`: green here, and it says what is wrong when something is."""

import subprocess
import sys

import pytest
import torch

from effdet_fast import _build_info, _libraries, diagnostics
from effdet_fast.cli import doctor


def test_doctor_is_green(capsys):
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for expected in (
        "Python",
        "torch",
        "CPU kernels",
        "sigmoid_focal_loss on cpu",
        "batched_nms_padded on cpu",
        "soft_nms on cpu",
        "match_anchors on cpu",
        "decode_detections on cpu",
        "squeeze_excite on cpu",
        "All is well.",
    ):
        assert expected in printed
    assert "FAILED" not in printed


def test_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "effdet_fast", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "All is well." in done.stdout, done.stdout + done.stderr


def test_a_wrong_op_fails_the_report(monkeypatch, capsys):
    monkeypatch.setitem(diagnostics.SELF_TESTS, "sigmoid_focal_loss", lambda device: 0.5)
    assert doctor.main() == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "sigmoid_focal_loss on cpu FAILED differs from its reference by 5.0e-01" in words


def test_an_op_that_raises_does_not_hide_the_others(monkeypatch):
    def broken(device):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(diagnostics.SELF_TESTS, "weighted_fusion", broken)
    findings = {f.name: f for f in diagnostics.diagnose().findings}
    assert findings["weighted_fusion on cpu"].failed and "no such kernel" in findings["weighted_fusion on cpu"].value
    assert findings["weighted_fusion on cpu"].remedy and not findings["depthwise_conv2d on cpu"].failed


def test_nan_is_not_a_pass(monkeypatch):
    monkeypatch.setitem(diagnostics.SELF_TESTS, "sigmoid_focal_loss", lambda device: float("nan"))
    assert not diagnostics.diagnose().ok


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(_libraries.missing, "cpu", "libtorch_cpu.so: cannot open shared object file")
    report = diagnostics.diagnose()
    (finding,) = (f for f in report.findings if f.name == "CPU kernels")
    assert finding.failed and "libtorch_cpu.so" in finding.value and finding.remedy
    assert not any(f.name.endswith("on cpu") for f in report.findings)


def test_missing_cuda_kernels_matter_only_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setitem(_libraries.missing, "cuda", "built with CUDA 13.0, but torch 2.11.0 has none")
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        (finding,) = (f for f in diagnostics.diagnose().findings if f.name == "CUDA kernels")
        assert finding.failed == gpu and bool(finding.remedy) == gpu and "built with CUDA 13.0" in finding.value


def test_sources_that_changed_after_the_build_are_noticed(monkeypatch):
    assert not any(f.name == "sources" for f in diagnostics.diagnose().findings)
    monkeypatch.setattr(diagnostics, "sources_hash", lambda root: "other")
    (finding,) = (f for f in diagnostics.diagnose().findings if f.name == "sources")
    assert not finding.failed and "changed" in finding.value and finding.remedy


@pytest.mark.parametrize(
    "built,capability,covered",
    [
        ("sm_80, sm_90, PTX", (9, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_90", (10, 0), False),
        ("sm_80, sm_90, PTX", (12, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_100", (10, 0), True),
    ],
)
def test_architectures(built, capability, covered):
    assert _build_info.covers(built, capability) == covered


def test_self_tests_compare_float32_without_tf32(monkeypatch):
    seen = []
    monkeypatch.setattr(
        diagnostics, "SELF_TESTS", {"op": lambda device: seen.append(torch.backends.cudnn.allow_tf32) or 0.0}
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    diagnostics._add_self_tests(diagnostics.Report(), torch.device("cpu"))
    assert seen == [False] and torch.backends.cudnn.allow_tf32


def test_self_tests_can_fail(monkeypatch):
    """Negative control: a reference that is off by a little is told apart from the op."""
    from effdet_fast.ops import focal_loss

    sound = focal_loss.sigmoid_focal_loss_reference
    monkeypatch.setattr(focal_loss, "sigmoid_focal_loss_reference", lambda *a, **k: sound(*a, **k) * 1.01)
    assert diagnostics.SELF_TESTS["sigmoid_focal_loss"](torch.device("cpu")) > 1e-3
