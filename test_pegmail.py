#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of pegmail, and its benchmark: `python3 test_pegmail.py`, `python3 test_pegmail.py bench`.

Standard library only, real sockets and files on 127.0.0.1. Tests that drive another program
(swaks, nginx, msmtp, curl, smtp-source) skip where it is missing; PEGMAIL_TEST_PEERS=1 makes such a
skip a failure. The banners are those of pegmail.py, in the same order.
"""
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import warnings

import pegmail

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "pegmail.py")
DEADLINE = 20           # seconds that a test waits for what has to happen


def need(program):
    """Return the path of another program; skip, or fail with PEGMAIL_TEST_PEERS=1, without it."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")
    if path is None and os.environ.get("PEGMAIL_TEST_PEERS") == "1":
        raise AssertionError(f"{program} is not installed, and PEGMAIL_TEST_PEERS=1 asks for it")
    if path is None:
        raise unittest.SkipTest(f"{program} is not installed")
    return path


def until(question, what="what was waited for"):
    """Ask again and again until the answer is true; return it."""
    end = time.monotonic() + DEADLINE
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not happen within {DEADLINE} s")
        time.sleep(0.01)


def make_message(subject="hello", body="world\r\n", headers=""):
    """Return a small message as bytes."""
    return (f"From: a@example.com\r\nTo: b@example.com\r\nSubject: {subject}\r\n{headers}\r\n"
            f"{body}").encode()


class Running:
    """The real program in a folder of its own, on free ports; use it as a context manager."""

    def __init__(self, *arguments, folder=None, environ=None, wrap=()):
        self.own_folder = folder is None
        self.folder = folder or tempfile.mkdtemp(prefix="pegmail-")
        self.arguments, self.wrap = arguments, wrap
        self.environ = {name: value for name, value in os.environ.items()
                        if not name.startswith("PEGMAIL_")}
        self.environ.update(environ or {})
        self.process = None

    def start(self):
        """Start the program and wait until it says where it listens."""
        self.output = open(os.path.join(self.folder, "output.txt"), "ab+")
        self.begin = self.output.tell()
        self.process = subprocess.Popen(
            [*self.wrap, sys.executable, PROGRAM, "--smtp_port", "0", "--api_port", "0",
             "--hostname", "mx.example.com", *self.arguments],
            cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, stdout=self.output,
            stderr=subprocess.STDOUT)
        until(lambda: "Ctrl-C" in self.text() or self.process.poll() is not None, "the start")
        if self.process.poll() is not None:
            raise AssertionError("pegmail did not start: " + self.text())
        self.smtp_port = int(re.search(r"smtp://\S+:(\d+)", self.text()).group(1))
        self.api_port = int(re.search(r"http://\S+:(\d+)/", self.text()).group(1))
        lmtp = re.search(r"LMTP: +\S+:(\d+)", self.text())
        self.lmtp_port = int(lmtp.group(1)) if lmtp else None
        return self

    def text(self):
        """Return what this start has printed so far."""
        with open(self.output.name, "rb") as file:
            file.seek(self.begin)
            return file.read().decode("utf-8", "replace")

    def stop(self, number=signal.SIGTERM):
        """Stop the program by a signal; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(DEADLINE * 2)
        self.output.close()
        return status

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.output.close()
        if self.own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self, port=None, **options):
        """Return an SMTP (or other) connection in lines; see Wire."""
        return Wire(("127.0.0.1", port or self.smtp_port), **options)

    def send(self, message=None, sender="a@example.com", to=("b@example.com",)):
        """Have one message kept; return its mail_id."""
        with self.connect() as wire:
            return wire.deliver(message or make_message(), sender, to)

    def request(self, path, method="GET", headers=None, body=None):
        """Ask the API; return (status, headers, body as bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.api_port, timeout=DEADLINE)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def get(self, path, **options):
        """Ask the API; return the JSON of an answer that has to be 200."""
        status, _, body = self.request(path, **options)
        if status != 200:
            raise AssertionError(f"{path}: {status} {body!r}")
        return json.loads(body)

    def run_tool(self, *arguments, input=None, timeout=DEADLINE):
        """Run another program; return (status, output)."""
        done = subprocess.run([str(word) for word in arguments], input=input, timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.folder)
        return done.returncode, done.stdout.decode("utf-8", "replace")


class Wire:
    """A client that speaks in bytes and reads whole replies."""

    def __init__(self, address, greeting=True):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(address)
        self.buffer = b""
        if greeting:
            self.greeting = self.reply()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def line(self):
        """Return the next line with its end; b"" at the end of the stream."""
        while b"\n" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                rest, self.buffer = self.buffer, b""
                return rest
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line + b"\n"

    def reply(self):
        """Return the next reply as text, its lines joined by \\n; "" at the end of the stream."""
        lines = []
        while True:
            line = self.line().decode()
            lines.append(line.rstrip("\r\n"))
            if line[3:4] != "-":
                return "\n".join(lines)

    def send(self, data):
        """Send bytes, or text."""
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def ask(self, line):
        """Send a line; return the reply."""
        self.send(line + "\r\n")
        return self.reply()

    def rest(self):
        """Return all that comes until the stream ends."""
        data, self.buffer = self.buffer, b""
        while True:
            try:
                more = self.socket.recv(65536)
            except ConnectionResetError:
                return data
            if not more:
                return data
            data += more

    def deliver(self, message, sender="a@example.com", to=("b@example.com",)):
        """Send a message (CRLF bytes); return the mail_id of the reply, which has to be 250."""
        for line in ["EHLO client.example", f"MAIL FROM:<{sender}>",
                     *(f"RCPT TO:<{name}>" for name in to)]:
            reply = self.ask(line)
            if not reply.startswith("250"):
                raise AssertionError(f"{line}: {reply}")
        reply = self.ask("DATA")
        if not reply.startswith("354"):
            raise AssertionError(f"DATA: {reply}")
        stuffed = re.sub(rb"(?m)^\.", b"..", message)
        self.send(stuffed + (b"" if stuffed.endswith(b"\r\n") else b"\r\n") + b".\r\n")
        reply = self.reply()
        match = re.fullmatch(r"250 2\.0\.0 Kept as (\d+)", reply)
        if not match:
            raise AssertionError(f"content: {reply}")
        return int(match.group(1))


class ServerCase(unittest.TestCase):
    """Tests that share one running server; `options` are its arguments."""

    options = ()
    expected_bugs = False

    @classmethod
    def setUpClass(cls):
        cls.server = Running(*cls.options)
        cls.addClassCleanup(cls.server.__exit__)
        cls.server.start()

    @classmethod
    def tearDownClass(cls):
        status = cls.server.stop()
        text = cls.server.text()
        if status != 0 or "Traceback" in text:
            raise AssertionError(f"exit status {status}; the log says:\n{text[-3000:]}")


if __name__ == "__main__":
    warnings.simplefilter("error", ResourceWarning)
    unittest.main()
