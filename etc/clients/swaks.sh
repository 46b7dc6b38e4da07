#!/bin/sh
# Tries the PROXY door by hand with swaks:   swaks.sh FROM TO FILE
# The file is the whole message; swaks adds a line end. The proxy needs
#
#     listen_proxy_protocol "10.0.0.1:808"
#     allow_from 10.0.0.0/24
#     source_ip 192.0.2.1
set -eu

proxy=10.0.0.1:808
source=192.0.2.1
receiver=198.51.100.7
receiver_port=25

# Version 2: --proxy-version 2 --proxy-family AF_INET. swaks wants a source port that is not 0; nobody uses it.
swaks --silent 2 --server "$proxy" --helo mail1.example.com --from "$1" --to "$2" --data "@$3" \
    --proxy-version 1 --proxy-family TCP4 --proxy-source "$source" --proxy-source-port 25 \
    --proxy-dest "$receiver" --proxy-dest-port "$receiver_port"
