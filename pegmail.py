#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""pegmail: a whole mail server in one file.

    python3 pegmail.py            receive on 127.0.0.1:1025, serve on 127.0.0.1:8025
    python3 pegmail.py --help     every option

Mail comes in by SMTP or LMTP, is kept in SQLite and a tree of content-addressed files before it
is answered with 250, and is read back through a JSON API.

The file reads bottom-up: each section uses only the ones above it.

1. Settings: what the operator may choose, and where from
2. Text: addresses, dates, encodings; pure functions
3. Mail: envelopes, replies, header fields and MIME structure
4. Store: what is kept, and how it is found again
5. Reactor: one thread that owns every socket, and a few that work for it
6. Trust: asking the DNS
7. Sessions: the protocols, without sockets
8. Delivery: from a received message to the store, and onward
9. HTTP: the JSON API
10. Server and tools: all of it wired together, and the command line

One thread (Reactor) owns the sockets, one (Store) writes, one digests, a small pool does whatever
would hold up the others. Nothing here imports anything outside the standard library.
"""
import argparse
import base64
import binascii
import bisect
import codecs
import collections
import configparser
import contextlib
import datetime
import difflib
import email.header
import email.utils
import encodings.aliases
import errno
import fcntl
import fnmatch
import functools
import gzip
import hashlib
import heapq
import hmac
import html
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import os
import pwd
import queue
import random
import re
import resource
import secrets
import selectors
import shlex
import signal
import smtplib
import socket
import sqlite3
import ssl
import stat
import struct
import sys
import threading
import time
import types
import urllib.parse
import urllib.request
import uuid
import zoneinfo
from concurrent.futures import Future
from typing import (Any, Callable, Dict, FrozenSet, Generator, Iterable, Iterator, List, Mapping,
                    NamedTuple, NoReturn, Optional, Sequence, Set, Tuple, Union)

__version__ = "0.1.0"

log = logging.getLogger("pegmail")


# =====================================================================================
# 1. Settings: what the operator may choose, and where from
#
# One table, OPTIONS, feeds the command line, the environment (PEGMAIL_NAME), a .env file in the
# working directory, an INI file, --help and the README. The first of these that names an option
# wins, in that order. A wrong value ends in SettingsError: one line that says what to do.
# =====================================================================================

class SettingsError(Exception):
    """Stops the start; its text is one line for the operator, its status the exit status."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


# -- Kinds of values: each takes a text and returns the value, or raises ValueError --

def number(low: int, high: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from low to high."""
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text.strip()) or not low <= int(text) <= high:
            raise ValueError(f"needs a whole number from {low} to {high}")
        return int(text)
    return read


def port(text: str) -> int:
    """Read a TCP port; 0 lets the system choose one."""
    try:
        return number(0, 65535)(text)
    except ValueError:
        raise ValueError("needs a port from 0 to 65535 (0 takes a free one)") from None


def size(text: str) -> int:
    """Read a number of bytes, with K, M or G for powers of 1024."""
    match = re.fullmatch(r"(\d{1,12})\s*([kmg]?)(i?b)?", text.strip().lower())
    if not match or int(match.group(1)) == 0:
        raise ValueError("needs a number of bytes such as 500000, 512K or 25M")
    return int(match.group(1)) << {"": 0, "k": 10, "m": 20, "g": 30}[match.group(2)]


def flag(text: str) -> bool:
    """Read yes or no in the usual spellings."""
    words = {"1": True, "true": True, "yes": True, "on": True,
             "0": False, "false": False, "no": False, "off": False, "": False}
    if text.strip().lower() not in words:
        raise ValueError("needs yes or no")
    return words[text.strip().lower()]


def filled(text: str) -> str:
    """Read a text that may not be empty nor hold control characters."""
    if not text.strip() or re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("must not be empty or hold control characters")
    return text.strip()


def network(text: str) -> Any:
    """Read an IP address or a CIDR network, v4 or v6."""
    try:
        return ipaddress.ip_network(text.strip(), strict=False)
    except ValueError:
        raise ValueError("needs an IP address such as 192.0.2.7 or a network such as "
                         "10.0.0.0/8 or 2001:db8::/32") from None


def host_port(text: str) -> Tuple[str, Optional[int]]:
    """Read host, host:port or [v6]:port; the port may be missing."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s/]+)(?::(\d{1,5}))?", text.strip())
    if match and match.group(2) is None:
        return match.group(1).strip("[]"), None
    if match and 0 < int(match.group(2)) < 65536:
        return match.group(1).strip("[]"), int(match.group(2))
    try:
        return str(ipaddress.IPv6Address(text.strip())), None
    except ValueError:
        raise ValueError("needs HOST or HOST:PORT, the port from 1 to 65535") from None


def normalize_domain(name: str) -> Optional[str]:
    """Return a domain or address literal the way domains are compared, None if it is none.

    Lower case, A-labels for U-labels (RFC 5890), no dot at the end; [IPv6:1::2] in short form.
    """
    if name.startswith("[") and name.endswith("]"):
        literal = name[1:-1]
        literal = literal[5:] if literal[:5].lower() == "ipv6:" else literal
        try:
            return f"[{ipaddress.ip_address(literal)}]" if "%" not in literal else None
        except ValueError:
            return None
    name = name.rstrip(".").lower()
    if not 0 < len(name) <= 255:
        return None
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii").lower()
        except UnicodeError:
            return None
    labels_fit = all(0 < len(label) <= 63 for label in name.split("."))
    return name if labels_fit and re.fullmatch(r"[a-z0-9._-]+", name) else None


def domain(text: str) -> str:
    """Read a mail domain."""
    name = normalize_domain(text.strip().lstrip("@"))
    if name is None:
        raise ValueError("needs a domain such as example.com")
    return name


def host_name(text: str) -> str:
    """Read the name of a host, or its address, as it may stand in a greeting."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]",
                        text.strip()):
        raise ValueError("needs a host name such as mail.example.com")
    return text.strip()


def header_field(text: str) -> Tuple[str, str]:
    """Read `Name: value`, a header field of a request; the value may be a template."""
    match = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}):\s*(.+?)\s*", text, re.S)
    if not match or match.group(1).lower() in ("host", "content-length", "transfer-encoding"):
        raise ValueError("needs 'Name: value', and not a name that frames the request")
    return match.group(1), match.group(2)


def any_text(text: str) -> str:
    """Read a text of any form."""
    return text


class Forward(NamedTuple):
    """Where mail goes on to, and which; patterns are those of a shell, in any case."""
    target: str                 # a URL, perhaps a template, or mailto:ADDRESS
    to: str = "*"
    sender: str = "*"


def forward(text: str) -> Forward:
    """Read `URL`, or `mailto:ADDRESS`, with `to=PATTERN` and `from=PATTERN` behind it."""
    match = re.fullmatch(r"(\S.*?)((?:\s+(?:to|from)=\S+)*)\s*", text.strip())
    bare = re.sub(r"\{\{.*?\}\}", "", match.group(1)) if match else ""
    if not match or " " in bare or not re.match(
            r"(?i)https?://.|mailto:[^@,;<>\s]+@[^@,;<>\s]+$|\{\{", match.group(1)):
        raise ValueError("needs http://..., https://... or mailto:ADDRESS, and then, if wanted, "
                         "to=PATTERN and from=PATTERN")
    words = dict(word.split("=", 1) for word in match.group(2).split())
    return Forward(match.group(1), words.get("to", "*"), words.get("from", "*"))


def web_address(text: str) -> str:
    """Read a URL, or a template that makes one."""
    if not re.match(r"(?i)https?://.|.*\{\{", text.strip()):
        raise ValueError("needs http://... or https://...")
    return text.strip()


LINES = "lines"     # for Option.many: each value has a flag, or a line, of its own


class Option(NamedTuple):
    """One thing the operator may choose.

    `many` takes several values: words behind one flag, or LINES. `also` are further flags.
    """
    name: str
    default: Any
    kind: Any               # a reader, or the tuple of the words allowed
    help: str
    metavar: str = ""
    many: Any = False
    also: Tuple[str, ...] = ()


OPTIONS = (
    Option("db_path", "mail.db", filled, "SQLite database; made when missing.", "FILE"),
    Option("media_path", "media", filled, "Folder of attachments and large messages.", "DIR"),
    Option("file_hash_length", 24, number(8, 32),
           "Bytes of SHA-256 that name a media file; 8 to 32.", "BYTES"),
    Option("bind", "127.0.0.1", filled, "Address to listen on; 0.0.0.0 or :: for all.", "ADDR",
           also=("host",)),
    Option("smtp_port", 1025, port, "Port for incoming mail; 0 takes a free one.", "PORT",
           also=("port",)),
    Option("api_port", 8025, port, "Port of the JSON API; 0 takes a free one.", "PORT"),
    Option("lmtp_port", None, port, "Port for LMTP; not opened when missing.", "PORT"),
    Option("lmtp_socket", None, filled, "Unix socket for LMTP.", "FILE"),
    Option("hostname", None, host_name, "Name in greetings and Received; default: this host's.",
           "NAME", also=("domain",)),
    Option("server_host", (), domain, "Domains to take mail for; default: every one.", "HOST",
           many=True),
    Option("ssl_cert", None, filled, "Certificate chain (PEM); with --ssl_key turns on STARTTLS.",
           "FILE"),
    Option("ssl_key", None, filled, "Private key (PEM) of the certificate.", "FILE"),
    Option("starttls", "required", ("required", "optional"),
           "Whether MAIL needs TLS once there is a certificate."),
    Option("server_addr", (), host_port,
           "Where nginx shall send mail, several share recipients; default: this server.",
           "HOST[:PORT]", many=True),
    Option("trusted_proxy", (), network,
           "Proxies that may name the real client by XCLIENT or PROXY.", "ADDR", many=True),
    Option("proxy_protocol", False, flag,
           "Connections of trusted proxies begin with a PROXY header (v1 or v2)."),
    Option("api_remote_address", (), network,
           "The only clients that may use the API (403 for others); default: loopback.", "ADDR",
           many=True),
    Option("api_token", None, filled,
           "Secret for the API (Bearer or Basic); @FILE reads it from a file.", "TOKEN"),
    Option("api_host", (), host_name, "Further names the API answers to in the Host header.",
           "NAME", many=True),
    Option("max_size", 50 << 20, size, "Largest message.", "BYTES"),
    Option("max_line", 1 << 20, size, "Longest line in a message.", "BYTES"),
    Option("max_header", 256 << 10, size, "Largest header block of a message.", "BYTES"),
    Option("max_recipients", 1000, number(100, 100000), "Recipients of one message.", "N"),
    Option("max_connections", 8000, number(1, 1000000), "Connections at once.", "N"),
    Option("max_connections_per_peer", 500, number(1, 1000000),
           "Connections at once from one address.", "N"),
    Option("max_errors", 20, number(1, 100000), "Refused commands before 421.", "N"),
    Option("timeout", 300, number(1, 86400), "Seconds a client may be silent.", "SECONDS"),
    Option("max_session", 3600, number(1, 604800), "Seconds a session may last.", "SECONDS"),
    Option("grace", 10, number(0, 3600), "Seconds to finish what is being received at a stop.",
           "SECONDS"),
    Option("bare_newline", "normalize", ("normalize", "reject"),
           "What to do with a bare LF in a message."),
    Option("url", None, web_address, "Forward each message as an HTTP POST to this URL.", "URL"),
    Option("header", (), header_field, "A header field of these requests; give it several times.",
           "'NAME: VALUE'", many=LINES),
    Option("template", None, any_text,
           "Go template of their body, or @FILE; default: a JSON object.", "TEXT"),
    Option("forward_to", (), forward, "Forward to a further URL or mailto:ADDRESS, with "
           "to=PATTERN and from=PATTERN if not all; give it several times.", "'URL ...'",
           many=LINES),
    Option("forward_only", False, flag, "Delete a message here once it was forwarded."),
    Option("forward_parallel", 4, number(1, 16),
           "Requests to one target at once; 1 keeps the order.", "N"),
    Option("forward_timeout", 30, number(1, 600), "Seconds a target may take.", "SECONDS"),
    Option("forward_secret", None, filled,
           "Signs requests (webhook-signature); @FILE reads it from a file.", "SECRET"),
    Option("retry_first", 10, number(1, 86400),
           "Seconds until a delivery is tried again; doubles each time.", "SECONDS"),
    Option("retry_longest", 3600, number(1, 86400), "It never takes longer than this.", "SECONDS"),
    Option("retry_for", 259200, number(1, 2592000), "After so long it has failed.", "SECONDS"),
    Option("retry_4xx", False, flag, "Try again after every 4xx, not only 408, 425 and 429."),
    Option("outbox_keep", 86400, number(0, 31536000),
           "Seconds that a delivery is remembered; failed ones ten times as long.", "SECONDS"),
    Option("webhook_allow", (), network,
           "Private networks that webhooks set by the API, and mail without a relay, may go to.",
           "ADDR", many=True),
    Option("webhook_failures", 50, number(1, 100000),
           "A webhook is disabled after so many failed attempts in a row.", "N"),
    Option("attachments", "none", ("none", "links", "base64"),
           "How webhooks get attachments besides their number."),
    Option("attachments_size", 5 << 20, size, "Larger attachments are links in any case.",
           "BYTES"),
    Option("api_url", None, web_address, "How such links begin; default: this host's own API.",
           "URL"),
    Option("ca_file", None, filled, "Certificates (PEM) to trust, in place of the system's.",
           "FILE"),
    Option("relay", None, host_port,
           "Send outgoing mail through this server; default: to each domain's own.",
           "HOST[:PORT]"),
    Option("relay_user", None, filled, "User name for it.", "NAME"),
    Option("relay_password", None, filled, "Password for it; @FILE reads it from a file.",
           "PASSWORD"),
    Option("relay_tls", "starttls", ("starttls", "tls", "opportunistic", "plain"),
           "How it speaks TLS: by STARTTLS, from the first byte, if it offers it, or not."),
    Option("dns_server", (), host_port, "DNS servers to ask; default: those of resolv.conf.",
           "HOST[:PORT]", many=True),
    Option("log_format", "text", ("text", "json"), "Form of the log lines on standard error."),
    Option("standalone_logging", False, flag, "Begin log lines with date and time."),
    Option("debug", False, flag, "Log commands and replies too."),
)

# What the command line may also ask for; each is answered and ends the program.
ACTIONS = (
    ("check", "Check the configuration and exit."),
    ("generate_nginx_config", "Print a configuration for nginx and exit."),
    ("generate_systemd_unit", "Print a unit for systemd and exit."),
)

OPTION_BY_NAME = {option.name: option for option in OPTIONS}


class Settings(types.SimpleNamespace):
    """The chosen values, one attribute for each row of OPTIONS; made by load_settings."""

    def __init__(self, **chosen: Any) -> None:
        if not chosen.keys() <= OPTION_BY_NAME.keys():
            raise TypeError("no such option: " + ", ".join(chosen.keys() - OPTION_BY_NAME.keys()))
        super().__init__(**{option.name: option.default for option in OPTIONS})
        self.__dict__.update(chosen)
        self.hostname: str = chosen.get("hostname") or local_hostname()
        self.server_addr: Any = chosen.get("server_addr") or ((self.local_address, None),)

    @property
    def local_address(self) -> str:
        """Where programs on this host find the server."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.bind, self.bind)


def local_hostname() -> str:
    """Return this host's name as far as it is fit for a greeting, without asking DNS."""
    name = socket.gethostname().lower()
    return name if re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name) else "localhost"


def read_value(option: Option, texts: Sequence[str], source: str) -> Any:
    """Turn the texts given for an option into its value, or say in one line what is wrong."""
    try:
        if isinstance(option.kind, tuple):
            if texts[-1] not in option.kind:
                raise ValueError("needs one of: " + ", ".join(option.kind))
            return texts[-1]
        values = tuple(option.kind(text) for text in texts)
        return values if option.many else values[-1]
    except ValueError as error:
        raise SettingsError(f"{source}: {shown(texts)}: {error}", 2) from None


def shown(texts: Sequence[str]) -> str:
    """Return texts fit for one line of a message."""
    return ascii(" ".join(texts)) if len(" ".join(texts)) < 80 else "a value that is too long"


def read_env_file(path: str) -> Dict[str, str]:
    """Read NAME=VALUE lines as shells and compose files write them; no file is an empty one."""
    values = {}
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(1 << 20)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {reason(error)}") from None
    for match in re.finditer(r"""(?m)^[ \t]*(?:export[ \t]+)?([A-Za-z_]\w*)[ \t]*=[ \t]*"""
                             r"""(?:'([^']*)'|"([^"]*)"|(.*?))[ \t]*(?:(?<=\s)#.*)?$""", text):
        values[match.group(1)] = next((value for value in match.groups()[1:] if value), "")
    return values


def read_ini_file(path: str) -> Dict[str, str]:
    """Read the [pegmail] section of an INI file."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read: {reason(error)}") from None
    except configparser.Error as error:
        text = " ".join(str(error).split())
        raise SettingsError(f"--config {path}: {text}; write [pegmail] and name = value lines",
                            2) from None
    if not parser.has_section("pegmail"):
        raise SettingsError(f"--config {path}: has no [pegmail] section", 2)
    return {name.replace("-", "_"): value for name, value in parser.items("pegmail")}


def reason(error: BaseException) -> str:
    """Return why an OSError or the like happened, without its repetition of the path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def suggest(name: str, names: Iterable[str]) -> str:
    """Return a hint at the name that was probably meant, or nothing."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""


def split_values(option: Option, text: str) -> List[str]:
    """Split a text from a file or the environment into the option's values."""
    if option.many == LINES:
        return [line for line in text.splitlines() if line.strip()]
    return re.split(r"[\s,]+", text.strip()) if option.many and text.strip() else [text]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the option that was probably meant."""

    def error(self, message: str) -> Any:
        """Print the error and exit with the status for wrong usage."""
        match = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        flags = list(self._option_string_actions)
        hint = suggest(match.group(1), flags) if match else ""
        self.exit(2, f"pegmail: {message}{hint} (--help lists the options)\n")


def argument_parser() -> OneLineParser:
    """Make the command line from OPTIONS; what is not given leaves no attribute."""
    parser = OneLineParser(
        "pegmail.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="A whole mail server: SMTP in, SQLite, JSON API out.",
        epilog="pegmail.py outbox list|retry|drop shows and changes what is to leave; pegmail.py "
               "sendmail takes a message as sendmail does. Each option may also stand as "
               "PEGMAIL_NAME in the environment or in .env, and as "
               "name = value under [pegmail] in the --config file; the first of these wins.")
    for option in OPTIONS:
        both = dict.fromkeys("--" + name for known in (option.name, *option.also)
                             for name in (known, known.replace("_", "-")))
        kind = "{%s}" % ",".join(option.kind) if isinstance(option.kind, tuple) else option.metavar
        if option.kind is flag:
            parser.add_argument(*both, dest=option.name, help=option.help, nargs="?", const="yes",
                                metavar="yes|no")
        else:
            parser.add_argument(*both, dest=option.name, help=option.help, metavar=kind,
                                nargs="+" if option.many is True else None, action=
                                {False: "store", True: "extend", LINES: "append"}[option.many])
    parser.add_argument("--config", metavar="FILE", help="INI file with a [pegmail] section.")
    for name, text in ACTIONS:
        both = dict.fromkeys(("--" + name, "--" + name.replace("_", "-")))
        parser.add_argument(*both, dest=name, action="store_true", help=text)
    parser.add_argument("--version", action="version", version="pegmail " + __version__)
    return parser


def load_settings(arguments: Sequence[str], environ: Dict[str, str], env_path: str = ".env",
                  config: str = "") -> Tuple[Settings, List[str]]:
    """Return the settings and the names of the actions asked for.

    Takes the words behind the program's name, the environment, the path of the .env file, and that
    of an INI file to read if there is one and no other is named.
    Raises SettingsError; unknown words on the command line exit as argparse does.
    """
    given = vars(argument_parser().parse_args(arguments))
    actions = [name for name, _ in ACTIONS if given.pop(name, False)]
    env_file = read_env_file(env_path)
    config = given.pop("config", None) or environ.get("PEGMAIL_CONFIG") or env_file.get(
        "PEGMAIL_CONFIG") or (config if os.path.exists(config) else "")
    ini_file = read_ini_file(config) if config else {}
    for name in ini_file:
        if name not in OPTION_BY_NAME:
            raise SettingsError(f"--config {config}: no option is called {name}"
                                + suggest(name, OPTION_BY_NAME), 2)
    for name in env_file:
        if name.startswith("PEGMAIL_") and name != "PEGMAIL_CONFIG" and (
                name[8:].lower() not in OPTION_BY_NAME):
            raise SettingsError(f"{env_path}: no option is called {name}" + suggest(
                name, ["PEGMAIL_" + known.upper() for known in OPTION_BY_NAME]), 2)
    chosen = {}
    for option in OPTIONS:
        name = "PEGMAIL_" + option.name.upper()
        if option.name in given:
            texts = given[option.name]
            source, texts = "--" + option.name, texts if isinstance(texts, list) else [texts]
        elif name in environ:
            source, texts = name, split_values(option, environ[name])
        elif name in env_file:
            source, texts = f"{env_path}: {name}", split_values(option, env_file[name])
        elif option.name in ini_file:
            source = f"--config {config}: {option.name}"
            texts = split_values(option, ini_file[option.name])
        else:
            continue
        chosen[option.name] = read_value(option, texts, source)
    settings = Settings(**chosen)
    check_together(settings)
    return settings, actions


def check_together(settings: Settings) -> None:
    """Refuse values that are fine alone and not together, and read the token's file."""
    if bool(settings.ssl_cert) != bool(settings.ssl_key):
        raise SettingsError("--ssl_cert and --ssl_key go together: give both or none", 2)
    if settings.proxy_protocol and not settings.trusted_proxy:
        raise SettingsError("--proxy_protocol needs --trusted_proxy: say whose header to believe",
                            2)
    if settings.forward_only and not (settings.url or settings.forward_to):
        raise SettingsError("--forward_only needs --url or --forward_to: say where mail goes", 2)
    for onto in settings.forward_to:
        if normalize_domain(onto.target.rpartition("@")[2]) in settings.server_host and (
                onto.target.lower().startswith("mailto:")):
            raise SettingsError(f"--forward_to {onto.target}: is in a domain of --server_host, so "
                                "mail would come back here", 2)
    if bool(settings.relay_user) != bool(settings.relay_password) or (
            settings.relay_user and not settings.relay):
        raise SettingsError("--relay_user and --relay_password go together, and with --relay", 2)
    for name in FROM_FILE:
        value = getattr(settings, name) or ""
        if value.startswith("@"):
            setattr(settings, name, read_text_file(f"--{name}", value[1:]))
    if (settings.header or settings.template) and not (settings.url or settings.forward_to):
        raise SettingsError("--header and --template need --url or --forward_to: say where mail "
                            "goes", 2)


# @FILE stands for what is in it.
FROM_FILE = ("api_token", "forward_secret", "relay_password", "template")


def read_text_file(option: str, path: str) -> str:
    """Return what is in the file that an option names, without blanks around it."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(1 << 20).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{option} @{path}: cannot be read: {reason(error)}") from None
    if not text:
        raise SettingsError(f"{option} @{path}: the file is empty")
    return text


def option_table() -> str:
    """Return OPTIONS as the README's table."""
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for option in OPTIONS:
        rows.append(f"| `--{option.name}` | {default_text(option)} | {option.help} |")
    rows += [f"| `--{name}` | | {text} |" for name, text in ACTIONS]
    return "\n".join(rows)


def default_text(option: Option) -> str:
    """Return an option's default as the README shows it."""
    value = option.default
    if value is None or value == ():
        return ""
    if option.kind is size:
        return f"`{value >> 20}M`" if value >> 20 else f"`{value >> 10}K`"
    if option.kind is flag:
        return "`yes`" if value else "`no`"
    return f"`{value}`"


# =====================================================================================
# 2. Text: addresses, dates, encodings; pure functions
#
# RFC 5321 4.1.2 (addresses), 2047 and 2231 (encoded words and parameters), 6266 (file names in
# HTTP). No I/O and no clock; whatever the input, the time is linear in its length.
# =====================================================================================

MAX_ADDRESS = 1000        # above RFC 5321 4.5.3.1.3 (256 for a path), for odd but real senders


class Address(NamedTuple):
    """A mailbox address that has been read; `domain` is as given, `text` the whole."""
    local: str
    domain: str
    text: str


PLAIN_ADDRESS = re.compile(r"([\w!#$%&'*+/=?^`{|}~.-]+)@"
                           r"((?:[A-Za-z0-9_-]{1,63}\.){0,9}[A-Za-z0-9_-]{1,63})")
QUOTED_LOCAL = re.compile(r'"(?:[^"\\\x00-\x1f\x7f]|\\[ -~])*"')


def parse_address(text: str) -> Address:
    """Read a mailbox without angle brackets (RFC 5321 4.1.2); raise ValueError if it is none.

    Dots in odd places, as some providers hand out, are let through; spaces and control
    characters outside quotes are not. A missing domain gives an empty one.
    """
    if len(text) > MAX_ADDRESS:
        raise ValueError("address is too long")
    plain = PLAIN_ADDRESS.fullmatch(text)
    if plain:
        return Address(plain.group(1), plain.group(2), text)
    quoted = QUOTED_LOCAL.match(text)
    if quoted:
        local, rest = quoted.group(), text[quoted.end():]
    else:
        local, at, rest = text.partition("@")
        rest = at + rest
    if not quoted and (not local or re.search(r'[\s\x00-\x20\x7f<>(),:;\\"\[\]]', local)):
        raise ValueError("local part is not valid")
    if not rest:
        return Address(local, "", text)
    if rest[0] != "@" or normalize_domain(rest[1:]) is None:
        raise ValueError("domain is not valid")
    return Address(local, rest[1:], text)


# Control characters, line ends of Unicode, and marks that turn the direction of what follows.
CONTROLS = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"


def clean_line(text: str, limit: int = 1000) -> str:
    """Return text as one line: control characters become spaces, and it is cut at the limit."""
    return text[:limit] if text.isprintable() else re.sub(CONTROLS, " ", text[:limit])


def fold(text: str) -> str:
    """Return text the way substrings are compared: without case."""
    return text.casefold()


# -- Bytes to text: nothing here raises, and nothing is lost --

# Only what is built in: a name that Python does not know makes it look for a file each time, and
# remember that it found none.
CODECS = (set(encodings.aliases.aliases) | set(encodings.aliases.aliases.values())) - {
    "idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "mbcs", "oem"}


@functools.lru_cache(maxsize=256)
def find_codec(charset: str) -> Optional[str]:
    """Return Python's name for a charset of MIME, None if there is no safe one."""
    name = charset.strip().strip("'\"").lower()
    name = {"utf-8-sig": "utf-8", "x-sjis": "cp932", "ks_c_5601-1987": "cp949",
            "gb2312": "gb18030", "iso-8859-1": "cp1252", "latin1": "cp1252",
            "iso-8859-8-i": "iso-8859-8"}.get(name, name)
    known = encodings.normalize_encoding(name)
    if known not in CODECS and known.replace("_", "") not in CODECS:
        return None
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError):
        return None
    return info.name if getattr(info, "_is_text_encoding", True) else None


def decode_text(data: bytes, charset: str = "") -> str:
    """Decode bytes by the charset they claim, else as UTF-8, else as Latin-1."""
    for codec in (find_codec(charset[:100]) if charset else None, "utf-8"):
        if codec:
            try:
                text = data.decode(codec)
                return text if codec != "utf-7" else text.encode("utf-8", "replace").decode()
            except (UnicodeError, ValueError, LookupError):
                continue
    return data.decode("latin-1")


ENCODED_WORD = re.compile(r"=\?([^?\s]{1,80})\?([bBqQ])\?([^?]*)\?=")


def decode_words(text: str) -> str:
    """Decode the encoded words in a header value (RFC 2047).

    White space between two words goes away; pieces of one charset are joined before they are
    decoded, as many programs cut characters in two.
    """
    if "=?" not in text:
        return text
    out: List[str] = []
    pending: List[bytes] = []
    charset, end = "", 0
    for match in ENCODED_WORD.finditer(text):
        between = text[end:match.start()]
        name = match.group(1).partition("*")[0].lower()     # RFC 2231 5: charset*language
        if pending and (between.strip() or name != charset):
            out.append(decode_text(b"".join(pending), charset))
            pending = []
        if between.strip() or not end:
            out.append(between)
        pending.append(decode_word(match.group(2), match.group(3)))
        charset, end = name, match.end()
    if pending:
        out.append(decode_text(b"".join(pending), charset))
    return "".join(out) + text[end:]


def decode_word(encoding: str, text: str) -> bytes:
    """Decode the text of one encoded word."""
    data = text.encode("utf-8", "surrogateescape")
    if encoding in "qQ":
        return binascii.a2b_qp(data, header=True)
    return decode_base64(data)


def decode_base64(data: bytes) -> bytes:
    """Decode base64 as mail has it: with line ends, without padding, with rubbish in between."""
    try:
        return binascii.a2b_base64(data)
    except binascii.Error:
        data = re.sub(rb"[^A-Za-z0-9+/]", b"", data)
        data = data[:-1] if len(data) % 4 == 1 else data
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4))


PARAMETER = re.compile(r';\s*([^\s;="]{1,80})\s*=\s*(?:"((?:[^"\\]|\\.)*)"?|([^;]*))', re.S)
MAX_PARAMETERS = 50


def parse_parameters(value: str) -> Tuple[str, Dict[str, str]]:
    """Split a value such as `text/plain; charset=utf-8` into its head and its parameters.

    Joins continuations and decodes RFC 2231 values, and encoded words where they should not be.
    """
    head, semicolon, rest = value.partition(";")
    plain: Dict[str, str] = {}
    pieces: Dict[str, Dict[int, Tuple[bool, str]]] = {}
    for match in itertools.islice(PARAMETER.finditer(semicolon + rest), MAX_PARAMETERS):
        name, quoted, bare = match.groups()
        text = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare.strip()
        base, star, index = name.lower().partition("*")
        if not star:
            plain.setdefault(base, decode_words(text))
            continue
        extended = index == "" or index.endswith("*")
        digits = index.rstrip("*") or "0"
        if re.fullmatch("[0-9]{1,3}", digits):
            pieces.setdefault(base, {}).setdefault(int(digits), (extended, text))
    for base, parts in pieces.items():
        plain[base] = join_pieces([parts[i] for i in sorted(parts)])
    return head.strip(), plain


def join_pieces(parts: List[Tuple[bool, str]]) -> str:
    """Decode the pieces of an RFC 2231 parameter: (percent-encoded?, text), in order."""
    charset = ""
    if parts[0][0]:
        pieces = parts[0][1].split("'", 2)
        if len(pieces) == 3:
            charset, parts[0] = pieces[0], (True, pieces[2])
    data = b"".join(urllib.parse.unquote_to_bytes(text) if extended
                    else text.encode("utf-8", "surrogateescape") for extended, text in parts)
    return decode_text(data, charset)


# -- Text that leaves --

def safe_filename(name: str) -> str:
    """Return a name from mail as one a browser may save under: no folders, no controls.

    Direction marks, which make `exe.fdp` look like a PDF, go too.
    """
    name = name[:4000].encode("utf-8", "replace").decode("utf-8")
    name = re.sub(CONTROLS, "", name)
    name = re.sub(r'[<>:"/\\|?*]', "_", name.replace("\\", "/").rpartition("/")[2]).strip(" .")
    while len(name.encode("utf-8")) > 200:
        stem, dot, ending = name.rpartition(".")
        name = (stem[:-1] + dot + ending) if dot and len(ending) < 20 and stem else name[:-1]
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        name = "_" + name
    return name.rstrip(" .") or "attachment"


def content_disposition(kind: str, filename: str) -> str:
    """Return a Content-Disposition value for HTTP (RFC 6266) with a plain and a full name."""
    name = safe_filename(filename)
    plain = re.sub(r'[^ -~]|["\\%]', "_", name)
    value = f'{kind}; filename="{plain}"'
    if plain != name:
        value += "; filename*=UTF-8''" + urllib.parse.quote(name, safe="")
    return value


def html_text(markup: str) -> Tuple[str, List[str]]:
    """Return the words of an HTML text, and the addresses its links point to."""
    words: List[str] = []
    links: List[str] = []
    markup = re.sub(r"&#(?:[0-9]{8,}|[xX][0-9a-fA-F]{7,});?", "\ufffd", markup)
    end, skipping = 0, ""
    for match in re.finditer(r"<([^<>]*)>", markup):
        if not skipping:
            words.append(markup[end:match.start()])
        end = match.end()
        tag = re.match(r"/?[a-z0-9!]*", match.group(1).lower()).group()  # type: ignore[union-attr]
        if skipping:
            skipping = "" if tag == "/" + skipping else skipping
        elif tag in ("script", "style"):
            skipping = tag
        elif tag == "a":
            href = re.search(r"""(?i)\shref\s*=\s*(?:"([^"]*)"|'([^']*)'|(\S+))""", match.group(1))
            if href:
                links.append(html.unescape(next(filter(None, href.groups()), "")).strip())
        words.append(HTML_BREAKS.get(tag.strip("/"), ""))
    return html.unescape("".join(words + [markup[end:] if not skipping else ""])), links


HTML_BREAKS = {**dict.fromkeys("p br div tr li ul ol table h1 h2 h3 h4 h5 h6 hr pre blockquote "
                               "title head body".split(), "\n"), "td": " ", "th": " ", "img": " "}


LINK = re.compile(r"""(?i)https?://[^\s<>"'`\\^{}|，。；：！？、）】」』]{3,2000}""")
CODE = re.compile(r"(?a)(?<![\w./:#?=&%@+$€£-])(?:[A-Z]{1,3}-)?"
                  r"(?:\d{4,10}|\d{3}[ -]\d{3}|\d{2}(?: \d{2}){2}"
                  r"|(?=[A-Z]*\d)(?=\d*[A-Z])[A-Z0-9]{5,10}"
                  r"|(?=[A-Z-]*\d)[A-Z0-9]{3,5}-[A-Z0-9]{3,5}|(?<=: )[A-Z]{4}-[A-Z]{4})"
                  r"(?![\w/%@]|[-.,:]\d)")
CODE_WORD = re.compile(r"(?i)code\b|\bcod(?:e|ice)\w*|\bkod\w*|\botp\b|\bpin\b|"
                       r"pass(?:code|word)|"
                       r"\btoken\b|one[- ]time|\b2fa\b|\btan\b|código|"
                       r"验证码|驗證碼|コード|인증번호|\bкод\w*")
PHONE = re.compile(r"\+[0-9][0-9 ()./-]{6,30}|\b0[0-9]{3}(?:-[0-9]{3,4}){2}")
HINT_WORD = re.compile(r"(?i)verif|confirm|bestätig|sign[ -]?in|log[ -]?in")
FAR, HINT = 200, 300          # how much less likely a code far from its word, or from a hint, is


def find_codes(text: str) -> List[str]:
    """Return what looks like one-time codes in a text, the likeliest first.

    A code is a run of 4 to 10 digits or capitals with a digit; only lines that speak of one, and
    the two lines behind such a line, are read. Where a code stands right behind its word, others
    that stand elsewhere are none.
    """
    ranked: Dict[str, int] = {}
    near = 0
    for line in text.splitlines()[:5000]:
        line = PHONE.sub(" ", line[:2000])
        words = [match.end() for match in CODE_WORD.finditer(line)]
        hints = [match.end() for match in HINT_WORD.finditer(line)]
        near = 3 if words or hints else near - (1 if line.strip() else 0)
        if near <= 0:
            continue
        for match in CODE.finditer(line):
            code = re.sub(r"(?<=\d)[ ](?=\d)", "", match.group())
            if re.fullmatch(r"(19|20)\d\d", code) and not words:
                continue                            # a year
            place = match.start()
            rank = min([place - word for word in words if word <= place]
                       + [HINT + place - word for word in hints if word <= place]
                       + [FAR + abs(word - place) for word in words] + [1000 - near])
            ranked[code] = min(ranked.get(code, 9999), rank)
    found = sorted(ranked, key=lambda code: ranked[code])[:20]
    return [code for code in found if ranked[code] < FAR or ranked[found[0]] >= FAR]


def find_links(text: str) -> List[str]:
    """Return the http and https addresses in a text, each once, in order."""
    found = (match.group().rstrip(".,;:!?)]*_") for match in LINK.finditer(text))
    return list(dict.fromkeys(found))[:200]


def choose_server(servers: Sequence[Any], address: str) -> Any:
    """Return the server that an address belongs to, by rendezvous hashing.

    Adding a server moves only the addresses that it wins; case makes no difference.
    """
    key = fold(address).encode("utf-8", "surrogateescape")
    return max(servers, key=lambda server: hashlib.sha256(repr(server).encode() + key).digest())


# -- Templates: Go's text/template --
#
# https://pkg.go.dev/text/template and https://pkg.go.dev/fmt, with functions of sprig
# (https://masterminds.github.io/sprig/). A template sees None, bool, int, float, str, list, tuple,
# dict with text keys, and the classes here; no name in it ever becomes a Python attribute. As in
# Go, lengths are bytes of UTF-8; bytes that are none are lone surrogates (surrogateescape).

MAX_TEMPLATE_STEPS = 500000   # terms, rounds and elements of one rendering: a second or two
MAX_TEMPLATE_OUTPUT = 64 << 20
MAX_TEMPLATE_DEPTH = 100      # blocks or parentheses in each other, templates that call each other
MAX_TEMPLATE_VARIABLES = 1000           # in scope at one place
MAX_VALUE_DEPTH = 100         # lists and maps in each other; `set` can make a map that holds itself
MAX_GO_WIDTH = 1000000        # of one printed value, as in Go's fmt
TEXT_STEP = 12                # 1 << 12 characters that a function reads or makes are one step,
ELEMENT_STEP = 3              # and so are 1 << 3 elements of a list


class TemplateError(Exception):
    """What is wrong with a template and where, be it found by reading or by rendering it."""

    def __init__(self, reason: str, place: Optional[int] = None) -> None:
        super().__init__(reason)
        self.reason, self.place, self.name, self.line, self.column = reason, place, "", 0, 0

    def locate(self, name: str, text: str, place: int) -> "TemplateError":
        """Return the error itself, now with the line and column of its place, else of this one."""
        place = place if self.place is None else self.place
        self.name, self.line = name, text.count("\n", 0, place) + 1
        self.column = place - text.rfind("\n", 0, place)
        return self

    def __str__(self) -> str:
        where = f"{self.name}: line {self.line}, column {self.column}: " if self.line else ""
        return where + self.reason


class GoTime(NamedTuple):
    """A moment, time.Time to templates; made of an aware datetime."""
    moment: datetime.datetime


class GoHeader(Dict[str, List[str]]):
    """The fields of a message, mail.Header to templates; made by go_header."""


class GoStruct(Dict[str, Any]):
    """The fields a template is rendered with: to name one that is not there is an error."""


class GoMap(Dict[str, Any]):
    """A map that a template made itself, and may change."""


class GoEnum(int):
    """A number that prints as a name; made by the methods Month and Weekday."""
    names: Sequence[str] = ()


class GoMonth(GoEnum):
    """A month from 1 to 12."""
    names = ("- January February March April May June July August September October November "
             "December").split()


class GoWeekday(GoEnum):
    """A day of the week, 0 being Sunday."""
    names = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split()


def canonical_name(name: str) -> str:
    """Return a field name as Go's net/textproto spells it: Message-Id."""
    return "-".join(part.capitalize() for part in name.split("-"))


def go_header(fields: Iterable[Tuple[str, str]]) -> GoHeader:
    """Gather the (name, value) pairs of a header for templates."""
    header = GoHeader()
    for name, value in fields:
        header.setdefault(canonical_name(name), []).append(value)
    return header


GO_KINDS: Dict[type, Tuple[str, str]] = {           # Python's class to Go's kind and type
    type(None): ("invalid", "<nil>"), bool: ("bool", "bool"), int: ("int", "int"),
    GoMonth: ("int", "time.Month"), GoWeekday: ("int", "time.Weekday"),
    float: ("float64", "float64"), str: ("string", "string"), GoTime: ("struct", "time.Time"),
    GoStruct: ("struct", "template.Fields"), list: ("slice", "[]interface {}"),
    tuple: ("slice", "[]interface {}"), GoHeader: ("map", "mail.Header"),
    dict: ("map", "map[string]interface {}")}


def go_kind(value: Any, column: int = 0) -> str:
    """Return Go's kind of a value, such as string, slice or map; TemplateError if it has none."""
    for cls in type(value).__mro__:
        if cls in GO_KINDS:
            return GO_KINDS[cls][column]
    raise TemplateError(f"a value of Python's type {type(value).__name__} cannot be used")


def go_type(value: Any) -> str:
    """Return Go's type of a value."""
    return go_kind(value, 1)


def go_truth(value: Any) -> bool:
    """Tell whether a value is not nil, zero or empty."""
    return go_kind(value) == "struct" or bool(value)


def go_bytes(text: str) -> bytes:
    """Return the bytes of a Go string."""
    if not text.isascii():
        text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
    return text.encode("utf-8", "surrogateescape")


def go_text(data: bytes) -> str:
    """Return bytes as a Go string."""
    return data.decode("utf-8", "surrogateescape")


# -- Templates: printing, as Go's fmt and time do --

GO_VERB = re.compile(r"%([-+0 ]*)([0-9]*)(?:(\.)([0-9]*))?(.?)", re.S)
GO_ESCAPES = {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t",
              "\v": "\\v", "\\": "\\\\"}
GO_STRING = "2006-01-02 15:04:05.999999999 -0700 MST"       # how a time prints
RFC3339_NANO = "2006-01-02T15:04:05.999999999Z07:00"


class GoFormat(NamedTuple):
    """One verb of printf with its flags."""
    verb: str = "v"
    flags: str = ""
    width: int = 0
    precision: Optional[int] = None

    def number(self, value: float, style: str) -> str:
        """Return a number in its field; the style is what Python calls the verb."""
        if isinstance(value, int) and self.precision is not None:
            size = self.precision + (value < 0 or "+" in self.flags or " " in self.flags)
            digits = GoFormat("d", self.flags.replace("-", "") + "0", size).number(value, style)
            return self._replace(flags=self.flags.replace("0", "")).pad(digits)
        align = "<" if "-" in self.flags else "0=" if "0" in self.flags else ">"
        sign = "+" if "+" in self.flags else " " if " " in self.flags else ""
        return format(value, f"{align}{sign}{self.width}{style}")

    def fraction(self, value: float, style: str) -> str:
        """Return a floating point number in its field."""
        return self.number(value, f".{6 if self.precision is None else self.precision}{style}")

    def shortest(self, value: float) -> str:
        """Return the fewest digits that give a number back, with an exponent where Go has one."""
        if self.precision is not None:
            return self.fraction(value, "g")
        digits = len(re.sub(r"e.*|\D", "", repr(value)).strip("0")) or 1
        exponent = int(f"{value:e}".partition("e")[2] or 0)
        return self.number(value, f".{max(digits - 1 - exponent, 0)}f" if -4 <= exponent < 6
                           else f".{digits - 1}e")

    def pad(self, text: str) -> str:
        """Return what is no number in its field."""
        if "-" in self.flags:
            return text.ljust(self.width)
        return text.rjust(self.width, "0" if "0" in self.flags else " ")


def go_quote(text: str, quote: str = '"') -> str:
    """Return text as a Go literal."""
    def escape(match: "re.Match[str]") -> str:
        char = match.group()
        code = ord(char)
        if char in GO_ESCAPES or char == quote:
            return GO_ESCAPES.get(char, "\\" + char)
        if char.isprintable():
            return char
        if code < 128 or 0xDC80 <= code < 0xDD00:
            return f"\\x{code & 255:02x}"
        return f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    return quote + re.sub(r"[^ !#-&(-\[\]-~]", escape, text) + quote


def go_char(code: int) -> str:
    """Return the character of a code."""
    return chr(code) if 0 <= code < 0xD800 or 0xE000 <= code < 0x110000 else "\ufffd"


FORMAT_TEXT: Dict[str, Callable[[GoFormat, Any], str]] = {
    **dict.fromkeys("vs", lambda spec, text: spec.pad(text[:spec.precision])),
    "q": lambda spec, text: spec.pad(go_quote(text[:spec.precision])),
    "x": lambda spec, text: spec.pad(go_bytes(text).hex()),
    "X": lambda spec, text: spec.pad(go_bytes(text).hex().upper())}
GO_FORMATS: Dict[str, Dict[str, Callable[[GoFormat, Any], str]]] = {     # by kind and verb
    "string": FORMAT_TEXT, "struct": FORMAT_TEXT,
    "int": {
        **dict.fromkeys("vd", lambda spec, value: spec.number(value, "d")),
        **dict.fromkeys("xX", lambda spec, value: spec.number(value, spec.verb)),
        "c": lambda spec, value: spec.pad(go_char(value)),
        "q": lambda spec, value: spec.pad(go_quote(go_char(value), "'")),
        "U": lambda spec, value: spec.pad(f"U+{value % (1 << 64):04X}")},
    "float64": {
        **dict.fromkeys("vg", GoFormat.shortest),
        **dict.fromkeys("ef", lambda spec, value: spec.fraction(value, spec.verb))},
    "bool": dict.fromkeys("vt", lambda spec, value: spec.pad(str(value).lower())),
    "invalid": {"v": lambda spec, value: spec.pad("<nil>")}}


def go_format(run: "Rendering", spec: GoFormat, value: Any, depth: int = 0) -> str:
    """Print any value with one verb, elements and all."""
    run.spend(1)
    if depth > MAX_VALUE_DEPTH:
        raise TemplateError("a value holds itself, or too many in each other")
    kind, plain = go_kind(value), value
    if kind == "slice":
        return " ".join(go_format(run, spec, item, depth + 1) for item in value).join("[]")
    if isinstance(value, dict):
        pairs = ([go_format(run, spec, part, depth + 1) for part in (key, value[key])]
                 for key in sorted(value))
        return f"map[{' '.join(map(':'.join, pairs))}]"
    if isinstance(value, GoTime):
        plain = format_time(value.moment, GO_STRING)
    elif isinstance(value, GoEnum):
        kind, plain = ("string", value.names[value]) if spec.verb in "vsqxX" else (kind, int(value))
    rule = GO_FORMATS[kind].get(spec.verb)
    if rule:
        text = rule(spec, plain)
    else:
        shown = go_format(run, spec._replace(verb="v"), plain, depth + 1)
        text = f"%!{spec.verb}({go_type(value)}={shown})"
    run.spend(len(text), "text")
    return text


def go_print(run: "Rendering", *values: Any) -> str:
    """Print values as fmt.Sprint: with a space between two of which neither is a string."""
    out = []
    for index, value in enumerate(values):
        if index and not isinstance(value, str) and not isinstance(values[index - 1], str):
            out.append(" ")
        out.append(go_format(run, GoFormat(), value))
    return "".join(out)


def go_sprintf(run: "Rendering", text: str, *values: Any) -> str:
    """Print values by a format, as fmt.Sprintf."""
    left = list(values)
    out = GO_VERB.sub(lambda match: format_verb(run, left, *match.groups("")), text)
    extra = (go_type(value) + ("" if value is None else "=" + go_print(run, value))
             for value in left)
    return f"{out}%!(EXTRA {', '.join(extra)})" if left else out


def format_verb(run: "Rendering", left: List[Any], flags: str, width: str, dot: str,
                precision: str, verb: str) -> str:
    """Return what stands for one verb, for which a value is taken from those left."""
    if verb == "%":
        return "%"
    if max(int(width[:9] or 0), int(precision[:9] or 0)) > MAX_GO_WIDTH:
        raise TemplateError("printf: too wide")
    if not verb or not left:
        return f"%!{verb}(MISSING)" if verb else "%!(NOVERB)"
    value = left.pop(0)
    if value is None and verb not in ("v", "T"):
        return f"%!{verb}(<nil>)"
    spec = GoFormat(verb, flags, int(width or 0), int(precision or 0) if dot else None)
    if verb in ("v", "T"):
        spec = spec._replace(verb="v", flags=flags.replace("+", ""))
    return go_format(run, spec, go_type(value) if verb == "T" else value)


LAYOUT_PART = re.compile(r"January|Jan(?![a-z])|Monday|Mon(?![a-z])|MST|002|0[1-6]|15|2006|"
                         r"_2(?!006)|[1-5]|PM|pm|[-Z]07(?::?00)?|[.,](?:0+|9+)(?![0-9])")
LAYOUT_WORDS: Dict[str, Callable[[datetime.datetime], str]] = {
    "January": lambda t: GoMonth.names[t.month], "Jan": lambda t: GoMonth.names[t.month][:3],
    "Monday": lambda t: GoWeekday.names[t.isoweekday() % 7],
    "Mon": lambda t: GoWeekday.names[t.isoweekday() % 7][:3],
    "2006": lambda t: f"{t.year:04}", "06": lambda t: f"{t.year % 100:02}",
    "01": lambda t: f"{t.month:02}", "1": lambda t: f"{t.month}",
    "02": lambda t: f"{t.day:02}", "_2": lambda t: f"{t.day:2}", "2": lambda t: f"{t.day}",
    "002": lambda t: f"{t.timetuple().tm_yday:03}", "15": lambda t: f"{t.hour:02}",
    "03": lambda t: f"{(t.hour + 11) % 12 + 1:02}", "3": lambda t: f"{(t.hour + 11) % 12 + 1}",
    "04": lambda t: f"{t.minute:02}", "4": lambda t: f"{t.minute}",
    "05": lambda t: f"{t.second:02}", "5": lambda t: f"{t.second}",
    "PM": lambda t: "AMPM"[t.hour // 12 * 2:][:2], "pm": lambda t: "ampm"[t.hour // 12 * 2:][:2],
    "-07": lambda t: format_zone(t)[:3], "-0700": lambda t: format_zone(t).replace(":", ""),
    "-07:00": lambda t: format_zone(t),
    "MST": lambda t: LAYOUT_WORDS["-0700"](t) if re.match("UTC[-+]", t.tzname() or "UTC+")
    else t.tzname() or ""}


def format_zone(moment: datetime.datetime) -> str:
    """Return a time's offset, such as -03:30."""
    minutes = int((moment.utcoffset() or datetime.timedelta()).total_seconds() / 60)
    return f"{'-+'[minutes >= 0]}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"


def format_time(moment: datetime.datetime, layout: str) -> str:
    """Format a time by an example of it, as time.Format."""
    def fill(match: "re.Match[str]") -> str:
        part = match.group()
        if part[0] == "Z":
            return LAYOUT_WORDS["-" + part[1:]](moment) if moment.utcoffset() else "Z"
        if part in LAYOUT_WORDS:
            return LAYOUT_WORDS[part](moment)
        digits = f"{moment.microsecond:06}".ljust(len(part) - 1, "0")[:len(part) - 1]
        digits = digits.rstrip("0") if part[1] == "9" else digits
        return part[0] + digits if digits else ""
    return LAYOUT_PART.sub(fill, layout)


# -- Templates: the grammar --

GO_SPACE = " \t\r\n"
GO_OPENING = re.compile(r"(?s)\{\{(-(?=[ \t\r\n]))?"              # and perhaps a comment
                        r"((?:(?<=-)[ \t\r\n])?/\*.*?\*/([ \t\r\n]-)?\}\})?")
GO_TOKEN = re.compile(r"""(?x)
    (?P<close>[ \t\r\n]+-\}\}|[ \t\r\n]*\}\})
  | (?P<space>[ \t\r\n]+)
  | (?P<text>"(?:[^"\\\n]|\\[^\n])*"|`[^`]*`)
  | (?P<number>[+-]?\.?[0-9][\w.]*(?:(?<=[eE])[+-]\w*)?)
  | (?P<field>\.\w+)|(?P<variable>\$\w*)|(?P<dot>\.)|(?P<name>\w+)
  | (?P<mark>:=|[=|(),])""")
STRING_ESCAPE = re.compile(r"""\\(?:([abfnrtv\\'"])|x([0-9a-fA-F]{2})|"""
                           r"""u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|)""")
GO_ESCAPED = dict(zip("abfnrtv\\'\"", "\a\b\f\n\r\t\v\\'\""))
GO_FLOAT = re.compile(r"[+-]?[0-9]*(?:\.[0-9]*(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)")
GO_INTS = range(-1 << 63, 1 << 63)
GO_CONSTANTS = {"true": True, "false": False, "nil": None}


class GoToken(NamedTuple):
    """Text, or a word of an action."""
    kind: str
    text: str
    place: int
    spaced: bool = False


def read_tokens(text: str) -> Iterator[GoToken]:
    """Split a template into text, white space trimmed, and the words of its actions."""
    end, trim = 0, False
    opening = GO_OPENING.search(text)
    while opening:
        plain = text[end:opening.start()].lstrip(GO_SPACE if trim else "")
        plain = plain.rstrip(GO_SPACE if opening.group(1) else "")
        yield GoToken("plain", plain, end)
        end, trim = opening.end(), bool(opening.group(3))
        if not opening.group(2):                    # no comment
            for token in read_action(text, opening.end()):
                yield token
            end, trim = token.place + len(token.text), token.text.endswith("-}}")
        opening = GO_OPENING.search(text, end)
    yield GoToken("plain", text[end:].lstrip(GO_SPACE if trim else ""), end)
    yield GoToken("end of template", "", len(text))


def read_action(text: str, place: int) -> Iterator[GoToken]:
    """Yield the words of one action, the braces around it among them."""
    yield GoToken("open", "{{", place)
    kind = ""
    while kind != "close":
        match = GO_TOKEN.match(text, place)
        if not match:
            found = f"unexpected {text[place:place + 10]!r} in an action"
            raise TemplateError(found if text[place:] else "unclosed action", place)
        spaced, kind, word = kind == "space", match.lastgroup or "", match.group()
        if kind != "space":
            yield GoToken(word if kind == "mark" else kind, word, place, spaced)
        place = match.end()


def unquote_go(literal: str) -> str:
    """Return the value of a Go string or character literal; raise TemplateError if it is none."""
    if literal[0] == "`":
        return literal[1:-1].replace("\r", "")

    def unescape(match: "re.Match[str]") -> str:
        plain, byte, short, long = match.groups()
        if plain:
            return GO_ESCAPED[plain]
        code = int(byte or short or long or "d800", 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise TemplateError(f"{literal[:40]} is no valid literal")
        return chr(0xDC00 + code if byte and code > 127 else code)
    return go_text(go_bytes(STRING_ESCAPE.sub(unescape, literal[1:-1])))


def read_number(text: str) -> Union[int, float]:
    """Return the value of a number as Go spells it; raise TemplateError if it is none."""
    octal = re.sub(r"\A([+-]?)0(?=[0-7_])", r"\g<1>0o", text)
    value: Union[int, float] = math.inf
    if re.fullmatch("[!-~]{1,99}", text):
        try:
            value = float(text) if GO_FLOAT.fullmatch(text) else int(octal, 0)
        except ValueError:
            pass
    if value in GO_INTS if isinstance(value, int) else math.isfinite(value):
        return value
    raise TemplateError(f"bad number {text[:40]}")


GO_LITERALS: Dict[str, Callable[[str], Any]] = {"text": unquote_go, "number": read_number}


# -- Templates: reading and rendering --

class GoFunction(NamedTuple):
    """What a template may call; `kinds` are those of its arguments, the last for all the rest."""
    call: Callable[..., Any]
    kinds: Tuple[str, ...]
    variadic: bool
    wants_run: bool


def not_here() -> NoReturn:
    """Stand for what the caller of render did not hand in."""
    raise TemplateError("there is no clock or random number here")


class Surroundings(NamedTuple):
    """What functions learn of the world; `zones` finds a time zone by name, Local among them."""
    env: Mapping[str, str] = types.MappingProxyType({})
    now: Callable[[], datetime.datetime] = not_here
    uuid: Callable[[], str] = not_here
    zones: Callable[[str], Optional[datetime.tzinfo]] = {"UTC": datetime.timezone.utc}.get


NO_SURROUNDINGS = Surroundings()


class Rendering:
    """One run of a template: its variables, output, and what it may still spend."""

    def __init__(self, templates: Mapping[str, "GoNodes"], world: Surroundings,
                 max_output: int, max_steps: int) -> None:
        self.templates, self.world = templates, world
        self.variables: Dict[int, Any] = {}
        self.output: List[str] = []
        self.left = {"steps": max_steps, "output": max_output, "text": 2 * max_output}
        self.place, self.depth = 0, 0               # the place of the last term, for errors

    def spend(self, amount: int, what: str = "steps") -> None:
        """Count work, output, or text that functions make; TemplateError when it is too much."""
        self.left[what] -= amount
        if self.left[what] < 0:
            raise TemplateError(f"too much to do: the {what} allowed are used up")

    def write(self, text: str) -> None:
        """Add to the output."""
        self.spend(len(text), "output")
        self.output.append(text)

    def walk(self, nodes: "GoNodes", dot: Any) -> str:
        """Write nodes; return break or continue if one of them says so."""
        for place, node in nodes:
            self.spend(1)
            self.place = place
            jump = node(self, dot)
            if jump:
                return jump
        return ""

    def walk_template(self, name: str, dot: Any) -> None:
        """Write a template, which sees no variable but its own $."""
        if name not in self.templates:
            raise TemplateError(f"template {go_quote(name)} is not defined")
        if self.depth > MAX_TEMPLATE_DEPTH:
            raise TemplateError("templates call each other too deeply")
        variables, self.variables = self.variables, {0: dot}
        self.depth += 1
        self.walk(self.templates[name], dot)
        self.depth -= 1
        self.variables = variables

    def field(self, value: Any, name: str, given: Sequence[Any]) -> Any:
        """Return a field of a value, or the result of a method."""
        method = GO_METHODS.get(type(value), {}).get(name)
        if method:
            return self.call(name, method, given, value)
        if value is None:
            return None
        if not isinstance(value, dict) or isinstance(value, GoStruct) and name not in value:
            raise TemplateError(f"can't evaluate field {name} in type {go_type(value)}")
        if given:
            raise TemplateError(f"{name} is not a method but has arguments")
        return value.get(name)

    def call(self, name: str, function: GoFunction, given: Sequence[Any], *target: Any) -> Any:
        """Call a function with arguments of the kinds it takes; count what that costs."""
        least = len(function.kinds) - function.variadic
        if len(given) < least or len(given) > least and not function.variadic:
            raise TemplateError(f"wrong number of arguments for {name}: wants {least}"
                                f"{' or more' if function.variadic else ''}, got {len(given)}")
        for value, kind in zip(given, function.kinds):
            if kind not in ("any", go_kind(value), go_type(value)):
                raise TemplateError(f"wrong type for {name}: wants {kind}, got {go_type(value)}")
        self.spend(1 + sum(len(text) >> TEXT_STEP for text in given if isinstance(text, str)))
        result = function.call(*[self] * function.wants_run, *target, *given)
        if isinstance(result, str):
            self.spend(len(result), "text")
            self.spend(len(result) >> TEXT_STEP)
        elif isinstance(result, (list, dict)):
            self.spend(len(result) >> ELEMENT_STEP)
        return result


GoNode = Callable[[Rendering, Any], Optional[str]]       # writes; says break or continue, perhaps
GoNodes = Sequence[Tuple[int, GoNode]]                   # with their places
GoPipe = Callable[[Rendering, Any], Any]                 # returns the value of a pipeline
GoTerm = Callable[..., Any]    # the same of a term; is given arguments, and what the left gave


def write_text(text: str) -> GoNode:
    """Return what writes a text."""
    return lambda run, dot: run.write(text)


def range_elements(value: Any, names: int) -> Iterable[Tuple[Any, Any]]:
    """Return the keys and elements that {{range}} goes through."""
    kind = go_kind(value)
    if kind == "map":
        return [(key, value[key]) for key in sorted(value)]
    if kind == "int" and names < 2:
        return ((None, number) for number in range(value))
    if kind in ("slice", "invalid"):
        return enumerate(value or ())
    raise TemplateError(f"range can't iterate over type {go_type(value)}")


def decide(name: str, run: Rendering, dot: Any, args: Sequence[GoTerm] = (),
           last: Sequence[Any] = ()) -> Any:
    """Return the first argument of `and` or `or` that decides, else the last."""
    if not args and not last:
        raise TemplateError(f"wrong number of arguments for {name}: got 0")
    value = None
    for arg in args:
        value = arg(run, dot)
        if go_truth(value) == (name == "or"):
            return value
    return last[0] if last else value


class TemplateParser:
    """Reads one template into functions that write it; made by Template."""

    def __init__(self) -> None:
        self.tokens: List[GoToken] = []
        self.index, self.place, self.depth, self.loops = 0, 0, 0, 0
        self.names = ["$"]                          # of the variables in scope
        self.templates: Dict[str, GoNodes] = {}

    def parse_all(self, name: str, text: str) -> Dict[str, GoNodes]:
        """Return all templates by name, the whole under the name given."""
        self.tokens = list(read_tokens(text))
        self.templates[name] = self.parse_body("end of template")[0]
        return self.templates

    @property
    def token(self) -> GoToken:
        """The token at hand."""
        return self.tokens[self.index]

    def take(self, *kinds: str) -> Optional[GoToken]:
        """Pass over the token at hand and return it, if it is of one of the kinds."""
        token = self.token
        if token.kind not in kinds:
            return None
        self.index, self.place = self.index + 1, token.place
        return token

    def need(self, context: str, *kinds: str) -> GoToken:
        """Pass over the token at hand, which must be of one of the kinds."""
        return self.take(*kinds) or self.refuse(context)

    def refuse(self, context: str) -> NoReturn:
        """Raise the error that the token at hand does not belong there."""
        shown = "text" if self.token.kind == "plain" else self.token.text.strip()[:40]
        raise TemplateError(f"unexpected {shown or self.token.kind} in {context}", self.token.place)

    def nest(self, by: int) -> None:
        """Go one block or parenthesis deeper, or back."""
        self.depth += by
        if self.depth > MAX_TEMPLATE_DEPTH:
            raise TemplateError("nested too deeply")

    def parse_body(self, *ends: str) -> Tuple[GoNodes, str]:
        """Read nodes up to one of the words that may end them, and all of {{end}}; return both."""
        nodes: List[Tuple[int, GoNode]] = []
        self.nest(1)
        while self.token.kind not in ends:
            token = self.take("plain", "open")
            if token is None:
                raise TemplateError("an {{end}} is missing", self.token.place)
            if token.kind == "plain":
                nodes.append((token.place, write_text(token.text)))
            elif self.token.kind == "name" and self.token.text in ends:
                break
            else:
                nodes.append((token.place, self.parse_action()))
        self.nest(-1)
        self.index += 1
        end = self.tokens[self.index - 1].text
        if end == "end":
            self.need(end, "close")
        return nodes, end

    def parse_action(self) -> GoNode:
        """Read one action from its first word on."""
        word = self.token.text if self.token.kind == "name" else ""
        if word in TEMPLATE_RULES:
            rule = TEMPLATE_RULES[word] or self.refuse("no block")
            self.index += 1
            return rule(self, word)
        pipe, slots = self.parse_pipe("a command")

        def write(run: Rendering, dot: Any) -> None:
            value = pipe(run, dot)
            if not slots:
                run.write("<no value>" if value is None else go_print(run, value))
        return write

    def parse_control(self, word: str) -> GoNode:
        """Read {{if}}, {{with}} or {{range}} up to its {{end}}."""
        scope, other = len(self.names), ()          # type: int, GoNodes
        pipe, slots = self.parse_pipe(word)
        self.loops += word == "range"
        body, end = self.parse_body("else", "end")
        self.loops -= word == "range"
        if end == "else" and word != "range" and self.token[:2] == ("name", word):
            self.index += 1
            self.nest(1)
            other = [(self.place, self.parse_control(word))]
            self.nest(-1)
        elif end == "else":
            self.need(end, "close")
            other = self.parse_body("end")[0]
        del self.names[scope:]
        return self.loop(pipe, slots, body, other) if word == "range" else \
            self.branch(pipe, word == "with", body, other)

    def branch(self, pipe: GoPipe, moves: bool, body: GoNodes, other: GoNodes) -> GoNode:
        """Return what writes an {{if}} or {{with}}; the latter moves the dot."""
        def write(run: Rendering, dot: Any) -> str:
            value = pipe(run, dot)
            return run.walk(body, value if moves else dot) if go_truth(value) else \
                run.walk(other, dot)
        return write

    def loop(self, pipe: GoPipe, slots: Sequence[int], body: GoNodes, other: GoNodes) -> GoNode:
        """Return what writes a {{range}}."""
        def write(run: Rendering, dot: Any) -> str:
            ran = False
            for pair in range_elements(pipe(run, dot), len(slots)):
                run.spend(1)
                run.variables.update(zip(slots, pair[-len(slots):]))
                ran = True
                if run.walk(body, pair[1]) == "break":
                    break
            return "" if ran else run.walk(other, dot)
        return write

    def parse_jump(self, word: str) -> GoNode:
        """Read {{break}} or {{continue}}."""
        self.need(word, "close")
        if not self.loops:
            raise TemplateError(f"{{{{{word}}}}} outside of a {{{{range}}}}")
        return lambda run, dot: word

    def parse_template(self, word: str) -> GoNode:
        """Read {{template}}, {{block}}, which also defines it, or {{define}}, which writes none."""
        name = unquote_go(self.need(word, "text").text)
        has_pipe = word == "block" or word == "template" and self.token.kind != "close"
        pipe = self.parse_pipe(word)[0] if has_pipe else self.need(word, "close") and None
        if word != "template":
            names, loops, self.names, self.loops = self.names, self.loops, ["$"], 0
            if name in self.templates:
                raise TemplateError(f"template {go_quote(name)} is defined twice")
            self.templates[name] = self.parse_body("end")[0]
            self.names, self.loops = names, loops
        if word == "define":
            return lambda run, dot: None
        return lambda run, dot: run.walk_template(name, pipe(run, dot) if pipe else None)

    def parse_pipe(self, context: str, end: str = "close") -> Tuple[GoPipe, Sequence[int]]:
        """Read variables and commands up to the closing braces or parenthesis."""
        place, slots = self.token.place, self.parse_variables(context)
        commands = [self.parse_command(context)]
        while self.take("|"):
            commands.append(self.parse_command(context))
        self.need(context, end)

        def pipe(run: Rendering, dot: Any) -> Any:
            last: Sequence[Any] = ()
            for term, *args in commands:
                last = [term(run, dot, args, last)]
            run.variables.update((slot, last[0]) for slot in slots)
            run.place = place
            return last[0]
        return pipe, slots

    def parse_variables(self, context: str) -> Sequence[int]:
        """Read `$x :=`, `$x =` or `$i, $x :=`, if they are there; return where they are kept."""
        kinds = [token.kind for token in self.tokens[self.index:self.index + 4]]
        size = 4 if kinds[:3] == ["variable", ",", "variable"] and context == "range" else 2
        if kinds[0] != "variable" or kinds[size - 1:size] not in ([":="], ["="]):
            return ()
        tokens = [self.need(context, kind) for kind in kinds[:size]]
        if tokens[-1].kind == ":=":
            self.names += [token.text for token in tokens[::2]]
            if len(self.names) > MAX_TEMPLATE_VARIABLES:
                raise TemplateError("too many variables")
        return [self.find_variable(token.text) for token in tokens[::2]]

    def find_variable(self, name: str) -> int:
        """Return where a variable is kept, which must be in scope."""
        if name not in self.names:
            raise TemplateError(f"undefined variable {go_quote(name)}")
        return max(slot for slot, known in enumerate(self.names) if known == name)

    def parse_command(self, context: str) -> Sequence[GoTerm]:
        """Read a term and its arguments."""
        terms = [self.parse_term(context)]
        while self.token.kind not in ("close", "|", ")"):
            if not self.token.spaced:
                self.refuse("an operand")
            terms.append(self.parse_term(context))
        return terms

    def parse_term(self, context: str) -> GoTerm:
        """Read a term with the fields behind it."""
        token = self.need(context, "name", "dot", "field", "variable", "(", *GO_LITERALS)
        if token.text in ("and", "or"):
            return functools.partial(decide, token.text)
        operand = self.parse_operand(token)
        names = [token.text[1:]] if token.kind == "field" else []
        while self.token.kind == "field" and not self.token.spaced:
            if token.kind in ("dot", *GO_LITERALS) or token.text in ("nil", "true", "false"):
                self.refuse("an operand")
            names.append(self.need(context, "field").text[1:])
        is_function = token.kind == "name" and token.text not in GO_CONSTANTS

        def term(run: Rendering, dot: Any, args: Sequence[GoTerm] = (), last: Sequence[Any] = ()
                 ) -> Any:
            run.spend(1)
            given = [*(arg(run, dot) for arg in args), *last]
            run.place = token.place
            if given and not names and not is_function:
                raise TemplateError("can't give an argument to what is no function")
            value = operand(run, dot, () if names else given)
            for left, name in zip(range(len(names), 0, -1), names):
                value = run.field(value, name, given if left == 1 else ())
            return value
        return term

    def parse_operand(self, token: GoToken) -> GoTerm:
        """Return what gives the value that a token begins."""
        if token.kind == "variable":
            slot = self.find_variable(token.text)
            return lambda run, dot, given: run.variables.get(slot)
        if token.kind == "(":
            self.nest(1)
            pipe = self.parse_pipe("parentheses", ")")[0]
            self.nest(-1)
            return lambda run, dot, given: pipe(run, dot)
        if token.kind in GO_LITERALS or token.text in GO_CONSTANTS:
            value = GO_LITERALS.get(token.kind, GO_CONSTANTS.get)(token.text)
            return lambda run, dot, given: value
        if token.kind != "name":
            return lambda run, dot, given: dot
        if token.text not in TEMPLATE_FUNCTIONS:
            raise TemplateError(f"function {go_quote(token.text[:40])} is not defined")
        return lambda run, dot, given: run.call(token.text, TEMPLATE_FUNCTIONS[token.text], given)


TEMPLATE_RULES: Dict[str, Optional[Callable[[TemplateParser, str], GoNode]]] = {
    **dict.fromkeys(("if", "with", "range"), TemplateParser.parse_control),
    **dict.fromkeys(("break", "continue"), TemplateParser.parse_jump),
    **dict.fromkeys(("template", "block", "define"), TemplateParser.parse_template),
    "else": None, "end": None}


class Template:
    """A template in Go's language, ready to be rendered; TemplateError if it cannot be read."""

    def __init__(self, text: str, name: str = "template") -> None:
        self.text, self.name = text, name
        parser = TemplateParser()
        try:
            self.templates = parser.parse_all(name, text)
        except TemplateError as error:
            raise error.locate(name, text, parser.place) from None

    @property
    def is_plain(self) -> bool:
        """Tell whether there is nothing to render, the text standing for itself."""
        return "{{" not in self.text

    def render(self, fields: Mapping[str, Any], world: Surroundings = NO_SURROUNDINGS,
               max_output: int = MAX_TEMPLATE_OUTPUT, max_steps: int = MAX_TEMPLATE_STEPS) -> str:
        """Return the text for these fields; raise TemplateError, also where a bound is passed."""
        run = Rendering(self.templates, world, max_output, max_steps)
        try:
            run.walk_template(self.name, GoStruct(fields))
        except (TemplateError, RecursionError) as error:    # the stack left depends on who called
            known = error if isinstance(error, TemplateError) else TemplateError("nests too deeply")
            raise known.locate(self.name, self.text, run.place) from None
        return go_text(go_bytes("".join(run.output)))

    def check(self, sample: Mapping[str, Any], world: Surroundings = NO_SURROUNDINGS) -> None:
        """Raise TemplateError if the template fails for sample fields, as one that names others."""
        self.render(sample, world)


# -- Templates: regular expressions, as RE2 reads them and in linear time --
#
# https://github.com/google/re2/wiki/Syntax. Python's re takes exponential time on some patterns, so
# it only looks at single characters here. A pattern becomes steps; the ways through them are tried
# best first, and no step twice at one place of the text, where it would only fail again.

MAX_REGEX_SIZE = 5000         # characters and steps of one pattern
MAX_REGEX_REPEAT = 1000       # as in RE2
MAX_REGEX_TEXT = 1 << 20      # in characters
MAX_REGEX_TRIES = 400000      # of a step at a place, in one call; measured: 0.8 s
MAX_REGEX_STARTS = 8          # characters to look out for at once
PATTERN_STEPS = 3             # a character of a pattern is 1 << 3 steps,
SCAN_STEP = 6                 # and 1 << 6 characters of a text are one
REGEX_CHAR = re.compile(r"""(?xs)
    (?P<test>\\[AzbB]|\^|\$)
  | \\x(?:\{(?P<wide>[0-9A-Fa-f]{1,6})\}|(?P<code>[0-9A-Fa-f]{2}))
  | (?P<escape>\\[dDwWsSaftnrv]|\\[!-/:-@\[-`{-~]|\.)
  | \[(?P<not>\^?)(?P<set>\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*)\]
  | (?P<plain>[^\\()*+?|\[])""")
SET_ITEM = re.compile(r"(?s)(?:\[:(\^?\w+):\]|(\\[dDwWsSaftnrvx]|\\[^A-Za-z0-9])|(\\.)|(.))"
                      r"(-(?!\Z))?")
REGEX_GROUP = re.compile(r"(?a)\((?:\?(?:P?<([A-Za-z_]\w*)>|([ims]*)(?:-([ims]+))?([:)]))|(?!\?))")
REGEX_REPEAT = re.compile(r"(?:([*+?])|\{([0-9]{1,4})(,([0-9]{0,4}))?\})(\??)")
REGEX_TESTS = {"^": r"\A", "$": r"\Z", r"\z": r"\Z", r"\B": r"(?!\b)"}     # "" has a \B in RE2
POSIX_SETS = {"alpha": "A-Za-z", "digit": "0-9", "alnum": "0-9A-Za-z", "upper": "A-Z",
              "lower": "a-z", "space": r"\t\n\v\f\r ", "word": "0-9A-Za-z_", "blank": r"\t ",
              "xdigit": "0-9A-Fa-f", "punct": r"!-/:-@\[-`{-~"}
RE_TEST, RE_SPLIT, RE_SAVE, RE_MATCH = range(4)
RegexStep = Tuple[int, Any, Any]     # what to do; a test and its source, ways to go, or a number


def regex_fault(reason: str) -> TemplateError:
    """Return an error about a pattern."""
    return TemplateError(f"regular expression: {reason}")


class RegexParser:
    """What has been read of a pattern; TemplateError for what RE2 does not know."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.place, self.depth = pattern, 0, 0
        self.groups: List[Optional[str]] = [None]           # their names

    def next_char(self) -> str:
        """Return the character to be read next, none at the end."""
        return self.pattern[self.place:self.place + 1]

    def parse_all(self) -> List[RegexStep]:
        """Read the whole pattern."""
        steps = self.parse_choice("")
        if self.next_char():
            raise regex_fault("unexpected )")
        return [*steps, (RE_MATCH, None, "")]

    def parse_choice(self, flags: str) -> List[RegexStep]:
        """Read alternatives up to a closing parenthesis."""
        steps, flags = self.parse_sequence(flags)
        ways = [steps]
        while self.next_char() == "|":
            self.place += 1
            steps, flags = self.parse_sequence(flags)
            ways.append(steps)
        steps = ways.pop()
        for way in ways[::-1]:
            steps = [(RE_SPLIT, 1, len(way) + 2), *way, (RE_SPLIT, len(steps) + 1, None), *steps]
        return steps

    def parse_sequence(self, flags: str) -> Tuple[List[RegexStep], str]:
        """Read what stands one behind the other; return it, and the flags set at its end."""
        steps: List[RegexStep] = []
        while self.next_char() not in ("", "|", ")"):
            group = REGEX_GROUP.match(self.pattern, self.place)
            if group:
                self.place = group.end()
                inner = "".join({*flags, *(group.group(2) or "")} - {*(group.group(3) or "")})
            if group and group.group(4) == ")":
                flags = inner
                continue
            steps += self.parse_repeat(self.parse_group(inner, group) if group
                                       else [self.parse_char(flags)])
            if len(steps) > MAX_REGEX_SIZE:
                raise regex_fault("too large")
        return steps, flags

    def parse_group(self, flags: str, group: "re.Match[str]") -> List[RegexStep]:
        """Read a group from behind its opening on."""
        number, is_noted = 2 * len(self.groups), not group.group(4)
        self.groups += [group.group(1)] * is_noted
        self.depth += 1
        if self.depth > MAX_TEMPLATE_DEPTH:
            raise regex_fault("nested too deeply")
        steps = self.parse_choice(flags)
        if not self.next_char():
            raise regex_fault("missing )")
        self.place += 1
        self.depth -= 1
        return [(RE_SAVE, number, None), *steps, (RE_SAVE, number + 1, None)] if is_noted else steps

    def parse_char(self, flags: str) -> RegexStep:
        """Read one character, class, or test of a place."""
        match = REGEX_CHAR.match(self.pattern, self.place)
        if not match:
            raise regex_fault(f"cannot read {self.pattern[self.place:][:10]!r}")
        self.place = match.end()
        source = translate_char(match, flags)
        flags += "a" if re.search(r"\\[dDwWsSbB]", source) else ""    # as in RE2, unlike cases
        source = f"(?{flags}:{source})" if flags else source
        try:
            return RE_TEST, re.compile(source).match, source
        except re.error as error:
            raise regex_fault(str(error)) from None

    def parse_repeat(self, piece: List[RegexStep]) -> List[RegexStep]:
        """Read how often a piece may come; return it so often."""
        match = REGEX_REPEAT.match(self.pattern, self.place)
        if not match:
            return piece
        self.place = match.end()
        sign, low, comma, high, lazy = match.groups()
        least = int(low or sign == "+")
        most = None if sign and sign in "*+" or comma and not high else int(high or low or 1)
        count = max(least, 1 if most is None else most)
        if REGEX_REPEAT.match(self.pattern, self.place) or count > MAX_REGEX_REPEAT \
                or len(piece) * count > MAX_REGEX_SIZE or most is not None and most < least:
            raise regex_fault("bad repetition")

        def split(more: int, enough: int) -> RegexStep:
            return (RE_SPLIT, enough, more) if lazy else (RE_SPLIT, more, enough)
        if most is None:                                    # x* is (x+)?, so that x may be empty
            steps = [*piece * max(least, 1), split(-len(piece), 1)]
            return steps if least else [split(1, len(steps) + 1), *steps]
        steps = piece * least
        for left in range(most - least, 0, -1):
            steps += [split(1, left * (len(piece) + 1)), *piece]
        return steps


def translate_char(match: "re.Match[str]", flags: str) -> str:
    """Return the pattern of one character as Python writes it."""
    text, kind = match.group(), match.lastgroup
    if kind == "test":
        return text if "m" in flags and text in "^$" else REGEX_TESTS.get(text, text)
    if kind in ("wide", "code"):
        return re.escape(chr(min(int(match.group(kind), 16), 0x10FFFF)))
    if kind == "set":
        return f"[{match.group('not')}{SET_ITEM.sub(translate_item, match.group('set'))}]"
    return text if kind == "escape" else re.escape(text)


def translate_item(match: "re.Match[str]") -> str:
    """Return one item of a character class as Python writes it."""
    name, escape, bad, char, dash = match.groups("")
    if bad or name and name not in POSIX_SETS:
        raise regex_fault(f"cannot read {match.group()}")
    item = POSIX_SETS.get(name) or escape or re.escape(char)
    return item + ("\\" if dash and (name or escape[1:] in tuple("dDwWsS")) else "") + dash


def find_starts(steps: Sequence[RegexStep]) -> str:
    """Return a pattern, quick to search, that fits wherever a match can begin."""
    todo, seen, sources = [0], set(), set()
    while todo:
        at = todo.pop()
        kind, first, second = steps[at]
        if at not in seen and kind in (RE_TEST, RE_MATCH):
            sources.add(second)
        elif at not in seen:
            todo += [at + way for way in ((1,) if kind == RE_SAVE else (first, second)) if way]
        seen.add(at)
    return "" if "" in sources or len(sources) > MAX_REGEX_STARTS else f"(?={'|'.join(sources)})"


class GoRegex:
    """A regular expression in RE2's syntax; made by read_regex."""

    def __init__(self, pattern: str) -> None:
        parser = RegexParser(pattern)
        self.steps, self.groups = parser.parse_all(), parser.groups
        self.starts = re.compile(find_starts(self.steps))

    def search(self, text: str, start: int, tried: Set[int], limit: int
               ) -> Optional[Dict[int, int]]:
        """Return where the first match from there on begins and ends, then where its groups do."""
        size = len(self.steps)
        for candidate in self.starts.finditer(text, start):
            todo: List[Tuple[int, int, Any]] = [(0, candidate.start(), (0, candidate.start(), ()))]
            while todo:
                at, place, saved = todo.pop()
                if len(tried) > limit:
                    raise regex_fault("too many steps on this text")
                while (key := place * size + at) not in tried:
                    tried.add(key)
                    kind, first, second = self.steps[at]
                    if kind == RE_TEST:
                        found = first(text, place)
                        if not found:
                            break
                        at, place = at + 1, found.end()
                    elif kind == RE_SAVE:
                        at, saved = at + 1, (first, place, saved)
                    elif kind == RE_MATCH:
                        return read_places((1, place, saved))
                    else:
                        todo += [(at + way, place, saved) for way in (second, first) if way]
                        break
        return None

    def find_all(self, run: Rendering, text: str) -> Iterator[Dict[int, int]]:
        """Yield all matches; as in Go, an empty one right behind another does not count."""
        tried: Set[int] = set()         # kept from match to match, so that all take linear time
        limit = min(MAX_REGEX_TRIES, run.left["steps"] << ELEMENT_STEP)
        place, end, size, spent = 0, -1, len(self.steps), 0
        while place <= len(text):
            found = self.search(text, place, tried, limit)
            run.spend(1 + ((len(tried) - spent + size) >> ELEMENT_STEP))
            if found is None:
                return
            if found[1] > found[0] or found[0] != end:
                yield found
            end = found[1]
            place = end + (found[1] == found[0])
            tried.difference_update(range(end * size, (end + 1) * size))    # these did not fail
            spent = len(tried)


def read_places(saved: Any) -> Dict[int, int]:
    """Return the latest place noted under each number."""
    found: Dict[int, int] = {}
    while saved:
        number, place, saved = saved
        found.setdefault(number, place)
    return found


@functools.lru_cache(maxsize=64)
def read_regex(pattern: str) -> GoRegex:
    """Return a regular expression ready for use."""
    return GoRegex(pattern)


def go_regex(run: Rendering, pattern: str, text: str) -> Tuple[GoRegex, Iterator[Dict[int, int]]]:
    """Return a regular expression and its matches in a text."""
    if len(pattern) > MAX_REGEX_SIZE or len(text) > MAX_REGEX_TEXT:
        raise regex_fault("the pattern or text has too many characters")
    run.spend((len(pattern) << PATTERN_STEPS) + (len(text) >> SCAN_STEP))
    regex = read_regex(pattern)
    return regex, regex.find_all(run, text)


def go_regex_find(run: Rendering, pattern: str, text: str) -> str:
    """Return the first part of a text that a pattern matches."""
    found = next(go_regex(run, pattern, text)[1], None)
    return text[found[0]:found[1]] if found else ""


def expand_groups(groups: Sequence[Optional[str]], found: Dict[int, int], text: str, template: str
                  ) -> str:
    """Return a replacement, $1, ${1} and ${name} filled in."""
    def fill(match: "re.Match[str]") -> str:
        name = match.group(1) or match.group(2)
        if not name:
            return "$"
        number = int(name) if re.fullmatch("0|[1-9][0-9]{0,8}", name) else \
            groups.index(name) if name in groups else -1
        return text[found[2 * number]:found[2 * number + 1]] if 2 * number in found else ""
    return re.sub(r"(?a)\$(?:\$|(\w+)|\{(\w+)\})", fill, template)


def go_regex_replace(run: Rendering, pattern: str, text: str, template: str) -> str:
    """Replace what a pattern matches; $1 stands for the first group."""
    regex, matches = go_regex(run, pattern, text)
    out, end = [], 0
    for found in matches:
        run.spend(1 + template.count("$") + (len(template) >> TEXT_STEP))
        out += [text[end:found[0]], expand_groups(regex.groups, found, text, template)]
        run.spend(len(out[-1]), "text")
        end = found[1]
    return "".join(out) + text[end:]


# -- Templates: the functions; one whose first parameter is named run is given the Rendering --

WORD_START = re.compile(r"(?:\A|(?<=[\x00-/:-@\[-^`{-\x7f\s]))\w")
HTML_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;",
                              "\0": "\ufffd"})
JS_ESCAPES = str.maketrans({
    **{chr(code): f"\\u{code:04X}" for code in (*range(32), *b"<>&=\x7f", 0x2028, 0x2029)},
    "\\": "\\\\", "'": "\\'", '"': '\\"'})
GO_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
SECOND, MILLISECOND = datetime.timedelta(seconds=1), datetime.timedelta(milliseconds=1)


def go_equal(first: Any, second: Any) -> bool:
    """Compare two values as eq does; raise TemplateError for kinds that cannot be."""
    kinds = {go_kind(first), go_kind(second)}
    if "invalid" in kinds:
        return len(kinds) == 1
    if len(kinds) > 1 or kinds & {"slice", "map"}:
        raise TemplateError(f"can't compare {go_type(first)} and {go_type(second)}")
    return bool(first == second)


def go_less(first: Any, second: Any) -> bool:
    """Compare two values as lt does."""
    kind = go_kind(first)
    if kind != go_kind(second) or kind not in ("int", "float64", "string"):
        raise TemplateError(f"can't compare {go_type(first)} and {go_type(second)}")
    return bool(first < second)


def go_index(value: Any, *indexes: Any) -> Any:
    """Return an element of a list or map, an element of that, and so on."""
    if value is None:
        raise TemplateError("index of nil")
    for index in indexes:
        if go_kind(value) == "map" and isinstance(index, str):
            value = value.get(index, [] if isinstance(value, GoHeader) else None)
        elif go_kind(value) in ("slice", "string") and go_kind(index) == "int":
            items = go_bytes(value) if isinstance(value, str) else value
            if not 0 <= index < len(items):
                raise TemplateError(f"index out of range: {index}")
            value = items[index]
        else:
            raise TemplateError(f"can't index {go_type(value)} with {go_type(index)}")
    return value


def go_slice(value: Any, *indexes: Any) -> Any:
    """Return a part of a list, or of a string by bytes."""
    items = go_bytes(value) if isinstance(value, str) else value
    if go_kind(value) not in ("slice", "string") or len(indexes) > 3 - isinstance(value, str):
        raise TemplateError(f"can't slice {go_type(value)} by {len(indexes)} indexes")
    if any(go_kind(index) != "int" for index in indexes):
        raise TemplateError("can't slice by what is no number")
    bounds = [0, *indexes, len(items)] if indexes else [0, 0, len(items)]
    if bounds != sorted(bounds):
        raise TemplateError("slice index out of range")
    part = items[bounds[1]:bounds[2]]
    return go_text(part) if isinstance(part, bytes) else part


def go_len(value: Any) -> int:
    """Return a length, of a string in bytes."""
    if go_kind(value) not in ("slice", "map", "string"):
        raise TemplateError(f"len of type {go_type(value)}")
    return len(go_bytes(value)) if isinstance(value, str) else len(value)


def go_string(run: Rendering, value: Any) -> str:
    """Return a value as text."""
    return value if isinstance(value, str) else go_format(run, GoFormat(), value)


def go_strings(run: Rendering, value: Any) -> List[str]:
    """Return the elements that are not nil as texts; what is no list counts as one."""
    values = value if go_kind(value) == "slice" else [value]
    return [go_string(run, element) for element in values if element is not None]


def go_int64(value: int) -> int:
    """Return a number as 64 bits hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def go_int(value: Any) -> int:
    """Return any value as a whole number, 0 if it is none."""
    if isinstance(value, str):
        try:
            value = read_number(re.sub(r"\.0+\Z", "", value[:100]))
        except TemplateError:
            return 0
        return value if isinstance(value, int) else 0
    if isinstance(value, float):
        return int(value) if abs(value) < 1 << 63 else -1 << 63
    return go_int64(value) if isinstance(value, int) else 0


def go_divide(first: Any, second: Any) -> int:
    """Return a quotient, cut toward zero."""
    dividend, divisor = go_int(first), go_int(second)
    if not divisor:
        raise TemplateError("integer divide by zero")
    quotient = abs(dividend) // abs(divisor)
    return go_int64(quotient if (dividend < 0) == (divisor < 0) else -quotient)


def go_until(run: Rendering, count: int) -> List[int]:
    """Count from 0 to a number, without it."""
    run.spend(abs(count))
    return list(range(0, count, 1 if count >= 0 else -1))


def go_repeat(run: Rendering, count: int, text: str) -> str:
    """Repeat a text."""
    if count < 0:
        raise TemplateError("negative repeat count")
    run.spend(count * len(text), "text")
    return text * count


def go_replace(run: Rendering, old: str, new: str, text: str) -> str:
    """Replace a text within another everywhere."""
    run.spend(text.count(old) * len(new), "text")
    return text.replace(old, new)


def go_indent(run: Rendering, count: int, text: str) -> str:
    """Put spaces before each line."""
    pad = go_repeat(run, count, " ")
    return pad + go_replace(run, "\n", "\n" + pad, text)


def go_split(run: Rendering, separator: str, text: str) -> List[str]:
    """Return the parts of a text."""
    run.spend(text.count(separator) >> ELEMENT_STEP)
    return text.split(separator) if separator else list(text)


def go_join(run: Rendering, separator: str, values: Any) -> str:
    """Put texts together, a separator between them."""
    parts = go_strings(run, values)
    run.spend(len(parts) * len(separator), "text")
    return separator.join(parts)


def json_value(run: Rendering, value: Any, depth: int = 0) -> Any:
    """Return a value of what Python's json knows, map keys in order; count what it will write."""
    if depth > MAX_VALUE_DEPTH:
        raise TemplateError("a value holds itself, or too many in each other")
    run.spend(1)
    run.spend(2 * depth + (len(value) if isinstance(value, str) else 8), "text")
    if isinstance(value, dict):
        keys = sorted(value) if go_kind(value) == "map" else value
        return {json_value(run, key): json_value(run, value[key], depth + 1) for key in keys}
    if go_kind(value) == "slice":
        return [json_value(run, element, depth + 1) for element in value]
    if isinstance(value, GoTime):
        return format_time(value.moment, RFC3339_NANO)
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e21 \
        else value


def go_to_json(run: Rendering, value: Any, step: Optional[int] = None) -> str:
    """Return a value as JSON, markup escaped; nothing if it has none."""
    plain, marks = json_value(run, value), (",", ":" if step is None else ": ")
    try:
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=step, separators=marks)
    except ValueError:                            # infinity, say
        return ""
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match.group()):04x}", text)


def go_from_json(run: Rendering, text: str) -> Any:
    """Return the value of a JSON text, nil if it is none."""
    run.spend(len(text) >> ELEMENT_STEP)
    try:
        return json.loads(text, object_hook=GoMap, parse_int=float, parse_constant=int)
    except (ValueError, RecursionError):          # int refuses NaN and Infinity
        return None


def go_b64dec(text: str) -> str:
    """Decode base64; say so if it is none."""
    try:
        return go_text(base64.b64decode(go_bytes(re.sub(r"[\r\n]", "", text)), validate=True))
    except ValueError:
        return "illegal base64 data"


def go_date(run: Rendering, layout: str, value: Any) -> str:
    """Format a time, or seconds since 1970; what is neither stands for now."""
    zone = run.world.zones("Local") or datetime.timezone.utc
    try:
        moment = GO_EPOCH + datetime.timedelta(seconds=value) if go_kind(value) == "int" else \
            value.moment if isinstance(value, GoTime) else run.world.now()
        return format_time(moment.astimezone(zone), layout)
    except OverflowError:
        raise TemplateError("the time is out of range") from None


def go_dict(run: Rendering, *values: Any) -> GoMap:
    """Make a map of keys and values."""
    keys = [go_string(run, key) for key in values[::2]]
    return GoMap(itertools.zip_longest(keys, values[1::2], fillvalue=""))


def go_set(target: Dict[str, Any], key: str, value: Any) -> Dict[str, Any]:
    """Change a map that the template made."""
    if not isinstance(target, GoMap):
        raise TemplateError("only a map that the template made can be changed")
    target[key] = value
    return target


def go_fail(reason: str) -> NoReturn:
    """Stop with an error."""
    raise TemplateError(reason)


def go_function(kinds: str, call: Callable[..., Any]) -> GoFunction:
    """Describe a function by the kinds of its arguments; `any...` stands for any number more."""
    names = call.__code__.co_varnames if isinstance(call, types.FunctionType) else ()
    return GoFunction(call, tuple(kinds.replace("...", "").split()), "..." in kinds,
                      names[:1] == ("run",))


FUNCTION_TABLE: Dict[str, Tuple[str, Callable[..., Any]]] = {
    "and": ("any...", go_fail), "or": ("any...", go_fail),      # Rendering.decide stands for them
    "not": ("any", lambda value: not go_truth(value)),
    "eq": ("any any any...", lambda first, *others: any(go_equal(first, v) for v in others)),
    "ne": ("any any", lambda a, b: not go_equal(a, b)), "lt": ("any any", go_less),
    "le": ("any any", lambda a, b: not go_less(b, a)),
    "gt": ("any any", lambda a, b: go_less(b, a)),
    "ge": ("any any", lambda a, b: not go_less(a, b)), "len": ("any", go_len),
    "index": ("any any...", go_index), "slice": ("any any...", go_slice),
    "print": ("any...", go_print), "printf": ("string any...", go_sprintf),
    "println": ("any...", lambda run, *given: " ".join(
        go_format(run, GoFormat(), value) for value in given) + "\n"),
    "html": ("any...", lambda run, *given: go_print(run, *given).translate(HTML_ESCAPES)),
    "js": ("any...", lambda run, *given: go_print(run, *given).translate(JS_ESCAPES)),
    "urlquery": ("any...", lambda run, *given: urllib.parse.quote_plus(
        go_bytes(go_print(run, *given)))),
    "env": ("string", lambda run, name: run.world.env.get(name, "")),
    "default": ("any any...", lambda other, *given: next(filter(go_truth, given[:1]), other)),
    "empty": ("any", lambda value: not go_truth(value)),
    "coalesce": ("any...", lambda *given: next(filter(go_truth, given), None)),
    "ternary": ("any any bool", lambda yes, no, test: yes if test else no),
    "fail": ("string", go_fail), "trim": ("string", str.strip),
    "trimAll": ("string string", lambda chars, s: s.strip(chars)),
    "trimSuffix": ("string string", lambda end, s: s[:len(s) - len(end)] if s.endswith(end) else s),
    "trimPrefix": ("string string", lambda start, s: s[len(start):] if s.startswith(start) else s),
    "nospace": ("string", lambda s: "".join(s.split())), "upper": ("string", str.upper),
    "lower": ("string", str.lower),
    "title": ("string", lambda s: WORD_START.sub(lambda match: match.group().upper(), s)),
    "contains": ("string string", lambda part, s: part in s),
    "hasPrefix": ("string string", lambda start, s: s.startswith(start)),
    "hasSuffix": ("string string", lambda end, s: s.endswith(end)),
    "replace": ("string string string", go_replace), "repeat": ("int string", go_repeat),
    "trunc": ("int string", lambda count, s: go_text(
        go_bytes(s)[:count] if count >= 0 else go_bytes(s)[count:])),
    "indent": ("int string", go_indent),
    "nindent": ("int string", lambda run, count, s: "\n" + go_indent(run, count, s)),
    "splitList": ("string string", go_split),
    "split": ("string string", lambda run, separator, s: GoMap(
        (f"_{index}", part) for index, part in enumerate(go_split(run, separator, s)))),
    "join": ("string any", go_join),
    "cat": ("any...", lambda run, *given: " ".join(go_strings(run, given))),
    "quote": ("any...", lambda run, *given: " ".join(map(go_quote, go_strings(run, given)))),
    "squote": ("any...", lambda run, *given: " ".join(f"'{s}'" for s in go_strings(run, given))),
    "regexMatch": ("string string", lambda run, pattern, s:
                   next(go_regex(run, pattern, s)[1], None) is not None),
    "regexFind": ("string string", go_regex_find),
    "regexReplaceAll": ("string string string", go_regex_replace), "toString": ("any", go_string),
    "toJson": ("any", lambda run, value: go_to_json(run, value)),
    "toPrettyJson": ("any", lambda run, value: go_to_json(run, value, 2)),
    "fromJson": ("string", go_from_json),
    "b64enc": ("string", lambda s: base64.b64encode(go_bytes(s)).decode()),
    "b64dec": ("string", go_b64dec),
    "sha256sum": ("string", lambda s: hashlib.sha256(go_bytes(s)).hexdigest()),
    "now": ("", lambda run: GoTime(run.world.now())), "uuidv4": ("", lambda run: run.world.uuid()),
    "date": ("string any", go_date),
    "unixEpoch": ("time.Time", lambda time: str((time.moment - GO_EPOCH) // SECOND)),
    "list": ("any...", lambda *values: list(values)),
    "first": ("slice", lambda values: values[0] if values else None),
    "last": ("slice", lambda values: values[-1] if values else None),
    "rest": ("slice", lambda values: list(values[1:])),
    "uniq": ("slice", lambda run, values: list(
        {go_to_json(run, value): value for value in values[::-1]}.values())[::-1]),
    "has": ("any slice", lambda run, needle, values:
            go_to_json(run, needle) in (go_to_json(run, value) for value in values)),
    "until": ("int", go_until), "dict": ("any...", go_dict),
    "get": ("map string", lambda values, key: values.get(key, "")),
    "set": ("map string any", go_set), "hasKey": ("map string", lambda values, key: key in values),
    "keys": ("map", sorted), "add": ("any...", lambda *values: go_int64(sum(map(go_int, values)))),
    "sub": ("any any", lambda a, b: go_int64(go_int(a) - go_int(b))),
    "mul": ("any any...", lambda *values: functools.reduce(
        lambda product, value: go_int64(product * go_int(value)), values, 1)),
    "div": ("any any", go_divide),
    "mod": ("any any", lambda a, b: go_int(a) - go_divide(a, b) * go_int(b)),
    "int": ("any", go_int)}
TEMPLATE_FUNCTIONS: Dict[str, GoFunction] = {name: go_function(*row)
                                             for name, row in FUNCTION_TABLE.items()}
TIME_METHODS: Dict[str, Tuple[str, Callable[..., Any]]] = {
    "Format": ("string", lambda time, layout: format_time(time.moment, layout)),
    "UTC": ("", lambda time: GoTime(time.moment.astimezone(datetime.timezone.utc))),
    "Local": ("", lambda run, time: GoTime(time.moment.astimezone(
        run.world.zones("Local") or datetime.timezone.utc))),
    "Unix": ("", lambda time: (time.moment - GO_EPOCH) // SECOND),
    "UnixMilli": ("", lambda time: (time.moment - GO_EPOCH) // MILLISECOND),
    "Month": ("", lambda time: GoMonth(time.moment.month)),
    "Weekday": ("", lambda time: GoWeekday(time.moment.isoweekday() % 7)),
    "Year": ("", lambda time: time.moment.year), "Day": ("", lambda time: time.moment.day),
    "Hour": ("", lambda time: time.moment.hour), "Minute": ("", lambda time: time.moment.minute),
    "Second": ("", lambda time: time.moment.second)}
GO_METHODS: Dict[type, Dict[str, GoFunction]] = {
    GoTime: {name: go_function(*row) for name, row in TIME_METHODS.items()},
    GoHeader: {"Get": go_function("string", lambda header, name:
                                  (header.get(canonical_name(name)) or [""])[0])}}


# =====================================================================================
# 3. Mail: envelopes, replies, header fields and MIME structure
#
# RFC 5322 (fields), 2045 to 2049 (MIME), 3463 and 5248 (status codes). Reads a message through
# a Source, window by window, so its size is no memory. Every bound is Postfix's as shipped.
# No sockets, no SQL.
# =====================================================================================

MAX_HEADER_BYTES = 102400     # Postfix header_size_limit: parsed; more is kept, not read
MAX_HEADER_FIELDS = 2000      # fields read of one header
MAX_DEPTH = 100               # Postfix mime_nesting_limit
MAX_BOUNDARY = 2048           # Postfix mime_boundary_length_limit
MAX_PARTS = 1000
MAX_DASHED = 100000           # lines looked at because a boundary might stand there
MAX_TEXT = 1 << 20            # text shown of one part; a longer one is an attachment
MAX_HOPS = 100                # RFC 5321 6.3
WINDOW = 1 << 18              # bytes looked at in one go


class Envelope(NamedTuple):
    """What a session knows of a message besides its content. `peer` is an address."""
    sender: str
    recipients: Tuple[str, ...]
    peer: str = ""
    helo: str = ""
    protocol: str = "SMTP"       # the word behind "with" in Received (RFC 3848)
    tls: str = ""                # version and cipher, or nothing
    ident: str = ""              # session and transaction, as in the log
    key: str = ""                # what its deliveries are known by, if the session says so


class Reply(NamedTuple):
    """A reply: a code, an enhanced status code (RFC 3463) or none, and lines of text."""
    code: int
    status: str
    text: str

    @functools.lru_cache(maxsize=256)       # noqa: B019 (replies are values, and few)
    def encode(self) -> bytes:
        """Return the reply as it goes over the wire (RFC 5321 4.2.1, RFC 2034 4)."""
        status = self.status + " " if self.status else ""
        lines = self.text.split("\n")
        head = "".join(f"{self.code}-{status}{line}\r\n" for line in lines[:-1])
        return f"{head}{self.code} {status}{lines[-1]}\r\n".encode("utf-8", "replace")


class ParseError(Exception):
    """A message is over a bound or cannot be read as MIME; it is kept all the same."""


# -- Sources: the bytes of a message, by ranges --

class Source:
    """Bytes that can be read by ranges; made from bytes, or from a function that reads a range."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self.size = size
        self.read = read         # read(start, end) returns the bytes of that range

    @classmethod
    def of(cls, data: bytes) -> "Source":
        """Return a source over bytes in memory."""
        return cls(len(data), lambda start, end: data[start:end])

    def windows(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from start to end in pieces of at most WINDOW."""
        for place in range(start, end, WINDOW):
            yield self.read(place, min(place + WINDOW, end))

    def find_lines(self, needle: bytes, limit: int) -> Iterator[Tuple[int, bytes]]:
        """Yield the place of each line that begins with the needle, and its first limit bytes."""
        head = self.read(0, min(limit, self.size))
        if head.startswith(needle):
            yield 0, head
        needle = b"\n" + needle
        for place in range(0, self.size, WINDOW):
            data = self.read(place, min(place + WINDOW + limit, self.size))
            found = data.find(needle)
            while 0 <= found < WINDOW:
                yield place + found + 1, data[found + 1:found + 1 + limit]
                found = data.find(needle, found + 1)


# -- Header fields --

def header_length(data: bytes) -> int:
    """Return the length of the header block at the beginning of a message, its CRLF included.

    It ends before an empty line, or before the first line that can be no field (the `From ` line
    of an mbox is passed over).
    """
    end = 0 if data.startswith(b"\r\n") else data.find(b"\r\n\r\n") + 2
    end = end if end != 1 else len(data)
    stray = NOT_A_FIELD.search(data, 0, end)
    return stray.start() if stray else end


NOT_A_FIELD = re.compile(rb"^(?![!-9;-~]{1,200}[ \t]*:|[ \t]|>?From )[^\r\n]", re.M)
FIELD = re.compile(rb"^([!-9;-~]{1,200})[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)", re.M)


def parse_fields(block: bytes) -> List[Tuple[str, str]]:
    """Return the (name, unfolded raw value) of each field of a header block, in order.

    8-bit values are read as UTF-8, else Latin-1. Raises ParseError over the bound on fields.
    """
    fields: List[Tuple[str, str]] = []
    for match in FIELD.finditer(block):
        if len(fields) >= MAX_HEADER_FIELDS:
            raise ParseError(f"more than {MAX_HEADER_FIELDS} header fields")
        value = match.group(2).replace(b"\r\n", b"").replace(b"\r", b" ")
        fields.append((match.group(1).decode("ascii"), decode_text(value).strip(" \t")))
    return fields


def first_field(fields: Sequence[Tuple[str, str]], name: str) -> str:
    """Return the raw value of the first field of that lower-case name, or nothing."""
    return next((value for known, value in fields if known.lower() == name), "")


SUBJECT = re.compile(rb"^subject[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)", re.M | re.I)


def read_subject(block: bytes) -> str:
    """Return the decoded subject in a header block, cut at 2,000 characters; the first counts."""
    match = SUBJECT.search(block)
    if not match:
        return ""
    value = decode_text(match.group(1).replace(b"\r\n", b"").replace(b"\r", b" "))
    return clean_line(decode_words(value[:2000])).strip()


def count_hops(block: bytes) -> int:
    """Return the number of Received fields in a header block (RFC 5321 6.3)."""
    return block[:9].lower().startswith(b"received:") + block.lower().count(b"\nreceived:")


UNSAFE_HELO = re.compile(r"[^\w.:\[\]-]", re.A)


def trace_fields(envelope: Envelope, hostname: str, date: str) -> bytes:
    """Return the fields added on top at receipt: Return-Path and Received (RFC 5321 4.4).

    Nothing a client said is taken over but characters that can do no harm in a comment.
    """
    helo = UNSAFE_HELO.sub("?", envelope.helo[:255]) or "unknown"
    tls = f" ({envelope.tls})" if envelope.tls else ""
    sole = f"\r\n\tfor <{envelope.recipients[0]}>" if len(envelope.recipients) == 1 else ""
    literal = f"[IPv6:{envelope.peer}]" if ":" in envelope.peer else f"[{envelope.peer}]"
    return (f"Return-Path: <{envelope.sender}>\r\n"
            f"Received: from {helo} ({literal})\r\n"
            f"\tby {hostname} (pegmail) with {envelope.protocol}{tls}\r\n"
            f"\tid {envelope.ident}{sole};\r\n\t{date}\r\n").encode("utf-8", "replace")


# -- MIME structure --

class Part:
    """One entity of a MIME message: its fields, and where its body lies; made by read_structure."""

    __slots__ = ("fields", "start", "end", "mime", "params", "encoding", "disposition", "filename",
                 "boundary", "children", "depth")

    def __init__(self, fields: List[Tuple[str, str]], start: int, depth: int, default: str) -> None:
        self.fields = fields
        self.start = start            # where the body begins, and ends
        self.end = start
        self.depth = depth
        self.children: List[Part] = []
        mime, self.params = parse_parameters(first_field(fields, "content-type"))
        mime = mime.lower()
        self.mime = mime if re.fullmatch(r"[\w.+-]{1,100}/[\w.+-]{1,100}", mime, re.A) else default
        encoding = parse_parameters(first_field(fields, "content-transfer-encoding"))[0]
        self.encoding = encoding.lower()
        value, params = parse_parameters(first_field(fields, "content-disposition"))
        self.disposition = value.lower()
        self.filename = params.get("filename") or self.params.get("name") or ""
        self.boundary = b""
        if self.mime.startswith("multipart/"):
            boundary = self.params.get("boundary", "").rstrip().encode("utf-8", "replace")
            if len(boundary) > MAX_BOUNDARY:
                raise ParseError(f"a boundary of more than {MAX_BOUNDARY} bytes")
            self.boundary = boundary

    @property
    def subtype(self) -> str:
        """The word behind the slash of the media type."""
        return self.mime.partition("/")[2]


DASHED = re.compile(rb"(?m)^--([^\r\n]*)")


class StructureReader:
    """Finds the parts of a message in one pass over its lines; made by read_structure."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stack: List[Part] = []          # the open entities, the outermost first
        self.open: Dict[bytes, int] = {}     # their boundaries, and where they stand in it
        self.count = 0
        self.fields = 0
        self.header_bytes = 0

    def read(self) -> Part:
        """Return the root part with its children."""
        root = self.open_part(0, "text/plain")
        if self.open:
            lines = self.source.find_lines(b"--", MAX_BOUNDARY + 8)
            for seen, (place, line) in enumerate(lines):
                if seen > MAX_DASHED:
                    raise ParseError(f"more than {MAX_DASHED} lines that begin like a boundary")
                if place >= self.stack[-1].start:
                    self.take_line(place, line.split(b"\n", 1)[0].rstrip())
        self.close_to(0, self.source.size)
        return root

    def take_line(self, place: int, line: bytes) -> None:
        """Open or close parts if the line at this place is a boundary of an open multipart."""
        index = self.open.get(line[2:])
        last = index is None and line.endswith(b"--")
        if last:
            index = self.open.get(line[2:-2])
        if index is None:
            return
        # RFC 2046 5.1.1: the CRLF before the line belongs to the boundary.
        before = self.source.read(place - 2, place) if place >= 2 else b""
        self.close_to(index + 1, place - 2 if before == b"\r\n" else place)
        if last:
            self.stack[index].boundary = b""        # what follows is the epilogue
            self.note_boundaries()
        else:
            start = place + self.source.read(place, place + MAX_BOUNDARY + 1000).find(b"\n") + 1
            digest = self.stack[index].mime == "multipart/digest"
            self.open_part(start, "message/rfc822" if digest else "text/plain")

    def note_boundaries(self) -> None:
        """Note the boundaries of the open entities; of two that are equal, the inner one counts."""
        self.open = {part.boundary: index for index, part in enumerate(self.stack) if part.boundary}

    def open_part(self, start: int, default: str) -> Part:
        """Read the header at this place and put its part on the stack, and the one it embeds."""
        self.count += 1
        if self.count > MAX_PARTS:
            raise ParseError(f"more than {MAX_PARTS} parts")
        if len(self.stack) >= MAX_DEPTH:
            raise ParseError(f"parts nested more than {MAX_DEPTH} deep")
        data = self.source.read(start, start + MAX_HEADER_BYTES + 4)
        # A part may have no header: then its empty line, or its boundary, comes at once.
        length = header_length(data)
        if length > MAX_HEADER_BYTES:
            raise ParseError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        for match in DASHED.finditer(data, 0, length):      # a boundary may look like a field
            if match.group(1).rstrip() in self.open:
                length = match.start()
                break
        blank = 2 if data.startswith(b"\r\n", length) else 0
        fields = parse_fields(data[:length])
        self.fields += len(fields)
        if self.fields > 10 * MAX_HEADER_FIELDS:
            raise ParseError(f"more than {10 * MAX_HEADER_FIELDS} fields in all headers")
        self.header_bytes += length
        if self.header_bytes > 10 * MAX_HEADER_BYTES:
            raise ParseError(f"more than {10 * MAX_HEADER_BYTES} bytes of headers")
        part = Part(fields, start + length + blank, len(self.stack), default)
        if self.stack:
            self.stack[-1].children.append(part)
        self.stack.append(part)
        self.note_boundaries()
        if part.mime == "message/rfc822" and part.encoding in ("", "7bit", "8bit", "binary"):
            self.open_part(part.start, "text/plain")
        return part

    def close_to(self, index: int, end: int) -> None:
        """Close the parts from this place of the stack on; their bodies end here."""
        for part in self.stack[index:]:
            part.end = max(part.start, end)
        del self.stack[index:]
        self.note_boundaries()


def read_structure(source: Source) -> Part:
    """Return the tree of a message's parts. Raises ParseError over a bound."""
    return StructureReader(source).read()


def walk_parts(part: Part) -> Iterator[Part]:
    """Yield a part and all below it, in the order of the message."""
    pending = [part]
    while pending:
        part = pending.pop()
        yield part
        pending.extend(reversed(part.children))


def is_text(part: Part) -> bool:
    """Is this part to be shown as text, and not kept as a file?"""
    return (part.mime in ("text/plain", "text/html", "text/enriched", "text/calendar")
            and part.disposition != "attachment" and not part.filename
            and part.end - part.start <= 2 * MAX_TEXT)


def decoded_windows(source: Source, part: Part) -> Iterator[bytes]:
    """Yield the decoded body of a part, window by window."""
    windows = source.windows(part.start, part.end)
    if part.encoding == "base64":
        rest = b""
        for window in windows:
            # Four characters make three bytes: what is over waits for the next window.
            window = rest + re.sub(rb"[^A-Za-z0-9+/]+", b"", window)
            rest = window[len(window) & ~3:]
            yield binascii.a2b_base64(window[:len(window) & ~3])
        if len(rest) > 1:
            yield decode_base64(rest)
    elif part.encoding == "quoted-printable":
        yield from decoded_quoted(windows)
    else:
        yield from windows


def decoded_quoted(windows: Iterable[bytes]) -> Iterator[bytes]:
    """Decode quoted-printable in windows; cut at line ends, so that no escape is cut in two."""
    rest = b""
    for window in windows:
        window = rest + window
        cut = window.rfind(b"\n") + 1
        if not cut and len(window) > 2 * WINDOW:
            escape = window.rfind(b"=", len(window) - 2)
            cut = escape if escape >= 0 else len(window)
        rest = window[cut:]
        yield binascii.a2b_qp(window[:cut])
    yield binascii.a2b_qp(rest)


def decoded_text(source: Source, part: Part) -> str:
    """Return the text of a text part: decoded, line ends as \\n, cut at MAX_TEXT characters."""
    data = b"".join(decoded_windows(source, part))
    text = decode_text(data, part.params.get("charset", ""))
    return text[:MAX_TEXT].replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")


def part_filename(part: Part) -> str:
    """Return the name an attachment came with, or one made from its type."""
    if part.filename:
        return clean_line(part.filename, 4000).strip()
    if part.mime == "message/rfc822":
        return "message.eml"
    return "attachment" + (mimetypes.guess_extension(part.mime) or "")


# -- Holes: a message whose large parts stand elsewhere --

class Hole(NamedTuple):
    """A place in a message's kept text where bytes of a media file belong.

    `offset` counts in the kept text; `line` is the length of a base64 line there, 0 if the file
    stands there as it is; `end` is what follows the last line, CRLF or nothing.
    """
    offset: int
    hash: str
    size: int
    line: int
    end: str

    @property
    def length(self) -> int:
        """The bytes that the hole takes in the message."""
        if not self.line:
            return self.size
        encoded = (self.size + 2) // 3 * 4
        return encoded + (max(0, encoded - 1) // self.line) * 2 + len(self.end)


def base64_line(source: Source, part: Part) -> Tuple[int, str]:
    """Return the line length of a base64 body and its end; (0, "") if it is not regular."""
    head = source.read(part.start, min(part.start + 1002, part.end))
    line = head.find(b"\r\n")
    tail = source.read(max(part.start, part.end - 2), part.end)
    end = "\r\n" if tail == b"\r\n" else ""
    line = part.end - part.start - len(end) if line < 0 else line
    return (line, end) if 0 < line <= 1000 and line % 4 == 0 else (0, "")


def is_regular(data: bytes, line: int, decoded: bytes) -> bool:
    """Is data just what encode_lines makes of decoded, but for the CRLF at its end?"""
    step = line + 2
    count = (len(data) - 1) // step
    return (data[line::step] == b"\r" * len(data[line::step])
            and data[line + 1::step] == b"\n" * len(data[line + 1::step])
            and len(data[line::step]) in (count, count + 1)
            and data.replace(b"\r\n", b"") == binascii.b2a_base64(decoded, newline=False))


def encode_lines(data: bytes, line: int) -> bytes:
    """Return data in base64 in lines of that length, no CRLF behind the last."""
    text = binascii.b2a_base64(data, newline=False)
    return b"\r\n".join([text[i:i + line] for i in range(0, len(text), line)])


# =====================================================================================
# 4. Store: what is kept, and how it is found again
#
# All SQL and all files. One writer thread takes jobs from a queue; the jobs that wait while a
# commit is fsynced make the next transaction. Readers have a connection each and hold no snapshot
# between calls. What a caller was told is kept is on the disk. Knows no protocol.
# =====================================================================================

SPOOL_SIZE = 64 << 10         # a larger message goes to a file while it arrives
HOLE_SIZE = 4 << 10           # an encoded part from this size on stands in the media tree only
MAX_BATCH = 64                # jobs of one transaction, and rows of one INSERT
MAX_WAL = 32 << 20            # bytes from which on the writer empties the write-ahead log
DIGEST_BATCH = 32             # messages digested for one transaction, and
DIGEST_SECONDS = 0.02         # the time after which a batch is full
INDEX_BATCH = 100             # rows indexed in one transaction; more would hold up a 250
COUNT_CACHE = 256             # filters whose counts are remembered
SAMPLE = 500                  # messages from which the frequency of trigrams is learned
SAMPLE_TEXT = 100             # characters of each text that are looked at
RARE = 2                      # a trigram in so many of them, or fewer, is rare
SMALL = 16384                 # bytes of a message that is delivered from memory
MAX_WEBHOOKS = 10000          # all of them are in memory
MAX_TREE_TEXT = 4 << 20       # characters of text in the body tree of one message

SCHEMA = 2
MIGRATIONS = ("""
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    received INTEGER NOT NULL,             -- milliseconds since 1970, never less than the last
    sender TEXT NOT NULL,
    recipients TEXT NOT NULL,              -- one a line
    subject TEXT NOT NULL,
    is_read INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL,                 -- of the raw message, trace fields included
    attachments INTEGER NOT NULL DEFAULT 0,
    digested INTEGER NOT NULL DEFAULT 0);
CREATE INDEX message_unread ON message (id) WHERE is_read = 0 AND digested = 1;
CREATE INDEX message_read ON message (id) WHERE is_read = 1 AND digested = 1;
CREATE TABLE content (
    id INTEGER PRIMARY KEY,
    peer TEXT NOT NULL,
    trace BLOB NOT NULL,                   -- the fields added on top
    raw BLOB,                              -- the text but for the holes, or
    file TEXT,                             -- the media file that holds it
    holes TEXT NOT NULL DEFAULT '');       -- JSON list of Hole
CREATE INDEX content_file ON content (file) WHERE file IS NOT NULL;
CREATE TABLE digest (id INTEGER PRIMARY KEY, fields TEXT NOT NULL, body TEXT NOT NULL,
                     error TEXT NOT NULL);
CREATE TABLE attachment (message INTEGER, number INTEGER, hash TEXT NOT NULL,
                         filename TEXT NOT NULL, mime TEXT NOT NULL, size INTEGER NOT NULL,
                         PRIMARY KEY (message, number)) WITHOUT ROWID;
CREATE INDEX attachment_hash ON attachment (hash);
""", """
CREATE TABLE outbox (                      -- what is to leave, has left, or could not
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    message INTEGER,                       -- none, or gone: then the payload says it all
    target TEXT NOT NULL,                  -- "url", a further URL, "mail DOMAIN" or "webhook ID"
    key TEXT NOT NULL,                     -- the same with each attempt
    event TEXT NOT NULL,                   -- arrival, deletion, read, test; or bounce
    recipients TEXT NOT NULL,              -- of mail, those that are left, one a line
    payload BLOB,                          -- what is sent, where no message is there to make it of
    only INTEGER NOT NULL,                 -- the message goes with the last of its deliveries
    created INTEGER NOT NULL,              -- milliseconds since 1970, as is `due`
    state TEXT NOT NULL DEFAULT 'waiting',
    due INTEGER NOT NULL,                  -- when to try; once it is over, when to forget it
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '');
CREATE INDEX outbox_waiting ON outbox (target, due, id) WHERE state = 'waiting';
CREATE INDEX outbox_over ON outbox (state, due) WHERE state <> 'waiting';
CREATE INDEX outbox_message ON outbox (message) WHERE message IS NOT NULL;
CREATE TABLE webhook (
    id TEXT PRIMARY KEY, mailbox TEXT NOT NULL, url TEXT NOT NULL, events TEXT NOT NULL,
    enabled INTEGER NOT NULL, created INTEGER NOT NULL, failures INTEGER NOT NULL,
    last_error TEXT NOT NULL);
CREATE INDEX webhook_mailbox ON webhook (mailbox);
""")
SEARCH_TABLE = """CREATE VIRTUAL TABLE IF NOT EXISTS search USING fts5(
    sender, recipients, subject, content='', tokenize='trigram case_sensitive 1')"""
# The writer's own: what is inserted here goes to all tables that an arrival has a row in.
ARRIVAL = """PRAGMA temp_store = MEMORY;
CREATE TEMP VIEW arrival AS
    SELECT id, received, sender, recipients, subject, size, peer, trace, raw, file,
           '' AS target, '' AS key, '' AS onto, 0 AS only
    FROM message JOIN content USING (id);
CREATE TEMP TRIGGER arrive INSTEAD OF INSERT ON arrival BEGIN
    INSERT INTO message (id, received, sender, recipients, subject, size)
        VALUES (NEW.id, NEW.received, NEW.sender, NEW.recipients, NEW.subject, NEW.size);
    INSERT INTO content (id, peer, trace, raw, file)
        VALUES (NEW.id, NEW.peer, NEW.trace, NEW.raw, NEW.file);
    INSERT INTO outbox (message, target, key, event, recipients, only, created, due)
        SELECT NEW.id, NEW.target, NEW.key, 'arrival', NEW.onto, NEW.only, NEW.received,
               NEW.received WHERE NEW.target <> '';
END;"""
NOT_ONWARD = ("", "", "", 0)
MESSAGE = ("m.id, m.received, m.sender, m.recipients, m.subject, m.is_read, m.size, m.attachments, "
           "m.digested")


class StoreError(Exception):
    """Something could not be kept or found; `full` when the disk is."""

    def __init__(self, text: str, full: bool = False) -> None:
        super().__init__(text)
        self.full = full


class Unreadable(StoreError):
    """A file of a message is missing or broken."""


def store_error(error: Exception) -> StoreError:
    """Return a database's or a disk's error as a StoreError."""
    number = getattr(error, "errno", None)
    full = number in (errno.ENOSPC, errno.EDQUOT) or "is full" in str(error)
    return StoreError(reason(error), full)


class Message(NamedTuple):
    """A row of the message table; `recipients` is a text with one a line."""
    id: int
    received: int
    sender: str
    recipients: str
    subject: str
    is_read: int
    size: int
    attachments: int
    digested: int


TEXTS = ("sender", "recipients", "subject")     # the columns that are searched


class Filter(NamedTuple):
    """What messages to find: substrings without case, the read state, and where to begin."""
    sender: str = ""
    recipients: str = ""
    subject: str = ""
    is_read: Optional[int] = None
    after: int = 0
    since: int = 0


class Digest(NamedTuple):
    """What was read out of a message: JSON texts of its fields and body tree, and its parts."""
    fields: str
    body: str
    error: str
    attachments: Tuple[Tuple[str, str, str, int], ...] = ()   # hash, filename, mime, size
    kept: Optional[bytes] = None       # with holes: the text around them, or
    file: Optional[str] = None         # the media file that holds it
    holes: Tuple[Hole, ...] = ()


# -- The media tree --

class Media:
    """The tree of content-addressed files; made by Store.

    An attachment of hash abcdef... stands at ab/cd/ef/...; a whole message that is too large for
    a row has a name that begins with RAW, and stands in the folder of that name.
    """

    def __init__(self, path: str, hash_bytes: int, owner: str) -> None:
        self.root = path
        self.temporary = os.path.join(path, "tmp")
        self.digits = hash_bytes * 2
        self.numbers = itertools.count()        # names of temporary files
        self.claim(owner)
        for folder in (path, self.temporary, os.path.join(path, RAW)):
            make_folders(folder)
        sync_folder(path)
        sync_folder(os.path.dirname(os.path.abspath(path)))
        for name in os.listdir(self.temporary):
            os.unlink(os.path.join(self.temporary, name))

    def claim(self, owner: str) -> None:
        """Make sure that the tree is this database's: another's files would be swept away."""
        place = os.path.join(self.root, "owner")
        make_folders(self.root)
        if not set(os.listdir(self.root)) - {"owner.new"}:
            with open(os.open(place + ".new", os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(owner)
                file.flush()
                os.fsync(file.fileno())
            os.rename(place + ".new", place)
            return
        try:
            with open(place, encoding="ascii") as file:
                known = file.read(100)
        except (FileNotFoundError, UnicodeDecodeError):
            known = ""
        if known != owner:
            raise SettingsError(f"--media_path {self.root}: is not empty and not the folder of "
                                "this database; choose another --media_path or --db_path")

    def path(self, name: str) -> str:
        """Return where the file of that name stands. Raises StoreError if it is none of ours."""
        if not MEDIA_NAME.fullmatch(name):
            raise StoreError("not the name of a media file")
        if name.startswith(RAW):
            return os.path.join(self.root, RAW, name[len(RAW):])
        return os.path.join(self.root, name[:2], name[2:4], name[4:6], name[6:])

    def has(self, name: str) -> bool:
        """Is there a file of that hash?"""
        return os.path.isfile(self.path(name))

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return a range of the file of that hash."""
        handle = os.open(self.path(name), os.O_RDONLY)
        try:
            return os.pread(handle, max(0, end - start), start)
        finally:
            os.close(handle)

    def source(self, name: str) -> Source:
        """Return the file of that hash as a Source. Raises FileNotFoundError."""
        return Source(os.path.getsize(self.path(name)), functools.partial(self.read, name))

    def write(self, windows: Iterable[bytes], folders: Optional[Set[str]] = None,
              ) -> Tuple[str, int]:
        """Keep these bytes; return their hash and size once they are on the disk.

        If `folders` is given, the caller is to sync those that it then holds.
        """
        spool = Spool(self, folders=folders)
        try:
            for window in windows:
                spool.write(window)
            return spool.finish(), spool.size
        finally:
            spool.discard()

    def remove(self, name: str) -> None:
        """Remove the file of that hash, and folders that it leaves empty."""
        path = self.path(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        for _ in range(0 if name.startswith(RAW) else 3):
            path = os.path.dirname(path)
            try:
                os.rmdir(path)
            except OSError:
                return              # not empty, or just now filled again

    def walk(self) -> Iterator[Tuple[str, float]]:
        """Yield the name and the modification time of every file."""
        for folder, _, names in os.walk(self.root):
            stem = os.path.relpath(folder, self.root).replace(os.sep, "")
            for name in names:
                if MEDIA_NAME.fullmatch(stem + name):
                    with contextlib.suppress(FileNotFoundError):
                        yield stem + name, os.path.getmtime(os.path.join(folder, name))


RAW = "raw"
MEDIA_NAME = re.compile(r"(?:raw)?[0-9a-f]{16,64}")


class Spool:
    """A file that is being written to the media tree, and hashed on the way.

    Made by Media and, for a message that arrives, by Store.spool; its methods block.
    """

    def __init__(self, media: Media, prefix: str = "", folders: Optional[Set[str]] = None,
                 ) -> None:
        self.media = media
        self.folders = folders          # where folders that are to be synced gather, or None
        self.prefix = prefix            # RAW for a whole message
        self.path = ""
        self.handle = -1
        self.size = 0
        self.hash = ""                  # the file's name; known once finish() has run
        self.sum = hashlib.sha256()
        self.lock = threading.Lock()    # a session may end while its bytes are being written
        self.dropped = False

    def write(self, data: bytes) -> None:
        """Add data. Raises OSError."""
        with self.lock:
            if not self.dropped:
                self.append(data)

    def append(self, data: bytes) -> None:
        """Add data; the lock is held."""
        if self.handle < 0:
            self.path = os.path.join(self.media.temporary, str(next(self.media.numbers)))
            self.handle = in_folder(self.media.temporary, os.open, self.path,
                                    os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        view = memoryview(data)
        while view:
            view = view[os.write(self.handle, view):]
        self.sum.update(data)
        self.size += len(data)

    def finish(self, data: bytes = b"") -> str:
        """Add the last data and make the file durable under its name; return the name."""
        with self.lock:
            if self.dropped:
                raise OSError(errno.ECANCELED, "the session has ended")
            self.append(data)
            self.publish()
        self.discard()
        return self.hash

    def publish(self) -> None:
        """Give the file its name for good; the lock is held."""
        name = self.prefix + self.sum.hexdigest()[:self.media.digits]
        target = self.media.path(name)
        os.fsync(self.handle)
        folder = os.path.dirname(target)
        in_folder(folder, os.rename, self.path, target)
        self.path = ""
        changed = set()
        for _ in range(1 if self.prefix else 4):     # whoever made a folder may not be so far yet
            changed.add(folder)
            folder = os.path.dirname(folder)
        if self.folders is None:
            sync_folders(changed)
        else:
            self.folders |= changed
        self.hash = name

    def discard(self) -> None:
        """Close the file, and remove it unless it was finished. May be called twice."""
        with self.lock:
            self.dropped = True
            if self.handle >= 0:
                os.close(self.handle)
                self.handle = -1
            if self.path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)
                self.path = ""


def make_folders(path: str) -> None:
    """Make a folder, and those above it, so that only its owner may enter."""
    if not os.path.isdir(path):
        above = os.path.dirname(os.path.abspath(path))
        if not os.path.exists(above):
            make_folders(above)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):         # else somebody else was faster
                raise


def in_folder(folder: str, func: Callable[..., Any], *args: Any) -> Any:
    """Return func(*args), which makes a name in a folder; the folder is made if it is missing."""
    for _ in range(10):                 # an empty folder may go away again at any time
        try:
            return func(*args)
        except FileNotFoundError:
            make_folders(folder)
    return func(*args)


def sync_folders(paths: Set[str]) -> None:
    """Make the names in these folders durable, those of the inner ones first."""
    for path in sorted(paths, key=len, reverse=True):
        sync_folder(path)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Kept:
    """The raw bytes of a stored message as a Source: trace fields, kept text, holes filled.

    Made by Store.raw. It holds no file open; when the message is digested meanwhile, and its
    file gone, it reads the row again.
    """

    def __init__(self, store: "Store", ident: int) -> None:
        self.store = store
        self.ident = ident
        self.starts: List[int] = []          # where each piece begins, and how to read it
        self.pieces: List[Callable[[int, int], bytes]] = []
        self.size = 0
        self.load()

    def load(self) -> None:
        """Read the row and lay out the pieces. Raises KeyError if there is none."""
        media = self.store.media
        for attempt in (1, 2, 3):
            row = self.store.read_one("SELECT trace, raw, file, holes FROM content WHERE id = ?",
                                      (self.ident,))
            if row is None:
                raise KeyError(self.ident)
            trace, raw, file, holes = row
            try:
                kept = Source.of(raw) if file is None else media.source(file)
                break
            except FileNotFoundError:       # digested between the two steps: the row has changed
                if attempt == 3:
                    raise Unreadable(f"a file of message {self.ident} is missing") from None
        self.starts, self.pieces, self.size = [], [], 0
        self.add(len(trace), lambda start, end: trace[start:end])
        place = 0
        for hole in [Hole(*values) for values in json.loads(holes or "[]")]:
            self.add_range(kept, place, hole.offset)
            self.add(hole.length, functools.partial(read_hole, media, hole))
            place = hole.offset
        self.add_range(kept, place, kept.size)

    def add(self, length: int, read: Callable[[int, int], bytes]) -> None:
        """Lay out a piece of that length."""
        if length:
            self.starts.append(self.size)
            self.pieces.append(read)
            self.size += length

    def add_range(self, kept: Source, first: int, last: int) -> None:
        """Lay out a range of the kept text as a piece."""
        self.add(last - first, lambda start, end: kept.read(first + start, min(first + end, last)))

    def read(self, start: int, end: int) -> bytes:
        """Return a range of the message. Raises KeyError when it was deleted meanwhile."""
        for _ in range(3):
            try:
                return b"".join(self.read_pieces(start, min(end, self.size)))
            except FileNotFoundError:
                self.load()
            except OSError as error:
                raise Unreadable(f"a file of message {self.ident}: {reason(error)}") from error
        raise Unreadable(f"a file of message {self.ident} is missing")

    def read_pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield what each piece holds of a range."""
        index = max(0, bisect.bisect_right(self.starts, start) - 1)
        for place, read in zip(self.starts[index:], self.pieces[index:]):
            if place >= end:
                return
            following = self.starts[index + 1] if index + 1 < len(self.starts) else self.size
            yield read(max(0, start - place), min(end, following) - place)
            index += 1

    def source(self) -> Source:
        """Return it as a Source."""
        return Source(self.size, self.read)


def read_hole(media: Media, hole: Hole, start: int, end: int) -> bytes:
    """Return a range of what a hole stands for."""
    if not hole.line:
        return media.read(hole.hash, start, end)
    first = start // (hole.line + 2)                    # the line that the range begins in
    last = -(-end // (hole.line + 2))
    data = media.read(hole.hash, first * hole.line // 4 * 3, last * hole.line // 4 * 3)
    text = encode_lines(data, hole.line)
    if last * hole.line // 4 * 3 < hole.size:
        text += b"\r\n"
    elif hole.end:
        text += hole.end.encode("ascii")
    return text[start - first * (hole.line + 2):end - first * (hole.line + 2)]


# -- Digest: reading a message once, for all who ask later --

class Digester:
    """Reads one message: fields, body tree, attachments to the media tree; made by Store."""

    def __init__(self, media: Media, source: Source, trace: int) -> None:
        self.media = media
        self.source = source
        self.trace = trace              # bytes of trace fields on top; they are never in a hole
        self.attachments: List[Tuple[str, str, str, int]] = []
        self.holes: List[Tuple[int, int, Hole]] = []
        self.text_left = MAX_TREE_TEXT
        self.folders: Set[str] = set()  # that got a file: a thousand are synced once, not each time

    def run(self) -> Digest:
        """Return the digest, its files on the disk. What cannot be read is in its `error`."""
        try:
            return self.read()
        finally:
            sync_folders(self.folders)

    def read(self) -> Digest:
        """Return the digest."""
        try:
            root = read_structure(self.source)
            fields, body = json_text(readable_fields(root.fields)), json_text(self.item(root))
        except ParseError as error:
            return Digest(json_text(self.fields_at_least()), "null", str(error))
        digest = Digest(fields, body, "", tuple(self.attachments))
        return self.with_holes(digest) if self.holes else digest

    def fields_at_least(self) -> List[Tuple[str, str]]:
        """Return the first fields of a message that is over a bound."""
        data = self.source.read(0, MAX_HEADER_BYTES)
        found = itertools.islice(FIELD.finditer(data[:header_length(data)]), MAX_HEADER_FIELDS)
        block = b"\n".join(match.group().rstrip() for match in found)
        return readable_fields(parse_fields(block))

    def item(self, part: Part) -> Dict[str, Any]:
        """Return the body tree of a part."""
        if part.mime.startswith("multipart/") and part.children:
            return {"type": part.subtype, "items": [self.item(child) for child in part.children]}
        if part.mime == "message/rfc822" and part.children:
            inner = part.children[0]
            return {"type": "message", "mime": part.mime, "filename": part_filename(part),
                    "size": part.end - part.start, "items": [self.item(inner)],
                    "mail_headers": first_values(readable_fields(inner.fields))}
        if is_text(part) and part.end - part.start <= self.text_left:
            text = decoded_text(self.source, part)
            self.text_left -= len(text)
            return {"type": "text", "mime": part.mime, "text": text, "size": len(text)}
        return self.attachment(part)

    def attachment(self, part: Part) -> Dict[str, Any]:
        """Keep the decoded body of a part as a media file; return its item."""
        name, size = self.keep_regular(part) or self.media.write(
            decoded_windows(self.source, part), self.folders)
        mime = part.mime
        if mime == "application/octet-stream" and part.filename:
            mime = mimetypes.guess_type(safe_filename(part.filename))[0] or mime
        filename = part_filename(part)
        self.attachments.append((name, filename, mime, size))
        item = {"type": "attachment", "hash": name, "filename": filename, "mime": mime,
                "size": size}
        content_id = first_field(part.fields, "content-id")
        if content_id:
            item["content_id"] = clean_line(content_id).strip(" <>")
        return item

    def keep_regular(self, part: Part) -> Optional[Tuple[str, int]]:
        """Keep a large part so that it comes back to the byte, and note the hole; else None."""
        length = part.end - part.start
        if length < HOLE_SIZE:
            return None
        if part.encoding in ("", "7bit", "8bit", "binary"):
            line, end = 0, ""
            kept = self.media.write(self.source.windows(part.start, part.end), self.folders)
        elif part.encoding == "base64":
            line, end = base64_line(self.source, part)
            kept_base64 = line and self.write_regular(part, line, part.end - len(end))
            if not kept_base64:
                return None
            kept = kept_base64
        else:
            return None
        hole = Hole(part.start - self.trace, kept[0], kept[1], line, end)
        if hole.length == length:
            self.holes.append((part.start, part.end, hole))
        return kept

    def write_regular(self, part: Part, line: int, end: int) -> Optional[Tuple[str, int]]:
        """Write the decoded bytes of a base64 body; None as soon as it is not regular."""
        step = (line + 2) * max(1, WINDOW // (line + 2))
        spool = Spool(self.media, folders=self.folders)
        try:
            for place in range(part.start, end, step):
                data = self.source.read(place, min(place + step, end))
                decoded = decode_base64(data)
                if not is_regular(data, line, decoded) or (
                        place + step < end and len(decoded) % 3):     # padding before the end
                    return None
                spool.write(decoded)
            return spool.finish(), spool.size
        finally:
            spool.discard()

    def with_holes(self, digest: Digest) -> Digest:
        """Return the digest with the text that is left around the holes."""
        pieces, holes, place, gone = [], [], self.trace, 0
        for start, end, hole in sorted(self.holes):
            pieces.append((place, start))
            holes.append(hole._replace(offset=hole.offset - gone))
            gone += end - start
            place = end
        pieces.append((place, self.source.size))
        if sum(end - start for start, end in pieces) > SPOOL_SIZE:
            file, _ = self.media.write(itertools.chain.from_iterable(
                self.source.windows(start, end) for start, end in pieces), self.folders)
            return digest._replace(file=file, holes=tuple(holes))
        kept = b"".join(self.source.read(start, end) for start, end in pieces)
        return digest._replace(kept=kept, holes=tuple(holes))


JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def json_text(value: Any) -> str:
    """Return a value as JSON; a lone surrogate, which no text may hold, becomes `?`."""
    return JSON.encode(value).encode("utf-8", "replace").decode("utf-8")


def readable_fields(fields: Sequence[Tuple[str, str]]) -> List[Tuple[str, str]]:
    """Return fields with their encoded words decoded."""
    return [(name, decode_words(value).replace("\0", "\ufffd")) for name, value in fields]


def first_values(fields: Iterable[Sequence[str]]) -> Dict[str, str]:
    """Return each field's first value by its name; case makes no second name."""
    values: Dict[str, str] = {}
    spelled: Dict[str, str] = {}
    for name, value in fields:
        values.setdefault(spelled.setdefault(name.lower(), name), value)
    return values


# -- The store itself --

class Onward(NamedTuple):
    """A delivery that a message begins with, made by Delivery."""
    target: str
    recipients: Tuple[str, ...] = ()
    only: bool = False                  # the message is not to stay once it is delivered


class Incoming(NamedTuple):
    """A message to keep. `content` is the bytes as received, or a finished Spool."""
    envelope: Envelope
    trace: bytes
    subject: str
    content: Union[bytes, Spool]
    onward: Sequence[Onward] = ()
    key: str = ""                       # what its deliveries are known by, if it has any


Done = Callable[[Any, Optional[BaseException]], None]    # done(result, error), on any thread


class Job(NamedTuple):
    """One change: a message to add, or a function of the connection; `done` hears of it."""
    work: Union[Incoming, Callable[[sqlite3.Connection], Any]]
    done: Done


def hear_all(answers: List[Tuple[Done, Any]]) -> None:
    """Tell each of those who wait their result."""
    for done, result in answers:
        try:
            done(result, None)
        except Exception:               # a border: the others are to hear theirs
            log.exception("bug after a commit")


class Totals(NamedTuple):
    """What is known of all messages without a look; the writer makes a new one with each commit."""
    last_id: int = 0            # the last that was given, even if its message is gone
    first_id: int = 0
    last_time: int = 0          # milliseconds
    total: int = 0
    read_count: int = 0
    indexed: int = 0            # up to here every message is in the search table
    epoch: int = 0              # counts remembered before the last removal are void
    marks: int = 0              # and those by read state before the last mark


class Span(NamedTuple):
    """A range of ids to look through: what to ask of the index, and what of each row."""
    low: int
    high: int
    words: str                  # for the index; "" looks at every row
    columns: Tuple[str, ...]    # whose texts are compared; the index settles the others


class Store:
    """The database and the media tree. Every method but add() and spool() may block.

    Made by Server; `listeners` are called, on the writer's thread, after each commit that changed
    what lists show.
    """

    def __init__(self, db_path: str, media_path: str, hash_bytes: int = 24,
                 now: Callable[[], float] = time.time) -> None:
        self.db_path = db_path
        self.now = now
        create_private(db_path)
        self.lock_file = lock_database(db_path)
        self.db: Any = None
        try:
            self.db = self.open_writer()
            self.media = Media(media_path, hash_bytes, self.owner())
            self.load_state()
        except BaseException as error:
            if self.db is not None:
                self.db.close()
            self.lock_file.close()
            if isinstance(error, OSError):
                raise SettingsError(f"--media_path {media_path}: {reason(error)}") from None
            raise
        self.outbox = Outbox(self)
        self.listeners: List[Callable[[], None]] = []
        self.version = 0                 # grows with each change that lists show
        self.figures: Dict[str, float] = collections.defaultdict(float)   # the writer's own
        self.unwanted: List[str] = []    # files to be looked at after the next commit
        self.count_cache: "collections.OrderedDict[Filter, Tuple[Any, int, int]]" = (
            collections.OrderedDict())   # at most COUNT_CACHE
        self.count_lock = threading.Lock()
        self.trigrams: Dict[Tuple[str, str], int] = {}      # those of a sample that are not rare
        self.sampled = 0                 # up to here was indexed when it was taken
        self.started = now()
        self.local = threading.local()
        self.readers: List[sqlite3.Connection] = []
        self.jobs: "queue.SimpleQueue[Sequence[Optional[Job]]]" = queue.SimpleQueue()
        self.hand_over: Callable[[List[Tuple[Done, Any]]], None] = hear_all     # see commit()
        self.wanted = threading.Event()  # there is something to digest or to index
        self.wanted.set()
        self.closing = threading.Event()     # the digester is to stop, and then
        self.closed = False              # the writer
        self.wal_checked = 0.0
        self.file = os.stat(db_path)     # the database's own, as it was opened
        self.file_seen = 0.0
        self.is_lost = False
        self.threads = [threading.Thread(target=self.run_writer, name="writer"),
                        threading.Thread(target=self.run_digester, name="digester", daemon=True)]
        for thread in self.threads:
            thread.start()

    def open_writer(self) -> sqlite3.Connection:
        """Open the database for writing and bring its tables up to date."""
        create_private(self.db_path)
        db = sqlite3.connect(self.db_path, isolation_level=None, check_same_thread=False,
                             cached_statements=4 * MAX_BATCH, timeout=5)
        try:
            self.prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def prepare(self, db: sqlite3.Connection) -> None:
        """Set a connection up for writing and bring the tables up to date."""
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            foreign = not version and db.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise SettingsError(f"--db_path {self.db_path}: {error}; is it a pegmail database on "
                                "a local disk?") from None
        if version > SCHEMA:
            raise SettingsError(f"--db_path {self.db_path}: was made by a newer pegmail (schema "
                                f"{version}, this one knows {SCHEMA}); use that one")
        if foreign:
            raise SettingsError(f"--db_path {self.db_path}: is another program's database; choose "
                                "another file")
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA wal_autocheckpoint = 2000")
            db.execute(f"PRAGMA journal_size_limit = {MAX_WAL}")
            db.create_function("fold", 1, fold, deterministic=True)
            for number_, script in enumerate(MIGRATIONS[version:], version + 1):
                db.executescript(f"BEGIN;{script}PRAGMA user_version = {number_};COMMIT;")
        except sqlite3.Error as error:
            raise SettingsError(f"--db_path {self.db_path}: cannot make the tables: "
                                f"{error}") from None
        db.executescript(ARRIVAL)
        try:
            db.execute(SEARCH_TABLE)
            db.execute("SELECT rowid FROM search LIMIT 1")
            self.has_index = True
        except sqlite3.Error as error:
            if not re.search("no such (tokenizer|module)|error in tokenizer", str(error)):
                raise SettingsError(f"--db_path {self.db_path}: {error}") from None
            self.has_index = False              # SQLite before 3.34 or without FTS5: LIKE serves

    def owner(self) -> str:
        """Return the name by which the media tree knows its database."""
        row = self.db.execute("SELECT value FROM meta WHERE name = 'owner'").fetchone()
        if row is None:
            row = (secrets.token_hex(16),)
            self.db.execute("INSERT INTO meta VALUES ('owner', ?)", row)
        return str(row[0])

    def load_state(self) -> None:
        """Read what the writer keeps in memory: the last id and time, and the counts."""
        def one(sql: str) -> Any:
            row = self.db.execute(sql).fetchone()
            return row[0] if row and row[0] is not None else 0
        self.digested = one("SELECT value FROM meta WHERE name = 'digested'")  # all up to here are
        settled, tail = "is_read = %d AND digested = 1", "is_read = %d AND digested = 0 AND id > %d"
        read_count, unread = (
            one(f"SELECT count(*) FROM message WHERE {settled % state}")
            + one(f"SELECT count(*) FROM message WHERE {tail % (state, self.digested)}")
            for state in (1, 0))
        self.totals = self.draft = Totals(      # the draft is the writer's, until it has committed
            max(one("SELECT max(id) FROM message"),
                one("SELECT value FROM meta WHERE name = 'last_id'")),
            one("SELECT min(id) FROM message"),
            one("SELECT received FROM message ORDER BY id DESC LIMIT 1"),
            read_count + unread, read_count,
            one("SELECT rowid FROM search ORDER BY rowid DESC LIMIT 1") if self.has_index else 0)

    def close(self) -> None:
        """Finish every job that waits and close the database."""
        self.closing.set()
        self.wanted.set()
        self.threads[1].join(10)
        self.closed = True
        self.jobs.put((None,))
        self.threads[0].join()
        for db in self.readers if not self.threads[1].is_alive() else ():
            db.close()
        self.db.close()
        self.lock_file.truncate(0)       # the process it named is no server any more
        self.lock_file.close()

    # -- Writing --

    def add(self, jobs: Sequence[Job]) -> None:
        """Keep the messages of these jobs: done(id, None) once they are on the disk.

        Or done(None, StoreError). Never blocks; a connection has one message under way at most.
        """
        self.jobs.put(jobs)

    def spool(self) -> Spool:
        """Return a file for the content of a large message."""
        return Spool(self.media, RAW)

    def drop(self, spool: Spool) -> None:
        """Remove a file that no message is to have after all."""
        spool.discard()
        if spool.hash:
            self.release([spool.hash])

    def change(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """Have the writer run work(connection) as one job; return its result once committed."""
        if self.closed:
            raise StoreError("the store is closed")
        future: "Future[Any]" = Future()

        def done(result: Any, error: Optional[BaseException]) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self.jobs.put((Job(work, done),))
        return future.result()

    def run_writer(self) -> None:
        """Commit batches of jobs until None comes."""
        running = True
        while running:
            batch = list(self.jobs.get())
            with contextlib.suppress(queue.Empty):
                while len(batch) < MAX_BATCH:
                    batch += self.jobs.get_nowait()
            running = None not in batch
            jobs = [job for job in batch if job is not None]
            for start in range(0, len(jobs), MAX_BATCH):
                self.commit(jobs[start:start + MAX_BATCH])
            try:
                self.remove_unused()
                self.bound_wal()
            except (sqlite3.Error, OSError) as error:
                log.error("store: cannot tidy up, trying again later: %s", error)

    def commit(self, jobs: List[Job]) -> None:
        """Run jobs in one transaction; if that fails, each in its own.

        Messages alone are one statement, which is a transaction by itself: each further call into
        SQLite would be a fight with the loop's thread for the interpreter's lock.
        """
        begun = time.perf_counter()
        self.look_for_file()
        incoming = [job.work for job in jobs if isinstance(job.work, Incoming)]
        sole = len(incoming) == len(jobs) and not self.outbox.concerns(incoming)
        try:
            if self.is_lost:
                raise StoreError(f"{self.db_path} was removed or replaced; put it back or restart")
            if not sole:
                self.db.execute("BEGIN IMMEDIATE")
            results = self.perform(jobs, incoming)
            if not sole:
                self.db.execute("COMMIT")
        except Exception as error:      # a border: the job's caller hears of it
            self.draft = self.totals
            self.outbox.fresh.clear()
            self.roll_back()
            if isinstance(error, sqlite3.IntegrityError):
                self.load_state()       # another program has written here
            if len(jobs) > 1 and not self.is_lost and "locked" not in str(error):
                for job in jobs:
                    self.commit([job])
            else:                       # alone, or locked out: each would wait as long
                for job in jobs:
                    self.fail(job, error)
            return
        self.figures["commits"] += 1
        self.figures["jobs"] += len(jobs)
        self.figures["commit_seconds"] += time.perf_counter() - begun
        before, self.totals = self.totals, self.draft
        if before._replace(indexed=0) != self.totals._replace(indexed=0):
            self.tell()
        self.outbox.tell()
        # Those who wait for messages are told in one go: each wake-up of the loop's thread, while
        # this one still runs, is a fight for the interpreter's lock.
        self.hand_over([(job.done, result) for job, result in zip(jobs, results)
                        if isinstance(job.work, Incoming)])
        for job, result in zip(jobs, results):
            if not isinstance(job.work, Incoming):
                job.done(result, None)

    def look_for_file(self) -> None:
        """Find out, once a second, whether what is written will be found again at its place."""
        if time.monotonic() - self.file_seen >= 1:
            self.file_seen = time.monotonic()
            try:
                self.is_lost = not os.path.samestat(os.stat(self.db_path), self.file)
            except OSError:
                self.is_lost = True

    def fail(self, job: Job, error: Exception) -> None:
        """Tell the caller of a job that it failed, and free the file it had brought."""
        if isinstance(job.work, Incoming) and isinstance(job.work.content, Spool):
            self.unwanted.append(job.work.content.hash)
        known = isinstance(error, (sqlite3.Error, OSError))
        job.done(None, store_error(error) if known else error)

    def perform(self, jobs: List[Job], incoming: List[Incoming]) -> List[Any]:
        """Run jobs inside the open transaction; return their results in order."""
        ids = iter(self.insert(incoming) if incoming else ())
        return [next(ids) if isinstance(job.work, Incoming) else job.work(self.db)
                for job in jobs]

    def insert(self, incoming: Sequence[Incoming]) -> Iterable[int]:
        """Insert messages with one statement, and return their ids."""
        draft = self.draft
        received = max(draft.last_time, int(self.now() * 1000))
        first = draft.last_id + 1
        rows: List[Any] = []
        for ident, message in enumerate(incoming, first):
            envelope, trace, subject, content, onward, key = message
            if isinstance(content, Spool):
                if not self.media.has(content.hash):
                    raise StoreError("its file was removed as a message like it went away")
                length, raw, file = content.size, None, content.hash
            else:
                length, raw, file = len(content), content, None
            rows += (ident, received, envelope.sender, "\n".join(envelope.recipients),
                     subject, len(trace) + length, envelope.peer, trace, raw, file)
            rows += ((onward[0].target, key, "\n".join(onward[0].recipients), onward[0].only)
                     if onward else NOT_ONWARD)
        count = len(incoming)
        self.db.execute("INSERT INTO arrival VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
                        + ",(?,?,?,?,?,?,?,?,?,?,?,?,?,?)" * (count - 1), rows)
        self.outbox.add_arrivals(self.db, first, received, incoming)
        self.draft = draft._replace(last_id=draft.last_id + count, last_time=received,
                                    first_id=draft.first_id or first, total=draft.total + count)
        return range(first, first + count)

    def roll_back(self) -> None:
        """Leave a failed transaction; if even that fails, open the database anew."""
        try:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
        except sqlite3.Error:
            self.db.close()
            try:
                self.db = self.open_writer()
            except SettingsError as error:
                log.error("store: %s", error)

    def tell(self) -> None:
        """Let the digester and all who listen know of a change."""
        self.version += 1
        self.wanted.set()
        for listener in self.listeners:
            listener()

    def bound_wal(self) -> None:
        """Empty the write-ahead log when it has grown and a second has passed."""
        if time.monotonic() - self.wal_checked < 1:
            return
        self.wal_checked = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            if os.path.getsize(self.db_path + "-wal") < MAX_WAL * 2:
                return
            self.db.execute("PRAGMA busy_timeout = 250")
            busy = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            self.db.execute("PRAGMA busy_timeout = 5000")
            if busy:
                self.wal_checked += 10
                log.warning("store: the write-ahead log is large and another program holds a "
                            "snapshot of %s; end its transaction", self.db_path)

    # -- Reading --

    def reader(self) -> sqlite3.Connection:
        """Return this thread's own connection, which cannot write."""
        db = getattr(self.local, "db", None)
        if db is None:
            path = urllib.parse.quote(os.fsencode(os.path.abspath(self.db_path)))
            uri = f"file:{path}?mode=ro"
            db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False,
                                 timeout=5)
            db.execute("PRAGMA query_only = 1")
            db.execute("PRAGMA cache_size = -1000")
            db.create_function("fold", 1, fold, deterministic=True)
            self.local.db = db
            self.readers.append(db)
        return db

    def read_rows(self, sql: str, values: Sequence[Any] = ()) -> List[Any]:
        """Return all rows of a query; the snapshot ends with it."""
        try:
            return self.reader().execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise store_error(error) from error

    def read_one(self, sql: str, values: Sequence[Any] = ()) -> Optional[Any]:
        """Return the first row of a query, or None."""
        rows = self.read_rows(sql, values)
        return rows[0] if rows else None

    def find(self, ident: int) -> Optional[Message]:
        """Return a message by its id, or None."""
        row = self.read_one(f"SELECT {MESSAGE} FROM message AS m WHERE id = ?", (ident,))
        return Message(*row) if row else None

    def page(self, wanted: Filter, limit: int, offset: int = 0, reverse: bool = False,
             ) -> List[Message]:
        """Return up to limit messages that match, by id, newest first if reverse."""
        found: List[Any] = []
        for span in self.spans(wanted)[::-1 if reverse else 1]:
            if len(found) >= limit:
                break
            sql, values = self.condition(wanted, span)
            order = "DESC" if reverse else "ASC"
            found += self.read_rows(
                f"SELECT {MESSAGE} FROM message AS m {sql} ORDER BY "
                f"{'search.rowid' if span.words else 'm.id'} {order} LIMIT ? OFFSET ?",
                (*values, limit - len(found), offset))
            if offset and not found:
                offset -= min(offset, self.count_span(wanted, span))
            else:
                offset = 0
        return [Message(*row) for row in found]

    def count(self, wanted: Filter) -> int:
        """Return how many messages match; counts of filters asked for again are carried on."""
        totals, start = self.totals, self.first_after(wanted)
        last, first = totals.last_id, totals.first_id
        plain = wanted._replace(after=0, since=0)
        if plain == Filter() and (start <= first or last - first + 1 == totals.total):
            return max(0, min(totals.total, last - start + 1))      # no id is missing in between
        if plain._replace(is_read=None) == Filter() and start <= first:
            return totals.read_count if plain.is_read else totals.total - totals.read_count
        stamp = totals.epoch, totals.marks if wanted.is_read is not None else 0
        with self.count_lock:
            valid, known, upto = self.count_cache.get(wanted, (stamp, 0, 0))
        if valid != stamp:
            known, upto = 0, 0
        for span in self.spans(wanted):
            span = span._replace(low=max(span.low, upto + 1), high=min(span.high, last))
            if span.low <= span.high:
                known += self.count_span(wanted, span)
        with self.count_lock:
            self.count_cache[wanted] = (stamp, known, last)
            self.count_cache.move_to_end(wanted)
            if len(self.count_cache) > COUNT_CACHE:
                self.count_cache.popitem(last=False)
        return known

    def count_span(self, wanted: Filter, span: Span) -> int:
        """Count what matches in a range of ids."""
        sql, values = self.condition(wanted, span)
        simple = span.words and sql.endswith("BETWEEN ? AND ?")
        row = self.read_one(f"SELECT count(*) FROM message AS m {sql}" if not simple else
                            "SELECT count(*) FROM search WHERE search MATCH ? AND "
                            "rowid BETWEEN ? AND ?", values)
        return row[0] if row else 0

    def first_after(self, wanted: Filter) -> int:
        """Return the least id that `after` and `since` let through."""
        start = wanted.after + 1
        return max(start, self.first_since(wanted.since)) if wanted.since else start

    def first_since(self, received: int) -> int:
        """Return an id that parts the messages before a time from those since: times only grow."""
        low, high = self.totals.first_id, self.totals.last_id + 1
        while low < high:
            middle = (low + high) // 2
            row = self.read_one("SELECT id, received FROM message WHERE id >= ? "
                                "ORDER BY id LIMIT 1", (middle,))
            if row is None or row[1] >= received:
                high = middle
            else:
                low = row[0] + 1
        return low

    def spans(self, wanted: Filter) -> List[Span]:
        """Return the ranges of ids to look through.

        What is indexed is asked of the index, the newest tail that is not yet is scanned. So too
        for the read state, whose indexes know only what is digested.
        """
        low, last = self.first_after(wanted), 1 << 62
        texts = tuple(column for column in TEXTS if getattr(wanted, column))
        words, columns = self.index_words(wanted, texts) if self.has_index else ("", texts)
        border = (self.totals.indexed if words else
                  self.digested if wanted.is_read is not None else 0)
        tail = Span(max(low, border + 1), last, "", texts)
        return [tail] if low > border else [Span(low, border, words, columns), tail]

    def index_words(self, wanted: Filter, texts: Tuple[str, ...]) -> Tuple[str, Tuple[str, ...]]:
        """Return what to ask of the index, "" for nothing, and the columns left to compare.

        A text with rare trigrams is found by the rarest three: each further one, such as those of
        "example.com", would be another long list to go through. One without is asked for as is.
        """
        folded = {column: fold(getattr(wanted, column)) for column in texts}
        folded = {column: text for column, text in folded.items() if len(text) >= 3}
        rare = [f"{column} : ({words})" for column, text in folded.items()
                for words in [self.rare_words(column, text)] if words]
        if rare:
            return " AND ".join(rare), texts
        return (" AND ".join(f"{column} : {quote_words(text)}" for column, text in folded.items()),
                tuple(column for column in texts if column not in folded))

    def rare_words(self, column: str, text: str) -> str:
        """Return the rarest trigrams of a folded text for the index, "" if none of them is rare."""
        known = {three: self.trigrams.get((column, three), 0) for three in trigrams(text)}
        if not self.trigrams or min(known.values()) > RARE:
            return ""
        return " AND ".join(map(quote_words, sorted(known, key=lambda three: known[three])[:3]))

    def sample_trigrams(self) -> None:
        """Learn from a sample how frequent trigrams are, anew when the store has doubled."""
        totals = self.totals
        if not self.has_index or totals.indexed < 2 * self.sampled or totals.total < 20 * SAMPLE:
            return
        counts: "collections.Counter[Tuple[str, str]]" = collections.Counter()
        step = (totals.last_id - totals.first_id) / SAMPLE
        for number_ in range(SAMPLE):
            row = self.read_one(f"SELECT {', '.join(TEXTS)} FROM message WHERE id >= ? "
                                "ORDER BY id LIMIT 1", (totals.first_id + int(number_ * step),))
            for column, text in zip(TEXTS, row or ()):
                counts.update((column, three) for three in trigrams(fold(text[:SAMPLE_TEXT])))
        self.trigrams = {entry: count for entry, count in counts.items() if count > RARE}
        self.sampled = totals.indexed

    def condition(self, wanted: Filter, span: Span) -> Tuple[str, List[Any]]:
        """Return the WHERE of a filter within a range of ids, and its values."""
        if span.words:
            sql = ("JOIN search ON search.rowid = m.id WHERE search MATCH ? AND search.rowid "
                   "BETWEEN ? AND ?")
            values: List[Any] = [span.words, span.low, span.high]
        else:
            sql, values = "WHERE m.id BETWEEN ? AND ?", [span.low, span.high]
        for column in span.columns:
            text = getattr(wanted, column)
            # LIKE knows the case of ASCII only, but is fast; what it cannot judge is folded.
            sql += (f" AND (m.{column} LIKE ? ESCAPE '\\' OR m.{column} GLOB ? "
                    f"AND instr(fold(m.{column}), ?))")
            values += ["%" + re.sub(r"([%_\\])", r"\\\1", text) + "%",
                       "*[^ -~]*" if text.isascii() else "*", fold(text)]
        if wanted.is_read is not None:
            sql += " AND m.is_read = %d" % wanted.is_read
            sql += " AND m.digested = 1" if span.high <= self.digested else ""
        return sql, values

    def raw(self, ident: int) -> Source:
        """Return the raw message as a Source. Raises KeyError if there is none."""
        return Kept(self, ident).source()

    def trace_length(self, ident: int) -> Optional[int]:
        """Return how many bytes the fields take that were put on top of a message."""
        row = self.read_one("SELECT length(trace) FROM content WHERE id = ?", (ident,))
        return row[0] if row else None

    def peer(self, ident: int) -> str:
        """Return the address a message came from."""
        row = self.read_one("SELECT peer FROM content WHERE id = ?", (ident,))
        return row[0] if row else ""

    def attachment(self, name: str) -> Optional[Tuple[str, str, int]]:
        """Return filename, type and size of an attachment by its hash, the latest name first."""
        return self.read_one("SELECT filename, mime, size FROM attachment WHERE hash = ? "
                             "ORDER BY message DESC LIMIT 1", (name,))

    def digest(self, idents: Sequence[int]) -> Dict[int, Tuple[str, str, str]]:
        """Return (fields, body, error) of each message, digesting those that are not yet."""
        found = self.read_digests(idents)
        missing = [ident for ident in idents if ident not in found]
        if missing:
            try:
                self.digest_now(missing)
            except OSError as error:
                raise store_error(error) from error
            found.update(self.read_digests(missing))
        return found

    def read_digests(self, idents: Sequence[int]) -> Dict[int, Tuple[str, str, str]]:
        """Return the digests that are there."""
        found = {}
        for start in range(0, len(idents), 500):
            part = idents[start:start + 500]
            for row in self.read_rows("SELECT id, fields, body, error FROM digest WHERE id IN (%s)"
                                      % ",".join("?" * len(part)), part):
                found[row[0]] = row[1:]
        return found

    # -- Changing --

    def set_read(self, ident: int, is_read: int) -> bool:
        """Set the read state; return False if there is no such message."""
        def work(db: sqlite3.Connection) -> bool:
            row = db.execute(f"SELECT {MESSAGE} FROM message AS m WHERE id = ?",
                             (ident,)).fetchone()
            if row and Message(*row).is_read != is_read:
                db.execute("UPDATE message SET is_read = ? WHERE id = ?", (is_read, ident))
                if is_read:
                    self.outbox.add_event(db, "read", Message(*row))
                draft = self.draft
                self.draft = draft._replace(marks=draft.marks + 1, read_count=draft.read_count
                                            + (1 if is_read else -1))
            return row is not None
        return self.change(work)

    def delete(self, ident: int) -> bool:
        """Remove a message, and the files nobody else needs; return False if there is none."""
        return bool(self.change(functools.partial(self.delete_row, ident)))

    def delete_row(self, ident: int, db: sqlite3.Connection) -> bool:
        """Remove a message. A job of the writer."""
        row = db.execute(f"SELECT {MESSAGE} FROM message AS m WHERE id = ?", (ident,)).fetchone()
        if row is None:
            return False
        message, draft = Message(*row), self.draft
        self.unwanted += [name for (name,) in db.execute(
            "SELECT hash FROM attachment WHERE message = ? UNION "
            "SELECT file FROM content WHERE id = ? AND file IS NOT NULL", (ident, ident))]
        self.unindex(db, message)
        self.outbox.add_event(db, "deletion", message)
        self.outbox.message_goes(db, ident)
        for table, column in (("message", "id"), ("content", "id"), ("digest", "id"),
                              ("attachment", "message")):
            db.execute(f"DELETE FROM {table} WHERE {column} = ?", (ident,))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('last_id', ?)", (draft.last_id,))
        first = db.execute("SELECT min(id) FROM message").fetchone()[0] or 0
        self.draft = draft._replace(
            total=draft.total - 1, read_count=draft.read_count - message.is_read, first_id=first,
            epoch=draft.epoch + 1)
        return True

    def unindex(self, db: sqlite3.Connection, message: Message) -> None:
        """Take a message out of the index, which wants to hear again what it was given."""
        if self.has_index and message.id <= self.draft.indexed:
            db.execute("INSERT INTO search (search, rowid, sender, recipients, subject) "
                       "VALUES ('delete', ?, fold(?), fold(?), fold(?))",
                       (message.id, message.sender, message.recipients, message.subject))

    def release(self, files: Sequence[str]) -> None:
        """Remove those of the media files that no message refers to."""
        self.change(lambda db: self.unwanted.extend(files))

    def remove_unused(self) -> None:
        """Remove what is unwanted and nobody refers to.

        On the writer's thread, which alone adds references, and between transactions: a file must
        not be gone when the change that made it needless is undone.
        """
        while self.unwanted:
            name = self.unwanted.pop()
            used = self.db.execute("SELECT 1 FROM attachment WHERE hash = ? UNION ALL "
                                   "SELECT 1 FROM content WHERE file = ? LIMIT 1", (name, name))
            if used.fetchone() is None:
                self.media.remove(name)

    def sweep(self) -> None:
        """Remove files of the media tree that belong to nothing and are older than this start."""
        names = (name for name, changed in self.media.walk() if changed < self.started - 1)
        while not self.closing.is_set():
            batch = list(itertools.islice(names, 100))
            if not batch:
                return
            self.release(batch)

    # -- Digesting and indexing, in the background --

    def run_digester(self) -> None:
        """Digest and index what has come, politely: reception goes first."""
        try:
            self.sweep()
        except (StoreError, OSError) as error:
            log.error("store: the media tree was not swept: %s", error)
        while not self.closing.is_set():
            self.wanted.wait()
            self.wanted.clear()
            try:
                while not self.closing.is_set() and (self.digest_some() + self.index_some()):
                    pass
                self.sample_trigrams()
            except Exception as error:      # a border: what cannot be digested now can later
                log.error("store: cannot digest, trying again: %s", reason(error),
                          exc_info=not isinstance(error, (StoreError, OSError)))
                self.closing.wait(1)
                self.wanted.set()

    def digest_some(self) -> int:
        """Digest the oldest messages that wait; return how many there were."""
        last = self.totals.last_id
        rows = self.read_rows("SELECT id FROM message WHERE id > ? AND id <= ? AND digested = 0 "
                              "ORDER BY id LIMIT ?", (self.digested, last, DIGEST_BATCH))
        begun, done = time.monotonic(), []
        for (ident,) in rows:
            done.append((ident, self.digest_one(ident)))
            if time.monotonic() - begun > DIGEST_SECONDS:
                break
        self.keep_digests(done)
        self.settle(done[-1][0] if done else last)
        self.yield_to_reception(begun, last)
        return len(rows)

    def settle(self, upto: int) -> None:
        """Note that every message up to this one is digested."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('digested', ?)", (upto,))
        if upto > self.digested:
            self.change(work)
            self.digested = upto

    def yield_to_reception(self, begun: float, before: int) -> None:
        """Pause nine times as long as the work took if mail came in meanwhile."""
        if self.totals.last_id > before and not self.closing.is_set():
            self.closing.wait(min(1.0, 9 * (time.monotonic() - begun)))

    def digest_now(self, idents: Sequence[int]) -> None:
        """Digest these messages and keep the digests in one transaction."""
        for start in range(0, len(idents), 8):      # texts in memory are to be few
            self.keep_digests([(ident, self.digest_one(ident))
                               for ident in idents[start:start + 8]])

    def digest_tail(self) -> int:
        """Digest some of what waits for it; return how many messages that were."""
        rows = self.read_rows("SELECT id FROM message WHERE id > ? AND digested = 0 "
                              "ORDER BY id DESC LIMIT ?", (self.digested, DIGEST_BATCH))
        self.digest_now([ident for (ident,) in rows])
        return len(rows)

    def keep_digests(self, digests: Sequence[Tuple[int, Optional[Digest]]]) -> None:
        """Have the writer keep digests."""
        found = [(ident, digest) for ident, digest in digests if digest is not None]
        if found:
            self.change(functools.partial(self.save_digests, found))

    def digest_one(self, ident: int) -> Optional[Digest]:
        """Digest one message; None if it is gone."""
        try:
            length = self.trace_length(ident)
            return None if length is None else Digester(self.media, self.raw(ident), length).run()
        except KeyError:
            return None
        except Unreadable as error:
            log.error("store: %s", error)
            return Digest("[]", "null", "a file of this message cannot be read")
        except (OSError, StoreError):
            raise
        except Exception as error:      # a border: the message is kept and served raw
            log.exception("store: message %d cannot be digested", ident)
            return Digest("[]", "null", f"cannot be read: {type(error).__name__}")

    def save_digests(self, found: Sequence[Tuple[int, Digest]], db: sqlite3.Connection) -> None:
        """Write digests. A job of the writer."""
        for ident, digest in found:
            row = db.execute("SELECT digested, file FROM message JOIN content USING (id) "
                             "WHERE id = ?", (ident,)).fetchone()
            if row is None or row[0]:
                continue
            for name in {entry[0] for entry in digest.attachments} | {digest.file} - {None}:
                if not self.media.has(name or ""):
                    raise StoreError("a file went away while its message was digested")
            db.execute("INSERT INTO digest VALUES (?, ?, ?, ?)",
                       (ident, digest.fields, digest.body, digest.error))
            db.executemany("INSERT INTO attachment VALUES (?, ?, ?, ?, ?, ?)",
                           [(ident, number_, *entry)
                            for number_, entry in enumerate(digest.attachments)])
            db.execute("UPDATE message SET digested = 1, attachments = ? WHERE id = ?",
                       (len(digest.attachments), ident))
            if digest.holes:
                db.execute("UPDATE content SET raw = ?, file = ?, holes = ? WHERE id = ?",
                           (digest.kept, digest.file, json_text(digest.holes), ident))
                self.unwanted += [row[1]] if row[1] else []

    def index_some(self) -> int:
        """Index the next messages; return how many there were."""
        last = self.totals.last_id
        if not self.has_index or self.totals.indexed >= last:
            return 0
        begun = time.monotonic()
        count = self.change(functools.partial(self.index_rows, last))
        self.yield_to_reception(begun, last)
        return count

    def index_rows(self, last: int, db: sqlite3.Connection) -> int:
        """Index the next messages up to the last; return how many. A job of the writer."""
        ids = [ident for (ident,) in db.execute(
            "SELECT id FROM message WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
            (self.draft.indexed, last, INDEX_BATCH))]
        if ids:
            db.execute("INSERT INTO search (rowid, sender, recipients, subject) "
                       "SELECT id, fold(sender), fold(recipients), fold(subject) "
                       "FROM message WHERE id BETWEEN ? AND ?", (ids[0], ids[-1]))
        self.draft = self.draft._replace(indexed=ids[-1] if ids else last)
        return len(ids)


# -- The outbox: what is to leave --

class Entry(NamedTuple):
    """A row of the outbox."""
    id: int
    message: Optional[int]
    target: str
    key: str
    event: str
    recipients: str
    payload: Any
    only: int
    created: int
    state: str
    due: int
    attempts: int
    error: str


ENTRY = ", ".join(Entry._fields)
STATES = ("waiting", "delivered", "failed")


class Webhook(NamedTuple):
    """A row of the webhook table; `events` are words with blanks between."""
    id: str
    mailbox: str
    url: str
    events: str
    enabled: int
    created: int
    failures: int
    last_error: str


class Outbox:
    """The deliveries to come and their fate; made by Store, whose writer makes every change."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fresh: Set[str] = set()    # targets of rows of the transaction that is open
        self.hear: Callable[[Set[str]], None] = lambda targets: None    # of them, once committed
        self.failure_limit = 50         # failed attempts in a row that disable a webhook
        self.remember = 86400           # seconds
        self.hooks_changed = False      # in the transaction that is open, or one that failed
        self.load_webhooks(store.db)

    def load_webhooks(self, db: sqlite3.Connection) -> None:
        """Learn who is to hear of events; on the writer's thread."""
        hooks: Dict[str, List[Webhook]] = {}
        for row in db.execute("SELECT * FROM webhook WHERE enabled = 1"):
            hooks.setdefault(row[1], []).append(Webhook(*row))
        self.hooks = hooks              # by mailbox, at most MAX_WEBHOOKS

    def concerns(self, incoming: Sequence[Incoming]) -> bool:
        """Has any of these messages more rows here than the one that comes with its arrival?"""
        return bool(self.hooks) or any(len(message.onward) > 1 for message in incoming)

    def tell(self) -> None:
        """Take note of what is committed now, and let the couriers know of new rows."""
        if self.hooks_changed:
            self.hooks_changed = False
            self.load_webhooks(self.store.db)
        if self.fresh:
            fresh, self.fresh = self.fresh, set()
            self.hear(fresh)

    # -- Adding rows, inside the transaction of what they tell of --

    def add_arrivals(self, db: sqlite3.Connection, first: int, now: int,
                     incoming: Sequence[Incoming]) -> None:
        """Add the further deliveries of messages that have just been inserted."""
        rows: List[Tuple[Any, ...]] = []
        for ident, message in enumerate(incoming, first):
            self.fresh.update(onward.target for onward in message.onward[:1])
            rows += [(ident, onward.target, message.key, "arrival", "\n".join(onward.recipients),
                      None, onward.only, now, now) for onward in message.onward[1:]]
            if self.hooks:
                rows += self.event_rows("arrival", ident, message.envelope.recipients,
                                        message.key or str(uuid.uuid4()), now, None)
        self.add_rows(db, rows)

    def event_rows(self, event: str, ident: int, mailboxes: Iterable[str], key: str, now: int,
                   payload: Optional[str]) -> List[Tuple[Any, ...]]:
        """Return the rows that tell webhooks of an event."""
        return [(ident, f"webhook {hook.id}", key, event, hook.mailbox, payload, 0, now, now)
                for mailbox in dict.fromkeys(map(mailbox_name, mailboxes if self.hooks else ()))
                for hook in self.hooks.get(mailbox, ()) if event in hook.events.split()]

    def add_rows(self, db: sqlite3.Connection, rows: Sequence[Tuple[Any, ...]]) -> None:
        """Insert rows."""
        for start in range(0, len(rows), 100):
            part = rows[start:start + 100]
            db.execute("INSERT INTO outbox (message, target, key, event, recipients, payload, "
                       "only, created, due) VALUES "
                       + ",".join(["(?,?,?,?,?,?,?,?,?)"] * len(part)),
                       [value for row in part for value in row])
        self.fresh.update(row[1] for row in rows)

    def add_event(self, db: sqlite3.Connection, event: str, message: Message) -> None:
        """Tell the webhooks of a message's mailboxes that it was read or is being deleted."""
        payload = json_text(message._asdict()) if self.hooks else None      # it may soon be gone
        self.add_rows(db, self.event_rows(event, message.id, message.recipients.split("\n"),
                                          str(uuid.uuid4()), int(self.store.now() * 1000), payload))

    def message_goes(self, db: sqlite3.Connection, ident: int) -> None:
        """End what cannot be delivered once a message is gone; a job of the writer."""
        self.give_up(db, "the message was deleted", "message = ? AND payload IS NULL", ident)
        db.execute("UPDATE outbox SET message = NULL WHERE message = ?", (ident,))

    def give_up(self, db: sqlite3.Connection, why: str, which: str, value: Any) -> None:
        """Have deliveries fail that wait; a job of the writer."""
        db.execute("UPDATE outbox SET state = 'failed', error = ?, due = ? WHERE state = 'waiting' "
                   "AND " + which, (why, self.forget_at("failed"), value))

    def forget_at(self, state: str) -> int:
        """Return until when what is over now is remembered, in milliseconds."""
        seconds = self.remember * (10 if state == "failed" else 1)
        return int((self.store.now() + seconds) * 1000)

    def send(self, target: str, event: str, payload: Any, recipients: str = "") -> int:
        """Add a delivery of its own; return its id."""
        now = int(self.store.now() * 1000)

        def work(db: sqlite3.Connection) -> int:
            self.add_rows(db, [(None, target, str(uuid.uuid4()), event, recipients, payload, 0, now,
                                now)])
            return db.execute("SELECT last_insert_rowid()").fetchone()[0]
        return self.store.change(work)

    # -- For the couriers --

    def waiting(self) -> Dict[str, int]:
        """Return when the first delivery of each target is due, in milliseconds."""
        found: Dict[str, int] = {}
        target = ""
        while True:                     # from target to target by the index, not row by row
            row = self.store.read_one("SELECT target, due FROM outbox WHERE state = 'waiting' AND "
                                      "target > ? ORDER BY target, due LIMIT 1", (target,))
            if row is None:
                return found
            target = row[0]
            found[target] = row[1]

    def load(self, entries: Sequence[Entry]) -> Dict[int, Tuple[Message, Optional[bytes]]]:
        """Return the messages of deliveries, with their bytes as received if they are few.

        One query for all: each one would be a fight for the interpreter's lock.
        """
        ids = [entry.message for entry in entries if entry.message]
        rows = self.store.read_rows(
            f"SELECT {MESSAGE}, CASE WHEN file IS NULL AND holes = '' AND size < {SMALL} "
            "THEN raw END FROM message AS m JOIN content USING (id) WHERE m.id IN (%s)"
            % ",".join("?" * len(ids)), ids)
        return {row[0]: (Message(*row[:-1]), row[-1]) for row in rows}

    def take(self, target: str, lane: int, lanes: int, limit: int) -> List[Entry]:
        """Return the first deliveries of a lane: every row of a target belongs to one of them."""
        return [Entry(*row) for row in self.store.read_rows(
            f"SELECT {ENTRY} FROM outbox WHERE state = 'waiting' AND target = ? AND "
            "(? = 1 OR id % ? = ?) ORDER BY due, id LIMIT ?",
            (target, lanes, lanes, lane, limit))]

    def settle(self, entries: Sequence[Entry]) -> None:
        """Write down what became of deliveries, and forget messages that are only forwarded."""
        done = [entry for entry in entries if entry.state == "delivered"]
        other = [entry for entry in entries if entry.state != "delivered"]

        def work(db: sqlite3.Connection) -> None:
            db.execute("UPDATE outbox SET state = 'delivered', due = ?, attempts = attempts + 1, "
                       "error = '' WHERE state = 'waiting' AND id IN (%s)"
                       % ",".join("?" * len(done)),
                       [self.forget_at("delivered"), *(entry.id for entry in done)])
            db.executemany("UPDATE outbox SET state = ?, due = ?, attempts = ?, error = ?, "
                           "recipients = ? WHERE id = ? AND state = 'waiting'",
                           [(entry.state, entry.due, entry.attempts, entry.error,
                             entry.recipients, entry.id) for entry in other])
            for entry in entries:
                if entry.target.startswith("webhook "):
                    self.count_failures(db, entry)
        self.store.change(work)

    def count_failures(self, db: sqlite3.Connection, entry: Entry) -> None:
        """Note how a webhook fares; a job of the writer."""
        if entry.state == "delivered":
            db.execute("UPDATE webhook SET failures = 0, last_error = '' WHERE id = ? AND "
                       "failures > 0", (entry.target[8:],))
        else:
            db.execute("UPDATE webhook SET failures = failures + 1, last_error = ? WHERE id = ?",
                       (entry.error, entry.target[8:]))
            if db.execute("UPDATE webhook SET enabled = 0 WHERE id = ? AND enabled = 1 AND "
                          "failures >= ?", (entry.target[8:], self.failure_limit)).rowcount:
                self.hooks_changed = True
                self.give_up(db, "the webhook is disabled", "target = ?", entry.target)
                log.error("outbox: %s is disabled after %d failures: %s", entry.target,
                          self.failure_limit, entry.error)

    def purge(self, limit: int = 500) -> int:
        """Forget what is over and has been remembered long enough; return how much it was."""
        now = int(self.store.now() * 1000)

        def work(db: sqlite3.Connection) -> int:
            rows = db.execute("SELECT id, message FROM outbox WHERE state <> 'waiting' AND "
                              "state IN ('delivered', 'failed') AND due <= ? LIMIT ?",
                              (now, limit)).fetchall()
            for ident, message in rows:
                goes, = db.execute("SELECT only = 2 OR only AND state = 'delivered' FROM outbox "
                                   "WHERE id = ?", (ident,)).fetchone()
                db.execute("DELETE FROM outbox WHERE id = ?", (ident,))
                if goes and not db.execute("SELECT 1 FROM outbox WHERE message = ?",
                                           (message,)).fetchone():
                    self.store.delete_row(message, db)
                elif goes:              # 2: the last of the webhooks' takes it along
                    db.execute("UPDATE outbox SET only = 2 WHERE message = ? AND only = 0",
                               (message,))
            return len(rows)
        return self.store.change(work)

    # -- For the operator --

    def find(self, state: str = "", target: str = "", after: int = 0, count: int = 50,
             ) -> List[Entry]:
        """Return deliveries, oldest first."""
        return [Entry(*row) for row in self.store.read_rows(
            f"SELECT {ENTRY} FROM outbox WHERE id > ? AND (? = '' OR state = ?) AND "
            "(? = '' OR target = ?) ORDER BY id LIMIT ?",
            (after, state, state, target, target, count))]

    def counts(self) -> Dict[str, int]:
        """Return the number of deliveries in each state."""
        over = "state <> 'waiting' AND state = "        # so that SQLite sees which index serves
        return {state: self.store.read_rows(f"SELECT count(*) FROM outbox WHERE {which}")[0][0]
                for state, which in (("waiting", "state = 'waiting'"),
                                     ("delivered", over + "'delivered'"),
                                     ("failed", over + "'failed'"))}

    def retry(self, ident: int) -> bool:
        """Have a delivery that failed or waits tried now; False if there is none."""
        now = int(self.store.now() * 1000)

        def work(db: sqlite3.Connection) -> bool:
            row = db.execute("SELECT target, message, payload FROM outbox WHERE id = ? AND "
                             "state <> 'delivered'", (ident,)).fetchone()
            if row is None:
                return False
            db.execute("UPDATE outbox SET state = 'waiting', due = 0, created = ?, attempts = 0 "
                       "WHERE id = ?", (now, ident))
            self.fresh.add(row[0])
            return True
        return self.store.change(work)

    def drop(self, ident: int) -> bool:
        """Forget a delivery; False if there is none."""
        return self.store.change(lambda db: db.execute(
            "DELETE FROM outbox WHERE id = ?", (ident,)).rowcount > 0)

    # -- Webhooks --

    def webhook(self, ident: str) -> Optional[Webhook]:
        """Return a webhook, or None."""
        row = self.store.read_one("SELECT * FROM webhook WHERE id = ?", (ident,))
        return Webhook(*row) if row else None

    def webhooks(self, mailbox: str) -> List[Webhook]:
        """Return the webhooks of a mailbox."""
        return [Webhook(*row) for row in self.store.read_rows(
            "SELECT * FROM webhook WHERE mailbox = ? ORDER BY created", (mailbox_name(mailbox),))]

    def save_webhook(self, hook: Webhook) -> Webhook:
        """Make a webhook, or change the one of that id; return it. Raises StoreError."""
        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO webhook VALUES (?,?,?,?,?,?,?,?)", hook)
            if db.execute("SELECT count(*) FROM webhook").fetchone()[0] > MAX_WEBHOOKS:
                raise StoreError(f"there are {MAX_WEBHOOKS} webhooks already")
            if not hook.enabled:
                self.give_up(db, "the webhook is disabled", "target = ?", f"webhook {hook.id}")
            self.hooks_changed = True
        self.store.change(work)
        return hook

    def delete_webhook(self, ident: str) -> bool:
        """Remove a webhook and what waits for it; False if there is none."""
        def work(db: sqlite3.Connection) -> bool:
            found = db.execute("DELETE FROM webhook WHERE id = ?", (ident,)).rowcount > 0
            db.execute("DELETE FROM outbox WHERE target = ? AND state = 'waiting'",
                       (f"webhook {ident}",))
            self.hooks_changed = True
            return found
        return self.store.change(work)


class Desk:
    """The database of a server that may be running, for a command that changes a few rows."""

    def __init__(self, path: str) -> None:
        if not os.path.exists(path):
            raise SettingsError(f"--db_path {path}: there is no such database")
        try:
            self.db = sqlite3.connect(path, isolation_level=None, timeout=10)
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise SettingsError(f"--db_path {path}: {error}") from None
        if version != SCHEMA:
            raise SettingsError(f"--db_path {path}: is of another pegmail (schema {version}, this "
                                f"one has {SCHEMA}); start the server once with this one")
        self.now = time.time
        self.outbox = Outbox(self)      # type: ignore[arg-type]

    def change(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run work(connection) in a transaction; return its result."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            result = work(self.db)
            self.db.execute("COMMIT")
            return result
        except BaseException:
            self.db.execute("ROLLBACK")
            raise

    def read_rows(self, sql: str, values: Sequence[Any] = ()) -> List[Any]:
        """Return all rows of a query."""
        return self.db.execute(sql, values).fetchall()


def mailbox_name(address: str) -> str:
    """Return an address as mailboxes are compared: without case."""
    return address.lower()


def trigrams(text: str) -> Set[str]:
    """Return the runs of three characters in a text."""
    return {text[place:place + 3] for place in range(len(text) - 2)}


def quote_words(text: str) -> str:
    """Return a text as a string of the index's query language."""
    return '"' + fold(text).replace('"', '""') + '"'


def create_private(path: str) -> None:
    """Make a database that only its owner may read, if there is none."""
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
            begin = file.read(16)
    except OSError as error:
        raise SettingsError(f"--db_path {path}: {reason(error)}; choose a place that can be "
                            "written") from None
    if begin not in (b"", b"SQLite format 3\0"):
        raise SettingsError(f"--db_path {path}: is not a database; choose another file")


def lock_database(path: str) -> Any:
    """Take the lock that keeps a second server away from a database; return the open file."""
    lock = os.path.realpath(path) + ".lock"      # a link to a database is the same one
    try:
        os.close(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600))
        file = open(lock, "r+")
    except OSError as error:
        raise SettingsError(f"--db_path {path}: {reason(error)}; choose a place that can be "
                            "written") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = file.read(20).strip() or "unknown"
        file.close()
        raise SettingsError(f"--db_path {path}: another pegmail (process {owner}) uses it; stop "
                            "that one or choose another database") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


# =====================================================================================
# 5. Reactor: one thread that owns every socket, and a few that work for it
#
# A Stream feeds what arrives to its session and does what the session wants next. Streams read
# only while their session wants to, so a peer's hurry is never our memory; deadlines are in a
# heap. Knows nothing of mail.
# =====================================================================================

READ_SIZE = 64 << 10          # bytes taken from a socket in one go
MAX_LINGER = 1 << 20          # bytes thrown away while a peer hears our last words
LINGER_SECONDS = 2.0
POOL_THREADS = 8

READ, DRAIN, STARTTLS = "read", "drain", "starttls"   # more bytes / an empty outbox / a handshake


class Work(NamedTuple):
    """A session wants func(*args) to run in the pool, and its result."""
    func: Callable[..., Any]
    args: Tuple[Any, ...] = ()


class Ask(NamedTuple):
    """A session wants start(*args, done) to be called, and what done(result, error) hears."""
    start: Callable[..., None]
    args: Tuple[Any, ...] = ()


Wants = Union[None, str, Work, Ask]
Steps = Generator[Wants, Any, Any]


class Session:
    """The server's half of one conversation: no socket, clock or database.

    Bytes go in by feed(); what is to be sent gathers in `outbox`; each step returns what is
    wanted next, None when the conversation is over.
    """

    def __init__(self) -> None:
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.steps = self.run()
        self.wants: Wants = READ
        self.stopping = False

    @property
    def name(self) -> str:
        """What log lines about the connection begin with."""
        raise NotImplementedError

    def run(self) -> Steps:
        """The conversation; a generator that yields what it wants."""
        raise NotImplementedError

    def start(self) -> Wants:
        """Begin; return what is wanted first."""
        return self.resume()

    def feed(self, data: bytes) -> Wants:
        """Take bytes and go on; return what is wanted next."""
        self.inbox += data
        return self.resume() if self.wants is READ else self.wants

    def resume(self, result: Any = None) -> Wants:
        """Go on with the result of what was wanted."""
        try:
            self.wants = self.steps.send(result)
        except StopIteration:
            self.wants = None
        return self.wants

    def fail(self, error: BaseException) -> Wants:
        """Go on with the error that came of what was wanted."""
        try:
            self.wants = self.steps.throw(error)
        except StopIteration:
            self.wants = None
        return self.wants

    def stop(self, why: str) -> Wants:
        """End soon, for a reason of one word: "timeout", "shutdown" or "bug"."""
        self.wants = None
        return None

    def ended(self) -> None:
        """The connection is gone."""
        self.steps.close()

    def write(self, data: bytes) -> None:
        """Add to what is to be sent."""
        self.outbox += data

    def read_exactly(self, count: int) -> Steps:
        """Wait for that many bytes; return them."""
        while len(self.inbox) < count:
            yield READ
        data = bytes(self.inbox[:count])
        del self.inbox[:count]
        return data


class Loop:
    """The reactor: sockets, deadlines and the pool; run() is its one thread. Made by Server."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.now = time.monotonic()
        self.timers: List[List[Any]] = []       # a heap of [when, order, function or None]
        self.cancelled = 0                      # timers that are None; fewer than half
        self.order = itertools.count()
        self.calls: "collections.deque[Tuple[Any, ...]]" = collections.deque()
        self.asleep = False
        self.stopped = False
        self.thread = 0                         # of run()
        self.buffer = memoryview(bytearray(READ_SIZE))
        self.streams: Dict["Stream", None] = {}
        self.jobs: "queue.SimpleQueue[Any]" = queue.SimpleQueue()   # at most one a connection
        self.pool = [threading.Thread(target=self.run_jobs, name="pool")
                     for _ in range(POOL_THREADS)]
        self.waker, waker_end = socket.socketpair()
        self.waker.setblocking(False)
        waker_end.setblocking(False)
        self.waker_end = waker_end
        self.selector.register(waker_end, selectors.EVENT_READ, self.woken)

    def call_soon(self, func: Callable[..., Any], *args: Any) -> None:
        """Have func(*args) called on the loop's thread; may be called from any thread."""
        self.calls.append((func, *args))
        if self.asleep:
            self.asleep = False
            with contextlib.suppress(OSError):      # full: it is awake; closed: it is over
                self.waker.send(b"!")

    def is_here(self) -> bool:
        """Is this the loop's thread?"""
        return threading.get_ident() == self.thread

    def call_later(self, seconds: float, func: Callable[[], None]) -> List[Any]:
        """Have func() called after some seconds; return the timer. On the loop's thread only."""
        timer = [time.monotonic() + seconds, next(self.order), func]
        heapq.heappush(self.timers, timer)
        return timer

    def cancel(self, timer: List[Any]) -> None:
        """Forget a timer; once half of the heap is such, it is made anew."""
        if timer[2] is not None:
            timer[2] = None
            self.cancelled += 1
            if self.cancelled > 100 + len(self.timers) // 2:
                self.timers = [entry for entry in self.timers if entry[2] is not None]
                heapq.heapify(self.timers)
                self.cancelled = 0

    def run_timers(self) -> None:
        """Call what is due."""
        while self.timers and self.timers[0][0] <= self.now:
            timer = heapq.heappop(self.timers)
            func, timer[2] = timer[2], None
            if func is None:
                self.cancelled -= 1
            else:
                self.call(func)

    def woken(self, events: int) -> None:
        """Take the bytes that woke the loop."""
        with contextlib.suppress(BlockingIOError):
            self.waker_end.recv(4096)

    def run(self) -> None:
        """Serve until stop()."""
        self.thread = threading.get_ident()
        for thread in self.pool:
            thread.start()
        try:
            while not self.stopped:
                for key, events in self.selector.select(self.patience()):
                    self.call(key.data, events)
                self.now = time.monotonic()
                for _ in range(len(self.calls)):
                    self.call(*self.calls.popleft())
                self.run_timers()
        finally:
            self.close()

    def call(self, func: Callable[..., Any], *args: Any) -> None:
        """Call func(*args); a bug in it is logged and ends nothing else."""
        try:
            func(*args)
        except Exception:               # a border: the server lives
            log.exception("bug on the loop's thread")

    def close(self) -> None:
        """Close every stream and end the pool."""
        for stream in list(self.streams):
            self.call(stream.close)
        for _ in self.pool:
            self.jobs.put(None)
        for thread in self.pool:
            thread.join()
        self.selector.close()
        self.waker.close()
        self.waker_end.close()

    def patience(self) -> float:
        """Return how long to wait for events, and let call_soon know that we do."""
        self.asleep = True
        if self.calls:
            self.asleep = False
            return 0
        if self.timers:
            return max(0.0, min(60.0, self.timers[0][0] - time.monotonic()))
        return 60

    def stop(self) -> None:
        """Make run() return soon; from any thread."""
        self.call_soon(setattr, self, "stopped", True)

    def work(self, func: Callable[..., Any], args: Tuple[Any, ...], done: Done) -> None:
        """Run func(*args) in the pool; done hears of it there.

        concurrent.futures does the same at ten times the cost, which a request would feel.
        """
        self.jobs.put((func, args, done))

    def run_jobs(self) -> None:
        """Run jobs until None comes; a thread of the pool."""
        for func, args, done in iter(self.jobs.get, None):
            try:
                result = func(*args)
            except Exception as error:      # a border: whoever asked hears of it
                done(None, error)
            else:
                done(result, None)


class Stream:
    """One connection: a socket, its buffers and deadlines, and the session they serve.

    Made by Listener for each connection; lives on the loop's thread.
    """

    __slots__ = ("loop", "sock", "session", "peer", "idle", "deadline", "last", "interest",
                 "events", "handshaking", "eof", "lingered", "listener", "timer")

    def __init__(self, listener: "Listener", sock: Any, session: Session, peer: str) -> None:
        self.loop = listener.loop
        self.listener = listener
        self.sock = sock
        self.session = session
        self.peer = peer
        self.idle = listener.idle
        self.deadline = self.loop.now + self.idle
        self.last = self.loop.now + listener.longest     # when the connection ends whatever it does
        self.events = selectors.EVENT_READ               # what the selector watches for
        self.interest = 0                                # what TLS needs, in place of what we want
        self.handshaking = False
        self.eof = False
        self.lingered = -1                               # bytes thrown away since the last words
        self.loop.selector.register(sock, self.events, self.ready)
        self.loop.streams[self] = None
        self.timer = self.loop.call_later(min(self.idle, listener.longest), self.check_deadline)

    def begin(self) -> None:
        """Let the session speak first."""
        self.guard(self.session.start)

    def ready(self, events: int) -> None:
        """Do what the socket is ready for."""
        if self.handshaking:
            self.handshake()
        elif self.lingered >= 0:
            self.discard()
        else:
            interest = self.interest
            if events & selectors.EVENT_WRITE or interest == selectors.EVENT_READ:
                self.flush()
            readable = events & selectors.EVENT_READ or interest == selectors.EVENT_WRITE
            if readable and self.sock and not self.handshaking and self.lingered < 0:
                self.receive()

    def receive(self) -> None:
        """Take what has arrived, if the session wants it."""
        if self.session.wants is not READ:
            self.watch(self.events & ~selectors.EVENT_READ)
            return
        try:
            count = self.sock.recv_into(self.loop.buffer)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except ssl.SSLWantWriteError:       # TLS 1.2 renegotiation and TLS 1.3 key updates
            self.interest = selectors.EVENT_WRITE
            self.watch(selectors.EVENT_WRITE)
            return
        except (OSError, ValueError):
            self.close()
            return
        self.interest = 0
        if count == 0:
            self.eof = True
            self.finish()
            return
        self.deadline = self.loop.now + self.idle
        self.guard(self.session.feed, self.loop.buffer[:count])

    def guard(self, step: Callable[..., Wants], *args: Any) -> None:
        """Take a step of the session and do what it wants; a bug ends it and is logged once."""
        try:
            wants = step(*args)
        except Exception:           # a border: the connection ends, the server lives
            log.exception("%s bug in this conversation", self.session.name)
            wants = self.session.stop("bug")
        self.obey(wants)

    def obey(self, wants: Wants) -> None:
        """Do what the session wants."""
        if self.session.outbox:
            self.flush()
            if not self.sock:
                return
        if wants is READ:
            if self.eof:
                self.finish()
                return
            if not self.events & selectors.EVENT_READ:
                self.watch(self.events | selectors.EVENT_READ)
            if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
                self.loop.call_soon(self.read_pending)
        elif isinstance(wants, Ask):
            self.call(wants.start, *wants.args, self.later)
        elif isinstance(wants, Work):
            self.loop.work(wants.func, wants.args, self.later)
        elif not self.session.outbox:
            self.drained()

    def call(self, start: Callable[..., None], *args: Any) -> None:
        """Call what may fail at once; its error is the result."""
        try:
            start(*args)
        except Exception as error:      # a border: the session decides what it means
            self.later(None, error)

    def later(self, result: Any, error: Optional[BaseException]) -> None:
        """Go on with a result; from any thread."""
        if self.loop.is_here():
            self.proceed(result, error)
        else:
            self.loop.call_soon(self.proceed, result, error)

    def proceed(self, result: Any = None, error: Optional[BaseException] = None) -> None:
        """Go on with the result of what the session wanted."""
        if not self.sock:
            return
        self.deadline = self.loop.now + self.idle
        if error is None:
            self.guard(self.session.resume, result)
        else:
            self.guard(self.session.fail, error)

    def read_pending(self) -> None:
        """Read what TLS has decrypted already, of which the selector knows nothing."""
        if self.sock and self.session.wants is READ:
            self.receive()

    def flush(self) -> None:
        """Send as much of the outbox as the socket takes."""
        outbox = self.session.outbox
        try:
            sent = self.sock.send(outbox) if outbox else 0
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        except ssl.SSLWantReadError:
            self.interest = selectors.EVENT_READ
            return
        except (OSError, ValueError):
            self.close()
            return
        if sent:
            self.deadline = self.loop.now + self.idle
            del outbox[:sent]
        self.interest = 0
        if outbox:
            self.watch(self.events | selectors.EVENT_WRITE)
        elif self.events & selectors.EVENT_WRITE:
            self.watch(self.events & ~selectors.EVENT_WRITE)
            self.drained()

    def drained(self) -> None:
        """Do what had to wait until the outbox was empty."""
        wants = self.session.wants
        if wants is None:
            self.finish()
        elif wants is DRAIN:
            self.loop.call_soon(self.proceed)       # after the others have had their turn
        elif wants is STARTTLS:
            self.start_tls()

    def start_tls(self) -> None:
        """Begin the handshake (the server's side)."""
        self.watch(0)
        try:
            self.sock.getpeername()         # what fails here leaves no half-made TLS socket
            self.sock = self.listener.tls().wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError):       # the peer is gone already, and its descriptor with it
            self.close()
            return
        self.handshaking = True
        self.handshake()

    def handshake(self) -> None:
        """Take the next step of the handshake."""
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self.watch(selectors.EVENT_READ)
        except ssl.SSLWantWriteError:
            self.watch(selectors.EVENT_WRITE)
        except (OSError, ValueError) as error:
            log.info("%s TLS handshake failed: %s", self.session.name,
                     clean_line(reason(error), 200))
            self.close()
        else:
            self.handshaking = False
            self.watch(selectors.EVENT_READ)
            version, (cipher, _, bits) = self.sock.version(), self.sock.cipher()
            self.proceed(f"{version} cipher {cipher} bits {bits}")

    def watch(self, events: int) -> None:
        """Tell the selector what to watch for."""
        if events == self.events or not self.sock:
            return
        if not self.events:
            self.loop.selector.register(self.sock, events, self.ready)
        elif not events:
            self.loop.selector.unregister(self.sock)
        else:
            self.loop.selector.modify(self.sock, events, self.ready)
        self.events = events

    def check_deadline(self) -> None:
        """End what has been silent or has lasted too long; else look again at the deadline."""
        if not self.sock:
            return
        waiting = isinstance(self.session.wants, (Work, Ask))
        if waiting and self.loop.now >= self.deadline:
            self.deadline = self.loop.now + self.idle       # the delay is ours, not the peer's
        when = min(self.deadline, max(self.last, self.loop.now + 1) if waiting else self.last)
        if self.loop.now < when:
            self.timer = self.loop.call_later(when - self.loop.now, self.check_deadline)
        elif self.session.outbox or self.handshaking or self.lingered >= 0:
            self.close()                                    # it does not even read
        else:
            self.stop("timeout")
            if self.sock and self.lingered < 0:         # it does not take its last words
                self.timer = self.loop.call_later(LINGER_SECONDS, self.close)

    def stop(self, why: str) -> None:
        """Have the session say its last words, now or when what it is at is done."""
        if self.sock and self.lingered < 0 and not self.handshaking:
            if self.session.stop(why) is None:
                self.obey(None)

    def finish(self) -> None:
        """Close once the peer has read our last words, or a moment has passed.

        Closing at once would, where the peer's bytes wait unread, reset the connection and take
        the words away.
        """
        if self.session.wants is not None and isinstance(self.session.wants, (Work, Ask)):
            return                      # the answer is still to come
        if self.session.outbox and self.sock:
            self.session.wants = None   # what was said already is still to be taken
            self.watch(selectors.EVENT_WRITE)
            return
        self.session.ended()
        if self.eof or not self.sock:
            self.close()
            return
        self.session.wants = None
        self.lingered = 0
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.unwrap()
        with contextlib.suppress(OSError, ValueError):
            self.sock.shutdown(socket.SHUT_WR)
        self.watch(selectors.EVENT_READ)
        self.loop.cancel(self.timer)
        self.timer = self.loop.call_later(LINGER_SECONDS, self.close)

    def discard(self) -> None:
        """Throw away what the peer still sends."""
        try:
            count = self.sock.recv_into(self.loop.buffer)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except (OSError, ValueError):
            count = 0
        self.lingered += count
        if not count or self.lingered > MAX_LINGER:
            self.close()

    def close(self) -> None:
        """Close the socket. May be called twice."""
        if not self.sock:
            return
        self.loop.cancel(self.timer)
        self.watch(0)
        self.sock.close()
        self.sock = None
        del self.loop.streams[self]
        self.session.ended()
        self.listener.closed(self)


class Listener:
    """A listening socket: accepts within the limits and makes a session for each connection.

    Made by Server. `make_session(peer)` returns the session, `refuse` the bytes for one too many.
    """

    def __init__(self, loop: Loop, sock: socket.socket, make_session: Callable[[str], Session],
                 refuse: bytes, idle: float, longest: float, limits: "Limits",
                 tls: Callable[[], ssl.SSLContext]) -> None:
        self.loop = loop
        self.sock = sock
        self.make_session = make_session
        self.refuse = refuse
        self.idle = idle
        self.longest = longest
        self.limits = limits
        self.tls = tls
        sock.setblocking(False)
        loop.call_soon(self.watch)

    def watch(self) -> None:
        """Begin to accept."""
        if self.sock.fileno() >= 0 and not self.loop.stopped:
            self.loop.selector.register(self.sock, selectors.EVENT_READ, self.accept)

    def accept(self, events: int) -> None:
        """Accept what waits, a few at a time so that others have their turn."""
        for _ in range(32):
            try:
                sock, address = self.sock.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:        # out of descriptors: let some connections end first
                log.error("cannot accept connections for a second: %s", reason(error))
                self.loop.selector.unregister(self.sock)
                self.loop.call_later(1, self.watch)
                return
            self.open(sock, peer_address(address))

    def open(self, sock: socket.socket, peer: str) -> None:
        """Make the stream of a new connection, or turn it away."""
        sock.setblocking(False)
        why = self.limits.take(peer)
        if why:
            log.warning("%s turned away: %s", peer, why)
            with contextlib.suppress(OSError):
                sock.send(self.refuse)
            sock.close()
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Stream(self, sock, self.make_session(peer), peer).begin()

    def closed(self, stream: Stream) -> None:
        """A connection of this listener has ended."""
        self.limits.give_back(stream.peer)

    def close(self) -> None:
        """Accept no more."""
        with contextlib.suppress(KeyError, ValueError):
            self.loop.selector.unregister(self.sock)
        self.sock.close()


def peer_address(address: Any) -> str:
    """Return the address in what accept() gave; a Unix socket's peer is this host."""
    if not isinstance(address, tuple):
        return "127.0.0.1"
    text = address[0].partition("%")[0]
    return text[7:] if text.startswith("::ffff:") and "." in text else text


class Limits:
    """Counts connections, in total and per peer; shared by listeners of one kind."""

    def __init__(self, total: int, per_peer: int, exempt: Callable[[str], bool]) -> None:
        self.total = total
        self.per_peer = per_peer
        self.exempt = exempt            # proxies speak for many
        self.peers: Dict[str, int] = {}
        self.count = 0
        self.refused = 0

    def take(self, peer: str) -> str:
        """Count a connection in and return nothing, or say why it is one too many."""
        if self.count >= self.total:
            self.refused += 1
            return f"{self.count} connections are open (--max_connections)"
        if self.peers.get(peer, 0) >= self.per_peer and not self.exempt(peer):
            self.refused += 1
            return f"it has {self.per_peer} connections open (--max_connections_per_peer)"
        self.count += 1
        self.peers[peer] = self.peers.get(peer, 0) + 1
        return ""

    def give_back(self, peer: str) -> None:
        """Count a connection out."""
        self.count -= 1
        self.peers[peer] -= 1
        if not self.peers[peer]:
            del self.peers[peer]


# =====================================================================================
# 6. Trust: asking the DNS
#
# A stub resolver: RFC 1035, 2181, 2308, 3596; MX for mail by RFC 5321 5.1 and 7505. It asks the
# servers of resolv.conf and believes only answers to what it asked. Its calls block.
# =====================================================================================

DNS_ATTEMPTS = 2              # rounds over the servers, as in resolv.conf(5)
MAX_SERVERS = 3               # MAXNS of resolv.conf(5)
MAX_RECORDS = 500             # records read of one answer; more is an attack, not a zone
MAX_NAME = 255                # RFC 1035 2.3.4
MAX_POINTERS = 127            # a name has no more labels; more pointers go in circles
MAX_ALIASES = 8               # CNAMEs followed; BIND and Unbound allow 11 to 16
MAX_CACHE = 2000              # answers remembered
MAX_TTL = 3600                # seconds; who changes an MX does not wait a day for us
NEGATIVE_TTL = 60             # seconds; so short that the SOA (RFC 2308 5) need not be read
MAX_TRIES = 20                # hosts, and addresses of them, tried for one message

KINDS = {"A": 1, "CNAME": 5, "PTR": 12, "MX": 15, "TXT": 16, "AAAA": 28}
NO_ERROR, NO_SUCH_NAME = 0, 3         # RFC 1035 4.1.1


class DNSError(Exception):
    """DNS gave no usable answer; it may give one later."""


class NoSuchName(DNSError):
    """The name does not exist, and that is certain."""


class Undeliverable(Exception):
    """DNS says for certain that a domain takes no mail; `reply` says why."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


class Record(NamedTuple):
    """One resource record; `value` depends on the kind and is None for kinds not in KINDS."""
    name: str
    kind: int
    ttl: int
    value: Any


class DNSAnswer(NamedTuple):
    """An answer: `question` is in wire form and lower case, as it is compared."""
    ident: int
    question: bytes
    code: int
    truncated: bool
    records: Tuple[Record, ...]


def encode_name(name: str) -> bytes:
    """Return a domain name in wire form (RFC 1035 3.1); raise NoSuchName if none can be so named.

    Labels may hold any printable ASCII; U-labels become A-labels.
    """
    text = name.rstrip(".") if name.isascii() else normalize_domain(name) or "\0"
    labels = text.lower().encode("ascii").split(b".") if text else []
    wire = b"".join(bytes([len(label) & 63]) + label for label in labels) + b"\0"
    if len(wire) > MAX_NAME or not all(re.fullmatch(rb"[!-~]{1,63}", label) for label in labels):
        raise NoSuchName(f"{clean_line(name, 80)} cannot be a domain name")
    return wire


def encode_query(ident: int, name: str, kind: str) -> bytes:
    """Return a query with recursion desired (RFC 1035 4.1)."""
    header = struct.pack(">6H", ident, 0x0100, 1, 0, 0, 0)
    return header + encode_name(name) + struct.pack(">2H", KINDS[kind], 1)


def decode_answer(data: bytes) -> DNSAnswer:
    """Read an answer (RFC 1035 4.1); raise DNSError, and nothing else, if it is none."""
    try:
        ident, flags, questions, count = struct.unpack_from(">4H4x", data)
        if flags & 0xF800 != 0x8000 or questions != 1:
            raise DNSError("not an answer to one query")
        place = decode_name(data, 12)[1] + 4
        question, truncated = data[12:place].lower(), bool(flags & 0x0200)
        records = []
        for _ in range(0 if truncated else min(count, MAX_RECORDS)):
            record, place = decode_record(data, place)
            records.append(record)
    except (struct.error, IndexError, ValueError) as error:
        raise DNSError("the answer is malformed") from error
    return DNSAnswer(ident, question, flags & 15, truncated, tuple(records))


def decode_name(data: bytes, place: int) -> Tuple[str, int]:
    """Return a name in lower case and the place behind it (RFC 1035 4.1.4).

    Odd bytes in labels are written as \\DDD, so that a dot always is between labels.
    """
    labels: List[bytes] = []
    end, size, pointers = 0, 1, 0
    while data[place]:
        length = data[place]
        if length >= 0xC0:
            end = end or place + 2
            place = (length & 0x3F) << 8 | data[place + 1]
            pointers += 1
            if pointers > MAX_POINTERS:
                raise DNSError("the compression pointers of a name do not end")
            continue
        size += length + 1
        if length > 63 or size > MAX_NAME or place + length >= len(data):
            raise DNSError("a name is too long")
        labels.append(data[place + 1:place + 1 + length])
        place += length + 1
    return ".".join(map(label_text, labels)), end or place + 1


def label_text(label: bytes) -> str:
    """Return a label in lower case, odd bytes as \\DDD (RFC 1035 5.1)."""
    return re.sub(r"[^!-\-/-\[\]-~]", lambda odd: f"\\{ord(odd.group()):03d}",
                  label.decode("latin-1").lower())


def decode_record(data: bytes, place: int) -> Tuple[Record, int]:
    """Return a resource record and the place behind it (RFC 1035 4.1.3)."""
    name, place = decode_name(data, place)
    kind, klass, ttl, length = struct.unpack_from(">HHLH", data, place)
    start, end = place + 10, place + 10 + length
    if end > len(data):
        raise DNSError("a record is cut off")
    read = DECODERS.get(kind) if klass == 1 else None
    ttl = ttl if ttl < 1 << 31 else 0             # RFC 2181 8
    return Record(name, kind, ttl, read(data, start, end) if read else None), end


def decode_text_record(data: bytes, start: int, end: int) -> str:
    """Return the strings of a TXT record, joined (RFC 1035 3.3.14, RFC 7208 3.3)."""
    text = b""
    while start < end:
        text += data[start + 1:min(start + 1 + data[start], end)]
        start += 1 + data[start]
    return text.decode("utf-8", "replace")


def decode_address(data: bytes, start: int, end: int) -> str:
    """Return the address of an A or AAAA record (RFC 1035 3.4.1, RFC 3596 2.2)."""
    return str(ipaddress.ip_address(data[start:end]))


DECODERS: Dict[int, Callable[[bytes, int, int], Any]] = {
    KINDS["A"]: decode_address, KINDS["AAAA"]: decode_address, KINDS["TXT"]: decode_text_record,
    KINDS["CNAME"]: lambda data, start, end: decode_name(data, start)[0],
    KINDS["PTR"]: lambda data, start, end: decode_name(data, start)[0],
    KINDS["MX"]: lambda data, start, end: (int.from_bytes(data[start:start + 2], "big"),
                                           decode_name(data, start + 2)[0])}


def follow_aliases(records: Sequence[Record], name: str, kind: int) -> Tuple[int, List[Any]]:
    """Return the lowest TTL and the values at the end of the CNAMEs in an answer."""
    aliases = {record.name: record for record in records
               if record.kind == KINDS["CNAME"] and record.value is not None}
    ttls = [MAX_TTL]
    for _ in range(MAX_ALIASES):
        found = [record for record in records if (record.name, record.kind) == (name, kind)]
        if found or name not in aliases:
            ttls += [record.ttl for record in found]
            return min(ttls), [record.value for record in found if record.value is not None]
        ttls.append(aliases[name].ttl)
        name = aliases[name].value
    raise DNSError(f"the aliases of {clean_line(name, 80)} do not end")


def read_resolv_conf(path: str = "/etc/resolv.conf") -> List[str]:
    """Return the name servers that resolv.conf(5) names, or this host."""
    servers = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in itertools.islice(file, 1000):
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                servers.append(words[1])
    return servers[:MAX_SERVERS] or ["127.0.0.1"]


class Resolver:
    """Asks the name servers of this host, and remembers answers; any thread may use it.

    A server is written as an address, or address:port ([v6]:port).
    """

    def __init__(self, servers: Sequence[str], timeout: float = 5,
                 now: Callable[[], float] = time.monotonic, random: Any = None) -> None:
        self.servers = [host_port(server) for server in servers[:MAX_SERVERS]]
        self.timeout = timeout                         # seconds, for each server asked
        self.now = now
        self.random = random or secrets.SystemRandom()
        self.cache: Dict[Tuple[str, str], Tuple[float, Optional[List[Any]]]] = {}
        self.lock = threading.Lock()

    def query(self, name: str, kind: str) -> List[Any]:
        """Return the values of that kind (a key of KINDS), none if the name has others only.

        Raises NoSuchName, or DNSError when it cannot be told now. MX gives (preference, host).
        """
        key = (name.rstrip(".").lower(), kind)
        with self.lock:
            expires, values = self.cache.get(key, (0.0, None))
        if expires <= self.now():
            ttl, values = self.look_up(*key)
            self.remember(key, ttl, values)
        if values is None:
            raise NoSuchName(f"{clean_line(name, 80)} does not exist")
        return list(values)

    def remember(self, key: Tuple[str, str], ttl: int, values: Optional[List[Any]]) -> None:
        """Keep an answer for its time; when there are too many, the oldest goes."""
        with self.lock:
            self.cache.pop(key, None)
            while len(self.cache) >= MAX_CACHE:
                del self.cache[next(iter(self.cache))]
            if ttl > 0:
                self.cache[key] = self.now() + ttl, values

    def look_up(self, name: str, kind: str) -> Tuple[int, Optional[List[Any]]]:
        """Return a TTL and what DNS says: values, or None if there is no such name.

        The server has followed all aliases, as it was asked to (RFC 1034 5.3.1).
        """
        name = decode_name(encode_name(name), 0)[0]        # in the form that answers have
        answer = self.ask(name, kind)
        ttl, values = follow_aliases(answer.records, name, KINDS[kind])
        if values:
            return ttl, values
        return NEGATIVE_TTL, None if answer.code == NO_SUCH_NAME else []

    def ask(self, name: str, kind: str) -> DNSAnswer:
        """Return the first answer of a server that could give one."""
        problem = "no name server is known"
        for server in self.servers * DNS_ATTEMPTS:
            try:
                answer = self.ask_server(server, name, kind)
            except (OSError, DNSError) as error:
                problem = reason(error)
                continue
            if answer.code in (NO_ERROR, NO_SUCH_NAME):
                return answer
            problem = f"a name server answered with code {answer.code}"
        raise DNSError(f"no answer from DNS for {kind} of {name}: {problem}")

    def ask_server(self, server: Tuple[str, Optional[int]], name: str, kind: str) -> DNSAnswer:
        """Ask one server by UDP, again by TCP if the answer did not fit (RFC 7766 5).

        A new socket is a new port that nobody can guess, besides the number; connected, it takes
        nothing from others (RFC 5452 9). What does not fit the query is passed over: the real
        answer may follow.
        """
        query = encode_query(self.random.getrandbits(16), name, kind)
        place = server[0], server[1] or 53
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        deadline, answer = self.now() + self.timeout, None
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(place)
            sock.send(query)
            while answer is None:
                left = deadline - self.now()
                if left <= 0:
                    raise DNSError("no answer in time")
                sock.settimeout(left)
                answer = matching_answer(sock.recv(65535), query)
        return self.ask_again(place, query) if answer.truncated else answer

    def ask_again(self, place: Tuple[str, int], query: bytes) -> DNSAnswer:
        """Ask one server by TCP (RFC 1035 4.2.2)."""
        with socket.create_connection(place, self.timeout) as sock, sock.makefile("rb") as file:
            sock.sendall(struct.pack(">H", len(query)) + query)
            answer = matching_answer(file.read(int.from_bytes(file.read(2), "big")), query)
        if answer is None or answer.truncated:
            raise DNSError("the name server answered something else")
        return answer

    def addresses(self, host: str) -> List[str]:
        """Return the addresses of a host, or of an address; none if there are none.

        IPv4 comes first: many receivers treat mail over IPv6 as suspect. Raises DNSError.
        """
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        found: List[str] = []
        problem = None
        for kind in ("A", "AAAA"):
            try:
                found += self.query(host, kind)
            except NoSuchName:
                pass
            except DNSError as error:
                problem = error
        if problem and not found:
            raise problem
        return found

    def mail_hosts(self, domain: str) -> List[str]:
        """Return the hosts to try for a domain or address literal, best first (RFC 5321 5.1).

        A host is a name or an address, for `addresses`. Raises Undeliverable, or DNSError.
        """
        name = normalize_domain(domain)
        if name is None:
            raise Undeliverable(Reply(553, "5.1.3", "The domain is not valid"))
        if name.startswith("["):
            return [name[1:-1]]
        try:
            found = self.query(name, "MX")
        except NoSuchName:
            raise Undeliverable(Reply(550, "5.1.2", f"The domain {name} does not exist")) from None
        if not found:
            return [name]             # the implicit MX
        if [host for _, host in found] == [""]:
            raise Undeliverable(Reply(556, "5.1.10", f"The domain {name} accepts no mail"))
        self.random.shuffle(found)    # equal ones by chance: sorting keeps their order
        found.sort(key=lambda exchange: exchange[0])
        hosts = dict.fromkeys(normalize_domain(host) or "" for _, host in found)
        hosts.pop("", None)
        if not hosts:
            raise Undeliverable(Reply(550, "5.4.4", f"The MX of {name} names no host"))
        return list(hosts)[:MAX_TRIES]


def matching_answer(data: bytes, query: bytes) -> Optional[DNSAnswer]:
    """Return the answer if it is one to this query (RFC 5452 9.1), else None."""
    try:
        answer = decode_answer(data)
    except DNSError:
        return None
    same = answer.ident == int.from_bytes(query[:2], "big")
    return answer if same and answer.question == query[12:].lower() else None


# =====================================================================================
# 7. Sessions: the protocols, without sockets
#
# SMTP: RFC 5321, 1870 (SIZE), 2034 and 5248 (status codes), 2920 (PIPELINING), 3030 (CHUNKING),
# 3207 (STARTTLS), 6152 (8BITMIME), 6531 (SMTPUTF8), 9422 (LIMITS); LMTP: RFC 2033.
# A reply is a value, returned or raised; only run() writes it. A session knows the world by its
# `app`, which Delivery makes: settings, refuse_recipient, spool, keep, note.
# =====================================================================================

MAX_COMMAND = 2048            # RFC 5321 4.5.3.1.4 wants 512 and more with extensions
MAX_JUNK = 1 << 16            # bytes of one overlong line that are read to its end
MAX_REPLIES = 8 << 10         # bytes of replies gathered before others have their turn
MAX_HEADER_LINES = 10000      # lines in a header block; more is an attack, not mail
MAX_PROXY_HEADER = 2048       # the PROXY protocol allows more, for extensions nobody sends


class SMTPError(Exception):
    """A refusal: the reply to send, and the cause for the log if there is more to say."""

    def __init__(self, code: int, status: str, text: str, cause: Optional[BaseException] = None,
                 ) -> None:
        super().__init__(text)
        self.reply = Reply(code, status, text)
        self.cause = cause


class Goodbye(SMTPError):
    """A refusal that ends the connection."""


class Command(NamedTuple):
    """A row of SMTP_COMMANDS: its method, how it is written, and what must be true before."""
    func: Callable[..., Any]
    syntax: str
    needs: Tuple[Callable[["SMTPSession"], None], ...]


SMTP_COMMANDS: Dict[str, Command] = {}


def smtp(syntax: str, needs: Sequence[Callable[["SMTPSession"], None]] = ()) -> Any:
    """Enter a method into SMTP_COMMANDS under the verb in its name."""
    def enter(func: Callable[..., Any]) -> Callable[..., Any]:
        SMTP_COMMANDS[func.__name__[3:]] = Command(func, syntax, tuple(needs))
        return func
    return enter


# -- Guards: what must be true before a command --

def greeted(session: "SMTPSession") -> None:
    """The client has said who it is (RFC 5321 4.1.4)."""
    if not session.helo:
        raise SMTPError(503, "5.5.1", f"Send {session.hello} first")


def no_sender(session: "SMTPSession") -> None:
    """No transaction is open."""
    if session.sender is not None:
        raise SMTPError(503, "5.5.1", "A transaction is open already, send RSET to drop it")


def has_sender(session: "SMTPSession") -> None:
    """A transaction is open."""
    if session.sender is None:
        raise SMTPError(503, "5.5.1", "Send MAIL FROM first")


def has_recipients(session: "SMTPSession") -> None:
    """Somebody is to get the message."""
    has_sender(session)
    if not session.recipients:
        raise SMTPError(503, "5.5.1", "Send RCPT TO first, none was accepted so far")


def safe_enough(session: "SMTPSession") -> None:
    """TLS has begun, where it has to (RFC 3207 4)."""
    if session.tls_required and not session.tls:
        raise SMTPError(530, "5.7.0", "Must issue a STARTTLS command first")


def no_chunks(session: "SMTPSession") -> None:
    """No BDAT of this transaction has come (RFC 3030 3)."""
    if session.body is not None:
        raise SMTPError(503, "5.5.1", "A BDAT transfer is open, end it with LAST or RSET")


class Receiver:
    """The content of one message as it comes in: cleaned, measured, in memory or in a Spool.

    Made by SMTPSession. It never fails: the first reason to refuse stays in `refusal`, and what
    comes after is dropped.
    """

    def __init__(self, settings: Any, spool: Callable[[], Spool], clean: bool, lf: bool) -> None:
        self.settings = settings
        self.make_spool = spool
        self.spool: Optional[Spool] = None
        self.clean = clean              # False: BINARYMIME, whose bytes are nobody's lines
        self.lf = lf                    # a bare LF is this session's line end
        self.refusal: Optional[SMTPError] = None
        self.pieces: List[bytes] = []   # what is not in the spool yet; about SPOOL_SIZE
        self.pending = 0                # its bytes
        self.size = 0                   # bytes kept
        self.received = 0               # bytes that came
        self.held = b""                 # CRs of which the next byte tells what they are
        self.line = 0                   # bytes of the line that is not over yet
        self.head = bytearray()         # the header block; no longer than max_header
        self.in_header = True           # it goes on

    def refuse(self, code: int, status: str, text: str, cause: Optional[Exception] = None) -> None:
        """Note why the message is refused, unless there is a reason already."""
        if self.refusal is None:
            self.refusal = SMTPError(code, status, text, cause)

    def take(self, data: bytes, last: bool = False) -> Steps:
        """Take the next bytes; wants Work when a spool is to be written."""
        self.received += len(data)
        if self.refusal is None:
            if self.clean:
                data = self.cleaned(data, last)
                self.measure_line(data)
            self.size += len(data)
            if self.size > self.settings.max_size:
                self.refuse(552, "5.3.4", "Message is larger than %d bytes"
                            % self.settings.max_size)
        if self.refusal is not None:
            self.pieces, self.pending = [], 0
            if self.received > 2 * self.settings.max_size + MAX_JUNK:
                raise Goodbye(421, "4.3.4", "Message is far too large")
            return
        self.pieces.append(data)
        self.pending += len(data)
        if self.pending > SPOOL_SIZE and not (last and self.spool):
            yield from self.write_spool()

    def cleaned(self, data: bytes, last: bool) -> bytes:
        """Return data with CRLF for every line end and a space for every other CR.

        Any cut of the same bytes gives the same result: CRs at the end are held back.
        """
        if self.held:
            data = self.held + data
            self.held = b""
        if not last and data.endswith(b"\r"):
            keep = 2 if data.endswith(b"\r\r") else 1
            self.held = data[-keep:]
            data = data[:-keep]
        seen = io.IncrementalNewlineDecoder(None, False)    # finds line ends of all kinds at once
        seen.decode(data.decode("latin-1"), True)
        if seen.newlines in (None, "\r\n"):
            return data
        if not self.lf and self.settings.bare_newline == "reject" and BARE_LF.search(data):
            self.refuse(554, "5.6.0", "Message holds a bare LF, lines must end with CRLF")
        return LINE_END.sub(line_end, data)

    def measure_line(self, data: bytes) -> None:
        """Refuse a line that is longer than allowed."""
        limit = self.settings.max_line
        if self.line + len(data) > limit:
            lines = data.split(b"\n")
            longest = max(self.line + len(lines[0]), max(map(len, lines)))
            if longest > limit:
                self.refuse(554, "5.6.0", f"Message has a line of more than {limit} bytes")
        end = data.rfind(b"\n")
        self.line = self.line + len(data) if end < 0 else len(data) - end - 1

    def write_spool(self) -> Steps:
        """Hand what is in memory to the spool, in the pool."""
        data = self.gathered()
        if self.spool is None:
            self.spool = self.make_spool()
        try:
            yield Work(self.spool.write, (data,))
        except OSError as error:
            self.refuse_disk(error)

    def gathered(self) -> bytes:
        """Return what is in memory, and forget it."""
        data = b"".join(self.pieces)
        self.pieces, self.pending = [], 0
        if self.in_header:
            self.watch_header(data, False)
        return data

    def watch_header(self, data: bytes, last: bool) -> None:
        """Gather the header block, and check it once it is whole or too large."""
        self.head += data
        limit, known = self.settings.max_header, len(self.head)
        if not last and len(self.head) - self.head.rfind(b"\n") < MAX_COMMAND:
            known = self.head.rfind(b"\n") + 1      # of the rest one cannot tell what it is yet
        length = header_length(bytes(self.head[:known]))
        if length < known or last:
            self.in_header = False
            del self.head[length:]
            self.check_header(bytes(self.head))
        elif known > limit:
            self.refuse(552, "5.3.4", f"Header is larger than {limit} bytes")
            self.head.clear()

    def refuse_disk(self, error: Exception) -> None:
        """Refuse for now: the disk is full, or broken."""
        if store_error(error).full:
            self.refuse(452, "4.3.1", "The disk is full, try again later", error)
        else:
            self.refuse(451, "4.3.0", "The message cannot be stored now, try again later", error)

    def check_header(self, block: bytes) -> None:
        """Refuse loops and monstrous headers."""
        if len(block) > self.settings.max_header:
            self.refuse(552, "5.3.4", "Header is larger than %d bytes" % self.settings.max_header)
        elif block.count(b"\n") > MAX_HEADER_LINES:
            self.refuse(554, "5.6.0", f"Header has more than {MAX_HEADER_LINES} lines")
        elif count_hops(block) > MAX_HOPS:
            self.refuse(554, "5.4.6", f"Mail loop: more than {MAX_HOPS} Received fields")

    def finish(self) -> Steps:
        """Return the content, bytes or a finished Spool; raise the refusal if there is one."""
        content: Union[bytes, Spool] = self.gathered()
        if self.in_header:
            self.watch_header(b"", True)
        if self.refusal is None and self.spool is not None:
            try:
                yield Work(self.spool.finish, (content,))
                content = self.spool
            except OSError as error:
                self.refuse_disk(error)
        if self.refusal is not None:
            raise self.refusal
        return content


BARE_LF = re.compile(rb"(?<!\r)\n")
LINE_END = re.compile(rb"\r?\r\n|\n|\r")


def line_end(match: Any) -> bytes:
    """Return what stands for a line end or a stray CR."""
    return b" " if match.group() == b"\r" else b"\r\n"


XCLIENT_NAMES = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT")
FOREIGN_VERBS = {"GET", "POST", "PUT", "HEAD", "OPTIONS", "CONNECT", "DELETE", "TRACE", "HOST:",
                 "USER-AGENT:"}
PATH = re.compile(r'<(?:@[^:<>"]*:)?((?:"(?:[^"\\]|\\.)*"|[^"<>])*)>(?:[ \t]+(\S.*))?')
PLAIN_PATH = re.compile(r"([^<>\s]+)(?:[ \t]+(\S.*))?")


class SMTPSession(Session):
    """One SMTP or LMTP conversation; made by Server for each connection."""

    hello = "EHLO"
    go_ahead = b"354 End with a line that holds a single dot\r\n"

    def __init__(self, app: Any, peer: str, ident: str) -> None:
        self.app = app
        self.settings = app.settings
        self.peer = peer
        self.proxy = app.is_trusted_proxy(peer)      # may name the real client
        self.loopback = is_loopback(peer)
        self.ident = ident
        self.eol = b"\r\n"              # LF for a loopback client whose first line ends so
        self.lines = 0
        self.errors = 0
        self.kept = 0
        self.key = ""                   # what the deliveries of the next message are known by
        self.tls = ""
        self.helo = ""
        self.esmtp = False
        self.receiving = False          # content is coming in: not to be cut off at a stop
        self.closing = ""               # why the conversation is over
        self.over = False
        self.tls_offered = app.tls is not None
        self.tls_required = self.tls_offered and self.settings.starttls == "required"
        self.reset()
        super().__init__()

    def reset(self) -> None:
        """Forget the transaction."""
        self.sender: Optional[str] = None
        self.recipients: List[str] = []
        self.utf8 = False
        self.binary = False
        self.body: Optional[Receiver] = None         # what BDAT has brought so far

    @property
    def name(self) -> str:
        """What log lines about the connection begin with."""
        return self.ident

    # -- The conversation --

    def run(self) -> Steps:
        """Answer commands until the end."""
        if self.proxy and self.settings.proxy_protocol:
            yield from self.read_proxy_header()
        self.note_begin()
        if not self.closing:
            self.write(self.greeting().encode())
        while not self.closing:
            self.receiving = self.body is not None
            if self.stopping and not self.receiving:
                self.say_goodbye("shutdown")
                break
            try:
                reply = yield from self.obey((yield from self.read_command()))
            except SMTPError as refusal:
                reply = self.refuse(refusal)
            if reply is not None:
                self.write_reply(reply)
            if len(self.outbox) > MAX_REPLIES:
                yield DRAIN

    def note_begin(self) -> None:
        """Log the begin."""
        log.info("%s connected: %s", self.ident, self.peer)

    def note_kept(self, ident: int, sender: str, recipients: Sequence[str], body: Receiver) -> None:
        """Log that a message is kept."""
        log.info("%s kept: mail_id=%d from=<%s> to=%s size=%d", self.ident, ident, sender,
                 len(recipients) if len(recipients) > 3 else recipients, body.size)

    def note_end(self) -> None:
        """Log the end."""
        log.info("%s closed: %s, %d messages kept", self.ident, self.closing or "by the client",
                 self.kept)

    def greeting(self) -> Reply:
        """Return the greeting (RFC 5321 4.3.1)."""
        return Reply(220, "", f"{self.settings.hostname} ESMTP pegmail")

    def write_reply(self, reply: Reply) -> None:
        """Send a reply."""
        if self.settings.debug:
            log.debug("%s > %s", self.ident, reply)
        self.write(reply.encode())

    def refuse(self, refusal: SMTPError) -> Reply:
        """Log a refusal and count it; return its reply, or 421 if it was one too many."""
        reply = refusal.reply
        cause = f" ({reason(refusal.cause)})" if refusal.cause else ""
        log.warning("%s refused: %d %s %s%s%s", self.ident, reply.code, reply.status,
                    clean_line(reply.text), cause, self.about())
        self.app.note("refused", f"{reply.code} {reply.status}")
        if not self.recipients or self.sender is None:      # else the others shall get their mail
            self.errors += 1
        if isinstance(refusal, Goodbye):
            self.closing = "refused"
        elif self.errors >= self.settings.max_errors:
            self.closing = "too many errors"
            self.write(reply.encode())
            return Reply(421, "4.7.0", f"{self.settings.hostname} Too many errors, closing")
        return reply

    def about(self) -> str:
        """Return the sender for the log, while there is one."""
        return "" if self.sender is None else f" from=<{clean_line(self.sender, 200)}>"

    def stop(self, why: str) -> Wants:
        """End at once, or once the message that is coming in has been answered."""
        self.stopping = True
        if why == "shutdown" and (self.wants is not READ or self.receiving):
            return self.wants
        self.say_goodbye(why)
        self.wants = None
        return None

    def say_goodbye(self, why: str) -> None:
        """Write the 421 for the end that comes from our side (RFC 5321 3.8)."""
        status, text = {"timeout": ("4.4.2", "Timeout, closing"),
                        "shutdown": ("4.3.2", "Service is going down, try again soon"),
                        "bug": ("4.3.0", "Internal error, closing")}[why]
        self.closing = why
        self.write(Reply(421, status, f"{self.settings.hostname} {text}").encode())

    def ended(self) -> None:
        """Let go of what was coming in, and log the end."""
        super().ended()
        self.drop_body()
        if not self.over:
            self.over = True
            self.note_end()

    def read_command(self) -> Steps:
        """Wait for a command line; return its text without the line end (RFC 5321 4.1.1)."""
        scanned = 0
        while True:
            end = self.inbox.find(b"\n", scanned)
            if end > MAX_COMMAND or (end < 0 and len(self.inbox) > MAX_COMMAND):
                yield from self.skip_line()
            if end >= 0:
                break
            scanned = len(self.inbox)
            yield READ
        line = bytes(self.inbox[:end + 1])
        del self.inbox[:end + 1]
        self.lines += 1
        if self.lines == 1 and self.loopback and not line.endswith(b"\r\n"):
            self.eol = b"\n"
        if not line.endswith(self.eol):
            raise SMTPError(500, "5.5.2", "Lines must end with CRLF")
        try:
            text = line[:-len(self.eol)].decode("utf-8").rstrip(" \t\r")
        except UnicodeDecodeError:
            raise SMTPError(500, "5.5.2", "Line is not UTF-8") from None
        if not text.isprintable() and re.search(CONTROLS, text.replace("\t", " ")):
            raise SMTPError(500, "5.5.2", "Line holds control characters")
        if self.settings.debug:
            log.debug("%s < %s", self.ident, clean_line(text))
        return text

    def skip_line(self) -> Steps:
        """Read an overlong line to its end and refuse it."""
        skipped = 0
        while True:
            end = self.inbox.find(b"\n")
            skipped += end if end >= 0 else len(self.inbox)
            del self.inbox[:end + 1 if end >= 0 else len(self.inbox)]
            if skipped > MAX_JUNK:
                raise Goodbye(421, "4.5.2", "Line is far too long")
            if end >= 0:
                raise SMTPError(500, "5.5.2", f"Line is longer than {MAX_COMMAND} bytes")
            yield READ

    def obey(self, line: str) -> Steps:
        """Run one command; return its reply, None if it has written it itself."""
        verb, _, arg = line.partition(" ")
        verb = verb.upper()
        command = self.verbs().get(verb)
        if command is None:
            if verb in FOREIGN_VERBS:
                raise Goodbye(421, "4.7.0", "This is a mail server")
            raise SMTPError(500, "5.5.1", "Unknown command, HELP lists the known ones")
        for guard in command.needs:
            guard(self)
        reply = command.func(self, arg.strip())
        if isinstance(reply, types.GeneratorType):
            reply = yield from reply
        return reply

    # -- Commands --

    @smtp("EHLO name")
    def do_EHLO(self, arg: str) -> Reply:
        """Say hello and list the extensions (RFC 5321 4.1.1.1)."""
        self.greet(arg, True)
        return Reply(250, "", "\n".join([self.welcome()] + self.extensions()))

    def welcome(self) -> str:
        """Return the first line of EHLO."""
        return f"{self.settings.hostname} hello {self.helo[:200]}"

    @smtp("HELO name")
    def do_HELO(self, arg: str) -> Reply:
        """Say hello the old way (RFC 5321 4.1.1.1)."""
        self.greet(arg, False)
        return Reply(250, "", self.settings.hostname)

    def greet(self, name: str, esmtp: bool) -> None:
        """Take the client's name and begin anew (RFC 5321 4.1.4)."""
        if not name:
            raise SMTPError(501, "5.5.4", f"Syntax: {self.hello} name")
        self.helo, self.esmtp = name.split()[0], esmtp
        self.drop_body()
        self.reset()

    def extensions(self) -> List[str]:
        """Return the lines of EHLO."""
        names = ["PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE %d" % self.settings.max_size,
                 "ENHANCEDSTATUSCODES", "CHUNKING", "BINARYMIME",
                 "LIMITS RCPTMAX=%d" % self.settings.max_recipients, "HELP"]
        if self.tls_offered and not self.tls:
            names.append("STARTTLS")
        if self.proxy:
            names.append("XCLIENT " + " ".join(XCLIENT_NAMES))
        return names

    @smtp("MAIL FROM:<address> [SIZE=n] [BODY=7BIT|8BITMIME|BINARYMIME] [SMTPUTF8]",
          needs=(greeted, safe_enough, no_sender))
    def do_MAIL(self, arg: str) -> Reply:
        """Open a transaction (RFC 5321 4.1.1.2)."""
        address, params = self.parse_path("FROM:", arg, "MAIL")
        text = address.text if address else ""
        utf8 = binary = False
        for name, value in params.items():
            if name == "SIZE" and re.fullmatch("[0-9]{1,20}", value):         # RFC 1870 6
                if int(value) > self.settings.max_size:
                    raise SMTPError(552, "5.3.4", "Message is larger than %d bytes"
                                    % self.settings.max_size)
            elif name == "BODY" and value.upper() in ("7BIT", "8BITMIME", "BINARYMIME"):
                binary = value.upper() == "BINARYMIME"                        # RFC 3030 3
            elif name == "SMTPUTF8" and not value:
                utf8 = True
            elif name in ("SIZE", "BODY", "SMTPUTF8"):
                raise SMTPError(501, "5.5.4", f"Value of {name} is not valid")
            else:
                raise SMTPError(555, "5.5.4", f"Parameter {name[:40]} is not known")
        self.check_ascii(text, utf8)
        self.sender, self.utf8, self.binary = text, utf8, binary
        return self.sender_reply(text)

    def sender_reply(self, sender: str) -> Reply:
        """Return the reply to MAIL."""
        return SENDER_OK

    @smtp("RCPT TO:<address>", needs=(greeted, safe_enough, has_sender, no_chunks))
    def do_RCPT(self, arg: str) -> Reply:
        """Add a recipient (RFC 5321 4.1.1.3)."""
        address, params = self.parse_path("TO:", arg, "RCPT")
        for name in params:
            raise SMTPError(555, "5.5.4", f"Parameter {name[:40]} is not known")
        if len(self.recipients) >= self.settings.max_recipients:
            raise SMTPError(452, "4.5.3", "Too many recipients, send the rest in another message")
        if address is None:
            raise SMTPError(553, "5.1.3", "A recipient needs an address")
        self.check_ascii(address.text, self.utf8)
        refusal = self.app.refuse_recipient(address)
        if refusal is not None:
            raise SMTPError(*refusal)
        self.recipients.append(address.text)
        return self.recipient_reply(address.text)

    def recipient_reply(self, recipient: str) -> Reply:
        """Return the reply to RCPT."""
        return RECIPIENT_OK

    def parse_path(self, word: str, arg: str, verb: str,
                   ) -> Tuple[Optional[Address], Dict[str, str]]:
        """Read `FROM:<address> NAME=value ...`; source routes are dropped (RFC 5321 4.1.2)."""
        rest = arg[len(word):].lstrip() if arg[:len(word)].upper() == word else ""
        match = PATH.fullmatch(rest) or PLAIN_PATH.fullmatch(rest)
        if not match:
            raise SMTPError(501, "5.5.4", f"Syntax: {verb} {word}<address>")
        text = match.group(1).strip()
        params = {}
        for param in (match.group(2) or "").split():
            name, _, value = param.partition("=")
            params[name.upper()] = value
        try:
            return parse_address(text) if text else None, params
        except ValueError as error:
            status = "5.1.7" if verb == "MAIL" else "5.1.3"
            raise SMTPError(553, status, f"Address is not valid: {error}") from None

    def check_ascii(self, address: str, utf8: bool) -> None:
        """Refuse an address beyond ASCII unless SMTPUTF8 was asked for (RFC 6531 3.5)."""
        if not address.isascii() and not utf8:
            raise SMTPError(553, "5.6.7", "Address is not ASCII, MAIL FROM needs SMTPUTF8")

    @smtp("DATA", needs=(greeted, safe_enough, has_recipients, no_chunks))
    def do_DATA(self, arg: str) -> Steps:
        """Take the message (RFC 5321 4.1.1.4)."""
        if arg:
            raise SMTPError(501, "5.5.4", "Syntax: DATA")
        if self.binary:
            raise SMTPError(503, "5.5.1", "BINARYMIME needs BDAT")      # RFC 3030 3
        self.body = self.new_receiver()
        self.receiving = True
        self.write(self.go_ahead)
        yield from self.read_message(self.body)
        return (yield from self.keep())

    def new_receiver(self) -> Receiver:
        """Return what takes in the content of this transaction."""
        return Receiver(self.settings, self.app.spool, not self.binary, self.eol == b"\n")

    def read_message(self, body: Receiver) -> Steps:
        """Read up to the line with a single dot, undoing dot-stuffing (RFC 5321 4.5.2).

        The end is CRLF.CRLF and nothing else. The line end of the command that came before counts,
        so one is put in front of the inbox; each piece but the last keeps back what a line end or
        the end might begin with.
        """
        eol, keep = self.eol, len(self.eol) + 2
        stop, dot = eol + b"." + eol, eol + b"."
        self.inbox[:0] = eol
        begun = len(eol)                # bytes at the front that are not content
        scanned, dotted = 0, -1
        while True:
            if dotted < 0 and self.inbox.find(b".", scanned) >= 0:     # far the faster of the two
                dotted = self.inbox.find(dot, scanned)
            end = self.inbox.find(stop, max(dotted, scanned)) if dotted >= 0 else -1
            if end >= 0:
                data = bytes(self.inbox[begun:end + len(eol)])
                del self.inbox[:end + len(stop)]
                yield from body.take(undotted(data, dot, eol, begun), True)
                return
            if len(self.inbox) >= READ_SIZE:
                cut = self.inbox.rfind(eol)
                cut = cut if cut > 0 else len(self.inbox) - keep
                data = bytes(self.inbox[begun:cut])
                del self.inbox[:cut]
                yield from body.take(undotted(data, dot, eol, begun) if dotted >= 0 else data)
                begun, dotted, scanned = 0, -1, 0
            else:
                scanned = max(0, len(self.inbox) - keep)
            yield READ

    @smtp("BDAT size [LAST]")
    def do_BDAT(self, arg: str) -> Steps:
        """Take a chunk of the message (RFC 3030 2); refused or not, its bytes are read."""
        match = re.fullmatch(r"([0-9]{1,18})(?:\s+(LAST))?", arg, re.I)
        if not match:
            raise Goodbye(421, "4.5.4", "Syntax: BDAT size [LAST]; without a size we are lost")
        left, last = int(match.group(1)), bool(match.group(2))
        if left > 2 * self.settings.max_size + MAX_JUNK:
            raise Goodbye(421, "4.3.4", "Chunk is far too large")
        refusal = self.refuse_chunk()
        if refusal is None and self.body is None:
            self.body = self.new_receiver()
        self.receiving = True
        size = left
        while left:
            while not self.inbox:
                yield READ
            data = bytes(self.inbox[:left])
            del self.inbox[:len(data)]
            left -= len(data)
            if self.body is not None and refusal is None:
                yield from self.body.take(data, last and not left)
        if refusal is not None:
            raise refusal
        assert self.body is not None
        if not last:
            if self.body.refusal is not None:
                refusal = self.body.refusal
                self.drop_body()
                self.reset()
                raise refusal
            return Reply(250, "2.0.0", f"{size} bytes received")
        if not size:
            yield from self.body.take(b"", True)
        return (yield from self.keep())

    def refuse_chunk(self) -> Optional[SMTPError]:
        """Return why a chunk is not taken here, None if it is."""
        if self.eol == b"\n":
            return SMTPError(503, "5.5.1", "BDAT needs lines that end with CRLF")
        try:
            for guard in (greeted, safe_enough, has_recipients):
                guard(self)
        except SMTPError as refusal:
            return refusal
        return None

    def keep(self) -> Steps:
        """Have the message kept; return the reply once it is on the disk."""
        body, envelope = self.body, self.envelope()
        count = len(self.recipients)
        assert body is not None
        try:
            content = yield from body.finish()
            begun = self.sender or "", self.recipients
            ident = yield Ask(self.app.keep, (envelope, bytes(body.head), content))
        except StoreError as error:
            body.refuse_disk(error)
            raise (body.refusal or SMTPError(451, "4.3.0", "Try again later")) from None
        finally:
            self.drop_body()
            self.reset()
        self.kept += 1
        self.errors = 0
        reply = self.kept_reply(ident, count)
        self.note_kept(ident, *begun, body)
        return reply

    def kept_reply(self, ident: int, count: int) -> Optional[Reply]:
        """Return the reply for a message that is kept."""
        return Reply(250, "2.0.0", f"Kept as {ident}")

    def envelope(self) -> Envelope:
        """Return the envelope of this transaction."""
        return Envelope(self.sender or "", tuple(dict.fromkeys(self.recipients)), self.peer,
                        self.helo, self.protocol(), self.tls,
                        f"{self.ident}.{self.kept + 1}", self.key)

    def protocol(self) -> str:
        """Return the word behind "with" in Received (RFC 3848, RFC 6531 4.3)."""
        if not self.esmtp:
            return "SMTP"
        return ("UTF8SMTP" if self.utf8 else "ESMTP") + ("S" if self.tls else "")

    def drop_body(self) -> None:
        """Let go of what has come in, and of its file unless that is finished."""
        if self.body is not None and self.body.spool is not None and not self.body.spool.hash:
            self.app.discard(self.body.spool)
        self.body = None

    @smtp("RSET")
    def do_RSET(self, arg: str) -> Reply:
        """Drop the transaction (RFC 5321 4.1.1.5)."""
        self.drop_body()
        self.reset()
        return Reply(250, "2.0.0", "Transaction dropped")

    @smtp("NOOP [text]")
    def do_NOOP(self, arg: str) -> Reply:
        """Do nothing (RFC 5321 4.1.1.9)."""
        return DONE

    @smtp("VRFY address")
    def do_VRFY(self, arg: str) -> Reply:
        """Neither confirm nor deny (RFC 5321 3.5.3)."""
        if not arg:
            raise SMTPError(501, "5.5.4", "Syntax: VRFY address")
        return Reply(252, "2.0.0", "Send mail and it will be seen")

    @smtp("HELP [command]")
    def do_HELP(self, arg: str) -> Reply:
        """List the commands, or show how one is written (RFC 5321 4.1.1.8)."""
        verbs = self.verbs()
        command = verbs.get(arg.upper())
        if arg and command is None:
            raise SMTPError(504, "5.5.4", "No such command")
        text = command.syntax if command else "Commands: " + " ".join(verbs)
        return Reply(214, "2.0.0", text)

    def verbs(self) -> Dict[str, Command]:
        """Return the commands of this protocol by their verbs."""
        return SMTP_COMMANDS

    @smtp("QUIT")
    def do_QUIT(self, arg: str) -> Reply:
        """End the conversation (RFC 5321 4.1.1.10)."""
        self.drop_body()
        self.closing = "quit"
        return Reply(221, "2.0.0", f"{self.settings.hostname} closing")

    @smtp("STARTTLS")
    def do_STARTTLS(self, arg: str) -> Steps:
        """Go on in TLS (RFC 3207 4). Bytes that came in clear text behind it end it all."""
        if not self.tls_offered:
            raise SMTPError(502, "5.5.1", "TLS is not configured")
        if self.tls or arg:
            raise SMTPError(503 if self.tls else 501, "5.5.1" if self.tls else "5.5.4",
                            "TLS is on already" if self.tls else "Syntax: STARTTLS")
        if self.inbox:
            raise Goodbye(421, "4.7.0", "Commands in clear text behind STARTTLS, closing")
        self.write(b"220 2.0.0 Go ahead with TLS\r\n")
        self.tls = yield STARTTLS
        log.info("%s tls: %s", self.ident, self.tls)
        self.inbox.clear()
        self.helo, self.eol = "", b"\r\n"      # RFC 3207 4.2: forget what was said before TLS
        self.drop_body()
        self.reset()

    @smtp("XCLIENT NAME=value ...")
    def do_XCLIENT(self, arg: str) -> Reply:
        """Take the real client's address from a trusted proxy (Postfix XCLIENT_README)."""
        if not self.proxy:
            raise SMTPError(550, "5.7.0", "Not a trusted proxy (--trusted_proxy)")
        if self.sender is not None:
            raise SMTPError(503, "5.5.1", "A transaction is open")
        if not arg:
            raise SMTPError(501, "5.5.4", "Syntax: XCLIENT NAME=value ...")
        address = ""
        for pair in arg.split():
            name, equals, value = pair.partition("=")
            value = re.sub(r"\+([0-9A-F]{2})", lambda match: chr(int(match.group(1), 16)), value)
            if name.upper() not in XCLIENT_NAMES or not equals or not value.isprintable():
                raise SMTPError(501, "5.5.4", "XCLIENT has an attribute that is not known")
            if name.upper() == "ADDR" and not value.upper().endswith("UNAVAILABLE]"):
                address = parse_ip(re.sub("(?i)^ipv6:", "", value))
        self.take_peer(address or self.peer)
        log.info("%s client: %s", self.ident, self.peer)
        self.helo, self.lines = "", 1
        self.reset()
        return self.greeting()

    def take_peer(self, address: str) -> None:
        """Take an address that a proxy names as the peer's."""
        self.peer = address
        self.loopback = is_loopback(self.peer)
        self.proxy = False              # from here on its client speaks

    def read_proxy_header(self) -> Steps:
        """Read the header of the PROXY protocol, version 1 or 2 (HAProxy proxy-protocol.txt)."""
        try:
            start = yield from self.read_exactly(12)
            if start == b"\r\n\r\n\0\r\nQUIT\n":
                head = yield from self.read_exactly(4)
                length = int.from_bytes(head[2:], "big")
                if head[0] >> 4 != 2 or length > MAX_PROXY_HEADER:
                    raise ValueError("not version 2, or too long")
                rest = yield from self.read_exactly(length)
                address = proxy_address(head[0] & 15, head[1] >> 4, rest)
            else:
                line = start
                while not line.endswith(b"\n"):
                    if len(line) > 107:
                        raise ValueError("too long")
                    line += yield from self.read_exactly(1)
                match = re.fullmatch(rb"PROXY (?:UNKNOWN.*|TCP[46] (\S+) \S+ \d+ \d+)\r\n", line)
                if not match:
                    raise ValueError("not a PROXY line")
                address = (match.group(1) or b"").decode("ascii", "replace")
            if address:
                self.take_peer(parse_ip(address))
        except (ValueError, SMTPError) as error:
            log.warning("%s %s sent no PROXY header: %s", self.ident, self.peer, error)
            self.write(Reply(421, "4.3.5", "This port wants a PROXY header").encode())
            self.closing = "no PROXY header"


def undotted(data: bytes, dot: bytes, eol: bytes, begun: int) -> bytes:
    """Undo dot-stuffing; begun says that data begins a line whose line end is not there."""
    data = data[1:] if begun and data.startswith(b".") else data
    return data.replace(dot, eol)


def parse_ip(text: str) -> str:
    """Return an IP address in its short form, or raise the refusal for what is none."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise SMTPError(501, "5.5.4", "Not an IP address") from None


def proxy_address(command: int, family: int, data: bytes) -> str:
    """Return the source address of a PROXY v2 header; nothing for health checks (LOCAL)."""
    size = {1: 4, 2: 16}.get(family, 0)
    if command == 0 or (command == 1 and not size):
        return ""
    if command != 1 or len(data) < 2 * size + 4:
        raise ValueError("not a PROXY command")
    return str(ipaddress.ip_address(data[:size]))


SENDER_OK = Reply(250, "2.1.0", "Sender OK")
RECIPIENT_OK = Reply(250, "2.1.5", "Recipient OK")
DONE = Reply(250, "2.0.0", "OK")


LMTP_COMMANDS = {"LHLO": SMTP_COMMANDS["EHLO"]._replace(syntax="LHLO name"),
                 **{verb: command for verb, command in SMTP_COMMANDS.items()
                    if verb not in ("EHLO", "HELO")}}


class LMTPSession(SMTPSession):
    """One LMTP conversation (RFC 2033): a reply for each recipient; made by Server."""

    hello = "LHLO"

    def greeting(self) -> Reply:
        """Return the greeting."""
        return Reply(220, "", f"{self.settings.hostname} LMTP pegmail")

    def verbs(self) -> Dict[str, Command]:
        """Return the commands: LHLO in place of EHLO and HELO (RFC 2033 4.1)."""
        return LMTP_COMMANDS

    def protocol(self) -> str:
        """Return the word behind "with" in Received (RFC 3848, RFC 6531 4.3)."""
        return ("UTF8" if self.utf8 else "") + "LMTP" + ("S" if self.tls else "")

    def kept_reply(self, ident: int, count: int) -> Optional[Reply]:
        """Write one reply for each recipient (RFC 2033 4.2)."""
        for _ in range(count):
            self.write_reply(Reply(250, "2.0.0", f"Kept as {ident}"))
        return None

    def keep(self) -> Steps:
        """Have the message kept; a refusal too is said once for each recipient."""
        count = len(self.recipients)
        try:
            return (yield from super().keep())
        except SMTPError as refusal:
            for _ in range(count - 1):
                self.write_reply(refusal.reply)
            raise


class PigeonSession(SMTPSession):
    """SMTP in the words of smtp-pigeon, whose log is read by its users; made by Server for --url.

    Each message has a number of its own, which is that of its delivery too.
    """

    go_ahead = b"354 2.0.0 Go ahead. End your data with <CR><LF>.<CR><LF>\r\n"

    def note_begin(self) -> None:
        """Log the begin of a message."""
        self.key = self.ident = self.app.new_key()
        log.info("%s: New session", self.ident)

    def note_kept(self, ident: int, sender: str, recipients: Sequence[str], body: Receiver) -> None:
        """Log that a message is kept, and begin with the next."""
        log.info("%s: DATA: [redacted (%d bytes)]", self.ident, body.received)
        self.note_begin()

    def note_end(self) -> None:
        """Log the end."""
        log.info("%s: Session logout without POST", self.ident)

    def greeting(self) -> Reply:
        """Return the greeting."""
        return Reply(220, "", f"{self.settings.hostname} ESMTP Service Ready")

    def welcome(self) -> str:
        """Return the first line of EHLO."""
        return f"Hello {self.helo[:200]}"

    def extensions(self) -> List[str]:
        """Return the lines of EHLO, SIZE as the last."""
        return sorted(super().extensions(), key=lambda line: line.startswith("SIZE "))

    def sender_reply(self, sender: str) -> Reply:
        """Log MAIL and return its reply."""
        log.info("%s: MAIL: %s", self.ident, clean_line(sender))
        return Reply(250, "2.0.0", f"Roger, accepting mail from <{sender}>")

    def recipient_reply(self, recipient: str) -> Reply:
        """Log RCPT and return its reply."""
        log.info("%s: RCPT: %s", self.ident, clean_line(recipient))
        return Reply(250, "2.0.0", f"I'll make sure <{recipient}> gets this")

    def kept_reply(self, ident: int, count: int) -> Optional[Reply]:
        """Return the reply for a message that is kept, and on its way."""
        return Reply(250, "2.0.0", f"OK: queued as {ident}")


def is_loopback(peer: str) -> bool:
    """Is this the address of the host itself?"""
    try:
        return ipaddress.ip_address(peer).is_loopback
    except ValueError:
        return False


# =====================================================================================
# 8. Delivery: from a received message to the store, and onward
#
# Intake is what a session knows of the world: who may be written to, where large content goes,
# and how a message is kept. What is to leave is a row of the outbox, committed with its message;
# couriers take the rows, each target's in lanes of its own. Every connection that leaves goes
# through a Door. RFC 9110 (HTTP).
# =====================================================================================

COURIERS = 16                 # threads; half of them at most for targets that fail
PAGE = 50                     # deliveries that a lane takes from the outbox in one go
SPARE_SECONDS = 5.0           # that a lane with nothing to do keeps its connection
REST_SECONDS = 0.05           # after a page that was not full: more may gather
SLOW_SECONDS = 0.005          # a delivery; of a faster target several at once win nothing
POLITENESS = 0.2              # of the time that a page took, a pause for reception
MAX_YIELD = 0.05              # seconds
SETTLE_SECONDS = 0.5          # after which what became of them is written down
HOUSE_SECONDS = 2.0           # how often the outbox is looked through
STOP_SECONDS = 3.0            # that a request under way may take when the server stops
HEAVY = 1 << 20               # bytes of a message from which on few are sent at once
HEAVY_AT_ONCE = 2
MAX_ADDRESSES = 8             # of a host that are tried
MAX_ANSWER = 64 << 10         # bytes of an answer that are read; no more and the connection ends
MAX_REDIRECTS = 3             # that a 303 is followed
BODY_SECONDS = 2.0            # that the body of an answer, which nobody reads, may take


class Intake:
    """The way of a message from its session to the store; made by Server."""

    def __init__(self, settings: Settings, store: Store, loop: Any = None) -> None:
        self.settings = settings
        self.store = store
        self.loop = loop                # none for a message that comes without a session
        self.tls: Optional[ssl.SSLContext] = None
        self.domains = set(settings.server_host)
        self.refused: Dict[str, int] = collections.Counter()     # on the loop's thread only
        self.messages = 0
        self.bytes = 0
        self.date: Tuple[int, str] = (0, "")
        self.jobs: List[Job] = []       # of two turns of the loop; one a connection at most
        self.forwards = ([Forward("url")] if settings.url else []) + list(settings.forward_to)
        if loop is not None:
            store.hand_over = functools.partial(loop.call_soon, hear_all)

    def is_trusted_proxy(self, peer: str) -> bool:
        """May this peer speak for others?"""
        return is_in_networks(peer, self.settings.trusted_proxy)

    def refuse_recipient(self, address: Address) -> Optional[Tuple[int, str, str]]:
        """Return the reply for a recipient that is not ours, None for one that is.

        <postmaster> without a domain always is (RFC 5321 4.5.1).
        """
        if not self.domains or (not address.domain and address.local.lower() == "postmaster"):
            return None
        if normalize_domain(address.domain) in self.domains:
            return None
        return 550, "5.7.1", "Mail for this domain is not taken here"

    def spool(self) -> Spool:
        """Return a file for the content of a large message."""
        return self.store.spool()

    def discard(self, spool: Spool) -> None:
        """Remove a file that is not needed after all."""
        self.loop.work(self.store.drop, (spool,), ignore)

    def note(self, what: str, why: str) -> None:
        """Count a refusal."""
        self.refused[why] += 1

    def keep(self, envelope: Envelope, head: bytes, content: Union[bytes, Spool], done: Done,
             ) -> None:
        """Have a message, of which head is the header, kept; done(id, None) once it is on disk."""
        trace = trace_fields(envelope, self.settings.hostname, self.now_text())
        self.messages += 1
        self.bytes += content.size if isinstance(content, Spool) else len(content)
        if not self.jobs:       # one turn of the loop more: others end now, and share the commit
            self.loop.call_soon(self.loop.call_soon, self.hand_in)
        self.jobs.append(Job(Incoming(
            envelope, trace, read_subject(head), content,
            self.plan(envelope) if self.forwards else (),
            envelope.key or (self.new_key() if self.forwards else "")), done))

    def new_key(self) -> str:
        """Return what a message and its deliveries are to be known by."""
        return str(uuid.uuid4())

    def plan(self, envelope: Envelope) -> List[Onward]:
        """Return where a message goes on to; those of one mail domain share a delivery."""
        found: Dict[str, Onward] = {}
        for forward in self.forwards:
            if is_for(forward, envelope):
                onward = make_onward(forward.target, self.settings.forward_only)
                known = found.get(onward.target, onward).recipients
                found[onward.target] = onward._replace(
                    recipients=tuple(dict.fromkeys(known + onward.recipients)))
        return list(found.values())

    def hand_in(self) -> None:
        """Give the writer the messages that came meanwhile, and so wake it once."""
        jobs, self.jobs = self.jobs, []
        self.store.add(jobs)

    def now_text(self) -> str:
        """Return the date as Received wants it (RFC 5322 3.3); made once a second."""
        second = int(self.store.now())
        if self.date[0] != second:
            self.date = second, email.utils.formatdate(second).replace("-0000", "+0000")
        return self.date[1]


def is_for(forward: Forward, envelope: Envelope) -> bool:
    """Does a message go where this says?"""
    return (fnmatch.fnmatchcase(envelope.sender.lower(), forward.sender.lower())
            and any(fnmatch.fnmatchcase(recipient.lower(), forward.to.lower())
                    for recipient in envelope.recipients))


def make_onward(target: str, only: bool) -> Onward:
    """Return the delivery to a target that the operator named."""
    if not target.lower().startswith("mailto:"):
        return Onward(target, (), only)
    address = target[7:]
    return Onward("mail " + (normalize_domain(address.rpartition("@")[2]) or ""), (address,), only)


def ignore(result: Any, error: Optional[BaseException]) -> None:
    """Hear of a job that nobody waits for; its failure is logged."""
    if error is not None:
        log.error("a clean-up failed: %s", reason(error))


def is_in_networks(address: str, networks: Iterable[Any]) -> bool:
    """Is this IP address in one of the networks?"""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(ip in network_ for network_ in networks)


# -- The one way out --

class Forbidden(OSError):
    """A connection would lead where this request may not go."""


def embedded_addresses(address: str) -> List[Any]:
    """Return an IP address and those that it stands for (mapped, NAT64, 6to4, Teredo)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return [ip]
    if ip.ipv4_mapped:
        return [ip.ipv4_mapped]
    low = int(ip) & 0xFFFFFFFF
    if ip in TRANSLATED[0]:             # the way to IPv4 from a network that has none
        return [ipaddress.IPv4Address(low)]
    return ([ip] + ([ip.sixtofour] if ip.sixtofour else []) + list(ip.teredo or ())
            + [ipaddress.IPv4Address(low) for network_ in TRANSLATED
               if ip in network_ and low > 0xFFFF])         # else it is :: or ::1


TRANSLATED = tuple(map(ipaddress.ip_network, (
    "64:ff9b::/96", "64:ff9b:1::/48", "::/96")))            # RFC 6052, 8215, 4291 2.5.5.1


AZURE_METADATA = "168.63.129.16"        # a public address that every Azure host finds its own at


def is_public(ip: Any) -> bool:
    """Is this an address of the Internet, where anybody may be sent?"""
    return ip.is_global and str(ip) != AZURE_METADATA and not (
        ip.is_multicast or ip.is_reserved or ip.is_unspecified
        or getattr(ip, "is_site_local", False))


class Door:
    """Makes every connection that leaves this host; made by Couriers.

    `allowed` None lets it lead anywhere: the operator named the target. Otherwise only to public
    addresses and these networks. What is checked is the address that is then connected to.
    """

    def __init__(self, allowed: Optional[Sequence[Any]] = None) -> None:
        self.allowed = allowed

    def may_reach(self, address: str) -> bool:
        """May a connection lead to this IP address?"""
        allowed = self.allowed
        return allowed is None or all(is_public(ip) or any(ip in network_ for network_ in allowed)
                                      for ip in embedded_addresses(address))

    def check_name(self, host: str) -> None:
        """Raise Forbidden if a proxy should not be sent there, as far as the name is known here."""
        with contextlib.suppress(socket.gaierror, UnicodeError):
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            if not all(self.may_reach(str(entry[4][0])) for entry in found):
                raise Forbidden(f"{host} is no public address")

    def connect(self, host: str, port_: int, seconds: float) -> socket.socket:
        """Return a connection. Raises OSError, Forbidden if no address of the host is allowed."""
        problem: OSError = OSError(f"{host} has no address")
        try:
            found = socket.getaddrinfo(host, port_, type=socket.SOCK_STREAM)
        except UnicodeError:
            raise OSError(f"{ascii(host)} is not a host name") from None
        for family, kind, protocol, _, address in found[:MAX_ADDRESSES]:
            if not self.may_reach(str(address[0])):
                problem = Forbidden(f"{host} is {address[0]}, which is not a public address; "
                                    "--webhook_allow can allow it")
                continue
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(seconds)
                sock.connect(address)
                return sock
            except OSError as error:
                sock.close()
                problem = error
        raise problem


class WebAnswer(NamedTuple):
    """What a web server said; the names of the headers are in lower case."""
    status: int
    headers: Dict[str, str]


class WebConnection:
    """A connection to a web server, through a Door, with TLS and by way of a proxy if need be.

    Made by WebClient. It speaks what a POST needs of HTTP/1.1 (RFC 9112): http.client does the
    same at three times the cost, most of it for the headers of answers.
    """

    def __init__(self, door: Door, place: Tuple[str, str, int], seconds: float,
                 context: ssl.SSLContext) -> None:
        self.scheme, self.host, port_ = place
        self.seconds = seconds
        self.proxy = find_proxy(*place)
        usual = port_ == {"https": 443, "http": 80}[self.scheme]
        name = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = name if usual else f"{name}:{port_}"
        self.inbox = b""
        if self.proxy:
            door.check_name(self.host)
            self.sock: Any = Door().connect(self.proxy[0], self.proxy[1], seconds)
        else:
            self.sock = door.connect(self.host, port_, seconds)
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.scheme == "https":
                if self.proxy:
                    self.open_tunnel(f"{name}:{port_}")
                self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        except BaseException:
            self.sock.close()
            raise

    def open_tunnel(self, place: str) -> None:
        """Have a proxy pass bytes on to the server (RFC 9110 9.3.6)."""
        secret = {"Proxy-Authorization": self.proxy[2]} if self.proxy[2] else {}
        self.send("CONNECT", place, {"Host": place, **secret}, None)
        status = self.read_head()[0]
        if status != 200:
            raise OSError(f"the proxy answered {status}")

    def exchange(self, method: str, path: str, headers: Dict[str, str], body: Optional[bytes],
                 ) -> Tuple[WebAnswer, bool]:
        """Send a request; return the answer, and whether the connection can be used again."""
        if self.proxy and self.scheme == "http":
            path = f"http://{self.authority}{path}"
            headers = {**headers, **({"Proxy-Authorization": self.proxy[2]} if self.proxy[2]
                                     else {})}
        self.send(method, path, {"Host": self.authority, **headers}, body)
        status, version, fields = self.read_head()
        while 100 <= status < 200:                      # RFC 9110 15.2: more will come
            status, version, fields = self.read_head()
        whole = status in (204, 304) or self.skip_body(fields)      # whatever comes of that
        keep = version == "1.1" and fields.get("connection", "").lower() != "close"
        return WebAnswer(status, fields), whole and keep

    def send(self, method: str, path: str, headers: Dict[str, str], body: Optional[bytes]) -> None:
        """Send a request; the one place where its lines are made."""
        if body is not None:
            headers = {**headers, "Content-Length": str(len(body))}
        lines = [f"{method} {path} HTTP/1.1"] + [
            f"{name}: {clean_line(value, MAX_HEADER_BYTES)}" for name, value in headers.items()]
        self.sock.sendall("\r\n".join(lines + ["", ""]).encode("utf-8", "replace") + (body or b""))

    def read_head(self) -> Tuple[int, str, Dict[str, str]]:
        """Read status line and header (RFC 9112 4, 5); return status, version and fields."""
        while b"\r\n\r\n" not in self.inbox:
            if len(self.inbox) > MAX_ANSWER:
                raise OSError("the header of the answer is too large")
            self.receive()
        head, _, self.inbox = self.inbox.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        match = re.match(r"HTTP/(1\.[01]) ([1-9][0-9]{2})(?!\S)", first)
        if not match:
            raise OSError("the answer is not HTTP")
        fields = (line.partition(":") for line in lines)
        return int(match.group(2)), match.group(1), {
            name.lower(): value.strip() for name, _, value in fields}

    def skip_body(self, fields: Dict[str, str]) -> bool:
        """Read over the body of an answer (RFC 9112 6, 7.1); False if that is not worth it."""
        end = time.monotonic() + BODY_SECONDS
        try:
            self.sock.settimeout(BODY_SECONDS)
            if "transfer-encoding" not in fields:
                return self.skip(int(fields.get("content-length", "-1")), end)
            size = -1
            while size:
                while b"\r\n" not in self.inbox:
                    self.skip(len(self.inbox) + 1, end, keep=True)
                line, _, self.inbox = self.inbox.partition(b"\r\n")
                size = int(line.partition(b";")[0], 16)
                if size and not self.skip(size + 2, end):
                    return False
            while not self.inbox.startswith(b"\r\n") and b"\r\n\r\n" not in self.inbox:
                self.skip(len(self.inbox) + 1, end, keep=True)
            return self.inbox.endswith(b"\r\n") and self.skip(len(self.inbox), end)
        except (OSError, ValueError):
            return False
        finally:
            with contextlib.suppress(OSError):
                self.sock.settimeout(self.seconds)

    def skip(self, count: int, end: float, keep: bool = False) -> bool:
        """Read until count bytes are here, and drop them; False if they are too many."""
        if not 0 <= count <= MAX_ANSWER:
            return False
        while len(self.inbox) < count:
            if time.monotonic() > end:
                raise TimeoutError("the answer took too long")
            self.receive()
        self.inbox = self.inbox if keep else self.inbox[count:]
        return True

    def receive(self) -> None:
        """Wait for more bytes. Raises OSError at the end."""
        data = self.sock.recv(MAX_ANSWER)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self.inbox += data


def find_proxy(scheme: str, host: str, port_: int) -> Tuple[Any, ...]:
    """Return (host, port, Proxy-Authorization) of the proxy that the environment names, or ()."""
    url = urllib.request.getproxies().get(scheme)
    if not url or urllib.request.proxy_bypass(f"{host}:{port_}"):
        return ()
    parts = urllib.parse.urlsplit(url if "://" in url else "http://" + url)
    return parts.hostname or "", parts.port or 8080, basic_auth(parts)


def basic_auth(parts: Any) -> str:
    """Return an Authorization for the user and password in a URL, "" if there are none."""
    if parts.username is None:
        return ""
    user = ":".join(urllib.parse.unquote(text or "") for text in (parts.username, parts.password))
    return "Basic " + base64.b64encode(user.encode("utf-8")).decode("ascii")


class WebClient:
    """Sends requests over a connection that is kept while they go to the same server.

    Made by a courier for itself; abort() may be called on any thread.
    """

    def __init__(self, door: Door, context: ssl.SSLContext, seconds: float) -> None:
        self.door, self.context, self.seconds = door, context, seconds
        self.place: Any = None
        self.connection: Optional[WebConnection] = None
        self.aborted = False

    def close(self) -> None:
        """Let go of the connection."""
        if self.connection is not None:
            self.connection.sock.close()
        self.place = self.connection = None

    def abort(self) -> None:
        """End a request that takes too long."""
        self.aborted, connection = True, self.connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def request(self, method: str, url: str, headers: Dict[str, str], body: Optional[bytes] = None,
                ) -> WebAnswer:
        """Send a request; return the answer. Raises OSError, Forbidden for a URL that is none."""
        self.aborted = False
        place, path, secret = split_url(url)
        if secret:
            headers = {"Authorization": secret, **headers}
        while True:
            kept = self.place == place and self.connection is not None
            try:
                if not kept:
                    self.close()
                    self.place = place
                    self.connection = WebConnection(self.door, place, self.seconds, self.context)
                assert self.connection is not None
                answer, again = self.connection.exchange(method, path, headers, body)
                if not again:
                    self.close()
                return answer
            except BaseException as error:
                self.close()
                if self.aborted:
                    raise TimeoutError("the answer took too long") from None
                if isinstance(error, ValueError):       # a host name that TLS refuses
                    raise OSError(reason(error)) from None
                if not kept or not isinstance(error, ConnectionError):
                    raise               # else it was closed while nobody used it


@functools.lru_cache(maxsize=256)
def split_url(url: str) -> Tuple[Tuple[str, str, int], str, str]:
    """Return ((scheme, host, port), path, Authorization) of a URL. Raises Forbidden."""
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, host = parts.scheme.lower(), parts.hostname or ""
        host = host if host.isascii() else host.encode("idna").decode("ascii")
        port_ = parts.port or {"https": 443, "http": 80}[scheme]
        if not re.fullmatch(r"[A-Za-z0-9._:-]+", host) or re.search(r"[\x00-\x1f\x7f]", url):
            raise ValueError(url)
    except (ValueError, KeyError, UnicodeError):
        raise Forbidden(f"{clean_line(url, 200)} is not the URL of a web server") from None
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~-._")
    return (scheme, host, port_), path + (query and "?" + query), basic_auth(parts)


# -- What is sent --

def forward_fields(store: Store, message: Message, key: str) -> Dict[str, Any]:
    """Return what a template may name: smtp-pigeon's fields, and those of pegmail."""
    raw = store.raw(message.id)
    data = raw.read(store.trace_length(message.id) or 0, raw.size)
    try:
        fields = parse_fields(data[:min(header_length(data), MAX_HEADER_BYTES)])
    except ParseError:
        fields = []
    text = decode_text(data.replace(b"\r\n", b"\n"))
    parts = find_parts(store, message.id)
    moment = datetime.datetime.fromtimestamp(message.received / 1000, datetime.timezone.utc)
    return {
        "ID": key, "Timestamp": GoTime(moment.astimezone()), "Sender": message.sender,
        "Recipients": message.recipients.split("\n"), "Data": text,
        "Body": body_text(data),
        "Header": go_header(fields), "Subject": message.subject,
        "From": decode_words(first_field(fields, "from")),
        "To": decode_words(first_field(fields, "to")), "Text": parts.text, "HTML": parts.html,
        "Attachments": [{"name": item["filename"], "mime": item["mime"], "size": item["size"],
                         "hash": item["hash"]} for item in parts.attachments],
        "Peer": store.peer(message.id)}


def body_text(data: bytes) -> str:
    """Return what is below the header of a message, with LF for line ends."""
    length = header_length(data)
    length += 2 * data.startswith(b"\r\n", length)
    return decode_text(data[length:].replace(b"\r\n", b"\n"))


class Parts(NamedTuple):
    """The texts and attachments of a message; `text` is made from the HTML if there is no other."""
    text: str
    html: str
    attachments: List[Dict[str, Any]]


def find_parts(store: Store, ident: int) -> Parts:
    """Return the texts and attachments of a message, digesting it if need be."""
    digest = store.digest([ident]).get(ident)
    plain, markup, attachments = [], [], []
    pending = [json.loads(digest[1])] if digest else []
    while pending:
        item = pending.pop() or {}
        pending.extend(reversed(item.get("items", [])))
        if item.get("type") == "attachment":
            attachments.append(item)
        elif item.get("mime") == "text/html":
            markup.append(item["text"])
        elif item.get("type") == "text":
            plain.append(item["text"])
    text = "\n".join(plain or [html_text(part)[0].strip() for part in markup])
    return Parts(text, "\n".join(markup), attachments)


def rfc3339(milliseconds: int) -> str:
    """Return a time as RFC 3339 has it, in UTC and whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds // 1000))


def sign(secret: str, key: str, now: int, body: bytes) -> Dict[str, str]:
    """Return the fields that sign a request, as standardwebhooks.com describes them."""
    head = {"Idempotency-Key": key, "webhook-id": key, "webhook-timestamp": str(now)}
    if secret:
        raw = (base64.b64decode(secret[6:]) if secret.startswith("whsec_")
               else secret.encode("utf-8"))
        mac = hmac.new(raw, f"{key}.{now}.".encode() + body, "sha256")
        head["webhook-signature"] = "v1," + base64.b64encode(mac.digest()).decode("ascii")
    return head


def find_zone(name: str) -> Optional[datetime.tzinfo]:
    """Return a time zone by its name, None if it is not known here."""
    if name == "Local":
        return datetime.datetime.now().astimezone().tzinfo
    try:
        return zoneinfo.ZoneInfo(name)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        return None


def surroundings() -> Surroundings:
    """Return what templates learn of the world."""
    return Surroundings(os.environ, lambda: datetime.datetime.now().astimezone(),
                        lambda: str(uuid.uuid4()), find_zone)


SAMPLE_FIELDS: Dict[str, Any] = {       # of the message that templates are tried with at the start
    "ID": "11111111-2222-4333-8444-555555555555", "Sender": "ann@example.com",
    "Timestamp": GoTime(datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)),
    "Recipients": ["bob@example.org", "carl@example.org"],
    "Data": "Subject: Hello\n\nA message.\n", "Body": "A message.\n",
    "Header": go_header([("Subject", "Hello")]), "Subject": "Hello",
    "From": "Ann <ann@example.com>", "To": "bob@example.org", "Text": "A message.\n",
    "HTML": "<p>A message.</p>", "Peer": "192.0.2.7",
    "Attachments": [{"name": "a.png", "mime": "image/png", "size": 4096, "hash": "00" * 24}]}


def read_template(text: str, option: str) -> Template:
    """Read a template and try it. Raises SettingsError."""
    try:
        template = Template(text, option)
        sample = template.render(SAMPLE_FIELDS, surroundings())
        if option in ("--url", "--forward_to"):
            split_url(sample)
        return template
    except (TemplateError, Forbidden) as error:
        raise SettingsError(str(error) if isinstance(error, TemplateError) else
                            f"{option}: {error}", 2) from None


class Hopeless(Exception):
    """A delivery that no further attempt can save."""


class Composer:
    """Makes the requests of deliveries; made by Couriers."""

    def __init__(self, settings: Settings, store: Store, api_url: str) -> None:
        self.settings, self.store, self.api_url = settings, store, api_url.rstrip("/")
        self.body = read_template(settings.template, "--template") if settings.template else None
        self.headers = [(name, read_template(value, "--header")) for name, value in settings.header]
        self.urls = {name: read_template(url, option)
                     for name, url, option in web_targets(settings)}

    def request(self, entry: Entry, message: Optional[Message], raw: Optional[bytes],
                ) -> Tuple[str, Dict[str, str], bytes]:
        """Return URL, header and body for a delivery. Raises Hopeless.

        Takes its message, None if it is gone, and the bytes of that if they are at hand.
        """
        try:
            if entry.target.startswith("webhook "):
                return self.webhook(entry, message)
            if message is None:
                raise KeyError(entry.message)
            return self.forward(entry, message, raw)
        except TemplateError as error:
            raise Hopeless(str(error)) from None
        except KeyError:
            raise Hopeless("the message was deleted") from None

    def forward(self, entry: Entry, message: Message, raw: Optional[bytes],
                ) -> Tuple[str, Dict[str, str], bytes]:
        """Return the request that forwards a message."""
        url = self.urls.get(entry.target)
        if url is None:
            raise Hopeless("the target is not configured any more")
        headers = {"Content-Type": "application/json"}
        if self.body is None and not self.headers and "{{" not in url.text:
            return url.text, headers, self.plain(message, entry.key, raw)
        fields, world = forward_fields(self.store, message, entry.key), surroundings()
        body = (self.body.render(fields, world).encode("utf-8", "replace") if self.body
                else self.plain(message, entry.key, raw))
        for name, value in self.headers:
            headers = {known: text for known, text in headers.items()
                       if known.lower() != name.lower()}
            headers[name] = value.render(fields, world)
        return url.render(fields, world), headers, body

    def plain(self, message: Message, key: str, data: Optional[bytes]) -> bytes:
        """Return the JSON object that is sent when there is no template."""
        if data is None:
            raw = self.store.raw(message.id)
            data = raw.read(0, raw.size)
        return json_text({
            "id": key, "timestamp": rfc3339(message.received), "sender": message.sender,
            "recipients": message.recipients.split("\n"), "body": body_text(data),
            "subject": message.subject}).encode("utf-8")

    def webhook(self, entry: Entry, message: Optional[Message],
                ) -> Tuple[str, Dict[str, str], bytes]:
        """Return the request that tells a webhook of an event."""
        hook = self.store.outbox.webhook(entry.target[8:])
        if hook is None:
            raise Hopeless("the webhook was deleted")
        payload: Dict[str, Any] = {
            "event": entry.event, "mailbox": hook.mailbox, "webhook_id": hook.id,
            "timestamp": rfc3339(entry.created)}
        if entry.event == "test":
            payload["message"] = "This is a test of a webhook"
        elif message is not None:
            payload["email"] = self.email(message, hook.mailbox,
                                          find_parts(self.store, message.id))
        elif entry.payload:
            payload["email"] = self.email(Message(**json.loads(entry.payload)), hook.mailbox, None)
        else:
            raise KeyError(entry.message)
        return hook.url, {"Content-Type": "application/json"}, json_text(payload).encode("utf-8")

    def email(self, message: Message, mailbox: str, parts: Optional[Parts]) -> Dict[str, Any]:
        """Return a message as webhooks are told of it; without parts it is gone already."""
        email: Dict[str, Any] = {
            "id": str(message.id), "to": mailbox, "from": message.sender,
            "subject": message.subject, "body": parts.text if parts else "",
            "timestamp": rfc3339(message.received),
            "attachments": len(parts.attachments) if parts else message.attachments}
        if parts and self.settings.attachments != "none":
            email["files"] = [self.file(item) for item in parts.attachments]
        return email

    def file(self, item: Dict[str, Any]) -> Dict[str, Any]:
        """Return an attachment as a webhook is told of it."""
        file = {name: item[name] for name in ("filename", "mime", "size", "hash")}
        if self.settings.attachments == "base64" and item["size"] <= self.settings.attachments_size:
            data = self.store.media.read(item["hash"], 0, item["size"])
            return {**file, "content": base64.b64encode(data).decode("ascii")}
        return {**file, "url": f"{self.api_url}/media?hash={item['hash']}"}


def web_targets(settings: Settings) -> List[Tuple[str, str, str]]:
    """Return (target, URL, option) of each target that the operator named."""
    urls = [("url", settings.url, "--url")] if settings.url else []
    return urls + [(forward.target, forward.target, "--forward_to")
                   for forward in settings.forward_to
                   if not forward.target.lower().startswith("mailto:")]


# -- The SMTP courier (RFC 5321; 1870, 3207, 4954, 6152, 6531) --

MAX_REPLY = 65536             # bytes of one reply; RFC 5321 4.5.3.1.5: a line has 512
MAX_REASON = 400              # characters kept of it
CONNECT_SECONDS = 30          # Postfix smtp_connect_timeout
QUIT_SECONDS = 3              # that the reply to QUIT is waited for
MESSAGE_SECONDS = 3600        # for one message, at all hosts: 50 MB pass at 14 kB/s
REUSE_SECONDS = 30            # that an idle connection stays open
REUSE_MESSAGES = 100          # messages over one connection


class Outcome(NamedTuple):
    """What became of a message for one recipient. `host` is who said so, "" if it was us."""
    state: str                # "delivered", "retry" or "failed"
    code: int
    status: str               # RFC 3463
    text: str                 # one clean line
    host: str = ""


class Refused(Exception):
    """A message cannot go now, or never, whoever the recipient."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


class NoTLS(Refused):
    """A TLS handshake failed, and the connection with it."""


class Relay(NamedTuple):
    """The host that all mail goes to."""
    host: str
    port: int
    mode: str                 # "starttls", "tls", "opportunistic" or "plain"
    user: str = ""
    password: str = ""


class Letter(NamedTuple):
    """A message to be sent, and what it asks of the host that takes it."""
    sender: str
    recipients: Tuple[str, ...]
    content: Source
    eight_bit: bool
    utf8: bool                # the header holds UTF-8 (RFC 6532)


REPLY_STATES = {2: "delivered", 5: "failed"}  # by the first digit of a reply; else "retry"
ENHANCED = re.compile(r"^([245]\.(?:0|[1-9]\d{0,2})\.(?:0|[1-9]\d{0,2}))(?:\s+|$)", re.A)


def own_outcome(code: int, status: str, text: str) -> Outcome:
    """Return an outcome that is our own judgement."""
    return Outcome(REPLY_STATES.get(code // 100, "retry"), code, status,
                   clean_line(text, MAX_REASON))


def read_outcome(code: int, message: bytes, host: str) -> Outcome:
    """Return what a host's reply means (RFC 5321 4.2.1, RFC 2034 4); its text becomes one line."""
    lines = message[:4 * MAX_REASON].decode("utf-8", "replace").split("\n")
    match = ENHANCED.match(lines[0])
    own_class = code // 100 if code // 100 in REPLY_STATES else 4
    status = match.group(1) if match and match.group(1)[0] == str(own_class) else None
    text = " ".join(ENHANCED.sub("", line.strip(), count=1) for line in lines).strip()
    return Outcome(REPLY_STATES.get(code // 100, "retry"), code, status or f"{own_class}.0.0",
                   clean_line(text, MAX_REASON), host)


def read_letter(sender: str, recipients: Sequence[str], content: Source, head: bytes) -> Letter:
    """Return a Letter; raise Refused if the content's lines do not all end with CRLF.

    RFC 5321 2.3.8 forbids a CR or LF alone, and some host would take it for a line end, and what
    follows for commands. BINARYMIME content is such; it would have to be converted first.
    """
    crs = lfs = pairs = 0
    eight_bit, last = False, b""
    for data in content.windows(0, content.size):
        eight_bit = eight_bit or not data.isascii()
        crs += data.count(b"\r")
        lfs += data.count(b"\n")
        pairs += data.count(b"\r\n") + (last == b"\r" and data[:1] == b"\n")
        last = data[-1:]
    if not crs == lfs == pairs:
        raise Refused(own_outcome(554, "5.6.3", "The message has bare line ends, and cannot be "
                                                "sent without being changed"))
    return Letter(sender, tuple(recipients), content, eight_bit, is_utf8(head))


def is_utf8(data: bytes) -> bool:
    """Is this UTF-8 and not just ASCII?"""
    try:
        return not data.isascii() and bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def wire_address(address: str) -> str:
    """Return an address as it goes into a command: a domain becomes A-labels (RFC 5890).

    Raises ValueError if it is not valid: no command is broken by it.
    """
    if not address:
        return ""                 # the null sender
    parts = parse_address(address)
    address.encode("utf-8")
    return address if parts.domain.isascii() else f"{parts.local}@{normalize_domain(parts.domain)}"


def stuffed_windows(content: Source) -> Iterator[bytes]:
    """Yield a message as DATA wants it, dots doubled and the end marked (RFC 5321 4.5.2)."""
    last = b"\n"
    for data in content.windows(0, content.size):
        yield (b"." if last == b"\n" and data[:1] == b"." else b"") + data.replace(b"\n.", b"\n..")
        last = data[-1:] or last
    yield b".\r\n" if last == b"\n" else b"\r\n.\r\n"


class MailClient(smtplib.SMTP):
    """smtplib's client through a door of ours; a reply is bounded in bytes and in time.

    Made by MailCourier. Every error is an OSError, as smtplib's own are.
    """

    def __init__(self, courier: "MailCourier", host: str) -> None:
        super().__init__(local_hostname=courier.hostname, timeout=courier.timeout)
        self.courier = courier
        self.host = host
        self.now = courier.now
        self.inbox = bytearray()
        self.messages = 0
        self.used = self.now()

    def _get_socket(self, host, port, timeout):
        sock = self.courier.connect_door(host, port, min(timeout, CONNECT_SECONDS))
        sock.settimeout(timeout)
        if not self.courier.tls_first:
            return sock
        with contextlib.ExitStack() as failing:
            failing.callback(sock.close)
            wrapped = self.courier.context.wrap_socket(sock, server_hostname=self.host)
            failing.pop_all()
        return wrapped

    def limit_wait(self, seconds: float) -> None:
        """Let the socket wait that long, and not beyond what the message has in all."""
        left = min(seconds, self.courier.expires - self.now())
        if left <= 0:
            self.lose("no answer in time")
        if self.sock:
            self.sock.settimeout(left)

    def lose(self, why: str) -> None:
        """Close the connection and raise."""
        self.close()
        raise smtplib.SMTPServerDisconnected(why)

    def send(self, s) -> None:
        """Send bytes or a command."""
        self.limit_wait(self.timeout)
        super().send(s)

    def getreply(self, seconds: Optional[float] = None) -> Tuple[int, bytes]:
        """Return the code of a reply, and its lines without it (RFC 5321 4.2.1)."""
        deadline = self.now() + (seconds or self.timeout)
        lines, size, more = [], 0, True
        while more:
            line = self.read_line(deadline)
            lines.append(line[4:].strip())
            size += len(line) + 1
            more = line[3:4] == b"-"
            if size > MAX_REPLY or not re.fullmatch(rb"[2-5]\d\d[ -]?", line[:4].rstrip(b"\r")):
                self.lose("the answer is not SMTP")
        if line[:3] == b"421":
            self.close()          # RFC 5321 3.8: the host is about to do the same
        return int(line[:3]), b"\n".join(lines)

    def read_line(self, deadline: float) -> bytes:
        """Return one line without its LF."""
        while b"\n" not in self.inbox:
            self.limit_wait(deadline - self.now())
            try:
                data = self.sock.recv(4096) if self.sock else b""
            except OSError as error:
                self.lose(reason(error))
            if not data or len(self.inbox) > MAX_REPLY:
                self.lose("the connection was closed" if not data else "the answer is not SMTP")
            self.inbox += data
        line, _, self.inbox = self.inbox.partition(b"\n")
        return bytes(line)

    def command(self, line: str) -> Outcome:
        """Send a command; return what the reply means."""
        self.putcmd(line)
        return read_outcome(*self.getreply(), self.host)

    def expect(self, code: int, message: bytes) -> None:
        """Raise Refused if a reply is not positive."""
        outcome = read_outcome(code, message, self.host)
        if outcome.state != "delivered":
            raise Refused(outcome)

    def hello(self) -> None:
        """Say EHLO, or HELO to a host that knows no better (RFC 5321 3.2)."""
        code, message = self.ehlo()
        if code // 100 == 5:
            code, message = self.helo()
        self.expect(code, message)

    def secure(self, context: ssl.SSLContext) -> None:
        """Begin TLS behind STARTTLS, and forget what was said before (RFC 3207 4.2)."""
        if self.inbox:            # sent in clear, and would be read as if it were not
            self.lose("the host spoke before the TLS handshake")
        assert self.sock
        self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        self.helo_resp = self.ehlo_resp = None
        self.esmtp_features = {}
        self.hello()

    def find_obstacle(self, letter: Letter) -> Optional[Outcome]:
        """Return why this host could not take the message, None if it might."""
        size = self.esmtp_features.get("size", "")
        limit = int(size) if re.fullmatch(r"[0-9]{1,20}", size) else 0
        obstacles: Tuple[Tuple[bool, int, str, str], ...] = (
            # RFC 1870 6.1, RFC 6152 3, RFC 6531 3.6
            (0 < limit < letter.content.size, 552, "5.3.4",
             f"The message has {letter.content.size} bytes, {self.host} takes {limit}"),
            (letter.eight_bit and not self.has_extn("8bitmime"), 554, "5.6.3",
             f"The message has 8-bit text, which {self.host} does not take"),
            (letter.utf8 and not self.has_extn("smtputf8"), 550, "5.6.9",
             f"The message has UTF-8 in its header, which {self.host} does not take"))
        return next((own_outcome(code, status, text)
                     for stops, code, status, text in obstacles if stops), None)

    def wire_addresses(self, letter: Letter, outcomes: Dict[str, Outcome]) -> Dict[str, str]:
        """Return addresses as they go to this host, sender first; enter the others' outcomes."""
        wire: Dict[str, str] = {}
        for address in (letter.sender, *letter.recipients):
            try:
                text = wire_address(address)
            except ValueError:
                outcomes[address] = own_outcome(553, "5.1.3", "The address is not valid")
                continue
            if text.isascii() or self.has_extn("smtputf8"):
                wire[address] = text
            else:
                outcomes[address] = own_outcome(553, "5.6.7", f"The address is not ASCII, and "
                                                              f"{self.host} takes no other")
        return wire

    def transact(self, letter: Letter, outcomes: Dict[str, Outcome]) -> Outcome:
        """Send a message; enter the recipients that are refused, return the outcome for the rest.

        A reply to the final dot is waited for twice as long (RFC 5321 4.5.3.2.6).
        """
        obstacle = self.find_obstacle(letter)
        wire = self.wire_addresses(letter, outcomes)
        if obstacle or letter.sender not in wire:
            return obstacle or outcomes[letter.sender]
        answer = self.give_envelope(letter, wire, outcomes)
        if answer.state == "delivered":
            answer = self.command("DATA")
            if answer.code == 354:
                for data in stuffed_windows(letter.content):
                    self.send(data)
                return read_outcome(*self.getreply(2 * self.timeout), self.host)
            if answer.state == "delivered":        # who says 250 to DATA has lost the thread
                self.lose("DATA was answered with 250")
        return answer

    def give_envelope(self, letter: Letter, wire: Dict[str, str], outcomes: Dict[str, Outcome],
                      ) -> Outcome:
        """Send MAIL and RCPT; return a reply for the rest, positive if DATA is to follow."""
        utf8 = letter.utf8 or not all(text.isascii() for text in wire.values())
        self.command_encoding = "utf-8" if utf8 else "ascii"
        options = ((f" SIZE={letter.content.size}", self.has_extn("size")),
                   (" BODY=8BITMIME", letter.eight_bit), (" SMTPUTF8", utf8))
        chosen = "".join(option for option, wanted in options if wanted)
        answer = last = self.command(f"MAIL FROM:<{wire[letter.sender]}>{chosen}")
        accepted = None
        for recipient in letter.recipients if answer.state == "delivered" else ():
            if recipient in outcomes:
                continue
            last = self.command(f"RCPT TO:<{wire[recipient]}>")
            if last.code == 421:
                return last
            if last.state == "delivered":
                accepted = last
            elif last.code == 552 and accepted:    # RFC 5321 4.5.3.1.10: too many of them
                outcomes[recipient] = last._replace(state="retry")
            else:
                outcomes[recipient] = last
        return accepted or (last if last.state != "delivered" else
                            own_outcome(554, "5.5.1", "No recipient is valid"))

    def is_reusable(self) -> bool:
        """Can another message go this way? Asks the host, by RSET."""
        if self.messages >= REUSE_MESSAGES or self.now() - self.used > REUSE_SECONDS:
            return False
        try:
            return self.sock is not None and self.command("RSET").state == "delivered"
        except OSError:
            return False

    def leave(self) -> None:
        """Say QUIT (RFC 5321 4.1.1.10) and close."""
        with contextlib.suppress(OSError):
            self.putcmd("QUIT")
            self.getreply(QUIT_SECONDS)
        self.close()


class MailCourier:
    """Delivers messages to other hosts, to all by way of one if there is a relay; blocking.

    For one thread at a time. `connect(host, port, timeout)` is the one door to the network: it
    returns a socket, or raises OSError. It gets an address, but for the relay its name as given.
    """

    def __init__(self, hostname: str, resolver: Resolver, relay: Optional[Sequence[Any]],
                 timeout: float, ca_file: Optional[str], connect: Callable[..., socket.socket],
                 now: Callable[[], float] = time.monotonic) -> None:
        self.hostname = hostname
        self.resolver = resolver
        self.relay = Relay(*relay) if relay else None
        self.timeout = timeout                # seconds for each step; RFC 5321 4.5.3.2 has 300
        self.connect_door = connect
        self.now = now
        self.mode = self.relay.mode if self.relay else "opportunistic"
        self.tls_first = self.mode == "tls"
        self.context = ssl.create_default_context(cafile=ca_file)
        if self.mode == "opportunistic" and not (self.relay and self.relay.user):
            self.context.check_hostname = False        # RFC 7435: better than none, and a
            self.context.verify_mode = ssl.CERT_NONE   # password is never told to just anybody
        self.expires = 0.0                             # when the message at hand is given up
        self.client: Optional[MailClient] = None       # the connection that stayed open
        self.key: FrozenSet[str] = frozenset()         # and the hosts it is good for
        self.talking: Optional[MailClient] = None      # the latest one, for abort()

    def send(self, domain: str, sender: str, recipients: Sequence[str], content: Source,
             head: bytes) -> Dict[str, Outcome]:
        """Deliver one message to recipients of one domain; return what became of it for each.

        What reading the content raises, OSErrors apart, is passed on; the message is not sent.
        """
        outcomes: Dict[str, Outcome] = {}
        self.expires = self.now() + MESSAGE_SECONDS
        try:
            letter = read_letter(sender, tuple(dict.fromkeys(recipients)), content, head)
            rest = self.hand_over(self.client_for(domain), letter, outcomes)
        except Refused as refusal:
            rest = refusal.outcome
        return {recipient: outcomes.get(recipient, rest) for recipient in recipients}

    def close(self) -> None:
        """Close the connection that stayed open."""
        client, self.client = self.client, None
        if client:
            client.leave()

    def abort(self) -> None:
        """End what takes too long; on any thread."""
        sock = self.talking.sock if self.talking else None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close_idle(self) -> None:
        """Close the connection that stayed open if it is idle for too long."""
        if self.client and self.now() - self.client.used > REUSE_SECONDS:
            self.close()

    def hand_over(self, client: MailClient, letter: Letter, outcomes: Dict[str, Outcome],
                  ) -> Outcome:
        """Send a message over a connection, and keep that open if all is well with it."""
        with contextlib.ExitStack() as failing:
            failing.callback(client.close)     # before the final dot: nothing counts as sent
            try:
                outcome = client.transact(letter, outcomes)
            except OSError as error:
                return own_outcome(451, "4.4.2", f"The connection to {client.host} was lost: "
                                                 f"{reason(error)}")
            failing.pop_all()
        client.messages += 1
        client.used = self.now()
        if client.sock:
            self.client = client
        return outcome

    def client_for(self, domain: str) -> MailClient:
        """Return a connection to a host that takes mail for a domain, or raise Refused."""
        hosts = self.find_hosts(domain)
        client, self.client = self.client, None
        if client and self.key == frozenset(hosts) and client.is_reusable():
            return client
        if client:
            client.leave()
        self.key = frozenset(hosts)
        problems: List[Outcome] = []
        for host, address in itertools.islice(self.find_targets(hosts, problems), MAX_TRIES):
            try:
                return self.greet(host, address)
            except Refused as refusal:
                problems.append(refusal.outcome)
        worst = next((one for one in problems if one.state != "failed"), problems[-1])
        # What a relay says before MAIL is about us, and for the operator to mend: nothing bounces.
        raise Refused(worst._replace(state="retry") if self.relay else worst)

    def find_hosts(self, domain: str) -> List[str]:
        """Return the hosts to try, best first, or raise Refused."""
        if self.relay:
            return [self.relay.host]
        try:
            return self.resolver.mail_hosts(domain)
        except Undeliverable as error:
            raise Refused(own_outcome(*error.reply)) from None
        except DNSError as error:
            raise Refused(own_outcome(451, "4.4.3", str(error))) from None

    def find_targets(self, hosts: Sequence[str], problems: List[Outcome],
                     ) -> Iterator[Tuple[str, str]]:
        """Yield each host with each of its addresses; enter why there are none."""
        for host in hosts:
            try:
                addresses = [host] if self.relay else self.resolver.addresses(host)
            except DNSError as error:
                problems.append(own_outcome(451, "4.4.3", str(error)))
                continue
            if not addresses:
                problems.append(own_outcome(550, "5.4.4", f"The host {host} has no address"))
            for address in addresses:
                yield host, address

    def greet(self, host: str, address: str, tls: bool = True) -> MailClient:
        """Return a connection that is ready for MAIL, or raise Refused."""
        client = self.talking = MailClient(self, host)
        try:
            client.expect(*client.connect(address, self.relay.port if self.relay else 25))
            client.hello()
            if tls and self.mode in ("starttls", "opportunistic"):
                self.start_tls(client)
            if self.relay and self.relay.user:
                self.log_in(client, self.relay)
        except NoTLS:
            client.close()
            if self.mode != "opportunistic":
                raise
            return self.greet(host, address, tls=False)
        except Refused:
            client.leave()
            raise
        except (OSError, ValueError) as error:     # ValueError: a host name that TLS refuses
            client.close()
            raise Refused(own_outcome(421, "4.4.1", f"Cannot talk to {host}: "
                                                    f"{reason(error)}")) from None
        return client

    def start_tls(self, client: MailClient) -> None:
        """Begin TLS (RFC 3207), or raise Refused where it has to be and cannot."""
        if client.has_extn("starttls"):
            answer = client.command("STARTTLS")
        else:
            answer = own_outcome(454, "4.7.4", f"{client.host} does not offer STARTTLS")
        if answer.code == 220:
            try:
                client.secure(self.context)
            except (OSError, ValueError) as error:
                raise NoTLS(own_outcome(454, "4.7.5", f"TLS with {client.host} failed: "
                                                      f"{reason(error)}")) from None
        elif self.mode != "opportunistic":
            raise Refused(answer)

    def log_in(self, client: MailClient, relay: Relay) -> None:
        """Give name and password (RFC 4954, 4616), but never in clear text over a network."""
        sock = client.sock
        assert sock
        if not isinstance(sock, ssl.SSLSocket) and not is_loopback(sock.getpeername()[0]):
            raise Refused(own_outcome(454, "4.7.4", f"No TLS with {client.host}, and so it is "
                                                    "not told the password"))
        plain = base64_text(f"\0{relay.user}\0{relay.password}")
        methods = {"PLAIN": [f"AUTH PLAIN {plain}"],
                   "LOGIN": ["AUTH LOGIN", base64_text(relay.user), base64_text(relay.password)]}
        offered = client.esmtp_features.get("auth", "").upper().split()
        lines = next((methods[name] for name in methods if name in offered), [])
        answer = own_outcome(454, "4.7.4", f"{client.host} offers neither AUTH PLAIN nor LOGIN")
        for line in lines:
            answer = client.command(line)
            if answer.code != 334:
                break
        if answer.code != 235:
            raise Refused(answer)


def base64_text(text: str) -> str:
    """Return text in UTF-8 and base64."""
    return binascii.b2a_base64(text.encode("utf-8"), newline=False).decode("ascii")


# -- Bounces (RFC 3464, 6522, 6533; RFC 3834 and RFC 5321 6.1 on when) --

MAX_RETURNED = 65536          # bytes of the original header that go back

ADVICE = {                    # by subject and detail of the status (RFC 3463), or subject alone
    "1": "Check the address for a typing mistake, and send the message again.",
    "1.10": "This domain takes no mail at all. Reach the person in another way.",
    "2": "The mailbox cannot take mail now. Try later, or reach the person in another way.",
    "2.3": "Send a smaller message, or a link instead of the attachment.",
    "3": "The other mail system cannot take this message. Try later, or ask its postmaster.",
    "3.4": "Send a smaller message, or a link instead of the attachment.",
    "4": "The other mail system could not be reached. Check the part behind the @, or try later.",
    "6": "The other mail system cannot handle a message of this form. Send it as plain text.",
    "7": "The other mail system does not want this message. Show this note to your administrator.",
}
AUTO_REPLIED = re.compile(rb"^auto-submitted[ \t]*:\s*auto-replied\b", re.M | re.I)
OTHER_ADVICE = "If it is important, reach the person in another way, or show this note to your " \
               "administrator."


def is_bounceable(sender: str, head: bytes) -> bool:
    """May a failure be reported to this sender?

    Not to the null sender, nor to an address that is none; nor to a reply that a program wrote
    (`Auto-Submitted: auto-replied`). RFC 3834 2 asks more of automatic replies, but leaves DSNs out
    (1.1), and RFC 5321 6.1 wants them: a program that writes to people has to learn of failures,
    and so has a list (`Precedence: bulk` or `list`), of which RFC 3834 2 recommends nothing.
    """
    try:
        has_domain = bool(parse_address(sender).domain)
    except ValueError:
        return False
    return has_domain and not AUTO_REPLIED.search(returned_header(head))


def make_bounce(sender: str, failed: Sequence[Tuple[str, Outcome]], head: bytes, hostname: str,
                date: float, ident: str, arrived: float) -> bytes:
    """Return the report that a message failed (RFC 3464), to be sent with the null sender.

    Times are seconds since 1970. Raises ValueError if the sender's address is not valid.
    """
    block = returned_header(head)
    headers = "message/global-headers" if is_utf8(block) else "text/rfc822-headers"
    status = delivery_status(failed, hostname, arrived)
    report = "message/delivery-status" if status.isascii() else "message/global-delivery-status"
    parts = [entity("text/plain; charset=utf-8", bounce_text(failed, head, hostname).encode()),
             entity(report, status.encode()), entity(headers, block)]
    boundary = "=_" + hashlib.sha256(b"".join(parts)).hexdigest()[:32]     # so in none of them
    top = [f"From: Mail Delivery System <MAILER-DAEMON@{hostname}>",
           f"To: <{wire_address(sender)}>", f"Subject: {bounce_subject(head)}",
           f"Date: {date_text(date)}",
           f"Message-ID: <{re.sub(r'[^A-Za-z0-9.-]', '-', ident)}.bounce@{hostname}>",
           *reply_fields(block), "Auto-Submitted: auto-replied", "MIME-Version: 1.0",
           "Content-Type: multipart/report; report-type=delivery-status;",
           f' boundary="{boundary}"']
    edge = f"\r\n--{boundary}".encode()
    return ("\r\n".join(top).encode() + b"\r\n"
            + b"".join(edge + b"\r\n" + part for part in parts) + edge + b"--\r\n")


def returned_header(head: bytes) -> bytes:
    """Return what goes back of the original header: whole lines, each with CRLF."""
    block = head[:header_length(head[:MAX_RETURNED])]
    lines = re.split(rb"\r\n|\r|\n", block.replace(b"\0", b" "))
    whole = lines if len(head) <= MAX_RETURNED else lines[:-1]
    return b"".join(line + b"\r\n" for line in whole if line)


def reply_fields(block: bytes) -> List[str]:
    """Return fields that tie the report to the original (RFC 3834 3.1.6), if it has an id."""
    found = re.search(rb"^message-id[ \t]*:\s*(<[!-;=?-~]{1,250}>)", block, re.M | re.I)
    ident = found.group(1).decode("ascii") if found else ""
    return [f"{name}: {ident}" for name in ("In-Reply-To", "References") if ident]


def bounce_subject(head: bytes) -> str:
    """Return the subject of a report: the original's, as one line of ASCII (RFC 2047)."""
    text = f"Not delivered: {read_subject(head)[:200]}".strip()
    if text.isascii() and text.isprintable():
        return text
    return email.header.Header(one_line(text), "utf-8", 60).encode(linesep="\r\n")


def date_text(seconds: float) -> str:
    """Return a date with a numeric zone (RFC 3464 2.2.5)."""
    return email.utils.formatdate(seconds).replace("-0000", "+0000")


def entity(kind: str, data: bytes) -> bytes:
    """Return a MIME entity: as it is where that is safe everywhere, else in base64."""
    plain = data.isascii() and b"\0" not in data and not re.search(rb"[^\n]{998}", data)
    body = data if plain else encode_lines(data, 76)
    return (f"Content-Type: {kind}\r\nContent-Transfer-Encoding: {'7bit' if plain else 'base64'}"
            "\r\n\r\n").encode() + body


def delivery_status(failed: Sequence[Tuple[str, Outcome]], hostname: str, arrived: float) -> str:
    """Return the part for programs (RFC 3464 2.2 and 2.3, RFC 6533 4.1)."""
    groups = [[f"Reporting-MTA: dns; {hostname}", f"Arrival-Date: {date_text(arrived)}"]]
    for recipient, outcome in failed:
        address, said = one_line(recipient), one_line(outcome.text, "ascii")
        status = outcome.status if ENHANCED.fullmatch(outcome.status) else "5.0.0"
        remote = [f"Remote-MTA: dns; {one_line(outcome.host, 'ascii')}"] if outcome.host else []
        groups.append([
            f"Final-Recipient: {'rfc822' if address.isascii() else 'utf-8'}; {address}",
            "Action: failed", f"Status: {status}", *remote,
            f"Diagnostic-Code: smtp; {outcome.code} {status} {said}"])
    return "\r\n".join("".join(f"{field}\r\n" for field in group) for group in groups)


def one_line(text: str, encoding: str = "utf-8") -> str:
    """Return text that stays in its field and can be encoded; what cannot is a question mark."""
    return clean_line(text).encode(encoding, "replace").decode(encoding)


def bounce_text(failed: Sequence[Tuple[str, Outcome]], head: bytes, hostname: str) -> str:
    """Return the part for people: what happened, to whom, what to do."""
    subject = one_line(read_subject(head))[:200]
    lines = [f"This is the mail system at {hostname}.", "",
             "Your message could not be delivered to the following, and is not tried again:", ""]
    for recipient, outcome in failed:
        _, subject_code, detail = (outcome.status + "..").split(".")[:3]
        advice = ADVICE.get(f"{subject_code}.{detail}") or ADVICE.get(subject_code, OTHER_ADVICE)
        who = f"{one_line(outcome.host)} said" if outcome.host else "Reason"
        lines += [f"  {one_line(recipient)}",
                  f"    {who}: {outcome.code} {one_line(outcome.status)} {one_line(outcome.text)}",
                  f"    {advice}", ""]
    if subject:
        lines += [f"The message was: {subject}"]
    return "\r\n".join(lines + ["Its header, and a report for programs, are attached.", ""])


# -- Couriers --

class Attempt(NamedTuple):
    """How an attempt went. `stop`: the target itself is in trouble, others would fare no better."""
    state: str                          # delivered, failed, or waiting: to be tried again
    error: str = ""
    after: float = 0                    # seconds that the target asked for
    stop: bool = False
    recipients: Optional[str] = None    # of mail, those that are left


class Lane:
    """A share of a target's deliveries, which go one after another; made by Couriers."""

    def __init__(self, target: str, number_: int, count: int, ordered: bool = False) -> None:
        self.target, self.number, self.count = target, number_, count
        self.ordered = ordered          # nothing overtakes a delivery that is to be tried again
        self.client: Any = None
        self.follower: Any = None       # what goes where a 303 leads
        self.when = 0.0                 # when it is to be looked at, on the clock of time.monotonic
        self.rest = 0.0                 # until then more may gather: few large pages cost less
        self.busy = False
        self.again = False              # something came while it was busy
        self.spare = False              # there was nothing to do when it was last looked at
        self.full = False               # there was as much as it takes in one go
        self.failures = 0               # in a row, of the target itself
        self.suspect = False            # it had failures when it was taken up
        self.loaded: Dict[int, Any] = {}        # the messages of the page that is being worked on
        self.overdue = 0.0              # when the request under way has taken too long

    def abort(self) -> None:
        """End what is under way; on any thread."""
        for client in (self.client, self.follower):
            if client is not None:
                client.abort()


class Couriers:
    """Threads that deliver what is in the outbox; made by Server.

    A target that hangs holds its own lanes only; targets that fail hold half of the threads at
    most, so the others have the rest. The first lane of a target that answers fast has all of its
    deliveries; the others have their share as soon as it is slow.
    """

    def __init__(self, settings: Settings, store: Store, loop: Loop, api_url: str) -> None:
        self.settings, self.store, self.outbox, self.loop = settings, store, store.outbox, loop
        self.composer = Composer(settings, store, settings.api_url or api_url)
        self.context = web_context(settings)
        self.condition = threading.Condition()
        self.lanes: Dict[Tuple[str, int], Lane] = {}    # those with something to do
        self.failing = 0                # lanes of failing targets that are being worked on
        self.running: Dict[str, int] = collections.Counter()    # lanes that are, by target
        self.slow: Set[str] = set()     # targets whose lanes all work
        self.stopping = False
        self.attempts: Dict[str, int] = collections.Counter()     # by how they ended
        self.heavy = threading.Semaphore(HEAVY_AT_ONCE)
        # Where a sender's domain points to is that sender's choice, and bounces go there.
        self.mail_door = Door(None if settings.relay else settings.webhook_allow)
        self.resolver = Resolver([f"[{host}]:{port_ or 53}" if ":" in host else
                                  f"{host}:{port_ or 53}" for host, port_ in settings.dns_server]
                                 or read_resolv_conf())
        self.threads: List[threading.Thread] = []       # at most COURIERS
        self.idle = 0                   # threads that wait for something to do
        self.outbox.failure_limit = settings.webhook_failures
        self.outbox.remember = settings.outbox_keep
        self.outbox.hear = self.wake

    def start(self) -> None:
        """Begin with what an earlier run left."""
        with self.condition:
            self.lanes["", 0] = Lane("", 0, 1)          # does the housekeeping
            self.call_thread()
        self.loop.call_later(1, self.look_for_overdue)

    def call_thread(self) -> None:
        """Have one more thread look for something to do; the condition is held."""
        if self.idle:
            self.condition.notify()
        elif len(self.threads) < COURIERS and not self.stopping:
            thread = threading.Thread(target=self.run, name="courier", daemon=True)
            self.threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Finish the requests under way, within their time at most, and end the threads."""
        with self.condition:
            self.stopping = True
            self.condition.notify_all()
        end = time.monotonic() + STOP_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        lanes = list(self.lanes.values())
        for lane in lanes:
            lane.abort()
        for thread in self.threads:
            thread.join(max(0.0, end + 1 - time.monotonic()))
        for lane in lanes:
            if lane.client is not None and not lane.busy:
                lane.client.close()

    def wake(self, targets: Iterable[str]) -> None:
        """Look at these targets now; from any thread."""
        with self.condition:
            for target in targets:
                hook, count = target.startswith("webhook "), self.settings.forward_parallel
                count, ordered = (1, False) if hook else (count, count == 1)
                for number_ in range(count):
                    lane = self.lanes.get((target, number_))
                    if lane is None:
                        lane = self.lanes[target, number_] = Lane(target, number_, count, ordered)
                    lane.again = True
                    if not lane.failures:
                        lane.when = lane.rest
            self.call_thread()

    def run(self) -> None:
        """Work on one lane after another; a thread."""
        lane = self.next_lane()
        while lane is not None:
            try:
                pause = self.work(lane) if lane.target else self.keep_house()
            except Exception as error:      # a border: the rows are still there
                known = isinstance(error, (StoreError, OSError))
                log.error("outbox: %s", reason(error), exc_info=not known)
                pause = 5.0
            self.give_back(lane, pause)
            lane = self.next_lane()

    def next_lane(self) -> Optional[Lane]:
        """Wait for a lane with something to do; None at the end."""
        with self.condition:
            while not self.stopping:
                now = time.monotonic()
                free = [lane for lane in self.lanes.values() if not lane.busy
                        and (not lane.failures or self.failing < COURIERS // 2)
                        and (lane.target in self.slow
                             or lane.number == 0 == self.running[lane.target])]
                lane = min(free, key=lambda lane: lane.when, default=None)
                if lane is not None and lane.when <= now:
                    lane.busy, lane.again, lane.suspect = True, False, lane.failures > 0
                    self.failing += lane.suspect
                    self.running[lane.target] += 1
                    if any(other.when <= now for other in free if other is not lane):
                        self.call_thread()
                    return lane
                self.idle += 1
                self.condition.wait(lane.when - now if lane else None)
                self.idle -= 1
            return None

    def give_back(self, lane: Lane, pause: Optional[float]) -> None:
        """Put a lane back, to be looked at again after a pause; None: when something comes."""
        with self.condition:
            self.failing -= lane.suspect
            self.running[lane.target] -= 1
            if not self.running[lane.target]:
                del self.running[lane.target]
            lane.busy = False
            rest = 0.0 if lane.full else REST_SECONDS
            lane.rest = time.monotonic() + rest
            if lane.again and not lane.failures:
                pause = rest
            if pause is not None:
                lane.when = time.monotonic() + pause
            else:
                del self.lanes[lane.target, lane.number]
                self.slow.discard(lane.target)
            self.condition.notify()
        if pause is None and lane.client is not None:
            lane.client.close()         # a mail server may take its time to say goodbye

    def keep_house(self) -> float:
        """Forget what is over, and look for rows that another process added."""
        while self.outbox.purge() and not self.stopping:
            pass
        soon = int((self.store.now() + HOUSE_SECONDS) * 1000)
        waiting = self.outbox.waiting()
        with self.condition:
            for lane in self.lanes.values():
                if waiting.get(lane.target) == 0:   # an operator's retry ends the pause
                    lane.failures = 0
        self.wake([target for target, due in waiting.items() if due <= soon])
        return HOUSE_SECONDS

    def look_for_overdue(self) -> None:
        """End requests that take too long in small steps; on the loop's thread."""
        for lane in list(self.lanes.values()):
            if lane.busy and 0 < lane.overdue < time.monotonic():
                lane.abort()
        if not self.stopping:
            self.loop.call_later(1, self.look_for_overdue)

    def work(self, lane: Lane) -> Optional[float]:
        """Deliver what is due in a lane; return in how many seconds to look again, None: never."""
        count = lane.count if lane.target in self.slow else 1      # then the first has them all
        entries = self.outbox.take(lane.target, lane.number, count, PAGE)
        now, begun = int(self.store.now() * 1000), time.monotonic()
        lane.full = len(entries) == PAGE
        if not entries:                 # it and its connection stay a while, should more come
            lane.spare = not lane.spare
            return SPARE_SECONDS if lane.spare else None
        lane.spare = False
        if entries[0].due > now:
            return (entries[0].due - now) / 1000
        over, pause, last_id = [], 0.0, self.store.totals.last_id
        lane.loaded = self.outbox.load(entries)
        for entry in entries:
            if entry.due > now:
                break
            attempt = self.attempt(lane, entry)
            over.append(self.judge(lane, entry, attempt))
            if attempt.state == "waiting" and (attempt.stop or lane.ordered):
                lane.failures += 1
                pause = attempt.after or self.backoff(lane.failures)
                break
            lane.failures = 0
            if self.stopping or time.monotonic() - begun > SETTLE_SECONDS:
                break
        worked = time.monotonic() - begun
        self.outbox.settle(over)
        if worked / len(over) > SLOW_SECONDS:
            self.slow.add(lane.target)
        else:
            self.slow.discard(lane.target)
            if self.store.totals.last_id > last_id:     # mail came in meanwhile, and goes first
                time.sleep(min(MAX_YIELD, POLITENESS * worked))
        if pause and not self.outbox.take(lane.target, lane.number, count, 1):
            return None                 # a webhook that is disabled now, and may come back
        return pause

    def attempt(self, lane: Lane, entry: Entry) -> Attempt:
        """Try to deliver; what goes wrong is in the result."""
        try:
            if lane.target.startswith("mail "):
                return self.mail(lane, entry)
            lane.overdue = time.monotonic() + self.settings.forward_timeout
            return self.post(lane, entry)
        except (Hopeless, Forbidden) as error:
            return Attempt("failed", clean_line(str(error), 500))
        except (KeyError, Unreadable):
            return Attempt("failed", "the message is gone, or cannot be read")
        except (OSError, StoreError) as error:
            hint = ("; --ca_file names certificates to trust"
                    if isinstance(error, ssl.SSLCertVerificationError) else "")
            return Attempt("waiting", clean_line(reason(error), 400) + hint, stop=True)
        except Exception:               # a border: others are to get theirs
            log.exception("%s: bug in delivery %d", entry.key, entry.id)
            return Attempt("waiting", "an internal error, see the log")
        finally:
            lane.overdue = 0.0

    def post(self, lane: Lane, entry: Entry) -> Attempt:
        """Deliver by HTTP POST."""
        if lane.client is None:
            door = Door(self.settings.webhook_allow if lane.target.startswith("webhook ") else None)
            lane.client = WebClient(door, self.context, self.settings.forward_timeout)
        message, raw = lane.loaded.get(entry.message or 0, (None, None))
        with self.heavy if message and message.size > HEAVY else contextlib.nullcontext():
            url, headers, body = self.composer.request(entry, message, raw)
            headers.update(sign(self.settings.forward_secret or "", entry.key, int(time.time()),
                                body))
            headers.setdefault("User-Agent", "pegmail/" + __version__)
            answer = lane.client.request("POST", url, headers, body)
        if lane.target == "url":            # as smtp-pigeon's log has it
            log.info("%s: POST returned status: %d", entry.key, answer.status)
            log.info("%s: Session reset after POST", entry.key)
        else:
            log.info("%s: POST to %s returned status: %d", entry.key, lane.target, answer.status)
        if answer.status == 303:        # taken; what became of it is to be asked for elsewhere
            answer = self.follow(lane, url, answer)
        return self.verdict(answer)

    def follow(self, lane: Lane, url: str, answer: WebAnswer) -> WebAnswer:
        """Go where a 303 leads, by GET and without what the POST carried (RFC 9110 15.4.4)."""
        for _ in range(MAX_REDIRECTS):
            if answer.status not in (301, 302, 303, 307, 308) or "location" not in answer.headers:
                break
            known, url = split_url(url)[0], urllib.parse.urljoin(url, answer.headers["location"])
            door = (lane.client.door if split_url(url)[0] == known else
                    Door(self.settings.webhook_allow))
            lane.follower = WebClient(door, self.context, self.settings.forward_timeout)
            try:
                answer = lane.follower.request("GET", url, {"User-Agent": "pegmail/" + __version__})
            finally:
                lane.follower.close()
                lane.follower = None
        return answer

    def mail(self, lane: Lane, entry: Entry) -> Attempt:
        """Deliver by SMTP; those whom it will never reach are told of in a bounce."""
        if lane.client is None:
            lane.client = MailCourier(self.settings.hostname, self.resolver,
                                      relay_of(self.settings), self.settings.forward_timeout,
                                      self.settings.ca_file, self.mail_door.connect)
        sender, content = self.letter(entry)
        head = content.read(0, self.settings.max_header)
        head = head[:header_length(head)]
        outcomes = lane.client.send(lane.target[5:], sender, entry.recipients.split("\n"), content,
                                    head)
        for recipient, outcome in outcomes.items():
            log.info("%s: mail to <%s>: %s %d %s %s", entry.key, clean_line(recipient, 200),
                     outcome.state, outcome.code, outcome.status, outcome.text)
        self.bounce(entry, [(recipient, outcome) for recipient, outcome in outcomes.items()
                            if outcome.state == "failed"], sender, head)
        left = {recipient: outcome for recipient, outcome in outcomes.items()
                if outcome.state == "retry"}
        error = "; ".join(dict.fromkeys(f"{outcome.code} {outcome.status} {outcome.text}"
                                        for outcome in outcomes.values()
                                        if outcome.state != "delivered"))[:500]
        if left and self.is_too_old(entry):
            self.bounce(entry, list(left.items()), sender, head)
            return Attempt("failed", error)
        if left:
            return Attempt("waiting", error, stop=not any(
                outcome.host for outcome in left.values()), recipients="\n".join(left))
        return Attempt("failed" if error else "delivered", error)

    def letter(self, entry: Entry) -> Tuple[str, Source]:
        """Return the envelope sender and the content of a delivery by mail. Raises Hopeless."""
        if entry.payload is not None:
            return "", Source.of(bytes(entry.payload))
        message = self.store.find(entry.message) if entry.message else None
        if message is None:
            raise Hopeless("the message was deleted")
        raw = self.store.raw(message.id)
        begin = raw.read(0, MAX_COMMAND)        # Return-Path is for the last server (RFC 5321 4.4)
        skip = begin.find(b"\n") + 1 if begin.lower().startswith(b"return-path:") else 0
        return message.sender, Source(raw.size - skip, lambda start, end: raw.read(
            start + skip, end + skip))

    def bounce(self, entry: Entry, failed: Sequence[Tuple[str, Outcome]], sender: str, head: bytes,
               ) -> None:
        """Tell the sender who will not get a message (RFC 5321 6.1)."""
        if not failed or not is_bounceable(sender, head):
            return
        now = self.store.now()
        content = make_bounce(sender, failed, head, self.settings.hostname, now,
                              str(uuid.uuid4()), entry.created / 1000)
        domain_ = normalize_domain(sender.rpartition("@")[2]) or ""
        if self.settings.server_host and domain_ not in self.settings.server_host:
            self.outbox.send(f"mail {domain_}", "bounce", content, sender)
            return
        self.store.add([Job(Incoming(
            Envelope("", (sender,), "127.0.0.1", self.settings.hostname), b"Return-Path: <>\r\n",
            read_subject(content), content), ignore)])

    def is_too_old(self, entry: Entry) -> bool:
        """Has a delivery been tried for long enough?"""
        return self.store.now() * 1000 - entry.created > 1000 * self.settings.retry_for

    def verdict(self, answer: WebAnswer) -> Attempt:
        """Return what a status means for a delivery (RFC 9110 15)."""
        status = answer.status
        if 200 <= status < 300:
            return Attempt("delivered")
        error = f"the target answered {status}"
        if 300 <= status < 400:
            error += " to " + clean_line(answer.headers.get("location", "nowhere"), 200)
            return Attempt("waiting", error + "; a POST is not sent on: name that URL")
        if 400 <= status < 500 and status not in (408, 425, 429) and not self.settings.retry_4xx:
            return Attempt("failed", error)
        return Attempt("waiting", error, retry_after(answer.headers),
                       stop=status == 429 or status >= 500)

    def judge(self, lane: Lane, entry: Entry, attempt: Attempt) -> Entry:
        """Return a row as it is after an attempt."""
        now, attempts, state = int(self.store.now() * 1000), entry.attempts + 1, attempt.state
        if state == "waiting" and self.is_too_old(entry):
            state = "failed"
        self.attempts[state] += 1
        due = self.outbox.forget_at(state)
        if state == "waiting":
            due = (entry.due or 1) if lane.ordered else now + int(
                1000 * (attempt.after or self.backoff(attempts)))
            log.warning("%s: delivery %d to %s is to be tried again: %s", entry.key, entry.id,
                        lane.target, attempt.error)
        elif state == "failed":
            log.error("%s: delivery %d to %s has failed: %s", entry.key, entry.id, lane.target,
                      attempt.error)
        left = entry.recipients if attempt.recipients is None else attempt.recipients
        return entry._replace(state=state, due=due, attempts=attempts, error=attempt.error,
                              recipients=left)

    def backoff(self, attempts: int) -> float:
        """Return the seconds until the next attempt: twice as long each time, about."""
        longest = self.settings.retry_longest
        seconds = self.settings.retry_first * 2.0 ** min(attempts - 1, 20)
        return min(longest, seconds) * random.uniform(0.8, 1.2)


def relay_of(settings: Settings) -> Optional[Relay]:
    """Return the server that all outgoing mail goes through, None for each domain's own."""
    if not settings.relay:
        return None
    host, port_ = settings.relay
    usual = 465 if settings.relay_tls == "tls" else 587 if settings.relay_user else 25
    return Relay(host, port_ or usual, settings.relay_tls, settings.relay_user or "",
                 settings.relay_password or "")


def retry_after(headers: Dict[str, str]) -> float:
    """Return the seconds that Retry-After asks for, at most a day (RFC 9110 10.2.3)."""
    text = headers.get("retry-after", "")
    if re.fullmatch("[0-9]{1,9}", text):
        return min(86400.0, float(text))
    try:
        moment = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return max(0.0, min(86400.0, moment - time.time()))


def check_outgoing(settings: Settings) -> None:
    """Try all templates, the secret and the certificates to trust. Raises SettingsError."""
    web_context(settings)
    try:
        sign(settings.forward_secret or "", "", 0, b"")
    except ValueError:
        raise SettingsError("--forward_secret: needs base64 behind whsec_", 2) from None
    for text, option in [(settings.template or "", "--template")] + [
            (value, "--header") for _, value in settings.header] + [
            (url, option) for _, url, option in web_targets(settings)]:
        read_template(text, option)


def web_context(settings: Settings) -> ssl.SSLContext:
    """Return what outgoing TLS is verified with. Raises SettingsError."""
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--ca_file {settings.ca_file}: {reason(error)}; needs certificates "
                            "in PEM form") from None


# =====================================================================================
# 9. HTTP: the JSON API
#
# A session on the reactor collects each request; a thread of the pool answers it with
# http.server's handler; the session sends the answer as the client takes it. So neither a slow
# client nor one that waits for mail holds a thread. Routes are declared on the functions that
# serve them. RFC 9110 (HTTP), 9112 (HTTP/1.1).
# =====================================================================================

MAX_HEAD = 32 << 10           # bytes of a request's line and header
MAX_BODY = 1 << 20            # bytes of a request's body
MAX_WAIT = 60                 # seconds that a request may wait for mail
MAX_COUNT = 1000              # messages of one list
MAX_PAGE = 8 << 20            # bytes of messages on it from which on they are sent one by one
WAKE_SECONDS = 0.02           # at most this often are waiting requests looked at again
GZIP_SIZE = 1000              # a smaller answer is not worth it


class Problem(Exception):
    """An answer that is an error: a status, a text, and further header fields."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Nothing(Exception):
    """Nothing matches so far; a request with `wait` is asked again after the next change."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer            # what to answer when the time is over


class Answer(NamedTuple):
    """What a route returns when it is not plain data: bytes, or pieces of a known size or not."""
    body: Union[bytes, Iterator[bytes]]
    mime: str
    headers: Dict[str, str] = {}
    size: Optional[int] = None         # of the pieces; None sends them chunked
    status: int = 200


# -- Parameters and routes --

class Param(NamedTuple):
    """A parameter of the API: its reader, what stands for a missing one, and its description."""
    read: Callable[[str], Any]
    default: Any
    schema: Dict[str, Any]
    help: str


def whole(low: int, high: int, default: Optional[int], help: str) -> Param:
    """Describe a whole number."""
    schema: Dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high}
    if default is not None:
        schema["default"] = default
    return Param(number(low, high), default, schema, help)


def choice(words: Sequence[str], help: str) -> Param:
    """Describe one of some words; the first is the default."""
    def read(text: str) -> str:
        if text not in words:
            raise ValueError("needs one of: " + ", ".join(filter(None, words)))
        return text
    return Param(read, words[0], {"type": "string", "enum": list(words), "default": words[0]}, help)


def substring(help: str) -> Param:
    """Describe a text to look for."""
    def read(text: str) -> str:
        if len(text) > 500 or re.search("[\0\ud800-\udfff]", text):
            raise ValueError("needs at most 500 characters, no NUL and no lone surrogate")
        return text
    return Param(read, "", {"type": "string", "maxLength": 500}, help)


def media_hash(text: str) -> str:
    """Read the hash of an attachment."""
    if not re.fullmatch(r"[0-9a-f]{16,64}", text):
        raise ValueError("needs the hash that /mail names, 16 to 64 hexadecimal digits")
    return text


def read_state(text: str) -> Optional[int]:
    """Read 0, 1 or nothing."""
    return number(0, 1)(text) if text else None


def mailbox_address(text: str) -> str:
    """Read the address of a mailbox."""
    if not parse_address(text.strip()).domain:
        raise ValueError("needs an address such as ann@example.com")
    return mailbox_name(text.strip())


def webhook_url(text: str) -> str:
    """Read the URL of a webhook; one without a scheme is http, as dynip-email has it."""
    text = text.strip() if "://" in text else "http://" + text.strip()
    try:
        split_url(text)
    except Forbidden:
        text = ""
    if not 0 < len(text) <= 2000 or re.search(r"[\x00-\x20\x7f]", text):
        raise ValueError("needs a URL such as https://app.example.com/hook")
    return text


EVENTS = ("arrival", "deletion", "read")


def event_words(text: str) -> str:
    """Read the events that a webhook is for."""
    words = dict.fromkeys(re.split(r"[\s,]+", text.strip().lower()))
    if not words.keys() <= set(EVENTS):
        raise ValueError("needs some of: " + ", ".join(EVENTS))
    return " ".join(words)


BIG = (1 << 53) - 1           # whole numbers that every JSON reader can hold
PARAMS = {
    "mail_id": whole(1, BIG, None, "Number of the message."),
    "hash": Param(media_hash, None, {"type": "string", "pattern": "^[0-9a-f]{16,64}$"},
                  "Hash of the attachment."),
    "is_read": whole(0, 1, None, "The read state to set."),
    "count": whole(0, MAX_COUNT, 50, "Messages to list at most."),
    "offset": whole(0, BIG, 0, "Messages to pass over."),
    "reverse": whole(0, 1, 0, "1 lists the newest first."),
    "after": whole(0, BIG, 0, "Only messages with a greater mail_id."),
    "since": whole(0, BIG, 0, "Only messages received at this time or later, in milliseconds."),
    "wait": whole(0, MAX_WAIT, 0, "Seconds to wait until something matches."),
    "filter_mail_from": substring("Part of the sender, in any case."),
    "filter_mail_to": substring("Part of a recipient, in any case."),
    "filter_mail_subject": substring("Part of the subject, in any case."),
    "filter_is_read": Param(read_state, None, {"type": "string", "enum": ["", "0", "1"]},
                            "0 for unread, 1 for read."),
    "format": choice(("json", "text", "mbox"), "Form of the answer."),
    "mail_format": choice(("json", "text", "eml"), "Form of the answer."),
    "outbox_id": whole(1, BIG, None, "Number of the delivery."),
    "state": choice(("",) + STATES, "Only deliveries in this state."),
    "target": substring("Only deliveries to this target."),
    "webhook_id": substring("The webhook."),
    "address": substring("The mailbox."),
    "mailbox_address": Param(mailbox_address, None, {"type": "string"}, "The mailbox."),
    "webhook_url": Param(webhook_url, None, {"type": "string", "format": "uri"},
                         "Where events are sent."),
    "events": Param(event_words, None, {"type": "string"},
                    "Some of arrival, deletion and read, with blanks between."),
    "enabled": whole(0, 1, None, "1 turns the webhook on, 0 off."),
}
SPELLED = {"mail_format": "format"}
START = ("after", "since", "wait")
FILTERS = ("filter_mail_to", "filter_mail_from", "filter_mail_subject", "filter_is_read") + START
PAGES = ("count", "offset", "reverse", "format")


class Route(NamedTuple):
    """A path and method, the function that serves them, and its parameters."""
    method: str
    path: str
    func: Callable[..., Any]
    params: Tuple[str, ...]
    required: Tuple[str, ...]
    answer: str                         # its name in SCHEMAS, or the media type of plain bytes
    open: bool                          # no token is asked for
    changes: bool                       # not for a HEAD, nor for a page from elsewhere


ROUTES: Dict[Tuple[str, str], Route] = {}
PATTERNS: List[Tuple[Any, str]] = []    # of the paths that have {names} in them


def route(methods: str, *paths: str, answer: str, params: Sequence[str] = (),
          required: Sequence[str] = (), open: bool = False) -> Any:
    """Enter a function as the server of paths under one or more methods."""
    def enter(func: Callable[..., Any]) -> Callable[..., Any]:
        for path in paths:
            if "{" in path:
                PATTERNS.append((re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path)), path))
            for method in methods.split():
                ROUTES[method, path] = Route(method, path, func, tuple(required) + tuple(params),
                                             tuple(required), answer, open, methods != "GET")
        return func
    return enter


def match_path(path: str) -> Tuple[str, List[Tuple[str, str]]]:
    """Return the path as ROUTES knows it, and the parameters that stand in it."""
    for pattern, known in PATTERNS:
        match = pattern.fullmatch(path)
        if match:
            return known, [(name, urllib.parse.unquote(text))
                           for name, text in match.groupdict().items()]
    return path, []


class Request(NamedTuple):
    """What a route is given. `params` has a value for each parameter of the route."""
    app: "HTTPApp"
    store: Store
    params: Dict[str, Any]
    headers: Any
    head: bool                          # only the header of the answer is wanted

    def filter(self) -> Filter:
        """Return the filter that the parameters describe."""
        get = self.params.get
        return Filter(get("filter_mail_from", ""), get("filter_mail_to", ""),
                      get("filter_mail_subject", ""), get("filter_is_read"),
                      get("after", 0), get("since", 0))


# -- What a message looks like in JSON --

def short_item(message: Message) -> Dict[str, Any]:
    """Return a message as lists show it."""
    return {"timestamp": message.received, "mail_id": message.id, "mail_from": message.sender,
            "mail_to": message.recipients.split("\n"), "mail_subject": message.subject,
            "is_read": message.is_read, "size": message.size,
            "attachment_count": message.attachments}


def digested(store: Store, messages: Sequence[Message]) -> List[Message]:
    """Return messages as they are once they are digested; those that went away are left out."""
    late = [message.id for message in messages if not message.digested]
    if not late:
        return list(messages)
    with contextlib.suppress(StoreError):       # a full disk: they are listed all the same
        store.digest(late)
    found = (message if message.digested else store.find(message.id) for message in messages)
    return [message for message in found if message is not None]


def full_items(store: Store, messages: Sequence[Message]) -> List[str]:
    """Return messages with headers and body as JSON texts; the body is stored as one already."""
    digests = store.digest([message.id for message in messages])
    items = []
    for message in messages:
        if message.id not in digests:           # deleted just now
            continue
        fields, body, error = digests[message.id]
        head = short_item(message)
        head["mail_headers"] = first_values(json.loads(fields))
        if error:
            head["parse_error"] = error
        items.append(f'{json_text(head)[:-1]},"mail_headers_all":{fields},"mail_body":{body}}}')
    return items


def text_line(message: Message) -> str:
    """Return a message as one line of tab-separated values; no value holds a tab.

    None is empty: `IFS=tab read` of a shell takes two tabs for one.
    """
    values = (message.id, message.received, message.is_read, message.size, message.attachments,
              message.sender or "<>", message.recipients.replace("\n", ","), message.subject or "-")
    return "\t".join(clean_line(str(value)) for value in values) + "\n"


def mbox_pieces(store: Store, messages: Iterable[Message]) -> Iterator[bytes]:
    """Yield messages as an mbox: LF line ends, `From ` lines quoted so that it can be undone."""
    for message in messages:
        try:
            source = store.raw(message.id)
            sender = re.sub(r"[^!-~]", "_", message.sender) or "MAILER-DAEMON"
            date = time.asctime(time.gmtime(message.received // 1000))
            rest = b"\n"                        # what may turn out to begin a `From ` line
            yield f"From {sender} {date}".encode("ascii")
            for window in source.windows(0, source.size):
                window = (rest + window).replace(b"\r\n", b"\n")
                cut = window.rfind(b"\n")
                cut = cut if cut > 0 else max(0, len(window) - 1)
                rest = window[cut:]
                yield re.sub(rb"(?<=\n)(>*From )", rb">\1", window[:cut])
            yield re.sub(rb"(?<=\n)(>*From )", rb">\1", rest).rstrip(b"\r\n") + b"\n\n"
        except KeyError:
            continue                            # deleted meanwhile


# -- The routes --

@route("GET", "/count", answer="Count")
def get_count(request: Request) -> Any:
    """Return the number of all messages."""
    return {"count": request.store.count(Filter())}


@route("GET", "/filter_count", "/search_count", answer="Count", params=FILTERS)
def get_filter_count(request: Request) -> Any:
    """Return the number of messages that match."""
    return found_or_nothing({"count": request.store.count(request.filter())})


def found_or_nothing(answer: Dict[str, Any]) -> Any:
    """Return an answer, or raise Nothing if its count or its list is empty."""
    if answer["count"] and answer.get("items", True):
        return answer
    raise Nothing(answer)


def list_messages(request: Request, items: Callable[[Sequence[Message]], str]) -> Any:
    """Return the page of messages that the parameters describe, in the form they ask for."""
    params, wanted = request.params, request.filter()
    page = request.store.page(wanted, params["count"], params["offset"], bool(params["reverse"]))
    messages = digested(request.store, page)

    def count() -> int:                 # a page that is not full has all that there is
        full = params["offset"] or len(page) == params["count"]
        return request.store.count(wanted) if full else len(page)
    if params["format"] == "text":
        answer = Answer("".join(map(text_line, messages)).encode("utf-8", "replace"),
                        "text/plain; charset=utf-8")
    elif params["format"] == "mbox":
        tag = make_tag(str([message.id for message in messages]).encode())
        answer = Answer(mbox_pieces(request.store, messages), "application/mbox", {"ETag": tag})
    elif sum(message.size for message in messages) < MAX_PAGE:
        text = '{"items":[%s],"count":%d}' % (items(messages), count())
        answer = Answer(text.encode("utf-8", "replace"), "application/json")
    else:
        total = count()
        tag = make_tag(str([(message.id, message.is_read) for message in messages] + [total])
                       .encode())
        answer = Answer(json_pieces(messages, items, total), "application/json", {"ETag": tag})
    if messages or not params["count"]:
        return answer
    raise Nothing(answer)


def json_pieces(messages: Sequence[Message], items: Callable[[Sequence[Message]], str], count: int,
                ) -> Iterator[bytes]:
    """Yield a list of messages as JSON, one message a piece."""
    head = '{"items":['
    for message in messages:
        item = items([message])
        if item:                            # else it was deleted meanwhile
            yield (head + item).encode("utf-8", "replace")
            head = ","
    tail = '],"count":%d}' % count
    yield (tail if head == "," else head + tail).encode("ascii")


@route("GET", "/list", answer="List", params=START + PAGES)
@route("GET", "/filter_list", "/search_list", answer="List", params=FILTERS + PAGES)
def get_list(request: Request) -> Any:
    """List messages with headers and body."""
    return list_messages(request, lambda messages: ",".join(full_items(request.store, messages)))


@route("GET", "/list_short", answer="ShortList", params=START + PAGES)
@route("GET", "/filter_list_short", "/search_list_short", answer="ShortList",
       params=FILTERS + PAGES)
def get_list_short(request: Request) -> Any:
    """List messages without headers and body."""
    return list_messages(request, lambda messages: json_text(
        [short_item(message) for message in messages])[1:-1])


def find_mail(request: Request) -> Message:
    """Return the message that mail_id names."""
    message = request.store.find(request.params["mail_id"])
    if message is None:
        raise no_such_mail()
    return message


def no_such_mail() -> Problem:
    """Return the answer for a message that is not there."""
    return Problem(404, "mail_id: there is no such message")


@route("GET", "/mail", answer="Mail", required=("mail_id",), params=("mail_format",))
def get_mail(request: Request) -> Any:
    """Return a message with headers and body."""
    return show_mail(request, find_mail(request))


@route("GET", "/latest", answer="Mail", params=FILTERS + ("mail_format",))
def get_latest(request: Request) -> Any:
    """Return the newest message that matches, as /mail does; 404 if none does."""
    return show_mail(request, find_latest(request))


def find_latest(request: Request) -> Message:
    """Return the newest message that matches."""
    messages = request.store.page(request.filter(), 1, reverse=True)
    if not messages:
        raise Nothing(Problem(404, "no message matches"))
    return messages[0]


def show_mail(request: Request, message: Message) -> Any:
    """Return a message in the form that is asked for."""
    if request.params["mail_format"] == "eml":
        return show_raw(request, message)
    messages = digested(request.store, [message])
    if request.params["mail_format"] == "text":
        return Answer("".join(map(text_line, messages)).encode("utf-8", "replace"),
                      "text/plain; charset=utf-8")
    items = full_items(request.store, messages)
    if not items:
        raise no_such_mail()
    return Answer(items[0].encode("utf-8", "replace"), "application/json")


@route("GET", "/raw", answer="message/rfc822", required=("mail_id",))
def get_raw(request: Request) -> Any:
    """Return a message as it was received, under the fields added on top."""
    return show_raw(request, find_mail(request))


def show_raw(request: Request, message: Message) -> Answer:
    """Return the bytes of a message."""
    try:
        source = request.store.raw(message.id)
    except KeyError:
        raise no_such_mail() from None
    headers = {"Content-Disposition": content_disposition("attachment", f"{message.id}.eml"),
               "ETag": f'"{message.id}-{message.size}"'}
    return Answer(source.windows(0, source.size), "message/rfc822", headers, source.size)


@route("GET", "/code", answer="Codes", params=("mail_id",) + FILTERS)
def get_code(request: Request) -> Any:
    """Return the one-time codes and the links in a message: mail_id, or the newest that matches."""
    message = find_mail(request) if request.params["mail_id"] else find_latest(request)
    digest = request.store.digest([message.id]).get(message.id)
    if digest is None:
        raise no_such_mail()
    texts, links = [message.subject], []
    pending = [json.loads(digest[1])]
    while pending:
        item = pending.pop() or {}
        pending.extend(reversed(item.get("items", [])))
        if item.get("mime") == "text/html":
            words, targets = html_text(item["text"])
            texts.append(words)
            links += targets
        elif item.get("type") == "text":
            texts.append(item["text"])
    text = "\n".join(texts)
    return {"mail_id": message.id, "codes": find_codes(text),
            "links": find_links("\n".join([text] + links))}


INLINE = {"image/png", "image/jpeg", "image/gif", "image/webp", "text/plain", "application/pdf"}


@route("GET", "/media", answer="*/*", required=("hash",))
def get_media(request: Request) -> Any:
    """Return an attachment, or the range of it that is asked for."""
    name = request.params["hash"]
    found = request.store.attachment(name)
    if found is None and request.store.digest_tail():
        found = request.store.attachment(name)
    if found is None:
        raise Problem(404, "hash: there is no such attachment")
    filename, mime, size_ = found
    headers = {"ETag": f'"{name}"', "Accept-Ranges": "bytes",
               "Content-Security-Policy": "sandbox; default-src 'none'",
               "Content-Disposition": content_disposition(
                   "inline" if mime in INLINE else "attachment", filename)}
    try:
        source = request.store.media.source(name)
    except FileNotFoundError:
        raise Problem(404, "hash: there is no such attachment") from None
    wanted = request.headers.get("Range", "") if not request.head else ""     # RFC 9110 14.2
    if request.headers.get("If-Range", f'"{name}"') != f'"{name}"':
        wanted = ""
    start, end = read_range(wanted, size_)
    if (start, end) == (0, size_):
        return Answer(source.windows(0, size_), mime, headers, size_)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size_}"
    return Answer(source.windows(start, end), mime, headers, end - start, 206)


def read_range(text: str, size_: int) -> Tuple[int, int]:
    """Return the start and end that a Range names; all of it if there is no plain one.

    RFC 9110 14.2: what is not understood is ignored; what lies outside is 416.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text.strip())
    if not match or match.group(0) == "bytes=-":
        return 0, size_
    first, last = match.groups()
    start = int(first) if first else max(0, size_ - int(last))
    end = min(size_, int(last) + 1) if first and last else size_
    if start >= end and not (first and last and int(first) > int(last)):
        raise Problem(416, "the range lies outside", Content_Range=f"bytes */{size_}")
    return (start, end) if start < end else (0, size_)


@route("GET POST", "/set_read", answer="ReadState", required=("mail_id", "is_read"))
def set_read(request: Request) -> Any:
    """Set the read state of a message."""
    if not request.store.set_read(request.params["mail_id"], request.params["is_read"]):
        raise no_such_mail()
    return {"is_read": request.params["is_read"]}


@route("POST DELETE", "/delete", answer="Deleted", required=("mail_id",))
def delete(request: Request) -> Any:
    """Delete a message, with the attachments that no other has."""
    if not request.store.delete(request.params["mail_id"]):
        raise no_such_mail()
    return {"deleted": request.params["mail_id"]}


@route("GET", "/auth", answer="text/plain", open=True)
def get_auth(request: Request) -> Any:
    """Answer nginx's question where a client's mail shall go (ngx_mail_auth_http_module)."""
    headers = request.headers
    text = decode_text(headers.get("Auth-SMTP-To", "").strip().encode("latin-1", "replace"))
    text = re.sub(r"(?i)^(?:RCPT\s+)?TO:\s*", "", text)
    match = PATH.fullmatch(text) or PLAIN_PATH.fullmatch(text)
    text = match.group(1) if match else ""
    try:
        refusal = request.app.intake.refuse_recipient(parse_address(text))
    except ValueError as error:
        refusal = 553, "5.1.3", f"Address is not valid: {error}"
    if headers.get("Auth-Protocol", "smtp").lower() != "smtp":
        refusal = 503, "5.5.1", "Only SMTP is served"
    if headers.get("Auth-Method", "none").lower() != "none":
        refusal = 535, "5.7.8", "There are no accounts here"
    if refusal is not None:
        code, status, reply = refusal
        return Answer(b"", "text/plain", {"Auth-Status": reply, "Auth-Wait": "3",
                                          "Auth-Error-Code": f"{code} {status}"})
    host, port_ = choose_server(request.app.settings.server_addr, text)
    return Answer(b"", "text/plain", {"Auth-Status": "OK",
                                      "Auth-Server": request.app.server_addresses[host],
                                      "Auth-Port": str(port_ or request.app.smtp_port)})


@route("GET", "/healthz", answer="Health", open=True)
def get_health(request: Request) -> Any:
    """Say that the server lives and can read its store."""
    request.store.find(1)
    return {"status": "ok", "version": __version__}


@route("GET", "/metrics", answer="text/plain")
def get_metrics(request: Request) -> Any:
    """Return figures in the text format of Prometheus."""
    lines = []
    for name, kind, help, values in request.app.metrics():
        lines += [f"# HELP pegmail_{name} {help}", f"# TYPE pegmail_{name} {kind}"]
        lines += [f"pegmail_{name}{labels} {value:.10g}" for labels, value in values]
    return Answer(("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4; charset=utf-8")


# -- What leaves: the outbox and webhooks --

def outbox_item(entry: Entry) -> Dict[str, Any]:
    """Return a delivery as JSON shows it; what it is known by is the same with each attempt."""
    return {"id": entry.id, "mail_id": entry.message or 0, "target": entry.target,
            "event": entry.event, "key": entry.key, "state": entry.state,
            "created": entry.created, "due": entry.due, "attempts": entry.attempts,
            "error": entry.error, "recipients": entry.recipients.split("\n")
            if entry.target.startswith("mail ") else []}


@route("GET", "/outbox", answer="Outbox", params=("state", "target", "after", "count"))
def get_outbox(request: Request) -> Any:
    """List deliveries, oldest first, with how many there are in each state."""
    params, outbox = request.params, request.store.outbox
    return {"items": [outbox_item(entry) for entry in outbox.find(
        params["state"], params["target"], params["after"], params["count"])],
        "counts": outbox.counts()}


@route("POST", "/outbox/{outbox_id}/retry", answer="Retried", required=("outbox_id",))
def retry_delivery(request: Request) -> Any:
    """Try a delivery that waits or has failed now, as if it were new."""
    if not request.store.outbox.retry(request.params["outbox_id"]):
        raise Problem(404, "outbox_id: there is no such delivery, or it is done")
    return {"retried": 1}


@route("DELETE", "/outbox/{outbox_id}", answer="Deleted", required=("outbox_id",))
def drop_delivery(request: Request) -> Any:
    """Forget a delivery."""
    if not request.store.outbox.drop(request.params["outbox_id"]):
        raise Problem(404, "outbox_id: there is no such delivery")
    return {"deleted": 1}


def webhook_item(hook: Webhook) -> Dict[str, Any]:
    """Return a webhook as JSON shows it."""
    return {"id": hook.id, "mailbox_address": hook.mailbox, "webhook_url": hook.url,
            "events": hook.events.split(), "enabled": bool(hook.enabled),
            "created_at": rfc3339(hook.created), "failures": hook.failures,
            "last_error": hook.last_error}


def find_webhook(request: Request) -> Webhook:
    """Return the webhook that the path names."""
    hook = request.store.outbox.webhook(request.params["webhook_id"])
    if hook is None:
        raise Problem(404, "webhook_id: there is no such webhook")
    return hook


def check_target(request: Request, url: str) -> None:
    """Refuse a webhook that could never be called; names are looked at when it is."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        address = str(ipaddress.ip_address(host))
    except ValueError:
        return
    if not Door(request.app.settings.webhook_allow).may_reach(address):
        raise Problem(400, "webhook_url: leads into a private network; --webhook_allow can "
                           "allow it")


@route("POST", "/api/webhooks", answer="Webhook", required=("mailbox_address", "webhook_url"),
       params=("events",))
def create_webhook(request: Request) -> Any:
    """Have a URL called when something happens in a mailbox."""
    params = request.params
    check_target(request, params["webhook_url"])
    return webhook_item(request.store.outbox.save_webhook(Webhook(
        str(uuid.uuid4()), params["mailbox_address"], params["webhook_url"],
        params["events"] or "arrival", 1, int(request.store.now() * 1000), 0, "")))


@route("GET", "/api/webhooks/{address}", answer="Webhooks", required=("address",))
def list_webhooks(request: Request) -> Any:
    """List the webhooks of a mailbox."""
    return [webhook_item(hook) for hook in request.store.outbox.webhooks(request.params["address"])]


@route("GET", "/api/webhook/{webhook_id}", answer="Webhook", required=("webhook_id",))
def get_webhook(request: Request) -> Any:
    """Return a webhook."""
    return webhook_item(find_webhook(request))


@route("PUT", "/api/webhook/{webhook_id}", answer="Webhook", required=("webhook_id",),
       params=("webhook_url", "events", "enabled"))
def update_webhook(request: Request) -> Any:
    """Change a webhook; to turn it on forgets its failures."""
    hook, params = find_webhook(request), request.params
    if params["webhook_url"]:
        check_target(request, params["webhook_url"])
    hook = hook._replace(url=params["webhook_url"] or hook.url,
                         events=params["events"] or hook.events)
    if params["enabled"] is not None:
        hook = hook._replace(enabled=params["enabled"])
        if hook.enabled:
            hook = hook._replace(failures=0, last_error="")
    return webhook_item(request.store.outbox.save_webhook(hook))


@route("DELETE", "/api/webhook/{webhook_id}", answer="Deleted", required=("webhook_id",))
def delete_webhook(request: Request) -> Any:
    """Delete a webhook, and what waits to be sent to it."""
    if not request.store.outbox.delete_webhook(request.params["webhook_id"]):
        raise Problem(404, "webhook_id: there is no such webhook")
    return {"deleted": 1}


@route("POST", "/api/webhook/{webhook_id}/test", answer="Queued", required=("webhook_id",))
def test_webhook(request: Request) -> Any:
    """Send a test event to a webhook; /outbox tells what came of it."""
    hook = find_webhook(request)
    return {"outbox_id": request.store.outbox.send(f"webhook {hook.id}", "test", None,
                                                   hook.mailbox)}


# -- The description --

def shape(optional: Sequence[str] = (), **properties: Any) -> Dict[str, Any]:
    """Return the schema of an object; a property is a type's name or a schema."""
    described = {name: {"type": kind} if isinstance(kind, str) else kind
                 for name, kind in properties.items()}
    return {"type": "object", "properties": described,
            "required": [name for name in described if name not in optional]}


def list_of(kind: Any) -> Dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": {"type": kind} if isinstance(kind, str) else kind}


def refer(name: str) -> Dict[str, Any]:
    """Return a reference to one of SCHEMAS."""
    return {"$ref": "#/components/schemas/" + name}


SHORT_ITEM: Dict[str, Any] = {
    "timestamp": "integer", "mail_id": "integer", "mail_from": "string",
    "mail_to": list_of("string"), "mail_subject": "string", "is_read": "integer",
    "size": "integer", "attachment_count": "integer"}
HEADERS = {"type": "object", "additionalProperties": {"type": "string"}}
SCHEMAS = {
    "Error": shape(error="string"),
    "Count": shape(count="integer"),
    "Short": shape(**SHORT_ITEM),
    "Body": shape(("mime", "text", "size", "hash", "filename", "content_id", "items",
                   "mail_headers"),
                  type="string", mime="string", text="string", size="integer", hash="string",
                  filename="string", content_id="string", items=list_of(refer("Body")),
                  mail_headers=HEADERS),
    "Mail": shape(("parse_error",), **SHORT_ITEM, parse_error="string", mail_headers=HEADERS,
                  mail_headers_all=list_of(list_of("string")),
                  mail_body={"nullable": True, "allOf": [refer("Body")]}),
    "ShortList": shape(items=list_of(refer("Short")), count="integer"),
    "List": shape(items=list_of(refer("Mail")), count="integer"),
    "Codes": shape(mail_id="integer", codes=list_of("string"), links=list_of("string")),
    "ReadState": shape(is_read="integer"),
    "Deleted": shape(deleted="integer"),
    "Health": shape(status="string", version="string"),
    "Delivery": shape(id="integer", mail_id="integer", target="string", event="string",
                      key="string", state="string", created="integer", due="integer",
                      attempts="integer", error="string", recipients=list_of("string")),
    "Outbox": shape(items=list_of(refer("Delivery")),
                    counts={"type": "object", "additionalProperties": {"type": "integer"}}),
    "Retried": shape(retried="integer"),
    "Queued": shape(outbox_id="integer"),
    "Webhook": shape(id="string", mailbox_address="string", webhook_url="string",
                     events=list_of("string"), enabled="boolean", created_at="string",
                     failures="integer", last_error="string"),
    "Webhooks": list_of(refer("Webhook")),
    "Description": {"type": "object"},
}
FORM_TYPES = {"text": "text/plain", "mbox": "application/mbox", "eml": "message/rfc822"}


@route("GET", "/openapi.json", answer="Description")
def get_openapi(request: Request) -> Any:
    """Return the description of this API (OpenAPI 3.0)."""
    paths: Dict[str, Any] = {}
    for (method, path), entry in ROUTES.items():
        paths.setdefault(path, {})[method.lower()] = describe_route(entry)
    return {"openapi": "3.0.3", "paths": paths,
            "info": {"title": "pegmail", "version": __version__},
            "components": {"schemas": SCHEMAS, "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"}}},
            "security": [{"token": []}, {"basic": []}, {}]}


def describe_route(entry: Route) -> Dict[str, Any]:
    """Return the description of a route."""
    params = [{"name": SPELLED.get(name, name), "schema": PARAMS[name].schema,
               "in": "path" if "{%s}" % name in entry.path else "query",
               "required": name in entry.required, "description": PARAMS[name].help}
              for name in entry.params]
    if entry.answer in SCHEMAS:
        content: Dict[str, Any] = {"application/json": {"schema": refer(entry.answer)}}
    else:
        content = {entry.answer: {"schema": {"type": "string", "format": "binary"}}}
    for name in {"format", "mail_format"}.intersection(entry.params):
        content.update({FORM_TYPES[form]: {"schema": {"type": "string"}}
                        for form in PARAMS[name].schema["enum"] if form in FORM_TYPES})
    problem = {"description": "An error.",
               "content": {"application/json": {"schema": refer("Error")}}}
    return {"operationId": entry.method.lower() + re.sub(r"[/.{}]+", "_", entry.path),
            "summary": (entry.func.__doc__ or "").split("\n")[0], "parameters": params,
            "responses": {"200": {"description": "The answer.", "content": content},
                          "default": problem}}


# -- Answering: http.server's handler over one request in memory --

class Result(NamedTuple):
    """What the handler made of a request: bytes, further pieces, and how to go on."""
    head: bytes
    pieces: Optional[Iterator[bytes]] = None
    chunked: bool = False
    close: bool = False
    wait: Optional[Tuple[float, int]] = None     # seconds, and the store's version that was seen


class APIHandler(http.server.BaseHTTPRequestHandler):
    """Answers one request that is in memory already; made by HTTPApp.answer."""

    protocol_version = "HTTP/1.1"
    server_version = "pegmail"
    sys_version = ""

    def __init__(self, app: "HTTPApp", data: bytes, peer: str, patient: bool) -> None:
        self.app = app
        self.rfile = io.BytesIO(data)
        self.wfile: Any = io.BytesIO()
        self.client_address = (peer, 0)
        self.patient = patient          # a request that waits may be asked again later
        self.result = Result(b"", close=True)
        self.pieces: Optional[Iterator[bytes]] = None
        self.chunked = False
        self.wait: Optional[Tuple[float, int]] = None
        self.headers: Any = {}
        self.command = ""

    def run(self) -> Result:
        """Answer; return the result."""
        self.handle_one_request()
        return Result(self.wfile.getvalue(), self.pieces, self.chunked, self.close_connection,
                      self.wait)

    def do_GET(self) -> None:
        """Answer whatever the method; named by http.server."""
        seen = self.app.store.version
        try:
            try:
                answer = self.find_answer()
            except Nothing as nothing:
                seconds = self.params.get("wait", 0)
                if seconds and self.patient:
                    self.wait = seconds, seen
                    return
                if isinstance(nothing.answer, Problem):
                    raise nothing.answer from None
                answer = nothing.answer
            self.send_answer(answer)
        except Problem as problem:
            self.send_problem(problem)
        except StoreError as error:
            log.error("api: %s %s: %s", self.command, clean_line(self.path, 200), error)
            self.send_problem(Problem(503, "the store cannot be used now, try again later",
                                      Retry_After="5"))
        except Exception:               # a border: a bug is logged and answered
            log.exception("api: bug in %s %s", self.command, clean_line(self.path, 200))
            self.send_problem(Problem(500, "internal error, see the log"))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    def find_answer(self) -> Any:
        """Check who asks and for what; return what the route returns."""
        if not re.fullmatch(r"HTTP/[0-9]\.[0-9]", self.request_version):
            raise Problem(400, "the version of HTTP cannot be read")
        hosts = self.headers.get_all("Host") or []
        if len(hosts) > 1 or (not hosts and self.request_version >= "HTTP/1.1"):
            raise Problem(400, "one Host is needed")                # RFC 9112 3.2
        target = re.fullmatch(r"(?i)https?://([^/?#]+)(.*)", self.path)         # RFC 9112 3.2.2
        if target:
            self.headers.replace_header("Host", target.group(1)) if hosts else None
            self.path = target.group(2)
        path, _, query = self.path.partition("?")
        method = "GET" if self.command == "HEAD" else self.command
        path, named = match_path(path)
        entry = ROUTES.get((method, path))
        if entry and entry.changes and self.command == "HEAD":
            entry = None
        self.params: Dict[str, Any] = {}
        self.app.check_access(self.client_address[0], self.headers, entry)
        if entry is None:
            allowed = [known for known, place in ROUTES if place == path]
            if not allowed:
                raise Problem(404, "no such path; /openapi.json lists them")
            allowed += ["HEAD"] if "GET" in allowed and not ROUTES["GET", path].changes else []
            raise Problem(405, "method not allowed, use " + " or ".join(allowed),
                          Allow=", ".join(allowed))
        if entry.changes:
            self.app.check_origin(self.headers)
        self.params = read_params(entry, query, self.body_params() + named)
        return entry.func(Request(self.app, self.app.store, self.params, self.headers,
                                  self.command == "HEAD"))

    def body_params(self) -> List[Tuple[str, str]]:
        """Return the parameters in the body: a form, or a JSON object."""
        body = self.rfile.read()
        if not body:
            return []
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        try:
            if kind == "application/x-www-form-urlencoded":
                return read_query(body.decode("utf-8"))
            if kind == "application/json":
                values = json.loads(body)
                return [(name, plain_text(value)) for name, value in values.items()]
        except (ValueError, AttributeError, RecursionError, TypeError):
            raise Problem(400, "the body cannot be read") from None
        raise Problem(415, "a body needs Content-Type application/json or "
                           "application/x-www-form-urlencoded")

    def send_answer(self, answer: Any) -> None:
        """Send what a route returned."""
        if not isinstance(answer, Answer):
            answer = Answer(json_text(answer).encode("utf-8", "replace"), "application/json")
        if answer.mime == "application/json" and isinstance(answer.body, bytes):
            answer = answer._replace(body=answer.body + b"\n")
        body, status = answer.body, answer.status
        headers = {"Content-Type": answer.mime, **answer.headers}
        if isinstance(body, bytes):
            headers["Vary"] = "Accept-Encoding"
            if self.command in ("GET", "HEAD"):
                headers.setdefault("ETag", make_tag(body))
        if is_known(headers.get("ETag", ""), self.headers.get("If-None-Match", "")):
            status, body = 304, b""
        elif (isinstance(body, bytes) and len(body) > GZIP_SIZE
                and accepts_gzip(self.headers.get("Accept-Encoding", ""))):
            body = gzip.compress(body, 5, mtime=0)
            headers["Content-Encoding"] = "gzip"
        self.send_parts(status, headers, body, answer.size)

    def send_problem(self, problem: Problem) -> None:
        """Send an error."""
        body = json_text({"error": str(problem)}).encode("utf-8", "replace") + b"\n"
        self.send_parts(problem.status, {"Content-Type": "application/json", **problem.headers},
                        body, None)

    def send_parts(self, status: int, headers: Dict[str, str],
                   body: Union[bytes, Iterator[bytes]], size_: Optional[int]) -> None:
        """Send status and header, and the body unless it was not asked for."""
        self.app.count_answer(status)
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, header_value(value))
        for name, value in COMMON_HEADERS:
            self.send_header(name, value)
        self.send_header("Date", self.date_time_string())
        if self.close_connection or self.request_version < "HTTP/1.1":
            self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        if isinstance(body, bytes):
            size_ = len(body)
        if size_ is not None and status != 304:
            self.send_header("Content-Length", str(size_))
        elif size_ is None and self.request_version >= "HTTP/1.1":
            self.chunked = True
            self.send_header("Transfer-Encoding", "chunked")
        elif size_ is None:
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD" and status != 304:
            if isinstance(body, bytes):
                self.wfile.write(body)
            else:
                self.pieces = body

    def send_error(self, code: int, message: Optional[str] = None,
                   explain: Optional[str] = None) -> None:
        """Send an error that http.server found, as JSON."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"
        self.send_problem(Problem(code, clean_line(message or "bad request")))

    def handle_expect_100(self) -> bool:
        """Go on: the session has asked for the body already."""
        return True

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: each answer is counted, each failure logged where it happens."""


def plain_text(value: Any) -> str:
    """Return a value of JSON as the text that a form would hold."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if value is None or isinstance(value, (dict, list)):
        return ""
    return str(int(value) if value in (True, False) else value)


COMMON_HEADERS = (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-cache"),
                  ("Referrer-Policy", "no-referrer"), ("Server", "pegmail"))


def header_value(text: str) -> str:
    """Return a text as the value of a header field; the one door for such values."""
    return re.sub(r"[^ -~]", "_", text)


def make_tag(data: bytes) -> str:
    """Return an entity tag for data (RFC 9110 8.8.3); weak, as it may leave in gzip or not."""
    return 'W/"%s"' % hashlib.blake2b(data, digest_size=12).hexdigest()


def is_known(tag: str, header: str) -> bool:
    """Does an If-None-Match name this tag (RFC 9110 13.1.2)?"""
    if not tag or not header:
        return False
    bare = tag[2:] if tag.startswith("W/") else tag
    return header.strip() == "*" or bare in re.findall(r'"[^"]*"', header)


def accepts_gzip(header: str) -> bool:
    """Does an Accept-Encoding let gzip through (RFC 9110 12.5.3)?"""
    weights = {}
    for item in header.lower().split(",")[:50]:
        name, _, weight = item.partition(";")
        weights[name.strip()] = weight.replace(" ", "").partition("q=")[2] or "1"
    weight = weights.get("gzip", weights.get("x-gzip", weights.get("*", "0")))
    return weight.strip("0.") != ""


def read_query(query: str) -> List[Tuple[str, str]]:
    """Return the names and values of a query."""
    try:
        text = query.encode("latin-1").decode("utf-8")      # http.server reads bytes as Latin-1
    except UnicodeEncodeError:
        text = query                                        # from a body, read as UTF-8
    except UnicodeDecodeError:
        raise Problem(400, "the query is not UTF-8") from None
    try:
        return urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=50,
                                      errors="strict")
    except ValueError:
        raise Problem(400, "the query cannot be read as UTF-8 names and values") from None


def read_params(entry: Route, query: str, body: List[Tuple[str, str]]) -> Dict[str, Any]:
    """Return a value for each parameter of a route. Raises Problem naming the one that is wrong."""
    given = dict(read_query(query) + body if query else body)
    values = {}
    for name in entry.params:
        param, spelled = PARAMS[name], SPELLED.get(name, name)
        text = given.pop(spelled, None)
        if text is None or (text == "" and name not in entry.required):
            if name in entry.required:
                raise Problem(400, f"{spelled}: is missing")
            values[name] = param.default
            continue
        try:
            values[name] = param.read(text)
        except ValueError as error:
            raise Problem(400, f"{spelled}: {error}") from None
    for name in given:
        known = [SPELLED.get(known, known) for known in entry.params]
        raise Problem(400, f"{clean_line(name, 50)}: no such parameter here" + suggest(name, known))
    return values


class HTTPApp:
    """What answers requests: access, routes, figures, and the requests that wait.

    Made by Server. answer() runs in the pool, the waiting part on the loop's thread.
    """

    def __init__(self, settings: Settings, store: Store, intake: Intake, loop: Loop) -> None:
        self.settings = settings
        self.store = store
        self.intake = intake
        self.loop = loop
        self.smtp_port = settings.smtp_port
        self.server_addresses: Dict[str, str] = {}      # of the hosts in --server_addr
        self.couriers: Any = None
        self.answers: Dict[int, int] = collections.Counter()
        self.lock = threading.Lock()
        self.waiting: Dict[int, Done] = {}       # one for each waiting connection
        self.numbers = itertools.count()
        self.woken = 0.0
        self.waking = False
        self.limits: Dict[str, Limits] = {}
        self.names = {"localhost", settings.hostname.lower(), settings.bind.lower(),
                      *settings.server_host, *(name.lower() for name in settings.api_host)}
        store.listeners.append(lambda: loop.call_soon(self.wake))

    def answer(self, data: bytes, peer: str, patient: bool) -> Result:
        """Answer a request: its bytes, who sent it, and whether it may still wait."""
        return APIHandler(self, data, peer, patient).run()

    def count_answer(self, status: int) -> None:
        """Count an answer."""
        with self.lock:
            self.answers[status] += 1

    # -- Who may ask --

    def check_access(self, peer: str, headers: Any, entry: Optional[Route]) -> None:
        """Refuse clients, Host names and tokens that are not allowed."""
        token, networks = self.settings.api_token, self.settings.api_remote_address
        if entry and entry.open and self.intake.is_trusted_proxy(peer):
            return
        if networks and not is_in_networks(peer, networks):
            raise Problem(403, f"{peer} may not use this API (--api_remote_address)")
        if not networks and not token and not is_loopback(peer):
            raise Problem(403, "the API answers only this host; --api_token or "
                               "--api_remote_address opens it")
        if token and has_token(headers.get("Authorization", ""), token):
            return
        self.check_host(headers.get("Host", ""))
        if token and not (entry and entry.open and (networks or is_loopback(peer))):
            raise Problem(401, "a token is needed: Authorization: Bearer TOKEN",
                          WWW_Authenticate='Basic realm="pegmail"')

    def check_host(self, host: str) -> None:
        """Refuse a Host that is not ours: a page elsewhere may have its name point here."""
        if not host:
            return                      # HTTP/1.0, which no browser speaks
        try:
            name = host_port(host)[0].lower()
            ipaddress.ip_address(name)
        except ValueError:
            name = clean_line(host, 100).rpartition(":")[0].lower() or host.lower()
            name = name if ":" in host else host.lower()
            if name not in self.names:
                raise Problem(403, f"the Host {ascii(name)} is not known; --api_host adds it"
                              ) from None

    def check_origin(self, headers: Any) -> None:
        """Refuse a change that a page from elsewhere asks a browser for."""
        origin = headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != headers.get("Host"):
            raise Problem(403, "changes are not taken from pages of another origin")
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Problem(403, "changes are not taken from pages of another site")
        came_from = re.sub("^https?://", "", headers.get("Referer", "")).partition("/")[0]
        if came_from not in ("", headers.get("Host")):
            raise Problem(403, "changes are not taken from pages of another site")

    # -- Requests that wait --

    def wait_for_change(self, seconds: float, seen: int, done: Done) -> None:
        """Call done(expired, None) after the next change, or when the time is over."""
        if self.store.version != seen:
            self.loop.call_soon(done, False, None)
            return
        key = next(self.numbers)

        def expire() -> None:
            if self.waiting.pop(key, None):
                done(True, None)
        timer = self.loop.call_later(seconds, expire)

        def go_on(result: Any, error: Optional[BaseException]) -> None:
            self.loop.cancel(timer)
            done(result, error)
        self.waiting[key] = go_on

    def wake(self) -> None:
        """Have all who wait look again, now or in a moment."""
        if self.waking or not self.waiting:
            return
        pause = self.woken + WAKE_SECONDS - time.monotonic()
        if pause > 0:
            self.waking = True
            self.loop.call_later(pause, self.wake_now)
        else:
            self.wake_now()

    def wake_now(self) -> None:
        """Have all who wait look again."""
        self.waking = False
        self.woken = time.monotonic()
        waiting, self.waiting = self.waiting, {}
        for done in waiting.values():
            done(False, None)

    # -- Figures --

    def metrics(self) -> List[Tuple[str, str, str, List[Tuple[str, float]]]]:
        """Return (name, type, help, [(labels, value)]) of each figure."""
        store, intake, figures = self.store, self.intake, self.store.figures
        attempts = self.couriers.attempts if self.couriers else {}

        def labelled(label: str, values: Dict[Any, int]) -> List[Tuple[str, float]]:
            return [(f'{{{label}="{key}"}}', value) for key, value in list(values.items())]
        limits = self.limits.items()
        return [
            ("received_total", "counter", "Messages received.", [("", intake.messages)]),
            ("received_bytes_total", "counter", "Bytes of messages received.",
             [("", intake.bytes)]),
            ("refused_total", "counter", "Refusals by reply.", labelled("reply", intake.refused)),
            ("connections", "gauge", "Open connections.",
             [(f'{{port="{name}"}}', limit.count) for name, limit in limits]),
            ("connections_refused_total", "counter", "Connections turned away.",
             [(f'{{port="{name}"}}', limit.refused) for name, limit in limits]),
            ("http_answers_total", "counter", "HTTP answers by status.",
             labelled("status", self.answers)),
            ("http_waiting", "gauge", "Requests that wait for mail.", [("", len(self.waiting))]),
            ("messages", "gauge", "Messages in the store.", [("", store.totals.total)]),
            ("commits_total", "counter", "Transactions committed.", [("", figures["commits"])]),
            ("commit_jobs_total", "counter", "Changes committed.", [("", figures["jobs"])]),
            ("commit_seconds_total", "counter", "Time spent on transactions.",
             [("", figures["commit_seconds"])]),
            ("outbox", "gauge", "Deliveries by state.", labelled("state", store.outbox.counts())),
            ("outbox_attempts_total", "counter", "Attempts by how they ended.",
             labelled("state", attempts)),
            ("queue_jobs", "gauge", "Changes that wait for the writer.",
             [("", store.jobs.qsize())]),
            ("digest_lag", "gauge", "Message numbers not digested yet.",
             [("", max(0, store.totals.last_id - store.digested))]),
            ("index_lag", "gauge", "Message numbers not indexed yet.",
             [("", max(0, store.totals.last_id - store.totals.indexed)
              if store.has_index else 0)]),
        ]


def has_token(header: str, token: str) -> bool:
    """Does an Authorization header carry the token, as Bearer or as Basic's password?"""
    scheme, _, value = header.strip().partition(" ")
    if scheme.lower() == "basic":
        value = decode_base64(value.encode("utf-8", "replace")).decode("utf-8", "replace")
        value = value.partition(":")[2]
    elif scheme.lower() != "bearer":
        return False
    else:
        value = value.encode("latin-1", "replace").decode("utf-8", "replace")
    return hmac.compare_digest(value.strip().encode("utf-8", "replace"), token.encode("utf-8"))


HEAD_END = re.compile(rb"\r?\n\r?\n")
EXPECT = re.compile(rb"(?s)\A[^\n]* HTTP/1\.1\r?\n.*\nexpect[ \t]*:[ \t]*100-continue|"
                    rb"\A[^\n]* HTTP/1\.1\r?\nexpect[ \t]*:[ \t]*100-continue", re.I)
CONTENT_LENGTH = re.compile(rb"\ncontent-length[ \t]*:[ \t]*([^\r\n]*)", re.I)


def plain_problem(status: int, text: str, *fields: str) -> bytes:
    """Return the answer to what is not even read; the connection ends with it."""
    body = json_text({"error": text}).encode() + b"\n"
    head = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", "Content-Type: application/json",
            f"Content-Length: {len(body)}", "X-Content-Type-Options: nosniff", "Connection: close",
            *fields, "", ""]
    return "\r\n".join(head).encode() + body


class HTTPSession(Session):
    """One HTTP connection: collects requests, sends answers; made by Server."""

    def __init__(self, app: HTTPApp, peer: str) -> None:
        self.app = app
        self.peer = peer
        self.busy = False               # a request has begun to come in
        super().__init__()

    def run(self) -> Steps:
        """Serve requests until one of the two sides has enough."""
        close = False
        while not (close or self.stopping):
            data = yield from self.read_request()
            if data is None:
                return
            result: Result = yield Work(self.app.answer, (data, self.peer, True))
            deadline = time.monotonic() + (result.wait[0] if result.wait else 0)
            while result.wait:
                left = deadline - time.monotonic()
                expired = left <= 0 or self.stopping or (yield Ask(
                    self.app.wait_for_change, (left, result.wait[1])))
                result = yield Work(self.app.answer, (data, self.peer, not expired))
            self.write(result.head)
            close = result.close
            if result.pieces is not None:
                try:
                    yield from self.send_pieces(result.pieces, result.chunked)
                except (KeyError, OSError, StoreError) as error:    # deleted while it was sent
                    log.warning("api: an answer was cut short: %s", reason(error))
                    return

    @property
    def name(self) -> str:
        """What log lines about the connection begin with."""
        return "api: " + self.peer

    def read_request(self) -> Steps:
        """Wait for a whole request; return its bytes, None after a refusal."""
        self.busy = bool(self.inbox)
        scanned = 0
        while True:
            while self.inbox[:2] == b"\r\n":           # RFC 9112 2.2: an empty line before it
                del self.inbox[:2]
            match = HEAD_END.search(self.inbox, max(0, scanned - 3))
            if match:
                break
            scanned = len(self.inbox)
            self.busy = scanned > 0
            if scanned > MAX_HEAD:
                break
            yield READ
        if match is None or match.end() > MAX_HEAD:
            return self.refuse(431, "the header of the request is too large")
        head = bytes(self.inbox[:match.end()])
        del self.inbox[:match.end()]
        self.busy = True
        if b"\r" in head.replace(b"\r\n", b"") or re.search(rb"\n[^:\n]*[ \t]:", head):
            return self.refuse(400, "a blank before a colon, or a CR that ends no line")
        if re.search(rb"\ntransfer-encoding:", head, re.I):
            return self.refuse(411, "a body needs Content-Length")
        lengths = {text.rstrip() for text in CONTENT_LENGTH.findall(head)}
        if len(lengths) > 1 or not all(re.fullmatch(b"[0-9]{1,18}", text) for text in lengths):
            return self.refuse(400, "Content-Length is not a number")
        length = int(lengths.pop()) if lengths else 0
        if length > MAX_BODY:
            return self.refuse(413, f"the body is larger than {MAX_BODY} bytes")
        if length > len(self.inbox) and EXPECT.search(head):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = yield from self.read_exactly(length)
        return head + body

    def refuse(self, status: int, text: str) -> None:
        """Answer a request that is not even read, and end the connection."""
        self.write(plain_problem(status, text))
        self.app.count_answer(status)

    def send_pieces(self, pieces: Iterator[bytes], chunked: bool) -> Steps:
        """Send the pieces of an answer as the client takes them; each is read in the pool."""
        yield DRAIN
        while True:
            piece = yield Work(next, (pieces, None))
            if piece is None:
                break
            if piece:
                self.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                yield DRAIN
        if chunked:
            self.write(b"0\r\n\r\n")

    def stop(self, why: str) -> Wants:
        """End an idle connection at once, another after its answer."""
        self.stopping = True
        if why == "shutdown" and self.wants is not READ:
            return self.wants
        if why == "timeout" and self.busy:
            self.refuse(408, "the request did not come in time")
        self.wants = None
        return None


# =====================================================================================
# 10. Server and tools: all of it wired together, and the command line
#
# Server makes every part above and gives them to each other. main() answers the command line:
# settings in, one line for each mistake of the operator, exit status 2 (usage) or 1.
# =====================================================================================

RELOAD_SECONDS = 2            # how often the certificate's files are looked at
MAX_LOG = 10000               # log lines that wait to be written; more are counted and dropped
LOG_SECONDS = 0.05            # lines are gathered that long: a wake-up a line costs more than it


# -- Logging --

class LogWriter(logging.Handler):
    """Formats log records and has a thread write them: a full pipe holds nobody up.

    Made by main().
    """

    def __init__(self, file: Any, form: str, dated: bool = False) -> None:
        super().__init__()
        self.file = file
        self.form = form
        self.dated = dated              # text lines begin with date and time
        self.lines: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()   # about MAX_LOG
        self.dropped = 0
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        if self.lines.qsize() > MAX_LOG:
            self.dropped += 1
            return
        try:
            self.lines.put(self.line(record))
        except Exception:               # a border: a bad record must not end a session
            self.handleError(record)

    def line(self, record: logging.LogRecord) -> str:
        """Return a record as one line; a traceback follows it."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        if self.form == "text":
            return (time.strftime("%Y/%m/%d %H:%M:%S ", time.localtime(record.created))
                    if self.dated else "") + text + "\n"
        values = {"time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
                  + ".%03dZ" % (record.msecs), "level": record.levelname.lower()}
        session, _, rest = text.partition(" ")
        if re.fullmatch(r"[0-9a-f]{8}", session):
            values["session"], text = session, rest
        return json_text({**values, "text": text}) + "\n"

    def run(self) -> None:
        """Write what comes, all that waits at once, until None comes."""
        while True:
            lines = [self.lines.get()]
            while not self.lines.empty() and len(lines) < MAX_LOG:
                lines.append(self.lines.get())
            if self.dropped:
                text = f"{self.dropped} log lines were dropped"
                lines.insert(0, (json_text({"text": text}) if self.form == "json" else text) + "\n")
                self.dropped = 0
            with contextlib.suppress(OSError, ValueError):      # nobody is there to be told
                self.file.write("".join(line for line in lines if line is not None))
                self.file.flush()
            if None in lines:
                return
            time.sleep(LOG_SECONDS)

    def close(self) -> None:
        """Write what waits and end the thread."""
        self.lines.put(None)
        self.thread.join(5)
        super().close()


# -- The server --

class Server:
    """Everything together: the store, the loop, the listeners. run() serves until stop()."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cert_times = certificate_times(settings)
        self.listeners: List[Listener] = []
        self.sockets: List[socket.socket] = []
        self.stopping = False
        self.on_terminal = False        # a SIGHUP means that it was closed
        context = load_certificate(settings)
        check_outgoing(settings)
        raise_file_limit(settings.max_connections)
        try:
            self.open_sockets()
            addresses = {host: resolve_host(host) for host, _ in settings.server_addr}
            self.store = Store(settings.db_path, settings.media_path, settings.file_hash_length)
        except BaseException:
            self.close_sockets()
            raise
        self.loop = Loop()
        self.intake = Intake(settings, self.store, self.loop)
        self.intake.tls = context
        self.http = HTTPApp(settings, self.store, self.intake, self.loop)
        self.http.server_addresses = addresses
        self.http.smtp_port = self.port("smtp")
        self.couriers = Couriers(settings, self.store, self.loop, "http://%s:%d" % (
            f"[{settings.local_address}]" if ":" in settings.local_address
            else settings.local_address, self.port("api")))
        self.http.couriers = self.couriers
        self.listen()

    def open_sockets(self) -> None:
        """Open every listening socket, so that a port in use is told at once."""
        settings = self.settings
        self.bound: List[Tuple[str, socket.socket]] = []
        for kind in ("smtp", "api", "lmtp"):
            number_ = getattr(settings, kind + "_port")
            if number_ is not None:
                sock = open_port(settings.bind, number_, f"--{kind}_port")
                self.sockets.append(sock)
                self.bound.append((kind, sock))
        if settings.lmtp_socket:
            sock = open_unix(settings.lmtp_socket)
            self.sockets.append(sock)
            self.bound.append(("lmtp", sock))

    def close_sockets(self) -> None:
        """Close the listening sockets, and remove the Unix socket's file."""
        for sock in self.sockets:
            if sock.fileno() >= 0 and sock.family == socket.AF_UNIX:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(sock.getsockname())
            sock.close()

    def port(self, kind: str) -> int:
        """Return the port that was opened for smtp, api or lmtp."""
        return next(sock.getsockname()[1] for name, sock in self.bound
                    if name == kind and sock.family != socket.AF_UNIX)

    def listen(self) -> None:
        """Begin to accept on every socket."""
        settings = self.settings
        busy = Reply(421, "4.7.0", f"{settings.hostname} Too many connections, try again later")
        crowded = plain_problem(503, "too many connections, try again later", "Retry-After: 5")
        for kind, sock in self.bound:
            limits = self.http.limits.setdefault(kind, Limits(
                settings.max_connections, settings.max_connections_per_peer,
                self.intake.is_trusted_proxy))
            self.listeners.append(Listener(
                self.loop, sock, functools.partial(self.make_session, kind),
                crowded if kind == "api" else busy.encode(), settings.timeout,
                settings.max_session, limits, self.tls_context))

    def make_session(self, kind: str, peer: str) -> Session:
        """Make the session of a new connection."""
        if kind == "api":
            return HTTPSession(self.http, peer)
        session = (LMTPSession if kind == "lmtp" else
                   PigeonSession if self.settings.url else SMTPSession)
        return session(self.intake, peer, secrets.token_hex(4))

    def tls_context(self) -> ssl.SSLContext:
        """Return what TLS is begun with; a renewed certificate is a new one."""
        assert self.intake.tls is not None
        return self.intake.tls

    def run(self) -> None:
        """Serve until stop() was called and all is finished; close the store."""
        self.loop.call_soon(self.watch_certificate)
        self.loop.call_soon(self.couriers.start)
        try:
            self.loop.run()
        finally:
            try:
                self.couriers.stop()
            finally:
                self.store.close()
                self.close_sockets()

    def stop(self, *_: Any) -> None:
        """Stop: let what is being received finish, within --grace. The second call stops now."""
        if self.stopping:
            self.loop.stop()
        self.stopping = True
        self.loop.call_soon(self.begin_stop)

    def begin_stop(self) -> None:
        """Accept no more, say goodbye to all, and wait for the last."""
        self.close_sockets_for_good()
        for stream in list(self.loop.streams):
            stream.stop("shutdown")
        self.http.wake_now()
        self.end_by = time.monotonic() + self.settings.grace
        self.wait_for_streams()

    def close_sockets_for_good(self) -> None:
        """Close the listeners."""
        for listener in self.listeners:
            if listener.sock.fileno() >= 0:
                with contextlib.suppress(KeyError):
                    self.loop.selector.unregister(listener.sock)
        self.close_sockets()

    def wait_for_streams(self) -> None:
        """End the loop when no connection is left or the grace is over."""
        if not self.loop.streams or time.monotonic() >= self.end_by:
            for stream in list(self.loop.streams):
                stream.stop("timeout" if stream.session.wants is READ else "shutdown")
            self.loop.stopped = True
        else:
            self.loop.call_later(0.05, self.wait_for_streams)

    # -- Certificates --

    def watch_certificate(self) -> None:
        """Look, now and then, whether the certificate was renewed."""
        if self.settings.ssl_cert and not self.stopping:
            self.loop.work(self.renew_certificate, (False,), ignore)
            self.loop.call_later(RELOAD_SECONDS, self.watch_certificate)

    def reload(self, *_: Any) -> None:
        """Read the certificate again, for SIGHUP; that also comes when a terminal is closed."""
        if self.settings.ssl_cert:
            self.loop.work(self.renew_certificate, (True,), ignore)
        elif self.on_terminal:
            self.stop()

    def renew_certificate(self, anyway: bool) -> None:
        """Read the certificate if its files have changed; sessions that run are left alone."""
        times = certificate_times(self.settings)
        if times == self.cert_times and not anyway:
            return
        self.cert_times = times
        try:
            self.intake.tls = load_certificate(self.settings)
            log.info("the certificate was read again")
        except SettingsError as error:
            log.error("the old certificate stays in use: %s", error)


def certificate_times(settings: Settings) -> Any:
    """Return what changes when the certificate's files do."""
    try:
        found = [os.stat(path) for path in (settings.ssl_cert, settings.ssl_key) if path]
        return [(status.st_mtime_ns, status.st_ino, status.st_size) for status in found]
    except OSError as error:
        return str(error)


def load_certificate(settings: Settings) -> Optional[ssl.SSLContext]:
    """Return a context of TLS 1.2 or newer with the certificate, None if there is none."""
    if not settings.ssl_cert:
        return None
    for name, path in (("ssl_cert", settings.ssl_cert), ("ssl_key", settings.ssl_key)):
        try:
            open(path, "rb").close()
        except OSError as error:
            raise SettingsError(f"--{name} {path}: cannot be read: {reason(error)}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(settings.ssl_cert, settings.ssl_key, password=lambda: "")
    except (ssl.SSLError, ValueError, OSError) as error:
        text = getattr(error, "reason", None) or str(error)
        raise SettingsError(f"--ssl_cert {settings.ssl_cert}: does not work with --ssl_key "
                            f"{settings.ssl_key}: {text}; both are to be PEM files that belong "
                            "together, the key without a password") from None
    return context


def open_port(address: str, number_: int, option: str) -> socket.socket:
    """Open a listening TCP socket, or say in one line why that fails."""
    try:
        family, kind, proto, _, place = socket.getaddrinfo(
            address, number_, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError:
        raise SettingsError(f"--bind {address}: is no address of this host", 2) from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        sock.bind(place)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        hints = {errno.EADDRINUSE: f"stop the other program or choose another {option}",
                 errno.EACCES: f"ports below 1024 need a right; choose another {option}, or see "
                               "--generate_systemd_unit",
                 errno.EADDRNOTAVAIL: "--bind names no address of this host"}
        hint = "; " + hints[error.errno] if error.errno in hints else ""
        raise SettingsError(f"{option} {number_} on {address}: {reason(error)}{hint}") from None
    return sock


def resolve_host(host: str) -> str:
    """Return the IP address of a host, which is what nginx wants to hear."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise SettingsError(f"--server_addr {host}: has no address: {reason(error)}") from None


def open_unix(path: str) -> socket.socket:
    """Open a listening Unix socket that only this user may use; a dead one is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "there is a file that is no socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise OSError(errno.EADDRINUSE, "another program uses it")
            os.unlink(path)
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise SettingsError(f"--lmtp_socket {path}: {reason(error)}; choose another place"
                            ) from None
    return sock


def raise_file_limit(connections: int) -> None:
    """Ask for as many descriptors as the connections may need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + 200
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


# -- Generators --

NGINX_MAIL = """\
# nginx in front of pegmail: `nginx -t -c FILE` checks it. Start pegmail with
#   {command} --trusted_proxy {proxy}
# nginx asks pegmail's /auth where each recipient's mail goes, and names the client by XCLIENT.
include /etc/nginx/modules-enabled/*.conf;
worker_processes auto;
error_log stderr warn;
pid {pid};
events {{ worker_connections 4096; }}
mail {{
    server_name {hostname};
    auth_http {api}/auth;
{token}    proxy_pass_error_message on;
    server {{
        listen {port};
        protocol smtp;
        smtp_auth none;
        proxy on;
        xclient on;
        timeout 300s;
        smtp_capabilities "SIZE {size}" PIPELINING 8BITMIME ENHANCEDSTATUSCODES;
        # ssl_certificate /etc/letsencrypt/live/{hostname}/fullchain.pem;
        # ssl_certificate_key /etc/letsencrypt/live/{hostname}/privkey.pem;
        # starttls on;
    }}
}}
"""

NGINX_STREAM = """\
# nginx in front of pegmail, which has the certificate: `nginx -t -c FILE` checks it. Start with
#   {command} --trusted_proxy {proxy} --proxy_protocol
# Bytes are passed on as they come; a PROXY header names the client.
include /etc/nginx/modules-enabled/*.conf;
worker_processes auto;
error_log stderr warn;
pid {pid};
events {{ worker_connections 4096; }}
stream {{
    upstream pegmail {{
        hash $remote_addr consistent;
{servers}    }}
    server {{
        listen {port};
        proxy_pass pegmail;
        proxy_protocol on;
        proxy_timeout 300s;
    }}
}}
"""


def quote_nginx(text: str) -> str:
    """Return a text as one word of an nginx configuration."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def nginx_configuration(settings: Settings, arguments: Sequence[str]) -> str:
    """Return a configuration for nginx: mail proxy, or stream when pegmail has the certificate."""
    words = ["python3", "pegmail.py", *without_actions(arguments)]
    servers = [(host, port_ or settings.smtp_port) for host, port_ in settings.server_addr]
    local = settings.local_address
    brackets = "[%s]" if ":" in local else "%s"
    values = {
        "command": " ".join(map(shlex.quote, words)),
        "proxy": "127.0.0.1" if local.startswith("127.") else local, "hostname": settings.hostname,
        "size": settings.max_size, "port": 25, "pid": "/run/nginx-pegmail.pid",
        "api": f"{brackets % local}:{settings.api_port}",
        "token": "    auth_http_header Authorization %s;\n" % quote_nginx(
            "Bearer " + settings.api_token) if settings.api_token else "",
        "servers": "".join("        server %s:%d;\n" % ("[%s]" % host if ":" in host else host,
                                                       port_) for host, port_ in servers)}
    return (NGINX_STREAM if settings.ssl_cert else NGINX_MAIL).format(**values)


SYSTEMD_UNIT = """\
# /etc/systemd/system/pegmail.service; then: systemctl enable --now pegmail
[Unit]
Description=pegmail mail server
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
DynamicUser=yes
StateDirectory=pegmail
StateDirectoryMode=0700
WorkingDirectory=%S/pegmail
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
UMask=0077
LimitNOFILE=65536
Restart=on-failure
TimeoutStopSec={stop}
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""


def without_actions(arguments: Sequence[str]) -> List[str]:
    """Return the words of a command line but for those that ask for something else than a start."""
    actions = {"--" + name for name, _ in ACTIONS}
    return [word for word in arguments if "--" + word[2:].replace("-", "_") not in actions]


def absolute_paths(words: Sequence[str]) -> List[str]:
    """Return words with the paths of what is to be read made absolute: a service starts elsewhere.

    The paths of database and media stay: they are meant to be in the service's own folder.
    """
    found: List[str] = []
    name = ""
    for word in words:
        given, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name = given[2:].replace("-", "_") or name
        at = "@" if name == "api_token" and value.startswith("@") else ""
        if value and (name in ("config", "ssl_cert", "ssl_key") or at):
            value = at + os.path.abspath(value[len(at):])
        found.append(given + equals + value)
    return found


def systemd_unit(settings: Settings, arguments: Sequence[str]) -> str:
    """Return a unit that starts pegmail with these arguments."""
    words = [sys.executable, os.path.abspath(__file__), *absolute_paths(without_actions(arguments))]
    quoted = ['"%s"' % word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
              .replace("$", "$$") if re.search(r"[^\w@:,./=-]", word) else word for word in words]
    return SYSTEMD_UNIT.format(command=" ".join(quoted), stop=settings.grace + 20)


# -- The command line --

def start_lines(server: Server) -> str:
    """Return what a start tells: where mail comes in, where it is read, where it is kept."""
    settings = server.settings
    host = f"[{settings.bind}]" if ":" in settings.bind else settings.bind
    tls = " with STARTTLS" if settings.ssl_cert else ""
    lines = [f"pegmail {__version__}",
             f"  mail in:   smtp://{host}:{server.port('smtp')}{tls}",
             f"  mail out:  http://{host}:{server.port('api')}/list"]
    if settings.lmtp_port is not None:
        lines.append(f"  LMTP:      {host}:{server.port('lmtp')}")
    if settings.lmtp_socket:
        lines.append(f"  LMTP:      {settings.lmtp_socket}")
    for forward in server.intake.forwards:
        target = str(settings.url) if forward.target == "url" else forward.target
        lines.append(f"  goes on:   {clean_line(target, 200)}")
    domains = ", ".join(settings.server_host) or "any domain"
    lines += [f"  takes:     mail for {domains}, at most {settings.max_size} bytes",
              f"  kept in:   {os.path.abspath(settings.db_path)} and "
              f"{os.path.abspath(settings.media_path)}", "Ctrl-C stops it."]
    return "\n".join(lines) + "\n"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_output()
    called = os.path.basename(sys.argv[0])
    if called in CALLED_AS:
        return CALLED_AS[called](arguments)
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    try:
        settings, actions = load_settings(arguments, dict(os.environ))
        if "generate_nginx_config" in actions:
            print(nginx_configuration(settings, arguments), end="")
        if "generate_systemd_unit" in actions:
            print(systemd_unit(settings, arguments), end="")
        if "check" in actions:
            load_certificate(settings)      # all else is read and checked by now
            check_outgoing(settings)
            print("the configuration is fine")
        if actions:
            return 0
        server = Server(settings)
    except SettingsError as error:
        print(f"pegmail: {error}", file=sys.stderr)
        return error.status
    return serve(server)


# -- Sub-commands --

def outbox_command(arguments: Sequence[str]) -> int:
    """Show or change what is to leave, also while the server runs; return the exit status."""
    parser = OneLineParser("pegmail.py outbox", allow_abbrev=False,
                           description="Show what is to leave, try it again, or drop it.")
    parser.add_argument("action", choices=("list", "retry", "drop"))
    parser.add_argument("id", nargs="*", type=int, help="Numbers of deliveries; for list, none.")
    parser.add_argument("--state", choices=STATES, default="", help="Only those in this state.")
    parser.add_argument("--target", default="", help="Only those to this target.")
    parser.add_argument("--db_path", "--db-path", help="The database, if not the configured one.")
    given = parser.parse_args(arguments)
    try:
        settings, _ = load_settings([], dict(os.environ))
        desk = Desk(given.db_path or settings.db_path)
        with contextlib.closing(desk.db):
            outbox = desk.outbox
            if given.action == "list":
                return list_outbox(outbox, given.state, given.target)
            if not given.id:
                raise SettingsError(f"outbox {given.action}: name the numbers that outbox list "
                                    "shows", 2)
            change = outbox.retry if given.action == "retry" else outbox.drop
            missing = [str(ident) for ident in given.id if not change(ident)]
    except BrokenPipeError:             # whoever reads the list has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SettingsError, sqlite3.Error) as error:
        print(f"pegmail: {error}", file=sys.stderr)
        return error.status if isinstance(error, SettingsError) else 1
    for ident in missing:
        print(f"pegmail: there is no delivery {ident} that waits or has failed", file=sys.stderr)
    return 1 if missing else 0


def list_outbox(outbox: Outbox, state: str, target: str) -> int:
    """Print deliveries, one a line with tabs between the values."""
    after = 0
    while True:
        entries = outbox.find(state, target, after, 500)
        lines = ["\t".join(clean_line(str(value)) for value in (
            entry.id, entry.state, entry.attempts, rfc3339(entry.due), entry.message or 0,
            entry.event, entry.target, entry.error or "-")) + "\n" for entry in entries]
        sys.stdout.write("".join(lines))
        sys.stdout.flush()
        if len(entries) < 500:
            return 0
        after = entries[-1].id


# sysexits.h
EX_OK, EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_TEMPFAIL, EX_CONFIG = 0, 64, 65, 69, 75, 78


def sendmail(arguments: Sequence[str]) -> int:
    """Take a message from standard input as sendmail does; return a status of sysexits.h.

    It goes to the server that runs here; when none does, straight into its store.
    """
    try:
        settings, _ = load_settings([], dict(os.environ), config=SENDMAIL_CONFIG)
    except SettingsError as error:
        print(f"sendmail: {error}", file=sys.stderr)
        return EX_CONFIG
    given, names = read_sendmail_options(arguments)
    if given is None:
        return EX_USAGE
    if given.b in SENDMAIL_MODES:
        return SENDMAIL_MODES[given.b]()
    data = sys.stdin.buffer.read(settings.max_size + 1)
    if len(data) > settings.max_size:
        print(f"sendmail: the message is larger than {settings.max_size} bytes", file=sys.stderr)
        return EX_DATAERR
    try:
        sender, recipients, content = read_submission(settings, given, names, data)
    except (ValueError, RecursionError) as error:
        print(f"sendmail: {clean_line(str(error), 300)}", file=sys.stderr)
        return EX_DATAERR
    if not recipients:
        print("sendmail: no recipients: name them, or use -t", file=sys.stderr)
        return EX_USAGE
    step = settings.max_recipients
    parts = [recipients[start:start + step] for start in range(0, len(recipients), step)]
    return max(hand_in(settings, sender, part, content) for part in parts)


def read_submission(settings: Settings, given: Any, names: List[str], data: bytes,
                    ) -> Tuple[str, List[str], bytes]:
    """Return sender, recipients and content of a message given to sendmail. Raises ValueError."""
    if not given.i:                     # a line with a single dot ends the message
        data = re.split(rb"(?m)^\.\r?$\n?", data, maxsplit=1)[0]
    data = LINE_END.sub(line_end, data)
    head = data[:header_length(data)]
    body = data[len(head):]
    if given.t:
        names = names + header_recipients(head)
        head = drop_fields(head, "bcc")
    domain_ = settings.server_host[0] if settings.server_host else settings.hostname
    sender = "" if given.f in ("", "<>") else whole_address(given.f or local_user(), domain_)
    recipients = list(dict.fromkeys(whole_address(name, domain_) for name in names))
    return sender, recipients, (
        missing_fields(head, given.F, sender or f"MAILER-DAEMON@{domain_}", settings.hostname)
        + head + (b"" if body[:1] in (b"", b"\r") else b"\r\n") + body)


def whole_address(text: str, domain_: str) -> str:
    """Return an address without a name beside it, and with a domain. Raises ValueError."""
    text = email.utils.parseaddr(text)[1] or text if "<" in text else text
    text = text if "@" in text else f"{text}@{domain_}"
    try:
        return parse_address(text).text
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None


SENDMAIL_CONFIG = "/etc/pegmail.ini"        # what it reads, as cron starts it anywhere


def read_sendmail_options(arguments: Sequence[str]) -> Tuple[Any, List[str]]:
    """Return the options that count, and the recipients; None for wrong usage, which is told."""
    parser = OneLineParser("sendmail", allow_abbrev=False, add_help=False)
    parser.add_argument("-t", action="store_true")
    parser.add_argument("-i", "-oi", action="store_true")
    parser.add_argument("-f", "-r", default=None)
    parser.add_argument("-F", default="")
    parser.add_argument("-b", default="m")
    for ignored in ("-B", "-N", "-R", "-V", "-X", "-h", "-L", "-O", "-o", "-q", "-p", "-C"):
        parser.add_argument(ignored, nargs="?", dest="ignored")
    for ignored in ("-v", "-n", "-G", "-U", "-m", "-om", "-oem", "-ep"):
        parser.add_argument(ignored, action="store_true", dest="ignored_too")
    parser.add_argument("names", nargs="*")
    try:
        given = parser.parse_args([os.fsencode(word).decode("utf-8", "replace")
                                   for word in arguments])
    except SystemExit:
        return None, []
    names = [name.strip() for text in given.names for name in text.split(",") if name.strip()]
    return given, names


def header_recipients(head: bytes) -> List[str]:
    """Return the addresses in To, Cc and Bcc."""
    texts = [value for name, value in parse_fields(head[:MAX_HEADER_BYTES])
             if name.lower() in ("to", "cc", "bcc")]
    return [address for _, address in email.utils.getaddresses(
        [text[:20000] for text in texts]) if address]


def drop_fields(head: bytes, name: str) -> bytes:
    """Return a header block without the fields of that name."""
    return re.sub(rb"(?im)^%b[ \t]*:[^\n]*(?:\n[ \t][^\n]*)*\n?" % name.encode("ascii"), b"", head)


def missing_fields(head: bytes, full_name: str, sender: str, hostname: str) -> bytes:
    """Return the fields that every message has to have and this one does not."""
    known = {name.lower() for name, _ in parse_fields(head[:MAX_HEADER_BYTES])}
    plain = sender.isascii()            # else the library refuses to write it
    fields = {"date": email.utils.formatdate(localtime=True),
              "message-id": email.utils.make_msgid(domain=hostname),
              "from": email.utils.formataddr((clean_line(full_name), sender if plain else ""))
              + ("" if plain else f" <{sender}>")}
    return "".join(f"{name.title().replace('-Id', '-ID')}: {value}\r\n"
                   for name, value in fields.items() if name not in known).encode("utf-8")


def local_user() -> str:
    """Return the name of the user who runs this."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid{os.getuid()}"


def hand_in(settings: Settings, sender: str, recipients: List[str], content: bytes) -> int:
    """Give a message to the server of this host, or put it into the store if none runs."""
    try:
        with smtplib.SMTP(settings.local_address, settings.smtp_port, timeout=60) as client:
            client.ehlo()
            if client.has_extn("starttls"):
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                client.starttls(context=context)        # to this host itself, whatever its name
            plain = (sender + "".join(recipients)).isascii()
            refused = client.sendmail(sender, recipients, content,
                                      ["BODY=8BITMIME"] + ([] if plain else ["SMTPUTF8"]))
        return tell_refused(refused)
    except smtplib.SMTPRecipientsRefused as error:
        return tell_refused(error.recipients)
    except smtplib.SMTPResponseException as error:
        return tell_refused({sender: (error.smtp_code, error.smtp_error)})
    except ConnectionRefusedError:
        return keep_directly(settings, sender, recipients, content)
    except (OSError, smtplib.SMTPException) as error:
        print(f"sendmail: {reason(error)}", file=sys.stderr)
        return EX_TEMPFAIL


def tell_refused(refused: Dict[str, Tuple[int, Any]]) -> int:
    """Print who was refused and why; return the status."""
    for address, (code, text) in refused.items():
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        print(f"sendmail: <{address}>: {code} {clean_line(text)}", file=sys.stderr)
    codes = [code for code, _ in refused.values()]
    return (EX_OK if not codes else
            EX_UNAVAILABLE if any(code >= 500 for code in codes) else EX_TEMPFAIL)


def keep_directly(settings: Settings, sender: str, recipients: List[str], content: bytes) -> int:
    """Put a message into the store of a server that does not run."""
    try:
        store = Store(settings.db_path, settings.media_path, settings.file_hash_length)
    except SettingsError as error:
        print(f"sendmail: no server listens, and {error}", file=sys.stderr)
        return EX_TEMPFAIL
    try:
        intake = Intake(settings, store)
        refusals = {address: intake.refuse_recipient(parse_address(address))
                    for address in recipients}
        refused = {address: (reply[0], reply[2]) for address, reply in refusals.items() if reply}
        kept = tuple(address for address in recipients if address not in refused)
        future: "Future[Any]" = Future()
        envelope = Envelope(sender, kept, "127.0.0.1", settings.hostname, "local", "",
                            secrets.token_hex(4) + ".1")
        trace = trace_fields(envelope, settings.hostname, intake.now_text())
        if kept:
            subject = read_subject(content[:header_length(content)])
            store.add([Job(Incoming(envelope, trace, subject, content, intake.plan(envelope),
                                    intake.new_key()),
                           lambda result, error: future.set_result(error))])
            if future.result() is not None:
                print(f"sendmail: {future.result()}", file=sys.stderr)
                return EX_TEMPFAIL
        return tell_refused(refused)
    except ValueError as error:
        print(f"sendmail: {error}", file=sys.stderr)
        return EX_DATAERR
    finally:
        store.close()


def not_done(mode: str) -> int:
    """Say that sendmail's other modes are not served; return the status."""
    print(f"sendmail: {mode} is not served here", file=sys.stderr)
    return EX_USAGE


COMMANDS: Dict[str, Callable[[Sequence[str]], int]] = {"outbox": outbox_command,
                                                       "sendmail": sendmail}
SENDMAIL_MODES: Dict[str, Callable[[], int]] = {      # -bm, the usual one, is not among them
    "p": lambda: outbox_command(["list"]), "i": lambda: EX_OK, "s": lambda: not_done("-bs"),
    "d": lambda: not_done("-bd"), "t": lambda: not_done("-bt"), "v": lambda: not_done("-bv")}
CALLED_AS: Dict[str, Callable[[Sequence[str]], int]] = {
    "sendmail": sendmail, "mailq": lambda arguments: outbox_command(["list"]),
    "newaliases": lambda arguments: EX_OK}


def prepare_output() -> None:
    """Make sure that there is an output, and that it can show whatever a path or domain holds."""
    with contextlib.suppress(OSError):
        while os.open(os.devnull, os.O_RDWR) < 3:       # else a socket might become "the output"
            pass
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="backslashreplace")


def serve(server: Server) -> int:
    """Run a server under the signals of a shell or a service manager."""
    settings = server.settings
    writer = LogWriter(sys.stderr, settings.log_format, settings.standalone_logging)
    log.addHandler(writer)
    log.setLevel(logging.DEBUG if settings.debug else logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False
    logging._srcfile = None             # type: ignore[attr-defined]  # the place is never shown
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, server.stop)
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        server.on_terminal = True
    signal.signal(signal.SIGHUP, server.reload)
    # The system may hand a signal to any thread; the one that handles it sleeps in the loop.
    waker = os.dup(server.loop.waker.fileno())
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    try:
        sys.stdout.write(start_lines(server))
        sys.stdout.flush()
    except OSError:
        pass                            # nobody reads it; the mail still comes
    try:
        server.run()
    finally:
        signal.set_wakeup_fd(-1)
        os.close(waker)
        log.info("stopped")
        log.removeHandler(writer)
        writer.close()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # no traceback until the server can stop itself
    sys.exit(main())
