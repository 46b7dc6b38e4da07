/* session.c - one client session, from connect over the proxy's handshake through the SMTP dialogue.
 *
 * A session is a chain of questions and answers, so it is written as one: `advance` holds the whole dialogue, the rest
 * moves octets. How many sessions run, and when, is main.c's business.
 */
#define _GNU_SOURCE
#include "loadgen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int epoll_fd;
static enum goal goal;
static char buffer[CHUNK];
static char filler[CHUNK];   /* bulk upload */
static char *message;        /* message_bytes of text and the final dot */

struct totals totals;
void (*on_free)(struct session *s);
void (*on_answer)(struct session *s);

void sample_add(struct samples *s, double microseconds)
{
    if (s->count == s->room) {
        s->room = s->room ? s->room * 2 : 65536;
        s->value = realloc(s->value, s->room * sizeof *s->value);
        if (!s->value)
            die("memory");
    }
    s->value[s->count++] = (float)microseconds;
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

double sample_at(struct samples *s, double fraction)
{
    if (!s->count)
        return 0;
    qsort(s->value, s->count, sizeof *s->value, by_value);
    return s->value[(size_t)(fraction * (double)(s->count - 1) + 0.5)];
}

void sessions_init(enum goal what)
{
    static const char line[] = "The quick brown fox jumps over the lazy dog, again and again and once more.\r\n";
    static const char dot[] = ".\r\n";
    goal = what;
    epoll_fd = epoll_create1(0);
    memset(filler, 'x', sizeof filler);
    message = malloc(opt.message_bytes + sizeof line + sizeof dot);
    if (!message)
        die("memory");
    size_t length = 0;
    for (; length < opt.message_bytes; length += sizeof line - 1)
        memcpy(message + length, line, sizeof line - 1);
    opt.message_bytes = length;
    memcpy(message + length, dot, sizeof dot - 1);
}

static void watch(struct session *s, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = s};
    if (epoll_ctl(epoll_fd, operation, s->fd, &event))
        die("epoll_ctl");
}

static void finish(struct session *s, bool good)
{
    close(s->fd);
    s->step = FREE;
    totals.active--;
    if (good) {
        totals.done++;
        sample_add(&totals.session_us, (now() - s->began) * 1e6);
    } else {
        totals.errors++;
    }
    if (on_free)
        on_free(s);
}

/* Sends, and has the rest sent when the socket takes it. `data` must stay where it is
 * unless it is as short as a command, for which a socket always has room. False: the session is over. */
