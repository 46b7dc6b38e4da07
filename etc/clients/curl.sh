#!/bin/sh
# Sends one message through the proxy with curl:   curl.sh FROM TO FILE
# The file is the whole message; line ends may be LF or CRLF. The proxy needs
#
#     listen_socks5 "10.0.0.1:1080"
#     allow_from 10.0.0.0/24
#     auth_shared_secret "PUT-THE-SECRET-OF-THE-PROXY-HERE"   # made by `openssl rand -hex 32`
#     source_ip 192.0.2.1
#     default_source_ip 192.0.2.1
#
# The receiver is an IP address: the proxy resolves no names (so --socks5-hostname does not work, --socks5 does).
set -eu

proxy=10.0.0.1:1080
instance=server-a
secret=PUT-THE-SECRET-OF-THE-PROXY-HERE
receiver=198.51.100.7:25

# curl hides --proxy-user from ps.
LC_ALL=C sed 's/\r$//; s/$/\r/' "$3" |
    curl --silent --show-error --max-time 300 --socks5 "$proxy" --proxy-user "$instance:$secret" \
        --mail-from "$1" --mail-rcpt "$2" --upload-file - "smtp://$receiver/mail1.example.com"
