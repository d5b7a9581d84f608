"""`switchyard` and `python` of the sandbox: like the real ones, but forked from a process that has imported everything.

`switchyard serve` takes the sandbox's port, goes to the background once the server is ready, and puts an end to the one
before; a reader would have another terminal.
"""

import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request


def ask(argv, streams):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["ZYGOTE"])
    message = json.dumps({"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(message).to_bytes(4, "big")], streams)
    connection.sendall(message)
    lines = connection.makefile("r")
    return int(lines.readline()), lines


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def stop(pid):
    if alive(pid):
        os.kill(pid, signal.SIGTERM)
    while alive(pid):
        time.sleep(0.01)


def serve(argv):
    port, folder = os.environ["SANDBOX_PORT"], os.environ["SANDBOX"]
    pid_file, log_file = os.path.join(folder, "server.pid"), os.path.join(folder, "server.log")
    if os.path.exists(pid_file):
        stop(int(read(pid_file)))
    with open(log_file, "wb") as log, open(os.devnull) as nothing:
        pid, _ = ask([*argv, "--port", port], [nothing.fileno(), log.fileno(), log.fileno()])
    with open(pid_file, "w") as file:
        file.write(str(pid))
    while alive(pid):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=60).close()
            return 0
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    sys.stderr.write(read(log_file))
    return 1


def main():
    name = os.path.basename(sys.argv[1])
    argv = [name, *sys.argv[2:]]
    if argv[:2] == ["switchyard", "serve"]:
        return serve(argv)
    if name.startswith("python") and argv[1:2] != [os.environ.get("SANDBOX_SCRIPT")]:
        os.execv(sys.executable, [sys.executable, *argv[1:]])
    _, lines = ask(argv, [0, 1, 2])
    return int(lines.readline() or 137)


if __name__ == "__main__":
    sys.exit(main())