static bool put(struct session *s, const char *data, size_t length)
{
    while (length) {
        ssize_t sent = send(s->fd, data, length, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) {
            finish(s, false);
            return false;
        }
        if (sent < 0)
            break;
        data += sent;
        length -= (size_t)sent;
    }
    s->rest = data;
    s->rest_bytes = length;
    if (s->writing != (length > 0)) {
        s->writing = length > 0;
        watch(s, EPOLL_CTL_MOD, s->writing ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
    return true;
}

static void ask(struct session *s, enum step step, const char *text, int replies)
{
    s->step = step;
    s->replies_due = replies;
    put(s, text, strlen(text));
}

static void ask_octets(struct session *s, enum step step, const void *data, size_t length, int octets_due)
{
    s->step = step;
    s->replies_due = octets_due;
    put(s, data, length);
}

static struct in_addr nth(struct in_addr first, long n)
{
    return (struct in_addr){htonl(ntohl(first.s_addr) + (uint32_t)n)};
}

static struct in_addr source_of(void)
{
    return nth(opt.first_source, totals.started % opt.sources);
}

/* --- handshakes: each leaves the session waiting for the next answer --- */

static void proxy_v1(struct session *s)
{
    char text[108], from[INET_ADDRSTRLEN], to[INET_ADDRSTRLEN];
    struct in_addr source = source_of();
    inet_ntop(AF_INET, &source, from, sizeof from);
    inet_ntop(AF_INET, &opt.target.sin_addr, to, sizeof to);
    snprintf(text, sizeof text, "PROXY TCP4 %s %s 1 %d\r\n", from, to, ntohs(opt.target.sin_port));
    ask(s, GREETING, text, 1);
}

static void proxy_v2(struct session *s)
{
    unsigned char header[28] = "\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c";  /* version 2, PROXY, TCP over IPv4, 12 octets follow */
    struct in_addr source = source_of();
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
        socks_request(s, SOCKS_BIND, 2, source_of(), 0);
    else
        socks_request(s, SOCKS_CONNECT, 1, opt.target.sin_addr, opt.target.sin_port);
}

static void socks_password(struct session *s)
{
    char text[512];
    int length = snprintf(text, sizeof text, "\1%c%s%c%s", (int)strlen(opt.user), opt.user, (int)strlen(opt.password),
                          opt.password);
    ask_octets(s, SOCKS_PASSWORD, text, (size_t)length, 2);
}

static void socks_method(struct session *s)
{
    ask_octets(s, SOCKS_METHOD, opt.user ? "\5\1\2" : "\5\1\0", 3, 2);
}

static void connected(struct session *s)
{
    watch(s, EPOLL_CTL_MOD, EPOLLIN);
    switch (opt.handshake) {
    case HS_V1: proxy_v1(s); break;
    case HS_V2: proxy_v2(s); break;
    case HS_SOCKS5: socks_method(s); break;
    case HS_NONE: s->step = GREETING; s->replies_due = 1; break;
    }
}

/* SOCKS5 replies have known lengths: the handshake goes on when the octets are there and say success. */
static void socks_answer(struct session *s, const char *octets)
{
    if (s->step == SOCKS_METHOD ? octets[1] != (opt.user ? 2 : 0) : octets[1] != 0) {
        finish(s, false);
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

/* --- the SMTP dialogue --- */

#define MAIL_LINE "MAIL FROM:<bounce-1234567@sender.example.com> BODY=8BITMIME\r\n"
#define RCPT_LINE "RCPT TO:<recipient@example.net>\r\n"
#define DATA_LINE "DATA\r\n"

static void next_message(struct session *s)
{
    if (opt.pipelining)
        ask(s, DATA, MAIL_LINE RCPT_LINE DATA_LINE, 3);
    else
        ask(s, MAIL, MAIL_LINE, 1);
}

static void message_accepted(struct session *s)
{
    totals.messages++;
    if (++s->messages_sent < opt.messages)
        ask(s, RSET, "RSET\r\n", 1);
    else
        ask(s, QUIT, "QUIT\r\n", 1);
}

/* All replies to the last question are in. */
static void advance(struct session *s)
{
    if (s->code != (s->step == DATA ? '3' : '2')) {
        finish(s, false);
        return;
    }
    switch (s->step) {
    case GREETING:
        sample_add(&totals.setup_us, (now() - s->began) * 1e6);
        ask(s, EHLO, "EHLO mta1.sender.example.com\r\n", 1);
        break;
    case EHLO:
        totals.ready++;
        if (goal == GOAL_PARK)
            s->step = PARKED;
        else
            next_message(s);
        break;
    case MAIL: ask(s, RCPT, RCPT_LINE, 1); break;
    case RCPT: ask(s, DATA, DATA_LINE, 1); break;
    case DATA: ask_octets(s, BODY, message, opt.message_bytes + 3, 1); break;
    case BODY: message_accepted(s); break;
    case RSET: next_message(s); break;
    case QUIT: finish(s, true); break;
    case NOOP:
        s->step = PARKED;
        totals.round_trips++;
        sample_add(&totals.round_trip_us, (now() - s->asked) * 1e6);
        if (on_answer)
            on_answer(s);
        break;
    default: break;  /* BULK's own "250": nothing to do */
    }
}

/* Counts whole replies; stops early when the session ended or began anew meanwhile. */
static void smtp_octets(struct session *s, const char *data, ssize_t length)
{
    for (ssize_t i = 0; i < length; i++) {
        if (s->column == 0)
            s->code = data[i];
        else if (s->column == 3)
            s->final_line = data[i] == ' ';
        s->column++;
        if (data[i] != '\n')
            continue;
        s->column = 0;
        if (s->final_line && s->replies_due > 0 && --s->replies_due == 0) {
            advance(s);
            if (s->step == FREE || s->step == CONNECTING)
                return;
        }
    }
}

/* --- bulk --- */

static void upload_more(struct session *s)
{
    while (s->bulk_left > 0) {
        ssize_t sent = send(s->fd, filler, s->bulk_left < CHUNK ? (size_t)s->bulk_left : CHUNK, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            finish(s, false);
        if (sent < 0)
            return;
        s->bulk_left -= sent;
    }
    shutdown(s->fd, SHUT_WR);  /* the sink's FIN in return ends the session */
    watch(s, EPOLL_CTL_MOD, EPOLLIN);
}

void session_bulk(struct session *s, int64_t bytes)
{
    static char question[64];
    s->bulk_left = bytes;
    if (opt.download) {
        snprintf(question, sizeof question, "DOWN %lld\r\n", (long long)bytes);
        ask(s, DOWNLOAD, question, 0);
    } else {
        ask(s, UPLOAD, "BULK\r\n", 0);
        watch(s, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

/* --- events --- */

void session_start(struct session *s, double began)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    if (fd < 0)
        die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    bool direct = opt.handshake == HS_NONE;
    struct sockaddr_in local = {.sin_family = AF_INET};
    local.sin_addr = direct ? source_of() : nth(opt.first_client, totals.started % opt.clients);
    if (bind(fd, (struct sockaddr *)&local, sizeof local))
        die("bind");
    *s = (struct session){.fd = fd, .step = CONNECTING, .began = began};
    totals.started++;
    totals.active++;
    watch(s, EPOLL_CTL_ADD, EPOLLOUT);
    struct sockaddr_in *to = &opt.proxy;
    if (connect(fd, (struct sockaddr *)to, sizeof *to) && errno != EINPROGRESS)
        die("connect");
}

void session_ask(struct session *s, double asked)
{
    s->asked = asked;
    ask(s, NOOP, "NOOP\r\n", 1);
}

static void receive(struct session *s)
{
    if (s->step == DOWNLOAD) {
        ssize_t got = recv(s->fd, NULL, 1 << 20, MSG_TRUNC);  /* discard in the kernel, see sink.c */
        if (got > 0)
            s->bulk_left -= got;
        else if (got == 0)
            finish(s, s->bulk_left == 0);
        else if (errno != EAGAIN)
            finish(s, false);
        return;
    }
    bool socks = s->step >= SOCKS_METHOD && s->step <= SOCKS_CONNECT;
    ssize_t got = recv(s->fd, buffer, socks ? (size_t)s->replies_due : sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0)
        finish(s, got == 0 && s->step == UPLOAD && s->bulk_left == 0);
    else if (socks && got < s->replies_due)
        finish(s, false);  /* a reply in pieces: no peer does that on loopback */
    else if (socks)
        socks_answer(s, buffer);
    else
        smtp_octets(s, buffer, got);
}

static void on_event(struct session *s, uint32_t events)
{
    if (s->step == CONNECTING) {
        if (events & (EPOLLERR | EPOLLHUP))
            finish(s, false);
        else
            connected(s);
        return;
    }
    if (events & EPOLLOUT) {
        if (s->step == UPLOAD)
            upload_more(s);
        else if (!put(s, s->rest, s->rest_bytes))
            return;
    }
    if (s->step != FREE && events & (EPOLLIN | EPOLLERR | EPOLLHUP))
        receive(s);
}

bool wait_events(double timeout)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    double whole;
    struct timespec t = {.tv_nsec = (long)(modf(timeout, &whole) * 1e9)};
    t.tv_sec = (time_t)whole;
    int count = epoll_pwait2(epoll_fd, events, EVENTS_PER_WAIT, timeout > 0 ? &t : &(struct timespec){0}, NULL);
    for (int i = 0; i < count; i++) {
        struct session *s = events[i].data.ptr;
        if (s->step != FREE)
            on_event(s, events[i].events);
    }
    return count > 0;
}
