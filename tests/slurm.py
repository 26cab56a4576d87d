"""A stand-in for SLURM: `sbatch` that runs a batch script as SLURM does, and `scontrol requeue`.

What it keeps of SLURM: the script is copied elsewhere and runs in the folder of the submission, with the options of
its #SBATCH lines; an array is one process a task, with their numbers in the environment; --signal=B:... goes to the
batch shell alone; what is queued again starts anew with SLURM_RESTART_COUNT and appends to its log; SIGKILL goes to
all processes of the job.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SCONTROL = '#!/bin/bash\n[[ $1 == requeue ]] || exit 1\ntouch "$SLURM_STAND_IN/requeue-$2"\n'


class Slurm:
    """`folder` is the cluster's own; jobs run in `submitted_from`."""

    def __init__(self, folder: Path, submitted_from: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        self.submitted_from = submitted_from
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/scontrol").write_text(SCONTROL)
        (folder / "bin/scontrol").chmod(0o755)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = os.environ | variables | {"PATH": path, "SLURM_STAND_IN": str(folder)}
        self.jobs = 0

    def sbatch(
        self,
        script: Path,
        *arguments: str,
        array: list[int] | None = None,
        limit: Callable[[Path], bool] | None = None,
    ) -> list[int]:
        """Runs a job to its end, and again as often as it is queued again; the exit statuses of its last tasks. Tasks
        of an array (`array`: those of --array) run together, with a `limit` one after the other. `limit`: called with
        the task's log until the time of --signal has come."""
        self.jobs += 1
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script.read_text(), re.MULTILINE))
        copy = self.folder / f"job{self.jobs:05}" / "slurm_script"
        copy.parent.mkdir()
        shutil.copy(script, copy)
        if "array" not in options:
            return [self._until_done(copy, options, arguments, {}, limit)]
        first, last = map(int, options["array"].split("-"))
        tasks = array or list(range(first, last + 1))
        numbers = {
            task: {
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_COUNT": str(len(tasks)),
                "SLURM_ARRAY_TASK_MAX": str(tasks[-1]),
            }
            for task in tasks
        }
        if limit is not None:
            return [
                self._until_done(copy, options, arguments, own, limit, task) for task, own in numbers.items()
            ]
        started = [
            self._start(copy, arguments, own, self.log(options, task)) for task, own in numbers.items()
        ]
        return [process.wait(300) for process in started]

    def log(self, options: dict[str, str], task: int = 0) -> Path:
        """Where the output of a task goes."""
        name = (
            options["output"]
            .replace("%j", str(self.jobs))
            .replace("%A", str(self.jobs))
            .replace("%a", str(task))
        )
        return self.folder / name

    def _start(
        self, script: Path, arguments: tuple[str, ...], variables: dict[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        own = {"SLURM_JOB_ID": str(self.jobs), **variables}
        with open(log, "ab") as file:
            return subprocess.Popen(
                ["bash", str(script), *arguments],
                cwd=self.submitted_from,
                env=self.environment | own,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def _until_done(
        self,
        script: Path,
        options: dict[str, str],
        arguments: tuple[str, ...],
        variables: dict[str, str],
        limit: Callable[[Path], bool] | None,
        task: int = 0,
    ) -> int:
        asked = re.fullmatch(r"B:([A-Z0-9]+)@(\d+)", options.get("signal", ""))
        log, requeued = self.log(options, task), self.folder / f"requeue-{self.jobs}"
        for restart in range(100):
            count = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
            shell = self._start(script, arguments, variables | count, log)
            while shell.poll() is None:
                if limit is not None and asked and limit(log):
                    os.kill(shell.pid, getattr(signal, f"SIG{asked[1]}"))
                    self._end(shell, int(asked[2]))
                time.sleep(0.02)
            if not requeued.exists():
                return shell.returncode
            requeued.unlink()
        raise AssertionError("queued again a hundred times")

    def _end(self, shell: subprocess.Popen[bytes], seconds: int) -> None:
        """The job's time is up in so many seconds; all of its processes are killed then."""
        try:
            shell.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            raise AssertionError("the job did not end before its time was up") from None
