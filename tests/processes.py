"""Starts Python programs with a number of host devices, alone or as processes of one program."""

import json
import os
import pathlib
import socket
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent
TIMEOUT = 600


def start(worker, devices, *arguments):
    """Starts a file, or "-c" and a program."""
    flags = os.environ.get("XLA_FLAGS", "")
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(worker), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    """The JSON in each one's last line."""
    try:
        results = [p.communicate(timeout=TIMEOUT) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, err) in zip(processes, results, strict=True):
        assert p.returncode == 0, err[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in results]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_two(worker, devices, *arguments):
    """Runs two processes of one program; they get a port and their number as further arguments."""
    port = free_port()
    return finish(*(start(worker, devices, *arguments, port, str(i)) for i in range(2)))
