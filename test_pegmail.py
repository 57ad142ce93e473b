#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of pegmail, and its benchmark: `python3 test_pegmail.py`, `python3 test_pegmail.py bench`.

Standard library only, real sockets and files on 127.0.0.1. Tests that drive another program
(swaks, nginx, msmtp, curl, smtp-source) skip where it is missing; PEGMAIL_TEST_PEERS=1 makes such a
skip a failure. The banners are those of pegmail.py, in the same order.
"""
import argparse
import ast
import atexit
import base64
import binascii
import collections
import concurrent.futures
import contextlib
import datetime
import ctypes
import email
import email.message
import email.policy
import email.utils
import encodings.aliases
import errno
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import mailbox
import os
import platform
import py_compile
import quopri
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import smtplib
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import traceback
import unittest
import urllib.parse
import warnings
from concurrent.futures import Future
from unittest import mock

import pegmail
HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "pegmail.py")
DEADLINE = 20           # seconds that a test waits for what has to happen


def memory_folder():
    """Return a new folder for tests that are not about the disk: in memory, if there is plenty."""
    shared = "/dev/shm"
    plenty = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 1 << 30
    return tempfile.mkdtemp(prefix="pegmail-", dir=shared if plenty else None)


def need(program):
    """Return the path of another program; skip, or fail with PEGMAIL_TEST_PEERS=1, without it."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")
    if path is None and os.environ.get("PEGMAIL_TEST_PEERS") == "1":
        raise AssertionError(f"{program} is not installed, and PEGMAIL_TEST_PEERS=1 asks for it")
    if path is None:
        raise unittest.SkipTest(f"{program} is not installed")
    return path


def until(question, what="what was waited for", seconds=DEADLINE):
    """Ask again and again until the answer is true; return it."""
    end = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not happen within {seconds} s")
        time.sleep(0.003)


def make_message(subject="hello", body="world\r\n", headers=""):
    """Return a small message as bytes."""
    return (f"From: a@example.com\r\nTo: b@example.com\r\nSubject: {subject}\r\n{headers}\r\n"
            f"{body}").encode()


@functools.lru_cache(maxsize=None)
def compiled():
    """Return a folder with the program's bytecode, pegmail.pyc: it starts in half the time."""
    folder = tempfile.mkdtemp(prefix="pegmail-")
    atexit.register(shutil.rmtree, folder)
    py_compile.compile(PROGRAM, os.path.join(folder, "pegmail.pyc"), doraise=True)
    return folder


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
            [*self.wrap, sys.executable, compiled() + "/pegmail.pyc", "--smtp_port", "0",
             "--api_port", "0", "--hostname", "mx.example.com", *self.arguments],
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
        until(lambda: self.process.poll() is not None, "the end", DEADLINE * 2)
        self.output.close()
        return self.process.returncode

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
    """A client that speaks in bytes and reads whole replies; `source` is its own address."""

    def __init__(self, address, greeting=True, source=None):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(DEADLINE)
        if source:
            self.socket.bind((source, 0))
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
        match = re.fullmatch(r"250 2\.0\.0 (?:Kept|OK: queued) as (\d+)", reply)
        if not match:
            raise AssertionError(f"content: {reply}")
        return int(match.group(1))


class ServerCase(unittest.TestCase):
    """Tests that share one running server; `options` are its arguments."""

    options = ()
    expected_bugs = False

    @classmethod
    def setUpClass(cls):
        folder = memory_folder()
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.server = Running(*cls.options, folder=folder)
        cls.addClassCleanup(cls.server.__exit__)
        cls.server.start()

    @classmethod
    def tearDownClass(cls):
        status = cls.server.stop()
        text = cls.server.text()
        if status != 0 or "Traceback" in text:
            raise AssertionError(f"exit status {status}; the log says:\n{text[-3000:]}")


README = os.path.join(HERE, "README.md")
TESTS = os.path.join(HERE, "test_pegmail.py")


PEER = "192.0.2.9"              # a client that is not on this host
OVER = "E:"                     # in a transcript: the server has ended the connection


# -- Sessions without sockets --

class Offline:
    """A real store, loop and Intake in a folder of their own, for sessions fed by hand."""

    def __init__(self, *options):
        self.folder = memory_folder()
        self.quiet = logging.NullHandler()
        pegmail.log.addHandler(self.quiet)
        path = os.path.join(self.folder, "media")
        self.settings, _ = pegmail.load_settings(
            ["--hostname", "mx.example.com", *options], {}, os.devnull)
        self.store = pegmail.Store(os.path.join(self.folder, "mail.db"), path)
        self.loop = pegmail.Loop()
        self.intake = pegmail.Intake(self.settings, self.store, self.loop)
        self.intake.tls = pegmail.load_certificate(self.settings)
        self.listeners = []
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for listener in self.listeners:
            self.loop.call_soon(listener.close)
        self.loop.stop()
        self.thread.join()
        self.store.close()
        pegmail.log.removeHandler(self.quiet)
        shutil.rmtree(self.folder)

    def listen(self, make=None, idle=60, longest=60, buffer=0):
        """Accept connections on a free port for as long as this lives; return the port."""
        sock = socket.create_server(("127.0.0.1", 0), backlog=1000)
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        limits = pegmail.Limits(10000, 10000, self.intake.is_trusted_proxy)
        listener = pegmail.Listener(
            self.loop, sock, make or (lambda peer: pegmail.SMTPSession(self.intake, peer, "0")),
            b"421 4.7.0 busy\r\n", idle, longest, limits, lambda: self.intake.tls)
        self.listeners.append(listener)
        return sock.getsockname()[1]

    def ask(self, ask):
        """Do what a session asks for; return (result, error)."""
        heard = []
        event = threading.Event()

        def done(result, error):
            heard.extend((result, error))
            event.set()
        self.loop.call_soon(ask.start, *ask.args, done)
        if not event.wait(DEADLINE):
            raise AssertionError(f"{ask} was never answered")
        return heard

    def raw(self, ident):
        """Return a stored message as bytes."""
        source = self.store.raw(ident)
        return source.read(0, source.size)

    def newest(self):
        """Return the id of the newest message, 0 if there is none."""
        rows = self.store.page(pegmail.Filter(), 1, reverse=True)
        return rows[0].id if rows else 0

    def all_raw(self, after=0):
        """Return every stored message, oldest first, without its trace fields."""
        wanted = pegmail.Filter(after=after)
        return [content_of(self.raw(row.id)) for row in self.store.page(wanted, 1000)]

    def talk(self, *data, peer=PEER, kind=pegmail.SMTPSession):
        """Feed pieces of bytes to a new session; return all it has said."""
        dialogue = Dialogue(self, peer, kind)
        for piece in data:
            dialogue.feed(piece)
        dialogue.end()
        return dialogue.said


class Dialogue:
    """A session fed by hand: what it wants is done at once, what it says is gathered."""

    def __init__(self, app, peer=PEER, kind=pegmail.SMTPSession):
        self.app = app
        self.said = b""
        self.session = kind(app.intake, peer, "0badcafe")
        self.obey(self.session.start())

    def feed(self, data):
        """Give bytes to the session, if it is not over."""
        if self.session.wants is not None:
            self.obey(self.session.feed(data))

    def ask(self, line):
        """Send a line; return what comes back, as text."""
        before = len(self.said)
        self.feed(line.encode() + b"\r\n")
        return self.said[before:].decode()

    def obey(self, wants):
        """Do what the session wants, until that is more bytes or nothing."""
        while True:
            self.said += self.session.outbox
            self.session.outbox.clear()
            if wants is None or wants is pegmail.READ:
                return
            try:
                result, error = None, None
                if isinstance(wants, pegmail.Work):
                    result = wants.func(*wants.args)
                elif isinstance(wants, pegmail.Ask):
                    result, error = self.app.ask(wants)
                elif wants is pegmail.STARTTLS:
                    result = "TLSv1.3 cipher TLS_AES_256_GCM_SHA384 bits 256"
            except OSError as problem:
                error = problem
            wants = self.session.resume(result) if error is None else self.session.fail(error)

    @property
    def over(self):
        """Has the session ended the conversation?"""
        return self.session.wants is None

    def end(self):
        """Hang up."""
        self.session.ended()


def content_of(raw):
    """Return a stored message without the trace fields on top, which have to be well-formed."""
    trace = re.match(rb"Return-Path: <[^\n]*>\r\n"
                     rb"Received: from [^\n]*\r\n\tby [^\n]*\r\n\tid [^\n;]*(\r\n\tfor <[^\n]*>)?;"
                     rb"\r\n\t\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d \+0000\r\n", raw)
    if not trace:
        raise AssertionError(f"no trace fields: {raw[:500]!r}")
    return raw[trace.end():]


# -- Transcripts --

BEGUN = {"EHLO": "S: 220 *\nC: EHLO client.example\nS: 250-*\n"}
BEGUN["RCPT"] = BEGUN["EHLO"] + ("C: MAIL FROM:<ann@client.example>\nS: 250 2.1.0 *\n"
                                 "C: RCPT TO:<bob@mail.example>\nS: 250 2.1.5 *\n")
BEGUN["DATA"] = BEGUN["RCPT"] + "C: DATA\nS: 354 *\n"


def read_transcript(text):
    r"""Return the [(kind, bytes or pattern)] of a transcript.

    `S: ` is a line of the server, in which `*` matches anything (`S: 250-*` a whole reply), `C: `
    one of the client, `c: ` the same without a line end; escapes such as \x00 are read in both.
    `E:` says that the server ends the connection; `B: RCPT` is how most begin, up to that reply.
    """
    steps = []
    text = re.sub(r"\bB: (\w+)", lambda match: BEGUN[match.group(1)], text)
    for line in filter(None, map(str.strip, text.split("\n"))):
        if line == OVER:
            steps.append((OVER, b""))
        elif line[:3] in ("C: ", "c: ", "S: ") or line == "C:":
            kind, words = line[:1], line[3:]
            if kind != "S":
                words = words.encode().decode("unicode_escape").encode("latin-1")
            steps.append(("C", words + b"\r\n") if kind == "C" else (kind.upper(), words))
        else:
            raise ValueError(f"not a line of a transcript: {line!r}")
    return steps


def is_match(pattern, line):
    """Does a line of the server match a pattern of a transcript?"""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), line, re.S) is not None


def take_reply(pattern, lines):
    """Take from an iterator of lines what a pattern stands for; raise if it is something else."""
    line = next(lines, "nothing")
    if not is_match(pattern, line):
        raise AssertionError(f"expected {pattern!r}, got {line!r}")
    while pattern.endswith("-*") and line[3:4] == "-":
        line = next(lines, "nothing")
        if line[:3] != pattern[:3]:
            raise AssertionError(f"expected {pattern!r}, got {line!r}")


class TranscriptCase(ServerCase):
    """Plays transcripts in three ways: in one piece, byte by byte, and over a socket."""

    kind = "smtp"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.app = Offline(*cls.options)
        cls.addClassCleanup(cls.app.__exit__)

    def play(self, text, end=b"\r\n"):
        """Play a transcript in each way; return the messages that were kept, the same in each."""
        steps = [(kind, step.replace(b"\r\n", end) if kind == "C" else step)
                 for kind, step in read_transcript(text)]
        kept = []
        for way in (self.play_whole, self.play_bytes, self.play_socket):
            with self.subTest(way.__name__):
                kept.append(way(steps))
        self.assertTrue(kept == kept[:1] * 3, "kept differently")
        return kept[0] if kept else None

    def play_whole(self, steps):
        """Feed all bytes of the client at once, but for a pause at STARTTLS."""
        data = b"".join(step for kind, step in steps if kind == "C")
        return self.play_pieces(steps, re.split(rb"(?<=STARTTLS\r\n)", data))

    def play_bytes(self, steps):
        """Feed one byte at a time."""
        data = b"".join(step for kind, step in steps if kind == "C")
        return self.play_pieces(steps, [data[place:place + 1] for place in range(len(data))])

    def play_pieces(self, steps, pieces):
        """Feed pieces to a session without a socket, and compare what it says."""
        before = self.app.newest()
        dialogue = Dialogue(self.app, "127.0.0.1",
                            pegmail.LMTPSession if self.kind == "lmtp" else pegmail.SMTPSession)
        for piece in pieces:
            dialogue.feed(piece)
        dialogue.end()
        lines = iter(dialogue.said.decode().split("\r\n")[:-1])
        for kind, step in steps:
            if kind == "S":
                take_reply(step, lines)
        self.assertEqual(list(lines), [], "was said too much")
        self.assertEqual(dialogue.over, (OVER, b"") in steps)
        return self.app.all_raw(before)

    def play_socket(self, steps):
        """Speak with the running server, waiting for each reply before the next group."""
        before = self.newest()
        with self.server.connect(getattr(self.server, self.kind + "_port"),
                                 greeting=False) as wire:
            def lines():
                while True:
                    line = wire.line()
                    if not line:
                        return
                    yield line.decode()[:-2]
            said = lines()
            for last, (kind, step) in zip([None, *steps], steps):
                if last == ("C", b"STARTTLS\r\n") and step.startswith("220 "):
                    take_reply(step, said)
                    self.assertEqual(wire.buffer, b"")
                    wire.socket = client_context().wrap_socket(wire.socket)
                elif kind == "C":
                    wire.send(step)
                elif kind == "S":
                    take_reply(step, said)
            if (OVER, b"") not in steps and not isinstance(wire.socket, ssl.SSLSocket):
                wire.socket.shutdown(socket.SHUT_WR)
            if (OVER, b"") in steps or not isinstance(wire.socket, ssl.SSLSocket):
                self.assertEqual(wire.rest(), b"", "was said too much")
        return [content_of(raw) for raw in self.raw_since(before)]

    def newest(self):
        """Return the last mail_id of the running server."""
        items = self.server.get("/list_short?count=1&reverse=1")["items"]
        return items[0]["mail_id"] if items else 0

    def raw_since(self, before):
        """Return what the running server has kept since, oldest first."""
        items = self.server.get(f"/list_short?count=1000&after={before}")["items"]
        return [self.raw(item["mail_id"]) for item in items]

    def raw(self, ident):
        """Return a message of the running server as bytes."""
        status, _, body = self.server.request(f"/raw?mail_id={ident}")
        self.assertEqual(status, 200)
        return body


# -- Certificates --

class Certificate:
    """A self-signed certificate and its key in a folder of their own; use it in setUpClass."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="pegmail-")
        self.cert, self.key = (os.path.join(self.folder, name) for name in ("cert", "key"))
        subprocess.run([need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30", "-subj",
                        "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                        "-keyout", self.key, "-out", self.cert],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.options = ("--ssl_cert", self.cert, "--ssl_key", self.key)

    def remove(self):
        """Remove the files."""
        shutil.rmtree(self.folder)


class TLSCase(TranscriptCase):
    """Transcripts with a server that has a certificate."""

    more = ()

    @classmethod
    def setUpClass(cls):
        cls.certificate = Certificate()
        cls.addClassCleanup(cls.certificate.remove)
        cls.options = (*cls.certificate.options, *cls.more)
        super().setUpClass()


def client_context():
    """Return a client's context that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


HELLO = "EHLO client.example"


SENDER = "MAIL FROM:<ann@client.example>"


RECIPIENT = "RCPT TO:<bob@mail.example>"


TRANSACTION = f"{HELLO}\r\n{SENDER}\r\n{RECIPIENT}\r\nDATA\r\n".encode()


# =====================================================================================
# 1. Settings: what the operator may choose, and where from
# =====================================================================================

# For each option a text as an operator writes it, and the value it stands for.
SAMPLES = {
    "db_path": ("other.db", "other.db"),
    "media_path": ("files", "files"),
    "file_hash_length": ("16", 16),
    "bind": ("::1", "::1"),
    "smtp_port": ("2525", 2525),
    "api_port": ("0", 0),
    "lmtp_port": ("65535", 65535),
    "lmtp_socket": ("/run/lmtp.sock", "/run/lmtp.sock"),
    "hostname": ("mail.example.com", "mail.example.com"),
    "server_host": ("example.com Example.ORG", ("example.com", "example.org")),
    "ssl_cert": ("cert.pem", "cert.pem"),
    "ssl_key": ("key.pem", "key.pem"),
    "starttls": ("optional", "optional"),
    "server_addr": ("192.0.2.1 [2001:db8::1]:26 mx.example:25",
                    (("192.0.2.1", None), ("2001:db8::1", 26), ("mx.example", 25))),
    "trusted_proxy": ("192.0.2.7 2001:db8::/32", (ipaddress.ip_network("192.0.2.7/32"),
                                                  ipaddress.ip_network("2001:db8::/32"))),
    "proxy_protocol": ("yes", True),
    "api_remote_address": ("10.1.2.3/8", (ipaddress.ip_network("10.0.0.0/8"),)),
    "api_token": ("s3cret#=", "s3cret#="),
    "api_host": ("box.lan mail.lan", ("box.lan", "mail.lan")),
    "max_size": ("25M", 25 << 20),
    "max_line": ("512K", 512 << 10),
    "max_header": ("4096", 4096),
    "max_recipients": ("100", 100),
    "max_connections": ("7", 7),
    "max_connections_per_peer": ("8", 8),
    "max_errors": ("9", 9),
    "timeout": ("10", 10),
    "max_session": ("11", 11),
    "grace": ("0", 0),
    "bare_newline": ("reject", "reject"),
    "url": ("https://hook.example/mail", "https://hook.example/mail"),
    "header": ("X-Node: a b\nAuthorization:  Bearer {{.ID}} ",
               (("X-Node", "a b"), ("Authorization", "Bearer {{.ID}}"))),
    "template": ("{{.Subject}}!", "{{.Subject}}!"),
    "forward_to": ("https://b.example/x to=*@B.example from=*\nmailto:ann@example.org",
                   (pegmail.Forward("https://b.example/x", "*@B.example", "*"),
                    pegmail.Forward("mailto:ann@example.org"))),
    "forward_only": ("yes", True),
    "forward_parallel": ("1", 1),
    "forward_timeout": ("5", 5),
    "forward_secret": ("whsec_c2VjcmV0", "whsec_c2VjcmV0"),
    "retry_first": ("1", 1),
    "retry_longest": ("60", 60),
    "retry_for": ("7200", 7200),
    "retry_4xx": ("yes", True),
    "outbox_keep": ("0", 0),
    "webhook_allow": ("10.0.0.0/8 ::1", (ipaddress.ip_network("10.0.0.0/8"),
                                         ipaddress.ip_network("::1"))),
    "webhook_failures": ("3", 3),
    "attachments": ("base64", "base64"),
    "attachments_size": ("1K", 1024),
    "api_url": ("https://mail.example.com", "https://mail.example.com"),
    "ca_file": ("ca.pem", "ca.pem"),
    "relay": ("[2001:db8::1]:587", ("2001:db8::1", 587)),
    "relay_user": ("ann", "ann"),
    "relay_password": ("s3cret#=", "s3cret#="),
    "relay_tls": ("tls", "tls"),
    "dns_server": ("192.0.2.53 [::1]:5353", (("192.0.2.53", None), ("::1", 5353))),
    "log_format": ("json", "json"),
    "standalone_logging": ("yes", True),
    "debug": ("on", True),
}
# What an option needs beside it.
COMPANIONS = {"ssl_cert": ["--ssl_key=k"], "ssl_key": ["--ssl_cert=c"],
              "proxy_protocol": ["--trusted_proxy=127.0.0.1"],
              **dict.fromkeys(("forward_only", "header", "template"), ["--url=http://127.0.0.1/"]),
              "relay_user": ["--relay=mx.example", "--relay_password=p"],
              "relay_password": ["--relay=mx.example", "--relay_user=u"]}
WRONG_PORTS = ("-1", "65536", "x", "", "25.0", "99999999999999999999")
WRONG_SIZES = ("0", "-1", "big", "1T", "", "1.5M")
WRONG_NETWORKS = ("300.1.1.1", "localhost", "10.0.0.0/33", "::1/129")
# For each option texts that it must refuse.
WRONG = {
    "db_path": ("", " "),
    "media_path": ("",),
    "file_hash_length": ("7", "33", "x", "", "-8", "24.0"),
    "bind": ("",),
    "smtp_port": WRONG_PORTS,
    "api_port": WRONG_PORTS,
    "lmtp_port": WRONG_PORTS,
    "lmtp_socket": ("",),
    "hostname": ("", "two words", "mx.example.com; evil"),
    "server_host": ("user@example.com", "<example.com>", "a:b"),
    "ssl_cert": ("",),
    "ssl_key": ("",),
    "starttls": ("maybe", ""),
    "server_addr": ("mx.example:", "mx.example:x", "mx.example:65536", "mx.example:99999",
                    "[::1", "http://mx.example"),
    "trusted_proxy": WRONG_NETWORKS,
    "proxy_protocol": ("maybe", "2"),
    "api_remote_address": WRONG_NETWORKS,
    "api_token": ("", "@/nowhere/token"),
    "api_host": ("",),
    "max_size": WRONG_SIZES,
    "max_line": WRONG_SIZES,
    "max_header": WRONG_SIZES,
    "max_recipients": ("99", "100001", "x"),
    "max_connections": ("0", "x"),
    "max_connections_per_peer": ("0", "x"),
    "max_errors": ("0", "x"),
    "timeout": ("0", "86401", "5s"),
    "max_session": ("0", "x"),
    "grace": ("-1", "3601", "x"),
    "bare_newline": ("keep", ""),
    "url": ("", "hook.example", "ftp://hook.example/"),
    "header": ("no colon", "Two words: x", "X:", "Host: a.example", "Content-Length: 3"),
    "template": ("@/nowhere/template",),
    "forward_to": ("b.example", "mailto:ann", "ftp://b.example/ to=x"),
    "forward_only": ("maybe", "2"),
    "forward_parallel": ("0", "17", "x"),
    "forward_timeout": ("0", "601"),
    "forward_secret": ("", "@/nowhere/secret"),
    "retry_first": ("0", "10s"),
    "retry_longest": ("0", "86401"),
    "retry_for": ("0", "2592001"),
    "retry_4xx": ("maybe",),
    "outbox_keep": ("-1", "x"),
    "webhook_allow": WRONG_NETWORKS,
    "webhook_failures": ("0", "x"),
    "attachments": ("all", ""),
    "attachments_size": WRONG_SIZES,
    "api_url": ("", "mail.example.com"),
    "ca_file": ("",),
    "relay": ("mx.example:x", "mx.example:65536", "smtp://mx.example"),
    "relay_user": ("",),
    "relay_password": ("", "@/nowhere/password"),
    "relay_tls": ("yes", ""),
    "dns_server": ("192.0.2.53:x", "udp://192.0.2.53"),
    "log_format": ("xml", ""),
    "standalone_logging": ("maybe", "2"),
    "debug": ("maybe", "2"),
}


class FolderCase(unittest.TestCase):
    """Tests that have a temporary folder each."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="pegmail-")
        self.addCleanup(shutil.rmtree, self.folder)

    def path(self, *names):
        """Return a path in the folder."""
        return os.path.join(self.folder, *names)

    def write(self, name, text):
        """Write a file in the folder; return its path."""
        with open(self.path(name), "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return self.path(name)

    def run_pegmail(self, *arguments, environ=None, wrap=(), cwd=None):
        """Run the program to its end; return (status, standard output, standard error)."""
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith("PEGMAIL_")}
        done = subprocess.run([*wrap, sys.executable, compiled() + "/pegmail.pyc", *arguments],
                              timeout=DEADLINE, cwd=cwd or self.folder,
                              env={**clean, **(environ or {})}, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def call_main(self, *arguments, environ=None):
        """The same in this process, where nothing is started."""
        out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith("PEGMAIL_")}
        with mock.patch.dict(os.environ, {**clean, **(environ or {})}, clear=True), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            os.chdir(self.folder)
            try:
                status = pegmail.main(list(arguments))
            except SystemExit as end:
                status = end.code
            finally:
                os.chdir(before)
        return status, out.getvalue(), err.getvalue()

    def start_here(self, *arguments):
        """Make a server in this process; return (status, output, errors) as main() would."""
        before, threads = os.getcwd(), threading.active_count()
        os.chdir(self.folder)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ResourceWarning)
                status, line = self.try_server(arguments)
                gc.collect()
        finally:
            os.chdir(before)
        self.assertEqual([str(warning.message) for warning in caught], [])
        self.assertEqual(threading.active_count(), threads)
        return status, "", line

    def try_server(self, arguments):
        """Make a server; return the exit status and the line that a refusal ends with."""
        try:
            server = pegmail.Server(pegmail.load_settings(arguments, {})[0])
        except pegmail.SettingsError as error:
            return error.status, f"pegmail: {error}\n"
        server.stop()
        server.run()
        return 0, "it started"

    def assert_refused(self, status, words, *arguments, run=None, **options):
        """Assert that a start ends with that status and one line that holds these words."""
        result, out, err = (run or self.run_pegmail)(*arguments, **options)
        self.assertEqual((result, out), (status, ""), err)
        self.assertRegex(err, r"\Apegmail: [^\n]+\n\Z")
        for word in words if isinstance(words, (list, tuple)) else [words]:
            self.assertIn(word, err)
        return err


class SettingsTest(FolderCase):
    def load(self, *arguments, environ=None):
        """Return the settings that arguments, an environment and the .env file give."""
        return pegmail.load_settings(arguments, environ or {}, self.path(".env"))[0]

    def sources(self, name, text):
        """Yield (label, arguments, environment) for each place an option can be given in."""
        folded = text.replace("\n", "\n ")
        self.write("pegmail.ini", f"[pegmail]\n{name} = {folded}\n")
        self.write("dashes.ini", f"[pegmail]\n{name.replace('_', '-')}: {folded}\n")
        many = pegmail.OPTION_BY_NAME[name].many
        words = (text.split("\n") if many == pegmail.LINES else text.split()) if many else [text]
        if many == pegmail.LINES and len(words) > 1:
            yield "--" + name, ["--" + name + "=" + line for line in words], {}
        elif len(words) < 2:
            yield "--" + name, ["--" + name + "=" + text], {}
            yield "--" + name, ["--" + name.replace("_", "-") + "=" + text], {}
        else:
            yield "--" + name, ["--" + name, *words], {}
            yield "--" + name, ["--" + name.replace("_", "-"), *words], {}
        yield "PEGMAIL_" + name.upper(), [], {"PEGMAIL_" + name.upper(): text}
        self.write(".env", f"PEGMAIL_{name.upper()}='{text}'\n")
        yield self.path(".env") + ": PEGMAIL_" + name.upper(), [], {}
        os.unlink(self.path(".env"))
        for file in ("pegmail.ini", "dashes.ini"):
            yield f"--config {self.path(file)}: {name}", ["--config", self.path(file)], {}
        yield (f"--config {self.path('pegmail.ini')}: {name}", [],
               {"PEGMAIL_CONFIG": self.path("pegmail.ini")})

    def test_every_option_from_every_source(self):
        self.assertEqual(list(SAMPLES), [option.name for option in pegmail.OPTIONS])
        for name, (text, value) in SAMPLES.items():
            self.assertNotEqual(pegmail.OPTION_BY_NAME[name].default, value)
            for label, arguments, environ in self.sources(name, text):
                with self.subTest(name, source=label):
                    settings = self.load(*arguments, *COMPANIONS.get(name, ()), environ=environ)
                    self.assertEqual(getattr(settings, name), value)

    def test_every_wrong_value_from_every_source(self):
        self.assertEqual(set(WRONG), set(SAMPLES))
        for name, texts in WRONG.items():
            for text in texts:
                with self.subTest(name, text=text):
                    for label, arguments, environ in self.sources(name, text):
                        with self.assertRaises(pegmail.SettingsError, msg=label) as caught:
                            self.load(*arguments, *COMPANIONS.get(name, ()), environ=environ)
                        self.assertEqual(caught.exception.status, 1 if text[:1] == "@" else 2)
                        self.assertNotIn("\n", str(caught.exception))
                        if text[:1] != "@":
                            self.assertTrue(str(caught.exception).startswith(label + ": "),
                                            str(caught.exception))

    def test_defaults(self):
        settings = self.load()
        expected = {
            "db_path": "mail.db", "media_path": "media", "file_hash_length": 24,
            "bind": "127.0.0.1", "smtp_port": 1025, "api_port": 8025, "lmtp_port": None,
            "lmtp_socket": None, "server_host": (), "ssl_cert": None, "ssl_key": None,
            "starttls": "required", "trusted_proxy": (),
            "api_remote_address": (), "api_token": None, "bare_newline": "normalize",
            "log_format": "text", "debug": False}
        for name, value in expected.items():
            with self.subTest(name):
                self.assertEqual(getattr(settings, name), value)
        self.assertTrue(settings.hostname)
        self.assertGreaterEqual(settings.max_recipients, 100)

    def test_precedence(self):
        """Flag, environment, .env, file, default."""
        for name, texts in (("max_errors", "12345"), ("hostname", "vwxyz"),
                            ("server_host", "vwxyz")):
            upper = "PEGMAIL_" + name.upper()
            self.write("pegmail.ini", f"[pegmail]\n{name} = {texts[1]}\n")
            self.write(".env", f"{upper}={texts[2]}\n")
            config = ["--config", self.path("pegmail.ini")]
            environ, flags = {upper: texts[3]}, ["--" + name, texts[4]]

            def value(*arguments, environ=None, name=name):
                found = getattr(self.load(*arguments, environ=environ), name)
                return str(found[0] if isinstance(found, tuple) else found)
            with self.subTest(name):
                self.assertEqual(value(*config, *flags, environ=environ), texts[4])
                self.assertEqual(value(*config, environ=environ), texts[3])
                self.assertEqual(value(*config), texts[2])
                os.unlink(self.path(".env"))
                self.assertEqual(value(*config), texts[1])
                self.assertEqual(value(*flags), texts[4])

    def test_config_file_may_be_named_anywhere(self):
        """--config has the same precedence as any option."""
        for name in ("flag", "environment", "env_file"):
            self.write(name + ".ini", f"[pegmail]\nhostname = {name}.example\n")
        self.write(".env", f"PEGMAIL_CONFIG={self.path('env_file.ini')}\n")
        environ = {"PEGMAIL_CONFIG": self.path("environment.ini")}
        self.assertEqual(self.load().hostname, "env_file.example")
        self.assertEqual(self.load(environ=environ).hostname, "environment.example")
        self.assertEqual(self.load("--config", self.path("flag.ini"), environ=environ).hostname,
                         "flag.example")

    def test_flags_that_are_yes_or_no(self):
        for words, value in ((["--debug"], True), (["--debug", "yes"], True),
                             (["--debug=TRUE"], True), (["--debug=1"], True),
                             (["--debug", "no"], False), (["--debug=Off"], False),
                             (["--debug=false"], False), (["--debug=0"], False)):
            with self.subTest(words):
                settings = self.load(*words, environ={"PEGMAIL_DEBUG": str(not value)})
                self.assertIs(settings.debug, value)

    def test_lists_in_one_text(self):
        for text in ("a.example b.example", "a.example,b.example", " a.example,  b.example ",
                     "a.example\tb.example"):
            with self.subTest(text):
                settings = self.load(environ={"PEGMAIL_SERVER_HOST": text})
                self.assertEqual(settings.server_host, ("a.example", "b.example"))
        self.write("pegmail.ini", "[pegmail]\nserver_host = a.example\n  b.example\n")
        self.assertEqual(self.load("--config", self.path("pegmail.ini")).server_host,
                         ("a.example", "b.example"))

    def test_repeated_list_flag_loses_nothing(self):
        settings = self.load("--server_host", "a.example", "--server-host", "b.example")
        self.assertEqual(settings.server_host, ("a.example", "b.example"))

    def test_further_names(self):
        """The options of smtp-pigeon stand for those of pegmail."""
        settings = self.load("--host", "0.0.0.0", "--port", "9925", "--domain", "mx.example",
                             "--standalone-logging")
        self.assertEqual((settings.bind, settings.smtp_port, settings.hostname,
                          settings.standalone_logging), ("0.0.0.0", 9925, "mx.example", True))

    def test_one_a_line(self):
        """What may be given several times has a line for each, in .env too."""
        self.write(".env", "PEGMAIL_HEADER='A: b c\n\nD: e, f'\nPEGMAIL_GRACE=3\n")
        settings = self.load("--url", "http://127.0.0.1/")
        self.assertEqual(settings.header, (("A", "b c"), ("D", "e, f")))
        self.assertEqual(settings.grace, 3)

    def test_what_goes_together(self):
        for words in (["--forward_only"], ["--header", "A: b"], ["--template", "x"],
                      ["--server_host", "a.example", "--forward_to", "mailto:x@A.example"],
                      ["--relay_user", "x", "--relay", "mx.example"],
                      ["--relay_user", "x", "--relay_password", "y"]):
            with self.subTest(words), self.assertRaises(pegmail.SettingsError) as caught:
                self.load(*words)
            self.assertEqual(caught.exception.status, 2)

    def test_env_file_as_shells_and_compose_write_it(self):
        for line, value in (
                ("PEGMAIL_API_TOKEN=plain", "plain"),
                ("export PEGMAIL_API_TOKEN=plain", "plain"),
                ("  PEGMAIL_API_TOKEN = plain  ", "plain"),
                ("PEGMAIL_API_TOKEN=plain\r", "plain"),
                ("PEGMAIL_API_TOKEN=\"two words\"", "two words"),
                ("PEGMAIL_API_TOKEN='a \"b\" # c'", "a \"b\" # c"),
                ("PEGMAIL_API_TOKEN=a=b=", "a=b="),
                ("PEGMAIL_API_TOKEN=a#b", "a#b"),
                ("PEGMAIL_API_TOKEN=plain # a comment", "plain"),
                ("PEGMAIL_API_TOKEN=\"two words\" # a comment", "two words"),
                ("PEGMAIL_API_TOKEN=first\nPEGMAIL_API_TOKEN=second", "second"),
                ("# PEGMAIL_API_TOKEN=plain", None),
                ("OTHER_PROGRAM=1\nnot a setting\n\nTOKEN=x", None)):
            with self.subTest(line):
                self.write(".env", line + "\n")
                self.assertEqual(self.load().api_token, value)

    def test_ini_file_forms(self):
        for text, value in (
                ("[pegmail]\napi_token = a%(b)s%\n", "a%(b)s%"),
                ("; a comment\n[other]\nx = 1\n[pegmail]\nApi-Token: plain\n", "plain"),
                ("[pegmail]\r\napi_token = plain\r\n", "plain")):
            with self.subTest(text):
                self.write("pegmail.ini", text)
                settings = self.load("--config", self.path("pegmail.ini"))
                self.assertEqual(settings.api_token, value)

    def test_token_from_a_file(self):
        self.write("token", "  a secret \n")
        for arguments, environ in ((["--api_token", "@" + self.path("token")], {}),
                                   ([], {"PEGMAIL_API_TOKEN": "@" + self.path("token")})):
            self.assertEqual(self.load(*arguments, environ=environ).api_token, "a secret")
        for text in ("", "\n", b"\xff\xfe"):
            self.write("token", text)
            with self.subTest(text), self.assertRaises(pegmail.SettingsError) as caught:
                self.load("--api_token", "@" + self.path("token"))
            self.assertEqual(caught.exception.status, 1)

    def test_settings_object(self):
        self.assertEqual(pegmail.Settings(hostname="mx", grace=3).grace, 3)
        with self.assertRaisesRegex(TypeError, "no such option: grease"):
            pegmail.Settings(grease=3)


class CommandLineTest(FolderCase):
    """What the real program answers on its command line."""

    def test_wrong_usage(self):
        """One line, exit status 2, and the name that was probably meant."""
        for words, arguments in (
                (["--smtp_prot", "did you mean --smtp_port?"], ["--smtp_prot", "3"]),
                (["--smtp-prot", "did you mean --smtp-port?"], ["--smtp-prot=3"]),
                (["did you mean --check?"], ["--chekc"]),
                (["stray"], ["stray"]),
                (["--server_host"], ["--server_host"]),
                (["--hostname"], ["--hostname", "--debug"]),
                (["--smtp_port: 'x'", "0 to 65535"], ["--smtp_port", "x"]),
                (["--starttls", "required, optional"], ["--starttls", "maybe"]),
                (["--ssl_cert", "--ssl_key"], ["--ssl_cert", "cert.pem"]),
                (["--ssl_cert", "--ssl_key"], ["--ssl_key", "key.pem"]),
                (["--trusted_proxy"], ["--proxy_protocol"]),
                (["--bind nowhere.invalid"], ["--bind", "nowhere.invalid"]),
                (["--server_host"], ["--server_host", "a..b", "--check"]),
                (["--server_host"], ["--server_host", "[300.1.1.1]", "--check"])):
            with self.subTest(arguments):
                self.assert_refused(2, words, *arguments, run=self.call_main)
        for arguments in (["--smtp_prot", "3"], ["--max_size=0"]):
            with self.subTest(arguments, program=True):
                self.assert_refused(2, [], *arguments)
        self.assertEqual(os.listdir(self.folder), [])

    def test_wrong_environment_and_files(self):
        self.write("broken.ini", "smtp_port = 1\n")
        self.write("garbled.ini", "[pegmail]\nsmtp_port\n")
        self.write("empty.ini", "")
        self.write("typo.ini", "[pegmail]\nsmtp_prot = 1\n")
        self.write("binary.ini", b"\xff\xfe\x00")
        for status, words, arguments in (
                (2, ["broken.ini", "[pegmail]"], ["--config", "broken.ini"]),
                (2, ["garbled.ini"], ["--config", "garbled.ini"]),
                (2, ["empty.ini", "[pegmail]"], ["--config", "empty.ini"]),
                (2, ["smtp_prot", "did you mean smtp_port?"], ["--config", "typo.ini"]),
                (1, ["binary.ini", "cannot be read"], ["--config", "binary.ini"]),
                (1, ["--config", "cannot be read"], ["--config", "."]),
                (1, ["missing.ini", "No such file"], ["--config", "missing.ini"])):
            with self.subTest(arguments):
                self.assert_refused(status, words, *arguments, run=self.call_main)
        self.assert_refused(2, ["PEGMAIL_MAX_SIZE", "'huge'"], environ={"PEGMAIL_MAX_SIZE": "huge"})
        self.assert_refused(2, "smtp_prot", environ={"PEGMAIL_CONFIG": "typo.ini"})
        for status, words, text in (
                (2, [".env", "PEGMAIL_SMTP_PROT", "did you mean PEGMAIL_SMTP_PORT?"],
                 "PEGMAIL_SMTP_PROT=1\n"),
                (2, [".env: PEGMAIL_GRACE", "'long'"], "PEGMAIL_GRACE=long\n"),
                (1, [".env", "cannot be read"], b"\xff\xfe")):
            with self.subTest(text):
                self.write(".env", text)
                self.assert_refused(status, words, run=self.call_main)
        self.assert_refused(1, [".env", "cannot be read"])

    def test_program_reads_every_source(self):
        """Flag, environment, .env and file of the real program, seen in what it prints."""
        self.write("pegmail.ini", "[pegmail]\nhostname = ini.example\n")
        self.write(".env", "PEGMAIL_CONFIG=pegmail.ini\n")

        def name(*arguments, environ=None, run=self.call_main):
            status, out, err = run("--generate_nginx_config", *arguments, environ=environ)
            self.assertEqual((status, err), (0, ""))
            return re.search(r"server_name (\S+);", out).group(1)
        self.assertEqual(name(), "ini.example")
        self.write(".env", "PEGMAIL_CONFIG=pegmail.ini\nPEGMAIL_HOSTNAME=file.example\n")
        self.assertEqual(name(run=self.run_pegmail), "file.example")
        environ = {"PEGMAIL_HOSTNAME": "environment.example"}
        self.assertEqual(name(environ=environ, run=self.run_pegmail), "environment.example")
        self.assertEqual(name("--hostname=flag.example", environ=environ), "flag.example")

    def test_version_help_and_check(self):
        self.assertEqual(self.run_pegmail("--version"),
                         (0, f"pegmail {pegmail.__version__}\n", ""))
        status, out, err = self.run_pegmail("--help")
        self.assertEqual((status, err), (0, ""))
        for name in [*SAMPLES, "config", "check", "version", "help", "generate_nginx_config",
                     "generate_systemd_unit"]:
            with self.subTest(name):
                self.assertIn("--" + name, out)
                self.assertIn("--" + name.replace("_", "-"), out)
        self.assertIn("PEGMAIL_NAME", out)
        self.assertEqual(self.call_main("-h")[::2], (0, ""))
        self.assertEqual(self.call_main("--check"), (0, "the configuration is fine\n", ""))
        self.assertEqual(os.listdir(self.folder), [])

    def test_names_that_the_terminal_cannot_show(self):
        """A path or domain beyond the terminal's characters is no reason to fail."""
        for environ, arguments in (
                ({"PYTHONIOENCODING": "ascii"}, ["--server_host", "m\u00fcnchen.example"]),
                ({"PYTHONIOENCODING": "utf-8"}, ["--db_path", b"caf\xe9.db"])):
            with self.subTest(arguments), Running(*arguments, environ=environ) as server:
                with server.connect() as wire:
                    self.assertEqual(wire.ask("QUIT")[:3], "221")
                self.assertEqual(server.stop(), 0)
                self.assertNotIn("Traceback", server.text())


class RefusedStartTest(FolderCase):
    """A start that cannot be: one line that says what and what to do, exit status 1."""

    def rights_prefix(self):
        """Return the words that run a program without root's rights to do what it likes."""
        if os.geteuid() != 0:
            return []
        return [need("setpriv"),
                "--bounding-set=-dac_override,-dac_read_search,-net_bind_service"]

    def test_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            number = taken.getsockname()[1]
            for kind in ("smtp", "api", "lmtp"):
                ports = {"smtp": 0, "api": 0, kind: number}
                with self.subTest(kind):
                    self.assert_refused(
                        1, [f"--{kind}_port {number} on 127.0.0.1", "in use", "choose another"],
                        *(f"--{name}_port={value}" for name, value in ports.items()),
                        run=self.start_here)
            self.assert_refused(1, f"--smtp_port {number}", f"--smtp_port={number}")
        self.assertEqual(os.listdir(self.folder), [])

    def test_address_of_another_host(self):
        self.assert_refused(1, ["192.0.2.1", "--bind"], "--bind", "192.0.2.1", "--smtp_port=0",
                            run=self.start_here)

    def test_server_without_an_address(self):
        self.assert_refused(1, ["--server_addr nowhere.invalid"], "--smtp_port=0", "--api_port=0",
                            "--server_addr", "127.0.0.1", "nowhere.invalid:25")

    def test_privileged_port(self):
        try:
            with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
                if int(file.read()) <= 25:
                    self.skipTest("anybody may use port 25 here")
        except OSError:
            self.skipTest("the system does not say which ports are privileged")
        self.assert_refused(1, ["--smtp_port 25", "Permission denied", "choose another"],
                            "--smtp_port=25", "--api_port=0", wrap=self.rights_prefix())

    def test_places_that_cannot_be_written(self):
        self.write("file", "")
        os.mkdir(self.path("folder"))
        for words, arguments in (
                (["--db_path missing/mail.db", "No such file"], ["--db_path=missing/mail.db"]),
                (["--db_path file/mail.db", "Not a directory"], ["--db_path=file/mail.db"]),
                (["--db_path folder", "Is a directory"], ["--db_path=folder"]),
                (["--media_path file", "File exists"], ["--media_path=file"]),
                (["--media_path file/media", "Not a directory"], ["--media_path=file/media"]),
                (["--lmtp_socket file", "choose another"], ["--lmtp_socket=file"]),
                (["--lmtp_socket missing/x", "No such file"], ["--lmtp_socket=missing/x"]),
                (["--lmtp_socket", "too long"], ["--lmtp_socket=" + "x" * 200])):
            with self.subTest(arguments):
                self.assert_refused(1, words, "--smtp_port=0", "--api_port=0", *arguments,
                                    run=self.start_here)
        self.assert_refused(1, "--db_path missing", "--smtp_port=0", "--api_port=0",
                            "--db_path=missing/mail.db")
        self.assertTrue(os.path.isfile(self.path("file")))

    def test_places_without_the_right_to_write(self):
        prefix = self.rights_prefix()
        os.mkdir(self.path("locked"))
        self.write("locked/mail.db", "")
        os.chmod(self.path("locked", "mail.db"), 0o400)
        os.chmod(self.path("locked"), 0o500)
        self.addCleanup(os.chmod, self.path("locked"), 0o700)
        for option, place in (("db_path", "locked/new.db"), ("db_path", "locked/mail.db"),
                              ("media_path", "locked/media"), ("lmtp_socket", "locked/socket")):
            with self.subTest(place):
                self.assert_refused(1, [f"--{option} {place}", "Permission denied"],
                                    "--smtp_port=0", "--api_port=0", f"--{option}={place}",
                                    wrap=prefix)

    def test_second_server_on_one_database(self):
        with Running() as server:
            server.send()
            os.symlink(os.path.join(server.folder, "mail.db"), self.path("link.db"))
            words = ["another pegmail", str(server.process.pid)]
            self.assert_refused(1, ["--db_path mail.db", *words], "--smtp_port=0", "--api_port=0",
                                cwd=server.folder)
            for path in (os.path.join(server.folder, "mail.db"), "link.db"):
                with self.subTest(path):
                    self.assert_refused(1, ["--db_path " + path, *words], "--smtp_port=0",
                                        "--api_port=0", "--db_path", path, run=self.start_here)
            self.assertEqual(server.get("/count"), {"count": 1})
            server.send()
            self.assertEqual(server.stop(signal.SIGKILL), -signal.SIGKILL)
            with Running(folder=server.folder) as again:      # a lock ends with its owner
                self.assertEqual(again.get("/count"), {"count": 2})
                self.assertEqual(again.stop(), 0)

    def test_certificates_that_do_not_work(self):
        make_certificate(self.folder, "a")
        make_certificate(self.folder, "b")
        make_certificate(self.folder, "locked", "-passout", "pass:secret")
        self.write("garbage.pem", "this is no certificate\n")
        shutil.copy(self.path("a.key"), self.path("secret.key"))
        os.chmod(self.path("secret.key"), 0)
        for words, cert, key, wrap in (
                (["--ssl_cert missing.pem", "No such file"], "missing.pem", "a.key", ()),
                (["--ssl_key missing.key", "No such file"], "a.pem", "missing.key", ()),
                (["--ssl_cert .", "Is a directory"], ".", "a.key", ()),
                (["--ssl_cert garbage.pem"], "garbage.pem", "a.key", ()),
                (["--ssl_key garbage.pem"], "a.pem", "garbage.pem", ()),
                (["--ssl_key b.key"], "a.pem", "b.key", ()),
                (["--ssl_key locked.key", "password"], "locked.pem", "locked.key", ()),
                (["--ssl_key secret.key", "Permission denied"], "a.pem", "secret.key",
                 self.rights_prefix())):
            arguments = ["--smtp_port=0", "--api_port=0", "--ssl_cert", cert, "--ssl_key", key]
            with self.subTest(cert + " " + key):
                if not wrap:
                    self.assert_refused(1, words, *arguments, "--check", run=self.call_main)
                if wrap or cert == "garbage.pem" or key in ("missing.key", "b.key"):
                    self.assert_refused(1, words, *arguments, wrap=wrap)
        self.assertEqual(self.call_main("--check", "--ssl_cert=a.pem", "--ssl_key=a.key"),
                         (0, "the configuration is fine\n", ""))
        self.assertNotIn("mail.db", os.listdir(self.folder))


# =====================================================================================
# 2. Text: addresses, dates, encodings; pure functions
# =====================================================================================

class AddressTests(unittest.TestCase):
    """Mailboxes (RFC 5321 4.1.2) and domains."""

    def test_valid(self):
        table = [
            ("bob@example.com", "bob", "example.com"),
            ("Bob.Smith+tag@Example.COM", "Bob.Smith+tag", "Example.COM"),
            ("!#$%&'*+-/=?^_`{|}~@x.example", "!#$%&'*+-/=?^_`{|}~", "x.example"),
            ("a..b.@docomo.example", "a..b.", "docomo.example"),
            (".a@x.example", ".a", "x.example"),
            ('"a b"@x.example', '"a b"', "x.example"),
            ('"a\\"@\\\\b"@x.example', '"a\\"@\\\\b"', "x.example"),
            ('""@x.example', '""', "x.example"),
            ("bob@[127.0.0.1]", "bob", "[127.0.0.1]"),
            ("bob@[IPv6:2001:db8::1]", "bob", "[IPv6:2001:db8::1]"),
            ("postmaster", "postmaster", ""),
            ("böb@bücher.example", "böb", "bücher.example"),
            ("用户@例え.example", "用户", "例え.example"),
            ("s" * 300 + "@x.example", "s" * 300, "x.example"),
            ("a@" + "b" * 63 + ".example", "a", "b" * 63 + ".example"),
        ]
        for text, local, domain in table:
            with self.subTest(text=text[:60]):
                self.assertEqual(pegmail.parse_address(text), (local, domain, text))

    def test_refused(self):
        table = [
            "", "@", "@x.example", "a@", "a@@b.example", "a@b@c.example", "<a@x.example>",
            " a@x.example", "a@x.example ", "a b@x.example", "a@x y.example", "a\tb@x.example",
            "a\r\nb@x.example", "a@x.example\r\nRCPT", "a@x.example\n", "a\0@x.example",
            "a\x7f@x.example", "a\x85b@x.example", "a\u2028b@x.example", "a@x\u2028.example",
            '"a@x.example', '"a\n"@x.example', '"a\0"@x.example', '"a"b@x.example', '"a\\"@x',
            "a,b@x.example", "a@x.example,b@y.example", "a:b@x.example", "a;b@x.example",
            "a(c)@x.example", "a[b@x.example", "a\\@x.example", "@a,@b:c@x.example",
            "a@[1.2.3]", "a@[300.1.1.1]", "a@[IPv6:::g]", "a@[127.0.0.1", "a@127.0.0.1]", "a@[]",
            "a@[IPv6:fe80::1%\r\nb@x]", "a@[IPv6:fe80::1%>, <b@x]",
            "a@.example", "a@..", "a@x..example", "a@é..example", "a@" + "b" * 64 + ".example",
            "a@" + "é" * 64 + ".example", "a@" + "b." * 130 + "example", "x" * 1001 + "@x.example",
        ]
        for text in table:
            with self.subTest(text=text[:60]), self.assertRaises(ValueError):
                pegmail.parse_address(text)

    def test_domains(self):
        table = [
            ("example.com", "example.com"), ("EXAMPLE.com.", "example.com"),
            ("Bücher.Example", "xn--bcher-kva.example"),
            ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
            ("bu\u0308cher.example", "xn--bcher-kva.example"),
            ("例え.example", "xn--r8jz45g.example"),
            ("ｅｘａｍｐｌｅ。com", "example.com"),
            ("[127.0.0.1]", "[127.0.0.1]"), ("[IPv6:2001:DB8:0:0::1]", "[2001:db8::1]"),
            ("[ipv6:2001:db8::1]", "[2001:db8::1]"),
            ("a" * 63 + ".example", "a" * 63 + ".example"),
            ("", None), (".", None), ("..", None), ("a..b", None), (".a", None), ("a b", None),
            ("a\0b", None), ("a\r\nb", None), ("a@b", None), ("a/b", None), ("<a>", None),
            ("a" * 64, None), ("a" * 64 + ".example", None), ("é" * 70, None), ("a." * 200, None),
            ("\udcff.example", None), ("[1.2.3]", None), ("[]", None), ("[x:1]", None),
            ("[127.0.0.1", None), ("[IPv6:fe80::1%\r\n]", None),
        ]
        for name, expected in table:
            with self.subTest(name=name[:60]):
                self.assertEqual(pegmail.normalize_domain(name), expected)


class EncodingTests(unittest.TestCase):
    """Bytes and encoded words to text: nothing raises, nothing is lost."""

    def test_encoded_words(self):
        table = [
            ("", ""), ("plain = ?text?=", "plain = ?text?="),
            ("=?utf-8?B?SMOpbGxv?=", "Héllo"),
            ("=?UTF-8?q?H=C3=A9llo_w=5Frld?=", "Héllo w_rld"),
            ("Re: =?utf-8?Q?=C3=A9?= x", "Re: é x"),
            ("(=?utf-8?Q?a?=)", "(a)"), ("x=?utf-8?Q?a?=y", "xay"),
            # RFC 2047 6.2: white space between two words is not shown
            ("=?utf-8?Q?a?= =?utf-8?Q?b?=", "ab"), ("=?utf-8?Q?a?=\t  =?utf-8?Q?b?=", "ab"),
            ("=?utf-8?Q?a_?= =?utf-8?Q?b?=", "a b"),
            ("=?utf-8?Q?a?= b =?utf-8?Q?c?=", "a b c"),
            ("=?utf-8?Q?a?= =?iso-8859-1?Q?=E9?= =?utf-8?Q?=C3=A9?=", "aéé"),
            # characters cut in two, in every encoding
            ("=?utf-8?Q?=C3?= =?utf-8?Q?=A9?=", "é"), ("=?utf-8?B?4pw=?= =?UTF-8?B?kw==?=", "✓"),
            ("=?utf-8?Q?=E2?= =?utf-8?B?nA==?= =?utf-8?q?=93?=", "✓"),
            ("=?shift_jis?B?g2U=?= =?shift_jis?B?g1g=?= =?shift_jis?B?gw==?= =?shift_jis?B?Zw==?=",
             "テスト"),
            # charsets of the world, wrong ones, unknown ones, and none
            ("=?iso-2022-jp?B?GyRCJUYlOSVIGyhC?=", "テスト"), ("=?gb2312?B?suLK1A==?=", "测试"),
            ("=?koi8-r?B?8NLJ18XU?=", "Привет"), ("=?ks_c_5601-1987?B?x9GxuQ==?=", "한국"),
            ("=?windows-1252?Q?=80?=", "€"), ("=?iso-8859-1?Q?=80?=", "€"),
            ("=?utf-8*en?Q?hi?=", "hi"), ("=?us-ascii?Q?caf=C3=A9?=", "café"),
            ("=?x-klingon?Q?caf=C3=A9?=", "café"), ("=?x-klingon?Q?caf=E9?=", "café"),
            ("=?utf-8?Q?caf=E9?=", "café"), ("=?../../etc?Q?caf=E9?=", "café"),
            # broken words
            ("=?utf-8?B?SGVsbG8?=", "Hello"), ("=?utf-8?B?SGVs!bG8=?=", "Hello"),
            ("=?utf-8?B?S?=", ""), ("=?utf-8?B??=", ""), ("=?utf-8?B?====?=", ""),
            ("=?utf-8?Q?=XYa?=", "=XYa"), ("=?utf-8?Q?a b?=", "a b"),
            ("=?utf-8?X?abc?=", "=?utf-8?X?abc?="), ("=?utf-8?B?SGVs", "=?utf-8?B?SGVs"),
            ("=??Q?abc?=", "=??Q?abc?="), ("=?" * 9, "=?" * 9),
            # codecs that are no charsets: nothing is inflated or interpreted
            ("=?unicode_escape?Q?=5Cu0041?=", "\\u0041"), ("=?rot13?Q?abc?=", "abc"),
            ("=?idna?Q?xn--bcher-kva?=", "xn--bcher-kva"), ("=?hex?Q?4142?=", "4142"),
            ("=?undefined?Q?abc?=", "abc"), ("=?base64?Q?YWJj?=", "YWJj"),
            ("=?zlib?B?eJxLTEoGAAJNASc=?=", b"x\x9cKLJ\x06\x00\x02M\x01'".decode("latin-1")),
        ]
        for text, expected in table:
            with self.subTest(text=text[:80]):
                self.assertEqual(pegmail.decode_words(text), expected)

    def test_text(self):
        table = [
            (b"", "utf-8", ""), (b"caf\xc3\xa9", "", "café"), (b"caf\xe9", "", "café"),
            (b"caf\xe9", "utf-8", "café"), (b"caf\xc3\xa9", "us-ascii", "café"),
            (b"\x93x\x94", "iso-8859-1", "“x”"), (b"\x93x\x94", "LATIN1", "“x”"),
            (b"\x81", "iso-8859-1", "\x81"), (b"caf\xe9", '"ISO-8859-1"', "café"),
            (b"\x82\xa0", "x-sjis", "あ"), (b"\xff\xfea\0", "utf-16", "a"),
            (b"a\0\xff", "utf-16", "a\0ÿ"), (b"x", "\0", "x"), (b"x", "a" * 10000, "x"),
            (b"x", "utf-8\r\n", "x"), (b"x", "é", "x"), (b"Hi +AKM-1", "utf-7", "Hi £1"),
        ]
        for data, charset, expected in table:
            with self.subTest(data=data, charset=charset[:20]):
                self.assertEqual(pegmail.decode_text(data, charset), expected)

    def test_every_codec_of_python_gives_text_that_can_be_stored(self):
        chosen = random.Random(2)
        known = encodings.aliases.aliases
        names = sorted({*known, *known.values(), "charmap", "unicode_escape", "undefined"})
        for name in names:
            for data in [bytes(chosen.choices(range(256), k=20)) for _ in range(20)] + [
                    b"+2AA-", b"\x1b$B\xff", b"~{~}", b"\\ud800", b"\xed\xa0\x80", b"+"]:
                with self.subTest(name=name, data=data):
                    pegmail.decode_text(data, name).encode("utf-8")

    def test_base64(self):
        table = [(b"", b""), (b"SGk=", b"Hi"), (b"SGk", b"Hi"), (b"S\r\nG\nk=\r\n", b"Hi"),
                 (b"S*G-k=", b"Hi"), (b"SGkx\r\nSGky\r\n", b"Hi1Hi2"), (b"A", b""), (b"=", b""),
                 (b"\xff\xfe", b""), (b"SGk=\r\n-- \r\n", b"Hi")]
        for data, expected in table:
            with self.subTest(data=data):
                self.assertEqual(pegmail.decode_base64(data), expected)

    def test_parameters(self):
        table = [
            ("", "", {}), (";", "", {}), ("text/plain", "text/plain", {}),
            ("text/plain; charset=utf-8", "text/plain", {"charset": "utf-8"}),
            ('a/b ; Charset = "UTF-8" ; x=y', "a/b", {"charset": "UTF-8", "x": "y"}),
            ('a/b; x="a;b=\\"c\\"\\\\"; y=d', "a/b", {"x": 'a;b="c"\\', "y": "d"}),
            ("a/b; x=1; X=2", "a/b", {"x": "1"}), ("a/b;;;; x=y;;", "a/b", {"x": "y"}),
            ("a/b; x", "a/b", {}), ('a/b; ="y"', "a/b", {}), ("a/b; x=", "a/b", {"x": ""}),
            ('a/b; x="open', "a/b", {"x": "open"}), ("a/b; x=a b; y=c", "a/b",
                                                     {"x": "a b", "y": "c"}),
            # RFC 2231
            ("a/b; n*=UTF-8''%e2%82%ac%20x", "a/b", {"n": "€ x"}),
            ("a/b; n*=iso-8859-1'en'%A3%20rates", "a/b", {"n": "£ rates"}),
            ('a/b; URL*0="ftp://"; URL*1="cs.utk.edu/x"', "a/b", {"url": "ftp://cs.utk.edu/x"}),
            ("a/b; t*0*=us-ascii'en'even%20more%20; t*1*=%2Afun%2A%20; t*2=\"isn't it!%20\"",
             "a/b", {"t": "even more *fun* isn't it!%20"}),
            ("a/b; n*1=b; n*0=a", "a/b", {"n": "ab"}),
            ("a/b; n*0*=utf-8''%E2%82; n*1*=%AC", "a/b", {"n": "€"}),
            ("a/b; n*0*=x-unknown''%E2%82; n*1*=%AC", "a/b", {"n": "€"}),
            ("a/b; n=plain; n*=utf-8''full", "a/b", {"n": "full"}),
            ("a/b; n*=%E9", "a/b", {"n": "é"}), ("a/b; n*=''%zz%", "a/b", {"n": "%zz%"}),
            ('a/b; n="=?utf-8?B?SMOpbGxv?=.txt"', "a/b", {"n": "Héllo.txt"}),
            ("a/b; n*9999=x", "a/b", {}), ("a/b; n*x=y", "a/b", {}), ("a/b; n*²=y", "a/b", {}),
            ("a/b; n*٣=y", "a/b", None), ("a/b; n*-1=y", "a/b", {}),
            # floods
            ("a/b" + ";" * 65536, "a/b", {}), ("a/b" + "; a=b" * 20000, "a/b", {"a": "b"}),
            ('a/b; x="' + "\\" * 50000, "a/b", None), ("a/b; x" + " " * 90000, "a/b", {}),
            ("a/b; " + "x" * 90000 + "=y", "a/b", {}), ("a/b" + ";a*0*=" * 20000, "a/b", None),
        ]
        for text, head, params in table:
            with self.subTest(text=text[:80]):
                found = pegmail.parse_parameters(text)
                self.assertEqual(found[0], head)
                if params is not None:
                    self.assertEqual(found[1], params)

    def test_parameters_are_few(self):
        text = "a/b" + "".join(f"; p{number}=x" for number in range(20000))
        self.assertLessEqual(len(pegmail.parse_parameters(text)[1]), 1000)


HOSTILE_NAMES = [
    "", ".", "..", "/", "\\", "../../etc/passwd", "..\\..\\boot.ini", "C:\\dir\\x.txt", "a/b\0/c",
    "CON", "con.txt", "LPT1.tar.gz", "aux ", " nul.", "x\r\nSet-Cookie: a=b", "x\n\ny",
    "a\"b\\c.txt",
    "\u202egpj.exe", "a\u2066b\u2069c", "\u200f\u200e", "日本語.txt", "naïve é.pdf", "😀" * 200,
    "x" * 4096 + ".pdf", "é" * 4096, "x" * 199 + " " + "y" * 50, "x" * 199 + "." + "y" * 50,
    ".htaccess", "a:b*c?d<e>f|g", "%2e%2e%2fx", "a\ud800.txt", "a;b=c'd", "\x80\x9f", "\t \t",
    "x." * 2000, "x" * 300 + "." + "é" * 19, "attachment;filename=\"y\"", "\u2028\u2029",
]


class NameTests(unittest.TestCase):
    """File names from mail, on their way out."""

    def test_file_names(self):
        table = [
            ("report.pdf", "report.pdf"), ("naïve 日本語.txt", "naïve 日本語.txt"),
            ("", "attachment"), (".", "attachment"), ("..", "attachment"), ("/", "attachment"),
            (" . ", "attachment"), ("../../etc/passwd", "passwd"), ("..\\..\\boot.ini", "boot.ini"),
            ("C:\\dir\\x.txt", "x.txt"), ("a\0b.txt", "ab.txt"), ("CON", "_CON"),
            ("con.txt", "_con.txt"), ("LPT1.log", "_LPT1.log"), ("console.txt", "console.txt"),
            ("x\r\nSet-Cookie: a=b", "xSet-Cookie_ a=b"), ('a"b|c?.txt', "a_b_c_.txt"),
            ("\u202egpj.exe", "gpj.exe"), ("x" * 3000 + ".pdf", "x" * 196 + ".pdf"),
            ("é" * 4096, "é" * 100),
        ]
        for name, expected in table:
            with self.subTest(name=name[:60]):
                self.assertEqual(pegmail.safe_filename(name), expected)

    def test_hostile_names_are_safe_everywhere(self):
        reserved = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
        for name in HOSTILE_NAMES:
            with self.subTest(name=name[:60]):
                safe = pegmail.safe_filename(name)
                self.assertLessEqual(len(safe.encode("utf-8")), 255)
                self.assertRegex(safe, r'\A[^\x00-\x1f\x7f-\x9f/\\:*"<>|?]+\Z')
                self.assertNotRegex(safe, "[\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c]")
                self.assertNotIn(safe[-1], ". ", "Windows drops dots and spaces at the end")
                self.assertNotIn(safe, ("", ".", ".."))
                self.assertIsNone(reserved.fullmatch(safe))
                self.assertEqual(pegmail.safe_filename(safe), safe)

    def test_content_disposition(self):
        self.assertEqual(pegmail.content_disposition("inline", "a b.txt"),
                         'inline; filename="a b.txt"')
        self.assertEqual(pegmail.content_disposition("attachment", "naïve €.txt"),
                         'attachment; filename="na_ve _.txt"; '
                         "filename*=UTF-8''na%C3%AFve%20%E2%82%AC.txt")
        for name in HOSTILE_NAMES:
            with self.subTest(name=name[:60]):
                value = pegmail.content_disposition("attachment", name)
                match = re.fullmatch(r'attachment; filename="([ !#-\[\]-~]+)"'
                                     r"(?:; filename\*=UTF-8''([\w.~%-]+))?", value, re.A)
                self.assertIsNotNone(match, value)
                self.assertNotIn("%", match.group(1))       # some browsers decode it there
                full = urllib.parse.unquote(match.group(2) or match.group(1))
                self.assertEqual(full, pegmail.safe_filename(name))

    def test_html_text(self):
        table = [
            ("", "", []), ("plain &amp; simple", "plain & simple", []),
            ("<p>one</p><p>two<br>three</p>", "one two three", []),
            ("a<b>b</b>c", "abc", []), ("<td>a<td>b", "a b", []),
            ("<style>p { color: #123456 }</style>x<SCRIPT>if (a<b) code(999999)</SCRIPT>y",
             "xy", []),
            ('<a href="https://x.example/?a=1&amp;b=2">go</a>', "go",
             ["https://x.example/?a=1&b=2"]),
            ("<A CLASS=x HREF='https://x.example/1'>a</A><a\nhref = https://x.example/2>b</a>",
             "ab", ["https://x.example/1", "https://x.example/2"]),
            ("<img alt='code 123456' src=x>y", "y", []), ("<!-- code 123456 -->x", "x", []),
            ("1 < 2 and 3 > 2", None, []), ("<<<>>><", None, []), ("<script>open", "", []),
            ("<a href>x</a><a href=''>y</a>", "xy", None),
        ]
        for markup, words, links in table:
            with self.subTest(markup=markup[:60]):
                found = pegmail.html_text(markup)
                if words is not None:
                    self.assertEqual(" ".join(found[0].split()), words)
                if links is not None:
                    self.assertEqual(found[1], links)


class CodeTests(unittest.TestCase):
    """One-time codes and links, as tests of sign-up pages look for them."""

    def test_codes(self):
        table = [
            ("Your verification code is 482913", "482913"),
            ("Your code is: 482913.", "482913"),
            ("482913 is your Example confirmation code", "482913"),
            ("G-482913 is your Google verification code.", "G-482913"),
            ("Subject: Sign in\n\nEnter this code:\n\n    7F3K-9QXZ\n\nIt is good for 10 minutes.",
             "7F3K-9QXZ"),
            ("Here is your device code: WDJB-MJHT", "WDJB-MJHT"),
            ("<#> Your ExampleApp code is: 123ABC78\nFA+9qCX9VSu", "123ABC78"),
            ("Your PIN is 0042", "0042"), ("Your code is 2024", "2024"),
            ("Use the one-time code 123 456 to sign in", "123456"),
            ("ONE-TIME PASSWORD: 845120", "845120"),
            ("OTP for your payment of Rs 1,500.00 at 10:45 on 12-05-2024 is 739201. Keep it.",
             "739201"),
            ("Hi Ann,\nConfirm your account with this code\n\n884422\n\nExample Inc, "
             "1600 Park Road, 94043 Springfield", "884422"),
            ("To confirm order 20481234, enter this code: 9921", "9921"),
            ("Your code is 481516. Questions? Call +1 800 555 0199.", "481516"),
            ("Dear user,\n123456 ist Ihr Bestätigungscode.", "123456"),
            ("Dein Sicherheitscode: 552199", "552199"), ("Ihre TAN lautet 118552", "118552"),
            ("Votre code de vérification est 904 113", "904113"),
            ("Tu código de verificación es 660123.", "660123"),
            ("Il tuo codice di verifica è 218834", "218834"),
            ("Seu código de verificação é 771203", "771203"),
            ("Uw verificatiecode is 319047", "319047"),
            ("Twój kod weryfikacyjny: 550912", "550912"),
            ("Din verifieringskod är 640218", "640218"), ("Doğrulama kodunuz: 731064", "731064"),
            ("Ваш код подтверждения: 481590", "481590"), ("Ваш код — 4815", "4815"),
            ("您的验证码是 839201，请在5分钟内输入。", "839201"),
            ("【某公司】您的验证码为839201，5分钟内有效", "839201"),
            ("您的驗證碼：839201", "839201"), ("認証コード：405167", "405167"),
            ("確認コードは405167です。", "405167"), ("인증번호 [405167]를 입력해 주세요", "405167"),
        ]
        for text, expected in table:
            with self.subTest(text=text):
                self.assertEqual(pegmail.find_codes(text)[:1], [expected])

    def test_no_codes(self):
        table = [
            "", "Hello world", "Meet me at 10:45 in room 1234", "Invoice 20481234 is attached.",
            "Welcome to our code of conduct.\n\n© 2024 Example Inc.",
            "Please confirm your address by 31 December 2025.",
            "Confirm your payment of $1500 to Example.", "Confirm your order: total $1299.00",
            "Please confirm the offer of €12.500,00 or 1,250,000 points.",
            "Enter the code we sent you, or call +1 800 555 0199.",
            "Lost your password? Call +49 30 1234567 or 0800-123-4567.",
            "Verify your address at https://x.example/verify?code=123456&t=998877#334455",
            "Verify: color:#336699; background:#FFAA00", "Confirm bob1234@example.com",
            "Use promo code when you order.\n\nOne\nTwo\nThree\nFour\nOrder number 48213377",
            "Confirm the order of 2024-05-12 10:22:33 from 192.168.100.200",
        ]
        for text in table:
            with self.subTest(text=text):
                self.assertEqual(pegmail.find_codes(text), [])

    def test_links(self):
        table = [
            ("", []), ("ftp://x.example mailto:a@x.example http://", []),
            ("Go to https://x.example/a?b=c&d=%20e#f.", ["https://x.example/a?b=c&d=%20e#f"]),
            ("(see http://x.example/a), <https://x.example/b> or \"https://x.example/c\"!",
             ["http://x.example/a", "https://x.example/b", "https://x.example/c"]),
            ("https://x.example/a https://x.example/b https://x.example/a",
             ["https://x.example/a", "https://x.example/b"]),
            ("HTTPS://X.example/A", ["HTTPS://X.example/A"]),
            ("请点击https://x.example/a?b=c，完成注册。", ["https://x.example/a?b=c"]),
            ("https://user@x.example:8443/a;b=c/~d/e,f", ["https://user@x.example:8443/a;b=c/~d/e,f"]),
        ]
        for text, expected in table:
            with self.subTest(text=text):
                self.assertEqual(pegmail.find_links(text), expected)

    def test_answers_are_bounded(self):
        self.assertLessEqual(len(pegmail.find_codes("code 123456\n" + "".join(
            f"code {number}\n" for number in range(100000, 102000)))), 100)
        self.assertLessEqual(len(pegmail.find_links("".join(
            f"https://x.example/{number} " for number in range(5000)))), 1000)


class ServerChoiceTests(unittest.TestCase):
    """Rendezvous hashing of recipients over hosts."""

    addresses = [f"user{number}@example.com" for number in range(4000)]
    hosts = [(f"192.0.2.{number}", 1025) for number in range(1, 6)]

    def choose(self, hosts):
        return {address: pegmail.choose_server(hosts, address) for address in self.addresses}

    def test_a_new_host_takes_its_share_and_nothing_else_moves(self):
        before, after = self.choose(self.hosts[:4]), self.choose(self.hosts)
        moved = [address for address in self.addresses if before[address] != after[address]]
        self.assertEqual({after[address] for address in moved}, {self.hosts[4]})
        self.assertAlmostEqual(len(moved) / len(self.addresses), 1 / 5, delta=0.04)
        for host, count in collections.Counter(after.values()).items():
            self.assertAlmostEqual(count / len(self.addresses), 1 / 5, delta=0.04, msg=host)

    def test_order_and_case_make_no_difference(self):
        self.assertTrue(self.choose(self.hosts) == self.choose(self.hosts[::-1]), "order matters")
        for address in self.addresses[:100]:
            self.assertEqual(pegmail.choose_server(self.hosts, address),
                             pegmail.choose_server(self.hosts, address.upper()))

    def test_hosts_that_differ_in_the_port_only(self):
        hosts = [("192.0.2.1", 1025), ("192.0.2.1", 1026)]
        self.assertEqual(set(self.choose(hosts).values()), set(hosts))

    def test_every_process_chooses_alike(self):
        code = ("import pegmail; print([pegmail.choose_server([('a', 1), ('b', 2), ('c', None)], "
                "'u%d@example.com' % n) for n in range(100)])")
        answers = {subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE,
                                  cwd=compiled(), env={**os.environ, "PYTHONHASHSEED": seed}).stdout
                   for seed in "12"}
        self.assertEqual(len(answers), 1)
        self.assertIn(b"('b', 2)", answers.pop())


# -- Templates; what the tables expect is what Go 1.27 and sprig 3.2.3 print --

Template, TemplateError, GoTime = pegmail.Template, pegmail.TemplateError, pegmail.GoTime
CET = datetime.timezone(datetime.timedelta(hours=1), "CET")
MOMENT = datetime.datetime(2022, 1, 2, 15, 4, 5, 120000, tzinfo=CET)
WORLD = pegmail.Surroundings(env={"HOME": "/home/x"}, now=lambda: MOMENT, uuid=lambda: "x" * 36,
                     zones={"UTC": datetime.timezone.utc, "Paris": CET}.get)


def sample_fields():
    """Return the fields that all templates here are rendered with."""
    return {
        "ID": "c7f1", "Timestamp": GoTime(MOMENT), "Sender": "a@b.c",
        "Recipients": ["x@y.z", "q@r.s"], "Data": "Subject: x\r\n\r\nhey",
        "Body": "hey <you> & \"co\"\nsecond line\n",
        "Header": pegmail.go_header([("subject", "On my way"), ("Subject", "second"),
                                     ("x-y", "1")]),
        "N": 42, "Z": 0, "F": 2.5, "B": True, "L": [1, "two", 3.5, None, True],
        "M": {"a": 1, "b": "bee", "n": None, "sub": {"k": ["p", "q"]}, "e": ""}, "Nil": None}


def render(text, **more):
    """Render a template with the sample fields and more."""
    return Template(text).render({**sample_fields(), **more}, WORLD)


LIKE_GO = (
    ('{{true}} {{not 0}} {{and 1 0 2}} {{and 1 2}} {{or 0 "" 3}} {{or 0 ""}} {{1 | and 2}} {{0 |'
     ' or ""}} {{.M.a}} {{.M.missing}} {{.M.sub.k}} {{.M.missing.deep}} {{.M.n}}',
     'true true 0 2 3  1 0 1 <no value> [p q] <no value> <no value>'),
    ('{{.Header.Subject}} {{.Header.Nope}} {{.Header.Get "subject"}} {{.Header.Get "x-y"}}'
     ' {{.Header.Get "zip"}}|', '[On my way second] <no value> On my way 1 |'),
    ('{{if .N}}a{{else}}b{{end}} {{if .Z}}a{{else if .B}}c{{else}}b{{end}} {{if .Z}}a{{else if'
     ' .Z}}b{{else if .Z}}d{{else}}e{{end}} {{if .M}}m{{end}}{{if .Nil}}x{{end}}{{if'
     ' .Timestamp}}t{{end}}{{if .}}d{{end}}', 'a c e mtd'),
    ('{{with .M.sub}}{{.k}}{{end}} {{with .Z}}a{{else}}{{.N}}{{end}} {{with .Z}}a{{else with'
     ' .F}}{{.}}{{else}}z{{end}} {{with $x := .N}}{{$x}}{{.}}{{end}}', '[p q] 42 2.5 4242'),
    ('{{range .L}}[{{.}}]{{end}} {{range $i,$e := .L}}{{$i}}:{{$e}} {{end}} {{range $e :='
     ' .Recipients}}<{{$e}}>{{end}}',
     '[1][two][3.5][<no value>][true] 0:1 1:two 2:3.5 3:<no value> 4:true  <x@y.z><q@r.s>'),
    ('{{range $i,$e := .L}}{{if eq $i 1}}{{continue}}{{end}}{{if eq $i'
     ' 3}}{{break}}{{end}}{{$i}}{{end}}', '02'),
    ('{{$x := 1}}{{range .L}}{{$x = add $x 1}}{{end}}{{$x}} {{$y := 5}}{{if true}}{{$y :='
     ' 6}}{{$y}}{{$y = 7}}{{$y}}{{end}}{{$y}}', '6 675'),
    ('{{range $x := .M.missing}}{{else}}{{$x}}{{end}}', '<no value>'),
    ('{{define "a"}}<{{.}}|{{$}}>{{end}}{{template "a"}}{{template "a" .N}}{{template "a" "x" |'
     ' printf "%s!"}}{{template "a" 3 | printf "%d!"}}',
     '<<no value>|<no value>><42|42><x!|x!><3!|3!>'),
    ('{{block "b" .N}}[{{.}}]{{end}} {{template "b" 7}} {{block `c` .}}{{.N}}{{block "d"'
     ' .F}}{{.}}{{end}}{{end}}', '[42] [7] 422.5'),
    ('{{$x := .M.sub}}{{$x.k}} {{$x.k | len}} {{(index $x.k 1)}} {{(.M.sub).k}} {{(printf "%d"'
     ' 3)}}', '[p q] 2 q [p q] 3'),
    ('a {{- /* c */ -}} b {{/* x */}} c {{- /* y */}} d', 'ab  c d'),
    ('{{"a" | printf "%s%s" "b"}} {{"out" | print | len}} {{len "héllo"}} {{len .L}} {{len .M}}'
     ' {{len .Header}} {{.Timestamp.Format "2006-01-02T15:04:05Z07:00"}} {{.Timestamp.Month}}'
     ' {{.Timestamp.Weekday}} {{.Timestamp.Year}}',
     'ba 3 6 5 5 2 2022-01-02T15:04:05+01:00 January Sunday 2022'),
    ('{{$m := .Timestamp.Month}}{{printf "%d %v %q %x %05d|%10s|" $m $m $m $m $m $m}}',
     '1 January "January" 4a616e75617279 00001|   January|'),
    ('{{printf "%T %T %T %T %T %T %T %T" 1 1.5 "x" true nil .Timestamp .Timestamp.Month .Header}}'
     ' {{.Timestamp.Local}} {{.Timestamp.UTC}} {{"\\xc3\\xa9"}} {{"\\U0001F600"}} {{`raw \\n'
     ' "x"`}} {{print nil}} {{print .M.missing}} {{.M.missing | print}} {{print 1 2}} {{println 1'
     ' "a"}}',
     'int float64 string bool <nil> time.Time time.Month mail.Header 2022-01-02 14:04:05.12'
     ' +0000 UTC 2022-01-02 14:04:05.12 +0000 UTC é 😀 raw \\n "x" <nil> <nil> <nil> 1 2 1 a\n'),
    ('{{and false (index .L 99)}} {{or true (index .L 99)}}', 'false true'),
    ('{{range $k, $v := .M}}{{$k}}={{$v}};{{end}} {{range .M}}{{.}},{{end}} {{range $k,$v :='
     ' .Header}}{{$k}}{{range $v}}({{.}}){{end}}{{end}}',
     'a=1;b=bee;e=;n=<no value>;sub=map[k:[p q]]; 1,bee,,<no value>,map[k:[p q]], Subject(On my'
     ' way)(second)X-Y(1)'),
    ('{{range 3}}{{.}}{{end}} {{range $i := 3}}{{$i}}{{end}} {{range 0}}a{{else}}none{{end}}'
     ' {{range -1}}a{{else}}neg{{end}}', '012 012 none neg'),
    ('{{$i := 0}}{{$x := 0}}{{range $i, $x = .L}}{{end}}{{$i}}{{$x}}', '4true'),
    ('{{if false}}{{template "nope"}}{{end}}ok', 'ok'),
    ('{{define "r"}}{{if .}}{{.}}{{template "r" (sub . 1)}}{{end}}{{end}}{{template "r" 5}}',
     '54321'),
    ('a {{- " b " -}} c', 'a b c'), ('a {{- 3}} b', 'a3 b'),
    ('a {{-3}} b {{ 3 -}} c', 'a -3 b 3c'), ('{{/* x */ -}} y', 'y'),
    ('a\n{{- if true -}}\n b\n{{- end }}\nc', 'ab\nc'), ('}}', '}}'),
    ('{{$x := 1 | print 2}}{{$x}}', '2 1'),
    ('{{if $x := 0}}{{$x}}{{else if $y := 3}}{{$x}}{{$y}}{{end}}', '03'),
    ('{{"é"}}{{.M.é}} {{true | not}} {{1 | eq 1}} {{index .L 0}} {{index .M "a"}} {{index .M'
     ' "zip"}} {{index .M "sub" "k" 1}} {{index "abc" 1}} {{index .Header "Subject" 0}} {{slice'
     ' "abcdef" 1 3}} {{slice .L 1}} {{slice .L 1 2}} {{eq 1 1}} {{eq 1 2 1}} {{eq "a" "a"}} {{eq'
     ' 1.5 1.5}} {{eq true true}} {{ne 1 2}} {{lt 1 2}} {{le 2 2}} {{gt 3 2}} {{ge 2 3}} {{lt "a"'
     ' "b"}} {{lt 1.5 2.5}} {{ne .Nil 1}}',
     'é<no value> false true 1 1 <no value> q 98 On my way bc [two 3.5 <nil> true] [two] true'
     ' true true true true true true true true false true true true'),
    ('{{html "<a href=\'x\'>\\"&\\x00"}} {{html 1 "a"}} {{html .L}} {{js "it\'s \\"x\\" <b> & ='
     ' \\\\ \\n\\té\\u2028"}} {{urlquery "a b&c=d/é~-_.!*\'()+"}} {{urlquery 1 2}}',
     '&lt;a href=&#39;x&#39;&gt;&#34;&amp;� 1a [1 two 3.5 &lt;nil&gt; true] it\\\'s \\"x\\"'
     ' \\u003Cb\\u003E \\u0026 \\u003D \\\\ \\u000A\\u0009é\\u2028'
     ' a+b%26c%3Dd%2F%C3%A9~-_.%21%2A%27%28%29%2B 1+2'),
    ('{{printf "%v %+v %s %q %d %x %X %t %f %.2f %e %g %c %U %5d|%-5s|%05d %T" 1 2 "s" "q" 3 255'
     ' 255 true 1.5 2.345 12345.678 1e-7 65 0x1F600 42 "ab" 42 "x"}} {{printf "%d" "hi"}}'
     ' {{printf "%s" 5}} {{printf "%d"}} {{printf "%d" 1 2}} {{printf "%z" 3}} {{printf "%!" 3}}'
     ' {{printf "100%"}} {{printf "%%"}}',
     '1 2 s "q" 3 ff FF true 1.500000 2.35 1.234568e+04 1e-07 A U+1F600    42|ab   |00042 string'
     ' %!d(string=hi) %!s(int=5) %!d(MISSING) 1%!(EXTRA int=2) %!z(int=3) %!!(int=3)'
     ' 100%!(NOVERB) %'),
    ('{{printf "%5z" 3}} {{printf "%-5z|" 3}} {{printf "%05d|%-05d|%+d|% d|%+d" 42 42 42 42 -42}}'
     ' {{printf "%08.3f|%-8.3f|%+.1f|%8.3f|% f|%08.3f|%+08.2f" 3.14159 3.14159 2.5 3.14159 1.5'
     ' -3.14159 2.5}} {{printf "%6.2f|%6s|%-6s|%.2s|%6.2s|%06s|%6q|%-6q|%.1q" 3.14159 "ab" "ab"'
     ' "abcdef" "abcdef" "ab" "a" "a" "abc"}}',
     '%!z(int=    3) %!z(int=3    )| 00042|42   |+42| 42|-42 0003.142|3.142   |+2.5|   3.142|'
     ' 1.500000|-003.142|+0002.50   3.14|    ab|ab    |ab|    ab|0000ab|   "a"|"a"   |"a"'),
    ('{{printf "%v %v %v %v %v %v" 1e6 1e20 1e21 123456.0 0.000001 1e-5}} {{1e6}} {{3.0}}'
     ' {{2.50}} {{1e100}} {{1234567.0}} {{12345678901234567890.0}} {{printf "%s %v" .Header'
     ' .Header}} {{printf "%q" .Header}}',
     '1e+06 1e+20 1e+21 123456 1e-06 1e-05 1e+06 3 2.5 1e+100 1.234567e+06'
     ' 1.2345678901234567e+19 map[Subject:[On my way second] X-Y:[1]] map[Subject:[On my way'
     ' second] X-Y:[1]] map["Subject":["On my way" "second"] "X-Y":["1"]]'),
    ('{{printf "%c %c %c" 65 0x110000 -1}} {{printf "%U" -1}} {{printf "%s" "\\xff"}} {{printf'
     ' "%q" "\\xff\\xc3\\xa9"}} {{printf "%x" "é"}} {{printf "%-010d|%+-8d|%- 8d|%0-8d|" 42 42 42'
     ' 42}} {{printf "%t %t" "x" 3}} {{printf "%s %d" .Timestamp.Weekday .Timestamp.Weekday}}',
     'A � � U+FFFFFFFFFFFFFFFF \udcff "\\xffé" c3a9 42        |+42     | 42     |42      |'
     ' %!t(string=x) %!t(int=3) Sunday 0'),
    ('{{empty ""}} {{empty 0}} {{empty 1}} {{coalesce 0 "" .Nil 3 4}} {{coalesce}} {{coalesce 0'
     ' ""}}', 'true true false 3 <no value> <no value>'),
    ('{{trim "  a b \\n"}} {{trimAll "$" "$a$"}} {{trimSuffix "-" "a-"}} {{trimPrefix "-" "-a"}}'
     ' {{trimSuffix "" "a"}} {{trimAll "" "a"}}', 'a b a a a a a'),
    ('{{upper "abcé"}} {{lower "ABCÉ"}} {{title "hello world it\'s a-b c_d é1x"}} {{title'
     ' "HELLO"}} {{replace "a" "b" "banana"}} {{replace "" "-" "abc"}} {{contains "a" "cat"}}'
     ' {{hasPrefix "c" "cat"}} {{hasSuffix "t" "cat"}} {{hasSuffix "x" "cat"}}',
     "ABCÉ abcé Hello World It'S A-B C_d É1x HELLO bbnbnb -a-b-c- true true true false"),
    ('{{(split "$" "a$b")._0}} {{(split "$" "a$b")._2}} {{split "," "a,b"}} {{splitList ","'
     ' "a,b,,c"}} {{splitList "" "héy"}} {{split "" ""}}',
     'a <no value> map[_0:a _1:b] [a b  c] [h é y] map[]'),
    ('{{join "," .L}} {{join "-" (list 1 2)}} {{join "," "x"}} {{quote "a\\"b" 1 .Nil 2.5 true}}'
     ' {{squote "a\'b" 1 .Nil}} {{quote .L}} {{quote}} {{quote "é\\n"}} {{trunc 3 "abcdef"}}'
     ' {{trunc -3 "abcdef"}} {{trunc 10 "abc"}} {{nospace " a b\\tc\\n"}} {{indent 2 "a\\nb"}}'
     ' {{nindent 2 "a\\nb"}} {{repeat 3 "ab"}} {{cat "a" 1 .Nil "b"}} {{cat "a " " b "}} {{cat}}',
     '1,two,3.5,true 1-2 x "a\\"b" "1" "2.5" "true" \'a\'b\' \'1\' "[1 two 3.5 <nil> true]" '
     ' "é\\n" abc def abc abc   a\n  b \n  a\n  b ababab a 1 b a   b  '),
    ('{{toJson .M}} {{toJson .L}} {{toJson "<a>&\\u2028\\n\\x01é\\"\\\\/"}} {{toJson 1.0}}'
     ' {{toJson 1e21}} {{toJson .Nil}} {{toJson .Timestamp}} {{toJson .Header}} {{toJson 1e20}}',
     '{"a":1,"b":"bee","e":"","n":null,"sub":{"k":["p","q"]}} [1,"two",3.5,null,true]'
     ' "\\u003ca\\u003e\\u0026\\u2028\\n\\u0001é\\"\\\\/" 1 1e+21 null'
     ' "2022-01-02T15:04:05.12+01:00" {"Subject":["On my way","second"],"X-Y":["1"]}'
     ' 100000000000000000000'),
    ('{{toPrettyJson .M.sub}} {{toPrettyJson (list)}} {{toPrettyJson (dict "a" (list))}} {{b64enc'
     ' "héllo"}} {{b64dec "aGVsbG8="}} {{sha256sum "abc"}} {{b64dec "/w==" | printf "%q"}}'
     ' {{b64dec "aGVs\\nbG8="}}',
     '{\n  "k": [\n    "p",\n    "q"\n  ]\n} [] {\n  "a": []\n} aMOpbGxv hello'
     ' ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad "\\xff" hello'),
    ('{{date "2006-01-02 15:04" .Timestamp}} {{date "2006-01-02" 0}} {{unixEpoch .Timestamp}}'
     ' {{ternary "y" "n" true}} {{ternary "y" "n" false}} {{true | ternary "y" "n"}}',
     '2022-01-02 14:04 1970-01-01 1641132245 y n y'),
    ('{{dict "a" 1 "b"}} {{get (dict "a" 1) "a"}} {{get (dict) "a"}} {{hasKey (dict "a" 1) "a"}}'
     ' {{hasKey .M "zip"}} {{$d := dict "a" 1}} {{keys (dict "a" 1)}} {{dict 1 2}} {{get .M "b"}}',
     'map[a:1 b:] 1  true false  [a] map[1:2] bee'),
    ('{{add 1 2 3}} {{sub 5 2}} {{mul 2 3 4}} {{div 7 2}} {{mod 7 2}} {{div -7 2}} {{mod -7 2}}'
     ' {{add "5" 1.9}} {{add}} {{mul 2}} {{div 7 -2}} {{mod 7 -2}} {{int "42"}} {{int 3.9}} {{int'
     ' -3.9}} {{int "-7"}} {{int "abc"}} {{int "010"}} {{int "08"}} {{toString 5}} {{toString'
     ' "a"}} {{toString .L}} {{until 3}} {{until 0}} {{until -3}}',
     '6 3 24 3 1 -3 -1 6 0 2 -3 1 42 3 -3 -7 0 8 0 5 a [1 two 3.5 <nil> true] [0 1 2] [] [0 -1'
     ' -2]'),
    ('{{has (list 1) (list (list 1))}} {{uniq (list (dict "a" 1) (dict "a" 1))}} {{last .L}}'
     ' {{rest .L}} {{rest (list)}} {{.Timestamp.Format "Mon Monday Jan January Month Jans 1 01 2'
     ' 02 _2 06 2006 _2006"}} {{.Timestamp.Format "15 3 03 4 04 5 05 PM pm MST 002 -0700 -07:00'
     ' -07 Z0700 Z07 Z07:00"}}',
     'true [map[a:1]] true [two 3.5 <nil> true] [] Sun Sunday Jan January Month Jans 1 01 2 02 '
     ' 2 22 2022 _2022 15 3 03 4 04 5 05 PM pm CET 002 +0100 +01:00 +01 +0100 +01 +01:00'),
    ('{{.Timestamp.Format ".000 .999 ,000000 .0 .00a .0005 .9"}}',
     '.120 .12 ,120000 .1 .12a .0005 .1'),
    ('{{$d := dict "a" 1}}{{$_ := set $d "b" 2}}{{$d}}', 'map[a:1 b:2]'),
    ('{{printf "%.3d|%8.3d|%+.3d|%-6.3d|%+x" 5 5 5 5 255}} {{printf "%g %e %.3g %.10g %g" 1e6 1.5'
     ' 1234.5678 1234.5678 100000.0}}',
     '005|     005|+005|005   |+ff 1e+06 1.500000e+00 1.23e+03 1234.5678 100000'),
    ('{{regexMatch "^a.*z$" "abcz"}} {{regexMatch "b+" "aaa"}} {{regexFind "[a-z]+" "12 abc de"}}'
     ' {{regexReplaceAll "a(x*)b" "-ab-axxb-" "${1}W"}} {{regexReplaceAll "a(x*)b" "-ab-axxb-"'
     ' "$1W"}} {{regexFind "zzz" "abc"}}', 'true false abc -W-xxW- --- '),
    ('{{regexReplaceAll "x*" "abxxd" "-"}} {{regexReplaceAll "" "abc" "-"}} {{regexReplaceAll'
     ' "b*" "abc" "[$0]"}}', '-a-b-d- -a-b-c- []a[b]c[]'),
    ('{{regexFind "(?i)HELLO" "say hello"}} {{regexFind "(?s)a.b" "a\\nb" | len}} {{regexFind'
     ' "a.b" "a\\nb" | len}} {{regexFind "(?m)^\\\\w+$" "a b\\ncd"}} {{regexMatch "a$" "a\\n"}}'
     ' {{regexMatch "a\\\\z" "a"}} {{regexMatch "\\\\Aa" "ba"}} {{regexFind "(?i)ü+" "aÜü"}}',
     'hello 3 0 cd false true false Üü'),
    ('{{regexFind "a{2,3}" "aaaa"}} {{regexFind "a{2,3}?" "aaaa"}} {{regexFind "a{2}" "aaaa"}}'
     ' {{regexFind "a{2,}" "aaaa"}} {{regexFind "a+?" "aaaa"}} {{regexFind "a*?b" "aab"}}'
     ' {{regexFind "[]a]+" "x]a]"}} {{regexFind "[a\\\\-z]+" "b-z"}} {{regexFind "[\\\\d\\\\s]+"'
     ' "a1 2b"}} {{regexFind "[0-9]+" "x٣1"}} {{regexFind "\\\\bfoo\\\\b" "a foo b"}} {{regexFind'
     ' "\\\\.\\\\*" "a.*"}}', 'aaa aa aa aaaa a aab ]a] -z 1 2 1 foo .*'),
    ('{{regexReplaceAll "(?P<first>\\\\w+) (?P<second>\\\\w+)" "john smith" "${second} $first"}}'
     ' {{regexReplaceAll "a" "banana" "$$"}} {{regexReplaceAll "(a)(b)?" "ab a" "<$1|$2>"}}',
     'smith john b$n$n$ <a|b> <a|>'),
    ('{{default "x" .M.missing}} {{default "x" 0}} {{default "x" "y"}} {{.M.e | default "z"}}'
     ' {{len (default "x" .L)}} {{env "HOME"}}', 'x x y z 5 /home/x'),
)

REFUSED_BY_GO = (
    '{{template "nope"}}', '{{define "a"}}{{end}}{{template "a" 1 2}}', '{{.Nope}}',
    '{{.Header.Get}}', "{{'ab'}}", '{{"\\ud800"}}', '{{"\\q"}}', '{{and true (index .L 99)}}',
    '{{range .}}x{{end}}', '{{break}}', '{{$x}}', '{{$x = 1}}',
    '{{if true}}{{$x := 1}}{{end}}{{$x}}',
    '{{define "a"}}1{{end}}{{define "a"}}2{{end}}{{template "a"}}', '{{template N}}',
    '{{block "x"}}{{end}}', '{{/* x */ }}', '{{ /* x */ }}', '{{-/* x */}}', '{{"a', "{{'a",
    '{{`a', '{{.N', '{{}}', '{{|}}', '{{.N | 3}}', '{{.N | .}}', '{{3 4}}', '{{print .N.X}}',
    '{{..N}}', '{{(1}}', '{{and.N}}', '{{1)}}', '{{print(1)}}', '{{if}}{{end}}', '{{if .N}}',
    '{{end}}', '{{else}}', '{{if .N}}{{else}}{{else}}{{end}}', '{{foo}}', '{{.N | foo}}',
    '{{.N+1}}', '{{09}}', '{{1__0}}', '{{continue}}', '{{range .L}}{{break 3}}{{end}}',
    '{{define "x"}}', '{{len 3}}', '{{index .L 5}}', '{{index .M 1}}', '{{index 3 1}}',
    '{{slice .L 0 9}}', '{{eq 1 "a"}}', '{{eq .L .L}}', '{{lt 1 "a"}}', '{{eq "a" "b" 1}}',
    '{{printf}}', '{{indent -1 "a"}}', '{{first .Nil}}', '{{div 1 0}}', '{{fail "boom"}}',
    '{{upper 5}}', '{{regexFind "(" "a"}}', '{{default "x" .Timestamp | len}}', '{{and}}',
)

# What must fail, and quickly: the template, and a word of the reason.
HOSTILE = (
    ("{{range 100000}}{{range 100000}}x{{end}}{{end}}", "steps"),
    ("{{range 9223372036854775807}}{{end}}", "steps"),
    ('{{define "a"}}{{template "a" .}}{{end}}{{template "a" .}}', "deeply"),
    ('{{define "a"}}{{if lt . 40}}{{template "a" (add . 1)}}{{template "a" (add . 1)}}{{end}}'
     '{{end}}{{template "a" 0}}', "steps"),
    ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "deeply"), ("{{if 1}}" * 5000, "deeply"),
    ("{{if 0}}" + "{{else if 0}}" * 5000 + "{{end}}", "deeply"),
    ('{{printf "%1000000000d" 1}}', "wide"), ('{{printf "%.1000000000f" 1.5}}', "wide"),
    ('{{printf "%1000000d" (until 1000)}}', "text allowed"),
    ('{{$s := "x"}}{{range 100}}{{$s = printf "%s%s" $s $s}}{{end}}', "text allowed"),
    ("{{$s := list 1}}{{range 99}}{{$s = list $s $s}}{{end}}{{toJson $s}}", "steps"),
    ("{{$s := list 1}}{{range 99}}{{$s = list $s $s}}{{end}}{{has $s $s}}", "steps"),
    ('{{$d := dict}}{{$_ := set $d "a" $d}}{{$d}}', "holds itself"),
    ("{{$s := list}}{{range 500}}{{$s = list $s}}{{end}}{{$s}}", "in each other"),
    ('{{repeat 1000000000000 "x"}}', "text allowed"),
    ('{{indent 1000000 (repeat 1000 "\\n")}}', "text allowed"),
    ('{{replace "y" (repeat 100000 "x") (repeat 100000 "y")}}', "text allowed"),
    ('{{regexReplaceAll "x" (repeat 100 "x") (repeat 100000 "y")}}', "text allowed"),
    ('{{join (repeat 1000000 "x") (until 1000)}}', "text allowed"),
    ("{{until 100000000000}}", "steps"),
    ("{{$l := list}}{{range 100000}}{{$l = list $l .}}{{end}}", "steps"),
    ('{{splitList "" (repeat 1000000 "x")}}', "steps"),
    ('{{fromJson (repeat 5000000 "1,")}}', "steps"),
    ("{{range 99999}}{{len $.Big}}{{end}}", "steps"), ("{{range 9}}{{$.Big}}{{end}}", "output"),
    ('{{regexMatch "a" (repeat 1100000 "a")}}', "characters"),
    ('{{regexReplaceAll "a" (repeat 5000 "a") (repeat 50000 "$9")}}', "steps"),
    ('{{range 1000}}{{regexMatch "a*b" $.Long}}{{end}}', "steps"),
    ("{{" + "9" * 100000 + "}}", "bad number"), ("{{" + "9" * 100000 + ".0}}", "bad number"),
    ("{{0x" + "9" * 100000 + "}}", "bad number"), ("{{/*" * 50000, "unexpected"),
    ('{{date "2006" 9223372036854775807}}', "out of range"),
    ("{{.__class__}}", "can't evaluate field"), ("{{.Sender.__class__}}", "can't evaluate field"),
    ("{{.Timestamp.moment}}", "can't evaluate field"), ("{{.Sender.upper}}", "can't evaluate"),
    ("{{.Timestamp.__init__}}", "can't evaluate field"), ("{{.Odd}}", "Python's type object"),
    ('{{set .M "a" 2}}', "only a map that the template made"),
    ('{{set .Header "Subject" 3}}', "only a map that the template made"))

# A pattern, a text, and what regexFind gives.
REGEX_FINDS = (
    (r"(?i)(invoice|bill)\s+#?(\d+)", "Your INVOICE  #123.", "INVOICE  #123"),
    (r"(\d{2}:){2}", "at 12:34:56", "12:34:"), ("(?i:H)ello", "say Hello", "Hello"),
    ("a??b", "ab", "ab"), ("(a|ab)(c|bcd)", "abcd", "abcd"), ("a{,2}", "a{,2}", "a{,2}"),
    ("a{x", "a{x", "a{x"), ("x{0}y", "xy", "y"), ("[[:alpha:]]+", "1abc2", "abc"),
    ("[^[:alpha:]]+", "a12b", "12"), (r"\d+", "x٣1", "1"), (r"\x41\x{42}", "AB", "AB"),
    ("[a&&b]+", "&&", "&&"), ("[^a]", "é", "é"), (r"[\w-.]+", "<a-b.c>", "a-b.c"),
    ("[+--]+", "a+,-.", "+,-"), ("(?i)É", "é", "é"), ("(?-s)a.b", "a\nb", ""),
    ("a(?i)b", "aB", "aB"), ("(?i)a|b", "B", "B"), ("(a(?i)b)c", "aBC", ""), ("(|a)*", "aa", ""),
    ("(a|b*)*c", "abac", "abac"), ("(a?){50}a{50}", "a" * 50, "a" * 50), ("a|" * 2000, "a", "a"),
    ("invoice [0-9]+", "abc inv " * 50000, ""))
# A pattern, a text, a replacement, and what regexReplaceAll gives.
REGEX_REPLACEMENTS = (
    ("a", "a", "$x$", "$"), ("a", "a", "${}", "${}"), ("a", "a", "$1x", ""),
    ("(a)", "a", "$01", ""),
    ("(?<n>a)", "a", "[$n]", "[a]"), ("(a|(b))+", "ab", "[$1$2]", "[bb]"),
    ("a|b|", "abc", "-", "--c-"), ("(?i)[a-c]", "aBCd", "x", "xxxd"),
    ("(a+)+", "aab", "<$1>", "<aa>b"), ("a.*b|a", "aa", "x", "xx"))
REFUSED_PATTERNS = (
    "a**", "*", "(?=a)", "(?<=a)b", r"(a)\1", "(?P=n)", "a*+b", "(?>a)", "(?#a)", "a{2,1}",
    "a{1001}", "a{0,1001}", "((a{100}){100}){100}", "(", ")", "a)b)", "[a", r"\q", r"\p{L}",
    "[[:^alpha:]]", "[[:nope:]]", "[z-a]", "(" * 200 + ")" * 200, "a" * 5001)
# Patterns that others find slow, each with the most steps that a rendering may need for 500 "a".
HARD_PATTERNS = (
    ("(a+)+$", 1000), ("a*a*a*b", 1000), ("(a|a)*b", 1000), ("(.*)*x", 1000),
    ("a{0,300}a{0,300}", 1500), ("(a?){50}a{50}b", 20000),
    ("a.*b|a", 1000), ("(.*)(.*)(.*)z", 1500))


class HostileTemplateTest(unittest.TestCase):
    """What templates may not do."""

    def test_bounds(self) -> None:
        """Each bound ends in TemplateError, with a place."""
        fields = {**sample_fields(), "Big": "x" * 4000000, "Odd": object(), "Long": "a" * 8000}
        for text, reason in HOSTILE:
            with self.subTest(text[:80]), self.assertRaisesRegex(TemplateError, reason) as caught:
                Template(text).render(fields, WORLD, 10 << 20, 20000)
            self.assertGreater(caught.exception.column, 0)

    def test_nothing_is_reached_by_name(self) -> None:
        """A map has keys only, and a header nothing but Get."""
        text = "{{.M.__class__}}{{.M.keys}}{{.Header.items}}{{.M.__init__.x}}"
        self.assertEqual(render(text), "<no value>" * 4)

    def test_what_others_find_slow(self) -> None:
        """Templates and texts that take others much time, or more stack than there is."""
        for text, expected in (
                ('{{fromJson (repeat 100000 "[")}}', "<no value>"),
                ('{{int (repeat 9999 "9")}}', "0"), ("{{" + "(" * 90 + "1" + ")" * 90 + "}}", "1"),
                ("{{if 1}}" * 90 + "x" + "{{end}}" * 90, "x"),
                ("{{1" + "|print" * 2000 + "}}", "1"), ("{{" + " " * 99999 + "1}}", "1")):
            with self.subTest(text[:60]):
                self.assertEqual(render(text), expected)

    def test_hard_patterns(self) -> None:
        """Patterns take few steps, or are refused when a text makes it too many."""
        for pattern, steps in HARD_PATTERNS:
            for text in ("a" * 500, "a" * 499 + "!"):
                with self.subTest(pattern):
                    Template("{{regexMatch .P .T}}").render({"P": pattern, "T": text},
                                                            max_steps=steps)
        for pattern in ("(a+)+$", "(a){1000}b", "a{0,300}a{0,300}b"):
            with self.subTest(pattern), self.assertRaisesRegex(TemplateError, "too many steps"):
                Template("{{regexMatch .P .T}}").render({"P": pattern, "T": "a" * 40000 + "b!"},
                                                        max_steps=20000)

    def test_little_stack(self) -> None:
        """Deep templates fail as templates do, also where the caller has used up the stack."""
        template = Template("{{if 1}}" * 90 + "{{end}}" * 90)

        def dive(depth: int) -> str:
            return dive(depth - 1) if depth else template.render({})
        with self.assertRaises((TemplateError, RecursionError)):
            dive(sys.getrecursionlimit() - 150)
        deep = ('{{define "a"}}' + "{{with .}}" * 20 + '{{template "a" .}}' + "{{end}}" * 20
                + '{{end}}{{template "a" 1}}')
        with self.assertRaisesRegex(TemplateError, "deeply"):
            render(deep)

    def test_world(self) -> None:
        """Nothing is known of the world but what is handed in."""
        self.assertEqual(Template('{{env "HOME"}}|{{env "PATH"}}').render({}), "|")
        for text in ("{{now}}", "{{uuidv4}}", '{{date "2006" "x"}}'):
            with self.subTest(text), self.assertRaises(TemplateError):
                Template(text).render({})

    def test_fields_stay_as_they_are(self) -> None:
        """A template makes new lists and maps."""
        fields = sample_fields()
        Template('{{$d := dict "m" .M}}{{$_ := set $d "x" 1}}{{rest .L}}{{keys .M}}').render(fields)
        self.assertEqual(fields, sample_fields())


class TemplateLanguageTest(unittest.TestCase):
    """The language, printing and functions."""

    def test_like_go(self) -> None:
        """Templates that Go renders give what it gives."""
        for text, expected in LIKE_GO:
            with self.subTest(text):
                self.assertEqual(render(text), expected)

    def test_refused_by_go(self) -> None:
        """Templates that Go refuses are refused."""
        for text in REFUSED_BY_GO:
            with self.subTest(text), self.assertRaises(TemplateError):
                render(text)

    def test_regular_expressions(self) -> None:
        """Patterns find what they find in Go, and are refused where RE2 does not know them."""
        for pattern, text, expected in REGEX_FINDS:
            with self.subTest(pattern[:80]):
                self.assertEqual(render("{{regexFind .P .T}}", P=pattern, T=text), expected)
        for pattern, text, new, expected in REGEX_REPLACEMENTS:
            with self.subTest(pattern, new=new):
                self.assertEqual(
                    render("{{regexReplaceAll .P .T .W}}", P=pattern, T=text, W=new), expected)
        for pattern in REFUSED_PATTERNS:
            with self.subTest(pattern[:80]), self.assertRaisesRegex(TemplateError, "regular expr"):
                render('{{regexMatch .P "a"}}', P=pattern)

    def test_places(self) -> None:
        """Errors say where they are, be they found early or late."""
        for text, expected in (
                ("a\n\n  {{.N}} {{foo}}", 'line 3, column 12: function "foo" is not defined'),
                ("{{if .N}}\nx", "line 2, column 2: an {{end}} is missing"),
                ("é\n{{ len\n  .N }}", "line 2, column 4: len of type int"),
                ("{{range .L}}\n {{.X}}{{end}}", "line 2, column 4: can't evaluate field X"),
                ('{{define "x"}}\n{{index . 9}}{{end}}{{template "x" .L}}', "line 2, column 3: "),
                ('{{.N}}\n{{"\\q"}}', 'line 2, column 3: "\\q" is no valid literal'),
                ("x {{.N }", "line 1, column 8: unexpected '}'")):
            with self.subTest(text), self.assertRaises(TemplateError) as caught:
                render(text)
            self.assertIn("template: " + expected, str(caught.exception))
        with self.assertRaisesRegex(TemplateError, "payload: line 1, column 3: unclosed action"):
            Template("{{", "payload")

    def test_check(self) -> None:
        """A dry run finds fields that there are not."""
        Template("{{.ID}} {{.M.zip}}").check(sample_fields())
        with self.assertRaisesRegex(TemplateError, "field Subject"):
            Template("{{.Subject}}").check(sample_fields())

    def test_bytes(self) -> None:
        """Bytes that are no UTF-8 pass through, and join to characters again."""
        for text, expected in (
                ('{{.X}} {{len .X}} {{printf "%q %x" .X .X}}', "\udcff\xe9 3 \"\\xff\xe9\" ffc3a9"),
                ('{{slice .X 1 2}}{{slice .X 2 3}}', "\xe9"), ("{{toJson .X}}", '"\ufffd\xe9"'),
                ('{{b64enc .X}} {{b64dec (b64enc .X)}}', "/8Op \udcff\xe9"),
                ("{{urlquery .X}}", "%FF%C3%A9"), ("{{.Y}}{{len .Y}}", "\ufffd3"),
                ('{{"\\xc3\\xa9" | upper}}', "\xc9")):
            with self.subTest(text):
                self.assertEqual(render(text, X="\udcff\xe9", Y="\ud800"), expected)

    def test_world_that_is_there(self) -> None:
        """Clock, zones, environment and random numbers are those handed in."""
        for text, expected in (
                ('{{env "HOME"}} {{env "PATH"}}|{{uuidv4 | len}}', "/home/x |36"),
                ("{{now.Year}} {{date `2006` now}} {{date `15:04` `?`}}", "2022 2022 14:04"),
                ('{{.T.Format "MST -07 Z07:00"}} {{.T.Local}}',
                 "-0330 -03 -03:30 2022-01-02 14:04:05.12 +0000 UTC")):
            zone = datetime.timezone(-datetime.timedelta(hours=3, minutes=30, seconds=15))
            with self.subTest(text):
                self.assertEqual(render(text, T=GoTime(MOMENT.astimezone(zone))), expected)

    def test_tuples(self) -> None:
        """Tuples are lists."""
        self.assertEqual(render("{{range .X}}{{.}}{{end}} {{index .X 1}}", X=("a", "b")), "ab b")

    def test_default_payload(self) -> None:
        """The payload of smtp-pigeon, which must keep working."""
        text = ('{"id": {{.ID | toJson}}, "timestamp": "'
                '{{.Timestamp.UTC.Format "2006-01-02T15:04:05Z07:00"}}", "sender": {{toJson .Sender'
                '}}, "recipients": [{{range $i, $r := .Recipients}}{{if $i}}, {{end}}'
                '{{printf "%q" $r}}{{end}}], "subject": {{.Header.Get "Subject" | toJson}}}')
        self.assertEqual(render(text), '{"id": "c7f1", "timestamp": "2022-01-02T14:04:05Z", '
                         '"sender": "a@b.c", "recipients": ["x@y.z", "q@r.s"], '
                         '"subject": "On my way"}')

    def test_every_function_is_tested(self) -> None:
        """Each function is named in some template here."""
        texts = " ".join([row[0] for row in (*LIKE_GO, *HOSTILE)] + list(REFUSED_BY_GO)) + "now"
        words = set(re.findall(r"\w+", texts)) | {"uuidv4"}
        self.assertEqual(sorted(set(pegmail.TEMPLATE_FUNCTIONS) - words), [])

    def test_plain(self) -> None:
        """A text without braces is itself; the output is as long as it may be, and no longer."""
        template = Template("a } b\n")
        self.assertTrue(template.is_plain and not Template("{{.ID}}").is_plain)
        self.assertEqual((template.text, template.render({}, max_output=6)), ("a } b\n", "a } b\n"))
        with self.assertRaises(TemplateError):
            template.render({}, max_output=5)


# =====================================================================================
# 3. Mail: envelopes, replies, header fields and MIME structure
# =====================================================================================

class HeaderTests(unittest.TestCase):
    """Header blocks, as they should be and as they are."""

    def test_header_length(self):
        table = [
            (b"", 0), (b"\r\n", 0), (b"\r\nA: b\r\n\r\n", 0), (b"A: b", 4), (b"A: b\r\n", 6),
            (b"A: b\r\n\r\nx: y\r\n", 6), (b"A: b\r\n c\r\n\td\r\nE:\r\n\r\nx", 18),
            (b"hello\r\n\r\nA: b\r\n", 0), (b"A: b\r\nno field\r\nC: d\r\n\r\n", 6),
            (b"From x Mon Jan\r\nA: b\r\n\r\nx", 22), (b">From x\r\nA: b\r\n\r\nx", 15),
            (b"A : b\r\n\r\n", 7), (b": b\r\n\r\n", 0), (b"A\xc3\xa9: b\r\n\r\n", 0),
            (b"A" * 201 + b": b\r\n\r\n", 0), (b"--x\r\n\r\n", 0), (b"A: \xff\0\r\n\r\n", 7),
        ]
        for data, expected in table:
            with self.subTest(data=data[:40]):
                self.assertEqual(pegmail.header_length(data), expected)

    def test_fields(self):
        table = [
            (b"", []), (b"A: b\r\n", [("A", "b")]), (b"A:b\r\n", [("A", "b")]),
            (b"A : b \r\n", [("A", "b")]), (b"A:\r\nB:\r\n", [("A", ""), ("B", "")]),
            (b"A: b\r\n c\r\n\td\r\n", [("A", "b c\td")]), (b"A:\r\n b\r\n", [("A", "b")]),
            (b"a: 1\r\nA: 2\r\na: 3\r\n", [("a", "1"), ("A", "2"), ("a", "3")]),
            (b"A: caf\xc3\xa9\r\nB: caf\xe9\r\n", [("A", "café"), ("B", "café")]),
            (b"A: b:c: d\r\n", [("A", "b:c: d")]), (b"A: b\rc\r\n", [("A", "b c")]),
            (b"A: =?utf-8?Q?x?=\r\n", [("A", "=?utf-8?Q?x?=")]),
            (b"From x Mon\r\nA: b\r\n", [("A", "b")]),
            (b" orphan\r\nA: b\r\n", [("A", "b")]),
        ]
        for block, expected in table:
            with self.subTest(block=block):
                self.assertEqual(pegmail.parse_fields(block), expected)

    def test_fields_are_bounded(self):
        limit = pegmail.MAX_HEADER_FIELDS
        self.assertEqual(len(pegmail.parse_fields(b"A: b\r\n" * limit)), limit)
        with self.assertRaises(pegmail.ParseError):
            pegmail.parse_fields(b"A: b\r\n" * (limit + 1))

    def test_subject(self):
        table = [
            (b"", ""), (b"From: a\r\n", ""), (b"Subject: hi\r\n", "hi"), (b"SUBJECT:hi\r\n", "hi"),
            (b"X-Subject: no\r\nSubject : yes\r\nSubject: two\r\n", "yes"),
            (b"Subject:\r\n =?utf-8?Q?a?=\r\n =?utf-8?Q?b?=\r\nX: y\r\n", "ab"),
            (b"Subject: one\r\n\ttwo\r\n", "one\ttwo".replace("\t", " ")),
            (b"Subject: caf\xe9\r\n", "café"), (b"Subject: caf\xc3\xa9\r\n", "café"),
            (b"Subject: =?utf-8?Q?a=0D=0AX:_b=00c=09d?=\r\n", "a  X: b c d"),
            (b"Subject: =?utf-8?B?4oCoeA==?=\r\n", "x"),        # U+2028 is a line end to some
            (b"Subject: \0\x1b[31m\r\n", "[31m"), (b"Subject:\r\n", ""),
        ]
        for block, expected in table:
            with self.subTest(block=block):
                self.assertEqual(pegmail.read_subject(block), expected)

    def test_a_long_subject_stays_legible(self):
        for shift in range(4):
            with self.subTest(shift=shift):
                subject = "x" * shift + "é€" * 1000
                found = pegmail.read_subject(f"Subject: {subject}\r\n".encode())
                self.assertGreater(len(found), 500)
                self.assertTrue(subject.startswith(found.rstrip("\ufffd")), ascii(found[:20]))

    def test_a_subject_can_always_be_stored(self):
        for word in (b"=?utf-7?Q?+2AA-?=", b"=?utf-16?B?ANg=?=", b"=?utf-8?Q?=ED=A0=80?="):
            with self.subTest(word=word):
                pegmail.read_subject(b"Subject: " + word + b"\r\n").encode("utf-8")

    def test_hops(self):
        self.assertEqual(pegmail.count_hops(b"Received: x\r\nRECEIVED: y\r\nX-Received: z\r\n"
                                            b"X: received: \r\nreceived:\r\n"), 3)


class TraceTests(unittest.TestCase):
    """The fields added on top (RFC 5321 4.4): nobody can add one of their own."""

    def trace(self, **values):
        known = {"sender": "a@example.com", "recipients": ("b@example.com",), "peer": "192.0.2.7",
                 "helo": "client.example", "protocol": "ESMTP", "ident": "1a2b.1"}
        return pegmail.trace_fields(pegmail.Envelope(**{**known, **values}), "mx.example.com",
                                    "Mon, 01 Jan 2024 00:00:00 +0000")

    def test_whole(self):
        self.assertEqual(
            self.trace(protocol="ESMTPS", tls="TLSv1.3 AES"),
            b"Return-Path: <a@example.com>\r\n"
            b"Received: from client.example ([192.0.2.7])\r\n"
            b"\tby mx.example.com (pegmail) with ESMTPS (TLSv1.3 AES)\r\n"
            b"\tid 1a2b.1\r\n\tfor <b@example.com>;\r\n\tMon, 01 Jan 2024 00:00:00 +0000\r\n")
        self.assertIn(b"([IPv6:2001:db8::1])", self.trace(peer="2001:db8::1"))
        self.assertTrue(self.trace(sender="").startswith(b"Return-Path: <>\r\n"))

    def test_injection(self):
        hostile = ["x\r\nEvil: 1", "x\nEvil: 1", "x\rEvil: 1", "x\r\n\r\nbody", "a\0b", "(((",
                   "x) by evil with ESMTP; (", "\\", '"', "é\u2028Evil: 1", "\x85Evil: 1",
                   "x" * 5000, "", " ", ";", "<b@c>", "[IPv6:::1]"]
        addresses = ['"a\\" b>"@x.example', "a@[IPv6:fe80::1%\r\nEvil: 1]",
                     "a\r\nEvil: 1@x.example", '"\r\nEvil: 1"@x.example', "a@x\u2028Evil: 1",
                     '"\x85\u2028Evil: 1"@x.example']
        accepted = []
        for text in addresses:
            with contextlib.suppress(ValueError):
                accepted.append(pegmail.parse_address(text).text)
        self.assertIn(addresses[0], accepted)
        cases = [{"helo": text} for text in hostile]
        cases += [{"sender": text, "recipients": (text,)} for text in accepted]
        for values in cases:
            with self.subTest(values=str(values)[:80]):
                trace = self.trace(**values)
                self.assertEqual([name for name, _ in pegmail.parse_fields(trace)],
                                 ["Return-Path", "Received"])
                self.assertTrue(trace.endswith(b"+0000\r\n"))
                for line in trace[:-2].split(b"\r\n"):
                    self.assertRegex(line, rb"\A(Return-Path: |Received: |\t)[^\r\n\0]+\Z")
                    self.assertLessEqual(len(line), 998)        # RFC 5322 2.1.1
                self.assertEqual(pegmail.header_length(trace + b"\r\nx"), len(trace))


def shape(part):
    """Return a part's tree as text: `mixed(text/plain, alternative(...))`."""
    if not part.children:
        return part.mime
    name = part.subtype if part.mime.startswith("multipart/") else part.mime
    return f"{name}({', '.join(map(shape, part.children))})"


def leaves(part):
    """Yield the parts of a tree that hold no others, in order."""
    return [each for each in pegmail.walk_parts(part) if not each.children]


def mixed(*lines, kind="mixed", boundary="b"):
    """Return a multipart message whose body is these lines."""
    return (f'Content-Type: multipart/{kind}; boundary="{boundary}"\r\n\r\n'
            + "\r\n".join(lines)).encode()


class StructureTests(unittest.TestCase):
    """MIME trees (RFC 2045, 2046): where each part begins and ends."""

    table = [
        ("no MIME", b"A: b\r\n\r\nhi\r\n", "text/plain", [b"hi\r\n"]),
        ("nothing", b"", "text/plain", [b""]),
        ("no header", b"hello world\r\nA: b\r\n", "text/plain", [b"hello world\r\nA: b\r\n"]),
        ("no body", b"Content-Type: text/html\r\n", "text/html", [b""]),
        ("a broken type", b"Content-Type: text\r\n\r\nx", "text/plain", [b"x"]),
        ("a hostile type", b"Content-Type: a/b<script>\r\n\r\nx", "text/plain", [b"x"]),
        ("two parts, preamble, epilogue",
         mixed("pre", "--b", "", "one", "--b", "Content-Type: text/html", "", "two", "",
               "--b--", "epi", "--b", "", "no part"),
         "mixed(text/plain, text/html)", [b"one", b"two\r\n"]),
        ("nested",
         mixed("--b", "Content-Type: multipart/alternative; boundary=c", "", "--c", "", "one",
               "--c", "Content-Type: text/html", "", "two", "--c--", "", "--b", "", "three",
               "--b--"),
         "mixed(alternative(text/plain, text/html), text/plain)", [b"one", b"two", b"three"]),
        ("outer boundary a prefix of the inner",
         mixed("--b", "Content-Type: multipart/mixed; boundary=bb", "", "--bb", "", "one", "--bb--",
               "--b", "", "two", "--b--"),
         "mixed(mixed(text/plain), text/plain)", [b"one", b"two"]),
        ("inner boundary a prefix of the outer",
         mixed("--bb", "Content-Type: multipart/mixed; boundary=b", "", "--b", "", "one", "--b--",
               "--bb", "", "two", "--bb--", boundary="bb"),
         "mixed(mixed(text/plain), text/plain)", [b"one", b"two"]),
        ("inner boundary looks like the outer end",
         mixed("--b", 'Content-Type: multipart/mixed; boundary="b--"', "", "--b--", "", "one",
               "--b----", "--b", "", "two", "--b--"),
         "mixed(mixed(text/plain), text/plain)", [b"one", b"two"]),
        ("no end", mixed("--b", "", "one", "--b", "", "two"),
         "mixed(text/plain, text/plain)", [b"one", b"two"]),
        ("no end of the inner one",
         mixed("--b", "Content-Type: multipart/mixed; boundary=c", "", "--c", "", "one", "--b", "",
               "two", "--b--"),
         "mixed(mixed(text/plain), text/plain)", [b"one", b"two"]),
        ("spaces behind a boundary",
         mixed("--b  ", "", "one", "--b\t ", "", "two", "--b-- \t", "x"),
         "mixed(text/plain, text/plain)", [b"one", b"two"]),
        ("lines like a boundary",
         mixed("--b", "", "--bx", "--", "---b", " --b", "--B", "--b x", "x--b", "--b--"),
         "mixed(text/plain)", [b"--bx\r\n--\r\n---b\r\n --b\r\n--B\r\n--b x\r\nx--b"]),
        ("empty parts", mixed("--b", "", "--b", "--b", "", "", "--b--"),
         "mixed(text/plain, text/plain, text/plain)", [b"", b"", b""]),
        ("a header and nothing else",
         mixed("--b", "Content-Type: text/html", "--b", "Content-Type: image/png", "--b--"),
         "mixed(text/html, image/png)", [b"", b""]),
        ("a header and nothing else, and a boundary like a field",
         mixed("--b:c", "Content-Type: text/html", "--b:c", "", "two", "--b:c--", boundary="b:c"),
         "mixed(text/html, text/plain)", [b"", b"two"]),
        ("a boundary of odd characters",
         mixed("--=_a'(),./:=? +b", "", "one", "--=_a'(),./:=? +b--", boundary="=_a'(),./:=? +b"),
         "mixed(text/plain)", [b"one"]),
        ("a multipart without boundary", b"Content-Type: multipart/mixed\r\n\r\n--b\r\n\r\nx\r\n",
         "multipart/mixed", [b"--b\r\n\r\nx\r\n"]),
        ("a multipart without parts", mixed("just text", ""), "multipart/mixed",
         [b"just text\r\n"]),
        ("the boundary at once", mixed("--b--", ""), "multipart/mixed", None),
        ("rfc822", mixed("--b", "Content-Type: message/rfc822", "", "Subject: in", "",
                         "inner", "--b--"),
         "mixed(message/rfc822(text/plain))", [b"inner"]),
        ("rfc822 with its own parts",
         mixed("--b", "Content-Type: message/rfc822", "",
               "Content-Type: multipart/mixed; boundary=c", "", "--c", "", "one", "--c--", "--b",
               "", "two", "--b--"),
         "mixed(message/rfc822(mixed(text/plain)), text/plain)", [b"one", b"two"]),
        ("rfc822 at the top",
         b"Content-Type: message/rfc822\r\n\r\n" + mixed("--b", "", "one", "--b--"),
         "message/rfc822(mixed(text/plain))", [b"one"]),
        ("rfc822 in base64 is a file",
         b"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: base64\r\n\r\nQTogYg==\r\n",
         "message/rfc822", [b"QTogYg==\r\n"]),
        ("digest (RFC 2046 5.1.5)",
         mixed("--b", "", "Subject: one", "", "first", "--b", "Content-Type: text/plain", "",
               "second", "--b--", kind="digest"),
         "digest(message/rfc822(text/plain), text/plain)", [b"first", b"second"]),
    ]

    def test_table(self):
        for name, data, tree, bodies in self.table:
            with self.subTest(name):
                root = pegmail.read_structure(pegmail.Source.of(data))
                self.assertEqual(shape(root), tree)
                if bodies is not None:
                    self.assertEqual([data[part.start:part.end] for part in leaves(root)], bodies)

    def test_parts_are_found_wherever_a_window_ends(self):
        for shift in range(-12, 12):
            with self.subTest(shift=shift):
                filler = "x" * (pegmail.WINDOW + shift)
                data = mixed("--b", "", filler, "--b", "", "two", "--b--")
                root = pegmail.read_structure(pegmail.Source.of(data))
                self.assertTrue([data[part.start:part.end] for part in leaves(root)]
                                == [filler.encode(), b"two"], "the parts are others")

    def test_bounds(self):
        def nested(depth):
            return b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (i, i)
                            for i in range(depth))
        table = [
            ("depth", nested(pegmail.MAX_DEPTH - 1), nested(pegmail.MAX_DEPTH)),
            ("parts", mixed(*["--b", ""] * (pegmail.MAX_PARTS - 1)),
             mixed(*["--b", ""] * pegmail.MAX_PARTS)),
            ("boundary", mixed("", boundary="b" * pegmail.MAX_BOUNDARY),
             mixed("", boundary="b" * (pegmail.MAX_BOUNDARY + 1))),
            ("header", b"A: " + b"b" * (pegmail.MAX_HEADER_BYTES - 5) + b"\r\n\r\n",
             b"A: " + b"b" * (pegmail.MAX_HEADER_BYTES - 4) + b"\r\n\r\n"),
            ("rfc822", b"Content-Type: message/rfc822\r\n\r\n" * (pegmail.MAX_DEPTH - 1),
             b"Content-Type: message/rfc822\r\n\r\n" * pegmail.MAX_DEPTH),
        ]
        for name, good, bad in table:
            with self.subTest(name):
                pegmail.read_structure(pegmail.Source.of(good))
                with self.assertRaises(pegmail.ParseError):
                    pegmail.read_structure(pegmail.Source.of(bad))

    def test_the_bounds_are_those_of_postfix(self):
        self.assertEqual((pegmail.MAX_HEADER_BYTES, pegmail.MAX_DEPTH, pegmail.MAX_BOUNDARY,
                          pegmail.MAX_PARTS), (102400, 100, 2048, 1000))

    def decoded(self, body, encoding):
        data = f"Content-Transfer-Encoding: {encoding}\r\n\r\n".encode() + body
        source = pegmail.Source.of(data)
        return b"".join(pegmail.decoded_windows(source, pegmail.read_structure(source)))

    def test_base64_over_windows(self):
        content = random.Random(3).getrandbits(8 * 700001).to_bytes(700001, "big")
        text = base64.b64encode(content)
        for columns in (76, 61, 75, 1000, len(text)):
            for end in (b"\r\n", b"\n", b" \r\n", b"\r\n*!*\r\n"):
                with self.subTest(columns=columns, end=end):
                    body = end.join(text[i:i + columns] for i in range(0, len(text), columns))
                    self.assertEqual(self.decoded(body, "BASE64"), content)
        self.assertEqual(self.decoded(text.rstrip(b"="), "base64"), content)
        self.assertEqual(self.decoded(b"", "base64"), b"")

    def test_quoted_printable_over_windows(self):
        content = ("Zwölf Boxkämpfer = 12\r\n" * 30 + "\r\n").encode() * 400
        coded = quopri.encodestring(content.replace(b"\r\n", b"\n")).replace(b"\n", b"\r\n")
        self.assertGreater(len(coded), pegmail.WINDOW)
        for shift in range(6):
            with self.subTest(shift=shift):
                self.assertEqual(self.decoded(b"x" * shift + coded, "quoted-printable"),
                                 b"x" * shift + content)
        for shift in range(3):
            with self.subTest("one line longer than a window", shift=shift):
                coded = b"x" * shift + b"=C3=A9" * (pegmail.WINDOW // 2)
                self.assertEqual(self.decoded(coded, "quoted-printable"),
                                 b"x" * shift + b"\xc3\xa9" * (pegmail.WINDOW // 2))

    def test_other_encodings_are_left_alone(self):
        body = b"=41\r\nSGk=\r\n\xff\0" * 50000
        for encoding in ("", "7bit", "8bit", "binary", "x-unknown", "uuencode"):
            self.assertEqual(self.decoded(body, encoding), body)


class HoleTests(unittest.TestCase):
    """Base64 that comes back to the byte."""

    def test_round_trip(self):
        chosen = random.Random(4)
        for line in (4, 60, 72, 76, 1000):
            for size in (1, 2, 3, 44, 45, 57, 58, 100, 749, 750, 4096, 10001):
                with self.subTest(line=line, size=size):
                    content = bytes(chosen.choices(range(256), k=size))
                    data = pegmail.encode_lines(content, line)
                    self.assertEqual(base64.b64decode(data), content)
                    self.assertTrue(all(len(row) <= line for row in data.split(b"\r\n")))
                    self.assertTrue(pegmail.is_regular(data, line, content))
                    for end in ("", "\r\n"):
                        hole = pegmail.Hole(0, "0" * 48, size, line, end)
                        self.assertEqual(hole.length, len(data) + len(end))

    def test_what_is_not_regular(self):
        content = bytes(range(256)) * 3
        data = pegmail.encode_lines(content, 76)
        pairs = data.split(b"\r\n")
        table = {
            "LF": data.replace(b"\r\n", b"\n"), "one LF": data.replace(b"\r\n", b"\n\n", 1),
            "an empty line": data.replace(b"\r\n", b"\r\n\r\n", 1),
            "a space": data.replace(b"\r\n", b" \r\n", 1), "rubbish": b"*" + data,
            "other columns": b"\r\n".join([pairs[0] + pairs[1], *pairs[2:]]),
            "a short line": b"\r\n".join([pairs[0][:72], pairs[0][72:], *pairs[1:]]),
            "more behind the padding": data + b"==", "spaces at the end": data + b"  ",
        }
        for name, changed in table.items():
            with self.subTest(name):
                self.assertNotEqual(changed, data)
                self.assertFalse(pegmail.is_regular(changed, 76, base64.b64decode(changed)))
        self.assertFalse(pegmail.is_regular(b"QR==", 76, b"A"))      # stray bits in the last letter
        self.assertTrue(pegmail.is_regular(b"QQ==", 76, b"A"))

    def test_line_length(self):
        table = [(b"AAAA\r\nAAAA", (4, "")), (b"AAAA\r\nAAAA\r\n", (4, "\r\n")), (b"AAAA", (4, "")),
                 (b"AAAAA\r\nAAA", (0, "")), (b"\r\nAAAA\r\n", (0, "")), (b"", (0, "")),
                 (b"A" * 1004, (0, "")), (b"A" * 1000 + b"\r\nAAAA", (1000, ""))]
        for body, expected in table:
            with self.subTest(body=body[:20]):
                source = pegmail.Source.of(b"\r\n" + body)
                part = pegmail.Part([], 2, 0, "a/b")
                part.end = source.size
                self.assertEqual(pegmail.base64_line(source, part), expected)


# =====================================================================================
# 4. Store: what is kept, and how it is found again
# =====================================================================================

TRACE = b"Return-Path: <a@example.com>\r\nReceived: from x\r\n\tby y; now\r\n"


def keep(store, content, sender="a@example.com", recipients=("b@example.com",), subject=None):
    """Have a store keep a message, by a file if a session would use one; return its id."""
    return keep_all(store, [(content, sender, recipients, subject)])[0]


def keep_all(store, messages):
    """Have a store keep messages (content, sender, recipients, subject); return their ids."""
    jobs, answers = [], []
    for content, sender, recipients, subject in messages:
        answer = Future()
        answers.append(answer)
        head = content[:pegmail.header_length(content[:pegmail.SPOOL_SIZE])]
        subject = pegmail.read_subject(head) if subject is None else subject
        if len(content) > pegmail.SPOOL_SIZE:
            spool = store.spool()
            spool.write(content)
            spool.finish()
            content = spool
        envelope = pegmail.Envelope(sender, tuple(recipients), "127.0.0.1")
        jobs.append(pegmail.Job(pegmail.Incoming(envelope, TRACE, subject, content),
                                functools.partial(settle_future, answer)))
    store.add(jobs)
    return [answer.result(DEADLINE) for answer in answers]


def settle_future(future, result, error):
    """Give a future its result; what a job calls when it is done."""
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def read_raw(store, ident):
    """Return a stored message, trace fields and all."""
    source = store.raw(ident)
    return b"".join(source.windows(0, source.size))


def hole_count(store, ident):
    """Return how many parts of a message stand in the media tree only."""
    return len(json.loads(store.read_one("SELECT holes FROM content WHERE id = ?",
                                         (ident,))[0] or "[]"))


def media_files(folder):
    """Return the paths of all files of a media tree, relative to it."""
    return sorted({os.path.relpath(os.path.join(path, name), folder)
                   for path, _, names in os.walk(folder) for name in names} - {"owner"})


def is_settled(store):
    """Is everything digested and indexed?"""
    totals = store.totals
    return store.digested >= totals.last_id and (
        not store.has_index or totals.indexed >= totals.last_id)


@contextlib.contextmanager
def quiet_log():
    """Collect what is logged, and show nothing of it."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    pegmail.log.addHandler(handler)
    pegmail.log.propagate = False
    try:
        yield heard
    finally:
        pegmail.log.removeHandler(handler)
        pegmail.log.propagate = True


class PatientStore(pegmail.Store):
    """A store whose background work waits until begin(): the tests see every state before it."""

    def __init__(self, *arguments, **options):
        self.go = threading.Event()
        super().__init__(*arguments, **options)

    def run_digester(self):
        self.go.wait()
        super().run_digester()

    def begin(self):
        """Let the background work run; return when there is none left."""
        self.go.set()
        until(lambda: is_settled(self), "digesting and indexing")

    def close(self):
        self.closing.set()
        self.go.set()
        super().close()


class StoreCase(unittest.TestCase):
    """Tests with a real store in a folder of their own."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="pegmail-")
        self.addCleanup(shutil.rmtree, self.folder)
        self.db_path = os.path.join(self.folder, "mail.db")
        self.media = os.path.join(self.folder, "media")
        self.store = None
        self.addCleanup(self.close)
        self.time = 1.7e9

    def close(self):
        if self.store is not None:
            self.store.close()
            self.store = None

    def open(self, kind=PatientStore):
        """Close the store if it is open, and open it (anew)."""
        self.close()
        self.store = kind(self.db_path, self.media, now=lambda: self.time)
        return self.store

    def assertFiles(self, count, what=""):
        """So many files are in the media tree, now or as soon as the writer has tidied up."""
        until(lambda: len(media_files(self.media)) <= count, "tidying up")
        self.store.release([])              # and it is done with that
        self.assertEqual(len(media_files(self.media)), count, what)

    def assertRaw(self, ident, content):
        self.assertTrue(read_raw(self.store, ident) == TRACE + content,
                        f"message {ident} is not what was kept")


class StoreTests(StoreCase):
    """What is kept stays, in order and to the byte."""

    def test_one_message(self):
        store = self.open()
        content = make_message("=?utf-8?Q?h=C3=A9?=")
        ident = keep(store, content, "a@example.com", ("b@example.com", "c@example.com"))
        self.assertEqual(store.find(ident), (1, 1700000000000, "a@example.com",
                                             "b@example.com\nc@example.com", "hé", 0,
                                             len(TRACE) + len(content), 0, 0))
        self.assertRaw(ident, content)
        self.assertEqual(store.peer(ident), "127.0.0.1")
        self.assertIsNone(store.find(2))
        with self.assertRaises(KeyError):
            store.raw(2)
        self.assertIs(store.set_read(2, 1), False)
        self.assertIs(store.delete(2), False)

    def test_moved_away(self):
        """Nothing is kept in a file that nobody will find again; once it is back, all goes on."""
        store = self.open()
        keep(store, b"one")
        os.rename(store.db_path, store.db_path + ".away")
        store.file_seen = 0
        with self.assertRaisesRegex(pegmail.StoreError, "removed or replaced"):
            keep(store, b"two")
        os.rename(store.db_path + ".away", store.db_path)
        store.file_seen = 0
        self.assertEqual(keep(store, b"three"), 2)

    def test_rows_of_another_program(self):
        """A row that another program inserted costs one message a try, not every one."""
        store = self.open()
        keep(store, b"one")
        with contextlib.closing(sqlite3.connect(store.db_path, isolation_level=None)) as db:
            db.execute("INSERT INTO message (id, received, sender, recipients, subject, size) "
                       "VALUES (2, 0, '', '', '', 0)")
        with self.assertRaises(pegmail.StoreError):
            keep(store, b"two")
        self.assertEqual(keep(store, b"two"), 3)

    def test_contents_of_every_kind_come_back(self):
        sizes = [0, 1, pegmail.SPOOL_SIZE, pegmail.SPOOL_SIZE + 1, 3 * pegmail.WINDOW + 1]
        contents = [os.urandom(size) for size in sizes] + [
            b"\r\n", b"\0" * 100, b".\r\n", b"\xff" * 70000, b"A: b\r\n\r\n" + b"x" * 200000]
        store = self.open()
        ids = [keep(store, content) for content in contents]
        for _ in range(2):
            for ident, content in zip(ids, contents):
                with self.subTest(size=len(content)):
                    self.assertRaw(ident, content)
                    source = store.raw(ident)
                    whole = TRACE + content
                    chosen = random.Random(ident)
                    for _ in range(20):
                        first = chosen.randrange(len(whole) + 10)
                        last = chosen.randrange(first, len(whole) + 20)
                        self.assertEqual(source.read(first, last), whole[first:last])
            store.begin()

    def test_ids_are_never_used_again(self):
        store = self.open()
        self.assertEqual([keep(store, b"x") for _ in range(3)], [1, 2, 3])
        store.delete(3)
        self.assertEqual(keep(store, b"x"), 4)
        store.delete(4)
        store = self.open()
        self.assertEqual(keep(store, b"x"), 5)
        for ident in (1, 2, 5):
            store.delete(ident)
        self.assertEqual(store.count(pegmail.Filter()), 0)
        store = self.open()
        self.assertEqual(store.count(pegmail.Filter()), 0)
        self.assertEqual(keep(store, b"x"), 6)
        self.assertEqual([message.id for message in store.page(pegmail.Filter(), 9)], [6])

    def test_time_never_goes_back(self):
        store = self.open()
        keep(store, b"x")
        self.time -= 1000
        keep(store, b"x")
        store = self.open()
        keep(store, b"x")
        self.time += 2000
        keep(store, b"x")
        times = [message.received for message in store.page(pegmail.Filter(), 9)]
        self.assertEqual(times, [1700000000000] * 3 + [1700001000000])

    def test_a_job_that_fails_takes_no_other_along(self):
        store = self.open()
        lost = store.spool()
        lost.write(b"x" * 100)
        lost.finish()
        os.unlink(store.media.path(lost.hash))
        answers = [Future(), Future(), Future()]
        envelope = pegmail.Envelope("a@example.com", ("b@example.com",))
        store.add([pegmail.Job(pegmail.Incoming(envelope, TRACE, "x", content),
                               functools.partial(settle_future, answer))
                   for content, answer in zip((b"one", lost, b"two"), answers)])
        self.assertIsInstance(answers[1].exception(DEADLINE), pegmail.StoreError)
        ids = [answers[0].result(DEADLINE), answers[2].result(DEADLINE)]
        self.assertRaw(ids[0], b"one")
        self.assertRaw(ids[1], b"two")
        self.assertEqual(store.count(pegmail.Filter()), 2)
        store = self.open()
        self.assertEqual(store.count(pegmail.Filter()), 2)

    def test_text_that_no_database_takes(self):
        store = self.open()
        subject = pegmail.read_subject(b"Subject: =?utf-7?Q?+2AA-?=\r\n")
        keep(store, b"Subject: =?utf-7?Q?+2AA-?=\r\n\r\nx\r\n", subject=subject)
        self.assertEqual(store.count(pegmail.Filter()), 1)

    def test_listeners_hear_of_every_change(self):
        store = self.open()
        heard = []
        store.listeners.append(lambda: heard.append(store.version))
        ident = keep(store, b"x")
        store.set_read(ident, 1)
        store.set_read(ident, 1)
        store.delete(ident)
        self.assertEqual(len(heard), 3)
        self.assertEqual(heard, sorted(set(heard)))

    def in_one_transaction(self, *works):
        """Have the writer take jobs in one batch; `works` run on threads and wait for theirs."""
        store, gate = self.store, threading.Event()
        blocker = threading.Thread(target=store.change, args=(lambda db: gate.wait(DEADLINE),))
        blocker.start()
        until(lambda: store.jobs.qsize() == 0 and store.db.in_transaction, "the writer's pause")
        threads = [blocker]
        for number, work in enumerate(works, 1):
            threads.append(threading.Thread(target=work))
            threads[-1].start()
            until(lambda: store.jobs.qsize() >= number, "a job in the queue")    # noqa: B023
        gate.set()
        for thread in threads:
            thread.join(DEADLINE)

    def test_a_message_indexed_and_deleted_at_once_is_counted_no_more(self):
        store = self.open()
        ident = keep(store, make_message("needle"))
        keep(store, make_message("other"))
        self.in_one_transaction(store.index_some, functools.partial(store.delete, ident))
        self.assertIsNone(store.find(ident))
        store.begin()
        self.assertEqual(store.page(pegmail.Filter(subject="needle"), 9), [])
        self.assertEqual(store.count(pegmail.Filter(subject="needle")), 0)

    def during_a_commit(self, jobs, look):
        """Have the writer take jobs, and call look() when they are done but not yet committed."""
        inside, gate, over = threading.Event(), threading.Event(), Future()

        def wait(db):
            inside.set()
            gate.wait(DEADLINE)
        self.store.add([*jobs, pegmail.Job(wait, functools.partial(settle_future, over))])
        inside.wait(DEADLINE)
        try:
            look()
        finally:
            gate.set()
        over.result(DEADLINE)

    def message_job(self):
        """Return the job of keeping a message whose subject is `needle`."""
        envelope = pegmail.Envelope("a@example.com", ("b@example.com",))
        return pegmail.Job(pegmail.Incoming(envelope, TRACE, "needle", make_message()),
                           lambda result, error: None)

    def test_counts_do_not_forget_what_is_being_committed(self):
        store = self.open()
        keep(store, make_message("needle"))
        wanted = [pegmail.Filter(), pegmail.Filter(is_read=0), pegmail.Filter(subject="needle"),
                  pegmail.Filter(sender="a@", is_read=0), pegmail.Filter(subject="ne"),
                  pegmail.Filter(recipients="b@", after=1)]
        seen = []
        self.during_a_commit([self.message_job()], lambda: seen.extend(map(store.count, wanted)))
        self.assertEqual(seen, [1, 1, 1, 1, 1, 0], "what is not committed is not there")
        self.assertEqual([store.count(each) for each in wanted], [2, 2, 2, 2, 2, 1])

    def test_counts_do_not_keep_what_is_being_deleted(self):
        store = self.open()
        for _ in range(3):
            keep(store, make_message("needle"))
        wanted = [pegmail.Filter(), pegmail.Filter(is_read=0), pegmail.Filter(subject="needle"),
                  pegmail.Filter(sender="a@", is_read=0), pegmail.Filter(subject="ne")]
        seen = []

        def look(db):
            asker = threading.Thread(target=lambda: seen.extend(map(store.count, wanted)))
            asker.start()
            asker.join(DEADLINE)
        self.in_one_transaction(functools.partial(store.delete, 2),
                                functools.partial(store.set_read, 3, 1),
                                functools.partial(store.change, look))
        self.assertEqual(seen, [3] * 5, "what is not committed has not happened")
        self.assertEqual([store.count(each) for each in wanted], [2, 1, 2, 1, 2])

    def test_nothing_is_passed_over_by_the_digester(self):
        store = self.open()
        keep(store, make_message("needle"))
        store.begin()

        def wake_the_digester():
            store.wanted.set()
            until(lambda: not store.wanted.is_set(), "the digester's turn")
            store.wanted.set()          # cleared when that turn is over, unless it asks the writer
            until(lambda: store.jobs.qsize() or not store.wanted.is_set(), "the end of its turn")
        self.during_a_commit([self.message_job()], wake_the_digester)
        unread = pegmail.Filter(sender="a@", is_read=0)
        self.assertEqual(len(store.page(unread, 9)), 2)
        store.wanted.set()
        until(lambda: store.find(2).digested, "the digest of a message that came just then")
        self.assertEqual(len(store.page(unread, 9)), 2)
        store = self.open()
        self.assertEqual(store.count(pegmail.Filter(is_read=0)), 2)

    def test_counts_under_load(self):
        store = self.open(pegmail.Store)
        stop, filters = threading.Event(), [
            pegmail.Filter(subject="needle"), pegmail.Filter(is_read=0, sender="a@"),
            pegmail.Filter(subject="ne"), pegmail.Filter(sender="example", after=3)]

        def ask():
            while not stop.is_set():
                for wanted in filters:
                    store.count(wanted)
        asker = threading.Thread(target=ask)
        asker.start()
        try:
            for number in range(60):
                keep_all(store, [(make_message(f"needle {number}"), "a@example.com", ("b@x",), None)
                                 for _ in range(5)])
        finally:
            stop.set()
            asker.join()
        self.assertEqual([store.count(wanted) for wanted in filters], [300, 300, 300, 297])
        until(lambda: is_settled(store), "the digest")
        self.assertEqual([len(store.page(wanted, 999)) for wanted in filters], [300, 300, 300, 297])
        store = self.open()
        self.assertEqual([store.count(wanted) for wanted in filters], [300, 300, 300, 297])
        self.assertEqual(store.count(pegmail.Filter(is_read=0)), 300)


class FilterTests(StoreCase):
    """Lists and counts, compared with a model that looks at every message."""

    words = ["hello", "Hello", "WORLD", "100%", "a_b", "a\\b", "it's", '"quoted"', "naïve", "ÉTÉ",
             "日本語テスト", "привет", "😀😀", "-", "NEAR", "AND", "*", "x:y", "NULL", "  ", "ab",
             "c"]

    def make(self, chosen):
        """Return a random sender, recipients and subject."""
        def address():
            return (chosen.choice(["ann", "Bob", "o'neil", "50%off", "a_b", "zoë", "用户"])
                    + chosen.choice(["", "+tag", ".smith"]) + "@"
                    + chosen.choice(["example.com", "EXAMPLE.org", "xn--bcher-kva.example"]))
        return (address() if chosen.random() < 0.9 else "",
                [address() for _ in range(chosen.choice([1, 1, 2, 5]))],
                " ".join(chosen.choices(self.words, k=chosen.randrange(5))))

    def ask(self, chosen):
        """Return a random filter."""
        def needle(texts):
            text = chosen.choice(texts)
            first = chosen.randrange(len(text) + 1)
            text = text[first:first + chosen.choice([1, 2, 3, 3, 4, 8])]
            return chosen.choice([text, text, text.upper(), text.lower(), text.swapcase()])
        model = list(self.model.values())
        message = chosen.choice(model)
        return pegmail.Filter(
            needle([message[0], "%", "_", "zzz"]) if chosen.random() < 0.3 else "",
            needle(message[1]) if chosen.random() < 0.3 else "",
            needle([message[2], '"', "'", "\\", "%_", "* "]) if chosen.random() < 0.5 else "",
            chosen.choice([None, None, 0, 1]),
            chosen.choice([0, 0, chosen.randrange(max(self.model) + 3)]),
            chosen.choice([0, 0, message[4] + chosen.choice([-1, 0, 1])]))

    def expect(self, wanted):
        """Return the ids that a filter lets through, found the slow way."""
        def has(needle, texts):
            return not needle or any(needle.casefold() in text.casefold() for text in texts)
        return [ident for ident, (sender, recipients, subject, is_read, received)
                in self.model.items()
                if has(wanted.sender, [sender]) and has(wanted.recipients, recipients)
                and has(wanted.subject, [subject])
                and wanted.is_read in (None, is_read)
                and ident > wanted.after and received >= wanted.since]

    def add(self, chosen, count):
        """Keep random messages, and put them into the model."""
        messages = [(b"x\r\n", *self.make(chosen)) for _ in range(count)]
        for start in range(0, count, 7):
            part = messages[start:start + 7]
            for ident, message in zip(keep_all(self.store, part), part):
                self.model[ident] = [*message[1:], 0, int(self.time * 1000)]
            self.time += chosen.choice([0, 0.001, 60])

    def check(self, chosen, questions):
        for wanted in questions:
            expected = self.expect(wanted)
            with self.subTest(wanted=wanted):
                self.assertEqual(self.store.count(wanted), len(expected))
                for _ in range(2):
                    limit, offset = chosen.choice([0, 1, 5, 50, 1000]), chosen.choice(
                        [0, 0, 1, 7, 100, len(expected), 5000])
                    backwards = chosen.random() < 0.5
                    page = self.store.page(wanted, limit, offset, backwards)
                    order = expected[::-1] if backwards else expected
                    self.assertEqual([message.id for message in page],
                                     order[offset:offset + limit], (limit, offset, backwards))
                    for message in page:
                        self.assertEqual(
                            [message.sender, message.recipients.split("\n"), message.subject,
                             message.is_read, message.received], self.model[message.id])

    def change(self, chosen):
        """Delete some messages and turn the read state of others."""
        for ident in chosen.sample(sorted(self.model), 25) + [min(self.model), max(self.model)]:
            if ident in self.model:
                self.assertIs(self.store.delete(ident), True)
                del self.model[ident]
        for ident in chosen.sample(sorted(self.model), 40):
            state = chosen.randrange(2)
            self.assertIs(self.store.set_read(ident, state), True)
            self.model[ident][3] = state

    def test_model(self):
        chosen, self.model = random.Random(5), {}
        self.open()
        self.add(chosen, 250)
        questions = [self.ask(chosen) for _ in range(120)] + [
            pegmail.Filter(), pegmail.Filter(is_read=0), pegmail.Filter(is_read=1),
            pegmail.Filter(after=3), pegmail.Filter(since=1), pegmail.Filter(since=1 << 60)]
        self.check(chosen, questions)                   # nothing is indexed or digested
        self.change(chosen)
        self.check(chosen, questions)
        for _ in range(3):
            self.store.digest_some()
        self.store.index_some()
        self.check(chosen, questions)                   # a part is
        self.add(chosen, 60)
        self.change(chosen)
        self.check(chosen, questions)
        self.store.begin()
        self.check(chosen, questions)                   # all is
        self.change(chosen)
        self.add(chosen, 40)
        self.store.begin()
        self.check(chosen, questions + [self.ask(chosen) for _ in range(60)])
        self.open()
        self.check(chosen, questions)                   # and after a new start
        with mock.patch.multiple(pegmail, SAMPLE=10, RARE=1):
            self.store.sample_trigrams()                # some needles are now asked by rare parts
            rare = {bool(self.store.rare_words(column, pegmail.fold(getattr(wanted, column))))
                    for wanted in questions for column in pegmail.TEXTS
                    if len(pegmail.fold(getattr(wanted, column))) >= 3}
            self.assertEqual(rare, {True, False})
            self.check(chosen, questions)

    def test_case_is_the_same_before_the_index_and_after(self):
        texts = ["Straße 7", "\u212aelvin degrees", "o\ufb03ce hours", "me\u017f\u017fage",
                 "İstanbul", "ΣΊΣΥΦΟΣ", "ÀÉÎ lower", "Ǆ dž"]
        needles = ["strasse", "STRASSE", "straße", "ss", "kelvin", "k", "office", "ffi", "message",
                   "SS", "istanbul", "i̇stan", "σίσυφος", "σίσυφοσ", "àéî", "ÀÉÎ LOW", "ǆ", "s"]
        store = self.open()
        for text in texts:
            keep(store, b"x", subject=text)
        for phase in ("before", "after"):
            for needle in needles:
                with self.subTest(phase=phase, needle=needle):
                    self.assertEqual(
                        [message.subject for message in store.page(
                            pegmail.Filter(subject=needle), 99)],
                        [text for text in texts if needle.casefold() in text.casefold()])
            store.begin()


def encode_columns(content, columns, end=b"\r\n"):
    """Return content in base64 in lines of that many characters."""
    text = base64.b64encode(content)
    return end.join(text[i:i + columns] for i in range(0, len(text), columns))


def with_attachment(body, encoding="base64", before=b"", after=b"\r\n--b--\r\n", text=b"hi"):
    """Return a message of a text and one attachment, given as it stands in the message."""
    return (b"Subject: file\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\n" + text
            + b"\r\n--b\r\nContent-Type: application/x-test; name=f.bin\r\n"
            b"Content-Transfer-Encoding: " + encoding.encode() + b"\r\n\r\n"
            + before + body + after)


def layouts():
    """Yield (name, message, holes): attachments and texts in every layout, regular and not."""
    chosen = random.Random(6)
    small = bytes(chosen.choices(range(256), k=5003))
    large = bytes(chosen.choices(range(256), k=400001))
    for columns in (76, 60, 72, 64, 4, 1000):
        for content in (small, large, small[:-1], small[:-2]):
            yield (f"{columns} columns, {len(content)} bytes",
                   with_attachment(encode_columns(content, columns)), 1)
    body = encode_columns(small, 76)
    border = (262144 // 78) * 57                # bytes in the lines that one window holds
    for name, message, holes in [
            ("75 columns", with_attachment(encode_columns(small, 75)), 0),
            ("an empty line behind", with_attachment(body + b"\r\n"), 1),
            ("two empty lines behind", with_attachment(body + b"\r\n\r\n"), 0),
            ("an empty line before", with_attachment(body, before=b"\r\n"), 0),
            ("no end boundary", with_attachment(body, after=b""), 1),
            ("no end boundary, but CRLF", with_attachment(body, after=b"\r\n"), 1),
            ("LF in the body", with_attachment(encode_columns(small, 76, b"\n")), 0),
            ("one LF", with_attachment(body[:780].replace(b"\r\n", b"\n", 1) + body[780:]), 0),
            ("LF everywhere", with_attachment(body).replace(b"\r\n", b"\n"), 0),
            ("CR CR LF", with_attachment(encode_columns(small, 76, b"\r\r\n")), 0),
            ("spaces behind each line", with_attachment(encode_columns(small, 76, b" \r\n")), 0),
            ("a space behind the last", with_attachment(body + b" "), 0),
            ("one long line", with_attachment(encode_columns(large, 10 ** 9)), 0),
            ("no padding", with_attachment(encode_columns(small[:-1], 76).rstrip(b"=")), 0),
            ("stray bits", with_attachment(encode_columns(small[:4999], 76)[:-3] + b"z=="), 0),
            ("rubbish in between", with_attachment(body[:400] + b"*" + body[400:]), 0),
            ("a short line in between",
             with_attachment(encode_columns(large[:57000 - 3], 76) + b"\r\n" + body), 0),
            ("padding in between", with_attachment(encode_columns(small[:-1], 76) + b"\r\n" + body),
             0),
            ("padding at a window's end, 1",
             with_attachment(encode_columns(large[:border - 1], 76) + b"\r\n" + body), 0),
            ("padding at a window's end, 2",
             with_attachment(encode_columns(large[:border - 2], 76) + b"\r\n"
                             + encode_columns(small[:5001], 76)), 0),
            ("just a window", with_attachment(encode_columns(large[:border], 76)), 1),
            ("just a window, and one byte",
             with_attachment(encode_columns(large[:border + 1], 76)), 1),
            ("a line extra in a window",
             with_attachment(b"\r\n".join([encode_columns(large[:57 * 10], 76)] + [
                 encode_columns(large[:57], 36), encode_columns(large[:57 * 5000], 76)])), 0),
            ("uuencode", with_attachment(b"begin 644 f.bin\r\n" + b"\r\n".join(
                binascii.b2a_uu(small[i:i + 45]).rstrip() for i in range(0, len(small), 45))
                + b"\r\n`\r\nend", "x-uuencode"), 0),
            ("quoted-printable",
             with_attachment(quopri.encodestring(small), "quoted-printable"), 0),
            ("8bit", with_attachment(large, "8bit"), 1),
            ("binary", with_attachment(small, "binary"), 1),
            ("7bit", with_attachment(b"x\r\n" * 5000, "7bit"), 1),
            ("smaller than a hole", with_attachment(encode_columns(small[:2000], 76)), 0),
            ("a text of 100 KB beside it", with_attachment(body, text=b"long line\r\n" * 10000), 1),
            ("a text of 3 MB beside it", with_attachment(body, text=b"long line\r\n" * 300000), 2),
            ("only a text of 100 KB", b"A: b\r\n\r\n" + b"line\r\n" * 20000, 0),
            ("only a text of 3 MB", b"A: b\r\n\r\n" + b"line\r\n" * 500000, 1),
            ("only base64", b"Content-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\n"
             + encode_columns(large, 76) + b"\r\n", 1),
            ("within a message",
             b"Content-Type: message/rfc822\r\n\r\n" + with_attachment(body), 1),
            ("in base64 within base64",
             with_attachment(encode_columns(with_attachment(body), 76)), 1),
            ("two, one of them twice",
             mixed(*["--b", "Content-Type: a/b", "Content-Transfer-Encoding: base64", "",
                     body.decode()] * 2, "--b", "Content-Type: a/b", "", "x" * 9000, "--b--"), 3),
            ("broken base64", with_attachment(b"=*&!" * 5000), 0),
            ("NULs", with_attachment(b"\0" * 10000), 0)]:
        yield name, message, holes


class HoleStoreTests(StoreCase):
    """A digest takes large parts out of a message; every byte comes back all the same."""

    def test_every_layout(self):
        store = self.open()
        kept = [(name, message, holes, keep(store, message)) for name, message, holes in layouts()]
        for name, message, _, ident in kept:
            with self.subTest("before", name=name):
                self.assertRaw(ident, message)
        store.begin()
        self.compare(kept)
        self.open()
        self.compare(kept)
        self.assertEqual(self.store.count(pegmail.Filter()), len(kept))

    def compare(self, kept):
        """Compare every message whole, and by ranges."""
        chosen = random.Random(7)
        for name, message, holes, ident in kept:
            with self.subTest("after", name=name):
                self.assertEqual(self.store.digest([ident])[ident][2], "")
                self.assertEqual(hole_count(self.store, ident), holes)
                self.assertRaw(ident, message)
                whole, source = TRACE + message, self.store.raw(ident)
                self.assertEqual(source.size, len(whole))
                for _ in range(60):
                    first = chosen.randrange(len(whole))
                    last = first + chosen.choice([0, 1, 2, 3, 77, 78, 79, 5000, 300000])
                    self.assertTrue(source.read(first, last) == whole[first:last], (first, last))

    def test_attachments_are_decoded(self):
        content = os.urandom(100000)
        wide = with_attachment(encode_columns(content, 76))
        odd = with_attachment(encode_columns(content, 75))
        store = self.open(pegmail.Store)
        name = hashlib.sha256(content).hexdigest()[:48]
        for message in (wide, odd):
            ident = keep(store, message)
            body = json.loads(store.digest([ident])[ident][1])
            self.assertEqual(body, {"type": "mixed", "items": [
                {"type": "text", "mime": "text/plain", "text": "hi", "size": 2},
                {"type": "attachment", "hash": name, "filename": "f.bin",
                 "mime": "application/x-test", "size": 100000}]})
            self.assertEqual(store.find(ident).attachments, 1)
        self.assertEqual(store.media.read(name, 0, 10 ** 9), content)
        self.assertEqual(store.attachment(name), ("f.bin", "application/x-test", 100000))

    def test_a_hundred_mails_with_one_attachment_cost_one(self):
        content = random.Random(8).getrandbits(8 << 18).to_bytes(1 << 18, "big")
        body, hashes = encode_columns(content, 76), []
        store = self.open(pegmail.Store)
        for number in range(100):
            message = with_attachment(body, text=b"This is mail %d." % number)
            hashes.append(hashlib.sha256(TRACE + message).digest())
            keep(store, message)
        until(lambda: is_settled(store), "the digest")
        store = self.open(pegmail.Store)
        size = sum(os.path.getsize(os.path.join(path, name))
                   for path, _, names in os.walk(self.folder) for name in names)
        self.assertLess(size, len(content) + 100 * 10000)
        self.assertFiles(1)
        for ident, expected in enumerate(hashes, 1):
            source, total = store.raw(ident), hashlib.sha256()
            for window in source.windows(0, source.size):
                total.update(window)
            self.assertEqual(total.digest(), expected)
        for ident in range(1, 100):
            store.delete(ident)
        self.assertFiles(1)
        self.assertTrue(read_raw(store, 100).endswith(body + b"\r\n--b--\r\n"))
        store.delete(100)
        self.assertFiles(0)

    def test_files_go_with_their_last_user(self):
        whole = b"A: b\r\n\r\n" + b"=?" * 40000            # one text: kept as a file, no hole
        cut = with_attachment(encode_columns(bytes(90000), 76), text=b"x" * 90000)
        both = [whole, whole, cut, cut]
        store = self.open()
        ids = [keep(store, message) for message in both]
        self.assertFiles(2)
        store.begin()
        self.assertFiles(3, "a text, what is left, an attachment")
        for count, ident in enumerate(ids, 1):
            store.delete(ident)
            for left, message in list(zip(ids, both))[count:]:
                self.assertRaw(left, message)
        self.assertFiles(0)

    def test_deleted_before_its_digest(self):
        store = self.open()
        message = with_attachment(encode_columns(bytes(90000), 76))
        ids = [keep(store, message) for _ in range(2)]
        source = store.raw(ids[0])
        store.delete(ids[0])
        self.assertRaw(ids[1], message)
        store.begin()
        self.assertRaw(ids[1], message)
        store.delete(ids[1])
        self.assertFiles(0)
        with self.assertRaises(KeyError):
            source.read(0, 100000)

    def test_a_reader_does_not_notice_the_digest(self):
        store = self.open()
        message = with_attachment(encode_columns(os.urandom(90000), 76))
        ident = keep(store, message)
        source = store.raw(ident)
        first = source.read(0, 50000)
        store.begin()
        self.assertEqual(hole_count(store, ident), 1)
        self.assertEqual(first + source.read(50000, source.size), TRACE + message)

    def test_a_lost_file_harms_its_own_message_only(self):
        store = self.open()
        lost = keep(store, b"A: b\r\n\r\n" + b"x" * 100000)
        (name,) = media_files(self.media)
        os.unlink(os.path.join(self.media, name))
        message = with_attachment(encode_columns(bytes(90000), 76))
        other = keep(store, message)
        with quiet_log():
            store.go.set()
            until(lambda: store.find(other).digested, "the digest of the other message")
        self.assertEqual(hole_count(store, other), 1)
        self.assertRaw(other, message)
        until(lambda: is_settled(store), "the index")
        self.assertIs(store.delete(lost), True)
        self.assertEqual(store.count(pegmail.Filter()), 1)


class SweepTests(StoreCase):
    """What a crash left behind goes at the next start, and nothing else."""

    def test_sweep(self):
        store = self.open()
        messages = [b"A: b\r\n\r\n" + b"x" * 100000,
                    with_attachment(encode_columns(os.urandom(90000), 76), text=b"x" * 90000),
                    with_attachment(encode_columns(os.urandom(90000), 75))]
        ids = [keep(store, message) for message in messages]
        store.begin()
        undigested = b"A: c\r\n\r\n" + b"y" * 100000
        known = media_files(self.media)
        self.close()
        self.store = self.open()
        ids.append(keep(self.store, undigested))
        known = sorted(set(known) | set(media_files(self.media)))
        self.close()
        orphans = ["ab/cd/ef/" + "0" * 42, "ab/cd/ef/" + "1" * 42, "raw/" + "2" * 48,
                   "00/00/00/" + "0" * 42]
        foreign = ["README", "ab/cd/notes.txt", "ab/" + "c" * 38, "lost+found/x", "raw/README"]
        for name in orphans + foreign + ["tmp/" + "3" * 24, "tmp/x"]:
            path = os.path.join(self.media, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(b"x")
        old = self.time - 3600
        for name in media_files(self.media):
            os.utime(os.path.join(self.media, name), (old, old))
        self.open()
        self.assertEqual(os.listdir(os.path.join(self.media, "tmp")), [])
        self.store.go.set()
        until(lambda: not set(orphans) & set(media_files(self.media)), "the sweep")
        self.store.begin()
        self.assertEqual(set(media_files(self.media)) - set(known), set(foreign))
        for ident, message in zip(ids, messages + [undigested]):
            self.assertRaw(ident, message)


class OpenTests(StoreCase):
    """A database that cannot be used is refused in one line, and left as it is."""

    def refused(self, pattern, db_path=None, media=None):
        with self.assertRaises(pegmail.SettingsError) as caught:
            pegmail.Store(db_path or self.db_path, media or self.media).close()
        text = str(caught.exception)
        self.assertRegex(text, pattern)
        self.assertNotIn("\n", text)

    def test_a_newer_database(self):
        self.open().close()
        self.store = None
        with contextlib.closing(sqlite3.connect(self.db_path)) as db:
            db.execute(f"PRAGMA user_version = {pegmail.SCHEMA + 1}")
        with open(self.db_path, "rb") as file:
            before = file.read()
        self.refused(rf"--db_path .*newer pegmail.*{pegmail.SCHEMA + 1}")
        with open(self.db_path, "rb") as file:
            self.assertEqual(file.read(), before)

    def test_no_database(self):
        with open(self.db_path, "wb") as file:
            file.write(b"This is no database. " * 500)
        self.refused("--db_path .*not a database")
        with open(self.db_path, "rb") as file:
            self.assertEqual(file.read(), b"This is no database. " * 500)

    def test_a_broken_database(self):
        store = self.open()
        keep_all(store, [(b"x" * 500, "a@b", ("c@d",), "x")] * 200)
        store.begin()
        self.close()
        size = os.path.getsize(self.db_path)
        with open(self.db_path, "r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * (size - 4096))
        self.refused("--db_path")
        self.refused("--db_path")               # and the lock was let go

    def test_a_foreign_database(self):
        with contextlib.closing(sqlite3.connect(self.db_path)) as db:
            db.execute("CREATE TABLE message (mine TEXT)")
        self.refused("--db_path")
        with contextlib.closing(sqlite3.connect(self.db_path)) as db:
            names = [name for (name,) in db.execute("SELECT name FROM sqlite_master")]
        self.assertEqual(names, ["message"])

    def test_read_only(self):
        self.open().close()
        self.store = None
        os.chmod(self.folder, 0o755)
        for path in (self.db_path, self.db_path + ".lock"):
            os.chmod(path, 0o444)
        code = ("import os, sys, pegmail\n"
                "if os.geteuid() == 0: os.setgid(65534), os.setuid(65534)\n"
                "try: pegmail.Store(sys.argv[1], sys.argv[2])\n"
                "except pegmail.SettingsError as error: print(error)\n")
        done = subprocess.run([sys.executable, "-c", code, self.db_path, self.media],
                              cwd=compiled(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=DEADLINE)
        self.assertRegex(done.stdout.decode(), r"\A--db_path [^\n]*ermission denied[^\n]*\n\Z")


# For each line "path folder" of its input: keeps the message in that file, digests it, and says
# what that took. Each has a process of its own, by fork: what the import takes is spent once.
BOMB_CHILD = r"""
import json, os, resource, sys, threading
import pegmail

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def explode(path, folder):
    store = pegmail.Store(folder + "/mail.db", folder + "/media")
    memory, time = status("VmRSS"), seconds()
    spool, answer, kept = store.spool(), [], threading.Event()
    with open(path, "rb") as file:
        for data in iter(lambda: file.read(65536), b""):
            spool.write(data)
    spool.finish()
    def done(result, error):
        answer.extend((result, error))
        kept.set()
    envelope = pegmail.Envelope("a@example.com", ("b@example.com",))
    store.add([pegmail.Job(pegmail.Incoming(envelope, b"A: b\r\n", "", spool), done)])
    kept.wait()
    if answer[1] is not None:
        raise answer[1]
    fields, body, error = store.digest([answer[0]])[answer[0]]
    json.loads(fields), json.loads(body)
    found = {"error": error, "seconds": seconds() - time,
             "megabytes": (status("VmHWM") - memory) / 1024}
    store.close()
    print(json.dumps(found), flush=True)

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
for line in iter(sys.stdin.readline, ""):
    child = os.fork()
    if child == 0:
        explode(*line.split())
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit("it failed")
"""


def bombs():
    """Yield (name, pieces of the message, pattern of its parse_error)."""
    top = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"

    def nested(depth):
        return b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (i, i)
                        for i in range(depth))
    dashes = [b"--\r\n" * 10000] * 100
    text = b"Content-Type: text/html\r\n\r\n"
    binary = b"Content-Type: a/b\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    yield ("a Subject of encoded words",
           [b"Subject: ", b"=?utf-8?B?w6k=?= " * 12800, b"\r\n\r\nx\r\n"], "header")
    yield ("a Subject of encoded words within the bound",
           [b"Subject: ", b"=?utf-8?B?w6k=?= " * 6000, b"\r\n\r\nx\r\n"], "")
    yield "a Subject of =?", [b"Subject: " + b"=?" * 50000 + b"\r\n\r\nx\r\n"], ""
    yield "semicolons", [b"Content-Type: text/plain" + b";" * 65536 + b"\r\n\r\nx\r\n"], ""
    yield "parameters", [b"Content-Type: text/plain" + b";a*0*=" * 14000 + b"\r\n\r\nx\r\n"], ""
    yield "an open quote", [b'Content-Type: text/plain; x="' + b"\\" * 90000 + b"\r\n\r\nx"], ""
    yield "brackets", [b"".join(name + b": " + b"(" * 2048 + b"\r\n" for name in (
        b"From", b"To", b"Content-Type", b"Content-Disposition", b"Date")) + b"\r\nx\r\n"], ""
    yield "depth 2000", [nested(2000), b"x\r\n"], "deep"
    yield "100,000 parts", [top] + [b"--b\r\n\r\nx\r\n" * 1000] * 100, "parts"
    yield "a million lines of --", [top] + dashes, "lines"
    yield "20 MB of -- lines", [top] + [b"--\r\n" * 10000] * 500, "lines"
    yield "lines of -- at depth 98", [nested(98)] + dashes, "lines"
    yield "lines of -- under the bound", [nested(98)] + [b"--x\r\n" * 9900] * 10, ""
    yield "lines that begin with every boundary", [
        nested(98)] + [b"--b1\xff\r\n" * 9900] * 10, ""
    yield "a header line of 1 MB", [b"A: " + b"b" * 1000000 + b"\r\n\r\nx\r\n"], "header"
    yield "100,000 fields", [b"A: b\r\n" * 100000 + b"\r\nx\r\n"], "header"
    yield "3,000 fields", [b"A: b\r\n" * 3000 + b"\r\nx\r\n"], "fields"
    yield "deep rfc822", [b"Content-Type: message/rfc822\r\n\r\n" * 5000 + b"x\r\n"], "deep"
    yield "300 large headers", [top] + [
        b"--b\r\nA: " + b"b" * 50000 + b"\r\n\r\nx\r\n"] * 300, None
    yield "embedded messages with large headers", [
        b"Content-Type: multipart/digest; boundary=b\r\n\r\n"] + [
        b"--b\r\n\r\nA: " + b"b" * 90000 + b"\r\n\r\nx\r\n"] * 150, None
    fields = b"".join(b"X%d: \xff\r\n" % number for number in range(1900))
    yield "embedded messages with many fields", [
        b"Content-Type: multipart/digest; boundary=b\r\n\r\n"] + [
        b"--b\r\n\r\n" + fields + b"\r\nx\r\n"] * 200, None
    yield "HTML of <", [text] + [b"<" * 100000] * 10 + [b"\r\n"], ""
    yield "HTML of <>", [text] + [b"<>" * 100000] * 9 + [b"\r\n"], ""
    yield "texts without end", [top] + [
        b"--b\r\n" + text + b"<a href=" * 6000 + b"\r\n"] * 300, None
    yield "500 small attachments", [top] + [
        b"--b\r\nContent-Type: a/b\r\n\r\n%d\r\n" % number for number in range(500)], ""
    yield "base64 garbage", [binary] + [b"=*&" * 100000 + b"\r\n"] * 50, ""
    yield "base64 in one line", [binary] + [b"QUJD" * 100000] * 50, ""
    yield "quoted-printable of =", [
        b"Content-Type: a/b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"] + [
        b"=" * 1000000] * 20, ""
    yield "a large 8bit text", [b"A: b\r\n\r\n"] + ["é€\r\n".encode() * 20000] * 100, ""


class BombTests(unittest.TestCase):
    """No message costs more than about a second and 100 MB, whatever is in it."""

    MAX_SECONDS = 5             # of processor time; five times what is meant, for slow machines
    MAX_MEGABYTES = 250

    def test_bombs(self):
        with tempfile.TemporaryFile() as errors, subprocess.Popen(
                [sys.executable, "-W", "error", "-c", BOMB_CHILD], cwd=compiled(), stderr=errors,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            for name, pieces, error in bombs():
                with self.subTest(name), tempfile.TemporaryDirectory(prefix="pegmail-") as folder:
                    self.explode(child, folder, pieces, error)
            child.stdin.close()
            self.assertEqual(child.wait(DEADLINE), 0)
            errors.seek(0)
            self.assertEqual(errors.read(), b"")

    def explode(self, child, folder, pieces, error):
        path, total = os.path.join(folder, "bomb"), hashlib.sha256(b"A: b\r\n")
        with open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)
                total.update(piece)
        child.stdin.write(f"{path} {folder}\n".encode())
        child.stdin.flush()
        found = json.loads(child.stdout.readline() or b"{}")
        self.assertTrue(found, "the process has died")
        with contextlib.closing(PatientStore(folder + "/mail.db", folder + "/media")) as store:
            source, again = store.raw(1), hashlib.sha256()
            for window in source.windows(0, source.size):
                again.update(window)
        self.assertEqual(again.digest(), total.digest(), "the raw message has changed")
        self.assertNotIn("cannot be read", found["error"])
        if error:
            self.assertIn(error, found["error"])
        elif error == "":
            self.assertEqual(found["error"], "")
        self.assertLess(found["seconds"], self.MAX_SECONDS)
        self.assertLess(found["megabytes"], self.MAX_MEGABYTES)

    def test_functions(self):
        """Pure functions take time in proportion to their input, and no deep recursion."""
        code = r"""
import resource, sys, pegmail as p
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
SIZE = 1 << 18
for name, function, text in [
    ("words", p.decode_words, "=?utf-8?B?w6k=?= " * (SIZE // 17)),
    ("words, open", p.decode_words, "=?utf-8?B?" * (SIZE // 10)),
    ("words, apart", p.decode_words, "=?a?q?x?=  " * (SIZE // 11)),
    ("parameters, spaces", p.parse_parameters, "a/b" + (";" + "x" * 80 + " " * 3999) * 64),
    ("parameters, quotes", p.parse_parameters, 'a/b;x="' + '\\"' * (SIZE // 2)),
    ("html, <", p.html_text, "<" * SIZE), ("html, <>", p.html_text, "<>" * SIZE),
    ("html, a", p.html_text, "<a href" + " href" * SIZE + ">"),
    ("html, spaces", p.html_text, ("<a " + " " * 4000) * 64),
    ("html, scripts", p.html_text, "<script>" * (SIZE // 8)),
    ("codes, digits", p.find_codes, "code " + "1" * SIZE),
    ("codes", p.find_codes, "code 1234\n" * 25000),
    ("codes, capitals", p.find_codes, ("code " + "A" * 1900 + "\n") * 500),
    ("codes, dashes", p.find_codes, ("code " + "ABC-" * 480 + "\n") * 500),
    ("codes, words", p.find_codes, "verif" * (SIZE // 5)),
    ("links", p.find_links, "https://" * (SIZE // 8)), ("links, h", p.find_links, "h" * SIZE),
    ("links, )", p.find_links, "https://x" + ")" * SIZE),
    ("name", p.safe_filename, "." * SIZE), ("name, é", p.safe_filename, "é" * SIZE),
    ("address", lambda text: [p.parse_address(text + chr(97 + n % 26)) for n in range(250)],
     '"' + "\\a" * 490 + '"@'),
    ("domain", lambda text: [p.normalize_domain(text) for _ in range(250)], "é" * 250),
    ("header", lambda text: p.header_length(text.encode()), "x" * 100 + " " * SIZE),
    ("header, colons", lambda text: p.parse_fields(text.encode()), ":" * SIZE),
    ("header, spaces", lambda text: p.parse_fields(text.encode()), ("x" + " " * 4000) * 64),
    ("subject", lambda text: p.read_subject(text.encode()), "subject" + "\t" * SIZE),
    ("folds", lambda text: p.parse_fields(text.encode()), "A: b" + "\r\n c" * (SIZE // 4)),
]:
    begun = seconds()
    try:
        function(text)
    except (ValueError, p.ParseError):
        pass
    if seconds() - begun > 2:       # one that is quadratic takes far longer
        print(name, round(seconds() - begun, 1))
"""
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, cwd=compiled(), timeout=300)
        self.assertEqual((done.returncode, done.stdout.decode()), (0, ""))


class FuzzTests(StoreCase):
    """Whatever arrives is kept to the byte and read without a bug."""

    def test_random_messages(self):
        chosen, store = random.Random(9), self.open()
        seeds = [message for name, message, _ in layouts() if len(message) < 9000]
        seeds += [data for _, data, _, _ in StructureTests.table]
        pieces = [b"\r\n", b"\n", b"\r", b"\0", b"--b", b"--", b"\xff", b";", b'"', b"=", b"=?",
                  b"?=", b":", b" ", b"(", b"\\", b"'", b"*", b"Content-Type: ", b"multipart/mixed",
                  b"message/rfc822", b"boundary=", b"base64", b"quoted-printable", b"charset=utf-7",
                  b"=?utf-7?Q?+2AA-?=", b"filename*0*=", "²".encode(), b"\xed\xa0\x80",
                  b"Content-Transfer-Encoding: ", b"From x\r\n", b"%", b"\xe2\x80\xa8"]
        messages = []
        for number in range(400):
            data = bytearray(chosen.choice(seeds) if number % 10 else
                             bytes(chosen.choices(range(256), k=chosen.randrange(3000))))
            for _ in range(chosen.randrange(1, 12)):
                place = chosen.randrange(len(data) + 1)
                if chosen.random() < 0.7:
                    data[place:place + chosen.choice([0, 0, 1, 5])] = chosen.choice(pieces)
                else:
                    other = chosen.choice(seeds)
                    first = chosen.randrange(len(other) + 1)
                    data[place:place] = other[first:first + chosen.randrange(200)]
            messages.append(bytes(data))
        ids = keep_all(store, [(data, "a@example.com", ("b@example.com",), None)
                               for data in messages])
        with quiet_log() as heard:
            digests = {}
            for start in range(0, len(ids), 50):
                digests.update(store.digest(ids[start:start + 50]))
        for ident, data in zip(ids, messages):
            with self.subTest(data=data[:300]):
                fields, body, error = digests[ident]
                self.assertNotIn("cannot be read", error)
                for name, value in json.loads(fields):
                    self.assertIsInstance(name + value, str)
                self.assertEqual(json.loads(body) is None, bool(error))
                self.assertRaw(ident, data)
        self.assertEqual(heard, [])

    def test_decoding_agrees_with_the_library(self):
        """What Python's own parser finds in sane messages is found here too."""
        for name, message, _ in layouts():
            if re.search("LF|twice|rubbish|uu|3 MB", name):      # 3 MB take it a second
                continue
            with self.subTest(name):
                known = email.message_from_bytes(message, policy=email.policy.compat32)
                root = pegmail.read_structure(pegmail.Source.of(message))
                theirs = [part.get_content_type() for part in known.walk()]
                ours = [part.mime for part in pegmail.walk_parts(root)]
                self.assertEqual(ours, theirs)


# Kept in a process of its own, to be killed at any moment: digests all that waits, again and again.
DIGEST_CHILD = """
import sys, pegmail
store = pegmail.Store(sys.argv[1], sys.argv[2])
print("open", flush=True)
sys.stdin.read()
"""

# Deletes the last two users of a file; the process dies before that is committed.
DELETE_CHILD = """
import os, sys, threading, time, pegmail
store = pegmail.Store(sys.argv[1], sys.argv[2])
gate, files = threading.Event(), sys.argv[3:]
def later(work, count):
    threading.Thread(target=work, daemon=True).start()
    while store.jobs.qsize() < count:
        time.sleep(0.005)
later(lambda: store.change(lambda db: gate.wait(20)), 0)
while not store.db.in_transaction:
    time.sleep(0.005)
later(lambda: store.delete(1), 1)
later(lambda: store.release(files), 2)
later(lambda: store.change(lambda db: os.kill(os.getpid(), 9)), 3)
gate.set()
threading.Event().wait(20)
"""


class CrashTests(StoreCase):
    """A process may die at any moment of a digest or a deletion."""

    def test_killed_while_digesting(self):
        chosen = random.Random(10)
        shared = encode_columns(os.urandom(70000), 76)
        messages = []
        for number in range(60):
            body = shared if number % 3 else encode_columns(os.urandom(70000), 76)
            text = b"%d" % number if number % 5 else b"long %d" % number * 20000
            messages.append(with_attachment(body, text=text))
        messages += messages[:10]
        ids = keep_all(self.open(), [(data, "a@b", ("c@d",), None) for data in messages])
        self.close()
        for number in range(8):
            child = subprocess.Popen([sys.executable, "-c", DIGEST_CHILD, self.db_path, self.media],
                                     cwd=compiled(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            with child:
                self.assertEqual(child.stdout.readline(), b"open\n")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(chosen.uniform(0, 0.15))
                child.kill()
            store = self.open()
            for ident, data in zip(ids, messages):
                with self.subTest(round=number, ident=ident):
                    self.assertRaw(ident, data)
            self.assertEqual(store.count(pegmail.Filter()), len(ids))
            self.close()
        store = self.open()
        store.begin()
        self.assertEqual([message.digested for message in store.page(pegmail.Filter(), 99)],
                         [1] * len(ids))
        for ident, data in zip(ids, messages):
            self.assertRaw(ident, data)
            self.assertGreater(hole_count(store, ident), 0)
        for ident in ids:
            store.delete(ident)
        self.close()
        for name in media_files(self.media):        # what dead processes left
            os.utime(os.path.join(self.media, name), (1, 1))
        self.open().go.set()
        until(lambda: media_files(self.media) == [], "the sweep")

    def test_killed_before_a_deletion_is_committed(self):
        message = with_attachment(encode_columns(os.urandom(90000), 76))
        store = self.open()
        ident = keep(store, message)
        store.begin()
        self.close()
        files = [name.replace(os.sep, "") for name in media_files(self.media)]
        done = subprocess.run(
            [sys.executable, "-c", DELETE_CHILD, self.db_path, self.media, *files], cwd=compiled(),
            timeout=DEADLINE * 2)
        self.assertEqual(done.returncode, -signal.SIGKILL)
        store = self.open()
        if store.find(ident) is not None:       # the deletion was not committed
            self.assertRaw(ident, message)


class WALTests(unittest.TestCase):
    """The write-ahead log while others read."""

    def test_slow_and_foreign_readers(self):
        with Running() as server:
            path = os.path.join(server.folder, "mail.db")
            large = make_message("large", ("x" * 70 + "\r\n") * 860)       # about 60 KB, in a row
            wire = server.connect()
            self.addCleanup(wire.socket.close)
            wire.ask("EHLO client.example")

            def deliver(count):
                wire.send(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT %d LAST\r\n%b"
                          % (len(large), large) * count)
                self.assertEqual([wire.reply()[:10] for _ in range(3 * count)],
                                 ["250 2.1.0 ", "250 2.1.5 ", "250 2.0.0 "] * count)

            def size():
                return os.path.getsize(path + "-wal")
            deliver(100)
            with self.subTest("a client that takes a list slowly"):
                with socket.create_connection(("127.0.0.1", server.api_port), DEADLINE) as slow:
                    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    slow.sendall(b"GET /list?format=mbox&count=1000 HTTP/1.1\r\n"
                                 b"Host: localhost\r\n\r\n")
                    self.assertTrue(slow.recv(100).startswith(b"HTTP/1.1 200 "))
                    largest = 0
                    for _ in range(8):
                        deliver(100)
                        largest = max(largest, size())
                        self.assertTrue(slow.recv(1000))
                    self.assertLess(largest, 24 << 20)       # of the 48 MB that were written
            with self.subTest("another program that holds a snapshot"):
                self.assertNotIn("snapshot", server.text())
                foreign = sqlite3.connect(path, isolation_level=None)
                with contextlib.closing(foreign):
                    foreign.execute("BEGIN")
                    foreign.execute("SELECT count(*) FROM message").fetchone()
                    for _ in range(40):
                        deliver(100)
                        if "snapshot" in server.text():
                            break
                    self.assertRegex(server.text(), r"another program holds a snapshot of "
                                                    r"mail\.db; end its transaction")
                    foreign.execute("COMMIT")
                for _ in range(20):
                    deliver(10)
                    if size() <= 33 << 20:
                        break
                self.assertLessEqual(size(), 33 << 20)


# Makes writes (w) or syncs (s) below FAULT_FOLDER fail while the file FAULT_FLAG says so: "28 w".
FAULT_LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(int fd, char kind) {
    char link[64], path[4096], text[32] = "";
    const char *folder = getenv("FAULT_FOLDER"), *flag = getenv("FAULT_FLAG");
    int saved = errno;
    if (!folder || !flag) return 0;
    int handle = open(flag, O_RDONLY | O_CLOEXEC);
    if (handle < 0) { errno = saved; return 0; }
    ssize_t size = syscall(SYS_read, handle, text, sizeof text - 1);
    close(handle);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (size <= 0 || length <= 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder)) || !strchr(text, kind)) return 0;
    errno = atoi(text);
    return 1;
}
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t write(int fd, const void *data, size_t n) {
    return fails(fd, 'w') ? -1 : NEXT(write)(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t place) {
    return fails(fd, 'w') ? -1 : NEXT(pwrite)(fd, data, n, place); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t place) {
    return fails(fd, 'w') ? -1 : NEXT(pwrite64)(fd, data, n, place); }
int fsync(int fd) { return fails(fd, 's') ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return fails(fd, 's') ? -1 : NEXT(fdatasync)(fd); }
"""


class DiskCase(unittest.TestCase):
    """What a server answers while its disk fails, and what is there afterwards."""

    small = make_message("small")
    large = make_message("large", ("y" * 70 + "\r\n") * 3000)          # 216 KB: goes to a file

    def setUp(self):
        self.number, self.kept = 0, {}          # mail_id: message
        self.folder = tempfile.mkdtemp(prefix="pegmail-")
        self.addCleanup(shutil.rmtree, self.folder)

    def unique(self, message):
        """Return the message with a field that no other has."""
        self.number += 1
        return b"X-Number: %d\r\n" % self.number + message

    def attempt(self, wire, message):
        """Send a message; return the reply to its content."""
        for line in ("MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>"):
            self.assertRegex(wire.ask(line), "^250 ")
        self.assertRegex(wire.ask("DATA"), "^354 ")
        wire.send(message + b".\r\n")
        return wire.reply()

    def keep(self, wire, message):
        """Send a message that has to be kept; note it."""
        message = self.unique(message)
        reply = self.attempt(wire, message)
        self.assertRegex(reply, r"^250 2\.0\.0 Kept as \d+$")
        self.kept[int(reply.split()[-1])] = message

    def refuse(self, wire, message, pattern):
        """Send a message that has to be refused for now."""
        self.assertRegex(self.attempt(wire, self.unique(message)), pattern)

    def check(self, server):
        """Compare what a server has with what it promised."""
        self.assertEqual(server.get("/count"), {"count": len(self.kept)})
        items = server.get("/list_short?count=1000")["items"]
        self.assertEqual([item["mail_id"] for item in items], sorted(self.kept))
        for ident, message in self.kept.items():
            status, _, raw = server.request(f"/raw?mail_id={ident}")
            self.assertEqual(status, 200)
            self.assertEqual(pegmail.parse_fields(raw[:-len(message)])[0][0], "Return-Path")
            self.assertTrue(raw.endswith(message), f"message {ident} has changed")


class FaultTests(DiskCase):
    """Errors of the disk, put in between the server and the system."""

    @classmethod
    def setUpClass(cls):
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None or not os.path.isdir("/proc/self/fd"):
            raise unittest.SkipTest("no C compiler to build what makes writes fail, or no Linux")
        cls.tools = tempfile.mkdtemp(prefix="pegmail-")
        cls.addClassCleanup(shutil.rmtree, cls.tools)
        source = os.path.join(cls.tools, "fault.c")
        cls.library = os.path.join(cls.tools, "fault.so")
        with open(source, "w") as file:
            file.write(FAULT_LIBRARY)
        done = subprocess.run([compiler, "-shared", "-fPIC", "-o", cls.library, source, "-ldl"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise unittest.SkipTest("the C compiler does not work: " + done.stdout.decode()[:200])

    def setUp(self):
        super().setUp()
        self.data = os.path.join(self.folder, "data")
        os.mkdir(self.data)
        self.flag = os.path.join(self.folder, "fault")
        self.options = ("--db_path", os.path.join(self.data, "mail.db"),
                        "--media_path", os.path.join(self.data, "media"))
        self.environ = {"LD_PRELOAD": self.library, "FAULT_FOLDER": os.path.realpath(self.data),
                        "FAULT_FLAG": self.flag}

    def start(self):
        server = Running(*self.options, folder=self.folder, environ=self.environ)
        self.addCleanup(server.__exit__)
        return server.start()

    @contextlib.contextmanager
    def fault(self, number, kinds):
        """Have writes (w) or syncs (s) fail meanwhile."""
        with open(self.flag + ".new", "w") as file:
            file.write(f"{number} {kinds}")
        os.rename(self.flag + ".new", self.flag)
        try:
            yield
        finally:
            os.unlink(self.flag)

    def test_faults(self):
        full, broken = r"^452 4\.3\.1 ", r"^451 4\.3\.0 "
        table = [
            ("full", errno.ENOSPC, "w", full, full),
            ("full, at a sync", errno.ENOSPC, "s", None, full),     # SQLite says "I/O error" then
            ("broken", errno.EIO, "w", broken, broken),
            ("broken sync", errno.EIO, "s", broken, broken),
            ("read-only", errno.EROFS, "w", broken, broken),
            ("both", errno.EIO, "ws", broken, broken),
            ("full, both", errno.ENOSPC, "ws", full, full),
        ]
        server = self.start()
        attachment = with_attachment(encode_columns(os.urandom(90000), 76))
        for name, number, kinds, small, large in table:
            with self.subTest(name), server.connect() as wire:
                wire.ask("EHLO client.example")
                for message in (self.small, self.large, attachment):
                    self.keep(wire, message)
                with self.fault(number, kinds):
                    for _ in range(2):
                        self.refuse(wire, self.small, small or r"^45[12] 4\.3\.[01] ")
                        self.refuse(wire, self.large, large)
                    ident = max(self.kept)
                    for path in ("/set_read?is_read=1&mail_id=", "/delete?mail_id="):
                        status, _, body = server.request(path + str(ident), "POST")
                        self.assertEqual((status, list(json.loads(body))), (503, ["error"]))
                    self.assertEqual(server.request("/list_short?count=5")[0], 200)
                    self.assertEqual(server.request(f"/raw?mail_id={ident}")[0], 200)
                    self.assertIn(server.request(f"/mail?mail_id={ident}")[0], (200, 503))
                for message in (self.small, self.large, attachment):
                    self.keep(wire, message)
                self.check(server)
        self.assertNotIn("Traceback", server.text())
        until(lambda: {item["attachment_count"] for item in server.get(
            "/filter_list_short?filter_mail_subject=file&count=99")["items"]} == {1}, "the digest")
        self.check(server)
        self.assertEqual(os.listdir(os.path.join(self.data, "media", "tmp")), [])
        server.stop(signal.SIGKILL)
        self.check(self.start())

    def test_a_digest_that_fails_is_made_later(self):
        attachment = with_attachment(encode_columns(os.urandom(900000), 76))
        server = self.start()
        with server.connect() as wire:
            wire.ask("EHLO client.example")
            for _ in range(3):
                self.keep(wire, attachment)
                with self.fault(errno.ENOSPC, "ws"):        # in the middle of it, or before
                    self.refuse(wire, self.small, "^45")
                    self.assertTrue(server.request("/count")[2])
            until(lambda: [item["attachment_count"] for item in
                           server.get("/list_short?count=9")["items"]] == [1, 1, 1], "the digest")
        self.check(server)
        self.assertEqual(server.stop(), 0)
        self.assertNotIn("Traceback", server.text())
        with contextlib.closing(PatientStore(self.options[1], self.options[3])) as store:
            store.begin()
            self.assertEqual([hole_count(store, ident) for ident in sorted(self.kept)], [1, 1, 1])


class FullDiskTests(DiskCase):
    """A disk that is really full."""

    def test_small_disk(self):
        mount, umount = need_root("mount"), need_root("umount")
        disk = os.path.join(self.folder, "disk")
        os.mkdir(disk)
        if subprocess.run([mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk],
                          stderr=subprocess.DEVNULL).returncode:
            self.skipTest("a small disk cannot be mounted here")
        self.addCleanup(subprocess.run, [umount, "-l", disk])
        ballast = os.path.join(disk, "ballast")
        with open(ballast, "wb") as file:
            file.write(bytes(3 << 20))
        with Running("--db_path", disk + "/mail.db", "--media_path", disk + "/media",
                     folder=self.folder) as server, server.connect() as wire:
            wire.ask("EHLO client.example")
            self.fill(wire, self.large)
            self.fill(wire, self.small)
            self.refuse(wire, self.large, r"^452 4\.3\.1 ")
            self.check(server)
            os.unlink(ballast)
            for message in (self.small, self.large, self.small):
                self.keep(wire, message)
            self.check(server)
            self.assertNotIn("Traceback", server.text())

    def fill(self, wire, message, pattern=r"^452 4\.3\.1 "):
        """Send messages until one is refused for now."""
        for _ in range(5000):
            unique = self.unique(message)
            reply = self.attempt(wire, unique)
            if not reply.startswith("250 "):
                self.assertRegex(reply, pattern)
                return
            self.kept[int(reply.split()[-1])] = unique
        self.fail("the disk never was full")

    def test_file_size_limit(self):
        """Where files may not grow, mail is refused for now, and what was kept stays."""
        limit = ("import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, "
                 "(1 << 20, 1 << 20)); os.execv(sys.argv[1], sys.argv[1:])")
        with Running(folder=self.folder, wrap=(sys.executable, "-c", limit)) as server:
            with server.connect() as wire:
                wire.ask("EHLO client.example")
                huge = make_message("huge", ("z" * 70 + "\r\n") * 20000)
                for _ in range(3):
                    self.refuse(wire, huge, r"^45[12] 4\.3\.[01] ")
                    self.keep(wire, self.small)
                self.fill(wire, make_message("row", "x" * 60000 + "\r\n"), r"^45[12] 4\.3\.[01] ")
            self.check(server)
            server.stop(signal.SIGKILL)
        with Running(folder=self.folder) as server:
            self.check(server)
            with server.connect() as wire:
                wire.ask("EHLO client.example")
                self.keep(wire, huge)
            self.check(server)


def need_root(program):
    """Return the path of a program that only root may use; skip for others."""
    if os.geteuid() != 0:
        raise unittest.SkipTest(f"{program} needs root")
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/bin")
    if path is None:
        raise unittest.SkipTest(f"{program} is not installed")
    return path


class KillTests(unittest.TestCase):
    """kill -9 at random moments under load: 250 means kept, once, and whole."""

    ROUNDS = 20

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="pegmail-")
        self.addCleanup(shutil.rmtree, self.folder)
        self.sent, self.acked = {}, {}          # number: message; mail_id: number
        self.lock, self.numbers = threading.Lock(), itertools.count(1)
        self.chosen = random.Random()
        self.bodies = [make_message("small", "x" * 900 + "\r\n"),
                       make_message("large", ("y" * 70 + "\r\n") * 2800),
                       with_attachment(encode_columns(os.urandom(140000), 76)),
                       with_attachment(encode_columns(os.urandom(140000), 75))]

    def make(self):
        """Return a message that no other equals, and note it."""
        with self.lock:
            number = next(self.numbers)
            kind = self.chosen.choices(range(5), weights=[12, 1, 1, 1, 1])[0]
            body = self.bodies[kind] if kind < 4 else with_attachment(
                encode_columns(os.urandom(140000), 76))
            self.sent[number] = b"X-Number: %d\r\n" % number + body
            return number

    def load(self, port):
        """Send messages over one connection until it breaks."""
        with contextlib.suppress(OSError), Wire(("127.0.0.1", port)) as wire:
            wire.ask("EHLO client.example")
            while True:
                number = self.make()
                wire.send(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n")
                if [wire.reply()[:3] for _ in range(3)] != ["250", "250", "354"]:
                    return
                wire.send(self.sent[number] + b".\r\n")
                match = re.fullmatch(r"250 2\.0\.0 Kept as (\d+)", wire.reply())
                if not match:
                    return
                with self.lock:
                    self.acked.setdefault(int(match.group(1)), []).append(number)

    def test_rounds(self):
        for _ in range(self.ROUNDS):
            with Running(folder=self.folder) as server:
                before = len(self.acked)
                threads = [threading.Thread(target=self.load, args=(server.smtp_port,))
                           for _ in range(4)]
                for thread in threads:
                    thread.start()
                try:
                    until(lambda: len(self.acked) > before, "a message kept")    # noqa: B023
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        server.process.wait(self.chosen.uniform(0, 0.1))
                    self.assertIsNone(server.process.poll(), server.text()[-2000:])
                finally:
                    server.process.kill()
                    for thread in threads:
                        thread.join()
                self.assertNotIn("Traceback", server.text())
            self.check_database()
        self.check_messages()

    def check_database(self):
        """Ask SQLite whether all is well, in the state that the dead process left."""
        path = os.path.join(self.folder, "mail.db")
        with contextlib.closing(sqlite3.connect(path)) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])

    def check_messages(self):
        """Compare every stored message with what was sent."""
        with contextlib.closing(pegmail.Store(self.folder + "/mail.db",
                                              self.folder + "/media")) as store:
            stored = store.page(pegmail.Filter(), 1 << 30)
            self.assertEqual(store.count(pegmail.Filter()), len(stored))
            found = collections.Counter()
            for message in stored:
                raw = read_raw(store, message.id)
                self.assertEqual(len(raw), message.size)
                match = re.search(rb"^X-Number: (\d+)\r\n", raw, re.M)
                number = int(match.group(1))
                self.assertEqual([name for name, _ in pegmail.parse_fields(raw[:match.start()])],
                                 ["Return-Path", "Received"])
                self.assertTrue(raw[match.start():] == self.sent[number],
                                f"message {message.id} is not what was sent")
                self.assertIn(self.acked.get(message.id, [number]), [[number]])
                found[number] += 1
            self.assertEqual([number for number, count in found.items() if count > 1], [])
            self.assertEqual(set(self.acked) - {message.id for message in stored}, set())
            self.assertGreater(len(self.acked), self.ROUNDS)
            self.assertEqual(store.count(pegmail.Filter(is_read=0)), len(stored))
            until(lambda: is_settled(store), "the digest")
            self.assertEqual({each.digested for each in store.page(pegmail.Filter(), 1 << 30)}, {1})
            for message in stored[::7]:
                raw = read_raw(store, message.id)
                self.assertTrue(raw.endswith(self.sent[int(re.search(
                    rb"^X-Number: (\d+)", raw, re.M).group(1))]))


# =====================================================================================
# 5. Reactor: one thread that owns every socket, and a few that work for it
# =====================================================================================

def open_files(pid):
    """Return the number of file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def other_files(pid):
    """Return the number of file descriptors that are not readers of the database.

    Each thread opens such a reader once, when it is first asked something.
    """
    names = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return sum("/mail.db" not in name for name in names)


def memory(server, name="VmRSS"):
    """Return the resident memory of a server in bytes; VmHWM is the most it has been."""
    with open(f"/proc/{server.process.pid}/status") as file:
        return int(re.search(name + r":\s+(\d+) kB", file.read()).group(1)) << 10


def reset(sock):
    """Close a socket so that the peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_metrics(server):
    """Return the figures of /metrics as {name and labels: value}."""
    lines = server.request("/metrics")[2].decode().splitlines()
    return {name: float(value) for name, _, value in
            (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def connections(server, port="smtp"):
    """Return the number of connections that a server has open."""
    return read_metrics(server)['pegmail_connections{port="%s"}' % port]


WHOLE = (TRANSACTION.replace(b"EHLO", b"HELO") + b"Subject: x\r\n\r\n..\r\n.\r\n",
         TRANSACTION.replace(b"EHLO", b"HELO").replace(
             b"DATA\r\n", b"BDAT 3\r\na\r\nBDAT 3 LAST\r\n") + b"b\r\n")


class ReactorTest(ServerCase):
    """Peers that are slow, rude or gone cost nobody else anything."""

    options = ("--max_size", "1000000", "--max_connections_per_peer", "5000")

    def test_a_session_in_one_segment(self):
        with self.server.connect(greeting=False) as wire:
            wire.send(TRANSACTION + b"x\r\n.\r\n" + b"NOOP\r\nQUIT\r\n")
            replies = [wire.reply() for _ in range(8)]
            self.assertEqual([reply[:3] for reply in replies],
                             ["220", "250", "250", "250", "354", "250", "250", "221"])
            self.assertEqual(wire.rest(), b"")

    def test_ten_thousand_commands(self):
        """All are answered, in order, whether the client waits or not."""
        source = random.Random(10000)
        table = {b"NOOP": b"250 2.0.0 OK", b"VRFY x": b"252 ", b"HELP NOOP": b"214 2.0.0 NOOP",
                 b"HELP RSET": b"214 2.0.0 RSET", b"HELP DATA": b"214 2.0.0 DATA"}
        commands = source.choices(list(table), k=10000)
        with self.server.connect() as wire:
            wire.send(b"".join(command + b"\r\n" for command in commands) + b"QUIT\r\n")
            lines = wire.rest().split(b"\r\n")
        self.assertEqual(len(lines), 10002)
        for command, line in zip(commands, lines):
            self.assertTrue(line.startswith(table[command]), (command, line))

    def test_many_messages_in_one_go(self):
        with self.server.connect() as wire:
            one = f"{SENDER}\r\n{RECIPIENT}\r\n".encode() + b"BDAT 5 LAST\r\n%03d\r\n"
            wire.send(b"HELO c\r\n" + b"".join(one % number for number in range(200)) + b"QUIT\r\n")
            idents = [int(ident) for ident in re.findall(rb"Kept as (\d+)\r\n", wire.rest())]
        self.assertEqual(idents, list(range(idents[0], idents[0] + 200)))
        for number in (0, 99, 199):
            raw = self.server.request(f"/raw?mail_id={idents[number]}")[2]
            self.assertEqual(content_of(raw), b"%03d\r\n" % number)

    def test_gone_in_the_middle(self):
        """At each byte of a session, politely or by a reset: nothing is kept by half."""
        before = self.server.get("/count")["count"]
        for data in WHOLE:
            for length in range(len(data)):
                for leave in (socket.socket.close, reset):
                    sock = socket.create_connection(("127.0.0.1", self.server.smtp_port), DEADLINE)
                    sock.sendall(data[:length])
                    leave(sock)
        until(lambda: connections(self.server) == 0, "the end of all connections")
        self.assertEqual(self.server.get("/count")["count"], before)

    def test_gone_in_a_large_message(self):
        """What was written of it goes away."""
        folder = os.path.join(self.server.folder, "media", "tmp")
        for leave in (socket.socket.close, reset):
            for data in (TRANSACTION, TRANSACTION.replace(b"DATA", b"BDAT 900000")):
                with contextlib.ExitStack() as stack:
                    wires = [stack.enter_context(self.server.connect()) for _ in range(5)]
                    for wire in wires:
                        wire.send(data + b"x: y\r\n" * 50000)
                    until(lambda: len(os.listdir(folder)) == 5, "the files")
                    for wire in wires:
                        leave(wire.socket)
                until(lambda: not os.listdir(folder), "their end")
        until(lambda: connections(self.server) == 0, "the end of all connections")

    def test_half_closed(self):
        """Who ends its side hears the answers to what it said; a message cut off is not kept."""
        before = self.server.get("/count")["count"]
        for data, codes in ((b"", ["220"]), (b"NOOP", ["220"]), (b"NOOP\r\n", ["220", "250"]),
                            (WHOLE[0], ["220", "250", "250", "250", "354", "250"]),
                            (WHOLE[0][:-1], ["220", "250", "250", "250", "354"]),
                            (WHOLE[1], ["220", "250", "250", "250", "250", "250"]),
                            (WHOLE[1][:-1], ["220", "250", "250", "250", "250"])):
            with self.subTest(data[-20:]), self.server.connect(greeting=False) as wire:
                wire.send(data)
                wire.socket.shutdown(socket.SHUT_WR)
                said = wire.rest().decode().split("\r\n")
                self.assertEqual([line[:3] for line in said[:-1]], codes)
        self.assertEqual(self.server.get("/count")["count"], before + 2)

    def test_endless_input(self):
        """Cut off with a 421, long before it is much memory."""
        begin = f"{HELLO}\r\n{SENDER}\r\n".encode()
        for data, unit in ((b"", b"A"), (b"", b" "), (b"", b"\0"), (b"", b"\xff"), (b"", b"\r"),
                           (begin, b"RCPT TO:<"), (TRANSACTION, b"x"), (TRANSACTION, b"\r"),
                           (TRANSACTION, b"\0"), (TRANSACTION, b"."), (TRANSACTION, b"a: b\r\n"),
                           (TRANSACTION, b"\r\n"), (TRANSACTION, b"Received: x\r\n"),
                           (TRANSACTION, b"\n.\n"), (begin + b"BDAT 999999999999 LAST\r\n", b"x")):
            with self.subTest(data=data[-10:], unit=unit), self.server.connect() as wire:
                before = memory(self.server)
                wire.send(data)
                block, sent = unit * (65536 // len(unit)), 0
                while not select.select([wire.socket], [], [], 0)[0] or not self.has_ended(wire):
                    self.assertLess(sent, 32 << 20)
                    with contextlib.suppress(ConnectionError):
                        wire.socket.sendall(block)
                    sent += len(block)
                self.assertRegex(wire.buffer, rb"(\A|\r\n)421 4\.[357]\.\d [^\r]*\r\n\Z")
                self.assertLess(memory(self.server) - before, 16 << 20)

    def has_ended(self, wire):
        """Read what has come; is a 421 among it?"""
        with contextlib.suppress(ConnectionError):
            wire.buffer += wire.socket.recv(65536)
        return b"421 " in wire.buffer

    def test_others_are_served_meanwhile(self):
        """Connections in every odd state; a well-behaved client among them."""
        with contextlib.ExitStack() as stack:
            for data in (b"", b"NOO", TRANSACTION, TRANSACTION + b"x" * 300000, WHOLE[1][:-4],
                         TRANSACTION + b"\r\n.\r", b"HELP\r\n" * 20000):
                for _ in range(20):
                    wire = stack.enter_context(self.server.connect())
                    wire.socket.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        wire.socket.send(data)
            ident = self.server.send(make_message("among others"))
            self.assertEqual(self.server.get(f"/mail?mail_id={ident}")["mail_subject"],
                             "among others")
        until(lambda: connections(self.server) == 0, "the end of all connections")

    def test_come_and_go(self):
        """2,000 connections later, files, threads and memory are as before."""
        pid = self.server.process.pid
        kinds = (b"", b"NOO", b"NOOP\r\n", TRANSACTION, TRANSACTION + b"x" * 100000, WHOLE[0],
                 b"HELP\r\n" * 500, b"QUIT\r\n", b"FOO\r\n" * 30, b"\0" * 3000)

        def come_and_go(number):
            for turn in range(number):
                sock = socket.create_connection(("127.0.0.1", self.server.smtp_port), DEADLINE)
                with contextlib.suppress(ConnectionError):
                    sock.sendall(kinds[turn % len(kinds)])
                (reset if turn % 3 else socket.socket.close)(sock)
            until(lambda: connections(self.server) == 0, "the end of all connections")
        come_and_go(300)
        files, threads = other_files(pid), len(os.listdir(f"/proc/{pid}/task"))
        before = memory(self.server)
        come_and_go(2000)
        until(lambda: other_files(pid) <= files, "the files of before")
        self.assertEqual(len(os.listdir(f"/proc/{pid}/task")), threads)
        self.assertLess(memory(self.server) - before, 12 << 20)


class LoopTest(unittest.TestCase):
    """The loop from within: what it holds while peers come, stay and go."""

    @classmethod
    def setUpClass(cls):
        cls.certificate = Certificate()
        cls.addClassCleanup(cls.certificate.remove)
        cls.app = Offline(*cls.certificate.options, "--starttls", "optional", "--max_errors", "9")
        cls.addClassCleanup(cls.app.__exit__)

    def setUp(self):
        self.bugs = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = lambda record: self.bugs.append(record.getMessage())
        pegmail.log.addHandler(handler)
        self.addCleanup(pegmail.log.removeHandler, handler)

    def tearDown(self):
        until(lambda: not self.app.loop.streams, "the end of all connections")
        self.assertTrue(self.app.thread.is_alive(), "the loop has ended")
        self.assertEqual(self.bugs, [])

    def test_come_and_go(self):
        """Streams, timers, sessions and files go with their connection."""
        port = self.app.listen()
        loop = self.app.loop
        files = open_files("self")
        live = sum(timer[2] is not None for timer in loop.timers)
        kinds = (b"", b"NOOP\r\n", TRANSACTION, TRANSACTION + b"x" * 70000, WHOLE[0], WHOLE[1],
                 b"STARTTLS\r\n", b"STARTTLS\r\nNOOP\r\n", b"QUIT\r\n", b"FOO\r\n" * 10)
        # A reset within wrap_socket() has Python drop the TLS socket that it had half made.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            for turn in range(2000):
                sock = socket.create_connection(("127.0.0.1", port), DEADLINE)
                with contextlib.suppress(ConnectionError):
                    sock.sendall(kinds[turn % len(kinds)])
                (reset if turn % 3 else socket.socket.close)(sock)
            until(lambda: not loop.streams, "the end of all connections")
            gc.collect()
        until(lambda: open_files("self") <= files, "the files of before")
        self.assertEqual(sum(timer[2] is not None for timer in list(loop.timers)), live)
        self.assertLess(len(loop.timers), 250)
        self.assertEqual(self.app.listeners[-1].limits.count, 0)
        self.assertEqual(self.app.listeners[-1].limits.peers, {})
        gc.collect()
        left = [thing for thing in gc.get_objects() if isinstance(thing, pegmail.Stream)]
        self.assertLessEqual(len(left), pegmail.POOL_THREADS + 2)   # variables hold the last ones

    def test_who_never_reads(self):
        """It is not read from either, and dropped when its time is over."""
        port = self.app.listen(idle=1, buffer=4096)
        with contextlib.ExitStack() as stack:
            socks = []
            for _ in range(20):
                sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(("127.0.0.1", port))
                sock.setblocking(False)
                socks.append(sock)
            until(lambda: len(self.app.loop.streams) == 20, "the connections")
            most = [0]

            def push():
                for sock in socks:
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        sock.send(b"HELP\r\n" * 10000)
                for stream in list(self.app.loop.streams):
                    most.append(len(stream.session.outbox) + len(stream.session.inbox))
                return not self.app.loop.streams
            until(push, "their end")
        self.assertLess(max(most), 160000)
        self.assertGreater(max(most), 8000)

    def test_the_last_answers_to_who_has_closed_its_side(self):
        """They are sent though the peer's end of the stream came before there was room."""
        port = self.app.listen(buffer=4096)
        for count in (10, 30, 60, 90, 2000):
            with self.subTest(count), socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                sock.settimeout(DEADLINE)
                sock.connect(("127.0.0.1", port))
                until(lambda: self.app.loop.streams, "the connection")
                stream, = self.app.loop.streams
                sock.sendall(b"HELP\r\n" * count)
                sock.shutdown(socket.SHUT_WR)
                until(lambda stream=stream: stream.eof or stream.session.wants is pegmail.DRAIN,
                      "a full buffer or the end")
                data = b""
                while True:
                    more = sock.recv(1000)
                    if not more:
                        break
                    data += more
                self.assertEqual(data.count(b"\r\n214 2.0.0 "), count)
            until(lambda: not self.app.loop.streams, "the end of the connection")

    def test_gone_before_the_handshake(self):
        """A reset while we are about to begin TLS ends that connection and no other."""
        told, gone = threading.Event(), threading.Event()

        class Tardy(pegmail.Session):
            """Wants TLS once the peer is gone."""
            name = "tardy"

            def run(self):
                yield pegmail.READ
                told.set()
                gone.wait(DEADLINE)
                yield pegmail.STARTTLS
        port = self.app.listen(lambda peer: Tardy())
        sock = socket.create_connection(("127.0.0.1", port), DEADLINE)
        sock.sendall(b"x")
        self.assertTrue(told.wait(DEADLINE))
        reset(sock)
        gone.set()
        until(lambda: not self.app.loop.streams or not self.app.thread.is_alive(), "its end")
        self.assertTrue(self.app.thread.is_alive(), "the loop has ended")

    def test_a_bug_ends_one_conversation(self):
        """It is logged, the peer hears a 421, and all others go on."""
        class Broken(pegmail.SMTPSession):
            """Trips over any command."""

            def obey(self, line):
                raise ZeroDivisionError("as planned")
                yield
        port = self.app.listen(lambda peer: Broken(self.app.intake, peer, "0"))
        other = self.app.listen()
        with Wire(("127.0.0.1", other)) as well, Wire(("127.0.0.1", port)) as wire:
            self.assertRegex(wire.ask("NOOP"), r"\A421 4\.3\.0 mx\.example\.com ")
            self.assertEqual(wire.rest(), b"")
            self.assertEqual(well.ask("NOOP")[:9], "250 2.0.0")
        self.assertEqual(len(self.bugs), 1)
        self.bugs.clear()

    def test_timers(self):
        """They are called in order, a cancelled one never; from any thread by call_soon."""
        called, over = [], threading.Event()
        loop = self.app.loop

        def begin():
            timers = [loop.call_later(delay / 100, functools.partial(called.append, delay))
                      for delay in (3, 1, 2, 0, 4)]
            loop.cancel(timers[2])
            loop.cancel(timers[2])
            loop.call_later(0.05, over.set)
        loop.call_soon(begin)
        self.assertTrue(over.wait(DEADLINE))
        self.assertEqual(called, [0, 1, 3, 4])

    def test_cancelled_timers_do_not_pile_up(self):
        over, size = threading.Event(), []
        loop = self.app.loop

        def begin():
            for _ in range(10000):
                loop.cancel(loop.call_later(1000, lambda: None))
            size.append(len(loop.timers))
            over.set()
        loop.call_soon(begin)
        self.assertTrue(over.wait(DEADLINE))
        self.assertLess(size[0], 300)


class DescriptorTest(unittest.TestCase):
    """When the system gives no more descriptors, those who wait are served later."""

    def test_out_of_descriptors(self):
        with Running("--max_connections_per_peer", "500",
                     wrap=("sh", "-c", 'ulimit -n 60; exec "$@"', "sh")) as server:
            with contextlib.ExitStack() as stack:
                wires = [stack.enter_context(server.connect(greeting=False)) for _ in range(80)]
                until(lambda: "cannot accept" in server.text(), "the shortage")
                self.assertEqual(wires[0].reply()[:4], "220 ")
                self.assertEqual(wires[0].ask("NOOP")[:9], "250 2.0.0")
                for wire in wires[:79]:
                    wire.socket.close()
                self.assertEqual(wires[79].reply()[:4], "220 ")
            server.send()
            self.assertEqual(server.get("/count"), {"count": 1})
            self.assertEqual(server.stop(), 0)


# A program of its own, so that its work is not in the way of what is measured. Ten connections send
# mail of 20 MB one after another, a thousand send a byte a second; it ends with its standard input.
LOAD = r"""
import base64, os, resource, selectors, socket, sys, time
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
port = int(sys.argv[1])
lines = base64.encodebytes(os.urandom(14800000)).replace(b"\n", b"\r\n")
mail = (b"MAIL FROM:<a@b.example>\r\nRCPT TO:<b@c.example>\r\nDATA\r\nSubject: load\r\n"
        b"MIME-Version: 1.0\r\nContent-Type: application/octet-stream; name=x.bin\r\n"
        b"Content-Transfer-Encoding: base64\r\n\r\n" + lines + b".\r\n")
selector = selectors.DefaultSelector()
def connect():
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setblocking(False)
    return sock
slow = [connect() for _ in range(1000)]
senders = {connect(): [b"EHLO load\r\n" + mail, 0, 0] for _ in range(10)}
for sock in senders:
    selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
selector.register(sys.stdin, selectors.EVENT_READ)
word, begun, turn, kept, running = b"NOOP xxx\r\n", time.monotonic(), 0, 0, True
print("ready", flush=True)
while running:
    for key, events in selector.select(0.005):
        if key.fileobj is sys.stdin:
            running = False
            continue
        state = senders[key.fileobj]
        if events & selectors.EVENT_READ:
            data = key.fileobj.recv(65536)
            kept += data.count(b"Kept as")
            if not data or b"\r\n4" in data or b"\r\n5" in data:
                sys.exit(f"a sender heard {data!r}")
        if events & selectors.EVENT_WRITE:
            try:
                state[1] += key.fileobj.send(memoryview(state[0])[state[1]:state[1] + (1 << 18)])
            except BlockingIOError:
                pass
            if state[1] == len(state[0]):
                state[:] = mail, 0, state[2] + 1
    while turn < (time.monotonic() - begun) * 1000:
        place, client = divmod(turn, 1000)
        try:
            slow[client].send(word[place % 10:place % 10 + 1])
        except BlockingIOError:
            pass
        turn += 1
print(kept, turn)
"""


class StallTest(unittest.TestCase):
    """Ten senders of 20 MB and a thousand clients at a byte a second delay nobody else."""

    def test_others_hardly_notice(self):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard != resource.RLIM_INFINITY and hard < 3000:
            self.skipTest(f"only {hard} descriptors are allowed here")
        with Running("--max_connections_per_peer", "5000") as server:
            load = subprocess.Popen([sys.executable, "-c", LOAD, str(server.smtp_port)],
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            with load, server.connect() as wire:
                self.addCleanup(load.kill)
                self.assertEqual(load.stdout.readline(), "ready\n")
                connection = http.client.HTTPConnection("127.0.0.1", server.api_port,
                                                        timeout=DEADLINE)
                self.addCleanup(connection.close)

                def health():
                    connection.request("GET", "/healthz")
                    response = connection.getresponse()
                    self.assertEqual((response.status, bool(response.read())), (200, True))

                def noop():
                    self.assertEqual(wire.ask("NOOP")[:9], "250 2.0.0")
                figures = self.measure({"NOOP": noop, "GET /healthz": health}, 3)
                load.stdin.close()
                kept, sent = map(int, load.stdout.read().split())
                self.assertEqual(load.wait(DEADLINE), 0)
            if os.environ.get("PEGMAIL_TEST_FIGURES"):
                print(f"\n20 MB messages kept: {kept}, slow bytes: {sent}, resident: "
                      f"{memory(server) >> 20} MB", figures)
            self.assertGreater(kept, 0)
            self.assertGreater(sent, 2000)
            for name, times in figures.items():
                self.assertLess(times["99 %"], 1, (name, times))
            self.assertNotIn("Traceback", server.text())

    def measure(self, asks, seconds, every=0.025):
        """Ask at fixed moments; return how long answers took, counted from those moments.

        So an answer that comes late counts for each question that it held up.
        """
        times = {name: [] for name in asks}
        begun = time.monotonic()
        for number in range(int(seconds / every)):
            due = begun + number * every
            time.sleep(max(0, due - time.monotonic()))
            for name, ask in asks.items():
                ask()
                times[name].append(time.monotonic() - due)
        return {name: {"50 %": sorted(taken)[len(taken) // 2],
                       "99 %": sorted(taken)[len(taken) * 99 // 100], "most": max(taken)}
                for name, taken in times.items()}


# =====================================================================================
# 6. Trust: asking the DNS
# =====================================================================================

def listening(kind=socket.SOCK_STREAM, port=0):
    """Return a socket on a free port of loopback."""
    sock = socket.socket(socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
    try:
        sock.bind(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    if kind == socket.SOCK_STREAM:
        sock.listen(16)
    return sock


class ThreadCase(unittest.TestCase):
    """A test that leaves no thread behind."""

    def setUp(self):
        before = set(threading.enumerate())
        self.addCleanup(lambda: self.assertEqual(set(threading.enumerate()) - before, set()))


def rdata(kind, value):
    """Return the data of a record."""
    if kind in ("A", "AAAA"):
        return socket.inet_pton(socket.AF_INET if kind == "A" else socket.AF_INET6, value)
    if kind == "MX":
        return struct.pack(">H", value[0]) + pegmail.encode_name(value[1])
    if kind == "TXT":
        return b"".join(bytes([len(text)]) + text for text in value)
    return pegmail.encode_name(value)


def record(name, kind, value, ttl=300):
    """Return a record; a name of None is a pointer to the question."""
    data = rdata(kind, value)
    owner = b"\xc0\x0c" if name is None else pegmail.encode_name(name)
    return owner + struct.pack(">HHLH", pegmail.KINDS[kind], 1, ttl, len(data)) + data


class NameServer:
    """A name server. A zone is {(name, kind): values}; a value may be bytes: the whole answer."""

    def __init__(self, zone, code=0, ttl=300, lies=(), truncate=False, silent=False,
                 depth=4):
        self.depth = depth
        self.zone, self.code, self.ttl, self.lies = zone, code, ttl, lies
        self.truncate, self.silent = truncate, silent
        self.asked, self.ports = [], []
        self.udp, self.tcp = self.listen()
        self.port = self.udp.getsockname()[1]
        self.threads = [threading.Thread(target=run) for run in (self.serve_udp, self.serve_tcp)]
        for thread in self.threads:
            thread.start()

    def listen(self):
        """Return sockets for UDP and TCP on the same port."""
        while True:
            tcp = listening()
            try:
                return listening(socket.SOCK_DGRAM, tcp.getsockname()[1]), tcp
            except OSError:
                tcp.close()

    @property
    def name(self):
        return f"127.0.0.1:{self.port}"

    def close(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", ("127.0.0.1", self.port))
        self.tcp.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        self.udp.close()
        self.tcp.close()

    def answer(self, query, truncate):
        """Return the answer to a query: CNAMEs are followed within the zone."""
        name, end = pegmail.decode_name(query, 12)
        number = struct.unpack_from(">H", query, end)[0]
        kind = next(key for key, value in pegmail.KINDS.items() if value == number)
        self.asked.append((name, kind))
        records, owner = [], name
        for _ in range(self.depth):
            values = self.zone.get((owner, kind), [])
            if isinstance(values, bytes):
                return query[:2] + values
            if values or (owner, "CNAME") not in self.zone:
                records += [record(owner, kind, value, self.ttl) for value in values]
                break
            target = self.zone[owner, "CNAME"]
            records.append(record(owner, "CNAME", target, self.ttl))
            owner = target
        known = any(owner == key for key, _ in self.zone)
        code = self.code or (0 if known else 3)
        flags = 0x8180 | code | (0x0200 if truncate else 0)
        count = 0 if truncate else len(records)
        return (query[:2] + struct.pack(">5H", flags, 1, count, 0, 0) + query[12:]
                + (b"" if truncate else b"".join(records)))

    def serve_udp(self):
        while True:
            query, peer = self.udp.recvfrom(4096)
            if not query:
                return
            self.ports.append(peer[1])
            for lie in self.lies:
                self.udp.sendto(lie(query), peer)
            if not self.silent:
                self.udp.sendto(self.answer(query, self.truncate), peer)

    def serve_tcp(self):
        while True:
            try:
                sock, _ = self.tcp.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(5)
                size = struct.unpack(">H", sock.recv(2))[0]
                data = self.answer(sock.recv(size), False)
                data = struct.pack(">H", len(data)) + data
                sock.sendall(data[:1])
                sock.sendall(data[1:])


ZONE = {
    ("example.com", "MX"): [(20, "b.example.com"), (10, "A.Example.com"), (20, "c.example.com")],
    ("example.com", "TXT"): [[b"v=spf1 ", b"-all"], [b"other"]],
    ("a.example.com", "A"): ["192.0.2.1"], ("a.example.com", "AAAA"): ["2001:db8::1"],
    ("b.example.com", "CNAME"): "real.example.com", ("real.example.com", "A"): ["192.0.2.2"],
    ("bare.example.com", "A"): ["192.0.2.3"],
    ("null.example.com", "MX"): [(0, ".")],
    ("odd.example.com", "MX"): [(0, "."), (5, "bare.example.com")],
    ("1.2.0.192.in-addr.arpa", "PTR"): ["a.example.com"],
    ("x.example.com", "CNAME"): "y.example.com", ("y.example.com", "CNAME"): "x.example.com",
    ("dangling.example.com", "CNAME"): "nowhere.example.com",
    ("many.example.com", "MX"): [(n, f"h{n}.example.com") for n in range(40)],
    ("loop.example.com", "A"): b"\x81\x80\0\1\0\1\0\0\0\0\xc0\x0c\0\1\0\1",
}


class DNSTest(unittest.TestCase):
    """The form of queries and answers."""

    def test_query(self):
        self.assertEqual(pegmail.encode_query(0x1234, "Example.com.", "MX"),
                         b"\x12\x34\1\0\0\1\0\0\0\0\0\0\7example\3com\0\0\x0f\0\1")
        self.assertEqual(pegmail.encode_name("b\u00fccher.example"),
                         b"\x0dxn--bcher-kva\7example\0")
        self.assertEqual(pegmail.encode_name("."), b"\0")

    def test_names_that_cannot_be(self):
        for name in ("a..b", "x" * 64, "x." * 128, "a b", "\u2028.example", ".a", "a\r\n.b"):
            with self.subTest(name=name), self.assertRaises(pegmail.NoSuchName):
                pegmail.encode_name(name)

    def test_hostile_answers(self):
        start = b"\0\1\x81\x80\0\1\0\1\0\0\0\0"
        for data in (b"", b"\0", start, start + b"\xc0\x0c\0\1\0\1", start + b"\xc0\xff\0\1\0\1",
                     start + b"\xc0", start + b"\x80abc", start + b"\x3fabc",
                     start + b"\1a\0\0\1\0\1" + b"\xc0\x0c\0\1\0\1\0\0\0\1\0\5abcde",
                     start + b"\1a\0\0\1\0\1" + b"\xc0\x0c\0\1\0\1\0\0\0\1\xff\xff",
                     start + b"\1a\0\0\1\0\1" + b"\xc0\x13" * 2,
                     start + b"\x3f" + b"a" * 63 + (b"\x3f" + b"b" * 63) * 4 + b"\0\0\1\0\1"):
            with self.subTest(data=data[:40]), self.assertRaises(pegmail.DNSError):
                pegmail.decode_answer(data)

    def test_fuzz(self):
        chance = random.Random(7)
        good = (struct.pack(">6H", 1, 0x8180, 1, 5, 0, 0)
                + pegmail.encode_query(1, "a.example", "MX")[12:]
                + record(None, "MX", (10, "mx.example")) + record(None, "TXT", [b"x" * 80, b"y"])
                + record(None, "A", "192.0.2.1") + record("b.example", "AAAA", "::1")
                + record(None, "CNAME", "c.example"))
        self.assertEqual([r.value for r in pegmail.decode_answer(good).records],
                         [(10, "mx.example"), "x" * 80 + "y", "192.0.2.1", "::1", "c.example"])
        for _ in range(8000):
            data = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                data[chance.randrange(len(data))] = chance.choice((0, 1, 63, 192, 255,
                                                                   chance.randrange(256)))
            with contextlib.suppress(pegmail.DNSError):
                pegmail.decode_answer(bytes(data[:chance.randrange(12, len(data) + 1)]))

    def test_odd_labels_keep_their_dots(self):
        name = pegmail.decode_name(b"\4a.b\\\3C\r\n\0", 0)[0]
        self.assertEqual(name, "a\\046b\\092.c\\013\\010")

    def test_no_time_is_lost_on_pointers(self):
        head = struct.pack(">6H", 1, 0x8180, 1, 65535, 0, 0) + b"\1a\0\0\1\0\1"
        deep = b"".join(b"\1a" for _ in range(120)) + b"\0"
        body = record("a", "TXT", [deep[:250]])
        one = struct.pack(">HHHLH", 0xC000 | (len(head) + 14), 1, 1, 1, 4) + b"1234"
        chain = b"".join(struct.pack(">H", 0xC000 | n) for n in range(20, 16000, 2))
        for data in (head + body + one * 4000, head + one + chain, head + b"\xc0\x13" * 9000):
            began = time.monotonic()
            with contextlib.suppress(pegmail.DNSError):
                pegmail.decode_answer(data[:65535])
            self.assertLess(time.monotonic() - began, 0.5)

    def test_resolv_conf(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "resolv.conf")
            self.assertEqual(pegmail.read_resolv_conf(path), ["127.0.0.1"])
            with open(path, "w", encoding="utf-8") as file:
                file.write("# x\nsearch a\nnameserver 192.0.2.1\nnameserver\nnameserver ::1\n")
            self.assertEqual(pegmail.read_resolv_conf(path), ["192.0.2.1", "::1"])


class ResolverTest(ThreadCase):
    """The resolver with a real name server."""

    def serve(self, zone=ZONE, **options):
        server = NameServer(zone, **options)
        self.addCleanup(server.close)
        return server

    def resolver(self, *servers, timeout=0.3, **options):
        return pegmail.Resolver([server.name for server in servers], timeout, **options)

    def test_values(self):
        resolver = self.resolver(self.serve())
        for name, kind, values in (
                ("a.example.com", "A", ["192.0.2.1"]), ("a.example.com", "AAAA", ["2001:db8::1"]),
                ("example.com", "TXT", ["v=spf1 -all", "other"]), ("a.example.com", "TXT", []),
                ("1.2.0.192.in-addr.arpa", "PTR", ["a.example.com"]),
                ("B.example.com.", "A", ["192.0.2.2"])):
            with self.subTest(name=name, kind=kind):
                self.assertEqual(resolver.query(name, kind), values)
        for name in ("nowhere.example.com", "dangling.example.com", "a..b"):
            with self.assertRaises(pegmail.NoSuchName):
                resolver.query(name, "A")

    def test_truncated_comes_by_tcp(self):
        server = self.serve(truncate=True)
        self.assertEqual(self.resolver(server).query("a.example.com", "A"), ["192.0.2.1"])
        self.assertEqual(len(server.asked), 2)

    def test_lies_are_passed_over(self):
        def forged(query):
            return (query[:2] + struct.pack(">5H", 0x8180, 1, 1, 0, 0) + query[12:]
                    + record(None, "A", "203.0.113.66"))
        lies = [lambda query: b"x", lambda query: forged(bytes([query[0] ^ 1]) + query[1:]),
                lambda query: forged(query[:12]
                                     + pegmail.encode_query(1, "evil.example", "A")[12:]),
                lambda query: query]
        server = self.serve(lies=lies)
        self.assertEqual(self.resolver(server).query("a.example.com", "A"), ["192.0.2.1"])

    def test_next_server(self):
        gone = listening(socket.SOCK_DGRAM)
        self.addCleanup(gone.close)
        for bad in (self.serve(silent=True).name, self.serve(code=2).name, self.serve(code=5).name,
                    f"127.0.0.1:{gone.getsockname()[1]}", "127.0.0.1:1"):
            with self.subTest(bad=bad):
                resolver = pegmail.Resolver([bad, self.serve().name], 0.1)
                self.assertEqual(resolver.query("a.example.com", "A"), ["192.0.2.1"])
                with self.assertRaises(pegmail.DNSError) as caught:
                    pegmail.Resolver([bad], 0.05).query("a.example.com", "A")
                self.assertNotIsInstance(caught.exception, pegmail.NoSuchName)

    def test_ends_in_time(self):
        server = self.serve(silent=True, lies=[lambda query: b"x"] * 50)
        began = time.monotonic()
        with self.assertRaises(pegmail.DNSError):
            self.resolver(server, timeout=0.1).query("a.example.com", "A")
        self.assertLess(time.monotonic() - began, 1)

    def test_aliases_that_do_not_end(self):
        server = self.serve()
        for name in ("x.example.com", "loop.example.com"):
            with self.assertRaises(pegmail.DNSError):
                self.resolver(server, timeout=0.05).query(name, "A")
        chain = {(f"n{n}.example", "CNAME"): f"n{n + 1}.example" for n in range(100)}
        server = self.serve(chain, depth=50)
        with self.assertRaises(pegmail.DNSError):
            self.resolver(server).query("n0.example", "A")

    def test_cache(self):
        clock = [0.0]
        server = self.serve(ttl=1 << 30)
        resolver = self.resolver(server, now=lambda: clock[0])
        for step, asked in ((0, 1), (0, 1), (pegmail.MAX_TTL - 1, 1), (2, 2)):
            clock[0] += step
            resolver.query("a.example.com", "A").append("not kept")
            self.assertEqual(len(server.asked), asked)
        for _ in range(2):
            with self.assertRaises(pegmail.NoSuchName):
                resolver.query("nowhere.example.com", "A")
        self.assertEqual(len(server.asked), 3)
        for n in range(pegmail.MAX_CACHE + 10):
            resolver.remember((str(n), "A"), 5, [])
        self.assertEqual(len(resolver.cache), pegmail.MAX_CACHE)

    def test_no_ttl_no_cache(self):
        server = self.serve(ttl=(1 << 31) + 5)
        resolver = self.resolver(server)
        resolver.query("a.example.com", "A")
        resolver.query("a.example.com", "A")
        self.assertEqual(len(server.asked), 2)
        self.assertGreater(len(set(server.ports)), 1)

    def test_mail_hosts(self):
        resolver = self.resolver(self.serve(), random=random.Random(1))
        self.assertEqual(resolver.mail_hosts("bare.example.com"), ["bare.example.com"])
        self.assertEqual(resolver.mail_hosts("odd.example.com"), ["bare.example.com"])
        self.assertEqual(resolver.mail_hosts("[192.0.2.9]"), ["192.0.2.9"])
        self.assertEqual(resolver.mail_hosts("[IPv6:2001:DB8::9]"), ["2001:db8::9"])
        self.assertEqual(len(resolver.mail_hosts("many.example.com")), pegmail.MAX_TRIES)
        orders = {tuple(resolver.mail_hosts("Example.com")) for _ in range(30)}
        self.assertEqual(orders, {("a.example.com", "b.example.com", "c.example.com"),
                                  ("a.example.com", "c.example.com", "b.example.com")})
        self.assertEqual(resolver.addresses("a.example.com"), ["192.0.2.1", "2001:db8::1"])
        self.assertEqual(resolver.addresses("b.example.com"), ["192.0.2.2"])
        self.assertEqual(resolver.addresses("nowhere.example.com"), [])

    def test_no_mail_there(self):
        resolver = self.resolver(self.serve())
        for domain, code, status in (("null.example.com", 556, "5.1.10"), ("[1.2]", 553, "5.1.3"),
                                     ("nowhere.example.com", 550, "5.1.2")):
            with self.subTest(domain=domain), self.assertRaises(pegmail.Undeliverable) as caught:
                resolver.mail_hosts(domain)
            self.assertEqual(caught.exception.reply[:2], (code, status))


# =====================================================================================
# 7. Sessions: the protocols, without sockets
# =====================================================================================

class SMTPTest(TranscriptCase):
    """Every command, in order and out of it (RFC 5321)."""

    def test_a_whole_session(self):
        kept = self.play("""
            S: 220 mx.example.com ESMTP *
            C: EHLO client.example
            S: 250-*
            C: MAIL FROM:<ann@client.example> SIZE=100 BODY=8BITMIME
            S: 250 2.1.0 *
            C: RCPT TO:<bob@mail.example>
            S: 250 2.1.5 *
            C: RCPT TO:<eve@mail.example>
            S: 250 2.1.5 *
            C: DATA
            S: 354 *
            C: Subject: one
            C:
            C: text
            C: .
            S: 250 2.0.0 Kept as *
            C: QUIT
            S: 221 2.0.0 mx.example.com *
            E:
        """)
        self.assertEqual(kept, [b"Subject: one\r\n\r\ntext\r\n"])

    def test_the_old_hello(self):
        kept = self.play("""
            S: 220 *
            C: helo printer
            S: 250 mx.example.com
            C: mail from:<ann@client.example>
            S: 250 2.1.0 *
            C: rcpt to:<bob@mail.example>
            S: 250 2.1.5 *
            C: data
            S: 354 *
            C: hello
            C: .
            S: 250 2.0.0 Kept as *
        """)
        self.assertEqual(kept, [b"hello\r\n"])

    def test_extensions(self):
        """RFC 5321 4.1.1.1, and what the extensions' own RFCs say of their EHLO line."""
        lines = Dialogue(self.app).ask("EHLO client.example").split("\r\n")
        self.assertTrue(lines[0].startswith("250-mx.example.com "), lines[0])
        self.assertEqual(sorted(line[4:] for line in lines[1:-1]), sorted([
            "PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 52428800", "ENHANCEDSTATUSCODES",
            "CHUNKING", "BINARYMIME", "LIMITS RCPTMAX=1000", "HELP"]))
        self.assertEqual({line[:4] for line in lines[:-2]}, {"250-"})
        self.assertEqual(lines[-2][:4], "250 ")

    def test_order(self):
        """RFC 5321 4.1.4: what may come when."""
        self.play("""
            S: 220 *
            C: NOOP
            S: 250 2.0.0 *
            C: NOOP with words
            S: 250 2.0.0 *
            C: HELP
            S: 214 2.0.0 *
            C: VRFY bob
            S: 252 2.* *
            C: RSET
            S: 250 2.0.0 *
            C: MAIL FROM:<ann@client.example>
            S: 503 5.5.1 *
            C: RCPT TO:<bob@mail.example>
            S: 503 5.5.1 *
            C: DATA
            S: 503 5.5.1 *
            C: EHLO client.example
            S: 250-*
            C: RCPT TO:<bob@mail.example>
            S: 503 5.5.1 *
            C: DATA
            S: 503 5.5.1 *
            C: MAIL FROM:<ann@client.example>
            S: 250 2.1.0 *
            C: MAIL FROM:<ann@client.example>
            S: 503 5.5.1 *
            C: DATA
            S: 503 5.5.1 *
            C: RCPT TO:<bob@mail.example>
            S: 250 2.1.5 *
            C: NOOP
            S: 250 2.0.0 *
            C: VRFY bob
            S: 252 2.* *
            C: MAIL FROM:<ann@client.example>
            S: 503 5.5.1 *
            C: DATA
            S: 354 *
            C: .
            S: 250 2.0.0 *
            C: QUIT
            S: 221 2.0.0 *
            E:
        """)

    def test_what_drops_a_transaction(self):
        """RFC 5321 4.1.4: EHLO, HELO and RSET do, and the end of a message."""
        for line, reply in (("RSET", "250 2.0.0 *"), ("EHLO client.example", "250-*"),
                            ("HELO client.example", "250 *")):
            with self.subTest(line):
                self.play(f"""
                    B: RCPT
                    C: {line}
                    S: {reply}
                    C: RCPT TO:<bob@mail.example>
                    S: 503 5.5.1 *
                    C: DATA
                    S: 503 5.5.1 *
                    C: MAIL FROM:<ann@client.example>
                    S: 250 2.1.0 *
                """)

    def test_several_messages(self):
        kept = self.play("""
            B: DATA
            C: one
            C: .
            S: 250 2.0.0 Kept as *
            C: RCPT TO:<bob@mail.example>
            S: 503 5.5.1 *
            C: MAIL FROM:<>
            C: RCPT TO:<eve@mail.example>
            C: DATA
            S: 250 2.1.0 *
            S: 250 2.1.5 *
            S: 354 *
            C: two
            C: .
            S: 250 2.0.0 Kept as *
            C: QUIT
            S: 221 2.0.0 *
            E:
        """)
        self.assertEqual(kept, [b"one\r\n", b"two\r\n"])

    def test_the_reply_names_the_message(self):
        with self.server.connect() as wire:
            wire.ask("EHLO client.example")
            for text in ("first", "second"):
                for line in ("MAIL FROM:<ann@client.example>", "RCPT TO:<bob@mail.example>",
                             "DATA"):
                    wire.ask(line)
                ident = re.fullmatch(r"250 2\.0\.0 Kept as (\d+)",
                                     wire.ask(f"Subject: {text}\r\n\r\n.")).group(1)
                item = self.server.get(f"/mail?mail_id={ident}")
                self.assertEqual((item["mail_subject"], item["mail_from"], item["mail_to"]),
                                 (text, "ann@client.example", ["bob@mail.example"]))

    def test_nothing_follows_quit(self):
        self.play("""
            S: 220 *
            C: QUIT
            C: NOOP
            C: EHLO client.example
            S: 221 2.0.0 *
            E:
        """)

    def test_dot_stuffing(self):
        """RFC 5321 4.5.2: one dot goes from the beginning of a line, and only there."""
        kept = self.play("""
            B: DATA
            C: ..
            C: ...
            C: .. .
            C: .x
            C: a.
            C: a..b
            C: ..end
            C: .
            S: 250 2.0.0 Kept as *
        """)
        self.assertEqual(kept, [b".\r\n..\r\n. .\r\nx\r\na.\r\na..b\r\n.end\r\n"])

    def test_chunks(self):
        """RFC 3030: counted bytes, in which neither dots nor line ends mean anything."""
        kept = self.play(r"""
            B: EHLO
            C: MAIL FROM:<ann@client.example>
            C: RCPT TO:<bob@mail.example>
            C: BDAT 12
            c: Subject: x\r\n
            C: BDAT 7
            c: \r\n.\r\n..
            C: bdat 4 last
            c: x\r\n.
            S: 250 2.1.0 *
            S: 250 2.1.5 *
            S: 250 2.0.0 12 *
            S: 250 2.0.0 7 *
            S: 250 2.0.0 Kept as *
            C: NOOP
            S: 250 2.0.0 *
        """)
        self.assertEqual(kept, [b"Subject: x\r\n\r\n.\r\n..x\r\n."])

    def test_empty_chunks(self):
        for chunks in ("C: BDAT 3 LAST\n c: a\\r\\n", "C: BDAT 3\n c: a\\r\\n\nC: BDAT 0 LAST",
                       "C: BDAT 0\nC: BDAT 3\nc: a\\r\\n\nC: BDAT 0\nC: BDAT 0 LAST"):
            with self.subTest(chunks):
                replies = "\n".join(["S: 250 2.0.0 *"] * chunks.count("BDAT"))
                kept = self.play(f"""
                    B: RCPT
                    {chunks}
                    {replies}
                    C: DATA
                    S: 503 5.5.1 *
                """)
                self.assertEqual(kept, [b"a\r\n"])

    def test_order_of_chunks(self):
        """RFC 3030 2: BDAT needs a recipient; no DATA or RCPT may stand between chunks."""
        kept = self.play(r"""
            B: EHLO
            C: BDAT 6
            c: NOOP\r\n
            S: 503 5.5.1 *
            C: MAIL FROM:<ann@client.example>
            S: 250 2.1.0 *
            C: BDAT 6 LAST
            c: NOOP\r\n
            S: 503 5.5.1 *
            C: RCPT TO:<bob@mail.example>
            S: 250 2.1.5 *
            C: BDAT 3
            c: a\r\n
            S: 250 2.0.0 *
            C: DATA
            S: 503 5.5.1 *
            C: RCPT TO:<eve@mail.example>
            S: 503 5.5.1 *
            C: MAIL FROM:<ann@client.example>
            S: 503 5.5.1 *
            C: NOOP
            S: 250 2.0.0 *
            C: BDAT 3 LAST
            c: b\r\n
            S: 250 2.0.0 Kept as *
            C: BDAT 6 LAST
            c: NOOP\r\n
            S: 503 5.5.1 *
        """)
        self.assertEqual(kept, [b"a\r\nb\r\n"])

    def test_chunks_before_hello_are_no_commands(self):
        """RFC 3030 2: a refused chunk is read all the same, or its bytes become commands."""
        kept = self.play(r"""
            S: 220 *
            C: BDAT 15 LAST
            c: EHLO intruder\r\n
            S: 503 5.5.1 *
            C: MAIL FROM:<ann@client.example>
            S: 503 5.5.1 *
        """)
        self.assertEqual(kept, [])

    def test_reset_drops_chunks(self):
        kept = self.play(r"""
            B: EHLO
            C: MAIL FROM:<ann@client.example>
            C: RCPT TO:<bob@mail.example>
            C: BDAT 5
            c: old\r\n
            C: RSET
            C: MAIL FROM:<ann@client.example>
            C: RCPT TO:<bob@mail.example>
            C: BDAT 5 LAST
            c: new\r\n
            S: 250 2.1.0 *
            S: 250 2.1.5 *
            S: 250 2.0.0 *
            S: 250 2.0.0 *
            S: 250 2.1.0 *
            S: 250 2.1.5 *
            S: 250 2.0.0 Kept as *
        """)
        self.assertEqual(kept, [b"new\r\n"])

    def test_binary(self):
        """RFC 3030 3: BINARYMIME comes by BDAT only, and every byte stays as it is."""
        kept = self.play(r"""
            B: EHLO
            C: MAIL FROM:<ann@client.example> BODY=BINARYMIME
            C: RCPT TO:<bob@mail.example>
            C: DATA
            S: 250 2.1.0 *
            S: 250 2.1.5 *
            S: 503 5.5.1 *
            C: BDAT 16
            c: Subject: b\r\n\r\n\n\r
            C: BDAT 8 LAST
            c: \x00\xff\n.\r\r\n.
            S: 250 2.0.0 *
            S: 250 2.0.0 Kept as *
        """)
        self.assertEqual(kept, [b"Subject: b\r\n\r\n\n\r\0\xff\n.\r\r\n."])

    def test_good_and_bad_in_one_group(self):
        """A pipelined group (RFC 2920) is answered in order, whatever of it is refused."""
        self.play("""
            S: 220 *
            C: EHLO client.example
            C: MAIL FROM:<ann@client.example> SIZE=1
            C: RCPT TO:<>
            C: RCPT TO:<bob@mail.example>
            C: FOO
            C: RCPT TO:<eve@mail.example>
            C: DATA
            S: 250-*
            S: 250 2.1.0 *
            S: 553 5.1.3 *
            S: 250 2.1.5 *
            S: 500 5.5.1 *
            S: 250 2.1.5 *
            S: 354 *
            C: .
            S: 250 2.0.0 Kept as *
        """)

    def test_line_ends_of_the_first_command(self):
        """On loopback, and only there, a first command with a bare LF makes LF the line end."""
        kept = self.play(r"""
            S: 220 *
            C: EHLO localhost
            C: MAIL FROM:<ann@client.example>
            C: RCPT TO:<bob@mail.example>
            C: DATA
            C: Subject: piped
            C:
            C: ..dot
            C: end
            C: .
            C: BDAT 5 LAST
            c: NOOP\x0a
            C: QUIT
            S: 250-*
            S: 250 2.1.0 *
            S: 250 2.1.5 *
            S: 354 *
            S: 250 2.0.0 Kept as *
            S: 503 5.5.1 *
            S: 221 2.0.0 *
            E:
        """, end=b"\n")
        self.assertEqual(kept, [b"Subject: piped\r\n\r\n.dot\r\nend\r\n"])

    def test_bare_line_feeds_in_commands(self):
        for first in (b"", b"NOOP\r\n"):
            for peer in (PEER, "127.0.0.1") if first else (PEER,):
                with self.subTest(first=first, peer=peer):
                    said = self.app.talk(first + b"NOOP\nNOOP\r\n", peer=peer)
                    self.assertEqual([line[:9] for line in said.split(b"\r\n")[1:-1]],
                                     [b"250 2.0.0"] * bool(first) + [b"500 5.5.2", b"250 2.0.0"])


# What is said before, the line, and the beginning of its reply.
WRONG_LINES = (
    ("", "EHLO", "501 5.5.4 "),
    ("", "HELO", "501 5.5.4 "),
    ("", "FOO", "500 5.5.1 "),
    ("", "EXPN staff", "50"),
    ("", "", "500 5.5."),
    ("", " NOOP", "500 5.5."),
    ("", "NOOP\0", "500 5.5.2 "),
    ("", "NOOP a\tb\0", "500 5.5.2 "),
    ("", "NOOP \x1b[2J", "500 5.5.2 "),
    ("", "NOOP\rQUIT", "500 5.5.2 "),
    ("", b"NOOP \xff", "500 5.5.2 "),
    ("", "GET / HTTP/1.1", "421 4.7.0 "),
    ("", "POST / HTTP/1.1", "421 4.7.0 "),
    ("", "VRFY", "501 5.5.4 "),
    ("", "HELP FOO", "504 5.5.4 "),
    ("", "STARTTLS", "502 5.5.1 "),
    ("", "XCLIENT ADDR=192.0.2.1", "550 5.7.0 "),
    (HELLO, "MAIL", "501 5.5.4 "),
    (HELLO, "MAIL FROM", "501 5.5.4 "),
    (HELLO, "MAIL FROM:", "501 5.5.4 "),
    (HELLO, "MAIL TO:<a@b.example>", "501 5.5.4 "),
    (HELLO, "MAIL <a@b.example>", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example", "501 5.5.4 "),
    (HELLO, "MAIL FROM:a@b.example>", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example>SIZE=1", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example><c@d.example>", "501 5.5.4 "),
    (HELLO, 'MAIL FROM:<"a@b.example>', "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a b@c.example>", "553 5.1.7 "),
    (HELLO, "MAIL FROM:<a@b@c.example>", "553 5.1.7 "),
    (HELLO, "MAIL FROM:<a@>", "553 5.1.7 "),
    (HELLO, "MAIL FROM:<@b.example>", "553 5.1.7 "),
    (HELLO, "MAIL FROM:<a@b..example>", "553 5.1.7 "),
    (HELLO, "MAIL FROM:<a@b,example>", "553 5.1.7 "),
    (HELLO, "MAIL FROM:<a@[300.1.1.1]>", "553 5.1.7 "),
    (HELLO, "MAIL FROM:<a@[IPv6:1::2::3]>", "553 5.1.7 "),
    (HELLO, f"MAIL FROM:<{'a' * 1001}@b.example>", "553 5.1.7 "),
    (HELLO, "MAIL FROM:<é@b.example>", "553 5.6.7 "),
    (HELLO, "MAIL FROM:<a@é.example>", "553 5.6.7 "),
    (HELLO, "MAIL FROM:<a@b.example> SIZE=", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> SIZE", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> SIZE=-1", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> SIZE=1k", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> SIZE=²", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> SIZE=" + "9" * 21, "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> SIZE=" + "9" * 20, "552 5.3.4 "),
    (HELLO, "MAIL FROM:<a@b.example> SIZE=52428801", "552 5.3.4 "),
    (HELLO, "MAIL FROM:<a@b.example> BODY", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> BODY=9BIT", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> SMTPUTF8=1", "501 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> RET=HDRS", "555 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> AUTH=<>", "555 5.5.4 "),
    (HELLO, "MAIL FROM:<a@b.example> =", "555 5.5.4 "),
    (SENDER, "RCPT", "501 5.5.4 "),
    (SENDER, "RCPT TO:", "501 5.5.4 "),
    (SENDER, "RCPT FROM:<b@mail.example>", "501 5.5.4 "),
    (SENDER, "RCPT TO:<b@mail.example", "501 5.5.4 "),
    (SENDER, "RCPT TO:<>", "553 5.1.3 "),
    (SENDER, "RCPT TO:<@mail.example>", "553 5.1.3 "),
    (SENDER, "RCPT TO:<b@>", "553 5.1.3 "),
    (SENDER, "RCPT TO:<b c@mail.example>", "553 5.1.3 "),
    (SENDER, "RCPT TO:<b@mail_.example;x>", "553 5.1.3 "),
    (SENDER, "RCPT TO:<é@mail.example>", "553 5.6.7 "),
    (SENDER, "RCPT TO:<b@mail.example> NOTIFY=NEVER", "555 5.5.4 "),
    (SENDER, "RCPT TO:<b@mail.example> ORCPT=rfc822;x", "555 5.5.4 "),
    (RECIPIENT, "DATA now", "501 5.5.4 "),
    (RECIPIENT, "BDAT", "421 4.5.4 "),
    (RECIPIENT, "BDAT x", "421 4.5.4 "),
    (RECIPIENT, "BDAT -1", "421 4.5.4 "),
    (RECIPIENT, "BDAT 5 FIRST", "421 4.5.4 "),
    (RECIPIENT, "BDAT 999999999999999999", "421 4.3.4 "),
)

# What stands in MAIL FROM, and the sender that is kept.
GOOD_SENDERS = (
    ("<a@b.example>", "a@b.example"),
    (" <a@b.example>", "a@b.example"),
    ("a@b.example", "a@b.example"),
    ("a@b.example SIZE=7", "a@b.example"),
    ("<>", ""),
    ("<> SIZE=7", ""),
    ("<Ann.Other+tag@B.Example>", "Ann.Other+tag@B.Example"),
    ("<@hub.example:a@b.example>", "a@b.example"),
    ("<@one.example,@two.example:a@b.example>", "a@b.example"),
    ("<@one.example:>", ""),
    ('<"quoted local"@b.example>', '"quoted local"@b.example'),
    (r'<"a\"b\\c>d@e"@b.example>', r'"a\"b\\c>d@e"@b.example'),
    ('<""@b.example>', '""@b.example'),
    ("<a@[192.0.2.1]>", "a@[192.0.2.1]"),
    ("<a@[IPv6:2001:db8::1]>", "a@[IPv6:2001:db8::1]"),
    ("<!#$%&'*+-/=?^_`{|}~@b.example>", "!#$%&'*+-/=?^_`{|}~@b.example"),
    ("<a..b.@b.example>", "a..b.@b.example"),
    ("<root>", "root"),
    ("<a@b.example.>", "a@b.example."),
    ("<é@b.example> SMTPUTF8", "é@b.example"),
    ("<a@bücher.example> SMTPUTF8 BODY=8BITMIME", "a@bücher.example"),
    ("<a@b.example> SIZE=52428800 BODY=7BIT", "a@b.example"),
    ("<a@b.example> size=0 body=8bitmime smtputf8", "a@b.example"),
    ("<a@b.example>\tSIZE=1", "a@b.example"),
)


class SyntaxTest(unittest.TestCase):
    """How commands are written (RFC 5321 4.1.1, 4.1.2)."""

    @classmethod
    def setUpClass(cls):
        cls.app = Offline()
        cls.addClassCleanup(cls.app.__exit__)

    def begin(self, said=""):
        """Return a dialogue in which that and what has to come before it was said."""
        dialogue = Dialogue(self.app)
        for line in {"": (), HELLO: (HELLO,), SENDER: (HELLO, SENDER),
                     RECIPIENT: (HELLO, SENDER, RECIPIENT)}[said]:
            self.assertEqual(dialogue.ask(line)[:3], "250")
        return dialogue

    def test_wrong_lines(self):
        """Each is answered with one line, and the next command is understood."""
        for said, line, expected in WRONG_LINES:
            with self.subTest(said=said, line=line[:80]):
                dialogue = self.begin(said)
                before = len(dialogue.said)
                dialogue.feed((line if isinstance(line, bytes) else line.encode()) + b"\r\n")
                reply = dialogue.said[before:].decode()
                self.assertTrue(reply.startswith(expected), reply)
                self.assertEqual(reply.count("\r\n"), 1)
                self.assertTrue(reply[:-2].isprintable(), reply)
                self.assertEqual(dialogue.over, expected.startswith("421"))
                if not dialogue.over:
                    self.assertEqual(dialogue.ask("NOOP")[:9], "250 2.0.0")
                dialogue.end()

    def test_good_senders(self):
        for path, expected in GOOD_SENDERS:
            with self.subTest(path):
                dialogue = self.begin(HELLO)
                self.assertEqual(dialogue.ask("MAIL FROM:" + path)[:9], "250 2.1.0")
                dialogue.ask(RECIPIENT)
                dialogue.ask("DATA")
                self.assertEqual(dialogue.ask("\r\n.")[:18], "250 2.0.0 Kept as ")
                dialogue.end()
                message = self.app.store.find(self.app.newest())
                self.assertEqual(message.sender, expected)
                first = self.app.raw(message.id).partition(b"\r\n")[0].decode()
                self.assertEqual(first, f"Return-Path: <{expected}>")

    def test_good_recipients(self):
        for path, expected in GOOD_SENDERS:
            path, _, params = path.partition(" SMTPUTF8")
            path = re.sub(r"(?i)\s+(SIZE|BODY).*", "", path)
            if not expected:
                continue
            with self.subTest(path):
                dialogue = self.begin(HELLO)
                dialogue.ask(SENDER + " SMTPUTF8" * (not path.isascii()))
                self.assertEqual(dialogue.ask("RCPT TO:" + path)[:9], "250 2.1.5")
                dialogue.ask("DATA")
                self.assertEqual(dialogue.ask("\r\n.")[:18], "250 2.0.0 Kept as ")
                dialogue.end()
                message = self.app.store.find(self.app.newest())
                self.assertEqual(message.recipients, expected)

    def test_every_reply_has_a_status(self):
        """RFC 2034 4: but the greeting, the answers to HELO and EHLO, and what is not 2, 4, 5."""
        for said, line, _ in (*WRONG_LINES, ("", "NOOP", ""), ("", "HELP", ""), ("", "RSET", ""),
                              ("", "HELP MAIL", ""), ("", "VRFY bob", ""), ("", "QUIT", ""),
                              (RECIPIENT, "RSET", ""), (RECIPIENT, "BDAT 0", ""),
                              (RECIPIENT, "BDAT 0 LAST", ""), (RECIPIENT, "DATA\r\n.", "")):
            with self.subTest(line[:80]):
                dialogue = self.begin(said)
                before = len(dialogue.said)
                dialogue.feed((line if isinstance(line, bytes) else line.encode()) + b"\r\n")
                for reply in dialogue.said[before:].decode().split("\r\n")[:-1]:
                    if reply.startswith("354 "):
                        continue
                    match = re.match(r"([245])\d\d[ -]([245])\.\d{1,3}\.\d{1,3} \S", reply)
                    self.assertTrue(match and match.group(1) == match.group(2), reply)
                dialogue.end()

    def test_help_names_every_command(self):
        dialogue = self.begin()
        words = dialogue.ask("HELP").split()
        for verb in ("EHLO", "HELO", "MAIL", "RCPT", "DATA", "BDAT", "RSET", "NOOP", "VRFY",
                     "HELP", "QUIT", "STARTTLS", "XCLIENT"):
            self.assertIn(verb, words)
            self.assertRegex(dialogue.ask("HELP " + verb), rf"\A214 2\.0\.0 {verb}\b.*\r\n\Z")
        dialogue.end()


class HostTest(TranscriptCase):
    """--server_host: whose mail is taken."""

    options = ("--server_host", "Example.COM", "bücher.example", "[192.0.2.1]",
               "[IPv6:2001:DB8::1]")
    ours = ("bob@example.com", "BOB@EXAMPLE.COM", "bob@example.com.", "postmaster", "PostMaster",
            "postmaster@example.com", '"a b"@example.com', "bob@xn--bcher-kva.example",
            "bob@XN--BCHER-KVA.example", "bob@bücher.example", "bob@BÜCHER.EXAMPLE",
            "bob@[192.0.2.1]", "bob@[IPv6:2001:db8::1]", "bob@[ipv6:2001:db8:0:0::1]",
            "@hub.example:bob@example.com")
    not_ours = ("bob@example.org", "bob@sub.example.com", "bob@example.com.org", "bob@ample.com",
                "bob@xexample.com", "bob@com", "bob", "root", "postmaster@example.org",
                '"bob@example.com"@evil.example', "bob%example.com@evil.example",
                "bob@bucher.example", "bob@[192.0.2.2]", "bob@[IPv6:2001:db8::2]", "bob@192.0.2.1",
                "@example.com:bob@evil.example", "evil.example!bob")

    def test_recipients(self):
        for address, expected in [(address, "250 2.1.5 ") for address in self.ours] + [
                (address, "550 5.7.1 ") for address in self.not_ours]:
            with self.subTest(address):
                dialogue = Dialogue(self.app)
                dialogue.ask(HELLO)
                dialogue.ask(SENDER + " SMTPUTF8")
                reply = dialogue.ask(f"RCPT TO:<{address}>")
                self.assertTrue(reply.startswith(expected), reply)
                dialogue.end()

    def test_any_sender(self):
        for sender in ("bob@example.com", "eve@evil.example", ""):
            self.assertRegex(self.app.talk(f"{HELLO}\r\nMAIL FROM:<{sender}>\r\n".encode()),
                             rb"\r\n250 2\.1\.0 [^\r]*\r\n\Z")

    def test_some_good_and_some_bad(self):
        self.play("""
            S: 220 *
            C: EHLO client.example
            C: MAIL FROM:<ann@client.example>
            C: RCPT TO:<eve@evil.example>
            C: RCPT TO:<bob@example.com>
            C: RCPT TO:<eve@other.example>
            C: RCPT TO:<postmaster>
            C: DATA
            S: 250-*
            S: 250 2.1.0 *
            S: 550 5.7.1 *
            S: 250 2.1.5 *
            S: 550 5.7.1 *
            S: 250 2.1.5 *
            S: 354 *
            C: .
            S: 250 2.0.0 Kept as *
        """)
        for item in (self.server.get(f"/mail?mail_id={self.newest()}"),):
            self.assertEqual(item["mail_to"], ["bob@example.com", "postmaster"])
        row = self.app.store.find(self.app.newest())
        self.assertEqual(row.recipients.split("\n"), ["bob@example.com", "postmaster"])

    def test_only_bad(self):
        kept = self.play("""
            S: 220 *
            C: EHLO client.example
            C: MAIL FROM:<ann@client.example>
            C: RCPT TO:<eve@evil.example>
            S: 250-*
            S: 250 2.1.0 *
            S: 550 5.7.1 *
            C: DATA
            S: 503 5.5.1 *
            C: RSET
            S: 250 2.0.0 *
        """)
        self.assertEqual(kept, [])


class LMTPTest(TranscriptCase):
    """RFC 2033: LHLO, and a reply for each recipient."""

    kind = "lmtp"
    options = ("--lmtp_port", "0", "--lmtp_socket", "lmtp.sock", "--server_host", "mail.example",
               "--max_size", "1000")

    def test_a_reply_for_each_recipient(self):
        kept = self.play(r"""
            S: 220 mx.example.com LMTP *
            C: EHLO client.example
            S: 500 5.5.1 *
            C: HELO client.example
            S: 500 5.5.1 *
            C: MAIL FROM:<ann@client.example>
            S: 503 5.5.1 *
            C: LHLO
            S: 501 5.5.4 *
            C: LHLO client.example
            S: 250-*
            C: DATA
            S: 503 5.5.1 *
            C: MAIL FROM:<ann@client.example>
            C: RCPT TO:<eve@evil.example>
            C: DATA
            S: 250 2.1.0 *
            S: 550 5.7.1 *
            S: 503 5.5.1 *
            C: RCPT TO:<bob@mail.example>
            C: RCPT TO:<eve@evil.example>
            C: RCPT TO:<tom@mail.example>
            C: RCPT TO:<bob@mail.example>
            C: DATA
            S: 250 2.1.5 *
            S: 550 5.7.1 *
            S: 250 2.1.5 *
            S: 250 2.1.5 *
            S: 354 *
            C: one
            C: .
            S: 250 2.0.0 Kept as *
            S: 250 2.0.0 Kept as *
            S: 250 2.0.0 Kept as *
            C: MAIL FROM:<>
            C: RCPT TO:<bob@mail.example>
            C: RCPT TO:<tom@mail.example>
            C: BDAT 2
            c: tw
            C: BDAT 3 LAST
            c: o\r\n
            S: 250 2.1.0 *
            S: 250 2.1.5 *
            S: 250 2.1.5 *
            S: 250 2.0.0 *
            S: 250 2.0.0 Kept as *
            S: 250 2.0.0 Kept as *
            C: NOOP
            S: 250 2.0.0 *
            C: QUIT
            S: 221 2.0.0 *
            E:
        """)
        self.assertEqual(kept, [b"one\r\n", b"two\r\n"])

    def test_a_refusal_for_each_recipient(self):
        kept = self.play(f"""
            S: 220 *
            C: LHLO client.example
            C: MAIL FROM:<ann@client.example>
            C: RCPT TO:<bob@mail.example>
            C: RCPT TO:<tom@mail.example>
            C: DATA
            S: 250-*
            S: 250 2.1.0 *
            S: 250 2.1.5 *
            S: 250 2.1.5 *
            S: 354 *
            C: {"x" * 1000}
            C: .
            S: 552 5.3.4 *
            S: 552 5.3.4 *
            C: NOOP
            S: 250 2.0.0 *
        """)
        self.assertEqual(kept, [])

    def test_help(self):
        dialogue = Dialogue(self.app, kind=pegmail.LMTPSession)
        words = dialogue.ask("HELP").split()
        dialogue.end()
        self.assertIn("LHLO", words)
        self.assertFalse({"EHLO", "HELO"} & set(words), words)

    def test_extensions(self):
        lines = Dialogue(self.app, kind=pegmail.LMTPSession).ask("LHLO x").split("\r\n")
        for name in ("PIPELINING", "ENHANCEDSTATUSCODES", "8BITMIME", "SIZE 1000"):
            self.assertIn(name, [line[4:] for line in lines])

    def test_unix_socket(self):
        """The socket is the user's own; the peer counts as this host."""
        path = os.path.join(self.server.folder, "lmtp.sock")
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        before = self.newest()
        with Wire(path) as wire:
            self.assertTrue(wire.greeting.startswith("220 mx.example.com LMTP "))
            self.assertEqual(wire.ask("LHLO client.example")[:4], "250-")
            wire.send("MAIL FROM:<a@b.example>\r\nRCPT TO:<bob@mail.example>\r\n"
                      "RCPT TO:<tom@mail.example>\r\nDATA\r\n")
            self.assertEqual([wire.reply()[:3] for _ in range(4)], ["250", "250", "250", "354"])
            wire.send("Subject: unix\r\n\r\n.\r\nQUIT\r\n")
            self.assertRegex(wire.rest(),
                             rb"\A(250 2\.0\.0 Kept as \d+\r\n){2}221 2\.0\.0 .*\r\n\Z")
        raw, = self.raw_since(before)
        self.assertIn(b"Received: from client.example ([127.0.0.1])\r\n"
                      b"\tby mx.example.com (pegmail) with LMTP\r\n", raw)


# =====================================================================================
# 8. Delivery: from a received message to the store, and onward
# =====================================================================================

class TraceTest(unittest.TestCase):
    """What is put on top of a message (RFC 5321 4.4), and loops (6.3)."""

    @classmethod
    def setUpClass(cls):
        cls.app = Offline("--hostname", "mx.example.com")
        cls.addClassCleanup(cls.app.__exit__)

    def keep(self, *lines, content=b"Subject: x\r\n\r\n", peer=PEER, kind=pegmail.SMTPSession,
             said=rb"\r\n250 2\.0\.0 Kept as \d+\r\n\Z"):
        """Have a message kept; return its bytes."""
        data = "".join(line + "\r\n" for line in lines).encode() + b"DATA\r\n" + content + b".\r\n"
        self.assertRegex(self.app.talk(data, peer=peer, kind=kind), said)
        return self.app.raw(self.app.newest())

    def test_the_fields(self):
        begun = int(time.time())
        raw = self.keep(HELLO, SENDER, RECIPIENT)
        match = re.fullmatch(
            rb"Return-Path: <ann@client\.example>\r\n"
            rb"Received: from client\.example \(\[192\.0\.2\.9\]\)\r\n"
            rb"\tby mx\.example\.com \(pegmail\) with ESMTP\r\n"
            rb"\tid 0badcafe\.1\r\n\tfor <bob@mail\.example>;\r\n\t([^\r\n]+)\r\n"
            rb"Subject: x\r\n\r\n", raw)
        self.assertTrue(match, raw)
        date = pegmail.email.utils.parsedate_to_datetime(match.group(1).decode()).timestamp()
        self.assertTrue(begun <= date <= time.time(), match.group(1))

    def test_with(self):
        """RFC 3848 and 6531: the protocol; the version and cipher of TLS in a comment."""
        tls = b" (TLSv1.3 cipher TLS_AES_256_GCM_SHA384 bits 256)"
        for hello, params, secure, word in (
                ("HELO c", "", 0, b"SMTP"), ("EHLO c", "", 0, b"ESMTP"),
                ("EHLO c", " SMTPUTF8", 0, b"UTF8SMTP"), ("EHLO c", "", 1, b"ESMTPS"),
                ("EHLO c", " SMTPUTF8", 1, b"UTF8SMTPS"), ("LHLO c", "", 0, b"LMTP"),
                ("LHLO c", " SMTPUTF8", 0, b"UTF8LMTP"), ("LHLO c", "", 1, b"LMTPS"),
                ("LHLO c", " SMTPUTF8", 1, b"UTF8LMTPS")):
            with self.subTest(word):
                kind = pegmail.LMTPSession if hello[0] == "L" else pegmail.SMTPSession
                dialogue = Dialogue(self.app, kind=kind)
                dialogue.session.tls_offered = True
                for line in ["STARTTLS"] * secure + [hello, SENDER + params, RECIPIENT, "DATA"]:
                    self.assertIn(dialogue.ask(line)[:3], ("220", "250", "354"))
                self.assertEqual(dialogue.ask(".")[:18], "250 2.0.0 Kept as ")
                dialogue.end()
                self.assertIn(b" with " + word + tls * secure + b"\r\n",
                              self.app.raw(self.app.newest()))

    def test_for(self):
        """Only a sole recipient is named: others are nobody's business."""
        for number in (1, 2, 3):
            raw = self.keep(HELLO, SENDER, *(f"RCPT TO:<b{n}@mail.example>" for n in range(number)))
            self.assertEqual(b"for <b0@mail.example>" in raw, number == 1)
            self.assertEqual(b"mail.example>" in raw, number == 1)

    def test_ids(self):
        """Each message of a session has an id of its own."""
        said = self.app.talk(TRANSACTION + b".\r\n" + TRANSACTION + b".\r\n")
        self.assertEqual(said.count(b"Kept as"), 2)
        ids = [re.search(rb"\tid (\S+)", self.app.raw(self.app.newest() - back)).group(1)
               for back in (0, 1)]
        self.assertEqual(len(set(ids)), 2)

    def test_hostile_names(self):
        """Nothing a client says of itself ends a field, or forges a clause."""
        for name in ("a)(", "x; Mon, 1 Jan 2024", "é", "<script>", "a" * 1000, "[192.0.2.1]",
                     "by evil.example", "a\tb", "x\\", '"', "(((", "-"):
            with self.subTest(name[:20]):
                raw = self.keep("EHLO " + name, SENDER, RECIPIENT)
                self.assertEqual(content_of(raw), b"Subject: x\r\n\r\n")
                top = raw.partition(b"\r\n\tby ")[0].partition(b"Received: ")[2]
                self.assertRegex(top, rb"\Afrom [A-Za-z0-9_.:\[\]?-]{1,255} \(\[192\.0\.2\.9\]\)\Z")
        raw = self.keep(HELLO, r'MAIL FROM:<"a\>\"b> Received: x"@c.example>',
                        r'RCPT TO:<"x;\"y"@mail.example>')
        self.assertTrue(raw.startswith(rb'Return-Path: <"a\>\"b> Received: x"@c.example>' b"\r\n"))
        self.assertEqual(raw.count(b"\r\nReceived: "), 1)

    def test_given_trace_fields_stay(self):
        content = b"Return-Path: <old@x.example>\r\nReceived: old\r\n\r\n"
        self.assertEqual(content_of(self.keep(HELLO, SENDER, RECIPIENT, content=content)), content)

    def test_loops(self):
        """More than 100 Received fields are a loop, wherever in the header they stand."""
        hop = b"Received: from a by b; Mon, 1 Jan 2024 00:00:00 +0000\r\n"
        fat = b"RECEIVED: from a\r\n\tby b\r\nX-Seal: " + b"x" * 2000 + b"\r\n"
        for name, content, refused in (
                ("100", hop * 100 + b"\r\n", False), ("101", hop * 101 + b"\r\n", True),
                ("101 and no body", hop * 101, True), ("100 fat", fat * 100 + b"\r\n", False),
                ("101 fat", fat * 101 + b"\r\n", True),
                ("in the body", b"\r\n" + hop * 200, False),
                ("in a later part", b"X: y\r\n\r\n" + fat * 200, False),
                ("folded", b"X: y\r\n" + b" " + b"\r\n ".join([hop[:-2]] * 200) + b"\r\n\r\n",
                 False)):
            for cut in (len(content) + 1000, 65536, 1000):
                with self.subTest(name, cut=cut):
                    data = TRANSACTION + content + b".\r\nNOOP\r\n"
                    said = self.app.talk(*(data[place:place + cut]
                                           for place in range(0, len(data), cut)))
                    self.assertEqual([line[:9] for line in said.split(b"\r\n")[-3:-1]],
                                     [b"554 5.4.6" if refused else b"250 2.0.0", b"250 2.0.0"])


def kept_form(wire):
    """Return what is kept of content on the wire, its end left out: by the book, and slowly."""
    lines = [line[1:] if line.startswith(b".") else line for line in wire.split(b"\r\n")]
    text = b"\r\n".join(lines).replace(b"\r\r\n", b"\r\n")
    return re.sub(rb"\r(?!\n)", b" ", re.sub(rb"(?<!\r)\n", b"\r\n", text))


# What printers, cron and old devices send after DATA: a name, and the content with its last CRLF.
ODD_MAIL = (
    ("nothing", b""),
    ("one empty line", b"\r\n"),
    ("no body", b"Subject: x\r\n"),
    ("no body but its line", b"Subject: x\r\n\r\n"),
    ("no header", b"\r\nonly text\r\n"),
    ("text at once", b"only text\r\nand more\r\n"),
    ("text that looks like a header later", b"only text\r\nSubject: no\r\n\r\nx\r\n"),
    ("CR CR LF", b"Subject: x\r\r\nTo: y\r\r\n\r\r\nbody\r\r\nend\r\r\n"),
    ("LF", b"Subject: x\nTo: y\n\nbody\nend\r\n"),
    ("CR", b"Subject: x\rTo: y\r\rbody\r\n"),
    ("mixed", b"Subject: x\n\rTo: y\r\n\r\rbody\n\n\r\r\r\n\r\n"),
    ("a megabyte line", b"Subject: x\r\n\r\n" + b"x" * 1000000 + b"\r\n"),
    ("a megabyte line and no header", b"x" * 1000000 + b"\r\n"),
    ("two megabytes of lines and no header", b"\r\n" + (b"y" * 76 + b"\r\n") * 27000),
    ("two megabytes of text at once", b"some text\r\n" + (b"y" * 76 + b"\r\n") * 27000),
    ("NULs", b"Subject: a\0b\r\n\0: c\r\n\r\n\0body\0\r\n\0\r\n"),
    ("8-bit", b"Subject: \xe4\xf6\xfc\r\nFrom: \xff@\xfe\r\n\r\n\xe4\r\n" + bytes(range(128, 256))
     + b"\r\n"),
    ("8-bit UTF-8", "Subject: žluť ☃\r\n\r\n☃\r\n".encode()),
    ("controls", b"Subject: \x01\x1b[2J\x7f\r\n\r\n" + bytes(set(range(32)) - {10, 13}) + b"\r\n"),
    ("a header without colon", b"Subject x\r\nTo: y\r\n\r\nz\r\n"),
    ("a header with an empty name", b": x\r\nSubject: y\r\n\r\n"),
    ("an mbox line", b"From ann Mon Jan  1 00:00:00 2024\r\nSubject: x\r\n\r\n"),
    ("a folded first line", b" folded\r\n\tmore\r\nSubject: x\r\n\r\n"),
    ("white lines in the header", b"Subject: x\r\n \r\n\t\r\nTo: y\r\n\r\nz\r\n"),
    ("duplicates", b"Subject: x\r\n" * 50 + b"\r\n"),
    ("only HTML", b"Content-Type: text/html\r\n\r\n<b>x</b>\r\n"),
    ("an open multipart", b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nx\r\n"),
    ("multipart without boundary", b"Content-Type: multipart/mixed\r\n\r\n--b\r\n\r\nx\r\n"),
    ("broken base64", b"Content-Transfer-Encoding: base64\r\n\r\n!!!=A\r\n"),
    ("an unknown charset", b"Content-Type: text/plain; charset=nope\r\n\r\nx\xe4\r\n"),
    ("an unknown encoding", b"Content-Transfer-Encoding: x-uue\r\n\r\nbegin 644 x\r\n"),
    ("an empty content type", b"Content-Type:\r\n\r\nx\r\n"),
)


class OddMailTest(TranscriptCase):
    """Whatever comes is kept and can be read (8 BITMIME or not, with headers or without)."""

    def test_kept_and_readable(self):
        with self.server.connect() as wire:
            wire.ask(HELLO)
            for name, content in ODD_MAIL:
                with self.subTest(name):
                    for line in ("MAIL FROM:<>", RECIPIENT):
                        self.assertEqual(wire.ask(line)[:3], "250")
                    self.assertEqual(wire.ask("DATA")[:3], "354")
                    wire.send(content + b".\r\n")
                    reply = wire.reply()
                    self.assertRegex(reply, r"\A250 2\.0\.0 Kept as \d+\Z")
                    ident = int(reply.split()[-1])
                    raw = self.raw(ident)
                    self.assertEqual(content_of(raw), kept_form(content))
                    item = self.server.get(f"/mail?mail_id={ident}")
                    self.assertEqual((item["mail_id"], item["mail_from"], item["mail_to"]),
                                     (ident, "", ["bob@mail.example"]))
                    self.assertEqual(item["size"], len(raw))

    def test_by_chunks(self):
        """The same content by BDAT, which needs no stuffing."""
        for name, content in ODD_MAIL:
            with self.subTest(name):
                head = f"{HELLO}\r\n{SENDER}\r\n{RECIPIENT}\r\nBDAT {len(content)} LAST\r\n"
                before = self.app.newest()
                said = self.app.talk(head.encode() + content)
                self.assertRegex(said, rb"\r\n250 2\.0\.0 Kept as \d+\r\n\Z")
                kept, = self.app.all_raw(before)
                stuffed = re.sub(rb"(\A|\r\n)\.", rb"\1..", content)
                self.assertEqual(kept, kept_form(stuffed))


# -- Limits --

def in_cuts(data, size):
    """Return data in pieces of a size."""
    return [data[place:place + size] for place in range(0, len(data), size)]


class LimitTest(unittest.TestCase):
    """Each limit has its reply, and what comes after a refusal is understood."""

    def codes(self, app, *data):
        """Return the status of each reply to bytes, from the one behind 354 on."""
        said = app.talk(*data)
        self.assertIn(b"\r\n354 ", said)
        return [line[:9].decode() for line in said.split(b"\r\n354 ")[1].split(b"\r\n")[1:-1]]

    def test_command_line(self):
        with Offline() as app:
            for length, status in ((510, "250 2.0.0"), (2040, "250 2.0.0"), (2049, "500 5.5.2"),
                                   (2100, "500 5.5.2"), (10000, "500 5.5.2"), (65000, "500 5.5.2")):
                line = b"NOOP " + b"x" * (length - 5) + b"\r\nHELP\r\n"
                for cut in (1 << 20, 1000, 1):
                    with self.subTest(length=length, cut=cut):
                        said = app.talk(*in_cuts(line, cut)).decode().split("\r\n")
                        self.assertEqual([line[:9] for line in said[1:-1]], [status, "214 2.0.0"])

    def test_size(self):
        """RFC 1870 6: 552 at MAIL, and where the client kept its size to itself."""
        for limit in (1000, 70000, 300000):
            with Offline("--max_size", str(limit)) as app:
                body = b"Subject: x\r\n\r\n" + b"y" * 60 + b"\r\n"
                body += (b"z" * 98 + b"\r\n") * ((limit - len(body)) // 100)
                body += b"w" * (limit - len(body) - 2) + b"\r\n"
                self.assertEqual(len(body), limit)
                for cut in (1 << 20, 65536, 777):
                    with self.subTest(limit=limit, cut=cut):
                        for content, status in ((body, "250 2.0.0"), (b"x" + body, "552 5.3.4")):
                            data = TRANSACTION + content + b".\r\nNOOP\r\n"
                            self.assertEqual(self.codes(app, *in_cuts(data, cut)),
                                             [status, "250 2.0.0"])
                            chunk = b"BDAT %d LAST\r\n%b" % (len(content), content)
                            data = TRANSACTION.replace(b"DATA\r\n", chunk) + b"NOOP\r\n"
                            said = app.talk(*in_cuts(data, cut)).decode().split("\r\n")
                            self.assertEqual([line[:9] for line in said[-3:-1]],
                                             [status, "250 2.0.0"])
                for announced, status in ((limit, "250 2.1.0"), (limit + 1, "552 5.3.4")):
                    said = app.talk(f"{HELLO}\r\n{SENDER} SIZE={announced}\r\n".encode())
                    self.assertEqual(said.split(b"\r\n")[-2][:9].decode(), status)
                self.assertEqual({len(raw) for raw in app.all_raw()}, {limit})

    def test_far_too_large(self):
        """Past twice the size there is no point in reading on."""
        with Offline("--max_size", "1000") as app:
            said = app.talk(TRANSACTION, *[b"x" * 98 + b"\r\n"] * 2000)
            self.assertRegex(said, rb"\r\n421 4\.3\.4 [^\r]*\r\n\Z")
            self.assertEqual(app.store.count(pegmail.Filter()), 0)

    def test_size_of_chunks(self):
        """A refused chunk ends the transaction; those already on their way are read away."""
        begin = f"HELO c\r\n{SENDER}\r\n{RECIPIENT}\r\n".encode()
        with Offline("--max_size", "1000") as app:
            for chunks, expected in (
                    ((600, 600, 600, 0), ("250 2.0.0", "552 5.3.4", "503 5.5.1", "503 5.5.1")),
                    ((1001, 5), ("552 5.3.4", "503 5.5.1")),
                    ((600, 600), ("250 2.0.0", "552 5.3.4"))):
                data = begin + b"".join(
                    b"BDAT %d%b\r\n%b" % (size, b" LAST" * (place == len(chunks)), b"x" * size)
                    for place, size in enumerate(chunks, 1)) + b"NOOP\r\n" + begin
                for cut in (1 << 20, 7):
                    with self.subTest(chunks, cut=cut):
                        said = app.talk(*in_cuts(data, cut)).decode().split("\r\n")
                        self.assertEqual([line[:9] for line in said[4:-4]],
                                         [*expected, "250 2.0.0"])
            self.assertEqual(app.store.count(pegmail.Filter()), 0)

    def test_line(self):
        with Offline("--max_line", "1000") as app:
            for head in (b"", b"Subject: x\r\n\r\n", b"\r\n" + b"y\r\n" * 30000):
                for length, status in ((998, "250 2.0.0"), (1001, "554 5.6.0"),
                                       (70000, "554 5.6.0")):
                    content = head + b"x" * length + b"\r\nend\r\n"
                    for cut in (1 << 20, 65536, 997):
                        with self.subTest(head=head[:20], length=length, cut=cut):
                            data = TRANSACTION + content + b".\r\nNOOP\r\n"
                            self.assertEqual(self.codes(app, *in_cuts(data, cut)),
                                             [status, "250 2.0.0"])

    def test_line_by_default(self):
        """A megabyte is fine, two are not."""
        with Offline() as app:
            for length, status in ((1000000, "250 2.0.0"), (2000000, "554 5.6.0")):
                data = TRANSACTION + b"x: y\r\n\r\n" + b"x" * length + b"\r\n.\r\nNOOP\r\n"
                self.assertEqual(self.codes(app, *in_cuts(data, 65536)), [status, "250 2.0.0"])

    def test_header_size(self):
        """The header has its limit, wherever it is cut; the body has none of its own."""
        for limit in (5000, 100000):
            with Offline("--max_header", str(limit)) as app:
                for length, body, status in (
                        (limit - 10, b"", "250 2.0.0"), (limit - 10, b"\r\n", "250 2.0.0"),
                        (limit - 10, b"\r\n" + b"z\r\n" * limit, "250 2.0.0"),
                        (10, b"\r\n" + b"z\r\n" * limit, "250 2.0.0"),
                        (0, b"\r\n" + b"z\r\n" * limit, "250 2.0.0"),
                        (limit + 10, b"\r\n", "552 5.3.4"), (limit + 10, b"", "552 5.3.4"),
                        (limit + 10, b"\r\n" + b"z\r\n" * limit, "552 5.3.4"),
                        (3 * limit, b"\r\n", "552 5.3.4"),
                        (3 * limit, b"\r\n" + b"z\r\n" * 10, "552 5.3.4")):
                    content = b"A: " + b"x" * (min(limit, length) % 80) + b"\r\n"
                    content += (b"B: " + b"y" * 75 + b"\r\n") * ((length - len(content)) // 80)
                    content = content if length else b""
                    for cut in (1 << 22, 65536, 50000):
                        with self.subTest(limit=limit, length=length, body=body[:9], cut=cut):
                            data = TRANSACTION + content + body + b".\r\nNOOP\r\n"
                            self.assertEqual(self.codes(app, *in_cuts(data, cut)),
                                             [status, "250 2.0.0"])

    def test_header_count(self):
        with Offline("--max_header", "1M") as app:
            for field in (b"A: b\r\n", b"A: %b\r\n" % (b"x" * 10)):
                for number, status in ((10000, "250 2.0.0"), (10001, "554 5.6.0")):
                    data = TRANSACTION + field * number + b"\r\nx\r\n.\r\nNOOP\r\n"
                    for cut in (1 << 22, 65536, 50000):
                        with self.subTest(field=len(field), number=number, cut=cut):
                            self.assertEqual(self.codes(app, *in_cuts(data, cut)),
                                             [status, "250 2.0.0"])

    def test_recipients(self):
        """RFC 5321 4.5.3.1.10: 452 for one too many, and the message for the others."""
        with Offline("--max_recipients", "100") as app:
            self.assertIn(b"LIMITS RCPTMAX=100", app.talk(b"EHLO x\r\n"))
            names = [f"b{number}@mail.example" for number in range(102)]
            said = app.talk("\r\n".join([HELLO, SENDER, *(f"RCPT TO:<{name}>" for name in names),
                                         "DATA", ".", "NOOP", ""]).encode())
            replies = [line[:9].decode() for line in said.split(b"\r\n")[:-1]]
            self.assertEqual(replies[-105:-3], ["250 2.1.5"] * 100 + ["452 4.5.3"] * 2)
            self.assertEqual(replies[-2:], ["250 2.0.0"] * 2)
            self.assertEqual(app.store.find(1).recipients.split("\n"), names[:100])

    def test_errors(self):
        for line in (b"FOO", b"MAIL FROM:<a b>", b"NOOP \xff", b"DATA", b"x" * 3000, b"RCPT"):
            with self.subTest(line[:20]), Offline("--max_errors", "3") as app:
                said = app.talk((b"NOOP\r\n" + line + b"\r\n") * 5).decode().split("\r\n")
                replies = [text[:9] for text in said[1:-1]]
                self.assertEqual(replies[::2][:3], ["250 2.0.0"] * 3)
                self.assertEqual({text[:1] for text in replies[1::2][:3]}, {"5"})
                self.assertEqual(replies[6:], ["421 4.7.0"])

    def test_errors_of_content(self):
        with Offline("--max_errors", "2", "--max_size", "10") as app:
            data = (TRANSACTION + b"x" * 20 + b"\r\n.\r\n") * 3
            said = app.talk(data).decode().split("\r\n")
            self.assertEqual([text[:9] for text in said[-3:-1]], ["552 5.3.4", "421 4.7.0"])


class StoreTroubleTest(unittest.TestCase):
    """When the store cannot take a message: refused for now, in sync, and soon fine again."""

    def test_no_place_for_large_messages(self):
        content = b"Subject: x\r\n\r\n" + b"y\r\n" * 50000
        chunk = b"BDAT %d LAST\r\n%b" % (len(content), content)
        begin = f"HELO c\r\n{SENDER}\r\n{RECIPIENT}\r\n".encode()
        with Offline() as app:
            folder = os.path.join(app.folder, "media", "tmp")
            for data in (begin + b"DATA\r\n" + content + b".\r\nNOOP\r\n",
                         begin + chunk + b"NOOP\r\n"):
                for there, status in ((False, b"451 4.3.0"), (True, b"250 2.0.0")):
                    for cut in (len(data), 65536):
                        with self.subTest(there=there, cut=cut):
                            if not there:
                                os.rmdir(folder)
                                open(folder, "x").close()       # a file is in its way
                            said = app.talk(*in_cuts(data, cut))
                            if not there:
                                os.unlink(folder)
                                os.makedirs(folder)
                            self.assertEqual([line[:9] for line in said.split(b"\r\n")[-3:-1]],
                                             [status, b"250 2.0.0"])
            self.assertTrue(app.all_raw() == [content] * 4, "not kept as sent")
            self.assertEqual(os.listdir(folder), [])

    def test_no_database(self):
        """A change that the database refuses is a 451, and the next one is kept."""
        with Offline() as app:
            db = sqlite3.connect(app.store.db_path)
            with contextlib.closing(db):
                db.execute("CREATE TRIGGER trouble BEFORE INSERT ON message "
                           "BEGIN SELECT raise(ABORT, 'trouble'); END")
                db.commit()
                for kind, hello, replies in ((pegmail.SMTPSession, b"HELO", 1),
                                             (pegmail.LMTPSession, b"LHLO", 2)):
                    data = (TRANSACTION.replace(b"EHLO", hello).replace(
                        b"DATA", RECIPIENT.encode() + b"\r\nDATA") + b"x\r\n.\r\nNOOP\r\n")
                    said = app.talk(data, kind=kind)
                    self.assertEqual([line[:9] for line in said.split(b"\r\n354 ")[1].split(
                        b"\r\n")[1:-1]], [b"451 4.3.0"] * replies + [b"250 2.0.0"])
                    self.assertNotIn(b"trouble", said)
                db.execute("DROP TRIGGER trouble")
                db.commit()
            self.assertRegex(app.talk(data, kind=kind), rb"(250 2\.0\.0 Kept as \d+\r\n){2}250 2")
            self.assertEqual(len(app.all_raw()), 1)


class ConnectionLimitTest(unittest.TestCase):
    """How many may come, and how long they may stay."""

    def test_connections(self):
        """One too many hears 421 4.7.0 at once; when another goes, there is room again."""
        with Running("--max_connections", "3", "--max_connections_per_peer", "2") as server:
            with contextlib.ExitStack() as stack:
                def come(source):
                    wire = stack.enter_context(server.connect(source=source))
                    return wire, wire.greeting
                first, greeting = come("127.0.0.1")
                self.assertEqual(greeting[:4], "220 ")
                self.assertEqual(come("127.0.0.1")[1][:4], "220 ")
                for source, reply in (("127.0.0.1", "421 4.7.0 mx.example.com "),
                                      ("127.0.0.1", "421 4.7.0 mx.example.com "),
                                      ("127.0.0.2", "220 mx.example.com "),
                                      ("127.0.0.3", "421 4.7.0 mx.example.com ")):
                    wire, greeting = come(source)
                    self.assertEqual(greeting[:len(reply)], reply)
                    if reply[0] == "4":
                        self.assertEqual(wire.rest(), b"")
                self.assertEqual(first.ask("QUIT")[:10], "221 2.0.0 ")
                first.socket.close()

                def again():
                    with server.connect() as wire:
                        return wire.greeting.startswith("220 ")
                until(again, "room for another")
                self.assertEqual(server.get("/count"), {"count": 0})
            self.assertEqual(server.stop(), 0)

    def test_idle_time(self):
        """421 4.4.2, wherever the client falls silent; a message cut off is not kept."""
        begin = [HELLO, SENDER, RECIPIENT]
        certificate = Certificate()
        self.addCleanup(certificate.remove)
        with Running("--timeout", "1", "--starttls", "optional", *certificate.options) as server:
            with contextlib.ExitStack() as stack:
                wires = []
                for said, half in ((begin[:0], ""), (begin[:1], ""), (begin, "NOO"),
                                   (begin + ["DATA"], "text\r\n.\r"), (begin, "BDAT 9\r\nab")):
                    wire = stack.enter_context(server.connect())
                    for line in said:
                        self.assertIn(wire.ask(line)[:3], ("250", "354"))
                    wire.send(half)
                    wires.append((wire, said, half))
                silent, secure = (stack.enter_context(server.connect()) for _ in range(2))
                for wire in (silent, secure):
                    self.assertEqual(wire.ask("STARTTLS")[:3], "220")
                secure.socket = client_context().wrap_socket(secure.socket)
                for wire, said, half in wires + [(secure, "TLS", "")]:
                    with self.subTest(said=said, half=half):
                        self.assertRegex(wire.rest(),
                                         rb"\A421 4\.4\.2 mx\.example\.com [^\r]*\r\n\Z")
                self.assertEqual(silent.rest(), b"")
                self.assertEqual(server.get("/count"), {"count": 0})
            self.assertEqual(server.stop(), 0)

    def test_total_time(self):
        """A session ends after --max_session however busy it is."""
        with Running("--max_session", "1") as server:
            with server.connect() as wire:
                replies = []

                def ended():
                    replies.append(wire.ask("NOOP"))
                    return not replies[-1].startswith("250 2.0.0")
                until(ended, "the end of the session")
                self.assertRegex(replies[-1], r"\A421 4\.4\.2 mx\.example\.com ")
                self.assertGreater(len(replies), 2)
                self.assertEqual(wire.rest(), b"")
            self.assertEqual(server.stop(), 0)


# -- Smuggling: one message has one end --

# What may stand before and behind a dot; CRLF on both sides is the end, all else is content.
LINE_ENDS = (b"\r\n", b"\n", b"\r", b"\r\r\n", b"\r\r", b"\n\r", b"\n\n", b"\r\n\r", b"\r\0\n",
             b"\0", b"\0\r\n", b"\r\n\0", b"\n\0", b" \n", b"\x0b", b"\x0c", b"\x1a",
             b"\xc2\x85", b"\xe2\x80\xa8", b"")
FORGED = (b"MAIL FROM:<forged@client.example>\r\nRCPT TO:<forged@mail.example>\r\nDATA\r\n"
          b"Subject: forged\r\n\r\nforged")


def smuggled():
    """Yield each content that ends once, and once more for a reader who takes other ends."""
    for before, behind in itertools.product(LINE_ENDS, repeat=2):
        content = b"Subject: one\r\n\r\nfirst" + before + b"." + behind + FORGED
        if b"\r\n.\r\n" not in content:
            yield before, behind, content


class SmugglingTest(TranscriptCase):
    """End of data is CRLF.CRLF and nothing else (CVE-2023-51764 to -51766)."""

    def test_never_two_messages(self):
        """However it comes in, the second message is content of the first."""
        for before, behind, content in smuggled():
            data = TRANSACTION + content + b"\r\n.\r\nNOOP\r\n"
            for peer, cut in ((PEER, len(data)), (PEER, 1), ("127.0.0.1", len(data))):
                with self.subTest(before=before, behind=behind, peer=peer, cut=cut):
                    newest = self.app.newest()
                    said = self.app.talk(*in_cuts(data, cut), peer=peer)
                    self.assertRegex(said.partition(b"\r\n354 ")[2], rb"\A[^\r]*\r\n250 2\.0\.0 "
                                     rb"Kept as %d\r\n250 2\.0\.0 [^\r]*\r\n\Z" % (newest + 1))
                    self.assertEqual(self.app.all_raw(newest), [kept_form(content + b"\r\n")])

    def test_over_a_socket(self):
        before = self.newest()
        contents = [content for _, _, content in smuggled()]
        with self.server.connect() as wire:
            wire.ask(HELLO)
            for content in contents:
                wire.send(TRANSACTION.partition(b"\r\n")[2] + content + b"\r\n.\r\nNOOP\r\n")
                self.assertEqual([wire.reply()[:9] for _ in range(5)],
                                 ["250 2.1.0", "250 2.1.5", "354 End w", "250 2.0.0", "250 2.0.0"])
            self.assertEqual(wire.ask("QUIT")[:3], "221")
            self.assertEqual(wire.rest(), b"")
        self.assertEqual(self.server.get(f"/filter_count?after={before}"),
                         {"count": len(contents)})
        self.assertEqual(self.server.get("/filter_count?filter_mail_from=forged"), {"count": 0})
        kept = self.raw_since(before)
        self.assertEqual(len(kept), len(contents))
        for raw, content in zip(kept, contents):
            self.assertEqual(content_of(raw), kept_form(content + b"\r\n"))

    def test_reject(self):
        """--bare_newline reject: 554 5.6.0 for a bare LF, and nothing of it is kept."""
        with Offline("--bare_newline", "reject") as app:
            for before, behind, content in smuggled():
                bare = re.search(rb"(?<!\r)\n", re.sub(rb"(\r\n)\.", rb"\1", content))
                data = TRANSACTION + content + b"\r\n.\r\nNOOP\r\n"
                for cut in (len(data), 1):
                    with self.subTest(before=before, behind=behind, cut=cut):
                        newest = app.newest()
                        said = app.talk(*in_cuts(data, cut)).partition(b"\r\n354 ")[2]
                        self.assertEqual(
                            [line[:9] for line in said.split(b"\r\n")[1:-1]],
                            [b"554 5.6.0" if bare else b"250 2.0.0", b"250 2.0.0"])
                        self.assertEqual(app.newest() - newest, not bare)

    def test_lf_sessions(self):
        """A session whose line end is LF has one end of data too, with LF."""
        for before, behind in itertools.product(LINE_ENDS, repeat=2):
            content = b"first" + before + b"." + behind + FORGED.replace(b"\r\n", b"\r\n\0")
            if b"\n.\n" in content:
                continue
            data = TRANSACTION.replace(b"\r\n", b"\n") + content + b"\n.\nNOOP\n"
            for cut in (len(data), 1):
                with self.subTest(before=before, behind=behind, cut=cut):
                    newest = self.app.newest()
                    said = self.app.talk(*in_cuts(data, cut), peer="127.0.0.1")
                    self.assertEqual([line[:9] for line in said.split(b"\r\n")[-3:-1]],
                                     [b"250 2.0.0"] * 2)
                    self.assertEqual(self.app.newest(), newest + 1)

    def test_only_loopback_may_use_lf(self):
        """From elsewhere a bare LF ends nothing, be it in the first command."""
        said = self.app.talk(TRANSACTION.replace(b"\r\n", b"\n") + b"x\n.\nNOOP\r\n", peer=PEER)
        self.assertEqual({line[:9] for line in said.split(b"\r\n")[1:-1]},
                         {b"500 5.5.2", b"250 2.0.0"})

    def test_chunks_hold_anything(self):
        """In counted bytes there is no end to forge."""
        for before, behind in itertools.product(LINE_ENDS, repeat=2):
            content = b"first" + before + b"." + behind + FORGED + b"\r\n.\r\n"
            data = TRANSACTION.partition(b"DATA")[0] + b"BDAT %d LAST\r\n" % len(content)
            newest = self.app.newest()
            said = self.app.talk(data + content + b"NOOP\r\n")
            self.assertEqual([line[:9] for line in said.split(b"\r\n")[-3:-1]], [b"250 2.0.0"] * 2)
            self.assertEqual(self.app.newest(), newest + 1)


# The session that people pipe into a netcat, its addresses as they were before a web page hid them.
NETCAT_MAIL = b"""EHLO localhost
MAIL FROM:<gordon@blackmesa.example>
RCPT TO:<eli@blackmesa.example>
RCPT TO:<isaac@blackmesa.example>
DATA
Subject: ON MY WAY
From: Gordon Freeman <gordon@blackmesa.example>
To: Eli Vance <eli@blackmesa.example>
Cc: Issac Kleiner <isaac@blackmesa.example>

hey guys running l8 2day
on the tram now
cu soon
.
"""


class NetcatTest(TranscriptCase):
    """`echo ... | ncat localhost 1025`: line feeds only, and the sender's side closed at once."""

    def check(self, before, output):
        """Compare what came back, and what is kept."""
        replies = [line for line in output.split("\r\n") if line[3:4] != "-"]
        patterns = ("220 mx.example.com *", "250 *", "250 2.1.0 *", "250 2.1.5 *", "250 2.1.5 *",
                    "354 *", "250 2.0.0 Kept as *", "")
        self.assertEqual(len(replies), len(patterns), output)
        for pattern, reply in zip(patterns, replies):
            self.assertTrue(is_match(pattern, reply), (pattern, reply))
        raw, = self.raw_since(before)
        self.assertEqual(content_of(raw), NETCAT_MAIL.partition(b"DATA\n")[2].replace(
            b"\n", b"\r\n")[:-3])
        item = self.server.get("/latest")
        self.assertEqual((item["mail_subject"], item["mail_from"], item["mail_to"]),
                         ("ON MY WAY", "gordon@blackmesa.example",
                          ["eli@blackmesa.example", "isaac@blackmesa.example"]))
        self.assertEqual(item["mail_body"]["text"].replace("\r\n", "\n"),
                         "hey guys running l8 2day\non the tram now\ncu soon\n")

    def test_socket(self):
        """As netcat does it: all at once, then the end of the stream."""
        for end in (NETCAT_MAIL, NETCAT_MAIL + b"QUIT\n"):
            before = self.newest()
            with self.server.connect(greeting=False) as wire:
                wire.send(end)
                wire.socket.shutdown(socket.SHUT_WR)
                output = wire.rest().decode()
            if end.endswith(b"QUIT\n"):
                output, bye, _ = output.rpartition("221 ")
                self.assertTrue(bye)
            self.check(before, output)

    def test_ncat(self):
        before = self.newest()
        status, output = self.server.run_tool(
            need("ncat"), "localhost", self.server.smtp_port, input=NETCAT_MAIL)
        self.assertEqual(status, 0, output)
        self.check(before, output)


# -- STARTTLS --

AFTER_STARTTLS = ("EHLO injected", "HELO injected", "LHLO injected", SENDER, RECIPIENT, "DATA",
                  "BDAT 5 LAST", "RSET", "NOOP", "VRFY bob", "HELP", "QUIT", "STARTTLS",
                  "XCLIENT ADDR=192.0.2.1", "FOO", "", "\0", " ", "A LOGIN b c",
                  "RSET\r\nMAIL FROM:<forged@client.example>\r\nRCPT TO:<bob@mail.example>\r\nDATA")


class StartTLSTest(TLSCase):
    """RFC 3207: TLS is required, and nothing said before it counts."""

    def test_required(self):
        kept = self.play("""
            S: 220 mx.example.com ESMTP *
            C: EHLO client.example
            S: 250-*
            C: MAIL FROM:<ann@client.example>
            S: 530 5.7.0 *
            C: RCPT TO:<bob@mail.example>
            S: 530 5.7.0 *
            C: DATA
            S: 530 5.7.0 *
            C: NOOP
            S: 250 2.0.0 *
            C: STARTTLS now
            S: 501 5.5.4 *
            C: STARTTLS
            S: 220 2.0.0 *
            C: MAIL FROM:<ann@client.example>
            S: 503 5.5.1 *
            C: STARTTLS
            S: 503 5.5.1 *
            C: EHLO client.example
            S: 250-*
            C: MAIL FROM:<ann@client.example>
            S: 250 2.1.0 *
            C: RCPT TO:<bob@mail.example>
            S: 250 2.1.5 *
            C: DATA
            S: 354 *
            C: secret
            C: .
            S: 250 2.0.0 Kept as *
            C: QUIT
            S: 221 2.0.0 *
            E:
        """)
        self.assertEqual(kept, [b"secret\r\n"])

    def test_chunks_before_tls_are_no_commands(self):
        self.play(r"""
            B: EHLO
            C: BDAT 6 LAST
            c: HELP\r\n
            S: 530 5.7.0 *
            C: NOOP
            S: 250 2.0.0 *
        """)

    def test_when_it_is_offered(self):
        dialogue = Dialogue(self.app)
        self.assertIn("STARTTLS", re.split(r"\r\n250[ -]", dialogue.ask(HELLO).rstrip()))
        self.assertEqual(dialogue.ask("STARTTLS")[:10], "220 2.0.0 ")
        self.assertNotIn("STARTTLS", dialogue.ask(HELLO))
        dialogue.end()

    def test_injection(self):
        """What comes in clear text in the same segment is never answered (CVE-2011-0411)."""
        for hello in ("", HELLO + "\r\n"):
            for verb in AFTER_STARTTLS:
                for end in ("\r\n", ""):
                    with self.subTest(hello=hello, verb=verb, end=end), \
                            self.server.connect() as wire:
                        if hello:
                            self.assertEqual(wire.ask(HELLO)[:4], "250-")
                        data = f"STARTTLS\r\n{verb}{end}"
                        if data == "STARTTLS\r\n":
                            continue
                        wire.send(data)
                        self.assertRegex(wire.rest(), rb"\A421 4\.7\.0 [^\r]*\r\n\Z")
        self.assertEqual(self.server.get("/count?"), self.server.get("/count"))

    def test_injection_byte_by_byte(self):
        """Of a session, too, no byte behind STARTTLS is taken before the handshake is over."""
        for verb in AFTER_STARTTLS[:-1]:
            dialogue = Dialogue(self.app)
            dialogue.session.feed(b"STARTTLS\r\n" if not verb else b"STARTTLS\r\n" + verb.encode()
                                  + b"\r\n")
            wants = dialogue.session.wants
            said = bytes(dialogue.session.outbox)
            dialogue.end()
            if verb:
                self.assertRegex(said, rb"\A421 4\.7\.0 [^\r]*\r\n\Z")
                self.assertIsNone(wants)

    def test_injection_after_the_reply(self):
        """Clear text in place of the handshake ends the connection, with no word of SMTP."""
        for verb in AFTER_STARTTLS:
            with self.subTest(verb), self.server.connect() as wire:
                self.assertEqual(wire.ask("STARTTLS")[:10], "220 2.0.0 ")
                with contextlib.suppress(ConnectionError):
                    wire.send((verb + "\r\n") * 10)
                self.assertNotRegex(wire.rest(), rb"\d\d\d[ -]")

    def test_garbage_in_place_of_the_handshake(self):
        source = random.Random(3207)
        for data in (b"", b"\0", b"\x16", b"\x16\x03\x01", b"\x16\x03\x01\xff\xff" + b"\1" * 70000,
                     b"\x80\x2e\x01\x00\x02" + b"\0" * 41, b"\x15\x03\x03\x00\x02\x02\x28",
                     b"\x14\x03\x03\x00\x01\x01", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\0",
                     b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\xff", b"\r\n.\r\n" * 100,
                     *(bytes(source.choices(range(256), k=source.randrange(1, 500)))
                       for _ in range(20))):
            with self.subTest(data[:20]), self.server.connect() as wire:
                wire.ask(HELLO)
                self.assertEqual(wire.ask("STARTTLS")[:10], "220 2.0.0 ")
                with contextlib.suppress(OSError):      # it may have ended this already
                    wire.send(data)
                    wire.socket.shutdown(socket.SHUT_WR)
                self.assertNotRegex(wire.rest(), rb"\d\d\d[ -]")
        with self.server.connect() as wire:
            start_tls(wire)
            self.assertEqual(wire.ask(HELLO)[:4], "250-")

    def test_garbage_within_tls(self):
        """A broken record ends the connection; what was said before is answered."""
        with self.server.connect() as wire:
            start_tls(wire)
            self.assertEqual(wire.ask("NOOP")[:9], "250 2.0.0")
            plain = socket.socket(fileno=os.dup(wire.socket.fileno()))
            with plain:
                plain.settimeout(DEADLINE)
                plain.sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32)
                self.assertNotRegex(plain.recv(65536), rb"\d\d\d[ -]")

    def test_versions(self):
        """TLS 1.2 and newer; that nothing older is taken CertificateTest asks."""
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = client_context()
            context.minimum_version = context.maximum_version = version
            with self.server.connect() as wire:
                wire.ask("STARTTLS")
                wire.socket = context.wrap_socket(wire.socket)
                shown = f"{wire.socket.version()} cipher {wire.socket.cipher()[0]} bits "
                ident = wire.deliver(make_message())
                raw = self.raw(ident)
                self.assertIn(f" with ESMTPS ({shown}".encode(), raw)

    def test_much_at_once_within_tls(self):
        """Many records at once, and more replies than a socket holds, lose nothing."""
        with self.server.connect() as wire:
            start_tls(wire)
            body = b"Subject: big\r\n\r\n" + b"".join(b"%d\r\n" % line for line in range(400000))
            wire.send(TRANSACTION + body + b".\r\n" + b"NOOP\r\n" * 5000 + b"QUIT\r\n")
            said = wire.rest().split(b"\r\n")
            self.assertEqual({line[:9] for line in said[-5002:-2]}, {b"250 2.0.0"})
            self.assertEqual([line[:9] for line in said[-2:]], [b"221 2.0.0", b""])
            ident = int(said[-5003].split()[-1])
            self.assertEqual(content_of(self.raw(ident)), body)

    def test_half_closed_within_tls(self):
        """A client that ends its side hears the answers all the same."""
        with self.server.connect() as wire:
            start_tls(wire)
            wire.send(TRANSACTION + b"half\r\n.\r\n")
            wire.socket.settimeout(DEADLINE)
            with socket.socket(fileno=os.dup(wire.socket.fileno())) as plain:
                plain.shutdown(socket.SHUT_WR)
            replies = [wire.reply() for _ in range(5)]
            self.assertRegex(replies[-1], r"\A250 2\.0\.0 Kept as \d+\Z")


class OptionalTLSTest(TLSCase):
    """--starttls optional: mail comes with TLS or without it."""

    more = ("--starttls", "optional")

    def test_without_tls(self):
        kept = self.play("""
            B: DATA
            C: open
            C: .
            S: 250 2.0.0 Kept as *
        """)
        self.assertEqual(kept, [b"open\r\n"])

    def test_what_was_said_is_forgotten(self):
        """RFC 3207 4.2: the name, the sender, the recipients, and chunks of a message."""
        kept = self.play(r"""
            S: 220 *
            C: EHLO before.example
            S: 250-*
            C: MAIL FROM:<forged@client.example>
            S: 250 2.1.0 *
            C: RCPT TO:<forged@mail.example>
            S: 250 2.1.5 *
            C: BDAT 8
            c: forged\r\n
            S: 250 2.0.0 *
            C: STARTTLS
            S: 220 2.0.0 *
            C: BDAT 3 LAST
            c: a\r\n
            S: 503 5.5.1 *
            C: RCPT TO:<bob@mail.example>
            S: 503 5.5.1 *
            C: EHLO after.example
            S: 250-*
            C: DATA
            S: 503 5.5.1 *
            C: MAIL FROM:<ann@client.example>
            S: 250 2.1.0 *
            C: RCPT TO:<bob@mail.example>
            S: 250 2.1.5 *
            C: BDAT 3 LAST
            c: b\r\n
            S: 250 2.0.0 Kept as *
        """)
        self.assertEqual(kept, [b"b\r\n"])
        item = self.server.get("/latest")
        self.assertEqual((item["mail_from"], item["mail_to"]),
                         ("ann@client.example", ["bob@mail.example"]))
        self.assertIn(b"from after.example ", self.raw(item["mail_id"]))


# -- Proxies: who the client really is --

PROXY2 = b"\r\n\r\n\0\r\nQUIT\n"
FOUR = socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.1") + struct.pack(">HH", 4, 25)
SIX = (socket.inet_pton(socket.AF_INET6, "2001:db8::7")
       + socket.inet_pton(socket.AF_INET6, "2001:db8::1") + struct.pack(">HH", 4, 25))


def proxy2(command, family, data):
    """Return a header of the PROXY protocol, version 2."""
    return PROXY2 + bytes([command, family]) + struct.pack(">H", len(data)) + data


# Headers, and the peer that follows from them; "" is the proxy itself.
PROXY_HEADERS = (
    (b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 25\r\n", "192.0.2.7"),
    (b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 25\r\n", "2001:db8::7"),
    (b"PROXY TCP6 ffff:f:f:f:f:f:f:ffff ffff:f:f:f:f:f:f:ffff 65535 65535\r\n",
     "ffff:f:f:f:f:f:f:ffff"),
    (b"PROXY UNKNOWN\r\n", ""),
    (b"PROXY UNKNOWN ffff:f:f:f:f:f:f:ffff ffff:f:f:f:f:f:f:ffff 65535 65535\r\n", ""),
    (proxy2(0x21, 0x11, FOUR), "192.0.2.7"),
    (proxy2(0x21, 0x21, SIX), "2001:db8::7"),
    (proxy2(0x21, 0x11, FOUR + b"\x04\x00\x07padding" + b"\x20\x00\x03\0\0\0"), "192.0.2.7"),
    (proxy2(0x21, 0x00, b""), ""),
    (proxy2(0x21, 0x00, b"whatever"), ""),
    (proxy2(0x21, 0x31, b"\0" * 216), ""),
    (proxy2(0x20, 0x00, b""), ""),
    (proxy2(0x20, 0x11, FOUR), ""),
    (proxy2(0x20, 0x11, b""), ""),
    (proxy2(0x20, 0x21, b"short"), ""),
)
NO_PROXY_HEADERS = (
    b"EHLO client.example\r\nNOOP\r\n",
    b"PROXY \r\nNOOP\r\nNOOP\r\n",
    b"PROXY TCP4 192.0.2.7\r\n",
    b"PROXY TCP4 nobody 198.51.100.1 56324 25\r\n",
    b"PROXY TCP4 300.0.2.7 198.51.100.1 56324 25\r\n",
    b"PROXY TCP5 192.0.2.7 198.51.100.1 56324 25\r\n",
    b"proxy tcp4 192.0.2.7 198.51.100.1 56324 25\r\n",
    b" PROXY TCP4 192.0.2.7 198.51.100.1 56324 25\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 25\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 x\r\n",
    b"PROXY UNKNOWN" + b"x" * 200 + b"\r\n",
    b"\0" * 16, b"\r\n" * 8, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03zz",
    proxy2(0x11, 0x11, FOUR),
    proxy2(0x31, 0x11, FOUR),
    proxy2(0x22, 0x11, FOUR),
    proxy2(0x21, 0x11, FOUR[:-1]),
    proxy2(0x21, 0x21, FOUR),
    PROXY2 + b"\x21\x11\xff\xff",
)


class ProxyTest(TranscriptCase):
    """The PROXY protocol (HAProxy's proxy-protocol.txt), from trusted peers only."""

    options = ("--trusted_proxy", "127.0.0.1", "--proxy_protocol")

    def peer_of(self, raw):
        """Return the address in a message's Received field."""
        return re.search(rb"Received: from \S+ \(\[(?:IPv6:)?([^\]]+)\]\)", raw).group(1).decode()

    def test_headers(self):
        for header, peer in PROXY_HEADERS:
            data = header + TRANSACTION + b"x\r\n.\r\n"
            for cut in (len(data), 1, 13):
                with self.subTest(header=header[:30], cut=cut):
                    said = self.app.talk(*in_cuts(data, cut), peer="127.0.0.1")
                    self.assertRegex(said, rb"(?s)\A220 .*\r\n250 2\.0\.0 Kept as \d+\r\n\Z")
                    raw = self.app.raw(self.app.newest())
                    self.assertEqual(self.peer_of(raw), peer or "127.0.0.1")

    def test_over_a_socket(self):
        for header, peer in PROXY_HEADERS:
            with self.subTest(header[:30]), self.server.connect(greeting=False) as wire:
                wire.send(header)
                self.assertEqual(wire.reply()[:4], "220 ")
                ident = wire.deliver(make_message())
                self.assertEqual(self.peer_of(self.raw(ident)), peer or "127.0.0.1")

    def test_wrong_headers(self):
        """421 and the end; not a word is taken for a command."""
        for header in NO_PROXY_HEADERS:
            with self.subTest(header[:30]):
                for cut in (len(header), 1):
                    said = self.app.talk(*in_cuts(header + b"NOOP\r\nEHLO x\r\n", cut),
                                         peer="127.0.0.1")
                    self.assertRegex(said, rb"\A421 4\.\d\.\d [^\r]*\r\n\Z")
                with self.server.connect(greeting=False) as wire:
                    wire.send(header + b"NOOP\r\nEHLO x\r\n")
                    self.assertRegex(wire.rest(), rb"\A421 4\.\d\.\d [^\r]*\r\n\Z")

    def test_cut_off(self):
        """A header that ends early brings nothing."""
        for header, _ in PROXY_HEADERS[::4]:
            for length in range(0, len(header), 5):
                with self.server.connect(greeting=False) as wire:
                    wire.send(header[:length])
                    wire.socket.shutdown(socket.SHUT_WR)
                    self.assertEqual(wire.rest(), b"")

    def test_from_others(self):
        """Who is not trusted is greeted as anybody; a header is no command."""
        for header, _ in PROXY_HEADERS[:2]:
            with self.server.connect(source="127.0.0.2") as wire:
                self.assertEqual(wire.greeting[:4], "220 ")
                wire.send(header)
                self.assertEqual(wire.reply()[:10], "500 5.5.1 ")
                ident = wire.deliver(make_message())
                self.assertEqual(self.peer_of(self.raw(ident)), "127.0.0.2")

    def test_client_behind_a_proxy_is_not_the_proxy(self):
        """What a proxy may say, its clients may not."""
        with self.server.connect(greeting=False) as wire:
            wire.send("PROXY TCP4 192.0.2.7 192.0.2.1 4711 25\r\n")
            self.assertEqual(wire.reply()[:3], "220")
            self.assertNotIn("XCLIENT", wire.ask("EHLO client.example"))
            self.assertRegex(wire.ask("XCLIENT ADDR=192.0.2.99"), "^550 5\\.7\\.0 ")
            ident = wire.deliver(make_message())
        self.assertEqual(self.peer_of(self.raw(ident)), "192.0.2.7")

    def test_lf_is_for_this_host(self):
        """Who comes through a proxy on this host is not on this host."""
        header = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 25\r\n"
        said = self.app.talk(header + b"NOOP\nNOOP\r\n", peer="127.0.0.1")
        self.assertEqual([line[:9] for line in said.split(b"\r\n")[1:-1]],
                         [b"500 5.5.2", b"250 2.0.0"])


class XclientTest(TranscriptCase):
    """Postfix's XCLIENT_README: a proxy names the client, and the session begins anew."""

    options = ("--trusted_proxy", "127.0.0.1", "--starttls", "optional")

    def test_session(self):
        kept = self.play("""
            S: 220 mx.example.com ESMTP *
            C: EHLO proxy.example
            S: 250-*
            C: XCLIENT
            S: 501 5.5.4 *
            C: XCLIENT ADDR
            S: 501 5.5.4 *
            C: XCLIENT COLOUR=red
            S: 501 5.5.4 *
            C: XCLIENT ADDR=nobody
            S: 501 5.5.4 *
            C: XCLIENT ADDR=192.0.2.300
            S: 501 5.5.4 *
            C: MAIL FROM:<ann@client.example>
            S: 250 2.1.0 *
            C: XCLIENT ADDR=192.0.2.8
            S: 503 5.5.1 *
            C: RSET
            S: 250 2.0.0 *
            C: xclient NAME=spike.example addr=IPV6:2001:db8::7 PORT=4711 HELO=x PROTO=ESMTP
            S: 220 mx.example.com ESMTP *
            C: MAIL FROM:<ann@client.example>
            S: 503 5.5.1 *
            C: EHLO client.example
            S: 250-*
            C: MAIL FROM:<ann@client.example>
            S: 250 2.1.0 *
            C: RCPT TO:<bob@mail.example>
            S: 250 2.1.5 *
            C: DATA
            S: 354 *
            C: x
            C: .
            S: 250 2.0.0 Kept as *
            C: NOOP
            S: 250 2.0.0 *
        """)
        self.assertEqual(kept, [b"x\r\n"])
        raw = self.app.raw(self.app.newest())
        self.assertIn(b"Received: from client.example ([IPv6:2001:db8::7])\r\n", raw)
        self.assertIn(b"Received: from client.example ([IPv6:2001:db8::7])\r\n",
                      self.raw(self.newest()))

    def peer_after(self, *lines):
        """Return the peer of a message that is sent after these lines."""
        data = "".join(line + "\r\n" for line in (HELLO, *lines)).encode()
        said = self.app.talk(data + TRANSACTION + b"x\r\n.\r\n", peer="127.0.0.1")
        self.assertRegex(said, rb"\r\n250 2\.0\.0 Kept as \d+\r\n\Z")
        return self.app.store.peer(self.app.newest())

    def test_addresses(self):
        for value, peer in (("192.0.2.7", "192.0.2.7"), ("IPV6:2001:db8::7", "2001:db8::7"),
                            ("ipv6:2001:DB8:0::7", "2001:db8::7"), ("[UNAVAILABLE]", "127.0.0.1"),
                            ("+31+39+32.0.2.7", "192.0.2.7")):
            with self.subTest(value):
                self.assertEqual(self.peer_after(f"XCLIENT ADDR={value}"), peer)
        for line in ("XCLIENT NAME=[TEMPUNAVAIL] ADDR=192.0.2.7 LOGIN=[UNAVAILABLE]",
                     "XCLIENT DESTADDR=198.51.100.1 DESTPORT=25 ADDR=192.0.2.7",
                     "XCLIENT NAME=spike+2Eexample ADDR=192.0.2.7 HELO=a+20b"):
            self.assertEqual(self.peer_after(line), "192.0.2.7")

    def test_once(self):
        """Once the client is named it is the client that speaks, and it may name nobody."""
        for first in ("XCLIENT ADDR=192.0.2.7", "XCLIENT ADDR=[UNAVAILABLE]",
                      "XCLIENT ADDR=127.0.0.1"):
            with self.subTest(first):
                dialogue = Dialogue(self.app, "127.0.0.1")
                self.assertEqual(dialogue.ask(first)[:4], "220 ")
                self.assertNotIn("XCLIENT", dialogue.ask(HELLO))
                self.assertEqual(dialogue.ask("XCLIENT ADDR=192.0.2.8")[:10], "550 5.7.0 ")
                dialogue.end()

    def test_refused_as_a_whole(self):
        """A line that is refused changes nothing."""
        for line in ("XCLIENT ADDR=192.0.2.7 COLOUR=red", "XCLIENT ADDR=192.0.2.7 NAME",
                     "XCLIENT ADDR=192.0.2.7 ADDR=nobody"):
            with self.subTest(line):
                self.assertEqual(self.peer_after(line), "127.0.0.1")

    def test_who_may(self):
        """The extension is shown to trusted peers, and refused to others."""
        names = r"250[ -]XCLIENT NAME ADDR PORT PROTO HELO LOGIN DESTADDR DESTPORT\r\n"
        for peer, shown, status in (("127.0.0.1", 1, "220 mx"), (PEER, 0, "550 5."),
                                    ("127.0.0.2", 0, "550 5."), ("::1", 0, "550 5.")):
            with self.subTest(peer):
                dialogue = Dialogue(self.app, peer)
                self.assertEqual(len(re.findall(names, dialogue.ask(HELLO))), shown)
                self.assertEqual(dialogue.ask("XCLIENT ADDR=192.0.2.7")[:6], status)
                self.assertEqual(dialogue.session.peer, "192.0.2.7" if shown else peer)
                dialogue.end()
        with self.server.connect(source="127.0.0.2") as wire:
            self.assertNotIn("XCLIENT", wire.ask(HELLO))
            self.assertEqual(wire.ask("XCLIENT ADDR=127.0.0.1")[:10], "550 5.7.0 ")


# -- Fuzz, with fixed seeds --

ODD_PIECES = (b"\r\n", b"\n", b"\r", b"\r\r\n", b"\r\r", b".", b"..", b"\r\n.", b"\r\n..", b"\n.",
              b".\r\n", b".\n", b"\r.\r", b"\0", b"\xff", b"x", b"Subject: y", b": ", b" \t",
              b"\r" * 70, b"z" * 990, b".\r", b"\r\n.\r", b"\n.\r\nNOOP\r\n", b"MAIL FROM:<a@b.c>")
COMMANDS = (b"NOOP", b"RSET", b"HELP", b"HELP DATA", b"VRFY x", b"FOO", b"", b"NOOP \xff", b"DATA",
            b"EHLO fuzz", b"HELO fuzz", b"MAIL FROM:<>", b"MAIL FROM:<a@b.example> SIZE=99",
            b"RCPT TO:<b@c.example>", b"RCPT TO:<>", b"BDAT 0", b"BDAT 0 LAST", b"NOOP\0",
            b"x" * 2040, b"x" * 2047, b"x" * 5000, b"NOOP\n", b"STARTTLS",
            b"XCLIENT ADDR=192.0.2.1")


def odd_content(source, length):
    """Return content of about that length with line ends, dots and CRs in every odd place."""
    pieces, size = [], 0
    while size < length:
        piece = source.choice(ODD_PIECES)
        piece = piece if source.random() < 0.6 else piece * source.randrange(1, 400)
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces).replace(b"\r\n.\r\n", b"\r\n \r\n")


def odd_dialogue(source):
    """Return the bytes of a client that sends messages and mistakes in every odd way."""
    data = [b"EHLO fuzz\r\n"]
    for _ in range(source.randrange(1, 4)):
        if source.random() < 0.4:
            data += [source.choice(COMMANDS) + b"\r\n" for _ in range(3)]
        content = odd_content(source, source.choice((0, 3, 200, 900, 3000, 65500, 131072)))
        data.append(b"RSET\r\nMAIL FROM:<a@b.example>%b\r\nRCPT TO:<b@c.example>\r\n"
                    % source.choice((b"", b" BODY=8BITMIME", b" BODY=BINARYMIME")))
        if source.random() < 0.5:
            data.append(b"DATA\r\n" + content + b"\r\n.\r\n")
            continue
        cuts = sorted(source.randrange(len(content) + 1) for _ in range(source.randrange(4)))
        chunks = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)])]
        data += [b"BDAT %d%b\r\n%b" % (len(chunk), b" LAST" * (place == len(chunks)), chunk)
                 for place, chunk in enumerate(chunks, 1)]
    return b"".join([*data, b"NOOP\r\n"])


def random_cuts(source, data):
    """Return data cut at random places, and around the sizes of buffers."""
    near = [base + offset for base in (65536, 131072) for offset in (-4, -3, -2, -1, 0, 1, 2, 3)]
    places = {min(place, len(data)) for place in source.sample(near, 4)}
    match = re.compile(rb"\r\n\.|\r\r|\n\.").search(data, source.randrange(len(data)))
    places.update(range(match.start(), match.end() + 3) if match else ())
    places.update(source.randrange(len(data) + 1) for _ in range(source.choice((0, 3, 40))))
    places = sorted(place for place in places if place <= len(data))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)])]


class FuzzTest(unittest.TestCase):
    """The same bytes have the same answers and the same mail, however they are cut."""

    def check(self, kept, expected):
        """Compare lists of messages without a diff of megabytes."""
        self.assertEqual([len(raw) for raw in kept], [len(raw) for raw in expected])
        for raw, wanted in zip(kept, expected):
            if raw != wanted:
                place = next(n for n, (a, b) in enumerate(zip(raw, wanted)) if a != b)
                self.assertEqual(raw[place - 20:place + 20], wanted[place - 20:place + 20])

    def outcome(self, app, pieces, peer=PEER, kind=pegmail.SMTPSession):
        """Return what is said, its numbers left out, and what is kept."""
        before = app.newest()
        said = app.talk(*pieces, peer=peer, kind=kind)
        return re.sub(rb"Kept as \d+", b"Kept", said), app.all_raw(before)

    def test_any_cut(self):
        for options in ((), ("--bare_newline", "reject"), ("--max_size", "100000"),
                        ("--max_line", "1000", "--max_header", "2000")):
            with Offline("--max_errors", "1000", *options) as app:
                for seed in range(8):
                    source = random.Random(f"{options}{seed}")
                    data = odd_dialogue(source)
                    expected = self.outcome(app, in_cuts(data, 65536))   # as Stream feeds it
                    self.assertTrue(expected[0].endswith(b"\r\n250 2.0.0 OK\r\n")
                                    or b"\r\n421 " in expected[0], expected[0][-200:])
                    cuts = [random_cuts(source, data) for _ in range(2)]
                    if len(data) < 9000:
                        cuts.append(in_cuts(data, 1))
                    for number, pieces in enumerate([in_cuts(data, 65536), *cuts]):
                        with self.subTest(options=options, seed=seed, number=number):
                            said, kept = self.outcome(app, pieces)
                            self.assertEqual(said, expected[0])
                            self.check(kept, expected[1])

    def test_content_by_the_book(self):
        """What is kept of odd content is what a slow and simple reader makes of it."""
        with Offline("--max_line", "9M", "--max_header", "9M") as app:
            for seed in range(40):
                source = random.Random(seed)
                content = odd_content(source, source.choice((5, 100, 3000, 65530, 140000)))
                with self.subTest(seed=seed):
                    if b"\r\n.\r\n" in b"\r\n" + content + b"\r\n":
                        continue
                    data = TRANSACTION + content + b"\r\n.\r\nNOOP\r\n"
                    said, kept = self.outcome(app, random_cuts(source, data))
                    self.assertRegex(said, rb"\r\n250 2\.0\.0 Kept\r\n250 2\.0\.0 OK\r\n\Z")
                    self.check(kept, [kept_form(content + b"\r\n")])

    def test_dots_at_the_cut(self):
        """A stuffed dot at any place around the size of a buffer is undone."""
        more = (b"y" * 70 + b"\r\n") * 1900
        with Offline() as app:
            for length in range(65536 - 8, 65536):
                for tail in (b"..", b"...x", b"..\r\n..z", b".." + b"y" * 70):
                    content = b"a: b\r\n\r\n%b\r\n%b\r\n" % (b"x" * (length - 10), tail) + more
                    data = TRANSACTION + content + b".\r\n"
                    for first in (len(TRANSACTION), 65536):
                        with self.subTest(length=length, tail=tail[:5], first=first):
                            kept = self.outcome(app, [data[:first], *in_cuts(data[first:], 65536)])
                            self.check(kept[1], [kept_form(content)])

    def test_runs_of_carriage_returns(self):
        """A run of CRs is cut anywhere, and costs no more than it is long."""
        with Offline() as app:
            for length in (1, 2, 3, 65535, 65536, 200001):
                for end in (b"", b"\n", b"x", b"\n.\r\nx"):
                    content = b"a: b\r\n\r\n" + b"\r" * length + end + b"\r\n"
                    data = TRANSACTION + content + b".\r\n"
                    source = random.Random(length)
                    for pieces in (in_cuts(data, 65536), random_cuts(source, data)):
                        with self.subTest(length=length, end=end, pieces=len(pieces)):
                            if b"\r\n.\r\n" in content:
                                continue
                            self.check(self.outcome(app, pieces)[1], [kept_form(content)])

    def test_random_bytes(self):
        """Nothing a client can send is a bug."""
        words = [word + end for word in (*COMMANDS, b"QUIT", b"MAIL FROM:", b"RCPT TO:", b"BDAT 5",
                                         b"LHLO x", b"PROXY UNKNOWN", b"BDAT 3 LAST")
                 for end in (b"\r\n", b"\n", b"\r", b" ", b"")]
        words += [letter.encode() for letter in "²٣Ⅷ½\u2028\x85\u202e\ufeff🙂é<>@\"\\:;,=+[]%"]
        for options in ((), ("--trusted_proxy", PEER),
                        ("--trusted_proxy", PEER, "--proxy_protocol")):
            with Offline("--max_errors", "50", *options) as app:
                for seed in range(150):
                    source = random.Random(f"{options}{seed}")
                    data = b"".join(
                        source.choice(words) if source.random() < 0.8 else
                        bytes(source.choices(range(256), k=source.randrange(20)))
                        for _ in range(source.randrange(1, 60)))
                    if options[2:] and seed % 2:
                        data = source.choice(PROXY_HEADERS)[0] + data
                    for kind in (pegmail.SMTPSession, pegmail.LMTPSession):
                        for peer in (PEER, "127.0.0.1"):
                            with self.subTest(options=options, seed=seed, kind=kind, peer=peer):
                                said, kept = self.outcome(app, [data], peer, kind)
                                self.assertEqual((said, kept), self.outcome(
                                    app, random_cuts(source, data), peer, kind))
                                for line in said.decode().split("\r\n")[:-1]:
                                    self.assertRegex(line, r"\A\d\d\d[ -]")
                                    self.assertTrue(line.isprintable(), line)

    def test_addresses(self):
        """MAIL and RCPT with random words: an answer of one line, and what is kept is sound."""
        words = ["a", "b.example", "@", "<", ">", '"', "\\", " ", "\t", ":", ",", ".", "..", "[",
                 "]", "[192.0.2.1]", "IPv6:::1", "é", "SIZE=", "SIZE=5", "BODY=8BITMIME",
                 "SMTPUTF8", "=", "٣", "²", "postmaster", "@x.example:", "(c)", "%", "!",
                 "x" * 64, "\u00a0", "xn--",
                 "xn--a", "ſ", "K", "。", "a。example"]
        with Offline("--max_errors", "100000", "--server_host", "b.example") as app:
            for seed in range(40):
                source = random.Random(seed)
                dialogue = Dialogue(app)
                dialogue.ask(HELLO)
                for _ in range(50):
                    text = "".join(source.choices(words, k=source.randrange(8)))
                    text = source.choice(("<%s>", "%s", "<%s> SMTPUTF8")) % text
                    for line in ("RSET", "MAIL FROM:" + text, SENDER + " SMTPUTF8",
                                 "RCPT TO:" + text):
                        with self.subTest(line):
                            reply = dialogue.ask(line)
                            self.assertRegex(reply, r"\A[25]\d\d [25]\.\d\.\d [^\r\n]*\r\n\Z")
                            self.assertTrue(reply[:-2].isprintable())
                    for address in [dialogue.session.sender or "", *dialogue.session.recipients]:
                        self.assertNotRegex(address, r"[\x00-\x1f\x7f]")
                dialogue.end()


# -- Programs that send mail --

class ClientCase(TLSCase):
    """Sends with another program, and reads the message back over the API."""

    more = ("--starttls", "optional", "--lmtp_port", "0", "--lmtp_socket", "lmtp.sock")

    def setUp(self):
        self.before = self.newest()

    def send(self, *words, input=None, status=0):
        """Run a program; return the messages (as JSON) that it brought."""
        words = [need(words[0]), *words[1:]]
        found, output = self.server.run_tool(*words, input=input)
        self.assertEqual(found, status, output)
        return self.brought()

    def brought(self):
        """Return the messages (as JSON) that have come since the test began."""
        return self.server.get(f"/list?count=1000&after={self.before}")["items"]

    def file(self, data):
        """Return the path of a file that holds data."""
        handle, path = tempfile.mkstemp(dir=self.server.folder)
        with open(handle, "wb") as file:
            file.write(data)
        self.addCleanup(os.unlink, path)
        return path

    def received(self, item):
        """Return the Received field that was added to a message."""
        return self.raw(item["mail_id"]).split(b"\r\nReceived: ")[1].split(b"\r\n\t")


class SwaksTest(ClientCase):
    """swaks, in all its ways."""

    def swaks(self, *words, status=0, port=None):
        """Send one message; return it."""
        items = self.send("swaks", "--server", f"127.0.0.1:{port or self.server.smtp_port}",
                          "--helo", "swaks.example", "--timeout", "15", *words, status=status)
        return items[0] if len(items) == 1 else items

    def test_plain(self):
        item = self.swaks("--from", "ann@client.example",
                          "--to", "bob@mail.example,eve@mail.example", "--header",
                          "Subject: plain swaks", "--body", "some text")
        self.assertEqual((item["mail_from"], item["mail_to"], item["mail_subject"]),
                         ("ann@client.example", ["bob@mail.example", "eve@mail.example"],
                          "plain swaks"))
        self.assertEqual(item["mail_body"]["text"].strip(), "some text")

    def test_ways(self):
        lmtp = os.path.join(self.server.folder, "lmtp.sock")
        for words, protocol in (
                (("--protocol", "SMTP"), b"SMTP"), (("--protocol", "ESMTP"), b"ESMTP"),
                (("--pipeline",), b"ESMTP"), (("-tls",), b"ESMTPS"), (("-tls", "--pipeline"),
                                                                      b"ESMTPS"),
                (("--protocol", "LMTP", "--port", str(self.server.lmtp_port)), b"LMTP"),
                (("--protocol", "LMTP", "--socket", lmtp), b"LMTP")):
            with self.subTest(words):
                self.before = self.newest()
                if "--socket" in words:
                    item, = self.send("swaks", "--from", "a@b.example", "--to", "b@c.example",
                                      "--helo", "swaks.example", *words)
                else:
                    item = self.swaks("--from", "a@b.example", "--to", "b@c.example", *words,
                                      port=words[-1] if "--port" in words else None)
                self.assertRegex(self.received(item)[1], rb"\Aby mx\.example\.com \(pegmail\) with "
                                 + protocol + rb"( \(TLSv1\.[23] |\Z)")

    def test_attachment(self):
        data = os.urandom(200000)
        item = self.swaks("--from", "a@b.example", "--to", "b@c.example", "-tls",
                          "--attach-name", "data.bin", "--attach", "@" + self.file(data))
        attachment = next(part for part in item["mail_body"]["items"]
                          if part["type"] == "attachment")
        self.assertEqual((attachment["filename"], attachment["size"]), ("data.bin", len(data)))
        self.assertEqual(self.server.request("/media?hash=" + attachment["hash"])[2], data)

    def test_null_sender(self):
        item = self.swaks("--from", "<>", "--to", "b@c.example")
        self.assertEqual(item["mail_from"], "")
        self.assertTrue(self.raw(item["mail_id"]).startswith(b"Return-Path: <>\r\n"))

    def test_dots(self):
        body = ".\n..\n.x\nend."
        item = self.swaks("--from", "a@b.example", "--to", "b@c.example", "--body", body)
        self.assertEqual(item["mail_body"]["text"].replace("\r\n", "\n").strip(), body)

    def test_refused(self):
        """A recipient that is none: swaks says so by its exit status, and nothing is kept."""
        self.assertEqual(self.swaks("--from", "a@b.example", "--to", "b@", status=24), [])


class MsmtpTest(ClientCase):
    """msmtp, as a sendmail of its own, with a bare LF in what it is given."""

    MAIL = "From: ann@client.example\nTo: bob@mail.example\nSubject: msmtp žluť\n\n.\nh\u00e9\n..\n"

    def test_plain_and_tls(self):
        for options in (["--tls=off"], ["--tls=on", "--tls-starttls=on", "--tls-trust-file="
                                        + self.certificate.cert, "--tls-certcheck=on"]):
            with self.subTest(options):
                self.before = self.newest()
                item, = self.send("msmtp", "-C", "/dev/null", "--host=localhost",
                                  f"--port={self.server.smtp_port}", "--from=ann@client.example",
                                  "--auth=off", *options, "bob@mail.example",
                                  input=self.MAIL.encode())
                self.assertEqual((item["mail_from"], item["mail_to"], item["mail_subject"]),
                                 ("ann@client.example", ["bob@mail.example"], "msmtp žluť"))
                self.assertEqual(item["mail_body"]["text"].replace("\r\n", "\n"), ".\nhé\n..\n")
                self.assertEqual(b" with ESMTPS " in self.received(item)[1] + b" ",
                                 "--tls=on" in options)


class CurlMailTest(ClientCase):
    """curl as a mail client."""

    def curl(self, *words, data=b"Subject: curl\r\n\r\nhi\r\n.\r\n..\r\nend\r\n", status=0):
        """Send a file; return the messages that came."""
        return self.send("curl", "-sS", "--max-time", "15", f"smtp://localhost:{self.server.smtp_port}"
                         "/client.example", "--mail-from", "ann@client.example", "--mail-rcpt",
                         "bob@mail.example", "-T", self.file(data), *words, status=status)

    def test_plain_and_tls(self):
        for words in ((), ("--ssl-reqd", "--cacert", self.certificate.cert)):
            with self.subTest(words):
                self.before = self.newest()
                item, = self.curl("--mail-rcpt", "eve@mail.example", *words)
                self.assertEqual((item["mail_from"], item["mail_to"]),
                                 ("ann@client.example", ["bob@mail.example", "eve@mail.example"]))
                raw = self.raw(item["mail_id"])
                self.assertEqual(content_of(raw), b"Subject: curl\r\n\r\nhi\r\n.\r\n..\r\nend\r\n")
                self.assertEqual(b" with ESMTPS (" in raw, bool(words))

    def test_line_feeds(self):
        """A file with LF: by --crlf, or as it is."""
        for words in ((), ("--crlf",)):
            self.before = self.newest()
            item, = self.curl(*words, data=b"Subject: lf\n\nhi\n.\nend\n")
            self.assertEqual(content_of(self.raw(item["mail_id"])),      # curl adds the last CRLF
                             b"Subject: lf\r\n\r\nhi\r\n.\r\nend\r\n" + b"\r\n" * (not words))

    def test_too_large(self):
        """curl names the size at MAIL, and hears 552 before it sends a byte of it."""
        self.assertEqual(self.curl(data=b"x" * 98 + b"\r\n", status=0)[0]["size"] > 100, True)
        self.before = self.newest()
        big = self.file(b"")
        os.truncate(big, (50 << 20) + 1)
        self.assertEqual(self.send(
            "curl", "-sS", "--max-time", "15", f"smtp://localhost:{self.server.smtp_port}",
            "--mail-from", "a@b.example", "--mail-rcpt", "b@c.example", "-T", big, status=55), [])


class SmtplibTest(ClientCase):
    """Python's own smtplib."""

    def client(self):
        """Return a connected client."""
        client = smtplib.SMTP("127.0.0.1", self.server.smtp_port, "client.example", DEADLINE)
        self.addCleanup(client.close)
        return client

    def message(self, subject):
        """Return a message with a text and an attachment."""
        message = email.message.EmailMessage()
        message["From"], message["To"], message["Subject"] = "a@b.example", "b@c.example", subject
        message.set_content(".\nžluť\n")
        message.add_attachment(b"\0\r\n.\r\n", "application", "octet-stream", filename="x y.bin")
        return message

    def test_send_message(self):
        with self.client() as client:
            for subject in ("one", "two ☃", "three"):
                self.assertEqual(client.send_message(self.message(subject)), {})
        items = self.brought()
        self.assertEqual([item["mail_subject"] for item in items], ["one", "two ☃", "three"])
        text, attachment = items[1]["mail_body"]["items"]
        self.assertEqual(text["text"].replace("\r\n", "\n"), ".\nžluť\n")
        self.assertEqual(attachment["filename"], "x y.bin")
        self.assertEqual(self.server.request("/media?hash=" + attachment["hash"])[2],
                         b"\0\r\n.\r\n")

    def test_tls(self):
        context = ssl.create_default_context(cafile=self.certificate.cert)
        with smtplib.SMTP("localhost", self.server.smtp_port, timeout=DEADLINE) as client:
            client.starttls(context=context)
            client.send_message(self.message("tls"))
            client.quit()
        item, = self.brought()
        self.assertIn(b" with ESMTPS (TLSv1.", self.received(item)[1])

    def test_some_refused(self):
        with self.client() as client:
            refused = client.sendmail("a@b.example", ["b@c.example", "b@", "e@c.example"], "x: y")
        self.assertEqual({name: code for name, (code, _) in refused.items()}, {"b@": 553})
        item, = self.brought()
        self.assertEqual(item["mail_to"], ["b@c.example", "e@c.example"])

    def test_utf8_addresses(self):
        with self.client() as client:
            client.ehlo()
            self.assertTrue(client.has_extn("smtputf8"))
            client.sendmail("ž@b.example", ["ř@bücher.example"], "Subject: ž\n\n☃".encode(),
                            mail_options=["SMTPUTF8", "BODY=8BITMIME"])
        item, = self.brought()
        self.assertEqual((item["mail_from"], item["mail_to"], item["mail_subject"]),
                         ("ž@b.example", ["ř@bücher.example"], "ž"))
        self.assertIn(b" with UTF8SMTP", self.received(item)[1])

    def test_bytes_with_line_feeds(self):
        """as_bytes() has LF for line ends; smtplib mends that, other programs do not."""
        with self.client() as client:
            client.ehlo()
            client.mail("a@b.example")
            client.rcpt("b@c.example")
            code, _ = client.docmd("DATA")
            self.assertEqual(code, 354)
            client.send(self.message("raw bytes").as_bytes() + b"\r\n.\r\n")
            self.assertEqual(client.getreply()[0], 250)
        item, = self.brought()
        self.assertEqual(item["mail_subject"], "raw bytes")

    def test_lmtp(self):
        for host, port in (("127.0.0.1", self.server.lmtp_port),
                           (os.path.join(self.server.folder, "lmtp.sock"), 0)):
            with self.subTest(host), smtplib.LMTP(host, port, "client.example") as client:
                self.before = self.newest()
                client.ehlo_or_helo_if_needed()
                for line in ("MAIL FROM:<a@b.example>", "RCPT TO:<b@c.example>"):
                    self.assertEqual(client.docmd(line)[0], 250)
                self.assertEqual(client.data(b"Subject: lmtp\r\n\r\n.\r\n")[0], 250)
                item, = self.brought()
                self.assertEqual(content_of(self.raw(item["mail_id"])),
                                 b"Subject: lmtp\r\n\r\n.\r\n")


class SmtpSourceTest(ClientCase):
    """Postfix's smtp-source, the load generator."""

    def test_many(self):
        for name, words, number in (
                ("smtp", ("-s", "10", "-m", "300", "-l", "2000"), 300),
                ("kept open", ("-d", "-s", "20", "-m", "300", "-l", "500"), 300),
                ("large", ("-d", "-s", "4", "-m", "8", "-l", "3000000"), 8),
                ("recipients", ("-d", "-m", "5", "-r", "50"), 5)):
            with self.subTest(name):
                before = self.server.get("/count")["count"]
                self.before = self.newest()
                self.send("smtp-source", "-f", "a@b.example", "-t", "b@c.example", "-S", name,
                          *words, f"127.0.0.1:{self.server.smtp_port}")
                self.assertEqual(self.server.get("/count")["count"], before + number)
                items = self.brought()
                self.assertEqual(len({item["mail_id"] for item in items}), number)
                self.assertEqual({item["mail_subject"] for item in items}, {name})
                self.assertEqual(len(items[0]["mail_to"]), 50 if name == "recipients" else 1)

    def test_lmtp(self):
        items = self.send("smtp-source", "-L", "-d", "-s", "5", "-m", "50", "-f", "a@b.example",
                          "-t", "b@c.example", f"127.0.0.1:{self.server.lmtp_port}")
        self.assertEqual(len(items), 50)
        self.assertIn(b" with LMTP", self.received(items[0])[1])


# -- Forwarding: real web servers to POST to --

class Post(collections.namedtuple("Post", "method path headers body time")):
    """A request that a Target was sent."""

    @property
    def json(self):
        """The body as JSON, read strictly."""
        return json.loads(self.body.decode("utf-8"), parse_constant=int)


class Target(http.server.ThreadingHTTPServer):
    """A web server that plays its answers one after another, and the last one on and on.

    An answer is a status, (status, header), the bytes to say before it hangs up, None to hang up
    at once, or a function of the handler that returns one of these.
    """

    daemon_threads = False
    request_queue_size = 100

    def __init__(self, *answers, context=None):
        super().__init__(("127.0.0.1", 0), TargetHandler)
        self.answers, self.posts, self.open = list(answers or [200]), [], set()
        self.connections, self.context, self.over = 0, context, threading.Event()
        self.lock = threading.Lock()
        self.url = "http{}://localhost:{}/hook".format("s" if context else "", self.server_port)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self):
        """End it, and its connections."""
        self.over.set()
        self.shutdown()
        self.thread.join()
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def finish_request(self, request, client_address):
        """Serve a connection."""
        with contextlib.ExitStack() as stack:
            if self.context:
                request = stack.enter_context(self.context.wrap_socket(request, server_side=True))
            self.connections += 1
            self.open.add(request)
            stack.callback(self.open.discard, request)
            super().finish_request(request, client_address)

    def handle_error(self, request, client_address):
        """Say nothing: clients may go as they like."""

    def next_answer(self):
        """Return the next answer."""
        with self.lock:
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def subjects(self):
        """Return the subjects of the messages that came, in order."""
        return [post.json["subject"] for post in list(self.posts)]


class TargetHandler(http.server.BaseHTTPRequestHandler):
    """One connection to a Target."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def do_POST(self):
        """Note a request and answer it."""
        length = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(length)
        if len(body) < length:          # who sent it is gone
            self.close_connection = True
            return
        self.server.posts.append(Post(self.command, self.path, self.headers, body,
                                      time.monotonic()))
        answer = self.server.next_answer()
        if callable(answer):
            answer = answer(self)
        if answer is None or isinstance(answer, bytes):
            self.wfile.write(answer or b"")
            self.close_connection = True
            return
        status, fields = answer if isinstance(answer, tuple) else (answer, {})
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def do_CONNECT(self):
        """Pass bytes on, to the port of this host whatever the name."""
        self.server.posts.append(Post(self.command, self.path, self.headers, b"",
                                      time.monotonic()))
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        port = int(self.path.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as other:
            ways = {self.connection: other, other: self.connection}
            while not self.server.over.is_set():
                for sock in select.select(list(ways), [], [], 0.02)[0]:
                    data = sock.recv(65536)
                    if not data:
                        return
                    ways[sock].sendall(data)


def hang(handler):
    """An answer that never comes."""
    handler.server.over.wait(DEADLINE)


def drip(handler):
    """An answer that comes byte by byte and has no end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not handler.server.over.wait(0.1):
        handler.wfile.write(b"x")


def close_silently(handler):
    """An answer after which the connection is closed, against what it says."""
    handler.close_connection = True
    return 200


class ForwardCase(unittest.TestCase):
    """Tests with a server of their own, and targets that it forwards to."""

    def target(self, *answers, **options):
        """Return a new Target."""
        target = Target(*answers, **options)
        self.addCleanup(target.close)
        return target

    def certificate(self):
        """Return a certificate for localhost, and a context with it."""
        certificate = Certificate()
        self.addCleanup(certificate.remove)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert, certificate.key)
        return certificate, context

    def new_folder(self):
        """Return a new folder."""
        folder = memory_folder()
        self.addCleanup(shutil.rmtree, folder)
        return folder

    def run_server(self, *options, folder=None, environ=None):
        """Return a running server that tries again after a second."""
        words = [str(option) for option in options]
        if "--retry_first" not in words:
            words += ["--retry_first", "1"]
        server = Running(*words, folder=folder or self.new_folder(),
                         environ={"no_proxy": "", "http_proxy": "", "https_proxy": "",
                                  **(environ or {})})
        self.addCleanup(self.end, server)
        return server.start()

    def end(self, server):
        """End a server; nothing it said may be a bug."""
        text = server.text()
        server.__exit__()
        self.assertNotIn("Traceback", text)

    def forward_to(self, *targets):
        """Return the options for several targets."""
        return [word for target in targets
                for word in ("--forward_to", target if isinstance(target, str) else target.url)]

    def entries(self, server, **query):
        """Return the deliveries."""
        return server.get("/outbox?" + urllib.parse.urlencode({"count": 1000, **query}))["items"]

    def wait_for_state(self, server, state, count=1, **query):
        """Wait until so many deliveries are in a state; return them."""
        return until(lambda: (lambda found: found if len(found) >= count else None)(
            self.entries(server, state=state, **query)), f"{count} deliveries {state}")

    def wait_for_posts(self, target, count=1):
        """Wait until a target has had so many requests; return them."""
        until(lambda: len(target.posts) >= count, f"{count} requests")
        return list(target.posts)


class PigeonTest(ForwardCase):
    """What smtp-pigeon's README shows, and its payload."""

    def test_the_example(self):
        target, port = self.target(), free_port()
        server = self.run_server("--url", target.url, "--header", "Authorization: Bearer my_token",
                                 "--header", "MyService-Node: box", "--host", "0.0.0.0",
                                 "--port", port, "--domain", "localhost")
        with server.connect(port, greeting=False) as wire:
            wire.send(NETCAT_MAIL)
            wire.socket.shutdown(socket.SHUT_WR)
            lines = wire.rest().decode().split("\r\n")
        gordon, eli, isaac = (name + "@blackmesa.example" for name in ("gordon", "eli", "isaac"))
        self.assertEqual(lines[0], "220 localhost ESMTP Service Ready")
        self.assertEqual(lines[1], "250-Hello localhost")
        self.assertRegex(lines[-7], r"250 SIZE \d+")
        self.assertEqual(lines[-6:-1], [
            f"250 2.0.0 Roger, accepting mail from <{gordon}>",
            f"250 2.0.0 I'll make sure <{eli}> gets this",
            f"250 2.0.0 I'll make sure <{isaac}> gets this",
            "354 2.0.0 Go ahead. End your data with <CR><LF>.<CR><LF>",
            "250 2.0.0 OK: queued as 1"])
        post, = self.wait_for_posts(target)
        self.assertEqual(list(post.json), ["id", "timestamp", "sender", "recipients", "body",
                                           "subject"])
        ident = post.json["id"]
        self.assertRegex(ident, r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
        self.assertRegex(post.json["timestamp"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertEqual({**post.json, "id": 0, "timestamp": 0}, {
            "id": 0, "timestamp": 0, "sender": gordon, "recipients": [eli, isaac],
            "body": "hey guys running l8 2day\non the tram now\ncu soon\n",
            "subject": "ON MY WAY"})
        for name, value in (("Content-Type", "application/json"), ("MyService-Node", "box"),
                            ("Authorization", "Bearer my_token"), ("Idempotency-Key", ident),
                            ("webhook-id", ident)):
            self.assertEqual(post.headers.get_all(name), [value])
        until(lambda: "Session reset after POST" in server.text(), "the log")
        text = server.text()
        pattern = "".join(rf"{word}\n(?:.*\n)*?" for word in (
            f"{ident}: New session", f"{ident}: MAIL: {gordon}", f"{ident}: RCPT: {eli}",
            f"{ident}: RCPT: {isaac}", rf"{ident}: DATA: \[redacted \(\d+ bytes\)\]"))
        self.assertRegex(text, pattern)
        self.assertRegex(text, rf"{ident}: POST returned status: 200\n.*{ident}: Session reset")
        self.assertRegex(text, r"[0-9a-f-]{36}: Session logout without POST")
        self.assertEqual(text.count(": New session"), 2)
        self.assertNotIn("running l8", text)
        self.assertNotIn("my_token", text)

    def test_always_json(self):
        """Whatever the message holds; the log stays whole too."""
        target = self.target()
        server = self.run_server("--url", target.url, "--standalone_logging")
        head = b"Subject: x\r\n\r\n"
        table = (
            (head + b"plain \x00 nul\r\n", "x", "plain \0 nul\n"),
            (head + b"\xff\xfe\x80\r\n", "x", None), (head, "x", ""),
            (head + "\u00fc \u2028 \U0001f600\r\n".encode(), "x", "\u00fc \u2028 \U0001f600\n"),
            (head + b"\xed\xa0\x80 lone\r\n", "x", None),
            (head + b"\x01\x1b[31m\"\\/\x7f\r\n", "x", "\x01\x1b[31m\"\\/\x7f\n"),
            (head + b"y" * 1000000 + b"\r\n", "x", "y" * 1000000 + "\n"),
            (b"Subject: =?utf-16?B?2AA=?= =?utf-7?Q?+2AA-?=\r\n\r\nb\r\n", None, "b\n"),
            (b"Subject: a\x00\x07\xff\r\n\r\nb\r\n", None, "b\n"),
            (b"no header at all\r\nnor here\r\n", "", "no header at all\nnor here\n"),
            (b"Subject: only a header\r\n", "only a header", ""),
            (b"\r\nonly a body\r\n", "", "only a body\n"),
            (head + b"a\nb\r\r\nc\r\n", "x", None))
        for number, (message, subject, body) in enumerate(table):
            with self.subTest(message=message[:40]):
                server.send(message)
                posts = self.wait_for_posts(target, number + 1)
                self.assertEqual(posts[-1].headers["Content-Length"], str(len(posts[-1].body)))
                if subject is not None:
                    self.assertEqual(posts[-1].json["subject"], subject)
                if body is not None:
                    self.assertEqual(posts[-1].json["body"], body)
        self.assertRegex(server.text(), r"(?m)^\d{4}[-/]\d\d[-/]\d\d[T ][\d:.]+\S* .*New session$")

    def test_template(self):
        """Body, URL and header fields may all be templates."""
        target = self.target()
        folder = self.new_folder()
        with open(os.path.join(folder, "body.txt"), "w", encoding="utf-8") as file:
            file.write('{{.Subject | upper}} to {{range $i, $r := .Recipients}}'
                       '{{if $i}}, {{end}}{{$r}}{{end}}: {{.Header.Get "X-Tag"}}\n')
        server = self.run_server(
            "--url", target.url + "/{{.Sender | urlquery}}?s={{.Subject | urlquery}}",
            "--template", "@body.txt", "--header", "Content-Type: text/plain",
            "--header", "X-Title: {{.Subject}}", folder=folder)
        server.send(make_message("gr\u00fcn & co", headers="X-Tag: t1\r\n"),
                    to=("b@example.com", "c@example.com"))
        post, = self.wait_for_posts(target)
        self.assertEqual(post.path, "/hook/a%40example.com?s=gr%C3%BCn+%26+co")
        self.assertEqual(post.body.decode(),
                         "GR\u00dcN & CO to b@example.com, c@example.com: t1")
        self.assertEqual(post.headers.get_all("Content-Type"), ["text/plain"])
        self.assertEqual(post.headers["X-Title"].encode("latin-1").decode(), "gr\u00fcn & co")

    def test_signature(self):
        """As standardwebhooks.com has it, the same key with each attempt."""
        target = self.target(500, 200)
        secret = "whsec_" + base64.b64encode(b"24 bytes of a good secret").decode()
        server = self.run_server("--url", target.url, "--forward_secret", secret)
        server.send()
        first, second = self.wait_for_posts(target, 2)
        for post in (first, second):
            key, stamp = post.headers["webhook-id"], post.headers["webhook-timestamp"]
            self.assertLess(abs(time.time() - int(stamp)), 10)
            mac = hmac.new(b"24 bytes of a good secret", f"{key}.{stamp}.".encode() + post.body,
                           "sha256").digest()
            self.assertEqual(post.headers["webhook-signature"],
                             "v1," + base64.b64encode(mac).decode())
        for name in ("webhook-id", "Idempotency-Key"):
            self.assertEqual(first.headers[name], second.headers[name])
        self.assertEqual(first.body, second.body)
        fields = pegmail.sign("plain", "k", 5, b"body")
        mac = hmac.new(b"plain", b"k.5.body", "sha256").digest()
        self.assertEqual(fields["webhook-signature"], "v1," + base64.b64encode(mac).decode())
        self.assertNotIn("webhook-signature", pegmail.sign("", "k", 5, b"body"))


class ForwardStartTest(FolderCase):
    """Starts that have to be refused."""

    def test_template_mistakes(self):
        url = ["--url", "http://127.0.0.1:9/"]
        for words, option, line in (
                ([*url, "--template", "{{.Subject}}\n  {{if}}x{{end}}"], "--template", 2),
                ([*url, "--template", "{{.Nothing}}"], "--template", 1),
                ([*url, "--header", "X-A: {{.Subject | nothing}}"], "--header", 1),
                (["--url", "http://127.0.0.1/{{.Subject"], "--url", 1),
                (["--forward_to", "http://127.0.0.1/{{end}}"], "--forward_to", 1)):
            with self.subTest(words):
                err = self.assert_refused(2, "", *words, "--check", run=self.call_main)
                self.assertRegex(err, rf"{option}: line {line}, column \d+: \S")
                status, _, line = self.start_here(*words, "--smtp_port", "0", "--api_port", "0")
                self.assertEqual((status, line), (2, err))

    def test_files_and_secrets(self):
        for words, status, word in (
                (["--ca_file", "nowhere.pem"], 1, "--ca_file"),
                (["--ca_file", self.write("bad.pem", "x")], 1, "--ca_file"),
                (["--url", "http://a.example/", "--template", "@nowhere"], 1, "@nowhere"),
                (["--url", "http://a.example/", "--forward_secret", "whsec_a"], 2,
                 "--forward_secret")):
            with self.subTest(words):
                self.assert_refused(status, word, *words, "--check", run=self.call_main)


class VerdictTest(unittest.TestCase):
    """When a delivery is tried again."""

    def couriers(self, **settings):
        """Return what the pure methods of Couriers need of one."""
        return mock.Mock(settings=pegmail.Settings(**settings), spec=["settings"])

    def test_backoff(self):
        couriers = self.couriers()
        for factor in (0.8, 1, 1.2):
            with mock.patch("pegmail.random.uniform", lambda low, high, factor=factor: factor):
                times = [pegmail.Couriers.backoff(couriers, n) for n in range(1, 12)]
            self.assertEqual(times, [factor * min(3600, 10 * 2 ** n) for n in range(11)])
        self.assertLessEqual(pegmail.Couriers.backoff(couriers, 10 ** 6), 3600 * 1.2)

    def test_retry_after(self):
        soon = email.utils.formatdate(time.time() + 100, usegmt=True)
        past = email.utils.formatdate(time.time() - 100, usegmt=True)
        for text, low, high in (("7", 7, 7), ("120", 120, 120), ("999999999", 86400, 86400),
                                (soon, 97, 101), (past, 0, 0), ("soon", 0, 0), ("", 0, 0),
                                ("-5", 0, 0), ("1e3", 0, 0), ("\u0663", 0, 0),
                                ("Fri, 31 Dec 9999 23:59:59 GMT", 86400, 86400),
                                ("Fri, 99 Foo 9999 99:99:99 GMT", 0, 0)):
            with self.subTest(text):
                found = pegmail.retry_after({"retry-after": text})
                self.assertTrue(low <= found <= high, found)

    def test_statuses(self):
        for status in (*range(200, 206), 226, 299, *range(300, 309), *range(400, 430), 431, 451,
                       499, 500, 502, 503, 504, 599):
            for stubborn in (False, True):
                answer = pegmail.WebAnswer(status, {"retry-after": "3"})
                found = pegmail.Couriers.verdict(self.couriers(retry_4xx=stubborn), answer)
                for_good = 400 <= status < 500 and status not in (408, 425, 429) and not stubborn
                self.assertEqual(found.state, "delivered" if status < 300 else
                                 "failed" if for_good else "waiting", status)
                if found.state == "waiting" and status >= 400:
                    self.assertEqual(found.after, 3)


class ForwardTest(ForwardCase):
    """Real targets, good and bad."""

    def test_answers(self):
        """What is tried again, and what is not; each target on its own."""
        soon = (503, {"Retry-After": "2"})
        later = (429, {"Retry-After": email.utils.formatdate(time.time() + 3, usegmt=True)})
        elsewhere = [(status, {"Location": "http://localhost:9/"})
                     for status in (301, 302, 307, 308)]
        once = {answer: self.target(answer) for answer in (201, 204, 299, 400, 404, 410, 422)}
        twice = [self.target(answer, 200) for answer in (
            408, 425, 429, 500, 502, soon, later, None, b"HT", b"SSH-2.0-x\r\n", b"HTTP/1.1 2",
            *elsewhere)]
        server = self.run_server(*self.forward_to(*once.values(), *twice))
        server.send()
        for target in twice:
            posts = self.wait_for_posts(target, 2)
            self.assertEqual(posts[0].body, posts[1].body)
            self.assertEqual(posts[0].headers["webhook-id"], posts[1].headers["webhook-id"])
            self.assertGreater(posts[1].time - posts[0].time, 0.75)
        self.assertGreater(twice[5].posts[1].time - twice[5].posts[0].time, 1.9)
        self.wait_for_state(server, "delivered", len(twice) + 3)
        self.assertEqual({entry["target"] for entry in self.wait_for_state(server, "failed", 4)},
                         {once[status].url for status in (400, 404, 410, 422)})
        for target in once.values():
            self.assertEqual(len(target.posts), 1)
        counts = server.get("/outbox")["counts"]
        self.assertEqual(counts, {"waiting": 0, "delivered": len(twice) + 3, "failed": 4})
        figures = read_metrics(server)
        for state, count in counts.items():
            self.assertEqual(figures['pegmail_outbox{state="%s"}' % state], count)
        self.assertEqual(figures['pegmail_outbox_attempts_total{state="waiting"}'], len(twice))

    def test_stubborn_and_patient(self):
        """--retry_4xx; and --retry_for is the end."""
        refusing, broken = self.target(404, 200), self.target(500)
        server = self.run_server(*self.forward_to(refusing, broken), "--retry_4xx", "--retry_for",
                                 "1", "--retry_longest", "1")
        server.send()
        self.wait_for_posts(refusing, 2)
        entry, = self.wait_for_state(server, "failed")
        self.assertEqual((entry["target"], entry["error"]), (broken.url, "the target answered 500"))
        self.assertEqual(entry["attempts"], len(broken.posts))
        self.assertTrue(2 <= len(broken.posts) <= 4)

    def test_a_303_is_asked_for_by_get(self):
        """Without what the POST carried, and not within private networks unless allowed."""
        ask = self.target()
        target = self.target((303, {"Location": ask.url + "?done"}))
        forbidden = self.target((303, {"Location": ask.url + "?forbidden"}))
        for allowed, state in (([], "failed"), (["--webhook_allow", "127.0.0.0/8", "::1"],
                                                "delivered")):
            server = self.run_server("--url", (target if allowed else forbidden).url, "--header",
                                     "Authorization: Bearer x", *allowed)
            server.send()
            self.wait_for_state(server, state)
        post, = ask.posts
        self.assertEqual((post.method, post.path, post.body), ("GET", "/hook?done", b""))
        self.assertNotIn("Authorization", post.headers)

    def test_bad_company(self):
        """Hanging, dripping and dead targets slow neither reception nor another target."""
        hanging, dripping, good = self.target(hang, 200), self.target(drip, 200), self.target()
        dead = f"http://127.0.0.1:{free_port()}/"
        server = self.run_server(*self.forward_to(hanging, dripping, dead, good),
                                 "--forward_timeout", "1", "--forward_parallel", "1")
        begun = time.monotonic()
        with server.connect() as wire:
            for number in range(40):
                wire.deliver(make_message(f"m{number}"))
        self.assertLess(time.monotonic() - begun, 3)
        self.wait_for_posts(good, 40)
        self.assertLess(time.monotonic() - begun, 4)
        self.assertEqual(good.subjects(), [f"m{number}" for number in range(40)])
        for target in (hanging, dripping):
            posts = self.wait_for_posts(target, 41)
            self.assertEqual(posts[0].body, posts[1].body)
        self.assertEqual({entry["target"] for entry in self.entries(server, state="waiting")},
                         {dead})
        self.assertIn("refused", self.entries(server, target=dead)[0]["error"])

    def test_connections_are_kept(self):
        """One is enough; that the target closes one behind our back is no failure."""
        kept, closing = self.target(), self.target(close_silently)
        server = self.run_server(*self.forward_to(kept, closing), "--forward_parallel", "1")
        with server.connect() as wire:
            for number in range(20):
                wire.deliver(make_message(str(number)))
        for target in (kept, closing):
            self.wait_for_posts(target, 20)
            self.assertEqual(target.subjects(), [str(number) for number in range(20)])
        entries = self.wait_for_state(server, "delivered", 40)
        self.assertEqual({entry["attempts"] for entry in entries}, {1})
        self.assertLess(kept.connections, 20)
        self.assertEqual(closing.connections, 20)

    def test_order(self):
        """--forward_parallel 1: a message waits for the one before it."""
        target = self.target(200, 500, 200, None, 200)
        server = self.run_server("--url", target.url, "--forward_parallel", "1")
        with server.connect() as wire:
            for number in range(5):
                wire.deliver(make_message(str(number)))
        self.wait_for_posts(target, 7)
        self.assertEqual(target.subjects(), list("0112234"))

    def test_filters_and_forward_only(self):
        """Patterns in any case; what was forwarded goes, what was not stays."""
        everything, to_b, from_ann = self.target(), self.target(), self.target()
        hooked = self.target()
        options = (*self.forward_to(
            everything.url + " to=*@*.example", to_b.url + " to=*@B.example",
            from_ann.url + "   from=ANN@*\tto=*"), "--forward_only", "--outbox_keep", "0",
            "--webhook_allow", "127.0.0.0/8", "::1")
        server = self.run_server(*options)
        server.get("/api/webhooks?" + urllib.parse.urlencode(
            {"mailbox_address": "u@b.example", "webhook_url": hooked.url}), method="POST")
        for sender, to in (("ann@x.org", "u@b.example"), ("x@x.org", "u@B.EXAMPLE"),
                           ("x@x.org", "u@c.example"), ("Ann@y.org", "u@c.org"),
                           ("x@x.org", "u@c.org")):
            server.send(make_message(f"{sender} {to}"), sender, (to, "other@none.test"))
        for target, count in ((everything, 3), (to_b, 2), (from_ann, 2), (hooked, 2)):
            self.wait_for_posts(target, count)
        until(lambda: not server.get("/outbox")["counts"]["waiting"], "the end of all")
        server.stop()
        server = self.run_server(*options, folder=server.folder)    # and so it clears up at once
        until(lambda: server.get("/count")["count"] == 1, "the removal")
        self.assertEqual(server.get("/latest")["mail_subject"], "x@x.org u@c.org")
        self.assertEqual(self.entries(server), [])
        for target, subjects in (
                (everything, ["ann@x.org u@b.example", "x@x.org u@B.EXAMPLE",
                              "x@x.org u@c.example"]),
                (to_b, ["ann@x.org u@b.example", "x@x.org u@B.EXAMPLE"]),
                (from_ann, ["Ann@y.org u@c.org", "ann@x.org u@b.example"])):
            self.assertEqual(sorted(target.subjects()), subjects)

    def test_tls(self):
        """A certificate that nobody vouches for is refused, unless --ca_file knows it."""
        certificate, context = self.certificate()
        target = self.target(context=context)
        server = self.run_server("--url", target.url)
        server.send()
        entry = until(lambda: [entry for entry in self.entries(server) if entry["attempts"]],
                      "an attempt")[0]
        self.assertEqual((entry["state"], target.posts), ("waiting", []))
        self.assertIn("certificate verify failed", entry["error"])
        folder = server.folder
        server.stop()
        self.run_server("--url", target.url, "--ca_file", certificate.cert, folder=folder)
        self.wait_for_posts(target)

    def test_wrong_name_in_the_certificate(self):
        certificate, context = self.certificate()
        target = self.target(context=context)
        url = target.url.replace("localhost", "localhost.localdomain")
        with contextlib.suppress(OSError):
            socket.getaddrinfo("localhost.localdomain", None)
            server = self.run_server("--url", url, "--ca_file", certificate.cert)
            server.send()
            until(lambda: "mismatch" in str(self.entries(server)), "the refusal")
            self.assertEqual(target.posts, [])

    def test_proxy(self):
        """http_proxy, https_proxy with CONNECT, a password, and no_proxy."""
        certificate, context = self.certificate()
        secure, direct, proxy = self.target(context=context), self.target(), self.target()
        place = proxy.url[7:].replace("/hook", "").replace("localhost", "127.0.0.1")
        server = self.run_server(
            *self.forward_to("http://far.example/hook?x=1", secure, direct.url.replace(
                "localhost", "127.0.0.1")), "--ca_file", certificate.cert, environ={
                "http_proxy": f"http://us%20er:pass@{place}", "https_proxy": f"http://{place}",
                "no_proxy": "127.0.0.1"})
        server.send()
        for target in (secure, direct):
            self.wait_for_posts(target)
        posts = {post.method: post for post in self.wait_for_posts(proxy, 2)}
        self.assertEqual(posts["POST"].path, "http://far.example/hook?x=1")
        self.assertEqual(posts["POST"].headers["Host"], "far.example")
        self.assertEqual(posts["POST"].headers["Proxy-Authorization"],
                         "Basic " + base64.b64encode(b"us er:pass").decode())
        self.assertEqual(posts["CONNECT"].path, f"localhost:{secure.server_port}")
        self.assertNotIn("Proxy-Authorization", secure.posts[0].headers)
        self.assertEqual(len(self.wait_for_state(server, "delivered", 3)), 3)


class DurableTest(ForwardCase):
    """What is to leave leaves, whatever happens to the server."""

    def test_restart(self):
        """An outage of the target, and of the server."""
        target = self.target(503, 200)
        server = self.run_server("--url", target.url, "--retry_first", "2")
        server.send(make_message("kept"))
        until(lambda: self.entries(server)[0]["attempts"], "an attempt")
        self.assertEqual(server.stop(), 0)
        server = self.run_server("--url", target.url, folder=server.folder)
        first, second = self.wait_for_posts(target, 2)
        self.assertEqual(first.body, second.body)
        self.wait_for_state(server, "delivered")

    def test_stop_with_a_request_under_way(self):
        """It is finished if it can be; what hangs does not hold up the end for long."""
        begun = threading.Event()

        def slow(handler):
            begun.set()
            handler.server.over.wait(0.3)
            return 200
        target, hanging, deaf = self.target(slow), self.target(hang), listening()
        self.addCleanup(deaf.close)
        server = self.run_server(*self.forward_to(target, hanging, "mailto:x@far.example"),
                                 "--relay", "127.0.0.1:%d" % deaf.getsockname()[1])
        server.send()
        self.assertTrue(begun.wait(DEADLINE))
        self.wait_for_posts(hanging)
        self.addCleanup(deaf.accept()[0].close)
        at = time.monotonic()
        self.assertEqual(server.stop(), 0)
        self.assertLess(time.monotonic() - at, 9)
        with contextlib.closing(sqlite3.connect(server.folder + "/mail.db")) as db:
            self.assertEqual(dict(db.execute("SELECT target, state FROM outbox")),
                             {target.url: "delivered", hanging.url: "waiting",
                              "mail far.example": "waiting"})

    def test_kill(self):
        """Twenty rounds: before the POST, during it, and between it and its being marked.

        Every message arrives; one that is marked as delivered does not come again.
        """
        folder, sent, marked, servers = self.new_folder(), set(), set(), []

        def kill(handler):
            servers[-1].process.kill()
            return 200

        def answer_and_kill(handler):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            servers[-1].process.kill()
        target = self.target()
        chance = random.Random(11)
        for number in range(20):
            kinds = ([hang], [kill], [answer_and_kill], [200] * chance.randrange(1, 5) + [kill])
            seen, target.answers = len(target.posts), kinds[number % 4] + [200]
            server = Running("--url", target.url, "--retry_first", "1", folder=folder)
            servers.append(server)      # before it starts: what is left is posted at once
            with contextlib.suppress(OSError, AssertionError), server:
                with contextlib.suppress(OSError, AssertionError), server.connect() as wire:
                    for part in range(6):
                        subject = f"{number}.{part}"
                        wire.deliver(make_message(subject))
                        sent.add(subject)
                if number % 4:
                    until(lambda: servers[-1].process.poll() is not None, "the kill")
            self.assertIsNotNone(server.process.poll())
            target.over.set()
            target.over.clear()
            again = {post.headers["webhook-id"] for post in target.posts[seen:]} & marked
            self.assertEqual(again, set(), f"round {number}")
            with contextlib.closing(sqlite3.connect(folder + "/mail.db")) as db:
                marked |= {key for (key,) in db.execute(
                    "SELECT key FROM outbox WHERE state = 'delivered'")}
        target.answers = [200]
        server = self.run_server("--url", target.url, folder=folder)
        until(lambda: not server.get("/outbox")["counts"]["waiting"], "the rest")
        self.assertLessEqual(sent, set(target.subjects()))
        self.assertGreater(len(sent), 20)

    def test_backlog(self):
        """20,000 rows: they go in order, and memory does not grow with them."""
        target = self.target(hang)
        with Running("--url", target.url, folder=self.new_folder()) as server:
            server.send(make_message("again and again"))
            server.process.kill()
            server.process.wait()
        with contextlib.closing(sqlite3.connect(server.folder + "/mail.db")) as db:
            db.execute("DELETE FROM outbox")
            db.executemany("INSERT INTO outbox (message, target, key, event, recipients, only, "
                           "created, due) VALUES (1, 'url', ?, 'arrival', '', 0, 1, ?)",
                           ((f"k{number:05}", 1000 + number) for number in range(20000)))
            db.execute("UPDATE outbox SET created = ?", (int(time.time() * 1000),))
            db.commit()
        target.answers = [200]
        target.over.set()
        seen = len(target.posts)
        server = self.run_server("--url", target.url, "--forward_parallel", "1",
                                 folder=server.folder)
        self.wait_for_posts(target, seen + 300)
        before = memory(server)
        self.wait_for_posts(target, seen + 2500)
        self.assertLess(memory(server) - before, 8 << 20)
        self.assertEqual(server.stop(), 0)
        first = len(target.posts)
        server = self.run_server("--url", target.url, "--forward_parallel", "1",
                                 folder=server.folder)
        self.wait_for_posts(target, first + 300)
        keys = [post.headers["webhook-id"] for post in target.posts[seen:]]
        self.assertEqual(keys, [f"k{number:05}" for number in range(len(keys))])


# -- Webhooks, and where they may lead --

PRIVATE = """127.0.0.1 127.255.255.254 127.1 2130706433 0177.0.0.1 0x7f.1 0x7f000001 017700000001 0
    0.0.0.0 10.0.0.1 100.64.0.1 100.127.255.254 169.254.169.254 172.16.0.1 172.31.255.255
    192.0.0.1 192.0.2.1 192.168.0.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1
    240.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1
    64:ff9b::a9fe:a9fe 64:ff9b:1::7f00:1 2002:7f00:1:: 2002:a00:1::1 2001:0:7f00:1:: 2001:db8::1
    fe80::1 fe80::1%1 fec0::1 fc00::1 fd12::1 ff02::1 100::1 localhost""".split()
PUBLIC = """8.8.8.8 93.184.216.34 100.63.255.255 100.128.0.1 172.32.0.1 2606:4700::1111
    ::ffff:8.8.8.8 64:ff9b::808:808""".split()


class EgressTest(ForwardCase):
    """The one way out, for what a user of the API named."""

    def test_addresses(self):
        for host in PRIVATE:
            with self.subTest(host), mock.patch("socket.socket.connect") as connect:
                with self.assertRaises(OSError) as caught:
                    pegmail.Door([]).connect(host, 80, 1)
                self.assertFalse(connect.called)
                if not isinstance(caught.exception, socket.gaierror):
                    self.assertIsInstance(caught.exception, pegmail.Forbidden)
        for host in PUBLIC:
            self.assertTrue(pegmail.Door([]).may_reach(host), host)
            self.assertTrue(pegmail.Door().may_reach(host), host)
        self.assertTrue(pegmail.Door().may_reach("127.0.0.1"))

    def test_allowed_networks(self):
        door = pegmail.Door(list(map(ipaddress.ip_network, ("10.0.0.0/8", "::1"))))
        for address, allowed in (("10.1.2.3", True), ("11.1.2.3", True), ("192.168.0.1", False),
                                 ("::1", True), ("::ffff:10.0.0.1", True), ("127.0.0.1", False),
                                 ("64:ff9b::a00:1", True), ("64:ff9b::7f00:1", False)):
            with self.subTest(address):
                self.assertEqual(door.may_reach(address), allowed)

    def test_what_is_checked_is_what_is_connected_to(self):
        """DNS rebinding: the name is looked up once."""
        def found(address):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]
        door = pegmail.Door([])
        answers = [found("8.8.8.8"), found("127.0.0.1")]
        with mock.patch("socket.getaddrinfo", side_effect=answers) as ask, \
                mock.patch("socket.socket.connect") as connect:
            door.connect("evil.example", 80, 1).close()
            self.assertEqual(ask.call_count, 1)
            connect.assert_called_once_with(("8.8.8.8", 80))
            with self.assertRaises(pegmail.Forbidden):
                door.connect("evil.example", 80, 1)
            self.assertEqual(connect.call_count, 1)

    def test_urls(self):
        """What a URL's host may be written as is of no use, nor is a URL that is none."""
        client = pegmail.WebClient(pegmail.Door([]), pegmail.web_context(pegmail.Settings()), 1)
        for url in ("http://2130706433/", "http://0x7f.1:80/", "http://\u2460\u2461\u2466.0.0.1/",
                    "http://127\u30020\u30020\u30021/", "http://[::ffff:7f00:1]/",
                    "http://8.8.8.8@127.0.0.1/", "http://localhost#@8.8.8.8/", "ftp://8.8.8.8/",
                    "http://", "http:///x", "http://[::1/", "http://8.8.8.8:x/", "x", "",
                    "http://8.8.8.8/\r\nX: y", "http://8.8.8.8:99999/", "file:///etc/passwd"):
            with self.subTest(url), self.assertRaises(pegmail.Forbidden):
                client.request("POST", url, {})
        for url in ("http://.example/", "http://a..example/", "https://%/", "http://xn--/"):
            with self.subTest(url), self.assertRaises(OSError):
                client.request("POST", url, {})

    def test_by_way_of_a_proxy(self):
        """It is not asked for what may not be reached; an odd name is a failure, no bug."""
        proxy = self.target()
        place = proxy.url.replace("/hook", "")
        client = pegmail.WebClient(pegmail.Door([]), pegmail.web_context(pegmail.Settings()), 1)
        with mock.patch.dict(os.environ, http_proxy=place, https_proxy=place, no_proxy=""):
            for url in ("http://2130706433/", "https://10.0.0.1/", "http://[::1]/"):
                with self.subTest(url), self.assertRaises(pegmail.Forbidden):
                    client.request("POST", url, {})
            self.assertEqual(proxy.posts, [])
            with warnings.catch_warnings(), self.assertRaises(OSError):
                warnings.simplefilter("ignore", ResourceWarning)        # ssl forgets a socket
                client.request("POST", "https://.example/", {})


class WebhookTest(ForwardCase):
    """Events of a mailbox, in the shapes of dynip-email."""

    def setUp(self):
        self.server = self.run_server("--webhook_allow", "127.0.0.1", "::1",
                                      "--webhook_failures", "2")

    def call(self, path, method="GET", status=200, server=None, headers=(), **values):
        """Call the API with JSON; return its answer."""
        body = json.dumps(values).encode() if values else None
        found, _, answer = (server or self.server).request(
            path, method, {"Content-Type": "application/json", **dict(headers)}, body)
        self.assertEqual(found, status, answer)
        return json.loads(answer)

    def hook(self, target, mailbox="b@example.com", server=None, **values):
        """Make a webhook; return its id."""
        return self.call("/api/webhooks", "POST", server=server, mailbox_address=mailbox,
                         webhook_url=getattr(target, "url", target), **values)["id"]

    def test_life(self):
        """Made, shown, changed, deleted."""
        ident = self.hook("app.example.com/in", "Bob@Example.COM", events=["arrival", "read"])
        shown = self.call(f"/api/webhook/{ident}")
        self.assertRegex(shown.pop("created_at"), r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertEqual(shown, {
            "id": ident, "mailbox_address": "bob@example.com", "enabled": True, "failures": 0,
            "webhook_url": "http://app.example.com/in", "events": ["arrival", "read"],
            "last_error": ""})
        other = self.hook("https://app.example.com/two", "bob@example.com")
        self.assertEqual([hook["id"] for hook in self.call("/api/webhooks/BOB@example.com")],
                         [ident, other])
        self.assertEqual(self.call(f"/api/webhook/{other}")["events"], ["arrival"])
        changed = self.call(f"/api/webhook/{ident}", "PUT", events="deletion", enabled=0,
                            webhook_url="https://b.example/")
        self.assertEqual((changed["events"], changed["enabled"], changed["webhook_url"]),
                         (["deletion"], False, "https://b.example/"))
        self.assertEqual(self.call(f"/api/webhook/{ident}", "DELETE"), {"deleted": 1})
        self.assertEqual(len(self.call("/api/webhooks/bob%40example.com")), 1)
        self.assertEqual(self.call("/api/webhooks/nobody@example.com"), [])
        for path, method in ((f"/api/webhook/{ident}", "GET"), (f"/api/webhook/{ident}", "PUT"),
                             (f"/api/webhook/{ident}", "DELETE"), ("/api/webhook/%00", "GET"),
                             (f"/api/webhook/{ident}/test", "POST")):
            self.assertIn("error", self.call(path, method, 400 if "%00" in path else 404))

    def test_wrong_values(self):
        good = {"mailbox_address": "b@example.com", "webhook_url": "https://app.example.com/"}
        for wrong in ({"mailbox_address": "b"}, {"mailbox_address": ""}, {"webhook_url": "ftp://x/"},
                      {"webhook_url": ""}, {"webhook_url": "http://"}, {"webhook_url": "http://[/"},
                      {"webhook_url": "http://a b/"}, {"webhook_url": "https://a/" + "x" * 2000},
                      {"events": "arrival, departure"}, {"nonsense": "1"},
                      {"webhook_url": "http://10.0.0.1/"}, {"webhook_url": "http://[::]/"},
                      {"webhook_url": "http://169.254.169.254/latest/meta-data"}):
            with self.subTest(wrong):
                name, = wrong
                self.assertIn(name, self.call("/api/webhooks", "POST", 400, **{**good, **wrong})
                              ["error"])
        ident = self.hook("https://app.example.com/")
        for wrong in ({"webhook_url": "http://10.0.0.1/"}, {"enabled": 2}, {"events": "x"}):
            self.call(f"/api/webhook/{ident}", "PUT", 400, **wrong)
        evil = {"Origin": "http://evil.example"}
        for path, method in (("/api/webhooks", "POST"), (f"/api/webhook/{ident}", "PUT"),
                             (f"/api/webhook/{ident}", "DELETE"), ("/outbox/1", "DELETE"),
                             (f"/api/webhook/{ident}/test", "POST"), ("/outbox/1/retry", "POST")):
            self.call(path, method, 403, headers=evil)
        self.assertEqual(self.call(f"/api/webhook/{ident}")["enabled"], True)

    def test_events(self):
        """Arrival, read, deletion and test; only what was asked for, for each mailbox its own."""
        target, other, silent = self.target(), self.target(), self.target()
        ident = self.hook(target, "Bob@Example.com", events="arrival deletion read")
        self.hook(other, "carl@example.com")
        self.hook(silent, "nobody@example.com", events="arrival deletion read")
        mail = self.server.send(make_message("first", "Email content\r\n"), "a@example.com",
                                ("bob@EXAMPLE.com", "carl@example.com", "bob@example.com"))
        arrival, = self.wait_for_posts(target)
        self.assertEqual(list(arrival.json), ["event", "mailbox", "webhook_id", "timestamp",
                                              "email"])
        self.assertRegex(arrival.json["timestamp"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        email_ = arrival.json["email"]
        self.assertEqual({**arrival.json, "timestamp": "", "email": ""}, {
            "event": "arrival", "mailbox": "bob@example.com", "webhook_id": ident,
            "timestamp": "", "email": ""})
        self.assertEqual(list(email_), ["id", "to", "from", "subject", "body", "timestamp",
                                        "attachments"])
        self.assertEqual({**email_, "timestamp": ""}, {
            "id": str(mail), "to": "bob@example.com", "from": "a@example.com", "subject": "first",
            "body": "Email content\n", "timestamp": "", "attachments": 0})
        self.assertEqual(arrival.headers["Content-Type"], "application/json")
        self.assertTrue(arrival.headers["webhook-id"])
        self.server.get(f"/set_read?mail_id={mail}&is_read=1", method="POST")
        self.server.get(f"/set_read?mail_id={mail}&is_read=1", method="POST")
        self.server.get(f"/delete?mail_id={mail}", method="POST")
        number = self.call(f"/api/webhook/{ident}/test", "POST")["outbox_id"]
        posts = self.wait_for_posts(target, 4)
        self.assertEqual([post.json["event"] for post in posts],
                         ["arrival", "read", "deletion", "test"])
        self.assertEqual(posts[2].json["email"]["subject"], "first")
        self.assertIn("message", posts[3].json)
        self.assertEqual(len({post.headers["webhook-id"] for post in posts}), 4)
        entry = until(lambda: self.entries(self.server, state="delivered", after=number - 1),
                      "its end")[0]
        self.assertEqual((entry["id"], entry["event"], entry["target"]),
                         (number, "test", f"webhook {ident}"))
        self.assertEqual([post.json["mailbox"] for post in other.posts], ["carl@example.com"])
        self.assertEqual(silent.posts, [])

    def test_a_body_from_html_and_attachments(self):
        small, large = b"small \x00\xff", b"y" * 3000
        message = crlf("Subject: s", 'Content-Type: multipart/mixed; boundary="=b"', "", "--=b",
                       "Content-Type: text/html", "", "<p>Hello <b>wor</b>ld &amp; all</p>",
                       *(line for name, data in (("a.bin", small), ("b.bin", large)) for line in (
                           "--=b", "Content-Type: application/octet-stream",
                           f"Content-Disposition: attachment; filename={name}",
                           "Content-Transfer-Encoding: base64", "", *base64_lines(data))), "--=b--")
        common = [{"filename": name, "mime": "application/octet-stream", "size": len(data),
                   "hash": media_name(data)} for name, data in (("a.bin", small), ("b.bin", large))]
        links = [{**file, "url": "https://mail.example/x/media?hash=" + file["hash"]}
                 for file in common]
        content = {**common[0], "content": base64.b64encode(small).decode()}
        for kind, files in (("none", None), ("links", links), ("base64", [content, links[1]])):
            target = self.target()
            server = self.run_server("--webhook_allow", "127.0.0.1", "--attachments", kind,
                                     "--attachments_size", "1K", "--api_url",
                                     "https://mail.example/x/")
            self.hook(target, server=server)
            server.send(message)
            email_ = self.wait_for_posts(target)[0].json["email"]
            with self.subTest(kind):
                self.assertEqual((email_["body"], email_["attachments"], email_.get("files")),
                                 ("Hello world & all", 2, files))

    def test_disabled_after_failures(self):
        target, other = self.target(500), self.target()
        ident = self.hook(target)
        self.hook(other)
        self.server.send(make_message("lost"))
        hook = until(lambda: (lambda hook: hook if not hook["enabled"] else None)(
            self.call(f"/api/webhook/{ident}")), "the end of patience")
        self.assertEqual((hook["failures"], hook["last_error"]), (2, "the target answered 500"))
        entry, = self.wait_for_state(self.server, "failed")
        self.assertEqual(entry["target"], f"webhook {ident}")
        until(lambda: "is disabled" in self.server.text(), "the log")
        self.server.send(make_message("not told of"))
        self.wait_for_posts(other, 2)
        target.answers = [200]
        hook = self.call(f"/api/webhook/{ident}", "PUT", enabled=1)
        self.assertEqual((hook["enabled"], hook["failures"], hook["last_error"]), (True, 0, ""))
        self.server.send(make_message("told of"))
        self.assertEqual(self.wait_for_posts(target, 3)[2].json["email"]["subject"], "told of")
        self.assertEqual(self.call(f"/api/webhook/{ident}")["failures"], 0)

    def test_where_it_may_not_lead(self):
        """Names are looked at when they are called; a redirect too."""
        inner = self.target()
        port = inner.server_port
        guest = self.target((303, {"Location": f"http://2130706434:{port}/"}))
        inner_urls = (f"http://127.0.0.2:{port}/", f"http://0177.0.0.2:{port}/",
                      f"http://localhost.:{port}/", f"http://2130706434:{port}/")
        self.call("/api/webhooks", "POST", 400, mailbox_address="b@example.com",
                  webhook_url=inner_urls[0])
        idents = [self.hook(url) for url in (*inner_urls[1:2], *inner_urls[3:], guest.url)]
        self.server.send()
        for entry in self.wait_for_state(self.server, "failed", len(idents)):
            self.assertIn("not a public address", entry["error"])
        self.assertEqual((inner.posts, len(guest.posts)), ([], 1))

    def test_outbox_routes(self):
        """Filters, retrying and dropping."""
        target, dead = self.target(400, 200), f"http://127.0.0.1:{free_port()}/"
        server = self.run_server(*self.forward_to(target, dead))
        mail = server.send()
        entry, = self.wait_for_state(server, "failed")
        self.assertEqual((entry["mail_id"], entry["event"], entry["attempts"], entry["recipients"],
                          entry["error"]), (mail, "arrival", 1, [], "the target answered 400"))
        self.assertEqual(self.entries(server, state="failed", target=dead), [])
        waiting, = self.entries(server, target=dead)
        self.assertEqual(self.entries(server, after=max(entry["id"], waiting["id"])), [])
        self.assertEqual(self.call(f"/outbox/{entry['id']}/retry", "POST", server=server),
                         {"retried": 1})
        self.wait_for_state(server, "delivered")
        self.assertEqual(target.posts[0].headers["webhook-id"],
                         target.posts[1].headers["webhook-id"])
        self.call(f"/outbox/{entry['id']}/retry", "POST", 404, server=server)
        for ident in (waiting["id"], entry["id"]):
            self.assertEqual(self.call(f"/outbox/{ident}", "DELETE", server=server),
                             {"deleted": 1})
            self.call(f"/outbox/{ident}", "DELETE", 404, server=server)
        self.assertEqual(self.entries(server), [])


# -- Mail to other hosts --

class MailHost:
    """An SMTP server that plays a script: {verb: reply, or a list of replies one after another}.

    A reply of None hangs up. What came is in `lines` and `contents`.
    """

    def __init__(self, script=None, ehlo="SIZE 100000\n8BITMIME\nSMTPUTF8", context=None,
                 tls_first=False, address=None):
        self.script = {key: list(value) if isinstance(value, list) else value
                       for key, value in (script or {}).items()}
        self.ehlo, self.context, self.tls_first = ehlo, context, tls_first
        self.lines, self.contents, self.connections = [], [], 0
        self.sock = socket.create_server(address) if address else listening()
        self.port = self.sock.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def close(self):
        self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.sock.close()

    def serve(self):
        while True:
            try:
                sock, _ = self.sock.accept()
            except OSError:
                return
            self.connections += 1
            sock.settimeout(5)
            with contextlib.suppress(OSError), contextlib.closing(Talk(self, sock)) as talk:
                talk.run()

    def reply(self, verb, default):
        value = self.script.get(verb, default)
        if isinstance(value, list):
            value = value.pop(0) if value else default
        return value


class Talk:
    """One connection to a MailHost."""

    def __init__(self, host, sock):
        self.host, self.sock, self.secured = host, sock, False
        if host.tls_first:
            self.sock = host.context.wrap_socket(sock, server_side=True)
        self.file = self.sock.makefile("rb")

    def close(self):
        self.file.close()
        self.sock.close()

    def say(self, verb, default):
        """Send a reply; hang up if there is none."""
        reply = self.host.reply(verb, default)
        if reply is None:
            raise OSError("hang up")
        lines = reply if isinstance(reply, bytes) else (reply + "\r\n").encode()
        self.sock.sendall(lines)
        return reply

    def run(self):
        self.say("connect", "220 mx ready")
        for raw in iter(lambda: self.file.readline(), b""):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            self.host.lines.append(line)
            verb = line.upper().split(" ")[0].split(":")[0]
            getattr(self, "do_" + verb, self.do_other)(verb, line)
            if verb == "QUIT":
                return

    def do_other(self, verb, line):
        key = line.partition(":")[2].strip().split(" ")[0]
        self.say(key if key in self.host.script else verb, "250 2.0.0 fine")

    def do_EHLO(self, verb, line):
        words = self.host.ehlo.split("\n")
        words += ["STARTTLS"] if self.host.context and not self.secured else []
        lines = ["mx.example", *filter(None, words)]
        text = "".join(f"250-{word}\r\n" for word in lines[:-1]) + f"250 {lines[-1]}"
        self.say(verb, text)

    def do_STARTTLS(self, verb, line):
        if self.say(verb, "220 go")[:3] == "220" and self.host.context:
            self.sock = self.host.context.wrap_socket(self.sock, server_side=True)
            self.file, self.secured = self.sock.makefile("rb"), True

    def do_AUTH(self, verb, line):
        self.say(verb, "235 2.7.0 welcome")

    def do_DATA(self, verb, line):
        if self.say(verb, "354 go ahead")[:3] != "354":
            return
        content = b""
        for raw in iter(self.file.readline, b".\r\n"):
            if not raw:
                raise OSError("hung up on")
            content += raw
        self.host.contents.append(content)
        self.say("dot", "250 2.0.0 kept")


class FixedNames(pegmail.Resolver):
    """A resolver with everything in its cache: {domain: [host]}; a host is its own address."""

    def __init__(self, **domains):
        super().__init__([])
        for name, hosts in domains.items():
            self.remember((f"{name}.example", "MX"), 1 << 30, list(enumerate(hosts)))


MESSAGE = b"From: a@a.example\r\nSubject: x\r\n\r\n.dot\r\n..two\r\nend\r\n"
NAMES = FixedNames(one=["127.0.0.2"], two=["127.0.0.2", "127.0.0.3"], null=[""])


class CourierCase(ThreadCase):
    """Tests with a courier and hosts for it."""

    def host(self, *args, **options):
        host = MailHost(*args, **options)
        self.addCleanup(host.close)
        return host

    def courier(self, *hosts, relay=None, timeout=2.0, ca_file=None, wrap=None, **options):
        """Return a courier for whom 127.0.0.2, .3 and so on are these hosts."""
        ports = {f"127.0.0.{n}": host and host.port for n, host in enumerate(hosts, 2)}
        self.doors = []

        def connect(address, port, seconds):
            self.doors.append((address, port))
            if address in ports and not ports[address]:
                raise ConnectionRefusedError("refused")
            sock = socket.create_connection(("127.0.0.1", ports.get(address, port)), seconds)
            return wrap(sock) if wrap else sock

        courier = pegmail.MailCourier("me.example", NAMES, relay, timeout, ca_file, connect,
                                      **options)
        self.addCleanup(courier.close)
        return courier

    def send(self, courier, content=MESSAGE, recipients=("bob@one.example",), domain="one.example",
             sender="ann@a.example", head=None):
        head = content[:content.find(b"\r\n\r\n") + 2] if head is None else head
        return courier.send(domain, sender, recipients, pegmail.Source.of(content), head)

    def brief(self, outcomes):
        return {name: outcome[:3] for name, outcome in outcomes.items()}


class MailCourierTest(CourierCase):
    """What is said to a host, and what becomes of its replies."""

    def test_delivers(self):
        host = self.host()
        courier = self.courier(host)
        outcome = self.send(courier)["bob@one.example"]
        self.assertEqual(outcome, pegmail.Outcome("delivered", 250, "2.0.0", "kept", "127.0.0.2"))
        self.assertEqual(host.contents, [MESSAGE.replace(b"\r\n.", b"\r\n..")])
        self.assertEqual(host.lines[1], f"MAIL FROM:<ann@a.example> SIZE={len(MESSAGE)}")
        self.assertEqual(self.doors, [("127.0.0.2", 25)])

    def test_each_stage(self):
        bob = "bob@one.example"
        for script, expected in (
                ({"connect": "421 busy"}, ("retry", 421, "4.0.0")),
                ({"connect": "554 5.7.1 go away"}, ("failed", 554, "5.7.1")),
                ({"connect": None}, ("retry", 421, "4.4.1")),
                ({"connect": b"SSH-2.0-x\r\n"}, ("retry", 421, "4.4.1")),
                ({"connect": b"x" * 100000}, ("retry", 421, "4.4.1")),
                ({"connect": b"220-x\r\n" * 20000}, ("retry", 421, "4.4.1")),
                ({"EHLO": "502 what", "HELO": "250 hi"}, ("delivered", 250, "2.0.0")),
                ({"EHLO": "502 what", "HELO": "550 no"}, ("failed", 550, "5.0.0")),
                ({"EHLO": "451 4.3.2 no"}, ("retry", 451, "4.3.2")),
                ({"EHLO": None}, ("retry", 421, "4.4.1")),
                ({"MAIL": "451 4.7.1 greylisted"}, ("retry", 451, "4.7.1")),
                ({"MAIL": "550 5.7.1 no"}, ("failed", 550, "5.7.1")),
                ({"MAIL": "354 what"}, ("retry", 354, "4.0.0")),
                ({"MAIL": None}, ("retry", 451, "4.4.2")),
                ({"RCPT": "452 full"}, ("retry", 452, "4.0.0")),
                ({"RCPT": "550 4.1.1 unknown"}, ("failed", 550, "5.0.0")),
                ({"RCPT": "552 5.2.2 full"}, ("failed", 552, "5.2.2")),
                ({"RCPT": None}, ("retry", 451, "4.4.2")),
                ({"RCPT": "421 4.3.2 closing"}, ("retry", 421, "4.3.2")),
                ({"DATA": "451 no"}, ("retry", 451, "4.0.0")),
                ({"DATA": "554 no"}, ("failed", 554, "5.0.0")),
                ({"DATA": "250 fine"}, ("retry", 451, "4.4.2")),
                ({"DATA": None}, ("retry", 451, "4.4.2")),
                ({"dot": "452 4.3.1 disk"}, ("retry", 452, "4.3.1")),
                ({"dot": "554 5.6.0 spam"}, ("failed", 554, "5.6.0")),
                ({"dot": None}, ("retry", 451, "4.4.2")),
                ({"dot": "999 x"}, ("retry", 451, "4.4.2"))):
            with self.subTest(script=str(script)[:60]):
                self.assertEqual(self.brief(self.send(self.courier(self.host(script)))),
                                 {bob: expected})

    def test_some_recipients(self):
        host = self.host({"<b@x.example>": "550 5.1.1 No\x1b[31m such\u202e user",
                          "<c@x.example>": "450-4.2.0 later\r\n450 4.2.0 please",
                          "<d@x.example>": "552 too many"})
        courier = self.courier(host)
        people = tuple(f"{x}@x.example" for x in "abcdea") + ("bad address",)
        outcomes = self.send(courier, recipients=people)
        self.assertEqual(self.brief(outcomes), {
            "a@x.example": ("delivered", 250, "2.0.0"), "b@x.example": ("failed", 550, "5.1.1"),
            "c@x.example": ("retry", 450, "4.2.0"), "d@x.example": ("retry", 552, "5.0.0"),
            "e@x.example": ("delivered", 250, "2.0.0"), "bad address": ("failed", 553, "5.1.3")})
        self.assertEqual(outcomes["b@x.example"].text, "No [31m such  user")
        self.assertEqual(outcomes["c@x.example"].text, "later please")
        self.assertEqual(len(host.contents), 1)
        self.assertEqual(sum("RCPT" in line for line in host.lines), 5)

    def test_lost_after_a_refusal(self):
        host = self.host({"<b@x.example>": "550 5.1.1 no", "DATA": None})
        outcomes = self.send(self.courier(host), recipients=["a@x.example", "b@x.example"])
        self.assertEqual(self.brief(outcomes), {"a@x.example": ("retry", 451, "4.4.2"),
                                                "b@x.example": ("failed", 550, "5.1.1")})

    def test_next_host(self):
        for script in ({"connect": "421 busy"}, {"connect": "554 no"}, {"EHLO": "421 no"}, None):
            with self.subTest(script=script):
                first = self.host(script) if script else None
                second = self.host()
                courier = self.courier(first, second)
                outcome = self.send(courier, domain="two.example")["bob@one.example"]
                self.assertEqual((outcome.state, outcome.host), ("delivered", "127.0.0.3"))
        courier = self.courier(None, self.host({"connect": "554 no"}))
        outcome = self.send(courier, domain="two.example")["bob@one.example"]
        self.assertEqual(outcome[:3], ("retry", 421, "4.4.1"))

    def test_dns_says_no(self):
        courier = self.courier()
        self.assertEqual(self.send(courier, domain="null.example")["bob@one.example"][:3],
                         ("failed", 556, "5.1.10"))
        self.assertEqual(self.send(courier, domain="unknown.example")["bob@one.example"][:3],
                         ("retry", 451, "4.4.3"))

    def test_what_a_host_cannot_take(self):
        eight = MESSAGE + b"\xfc\r\n"
        head = "Subject: h\u00e9\r\n".encode()
        for ehlo, content, recipient, options, expected in (
                ("SIZE 10", MESSAGE, "b@x.example", {}, ("failed", 552, "5.3.4")),
                ("SIZE 0", MESSAGE, "b@x.example", {}, ("delivered", 250, "2.0.0")),
                ("SIZE \u00b2", MESSAGE, "b@x.example", {}, ("delivered", 250, "2.0.0")),
                ("", eight, "b@x.example", {}, ("failed", 554, "5.6.3")),
                ("8BITMIME", eight, "b@x.example", {}, ("delivered", 250, "2.0.0")),
                ("8BITMIME", head + b"\r\n", "b@x.example", {}, ("failed", 550, "5.6.9")),
                ("8BITMIME", b"Subject: \xfc\r\n\r\n", "b@x.example", {},
                 ("delivered", 250, "2.0.0")),
                ("8BITMIME", MESSAGE, "b\u00f6b@x.example", {}, ("failed", 553, "5.6.7")),
                ("8BITMIME", MESSAGE, "b@b\u00fccher.example", {}, ("delivered", 250, "2.0.0")),
                ("", MESSAGE, "b@x.example", {"sender": "\u00f6@x.example"},
                 ("failed", 553, "5.6.7"))):
            with self.subTest(ehlo=ehlo, content=content[:20], recipient=recipient):
                host = self.host(ehlo=ehlo)
                outcomes = self.send(self.courier(host), content, (recipient,), **options)
                self.assertEqual(self.brief(outcomes), {recipient: expected})
                self.assertEqual(any("xn--bcher-kva" in line for line in host.lines),
                                 "b\u00fccher" in recipient)

    def test_smtputf8(self):
        host = self.host()
        outcomes = self.send(self.courier(host), b"Subject: h\xc3\xa9\r\n\r\n\xc3\xa9\r\n",
                             ("b\u00f6b@b\u00fccher.example",))
        self.assertEqual([outcome.state for outcome in outcomes.values()], ["delivered"])
        self.assertIn("MAIL FROM:<ann@a.example> SIZE=20 BODY=8BITMIME SMTPUTF8", host.lines)
        self.assertIn("RCPT TO:<b\u00f6b@xn--bcher-kva.example>", host.lines)

    def test_nothing_is_smuggled(self):
        for content in (b"a: b\r\n\r\nx\n.\r\nMAIL FROM:<>", b"a: b\r\n\r\nx\r.\r\n",
                        b"a: b\r\n\r\nx\r\n.\nRCPT", b"a: b\r\n\r\nx\r"):
            courier = self.courier(self.host())
            self.assertEqual(self.brief(self.send(courier, content)),
                             {"bob@one.example": ("failed", 554, "5.6.3")})
            self.assertEqual(self.doors, [])
        for address in ("a@x.example>\r\nRSET", "a b@x.example", "a@x.example> SIZE=1", "\ud800@x"):
            outcomes = self.send(self.courier(self.host()), recipients=(address,))
            self.assertEqual(self.brief(outcomes), {address: ("failed", 553, "5.1.3")})

    def test_windows(self):
        text = b"".join(b"." * (n % 4) + b"x" * (n % 3) + b"\r\n" for n in range(200))
        for size in (1, 2, 3, 7, 100):
            source = pegmail.Source.of(text)
            source.windows = lambda start, end, size=size: (text[n:n + size] for n in
                                                            range(start, end, size))
            pegmail.read_letter("", ("b@x.example",), source, b"")
            sent = b"".join(pegmail.stuffed_windows(source))
            lines = sent.split(b"\r\n")
            self.assertEqual(lines[-2:], [b".", b""])
            self.assertNotIn(b".", lines[:-2])
            back = b"".join((line[1:] if line[:1] == b"." else line) + b"\r\n"
                            for line in lines[:-2])
            self.assertEqual(back, text)

    def test_content_that_cannot_be_read(self):
        def read(start, end):
            if len(reads) > 2:
                raise KeyError("gone")
            reads.append(start)
            return b"x" * (end - start - 2) + b"\r\n"
        reads = []
        host = self.host(ehlo="")
        courier = self.courier(host)
        with self.assertRaises(KeyError):
            courier.send("one.example", "a@x.example", ["b@x.example"],
                         pegmail.Source(1 << 19, read), b"")
        self.assertIsNone(courier.client)
        courier.close()
        self.assertEqual(host.contents, [])

    def test_connection_is_used_again(self):
        clock = [0.0]
        host = self.host({"dot": ["250 ok", "250 ok", "250 ok", "421 bye", "250 ok"]})
        courier = self.courier(host, now=lambda: clock[0])
        for idle, connections in ((0, 1), (1, 1), (40, 2), (0, 2), (0, 3)):
            clock[0] += idle
            self.send(courier)
            self.assertEqual(host.connections, connections)
        self.assertEqual(host.lines.count("RSET"), 2)
        clock[0] += 40
        courier.close_idle()
        self.assertIsNone(courier.client)

    def test_connection_that_died_is_not_used(self):
        host = self.host({"RSET": None})
        courier = self.courier(host)
        for _ in range(2):
            self.assertEqual(self.send(courier)["bob@one.example"].state, "delivered")
        self.assertEqual(host.connections, 2)

    def test_slow_host(self):
        release = threading.Event()

        def drip():
            sock = listener.accept()[0]
            with sock, contextlib.suppress(OSError):
                while not release.wait(0.05):
                    sock.sendall(b"2")
        listener = listening()
        thread = threading.Thread(target=drip)
        thread.start()
        self.addCleanup(listener.close)
        self.addCleanup(thread.join)
        self.addCleanup(release.set)
        courier = pegmail.MailCourier("me.example", NAMES, None, 0.3, None,
                              lambda *_: socket.create_connection(listener.getsockname(), 1))
        began = time.monotonic()
        self.assertEqual(self.send(courier)["bob@one.example"][:3], ("retry", 421, "4.4.1"))
        self.assertLess(time.monotonic() - began, 2)

    def test_there_is_an_end(self):
        clock = itertools.count(0, 100)
        courier = self.courier(*[self.host() for _ in range(2)], now=lambda: next(clock))
        self.assertEqual(self.send(courier, domain="two.example")["bob@one.example"].state, "retry")
        self.assertEqual(len(self.doors), 2)


class FarAway(socket.socket):
    """A connection to another host, by its own account."""

    def __init__(self, sock):
        super().__init__(fileno=sock.detach())

    def getpeername(self):
        return "192.0.2.1", 25


class SecureCourierTest(CourierCase):
    """TLS and passwords."""

    @classmethod
    def setUpClass(cls):
        certificate = Certificate()
        cls.addClassCleanup(certificate.remove)
        cls.cert = certificate.cert
        cls.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.context.load_cert_chain(cls.cert, certificate.key)

    def test_opportunistic(self):
        host = self.host(context=self.context)
        self.assertEqual(self.send(self.courier(host))["bob@one.example"].state, "delivered")
        self.assertEqual([line[:4] for line in host.lines[:4]], ["ehlo", "STAR", "ehlo", "MAIL"])
        self.assertEqual(host.connections, 1)

    def test_broken_tls_falls_back(self):
        for script in ({"STARTTLS": "454 4.7.0 not now"}, {"STARTTLS": None},
                       {"STARTTLS": b"220 go\r\n250 smuggled\r\n"}):
            with self.subTest(script=script):
                host = self.host(script, context=self.context)
                outcome = self.send(self.courier(host))["bob@one.example"]
                self.assertEqual(outcome.state, "retry" if None in script.values() else "delivered")

    def test_no_handshake_falls_back(self):
        host = self.host(ehlo="STARTTLS")
        courier = self.courier(host, timeout=0.3)
        self.assertEqual(self.send(courier)["bob@one.example"].state, "delivered")
        self.assertEqual(host.connections, 2)

    def relay_to(self, host, mode, *login, name="localhost", ca=True, **options):
        return self.courier(relay=(name, host.port, mode, *login),
                            ca_file=self.cert if ca else None, **options)

    def test_relay(self):
        for mode, tls_first in (("starttls", False), ("tls", True), ("opportunistic", False)):
            with self.subTest(mode=mode):
                host = self.host(context=self.context, tls_first=tls_first, ehlo="AUTH LOGIN PLAIN")
                courier = self.relay_to(host, mode, "us\u00e9r", "secret")
                outcome = self.send(courier)["bob@one.example"]
                self.assertEqual(outcome.state, "delivered", outcome)
                self.assertIn("AUTH PLAIN " + pegmail.base64_text("\0us\u00e9r\0secret"),
                              host.lines)
                self.assertEqual(self.doors, [("localhost", host.port)])

    def test_relay_that_is_not_trusted(self):
        for options in ({"ca": False}, {"name": "127.0.0.2"}):
            for mode, tls_first in (("starttls", False), ("tls", True)):
                with self.subTest(mode=mode, **options):
                    host = self.host(context=self.context, tls_first=tls_first, ehlo="AUTH PLAIN")
                    courier = self.relay_to(host, mode, "user", "secret", **options)
                    outcome = self.send(courier)["bob@one.example"]
                    self.assertEqual(outcome.state, "retry")
                    self.assertFalse([line for line in host.lines if "AUTH" in line])

    def test_relay_without_tls(self):
        host = self.host(ehlo="AUTH PLAIN")
        self.assertEqual(self.send(self.relay_to(host, "starttls"))["bob@one.example"][:3],
                         ("retry", 454, "4.7.4"))
        self.assertNotIn("MAIL", str(host.lines))

    def test_password_in_clear_only_on_loopback(self):
        host = self.host(ehlo="AUTH LOGIN")
        host.script["AUTH"] = "334 VXNlcm5hbWU6"
        courier = self.relay_to(host, "plain", "user", "secret")
        self.assertEqual(self.send(courier)["bob@one.example"].state, "retry")
        self.assertIn("dXNlcg==", host.lines)
        host = self.host(ehlo="AUTH PLAIN")
        courier = self.relay_to(host, "plain", "user", "secret", wrap=FarAway)
        outcome = self.send(courier)["bob@one.example"]
        self.assertEqual(outcome[:3], ("retry", 454, "4.7.4"))
        self.assertNotIn("AUTH", str(host.lines))

    def test_wrong_password_bounces_nothing(self):
        host = self.host({"AUTH": "535 5.7.8 wrong"}, ehlo="AUTH PLAIN")
        outcome = self.send(self.relay_to(host, "plain", "user", "secret"))["bob@one.example"]
        self.assertEqual(outcome[:4], ("retry", 535, "5.7.8", "wrong"))


class RelayTest(ForwardCase):
    """Forwards to mail addresses, with the whole program."""

    TO = ("--forward_to", "mailto:ann@far.example", "--relay_tls", "plain")

    def host(self, *args, **options):
        """Return a MailHost."""
        host = MailHost(*args, **options)
        self.addCleanup(host.close)
        return host

    def test_smtp_sink(self):
        folder, port = self.new_folder(), free_port()
        os.chmod(folder, 0o777)
        user = ["-u", "nobody"] if os.getuid() == 0 else []
        sink = subprocess.Popen([need("smtp-sink"), *user, "-d", folder + "/m.",
                                 f"127.0.0.1:{port}", "10"], stderr=subprocess.DEVNULL)
        self.addCleanup(sink.wait)
        self.addCleanup(sink.terminate)
        server = self.run_server(*self.TO, "--relay", f"127.0.0.1:{port}")
        with server.connect() as wire:
            for number in range(20):
                wire.deliver(make_message(f"m{number}", ".dots\r\n..\r\nh\u00e9\r\n" * 1000))
        self.wait_for_state(server, "delivered", 20)
        texts = [read_bytes(os.path.join(folder, name)) for name in os.listdir(folder)]
        self.assertEqual(sorted(re.search(rb"Subject: (\w+)", text).group(1).decode()
                                for text in texts), sorted(f"m{number}" for number in range(20)))
        for text in texts:
            self.assertEqual(text.count("\n.dots\n..\nh\u00e9".encode()), 1000)
            self.assertNotIn(b"Return-Path", text)
            self.assertIn(b"<ann@far.example>", text)

    def test_password_and_tls(self):
        certificate, context = self.certificate()
        host = self.host(context=context, ehlo="AUTH PLAIN")
        plain = self.host(ehlo="AUTH PLAIN")
        for there, state in ((host, "delivered"), (plain, "waiting")):
            server = self.run_server(
                "--forward_to", "mailto:ann@far.example", "--relay", f"localhost:{there.port}",
                "--relay_tls", "starttls", "--relay_user", "user", "--relay_password", "secret",
                "--ca_file", certificate.cert)
            server.send()
            until(lambda server=server, state=state: [
                entry for entry in self.entries(server, state=state, target="mail far.example")
                if entry["attempts"]], state)
            self.assertNotIn("secret", server.text())
        self.assertIn("AUTH PLAIN " + pegmail.base64_text("\0user\0secret"), host.lines)
        self.assertFalse([line for line in plain.lines if line[:4] in ("AUTH", "MAIL")])

    def test_bounce(self):
        """Kept here if every domain is ours; sent on if not; none for a bounce."""
        host = self.host({"RCPT": "550 5.1.1 no such user"}, ehlo="8BITMIME")
        server = self.run_server(*self.TO, "--relay", f"127.0.0.1:{host.port}")
        server.send(make_message("lost"), "carl@here.example")
        until(lambda: server.get("/count")["count"] == 2, "the bounce")
        bounce = server.get("/mail?mail_id=2")
        self.assertEqual((bounce["mail_from"], bounce["mail_to"], bounce["mail_subject"]),
                         ("", ["carl@here.example"], "Not delivered: lost"))
        self.assertIn("no such user", json.dumps(bounce["mail_body"]))
        entry, = self.wait_for_state(server, "failed")
        self.assertEqual((entry["target"], entry["recipients"], entry["error"]),
                         ("mail far.example", ["ann@far.example"], "550 5.1.1 no such user"))
        server.send(make_message("bounce"), "")
        self.wait_for_state(server, "failed", 2)
        self.assertEqual(server.get("/count")["count"], 3)
        host = self.host({"<ann@far.example>": "550 5.1.1 no"}, ehlo="8BITMIME")
        server = self.run_server(*self.TO, "--relay", f"127.0.0.1:{host.port}", "--server_host",
                                 "here.example")
        server.send(make_message("lost"), "dora@else.example", ("b@here.example",))
        until(lambda: host.contents, "the bounce")
        self.assertIn(b"To: <dora@else.example>\r\n", host.contents[0])
        self.assertIn("MAIL FROM:<>", host.lines)
        self.assertIn("RCPT TO:<dora@else.example>", host.lines)
        self.assertEqual(server.get("/count")["count"], 1)

    def test_given_up(self):
        """A host that never wants it now: after --retry_for the sender is told."""
        host = self.host({"RCPT": "451 4.3.0 not now"}, ehlo="8BITMIME")
        server = self.run_server(*self.TO, "--relay", f"127.0.0.1:{host.port}", "--retry_for", "1",
                                 "--retry_longest", "1")
        server.send(make_message("late"), "carl@here.example")
        until(lambda: server.get("/count")["count"] == 2, "the bounce")
        self.assertIn("451 4.3.0 not now", json.dumps(server.get("/mail?mail_id=2")["mail_body"]))
        self.assertEqual(self.wait_for_state(server, "failed")[0]["event"], "arrival")

    def test_one_transaction_for_a_domain(self):
        """Several forwards to one domain are one delivery."""
        settings = pegmail.Settings(forward_to=tuple(map(pegmail.forward, (
            "mailto:ann@far.example", "mailto:bob@Far.example", "mailto:eve@far.example to=z*",
            "mailto:x@other.example", "mailto:ann@far.example from=a*"))))
        store = pegmail.Store(self.new_folder() + "/mail.db", self.new_folder() + "/media")
        self.addCleanup(store.close)
        plan = pegmail.Intake(settings, store).plan(
            pegmail.Envelope("a@b.example", ("c@d.example",)))
        self.assertEqual(plan, [
            pegmail.Onward("mail far.example", ("ann@far.example", "bob@Far.example")),
            pegmail.Onward("mail other.example", ("x@other.example",))])

    def test_mx(self):
        """Without --relay: the hosts that --dns_server names, in order, on port 25."""
        zone = {("far.example", "MX"): [(20, "b.far.example"), (10, "a.far.example")],
                ("a.far.example", "A"): ["127.9.8.7"], ("b.far.example", "A"): ["127.9.8.6"],
                ("null.example", "MX"): [(0, ".")]}
        names = NameServer(zone)
        self.addCleanup(names.close)
        try:
            host = self.host(ehlo="8BITMIME", address=("127.9.8.6", 25))
        except OSError as error:
            self.skipTest(f"port 25: {error}")
        server = self.run_server("--forward_to", "mailto:ann@far.example", "--forward_to",
                                 "mailto:x@null.example", "--dns_server", names.name,
                                 "--webhook_allow", "127.0.0.0/8")
        server.send(make_message("direct"))
        self.wait_for_state(server, "delivered", target="mail far.example")
        entry, = self.wait_for_state(server, "failed", target="mail null.example")
        self.assertIn("556 5.1.10", entry["error"])
        self.assertIn(b"Subject: direct", host.contents[0])


def read_bytes(path):
    """Return what is in a file."""
    with open(path, "rb") as file:
        return file.read()


# -- Bounces --

class BounceTest(unittest.TestCase):
    """The report to a sender."""

    HEAD = b"From: a@x.example\r\nSubject: Hello\r\nMessage-ID: <1@x.example>\r\n"
    FAILED = (("bob@y.example", pegmail.Outcome("failed", 550, "5.1.1", "No such user",
                                                "mx.y.example")),
              ("eve@z.example", pegmail.Outcome("retry", 421, "4.4.1", "Cannot talk to mx")))

    def make(self, failed=FAILED, head=HEAD, sender="ann@x.example"):
        data = pegmail.make_bounce(sender, failed, head, "me.example", 0.0, "7/8", 86400.0)
        self.assertEqual(data.count(b"\n"), data.count(b"\r\n"))
        self.assertTrue(data.isascii() or not sender.isascii())
        return email.message_from_bytes(data, policy=email.policy.default)

    def fields(self, message):
        part = list(message.iter_parts())[1]
        text = part.as_bytes().partition(b"\n\n")[2]
        if part["Content-Transfer-Encoding"] == "base64":
            text = base64.b64decode(text)
        return text.decode().replace("\r\n", "\n")

    def test_report(self):
        message = self.make()
        self.assertEqual(message.get_content_type(), "multipart/report")
        self.assertEqual(message.get_param("report-type"), "delivery-status")
        self.assertEqual(message["From"], "Mail Delivery System <MAILER-DAEMON@me.example>")
        names = ("To", "Auto-Submitted", "In-Reply-To", "Date")
        self.assertEqual([message[name] for name in names],
                         ["ann@x.example", "auto-replied", "<1@x.example>",
                          "Thu, 01 Jan 1970 00:00:00 +0000"])
        parts = list(message.iter_parts())
        self.assertEqual([part.get_content_type() for part in parts],
                         ["text/plain", "message/delivery-status", "text/rfc822-headers"])
        self.assertFalse(message.defects)
        blocks = [dict(block.items()) for block in parts[1].get_payload()]
        self.assertEqual(blocks, [
            {"Reporting-MTA": "dns; me.example", "Arrival-Date": "Fri, 02 Jan 1970 00:00:00 +0000"},
            {"Final-Recipient": "rfc822; bob@y.example", "Action": "failed", "Status": "5.1.1",
             "Remote-MTA": "dns; mx.y.example", "Diagnostic-Code": "smtp; 550 5.1.1 No such user"},
            {"Final-Recipient": "rfc822; eve@z.example", "Action": "failed", "Status": "4.4.1",
             "Diagnostic-Code": "smtp; 421 4.4.1 Cannot talk to mx"}])
        self.assertIn("Check the address", parts[0].get_content())
        self.assertIn("Subject: Hello", parts[2].as_string())

    def test_nothing_breaks_out(self):
        evil = "x\r\nBcc: all@x.example\r\n\r\n--=_\0\u2028\ud800"
        head = (b"Subject: a\r b\0\r\n\tBcc: q\r\nMessage-ID: <a\r\n b>\r\nX: " + b"\xff" * 2000
                + b"\r\n\r\nbody\r\n")
        failed = [(f"b@x.example{evil}", pegmail.Outcome("failed", 550, evil, evil, evil))]
        message = self.make(failed, head)
        self.assertIsNone(message["Bcc"])
        self.assertIsNone(message["In-Reply-To"])
        self.assertEqual(len(list(message.iter_parts())), 3)
        fields = self.fields(message)
        self.assertNotIn("\nBcc", fields)
        self.assertEqual(sum(bool(line) for line in fields.split("\n")), 7)
        self.assertNotIn(b"body", list(message.iter_parts())[2].get_payload(decode=True))
        with self.assertRaises(ValueError):
            self.make(sender="ann@x.example\r\nBcc: q")

    def test_unicode(self):
        outcome = pegmail.Outcome("failed", 550, "5.1.1", "nicht gef\u00fcllt", "mx")
        failed = [("b\u00f6b@y.example", outcome)]
        head = "Subject: Gr\u00fc\u00dfe\r\n".encode()
        message = self.make(failed, head)
        parts = list(message.iter_parts())
        self.assertEqual([part.get_content_type() for part in parts[1:]],
                         ["message/global-delivery-status", "message/global-headers"])
        self.assertEqual(message["Subject"], "Not delivered: Gr\u00fc\u00dfe")
        self.assertIn("utf-8; b\u00f6b@y.example", self.fields(message))
        self.assertIn("nicht gef?llt", self.fields(message))
        self.assertIn("nicht gef\u00fcllt", parts[0].get_content())
        self.assertEqual(self.make(sender="a@b\u00fccher.example")["To"],
                         "a@xn--bcher-kva.example")

    def test_header_without_an_end(self):
        self.assertEqual(pegmail.returned_header(b"A: b\r\nC: d"), b"A: b\r\nC: d\r\n")
        self.assertEqual(pegmail.returned_header(b"A: b\r\nC: d\r\n\r\nbody"), b"A: b\r\nC: d\r\n")

    def test_long_header_is_cut_at_a_line(self):
        head = b"".join(b"X-%d: %s\r\n" % (n, b"y" * 50) for n in range(3000))
        parts = list(self.make(head=head).iter_parts())
        self.assertLessEqual(len(parts[2].as_bytes()), pegmail.MAX_RETURNED + 200)
        self.assertTrue(parts[2].as_bytes().rstrip().endswith(b"y" * 50))

    def test_who_gets_one(self):
        for sender, head, expected in (
                ("", b"", False), ("ann", b"", False), ("a b@x.example", b"", False),
                ("a@x.example", b"", True), ("a@x.example", b"Subject: x\r\n", True),
                ("a@x.example", b"Auto-Submitted: No\r\n", True),
                ("a@x.example", b"Auto-Submitted: auto-generated\r\n", True),
                ("a@x.example", b"auto-submitted: Auto-Replied (vacation)\r\n", False),
                ("a@x.example", b"a:\r\n" * 20000 + b"\r\n\r\n", True),
                ("a@x.example", b"Precedence: bulk\r\n", True)):
            with self.subTest(sender=sender, head=head):
                self.assertEqual(pegmail.is_bounceable(sender, head), expected)


# =====================================================================================
# 9. HTTP: the JSON API
# =====================================================================================

SHORT_KEYS = {"timestamp", "mail_id", "mail_from", "mail_to", "mail_subject", "is_read", "size",
              "attachment_count"}
FULL_KEYS = SHORT_KEYS | {"mail_body", "mail_headers", "mail_headers_all"}
LIST_PATHS = ("/list", "/list_short", "/filter_list", "/filter_list_short", "/search_list",
              "/search_list_short")
GET_PATHS = ("/count", "/filter_count", "/search_count", *LIST_PATHS, "/mail", "/latest", "/raw",
             "/code", "/media", "/set_read", "/auth", "/healthz", "/metrics", "/openapi.json",
             "/outbox")
PLACES = {      # paths with names in them, an example of each, and its methods
    "/outbox/{outbox_id}/retry": ("/outbox/1/retry", {"POST"}),
    "/outbox/{outbox_id}": ("/outbox/1", {"DELETE"}),
    "/api/webhooks": ("/api/webhooks", {"POST"}),
    "/api/webhooks/{address}": ("/api/webhooks/a@b.example", {"GET", "HEAD"}),
    "/api/webhook/{webhook_id}": ("/api/webhook/x", {"GET", "HEAD", "PUT", "DELETE"}),
    "/api/webhook/{webhook_id}/test": ("/api/webhook/x/test", {"POST"})}
ALL_METHODS = {"/delete": {"POST", "DELETE"}, "/set_read": {"GET", "POST"},
               **{path: {"GET", "HEAD"} for path in GET_PATHS if path != "/set_read"}}
NO_CHARS = "".join(map(chr, [*range(32), *range(127, 160), 0x2028, 0x2029]))
BIDI = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class HTTPAnswer:
    """One answer, read strictly: no line of the header may be anything but `Name: value`."""

    def __init__(self, file, method):
        match = re.fullmatch(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]*\r\n", file.readline())
        if not match:
            raise AssertionError("no answer, or not HTTP/1.1")
        self.status = int(match.group(1))
        self.fields = []
        for line in iter(file.readline, b"\r\n"):
            match = re.fullmatch(rb"([A-Za-z-]+): ([ -~]*)\r\n", line)
            if not match:
                raise AssertionError(f"not a header line: {line!r}")
            self.fields.append((match.group(1).decode(), match.group(2).decode()))
        self.names = [name.lower() for name, _ in self.fields]
        if len(set(self.names)) != len(self.names):
            raise AssertionError(f"a field is there twice: {self.fields}")
        self.body = self.read_body(file, method)

    def read_body(self, file, method):
        """Return the body, framed as the header says (RFC 9112 6.3)."""
        if method == "HEAD" or self.status in (304, 204) or self.status < 200:
            return b""
        if self["Transfer-Encoding"] == "chunked":
            pieces = []
            while True:
                size = int(file.readline(), 16)
                pieces.append(file.read(size))
                if file.read(2) != b"\r\n":
                    raise AssertionError("a chunk does not end where it says")
                if not size:
                    return b"".join(pieces)
        length = self["Content-Length"]
        body = file.read() if length is None else file.read(int(length))
        if length is not None and len(body) != int(length):
            raise AssertionError(f"{len(body)} bytes, not {length}")
        return body

    def __getitem__(self, name):
        return next((value for known, value in self.fields if known.lower() == name.lower()), None)

    @property
    def json(self):
        """The body as JSON."""
        return json.loads(self.body.decode("utf-8"))


class HTTPWire:
    """A connection to the API that speaks in bytes."""

    def __init__(self, server, address="127.0.0.1", source=None):
        self.socket = socket.create_connection((address, server.api_port), DEADLINE,
                                               source and (source, 0))
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.socket.close()

    def send(self, data):
        """Send bytes, or text as UTF-8."""
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def answer(self, method="GET"):
        """Return the next answer."""
        return HTTPAnswer(self.file, method)

    def ask(self, path, method="GET", headers=(), body=b""):
        """Send a request; return the answer."""
        self.send(http_request(path, method, headers, body))
        return self.answer(method)

    def is_closed(self):
        """Has the server closed the connection, with nothing more to say?"""
        return self.file.read(1) == b""


def http_request(path, method="GET", headers=(), body=b""):
    """Return a request as bytes; a Host among the headers takes the place of the usual one."""
    fields = dict({"Host": "localhost"}, **dict(headers))
    if body or method == "POST":
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1"] + [f"{name}: {value}" for name, value in fields.items()
                                             if value is not None]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def count_threads(server):
    """Return the number of threads of the server."""
    return len(os.listdir(f"/proc/{server.process.pid}/task"))


def wait_until_digested(server):
    """Wait until the background work is done."""
    until(lambda: not any(read_metrics(server)["pegmail_" + name]
                          for name in ("digest_lag", "index_lag")), "the digest")


def crlf(*lines):
    """Return lines (text or bytes) as bytes that end in CRLF each."""
    return b"".join((line.encode() if isinstance(line, str) else line) + b"\r\n" for line in lines)


def base64_lines(data):
    """Return bytes as lines of base64."""
    return base64.encodebytes(data).decode().split()


def media_name(data):
    """Return the name of a media file: SHA-256, cut to 24 bytes."""
    return hashlib.sha256(data).hexdigest()[:48]


def attached(data=b"%PDF-1.4 data", disposition='attachment; filename="a.pdf"',
                    mime="application/pdf", subject="attached"):
    """Return a message with a text and an attachment."""
    return crlf("From: a@example.com", f"Subject: {subject}", "MIME-Version: 1.0",
                'Content-Type: multipart/mixed; boundary="=b"', "", "--=b", "", "see below",
                "--=b", f"Content-Type: {mime}", f"Content-Disposition: {disposition}",
                "Content-Transfer-Encoding: base64", "", *base64_lines(data), "--=b--")


def attachment_item(data, filename, mime, **more):
    """Return what mail_body has for an attachment."""
    return {"type": "attachment", "hash": media_name(data), "filename": filename, "mime": mime,
            "size": len(data), **more}


def text_item(text, mime="text/plain"):
    """Return what mail_body has for an ASCII text."""
    return {"type": "text", "mime": mime, "text": text, "size": len(text)}


class APICase(ServerCase):
    """Tests of the API that share a server and some helpers."""

    def problem(self, answer, status, *words):
        """Check that an answer is this error, as JSON, and says these words."""
        self.assertEqual(answer.status, status, answer.body)
        self.assertEqual(answer["Content-Type"], "application/json")
        self.assertEqual(list(answer.json), ["error"])
        for word in words:
            self.assertIn(word, answer.json["error"])

    def ask(self, path, method="GET", headers=(), body=b""):
        """Ask on a connection of its own."""
        with HTTPWire(self.server) as wire:
            return wire.ask(path, method, headers, body)

    def ids(self, query):
        """Return the mail_ids of a list."""
        return [item["mail_id"] for item in self.server.get(query)["items"]]

    @classmethod
    def deliver(cls, *messages, sender="a@example.com", to=("b@example.com",)):
        """Have messages kept over one connection; return the mail_ids."""
        with cls.server.connect() as wire:
            return [wire.deliver(message, sender, to) for message in messages]


class ListTest(APICase):
    """Shapes, filters and pages, over a store that no test here changes."""

    MAILS = (   # sender, recipients, subject
        ("alice@example.com", ["bob@example.com"], "First word"),
        ("ALICE@Example.com", ["bob@example.com", "carol@example.net"], "second WORD"),
        ("dave@example.org", ["bob@example.com"], "100% off_ers \\ here"),
        ("dave@example.org", ["erin@example.com"], "1000 offers"),
        ("", ["bob@example.com"], "Grüße aus Köln"),
        ("frank@example.com", ["bob@example.com"], "GRÜSSE"),
        ("x_y@example.com", ["bob@example.com"], "ab"),
        ("xzy@example.com", ["bob@example.com"], ""),
        ("o'hara@example.com", ["q\"*@example.com".replace('"', "'")], "NEAR (a OR b) AND \"c\"*"),
    )

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.began = time.time() * 1000
        cls.sent = []
        with cls.server.connect() as wire:
            for number, (sender, to, subject) in enumerate(cls.MAILS):
                message = make_message(subject, f"body {number}\r\n")
                cls.sent.append(message)
                assert wire.deliver(message, sender, to) == number + 1
        cls.ended = time.time() * 1000
        assert cls.server.get("/set_read?mail_id=2&is_read=1") == {"is_read": 1}

    def test_count(self):
        self.assertEqual(self.server.get("/count"), {"count": len(self.MAILS)})

    def test_list_short_has_the_shape_of_old(self):
        answer = self.server.get("/list_short")
        self.assertEqual(list(answer), ["items", "count"])
        self.assertEqual(answer["count"], len(self.MAILS))
        for number, (item, mail) in enumerate(zip(answer["items"], self.MAILS)):
            size = len(self.server.request(f"/raw?mail_id={number + 1}")[2])
            stamp = item["timestamp"]
            self.assertTrue(isinstance(stamp, int) and self.began - 1 <= stamp <= self.ended + 1)
            self.assertEqual(item, {
                "timestamp": stamp, "mail_id": number + 1, "mail_from": mail[0],
                "mail_to": mail[1], "mail_subject": mail[2], "is_read": int(number == 1),
                "size": size, "attachment_count": 0})

    def test_list_and_mail_say_the_same(self):
        answer = self.server.get("/list")
        self.assertEqual(answer["count"], len(self.MAILS))
        short = self.server.get("/list_short")["items"]
        for item, brief in zip(answer["items"], short):
            self.assertEqual(set(item), FULL_KEYS)
            self.assertEqual({name: item[name] for name in SHORT_KEYS}, brief)
            self.assertEqual(item, self.server.get(f"/mail?mail_id={item['mail_id']}"))
        self.assertEqual(item["mail_body"], text_item("body 8\n"))

    def test_search_is_another_name_of_filter(self):
        for kind in ("count", "list", "list_short"):
            for query in ("", "?filter_mail_from=alice", "?filter_mail_subject=w&count=1&reverse=1"
                          if kind != "count" else "?filter_is_read=1"):
                with self.subTest(kind=kind, query=query):
                    self.assertEqual(self.server.request(f"/filter_{kind}{query}")[2],
                                     self.server.request(f"/search_{kind}{query}")[2])

    def test_filters(self):
        table = (
            ({}, "123456789"),
            ({"filter_mail_from": "", "filter_mail_to": "", "filter_mail_subject": "",
              "filter_is_read": ""}, "123456789"),
            ({"filter_mail_from": "alice"}, "12"),
            ({"filter_mail_from": "aLiCe@eXaMpLe.CoM"}, "12"),
            ({"filter_mail_from": "alice@example.com "}, ""),
            ({"filter_mail_to": "carol"}, "2"),
            ({"filter_mail_to": "BOB@"}, "1235678"),
            ({"filter_mail_subject": "word"}, "12"),
            ({"filter_mail_subject": "wo"}, "12"),
            ({"filter_mail_subject": "%"}, "3"),
            ({"filter_mail_subject": "0%"}, "3"),
            ({"filter_mail_subject": "100% off_"}, "3"),
            ({"filter_mail_subject": "100%off"}, ""),
            ({"filter_mail_subject": "\\"}, "3"),
            ({"filter_mail_subject": "\\ here"}, "3"),
            ({"filter_mail_subject": "off_ers"}, "3"),
            ({"filter_mail_from": "x_y"}, "7"),
            ({"filter_mail_from": "_"}, "7"),
            ({"filter_mail_subject": "GRÜ"}, "56"),
            ({"filter_mail_subject": "grüsse"}, "56"),
            ({"filter_mail_subject": "köln"}, "5"),
            ({"filter_mail_subject": "ü"}, "56"),
            ({"filter_mail_subject": "a OR b"}, "9"),
            ({"filter_mail_subject": "\"c\"*"}, "9"),
            ({"filter_mail_subject": "near ("}, "9"),
            ({"filter_mail_from": "o'h"}, "9"),
            ({"filter_mail_from": "'"}, "9"),
            ({"filter_mail_subject": "word", "filter_mail_to": "carol"}, "2"),
            ({"filter_mail_from": "alice", "filter_mail_subject": "first", "filter_mail_to": "b"},
             "1"),
            ({"filter_is_read": "1"}, "2"),
            ({"filter_is_read": "0"}, "13456789"),
            ({"filter_is_read": "0", "filter_mail_from": "alice"}, "1"),
            ({"filter_is_read": "1", "filter_mail_subject": "ab"}, ""),
            ({"filter_mail_from": "alice", "after": "1"}, "2"),
            ({"filter_mail_subject": "wo", "after": "1"}, "2"),
        )
        for settled in (False, True):
            if settled:
                wait_until_digested(self.server)
            for filters, expected in table:
                query = urllib.parse.urlencode(filters)
                with self.subTest(settled=settled, query=query):
                    ids = [int(digit) for digit in expected]
                    self.assertEqual(self.ids("/filter_list_short?" + query), ids)
                    self.assertEqual(self.ids("/filter_list_short?reverse=1&" + query), ids[::-1])
                    self.assertEqual(self.ids("/filter_list?" + query), ids)
                    self.assertEqual(self.server.get("/filter_count?" + query),
                                     {"count": len(ids)})
                    latest = self.ask("/latest?" + query)
                    if ids:
                        self.assertEqual(latest.json, self.server.get(f"/mail?mail_id={ids[-1]}"))
                    else:
                        self.problem(latest, 404)

    def test_a_filter_in_plain_utf_8_works_as_one_in_percent_codes(self):
        answer = self.ask("/filter_count?filter_mail_subject=Köln")
        self.assertEqual((answer.status, answer.json), (200, {"count": 1}))

    def test_pages(self):
        every = list(range(1, len(self.MAILS) + 1))
        for path, reverse, size in itertools.product(LIST_PATHS, (0, 1), (1, 2, 4, 100)):
            whole = every[::-1] if reverse else every
            with self.subTest(path=path, reverse=reverse, size=size):
                for offset in range(len(whole) + 2):
                    answer = self.server.get(
                        f"{path}?count={size}&offset={offset}&reverse={reverse}")
                    self.assertEqual(answer["count"], len(whole))
                    self.assertEqual([item["mail_id"] for item in answer["items"]],
                                     whole[offset:offset + size])

    def test_pages_by_the_last_id(self):
        for path in LIST_PATHS:
            with self.subTest(path=path):
                seen, last = [], 0
                while True:
                    answer = self.server.get(f"{path}?count=2&after={last}")
                    self.assertEqual(answer["count"], len(self.MAILS) - len(seen))
                    if not answer["items"]:
                        break
                    seen += [item["mail_id"] for item in answer["items"]]
                    last = seen[-1]
                self.assertEqual(seen, list(range(1, len(self.MAILS) + 1)))

    def test_count_0_lists_nothing_but_the_count(self):
        for path in LIST_PATHS:
            self.assertEqual(self.server.get(path + "?count=0"),
                             {"items": [], "count": len(self.MAILS)})

    def test_since_takes_its_own_millisecond(self):
        items = self.server.get("/list_short")["items"]
        for path in LIST_PATHS:
            for stamp in {item["timestamp"] + more for item in items for more in (-1, 0, 1)}:
                with self.subTest(path=path, stamp=stamp):
                    self.assertEqual(self.ids(f"{path}?since={stamp}"),
                                     [item["mail_id"] for item in items
                                      if item["timestamp"] >= stamp])
        last = items[-1]["timestamp"]
        self.assertEqual(self.server.get(f"/filter_count?since={last + 1}"), {"count": 0})

    def test_latest_is_never_stale(self):
        last = self.server.get("/list_short?count=1&reverse=1")["items"][0]
        self.assertEqual(self.server.get("/latest")["mail_id"], len(self.MAILS))
        for path in ("/latest", "/code"):
            for query in (f"after={last['mail_id']}", f"since={last['timestamp'] + 1}",
                          "after=2&filter_mail_from=alice", "filter_mail_subject=nowhere"):
                with self.subTest(path=path, query=query):
                    self.problem(self.ask(f"{path}?{query}"), 404)
            self.assertEqual(self.server.get(f"{path}?after=1&filter_mail_from=alice")["mail_id"],
                             2)

    def test_raw_and_eml_are_the_message_under_the_added_fields(self):
        for number, (mail, sent) in enumerate(zip(self.MAILS, self.sent), 1):
            for path in (f"/raw?mail_id={number}", f"/mail?mail_id={number}&format=eml"):
                answer = self.ask(path)
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer["Content-Type"], "message/rfc822")
                self.assertEqual(answer["X-Content-Type-Options"], "nosniff")
                self.assertEqual(answer["Content-Disposition"],
                                 f'attachment; filename="{number}.eml"')
                self.assertTrue(answer.body.startswith(f"Return-Path: <{mail[0]}>\r\n".encode()))
                self.assertTrue(answer.body.endswith(b"\r\n" + sent), answer.body)
        self.assertEqual(self.ask("/latest?format=eml").body, answer.body)

    def test_wrong_ids(self):
        for path in ("/mail", "/raw", "/code"):
            for number in (len(self.MAILS) + 1, 0, 1 << 52):
                answer = self.ask(f"{path}?mail_id={number}")
                self.problem(answer, 404 if number else 400, "mail_id")
        self.problem(self.ask(f"/media?hash={'0' * 48}"), 404, "hash")

    def test_each_list_has_a_tag(self):
        forms = [(path, form) for path in LIST_PATHS for form in ("json", "text", "mbox")]
        for path, form in [*forms, ("/mail", "json"), ("/mail", "text"), ("/latest", "json"),
                           ("/count", ""), ("/filter_count", ""), ("/code", "")]:
            query = "?mail_id=1" if path == "/mail" else "?"
            query += f"&format={form}" if form else ""
            with self.subTest(path=path, form=form), HTTPWire(self.server) as wire:
                first = wire.ask(path + query)
                self.assertEqual(first.status, 200)
                tag = first["ETag"]
                self.assertRegex(str(tag), r'^(W/)?"[!#-~]+"$')
                strong = tag[2:] if tag.startswith("W/") else tag
                for header in (tag, strong, "W/" + strong, f'"x", {tag} , W/"y"', "*"):
                    for method in ("GET", "HEAD"):
                        again = wire.ask(path + query, method, {"If-None-Match": header})
                        self.assertEqual((again.status, again.body), (304, b""), header)
                        self.assertEqual(again["ETag"], tag)
                        self.assertEqual(again["Vary"], first["Vary"])
                        self.assertIn(again["Content-Length"], (None, first["Content-Length"]))
                for header in ('"other"', 'W/"other"', strong[:-2] + '"', strong.strip('"')):
                    again = wire.ask(path + query, "GET", {"If-None-Match": header})
                    self.assertEqual((again.status, again.body), (200, first.body), header)

    def test_gzip_when_asked_for(self):
        table = (("gzip", True), ("gzip, deflate, br", True), ("deflate, gzip;q=1.0, *;q=0.5",
                 True), ("br;q=1.0, gzip ; q=0.5", True), ("*", True), ("gzip;q=0.001", True),
                 (None, False), ("", False), ("identity", False), ("gzip;q=0", False),
                 ("gzip; q=0.000", False), ("deflate, br", False), ("*;q=0", False),
                 ("*, gzip;q=0", False), ("gzip;q=0, *", False), ("gzippy", False),
                 ("x-not-gzip", False))
        for path in ("/list", "/list_short", "/filter_list?", "/openapi.json",
                     "/list?format=text"):
            with HTTPWire(self.server) as wire:
                plain = wire.ask(path)
                self.assertEqual((plain["Content-Encoding"], plain["Vary"]),
                                 (None, "Accept-Encoding"))
                for header, zipped in table:
                    with self.subTest(path=path, header=header):
                        answer = wire.ask(path, "GET", {"Accept-Encoding": header})
                        packed = answer["Content-Encoding"] == "gzip"
                        if len(plain.body) > 1000 or not zipped:
                            self.assertEqual(packed, zipped)
                        body = gzip.decompress(answer.body) if packed else answer.body
                        self.assertEqual(body, plain.body)
                        self.assertEqual(answer["Vary"], "Accept-Encoding")
                        self.assertEqual(answer["ETag"], plain["ETag"])
                        head = wire.ask(path, "HEAD", {"Accept-Encoding": header})
                        self.assertEqual(head["Content-Length"], answer["Content-Length"])

    def test_head_is_get_without_a_body(self):
        queries = {"/mail": "?mail_id=1", "/raw": "?mail_id=1", "/code": "?mail_id=1",
                   "/media": f"?hash={'0' * 48}"}
        wanted = [path + queries.get(path, "") for path in GET_PATHS if path != "/set_read"]
        wanted += [f"{path}?format={form}" for path in LIST_PATHS for form in ("text", "mbox")]
        wanted += ["/mail?mail_id=1&format=eml", "/mail?mail_id=1&format=text", "/mail",
                   "/mail?mail_id=77", "/list?count=x", "/nowhere", "/delete?mail_id=1"]
        with HTTPWire(self.server) as wire:
            for path in wanted:
                with self.subTest(path=path):
                    get, head = wire.ask(path), wire.ask(path, "HEAD")
                    self.assertEqual(head.status, get.status)
                    if path == "/metrics":          # its figures move
                        self.assertEqual(head.names, get.names)
                    else:
                        self.assertEqual([field for field in head.fields if field[0] != "Date"],
                                         [field for field in get.fields if field[0] != "Date"])
            self.assertEqual(wire.ask("/count").status, 200)

    def test_every_answer_says_what_a_browser_may_do_with_it(self):
        with HTTPWire(self.server) as wire:
            for path in (*GET_PATHS, "/nowhere", "/mail?mail_id=1", "/raw?mail_id=1"):
                with self.subTest(path=path):
                    answer = wire.ask(path)
                    self.assertEqual(answer["X-Content-Type-Options"], "nosniff")
                    self.assertNotIn("html", answer["Content-Type"])
                    self.assertFalse([name for name in answer.names if "access-control" in name])

    def test_paths_and_methods(self):
        unknown = ("/", "/nowhere", "/counts", "/count/", "/COUNT", "/list/1", "/../count",
                   "/..%2fcount", "/media/../mail.db", "//evil.example/count", "/.env",
                   "/%2e%2e/%2e%2e/etc/passwd", "/mail.db", "/favicon.ico")
        with HTTPWire(self.server) as wire:
            for path in unknown:
                for method in ("GET", "POST", "DELETE", "PUT"):
                    with self.subTest(path=path, method=method):
                        self.problem(wire.ask(path, method), 404)
            for path, allowed in [*ALL_METHODS.items(), *PLACES.values()]:
                for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH",
                               "OPTIONS"} - allowed:
                    with self.subTest(path=path, method=method):
                        answer = wire.ask(path + "?mail_id=1&is_read=0&hash=00", method)
                        self.assertEqual(answer.status, 405)
                        self.assertEqual(set(re.split(", *", answer["Allow"])), allowed)
        for method in ("TRACE", "CONNECT", "BREW", "get", "PROPFIND"):
            with self.subTest(method=method):
                self.assertIn(self.ask("/count", method).status, (405, 501))

    def test_wrong_parameters_are_named(self):
        paths = self.server.get("/openapi.json")["paths"]
        bad = ("x", "-1", "1.5", "1e3", "0x1", "1_0", "%C3%BC", "%D9%A3", "9" * 30, "%00", "1;2",
               "1%0d%0aX-Evil:%201")
        good = {"mail_id": "1", "is_read": "1", "hash": "0" * 48, "outbox_id": "1",
                "mailbox_address": "a@b.example", "webhook_url": "http://b.example/",
                "address": "a@b.example", "webhook_id": "x"}
        with HTTPWire(self.server) as wire:
            for path, method in [(name, verb) for name in paths for verb in paths[name]]:
                params = {param["name"]: param for param in paths[path][method]["parameters"]}
                required = {name: good[name] for name in params if params[name]["required"]}

                def ask(values, path=path, method=method):
                    place = re.sub(r"{(\w+)}", lambda name: values[name.group(1)], path)
                    return wire.ask(place + "?" + "&".join(
                        f"{name}={value}" for name, value in values.items()
                        if "{%s}" % name not in path), method.upper())
                with self.subTest(path=path, method=method):
                    self.problem(ask({**required, "nonsense": "1"}), 400, "nonsense")
                    for name in [name for name in required if "{%s}" % name not in path]:
                        rest = {key: value for key, value in required.items() if key != name}
                        self.problem(ask(rest), 400, name)
                        self.problem(ask({**rest, name: ""}), 400, name)
                for name, param in params.items():
                    for value in bad if param["schema"]["type"] == "integer" else ():
                        with self.subTest(path=path, name=name, value=value):
                            self.problem(ask({**required, name: value}), 400, name)

    def test_limits_are_those_that_are_described(self):
        paths = self.server.get("/openapi.json")["paths"]
        with HTTPWire(self.server) as wire:
            for path in LIST_PATHS:
                for param in paths[path]["get"]["parameters"]:
                    if "maximum" not in param["schema"]:
                        continue
                    low, high = param["schema"]["minimum"], param["schema"]["maximum"]
                    with self.subTest(path=path, name=param["name"]):
                        for value in (low, high) if param["name"] != "wait" else (low,):
                            self.assertEqual(
                                wire.ask(f"{path}?{param['name']}={value}").status, 200)
                        self.problem(wire.ask(f"{path}?{param['name']}={high + 1}"), 400,
                                     param["name"])
        self.assertEqual(paths["/list"]["get"]["parameters"][-1]["in"], "query")

    def test_other_wrong_values(self):
        long = "a" * 10000
        table = (("/list_short?format=xml", "format"), ("/mail?mail_id=1&format=mbox", "format"),
                 ("/list?format=eml", "format"), ("/list?format=JSON", "format"),
                 ("/filter_list?filter_is_read=2", "filter_is_read"),
                 ("/filter_list?filter_is_read=yes", "filter_is_read"),
                 (f"/filter_count?filter_mail_to={long}", "filter_mail_to"),
                 ("/filter_count?filter_mail_from=%00", "filter_mail_from"),
                 ("/media?hash=../../mail.db", "hash"), ("/media?hash=" + "A" * 48, "hash"),
                 ("/media?hash=%2e%2e%2f", "hash"), ("/media?hash=" + "0" * 65, "hash"),
                 ("/list?filter_mail_to=b", "filter_mail_to"), ("/list?reverse=2", "reverse"),
                 ("/list?wait=61", "wait"), ("/count?count=1", "count"), ("/list?%ff=1", ""),
                 ("/filter_list?filter_mail_subject=%ff", ""), ("/list?=1", ""),
                 ("/list?" + "&".join(f"a{n}=1" for n in range(1000)), ""))
        with HTTPWire(self.server) as wire:
            for path, name in table:
                with self.subTest(path=path[:60]):
                    self.problem(wire.ask(path), 400, name)

    def test_empty_parameters_mean_the_default(self):
        for path in LIST_PATHS:
            self.assertEqual(
                self.server.get(path + "?count=&offset=&reverse=&after=&since=&wait=&format="),
                self.server.get(path))


class ChangeTest(APICase):
    """/set_read and /delete."""

    def test_set_read_in_every_way(self):
        ident = self.server.send()
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        plain = {"Content-Type": "application/json; charset=utf-8"}
        ways = (
            ("GET", f"?mail_id={ident}&is_read=%d", {}, ""),
            ("POST", f"?mail_id={ident}&is_read=%d", {}, ""),
            ("POST", "", form, f"mail_id={ident}&is_read=%d"),
            ("POST", f"?mail_id={ident}", form, "is_read=%d"),
            ("POST", "", plain, '{"mail_id": %d, "is_read": %%d}' % ident),
            ("POST", "", plain, '{"mail_id": "%d", "is_read": "%%d"}' % ident),
        )
        for method, query, headers, body in ways:
            for state in (1, 0, 0, 1, 1, 0):
                with self.subTest(method=method, body=body, state=state):
                    answer = self.ask("/set_read" + query.replace("%d", str(state)), method,
                                      headers, body.replace("%d", str(state)).encode())
                    self.assertEqual((answer.status, answer.json), (200, {"is_read": state}))
                    self.assertEqual(self.server.get(f"/mail?mail_id={ident}")["is_read"], state)
                    for value in (0, 1):
                        listed = self.ids(f"/filter_list_short?filter_is_read={value}&count=1000")
                        self.assertEqual(ident in listed, value == state)
                        self.assertEqual(
                            self.server.get(f"/filter_count?filter_is_read={value}"),
                            {"count": len(listed)})
        answer = self.ask("/set_read", "POST", plain,
                          b'{"mail_id": %d, "is_read": true}' % ident)
        self.assertEqual(answer.json, {"is_read": 1})

    def test_reading_does_not_set_read(self):
        ident = self.server.send()
        for path in ("/mail", "/raw", "/code", "/list", "/latest"):
            self.ask(path + (f"?mail_id={ident}" if path[1] in "mrc" else ""))
        self.assertEqual(self.server.get(f"/mail?mail_id={ident}")["is_read"], 0)

    def test_the_tag_of_a_list_changes_with_it(self):
        ident = self.server.send(attached())
        for change in (lambda: self.server.get(f"/set_read?mail_id={ident}&is_read=1"),
                       self.server.send,
                       lambda: self.ask(f"/delete?mail_id={ident}", "DELETE")):
            before = [self.ask(path)["ETag"] for path in LIST_PATHS]
            change()
            after = [self.ask(path, "GET", {"If-None-Match": tag})
                     for path, tag in zip(LIST_PATHS, before)]
            self.assertEqual([answer.status for answer in after], [200] * len(LIST_PATHS))
            self.assertFalse(set(before) & {answer["ETag"] for answer in after})

    def test_wrong_bodies(self):
        ident = self.server.send()
        form, plain = "application/x-www-form-urlencoded", "application/json"
        table = (
            (plain, b"{", 400), (plain, b"[]", 400), (plain, b"7", 400), (plain, b"null", 400),
            (plain, b"[" * 100000, 400), (plain, b'{"mail_id":' * 20000, 400),
            (plain, b'{"mail_id": 1e999, "is_read": 1}', 400),
            (plain, b'{"mail_id": NaN, "is_read": 1}', 400),
            (plain, b'{"mail_id": ' + b"9" * 6000 + b', "is_read": 1}', 400),
            (plain, b'{"mail_id": 1.5, "is_read": 1}', 400),
            (plain, b'{"mail_id": [1], "is_read": 1}', 400),
            (plain, b'{"mail_id": {"a": 1}, "is_read": 1}', 400),
            (plain, b'{"mail_id": null, "is_read": 1}', 400),
            (plain, b'{"is_read": 1}', 400), (plain, b'{"\xff": 1}', 400),
            (plain, b'{"mail_id": 1, "is_read": 1, "x\\r\\ny": 1}', 400),
            (form, b"mail_id=x&is_read=1", 400), (form, b"is_read=1", 400),
            (form, b"mail_id=%ff&is_read=1", 400), (form, b"\xff\xfe", 400), (form, b"&&&", 400),
            (form, b"&".join([b"a=1"] * 5000), 400),
            ("text/plain", b"mail_id=1&is_read=1", 415),
            ("multipart/form-data; boundary=x", b"--x--", 415),
            ("", b'{"mail_id": 1, "is_read": 1}', 415))
        with HTTPWire(self.server) as wire:
            for kind, body, status in table:
                with self.subTest(kind=kind, body=body[:40]):
                    headers = {"Content-Type": kind or None}
                    self.problem(wire.ask("/set_read", "POST", headers, body), status)
        self.assertEqual(self.server.get(f"/mail?mail_id={ident}")["is_read"], 0)

    def test_delete(self):
        first, second = self.deliver(attached(b"shared" * 100),
                                     attached(b"shared" * 100))
        name = media_name(b"shared" * 100)
        wait_until_digested(self.server)
        for ident, method, left in ((first, "POST", 200), (second, "DELETE", 404)):
            with self.subTest(method=method):
                self.assertEqual(self.ask(f"/media?hash={name}").status, 200)
                count = self.server.get("/count")["count"]
                self.problem(self.ask(f"/delete?mail_id={ident}"), 405)
                self.assertEqual(self.server.get("/count")["count"], count)
                self.assertEqual(self.ask(f"/delete?mail_id={ident}", method).status, 200)
                self.assertEqual(self.server.get("/count")["count"], count - 1)
                for path in ("/mail", "/raw", "/code"):
                    self.problem(self.ask(f"{path}?mail_id={ident}"), 404, "mail_id")
                for path in (f"/set_read?is_read=1&mail_id={ident}", f"/delete?mail_id={ident}"):
                    self.problem(self.ask(path, "POST"), 404, "mail_id")
                self.assertNotIn(ident, self.ids("/list_short?count=1000"))
                self.assertEqual(self.ask(f"/media?hash={name}").status, left)
        self.assertFalse([found for _, _, found in os.walk(
            os.path.join(self.server.folder, "media", name[:2], name[2:4])) if found])

    def test_the_number_of_a_deleted_message_is_not_given_again(self):
        ident = self.server.send()
        self.assertEqual(self.ask("/delete", "POST", {"Content-Type": "application/json"},
                                  b'{"mail_id": %d}' % ident).status, 200)
        self.assertGreater(self.server.send(), ident)


class BodyTest(APICase):
    """What mail_body and mail_headers make of all kinds of mail, at once and later."""

    PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    PDF = b"%PDF-1.4\n" + bytes(range(256)) * 4

    def show(self, message, **options):
        """Have a message kept; return what /mail says at once, having checked what is constant."""
        ident, = self.deliver(message, **options)
        item = self.server.get(f"/mail?mail_id={ident}")
        self.assertLessEqual(FULL_KEYS, set(item))
        self.assertTrue(self.ask(f"/raw?mail_id={ident}").body.endswith(b"\r\n" + message))
        listed, = self.server.get(f"/list?count=1&after={ident - 1}")["items"]
        wait_until_digested(self.server)
        # Without the difference, which takes minutes to find in large texts; so elsewhere below.
        self.assertTrue(listed == item, "/list differs from /mail")
        self.assertTrue(self.server.get(f"/mail?mail_id={ident}") == item, "it differs later")
        return item

    def test_trees(self):
        head = ("From: a@example.com", "Subject: tree", "MIME-Version: 1.0")
        png, pdf = base64_lines(self.PNG), base64_lines(self.PDF)
        alternative = ("Content-Type: multipart/alternative; boundary=alt", "", "preamble",
                       "--alt", "Content-Type: text/plain", "", "plain", "", "--alt",
                       "Content-Type: text/html; charset=utf-8", "", "<b>rich</b>", "--alt--",
                       "epilogue")
        both = {"type": "alternative", "items": [text_item("plain\n"),
                                                 text_item("<b>rich</b>", "text/html")]}
        calendar = "BEGIN:VCALENDAR\r\nMETHOD:REQUEST\r\nEND:VCALENDAR"
        table = (
            ("plain", ("", "one", "two"), text_item("one\ntwo\n"), 0),
            ("html only", ("Content-Type: TEXT/HTML; charset=\"UTF-8\"", "", "<p>hi"),
             text_item("<p>hi\n", "text/html"), 0),
            ("alternative", alternative, both, 0),
            ("mixed", ("Content-Type: multipart/mixed;", "\tboundary=\"a b'()+_,-./:=?\"", "",
                       "--a b'()+_,-./:=?", "", "text", "--a b'()+_,-./:=?",
                       "Content-Type: application/pdf; name=x.pdf",
                       "Content-Transfer-Encoding: BASE64", "", *pdf, "--a b'()+_,-./:=?--"),
             {"type": "mixed", "items": [text_item("text"), attachment_item(
                 self.PDF, "x.pdf", "application/pdf")]}, 1),
            ("related", ("Content-Type: multipart/related; boundary=r", "", "--r",
                         "Content-Type: text/html", "", '<img src="cid:i@x">', "--r",
                         "Content-Type: image/png", "Content-ID: <i@x>",
                         "Content-Disposition: inline; filename=i.png",
                         "Content-Transfer-Encoding: base64", "", *png, "--r--"),
             {"type": "related", "items": [
                 text_item('<img src="cid:i@x">', "text/html"),
                 attachment_item(self.PNG, "i.png", "image/png", content_id="i@x")]}, 1),
            ("all of it", ("Content-Type: multipart/mixed; boundary=m", "", "--m", *alternative,
                           "--m", "Content-Type: application/pdf",
                           "Content-Disposition: attachment; filename=a.pdf",
                           "Content-Transfer-Encoding: base64", "", *pdf, "--m",
                           "Content-Type: image/png; name=b.png",
                           "Content-Transfer-Encoding: base64", "", *png, "--m--"),
             {"type": "mixed", "items": [
                 both, attachment_item(self.PDF, "a.pdf", "application/pdf"),
                 attachment_item(self.PNG, "b.png", "image/png")]}, 2),
            ("calendar", ("Content-Type: multipart/alternative; boundary=c", "", "--c", "", "x",
                          "--c", "Content-Type: text/calendar; method=REQUEST; charset=utf-8", "",
                          calendar, "--c--"),
             {"type": "alternative", "items": [text_item("x"), text_item(
                 calendar.replace("\r\n", "\n"), "text/calendar")]}, 0),
            ("text as attachment", ("Content-Type: multipart/mixed; boundary=t", "", "--t",
                                    "Content-Type: text/plain",
                                    "Content-Disposition: attachment; filename=n.txt", "", "note",
                                    "--t--"),
             {"type": "mixed", "items": [attachment_item(b"note", "n.txt", "text/plain")]}, 1),
            ("winmail", ("Content-Type: application/ms-tnef; name=\"winmail.dat\"",
                         "Content-Transfer-Encoding: base64", "", *png),
             attachment_item(self.PNG, "winmail.dat", "application/ms-tnef"), 1),
            ("type by the name", ("Content-Type: application/octet-stream; name=\"Report.PDF\"",
                                  "Content-Transfer-Encoding: base64", "", *pdf),
             attachment_item(self.PDF, "Report.PDF", "application/pdf"), 1),
            ("never closed", ("Content-Type: multipart/mixed; boundary=n", "", "--n", "", "text"),
             {"type": "mixed", "items": [text_item("text\n")]}, 0),
            ("signed", ("Content-Type: multipart/signed; boundary=s; micalg=pgp-sha1", "", "--s",
                        "", "text", "--s", "Content-Type: application/pgp-signature", "", "sig",
                        "--s--"),
             {"type": "signed", "items": [text_item("text"), attachment_item(
                 b"sig", "attachment.sig", "application/pgp-signature")]}, 1),
            ("quoted-printable", ("Content-Transfer-Encoding: quoted-printable", "",
                                  "a=", "b =3D c=20", "d"), text_item("ab = c \nd\n"), 0),
            ("base64 text", ("Content-Transfer-Encoding: base64", "Content-Type: text/plain", "",
                             *base64_lines(b"one\r\ntwo")), text_item("one\ntwo"), 0),
            ("an empty attachment", ("Content-Type: image/png; name=e.png", ""),
             attachment_item(b"", "e.png", "image/png"), 1),
        )
        for name, lines, expected, attachments in table:
            with self.subTest(name=name):
                item = self.show(crlf(*head, *lines))
                if name == "signed":        # the name is made up from the type
                    item["mail_body"]["items"][1]["filename"] = "attachment.sig"
                self.assertEqual(item["mail_body"], expected)
                self.assertEqual(item["attachment_count"], attachments)
                self.assertNotIn("parse_error", item)
                for hash_ in re.findall('"hash": "([0-9a-f]+)"', json.dumps(expected)):
                    self.assertEqual(media_name(self.ask(f"/media?hash={hash_}").body), hash_)

    def test_a_message_in_a_message(self):
        inner = attached(self.PDF, subject="=?utf-8?q?in_n=C3=A9r?=")
        for kind, default in (("mixed", "Content-Type: message/rfc822"),
                              ("digest", "X-Nothing: here")):
            with self.subTest(kind=kind):
                item = self.show(crlf("Subject: outer",
                                      f"Content-Type: multipart/{kind};boundary=o", "", "--o",
                                      default, "", inner[:-2], "--o--"))
                self.assertEqual(item["mail_subject"], "outer")
                self.assertEqual(item["attachment_count"], 1)
                (nested,) = item["mail_body"]["items"]
                self.assertEqual((nested["type"], nested["mime"]), ("message", "message/rfc822"))
                self.assertEqual(nested["mail_headers"]["Subject"], "in nér")
                self.assertEqual(nested["items"], [{"type": "mixed", "items": [
                    text_item("see below"),
                    attachment_item(self.PDF, "a.pdf", "application/pdf")]}])

    def test_charsets(self):
        table = (
            ("utf-8", "Grüße €".encode(), "Grüße €"), ("iso-8859-1", b"Gr\xfc\xdfe", "Grüße"),
            ("ISO-8859-15", b"\xa4", "€"), ("windows-1252", b"\x80 5", "€ 5"),
            ("koi8-r", "привет".encode("koi8-r"), "привет"), ("gb2312", b"\xc4\xe3", "你"),
            ("iso-2022-jp", "日本".encode("iso-2022-jp"), "日本"),
            ("shift_jis", "日本".encode("shift_jis"), "日本"), ("utf-7", b"a +AOQ-", "a ä"),
            ("big5", "日本".encode("big5"), "日本"), ("euc-kr", "한".encode("euc-kr"), "한"),
            ("us-ascii", "ü".encode(), "ü"), ("us-ascii", b"\xfc", "ü"), ("utf-8", b"\xfc", "ü"),
            ("x-klingon", "ü".encode(), "ü"), ("x-klingon", b"\xfc", "ü"), ("", b"\xfc", "ü"),
            ("rot13", b"abc", "abc"), ("hex", b"6162", "6162"), ("base64", b"YWJj", "YWJj"),
            ("zip", b"abc", "abc"), ("idna", b"abc", "abc"), ("unicode_escape", b"\\n", "\\n"),
            ("raw_unicode_escape", b"\\u0041", "\\u0041"), ("punycode", b"a-b", "a-b"),
            ("../../etc/passwd", b"abc", "abc"), ("\u00fc", b"abc", "abc"), ("x" * 5000, b"a", "a"))
        for charset, data, text in table:
            with self.subTest(charset=charset[:20], data=data):
                item = self.show(crlf("Subject: charset",
                                      f'Content-Type: text/plain; charset="{charset}"',
                                      "Content-Transfer-Encoding: base64", "",
                                      *base64_lines(data)))
                self.assertEqual(item["mail_body"]["text"], text)

    def test_headers(self):
        item = self.show(crlf("Subject: =?utf-8?b?R3LDvMOfZQ==?= =?iso-8859-1?q?_=FC?=",
                              "subject: second", "X-One: 1", "x-one: 2", "X-ONE: 3",
                              "To: b@example.com", "Received: from me", "X-Folded: a", "\tb",
                              "  c", "X-Empty:", b"X-Utf8: \xc3\xbc", b"X-Latin: \xfc", "", "x"))
        self.assertEqual(item["mail_subject"], "Grüße ü")
        pairs = [pair for pair in item["mail_headers_all"] if pair[0] != "Return-Path"][1:]
        self.assertEqual(pairs, [
            ["Subject", "Grüße ü"], ["subject", "second"], ["X-One", "1"], ["x-one", "2"],
            ["X-ONE", "3"], ["To", "b@example.com"], ["Received", "from me"],
            ["X-Folded", "a\tb  c"], ["X-Empty", ""], ["X-Utf8", "ü"], ["X-Latin", "ü"]])
        first = {}
        for name, value in item["mail_headers_all"]:
            if name.lower() not in map(str.lower, first):
                first[name] = value
        self.assertEqual(item["mail_headers"], first)
        self.assertIn("(pegmail)", first["Received"])

    def test_subjects(self):
        table = (
            (b"", ""), (b" plain ", "plain"), ("Grüße".encode(), "Grüße"),
            (b"Gr\xfc\xdfe", "Grüße"),
            (b"=?utf-8?q?a_b?=", "a b"), (b"=?UTF-8?B?4oKs?=", "€"), (b"a\r\n b", "a b"),
            (b"=?utf-8?b?4oI=?= =?utf-8?b?rA==?=", "€"), (b"=?x?q?a?=", "a"),
            (b"=?utf-8?q?unfinished", "=?utf-8?q?unfinished"), (b"=?iso-8859-1*en?q?=FC?=", "ü"),
            (b"=?utf-8?q?a?= b =?utf-8?q?c?=", "a b c"))
        for raw, text in table:
            with self.subTest(raw=raw):
                item = self.show(b"Subject:" + raw + b"\r\n\r\nx\r\n")
                self.assertEqual(item["mail_subject"], text)
        for raw in (b"=?utf-8?q?a=0D=0AX-Evil:_1?=", b"a\tb", b"a\x00b", b"a\x1b[31mb",
                    b"=?utf-8?b?YQBi?=", "a\u2028b\u0085c".encode()):
            with self.subTest(raw=raw):
                item = self.show(b"Subject: " + raw + b"\r\n\r\nx\r\n")
                self.assertRegex(item["mail_subject"], r"^a.+$")
                self.assertFalse(set(item["mail_subject"]) & set(NO_CHARS))

    def test_odd_mail_is_kept_and_shown(self):
        table = (
            ("no header", b"hello there\r\nbye\r\n", "hello there\nbye\n"),
            ("no header, a colon later", b"hello there\r\nbye: 1\r\n", "hello there\nbye: 1\n"),
            ("header only", b"Subject: x\r\n", ""),
            ("no empty line", b"Subject: x\r\nbody text\r\n", "body text\n"),
            ("empty line first", b"\r\nbody\r\n", "body\n"),
            ("8-bit body", b"Subject: x\r\n\r\n\xfc\r\n", "ü\n"),
            ("unknown encoding", b"Content-Transfer-Encoding: x-strange\r\n\r\nas is\r\n",
             "as is\n"),
            ("rubbish type", b"Content-Type: ///;;;=\"\r\n\r\nas is\r\n", "as is\n"),
            ("no type", b"Content-Type:\r\n\r\nas is\r\n", "as is\n"),
            ("two types", b"Content-Type: text/plain\r\nContent-Type: image/png\r\n\r\nfirst\r\n",
             "first\n"),
            ("bad base64", b"Content-Transfer-Encoding: base64\r\n\r\n!YWJ*j\r\n", "abc"),
            ("NUL", b"Subject: x\r\n\r\na\0b\r\n", "a\ufffdb\n"),
        )
        for name, message, text in table:
            with self.subTest(name=name):
                item = self.show(message, sender="")
                self.assertEqual(item["mail_from"], "")
                self.assertEqual((item["mail_body"]["type"], item["mail_body"]["text"]),
                                 ("text", text))

    def test_a_multipart_without_parts_is_kept_whole(self):
        for line in ("Content-Type: multipart/mixed", "Content-Type: multipart/mixed; boundary=",
                     "Content-Type: multipart/mixed; boundary=nowhere"):
            with self.subTest(line=line):
                body = self.show(crlf("Subject: x", line, "", "the text"))["mail_body"]
                if body["type"] == "text":
                    self.assertEqual(body["text"], "the text\n")
                else:
                    self.assertEqual(self.ask(f"/media?hash={body['hash']}").body, b"the text\r\n")

    def test_names_of_attachments(self):
        table = (
            ('attachment; filename="plain.txt"', "plain.txt"),
            ("attachment; filename=plain.txt", "plain.txt"),
            ("ATTACHMENT; FILENAME=plain.txt", "plain.txt"),
            ("attachment; filename*=UTF-8''na%C3%AFve%20plan.txt", "naïve plan.txt"),
            ("attachment; filename*=iso-8859-1'en'%FCber.txt", "über.txt"),
            ("attachment; filename*=x-none''%C3%BC.txt", "ü.txt"),
            ('attachment; filename*0="one-"; filename*1="two.txt"', "one-two.txt"),
            ("attachment; filename*1*=%BCb; filename*0*=utf-8''%C3; filename*2=er.txt", "über.txt"),
            ('attachment; filename="=?utf-8?q?=C3=BCber.txt?="', "über.txt"),
            ('attachment; filename="a\\"b.txt"', 'a"b.txt'),
            ('attachment; filename="semi;colon.txt"', "semi;colon.txt"),
            ("attachment;\r\n filename=folded.txt", "folded.txt"),
            ("attachment", "attachment.pdf"),
        )
        for disposition, filename in table:
            with self.subTest(disposition=disposition):
                body = self.show(attached(self.PDF, disposition))["mail_body"]
                self.assertEqual(body["items"][1], attachment_item(
                    self.PDF, filename, "application/pdf"))

    def test_over_the_bounds_it_is_served_raw(self):
        deep = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
                        for n in range(150))
        table = (
            ("deep", b"Subject: bound\r\n" + deep + b"\r\nx\r\n"),
            ("parts", crlf("Subject: bound", "Content-Type: multipart/mixed; boundary=b", "",
                           *["--b\r\n\r\nx"] * 1100, "--b--")),
            ("boundary", crlf("Subject: bound", "Content-Type: multipart/mixed; boundary=" +
                              "b" * 3000, "", "x")),
            ("header", crlf("Subject: bound", *[f"X-{n}: " + "y" * 900 for n in range(130)], "",
                            "x")),
            ("nested messages", b"Subject: bound\r\n" + b"Content-Type: message/rfc822\r\n\r\n" *
             150 + b"x\r\n"),
        )
        for name, message in table:
            with self.subTest(name=name):
                item = self.show(message)
                self.assertEqual(item["mail_subject"], "bound")
                self.assertTrue(item["parse_error"] and isinstance(item["parse_error"], str))
                self.assertIn(["Subject", "bound"], item["mail_headers_all"])
                self.assertEqual(item["mail_headers"]["Subject"], "bound")
                answer = self.ask(f"/code?mail_id={item['mail_id']}")
                self.assertEqual((answer.status, answer.json["codes"]), (200, []))

    def test_hostile_json(self):
        """What a message holds comes back through JSON as it was, or replaced, never breaking."""
        name = '"}],"x":[{\\u0000</script>'
        item = self.show(crlf(f"Subject: {name}", f"X-Odd: {name}",
                              "X-Surrogate: =?utf-8?b?7aCA?= =?utf-16?b?2AA=?=", "", name))
        self.assertEqual(item["mail_subject"], name)
        self.assertEqual(item["mail_headers"]["X-Odd"], name)
        self.assertEqual(item["mail_body"]["text"], name + "\n")

    def test_codes_and_links(self):
        table = (
            ("Your code", "Your verification code is 123456.\r\n", ["123456"], []),
            ("934211 is your code", "Welcome!\r\n", ["934211"], []),
            ("Sign in", "Enter this code:\r\n\r\n  AB12CD\r\n\r\nIt ends in 10 minutes.\r\n",
             ["AB12CD"], []),
            ("Confirm", "Visit https://example.com/c?t=a1&u=2. Thanks\r\n", [],
             ["https://example.com/c?t=a1&u=2"]),
            ("Nothing", "Meet me in 2024 at 10:30, order 55555\r\n", [], []),
        )
        for subject, body, codes, links in table:
            with self.subTest(subject=subject):
                ident, = self.deliver(make_message(subject, body))
                answer = {"mail_id": ident, "codes": codes, "links": links}
                self.assertEqual(self.server.get(f"/code?mail_id={ident}"), answer)
                self.assertEqual(self.server.get(
                    f"/code?filter_mail_subject={urllib.parse.quote(subject)}"), answer)
        ident, = self.deliver(crlf(
            "Subject: hi", "Content-Type: text/html", "Content-Transfer-Encoding: quoted-printable",
            "", '<style>.code { 111111 }</style><p>Your code: <b>55=', '5777</b></p>',
            '<a href=3D"https://example.com/v?a=3D1&amp;b=3D2">Confirm</a>',
            '<a href=3D"javascript:alert(1)">no</a>'))
        self.assertEqual(self.server.get(f"/code?mail_id={ident}"), {
            "mail_id": ident, "codes": ["555777"], "links": ["https://example.com/v?a=1&b=2"]})


class LongListTest(APICase):
    """A list of much mail is sent message by message, and says the same."""

    def test_large_messages(self):
        large = make_message("large") + b"x" * 70 + (b"y" * 998 + b"\r\n") * 5000
        self.deliver(large, make_message("small"), large.replace(b"y", b"z"))
        whole = self.ask("/list")
        self.assertEqual(whole["Transfer-Encoding"], "chunked")
        self.assertEqual(whole.json, {"count": 3, "items": [
            self.server.get(f"/list?after={ident}&count=1")["items"][0] for ident in range(3)]})
        again = self.ask("/list", headers=[("If-None-Match", whole["ETag"])])
        self.assertEqual(again.status, 304)
        self.server.get("/set_read?mail_id=2&is_read=1")
        again = self.ask("/list", headers=[("If-None-Match", whole["ETag"])])
        self.assertEqual(again.status, 200)


class UndigestedTest(APICase):
    """Who asks at once after the 250 is told what who asks later is told."""

    def test_all_answers_are_the_same_before_and_after(self):
        slow = crlf("Subject: slow", "Content-Type: multipart/mixed; boundary=s", "",
                    *[f"--s\r\nContent-Type: image/png; name={n}.png\r\n\r\n{n}"
                      for n in range(120)], "--s--")
        # The digester works in order: while it has the slow ones, the last ones wait.
        self.deliver(slow, slow.replace(b".png\r\n\r\n", b".png\r\n\r\nx"))
        first, target, other = self.deliver(
            attached(b"first" * 20000, subject="first"),
            attached(b"early bird" * 20000, subject="early bird 123456 code"),
            make_message("another bird"))
        after = f"after={target - 1}"
        paths = [f"{path}?{after}" for path in LIST_PATHS]
        paths += [f"{path}?{after}&format={form}" for path in LIST_PATHS
                  for form in ("text", "mbox")]
        paths += ["/count", f"/filter_count?{after}", "/filter_count?filter_mail_subject=early",
                  "/filter_list_short?filter_mail_subject=EARLY+bird", "/filter_count?"
                  "filter_is_read=0", "/filter_list_short?filter_is_read=0&filter_mail_subject=bi",
                  f"/latest?{after}", "/latest?filter_mail_subject=early", f"/raw?mail_id={target}",
                  f"/code?mail_id={target}", f"/mail?mail_id={target}", f"/mail?mail_id={other}",
                  f"/mail?mail_id={target}&format=text", f"/mail?mail_id={target}&format=eml",
                  f"/media?hash={media_name(b'early bird' * 20000)}"]
        short = f"/list_short?{after}"
        with HTTPWire(self.server) as wire:
            # Each first asks for what another has not brought about yet: lists before bodies.
            early = [(path, wire.ask(path)) for path in [
                f"/media?hash={media_name(b'first' * 20000)}", short] + paths]
        lag = read_metrics(self.server)["pegmail_digest_lag"]
        wait_until_digested(self.server)
        with HTTPWire(self.server) as wire:
            for path, before in early:
                with self.subTest(path=path, lag=lag):
                    later = wire.ask(path)
                    self.assertEqual(before.status, later.status)
                    self.assertEqual(before.body, later.body)
                    self.assertEqual(before["ETag"], later["ETag"])
        self.assertEqual(early[0][1].status, 200)
        self.assertEqual(early[1][1].json["items"][0]["attachment_count"], 1)

    def test_many_who_ask_at_once(self):
        ident, = self.deliver(crlf(
            "Subject: many", "Content-Type: multipart/mixed; boundary=s", "",
            *[f"--s\r\nContent-Type: image/png; name={n}.png\r\n\r\nm{n}" for n in range(100)],
            "--s--"))
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(HTTPWire(self.server)) for _ in range(20)]
            for wire in wires:
                wire.send(http_request(f"/mail?mail_id={ident}"))
            answers = [wire.answer() for wire in wires]
        self.assertEqual({(answer.status, answer.body) for answer in answers},
                         {(200, answers[0].body)})
        self.assertEqual(answers[0].json["attachment_count"], 100)


class FormTest(APICase):
    """format=text and format=mbox."""

    HOSTILE = ("tab\tnewline", "a =?utf-8?b?YQpiDWMJZAtlDGYbZwA=?= b",
               "$(touch evil) `touch evil`", "back\\slash \\t \\n \\", "'; touch evil; '",
               "-n -e", "a =?utf-8?b?4oCo4oCpwoU=?= b",
               "", "  spaces  ", "*", "a =?utf-8?q?=1B]0;x=07?= b", "%s%n", "é" * 300)

    def test_text_is_one_line_of_eight_values(self):
        before = self.server.get("/count")["count"]
        with self.server.connect() as wire:
            for subject in self.HOSTILE:
                wire.deliver(make_message(subject), "", ["b@example.com", "'c'@example.com"])
        items = self.server.get(f"/list_short?after={before}")["items"]
        self.assertEqual(len(items), len(self.HOSTILE))
        for path in LIST_PATHS:
            answer = self.ask(f"{path}?format=text&after={before}")
            self.assertEqual(answer["Content-Type"], "text/plain; charset=utf-8")
            lines = answer.body.decode().split("\n")
            self.assertEqual(lines.pop(), "")
            for line, item in zip(lines, items):
                values = line.split("\t")
                self.assertEqual(values[:5], [str(item[name]) for name in (
                    "mail_id", "timestamp", "is_read", "size", "attachment_count")])
                self.assertEqual(values[5:], ["<>", "b@example.com,'c'@example.com",
                                              item["mail_subject"] or "-"])
                self.assertEqual(line.splitlines(), [line])
                self.assertFalse(set(line) & set(NO_CHARS) - {"\t"})
                self.assertEqual(self.ask(f"/mail?mail_id={values[0]}&format=text").body.decode(),
                                 line + "\n")
            self.assertEqual(len(lines), len(items))
        self.assertEqual(self.ask(f"/list?format=text&after={before + 1000}").body, b"")

    def test_text_in_a_shell_loop(self):
        """A shell joins tabs as it does blanks: an empty value would shift those behind it."""
        before = self.server.get("/count")["count"]
        with self.server.connect() as wire:
            for subject in self.HOSTILE:
                for sender in ("", "a@example.com"):
                    wire.deliver(make_message(subject), sender, ["b@example.com"])
        text = self.ask(f"/list_short?format=text&after={before}").body
        items = self.server.get(f"/list_short?after={before}")["items"]
        script = ('while IFS="$(printf "\\t")" read -r id time read size count from to subject; do '
                  'printf "%s|%s|%s|%s\\n" "$id" "$from" "$to" "$subject"; done')
        status, output = self.server.run_tool("sh", "-c", script, input=text)
        self.assertEqual(status, 0)
        rows = [line.split("|", 3) for line in output.split("\n")[:-1]]
        self.assertEqual([row[0] for row in rows], [str(item["mail_id"]) for item in items])
        self.assertEqual({row[2] for row in rows}, {"b@example.com"})
        self.assertEqual([row[1] for row in rows], ["<>", "a@example.com"] * len(self.HOSTILE))
        self.assertEqual([row[3].strip() for row in rows],
                         [item["mail_subject"].strip() or "-" for item in items])
        self.assertFalse(os.path.exists(os.path.join(self.server.folder, "evil")))

    def test_mbox_comes_back_to_the_byte(self):
        filler = "".join(f"{'>' * (n % 4)}From line {n}\r\n" for n in range(20000))
        messages = [
            make_message("one", "From here\r\n>From there\r\n>>From all\r\nfrom low\r\n"),
            make_message("blank lines", "a\r\n\r\n\r\n\r\n"),
            b"From x Thu Jan  1 00:00:00 1970\r\nSubject: from first\r\n\r\nx\r\n",
            b"\r\n", b"Subject: no body\r\n", make_message("no end", "last"),
            b"no header\r\nFrom a@b Thu Jan  1 00:00:00 1970\r\n",
            make_message("dots", ".\r\n..\r\n"),
            make_message("8 bit", "ü \u2028\r\n"), make_message("large", filler),
            attached(random.Random(1).randbytes(300000)),
            make_message("long line", "From " + "x" * 700000 + "\r\nFrom y\r\n"),
        ]
        before = self.server.get("/count")["count"]
        idents = self.deliver(*messages, sender='"a b"@example.com')
        raws = {}
        for ident, message in zip(idents, messages):
            raws[ident] = self.ask(f"/raw?mail_id={ident}").body
            self.assertTrue(raws[ident].endswith(b"\r\n" + message if message.endswith(b"\r\n")
                                                 else message + b"\r\n"))
        wait_until_digested(self.server)
        for path, reverse in zip(LIST_PATHS, itertools.cycle((0, 1))):
            with self.subTest(path=path, reverse=reverse):
                answer = self.ask(f"{path}?format=mbox&after={before}&reverse={reverse}")
                self.assertEqual((answer.status, answer["Content-Type"]),
                                 (200, "application/mbox"))
                found = self.read_mbox(answer.body)
                wanted = [raws[ident].replace(b"\r\n", b"\n")
                          for ident in (idents[::-1] if reverse else idents)]
                self.assertEqual(len(found), len(wanted))
                for is_, should in zip(found, wanted):
                    self.assertTrue(is_ == should, (is_[:300], should[:300]))
        self.assertEqual(self.ask(f"/list?format=mbox&after={idents[-1]}").body, b"")

    def read_mbox(self, data):
        """Return the messages of an mbox, unquoted."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "mbox")
            with open(path, "wb") as file:
                file.write(data)
            with contextlib.closing(mailbox.mbox(path)) as box:
                return [re.sub(rb"(?m)^>(>*From )", rb"\1", box.get_bytes(key))
                        for key in sorted(box.keys())]

    def test_mbox_over_http_1_0_ends_with_the_connection(self):
        self.server.send()
        chunked = self.ask("/list?format=mbox")
        with HTTPWire(self.server) as wire:
            wire.send("GET /list?format=mbox HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = wire.answer()
            self.assertIsNone(answer["Transfer-Encoding"])
            self.assertEqual(answer.body, chunked.body)


class MediaTest(APICase):
    """/media: names, types and ranges."""

    DATA = bytes(range(256)) * 400
    NAMES = (
        "../../../etc/passwd", "..\\..\\windows\\system32\\x.dll", "/etc/passwd", "C:\\x\\y.txt",
        "..", ".", "", "...", "CON", "con.txt", "NUL", "nul.tar.gz", "COM1", "LPT9.doc", "aux.h",
        "x" * 4096 + ".txt", "é" * 2000 + ".pdf", "\u202etxt.exe", "photo\u202egpj.exe",
        'a"b.txt', "a'b.txt", "a;b.txt", "a%22b.txt", "a\\b", "a\r\nX-Evil: 1.txt", "a\0b.txt",
        "a\tb.txt", "naïve.txt", "日本語.txt", "💌.txt", "<script>.html", "a|b?.txt", "-rf",
        ".bashrc",
        "trailing. ", " lead", "a/b/c.txt", "x\x1b[31m.txt", "\u2028.txt", "a" + "\u0301" * 500,
        "${HOME}.txt", "`id`.txt", "*", "~")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.deliver(attached(cls.DATA))
        cls.path = f"/media?hash={media_name(cls.DATA)}"

    def test_whole(self):
        answer = self.ask(self.path)
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.body, self.DATA)
        wanted = {"Content-Type": "application/pdf", "Content-Length": str(len(self.DATA)),
                  "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff",
                  "ETag": f'"{media_name(self.DATA)}"'}
        self.assertEqual({name: answer[name] for name in wanted}, wanted)
        self.assertRegex(answer["Content-Disposition"], r'^(inline|attachment); filename="a\.pdf"$')
        policy = answer["Content-Security-Policy"]
        self.assertIn("sandbox", policy)
        self.assertIn("default-src 'none'", policy)

    def test_ranges(self):
        size, data = len(self.DATA), self.DATA
        table = (
            ("bytes=0-0", 0, 1), ("bytes=0-9", 0, 10), ("bytes=10-19", 10, 20),
            (f"bytes={size - 1}-", size - 1, size), ("bytes=5-", 5, size),
            ("bytes=-1", size - 1, size),
            ("bytes=-500", size - 500, size), (f"bytes=1-{size * 5}", 1, size),
            ("bytes=100-100", 100, 101), (f"bytes=9-{size - 1}", 9, size),
            ("bytes=7-99999999999999999", 7, size),
            # outside
            (f"bytes={size}-", None, None), (f"bytes={size}-{size + 5}", None, None),
            ("bytes=99999999999-", None, None), ("bytes=-0", None, None),
            # not understood, so not there (RFC 9110 14.2)
            ("bytes=5-2", 0, size), ("items=0-5", 0, size), ("bytes=", 0, size),
            ("bytes=a-b", 0, size), ("bytes=-", 0, size), ("bytes=--5", 0, size), ("0-5", 0, size),
            ("bytes=1-2-3", 0, size), ("bytes=+1-2", 0, size), ("bytes=1.5-2", 0, size),
            ("bytes=0x1-0x2", 0, size), ("", 0, size))
        with HTTPWire(self.server) as wire:
            for header, start, end in table:
                with self.subTest(header=header):
                    answer = wire.ask(self.path, "GET", {"Range": header})
                    if start is None:
                        self.problem(answer, 416)
                        self.assertEqual(answer["Content-Range"], f"bytes */{size}")
                    else:
                        whole = (start, end) == (0, size)
                        self.assertEqual(answer.status, 200 if whole else 206)
                        self.assertEqual(answer.body, data[start:end])
                        self.assertEqual(answer["Content-Range"],
                                         None if whole else f"bytes {start}-{end - 1}/{size}")
                        self.assertEqual(answer["ETag"], f'"{media_name(data)}"')
            for header in (f"bytes=0-{size - 1}", "bytes=0-", f"bytes=-{size * 2}"):
                answer = wire.ask(self.path, "GET", {"Range": header})
                self.assertIn((answer.status, answer["Content-Range"]),
                              ((200, None), (206, f"bytes 0-{size - 1}/{size}")))
                self.assertEqual(answer.body, data)
            # Several ranges may come as multipart, or not at all.
            self.assertIn(wire.ask(self.path, "GET", {"Range": "bytes=0-1,5-6"}).status, (200, 206))

    def test_conditions(self):
        tag = f'"{media_name(self.DATA)}"'
        part = {"Range": "bytes=2-3"}
        table = (
            ({"If-None-Match": tag}, 304), ({"If-None-Match": "W/" + tag}, 304),
            ({"If-None-Match": "*"}, 304), ({"If-None-Match": '"x"'}, 200),
            ({**part, "If-None-Match": tag}, 304), ({**part, "If-None-Match": '"x"'}, 206),
            ({**part, "If-Range": tag}, 206), ({**part, "If-Range": '"x"'}, 200),
            ({**part, "If-Range": "W/" + tag}, 200),
            ({**part, "If-Range": "Sat, 01 Jan 2000 00:00:00 GMT"}, 200), ({"If-Range": tag}, 200))
        with HTTPWire(self.server) as wire:
            for headers, status in table:
                with self.subTest(headers=headers):
                    answer = wire.ask(self.path, "GET", headers)
                    self.assertEqual(answer.status, status)
                    self.assertEqual(answer.body, {200: self.DATA, 206: self.DATA[2:4],
                                                   304: b""}[status])
                    self.assertEqual(answer["ETag"], tag)

    def test_head_knows_no_ranges(self):
        """RFC 9110 14.2: Range is defined for GET alone."""
        answer = self.ask(self.path, "HEAD", {"Range": "bytes=2-3"})
        self.assertEqual((answer.status, answer["Content-Length"]), (200, str(len(self.DATA))))

    def test_types(self):
        table = (   # the part's type and name, then the type served, and whether it may be shown
            ("image/png", "a.png", "image/png", True),
            ("application/octet-stream", "a.pdf", "application/pdf", True),
            ("application/octet-stream", "a.docx", None, False),
            ("application/octet-stream", "page.html", None, False),
            ("text/html; charset=utf-8", "a.html", None, False),
            ("image/svg+xml", "a.svg", None, False), ("application/xhtml+xml", "a", None, False),
            ("application/javascript", "a.js", None, False), ("text/xml", "a.xml", None, False),
            ("application/octet-stream", "x.nosuch", "application/octet-stream", False))
        for number, (mime, name, served, shown) in enumerate(table):
            with self.subTest(mime=mime, name=name):
                data = b"<script>alert(%d)</script>" % number
                self.deliver(attached(data, f'attachment; filename="{name}"', mime))
                item = self.server.get("/latest")["mail_body"]["items"][1]
                answer = self.ask(f"/media?hash={media_name(data)}")
                self.assertEqual(answer.body, data)
                if served:
                    self.assertEqual(answer["Content-Type"], served)
                self.assertEqual(answer["Content-Type"].partition(";")[0], item["mime"])
                self.assertEqual(answer["X-Content-Type-Options"], "nosniff")
                self.assertIn("sandbox", answer["Content-Security-Policy"])
                if not shown:
                    self.assertRegex(answer["Content-Disposition"], "^attachment;")

    def test_the_charset_is_that_of_the_bytes(self):
        data = "Grüße\r\n".encode("latin-1")
        self.deliver(attached(data, "attachment; filename=a.txt",
                                     "text/plain; charset=iso-8859-1"))
        self.server.get("/latest")
        answer = self.ask(f"/media?hash={media_name(data)}")
        self.assertEqual(answer.body, data)
        self.assertIn(answer["Content-Type"].replace(" ", "").lower(),
                      ("text/plain", "text/plain;charset=iso-8859-1"))

    def test_hostile_names(self):
        for number, name in enumerate(self.NAMES):
            with self.subTest(name=name[:40]):
                data = b"hostile %d" % number
                quoted = urllib.parse.quote(name.encode(), safe="")
                self.deliver(attached(data, f"attachment;\r\n filename*=utf-8''{quoted}"))
                item = self.server.get("/latest")["mail_body"]["items"][1]
                self.assertEqual((item["hash"], item["size"]), (media_name(data), len(data)))
                self.assertFalse(set(item["filename"]) & {"\r", "\n", "\0"})
                answer = self.ask(f"/media?hash={media_name(data)}")
                self.assertEqual(answer.body, data)
                self.assertEqual([field for field in answer.names if "evil" in field], [])
                for saved in self.saved_names(answer["Content-Disposition"]):
                    self.assertNotIn(saved.partition(".")[0].upper(), {
                        "CON", "PRN", "AUX", "NUL", "COM1", "LPT9"})
                    self.assertNotIn(saved, ("", ".", ".."))
                    self.assertFalse(set(saved) & set(NO_CHARS + BIDI + '/\\:"<>|?*'), saved)
                    self.assertLessEqual(len(saved.encode()), 255)
                    self.assertEqual(saved, saved.strip(" ."))
        self.assertLessEqual({name.partition(".db")[0] for name in os.listdir(self.server.folder)},
                             {"mail", "media", "output.txt"})
        for _, folders, files in os.walk(os.path.join(self.server.folder, "media")):
            for name in folders + files:
                self.assertRegex(name, r"^(raw|tmp|owner|[0-9a-f]{2,64})$")

    def saved_names(self, value):
        """Return the names that a Content-Disposition proposes; it has to be RFC 6266's grammar."""
        match = re.fullmatch(r'(?:attachment|inline); filename="([^"\\]*)"(?:; filename\*='
                             r"UTF-8''((?:[A-Za-z0-9!#$&+.^_`|~-]|%[0-9A-F]{2})+))?", value)
        self.assertTrue(match, value)
        names = [match.group(1)]
        if match.group(2):
            names.append(urllib.parse.unquote(match.group(2), errors="strict"))
        return names

    def test_an_empty_attachment(self):
        self.deliver(crlf("Subject: empty", "Content-Type: image/png; name=e.png", ""))
        self.server.get("/latest")
        path = f"/media?hash={media_name(b'')}"
        answer = self.ask(path)
        self.assertEqual((answer.status, answer.body, answer["Content-Length"]), (200, b"", "0"))
        answer = self.ask(path, "GET", {"Range": "bytes=0-0"})
        self.problem(answer, 416)
        self.assertEqual(answer["Content-Range"], "bytes */0")


class WaitTest(APICase):
    """Long polls. The server drops who is silent for a second, but not who waits for it."""

    options = ("--timeout", "1")
    PATHS = ("/filter_count", "/search_count", *LIST_PATHS, "/latest", "/code")

    def setUp(self):
        self.last = self.server.send(make_message("before"))

    def waiting(self, count):
        """Wait until so many requests wait."""
        until(lambda: read_metrics(self.server)["pegmail_http_waiting"] == count,
              f"{count} waiting requests")

    def begin(self, stack, *paths):
        """Send each request on a connection of its own; return the connections once all wait."""
        wires = [stack.enter_context(HTTPWire(self.server)) for _ in paths]
        for wire, path in zip(wires, paths):
            wire.send(http_request(path))
        self.waiting(len(paths))
        return wires

    def found(self, path, answer):
        """Return the mail_ids, or the count, that an answer has."""
        self.assertEqual(answer.status, 200, path)
        if "format=" in path:
            return [int(line.split("\t")[0]) for line in answer.body.decode().splitlines()]
        value = answer.json
        if "items" in value:
            return [item["mail_id"] for item in value["items"]]
        return [value["mail_id"]] if "mail_id" in value else value["count"]

    def test_at_once_when_something_matches(self):
        with HTTPWire(self.server) as wire:
            for path in self.PATHS:
                answer = wire.ask(f"{path}?wait=60&after={self.last - 1}")
                self.assertIn(self.found(path, answer), ([self.last], 1))

    def test_as_soon_as_something_comes(self):
        paths = [f"{path}?wait=60&after={self.last}" for path in self.PATHS]
        paths += [f"{path}?wait=60&format=text&after={self.last}" for path in LIST_PATHS]
        with contextlib.ExitStack() as stack:
            wires = self.begin(stack, *paths)
            new = self.server.send(make_message("news"))
            for path, wire in zip(paths, wires):
                with self.subTest(path=path):
                    self.assertIn(self.found(path, wire.answer()), ([new], 1))
            self.waiting(0)

    def test_only_for_what_matches(self):
        path = f"/filter_list_short?wait=60&after={self.last}&filter_mail_subject=wanted"
        with contextlib.ExitStack() as stack:
            wire, = self.begin(stack, path)
            for number in range(3):
                self.server.send(make_message(f"other {number}"))
                self.waiting(1)
            new = self.server.send(make_message("this is Wanted"))
            self.assertEqual(self.found(path, wire.answer()), [new])

    def test_a_change_of_the_read_state_counts(self):
        path = f"/filter_list_short?wait=60&filter_is_read=1&after={self.last - 1}"
        with contextlib.ExitStack() as stack:
            wire, = self.begin(stack, path)
            self.server.get(f"/set_read?mail_id={self.last}&is_read=1")
            self.assertEqual(self.found(path, wire.answer()), [self.last])

    def test_a_since_that_lies_ahead(self):
        stamp = self.server.get("/latest")["timestamp"] + 1
        with contextlib.ExitStack() as stack:
            wire, = self.begin(stack, f"/latest?wait=60&since={stamp}")
            until(lambda: time.time() * 1000 > stamp)
            new = self.server.send()
            self.assertEqual(wire.answer().json["mail_id"], new)

    def test_empty_after_the_time_though_it_is_longer_than_the_timeout(self):
        paths = [f"{path}?wait=2&after={self.last}" for path in self.PATHS]
        paths += [f"/list?wait=2&after={self.last}&format={form}" for form in ("text", "mbox")]
        with contextlib.ExitStack() as stack:
            began = time.monotonic()
            wires = self.begin(stack, *paths)
            for path, wire in zip(paths, wires):
                with self.subTest(path=path):
                    answer = wire.answer()
                    if path.startswith(("/latest", "/code")):
                        self.problem(answer, 404)
                    elif "format" in path:
                        self.assertEqual((answer.status, answer.body), (200, b""))
                    else:
                        expected = {"items": [], "count": 0} if "list" in path else {"count": 0}
                        self.assertEqual((answer.status, answer.json), (200, expected))
            self.assertGreaterEqual(time.monotonic() - began, 1.9)
            self.assertEqual(wires[0].ask("/count").status, 200)      # and it goes on

    def wake_the_pool(self, stack):
        """Have every thread of the pool come to life, each with its connection to the database."""
        wires = [stack.enter_context(HTTPWire(self.server)) for _ in range(20)]
        for wire in wires:
            wire.send(http_request("/list"))
        for wire in wires:
            wire.answer()

    def test_300_hold_no_thread_and_hold_up_nobody(self):
        with contextlib.ExitStack() as stack:
            self.wake_the_pool(stack)
            threads = until(lambda: self.server.get("/count") and count_threads(self.server))
            paths = [f"{self.PATHS[n % len(self.PATHS)]}?wait=60&after={self.last}"
                     for n in range(300)]
            wires = self.begin(stack, *paths)
            self.assertLessEqual(count_threads(self.server), threads)
            self.assertLess(count_threads(self.server), 20)
            for _ in range(50):
                self.assertEqual(self.server.get("/healthz")["status"], "ok")
            new = self.server.send()
            for path, wire in zip(paths, wires):
                self.assertIn(self.found(path, wire.answer()), ([new], 1))
            self.assertLessEqual(count_threads(self.server), threads)

    def test_who_goes_away_leaves_nothing(self):
        pid = self.server.process.pid
        with contextlib.ExitStack() as stack:
            self.wake_the_pool(stack)
        until(lambda: connections(self.server, "api") == 1, "the end of the connections")
        files = open_files(pid)
        with contextlib.ExitStack() as stack:
            self.begin(stack, *[f"/list?wait=60&after={self.last}"] * 100)
            self.assertGreaterEqual(open_files(pid), files + 90)
        self.server.send()
        self.waiting(0)
        until(lambda: connections(self.server, "api") == 1, "the end of the connections")
        until(lambda: open_files(pid) <= files + 2, "the end of the sockets")

    def test_who_only_closes_its_own_half_is_answered(self):
        with contextlib.ExitStack() as stack:
            wires = self.begin(stack, *[f"/list_short?wait=60&after={self.last}"] * 2)
            wires[0].socket.shutdown(socket.SHUT_WR)
            new = self.server.send()
            for wire in wires:
                self.assertEqual(self.found("/list_short", wire.answer()), [new])
            self.assertTrue(wires[0].is_closed())

    def test_pipelined_requests_are_answered_in_order(self):
        with contextlib.ExitStack() as stack:
            wire, = self.begin(stack, f"/list_short?wait=60&after={self.last}")
            wire.send(http_request("/healthz") + http_request("/nowhere"))
            new = self.server.send()
            self.assertEqual(self.found("/list_short", wire.answer()), [new])
            self.assertEqual(wire.answer().json["status"], "ok")
            self.problem(wire.answer(), 404)

    def test_a_stop_answers_them(self):
        """So they do not use up the grace."""
        with Running("--grace=600") as server, contextlib.ExitStack() as stack:
            wires = [stack.enter_context(HTTPWire(server)) for _ in range(5)]
            for wire in wires:
                wire.send(http_request("/list?wait=60"))
            until(lambda: read_metrics(server)["pegmail_http_waiting"] == 5)
            server.process.terminate()
            for wire in wires:
                self.assertEqual(wire.answer().json, {"items": [], "count": 0})
            self.assertEqual(server.stop(), 0)
            self.assertNotIn("Traceback", server.text())

    def test_a_stop_does_nothing_twice(self):
        """What is being kept when the signal comes is kept once."""
        folder = tempfile.mkdtemp(prefix="pegmail-")
        self.addCleanup(shutil.rmtree, folder)
        kept = []

        def send(name, server):
            with contextlib.suppress(OSError, AssertionError), server.connect() as wire:
                for number in itertools.count():
                    subject = f"{name}.{number}"
                    wire.deliver(make_message(subject))
                    kept.append(subject)
        for round_ in range(2):
            with Running(folder=folder) as server:
                threads = [threading.Thread(target=send, args=(f"{round_}.{name}", server))
                           for name in range(30)]
                for thread in threads:
                    thread.start()
                enough = len(kept) + 100
                until(lambda enough=enough: len(kept) > enough)
                self.assertEqual(server.stop(), 0)
                for thread in threads:
                    thread.join(DEADLINE)
        with Running(folder=folder) as server:
            count = server.get("/count")["count"]
            subjects = [line.split("\t")[7] for start in range(0, count, 1000) for line in
                        server.request(f"/list_short?format=text&count=1000&offset={start}")[2]
                        .decode().splitlines()]
        self.assertEqual(len(subjects), len(set(subjects)))
        self.assertLessEqual(set(kept), set(subjects))


class WireTest(APICase):
    """HTTP itself (RFC 9112), as good and bad clients speak it."""

    def talk(self, data, methods=("GET",)):
        """Send bytes; return the answers."""
        with HTTPWire(self.server) as wire:
            wire.send(data)
            return [wire.answer(method) for method in methods]

    def refused(self, data, status):
        """Check that bytes are refused with this status, as JSON, and the connection closed."""
        with HTTPWire(self.server) as wire:
            wire.send(data)
            answer = wire.answer()
            self.problem(answer, status)
            self.assertEqual(answer["Connection"], "close")
            self.assertTrue(wire.is_closed())

    def test_keep_alive_and_close(self):
        with HTTPWire(self.server) as wire:
            for _ in range(5):
                self.assertIn(wire.ask("/count")["Connection"], (None, "keep-alive"))
            self.assertEqual(wire.ask("/nowhere").status, 404)
            self.assertEqual(wire.ask("/count", headers={"Connection": "close"})["Connection"],
                             "close")
            self.assertTrue(wire.is_closed())

    def test_pipelined(self):
        kinds = (("/count", "GET", 200), ("/nowhere", "GET", 404), ("/list", "HEAD", 200),
                 ("/delete", "GET", 405), ("/set_read?mail_id=1&is_read=x", "POST", 400))
        many = kinds * 100
        data = b"".join(http_request(path, method) for path, method, _ in many)
        with HTTPWire(self.server) as wire:
            sender = threading.Thread(target=wire.send, args=(data,))
            sender.start()
            statuses = [wire.answer(method).status for _, method, _ in many]
            sender.join(DEADLINE)
        self.assertEqual(statuses, [status for _, _, status in many])

    def test_one_byte_at_a_time(self):
        data = http_request("/set_read", "POST", {"Content-Type": "application/json"},
                            b'{"mail_id": 99, "is_read": 1}') + http_request("/count")
        with HTTPWire(self.server) as wire:
            wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for place in range(len(data)):
                wire.send(data[place:place + 1])
            self.assertEqual([wire.answer().status, wire.answer().status], [404, 200])

    def test_http_1_0(self):
        with HTTPWire(self.server) as wire:
            wire.send("GET /count HTTP/1.0\r\nHost: localhost\r\n\r\n")
            self.assertEqual(list(wire.answer().json), ["count"])
            self.assertTrue(wire.is_closed())
        with HTTPWire(self.server) as wire:
            wire.send("GET /count HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n")
            answer = wire.answer()
            if (answer["Connection"] or "close").lower() == "close":
                self.assertTrue(wire.is_closed())
            else:
                self.assertEqual(wire.ask("/count").status, 200)

    def test_host_is_needed_once(self):
        """RFC 9112 3.2: a request of HTTP/1.1 without a Host, or with two, is 400."""
        for head in ("GET /count HTTP/1.1", "GET /count HTTP/1.1\r\nHost: localhost\r\n"
                     "Host: localhost", "GET /count HTTP/1.1\r\nHost: localhost\r\nHost: x"):
            with self.subTest(head=head):
                answer, = self.talk(head + "\r\n\r\n")
                self.problem(answer, 400)

    def test_absolute_form(self):
        """RFC 9112 3.2.2: it has to be understood, and its host is the one that counts."""
        for target, host, status in (("http://localhost/count", "localhost", 200),
                                     ("http://localhost:8025/count?", "localhost:8025", 200),
                                     ("http://evil.example/count", "localhost", 403),
                                     ("http://localhost/nowhere", "localhost", 404)):
            with self.subTest(target=target):
                self.assertEqual(self.ask(target, headers={"Host": host}).status, status)

    def test_odd_targets(self):
        for target in ("*", "count", "/count#x", "//", "/%", "/%zz", "/\\", "?", "/;",
                       "http://", "http:///count", "localhost:80", "ftp://localhost/count",
                       "/count%00", "/" + "a" * 20000, "/%0d%0aX-Evil:%201", "/\x7f", "/\xff"):
            for method in ("GET", "OPTIONS", "CONNECT"):
                with self.subTest(target=target[:40], method=method):
                    answer, = self.talk(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    self.assertIn(answer.status, (400, 403, 404, 405, 414, 501))

    def test_large_heads(self):
        self.refused("GET /count?" + "a" * 70000 + " HTTP/1.1\r\nHost: localhost\r\n\r\n", 431)
        head = "GET /count HTTP/1.1\r\nHost: localhost\r\n"
        self.refused(head + "X: " + "a" * 70000 + "\r\n\r\n", 431)
        self.refused(head + "X: a\r\n" * 1000 + "\r\n", 431)
        self.refused("a" * 70000, 431)

    def test_no_head_takes_long_to_read(self):
        """Each of these made some pattern go over it again and again; a poor one takes minutes."""
        blanks, size = " " * 30000, 30000
        heads = [f"{name}:{start}{blanks}{end}" for name in (
            "Content-Length", "Transfer-Encoding", "Expect", "Accept-Encoding", "Host", "Range",
            "If-None-Match", "Auth-SMTP-To", "Authorization", "Content-Type", "Connection")
            for start, end in ((" a", "a"), ("", ""), (' "', '"'), (" gzip", ";q=0"))]
        heads += ["X" + blanks + "Y", "Accept-Encoding: " + "gzip;" * 6000,
                  "Accept-Encoding: " + "*," * 15000, "If-None-Match: " + '"' * size,
                  "Range: bytes=" + "1" * size, "Host: " + ":" * size, "Host: " + "[" * size,
                  "Auth-SMTP-To: RCPT TO:<" + '"\\' * 15000, "Auth-SMTP-To: <" + "@a:" * 10000,
                  "Authorization: Basic " + "=" * size, "Origin: " + "://" * 10000]
        for head, path in itertools.product(heads, ("/auth", "/list")):
            host = "" if head.startswith("Host") else "Host: localhost\r\n"
            with contextlib.ExitStack() as stack:
                wires = [stack.enter_context(HTTPWire(self.server)) for _ in range(5)]
                for wire in wires:
                    wire.send(f"GET {path} HTTP/1.1\r\n{host}{head}\r\n\r\n")
                try:
                    for wire in wires:
                        self.assertLess(wire.answer().status, 500)
                except OSError as error:        # the first ends it: the server may hang long
                    self.fail(f"{path} {head[:30]}...: {error}")

    def test_many_small_fields_are_fine(self):
        answer, = self.talk("GET /count HTTP/1.1\r\nHost: localhost\r\n" + "".join(
            f"X-{n}: {n}\r\n" for n in range(60)) + "\r\n")
        self.assertEqual(answer.status, 200)

    def test_large_bodies(self):
        head = "POST /set_read HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        for length in (2 << 20, 1 << 40, 10 ** 17):
            self.refused(f"{head}{length}\r\n\r\n", 413)
            self.refused(f"{head}{length}\r\nExpect: 100-continue\r\n\r\n", 413)
        with HTTPWire(self.server) as wire:         # it hears so although it goes on sending
            wire.send(head + f"{2 << 20}\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(32):
                    wire.send(b"x" * 65536)
            self.problem(wire.answer(), 413)

    def test_wrong_lengths(self):
        for length in ("abc", "-1", "+5", "5 5", "5,6", "0x5", "5.0", "", "1e1", "\u0665", "9" * 40,
                       "5\r\nContent-Length: 6", "5\r\nContent-Length: x",
                       "x\r\nContent-Length: 5", "\r\n 5"):
            with self.subTest(length=length):
                with HTTPWire(self.server) as wire:
                    wire.send(f"POST /set_read HTTP/1.1\r\nHost: localhost\r\n"
                              f"Content-Length: {length}\r\n\r\nGET / HTTP/1.1\r\n\r\n")
                    answer = wire.answer()
                    self.assertIn(answer.status, (400, 413) if length == "9" * 40 else (400,))
                    self.assertTrue(wire.is_closed())
        # RFC 9112 5.1: no blank between the name and the colon.
        self.refused("POST /set_read HTTP/1.1\r\nHost: localhost\r\nContent-Length : 3\r\n\r\nabc",
                     400)

    def test_chunked_bodies(self):
        """They need not be taken (RFC 9112 6.3), but may never become a request of their own."""
        hidden = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for name in ("Transfer-Encoding: chunked", "transfer-encoding:\tchunked",
                     "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity",
                     "Transfer-Encoding: chunked\r\nContent-Length: 4",
                     "Content-Length: 4\r\nTransfer-Encoding: chunked",
                     "Transfer-Encoding : chunked", "Transfer-Encoding:\r\n chunked"):
            with self.subTest(name=name), HTTPWire(self.server) as wire:
                wire.send(b"POST /set_read HTTP/1.1\r\nHost: localhost\r\n" + name.encode() +
                          b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(hidden), hidden))
                answer = wire.answer()
                self.assertIn(answer.status, (400, 411, 501))
                self.problem(answer, answer.status)
                self.assertTrue(wire.is_closed())

    def test_expect(self):
        body = b"mail_id=999&is_read=1"
        head = (f"POST /set_read HTTP/1.%d\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                f"Content-Type: application/x-www-form-urlencoded\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        with HTTPWire(self.server) as wire:
            wire.send(head % 1)
            self.assertEqual(wire.answer().status, 100)
            wire.send(body)
            self.assertEqual(wire.answer().status, 404)         # and no second 100
            wire.send((head % 1).encode() + body)               # who does not wait may get one
            answer = wire.answer()
            self.assertEqual((answer if answer.status != 100 else wire.answer()).status, 404)
            self.assertEqual(wire.ask("/count").status, 200)
        with HTTPWire(self.server) as wire:                     # RFC 9110 10.1.1
            wire.send((head % 0).encode() + body)
            self.assertEqual(wire.answer().status, 404)

    def test_garbage(self):
        noise = random.Random(8)
        hello = bytes.fromhex("16030100a5010000a10303") + noise.randbytes(150) + b"\r\n\r\n"
        table = [b"\r\n\r\n", b"\n\n", b"GET\r\n\r\n", b"GET /count\r\n\r\n", b" \r\n\r\n", hello,
                 b"GET /count HTTP/9.9\r\n\r\n", b"GET /count HTTP/1\r\n\r\n",
                 b"GET /count HTTP/1.1.1\r\n\r\n", b"GET /count HTTP/+1.1\r\n\r\n",
                 b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"EHLO client.example\r\n\r\n",
                 b"GET /count FTP/1.1\r\n\r\n", b"\0\0\0\0\r\n\r\n",
                 b"GET /count HTTP/1.1 x\r\n\r\n", b"GET /count HTTP/1.1\r\nHost localhost\r\n\r\n"]
        table += [noise.randbytes(200) + b"\r\n\r\n" for _ in range(50)]
        for data in table:
            with self.subTest(data=data[:40]), HTTPWire(self.server) as wire:
                wire.send(data)
                wire.socket.shutdown(socket.SHUT_WR)
                text = wire.file.read()
                # RFC 9112 2.2: an empty line before a request is passed over.
                self.assertTrue(re.match(rb"HTTP/1\.1 (4\d\d|50[15]) ", text) or
                                (not text and not data.strip()) or
                                (data == b"GET /count\r\n\r\n" and text.startswith(b'{"')),
                                text[:100])
        self.assertEqual(self.server.get("/healthz")["status"], "ok")

    def test_an_empty_line_before_a_request_is_passed_over(self):
        """RFC 9112 2.2: old clients send one behind the body of a POST."""
        with HTTPWire(self.server) as wire:
            for _ in range(2):
                wire.send(b"\r\n" + http_request("/count"))
                self.assertEqual(wire.answer().status, 200)

    def test_half_requests_hold_no_thread(self):
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(HTTPWire(self.server)).send(http_request("/list"))
            threads = until(lambda: self.server.get("/count") and count_threads(self.server))
            halves = [b"GET /count HT", b"GET /count HTTP/1.1\r\nHost: loc",
                      b"POST /set_read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab"]
            for number in range(120):
                stack.enter_context(HTTPWire(self.server)).send(halves[number % 3])
            for _ in range(20):
                self.assertEqual(self.server.get("/healthz")["status"], "ok")
            self.assertLessEqual(count_threads(self.server), threads)

    def test_who_does_not_read_holds_no_thread(self):
        ident, = self.deliver(make_message("large", ("x" * 998 + "\r\n") * 20000))
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                wire = stack.enter_context(HTTPWire(self.server))
                wire.send(http_request(f"/raw?mail_id={ident}") * 2)
            for _ in range(20):
                self.assertEqual(self.server.get("/healthz")["status"], "ok")

    def test_who_closes_its_own_half_is_answered(self):
        with HTTPWire(self.server) as wire:
            wire.send(http_request("/count") + http_request("/healthz"))
            wire.socket.shutdown(socket.SHUT_WR)
            self.assertEqual([wire.answer().status, wire.answer().status], [200, 200])
            self.assertTrue(wire.is_closed())

    def test_nothing_said_becomes_a_header(self):
        """The reader of answers refuses every line that is no field, and fields twice."""
        evil = ("%0d%0aX-Evil:%201", "%0aX-Evil:1", "%0d", "%E2%80%A8", "%00", "\x85", "a\tb")
        with HTTPWire(self.server) as wire:
            for path in (*GET_PATHS, "/nowhere"):
                for text in evil:
                    for target in (f"{path}{text}" if "\t" not in text else path,
                                   f"{path}?{text.strip()}=1".replace("\t", "%09"),
                                   f"{path}?mail_id={text}".replace("\t", "%09")):
                        answer = wire.ask(target)
                        self.assertNotIn("x-evil", answer.names)
        for name in ("Host", "Origin", "If-None-Match", "Range", "Accept-Encoding",
                     "Auth-SMTP-To", "Auth-Method", "Authorization"):
            for value in ("x\x00y", "x\x0by", "\xff\xfe", "\u2028", "a" * 9000, "\x85"):
                self.assertNotIn("x-evil", self.ask("/auth", headers={name: value}).names)

    def test_a_bare_cr_in_the_head_starts_no_field(self):
        """RFC 9112 2.2: it is refused, or read as a blank."""
        answer, = self.talk("GET /count HTTP/1.1\r\nX: y\rHost: evil.example\r\n"
                            "Host: localhost\r\n\r\n")
        self.assertIn(answer.status, (200, 400))

    def test_too_many_connections(self):
        with Running("--max_connections_per_peer", "3") as server, contextlib.ExitStack() as stack:
            wires = [stack.enter_context(HTTPWire(server)) for _ in range(3)]
            for wire in wires:
                self.assertEqual(wire.ask("/count").status, 200)
            answer = stack.enter_context(HTTPWire(server)).answer()
            self.problem(answer, 503)
            self.assertTrue(answer["Retry-After"].isdigit())
            wires.pop().__exit__()
            until(lambda: self.is_served(server), "a free place")

    def is_served(self, server):
        """Does the server answer a new connection?"""
        with HTTPWire(server) as wire:
            try:
                return wire.ask("/count").status == 200
            except OSError:
                return False

    def test_silence_ends_a_connection(self):
        with Running("--timeout", "1") as server:
            with HTTPWire(server) as idle, HTTPWire(server) as half, HTTPWire(server) as body:
                self.assertEqual(idle.ask("/count").status, 200)
                half.send("GET /count HTTP/1.1\r\nHost: ")
                body.send("POST /set_read HTTP/1.1\r\nHost: localhost\r\n"
                          "Content-Length: 10\r\n\r\nabc")
                for wire in (half, body):
                    self.problem(wire.answer(), 408)
                    self.assertTrue(wire.is_closed())
                self.assertTrue(idle.is_closed())


def own_address():
    """Return an address of this host that is not loopback; skip if it has none."""
    address = "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(("192.0.2.1", 9))      # sends nothing
        address = sock.getsockname()[0]
    if address.startswith("127."):
        raise unittest.SkipTest("this host has no address but loopback")
    return address


class AccessTest(APICase):
    """Who may ask: the client's address, Host, Origin, and the token."""

    def test_the_matrix(self):
        """Host x Origin x Sec-Fetch-Site x method over every path."""
        ident = self.server.send()
        port = self.server.api_port
        hosts = {"localhost": True, f"127.0.0.1:{port}": True,
                 "evil.example": False, f"localhost.evil.example:{port}": False}
        origins = (None, "same", "http://evil.example", "null")
        sites = (None, "same-origin", "cross-site")
        methods = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
        paths = [*ALL_METHODS, "/nowhere"]
        told = {"/mail": f"?mail_id={ident}", "/raw": f"?mail_id={ident}", "/media": "?hash=" +
                "0" * 48, "/set_read": "?is_read=1&mail_id=", "/delete": "?mail_id="}
        cases = []
        for host, origin, site, method, path in itertools.product(hosts, origins, sites, methods,
                                                                  paths):
            origin = f"http://{host}" if origin == "same" else origin
            foreign = origin not in (None, f"http://{host}") or site == "cross-site"
            changes = path in ("/set_read", "/delete")
            if not hosts[host]:
                status = 403
            elif path == "/nowhere":
                status = 404
            elif method not in ALL_METHODS[path]:
                status = 405
            elif changes and foreign:
                status = 403
            else:
                status = 404 if changes or path == "/media" else 200
            # What is to be refused aims at a message that is there.
            number = "" if not changes else "987654" if status == 404 else str(ident)
            cases.append((path + told.get(path, "") + number, method,
                          {"Host": host, "Origin": origin, "Sec-Fetch-Site": site}, status))
        with HTTPWire(self.server) as wire:
            for start in range(0, len(cases), 50):
                some = cases[start:start + 50]
                wire.send(b"".join(http_request(*case[:3]) for case in some))
                for path, method, headers, status in some:
                    answer = wire.answer(method)
                    if (answer.status != status or answer["X-Content-Type-Options"] != "nosniff" or
                            any(name.startswith("access-control") for name in answer.names)):
                        self.fail(f"{method} {path} {headers}: {answer.status} {answer.fields}, "
                                  f"not {status}")
        self.assertEqual(self.server.get(f"/mail?mail_id={ident}")["is_read"], 0)

    def test_host_names(self):
        port = self.server.api_port
        table = (("localhost", 200), ("LocalHost", 200), (f"localhost:{port}", 200),
                 ("127.0.0.1", 200), (f"127.0.0.1:{port}", 200), ("[::1]", 200),
                 (f"[::1]:{port}", 200), ("mx.example.com", 200), ("MX.Example.Com:80", 200),
                 ("evil.example", 403), (f"evil.example:{port}", 403),
                 ("127.0.0.1.evil.example", 403),
                 ("localhost.evil.example", 403), ("evil.localhost.example:80", 403),
                 ("xlocalhost", 403), ("mx.example.com.evil.example", 403), ("0x7f.1.evil", 403),
                 ("localhost@evil.example", 403), ("evil.example#localhost", 403),
                 ("evil.example/localhost", 403), ("localhost,evil.example", 403),
                 ("[::1]evil.example", 403), ("a" * 5000, 403), ("\u00fc.example", 403))
        for path in ("/count", "/auth", "/healthz", "/metrics", "/openapi.json"):
            for host, status in table:
                with self.subTest(path=path, host=host[:40]):
                    answer = self.ask(path, headers={"Host": host})
                    self.assertEqual(answer.status, status)
                    if status != 200:
                        self.problem(answer, status)

    def test_origins_of_a_change(self):
        ident = self.server.send()
        port = self.server.api_port
        host = f"localhost:{port}"
        table = (
            ({}, 200), ({"Origin": f"http://{host}"}, 200),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403), ({"Origin": ""}, 403), ({"Origin": "http://localhost"}, 403),
            ({"Origin": f"http://localhost:{port + 1}"}, 403),
            ({"Origin": f"http://{host}.evil.example"}, 403), ({"Origin": f"{host}"}, 403),
            ({"Origin": f"http://evil.example/http://{host}"}, 403),
            ({"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}, 200),
            ({"Sec-Fetch-Site": "none"}, 200), ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": "new-word"}, 403))
        for headers, status in table:
            for method in ("GET", "POST"):
                with self.subTest(headers=headers, method=method):
                    before = self.server.get(f"/mail?mail_id={ident}")["is_read"]
                    answer = self.ask(f"/set_read?mail_id={ident}&is_read={1 - before}", method,
                                      {"Host": host, **headers})
                    self.assertEqual(answer.status, status)
                    after = self.server.get(f"/mail?mail_id={ident}")["is_read"]
                    self.assertEqual(after != before, status == 200)

    def test_only_loopback_by_default(self):
        address = own_address()
        with Running("--bind", "0.0.0.0") as server:
            with HTTPWire(server, address) as wire:
                for path in (*ALL_METHODS, "/nowhere"):
                    answer = wire.ask(path, headers={"Host": address})
                    self.problem(answer, 403)
            for source in ("127.0.0.1", "127.0.0.9"):
                with HTTPWire(server, source=source) as wire:
                    self.assertEqual(wire.ask("/count").status, 200)

    def test_remote_addresses(self):
        with Running("--bind", "0.0.0.0", "--api_remote_address", "127.0.0.4/30", "127.0.0.9",
                     "fd00:1::/64", "--api_host", "mail.internal") as server:
            for source, status in (("127.0.0.1", 403), ("127.0.0.3", 403), ("127.0.0.4", 200),
                                   ("127.0.0.7", 200), ("127.0.0.8", 403), ("127.0.0.9", 200),
                                   ("127.0.0.10", 403)):
                with self.subTest(source=source), HTTPWire(server, source=source) as wire:
                    for path in (*ALL_METHODS, "/nowhere"):
                        answer = wire.ask(path)
                        if status == 403:
                            self.problem(answer, 403, source)
                        else:
                            self.assertNotEqual(answer.status, 403)
            with HTTPWire(server, source="127.0.0.4") as wire:
                for host, status in (("mail.internal", 200), ("Mail.Internal:8025", 200),
                                     ("localhost", 200), ("evil.example", 403)):
                    self.assertEqual(wire.ask("/count", headers={"Host": host}).status, status)
                # What a proxy might add is not believed.
                forged = {"X-Forwarded-For": "127.0.0.4", "X-Real-IP": "127.0.0.4",
                          "Forwarded": "for=127.0.0.4"}
            with HTTPWire(server, source="127.0.0.1") as wire:
                self.assertEqual(wire.ask("/count", headers=forged).status, 403)

    def test_remote_addresses_of_version_6(self):
        try:
            with socket.create_server(("::1", 0), family=socket.AF_INET6):
                pass
        except OSError:
            self.skipTest("this host has no IPv6")
        for networks, six, four in ((["::/64"], 200, 403),
                                    (["fd00::/8", "127.0.0.0/8"], 403, 200)):
            with self.subTest(networks=networks), Running(
                    "--bind", "::", "--api_remote_address", *networks) as server:
                with HTTPWire(server, "::1") as wire:
                    self.assertEqual(wire.ask("/count", headers={"Host": "[::1]"}).status, six)
                with HTTPWire(server, "127.0.0.1") as wire:
                    self.assertEqual(wire.ask("/count").status, four)


class TokenTest(APICase):
    """--api_token, given in a file, with names the API answers to."""

    TOKEN = "s3cret:with-a-colon/+=~"

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="pegmail-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        path = os.path.join(cls.folder, "token")
        with open(path, "w", encoding="utf-8") as file:
            file.write(cls.TOKEN + "\n")
        cls.options = ("--bind", "0.0.0.0", "--api_token", "@" + path)
        super().setUpClass()

    def basic(self, text):
        """Return the value of Authorization for Basic."""
        return "Basic " + base64.b64encode(text.encode()).decode()

    def ask_with(self, value, path="/count", **headers):
        """Ask with this Authorization."""
        return self.ask(path, headers={"Authorization": value, **headers})

    def test_right_and_wrong_tokens(self):
        token = self.TOKEN
        right = (f"Bearer {token}", f"bearer {token}", f"BEARER  {token}",
                 self.basic(f"user:{token}"), self.basic(f":{token}"),
                 self.basic(f"user:{token}").replace("Basic", "basic"))
        wrong = (None, "", token, "Bearer", "Bearer ", f"Bearer {token}x", f"Bearer {token[:-1]}",
                 f"Bearer {token.upper()}", f"Token {token}", self.basic(token),
                 self.basic("user:"),
                 self.basic("user"), self.basic(f"{token}:"), "Basic", "Basic !!!", "Basic =",
                 "Basic " + "A" * 3001, "Bearer \xff", "Bearer None", "Digest username=x",
                 f"Bearer {token}, Bearer x", "Bearer @token", self.basic(f"a:b:{token}"))
        for value in right:
            with self.subTest(value=value):
                self.assertEqual(self.ask_with(value).status, 200)
        for value in wrong:
            with self.subTest(value=value):
                answer = self.ask_with(value)
                self.problem(answer, 401)
                self.assertRegex(answer["WWW-Authenticate"], r"^(Basic|Bearer) realm=")
                self.assertNotIn(token, answer.json["error"])

    def test_every_path_asks_for_it(self):
        for path in (*ALL_METHODS, "/nowhere"):
            method = "POST" if path == "/delete" else "GET"
            with self.subTest(path=path):
                answer = self.ask(path, method)
                if path in ("/auth", "/healthz"):       # nginx and watchdogs on this host have none
                    self.assertEqual(answer.status, 200)
                else:
                    self.problem(answer, 401)
                    self.assertNotEqual(self.ask_with(f"Bearer {self.TOKEN}", path).status, 401)

    def test_another_host_needs_it_and_nothing_else(self):
        address = own_address()
        with HTTPWire(self.server, address) as wire:
            for path in ALL_METHODS:
                self.assertEqual(wire.ask(path, headers={"Host": address}).status, 401)
            for host in (address, "anything.example"):
                self.assertEqual(wire.ask("/count", headers={
                    "Host": host, "Authorization": f"Bearer {self.TOKEN}"}).status, 200)

    def test_a_page_elsewhere_does_not_get_in_with_it(self):
        """A browser adds Basic by itself."""
        ident = self.server.send()
        answer = self.ask_with(self.basic(f":{self.TOKEN}"),
                               f"/set_read?mail_id={ident}&is_read=1",
                               Origin="http://evil.example")
        self.problem(answer, 403)

    def test_a_token_beyond_ascii(self):
        with Running("--api_token", "schlüssel") as server, HTTPWire(server) as wire:
            for value in ("Bearer schlüssel", self.basic("user:schlüssel")):
                with self.subTest(value=value):
                    self.assertEqual(
                        wire.ask("/count", headers={"Authorization": value}).status, 200)

    def test_it_is_told_nowhere(self):
        self.ask_with(f"Bearer {self.TOKEN}")
        self.assertNotIn("s3cret", self.server.text())
        self.assertNotIn(b"s3cret", self.ask_with(f"Bearer {self.TOKEN}", "/metrics").body)


class AuthRouteTest(APICase):
    """nginx's questions (ngx_mail_auth_http_module)."""

    options = ("--server_host", "good.example", "bücher.example", "[192.0.2.9]")

    def auth(self, to, version="1.0", **more):
        """Ask as nginx does; return the header of the answer."""
        fields = {"Host": "localhost", "Auth-Method": "none", "Auth-User": "", "Auth-Pass": "",
                  "Auth-Protocol": "smtp", "Auth-Login-Attempt": "1", "Client-IP": "192.0.2.42",
                  "Client-Host": "client.example", "Auth-SMTP-Helo": "client.example",
                  "Auth-SMTP-From": "MAIL FROM:<a@example.com>", "Auth-SMTP-To": to}
        fields.update((name.replace("_", "-"), value) for name, value in more.items())
        lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
        with HTTPWire(self.server) as wire:
            wire.send("\r\n".join([f"GET /auth HTTP/{version}", *lines, "", ""]))
            answer = wire.answer()
            # Any other is an internal error to nginx.
            self.assertEqual((answer.status, answer.body), (200, b""))
            self.assertTrue(version == "1.1" or wire.is_closed())
        return answer

    def let_in(self, answer):
        """Check an answer for somebody who may go on."""
        self.assertEqual((answer["Auth-Status"], answer["Auth-Server"], answer["Auth-Port"]),
                         ("OK", "127.0.0.1", str(self.server.smtp_port)))
        self.assertEqual((answer["Auth-Error-Code"], answer["Auth-Wait"]), (None, None))

    def turned_away(self, answer, code):
        """Check an answer for somebody who may not."""
        self.assertNotEqual(answer["Auth-Status"], "OK")
        self.assertRegex(answer["Auth-Status"], "^[ -~]+$")
        self.assertRegex(answer["Auth-Error-Code"], f"^{code}$")
        self.assertRegex(answer["Auth-Wait"], "^[1-9][0-9]?$")
        self.assertEqual((answer["Auth-Server"], answer["Auth-Port"]), (None, None))

    def test_recipients(self):
        for to in ("RCPT TO:<bob@good.example>", "rcpt to:<bob@good.example>",
                   "RCPT TO: <bob@good.example>", "RCPT TO:<bob@GOOD.Example>",
                   "RCPT TO:<bob@good.example> NOTIFY=NEVER ORCPT=rfc822;x@evil.example",
                   "<bob@good.example>", "RCPT TO:<bob@bücher.example>",
                   "RCPT TO:<bob@xn--bcher-kva.example>", "RCPT TO:<bob@BÜCHER.example>",
                   "RCPT TO:<bøb@good.example>", "RCPT TO:<bob@[192.0.2.9]>",
                   "RCPT TO:<postmaster>", "RCPT TO:<Postmaster>",
                   'RCPT TO:<"a b"@good.example>', 'RCPT TO:<"a>b"@good.example>',
                   "RCPT TO:<bob+tag@good.example>", "RCPT TO:<bob%evil.example@good.example>",
                   "RCPT TO:<@relay.example:bob@good.example>", "RCPT TO:bob@good.example"):
            for version in ("1.0", "1.1"):
                with self.subTest(to=to, version=version):
                    self.let_in(self.auth(to, version))

    def test_refusals(self):
        for to in ("RCPT TO:<bob@evil.example>", "RCPT TO:<bob@sub.good.example>",
                   "RCPT TO:<bob@good.example.evil.example>", "RCPT TO:<bob@xgood.example>",
                   "RCPT TO:<bob@[192.0.2.8]>", "RCPT TO:<postmaster@evil.example>",
                   'RCPT TO:<"bob@good.example"@evil.example>', "RCPT TO:<bob>",
                   "RCPT TO:<@good.example:bob@evil.example>"):
            with self.subTest(to=to):
                self.turned_away(self.auth(to), r"550 5\.7\.1")
        for to in ("RCPT TO:<bob@evil.example", "RCPT TO:<>", "RCPT TO:<a b@good.example>",
                   "RCPT TO:<bob@good.example@evil.example>", "RCPT TO:<@good.example>",
                   "RCPT TO:<bob@>", "RCPT TO:<bob@good..example>", "RCPT TO:<b@evil\t>",
                   "\xff\xfe", "RCPT TO:<" + "a" * 2000 + "@good.example>"):
            with self.subTest(to=to[:40]):
                self.turned_away(self.auth(to), r"5[05]\d 5\.\d\.\d")

    def test_without_a_recipient(self):
        for to in (None, "", "RCPT TO:"):
            with self.subTest(to=to):
                self.turned_away(self.auth(to), r"5\d\d 5\.\d\.\d")

    def test_no_accounts_and_no_other_protocol(self):
        to = "RCPT TO:<bob@good.example>"
        for method in ("plain", "login", "cram-md5", "apop", "external"):
            self.turned_away(self.auth(to, Auth_Method=method, Auth_User="u", Auth_Pass="p"),
                             r"535 5\.7\.8")
        for protocol in ("imap", "pop3"):
            self.turned_away(self.auth(to, Auth_Protocol=protocol), r"5\d\d 5\.\d\.\d")

    def test_refusals_of_smtp_are_the_same(self):
        with self.server.connect() as wire:
            wire.ask("EHLO client.example")
            wire.ask("MAIL FROM:<a@example.com>")
            reply = wire.ask("RCPT TO:<bob@evil.example>")
        answer = self.auth("RCPT TO:<bob@evil.example>")
        self.assertEqual(f"{answer['Auth-Error-Code']} {answer['Auth-Status']}", reply)

    def test_every_recipient_when_no_domain_is_given(self):
        with Running() as server:
            for to, status in (("RCPT TO:<x@anywhere.example>", True), ("RCPT TO:<broken", False)):
                answer = server.request("/auth", headers={"Auth-SMTP-To": to, "Auth-Method": "none",
                                                          "Auth-Protocol": "smtp"})
                self.assertEqual((answer[0], answer[1]["Auth-Status"] == "OK"), (200, status))

    def shares(self, *addresses):
        """Return {recipient: (server, port)} of a server with these addresses."""
        shares = {}
        with Running("--server_addr", *addresses) as server, HTTPWire(server) as wire:
            for number in range(300):
                answers = {(answer["Auth-Server"], int(answer["Auth-Port"])) for answer in (
                    wire.ask("/auth", headers={"Auth-SMTP-To": f"RCPT TO:<{name}>"})
                    for name in (f"user{number}@example.com", f"USER{number}@Example.COM"))}
                self.assertEqual(len(answers), 1, "case makes no difference")
                shares[number], = answers
            own = server.smtp_port
        return {number: (host, 0 if port == own else port)
                for number, (host, port) in shares.items()}

    def test_several_servers_share_recipients(self):
        first, second, third = ("192.0.2.1", 0), ("192.0.2.2", 2525), ("2001:db8::3", 25)
        two = self.shares("192.0.2.1", "192.0.2.2:2525")
        three = self.shares("[2001:db8::3]:25", "192.0.2.2:2525", "192.0.2.1")
        self.assertEqual(set(two.values()), {first, second})
        self.assertEqual(set(three.values()), {first, second, third})
        moved = {number for number in two if two[number] != three[number]}
        self.assertEqual({three[number] for number in moved}, {third})      # only its share moves
        self.assertTrue(60 < len(moved) < 140, len(moved))
        self.assertTrue(100 < list(two.values()).count(first) < 200)

    def test_a_name_becomes_an_address(self):
        """nginx takes nothing but an IP address in Auth-Server."""
        with Running("--server_addr", "localhost:2525") as server:
            headers = server.request("/auth", headers={"Auth-SMTP-To": "RCPT TO:<a@b.example>"})[1]
        self.assertIn((headers["Auth-Server"], headers["Auth-Port"]),
                      (("127.0.0.1", "2525"), ("::1", "2525")))


class FiguresTest(APICase):
    """/healthz and /metrics."""

    def test_healthz(self):
        answer = self.server.get("/healthz")
        self.assertEqual(answer, {"status": "ok", "version": pegmail.__version__})

    def test_metrics_are_prometheus_text(self):
        self.deliver(make_message())
        answer = self.ask("/metrics")
        self.assertRegex(answer["Content-Type"], r"^text/plain; version=0\.0\.4(;|$)")
        text = answer.body.decode()
        self.assertTrue(text.endswith("\n") and "\r" not in text)
        kinds, seen, helped, ended = {}, set(), set(), set()
        last = None
        for line in text[:-1].split("\n"):
            with self.subTest(line=line):
                told = re.fullmatch(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)", line)
                if told and told.group(1) == "HELP":
                    self.assertNotIn(told.group(2), helped)
                    helped.add(told.group(2))
                    continue
                if told:
                    self.assertIn(told.group(3), ("counter", "gauge", "histogram", "summary"))
                    self.assertNotIn(told.group(2), kinds)
                    kinds[told.group(2)] = told.group(3)
                    continue
                sample = re.fullmatch(
                    r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*",?)*\})?'
                    r" ([+-]?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|Inf)|NaN)", line)
                self.assertTrue(sample)
                name = sample.group(1)
                self.assertIn(name, kinds)
                self.assertTrue(name.startswith("pegmail_"))
                self.assertNotIn((name, sample.group(2)), seen)
                seen.add((name, sample.group(2)))
                self.assertNotIn(name, ended)               # the lines of one name stand together
                if last not in (None, name):
                    ended.add(last)
                last = name
                self.assertEqual(name.endswith("_total"), kinds[name] == "counter")
        self.assertEqual(helped, set(kinds))

    def test_counts_move(self):
        def changed(action):
            before = read_metrics(self.server)
            action()
            after = read_metrics(self.server)
            return {name: after[name] - before.get(name, 0) for name in after
                    if after[name] != before.get(name, 0)}
        message = make_message("metrics")
        moved = changed(lambda: self.deliver(message))
        self.assertEqual(moved["pegmail_received_total"], 1)
        self.assertEqual(moved["pegmail_messages"], 1)
        self.assertEqual(moved["pegmail_received_bytes_total"], len(message))
        self.assertGreaterEqual(moved["pegmail_commits_total"], 1)
        self.assertGreaterEqual(moved["pegmail_commit_jobs_total"],
                                moved["pegmail_commits_total"])
        self.assertGreater(moved["pegmail_commit_seconds_total"], 0)

        def refuse():
            with self.server.connect() as wire:
                wire.ask("EHLO client.example")
                wire.ask("RCPT TO:<b@example.com>")
        moved = changed(refuse)
        refused = {name: value for name, value in moved.items() if "refused_total{" in name}
        self.assertEqual(list(refused.values()), [1], moved)
        self.assertIn("503 5.5.1", str(refused))
        moved = changed(lambda: [self.ask("/nowhere") for _ in range(3)])
        self.assertEqual(moved['pegmail_http_answers_total{status="404"}'], 3)
        with self.server.connect(), self.server.connect(), HTTPWire(self.server):
            until(lambda: read_metrics(self.server)['pegmail_connections{port="smtp"}'] == 2)
            until(lambda: read_metrics(self.server)['pegmail_connections{port="api"}'] == 2)
        until(lambda: read_metrics(self.server)['pegmail_connections{port="smtp"}'] == 0)
        for name in ("queue_jobs", "digest_lag", "index_lag"):
            until(lambda name=name: read_metrics(self.server)["pegmail_" + name] == 0)

    def test_refusals_that_clients_word_do_not_make_labels(self):
        """Labels are few, whatever is said."""
        with self.server.connect() as wire:
            for number in range(15):
                wire.ask(f"NONSENSE{number} \"}} 1")
        labels = [name for name in read_metrics(self.server) if "refused_total" in name]
        self.assertFalse([name for name in labels if "NONSENSE" in name])
        self.assertLess(len(labels), 20)


class DescriptionTest(APICase):
    """/openapi.json, held to the rules of OpenAPI 3.0 and to what the server does."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.deliver(attached())
        cls.document = cls.server.get("/openapi.json")

    def test_document(self):
        document = self.document
        self.assertRegex(document["openapi"], r"^3\.0\.\d+$")
        self.assertLessEqual(set(document), {"openapi", "info", "servers", "paths", "components",
                                             "security", "tags", "externalDocs"})
        self.assertLessEqual({"title", "version"}, set(document["info"]))
        self.assertEqual(set(document["paths"]), {*GET_PATHS, "/delete", *PLACES})
        methods = {**ALL_METHODS, **{path: allowed for path, (_, allowed) in PLACES.items()}}
        schemes = document["components"]["securitySchemes"]
        for scheme in schemes.values():
            self.assertEqual(scheme["type"], "http")
            self.assertIn(scheme["scheme"], ("bearer", "basic"))
        for need_ in document["security"]:
            self.assertLessEqual(set(need_), set(schemes))
        for path, item in document["paths"].items():
            self.assertEqual({method.upper() for method in item if method != "head"},
                             methods[path] - {"HEAD"})

    def operations(self):
        """Yield (path, method, operation)."""
        for path, item in self.document["paths"].items():
            for method, operation in item.items():
                yield path, method, operation

    def test_operations(self):
        idents = [operation["operationId"] for _, _, operation in self.operations()]
        self.assertEqual(len(idents), len(set(idents)))
        for path, method, operation in self.operations():
            with self.subTest(path=path, method=method):
                self.assertLessEqual(set(operation), {
                    "operationId", "summary", "description", "parameters", "requestBody",
                    "responses", "security", "tags", "deprecated"})
                self.assertRegex(operation["operationId"], r"^\w+$")
                self.assertTrue(operation["summary"].strip())
                names = [(param["name"], param["in"]) for param in operation["parameters"]]
                self.assertEqual(len(names), len(set(names)))
                for param in operation["parameters"]:
                    self.check_parameter(param)
                self.assertEqual({param["name"] for param in operation["parameters"]
                                  if param["in"] == "path"}, set(re.findall(r"{(\w+)}", path)))
                self.assertTrue(operation["responses"])
                for status, response in operation["responses"].items():
                    self.assertRegex(status, r"^([1-5](\d\d|XX)|default)$")
                    self.assertTrue(response["description"].strip())
                    self.assertLessEqual(set(response), {"description", "headers", "content"})
                    for content in response.get("content", {}).values():
                        self.check_schema(content.get("schema", {}))

    def check_parameter(self, param):
        """Check a Parameter Object."""
        self.assertLessEqual({"name", "in", "schema"}, set(param))
        self.assertLessEqual(set(param), {"name", "in", "schema", "required", "description",
                                          "allowEmptyValue", "example", "deprecated", "style",
                                          "explode"})
        self.assertIn(param["in"], ("query", "path"))
        self.assertTrue(param["required"] or param["in"] == "query")
        self.assertIsInstance(param["required"], bool)
        self.assertTrue(param["description"].strip())
        self.check_schema(param["schema"])

    def check_schema(self, schema):
        """Check a Schema Object of the small kind that is used here."""
        if "$ref" in schema:
            place = self.document
            for name in schema["$ref"].lstrip("#/").split("/"):
                place = place[name]
            return self.check_schema(place)
        self.assertLessEqual(set(schema), {
            "type", "minimum", "maximum", "default", "enum", "maxLength", "pattern", "items",
            "properties", "required", "description", "nullable", "format", "oneOf", "anyOf",
            "allOf", "additionalProperties", "minItems", "maxItems", "example", "title"})
        self.assertIn(schema.get("type"), (None, "string", "integer", "number", "boolean",
                                           "object", "array"))
        self.assertEqual("items" in schema, schema.get("type") == "array")
        self.assertLessEqual(set(schema.get("required", [])), set(schema.get("properties", {})))
        if "default" in schema and "enum" in schema:
            self.assertIn(schema["default"], schema["enum"])
        inner = [*schema.get("properties", {}).values(), *schema.get("oneOf", []),
                 *schema.get("anyOf", []), *schema.get("allOf", [])]
        for part in inner + ([schema["items"]] if "items" in schema else []):
            if "$ref" not in part:
                self.check_schema(part)
        return None

    def test_what_is_described_is_what_comes(self):
        """The media types of each answer, form by form, are those of the description."""
        values = {"mail_id": 1, "is_read": 0, "hash": media_name(b"%PDF-1.4 data")}
        for path, method, operation in self.operations():
            if path == "/delete" or path in PLACES:
                continue
            forms = next((param["schema"]["enum"] for param in operation["parameters"]
                          if param["name"] == "format"), [""])
            for form in forms:
                with self.subTest(path=path, method=method, form=form):
                    given = {param["name"]: values[param["name"]]
                             for param in operation["parameters"] if param["required"]}
                    given.update({"format": form} if form else {})
                    answer = self.ask(f"{path}?{urllib.parse.urlencode(given)}", method.upper())
                    self.assertEqual(answer.status, 200)
                    described = operation["responses"]["200"].get("content", {})
                    mime = answer["Content-Type"].partition(";")[0]
                    self.assertTrue(mime in described or "*/*" in described, (mime, described))

    def test_answers_fit_their_schemas(self):
        for path, query in (("/count", ""), ("/filter_count", ""), ("/list", ""),
                            ("/list_short", ""),
                            ("/filter_list", ""), ("/filter_list_short", ""),
                            ("/mail", "?mail_id=1"), ("/latest", ""), ("/code", "?mail_id=1"),
                            ("/set_read", "?mail_id=1&is_read=0"), ("/healthz", ""),
                            ("/outbox", "")):
            with self.subTest(path=path):
                described = self.document["paths"][path]["get"]["responses"]["200"]
                schema = described.get("content", {}).get("application/json", {}).get("schema")
                self.assertTrue(schema, "no schema")
                self.fit(self.server.get(path + query), schema)

    def fit(self, value, schema):
        """Check a value against a schema, and that an object has no key that is not described."""
        while "$ref" in schema:
            place = self.document
            for name in schema["$ref"].lstrip("#/").split("/"):
                place = place[name]
            schema = place
        kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool,
                 "object": dict, "array": list}
        if value is None and schema.get("nullable"):
            return
        if "type" in schema:
            self.assertIsInstance(value, kinds[schema["type"]])
        if isinstance(value, list):
            for item in value:
                self.fit(item, schema["items"])
        if isinstance(value, dict) and "properties" in schema:
            self.assertLessEqual(set(schema.get("required", [])), set(value))
            if not schema.get("additionalProperties"):
                self.assertLessEqual(set(value), set(schema["properties"]))
            for name in set(value) & set(schema["properties"]):
                self.fit(value[name], schema["properties"][name])


class CurlTest(APICase):
    """What cron jobs and people do with curl."""

    @classmethod
    def setUpClass(cls):
        cls.curl = need("curl")
        super().setUpClass()
        cls.base = f"http://127.0.0.1:{cls.server.api_port}"
        cls.deliver(make_message("one"), attached(bytes(range(256)) * 100))

    def run_curl(self, *words):
        """Run curl; return (status, output)."""
        return self.server.run_tool(self.curl, "-sS", "-q", *words)

    def file(self, name):
        """Return the content of a file in the server's folder."""
        with open(os.path.join(self.server.folder, name), "rb") as file:
            return file.read()

    def test_exit_status(self):
        for path, status in (("/count", 0), ("/list?after=999999", 0), ("/nowhere", 22),
                             ("/mail?mail_id=999999", 22), ("/list?count=x", 22),
                             ("/latest?after=999999", 22), ("/delete?mail_id=1", 22),
                             ("/media?hash=" + "0" * 48, 22), ("/raw?mail_id=1", 0)):
            with self.subTest(path=path):
                self.assertEqual(self.run_curl("-f", "-o", os.devnull, self.base + path)[0], status)

    def test_compressed(self):
        self.deliver(*[make_message(f"compress {n}") for n in range(20)])
        plain = self.run_curl(self.base + "/list")
        self.assertTrue(self.run_curl("--compressed", self.base + "/list") == plain, "not the same")
        status, text = self.run_curl("--compressed", "-o", os.devnull, "-D", "-",
                                     self.base + "/list")
        self.assertIn("content-encoding: gzip", text.lower())

    def test_head(self):
        for path in ("/list", "/mail?mail_id=1", "/raw?mail_id=1", "/list?format=mbox", "/metrics"):
            status, text = self.run_curl("-f", "-I", self.base + path)
            self.assertEqual(status, 0)
            self.assertTrue(text.startswith("HTTP/1.1 200"), text)
        self.assertEqual(self.run_curl("-f", "-I", self.base + "/nowhere")[0], 22)

    def test_tags_in_files(self):
        if "--etag-compare" not in self.run_curl("--help", "all")[1]:
            self.skipTest("this curl has no --etag-compare")
        def poll():
            status, code = self.run_curl("-f", "--etag-save", "tag", "--etag-compare", "tag", "-o",
                                         "list", "-w", "%{http_code}", self.base + "/list_short")
            self.assertEqual(status, 0)
            return code
        self.run_curl("-o", os.devnull, self.base + "/count")
        with open(os.path.join(self.server.folder, "tag"), "wb"):
            pass
        self.assertEqual([poll(), poll(), poll()], ["200", "304", "304"])
        self.deliver(make_message("another"))
        self.assertEqual([poll(), poll()], ["200", "304"])

    def test_a_cron_job_sees_each_mail_once(self):
        script = (f'last=$(cat last 2>/dev/null || echo {self.server.get("/latest")["mail_id"]})\n'
                  f'"{self.curl}" -q -fsS "{self.base}/list_short?format=text&count=2&after=$last" '
                  '>new || exit 1\n'
                  'while IFS="$(printf "\\t")" read -r id time read size count from to subject\n'
                  'do printf "%s\\n" "$id:$from:$to:$subject" >>seen\n'
                  'echo "$id" >last.new && mv last.new last\ndone <new\n')
        expected = []
        for round_ in range(4):
            self.assertEqual(self.server.run_tool("sh", "-c", script), (0, ""))
            subjects = [f"cron $(id) {round_}.{n}" for n in range(round_)]
            idents = self.deliver(*map(make_message, subjects), sender="" if round_ == 2 else
                                  "c@example.com")
            expected += list(zip(map(str, idents), subjects))
        for _ in range(4):
            self.assertEqual(self.server.run_tool("sh", "-c", script), (0, ""))
        rows = [line.split(":") for line in self.file("seen").decode().splitlines()]
        self.assertEqual([(row[0], row[3]) for row in rows], expected)
        self.assertEqual({row[2] for row in rows}, {"b@example.com"})

    def test_wait(self):
        last = self.server.get("/latest")["mail_id"]
        results = []
        thread = threading.Thread(target=lambda: results.append(self.run_curl(
            "-f", f"{self.base}/latest?wait=30&after={last}&format=text")))
        thread.start()
        until(lambda: read_metrics(self.server)["pegmail_http_waiting"] == 1)
        new, = self.deliver(make_message("for curl"))
        thread.join(DEADLINE)
        status, text = results[0]
        self.assertEqual((status, text.split("\t")[0], text.split("\t")[7]),
                         (0, str(new), "for curl\n"))

    def test_changes(self):
        ident, = self.deliver(make_message())
        for words in (["-d", f"mail_id={ident}&is_read=1"],
                      ["-d", f"mail_id={ident}", "-d", "is_read=1"],
                      ["-H", "Content-Type: application/json", "-d",
                       json.dumps({"mail_id": ident, "is_read": 1})],
                      ["-G", "-d", f"mail_id={ident}", "-d", "is_read=1"],
                      ["-H", "Expect: 100-continue", "-d", f"mail_id={ident}&is_read=1"]):
            with self.subTest(words=words):
                self.server.get(f"/set_read?mail_id={ident}&is_read=0")
                status, text = self.run_curl("-f", f"{self.base}/set_read", *words)
                self.assertEqual((status, json.loads(text)), (0, {"is_read": 1}))
        self.assertEqual(self.run_curl("-f", "-o", os.devnull, "-X", "DELETE",
                                       f"{self.base}/delete?mail_id={ident}")[0], 0)
        self.assertEqual(self.run_curl("-f", "-o", os.devnull, "-X", "DELETE",
                                       f"{self.base}/delete?mail_id={ident}")[0], 22)

    def test_saving_under_the_name_from_mail(self):
        folder = os.path.join(self.server.folder, "saved")
        os.mkdir(folder)
        for number, name in enumerate(("../../up", "/tmp/down", "..", ".bashrc", "a b.txt")):
            data = b"saved %d" % number
            self.deliver(attached(data, f'attachment; filename="{name}"'))
            self.server.get("/latest")
            status, text = self.run_curl("-f", "-O", "-J", "--output-dir", folder,
                                         f"{self.base}/media?hash={media_name(data)}")
            self.assertEqual(status, 0, text)
        contents = set()
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "rb") as file:
                contents.add(file.read())
        self.assertEqual(contents, {b"saved %d" % number for number in range(5)})

    def test_ranges(self):
        data = bytes(range(256)) * 100
        url = f"{self.base}/media?hash={media_name(data)}"
        self.assertEqual(self.run_curl("-f", "-r", "10-19", "-o", "part", url), (0, ""))
        self.assertEqual(self.file("part"), data[10:20])
        with open(os.path.join(self.server.folder, "resumed"), "wb") as file:
            file.write(data[:5000])
        self.assertEqual(self.run_curl("-f", "-C", "-", "-o", "resumed", url), (0, ""))
        self.assertEqual(self.file("resumed"), data)

    def test_one_connection_for_several_urls(self):
        status, text = self.run_curl("-v", *[f"{self.base}/count"] * 3)
        self.assertEqual(status, 0)
        self.assertEqual(text.count("Connected to"), 1)

    def test_tokens(self):
        with Running("--api_token", "tok") as server:
            url = f"http://127.0.0.1:{server.api_port}/count"
            for words, status in ((["-H", "Authorization: Bearer tok"], 0), (["-u", "any:tok"], 0),
                                  (["--oauth2-bearer", "tok"], 0), (["-u", "any:no"], 22),
                                  ([], 22)):
                with self.subTest(words=words):
                    self.assertEqual(self.run_curl("-f", "-o", os.devnull, *words, url)[0], status)


# =====================================================================================
# 10. Server and tools: all of it wired together, and the command line
# =====================================================================================

LARGE = make_message("large", "".join(f"{n} " + "x" * 70 + "\r\n" for n in range(3000)))
ODD = (b"From: a@example.com\r\nSubject: odd\r\n\r\n"
       b".leading dot\r\n..two\r\n.\r\nna\xefve 8-bit \xff\x00\x80\r\n" + b"y" * 3000 + b"\r\n\r\n")


# Starts a program in a session of its own, on the terminal that is named, if one is.
OWN_SESSION = (sys.executable, "-c", "import os, sys; os.setsid(); sys.argv[1] and "
               "os.open(sys.argv[1], os.O_RDWR); os.execv(sys.argv[2], sys.argv[2:])")


def make_certificate(folder, name, *more):
    """Make NAME.pem and NAME.key, self-signed for mx.example.com; return the path of the first."""
    path = os.path.join(folder, name)
    subprocess.run([need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-keyout", path + ".key", "-out",
                    path + ".pem", "-days", "2", "-subj", "/CN=" + name, "-addext",
                    "subjectAltName=DNS:mx.example.com", *(more or ("-nodes",))],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return path + ".pem"


def free_port(address="127.0.0.1"):
    """Return a port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind((address, 0))
        return sock.getsockname()[1]


def start_tls(wire):
    """Begin TLS on a connection; return the server's certificate."""
    reply = wire.ask("STARTTLS")
    if reply[:10] != "220 2.0.0 ":
        raise AssertionError(f"STARTTLS: {reply}")
    wire.socket = client_context().wrap_socket(wire.socket)
    return wire.socket.getpeercert(True)


def read_certificate(path):
    """Return a PEM file's certificate as getpeercert() gives it."""
    with open(path) as file:
        return ssl.PEM_cert_to_DER_cert(file.read())


def read_stored(server, ident):
    """Return (fields added on top, message as it was sent) of a stored message."""
    status, _, body = server.request(f"/raw?mail_id={ident}")
    if status != 200:
        raise AssertionError(f"/raw: {status} {body!r}")
    match = re.match(rb"Return-Path: .*\r\nReceived: .*\r\n(?:\t.*\r\n)*", body)
    return match.group().decode(), body[match.end():]


class StartTest(FolderCase):
    """What a start prints, makes and leaves open."""

    def test_first_use_of_a_copied_file(self):
        """One file in an empty folder, nothing installed: mail goes in, curl reads it back."""
        script = 'cp "$1" pegmail.py; shift; exec "$0" -I -S pegmail.py "$@"'
        with Running(folder=self.folder, wrap=("sh", "-c", script)) as server:
            server.send(make_message("first"))
            status, out = server.run_tool(need("curl"), "-sSf",
                                          f"http://127.0.0.1:{server.api_port}/latest")
            self.assertEqual((status, json.loads(out)["mail_subject"]), (0, "first"))
            self.assertEqual({"mail.db", "media"} - set(os.listdir(self.folder)), set())
            self.assertEqual(server.stop(), 0)

    def test_closed_output(self):
        """Nobody reads what it prints, as behind `>&- 2>&-`: it serves all the same."""
        number = free_port()
        process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, PROGRAM, "--api_port=0",
             f"--smtp_port={number}"], cwd=self.folder, stdin=subprocess.DEVNULL)
        try:
            def listens():
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", number)) == 0
            until(listens, "the start")
            with Wire(("127.0.0.1", number)) as wire:
                wire.deliver(make_message())
            process.terminate()
            self.assertEqual(process.wait(DEADLINE), 0)
        finally:
            process.kill()
            process.wait()

    def test_start_output(self):
        with Running("--lmtp_port=0", "--server_host", "example.com", "example.org",
                     folder=self.folder) as server:
            real = os.path.realpath(self.folder)
            self.assertEqual(server.text().split("\n")[:8], [
                f"pegmail {pegmail.__version__}",
                f"  mail in:   smtp://127.0.0.1:{server.smtp_port}",
                f"  mail out:  http://127.0.0.1:{server.api_port}/list",
                f"  LMTP:      127.0.0.1:{server.lmtp_port}",
                "  takes:     mail for example.com, example.org, at most 52428800 bytes",
                f"  kept in:   {real}/mail.db and {real}/media",
                "Ctrl-C stops it.", ""])
            self.assertEqual(server.get("/count"), {"count": 0})
            with server.connect() as wire:
                self.assertEqual(wire.greeting, "220 mx.example.com ESMTP pegmail")
            self.assertEqual(server.stop(), 0)

    def test_hash_length(self):
        message = make_message("attachment", headers=(
            "MIME-Version: 1.0\r\nContent-Type: application/pdf; name=a.pdf\r\n"), body="x\r\n")
        with Running("--file_hash_length", "8", folder=self.folder) as server:
            ident = server.send(message)
            found = server.get(f"/mail?mail_id={ident}")["mail_body"]["hash"]
            self.assertEqual(len(found), 16)
            self.assertEqual(server.request(f"/media?hash={found}")[2], b"x\r\n")

    def test_files_are_private(self):
        """Whatever the umask: files 600, folders 700."""
        attachment = make_message("attachment", headers=(
            "MIME-Version: 1.0\r\nContent-Type: application/pdf; name=a.pdf\r\n"
            "Content-Transfer-Encoding: base64\r\n"), body="QUJD" * 3000 + "\r\n")
        for umask in ("000", "022"):
            arguments = ("--db_path=mail.db", "--media_path=deep/er/media", "--lmtp_socket=lmtp")
            shell = ("sh", "-c", f'umask {umask}; exec "$@"', "sh")
            with self.subTest(umask), Running(*arguments, wrap=shell) as server:
                server.send(attachment)
                server.send(LARGE)
                with Wire(os.path.join(server.folder, "lmtp")) as wire:
                    self.assertEqual(wire.greeting, "220 mx.example.com LMTP pegmail")
                item = server.get("/mail?mail_id=1")["mail_body"]
                self.assertEqual(item["type"], "attachment")
                self.assertEqual(server.request("/media?hash=" + item["hash"])[0], 200)
                modes = {}
                for place, folders, files in os.walk(server.folder):
                    for name in folders + files:
                        path = os.path.join(place, name)
                        kind = 0o700 if name in folders else 0o600
                        modes[os.path.relpath(path, server.folder)] = (
                            os.lstat(path).st_mode & 0o777, kind)
                del modes["output.txt"]                    # the fixture's own
                self.assertGreaterEqual(modes.keys(), {"mail.db", "mail.db-wal", "lmtp", "deep",
                                                       "deep/er", "deep/er/media"})
                self.assertEqual({name: oct(mode) for name, (mode, kind) in modes.items()
                                  if mode != kind}, {})
                self.assertEqual(server.stop(), 0)
                self.assertFalse(os.path.exists(os.path.join(server.folder, "lmtp")))

    def test_dead_socket_is_replaced(self):
        with Running("--lmtp_socket=lmtp", folder=self.folder) as server:
            server.stop(signal.SIGKILL)
        self.assertTrue(os.path.exists(self.path("lmtp")))
        with Running("--lmtp_socket=lmtp", folder=self.folder) as server:
            with Wire(self.path("lmtp")) as wire:
                self.assertEqual(wire.ask("QUIT")[:3], "221")
            self.assertEqual(server.stop(), 0)


class StopTest(FolderCase):
    """A stop finishes what is being received, answers 421 to the rest, and loses nothing."""

    def begin_message(self, wire, message):
        """Send a message but for its last bytes."""
        for line, code in (("EHLO client.example", "250"), ("MAIL FROM:<a@example.com>", "250"),
                           ("RCPT TO:<b@example.com>", "250"), ("DATA", "354")):
            self.assertEqual(wire.ask(line)[:3], code)
        wire.send(message[:-10])

    def wait_for_stop(self, server):
        """Wait until the server takes no more connections."""
        def refused():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", server.smtp_port)) != 0
        until(refused, "the stop")

    def test_stop_by_signal(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number), Running("--grace=600") as server:
                idle, between, data, bdat = (server.connect() for _ in range(4))
                with idle, between, data, bdat:
                    for line in ("EHLO x", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>"):
                        self.assertEqual(between.ask(line)[:3], "250")
                        self.assertEqual(bdat.ask(line)[:3], "250")
                    bdat.send(b"BDAT 20000\r\n" + LARGE[:20000])
                    self.assertEqual(bdat.reply()[:3], "250")
                    self.begin_message(data, LARGE)
                    server.process.send_signal(number)
                    for wire in (idle, between):
                        self.assertRegex(wire.reply(), r"^421 4\.3\.2 mx\.example\.com ")
                        self.assertEqual(wire.rest(), b"")
                    self.wait_for_stop(server)
                    data.send(LARGE[-10:] + b".\r\n")
                    self.assertEqual(data.reply(), "250 2.0.0 Kept as 1")
                    bdat.send(b"BDAT %d LAST\r\n" % (len(LARGE) - 20000) + LARGE[20000:])
                    self.assertEqual(bdat.reply(), "250 2.0.0 Kept as 2")
                    for wire in (data, bdat):
                        self.assertRegex(wire.reply(), r"^421 4\.3\.2 ")
                        self.assertEqual(wire.rest(), b"")
                self.assertEqual(server.stop(0), 0)
                self.assertNotIn("Traceback", server.text())
                if number == signal.SIGINT:
                    continue
                with Running(folder=server.folder) as again:
                    self.assertEqual([read_stored(again, ident)[1] == LARGE for ident in (1, 2)],
                                     [True, True])
                    self.assertEqual(again.get("/count"), {"count": 2})
                    self.assertEqual(again.stop(), 0)

    def test_signal_that_another_thread_gets(self):
        """The system hands a signal to any thread; the one that serves is asleep meanwhile."""
        send = getattr(ctypes.CDLL(None), "tgkill", None)
        if send is None or not os.path.isdir("/proc/self/task"):
            self.skipTest("this system cannot send a signal to one thread")
        with Running() as server:
            pid = server.process.pid

            def states():
                found = {}
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/stat") as file:
                        found[int(task)] = file.read().rpartition(") ")[2][0]
                return found
            until(lambda: set(states().values()) == {"S"}, "sleep")
            others = sorted(states().keys() - {pid})
            self.assertEqual(send(pid, others[0], int(signal.SIGTERM)), 0)
            self.assertEqual(server.stop(0), 0)

    def test_grace_expires(self):
        with Running("--grace=1", folder=self.folder) as server:
            with server.connect() as wire:
                self.begin_message(wire, LARGE)
                server.process.send_signal(signal.SIGTERM)
                self.assertRegex(wire.reply(), r"^421 4\.")
                self.assertEqual(wire.rest(), b"")
            self.assertEqual(server.stop(0), 0)
            self.assertNotIn("Traceback", server.text())
        with Running(folder=self.folder) as again:
            self.assertEqual(again.get("/count"), {"count": 0})
            self.assertEqual(os.listdir(self.path("media", "tmp")), [])
            self.assertEqual(again.stop(), 0)

    def test_second_signal_stops_at_once(self):
        with Running("--grace=3600") as server, server.connect() as wire:
            self.begin_message(wire, LARGE)
            server.process.send_signal(signal.SIGTERM)
            self.wait_for_stop(server)
            self.assertEqual(server.stop(signal.SIGTERM), 0)
            self.assertNotIn(b"250", wire.rest())

    def test_message_being_committed_is_kept_once(self):
        """A stop while the writer waits: one 250, one message, then 421."""
        with Running("--grace=600") as server:
            path = os.path.join(server.folder, "mail.db")
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")              # the writer has to wait for us
                with server.connect() as wire:
                    self.begin_message(wire, LARGE)
                    wire.send(LARGE[-10:] + b".\r\n")
                    until(lambda: b"pegmail_received_total 1\n" in server.request("/metrics")[2])
                    server.process.send_signal(signal.SIGTERM)
                    self.wait_for_stop(server)
                    db.execute("ROLLBACK")
                    self.assertEqual(wire.reply(), "250 2.0.0 Kept as 1")
                    self.assertRegex(wire.reply(), r"^421 4\.3\.2 ")
                    self.assertEqual(wire.rest(), b"")
            self.assertEqual(server.stop(0), 0)
            self.assertNotIn("Traceback", server.text())
            with Running(folder=server.folder) as again:
                self.assertEqual(again.get("/count"), {"count": 1})
                self.assertEqual(read_stored(again, 1)[1], LARGE)
                self.assertEqual(again.stop(), 0)

    def test_restart_keeps_everything(self):
        paths = ("/list?count=10", "/filter_list_short?filter_is_read=1",
                 "/filter_count?filter_mail_subject=ODD", "/count")
        with Running(folder=self.folder) as server:
            idents = [server.send(message) for message in (make_message(), ODD, LARGE)]
            self.assertEqual(server.get("/set_read?mail_id=2&is_read=1"), {"is_read": 1})
            before = [server.get(path) for path in paths]
            raw = [server.request(f"/raw?mail_id={ident}")[2] for ident in idents]
            self.assertEqual(server.stop(), 0)
        with Running(folder=self.folder) as server:
            for path, answer in zip(paths, before):
                self.assertTrue(server.get(path) == answer, path)
            for ident, message in zip(idents, raw):
                self.assertEqual(server.request(f"/raw?mail_id={ident}")[2], message)
            self.assertEqual(server.send(), idents[-1] + 1)
            self.assertEqual(server.stop(), 0)


SPLIT = ("sh", "-c", 'exec "$@" 2>log.txt', "sh")      # the log alone, without the start lines


class LogTest(FolderCase):
    """A session can be understood afterwards, and nobody reads mail or secrets in the log."""

    runs = {}

    def run_sessions(self, *arguments):
        """Run a server through some sessions, once; return the lines of its log."""
        if arguments not in self.runs:
            self.runs[arguments] = self.make_log(*arguments)
        self.session, lines = self.runs[arguments]
        return list(lines)

    @classmethod
    def tearDownClass(cls):
        cls.runs.clear()

    def make_log(self, *arguments):
        """Run a server through some sessions; return the last one's id and the log's lines."""
        folder = tempfile.mkdtemp(dir=self.folder)
        with Running("--server_host=example.com", "--api_token=tok3nsecret", *arguments,
                     folder=folder, wrap=SPLIT) as server:
            with server.connect() as wire:
                wire.ask("EHLO client.example")
                wire.ask("MAIL FROM:<a@example.org>")
                self.assertEqual(wire.ask("RCPT TO:<b@example.net>"),
                                 "550 5.7.1 Mail for this domain is not taken here")
                wire.ask("RSET")
                wire.deliver(make_message("subjectsecret", "bodysecret\r\n",
                                          "X-Y: fieldsecret\r\n"), "a@example.org")
                wire.send("MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.com>\r\n"
                          "BDAT 12 LAST\r\nchunksecret\n")
                for _ in range(3):
                    self.assertEqual(wire.reply()[:3], "250")
                self.assertEqual(wire.ask("QUIT")[:3], "221")
            token = {"Authorization": "Bearer tok3nsecret"}
            raw = server.request("/raw?mail_id=1", headers=token)[2].decode()
            self.assertEqual(server.request("/count")[0], 401)
            session = re.search(r"\tid ([0-9a-f]{8})\.1", raw).group(1)
            self.assertEqual(server.stop(), 0)
        with open(os.path.join(folder, "log.txt"), encoding="utf-8") as file:
            return session, file.read().splitlines()

    def test_text(self):
        lines = self.run_sessions()
        self.assertEqual(lines.pop(), "stopped")
        for line in lines:
            self.assertRegex(line, "^" + self.session + " ")
        self.assertEqual([line.split(" ", 1)[1] for line in lines], [
            "connected: 127.0.0.1",
            "refused: 550 5.7.1 Mail for this domain is not taken here from=<a@example.org>",
            lines[2].split(" ", 1)[1], lines[3].split(" ", 1)[1],
            "closed: quit, 2 messages kept"])
        for ident, line in enumerate(lines[2:4], 1):
            self.assertRegex(line, rf"kept: mail_id={ident} from=<a@example\.org> "
                                   rf"to=.*b@example\.com.* size=\d+$")

    def test_json(self):
        for arguments in (["--log_format=json"], ["--log_format=json", "--debug"]):
            with self.subTest(arguments):
                lines = [json.loads(line) for line in self.run_sessions(*arguments)]
                self.assertEqual(lines[-1]["text"], "stopped")
                for line in lines:
                    self.assertRegex(line["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
                    self.assertIn(line["level"], ("debug", "info", "warning"))
                self.assertEqual({line["session"] for line in lines[:-1]}, {self.session})
                refused = [line for line in lines if line["level"] == "warning"]
                self.assertEqual([line["text"] for line in refused], [
                    "refused: 550 5.7.1 Mail for this domain is not taken here "
                    "from=<a@example.org>"])

    def test_debug_shows_commands_and_replies(self):
        text = "\n".join(self.run_sessions("--debug"))
        self.assertIn(f"{self.session} < EHLO client.example\n", text)
        self.assertIn(f"{self.session} < RCPT TO:<b@example.net>\n", text)
        self.assertRegex(text, rf"(?m)^{self.session} > .*550.*5\.7\.1.*Mail for this domain")
        self.assertNotRegex("\n".join(self.run_sessions()), "EHLO|RCPT TO")

    def test_no_contents_and_no_secrets(self):
        for arguments in ([], ["--debug"], ["--debug", "--log_format=json"]):
            with self.subTest(arguments):
                self.assertNotIn("secret", "\n".join(self.run_sessions(*arguments)))

    def test_nothing_a_client_sends_begins_a_line(self):
        """CR, LF and their kin from a client stay within its line."""
        with Running("--debug", "--server_host=example.com", folder=self.folder,
                     wrap=SPLIT) as server:
            wire = server.connect()
            self.addCleanup(wire.__exit__)
            for line in ("EHLO a\x1b[31m\tb", "EHLO a\rforged\tb", "EHLO a\u2028forged\tb",
                         "MAIL FROM:<\"a\u0085forged\"@example.com>\tSMTPUTF8",
                         "EHLO client.example",
                         "MAIL FROM:<\"a\u2028forged\"@example.com> SMTPUTF8",
                         "NOOP \x00forged", "\x0bforged"):
                wire.ask(line)
            self.assertEqual(wire.ask("QUIT")[:3], "221")
            wire.socket.close()
            self.assertEqual(server.stop(), 0)
        with open(self.path("log.txt"), encoding="utf-8", newline="") as file:
            text = file.read()
        for line in text.splitlines():        # at \x0b, \x1c, \x85 and U+2028 as well
            self.assertRegex(line, r"\A(?:[0-9a-f]{8} .*|stopped)\Z")
        self.assertNotRegex(text, r"[\x00-\x09\x0b-\x1f\x7f]")


class CertificateTest(FolderCase):
    """STARTTLS, and certificates that are renewed while the server runs."""

    def setUp(self):
        super().setUp()
        self.old = read_certificate(make_certificate(self.folder, "old"))
        self.new = read_certificate(make_certificate(self.folder, "new"))
        self.install("old", "old")

    def install(self, cert, key):
        """Put files in the place that the server reads."""
        for source, target in ((cert + ".pem", "cert.pem"), (key + ".key", "key.pem")):
            shutil.copy(self.path(source), self.path(target + ".tmp"))
            os.replace(self.path(target + ".tmp"), self.path(target))

    def start(self, *arguments):
        """Return a server with the certificate in that place."""
        return Running("--ssl_cert=cert.pem", "--ssl_key=key.pem", *arguments, folder=self.folder)

    def offered(self, server):
        """Return the certificate that a new connection gets."""
        with server.connect() as wire:
            self.assertIn("250-STARTTLS", wire.ask("EHLO x").replace("250 ", "250-").split("\n"))
            return start_tls(wire)

    def wait_for_offer(self, server, certificate):
        """Wait until new connections get this certificate."""
        until(lambda: self.offered(server) == certificate, "the renewal")

    def hang_up(self, server, text):
        """Send SIGHUP and wait until the log says something once more."""
        before = server.text().count(text)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.text().count(text) > before, f"{text!r} in the log")

    def test_openssl(self):
        """A self-signed certificate, made and checked by openssl."""
        with self.start() as server:
            self.assertIn(f"smtp://127.0.0.1:{server.smtp_port} with STARTTLS", server.text())
            status, out = server.run_tool(
                need("openssl"), "s_client", "-starttls", "smtp", "-connect",
                f"127.0.0.1:{server.smtp_port}", "-CAfile", self.path("old.pem"), "-brief",
                "-verify_return_error", "-crlf", "-ign_eof", input=b"QUIT\r\n")
            self.assertEqual(status, 0, out)
            self.assertIn("221 2.0.0 mx.example.com closing", out)
            self.assertEqual(server.stop(), 0)

    def test_old_tls_is_refused(self):
        """TLS 1.1 gets a protocol_version alert (RFC 5246 7.2.2)."""
        hello = (b"\x03\x02" + bytes(32) + b"\x00" + b"\x00\x06\xc0\x14\xc0\x0a\x00\x2f"
                 + b"\x01\x00")
        record = b"\x01" + len(hello).to_bytes(3, "big") + hello
        with self.start() as server:
            with server.connect() as wire:
                self.assertEqual(wire.ask("STARTTLS")[:3], "220")
                wire.send(b"\x16\x03\x01" + len(record).to_bytes(2, "big") + record)
                answer = wire.rest()
                self.assertEqual((answer[:1], answer[5:7]), (b"\x15", b"\x02\x46"))
            self.assertEqual(self.offered(server), self.old)
            self.assertEqual(server.stop(), 0)
            ident = re.search(r"(?m)^([0-9a-f]{8}) connected", server.text()).group(1)
            self.assertRegex(server.text(), rf"(?m)^{ident} .*TLS")

    def test_reload_on_signal(self):
        """New handshakes get the new one, running sessions go on, a bad one changes nothing."""
        self.write("garbage.pem", "-----BEGIN CERTIFICATE-----\nxxxx\n")
        self.write("garbage.key", "")
        with self.start() as server:
            with server.connect() as secure, server.connect() as plain:
                self.assertEqual(start_tls(secure), self.old)
                self.install("new", "new")
                self.hang_up(server, "the certificate was read again")
                self.assertEqual(start_tls(plain), self.new)
                self.assertEqual(self.offered(server), self.new)
                for cert, key in (("garbage", "old"), ("old", "new"), ("garbage", "garbage")):
                    self.install(cert, key)
                    self.hang_up(server, "the old certificate stays in use")
                    self.assertEqual(self.offered(server), self.new)
                os.unlink(self.path("cert.pem"))
                self.hang_up(server, "the old certificate stays in use")
                self.assertEqual(self.offered(server), self.new)
                self.install("old", "old")
                server.process.send_signal(signal.SIGHUP)
                self.wait_for_offer(server, self.old)
                for wire in (secure, plain):
                    wire.deliver(make_message())
            self.assertEqual(server.stop(), 0)
            self.assertNotIn("Traceback", server.text())

    def test_reload_when_the_file_changes(self):
        with self.start() as server:
            with server.connect() as secure:
                self.assertEqual(start_tls(secure), self.old)
                self.install("new", "new")
                until(lambda: "the certificate was read again" in server.text(), "the renewal")
                self.assertEqual(self.offered(server), self.new)
                secure.deliver(make_message())
            self.assertEqual(server.stop(), 0)

    def test_signal_without_a_certificate(self):
        """A service that is told to reload goes on, with nothing to reload."""
        with Running(wrap=(*OWN_SESSION, "")) as server:
            with server.connect() as wire:
                server.process.send_signal(signal.SIGHUP)
                for _ in range(3):
                    self.assertEqual(wire.ask("NOOP")[:3], "250")
            server.send()
            self.assertEqual(server.stop(), 0)

    def test_terminal_that_is_closed(self):
        """It ends with its terminal, and as cleanly as by Ctrl-C."""
        master, slave = os.openpty()
        with open(master, "wb") as terminal, open(slave, "wb") as name, \
                Running(wrap=(*OWN_SESSION, os.ttyname(slave))) as server:
            name.close()
            server.send()
            terminal.close()
            self.assertEqual(server.stop(0), 0)
            self.assertIn("\nstopped\n", server.text())


class SystemdTest(FolderCase):
    """--generate_systemd_unit."""

    def unit(self, *arguments):
        """Return the unit for some arguments as text, and its settings as {name: value}."""
        status, out, err = self.call_main(*arguments, "--generate_systemd_unit")
        self.assertEqual((status, err), (0, ""))
        return out, dict(line.split("=", 1) for line in out.splitlines() if re.match("[A-Z]", line))

    def test_contents(self):
        text, values = self.unit("--smtp_port=25", "--server_host", "example.com", "--grace", "33")
        self.assertEqual(re.findall(r"(?m)^\[.*\]$", text), ["[Unit]", "[Service]", "[Install]"])
        self.assertEqual(values["ExecStart"], f"{sys.executable} {os.path.realpath(PROGRAM)} "
                                              "--smtp_port=25 --server_host example.com --grace 33")
        self.assertEqual(values["WorkingDirectory"], "%S/" + values["StateDirectory"])
        self.assertGreater(int(values["TimeoutStopSec"]), 33)
        for name, value in (("StateDirectoryMode", "0700"), ("UMask", "0077"),
                            ("AmbientCapabilities", "CAP_NET_BIND_SERVICE"),
                            ("DynamicUser", "yes"), ("NoNewPrivileges", "yes"),
                            ("ProtectSystem", "strict"), ("Restart", "on-failure"),
                            ("ExecReload", "/bin/kill -HUP $MAINPID"),
                            ("WantedBy", "multi-user.target")):
            with self.subTest(name):
                self.assertEqual(values[name], value)

    def test_command_works_elsewhere(self):
        """What ExecStart says works in the service's own folder, with systemd's quoting undone."""
        make_certificate(self.folder, "a")
        self.write("my settings.ini", f"[pegmail]\nssl_key = {self.path('a.key')}\n")
        self.write("token", "secret\n")
        _, values = self.unit("--config", "my settings.ini", "--ssl-cert=a.pem",
                              "--api_token", "@token", "--lmtp_socket", "50%.$HOME a b")
        command = values["ExecStart"].replace("%%", "%").replace("$$", "$")
        with tempfile.TemporaryDirectory() as elsewhere:
            done = subprocess.run([*shlex.split(command), "--check"], cwd=elsewhere,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=DEADLINE)
        self.assertEqual((done.returncode, done.stdout), (0, b"the configuration is fine\n"))

    def test_systemd_takes_it(self):
        text, _ = self.unit("--smtp_port", "25", "--api_token", "50% of \"$HOME\"")
        self.write("pegmail.service", text)
        done = subprocess.run([need("systemd-analyze"), "verify", self.path("pegmail.service")],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE)
        complaints = [line for line in done.stdout.decode().splitlines()
                      if "pegmail" in line]
        self.assertEqual(complaints, [])


class Nginx:
    """A real nginx with a printed configuration, moved from port 25 to a free one."""

    def __init__(self, config):
        self.program = need("nginx")
        self.folder = tempfile.mkdtemp(prefix="nginx-")
        self.port = free_port()
        config, ports = re.subn(r"\blisten 25;", f"listen 127.0.0.1:{self.port};", config)
        config, pids = re.subn(r"(?m)^pid .*;", f"pid {self.folder}/nginx.pid;", config)
        if (ports, pids) != (1, 1):
            raise AssertionError("the configuration has no port or no pid:\n" + config)
        self.config = os.path.join(self.folder, "nginx.conf")
        with open(self.config, "w") as file:
            file.write(config)
        self.log = open(os.path.join(self.folder, "log.txt"), "wb+")
        self.process = None

    def check(self):
        """Have nginx check the configuration."""
        done = subprocess.run([self.program, "-t", "-c", self.config], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode or b"[warn]" in done.stdout:
            raise AssertionError("nginx -t: " + done.stdout.decode())

    def __enter__(self):
        try:
            self.check()
            self.process = subprocess.Popen(
                [self.program, "-c", self.config, "-g", "daemon off;"],
                stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
            until(self.listens, "the start of nginx")
        except BaseException:
            self.__exit__()
            raise
        return self

    def listens(self):
        """Does it accept connections?"""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __exit__(self, *_):
        if self.process is not None:
            self.process.terminate()
            self.process.wait(DEADLINE)
        self.log.close()
        shutil.rmtree(self.folder)

    def connect(self, source="127.0.0.5"):
        """Return a connection through nginx."""
        return Wire(("127.0.0.1", self.port), source=source)


class NginxCase(FolderCase):
    """A generated configuration, a pegmail started as its first lines say, and a real nginx."""

    def generate(self, *arguments):
        """Return (configuration, arguments that its comment wants pegmail to have)."""
        status, out, err = self.call_main("--generate_nginx_config", *arguments)
        self.assertEqual((status, err), (0, ""))
        command = re.search(r"(?m)^#\s+python3 pegmail\.py ?(.*)$", out)
        self.assertIsNotNone(command, out)
        return out, shlex.split(command.group(1))

    @contextlib.contextmanager
    def pair(self, *arguments):
        """Run both as printed, on free ports; yield (pegmail, nginx)."""
        need("nginx")
        ports = [f"--smtp_port={free_port()}", f"--api_port={free_port()}"]
        config, words = self.generate(*ports, *arguments)
        with Running(*words, folder=self.folder) as server, Nginx(config) as nginx:
            yield server, nginx
            if server.process.poll() is None:
                self.assertEqual(server.stop(), 0)
            self.assertNotIn("Traceback", server.text())


class NginxMailTest(NginxCase):
    """Mail proxy: nginx asks /auth, and names the client by XCLIENT."""

    def test_mail_through_nginx(self):
        with self.pair("--server_host", "example.com", "b\u00fccher.example") as (server, nginx):
            for message in (make_message(), ODD, LARGE):
                with nginx.connect() as wire:
                    # What comes behind RCPT is passed on, and is not nginx's own.
                    wire.deliver(make_message())
                    self.assertRegex(wire.ask("XCLIENT ADDR=192.0.2.99"), "^550 5\\.7\\.0 ")
                    self.assertNotIn("XCLIENT", wire.ask("EHLO again.example"))
                    ident = wire.deliver(message)
                    self.assertEqual(wire.ask("QUIT")[:3], "221")
                trace, stored = read_stored(server, ident)
                self.assertEqual(stored, message)
                self.assertIn("Return-Path: <a@example.com>\r\n", trace)
                self.assertIn("Received: from client.example ([127.0.0.5])\r\n", trace)
                self.assertIn("with ESMTP\r\n", trace)
            with nginx.connect("127.0.0.6") as wire:
                self.assertEqual(wire.ask("HELO old.example")[:3], "250")
                self.assertEqual(wire.ask("MAIL FROM:<>")[:3], "250")
                self.assertEqual(wire.ask("RCPT TO:<x@xn--bcher-kva.example>")[:3], "250")
                self.assertEqual(wire.ask("RCPT TO:<x@EXAMPLE.com>")[:3], "250")
                self.assertEqual(wire.ask("RCPT TO:<x@elsewhere.example>"),
                                 "550 5.7.1 Mail for this domain is not taken here")
                self.assertEqual(wire.ask("DATA")[:3], "354")
                wire.send(make_message() + b".\r\n")
                self.assertEqual(wire.reply(), "250 2.0.0 Kept as 7")
            self.assertEqual(server.get("/mail?mail_id=7")["mail_to"],
                             ["x@xn--bcher-kva.example", "x@EXAMPLE.com"])
            self.assertIn("from old.example ([127.0.0.6])", read_stored(server, 7)[0])
            with nginx.connect() as wire:           # nginx refuses it itself, after 3 s (Auth-Wait)
                wire.ask("EHLO client.example")
                self.assertEqual(wire.ask("MAIL FROM:<a@example.org>")[:3], "250")
                self.assertEqual(wire.ask("RCPT TO:<b@example.org>"),
                                 "550 5.7.1 Mail for this domain is not taken here")
            self.assertEqual(server.get("/count"), {"count": 7})

    def test_what_nginx_promises_holds(self):
        """Pipelined commands, 8BITMIME and SIZE, as its EHLO offers them."""
        with self.pair("--max_size", "300K") as (server, nginx):
            with nginx.connect() as wire:
                offers = wire.ask("EHLO client.example").split("\n")
                for offer in ("PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES", "SIZE 307200"):
                    self.assertIn(offer, [line[4:] for line in offers])
                wire.send(b"MAIL FROM:<a@example.com> SIZE=%d BODY=8BITMIME\r\n"
                          b"RCPT TO:<b@example.com>\r\nRCPT TO:<c@example.com>\r\nDATA\r\n"
                          % len(LARGE))
                self.assertEqual([wire.reply()[:3] for _ in range(4)], ["250"] * 3 + ["354"])
                wire.send(LARGE + b".\r\nMAIL FROM:<a@example.com>\r\n"
                          b"RCPT TO:<b@example.com>\r\nDATA\r\n")
                self.assertEqual(wire.reply(), "250 2.0.0 Kept as 1")
                self.assertEqual([wire.reply()[:3] for _ in range(3)], ["250", "250", "354"])
                wire.send(ODD.replace(b"\r\n.", b"\r\n..") + b".\r\nQUIT\r\n")
                self.assertEqual(wire.reply(), "250 2.0.0 Kept as 2")
                self.assertEqual(wire.reply()[:3], "221")
            for ident, message in enumerate((LARGE, ODD), 1):
                self.assertEqual(read_stored(server, ident)[1], message)

    def test_token_and_names_are_quoted(self):
        """What nginx asks, seen by a listener in pegmail's place."""
        token = "a\"b\\c $d{e};'f#"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            sock.settimeout(DEADLINE)
            config, _ = self.generate(f"--api_port={sock.getsockname()[1]}", "--api_token", token)
            with Nginx(config) as nginx, nginx.connect() as wire:
                for line in ("EHLO client.example", "MAIL FROM:<a@example.com>"):
                    self.assertEqual(wire.ask(line)[:3], "250")
                wire.send("RCPT TO:<b@example.com>\r\n")
                client, _ = sock.accept()
                with client:
                    client.settimeout(DEADLINE)
                    question = b""
                    while b"\r\n\r\n" not in question:
                        question += client.recv(65536)
                    client.sendall(b"HTTP/1.0 200 OK\r\nAuth-Status: no\r\n\r\n")
        lines = question.decode().split("\r\n")
        self.assertRegex(lines[0], "^GET /auth HTTP/1")
        self.assertIn("Authorization: Bearer " + token, lines)
        self.assertIn("Auth-SMTP-To: RCPT TO:<b@example.com>", lines)
        self.assertIn("Client-IP: 127.0.0.5", lines)

    def test_another_address(self):
        """--bind at another address: the printed configuration still fits."""
        with self.pair("--bind=127.0.0.9", "--server_host=example.com") as (_, nginx):
            with nginx.connect() as wire:
                self.assertEqual(wire.deliver(make_message()), 1)

    def test_address_beyond_loopback(self):
        """The same with an address of this host that is not a loopback one."""
        address = own_address()
        with self.pair("--bind", address) as (server, nginx):
            with nginx.connect() as wire:
                self.assertEqual(wire.deliver(make_message()), 1)
            with socket.socket() as probe:
                self.assertNotEqual(probe.connect_ex(("127.0.0.1", server.smtp_port)), 0)

    def test_closed_api(self):
        """nginx may ask /auth even where it is not among those who may read mail."""
        with self.pair("--api_remote_address=192.0.2.0/24") as (server, nginx):
            with nginx.connect() as wire:
                self.assertEqual(wire.deliver(make_message()), 1)
            self.assertEqual(server.request("/count")[0], 403)

    def test_nginx_takes_every_variant(self):
        for arguments in (["--bind=::1"], ["--bind=0.0.0.0"], ["--bind=::"],
                          ["--server_addr", "192.0.2.1", "[2001:db8::1]:26", "127.0.0.1:27"],
                          ["--hostname=mx-1.example.com", "--max_size=1G"],
                          ["--server_host", "b\u00fccher.example", "[192.0.2.1]"]):
            for more in ([], ["--ssl_cert=a b.pem", "--ssl_key=$a.key"]):
                with self.subTest(arguments + more):
                    status, config, err = self.call_main("--generate_nginx_config", *arguments,
                                                         *more)
                    self.assertEqual((status, err), (0, ""))
                    nginx = Nginx(config)
                    self.addCleanup(nginx.__exit__)
                    nginx.check()

    def test_several_servers_and_names(self):
        """/auth names one of --server_addr, always an IP address; nginx reaches it."""
        number = free_port()
        with self.pair(f"--server_addr=localhost:{number}", f"--smtp_port={number}",
                       "--bind=127.0.0.1") as (server, nginx):
            with nginx.connect() as wire:
                self.assertEqual(wire.deliver(make_message()), 1)
            _, headers, _ = server.request("/auth", headers={"Auth-SMTP-To": "<b@example.com>"})
            self.assertTrue(ipaddress.ip_address(headers["Auth-Server"]).is_loopback)
            self.assertEqual(headers["Auth-Port"], str(number))


class NginxStreamTest(NginxCase):
    """Passthrough: pegmail has the certificate, a PROXY header names the client."""

    def setUp(self):
        super().setUp()
        make_certificate(self.folder, "a")
        self.cert = read_certificate(self.path("a.pem"))
        self.options = ("--ssl_cert=a.pem", "--ssl_key=a.key", "--server_host=example.com")

    def test_mail_through_nginx(self):
        with self.pair(*self.options) as (server, nginx):
            for source, message in (("127.0.0.5", ODD), ("127.0.0.6", LARGE)):
                with nginx.connect(source) as wire:
                    self.assertEqual(wire.greeting, "220 mx.example.com ESMTP pegmail")
                    wire.ask("EHLO client.example")
                    self.assertEqual(wire.ask("MAIL FROM:<a@example.com>")[:9], "530 5.7.0")
                    self.assertRegex(wire.ask("XCLIENT ADDR=192.0.2.99"), "^550 5\\.7\\.0 ")
                    self.assertEqual(start_tls(wire), self.cert)     # end to end
                    self.assertRegex(wire.ask("XCLIENT ADDR=192.0.2.99"), "^550 5\\.7\\.0 ")
                    self.assertNotIn("XCLIENT", wire.ask("EHLO client.example"))
                    ident = wire.deliver(message)
                    cipher, _, bits = wire.socket.cipher()
                    version = wire.socket.version()
                    wire.ask("EHLO client.example")
                    wire.ask("MAIL FROM:<a@example.com>")
                    self.assertEqual(wire.ask("RCPT TO:<b@example.org>"),
                                     "550 5.7.1 Mail for this domain is not taken here")
                trace, stored = read_stored(server, ident)
                self.assertEqual(stored, message)
                self.assertIn(f"from client.example ([{source}])\r\n", trace)
                self.assertIn(f"with ESMTPS ({version} cipher {cipher} bits {bits})", trace)


# -- Sub-commands: outbox and sendmail --

class OutboxCommandTest(ForwardCase, FolderCase):
    """pegmail.py outbox, beside a running server and without one."""

    def command(self, *words, status=0, **options):
        """Run it; return the lines it prints as lists, or what it says is wrong."""
        found, out, err = self.run_pegmail("outbox", *words, **options)
        self.assertEqual(found, status, out + err)
        return [line.split("\t") for line in out.splitlines()] if not status else err

    def test_beside_a_running_server(self):
        """Retrying does not wait for the end of a long pause."""
        target = self.target((503, {"Retry-After": "3600"}), 200)
        server = self.run_server("--url", target.url, "--forward_parallel", "1",
                                 folder=self.folder)
        server.send(make_message("a"))
        until(lambda: self.entries(server)[0]["attempts"], "an attempt")
        server.send(make_message("b"))
        rows = self.command("list")
        self.assertEqual([row[:3] + row[4:] for row in rows], [
            ["1", "waiting", "1", "1", "arrival", "url", "the target answered 503"],
            ["2", "waiting", "0", "2", "arrival", "url", "-"]])
        self.assertRegex(rows[0][3], r"^20\d\d-.*Z$")
        self.assertEqual(self.command("list", "--state", "failed"), [])
        self.assertEqual(len(self.command("list", "--target", "url")), 2)
        self.assertEqual(self.command("drop", "2"), [])
        self.assertIn("no delivery 2", self.command("drop", "2", status=1))
        self.assertEqual(self.command("retry", "1"), [])
        self.wait_for_state(server, "delivered")
        self.assertEqual([post.json["subject"] for post in target.posts], ["a", "a"])

    def test_without_a_server(self):
        for words, status in ((["list"], 1), (["retry"], 2), (["shuffle"], 2), ([], 2),
                              (["drop", "x"], 2), (["list", "--state", "lost"], 2)):
            with self.subTest(words):
                if words == ["retry"]:
                    Running(folder=self.folder).__enter__().__exit__()
                self.assertEqual(self.call_main("outbox", *words)[0], status)
        target = self.target(400)
        server = self.run_server("--url", target.url, folder=self.folder)
        server.send()
        self.wait_for_state(server, "failed")
        server.stop()
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, compiled() + "/pegmail.pyc", "outbox", "list"],
                              cwd=self.folder, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        place = {"PEGMAIL_DB_PATH": self.path("mail.db")}
        self.assertEqual(self.command("list", environ=place, cwd="/")[0][1], "failed")
        self.command("retry", "1", "--db_path", self.path("mail.db"), cwd="/")
        target.answers = [200]
        server = self.run_server("--url", target.url, folder=self.folder)
        self.wait_for_state(server, "delivered")


class SendmailTest(ForwardCase, FolderCase):
    """A drop-in for cron and scripts."""

    def mail(self, text, *words, status=0, name="", **environ):
        """Run sendmail in the folder; return what it says."""
        clean = {key: value for key, value in os.environ.items() if key[:8] != "PEGMAIL_"}
        program = [name] if name else [compiled() + "/pegmail.pyc", "sendmail"]
        done = subprocess.run(
            [sys.executable, *program, *words], input=text.encode(), cwd=self.folder,
            timeout=DEADLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**clean, "PEGMAIL_HOSTNAME": "box.example", **{
                "PEGMAIL_" + key.upper(): str(value) for key, value in environ.items()}})
        self.assertEqual(done.returncode, status, done.stdout)
        return done.stdout.decode()

    def latest(self, server):
        """Return the newest message: JSON, and as it was sent."""
        item = server.get("/latest")
        return item, read_stored(server, item["mail_id"])[1].decode()

    def test_to_a_server(self):
        server = self.run_server(folder=self.folder)
        place = {"smtp_port": server.smtp_port}
        self.assertEqual(self.mail(
            "To: Ann <ann@a.example>, bob@b.example\nCc: carl@c.example\n"
            "Bcc: dora@d.example,\n eve@e.example\nSubject: report\nMessage-ID: <1@x>\n\nhi\n",
            "-t", "-oi", "-f", "me@here.example", "-F", "Cron D\u00e4mon", **place), "")
        item, text = self.latest(server)
        self.assertEqual((item["mail_from"], item["mail_to"]), ("me@here.example", [
            "ann@a.example", "bob@b.example", "carl@c.example", "dora@d.example",
            "eve@e.example"]))
        self.assertRegex(text, r"^(?s:.*)From: =\?utf-8\?.*\?= <me@here.example>\r\n")
        self.assertRegex(text, r"(?m)^Date: \w{3}, .* [+-]\d{4}\r$")
        self.assertEqual(text.count("Message-ID: "), 1)
        self.assertNotIn("example,\r\n eve", text)
        self.assertNotIn("Bcc", text)
        self.assertTrue(text.endswith("Subject: report\r\nMessage-ID: <1@x>\r\n\r\nhi\r\n"), text)
        for words, sent, kept in (
                (["-i"], "a\n.\nb\n..\n", "a\r\n.\r\nb\r\n..\r\n"), ([], "a\n.\nb\n", "a\r\n"),
                ([], ".\nb\n", ""), (["-oi"], "no end", "no end\r\n"),
                (["-i"], "a\r\n\r\nb\n", "a\r\n\r\nb\r\n")):
            with self.subTest(words, sent=sent):
                self.mail("Subject: x\n\n" + sent, *words, "bob@b.example", **place)
                self.assertEqual(self.latest(server)[1].partition("\r\n\r\n")[2], kept)
        self.mail("no header here\nnor here\n", "root", "ann@a.example,bob@b.example", "-bm",
                  "-odi", "-oem", "-B8BITMIME", "-v", **place)
        item, text = self.latest(server)
        self.assertEqual(item["mail_to"], ["root@box.example", "ann@a.example", "bob@b.example"])
        self.assertEqual(item["mail_from"], pegmail.local_user() + "@box.example")
        self.assertTrue(text.endswith("\r\n\r\nno header here\r\nnor here\r\n"), text)
        self.mail("Subject: x\n\n\n", "-f", "<>", "--", "bob@b.example", **place)
        self.assertEqual(self.latest(server)[0]["mail_from"], "")

    def test_as_a_symlink_without_a_server(self):
        """It is kept and goes on once the server runs."""
        target = self.target()
        os.symlink(compiled() + "/pegmail.pyc", self.path("sendmail"))
        place = {"smtp_port": free_port(), "url": target.url}
        self.mail("Subject: spooled\n\nhi\n", "-f", "me@x.example", "bob@b.example",
                  name=self.path("sendmail"), **place)
        server = self.run_server("--url", target.url, folder=self.folder)
        item = server.get("/latest")
        self.assertEqual((item["mail_subject"], item["mail_from"], item["mail_to"]),
                         ("spooled", "me@x.example", ["bob@b.example"]))
        self.assertEqual(self.wait_for_posts(target)[0].json["subject"], "spooled")
        os.symlink(compiled() + "/pegmail.pyc", self.path("newaliases"))
        os.symlink(compiled() + "/pegmail.pyc", self.path("mailq"))
        self.assertEqual(self.mail("", name=self.path("newaliases")), "")
        self.assertIn("\turl\t", self.mail("", name=self.path("mailq")))

    def test_statuses(self):
        """Those of sysexits.h."""
        text, bob, port = "Subject: x\n\nhi\n", "bob@b.example", free_port()
        for words, status, word, environ in (
                ([], 64, "no recipients", {}), (["-t"], 64, "no recipients", {}),
                (["-Z", bob], 64, "-z", {}), ([bob], 65, "larger", {"max_size": 8}),
                ([bob], 78, "max_size", {"max_size": "x"}),
                ([bob], 69, "not taken here", {"server_host": "here.example"})):
            with self.subTest(words, environ=environ):
                said = self.mail(text, *words, status=status, smtp_port=port, **environ)
                self.assertIn(word, said.lower())
        server = self.run_server("--server_host", "here.example", folder=self.folder)
        place = {"smtp_port": server.smtp_port}
        self.assertIn("550", self.mail(text, bob, status=69, **place))
        self.mail(text, bob, "ann@here.example", status=69, **place)
        self.assertEqual(server.get("/latest")["mail_to"], ["ann@here.example"])
        self.assertIn("no server listens", self.mail(text, bob, status=75, smtp_port=port))
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as busy:
            thread = threading.Thread(target=lambda: busy.accept()[0].close())
            thread.start()
            self.mail(text, bob, status=75, smtp_port=busy.getsockname()[1])
            thread.join()


# -- The shape of the repository --

BANNER = re.compile(r"(?m)^# =+\n# (\d+\. [A-Z][^\n]*)\n(?:#[^\n]*\n)*?# =+$")
# What may not be named on a floor (STYLE: "never contains").
NEVER = {
    "Text": {"open", "os", "socket", "ssl", "sqlite3", "selectors", "threading", "time", "secrets"},
    "Mail": {"open", "os", "socket", "ssl", "sqlite3", "selectors", "threading"},
    "Store": {"socket", "ssl", "selectors", "http"},
    "Reactor": {"sqlite3", "email", "http"},
    "Sessions": {"socket", "sqlite3", "selectors", "time", "os", "open"},
    "Delivery": {"sqlite3", "selectors"},
    "HTTP": {"socket", "sqlite3", "selectors"},
}


def read_source(path):
    """Return a source file's text."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def floor_finder(source):
    """Return a function that names the floor on which a line stands, "" above the first."""
    floors = [(source.count("\n", 0, match.start()),
               re.match(r"\d+\. ([\w ]+)", match.group(1)).group(1))
              for match in BANNER.finditer(source)]
    return lambda line: ([""] + [name for begin, name in floors if begin < line])[-1]


def names_used_too_early(source):
    """Yield (function, name) where a floor uses what a later floor defines."""
    lines = [source.count("\n", 0, match.start()) + 1 for match in BANNER.finditer(source)]

    def floor(line):
        return sum(number <= line for number in lines)
    home = {}
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for name in [getattr(node, "name", None)] + [getattr(x, "id", None) for x in targets]:
            home.setdefault(name, floor(node.lineno))
    pending = symtable.symtable(source, "pegmail.py", "exec").get_children()
    while pending:
        table = pending.pop()
        pending.extend(table.get_children())
        for symbol in table.get_symbols():
            if symbol.is_global() and home.get(symbol.get_name(), 0) > floor(table.get_lineno()):
                yield table.get_name(), symbol.get_name()


class ShapeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.source = read_source(PROGRAM)
        cls.tests = read_source(TESTS)
        cls.tree = ast.parse(cls.source, feature_version=(3, 9))

    def test_banners_are_the_map(self):
        banners = BANNER.findall(self.source)
        self.assertGreaterEqual(len(banners), 9)
        self.assertEqual([int(text.partition(".")[0]) for text in banners],
                         list(range(1, len(banners) + 1)))
        self.assertEqual(re.findall(r"(?m)^\d+\. .*$", pegmail.__doc__), banners)
        self.assertEqual(re.findall(r"(?m)^# \d+\. .*$", self.source),
                         ["# " + text for text in banners])

    def test_banners_of_the_tests(self):
        self.assertEqual(BANNER.findall(self.tests), BANNER.findall(self.source))

    def test_no_floor_looks_up(self):
        self.assertEqual(sorted(set(names_used_too_early(self.source))), [])
        upside_down = ("# ====\n# 1. Low\n# ====\ndef low():\n    return high()\n"
                       "# ====\n# 2. High\n# ====\ndef high():\n    pass\n")
        self.assertEqual(list(names_used_too_early(upside_down)), [("low", "high")])

    def test_what_floors_never_contain(self):
        floor_of = floor_finder(self.source)
        watched = set().union(*NEVER.values())
        parameters = {id(name) for node in ast.walk(self.tree)      # a function's own names
                      if isinstance(node, (ast.FunctionDef, ast.Lambda))
                      for name in ast.walk(node) if isinstance(name, ast.Name)
                      and name.id in {arg.arg for arg in node.args.args} & watched}
        found = [(floor_of(node.lineno), node.id, node.lineno)
                 for node in ast.walk(self.tree) if isinstance(node, ast.Name)
                 and node.id in watched and id(node) not in parameters]
        self.assertEqual([place for place in found if place[1] in NEVER.get(place[0], ())], [])
        self.assertGreater(len(found), 20)

    def test_sql_stays_in_the_store(self):
        sql = re.compile(r"\b(?:SELECT .* FROM|INSERT INTO|UPDATE \w+ SET|DELETE FROM|PRAGMA|"
                         r"CREATE (?:TABLE|INDEX))\b", re.S)
        floor_of = floor_finder(self.source)
        floors = {floor_of(node.lineno) for node in ast.walk(self.tree)
                  if isinstance(node, ast.Constant) and isinstance(node.value, str)
                  and sql.search(node.value)}
        self.assertEqual(floors, {"Store"})

    def test_functions_fit_on_a_screen(self):
        lengths = {}
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths[node.name, node.lineno] = node.end_lineno - node.lineno + 1
        self.assertEqual({place: length for place, length in lengths.items() if length > 60}, {})
        self.assertLessEqual(statistics.median(lengths.values()), 8)
        short = sum(length <= 25 for length in lengths.values())
        self.assertGreaterEqual(short / len(lengths), 0.9)

    def test_standard_library_only(self):
        if not hasattr(sys, "stdlib_module_names"):
            self.skipTest("Python before 3.10 does not list its modules")
        for source in (self.source, self.tests):
            modules = set()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    modules.add((node.module or "").partition(".")[0])
            self.assertEqual(modules - sys.stdlib_module_names - {"pegmail"}, set())

    def test_import_starts_nothing(self):
        """No thread, socket, file, signal handler or word printed."""
        script = ("import sys, threading, signal\n"
                  "seen = []\n"
                  "def hook(event, args):\n"
                  "    if event.startswith(('socket.', 'sqlite3.', 'subprocess.', 'os.mkdir',\n"
                  "                         '_thread.start')) or (\n"
                  "            event == 'open' and args[1] not in (None, 'r', 'rb')):\n"
                  "        seen.append((event, args))\n"
                  "sys.addaudithook(hook)\n"
                  "import pegmail\n"
                  "assert seen == [], seen\n"
                  "assert threading.active_count() == 1\n"
                  "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n")
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-B", "-W", "error", "-c", script], cwd=folder,
                env={**os.environ, "PYTHONPATH": HERE}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE)
            self.assertEqual((done.returncode, done.stdout.decode()), (0, ""))
            self.assertEqual(os.listdir(folder), [])

    def test_readme_option_table(self):
        match = re.search(r"<!-- options -->\n(.*)\n<!-- /options -->", read_source(README), re.S)
        self.assertIsNotNone(match, "README.md has no option table between its marks")
        self.assertEqual(match.group(1).strip(), pegmail.option_table())

    def test_option_table(self):
        rows = pegmail.option_table().split("\n")
        names = [*SAMPLES, "check", "generate_nginx_config", "generate_systemd_unit"]
        for name in names:
            with self.subTest(name):
                self.assertEqual(len([row for row in rows if row.startswith(f"| `--{name}` |")]), 1)
        self.assertEqual({row.count("|") for row in rows}, {4})
        self.assertIn("| `--smtp_port` | `1025` | Port for incoming mail; 0 takes a free one. |",
                      rows)

    def test_everything_is_named_in_a_test(self):
        """Each command, route and option; an option as it stands on the command line."""
        names = {verb: rf"\b{verb}\b" for verb in pegmail.SMTP_COMMANDS}
        names.update({path: rf"[\"']{re.escape(path)}(?!\w)" for _, path in pegmail.ROUTES})
        names.update({"--" + option.name: rf"--{option.name}\b" for option in pegmail.OPTIONS})
        names.update({"--" + name: rf"--{name}\b" for name, _ in pegmail.ACTIONS})
        missing = [name for name, pattern in names.items() if not re.search(pattern, self.tests)]
        self.assertEqual(missing, [])


# =====================================================================================
# The benchmark: python3 test_pegmail.py bench [NAME ...]
#
# Each function under @measures is one measurement; it yields the rows of a Markdown table. What
# loads the server, and what it is compared with, runs in processes of its own. A figure is the
# median of rounds that alternate between pegmail and the other.
# =====================================================================================

MANY, FEW = 1000000, 10000      # messages of the two stores that are asked
RARE = "quokka"                 # a word in the subjects of ten messages, however many there are
KB, MB = 1 << 10, 1 << 20


class Row(collections.namedtuple("Row", "what pegmail beside ratio target")):
    """A row of the table; `beside` and `ratio` may be missing."""

    def __str__(self):
        return "| " + " | ".join(self) + " |"


HEAD = Row("what", "pegmail", "beside it", "ratio", "target")
MEASUREMENTS = {}


def measures(func):
    """Enter a function into MEASUREMENTS under the rest of its name."""
    MEASUREMENTS[func.__name__.partition("_")[2]] = func
    return func


def say(text):
    """Tell the progress."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def compare(what, ours, theirs, name, target, unit="/s"):
    """Return a row of two rates; `theirs` may be None."""
    if theirs is None:
        return Row(what, shown_rate(ours) + unit, "-", "-", target)
    return Row(what, shown_rate(ours) + unit, f"{name} {shown_rate(theirs)}{unit}",
               f"{ours / theirs:.1f}", target)


def shown_rate(rate):
    """Return a rate with as many digits as it deserves."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def shown_times(seconds):
    """Return the median and the worst of some times in milliseconds."""
    return f"{1000 * statistics.median(seconds):.1f} / {1000 * max(seconds):.1f} ms"


def percentiles(seconds):
    """Return median, 99th percentile and worst of some times in milliseconds."""
    ranked = sorted(seconds)
    return " / ".join(f"{1000 * ranked[min(len(ranked) - 1, len(ranked) * part // 100)]:.1f}"
                      for part in (50, 99, 100)) + " ms"


def wait_for(question, seconds, what):
    """Ask now and then until the answer is true."""
    end = time.monotonic() + seconds
    while not question():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not happen within {seconds} s")
        time.sleep(0.1)


# -- Processes beside --

class Child:
    """A Python process that runs a function of this file, or a source text."""

    def __init__(self, source, *arguments, python=sys.executable):
        if callable(source):
            module = os.path.splitext(os.path.basename(__file__))[0]
            source = f"import {module} as m; m.{source.__name__}(*map(eval, m.sys.argv[1:]))"
        paths = [os.path.dirname(os.path.abspath(__file__)), HERE]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen([python, "-c", source, *map(repr, arguments)],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        env=environ)

    def line(self):
        """Return the next line that it prints."""
        text = self.process.stdout.readline().decode().strip()
        if not text:
            raise AssertionError(f"a process beside ended early, status {self.process.wait()}")
        return text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


SINK = """
import asyncio
from aiosmtpd.handlers import Sink
from aiosmtpd.smtp import SMTP

async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(Sink(), hostname="localhost", data_size_limit=1 << 26, loop=loop),
        "127.0.0.1", 0, backlog=2000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def find_aiosmtpd(choice, folder):
    """Return a Python that has aiosmtpd, made in a folder if need be; None without one."""
    if choice == "no":
        return None
    for python in [choice] if choice else [sys.executable, os.path.join(folder, "bin", "python")]:
        if os.path.exists(python) and subprocess.run(
                [python, "-c", "import aiosmtpd"], stderr=subprocess.DEVNULL).returncode == 0:
            return python
    say("installing aiosmtpd to compare with (--aiosmtpd no does without)")
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "-q", "aiosmtpd"], check=True,
                       stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"nothing to compare with: {error}")
        return None
    return python


# -- Loads, in processes of their own --

class Sender:
    """One connection of the generator: sends what its steps yield, each after a reply."""

    def __init__(self, port, selector, steps):
        self.selector, self.steps = selector, steps
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.unsent = collections.deque()
        self.reply = b""
        selector.register(self.socket, selectors.EVENT_READ, self.ready)

    def ready(self, events):
        """Read a reply, or send what is left; return whether the conversation goes on."""
        if events & selectors.EVENT_READ:
            self.reply += self.socket.recv(4096)
            last = self.reply[self.reply.rfind(b"\n", 0, -1) + 1:]
            if self.reply and (not last.endswith(b"\n") or last[3:4] == b"-"):
                return True
            if self.reply[:1] not in (b"2", b"3"):
                sys.exit(f"the server says {self.reply!r}")
            self.reply = b""
            self.unsent.extend(map(memoryview, next(self.steps, ())))
            if not self.unsent:
                self.selector.unregister(self.socket)
                self.socket.close()
                return False
        self.send()
        return True

    def send(self):
        """Send as much as the socket takes."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                sent = self.socket.send(self.unsent[0][:MB])
                self.unsent[0] = self.unsent[0][sent:]
                if not self.unsent[0]:
                    self.unsent.popleft()
        wanted = selectors.EVENT_WRITE if self.unsent else selectors.EVENT_READ
        if self.selector.get_key(self.socket).events != wanted:
            self.selector.modify(self.socket, wanted, self.ready)


def conversation(text, numbers):
    """Yield what a client sends, in pieces: one message for each number, none pipelined."""
    yield [b"EHLO generator.example\r\n"]
    for number in numbers:
        yield [b"MAIL FROM:<sender@generator.example>\r\n"]
        yield [b"RCPT TO:<recipient@example.com>\r\n"]
        yield [b"DATA\r\n"]
        yield [b"From: sender@generator.example\r\nTo: recipient@example.com\r\n"
               b"Subject: message %d\r\n\r\n" % number, text, b"\r\n.\r\n"]
    yield [b"QUIT\r\n"]


def generate(port, sessions, length, messages):
    """Send messages over connections kept open; print the seconds it took."""
    line = b"x" * 78 + b"\r\n"
    text = (line * (length // 80 + 1))[:max(1, length - 100)].rstrip()
    numbers = iter(range(messages))
    selector = selectors.DefaultSelector()
    begun = time.perf_counter()
    for _ in range(sessions):
        Sender(port, selector, conversation(text, numbers))
    while sessions:
        for key, events in selector.select():
            sessions -= not key.data(events)
    print(time.perf_counter() - begun, flush=True)


def open_idle(port, count):
    """Return connections that have said EHLO, from addresses of their own for each hundred."""
    idle = []
    for number in range(count):
        connection = socket.socket()
        connection.bind((f"127.0.{number // 100 // 250}.{number // 100 % 250 + 2}", 0))
        connection.connect(("127.0.0.1", port))
        connection.recv(1000)
        connection.send(b"EHLO idle.example\r\n")
        idle.append(connection)
    for connection in idle:
        connection.recv(1000)
    return idle


def hold_idle(port, count):
    """Hold idle connections until this process is killed."""
    raise_limit()
    idle = open_idle(port, count)
    print("ready", flush=True)
    threading.Event().wait(3600)
    print(len(idle))


def trickle(port, count):
    """Hold connections that send a byte a second each, until this process is killed."""
    raise_limit()
    slow = open_idle(port, count)
    print("ready", flush=True)
    for number in itertools.count():
        with contextlib.suppress(OSError):
            slow[number % count].send(b"N" if number < count else b" ")
        time.sleep(1 / count)


def raise_limit():
    """Ask for as many descriptors as the system allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class ListHandler(http.server.BaseHTTPRequestHandler):
    """A list of 50 messages from SQLite by http.server, with nothing else to it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    local = threading.local()

    def do_GET(self):
        """Answer with the list, whatever is asked for."""
        if not hasattr(self.local, "db"):
            self.local.db = sqlite3.connect(f"file:{self.server.path}?mode=ro", uri=True)
        rows = self.local.db.execute("SELECT id, received, sender, recipients, subject, is_read "
                                     "FROM message ORDER BY id DESC LIMIT 50").fetchall()
        names = "mail_id", "timestamp", "mail_from", "mail_to", "mail_subject", "is_read"
        body = json.dumps({"items": [dict(zip(names, row)) for row in rows]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Log nothing."""


def serve_list(path):
    """Serve ListHandler; print the port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ListHandler)
    server.path = path
    print(server.server_port, flush=True)
    server.serve_forever()


def swallow_posts():
    """Answer every POST with 200 over connections that stay open; print the port."""
    def serve(sock):
        data = b""
        while True:
            head, end, rest = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            if end and len(rest) >= int(length.group(1)):
                data = rest[int(length.group(1)):]
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                continue
            more = sock.recv(1 << 16)
            if not more:
                return
            data += more
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


# -- What is measured with --

class Bench:
    """The choices of the command line, and what more than one measurement needs."""

    def __init__(self, options, folder):
        self.options = options
        self.folder = folder
        self.rounds, self.seconds = options.rounds, options.seconds
        self.smtp_source = None if options.generator == "own" else shutil.which(
            "smtp-source", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        if options.generator == "smtp-source" and not self.smtp_source:
            raise SystemExit("bench: smtp-source is not installed (it comes with Postfix)")

    @functools.cached_property
    def aiosmtpd(self):
        """A Python that has aiosmtpd, or None."""
        return find_aiosmtpd(self.options.aiosmtpd, os.path.join(self.folder, "aiosmtpd"))

    def sink(self):
        """Return aiosmtpd's sink as a process."""
        return Child(SINK, python=self.aiosmtpd)

    def send(self, port, sessions, length, messages, own=False):
        """Send messages of a length over some connections at once; return messages a second."""
        if self.smtp_source and not own:
            begun = time.perf_counter()
            subprocess.run([self.smtp_source, "-d", "-s", str(sessions), "-l", str(length), "-m",
                            str(messages), f"127.0.0.1:{port}"], check=True)
            return messages / (time.perf_counter() - begun)
        with Child(generate, port, sessions, length, messages) as child:
            return messages / float(child.line())

    def steady_rate(self, port, sessions, length):
        """Send for some seconds after a short start; return messages a second."""
        messages = 2 * sessions
        rate = self.send(port, sessions, length, messages)
        while messages / rate < self.seconds / 4:
            messages = round(min(10 * messages, rate * self.seconds / 3))
            rate = self.send(port, sessions, length, messages)
        return self.send(port, sessions, length, max(sessions, round(rate * self.seconds)))

    def rate_of_pegmail(self, sessions, length):
        """Return the rate of a fresh server; what it has left to digest ends with it."""
        with Running() as server:
            return self.steady_rate(server.smtp_port, sessions, length)

    def rate_of_sink(self, sessions, length):
        """Return the rate of aiosmtpd's sink, None if there is none."""
        if self.aiosmtpd is None:
            return None
        with self.sink() as sink:
            return self.steady_rate(int(sink.line()), sessions, length)

    def alternate(self, first, second):
        """Return the medians of two functions, called in turn for some rounds."""
        pairs = [(first(), second()) for _ in range(self.rounds)]
        return [None if None in column else statistics.median(column) for column in zip(*pairs)]

    @contextlib.contextmanager
    def running_store(self, count):
        """Run a server over a store of that many messages, made once."""
        folder = os.path.join(self.folder, f"store-{pegmail.SCHEMA}-{count}")
        if not os.path.exists(os.path.join(folder, "ready")):
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder)
            say(f"building a store of {count} messages")
            begun = time.monotonic()
            build_store(folder, count)
            with open(os.path.join(folder, "ready"), "w") as file:
                file.write(f"{time.monotonic() - begun:.0f} seconds\n")
            say(f"built in {time.monotonic() - begun:.0f} s")
        with Running(folder=folder) as server:
            yield server


class Asker:
    """A lean HTTP client on one connection: sends ready-made requests, reads by Content-Length."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def ask(self, request):
        """Send a request; return the answer's body, which has to come with 200."""
        self.socket.sendall(request)
        data = self.socket.recv(1 << 18)
        while b"\r\n\r\n" not in data:
            data += self.more()
        end = data.index(b"\r\n\r\n") + 4
        place = data.index(b"Content-Length: ") + 16
        length = int(data[place:data.index(b"\r", place)])
        while len(data) < end + length:
            data += self.more()
        if data[9:12] != b"200":
            raise AssertionError(f"{request!r}: {data!r}")
        return data[end:]

    def more(self):
        """Return more bytes of an answer."""
        data = self.socket.recv(1 << 18)
        if not data:
            raise AssertionError("the server closed the connection")
        return data

    def rate(self, requests, seconds):
        """Ask these requests in turn for some seconds; return how many a second."""
        turn = itertools.cycle(requests)
        for _ in range(20):
            self.ask(next(turn))
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            self.ask(next(turn))
            count += 1
        return count / (time.perf_counter() - begun)

    def time(self, request):
        """Return the seconds until the answer is there."""
        begun = time.perf_counter()
        self.ask(request)
        return time.perf_counter() - begun


def get(path, **params):
    """Return a request as bytes."""
    query = "?" + urllib.parse.urlencode(params) if params else ""
    return f"GET {path}{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def wait_for_digest(server, seconds=300):
    """Wait until all that has come is digested and indexed."""
    def is_done():
        text = server.request("/metrics")[2].decode()
        return not sum(map(float, re.findall(r"(?m)^pegmail_\w+_lag (\S+)", text)))
    wait_for(is_done, seconds, "the digest")


# -- A large store, fast --

FIRST = "anna bert carla dimitri elena frank greta hannes ines jakob karin lars mira nils".split()
LAST = "adler brandt conti dvorak eriksen ferrari gomez hoffmann ivanova jensen kovacs".split()
DOMAINS = [f"{name}.example{end}" for name in ("mail", "shop", "bank", "news", "work", "club")
           for end in ("", ".com", ".net", ".org")]
COMMON = ["invoice", "report", "your", "order", "weekly", "meeting", "notes", "update", "reminder",
          "confirm", "account", "password", "newsletter", "delivery", "ticket", "payment"]
SYLLABLES = "ba ce di fo gu ha ki lo mu ne pa ri so tu ve wa xi yo zu".split()


class Faker:
    """Makes messages that look like mail: few senders write much, few words come often."""

    def __init__(self, count):
        self.random = random.Random(42)
        self.rare = max(1, count // 10)
        pick = self.random.choice
        self.words = COMMON + ["".join(pick(SYLLABLES) for _ in range(pick((2, 3, 3, 4))))
                               for _ in range(5000)]
        self.people = [f"{pick(FIRST)}.{pick(LAST)}{number}@{pick(DOMAINS)}"
                       for number in range(20000)]
        self.texts = [" ".join(self.often(self.words) for _ in range(20)) + "\r\n"
                      for _ in range(1000)]

    def often(self, things):
        """Return one of some things, the first ones more often."""
        return things[int(len(things) * self.random.random() ** 3)]

    def message(self, ident):
        """Return (sender, recipients, subject, fields, text) of a message."""
        sender = self.often(self.people)
        recipients = [self.often(self.people) for _ in range((1, 1, 1, 2, 3)[ident % 5])]
        words = [self.often(self.words) for _ in range(5)] + [str(ident)]
        subject = " ".join(words if ident % self.rare else words + [RARE])
        fields = [("From", sender), ("To", ", ".join(recipients)), ("Subject", subject),
                  ("Message-ID", f"<{ident}@mail.example>"), ("MIME-Version", "1.0"),
                  ("Date", "Sat, 21 Nov 2026 05:00:00 +0000"),
                  ("Content-Type", "text/plain; charset=utf-8")]
        return sender, recipients, subject, fields, self.texts[ident % len(self.texts)]


def build_store(folder, count):
    """Fill a store with digested messages by its own writer; a server then makes the index."""
    store = pegmail.Store(os.path.join(folder, "mail.db"), os.path.join(folder, "media"))
    faker = Faker(count)
    begun = int(time.time() * 1000) - 30000 * count
    try:
        for first in range(1, count + 1, 20000):
            last = min(first + 19999, count)
            store.change(functools.partial(add_rows, faker, begun, first, last))
            say(f"  {last} messages")
    finally:
        store.close()
    with Running(folder=folder) as server:
        wait_for_digest(server, 900)


def add_rows(faker, begun, first, last, db):
    """Add digested messages first to last; a job of the store's writer."""
    messages, contents, digests = [], [], []
    for ident in range(first, last + 1):
        sender, recipients, subject, fields, text = faker.message(ident)
        raw = "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n" + text
        trace = f"Received: from client.example by mx.example.com id {ident}\r\n"
        received = begun + 30000 * ident
        messages.append((ident, received, sender, "\n".join(recipients), subject,
                         int(ident % 5 > 0), len(raw) + len(trace)))
        contents.append((ident, "192.0.2.7", trace.encode(), raw.encode()))
        top = [("Received", trace[10:-2])]
        body = {"type": "text", "mime": "text/plain", "text": text, "size": len(text)}
        digests.append((ident, pegmail.json_text(top + fields), pegmail.json_text(body)))
    db.executemany("INSERT INTO message (id, received, sender, recipients, subject, is_read, size, "
                   "digested) VALUES (?,?,?,?,?,?,?,1)", messages)
    db.executemany("INSERT INTO content (id, peer, trace, raw) VALUES (?,?,?,?)", contents)
    db.executemany("INSERT INTO digest (id, fields, body, error) VALUES (?,?,?,'')", digests)
    db.execute("INSERT OR REPLACE INTO meta VALUES ('digested', ?)", (last,))


# -- The measurements --

SMTP_CASES = (      # connections, bytes, how it is called, the target
    (10, KB, "1 KB, 10 connections", "2x, aim 3x"),
    (50, KB, "1 KB, 50 connections", "2x, aim 3x"),
    (10, 100 * KB, "100 KB, 10 connections", "2x, aim 3x"),
    (10, 5 * MB, "5 MB, 10 connections", "4x, aim 6x"))


@measures
def measure_smtp(bench):
    """Intake over connections kept open, each message durable, beside a sink that keeps none."""
    for sessions, length, name, target in SMTP_CASES:
        ours, theirs = bench.alternate(functools.partial(bench.rate_of_pegmail, sessions, length),
                                       functools.partial(bench.rate_of_sink, sessions, length))
        yield compare(f"SMTP {name}", ours, theirs, "aiosmtpd sink", target)


API_CASES = (       # how it is called, its requests in a store of so many messages, the target
    ("/list_short?count=50&reverse=1",
     lambda count: [get("/list_short", count=50, reverse=1)], "2,000/s"),
    ("/mail?mail_id=",
     lambda count: [get("/mail", mail_id=random.randint(1, count)) for _ in range(1000)],
     "2,500/s"),
    ("/filter_list_short, rare subject word",
     lambda count: [get("/filter_list_short", filter_mail_subject=RARE, reverse=1)], "1,000/s"))


@measures
def measure_api(bench):
    """Requests a second over one connection kept alive, beside http.server alone."""
    for count in (FEW, MANY):
        with bench.running_store(count) as server, Child(
                serve_list, os.path.join(server.folder, "mail.db")) as bare:
            with Asker(server.api_port) as ours, Asker(int(bare.line())) as theirs:
                for name, requests, target in API_CASES:
                    row = compare(f"API {name}, {count:,} messages", *bench.alternate(
                        functools.partial(ours.rate, requests(count), bench.seconds / 2),
                        functools.partial(theirs.rate, [get("/")], bench.seconds / 2)),
                        "http.server's list of 50", target)
                    yield row


def latency_cases(faker):
    """Yield (what, requests that are all different) for a store of MANY messages."""
    pick = faker.random.randint
    few = dict(count=50)
    yield "/count", [get("/count")]
    yield "/list_short, newest 50", [get("/list_short", count=50, reverse=1)]
    yield "/list_short, after=", [get("/list_short", after=pick(1, MANY), **few)
                                  for _ in range(20)]
    people = [faker.people[pick(5000, 19999)] for _ in range(40)]
    words = {"filter_mail_subject": ([RARE] + [str(pick(MANY // 2, MANY)) for _ in range(19)],
                                     COMMON + ["ing", "ice", "ate"]),
             "filter_mail_from": (people[:20], FIRST + ["exa", "com", "mail"]),
             "filter_mail_to": (people[20:], LAST + ["org", "ann", "bank"])}
    for param, (rare, common) in words.items():
        for kind, texts in ("rare", rare), ("common", common):
            yield f"/filter_list_short, {kind} {param}", [
                get("/filter_list_short", reverse=1, **few, **{param: text}) for text in texts]


@measures
def measure_million(bench):
    """Time to answer and to start with MANY messages: at first, and asked again."""
    with bench.running_store(MANY) as server:
        folder = server.folder
    for cold, kind in (True, "nothing cached"), (False, "files cached"):
        if cold:
            forget_pages(os.path.join(folder, "mail.db"))
        begun = time.perf_counter()
        with Running(folder=folder) as server, Asker(server.api_port) as asker:
            asker.ask(get("/healthz"))
            yield Row(f"start with {MANY:,} messages, {kind}",
                      f"{time.perf_counter() - begun:.2f} s", "-", "-", "1 s")
    with Running(folder=folder) as server, Asker(server.api_port) as asker:
        for what, requests in latency_cases(Faker(MANY)):
            first = [asker.time(request) for request in requests]
            again = [asker.time(request) for request in requests * (100 // len(requests))]
            yield Row(f"{what}, {MANY:,} messages: median / worst",
                      f"first {shown_times(first)}, again {shown_times(again)}", "-", "-", "10 ms")


def forget_pages(path):
    """Have the system drop what it has cached of a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@measures
def measure_forward(bench):
    """Intake while each message goes on by HTTP POST to this host, beside intake alone."""
    posted = []

    def forwarding():
        with Child(swallow_posts) as child, Running(
                "--url", f"http://127.0.0.1:{child.line()}/") as server:
            bench.send(server.smtp_port, 10, KB, 500)
            count, begun = round(2000 * bench.seconds), time.perf_counter()
            bench.send(server.smtp_port, 10, KB, count)
            taken = time.perf_counter() - begun
            wait_for(lambda: b'_outbox{state="waiting"} 0' in server.request("/metrics")[2], 300,
                     "the deliveries")
            posted.append(count / (time.perf_counter() - begun))
            return count / taken
    ours, alone = bench.alternate(forwarding, functools.partial(bench.rate_of_pegmail, 10, KB))
    yield compare("SMTP 1 KB, 10 connections, each message forwarded", ours, alone,
                  "without forwarding", "0.5x")
    yield Row("deliveries by HTTP POST meanwhile, until the last",
              f"{statistics.median(posted):,.0f}/s", "-", "-", "1,000/s")


@measures
def measure_idle(bench):
    """Memory of idle connections, and whether mail flows as before beside them."""
    raise_limit()
    count = min(5000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100)
    with Running("--max_connections", "20000", "--max_connections_per_peer", "20000") as server:
        bench.steady_rate(server.smtp_port, 10, KB)
        rates = []
        for _ in range(bench.rounds):
            wait_for_digest(server)
            without = bench.steady_rate(server.smtp_port, 10, KB)
            wait_for_digest(server)
            before = memory(server)
            with Child(hold_idle, server.smtp_port, count) as child:
                child.line()
                each = (memory(server) - before) / count
                rates.append((without, bench.steady_rate(server.smtp_port, 10, KB), each))
            wait_for(lambda: connections(server) < 10, DEADLINE, "the end of idle connections")
        without, beside, _ = map(statistics.median, zip(*rates))
        yield Row(f"memory of each of {count:,} idle connections",
                  f"{max(each for *_, each in rates) / KB:.1f} KB", "-", "-", "10 KB")
        yield Row("SMTP 1 KB, 10 connections, beside them", f"{beside:,.0f}/s",
                  f"without them {without:,.0f}/s", f"{beside / without:.2f}", "1.0")


@measures
def measure_memory(bench):
    """Resident memory after many messages, and while many large ones come at once."""
    with Running() as server:
        bench.send(server.smtp_port, 10, KB, 10000)
        after = memory(server)
        begun = time.monotonic()
        wait_for_digest(server)
        yield Row("memory after 10,000 messages of 1 KB", f"{after / MB:.0f} MB",
                  f"when digested {memory(server) / MB:.0f} MB", "-", "60 MB")
        yield Row("digest and index of them afterwards",
                  f"{10000 / (time.monotonic() - begun):,.0f}/s", "-", "-", "-")
    with Running() as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        sending = pool.submit(bench.send, server.smtp_port, 100, 25 * MB, 100, own=True)
        seen = [memory(server)]
        while not sending.done():
            seen.append(memory(server))
            time.sleep(0.02)
        peak, rate = memory(server, "VmHWM"), sending.result()
        wait_for_digest(server, 600)
        yield Row("memory while 100 connections send 25 MB each: peak", f"{peak / MB:.0f} MB",
                  f"median {statistics.median(seen) / MB:.0f} MB, with the digest afterwards "
                  f"{memory(server, 'VmHWM') / MB:.0f} MB", "-", "60 MB")
        yield Row("SMTP 25 MB, 100 connections", shown_rate(rate) + "/s", "-", "-", "-")


@measures
def measure_stall(bench):
    """How long a well-behaved client waits beside large senders and slow ones."""
    ours = {}
    with Running("--max_connections_per_peer", "5000") as server, loaded(server.smtp_port):
        with Asker(server.api_port) as asker, Wire(("127.0.0.1", server.smtp_port)) as wire:
            ours["NOOP"], ours["/healthz"] = probe(
                15, lambda: wire.ask("NOOP"), lambda: asker.ask(get("/healthz")))
    theirs = "-"
    if bench.aiosmtpd:
        with bench.sink() as sink:
            port = int(sink.line())
            with loaded(port), Wire(("127.0.0.1", port)) as wire:
                wire.socket.settimeout(120)
                theirs = "aiosmtpd " + percentiles(probe(15, lambda: wire.ask("NOOP"))[0])
    for name, times in ours.items():
        yield Row(f"{name} beside ten 20 MB senders and 1,000 slow clients: median / 99 % / worst",
                  percentiles(times), theirs if name == "NOOP" else "-", "-", "99 %: 100 ms")


@contextlib.contextmanager
def loaded(port):
    """Have ten connections send 20 MB messages, and 1,000 one byte a second."""
    with Child(trickle, port, 1000) as slow:
        slow.line()
        with Child(generate, port, 10, 20 * MB, 1 << 20):
            time.sleep(1)
            yield


def probe(seconds, *questions):
    """Ask questions in turn for some seconds; return the times of each."""
    times = [[] for _ in questions]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for question, kept in zip(questions, times):
            begun = time.perf_counter()
            question()
            kept.append(time.perf_counter() - begun)
        time.sleep(0.01)
    return times


# -- The command line --

def machine(folder, smtp_source):
    """Return what the figures depend on, in one line."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError), open("/proc/cpuinfo") as file:
        model = re.search(r"(?m)^model name\s*: (.*)", file.read()).group(1)
    return (f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python "
            f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}; appending 4 KB and "
            f"fdatasync: {1000 * sync_seconds(folder):.2f} ms; load before: "
            f"{os.getloadavg()[0]:.1f}; generator: {smtp_source or 'own'}")


def sync_seconds(folder):
    """Return the median time of making 4 KB durable."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(200):
            begun = time.perf_counter()
            os.write(file.fileno(), bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def bench_parser():
    """Return the command line of the benchmark."""
    parser = argparse.ArgumentParser("test_pegmail.py bench", description="Measure pegmail; print "
                                     "a Markdown table. Takes about ten minutes.")
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="what to measure: " + ", ".join(MEASUREMENTS) + "; default: all")
    parser.add_argument("--store", metavar="DIR",
                        help="keep large stores there for the next time (about 2 GB)")
    parser.add_argument("--seconds", type=float, default=4, help="length of a run (4)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of which the median counts (3)")
    parser.add_argument("--generator", choices=("smtp-source", "own"),
                        help="what sends; default: Postfix's smtp-source if installed")
    parser.add_argument("--aiosmtpd", metavar="PYTHON",
                        help="a Python that has aiosmtpd; `no` measures without it")
    return parser


def bench(arguments):
    """Run the benchmark; return the exit status."""
    parser = bench_parser()
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in MEASUREMENTS:
            parser.error(f"{name}: needs one of: " + ", ".join(MEASUREMENTS))
    with tempfile.TemporaryDirectory(prefix="pegmail-bench-") as folder:
        if options.store:
            os.makedirs(options.store, exist_ok=True)
        chosen = Bench(options, os.path.abspath(options.store or folder))
        print(machine(chosen.folder, chosen.smtp_source), flush=True)
        print(f"\n{HEAD}\n| --- | ---: | ---: | ---: | ---: |", flush=True)
        return max([run_measurement(chosen, name) for name in options.names or MEASUREMENTS])


def run_measurement(chosen, name):
    """Print the rows of a measurement; return 0, or 1 if it failed."""
    say(f"{name}: {MEASUREMENTS[name].__doc__}")
    try:
        for row in MEASUREMENTS[name](chosen):
            say(str(row))
            print(row, flush=True)
    except Exception:           # the others are still worth having
        traceback.print_exc()
        print(Row(name, "failed", "-", "-", "-"), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        sys.exit(bench(sys.argv[2:]))
    warnings.simplefilter("error", ResourceWarning)
    unittest.main()
