#!/usr/bin/env python3
"""Sends one message through the proxy with Python's smtplib over PySocks (pip install PySocks).

    python_socks.py FROM TO < FILE

The file is the whole message; line ends may be LF or CRLF. The proxy needs

    listen_socks5 "10.0.0.1:1080"
    allow_from 10.0.0.0/24
    auth_shared_secret "PUT-THE-SECRET-OF-THE-PROXY-HERE"   # made by `openssl rand -hex 32`
    source_ip 192.0.2.1
    default_source_ip 192.0.2.1

A program that wants to choose its source address, to share limits and held-open connections: see docs/clients.md.
"""

import re
import smtplib
import sys

import socks

PROXY = ("10.0.0.1", 1080)
INSTANCE = "server-a"
SECRET = "PUT-THE-SECRET-OF-THE-PROXY-HERE"
RECEIVER = ("198.51.100.7", 25)  # an IP address: the proxy resolves no names


class ProxiedSMTP(smtplib.SMTP):
    """smtplib.SMTP whose connection goes through the proxy; starttls() and login() work as usual."""

    def _get_socket(self, host, port, timeout):
        return socks.create_connection(
            (host, port),
            timeout,
            proxy_type=socks.SOCKS5,
            proxy_addr=PROXY[0],
            proxy_port=PROXY[1],
            proxy_rdns=False,
            proxy_username=INSTANCE,
            proxy_password=SECRET,
        )


def main(sender, recipient):
    message = re.sub(rb"\r?\n", b"\r\n", sys.stdin.buffer.read())  # SMTP wants CRLF; smtplib sends bytes as they are
    # The deadline is one for the connect and then one for each answer; the proxy says within 50 s how its connect went.
    with ProxiedSMTP(*RECEIVER, local_hostname="mail1.example.com", timeout=300) as smtp:
        smtp.sendmail(sender, recipient, message)


if __name__ == "__main__":
    main(*sys.argv[1:])
