/* session.c - client sessions as connections: they begin and end here, and octets and events go through here.
 *
 * What is said on them is the business of the other files of session.h; how many there are, and when, is main.c's.
 */
#define _GNU_SOURCE
#include "native.h"
#include "session.h"
#include "tls.h"

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
static char buffer[CHUNK];
static char filler[CHUNK];   /* bulk upload */

enum goal session_goal;
struct totals totals;
void (*on_free)(struct session *s);
void (*on_answer)(struct session *s);

void session_watch_fd(int fd, int operation, uint32_t events, struct session *s)
{
    struct epoll_event event = {.events = events, .data.ptr = s};
    if (epoll_ctl(epoll_fd, operation, fd, &event))
        die("epoll_ctl");
}

void session_watch(struct session *s, int operation, uint32_t events)
{
    session_watch_fd(s->fd, operation, events, s);
}

struct in_addr nth_address(struct in_addr first, long n)
{
    return (struct in_addr){htonl(ntohl(first.s_addr) + (uint32_t)n)};
}

struct in_addr next_source(void)
{
    return nth_address(opt.first_source, totals.started % opt.sources);
}

void sessions_init(enum goal goal)
{
    session_goal = goal;
    epoll_fd = epoll_create1(0);
    if (opt.starttls)
        tls_client();
    memset(filler, 'x', sizeof filler);
    dialogue_init();
    if (opt.handshake == HS_NATIVE)
        channels_begin();
}

void session_finish(struct session *s, bool good)
{
    tls_free(s->tls);
    s->tls = NULL;
    if (opt.handshake == HS_NATIVE)
        channel_end(s, good);
    else
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
    if (opt.handshake == HS_NATIVE)
        channel_rest(s);
}

bool session_put(struct session *s, const char *data, size_t length)
{
    while (length) {
        ssize_t sent = s->tls ? tls_send(s->tls, data, length) : send(s->fd, data, length, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) {
            session_finish(s, false);
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
        session_watch(s, EPOLL_CTL_MOD, s->writing ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
    return true;
}

/* A command, on a channel in a frame of its own. */
void ask(struct session *s, enum step step, const char *text, int replies)
{
    size_t length = strlen(text);
    char framed[FRAME_HEAD + 256];
    s->step = step;
    s->replies_due = replies;
    if (opt.handshake != HS_NATIVE) {
        session_put(s, text, length);
        return;
    }
    frame_head((unsigned char *)framed, F_DATA, length);
    memcpy(framed + FRAME_HEAD, text, length);
    session_put(s, framed, FRAME_HEAD + length);
}

void ask_octets(struct session *s, enum step step, const void *data, size_t length, int octets_due)
{
    s->step = step;
    s->replies_due = octets_due;
    session_put(s, data, length);
}

/* --- bulk --- */

static void upload_more(struct session *s)
{
    while (s->bulk_left > 0) {
        ssize_t sent = send(s->fd, filler, s->bulk_left < CHUNK ? (size_t)s->bulk_left : CHUNK, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN)
            session_finish(s, false);
        if (sent < 0)
            return;
        s->bulk_left -= sent;
    }
    shutdown(s->fd, SHUT_WR);  /* the sink's FIN in return ends the session */
    session_watch(s, EPOLL_CTL_MOD, EPOLLIN);
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
        session_watch(s, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

/* --- events --- */

void session_start(struct session *s, double began)
{
    if (opt.handshake == HS_NATIVE) {
        channel_start(s, began);
        return;
    }
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    if (fd < 0)
        die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    bool direct = opt.handshake == HS_NONE;
    struct sockaddr_in local = {.sin_family = AF_INET};
    local.sin_addr = direct ? next_source() : nth_address(opt.first_client, totals.started % opt.clients);
    if (bind(fd, (struct sockaddr *)&local, sizeof local))
        die("bind");
    *s = (struct session){.fd = fd, .step = CONNECTING, .began = began};
    totals.started++;
    totals.active++;
    session_watch(s, EPOLL_CTL_ADD, EPOLLOUT);
    struct sockaddr_in *to = &opt.proxy;
    if (connect(fd, (struct sockaddr *)to, sizeof *to) && errno != EINPROGRESS)
        die("connect");
}

void session_quit(struct session *s)
{
    ask(s, QUIT, "QUIT\r\n", 1);
}

void session_ask(struct session *s, double asked)
{
    s->asked = asked;
    ask(s, NOOP, "NOOP\r\n", 1);
}

/* Reads all that is there: what OpenSSL holds back shows no event. */
static void receive_tls(struct session *s)
{
    ssize_t got = 1;
    while (s->tls && (got = tls_recv(s->tls, buffer, sizeof buffer)) > 0)
        dialogue_octets(s, buffer, got);
    if (s->tls && (got == 0 || errno != EAGAIN))
        session_finish(s, false);
}

static void receive(struct session *s)
{
    if (s->tls) {
        receive_tls(s);
        return;
    }
    if (s->step == DOWNLOAD) {
        ssize_t got = recv(s->fd, NULL, 1 << 20, MSG_TRUNC);  /* discard in the kernel, see sink.c */
        if (got > 0)
            s->bulk_left -= got;
        else if (got == 0)
            session_finish(s, s->bulk_left == 0);
        else if (errno != EAGAIN)
            session_finish(s, false);
        return;
    }
    bool socks = s->step >= SOCKS_METHOD && s->step <= SOCKS_CONNECT;
    ssize_t got = recv(s->fd, buffer, socks ? (size_t)s->replies_due : sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0)
        session_finish(s, got == 0 && s->step == UPLOAD && s->bulk_left == 0);
    else if (socks && got < s->replies_due)
        session_finish(s, false);  /* a reply in pieces: no peer does that on loopback */
    else if (socks)
        handshake_answer(s, buffer);
    else if (opt.handshake == HS_NATIVE)
        channel_octets(s, buffer, (size_t)got);
    else
        dialogue_octets(s, buffer, got);
}

static void on_event(struct session *s, uint32_t events)
{
    if (s->step == CONNECTING) {
        if (events & (EPOLLERR | EPOLLHUP))
            session_finish(s, false);
        else
            handshake_begin(s);
        return;
    }
    if (s->step == SHAKING) {
        dialogue_shake(s);
        return;
    }
    if (events & EPOLLOUT) {
        if (s->step == UPLOAD)
            upload_more(s);
        else if (!session_put(s, s->rest, s->rest_bytes))
            return;
    }
    if ((s->step != FREE || s->channel.ended_due) && events & (EPOLLIN | EPOLLERR | EPOLLHUP))
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
        if (s && (s->step != FREE || s->channel.ended_due))
            on_event(s, events[i].events);
    }
    return count > 0;
}
