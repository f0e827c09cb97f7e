"""The table of call costs."""

import torch

from benchmarks import overhead


def test_prints_each_call_with_its_times(capsys):
    threads = torch.get_num_threads()
    try:
        assert overhead.main(["--seconds", "0.001"]) == 0
    finally:
        torch.set_num_threads(threads)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["us", "per", "call", "forward", "forward", "+", "backward"]
    names = [call.name for call in overhead.calls()]
    assert [row[:24].strip() for row in rows] == names and len(names) > 8
    for row in rows:
        assert all(0.1 < float(cell) < 1e6 for cell in row[24:].split())
