"""`python -m benchmarks build`: what ninja logged, slowest first."""

import subprocess

from benchmarks import __main__ as command
from benchmarks import build_times
from benchmarks.build_times import Compiled


def test_logs_are_read_slowest_first(tmp_path):
    for library, lines in {
        "kernels_cpu": ["1\t2501\t7\t{}/csrc/nms/nms_cpu.o\tab", "0\t900\t7\t{}/csrc/library.o\tcd"],
        "kernels_cuda": ["5\t60005\t7\t{}/csrc/nms/nms_cuda.o\tef"],
    }.items():
        folder = tmp_path / library
        folder.mkdir()
        text = "\n".join(["# ninja log v7", *(line.format(folder) for line in lines)])
        (folder / ".ninja_log").write_text(text + "\n")
    assert build_times.read_logs(tmp_path) == [
        Compiled("kernels_cuda", "csrc/nms/nms_cuda", 60.0),
        Compiled("kernels_cpu", "csrc/nms/nms_cpu", 2.5),
        Compiled("kernels_cpu", "csrc/library", 0.9),
    ]


def test_the_command_builds_in_a_folder_of_its_own(monkeypatch, capsys):
    def build(arguments, *, cwd, env, **options):
        folder = arguments[arguments.index("--build-temp") + 1]
        assert arguments[1:3] == ["setup.py", "build_ext"] and cwd == build_times.ROOT
        assert (env["MAX_JOBS"], env["CCACHE_DISABLE"]) == ("3", "1")
        with open(f"{folder}/.ninja_log", "w") as log:
            log.write(f"# ninja log v7\n0\t1500\t7\t{folder}/csrc/module.o\tab\n")
        return subprocess.CompletedProcess(arguments, 0, "compiling\neffdet_fast: CPU (baseline)\n", "")

    monkeypatch.setattr(build_times.subprocess, "run", build)
    assert command.main(["build", "--jobs", "3"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.split() == ["1.5", "s", first.split()[2], "csrc/module"]
    assert "3 at a time" in last and last.endswith("effdet_fast: CPU (baseline)")


def test_a_build_that_fails_is_shown(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 2, "nvcc: no", "error: ninja stopped")
    monkeypatch.setattr(build_times.subprocess, "run", lambda *arguments, **options: failed)
    assert command.main(["build"]) == 2
    printed = capsys.readouterr().out
    assert "nvcc: no" in printed and "ninja stopped" in printed
