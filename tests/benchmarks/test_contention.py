import json

import pytest

from benchmarks import contention
from benchmarks.__main__ import main


@pytest.mark.slow
def test_steps_beside_busy_processes_are_timed_and_written_down(tmp_path, capsys):
    command = ["contention", "--rounds", "2", "--batch", "2", "--size", "64", "--neighbors", "0", "1"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    rows = json.loads(path.read_text())["rows"]
    expected = [(peer, waiting, busy) for peer in contention.PEERS for waiting in contention.WAITING for busy in (0, 1)]
    assert [(row["peer"], row["waiting"], row["busy"]) for row in rows] == expected
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
