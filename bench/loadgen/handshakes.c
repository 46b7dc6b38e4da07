/* handshakes.c - what the doors want to hear before SMTP begins; each leaves the session waiting for the next answer. */
#define _GNU_SOURCE
#include "session.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

static void proxy_v1(struct session *s)
{
    char text[108], from[INET_ADDRSTRLEN], to[INET_ADDRSTRLEN];
    struct in_addr source = next_source();
    inet_ntop(AF_INET, &source, from, sizeof from);
    inet_ntop(AF_INET, &opt.target.sin_addr, to, sizeof to);
    snprintf(text, sizeof text, "PROXY TCP4 %s %s 1 %d\r\n", from, to, ntohs(opt.target.sin_port));
    ask(s, GREETING, text, 1);
}

static void proxy_v2(struct session *s)
{
    unsigned char header[28] = "\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c";  /* version 2, PROXY, TCP over IPv4, 12 octets follow */
    struct in_addr source = next_source();
    memcpy(header + 16, &source, 4);
    memcpy(header + 20, &opt.target.sin_addr, 4);
    header[25] = 1;  /* source port: no zero, some peers refuse it */
    memcpy(header + 26, &opt.target.sin_port, 2);
    ask_octets(s, GREETING, header, sizeof header, 1);
}

static void socks_request(struct session *s, enum step step, unsigned char verb, struct in_addr address, in_port_t port)
{
    unsigned char request[10] = {5, verb, 0, 1};
    memcpy(request + 4, &address, 4);
    memcpy(request + 8, &port, 2);
    ask_octets(s, step, request, sizeof request, 10);
}

static void socks_after_login(struct session *s)
{
    if (opt.bind_first)
        socks_request(s, SOCKS_BIND, 2, next_source(), 0);
    else
        socks_request(s, SOCKS_CONNECT, 1, opt.target.sin_addr, opt.target.sin_port);
}

static void socks_password(struct session *s)
{
    char text[3 + 2 * MAX_SECRET + 1];
    int length = snprintf(text, sizeof text, "\1%c%s%c%s", (int)strlen(opt.user), opt.user, (int)strlen(opt.password),
                          opt.password);
    ask_octets(s, SOCKS_PASSWORD, text, (size_t)length, 2);
}

static void socks_method(struct session *s)
{
    ask_octets(s, SOCKS_METHOD, opt.user ? "\5\1\2" : "\5\1\0", 3, 2);
}

void handshake_begin(struct session *s)
{
    session_watch(s, EPOLL_CTL_MOD, EPOLLIN);
    switch (opt.handshake) {
    case HS_V1: proxy_v1(s); break;
    case HS_V2: proxy_v2(s); break;
    case HS_SOCKS5: socks_method(s); break;
    case HS_NONE: case HS_NATIVE: s->step = GREETING; s->replies_due = 1; break;
    }
}

/* SOCKS5 replies have known lengths: the handshake goes on when the octets are there and say success. */
void handshake_answer(struct session *s, const char *octets)
{
    if (s->step == SOCKS_METHOD ? octets[1] != (opt.user ? 2 : 0) : octets[1] != 0) {
        session_finish(s, false);
        return;
    }
    switch (s->step) {
    case SOCKS_METHOD:
        if (opt.user)
            socks_password(s);
        else
            socks_after_login(s);
        break;
    case SOCKS_PASSWORD: socks_after_login(s); break;
    case SOCKS_BIND: socks_request(s, SOCKS_CONNECT, 1, opt.target.sin_addr, opt.target.sin_port); break;
    default: s->step = GREETING; s->replies_due = 1; break;
    }
}
