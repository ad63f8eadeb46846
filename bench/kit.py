"""What every measurement stands on: the two C programs, pinned processes, and what /proc says of them.

Not here: which gateways there are (gateways.py) and what is measured (measure.py).
"""

import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOP_PATIENCE_S = 10
QUIET_LOOK_S = 0.5
QUIET_SHARE = 0.1
"""Of one core, on both together."""


class BenchError(Exception):
    """Something the reader can mend: a missing tool, a gateway that does not start."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def raise_file_limit() -> None:
    """A thousand streams are two thousand sockets in a gateway, and its limit is inherited from here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def compile_tools(build: Path) -> None:
    cc = shutil.which("cc")
    if cc is None:
        raise BenchError("no C compiler: install gcc or clang so that `cc` is found")
    build.mkdir(parents=True, exist_ok=True)
    for name in ("upstream", "load"):
        command = [cc, "-O2", "-Wall", "-Wextra", "-std=gnu11", "-o", str(build / name), str(HERE / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"{name}.c does not compile:\n{done.stderr}")


def pinned(core: int, command: list[str]) -> list[str]:
    return ["taskset", "-c", str(core), *command]


def get(port: int, path: str, timeout_s: float = 2.0) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process of ours and everything it started: it leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running(command: list[str], *, env: dict[str, str], cwd: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        stop(process)


def wait_ready(process: subprocess.Popen[bytes], port: int, path: str, *, within_s: float, log: Path) -> float:
    """Seconds until GET path answers 200."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, http.client.HTTPException):
            if get(port, path)[0] == 200:
                return time.monotonic() - began
        time.sleep(0.005)
    raise BenchError(f"not ready on {path} within {within_s:.0f} s:\n{log.read_text(errors='replace')[-3000:]}")


# --- what /proc says ---


def process_tree(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    tree = [root]
    for pid in tree:
        tree.extend(child for child, parent in parents.items() if parent == pid)
    return tree


def cpu_s(root: int) -> float:
    """User and system time of all threads of the process and its descendants."""
    ticks = 0
    for pid in process_tree(root):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / CLOCK_TICKS_PER_S


def rss_kb(root: int) -> int:
    pages = 0
    for pid in process_tree(root):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


def core_busy_s(core: int) -> float:
    """Seconds the core worked, for us or for anybody, and seconds stolen from it by the host."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
            return (user + nice + system + irq + softirq + steal) / CLOCK_TICKS_PER_S
    raise BenchError(f"no core {core} in /proc/stat")


@contextlib.contextmanager
def cores_kept_awake() -> Iterator[bool]:
    """Lets no core sleep, where the kernel and our rights allow it; tells whether they do.

    Sending to a process on a core that sleeps costs the sender its waking, on a virtual machine 8 µs and more. That is
    the sleep of our load generator, and not the gateway's work; a gateway that is fast enough never sees it.
    """
    try:
        device = open("/dev/cpu_dma_latency", "wb", buffering=0)  # noqa: SIM115  # held open for the whole run
    except OSError:
        yield False
        return
    with device:
        device.write(bytes(4))
        yield True


# --- the upstream and the load generator ---


@dataclass(frozen=True, slots=True)
class Upstream:
    port: int

    def pace(self, events_per_s: float, *, in_step: bool = False) -> None:
        """Events a second for each stream opened from now on; 0 sends 66 at once. Ends the streams now open."""
        get(self.port, f"/bench/pace?rate={events_per_s}{'&in_step' if in_step else ''}")

    def streams_open(self) -> int:
        return int(json.loads(get(self.port, "/bench/streams")[1])["open"])


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the load generator printed at its end, and what the gateway spent meanwhile."""

    seconds: float
    planned: int
    completed: int
    errors: int
    first_bad_status: int
    latency_p50_ms: float
    latency_p99_ms: float
    streams: int
    streams_lost: int
    events: int
    delay_p50_ms: float
    delay_p99_ms: float
    gateway_cpu_s: float
    """0.0 where there is no gateway."""
    gateway_rss_kb: int
    """At its height, while the load was on."""
    others_share: float
    """Of the gateway's core: work of others and time stolen by the host. Above 0.1, distrust the figures."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One run's place: where the tools are, and which core is whose."""

    build: Path
    scratch: Path
    gateway_core: int
    load_core: int
    upstream: Upstream
    patient_until: float
    """On the monotonic clock: when to wait no more for others to leave the two cores."""

    @property
    def patient(self) -> bool:
        return time.monotonic() < self.patient_until

    def wait_for_quiet(self) -> None:
        """Until nobody else works on the two cores, or patience ends."""
        while self.patient:
            before_s = self._cores_busy_s()
            time.sleep(QUIET_LOOK_S)
            if self._cores_busy_s() - before_s <= QUIET_SHARE * QUIET_LOOK_S:
                return

    def _cores_busy_s(self) -> float:
        return core_busy_s(self.gateway_core) + core_busy_s(self.load_core)

    def load(
        self,
        kind: str,
        *,
        port: int,
        request: Path,
        gateway_pid: int | None,
        read_rss_after_s: float = 0.0,
        **options: float,
    ) -> LoadResult:
        command = [str(self.build / "load"), kind, "--port", str(port), "--request", str(request)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        process = subprocess.Popen(
            pinned(self.load_core, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            if not process.stdout.readline():
                raise BenchError(f"load {kind} failed: {process.stderr.read().decode(errors='replace')}")
            began = time.monotonic()
            cpu_before, busy_before = self._gateway_cpu_s(gateway_pid), core_busy_s(self.gateway_core)
            rss = 0
            if gateway_pid is not None and read_rss_after_s:
                time.sleep(read_rss_after_s)
                rss = rss_kb(gateway_pid)
            printed = json.loads(process.stdout.readline())
            cpu = self._gateway_cpu_s(gateway_pid) - cpu_before
            busy = core_busy_s(self.gateway_core) - busy_before
            elapsed_s = time.monotonic() - began
        finally:
            stop(process)
            process.stdout.close()
            process.stderr.close()
        known = LoadResult.__dataclass_fields__
        return LoadResult(
            **{name: value for name, value in printed.items() if name in known},
            gateway_cpu_s=cpu,
            gateway_rss_kb=rss,
            others_share=round(max(0.0, busy - cpu) / elapsed_s, 3),
        )

    def _gateway_cpu_s(self, pid: int | None) -> float:
        return cpu_s(pid) if pid is not None else 0.0


@contextlib.contextmanager
def started_upstream(build: Path, scratch: Path, core: int) -> Iterator[Upstream]:
    port = free_port()
    log = scratch / "upstream.log"
    command = pinned(core, [str(build / "upstream"), "--port", str(port)])
    with running(command, env=dict(os.environ), cwd=scratch, log=log) as process:
        wait_ready(process, port, "/bench/streams", within_s=5, log=log)
        yield Upstream(port)


def first_line(command: list[str]) -> str:
    """Of what a program says about its version, wherever it says it."""
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip().splitlines()[0]


def machine_facts() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": models[0] if models else os.uname().machine,
        "cores": os.cpu_count() or 1,
        "memory_gb": round(memory_kb / 1024 / 1024),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "compiler": first_line(["cc", "--version"]),
    }
